"""Jobs in, one report out: how every kind of crash test spreads its points over processes."""

from collections.abc import Iterable, Sized

from limpet.engine.testing.pool import Job, Lost, Pool, Prepare
from limpet.engine.testing.workload import Finding, Progress, Report


def run_jobs(
    prepare: Prepare[Job, Report],
    jobs: Iterable[Job],
    *,
    workers: int,
    deadline_seconds: float,
    progress: Progress | None,
) -> Report:
    """Do the jobs in `workers` processes and add up their reports.

    A job that hangs for `deadline_seconds`, or crashes its process, is a finding: what remained of it was
    not tried.
    """
    report = Report()
    total = len(jobs) if isinstance(jobs, Sized) else 0
    with Pool(prepare, workers=workers, deadline_seconds=deadline_seconds) as pool:
        for done, result in enumerate(pool.map(jobs), 1):
            report += report_lost(result) if isinstance(result, Lost) else result
            if progress is not None:
                progress(done, max(done, total))
    return report


def report_lost(lost: Lost) -> Report:
    """Return the report of a job that did not end."""
    message = f"the check did not end: {lost.reason}; the points after it in its job were not tried"
    return Report.of([Finding(lost.mark, "other", message)], points=1)
