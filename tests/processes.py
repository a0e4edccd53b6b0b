"""Python in processes of its own, with as many CPU devices as asked for."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*args: str, devices: int, **env: str) -> subprocess.Popen[str]:
    """Runs `python ARGS` in the project's folder, on `devices` devices."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTEST_ADDOPTS": "",
    }
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        env=os.environ | settings | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: subprocess.Popen[str], *, timeout: float) -> str:
    """What it printed, once it has ended well within `timeout` seconds."""
    text = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, text
    return text
