"""Downloads, against a server on this machine."""

import hashlib
import io
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from experiments import fetch as fetching
from experiments.fetch import PUBLIC_SETS, PublicSet, fetch
from experiments.loaders import load


class Reply(NamedTuple):
    body: bytes
    status: int = 200
    missing: int = 0  # bytes announced but never sent
    delay: float = 0  # seconds before the answer


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


RATINGS = "1::10::5::3\n1::11::4::2\n"
GOOD_ZIP = zipped(**{"ml/README": "read me", "ml/ratings.dat": RATINGS})
LINES = b"1 2 3\n2 3 4\n"


@pytest.fixture
def serve(monkeypatch):
    """Registers a public set "toy" at a path of a local server that answers with `reply`."""
    replies: dict[str, Reply] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            reply = replies[self.path]
            time.sleep(reply.delay)
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(reply.body) + reply.missing))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def register(file: str, reply: Reply, **checksums: str) -> list[str]:
        replies[f"/{file}"] = reply
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        monkeypatch.setitem(PUBLIC_SETS, "toy", PublicSet(url, checksums))
        return asked

    yield register
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_zip_file_becomes_a_folder(serve, tmp_path, capsys):
    asked = serve("ml.zip", Reply(GOOD_ZIP), md5=hashlib.md5(GOOD_ZIP).hexdigest())
    path = fetch("toy", tmp_path / "new" / "data")
    assert path == tmp_path / "new" / "data" / "toy"
    assert (path / "ratings.dat").read_text() == RATINGS
    assert load(path).values.tolist() == [1, 0]
    assert [p.name for p in path.parent.iterdir()] == ["toy"]
    # What is there is not fetched again.
    assert fetch("toy", path.parent) == path and len(asked) == 1
    assert capsys.readouterr().out == ""


def test_an_unpinned_file_tells_its_checksum(serve, tmp_path, capsys):
    serve("log.txt", Reply(LINES))
    path = fetch("toy", tmp_path)
    assert path.read_bytes() == LINES
    digest = hashlib.sha256(LINES).hexdigest()
    assert capsys.readouterr().out == f"log.txt: sha256 {digest}; pin it with `sha256`.\n"
    path.unlink()
    assert fetch("toy", tmp_path, sha256=digest.upper()) == path
    assert capsys.readouterr().out == ""


def test_a_zip_file_without_a_folder_in_it(serve, tmp_path):
    serve("flat.zip", Reply(zipped(a="1", b="2")))
    assert sorted(p.name for p in fetch("toy", tmp_path).iterdir()) == ["a", "b"]


WRONG = "0" * 32
BAD_ZIP = GOOD_ZIP.replace(b"1::10", b"1::99")  # the CRC of this member no longer fits


@pytest.mark.parametrize(
    ("file", "reply", "checksums", "error", "message"),
    [
        ("a.txt", Reply(LINES), {"md5": WRONG}, ValueError, f"expected md5 {WRONG}, received"),
        ("a.txt", Reply(b"gone", 404), {}, ConnectionError, "HTTP 404 Not Found"),
        ("a.txt", Reply(b"", 503), {}, ConnectionError, "HTTP 503"),
        (
            "a.txt",
            Reply(LINES, missing=7),
            {},
            ConnectionError,
            "expected 19 bytes, received 12",
        ),
        ("a.zip", Reply(GOOD_ZIP, missing=7), {}, ConnectionError, "try again"),
        ("a.zip", Reply(LINES), {}, ValueError, "a.zip: not a sound zip file"),
        ("a.zip", Reply(BAD_ZIP), {}, ValueError, "a.zip: not a sound zip file .*CRC"),
        ("a.zip", Reply(zipped(**{"../x": "1"})), {}, ValueError, "would be written elsewhere"),
        ("a.zip", Reply(zipped(**{"/x": "1"})), {}, ValueError, "would be written elsewhere"),
        ("a.zip", Reply(zipped(**{"a\\..\\x": "1"})), {}, ValueError, "written elsewhere"),
    ],
)
def test_nothing_remains_of_a_failure(serve, tmp_path, file, reply, checksums, error, message):
    serve(file, reply, **checksums)
    with pytest.raises(error, match=message):
        fetch("toy", tmp_path / "data")
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]


def test_the_pinned_checksum_counts_beside_the_published_one(serve, tmp_path):
    serve("a.txt", Reply(LINES), md5=hashlib.md5(LINES).hexdigest())
    with pytest.raises(ValueError, match="expected sha256 00.*, received"):
        fetch("toy", tmp_path, sha256="00")
    assert not list(tmp_path.iterdir())


def test_no_server(monkeypatch, tmp_path):
    monkeypatch.setitem(PUBLIC_SETS, "toy", PublicSet("http://127.0.0.1:9/a.txt"))
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9/a.txt: "):
        fetch("toy", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_falls_silent(serve, monkeypatch, tmp_path):
    serve("a.txt", Reply(LINES, delay=0.3))
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.05)
    with pytest.raises(ConnectionError, match="timed out"):
        fetch("toy", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="`name` must be one of ml-100k, ml-1m, .*'ml-9m'"):
        fetch("ml-9m", tmp_path)
