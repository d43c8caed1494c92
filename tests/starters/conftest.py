"""What the tests of starters share: an engine for a test or a module, and /run freed after each."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Engine
from tests.starters.oci import busybox_engine, free_sandboxes


@pytest.fixture
def engine(state_dir: str) -> Iterator[Engine]:
    """An engine with the sandbox "jobs"."""
    with Engine.open(state_dir) as opened:
        opened.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        yield opened


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for a module, with a sandbox for each OCI runtime, made of the module's `SANDBOX` if it has one."""
    directory = tmp_path_factory.mktemp("oci")
    with busybox_engine(str(directory / "state"), directory, getattr(request.module, "SANDBOX", {})) as opened:
        yield opened


@pytest.fixture
def subreaper() -> Iterator[None]:
    """While a test runs, orphans become children of this process, as of one that is the first of a pid namespace."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(set_child_subreaper, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def free_what_is_held(tmp_path: Path) -> Iterator[None]:
    """Free what the sandboxes of this test's own state directories still hold."""
    yield
    for found in [*tmp_path.glob("oci"), *tmp_path.glob("*/oci")]:
        free_sandboxes(str(found.parent))
