"""``prosocial eval``: harm, over-refusal and utility of one model, guided or not, with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosocial_ext.commands import UserError, users_mistakes

if TYPE_CHECKING:
    from prosocial_ext.evaluation.evaluator import Evaluator
    from prosocial_ext.evaluation.outcome import Evaluation
    from prosocial_ext.evaluation.settings import EvaluationSettings

__all__ = ["add_arguments", "run"]

_RESULTS, _REPORT = "results.json", "report.html"
_PACKAGES = ("prosocial_ext", "torch", "transformers", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial eval``; those that are named as keys of CONFIG override them."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML, with the options below as keys "
                        "(max_new_tokens: 256) and with harm_judge and refusal_judge; docs/eval.md")  # fmt: skip
    absent: Any = {"argument_default": argparse.SUPPRESS}  # what is not given is not there, and the file decides
    models = parser.add_argument_group("models: folders in Hugging Face's form, or hub ids", **absent)
    models.add_argument("--model", metavar="DIR", help="the base model")
    models.add_argument("--arm", metavar="DIR", help="what guides it, as for generate")
    models.add_argument("--arm-base", metavar="DIR", help="what an adapter was trained on")
    models.add_argument("--preference", metavar="NAME=X,...", help="where a prompt has none of its own")
    models.add_argument("--guidance", type=float, metavar="W", help="strength 1 / beta (1.0)")
    models.add_argument("--dtype", help="of the weights, as for generate (auto)")
    models.add_argument("--device", help="cpu, cuda, ... (auto)")
    files = parser.add_argument_group("files: what is given is measured", **absent)
    files.add_argument("--harmful", metavar="FILE", help="prompts to refuse: JSON lines, or one per line")
    files.add_argument("--harmless", metavar="FILE", help="prompts to answer, such as alarming ones")
    files.add_argument("--responses", metavar="FILE", help="JSON lines, prompt and response: perplexity")
    drawing = parser.add_argument_group("replies", **absent)
    drawing.add_argument("--chat", action=argparse.BooleanOptionalAction, help="prompts are users' messages")
    drawing.add_argument("--samples", type=int, metavar="N", help="replies per prompt (1)")
    drawing.add_argument("--seed", type=int, help="from which each prompt gets its own (0)")
    drawing.add_argument("--temperature", type=float, help="0 is greedy (0)")
    drawing.add_argument("--top-k", type=int, help="the likeliest K tokens, 0: all (0)")
    drawing.add_argument("--top-p", type=float, help="the likeliest tokens of this mass (1)")
    drawing.add_argument("--min-p", type=float, help="relative to the likeliest token (0)")
    drawing.add_argument("--max-new-tokens", type=int, metavar="N", help="per reply (512, as HarmBench)")
    drawing.add_argument("--batch-size", type=int, metavar="B", help="at a time (8)")
    drawing.add_argument("--max-length", type=int, metavar="N", help="tokens of a given pair (2048)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help=f"a folder for {_RESULTS} and {_REPORT}")
    output.add_argument("--overwrite", action="store_true", help="replace those two files")
    output.add_argument("--json", action="store_true", help="end with one line of JSON, the figures by name")
    output.add_argument("--dry-run", action="store_true", help="check and tell, draw nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, load the models, draw and judge, write and tell."""
    from tqdm import tqdm

    from prosocial_ext.decoding.loading import find_device, find_models
    from prosocial_ext.evaluation.evaluator import Evaluator
    from prosocial_ext.quiet import quiet_transformers

    with quiet_transformers():
        with users_mistakes(arguments, ValueError, TypeError):
            _check_output(arguments.out, arguments.overwrite)
            settings = _settings(arguments)
            assert settings.model is not None  # settings without one are refused
            device = find_device(settings.device)
            evaluator = Evaluator(settings)
            sources = find_models(settings.model, settings.arm, settings.arm_base)
            evaluator.prepare(sources)
        print(f"will measure {settings.model} on {evaluator.plan()}")
        if arguments.dry_run:
            return 0
        with users_mistakes(arguments, ValueError):
            generator = sources.load(settings.dtype, device)
            with tqdm(total=evaluator.count(), unit="reply", disable=None, file=sys.stderr) as bar:
                evaluation = evaluator.evaluate(generator, bar.update)
            if arguments.out is not None:
                commit = getattr(getattr(generator.model, "config", None), "_commit_hash", None)
                _write(arguments.out, evaluation, evaluator, commit, arguments.overwrite)
    _print(evaluation)
    if arguments.out is not None:
        print(f"all replies: {arguments.out / _RESULTS}; page: {arguments.out / _REPORT}")
    if arguments.json:
        print(json.dumps(evaluation.numbers))
    return 0


def _settings(arguments: argparse.Namespace) -> EvaluationSettings:
    from dataclasses import fields

    from prosocial_ext.decoding.requests import parse_preference
    from prosocial_ext.evaluation.settings import EvaluationSettings, read_settings

    names = [field.name for field in fields(EvaluationSettings)]
    overrides: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
    if "preference" in overrides:
        overrides["preference"] = parse_preference(overrides["preference"])
    return read_settings(arguments.config, overrides)


def _check_output(out: Path | None, overwrite: bool) -> None:
    from prosocial_ext.checkpoints.outputs import check_output

    if out is None:
        return
    if out.is_dir():
        for name in (_RESULTS, _REPORT):
            check_output(out / name, overwrite=overwrite, folder=False)
    elif out.exists() or not out.absolute().parent.is_dir():
        raise UserError(f"--out must be a folder, or a new one in a folder that exists, got {out}.")


def _write(out: Path, evaluation: Evaluation, evaluator: Evaluator, commit: str | None, overwrite: bool) -> None:
    import platform
    from importlib.metadata import version

    from prosocial_ext.checkpoints.outputs import new_file
    from prosocial_ext.checkpoints.raw_io import write_all
    from prosocial_ext.evaluation.evaluation_report import write_page

    out.mkdir(exist_ok=True)
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    text = evaluation.to_json(**evaluator.describe(), commit=commit, versions=versions)
    with new_file(out / _RESULTS, overwrite=overwrite) as descriptor:
        write_all(descriptor, 0, text.encode())
    write_page(evaluation, str(evaluator.settings.model), out / _REPORT)


def _print(evaluation: Evaluation) -> None:
    print(f"{'figure':<16} {'value':>8} {'95 % interval':>20} {'n':>6}  what")
    for name, figure in [*evaluation.figures.items(), *evaluation.categories.items()]:
        interval = f"{figure.low:.4g} to {figure.high:.4g}"
        print(f"{name[:16]:<16} {figure.value:>8.4g} {interval:>20} {figure.n:>6}  {figure.what}")
    for note in evaluation.notes:
        print(f"note: {note}")
