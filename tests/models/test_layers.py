"""Dropout, binomial draws, and attention over a packed stream against the padded one."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from models import (
    MF,
    STOSA,
    BERT4Rec,
    BSARec,
    GRU4Rec,
    LightGCN,
    SASRec,
    bert4rec,
    bsarec,
    encoder,
    gru4rec,
    layers,
    sasrec,
    stosa,
)
from models.layers import (
    Band,
    Rows,
    _binomial_cdf,
    attention,
    binomial,
    dropout,
    packed_causal_attention,
)
from models.packing import Packed
from tests.models.toys import PRECISIONS, packed, padded, precision

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(20_001,), (3, 41, 163)])
def test_dropout_keeps_entries_at_the_rate_and_scales_them(rate, shape):
    x = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    out = np.asarray(dropout(jnp.asarray(x), rate, KEY))
    kept = out != 0
    assert stats.binomtest(int(kept.sum()), x.size, 1 - rate).pvalue > 1e-3
    # The rate is a multiple of 2^-16, and the scale is exactly that rate's.
    keep = round((1 - rate) * 2**16) / 2**16
    np.testing.assert_allclose(out[kept], x[kept] / keep, rtol=1e-6)


@pytest.mark.parametrize("model", [SASRec, GRU4Rec, BERT4Rec, STOSA, BSARec])
@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_of_dropout_are_checked(model, rate):
    of_attention = ["attention_dropout_rate"] if model in (STOSA, BSARec) else []
    for name in ["dropout_rate", *of_attention]:
        with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\), got {rate}"):
            model(5, dim=4, rngs=nnx.Rngs(0), **{name: rate})


def test_dropout_entries_are_independent():
    """Four entries come from one random block, a quarter of all apart; neither they nor
    their neighbours may agree."""
    out = np.asarray(dropout(jnp.ones(40_960), 0.5, KEY)) > 0
    for lag in (1, 2, 3, 10_240, 20_480, 30_720):
        for phase in (0, 1):  # pairs that begin at even and at odd places
            same = out[phase:-lag:2] == out[phase + lag :: 2][: len(out[phase:-lag:2])]
            assert stats.binomtest(int(same.sum()), len(same), 0.5).pvalue > 1e-3


def test_dropout_depends_on_the_key_alone():
    x = jnp.ones(101)
    draws = [np.asarray(dropout(x, 0.5, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


@pytest.mark.parametrize(
    ("rate", "key"),
    # 1e-6 rounds to 0 of 2^16, which once meant that nothing was kept.
    [(0.5, None), (0.0, KEY), (1e-6, KEY)],
)
def test_dropout_is_the_identity(rate, key):
    x = jnp.arange(7.0)
    np.testing.assert_array_equal(dropout(x, rate, key), x)


def test_dropout_at_nearly_one_stays_finite():
    x = dropout(jnp.ones(1000), 1 - 1e-7, jax.random.key(0))
    assert np.isfinite(x).all()


def test_dropout_keeps_the_type():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert dropout(jnp.ones(3, dtype), 0.5, KEY).dtype == dtype


@pytest.mark.parametrize("probability", [0.3, 0.9])
def test_binomial_distribution_function(probability):
    """The table against SciPy, up to the rounding of float32; 2 marks what cannot happen."""
    count, k = np.arange(51)[:, None], np.arange(50)
    expected = np.where(k < count, stats.binom.cdf(k, count, probability), 2)
    np.testing.assert_allclose(_binomial_cdf(50, probability), expected, atol=1e-7)


@pytest.mark.parametrize("probability", [0.3, 0.7])
def test_binomial_draws(probability):
    """Every count of one call has its own distribution: chi-square, moments and bounds."""
    counts, num = np.array([0, 1, 2, 7, 50]), 20_000
    draw = jax.jit(lambda key: binomial(key, jnp.asarray(counts), probability, 50, (num, 5)))
    for count, draws in zip(counts, np.asarray(draw(KEY)).T, strict=True):
        assert draws.min() >= 0 and draws.max() <= count
        if count == 0:
            continue
        expected = num * stats.binom.pmf(np.arange(count + 1), count, probability)
        observed = np.bincount(draws, minlength=count + 1)
        common = expected >= 5  # rarer outcomes together in one cell
        expected = np.append(expected[common], expected[~common].sum())
        observed = np.append(observed[common], observed[~common].sum())
        cells = expected > 0
        assert stats.chisquare(observed[cells], expected[cells]).pvalue > 1e-3
        mean, variance = count * probability, count * probability * (1 - probability)
        assert abs(draws.mean() - mean) < 4 * np.sqrt(variance / num)
        np.testing.assert_allclose(draws.var(), variance, rtol=0.05)


# Lengths of the sequences, maximal length, slots of the stream: full sequences, odd and even
# maximal lengths, streams that end in and at the border of a tile, empty sequences.
STREAMS = [
    ((3, 1, 5, 2, 4), 5, 15),
    ((3, 1, 5, 2, 4), 5, 23),
    ((6, 6, 1, 0, 6), 6, 19),
    ((2, 4, 1, 3), 6, 12),
    ((1, 2, 2), 2, 6),
    ((1, 1, 0, 1), 1, 3),
]


class Problem:
    """Random query, key and value for a packed stream, and the same in a padded batch."""

    def __init__(self, lengths, max_length, num_slots, heads, *, masked, dtype):
        rng = np.random.default_rng(1)
        sequences = [[1] * length for length in lengths]
        _, self.stream = packed(sequences, num_slots)
        batch, self.places = padded(sequences, max_length)
        self.shape, self.dtype = batch.shape, dtype
        self.max_length, self.num_used = max_length, sum(lengths)
        self.used = jnp.asarray(batch > 0) | (not masked)
        self.qkv = tuple(
            jnp.asarray(x, dtype) for x in rng.normal(size=(3, num_slots, heads, 3))
        )
        # Key and value of a padding slot; unused when padding is masked.
        self.padding = tuple(jnp.asarray(x, dtype) for x in rng.normal(size=(2, heads, 3)))
        self.masked = masked

    def in_packed_form(self, *args):
        return self.whole_stream(*args)[: self.num_used]

    def whole_stream(self, qkv, padding, rate=0.0, dropout_key=None):
        query, key, value = qkv
        if self.masked:
            window = Band(self.stream, self.max_length, causal=True)
            return attention(query, key, value, window, rate, dropout_key)
        length = self.max_length
        return packed_causal_attention(
            query, key, value, self.stream, length, padding, rate, dropout_key
        )

    def in_padded_form(self, qkv, padding, *dropped):
        def spread(x, fill):
            grid = jnp.broadcast_to(fill, (*self.shape, *x.shape[1:])).astype(self.dtype)
            return grid.at[self.places].set(x[: self.num_used])

        query, key, value = qkv
        out = attention(
            spread(query, 0.0),
            spread(key, padding[0]),
            spread(value, padding[1]),
            Rows(self.used, causal=True),
            *dropped,
        )
        return out[self.places]


# Each case costs two compilations: single precision and masked padding on some only.
PARITY = [(stream, False, *PRECISIONS[1]) for stream in STREAMS]
PARITY += [(stream, True, *PRECISIONS[1]) for stream in STREAMS[1:3]]
PARITY += [(STREAMS[1], masked, *PRECISIONS[0]) for masked in (False, True)]


@pytest.mark.parametrize(("stream", "masked", "dtype", "atol"), PARITY)
def test_packed_attention_equals_the_padded(stream, masked, dtype, atol):
    """Outputs, and gradients with respect to query, key, value and the padding slot's."""
    with precision(dtype):
        lengths, max_length, num_slots = stream
        heads = 1 + len(lengths) % 3
        problem = Problem(lengths, max_length, num_slots, heads, masked=masked, dtype=dtype)
        weights = np.random.default_rng(2).uniform(size=(problem.num_used, heads, 3))

        def run(form):
            def loss(qkv, padding):
                out = form(qkv, padding)
                return (out * weights).sum(), out

            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(problem.qkv, problem.padding)

        actual, expected = run(problem.in_packed_form), run(problem.in_padded_form)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected
        )


def test_padded_attention_by_hand():
    """One head: equal logits average the values so far; a logit of ln 3 counts thrice."""
    value = jnp.array([1.0, 5.0, 9.0]).reshape(1, 3, 1, 1)
    ones, zeros = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1))

    def attend(query, key, value, used=(True, True, True)):
        window = Rows(jnp.array([used]), causal=True)
        return np.ravel(attention(query, key, value, window))

    np.testing.assert_allclose(attend(zeros, zeros, value), [1, 3, 5], rtol=1e-6)
    key = jnp.log(jnp.array([3.0, 1.0, 1.0])).reshape(1, 3, 1, 1)
    expected = [1, (3 * 1 + 5) / 4, (3 * 1 + 5 + 9) / 5]
    np.testing.assert_allclose(attend(ones, key, value), expected, rtol=1e-6)
    # The first slot is padding: it sees all alike, so as to stay finite; others skip it.
    skipped = attend(ones, key, value, (False, True, True))
    np.testing.assert_allclose(skipped, [5, 5, 7], rtol=1e-6)
    # The logits of a head of width 4 are halved.
    wide = (jnp.tile(ones, 4), jnp.tile(key, 4), value)
    expected = attend(2 * ones, key, value)
    np.testing.assert_allclose(attend(*wide), expected, rtol=1e-6)


@pytest.mark.parametrize("model", [SASRec, GRU4Rec, BERT4Rec, STOSA, BSARec])
def test_a_batch_may_be_empty(model):
    items = jnp.zeros((0, 50), jnp.int32)
    states = jax.eval_shape(model(5, dim=4, max_length=50, rngs=nnx.Rngs(0)), items)
    assert {leaf.shape for leaf in jax.tree.leaves(states)} == {(0, 50, 4)}


def test_slots_that_hold_nothing_stay_finite():
    """Also those that fill up the last tile, and where every sequence is empty."""
    for lengths in ((2, 3), (0, 0)):
        for masked in (True, False):
            problem = Problem(lengths, 5, 16, 1, masked=masked, dtype="float32")
            assert len(problem.stream.segment) == 16 > problem.num_used
            assert np.all(np.isfinite(problem.whole_stream(problem.qkv, problem.padding)))


def attention_weights(problem: Problem) -> np.ndarray:
    """Slow soft-max weights `[num_used, heads, num_used + 1]`, the last one padding slot's."""
    query, key, _ = (np.asarray(x, float) for x in problem.qkv)
    stream: Packed = jax.tree.map(np.asarray, problem.stream)
    num, heads = problem.num_used, query.shape[1]
    weights = np.zeros((num, heads, num + 1))
    for t in range(num):
        num_padding = problem.max_length - stream.lengths[stream.segment[t]]
        for h in range(heads):
            for s in range(t - stream.offset[t], t + 1):
                weights[t, h, s] = np.exp(query[t, h] @ key[s, h] / np.sqrt(query.shape[-1]))
            virtual = np.exp(query[t, h] @ np.asarray(problem.padding[0][h]) / np.sqrt(3))
            weights[t, h, num] = virtual if num_padding else 0
            weights[t, h] /= weights[t, h].sum() + (num_padding - 1) * weights[t, h, num]
    return weights


def test_dropout_on_packed_weights_is_that_of_the_padded():
    """Mean and covariance over many keys against the exact ones.

    Each attention weight is dropped alone, also each padding slot's, for which one virtual
    key stands: its number of kept slots must be binomial, and independent for every query and
    head. So outputs of different queries or heads are uncorrelated, and within one head
    Cov = rate / (1 - rate) sum over keys of weight^2 value value^T.
    """
    rate, num = 0.4, 20_000
    problem = Problem((2, 4, 1), 4, 8, 2, masked=False, dtype="float32")
    keys = jax.random.split(KEY, num)
    sample = jax.jit(
        jax.vmap(lambda key: problem.in_packed_form(problem.qkv, problem.padding, rate, key))
    )
    draws = np.asarray(sample(keys), float).reshape(num, -1)

    weights = attention_weights(problem)  # [queries, heads, keys]
    lengths = np.asarray(problem.stream.lengths)[np.asarray(problem.stream.segment)[:7]]
    multiplicity = np.ones_like(weights)
    multiplicity[..., -1] = (problem.max_length - lengths)[:, None]
    value = np.asarray(problem.qkv[2], float)[: problem.num_used]  # [keys, heads, d]
    value = np.concatenate([value, np.asarray(problem.padding[1], float)[None]])
    mean = np.einsum("qhk,khd->qhd", weights * multiplicity, value)
    blocks = np.einsum("qhk,khd,khe->qhde", weights**2 * multiplicity, value, value)
    covariance = np.zeros((*mean.shape, *mean.shape))
    for q, h in np.ndindex(mean.shape[:2]):
        covariance[q, h, :, q, h, :] = blocks[q, h] * rate / (1 - rate)
    covariance = covariance.reshape(mean.size, mean.size)

    spread = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(0) - mean.ravel()) / spread).max() < 4 / np.sqrt(num)
    # Entries of a correlation matrix; the fourth moments are bounded, so a few 1 / sqrt(num).
    error = (np.cov(draws.T) - covariance) / np.outer(spread, spread)
    assert np.abs(error).max() < 5 / np.sqrt(num)
    # The padded form, through the same statistics: the exact values are those of both.
    sample = jax.jit(
        jax.vmap(lambda key: problem.in_padded_form(problem.qkv, problem.padding, rate, key))
    )
    draws = np.asarray(sample(keys), float).reshape(num, -1)
    assert np.abs((draws.mean(0) - mean.ravel()) / spread).max() < 4 / np.sqrt(num)
    error = (np.cov(draws.T) - covariance) / np.outer(spread, spread)
    assert np.abs(error).max() < 5 / np.sqrt(num)


def test_masked_padding_takes_no_part_in_dropout():
    """A lone item has weight 1, so dropout leaves it out or doubles it, and nothing else."""
    problem = Problem((1, 1), 4, 2, 1, masked=True, dtype="float32")
    attend = jax.jit(lambda key: problem.in_packed_form(problem.qkv, problem.padding, 0.5, key))
    outputs = np.array([attend(jax.random.key(seed)) for seed in range(8)])
    kept = outputs != 0
    assert kept.any() and not kept.all()
    doubled = np.broadcast_to(2 * np.asarray(problem.qkv[2]), outputs.shape)
    np.testing.assert_allclose(outputs[kept], doubled[kept], rtol=1e-6)


@pytest.mark.parametrize("model", [SASRec, BERT4Rec, STOSA, BSARec])
def test_a_batch_of_another_shape_is_refused(model):
    """One column would be spread over all positions."""
    module = model(9, dim=4, num_heads=1, max_length=6, rngs=nnx.Rngs(0))
    for shape in ((2, 1), (2, 7), (6,), (1, 2, 6)):
        with pytest.raises(ValueError, match="`items` must have the shape .*max_length=6"):
            module(jnp.ones(shape, jnp.int32))
    with pytest.raises(ValueError, match=r"`items` must have the shape \[B, S\], got \(3,\)"):
        GRU4Rec(9, dim=4, rngs=nnx.Rngs(0))(jnp.ones(3, jnp.int32))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dim", 0, "`dim` must be a positive integer, got 0"),
        ("num_items", -1, "`num_items` must be a positive integer, got -1"),
        ("max_length", 0, "`max_length` must be a positive integer, got 0"),
        ("num_heads", -2, "`num_heads` must be a positive integer, got -2"),
        ("num_blocks", 1.5, "`num_blocks` must be a positive integer, got 1.5"),
        ("filter_cutoff", 3.0, "`filter_cutoff` must be a positive integer, got 3.0"),
        ("cosine_scale", -1.0, "`cosine_scale` must be at least 0, got -1.0"),
        ("cosine_scale", math.nan, "`cosine_scale` must be at least 0, got nan"),
        ("hidden_dim", 0, "`hidden_dim` must be a positive integer, got 0"),
    ],
)
def test_bad_sizes(name, value, message):
    tried = 0
    for model in (SASRec, BERT4Rec, STOSA, BSARec, GRU4Rec, MF, LightGCN):
        settings = {"num_items": 9, "num_users": 9, "dim": 4} | {name: value}
        known = inspect.signature(model.__init__).parameters
        if name in known:
            given: Any = {key: settings[key] for key in settings if key in known}
            with pytest.raises(ValueError, match=message):
                model(**given, rngs=nnx.Rngs(0))
            tried += 1
    assert tried


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dropout_rate", "0.3", "`dropout_rate` must be a number, got '0.3'"),
        ("attention_dropout_rate", [0.1], r"must be a number, got \[0.1\]"),
        ("cosine_scale", None, "`cosine_scale` must be a number, got None"),
        ("cosine_scale", True, "`cosine_scale` must be a number, got True"),
    ],
)
def test_what_is_no_number(name, value, message):
    model: Any = STOSA if name == "attention_dropout_rate" else SASRec
    with pytest.raises(TypeError, match=message):
        model(9, **{name: value}, rngs=nnx.Rngs(0))


def test_lightgcn_takes_a_whole_number_of_layers():
    wrong: Any
    for wrong in (1.5, -1, "3"):
        with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 0"):
            LightGCN(9, 5, num_layers=wrong, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_padding_stays_finite_in_half_precision(dtype):
    model = BERT4Rec(9, dim=4, max_length=3, num_heads=2, num_blocks=1, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    narrow = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))
    states = narrow(jnp.array([[0, 0, 0], [0, 3, 4]]))
    assert np.isfinite(np.asarray(jax.tree.leaves(states)[0], np.float32)).all()


# By the model: the inputs' dropout, then for each block that of attention's weights and those
# of the layers' outputs, which have the width 4 here, and 16 inside of BERT4Rec's. STOSA has
# two inputs; by the published mistake its covariances go through a block's layers alone.
PLACES = {
    SASRec: [(4, 0.3), (3, 0.3), (4, 0.3), (4, 0.3)],
    BERT4Rec: [(4, 0.3), (3, 0.3), (4, 0.3), (16, 0.3), (4, 0.3)],
    BSARec: [(4, 0.3), (4, 0.3), (3, 0.1), (4, 0.3), (4, 0.3)],
    STOSA: [(4, 0.3), (4, 0.3), (3, 0.1), (4, 0.3), (4, 0.3)],
    GRU4Rec: [(4, 0.3)],
}


@pytest.mark.parametrize("model", PLACES)
def test_where_dropout_is(model: Any, monkeypatch):
    found = []

    def recorded(x, rate, key):
        assert key is not None
        found.append((x.shape[-1], rate))
        return x

    for module in (layers, encoder, sasrec, bert4rec, bsarec, stosa, gru4rec):
        monkeypatch.setattr(module, "dropout", recorded)
    settings: dict[str, Any] = {
        "dropout_rate": 0.3,
        "num_blocks": 1,
        "num_heads": 2,
        "max_length": 3,
        "dim": 4,
    }
    if model in (BSARec, STOSA):
        settings["attention_dropout_rate"] = 0.1
    known = inspect.signature(model.__init__).parameters
    given = {name: settings[name] for name in settings if name in known}
    module = model(9, **given, rngs=nnx.Rngs(0))
    module(jnp.array([[0, 1, 2]]), dropout_key=jax.random.key(0))
    assert found == PLACES[model]


@pytest.mark.parametrize("model", PLACES)
def test_no_two_places_of_dropout_have_one_key(model: Any, monkeypatch):
    found = []

    def recorded(x, rate, key):
        found.append(tuple(jax.random.key_data(key).tolist()))
        return x

    for module in (layers, encoder, sasrec, bert4rec, bsarec, stosa, gru4rec):
        monkeypatch.setattr(module, "dropout", recorded)
    settings: dict[str, Any] = {"num_blocks": 2, "num_heads": 2, "max_length": 3, "dim": 4}
    known = inspect.signature(model.__init__).parameters
    given = {name: settings[name] for name in settings if name in known}
    module = model(9, **given, rngs=nnx.Rngs(0))
    module(jnp.array([[0, 1, 2]]), dropout_key=jax.random.key(0))
    assert len(set(found)) == len(found)
    # A packed stream draws besides how much of the padding each query keeps.
    binomial = layers.binomial

    def drawn(key, *args):
        recorded(None, None, key)
        return binomial(key, *args)

    monkeypatch.setattr(layers, "binomial", drawn)
    found.clear()
    rows, stream = packed([[1, 2]], 2)
    module.packed(module.embed(jnp.asarray(rows)), stream, dropout_key=jax.random.key(0))
    assert found and len(set(found)) == len(found)
