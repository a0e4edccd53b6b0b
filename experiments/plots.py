"""Figures, made from records alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import records
from experiments.tables import by_epoch


def plot_run(folder: str | Path) -> Path:
    """Draws a run's training loss and validation NDCG@10 over epochs, mean and seeds.

    Args:
      folder: of a run, with its records.

    Returns:
      The path of `curves.png` in that folder.
    """
    folder = Path(folder)
    found = records.read(folder / records.FILE)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kind, name in zip(axes, ("epoch", "valid"), ("loss", "NDCG@10"), strict=True):
        if curve := dict(sorted(by_epoch(found, kind, name).items())):
            epochs, values = list(curve), np.array(list(curve.values()))  # [epochs, seeds]
            axis.plot(epochs, values, color="tab:blue", alpha=0.3)
            of = f"mean of {values.shape[1]} seed(s)"
            axis.plot(epochs, values.mean(axis=1), color="tab:blue", label=of)
            axis.legend()
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss" if kind == "epoch" else f"validation {name}")
    figure.suptitle(f"{folder.parent.name}, {folder.name}")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
