"""What a runtime keeps of its own: extra beside a status, items of its own kinds, and the state of its sandboxes."""

import asyncio
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import AsyncStore, Engine, Store, errors
from limpet.schema import Status
from limpet.schema.sandbox_status import SandboxReason, SandboxState, stop_sandbox
from limpet.schema.status import end
from tests.records import RUNNING, metadata, sandbox

pytestmark = pytest.mark.usefixtures("database")

VALUES: list[Any] = [None, True, 0, -(2**53), 1.5, "", "\x00\u2028\U0001f41a", [], [1, [2]], {"a": {"b": [None]}}]
NO_VALUES: list[Any] = [float("nan"), b"bytes", {1: 2}, (1, 2), "\ud800", object(), "x" * (64 << 10)]


def with_extra(**extra: object) -> Status:
    return replace(RUNNING, extra=extra)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(store: Store, state_dir: str, value: Any) -> None:
    """Any JSON value is kept, in an item and in extra, by the next store, too."""
    store.add(metadata("a"), with_extra(key=value))
    assert store.put("lease", "k", value).value == value
    put_at = store.revision
    store.close()
    with Store.open(state_dir) as again:
        found = again.find("lease", "k")
        assert found is not None
        assert (found.value, type(found.value), found.version) == (value, type(value), put_at)
        assert again.get("a").status.extra == {"key": value}


@pytest.mark.parametrize("value", NO_VALUES, ids=[type(value).__name__ for value in NO_VALUES])
def test_what_json_cannot_hold_is_refused(store: Store, value: Any) -> None:
    """It is refused with a reason, and nothing changes."""
    store.add(metadata("a"), with_extra(kept=1))
    with pytest.raises(errors.InvalidInputError, match=r"JSON|read back|at most"):
        store.put("lease", "k", value)
    with pytest.raises(errors.InvalidInputError, match=r"JSON|read back|at most"):
        store.update("a", lambda status: replace(status, extra={"key": value}))
    assert store.find("lease", "k") is None
    assert store.get("a").status.extra == {"kept": 1}


def test_extra_and_status_change_together(store: Store) -> None:
    """One update changes both, the end keeps extra, and lists find it by its top-level keys."""
    store.add(metadata("a"), with_extra(owner="me", tags=["x"]))
    store.add(metadata("b"), with_extra(owner="you"))
    store.update("a", lambda status: replace(end(status, 3, finished_at=9), extra={**status.extra, "cost": 7}))
    status = store.get("a").status
    assert (status.exit_code, status.extra) == (3, {"owner": "me", "tags": ["x"], "cost": 7})
    for wanted, found in (({"owner": "me"}, ["a"]), ({"owner": "me", "tags": ["x"]}, ["a"]), ({"tags": "x"}, [])):
        assert [record.id for record in store.list(extra=wanted)] == found
    with pytest.raises(errors.InvalidInputError, match="extra must be a JSON object"):
        store.checkpoint("a", replace(status, extra=["no object"]))


def test_who_is_made_again_has_no_version_of_before(store: Store) -> None:
    """Nor has one that was pruned from the log: what was decided of the one before is not done to its successor."""
    store.add_sandbox(sandbox("t"))
    store.add(metadata("a", "t"))
    for turn in range(30):  # more checkpoints than there are events: versions run ahead of revisions
        store.checkpoint("a", with_extra(turn=0), expect=store.get("a").version)
        store.update_sandbox("t", partial(replace, message=str(turn)))
        store.update_sandbox("t", lambda status: status)  # nothing to tell, but a version
        store.checkpoint("a", replace(with_extra(turn=0), message=str(turn)))
    last, last_sandbox = store.get("a").version, store.sandbox_version("t")
    with store.transaction() as draft:  # also where both happen at once
        draft.delete("a")
        draft.delete_sandbox("t")
        draft.add_sandbox(sandbox("t"))
        draft.add(metadata("a", "t"), Status())
    assert store.get("a").version > last
    assert store.sandbox_version("t") > last_sandbox
    before, sandbox_before = store.get("a").version, store.sandbox_version("t")
    store.delete("a")
    store.delete_sandbox("t")
    store.add_sandbox(sandbox("t"))
    store.add(metadata("a", "t"))
    assert store.get("a").version > before
    assert store.sandbox_version("t") > sandbox_before
    with pytest.raises(errors.VersionConflictError):
        store.checkpoint("a", with_extra(turn=1), expect=before)


def test_a_version_that_has_passed_is_refused(store: Store) -> None:
    """Of those who expect the same version one wins; the others are told, and change nothing."""
    store.add(metadata("a"), with_extra(turn=0))
    version = store.get("a").version
    store.checkpoint("a", with_extra(turn=1), expect=version)
    with pytest.raises(errors.VersionConflictError, match=f"version is {version + 1}, not {version}"):
        store.checkpoint("a", with_extra(turn=2), expect=version)
    assert store.get("a").status.extra == {"turn": 1}
    assert store.update_sandbox("s", lambda old: replace(old, extra={"a": 1}), expect=1).extra == {"a": 1}
    with pytest.raises(errors.VersionConflictError):
        store.update_sandbox("s", lambda old: replace(old, extra={"a": 2}), expect=1)
    assert (store.sandbox_status("s").extra, store.sandbox_version("s")) == ({"a": 1}, 2)


def test_threads_that_compare_and_set_lose_nothing(store: Store) -> None:
    """Each success is one more in the value: 4 threads count to 100."""
    before = store.revision

    def count() -> None:
        for _ in range(25):
            while True:
                found = store.find("counter", "n")
                value, version = (found.value, found.version) if found else (0, 0)
                with suppress(errors.VersionConflictError):
                    store.put("counter", "n", value + 1, expect=version)
                    break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.find("counter", "n")
    assert found is not None
    assert (found.value, found.version) == (100, before + 100)


def test_items_are_listed_and_deleted(store: Store) -> None:
    """By kind, in order of their keys; a key that is put again after its deletion has a version that it never had."""
    for key in ("b", "a", "c/d"):
        store.put("volume", key, key)
    store.put("exec", "a", 1)
    before = store.put("volume", "b", 1).version
    assert [item.key for item in store.list_items("volume")] == ["a", "b", "c/d"]
    store.delete_item("volume", "b", expect=before)
    store.delete_item("volume", "b")
    with pytest.raises(errors.VersionConflictError, match="it is not there"):
        store.delete_item("volume", "b", expect=before)
    assert [item.key for item in store.list_items("volume")] == ["a", "c/d"]
    again = store.put("volume", "b", 2, expect=0).version
    assert again == store.revision > before
    for version in (0, before, before - 1):
        with pytest.raises(errors.VersionConflictError, match=f"version is {again}"):
            store.put("volume", "b", 3, expect=version)
    with store.transaction() as draft:
        for _ in range(2):
            draft.delete_item("volume", "b")
            assert draft.put("volume", "b", 3).version > again
    assert store.find("volume", "b") == store.list_items("volume")[1]
    assert store.list_items("volume")[1].version == store.revision
    for kind, key in (("", "a"), ("a", ""), ("a\n", "a"), ("a", "x" * 257)):
        with pytest.raises(errors.InvalidInputError, match="use 1 to 256 printable"):
            store.put(kind, key, 1)


def test_a_transaction_spans_all_of_it(store: Store) -> None:
    """Items, containers and sandboxes change together or not at all, and a draft sees what it has changed."""
    store.put("lease", "old", 1)
    with pytest.raises(ZeroDivisionError), store.transaction() as draft:
        draft.put("lease", "new", 1)
        draft.delete_item("lease", "old")
        draft.update_sandbox("s", lambda old: replace(old, addresses=("10.0.0.7",)))
        draft.add(metadata("a"), with_extra(n=1))
        raise ZeroDivisionError
    assert [item.key for item in store.list_items("lease")] == ["old"]
    assert store.sandbox_status("s").addresses == ()
    assert len(store) == 0
    with store.transaction() as draft:
        new = draft.put("lease", "new", 1).version
        assert draft.put("lease", "new", 2, expect=new).version == new + 1
        draft.delete_item("lease", "old")
        assert draft.find("lease", "old") is None
        old = draft.put("lease", "old", 5, expect=0).version
        draft.update_sandbox("s", lambda old: replace(old, addresses=("10.0.0.7",)))
        draft.update_sandbox("s", lambda old: replace(old, namespaces={"network": "/run/netns/x"}))
        draft.add(metadata("a"), with_extra(n=1))
        added = draft.version("a")
    assert store.get("a").version == added == store.revision
    assert [(item.key, item.value, item.version) for item in store.list_items("lease")] == [
        ("new", 2, new + 1),
        ("old", 5, old),
    ]
    status = store.sandbox_status("s")
    assert (status.addresses, status.namespaces) == (("10.0.0.7",), {"network": "/run/netns/x"})


def test_a_transaction_that_is_over_takes_nothing(store: Store) -> None:
    """Who keeps its draft is told: what nobody writes is not swallowed."""
    store.add(metadata("a"), RUNNING)
    with store.transaction() as draft:
        draft.put("lease", "kept", 1)
    for late in (
        lambda: draft.put("lease", "late", 1),
        lambda: draft.delete_item("lease", "kept"),
        lambda: draft.add(metadata("late"), RUNNING),
        lambda: draft.update("a", lambda old: replace(old, pid=8)),
        lambda: draft.delete("a"),
        lambda: draft.add_sandbox(sandbox("late")),
    ):
        with pytest.raises(errors.InvalidStateError, match="is over"):
            late()

    async def keep() -> None:
        async with AsyncStore(store).transaction() as kept:
            kept.put("lease", "other", 1)
        with pytest.raises(errors.InvalidStateError, match="is over"):
            kept.put("lease", "late", 1)

    asyncio.run(keep())
    assert [item.key for item in store.list_items("lease")] == ["kept", "other"]
    assert (list(store.ids), store.status("a").pid) == (["a"], 7)


@pytest.mark.parametrize("value", [None, [], "", 0], ids=repr)
def test_extra_is_an_object(store: Store, value: Any) -> None:
    """What is empty and no object is refused as anything else is."""
    store.add(metadata("a"), with_extra(kept=1))
    with pytest.raises(errors.InvalidInputError, match="JSON object"):
        store.update("a", lambda old: replace(old, extra=value))
    with pytest.raises(errors.InvalidInputError, match="JSON object"):
        store.update_sandbox("s", lambda old: replace(old, extra=value))
    assert store.get("a").status.extra == {"kept": 1}


WRONG: list[dict[str, Any]] = [
    {"id": b"a"}, {"name": 7}, {"sandbox_id": ("s",)}, {"labels": ["a"]}, {"labels": {"a": 1}}, {"labels": {1: "a"}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_can_match_nothing_is_refused(store: Store, wrong: dict[str, Any]) -> None:
    """A list of a label that is a number would be empty, and a watch would wait for ever."""
    store.add(metadata("a", a="1"), RUNNING)
    for ask in (store.list, store.watch):
        with pytest.raises(errors.InvalidInputError, match=r"give (text|a mapping)"):
            ask(**wrong)
    with pytest.raises(errors.InvalidInputError, match="give a mapping"):
        store.list(extra=["a"])  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidInputError, match="give a list"):
        store.watch(kinds="added")
    with pytest.raises(errors.InvalidInputError, match="not bytes"):
        store.get(b"a")  # type: ignore[arg-type]


def test_a_stopped_sandbox_takes_no_containers(store: Store) -> None:
    """It is NOTREADY for good, also for the next store, and says so."""
    store.update_sandbox("s", lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=5))
    assert store.sandbox_status("s").state is SandboxState.NOTREADY
    with pytest.raises(errors.InvalidStateError, match="NOTREADY"):
        store.add(metadata("a"))
    again = stop_sandbox(store.sandbox_status("s"), SandboxReason.REBOOTED, at=9)
    assert (again.stopped_at, again.reason) == (5, "Stopped")


def test_a_sandbox_has_a_name_of_its_own(store: Store) -> None:
    """Name, namespace, uid and attempt together are one sandbox's; they are free again once it is deleted."""
    with pytest.raises(errors.AlreadyExistsError, match="sandbox s has the name 's' already"):
        store.add_sandbox(replace(sandbox("s"), id="t"))
    config = sandbox("s").config
    second = replace(config, metadata=replace(config.metadata, attempt=1))
    store.add_sandbox(replace(sandbox("s"), id="t", config=second))
    with store.transaction() as draft:
        draft.delete_sandbox("s")
        draft.add_sandbox(replace(sandbox("s"), id="u"))
        with pytest.raises(errors.AlreadyExistsError):
            draft.add_sandbox(replace(sandbox("s"), id="v"))
    assert [one.id for one in store.list_sandboxes()] == ["t", "u"]


def test_a_container_is_made_with_extra(state_dir: str) -> None:
    """What is given at its creation is there with its row, and what is no JSON object leaves nothing behind."""
    config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["true"]}
    with Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}})
        made = engine.create_container(config, pod, extra={"owner": "me"})
        assert made.status.extra == {"owner": "me"}
        with pytest.raises(errors.InvalidInputError, match="JSON object"):
            engine.create_container({**config, "metadata": {"name": "b"}}, pod, extra=[1])  # type: ignore[arg-type]
        assert engine.list() == [made]
