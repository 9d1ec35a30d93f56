"""``prosocial generate``: replies to prompts, under a preference and a strength each, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosocial_ext.commands import UserError

if TYPE_CHECKING:
    from prosocial_ext.decoding import GuidedGenerator
    from prosocial_ext.decoding.loading import ArmSource
    from prosocial_ext.decoding.requests import Request

__all__ = ["add_arguments", "run"]

_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
_LARGEST = 3.4e38  # the sampler computes in float32
_REPLY = 128  # tokens, unless asked otherwise
_UNKNOWN_SHOWN = 10
_RESULTS = ("text", "tokens", "finish_reason", "logprobs")  # of an earlier run, whose output is input again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial generate``."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="prompts: JSON lines if it ends in .jsonl, else one "
                        "prompt per line; - is standard input, JSON lines if it begins with {")  # fmt: skip
    parser.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="prompts, instead of FILE")
    models = parser.add_argument_group("models: folders in Hugging Face's form, or hub ids")
    models.add_argument("--model", required=True, metavar="DIR", help="the base model")
    models.add_argument("--arm", metavar="DIR", help="the reward model: a PBLoRA or LoRA adapter, or a full model")
    models.add_argument("--arm-base", metavar="DIR", help="what the adapter was trained on (default: what it names)")
    models.add_argument("--no-arm", action="store_true", help="the base alone, whatever the rows of FILE ask for")
    models.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights; auto: of the file")
    models.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    wishes = parser.add_argument_group("where a row of FILE does not say otherwise")
    wishes.add_argument("--preference", metavar="NAME=X,...", help="weights, such as empathy=0.7,truthfulness=0.3")
    wishes.add_argument("--guidance", type=float, metavar="W", help="strength 1 / beta, 0: the base alone (1.0)")
    wishes.add_argument("--seed", type=int, default=0, help="from which each row gets its own (%(default)s)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    sampling.add_argument("--top-k", type=int, default=0, help="the likeliest K tokens, 0: all (%(default)s)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens of this mass (%(default)s)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="relative to the likeliest token (%(default)s)")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="per reply (128, or half the positions)")
    sampling.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts at a time (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="JSON lines (default: standard output)")
    output.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    output.add_argument("--logprobs", action="store_true", help="each token's log-prob, before the filters")


@dataclass
class _Row:
    """A request with its preference, guidance and seed settled, and later its prompt as the model reads it."""

    request: Request
    preference: dict[str, float] | None
    guidance: float
    seed: int
    text: str = ""
    ids: list[int] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> int:
    """Read the prompts, load the models, write a line per prompt in their order."""
    from prosocial_ext.quiet import quiet_transformers

    with _users_mistakes(arguments, ValueError, TypeError):
        _check_options(arguments)
        rows = _settle(_read_requests(arguments), arguments)
    with quiet_transformers():
        with _users_mistakes(arguments, ValueError):
            generator = _prepare(rows, arguments)
            limit = _reply_limit(rows, arguments.max_new_tokens, model=generator.model, arm=generator.arm)
        with _output(arguments.out, arguments.overwrite) as write:
            _generate(generator, rows, limit, arguments, write)
    return 0


# ---- what is asked for


def _check_options(arguments: argparse.Namespace) -> None:
    from prosocial_ext.reference import check

    if (arguments.file is None) == (arguments.prompt is None):
        found = "neither" if arguments.file is None else "both"
        raise UserError(f"the prompts must come from either --prompt or FILE, got {found}. - is standard input.")
    if arguments.no_arm:
        for name in ("arm", "arm_base", "preference", "guidance"):
            if getattr(arguments, name):
                raise UserError(f"--{name.replace('_', '-')} must be left out with --no-arm, which needs none.")
    if arguments.arm_base is not None and arguments.arm is None:
        raise UserError(f"--arm-base must come with --arm, got {arguments.arm_base} alone.")
    if arguments.guidance is not None:
        check.number("guidance", arguments.guidance, -_LARGEST, _LARGEST, "be a finite number")
    check.integer("seed", arguments.seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    check.number("temperature", arguments.temperature, 0.0, _LARGEST, "be a number >= 0", "0 is greedy.")
    check.integer("top_k", arguments.top_k, 0, 2**31, "be a count >= 0", "0 keeps all tokens.")
    if not 0 < arguments.top_p <= 1:
        check.fail("top_p", "be in (0, 1]", arguments.top_p, "1 keeps all tokens.")
    check.number("min_p", arguments.min_p, 0.0, 1.0, "be in [0, 1]", "0 keeps all tokens.")
    if arguments.max_new_tokens is not None:
        check.integer("max_new_tokens", arguments.max_new_tokens, 1, 2**31, "be a count >= 1")
    check.integer("batch_size", arguments.batch_size, 1, 2**31, "be a count >= 1")
    if arguments.out is not None:
        if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
            raise UserError(
                f"--out must be a file in a folder that exists, got {arguments.out}. Make the folder first."
            )
        if arguments.out.exists() and not arguments.overwrite:
            raise UserError(f"--out must not exist, got {arguments.out}. Pass --overwrite to replace it.")


def _read_requests(arguments: argparse.Namespace) -> list[Request]:
    from prosocial_ext.decoding.requests import Request, read_json_lines, read_text_lines

    if arguments.prompt is not None:
        requests = [Request(f"prompt {i}", text) for i, text in enumerate(arguments.prompt, start=1) if text.strip()]
        source = "--prompt"
    else:
        source = "standard input" if arguments.file == "-" else arguments.file
        try:
            data = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"FILE must be a file that can be read, got {source}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"FILE must be UTF-8, got {source} with byte {error.start} that is not. Convert it."
            ) from error
        json_lines = text.lstrip().startswith("{") if arguments.file == "-" else source.endswith(".jsonl")
        requests = (read_json_lines if json_lines else read_text_lines)(text.split("\n"), source)
    if not requests:
        raise UserError(f"the prompts must be at least one, got none that is not blank from {source}.")
    return requests


def _settle(requests: Sequence[Request], arguments: argparse.Namespace) -> list[_Row]:
    """Every row's preference, guidance and seed: its own, else the options'."""
    from prosocial_ext.decoding.requests import parse_preference
    from prosocial_ext.decoding.seeds import row_seeds

    strength = 1.0 if arguments.guidance is None else arguments.guidance
    preference = None if arguments.preference is None else parse_preference(arguments.preference)
    rows = []
    for request, seed in zip(requests, row_seeds(arguments.seed, len(requests)).tolist(), strict=True):
        row = _Row(
            request,
            preference if request.preference is None else request.preference,
            strength if request.guidance is None else request.guidance,
            seed if request.seed is None else request.seed,
        )
        if arguments.no_arm:
            row.guidance = 0.0
        if row.guidance == 0:
            row.preference = None  # nothing reads it
        elif arguments.arm is None:
            remedy = "Pass --no-arm for the base alone."
            raise UserError(f"--arm must be given for guidance {row.guidance:g} of {request.where}. {remedy}")
        rows.append(row)
    return rows


# ---- models and prompts


def _prepare(rows: Sequence[_Row], arguments: argparse.Namespace) -> GuidedGenerator:
    """The generator; what can be wrong with the rows is said before the weights are read."""
    from prosocial_ext.decoding import GuidedGenerator
    from prosocial_ext.decoding.loading import (
        check_full_model,
        check_same_tokens,
        find_arm,
        load_arm,
        load_model,
        load_tokenizer,
    )
    from prosocial_ext.decoding.prompts import read_prompts

    device = _device(arguments.device)
    check_full_model("model", arguments.model)
    tokenizer = load_tokenizer("model", arguments.model)
    source = None
    if any(row.guidance != 0 for row in rows):
        source = find_arm(arguments.arm, arguments.arm_base)
        check_same_tokens(tokenizer, load_tokenizer("arm", *filter(None, (source.path, source.base))))
        _check_preferences(rows, source)
    for row in rows:
        row.text = _render(row.request, tokenizer)
        row.ids = read_prompts(row.text, None, tokenizer, None).ids[0].tolist()
    _warn_of_unknown_words(rows, tokenizer)
    model = load_model("model", arguments.model, arguments.dtype)
    arm = None if source is None else load_arm(source, model, arguments.model, arguments.dtype).to(device)
    return GuidedGenerator(model.to(device), arm, tokenizer)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device must be one that torch can use, got {name}: {reason}. Pass cpu.") from error
    return device


def _check_preferences(rows: Sequence[_Row], source: ArmSource) -> None:
    from prosocial_ext.arm import as_matrix

    for row in rows:
        if row.guidance == 0:
            continue
        where = row.request.where
        if source.attributes is None:
            if row.preference is not None:
                remedy = f"The arm {source.path} takes none: it is no PBLoRA adapter."
                raise UserError(f"--preference must be left out, for {where} too. {remedy}")
        elif row.preference is None:
            names = ", ".join(source.attributes)
            raise UserError(f"--preference must be given for {where}. The arm's attributes are {names}.")
        else:
            try:
                as_matrix(row.preference, source.attributes)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error


def _render(request: Request, tokenizer: Any) -> str:
    if request.prompt is not None:
        return request.prompt
    if not tokenizer.chat_template:
        raise UserError(f"{request.where} must have a prompt, since the model's tokenizer has no chat template.")
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{request.where}: messages must suit the chat template, which says: {error}.") from error


def _warn_of_unknown_words(rows: Sequence[_Row], tokenizer: Any) -> None:
    unknown = tokenizer.unk_token_id
    found: dict[str, str] = {}  # each with its first place
    for row in rows:
        if unknown is not None and unknown in row.ids:
            for word in row.text.split():
                if unknown in tokenizer(word, add_special_tokens=False).input_ids:
                    found.setdefault(word, row.request.where)
    if found:
        shown = ", ".join(f"{word!r} ({where})" for word, where in list(found.items())[:_UNKNOWN_SHOWN])
        rest = f" and {len(found) - _UNKNOWN_SHOWN} more" if len(found) > _UNKNOWN_SHOWN else ""
        warning = f"warning: the tokenizer does not know, and reads as {tokenizer.unk_token}: {shown}{rest}"
        print(f"prosocial generate: {warning}", file=sys.stderr)


def _reply_limit(rows: Sequence[_Row], given: int | None, **models: Any) -> int:
    """The longest reply. The default depends on the models alone: a row must not depend on the others' prompts."""
    configs = {name: getattr(model, "config", None) for name, model in models.items()}
    positions = {name: getattr(config, "max_position_embeddings", None) or 2**31 for name, config in configs.items()}
    limit = given if given is not None else min(_REPLY, *(most // 2 for most in positions.values()))
    longest = max(rows, key=lambda row: len(row.ids))
    for name, most in positions.items():
        if len(longest.ids) + limit - 1 > most:  # the generator would find it too, but only when its turn comes
            raise UserError(
                f"--max-new-tokens must fit the {most} positions of --{name} after the {len(longest.ids)} tokens of "
                f"{longest.request.where}, got {limit}. Shorten the prompt or the reply."
            )
    return limit


# ---- replies


def _generate(
    generator: GuidedGenerator,
    rows: Sequence[_Row],
    limit: int,
    arguments: argparse.Namespace,
    write: Callable[[dict[str, Any]], None],
) -> None:
    import torch
    from tqdm import tqdm

    from prosocial_ext.decoding.special_tokens import eos_ids

    ends = set(eos_ids(None, generator.model, generator.tokenizer))
    conditioned = hasattr(generator.arm, "preference")
    with tqdm(total=len(rows), unit="prompt", disable=None, file=sys.stderr) as bar:  # None: shown on a terminal
        for start in range(0, len(rows), arguments.batch_size):
            batch = rows[start : start + arguments.batch_size]
            try:
                output = generator.generate(
                    [row.ids for row in batch],
                    preference=[row.preference or {} for row in batch] if conditioned else None,
                    guidance=torch.tensor([row.guidance for row in batch]),
                    seed=torch.tensor([row.seed for row in batch]),
                    temperature=arguments.temperature,
                    top_k=arguments.top_k,
                    top_p=arguments.top_p,
                    min_p=arguments.min_p,
                    max_new_tokens=limit,
                    return_logprobs=arguments.logprobs,
                )
            except ValueError as error:  # a model that gives NaN, or keeps no cache
                raise UserError(f"the batch from {batch[0].request.where} on: {error}") from error
            assert output.texts is not None  # the generator has a tokenizer
            for i, row in enumerate(batch):
                length = int(output.lengths[i])
                tokens = output.sequences[i, :length].tolist()
                result = {
                    **{key: value for key, value in row.request.extra.items() if key not in _RESULTS},
                    "prompt": row.text,
                    "text": output.texts[i],
                    "preference": row.preference,
                    "guidance": row.guidance,
                    "seed": row.seed,
                    "tokens": tokens,
                    "finish_reason": "stop" if tokens[-1] in ends else "length",
                }
                if output.logprobs is not None:
                    result["logprobs"] = output.logprobs[i, :length].tolist()
                write(result)
            bar.update(len(batch))


@contextmanager
def _output(path: Path | None, overwrite: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one line; a file appears under its name when all lines are there."""
    if path is None:
        yield lambda result: print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    temporary, written = path.with_name(f"{path.name}.{os.getpid()}.part"), 0

    def write(result: dict[str, Any]) -> None:
        nonlocal written
        print(json.dumps(result, ensure_ascii=False), file=file, flush=True)
        written += 1

    file = temporary.open("x", encoding="utf-8")
    try:
        with file:
            yield write
    except BaseException:
        if written:
            print(f"prosocial generate: the first {written} replies are in {temporary}", file=sys.stderr)
        else:
            temporary.unlink(missing_ok=True)
        raise
    if path.exists() and not overwrite:
        raise UserError(f"--out must not exist, and {path} does by now. The replies are in {temporary}.")
    temporary.replace(path)


@contextmanager
def _users_mistakes(arguments: argparse.Namespace, *errors: type[Exception]) -> Iterator[None]:
    """What the library's checks raise, as the user's mistake; an argument that is an option is called by its name."""
    try:
        yield
    except errors as error:
        argument, _, rule = str(error).partition(" ")
        option = f"--{argument.replace('_', '-')}" if argument in vars(arguments) else argument
        raise UserError(f"{option} {rule}") from error
