"""The ops on a GPU beside their peers: kernel time in a CUDA graph, cold and warm L2, and what the memory allows.

python -m benchmarks.gpu [--json FILE] [--family sampling|topm|projection]

Every case checks its answer before it is timed. ``floor`` is the bytes that must move over the bandwidth of a large
copy measured in the same run; ``cold`` overwrites the L2 before every run, ``warm`` does not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from prosocial_ext import ops, peers
from prosocial_ext.ops import _cuda, _cuda_sampling

RUNS = 50
NO_PEERS = ("without overlap", "in chunks", "checked", "dense pass", "cuBLAS, no surgery")  # ours, or less work


@dataclass
class Case:
    """One measured case; times in microseconds, peers by name (a text where one could not run)."""

    family: str
    case: str
    bytes: int
    cold: float
    cold_low: float
    cold_high: float
    warm: float
    floor: float
    peers: dict[str, float | str] = field(default_factory=dict)

    def line(self) -> str:
        """One aligned line."""
        text = (
            f"{self.family:<11}{self.case:<42}{self.cold:10.1f} us ({self.cold_low:.1f}..{self.cold_high:.1f}) "
            f"warm {self.warm:.1f}  {self.cold / self.floor:6.2f} x floor ({self.floor:.1f})"
        )
        for name, time in self.peers.items():
            text += f"  {name} {time if isinstance(time, str) else f'{time / self.cold:.1f}x'}"
        return text

    def row(self) -> str:
        """One row of the table at the end."""
        times = {name: time for name, time in self.peers.items() if name not in NO_PEERS and not isinstance(time, str)}
        name = min(times, key=times.__getitem__, default="")
        best = f"{times[name] / self.cold:6.1f}x {name}" if name else ""
        return (
            f"{self.family:<11}{self.case:<42}{self.cold:10.1f}{self.warm:10.1f}{self.floor:10.1f}"
            f"{self.cold / self.floor:9.2f}  {best}"
        )


class Clock:
    """Times graphs of calls with events, on one device."""

    def __init__(self) -> None:
        self.flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")  # several times any L2
        source, target = (torch.empty(1 << 30, dtype=torch.int32, device="cuda") for _ in range(2))
        seconds = self.median(self.events(lambda: target.copy_(source), cold=False)) * 1e-6
        self.bandwidth = 2 * source.numel() * 4 / seconds

    def events(self, run: Callable[[], object], cold: bool, runs: int = RUNS) -> list[float]:
        """Microseconds of each run."""
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in marks:
            if cold:
                self.flush.fill_(1)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in marks]

    @staticmethod
    def median(times: list[float]) -> float:
        """The median."""
        return statistics.median(times)

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph's replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peer(self, call: Callable[[], object], graphed: bool = True, runs: int = 20) -> float | str:
        """A peer's cold median, in a graph where it can be captured, eagerly otherwise; or why there is none."""
        try:
            call()
            try:
                run = self.graph(call) if graphed else call
            except RuntimeError:
                torch.cuda.synchronize()
                run = call
            return self.median(self.events(run, cold=True, runs=runs))
        except Exception as error:  # whatever a peer of another version says, ours are still to be timed
            return f"({type(error).__name__})"

    def case(
        self, family: str, name: str, nbytes: int, call: Callable[[], object], others: dict[str, Callable[[], object]]
    ) -> Case:
        """Time one call and its peers."""
        run = self.graph(call)
        cold, warm = sorted(self.events(run, cold=True)), self.events(run, cold=False)
        others = {"without overlap": partial(without_overlap, call), **others}
        found = {peer: self.peer(other) for peer, other in others.items()}
        tenth = len(cold) // 10
        return Case(
            family, name, nbytes, self.median(cold), cold[tenth], cold[-1 - tenth], self.median(warm),
            nbytes / self.bandwidth * 1e6, found,
        )  # fmt: skip


# ---- K3


def flashinfer(base: torch.Tensor, guide: torch.Tensor, top_k: int, top_p: float) -> Callable[[], object]:
    """Combination by torch, sampling by FlashInfer, filters in the same order."""
    sampling = importlib.import_module("flashinfer.sampling")

    def call() -> object:
        logits = base.float() + guide.float()
        if not top_k and top_p == 1:
            return sampling.sampling_from_logits(logits)
        return sampling.top_k_top_p_sampling_from_logits(
            logits, top_k or logits.shape[1], top_p, filter_apply_order="top_k_first"
        )

    return call


def triton_sample() -> Callable[..., object]:
    """Gumbel-max in Triton, where that is installed."""
    return importlib.import_module("benchmarks.triton_peer").triton_sample  # type: ignore[no-any-return]


def without_overlap(call: Callable[[], object]) -> object:
    """Launch one kernel after the other, as GPUs before Hopper do."""
    before = _cuda.launchers.set_launch_overlap(False)
    try:
        return call()
    finally:
        _cuda.launchers.set_launch_overlap(before)


def in_chunks(call: Callable[[], object]) -> object:
    """Sample as GPUs without clusters do."""
    _cuda_sampling.in_clusters = False
    try:
        return call()
    finally:
        _cuda_sampling.in_clusters = None


def sampling_cases(clock: Clock) -> Iterator[Case]:
    """B = 1 and 32 at the vocabulary of Llama 3."""
    vocab = 128_256
    for dtype in (torch.bfloat16, torch.float32):
        torch.compiler.reset()  # beyond eight shapes and filters dynamo would run the peer eagerly
        compiled = torch.compile(peers.sampling_chain)
        for rows in (1, 32):
            generator = torch.Generator(device="cuda").manual_seed(0)
            base, guide = (
                (torch.randn(rows, vocab, device="cuda", generator=generator) * scale).to(dtype) for scale in (3, 2)
            )
            for name, top_k, top_p in (
                ("no filter", 0, 1.0),
                ("top-p 0.95", 0, 0.95),
                ("top-k 50 top-p 0.95", 50, 0.95),
            ):
                call = partial(ops.guided_sample, base, guide, top_k=top_k, top_p=top_p, seed=7)
                expected = ops.guided_sample(base.cpu(), guide.cpu(), top_k=top_k, top_p=top_p, seed=7)
                assert torch.equal(call().cpu(), expected)
                others: dict[str, Callable[[], object]] = {
                    "in chunks": partial(in_chunks, call),
                    "torch": partial(peers.sampling_chain, base, guide, top_k, top_p),
                    "torch.compile": partial(compiled, base, guide, top_k, top_p),
                }
                with contextlib.suppress(ImportError):
                    others["FlashInfer"] = flashinfer(base, guide, top_k, top_p)
                with contextlib.suppress(ImportError):
                    if name == "no filter":  # of filters there is no natural form
                        others["Triton"] = partial(triton_sample(), base, guide, 7)
                nbytes = 2 * base.numel() * base.element_size()
                yield clock.case("sampling", f"{str(dtype)[6:]} B={rows} {name}", nbytes, call, others)
            strength = torch.linspace(0.5, 1.5, rows, device="cuda")  # as a decoding loop calls it
            call = partial(
                ops.guided_sample, base, guide, guidance=strength, top_p=0.95, seed=7, offset=3, return_logprobs=True
            )
            expected = ops.guided_sample(base.cpu(), guide.cpu(), guidance=strength.cpu(), top_p=0.95, seed=7, offset=3)
            assert torch.equal(call()[0].cpu(), expected)
            name = f"{str(dtype)[6:]} B={rows} top-p, w per row, log-probs"
            others = {"in chunks": partial(in_chunks, call)}
            yield clock.case("sampling", name, 2 * base.numel() * base.element_size(), call, others)


# ---- K1


def dense(params: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor) -> None:
    """The same bytes without a selection: what inductor makes of it is one pass."""
    params.sub_(((tuned.float() - base.float()) * 1e-6).to(params.dtype))


def topm_cases(clock: Clock) -> Iterator[Case]:
    """1e7 to 1e9 entries of bf16."""
    axpy, compiled = torch.compile(dense), torch.compile(peers.kthvalue_subtract_)
    for n in (10_000_000, 100_000_000, 1_000_000_000):
        if 8 * n > torch.cuda.mem_get_info()[0]:
            continue
        generator = torch.Generator(device="cuda").manual_seed(0)
        base = torch.randn(n, device="cuda", generator=generator, dtype=torch.bfloat16) * 0.05
        tuned = base + torch.randn(n, device="cuda", generator=generator, dtype=torch.bfloat16) * 1e-3
        params = base.clone()
        for density, edited in ((0.10, params), (0.10, base), (0.01, params)):
            in_place = edited is base
            for undo in (False, True):
                options = {"density": density, "scale": 1e-6, "undo": undo, "check_finite": False}
                call = partial(ops.topm_subtract_, edited, base, tuned, **options)
                m = math.floor(density * n)
                assert int(call().kept.sum()) == m
                others: dict[str, Callable[[], object]] = {"dense pass": partial(axpy, edited, base, tuned)}
                # The default: it looks before it edits, or with a record puts back, and reads one flag, so no graph.
                checked = {**options, "check_finite": True}
                others["checked"] = partial(ops.topm_subtract_, edited, base, tuned, **checked)
                if not (undo or in_place) and n <= 100_000_000:
                    others["kthvalue"] = partial(peers.kthvalue_subtract_, params, base, tuned, m, 1e-6)
                    others["kthvalue, torch.compile"] = partial(compiled, params, base, tuned, m, 1e-6)
                name = f"bfloat16 N={n:.0e} d={density}{' in place' if in_place else ''}{' undo' if undo else ''}"
                yield clock.case("topm", name, (6 if in_place else 8) * n, call, others)


# ---- K2


def gram_space(grads: torch.Tensor, coefficients: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A careful user's form: Gram matrix and combination by cuBLAS."""
    return coefficients(grads @ grads.T) @ grads


def projection_cases(clock: Clock) -> Iterator[Case]:
    """k = 5 to 64."""
    compiled = torch.compile(peers.gram_coefficients)
    for k, n, dtype in (
        (5, 900_000, torch.float32),
        (5, 20_000_000, torch.float32),
        (5, 20_000_000, torch.bfloat16),
        (5, 100_000_000, torch.float32),
        (16, 20_000_000, torch.float32),
        (16, 20_000_000, torch.bfloat16),
        (32, 20_000_000, torch.bfloat16),
        (64, 20_000_000, torch.float32),
        (64, 20_000_000, torch.bfloat16),
    ):
        grads = torch.randn(k, n, device="cuda", generator=torch.Generator(device="cuda").manual_seed(0)).to(dtype)
        head = grads[:, :10_000]
        expected = ops.project_conflicts(head.cpu()).double()
        slack = 1e-5 if dtype == torch.float32 else 2.0**-8
        error = (ops.project_conflicts(head).cpu().double() - expected).norm()
        assert float(error) <= slack * float(head.double().norm(dim=1).sum())
        others: dict[str, Callable[[], object]] = {
            "cuBLAS, no surgery": partial(gram_space, grads, partial(torch.sum, dim=0)),
        }
        if k == 5:
            others["cuBLAS, torch"] = partial(gram_space, grads, peers.gram_coefficients)
            others["cuBLAS, torch.compile"] = partial(gram_space, grads, compiled)
            others["pairwise loop"] = partial(peers.pairwise_pcgrad, grads)
        nbytes = (2 * k + 1) * n * grads.element_size()
        name = f"{str(dtype)[6:]} k={k} N={n:.0e}"
        call = partial(ops.project_conflicts, grads, order="fixed")
        yield clock.case("projection", name, nbytes, call, others)


FAMILIES = {"sampling": sampling_cases, "topm": topm_cases, "projection": projection_cases}


def main() -> None:
    """Measure, print, and write JSON after every case, so that what is done is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--family", choices=sorted(FAMILIES))
    arguments = parser.parse_args()
    clock = Clock()
    card = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "card": card.name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": clock.bandwidth,
        "runs": RUNS,
        "rows": [],
    }
    print(f"{card.name}, torch {torch.__version__} | median of {RUNS}, 10..90 % | floor = bytes / "
          f"{clock.bandwidth / 1e12:.2f} TB/s copied in this run | peers: times ours", flush=True)  # fmt: skip
    table = []
    for name, cases in FAMILIES.items():
        if arguments.family in (None, name):
            for case in cases(clock):
                print(case.line(), flush=True)
                table.append(case.row())
                found["rows"].append(asdict(case))
                if arguments.json:
                    with open(arguments.json, "w", encoding="utf-8") as file:
                        json.dump(found, file, indent=1)
    head = f"{'us':<53}{'cold':>10}{'warm':>10}{'floor':>10}{'x floor':>9}    fastest peer, times ours"
    print("", head, *table, sep="\n", flush=True)


if __name__ == "__main__":
    main()
