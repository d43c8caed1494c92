"""Changing a container's limits while it runs: the new ones are in its bundle until they are in force and written."""

from msgspec.structs import replace

from limpet.engine.lifecycle.life import Life
from limpet.engine.starters.abilities import Limiter, lacks
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import InvalidInputError, LimpetError, quote
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import ContainerState, Status


def change_limits(life: Life, limits: LinuxContainerResources) -> Status:
    """Put limits into force; those that are not given stay. Raises as `Container.change_limits` does."""
    with life.exclusive():
        starter = life.starter
        if not isinstance(starter, Limiter):
            raise lacks(starter, "change limits")
        identity = life.require_running("change the limits of")
        if not isinstance(limits, LinuxContainerResources):
            raise InvalidInputError(f"limits {quote(limits)}: LinuxContainerResources are needed")
        before = life.status.resources
        given = {name: getattr(limits, name) for name in limits.__struct_fields__ if getattr(limits, name)}
        wanted = replace(before.requested, **given) if before else limits
        life.bundle.note_limits(wanted)
        return _put_into_force(life, starter, identity, wanted)


def is_changing_limits(life: Life) -> bool:
    """Say whether limits are being put into force, or were when a kill came. Raises StateDirectoryError."""
    return life.bundle.read_limits() is not None


def carry_out_limits(life: Life) -> None:
    """Put the limits into force whose change a kill has cut short, and write them down. Raises what forbids it."""
    with life.exclusive():
        wanted = life.bundle.read_limits()
        status, starter = life.status, life.starter
        if wanted is None:
            return
        if status.state is ContainerState.RUNNING and status.identity and isinstance(starter, Limiter):
            _put_into_force(life, starter, status.identity, wanted)


def _put_into_force(life: Life, starter: Limiter, identity: ProcessIdentity, wanted: LinuxContainerResources) -> Status:
    try:
        changed = starter.change_limits(life.id, identity, wanted)
    except LimpetError:
        life.bundle.forget_limits()
        raise
    status = life.update(lambda old: replace(old, resources=changed))
    life.bundle.forget_limits()
    return status
