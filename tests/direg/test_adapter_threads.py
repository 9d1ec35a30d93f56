"""An adapter is read by several threads at once: the values stay right, and nothing outside of it is touched."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.adapter import Adapter
from tests.asserts import assert_same_bits
from tests.direg.files import model

THREADS = 4


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter with many small layers, each a matrix of its own."""
    base = model("llama", 0)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns after every few instructions, so that what can go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_read_what_one_thread_reads(lora: Path, hurried: None) -> None:
    shapes = {name: tuple(p.shape) for name, p in model("llama", 0).named_parameters()}
    register, state = nn.Module.register_parameter, torch.get_rng_state()
    barrier = Barrier(THREADS)

    def read(adapter: Adapter, turn: int) -> dict[str, Tensor]:
        names = list(adapter.layers)
        barrier.wait(60)
        return {name: adapter.dense(name, shapes[name]).clone() for name in names[turn:] + names[:turn]}

    with Adapter(lora) as adapter:
        expected = {name: adapter.dense(name, shapes[name]).clone() for name in adapter.layers}
    for _ in range(3):
        with Adapter(lora) as one, Adapter(lora) as other, ThreadPoolExecutor(THREADS) as pool:
            for found in pool.map(read, [one, other] * (THREADS // 2), range(THREADS)):
                for name, values in expected.items():
                    assert_same_bits(found[name], values, name)
    assert nn.Module.register_parameter is register  # peft can leave its own here, and all modules then lack weights
    assert torch.equal(torch.get_rng_state(), state)


def test_a_vector_does_not_depend_on_the_threads(lora: Path, hurried: None) -> None:
    before, kept = torch.get_num_threads(), []
    try:
        for threads in (1, THREADS):
            torch.set_num_threads(threads)
            vector = HarmVector.from_adapter(lora.parent / "base", lora, m=500)
            kept.append([block for name in vector.tensors for block in vector.blocks(name)])
    finally:
        torch.set_num_threads(before)
    assert len(kept[0]) == len(kept[1])
    for (positions, values), (again, same) in zip(*kept, strict=True):
        assert_same_bits(again, positions)
        assert_same_bits(same, values)
