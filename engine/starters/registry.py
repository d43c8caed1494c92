"""Which starters there are, by name. Each is loaded when it is needed."""

import os
from collections.abc import Iterable
from importlib import import_module

from limpet.engine.starters.contract import Starter
from limpet.recovery.evidence import Observation
from limpet.recovery.probe import HostProbe, Probe, Subject

PROCESS = "process"
"""The built-in starter, and the one that an engine has unless it is given another."""
_HOMES = {PROCESS: "limpet.engine.starters.process"}
"""The package of each starter, which has a function `make_starter`."""


def make_default_starter(inherit_env: Iterable[str] = ()) -> Starter:
    """Return the starter of an engine that is given none. Raises InvalidInputError for a name that is none."""
    starter: Starter = import_module(_HOMES[PROCESS]).make_starter(inherit_env)
    return starter


def make_probe(starter: Starter, containers_dir: str) -> Probe:
    """Return what looks at the containers of an engine with this starter.

    A container of another starter is looked at as a process of this host: it is said to run, or to have ended, only if
    its process's identity shows that.
    """
    own = starter.probe(containers_dir)
    return own if starter.name == PROCESS else _ProbeByStarter(starter.name, own, make_host_probe(containers_dir))


def make_host_probe(containers_dir: str) -> HostProbe:
    """Return what looks at processes of this host, and at bundles if there are any."""
    return HostProbe(containers_dir if os.path.isdir(containers_dir) else "")


class _ProbeByStarter:
    """Looks at the containers of one starter with its own probe, and at all others with that of the host."""

    def __init__(self, name: str, own: Probe, other: Probe) -> None:
        self._name = name
        self._own = own
        self._other = other

    def observe(self, container: Subject) -> Observation:
        """Return what the probe of the container's starter sees."""
        probe = self._own if container.metadata.starter == self._name else self._other
        return probe.observe(container)
