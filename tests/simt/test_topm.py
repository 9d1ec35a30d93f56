"""Top-m and sparse edits: the CUDA kernels, run by the harness, have the bits of the reference on every path."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prosocial_ext.reference import raise_if_bad
from prosocial_ext.reference.philox import uniform_u64

from prosocial_ext import reference
from prosocial_ext.ops import _cuda_topm as cuda
from tests.asserts import assert_same_bits
from tests.ops.inputs import zero_pages

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
OVERFLOW, TOO_FEW, TOO_MANY, TWO_PASS, SAMPLE, NARROW = 1, 2, 4, 8, 16, 64
PATHS = {
    "exact": TWO_PASS,
    "sampled": SAMPLE,
    "overflow": SAMPLE | OVERFLOW,
    "too_few": SAMPLE | TOO_FEW,
}

pytestmark = pytest.mark.usefixtures("simt", "poisoned")


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and scratch start with arbitrary bytes; a few blocks share the chunks, so that each has several."""
    generator = torch.Generator().manual_seed(5)

    def empty(like, size, dtype):
        count = size * dtype.itemsize
        start = torch.randint(0, 256, (count + 256,), dtype=torch.uint8, generator=generator).to(like.device)
        start = start[-start.data_ptr() % 256 :][:count]
        return start.view(dtype)

    monkeypatch.setattr(cuda, "_empty", empty)
    monkeypatch.setattr(cuda, "_blocks", lambda tensor: 2)
    monkeypatch.setattr(cuda, "CHUNK", 4096)


def triple(shapes, dtypes, seed=0, spread=1e-3):
    """params, base, tuned with the given dtypes each, tuned near base as after a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    base = [torch.randn(s, generator=generator) * 0.05 for s in shapes]
    tuned = [b + torch.randn(s, generator=generator) * spread for b, s in zip(base, shapes, strict=True)]
    params = [torch.randn(s, generator=generator) * 0.05 for s in shapes]
    return tuple([t.to(dtype) for t in tensors] for tensors, dtype in zip((params, base, tuned), dtypes, strict=True))


def clones(tensors):
    return [t.clone() for t in tensors]


def counts_of(tensors, m, density, per_tensor):
    sizes = [t.numel() for t in tensors] if per_tensor else [sum(t.numel() for t in tensors)]
    return [int(density * n) if m is None else m for n in sizes]


def check_edit(params, base, tuned, *, m=None, density=None, scale=0.7, per_tensor=False, importance=(), undo=False,
               check_finite=True, hooks=0, alias=None):  # fmt: skip
    """Edit copies with the kernels and with the reference; every bit and every figure must agree."""
    m = counts_of(params, m, density, per_tensor)
    results = []
    for core, extra in ((cuda.subtract_cuda, (hooks,)), (reference.topm.subtract_core, ())):
        p, b, t = clones(params), clones(base), clones(tuned)
        if alias == "base":
            b = p = clones(base)
        if alias == "tuned":
            t = p = clones(tuned)
        results.append((p, core(p, b, t, importance, m, per_tensor, scale, check_finite, undo, *extra)))
    (actual, outputs), (expected, wanted) = results
    for name, a, e in zip(("threshold", "kept", "unchanged", "nonfinite"), outputs, wanted, strict=False):
        assert_same_bits(a, e, name)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"params[{i}]")
    assert_same_bits(outputs[4], wanted[4], "undo indices")
    assert_same_bits(outputs[5], wanted[5], "undo bits")
    return outputs


def check_select(base, tuned, *, m=None, density=None, per_tensor=False, importance=(), hooks=0):
    m = counts_of(base, m, density, per_tensor)
    actual = cuda.select_cuda(base, tuned, importance, m, per_tensor, hooks)
    expected = reference.topm.select_core(base, tuned, importance, m, per_tensor)
    for name, a, e in zip(("indices", "values", "counts", "threshold"), actual, expected, strict=True):
        assert_same_bits(a, e, name)
    return actual


SHAPES = [(43, 101), (7,), (0,), (1,), (3, 131), (0,)]
# Paths differ in what is settled how, dtypes in how entries are read and edited: each path meets one, each dtype two.
PATHS_AND_DTYPES = [
    *(("sampled", dtype) for dtype in DTYPES),
    ("exact", torch.bfloat16),
    ("exact", torch.float64),
    ("overflow", torch.float16),
    ("too_few", torch.float32),
]


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"check_finite": False}, {"undo": True}], ids=str)
def test_every_path_has_the_bits_of_the_reference(dtype, path, options):
    check_edit(*triple(SHAPES, [dtype] * 3), density=0.1, hooks=PATHS[path], **options)


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES, ids=str)
def test_a_selection_is_listed_in_order(dtype, path):
    _, base, tuned = triple(SHAPES, [dtype] * 3)
    check_select(base, tuned, density=0.1, hooks=PATHS[path])


@pytest.mark.parametrize("path", ["sampled", "exact"])
@pytest.mark.parametrize("options", [{"check_finite": False}, {"undo": True}], ids=str)
def test_per_tensor_scope(path, options):
    tensors = triple(SHAPES, [torch.bfloat16] * 3)
    check_edit(*tensors, density=0.3, per_tensor=True, hooks=PATHS[path], **options)
    check_select(*tensors[1:], density=0.3, per_tensor=True, hooks=PATHS[path])


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.float64),
    (torch.float64, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.float32, torch.float64, torch.float32),
], ids=lambda d: "-".join(str(x)[6:] for x in d))  # fmt: skip
def test_dtypes_may_differ_between_params_base_and_tuned(dtypes):
    tensors = triple([(2101,), (33, 5)], dtypes)
    check_edit(*tensors, density=0.2, scale=1.3, undo=True)
    check_edit(*tensors, density=0.2, scale=1.3, check_finite=False, hooks=SAMPLE)


@pytest.mark.parametrize("dtypes", [DTYPES, (torch.float32, torch.float16, torch.bfloat16)], ids=["wide", "narrow"])
def test_dtypes_may_differ_between_tensors(dtypes):
    lists = [[], [], []]
    for i, dtype in enumerate(dtypes):
        for collected, made in zip(lists, triple([(2100 + i,)], [dtype] * 3, seed=i), strict=True):
            collected += made
    for options in ({}, {"check_finite": False}, {"undo": True}):
        check_edit(*lists, density=0.3, scale=-0.3, **options, hooks=SAMPLE)


@pytest.mark.parametrize("alias", ["base", "tuned"])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e30])
def test_params_may_be_base_or_tuned(alias, scale):
    tensors = triple([(2100,), (501,)], [torch.bfloat16] * 3)
    for hooks in (SAMPLE, SAMPLE | TOO_FEW):
        for undo in (False, True):
            check_edit(*tensors, alias=alias, density=0.3, scale=scale, check_finite=False, undo=undo, hooks=hooks)


CASES = ("all_equal", "all_zero", "one_outlier", "alternating_signs", "two_values", "sorted", "subnormal")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["exact", "sampled", "overflow"])
def test_hostile_data(case, path):
    n = 4300
    generator = torch.Generator().manual_seed(1)
    tuned = {
        "all_equal": torch.full((n,), 0.25),
        "all_zero": torch.zeros(n),
        "one_outlier": torch.zeros(n).index_fill(0, torch.tensor([n - 5]), 1e15),
        "alternating_signs": torch.tensor([1e-10, -1e-10]).repeat(n // 2),
        "two_values": (torch.arange(n) % 7 == 0).float() + 1,
        "sorted": torch.linspace(0, 1, n),
        "subnormal": torch.randn(n, generator=generator) * 1e-41,
    }[case]
    base, params = torch.zeros(n), torch.randn(n, generator=generator)
    check_edit([params], [base], [tuned], m=1300, check_finite=False, hooks=PATHS[path])
    check_edit([params], [base], [tuned], m=1300 if path == "sampled" else 1, undo=True, hooks=PATHS[path])


@pytest.mark.parametrize("m", [0, 1, 2, 7, 9, 10])
def test_m_at_its_limits(m):
    tuned = torch.tensor([0.0, -0.0, 3.0, 0.0, 1.0, -1.0, 0.0, 1e-45, 2.0, -3.0])
    check_edit([torch.ones(10)], [torch.zeros(10)], [tuned], m=m, undo=True)
    check_edit([torch.ones(10)], [torch.zeros(10)], [tuned], m=m, check_finite=False, hooks=SAMPLE)


@pytest.mark.parametrize("path", ["sampled", "exact"])
@pytest.mark.parametrize("one_pass", [True, False], ids=["one_pass", "look_first"])
def test_entries_that_are_not_finite_are_counted_and_never_selected(path, one_pass):
    params, base, tuned = triple([(2300,), (900,)], [torch.float32] * 3)
    generator = torch.Generator().manual_seed(8)
    for t in tuned:
        t[torch.randint(0, t.numel(), (t.numel() // 3,), generator=generator)] = NAN
    base[1][:7] = INF
    importance = [torch.rand(t.shape, generator=generator) for t in tuned]
    importance[0][:9], importance[0][20], importance[1][3] = -1.0, NAN, INF
    for m, weights in ((300, importance), (3200, ())):  # the second is more than there are
        check_edit(params, base, tuned, m=m, importance=weights, check_finite=False, undo=not one_pass,
                   hooks=PATHS[path])  # fmt: skip


def test_nothing_that_may_be_selected():
    for hooks in (SAMPLE, TWO_PASS):
        for undo in (True, False):
            check_edit([torch.zeros(300)], [torch.zeros(300)], [torch.full((300,), NAN)], m=5, check_finite=False,
                       undo=undo, hooks=hooks)  # fmt: skip


def test_a_delta_that_is_not_finite_is_refused_and_params_stay():
    params, base, tuned = triple([(300,), (900,)], [torch.bfloat16] * 3)
    tuned[1][77] = NAN
    edited = clones(params)
    with pytest.raises(ValueError, match=r"tuned\[1\] - base\[1\] must be finite, got 1 entries"):
        cuda.subtract_cuda(edited, base, tuned, [], [100], False, 1.0)
    with pytest.raises(ValueError, match=r"tuned\[1\] - base\[1\] must be finite, got 1 entries"):
        cuda.select_cuda(base, tuned, [], [100])
    weights = [torch.ones(300), torch.ones(900)]
    weights[0][3] = -1.0
    with pytest.raises(ValueError, match=r"importance\[0\] must be finite and not negative, got 1 other"):
        cuda.subtract_cuda(edited, base, tuned, weights, [100], False, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(edited, params, strict=True))


@pytest.mark.parametrize("alias", [None, "base", "tuned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_edited_before_a_bad_delta_was_found_is_put_back(dtype, alias, simt):
    """The first group is sampled and edited while it is looked at; a NaN refuses it, wherever it is found."""
    for tensor in (0, 1):
        params, base, tuned = triple([(66_000,), (900,)], [dtype] * 3)
        tuned[tensor][77] = NAN
        if alias is not None:
            params = {"base": base, "tuned": tuned}[alias]
        before, launches = clones(params), simt.counts()["launches"]
        with pytest.raises(ValueError, match=rf"tuned\[{tensor}\] - base\[{tensor}\] must be finite, got 1 entries"):
            cuda.subtract_cuda(params, base, tuned, [], [20_000, 100], True, -1.0, True, True)
        for actual, expected in zip(params, before, strict=True):
            assert_same_bits(actual, expected)
        assert simt.counts()["launches"] - launches == (9 if dtype is not torch.float64 else 12)


@pytest.mark.parametrize("path", ["sampled", "overflow", "too_few", "exact"])
def test_nothing_is_edited_when_the_wait_for_the_check_is_broken_off(path, monkeypatch):
    params, base, tuned = triple([(6000,), (300,)], [torch.bfloat16] * 3)
    before = clones(params)

    def interrupt(tensor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cuda.subtract_cuda(params, base, tuned, [], [600], False, 1.0, True, True, PATHS[path])
    for actual, expected in zip(params, before, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(("field", "value"), [("chunk", 1 << 15), ("chunk", 200), ("one_pass", 0)])
def test_a_call_that_the_kernels_cannot_serve_is_refused(field, value, simt):
    tensors = triple([(300,)], [torch.bfloat16] * 3)
    prepared = cuda._Prepared(*tensors, [], [30], False, 1.0, one_pass=True, hooks=0)
    prepared.record(30, torch.int16)
    setattr(prepared.call, field, value)
    with pytest.raises(RuntimeError, match="cudaError_t 1;"):
        prepared.settle()


@pytest.mark.parametrize("data", ["all", "dense", "scattered", "one a row", "none but candidates"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_record_of_full_and_of_empty_rows(data, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK", 1 << 14)
    n = 34_000  # three chunks, 133 rows
    params, base = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(dtype), torch.zeros(n, dtype=dtype)
    order = torch.randn(n, generator=torch.Generator().manual_seed(2)).abs() * 1e-3
    if data == "dense":
        order[5000:14_000] += 1
    elif data == "one a row":
        order[torch.arange(5, n, 256)] += 1
    m = {"all": n, "dense": 9100, "scattered": 340, "one a row": 140, "none but candidates": 3}[data]
    check_edit([params], [base], [order.to(dtype)], m=m, undo=True, hooks=SAMPLE)


def test_a_warp_notes_more_rows_than_it_has_lanes_before_it_writes(monkeypatch):
    monkeypatch.setattr(cuda, "_blocks", lambda tensor: 1)
    n = 70_000  # 34 rows for each warp, of which the sweep edits the largest two or so
    tuned = 1000.0 - torch.arange(n) * 97 % 256
    check_edit([torch.ones(n)], [torch.zeros(n)], [tuned], m=5160, undo=True)


@pytest.mark.parametrize(("dtype", "weight_dtype", "path"), [
    (torch.float32, torch.bfloat16, "sampled"), (torch.bfloat16, torch.float32, "too_few"),
    (torch.float64, torch.float16, "sampled"), (torch.float16, torch.float16, "exact"),
], ids=str)  # fmt: skip
def test_importance_has_the_bits_of_the_reference(dtype, weight_dtype, path):
    generator = torch.Generator().manual_seed(3)
    importance = [torch.rand(s, generator=generator).to(weight_dtype) for s in [(2100,), (33,)]]
    tensors = triple([(2100,), (33,)], [dtype] * 3)
    for check_finite in (True, False):
        check_edit(*tensors, density=0.1, importance=importance, check_finite=check_finite, hooks=PATHS[path])


def test_a_score_that_overflows_ranks_highest():
    tuned = torch.tensor([1.0, 3e38, 2e38, 3e38])
    importance = [torch.tensor([1.0, 1.0, 9.0, 9.0])]
    assert check_select([torch.zeros(4)], [tuned], m=2, importance=importance)[0].tolist() == [2, 3]


@pytest.mark.parametrize("chunk", [256, 768, 2048, 1 << 14])
@pytest.mark.parametrize("path", ["sampled", "too_few"])
def test_chunk_size_changes_no_bit(chunk, path, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK", chunk)
    tensors = triple([(5000 if chunk < 1 << 14 else 20_000,), (5,)], [torch.bfloat16] * 3)
    for options in ({"undo": True}, {"check_finite": False}):
        check_edit(*tensors, density=0.2, hooks=PATHS[path], **options)


@pytest.mark.parametrize("blocks", [1, 1000])
def test_number_of_blocks_changes_no_bit(blocks, monkeypatch):
    monkeypatch.setattr(cuda, "_blocks", lambda tensor: blocks)
    monkeypatch.setattr(cuda, "CHUNK", 512)
    tensors = triple([(2000,), (77,), (1100,)], [torch.float16] * 3)
    check_edit(*tensors, density=0.2, undo=True)
    check_edit(*tensors, density=0.2, check_finite=False, hooks=SAMPLE)


@pytest.mark.parametrize("count", [60, 900])
def test_many_small_tensors_with_odd_offsets(count):
    storage = triple([(50 * count,)], [torch.bfloat16] * 3)
    sizes = [(0, 1, 7, 31, 64)[i % 5] for i in range(count)]

    def cut(flat):
        return [flat[sum(sizes[:i]) + 1 : sum(sizes[:i]) + 1 + n] for i, n in enumerate(sizes)]

    for per_tensor in (False, True):
        m = counts_of(cut(storage[0][0]), None, 0.3, per_tensor)
        arguments = (cut(storage[1][0]), cut(storage[2][0]), [], m, per_tensor, 0.5, True, False)
        actual, expected = storage[0][0].clone(), storage[0][0].clone()
        outputs = cuda.subtract_cuda(cut(actual), *arguments)
        wanted = reference.topm.subtract_core(cut(expected), *arguments)
        assert_same_bits(actual, expected)
        for a, e in zip(outputs, wanted, strict=True):
            assert_same_bits(a, e)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_list_has_the_bits_of_the_reference(data):
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(sum))
    levels = data.draw(st.sampled_from([2, 5, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    params, base, tuned = (
        [torch.randint(-levels, levels, (n,), generator=generator) / 8 for n in sizes] for _ in range(3)
    )
    check_edit(
        params, base, tuned, m=data.draw(st.integers(0, sum(sizes))), undo=data.draw(st.booleans()),
        check_finite=data.draw(st.booleans()), scale=data.draw(st.sampled_from([1.0, -0.3])),
        hooks=data.draw(st.sampled_from(sorted(PATHS.values()))),
    )  # fmt: skip


@pytest.mark.parametrize("offsets", [(3, 0, 1), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype, offsets):
    tensors = triple([(2196,)], [dtype] * 3)
    params, base, tuned = ([t[0][o : o + 2150]] for t, o in zip(tensors, offsets, strict=True))
    whole, m = tensors[0][0].clone(), [400]
    expected = [params[0].clone()]
    reference.topm.subtract_core(expected, base, tuned, [], m, False, 0.7, True, False)
    cuda.subtract_cuda(params, base, tuned, [], m, False, 0.7, False, False, SAMPLE)
    assert_same_bits(params[0], expected[0])
    first = offsets[0]
    assert_same_bits(tensors[0][0][:first], whole[:first], "before the view")
    assert_same_bits(tensors[0][0][first + 2150 :], whole[first + 2150 :], "behind the view")


def test_strided_params_are_edited_in_place():
    whole, expected = torch.zeros(60, 90), torch.zeros(60, 90)
    tuned = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).t().contiguous().t()
    arguments = ([torch.zeros(30, 20)], [tuned], [], [111], False, 1.0, True, True)
    outputs = cuda.subtract_cuda([whole[::2, 5:85:4]], *arguments)
    wanted = reference.topm.subtract_core([expected[::2, 5:85:4]], *arguments)
    assert_same_bits(whole, expected)
    for a, e in zip(outputs, wanted, strict=True):
        assert_same_bits(a, e)


def test_unselected_entries_keep_even_the_payload_of_a_nan():
    bits = torch.cat([torch.arange(0x7F81, 0x7FA1, dtype=torch.int16), torch.zeros(2016, dtype=torch.int16)])
    params, tuned = bits.clone().view(torch.bfloat16), torch.zeros(2048, dtype=torch.bfloat16)
    tuned[5], tuned[40] = 0.5, 1.0
    cuda.subtract_cuda([params], [torch.zeros(2048, dtype=torch.bfloat16)], [tuned], [], [2], False, 1.0)
    kept = torch.arange(2048) != 5
    bits[40] = torch.tensor([-1.0], dtype=torch.bfloat16).view(torch.int16)[0]
    assert torch.equal(params.view(torch.int16)[kept], bits[kept])


def test_a_missed_bracket_before_the_edit_is_repaired():
    tensors = triple([(6000,)], [torch.bfloat16] * 3)
    check_edit(*tensors, density=0.1, hooks=SAMPLE | TOO_MANY)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("undo", [False, True])
def test_a_missed_bracket_after_edits_says_that_params_are_spoilt(per_tensor, undo):
    params, base, tuned = triple([(6000,), (20,)], [torch.bfloat16] * 3)
    m = counts_of(params, None, 0.1, per_tensor)
    outputs = cuda.subtract_cuda(params, base, tuned, [], m, per_tensor, 1.0, False, undo, SAMPLE | TOO_MANY)
    assert outputs[3].tolist() == [-1, -1]
    message = r"params are spoilt\. Load them again and pass check_finite=True and undo=False"
    with pytest.raises(RuntimeError, match=message):
        raise_if_bad(reference.TopmEdit(*outputs[:4]))
    if undo:
        with pytest.raises(RuntimeError, match=message):
            cuda.subtract_cuda(params, base, tuned, [], m, per_tensor, 1.0, True, True, SAMPLE | TOO_MANY)


def test_scratch_of_an_earlier_call_is_as_good_as_new(monkeypatch):
    kept, empty = {}, cuda._empty

    def reused(like, size, dtype):
        if dtype is not torch.uint8:
            return empty(like, size, dtype)
        return kept.setdefault(like.device, empty(like, 1 << 22, dtype))[:size]

    monkeypatch.setattr(cuda, "_empty", reused)
    for seed, dtype in enumerate((torch.bfloat16, torch.float64, torch.bfloat16)):
        tensors = triple([(1500,), (800,)], [dtype] * 3, seed=seed)
        check_edit(*tensors, density=0.1, check_finite=False, hooks=PATHS["too_few"])
        check_edit(*tensors, density=0.1, undo=True, per_tensor=True, hooks=PATHS["sampled"])


def test_an_edit_that_does_not_check_does_not_read_back(monkeypatch):
    for method in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("synchronised"))
    params, base, tuned = triple([(3000,)], [torch.bfloat16] * 3)
    cuda.subtract_cuda(params, base, tuned, [], [300], False, 1.0, False, False)
    cuda.subtract_cuda(params, base, tuned, [], [300], False, 1.0, False, True)
    indices, values = torch.arange(4), torch.ones(4)
    cuda.sparse_cuda(params, indices, values, torch.tensor([4]), [False], 1.0, True)


@pytest.mark.parametrize("what", ["subtract", "select"])
def test_inside_a_capture_what_reads_back_is_refused(what, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one = [torch.ones(3)]
    if what == "subtract":
        with pytest.raises(RuntimeError, match=r"a CUDA graph cannot capture\. Pass check_finite=False"):
            cuda.subtract_cuda(one, one, one, [], [1], False, 1.0)
    else:
        with pytest.raises(RuntimeError, match="topm_select reads a flag back"):
            cuda.select_cuda(one, one, [], [1])


# ---- launches


@pytest.mark.parametrize(("path", "one_pass", "look", "record"), [
    (SAMPLE, 9, 9, 10), (SAMPLE | NARROW, 11, 11, 12), (SAMPLE | OVERFLOW, 9, 9, 10), (SAMPLE | TOO_FEW, 9, 9, 10),
    (TWO_PASS, 6, 6, 7),
], ids=["sampled", "large sample", "overflow", "too few", "exact"])  # fmt: skip
def test_a_miss_costs_no_launches(path, one_pass, look, record, simt):
    params, base, tuned = triple([(6000,), (300,)], [torch.bfloat16] * 3)
    for launches, options in ((one_pass, (False, False)), (look, (True, False)), (record, (False, True))):
        before = simt.counts()["launches"]
        cuda.subtract_cuda(params, base, tuned, [], [600], False, 1.0, *options, path)
        assert simt.counts()["launches"] - before == launches
    before = simt.counts()["launches"]
    cuda.select_cuda(base, tuned, [], [600], False, path)
    assert simt.counts()["launches"] - before == record


def test_groups_of_one_chunk_are_settled_in_one_launch(simt):
    tensors = triple([(4096,), (1,), (300,), (0,), (2049,)], [torch.bfloat16] * 3)
    check_edit(*tensors, density=0.2, per_tensor=True, check_finite=False)
    before = simt.counts()["launches"]
    cuda.subtract_cuda(*tensors, [], [800, 1, 60, 0, 400], True, 1.0, False, False)
    assert simt.counts()["launches"] - before == 3


def test_tables_may_be_longer_than_the_arguments_of_a_launch(simt):
    tensors = triple([(9,)] * 60 + [(4100,)], [torch.float32] * 3)
    before = simt.counts()["launches"]
    cuda.subtract_cuda(*map(clones, tensors), [], [700], False, 1.0, False, False)
    assert simt.counts()["launches"] - before == 7
    check_edit(*tensors, m=700, undo=True)
    check_edit(*tensors, density=0.3, per_tensor=True, check_finite=False)


# ---- the edges of single blocks


def test_as_many_candidates_as_a_block_has_threads_and_one_more():
    n, s, wanted = 4300, 4096, {255, 256, 257}
    zeros, ones, params = torch.zeros(n), torch.ones(n), torch.rand(n, generator=torch.Generator().manual_seed(4))
    sample = sorted(uniform_u64(0x70736574_6F706D31, draw, 0) * n >> 64 for draw in range(s))
    for m in range(200, 2000, 3):
        q = m / n
        margin, middle = int(5 * (s * q * (1 - q)) ** 0.5) + 16, int(s * q)  # sample_margin in topm.cu
        candidates = sample[middle + margin] - sample[middle - margin - 1]  # of equal entries, between A and B
        if candidates in wanted:
            wanted.remove(candidates)
            check_edit([params], [zeros], [ones], m=m, hooks=SAMPLE)
    assert not wanted


def test_more_ties_are_left_than_the_list_of_a_block_holds():
    """Both values tie across the bracket, and are so far apart that two digits do not tell the key that is left."""
    n = 30_000
    tuned = torch.where(torch.arange(n) % 2 == 0, 1.0, 2.0)
    for m in (n // 2 - 5, n // 2 + 5):
        check_edit([torch.zeros(n)], [torch.zeros(n)], [tuned], m=m, check_finite=False, hooks=SAMPLE)


@pytest.mark.parametrize("data", ["ties", "distinct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_sample_is_narrowed_digit_by_digit(data, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "_blocks", lambda tensor: 8)  # two for each place
    params, base, tuned = triple([(4100,), (70,)], [dtype] * 3)
    if data == "ties":
        base, tuned = [torch.zeros_like(b) for b in base], [(t * 20).round() for t in tuned]
    for options in ({"check_finite": False}, {"undo": True}):
        check_edit(params, base, tuned, density=0.3, hooks=SAMPLE | NARROW, **options)


# ---- the miss path beside others


@pytest.mark.parametrize("hooks", [SAMPLE | OVERFLOW, SAMPLE | TOO_FEW, TWO_PASS], ids=["overflow", "too few", "exact"])
@pytest.mark.parametrize("data", ["ties", "distinct"])
def test_blocks_that_share_groups_settle_them_exactly(data, hooks, monkeypatch):
    monkeypatch.setattr(cuda, "_blocks", lambda tensor: 24)  # three where nothing is expected to be left
    monkeypatch.setattr(cuda, "CHUNK", 256)
    params, base, tuned = triple([(1300,), (256,), (0,), (900,), (3,)], [torch.float16] * 3)
    if data == "ties":
        base, tuned = [torch.zeros_like(b) for b in base], [(t * 20).round() for t in tuned]
    for per_tensor in (False, True):
        for options in ({"check_finite": False}, {"undo": True}):
            check_edit(params, base, tuned, density=0.2, per_tensor=per_tensor, hooks=hooks, **options)


def test_groups_go_different_ways_in_one_call():
    """Unhooked: one group is sampled, one shared by blocks, three have a block for themselves, one wants nothing."""
    params, base, tuned = triple([(66_000,), (9000,), (500,), (0,), (4096,), (40,)], [torch.bfloat16] * 3)
    m = [6600, 900, 50, 0, 4096, 0]
    edited, expected = clones(params), clones(params)
    outputs = cuda.subtract_cuda(edited, base, tuned, [], m, True, 0.7, False)
    wanted = reference.topm.subtract_core(expected, base, tuned, [], m, True, 0.7, False, False)
    for a, e in zip([*edited, *outputs], [*expected, *wanted], strict=True):
        assert_same_bits(a, e)


# ---- sparse


def selected(base, tuned, **options):
    return reference.topm_select(base, tuned, **options)


def subtract_sparse(params, delta, scale=1.0, undo=False):
    wide = [dtype == torch.float64 for dtype in delta.dtypes]
    outputs = cuda.sparse_cuda(params, delta.indices, delta.values, delta.counts, wide, scale, undo)
    return reference.topm.sparse_result(params, delta, undo, *outputs)


@pytest.mark.parametrize("dtypes", [
    *((d,) * 3 for d in DTYPES), (torch.bfloat16, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32),
], ids=lambda d: "-".join(str(x)[6:] for x in d))  # fmt: skip
@pytest.mark.parametrize("undo", [True, False])
def test_a_sparse_edit_has_the_bits_of_the_reference(dtypes, undo):
    params, base, tuned = triple(SHAPES, dtypes)
    delta = selected(base, tuned, density=0.2)
    edited, expected = clones(params), clones(params)
    edit = subtract_sparse(edited, delta, 0.7, undo)
    wanted = reference.sparse_subtract_(expected, delta, scale=0.7, undo=undo)
    for i, (a, e) in enumerate(zip(edited, expected, strict=True)):
        assert_same_bits(a, e, f"params[{i}]")
    for field in ("threshold", "kept", "unchanged", "nonfinite"):
        assert_same_bits(getattr(edit, field), getattr(wanted, field), field)
    if undo:
        assert_same_bits(edit.undo.indices, wanted.undo.indices)
        assert_same_bits(edit.undo.bits, wanted.undo.bits)
    assert raise_if_bad(edit) is edit


def test_a_sparse_edit_of_tensors_of_many_dtypes_and_strides():
    lists = [[], [], []]
    for i, dtype in enumerate(DTYPES):
        for collected, made in zip(lists, triple([(40 + i, 9)], [dtype] * 3, seed=i), strict=True):
            collected += made
    delta = selected(*lists[1:], density=0.5)
    edited, expected = ([t.t().contiguous().t() for t in lists[0]] for _ in range(2))
    edit = subtract_sparse(edited, delta, undo=True)
    wanted = reference.sparse_subtract_(expected, delta, undo=True)
    for a, e in zip(edited, expected, strict=True):
        assert_same_bits(a, e)
    assert_same_bits(edit.unchanged, wanted.unchanged)
    assert_same_bits(edit.undo.bits, wanted.undo.bits)


@pytest.mark.parametrize("sizes", [(0,), (0, 3, 0), (1,)], ids=str)
def test_a_sparse_edit_of_next_to_nothing(sizes):
    for count in (0, sum(sizes)):
        params, base = [torch.ones(n) for n in sizes], [torch.zeros(n) for n in sizes]
        delta = selected(base, [torch.ones(n) for n in sizes], m=count)
        edit = subtract_sparse(params, delta)
        assert [float(p.sum()) for p in params] == ([float(n) for n in sizes] if count == 0 else [0.0] * len(sizes))
        assert raise_if_bad(edit).unchanged.tolist() == [0] * len(sizes)


@pytest.mark.parametrize(("field", "value", "tensor", "flag", "message"), [
    ("indices", [1, 4, 1, 2], 0, -1, "delta.indices of tensor 0 must be ascending without repetition, in range"),
    ("indices", [-1, 3, 1, 2], 0, -1, "delta.indices of tensor 0 must be ascending"),
    ("indices", [3, 1, 1, 2], 0, -1, "delta.indices of tensor 0 must be ascending"),
    ("indices", [1, 3, 2, 2], 1, -1, "delta.indices of tensor 1 must be ascending"),
    ("indices", [1, 3, 1, 2**62], 1, -1, "delta.indices of tensor 1 must be ascending"),
    ("values", [1.0, NAN, 1.0, 1.0], 0, -2, "delta.values of tensor 0 must be finite"),
    ("values", [1.0, 1.0, 1.0, -INF], 1, -2, "delta.values of tensor 1 must be finite"),
    ("counts", [2, 1], 0, -4, "delta.counts must sum up to the number of indices, got 3"),
    ("counts", [0, 4], 1, -3, r"delta.counts\[1\] must be between 0 and the entries of params\[1\], got 4"),
    ("counts", [5, -1], 0, -3, r"delta.counts\[0\] must be between 0 and the entries of params\[0\], got 5"),
    ("counts", [2, -(2**62)], 1, -3, r"delta.counts\[1\] must be between 0"),
], ids=str)  # fmt: skip
def test_a_damaged_delta_writes_nothing_and_is_flagged(field, value, tensor, flag, message):
    base, tuned = [torch.zeros(4), torch.zeros(3)], [torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 4.0])]
    good = selected(base, tuned, m=4)
    bad = dataclasses.replace(good, **{field: torch.tensor(value, dtype=getattr(good, field).dtype)})
    params = [torch.zeros(4), torch.zeros(3)]
    edit = subtract_sparse(params, bad, undo=True)
    assert not any(p.any() for p in params)
    assert edit.unchanged[tensor] == flag
    assert edit.undo.indices.tolist() == [-1] * 4
    assert edit.undo.bits.tolist() == [0] * 4
    with pytest.raises(ValueError, match=message):
        raise_if_bad(edit)


@pytest.mark.usefixtures("on_cpu")  # 4 GB would be moved
def test_a_sparse_edit_reaches_entries_past_2_to_the_31():
    params = zero_pages(2**31 + 100)
    delta = selected([torch.zeros(3)], [torch.tensor([1.0, 2.0, 3.0])], m=3)
    places = torch.tensor([7, 2**31 - 1, 2**31 + 99])
    far = dataclasses.replace(
        delta, indices=places, values=torch.tensor([1.0, 2.0, 3.0]), shapes=((2**31 + 100,),), dtypes=(torch.bfloat16,)
    )
    edit = subtract_sparse([params], far, undo=True)
    assert params[places].tolist() == [-1.0, -2.0, -3.0]
    assert edit.undo.indices.tolist() == places.tolist()


def test_one_damaged_entry_among_thousands_is_found():
    params, base, tuned = triple([(3000,), (2000,)], [torch.float32] * 3)
    delta = selected(base, tuned, m=3000)
    damaged = delta.indices.clone()
    place = int(delta.counts[0]) + 700
    damaged[place] = damaged[place - 1]
    edited = clones(params)
    edit = subtract_sparse(edited, dataclasses.replace(delta, indices=damaged))
    assert edit.unchanged.tolist() == [0, -1]
    assert all(torch.equal(a, b) for a, b in zip(edited, params, strict=True))


def test_versions_are_bumped_for_autograd():
    params, base, tuned = triple([(30,)], [torch.float32] * 3)
    before = params[0]._version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.subtract_cuda(params, base, tuned, [], [3], False, 1.0)
    assert params[0]._version > before
