"""The CUDA kernels of gradient surgery on the CPU: the definition's laws, and the CPU kernels' very bits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from prosocial_ext import ops, reference
from prosocial_ext.ops import _cuda, _cuda_projection
from prosocial_ext.ops import projection as compiled
from tests.asserts import assert_same_bits
from tests.ops import test_projection as laws
from tests.ops.inputs import DTYPES
from tests.simt.moved import assert_torch_agrees

PATHS = {"registers": 1, "tiles": 2}  # pse::cuda::GramPath
# Every register kernel; every shape of tiles, cut and whole.
KERNELS = [("registers", k) for k in range(1, 17)] + [("tiles", k) for k in (1, 2, 5, 6, 7, 8, 12, 15, 16)]
# Super tiles of 32 rows for the tensor cores: half a one, cut and whole ones, on the diagonal and off it.
MANY = [17, 24, 31, 32, 33, 41, 49, 64, 65]


def gradients(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds whatever was there: all tickets, flags and sums must be set before they are read."""
    empty = torch.empty

    def dirty(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        tensor.view(-1).view(torch.uint8).fill_(0xA5)
        return tensor

    monkeypatch.setattr(torch, "empty", dirty)


@pytest.fixture(params=PATHS)
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernels for the Gram matrix of up to 16 objectives."""
    monkeypatch.setattr(_cuda_projection, "gram_path", PATHS[request.param])
    return str(request.param)


class OnCuda:
    """What `prosocial_ext.ops` is for CUDA tensors."""

    raise_if_bad = staticmethod(ops.raise_if_bad)

    def project_conflicts(self, *arguments: Any, **options: Any) -> Any:
        with self.kernels():
            return ops.project_conflicts(*arguments, **options)

    def gradient_gram(self, *arguments: Any) -> torch.Tensor:
        with self.kernels():
            return ops.gradient_gram(*arguments)

    @staticmethod
    @contextmanager
    def kernels() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_gram", _cuda_projection.gram)
            patch.setattr(compiled, "_gram_lists", _cuda_projection.gram_lists)
            patch.setattr(compiled, "_project", _cuda_projection.project)
            patch.setattr(compiled, "_project_lists", _cuda_projection.project_lists)
            yield


@pytest.fixture
def on_cuda(simt: ModuleType) -> OnCuda:
    return OnCuda()


def assert_all_same_bits(actual: Any, expected: Any) -> None:
    """Of results of project_conflicts with statistics: outputs, then each field."""
    (out, stats), (wanted, wanted_stats) = actual, expected
    outs, wanteds = ([t] if isinstance(t, torch.Tensor) else t for t in (out, wanted))
    for a, b in zip(outs, wanteds, strict=True):
        assert_same_bits(a, b, "output")
    for name, value in vars(wanted_stats).items():
        agree = assert_torch_agrees if name.startswith("cosines") else assert_same_bits
        agree(getattr(stats, name), value, name)


def both(on_cuda: OnCuda, grads: Any, **options: Any) -> None:
    """Hold the kernels' bits against the CPU kernels'."""
    expected = ops.project_conflicts(grads, return_stats=True, **options), ops.gradient_gram(grads)
    actual = on_cuda.project_conflicts(grads, return_stats=True, **options), on_cuda.gradient_gram(grads)
    assert_all_same_bits(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1], "gram")


# ---- the bits of the CPU kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "k"), KERNELS, indirect=["path"])
def test_every_kernel_gives_the_bits_of_the_cpu(on_cuda, path, k, dtype):
    """200 columns: rows at multiples of 16 bytes, and whole lines of them with a rest."""
    for n in (7, 200):
        weights = torch.arange(1, k + 1) % 3 / 2
        both(on_cuda, gradients(2, k, n, dtype=dtype), weights=weights, seed=3, reduction="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", MANY)
def test_many_objectives_give_the_bits_of_the_cpu(on_cuda, k, dtype):
    for n in (7, 200):
        both(on_cuda, gradients(2, k, n, dtype=dtype), weights=torch.arange(k) % 9 / 8, seed=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 31, 63, 64, 65, 66, 128, 130, 3333])
def test_lines_of_many_objectives_give_the_bits_of_the_cpu(on_cuda, n, dtype):
    """Rows off multiples of 16 bytes, rows that end within one, and more lines than are in flight."""
    grads = torch.cat([gradients(33, n, dtype=dtype), torch.zeros(33, -n % 16, dtype=dtype)], 1)
    assert_same_bits(on_cuda.gradient_gram(grads[:, :n].contiguous()), ops.gradient_gram(grads[:, :n]), "rows of n")
    lists = [[row[:n]] for row in grads]
    assert_same_bits(on_cuda.gradient_gram(lists), ops.gradient_gram(lists), "rows at multiples of 16 bytes")


def test_lists_of_many_objectives(on_cuda):
    """Tensors of every dtype, and an empty one."""
    sizes = [15, 0, 1031, 1, 128, 65]
    lists = [[gradients(size, dtype=DTYPES[t % 4], seed=9 * i + t) for t, size in enumerate(sizes)] for i in range(35)]
    both(on_cuda, lists, seed=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4095, 4096, 4105])
def test_borders_of_blocks_give_the_bits_of_the_cpu(on_cuda, path, n, dtype):
    both(on_cuda, gradients(2, n, dtype=dtype), seed=1)


@pytest.mark.parametrize("blocks", [64, 65, 135])
def test_runs_of_blocks_give_the_bits_of_the_cpu(on_cuda, path, blocks):
    """A tensor of a list begins a block, so that many blocks need few columns."""
    both(on_cuda, [[gradients(1 + t % 5, seed=7 * t + i) for t in range(blocks)] for i in range(3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 12, 13, 16])
def test_blocks_of_different_lengths_share_a_warp(on_cuda, path, k, dtype):
    """Five tensors, so that the second warp has one block; some have whole lines to copy, some have none."""
    both(on_cuda, [[gradients(n, dtype=dtype, seed=n + i) for n in (200, 8, 333, 64, 70)] for i in range(k)])


@pytest.mark.parametrize("k", [3, 13])
def test_columns_that_cannot_be_copied_in_lines(on_cuda, path, k):
    both(on_cuda, gradients(k, 333))


def test_runs_of_full_blocks_give_the_bits_of_the_cpu(on_cuda):
    both(on_cuda, gradients(1, 64 * 4096 + 100, dtype=torch.bfloat16))


def test_runs_of_many_objectives_give_the_bits_of_the_cpu(on_cuda):
    both(on_cuda, [[gradients(1 + t % 3, seed=7 * t + i) for t in range(66)] for i in range(17)])


def test_as_many_objectives_as_the_kernels_take(on_cuda, simt):
    """Few of them take part, so that the recurrence is short."""
    k = simt.cuda.projection_most_objectives
    both(on_cuda, gradients(k, 5), weights=(torch.arange(k) % 51 == 50).double(), seed=4)


def test_more_objectives_take_the_reference(on_cuda, simt, monkeypatch):
    for name in ("_project_elsewhere", "_project_lists_elsewhere"):
        monkeypatch.setattr(compiled, name, lambda *arguments, name=name: (name, []))
    monkeypatch.setattr(compiled, "_gram_lists_elsewhere", lambda *arguments: "_gram_lists_elsewhere")
    grads = gradients(simt.cuda.projection_most_objectives + 1, 3)
    assert on_cuda.project_conflicts(grads) == "_project_elsewhere"
    assert on_cuda.project_conflicts(list(grads)) == "_project_lists_elsewhere"
    assert on_cuda.gradient_gram(list(grads)) == "_gram_lists_elsewhere"
    assert_torch_agrees(on_cuda.gradient_gram(grads), reference.gradient_gram(grads))


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_does_not_matter(on_cuda, offset, dtype):
    grads = gradients(3 * 1001 + offset, dtype=dtype)[offset:].view(3, 1001)
    both(on_cuda, grads)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20])
def test_denormal_and_extreme_gradients(on_cuda, path, scale):
    both(on_cuda, (gradients(4, 100).double() * scale).float())


def test_lists_of_mixed_dtypes_shapes_and_strides(on_cuda, path):
    shapes = [(3, 5), (0,), (4097,), (), (8, 16), (0, 3)]
    lists = [
        [gradients(math.prod(s), dtype=DTYPES[t % 4], seed=10 * i + t).reshape(s) for t, s in enumerate(shapes)]
        + [gradients(6, 5, seed=i).t()[1:]]
        for i in range(3)
    ]
    both(on_cuda, lists, weights=[1.0, 0.5, 2.0], seed=5)


def test_tables_longer_than_one_kernel_argument(on_cuda, path):
    lists = [[gradients(t % 3, seed=i * 1000 + t) for t in range(100)] for i in range(5)]
    both(on_cuda, lists)


@pytest.mark.parametrize("k", [1, 2, 5, 18])
@pytest.mark.parametrize("full", [False, True], ids=["others", "all"])
def test_explicit_orders(on_cuda, k, full):
    generator = torch.Generator().manual_seed(k)
    rows = [torch.randperm(k, generator=generator) for _ in range(k)]
    order = torch.stack([row if full else row[row != i] for i, row in enumerate(rows)])
    both(on_cuda, gradients(k, 21) - 0.5, order=order)


@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("k", [5, 17])
def test_random_orders(on_cuda, seed, k):
    grads = (torch.eye(k, dtype=torch.float64) - 1.2 / k + 0.01 * gradients(k, k).double()).expand(3, k, k)
    both(on_cuda, grads, seed=seed)


@pytest.mark.parametrize("k", [3, 18])
def test_weights_of_exactly_zero(on_cuda, k):
    grads, weights = gradients(2, k, 50), torch.ones(2, k)
    weights[0, 1] = weights[1] = 0
    grads[0, 1, 3], grads[0, 1, 4] = torch.nan, torch.inf
    both(on_cuda, grads, weights=weights)


@pytest.mark.parametrize("shape", [(0, 3, 10), (2, 0, 3, 10), (2, 3, 0), (1, 0), (2, 20, 0)])
def test_empty_batches_and_gradients(on_cuda, path, shape):
    both(on_cuda, torch.zeros(shape))


@pytest.mark.parametrize("groups", [70, 1100], ids=["few_blocks", "many_blocks"])
def test_many_small_groups(on_cuda, groups):
    """The number of blocks decides which kernel runs."""
    both(on_cuda, gradients(groups, 2, 3), seed=2)


def test_default_device_elsewhere(on_cuda):
    """Tables are made on the CPU whatever torch's default device is."""
    grads, order = [[gradients(5, seed=i)] for i in range(3)], torch.tensor([[1, 2], [0, 2], [0, 1]])
    expected = ops.project_conflicts(grads, order=order)
    with torch.device("meta"):
        actual = on_cuda.project_conflicts(grads, order=order)
    assert_same_bits(actual[0], expected[0])


# ---- one result whatever is around it


def test_scratch_of_an_earlier_call_is_of_no_consequence(on_cuda, monkeypatch):
    kept: dict[tuple[Any, torch.dtype], torch.Tensor] = {}
    empty = torch.empty

    def reused(shape: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        return kept.setdefault((tuple(shape), dtype), empty(shape, dtype=dtype, **options))

    first, second = gradients(5, 5000), gradients(5, 5000, seed=1)
    expected = on_cuda.project_conflicts(first), on_cuda.project_conflicts(second)
    monkeypatch.setattr(torch, "empty", reused)
    for _ in range(2):
        assert_same_bits(on_cuda.project_conflicts(first), expected[0])
        assert_same_bits(on_cuda.project_conflicts(second), expected[1])
    assert any(dtype is torch.uint8 for _, dtype in kept)


def test_a_group_does_not_depend_on_its_neighbours(on_cuda, path):
    grads = gradients(3, 5, 300)
    whole = on_cuda.gradient_gram(grads)
    for group in range(3):
        assert_same_bits(whole[group], on_cuda.gradient_gram(grads[group]))


@pytest.mark.parametrize(("k", "n", "launches"), [(5, 100, 2), (16, 100, 2), (17, 20, 4)])
def test_launches_per_call(on_cuda, simt, k, n, launches):
    before = simt.counts()["launches"]
    on_cuda.project_conflicts(gradients(k, n))
    assert simt.counts()["launches"] - before == launches


# ---- what is bad is flagged, and nothing raises


BAD = [(3, dtype, bad) for dtype in DTYPES for bad in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize(("k", "dtype", "bad"), [*BAD, (18, torch.float32, math.nan), (18, torch.float16, -math.inf)])
def test_a_bad_gradient_spoils_its_group_alone(on_cuda, k, dtype, bad):
    grads = gradients(3, k, 20, dtype=dtype)
    expected = on_cuda.project_conflicts(grads)
    grads[1, 2, 11] = bad
    out, stats = on_cuda.project_conflicts(grads, return_stats=True)
    assert stats.finite.tolist() == [True, False, True]
    assert bool(out[1].isnan().all())
    assert_same_bits(out[::2], expected[::2])
    with pytest.raises(ValueError, match=r"grads of group \(1,\) must be finite"):
        on_cuda.raise_if_bad(stats)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [3, 18])
def test_a_bad_weight_spoils_its_group_alone(on_cuda, k, bad, monkeypatch):
    monkeypatch.setattr(reference.projection, "check_weight_values", lambda weights: None)  # as on a device
    grads, weights = gradients(2, k, 5), torch.ones(2, k)
    expected = on_cuda.project_conflicts(grads)
    weights[0, 1] = bad
    out, stats = on_cuda.project_conflicts(grads, weights=weights, return_stats=True)
    assert stats.finite.tolist() == [False, True]
    assert bool(out[0].isnan().all())
    assert_same_bits(out[1], expected[1])


def test_a_bad_gradient_in_lists_spoils_every_tensor(on_cuda):
    lists = [[gradients(5, seed=i), gradients(7, dtype=torch.float16, seed=i)] for i in range(3)]
    lists[1][1][3] = torch.inf
    out, stats = on_cuda.project_conflicts(lists, return_stats=True)
    assert not bool(stats.finite)
    assert all(bool(part.isnan().all()) for part in out)
    with pytest.raises(ValueError, match="must be finite"):
        on_cuda.raise_if_bad(stats)


def test_squared_norms_beyond_float64_are_flagged(on_cuda):
    out, stats = on_cuda.project_conflicts(torch.full((2, 3), 1e200, dtype=torch.float64), return_stats=True)
    assert not bool(stats.finite)
    assert bool(out.isnan().all())


def test_flags_and_statistics_are_those_of_the_reference(on_cuda, monkeypatch):
    for name in ("check_finite", "check_weight_values"):  # as on a device
        monkeypatch.setattr(reference.projection, name, lambda *a: None)
    grads, weights = gradients(4, 2, 40), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.0, 1.0]])
    grads[1, 0, 3] = grads[3, 0, 5] = torch.nan
    out, stats = on_cuda.project_conflicts(grads, weights=weights, return_stats=True)
    expected, wanted = reference.project_conflicts(grads, weights=weights, return_stats=True)
    assert_same_bits(stats.finite, wanted.finite)
    assert_same_bits(stats.conflicts, wanted.conflicts)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(stats.cosines, wanted.cosines, equal_nan=True, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("groups", [0, 1, 300])
def test_weights_on_the_cpu_travel_as_arguments(simt, groups):
    """No copy between devices: it would wait for the stream. What all groups share travels once."""
    call = _cuda_projection._dense(gradients(groups, 3, 4))
    own = gradients(groups, 3).double()
    assert_same_bits(call.rows_on_device(own), own)
    shared = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64).expand(groups, 3)
    before = simt.counts()["launches"]
    assert_same_bits(call.rows_on_device(shared), shared)
    assert simt.counts()["launches"] - before == (groups > 0)


@pytest.mark.usefixtures("on_cpu")
def test_a_bad_weight_on_the_cpu_raises(on_cuda):
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite and >= 0, got -1"):
        on_cuda.project_conflicts(gradients(2, 5), weights=[1.0, -1.0])


@pytest.mark.parametrize(("order", "k", "message"), [
    (torch.tensor([[1, 0], [1, 0]]), 2, r"reads an order on the device back, .* Pass it on the CPU, or order='random'"),
    ("random", 257, "of 257 objectives runs the reference, which waits for the device, .* Pass at most 256"),
])  # fmt: skip
@pytest.mark.parametrize("form", [torch.Tensor, list])
def test_inside_a_capture_what_waits_is_refused(simt, order, k, message, form, monkeypatch):
    knobs = (None, order if isinstance(order, torch.Tensor) else None, "fixed", 0, "sum", False)
    grads = gradients(k, 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_cuda, "target", lambda tensor: (0, 0))
    project, arguments = {
        torch.Tensor: (_cuda_projection.project, (grads,)),
        list: (_cuda_projection.project_lists, (list(grads), k, False)),
    }[form]
    with pytest.raises(RuntimeError, match=message):
        project(*arguments, *knobs)


def test_an_order_that_is_no_permutation_raises_before_any_launch(on_cuda, simt):
    before = simt.counts()["launches"]
    with pytest.raises(ValueError, match=r"order\[1\] must be a permutation of the others, \[0, 2\]"):
        on_cuda.project_conflicts(torch.ones(3, 3), order=torch.tensor([[1, 2], [0, 1], [0, 1]]))
    assert simt.counts()["launches"] == before


# ---- the laws that the reference and the CPU kernels obey


LAWS = [
    "gram_of_small_integers_is_exact",
    "gram_shows_a_nan_in_its_row_and_column_only",
    "two_opposed_gradients_end_orthogonal_to_each_others_original",
    "exactly_opposite_gradients_cancel",
    "one_huge_and_one_tiny_objective_both_keep_their_direction",
    "a_zero_gradient_changes_nothing",
    "mean_is_the_sum_divided_by_k",
    "weights_apply_after_projection",
    "an_objective_of_weight_zero_takes_no_part",
    "an_objective_of_weight_zero_may_be_nan",
    "all_weights_zero_gives_zeros",
    "orders_are_those_of_the_definition",
    "fixed_is_ascending_order",
    "group_zero_equals_the_unbatched_call",
    "groups_draw_orders_of_their_own",
    "batches_have_any_number_of_dimensions",
    "a_sequence_of_tensors_is_lists_of_one",
    "dtypes_may_differ_between_tensors_of_a_list",
    "strides_do_not_matter",
    "expanded_gradients_are_read_as_they_look",
    "results_are_detached_and_inputs_untouched",
    "statistics_count_pairs_of_negative_cosine",
    "statistics_count_no_pair_with_an_objective_of_weight_zero",
]


@pytest.mark.parametrize("law", LAWS)
def test_law(on_cuda, law):
    getattr(laws, f"test_{law}")(on_cuda)
