"""The package as pip installs it: one regular package, typed, with all it needs and no tests in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import limpet

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the content of a wheel that was built from the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    sources = directory / "sources"
    for name in ("benchmarks", "engine", "recovery", "schema"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "plots", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(directory)], cwd=sources, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(directory / done.stdout.split()[-1]) as wheel:
        wheel.extractall(directory / "installed")
    return directory / "installed"


def run(installed: Path, code: str, directory: Path) -> str:
    """Run Python with the wheel's content before the editable install, in a directory."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_what_is_in_the_wheel(installed: Path) -> None:
    """Every module of the sources is installed once, under one top-level package; nothing else is.

    `benchmarks/peers` is a program for this checkout, and no module.
    """
    names = {path.name for path in installed.iterdir()}
    assert names == {"limpet", f"limpet-{limpet.__version__}.dist-info"}
    folders = ("benchmarks", "engine", "recovery", "schema")
    sources = [path for name in folders for path in (ROOT / name).rglob("*.py") if path.parent.name != "peers"]
    assert sum(1 for _ in installed.rglob("*.py")) == len(sources)
    assert [path.parent.name for path in installed.rglob("py.typed")] == ["limpet"]


def test_a_clone_named_limpet_takes_nobodys_place(installed: Path, tmp_path: Path) -> None:
    """With a folder `limpet` in the working directory, which has the sources in it, the installed package is used."""
    for name in ("engine", "schema", "recovery"):
        (tmp_path / "limpet" / name).mkdir(parents=True)
        (tmp_path / "limpet" / name / "__init__.py").touch()
    code = (
        "import limpet, limpet.engine, limpet.recovery, limpet.schema, limpet.testing\n"
        "from limpet import AsyncEngine, AsyncStore, Engine, Snapshot, Store, errors, recover\n"
        "from limpet.engine import Engine as same\nassert same is Engine\n"
        "print(limpet.__file__, limpet.__version__)"
    )
    found, version = run(installed, code, tmp_path).split()
    assert Path(found).parent == installed / "limpet"
    assert version == limpet.__version__


def test_doors_export_a_dozen_names_at_most() -> None:
    """`limpet` and the doors of its rooms have few names, and each of them is there."""
    rooms = (
        "limpet",
        "limpet.engine",
        "limpet.engine.store",
        "limpet.engine.database",
        "limpet.engine.database.sqlite",
    )
    rooms += ("limpet.engine.starters", "limpet.engine.reconcile", "limpet.engine.inspection", "limpet.engine.images")  # type: ignore[assignment]
    for name in rooms:
        module = __import__(name, fromlist=["__all__"])
        assert len(module.__all__) <= 12, name
        assert all(getattr(module, each) is not None for each in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = limpet.nothing


def test_its_version_is_known_where_nothing_is_installed(installed: Path, tmp_path: Path) -> None:
    """As in a frozen program, or while pip replaces it: the command and the engine say which code runs."""
    code = f"""
import importlib.metadata, sys

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = version
from limpet import Engine
from limpet.engine.control import ask_live
from limpet.engine.control.requests import Info
with Engine.open({str(tmp_path / "state")!r}):
    print(ask_live({str(tmp_path / "state")!r}, Info()).limpet, flush=True)
sys.argv[1:] = ["--version"]
from limpet.__main__ import main
main()
"""
    told, line = run(installed, code, tmp_path).splitlines()
    assert told == line.split()[1] == limpet.__version__
