"""What a run of the benchmark found: figures of each cell, and the medians, spreads and ratios drawn from them.

Pure: nothing here measures. The structs are the JSON document; fields with units say so in their names.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

SCHEMA_VERSION = 1
"""Of the JSON document: it grows if a key is renamed, removed, or means something else."""
Figures = dict[str, float]
"""What one cell measured: a value for each metric of its experiment, by the metric's key."""


class Metric(NamedTuple):
    """One figure of an experiment. `unit` is "" for a bare number."""

    key: str
    title: str
    unit: str
    more_is_better: bool = False


class Case(NamedTuple):
    """What is measured again in each turn: a contender of an experiment, at one size."""

    experiment: str
    contender: str
    size: int


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One case in one turn: what its process is told."""

    experiment: str
    contender: str
    size: int
    seconds: float
    """How long to go on, where it is time that limits."""
    directory: str
    """Empty, on the disk in question, and the cell's own."""
    stage: str = ""
    """The directory of the population, for experiments that use it."""
    fleet: str = ""
    """The URL of a PostgreSQL, for experiments that need one."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the process of a cell says."""

    figures: Figures = {}
    missing: str = ""
    """Why it could not be tried here, such as a package that is not installed."""
    failed: str = ""
    """What went wrong."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one turn. Runs with the same turn were made side by side."""

    turn: int
    figures: Figures


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The median of some values, and how far they lie apart."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one or more values."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), count=len(values))


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """All turns of one case."""

    experiment: str
    contender: str
    label: str
    """The contender's name in words."""
    size: int
    caveat: str
    """What it does not promise, though the others do; "" if nothing."""
    missing: str
    failed: str
    runs: list[Run]
    spreads: dict[str, Spread]
    """By metric."""

    @property
    def case(self) -> Case:
        """What was measured."""
        return Case(self.experiment, self.contender, self.size)

    def median(self, metric: str) -> float | None:
        """Return the median of a metric, None if there is none."""
        return self.spreads[metric].median if metric in self.spreads else None


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as good one contender was as another in the same turns; the drift in disk speed cancels out."""

    experiment: str
    metric: str
    size: int
    contender: str
    beside: str
    beside_size: int
    times: Spread


class GoalResult(msgspec.Struct, frozen=True, kw_only=True):
    """One goal, and what came of it."""

    goal: str
    bound: str
    measured: Spread | None
    """None if a side of it was not measured in this run."""
    unit: str
    reached: bool | None


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured, and where."""

    schema_version: int = SCHEMA_VERSION
    at: str
    """When it began; RFC 3339."""
    took_seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    series: list[Series]
    ratios: list[Ratio]
    goals: list[GoalResult]

    @property
    def failures(self) -> list[Series]:
        """What went wrong; what is only missing here did not."""
        return [series for series in self.series if series.failed]

    def of(self, experiment: str) -> list[Series]:
        """Return the series of one experiment."""
        return [series for series in self.series if series.experiment == experiment]

    def find_ratio(self, case: Case, metric: str, beside: str) -> Ratio | None:
        """Return how a case did beside another contender, None if that was not measured."""
        wanted = (case.experiment, metric, case.size, case.contender, beside)
        return next(
            (one for one in self.ratios if (one.experiment, one.metric, one.size, one.contender, one.beside) == wanted),
            None,
        )

    def find(self, case: Case) -> Series | None:
        """Return the series of one case, None if it is not in the report."""
        return next((series for series in self.series if series.case == case), None)


def pair(one: Series, one_metric: str, other: Series, other_metric: str) -> Iterator[tuple[float, float]]:
    """Yield the two figures of each turn that has both."""
    others = {run.turn: run.figures for run in other.runs}
    for run in one.runs:
        if one_metric in run.figures and other_metric in others.get(run.turn, {}):
            yield run.figures[one_metric], others[run.turn][other_metric]


def times_as_good(metric: Metric, one: Series, other: Series) -> Spread | None:
    """Return how many times as good `one` was as `other`, turn by turn; None if they have no turn in common."""
    values = [a / b if metric.more_is_better else b / a for a, b in pair(one, metric.key, other, metric.key) if a and b]
    return Spread.of(values) if values else None
