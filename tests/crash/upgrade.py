"""The life of a saved state directory that today's code opens, which upgrades it: killed and cut off on the way."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from limpet.engine.drill.records import RUNNING, SANDBOX, make_metadata
from limpet.engine.state.durable import sync_directory
from limpet.engine.store import Store
from limpet.testing import Violation
from tests.upgrade.saved import expected, read, unpack


class Upgrade:
    """Opened, which migrates it; one container more; opened again. Nothing that was there before may change."""

    def __init__(self, name: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            state_dir = unpack(name, directory)
            self._files = {path.name: path.read_bytes() for path in Path(state_dir).iterdir() if path.is_file()}
            # What today's code reads of it without any crash, from before the container is added.
            self._nodes = [each["node"] for each in expected(name)]
            self._said = read(state_dir, self._nodes)

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        self._put_old_state(f"{directory}/state")
        acknowledge(b"old")
        with Store.open(f"{directory}/state") as store:
            acknowledge(b"open")
            store.add_sandbox(SANDBOX)
            store.add(make_metadata("added"), RUNNING)
            acknowledge(b"added")
        Store.open(f"{directory}/state").close()

    def _put_old_state(self, path: str) -> None:
        """Put all files there at once, and durably: what is tried is what comes after."""
        os.mkdir(f"{path}.new", 0o700)
        for name, content in self._files.items():
            descriptor = os.open(f"{path}.new/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                left = content
                while left:
                    left = left[file.write(left) :]
                os.fsync(descriptor)
        sync_directory(f"{path}.new")
        os.rename(f"{path}.new", path)
        sync_directory(os.path.dirname(path))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        shutil.rmtree(f"{directory}/state.new", ignore_errors=True)
        if not os.path.exists(f"{directory}/state"):
            if acknowledged:
                raise Violation("lost", "the state directory is gone")
            return
        with suppress(FileNotFoundError):
            os.unlink(f"{directory}/state/directory.json")  # a copy is marked as one, which is another test's
        for _ in range(2):
            said = read(f"{directory}/state", self._nodes)
            for each in said:
                added = each["containers"].pop("added", None)
                each["sandboxes"].pop(SANDBOX.id, None)
                if added is not None and added["checkpoint"]["pid"] != RUNNING.pid:
                    raise Violation("torn", "the added container is not what was written")
                if added is None and b"added" in acknowledged and each["node"] == self._nodes[0]:
                    raise Violation("lost", "the added container is gone")
            if said != self._said:
                raise Violation("lost", "what was there before the upgrade is not what it was")
