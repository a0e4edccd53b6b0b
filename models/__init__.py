"""Backbones for sequential recommendation, as Flax NNX modules that hold parameters only."""

from models.bert4rec import BERT4Rec
from models.bsarec import BSARec
from models.gru4rec import GRU4Rec
from models.lightgcn import LightGCN
from models.mf import MF
from models.sasrec import SASRec
from models.stosa import STOSA

__all__ = ["BERT4Rec", "BSARec", "GRU4Rec", "LightGCN", "MF", "SASRec", "STOSA"]
