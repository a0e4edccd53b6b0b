"""Graph building from a log that comes in blocks and is never whole in memory."""

import resource
import sys
import time
from typing import Any

from benchmarks.graphs import LENGTH, Size, blocks
from sevo_jax import item_graph

NUM_ITEMS = {"1M": 100_000, "10M": 376_378, "100M": 1_000_000}


def build(size: str) -> dict[str, Any]:
    """Seconds of `item_graph`, without those of the generator, and peak memory of all."""
    interactions = int(size.removesuffix("M")) * 1_000_000
    generating = 0.0

    def timed():
        nonlocal generating
        made = blocks(Size(NUM_ITEMS[size], interactions // LENGTH))
        while True:
            began = time.perf_counter()
            block = next(made, None)
            generating += time.perf_counter() - began
            if block is None:
                return
            yield block

    began = time.perf_counter()
    graph: Any = item_graph(timed(), NUM_ITEMS[size])
    seconds = time.perf_counter() - began - generating
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "interactions": interactions,
        "items": NUM_ITEMS[size],
        "edges": len(graph.edges),
        "seconds": seconds,
        "peak GiB": peak / 2**30,
    }
