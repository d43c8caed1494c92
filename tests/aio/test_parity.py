"""What is for threads is for tasks too: the same names, and the same parameters."""

import inspect
from collections.abc import Mapping

import pytest

from limpet import AsyncEngine, AsyncStore, Engine, Store
from limpet.engine import AsyncContainer, AsyncSandbox, Container, Sandbox
from limpet.engine.aio.watch import AsyncWatch
from limpet.engine.store.watch import Watch

PAIRS: Mapping[type, type] = {
    Store: AsyncStore,
    Engine: AsyncEngine,
    Container: AsyncContainer,
    Sandbox: AsyncSandbox,
    Watch: AsyncWatch,
}
ABSENT: Mapping[type, Mapping[str, str]] = {
    Store: {
        "begin": "what this front is built on",
        "finish": "what this front is built on",
        "submit": "what this front is built on",
        "expect_requests": "for who will submit",
        "feed": "a part of watch",
        "load_events": "a part of watch",
        "recent_events": "a part of watch",
        "name_sandboxes": "a part of watch",
        "require_open": "a part of watch",
        "find_attempt": "a part of a restart",
        "list_intended": "for what is due",
        "time_left": "for what is due",
        "abandon": "for the fork's own handler",
        "fleet": "what the fronts tell and ask of a fleet; fleet_lag is for all",
        "next_report_number": "only to be called in a transaction",
    },
    Engine: {"exclusive": "a lock belongs to a thread; what a task asks for is in order for each container as it is"},
    Container: {
        "wait_async": "it is `wait`",
        "resume_stop": "for recovery",
        "is_in_stopped_sandbox": "for recovery",
        "take_back": "a part of create",
        "was_just_started": "a part of a removal",
        "carry_out_stop": "a part of a sandbox's stop",
        "remove_files": "a part of a sandbox's removal",
        "be_patient": "the parts of finish_stop",
        "is_stopped": "the parts of finish_stop",
        "last_status": "a part of wait and stop",
        "needs_stop": "a part of remove",
        "notify": "what `wait` is built on",
        "find_followers": "a part of stop",
        **dict.fromkeys(
            ("expire", "release_expired", "fail_start", "is_frozen", "thaw", "carry_out_pause"), "for what is due"
        ),
        **dict.fromkeys(("is_changing_limits", "carry_out_limits"), "for recovery"),
    },
    Sandbox: dict.fromkeys(
        (
            "make",
            "furnish",
            "vacate",
            "discard",
            "set_right",
            "take_back",
            "may_hold",
            "begin_removal",
            "finish_removal",
        ),
        "for create, stop, remove and recovery",
    ),
    Watch: {"close": "a task that waits is cancelled"},
}
MORE: Mapping[type, set[str]] = {
    AsyncStore: {"transact", "directory", "node"},
    AsyncEngine: {"recovery"},
    AsyncContainer: {"id"},
    AsyncSandbox: {"metadata"},
    AsyncWatch: set(),
}
"""Beside `transact`, what the other has as an attribute of each object, and not of the class."""


@pytest.mark.parametrize("kind", PAIRS)
def test_each_has_all_that_the_other_has(kind: type) -> None:
    """No public name is missing, none is there that the other lacks, and both take the same."""
    front = PAIRS[kind]
    ours, theirs = public(kind), public(front)
    assert ours.keys() - theirs.keys() <= ABSENT[kind].keys()
    assert not ABSENT[kind].keys() & theirs.keys()
    assert theirs.keys() - ours.keys() <= MORE[front]
    for name in ours.keys() & theirs.keys():
        assert callable(ours[name]) == callable(theirs[name]), name
        if callable(ours[name]):
            assert parameters(ours[name]) == parameters(theirs[name]), name


def test_what_may_take_long_is_awaited() -> None:
    """A task never blocks its loop on what waits for a disk's flush, for a lock or for a container."""
    for front in PAIRS.values():
        for name, member in public(front).items():
            if name == "open" or name.startswith("__") or not callable(member):
                continue
            if name == "transaction":
                continue
            awaited = inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
            reads = front is AsyncStore and name in READS
            assert awaited != reads, f"{front.__name__}.{name}"


READS = {
    "doubt",
    "find",
    "find_suspect",
    "get",
    "get_sandbox",
    "history",
    "is_damaged",
    "last_report",
    "list",
    "list_items",
    "list_sandboxes",
    "metadata",
    "sandbox_status",
    "sandbox_version",
    "status",
    "unsettled",
    "watch",
}


def public(kind: type) -> dict[str, object]:
    """Return the public members of a class by name, those that are given by properties and annotations too."""
    own = {"__len__", "__contains__", "__eq__", "__hash__", "__repr__"}
    found = {
        name: getattr(kind, name) for name in dir(kind) if not name.startswith("_") or name in own & vars(kind).keys()
    }
    return {name: member for name, member in found.items() if not isinstance(member, type)}


def parameters(member: object) -> list[tuple[str, object, object]]:
    """Return what a function takes: names, kinds and defaults."""
    assert callable(member)
    return [(one.name, one.kind, one.default) for one in inspect.signature(member).parameters.values()]
