"""`limpet check`: check the state for damage."""

from collections.abc import Iterator

import click
import msgspec

from limpet.engine.cli.exits import DAMAGED, UNRESOLVED
from limpet.engine.cli.options import Place, output_option, place_option
from limpet.engine.cli.output import fill, paint, print_json, print_lines, rfc3339
from limpet.engine.inspection.check import Aspect, CheckReport, check_state


@click.command("check")
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, *, as_json: bool) -> None:
    """Check the permissions, the WAL, the database, each record and each bundle.

    Changes nothing. The exit status is 6 if the store is damaged, 7 if anything else is wrong.
    """
    report = check_state(place.state_dir, node=place.node)
    if as_json:
        print_json(check={**msgspec.to_builtins(report), "at": rfc3339(report.at), "damaged": report.is_damaged})
    else:
        print_lines(_describe(report))
    ctx.exit(DAMAGED if report.is_damaged else UNRESOLVED if report.problems else 0)


def _describe(report: CheckReport) -> Iterator[str]:
    yield paint(report.state_dir, "bold")
    for aspect in Aspect:
        problems = [problem.message for problem in report.problems if problem.aspect is aspect]
        if problems:
            yield _line("WRONG", "red", aspect.value, f"{len(problems)} problem{'s' if len(problems) > 1 else ''}")
        elif aspect in report.checked:
            yield _line("ok", "green", aspect.value, report.checked[aspect])
        else:
            yield _line("-", "yellow", aspect.value, "could not be checked")
        for message in problems:
            yield from fill(message, 9)
    for text in report.notes:
        yield from fill(f"note: {text}", 2)


def _line(word: str, colour: str, aspect: str, text: str) -> str:
    return f"  {paint(f'{word:5}', colour)}  {aspect:9}  {text}"
