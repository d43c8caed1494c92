"""What is concluded from figures: ratios turn by turn, goals, and what got worse since an earlier run."""

import re
from pathlib import Path

import pytest

from limpet.benchmarks import command as bench_command
from limpet.benchmarks.compare import Change, compare, find_differences, judge_change
from limpet.benchmarks.experiments import EXPERIMENTS, METRICS, PER_SECOND
from limpet.benchmarks.figures import BenchReport, Case, Metric, Outcome, Series, Spread, times_as_good
from limpet.benchmarks.goals import GOALS, Figure, Goal, judge
from limpet.benchmarks.run import Settings, choose_cases, make_ratios, make_series, order_cells
from limpet.benchmarks.saved import load_report
from limpet.benchmarks.tables import describe, describe_comparison

P50 = Metric("p50_us", "p50", "us")


def series_of(contender: str, *values: float | None, experiment: str = "threads", size: int = 1) -> Series:
    """Return a series with a p50 and a throughput for each turn; None for a turn that failed."""
    outcomes = {
        turn: Outcome(failed="no") if value is None else Outcome(figures={"p50_us": value, "per_second": 1e6 / value})
        for turn, value in enumerate(values)
    }
    return make_series(Case(experiment, contender, size), outcomes)


def report_of(*series: Series, **machine: object) -> BenchReport:
    """Return a report with these series."""
    known = {one.case: one for one in series}
    return BenchReport(
        at="2026-01-01T00:00:00Z",
        took_seconds=1.0,
        machine={"cpu": "c", "cores": 2, "memory_bytes": 1, "kernel": "k", "file_system": "ext4", "durable": True}
        | machine,
        versions={"python": "3.11"},
        settings={"extent": "normal", "turns": 3, "seconds": 1.0, "seed": 1},
        series=list(series),
        ratios=list(make_ratios(known)),
        goals=[judge(goal, known) for goal in GOALS],
    )


def test_ratios_pair_what_ran_in_the_same_turn() -> None:
    """A disk that is ten times slower in one turn changes no ratio, and a turn that one side missed counts for none."""
    limpet, files = series_of("limpet", 10, 100, 7), series_of("files", 40, 400, None)
    assert times_as_good(P50, limpet, files) == Spread(median=4.0, low=4.0, high=4.0, count=2)
    assert times_as_good(PER_SECOND, files, limpet) == Spread(median=0.25, low=0.25, high=0.25, count=2)


def test_every_row_has_its_ratio_to_limpet_and_to_one_flush() -> None:
    """The ratios of a report name each pair once, limpet beside each other and each beside one flush."""
    report = report_of(
        series_of("limpet", 10), series_of("one-flush", 5), series_of("files", 40), series_of("files", 80, size=64)
    )
    found = {(one.contender, one.size, one.beside, one.metric): one.times.median for one in report.ratios}
    assert found["limpet", 1, "files", "p50_us"] == 4.0
    assert found["files", 64, "one-flush", "per_second"] == 0.0625
    assert ("limpet", 64, "files", "p50_us") not in found, "limpet was not measured there"
    assert len(found) == len(report.ratios)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((9, 10, 11), (9, 10, 11), Change.SAME),
        ((9, 10, 11), (10.5, 10.8, 12), Change.SAME),  # the new median was seen before
        ((9, 10, 18), (12, 20, 30), Change.WORSE),
        ((9, 10, 18), (9.5, 20, 30), Change.SAME),  # the old median is seen now
        ((9.9, 10, 10.1), (10.2, 10.3, 10.4), Change.SAME),  # beyond the spread, but next to nothing
        ((9, 10, 11), (4, 5, 6), Change.BETTER),
        ((10, 10), (50, 50, 50), Change.UNCERTAIN),
    ],
)
def test_a_change_is_told_only_beyond_the_spread(
    before: tuple[float, ...], after: tuple[float, ...], expected: Change
) -> None:
    """Better and worse are said of medians that the other run did not see, if both had turns enough."""
    times = Spread.of(before).median / Spread.of(after).median  # less is better here
    assert judge_change(Spread.of(before), Spread.of(after), times) is expected


def test_comparison_says_what_got_worse_and_what_else_differs() -> None:
    """More per second is better, more microseconds are worse; another kernel is named beside them."""
    before = report_of(series_of("limpet", 9, 10, 11), series_of("lmdb", 5, 5, 5))
    after = report_of(series_of("limpet", 19, 20, 21), series_of("files", 1, 1, 1), kernel="k2")
    (found,) = compare(before, after, METRICS)
    assert (found.case.contender, found.change, found.times) == ("limpet", Change.WORSE, 0.5)
    lines = "\n".join(describe_comparison([found], find_differences(before, after)))
    assert "kernel: k, now k2" in lines
    assert "0.50x" in lines


LIMPET, ONE_FLUSH, LMDB = (Figure("threads", contender, 1, "p50_us") for contender in ("limpet", "one-flush", "lmdb"))


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal("", "at most", 1.5, LIMPET, ONE_FLUSH), False),
        (Goal("", "at most", 2.0, LIMPET, ONE_FLUSH), True),
        (Goal("", "at least", 2.0, LIMPET, ONE_FLUSH), True),
        (Goal("", "at least", 2.1, LIMPET, ONE_FLUSH), False),
        (Goal("", "at most", 4.9, LIMPET, ONE_FLUSH, "more than"), False),
        (Goal("", "at most", 5.0, LIMPET, ONE_FLUSH, "more than"), True),
        (Goal("", "at most", 10, LIMPET), True),
        (Goal("", "at most", 10, LIMPET._replace(size=64)), None),
        (Goal("", "at most", 10, LIMPET, LMDB), None),
    ],
)
def test_a_goal_is_judged_by_the_median_of_its_turns(goal: Goal, expected: bool | None) -> None:
    """Reached, not reached, or not measured: a side that is missing is never a goal that was reached."""
    series = {one.case: one for one in (series_of("limpet", 8, 10, 12), series_of("one-flush", 4, 5, 6))}
    assert judge(goal, series).reached is expected


def test_each_turn_measures_everything_once_and_what_is_compared_close_together() -> None:
    """A seed repeats the order, turns differ, and nothing comes between cells with as many callers."""
    settings = Settings(directory=".", repeat=2, seed=5)
    cases = list(choose_cases(settings))
    order = list(order_cells(cases, settings))
    assert order == list(order_cells(cases, settings))
    turns = [[case for turn, case in order if turn == number] for number in range(2)]
    assert turns[0] != turns[1]
    assert sorted(turns[0]) == sorted(turns[1]) == sorted(cases)
    places = [
        place for place, case in enumerate(turns[0]) if case.experiment in {"threads", "tasks"} and case.size == 64
    ]
    assert places == list(range(places[0], places[-1] + 1))


def test_each_goal_is_about_something_that_is_measured() -> None:
    """A goal that names a case or a figure which no full run has would never be judged."""
    for goal in GOALS:
        for figure in filter(None, (goal.figure, goal.beside)):
            experiment = EXPERIMENTS[figure.experiment]
            entry = experiment.contenders[figure.contender]
            assert figure.size in experiment.sizes["full"], goal
            assert entry.least <= figure.size <= entry.most, goal


def test_the_command_knows_all_experiments() -> None:
    """`--only` offers the names of the table, which is not loaded for `--help`."""
    assert list(EXPERIMENTS) == list(bench_command.EXPERIMENTS)


def test_tables_name_what_is_missing_failed_or_not_durable() -> None:
    """Whoever reads only the table learns which rows are worth nothing, or promise less."""
    failed = make_series(Case("threads", "lmdb", 1), {0: Outcome(failed="MapFullError: full")})
    missing = make_series(Case("threads", "diskcache", 1), {0: Outcome(missing="diskcache is not installed")})
    report = report_of(series_of("files-unflushed", 10), failed, missing, file_system="tmpfs", durable=False)
    text = "\n".join(describe(report))
    assert re.search(r"file per container, directory not flushed .*not durable", text)
    assert re.search(r"diskcache, flushed .*not installed", text)
    assert "FAILED threads, LMDB, 1: MapFullError: full" in text
    assert "NOTHING HERE WAS DURABLE" in text


@pytest.mark.long
def test_the_legend_has_each_contender_once(tmp_path: Path) -> None:
    """limpet from threads and from asyncio tasks is one line of the legend; a line is named after what was measured."""
    from limpet.benchmarks.plots import draw_plots

    report = load_report(str(Path(__file__).parents[2] / "benchmarks" / "results" / "2-cores-ext4.json"))
    list(draw_plots(report, str(tmp_path)))
    drawing = (tmp_path / "throughput.svg").read_text()
    names = re.findall(r"<!-- (.*?) -->", drawing.partition('id="legend_1"')[2])
    contenders = {one.contender for one in (*report.of("threads"), *report.of("tasks"))}
    assert len(names) == len(set(names)) == len(contenders)
    assert {"limpet", "512 bytes + fdatasync, one writer"} <= set(names)


def test_a_report_of_lives_tells_every_ratio_that_a_life_is_judged_by() -> None:
    """Beside 1,000 that run as beside 10, beside Popen and crun, and limpet's share beyond conmon and runtime."""
    metrics = {metric.key for metric in EXPERIMENTS["life"].metrics} | {"life_us", "beyond_us", "life_beyond_us"}
    metrics |= {f"turns_{name}_us" for name in ("start", "life", "popen", "crun")}
    cases = list(choose_cases(Settings(directory=".", only=["life"])))
    report = report_of(*(make_series(case, {0: Outcome(figures=dict.fromkeys(metrics, 7.0))}) for case in cases))
    text = "\n".join(describe(report))
    measured = {goal.goal for goal in report.goals if goal.measured is not None}
    assert measured >= {goal.text for goal in GOALS if goal.figure.experiment == "life"}
    for words in (
        "start: p50, of Popen and its wait",
        "create to delete, of crun's",
        "in turns, after rests: start p50, of Popen and its wait",
        "in turns, after rests: create to delete, of crun's",
        "16 threads: lives a second",
        "1,000 running: release, of that with 10",
        "1,000 running: delete, of that with 10",
        "1,000 running: removed a second, with their sandbox",
        "runc: start p50, beyond runc's under conmon",
        "crun: start p50, beyond crun's under conmon",
        "runc: create to delete, beyond runc's under conmon",
        "crun: create to delete, beyond crun's under conmon",
    ):
        assert re.search(rf"^{re.escape(words)} .*reached", text, re.MULTILINE), words
    for row in ("limpet with runc +100 ", "crun under conmon +10 "):
        assert re.search(f"^{row}", text, re.MULTILINE), row
