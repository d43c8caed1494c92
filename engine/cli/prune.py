"""`limpet prune`: remove what has ended."""

from collections.abc import Iterator

import click
import msgspec

from limpet.engine.cli.exits import UNRESOLVED
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.options import Place, output_option, place_option
from limpet.engine.cli.output import note, print_json, print_lines
from limpet.engine.cli.telling import tell_removal
from limpet.engine.control.requests import MADE_BY, Prune, Pruned, Removal
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import StoreDamagedError
from limpet.schema.status import ContainerState


@click.command("prune")
@click.option("--sandboxes", is_flag=True, help="Remove all sandboxes that are empty, too, also those that are READY.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; change nothing.")
@output_option
@place_option
@click.pass_context
def command(ctx: click.Context, place: Place, *, sandboxes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove all containers that have exited, with their bundles and their records.

    Those that are CREATED, RUNNING or UNKNOWN stay, and those that wait for their restart. A sandbox that was made by
    limpet run goes with its last container, others stay without --sandboxes. The exit status is 7 if something could
    not be removed.
    """
    if dry_run:
        with Snapshot.open(place.state_dir, node=place.node) as snapshot:
            pruned = Pruned(removed=tuple(_predict(snapshot, sandboxes=sandboxes)), problems={})
    else:
        with Hands(place) as hands:
            pruned = hands.ask(Prune(sandboxes=sandboxes))
    if as_json:
        print_json(**msgspec.to_builtins(pruned), dry_run=dry_run)
    else:
        print_lines(tell_removal(removal, would=dry_run) for removal in pruned.removed)
        for key, problem in pruned.problems.items():
            note(f"limpet: {key}: {problem}")
        if not pruned.removed and not pruned.problems:
            note("nothing to remove")
    ctx.exit(UNRESOLVED if pruned.problems else 0)


def _predict(snapshot: Snapshot, *, sandboxes: bool) -> Iterator[Removal]:
    in_use: dict[str, bool] = {}
    for view in snapshot.list():
        is_over = view.status.state is ContainerState.EXITED and not view.status.unknown and not view.restart_at
        in_use[view.sandbox_id] = in_use.get(view.sandbox_id, False) or not is_over
        if is_over:
            yield Removal(kind="container", id=view.id, name=view.name)
    for key in snapshot.sandbox_ids:
        try:
            metadata = snapshot.sandbox(key)
        except StoreDamagedError:
            continue
        was_used = key in in_use
        is_its_own = was_used and bool(metadata.config.annotations.get(MADE_BY))
        if not in_use.get(key, False) and (sandboxes or is_its_own):
            yield Removal(kind="sandbox", id=key, name=metadata.name)
