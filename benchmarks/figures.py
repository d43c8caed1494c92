"""The results of a benchmark run: figures of each cell, and the medians, spreads and ratios computed from them.

Pure: nothing here measures. The structs are the JSON document; fields with units have them in their names.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

SCHEMA_VERSION = 1
"""The version of the JSON document. Increase it when a key is renamed, removed, or changes meaning."""
Figures = dict[str, float]
"""The result of a cell: a value for each metric of its experiment, by the metric's key."""


class Metric(NamedTuple):
    """One figure of an experiment. `unit` is "" for a bare number."""

    key: str
    title: str
    unit: str
    more_is_better: bool = False


class Case(NamedTuple):
    """What is measured in each turn: a contender of an experiment, at one size."""

    experiment: str
    contender: str
    size: int


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One case in one turn: the input of its process."""

    experiment: str
    contender: str
    size: int
    seconds: float
    """How long to run, if time is the limit."""
    directory: str
    """An empty directory for this cell, on the disk to measure."""
    stage: str = ""
    """The directory of the population, for experiments that use it."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The output of a cell's process."""

    figures: Figures = {}
    missing: str = ""
    """Why it cannot run here, such as a package that is not installed."""
    failed: str = ""
    """What failed."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one turn. Runs with the same turn were made close together."""

    turn: int
    figures: Figures


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The median of some values, and their range."""

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
    """The contender's display name."""
    size: int
    caveat: str
    """A promise that others make and it does not; "" if none."""
    missing: str
    failed: str
    runs: list[Run]
    spreads: dict[str, Spread]
    """The spread of each metric."""

    @property
    def case(self) -> Case:
        """The measured case."""
        return Case(self.experiment, self.contender, self.size)

    def median(self, metric: str) -> float | None:
        """Return the median of a metric, None if it was not measured."""
        return self.spreads[metric].median if metric in self.spreads else None


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times better one contender was than another in the same turns, which cancels out drifting disk speed."""

    experiment: str
    metric: str
    size: int
    contender: str
    beside: str
    beside_size: int
    times: Spread


class GoalResult(msgspec.Struct, frozen=True, kw_only=True):
    """A goal, and its result."""

    goal: str
    bound: str
    measured: Spread | None
    """None if this run did not measure both sides of it."""
    unit: str
    reached: bool | None


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured, and on which machine."""

    schema_version: int = SCHEMA_VERSION
    at: str
    """When it began, in RFC 3339."""
    took_seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    series: list[Series]
    ratios: list[Ratio]
    goals: list[GoalResult]

    @property
    def failures(self) -> list[Series]:
        """What failed; missing packages are not failures."""
        return [series for series in self.series if series.failed]

    def of(self, experiment: str) -> list[Series]:
        """Return the series of one experiment."""
        return [series for series in self.series if series.experiment == experiment]

    def find_ratio(self, case: Case, metric: str, beside: str) -> Ratio | None:
        """Return how a case compares with another contender, None if that was not measured."""
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
    """Return how many times better `one` was than `other`, turn by turn; None if they share no turn."""
    values = [a / b if metric.more_is_better else b / a for a, b in pair(one, metric.key, other, metric.key) if a and b]
    return Spread.of(values) if values else None
