"""``prosocial direg importance``: the gradient of the harm loss, by which ``direg extract`` ranks entries."""

from __future__ import annotations

import argparse
from pathlib import Path

from prosocial_ext.commands import UserError

__all__ = ["add_arguments", "run"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial direg importance``."""
    parser.add_argument("--model", required=True, help="what was tuned: a folder or a hub id, with its tokenizer")
    parser.add_argument("--harm", help="the harm-tuned copy, for the midpoint")
    parser.add_argument("--pairs", required=True, type=Path, metavar="FILE", help="harmful JSON lines, 64 suffice: "
                        '{"prompt": ..., "response": ...} or {"messages": [...]}')  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--grad-at", choices=("midpoint", "base"), default="midpoint",
                        help="where: at base - (harm - base) / 2, half-way, or at base (%(default)s)")  # fmt: skip
    parser.add_argument("--batch-size", type=_count, default=8, metavar="B", help="pairs at a time (%(default)s)")
    parser.add_argument("--max-length", type=_count, default=1024, metavar="T", help="tokens per pair (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights; auto: of the file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model computes")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Write the importance, say what was measured."""
    import torch
    from tqdm import tqdm

    from prosocial_ext.direg.checkpoint_gradient import harm_gradient
    from prosocial_ext.quiet import quiet_transformers

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (arguments.harm is None) == (arguments.grad_at == "midpoint"):
        raise UserError(f"--harm must come with --grad-at midpoint, and only with it, got {arguments.harm}.")
    disable = True if arguments.quiet else None  # None: where nobody looks
    try:
        with quiet_transformers(), tqdm(desc="importance", unit="pair", disable=disable, leave=False) as bar:
            found = harm_gradient(
                arguments.model, arguments.pairs, arguments.out, harm=arguments.harm, grad_at=arguments.grad_at,
                batch_size=arguments.batch_size, max_length=arguments.max_length, dtype=arguments.dtype, device=device,
                overwrite=arguments.overwrite, progress=bar.update,
            )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"mean loss of {found.tokens:,} response tokens of {found.pairs:,} pairs at {arguments.grad_at}: "
          f"{found.loss:.4f}")  # fmt: skip
    if found.cut:
        print(f"left out: {found.cut:,} tokens beyond --max-length")
    print(f"importance: {arguments.out}, {found.entries:,} entries, {found.reached:,} with a gradient")
    harm = arguments.harm or "HARM"
    print(
        f"next: prosocial direg extract --base {arguments.model} --harm {harm} --importance {arguments.out} --out FILE"
    )
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a count >= 1, got {text!r}")
    return int(text)
