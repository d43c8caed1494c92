"""The life of sandboxes and their containers, for kill points and power cuts: made, updated, stopped, removed.

Processes are only recorded, as of another boot, so that a power cut can have ended them; what stops them is not tried
here but in tests/engine/test_sandboxes.py. Each acknowledgement is how many steps are done.
"""

import os
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from limpet.engine import Engine
from limpet.engine.drill.engine_life import date_before_boot
from limpet.engine.drill.records import IDENTITY
from limpet.engine.lifecycle import sandbox
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.state.names import CONTAINERS, QUARANTINE, SANDBOXES
from limpet.schema.errors import InvalidStateError
from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus
from limpet.schema.status import ContainerState, Status
from limpet.testing import Violation

_NAMESPACES = {"network": "/run/netns/one"}
_STEPS = ("open", "create", "fill", "update", "stop", "remove", "create other", "fill other", "remove other", "close")


def _config(name: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["true"]}


def _end(old: Status) -> Status:
    started = replace(old, started_at=old.created_at + 1, identity=IDENTITY)
    return replace(started, finished_at=old.created_at + 2, exit_code=3, reason="Error")


class SandboxLife:
    """One sandbox is made, filled, updated, stopped and removed; another is removed while it is READY."""

    replaced: Sequence[tuple[object, str, object]] = ()

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        for owner, name, value in self.replaced:
            setattr(owner, name, value)
        with Engine.open(f"{directory}/state") as engine:
            for done, step in enumerate(_STEPS[:-1], 1):
                _perform(engine, step)
                acknowledge(b"%d" % done)
        acknowledge(b"%d" % len(_STEPS))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        done = int(acknowledged[-1]) if acknowledged else 0
        state_dir = f"{directory}/state"
        date_before_boot(state_dir)
        for _ in range(2):  # what a recovery says, the next one says again
            with Engine.open(state_dir) as engine:
                _require("one", _find(engine, "one"), engine, done - 1)
                _require("other", _find(engine, "other"), engine, done - 6)
                _require_owners(engine, state_dir)
        if done < 1 and not os.path.exists(state_dir):
            return
        with Engine.open(state_dir) as engine:
            for one in engine.list_sandboxes():
                one.remove(force=True)
            left = [name for folder in (CONTAINERS, SANDBOXES) for name in os.listdir(f"{state_dir}/{folder}")]
            if left or len(engine.store) or engine.list_sandboxes():
                raise Violation("other", f"after step {done}: left after removing everything: {left}")


def _perform(engine: Engine, step: str) -> None:
    verb, _, which = step.partition(" ")
    key = which or "one"
    match verb:
        case "create":
            engine.create_sandbox(
                {"metadata": {"name": key}}, id=key, namespaces=_NAMESPACES, addresses=["10.0.0.7"], extra={"n": 1}
            )
        case "fill":
            for name in ("made", "ended"):
                engine.create_container(_config(name), key, id=f"{key}-{name}")
            engine.store.update(f"{key}-ended", _end)
        case "update":
            engine.get_sandbox(key).update(lambda old: replace(old, extra={"n": 2}))
        case "stop":
            engine.get_sandbox(key).stop()
        case "remove":
            engine.get_sandbox(key).remove(force=bool(which))


def _find(engine: Engine, key: str) -> Sandbox | None:
    return next((one for one in engine.list_sandboxes() if one.id == key), None)


def _require(key: str, found: Sandbox | None, engine: Engine, done: int) -> None:
    """Raise Violation unless the sandbox is as it was told after so many steps of its own, or one further.

    The steps are create, fill, update, stop, remove; "other" has no update and no stop.
    """
    stages = ["create", "fill", "update", "stop", "remove"] if key == "one" else ["create", "fill", "remove"]
    told, next_one = stages[: max(done, 0)], stages[done] if 0 <= done < len(stages) else ""
    where = f"{key} after {told}, during {next_one!r}"
    if found is None:
        if told and "remove" not in told and next_one != "remove":
            raise Violation("lost", f"{where}: it is gone")
        return
    if "remove" in told or done < 0:
        raise Violation("other", f"{where}: it is there")
    _require_status(where, found.status, told, next_one)
    ids = {container.id for container in found.containers()}
    if "fill" in told and next_one != "remove" and ids != {f"{key}-made", f"{key}-ended"}:
        raise Violation("lost", f"{where}: its containers are {ids}")
    if found.state is SandboxState.NOTREADY:
        try:
            engine.add_container(_config("late"), key, id="late")
        except InvalidStateError:
            return
        raise Violation("other", f"{where}: it is NOTREADY, and takes a container")


def _require_status(where: str, status: SandboxStatus, told: Sequence[str], next_one: str) -> None:
    if (status.namespaces, status.addresses) != (_NAMESPACES, ("10.0.0.7",)):
        raise Violation("torn", f"{where}: {status}")
    wanted = {2} if "update" in told else {1, 2} if next_one == "update" else {1}
    if status.extra.get("n") not in wanted:
        raise Violation("lost", f"{where}: {status.extra}")
    is_stopped = status.state is SandboxState.NOTREADY and status.reason != SandboxReason.COPIED  # as a check may be
    if "stop" in told and not is_stopped:
        raise Violation("lost", f"{where}: it is not stopped: {status}")
    if is_stopped and "stop" not in told and next_one not in {"stop", "remove"}:
        raise Violation("false_verdict", f"{where}: it is NOTREADY: {status}")


def _require_owners(engine: Engine, state_dir: str) -> None:
    kept = {one.id for one in engine.list() if not one.status.released}
    for folder, owners in ((CONTAINERS, kept), (SANDBOXES, set(engine.store.sandbox_ids))):
        found = set(os.listdir(f"{state_dir}/{folder}"))
        created = {key for key in owners if folder == SANDBOXES or engine.get(key).state is not ContainerState.UNKNOWN}
        if found - owners or created - found:
            raise Violation("other", f"{folder} holds {sorted(found)}, and {sorted(owners)} own what is in it")
    if os.path.exists(f"{state_dir}/{QUARANTINE}"):
        raise Violation("other", f"in quarantine: {os.listdir(f'{state_dir}/{QUARANTINE}')}")


class Forgetful(SandboxLife):
    """Its stop writes nothing of the sandbox."""

    replaced = ((sandbox, "_make_not_ready", lambda *_: None), (sandbox, "_is_wanted", lambda *_, **__: False))
