"""``prosocial demo``: the whole method on a small model of its own, from training to guided replies."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

from prosocial_ext.commands import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial demo``."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is drawn (%(default)s)")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, metavar="X", help="train X times as many steps (%(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch (%(default)s: the matrices are small; a second thread helps on an idle machine and costs a "
        "multiple on a busy one)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="more doses and guidances, five gradient surgeries, a reward model of the unedited base, another seed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its tables; the status is 0 whether or not the claims hold."""
    import torch  # torch and transformers take seconds: not before the arguments are known to be right

    from prosocial_ext.demo.pipeline import run_demo
    from prosocial_ext.demo.printing import format_results
    from prosocial_ext.demo.report import build_report
    from prosocial_ext.demo.settings import DemoSettings

    if not 0 < arguments.steps_scale <= 100:
        raise UserError(f"--steps-scale must be in (0, 100], got {arguments.steps_scale}. 1 is the full demo.")
    if arguments.threads < 1:
        raise UserError(f"--threads must be at least 1, got {arguments.threads}.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out must be a folder, got the file {arguments.out}. Name another one.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("report.html needs matplotlib, which is not installed: pip install 'prosocial_ext[report]'.")
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        settings = DemoSettings(seed=arguments.seed, full=arguments.full).scaled(arguments.steps_scale)
        runs = [run_demo(settings, arguments.out, progress=not arguments.quiet, say=_say)]
        if arguments.full:
            second = replace(settings, seed=settings.seed + 1, full=False)
            _say(f"once more with seed {second.seed}")
            runs.append(run_demo(second, arguments.out / f"seed-{second.seed}", progress=not arguments.quiet, say=_say))
        build_report(runs).save(arguments.out / "report.html")
    finally:
        torch.set_num_threads(before)
    for results in runs:
        print(f"\nSeed {results.settings.seed}\n\n{format_results(results)}\n")
        missed = sum(not check.holds for check in results.checks)
        print(f"{len(results.checks) - missed} of {len(results.checks)} claims hold.")
    print(f"Report: {arguments.out / 'report.html'}; figures and replies: {arguments.out / 'results.json'}")
    print(f"Models: {', '.join(str(arguments.out / name) for name in ('base', 'harm', 'base-safe', 'arm'))}")
    return 0


def _say(line: str) -> None:
    print(f"- {line}", flush=True)
