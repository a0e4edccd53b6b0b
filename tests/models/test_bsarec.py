"""BSARec against a slow forward pass of its specification, and packed against padded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import BSARec
from models.bsarec import low_pass
from tests.models.toys import (
    BATCH,
    MAX_LENGTH,
    NUM_ITEMS,
    PLACES,
    abstract,
    assert_item_rows_seen,
    assert_normal,
    assert_packed_equals_padded,
    assert_same_tree,
    assert_unused_slots_stay_finite,
    cross_entropy,
    forms,
    gradients_in_training,
    initial_params,
    paths,
    random_params,
)

DIM = 6


def build(max_length=MAX_LENGTH, dtype="float32", **options) -> BSARec:
    options = {"dim": DIM, "num_blocks": 1, "num_heads": 2, "filter_cutoff": 3} | options
    return abstract(
        lambda rngs: BSARec(NUM_ITEMS, max_length=max_length, **options, rngs=rngs), dtype
    )


def slow_low_frequencies(x: np.ndarray, kept: int) -> np.ndarray:
    """`[S, dim]` by a Fourier transform over all slots with the higher frequencies at 0."""
    spectrum = np.fft.rfft(x, axis=0)
    spectrum[kept:] = 0
    return np.fft.irfft(spectrum, len(x), axis=0)


def slow_states(params, sequence, num_heads, filter_weight, cutoff) -> np.ndarray:
    """The forward pass for one sequence of S slots, one slot, one head, one key at a time.

    Line by line: normalised sum of item and position; in each block the filter, which sees the
    sequence as if slot t were its newest and padding were silent, and attention to the items up
    to t, each added to its input and normalised, then mixed; and a feed-forward layer with the
    exact GELU, likewise added and normalised. Padding slots are left at 0.
    """
    items = params["item_embedding"]["embedding"]
    positions = params["position_embedding"]["embedding"]
    num_slots, dim = len(sequence), items.shape[1]
    real = [t for t, item in enumerate(sequence) if item]
    width = dim // num_heads

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        spread = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-12)
        return (x - x.mean()) / spread * layer["scale"] + layer["bias"]

    h = np.zeros((num_slots, dim))
    for t in real:
        h[t] = norm(params["input_norm"], items[sequence[t]] + positions[t])
    for index in sorted(params["blocks"]):
        block = params["blocks"][index]
        new = np.zeros_like(h)
        for t in real:
            ending = np.zeros_like(h)
            ending[num_slots - 1 - t :] = h[: t + 1]
            low = slow_low_frequencies(ending, cutoff // 2 + 1)[-1]
            filtered = low + block["root_high"] ** 2 * (h[t] - low)
            filtered = norm(block["filter_norm"], h[t] + filtered)
            query = linear(block["query_key_value"], h[t])[:dim]
            attended = np.zeros(dim)
            for head in range(num_heads):
                own = slice(head * width, (head + 1) * width)
                weights, values = [], []
                for s in (s for s in real if s <= t):
                    projected = linear(block["query_key_value"], h[s])
                    key, value = projected[dim : 2 * dim], projected[2 * dim :]
                    weights.append(math.exp(query[own] @ key[own] / math.sqrt(width)))
                    values.append(value[own])
                for weight, value in zip(weights, values, strict=True):
                    attended[own] += weight / sum(weights) * value
            attended = norm(block["attention_norm"], h[t] + linear(block["out"], attended))
            y = filter_weight * filtered + (1 - filter_weight) * attended
            hidden = linear(block["hidden"], y)
            hidden = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden])
            new[t] = norm(block["forward_norm"], y + linear(block["output"], hidden))
        h = new
    return h


@pytest.mark.parametrize(("num_heads", "filter_weight", "cutoff"), [(1, 0.7, 3), (3, 0.2, 1)])
def test_forward_pass(num_heads, filter_weight, cutoff):
    """States and scores, in double precision: 1e-12 leaves no room for another formula."""
    with jax.enable_x64(True):
        settings = {"num_heads": num_heads, "filter_weight": filter_weight}
        module = build(num_blocks=2, filter_cutoff=cutoff, dtype="float64", **settings)
        params = random_params(module, "float64")
        in_padded_form, in_packed_form = forms(module)
        graphdef = nnx.split(module)[0]

        @jax.jit
        def run(params):
            module, states = nnx.merge(graphdef, params), in_padded_form(params)
            return {
                "padded": states,
                "packed": in_packed_form(params),
                "scores": module.score_all(states, module.items()),
            }

        slow = [slow_states(params, row, num_heads, filter_weight, cutoff) for row in BATCH]
        states = np.stack(slow)[PLACES]
        scores = states @ params["item_embedding"]["embedding"][1:].T
        expected = {"padded": states, "packed": states, "scores": scores}
        assert_same_tree(run(params), expected, 1e-12)


@pytest.mark.parametrize(("max_length", "num_blocks"), [(MAX_LENGTH, 2), (6, 1)])
def test_packed_equals_padded(max_length, num_blocks):
    """By the cross-entropy over all items; an odd and an even length."""

    def loss(module, states):
        return cross_entropy(module.score_all(states, module.items()))

    with jax.enable_x64(True):
        module = build(max_length, num_blocks=num_blocks, dtype="float64")
        assert_packed_equals_padded(module, loss)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("cutoff", [1, 2, 5, 99])
def test_the_filter_is_what_the_published_one_gives_the_newest_slot(length, cutoff):
    """That is the slot whose state is scored. With all frequencies it is the identity."""
    x = np.random.default_rng(0).normal(size=(length, 3))
    kernel = low_pass(length, cutoff)
    kept = min(cutoff // 2 + 1, length // 2 + 1)
    newest = slow_low_frequencies(x, kept)[-1]
    np.testing.assert_allclose(kernel @ x[::-1], newest, rtol=0, atol=1e-12)
    if cutoff == 99:
        np.testing.assert_allclose(kernel, np.eye(length)[0], rtol=0, atol=1e-12)


def test_a_state_depends_on_its_item_and_those_before():
    """By gradients, exactly: on no later item, and on no other sequence."""
    module = build(num_blocks=2)
    rows, columns = PLACES
    expected = np.equal.outer(rows, rows) & np.greater_equal.outer(columns, columns)
    for form in forms(module):
        assert_item_rows_seen(form, random_params(module), expected)


@pytest.mark.parametrize(
    ("filter_weight", "silent"),
    [
        (0.0, {"filter_norm", "root_high"}),
        (1.0, {"attention_norm", "out", "query_key_value"}),
    ],
)
def test_either_branch_alone(filter_weight, silent):
    """A weight of 1 leaves attention without influence, and 0 the filter."""
    module = build(filter_weight=filter_weight)
    form = forms(module)[1]
    gradients = jax.jit(jax.grad(lambda p: (form(p) ** 3).sum()))(random_params(module))
    still = {
        name
        for name, leaves in gradients["blocks"][0].items()
        if not any(np.any(leaf) for leaf in jax.tree.leaves(leaves))
    }
    assert still == silent


@pytest.mark.parametrize("form", [0, 1], ids=["padded", "packed"])
def test_dropout_and_the_padding_row(form):
    module = build()
    gradients_in_training(forms(module)[form], random_params(module), ["item_embedding"])


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_each_rate_drops_something(rates):
    module = build(dropout_rate=rates[0], attention_dropout_rate=rates[1])
    form, params = forms(module)[1], random_params(module)
    assert np.any(np.asarray(form(params, jax.random.key(0)) != form(params)))


def test_padding_has_no_influence():
    """Not even non-finite values of its row pass; padding slots themselves stay finite."""
    params, broken = random_params(build()), random_params(build())
    broken["item_embedding"]["embedding"][0] = np.nan
    graphdef = nnx.split(build())[0]
    batch = np.concatenate([BATCH, np.zeros((1, MAX_LENGTH), np.int32)])
    apply = jax.jit(lambda p: nnx.merge(graphdef, p)(jnp.asarray(batch)))
    states = apply(params), apply(broken)
    assert np.all(np.isfinite(states[1]))
    np.testing.assert_array_equal(*states)


def test_unused_slots_stay_finite():
    assert_unused_slots_stay_finite(build())


def test_names_of_the_parameters():
    """Masks, checkpoints and `tables=` patterns rely on them."""
    layers = ["query_key_value", "out", "hidden", "output"]
    expected = {
        f"blocks/{i}/{name}/{p}" for i in (0, 1) for name in layers for p in ("kernel", "bias")
    }
    norms = ["input_norm"] + [
        f"blocks/{i}/{name}_norm" for i in (0, 1) for name in ("filter", "attention", "forward")
    ]
    expected |= {f"{name}/{p}" for name in norms for p in ("scale", "bias")}
    expected |= {f"{name}_embedding/embedding" for name in ("item", "position")}
    expected |= {f"blocks/{i}/root_high" for i in (0, 1)}
    names = paths(nnx.to_pure_dict(nnx.state(build(num_blocks=2))))  # not parameters alone
    assert len(names) == len(expected) and set(names) == expected


def test_initial_values():
    """Embeddings of spread 0.02, Xavier-normal layers, a root of spread 1."""
    num_items, dim = 500, 64
    params = initial_params(lambda rngs: BSARec(num_items, dim=dim, num_blocks=2, rngs=rngs))
    table = params["item_embedding"]["embedding"]
    assert table.shape == (num_items + 1, dim)
    for values in (table, params["position_embedding"]["embedding"]):
        assert_normal(values, 0.02)
    kernels = []
    for index in (0, 1):
        block = params["blocks"][index]
        assert_normal(block["root_high"], 1.0)
        thirds = np.split(block["query_key_value"]["kernel"], 3, axis=1)
        layers = [block[name]["kernel"] for name in ("out", "hidden", "output")]
        assert [layer.shape for layer in layers] == [(64, 64), (64, 256), (256, 64)]
        kernels += [*thirds, *layers]
    for kernel in kernels:
        assert_normal(kernel, math.sqrt(2 / sum(kernel.shape)))
    assert len({kernel.ravel()[:99].tobytes() for kernel in kernels}) == len(kernels)
    for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if name.endswith("bias"):
            assert not leaf.any()
        elif name.endswith("scale"):
            assert np.all(leaf == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "`dim` must be a multiple of `num_heads`, got 6, 4"),
        ({"filter_weight": 1.5}, r"`filter_weight` must be in \[0, 1\], got 1.5"),
        ({"filter_cutoff": 0}, "`filter_cutoff` must be a positive integer, got 0"),
        ({"filter_cutoff": 2.5}, "`filter_cutoff` must be a positive integer, got 2.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_weight_that_is_no_number():
    with pytest.raises(TypeError, match="`filter_weight` must be a number, got None"):
        build(filter_weight=None)
