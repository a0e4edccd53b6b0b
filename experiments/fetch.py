"""Downloads the public sets that the experiments use; `load` reads what it leaves behind."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_MOVIELENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclass(frozen=True)
class PublicSet:
    """Where a set is, and the checksums that its publisher states, by `hashlib` name."""

    url: str
    checksums: Mapping[str, str] = field(default_factory=dict)


# Only checksums that the publisher states. The Amazon files come without any.
PUBLIC_SETS: dict[str, PublicSet] = {
    "ml-100k": PublicSet(
        f"{_MOVIELENS}/ml-100k.zip", {"md5": "0e33842e24a9c977be4e0107933c0723"}
    ),
    "ml-1m": PublicSet(f"{_MOVIELENS}/ml-1m.zip", {"md5": "c4d9eecfca2ab87c1945afe126590906"}),
    "amazon-beauty": PublicSet(f"{_AMAZON}/reviews_Beauty_5.json.gz"),
    "amazon-toys": PublicSet(f"{_AMAZON}/reviews_Toys_and_Games_5.json.gz"),
    "amazon-tools": PublicSet(f"{_AMAZON}/reviews_Tools_and_Home_Improvement_5.json.gz"),
    "amazon-home": PublicSet(f"{_AMAZON}/reviews_Home_and_Kitchen_5.json.gz"),
}


def fetch(name: str, folder: str | Path, *, sha256: str | None = None) -> Path:
    """Downloads a public set, checks it, and returns the path to give to `load`.

    A zip file becomes the folder `folder/name`; any other file keeps its name. What is there
    already is returned as it is. The download and the unpacking take place in a temporary
    folder beside the result, which appears by a rename when all of it is sound: after an
    error nothing is left, and the next call starts anew.

    Args:
      name: a key of `PUBLIC_SETS`.
      folder: where the set goes; made if missing.
      sha256: expected checksum of the file as downloaded. Without it, and where the publisher
        states none, the computed one is printed for you to pin.
    """
    if name not in PUBLIC_SETS:
        raise ValueError(f"`name` must be one of {', '.join(PUBLIC_SETS)}, got {name!r}.")
    public, folder = PUBLIC_SETS[name], Path(folder)
    file_name = PurePosixPath(public.url).name
    zipped = file_name.endswith(".zip")
    result = folder / (name if zipped else file_name)
    if result.exists():
        return result
    expected = {**public.checksums, **({"sha256": sha256.lower()} if sha256 else {})}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        file = Path(scratch, file_name)
        _download(public.url, file)
        for algorithm, wanted in expected.items():
            if (found := _checksum(file, algorithm)) != wanted:
                raise ValueError(
                    f"{public.url}: expected {algorithm} {wanted}, received {found}; the file "
                    "was changed on its way, or at its source. Nothing was kept."
                )
        if not expected:
            print(f"{file_name}: sha256 {_checksum(file, 'sha256')}; pin it with `sha256`.")
        os.replace(_unpacked(file, Path(scratch, "unpacked")) if zipped else file, result)
    return result


def _download(url: str, file: Path) -> None:
    """Writes the body of `url` to `file`; `ConnectionError` unless all of it came."""
    try:
        with urlopen(url, timeout=_TIMEOUT) as response, file.open("wb") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
            announced = response.headers.get("Content-Length")
    except HTTPError as error:
        with error:  # it holds the open response
            raise ConnectionError(f"{url}: HTTP {error.code} {error.reason}.") from None
    except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
        raise ConnectionError(f"{url}: {error or type(error).__name__}.") from error
    size = file.stat().st_size
    if announced is not None and size != int(announced):
        raise ConnectionError(f"{url}: expected {announced} bytes, received {size}; try again.")


def _checksum(file: Path, algorithm: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _unpacked(file: Path, target: Path) -> Path:
    """Unpacks a zip file into `target`; returns the one folder in it, or `target` itself."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                path = PurePosixPath(member.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in member:
                    raise ValueError(f"{file.name}: {member!r} would be written elsewhere.")
            archive.extractall(target)  # checks the CRC of every member
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.name}: not a sound zip file ({error}).") from None
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target
