"""Ahead-of-time compilation: the account of a program, the page, and two real compilers."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import aot
from benchmarks.aot import HEAD, SIZES, Step, Use, collectives, compile_step, page, row
from benchmarks.targets import TARGETS, missing
from tests.processes import output, start

FOLDER = Path(__file__).parent


def test_on_eight_devices():
    suite = "tests/benchmarks/eight_devices.py"
    # Without the other flag of the tests: a rounding more is what Adam raises above the bound.
    flags = "--xla_backend_optimization_level=0"
    args = "-m", "pytest", "-q", "-p", "no:cacheprovider", suite
    process = start(*args, devices=8, XLA_FLAGS=flags)
    printed = output(process, timeout=300)
    assert "2 passed" in printed, printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("%a = f32[4,8]{1,0} add(%b, %c)", {}),
        (
            "%a = f32[4,8]{1,0:T(8,128)S(1)} all-gather(%b), dimensions={0}\n"
            "ROOT %c = (f32[]{:T(128)}, bf16[3]{0}, /*index=2*/pred[5]{0}) all-reduce(%d, %e)\n"
            "%f = s32[2]{0} all-gather(%g), channel_id=1",
            {"all-gather": (2, 128 + 8), "all-reduce": (1, 4 + 6 + 5)},
        ),
        (  # asynchronous, as CUDA has them
            "%s = ((f32[8,4]{1,0}), f32[1,4]{1,0}) reduce-scatter-start(%a), to_apply=%r\n"
            "%d = f32[1,4]{1,0} reduce-scatter-done(%s), metadata={}",
            {"reduce-scatter": (1, 16)},
        ),
        (  # a chain of pieces, as TPUs have them; another kind, another chain
            "".join(
                f'%a{i} = f32[8]{{0}} {kind}(%b), frontend_attributes={{chain_id="{chain}"}}\n'
                for i, (kind, chain) in enumerate(
                    [("all-gather", 0), ("all-gather", 0), ("all-gather", 1), ("all-reduce", 0)]
                )
            ),
            {"all-gather": (2, 64), "all-reduce": (1, 32)},
        ),
    ],
)
def test_collectives(text, expected):
    assert collectives(text) == expected


def _step(target: str, temporary: float, **others) -> Step:
    use = Use(3e9, data=0.5e9, outputs=2e9, reused=1.5e9, temporary=temporary, code=0.25e9)
    return Step(target, SIZES["10m"], 12.4, use.total, use, **others)


def test_a_row_adds_up_what_a_device_holds():
    step = _step("v5e", 12.25e9, flops=5.2e9, collectives={"all-to-all": (2, 160_000_000)})
    cells = dict(zip(HEAD, row(step), strict=True))
    assert cells["items"] == "10,000,000" and cells["directed edges"] == "40,000,000"
    assert cells["all, with code"] == "16.000"  # 3 + 2 - 1.5 + 12.25 + 0.25
    assert cells["outputs, not in place"] == "0.500"
    assert cells["fits"] == "yes, of 16"
    assert cells["collectives"] == "2 all-to-all (160 MB)"
    assert cells["ms at least"] == "5.49"  # 3 - 0.5 + 2 GB at 819 GB/s
    assert row(_step("v5e", 12.26e9))[HEAD.index("fits")] == "**no**, of 16"
    assert row(_step("h200", 12.26e9))[HEAD.index("fits")] == "yes, of 141"
    place = HEAD.index("collectives")
    assert row(_step("h200", 0.0, collectives={}))[place] == "none"
    assert row(_step("h200", 0.0))[place] == "not told"


def test_the_page_has_a_line_for_each_step():
    lines = page([_step("v5e", 1e9), _step("h200-8", 2e9)], "python -m some").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| v5e", "| h200-8"]
    assert len({line.count("|") for line in table}) == 1
    assert "    python -m some" in lines


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    def refuse(message):
        def compile():
            raise jax.errors.JaxRuntimeError(message)

        lowered = SimpleNamespace(compile=compile)
        monkeypatch.setattr(aot, "lower_epoch", lambda *_: lowered)

    monkeypatch.setattr(aot, "mesh_of", lambda _: None)
    for message in (
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 29.50G of 15.75G hbm. Exceeded",
        "RESOURCE_EXHAUSTED: HLO temporaries (29.50G) exceeds available HBM (15.75G)",
    ):
        refuse(message)
        step = compile_step("v5e", SIZES["10m"])
        assert not step.fits and step.needed == 29.5 * 1024**3
    assert len(row(step)) == len(HEAD) and "**no**, of 16" in row(step)
    refuse("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_step("v5e", SIZES["10m"])


def test_bad_input(capsys, monkeypatch):
    for args, message in [
        (["--targets", "abacus"], "`targets` must be of ('v5e', "),
        (["--sizes", "huge", "--targets", "v5e"], "`sizes` must be of ('beauty', "),
        (["--targets", "v5e"], "v5e needs a compiler, the package libtpu, which is not"),
    ]:
        monkeypatch.setattr(aot, "missing", lambda target: target.device.package)
        with pytest.raises(SystemExit, match="2"):
            aot.main(args)
        assert message in capsys.readouterr().err


@pytest.mark.slow  # a minute or two
@pytest.mark.parametrize("target", ["v5e-4x4", "h200-8"])
def test_compiles_for_devices_that_are_not_there(target, tmp_path):
    if package := missing(TARGETS[target]):
        pytest.skip(f"its compiler, {package}, is not installed")
    out = tmp_path / "page.md"
    options = "--targets", target, "--sizes", "beauty", "--out", str(out)
    # As a user compiles them: XLA's flags of the tests would change the programs.
    process = start("-m", "benchmarks", "aot", *options, devices=1, XLA_FLAGS="")
    output(process, timeout=1200)
    (line,) = [line for line in out.read_text().splitlines() if line.startswith(f"| {target}")]
    assert "| yes, of" in line and "2 all-to-all" in line
