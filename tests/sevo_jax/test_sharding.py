"""Sharded smoothing and training equal those of one device.

The number of devices is fixed once a backend has started, so the tests on eight devices and
those of two processes run in processes of their own.
"""

import socket
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sevo_jax
from sevo_jax.sharding import Sharded, row_shardings, shard_adjacency
from tests.helpers import random_graph
from tests.processes import output, start
from tests.sevo_jax import eight_devices


def _output(process: subprocess.Popen[str]) -> str:
    return output(process, timeout=600)


def test_on_eight_devices_and_a_checkpoint_of_theirs_on_one(tmp_path, x64):
    path = tmp_path / "checkpoint"
    suite = "tests/sevo_jax/eight_devices.py"
    args = ("-m", "pytest", "-q", "-p", "no:cacheprovider", suite)
    printed = _output(start(*args, devices=8, CHECKPOINT=str(path)))
    assert "skipped" not in printed, printed
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = eight_devices.restore(path, lambda tree: jax.tree.map(lambda _: one, tree))
    eight_devices.assert_trees_close(restored, eight_devices.train(*eight_devices.problem()))


def test_two_processes_equal_one():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    module = "tests.sevo_jax.two_processes"
    both = [start("-m", module, str(index), port, devices=1) for index in (0, 1)]
    try:
        for index, process in enumerate(both):
            assert f"process {index}: 3 tables equal" in _output(process)
    finally:
        for process in both:
            process.kill()


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])


def test_one_device():
    adjacency = sevo_jax.normalized_adjacency(random_graph())
    graph = shard_adjacency(adjacency, _mesh())
    again = shard_adjacency(graph, _mesh(), axes="rows")
    assert isinstance(again, Sharded) and not isinstance(again.local, Sharded)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    np.testing.assert_allclose(
        sevo_jax.smooth(again, jax.device_put(x, row_shardings(x, graph))),
        sevo_jax.smooth(adjacency, x),
        atol=1e-6,
    )


@pytest.mark.parametrize("explicit", [True, False])
def test_row_shardings(explicit):
    mesh = _mesh() if explicit else jax.sharding.Mesh(jax.devices()[:1], ("rows",))
    graph = shard_adjacency(random_graph(), mesh)
    tree = {"table": (20, 3), "seeds": (4, 20, 3), "mask": (20,), "bias": (3,), "count": ()}
    shapes = {name: jax.ShapeDtypeStruct(shape, float) for name, shape in tree.items()}
    specs = {name: tuple(s.spec) for name, s in row_shardings(shapes, graph).items()}
    rest = (None,) * explicit
    assert specs == {
        "table": ("rows", *rest),
        "seeds": (None, "rows", *rest),
        "mask": ("rows",),
        "bias": rest,
        "count": (),
    }


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"mesh": None}, TypeError, "takes a `jax.sharding.Mesh`, but `mesh` is NoneType"),
        ({"axes": "columns"}, ValueError, r"axes of the mesh, \('rows',\), but got 'columns'"),
        ({"axes": ()}, ValueError, r"but got \(\)"),
        ({"axes": ("rows", "rows")}, ValueError, r"but got \('rows', 'rows'\)"),
        ({"axes": 3}, ValueError, "but got 3"),
        (
            {"min_rows": "a"},
            ValueError,
            "`min_rows` must be an integer of at least 0 and below 2.*31, got 'a'",
        ),
        ({"graph": None}, TypeError, "is a `jraph.GraphsTuple`"),
    ],
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=message):
        shard_adjacency(**{"graph": random_graph(), "mesh": _mesh()} | kwargs)


def test_bad_input_of_the_others():
    plain = sevo_jax.normalized_adjacency(random_graph())
    with pytest.raises(TypeError, match="result of `shard_adjacency`, but `graph` is "):
        row_shardings({}, plain)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotImplementedError, match="call `shard_adjacency`"):
        none = np.zeros(0, int)
        Sharded.from_edges(none, none, none, 1)
