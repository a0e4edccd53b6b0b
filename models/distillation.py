r"""Losses by which a small recommender, the student, learns from a larger one, the teacher.

`kd` and `dkd` compare what both think of every item after a slot of a sequence; `rkd` and `htd`
compare how vectors lie to each other, in spaces of different width. No gradient reaches the
teacher. The SEvo paper's Table 5 names these methods without their settings: the defaults are
those of its authors' earlier code for distillation, where that has any.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.layers import check_positive, check_sizes, uniform
from models.losses import mean_in_chunks, weighted_mean
from models.scoring import Items, States

TINY = 1e-12  # under a square root, where the gradient would be infinite


class Scored(NamedTuple):
    """What gives a score to every item after each of T slots."""

    score_all: Callable[[States, Items], jax.Array]  # `[C, N]` of C states and all items
    states: States  # leaves [T, ...]
    items: Items  # leaves [N, ...]


def kd(
    student: Scored,
    teacher: Scored,
    weights: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int = 128,
) -> jax.Array:
    r"""Soft targets: how far the student's distribution over items is from the teacher's.

    .. math::

      \tau^2 \, \mathrm{KL}\left( \mathrm{softmax}(s^T / \tau) \,\|\,
      \mathrm{softmax}(s^S / \tau) \right)

    averaged over slots. A class of the original is an item of the catalogue here. Scores
    `[T, N]` never exist: see `models.losses.cross_entropy`.

    Args:
      student: gets the gradient.
      teacher: scores the same items for the same slots.
      weights: `[T]`, 0 for slots that do not count.
      temperature: tau. It is 1 as scores are trained as log-odds of items.
      chunk_size: slots at a time. Memory grows with `chunk_size` times N.

    References:
      Hinton et al., `Distilling the knowledge in a neural network
      <https://arxiv.org/abs/1503.02531>`_, 2015
    """

    def divergence(scores: jax.Array, soft: jax.Array, _: None) -> jax.Array:
        wanted = jax.nn.log_softmax(soft)
        return (jnp.exp(wanted) * (wanted - jax.nn.log_softmax(scores))).sum(axis=1)

    return _over_catalogue(divergence, student, teacher, None, weights, temperature, chunk_size)


def dkd(
    student: Scored,
    teacher: Scored,
    targets: jax.Array,
    weights: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    chunk_size: int = 128,
) -> jax.Array:
    r"""`kd` in two parts of their own weight: how sure of the target, and what instead of it.

    .. math::

      \tau^2 \left( \alpha \, \mathrm{KL}(b^T \| b^S) +
      \beta \, \mathrm{KL}(\hat p^T \| \hat p^S) \right)

    where :math:`b` are the probabilities of the target and of all else, and :math:`\hat p`
    those of the other items among themselves. With alpha 1 and beta the teacher's probability
    of all else, slot by slot, it would be `kd`.

    Args:
      student, teacher, weights, temperature, chunk_size: see `kd`.
      targets: int `[T]`, the place of each slot's next item among the N.
      alpha: weight of the target's part.
      beta: weight of the others' part.

    References:
      Zhao et al., `Decoupled knowledge distillation <https://arxiv.org/abs/2203.08679>`_,
      CVPR 2022
    """

    def divergence(scores: jax.Array, soft: jax.Array, targets: jax.Array) -> jax.Array:
        if scores.shape[1] < 2:
            raise ValueError("`dkd` needs two items or more, beside a target another one.")
        hit = targets[:, None] == jnp.arange(scores.shape[1])
        sides = []
        for side in (soft, scores):
            target = jnp.where(hit, side, 0).sum(axis=1)
            rest = jax.nn.logsumexp(jnp.where(hit, -jnp.inf, side), axis=1)
            total = jnp.logaddexp(target, rest)
            # Not only its sum leaves out the target: its exponential may be infinite.
            others = jnp.where(hit, 0, side - rest[:, None])
            sides.append((target - total, rest - total, others))
        (sure, unsure, others), (own_sure, own_unsure, own_others) = sides
        of_target = jnp.exp(sure) * (sure - own_sure) + jnp.exp(unsure) * (unsure - own_unsure)
        of_others = jnp.where(hit, 0, jnp.exp(others) * (others - own_others)).sum(axis=1)
        return alpha * of_target + beta * of_others

    return _over_catalogue(
        divergence, student, teacher, targets, weights, temperature, chunk_size
    )


def _over_catalogue(
    divergence: Callable[[jax.Array, jax.Array, Any], jax.Array],
    student: Scored,
    teacher: Scored,
    targets: jax.Array | None,
    weights: jax.Array,
    temperature: float,
    chunk_size: int,
) -> jax.Array:
    """Weighted mean of `divergence(scores, teacher's scores, targets)`, `[C]` of `[C, N]`."""
    check_positive(temperature=temperature)

    def of_chunk(items: Any, states: States, fixed: Any) -> jax.Array:
        own, teachers = items
        teacher_states, targets = fixed
        scores = student.score_all(states, own)
        soft = teacher.score_all(teacher_states, jax.lax.stop_gradient(teachers))
        if soft.shape != scores.shape:
            raise ValueError(
                f"The teacher must score the {scores.shape[1]} items that the student scores, "
                f"but it scores {soft.shape[1]}."
            )
        return temperature**2 * divergence(scores / temperature, soft / temperature, targets)

    items, fixed = (student.items, teacher.items), (teacher.states, targets)
    return mean_in_chunks(
        of_chunk, items, student.states, fixed, weights, chunk_size=chunk_size
    )


def rkd(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    weights: jax.Array,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 1.0,
) -> jax.Array:
    r"""Relations: how far items lie from a slot's state, and in which directions.

    With Huber's loss l of width 1, and :math:`\mu` the mean distance on each side,

    .. math::

      w_D \, l\left( \frac{\|u - i\|}{\mu^S}, \frac{\|u - i\|}{\mu^T} \right) +
      w_A \, l\left( \cos \angle^S (i, u, j), \cos \angle^T (i, u, j) \right)

    averaged over slots. The original takes all pairs and triplets of a batch of images. A
    recommender ranks by how items lie to a state, so the pairs here are the state u of a slot
    with its items, the target and the drawn negatives, and the triplets have u in the middle.

    Args:
      student: states `[T, d]` and the slots' items `[m, T, d]`, two or more.
      teacher: the same in its own width.
      weights: `[T]`, 0 for slots that do not count.
      distance_weight, angle_weight: of the two terms; for classes of images the original takes
        25 and 50.

    References:
      Park et al., `Relational knowledge distillation <https://arxiv.org/abs/1904.05068>`_,
      CVPR 2019
    """
    if len(student[1]) < 2:
        raise ValueError(f"`rkd` takes two items of a slot or more, got {len(student[1])}.")
    if student[1].shape[:2] != teacher[1].shape[:2] or len(student[0]) != len(teacher[0]):
        raise ValueError(
            "`rkd` takes as many slots and items of the teacher as of the student, but got "
            f"states {teacher[0].shape} and items {teacher[1].shape} beside "
            f"{student[0].shape} and {student[1].shape}."
        )
    (distances, angles), (wanted, wanted_angles) = (
        _relations(*side, weights) for side in (student, jax.lax.stop_gradient(teacher))
    )
    of_distances = optax.losses.huber_loss(distances, wanted).mean(axis=0)
    of_angles = optax.losses.huber_loss(angles, wanted_angles).mean(axis=0)
    return weighted_mean(distance_weight * of_distances + angle_weight * of_angles, weights)


def _relations(
    states: jax.Array, items: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Distances of items from states over their mean, `[m, T]`, and cosines of the angles
    between each two items as seen from the state, `[m (m - 1) / 2, T]`."""
    away = jnp.where((weights > 0)[:, None], items - states, 0)
    distances = jnp.sqrt((away**2).sum(axis=-1) + TINY)
    mean = weighted_mean(distances.mean(axis=0), weights)
    unit = away / distances[..., None]
    first, second = jnp.triu_indices(len(items), 1)
    angles = (unit[first] * unit[second]).sum(axis=-1)
    return distances / jnp.where(mean > 0, mean, 1), angles


class Entities(NamedTuple):
    """Users and items as one of the two models has them."""

    users: jax.Array  # [n, d]
    items: jax.Array  # [m, d]


class Experts(nnx.Module):
    """K small networks from the student's space to the teacher's, and whom each is for.

    Args:
      dim, teacher_dim: the widths of the two spaces.
      num_groups: K.
      rngs: for the parameters.
    """

    def __init__(self, dim: int, teacher_dim: int, num_groups: int, *, rngs: nnx.Rngs):
        check_sizes(dim=dim, teacher_dim=teacher_dim, num_groups=num_groups)
        middle = (dim + teacher_dim) // 2

        def param(fan_in: int, *shape: int) -> nnx.Param:
            return nnx.Param(uniform(fan_in**-0.5)(rngs.params(), shape, jnp.float32))

        self.hidden = param(dim, num_groups, dim, middle)
        self.hidden_bias = param(dim, num_groups, middle)
        self.output = param(middle, num_groups, middle, teacher_dim)
        self.output_bias = param(middle, num_groups, teacher_dim)
        self.assign = param(teacher_dim, teacher_dim, num_groups)
        self.assign_bias = param(teacher_dim, num_groups)

    def preferences(self, teacher: jax.Array) -> jax.Array:
        """How much the teacher's vectors `[n, teacher_dim]` belong to each group, `[n, K]`
        unnormalised logarithms."""
        return teacher @ self.assign[...] + self.assign_bias[...]

    def __call__(self, student: jax.Array, shares: jax.Array) -> jax.Array:
        """The student's `[n, d]` in the teacher's space, by experts' `shares` `[n, K]`."""
        hidden = jnp.einsum("nd,kdh->nkh", student, self.hidden[...]) + self.hidden_bias[...]
        mixed = jax.nn.relu(hidden) * shares[..., None]
        return jnp.tensordot(mixed, self.output[...], 2) + shares @ self.output_bias[...]


class Groups(nnx.Module):
    """What `htd` trains beside the student: experts for users and others for items."""

    def __init__(self, dim: int, teacher_dim: int, *, num_groups: int = 30, rngs: nnx.Rngs):
        self.for_users = Experts(dim, teacher_dim, num_groups, rngs=rngs)
        self.for_items = Experts(dim, teacher_dim, num_groups, rngs=rngs)


def htd(
    groups: Groups,
    student: Entities,
    teacher: Entities,
    used: Entities,
    key: jax.Array,
    *,
    gamma: float = 0.5,
    gumbel_temperature: float = 0.1,
) -> jax.Array:
    r"""Topology in two levels: within groups of entities, and between the groups.

    Entities are users and items, apart. The teacher's vector :math:`t` chooses an entity's
    group; in training its share of each group k is a Gumbel soft-max z, and expert :math:`f_k`
    maps the student's s. Entities of a group belong together as one expert can map them all.

    .. math::

      \gamma \left( \sum_{g(i) = g(j)} (\cos_{ij}^S - \cos_{ij}^T)^2 +
      \sum_{a, b} (\cos_{ab}^S - \cos_{ab}^T)^2 \right) +
      (1 - \gamma) \sum_i \Big\| t_i - \sum_k z_{ik} f_k(s_i) \Big\|^2

    over the number of users, where a and b are the groups that occur, each the mean of its
    members. It is the paper's sum, for a base loss that is a mean. As in the paper, and unlike
    its code, gradients also reach the means; the temperature stays where the code starts it.

    Args:
      groups: parameters that train with the student.
      student: `[n, d]` and `[m, d]`.
      teacher: `[n, teacher_dim]` and `[m, teacher_dim]`.
      used: bool `[n]` and `[m]`, whether an entity counts.
      key: for the shares.
      gamma: weight of the topology; the rest is that of the experts.
      gumbel_temperature: of the shares, towards 0 all of one group.

    References:
      Kang et al., `Topology distillation for recommender system
      <https://arxiv.org/abs/2106.08700>`_, KDD 2021
    """
    check_positive(gumbel_temperature=gumbel_temperature)
    if not 0 <= gamma <= 1:
        raise ValueError(f"`htd`: `gamma` must lie in [0, 1], got {gamma}.")
    for kind, *sizes in zip(
        Entities._fields, *(map(len, side) for side in (student, teacher, used)), strict=True
    ):
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`htd` takes as many {kind} of the student, of the teacher and in `used`, but "
                f"got {', '.join(map(str, sizes))}."
            )
    # What does not count may hold anything, and 0 times NaN is NaN.
    student, teacher = (
        Entities(*(jnp.where(c[:, None], x, 0) for x, c in zip(side, used, strict=True)))
        for side in (student, jax.lax.stop_gradient(teacher))
    )
    of_experts, members = 0.0, []
    sides = zip((groups.for_users, groups.for_items), student, teacher, used, strict=True)
    for place, (experts, own, wanted, counts) in enumerate(sides):
        preferences = experts.preferences(wanted)
        drawn = jax.random.gumbel(jax.random.fold_in(key, place), preferences.shape)
        logarithms = jax.nn.log_softmax(preferences) + drawn
        shares = jax.nn.softmax(logarithms / gumbel_temperature)
        missed = ((wanted - experts(own, shares)) ** 2).sum(axis=1)
        of_experts += jnp.where(counts, missed, 0).sum()
        chosen = jax.nn.one_hot(preferences.argmax(axis=1), preferences.shape[1])
        members.append(chosen * counts[:, None])
    # Users and items have groups of their own: [n + m, 2 K].
    member = jax.scipy.linalg.block_diag(*members)
    together = member @ member.T
    size = member.sum(axis=0)
    occur = (size > 0).astype(member.dtype)
    within, between = [], []
    for side in (student, teacher):
        vectors = jnp.concatenate(side)
        within.append(_cosines(vectors))
        between.append(_cosines(member.T @ vectors / jnp.maximum(size, 1)[:, None]))
    topology = (together * (within[0] - within[1]) ** 2).sum()
    topology += (jnp.outer(occur, occur) * (between[0] - between[1]) ** 2).sum()
    total = gamma * topology + (1 - gamma) * of_experts
    return total / jnp.maximum(used.users.sum(), 1)


def _cosines(vectors: jax.Array) -> jax.Array:
    """Of the angles between all pairs of `[n, d]`, `[n, n]`."""
    unit = vectors * jax.lax.rsqrt((vectors**2).sum(axis=1, keepdims=True) + TINY)
    return unit @ unit.T
