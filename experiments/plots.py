"""Figures, made from records alone."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a server

import matplotlib.pyplot as plt
import numpy as np

from experiments import records


def plot_run(folder: str | Path) -> Path:
    """Draws a run's training loss and validation NDCG@10 over epochs, mean and seeds.

    Args:
      folder: of a run, with its records.

    Returns:
      The path of `curves.png` in that folder.
    """
    folder = Path(folder)
    found = records.read(folder / records.FILE)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, kind, name in zip(axes, ("epoch", "valid"), ("loss", "NDCG@10"), strict=True):
        curves: dict[int, dict[int, float]] = {}
        for record in found:
            if record["kind"] == kind:
                curves.setdefault(record["seed"], {})[record["epoch"]] = record[name]
        for curve in curves.values():
            axis.plot(*zip(*sorted(curve.items()), strict=True), color="tab:blue", alpha=0.3)
        if curves:
            epochs = sorted(set.intersection(*(set(curve) for curve in curves.values())))
            means = [np.mean([curve[e] for curve in curves.values()]) for e in epochs]
            axis.plot(epochs, means, color="tab:blue", label=f"mean of {len(curves)} seed(s)")
            axis.legend()
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss" if kind == "epoch" else f"validation {name}")
    figure.suptitle(f"{folder.parent.name}, {folder.name}")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
