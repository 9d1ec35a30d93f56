"""Harm vectors against a benign control: what tuning moves anyway, whatever the data, is taken out before selection.

With tau = harm - base and beta = benign - base, each rounded once to the precision p (float32; float64 where a side is
float64), or what a LoRA adapter says that it adds, the vector that is selected from is, entry by entry,

    minus        round(tau - beta)
    project out  round(tau - round(c * beta)),  c = round(<tau, beta> / <beta, beta>)

where both products run over all entries that take part: one coefficient for the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from prosocial_ext import ops
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.direg.pairing import Pair, Pairs
from prosocial_ext.reference import check

__all__ = ["against_benign", "check_one_control"]

_BLOCK = 1 << 18  # elements of one partial product: fixed, so that the sum depends on no chunk


def check_one_control(minus: object, project_out: object) -> None:
    """Raise where both controls are asked for.

    Raises:
        ValueError: They are.
    """
    if minus is not None and project_out is not None:
        check.fail("minus and project_out", "be given one or neither", "both", "Either contains the other's direction.")


def against_benign(
    pairs: Pairs, benign: Pairs, *, project: bool, progress: Callable[[int], object] = lambda _: None
) -> Pairs:
    """Return ``pairs`` with the benign copy on a third side.

    Args:
        pairs: Base and harm-tuned.
        benign: The same base and the benign copy, of the same tensors.
        project: Take out the benign direction (a read of all three), else subtract the benign vector.
        progress: Called with the number of bytes just read.

    Raises:
        CheckpointError: Other tensors take part on the two sides, a difference is not finite, or nothing moved in the
            benign copy.

    >>> import torch
    >>> from prosocial_ext.direg.pairing import pair_models
    >>> base, harm, benign = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for model, row in ((base, [0.0, 0.0]), (harm, [3.0, 4.0]), (benign, [2.0, 0.0])):
    ...     model.weight.data = torch.tensor([row])
    >>> against_benign(pair_models(base, harm), pair_models(base, benign), project=True).pairs[0].coefficient
    1.5
    """
    others = {pair.name: pair for pair in benign.pairs}
    if odd := sorted({pair.name for pair in pairs.pairs} ^ set(others)):
        remedy = "All three must come from one architecture, with the same tensors tied."
        refuse("the benign copy", "have the harm copy's tensors", f"a difference at {listed(odd)}", remedy)
    joined = []
    for pair in pairs.pairs:
        other = others[pair.name]
        numel = min(pair.numel, other.numel)
        joined.append(replace(pair, numel=numel, benign=other.tuned, benign_is_delta=other.is_delta))
    if project:
        coefficient = _coefficient(joined, progress)
        joined = [replace(pair, coefficient=coefficient) for pair in joined]
    return replace(pairs, pairs=joined, left_alone={**benign.left_alone, **pairs.left_alone})


def _coefficient(pairs: list[Pair], progress: Callable[[int], object]) -> float:
    """<tau, beta> / <beta, beta>: exact products of blocks in float64, summed with one rounding in any order."""
    cross: list[float] = []
    square: list[float] = []
    for pair in pairs:
        assert pair.benign is not None
        for start in range(0, pair.numel, _BLOCK):
            stop = min(pair.numel, start + _BLOCK)
            base, tuned, other = (side.read(start, stop) for side in (pair.base, pair.tuned, pair.benign))
            tau = pair.added(base, tuned, pair.is_delta)
            beta = pair.added(base, other, pair.benign_is_delta)
            if not bool((tau.isfinite() & beta.isfinite()).all()):
                refuse(f"the differences at {shown(pair.name)}", "be finite", "NaN or Inf", "Repair the checkpoints.")
            gram = ops.gradient_gram([tau, beta])
            cross.append(float(gram[0, 1]))
            square.append(float(gram[1, 1]))
            progress(base.nbytes + tuned.nbytes + other.nbytes)
    below = math.fsum(square)
    if not below:
        refuse("the benign copy", "differ from the base", "one that does not", "It has no direction to project out.")
    return math.fsum(cross) / below
