"""What verbs that change something print of it: one line for each."""

from limpet.engine.cli.output import short_id
from limpet.engine.control.requests import Done, Removal
from limpet.schema.errors import escape
from limpet.schema.status import ContainerState


def tell_done(done: Done) -> str:
    """Return the line that says what a container is now."""
    status = done.status
    words = [status.state.name if not status.unknown else "UNKNOWN"]
    if status.state is ContainerState.EXITED and not status.unknown:
        words.append(f"exit code {status.exit_code}")
    if status.reason:
        words.append(status.reason if not status.message else f"{status.reason}: {status.message}")
    return escape(f"{done.name or short_id(done.id)}: {', '.join(words)}")


def tell_removal(removal: Removal, *, would: bool = False) -> str:
    """Return the line that says what was removed, or would be."""
    verb = "would remove" if would else "removed"
    return escape(f"{verb} {removal.kind} {removal.name or short_id(removal.id)} ({short_id(removal.id)})")
