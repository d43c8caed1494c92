"""What some starters can do beside starting and stopping: each a small protocol, and `lacks` says who lacks one."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from limpet.engine.starters.contract import Exit, Starter
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import UnsupportedError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import SandboxMetadata
from limpet.schema.status import Resources

_T = TypeVar("_T")


class Executed(NamedTuple):
    """How a command ended that was run in a container."""

    code: int
    """Its exit code, 128 + signal if one ended it."""
    output: bytes
    error: bytes
    is_cut: bool
    """True if it wrote more than is kept."""


class Stats(NamedTuple):
    """What a container uses; None for what this host does not tell."""

    at: int
    """Nanoseconds since the epoch."""
    cpu_ns: int | None
    """Processor time since its start, in nanoseconds."""
    memory_bytes: int | None
    working_set_bytes: int | None
    """Of that, what cannot be given up when memory is short."""
    processes: int | None


class Holdings(NamedTuple):
    """What a starter has made for a sandbox, and holds until the sandbox is vacated."""

    namespaces: Mapping[str, str]
    """The path of each namespace, by type as in the OCI runtime spec."""
    addresses: tuple[str, ...] = ()
    """Its IP addresses, the primary one first."""


@runtime_checkable
class Furnisher(Protocol):
    """Makes what a sandbox holds, and what its containers share. A starter whose sandboxes hold nothing has it not."""

    def furnish(self, sandbox: SandboxMetadata, given: Mapping[str, str]) -> Holdings:
        """Make what it is to hold beside the namespaces given; what is left of an earlier try goes first.

        Where all that it is to hold is given, as by its own record, none of it is touched: its files alone are made.

        Return all namespaces, also those given. Raises InvalidInputError, UnsupportedError, ResourcesError: then it
        holds nothing.
        """

    def is_furnished(self, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> bool:
        """Say whether a sandbox whose record names these has all that `furnish` makes."""

    def holds(self, sandbox_id: str, namespaces: Mapping[str, str]) -> bool:
        """Say whether it still holds those of these namespaces that were made for it."""

    def vacate(self, sandbox_id: str) -> None:
        """Free what it holds. May be repeated. Raises ResourcesError if that is to be tried again."""

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> None:
        """Free what is held by sandboxes that have neither record nor directory. The ids of records are asked last."""


@runtime_checkable
class Executor(Protocol):
    """Runs a command in a container."""

    def execute(self, container_id: str, identity: ProcessIdentity, args: Sequence[str], *, timeout: float) -> Executed:
        """Run it to its end, without input. Raises WaitTimeoutError if it was killed after `timeout` seconds.

        Raises StartError if it cannot be executed.
        """


class Chunk(NamedTuple):
    """Some of what is written in a container, as it comes."""

    stream: str
    """stdout or stderr; a terminal has stdout alone."""
    data: bytes


class Session(Protocol):
    """A connection to a program in a container: its input and output, and its terminal if it has one.

    One thread may read while another writes. Close it in the end.
    """

    @property
    def has_terminal(self) -> bool:
        """Whether the program has a terminal."""

    def read(self, timeout: float | None = None) -> Chunk | None:
        """Return what it has written next; None once nothing more comes.

        Raises WaitTimeoutError if nothing has come after `timeout` seconds, EngineGoneError if who hands it on is gone,
        InvalidStateError once the session is closed.
        """

    def write(self, data: bytes) -> None:
        """Write to its input; what nobody reads any more is dropped."""

    def end_input(self) -> None:
        """Tell it that nothing more comes. A terminal has no end: it gets Ctrl-D."""

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal a size. Without one, nothing is done."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code of a command, 128 + signal if one ended it, once it has ended; None when attached.

        Raises WaitTimeoutError, StartError if it could not be executed.
        """

    def hang_up(self) -> None:
        """Have the command killed, or leave the container: whoever reads then comes to the end. By any thread."""

    def close(self) -> None:
        """Hang up and free all, once nobody reads or writes any more. May be repeated."""


@runtime_checkable
class Conversant(Protocol):
    """Connects to programs in its containers."""

    def open_command(
        self,
        container_id: str,
        identity: ProcessIdentity,
        args: Sequence[str],
        *,
        terminal: bool,
        size: tuple[int, int],
    ) -> Session:
        """Run a command in the container, with its user and environment; `size` is the terminal's rows and columns.

        Raises InvalidStateError, StartError.
        """

    def attach(self, container_id: str, identity: ProcessIdentity, *, terminal: bool, has_input: bool) -> Session:
        """Connect to the container's own input and output; it says which it has.

        Raises InvalidStateError if nobody is left who does it.
        """


@runtime_checkable
class Freezer(Protocol):
    """What a starter has beside, if it can pause its containers. One without it says so by not having it."""

    def freeze(self, container_id: str, identity: ProcessIdentity) -> None:
        """Freeze all processes of the container, and wait until they are; one that is frozen stays so.

        Raises UnsupportedError with the reason if that cannot be done, InvalidStateError if it has ended: then nothing
        of it is frozen.
        """

    def thaw(self, container_id: str, identity: ProcessIdentity) -> None:
        """Let all processes of the container go on. May be repeated. Raises UnsupportedError with the reason."""

    def is_frozen(self, container_id: str, identity: ProcessIdentity) -> bool:
        """Say whether the container is frozen, or is being frozen."""


@runtime_checkable
class Meter(Protocol):
    """Tells what a container uses."""

    def measure(self, container_id: str, identity: ProcessIdentity) -> Stats:
        """Return what it uses now."""


@runtime_checkable
class Limiter(Protocol):
    """Changes the limits of a container that runs."""

    def change_limits(self, container_id: str, identity: ProcessIdentity, limits: LinuxContainerResources) -> Resources:
        """Put these limits into force in place of all before.

        Raises InvalidInputError for what the host refuses, InvalidStateError if it has ended.
        """


@runtime_checkable
class Plural(Starter, Protocol):
    """Does for many containers at once what a starter does for one.

    What it leaves out of its answer is to be asked for one by one, which tells what is in the way.
    """

    def signal_many(self, identities: Mapping[str, ProcessIdentity], number: int) -> Mapping[str, int]:
        """Send a signal to all processes of these containers, 0 to none; return how many each has."""

    def read_exits(self, ended: Mapping[str, tuple[ProcessIdentity, int]]) -> Mapping[str, Exit | None]:
        """Return how processes ended that have ended, each with its pidfd: see `Starter.read_exit`."""

    def release_many(self, container_ids: Sequence[str]) -> Collection[str]:
        """End what is left of these containers, and free what is kept for them; return those for which that is done."""


def by_starter(ones: Iterable[tuple[Starter, _T]]) -> list[tuple[Starter, list[_T]]]:
    """Return what belongs to each starter; they are told apart by identity, for they need not be hashable."""
    found: dict[int, tuple[Starter, list[_T]]] = {}
    for starter, one in ones:
        found.setdefault(id(starter), (starter, []))[1].append(one)
    return list(found.values())


@runtime_checkable
class Monitored(Protocol):
    """Has a monitor for each container, who sees how it ends, and may end before it."""

    def open_monitor(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the container's monitor, -1 if it has ended. Raises ResourcesError."""


@runtime_checkable
class LogCopier(Protocol):
    """Has the output of its containers copied to their logs, a moment after it was written."""

    def is_copying(self, container_id: str) -> bool:
        """Say whether output of one that has ended is on its way to its log, and nothing is left that writes more."""


@runtime_checkable
class LogReopener(Protocol):
    """Goes on in a new log once the old one was renamed."""

    def reopen_log(self, container_id: str, identity: ProcessIdentity, log_path: str) -> None:
        """Return once the new log is there. Raises InvalidStateError if nobody is left who writes it."""


def lacks(starter: Starter, what: str) -> UnsupportedError:
    """Return the error that says that a starter cannot do something."""
    return UnsupportedError(f"the starter {starter.name!r} cannot {what}; an OCI runtime can")
