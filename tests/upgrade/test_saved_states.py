"""A state directory of every revision opens with today's code: same records, and nothing newly damaged."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from limpet import Store, errors, recover
from limpet.engine.inspection.check import find_store_damage
from limpet.schema import Reason
from limpet.schema.revision import SCHEMA_REVISION
from tests.upgrade.saved import NAMES, expected, find_differences, unpack


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_nothing_newly_damaged(name: str, tmp_path: Path) -> None:
    """What each revision's own code read is what today's code reads, damage included, and once more after that."""
    state_dir = unpack(name, str(tmp_path))
    assert find_differences(name, state_dir) == []
    assert find_differences(name, state_dir) == []


@pytest.mark.parametrize("name", NAMES)
def test_recovery_reaches_a_verdict_on_each(name: str, tmp_path: Path) -> None:
    """What ran was of another boot; what is damaged stays Unknown; one damaged record never stops the others."""
    state_dir = unpack(name, str(tmp_path))
    nodes = expected(name)
    for said in nodes:
        with Store.open(state_dir, node=said["node"]) as store:
            verdicts = {finding.id: finding.rule for finding in recover(store).findings}
            for key, container in said["containers"].items():
                checkpoint = container["checkpoint"]
                if container["damaged"]:
                    assert verdicts.get(key, "damaged") == "damaged"  # one that has ended is not looked at
                    assert store.status(key).reason == Reason.DAMAGED
                elif checkpoint["identity"] and not checkpoint["finished_at"] and not checkpoint["released"]:
                    assert verdicts[key] == "rebooted"
                    assert store.status(key).exit_code == 255


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(SCHEMA_REVISION)])
def test_the_database_was_copied_before(name: str, tmp_path: Path) -> None:
    """The backup made before the upgrade is of the old revision, also where records were damaged."""
    state_dir = unpack(name, str(tmp_path))
    Store.open(state_dir).close()
    (backup,) = Path(state_dir, "backups").iterdir()
    with closing(sqlite3.connect(backup)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == (name[:4],)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-killed")])
def test_damaged_rows_keep_their_bytes(name: str, tmp_path: Path) -> None:
    """A row that does not verify is copied as it is: also text that is not UTF-8, and its wrong checksum."""
    state_dir = unpack(name, str(tmp_path))
    query = (
        "SELECT id, CAST(log_path AS BLOB), checksum FROM container WHERE id IN ('metadata-not-utf8', 'metadata-sum')"
    )
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        before = raw.execute(query).fetchall()
    Store.open(state_dir).close()
    with closing(sqlite3.connect(f"{state_dir}/store.db")) as raw:
        assert raw.execute(query).fetchall() == before
        assert len(before) == 2
    assert find_store_damage(state_dir)
    assert os.listdir(f"{state_dir}/backups") or name.startswith(SCHEMA_REVISION)


def test_every_revision_has_saved_states() -> None:
    """Whoever adds a revision saves states of it: one that was closed, and one whose writer was killed."""
    revisions = {
        path.name.split("_")[0]
        for path in Path(__file__).parents[2].joinpath("schema/migrations/versions").glob("[0-9]*.py")
    }
    assert {*revisions} | {f"{revision}-killed" for revision in revisions} == set(NAMES)


def test_no_upgrade_without_a_copy_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old damage is copied and upgraded; a copy that cannot be checked for another reason stops the upgrade."""
    state_dir = unpack("0002", str(tmp_path))
    before = Path(state_dir, "store.db").read_bytes()

    def fail(_: sqlite3.Connection) -> list[str]:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("limpet.engine.database.sqlite.reader.find_damage", fail)
        with pytest.raises(errors.StoreError, match="disk I/O error"):
            Store.open(state_dir)
    assert Path(state_dir, "store.db").read_bytes() == before
    assert os.listdir(f"{state_dir}/backups") == []
    assert find_differences("0002", state_dir) == []
