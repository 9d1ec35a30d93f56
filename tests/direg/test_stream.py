"""The kernels of the streamed harm vector against the torch code that says what they do, on every instruction set."""

from itertools import product

import pytest
import torch
from torch import Tensor

from prosocial_ext import _C, reference
from prosocial_ext.direg.cut import Cut, find_cut, keys
from prosocial_ext.direg.positions import bits_of, decode_gaps, encode_gaps, gap_bytes, positions_of
from prosocial_ext.ops import _stream as stream
from tests.asserts import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 31, 32, 33, 1023, 1025, 16_384, 16_385, 50_001)

pytestmark = pytest.mark.usefixtures("compiled")


def drawn(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small multiples of a power of two: full of ties, zeros of both signs and denormals of the 16-bit types."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-40, 40, (n,), generator=generator) * 2.0**-22).to(dtype)


# ---- one look at a chunk


@pytest.mark.parametrize("n", [0, 1, 33, 1025, 16_384, 40_001])
@pytest.mark.parametrize("weighted", [False, True], ids=["magnitude", "importance"])
@pytest.mark.parametrize(("one", "other"), list(product(DTYPES, DTYPES)), ids=str)
def test_a_look_finds_what_torch_finds(one: torch.dtype, other: torch.dtype, weighted: bool, n: int) -> None:
    base, tuned = drawn(n, one, 0), drawn(n, other, 1)
    importance = drawn(n, torch.float32, 2).abs() if weighted else None
    wide = torch.float64 in (one, other)
    dtype = torch.float64 if wide else torch.float32
    values = tuned.to(dtype) - base.to(dtype)
    scores = values if importance is None else values * importance.to(dtype)
    ranks, total = keys(scores, wide), words(base)
    middle = int(ranks.sort().values[n // 2]) if n else 1
    for key, index in (
        (0, -1),
        (middle, -1),
        (middle, n // 3),
        (middle, 1 << 62),
        (int(ranks.max()) + 1 if n else 1, 5),
    ):
        collector = stream.Collector(wide)
        edge = stream.Edge(key, index, wide)
        looked = collector.look(base, tuned, importance, dtype, edge)
        held = (ranks > key) | (ranks == key) & (torch.arange(n) <= index)
        assert torch.equal(looked.offsets, held.nonzero().flatten().int())
        assert_same_bits(looked.values, values[held])
        if looked.effects is not None:
            assert_same_bits(looked.effects, scores[held])
            assert looked.effect == float(scores.double().abs().sum())
        digits = keys(values, wide) >> (48 if wide else 16)
        assert torch.equal(collector.histogram, torch.bincount(digits, minlength=1 << 16))
        assert looked.energy == float(values.double().square().sum())  # few bits each: exact in any order
        assert (looked.bad_values, looked.bad_weights, looked.bad_effects) == (0, 0, 0)
        assert looked.word_sum == total


@pytest.mark.parametrize("wide", [False, True])
def test_differences_are_looked_at_as_they_are_and_ranked_as_asked(wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    values, importance = drawn(5000, dtype, 0), drawn(5000, torch.bfloat16, 1).abs()
    for by_effect, scores in ((True, values * importance.to(dtype)), (False, values)):
        ranks = keys(scores, wide)
        edge = stream.Edge(int(ranks.sort().values[2500]), 1234, wide)
        looked = stream.Collector(wide).look(None, values, importance, dtype, edge, by_effect)
        held = (ranks > edge.key) | (ranks == edge.key) & (torch.arange(5000) <= 1234)
        assert torch.equal(looked.offsets, held.nonzero().flatten().int())
        assert looked.effects is not None
        assert_same_bits(looked.values, values[held])
        assert_same_bits(looked.effects, (values * importance.to(dtype))[held])
        assert looked.word_sum == 0


def words(elements: Tensor) -> int:
    raw = elements.contiguous().view(torch.uint8)
    whole = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
    return int(whole.sum()) % 2**64  # sums of int64 wrap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_word_sums_begin_anywhere(dtype: torch.dtype, offset: int) -> None:
    elements = drawn(1001, dtype, 0)[offset:]
    assert stream.word_sum(elements) == words(elements)


def test_the_energy_has_the_same_bits_for_every_instruction_set() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(100_003, generator=generator), torch.randn(100_003, generator=generator)
    found, isa = set(), _C.isa()
    for name in _C.available_isas():
        _C._set_isa(name)
        collector = stream.Collector(False)
        found.add(collector.look(base, tuned, None, torch.float32, stream.EVERYTHING).energy)
    _C._set_isa(isa)
    assert len(found) == 1
    assert found.pop() == pytest.approx(float((tuned - base).double().square().sum()), rel=1e-13)


def test_narrow_values_among_wide_keys() -> None:
    """A float32 tensor of a stream that also has float64 ones; the edge may be that of a narrow group."""
    base, tuned = torch.zeros(1000), drawn(1000, torch.float32, 0)
    key = int(keys(tuned, False).sort().values[500])
    collector = stream.Collector(True)
    looked = collector.look(base, tuned, None, torch.float32, stream.Edge(key, 200, False))
    held = (keys(tuned, False) > key) | (keys(tuned, False) == key) & (torch.arange(1000) <= 200)
    assert torch.equal(looked.offsets, held.nonzero().flatten().int())
    assert torch.equal(collector.histogram, torch.bincount(keys(tuned, True) >> 48, minlength=1 << 16))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("n", [5, 20_000])
def test_what_is_not_finite_is_counted(wide: bool, n: int) -> None:
    dtype = torch.float64 if wide else torch.float32
    largest = torch.finfo(dtype).max
    base, tuned, weights = torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype)
    collector = stream.Collector(wide)

    def counts() -> tuple[int, int, int]:
        looked = collector.look(base, tuned, weights, dtype, stream.EVERYTHING)
        return looked.bad_values, looked.bad_weights, looked.bad_effects

    assert counts() == (0, 0, 0)
    weights[0], weights[n - 1] = -1, -0.0
    assert counts() == (0, 1, 0)
    weights[0], tuned[0] = largest, 2
    assert counts() == (0, 0, 1)
    tuned[0], tuned[1], weights[0] = torch.inf, torch.nan, 1
    assert counts()[:2] == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_all_finite_sees_every_place(dtype: torch.dtype, bad: float) -> None:
    for n, place in ((1, 0), (67, 66), (67, 3)):
        values = torch.full((n,), torch.finfo(dtype).max, dtype=dtype)
        assert stream.all_finite(values)
        values[place] = bad
        assert not stream.all_finite(values)


# ---- entries


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.float32, True), (torch.float64, True)])
def test_a_cut_keeps_what_it_holds(dtype: torch.dtype, wide: bool, n: int) -> None:
    scores, values = drawn(n, dtype, 0), drawn(n, dtype, 1)
    offsets = torch.arange(n, dtype=torch.int32) * 3
    positions = offsets.long() + 2**40
    for m in {0, n // 7, n}:
        cut = find_cut(lambda: [(1, positions, scores)], m, wide)
        held = cut.holds(scores, 1, positions)
        assert int(held.sum()) == m
        candidates = stream.Candidates(2**40, offsets, values, scores, scores)
        kept = candidates.keep(cut.edge(1, 2**40), stream.Buffers())
        assert torch.equal(kept[0], positions[held])
        assert_same_bits(kept[1], values[held])
        found = candidates.measure(cut.edge(1, 2**40))
        assert found.held == m
        assert (found.first, found.last) == ((int(kept[0][0]), int(kept[0][-1])) if m else (0, -1))
        assert found.gap_bytes == (gap_bytes(kept[0][1:], int(kept[0][0])) if m else 0)
        assert found.energy == float(values[held].double().square().sum())  # few bits each: exact in any order
        assert found.effect == float(scores[held].double().abs().sum())
        order = torch.sort(keys(scores, wide), descending=True, stable=True).indices[:m]
        assert torch.equal(positions[held], positions[order].sort().values)
        for tensor in (0, 2):  # before and after the cut's
            mask = cut.holds(scores, tensor, positions)
            there = stream.Candidates(0, offsets, values, scores).keep(cut.edge(tensor), stream.Buffers())
            assert torch.equal(there[0], offsets[mask].long())


def test_long_gaps_between_candidates_are_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, 2**31 - 1, (5000,), generator=generator).unique().to(torch.int32)
    values = torch.ones(len(offsets))
    found = stream.Candidates(7, offsets, values, values).measure(stream.EVERYTHING)
    assert found.gap_bytes == gap_bytes(offsets[1:].long(), int(offsets[0]))
    assert (found.held, found.first, found.last) == (len(offsets), 7 + int(offsets[0]), 7 + int(offsets[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_squares_are_added(dtype: torch.dtype, n: int) -> None:
    values = drawn(n, dtype, 0)
    assert stream.sum_squares(values) == float(values.double().square().sum())


@pytest.mark.parametrize("wide", [False, True])
def test_digits_below_a_prefix_are_counted(wide: bool) -> None:
    scores = torch.randn(1001, dtype=torch.float64 if wide else torch.float32)
    prefix = 0
    for rounds in range(4 if wide else 2):
        shift = (48 if wide else 16) - 16 * rounds
        ranks = keys(scores, wide)
        of_prefix = ranks[(ranks >> (shift + 16)) == (prefix >> (shift + 16))] if rounds else ranks
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        stream.add_digits(histogram, scores, wide, prefix, rounds)
        assert torch.equal(histogram, torch.bincount(of_prefix >> shift & 0xFFFF, minlength=1 << 16))
        prefix |= int(histogram.argmax()) << shift
    first = int((keys(scores, wide) == prefix).nonzero()[0])
    assert stream.find_ties(scores, wide, prefix, most=1) == (1, first)
    assert stream.find_ties(scores, wide, prefix ^ 1, most=1)[0] == int((keys(scores, wide) == prefix ^ 1).any())


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
@pytest.mark.parametrize(("dtype", "real"), list(product(DTYPES, (torch.float32, torch.float64))), ids=str)
def test_a_subtraction_has_the_bits_of_the_op(dtype: torch.dtype, real: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 9, 40_000):
        elements = torch.randn(n, generator=generator).to(dtype)
        positions = torch.randperm(n, generator=generator)[: max(1, n // 3)].sort().values
        values = torch.randn(len(positions), generator=generator, dtype=real) * 1e-3
        theirs, before = elements.clone(), elements[positions]
        delta = reference.SparseDelta(positions, values, torch.tensor([len(positions)]), values[:1], ((n,),), (real,))
        edit = reference.sparse_subtract_(theirs, delta, scale=scale)
        done = stream.subtract_(elements, 2**33, positions + 2**33, values, scale, stream.Buffers())
        assert_same_bits(elements, theirs)
        assert_same_bits(done.before, before)
        assert done.unchanged == int(edit.unchanged.sum())
        assert done.smallest == float(values.abs().min())
        moved = theirs[positions].double() - before.double()
        assert done.requested == pytest.approx(float((values.double() * scale).square().sum()), rel=1e-12)
        assert done.effective == pytest.approx(float(moved.square().sum()), rel=1e-12)


# ---- positions


@pytest.mark.parametrize("spread", [1, 2, 100, 300, 20_000, 2**38])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_gaps_are_leb128_and_come_back(spread: int, n: int) -> None:
    steps = torch.randint(1, spread + 1, (n,), generator=torch.Generator().manual_seed(n))
    positions = steps.cumsum(0) + 4
    plain = []
    for gap in torch.diff(positions, prepend=torch.tensor([0])).sub(1).tolist():
        while gap >= 128:
            plain.append(gap & 127 | 128)
            gap >>= 7
        plain.append(gap)
    encoded = encode_gaps(positions, 0)
    assert encoded.tolist() == plain
    assert gap_bytes(positions, 0) == len(plain)
    for most in {n, n // 2}:
        decoded, used, inside = decode_gaps(encoded, most, 0, 2**48)
        assert decoded.tolist() == positions[:most].tolist()
        assert inside
        assert used == len(encode_gaps(positions[:most], 0))


def test_a_gap_that_the_block_cuts_off_is_left() -> None:
    encoded = torch.tensor([3, 200, 200, 1], dtype=torch.uint8)
    for size, used in ((0, 0), (1, 1), (2, 1), (3, 1), (4, 4)):
        decoded, found, _ = decode_gaps(encoded[:size], 9, -1, 2**48)
        assert (found, len(decoded)) == (used, min(size, 1) + (used == 4))


def test_positions_out_of_range_are_told_wherever_they_are() -> None:
    for n in (1, 8, 9, 30):
        encoded = torch.zeros(n, dtype=torch.uint8)
        assert decode_gaps(encoded, n, -1, n)[2]
        assert not decode_gaps(encoded, n, -1, n - 1)[2]
    largest = torch.tensor(([255] * 6 + [127]) * 40_000, dtype=torch.uint8)  # the sum passes 2^63
    assert not decode_gaps(largest, 40_000, -1, 2**48)[2]


@pytest.mark.parametrize("length", [7, 8, 20])
def test_gaps_of_more_than_seven_bytes_are_refused(length: int) -> None:
    hostile = torch.full((length,), 128, dtype=torch.uint8)
    with pytest.raises(OverflowError):
        decode_gaps(hostile, 5, -1, 2**48)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits_come_back(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    bitmap = torch.randint(256, (count,), generator=generator).to(torch.uint8)
    marks = (bitmap[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    positions = positions_of(bitmap, 8 * 5)
    assert positions.tolist() == (marks.nonzero().flatten() + 40).tolist()
    assert torch.equal(bits_of(positions, 40, count), bitmap)


@pytest.mark.parametrize("first", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("n", [1, 6, 8, 9, 16, 63, 1000])
def test_runs_without_a_gap_are_bits_too(first: int, n: int) -> None:
    positions = torch.arange(first, first + n) + 80
    bitmap = bits_of(positions, 80, -(-(first + n) // 8))
    assert positions_of(bitmap, 80).tolist() == positions.tolist()


def test_the_cut_of_nothing_holds_nothing() -> None:
    values = torch.tensor([3e38, 0.0])
    cut = Cut((1 << 31) - 1, -1, -1, False)
    candidates = stream.Candidates(0, torch.tensor([0, 1], dtype=torch.int32), values, values)
    assert len(candidates.keep(cut.edge(0), stream.Buffers())[0]) == 0
