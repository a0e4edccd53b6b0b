"""LightGCN (He et al., SIGIR 2020): a graph network that is nothing but propagation."""

import functools
import numbers
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.nn.initializers import normal

from models.layers import check_sizes
from models.scoring import DotProduct

# As in the benchmark that the published figures are from. LightGCN's paper says Xavier and its
# authors' code .1, which is ahead at first and leaves more to L2.
INIT_STD = 1e-4


class Operator(Protocol):
    """A symmetric matrix A~ as something to multiply with, such as a prepared adjacency of
    `sevo_jax.normalized_adjacency` (of a graph whose weights are all 1)."""

    def polynomial(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        """sum_l c_l A~^l x, with coefficients `[L + 1, 1, 1]` and x `[num_nodes, d]`."""
        ...


class LightGCN(DotProduct, nnx.Module):
    r"""Smooths users and items over their graph in each forward pass, without any weights.

    .. math::

      E = \frac{1}{K+1} \sum_{k=0}^{K} \tilde A^k E^{(0)}

    where :math:`E^{(0)}` stacks the user and the item table, :math:`\tilde A` is the
    symmetrically normalised adjacency of the user-item graph and :math:`K` is `num_layers`.
    The score of an item for a user is the dot product of their rows of :math:`E`, which
    `propagate` computes once for a batch; `score` and `score_all` take rows of its results.
    `items`, in contrast, are rows of :math:`E^{(0)}`, as weight decay sees them.

    Args:
      num_items, num_users: ids are table rows; there are no special ones.
      dim: d, the width of the tables.
      num_layers: the paper's K.
    """

    num_special = 0

    def __init__(
        self,
        num_items: int,
        num_users: int,
        *,
        dim: int = 64,
        num_layers: int = 3,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_items=num_items, num_users=num_users, dim=dim)
        if not isinstance(num_layers, numbers.Integral) or num_layers < 0:
            raise ValueError(
                f"`num_layers` must be an integer of at least 0, got {num_layers!r}."
            )
        table = functools.partial(
            nnx.Embed, features=dim, embedding_init=normal(INIT_STD), rngs=rngs
        )
        self.num_users = num_users
        self.num_layers = num_layers
        self.user_embedding = table(num_users)
        self.item_embedding = table(num_items)

    def users(self, ids: jax.Array) -> jax.Array:
        """Rows `[..., d]` of the table of users, before propagation."""
        return self.user_embedding(ids)

    def propagate(self, graph: jraph.GraphsTuple | Operator) -> tuple[jax.Array, jax.Array]:
        """Users `[num_users, d]` and items `[num_items, d]` as the mean of all layers.

        Args:
          graph: nodes are the users, then the items; both directions of an edge are stored.
            Its weights may be counts: whatever is positive is one edge, as in the paper, and
            an edge of weight 0 is padding. No edge is stored twice. It is normalised here.
            Or an operator that holds the normalised adjacency already, in a form that
            multiplies fast.
        """
        table = jnp.concatenate(
            [self.user_embedding.embedding[...], self.item_embedding.embedding[...]]
        )
        num_nodes = self._num_nodes(graph)
        if num_nodes is not None and num_nodes != len(table):
            raise ValueError(
                f"`graph` must have {len(table)} nodes, the users and then the items, got "
                f"{num_nodes}."
            )
        if not isinstance(graph, jraph.GraphsTuple):
            share = jnp.full((self.num_layers + 1, 1, 1), 1 / (self.num_layers + 1))
            mean = graph.polynomial(share.astype(table.dtype), table)
        else:
            mean = self._mean_of_layers(_normalized(graph, len(table), table.dtype), table)
        users, items = jnp.split(mean, [self.num_users])
        return users, items

    @staticmethod
    def _num_nodes(graph: Any) -> int | None:
        """None if they are traced."""
        if not isinstance(graph, jraph.GraphsTuple):
            return getattr(graph, "num_nodes", None)
        return None if isinstance(graph.n_node, Tracer) else int(np.sum(graph.n_node))

    def _mean_of_layers(self, normalized: Any, table: jax.Array) -> jax.Array:
        layer = total = table
        for _ in range(self.num_layers):
            messages = normalized.edges[:, None] * layer[normalized.senders]
            layer = jraph.segment_sum(messages, normalized.receivers, len(layer))
            total += layer
        return total / (self.num_layers + 1)


def _normalized(graph: Any, num_nodes: int, dtype: Any) -> jraph.GraphsTuple:
    """The graph with edges 1 / sqrt(d_i d_j), where d_i is how many neighbours node i has."""
    present = (jnp.asarray(graph.edges) > 0).astype(dtype)
    degree = jraph.segment_sum(present, graph.receivers, num_nodes)
    scale = jax.lax.rsqrt(jnp.maximum(degree, 1))  # nodes without an edge send nothing
    return graph._replace(edges=present * scale[graph.receivers] * scale[graph.senders])
