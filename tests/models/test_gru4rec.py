"""GRU4Rec against a slow forward pass of its specification, and packed against padded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import GRU4Rec
from tests.models.toys import (
    MAX_LENGTH,
    NUM_ITEMS,
    SEQUENCES,
    abstract,
    assert_normal,
    assert_same_tree,
    assert_uniform,
    initial_params,
    packed,
    padded,
    paths,
    random_params,
)

DIM, HIDDEN = 5, 4
BATCH, PLACES = padded(SEQUENCES, MAX_LENGTH, "right")
ROWS, STREAM = packed(SEQUENCES, 19)
NUM_USED = sum(map(len, SEQUENCES))
ROWS[NUM_USED:] = 16  # unused slots may hold anything; no sequence has this one


def build(dtype="float32") -> GRU4Rec:
    def module(rngs):
        return GRU4Rec(
            NUM_ITEMS,
            dim=DIM,
            hidden_dim=HIDDEN,
            max_length=MAX_LENGTH,
            dropout_rate=0.5,
            rngs=rngs,
        )

    return abstract(module, dtype)


def forms(dtype="float32"):
    """Both forms as functions of the parameters, giving the states of real slots `[T, dim]`."""
    graphdef = nnx.split(build(dtype))[0]

    def in_padded_form(params, key=None):
        return nnx.merge(graphdef, params)(jnp.asarray(BATCH), dropout_key=key)[PLACES]

    def in_packed_form(params, key=None):
        module = nnx.merge(graphdef, params)
        embedded = module.item_embedding(jnp.asarray(ROWS))
        return module.packed(embedded, STREAM, dropout_key=key)[:NUM_USED]

    return jax.jit(in_padded_form), jax.jit(in_packed_form)


def slow_states(params, sequence) -> np.ndarray:
    """States after each item of one sequence, `[length, dim]`, gate by gate."""
    hidden_dim = params["hidden_gates"]["kernel"].shape[0]
    first, second, third = (slice(i * hidden_dim, (i + 1) * hidden_dim) for i in range(3))
    w, u = params["input_gates"]["kernel"], params["hidden_gates"]["kernel"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    states, h = [], np.zeros(hidden_dim)
    for item in sequence:
        x = params["item_embedding"]["embedding"][item]
        r = sigmoid(x @ w[:, first] + h @ u[:, first])
        z = sigmoid(x @ w[:, second] + h @ u[:, second])
        n = np.tanh(x @ w[:, third] + r * (h @ u[:, third]))
        h = (1 - z) * n + z * h
        states.append(h @ params["dense"]["kernel"] + params["dense"]["bias"])
    return np.array(states)


def test_forward_pass():
    """Also that padding on the right changes nothing: the reference has no padding."""
    with jax.enable_x64(True):
        params = random_params(build(), "float64")
        expected = np.concatenate([slow_states(params, sequence) for sequence in SEQUENCES])
        np.testing.assert_allclose(forms("float64")[0](params), expected, rtol=0, atol=1e-12)


def test_packed_equals_padded():
    """States, and gradients of a loss over positive and negative items."""
    with jax.enable_x64(True):
        params = random_params(build(), "float64")
        positives, negatives = np.random.default_rng(1).integers(1, NUM_ITEMS, (2, NUM_USED))

        def run(form):
            def loss(params):
                states, table = form(params), params["item_embedding"]["embedding"]
                margin = (states * (table[positives] - table[negatives])).sum(-1)
                return jnp.log1p(jnp.exp(-margin)).mean(), states

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

        in_padded_form, in_packed_form = forms("float64")
        assert_same_tree(run(in_packed_form), run(in_padded_form), 1e-12)


def test_a_state_depends_on_the_items_up_to_it():
    """By gradients, exactly: on every item of its own sequence so far, and on no other.

    No row of the table is used twice, so its gradient belongs to one slot.
    """
    params = random_params(build())
    same = np.equal.outer(PLACES[0], PLACES[0])
    expected = same & np.greater_equal.outer(PLACES[1], PLACES[1])
    for form in forms():
        jacobian = jax.jit(jax.jacrev(form))(params)["item_embedding"]["embedding"]
        depends = (np.asarray(jacobian) != 0).any(axis=(1, 3))  # [T, rows of the table]
        np.testing.assert_array_equal(depends[:, ROWS[:NUM_USED]], expected)
        assert not depends[:, 0].any()


def test_one_pass_gives_the_states_of_all_prefixes():
    """What lets training run over sequences rather than over each of their prefixes."""
    graphdef, params = nnx.split(build())[0], random_params(build())
    apply = jax.jit(lambda params, items: nnx.merge(graphdef, params)(items))
    sequence = max(SEQUENCES, key=len)
    prefixes = [sequence[: t + 1] for t in range(len(sequence))]
    batch, _ = padded(prefixes, MAX_LENGTH, "right")
    alone = np.asarray(apply(params, batch))[np.arange(len(sequence)), np.arange(len(sequence))]
    whole, _ = padded([sequence] * len(sequence), MAX_LENGTH, "right")
    np.testing.assert_allclose(apply(params, whole)[0], alone, atol=1e-6)


@pytest.mark.parametrize("form", [0, 1], ids=["padded", "packed"])
def test_dropout_and_the_padding_row(form):
    """A key means training, the same one the same dropout, and none evaluation.

    In training too, rows of items that are not in the batch and the padding row have exactly
    no gradient: the optimizer's correction of moments goes by that.
    """
    params = random_params(build())
    apply = forms()[form]
    target = np.random.default_rng(1).normal(size=(NUM_USED, DIM))

    def loss(params, key):
        states = apply(params, key)
        return (states * target).sum(), states

    train = jax.jit(jax.grad(loss, has_aux=True))
    # A row stays untouched if dropout takes all of it, so add up over keys.
    gradients, states = zip(*(train(params, jax.random.key(s)) for s in range(8)), strict=True)
    np.testing.assert_array_equal(states[0], train(params, jax.random.key(0))[1])
    np.testing.assert_array_equal(apply(params), apply(params))
    for other in (states[1], apply(params)):
        assert np.any(np.asarray(states[0] != other))

    touched = sum(np.abs(g["item_embedding"]["embedding"]).sum(axis=1) for g in gradients)
    np.testing.assert_array_equal(np.flatnonzero(touched), np.sort(ROWS[:NUM_USED]))


def test_padding_slots_give_the_padding_row_no_gradient():
    """Not even if a loss took their states, which the other tests leave out."""
    graphdef, params = nnx.split(build())[0], random_params(build())

    def loss(params):
        return nnx.merge(graphdef, params)(jnp.asarray(BATCH)).sum()

    table = jax.jit(jax.grad(loss))(params)["item_embedding"]["embedding"]
    assert not table[0].any() and table[BATCH[BATCH > 0]].any()


def test_dropout_is_on_the_embeddings_alone():
    """With an input kernel of zeros nothing of the embeddings arrives, nor any dropout."""
    params = random_params(build())
    params["input_gates"]["kernel"][:] = 0
    params["dense"]["kernel"][:] = 1
    for form in forms():
        np.testing.assert_array_equal(form(params), form(params, jax.random.key(0)))


def test_names_of_the_parameters():
    """Masks, checkpoints and `tables=` patterns rely on them. The gates have no bias."""
    assert set(paths(nnx.to_pure_dict(nnx.state(build())))) == {
        "item_embedding/embedding",
        "input_gates/kernel",
        "hidden_gates/kernel",
        "dense/kernel",
        "dense/bias",
    }


def test_initial_values():
    """The gates' bounds are those of the three gates' stacked matrices."""
    dim, hidden = 20, 24
    params = initial_params(lambda rngs: GRU4Rec(700, dim=dim, hidden_dim=hidden, rngs=rngs))
    assert_normal(params["item_embedding"]["embedding"], math.sqrt(2 / (701 + dim)))
    assert_uniform(params["input_gates"]["kernel"], math.sqrt(6 / (3 * hidden + dim)))
    assert_uniform(params["hidden_gates"]["kernel"], math.sqrt(6 / (4 * hidden)))
    assert_uniform(params["dense"]["kernel"], 1 / math.sqrt(hidden))
    assert_uniform(params["dense"]["bias"], 1 / math.sqrt(hidden))
