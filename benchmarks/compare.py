"""What got faster or slower between two runs. Pure."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from limpet.benchmarks.figures import BenchReport, Case, Metric, Series, Spread

MIN_RUNS = 3
MIN_CHANGE = 0.05
_SAME_MACHINE = ("cpu", "cores", "kernel", "file_system")
_SAME_SETTINGS = ("quick", "seconds")


class Change(StrEnum):
    """How a figure changed."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    UNCERTAIN = "too few turns to tell"


class Comparison(NamedTuple):
    """One case before and after. `times` is how many times better it is now: below 1 it got worse."""

    case: Case
    label: str
    metric: Metric
    before: Spread
    after: Spread
    times: float
    change: Change


def compare(before: BenchReport, after: BenchReport, metrics: Mapping[str, Metric]) -> Iterator[Comparison]:
    """Compare the cases that both runs measured, by the metric of their experiment in `metrics`."""
    for series in after.series:
        metric, earlier = metrics.get(series.experiment), before.find(series.case)
        if metric is None or earlier is None:
            continue
        found = _compare(earlier, series, metric)
        if found is not None:
            yield found


def _compare(earlier: Series, series: Series, metric: Metric) -> Comparison | None:
    before, after = earlier.spreads.get(metric.key), series.spreads.get(metric.key)
    if before is None or after is None or not before.median or not after.median:
        return None
    times = after.median / before.median if metric.more_is_better else before.median / after.median
    return Comparison(series.case, series.label, metric, before, after, times, judge_change(before, after, times))


def judge_change(before: Spread, after: Spread, times: float) -> Change:
    """Return whether a change exceeds the spread: each median lies outside the other run's range."""
    if min(before.count, after.count) < MIN_RUNS:
        return Change.UNCERTAIN
    within = before.low <= after.median <= before.high or after.low <= before.median <= after.high
    if within or abs(times - 1) < MIN_CHANGE:
        return Change.SAME
    return Change.BETTER if times > 1 else Change.WORSE


def find_differences(before: BenchReport, after: BenchReport) -> list[str]:
    """Return other differences between the runs that may affect their figures."""
    pairs = [(name, before.machine.get(name), after.machine.get(name)) for name in _SAME_MACHINE]
    pairs += [(name, before.settings.get(name), after.settings.get(name)) for name in _SAME_SETTINGS]
    names = sorted({*before.versions, *after.versions} - {"commit"})
    pairs += [(name, before.versions.get(name), after.versions.get(name)) for name in names]
    return [f"{name}: {old}, now {new}" for name, old, new in pairs if old != new]
