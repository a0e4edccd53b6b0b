"""Matrix factorisation with Bayesian personalised ranking (Rendle et al., UAI 2009)."""

import jax
from flax import nnx
from jax.nn.initializers import normal

from models.layers import check_sizes
from models.scoring import DotProduct

INIT_STD = 1e-4


class MF(DotProduct, nnx.Module):
    """A vector for each user and each item; their dot product is the score.

    To smooth both over a user-item graph, name the two tables in its order:
    `sevo(graph, tables=("user_embedding", "item_embedding"))`.

    Args:
      num_items, num_users: ids are table rows; there are no special ones.
      dim: d, the width of the tables.
    """

    num_special = 0

    def __init__(self, num_items: int, num_users: int, *, dim: int = 64, rngs: nnx.Rngs):
        check_sizes(num_items=num_items, num_users=num_users, dim=dim)
        self.user_embedding, self.item_embedding = (
            nnx.Embed(num, dim, embedding_init=normal(INIT_STD), rngs=rngs)
            for num in (num_users, num_items)
        )

    def users(self, ids: jax.Array) -> jax.Array:
        """States `[..., d]` of the users `[...]`."""
        return self.user_embedding(ids)
