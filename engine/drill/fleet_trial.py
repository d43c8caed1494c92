"""Trials of a fleet: a node, its connections or PostgreSQL are hit amid sending, and what is then seen is judged.

Whoever looks at the fleet is compared with what the node has acknowledged, after each call and after each blow; at the
end, when all could be sent, the rows there must be those of the node, each once.
"""

import os
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from limpet.engine import fleet
from limpet.engine.drill import fleet_controls as controls
from limpet.engine.drill.fleet_life import SCRIPTS, Node, Plan, tell_states
from limpet.engine.drill.fleet_proxy import Piece, Proxy, Target, Way
from limpet.engine.state.names import DATABASE
from limpet.schema.errors import FleetError, InvalidInputError, InvalidStateError, LimpetError, NotFoundError
from limpet.schema.status import Reason
from limpet.testing import Finding, Report, Violation

_HUNG_SECONDS: Final = 60.0
_REMOVE_SECONDS: Final = 20.0
_DELAY_SECONDS: Final = 0.02
ACTIONS: Final = {"cut": 80, "kill": 62, "linger": 10, "hold": 20, "late": 16, "delay": 6, "crash": 4, "promote": 2}
"""What is done at a point, and how often: of 200."""
_OF_SERVERS: Final = frozenset({"crash", "promote"})
"""What is done to a server of the trials' own."""
_WRITES: Final = (b"INSERT INTO fleet_node", b"WITH begun")
"""Of whatever a node writes: it claims its place, or it sends a batch."""
_LAG_SECONDS: Final = 0.03
"""For so long a standby gets nothing more before it takes the primary's place, where the whole piece passes."""
_SETTLED_AFTER: Final = 8
"""So many looks of the proxy at what there is to pass on."""
_NOTHING: Final[Mapping[str, int]] = {}

Look = Callable[[int], object]
"""Looks at the fleet; given the last step that was acknowledged."""


class Server(Protocol):
    """A PostgreSQL that may be killed, and whose place a standby may take."""

    def kill(self) -> None:
        """End it at once, as a crash does."""

    def start(self) -> None:
        """Start it again, and return when it answers."""

    def add_standby(self) -> None:
        """Have a standby, if there is none: from now on no commit returns before it has it."""

    def detain_standby(self) -> None:
        """Let nothing more through to the standby, until it takes the primary's place."""

    def promote(self) -> None:
        """Lose the primary as `kill` does, for ever; return when the standby takes writes at the same address."""


class Point(NamedTuple):
    """When what is done: at a piece of what is sent, of which so many per cent still pass."""

    action: str
    way: Way
    number: int
    percent: int
    ack: str

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Return the point with this name. Raises InvalidInputError."""
        action, way, *rest = [*text.split(":"), "", ""][:5]
        number, percent, ack = [*rest, "", "", ""][:3]
        is_known = action in ACTIONS and way in {"up", "down"} and ack in {"sync", "async"}
        if not (is_known and number.isdigit() and percent.isdigit()):
            raise InvalidInputError(f"{text!r}: expected ACTION:up|down:PIECE:PERCENT:sync|async")
        return cls(action, "up" if way == "up" else "down", int(number), int(percent), ack)


class Judge:
    """Compares what the fleet says of one node with what its script writes."""

    def __init__(self, view: Callable[[], fleet.Fleet], plan: Plan, start: Mapping[str, int] = _NOTHING) -> None:
        self._view, self._plan = view, plan
        self._states = tell_states(plan.script, start)
        self._keys = sorted({key for state in self._states for key in state})
        self._reached = dict.fromkeys(self._keys, 0)
        self._revision = 0

    def look(self, acknowledged: int) -> None:
        """Raise Violation if the fleet lacks what was acknowledged, says what never was, or has gone back."""
        try:
            found = {one.id: one for one in self._view().list(node=self._plan.node)}
            (node,) = self._view().nodes(node=self._plan.node)
        except NotFoundError:
            if self._plan.ack == "sync" and acknowledged >= 0:
                raise Violation("lost", "the fleet does not know the node, whose changes were acknowledged") from None
            return
        if node.revision < self._revision:
            raise Violation("false_verdict", f"events were sent up to {self._revision}, now up to {node.revision}")
        self._revision = node.revision
        for key in self._keys:
            one = found.get(key)
            if one is not None and one.status.reason == Reason.DAMAGED:
                raise Violation("torn", f"container {key}: {one.status.message}")
            self._judge(key, one and one.checkpoint.pid, acknowledged + 1 if self._plan.ack == "sync" else 0)

    def _judge(self, key: str, said: int | None, least: int) -> None:
        fitting = [number for number, state in enumerate(self._states) if state.get(key) == said]
        for number in fitting:
            if number >= max(least, self._reached[key]):
                self._reached[key] = number
                return
        words = f"container {key}: the fleet says {said}; {least} steps are acknowledged"
        if not fitting:
            raise Violation("false_verdict", f"{words}, and none has written that")
        if fitting[-1] < self._reached[key]:
            raise Violation("false_verdict", f"{words}, and it has said what step {self._reached[key]} wrote before")
        raise Violation("lost", words)


class FleetTrial:
    """Trials against one PostgreSQL, each with a node of its own. The process must have one thread alone."""

    def __init__(
        self, url: str, directory: str, *, server: Server | None = None, prepare: Callable[[], object] | None = None
    ) -> None:
        """`url` names a schema of the trials' own; `prepare` breaks something in each node, for a control.

        Raises FleetError, InvalidInputError.
        """
        self._url, self._directory = url, directory
        self._server = server
        self._prepare = prepare
        self._numbers = 0
        self._fleet: fleet.Fleet | None = None
        self._find_differences: Callable[[str, str], list[str]] | None = None
        self._comparing = ExitStack()
        """Closes the connection on which they are found."""
        fleet.make_tables(url)
        target = Target(*self._view().server)
        self._proxy = Proxy(target, directory)
        place = self._proxy.place
        # Over TCP the name stays, for certificates and password files.
        hosts = {"host": place.host} if place.is_local else {"host": target.host, "hostaddr": place.host}
        self._proxied = _with_parameters(url, {**hosts, "port": str(place.port)})
        self._pieces: dict[str, list[Piece]] = {}
        self.is_reached = False
        """True if the last point was come to."""
        self._is_lost = False
        """The server was, and nobody has looked at what it has since."""
        self._lost_at: float | None = None
        """When it will be (monotonic)."""

    def close(self) -> None:
        """Close all connections. May be repeated."""
        self._proxy.close()
        self._look_again()

    def draw(self, chance: random.Random, actions: Collection[str] = tuple(ACTIONS)) -> Point:
        """Return a point, at a commit more often than elsewhere."""
        known = {
            name: weight
            for name, weight in ACTIONS.items()
            if name in actions and (name not in _OF_SERVERS or self._server is not None)
        }
        action = chance.choices(list(known), list(known.values()))[0]
        ack = "async" if action == "hold" or chance.random() < 0.25 else "sync"
        pieces = self._find_pieces(ack)
        if chance.random() < 0.4:
            pieces = find_commits(pieces) or pieces
        piece = chance.choice(pieces)
        percent = chance.choice((0, 100, chance.randrange(1, 100)))
        return Point(action, piece.way, piece.number, percent, ack)

    def run(self, point: Point) -> Report:
        """Try one point."""
        try:
            acknowledged = self._try(point)
        except Violation as found:
            return Report.of([Finding(str(point), found.kind, str(found))], points=1)
        except (LimpetError, OSError) as error:
            self._look_again()
            return Report.of([Finding(str(point), "other", f"{type(error).__name__}: {error}")], points=1)
        return Report(points=1, acknowledged=acknowledged)

    def _find_pieces(self, ack: str) -> Sequence[Piece]:
        """Return the pieces of an undisturbed life."""
        if ack not in self._pieces:
            pieces: list[Piece] = []
            with self._begin(ack) as (node, _):
                self._proxy.on_piece = pieces.append
                self._follow(node, lambda _: None)
            self._pieces[ack] = pieces
        return self._pieces[ack]

    @contextmanager
    def _begin(
        self, ack: str, prepare: Callable[[], object] | None = None, script: str = "first"
    ) -> "Iterator[tuple[Node, Judge]]":
        self._numbers += 1
        name = f"n{os.getpid()}-{self._numbers}"
        plan = Plan(
            f"{self._directory}/{name}",
            name,
            self._proxied,
            script,
            ack,
            prepare=self._prepare or prepare or controls.hasten,
        )
        self._proxy.reset()
        node = Node(plan, self._proxy.close_in_child)
        try:
            yield node, Judge(self._view, plan)
        finally:
            node.end()
            self._proxy.on_piece = lambda _: None
            self._proxy.reset()
            for path in (plan.state_dir, f"{plan.state_dir}-again"):
                shutil.rmtree(path, ignore_errors=True)

    def _try(self, point: Point) -> int:
        self._find_pieces(point.ack)
        self.is_reached = self._is_lost = False
        self._lost_at = None
        if point.action == "promote" and self._server is not None:
            self._server.add_standby()
        script = "long" if point.action == "hold" else "first"
        prepare = controls.send_late if point.action == "late" else None
        with self._begin(point.ack, prepare, script) as (node, judge):

            def blow(piece: Piece) -> int | None:
                if self.is_reached or (piece.way, piece.number) != (point.way, point.number):
                    return None
                self.is_reached = True
                return self._strike(node, point, piece)

            self._proxy.on_piece = blow
            self._follow(node, judge.look, until_held=point.action == "hold")
            plan = node.plan
            if point.action == "hold" and self.is_reached:
                return self._replace(node, judge, is_early=point.percent == 0)
            acknowledged = node.acknowledged + 1
            if point.action in {"kill", "linger"} and self.is_reached:
                judge.look(node.acknowledged)
                plan = plan._replace(first=node.acknowledged + 1, is_again=True)
                if point.action == "linger" and point.percent < 100:
                    self._release_after(point.percent)
                again = Node(plan, self._proxy.close_in_child)
                try:
                    self._follow(again, judge.look)
                    self._require_end(again, plan)
                    acknowledged = again.acknowledged + 1
                finally:
                    again.end()
                if point.action == "linger":
                    self._settle()
                    judge.look(again.acknowledged)
            else:
                self._require_end(node, plan)
            self._require_same(plan)
            return acknowledged

    def _strike(self, node: Node, point: Point, piece: Piece) -> int | None:
        length = len(piece.data) * point.percent // 100
        if point.action == "hold":
            self._proxy.hold()
        elif point.action == "linger":
            self._proxy.hold()
            node.kill()
        elif point.action == "delay":
            time.sleep(_DELAY_SECONDS)
        elif point.action == "kill":
            node.kill()
            return length
        elif point.action == "crash" and self._server is not None:
            self._look_again()
            self._server.kill()
            self._server.start()
            self._is_lost = True
            return length
        elif point.action == "promote" and self._server is not None:
            if point.percent == 100:
                self._server.detain_standby()
                self._lost_at = time.monotonic() + _LAG_SECONDS
                return None
            self._promote()
            return length
        elif point.action in {"cut", "late"}:
            return length
        return None

    def _promote(self) -> None:
        if self._server is not None:
            self._look_again()
            self._server.promote()
            self._is_lost, self._lost_at = True, None

    def _follow(self, node: Node, look: Look, *, until_held: bool = False) -> None:
        """Pass on what is sent, and look at the fleet at each acknowledgement, until the node has ended."""
        last = len(SCRIPTS[node.plan.script]) - 1
        deadline = time.monotonic() + _HUNG_SECONDS
        while True:
            is_told = self._proxy.pump(0.05 if self._lost_at is None else 0.002, node.pipe)
            if self._lost_at is not None and time.monotonic() > self._lost_at:
                self._promote()
            is_lost, self._is_lost = self._is_lost, False
            # Looked at before the node can reach it, which would send again what it lacks.
            if is_told or (is_lost and node.has_said):
                if not node.read():
                    self._proxy.pump(0)
                    if self._lost_at is not None:
                        self._promote()
                        self._is_lost = False
                        look(node.acknowledged)
                    return
                look(node.acknowledged)
            elif is_lost:
                look(node.acknowledged)
            if until_held and self.is_reached and node.acknowledged == last:
                return
            if time.monotonic() > deadline:
                raise Violation("other", f"the node hung; {node.acknowledged + 1} steps were acknowledged")

    def _release_after(self, pieces: int) -> None:
        """Let arrive what is held once so many more were sent to the server."""
        left = pieces

        def count(piece: Piece) -> None:
            nonlocal left
            left -= piece.way == "up"
            if left < 0:
                self._proxy.release()

        self._proxy.on_piece = count

    def _settle(self) -> None:
        """Let arrive what was held of a node that is dead."""
        self._proxy.release()
        for _ in range(_SETTLED_AFTER):
            self._proxy.pump(0.002)

    def _replace(self, old: Node, judge: Judge, *, is_early: bool) -> int:
        """Restore the node elsewhere while the old one's connection is held; then let what it had sent arrive.

        That is so before the new one is there, or after all that it does.
        """
        judge.look(old.acknowledged)
        again = f"{old.plan.state_dir}-again"
        try:
            fleet.restore(self._url, old.plan.node, again, is_forced=True)
        except (InvalidStateError, NotFoundError):  # it had not sent all for the first time
            self._proxy.release()
            self._follow(old, judge.look)
            self._require_end(old, old.plan)
            self._require_same(old.plan)
            return old.acknowledged + 1
        had_all = not self._compare(old.plan)
        if is_early:
            self._let_go(old, had_all, lambda _: judge.look(old.acknowledged))
        plan = old.plan._replace(state_dir=again, script="next", ack="sync", prepare=controls.hasten)
        start = {one.id: one.checkpoint.pid for one in self._view().list(node=plan.node)}
        judge_of_new = Judge(self._view, plan, start)
        new = Node(plan, self._proxy.close_in_child)
        try:
            self._follow(new, judge_of_new.look)
            self._require_end(new, plan)
        finally:
            new.end()
        self._require_same(plan)
        if not is_early:
            self._let_go(old, had_all, lambda _: judge_of_new.look(new.acknowledged))
            self._require_same(plan)
        return new.acknowledged + 1

    def _let_go(self, old: Node, had_all: bool, look: Look) -> None:
        """Let arrive what the old one sends; it must be told, unless it had sent all."""
        self._proxy.release()
        self._follow(old, look)
        if not (old.is_fenced or had_all):
            told = old.error or "it ended in order"
            raise Violation("false_verdict", f"who was taken over from was not told: {told}")

    def _require_end(self, node: Node, plan: Plan) -> None:
        if node.error or node.acknowledged != len(SCRIPTS[plan.script]) - 1:
            raise Violation("other", f"the node ended after {node.acknowledged + 1} steps: {node.error or 'killed?'}")

    def _require_same(self, plan: Plan) -> None:
        found = self._compare(plan)
        if found:
            raise Violation("lost", f"all was sent, and {len(found)} rows differ: {'; '.join(found[:3])}")

    def _compare(self, plan: Plan) -> list[str]:
        if self._find_differences is None:
            self._find_differences = self._comparing.enter_context(fleet.comparing(self._url))
        return self._find_differences(plan.node, f"{plan.state_dir}/{DATABASE}")

    def _view(self) -> fleet.Fleet:
        if self._fleet is None:
            self._fleet = fleet.Fleet.open(self._url)
        return self._fleet

    def _look_again(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None
        self._find_differences = None
        self._comparing.close()


def find_commits(pieces: Sequence[Piece]) -> list[Piece]:
    """Return those that end a transaction which writes, and their answers.

    A batch is mostly one statement, which is a transaction; most that say COMMIT have only read.
    """
    found: list[Piece] = []
    is_open = has_written = is_awaited = False
    for piece in pieces:
        if piece.way == "down":
            if is_awaited:
                found.append(piece)
            is_awaited = False
            continue
        is_open = is_open or b"BEGIN" in piece.data
        has_written = has_written or any(words in piece.data for words in _WRITES)
        if b"COMMIT" in piece.data or not is_open:
            if has_written:
                found.append(piece)
                is_awaited = True
            is_open = has_written = False
    return found


def run_trials(
    url: str,
    directory: str,
    *,
    points: int,
    seed: int,
    server: Server | None = None,
    actions: Collection[str] = tuple(ACTIONS),
    progress: Callable[[int, int], object] = lambda *_: None,
    note: Callable[[Point], object] = lambda _: None,
) -> Report:
    """Try so many points, drawn by the seed, in a schema of their own that is removed again. Raises FleetError.

    `note` is called with each that was come to.
    """
    with _trial(url, directory, seed, server) as trial:
        chance = random.Random(seed)  # noqa: S311
        return _run(trial, chance, actions, points, lambda report: progress(report.points, points), note)


def try_point(url: str, directory: str, point: Point, *, server: Server | None = None) -> Report:
    """Try this point, as `run_trials` does. Raises FleetError."""
    with _trial(url, directory, 0, server) as trial:
        report = trial.run(point)
        return report if trial.is_reached or report.findings else Report(unreached=1)


def count_noticed(
    url: str,
    directory: str,
    control: controls.Control,
    *,
    seed: int,
    server: Server | None = None,
    points: int = 60,
) -> int:
    """Return how often broken nodes were noticed, until the first time, or for so many points. Raises FleetError."""
    with _trial(url, directory, seed, server, control.prepare) as trial:
        total = Report()
        chance = random.Random(seed)  # noqa: S311
        while not total.violations and total.points + total.unreached < points:
            total += _run(trial, chance, control.actions, 1)
    return total.violations


@contextmanager
def _trial(
    url: str, directory: str, seed: int, server: Server | None, prepare: Callable[[], object] | None = None
) -> Iterator[FleetTrial]:
    with own_schema(url, seed) as own:
        trial = FleetTrial(own, directory, server=server, prepare=prepare)
        try:
            with controls.hastened():
                yield trial
        finally:
            trial.close()


@contextmanager
def own_schema(url: str, seed: int) -> Iterator[str]:
    """Give the URL of a schema of the drill's own, with nothing in it; remove it afterwards."""
    own = f"{url}{'&' if '?' in url else '?'}schema=limpet_drill_{os.getpid()}_{seed % 1_000_000_007}"
    try:
        yield own
    finally:
        _remove_tables(own)


def _remove_tables(url: str) -> None:
    """Remove them. A server that a trial has just crashed may take a moment until it is there again."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            fleet.remove_tables(url)
            return
        except FleetError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _run(
    trial: FleetTrial,
    chance: random.Random,
    actions: Collection[str],
    points: int,
    progress: Callable[[Report], object] = lambda _: None,
    note: Callable[[Point], object] = lambda _: None,
) -> Report:
    total = Report()
    while total.points < points and total.unreached <= points:
        progress(total)
        point = trial.draw(chance, actions)
        report = trial.run(point)
        total += report if trial.is_reached or report.findings else Report(unreached=1)
        if trial.is_reached:
            note(point)
    return total


def _with_parameters(url: str, parameters: dict[str, str]) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode({**dict(parse_qsl(parts.query)), **parameters})).geturl()
