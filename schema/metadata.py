"""The immutable part of containers and sandboxes: their Metadata, and which ids and names are valid."""

import os

import msgspec

from limpet.schema.any_text import plain
from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.image import ImageManifest

MAX_ID_LENGTH = 256
MAX_NAME_LENGTH = 253
"""The limit for a Kubernetes object name (RFC 1123 subdomain)."""

DEFAULT_NODE = "local"
"""The node's name where a runtime gives none. Every row and every marker bears its node's name."""


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """The immutable part of a container, written once, with its row."""

    id: str
    name: str
    sandbox_id: str
    config: ContainerConfig
    image_manifest: ImageManifest
    log_path: str = ""
    """Absolute path of the log file when this was written; empty if the output is discarded."""
    stop_signal: str = "SIGTERM"
    root_dir: str = ""
    """Absolute path of the bundle when this was written; empty if the runtime keeps the bundle elsewhere."""
    starter: str = ""
    """The name of the starter that runs it; empty for a container whose runtime has processes of its own."""
    restart_policy: str = "no"
    """When the next attempt is made of itself: see `schema.restart`."""
    restart_count: int = 0
    """How many restarts the policy has made up to this attempt."""
    restart_delay: int = 0
    """How long the start of this attempt was put off, in nanoseconds."""


class SandboxMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox: what its containers share. Immutable, written once, with its row."""

    id: str
    name: str
    config: PodSandboxConfig
    created_at: int
    """Nanoseconds since the epoch."""
    root_dir: str = ""
    """Absolute path of the sandbox's directory; empty if the runtime keeps it elsewhere."""
    runtime_handler: str = ""
    """The CRI's runtime handler: how the sandbox's containers are run; empty for the default."""


def new_id() -> str:
    """Return a new id: 64 hexadecimal digits, as CRI runtimes use."""
    return os.urandom(32).hex()


def require_id(text: str) -> str:
    """Return `text` if it is a valid id; `file_name` has the name of its directory. Raises InvalidInputError otherwise.

    Ids of other runtimes are taken as they are: `ns/pod`, `unit@x.service`, `docker://...`.
    """
    if not _is_printable(text, MAX_ID_LENGTH) or text.strip() != text:
        raise InvalidInputError(
            f"id {quote(text)}: use 1 to {MAX_ID_LENGTH} printable characters, with no space at its beginning or end"
        )
    return plain(text)


def require_node(text: str) -> str:
    """Return `text` if it is a valid node name. Raises InvalidInputError otherwise."""
    if not _is_printable(text, MAX_NAME_LENGTH):
        raise InvalidInputError(f"node {quote(text)}: use 1 to {MAX_NAME_LENGTH} printable characters")
    return plain(text)


def require_name(text: str) -> str:
    """Return `text` if it is a valid name. Raises InvalidInputError otherwise."""
    if not _is_printable(text, MAX_NAME_LENGTH) or "/" in text or text in {".", ".."}:
        raise InvalidInputError(
            f"name {quote(text)}: use 1 to {MAX_NAME_LENGTH} printable characters without '/', not '.' or '..'"
        )
    return plain(text)


def require_text(kind: str, text: object) -> str:
    """Return what is to name a container or a sandbox if it is text. Raises InvalidInputError otherwise.

    Anything else is told by its type: its repr is code of the caller's, which may ask the store, amid this question.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"{kind}: give its id as text, not {type(text).__name__}")
    return plain(text)


def _is_printable(text: object, longest: int) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= longest and text.isprintable()
