"""A primary that is lost while nodes write in sync mode: what was acknowledged is on the standby that is promoted."""

import signal
import threading
from pathlib import Path

import pytest

from limpet import Store, errors
from tests.conftest import wait_until
from tests.fleet.conftest import Base, running_cluster
from tests.fleet.pair import standby_of

NODES = 8


class Writer:
    """A node whose thread writes numbers, one after another, and notes which were acknowledged."""

    def __init__(self, url: str, state_dir: str, number: int) -> None:
        self.node = f"n{number}"
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        self._stop = threading.Event()
        self._store = Store.open(state_dir, node=self.node, fleet=url, fleet_ack="sync", fleet_timeout=60)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                self._store.put("k", f"{number:06}", number)
                self.acknowledged.append(number)
            except errors.FleetUnknownError:
                self.unknown.append(number)
            number += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(90)
        self._store.close()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("blow", [signal.SIGQUIT, signal.SIGKILL])
def test_the_primary_is_lost(tmp_path: Path, blow: signal.Signals) -> None:
    """Eight nodes write; the primary ends, the standby is promoted; nothing acknowledged is missing, all go on."""
    with running_cluster() as primary, standby_of(primary) as standby:
        base = Base(primary)
        url = (
            f"postgresql+psycopg://limpet@/{base.name}?host={primary.directory},{standby.directory}"
            "&target_session_attrs=read-write&connect_timeout=2"
        )
        writers = [Writer(url, str(tmp_path / f"n{number}"), number) for number in range(NODES)]
        try:
            wait_until(lambda: all(len(writer.acknowledged) > 20 for writer in writers), "all to write")
            primary.end(blow)
            before = [len(writer.acknowledged) for writer in writers]
            standby.promote()
            base.cluster = standby
            found = {
                writer.node: {row[0] for row in base.ask("SELECT key FROM limpet.item WHERE node = %s", writer.node)}
                for writer in writers
            }
            for writer, count in zip(writers, before, strict=True):
                assert found[writer.node] >= {f"{number:06}" for number in writer.acknowledged[:count]}
            wait_until(
                lambda: all(
                    len(writer.acknowledged) > count + 20 for writer, count in zip(writers, before, strict=True)
                ),
                "all to go on with the standby",
            )
        finally:
            for writer in writers:
                writer.stop()
        for writer in writers:
            assert not writer.unknown
            keys = [row[0] for row in base.ask("SELECT key FROM limpet.item WHERE node = %s ORDER BY key", writer.node)]
            assert keys == [f"{number:06}" for number in writer.acknowledged]
            revisions = base.ask("SELECT revision FROM limpet.event WHERE node = %s ORDER BY revision", writer.node)
            assert [row[0] for row in revisions] == list(range(1, len(keys) + 1))
