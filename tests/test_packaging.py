"""What an installation holds: every package, and nothing that is run from the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network, and without leaving anything in the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    for pattern in ("*.py", "*.toml", "README.md", "LICENSE", "fastsskd/**/*.py", "kernels/**/*.py"):
        for path in ROOT.glob(pattern):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, timeout=300, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsskd").rglob("*.py")}
    modules |= {f"fastsskd_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastsskd", "fastsskd_kernels"}


def test_the_command_runs_from_the_wheel_alone(wheel, tmp_path):
    """Its help needs no dependency at all: ``-S`` hides them."""
    code = (
        f"import sys; sys.path[:0] = [{str(wheel)!r}]; from fastsskd import cli, __file__ as where\n"
        f"assert where.startswith({str(wheel)!r})\n"
        "sys.exit(cli.main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and "predict" in done.stdout, done.stderr
