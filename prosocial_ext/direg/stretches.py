"""The stretches of a checkpoint: runs of tensors that are rewritten, vouched for and taken over as one.

Most shards are one. A file of 50 GB, up to which transformers makes no shards, is many: several threads work on it, and
what they have done outlives a kill.
"""

from __future__ import annotations

from dataclasses import dataclass

from prosocial_ext.checkpoints.checkpoint import Checkpoint

__all__ = ["Stretch", "stretches"]

_BYTES = 1 << 30  # at least, but for the last one of a file


@dataclass(frozen=True)
class Stretch:
    """Tensors that follow each other in a weight file.

    ``name``: the file's, where it has no other stretches. ``bytes``: of the tensors; of the first also the header's.
    """

    name: str
    file: str
    tensors: tuple[str, ...]
    bytes: int


def stretches(checkpoint: Checkpoint) -> list[Stretch]:
    """All of them, in the order of files and tensors; they depend on nothing but the checkpoint."""
    found = []
    for name, file in checkpoint.files.items():
        runs, sizes = [list[str]()], [file.data_start]
        for entry in file.entries.values():
            if sizes[-1] >= _BYTES:
                runs.append([])
                sizes.append(0)
            runs[-1].append(entry.name)
            sizes[-1] += entry.stop - entry.start
        for k, (tensors, size) in enumerate(zip(runs, sizes, strict=True)):
            found.append(Stretch(name if len(runs) == 1 else f"{name}.{k}", name, tuple(tensors), size))
    return found
