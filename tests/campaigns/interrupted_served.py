"""The lives of engines whose threads do what others wait for: tests/campaigns/interrupts.py strikes them.

In one a container is restarted by its policy, another expires, a third is stopped by a command. All of that must come,
whatever strikes; the next engine does what this one has left. In the other, tasks share an engine's threads, and each
has an answer; for interrupts, since asyncio itself forgets to wake a task whose future it has no memory to tell of.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping

from limpet.engine import AsyncEngine, AsyncSandbox, Container, Engine
from limpet.engine.control import NoEngineError, ask_live
from limpet.engine.control.requests import Info, Stop
from limpet.schema.errors import EngineGoneError, LimpetError
from limpet.schema.status import ContainerState
from tests.campaigns.interrupted_engine import EngineLife, end_all, find_false_run
from tests.campaigns.refused_life import use_impatient_keepers

_COMES_SECONDS = 8.0
_EXPIRES_SECONDS = 0.2
_TRIES = 3
_CREW = 3


class ServedLife(EngineLife):
    """An engine opens, restarts one container, ends another in time, is asked to stop a third, and is closed."""

    keeps_unclosed = 40

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self._wrong: list[str] = []

    def live(self) -> None:
        use_impatient_keepers()
        self._engine = engine = Engine.open(self._state_dir)
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        self._start(engine, "again", "exit 3", restart="on-failure:1")
        due = time.time_ns() + int(_EXPIRES_SECONDS * 1e9)
        self._start(engine, "passing", "exec sleep 3000", expires_at=due)
        self._start(engine, "lasting", "exec sleep 3000")
        self._await(lambda: _count_ends(engine, "again") == 2, "the second attempt")
        self._await(lambda: engine.get("passing").status.released, "the expiry")
        self._ask()
        engine.close()

    @staticmethod
    def _start(engine: Engine, key: str, script: str, **fields: object) -> None:
        config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": ["sh", "-c", script]}
        engine.create_container(config, "jobs", id=key, **fields).start()  # type: ignore[arg-type]

    def _await(self, has_come: Callable[[], bool], what: str) -> None:
        """Note it if what nobody calls for does not come."""
        deadline = time.monotonic() + _COMES_SECONDS
        while not has_come():
            if time.monotonic() > deadline:
                self._wrong.append(f"{what} has not come")
                return
            time.sleep(0.005)

    def _ask(self) -> None:
        """Ask as a command does: whoever sees an engine go asks again."""
        for _ in range(_TRIES):
            try:
                assert ask_live(self._state_dir, Info(), silence=_COMES_SECONDS).pid == os.getpid()
                (done,) = ask_live(self._state_dir, Stop(id="lasting", timeout=5), silence=_COMES_SECONDS)
            except (EngineGoneError, NoEngineError):
                continue
            except LimpetError as error:
                if "MemoryError" in str(error):  # that is told, and asked again
                    continue
                raise
            if done.status.state is not ContainerState.EXITED:
                self._wrong.append(f"a stop by a command leaves {done.status.state.name}")
            return
        self._wrong.append("a command is not answered")

    def find_lies(self) -> Iterator[str]:
        use_impatient_keepers()
        self._engine = None
        yield from self._wrong
        with Engine.open(self._state_dir) as engine:
            deadline = time.monotonic() + _COMES_SECONDS
            while (late := list(_find_late(engine))) and time.monotonic() < deadline:
                time.sleep(0.005)
            yield from late
            for one in engine.list(state=ContainerState.RUNNING):
                yield from find_false_run(one)
            end_all(engine)
        yield from self.find_left()


class CrewLife(EngineLife):
    """Tasks let containers live at the same time, by an engine for asyncio."""

    keeps_unclosed = 40

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self._gone: set[str] = set()

    def live(self) -> None:
        use_impatient_keepers()
        asyncio.run(self._work())

    async def _work(self) -> None:
        crew = await AsyncEngine.open(self._state_dir)
        self._engine = crew.engine
        pod = await crew.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        lives = [self._live(crew, pod, f"c{number}") for number in range(_CREW)]
        for outcome in await asyncio.gather(*lives, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await pod.remove(force=True, timeout=0)
        await crew.close()

    async def _live(self, crew: AsyncEngine, pod: AsyncSandbox, key: str) -> None:
        config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": ["sh", "-c", "exit 3"]}
        one = await crew.create_container(config, pod, id=key)
        await one.start()
        steps = (one.wait(_COMES_SECONDS), one.renew(time.time_ns() + 3600 * 10**9))
        (status, _) = await asyncio.gather(*steps)
        assert status.exit_code == 3
        await one.remove()
        self._gone.add(key)

    def find_lies(self) -> Iterator[str]:
        use_impatient_keepers()
        self._engine = None
        with Engine.open(self._state_dir) as engine:
            for one in engine.list():
                if one.id in self._gone:
                    yield f"{one.id} was removed, and is there"
                yield from find_false_run(one)
            end_all(engine)
        yield from self.find_left()


def _count_ends(engine: Engine, name: str) -> int:
    return sum(one.state is ContainerState.EXITED for one in engine.list(name=name))


def _find_late(engine: Engine) -> Iterator[str]:
    """Yield what was decided of containers, as far as they were made, and has not come yet."""
    attempts = engine.list(name="again")
    if attempts and _has_run(attempts[0]) and _count_ends(engine, "again") != 2:
        yield f"again: {[str(one.status.state) for one in attempts]}"
    for one in engine.list(name="passing"):
        if not one.status.released:
            yield f"passing: {one.status.state} after its time"


def _has_run(container: Container) -> bool:
    return bool(container.status.started_at)


LIVES: Mapping[str, Callable[[str], EngineLife]] = {"served": ServedLife, "crew": CrewLife}
