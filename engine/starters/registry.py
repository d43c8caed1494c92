"""Which starters there are, by name, and which of them an engine has. Each is loaded when it is needed."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import import_module

from limpet.engine.starters.abilities import Furnisher
from limpet.engine.starters.contract import Starter
from limpet.engine.state.names import OCI
from limpet.engine.state.presence import is_directory
from limpet.recovery.evidence import Observation, Process
from limpet.recovery.host import has_pidfs
from limpet.recovery.probe import HostProbe, Probe, Subject, Witness, Witnessed
from limpet.schema.errors import InvalidInputError, InvalidStateError, LimpetError, StoreDamagedError, quote
from limpet.schema.file_name import file_name
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata
from limpet.schema.telling import get_log

_log = get_log("limpet.starter")
PROCESS = "process"
"""The built-in starter, and the one that an engine has unless it is given another."""
_PROCESS_HOME = "limpet.engine.starters.process"
_OCI_PROBE = "limpet.engine.starters.oci.probe"
_PROCESS_FACTS = "limpet.engine.starters.process.facts"


class Starters:
    """The starters of one engine: one for each runtime handler, and `default` for sandboxes that name none.

    A container's metadata has the name of its starter, a sandbox's that of its handler: several handlers may share one
    starter. Without a default one there is the built-in one, which hands on the variables named in `inherit_env`.

    Raises InvalidInputError if two starters have the same name, for then a name would not say which it is, for what is
    no starter, and for a variable's name that is none.
    """

    default: Starter

    def __init__(
        self,
        default: Starter | None = None,
        handlers: Mapping[str, Starter] | None = None,
        inherit_env: Iterable[str] = (),
    ) -> None:
        self.default = default or import_module(_PROCESS_HOME).make_starter(inherit_env)
        if not isinstance(handlers, Mapping | None):
            raise InvalidInputError(f"runtimes {quote(handlers)}: give a mapping from runtime handlers to starters")
        self._handlers = {"": self.default, **(handlers or {})}
        self._by_name: dict[str, Starter] = {}
        for handler, starter in self._handlers.items():
            if not isinstance(getattr(starter, "name", None), str):
                what = f"runtimes {quote(handler)}" if handler else "starter"
                raise InvalidInputError(f"{what}: {quote(starter)} is no starter, which has a name")
            if self._by_name.setdefault(starter.name, starter) is not starter:
                raise InvalidInputError(
                    f"runtimes {quote(handler)}: another starter has the name {starter.name!r}; give each its own"
                )

    def __iter__(self) -> Iterator[Starter]:
        return iter(self._by_name.values())

    def choose(self, handler: object) -> Starter:
        """Return the starter for a sandbox's runtime handler. Raises InvalidInputError if there is none."""
        if not isinstance(handler, str) or handler not in self._handlers:
            known = ", ".join(map(repr, filter(None, self._handlers))) or "none"
            raise InvalidInputError(
                f"runtime_handler {quote(handler)}: this engine has {known}; give it to Engine.open in `runtimes`"
            )
        return self._handlers[handler]

    def of(self, metadata: Metadata) -> Starter:
        """Return the starter that a container was made for. Raises InvalidStateError if it is not here.

        A container whose runtime had processes of its own names none: it is looked after by the default one.
        """
        if not metadata.starter:
            return self.default
        if metadata.starter not in self._by_name:
            known = ", ".join(map(repr, self._by_name))
            raise InvalidStateError(
                f"container {metadata.id}: it was made for the starter {metadata.starter!r}, this engine has {known};"
                " open one with that"
            )
        return self._by_name[metadata.starter]

    def find_keeper(self, container_id: str) -> Starter:
        """Return the starter that says it keeps something of a container; the default one if none does."""
        keepers = (one for one in self if one is not self.default and one.keeps(container_id))
        return next(keepers, self.default)

    def open(self, state_dir: str) -> None:
        """Open all."""
        for starter in self:
            starter.open(state_dir)

    def close(self) -> None:
        """Close all. May be repeated."""
        for starter in self:
            starter.close()

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """Let each end what is left of its containers; one that cannot keeps no other from it."""
        for starter in self:
            try:
                starter.end_leftovers(has_ended)
            except LimpetError as error:
                _log.warning("starter %s: leftovers stay: %s", starter.name, error)

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> None:
        """Let each free what is held by sandboxes that are not, or no more, in the store: those are asked for last."""
        for starter in self:
            if isinstance(starter, Furnisher):
                try:
                    starter.vacate_others(find_ids)
                except LimpetError as error:
                    _log.warning("starter %s: what sandboxes held stays: %s", starter.name, error)


def make_probe(starters: Starters, containers_dir: str) -> Probe:
    """Return what looks at the containers of an engine with these starters, each with the probe of its own.

    A container of another starter is looked at as a process of this host: it is said to run, or to have ended, only if
    its process's identity shows that.
    """
    own = {starter.name: starter.probe(containers_dir) for starter in starters}
    if set(own) == {PROCESS} and not is_directory(os.path.join(os.path.dirname(containers_dir), OCI)):
        return own[PROCESS]  # nobody's metadata has to be read
    other = make_host_probe(containers_dir)
    return _ProbeByStarter(own, lambda container_id: own[starters.find_keeper(container_id).name], other)


def make_host_probe(containers_dir: str) -> HostProbe:
    """Return what looks at processes of this host, and at bundles if there are any, with what OCI containers left.

    Before Linux 6.9 a container's keeper is asked which process is which.
    """
    if not os.path.isdir(containers_dir):
        return HostProbe()

    def ask(container_id: str, identity: ProcessIdentity | None) -> Witnessed | None:
        if not is_directory(os.path.join(containers_dir, file_name(container_id), OCI)):
            return _ask_keeper(os.path.dirname(containers_dir), container_id, identity)
        witness: Witness = import_module(_OCI_PROBE).BundleWitness(containers_dir)
        return witness(container_id, identity)

    return HostProbe(containers_dir, witness=ask)


def _ask_keeper(state_dir: str, container_id: str, identity: ProcessIdentity | None) -> Witnessed | None:
    """Say that a process is the container's, if its keeper vouches for it where the kernel does not."""
    if identity is None or has_pidfs():
        return None
    vouches = import_module(_PROCESS_FACTS).is_known_to_run(state_dir, container_id, identity)
    return Witnessed(Process.ALIVE) if vouches else None


class _ProbeByStarter:
    """Looks at the containers of each starter with its own probe, and at all others with that of the host."""

    def __init__(self, own: Mapping[str, Probe], find: Callable[[str], Probe], other: Probe) -> None:
        self._own = own
        self._find = find
        self._other = other

    def observe(self, container: Subject) -> Observation:
        """Return what the probe of the container's starter sees."""
        try:
            probe = self._own.get(container.metadata.starter, self._other)
        except StoreDamagedError:
            probe = self._find(container.id)
        return probe.observe(container)
