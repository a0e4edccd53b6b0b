"""The paper's ablations, and what it left open: each a table of settings to compare.

Settings that differ in traced values alone (learning rate, weight decay, beta, number of
layers, rescaling, moment correction, residual decay) train in one compiled program; others form
a program each.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from experiments import study
from experiments.backbones import fixed
from experiments.config import FIXED, Config, Loss
from experiments.data import split_of
from experiments.distillation import TEACHER, distillation
from experiments.main_job import check_out, show
from experiments.options import Ablate
from experiments.presets import preset
from experiments.ranking import METRICS
from experiments.run import SELECTION, Result, fit_sweep
from experiments.run_folder import load_run
from experiments.statistics import spread
from experiments.tables import bases, gain

BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
Make = Callable[..., Config]  # of an optimizer and settings that replace the preset's


def optimizer(make: Make) -> dict[str, Config]:
    """Fig. 3a: three optimizers, plain and with SEvo. The paper states no rate for SGD."""
    arms = {}
    for base in ("sgd", "adam", "adamw"):
        rate = {"learning_rate": 1.0} if base == "sgd" else {}
        arms[base] = make(base, **rate)
        arms[f"sevo_{base}"] = make(f"sevo_{base}", **rate)
    return arms


def approximation(make: Make) -> dict[str, Config]:
    """Fig. 3b: Neumann and iterative over the strength of the smoothing."""
    return {
        f"{method} beta={beta}": make("sevo_adamw", method=method, beta=beta)
        for method in ("neumann", "iterative")
        for beta in BETAS
    }


def rescale(make: Make) -> dict[str, Config]:
    """Fig. 2a: with and without the factor that makes the coefficients sum to one."""
    return {
        "rescaled": make("sevo_adamw"),
        "not rescaled": make("sevo_adamw", rescale=False),
    }


def correction(make: Make) -> dict[str, Config]:
    """Fig. 3c: moments of rows without a gradient, kept or decayed, at beta 0 too."""
    return {
        f"{'corrected' if correct else 'plain'} beta={beta}": make(
            "sevo_adamw", correct_moments=correct, beta=beta
        )
        for beta in (0.0, 0.99)
        for correct in (True, False)
    }


def layers(make: Make) -> dict[str, Config]:
    """Table 7: how far the smoothing reaches; and the exact inverse, which has no limit."""
    arms = {f"L={num}": make("sevo_adamw", num_layers=num) for num in range(6)}
    return arms | {"exact": make("sevo_adamw", method="exact")}


def graph(make: Make) -> dict[str, Config]:
    """Fig. 4: which items of a sequence make edges, how far apart, and how they weigh."""
    arms = {f"last K={window}": make("sevo_adamw", graph_window=window) for window in (5, 10)}
    arms["last K=50"] = make("sevo_adamw", graph_window=50)
    arms["first K=10"] = make("sevo_adamw", graph_keep="first", graph_window=10)
    for distance in (2, 3, 4, 5):
        for weighting in ("inverse_distance", "count"):
            arms[f"H={distance} {weighting}"] = make(
                "sevo_adamw", graph_distance=distance, graph_weighting=weighting
            )
    return arms


def genres(make: Make) -> dict[str, Config]:
    """Table 4: items that share attributes, in MovieLens genres, against interactions."""
    arms = {"adamw": make("adamw"), "beta=0": make("sevo_adamw", beta=0.0)}
    for name, kind in (("interactions", "items"), ("genres", "attributes")):
        for value in BETAS[1:]:
            arms[f"{name} beta={value}"] = make("sevo_adamw", graph=kind, beta=value)
    return arms


def placement(make: Make) -> dict[str, Config]:
    """Psi on Adam's step (the paper), on the gradient, first there and then here, or both;
    which rows' moments move; and columns that are smoothed less than others."""
    arms = {"adamw": make("adamw"), "update": make("sevo_adamw")}
    arms["gradient"] = make("sevo_adamw", placement="gradient")
    arms["gradient, then update"] = make("sevo_adamw", placement="switch")
    # Two weaker smoothings one after the other reach about as far as a strong one.
    arms["both, beta=0.5"] = make("sevo_adamw", placement="both", beta=0.5)
    arms["both, beta=0.9"] = make("sevo_adamw", placement="both", beta=0.9)
    arms["beta by column"] = make("sevo_adamw", beta_ramp=True)
    arms["isolated rows kept"] = make("sevo_adamw", isolated="identity")
    arms["items of the batch touched"] = make("sevo_adamw", touched="batch")
    return arms


def loss(make: Make) -> dict[str, Config]:
    """What SEvo is worth beside stronger losses: the paper trains with one negative. A model
    whose objective has a loss of its own is compared in that one alone."""
    arms = {}
    own = FIXED.get(make("adamw").model, {}).get("loss")
    for kind in (own,) if own else get_args(Loss):
        drawn = {"sampled_softmax": 256, "gbce": 64}.get(kind, 1)
        settings = {"loss": kind, "num_negatives": drawn}
        arms[f"{kind} adamw"] = make("adamw", **settings)
        arms[f"{kind} update"] = make("sevo_adamw", **settings)
        arms[f"{kind} gradient"] = make("sevo_adamw", placement="gradient", **settings)
    return arms


def beta(make: Make) -> dict[str, Config]:
    """The strength of the smoothing, beside the plain optimizer."""
    return {"adamw": make("adamw")} | {
        f"beta={value}": make("sevo_adamw", beta=value) for value in BETAS
    }


def every(make: Make) -> dict[str, Config]:
    """How rarely psi may smooth: it then takes the sum of the updates since it last did."""
    return {"adamw": make("adamw")} | {
        f"every {steps}": make("sevo_adamw", smooth_every=steps)
        for steps in (1, 4, 16, 64, 256, 1024)
    }


def residual(make: Make) -> dict[str, Config]:
    """How long gradients see what psi takes from the updates; "none" is the paper's."""
    return {"adamw": make("adamw"), "none": make("sevo_adamw")} | {
        f"decay {decay}": make("sevo_adamw", residual_decay=decay)
        for decay in (0.9, 0.98, 0.995, 0.998, 0.999, 0.9998)
    }


def users(make: Make) -> dict[str, Config]:
    """Few users to train on, where the graph should help most. Fewer users make an epoch
    shorter; there are more epochs in turn, so that all arms take about as many steps."""
    arms = {}
    for fraction in (0.1, 0.25, 0.5, 1.0):
        for optimizer in ("adamw", "sevo_adamw"):
            usual = make(optimizer)
            arms[f"{fraction:.0%} {optimizer}"] = make(
                optimizer,
                train_users=fraction,
                epochs=round(usual.epochs / fraction),
                eval_every=round(usual.eval_every / fraction),
            )
    return arms


ABLATIONS: dict[str, Callable[[Make], dict[str, Config]]] = {
    function.__name__: function
    for function in (
        optimizer,
        approximation,
        rescale,
        correction,
        layers,
        graph,
        genres,
        placement,
        loss,
        beta,
        every,
        residual,
        users,
        distillation,
    )
}


def programs(arms: dict[str, Config]) -> list[dict[str, Config]]:
    """Groups arms that can share a compiled program, in the order of their first ones."""
    groups: dict[tuple, dict[str, Config]] = {}
    for label, config in arms.items():
        groups.setdefault(tuple(fixed(config).items()), {})[label] = config
    return list(groups.values())


def ablate(options: Ablate, console: Console | None = None) -> dict[str, Result]:
    """Runs `python -m experiments ablate NAME`; returns the result of each arm.

    Of a study (`experiments.study`) there are no arms: it keeps what it finds itself.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    if options.name in study.STUDIES:
        study.run(options, console)
        return {}
    arms, places, dataset, split = arms_of(options)
    out = options.out or Path("runs") / f"{dataset.name}-{options.model}-{options.name}"
    done: dict[str, Result] = {}
    asked = {"name": options.name, "given": options.given(), "arms": list(options.arms)}
    notes = {
        _folder(arm): {"ablation": {**asked, "arm": arm, "order": places[arm]}} for arm in arms
    }
    teacher = None
    ordered = sorted(programs(arms), key=lambda group: TEACHER not in group)
    runs = (
        out / f"program_{number}" / _folder(arm)
        for number, group in enumerate(ordered)
        for arm in group
    )
    check_out(out, runs, options.resume, console)
    for number, group in enumerate(ordered):
        with show(console, ", ".join(group), next(iter(group.values()))) as report:
            results = fit_sweep(
                {_folder(label): config for label, config in group.items()},
                split,
                options.seeds,
                out / f"program_{number}",
                source=options.data,
                data_options=options.data_options(),
                resume=options.resume,
                report=report,
                notes=notes,
                teacher=teacher,
            )
        if TEACHER in group:
            teacher = load_run(out / f"program_{number}" / TEACHER, options.seeds[0])[0]
        done |= zip(group, results, strict=True)
    console.print(_table(options.name, arms, {label: done[label] for label in arms}))
    console.print(f"records, ranks and checkpoints are in {out}")
    return done


def _folder(arm: str) -> str:
    return arm.replace(" ", "_")


def _table(name: str, configs: dict[str, Config], results: dict[str, Result]) -> Table:
    """Test metrics of each arm, and the gain in NDCG@10 over what `tables.bases` says."""
    gained = f"{SELECTION} gain"
    table = Table("arm", *METRICS, "best epoch", gained, "over", title=f"{name}, test")
    labels = list(results)
    over = bases([configs[label] for label in labels])
    for (label, result), base in zip(results.items(), over, strict=True):
        cells = [spread(result.test[metric]) for metric in METRICS]
        compared = ["", ""]
        if label != labels[base]:
            means = [r.test[SELECTION].mean() for r in (result, results[labels[base]])]
            compared = [gain(*means), labels[base]]
        table.add_row(label, *cells, " ".join(map(str, result.best_epoch)), *compared)
    return table


def arms_of(options: Ablate) -> tuple[dict[str, Config], dict[str, int], Any, Any]:
    """The settings that an ablation compares, the places of all, and the data they train on."""
    if options.name not in ABLATIONS:
        names = (*ABLATIONS, *study.STUDIES)
        raise ValueError(f"`name` must be one of {names}, got {options.name!r}.")
    dataset, split = split_of(options)
    name = options.preset_name(dataset.name)

    def make(optimizer: str, **settings: Any) -> Config:
        given = options.given_to(optimizer) | settings
        return preset(options.model, name, optimizer, **given)

    arms = ABLATIONS[options.name](make)
    places = {label: place for place, label in enumerate(arms)}
    chosen = set(options.arms or arms)
    if unknown := chosen - set(arms):
        raise ValueError(f"`arms` must be of {tuple(arms)}, got {sorted(unknown)}.")
    if any(arms[label].has_teacher for label in chosen):
        chosen.add(TEACHER)
    arms = {label: config for label, config in arms.items() if label in chosen}
    for label, config in arms.items():
        for key, value in options.given_to(config.optimizer).items():
            # Of fewer users there are more epochs.
            derived = options.name == "users" and key in ("epochs", "eval_every")
            if getattr(config, key) != value and not derived:
                raise ValueError(
                    f"`{key}` is {getattr(config, key)} in the arm {label!r} of "
                    f"{options.name}, but {value} was given. Leave it out, or choose `arms`."
                )
    options.check_given(arms.values())
    if any(config.graph == "attributes" for config in arms.values()):
        dataset.known_attributes()  # missing ones shall not come to light after hours
    return arms, places, dataset, split
