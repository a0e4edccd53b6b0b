"""The best next items for a history, from a run's checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.backbones import BACKBONES
from experiments.options import Recommend
from experiments.ranking import Histories
from experiments.run_folder import load_run
from models.layers import check_sizes


def top_items(
    folder: str | Path, history: Sequence[str], top: int = 10, seed: int | None = None
) -> list[tuple[str, float]]:
    """External ids and scores of the `top` items that `history` does not hold, best first.

    Args:
      folder: of a run.
      history: external item ids, oldest first, at least one.
      top: how many items, at most all that are not in the history.
      seed: one of the run's seeds; the first by default.
    """
    if isinstance(history, str):
        raise TypeError(f"`history` must be a sequence of ids, got the string {history!r}.")
    if len(history) == 0:
        raise ValueError("`history` must hold at least one item.")
    check_sizes(top=top)
    module, item_ids, config = load_run(folder, seed)
    if config.windows == "users":
        raise ValueError(f"`folder` {folder} holds {config.model}, which knows no sequences.")
    known = {str(external): item for item, external in enumerate(item_ids)}
    if unknown := [external for external in history if str(external) not in known]:
        raise ValueError(
            f"`history` holds items that the run does not know: {', '.join(unknown[:5])}. "
            f"Its {len(item_ids):,} items are named like {item_ids[0]}."
        )
    items = np.array([known[str(external)] for external in history])
    objective = BACKBONES[config.model].objective(len(item_ids), config)
    newest = items[-(config.max_length - objective.num_queries) :]
    one = jnp.array([0])
    histories = Histories(jnp.asarray(newest, jnp.int32), one, jnp.array([len(newest)]), one)
    scores = np.array(objective.scorer(module, len(newest), None)(histories)[0])
    scores[items] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(top, int(np.isfinite(scores).sum()))]
    return [(str(item_ids[item]), float(scores[item])) for item in best]


def recommend(options: Recommend, console: Console | None = None) -> None:
    """Runs `python -m experiments recommend`."""
    table = Table("rank", "item", "score")
    found = top_items(options.run, options.history, options.top, options.seed)
    for rank, (item, score) in enumerate(found, start=1):
        table.add_row(str(rank), item, f"{score:.4f}")
    (console or Console()).print(table)
