"""The paper's optimizers: tables get the SEvo chain, all else the plain optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sevo_jax.adjacency import Graph, normalized_adjacency
from sevo_jax.corrected_adam import scale_by_corrected_adam
from sevo_jax.layouts import Adjacency
from sevo_jax.smoothing import (
    Isolated,
    Method,
    check_decays,
    check_numbers,
    check_schedules,
)
from sevo_jax.tables import Tables, is_stack, table_mask
from sevo_jax.transforms import sevo


def sevo_adamw(
    learning_rate: optax.ScalarOrSchedule,
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
    correct_moments: bool = True,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SEvo-enhanced AdamW, Algorithm 1 of the paper.

    .. math::

      E_t = E_{t-1} - \eta \, \hat\psi\left(\frac{\hat M_t}{\sqrt{\hat V_t} + \epsilon};
      \beta\right) - \eta \lambda E_{t-1}

    for each table :math:`E`, where :math:`\eta` is `learning_rate`, :math:`\lambda` is
    `weight_decay`, :math:`\hat\psi` is :func:`smooth`, and :math:`\hat M, \hat V` are the
    moments of :func:`scale_by_corrected_adam`. The decay is not smoothed and reaches every
    row, padding and cold items too. All other parameters get `optax.adamw`'s steps.

    Args:
      learning_rate: a float, a traced value or a schedule.
      graph: a graph or a prepared adjacency, see :func:`sevo`.
      tables: which parameters are tables, see :func:`sevo`.
      beta: strength of the smoothing in [0, 1).
      num_layers: the paper's L.
      method: `"neumann"`, `"iterative"` or `"exact"`, see :func:`smooth`.
      rescale: make the coefficients of the smoothing sum to one.
      coefficients: the polynomial's own, in place of those settings', see :func:`smooth`.
      isolated: `"scale"` or `"identity"`, see :func:`smooth`.
      every: smooth in every so many steps only, see :func:`sevo`; None for each.
      residual_decay: see :func:`sevo` and :func:`eval_params`; None for the paper's.
      correct_moments: keep the moments of rows without a gradient, in float32 or wider; False
        for plain Adam's, which are of the type of the table.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator, outside of the root.
      eps_root: added inside of the root, see :func:`scale_by_corrected_adam`.
      weight_decay: strength of the decoupled weight decay.
      mask: which parameters decay, a tree of bools or a function of the parameters that
        returns one, as in `optax.adamw`; None for all. Under `inject_hyperparams` name a
        function in its `static_args`, or it is called with the step count.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its `update` takes
      `graph=` and, with `correct_moments`, `touched=`, see :func:`sevo` and
      :func:`scale_by_corrected_adam`.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1], [1, 2]], num_nodes=3)
      >>> params = {"item_embedding": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> def f(p): return jnp.sum((p["item_embedding"][0] + p["bias"] - 1.0) ** 2)
      >>> solver = sevo_jax.sevo_adamw(0.1, graph)
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...   updates, state = solver.update(jax.grad(f)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"Objective function: {f(params):.3f}")
      Objective function: 1.487
      Objective function: 1.056
      Objective function: 0.706
      >>> print(np.asarray(params["item_embedding"])[:, 0].round(3))  # all rows have moved
      [0.111 0.104 0.037]

    .. note::
      `optax.inject_hyperparams` holds numbers in the type of the parameters. In half precision
      that makes 1 of `b2`, for `optax.adamw` as well: give it `hyperparam_dtype=jnp.float32`.

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024
    """
    # First of all: swapped with the rate, it is refused by its name.
    adjacency = normalized_adjacency(graph)
    check_decays("sevo_adamw", b1=b1, b2=b2)
    check_numbers("sevo_adamw", eps=eps, eps_root=eps_root)
    check_schedules("sevo_adamw", learning_rate=learning_rate, weight_decay=weight_decay)
    if isinstance(mask, str):  # Optax takes it for true, of all parameters
        raise TypeError(
            "`sevo_adamw` takes `mask` as a tree of bools or a function of the parameters that "
            f"returns one, but got {mask!r}."
        )
    moments = scale_by_corrected_adam if correct_moments else optax.scale_by_adam
    adam: Any = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    rate = optax.scale_by_learning_rate(learning_rate)
    steps = _smoothed_steps(
        optax.chain(moments(**adam), rate),
        optax.chain(optax.scale_by_adam(**adam), rate),
        adjacency,
        tables,
        beta=beta,
        num_layers=num_layers,
        method=method,
        rescale=rescale,
        coefficients=coefficients,
        isolated=isolated,
        every=every,
        residual_decay=residual_decay,
    )
    decay = _add_decayed_weights(_negative_product(learning_rate, weight_decay), mask)
    return optax.chain(steps, decay)


def sevo_adam(
    learning_rate: optax.ScalarOrSchedule,
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
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SEvo-enhanced Adam, Algorithm 2 of the paper.

    .. math::

      G_t = \nabla_E \mathcal{L} + \lambda E_{t-1}, \qquad
      E_t = E_{t-1} - \eta \, \hat\psi\left(\frac{\hat M_t}{\sqrt{\hat V_t} + \epsilon};
      \beta\right)

    The decay :math:`\lambda` is L2 regularisation, a part of the gradient, and the moments
    are Adam's own, in the type of the table: nothing is corrected for rows without a gradient.
    All other parameters get the same without the smoothing. In half precision the second
    moment is too coarse to decay, and in float16 `eps` is 0: train float32 tables.

    Args:
      learning_rate: a float, a traced value or a schedule.
      graph: a graph or a prepared adjacency, see :func:`sevo`.
      tables: which parameters are tables, see :func:`sevo`.
      beta: strength of the smoothing in [0, 1).
      num_layers: the paper's L.
      method: `"neumann"`, `"iterative"` or `"exact"`, see :func:`smooth`.
      rescale: make the coefficients of the smoothing sum to one.
      coefficients: the polynomial's own, in place of those settings', see :func:`smooth`.
      isolated: `"scale"` or `"identity"`, see :func:`smooth`.
      every: smooth in every so many steps only, see :func:`sevo`; None for each.
      residual_decay: see :func:`sevo` and :func:`eval_params`; None for the paper's.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator, outside of the root.
      eps_root: added inside of the root, see :func:`scale_by_corrected_adam`.
      weight_decay: strength of the L2 regularisation.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its `update` takes
      `graph=`, see :func:`sevo`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1], [1, 2]], num_nodes=3)
      >>> def f(x): return jnp.sum((x[0] - 1.0) ** 2)
      >>> params = jnp.zeros((3, 2))
      >>> solver = sevo_jax.sevo_adam(0.1, graph)
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...   updates, state = solver.update(jax.grad(f)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"Objective function: {f(params):.3f}")
      Objective function: 1.852
      Objective function: 1.709
      Objective function: 1.573

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024
    """
    adjacency = normalized_adjacency(graph)
    check_decays("sevo_adam", b1=b1, b2=b2)
    check_numbers("sevo_adam", eps=eps, eps_root=eps_root)
    check_schedules("sevo_adam", learning_rate=learning_rate, weight_decay=weight_decay)
    step = optax.chain(
        _l2(weight_decay),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _smoothed_steps(
        step,
        step,
        adjacency,
        tables,
        beta=beta,
        num_layers=num_layers,
        method=method,
        rescale=rescale,
        coefficients=coefficients,
        isolated=isolated,
        every=every,
        residual_decay=residual_decay,
    )


def sevo_sgd(
    learning_rate: optax.ScalarOrSchedule,
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
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SEvo-enhanced SGD with momentum, Algorithm 3 of the paper.

    .. math::

      G_t = \nabla_E \mathcal{L} + \lambda E_{t-1}, \qquad
      M_t = \mu M_{t-1} + G_t, \qquad
      E_t = E_{t-1} - \eta \, \hat\psi(M_t; \beta)

    where :math:`\mu` is `momentum` and :math:`\lambda` is `weight_decay`. All other
    parameters get the same without the smoothing.

    Args:
      learning_rate: a float, a traced value or a schedule.
      graph: a graph or a prepared adjacency, see :func:`sevo`.
      tables: which parameters are tables, see :func:`sevo`.
      beta: strength of the smoothing in [0, 1).
      num_layers: the paper's L.
      method: `"neumann"`, `"iterative"` or `"exact"`, see :func:`smooth`.
      rescale: make the coefficients of the smoothing sum to one.
      coefficients: the polynomial's own, in place of those settings', see :func:`smooth`.
      isolated: `"scale"` or `"identity"`, see :func:`smooth`.
      every: smooth in every so many steps only, see :func:`sevo`; None for each.
      residual_decay: see :func:`sevo` and :func:`eval_params`; None for the paper's.
      momentum: decay of the momentum.
      nesterov: smooth :math:`G_t + \mu M_t` instead.
      weight_decay: strength of the L2 regularisation.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its `update` takes
      `graph=`, see :func:`sevo`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1], [1, 2]], num_nodes=3)
      >>> def f(x): return jnp.sum((x[0] - 1.0) ** 2)
      >>> params = jnp.zeros((3, 2))
      >>> solver = sevo_jax.sevo_sgd(0.1, graph)
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...   updates, state = solver.update(jax.grad(f)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"Objective function: {f(params):.3f}")
      Objective function: 1.709
      Objective function: 1.237
      Objective function: 0.727

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024
    """
    adjacency = normalized_adjacency(graph)
    check_decays("sevo_sgd", momentum=momentum)
    check_schedules("sevo_sgd", learning_rate=learning_rate, weight_decay=weight_decay)
    step = optax.chain(
        _l2(weight_decay),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _smoothed_steps(
        step,
        step,
        adjacency,
        tables,
        beta=beta,
        num_layers=num_layers,
        method=method,
        rescale=rescale,
        coefficients=coefficients,
        isolated=isolated,
        every=every,
        residual_decay=residual_decay,
    )


def _smoothed_steps(
    step: optax.GradientTransformation,
    plain: optax.GradientTransformation,
    adjacency: Adjacency,
    tables: Tables,
    **smoothing: Any,
) -> optax.GradientTransformationExtraArgs:
    """The first and psi for the tables, the second for the other parameters.

    Psi comes after the learning rate, with which it commutes: sums over steps have to hold
    each step's own.
    """
    # Of stacked tables psi needs the order. Else they are all that the partition leaves, and a
    # function of the parameters would find placeholders in the place of the others.
    left = tables if is_stack(tables) else lambda params: jax.tree.map(lambda _: True, params)
    smoothed = optax.chain(step, sevo(adjacency, tables=left, **smoothing))
    return by_table(smoothed, plain, adjacency, tables)


def _negative_product(
    rate: optax.ScalarOrSchedule, decay: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule:
    """Minus their product, a schedule if either is one."""

    def at(count: Any) -> Any:
        one: Any = rate(count) if callable(rate) else rate
        other: Any = decay(count) if callable(decay) else decay
        return -one * other

    return at if callable(rate) or callable(decay) else at(0)


def _l2(weight_decay: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Without a decay `update` needs no parameters, as in Optax's own optimizers."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return _add_decayed_weights(weight_decay)


def _add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformation:
    """Optax's, in the type of the updates: most schedules return float32 arrays, which would
    widen those of tables in half precision."""
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decayed, state = decay.update(updates, state, params)
        # They may be Python numbers.
        keep = lambda u, new: jnp.asarray(new, jnp.result_type(u))  # noqa: E731
        return jax.tree.map(keep, updates, decayed), state

    return optax.GradientTransformation(decay.init, update_fn)


def by_table(
    smoothed: optax.GradientTransformation,
    plain: optax.GradientTransformation,
    adjacency: Adjacency,
    tables: Tables,
) -> optax.GradientTransformationExtraArgs:
    """The first for the tables, the second for the other parameters."""

    def labels(params: Any) -> Any:
        mask = table_mask(params, tables, adjacency.num_nodes)
        return jax.tree.map(lambda is_table: "table" if is_table else "other", mask)

    return optax.partition(
        {"table": smoothed, "other": plain}, labels, mask_compatible_extra_args=True
    )
