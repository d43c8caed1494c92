"""What hostile input has broken once, each by itself: the smallest case that shows it."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from limpet.engine import Engine, Store
from limpet.engine.cli import main
from limpet.engine.inspection.check import check_state
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.starters.choices import choose_stop_signal
from limpet.engine.starters.process.accounts import HostAccounts
from limpet.engine.starters.users import Rights, choose_user
from limpet.engine.state.durable import make_directory, remove_tree
from limpet.schema.cri import parse_container_config
from limpet.schema.errors import (
    InvalidInputError,
    LimpetError,
    NotFoundError,
    StartError,
    StateDirectoryError,
    StoreDamagedError,
)
from limpet.schema.image import ImageConfig, ImageName
from limpet.schema.status import ContainerState, Reason
from tests.campaigns.hostile import values
from tests.campaigns.hostile.engines import TRICKS
from tests.campaigns.hostile.oracle import time_limit
from tests.campaigns.hostile.states import make_state

CONFIG = {"metadata": {"name": "web"}, "image": {"image": "host"}, "command": ["true"]}
NO_PATHS = ("a\0b", "\ud800", "a/" * 3000)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed state directory with containers."""
    path = tmp_path_factory.mktemp("template") / "state"
    make_state(str(path))
    return path


@pytest.fixture
def state(template: Path, tmp_path: Path) -> Path:
    """A copy of it, beside a tree that must not change."""
    (tmp_path / "around" / "directory").mkdir(parents=True)
    (tmp_path / "around" / "file").write_text("mine")
    return Path(shutil.copytree(template, tmp_path / "state"))


@pytest.mark.parametrize("bad", NO_PATHS, ids=["NUL", "surrogate", "too long"])
@pytest.mark.parametrize("use", [Engine.open, Store.open, Snapshot.open, check_state])
def test_a_path_that_can_be_none_is_refused(use: Callable[[str], object], bad: str, tmp_path: Path) -> None:
    """A state directory's path with a NUL or a lone surrogate, or too long to be, is refused; nothing is made."""
    with pytest.raises(LimpetError, match="state directory"):
        use(f"{tmp_path}/{bad}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("link", ["", "link"])
def test_a_path_that_json_cannot_hold_is_refused_by_an_engine(tmp_path: Path, link: str) -> None:
    """It opened, and each sandbox and container was refused; records of a runtime's own do not name the path."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    if link:
        (tmp_path / link).symlink_to(odd)
    before = os.listdir(tmp_path)
    with pytest.raises(StateDirectoryError, match=r"/\\udcff.* is not UTF-8"):
        Engine.open(f"{tmp_path}/{link}/state" if link else odd)
    assert os.listdir(tmp_path) == before
    with Store.open(odd) as store:
        assert store.list() == []


def test_a_directory_too_deep_to_be_made_is_not_begun(tmp_path: Path) -> None:
    """make_directory makes a thousand levels, and none of those above a path that is too long."""
    make_directory(f"{tmp_path}/" + "d/" * 1000)
    with pytest.raises(OSError, match="too long"):
        make_directory(f"{tmp_path}/" + "e/" * 3000)
    assert os.listdir(tmp_path) == ["d"]
    remove_tree(f"{tmp_path}/d")  # pytest cannot


ENTRIES = ("lock", "owner.json", "store.db", "store.db-wal", "containers", "images", "images/lock", "images/blobs")
WRONG = ("pipe", "link to a file", "link to a directory", "link to nothing", "socket", "hard link")


@pytest.mark.parametrize(("entry", "trick"), [(entry, trick) for entry in ENTRIES for trick in WRONG])
def test_what_stands_in_the_place_of_an_entry_is_not_used(state: Path, entry: str, trick: str) -> None:
    """A pipe keeps nobody waiting, and a link has nothing written elsewhere: the entry is named, and left alone."""
    around = state.parent / "around"
    TRICKS[trick](state / entry, around)
    before = (around / "file").read_text(), sorted(os.listdir(around))
    with time_limit(30):
        for look in (lambda: Snapshot.open(state).close(), lambda: check_state(state)):
            try:
                look()
            except LimpetError:
                continue
        with pytest.raises(StateDirectoryError, match=entry):
            Engine.open(state)
    assert ((around / "file").read_text(), sorted(os.listdir(around))) == before


def test_a_copy_of_a_state_directory_leaves_the_original_alone(state: Path, template: Path) -> None:
    """What is done in a copy is done there: deleting its sandbox does not remove the original's directory."""
    with Engine.open(state) as engine:
        engine.get_sandbox("other").delete()
    assert not (state / "sandboxes" / "other").exists()
    assert (template / "sandboxes" / "other").is_dir()


def test_strange_file_names_do_not_stop_recovery(state: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """A name that is not UTF-8 among the bundles is swept, reported and shown as JSON."""
    os.mkdir(os.fsencode(state / "containers") + b"/\xff")
    os.mkdir(os.fsencode(state) + b"/\xfe")
    with Engine.open(state) as engine:
        assert [orphan.path for orphan in engine.recovery.orphans] == [f"{state}/containers/\udcff"]
        assert b"udcff" in (engine.store.last_report() or b"")
    os.mkdir(os.fsencode(state / "containers") + b"/\xff")
    for verb in ("check", "recover"):
        with pytest.raises(SystemExit):
            main(["-s", str(state), verb, "-o", "json"])
        msgspec.json.decode(capsysbinary.readouterr().out)


@pytest.mark.parametrize("resources", ["9999", "{", '{"requested":null}'])
def test_a_status_that_does_not_decode_is_that_containers_trouble(state: Path, resources: str) -> None:
    """A row whose checksum is right and whose JSON is wrong makes one container damaged, and stops no other."""
    for key in ("ended", "bad"):
        write(state, "container_status", key, resources=resources)
    with Engine.open(state) as engine:
        assert engine.get("bad").status.reason == Reason.DAMAGED
        assert engine.get("good").state is ContainerState.CREATED
        assert len(engine.list()) == 5
        engine.delete("bad")


def test_a_sandbox_whose_id_is_none_is_that_sandboxs_trouble(state: Path) -> None:
    """A row whose checksum is right and whose id leads elsewhere is damage that check names, and stops nobody."""
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        row = database.execute("SELECT * FROM sandbox WHERE id = 'other'").fetchone()
        checksum = crc32(msgspec.json.encode((row[0], "line\nfeed", *row[2:-1])))
        database.execute("UPDATE sandbox SET id = ?, checksum = ? WHERE id = 'other'", ("line\nfeed", checksum))
    assert any("its metadata does not decode" in each.message for each in check_state(state).problems)
    with Engine.open(state) as engine:
        assert [each.id for each in engine.list_sandboxes()] == ["pod"]
        assert engine.get("good").state is ContainerState.CREATED


@pytest.mark.parametrize("text", ["[", '{"labels":1}', values.DEEP_JSON], ids=["torn", "other", "deep"])
@pytest.mark.parametrize(
    ("table", "key", "column"),
    [
        ("sandbox", "other", "config"),
        ("container", "bad", "config"),
        ("container", "bad", "image_manifest"),
        ("container_status", "bad", "resources"),
    ],
)
def test_json_that_does_not_decode_is_that_records_trouble(
    state: Path, table: str, key: str, column: str, text: str
) -> None:
    """JSON of another program, with a right checksum: check names the record, and an engine goes on without it."""
    write(state, table, key, **{column: text})
    assert [key in each.message for each in check_state(state).problems] == [True]
    with Engine.open(state) as engine:
        assert engine.get("good").state is ContainerState.CREATED
        assert [each.id for each in engine.list_sandboxes()] == (["pod"] if table == "sandbox" else ["pod", "other"])
        if table == "container":
            with pytest.raises(StoreDamagedError, match="does not decode"):
                engine.store.metadata("bad")


def test_labels_that_do_not_decode_match_nothing(state: Path) -> None:
    """A list by labels passes over a container whose labels are damaged."""
    write(state, "container", "bad", labels="[")
    with Engine.open(state) as engine:
        assert [each.id for each in engine.list(labels={"app": "web"})] == ["ended", "good", "new", "released"]


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("container_status", "reason", b""),
        ("container_status", "resources", 0),
        ("container", "log_path", b""),
        ("event", "state", 9),
    ],
)
def test_a_value_of_another_kind_is_damage(state: Path, table: str, column: str, value: object) -> None:
    """An empty BLOB in the place of an empty text, which is one flipped bit away; a state that is none."""
    declared = f"{column} {'INTEGER' if column == 'state' else 'TEXT'}"
    edit_schema(state, table, declared, f"{column} ANY")
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        database.execute(f"UPDATE {table} SET {column} = ? WHERE id = 'good'", (value,))
    edit_schema(state, table, f"{column} ANY", declared)
    assert any("good" in problem.message for problem in check_state(state).problems)
    with Store.open(state) as store:
        assert store.is_damaged("good") == (table == "container_status")
        asks = {"container": store.metadata, "event": store.history}
        for other, ask in asks.items():
            ask("bad")
            with pytest.raises(StoreDamagedError, match="good") if other == table else nullcontext():
                ask("good")


@pytest.mark.parametrize(
    ("table", "column"), [("node", "opened_at"), ("recovery", "at"), ("recovery", "report"), ("event", "message")]
)
def test_a_column_of_another_name_is_found(state: Path, table: str, column: str) -> None:
    """One flipped bit in the schema of a table that nothing was read of yet, and that may be empty."""
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        database.execute("DELETE FROM recovery")
    edit_schema(state, table, f"{column} ", f"{column[:-1]}_ ")
    assert any(column in problem.message for problem in check_state(state).problems)


def test_a_format_that_sqlite_would_not_write_is_found(state: Path) -> None:
    """One flipped bit in the header, and SQLite reads the database, and takes it for read-only."""
    with open(state / "store.db", "r+b") as file:
        file.seek(18)
        file.write(b"\6")
    with pytest.raises(LimpetError, match="limpet check"):
        Store.open(state)
    assert any("read-only" in problem.message for problem in check_state(state).problems)


def edit_schema(state: Path, table: str, old: str, new: str) -> None:
    """Put `new` in the place of the last `old` in a table's definition, past SQLite's own care."""
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        database.execute("PRAGMA writable_schema = 1")
        ((sql,),) = database.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,))
        head, found, tail = sql.rpartition(old)
        assert found, sql
        database.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (head + new + tail, table))


@pytest.mark.parametrize("table", ["node", "recovery"])
def test_a_number_that_cannot_grow_is_damage(state: Path, table: str) -> None:
    """An epoch or a report's number at the end of 64 bits is named as damage."""
    column = {"node": "epoch", "recovery": "number"}[table]
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        database.execute(f"UPDATE {table} SET {column} = 9223372036854775807 WHERE rowid = 1" if table != "node" else
                         f"UPDATE {table} SET {column} = 9223372036854775807")  # fmt: skip
    with pytest.raises(LimpetError, match="9223372036854775807"):
        Engine.open(state)


def write(state: Path, table: str, key: str, **changes: Any) -> None:
    """Write a row as another program might: with a right checksum."""
    with closing(sqlite3.connect(state / "store.db")) as database, database:
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        row = dict(
            zip(columns, database.execute(f"SELECT * FROM {table} WHERE id = ?", (key,)).fetchone(), strict=True)
        )
        row |= changes
        row["checksum"] = crc32(msgspec.json.encode(tuple(row.values())[:-1]))
        marks = ", ".join(f"{column} = ?" for column in columns)
        database.execute(f"UPDATE {table} SET {marks} WHERE id = ?", (*row.values(), key))


@pytest.mark.parametrize("text", ["\udc80", "\0", "x" * 70_000], ids=["surrogate", "NUL", "long"])
def test_ids_that_are_in_no_row(engine: Engine, text: str) -> None:
    """Whatever is asked for is not found, in a message that is not as long as what was asked."""
    for ask in (engine.get, engine.store.get, engine.store.status, engine.store.metadata, engine.get_sandbox):
        with pytest.raises(NotFoundError) as raised:
            ask(text)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("node", ["", "\udc80", "a\0", "x" * 300])
def test_nodes_that_cannot_be_named_are_refused(state_dir: str, node: str) -> None:
    """A node's name is printable, and not too long."""
    with pytest.raises(InvalidInputError, match="node"):
        Store.open(state_dir, node=node)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"process":[]}', b"\xff", b'{"x":' * 5000])
def test_a_damaged_bundle_config_is_refused(engine: Engine, content: bytes) -> None:
    """A config.json that is not what was written is named, and the container can be released all the same."""
    engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
    container = engine.create_container(CONFIG, "pod")
    path = Path(container.metadata.root_dir, "config.json")
    path.write_bytes(content)
    with pytest.raises(StateDirectoryError, match=r"config\.json is damaged"):
        container.start()
    container.release()
    container.delete()


@pytest.mark.parametrize("name", [".limpet.json", "config.json", "log"])
def test_a_pipe_keeps_nobody_waiting(engine: Engine, tmp_path: Path, name: str) -> None:
    """A named pipe in the place of a marker, a config or a log is refused at once."""
    engine.create_sandbox({"metadata": {"name": "pod"}, "log_directory": str(tmp_path)}, id="pod")
    container = engine.create_container({**CONFIG, "log_path": "log"}, "pod", id="web")
    path = tmp_path / name if name == "log" else Path(container.metadata.root_dir, name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with time_limit(30):
        if name == ".limpet.json":
            with pytest.raises(LimpetError, match="not a file"):
                container.release()
        else:
            with pytest.raises((StartError, StateDirectoryError), match=name):
                container.start()


def test_the_hosts_environment_need_not_be_utf8(state_dir: str) -> None:
    """A variable of the engine's own environment that is not UTF-8 stops no container; it is left out."""
    script = (
        "import sys; from limpet.engine import Engine\n"
        f"engine = Engine.open({state_dir!r}); engine.create_sandbox({{'metadata': {{'name': 'pod'}}}}, id='pod')\n"
        f"container = engine.create_container({CONFIG!r}, 'pod'); container.start()\n"
        "print(container.wait(30).exit_code)"
    )
    environment = {**os.environb, b"STRANGE": b"\xff"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


def test_numbers_of_any_length_in_an_image_are_refused() -> None:
    """A stop signal or a user of thousands of digits is refused in words, not by Python's limit for integers."""
    config = parse_container_config(CONFIG)
    for choose, image in (
        (lambda image: choose_stop_signal(config, image), ImageConfig(stop_signal="9" * 5000)),
        (
            lambda image: choose_user(image, config, HostAccounts(), Rights(0, 0, (), has_own_ids=False)),
            ImageConfig(user="9" * 5000),
        ),
    ):
        with pytest.raises(InvalidInputError, match="9999"):
            choose(image)
    with pytest.raises(InvalidInputError, match="image name"):
        ImageName.parse("x" * 2000)


@pytest.mark.parametrize("variables", [{"_LIMPET_COMPLETE": "bash_complete"}, {"_LIMPET_COMPLETE": "zsh_complete"}])
def test_half_a_completion_is_wrong_usage(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The completion's variable alone, which only a shell should set, ends in a message."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["ps"])
    assert ended.value.code == 2
    assert "_LIMPET_COMPLETE" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_one_message() -> None:
    """With a full disk under stdout there is one line, and nothing of Python's own at the end."""
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "limpet", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "limpet: the output cannot be written: No space left on device\n")
