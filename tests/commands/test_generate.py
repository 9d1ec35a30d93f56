"""`prosocial generate`: its rows equal guided decoding by definition, whatever the batch; mistakes cost one line."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from prosocial_ext import cli
from prosocial_ext.arm import PBLoraConfig
from prosocial_ext.decoding import row_seeds
from prosocial_ext.decoding.loading import find_arm, load_arm, load_model
from tests.decoding import slow_loop
from tests.decoding.models import ATTRIBUTES, EOS, model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12", "w3 w1"]
MIXED = [  # preference and strength of each prompt
    ({"empathy": 1.0}, 1.0),
    ({"truthfulness": 1.0}, 2.0),
    ({"empathy": 0.5, "helpfulness": 0.5}, 0.5),
    (None, 0.0),
    ({"helpfulness": 1.0}, 1.5),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its twin in another folder, another model, and adapters on the base, as a user could have them."""
    root = tmp_path_factory.mktemp("models")
    words = tokenizer()
    words.chat_template = TEMPLATE
    for name, seed in (("base", 1), ("twin", 1), ("other", 2)):
        model("llama", seed=seed).save_pretrained(root / name)
        words.save_pretrained(root / name)
    torch.manual_seed(5)
    wide = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=2, init_lora_weights=False, **wide)
    for name, config in (
        ("pblora", PBLoraConfig(attributes=list(ATTRIBUTES), lora_dropout=0.0, **wide)),
        ("lora", lora),
    ):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
        for key, parameter in adapted.named_parameters():
            if "pblora_B" in key or "pblora_P" in key:  # B = 0 would change nothing
                parameter.data.normal_(std=2.0)
        adapted.save_pretrained(root / name)
    model("llama", seed=3, vocab=60).save_pretrained(root / "wider")
    tokenizer(words=56).save_pretrained(root / "wider")
    return root


@pytest.fixture
def prosocial(folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``prosocial generate``; returns its status, its rows and what it said."""
    monkeypatch.chdir(folders)

    def run(*arguments: Any, model: str = "base", arm: str | None = "pblora") -> SimpleNamespace:
        given = ["generate", "--model", model, "--max-new-tokens", "12", "--dtype", "float64", "--device", "cpu"]
        given += [] if arm is None else ["--arm", arm]
        try:
            status = cli.main([*given, *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, rows=[json.loads(line) for line in captured.out.splitlines()], **{
            "said": captured.err, "printed": captured.out})  # fmt: skip

    return run


def json_lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    entries = [
        {"prompt": prompt, "preference": preference, "guidance": guidance, "prompt_id": f"row {i}"}
        for i, (prompt, (preference, guidance)) in enumerate(zip(PROMPTS, MIXED, strict=True))
    ]
    return json_lines(tmp_path / "mixed.jsonl", entries)


def expected_tokens(folders: Path, seeds: list[int], arm: Any, **settings: Any) -> list[list[int]]:
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float64).eval()
    prompts = [tokenizer()(prompt).input_ids for prompt in PROMPTS]
    preferences = [preference or {} for preference, _ in MIXED]
    guidance = [guidance for _, guidance in MIXED]
    return slow_loop.decode(
        base, arm, prompts, seeds=seeds, steps=12, eos=(EOS,), preference=preferences, guidance=guidance, **settings
    )


def pblora(folders: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float64)
    return PeftModel.from_pretrained(base, folders / "pblora").double().eval()


# ---- what is drawn


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_every_row_equals_its_full_forwards_alone(prosocial: Any, folders: Path, mixed: Path, batch_size: int) -> None:
    done = prosocial(mixed, "--batch-size", batch_size, "--seed", 3, "--temperature", 0.9, "--top-k", 20)
    assert done.status == 0
    assert [row["prompt"] for row in done.rows] == PROMPTS
    seeds = row_seeds(3, len(PROMPTS)).tolist()
    expected = expected_tokens(folders, seeds, pblora(folders), temperature=0.9, top_k=20)
    assert [row["tokens"] for row in done.rows] == expected
    assert [(row["preference"], row["guidance"]) for row in done.rows] == MIXED
    assert [row["seed"] for row in done.rows] == seeds
    assert [row["prompt_id"] for row in done.rows] == [f"row {i}" for i in range(5)]


def test_the_preference_decides_the_text(prosocial: Any) -> None:
    texts = {
        prosocial("--prompt", *PROMPTS, "--preference", f"{name}=1", "--guidance", 2).printed for name in ATTRIBUTES
    }
    assert len(texts) == len(ATTRIBUTES)


def test_a_row_with_its_seed_draws_the_same_in_any_company(prosocial: Any, mixed: Path, tmp_path: Path) -> None:
    together = prosocial(mixed).rows
    shuffled = json_lines(tmp_path / "shuffled.jsonl", [together[i] for i in (3, 0, 4, 2)])
    again = prosocial(shuffled, "--batch-size", 3, "--seed", 99).rows
    assert again == [together[i] for i in (3, 0, 4, 2)]  # so the output of a run is input again


def test_an_adapter_of_the_models_own_folder_shares_its_weights_and_draws_the_same(prosocial: Any, mixed: Path) -> None:
    assert prosocial(mixed).rows == prosocial(mixed, "--arm-base", "twin").rows


def test_only_an_adapter_of_the_models_own_folder_shares_its_weights(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    for base, shared in ((str(folders / "base"), True), ("twin", False)):
        loaded = load_model("model", "base")
        arm = load_arm(find_arm("pblora", base), loaded, "base")
        assert any(module is loaded for module in arm.modules()) is shared


def test_a_full_model_and_a_plain_lora_are_arms_too(prosocial: Any, folders: Path) -> None:
    alone = prosocial("--prompt", *PROMPTS, "--no-arm", arm=None)
    drawn = {name: prosocial("--prompt", *PROMPTS, arm=name) for name in ("other", "lora")}
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float64).eval()
    other = AutoModelForCausalLM.from_pretrained(folders / "other", dtype=torch.float64).eval()
    prompts, seeds = [tokenizer()(prompt).input_ids for prompt in PROMPTS], row_seeds(0, len(PROMPTS)).tolist()
    expected = slow_loop.decode(base, other, prompts, seeds=seeds, steps=12, eos=(EOS,), guidance=1.0)
    assert [row["tokens"] for row in drawn["other"].rows] == expected
    assert len({alone.printed, drawn["other"].printed, drawn["lora"].printed}) == 3


def test_no_arm_is_guidance_0_is_the_base(prosocial: Any, mixed: Path, tmp_path: Path) -> None:
    alone = prosocial(mixed, "--no-arm", arm=None).rows
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    zero = prosocial(prompts, "--guidance", 0, arm="nothing-reads/this/arm").rows
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in zero]
    assert all(row["guidance"] == 0 and row["preference"] is None for row in alone + zero)


def test_finish_reasons_and_logprobs_belong_to_the_tokens(prosocial: Any) -> None:
    rows = prosocial("--prompt", *PROMPTS * 8, "--logprobs", "--temperature", 2, arm="other").rows
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        assert (row["tokens"][-1] == EOS) == (row["finish_reason"] == "stop")
        assert row["finish_reason"] == "stop" or len(row["tokens"]) == 12
        assert len(row["logprobs"]) == len(row["tokens"])
        assert all(value <= 0 for value in row["logprobs"])
        assert row["text"] == tokenizer().decode(row["tokens"], skip_special_tokens=True)


@pytest.mark.parametrize(("positions", "expected"), [(20, 10), (1000, 128)])
def test_the_default_length_suits_models_of_few_positions(
    positions: int, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model("llama", seed=4, max_position_embeddings=positions).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--no-arm", "--prompt", "w1", "--temperature", "0"]
    capsys.readouterr()
    assert cli.main(["generate", *arguments]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (len(row["tokens"]), row["finish_reason"]) == (expected, "length")


# ---- where prompts come from


@pytest.mark.parametrize("form", ["prompt", "text", "stdin_text", "jsonl", "stdin_jsonl", "messages"])
def test_the_same_prompts_in_every_form_draw_the_same(
    prosocial: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "w1 w2\n\nw3\r\n"
    lines = '{"prompt": "w1 w2"}\n\n{"prompt": "w3", "guidance": null}\n'
    chat = '{"messages": [{"role": "user", "content": "w1 w2"}]}\n{"messages": [{"role": "user", "content": "w3"}]}\n'
    source: list[Any] = ["-"]
    if form == "prompt":
        source = ["--prompt", "w1 w2", "--prompt", "w3"]
    elif form.startswith("stdin"):
        data = io.BytesIO((text if form == "stdin_text" else lines).encode())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data))
    else:
        source = [tmp_path / ("prompts.txt" if form == "text" else "prompts.jsonl")]
        source[0].write_bytes({"text": text, "jsonl": lines, "messages": chat}[form].encode())
    done = prosocial(*source, "--preference", "empathy=0.7,truthfulness=0.3")
    assert done.status == 0, done.said
    reference = prosocial("--prompt", "w1 w2", "w3", "--preference", "empathy=0.7,truthfulness=0.3")
    assert [row["tokens"] for row in done.rows] == [row["tokens"] for row in reference.rows]
    assert done.rows[1]["prompt"] == ("<bos> w3" if form == "messages" else "w3")


def test_unknown_words_are_named_in_a_warning(prosocial: Any) -> None:
    done = prosocial("--prompt", "w1 cat w2", "a cat w3", "w4", "--no-arm", arm=None)
    assert done.status == 0
    assert done.said == (
        "prosocial generate: warning: the tokenizer does not know, and reads as <unk>: "
        "'cat' (prompt 1), 'a' (prompt 2)\n"
    )


def test_nothing_else_is_said_and_no_bar_is_shown_off_a_terminal(prosocial: Any, mixed: Path) -> None:
    assert prosocial(mixed).said == ""


# ---- where rows go


def test_a_file_has_what_would_be_printed_and_is_not_overwritten(prosocial: Any, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    printed = prosocial(mixed).printed
    assert prosocial(mixed, "--out", out).printed == ""
    assert out.read_text(encoding="utf-8") == printed
    refused = prosocial(mixed, "--seed", 1, "--out", out)
    assert (refused.status, out.read_text(encoding="utf-8")) == (2, printed)
    assert refused.said == f"prosocial generate: --out must not exist, got {out}. Pass --overwrite to replace it.\n"
    assert prosocial(mixed, "--seed", 1, "--out", out, "--overwrite").status == 0
    assert out.read_text(encoding="utf-8") != printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.jsonl", "out.jsonl"]


def test_what_was_written_before_a_failure_is_kept_under_another_name(
    prosocial: Any, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prosocial_ext.decoding import GuidedGenerator

    generate, calls = GuidedGenerator.generate, []

    def second_batch_fails(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)

    monkeypatch.setattr(GuidedGenerator, "generate", second_batch_fails)
    done = prosocial(mixed, "--out", tmp_path / "out.jsonl", "--batch-size", 2)
    (part,) = tmp_path.glob("out.jsonl*")
    assert part.suffix == ".part"
    assert len(part.read_text(encoding="utf-8").splitlines()) == 2
    assert (done.status, done.said) == (130, f"prosocial generate: the first 2 replies are in {part}\n")


# ---- mistakes


MISTAKES = {
    "no_prompts": ([], {}, "either --prompt or FILE, got neither"),
    "two_sources": (["-", "--prompt", "w1"], {}, "either --prompt or FILE, got both"),
    "blank_prompt": (["--prompt", " "], {}, "at least one, got none"),
    "no_file": (["nothing.txt"], {}, "FILE must be a file that can be read, got nothing.txt: No such file"),
    "preference": (["--prompt", "w1", "--preference", "empathy"], {}, "--preference must be a list of attribute="),
    "preference_twice": (["--prompt", "w1", "--preference", "a=1,a=2"], {}, "name each attribute once, got 'a' twice"),
    "attribute": (["--prompt", "w1", "--preference", "empaty=1"], {}, "got 'empaty'. Did you mean 'empathy'?"),
    "no_preference": (["--prompt", "w1"], {}, "--preference must be given for prompt 1. The arm's attributes are"),
    "preference_of_lora": (["--prompt", "w1", "--preference", "a=1"], {"arm": "lora"}, "it is no PBLoRA adapter"),
    "no_arm_given": (["--prompt", "w1"], {"arm": None}, "--arm must be given for guidance 1 of prompt 1"),
    "arm_and_no_arm": (["--prompt", "w1", "--no-arm"], {}, "--arm must be left out with --no-arm"),
    "arm_base_alone": (["--prompt", "w1", "--arm-base", "base"], {"arm": None}, "--arm-base must come with --arm"),
    "arm_base_of_full": (["--prompt", "w1", "--arm-base", "base"], {"arm": "other"}, "--arm-base must be left out"),
    "guidance": (["--prompt", "w1", "--guidance", "nan"], {}, "--guidance must be a finite number, got nan"),
    "seed": (["--prompt", "w1", "--seed", "-1"], {}, "--seed must be an integer in [0, 2**63), got -1"),
    "temperature": (["--prompt", "w1", "--temperature", "-1"], {}, "--temperature must be a number >= 0, got -1.0"),
    "top_k": (["--prompt", "w1", "--top-k", "-1"], {}, "--top-k must be a count >= 0, got -1"),
    "top_p": (["--prompt", "w1", "--top-p", "0"], {}, "--top-p must be in (0, 1], got 0.0"),
    "min_p": (["--prompt", "w1", "--min-p", "2"], {}, "--min-p must be in [0, 1], got 2.0"),
    "batch_size": (["--prompt", "w1", "--batch-size", "0"], {}, "--batch-size must be a count >= 1, got 0"),
    "too_long": (["--prompt", "w1", "--no-arm", "--max-new-tokens", 64], {"arm": None}, "64 positions of the model"),
    "no_model": (["--prompt", "w1", "--no-arm"], {"arm": None, "model": "no/such/folder"}, "--model must be a folder"),
    "no_arm_folder": (["--prompt", "w1", "--preference", "a=1"], {"arm": "no/such/arm"}, "--arm must be a folder"),
    "adapter_as_model": (["--prompt", "w1", "--no-arm"], {"arm": None, "model": "pblora"}, "the adapter pblora. Name"),
    "empty_folder": (["--prompt", "w1", "--no-arm"], {"arm": None, "model": "."}, "Loading it failed"),
    "tokenizers": (["--prompt", "w1"], {"arm": "wider"}, "the arm's tokenizer must give every token the model's id"),
    "device": (["--prompt", "w1", "--no-arm", "--device", "toaster"], {"arm": None}, "--device must be one that torch"),
    "out": (["--prompt", "w1", "--no-arm", "--out", "no/such/out"], {"arm": None}, "--out must be a file in a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_one_line(prosocial: Any, name: str) -> None:
    arguments, models, words = MISTAKES[name]
    done = prosocial(*arguments, **models)
    assert done.status == 2
    assert done.printed == ""
    assert done.said.startswith("prosocial generate: ")
    assert done.said.count("\n") == 1
    assert words in done.said


LINES = {
    "not_json": ("{prompt}", "must be a JSON object, got a text with"),
    "a_list": ("[1]", "must be a JSON object, got '[1]'"),
    "neither": ("{}", 'must have either "prompt" or "messages", got neither'),
    "both": ('{"prompt": "w1", "messages": []}', 'must have either "prompt" or "messages", got both'),
    "blank": ('{"prompt": " "}', "prompt must be a text that is not blank"),
    "messages": ('{"messages": [{"role": "user"}]}', "messages must be a list of"),
    "misspelt": ('{"prompt": "w1", "preferance": {}}', "a key must be 'preference', or nothing like it"),
    "preference": ('{"prompt": "w1", "preference": 1}', "preference must be an object of numbers"),
    "attribute": ('{"prompt": "w1", "preference": {"empaty": 1}}', "Did you mean 'empathy'?"),
    "weight": ('{"prompt": "w1", "preference": {"empathy": "1"}}', "preference['empathy'] must be a finite number"),
    "huge": ('{"prompt": "w1", "preference": {"empathy": 1e999}}', "preference['empathy'] must be a finite number"),
    "guidance": ('{"prompt": "w1", "guidance": NaN}', "guidance must be a finite number, got nan"),
    "seed": ('{"prompt": "w1", "seed": 1.5}', "seed must be an integer in [0, 2**63), got 1.5"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_by_its_number(prosocial: Any, name: str, tmp_path: Path) -> None:
    line, words = LINES[name]
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "w1"}\n\n' + line + "\n", encoding="utf-8")
    done = prosocial(path, "--preference", "empathy=1")
    assert (done.status, done.said.count("\n")) == (2, 1)
    assert f"line 3 of {path}" in done.said
    assert words in done.said


def test_an_adapter_whose_base_has_moved_asks_for_it(prosocial: Any, folders: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (folders / "lora").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "runs/elsewhere/base"
    (moved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = prosocial("--prompt", "w1", arm=str(moved))
    assert refused.status == 2
    assert "--arm-base must be given" in refused.said
    assert "'runs/elsewhere/base'" in refused.said
    moved_on = prosocial("--prompt", "w1", "--arm-base", "base", arm=str(moved))
    assert moved_on.printed == prosocial("--prompt", "w1", arm="lora").printed


def test_code_that_comes_with_a_model_is_not_run(prosocial: Any, folders: Path, tmp_path: Path) -> None:
    config = json.loads((folders / "base" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    for path in (folders / "base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    done = prosocial("--prompt", "w1", "--no-arm", arm=None, model=str(tmp_path))
    assert (done.status, done.said.count("\n")) == (2, 1)
    assert "brings code of its own, which is not run" in done.said
    assert not (tmp_path / "ran").exists()
