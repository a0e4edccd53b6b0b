"""Training on eight devices, and in two processes, equals that on one.

The number of devices is fixed once a backend has started, so these run in processes of their
own; see `eight_devices.py`.
"""

import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, records
from experiments.run_folder import load_run
from tests.experiments import eight_devices
from tests.processes import output, start


def _output(process: subprocess.Popen[str]) -> str:
    return output(process, timeout=900)


def _values(folder: Path) -> list[tuple]:
    """Kind, epoch, seed, and the loss or metric of every record."""
    return [
        (r["kind"], r["epoch"], r["seed"], r["loss"] if r["kind"] == "epoch" else r["NDCG@10"])
        for r in records.read(folder / records.FILE)
    ]


def _assert_same(folder: Path, other: Path) -> None:
    for a, b in zip(_values(folder), _values(other), strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_allclose(a[3], b[3], rtol=0, atol=1e-6)


def _run_on_eight_devices(marks: str, folder: Path) -> None:
    suite = "tests/experiments/eight_devices.py"
    args = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, suite)
    printed = _output(start(*args, devices=8, FOLDER=str(folder)))
    assert "passed" in printed and "skipped" not in printed, printed


def test_on_eight_devices_and_on_one_from_their_checkpoint(tmp_path):
    _run_on_eight_devices("not slow", tmp_path)
    module, *_ = load_run(tmp_path / "eight", seed=5)
    assert module.item_embedding.embedding.shape == (100, 8)  # without the free rows
    eight_devices.go_on(tmp_path / "one")
    _assert_same(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_every_other_setting_on_eight_devices(tmp_path):
    _run_on_eight_devices("slow", tmp_path)


OPTIONS = "train --model mf --optimizers sevo_adamw --epochs 2 --eval-every 1 --batch-size 512"


def test_two_processes_equal_one(tmp_path):
    """The command line; the first process alone writes, and prints."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    out = ("--out", str(tmp_path / "two"))
    shared = (*OPTIONS.split(), *out, "--mesh", "2", "--coordinator", address)
    both = [
        start(
            *("-m", "experiments", *shared, "--num-processes", "2", "--process-id", index),
            devices=1,
        )
        for index in "01"
    ]
    try:
        first, second = map(_output, both)
    finally:
        for process in both:
            process.kill()
    assert "NDCG@10" in first and "NDCG@10" not in second
    cli.main([*OPTIONS.split(), "--out", str(tmp_path / "one"), "--streams", "2"])
    _assert_same(tmp_path / "two" / "sevo_adamw", tmp_path / "one" / "sevo_adamw")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--mesh 1000", "`mesh` must be from 1 to the"),
        ("--num-processes 2", "`num_processes` and `process_id` need a `coordinator`"),
        ("--coordinator auto", "`coordinator` needs a `mesh`"),
        ("--mesh 1 --coordinator host", "`coordinator` must be HOST:PORT or auto, got 'host'"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", *options.split()])
    assert message in capsys.readouterr().err
