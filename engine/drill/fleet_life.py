"""The short life of a node in a fleet, in a process of its own that is killed at will; and what it has written when."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from limpet.engine.store import Store
from limpet.recovery.host import wait_readable
from limpet.schema import Metadata, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import FleetFencedError, LimpetError
from limpet.schema.image import ImageManifest, ImageName

_WAIT_SECONDS: Final = 30.0
"""Every fault of a trial is over long before."""
_JOIN_SECONDS: Final = 0.3
_BETWEEN_SECONDS: Final = 0.004
_FIRST_PIDS: Final = {"first": 1000, "long": 1000, "next": 2000}
_FENCED: Final = "fenced"

Step = Callable[[Store, int], object]


def _status(number: int) -> Status:
    return Status(created_at=1, started_at=2, pid=number)


def _metadata(key: str) -> Metadata:
    config = parse_container_config({"metadata": {"name": key}, "image": {"image": "host"}})
    return Metadata(
        id=key, name=key, sandbox_id="s", config=config, image_manifest=ImageManifest(name=ImageName("host"))
    )


def _add_sandbox(store: Store, _: int) -> None:
    if "s" not in store.sandbox_ids:
        config = parse_pod_sandbox_config({"metadata": {"name": "s", "uid": "u", "namespace": "n"}})
        store.add_sandbox(SandboxMetadata(id="s", name="s", config=config, created_at=1))


def _add(key: str) -> Step:
    def step(store: Store, number: int) -> None:
        if key in store.ids:
            store.update(key, lambda _: _status(number))
        else:
            store.add(_metadata(key), _status(number))

    return step


def _update(*keys: str) -> Step:
    def step(store: Store, number: int) -> None:
        with store.transaction() as draft:
            for key in keys:
                draft.update(key, lambda _: _status(number))
            if len(keys) > 1:
                draft.put("k", "x", number)

    return step


def _delete(key: str) -> Step:
    return lambda store, _: store.delete(key)


def _put(store: Store, number: int) -> None:
    store.put("k", "x", number)


_A: Final = _update("a")
_FIRST: Final = (_add_sandbox, _add("a"), _put, _A, _add("b"), _A, _delete("b"), _put, _add("b"), _update("a", "b"), _A)
_NEXT: Final = (_add_sandbox, _add("a"), _delete("b"), _add("c"), _put, _A, _update("a", "c"))
_MORE: Final = 20
SCRIPTS: Final[Mapping[str, Sequence[Step]]] = {"first": _FIRST, "long": (*_FIRST, *(_put,) * _MORE), "next": _NEXT}
"""Each step writes a number of its own as the pid of what it touches; all may be done again."""
_FIRST_WRITES: Final[tuple[Mapping[str, bool], ...]] = (
    *({}, {"a": True}, {}, {"a": True}, {"b": True}, {"a": True}, {"b": False}, {}),
    *({"b": True}, {"a": True, "b": True}, {"a": True}),
)
_WRITES: Final[Mapping[str, Sequence[Mapping[str, bool]]]] = {
    "first": _FIRST_WRITES,
    "long": (*_FIRST_WRITES, *({},) * _MORE),
    "next": ({}, {"a": True}, {"b": False}, {"c": True}, {}, {"a": True}, {"a": True, "c": True}),
}
"""Which containers a step writes; False where it deletes them."""


def tell_states(script: str, start: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the pids of all containers before the first step, and after each."""
    states = [{**start}]
    for number, writes in enumerate(_WRITES[script]):
        after = {**states[-1], **{key: _FIRST_PIDS[script] + number for key, stays in writes.items() if stays}}
        states.append({key: pid for key, pid in after.items() if writes.get(key, True)})
    return states


class Plan(NamedTuple):
    """How a node lives."""

    state_dir: str
    node: str
    url: str
    script: str
    ack: str
    first: int = 0
    """The step to begin with."""
    is_again: bool = False
    """After a kill the first step may be done already, and wait for nothing: then another change does."""
    prepare: Callable[[], object] = lambda: None
    """Called first: to break something, for a control."""


class Node:
    """A node's process, from its start until it has ended or is killed."""

    def __init__(self, plan: Plan, close: Callable[[], object]) -> None:
        """Fork it. `close` is called in it, and closes what is the parent's. The caller must have one thread alone."""
        self.plan = plan
        self._read, write = os.pipe2(os.O_CLOEXEC)
        self._rest = b""
        self.acknowledged = plan.first - 1
        self.is_fenced = False
        self.error = ""
        self.pid = os.fork()
        if self.pid == 0:
            _live(plan, write, close)
        os.close(write)

    @property
    def pipe(self) -> int:
        """Where it acknowledges; to be polled."""
        return self._read

    @property
    def has_said(self) -> bool:
        """True if `read` would not wait."""
        return wait_readable(self._read, 0)

    def read(self) -> bool:
        """Take in what it says; return False once it has ended, and was waited for."""
        data = os.read(self._read, 1 << 12)
        if not data:
            self._reap()
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word = line.decode()
            if word.isdigit():
                self.acknowledged = int(word)
            elif word == _FENCED:
                self.is_fenced = True
            else:
                self.error = word
        return True

    def kill(self) -> None:
        """SIGKILL it; what it had said before is taken in by `read`. May be repeated."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it and wait for it. May be repeated."""
        self.kill()
        while self.pid and self.read():
            pass

    def _reap(self) -> None:
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0
            os.close(self._read)


def _live(plan: Plan, write: int, close: Callable[[], object]) -> None:
    """Be the node, and never return."""
    status = 1
    try:
        os.setpgid(0, 0)  # the terminal's signals are for the trial, which decides when this ends
        logging.disable()
        close()
        plan.prepare()
        try:
            follow(plan, lambda number: os.write(write, b"%d\n" % number))
        except FleetFencedError:
            os.write(write, f"{_FENCED}\n".encode())
        status = 0
    except BaseException as error:  # noqa: BLE001  # told to the trial, in one line
        os.write(write, f"{type(error).__name__}: {error}".replace("\n", " ").encode(errors="replace") + b"\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def follow(plan: Plan, acknowledge: Callable[[int], object]) -> None:
    """Live in this process: do all steps from the first, and acknowledge each; return once all is sent.

    Raises FleetFencedError if the node was taken over from.
    """
    fleet: dict[str, Any] = {"fleet": plan.url, "fleet_ack": plan.ack, "fleet_timeout": _WAIT_SECONDS}
    with Store.open(plan.state_dir, node=plan.node, **fleet) as store:
        for number, step in enumerate(SCRIPTS[plan.script]):
            if number >= plan.first:
                step(store, _FIRST_PIDS[plan.script] + number)
                if number == plan.first and plan.is_again:
                    store.put("k", "again", number)
                acknowledge(number)
                if plan.ack == "async":
                    _let_it_send(store, number)
        _wait_until_sent(store)


def _let_it_send(store: Store, number: int) -> None:
    """Have the fleet know the node after its first step, and get the others in several batches; wait for no fault."""
    until = time.monotonic() + (_JOIN_SECONDS if number == 0 else _BETWEEN_SECONDS)
    while time.monotonic() < until and store.fleet_lag is not None and store.fleet_lag.seconds:
        time.sleep(0.001)


def _wait_until_sent(store: Store) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while store.fleet_lag is not None and store.fleet_lag.seconds:
        if "taken over" in store.fleet_lag.error:
            raise FleetFencedError(store.fleet_lag.error)
        if time.monotonic() > deadline:
            raise LimpetError(f"not sent after {_WAIT_SECONDS:.0f} s: {store.fleet_lag}")
        time.sleep(0.002)
