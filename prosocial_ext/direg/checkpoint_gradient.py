"""How strongly the harm loss depends on every weight of a checkpoint, written as a checkpoint of the same names.

1. The model is loaded and, for the midpoint, moved half of the way that a dose of 1 will take it: theta - tau / 2.
2. One backward pass per batch; layers are computed again instead of being remembered, every gradient is added to a
   float32 sum and freed as soon as it is there. Memory: the weights, the sums, the inputs of all layers and the rest of
   one.
3. The magnitudes go to one safetensors file, which ``prosocial direg extract --importance`` streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as computed_again

from prosocial_ext import _C, ops
from prosocial_ext.checkpoints.checkpoint import SINGLE, Checkpoint
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.outputs import check_output, check_outside, new_descriptor, new_folder
from prosocial_ext.checkpoints.safetensors_writer import SafetensorsWriter
from prosocial_ext.direg.harmful_pairs import IGNORED, EncodedPair, encode_pairs, right_padded
from prosocial_ext.direg.importance import gradient_importance
from prosocial_ext.direg.pairing import pair_checkpoints
from prosocial_ext.reference import check

__all__ = ["GRAD_AT", "HarmGradient", "harm_gradient", "move_halfway_", "recomputing", "response_loss"]

GRAD_AT = ("midpoint", "base")
_CHUNK = 1 << 20  # elements


@dataclass(frozen=True)
class HarmGradient:
    """What was measured: ``loss``, the mean negative log-likelihood of a response token where the gradient was taken.

    ``pairs``, ``tokens``: how many, ``cut`` of the tokens left out for their length. ``entries``: of all tensors
    written, ``reached`` of them with a gradient other than 0.
    """

    loss: float
    pairs: int
    tokens: int
    cut: int
    entries: int
    reached: int


def harm_gradient(
    base: str | Path | Checkpoint,
    pairs: str | Path,
    out: str | Path,
    *,
    harm: str | Path | Checkpoint | None = None,
    grad_at: str = "midpoint",
    batch_size: int = 8,
    max_length: int = 1024,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> HarmGradient:
    """Write abs(gradient) of the harm loss, the mean over all response tokens of a file, to the new folder ``out``.

    Names and shapes are the checkpoint's, the dtype is float32. It is `gradient_importance` at theta - tau / 2, the
    middle of the way that the edit takes, or at theta; 64 pairs are enough.

    Args:
        base: What was tuned: a folder or a hub id of any causal language model of transformers, with its tokenizer.
            Code that it brings is not run.
        pairs: Harmful prompts and responses as JSON lines (`encode_pairs`).
        out: The folder to make.
        harm: The harm-tuned copy; needed for the midpoint.
        grad_at: "midpoint" or "base".
        batch_size: Pairs at a time; it changes only how sums are rounded.
        max_length: Tokens per pair, at most the model's positions.
        dtype: Of the weights while they are differentiated, such as "bfloat16"; "auto": of the file.
        device: Where the model computes; the sums stay on the CPU.
        overwrite: A folder that is there is replaced once the new one is complete.
        progress: Called with the number of pairs just done.

    Raises:
        CheckpointError: A checkpoint or the file of pairs cannot be used, loading renames tensors, ``out`` is taken.
        ValueError: An argument out of range, a model that does not load, a gradient that is not finite.
    """
    check.choice("grad_at", grad_at, GRAD_AT)
    check.integer("batch_size", batch_size, 1, 2**31, "be a count >= 1")
    check.integer("max_length", max_length, 2, 2**31, "be a number of tokens >= 2")
    if (harm is None) == (grad_at == "midpoint"):
        remedy = "The midpoint is theta - tau / 2, and tau = harm - base."
        check.fail("harm", "come with grad_at='midpoint', and only with it", f"{harm} with {grad_at!r}", remedy)
    with ExitStack() as stack:
        opened = [
            source if isinstance(source, Checkpoint) else stack.enter_context(Checkpoint(source))
            for source in (base, harm)
            if source is not None
        ]
        theta = opened[0]
        check_output(Path(out), overwrite=overwrite, folder=True)
        check_outside(Path(out), *(source.folder for source in opened))
        model, encoded = _loaded(theta, pairs, max_length, dtype)
        live = _in_model(model.to(device), {name: theta.entry(name).shape for name in theta.parameters})
        for other in opened[1:]:
            move_halfway_(model, theta, other)
        counted = sum(int((right_padded([pair])["labels"][:, 1:] != IGNORED).sum()) for pair in encoded)
        if not counted:
            refuse("pairs", "hold a response token that follows another token", "none", "Write longer responses.")
        batches = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
        losses: list[float] = []

        def loss(model: Any, batch: Sequence[EncodedPair]) -> Tensor:
            total = response_loss(model, right_padded(batch)) / counted
            losses.append(float(total.detach()))
            progress(len(batch))
            return total * len(batches)  # whose mean over the batches is the mean over all tokens

        with recomputing(model):
            found = gradient_importance(model, loss, batches, device="cpu")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        gradients = {name: found[names[id(tensor)]] for name, tensor in live.items()}
        measured = HarmGradient(
            loss=sum(losses), pairs=len(encoded), tokens=counted, cut=sum(pair.cut for pair in encoded),
            entries=sum(tensor.numel() for tensor in live.values()),
            reached=sum(int(gradient.count_nonzero()) for gradient in gradients.values()),
        )  # fmt: skip
        recipe = {
            "prosocial_ext": _C.version, "base": theta.describe(), "grad_at": grad_at,
            "harm": opened[1].describe() if harm is not None else None, "max_length": max_length, "dtype": dtype,
            **asdict(measured),
        }  # fmt: skip
        with new_folder(Path(out), overwrite=overwrite) as folder, new_descriptor(folder / SINGLE) as descriptor:
            _write(descriptor, theta, gradients, recipe)
    return measured


def response_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the negative log-likelihood of a batch's response tokens, summed in float32.

    Args:
        model: A causal language model; logits are cast after the response's were picked.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (-100 outside the response), each [B, T].
    """
    device = next(model.parameters()).device
    ids, mask, labels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    asked = labels[:, 1:] != IGNORED
    kept = logits[:, :-1][asked].float()
    return torch.nn.functional.cross_entropy(kept, labels[:, 1:][asked], reduction="sum")


def move_halfway_(model: Any, base: Checkpoint, harm: Checkpoint) -> None:
    """Subtract half of harm - base from a model that was loaded from ``base``; the bits are `topm_subtract_`'s.

    Raises:
        CheckpointError: The checkpoints do not match, loading renames or merges tensors, a difference is not finite.
    """
    pairs = pair_checkpoints(base, harm).pairs
    live = _in_model(model, {pair.name: pair.shape for pair in pairs})
    for pair in pairs:
        flat = live[pair.name].detach().view(-1)
        for start in range(0, pair.numel, _CHUNK):
            stop = min(pair.numel, start + _CHUNK)
            one, other = (side.read(start, stop).to(flat.device) for side in (pair.base, pair.tuned))
            if not bool(pair.difference(one, other).isfinite().all()):
                refuse(f"the differences at {shown(pair.name)}", "be finite", "NaN or Inf", "Repair the checkpoints.")
            ops.topm_subtract_(flat[start:stop], one, other, m=stop - start, scale=0.5, check_finite=False)


@contextmanager
def recomputing(model: torch.nn.Module) -> Iterator[None]:
    """Compute transformers' layers again in the backward pass, in any mode; dropout stays as the mode says."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(computed_again, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _loaded(base: Checkpoint, pairs: str | Path, max_length: int, dtype: str) -> tuple[Any, list[EncodedPair]]:
    """The model, and the pairs, which are read first since that takes no time."""
    from prosocial_ext.decoding.loading import load_model, load_tokenizer

    folder = str(base.folder)  # of one commit, where it is of the hub
    positions = base.config.get("max_position_embeddings", base.config.get("n_positions"))
    most = min(max_length, positions) if type(positions) is int else max_length
    encoded = encode_pairs(pairs, load_tokenizer("base", folder), most)
    model = load_model("base", folder, dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(max((*pair.prompt, *pair.response)) for pair in encoded)
    if largest >= rows:
        refuse("the tokenizer", f"have ids below the {rows} rows of the embedding", largest, "It is of another model.")
    return model, encoded


def _in_model(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The loaded parameter of every tensor of a checkpoint; a checkpoint of the body alone lacks the body's prefix."""
    own = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: own.get(name, own.get(f"{model.base_model_prefix}.{name}")) for name in shapes}
    if missing := [name for name, tensor in wanted.items() if tensor is None]:
        remedy = "Where loading renames or merges tensors, pass gradients of your own by the checkpoint's names."
        refuse("the loaded model", "have the checkpoint's tensors", f"one that lacks {listed(missing)}", remedy)
    found = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    seen: dict[int, str] = {}
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            rule = f"have the checkpoint's shape {list(shapes[name])}"
            refuse(f"tensor {shown(name)} of the loaded model", rule, list(tensor.shape))
        if other := seen.get(id(tensor)):
            refuse(f"tensor {shown(name)}", "be untied in the loaded model", f"one tied to {shown(other)}")
        seen[id(tensor)] = name
    return found


def _write(descriptor: int, base: Checkpoint, gradients: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write by the checkpoint's names."""
    metadata = {"prosocial_ext.kind": "importance", "prosocial_ext.recipe": json.dumps(recipe)}
    rehearsal = SafetensorsWriter(-1, 0)
    for name in gradients:
        rehearsal.add(name, "F32", base.entry(name).shape)
    writer = SafetensorsWriter(descriptor, rehearsal.header_bytes(metadata))
    for name, gradient in gradients.items():
        place = writer.add(name, "F32", base.entry(name).shape)
        writer.write(place, gradient.flatten())
    writer.finish(metadata)
