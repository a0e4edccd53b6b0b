"""The losses of distillation against slow references, by definition and at their limits."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.distillation import Entities, Groups, Scored, dkd, htd, kd, rkd
from tests.models.toys import assert_same_tree

NUM_SLOTS, NUM_ITEMS, DIM, TEACHER_DIM = 7, 9, 3, 5
TARGETS = np.array([0, 8, 3, 3, 1, 5, 2])
WEIGHTS: Any = np.array([1, 2, 0, 1, 1, 0.5, 1], np.float32)


def draw(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dot(states, items):
    return states @ items.T


STUDENT = draw(0, NUM_SLOTS, DIM), draw(1, NUM_ITEMS, DIM)
TEACHER = draw(2, NUM_SLOTS, TEACHER_DIM), draw(3, NUM_ITEMS, TEACHER_DIM)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def over_catalogue(name, student, teacher, weights=WEIGHTS, **settings):
    extra = (jnp.asarray(TARGETS),) if name == "dkd" else ()
    sides = Scored(dot, *student), Scored(dot, *teacher)
    loss: Any = {"kd": kd, "dkd": dkd}[name]
    return loss(*sides, *extra, weights, chunk_size=3, **settings)


def reference(name, temperature):
    """One slot and one item at a time."""
    total = 0.0
    for i, target in enumerate(TARGETS):
        own, soft = (s[i] @ items.T / temperature for s, items in (STUDENT, TEACHER))
        p, q = softmax(soft.astype(float)), softmax(own.astype(float))
        value = divergence(p, q)
        if name == "dkd":
            value = divergence([p[target], 1 - p[target]], [q[target], 1 - q[target]])
            p, q = (np.delete(side, target) / (1 - side[target]) for side in (p, q))
            value += 8 * divergence(p, q)
        total += WEIGHTS[i] * temperature**2 * value
    return total / WEIGHTS.sum()


@pytest.mark.parametrize("name", ["kd", "dkd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_over_the_catalogue_against_the_papers(name, temperature):
    value = over_catalogue(name, STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(value, reference(name, temperature), rtol=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_gradients_over_the_catalogue(name):
    """To the student alone, by differences; none for a student that agrees; and whatever an
    unused slot holds has no part."""
    run = jax.jit(jax.value_and_grad(functools.partial(over_catalogue, name), (0, 1)))
    value, (of_student, of_teacher) = run(STUDENT, TEACHER)
    assert not any(np.any(leaf) for leaf in of_teacher)
    for place, (leaf, gradient) in enumerate(zip(STUDENT, of_student, strict=True)):
        step = np.zeros_like(leaf)
        step[3, 1] = 1e-2
        up, down = (
            over_catalogue(name, (*STUDENT[:place], s, *STUDENT[place + 1 :]), TEACHER)
            for s in (leaf + step, leaf - step)
        )
        np.testing.assert_allclose(gradient[3, 1], (up - down) / 2e-2, rtol=2e-2, atol=1e-3)
    spoilt = [(s.copy(), items) for s, items in (STUDENT, TEACHER)]
    for states, _ in spoilt:
        states[2] = np.nan
    assert_same_tree(run(*spoilt)[0], value, 0)
    same, (nothing, _) = run(TEACHER, TEACHER)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    assert all(np.abs(leaf).max() < 1e-5 for leaf in nothing)


def test_kd_is_dkd_with_the_teachers_weight():
    """The decomposition that the decoupled loss starts from, slot by slot."""
    for slot in range(NUM_SLOTS):
        weights = np.eye(NUM_SLOTS, dtype=np.float32)[slot]
        rest = 1 - softmax(TEACHER[0][slot] @ TEACHER[1].T)[TARGETS[slot]]
        decoupled = over_catalogue("dkd", STUDENT, TEACHER, weights, beta=float(rest))
        coupled = over_catalogue("kd", STUDENT, TEACHER, weights)
        np.testing.assert_allclose(decoupled, coupled, rtol=1e-4, atol=1e-6)


def test_dkd_of_a_teacher_that_is_sure():
    """The exponential of what the target has over the others is no float32 any more."""
    teacher = Scored(dot, 1000 * jnp.eye(NUM_SLOTS, NUM_ITEMS), jnp.eye(NUM_ITEMS))
    targets = jnp.arange(NUM_SLOTS)

    def loss(states):
        student = Scored(dot, states, STUDENT[1])
        return dkd(student, teacher, targets, jnp.ones(NUM_SLOTS))

    value, slope = jax.value_and_grad(loss)(jnp.asarray(STUDENT[0]))
    up, down = (loss(STUDENT[0] + step * np.eye(NUM_SLOTS, DIM)) for step in (0.01, -0.01))
    assert np.isfinite(value)
    np.testing.assert_allclose(jnp.trace(slope), (up - down) / 0.02, rtol=1e-2)


def test_rkd_against_the_paper():
    drawn = [(draw(s, NUM_SLOTS, d), draw(s + 1, 3, NUM_SLOTS, d)) for s, d in ((0, 3), (5, 4))]

    def huber(a, b):
        gap = abs(a - b)
        return gap**2 / 2 if gap < 1 else gap - 0.5

    distances, angles = [], []
    for states, items in drawn:
        away = items - states
        length = np.linalg.norm(away, axis=2)
        mean = (length.mean(axis=0) * WEIGHTS).sum() / WEIGHTS.sum()
        distances.append(length / mean)
        angles.append(
            [
                [
                    away[a, t] @ away[b, t] / length[a, t] / length[b, t]
                    for t in range(NUM_SLOTS)
                ]
                for a, b in ((0, 1), (0, 2), (1, 2))
            ]
        )
    expected = 0.0
    for t, weight in enumerate(WEIGHTS):
        far = np.mean([huber(s[t], r[t]) for s, r in zip(*distances, strict=True)])
        turned = np.mean([huber(s[t], r[t]) for s, r in zip(*angles, strict=True)])
        expected += weight * (2 * far + 3 * turned) / WEIGHTS.sum()
    loss = functools.partial(rkd, distance_weight=2, angle_weight=3)
    value, gradient = jax.value_and_grad(loss)(*drawn, WEIGHTS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.any(gradient[0][2]) and np.any(gradient[0][0])
    of_teacher = jax.grad(loss, argnums=1)(*drawn, WEIGHTS)
    assert not any(np.any(leaf) for leaf in of_teacher)
    # Distances count by their mean, and angles do not see the scale.
    larger = jax.tree.map(lambda x: 10 * x, drawn[0])
    np.testing.assert_allclose(rkd(larger, drawn[0], WEIGHTS), 0, atol=1e-10)
    at_the_state = drawn[0][0], np.stack([drawn[0][0]] * 3)
    assert all(np.isfinite(g).all() for g in jax.grad(rkd)(at_the_state, drawn[1], WEIGHTS))


def test_htd_against_the_paper():
    groups = Groups(DIM, TEACHER_DIM, num_groups=3, rngs=nnx.Rngs(0))
    student: Any = Entities(draw(0, 6, DIM), draw(1, 8, DIM))
    teacher: Any = Entities(draw(2, 6, TEACHER_DIM), draw(3, 8, TEACHER_DIM))
    used: Any = Entities(jnp.arange(6) < 5, jnp.arange(8) != 2)
    key = jax.random.key(1)
    experts = groups.for_users, groups.for_items
    missed, group, pairs = 0.0, [], []
    for place, expert in enumerate(experts):
        noise = jax.random.gumbel(jax.random.fold_in(key, place), (len(teacher[place]), 3))
        for i in np.flatnonzero(used[place]):
            s, t = student[place][i], teacher[place][i]
            liking = softmax(t @ expert.assign[...] + expert.assign_bias[...])
            share = softmax((np.log(liking) + noise[i]) / 0.1)
            mapped = 0
            for k in range(3):
                inner = np.maximum(s @ expert.hidden[...][k] + expert.hidden_bias[...][k], 0)
                outer = inner @ expert.output[...][k] + expert.output_bias[...][k]
                mapped += share[k] * outer
            missed += ((t - mapped) ** 2).sum()
            group.append((place, int(np.argmax(liking))))
            pairs.append((s, t))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    topology = 0.0
    for i, (s, t) in enumerate(pairs):
        for j, (other_s, other_t) in enumerate(pairs):
            if group[i] == group[j]:
                topology += (cosine(s, other_s) - cosine(t, other_t)) ** 2
    means = {
        g: [
            np.mean([p[side] for p, h in zip(pairs, group, strict=True) if h == g], axis=0)
            for side in (0, 1)
        ]
        for g in set(group)
    }
    for s, t in means.values():
        for other_s, other_t in means.values():
            topology += (cosine(s, other_s) - cosine(t, other_t)) ** 2
    value = htd(groups, student, teacher, used, key, gamma=0.3)
    np.testing.assert_allclose(value, (0.3 * topology + 0.7 * missed) / 5, rtol=1e-4)
    loss = jax.jit(lambda student, teacher: htd(groups, student, teacher, used, key))
    gradient, of_teacher = jax.jit(jax.grad(loss, (0, 1)))(student, teacher)
    assert not np.any(gradient.users[5]) and not np.any(gradient.items[2])
    assert np.any(gradient.users[0]) and np.any(gradient.items[0])
    assert not any(np.any(leaf) for leaf in of_teacher)
    # By differences, so that it passes through the means, too.
    step = Entities(draw(7, 6, DIM), draw(8, 8, DIM))
    moved = [jax.tree.map(lambda x, d, e=e: x + e * d, student, step) for e in (1e-3, -1e-3)]
    sides = [loss(one, teacher) for one in moved]
    slope = sum((g * d).sum() for g, d in zip(gradient, step, strict=True))
    np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2e-3, rtol=2e-2)
    # What does not count may hold anything.
    spoilt = jax.tree.map(lambda x, c: np.where(c[:, None], x, np.nan), teacher, used)
    np.testing.assert_array_equal(loss(student, spoilt), loss(student, teacher))


def test_bad_settings():
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        over_catalogue("kd", STUDENT, TEACHER, temperature=0)
    with pytest.raises(
        ValueError, match="the 1 items that the student scores, but it scores 9"
    ):
        over_catalogue("dkd", (STUDENT[0], STUDENT[1][:1]), TEACHER)
    one = draw(0, NUM_SLOTS, 2), draw(1, 1, NUM_SLOTS, 2)
    with pytest.raises(ValueError, match="takes two items of a slot or more, got 1"):
        rkd(one, one, WEIGHTS)
    with pytest.raises(ValueError, match="`num_groups` must be a positive integer, got 0"):
        Groups(DIM, TEACHER_DIM, num_groups=0, rngs=nnx.Rngs(0))
    groups = Groups(DIM, DIM, num_groups=2, rngs=nnx.Rngs(0))
    both = Entities(draw(0, 2, DIM), draw(1, 2, DIM))
    used = Entities(jnp.ones(2, bool), jnp.ones(2, bool))
    for settings, message in (
        ({"gumbel_temperature": 0}, "`gumbel_temperature` must be positive, got 0"),
        ({"gamma": 2}, r"`gamma` must lie in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            htd(groups, both, both, used, jax.random.key(0), **settings)


def test_another_number_of_slots_or_items_is_refused():
    weights, narrow = jnp.ones(3), Scored(dot, jnp.ones((3, 2)), jnp.ones((4, 2)))
    short = narrow._replace(states=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="must have 3 of them, as `weights`"):
        kd(narrow, short, weights)
    with pytest.raises(ValueError, match="must have 3 of them, as `weights`"):
        dkd(narrow, narrow, jnp.ones(1, int), weights)
    single = narrow._replace(items=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="`dkd` needs two items or more"):
        dkd(single, single, jnp.zeros(3, int), weights)
    for states, items in ((jnp.ones((1, 5)), jnp.ones((2, 3, 5))), (jnp.ones((3, 5)),
                           jnp.ones((4, 3, 5)))):  # fmt: skip
        with pytest.raises(ValueError, match="`rkd` takes as many slots and items"):
            rkd((jnp.ones((3, 2)), jnp.ones((2, 3, 2))), (states, items), weights)
    student = Entities(jnp.ones((2, 3)), jnp.ones((4, 3)))
    teacher = Entities(jnp.ones((1, 5)), jnp.ones((4, 5)))
    used = Entities(jnp.ones(2, bool), jnp.ones(4, bool))
    with pytest.raises(ValueError, match="`htd` takes as many users .* but got 2, 1, 2"):
        htd(
            Groups(3, 5, num_groups=2, rngs=nnx.Rngs(0)),
            student,
            teacher,
            used,
            jax.random.key(0),
        )
