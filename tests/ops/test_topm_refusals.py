"""What top-m refuses, in which words. One test per rule, over the reference and every instruction set."""

import contextlib
import dataclasses

import pytest
import torch
from prosocial_ext.reference import topm as _definition

Z, ONE = torch.zeros(4), torch.ones(4)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({}, ValueError, "m and density must be given one and not the other"),
    ({"m": 1, "density": 0.5}, ValueError, "m and density must be given one and not the other"),
    ({"m": 5}, ValueError, r"m must be an integer in \[0, 4\], the entries of all tensors, got 5"),
    ({"m": -1}, ValueError, r"m must be an integer in \[0, 4\]"),
    ({"m": 1.0}, TypeError, r"m must be an integer in \[0, 4\]"),
    ({"density": 10.0}, ValueError, r"density must be a number in \(0, 1\], got 10.0"),
    ({"density": 0.0}, ValueError, r"density must be a number in \(0, 1\], got 0.0"),
    ({"density": float("nan")}, ValueError, r"density must be a number in \(0, 1\]"),
    ({"density": "all"}, TypeError, r"density must be a number in \(0, 1\]"),
    ({"m": 1, "scale": float("inf")}, ValueError, "scale must be a finite fp32 number"),
    ({"m": 1, "scale": 1e39}, ValueError, "scale must be a finite fp32 number"),
    ({"m": 1, "scale": "1"}, TypeError, "scale must be a finite fp32 number"),
    ({"m": 1, "scale": 10**400}, ValueError, "scale must be a finite fp32 number, got an integer of 1329 bits"),
    ({"m": 2**70}, ValueError, r"m must be an integer in \[0, 4\]"),
    ({"density": 2**70}, ValueError, r"density must be a number in \(0, 1\]"),
    ({"m": 1, "scope": "layer"}, ValueError, "scope must be one of 'global', 'per_tensor'"),
    ({"m": 1, "scope": None}, TypeError, "scope must be one of 'global', 'per_tensor', got None"),
    ({"m": 1, "scope": Z}, TypeError, "scope must be one of 'global', 'per_tensor', got a tensor"),
    ({"m": 1, "undo": 1}, TypeError, "undo must be True or False, got 1"),
    ({"m": 1, "check_finite": None}, TypeError, "check_finite must be True or False, got None"),
    ({"m": 1, "check_finite": ONE > 0}, TypeError, "check_finite must be True or False, got a tensor"),
    ({"m": 1, "importance": torch.ones(4, dtype=torch.float64)}, TypeError, r"importance\[0\] must be float32"),
    ({"m": 1, "importance": torch.ones(3)}, ValueError, r"importance\[0\] must have the shape of params\[0\]"),
    ({"m": 1, "importance": [ONE, ONE]}, ValueError, r"importance must have one tensor per tensor of params \(1\)"),
], ids=str)  # fmt: skip
def test_options_are_refused(ops, options, error, message):
    with pytest.raises(error, match=message):
        ops.topm_subtract_(torch.zeros(4), Z, ONE, **options)


def test_m_per_tensor_is_limited_by_the_smallest_tensor(ops):
    with pytest.raises(ValueError, match=r"m must be an integer in \[0, 2\], the entries of tensor 1"):
        ops.topm_select([Z, torch.zeros(2)], [ONE, torch.ones(2)], m=3, scope="per_tensor")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_is_not_read_is_named(ops, dtype):
    with pytest.raises(TypeError, match=f"base must be float32, .*got {dtype}"):
        ops.topm_subtract_(torch.zeros(4), torch.zeros(4).to(dtype), ONE, m=1)


def test_a_sparse_tensor_is_refused(ops):
    with pytest.raises(TypeError, match=r"tuned must be a dense \(strided\) tensor"):
        ops.topm_select(Z, ONE.to_sparse(), m=1)


def test_no_tensors_is_refused(ops):
    with pytest.raises(ValueError, match="params must have at least one tensor"):
        ops.topm_subtract_([], [], [], m=0)


def test_what_is_no_tensor_is_refused(ops):
    with pytest.raises(TypeError, match="base must be a tensor or a sequence of tensors, got 3"):
        ops.topm_subtract_(torch.zeros(4), 3, ONE, m=1)
    with pytest.raises(TypeError, match=r"base\[0\] must be a tensor, got 'x'"):
        ops.topm_subtract_(torch.zeros(4), ["x"], ONE, m=1)


def test_params_that_are_none_are_refused(ops):
    with pytest.raises(TypeError, match="params must be a tensor or a sequence of tensors, got None"):
        ops.topm_subtract_(None, Z, ONE, m=1)
    edit = ops.topm_subtract_(torch.zeros(4), Z, ONE, m=1, undo=True)
    with pytest.raises(TypeError, match="params must be a tensor or a sequence of tensors, got None"):
        edit.revert_(None)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused(ops, layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(TypeError, match=r"base must be a dense \(strided\) tensor, got a nested tensor"):
        ops.topm_subtract_(torch.zeros(4), nested, ONE, m=1)


def test_params_whose_negative_bit_is_set_are_refused_with_the_remedy(ops):
    negative = torch.view_as_complex(torch.ones(4, 2)).conj().imag
    assert negative.is_neg()
    with pytest.raises(ValueError, match=r"params must hold its values as they are, .* Call \.resolve_neg\(\) first"):
        ops.topm_subtract_(negative, Z, ONE, m=1)
    edit = ops.topm_subtract_(negative.resolve_neg(), Z, ONE, m=1, undo=True)
    with pytest.raises(ValueError, match=r"Call \.resolve_neg\(\) first"):
        edit.revert_(negative)


def test_shapes_must_match(ops):
    with pytest.raises(ValueError, match=r"tuned\[0\] must have the shape of params\[0\], \(4,\), got \(2, 2\)"):
        ops.topm_subtract_(torch.zeros(4), Z, ONE.view(2, 2), m=1)


@pytest.mark.parametrize("which", ["params", "base"])
def test_devices_must_match(ops, which):
    meta = torch.zeros(4, device="meta")
    params = [torch.zeros(4), meta if which == "params" else torch.zeros(4)]
    with pytest.raises(ValueError, match=rf"{which}\[1\] must be on the device of params\[0\], cpu, got meta"):
        ops.topm_subtract_(params, [Z, meta], [ONE, meta], m=1)


# ---- storage


def test_tied_weights_listed_twice_are_refused(ops):
    p = torch.zeros(4)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with params\[1\].*Pass tied weights once"):
        ops.topm_subtract_([p, p], [Z, Z], [ONE, ONE], m=1)


@pytest.mark.parametrize("argument", ["base", "tuned", "importance"])
def test_a_partial_overlap_is_refused(ops, argument):
    storage = torch.zeros(6)
    arguments = {"base": Z, "tuned": ONE, "importance": ONE, argument: storage[2:]}
    with pytest.raises(ValueError, match=rf"params\[0\] must not share memory with {argument}\[0\]"):
        ops.topm_subtract_(storage[:4], m=1, **arguments)


def test_params_that_are_another_tensors_base_are_refused(ops):
    p, q = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with base\[1\]"):
        ops.topm_subtract_([p, q], [Z, p], [ONE, ONE], m=1)


def test_params_that_are_their_own_importance_are_refused(ops):
    p = torch.ones(4)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with importance\[0\]"):
        ops.topm_subtract_(p, Z, ONE, m=1, importance=p)


@pytest.mark.parametrize("view", [
    torch.zeros(1).expand(4), torch.zeros(6).as_strided((2, 2), (1, 1)),
    torch.zeros(9).as_strided((2, 2, 2), (3, 3, 1)),
], ids=["stride_zero", "stride_one", "numel_equals_extent"])  # fmt: skip
def test_params_that_overlap_themselves_are_refused(ops, view):
    with pytest.raises(ValueError, match=r"params\[0\] must not overlap itself, got strides"):
        ops.topm_subtract_(view, torch.zeros(view.shape), torch.ones(view.shape), m=1)


def test_disjoint_views_of_one_storage_are_fine(ops):
    storage = torch.zeros(3, 4)
    ops.topm_subtract_([storage[:, :2], storage[:, 2:]], [torch.zeros(3, 2)] * 2, [torch.ones(3, 2)] * 2, density=1.0)
    assert torch.equal(storage, -torch.ones(3, 4))


def test_interleaved_views_that_share_nothing_are_fine(ops):
    storage = torch.zeros(6, 4)
    params = [storage[::2, ::2], storage[::2, 1::2], storage[1::2].t()]
    ops.topm_subtract_(
        params, [torch.zeros(p.shape) for p in params], [torch.ones(p.shape) for p in params], density=1.0
    )
    assert torch.equal(storage, -torch.ones(6, 4))


@pytest.mark.parametrize("view", [
    lambda s: s.view(-1)[20:22], lambda s: s[:, 1:3], lambda s: s.t()[2:, 1:], lambda s: s.view(2, 3, 4)[:, 1, :1],
    lambda s: s[3:4].expand(3, 4), lambda s: s.view(torch.bfloat16)[:, 1::7],
], ids=["row", "columns", "transposed", "blocks", "expanded", "other_dtype"])  # fmt: skip
@pytest.mark.parametrize("param", [lambda s: s[3:, :2], lambda s: s[::5, ::2], lambda s: s[:, 0]], ids=["a", "b", "c"])
def test_views_are_refused_where_and_only_where_they_share_bytes(ops, param, view):
    storage = torch.zeros(6, 4)
    written, read = param(storage), view(storage)
    written.fill_(1.0)
    shared = bool(read.ne(0).any())
    params, base = [written, torch.zeros(read.shape)], [torch.zeros(written.shape), read]
    tuned = [torch.ones(written.shape), torch.ones(read.shape)]
    refused = pytest.raises(ValueError, match=r"params\[0\] must not share memory with base\[1\]")
    with refused if shared else contextlib.nullcontext():
        ops.topm_subtract_(params, base, tuned, m=1)


def test_a_narrow_view_of_a_large_matrix_is_checked_without_marks(ops, monkeypatch):
    matrix = torch.empty(1024, 1 << 17)  # a mark per byte of its extent would be 512 MB; few of its pages are touched
    first, second = matrix[:, :2].zero_(), matrix[:, 2:4].zero_()
    third = matrix.view(512, 2, 1 << 17)[:, 0, 9].zero_()
    marks = []
    monkeypatch.setattr(_definition, "_marks", marks.append)
    ops.topm_subtract_([first, third], [second, third], [second, third], m=1)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with base\[0\]"):
        ops.topm_subtract_(first, matrix[:, 1:3], second, m=1)
    assert marks == []


def test_steps_that_interlock_are_still_told_apart(ops):
    storage = torch.zeros(12)
    params = storage.as_strided((2, 3), (3, 2))  # 0 2 4, 3 5 7
    ops.topm_subtract_(params, torch.zeros(2, 3), torch.ones(2, 3), density=1.0)
    assert storage.nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 7]


def test_the_stride_of_a_dimension_of_size_one_does_not_make_another_view(ops):
    params = torch.ones(3)
    base = params.as_strided((1, 3), (77, 1))
    ops.topm_subtract_(params.view(1, 3), base, torch.zeros(1, 3), density=1.0)
    assert params.tolist() == [2.0, 2.0, 2.0]


# ---- sparse deltas from a stranger


@pytest.fixture
def delta(ops):
    base, tuned = [torch.zeros(4), torch.zeros(3)], [torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 4.0])]
    return ops.topm_select(base, tuned, m=4)


@pytest.mark.parametrize(("field", "value", "error", "message"), [
    ("indices", torch.tensor([1, 4, 1, 2]), ValueError, r"indices of tensor 0 must be ascending .*\[0, 4\), got 4"),
    ("indices", torch.tensor([-1, 3, 1, 2]), ValueError, r"indices of tensor 0 must be ascending .*got -1"),
    ("indices", torch.tensor([3, 1, 1, 2]), ValueError, r"indices of tensor 0 must be ascending .*got 1"),
    ("indices", torch.tensor([1, 3, 2, 2]), ValueError, r"indices of tensor 1 must be ascending .*\[0, 3\), got 2"),
    ("indices", torch.tensor([1, 3, 1, 2**62]), ValueError, "indices of tensor 1 must be ascending"),
    ("indices", torch.tensor([1, 3, 1, 2], dtype=torch.int32), TypeError, "delta.indices must be torch.int64"),
    ("indices", torch.tensor([[1, 3], [1, 2]]), ValueError, "delta.indices must have one dimension"),
    ("indices", [1, 3, 1, 2], TypeError, "delta.indices must be a tensor"),
    ("indices", torch.zeros(4, dtype=torch.int64, device="meta"), ValueError, "be on the params' device, cpu"),
    ("indices", torch.ones(4).to_sparse(), TypeError, r"delta.indices must be a dense \(strided\) tensor"),
    ("values", torch.tensor([1.0, NAN, 1.0, 1.0]), ValueError, "delta.values of tensor 0 must be finite, got 1"),
    ("values", torch.tensor([1.0, 1.0, 1.0, -INF]), ValueError, "delta.values of tensor 1 must be finite"),
    ("threshold", None, TypeError, "delta.threshold must be a tensor, got None"),
    ("threshold", torch.ones(2, 1), ValueError, "delta.threshold must have one dimension"),
    ("threshold", torch.ones(3), ValueError, r"delta.threshold must have one entry per param \(2\), got 3"),
    ("threshold", torch.ones(2).long(), TypeError, "delta.threshold must be torch.float32 or torch.float64"),
    ("threshold", torch.ones(2, device="meta"), ValueError, "delta.threshold must be on the params' device, cpu"),
    ("shapes", None, TypeError, "delta.shapes must be a tuple of tuples of ints, got None"),
    ("shapes", (4, 3), TypeError, "delta.shapes must be a tuple of tuples of ints"),
    ("dtypes", 7, TypeError, "delta.dtypes must be a tuple of torch.dtypes, got 7"),
    ("dtypes", ("float32", "float32"), TypeError, "delta.dtypes must be a tuple of torch.dtypes"),
    ("values", torch.ones(3), ValueError, r"delta.values must have one entry per index \(4\), got 3"),
    ("values", torch.ones(4, dtype=torch.float16), TypeError, "delta.values must be torch.float32 or torch.float64"),
    ("counts", torch.tensor([2, 1]), ValueError, "counts must sum up to the number of indices, 4, got 3"),
    ("counts", torch.tensor([0, 4]), ValueError, r"delta.counts\[1\] must be in \[0, 3\]"),
    ("counts", torch.tensor([5, -1]), ValueError, r"delta.counts\[0\] must be in \[0, 4\]"),
    ("counts", torch.tensor([4]), ValueError, r"delta.counts must have one entry per param \(2\), got 1"),
    ("shapes", ((4,),), ValueError, "params must be the 1 tensors that were recorded, got 2"),
    ("shapes", ((4,), (1, 3)), ValueError, r"params\[1\] must have the recorded shape \(1, 3\)"),
    ("dtypes", (torch.float32,), ValueError, r"delta.dtypes must have one entry per param \(2\), got 1"),
    ("dtypes", (torch.float32, torch.float64), TypeError, r"delta.dtypes\[1\] must be torch.float32 or the values'"),
], ids=str)  # fmt: skip
def test_a_damaged_delta_is_refused_before_anything_is_written(ops, delta, field, value, error, message):
    params = [torch.zeros(4), torch.zeros(3)]
    with pytest.raises(error, match=message):
        ops.sparse_subtract_(params, dataclasses.replace(delta, **{field: value}))
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("field", ["values", "threshold"])
def test_a_delta_that_lies_in_the_params_is_refused(ops, delta, field):
    params = [torch.ones(4), torch.ones(3)]
    inside = dataclasses.replace(delta, **{field: params[0] if field == "values" else params[0][:2]})
    with pytest.raises(ValueError, match=rf"params\[0\] must not share memory with delta\.{field}"):
        ops.sparse_subtract_(params, inside)
    indices = torch.tensor([1, 3, 1, 2])
    inside = dataclasses.replace(delta, indices=indices)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with delta\.indices"):
        ops.sparse_subtract_([indices.view(torch.float64), torch.ones(3)], inside)


def test_the_edit_keeps_copies_of_what_the_delta_says(ops, delta):
    edit = ops.sparse_subtract_([torch.zeros(4), torch.zeros(3)], delta)
    kept, threshold = edit.kept.clone(), edit.threshold.clone()
    delta.counts.zero_(), delta.threshold.zero_()
    assert torch.equal(edit.kept, kept)
    assert torch.equal(edit.threshold, threshold)


def test_sparse_flags_that_are_no_bools_are_refused(ops, delta):
    with pytest.raises(TypeError, match="undo must be True or False, got 0"):
        ops.sparse_subtract_([torch.zeros(4), torch.zeros(3)], delta, undo=0)


def test_what_is_no_delta_is_refused(ops):
    with pytest.raises(TypeError, match="delta must be a SparseDelta"):
        ops.sparse_subtract_(torch.zeros(3), torch.zeros(3))


def test_sparse_params_of_two_devices_are_refused(ops, delta):
    with pytest.raises(ValueError, match=r"params\[1\] must be on the device of params\[0\], cpu, got meta"):
        ops.sparse_subtract_([torch.zeros(4), torch.zeros(3, device="meta")], delta)


def test_sparse_params_that_share_memory_are_refused(ops, delta):
    storage = torch.zeros(6)
    with pytest.raises(ValueError, match="must not share memory"):
        ops.sparse_subtract_([storage[:4], storage[3:]], delta)
