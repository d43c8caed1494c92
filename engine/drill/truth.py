"""What the drill knows without asking the engine: acknowledged calls, calls in progress, possible exits."""

from dataclasses import dataclass, field

from limpet.engine.drill.messages import Returned, Told
from limpet.engine.drill.script import Program, Round, Step, Verb
from limpet.schema.status import Status


@dataclass
class Known:
    """What is known of a container."""

    program: Program
    floor: Status | None = None
    """The newest status that was acknowledged to a caller; None if there is none."""
    created: bool = False
    """The last call on it, in this life, has made it."""
    deleted: bool = False
    may_be_deleted: bool = False
    """A call that deletes it had begun when the engine was killed."""
    starting: bool = False
    """A start was begun and has not succeeded, so it may have come to nothing."""
    signalled: bool = False
    """It was stopped, or killed by the drill, so a signal may have ended it."""
    unwitnessed: bool = False
    """All keepers were killed while it may have run: of its end it may be said that nobody saw it."""
    disturbed: bool = False
    """The drill has changed its bundle."""


@dataclass
class Group:
    """Containers that are only changed together. Their messages hold the number of the last transaction."""

    members: tuple[str, ...]
    acknowledged: int = 0
    under_way: int | None = None


@dataclass
class Truth:
    """Everything that is known. Updated from the events of the engine's process, and by the drill's own actions."""

    known: dict[str, Known] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    """Members of groups, including planned ones."""
    sandboxes: set[str] = field(default_factory=set)
    acknowledged: int = 0
    """Calls that returned without being refused."""
    _steps: dict[int, Step] = field(default_factory=dict)

    def expect(self, planned: Round) -> None:
        """Record what a round may create."""
        self.known |= {each.id: Known(each.program) for each in planned.containers}
        self._steps = {step.number: step for lane in (planned.first, *planned.lanes) for step in lane}
        self.grouped.update(member for step in self._steps.values() for member in step.members)

    def begin(self, number: int) -> None:
        """Record that a call is next: from now on it may have happened."""
        step = self._steps[number]
        if step.verb in {Verb.TRANSACT, Verb.DROP}:
            self._begin_transaction(step)
        elif step.verb is Verb.DELETE:
            self.known[step.target].may_be_deleted = True
        elif step.verb is Verb.START:
            self.known[step.target].starting = True
        elif step.verb is Verb.STOP:
            self.known[step.target].signalled = True

    def end(self, returned: Returned) -> str:
        """Record the result of a call, and what a reader saw after it: both are acknowledged.

        Returns the container it was called on.
        """
        step = self._steps[returned.step]
        accepted = not returned.refused and not returned.broken
        self.acknowledged += accepted
        if step.verb is Verb.SANDBOX:
            if accepted:
                self.sandboxes.add(step.target)
        elif step.verb in {Verb.TRANSACT, Verb.DROP}:
            self._end_transaction(step, accepted=accepted)
        else:
            known = self.known[step.target]
            known.floor = returned.status or known.floor
            known.starting = known.starting and not (step.verb is Verb.START and accepted)
            known.created = step.verb is Verb.CREATE and accepted
            if step.verb is Verb.DELETE:
                self._end_delete(known, accepted=accepted)
        return step.target

    def find_targets(self, returned: Returned) -> tuple[str, ...]:
        """Return what the call was made on."""
        step = self._steps[returned.step]
        return step.members or (step.target,)

    def lose_witnesses(self) -> None:
        """Record that no keeper is left, whose containers run on."""
        for known in self.known.values():
            known.unwitnessed = True

    def is_first_start(self, returned: Returned) -> bool:
        """Return whether this call was to start a container that was made just before, in this life."""
        step = self._steps[returned.step]
        return step.verb is Verb.START and self.known[step.target].created

    def learn(self, told: Told) -> None:
        """Record what an engine reports after a kill: no call is in progress, and the report must stay true."""
        for key, known in self.known.items():
            known.deleted = known.deleted or (known.may_be_deleted and key not in told.containers)
            known.may_be_deleted = known.created = False
            known.floor = told.containers.get(key)
        for group in self.groups.values():
            status = told.containers.get(group.members[0])
            if status is not None and group.under_way is not None:
                group.acknowledged = number_of(status) or group.acknowledged
            group.under_way = None
        self.sandboxes = set(told.sandboxes)

    def _begin_transaction(self, step: Step) -> None:
        if step.verb is Verb.DROP:
            for member in step.members:
                self.known[member].may_be_deleted = True
        elif step.target in self.groups:
            self.groups[step.target].under_way = int(step.value)
        elif all(floor and floor.created_at for floor in self._floors(step.members)):
            # Else a kill came before all of them were made, and what recovery says of such a one takes the
            # place of the number.
            self.groups[step.target] = Group(step.members, under_way=int(step.value))

    def _end_transaction(self, step: Step, *, accepted: bool) -> None:
        if step.verb is Verb.DROP:
            for member in step.members:
                self._end_delete(self.known[member], accepted=accepted)
        elif step.target in self.groups:
            group = self.groups[step.target]
            group.acknowledged = int(step.value) if accepted else group.acknowledged
            group.under_way = None

    def _end_delete(self, known: Known, *, accepted: bool) -> None:
        known.deleted = known.deleted or accepted
        known.may_be_deleted = accepted

    def _floors(self, members: tuple[str, ...]) -> list[Status | None]:
        return [self.known[member].floor for member in members]


def number_of(status: Status) -> int:
    """Return the number of the transaction in a group member's message, 0 for none."""
    return int(status.message) if status.message.isdigit() else 0
