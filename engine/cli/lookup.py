"""What a person means by a text where both containers and sandboxes may be meant."""

from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import NotFoundError, quote


def find_id(snapshot: Snapshot, text: str) -> str:
    """Return the id of what `text` means: an exact id first, then a container, then a sandbox.

    A sandbox that was made for one container has its name; the container is meant, then. Raises NotFoundError,
    AmbiguousError.
    """
    if text in snapshot.ids or text in snapshot.sandbox_ids:
        return text
    try:
        return snapshot.resolve(text)
    except NotFoundError:
        try:
            return snapshot.resolve_sandbox(text)
        except NotFoundError:
            raise NotFoundError(f"no container or sandbox has the id or the name {quote(text)}") from None
