"""Worlds with an open engine: hostile configs, ids and names, log paths, and bundles spoilt on disk."""

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from limpet.engine import Container, Engine, Store
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.cri import ContainerConfig, ContainerMetadata, ImageSpec
from limpet.schema.errors import LimpetError
from limpet.schema.image import ImageManifest, ImageName, MountType
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status
from tests.campaigns.hostile import values
from tests.campaigns.hostile.canary import differences, make_canary, photograph
from tests.campaigns.hostile.oracle import Attempt

CONFIG: dict[str, Any] = {
    "metadata": {"name": "web", "attempt": 1},
    "image": {"image": "host", "annotations": {"a": "b"}},
    "command": ["true"],
    "args": ["x"],
    "working_dir": "/",
    "envs": [{"key": "A", "value": "b"}],
    "mounts": [{"container_path": "/data", "host_path": "/tmp", "readonly": True, "propagation": 1}],
    "devices": [{"container_path": "/dev/x", "host_path": "/dev/null", "permissions": "r"}],
    "labels": {"app": "web"},
    "annotations": {"k": "v"},
    "log_path": "web/0.log",
    "stdin": False,
    "tty": False,
    "linux": {
        "resources": {
            "cpu_period": "100000",
            "cpu_shares": 512,
            "memory_limit_in_bytes": 1 << 26,
            "oom_score_adj": 10,
            "cpuset_cpus": "0",
            "hugepage_limits": [{"page_size": "2MB", "limit": "1"}],
            "unified": {"memory.high": "max"},
        },
        "security_context": {
            "privileged": False,
            "run_as_user": {"value": 0},
            "run_as_group": {"value": 0},
            "supplemental_groups": [1],
            "namespace_options": {"pid": "NODE"},
            "seccomp": {"profile_type": "Unconfined"},
        },
    },
    "stop_signal": "SIGTERM",
}
SANDBOX: dict[str, Any] = {
    "metadata": {"name": "pod", "uid": "u", "namespace": "default", "attempt": 0},
    "hostname": "h",
    "dns_config": {"servers": ["10.0.0.1"], "searches": ["x"]},
    "port_mappings": [{"protocol": "TCP", "container_port": 80, "host_port": 8080}],
    "labels": {"a": "b"},
    "annotations": {"c": "d"},
    "linux": {"cgroup_parent": "/x", "sysctls": {"net.core.somaxconn": "1"}},
}
_PLAIN = {"metadata": {"name": "plain"}, "image": {"image": "host"}, "command": ["true"]}


class EngineWorld:
    """An engine on a state directory of its own, with a container that must go on working, and a tree around."""

    def __init__(self, place: Path) -> None:
        self.place = place
        make_canary(place)
        self.state_dir = str(place / "state")
        self.engine = Engine.open(self.state_dir)
        self.sandbox = self.engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
        self.engine.create_container(_PLAIN, "pod", id="good")
        self._kept = {"good"}, {"pod"}
        self._around = self._photograph()

    def _photograph(self) -> dict[str, Any]:
        return photograph(self.place, apart_from=frozenset({"state", "logs", "out"}))

    def inspect(self) -> str:
        """The engine still makes and reads containers, and the tree is as it was."""
        self._remove_what_came()
        status = self.engine.store.update("good", lambda old: msgspec.structs.replace(old, message="seen"))
        if status.message != "seen" or self.engine.get("goo").state.name != "CREATED":
            return "the good container is not what it was"
        return differences(self._around, self._photograph())

    def _remove_what_came(self) -> None:
        for record in self.engine.store.list():
            if record.id not in self._kept[0]:
                remove(self.engine.get(record.id))
        for sandbox in self.engine.list_sandboxes():
            if sandbox.id not in self._kept[1]:
                sandbox.delete()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


def remove(container: Container) -> None:
    """Stop, release and delete a container, whatever it is by now."""
    if container.status.unknown or container.status.pid:
        container.stop(0.5)
    container.release()
    container.delete()


class ConfigWorld(EngineWorld):
    """Configs of containers and sandboxes: JSON text, bytes, mappings."""

    def draw(self, random: Random) -> Attempt:
        is_sandbox = random.random() < 0.25
        config = SANDBOX if is_sandbox else CONFIG
        spoilt = values.spoil_json(random, config)[0]
        for _ in range(random.choice((0, 0, 0, 1, 3))):
            spoilt = values.spoil_json(random, spoilt)[0]
        given: Any = spoilt
        if not isinstance(spoilt, dict) or random.random() < 0.6:
            given = values.to_json(random, spoilt)
            if random.random() < 0.2:
                given = given.decode("latin-1")
        shown = f"{'sandbox' if is_sandbox else 'container'} config {given!r:.700}"
        if is_sandbox:
            return Attempt(shown, lambda: self.engine.create_sandbox(given))
        return Attempt(shown, lambda: self.engine.create_container(given, "pod"))


class NameWorld(EngineWorld):
    """Ids, names, prefixes, labels, image names and nodes, given to every call that takes one."""

    def draw(self, random: Random) -> Attempt:
        given, other = values.text(random), values.text(random)
        verb = random.choice(sorted(self._verbs()))
        named = (given[:20], repr(given)[1:20].rstrip("'\""), repr(given[:20])[1:-1]) if verb in _NAMED else ()
        return Attempt(f"{verb}({given!r:.300}, {other!r:.300})", lambda: self._verbs()[verb](given, other), named)

    def _verbs(self) -> dict[str, Any]:
        engine, store = self.engine, self.engine.store
        return {
            "create_container": lambda a, b: engine.create_container(
                {**_PLAIN, "metadata": {"name": "x"}}, "pod", id=a
            ),
            "create_container in": lambda a, b: engine.create_container(_PLAIN, a),
            "create_container named": lambda a, b: engine.create_container({**_PLAIN, "metadata": {"name": a}}, "pod"),
            "create_container of": lambda a, b: engine.create_container({**_PLAIN, "image": {"image": a}}, "pod"),
            "create_sandbox": lambda a, b: engine.create_sandbox({"metadata": {"name": "x"}}, id=a),
            "create_sandbox named": lambda a, b: engine.create_sandbox({"metadata": {"name": a}}),
            "get": lambda a, b: engine.get(a),
            "list": lambda a, b: engine.list(id=a, name=b),
            "list sandbox": lambda a, b: engine.list(sandbox_id=a, labels={b: a}),
            "delete": lambda a, b: engine.delete(a),
            "get_sandbox": lambda a, b: engine.get_sandbox(a),
            "store.get": lambda a, b: store.get(a),
            "store.status": lambda a, b: store.status(a),
            "store.metadata": lambda a, b: store.metadata(a),
            "store.history": lambda a, b: store.history(a),
            "store.delete": lambda a, b: store.delete(a),
            "store.delete_sandbox": lambda a, b: store.delete_sandbox(a),
            "store.checkpoint": lambda a, b: store.checkpoint(a, Status(message=b)),
            "store.checkpoint message": lambda a, b: store.checkpoint(
                "good", Status(created_at=1, message=a, reason=b)
            ),
            "store.add": lambda a, b: store.add(_metadata(a, b)),
            "store.add to": lambda a, b: store.add(_metadata("made", a)),
            "store.unsettled": lambda a, b: store.unsettled([a, b]),
            "images.parse": lambda a, b: engine.images.manifest(ImageName.parse(a)),
            "images.check": lambda a, b: engine.images.check(ImageName(a[:99], b[:99])),
            "images.remove": lambda a, b: engine.images.remove(ImageName(a[:99], b[:99])),
            "images.load": lambda a, b: engine.images.load(str(self.place / "around") + "/" + a),
            "images.mount": lambda a, b: engine.images.mount(ImageName("host"), MountType.PLAIN, self._inside(a)),
            "images.unmount": lambda a, b: engine.images.unmount(self._inside(a)),
            "snapshot": self._look,
            "node": lambda a, b: Store.open(str(self.place / "state" / "quarantine" / "other"), node=a).close(),
            "state_dir": lambda a, b: Engine.open(self._inside(a)).close(),
            "back_up": lambda a, b: store.back_up(self._inside(a)),
        }

    def _inside(self, name: str) -> str:
        """Return a path that an operator might mistype, under a directory of our own."""
        return f"{self.place}/out/{name.replace('..', '__')}"

    def _look(self, given: str, other: str) -> None:
        with Snapshot.open(self.state_dir) as snapshot:
            for look in (snapshot.get, snapshot.sandbox, snapshot.metadata, snapshot.history):
                with suppress(LimpetError):
                    look(given)
            snapshot.list(id=given, name=other, sandbox_id=other, labels={given: other})

    def inspect(self) -> str:
        shutil.rmtree(self.place / "out", ignore_errors=True)
        self.engine.store.delete("made") if "made" in self.engine.store else None
        return super().inspect()


_NAMED = {"create_container", "create_sandbox", "get", "get_sandbox", "store.get", "store.status", "store.metadata"}


def _metadata(container_id: str, sandbox_id: str) -> Metadata:
    config = ContainerConfig(metadata=ContainerMetadata(name="made"), image=ImageSpec(image="host"))
    manifest = ImageManifest(name=ImageName("host"))
    return Metadata(id=container_id, name="made", sandbox_id=sandbox_id, config=config, image_manifest=manifest)


class PathWorld(EngineWorld):
    """Log directories, log paths, working directories, environments, users: created, and some started."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._logs = place / "logs"

    def _prepare(self) -> None:
        shutil.rmtree(self._logs, ignore_errors=True)
        self._logs.mkdir()
        for name, target in (("out", "../around"), ("file", "../around/file"), ("loop", "loop"), ("gone", "nowhere")):
            (self._logs / name).symlink_to(target)
        (self._logs / "directory").mkdir()
        (self._logs / "plain").write_bytes(b"")
        os.mkfifo(self._logs / "pipe")
        _bind_socket(self._logs, "socket")

    def draw(self, random: Random) -> Attempt:
        names = ("out", "file", "loop", "gone", "directory", "plain", "pipe", "socket", "new", "..", ".", "out/..")
        log_path = random.choice((*names, values.text(random), f"{random.choice(names)}/{random.choice(names)}"))
        log_path = random.choice((log_path, f"{log_path}/{values.text(random)}", f"./{log_path}"))
        logs = str(self._logs / random.choice(("", "", "directory", "new", "file", "loop", "gone", "pipe", "plain")))
        config = {
            "metadata": {"name": "web"},
            "image": {"image": "host"},
            "command": [random.choice(("true", "true", "/bin/true", values.text(random)[:3000]))],
            "log_path": log_path,
        }
        if random.random() < 0.3:
            config["working_dir"] = values.text(random)
        if random.random() < 0.3:
            config["envs"] = [{"key": values.text(random), "value": values.text(random)}]  # type: ignore[list-item]
        if random.random() < 0.2:
            user = {"run_as_user": {"value": random.choice(values.NUMBERS)}, "run_as_group": {"value": 0}}
            config["linux"] = {"security_context": user}
        starts = random.random() < 0.15
        shown = f"log_directory {logs[len(str(self.place)) :]!r}, {'started, ' if starts else ''}config {config!r:.700}"
        return Attempt(shown, lambda: self._run(config, logs, starts=starts))

    def _run(self, config: dict[str, Any], logs: str, *, starts: bool) -> None:
        self._prepare()
        sandbox = self.engine.create_sandbox({"metadata": {"name": "logs"}, "log_directory": logs})
        container = self.engine.create_container(config, sandbox.id)
        if starts:
            container.start()
            container.stop(5)


def _bind_socket(directory: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{descriptor}/{name}")  # the path of a socket may not be long
        finally:
            os.close(descriptor)


class BundleWorld(EngineWorld):
    """Markers and config.json of bundles, spoilt on disk before the container is started, released, recovered."""

    _NAMES = (".limpet.json", "config.json")

    def draw(self, random: Random) -> Attempt:
        name = random.choice(self._NAMES)
        trick = random.choice(("bytes", "bytes", "json", "json", "json", *TRICKS))
        verbs = random.sample(("start", "stop", "release", "delete", "recover", "create"), random.randrange(1, 4))
        seed = random.randrange(1 << 32)
        shown = f"{name}: {trick} ({seed}), then {', '.join(verbs)}"
        return Attempt(shown, lambda: self._run(name, trick, verbs, Random(seed)))

    def _run(self, name: str, trick: str, verbs: list[str], random: Random) -> None:
        container = self.engine.create_container(_PLAIN | {"metadata": {"name": "spoilt"}}, "pod", id="spoilt")
        path = Path(self.state_dir, "containers", "spoilt", name)
        before = path.read_bytes()
        if trick in TRICKS:
            TRICKS[trick](path, self.place / "around")
        elif trick == "bytes":
            path.write_bytes(values.spoil_bytes(random, before))
        else:
            path.write_bytes(values.to_json(random, values.spoil_json(random, json.loads(before))[0]))
        refused: LimpetError | None = None
        for verb in verbs:
            try:
                self.engine.recover() if verb == "recover" else getattr(container, verb)()
            except LimpetError as error:
                refused = error
        self._mend(container, path, before)
        if refused:
            raise refused

    def _mend(self, container: Container, path: Path, before: bytes) -> None:
        """Put a good bundle back, as an operator would move a strange one away, so that all can be removed."""
        if container.id not in self.engine.store:
            shutil.rmtree(path.parent, ignore_errors=True)
            return
        if path.parent.is_dir() and not path.parent.is_symlink():
            clear(path)
            marker = {"limpet": "container", "id": "spoilt", "node": "local"}
            (path.parent / ".limpet.json").unlink(missing_ok=True)
            (path.parent / ".limpet.json").write_text(json.dumps(marker))
            (path.parent / "config.json").unlink(missing_ok=True)
            (path.parent / "config.json").write_bytes(before)
        self.engine.recover()

    def inspect(self) -> str:
        shutil.rmtree(Path(self.state_dir, "quarantine"), ignore_errors=True)
        return super().inspect()


def clear(path: Path) -> None:
    """Remove whatever is at `path`; nothing is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _huge(path: Path, _: Path) -> None:
    clear(path)
    with path.open("wb") as file:
        file.truncate(320 << 20)


def _into(make: Any) -> Any:
    def trick(path: Path, around: Path) -> None:
        clear(path)
        make(path, around)

    return trick


TRICKS: dict[str, Any] = {
    "gone": _into(lambda path, around: None),
    "empty file": _into(lambda path, around: path.write_bytes(b"")),
    "noise": _into(lambda path, around: path.write_bytes(bytes(range(256)) * 40)),
    "huge": _huge,
    "directory": _into(lambda path, around: path.mkdir()),
    "full directory": _into(lambda path, around: (path / "x" / "y").mkdir(parents=True)),
    "link to a file": _into(lambda path, around: path.symlink_to(around / "file")),
    "link to a directory": _into(lambda path, around: path.symlink_to(around / "directory")),
    "link to nothing": _into(lambda path, around: path.symlink_to(around / "nowhere")),
    "link to itself": _into(lambda path, around: path.symlink_to(path.name)),
    "link to a device": _into(lambda path, around: path.symlink_to("/dev/zero")),
    "hard link": _into(lambda path, around: path.hardlink_to(around / "file")),
    "pipe": _into(lambda path, around: os.mkfifo(path)),
    "socket": _into(lambda path, around: _bind_socket(path.parent, path.name)),
}
"""What may stand in the place of a file or a directory: each takes the path, and the tree that must not change."""
