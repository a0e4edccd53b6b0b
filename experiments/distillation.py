"""Table 5: what a narrow student learns from a wide teacher, in its loss or through SEvo.

The paper gives the widths and the graph (10 nearest neighbours) and no more. Here the teacher
is the preset with AdamW, as is the student but for its width; the teacher of the first seed, at
its best validation and without dropout, teaches the students of all seeds.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.backbones import TABLE, WIDER
from experiments.batching import Batch
from experiments.config import Config, Distil
from experiments.objectives import NextItem
from models import distillation as losses
from models.distillation import Entities, Scored
from models.scoring import SequenceModel
from sevo_jax import knn_graph

TEACHER = "teacher"  # the arm that the others learn from
STUDENT_DIM = 20
NEIGHBOURS = 10
# Beside sums over users and items, see `models.distillation.htd`.
HTD_WEIGHT = 1e-3


def distillation(make: Callable[..., Config]) -> dict[str, Config]:
    """Table 5: four losses that take from a teacher, SEvo over its graph, and both."""

    def student(optimizer: str = "adamw", **settings: Any) -> Config:
        return make(optimizer, dim=STUDENT_DIM, **settings)

    return {
        "student": student(),
        TEACHER: make("adamw", dim=WIDER * STUDENT_DIM),
        "KD": student(distil="kd"),
        "RKD": student(distil="rkd"),
        "HTD": student(distil="htd", distil_weight=HTD_WEIGHT),
        "DKD": student(distil="dkd"),
        "SEvo": student("sevo_adamw", graph="teacher"),
        "SEvo + DKD": student("sevo_adamw", graph="teacher", distil="dkd"),
    }


def teacher_graph(teacher: SequenceModel) -> Any:
    """The nearest neighbours in a teacher's item table; special rows are isolated."""
    table = np.array(nnx.to_pure_dict(nnx.state(teacher))[TABLE]["embedding"])
    table[: teacher.num_special] = 0
    return knn_graph(table, NEIGHBOURS)


def distilled(objective: Any, config: Config, teacher: Any) -> tuple["Distilled", Any]:
    """A `NextItem` that learns from `teacher` too, and the context that its trainer needs."""
    graphdef, state = nnx.split(teacher)
    made = Distilled(
        **asdict(objective),
        distil=config.distil,
        weight=config.distil_weight,
        share=config.distil_slots,
        teacher=graphdef,
    )
    return made, nnx.to_pure_dict(state)


@dataclass(frozen=True)
class Distilled(NextItem):
    """`NextItem` plus a weighted term that a teacher has a part in.

    `"kd"` and `"dkd"` compare the scores of all items at every slot that counts. `"rkd"` takes
    the target and the negatives of each such slot, with the teacher's vectors of the same
    items. For `"htd"` a user is the state at the end of a window, as in ranking, and the items
    are the targets and negatives there, each once.

    Args:
      distil: the kind of term.
      weight: of that term.
      share: of the slots that `"kd"` and `"dkd"` take, drawn for each batch. Fewer cost less
        and estimate the same mean.
      teacher: its graph definition; the context holds its parameters.
    """

    distil: Distil = "kd"
    weight: float = 1.0
    share: float = 1.0
    teacher: Any = None

    def loss(
        self, module: Any, batch: Batch, dropout_key: jax.Array, context: Any = None
    ) -> jax.Array:
        teacher = nnx.merge(self.teacher, context)
        dropout_key, key = jax.random.split(dropout_key)
        states, items = self.forward(module, batch, dropout_key)
        teachers, their_items = self.forward(teacher, batch, None)
        loss = self.against(module, batch, states, items)
        if self.distil in ("kd", "dkd"):
            chosen = self.slots(key, batch.weights)
            sides = (module, states), (teacher, teachers)
            student, wanted = (
                Scored(one.score_all, vectors[chosen], one.items()) for one, vectors in sides
            )
            weights = batch.weights[chosen]
            if self.distil == "kd":
                term = losses.kd(student, wanted, weights)
            else:
                places = batch.targets[chosen] - module.num_special
                term = losses.dkd(student, wanted, places, weights)
        elif self.distil == "rkd":
            term = losses.rkd((states, items), (teachers, their_items), batch.weights)
        else:
            last, windows = batch.stream.last, batch.stream.lengths > 0
            rows = jnp.concatenate([batch.targets[last], batch.negatives[last].ravel()])
            # A window without items has the slot of the one before it.
            rows = jnp.unique(rows, size=len(rows), fill_value=0)
            term = losses.htd(
                module.groups,
                Entities(states[last], module.items(rows)),
                Entities(teachers[last], teacher.items(rows)),
                Entities(windows, rows > 0),
                key,
            )
        return loss + self.weight * term

    def slots(self, key: jax.Array, weights: jax.Array) -> jax.Array:
        """The slots to compare all items at, by `share`; those that count come first."""
        num = math.ceil(self.share * len(weights))
        drawn = jax.random.uniform(key, weights.shape) * (weights > 0)
        return jax.lax.top_k(drawn, num)[1]
