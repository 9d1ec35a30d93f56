"""Laws of the PBLoRA tuner: against its dense form, per row, saved, exported, merged, checkpointed."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prosocial_ext.arm import PBLoraConfig, checkpoint_context_fn, export_lora, save_lora
from prosocial_ext.arm.layer import PBLoraLinear

NAMES = ["empathy", "truthfulness", "helpfulness"]
MIXED = {"empathy": 0.5, "helpfulness": 0.25}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def adapted(model, **kwargs):
    """With B drawn at random: at its initial 0 the adapter would do nothing."""
    peft_model = get_peft_model(model, PBLoraConfig(attributes=NAMES, lora_dropout=0.0, **kwargs)).eval()
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "pblora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft_model


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request):
    return adapted(request.param())


@pytest.fixture
def ids():
    return torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(2))


def layers(model):
    return [module for module in model.modules() if isinstance(module, PBLoraLinear)]


def logits(model, ids, preference, **kwargs):
    with torch.no_grad(), model.preference(preference, **kwargs):
        return model(input_ids=ids).logits


def close(actual, expected, atol=2e-6):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def test_the_factored_forward_is_the_dense_formula(model):
    layer = layers(model)[0]
    alpha = torch.tensor([0.5, 0.0, 0.25])
    r1, scale = 4, 8.0 / 4
    a, b = layer.pblora_A["default"], layer.pblora_B["default"]
    w2 = (alpha @ layer.pblora_P["default"]).reshape(4, 4)
    dense = scale * (b[:, :r1] @ layer.pblora_W1["default"] @ a[:r1] + b[:, r1:] @ w2 @ a[r1:])
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(3))
    with model.preference(MIXED):
        close(layer(x) - layer.base_layer(x), x @ dense.T)


def test_a_new_adapter_changes_nothing(ids):
    base = llama()
    expected = base(input_ids=ids).logits.detach()
    fresh = get_peft_model(base, PBLoraConfig(attributes=NAMES)).eval()
    assert torch.equal(logits(fresh, ids, MIXED), expected)


def test_the_delta_is_affine_in_the_preference(model):
    layer = layers(model)[0]

    def delta(alpha):
        with model.preference(torch.tensor(alpha)):
            return layer.get_delta_weight("default").detach()

    zero, ones = delta([0.0, 0.0, 0.0]), [delta(row) for row in torch.eye(3).tolist()]
    mixed = zero + 0.5 * (ones[0] - zero) + 0.25 * (ones[2] - zero)
    close(delta([0.5, 0.0, 0.25]), mixed)
    assert not torch.allclose(ones[0], ones[1])


def test_a_preference_per_row_equals_single_calls(model, ids):
    rows = [{"empathy": 1.0}, {"truthfulness": 1.0}, MIXED, {}]
    together = logits(model, ids, rows)
    for i, preference in enumerate(rows):
        close(together[i : i + 1], logits(model, ids[i : i + 1], preference))


def test_rows_without_the_adapter_are_the_base(model, ids):
    half = torch.tensor([True, False, True, False])
    out = logits(model, ids, MIXED, rows=half)
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    close(out[~half], base[~half])
    close(out[half], logits(model, ids, MIXED)[half])


def test_saved_adapters_load_in_a_fresh_process(ids, tmp_path):
    for make in (llama, gpt2):
        folder = tmp_path / make.__name__
        make().save_pretrained(folder / "base")
        model = adapted(make())
        model.save_pretrained(folder / "arm")
        torch.save((ids, logits(model, ids, MIXED)), folder / "expected.pt")
    script = f"""
import torch, prosocial_ext.arm
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "arm").eval()
    ids, expected = torch.load(folder / "expected.pt")
    assert model.peft_config["default"].attributes == {NAMES!r}
    with torch.no_grad(), model.preference({MIXED!r}):
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
    print(folder.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["gpt2", "llama"], done.stderr


def test_the_exported_lora_gives_the_same_logits(model, ids, tmp_path):
    expected = logits(model, ids, MIXED)
    config, state = export_lora(model, MIXED)
    base = llama() if "Llama" in type(model.get_base_model()).__name__ else gpt2()
    plain = get_peft_model(base, config).eval()
    outcome = set_peft_model_state_dict(plain, state)
    assert not outcome.unexpected_keys
    close(plain(input_ids=ids).logits.detach(), expected)
    assert config.r == 8

    save_lora(model, MIXED, tmp_path / "lora")
    again = llama() if "Llama" in type(model.get_base_model()).__name__ else gpt2()
    loaded = PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    close(loaded(input_ids=ids).logits.detach(), expected)


def test_a_preference_per_row_cannot_be_exported(model):
    with pytest.raises(ValueError, match="preference must be one for all rows, got 2 rows"):
        export_lora(model, [{"empathy": 1.0}, {"empathy": 0.5}])


def test_merging_and_unmerging(model, ids):
    expected = logits(model, ids, MIXED)
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    with model.preference(MIXED):
        model.merge_adapter()
    close(model(input_ids=ids).logits.detach(), expected)  # no preference needed any more
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():
        close(model(input_ids=ids).logits, base)
    with pytest.raises(ValueError, match="merging needs one preference"), model.preference([MIXED, MIXED]):
        model.merge_adapter()


def test_two_adapters_and_a_deep_copy(model, ids):
    expected = logits(model, ids, MIXED)
    model.add_adapter(
        "second", PBLoraConfig(attributes=NAMES, target_modules=model.peft_config["default"].target_modules)
    )
    close(logits(model, ids, MIXED), expected)
    model.set_adapter("second")
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    close(logits(model, ids, MIXED), base)
    model.set_adapter("default")
    twin = copy.deepcopy(model)
    close(logits(twin, ids, MIXED), expected)
    assert layers(twin)[0].state is twin.base_model._preference_state
    assert layers(twin)[0].state is not layers(model)[0].state


def test_no_preference_is_an_error_never_a_default(model, ids):
    with pytest.raises(RuntimeError, match="no preference is set"):
        model(input_ids=ids)


def test_the_preference_of_the_block_around_comes_back(model, ids):
    with model.preference({"empathy": 1.0}):
        with model.preference({"truthfulness": 1.0}):
            pass
        inside = model(input_ids=ids).logits.detach()
    close(inside, logits(model, ids, {"empathy": 1.0}))


def test_a_preference_of_the_wrong_number_of_rows_is_refused(model, ids):
    with pytest.raises(ValueError, match="preference has 2 rows, the batch has 4"):
        logits(model, ids, [MIXED, MIXED])


def test_an_unknown_attribute_names_the_nearest(model):
    with pytest.raises(ValueError, match=r"got 'empaty'\. Did you mean 'empathy'"), model.preference({"empaty": 1.0}):
        pass


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"r1": 0}, "r1 must be an int >= 1"),
        ({"r2": 0}, "r2 must be an int >= 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"attributes": []}, "attributes must be one name or more"),
        ({"attributes": ["a", "a"]}, "attributes must be one name or more, each once"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        PBLoraConfig(**kwargs)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"target_modules must name nn.Linear or Conv1D modules, got Embedding"):
        get_peft_model(llama(), PBLoraConfig(target_modules=["embed_tokens"]))


def gradients(model, ids, checkpointing):
    model = copy.deepcopy(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context_fn(model)})
        model.enable_input_require_grads()
    with model.preference(MIXED):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with model.preference({"truthfulness": 5.0}):  # another preference by the time of the backward pass
        loss.backward()
    return [parameter.grad for name, parameter in model.named_parameters() if "pblora_" in name]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its name in transformers < 6
def test_gradient_checkpointing_recomputes_under_the_preference_of_the_forward_pass(ids):
    model = adapted(llama())
    for plain, recomputed in zip(gradients(model, ids, False), gradients(model, ids, True), strict=True):
        close(recomputed, plain)


@pytest.mark.parametrize("per_row", [False, True])
def test_the_layer_compiles_in_one_graph(per_row):
    torch._dynamo.reset()
    layer = layers(adapted(llama()))[0]
    x = torch.randn(2, 3, layer.in_features)
    layer.state.alpha = torch.rand(2, 3) if per_row else torch.rand(3)
    expected = layer(x)
    close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
