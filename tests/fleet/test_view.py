"""Looking at many nodes at once: each record is found, and of a node that is silent nothing is said to run."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from limpet import Store, errors
from limpet.engine.aio import AsyncFleet
from limpet.engine.fleet import Fleet, find_differences
from limpet.schema.events import EventKind
from limpet.schema.status import ContainerState, Reason, end
from tests.conftest import wait_until
from tests.fleet.conftest import PASSWORD, Base
from tests.fleet.test_shipping import wait_sent, with_extra
from tests.records import RUNNING, metadata, sandbox


def silence(base: Base, node: str, seconds: int) -> None:
    """Let a node have been silent for so long."""
    base.ask(f"UPDATE limpet.fleet_node SET heard_at = heard_at - interval '{seconds} s' WHERE name = %s", node)


def fill(base: Base, state_dir: str, node: str) -> None:
    with Store.open(state_dir, node=node, fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("runs", app="web"), with_extra(node=node))
        store.add(metadata("ended"), end(RUNNING, 3, finished_at=9))
        store.add(metadata(f"only-{node}"))
        wait_sent(store)


def test_a_silent_node_is_not_vouched_for(base: Base, state_dir: str) -> None:
    """What has ended stays ended; what ran is Unknown, and since when, by the database's clock."""
    fill(base, state_dir, "n7")
    with Fleet.open(base.url) as fleet:
        assert fleet.get("runs").status.state is ContainerState.RUNNING
        silence(base, "n7", 40)
        (node,) = fleet.nodes()
        assert not node.is_heard
        assert 40 <= node.silent_seconds < 70
        status = fleet.get("runs").status
        assert (status.state, status.reason) == (ContainerState.UNKNOWN, Reason.NOT_HEARD_OF)
        assert status.message.startswith("was running, not heard of for 4")
        assert fleet.get("ended").status.exit_code == 3
        assert fleet.get("only-n7").status.state is ContainerState.UNKNOWN
        assert not fleet.list(state="running")
        assert fleet.get("runs").checkpoint.state is ContainerState.RUNNING


def test_what_the_node_doubts_is_in_doubt_here_too(base: Base, state_dir: str) -> None:
    """A node that was opened and has not looked yet vouches for nothing that ran."""
    fill(base, state_dir, "n7")
    with Store.open(state_dir, node="n7", fleet=base.url) as store, Fleet.open(base.url) as fleet:
        wait_sent(store)
        assert fleet.get("runs").status.reason == Reason.UNVERIFIED
        store.checkpoint("runs", RUNNING)
        wait_sent(store)
        assert fleet.get("runs").status.state is ContainerState.RUNNING
        store.doubt("runs", (Reason.UNVERIFIED, "could not look"))
        wait_until(lambda: fleet.get("runs").status.message == "could not look", "the doubt to be told")


def test_many_nodes_are_listed_together(base: Base, state_dir: str) -> None:
    """By node, labels, state and name; one id on two nodes wants the node."""
    for node in ("n7", "n8"):
        fill(base, f"{state_dir}-{node}", node)
    with Fleet.open(base.url) as fleet:
        assert [node.name for node in fleet.nodes()] == ["n7", "n8"]
        assert [(one.node, one.id) for one in fleet.list(labels={"app": "web"})] == [("n7", "runs"), ("n8", "runs")]
        assert [one.id for one in fleet.list(node="n8", state="exited")] == ["ended"]
        assert fleet.get("only-n8").node == "n8"
        assert fleet.get("run", node="n7").checkpoint.extra == {"node": "n7"}
        assert fleet.metadata(fleet.get("only-n8")).name == "only-n8"
        with pytest.raises(errors.AmbiguousError, match="runs on n7, runs on n8; give an id and a node"):
            fleet.get("runs")
        with pytest.raises(errors.NotFoundError, match="no node 'n9'; it has: n7, n8"):
            fleet.list(node="n9")
        with pytest.raises(errors.NotFoundError, match="'nothing'"):
            fleet.get("nothing")
        for node in ("n7", "n8"):
            found = [one.event for one in fleet.events(node=node)]
            assert [event.revision for event in found] == [1, 2, 3, 4]
            assert found[0].kind is EventKind.SANDBOX_ADDED


def test_events_are_followed(base: Base, state_dir: str) -> None:
    """Each comes once, in order, as it arrives."""
    seen: list[int] = []
    with Store.open(state_dir, node="n7", fleet=base.url) as store, _open_late(base, store) as fleet:

        def follow() -> None:
            for one in fleet.events(follow=True):
                seen.append(one.event.revision)
                if one.event.revision == 30:
                    return

        thread = threading.Thread(target=follow)
        thread.start()
        for number in range(30):
            store.put("k", f"{number}", number)
        thread.join(30)
    assert seen == list(range(1, 31))


def _open_late(base: Base, store: Store) -> Fleet:
    wait_sent(store)
    return Fleet.open(base.url)


def test_the_command_shows_it(base: Base, state_dir: str) -> None:
    """Each verb as a table and as JSON; the address may come from the environment; no error shows the password."""
    fill(base, state_dir, "n7")

    def run(*arguments: str, url: str = base.url) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "limpet", "fleet", *arguments],
            capture_output=True,
            text=True,
            env={"LIMPET_FLEET": url, "PATH": "/usr/bin:/bin"},
            timeout=60,
            check=False,
        )

    (node,) = json.loads(run("nodes", "-o", "json").stdout)["nodes"]
    assert (node["name"], node["is_heard"], node["containers"]) == ("n7", True, 3)
    assert "n7" in run("nodes").stdout
    shown = {one["id"]: one["state"] for one in json.loads(run("ps", "-a", "-o", "json").stdout)["containers"]}
    assert shown == {"runs": "RUNNING", "ended": "EXITED", "only-n7": "UNKNOWN"}
    assert "ended" not in run("ps").stdout
    assert json.loads(run("inspect", "runs").stdout)["metadata"]["name"] == "runs"
    lines = run("events", "-o", "json").stdout.splitlines()
    assert [json.loads(line)["revision"] for line in lines] == [1, 2, 3, 4]
    assert run("inspect", "nothing").returncode == 3
    failed = run("nodes", url=base.url.replace(base.name, "no_such_database"))
    assert failed.returncode == 1
    assert "no_such_database" in failed.stderr
    assert PASSWORD not in failed.stderr
    assert run("nodes", url="sqlite:///x").returncode == 2


def test_a_database_without_tables_is_told(base: Base) -> None:
    """Looking makes nothing."""
    with pytest.raises(errors.FleetError, match="tables are missing"):
        Fleet.open(base.url)
    with Fleet(base.url) as fleet:
        for _ in range(2):
            with pytest.raises(errors.FleetError, match="tables are missing"):
                fleet.nodes()
    assert base.ask("SELECT count(*) FROM pg_namespace WHERE nspname = 'limpet'") == [(0,)]


def test_what_was_altered_by_hand_is_told(base: Base, state_dir: str) -> None:
    """A node whose doubts cannot be read vouches for nothing; the others' are as they were."""
    fill(base, state_dir, "n7")
    fill(base, f"{state_dir}-8", "n8")
    for text in ("{nonsense", "[1]", '{"runs": 1}'):
        base.ask("UPDATE limpet.fleet_node SET doubts = %s WHERE name = 'n7'", text)
        with Fleet.open(base.url) as fleet:
            assert [node.name for node in fleet.nodes()] == ["n7", "n8"]
            status = fleet.get("runs", node="n7").status
            assert (status.state, status.reason) == (ContainerState.UNKNOWN, Reason.DAMAGED)
            assert "opened again" in status.message
            assert fleet.get("ended", node="n7").status.exit_code == 3
            assert fleet.get("runs", node="n8").status.state is ContainerState.RUNNING


def test_of_many_nodes_some_are_named(base: Base, state_dir: str) -> None:
    """Who asks for a node that is none is not told the names of thousands."""
    fill(base, state_dir, "n7")
    base.ask(
        "INSERT INTO limpet.fleet_node SELECT 'm' || number, epoch, directory, host, pid, path, claimed_at, heard_at,"
        " lease_seconds, as_of, revision, is_whole, doubts FROM limpet.fleet_node, generate_series(1, 2000) AS number"
    )
    with Fleet.open(base.url) as fleet, pytest.raises(errors.NotFoundError, match="and 1,991 more") as told:
        fleet.nodes(node="none")
    assert len(str(told.value)) < 200


def test_it_may_be_kept_open(base: Base, state_dir: str) -> None:
    """What a signal handler raises amid an answer, a connection that was cut, and a fork leave a `Fleet` of use."""

    class StruckError(Exception):
        pass

    def strike(*_: object) -> None:
        raise StruckError

    fill(base, state_dir, "n7")
    fleet = Fleet.open(base.url)
    before = signal.signal(signal.SIGALRM, strike)
    try:
        with base.cluster.connect(base.name) as connection, connection.transaction():
            connection.execute("LOCK TABLE limpet.container")
            with pytest.raises(StruckError):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                fleet.list()
    finally:
        signal.signal(signal.SIGALRM, before)
    expected = [one.id for one in fleet.list()]
    assert expected
    base.cut_connections()
    assert [one.id for one in fleet.list()] == expected
    session = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'limpet' ORDER BY pid"
    wait_until(lambda: len(base.ask(session, base.name)) == 1, "the connections that were cut to be over")
    parents = base.ask(session, base.name)
    child = os.fork()
    if child == 0:
        try:
            is_right = [one.id for one in fleet.list()] == expected
            fleet.close()
        finally:
            os._exit(not is_right)
    assert os.waitpid(child, 0)[1] == 0
    assert [one.id for one in fleet.list()] == expected
    assert base.ask(session, base.name) == parents
    fleet.close()
    fleet.close()
    with pytest.raises(errors.ClosedError):
        fleet.list()


def test_threads_and_loops_share_one(base: Base, state_dir: str) -> None:
    """They take turns: none cuts the connection of another, who would wait for ever; closing waits for who reads."""
    fill(base, state_dir, "n7")
    fleet = Fleet.open(base.url)
    expected = [one.id for one in fleet.list()]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(lambda: [[one.id for one in fleet.list()] for _ in range(25)]) for _ in range(4)]
        assert all(each.result(30) == [expected] * 25 for each in found)
        with base.cluster.connect(base.name) as connection, connection.transaction():
            connection.execute("LOCK TABLE limpet.container")
            reading = pool.submit(fleet.nodes)
            waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
            wait_until(lambda: len(base.ask(waiting, base.name)) == 1, "the read to wait")
            closing = pool.submit(fleet.close)
        assert [one.name for one in reading.result(30)] == ["n7"]
        closing.result(30)
    tasks = AsyncFleet(base.url)

    async def look() -> None:
        assert len(await asyncio.gather(*(tasks.list() for _ in range(5)))) == 5

    for _ in range(2):
        asyncio.run(asyncio.wait_for(look(), 30))
    asyncio.run(tasks.close())


def test_who_follows_goes_on_when_the_database_is_back(base: Base, state_dir: str) -> None:
    """Each event is shown once, and that the database was away is told; who cannot begin is told at once."""
    fill(base, state_dir, "n7")
    command = [sys.executable, "-m", "limpet", "fleet", "events", "--follow", "--fleet", base.url]
    with (
        Store.open(state_dir, node="n7", fleet=base.url) as store,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            shown = [process.stdout.readline() for _ in range(4)]
            with base.cluster.connect("postgres") as connection:
                connection.execute(f"ALTER DATABASE {base.name} ALLOW_CONNECTIONS false")
                cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                connection.execute(cut, (base.name,))
                assert process.stderr is not None
                assert "trying again" in process.stderr.readline()
                connection.execute(f"ALTER DATABASE {base.name} ALLOW_CONNECTIONS true")
            store.put("k", "after", 1)
            shown.append(process.stdout.readline())
            assert [line.split()[1] for line in shown] == ["1", "2", "3", "4", "5"]
            assert "item-put after" in shown[-1]
        finally:
            process.terminate()
    wrong = subprocess.run([*command[:-1], "postgresql+psycopg://localhost:1/x"], capture_output=True, check=False)
    assert wrong.returncode == 1


def test_odd_words_are_looked_for(base: Base, state_dir: str) -> None:
    """What the server cannot hold is found as it was sent, or refused."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_sent(store)
    with Fleet.open(base.url) as fleet:
        for text in ("a\0", "\x1a", "%"):
            assert not fleet.list(name=text)
            assert not fleet.list(labels={"k": text})
            with pytest.raises(errors.NotFoundError):
                fleet.get(text)
            with pytest.raises(errors.NotFoundError):
                fleet.nodes(node=text)
        assert not fleet.list(labels={"k": "\ud800"})
        with pytest.raises(errors.InvalidInputError):
            fleet.get("\ud800")
        with pytest.raises(errors.InvalidInputError):
            fleet.nodes(node="\ud800")
        with pytest.raises(errors.InvalidInputError):
            fleet.list(name="\ud800")


def test_what_cannot_be_looked_for_is_refused(base: Base, state_dir: str) -> None:
    """As what it is, and not as an error of PostgreSQL's."""
    fill(base, state_dir, "n7")
    wrong: Any = 5
    with Fleet.open(base.url) as fleet:
        for ask in (
            lambda: fleet.nodes(node=wrong),
            lambda: fleet.list(node=wrong),
            lambda: fleet.list(name=wrong),
            lambda: fleet.list(labels=wrong),
            lambda: fleet.get(wrong),
            lambda: fleet.get("runs", node=wrong),
            lambda: list(fleet.events(node=wrong)),
            lambda: list(fleet.events(since=wrong)),
            lambda: list(fleet.events(since={"n7": wrong / 2})),
            lambda: find_differences(base.url, wrong, f"{state_dir}/store.db"),
        ):
            with pytest.raises(errors.InvalidInputError):
                ask()


def test_filters_are_looked_up_in_indexes(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in all rows of all nodes; whoever has what the index takes for a NUL is not taken for another."""
    texts = {"one": "a\x01b", "written": "a\\u0000b", "plain": "ab"}
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        for name, text in texts.items():
            store.add(metadata(name, app="web", k=text))
        wait_sent(store)
    plans = []
    with Fleet.open(base.url) as fleet:
        execute = fleet._execute

        def explain(query: str, values: object = None) -> object:
            if "status USING" in query:
                plans.append("\n".join(row[0] for row in execute(f"EXPLAIN {query}", values).fetchall()))
            return execute(query, values)

        monkeypatch.setattr(fleet, "_execute", explain)
        fleet._connect().execute("SET enable_seqscan = off; SET enable_indexscan = off")
        for name, text in texts.items():
            assert [one.id for one in fleet.list(labels={"k": text, "app": "web"})] == [name]
            assert "container_by_labels" in plans[-1]
        base.ask("UPDATE limpet.container SET labels = '{nonsense' WHERE id = 'one'")
        assert [one.id for one in fleet.list(labels={"app": "web"})] == ["plain", "written"]
        assert [one.id for one in fleet.list(name="plain")] == ["plain"]
        assert "container_by_name" in plans[-1]
        plans.clear()
        assert fleet.get("writt").id == "written"
        assert ["container_by_id" in plan for plan in plans] == [True, False, True]


def test_tasks_look_too(base: Base, state_dir: str) -> None:
    """At the same as threads, together; one that is cancelled leaves the others theirs."""
    fill(base, state_dir, "n7")

    async def look() -> None:
        async with AsyncFleet.open(base.url) as fleet:
            with Fleet.open(base.url) as threads:
                listed = threads.list(labels={"app": "web"})
                events = list(threads.events())
            found = await asyncio.gather(*(fleet.list(labels={"app": "web"}) for _ in range(5)))
            assert [one.id for one in found[4]] == [one.id for one in listed] == ["runs"]
            assert [one.name for one in await fleet.nodes()] == ["n7"]
            assert (await fleet.metadata(await fleet.get("runs"))).id == "runs"
            assert [one async for one in fleet.events()] == events
            with pytest.raises(errors.NotFoundError):
                await fleet.get("none")

            async def follow() -> None:
                async for one in fleet.events(since={"n7": len(events)}, follow=True):
                    heard.put_nowait(one.event.id)

            heard: asyncio.Queue[str] = asyncio.Queue()
            following = asyncio.ensure_future(follow())
            with Store.open(state_dir, node="n7", fleet=base.url) as store:
                store.put("k", "told", 1)
                await asyncio.to_thread(wait_sent, store)
            assert await heard.get() == "told"
            following.cancel()
            with base.cluster.connect(base.name) as connection, connection.transaction():
                connection.execute("LOCK TABLE limpet.container")
                waiting = asyncio.ensure_future(fleet.list())
                await asyncio.sleep(0.1)
                waiting.cancel()
            await asyncio.wait([waiting, following])
            assert waiting.cancelled()
            assert heard.empty()
            assert len(await fleet.list()) == 3
        with pytest.raises(errors.ClosedError):
            await fleet.list()

    asyncio.run(asyncio.wait_for(look(), 30))
