"""The pid namespace of another container of the sandbox, which a container asks to see (the CRI's TARGET)."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.oci.exits import is_process
from limpet.engine.starters.oci.namespaces import options_of
from limpet.engine.starters.oci.run_directory import Processes
from limpet.recovery.host import has_ended, open_pidfd
from limpet.schema.cri import NamespaceMode
from limpet.schema.errors import StartError, quote
from limpet.schema.identity import ProcessIdentity


@contextmanager
def open_target(launch: Launch, find: Callable[[str, ProcessIdentity], Processes | None]) -> Iterator[str]:
    """Hold the target's pid namespace open, and yield a path of it; "" if none is asked for. Raises StartError.

    `find` returns what the start of the container with this id has written down.
    """
    options = options_of(launch.metadata.config)
    if options.pid is not NamespaceMode.TARGET:
        yield ""
        return
    why = f"namespace_options.target_id {quote(options.target_id)}: "
    if launch.target is None:
        raise StartError(f"{why}no container with this id runs in its sandbox")
    with ExitStack() as stack:
        try:
            pidfd = stack.enter_context(open_pidfd(launch.target.pid))
            namespace = stack.enter_context(open(f"/proc/{launch.target.pid}/ns/pid", "rb"))
            found = find(options.target_id, launch.target)
            is_it = is_process(launch.target, pidfd, found.cgroups if found else ()) and not has_ended(pidfd)
        except (ProcessLookupError, FileNotFoundError):
            is_it = False
        if not is_it:
            raise StartError(f"{why}that container has ended")
        yield f"/proc/{os.getpid()}/fd/{namespace.fileno()}"
