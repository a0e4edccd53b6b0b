"""The settings that a run is made of, and which of them go together."""

import functools
import math
import numbers
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

Model = Literal["sasrec", "gru4rec", "bert4rec", "stosa", "bsarec", "mf", "lightgcn"]
Optimizer = Literal["adamw", "sevo_adamw", "adam", "sevo_adam", "sgd", "sevo_sgd"]
Placement = Literal["update", "gradient", "switch", "both"]
Touched = Literal["gradient", "batch"]
Graph = Literal["items", "users_items", "attributes", "teacher"]
Loss = Literal["bce", "bpr", "gbce", "sampled_softmax", "cross_entropy"]
Schedule = Literal["constant", "cosine"]
Windows = Literal["last", "prefixes", "whole", "items", "users"]
Distil = Literal["none", "kd", "rkd", "htd", "dkd"]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_ATTENTION = _same("dim", "max_length", "num_blocks", "num_heads", "dropout_rate")
# By argument of the model's class, the field of `Config` that it takes.
ARGUMENTS: dict[str, dict[str, str]] = {
    "sasrec": _ATTENTION | _same("cosine_scale"),
    "gru4rec": _same("dim", "max_length", "dropout_rate", "cosine_scale")
    | {"hidden_dim": "dim"},
    "bert4rec": _ATTENTION,
    "stosa": _ATTENTION | _same("attention_dropout_rate", "fixed"),
    "bsarec": _ATTENTION
    | _same("attention_dropout_rate", "filter_weight", "filter_cutoff", "cosine_scale"),
    "mf": _same("dim"),
    "lightgcn": {"dim": "dim", "num_layers": "num_blocks"},
}
# What a model's objective fixes: the cut of the sequences, and the loss.
FIXED = {
    "bert4rec": {"windows": "items", "loss": "cross_entropy"},
    "mf": {"windows": "users", "loss": "bpr"},
    "lightgcn": {"windows": "users", "loss": "bpr"},
}
_FRACTIONS = (
    "b1",
    "b2",
    "momentum",
    "beta",
    "dropout_rate",
    "attention_dropout_rate",
    "smooth_start",
    "label_smoothing",
    "switch_at",
    "average_decay",
    "residual_decay",
)

_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}

# What SEvo alone has.
SEVO_ONLY = (
    "placement",
    "switch_at",
    "beta",
    "beta_ramp",
    "num_layers",
    "smooth_every",
    "residual_decay",
    "smooth_start",
    "method",
    "rescale",
    "correct_moments",
    "touched",
    "isolated",
    "graph",
    "graph_window",
    "graph_distance",
    "graph_weighting",
    "graph_keep",
    "graph_max_items",
)
# Those of them that a plain optimizer refuses instead of ignoring them.
SEVO_NEEDED = ("placement", "smooth_every", "residual_decay", "smooth_start", "touched")
_MAY_BE_ZERO = (
    "gbce_t",
    "weight_decay",
    "num_layers",
    "epochs",
    "pvn_weight",
    "pair_l2",
    "cosine_scale",
    "filter_weight",
)


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of one run; defaults are the paper's for SASRec on Beauty."""

    model: Model = "sasrec"
    optimizer: Optimizer = "sevo_adamw"
    # Psi on Adam's step (the paper), on the gradient, on the gradient for the first part of
    # training and on the step after it, or on both at once.
    placement: Placement = "update"
    switch_at: float = 0.25  # that first part; for the placement "switch"
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"  # "cosine" brings the learning rate to 0 in the last step
    # Validation and test see a running mean of the parameters, which keeps this share of itself
    # in each step; with 0, the parameters themselves.
    average_decay: float = 0.0
    weight_decay: float = 0.1  # decoupled for *adamw, L2 in the gradient for the others
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    momentum: float = 0.9  # sgd only
    beta: float = 0.99
    beta_ramp: bool = False  # the columns' strengths rise evenly from 0 to beta
    num_layers: int = 3
    smooth_every: int = 1  # smooth in every so many steps; for the placement "update"
    # What psi takes from an update keeps this share of itself in each step, see `sevo`; with 0,
    # nothing of it is added. Validation and test are without it. For the placement "update".
    residual_decay: float = 0.0
    smooth_start: float = 0.0  # the strength at which psi smooths the tables at the start
    method: Literal["neumann", "iterative", "exact"] = "neumann"
    rescale: bool = True
    correct_moments: bool = True
    # Which rows' moments move: those with a gradient, or those of the items in the batch's
    # sequences. They differ where a loss takes all items, as all rows have a gradient then.
    touched: Touched = "gradient"
    isolated: Literal["scale", "identity"] = "scale"
    graph_window: int = 50  # K: a sequence's last items that make edges
    graph_distance: int = 1  # H: how far apart two items of an edge may stand
    graph_weighting: Literal["inverse_distance", "count"] = "inverse_distance"
    graph_keep: Literal["last", "first"] = "last"
    # What psi smooths over: items that follow each other; users and their items, for mf only;
    # items that share attributes, such as genres; or nearest neighbours in a teacher's table.
    graph: Graph = "items"
    # Attributes of more items than this make no edges: n items give n (n - 1). It spares all
    # genres of MovieLens-1M, and leaves out what nearly all items of a large shop share.
    graph_max_items: int = 2000
    distil: Distil = "none"  # how a teacher's knowledge enters the loss, see `distillation`
    distil_weight: float = 1.0  # of that term
    distil_slots: float = 1.0  # the share of a batch's slots that "kd" and "dkd" compare
    loss: Loss = "bce"  # see `objectives.NextItem`; bert4rec and the pairs of mf have their own
    num_negatives: int = 1  # for each target; for "sampled_softmax", for the whole batch
    label_smoothing: float = 0.0  # "cross_entropy" only
    # Scores are this times the cosine of state and item, or with 0 their dot product; for
    # sasrec, gru4rec and bsarec.
    cosine_scale: float = 0.0
    gbce_t: float = 0.75  # "gbce" only
    pvn_weight: float = 0.0  # STOSA's second term
    pair_l2: float = 0.0  # mf and lightgcn: L2 of the rows of a step's pairs, in the loss
    mask_prob: float = 0.5  # bert4rec only
    windows: Windows = "last"  # see `batching.training_data`
    train_users: float = 1.0  # the share of users that train; all are ranked for
    batch_size: int = 512  # windows in a step; for "whole", targets
    # A batch is packed into so many streams, each drawn on its own. They are what the devices
    # of a mesh share; on one device they give the same numbers.
    streams: int = 1
    # The official code's loader has 4, which makes more and smaller batches of an epoch; see
    # `batching.in_batches`.
    loader_workers: int = 1
    max_length: int = 50
    dim: int = 64
    num_blocks: int = 2  # of attention, or layers of propagation for lightgcn
    num_heads: int = 1
    dropout_rate: float = 0.3
    attention_dropout_rate: float = 0.0  # stosa, bsarec; the others use `dropout_rate`
    filter_weight: float = 0.7  # bsarec only: the filter's share beside attention
    filter_cutoff: int = 5  # bsarec only: so many frequencies pass, positive and negative
    fixed: bool = False  # stosa only: without the published code's mistake
    epochs: int = 200
    eval_every: int = 5

    def __post_init__(self) -> None:
        hints = _hints()
        for name, value in vars(self).items():
            if choices := get_args(hints[name]):
                if value not in choices:
                    raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
                continue
            kind, words = _KINDS[hints[name]]
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"`{name}` must be {words}, got {value!r}.")
            if kind is bool:
                continue
            if name in _FRACTIONS:
                if not 0 <= value < 1:
                    raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
            elif not math.isfinite(value) or value < 0 or not (value or name in _MAY_BE_ZERO):
                least = "at least 0" if name in _MAY_BE_ZERO else "positive"
                raise ValueError(f"`{name}` must be {least} and finite, got {value}.")
        for name, needed in FIXED.get(self.model, {}).items():
            if getattr(self, name) != needed:
                raise ValueError(
                    f"`{name}` of {self.model} must be {needed!r}, got {getattr(self, name)!r}."
                )
        if self.model == "bert4rec" and self.max_length < 2:
            raise ValueError("`max_length` of bert4rec must be at least 2: one is the query.")
        if self.graph == "items" and self.graph_window < 2:
            raise ValueError(
                f"`graph_window` must be at least 2 items to make an edge, got "
                f"{self.graph_window}."
            )
        if self.model not in FIXED and self.windows in ("items", "users"):
            raise ValueError(
                f"`windows` of {self.model} must be last, prefixes or whole, got "
                f"{self.windows!r}."
            )
        for name in ("train_users", "distil_slots", "gbce_t", "mask_prob", "filter_weight"):
            if getattr(self, name) > 1:
                least = "[0" if name in _MAY_BE_ZERO else "(0"
                raise ValueError(f"`{name}` must be in {least}, 1], got {getattr(self, name)}.")
        if self.train_users < 1 and self.windows == "users":
            raise ValueError(
                f"`train_users` of {self.model} must be 1, got {self.train_users}: it has no "
                "vector for a user who does not train."
            )
        if self.pair_l2 and self.windows != "users":
            raise ValueError(f"`pair_l2` is for mf and lightgcn, got it for {self.model}.")
        if self.pvn_weight and self.model != "stosa":
            raise ValueError(f"`pvn_weight` is for stosa alone, got it for {self.model}.")
        if self.cosine_scale and "cosine_scale" not in self._taken:
            *most, last = (name for name in ARGUMENTS if "cosine_scale" in ARGUMENTS[name])
            raise ValueError(
                f"`cosine_scale` is for {', '.join(most)} and {last}, got it for {self.model}."
            )
        if self.placement != "update" and not self.has_sevo:
            raise ValueError(
                f'`placement` "{self.placement}" needs an optimizer with SEvo, got '
                f"{self.optimizer!r}."
            )
        if self.smooth_every != 1 and (not self.has_sevo or self.placement != "update"):
            raise ValueError(
                '`smooth_every` needs an optimizer with SEvo and `placement` "update", got '
                f"{self.optimizer!r} and {self.placement!r}."
            )
        if self.residual_decay and (
            not self.has_sevo
            or self.placement not in ("update", "both")
            or self.smooth_every > 1
            or self.average_decay
        ):
            raise ValueError(
                '`residual_decay` needs an optimizer with SEvo, `placement` "update" or '
                f'"both", no `smooth_every` and no `average_decay`, got {self.optimizer!r}, '
                f"{self.placement!r}, {self.smooth_every} and {self.average_decay}."
            )
        if self.smooth_start and not self.has_sevo:
            raise ValueError(
                f"`smooth_start` needs an optimizer with SEvo, got {self.optimizer!r}."
            )
        if self.distil != "none" and self.model not in ("sasrec", "gru4rec"):
            raise ValueError(
                f'`distil` "{self.distil}" is for sasrec and gru4rec, got it for {self.model}.'
            )
        if self.distil in ("rkd", "htd") and self.loss not in ("bce", "bpr", "gbce"):
            raise ValueError(
                f'`distil` "{self.distil}" needs a `loss` with negatives for each target (bce, '
                f"bpr, gbce), got {self.loss!r}."
            )
        if self.graph == "users_items" and self.model != "mf":
            raise ValueError(f'`graph` "users_items" is for mf alone, got it for {self.model}.')
        if self.touched == "batch" and (
            self.optimizer != "sevo_adamw"
            or not self.correct_moments
            or self.placement == "gradient"
            or self.graph == "users_items"
        ):
            raise ValueError(
                '`touched` "batch" is for the corrected moments of sevo_adamw on a table of '
                f"items; got it for {self.optimizer!r}, `correct_moments` "
                f"{self.correct_moments}, placement {self.placement!r}, graph {self.graph!r}."
            )

    def without_effect(self) -> set[str]:
        """The settings that change nothing, as others do not let them."""
        sevo, sgd = self.has_sevo, self.base == "sgd"
        ranked = self.model not in FIXED  # by `objectives.NextItem`
        needed = dict.fromkeys(SEVO_ONLY, sevo) | {
            "switch_at": self.placement == "switch",
            "num_layers": sevo and (self.method != "exact" or self.smooth_start > 0),
            "rescale": sevo and self.method == "neumann",
            "correct_moments": self.optimizer == "sevo_adamw" and self.placement != "gradient",
            "graph_max_items": sevo and self.graph == "attributes",
            "momentum": sgd,
            "b1": not sgd,
            "b2": not sgd,
            "eps": not sgd,
            "num_negatives": ranked and self.loss != "cross_entropy",
            "label_smoothing": ranked and self.loss == "cross_entropy",
            "gbce_t": ranked and self.loss == "gbce",
            "pvn_weight": self.model == "stosa" and self.loss in ("bce", "bpr"),
            "pair_l2": self.windows == "users",
            "mask_prob": self.model == "bert4rec",
            "distil_weight": self.distil != "none",
            "distil_slots": self.distil in ("kd", "dkd"),
        }
        for name in set().union(*(known.values() for known in ARGUMENTS.values())):
            needed[name] = name in self._taken
        needed["max_length"] = self.windows != "users"  # the loop cuts by it, too
        for name in ("graph_window", "graph_distance", "graph_weighting", "graph_keep"):
            needed[name] = sevo and self.graph == "items"
        return {name for name, is_needed in needed.items() if not is_needed}

    def changes(self, usual: "Config") -> dict[str, Any]:
        """The settings that differ from those of `usual` and have an effect."""
        idle = self.without_effect()
        return {
            name: value
            for name, value in vars(self).items()
            if value != getattr(usual, name) and name not in idle
        }

    @property
    def _taken(self) -> set[str]:
        """The settings that the model's class takes."""
        return set(ARGUMENTS[self.model].values())

    @property
    def base(self) -> str:
        """The optimizer without SEvo: `adamw`, `adam` or `sgd`."""
        return self.optimizer.removeprefix("sevo_")

    @property
    def has_sevo(self) -> bool:
        """Whether the optimizer has SEvo."""
        return self.base != self.optimizer

    @property
    def has_teacher(self) -> bool:
        """Whether training needs a teacher: in its loss, or for the graph."""
        return self.distil != "none" or self.graph == "teacher"

    @property
    def label(self) -> str:
        """A short name of the optimizer, such as `sevo_adamw` or `sevo_adamw-gradient`."""
        return self.optimizer + ("" if self.placement == "update" else f"-{self.placement}")


@functools.cache  # reading types takes longer than all else, and a report makes thousands
def _hints() -> dict[str, Any]:
    return get_type_hints(Config)


def check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """Refuses seeds that are none, not distinct, or no number that JAX makes a key of."""
    try:
        numbers = tuple(operator.index(seed) for seed in seeds)
    except TypeError:
        raise TypeError(f"`seeds` must be a sequence of integers, got {seeds!r}.") from None
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"`seeds` must be distinct and at least one, got {numbers}.")
    if not all(0 <= seed < 2**31 for seed in numbers):
        raise ValueError(f"`seeds` must be from 0 to 2**31 - 1, got {numbers}.")
    return numbers
