"""The harm vector: the largest entries of harm-tuned minus base weights, in a file that is read piece by piece."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.hub import fetch_vector
from prosocial_ext.checkpoints.outputs import check_output, check_outside, new_descriptor, new_file
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.direg.adapter import Adapter, open_side
from prosocial_ext.direg.arithmetic import VALUES, round_values, write_sum
from prosocial_ext.direg.controls import against_benign, check_one_control
from prosocial_ext.direg.cut import Cut, ScoredBlock, find_cut
from prosocial_ext.direg.extract import DEFAULT_MEMORY, Progress, chunk_elements, extract, plan_groups
from prosocial_ext.direg.harm_stats import HarmVectorStats, ModuleStats
from prosocial_ext.direg.live import LiveEdit, subtract_live
from prosocial_ext.direg.low_rank import plan_ranks, write_low_rank
from prosocial_ext.direg.models import Weights
from prosocial_ext.direg.pairing import Pairs, groups, pair_models, pair_side
from prosocial_ext.direg.ranks import ALONE, Ranks
from prosocial_ext.direg.read_notes import ReadNotes
from prosocial_ext.direg.resume import Resumed, job_of, working_file
from prosocial_ext.direg.rules import choose_rule, default_density
from prosocial_ext.direg.sharing import VECTOR, push_vector, save_vector
from prosocial_ext.direg.sparse_file import Block, Measure, SparseReader, SparseTensor, SparseWriter
from prosocial_ext.ops._stream import sum_squares
from prosocial_ext.reference import check
from prosocial_ext.reference.topm import entry_count

__all__ = ["HarmVector"]

_COPY = 8 << 20


class HarmVector:
    """Selected entries of tuned - base, on disk: opening costs the header, everything else is streamed.

    Make one with `from_checkpoints`, `from_adapter`, `from_models` or `load`. It is never changed: `top` and `scale`
    return views of the same file. Values are the float32 differences to the bit (float64 of float64 tensors), so that
    subtracting them equals `prosocial_ext.ops.topm_subtract_` over the sorted tensor names; the rules "dare" and
    "low_rank" store others.

    ``recipe``: what it was made from and how. ``tensors``: name, shape and number of entries of every tensor.

    >>> base, tuned = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = base.weight.fill_(1.0), tuned.weight.copy_(torch.tensor([[1.0, 1.5], [4.0, 1.0]]))
    >>> vector = HarmVector.from_models(base, tuned, m=1)
    >>> vector
    HarmVector(1 of 4 entries, 1 tensors)
    >>> with vector.subtracted_from(base, scale=1.0):
    ...     base.weight.data
    tensor([[ 1.,  1.],
            [-2.,  1.]])
    >>> base.weight.data
    tensor([[1., 1.],
            [1., 1.]])
    """

    def __init__(
        self, reader: SparseReader, cuts: Mapping[str, tuple[int, Cut]] | None = None, factor: float = 1.0
    ) -> None:
        self._reader, self._cuts, self._factor = reader, cuts, factor
        self._edits: weakref.WeakKeyDictionary[torch.nn.Module, LiveEdit] = weakref.WeakKeyDictionary()
        self.recipe: dict[str, Any] = dict(reader.recipe)
        if factor != 1.0:
            self.recipe["factor"] = self.recipe.get("factor", 1.0) * factor

    @classmethod
    def from_checkpoints(
        cls,
        base: str | Path | Checkpoint | torch.nn.Module,
        harm: str | Path | Checkpoint | Adapter,
        *,
        density: float | None = None,
        m: int | None = None,
        scope: str = "global",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        importance: Mapping[str, Tensor] | str | Path | Checkpoint | None = None,
        rule: str | None = None,
        seed: int = 0,
        minus: str | Path | Checkpoint | Adapter | None = None,
        project_out: str | Path | Checkpoint | Adapter | None = None,
        out: str | Path | None = None,
        values: str = "exact",
        overwrite: bool = False,
        resume: bool = True,
        memory: int = DEFAULT_MEMORY,
        progress: Progress = lambda _: None,
        resumed: Resumed = lambda tensors, of, size: None,
        ranks: Ranks = ALONE,
    ) -> HarmVector:
        """Extract from two checkpoints of any size: one read of both, ``memory`` bytes of buffers.

        ``out`` is there when it is complete. What kills or stops a run leaves what it has read, noted after every 8 GiB
        or so in a hidden folder beside ``out``; the same call goes on from there and comes to the same bytes.

        Args:
            base: What was tuned: a folder or a hub id.
            harm: The harm-tuned copy, sharded in any way, or a LoRA adapter (`from_adapter` says what that means).
            density: The share of the floating-point parameters, 0 < density <= 1; tied ones count once. Neither it nor
                ``m``: 0.10, the Safety Arithmetic default.
            m: Their number instead.
            scope: "global": m of all entries; "per_layer", "per_tensor": m (or the density) of each.
            include: Globs; only tensors whose name matches one take part.
            exclude: Globs; tensors whose name matches one take no part.
            importance: The magnitude of the harm loss's gradient: a tensor per tensor by name, or a folder.
            rule: What entries are ranked by. "magnitude": their size, the paper's rule. "saliency": abs(difference *
                importance). For ablations "random", a draw, "dare", the same draw with values times entries over
                kept entries, and "low_rank": all entries, of matrices approximated by ranks whose factors take the
                share ``density`` of their numbers (`prosocial_ext.direg.low_rank`; up to 6 reads, one process).
                None: "saliency" where there is importance, else "magnitude".
            seed: Of the draw, in [0, 2**63).
            minus: A benign control, tuned on harmless data, full or an adapter: its difference is subtracted before
                selection.
            project_out: A benign control whose direction is taken out instead, with one coefficient for the whole
                model (another read; `prosocial_ext.direg.controls` has the definition).
            out: The file to write. None: a nameless temporary one, which goes with this object.
            values: "bf16": ``out`` gets rounded values (`save`), through a temporary file beside it.
            overwrite: ``out`` may exist.
            resume: Go on with what a stopped run left; without, that is removed. Where a side is in memory, at density
                1 and with the rule "low_rank" every run begins anew, as it does on another number of ranks.
            memory: Bytes for buffers beyond what the imports take.
            progress: Called with the number of bytes just read.
            resumed: Called, if a stopped run is gone on with, with the number of tensors taken over, of how many, and
                their bytes, which are not read again.
            ranks: Of a torchrun (`prosocial_ext.direg.ranks`): they share the tensors, and write the one-rank file.

        Raises:
            CheckpointError: A checkpoint cannot be used, the two do not match, a difference is not finite.
            ValueError: An argument out of range.
        """
        check_scope_and_globs(scope, include, exclude)
        check_one_control(minus, project_out)
        density = default_density(density, m)
        with ExitStack() as stack:
            control = project_out if minus is None else minus
            one = stack.enter_context(Checkpoint(base)) if isinstance(base, (str, Path)) else base
            other = open_side(harm, stack) if isinstance(harm, (str, Path)) else harm
            benign = open_side(control, stack) if isinstance(control, (str, Path)) else control
            weights = stack.enter_context(Checkpoint(importance)) if isinstance(importance, (str, Path)) else importance
            if out is not None:
                read = [side for side in (one, other, benign) if isinstance(side, (Checkpoint, Adapter))]
                check_outside(Path(out), *(side.folder for side in read))
            pairs = pair_side(one, other, weights, include, exclude)
            described = one.describe() if isinstance(one, Checkpoint) else {}
            recipe = _recipe(described, other.describe(), density, include, exclude)
            if isinstance(weights, Checkpoint):
                recipe["importance"] = weights.describe()
            if benign is not None:
                third = pair_side(one, benign, None, include, exclude)
                pairs = against_benign(pairs, third, project=minus is None, progress=progress)
                recipe |= _control(pairs, benign.describe(), minus is None)
            arguments = {"m": m, "density": density, "scope": scope, "rule": rule, "seed": seed, "memory": memory,
                         "progress": progress, "ranks": ranks}  # fmt: skip
            if out is None:
                return cls._made(pairs, recipe, arguments, values)
            job, sides = None, [side for side in (other, benign, weights) if side is not None]
            told = [side.identity() for side in sides if isinstance(side, (Checkpoint, Adapter))]
            if isinstance(one, Checkpoint) and len(told) == len(sides) and rule != "low_rank":
                job = job_of("extract", one, sides=told, recipe=recipe, m=m, scope=scope, rule=rule, seed=seed,
                             values=values, chunk=chunk_elements(memory))  # fmt: skip
            return cls._written(pairs, recipe, arguments, values, Path(out), overwrite, job, resume, resumed)

    @classmethod
    def from_models(
        cls,
        base: torch.nn.Module,
        tuned: Weights,
        *,
        density: float | None = None,
        m: int | None = None,
        scope: str = "global",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        importance: Mapping[str, Tensor] | None = None,
        rule: str | None = None,
        seed: int = 0,
        minus: Weights | None = None,
        project_out: Weights | None = None,
    ) -> HarmVector:
        """Extract from a model and its tuned copy (a model or state dict) in memory; arguments as `from_checkpoints`.

        The entries lie in a nameless temporary file (in ``TMPDIR``) that goes with this object.

        Raises:
            ValueError: Names or shapes of the models differ, a difference is not finite, an argument out of range.
        """
        check_scope_and_globs(scope, include, exclude)
        check_one_control(minus, project_out)
        density = default_density(density, m)
        pairs = pair_models(base, tuned, importance, include, exclude)
        recipe = _recipe({}, {}, density, include, exclude)
        for control in (model for model in (minus, project_out) if model is not None):
            third = pair_models(base, control, None, include, exclude)
            pairs = against_benign(pairs, third, project=minus is None)
            recipe |= _control(pairs, {}, minus is None)
        arguments = {"m": m, "density": density, "scope": scope, "rule": rule, "seed": seed}
        return cls._made(pairs, recipe, arguments)

    @classmethod
    def from_adapter(
        cls,
        base: str | Path | Checkpoint | torch.nn.Module,
        adapter: str | Path | Adapter,
        **options: Any,
    ) -> HarmVector:
        """Extract from a LoRA adapter and the base that it was trained on; ``options`` as `from_checkpoints`.

        The differences are the adapter's own dW in float32, by peft's ``get_delta_weight`` of the factors as peft loads
        them, and not what merging makes of them: merging rounds base + dW to the base's dtype, and in bfloat16 that
        erases most small entries and ties the others, so that the ranking is lost. Whole tensors in the adapter
        (modules_to_save, biases) are differences from the base's. One dW per adapter is in memory, beyond ``memory``;
        it is torch's matrix product, whose bits are promised on one machine and not across processors.

        Args:
            base: A folder, a hub id, or a model in memory (a control must then be an adapter, too).
            adapter: A folder or a hub id.
            options: As `from_checkpoints`, which does all of this for an adapter as ``harm``.

        Raises:
            CheckpointError: The adapter is no plain LoRA (DoRA and others: merge it first) or not of this base.
            ValueError: An argument out of range.
        """
        with ExitStack() as stack:
            lora = stack.enter_context(Adapter(adapter)) if isinstance(adapter, (str, Path)) else adapter
            return cls.from_checkpoints(base, lora, **options)

    @classmethod
    def load(cls, path: str | Path) -> HarmVector:
        """Open a file written by `save` or ``prosocial direg extract``; entries are read when they are needed.

        Raises:
            CheckpointError: It is no harm vector, or a damaged one.
        """
        return cls(SparseReader(SafetensorsFile(path), "harm_vector"))

    def save(self, path: str | Path, *, values: str = "exact", overwrite: bool = False) -> None:
        """Write this vector, or view, as a file of its own (docs/harm_vector.md).

        Args:
            path: The file.
            values: "bf16" rounds the values: 2 bytes instead of 4 per entry, an edit that no longer has the bits of
                `prosocial_ext.ops.topm_subtract_`, no `top`. The recipe's ``values_error`` tells the relative error.
            overwrite: It may exist.

        Raises:
            CheckpointError: ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        check.choice("values", values, VALUES)
        with new_file(Path(path), overwrite=overwrite) as descriptor:
            if values == "bf16":
                round_values(descriptor, self)
            elif self._cuts is None and self._factor == 1.0:
                file = self._reader.file
                for start in range(0, file.size, _COPY):
                    write_all(descriptor, start, file.read_bytes(start, min(file.size, start + _COPY)))
            else:
                self._write_view(descriptor)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> HarmVector:
        """Open what `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: A folder, or a hub id; of a repository the vector alone is downloaded.
            revision: A branch, tag or commit of the hub.

        Raises:
            CheckpointError: There is none, or a damaged one.
        """
        return cls.load(fetch_vector(str(source), VECTOR, revision))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a new folder with ``harm.safetensors``, a card (README.md) and ``recipe.json``; reads every value once.

        Raises:
            CheckpointError: It exists and ``overwrite`` is False, or cannot be written.
        """
        save_vector(self, Path(folder), overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str = "Upload harm vector",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit, and return its address.

        Args:
            repo_id: Such as "owner/name"; made where it is not there.
            private: Whether only those who may see it do: added instead of subtracted, the vector does harm. A
                repository that is there stays as visible as it is.
            revision: The branch; None is the main one.
            commit_message: Its first line.
            create_pr: Open a pull request instead.

        Raises:
            CheckpointError: The hub refuses.
        """
        return push_vector(
            self, repo_id, private=private, revision=revision, message=commit_message, create_pr=create_pr
        )

    def __repr__(self) -> str:
        return f"HarmVector({self.entries:,} of {self.n:,} entries, {len(self.tensors)} tensors)"

    @cached_property
    def tensors(self) -> dict[str, SparseTensor]:
        """Name, shape and number of entries of every tensor, in the global order."""
        found = {name: self._reader.tensors[name] for name in sorted(self._reader.tensors)}
        if self._cuts is not None:
            for name, tensor in found.items():
                found[name] = replace(tensor, entries=sum(len(positions) for positions, _ in self.blocks(name)))
        return found

    @property
    def entries(self) -> int:
        """The number of entries stored."""
        return sum(tensor.entries for tensor in self.tensors.values())

    @property
    def n(self) -> int:
        """The number of entries that took part."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def magnitudes(self) -> Tensor | None:
        """int64 [bins, 2]: how many of all entries, before selection, begin with these 16 bits (sign cleared)."""
        return self._reader.magnitudes

    @property
    def file_bytes(self) -> int:
        """The size of the file behind this vector."""
        return self._reader.file.size

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor's values: float32, of a float64 tensor float64; 16 bits in the file are widened."""
        return torch.float64 if self._reader.dtype(name) == torch.float64 else torch.float32

    def identity(self) -> list[Any]:
        """What tells this vector, or view, from others, as far as can be told without reading it; as JSON."""
        cuts = {name: repr(cut) for name, cut in (self._cuts or {}).items()}
        return [self._reader.file.identity(), cuts, self._factor]

    def blocks(self, name: str) -> Iterator[Block]:
        """Yield a tensor's entries as blocks of ascending flat positions (int64) and values.

        Raises:
            CheckpointError: The file is damaged.
        """
        for positions, values in self._reader.blocks(name):
            if self._cuts is not None:
                number, cut = self._cuts[name]
                held = cut.holds(values, number, positions)
                positions, values = positions[held], values[held]
            values = values.to(self.dtype(name))
            if self._factor != 1.0:
                values = values * self._factor
                if not bool(values.isfinite().all()):
                    refuse("factor", "keep values finite", f"{self._factor} at {shown(name)}")
            yield positions, values

    def top(self, density: float | None = None, *, m: int | None = None) -> HarmVector:
        """Return a view of the largest entries, as if extracted at this density, which is at most the stored one.

        Args:
            density: The share of the entries that took part, of each group of the vector's scope.
            m: Their number instead.

        Raises:
            ValueError: More entries than are stored; the vector was ranked otherwise than by magnitude, is a sum, or
                has rounded values, whose ties hide the order.
        """
        if self.recipe.get("values", "exact") != "exact":
            refuse("top", "be asked of a vector with exact values", shown(self.recipe["values"]), "Extract again.")
        if self.recipe.get("rank") != "magnitude":
            refuse("top", "be asked of a vector ranked by magnitude", shown(self.recipe.get("rank")), "Extract again.")
        names = list(self.tensors)
        scope = check.choice("the recipe's scope", self.recipe.get("scope"), ("global", "per_layer", "per_tensor"))
        cuts = {}
        for group in groups(names, scope):
            stored = sum(self.tensors[names[i]].entries for i in group)
            count = entry_count(m, density, sum(self.tensors[names[i]].numel for i in group), "the group")
            if count > stored:
                refuse("density or m", f"ask for at most the {stored} stored entries", count, "Extract again.")
            wide = any(self._reader.dtype(names[i]) == torch.float64 for i in group)
            cut = find_cut(lambda group=group: self._scored(names, group), count, wide)  # type: ignore[misc]
            cuts.update({names[i]: (i, cut) for i in group})
        view = HarmVector(self._reader, cuts, self._factor)
        view.recipe |= {"density": density, "m": view.entries}
        for share in ("energy_share", "first_order_share"):  # of what was extracted
            view.recipe.pop(share, None)
        return view

    def scale(self, factor: float) -> HarmVector:
        """Return a view whose values are multiplied by ``factor`` (one rounding).

        Raises:
            ValueError: ``factor`` is not a finite number, or 0.
        """
        check.number("factor", factor, -3e38, 3e38, "be a finite number")
        if factor == 0:
            check.fail("factor", "not be 0", factor, "A vector of zeros edits nothing.")
        if self._factor != 1.0:
            refuse("scale", "be called once", f"a vector scaled by {self._factor}", "Save it, or scale the first one.")
        view = HarmVector(self._reader, self._cuts, float(factor))
        view.recipe = {**self.recipe, "factor": self.recipe.get("factor", 1.0) * factor}
        return view

    def __add__(self, other: HarmVector) -> HarmVector:
        """Add on the union of the stored entries (one rounding), in a nameless temporary file.

        What either vector left out counts as 0. The energy of the result is that of its entries.

        Raises:
            CheckpointError: Shapes or ties differ, a sum is not finite.

        >>> zero = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(zero.weight)
        >>> one = HarmVector.from_models(zero, {"weight": torch.tensor([[1.0, 0.0]])}, m=1)
        >>> other = HarmVector.from_models(zero, {"weight": torch.tensor([[2.0, 3.0]])}, m=1)
        >>> list((one + other).blocks("weight"))
        [(tensor([0, 1]), tensor([1., 3.]))]
        """
        return self._summed(other, 1)

    def __sub__(self, other: HarmVector) -> HarmVector:
        """Subtract on the union of the stored entries; otherwise as ``+``."""
        return self._summed(other, -1)

    def stats(self) -> HarmVectorStats:
        """Count entries and energy per tensor, module and in all; reads every value once."""
        rows = []
        for name, tensor in self.tensors.items():
            kept = sum(sum_squares(values) for _, values in self.blocks(name))
            energy = tensor.energy * self._factor**2
            rows.append(ModuleStats(name, tensor.entries, tensor.numel, kept, energy))
        return HarmVectorStats(rows)

    # ---- live models

    def subtract_(self, model: torch.nn.Module, scale: float = 1.0) -> LiveEdit:
        """Subtract ``scale * vector`` from a model in memory and keep the original bits for `revert_` and `rescale_`.

        The bits are those of `prosocial_ext.ops.topm_subtract_`. Parameters stay on their devices; all or nothing.

        Args:
            model: The base, or another model of its architecture; may be a peft model, lie on several devices, or be
                sharded by rows (FSDP2, DTensor): then every rank calls this, and edits its own shards.
            scale: The dose lambda; 1 takes the whole difference back.

        Raises:
            CheckpointError: The model does not fit, or holds this vector already.
        """
        if model in self._edits:
            refuse("model", "not hold this vector already", "one that does", "Call rescale_, or revert_ first.")
        self._edits[model] = edit = subtract_live(model, self, scale)
        return edit

    def revert_(self, model: torch.nn.Module) -> None:
        """Restore every bit that `subtract_` changed in ``model``.

        Raises:
            CheckpointError: The model does not hold this vector.
        """
        if model not in self._edits:
            refuse("model", "hold this vector", "one that does not", "Call subtract_ of this object first.")
        self._edits.pop(model).revert_()

    def rescale_(self, model: torch.nn.Module, scale: float) -> LiveEdit:
        """Change the dose in ``model``: the same bits as `subtract_` from the original model.

        Raises:
            CheckpointError: The model does not hold this vector.
        """
        check.number("scale", scale, -3e38, 3e38, "be a finite number")  # before the old dose is gone
        self.revert_(model)
        return self.subtract_(model, scale)

    @contextmanager
    def subtracted_from(self, model: torch.nn.Module, scale: float = 1.0) -> Iterator[LiveEdit]:
        """Subtract for the length of a ``with`` block, then restore every bit."""
        edit = self.subtract_(model, scale)
        try:
            yield edit
        finally:
            if self._edits.get(model) is not None:
                self.revert_(model)

    # ---- files

    @classmethod
    def _made(
        cls, pairs: Pairs, recipe: dict[str, Any], arguments: dict[str, Any], values: str = "exact"
    ) -> HarmVector:  # fmt: skip
        """Of a nameless file."""
        check.choice("values", values, VALUES)
        if values != "exact":
            check.fail("values", "be 'exact' where out is None", repr(values), "Call save(path, values='bf16').")
        if arguments.get("ranks", ALONE).size > 1:
            check.fail("out", "be a file where several ranks write it", None)
        folder = Path(tempfile.gettempdir())
        with tempfile.TemporaryFile(prefix="harm-") as file:
            _extract(pairs, file.fileno(), folder, recipe, arguments)
            return cls._unnamed(file.fileno())

    @classmethod
    def _written(
        cls, pairs: Pairs, recipe: dict[str, Any], arguments: dict[str, Any], values: str, out: Path, overwrite: bool,
        job: str | None, resume: bool, resumed: Resumed,
    ) -> HarmVector:  # fmt: skip
        """Of the file ``out``, which all ranks write together."""
        check.choice("values", values, VALUES)
        check_output(out, overwrite=overwrite, folder=False)
        _check_selection(pairs, arguments)  # a slip must not cost what a stopped run has left
        ranks: Ranks = arguments["ranks"]
        with working_file(out, job, overwrite=overwrite, resume=resume, ranks=ranks) as (partial, notes):

            def write(descriptor: int | None) -> None:
                _extract(pairs, descriptor, partial.aside, recipe, arguments, notes=notes, resumed=resumed)

            if ranks.rank:
                write(None)
            else:
                with new_descriptor(partial.made, may_exist=True) as descriptor:
                    os.ftruncate(descriptor, 0)  # what a stopped run has written
                    if values == "exact":
                        write(descriptor)
                    else:
                        with tempfile.TemporaryFile(prefix=".prosocial-exact-", dir=partial.aside) as file:
                            write(file.fileno())
                            round_values(descriptor, cls._unnamed(file.fileno()))
        return cls.load(out)

    def _summed(self, other: HarmVector, sign: int) -> HarmVector:
        if not isinstance(other, HarmVector):
            return NotImplemented
        with tempfile.TemporaryFile(prefix="harm-") as file:
            write_sum(file.fileno(), self, other, sign)
            return self._unnamed(file.fileno())

    @classmethod
    def _unnamed(cls, descriptor: int) -> HarmVector:
        return cls(SparseReader(SafetensorsFile("the harm vector", os.dup(descriptor)), "harm_vector"))

    def _scored(self, names: Sequence[str], group: range) -> Iterator[ScoredBlock]:
        """Entries before scaling, which must not make ties."""
        unscaled = HarmVector(self._reader, self._cuts)
        for i in group:
            for positions, values in unscaled.blocks(names[i]):
                yield i, positions, values

    def _write_view(self, descriptor: int) -> None:
        writer = SparseWriter(descriptor, "harm_vector", {n: t.shape for n, t in self.tensors.items()}, self.recipe)
        for name, tensor in self.tensors.items():
            measure = Measure()
            for positions, _ in self.blocks(name):
                measure.add(positions)
            energy = tensor.energy * self._factor**2
            writer.begin(name, tensor.shape, tensor.numel, self.dtype(name), measure, energy)
            for positions, values in self.blocks(name):
                writer.append(positions, values)
        writer.finish(self.recipe, self.magnitudes)


def _extract(
    pairs: Pairs, descriptor: int | None, folder: Path, recipe: dict[str, Any], arguments: dict[str, Any],
    notes: ReadNotes | None = None, resumed: Resumed = lambda tensors, of, size: None,
) -> None:  # fmt: skip
    if arguments["rule"] == "low_rank":
        others = {key: value for key, value in arguments.items() if key != "rule"}
        write_low_rank(pairs, descriptor, recipe=recipe, **others)
    else:
        extract(pairs, descriptor, folder, recipe=recipe, notes=notes, resumed=resumed, **arguments)


def _check_selection(pairs: Pairs, arguments: Mapping[str, Any]) -> None:
    """Raise the errors of `_extract` that need no read."""
    rule, of = arguments["rule"], {key: arguments[key] for key in ("m", "density", "scope")}
    choose_rule(rule, arguments["seed"], any(pair.importance is not None for pair in pairs.pairs))
    if rule == "low_rank":
        plan_ranks(pairs, **of, memory=arguments["memory"], ranks=arguments["ranks"])
    else:
        plan_groups(pairs, **of)


def check_scope_and_globs(scope: str, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise unless the arguments have the right types."""
    check.choice("scope", scope, ("global", "per_layer", "per_tensor"))
    for argument, globs in (("include", include), ("exclude", exclude)):
        if isinstance(globs, str):
            check.fail(argument, "be a list of globs", repr(globs), f"Pass [{globs!r}].", TypeError)


def _recipe(
    base: dict[str, Any],
    tuned: dict[str, Any],
    density: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, Any]:
    return {
        "prosocial_ext": _C.version,
        "base": base,
        "tuned": tuned,
        "density": density,
        "include": list(include),
        "exclude": list(exclude),
    }


def _control(pairs: Pairs, benign: dict[str, Any], project: bool) -> dict[str, Any]:
    kind = "project_out" if project else "minus"
    return {"control": kind, "benign": benign, "coefficient": pairs.pairs[0].coefficient}
