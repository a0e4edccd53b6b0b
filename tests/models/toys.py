"""Small batches that the model tests share, padded and packed by plain Python."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

from models.packing import Packed, pack

# Table rows: of full length, of length 1, of all lengths between; no row twice, so that a
# gradient with respect to a row of the table belongs to one slot.
MAX_LENGTH = 5
SEQUENCES = ([3, 1, 12], [9], [4, 8, 2, 11, 6], [5, 7], [14, 10, 15, 13])
NUM_ITEMS = 16

# Where packed and padded forms, or JAX and NumPy, must agree: dtype, absolute tolerance.
PRECISIONS = [("float32", 1e-6), ("float64", 1e-12)]


def precision(dtype: str):
    """A context in which JAX computes in `dtype`."""
    return jax.enable_x64(dtype == "float64")


def padded(
    sequences: Sequence[Sequence[int]], max_length: int, side: Literal["left", "right"] = "left"
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """`[B, S]` with zeros on one side, and the (row, column) of each item in packed order."""
    batch = np.zeros((len(sequences), max_length), np.int32)
    places = []
    for row, sequence in enumerate(sequences):
        for t, item in enumerate(sequence):
            column = t + (max_length - len(sequence) if side == "left" else 0)
            batch[row, column] = item
            places.append((row, column))
    rows, columns = np.array(places, int).reshape(-1, 2).T
    return batch, (rows, columns)


def packed(sequences: Sequence[Sequence[int]], num_slots: int) -> tuple[np.ndarray, Packed]:
    """Table rows `[num_slots]`, 0 where unused, and the stream of the same sequences."""
    items = [item for sequence in sequences for item in sequence]
    lengths = np.array([len(sequence) for sequence in sequences])
    rows = np.zeros(num_slots, np.int32)
    rows[: len(items)] = items
    return rows, pack(np.cumsum(lengths) - lengths, lengths, num_slots)


def abstract(build: Callable[[nnx.Rngs], nnx.Module], dtype: str = "float32") -> Any:
    """A module without values, which compiles nothing; `random_params` gives them."""
    module: Any = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    # An `Embed` casts to the type that it was built with.
    for name in ("item_embedding", "position_embedding"):
        if hasattr(module, name):
            getattr(module, name).dtype = jnp.dtype(dtype)
    return module


def random_params(module: Any, dtype: str = "float32", scale: float = 0.4) -> dict[str, Any]:
    """NumPy parameters as a plain dict, all drawn alike: biases and norms at their initial 0
    and 1, and small embeddings, would hide mistakes."""
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree.map(lambda p: rng.normal(0, scale, p.shape).astype(dtype), params)


def initial_params(build: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, Any]:
    """NumPy parameters as the module draws them, in one compiled program."""

    @jax.jit
    def init(key):
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    return jax.tree.map(np.asarray, init(jax.random.key(3)))


def paths(params: dict[str, Any]) -> list[str]:
    """The parameters' names, as "blocks/0/query/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def assert_same_tree(actual: Any, expected: Any, atol: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected
    )


def assert_normal(values: Any, std: float) -> None:
    """A Kolmogorov-Smirnov test: a cut or a wrong spread shows with some hundred numbers."""
    assert stats.kstest(np.ravel(values) / std, "norm").pvalue > 1e-3


def assert_uniform(values: Any, bound: float) -> None:
    assert np.abs(values).max() <= bound
    assert stats.kstest((np.ravel(values) / bound + 1) / 2, "uniform").pvalue > 1e-3


# The sequences padded on the left, and packed with unused slots that hold what no sequence has.
BATCH, PLACES = padded(SEQUENCES, MAX_LENGTH)
ROWS, STREAM = packed(SEQUENCES, 19)
NUM_USED = sum(map(len, SEQUENCES))
ROWS[NUM_USED:] = 16


def forms(module: Any):
    """Both forms of an attention model as functions of the parameters, giving the states of
    real slots, leaves `[T, dim]`."""
    graphdef = nnx.split(module)[0]
    batch, places = padded(SEQUENCES, module.max_length)

    def in_padded_form(params, key=None):
        states = nnx.merge(graphdef, params)(jnp.asarray(batch), dropout_key=key)
        return jax.tree.map(lambda leaf: leaf[places], states)

    def in_packed_form(params, key=None):
        module = nnx.merge(graphdef, params)
        states = module.packed(module.embed(jnp.asarray(ROWS)), STREAM, dropout_key=key)
        return jax.tree.map(lambda leaf: leaf[:NUM_USED], states)

    return jax.jit(in_padded_form), jax.jit(in_packed_form)


def assert_packed_equals_padded(module: Any, loss: Callable[[Any, Any], jax.Array]) -> None:
    """States, and gradients of `loss(module, states)`, of a module in double precision."""
    graphdef, params = nnx.split(module)[0], random_params(module, "float64")

    def run(form):
        def value(params):
            states = form(params)
            return loss(nnx.merge(graphdef, params), states), states

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    in_padded_form, in_packed_form = forms(module)
    assert_same_tree(run(in_packed_form), run(in_padded_form), 1e-12)


def cross_entropy(logits: jax.Array) -> jax.Array:
    """Of random targets, `[T, columns]` to a scalar."""
    targets = np.random.default_rng(1).integers(0, logits.shape[1], len(logits))
    return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), targets].mean()


def assert_unused_slots_stay_finite(module: Any) -> None:
    """Those that fill up the last tile, and a stream that holds nothing, with gradients."""
    graphdef, params = nnx.split(module)[0], random_params(module)
    rows, stream = packed([[], []], 7)

    def loss(params):
        module = nnx.merge(graphdef, params)
        states = module.packed(module.embed(jnp.asarray(rows)), stream)
        return (states**2).sum(), states

    results = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))


def gradients_in_training(apply: Any, params: dict[str, Any], tables: Sequence[str]) -> Any:
    """Sum of absolute gradients over eight draws of dropout, after checks for all models.

    A key means training, the same one the same dropout, and none evaluation. In training too,
    rows of items that are not in the batch and the padding row have exactly no gradient: the
    optimizer's correction of moments goes by that. A row stays untouched if dropout takes all
    of it, hence the sum.
    """
    leaves = jax.tree.leaves(jax.eval_shape(apply, params))
    rng = np.random.default_rng(1)
    targets = [rng.normal(size=leaf.shape) for leaf in leaves]

    def loss(params, key):
        states = jax.tree.leaves(apply(params, key))
        return sum((s * t).sum() for s, t in zip(states, targets, strict=True)), states

    train = jax.jit(jax.grad(loss, has_aux=True))
    gradients, states = zip(*(train(params, jax.random.key(s)) for s in range(8)), strict=True)
    again = train(params, jax.random.key(0))[1]
    evaluated, twice = (jax.tree.leaves(apply(params)) for _ in range(2))
    for i in range(len(leaves)):
        np.testing.assert_array_equal(states[0][i], again[i])
        np.testing.assert_array_equal(evaluated[i], twice[i])
        for other in (states[1][i], evaluated[i]):
            assert np.any(np.asarray(states[0][i] != other))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    total = jax.tree.map(lambda *g: sum(np.abs(leaf) for leaf in g), *gradients)
    for table in tables:
        touched = np.flatnonzero(total[table]["embedding"].sum(axis=1))
        np.testing.assert_array_equal(touched, np.sort(ROWS[:NUM_USED]))
    return total


def assert_item_rows_seen(form: Any, params: dict[str, Any], expected: np.ndarray) -> None:
    """Which items each state depends on, by gradients and exactly: `expected` bool `[T, T]`.

    No row of the table is used twice, so its gradient belongs to one slot.
    """
    jacobian = jax.jit(jax.jacrev(form))(params)["item_embedding"]["embedding"]
    depends = (np.asarray(jacobian) != 0).any(axis=(1, 3))  # [T, rows of the table]
    np.testing.assert_array_equal(depends[:, ROWS[:NUM_USED]], expected)
    assert not depends[:, 0].any()
