"""Live edits of models that are sharded, replicated or dispatched: the bits of the whole model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import dispatch_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.ranks import leave
from tests.asserts import assert_same_bits
from tests.direg.files import model, parameters, tuned

IDS = torch.arange(6).view(1, 6)


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in sorted(module.named_parameters()):
        assert isinstance(p, DTensor), name
        found[name] = p.full_tensor().detach().clone()  # a replica is the parameter itself
    return found


def sharded_edits(rank: int, size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meet-{size}", rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        vector = HarmVector.load(root / "v")
        base = model("llama", 0)
        plain = model("llama", 0)
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)
        with torch.no_grad():
            before = base(IDS).logits  # the root stays gathered after this
            vector.subtract_(plain, 1.5)
            edit = vector.subtract_(base, 1.5)
            expected = torch.load(root / "expected")
            assert_all(whole(base), expected)
            assert_same_bits(base(IDS).logits, plain(IDS).logits)
            kept: list[int] = [0] * size
            dist.all_gather_object(kept, edit.kept)
            assert sum(kept) == vector.entries
            assert min(kept) > 0
            vector.rescale_(base, -0.25)
            vector.rescale_(plain, -0.25)
            assert_all(whole(base), parameters(plain))
            base(IDS)
            vector.revert_(base)
            assert_same_bits(base(IDS).logits, before)
            base.reshard()
            assert_all(whole(base), parameters(model("llama", 0)))
            with vector.subtracted_from(base, 1.5):
                assert_all(whole(base), expected)
            placements(mesh, vector)
    finally:
        leave()


def placements(mesh: dist.DeviceMesh, vector: HarmVector) -> None:
    copies = model("llama", 0)
    place(copies, mesh, Replicate())
    with vector.subtracted_from(copies):
        edited = whole(copies)
    other = model("llama", 0)
    vector.subtract_(other)
    assert_all(edited, parameters(other))
    columns = model("llama", 0)
    place(columns, mesh, Shard(1))
    with pytest.raises(CheckpointError, match=r"of parameter 'lm_head.weight' must be Shard\(0\) or Replicate, got S"):
        vector.subtract_(columns)
    assert_all(whole(columns), parameters(model("llama", 0)))
    uneven = model("llama", 0)
    rows = DTensor.from_local(torch.zeros(5, 32), mesh, [Shard(0)], run_check=False, shape=(61, 32), stride=(32, 1))
    uneven.lm_head.weight = nn.Parameter(rows)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must have \d+ rows on this rank, got 5"):
        vector.subtract_(uneven)


def place(module: nn.Module, mesh: dist.DeviceMesh, placement: Replicate | Shard) -> None:
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            fitting = placement if p.ndim == 2 else Replicate()
            setattr(part, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [fitting])))


def assert_all(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 runs no model on a CPU")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # the workers keep to one thread
@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_model_is_edited_to_the_bits_of_a_whole_one(tmp_path: Path, size: int) -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1))
    vector.save(tmp_path / "v")
    vector.subtract_(base, 1.5)
    torch.save(parameters(base), tmp_path / "expected")
    mp.start_processes(sharded_edits, (size, tmp_path), nprocs=size, start_method="fork")  # type: ignore[no-untyped-call]


def test_a_dispatched_model_is_edited_where_it_lies_and_an_offloaded_one_refused() -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1))
    expected = model("llama", 0)
    vector.subtract_(expected)
    places = {"model": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(model("llama", 0), places, main_device="cpu", force_hooks=True)
    with vector.subtracted_from(dispatched), torch.no_grad():
        assert_all(parameters(dispatched), parameters(expected))
        assert_same_bits(dispatched(IDS).logits, expected(IDS).logits)
    offloaded = model("llama", 0)
    offloaded.lm_head.to("meta")
    before = parameters(offloaded.model)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must be in memory, got an offloaded one"):
        vector.subtract_(offloaded)
    assert_all(parameters(offloaded.model), before)


class Odd(torch.Tensor):
    """A tensor of some quantiser, say."""


def test_another_kind_of_tensor_is_refused_by_name() -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1))
    base.lm_head.weight = nn.Parameter(torch.zeros(61, 32).as_subclass(Odd))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must be a plain tensor or a DTensor .*, got a Odd"):
        vector.subtract_(base)
