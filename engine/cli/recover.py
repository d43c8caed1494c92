"""`limpet recover`: recover the state after a crash; with --dry-run, only show what recovery would do."""

from collections.abc import Iterator

import click

from limpet.engine.cli.documents import report_document
from limpet.engine.cli.exits import UNRESOLVED
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, no_trunc_option, output_option, place_option
from limpet.engine.cli.output import (
    Cell,
    Column,
    Ids,
    fill,
    note,
    paint,
    print_json,
    print_lines,
    render_table,
    state_cell,
    terminal_width,
)
from limpet.engine.control.requests import Recover
from limpet.engine.inspection.dry_run import predict_recovery
from limpet.engine.inspection.snapshot import Snapshot
from limpet.recovery.evidence import Boot, Bundle, classify
from limpet.recovery.orphans import Disposal, Orphan
from limpet.recovery.report import Finding, Report
from limpet.recovery.rules import RULES
from limpet.schema.decoders import make_converter
from limpet.schema.status import Status

_COLUMNS = (
    Column("CONTAINER"),
    Column("STAGE"),
    Column("EVIDENCE", flexible=True),
    Column("VERDICT"),
    Column("RULE"),
)
_to_status = make_converter(Status)
_STAGES = {rule.label: rule.stage.value for rule in RULES}
_NOT_LOOKED_AT = {"damaged", "not-observed"}
_DISPOSALS = {
    Disposal.REMOVE: ("would be removed", "removed"),
    Disposal.QUARANTINE: ("would be moved to quarantine", "moved to quarantine"),
    Disposal.LEAVE: ("would be left in place", "left in place"),
}


@click.command("recover")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what recovery would do; change nothing. Can be used while an engine is running.",
)
@no_trunc_option
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, *, dry_run: bool, no_trunc: bool, as_json: bool) -> None:
    """Find the actual state of every container that has not exited, and record it with the reason.

    A live engine does it. Otherwise one is opened: that locks the state directory, upgrades an older schema, removes
    unfinished bundles and moves orphans to quarantine. Running processes are left running. The exit status is 7 if a
    container's state remains unknown or an action failed.
    """
    report = _plan(place) if dry_run else _recover(place)
    if as_json:
        print_json(report=report_document(report))
    else:
        print_lines(_describe(report, no_trunc=no_trunc))
    ctx.exit(UNRESOLVED if report.has_unresolved else 0)


def _recover(place: Place) -> Report:
    with Hands(place) as hands:
        report: Report = hands.ask(Recover())
    return report


def _plan(place: Place) -> Report:
    with Snapshot.open(place.state_dir, node=place.node) as snapshot:
        if snapshot.holder is not None:
            note(f"limpet: engine {snapshot.holder} is running; this shows the recovery if it were killed now")
        return predict_recovery(snapshot)


def _describe(report: Report, *, no_trunc: bool) -> Iterator[str]:
    if report.findings:
        yield from _table(report, no_trunc=no_trunc)
        yield ""
    for sandbox in report.sandboxes:
        yield from fill(f"sandbox {sandbox.id}: {sandbox.state}; {sandbox.rule}: {sandbox.because}", 0)
    for orphan in report.orphans:
        yield from fill(_describe_orphan(orphan, dry_run=report.dry_run), 0)
    yield from fill(_sum_up(report), 0)
    if report.has_unresolved:
        yield from fill("Something is unresolved: find the cause with limpet inspect, fix it, and recover again.", 0)


def _sum_up(report: Report) -> str:
    name = "dry run, nothing changed" if report.dry_run else f"recovery {report.number}"
    counts = ", ".join(f"{count} {state}" for state, count in report.totals.items() if count)
    examined = f"{len(report.findings)} examined" + (f" ({counts})" if counts else "")
    took = f"{report.took_ns / 1e6:.1f} ms"
    return f"{name}: {examined}, {report.settled} already exited, {len(report.orphans)} orphans, {took}"


def _table(report: Report, *, no_trunc: bool) -> Iterator[str]:
    ids = Ids((finding.id for finding in report.findings), no_trunc=no_trunc)
    rows = [_make_row(finding, ids) for finding in report.findings]
    reasons = [_explain(finding) for finding in report.findings]
    if terminal_width() is None:  # one line per container, for programs
        yield from render_table(
            (*_COLUMNS, Column("BECAUSE")), [[*row, why] for row, why in zip(rows, reasons, strict=True)], None
        )
        return
    header, *lines = render_table(_COLUMNS, rows, None if no_trunc else terminal_width())
    yield header
    for line, reason in zip(lines, reasons, strict=True):
        yield line
        yield from (paint(text, "dim") for text in fill(reason, 2))


def _explain(finding: Finding) -> str:
    if finding.problem and finding.problem not in finding.because:
        return f"{finding.because}; {finding.problem}"
    return finding.because


def _make_row(finding: Finding, ids: Ids) -> list[str | Cell]:
    return [
        ids.cell(finding.id),
        _name_stage(finding),
        _evidence(finding),
        state_cell(finding.state),
        finding.rule,
    ]


def _name_stage(finding: Finding) -> str:
    if finding.rule in _STAGES:
        return _STAGES[finding.rule]
    return classify(_to_status(finding.checkpoint)).value


def _evidence(finding: Finding) -> str:
    seen = finding.observation
    if finding.rule in _NOT_LOOKED_AT:
        return "not examined"
    return ", ".join(
        (
            *([f"boot {seen.boot.value}"] if seen.boot is not Boot.SAME else []),
            f"process {seen.process.value}",
            *([f"bundle {seen.bundle.value}"] if seen.bundle is not Bundle.NOT_KEPT else []),
        )
    )


def _describe_orphan(orphan: Orphan, *, dry_run: bool) -> str:
    future, past = _DISPOSALS[orphan.disposal]
    outcome = f"could not be moved or removed: {orphan.error}" if orphan.error else future if dry_run else past
    detail = f" ({orphan.facts.detail})" if orphan.facts.detail else ""
    return f"orphan {orphan.path}: {outcome}; {orphan.rule}: {orphan.because}{detail}"
