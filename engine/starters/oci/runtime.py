"""The OCI runtime of a starter: which program it is, how it is called, and what is whose in its state directory."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from hashlib import sha256

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.oci import calls
from limpet.engine.starters.oci.command import Outcome, is_any_left, run
from limpet.engine.starters.oci.family import have_go_on
from limpet.engine.starters.oci.root import RuntimeRoot, to_oci_id
from limpet.engine.starters.oci.run_directory import Processes
from limpet.engine.starters.oci.tools import Tools, command_of
from limpet.engine.state.names import CONTAINERS, OCI
from limpet.schema.file_name import file_name


class Runtime:
    """A runtime and its conmon, programs by name or path, and the directory that the runtime keeps its state in.

    `name` is the starter's. Each step of the runtime may take `timeout` seconds. Thread-safe.
    """

    def __init__(self, program: str, conmon: str, name: str, timeout: float) -> None:
        self.program = program
        self.name = name
        self.timeout = timeout
        self.containers_dir = ""
        self.root = RuntimeRoot("")
        self._conmon = conmon
        self._tools = Tools()

    def open(self, state_dir: str) -> None:
        """Begin to serve this state directory."""
        self.containers_dir = os.path.join(state_dir, CONTAINERS)
        self.root = RuntimeRoot(os.path.join(state_dir, OCI, self.name))

    @property
    def kind(self) -> str:
        """Which runtime it is: "runc" or "crun". Raises UnsupportedError if it is not installed."""
        return self._tools.find(self.program).kind

    @property
    def conmon(self) -> str:
        """The path of conmon. Raises UnsupportedError if it is not installed."""
        return self._tools.find(self._conmon).path

    def require_conmon(self) -> None:
        """Raise UnsupportedError if conmon is not installed."""
        self._tools.find(self._conmon)

    def command(self) -> Sequence[str]:
        """Return what executes the runtime. Raises UnsupportedError if it is not installed."""
        return command_of(self._tools.find(self.program))

    def command_with_root(self) -> Sequence[str]:
        """Return the same with the directory that it is to keep its state in, which is made. Raises OSError, too."""
        return [*self.command(), "--root", self.root.make()]

    def call(
        self,
        *arguments: str,
        timeout: float = 0,
        most_bytes: int = 64 << 10,
        directory: str = "",
        pass_fds: Sequence[int] = (),
        begun_by: Sequence[str] = (),
        see_to: Callable[[int], None] = have_go_on,
    ) -> Outcome:
        """Run the runtime, which `begun_by` becomes.

        Raises UnsupportedError if it is not installed, OSError if it cannot be executed.

        What neither works in a `directory` nor inherits anything is ended by the next engine if this one is killed.
        """
        command = [*begun_by, *self.command_with_root(), *arguments]
        with ExitStack() as stack:
            if not directory and not pass_fds:
                directory = self.root.make()
                pass_fds = (stack.enter_context(calls.held(directory)),)
            outcome = run(
                command,
                timeout=timeout or self.timeout,
                most_bytes=most_bytes,
                directory=directory or "/",
                pass_fds=pass_fds,
                see_to=see_to,
                begins_users=arguments[0] == "exec",
            )
            for each in () if is_any_left() else pass_fds:
                calls.release(each)
            return outcome

    def bundle(self, container_id: str) -> str:
        """Return the path of a container's bundle."""
        return os.path.join(self.containers_dir, file_name(container_id))

    def cgroup_name(self, oci_id: str) -> str:
        """Return the name of a new container's cgroup, which no other state directory's has, a copy of it included."""
        return f"{sha256(os.path.basename(self.root.make()).encode()).hexdigest()[:12]}-{oci_id}"

    def cgroup_of(self, processes: Processes) -> str:
        """Return the name of a container's cgroup; one that is nobody's if it was made for another state directory."""
        name = os.path.basename(processes.cgroup) if self.is_ours(processes) else ""
        return name or self.cgroup_name(processes.oci_id)

    def is_ours(self, processes: Processes) -> bool:
        """Return whether a container was made for this state directory, not for one of which this is a copy."""
        return os.path.dirname(processes.entry) == self.root.find()

    def cgroup_path(self, launch: Launch) -> str:
        """Return the path of a new container's cgroup, below its sandbox's cgroup_parent."""
        linux = launch.sandbox.config.linux if launch.sandbox else None
        parent = linux.cgroup_parent if linux and linux.cgroup_parent else "/limpet"
        return os.path.normpath(f"/{parent}/{self.cgroup_name(to_oci_id(launch.id))}")
