"""BERT4Rec against a slow forward pass of its specification, and packed against padded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import BERT4Rec
from tests.models.toys import (
    BATCH,
    MAX_LENGTH,
    NUM_ITEMS,
    PLACES,
    abstract,
    assert_item_rows_seen,
    assert_packed_equals_padded,
    assert_same_tree,
    assert_uniform,
    assert_unused_slots_stay_finite,
    cross_entropy,
    forms,
    gradients_in_training,
    initial_params,
    paths,
    random_params,
)

DIM = 6


def build(max_length=MAX_LENGTH, dtype="float32", **options) -> BERT4Rec:
    options = {"dim": DIM, "num_blocks": 1, "num_heads": 2, "dropout_rate": 0.5} | options
    return abstract(
        lambda rngs: BERT4Rec(NUM_ITEMS, max_length=max_length, **options, rngs=rngs), dtype
    )


def slow_states(params, sequence, num_heads) -> np.ndarray:
    """The forward pass for one sequence of S slots, one slot, one head, one key at a time.

    Line by line: normalised sum of item and position; in each block, attention to every slot
    but padding, and a feed-forward layer with the exact GELU, each added to its input and
    then normalised. Padding slots are left at 0.
    """
    items = params["item_embedding"]["embedding"]
    positions = params["position_embedding"]["embedding"]
    real = [t for t, item in enumerate(sequence) if item]
    dim = items.shape[1]
    width = dim // num_heads

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        spread = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return (x - x.mean()) / spread * layer["scale"] + layer["bias"]

    h = np.zeros((len(sequence), dim))
    for t in real:
        h[t] = norm(params["input_norm"], items[sequence[t]] + positions[t])
    for index in sorted(params["blocks"]):
        block = params["blocks"][index]
        new = np.zeros_like(h)
        for t in real:
            query = linear(block["query_key_value"], h[t])[:dim]
            attended = np.zeros(dim)
            for head in range(num_heads):
                own = slice(head * width, (head + 1) * width)
                weights, values = [], []
                for s in real:
                    projected = linear(block["query_key_value"], h[s])
                    key, value = projected[dim : 2 * dim], projected[2 * dim :]
                    weights.append(math.exp(query[own] @ key[own] / math.sqrt(width)))
                    values.append(value[own])
                for weight, value in zip(weights, values, strict=True):
                    attended[own] += weight / sum(weights) * value
            y = norm(block["attention_norm"], h[t] + linear(block["out"], attended))
            hidden = linear(block["hidden"], y)
            hidden = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden])
            new[t] = norm(block["forward_norm"], y + linear(block["output"], hidden))
        h = new
    return h


@pytest.mark.parametrize("num_heads", [1, 3])
def test_forward_pass(num_heads):
    """States and logits, in double precision: 1e-12 leaves no room for another formula."""
    with jax.enable_x64(True):
        module = build(num_blocks=2, num_heads=num_heads, dtype="float64")
        params = random_params(module, "float64")
        in_padded_form, in_packed_form = forms(module)
        graphdef = nnx.split(module)[0]
        rows = np.array([2, 9, 9, 17])

        @jax.jit
        def run(params):
            module, states = nnx.merge(graphdef, params), in_padded_form(params)
            some, all_rows = module.items(jnp.asarray(rows)), module.all_rows()
            return {
                "padded": states,
                "packed": in_packed_form(params),
                "all rows": module.score_all(states, all_rows),
                "items": module.score_all(states, module.items()),
                "some": module.score_all(states, some),
                "pairs": module.score(states[:4], some),
            }

        slow = np.stack([slow_states(params, sequence, num_heads) for sequence in BATCH])
        states = slow[PLACES]
        logits = states @ params["output_embedding"]["embedding"].T + params["output_bias"]
        expected = {
            "padded": states,
            "packed": states,
            "all rows": logits,
            "items": logits[:, 2:],
            "some": logits[:, rows],
            "pairs": logits[np.arange(4), rows],
        }
        assert_same_tree(run(params), expected, 1e-12)


@pytest.mark.parametrize(("max_length", "num_blocks"), [(MAX_LENGTH, 2), (6, 1)])
def test_packed_equals_padded(max_length, num_blocks):
    """By the cross-entropy over all rows; an odd and an even length."""

    def loss(module, states):
        return cross_entropy(module.score_all(states, module.all_rows()))

    with jax.enable_x64(True):
        module = build(max_length, num_blocks=num_blocks, dtype="float64")
        assert_packed_equals_padded(module, loss)


def test_a_state_depends_on_all_items_of_its_sequence():
    """By gradients, exactly: on items before and after it, and on no other sequence."""
    module = build()
    params = random_params(module)
    expected = np.equal.outer(PLACES[0], PLACES[0])
    for form in forms(module):
        assert_item_rows_seen(form, params, expected)


@pytest.mark.parametrize("form", [0, 1], ids=["padded", "packed"])
def test_dropout_and_the_padding_row(form):
    module = build()
    gradients_in_training(forms(module)[form], random_params(module), ["item_embedding"])


def test_padding_has_no_influence():
    """Not even non-finite values of its row pass, and three more slots of it change nothing,
    the items' positions being the same vectors; padding slots themselves stay finite."""
    extra, params = 3, random_params(build())
    broken = random_params(build())
    broken["item_embedding"]["embedding"][0] = np.nan
    positions = params["position_embedding"]["embedding"]
    broken["position_embedding"]["embedding"] = np.pad(positions, ((extra, 0), (0, 0)))
    empty = np.zeros((1, MAX_LENGTH), np.int32)
    batch = np.concatenate([BATCH, empty])
    states = []
    for width, p in ((0, params), (extra, broken)):
        graphdef = nnx.split(build(MAX_LENGTH + width))[0]
        apply = jax.jit(lambda p, items, graphdef=graphdef: nnx.merge(graphdef, p)(items))
        output = np.asarray(apply(p, np.pad(batch, ((0, 0), (width, 0)))))
        assert np.all(np.isfinite(output))
        states.append(output[:, width:][PLACES])
    np.testing.assert_allclose(states[1], states[0], rtol=0, atol=1e-6)


def test_unused_slots_stay_finite():
    assert_unused_slots_stay_finite(build())


def test_names_of_the_parameters():
    """Masks, checkpoints and `tables=` patterns rely on them."""
    layers = ["query_key_value", "out", "hidden", "output"]
    expected = {
        f"blocks/{i}/{name}/{p}" for i in (0, 1) for name in layers for p in ("kernel", "bias")
    }
    norms = [f"blocks/{i}/{name}_norm" for i in (0, 1) for name in ("attention", "forward")]
    expected |= {f"{name}/{p}" for name in [*norms, "input_norm"] for p in ("scale", "bias")}
    expected |= {f"{name}_embedding/embedding" for name in ("item", "position", "output")}
    expected |= {"output_bias"}
    names = paths(nnx.to_pure_dict(nnx.state(build(num_blocks=2))))  # not parameters alone
    assert len(names) == len(expected) and set(names) == expected


def test_initial_values():
    """Xavier-normal, clamped at 0.02; all blocks begin with the same input projection."""
    num_items, dim = 20_000, 24
    params = initial_params(
        lambda rngs: BERT4Rec(num_items, dim=dim, max_length=30, num_blocks=2, rngs=rngs)
    )
    tables = [params[f"{name}_embedding"]["embedding"] for name in ("item", "output")]
    assert [table.shape for table in tables] == [(num_items + 2, dim)] * 2
    blocks = [params["blocks"][i] for i in (0, 1)]
    clamped = [*tables, params["position_embedding"]["embedding"]]
    clamped += [
        block[name]["kernel"] for block in blocks for name in ("out", "hidden", "output")
    ]
    for values in clamped:
        std = math.sqrt(2 / sum(values.shape))
        assert np.abs(values).max() == np.float32(0.02)
        assert abs(values.mean()) < 5 * 0.02 / math.sqrt(values.size)
        np.testing.assert_allclose((values**2).mean(), _clamped_variance(std), rtol=0.03)
    assert len({values.ravel()[:99].tobytes() for values in clamped}) == len(clamped)

    projections = [block["query_key_value"]["kernel"] for block in blocks]
    assert_uniform(projections[0], math.sqrt(6 / (4 * dim)))
    np.testing.assert_array_equal(*projections)

    for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if name.endswith("bias"):
            assert not leaf.any()
        elif name.endswith("scale"):
            assert np.all(leaf == 1)


def _clamped_variance(std: float, bound: float = 0.02) -> float:
    """E[min(|x|, bound)^2] for a normal x, by a sum over a fine grid."""
    x = (np.arange(200_000) + 0.5) / 200_000 * 8 * std
    density = np.exp(-((x / std) ** 2) / 2)
    return float((np.minimum(x, bound) ** 2 * density).sum() / density.sum())


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`dim` must be a multiple of `num_heads`, got 6, 4"):
        build(num_heads=4)
