"""Where the files of a record are now: its paths say where the state directory was when it was written.

A state directory may be moved, mounted elsewhere or copied. Bundles and logs within it go along; what is elsewhere,
such as logs in another directory, stays where it is.
"""

import os

from msgspec.structs import replace

from limpet.engine.state.names import CONTAINERS, SANDBOXES
from limpet.schema.file_name import file_name
from limpet.schema.metadata import Metadata, SandboxMetadata


def bring_home(metadata: Metadata, state_dir: str) -> Metadata:
    """Return a container's metadata with the paths that it has in the state directory at `state_dir`."""
    bundle_path = os.path.join(state_dir, CONTAINERS, file_name(metadata.id))
    if metadata.root_dir in {"", bundle_path}:  # empty: a runtime's own, which keeps its bundles elsewhere
        return metadata
    log_path = _move(metadata.log_path, metadata.root_dir, state_dir)
    return replace(metadata, root_dir=bundle_path, log_path=log_path)


def bring_sandbox_home(metadata: SandboxMetadata, state_dir: str) -> SandboxMetadata:
    """Return a sandbox's metadata with the path that its directory has in the state directory at `state_dir`."""
    path = os.path.join(state_dir, SANDBOXES, file_name(metadata.id))
    return replace(metadata, root_dir=path) if metadata.root_dir not in {"", path} else metadata


def log_directory(sandbox: SandboxMetadata, state_dir: str) -> str:
    """Return where the logs of a sandbox's containers go: its config's log_directory, else one of its own."""
    home = bring_sandbox_home(sandbox, state_dir)
    if not sandbox.config.log_directory:
        return os.path.join(home.root_dir, "logs")
    if home is sandbox:
        return sandbox.config.log_directory
    return _move(sandbox.config.log_directory, sandbox.root_dir, state_dir)


def _move(path: str, root_dir: str, state_dir: str) -> str:
    """Return where `path` is now that what was at `root_dir`, the directory of a record, is below `state_dir`."""
    then = os.path.dirname(os.path.dirname(root_dir))
    return f"{state_dir}{path[len(then) :]}" if path.startswith(f"{then}/") else path
