"""What a run is made of, and the settings of the paper."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

Model = Literal["sasrec", "gru4rec"]
Optimizer = Literal["adamw", "sevo_adamw", "adam", "sevo_adam", "sgd", "sevo_sgd"]
Placement = Literal["update", "gradient"]


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of one run; defaults are the paper's for SASRec on Beauty."""

    model: Model = "sasrec"
    optimizer: Optimizer = "sevo_adamw"
    placement: Placement = "update"  # psi on Adam's step (the paper) or on the gradient
    learning_rate: float = 1e-3
    weight_decay: float = 0.1  # decoupled for *adamw, L2 in the gradient for the others
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    momentum: float = 0.9  # sgd only
    beta: float = 0.99
    num_layers: int = 3
    method: Literal["neumann", "iterative"] = "neumann"
    rescale: bool = True
    correct_moments: bool = True
    graph_window: int = 50  # K: a sequence's last items that make edges
    graph_distance: int = 1  # H: how far apart two items of an edge may stand
    loss: Literal["bce", "bpr"] = "bce"
    windows: Literal["last", "prefixes", "whole"] = "last"  # see `batching.training_data`
    batch_size: int = 512  # windows in a step; for "whole", targets
    max_length: int = 50
    dim: int = 64
    num_blocks: int = 2  # SASRec only
    num_heads: int = 1  # SASRec only
    dropout_rate: float = 0.3
    epochs: int = 200
    eval_every: int = 5

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in asdict(self).items():
            if isinstance(value, bool) or hints[name] is bool:
                continue
            if choices := get_args(hints[name]):
                if value not in choices:
                    raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
            elif name in ("b1", "b2", "momentum", "beta", "dropout_rate"):
                if not 0 <= value < 1:
                    raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
            elif value < 0 or (
                value == 0 and name not in ("weight_decay", "num_layers", "epochs")
            ):
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.placement == "gradient" and not self.optimizer.startswith("sevo_"):
            raise ValueError(
                f'`placement` "gradient" needs an optimizer with SEvo, got {self.optimizer!r}.'
            )

    @property
    def label(self) -> str:
        """A short name of the optimizer, such as `sevo_adamw` or `sevo_adamw-gradient`."""
        return self.optimizer + ("-gradient" if self.placement == "gradient" else "")


_SASREC: dict[str, Any] = {"model": "sasrec"}
_GRU4REC: dict[str, Any] = {
    "model": "gru4rec",
    "loss": "bpr",
    "windows": "prefixes",
    "b2": 0.999,
    "dropout_rate": 0.4,
    "epochs": 300,
}
_LONG = {"max_length": 200, "graph_window": 200}

# By model and dataset: the hyper-parameters of the official code. Beside each, the published
# test NDCG@10 of SEvo-AdamW (mean and spread of five seeds).
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("sasrec", "amazon_beauty"): _SASREC,  # .0411 +- .0013
    ("sasrec", "amazon_toys"): _SASREC,  # .0475 +- .0008
    ("sasrec", "amazon_tools"): _SASREC | {"dropout_rate": 0.7},  # .0274 +- .0005
    ("sasrec", "movielens_1m"): _SASREC
    | _LONG
    | {"dropout_rate": 0.1, "batch_size": 128},  # .1384 +- .0016
    ("gru4rec", "amazon_beauty"): _GRU4REC,  # .0273 +- .0012
    ("gru4rec", "amazon_toys"): _GRU4REC,  # .0234 +- .0004
    ("gru4rec", "amazon_tools"): _GRU4REC
    | {"dropout_rate": 0.5, "learning_rate": 5e-3},  # .0174 +- .0008
    ("gru4rec", "movielens_1m"): _GRU4REC
    | _LONG
    | {"dropout_rate": 0.3, "weight_decay": 0.01},  # .1366 +- .0011
    # Not the paper's: short, for the generated data.
    ("sasrec", "synthetic"): _SASREC | {"epochs": 30, "batch_size": 64},
    ("gru4rec", "synthetic"): _GRU4REC | {"epochs": 30, "batch_size": 256},
}


def preset(model: str, dataset: str, optimizer: str, **overrides: Any) -> Config:
    """The settings for a model on a dataset; those of SASRec on Beauty where none is known.

    Weight decay is part of the presets for AdamW alone: as an L2 term in the gradient of Adam
    or SGD the same number means another thing, so theirs is 0 unless given.

    Args:
      model, dataset, optimizer: names.
      overrides: fields of `Config` that replace the preset's.
    """
    known = PRESETS.get((model, dataset)) or PRESETS.get((model, "amazon_beauty"), {})
    settings = {**known, "model": model, "optimizer": optimizer}
    if not optimizer.endswith("adamw"):
        settings["weight_decay"] = 0.0
    return Config(**{**settings, **overrides})
