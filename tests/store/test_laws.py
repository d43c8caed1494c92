"""The store's laws, durability aside: they hold on each database that is behind its contract."""

import fcntl
import threading
import time
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from limpet import Store, errors, recover
from limpet.engine.store import Record
from limpet.recovery import Boot, Observation, Process
from limpet.schema import ContainerState, Metadata, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from tests.records import RUNNING, metadata, sandbox

pytestmark = pytest.mark.usefixtures("database")


@pytest.mark.parametrize("wrong", [None, 5, b"x", {}, Store], ids=repr)
def test_what_is_no_record_is_refused_and_changes_nothing(store: Store, wrong: Any) -> None:
    """A dictionary for a Metadata, say: by an error that says what to give."""
    store.add(metadata("alpha"), RUNNING)
    status: Any = wrong or 5  # nothing means that of a new one
    for call in (
        lambda: store.add(wrong),
        lambda: store.add_sandbox(wrong),
        lambda: store.add(metadata("beta"), status),
        lambda: store.add_sandbox(sandbox("t"), status),
        lambda: store.doubt("alpha", wrong),
        lambda: store.declare_gone("alpha", wrong),
    ):
        with pytest.raises(errors.InvalidInputError, match=r"give a|say why"):
            call()
    assert [(each.id, each.status) for each in store.list()] == [("alpha", RUNNING)]
    assert store.sandbox_ids == {"s"}


def test_add_get_list_delete(store: Store) -> None:
    """What is added is found by id, prefix, name, state, labels and sandbox; what is deleted is gone."""
    store.add_sandbox(sandbox("t"))
    store.add(metadata("alpha", tier="web"), RUNNING)
    store.add(metadata("alpine", "t", tier="db", zone="b"))
    with pytest.raises(errors.AlreadyExistsError):
        store.add(metadata("alpha"))
    with pytest.raises(errors.AlreadyExistsError, match="name 'alpha'"):
        store.add(replace(metadata("alpha"), id="other"))
    with pytest.raises(errors.NotFoundError, match="sandbox 'nope'"):
        store.add(metadata("beta", "nope"))
    assert store.get("alpha").metadata.config.labels == {"tier": "web"}
    assert store.get("alpi").id == "alpine"
    with pytest.raises(errors.AmbiguousError, match="2 containers"):
        store.get("al")
    for found, wanted in (
        (store.list(), ["alpha", "alpine"]),
        (store.list(id="alpi"), ["alpine"]),
        (store.list(name="alpha"), ["alpha"]),
        (store.list(sandbox_id="t"), ["alpine"]),
        (store.list(state=ContainerState.RUNNING), ["alpha"]),
        (store.list(labels={"tier": "db", "zone": "b"}), ["alpine"]),
        (store.list(labels={"tier": "db", "zone": "c"}), []),
    ):
        assert [record.id for record in found] == wanted
    with pytest.raises(errors.InvalidStateError, match=r"still has containers \(alpine\)"):
        store.delete_sandbox("t")
    store.delete("alpine")
    store.delete_sandbox("t")
    with pytest.raises(errors.NotFoundError):
        store.get("alpine")


@pytest.mark.parametrize("is_reopened", [False, True], ids=["as it was made", "opened again"])
def test_every_combination_of_filters(state_dir: str, is_reopened: bool) -> None:
    """A list is what a look at each container finds: with each filter, and with all of them at once."""
    ended = replace(RUNNING, finished_at=3)
    made = [Status(), Status(created_at=1), replace(RUNNING, extra={"owner": "ann"}), ended]
    with Store.open(state_dir) as store:
        for name in ("s", "t"):
            store.add_sandbox(sandbox(name))
        for number, (status, place, tier) in enumerate(product(made, "st", ("web", "db"))):
            store.add(metadata(f"{'ab'[number % 2]}{number}", place, tier=tier), status)
        store.add(metadata("a\U0001f600", "s"), ended)
        if not is_reopened:
            compare_lists(store)
    if is_reopened:
        with Store.open(state_dir) as store:
            compare_lists(store)


def compare_lists(store: Store) -> None:
    everything = store.list()
    assert len(everything) == 17
    choices: list[list[dict[str, Any]]] = [
        [{}, {"id": "a"}, {"id": "b1"}, {"id": "zz"}, {"id": "\udc00"}],
        [{}, {"name": "a2"}],
        [{}, {"sandbox_id": "t"}],
        [{}, *({"state": state} for state in ContainerState)],
        [{}, {"labels": {"tier": "db"}}],
        [{}, {"extra": {"owner": "ann"}}],
    ]
    for chosen in product(*choices):
        wanted: dict[str, Any] = {key: value for each in chosen for key, value in each.items()}
        found = [record.id for record in store.list(**wanted)]
        assert found == [record.id for record in everything if matches(record, wanted)], wanted


def matches(record: Record, wanted: dict[str, Any]) -> bool:
    return (
        record.id.startswith(wanted.get("id", ""))
        and record.metadata.name == wanted.get("name", record.metadata.name)
        and record.metadata.sandbox_id == wanted.get("sandbox_id", record.metadata.sandbox_id)
        and record.status.state is wanted.get("state", record.status.state)
        and wanted.get("labels", {}).items() <= record.metadata.config.labels.items()
        and wanted.get("extra", {}).items() <= record.status.extra.items()
    )


def named(id: str, name: str, sandbox_id: str, attempt: int = 0) -> Metadata:
    config = parse_container_config({"metadata": {"name": name, "attempt": attempt}, "image": {"image": "host"}})
    return replace(metadata(name, sandbox_id), id=id, config=config)


def test_look_up_by_id_name_and_prefix(store: Store) -> None:
    """An exact id wins, then an exact name, of its attempts the newest, then the beginning of one id alone."""
    store.add_sandbox(sandbox("t"))
    for key, name, place, attempt in (
        ("aa1", "web", "s", 0),
        ("aa2", "web", "s", 10),
        ("aa3", "web", "s", 9),
        ("web-1", "aa", "s", 0),
        ("db", "other", "s", 0),
        ("bb1", "db", "s", 0),
        ("bb2", "both", "s", 7),
        ("bb3", "both", "t", 0),
    ):
        store.add(named(key, name, place, attempt))
    for text, meant in (
        ("web", "aa2"),
        ("aa3", "aa3"),
        ("aa", "web-1"),
        ("db", "db"),
        ("web-", "web-1"),
    ):
        assert store.get(text).id == meant
    with pytest.raises(errors.AmbiguousError, match="2 containers are called 'both': bb2, bb3") as raised:
        store.get("both")
    assert raised.value.candidates == ("bb2", "bb3")
    with pytest.raises(errors.AmbiguousError, match="begin with 'bb'"):
        store.get("bb")
    assert not issubclass(errors.AmbiguousError, errors.NotFoundError)
    for text in ("nope", "", "\ud800", "aa1x"):
        with pytest.raises(errors.NotFoundError):
            store.get(text)
    store.delete("aa2")
    assert store.get("web").id == "aa3"
    for exact in (
        store.status,
        lambda key: store.checkpoint(key, RUNNING),
        lambda key: store.update(key, lambda old: old),
    ):
        with pytest.raises(errors.NotFoundError):
            exact("web")


def test_look_up_of_a_sandbox(store: Store) -> None:
    """Sandboxes are found as containers are; a list takes a sandbox's id, name or beginning too."""
    for key, name, uid, attempt in (("x1", "pod", "u", 0), ("x2", "pod", "u", 1), ("y1", "two", "u", 0)):
        config = parse_pod_sandbox_config(
            {"metadata": {"name": name, "uid": uid, "namespace": "n", "attempt": attempt}}
        )
        store.add_sandbox(SandboxMetadata(id=key, name=name, config=config, created_at=1))
        store.add(named(f"c-{key}", "c", key))
    assert [store.get_sandbox(text).id for text in ("x1", "pod", "y", "two")] == ["x1", "x2", "y1", "y1"]
    with pytest.raises(errors.AmbiguousError, match="x1, x2"):
        store.get_sandbox("x")
    with pytest.raises(errors.NotFoundError):
        store.get_sandbox("z")
    config = parse_pod_sandbox_config({"metadata": {"name": "two", "uid": "other", "namespace": "n"}})
    store.add_sandbox(SandboxMetadata(id="y2", name="two", config=config, created_at=1))
    with pytest.raises(errors.AmbiguousError, match="called 'two'"):
        store.get_sandbox("two")
    for text, wanted in (("x1", ["c-x1"]), ("pod", ["c-x1", "c-x2"]), ("y", ["c-y1"]), ("two", ["c-y1"]), ("z", [])):
        assert [record.id for record in store.list(sandbox_id=text)] == wanted


def test_a_state_is_given_in_any_way_or_refused(store: Store) -> None:
    """A list takes a state, its name in any case and its number; what is no state is refused, and never empty."""
    store.add(metadata("a"), RUNNING)
    store.add(metadata("b"))
    states: tuple[Any, ...] = (ContainerState.RUNNING, "running", "RUNNING", "Container_Running", 1)
    for state in states:
        assert [record.id for record in store.list(state=state)] == ["a"]
    assert [record.id for record in store.list(state="unknown")] == ["b"]
    wrongs: tuple[Any, ...] = ("runing", "", 7, 1.5, ["running"])
    for wrong in wrongs:
        with pytest.raises(errors.InvalidInputError, match="created, running, exited, unknown"):
            store.list(state=wrong)
    told = f"{ContainerState.RUNNING} {ContainerState.EXITED!s:>8} {ContainerState.RUNNING:d}"
    assert told == "RUNNING   EXITED 1"


def test_a_long_transaction_costs_as_much_for_each_change(store: Store) -> None:
    """Adding, and taking back, many containers in one transaction costs for each what it costs in a short one."""

    def measure(count: int, prefix: str) -> float:
        began = time.thread_time()
        with pytest.raises(ZeroDivisionError), store.transaction() as draft:
            for number in range(count):
                draft.add(metadata(f"{prefix}{number}"), RUNNING)
            for number in range(0, count, 2):
                draft.delete(f"{prefix}{number}")
            with draft.savepoint():
                _ = 1 / 0
        return (time.thread_time() - began) / count

    measure(100, "warm")
    short, long = (min(measure(count, f"c{turn}-") for turn in range(2)) for count in (200, 4000))
    assert long < 4 * short
    assert not store.list()


def test_update_that_raises_changes_nothing(store: Store) -> None:
    """An exception from the function, or a status that cannot be written, reaches its caller and nobody else."""
    store.add(metadata("a"), RUNNING)

    def fail(_: Status) -> Status:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.update("a", fail)
    for bad in (
        replace(RUNNING, pid=-1),
        replace(RUNNING, finished_at=2**63),
        replace(RUNNING, exit_code=2**31),
        replace(RUNNING, reason="\ud800"),
        replace(RUNNING, message="x" * 70_000),
        replace(RUNNING, started_at="soon"),
        replace(RUNNING, stop_deadline=-1),
        replace(RUNNING, unapplied={"tty": "\ud800"}),
        replace(RUNNING, unapplied=["tty"]),
    ):
        with pytest.raises(errors.InvalidInputError):
            store.checkpoint("a", bad)
    with pytest.raises(errors.NotFoundError):
        store.checkpoint("b", RUNNING)
    assert store.status("a") == RUNNING


def test_a_clock_that_jumps_back_is_no_error(store: Store) -> None:
    """What the clock said is kept as it was said; the state does not depend on the order of times."""
    store.add(metadata("a"), Status(created_at=100, started_at=50))
    assert store.checkpoint("a", Status(created_at=100, started_at=50, finished_at=1)).state is ContainerState.EXITED


def test_transaction_is_whole_or_not_at_all(store: Store, state_dir: str) -> None:
    """Several containers change together; if the block raises, none does, in memory and on disk."""
    for name in "abc":
        store.add(metadata(name), RUNNING)
    with store.transaction() as draft:
        draft.update("a", lambda old: replace(old, message="1"))
        draft.update("a", lambda old: replace(old, message=old.message + "2"))
        draft.delete("b")
        draft.add(metadata("d"), RUNNING)
        assert store.status("a").message == ""
    with pytest.raises(ZeroDivisionError), store.transaction() as draft:
        draft.update("a", lambda old: replace(old, message="lost"))
        draft.delete("c")
        _ = 1 / 0
    with pytest.raises(errors.InvalidStateError), store.transaction():
        store.checkpoint("a", RUNNING)  # would wait for itself
    expected = {"a": "12", "c": "", "d": ""}
    assert {record.id: record.status.message for record in store.list()} == expected
    store.close()
    with Store.open(state_dir) as again:
        assert {u.record.id: u.record.status.message for u in again.unsettled()} == expected


def test_readers_never_see_half_a_transaction(store: Store) -> None:
    """While two containers swap a token in transactions, every list shows exactly one holder."""
    store.add(metadata("a"), replace(RUNNING, message="token"))
    store.add(metadata("b"), RUNNING)
    done = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not done.is_set():
            seen.append(sum(record.status.message == "token" for record in store.list()))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(200):
        giver, taker = ("a", "b") if turn % 2 == 0 else ("b", "a")
        with store.transaction() as draft:
            draft.update(giver, lambda old: replace(old, message=""))
            draft.update(taker, lambda old: replace(old, message="token"))
    done.set()
    reader.join()
    assert set(seen) == {1}


def test_lists_never_see_half_of_who_came_and_went(store: Store) -> None:
    """While transactions put one container in the place of another, every list shows exactly one, filtered or not."""
    store.add(metadata("a"), RUNNING)
    done = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not done.is_set():
            seen.append(len(store.list()))
            seen.append(len(store.list(sandbox_id="s")))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(300):
        goes, comes = ("a", "b") if turn % 2 == 0 else ("b", "a")
        with store.transaction() as draft:
            draft.delete(goes)
            draft.add(metadata(comes), RUNNING)
    done.set()
    reader.join()
    assert set(seen) == {1}


def test_many_threads_on_few_containers_lose_no_update(store: Store, state_dir: str) -> None:
    """Read-modify-write from 32 threads on 3 containers: every increment counts, in memory and on disk."""
    for name in "abc":
        store.add(metadata(name), replace(RUNNING, exit_code=0))

    def count(k: int) -> None:
        for i in range(50):
            store.update("abc"[(k + i) % 3], lambda old: replace(old, exit_code=old.exit_code + 1))
            if i == 25:
                with pytest.raises(errors.InvalidInputError):  # a neighbour's bad change is his own
                    store.checkpoint("a", replace(RUNNING, pid=-1))

    threads = [threading.Thread(target=count, args=(k,)) for k in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(store.status(name).exit_code for name in "abc") == 32 * 50
    store.close()
    with Store.open(state_dir) as again:
        assert sum(u.record.status.exit_code for u in again.unsettled()) == 32 * 50


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    operations=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["add", "update", "delete", "fail"]), st.integers(0, 2**40)),
        max_size=25,
    ),
    split=st.integers(1, 5),
)
def test_the_store_is_a_dictionary_that_survives(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, str, int]], split: int
) -> None:
    """Any sequence of calls, cut into transactions at will, leaves on disk what a dictionary would hold."""
    state_dir = str(tmp_path_factory.mktemp("model") / "state")
    model: dict[str, int] = {}
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for start in range(0, len(operations), split):
            part = dict(model)
            try:
                with store.transaction() as draft:
                    for name, verb, value in operations[start : start + split]:
                        if verb == "add":
                            draft.add(metadata(name), replace(RUNNING, pid=value))
                            part[name] = value
                        elif verb == "update":
                            draft.update(name, lambda old, value=value: replace(old, pid=value))  # type: ignore[misc]
                            part[name] = value
                        elif verb == "delete":
                            assert draft.delete(name) is (part.pop(name, None) is not None)
                        else:
                            raise errors.InvalidInputError("given up")
                model = part
            except errors.LimpetError:
                pass
            assert {record.id: record.status.pid for record in store.list()} == model
    with Store.open(state_dir) as store:
        assert {u.record.id: u.record.status.pid for u in store.unsettled()} == model


def test_history_counts_every_state_change_and_is_bounded(store: Store) -> None:
    """History numbers state changes without a gap and keeps the newest 64; checkpoints in one state add nothing."""
    store.add(metadata("a"), RUNNING)
    for turn in range(80):
        store.checkpoint("a", replace(RUNNING, finished_at=turn % 2, exit_code=turn, message="x"))
        store.checkpoint("a", replace(RUNNING, finished_at=turn % 2, exit_code=turn, message="y"))
    numbers = [one.number for one in store.history("a")]
    assert numbers == list(range(17, 81))
    assert [one.seq for one in store.history("a")][-1] == store.revision + 80


def test_a_probe_of_ones_own(store: Store) -> None:
    """A runtime that manages its own processes recovers with its own eyes; a probe that raises spoils one only."""

    class MyProbe:
        def observe(self, container: object) -> Observation:
            name = container.id  # type: ignore[attr-defined]
            if name == "broken":
                raise RuntimeError("no answer")
            seen = {"alive": Process.ALIVE, "done": Process.ENDED, "gone": Process.GONE}[name]
            return Observation(boot=Boot.SAME, process=seen, exit_code=3 if name == "done" else None)

    for name in ("alive", "done", "gone", "broken"):
        store.add(metadata(name), RUNNING)
    report = recover(store, probe=MyProbe())
    states = {record.id: (record.status.state.name, record.status.exit_code) for record in store.list()}
    assert states == {"alive": ("RUNNING", 0), "done": ("EXITED", 3), "gone": ("EXITED", 255), "broken": ("UNKNOWN", 0)}
    assert {f.id: f.problem for f in report.findings if f.problem} == {"broken": "RuntimeError: no answer"}
    assert report.totals["EXITED"] == 2
    assert store.last_report() is not None


def test_a_store_opened_again_fences_the_one_before(state_dir: str, store: Store) -> None:
    """Once another store has claimed the database, the one before it writes nothing more, and says so."""
    store.add(metadata("a"), RUNNING)
    fcntl.flock(store.directory._lock._file, fcntl.LOCK_UN)  # as where a file system loses locks
    with Store.open(state_dir) as newer:
        with pytest.raises(errors.StoreFencedError):
            store.checkpoint("a", replace(RUNNING, pid=8))
        with pytest.raises(errors.StoreError):
            store.checkpoint("a", replace(RUNNING, pid=8))
        (unsettled,) = newer.unsettled()
        assert unsettled.record.status.pid == RUNNING.pid


def test_a_sandbox_is_meant_by_its_id_or_by_a_beginning_that_none_has(store: Store) -> None:
    """A list takes the beginning of sandboxes' ids, but an id that a sandbox has means that one alone."""
    for name in ("ab", "abc", "b"):
        store.add_sandbox(sandbox(name))
        store.add(metadata(f"in-{name}", name), RUNNING)
    found = {wanted: [record.id for record in store.list(sandbox_id=wanted)] for wanted in ("a", "ab", "abc", "z")}
    assert found == {"a": ["in-ab", "in-abc"], "ab": ["in-ab"], "abc": ["in-abc"], "z": []}
