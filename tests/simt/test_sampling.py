"""The CUDA sampling kernels, run by the harness, draw the tokens of the reference: same laws, same hostile inputs."""

import functools
import itertools
import math
import mmap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prosocial_ext.reference import sampling as definition

from prosocial_ext import ops, reference
from prosocial_ext.ops import _cuda, _cuda_sampling
from prosocial_ext.ops import sampling as public
from tests.asserts import assert_same_bits
from tests.ops.inputs import DTYPES, border_words, logits_cases
from tests.simt.moved import assert_torch_agrees

CASES = logits_cases()
FILTERS = {
    "none": {},
    "top_k_1": {"top_k": 1},
    "top_k_7": {"top_k": 7},
    "top_k_all": {"top_k": 300},
    "top_p": {"top_p": 0.6},
    "top_p_0": {"top_p": 0.0},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "all_three": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
}
NARROW, WIDE = 64, 256  # threads of a block: 512 tokens, 4096 tokens; WIDE is 512 in clusters


@pytest.fixture(params=[False, True], ids=["chunks", "clusters"])
def in_clusters(request, monkeypatch):
    """Force either form of the sampling kernels."""
    monkeypatch.setattr(_cuda_sampling, "in_clusters", request.param)
    return request.param


@pytest.fixture
def cuda(simt, in_clusters, monkeypatch):
    """`prosocial_ext.ops` on the CUDA kernels in the harness; all memory that they get is dirty."""
    monkeypatch.setattr(public, "_sample", _cuda_sampling.sample)
    monkeypatch.setattr(public, "_sample_rows", _cuda_sampling.sample_rows)
    monkeypatch.setattr(public, "_logprobs", _cuda_sampling.logprobs)
    empty, bytes_of_dirt = torch.empty, itertools.cycle([0xA5, 0xFF, 0x01])

    def dirty(*args, **kwargs):
        memory = empty(*args, **kwargs)
        if memory.device.type != "meta" and memory.numel() > 0:
            memory.view(torch.uint8).fill_(next(bytes_of_dirt))
        return memory

    monkeypatch.setattr(torch, "empty", dirty)
    return ops


@pytest.fixture
def block(monkeypatch):
    """Choose the kernels' block size whatever the vocabulary."""
    return lambda threads: monkeypatch.setattr(_cuda_sampling, "block_threads", threads)


@functools.cache
def randn(rows, vocab, scale=1.0, seed=1):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def agrees(cuda, base, guide=None, *, scalar=True, **kwargs):
    """The row op with log-probs, and the scalar op, give the reference's bits."""
    expected, expected_logprobs = reference.guided_sample(base, guide, return_logprobs=True, **kwargs)
    tokens, logprobs = cuda.guided_sample(base, guide, return_logprobs=True, **kwargs)
    assert_same_bits(tokens, expected, "tokens")
    assert_same_bits(logprobs, expected_logprobs, "log-probs")
    if scalar:
        assert_same_bits(cuda.guided_sample(base, guide, **kwargs), expected, "tokens of the scalar op")


# ---- equality with the definition


def mixed_rows(filters, temperatures):
    """Per-row parameters: every filter at every temperature, and greedy."""
    rows = [{"temperature": t, **f} for t in temperatures for f in filters] + [{"temperature": 0.0, "top_k": 3}]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {name: torch.tensor([{**defaults, **row}[name] for row in rows]) for name in defaults}


@functools.cache
def expected_of(name):
    knobs = mixed_rows(FILTERS.values(), (0.3, 1.0, 50.0))
    rows = len(knobs["top_k"])
    base = CASES[name].repeat(rows // 2 + 1, 1)[:rows]
    guide = CASES["normal"].flip(0).repeat(rows // 2 + 1, 1)[:rows]
    kwargs = {"guidance": 0.5, "seed": 11, "offset": 5, "return_logprobs": True, **knobs}
    return base, guide, kwargs, reference.guided_sample(base, guide, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_mixed_filters_agree_with_the_reference(cuda, name):
    base, guide, kwargs, expected = expected_of(name)
    tokens, logprobs = cuda.guided_sample(base, guide, **kwargs)
    assert_same_bits(tokens, expected[0], "tokens")
    assert_same_bits(logprobs, expected[1], "log-probs")


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_scalar_op_agrees_with_the_reference(cuda, filters):
    for name, temperature in itertools.product(("normal", "ties_everywhere", "masked"), (0.0, 0.7)):
        kwargs = {"temperature": temperature, "seed": 3, "offset": 1, **FILTERS[filters]}
        expected = reference.guided_sample(CASES[name], **kwargs)
        assert_same_bits(cuda.guided_sample(CASES[name], **kwargs), expected)


@pytest.mark.parametrize("threads", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 511, 512, 513, 4095, 4096, 4097, 8200])
def test_every_vocabulary_size_agrees_with_the_reference(cuda, block, vocab, threads):
    block(threads)
    knobs = mixed_rows([{}, {"top_k": 5}, {"top_k": 3000}, {"top_p": 0.8}, {"top_k": 60, "top_p": 0.9}], (1.0,))
    agrees(cuda, randn(6, vocab, 4.0, vocab), scalar=False, seed=vocab, **knobs)


def test_a_row_of_more_chunks_than_threads_agrees_with_the_reference(cuda, block):
    block(NARROW)
    base = randn(1, 60_000, 3.0)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        agrees(cuda, base, seed=9, scalar=False, **filters)
    peaked = base.clone()
    peaked[0, 55_000] = 60.0  # all other chunks weigh nothing and are skipped
    agrees(cuda, peaked, seed=9, top_p=0.9)


def test_small_rows_take_small_blocks_and_large_rows_large_ones(simt):
    size = _cuda.launchers.sampling_scratch_bytes
    assert size(1, 2048, True, 0) == size(1, 2048, True, NARROW) != size(1, 2048, True, WIDE)
    assert size(1, 2049, True, 0) == size(1, 2049, True, WIDE) != size(1, 2049, True, NARROW)


CONTRIVED = {
    "sorted_down": torch.linspace(10, -10, 6000),
    "sorted_up": torch.linspace(-10, 10, 6000),
    "all_best": torch.full((8192,), 2.5),
    "a_chunk_of_best": torch.cat([torch.full((4096,), 2.5), torch.linspace(2.4, -5, 2000)]),
    "tie_flood": torch.where(torch.arange(6000) % 7 == 0, 1.0, 0.0),
    "two_values": torch.cat([torch.full((10,), 5.0), torch.zeros(5990)]),
    "one_bin": torch.linspace(0, 1e-3, 9000).flip(0),  # 9000 keys in one bin: three rounds of sums a digit
    "one_bin_below_peaks": torch.cat([torch.linspace(3, 2, 5), torch.linspace(0, 1e-2, 4500)]),
    "ties_in_one_digit": torch.cat([torch.linspace(0.02, 0.01, 9), torch.zeros(6000), torch.full((9,), -0.005)]),
    "decades": -(10.0 ** -torch.linspace(0, 44, 500)),  # keys over all exponents: four digits, six in small blocks
    "steps": torch.arange(900).div(30, rounding_mode="floor") * -1.5,  # across the last bins and beyond
}


@pytest.mark.parametrize("shape", CONTRIVED)
def test_contrived_rows_stay_exact(cuda, block, shape):
    vocab = CONTRIVED[shape].numel()
    counts = [{"top_k": k} for k in (5, vocab // 8, vocab - 1)]
    shares = [{"top_p": p} for p in (0.3, 0.999)]
    both = [{"top_k": 11, "top_p": 0.5}, {"top_k": vocab // 2, "top_p": 0.7, "min_p": 0.01}]
    knobs = mixed_rows(counts + shares + both, (1.0, 1000.0) if vocab < 1000 else (1.0,))
    base = CONTRIVED[shape].expand(len(knobs["top_k"]), vocab)
    agrees(cuda, base, scalar=False, seed=4, **knobs)
    block(NARROW if vocab > 2048 else WIDE)
    agrees(cuda, base[-3:], scalar=False, seed=5, **{name: knob[-3:] for name, knob in knobs.items()})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_finite_logits_agree_with_the_reference(cuda, data):
    vocab = data.draw(st.integers(1, 100))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)
    row = st.lists(floats, min_size=vocab, max_size=vocab)
    base, guide = torch.tensor([data.draw(row)]), torch.tensor([data.draw(row)])
    agrees(
        cuda,
        base,
        guide,
        scalar=False,
        guidance=data.draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])),
        temperature=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3])),
        top_k=data.draw(st.integers(0, vocab + 1)),
        top_p=data.draw(st.floats(0, 1)),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.3])),
        seed=data.draw(st.integers(0, 2**63 - 1)),
    )


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e38], ids=str)
def test_extreme_temperatures_agree_with_the_reference(cuda, temperature):
    for name in ("normal", "masked"):
        agrees(cuda, CASES[name], temperature=temperature, top_p=0.9, seed=2)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", ["normal", "ties_everywhere", "masked"])
def test_the_draw_changes_exactly_at_the_borders_of_the_prefix_sums(cuda, name, filters):
    base = CASES[name][:1, :24].contiguous()
    weights = definition.integer_weights(base, torch.ones(1))[0]
    knobs = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **FILTERS[filters]}
    shares = torch.tensor([knobs["top_p"], knobs["min_p"]]).tolist()
    weights = torch.where(definition.kept_tokens(base[0], weights, knobs["top_k"], *shares), weights, 0)
    words, expected = border_words(weights)
    rows = len(words)
    signed = torch.tensor([w - 2**64 if w >= 2**63 else w for w in words])
    real = [torch.full((rows,), value) for value in (1.0, *shares)]
    whole = [torch.full((rows,), value) for value in (knobs["top_k"], 0, 0)]
    arguments = 24, False, False, *real, torch.empty(rows, 0), *whole
    tokens, _ = _cuda_sampling.sample_rows(base.expand(rows, 24), None, *arguments, words=signed)
    assert tokens.tolist() == expected


# ---- what the logits may be


@pytest.mark.parametrize("guide_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_fp32(cuda, base_dtype, guide_dtype):
    base, guide = (CASES["normal"] * 3).to(base_dtype), CASES["ascending"].to(guide_dtype)
    kwargs = {"guidance": 0.7, "top_p": 0.9, "seed": 3}
    expected = reference.guided_sample(base.float(), guide.float(), **kwargs)
    assert_same_bits(cuda.guided_sample(base, guide, **kwargs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_any_alignment_are_read_with_and_without_vectors(cuda, block, dtype):
    block(NARROW)
    for shift, stride in ((0, 1040), (1, 1040), (0, 1033)):
        memory = randn(1, 4000, 4.0)[0].to(dtype)
        base = memory[shift:].as_strided((2, 1030), (stride, 1))
        expected = reference.guided_sample(base.contiguous(), seed=1, top_p=0.9)
        assert_same_bits(cuda.guided_sample(base, seed=1, top_p=0.9), expected)


@pytest.mark.parametrize("stacked", [1, 2, 3])
def test_stacked_guides_agree_with_the_reference(cuda, stacked):
    guides = torch.stack([CASES["ascending"], CASES["masked"], CASES["peaked"]])[:stacked]
    w = torch.tensor([[0.5, -0.0, 1.0], [1.0, 2.0, -0.25]])[:, :stacked]
    agrees(cuda, CASES["normal"], guides, scalar=False, guidance=w, top_k=100)
    both = guides.transpose(0, 1).contiguous().transpose(0, 1)  # guides next to each other within a row
    agrees(cuda, CASES["normal"], both, guidance=0.25)
    expected = reference.guided_logprobs(CASES["normal"], guides, guidance=w)
    assert_same_bits(cuda.guided_logprobs(CASES["normal"], guides, guidance=w), expected)


def test_strided_logits_are_read_where_they_are(cuda):
    base, guide = randn(28, 300).view(4, 7, 300), randn(300, 4)
    last, transposed = base[:, -1], guide.T
    agrees(cuda, last, transposed, seed=1)
    agrees(cuda, base[0, -1].expand(3, 300), seed=1, top_k=9)


@pytest.mark.usefixtures("on_cpu")  # 4 GB would be moved
def test_rows_further_apart_than_2_to_the_31_elements_are_reached(cuda):
    stride, columns = 2**31 + 64, 128
    memory = mmap.mmap(-1, (stride + columns) * torch.bfloat16.itemsize)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, columns), (stride, 1))
    logits[1, 77] = 50.0
    assert cuda.guided_sample(logits, temperature=0.0).tolist() == [0, 77]
    assert cuda.guided_sample(logits, top_p=0.5, seed=1)[1] == 77


def test_padding_beyond_vocab_size_is_never_drawn_nor_read(cuda):
    base, guide = CASES["normal"], CASES["ascending"]
    padded = torch.cat([base, torch.full((2, 20), math.nan)], 1)
    wider = torch.cat([guide, torch.full((2, 7), math.inf)], 1)
    kwargs = {"seed": 3, "top_p": 0.9}
    expected = reference.guided_sample(base, guide, **kwargs)
    assert_same_bits(cuda.guided_sample(padded, wider, vocab_size=300, **kwargs), expected)
    logprobs = cuda.guided_logprobs(padded, wider, vocab_size=300)
    assert_same_bits(logprobs[:, :300], reference.guided_logprobs(base, guide))
    assert (logprobs[:, 300:] == -math.inf).all()


def test_columns_a_chunk_beyond_the_vocabulary_are_minus_infinity(cuda, block):
    block(NARROW)
    base = randn(2, 1300)
    assert_same_bits(cuda.guided_logprobs(base, vocab_size=500), reference.guided_logprobs(base, vocab_size=500))


def test_an_empty_batch_gives_an_empty_result(cuda):
    tokens, logprobs = cuda.guided_sample(torch.zeros(0, 5), torch.zeros(0, 5), return_logprobs=True)
    assert (tokens.shape, tokens.dtype, logprobs.shape) == ((0,), torch.int64, (0,))
    assert cuda.guided_sample(torch.zeros(0, 5), top_k=2).shape == (0,)
    assert cuda.guided_logprobs(torch.zeros(0, 5)).shape == (0, 5)


def test_inputs_are_not_changed(cuda):
    base, guide = CASES["signed_zeros"].clone(), CASES["masked"].clone()
    cuda.guided_sample(base, guide, top_p=0.5, top_k=9)
    cuda.guided_logprobs(base, guide)
    assert_same_bits(base, CASES["signed_zeros"])
    assert_same_bits(guide, CASES["masked"])


# ---- log-probs of whole rows


@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_those_of_the_reference(cuda, name):
    for guidance, temperature in ((0.0, 1.0), (1.0, 0.3), (-0.5, 2.0)):
        kwargs = {"guidance": guidance, "temperature": temperature}
        expected = reference.guided_logprobs(CASES[name], CASES["normal"], **kwargs)
        assert_same_bits(cuda.guided_logprobs(CASES[name], CASES["normal"], **kwargs), expected)


@pytest.mark.parametrize("threads", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("vocab", [1, 9, 513, 4097])
def test_logprobs_of_every_vocabulary_size(cuda, block, vocab, threads):
    block(threads)
    assert_same_bits(cuda.guided_logprobs(randn(2, vocab)), reference.guided_logprobs(randn(2, vocab)))


def test_logprobs_of_fp64_logits_are_fp64(cuda):
    base, guide = randn(2, 30).double(), CASES["masked"][:, :30]
    for kwargs in ({}, {"guidance": 0.5, "temperature": 0.7, "vocab_size": 20}):
        expected = reference.guided_logprobs(base, guide, **kwargs)
        assert_torch_agrees(cuda.guided_logprobs(base, guide, **kwargs), expected)


# ---- invariances


def test_a_row_does_not_depend_on_its_batch_mates(cuda):
    base = randn(6, 300, 2.0)
    knobs = mixed_rows([{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}], (1.0,))
    seeds, offsets = torch.arange(6) * 7, torch.arange(6)
    together = cuda.guided_sample(base, seed=seeds, offset=offsets, **knobs)
    for row in range(6):
        one = slice(row, row + 1)
        alone = {name: knob[one] for name, knob in knobs.items()}
        assert cuda.guided_sample(base[one], seed=seeds[one], offset=offsets[one], **alone)[0] == together[row]


SETTINGS = {"guidance": 0.3, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3, "offset": 5}


@pytest.mark.parametrize("own", SETTINGS)
def test_any_parameter_may_be_per_row_and_the_others_the_same_in_all(cuda, own):
    """Where they lie: a view of every second value, and one value for all rows on the device."""
    base, guide = CASES["normal"], CASES["ascending"]
    values = torch.tensor([SETTINGS[own], 0, SETTINGS[own] + (1 if isinstance(SETTINGS[own], int) else 0.05)])
    for value in (values[::2], values[0], torch.stack([values, -values], 1)[::2, 1]._neg_view()):
        agrees(cuda, base, guide, **{**SETTINGS, own: value})
    if own in ("guidance", "temperature"):
        kwargs = {"guidance": 0.3, "temperature": 0.9, own: values[::2]}
        expected = reference.guided_logprobs(base, guide, **kwargs)
        assert_same_bits(cuda.guided_logprobs(base, guide, **kwargs), expected)


def test_strengths_of_stacked_guides_may_be_per_row_or_per_guide_or_one(cuda):
    guides = torch.stack([CASES["ascending"], CASES["peaked"]])
    own = torch.tensor([[0.5, 0.0, -0.5], [1.0, 0.0, 0.25]])[:, ::2]  # not next to each other
    for guidance in (own, own.T.contiguous().T, own[0], torch.tensor(0.5), 0.5):
        agrees(cuda, CASES["normal"], guides, guidance=guidance, top_p=0.9)
    agrees(cuda, CASES["normal"][:1], guides[:, :1], guidance=own[:1], top_p=0.9)


def test_scalars_equal_filled_tensors(cuda):
    scalars = {"guidance": 0.3, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    tensors = {name: torch.tensor([value, value]) for name, value in scalars.items()}
    base, guide = CASES["normal"], CASES["ascending"]
    expected = cuda.guided_sample(base, guide, seed=3, **scalars)
    assert_same_bits(cuda.guided_sample(base, guide, seed=3, **tensors), expected)


def test_guidance_zero_does_not_read_the_guide(cuda):
    base, guide = CASES["normal"], torch.full((2, 300), math.nan)
    agrees(cuda, base, guide, guidance=0.0, seed=1)
    assert_same_bits(cuda.guided_logprobs(base, guide, guidance=0.0), reference.guided_logprobs(base))


def test_scratch_of_an_earlier_call_may_be_used_again(cuda, block, monkeypatch):
    kept = {}

    def scratch(base, vocab, filters):
        return kept.setdefault(base.device, torch.full((4 << 20,), 0xFF, dtype=torch.uint8, device=base.device))

    monkeypatch.setattr(_cuda_sampling, "_scratch", scratch)
    for repeat, (rows, vocab, threads) in enumerate([(3, 700, NARROW), (2, 5000, WIDE), (5, 60, NARROW)] * 2):
        block(threads)
        base = randn(rows, vocab, 3.0, repeat)
        agrees(cuda, base, seed=repeat, top_k=20, top_p=0.9)
        assert_same_bits(cuda.guided_logprobs(base), reference.guided_logprobs(base))


def launches(simt, call):
    before = simt.counts()["launches"]
    call()
    return simt.counts()["launches"] - before


def test_chunks_take_two_launches_and_three_with_threshold_filters_clusters_one(simt, cuda, in_clusters):
    base = CASES["normal"]
    for kwargs in ({}, {"temperature": 0.0, "top_k": 5}, {"min_p": 0.1}, {"top_k": 300}):
        assert launches(simt, lambda kwargs=kwargs: cuda.guided_sample(base, **kwargs)) == (1 if in_clusters else 2)
    rows = torch.ones(2)
    for kwargs in ({"vocab_size": 300}, {"guidance": rows, "top_k": 300}, {"temperature": 0.0, "top_p": 0.5},
                   {"temperature": 0.0, "top_p": 0.5, "seed": rows.long()}):  # fmt: skip
        count = launches(simt, lambda kwargs=kwargs: cuda.guided_sample(base, base, **kwargs))
        assert count == (1 if in_clusters else 2)
    for kwargs in ({"top_p": 0.9}, {"return_logprobs": True}, {"top_p": rows}, {"top_k": rows.long()},
                   {"temperature": rows, "top_k": 9}):  # fmt: skip
        assert launches(simt, lambda kwargs=kwargs: cuda.guided_sample(base, **kwargs)) == (1 if in_clusters else 3)
    assert launches(simt, lambda: cuda.guided_logprobs(base)) == 3


def test_clusters_are_taken_where_a_row_fits_their_shared_memory(simt, cuda, monkeypatch):
    fits = _cuda.launchers.sampling_fits_cluster
    assert fits(1, 0, 0)
    assert fits(128_256, 0, 0)
    assert fits(262_144, 0, 0)
    assert not fits(1 << 20, 0, 0)
    monkeypatch.setattr(_cuda_sampling, "in_clusters", None)
    assert launches(simt, lambda: cuda.guided_sample(CASES["normal"], top_k=7)) == 1
    monkeypatch.setattr(_cuda_sampling, "_fits_cluster", lambda launchers, vocab, threads, device: False)
    assert launches(simt, lambda: cuda.guided_sample(CASES["normal"], top_k=7)) == 3


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", ["normal", "ties_everywhere", "masked"])
def test_rows_of_nine_reads_agree_with_the_reference(cuda, block, name, filters):
    block(NARROW)
    base = CASES[name].repeat(1, 15)[:, :4400] + torch.linspace(0, 3, 4400)  # three of eight blocks have none
    agrees(cuda, base, scalar=False, seed=5, **FILTERS[filters])


# ---- rows that have no answer


def test_the_base_masks_whatever_the_guides_say(cuda):
    base = torch.tensor([[0.0, -math.inf, 1.0]])
    for bad, w in itertools.product((math.nan, math.inf, -math.inf, 5.0), (1.0, -1.0)):
        logprobs = cuda.guided_logprobs(base, torch.tensor([[0.0, bad, 0.0]]), guidance=w)
        assert_same_bits(logprobs, reference.guided_logprobs(base))


def refused(rows, op):
    """The op row by row: a list of its results, None for rows that it refuses."""

    def one(row):
        try:
            return op(**{name: value[..., row, :] if value.dim() > 1 else value[row] for name, value in rows.items()})
        except ValueError:
            return None

    return [one(slice(row, row + 1)) for row in range(len(rows["guidance"]))]


@functools.cache
def special_rows(guides, dtype):
    """128 rows of 24 tokens, a few of which have special values in base and guides, in all mixtures."""
    generator = torch.Generator().manual_seed(guides)

    def pick(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    logits = torch.randn(1 + guides, 128, 24, generator=generator)
    for _ in range(3):
        token = torch.randint(24, (128, 1), generator=generator).expand(1 + guides, 128, 1)
        values = torch.stack(
            [pick([-math.inf, -math.inf, -math.inf, 2.0, -0.0, 0.0], 128)]
            + [pick([math.inf, -math.inf, math.nan, 2.0, -0.0, 0.0], 128) for _ in range(guides)]
        )
        logits = logits.scatter(2, token, values[..., None])
    rows = {"base_logits": logits[0].to(dtype), "guide_logits": logits[1:].to(dtype)}
    return {**rows, "guidance": pick([1.0, 0.5, -1.0, 0.0], 128, guides)}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("guides", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16), (3, torch.float32)]
)
def test_special_values_mask_or_flag_as_in_the_reference(cuda, guides, dtype, filters):
    rows = special_rows(guides, dtype)
    expected = refused(rows, functools.partial(reference.guided_sample, return_logprobs=True, **FILTERS[filters]))
    assert 30 < sum(row is None for row in expected) < 100
    tokens, logprobs = cuda.guided_sample(
        **rows, return_logprobs=True, **FILTERS[filters], seed=torch.zeros(128).long()
    )
    missing = torch.tensor([-1]), torch.tensor([math.nan])
    assert_same_bits(tokens, torch.cat([(row or missing)[0] for row in expected]), "tokens")
    assert_same_bits(logprobs, torch.cat([(row or missing)[1] for row in expected]), "log-probs")


@pytest.mark.parametrize(("guides", "dtype"), [(1, torch.bfloat16), (2, torch.bfloat16), (3, torch.float32)])
def test_log_probs_of_special_values_are_those_of_the_reference(cuda, guides, dtype):
    rows = special_rows(guides, dtype)
    expected = refused(rows, reference.guided_logprobs)
    missing = torch.full((1, 24), math.nan)
    expected = torch.cat([missing if row is None else row for row in expected])
    assert_same_bits(cuda.guided_logprobs(**rows), expected)


def test_the_log_prob_of_a_lone_minus_zero_is_plus_zero(cuda):
    base = torch.full((1, 16), -math.inf, dtype=torch.bfloat16)
    base[0, 5] = -0.0
    for guide, w in ((-0.0, 1.0), (0.0, -1.0), (0.0, 0.0)):  # z is -0 in all
        guides = torch.full((1, 16), guide, dtype=torch.bfloat16)
        for kwargs in ({}, {"top_p": 0.5}, {"temperature": 0.0}):
            agrees(cuda, base, guides, guidance=w, **kwargs)
        assert_same_bits(cuda.guided_logprobs(base, guides, guidance=w)[0, 5], torch.tensor(0.0))


def test_tokens_of_minus_and_plus_zero_are_tied(cuda):
    base = torch.tensor([[0.0, -0.0] * 8]).bfloat16()
    guide, seeds = torch.full((64, 16), -0.0).bfloat16(), torch.arange(64)  # z is 0 and -0
    for kwargs in ({"top_k": 1}, {"top_k": 9}, {"top_p": 0.1}, {"temperature": 0.0}):
        agrees(cuda, base.expand(64, 16), guide, scalar=False, seed=seeds, **kwargs)
    assert set(cuda.guided_sample(base.expand(64, 16), guide, seed=seeds, top_k=1).tolist()) > {0, 1}


def test_sums_of_large_logits_do_not_flag_a_row(cuda):
    """The check for NaN adds logits up: here to infinity, then with a masked token to NaN."""
    base = torch.tensor([[3e38, 2.9e38, 3e38, -math.inf, 0.0, -3e38, -3e38, -3e38]]).bfloat16()
    agrees(cuda, base, torch.zeros(1, 8).bfloat16(), top_p=0.9)


@pytest.mark.parametrize("threads", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rows_with_a_guide_agree_with_the_reference(cuda, block, dtype, threads):
    block(threads)
    for vocab in (8, 520, 4100, 4104, 8200):  # whole and broken groups, rows that are aligned and not
        base, guide = (randn(2, vocab, 3.0, seed).to(dtype) for seed in (vocab, vocab + 1))
        base[:, ::5], guide[:, 1::7] = -math.inf, -math.inf
        for filters in ({}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}):
            agrees(cuda, base, guide, guidance=0.7, seed=vocab, **filters)
        expected = reference.guided_logprobs(base, guide, guidance=0.7)
        assert_same_bits(cuda.guided_logprobs(base, guide, guidance=0.7), expected)


BAD_ROWS = {
    "nan_base": ([0.0, math.nan], [0.0, 0.0], 1.0),
    "negative_nan_base": ([0.0, -math.nan], [0.0, 0.0], 1.0),
    "infinite_base": ([0.0, math.inf], [0.0, 0.0], 1.0),
    "nan_guide": ([0.0, 0.0], [math.nan, 0.0], 1.0),
    "infinite_guide": ([0.0, 0.0], [math.inf, 0.0], 1.0),
    "overflow": ([3e38, 0.0], [3e38, 0.0], 1.0),
    "negative_guidance_on_minus_infinity": ([0.0, 0.0], [-math.inf, 0.0], -1.0),
    "negative_guidance_on_infinity": ([0.0, 0.0], [math.inf, 0.0], -1.0),
    "nothing_left": ([-math.inf, 0.0], [0.0, -math.inf], 1.0),
    "all_masked": ([-math.inf, -math.inf], [0.0, 0.0], 1.0),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_a_distribution_is_flagged_and_costs_no_other_row(cuda, name):
    base, guide, w = BAD_ROWS[name]
    base, guide = torch.tensor([[0.0, 1.0], base, [2.0, 0.5]]), torch.tensor([[0.0, 0.0], guide, [0.0, 1.0]])
    good = torch.tensor([0, 2])
    for filters in ({}, {"top_k": 1}, {"top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}):
        kwargs = {"guidance": w, "seed": torch.arange(3), **filters}
        tokens, logprobs = cuda.guided_sample(base, guide, return_logprobs=True, **kwargs)
        expected = reference.guided_sample(
            base[good], guide[good], return_logprobs=True, **{**kwargs, "seed": torch.tensor([0, 2])}
        )
        assert_same_bits(tokens[good], expected[0])
        assert_same_bits(logprobs[good], expected[1])
        assert tokens[1] == -1
        assert logprobs[1].isnan()
        assert cuda.guided_sample(base, guide, guidance=w, **filters)[1] == -1
        for result in (tokens, (tokens, logprobs)):
            with pytest.raises(ValueError, match="row 1 must have a finite result"):
                cuda.raise_if_bad(result)
    for wide in (False, True):
        rows = base.double() if wide and name != "overflow" else base  # fp64 holds 6e38
        table = cuda.guided_logprobs(rows, guide, guidance=w)
        expected = reference.guided_logprobs(rows[good], guide[good], guidance=w)
        assert table[1].isnan().all()
        (assert_torch_agrees if wide else assert_same_bits)(table[good], expected)


BAD_KNOBS = {
    "temperature": (-1.0, math.inf, math.nan),
    "top_p": (1.5, -0.5, math.nan),
    "min_p": (-0.1, 1.5, math.nan),
    "top_k": (-1,),
    "guidance": (math.nan, math.inf, -math.inf),
    "seed": (-1,),
    "offset": (-3,),
}


@pytest.mark.parametrize("name", BAD_KNOBS)
def test_a_parameter_out_of_range_flags_its_row(cuda, name):
    good = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "top_k": 20, "guidance": 0.5, "seed": 3, "offset": 2}
    base, guide = CASES["normal"], CASES["ascending"]
    expected = reference.guided_sample(base, guide, **{**good, "seed": torch.tensor([3, 3])})
    for bad in BAD_KNOBS[name]:
        rows = {key: torch.tensor([value, bad if key == name else value]) for key, value in good.items()}
        tokens, logprobs = cuda.guided_sample(base, guide, return_logprobs=True, **rows)
        assert tokens.tolist() == [expected[0], -1]
        assert logprobs.isnan().tolist() == [False, True]
        if name not in ("top_k", "guidance", "seed", "offset"):  # where a scalar is, Python refuses it
            assert cuda.guided_sample(base, guide, **{**good, name: bad}).tolist() == [-1, -1]
        if name in ("temperature", "guidance"):
            heat = {key: rows[key] for key in ("temperature", "guidance")}
            assert cuda.guided_logprobs(base, guide, **heat).isnan().all(-1).tolist() == [False, True]


def test_logprobs_at_temperature_zero_are_flagged(cuda):
    for dtype in (torch.float32, torch.float64):
        table = cuda.guided_logprobs(CASES["normal"].to(dtype), temperature=torch.tensor([0.0, 1.0]))
        assert table.isnan().all(-1).tolist() == [True, False]
