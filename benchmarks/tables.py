"""The report of `limpet bench` on a terminal: a table for each experiment, the goals, and a comparison."""

from collections.abc import Iterator, Sequence

from limpet.benchmarks.compare import Change, Comparison
from limpet.benchmarks.experiments import EXPERIMENTS, PER_SECOND
from limpet.benchmarks.figures import BenchReport, GoalResult, Metric, Series, Spread
from limpet.benchmarks.run import FLOOR, LIMPET
from limpet.engine.cli.output import Cell, Column, Row, fill, paint, render_table, terminal_width

_VERDICTS = {True: Cell("reached", "green"), False: Cell("not reached", "red"), None: Cell("not measured", "yellow")}
_CHANGES = {Change.BETTER: "green", Change.WORSE: "red"}
_GIB = 1 << 30


def describe(report: BenchReport) -> Iterator[str]:
    """Yield all lines of the report."""
    yield from _describe_place(report)
    for name in EXPERIMENTS:
        if report.of(name):
            yield ""
            yield from _describe_experiment(report, name)
    yield ""
    yield from _describe_goals(report.goals)
    for series in report.failures:
        yield from fill(f"FAILED {series.experiment}, {series.label}, {series.size:,}: {series.failed}", 0)


def _describe_place(report: BenchReport) -> Iterator[str]:
    machine, versions, settings = report.machine, report.versions, report.settings
    memory = machine["memory_bytes"] / _GIB
    yield f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB, {machine['file_system']}"
    yield ", ".join(
        f"{name} {version}" for name, version in {"linux": machine["kernel"], **versions}.items() if version
    )
    yield (
        f"{report.at}, {report.took_seconds:.0f} s, {settings['turns']} turns, cells of {settings['seconds']:g} s,"
        f" seed {settings['seed']}"
    )
    yield from fill(
        "LIMPET: how many times better limpet was in the same turns (median, range). BARE DISK: relative to it.", 0
    )
    if settings["extent"] == "quick":
        yield paint("A quick run shows that everything works. Its figures and goals are only rough.", "bold")
    if not machine["durable"]:
        yield paint(f"{machine['file_system']} is not a disk: NOTHING HERE WAS DURABLE. Give --dir on a disk.", "red")


def _describe_experiment(report: BenchReport, name: str) -> Iterator[str]:
    experiment = EXPERIMENTS[name]
    primary, *others = experiment.metrics
    columns = [
        Column(experiment.title.upper(), flexible=True),
        Column(experiment.size_title.upper()),
        Column(primary.title.upper()),
        Column("RANGE", optional=True),
        *(Column(metric.title.upper()) for metric in others),
        *([Column("BARE DISK", optional=True)] if primary is PER_SECOND else []),
        Column("LIMPET"),
        Column("NOTE", flexible=True),
    ]
    rows = [list(_cells(report, series, primary, others)) for series in report.of(name)]
    yield from render_table(columns, rows, terminal_width())


def _cells(report: BenchReport, series: Series, primary: Metric, others: Sequence[Metric]) -> Iterator[str | Cell]:
    bold = "bold" if series.contender == LIMPET else ""
    yield Cell(series.label, bold)
    yield f"{series.size:,}"
    spread = series.spreads.get(primary.key)
    yield _with_unit(spread, primary)
    yield f"{figure(spread.low)}-{figure(spread.high)}" if spread else ""
    for metric in others:
        yield _with_unit(series.spreads.get(metric.key), metric)
    if primary is PER_SECOND:
        yield _times(report, series, primary, FLOOR, series.contender)
    yield "" if series.contender == LIMPET else _times(report, series, primary, series.contender, LIMPET)
    yield Cell(series.failed, "red") if series.failed else Cell(series.missing or series.caveat, "yellow")


def _times(report: BenchReport, series: Series, metric: Metric, beside: str, contender: str) -> str:
    ratio = report.find_ratio(series.case._replace(contender=contender), metric.key, beside)
    if ratio is None:
        return ""
    times = ratio.times
    return f"{times.median:.2f}x" if times.count == 1 else f"{times.median:.2f}x [{times.low:.2f}-{times.high:.2f}]"


def _with_unit(spread: Spread | None, metric: Metric) -> str:
    return f"{figure(spread.median)} {metric.unit}".rstrip() if spread else ""


def figure(value: float) -> str:
    """Return a figure with three digits, or more if it has more before the point."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _describe_goals(goals: Sequence[GoalResult]) -> Iterator[str]:
    columns = (
        Column("GOAL", flexible=True),
        Column("BOUND"),
        Column("MEASURED"),
        Column("RANGE", optional=True),
        Column(""),
    )
    yield from render_table(columns, [_goal_row(goal) for goal in goals], terminal_width())


def _goal_row(goal: GoalResult) -> Row:
    if goal.measured is None:
        return (goal.goal, goal.bound, "", "", _VERDICTS[None])
    measured = goal.measured
    spread = f"{figure(measured.low)}-{figure(measured.high)}"
    return (goal.goal, goal.bound, f"{figure(measured.median)} {goal.unit}".rstrip(), spread, _VERDICTS[goal.reached])


def describe_comparison(comparisons: Sequence[Comparison], differences: Sequence[str]) -> Iterator[str]:
    """Yield what changed since an earlier run."""
    yield ""
    for difference in differences:
        yield from fill(f"Changed since then: {difference}", 0)
    changed = [one for one in comparisons if one.change is not Change.SAME]
    rows: list[Row] = [
        (
            f"{one.case.experiment}: {one.label}",
            f"{one.case.size:,}",
            one.metric.title,
            _with_unit(one.before, one.metric),
            _with_unit(one.after, one.metric),
            Cell(f"{one.times:.2f}x", _CHANGES.get(one.change, "")),
            Cell(one.change.value, _CHANGES.get(one.change, "")),
        )
        for one in sorted(changed, key=lambda one: one.case.contender != LIMPET)
    ]
    if rows:
        titles = ("SINCE THEN", "SIZE", "FIGURE", "THEN", "NOW", "", "")
        yield from render_table([Column(title) for title in titles], rows, terminal_width())
    yield f"{len(comparisons) - len(changed)} of {len(comparisons)} figures are the same within their spread."
