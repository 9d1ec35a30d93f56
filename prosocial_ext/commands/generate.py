"""``prosocial generate``: replies to prompts, under a preference and a strength each, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosocial_ext.commands import UserError, users_mistakes

if TYPE_CHECKING:
    from prosocial_ext.decoding import GuidedGenerator
    from prosocial_ext.decoding.replies import Row, Sampling
    from prosocial_ext.decoding.requests import Request

__all__ = ["add_arguments", "run"]

_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
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


def run(arguments: argparse.Namespace) -> int:
    """Read the prompts, load the models, write a line per prompt in their order."""
    from prosocial_ext.decoding.loading import find_device, find_models
    from prosocial_ext.decoding.replies import encode_rows, reply_limit, unknown_words
    from prosocial_ext.quiet import quiet_transformers

    with users_mistakes(arguments, ValueError, TypeError):
        sampling = _check_options(arguments)
        rows = _settle(_read_requests(arguments), arguments)
    with quiet_transformers():
        with users_mistakes(arguments, ValueError):
            device = find_device(arguments.device)
            guided = any(row.guidance != 0 for row in rows)
            sources = find_models(arguments.model, arguments.arm if guided else None, arguments.arm_base)
            encode_rows(rows, sources.tokenizer, sources.attributes)
            if warning := unknown_words(rows, sources.tokenizer):
                print(f"prosocial generate: warning: {warning}", file=sys.stderr)
            generator = sources.load(arguments.dtype, device)
            limit = reply_limit(rows, generator, arguments.max_new_tokens)
        with _output(arguments.out, arguments.overwrite) as write, users_mistakes(arguments, ValueError):
            _generate(generator, rows, limit, sampling, arguments.logprobs, write)
    return 0


# ---- what is asked for


def _check_options(arguments: argparse.Namespace) -> Sampling:
    from prosocial_ext.decoding.replies import Sampling
    from prosocial_ext.decoding.requests import LARGEST
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
        check.number("guidance", arguments.guidance, -LARGEST, LARGEST, "be a finite number")
    check.integer("seed", arguments.seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    if arguments.out is not None:
        if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
            raise UserError(
                f"--out must be a file in a folder that exists, got {arguments.out}. Make the folder first."
            )
        if arguments.out.exists() and not arguments.overwrite:
            raise UserError(f"--out must not exist, got {arguments.out}. Pass --overwrite to replace it.")
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )


def _read_requests(arguments: argparse.Namespace) -> list[Request]:
    from prosocial_ext.decoding.requests import Request, parse_requests, read_requests

    if arguments.prompt is not None:
        requests = [Request(f"prompt {i}", text) for i, text in enumerate(arguments.prompt, start=1) if text.strip()]
        if not requests:
            raise UserError("the prompts must be at least one, got none that is not blank from --prompt.")
        return requests
    if arguments.file != "-":
        return read_requests("FILE", arguments.file)
    data = sys.stdin.buffer.read()
    return parse_requests("FILE", data, "standard input", data.removeprefix(BOM_UTF8).lstrip().startswith(b"{"))


def _settle(requests: Sequence[Request], arguments: argparse.Namespace) -> list[Row]:
    """Every row's preference, guidance and seed: its own, else the options'."""
    from prosocial_ext.decoding.replies import settle
    from prosocial_ext.decoding.requests import parse_preference

    rows = settle(
        requests,
        seed=arguments.seed,
        preference=None if arguments.preference is None else parse_preference(arguments.preference),
        guidance=1.0 if arguments.guidance is None else arguments.guidance,
        alone=arguments.no_arm,
    )
    for row in rows:
        if row.guidance != 0 and arguments.arm is None:
            remedy = "Pass --no-arm for the base alone."
            raise UserError(f"--arm must be given for guidance {row.guidance:g} of {row.request.where}. {remedy}")
    return rows


# ---- replies


def _generate(
    generator: GuidedGenerator,
    rows: Sequence[Row],
    limit: int,
    sampling: Sampling,
    logprobs: bool,
    write: Callable[[dict[str, Any]], None],
) -> None:
    from tqdm import tqdm

    from prosocial_ext.decoding.replies import draw_replies

    with tqdm(total=len(rows), unit="prompt", disable=None, file=sys.stderr) as bar:  # None: shown on a terminal
        for batch in draw_replies(generator, rows, limit, sampling, logprobs=logprobs):
            for reply in batch:
                row = reply.row
                result = {
                    **{key: value for key, value in row.request.extra.items() if key not in _RESULTS},
                    "prompt": row.text,
                    "text": reply.text,
                    "preference": row.preference,
                    "guidance": row.guidance,
                    "seed": row.seed,
                    "tokens": reply.tokens,
                    "finish_reason": reply.finish_reason,
                }
                if reply.logprobs is not None:
                    result["logprobs"] = reply.logprobs
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
