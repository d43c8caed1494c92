"""A campaign: so many inputs of each kind, each drawn from its own seed, counted, and findings that repeat."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.campaigns.hostile.archives import LayerWorld, LayoutWorld
from tests.campaigns.hostile.commands import CommandWorld, ProcessWorld
from tests.campaigns.hostile.engines import BundleWorld, ConfigWorld, NameWorld, PathWorld
from tests.campaigns.hostile.oracle import Fate, judge
from tests.campaigns.hostile.states import EntryWorld, RowWorld

_MEMORY = "/dev/shm"  # what is tried here is not whether a disk flushes


class Kind(NamedTuple):
    """A kind of input."""

    world: Callable[[Path], Any]
    share: float
    """Of the inputs of a campaign."""
    renewed_after: int
    """Inputs that share one world, for speed; what they leave in it is a finding of its own."""


KINDS: dict[str, Kind] = {
    "config": Kind(ConfigWorld, 0.30, 500),
    "name": Kind(NameWorld, 0.22, 500),
    "path": Kind(PathWorld, 0.08, 300),
    "bundle": Kind(BundleWorld, 0.02, 100),
    "layer": Kind(LayerWorld, 0.16, 1000),
    "layout": Kind(LayoutWorld, 0.08, 1000),
    "entry": Kind(EntryWorld, 0.035, 1000),
    "row": Kind(RowWorld, 0.03, 1000),
    "command": Kind(CommandWorld, 0.07, 1000),
    "process": Kind(ProcessWorld, 0.005, 1000),
}


class Finding(NamedTuple):
    """One input that broke a promise."""

    kind: str
    number: int
    seed: int
    shown: str
    words: str
    repeats: bool
    """True if it did so again, alone in a world of its own."""

    @property
    def command(self) -> str:
        """What repeats it."""
        return f"python -m tests.campaigns.hostile --kind {self.kind} --seed {self.seed} --only {self.number}"

    def __str__(self) -> str:
        alone = "" if self.repeats else " (not alone: it needs those before it)"
        return f"{self.kind} {self.number}{alone}: {self.shown[:900]}\n    {self.words}\n    repeat: {self.command}"


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    counts: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(Fate, 0))
    findings: list[Finding] = field(default_factory=list)


@contextmanager
def fresh_place(base: str | None) -> Iterator[Path]:
    """Make a directory for a world, in memory unless `base` says where, and remove it with all that is in it."""
    if base is None and os.access(_MEMORY, os.W_OK):
        base = _MEMORY
    place = Path(tempfile.mkdtemp(prefix="limpet-hostile-", dir=base))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run_kind(
    name: str, seed: int, numbers: range, *, base: str | None = None, note: Callable[[int], object] = lambda _: None
) -> Tally:
    """Try these inputs of one kind. The same seed and number give the same input, whatever ran before."""
    tally = Tally()
    kind = KINDS[name]
    pending = list(numbers)
    while pending:
        batch, pending = pending[: kind.renewed_after], pending[kind.renewed_after :]
        with fresh_place(base) as place:
            world, spoilt = kind.world(place), False
            while batch:
                number = batch.pop(0)
                attempt = world.draw(_random(name, seed, number))
                verdict = judge(world, attempt)
                tally.counts[verdict.fate] += 1
                note(1)
                if verdict.fate is Fate.FINDING:
                    repeats = _happens_alone(name, seed, number, base)
                    tally.findings.append(Finding(name, number, seed, attempt.shown, verdict.words, repeats))
                    pending, spoilt = batch + pending, True
                    break
            words = _close(world)
            if words and not spoilt:
                tally.counts[Fate.FINDING] += 1
                repeats = _happens_alone(name, seed, number, base)
                tally.findings.append(Finding(name, number, seed, attempt.shown, words, repeats))
    return tally


def _random(name: str, seed: int, number: int) -> Random:
    return Random(f"{name} {seed} {number}")


def _happens_alone(name: str, seed: int, number: int, base: str | None) -> bool:
    with fresh_place(base) as place:
        world = KINDS[name].world(place)
        fate = judge(world, world.draw(_random(name, seed, number))).fate
        return bool(_close(world)) or fate is Fate.FINDING


def _close(world: Any) -> str:
    """Close the world; return what went wrong: a finding, unless there is one that may have spoilt the world."""
    try:
        world.close()
    except Exception as error:  # noqa: BLE001  # whatever it is, it came of what was tried
        return f"closing the world: {type(error).__name__}: {error}"
    return ""
