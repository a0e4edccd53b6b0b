"""Where the real datasets are; tests that need them are skipped without."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).parents[2] / "shared" / "data"


def data_folder(name: str) -> Path:
    """The folder of dataset `name`, under `$SEVO_DATA` or `../shared/data`."""
    folder = Path(os.environ.get("SEVO_DATA", _BESIDE)) / name
    if not folder.is_dir():
        pytest.skip(f"needs the dataset {name}: {folder} is missing; set SEVO_DATA")
    return folder
