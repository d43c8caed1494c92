"""Jobs in, one report out: how every kind of crash test distributes its points over processes."""

from collections.abc import Iterable, Sized

from limpet.testing.pool import Job, Lost, Pool, Prepare
from limpet.testing.workload import Finding, NothingToTestError, Progress, Report


def run_jobs(
    prepare: Prepare[Job, Report],
    jobs: Iterable[Job],
    *,
    counted: Report,
    workers: int,
    deadline_seconds: float,
    progress: Progress | None,
) -> Report:
    """Do the jobs in `workers` processes and add up their reports. `counted` is one point's report, without findings.

    A job that hangs for `deadline_seconds`, or crashes its process, is a finding: its remaining points were not tried.
    Raises NothingToTestError if there are no jobs.
    """
    total = len(jobs) if isinstance(jobs, Sized) else None
    if total == 0:
        raise NothingToTestError("no point of the workload's life was chosen: it has fewer than `every`")
    report, done = Report(), 0
    with Pool(prepare, workers=workers, deadline_seconds=deadline_seconds) as pool:
        for result in pool.map(jobs):
            if isinstance(result, Report):
                report += result
                continue
            if isinstance(result, Lost):
                report += _report_lost(result) + counted
            done += 1
            if progress is not None:
                progress(done, max(done, total or 0))
    return report


def _report_lost(lost: Lost) -> Report:
    message = f"the check did not end: {lost.reason}; later points of its job were not tried"
    return Report.of([Finding(lost.mark, "other", message)])
