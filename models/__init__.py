"""Backbones for sequential recommendation, as Flax NNX modules that hold parameters only."""

from models.gru4rec import GRU4Rec
from models.sasrec import SASRec

__all__ = ["GRU4Rec", "SASRec"]
