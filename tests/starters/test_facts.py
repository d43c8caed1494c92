"""What a look says of the process starter on this machine: the keeper that lives, and where cgroups are made."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from limpet import Engine
from limpet.engine.starters.process import facts
from limpet.engine.starters.process.cgroups.hierarchies import Cgroups
from limpet.engine.starters.process.facts import find_facts
from limpet.engine.starters.process.unapplied import find_abilities
from limpet.engine.starters.users import may_set_groups
from tests.conftest import is_running, wait_until
from tests.starters.host import make


def test_a_keeper_is_told_while_it_lives(engine: Engine, state_dir: str) -> None:
    """None before the first container and after the last; in between it is the parent. No descriptor is left."""
    assert find_facts(state_dir).keeper_pid == 0
    assert find_facts(os.path.join(state_dir, "missing")).keeper_pid == 0
    container = make(engine, "one", "sleep", "1000")
    pid = container.start().pid
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    before = os.listdir("/proc/self/fd")
    assert find_facts(state_dir).keeper_pid == parent
    assert os.listdir("/proc/self/fd") == before
    os.kill(parent, 9)
    wait_until(lambda: not is_running(parent), "the keeper's end")
    wait_until(lambda: find_facts(state_dir).keeper_pid != parent, "another keeper")
    container.stop(0)


DELEGATED, TAKEN, NONE = "delegated", "taken", ""


@pytest.mark.parametrize(
    ("v1", "v2", "told", "problem"),
    [
        ({"pids": "/v1/pids", "cpu": "/v1/cpu"}, NONE, "/v1/cpu", ""),
        ({"pids": "/v1/pids"}, DELEGATED, "v2", ""),
        ({"pids": "/v1/pids", "cpu": "/v1/cpu"}, TAKEN, "/v1/cpu", ""),
        ({}, DELEGATED, "v2", ""),
        ({}, TAKEN, "", "this process is in it"),
        ({}, NONE, "", "/proc/self/cgroup: no cgroup v2 hierarchy"),
    ],
)
def test_where_cgroups_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, v1: dict[str, str], v2: str, told: str, problem: str
) -> None:
    """Where the v2 of a hybrid host takes none, the v1 does; only where neither does it is said why."""
    (tmp_path / "v2").mkdir()
    if v2 == TAKEN:
        (tmp_path / "v2" / "cgroup.type").touch()
    directory = str(tmp_path / "v2") if v2 else ""
    asked = []

    def read(pid: int) -> Cgroups:
        asked.append(pid)
        return Cgroups({name: f"{tmp_path}{path}" for name, path in v1.items()}, directory, directory)

    for path in v1.values():
        Path(f"{tmp_path}{path}").mkdir(parents=True)
    monkeypatch.setattr(facts, "read_cgroups", read)
    found = find_facts(str(tmp_path))
    assert found.cgroup == (directory if told == "v2" else told and f"{tmp_path}{told}")
    assert problem in found.cgroup_problem
    assert bool(problem) is bool(found.cgroup_problem)
    assert asked == [0]  # this process, where there is no keeper
    assert found.abilities == {**asdict(find_abilities()), "user_groups": may_set_groups()}


def test_no_cgroup_is_told_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user, and root of a user namespace, may make none in most: it is told why."""
    monkeypatch.setattr(facts, "read_cgroups", lambda _: Cgroups({"cpu": "/v1/cpu", "pids": "/v1/pids"}, "/v2", "/v2"))
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path == "/v1/pids")
    assert find_facts(str(tmp_path)).cgroup == "/v1/pids"
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    found = find_facts(str(tmp_path))
    assert (found.cgroup, found.cgroup_problem) == ("", "/v2: this user may make no cgroup in it")


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(("options", "told"), [("-Ur", False), ("-Urm", True)])
def test_mounts_reach_nobody_from_a_user_namespace_below(options: str, told: bool) -> None:
    """Root of one whose mounts are another's can mount nothing that is seen there, also where they are shared."""
    script = (
        "from limpet.engine.starters.process.unapplied import find_abilities; print(find_abilities().shared_mounts)"
    )
    command = ["unshare", options, sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(told)


def test_cgroups_are_made_beside_the_keeper(engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks may be in other cgroups than the keeper, beside which the containers' are made."""

    gone = []

    def read(pid: int) -> Cgroups:
        if pid in gone:
            raise FileNotFoundError(2, "No such file or directory", f"/proc/{pid}/cgroup")
        return Cgroups({"pids": f"/v1/{pid}"}, "", "")

    container = make(engine, "one", "sleep", "1000")
    container.start()
    monkeypatch.setattr(facts, "read_cgroups", read)
    monkeypatch.setattr(os, "access", lambda *_, **__: True)
    found = find_facts(state_dir)
    assert found.keeper_pid
    assert found.cgroup == f"/v1/{found.keeper_pid}"
    gone.append(found.keeper_pid)  # just now
    assert (find_facts(state_dir).cgroup, find_facts(state_dir).cgroup_problem) == ("/v1/0", "")
    monkeypatch.undo()
    container.stop(0)
