"""What the ops do on CUDA tensors before their kernels, without a GPU: fake tensors show which torch ops run.

A copy from the CPU waits for the stream, and a CUDA graph cannot capture it. Each op of torch there is a launch, where
sampling takes one to three.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prosocial_ext import ops

VIEWS = {"detach", "expand", "unsqueeze", "view", "unbind", "empty"}


class Calls(TorchDispatchMode):
    """Notes torch's ops that launch something on a device, and those that take a tensor from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **kwargs or {})
        if function.namespace == "aten":
            devices = [t.device.type for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if len(set(devices)) > 1:
                self.copies.append(str(function))
            elif "cuda" in devices and function.overloadpacket.__name__ not in VIEWS:
                self.launches.append(str(function))
        return out


def logits() -> torch.Tensor:
    return torch.empty(4, 100, device="cuda")


CALLS: dict[str, Callable[[], object]] = {
    "sample": lambda: ops.guided_sample(logits(), logits(), seed=3, offset=7),
    "sample_with_everything": lambda: ops.guided_sample(
        logits(), logits(), guidance=0.5, temperature=torch.tensor(0.7), top_k=9, top_p=0.9, min_p=0.1, vocab_size=90,
        seed=torch.tensor(3),
        return_logprobs=True),
    "sample_with_values_per_row": lambda: ops.guided_sample(
        logits(), logits(), guidance=torch.empty(4, device="cuda"), top_p=torch.empty(4, device="cuda"),
        temperature=0.8, seed=torch.empty(4, dtype=torch.int64, device="cuda"), offset=5, return_logprobs=True),
    "logprobs": lambda: ops.guided_logprobs(logits(), logits(), guidance=0.5, temperature=0.7),
    "gram": lambda: ops.gradient_gram(logits()),
    "project": lambda: ops.project_conflicts(logits(), return_stats=True),
    "project_with_weights": lambda: ops.project_conflicts(logits(), weights=[0.1, 0.2, 0.3, 0.4]),
    "project_with_weights_on_the_cpu": lambda: ops.project_conflicts(list(logits()), weights=torch.ones(4)),
    "project_in_an_order": lambda: ops.project_conflicts(logits(), order=torch.tensor([[1, 2, 3]] * 4)),
    "edit": lambda: ops.topm_subtract_([logits()], [logits()], [logits()], density=0.1, check_finite=False),
    "edit_with_everything": lambda: ops.topm_subtract_(
        [logits()], [logits()], [logits()], m=3, scope="per_tensor", importance=[logits()], undo=True,
        check_finite=False),
    "select_and_sparse_edit": lambda: ops.sparse_subtract_(
        [logits()], ops.topm_select([logits()], [logits()], m=3), undo=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_only_kernels_of_our_own_are_launched_and_nothing_is_copied(name: str) -> None:
    with FakeTensorMode(), Calls() as calls:
        CALLS[name]()
    assert calls.copies == []
    if name != "select_and_sparse_edit":  # whose result has three vectors of its own, one word a tensor
        assert calls.launches == []


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_k", "seed"])
def test_inside_a_capture_values_per_row_on_the_cpu_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = rf"{name} is on cpu and must be copied, which a CUDA graph cannot capture. Pass it on cuda:0\."
    with FakeTensorMode(), pytest.raises(RuntimeError, match=message):
        ops.guided_sample(logits(), logits(), **{name: torch.ones(4, dtype=torch.int64)})


def test_copies_and_launches_are_noticed() -> None:
    with FakeTensorMode(), Calls() as calls:
        ops.guided_sample(logits(), temperature=torch.ones(4), top_p=torch.ones(4, dtype=torch.float64, device="cuda"))
    assert calls.copies == ["aten._to_copy.default"]
    assert calls.launches == ["aten.ones.default", "aten._to_copy.default"]
