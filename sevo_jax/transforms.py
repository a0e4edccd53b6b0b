"""The smoother as an Optax gradient transformation: in every step, rarely, with a residual."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sevo_jax.adjacency import Graph, normalized_adjacency
from sevo_jax.ids import is_integer
from sevo_jax.smoothing import Isolated, Method, check_share, check_smoothing, smooth
from sevo_jax.tables import Tables, leaf_paths, table_groups


def sevo(
    graph: Graph,
    *,
    tables: Tables = None,
    beta: jax.typing.ArrayLike | optax.Schedule = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool | jax.Array = True,
    coefficients: jax.typing.ArrayLike | None = None,
    isolated: Isolated = "scale",
    every: int | None = None,
    residual_decay: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Smooth the updates of embedding tables along a graph; pass all others through.

    .. math::

      E_t = E_{t-1} + \hat\psi(\Delta E_{t-1}; \beta), \qquad
      \hat\psi(X; \beta) = \frac{1-\beta}{1-\beta^{L+1}} \sum_{l=0}^{L} \beta^l \tilde A^l X

    where :math:`\Delta E` is what the transformations before it propose. Placed after Adam's
    rescaling, as :func:`sevo_adamw` does, it smooths the step that the paper smooths. Placed
    first, as in `optax.chain(sevo(graph), optax.adamw(1e-3))`, it smooths the gradient, and
    Adam then rescales each entry of the result on its own.

    Args:
      graph: a graph or a prepared adjacency. `update(..., graph=adjacency)` overrides it by a
        traced argument, so that the graph is no constant of the compiled program; it does so
        in every `sevo` of a chain.
      tables: which parameters are tables `[num_nodes, d]`. A string is a regular expression
        searched in paths like `"item_embedding/embedding"`; all that match share the graph.
        A tuple of strings names tables that are stacked in that order, as users and items of
        a :func:`bipartite_graph`: together they have `num_nodes` rows. A tree of bools, or
        a function of the parameters that returns one, selects as in `optax.masked` (with
        Flax NNX the function, as its optimizer hands on another tree). None takes the one
        parameter of shape `[num_nodes, d]`. Under `inject_hyperparams`, which calls every
        function with the step count, name a function in its `static_args`.
      beta: strength in [0, 1): a scalar, one per column `[d]`, traced, or a schedule.
      num_layers: the paper's L.
      method: `"neumann"`, `"iterative"` or `"exact"`, see :func:`smooth`.
      rescale: make the coefficients sum to one.
      coefficients: the polynomial's own, in place of those settings', see :func:`smooth`.
      isolated: `"scale"` or `"identity"`, see :func:`smooth`.
      every: smooth in every so many steps only, see the note below; None for each step.
      residual_decay: let gradients see for a while what psi has taken from the updates, see
        the note below: the share of it that stays from step to step, in [0, 1), a scalar or
        one per column `[d]`; None for none.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=3)
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> solver = optax.chain(sevo_jax.sevo(graph, beta=0.5), optax.sgd(0.1))
      >>> params = jnp.array([[0.0], [1.0], [2.0]])
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...   updates, state = solver.update(jax.grad(f)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"Objective function: {f(params):.3f}")
      Objective function: 1.596
      Objective function: 1.274
      Objective function: 1.017

    .. note::
      With `every` k > 1 the updates of k - 1 steps pass as they are, and the k-th is
      :math:`\Delta E_k + \hat\psi(S) - S` where S is the sum of all k. As psi is linear, the
      table has then moved by :math:`\hat\psi(S)`, as if psi had smoothed every update; only
      gradients in between see the table before that, and a decoupled weight decay
      :math:`\eta\lambda` shrinks it, which changes at most a share :math:`k\eta\lambda` of
      the movement. It divides psi's time by k and keeps one more table, S. What comes after it
      must not rescale its updates, so it stands after the moments and the learning rate, as in
      :func:`sevo_adamw`. Under `jit` it has no reverse-mode derivative.

    .. note::
      With `residual_decay` :math:`\rho` what psi removes from an update is added as well, and
      fades:

      .. math::

        R_t = \rho R_{t-1} + \Delta E_t - \hat\psi(\Delta E_t), \qquad
        E_t = E_{t-1} + \Delta E_t - (1 - \rho) R_{t-1}

      The table to validate, test and serve is :math:`E_t - R_t`, which :func:`eval_params`
      returns. It moves by :math:`\hat\psi(\Delta E_t)` as without this, but the gradients are
      those at :math:`E_t`, where rows differ as their own data have it, and so is a decoupled
      weight decay. It keeps one more table. As with `every`, tables are float32 or wider and
      nothing after it may rescale the updates, nor smooth those of the same table.

    .. note::
      One row of NaN spreads to every row within L hops in this update, and in the layout
      `"dense"` to all. Only the row itself keeps it in Adam's moments. `optax.apply_if_finite`
      around the whole optimizer drops such a step before it changes parameters or state.

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024
    """
    check_smoothing("sevo", beta, num_layers, method, isolated, rescale, coefficients)
    # Not 1 by default: `inject_hyperparams` would make a traced number of that.
    every = 1 if every is None else every
    if not is_integer(every) or not 1 <= every < 2**31:
        raise ValueError(
            f"`sevo`: `every` must be a positive Python integer below 2**31, got {every!r}. "
            "Under `inject_hyperparams` make it static: `static_args=('num_layers', 'every')`."
        )
    if residual_decay is not None:
        kinds = "a number or an array (a schedule by way of `optax.inject_hyperparams`)"
        check_share("sevo", "residual_decay", residual_decay, kinds)
        if every > 1:
            raise ValueError("`sevo` takes `every` or `residual_decay`, but got both.")
    prepared = normalized_adjacency(graph)
    kind: Any = optax.ScaleByScheduleState if callable(beta) else optax.EmptyState
    held = None  # the setting for which the state holds a table
    if every > 1:
        kind, held = SmoothEveryState, "every"
    elif residual_decay is not None:
        kind, held = ResidualState, "residual_decay"

    def init_fn(params: optax.Params) -> optax.OptState:
        groups = table_groups(params, tables, prepared.num_nodes)
        if kind is optax.EmptyState:
            return kind()
        count = jnp.zeros([], jnp.int32)
        return kind(count, _no_updates(params, groups, held)) if held else kind(count)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        graph: Graph | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        if not isinstance(state, kind):  # or what another kind holds would be lost in silence
            raise ValueError(
                f"`sevo`: `state` must be a {kind.__name__} with these `every`, "
                f"`residual_decay` and `beta`, but is {type(state).__name__}, which other "
                "settings made."
            )
        adjacency = prepared if graph is None else normalized_adjacency(graph)
        strength = beta(state.count) if callable(beta) else beta

        def psi(tables: list[jax.Array]) -> list[jax.Array]:
            smoothed = smooth(
                adjacency,
                tables[0] if len(tables) == 1 else jnp.concatenate(tables),
                beta=strength,
                num_layers=num_layers,
                method=method,
                rescale=rescale,
                coefficients=coefficients,
                isolated=isolated,
            )
            parts = jnp.split(smoothed, np.cumsum([len(x) for x in tables[:-1]]))
            return [part.astype(x.dtype) for part, x in zip(parts, tables, strict=True)]

        groups = table_groups(updates, tables, adjacency.num_nodes)
        if every > 1:
            return _smooth_every(every, psi, groups, updates, state)
        if residual_decay is not None:
            return _keep_residual(residual_decay, psi, groups, updates, state)
        leaves, treedef = jax.tree.flatten(updates)
        for group in groups:
            for i, smoothed in zip(group, psi([leaves[i] for i in group]), strict=True):
                leaves[i] = smoothed
        if callable(beta):
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SmoothEveryState(NamedTuple):
    """State of :func:`sevo` that does not smooth in every step."""

    count: jax.Array  # shape=(), dtype=int32
    unsmoothed: optax.Updates  # sums since it last did, of tables alone


class ResidualState(NamedTuple):
    """State of :func:`sevo` with `residual_decay`."""

    count: jax.Array  # shape=(), dtype=int32
    residual: optax.Updates  # R, of tables alone


def eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters to validate, test and serve, where `residual_decay` is in use.

    Args:
      opt_state: of an optimizer that may hold any number of :func:`sevo`; also as Flax's
        `nnx.state` and checkpoints have it, with mappings in the place of named tuples.
      params: the parameters that it trains.

    Returns:
      `params` without the residuals that `opt_state` holds, see :func:`sevo`; as they are
      where it holds none.

    Raises:
      ValueError: `params` lacks a table that `opt_state` has residuals of, or has another in
        its place.
    """

    def is_state(node: Any) -> bool:
        if not isinstance(node, Mapping) or set(node) != set(ResidualState._fields):
            return isinstance(node, ResidualState)
        # Parameters of these names have moments, but those are no integers.
        types = {jnp.result_type(count) for count in jax.tree.leaves(node["count"])}
        return len(types) == 1 and jnp.issubdtype(types.pop(), jnp.integer)

    if any(map(is_state, jax.tree.leaves(params, is_leaf=is_state))):
        raise TypeError(
            "`eval_params` takes `opt_state`, then `params`, but `params` is a state."
        )
    # By their paths, as Flax NNX has its own boxes for the leaves of parameters and states.
    paths, leaves = leaf_paths(params)
    places = {path: i for i, path in enumerate(paths)}
    for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
        residual = state["residual"] if isinstance(state, Mapping) else state.residual
        for path, taken in zip(*leaf_paths(residual), strict=True):
            i = places.get(path)
            if i is None or np.shape(leaves[i]) != np.shape(taken):
                found = "it is not there" if i is None else f"there it is {np.shape(leaves[i])}"
                raise ValueError(
                    "`params` must be the tree that `opt_state` was made for, which has "
                    f"{'/'.join(path) or '(root)'} of shape {np.shape(taken)}, but {found}."
                )
            leaves[i] = leaves[i] - taken
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _no_updates(params: optax.Params, groups: list[list[int]], name: str) -> optax.Updates:
    leaves, treedef = jax.tree.flatten(params)
    chosen = {i for group in groups for i in group}
    for dtype in {jnp.result_type(leaves[i]) for i in chosen}:
        if dtype.itemsize < 4:
            raise TypeError(
                f"`sevo` with `{name}` needs tables of float32 or wider, but got {dtype}, "
                "which rounds away much of the updates whose sum is taken back."
            )
    return treedef.unflatten(
        jnp.zeros_like(p) if i in chosen else optax.MaskedNode() for i, p in enumerate(leaves)
    )


def _by_place(
    kept: optax.Updates, groups: list[list[int]]
) -> tuple[dict[int, jax.Array], Callable[[dict[int, jax.Array]], optax.Updates]]:
    """What a state keeps of tables by their places among the leaves, and the way back."""
    places = sorted(i for group in groups for i in group)
    leaves, treedef = jax.tree.flatten(kept)
    if len(leaves) != len(places):
        raise ValueError(
            f"`sevo` keeps sums of {len(leaves)} tables, but found updates of {len(places)}. "
            "Give zeros where a table has no gradient."
        )
    return dict(zip(places, leaves, strict=True)), lambda new: treedef.unflatten(
        new[i] for i in places
    )


def _smooth_every(
    every: int,
    psi: Callable[[list[jax.Array]], list[jax.Array]],
    groups: list[list[int]],
    updates: optax.Updates,
    state: SmoothEveryState,
) -> tuple[optax.Updates, SmoothEveryState]:
    count = jnp.asarray(optax.safe_increment(state.count))
    due = (count % every == 0).astype(jnp.int32)
    leaves, treedef = jax.tree.flatten(updates)
    sums, as_kept = _by_place(state.unsmoothed, groups)

    def smoothed(_: Any, carry: Any) -> Any:
        new, totals = carry
        both = zip(new, psi(totals), totals, strict=True)
        return [u + (y - t) for u, y, t in both], [jnp.zeros_like(t) for t in totals]

    for group in groups:
        # In the type of the sums: rounded to half precision, what takes them back would not.
        new = [leaves[i].astype(sums[i].dtype) for i in group]
        carry = new, [u + sums[i] for u, i in zip(new, group, strict=True)]
        if isinstance(due, Tracer):
            # A loop of one turn or none: `vmap` would take both branches of a `cond`, and XLA
            # would copy what passes through it.
            carry = jax.lax.fori_loop(0, due, smoothed, carry)
        elif due:  # outside of `jit`, where the loop would be compiled anew each time
            carry = smoothed(0, carry)
        for i, u, t in zip(group, *carry, strict=True):
            leaves[i], sums[i] = u, t
    state = SmoothEveryState(count, as_kept(sums))
    return treedef.unflatten(leaves), state


def _keep_residual(
    decay: jax.typing.ArrayLike,
    psi: Callable[[list[jax.Array]], list[jax.Array]],
    groups: list[list[int]],
    updates: optax.Updates,
    state: ResidualState,
) -> tuple[optax.Updates, ResidualState]:
    leaves, treedef = jax.tree.flatten(updates)
    residual, as_kept = _by_place(state.residual, groups)
    for group in groups:
        new = [leaves[i].astype(residual[i].dtype) for i in group]
        if jnp.shape(decay) not in ((), (new[0].shape[1],)):
            raise ValueError(
                "`sevo`: `residual_decay` must be a scalar or have an entry for each of the "
                f"{new[0].shape[1]} columns, got shape {jnp.shape(decay)}."
            )
        for i, u, smoothed in zip(group, new, psi(new), strict=True):
            kept = jnp.asarray(decay, u.dtype) * residual[i]
            leaves[i] = u - (residual[i] - kept)
            residual[i] = kept + (u - smoothed)
    count = jnp.asarray(optax.safe_increment(state.count))
    state = ResidualState(count, as_kept(residual))
    return treedef.unflatten(leaves), state
