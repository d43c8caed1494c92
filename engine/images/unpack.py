"""Unpacks an image's layers, one on top of the other, into one directory: MountType.PLAIN."""

from collections.abc import Sequence
from typing import NamedTuple

from limpet.engine.images.layer import apply_layer, make_volume
from limpet.engine.images.limits import Budget
from limpet.engine.images.streams import SNIFFED_BYTES, Decompressor, HashingReader, sniff
from limpet.engine.images.tar import read_tar
from limpet.engine.images.tar_fields import show
from limpet.engine.images.tree import Tree
from limpet.schema.errors import InvalidInputError, StoreDamagedError


class LayerFile(NamedTuple):
    """A layer on disk, and the digests it must have."""

    path: str
    digest: str
    diff_id: str
    """Digest of the uncompressed tar file, from the image's configuration."""


def unpack(
    image: str,
    layers: Sequence[LayerFile],
    volumes: Sequence[str],
    target: str,
    budget: Budget,
    *,
    with_content: bool = True,
) -> None:
    """Unpack the layers, lowest first, into the empty directory `target`, and make the volumes that none brings.

    Without content, each layer is read and checked in the same way, but no data of files is written.

    Raises InvalidInputError, naming image, layer and member, for an invalid layer or volume; StoreDamagedError if a
    layer is not what was loaded; OSError. After an error the tree is incomplete.
    """
    with Tree(target, budget, with_content=with_content) as tree:
        for layer in layers:
            try:
                _unpack_layer(layer, tree, budget)
            except InvalidInputError as error:
                raise InvalidInputError(
                    f"image {image}, layer {layer.digest}: {error}; load an image built without this"
                ) from error
            except StoreDamagedError as error:
                raise StoreDamagedError(f"image {image}: {error}; load it again from a good copy") from error
        for volume in volumes:
            try:
                make_volume(tree, volume, budget)
            except InvalidInputError as error:
                raise InvalidInputError(f"image {image}, volume {show(volume.encode())}: {error}") from error
        tree.finish()


def _unpack_layer(layer: LayerFile, tree: Tree, budget: Budget) -> None:
    try:
        file = open(layer.path, "rb")  # noqa: SIM115 - closed below; reading raises the same error
    except FileNotFoundError as error:
        raise StoreDamagedError(f"the blob {layer.path} is missing") from error
    with file:
        compression = sniff(file.read(SNIFFED_BYTES))  # its media type says so, too, but is wrong at times
        file.seek(0)
        blob = HashingReader(file, layer.digest)
        content = HashingReader(Decompressor(blob, compression, budget), layer.diff_id)
        try:
            apply_layer(tree, read_tar(content, budget), budget)
            content.drain()
        except InvalidInputError:
            _require_undamaged(blob, layer)  # the image is at fault only if the disk kept it intact
            raise
        _require_undamaged(blob, layer)
    if content.digest != layer.diff_id:
        raise InvalidInputError(f"unpacks to {content.digest}, but the image's configuration says {layer.diff_id}")


def _require_undamaged(blob: HashingReader, layer: LayerFile) -> None:
    blob.drain()
    if blob.digest != layer.digest:
        raise StoreDamagedError(f"the blob {layer.path} is damaged: its content has the digest {blob.digest}")
