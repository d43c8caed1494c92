"""What people who look can know of the process starter's, without an engine: nothing is begun or changed."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import NamedTuple

from limpet.engine.starters.process.cgroups.hierarchies import read_cgroups
from limpet.engine.starters.process.client import KeeperClient, is_about, is_copying, is_vouched_for
from limpet.engine.starters.process.keeper.listener import SOCKET
from limpet.engine.starters.process.keeper.messages import read_peer
from limpet.engine.starters.process.unapplied import find_abilities
from limpet.engine.starters.users import may_set_groups
from limpet.engine.state.names import KEEPER
from limpet.schema.errors import KeeperError
from limpet.schema.identity import ProcessIdentity


class StarterFacts(NamedTuple):
    """What this machine and this user give the containers."""

    keeper_pid: int
    """The process that is the parent of the containers, 0 if there is none."""
    cgroup: str
    """One below which the containers' cgroups are made, empty if none can be."""
    cgroup_problem: str
    abilities: Mapping[str, bool]
    """What the containers can have, by name."""


def find_facts(state_dir: str) -> StarterFacts:
    """Return the facts for the containers of a state directory, which may be missing."""
    keeper_pid = _find_keeper(os.path.join(state_dir, KEEPER))
    cgroup = problem = ""
    try:
        cgroup = _find_cgroup(keeper_pid)
    except OSError as error:
        problem = f"{error.filename or 'cgroups'}: {error.strerror}"
    return StarterFacts(
        keeper_pid=keeper_pid,
        cgroup=cgroup,
        cgroup_problem=problem,
        abilities={**asdict(find_abilities()), "user_groups": may_set_groups()},  # of a program's user
    )


@contextmanager
def output_seen(state_dir: str, container_id: str) -> Iterator[Callable[[], bool]]:
    """Yield what says whether output of one that has ended is on its way to its log, as far as its keeper knows."""
    keeper = KeeperClient(os.path.join(state_dir, KEEPER))
    try:
        yield lambda: is_copying(keeper, container_id)
    finally:
        keeper.close()


def is_known_to_run(state_dir: str, container_id: str, identity: ProcessIdentity) -> bool:
    """Return whether a keeper lives that is the parent of this very process, and has seen it execute its program."""
    keeper = KeeperClient(os.path.join(state_dir, KEEPER))
    try:
        answer = keeper.ask({"op": "end", "id": container_id})
    except KeeperError:
        return False
    finally:
        keeper.close()
    if answer is None or not is_about(answer, identity) or not is_vouched_for(answer):
        return False
    return bool(answer.get("running") and answer.get("executed"))


def _find_cgroup(keeper_pid: int) -> str:
    """Return a cgroup below which those of containers are made: beside their keeper, while it lives.

    Raises OSError where there is none, or none that this user may make others in.
    """
    try:
        cgroups = read_cgroups(keeper_pid)
    except OSError:
        cgroups = read_cgroups(0)
    places = sorted(cgroups.v1.values())
    try:
        places.insert(0, cgroups.find_v2_parent())
    except OSError:
        if not places:
            raise
    for place in places:
        if os.access(place, os.W_OK, effective_ids=True):
            return place
    raise OSError(errno.EACCES, "this user may make no cgroup in it", places[0])


def _find_keeper(directory_path: str) -> int:
    """Return the pid of the keeper that lives, 0 if none is to be seen. It is not spoken to."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as link:
        directory = os.open(directory_path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            link.settimeout(1.0)
            link.connect(f"/proc/self/fd/{directory}/{SOCKET}")
        finally:
            os.close(directory)
        return read_peer(link)[0]
    return 0
