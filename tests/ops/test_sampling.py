"""Laws of guided_sample and guided_logprobs, over the reference and every instruction set."""

import math
import mmap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prosocial_ext.reference import philox, sampling
from scipy.stats import chi2
from torch.autograd import forward_ad

from prosocial_ext import _C, reference
from prosocial_ext.ops import _native
from tests.asserts import assert_same_bits
from tests.ops.inputs import DTYPES, border_words, logits_cases

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


def case(name):
    return CASES[name].clone()


# ---- equality with the definition


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_token_and_its_logprob_are_those_of_the_reference(compiled, name, filters):
    base, guide = case(name), case("normal").flip(0)
    for temperature in (0.0, 0.3, 1.0, 50.0):
        kwargs = {"guidance": 0.5, "temperature": temperature, "seed": 11, "offset": 5, **FILTERS[filters]}
        expected, expected_logprob = reference.guided_sample(base, guide, return_logprobs=True, **kwargs)
        token, logprob = compiled.guided_sample(base, guide, return_logprobs=True, **kwargs)
        assert_same_bits(token, expected, "token")
        assert_same_bits(logprob, expected_logprob, "log-prob")
        assert_same_bits(compiled.guided_sample(base, guide, **kwargs), expected, "token of the scalar op")


@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_those_of_the_reference(compiled, name):
    for guidance, temperature in ((0.0, 1.0), (1.0, 0.3), (-0.5, 2.0)):
        kwargs = {"guidance": guidance, "temperature": temperature}
        expected = reference.guided_logprobs(case(name), case("normal"), **kwargs)
        assert_same_bits(compiled.guided_logprobs(case(name), case("normal"), **kwargs), expected)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 4095, 4096, 4097, 12289])
def test_every_vocabulary_size_agrees_with_the_reference(compiled, vocab):
    base = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    for filters in ({}, {"top_k": 5}, {"top_k": 3000}, {"top_p": 0.8}, {"min_p": 0.1}):
        kwargs = {"seed": vocab, "return_logprobs": True, **filters}
        for actual, expected in zip(
            compiled.guided_sample(base, **kwargs), reference.guided_sample(base, **kwargs), strict=True
        ):
            assert_same_bits(actual, expected)
    assert_same_bits(compiled.guided_logprobs(base), reference.guided_logprobs(base))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_finite_logits_agree_with_the_reference(compiled, data):
    vocab = data.draw(st.integers(1, 200))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)
    row = st.lists(floats, min_size=vocab, max_size=vocab)
    base, guide = torch.tensor([data.draw(row)]), torch.tensor([data.draw(row)])
    kwargs = {
        "guidance": data.draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])),
        "temperature": data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3])),
        "top_k": data.draw(st.integers(0, vocab + 1)),
        "top_p": data.draw(st.floats(0, 1)),
        "min_p": data.draw(st.sampled_from([0.0, 0.0, 0.3])),
        "seed": data.draw(st.integers(0, 2**63 - 1)),
        "return_logprobs": True,
    }
    expected = reference.guided_sample(base, guide, **kwargs)
    for actual, wanted in zip(compiled.guided_sample(base, guide, **kwargs), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("guide_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_fp32(ops, base_dtype, guide_dtype):
    base, guide = (case("normal") * 3).to(base_dtype), (case("ascending")).to(guide_dtype)
    kwargs = {"guidance": 0.7, "top_p": 0.9, "seed": 3}
    expected = ops.guided_sample(base.float(), guide.float(), **kwargs)
    assert_same_bits(ops.guided_sample(base, guide, **kwargs), expected)


def test_a_large_row_takes_the_same_token_in_every_split_over_threads(compiled):
    base = torch.randn(5, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    before = torch.get_num_threads()
    for filters in ({}, {"top_k": 50, "top_p": 0.9}, {"top_k": 30_000}, {"top_p": 0.95}, {"min_p": 0.05}):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compiled.guided_sample(base, seed=9, return_logprobs=True, **filters))
        torch.set_num_threads(before)
        expected = reference.guided_sample(base, seed=9, return_logprobs=True, **filters)
        for tokens, logprobs in results:
            assert_same_bits(tokens, expected[0])
            assert_same_bits(logprobs, expected[1])


@pytest.mark.parametrize("shape", ["sorted_down", "sorted_up", "tie_flood", "two_values", "periodic"])
def test_contrived_rows_leave_the_shortcuts_and_stay_exact(compiled, shape):
    vocab = 20_000
    base = {
        "sorted_down": torch.linspace(10, -10, vocab),
        "sorted_up": torch.linspace(-10, 10, vocab),
        "tie_flood": torch.where(torch.arange(vocab) % 7 == 0, 1.0, 0.0),
        "two_values": torch.cat([torch.full((10,), 5.0), torch.zeros(vocab - 10)]),
        "periodic": torch.sin(torch.arange(vocab) * math.pi / 9) * 4,  # in step with a strided sample
    }[shape][None]
    for filters in ({"top_k": 5}, {"top_k": 2500}, {"top_k": 19_999}, {"top_p": 0.3}, {"top_p": 0.999}, {"min_p": 0.5}):
        for temperature in (0.2, 1.0, 1000.0):
            kwargs = {"seed": 4, "temperature": temperature, **filters}
            assert_same_bits(compiled.guided_sample(base, **kwargs), reference.guided_sample(base, **kwargs))


def test_flush_denormal_changes_nothing(compiled):
    base, guide = case("denormal"), case("denormal").flip(0)
    kwargs = {"guidance": 0.5, "temperature": 1e-41 * 2**10, "seed": 2}
    expected = reference.guided_logprobs(base, guide, guidance=0.5)
    tokens = reference.guided_sample(base, guide, **kwargs)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        actual = compiled.guided_logprobs(base, guide, guidance=0.5)
        drawn = compiled.guided_sample(base, guide, **{**kwargs, "temperature": torch.tensor(kwargs["temperature"])})
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)
    assert drawn.shape == tokens.shape


# ---- the distribution


def draw_with_words(base, words, **knobs):
    """Draw row 0 of ``base`` once per 64-bit word, through the compiled kernel."""
    rows, vocab = len(words), base.shape[1]
    values = [knobs.get("temperature", 1.0), knobs.get("top_p", 1.0), knobs.get("min_p", 0.0)]
    knob = torch.tensor([values] * rows, dtype=torch.float32)
    counters = torch.tensor([[knobs.get("top_k", 0), 0, 0]] * rows)
    signed = torch.tensor([w - 2**64 if w >= 2**63 else w for w in words])
    tokens, threads = torch.empty(rows, dtype=torch.int64), torch.get_num_threads()
    scratch = torch.empty(_C.sampling_scratch_bytes(vocab, threads), dtype=torch.uint8)
    view = (base.data_ptr(), _native.DTYPE_TAG[base.dtype], 0, 0)
    args = (view, (0, 0, 0, 0), 0, rows, vocab, knob.data_ptr(), counters.data_ptr(), False, tokens.data_ptr(), 0)
    assert _C.guided_sample_rows(*args, scratch.data_ptr(), threads, signed.data_ptr()) == 0
    return tokens.tolist()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", ["normal", "peaked", "ties_everywhere", "masked"])
def test_the_draw_changes_exactly_at_the_borders_of_the_prefix_sums(compiled, name, filters):
    base = case(name)[:1, :24].contiguous()
    weights = sampling.integer_weights(base, torch.ones(1))[0]
    knobs = FILTERS[filters]
    args = (knobs.get("top_k", 0), knobs.get("top_p", 1.0), knobs.get("min_p", 0.0))
    args = (args[0], torch.tensor(args[1]).item(), torch.tensor(args[2]).item())
    weights = torch.where(sampling.kept_tokens(base[0], weights, *args), weights, 0)
    words, expected = border_words(weights)
    assert [sampling.draw(weights, word) for word in words] == expected
    assert draw_with_words(base, words, **knobs) == expected


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 12}], ids=str)
def test_draws_follow_the_distribution_to_the_tail(compiled, filters):
    vocab, draws = 40, 200_000
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    probabilities = torch.softmax(row.double(), 0)
    order = probabilities.argsort(descending=True)
    keep = torch.zeros(vocab, dtype=torch.bool)
    if "top_p" in filters:
        before = probabilities[order].cumsum(0) - probabilities[order]
        keep[order[before < filters["top_p"]]] = True
    else:
        keep[order[: filters.get("top_k", vocab)]] = True
    probabilities = torch.where(keep, probabilities, 0) / probabilities[keep].sum()
    tokens = compiled.guided_sample(row.expand(draws, vocab), seed=123, **filters)
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert counts[~keep].sum() == 0
    for subset in (order, order[vocab // 2 :]):  # all tokens; the tail half
        subset = subset[keep[subset]]
        expected = probabilities[subset] * draws
        big = expected >= 5
        observed = torch.cat([counts[subset][big], counts[subset][~big].sum()[None]])
        expected = torch.cat([expected[big], expected[~big].sum()[None]])
        observed, expected = observed[expected > 0], expected[expected > 0]
        if len(observed) < 2:
            continue
        statistic = ((observed - expected) ** 2 / expected).sum().item()
        assert statistic < chi2.ppf(1 - 1e-6, len(observed) - 1)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0])
def test_the_integer_distribution_is_softmax_within_5e_minus_6(temperature):
    z = torch.randn(1, 130_000, generator=torch.Generator().manual_seed(3)) * 4
    weights = sampling.integer_weights(z, torch.tensor([temperature])).double()
    exact = torch.softmax(z.double() / torch.tensor(temperature).double(), -1)
    assert (weights / weights.sum() - exact).abs().sum() / 2 < 5e-6


def test_the_best_token_weighs_2_to_the_40():
    weights = sampling.integer_weights(case("normal"), torch.tensor([0.7, 3.0]))
    assert weights.amax(-1).tolist() == [2**40, 2**40]


@pytest.mark.parametrize("top_k", [0, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.5, 0.1])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_the_kept_set_is_that_of_transformers(ops, top_k, top_p, min_p):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(8)) * 2
    scores = TemperatureLogitsWarper(0.8)(None, row)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    allowed = set((scores[0] > -math.inf).nonzero().flatten().tolist())
    knobs = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert set(ops.guided_sample(row.expand(200, 64), seed=1, **knobs).tolist()) <= allowed
    weights = sampling.integer_weights(row, torch.tensor([0.8]))[0]
    top_p, min_p = (torch.tensor(x).item() for x in (top_p, min_p))  # rounded to fp32, as every knob is
    weights = torch.where(sampling.kept_tokens(row[0], weights, top_k, top_p, min_p), weights, 0)
    assert set(weights.nonzero().flatten().tolist()) == allowed
    if ops is not reference:  # every token that is left can be drawn, and no other
        assert set(draw_with_words(row, border_words(weights)[0], **knobs)) == allowed


# ---- Philox


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits_of_pi"],
)
def test_philox_gives_the_known_answers_of_random123(key, counter, words):
    assert philox.philox4x32(key, counter) == words
    low, high = counter[1] << 32 | counter[0], counter[3] << 32 | counter[2]
    assert _C.philox_u64(key[1] << 32 | key[0], low, high) == words[1] << 32 | words[0]


# ---- invariances


def test_guidance_zero_is_the_base_even_where_the_guide_is_bad(ops):
    base, guide = case("normal"), torch.full((2, 300), math.nan)
    expected = ops.guided_logprobs(base)
    assert_same_bits(ops.guided_logprobs(base, guide, guidance=0.0), expected)
    assert_same_bits(ops.guided_sample(base, guide, guidance=0.0, seed=1), ops.guided_sample(base, seed=1))


def test_equal_models_at_guidance_w_are_the_base_at_temperature_1_over_1_plus_w(ops):
    base = case("normal")
    both = ops.guided_logprobs(base, base, guidance=1.0)
    torch.testing.assert_close(both, ops.guided_logprobs(base, temperature=0.5), atol=3e-6, rtol=0)


def test_adding_constants_to_either_row_changes_nothing_but_rounding(ops):
    base, guide = case("normal"), case("ascending")
    shifted = ops.guided_logprobs(base + 4.0, guide - 8.0, guidance=0.5)
    torch.testing.assert_close(shifted, ops.guided_logprobs(base, guide, guidance=0.5), atol=1e-5, rtol=0)


def test_logprobs_are_log_softmax(ops):
    base, guide = case("normal"), case("masked")
    exact = torch.log_softmax((base.double() + 0.7 * guide.double()) / 0.8, -1)
    torch.testing.assert_close(
        ops.guided_logprobs(base, guide, guidance=0.7, temperature=0.8).double(), exact, atol=3e-6, rtol=1e-6
    )


def test_the_drawn_logprob_is_the_entry_of_guided_logprobs(ops):
    base, guide = case("normal"), case("ascending")
    tokens, drawn = ops.guided_sample(base, guide, guidance=0.3, temperature=0.8, top_p=0.9, return_logprobs=True)
    table = ops.guided_logprobs(base, guide, guidance=0.3, temperature=0.8)
    assert_same_bits(drawn, table.gather(1, tokens[:, None])[:, 0])


def test_greedy_takes_the_lowest_index_of_the_maximum_and_reports_temperature_1(ops):
    base = torch.tensor([[0.0, 2.0, -1.0, 2.0], [-0.0, 0.0, -1.0, -0.0]])
    tokens, logprobs = ops.guided_sample(base, temperature=0.0, top_k=2, top_p=0.1, return_logprobs=True)
    assert tokens.tolist() == [1, 0]
    assert_same_bits(logprobs, ops.guided_logprobs(base).gather(1, tokens[:, None])[:, 0])


def test_padding_beyond_vocab_size_is_never_drawn_nor_read(ops):
    base, guide = case("normal"), case("ascending")
    padded = torch.cat([base, torch.full((2, 20), math.nan)], 1)
    wider = torch.cat([guide, torch.full((2, 7), math.inf)], 1)
    expected = ops.guided_sample(base, guide, seed=3)
    assert_same_bits(ops.guided_sample(padded, wider, seed=3, vocab_size=300), expected)
    logprobs = ops.guided_logprobs(padded, wider, vocab_size=300)
    assert_same_bits(logprobs[:, :300], ops.guided_logprobs(base, guide))
    assert (logprobs[:, 300:] == -math.inf).all()


def test_a_seed_tensor_makes_a_row_independent_of_the_batch_around_it(ops):
    base = torch.randn(6, 300, generator=torch.Generator().manual_seed(4))
    seeds, offsets = torch.arange(6) * 7, torch.arange(6)
    together = ops.guided_sample(base, seed=seeds, offset=offsets, top_p=0.9)
    alone = [
        ops.guided_sample(base[i : i + 1], seed=seeds[i : i + 1], offset=offsets[i : i + 1], top_p=0.9)
        for i in range(6)
    ]
    assert_same_bits(together, torch.cat(alone))


def test_an_int_seed_gives_each_row_its_own_counter(ops):
    base = torch.zeros(64, 300)
    assert ops.guided_sample(base, seed=1).unique().numel() > 32
    assert not torch.equal(ops.guided_sample(base, seed=1), ops.guided_sample(base, seed=1, offset=1))


def test_a_0_dim_seed_is_an_int_and_gives_each_row_its_own_counter(ops):
    base = torch.zeros(64, 300)
    expected = ops.guided_sample(base, seed=7, offset=3)
    assert expected.unique().numel() > 32
    seed, offset = torch.tensor(7), torch.tensor(3)
    assert_same_bits(ops.guided_sample(base, seed=seed, offset=offset), expected)
    assert_same_bits(ops.guided_sample(base, seed=seed, offset=3, return_logprobs=True)[0], expected)
    assert_same_bits(ops.guided_sample(base, seed=7, offset=offset.expand(64)), expected)


def test_another_default_device_changes_nothing(ops):
    base, guide = case("normal"), case("ascending")
    kwargs = {"guidance": 0.5, "seed": 2}
    expected = ops.guided_sample(base, guide, return_logprobs=True, **kwargs), ops.guided_logprobs(base, guide)
    with torch.device("meta"):
        actual = ops.guided_sample(base, guide, return_logprobs=True, **kwargs), ops.guided_logprobs(base, guide)
        plain = ops.guided_sample(base, guide, **kwargs)
    for a, e in zip([*actual[0], actual[1], plain], [*expected[0], expected[1], expected[0][0]], strict=True):
        assert_same_bits(a, e)


def test_scalars_equal_filled_tensors(ops):
    base, guide = case("normal"), case("ascending")
    scalars = {"guidance": 0.3, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    tensors = {name: torch.tensor([value, value]) for name, value in scalars.items()}
    zero_dim = {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items() if name != "top_k"}
    expected = ops.guided_sample(base, guide, seed=3, **scalars)
    assert_same_bits(ops.guided_sample(base, guide, seed=3, **tensors), expected)
    assert_same_bits(ops.guided_sample(base, guide, seed=3, top_k=50, **zero_dim), expected)


def test_rows_take_their_own_parameters(ops):
    base, guide = case("normal"), case("ascending")
    mixed = {
        "guidance": torch.tensor([0.0, 1.0]),
        "temperature": torch.tensor([0.0, 1.3]),
        "top_k": torch.tensor([0, 9]),
        "top_p": torch.tensor([1.0, 0.7]),
        "min_p": torch.tensor([0.0, 0.02]),
    }
    together = ops.guided_sample(base, guide, seed=torch.tensor([5, 6]), **mixed)
    for row in range(2):
        single = {name: values[row : row + 1] for name, values in mixed.items()}
        seed = torch.tensor([5 + row])
        assert together[row] == ops.guided_sample(base[row : row + 1], guide[row : row + 1], seed=seed, **single)[0]


def test_a_1d_guidance_is_per_row_with_one_guide_and_per_guide_with_stacked_guides(ops):
    base, guides = case("normal"), torch.stack([case("ascending"), case("masked")])
    w = torch.tensor([0.5, 2.0])  # B == G == 2: the shape alone cannot tell
    per_row = ops.guided_logprobs(base, guides[0], guidance=w)
    for row in range(2):
        alone = ops.guided_logprobs(base[row : row + 1], guides[0][row : row + 1], guidance=w[row].item())
        assert_same_bits(per_row[row : row + 1], alone)
    per_guide = ops.guided_logprobs(base, guides, guidance=w)
    assert_same_bits(per_guide, ops.guided_logprobs(base, guides, guidance=w.expand(2, 2)))
    by_hand = torch.log_softmax(base.double() + 0.5 * guides[0].double() + 2 * guides[1].double(), -1)
    torch.testing.assert_close(per_guide.double(), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stacked", [1, 2, 3])
def test_stacked_guides_agree_with_the_reference(compiled, stacked):
    base = case("normal")
    guides = torch.stack([case("ascending"), case("masked"), case("peaked").to(torch.float32)])[:stacked]
    w = torch.tensor([[0.5, -0.0, 1.0], [1.0, 2.0, -0.25]])[:, :stacked]
    guides[guides == -math.inf] = -50.0
    for actual, expected in zip(
        compiled.guided_sample(base, guides, guidance=w, return_logprobs=True),
        reference.guided_sample(base, guides, guidance=w, return_logprobs=True),
        strict=True,
    ):
        assert_same_bits(actual, expected)


def test_strided_logits_are_read_where_they_are(ops):
    base = torch.randn(4, 7, 300, generator=torch.Generator().manual_seed(4))
    guide = torch.randn(300, 4, generator=torch.Generator().manual_seed(5))
    last, transposed = base[:, -1], guide.T
    expected = ops.guided_sample(last.contiguous(), transposed.contiguous(), seed=1)
    assert_same_bits(ops.guided_sample(last, transposed, seed=1), expected)
    one = base[0, -1].expand(3, 300)
    assert_same_bits(ops.guided_sample(one, seed=1), ops.guided_sample(one.contiguous(), seed=1))


def test_inputs_are_not_changed(ops):
    base, guide = case("signed_zeros"), case("masked")
    before = base.clone(), guide.clone()
    ops.guided_sample(base, guide, top_p=0.5)
    ops.guided_logprobs(base, guide)
    assert_same_bits(base, before[0])
    assert_same_bits(guide, before[1])


def test_an_empty_batch_gives_an_empty_result(ops):
    tokens, logprobs = ops.guided_sample(torch.empty(0, 5), torch.empty(0, 5), return_logprobs=True)
    assert (tokens.shape, tokens.dtype, logprobs.shape) == ((0,), torch.int64, (0,))
    assert ops.guided_sample(torch.empty(0, 5)).shape == (0,)
    assert ops.guided_logprobs(torch.empty(0, 5)).shape == (0, 5)


def test_rows_further_apart_than_2_to_the_31_elements_are_reached(ops):
    stride, columns = 2**31 + 64, 128
    memory = mmap.mmap(-1, (stride + columns) * torch.bfloat16.itemsize)
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)  # untouched pages are the shared zero page
    logits = flat.as_strided((2, columns), (stride, 1))
    logits[1, 77] = 50.0
    assert ops.guided_sample(logits, temperature=0.0).tolist() == [0, 77]


# ---- masks and errors


def test_the_base_masks_whatever_the_guides_say(ops):
    base = torch.tensor([[0.0, -math.inf, 1.0]])
    for bad in (math.nan, math.inf, -math.inf, 5.0):
        for w in (1.0, -1.0):
            logprobs = ops.guided_logprobs(base, torch.tensor([[0.0, bad, 0.0]]), guidance=w)
            assert_same_bits(logprobs, ops.guided_logprobs(base))


def test_a_guide_masks_where_its_guidance_is_positive(ops):
    base, guide = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.0, -math.inf, 0.0]])
    assert ops.guided_logprobs(base, guide, guidance=0.5)[0, 1] == -math.inf
    assert ops.guided_logprobs(torch.tensor([[0.0, math.nan, 1.0]]), guide)[0, 1] == -math.inf
    assert ops.guided_sample(base, guide, temperature=0.0).tolist() == [2]


BAD_ROWS = {
    "nan_base": ([0.0, math.nan], [0.0, 0.0], 1.0, "row 1, token 1"),
    "infinite_base": ([0.0, math.inf], [0.0, 0.0], 1.0, "row 1, token 1"),
    "nan_guide": ([0.0, 0.0], [math.nan, 0.0], 1.0, "row 1, token 0"),
    "infinite_guide": ([0.0, 0.0], [math.inf, 0.0], 1.0, "row 1, token 0"),
    "negative_guidance_on_minus_infinity": ([0.0, 0.0], [-math.inf, 0.0], -1.0, "row 1, token 0"),
    "negative_guidance_on_infinity": ([0.0, 0.0], [math.inf, 0.0], -1.0, "row 1, token 0"),
    "nothing_left": ([-math.inf, 0.0], [0.0, -math.inf], 1.0, "row 1 must have at least one token left"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_a_distribution_is_named(ops, name):
    base, guide, w, words = BAD_ROWS[name]
    base, guide = torch.tensor([[0.0, 0.0], base]), torch.tensor([[0.0, 0.0], guide])
    for call in (ops.guided_sample, ops.guided_logprobs):
        with pytest.raises(ValueError, match=words):
            call(base, guide, guidance=w)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"temperature": torch.tensor([1.0, -2.0])}, "got -2.0 in row 1"),
        ({"temperature": torch.ones(3)}, "temperature must be a scalar or have shape"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"top_p": torch.tensor([0.5, -0.5])}, "top_p must be in"),
        ({"min_p": -0.1}, "min_p must be in"),
        ({"top_k": -1}, r"top_k must be in \[0, 2\*\*63\), got -1"),
        ({"top_k": torch.tensor([1, -1])}, "top_k must be >= 0, got -1 in row 1"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": torch.tensor([0, -3])}, "seed must be in"),
        ({"offset": 2**63}, "offset must be in"),
        ({"guidance": math.inf}, "guidance must be a finite number"),
        ({"guidance": math.nan}, "guidance must be a finite number"),
        ({"guidance": torch.tensor([1.0, math.nan])}, "guidance must be finite, got nan in row 1"),
        (
            {"guidance": torch.ones(3)},
            r"guidance must be a scalar, per row \[B\] with one guide \[B, V\], per guide \[G\] "
            r"with stacked guides \[G, B, V\], or both \[B, G\], got .* Here is one guide, B = 2 and G = 1",
        ),
        ({"guidance": 10**400}, "guidance must be a finite number, or a tensor, got an integer of 1329 bits"),
        ({"temperature": -(2**70)}, r"temperature must be finite and >= 0, got -1.18"),
        ({"temperature": 1e39}, "temperature must be finite and >= 0, got inf in row 0"),
        ({"guidance": -1e39}, "guidance must be finite, got -inf in row 0"),
        ({"top_p": 1e300}, r"top_p must be in \[0, 1\], got inf in row 0"),
        ({"min_p": -1e300}, r"min_p must be in \[0, 1\], got -inf in row 0"),
        ({"temperature": 10**400}, "temperature must be a number that float64 holds, got an integer of 1329 bits"),
        ({"top_p": 2**70}, r"top_p must be in \[0, 1\], got 1.18"),
        ({"seed": 10**400}, r"seed must be in \[0, 2\*\*63\), got an integer of 1329 bits"),
        ({"guidance": torch.ones(2, device="meta")}, "guidance must hold values, got a tensor .* on meta"),
        ({"temperature": torch.ones(2, device="meta")}, "temperature must hold values"),
        ({"seed": torch.ones(2, dtype=torch.int64, device="meta")}, "seed must hold values"),
        ({"vocab_size": 0}, "vocab_size must be in"),
        ({"vocab_size": 301}, "vocab_size must be in"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(ops, kwargs, words):
    with pytest.raises(ValueError, match=words):
        ops.guided_sample(case("normal"), case("normal"), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be an int"),
        ({"top_k": torch.tensor([1.0, 2.0])}, "top_k must be an integer tensor"),
        ({"seed": 1.0}, "seed must be an int"),
        ({"guidance": None}, "guidance must be a finite number"),
        ({"vocab_size": 3.0}, "vocab_size must be in"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": 1j}, "temperature must be a number"),
        (
            {"temperature": torch.ones(2, dtype=torch.complex64)},
            "temperature must be real numbers, got torch.complex64",
        ),
        ({"top_p": torch.ones(2, dtype=torch.bool)}, "top_p must be real numbers, got torch.bool"),
        ({"guidance": torch.ones(2, dtype=torch.complex64)}, "guidance must be real numbers, got torch.complex64"),
        ({"guidance": torch.ones(2, dtype=torch.bool)}, "guidance must be real numbers, got torch.bool"),
        ({"guidance": torch.ones(2).to_sparse()}, r"guidance must be a dense \(strided\) tensor"),
        ({"seed": torch.ones(2, dtype=torch.bool)}, "seed must be an integer tensor, got torch.bool"),
        ({"seed": torch.ones(2, dtype=torch.complex64)}, "seed must be an integer tensor, got torch.complex64"),
        ({"return_logprobs": 1}, "return_logprobs must be True or False, got 1"),
        ({"return_logprobs": None}, "return_logprobs must be True or False, got None"),
        ({"return_logprobs": 0}, "return_logprobs must be True or False, got 0"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type_are_refused(ops, kwargs, words):
    with pytest.raises(TypeError, match=words):
        ops.guided_sample(case("normal"), case("normal"), **kwargs)


@pytest.mark.parametrize(
    ("base", "guide", "error", "words"),
    [
        (torch.zeros(3), None, ValueError, r"base_logits must have shape \[B, V\]"),
        (torch.zeros(2, 0), None, ValueError, "at least one column"),
        (torch.zeros(2, 3, dtype=torch.int64), None, TypeError, "base_logits must be float32"),
        ([[0.0]], None, TypeError, "base_logits must be a tensor"),
        (torch.zeros(2, 3), torch.zeros(3, 3), ValueError, "guide_logits must have shape"),
        (torch.zeros(2, 5), torch.zeros(2, 3), ValueError, r"got 3 columns. If the tail is padding, pass vocab_size=3"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, "guide_logits must be on cpu"),
        (torch.zeros(1, 1).expand(1, 2**22 + 1), None, ValueError, "vocab_size must be at most"),
    ],
    ids=["1d", "no_columns", "integers", "list", "rows", "columns", "device", "vocabulary"],
)
def test_logits_of_the_wrong_shape_or_dtype_are_refused(ops, base, guide, error, words):
    for call in (ops.guided_sample, ops.guided_logprobs):
        with pytest.raises(error, match=words):
            call(base, guide)


def test_a_1d_guidance_of_the_wrong_length_for_stacked_guides_is_told_both_readings(ops):
    words = r"per guide \[G\] with stacked guides .* Here guides are stacked, B = 2 and G = 3: shape \[3\] or \[2, 3\]"
    with pytest.raises(ValueError, match=words):
        ops.guided_logprobs(case("normal"), case("normal").expand(3, 2, 300), guidance=torch.ones(2))


@pytest.mark.parametrize("w", [math.nan, math.inf, -math.inf], ids=str)
def test_guidance_that_is_not_finite_is_refused_even_where_no_row_reads_it(ops, w):
    for base, guide in ((case("normal"), None), (torch.empty(0, 5), None), (torch.empty(0, 5), torch.empty(0, 5))):
        with pytest.raises(ValueError, match="guidance must be a finite number"):
            ops.guided_sample(base, guide, guidance=w)


def test_large_integers_are_read_as_floats(ops):
    base = case("normal")
    expected = ops.guided_sample(base, base, temperature=2.0**70, guidance=2.0**66, seed=1)
    assert_same_bits(ops.guided_sample(base, base, temperature=2**70, guidance=2**66, seed=1), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_logits_that_are_nested_or_negated_views_are_refused(ops, layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    negative = torch.view_as_complex(torch.ones(2, 5, 2)).conj().imag
    for call in (ops.guided_sample, ops.guided_logprobs):
        with pytest.raises(TypeError, match=r"base_logits must be a dense \(strided\) tensor, got a nested tensor"):
            call(nested)
        with pytest.raises(TypeError, match=r"guide_logits must be a dense \(strided\) tensor, got a nested tensor"):
            call(case("normal"), nested)
        with pytest.raises(TypeError, match=r"guidance must be a dense \(strided\) tensor, got a nested tensor"):
            call(case("normal"), case("normal"), guidance=nested)
        with pytest.raises(ValueError, match=r"base_logits must hold its values .* Call \.resolve_neg\(\) first"):
            call(negative)
        with pytest.raises(ValueError, match=r"guide_logits must hold its values"):
            call(torch.ones(2, 5), negative)


def test_logprobs_want_a_positive_temperature(ops):
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0, got 0\.0"):
        ops.guided_logprobs(case("normal"), temperature=0.0)


# ---- autograd


def test_logprobs_are_differentiable_in_all_logits(ops):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(2, 7, dtype=torch.float64, generator=generator).requires_grad_()
    guides = torch.randn(2, 2, 7, dtype=torch.float64, generator=generator).requires_grad_()

    def logprobs(b, g):
        return ops.guided_logprobs(b, g, guidance=torch.tensor([0.5, -1.5]), temperature=0.7)

    assert torch.autograd.gradcheck(logprobs, (base, guides))


def test_fp32_gradients_are_those_of_log_softmax(ops):
    base, guide = case("normal").requires_grad_(), case("masked").requires_grad_()
    upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    ops.guided_logprobs(base, guide, guidance=0.5, temperature=0.8, vocab_size=290).backward(upstream)
    b, g = case("normal").requires_grad_(), case("masked").requires_grad_()
    z = (b + 0.5 * g)[:, :290] / 0.8
    kept = z > -math.inf
    torch.where(kept, torch.log_softmax(z, -1), 0.0).backward(upstream[:, :290] * kept)
    torch.testing.assert_close(base.grad, b.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(guide.grad, g.grad.nan_to_num(), atol=1e-5, rtol=1e-4)
    assert ops.guided_sample(base, guide).requires_grad is False


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.float16), (torch.float64, torch.bfloat16)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_have_the_dtypes_of_the_logits_and_the_values_of_fp32(ops, dtypes, stacked):
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    guides = case("ascending").expand(2, 2, 300) if stacked else case("ascending")
    narrow = [(t * 0.5).to(dtype).requires_grad_() for t, dtype in zip((case("normal"), guides), dtypes, strict=True)]
    exact = [t.detach().to(wide).requires_grad_() for t in narrow]
    upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(wide)
    for logits in (narrow, exact):
        ops.guided_logprobs(*logits, guidance=0.7, temperature=0.9).backward(upstream)
    for n, e, dtype in zip(narrow, exact, dtypes, strict=True):
        assert n.grad.dtype == dtype
        assert_same_bits(n.grad, e.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_tokens_neither_give_nor_get_a_gradient(ops, dtype):
    base, guide = case("masked").to(dtype).requires_grad_(), case("normal").to(dtype).requires_grad_()
    masked = base.detach() == -math.inf
    logprobs = ops.guided_logprobs(base, guide, vocab_size=290)
    upstream = torch.where(logprobs == -math.inf, math.nan, 1.0).to(dtype)
    clean = torch.where(logprobs == -math.inf, 0.0, 1.0).to(dtype)
    expected = torch.autograd.grad(logprobs, (base, guide), clean, retain_graph=True)
    for grad, wanted in zip(torch.autograd.grad(logprobs, (base, guide), upstream), expected, strict=True):
        assert_same_bits(grad, wanted)
        assert not grad[masked].any()
        assert not grad[:, 290:].any()
        assert grad[:, :290][~masked[:, :290]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_have_the_bits_of_the_reference(compiled, dtype):
    results = []
    for module in (compiled, reference):
        base, guide = case("masked").to(dtype).requires_grad_(), case("normal").to(dtype).requires_grad_()
        logprobs = module.guided_logprobs(base, guide, guidance=0.5, temperature=0.8)
        upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append(torch.autograd.grad(logprobs, (base, guide), upstream))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_knobs_that_require_grad_are_read_as_constants(ops):
    base, guide = case("normal").requires_grad_(), case("ascending")
    knobs = {"guidance": torch.tensor([0.5, 0.7]), "temperature": torch.tensor([0.9, 1.1])}
    learnt = {name: values.clone().requires_grad_() for name, values in knobs.items()}
    expected = ops.guided_logprobs(base, guide, **knobs)
    actual = ops.guided_logprobs(base, guide, **learnt)
    assert_same_bits(actual, expected)
    upstream = torch.ones_like(expected)
    assert_same_bits(*(torch.autograd.grad(out, base, upstream)[0] for out in (actual, expected)))
    assert not ops.guided_logprobs(case("normal"), guide, **learnt).requires_grad
    tokens, logprobs = ops.guided_sample(base, guide, return_logprobs=True, **learnt)
    assert not tokens.requires_grad
    assert not logprobs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torch_func_grad_is_backward(ops, dtype):
    base, guide = case("normal").to(dtype), case("ascending").to(dtype)
    loss = lambda b, g: ops.guided_logprobs(b, g, guidance=0.5)[:, 3].sum()  # noqa: E731
    expected = torch.autograd.grad(loss(base.requires_grad_(), guide.requires_grad_()), (base, guide))
    for actual, wanted in zip(torch.func.grad(loss, (0, 1))(base.detach(), guide.detach()), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func, on itself
@pytest.mark.parametrize("which", ["base", "guide"])
def test_forward_mode_is_refused_and_not_silently_zero(ops, which):
    base, guide = case("normal"), case("ascending")
    call = (lambda x: ops.guided_logprobs(x, guide)) if which == "base" else lambda x: ops.guided_logprobs(base, x)
    with pytest.raises(NotImplementedError, match="must not be given forward-mode tangents"):
        torch.func.jvp(call, (base,), (torch.ones_like(base),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="only reverse mode is implemented"):
        call(forward_ad.make_dual(base, torch.ones_like(base)))
    with forward_ad.dual_level():
        assert_same_bits(call(base), call(base))  # without a tangent nothing is lost
