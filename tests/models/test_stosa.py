"""STOSA against a slow forward pass of its specification, and packed against padded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import STOSA
from tests.models.toys import (
    BATCH,
    MAX_LENGTH,
    NUM_ITEMS,
    NUM_USED,
    PLACES,
    ROWS,
    SEQUENCES,
    abstract,
    assert_normal,
    assert_packed_equals_padded,
    assert_same_tree,
    forms,
    gradients_in_training,
    initial_params,
    packed,
    paths,
    random_params,
)

DIM = 6
TABLES = ("item_mean", "item_covariance", "position_mean", "position_covariance")


def build(max_length=MAX_LENGTH, dtype="float32", **options) -> STOSA:
    options = {"dim": DIM, "num_heads": 2, "dropout_rate": 0.4} | options
    module = abstract(
        lambda rngs: STOSA(NUM_ITEMS, max_length=max_length, **options, rngs=rngs), dtype
    )
    for name in TABLES:  # an `Embed` casts to the type that it was built with
        getattr(module, name).dtype = jnp.dtype(dtype)
    return module


def slow_elu(x):
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def slow_root(x):
    return np.sqrt(np.maximum(x, 1e-24))


def slow_states(params, sequence, num_heads, fixed) -> tuple[np.ndarray, np.ndarray]:
    """The forward pass for one sequence of S slots, one slot, one head, one key at a time.

    A key is masked, as in the published code, by adding -(2^32 - 1) to its logit.
    """
    dim = params["item_mean"]["embedding"].shape[1]
    width = dim // num_heads

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        spread = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-12)
        return (x - x.mean()) / spread * layer["scale"] + layer["bias"]

    def embed(kind, t):
        item = params[f"item_{kind}"]["embedding"][sequence[t]]
        return norm(params["input_norm"], item + params[f"position_{kind}"]["embedding"][t])

    slots = range(len(sequence))
    m = np.array([slow_elu(embed("mean", t)) for t in slots])
    c = np.array([slow_elu(embed("covariance", t)) + 1 for t in slots])
    for index in sorted(params["blocks"]):
        block = params["blocks"][index]
        mean, covariance = block["mean"], block["covariance"]

        def after(layers, attended, x, block=block):
            x = norm(block["attention_norm"], linear(layers["out"], attended) + x)
            hidden = slow_elu(linear(layers["hidden"], x))
            return norm(layers["forward_norm"], linear(layers["output"], hidden) + x)

        q_m, k_m = np.split(linear(mean["query_key"], m), 2, axis=1)
        q_c, k_c = np.split(slow_elu(linear(covariance["query_key"], c)) + 1, 2, axis=1)
        v_m, v_c = linear(mean["value"], m), slow_elu(linear(covariance["value"], c)) + 1
        new_m, new_c = np.zeros_like(m), np.zeros_like(c)
        for i in slots:
            attended_m, attended_c = np.zeros(dim), np.zeros(dim)
            for head in range(num_heads):
                own = slice(head * width, (head + 1) * width)
                logits = []
                for j in slots:
                    distance = ((q_m[i, own] - k_m[j, own]) ** 2).sum()
                    distance += q_c[i, own].sum() + k_c[j, own].sum()
                    distance -= 2 * (slow_root(q_c[i, own]) * slow_root(k_c[j, own])).sum()
                    masked = j > i or sequence[j] == 0
                    logits.append(-distance / math.sqrt(width) - masked * (2**32 - 1))
                weights = np.exp(np.array(logits) - max(logits))
                weights /= weights.sum()
                for j in slots:
                    attended_m[own] += weights[j] * v_m[j, own]
                    attended_c[own] += weights[j] ** 2 * v_c[j, own]
            new_m[i] = after(mean, attended_m, m[i])
            new_c[i] = slow_elu(after(covariance, attended_c, c[i])) + 1
        m, c = (new_m if fixed else m), new_c
    return m, c


@pytest.mark.parametrize(
    ("num_heads", "num_blocks", "fixed"), [(1, 1, False), (2, 2, False), (3, 2, True)]
)
def test_forward_pass(num_heads, num_blocks, fixed):
    """In double precision, so that 1e-12 leaves no room for a slightly different formula."""
    with jax.enable_x64(True):
        options = {"num_heads": num_heads, "num_blocks": num_blocks, "fixed": fixed}
        module = build(**options, dtype="float64")
        params = random_params(module, "float64")
        actual = [jax.jit(form)(params) for form in forms(module)]
    slow = [slow_states(params, sequence, num_heads, fixed) for sequence in BATCH]
    expected = tuple(np.stack(states)[PLACES] for states in zip(*slow, strict=True))
    assert_same_tree(actual, [expected, expected], 1e-12)


def test_scores():
    """Minus the distance of Wasserstein, by a loop; with rows so low that ELU + 1 is 0."""
    with jax.enable_x64(True):
        module = build(dtype="float64")
        params, rng = random_params(module, "float64"), np.random.default_rng(1)
        params["item_covariance"]["embedding"][5] = -800
        graphdef = nnx.split(module)[0]
        means, covariances = rng.normal(size=(4, DIM)), rng.uniform(0, 2, (4, DIM))
        covariances[1] = 0
        rows, others = np.array([3, 5, 5, 16]), np.array([7, 5, 9, 2])
        states = jnp.asarray(means), jnp.asarray(covariances)

        @jax.jit
        def run(params):
            module = nnx.merge(graphdef, params)
            items, other_items = (
                module.items(jnp.asarray(rows)),
                module.embed(jnp.asarray(others)),
            )
            several = jax.tree.map(lambda *x: jnp.stack(x), items, other_items)
            return {
                "all": module.score_all(states, module.items()),
                "pairs": module.score(states, items),
                "several": module.score(states, several)[1],
                "items": module.item_score(items, other_items),
            }

        actual = run(params)

    def item(row):
        mean, covariance = (params[name]["embedding"][row] for name in TABLES[:2])
        return mean, slow_elu(covariance) + 1

    def score(one, other):
        distance = ((one[0] - other[0]) ** 2).sum()
        return -distance - ((slow_root(one[1]) - slow_root(other[1])) ** 2).sum()

    users = list(zip(means, covariances, strict=True))
    expected = {
        "all": [[score(user, item(row)) for row in range(1, NUM_ITEMS + 1)] for user in users],
        "pairs": [score(user, item(row)) for user, row in zip(users, rows, strict=True)],
        "several": [score(user, item(row)) for user, row in zip(users, others, strict=True)],
        "items": [score(item(a), item(b)) for a, b in zip(rows, others, strict=True)],
    }
    assert_same_tree(actual, {k: np.array(v) for k, v in expected.items()}, 1e-12)
    assert np.asarray(actual["items"])[1] == 0  # an item's distance from itself


@pytest.mark.parametrize(
    ("max_length", "num_blocks", "fixed"), [(MAX_LENGTH, 1, False), (6, 2, True)]
)
def test_packed_equals_padded(max_length, num_blocks, fixed):
    """By the published loss with both of its terms."""
    drawn = np.random.default_rng(1).integers(1, NUM_ITEMS, (2, NUM_USED))
    positives, negatives = jnp.asarray(drawn)

    def loss(module, states):
        positive, negative = module.items(positives), module.items(negatives)
        target = module.score(states, positive)
        losses = jax.nn.softplus(module.score(states, negative) - target)
        return (losses + jax.nn.relu(module.item_score(positive, negative) - target)).mean()

    with jax.enable_x64(True):
        module = build(max_length, num_blocks=num_blocks, fixed=fixed, dtype="float64")
        assert_packed_equals_padded(module, loss)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_state_depends_on_the_items_up_to_it(fixed):
    """By gradients, exactly: on every item of its own sequence so far, and on no other.

    In the published network a mean depends on its own item's mean alone. No row of a table is
    used twice, so its gradient belongs to one slot.
    """
    module = build(fixed=fixed)
    params = random_params(module)
    same = np.equal.outer(PLACES[0], PLACES[0])
    so_far = same & np.greater_equal.outer(PLACES[1], PLACES[1])
    alone = np.eye(NUM_USED, dtype=bool)
    expected = {
        ("mean", "item_mean"): so_far if fixed else alone,
        ("mean", "item_covariance"): so_far if fixed else np.zeros_like(alone),
        ("covariance", "item_mean"): so_far,
        ("covariance", "item_covariance"): so_far,
    }
    # A first item attends to itself alone: the weight is 1, whatever the distance.
    first = PLACES[1] == [MAX_LENGTH - len(SEQUENCES[row]) for row in PLACES[0]]
    for state, table in (("mean", "item_covariance"), ("covariance", "item_mean")):
        expected[state, table] = expected[state, table] & ~first[:, None]
    for form in forms(module):
        jacobians = jax.jit(jax.jacrev(form))(params)
        for (state, table), depends in expected.items():
            jacobian = jacobians[["mean", "covariance"].index(state)][table]["embedding"]
            found = (np.asarray(jacobian) != 0).any(axis=(1, 3))  # [T, rows of the table]
            np.testing.assert_array_equal(found[:, ROWS[:NUM_USED]], depends)
            assert not found[:, 0].any()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("form", [0, 1], ids=["padded", "packed"])
def test_dropout_and_parameters_without_gradient(form, fixed):
    """Nor have those layers of the means a gradient that the published network leaves out."""
    module = build(fixed=fixed, attention_dropout_rate=0.3)
    tables = ("item_mean", "item_covariance")
    total = gradients_in_training(forms(module)[form], random_params(module), tables)
    leaves = zip(paths(total), jax.tree.leaves(total), strict=True)
    untrained = {name for name, leaf in leaves if not leaf.any()}
    linear = ("value", "out", "hidden", "output")
    layers = {f"{name}/{p}" for name in linear for p in ("kernel", "bias")}
    layers |= {"forward_norm/scale", "forward_norm/bias"}
    assert untrained == (set() if fixed else {f"blocks/0/mean/{name}" for name in layers})


def test_padding_has_no_influence():
    """Not even non-finite values of its row pass, and three more slots of it change nothing,
    the items' positions being the same vectors; padding slots themselves stay finite."""
    extra, params, broken = 3, random_params(build()), random_params(build())
    for table, position in zip(TABLES[:2], TABLES[2:], strict=True):
        broken[table]["embedding"][0] = np.nan
        wide = np.pad(params[position]["embedding"], ((extra, 0), (0, 0)))
        broken[position]["embedding"] = wide
    batch = np.concatenate([BATCH, np.zeros((1, MAX_LENGTH), np.int32)])
    states = []
    for width, p in ((0, params), (extra, broken)):
        graphdef = nnx.split(build(MAX_LENGTH + width, fixed=True))[0]
        apply = jax.jit(lambda p, items, graphdef=graphdef: nnx.merge(graphdef, p)(items))
        output = np.asarray(apply(p, np.pad(batch, ((0, 0), (width, 0)))))
        assert np.all(np.isfinite(output))
        states.append(output[:, :, width:][:, *PLACES])
    np.testing.assert_allclose(states[1], states[0], rtol=0, atol=1e-5)


def test_extreme_rows_and_unused_slots_stay_finite():
    """Rows where ELU + 1 rounds to 0, equal distributions, and streams that hold nothing."""
    module = build(fixed=True)
    graphdef, params = nnx.split(module)[0], random_params(module)
    params["item_covariance"]["embedding"][3:6] = -100
    for layer in ("query_key", "value"):
        params["blocks"][0]["covariance"][layer]["bias"][:] = -100

    def loss(params, rows, stream):
        module = nnx.merge(graphdef, params)
        items = module.embed(rows)
        states = module.packed(items, stream)
        others = jax.tree.map(lambda leaf: leaf[::-1], items)
        scores = module.score(states, items) + module.item_score(items, others)
        scores += module.score_all(states, module.items()).sum(axis=1)
        return (scores + module.item_score(items, items)).sum(), states

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for sequences in ([[], []], [[3, 4, 5], [3, 3, 7]]):
        results = run(params, *packed(sequences, 7))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))


def test_names_of_the_parameters():
    """Masks, checkpoints and `tables=` patterns rely on them."""
    layers = ["query_key", "value", "out", "hidden", "output"]
    expected = {f"{name}/embedding" for name in TABLES}
    norms = ["input_norm"]
    for i in (0, 1):
        norms += [f"blocks/{i}/attention_norm"]
        for part in ("mean", "covariance"):
            norms += [f"blocks/{i}/{part}/forward_norm"]
            linear = [f"blocks/{i}/{part}/{name}" for name in layers]
            expected |= {f"{name}/{p}" for name in linear for p in ("kernel", "bias")}
    expected |= {f"{name}/{p}" for name in norms for p in ("scale", "bias")}
    names = paths(nnx.to_pure_dict(nnx.state(build(num_blocks=2))))  # not parameters alone
    assert len(names) == len(expected) and set(names) == expected


def test_initial_values():
    """Every matrix normal with mean 0.01 and deviation 0.02, and drawn on its own."""
    params = initial_params(
        lambda rngs: STOSA(700, dim=24, max_length=30, num_blocks=1, rngs=rngs)
    )
    shapes, drawn = {}, []
    for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if name.endswith("norm/scale"):
            assert np.all(leaf == 1)
        elif name.endswith("bias"):
            assert not leaf.any()
        else:
            assert_normal(leaf - 0.01, 0.02)
            drawn.append(leaf.ravel()[:30].tobytes())
            shapes[name] = leaf.shape
    assert len(set(drawn)) == len(drawn) == 14
    assert shapes["item_mean/embedding"] == shapes["item_covariance/embedding"] == (701, 24)
    assert shapes["blocks/0/mean/hidden/kernel"] == (24, 96)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`dim` must be a multiple of `num_heads`, got 6, 4"):
        build(num_heads=4)
