"""One of two processes that train together; `test_sharding.py` starts both.

python -m tests.sevo_jax.two_processes INDEX PORT
"""

import sys

import jax
import numpy as np

from sevo_jax.sharding import row_shardings, shard_adjacency
from tests.sevo_jax.eight_devices import DIM, NUM_NODES, mesh, problem, train


def main(index: int, port: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 1, 2)
    adjacency, params, batches = problem()
    graph = shard_adjacency(adjacency, mesh(2))
    actual = train(graph, params, np.asarray(batches), lambda tree: row_shardings(tree, graph))
    expected = train(adjacency, params, batches)
    own = slice(index * NUM_NODES // 2, (index + 1) * NUM_NODES // 2)
    tables = 0
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        (shard,) = a.addressable_shards
        is_table = a.shape == (NUM_NODES, DIM)
        tables += is_table
        np.testing.assert_allclose(shard.data, b[own] if is_table else b, rtol=0, atol=1e-12)
    print(f"process {index}: {tables} tables equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
