"""The part of a parameter that lies on this rank: all of a plain tensor, some rows of a DTensor."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.errors import refuse, shown

__all__ = ["local_part", "reshard"]


def local_part(name: str, param: Tensor) -> tuple[Tensor, int]:
    """Return this rank's elements of a parameter, sharing its memory, and the flat position of the first of them.

    Args:
        name: For errors.
        param: A plain tensor, or a DTensor whose placements are Shard(0) and Replicate (FSDP2, HSDP).

    Raises:
        CheckpointError: Another placement, another kind of tensor, or one without memory.

    >>> local_part("w", torch.zeros(2, 3))
    (tensor([[0., 0., 0.],
            [0., 0., 0.]]), 0)
    """
    whole = param.detach()
    local, first = _of_dtensor(name, whole) if _is_dtensor(whole) else (whole, 0)
    what = f"parameter {shown(name)}"
    if type(local) is not Tensor:
        kind = type(local).__name__
        refuse(what, "be a plain tensor or a DTensor of plain ones", f"a {kind}", "Edit the checkpoint on disk.")
    if local.device.type == "meta":
        remedy = "Load the model without offloading, or edit the checkpoint on disk."
        refuse(what, "be in memory", "an offloaded one, on the device meta", remedy)
    return local, first


def reshard(model: torch.nn.Module) -> None:
    """Give up what FSDP2 has gathered for a forward, so that the shards are the parameters."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # who has not imported it has not sharded
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _of_dtensor(name: str, tensor: Any) -> tuple[Tensor, int]:
    from torch.distributed.tensor import Replicate, Shard

    start, stop = 0, tensor.shape[0] if tensor.ndim else 1
    mesh = tensor.device_mesh
    for k, placement in enumerate(tensor.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim != 0:
            remedy = "Shard by rows (FSDP2's default), or edit the checkpoint on disk."
            refuse(f"the placement of parameter {shown(name)}", "be Shard(0) or Replicate", placement, remedy)
        rows = -(-(stop - start) // mesh.size(k))  # as torch.chunk cuts
        start = min(start + rows * mesh.get_local_rank(k), stop)
        stop = min(start + rows, stop)
    local: Tensor = tensor.to_local()
    if local.ndim and len(local) != stop - start:
        refuse(f"parameter {shown(name)}", f"have {stop - start} rows on this rank", len(local))
    return local, start * math.prod(tensor.shape[1:])
