"""Whatever happens while the engine is down: `python -m tests.campaigns.worlds --examples 2000 --seed 1`.

Hypothesis draws what happens: containers come, run, end, are released and deleted, the engine is killed, with its
keeper or without, processes end and are reaped or not, strangers get their pids, the machine is rebooted, bundles are
lost, spoilt and replaced, strange things are planted beside them, and the next engine is opened at home, in another pid
namespace or without a boot id. All of it is real, in namespaces of its own, also for an ordinary user. Status 1 at a
false verdict, with the shortest way to it; 3 where there are no such namespaces.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from limpet.engine.drill import inside
from limpet.recovery.evidence import Bundle
from limpet.schema import ContainerState, Reason
from tests.campaigns.sizes import CAMPAIGNS
from tests.recovery.world import Expected, Surroundings, World, expect

_NOT_TRIED = 3
_IDS = tuple("abcd")
_HARMS = (Bundle.ABSENT, Bundle.FOREIGN, Bundle.PARTIAL)
_ORPHANS = ("link", "file", "copy", "mounted", "directory")
_SLEEP = ("sleep", "3000")
_POPULATION = ((), ("start",), ("start",), ("start",), ("start", "stop"), ("start", "stop", "release"))
"""What has been done to containers when a world begins; most of them run."""


_CHANGES = (
    "end", "end unreaped", "end with keepers", "replace process", "replace process", "kill keepers", "reboot",
    "harm bundle", "plant",
)  # fmt: skip


class Recovery(RuleBasedStateMachine):
    """One world from its beginning to its end."""

    cases = 0
    worlds = 0

    @initialize(population=st.lists(st.sampled_from(_POPULATION), min_size=2, max_size=len(_IDS)))
    def begin(self, population: list[tuple[str, ...]]) -> None:
        """Open the first engine, and make containers that have come so far."""
        self._directory = tempfile.TemporaryDirectory(prefix="limpet-world-")
        self.world = World(os.path.realpath(self._directory.name))
        self.where = Surroundings.HOME
        self.mounted: list[str] = []
        self.planted = 0
        self.world.open(self.where)
        for key, verbs in zip(_IDS, population, strict=False):
            self.world.step("create", key, *_SLEEP)
            for verb in verbs:
                self.world.step(verb, key)

    def teardown(self) -> None:
        """End what is left."""
        if hasattr(self, "world"):
            for name in self.mounted:
                self.world.unmount_orphan(name)
            Recovery.cases += self.world.cases
            Recovery.worlds += 1
            self.world.end()
            self._directory.cleanup()

    def _is_up(self) -> bool:
        return self.world.engine is not None and self.where is Surroundings.HOME

    def _choose(self, data: st.DataObject, *states: ContainerState) -> str | None:
        keys = [key for key, truth in sorted(self.world.truths.items()) if truth.told.state in states]
        return data.draw(st.sampled_from(keys)) if keys else None

    @precondition(_is_up)
    @rule(key=st.sampled_from(_IDS), runs=st.booleans())
    def create(self, key: str, *, runs: bool) -> None:
        """Create a container, and mostly start it."""
        if key in self.world.truths:
            return
        status = self.world.step("create", key, *_SLEEP)
        assert status is not None
        assert status.state is ContainerState.CREATED
        if runs:
            self.start_one(key)

    def start_one(self, key: str) -> None:
        """Start a container that is CREATED; in a sandbox from before a reboot it stays so."""
        status = self.world.step("start", key)
        assert status is not None
        has_sandbox = self.world.truths[key].has_sandbox
        assert status.state is (ContainerState.RUNNING if has_sandbox else ContainerState.CREATED)

    @precondition(_is_up)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """Start one whose bundle is whole."""
        key = self._choose(data, ContainerState.CREATED)
        if key is None or self.world.truths[key].told.released:
            return
        if self.world.truths[key].bundle is Bundle.WHOLE:
            self.start_one(key)

    @precondition(_is_up)
    @rule(data=st.data(), number=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def end_beside_engine(self, data: st.DataObject, number: int) -> None:
        """A process ends while an engine watches, its own or an adopted one: the exit code is known."""
        key = self._choose(data, ContainerState.RUNNING)
        if key is None:
            return
        self.world.end_process(key, number, reap=False)
        was_adopted = self.world.truths[key].code is not None
        pid = self.world.truths[key].pid
        status = self.world.step("wait", key)
        assert status is not None
        assert (status.state, status.exit_code) == (ContainerState.EXITED, 128 + number)
        if was_adopted:
            os.waitpid(pid, 0)
            self.world.truths[key].code = None

    @precondition(_is_up)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Stop, release and delete one, as far as each is possible."""
        if not self.world.truths:
            return
        key = data.draw(st.sampled_from(sorted(self.world.truths)))
        pid = self.world.truths[key].pid
        for verb in ("stop", "release", "delete")[: data.draw(st.integers(1, 3))]:
            status = self.world.step(verb, key)
            if status is None:
                assert verb == "delete"
                break
            assert status.state is (ContainerState.EXITED if status.started_at else status.state)
            if pid and not status.pid:
                self._reap_if_ours(pid)
                pid = 0

    @staticmethod
    def _reap_if_ours(pid: int) -> None:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            return  # the engine has

    @precondition(_is_up)
    @rule()
    def recover_again(self) -> None:
        """Recover beside running containers: nothing changes."""
        before = self.world.look()
        assert self.world.engine is not None
        self.world.engine.ask("recover")
        assert self.world.look() == before

    @rule(
        data=st.data(),
        changes=st.lists(st.sampled_from(_CHANGES), min_size=1, max_size=5),
        where=st.sampled_from([Surroundings.HOME, Surroundings.HOME, *Surroundings]),
    )
    def restart(self, data: st.DataObject, changes: list[str], where: Surroundings) -> None:
        """SIGKILL the engine, change the world, and open the next one: every verdict is what is true."""
        self.world.crash(spares_keeper=data.draw(st.booleans()))
        for change in changes:
            _ACTS[change](self, data)
        self.open(where)

    def end_one(self, data: st.DataObject, *, reap: bool) -> int:
        """A process ends while nobody watches; return its pid, 0 if there is none that runs."""
        keys = [key for key, truth in sorted(self.world.truths.items()) if truth.pid and truth.code is None]
        if not keys:
            return 0
        key = data.draw(st.sampled_from(keys))
        pid = self.world.truths[key].pid
        self.world.end_process(key, signal.SIGKILL, reap=reap)
        return pid

    def end_with_keepers(self, data: st.DataObject) -> None:
        """A process ends, and its keeper is killed before it has reaped it, or just after."""
        keys = [key for key, truth in sorted(self.world.truths.items()) if truth.pid and truth.code is None]
        if keys:
            self.world.end_with_keepers(data.draw(st.sampled_from(keys)), signal.SIGKILL)

    def replace_process(self, data: st.DataObject) -> None:
        """A process ends, and a stranger gets its pid."""
        pid = self.end_one(data, reap=True)
        if pid:
            self.world.give_pid_to_stranger(pid)

    def harm_bundle(self, data: st.DataObject) -> None:
        """A bundle is lost, half there, or something else stands in its place."""
        truths = sorted(self.world.truths.items())
        keys = [key for key, truth in truths if truth.bundle is Bundle.WHOLE and not truth.told.released]
        if keys:
            key, harm, link = data.draw(st.tuples(st.sampled_from(keys), st.sampled_from(_HARMS), st.booleans()))
            self.world.harm_bundle(key, harm, link=link)

    def plant(self, data: st.DataObject) -> None:
        """Something appears beside the bundles."""
        self.planted += 1
        name, kind = f"orphan-{self.planted}", data.draw(st.sampled_from(_ORPHANS))
        self.world.plant_orphan(name, kind)
        if kind == "mounted":
            self.mounted.append(name)

    def open(self, where: Surroundings) -> None:
        """Open the next engine, and compare what it says with the truth."""
        self.where = where
        has_witness = where is not Surroundings.ELSEWHERE or not self.world.has_keeper()
        said = self.world.open(where)
        assert said.keys() == self.world.truths.keys()
        for key, truth in self.world.truths.items():
            expected, status = expect(truth, where, has_witness=has_witness), said[key]
            told = Expected(
                status.state,
                None if expected.exit_code is None else status.exit_code,
                None if expected.reason is None else status.reason,
            )
            is_witnessed = not truth.told.finished_at and (status.state, status.exit_code, status.reason) == (
                ContainerState.EXITED,
                truth.perhaps_witnessed,
                Reason.ERROR,
            )
            assert told == expected or is_witnessed, f"{key}, {where}: {status}, and the truth is {truth}"
            if status.state is ContainerState.RUNNING:
                assert status.pid == truth.pid
            if status.state is ContainerState.EXITED and not truth.told.finished_at:
                if truth.code is not None:
                    self.world.reap(key)
                truth.told, truth.pid = status, 0
            self.world.cases += 1
        assert self.world.look() == said
        assert self.world.engine is not None
        assert self.world.engine.ask("recover").keys() == said.keys()
        assert self.world.look() == said, "a second recovery says something else"

    @invariant()
    def nothing_of_others_is_harmed(self) -> None:
        """No stranger is signalled, and nothing that is not the engine's is removed."""
        if hasattr(self, "world"):
            self.world.require_no_harm()


_ACTS: dict[str, Callable[[Recovery, st.DataObject], object]] = {
    "end": lambda machine, data: machine.end_one(data, reap=True),
    "end unreaped": lambda machine, data: machine.end_one(data, reap=False),
    "end with keepers": Recovery.end_with_keepers,
    "replace process": Recovery.replace_process,
    "kill keepers": lambda machine, _: machine.world.kill_keepers(),
    "reboot": lambda machine, _: machine.world.reboot(),
    "harm bundle": Recovery.harm_bundle,
    "plant": Recovery.plant,
}
"""What may happen while the engine is down, by its name."""


def main() -> int:
    """Let Hypothesis look for a false verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.worlds",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=CAMPAIGNS["worlds"].long_run, help="how many worlds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the shortest way to it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        obstacle = inside.find_obstacle()
        if obstacle is not None:
            print(f"not tried: {obstacle}", file=sys.stderr)
            return _NOT_TRIED
        command = [*inside.unshare(), sys.executable, "-m", "tests.campaigns.worlds", "--inside", *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    run_state_machine_as_test(
        seed(options.seed)(Recovery),
        settings=settings(
            max_examples=options.examples,
            stateful_step_count=12,
            deadline=None,
            database=None,
            phases=[Phase.generate] if options.no_shrink else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Recovery.worlds:,} worlds, {Recovery.cases:,} verdicts compared with the truth, none false.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
