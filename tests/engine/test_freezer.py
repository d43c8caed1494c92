"""Which cgroup freezes a container, on hosts that this one is not: directories stand for their cgroups.

With real cgroups: tests/intent/test_pause.py.
"""

from pathlib import Path

import pytest

from limpet.engine import errors
from limpet.engine.starters.process.cgroups import freezer
from limpet.engine.starters.process.cgroups.freezer import Freezer
from limpet.engine.starters.process.cgroups.hierarchies import Cgroups
from limpet.engine.starters.process.cgroups.parents import Notes

PID = 12345


def make_cgroup(path: Path) -> Path:
    """A directory with what a frozen cgroup v2 has, and our process in it."""
    path.mkdir()
    for name, text in {"cgroup.procs": f"{PID}\n", "cgroup.events": "populated 1\nfrozen 1\n"}.items():
        (path / name).write_text(text)
    for name in ("cgroup.controllers", "cgroup.freeze"):
        (path / name).touch()
    return path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with cgroup v2 alone: the keeper is in its root, the container's first process in what limits made."""
    top = make_cgroup(tmp_path / "cgroup")
    limits = make_cgroup(top / "limpet-one")

    def read(pid: int) -> Cgroups:
        return Cgroups({}, str(limits if pid == PID else top), str(top))

    monkeypatch.setattr(freezer, "read_cgroups", read)
    return top


def make_freezer(tmp_path: Path) -> Freezer:
    return Freezer("one", PID, "scope", Notes(str(tmp_path)))


def test_what_the_limits_have_made_freezes(host: Path, tmp_path: Path) -> None:
    """The container's processes are all in there, and none has to be moved to a cgroup of its own."""
    one = make_freezer(tmp_path)
    assert not one.is_frozen()
    one.freeze(lambda: [PID])
    assert (host / "limpet-one/cgroup.freeze").read_text().strip() == "1"
    assert one.is_frozen()
    assert sorted(path.name for path in host.iterdir() if path.is_dir()) == ["limpet-one"]
    one.thaw()
    assert (host / "limpet-one/cgroup.freeze").read_text().strip()[-1] == "0"


def test_a_cgroup_that_its_process_has_left_is_not_frozen(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has moved the first process elsewhere: neither what limits made nor where it is now is touched."""
    elsewhere = make_cgroup(host / "elsewhere")
    monkeypatch.setattr(freezer, "read_cgroups", lambda pid: Cgroups({}, str(elsewhere if pid else host), str(host)))
    with pytest.raises(errors.UnsupportedError, match=r"limpet-pause-scope-one/cgroup.freeze: this kernel has none"):
        make_freezer(tmp_path).freeze(lambda: [PID])
    for path in (elsewhere, host / "limpet-one"):
        assert (path / "cgroup.freeze").read_text() == ""
    assert sorted(path.name for path in host.iterdir() if path.is_dir()) == ["elsewhere", "limpet-one"]


def test_a_host_without_cgroups_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was tried, so that there is no file to name: it says what is missing."""
    monkeypatch.setattr(freezer, "read_cgroups", lambda _pid: Cgroups({}, "", ""))
    with pytest.raises(errors.UnsupportedError, match="no cgroup v2, and no freezer of cgroup v1, is to be seen"):
        make_freezer(tmp_path).freeze(lambda: [PID])
