"""`limpet images`: the images that containers are made from."""

import os
from collections.abc import Iterator

import click

from limpet.engine.cli.options import Place, no_trunc_option, output_option, place_option
from limpet.engine.cli.output import Cell, Column, age, print_json, print_table, rfc3339, size
from limpet.engine.images import ImageSummary, list_images
from limpet.engine.inspection.snapshot import require_state
from limpet.engine.state.names import IMAGES

_COLUMNS = (Column("IMAGE", keeps_end=True), Column("DIGEST"), Column("SIZE"), Column("BUILT"))
_SHORT_DIGEST = len("sha256:") + 12


@click.command("images")
@no_trunc_option
@output_option
@place_option
def command(place: Place, *, no_trunc: bool, as_json: bool) -> None:
    """List the images in the state directory, by name. The image `host` is this machine itself: it has no layers."""
    images = list_images(os.path.join(require_state(place.state_dir), IMAGES))
    if as_json:
        print_json(images=[_make_document(image) for image in images])
    else:
        print_table(_COLUMNS, list(_make_rows(images, no_trunc=no_trunc)), no_trunc=no_trunc)


def _make_document(image: ImageSummary) -> dict[str, object]:
    return {
        "name": str(image.name),
        "digest": image.digest or None,
        "bytes": image.size,
        "created_at": rfc3339(image.created_at),
    }


def _make_rows(images: list[ImageSummary], *, no_trunc: bool) -> Iterator[list[str | Cell]]:
    for image in images:
        digest = image.digest if no_trunc else image.digest[:_SHORT_DIGEST]
        built = f"{age(image.created_at)} ago" if image.created_at else "-"
        if not image.digest:
            yield [str(image.name), "built in", "-", "-"]
        else:
            yield [str(image.name), digest, size(image.size), built]
