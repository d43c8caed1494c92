"""The engine's life that tests/campaigns/interrupts.py interrupts: its public methods, with real processes."""

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress

import pytest
from msgspec.structs import replace

from limpet.engine import Container, Engine
from limpet.engine.lifecycle import runtime
from limpet.schema.errors import KeeperError, UnsupportedError, WaitTimeoutError
from limpet.schema.status import ContainerState, Reason
from tests.campaigns.refused_life import use_impatient_keepers

State = dict[str, str]
"""What containers and sandboxes there are, and what is true of each."""
_ANSWER_SECONDS = 15.0
_SANDBOX = "sandbox jobs"
_PROGRAMS = {"lasting": "exec sleep 3000", "brief": "exit 3", "last": "exec sleep 3000"}
_CREATED, _RUNNING, _NEVER_RAN = "CREATED", "RUNNING", "never ran"
_STOPPED, _BRIEF = "EXITED 143", "EXITED 3"


class EngineLife:
    """An engine opens, runs containers, looks at them in every way, recovers, ends them, and is closed."""

    keeps_unclosed = 40
    strikes = 0

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._engine: Engine | None = None
        self._done: State = {}
        self._maybe: list[State] = []
        """What may be instead: with the change that was being made, or cut short."""
        self._is_forgotten = False

    def live(self) -> None:
        use_impatient_keepers()
        self._engine = engine = Engine.open(self._state_dir)
        config = {"metadata": {"name": "jobs"}}
        self._step({_SANDBOX: "READY"}, lambda: engine.create_sandbox(config, id="jobs"))
        engine.get_or_create_sandbox(config)
        self._run(engine, "lasting")
        self._run(engine, "brief")
        self._look(engine)
        lasting, brief = engine.get("lasting"), engine.get("brief")
        brief.wait(_ANSWER_SECONDS)
        engine.recover()
        with engine.store.transaction() as draft:
            draft.update("lasting", lambda old: replace(old, extra={"n": 1}))
        lasting.renew(time.time_ns() + 3600 * 10**9)
        with suppress(UnsupportedError, KeeperError):
            lasting.pause()
            lasting.resume()
        self._step({"lasting": _STOPPED}, lambda: lasting.stop(5.0))
        brief.release()
        self._step({"brief": ""}, brief.delete)
        self._step({"lasting": ""}, lambda: lasting.remove(force=True))
        engine.prune()
        self._run(engine, "last")
        sandbox = engine.get_sandbox("jobs")
        sandbox.update(lambda old: replace(old, extra={"n": 1}))
        self._step({_SANDBOX: "NOTREADY", "last": _STOPPED}, lambda: sandbox.stop(5.0), {_SANDBOX: "NOTREADY"})
        gone = {_SANDBOX: "", "last": ""}
        self._step(gone, lambda: sandbox.remove(force=True), {"last": ""})
        engine.close()

    def _run(self, engine: Engine, key: str) -> None:
        command = ["sh", "-c", f"echo said; {_PROGRAMS[key]}"]
        config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": command, "log_path": f"{key}.log"}
        self._step({key: _CREATED}, lambda: engine.create_container(config, "jobs", id=key))
        then = _BRIEF if key == "brief" else _RUNNING
        self._step({key: then}, engine.get(key).start, {key: _NEVER_RAN})

    @staticmethod
    def _look(engine: Engine) -> None:
        """Ask for everything that changes nothing."""
        lasting = engine.get("lasting")
        assert {one.id for one in engine.list(sandbox_id="jobs")} == {"lasting", "brief"}
        assert [one.id for one in engine.list_sandboxes()] == ["jobs"]
        lasting.cri_status()
        engine.get_sandbox("jobs").cri_status()
        engine.history("lasting")
        list(lasting.read_log())
        with suppress(WaitTimeoutError):
            lasting.wait(0.001)
        with suppress(UnsupportedError):
            lasting.execute(["true"])
        with suppress(UnsupportedError):
            lasting.measure()
        with suppress(UnsupportedError):
            lasting.reopen_log()
        with engine.exclusive("lasting"):
            pass

    def leave(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def forget(self) -> None:
        with open(f"{self._state_dir}.notes", "w", encoding="utf-8") as file:
            json.dump([self._done, self._maybe], file)
        self._engine = None
        gc.collect()

    def read_notes(self) -> None:
        """Take over what a life in another process had acknowledged."""
        with open(f"{self._state_dir}.notes", encoding="utf-8") as file:
            self._done, self._maybe = json.load(file)
        self._is_forgotten = True

    def find_lies(self) -> Iterator[str]:
        use_impatient_keepers()
        self._engine = None
        with Engine.open(self._state_dir) as engine:
            found = {one.id: self._tell(one) for one in engine.list()}
            found |= {f"sandbox {one.id}": one.state.name for one in engine.list_sandboxes()}
            if found not in [self._done, *self._maybe]:
                yield f"{found} is there, {self._done} was acknowledged (or {self._maybe})"
            end_all(engine)
            engine.create_sandbox({"metadata": {"name": "next"}}, id="next")
            config = {"metadata": {"name": "next"}, "image": {"image": "host"}, "command": ["true"]}
            following = engine.create_container(config, "next", id="next")
            following.start()
            if following.wait(_ANSWER_SECONDS).exit_code:
                yield f"the next container: {following.status}"
            end_all(engine)
        yield from self.find_left()

    def find_left(self) -> Iterator[str]:
        """Yield what is left of processes in the state directory, after a while in which they end."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while left := _find_processes(self._state_dir):
            if time.monotonic() > deadline:
                yield f"processes are left: {left}"
                return
            time.sleep(0.005)

    def _tell(self, container: Container) -> str:
        """Say what is true of a container, after a while in which what is under way comes to its end."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        is_to_end = container.id == "brief" or container.status.stop_requested_at
        while is_to_end and container.state is ContainerState.RUNNING and time.monotonic() < deadline:
            time.sleep(0.005)
        status = container.status
        if status.state is ContainerState.EXITED:
            return _NEVER_RAN if status.reason == Reason.START_ERROR else f"EXITED {status.exit_code}"
        is_cut = self._is_forgotten or self.strikes > 1  # nobody waits for the step, and the close comes amid it
        if status.state is ContainerState.UNKNOWN and not status.created_at and is_cut:
            return _CREATED  # it can be created again, or deleted
        if status.state is ContainerState.RUNNING and not runs(status.pid):
            return f"RUNNING, and process {status.pid} does not"
        return status.state.name

    def _step(self, then: State, call: Callable[[], object], *others: State) -> None:
        """Change something, and note what is true then; `others` may be where it was cut short."""
        self._maybe = [_merge(self._done, change) for change in (then, *others)]
        call()
        self._done = self._maybe[0]


def _merge(state: State, change: State) -> State:
    """Return a state with a change; what is nothing then is left out."""
    return {key: value for key, value in (state | change).items() if value}


def end_all(engine: Engine) -> None:
    """Remove all that an engine has."""
    for container in engine.list():
        container.remove(force=True, timeout=0)
    for sandbox in engine.list_sandboxes():
        sandbox.remove(force=True, timeout=0)


def find_false_run(container: Container) -> Iterator[str]:
    """Yield that it is RUNNING, though its process does not run, and has not for a while in which that is noticed."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while container.state is ContainerState.RUNNING and not runs(container.status.pid):
        if time.monotonic() > deadline:
            yield f"{container.id} is RUNNING, and process {container.status.pid} does not"
            return
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Return whether there is such a process, and it has not ended."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}
    return False


def end_processes(directory: str) -> None:
    """Kill what a trial that found something has left in its state directory."""
    for _ in range(3):  # the anchor becomes the keeper
        for pid in _find_processes(directory):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _find_processes(state_dir: str) -> dict[int, str]:
    """Return what works in a state directory, keepers and containers, without this process."""
    prefix = f"{os.path.realpath(state_dir)}/"
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        for link in (f"/proc/{name}/cwd", f"/proc/{name}/fd/3"):
            with suppress(OSError):
                if os.readlink(link).startswith(prefix) and int(name) != os.getpid():
                    found[int(name)] = link
    return found


@contextmanager
def _cut_steps() -> Iterator[None]:
    """An engine whose steps are done by the main thread itself, where an interrupt cuts them in two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "run_whole", lambda step, _=None: step())
        yield


LIVES: Mapping[str, Callable[[str], EngineLife]] = {"engine": EngineLife}
CONTROLS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {"cut-steps": _cut_steps}
