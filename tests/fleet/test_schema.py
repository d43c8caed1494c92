"""The fleet's tables: made once by many nodes, and nobody else's are touched. No error shows the password."""

import re
import threading

import pytest
from msgspec.structs import replace
from sqlalchemy import Text

from limpet import Store, errors
from limpet.engine.fleet import Fleet, batch, find_differences, remove_tables
from limpet.engine.fleet import address as addresses
from limpet.engine.fleet.address import Address
from limpet.engine.fleet.upgrade import FLEET_REVISION, require_current, require_schema
from limpet.schema.tables import TABLES
from tests.conftest import in_thread, wait_until
from tests.fleet.conftest import PASSWORD, Base, Cluster
from tests.fleet.test_shipping import wait_sent
from tests.records import RUNNING, metadata, sandbox


def test_many_nodes_make_the_tables_at_once(base: Base) -> None:
    """They are made once, and everybody finds them."""
    address = Address(base.url)
    barrier = threading.Barrier(6)

    def make() -> None:
        with address.connect() as connection:
            barrier.wait()
            require_schema(address, connection)
            require_current(address, connection)

    outcomes = [in_thread(make) for _ in range(6)]
    for thread, _ in outcomes:
        thread.join()
    assert [outcome for _, outcome in outcomes] == [[None]] * 6
    assert base.ask("SELECT version_num FROM limpet.fleet_version") == [(FLEET_REVISION,)]


def test_the_tables_are_those_of_the_nodes(base: Base) -> None:
    """Whoever adds a column to a node's table is reminded of the fleet's."""
    address = Address(base.url)
    with address.connect() as connection:
        require_schema(address, connection)
    for table in TABLES.sorted_tables:
        if table.name in {"recovery", "label", "deadline"}:  # reports, index of labels and clock are each node's own
            continue
        found = base.ask(
            "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_schema = 'limpet' AND table_name = %s AND column_name NOT LIKE 'fleet%%'"
            " ORDER BY ordinal_position",
            table.name,
        )
        assert found == [
            (column.name, "text" if isinstance(column.type, Text) else "bigint", "YES" if column.nullable else "NO")
            for column in table.columns
        ]


def test_tables_of_the_first_revision_are_upgraded(base: Base, state_dir: str) -> None:
    """With what is in them, by the node that needs it; an index is then as in new ones."""
    indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'limpet' ORDER BY indexname"
    address = Address(base.url)
    with address.connect() as connection:
        require_schema(address, connection, "f001")
        made = {name for name, _ in base.ask(indexes)}
        with pytest.raises(errors.FleetError, match="of revision 'f001'"):
            require_current(address, connection)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
    upgraded = base.ask(indexes)
    assert {name for name, _ in upgraded} - made == {"container_by_id", "container_by_labels", "container_by_name"}
    with Fleet.open(base.url) as fleet:
        assert fleet.nodes()[0].is_whole


@pytest.mark.parametrize(
    ("statement", "kind", "what"),
    [
        ("UPDATE limpet.fleet_version SET version_num = 'f999'", errors.FleetTooNewError, "revision f999.*upgrade"),
        ("UPDATE limpet.fleet_version SET version_num = '0006'", errors.FleetError, "not limpet's"),
        ("DROP TABLE limpet.fleet_version, limpet.event", errors.FleetError, "not limpet's"),
    ],
)
def test_other_tables_are_refused_and_left_alone(
    base: Base, state_dir: str, statement: str, kind: type[Exception], what: str
) -> None:
    """What is newer, or not ours, is told; nothing in it changes; the node itself works."""
    address = Address(base.url)
    with address.connect() as connection:
        require_schema(address, connection)
    base.ask(statement)
    with address.connect() as connection, pytest.raises(kind, match=what):
        require_schema(address, connection)
    with Store.open(state_dir, fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_until(lambda: store.fleet_lag and store.fleet_lag.error, "the refusal to be told")
        assert store.fleet_lag is not None
        assert PASSWORD not in store.fleet_lag.error
    assert base.ask("SELECT count(*) FROM limpet.fleet_node") == [(0,)]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "sqlite:///x",
        f"postgresql://u:{PASSWORD}%@h/d",
        f"postgresql://u:{PASSWORD}@[/d",
        "postgresql+psycopg2://h/d",
        f"postgresql://u:a@{PASSWORD}@h/d",
        f"postgresql://u:a/{PASSWORD}@h/d",
        f"postgresql://u:{PASSWORD}/d",
        f"postgresql://u:{PASSWORD}@h/d\0",
        f"postgresql://u:{PASSWORD}@h/\ud800",
    ],
)
def test_an_address_that_is_none_is_refused(state_dir: str, url: str) -> None:
    """Before anything is opened, and without the password."""
    with pytest.raises(errors.InvalidInputError) as caught:
        Address(url)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__context__ is None
    if url:
        with pytest.raises(errors.InvalidInputError):
            Store.open(state_dir, fleet=url)
    for settings in ({"fleet_ack": "maybe"}, {"fleet_timeout": 0.0}):
        with pytest.raises(errors.InvalidInputError):
            Store.open(state_dir, **settings)


def test_no_error_shows_the_password(cluster: Cluster) -> None:
    """Neither what libpq says, nor the traceback; nor does the address itself."""
    for address in (Address(cluster.url("no_such_database")), Address(f"postgresql://u:{PASSWORD}@127.0.0.1:1/d")):
        with pytest.raises(errors.FleetError) as caught, address.connect():
            pass
        assert PASSWORD not in f"{caught.value} {address!r} {caught.value.__cause__}"
        assert caught.value.__suppress_context__


def test_no_error_shows_a_row(base: Base, state_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    """A config may hold secrets, and PostgreSQL quotes a row that it does not take. Nor is psycopg's own log heard."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:

        def is_told(word: str) -> bool:
            return store.fleet_lag is not None and word in store.fleet_lag.error

        store.add_sandbox(sandbox())
        wait_sent(store)
        base.ask("ALTER TABLE limpet.container ADD COLUMN other bigint NOT NULL")
        store.add(metadata("a", token=PASSWORD), RUNNING)
        wait_until(lambda: is_told("violates not-null"), "the row to be refused")
        base.ask("ALTER TABLE limpet.fleet_node RENAME COLUMN as_of TO another")
        wait_until(lambda: is_told("fleet_node has no column as_of"), "the batch to be refused")
        assert store.status("a") == RUNNING
    for word in ("Failing row", PASSWORD, "Pipeline"):
        assert word not in caplog.text


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("ALTER TABLE container_status DROP COLUMN pid", "container_status has no column pid"),
        ("ALTER TABLE container ALTER attempt TYPE text", "container.attempt is text, not bigint"),
        ("ALTER TABLE item DROP CONSTRAINT item_pkey", "item has no unique index of node, kind, key"),
        ("DROP TABLE event", "there is no table event"),
        ("DROP TABLE fleet_version", "fleet_version, which tells of what revision .* was altered"),
        ("DELETE FROM fleet_version", "fleet_version, which tells of what revision .* was altered"),
        ("ALTER TABLE item SET UNLOGGED", "item is UNLOGGED"),
        ("CREATE RULE lose AS ON INSERT TO item DO INSTEAD NOTHING", "item has rule lose"),
        (
            (
                "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
                "CREATE TRIGGER lose BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION lose()"
            ),
            "item has trigger lose",
        ),
    ],
)
def test_what_the_tables_lack_is_told(base: Base, state_dir: str, statement: str, what: str) -> None:
    """To whoever writes, and to whoever looks. Once that is undone, or all is removed, it goes on."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
        base.ask(f"SET search_path = limpet; {statement}")
        base.cut_connections()
        store.put("k", "k", 2)
        wait_until(lambda: store.fleet_lag and re.search(what, store.fleet_lag.error), "it to be told")
        with pytest.raises(errors.FleetError, match=what):
            Fleet.open(base.url)
        base.ask("DROP SCHEMA limpet CASCADE")
        wait_sent(store)
        assert base.ask("SELECT value FROM limpet.item") == [("2",)]


def test_an_index_that_was_dropped_is_told(base: Base, state_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is refused for that. One that is made again as is told, or with settings of its own, is one."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
        assert "index" not in caplog.text
        base.ask("DROP INDEX limpet.container_by_labels, limpet.event_of_one")
        base.ask("ALTER INDEX limpet.container_by_id SET (fillfactor = 80)")
        base.ask(
            "CREATE FUNCTION heed() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER heed AFTER INSERT ON limpet.item FOR EACH ROW EXECUTE FUNCTION heed()"
        )
        base.cut_connections()
        store.put("k", "k", 2)
        wait_sent(store)
        caplog.clear()
        with Fleet.open(base.url) as fleet:
            assert fleet.list(labels={"a": "b"}) == []
        told = [record.getMessage() for record in caplog.records]
        assert [message.partition(" is slow")[0].partition("look for ")[2] for message in told] == [
            "the events of one container",
            "containers by labels",
        ]
        for message in told:
            base.ask(message.partition("dropped: ")[2])
        caplog.clear()
        Fleet.open(base.url).close()
        assert not caplog.records


@pytest.mark.parametrize(
    "statement",
    [
        "DROP FUNCTION labels_of CASCADE",
        (
            "CREATE OR REPLACE FUNCTION labels_of(labels text) RETURNS jsonb LANGUAGE sql IMMUTABLE"
            " AS 'SELECT NULL::jsonb'"
        ),
    ],
)
def test_a_function_that_is_not_ours_hides_no_label(
    base: Base, state_dir: str, caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    """Whoever looks for labels finds them without it, nodes go on, and what to do is told, and right."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a", app="web"), RUNNING)
        store.add(metadata("b", app="shop"), RUNNING)
        wait_sent(store)
        with Fleet.open(base.url) as opened_before:
            assert [one.id for one in opened_before.list(labels={"app": "web"})] == ["a"]
            base.ask(f"SET search_path = limpet; {statement}")
            if "DROP" in statement:
                with pytest.raises(errors.FleetError, match="dropped from the fleet's schema by hand"):
                    opened_before.list(labels={"app": "web"})
        base.cut_connections()
        store.add(metadata("c", app="web"), RUNNING)
        wait_sent(store)
        caplog.clear()
        with Fleet.open(base.url) as fleet:
            assert [one.id for one in fleet.list(labels={"app": "web"})] == ["a", "c"]
        message = next(record.getMessage() for record in caplog.records if "labels_of was" in record.getMessage())
        base.ask(message.partition("altered: ")[2])
        caplog.clear()
        with Fleet.open(base.url) as fleet:
            assert [one.id for one in fleet.list(labels={"app": "web"})] == ["a", "c"]
        assert not caplog.records


def test_an_upgrade_may_take_long(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of a million rows takes longer than any other statement may."""
    base.ask("CREATE FUNCTION linger() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); END'")
    base.ask("CREATE EVENT TRIGGER linger ON ddl_command_end WHEN TAG IN ('CREATE FUNCTION') EXECUTE FUNCTION linger()")
    monkeypatch.setattr(addresses, "STATEMENT_SECONDS", 0.3)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)


def test_a_row_that_was_altered_is_told_and_sent_again(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is dropped and made again has lost its values, while the checksums are as they were."""
    monkeypatch.setattr(batch, "_ROWS_AT_ONCE", 1)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        store.add(metadata("b"), replace(RUNNING, message="\0, \x1a"))
        wait_sent(store)
    assert find_differences(base.url, "n7", f"{state_dir}/store.db") == []
    base.ask(
        "ALTER TABLE limpet.container_status DROP pid, ADD pid bigint NOT NULL DEFAULT 0;"
        "UPDATE limpet.event SET message = 'other' WHERE revision = 2"
    )
    found = find_differences(base.url, "n7", f"{state_dir}/store.db")
    assert [line.partition(";")[0] for line in found] == [
        "event 2: altered in the fleet",
        "container_status ('a',): altered in the fleet",
        "container_status ('b',): altered in the fleet",
    ]
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
    assert find_differences(base.url, "n7", f"{state_dir}/store.db") == []


def test_a_database_of_another_encoding_is_refused(base: Base, state_dir: str) -> None:
    """Before anything is sent: one character that it has not would hold up all that follows."""
    base.ask(f"CREATE DATABASE {base.name}_latin ENCODING LATIN1 TEMPLATE template0")
    url = base.cluster.url(f"{base.name}_latin")
    with Store.open(state_dir, node="n7", fleet=url) as store:
        wait_until(lambda: store.fleet_lag and "LATIN1" in store.fleet_lag.error, "it to be told")
    with pytest.raises(errors.FleetError, match="use UTF8"):
        Fleet.open(url)


def test_the_url_may_name_another_schema(base: Base, state_dir: str) -> None:
    """Two fleets live in one database and know nothing of each other; only a named one can be removed."""
    named = f"{base.url}&schema=other"
    for url, node in ((base.url, "n7"), (named, "n8")):
        with Store.open(f"{state_dir}-{node}", node=node, fleet=url) as store:
            store.put("k", "k", node)
            wait_sent(store)
        with Fleet.open(url) as fleet:
            assert [one.name for one in fleet.nodes()] == [node]
    assert base.ask("SELECT value FROM other.item") == [('"n8"',)]
    with pytest.raises(errors.InvalidInputError, match="schema="):
        remove_tables(base.url)
    remove_tables(named)
    assert base.ask("SELECT nspname FROM pg_namespace WHERE nspname IN ('other', 'limpet')") == [("limpet",)]
    for name in ("a.b", 'a"; DROP SCHEMA limpet; --', "X"):
        with pytest.raises(errors.InvalidInputError, match="small letters"):
            Address(f"{base.url}&schema={name}")
