"""The command line, `python -m experiments COMMAND`; without a command, `train`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.options import Ablate, Fetch, Recommend, Report, Train

Command = Train | Ablate | Recommend | Fetch | Report


def parse(args: list[str]) -> Any:
    """The command that the arguments ask for; without any, `train` with its defaults."""
    commands = (
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Ablate, tyro.conf.subcommand("ablate")]
        | Annotated[Recommend, tyro.conf.subcommand("recommend")]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")]
        | Annotated[Report, tyro.conf.subcommand("report")]
    )
    return tyro.cli(
        commands, prog="python -m experiments", args=args or ["train"], description=__doc__
    )


def main(args: list[str] | None = None) -> None:
    """Runs a command; bad input ends with a message and exit status 2."""
    command = parse(sys.argv[1:] if args is None else args)
    try:
        _run(command)
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumes = isinstance(command, Train)
        if isinstance(command, Ablate):
            from experiments.study import STUDIES

            resumes = command.name not in STUDIES
        how = "; the same command with --resume goes on" if resumes else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
        sys.exit(130)


def _run(command: Command) -> None:
    # Imported when needed: `--help` should not wait for JAX.
    if isinstance(command, Train):
        from experiments.main_job import train

        train(command)
    elif isinstance(command, Ablate):
        from experiments.ablations import ablate

        ablate(command)
    elif isinstance(command, Recommend):
        from experiments.recommend import recommend

        recommend(command)
    elif isinstance(command, Fetch):
        from experiments.fetch import fetch

        path = fetch(command.name, command.folder, sha256=command.sha256)
        print(f"{command.name} is in {path}; pass it to `train --data`")
    else:
        from experiments.page import write_page
        from experiments.report import keep, untested, write_report

        if not command.runs:
            raise ValueError("`runs` must name at least one folder.")
        if command.keep:
            keep(command.runs, command.keep)
        ours = command.runs == Report().runs  # the records that the repository keeps
        page = command.page or (Path() if ours else command.runs[0]) / "RESULTS.md"
        html = command.html or page.with_suffix(".html")
        if html.resolve() == page.resolve():
            raise ValueError(f"`page` and `html` must be two files, got {page} for both.")
        print(f"{page}: tables of {write_report(command.runs, page)} runs")
        for path in untested(command.runs):
            print(f"{path}: left out, as it holds no test yet")
        write_page(command.runs, html)
        print(f"{html}: their figures and comparisons")
