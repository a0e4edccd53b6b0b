"""The recurrence over packed sequences against one over a padded batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import recurrence
from models.packing import pack
from models.recurrence import gru_cell, packed_gru

MAX_LENGTH, HIDDEN = 9, 3


def padded_gru(weights, inputs, stream, max_length):
    first = jnp.cumsum(stream.lengths) - stream.lengths
    slots = jnp.minimum(first + jnp.arange(max_length)[:, None], len(inputs) - 1)

    def step(hidden, inputs):
        hidden = gru_cell(weights, hidden, inputs)
        return hidden, hidden

    start = jnp.zeros((len(stream.lengths), HIDDEN), inputs.dtype)
    states = jax.lax.scan(step, start, inputs[slots])[1]
    return states[stream.offset, stream.segment]


def case(lengths, spare_slots=0):
    rng = np.random.default_rng(len(lengths))
    num_slots = sum(lengths) + spare_slots
    stream = pack(np.zeros(len(lengths), int), lengths, num_slots)
    inputs = rng.normal(size=(num_slots, 3 * HIDDEN))
    return jnp.asarray(rng.normal(size=(HIDDEN, 3 * HIDDEN))), jnp.asarray(inputs), stream


LENGTHS = {
    "one sequence": [4],
    "as long as can be": [MAX_LENGTH] * 3,
    "some empty": [0, 3, 0, 1, MAX_LENGTH, 0],
    "none at all": [0, 0],
    "many tiles": np.random.default_rng(0).integers(0, MAX_LENGTH + 1, 150).tolist(),
    "full tiles": [2] * 64,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("spare_slots", [1, 40])
def test_equals_padded(lengths, backend, spare_slots, monkeypatch, x64):
    monkeypatch.setattr(recurrence.jax, "default_backend", lambda: backend)
    weights, inputs, stream = case(lengths, spare_slots)

    def values_and_gradients(gru):
        def loss(weights, inputs):
            states = jnp.where(
                stream.used[:, None], gru(weights, inputs, stream, MAX_LENGTH), 0
            )
            return jnp.sin(states * jnp.arange(1, HIDDEN + 1)).sum(), states

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weights, inputs)

    for got, expected in zip(
        jax.tree.leaves(values_and_gradients(packed_gru)),
        jax.tree.leaves(values_and_gradients(padded_gru)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("num_slots", [192, 40])
def test_a_stream_that_is_cut_holds_the_states_of_what_is_left(num_slots, backend, monkeypatch):
    monkeypatch.setattr(recurrence.jax, "default_backend", lambda: backend)
    weights, inputs, whole = case([MAX_LENGTH] * 64)
    cut = pack(np.zeros(64, int), whole.lengths, num_slots)
    expected = packed_gru(weights, inputs, whole, MAX_LENGTH)[:num_slots]
    found = packed_gru(weights, inputs[:num_slots], cut, MAX_LENGTH)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_gradients_have_the_types_of_their_arguments(backend, monkeypatch):
    monkeypatch.setattr(recurrence.jax, "default_backend", lambda: backend)
    weights, inputs, stream = case(LENGTHS["some empty"], 2)
    weights, inputs = weights.astype(jnp.bfloat16), inputs.astype(jnp.float32)

    def loss(weights, inputs):
        return packed_gru(weights, inputs, stream, MAX_LENGTH).sum()

    of_weights, of_inputs = jax.eval_shape(jax.grad(loss, (0, 1)), weights, inputs)
    assert (of_weights.dtype, of_inputs.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_runs_under_vmap_over_weights(backend, monkeypatch, x64):
    monkeypatch.setattr(recurrence.jax, "default_backend", lambda: backend)
    weights, inputs, stream = case(LENGTHS["some empty"], 2)
    several = jnp.stack([weights, 2 * weights])

    def gradient(weights):
        return jax.grad(lambda w: packed_gru(w, inputs, stream, MAX_LENGTH)[:13].sum())(weights)

    np.testing.assert_allclose(
        jax.vmap(gradient)(several), jnp.stack([gradient(w) for w in several]), atol=1e-12
    )
