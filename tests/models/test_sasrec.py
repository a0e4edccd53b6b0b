"""SASRec against a slow forward pass of its specification, and packed against padded."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import SASRec
from tests.models.toys import (
    BATCH,
    MAX_LENGTH,
    NUM_ITEMS,
    NUM_USED,
    PLACES,
    SEQUENCES,
    abstract,
    assert_item_rows_seen,
    assert_normal,
    assert_packed_equals_padded,
    assert_uniform,
    forms,
    gradients_in_training,
    initial_params,
    paths,
    random_params,
)

DIM = 6


def build(max_length=MAX_LENGTH, dtype="float32", **options) -> SASRec:
    options = {"dim": DIM, "num_blocks": 1, "dropout_rate": 0.5} | options
    return abstract(
        lambda rngs: SASRec(NUM_ITEMS, max_length=max_length, **options, rngs=rngs), dtype
    )


def slow_states(
    params, batch, num_heads, *, normalize_key_value=False, mask_padding=False, scale_input=True
):
    """The forward pass for one sequence, one slot, one head, one key at a time.

    Line by line: input sum(sqrt(D) item, position), zero at padding; in each block only the
    query is normalised, padding slots are keys like all others up to the query, and the
    residual is the un-normalised input; then the residual of the feed-forward layer is its
    normalised input; zero at padding again.
    """
    params = jax.tree.map(lambda p: np.asarray(p, float), params)
    table = params["item_embedding"]["embedding"]
    positions = params["position_embedding"]["embedding"]
    dim = table.shape[1]
    width = dim // num_heads

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        spread = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-8)
        return (x - x.mean()) / spread * layer["scale"] + layer["bias"]

    states = np.zeros((*batch.shape, dim))
    for b, sequence in enumerate(batch):
        h = np.zeros((len(sequence), dim))
        for t, item in enumerate(sequence):
            if item:
                h[t] = table[item] * (math.sqrt(dim) if scale_input else 1) + positions[t]
        for index in sorted(params["blocks"]):
            block = params["blocks"][index]
            new = np.zeros_like(h)
            for t, item in enumerate(sequence):
                if not item:
                    continue
                query = linear(block["query"], norm(block["attention_norm"], h[t]))
                attended = np.zeros(dim)
                for head in range(num_heads):
                    own = slice(head * width, (head + 1) * width)
                    weights, values = [], []
                    for s in range(t + 1):
                        if mask_padding and not sequence[s]:
                            continue
                        source = h[s]
                        if normalize_key_value:
                            source = norm(block["attention_norm"], source)
                        key_value = linear(block["key_value"], source)
                        key, value = key_value[:dim], key_value[dim:]
                        weights.append(math.exp(query[own] @ key[own] / math.sqrt(width)))
                        values.append(value[own])
                    for weight, value in zip(weights, values, strict=True):
                        attended[own] += weight / sum(weights) * value
                y = norm(block["forward_norm"], linear(block["out"], attended) + h[t])
                new[t] = y + linear(block["output"], np.maximum(linear(block["hidden"], y), 0))
            h = new
        for t in range(len(sequence)):
            states[b, t] = norm(params["norm"], h[t])
    return states


@functools.cache
def padded_states(**options) -> np.ndarray:
    """States `[B, S, dim]` of two blocks in double precision."""
    with jax.enable_x64(True):
        module = build(num_blocks=2, dtype="float64", **options)
        graphdef, params = nnx.split(module)[0], random_params(module, "float64")
        run = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(BATCH)))
        return np.asarray(run(params))


# The published network, with one head and with two, each sound variant alone, and all.
SOUND: list[dict[str, bool]] = [
    {"normalize_key_value": True},
    {"mask_padding": True},
    {"scale_input": False},
]
ALL_SOUND = {k: v for option in SOUND for k, v in option.items()}
VARIANTS = [(1, {}), (2, {}), *((1, option) for option in SOUND), (3, ALL_SOUND)]


@pytest.mark.parametrize(("num_heads", "options"), VARIANTS, ids=str)
def test_forward_pass(num_heads, options):
    """In double precision, so that 1e-12 leaves no room for a slightly different formula."""
    params = random_params(build(num_blocks=2), "float64")
    expected = slow_states(params, BATCH, num_heads, **options)
    actual = padded_states(num_heads=num_heads, **options)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", SOUND, ids=str)
def test_options_change_what_they_must(option):
    """An option that did nothing would pass a comparison with a reference that ignores it."""
    change = np.abs(padded_states(num_heads=1, **option) - padded_states(num_heads=1))
    change = change[PLACES].max(axis=1)
    full = np.array([len(SEQUENCES[row]) == MAX_LENGTH for row in PLACES[0]])
    if "mask_padding" in option:  # a full sequence has none
        assert np.all(change[full] < 1e-12)
        change = change[~full]
    assert np.all(change > 1e-3)


@pytest.mark.parametrize(
    ("num_blocks", "options"),
    # Two blocks: padding slots are set to zero, and so offer the same key, in each anew.
    # With normalised keys the padding's key is not a bias alone.
    [(2, {"num_heads": 2}), (1, SOUND[0]), (1, ALL_SOUND)],
    ids=str,
)
def test_packed_equals_padded(num_blocks, options):
    """By positive and negative items; for single precision see the training step's test."""
    positives, negatives = np.random.default_rng(1).integers(1, NUM_ITEMS, (2, NUM_USED))

    def loss(module, states):
        table = module.item_embedding.embedding[...]
        positive, negative = (
            (states * table[items]).sum(-1) for items in (positives, negatives)
        )
        return (jnp.log1p(jnp.exp(-positive)) + jnp.log1p(jnp.exp(negative))).mean()

    with jax.enable_x64(True):
        module = build(num_blocks=num_blocks, dtype="float64", **options)
        assert_packed_equals_padded(module, loss)


def test_a_state_depends_on_the_items_up_to_it():
    """By gradients, exactly: on every item of its own sequence so far, and on no other."""
    module = build(num_heads=2)
    params = random_params(module)
    same = np.equal.outer(PLACES[0], PLACES[0])
    expected = same & np.greater_equal.outer(PLACES[1], PLACES[1])
    for form in forms(module):
        assert_item_rows_seen(form, params, expected)


@pytest.mark.parametrize("form", [0, 1], ids=["padded", "packed"])
def test_dropout_and_the_padding_row(form):
    module = build()
    gradients_in_training(forms(module)[form], random_params(module), ["item_embedding"])


def test_padding_row_has_no_influence():
    """Not even non-finite values pass."""
    params = random_params(build())
    broken = random_params(build())
    broken["item_embedding"]["embedding"][0] = np.nan
    in_padded_form, _ = forms(build())
    np.testing.assert_array_equal(in_padded_form(broken), in_padded_form(params))


@pytest.mark.parametrize("mask_padding", [True, False])
def test_more_padding(mask_padding):
    """Three more padding slots on the left, the items' positions being the same vectors.

    With padding masked no state changes. In the published network all change, as padding
    slots are keys: a property of its numbers, not to be mended by accident.
    """
    extra = 3
    params = random_params(build())
    wide_params = {**params, "position_embedding": {}}
    positions = params["position_embedding"]["embedding"]
    wide_params["position_embedding"]["embedding"] = np.pad(positions, ((extra, 0), (0, 0)))
    states = []
    for width, p in ((0, params), (extra, wide_params)):
        graphdef = nnx.split(build(MAX_LENGTH + width, mask_padding=mask_padding))[0]
        apply = jax.jit(lambda p, items, graphdef=graphdef: nnx.merge(graphdef, p)(items))
        batch = jnp.asarray(np.pad(BATCH, ((0, 0), (width, 0))))
        states.append(np.asarray(apply(p, batch))[:, width:][PLACES])
    change = np.abs(states[1] - states[0]).max(axis=1)
    assert np.all(change < 1e-6) if mask_padding else np.all(change > 1e-3)


def test_names_of_the_parameters():
    """Masks, checkpoints and `tables=` patterns rely on them."""
    layers = ["query", "key_value", "out", "hidden", "output"]
    expected = {
        f"blocks/{i}/{name}/{p}" for i in (0, 1) for name in layers for p in ("kernel", "bias")
    }
    norms = ["blocks/0/attention_norm", "blocks/0/forward_norm"]
    norms += ["blocks/1/attention_norm", "blocks/1/forward_norm", "norm"]
    expected |= {f"{name}/{p}" for name in norms for p in ("scale", "bias")}
    expected |= {"item_embedding/embedding", "position_embedding/embedding"}
    names = paths(
        nnx.to_pure_dict(nnx.state(build(num_blocks=2)))
    )  # everything, not parameters alone
    assert len(names) == len(expected) and set(names) == expected


def test_initial_values():
    """Each distribution with its spread, the padding row's included."""
    dim = 24
    params = initial_params(
        lambda rngs: SASRec(700, dim=dim, max_length=30, num_blocks=1, rngs=rngs)
    )
    block = params["blocks"][0]
    assert_normal(params["item_embedding"]["embedding"], math.sqrt(2 / (701 + dim)))
    assert_normal(params["item_embedding"]["embedding"][0], math.sqrt(2 / (701 + dim)))
    assert_normal(params["position_embedding"]["embedding"], math.sqrt(2 / (30 + dim)))
    for name in ("query", "key_value"):
        assert_uniform(block[name]["kernel"], math.sqrt(6 / (4 * dim)))
    assert_normal(block["out"]["kernel"], math.sqrt(1 / dim))
    for name in ("query", "key_value", "out"):
        assert not block[name]["bias"].any()
    for name in ("hidden", "output"):
        assert_uniform(block[name]["kernel"], 1 / math.sqrt(dim))
        assert_uniform(block[name]["bias"], 1 / math.sqrt(dim))
    assert np.any(block["hidden"]["kernel"] != block["output"]["kernel"])
    for norm in (block["attention_norm"], block["forward_norm"], params["norm"]):
        assert np.all(norm["scale"] == 1) and np.all(norm["bias"] == 0)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`dim` must be a multiple of `num_heads`, got 6, 4"):
        build(num_heads=4)
