"""The cases of this folder run on a GPU by copies: here the copies, with the CPU as the other device."""

import pytest
import torch

from tests.simt.moved import moved

CPU = torch.device("cpu")


def test_views_of_one_storage_stay_that_and_what_is_written_comes_back() -> None:
    storage = torch.arange(20.0)
    views = [storage[1:5], storage[4:20:3]]
    seen = []

    def write(tensors: list[torch.Tensor], number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen.extend(tensors)
        tensors[1][0] += number  # entry 4, which both have
        return tensors[0].sum(), [tensors[0]]

    total, (first,) = moved(write, CPU)(views, number=100)
    assert seen[0].data_ptr() == seen[1].data_ptr() - 3 * 4
    assert seen[0].data_ptr() != views[0].data_ptr()
    assert [t.stride() for t in seen] == [t.stride() for t in views]
    assert float(total) == 1 + 2 + 3 + 104
    assert first.tolist() == [1, 2, 3, 104] == views[0].tolist()
    assert float(storage.sum()) == sum(range(20)) + 100


def test_what_was_written_before_an_error_comes_back() -> None:
    def fail(tensor: torch.Tensor) -> None:
        tensor.fill_(7)
        raise KeyboardInterrupt

    tensor = torch.zeros(3)
    with pytest.raises(KeyboardInterrupt):
        moved(fail, CPU)(tensor)
    assert tensor.tolist() == [7, 7, 7]


def test_versions_move_where_something_was_written() -> None:
    read, written = torch.zeros(3), torch.zeros(3)
    before = read._version, written._version
    moved(lambda a, b: b.add_(a), CPU)(read, b=written)
    assert (read._version, written._version > before[1]) == (before[0], True)


def test_what_is_empty_and_what_is_no_tensor() -> None:
    assert moved(lambda a, b, c: (a.shape, b, c), CPU)(torch.empty(0, 3), None, "word") == ((0, 3), None, "word")
