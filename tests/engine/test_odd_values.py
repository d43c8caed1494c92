"""Values of odd kinds: texts of classes of their own, numbers that nothing can hold, what cannot be shown."""

from collections.abc import Callable
from typing import Any

import pytest

from limpet.engine import Engine, Sandbox, Store, errors
from limpet.engine.inspection import Snapshot
from limpet.schema.errors import quote
from limpet.schema.image import ImageName, MountType


class Text(str):
    """As numpy.str_ and markupsafe.Markup are."""

    __slots__ = ()


class Unseen:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


CONFIG = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["true"], "labels": {"k": "v"}}
HUGE: Any = 10**5000
WRONG: Any = 2**63


@pytest.fixture
def pod(engine: Engine) -> Sandbox:
    return engine.create_sandbox({"metadata": {"name": "p"}}, id="p")


def test_a_text_of_a_class_of_its_own_is_a_text(state_dir: str) -> None:
    """Ids, names, nodes, labels, images and items are found by it, and made with it, as with a plain one."""
    with Engine.open(state_dir, node=Text("n")) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "p"}}, id=Text("p"))
        made = engine.create_container(CONFIG, Text("p"), id=Text("c"), extra={"a": 1})
        assert type(made.id) is type(pod.id) is type(engine.store.node) is str
        for text in (Text("c"), Text("p")):
            assert [each.id for each in engine.list(id=text)] == (["c"] if text == "c" else [])
        assert [each.id for each in engine.list(labels={Text("k"): Text("v")}, name=Text("c"))] == ["c"]
        assert [each.id for each in engine.list(sandbox_id=Text("p"))] == ["c"]
        engine.get(Text("c")).start()
        assert engine.get(Text("c")).wait(10).exit_code == 0
        with engine.store.watch(since=0, id=Text("c"), kinds=[Text("added")], labels={Text("k"): Text("v")}) as watch:
            assert next(watch).id == "c"
        engine.store.update(Text("c"), lambda old: old)
        engine.store.put(Text("kind"), Text("key"), 1)
        engine.store.put("kind", "key", 2)
        assert [item.value for item in engine.store.list_items(Text("kind"))] == [2]
        assert engine.images.manifest(ImageName.of(Text("host"))).name.repository == "host"
        engine.images.tag(ImageName.of(Text("host")), ImageName.of(Text("here")))
        with Snapshot.open(state_dir, node=Text("n")) as snapshot:
            assert snapshot.sandbox(Text("p")) == snapshot.sandbox("p")
            assert snapshot.get(Text("c")).status.exit_code == 0
            assert snapshot.metadata(Text("c")) == engine.store.metadata(Text("c"))
            assert [each.id for each in snapshot.list(labels={Text("k"): Text("v")})] == ["c"]
        engine.get(Text("c")).release()
        assert engine.delete(Text("c"))
        assert engine.list() == []
    Store.open(state_dir, node=Text("n")).close()


def test_a_report_that_cannot_be_stored_is_refused(engine: Engine) -> None:
    """What cannot be stored leaves no change behind that each later one would stumble over."""
    for number, at, report in ((None, 1, "x"), (WRONG, 1, "x"), (1, 2**63, "x"), (1, 1, b"x"), (1, 1, "\udc80")):
        wrong: Any = number
        text: Any = report
        with pytest.raises(errors.InvalidInputError, match="report"), engine.store.transaction() as draft:
            draft.add_report(wrong, at, text)
    engine.store.put("kind", "key", 1)


CALLS: dict[str, Callable[[Engine, Snapshot], object]] = {
    "wait": lambda engine, _: engine.get("c").wait(HUGE),
    "stop": lambda engine, _: engine.get("c").stop(HUGE),
    "renew": lambda engine, _: engine.get("c").renew(HUGE),
    "expect": lambda engine, _: engine.store.checkpoint("c", engine.get("c").status, expect=HUGE),
    "expect of an item": lambda engine, _: engine.store.put("kind", "key", 1, expect=HUGE),
    "expect of a sandbox": lambda engine, _: engine.get_sandbox("p").update(lambda old: old, expect=HUGE),
    "value": lambda engine, _: engine.store.put("kind", "key", HUGE),
    "extra": lambda engine, _: engine.create_sandbox({"metadata": {"name": "q"}}, extra={"a": HUGE}),
    "since": lambda _, snapshot: snapshot.watch(since=WRONG),
    "since of an engine": lambda engine, _: engine.store.watch(since=HUGE),
    "kinds": lambda _, snapshot: snapshot.watch(kinds=WRONG),
    "metadata": lambda _, snapshot: snapshot.metadata(WRONG),
    "history": lambda _, snapshot: snapshot.history(WRONG),
    "unmount of a descriptor": lambda engine, _: engine.images.unmount(WRONG),
    "mount at nothing": lambda engine, _: engine.images.mount("host", MountType.PLAIN, Unseen()),  # type: ignore[arg-type]
    "mount of nothing": lambda engine, _: engine.images.mount("host", Unseen(), "/tmp"),  # type: ignore[arg-type]
    "exclusive": lambda engine, _: engine.exclusive(None),  # type: ignore[arg-type]
    "secret_env": lambda engine, _: engine.get("c").start({HUGE: "a"}),
    "inherit_env": lambda _, snapshot: Engine.open(snapshot.path + "-2", inherit_env=[HUGE]),
    "wait for a lock": lambda _, snapshot: Engine.open(snapshot.path, wait=HUGE),
    "delete": lambda engine, _: engine.delete(bytearray(b"c")),  # type: ignore[arg-type]
    "timeout": lambda engine, _: engine.get("c").wait(Unseen()),  # type: ignore[arg-type]
    "declare_gone": lambda engine, _: engine.store.declare_gone(bytearray(b"c"), "why"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", CALLS)
def test_what_nothing_can_hold_or_show_is_refused(engine: Engine, pod: Sandbox, what: str) -> None:
    """Numbers of thousands of digits, or beyond 64 bits, and what has no repr, are refused by limpet's own errors."""
    engine.create_container(CONFIG, pod, id="c")
    with Snapshot.open(engine.store.directory.path) as snapshot, pytest.raises(errors.LimpetError):
        CALLS[what](engine, snapshot)


def test_what_is_in_no_row_is_not_found(engine: Engine, pod: Sandbox) -> None:
    """What cannot be written can be in no row."""
    for text in ("\ud800", WRONG):
        assert engine.store.find_attempt(text, "c", 0) is None
        with engine.store.transaction() as draft:
            assert draft.containers_of(text) == set()
            assert draft.find_attempt(text, "c", 0) is None


def test_addresses_without_an_end_are_refused(engine: Engine) -> None:
    """A list that contains itself is no list of texts."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(errors.InvalidInputError, match="status of sandbox"):
        engine.create_sandbox({"metadata": {"name": "p"}}, addresses=endless)


def test_a_message_shows_what_can_be_shown() -> None:
    """What has no repr is told by its type, and what has a long one is shortened."""
    assert quote(Unseen()) == "(Unseen)"
    assert quote(HUGE) == "(int)"
    assert len(quote(["x" * 100000])) < 100
    assert quote(["x"]) == "['x']"
