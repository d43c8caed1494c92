"""A node of a fleet that is killed at each of its own writes, flushes and renames while it sends: a `Workload`."""

import time
from collections.abc import Callable, Sequence

from limpet.engine import fleet
from limpet.engine.drill import fleet_controls as controls
from limpet.engine.drill.fleet_life import SCRIPTS, Plan, follow
from limpet.engine.drill.fleet_trial import Judge, own_schema
from limpet.engine.state.names import DATABASE
from limpet.testing import Report, Violation, true_kills


class FleetKills:
    """The short life of a node, another in each directory; after a kill it is opened again and goes on."""

    def __init__(self, url: str, ack: str, prepare: Callable[[], object] = controls.hasten) -> None:
        """`url` names a schema of their own; `prepare` breaks something in each node, for a control."""
        self._url, self._ack = url, ack
        self._prepare = prepare

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Acknowledge the node's name, and each step."""
        self._prepare()
        name = f"n{time.time_ns()}"
        acknowledge(name.encode())
        follow(self._plan(directory, name), lambda number: acknowledge(b"%d" % number))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Compare what the fleet says with what was acknowledged, then with the node, which does the rest."""
        self._prepare()
        if not acknowledged:  # it was killed before it was there
            return
        name, *steps = map(bytes.decode, acknowledged)
        last = int(steps[-1]) if steps else -1
        plan = self._plan(directory, name)._replace(first=last + 1, is_again=True)
        with fleet.Fleet.open(self._url) as view:
            judge = Judge(lambda: view, plan)
            judge.look(last)
            follow(plan, judge.look)
            judge.look(len(SCRIPTS[plan.script]) - 1)
        found = fleet.find_differences(self._url, name, f"{plan.state_dir}/{DATABASE}")
        if found:
            raise Violation("lost", f"all was sent, and {len(found)} rows differ: {'; '.join(found[:3])}")

    def _plan(self, directory: str, name: str) -> Plan:
        return Plan(f"{directory}/state", name, self._url, "first", self._ack)


def run_kills(
    url: str,
    *,
    every: int,
    seed: int,
    first: int = 0,
    prepare: Callable[[], object] = controls.hasten,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Kill nodes before, amid and after each `every`-th of their calls that change a file from `first`, in both modes.

    In a schema of their own, which is removed again. Raises FleetError, and what `true_kills` raises.
    """
    with own_schema(url, seed) as own:
        fleet.make_tables(own)
        return sum(
            (
                true_kills(FleetKills(own, ack, prepare), every=every, first=first, progress=progress)
                for ack in ("sync", "async")
            ),
            Report(),
        )
