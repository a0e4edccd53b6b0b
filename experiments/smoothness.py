"""Fig. 2b: how smooth the update is before and after psi, and the table, along training."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from experiments.backbones import BACKBONES
from experiments.config import Config
from experiments.data import split_of
from experiments.dataset import Split
from experiments.options import Ablate
from experiments.presets import preset
from experiments.ranking import collect, metrics, ranking_data
from experiments.run import SELECTION, make_trainer, start
from experiments.study import Finding
from sevo_jax import scale_by_corrected_adam, sevo, smoothness
from sevo_jax.layouts import Adjacency
from sevo_jax.optimizers import by_table
from sevo_jax.tables import table_mask

NEEDS_DATA = True
BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
MEMORY = 0.9  # of the running mean over steps
MEASURES = ("before", "after")


def study(options: Ablate, out: Path, console: Console) -> list[Finding]:
    """J(dE), J(psi(dE)) and J(E) over epochs, for each beta; `out` gets a figure of them.

    J is `sevo_jax.smoothness`, the paper's quadratic form of the Laplacian; dE is Adam's
    direction before the learning rate, and its J is a running mean over steps. All betas and
    seeds train in one compiled program; `--beta` asks for one alone.
    """
    dataset, split = split_of(options)
    settings = options.given()
    config = preset(options.model, options.preset_name(dataset.name), "sevo_adamw", **settings)
    betas = (config.beta,) if "beta" in settings else BETAS
    for name in ("schedule", "average_decay", "smooth_every", "residual_decay", "beta_ramp"):
        if name in settings:
            raise ValueError(f"`smoothness` knows no `{name}`; leave it out.")
    options.check_given([config])
    if options.arms:
        raise ValueError(f"`smoothness` has no `arms`, got {options.arms}; see `beta`.")
    if config.placement != "update" or config.graph != "items":
        raise ValueError(
            "`smoothness` takes `placement` 'update' and `graph` 'items', got "
            f"{config.placement!r} and {config.graph!r}."
        )
    curves: dict[int, dict[str, np.ndarray]] = {}
    for epoch, found in measure(config, split, betas, options.seeds):
        curves[epoch] = found
        if SELECTION in found:
            best = found[SELECTION].mean(axis=1).max()
            console.print(f"epoch {epoch}/{config.epochs}, best valid {SELECTION} {best:.4f}")
    _draw(curves, betas, out / "smoothness.png")
    shown = [epoch for epoch in curves if SELECTION in curves[epoch]]
    rows = []
    for i, beta in enumerate(betas):
        for epoch in shown:
            found = {name: values[i].mean() for name, values in curves[epoch].items()}
            rows.append(
                [
                    f"{beta}",
                    f"{epoch}",
                    f"{found['before']:.0f}",
                    f"{found['after']:.0f}",
                    f"{found['after'] / found['before']:.3f}",
                    f"{found['table']:.0f}",
                    f"{found[SELECTION]:.4f}",
                ]
            )
    head = ["beta", "epoch", "J(dE)", "J(psi(dE))", "ratio", "J(E)", f"valid {SELECTION}"]
    return [Finding("Smoothness along training, mean over seeds", head, rows)]


def measure(
    config: Config, split: Split, betas: tuple[float, ...], seeds: tuple[int, ...]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Trains every beta and seed together; yields what an epoch ends with.

    Yields:
      The epoch, and arrays `[len(betas), len(seeds)]`: `before` and `after` psi, `table`, and
      after a validation its NDCG@10.
    """
    trainer = make_trainer(
        config,
        split,
        optimizer=lambda graph: optax.inject_hyperparams(
            lambda beta: monitored_adamw(config, graph, beta), hyperparam_dtype=jnp.float32
        )(beta=0.0),
    )
    part = split.evaluation("valid")
    (valid,), num_slots = ranking_data(
        [part], max_length=config.max_length - trainer.objective.num_queries
    )
    strengths = [beta for beta in betas for _ in seeds]
    state = start(trainer, seeds * len(betas), {"beta": strengths})

    @jax.jit
    def energies(params: Any) -> jax.Array:
        def of_one(params: Any) -> jax.Array:
            mask = table_mask(params, BACKBONES[config.model].tables, trainer.graph.num_nodes)
            masked = jax.tree.map(lambda x, m: x if m else optax.MaskedNode(), params, mask)
            return energy(trainer.graph, masked)

        return jax.lax.map(of_one, params)

    for epoch in range(1, config.epochs + 1):
        state, loss = trainer.epoch(state, epoch)
        if not np.isfinite(loss).all():
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}.")
        found = {name: optax.tree.get(state.opt_state, name) for name in MEASURES}
        found["table"] = energies(state.params)
        if epoch == 1 or epoch % config.eval_every == 0 or epoch == config.epochs:
            ranks = collect(trainer.rank(state.params, valid, num_slots), len(part.targets))
            found[SELECTION] = metrics(ranks)[SELECTION]
        shape = len(betas), len(seeds)
        yield epoch, {k: np.asarray(v, np.float64).reshape(shape) for k, v in found.items()}


def energy(adjacency: Adjacency, tables: Any) -> jax.Array:
    """J of a tree of tables, summed where a model has two."""
    found = jax.tree.map(partial(smoothness, adjacency), tables)
    return jnp.asarray(optax.tree.sum(found))


def monitored_adamw(
    config: Config, adjacency: Adjacency, beta: Any
) -> optax.GradientTransformationExtraArgs:
    """`sevo_adamw` from its pieces, with `optax.monitor` on both sides of psi.

    `optax.tree.get(state, "before")` and `"after"` are running means of J over the steps.
    """

    def monitor(name: str) -> optax.GradientTransformation:
        # Only the tables get here.
        measure = optax.measure_with_ema(partial(energy, adjacency), decay=MEMORY)
        return _scannable(optax.monitor({name: measure}))

    tables = BACKBONES[config.model].tables
    adam: Any = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    moments = scale_by_corrected_adam if config.correct_moments else optax.scale_by_adam
    smoothed = optax.chain(
        moments(**adam),
        monitor("before"),
        sevo(
            adjacency,
            tables=tables,
            beta=beta,
            num_layers=config.num_layers,
            method=config.method,
            rescale=config.rescale,
            isolated=config.isolated,
        ),
        monitor("after"),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(config.learning_rate),
    )
    plain = optax.adamw(config.learning_rate, weight_decay=config.weight_decay, **adam)

    return by_table(smoothed, plain, adjacency, tables)


def _scannable(monitor: optax.GradientTransformation) -> optax.GradientTransformation:
    """Has the measurements in the state from the start, as a `lax.scan` over steps needs."""

    def init(params: Any) -> Any:
        state = monitor.init(params)
        _, later = jax.eval_shape(monitor.update, params, state)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), later)

    return optax.GradientTransformation(init, monitor.update)


def _draw(curves: dict[int, dict[str, np.ndarray]], betas: tuple[float, ...], to: Path) -> None:
    titles = {"before": "J(dE)", "after": "J(psi(dE))", "table": "J(E)"}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for i, beta in enumerate(betas):
            values = [found[name][i].mean() for found in curves.values()]
            color = matplotlib.colormaps["viridis"](i / max(1, len(betas) - 1))
            axis.plot(list(curves), values, color=color, label=f"beta {beta}")
        axis.set(xlabel="epoch", title=title, ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.savefig(to, dpi=110)
