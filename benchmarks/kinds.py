"""The kinds of containers that live in the experiment `life`: processes of the host, or containers of runc or crun.

What an OCI container runs is the host's own program all the same: its image is all but empty, and the host's
directories are mounted in it, as for the runtimes that it is compared with.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from limpet import OciStarter
from limpet.benchmarks.runtimes import HOST_DIRECTORIES, find_program, leave_out_unified
from limpet.engine import Engine
from limpet.engine.drill.small_image import IMAGE, make_archive
from limpet.engine.lifecycle.container import Container

_SANDBOX = "bench"


class Kind(NamedTuple):
    """One kind of containers; each engine of a cell is opened with it."""

    runtime: str = ""
    """An OCI runtime, or "" for processes of the host."""

    def require(self) -> None:
        """Make this process fit to run them. Raises UnavailableError."""
        for program in ("conmon", self.runtime) if self.runtime else ():
            find_program(program)
        if self.runtime == "crun":
            leave_out_unified()

    def open(self, state_dir: str) -> Engine:
        """Open an engine that can run them."""
        return Engine.open(state_dir, runtimes={self.runtime: OciStarter(self.runtime)} if self.runtime else {})

    def make_sandbox(self, engine: Engine) -> None:
        """Make, in a new state directory, what all of them need."""
        if self.runtime:
            archive = os.path.join(os.path.dirname(engine.store.directory.path), "image.tar")
            with open(archive, "wb") as file:
                file.write(make_archive())
            engine.images.load(archive)
        engine.create_sandbox({"metadata": {"name": _SANDBOX}}, id=_SANDBOX, runtime_handler=self.runtime)

    def create(self, engine: Engine, *command: str) -> Container:
        """Create one that is to run a command."""
        key = f"bench-{os.urandom(8).hex()}"
        config: dict[str, Any] = {"metadata": {"name": key}, "image": {"image": "host"}, "command": command}
        if self.runtime:
            mounts = [{"container_path": path, "host_path": path, "readonly": True} for path in HOST_DIRECTORIES]
            config |= {"image": {"image": IMAGE}, "mounts": mounts}
        return engine.create_container(config, _SANDBOX, id=key)

    def clear(self, engine: Engine) -> None:
        """Remove what `make_sandbox` made, and stop and remove the containers in it."""
        for sandbox in engine.list_sandboxes():
            # The first process of a pid namespace, which has no handler for it, is sent no SIGTERM.
            sandbox.remove(force=True, timeout=0 if self.runtime else 10)


KINDS: Mapping[str, Kind] = {"limpet": Kind(), "limpet-runc": Kind("runc"), "limpet-crun": Kind("crun")}
"""By contender."""
