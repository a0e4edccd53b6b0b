"""The operator psi: a polynomial in the normalised adjacency."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sevo_jax.adjacency import Graph, normalized_adjacency
from sevo_jax.ids import check_choice, is_integer
from sevo_jax.layouts import Adjacency

Method: TypeAlias = Literal["neumann", "iterative", "exact"]
Isolated: TypeAlias = Literal["scale", "identity"]
TOLERANCE = 1e-6  # of the exact method, relative to the norm of the table


def smooth(
    adjacency: Graph,
    x: jax.typing.ArrayLike,
    *,
    beta: jax.typing.ArrayLike = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool | jax.Array = True,
    coefficients: jax.typing.ArrayLike | None = None,
    isolated: Isolated = "scale",
) -> jax.Array:
    r"""Smooth a table along the edges of a graph.

    .. math::

      \hat\psi(X; \beta) = \frac{1-\beta}{1-\beta^{L+1}} \sum_{l=0}^{L} \beta^l \tilde A^l X

    where :math:`\tilde A` is the `adjacency`, :math:`X` is `x` and :math:`L` is `num_layers`.
    It is linear in `x` and symmetric. With the default `method` and `rescale` it is positive
    definite, too, and keeps the vector of square roots of the degrees. Larger :math:`\beta`
    means smoother; 0 is the identity. Derivatives take the adjacency for a constant. Those in
    forward mode (`jax.jvp`, `jax.hessian`) and `jax.linear_transpose` exist in the layouts
    `"edges"`, `"dense"` and `"padded"` only, those in reverse mode in all.

    Args:
      adjacency: prepared by :func:`normalized_adjacency`, or a graph.
      x: table `[num_nodes, d]`. Half precision is smoothed in float32 and cast back.
      beta: strength in [0, 1), a scalar or `[d]`, one for each column. May be traced; traced,
        it may reach 1, where the exact method gives NaN.
      num_layers: how many hops a row can reach, the paper's L. The exact method has no limit.
      method: `"neumann"`; or `"iterative"` for
        :math:`\beta^L \tilde A^L X + (1-\beta) \sum_{l<L} \beta^l \tilde A^l X`; or `"exact"`
        for their limit :math:`(1-\beta) (I - \beta \tilde A)^{-1} X`, to an error of 1e-6 of
        the norm of `x` and the rounding of its products with the adjacency, 103 of them at beta
        0.99: in float32 up to some 1e-5 of the norm for a beta of 0.999, and with `messages` in
        bfloat16 up to 1e-2.
      rescale: make the Neumann coefficients sum to one. Without it they sum to
        :math:`1-\beta^{L+1}`. Those of the other methods always sum to one. May be traced.
      coefficients: :math:`c_0` to :math:`c_L` of :math:`\sum_l c_l \tilde A^l X`, `[L + 1]`, or
        `[L + 1, d]` with some for each column; in place of what the settings above make, which
        then have no effect. May be traced, and not be given for the exact method. Zeros at the
        end change nothing: so several L can share one compiled program, see
        `sevo_jax.smoothing.coefficients_of`.
      isolated: what becomes of rows without an edge: `"scale"` multiplies them by the first
        coefficient (0.254 by default) as the official code does, `"identity"` keeps them.

    Returns:
      The smoothed table `[num_nodes, d]` in the dtype of `x`.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=4)
      >>> x = jnp.array([[1.0], [0.0], [0.0], [1.0]])
      >>> for beta in (0.0, 0.5, 0.99):
      ...   y = sevo_jax.smooth(graph, x, beta=beta)
      ...   print(np.asarray(y).ravel().round(3))
      [1. 0. 0. 1.]
      [0.6   0.236 0.067 0.533]
      [0.378 0.352 0.124 0.254]

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024, Theorem 1
    """
    if callable(beta):
        raise TypeError(f"`smooth` takes `beta` as a number or an array, but got {beta!r}.")
    check_smoothing("smooth", beta, num_layers, method, isolated, rescale, coefficients)
    adjacency = jax.lax.stop_gradient(normalized_adjacency(adjacency))
    x = _table("smooth", x)
    wide = _widen("smooth", adjacency, x)
    if jnp.ndim(beta) and jnp.shape(beta) != x.shape[1:]:
        raise ValueError(
            f"`smooth` takes `beta` as a scalar or of shape [d={x.shape[1]}], but got "
            f"{jnp.shape(beta)}."
        )
    if coefficients is not None and jnp.shape(coefficients)[1:] not in ((), x.shape[1:]):
        raise ValueError(
            f"`smooth` takes `coefficients` of shape [L + 1] or [L + 1, d={x.shape[1]}], but "
            f"got {jnp.shape(coefficients)}."
        )
    kind = jnp.result_type(beta)
    if kind.itemsize < 4 and jnp.issubdtype(kind, jnp.floating):
        beta = jnp.asarray(beta, jnp.float32)  # in half precision they would not sum to one
    if method == "exact":
        if not isinstance(beta, Tracer):
            # A float64 may be below 1 and yet be 1 in the type of the table.
            rounded = np.asarray(beta).astype(wide.dtype)
            check_share("smooth", "beta", rounded, "a number or an array")
        strength = jnp.asarray(beta, wide.dtype).reshape(1, -1)
        y = adjacency.columnwise(_solve, strength, wide)
        if isinstance(beta, Tracer):
            y = jnp.where(strength < 1, y, jnp.nan)  # where there is no inverse, _solve gives 0
    else:
        rows: Any = coefficients
        if rows is None:
            rows = coefficients_of(beta, num_layers, method, rescale)
        stacked = jnp.stack([jnp.asarray(row, wide.dtype).reshape(1, -1) for row in rows])
        y = adjacency.polynomial(stacked, wide)
    y = y.astype(x.dtype)
    if isolated == "identity":
        y = jnp.where(adjacency.isolated[:, None], x, y)
    return y


@jax.jit  # or each call outside of `jit` would compile the loop anew
def _solve(adjacency: Adjacency, beta: jax.Array, x: jax.Array) -> jax.Array:
    """(1 - beta) (I - beta A~)^-1 x, with beta `[1, 1 or d]`."""
    product = jnp.stack([jnp.zeros_like(beta), beta])
    return jax.lax.custom_linear_solve(
        lambda y: y - adjacency.polynomial(product, y),
        (1 - beta) * x,
        lambda _, b: _chebyshev(adjacency, b, beta),
        symmetric=True,
    )


def _chebyshev(adjacency: Adjacency, start: jax.Array, beta: jax.Array) -> jax.Array:
    """(I - beta A~)^-1 start, by Chebyshev's semi-iteration.

    The eigenvalues of A~ lie in [-1, 1], so its weights are known beforehand: the result is
    linear in `start`, and the number of steps depends on beta alone (Golub and Varga, 1961).
    """
    product = jnp.stack([jnp.zeros_like(beta), beta])
    rate = beta / (1 + jnp.sqrt(1 - beta**2))  # k steps leave 2 rate^k of the error
    num_steps = jnp.ceil(jnp.log(2 / TOLERANCE) / -jnp.log(rate)).max().astype(jnp.int32)

    def step(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y, before, weight = carry
        weight = 1 / (1 - beta**2 * weight / 4)
        move = adjacency.polynomial(product, y) + start - before
        return before + weight * move, y, weight

    first = adjacency.polynomial(product, start) + start
    carry = first, start, jnp.full_like(beta, 2)
    return jax.lax.fori_loop(1, num_steps, step, carry)[0]


def coefficients_of(
    beta: Any,
    num_layers: Any,
    method: Method,
    rescale: bool | jax.Array,
    most_layers: int | None = None,
) -> list[Any]:
    """c_0 .. c_L of psi = sum_l c_l A~^l, of the type and shape of `beta`.

    With `most_layers`, `num_layers` may be traced: there are as many as `most_layers` takes,
    and those beyond `num_layers` are 0, so that what `jnp.stack` makes of them, given to
    `smooth`, is one program for every L up to that. The exact method has none.
    """
    check_choice("coefficients_of", "method", method, ("neumann", "iterative"))
    if not isinstance(num_layers, Tracer) and most_layers is not None:
        if not np.all((np.asarray(num_layers) >= 0) & (np.asarray(num_layers) <= most_layers)):
            raise ValueError(
                f"`coefficients_of`: `num_layers` must be from 0 to `most_layers`, "
                f"{most_layers}, got {num_layers}."
            )
    most = num_layers if most_layers is None else most_layers
    powers = [beta**l for l in range(most + 1)]
    if most_layers is not None:
        powers = [jnp.where(l <= num_layers, power, 0) for l, power in enumerate(powers)]
    if method == "iterative":
        # (1 - beta) beta^l for l < L, then beta^L, also where a traced L ends the powers.
        return [power - after for power, after in zip(powers, [*powers[1:], 0], strict=True)]
    # Equal to (1 - beta) / (1 - beta^(L+1)), and exact where that is 0 / 0.
    if isinstance(rescale, jax.Array):
        scale = jnp.where(rescale, 1 / sum(powers), 1 - beta)
    else:
        scale = 1 / sum(powers) if rescale else 1 - beta
    return [scale * power for power in powers]


def smoothness(graph: Graph, x: jax.typing.ArrayLike) -> jax.Array:
    r"""How much a table varies along the edges; lower is smoother.

    .. math::

      \mathrm{Tr}(X^T (I - \tilde A) X) = \frac{1}{2} \sum_{ij} w_{ij}
      \left\| \frac{x_i}{\sqrt{d_i}} - \frac{x_j}{\sqrt{d_j}} \right\|^2
      + \sum_{i: d_i = 0} \|x_i\|^2

    Args:
      graph: a graph or a prepared adjacency.
      x: table `[num_nodes, d]`.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=3)
      >>> x = jnp.array([[1.0], [0.0], [0.0]])
      >>> for beta in (0.0, 0.5, 0.99):
      ...   y = sevo_jax.smooth(graph, x, beta=beta)
      ...   print(f"{sevo_jax.smoothness(graph, y):.3f}")
      1.000
      0.198
      0.032
    """
    adjacency = jax.lax.stop_gradient(normalized_adjacency(graph))
    wide = _widen("smoothness", adjacency, _table("smoothness", x))
    laplacian = jnp.array([1, -1], wide.dtype).reshape(2, 1, 1)
    return jnp.sum(wide * adjacency.polynomial(laplacian, wide))


def _table(function: str, x: Any) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"`{function}` takes a table of floats in `x`, but got {x!r}."
        ) from None


def _widen(function: str, adjacency: Adjacency, x: jax.Array) -> jax.Array:
    """A checked table in float32 or float64."""
    spec = jax.typeof(x).sharding.spec
    if spec and spec[0] is not None and not adjacency.splits_rows:
        raise ValueError(
            f"`{function}` got `x` with rows that are split over {spec[0]!r} of an explicit "
            "mesh, but a graph that is not. `sevo_jax.sharding.shard_adjacency` prepares one."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{function}` takes a table of floats, but `x` is {x.dtype}.")
    if x.ndim != 2 or x.shape[0] != adjacency.num_nodes:
        raise ValueError(
            f"`{function}` takes `x` of shape [num_nodes={adjacency.num_nodes}, d], but got "
            f"{x.shape}. The graph's nodes are the rows of the table."
        )
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def check_smoothing(
    function: str,
    beta: Any,
    num_layers: int,
    method: str,
    isolated: str,
    rescale: Any,
    coefficients: Any,
) -> None:
    """Refuse what is wrong before tracing; a traced value cannot be looked at."""
    if not is_integer(num_layers) or num_layers < 0:
        raise ValueError(
            f"`{function}`: `num_layers` must be a Python integer of at least 0, got "
            f"{num_layers!r}. Under `inject_hyperparams` make it static: "
            "`static_args=('num_layers',)`."
        )
    check_choice(function, "method", method, get_args(Method))
    check_choice(function, "isolated", isolated, get_args(Isolated))
    if not isinstance(rescale, bool | np.bool_) and not (
        isinstance(rescale, jax.Array) and rescale.ndim == 0
    ):
        raise TypeError(
            f"`{function}` takes `rescale` as a bool or a scalar array, but got {rescale!r}."
        )
    if not callable(beta):
        check_share(function, "beta", beta, "a number, an array or a schedule")
    if coefficients is not None:
        _check_coefficients(function, coefficients)
        if method == "exact" or callable(beta):
            raise ValueError(
                f"`{function}` takes `coefficients` in place of what `beta` and `method` make, "
                "so neither a schedule for `beta` nor the method 'exact' goes with them."
            )


def _check_coefficients(function: str, coefficients: Any) -> None:
    _check_number(function, "coefficients", coefficients, "an array")
    shape = jnp.shape(coefficients)
    if len(shape) not in (1, 2) or shape[0] == 0:
        raise ValueError(
            f"`{function}` takes `coefficients` of shape [L + 1] or [L + 1, d], but got "
            f"{shape}."
        )
    if isinstance(coefficients, Tracer):
        return
    if not np.isfinite(np.asarray(coefficients)).all():
        raise ValueError(f"`{function}`: `coefficients` must be finite, got {coefficients}.")


def check_decays(function: str, **decays: Any) -> None:
    """Refuse those outside of [0, 1), where Optax goes on to NaN or diverges."""
    for name, decay in decays.items():
        check_share(function, name, decay, "a number or an array")


def check_numbers(function: str, **values: Any) -> None:
    """Refuse what is no number, which would fail far from its name."""
    for name, value in values.items():
        _check_number(function, name, value, "a number or an array")


def check_schedules(function: str, **values: Any) -> None:
    """Refuse what is neither a number nor a schedule."""
    for name, value in values.items():
        if not callable(value):
            _check_number(function, name, value, "a number, an array or a schedule")


def check_share(function: str, name: str, value: Any, kinds: str) -> None:
    """Refuse what is no number in [0, 1) nor an array of such; a traced one is not known."""
    _check_number(function, name, value, kinds)
    if isinstance(value, Tracer):
        return
    if not np.all((np.asarray(value) >= 0) & (np.asarray(value) < 1)):
        raise ValueError(f"`{function}`: `{name}` must lie in [0, 1), got {value}.")


def _check_number(function: str, name: str, value: Any, kinds: str) -> None:
    real = isinstance(value, int | float) or (
        hasattr(value, "dtype")
        and any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    )
    if not real:
        raise TypeError(f"`{function}` takes `{name}` as {kinds}, but got {value!r}.")
