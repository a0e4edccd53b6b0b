"""SEvo, Structure-aware Embedding Evolution (NeurIPS 2024), for JAX and Optax."""

from sevo_jax import sharding
from sevo_jax.adjacency import normalized_adjacency
from sevo_jax.adoption import adopt_adam_state
from sevo_jax.corrected_adam import ScaleByCorrectedAdamState, scale_by_corrected_adam
from sevo_jax.graph import (
    attribute_graph,
    bipartite_graph,
    edge_graph,
    item_graph,
    knn_graph,
)
from sevo_jax.optimizers import sevo_adam, sevo_adamw, sevo_sgd
from sevo_jax.smoothing import smooth, smoothness
from sevo_jax.transforms import (
    ResidualState,
    SmoothEveryState,
    eval_params,
    sevo,
)

__version__ = "0.1.0"

__all__ = [
    "ResidualState",
    "ScaleByCorrectedAdamState",
    "SmoothEveryState",
    "adopt_adam_state",
    "attribute_graph",
    "bipartite_graph",
    "edge_graph",
    "eval_params",
    "item_graph",
    "knn_graph",
    "normalized_adjacency",
    "scale_by_corrected_adam",
    "sevo",
    "sevo_adam",
    "sevo_adamw",
    "sevo_sgd",
    "sharding",
    "smooth",
    "smoothness",
]
