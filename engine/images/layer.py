"""Applies one layer to a tree: its members, its whiteouts, and whether an error is the layer's or the disk's.

Source: image-spec layer.md. A whiteout removes files of lower layers, never files of its own layer, in
whichever order the two appear in the archive.
"""

import errno
from collections.abc import Iterator
from contextlib import suppress

from limpet.engine.images.limits import Budget
from limpet.engine.images.tar import Chunks, Kind, Member
from limpet.engine.images.tar_fields import show
from limpet.engine.images.tree import Tree
from limpet.schema.errors import InvalidInputError

WHITEOUT_PREFIX = b".wh."
OPAQUE_WHITEOUT = b".wh..wh..opq"
AUFS_PREFIX = b".wh..wh."
"""Directories in which aufs keeps its own data; every reader of layers skips them."""

MAX_PATH_BYTES = 4095
"""PATH_MAX without its NUL: longer paths cannot be opened."""

_FAULT_OF_MEMBER = frozenset(
    {
        errno.EEXIST,
        errno.EFBIG,
        errno.EILSEQ,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EOPNOTSUPP,
        errno.EOVERFLOW,
        errno.EPERM,
        errno.EXDEV,
    }
)
"""Errors caused by an invalid name, link or owner; any other is the disk's."""


def apply_layer(tree: Tree, members: Iterator[tuple[Member, Chunks]], budget: Budget) -> None:
    """Apply the members to the tree. Raises InvalidInputError naming the member; OSError if the disk fails."""
    layer = _Layer(tree, budget)
    for member, chunks in members:
        try:
            layer.apply(member, chunks)
        except InvalidInputError as error:
            raise InvalidInputError(f"member {show(member.name)}: {error}") from error
        except OSError as error:
            if error.errno not in _FAULT_OF_MEMBER:
                raise
            raise InvalidInputError(f"member {show(member.name)}: {error.strerror}") from error


class _Layer:
    """The members of one layer, and the paths it has created so far."""

    def __init__(self, tree: Tree, budget: Budget) -> None:
        self._tree = tree
        self._budget = budget
        self._brought: set[bytes] = set()
        """This layer's paths and all their parent directories: its whiteouts must not remove them."""

    def apply(self, member: Member, chunks: Chunks) -> None:
        """Apply one member."""
        path = clean_path(member.name)
        above, _, name = path.rpartition(b"/")
        if any(part.startswith(WHITEOUT_PREFIX) for part in above.split(b"/")):
            if AUFS_PREFIX not in above:
                raise InvalidInputError("one of its parent directories has the name of a whiteout")
        elif name == OPAQUE_WHITEOUT:
            self._hide_lower(self._tree.children(above))
        elif name.startswith(WHITEOUT_PREFIX):
            self._hide_lower([_join(above, _hidden_name(name))])
        else:
            self._bring(path)
            _put(self._tree, path, member, chunks)

    def _bring(self, path: bytes) -> None:
        while path not in self._brought:
            self._budget.take_name(path)
            self._brought.add(path)
            path = path.rpartition(b"/")[0]

    def _hide_lower(self, paths: list[bytes]) -> None:
        """Remove these paths and everything below them, except what this layer created."""
        while paths:
            path = paths.pop()
            if path not in self._brought:
                self._tree.remove(path)
                continue
            with suppress(NotADirectoryError):
                paths.extend(self._tree.children(path))


def clean_path(name: bytes) -> bytes:
    """Return a member's name as a path below the root; b"" is the root itself.

    Raises InvalidInputError if the name is absolute, contains "..", or cannot be a path.
    """
    if name.startswith(b"/"):
        raise InvalidInputError("its path is absolute; paths in a layer are relative to the root")
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise InvalidInputError("its path contains '..'")
    path = b"/".join(parts)
    if not name or b"\0" in path or len(path) > MAX_PATH_BYTES:
        raise InvalidInputError(f"its path is empty, contains a NUL, or is longer than {MAX_PATH_BYTES} bytes")
    return path


def _put(tree: Tree, path: bytes, member: Member, chunks: Chunks) -> None:
    match member.kind:
        case Kind.DIRECTORY:
            tree.put_directory(path, member.attributes)
        case Kind.FILE:
            tree.put_file(path, member.attributes, member.size, chunks)
        case Kind.SYMLINK:
            if b"\0" in member.link:
                raise InvalidInputError("it is a symbolic link whose target contains a NUL")
            tree.put_symlink(path, member.attributes, member.link)
        case Kind.HARD_LINK:
            tree.put_hard_link(path, _link_path(member.link))
        case Kind.FIFO:
            tree.put_fifo(path, member.attributes)
        case Kind.CHARACTER_DEVICE | Kind.BLOCK_DEVICE:
            raise InvalidInputError(f"it is a {member.kind.value}, which limpet does not create")


def _link_path(link: bytes) -> bytes:
    try:
        return clean_path(link)
    except InvalidInputError as error:
        raise InvalidInputError(f"it is a hard link to {show(link)}: {error}") from error


def _hidden_name(whiteout: bytes) -> bytes:
    name = whiteout.removeprefix(WHITEOUT_PREFIX)
    if name in {b"", b".", b".."}:
        raise InvalidInputError("it is a whiteout without a file name")
    return name


def _join(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name
