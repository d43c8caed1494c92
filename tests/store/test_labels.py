"""The index of labels leads to what the containers' own rows say, and a check tells where it does not."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from limpet import Store, errors
from limpet.engine.database.sqlite import reader
from limpet.engine.database.sqlite.extract import Extractor, make_database
from limpet.engine.inspection.check import find_store_damage
from limpet.schema import Metadata, Status
from limpet.schema.cri import parse_container_config
from tests.records import metadata, sandbox
from tests.upgrade.saved import unpack

_ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
_TEXTS = st.sampled_from(["app", "web", "", 'a"b', "\u2028"]) | _ANY_TEXT
_LABELS = st.dictionaries(_TEXTS, _TEXTS, max_size=3)


def labelled(key: str, labels: Mapping[str, str]) -> Metadata:
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "labels": dict(labels)}
    return replace(metadata(key), config=parse_container_config(config))


def change(state_dir: str, statement: str) -> None:
    """Damage the database of a store that is closed."""
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        raw.execute(statement)
        raw.commit()


def read_index(state_dir: str) -> set[tuple[str, str, str]]:
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        return set(raw.execute("SELECT key, value, id FROM label"))


def find(store: Store, **labels: str) -> list[str]:
    return [record.id for record in store.list(labels=labels)]


@settings(max_examples=12)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.none() | _LABELS), max_size=4), max_size=4))
def test_the_index_is_what_the_rows_say(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[tuple[str, Mapping[str, str] | None]]]
) -> None:
    """Whatever is added and deleted in whichever transactions, each label leads to those that have it, and no other."""
    state_dir = str(tmp_path_factory.mktemp("labels") / "state")
    known: dict[str, Mapping[str, str]] = {}
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for step in steps:
            with store.transaction() as draft:
                for key, labels in step:
                    draft.delete(key)
                    known.pop(key, None)
                    if labels is not None:
                        draft.add(labelled(key, labels), Status())
                        known[key] = labels
        for labels in known.values():
            wanted = [key for key in sorted(known) if labels.items() <= known[key].items()]
            assert sorted(record.id for record in store.list(labels=labels)) == wanted
    assert read_index(state_dir) == {(*label, key) for key, labels in known.items() for label in labels.items()}
    assert find_store_damage(state_dir) == []


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_lists_by_several_labels(state_dir: str, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The rarest label leads, or none if each is of many: what is found is the same."""
    monkeypatch.setattr(reader, "_MANY", most)
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for key, tier in (("a", "web"), ("b", "web"), ("c", "db")):
            store.add(metadata(key, app="x", tier=tier))
        assert find(store, app="x") == ["a", "b", "c"]
        assert find(store, app="x", tier="db") == ["c"]
        assert find(store, tier="web", app="x") == ["a", "b"]
        assert find(store, tier="web", app="y") == find(store, tier="\udc00") == []


@pytest.mark.parametrize(
    ("damage", "told", "found"),
    [
        ("DELETE FROM label WHERE id = 'a'", "container a: its label tier=web is not in the index", ["b"]),
        ("UPDATE label SET value = 'wex' WHERE id = 'a'", "container a: its label tier=web is not", ["b"]),
        ("INSERT INTO label VALUES ('local', 'tier', 'web', 'c')", "container c: the index of labels", ["a", "b"]),
        ("INSERT INTO label VALUES ('local', 'tier', 'web', 'gone')", "container gone: the index of", ["a", "b"]),
        ("UPDATE label SET id = CAST(x'ff' AS TEXT) WHERE id = 'a'", "container a: its label tier=web is not", ["b"]),
    ],
)
def test_a_damaged_index_is_told(state_dir: str, damage: str, told: str, found: list[str]) -> None:
    """A row that is missing and one too many are damage; by the latter no container is listed that lacks the label."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for key, tier in (("a", "web"), ("b", "web"), ("c", "db")):
            store.add(metadata(key, tier=tier))
    change(state_dir, damage)
    assert told in "\n".join(find_store_damage(state_dir))
    with Store.open(state_dir) as store:
        assert find(store, tier="web") == found


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE container SET labels = '{\"tier\":\"wex\"}' WHERE id = 'a'",
        "UPDATE container SET labels = '{' WHERE id = 'a'",
        "UPDATE container SET labels = CAST(x'ff' AS TEXT) WHERE id = 'a'",
        "DELETE FROM container WHERE id = 'a'",
        "DELETE FROM label WHERE id = 'a' AND key = 'tier'",
    ],
)
def test_what_is_deleted_leaves_nothing_in_the_index(state_dir: str, damage: str) -> None:
    """Also where damage has made its row say other labels than it had when it was added."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a", tier="web", app="x"))
        store.add(metadata("b", tier="web"))
    change(state_dir, damage)
    with Store.open(state_dir) as store:
        store.delete("a")
        assert find(store, tier="web") == ["b"]
    assert read_index(state_dir) == {("tier", "web", "b")}
    assert find_store_damage(state_dir) == []


def test_an_upgrade_makes_the_index(tmp_path: Path) -> None:
    """Each container of an older database is found by its labels, whatever they are made of."""
    state_dir = unpack("0006", str(tmp_path))
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        before = {key: json.loads(text) for key, text in raw.execute("SELECT id, labels FROM container")}
    with Store.open(state_dir) as store:
        for key, labels in before.items():
            assert (key in find(store, **labels)) is (key in store)
    assert len(before) > 20
    assert read_index(state_dir) == {(*label, key) for key, labels in before.items() for label in labels.items()}


def test_a_kill_between_row_and_label_leaves_neither(state_dir: str) -> None:
    """Both are written in one transaction: one that fails at the labels adds nothing."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
    change(state_dir, "CREATE TRIGGER fail BEFORE INSERT ON label BEGIN SELECT RAISE(ABORT, 'no'); END")
    with Store.open(state_dir) as store:
        with pytest.raises(errors.StoreError):
            store.add(metadata("a", tier="web"))
        assert store.list() == []
        store.add(metadata("b"))
    assert read_index(state_dir) == set()


def test_what_is_made_of_a_copy_has_the_index(state_dir: str, tmp_path: Path) -> None:
    """A node that is restored from its rows elsewhere finds its containers by their labels, too."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a", tier="web", app="x"))
    extractor = Extractor(f"{state_dir}/store.db", "local")
    keys = extractor.extract_keys().rows
    found = extractor.extract((0, 1000), lambda _: {table: list(rows) for table, rows in keys.items()})
    extractor.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    make_database(f"{copy}/store.db", ("local", found.epoch, found.opened_at, found.pruned), found.rows, found.events)
    assert read_index(str(copy)) == read_index(state_dir) == {("tier", "web", "a"), ("app", "x", "a")}
