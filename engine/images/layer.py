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
from limpet.schema.lengths import PATH_BYTES
from limpet.schema.telling import get_log

WHITEOUT_PREFIX = b".wh."
OPAQUE_WHITEOUT = b".wh..wh..opq"
AUFS_PREFIX = b".wh..wh."
"""Directories in which aufs keeps its own data; every reader of layers skips them, but for the next one."""
AUFS_LINKS = b".wh..wh.plnk"
"""In it are the files that have several names, which are hard links to these (moby/moby, pkg/archive/diff.go)."""

WHITEOUT_DEVICE = (0, 0)
"""The numbers of the character device that overlayfs takes for a whiteout; layers made of its directories have it."""

ALLOWED_DEVICES = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)})
"""null, zero, full, random, urandom, tty, ptmx: the default devices of the runtime-spec (config-linux.md). Any other,
such as a disk that everybody may read, would give an image's author what only the host may give."""

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

_SHOWN_DEVICES = 5


_log = get_log("limpet.images")


def apply_layer(tree: Tree, members: Iterator[tuple[Member, Chunks]], budget: Budget) -> None:
    """Apply the members to the tree. Raises InvalidInputError naming the member; OSError if the disk fails.

    Device nodes that cannot or must not be made are left out, with a warning in the log.
    """
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
    layer.finish()
    if layer.left_out:
        shown = ", ".join(show(path) for path in layer.left_out[:_SHOWN_DEVICES])
        more = f" and {len(layer.left_out) - _SHOWN_DEVICES} more" if len(layer.left_out) > _SHOWN_DEVICES else ""
        _log.warning("device nodes of a layer are left out: %s%s", shown, more)


def make_volume(tree: Tree, volume: str, budget: Budget) -> None:
    """Make a directory that an image's programs count on, where no layer has brought anything.

    Raises InvalidInputError for one that cannot be; OSError if the disk fails.
    """
    try:
        above = path = _require_short(tree.follow(clean_path(volume.encode())))
        while above:
            budget.take_name(above)
            above = above.rpartition(b"/")[0]
        with suppress(NotADirectoryError):
            tree.make_directory(path)
    except OSError as error:
        if error.errno not in _FAULT_OF_MEMBER:
            raise
        raise InvalidInputError(error.strerror) from error


class _Layer:
    """The members of one layer, and the paths it has created so far."""

    def __init__(self, tree: Tree, budget: Budget) -> None:
        self._tree = tree
        self._budget = budget
        self.left_out: list[bytes] = []
        """The device nodes that were not made, and hard links to them."""
        self._brought: set[bytes] = set()
        """This layer's paths and all their parent directories: its whiteouts must not remove them."""
        self._cleared: set[bytes] = set()
        """Those of them below which nothing of lower layers is left."""
        self._has_aufs_links = False

    def apply(self, member: Member, chunks: Chunks) -> None:
        """Apply one member."""
        path = self._resolve(clean_path(member.name))
        above, _, name = path.rpartition(b"/")
        if above == AUFS_LINKS and member.kind is Kind.FILE:
            self._has_aufs_links = True
            self._bring(path)
            self._put(path, member, chunks)
        elif any(part.startswith(WHITEOUT_PREFIX) for part in above.split(b"/")):
            if AUFS_PREFIX not in above:
                raise InvalidInputError("one of its parent directories has the name of a whiteout")
        elif name == OPAQUE_WHITEOUT:
            self._clear([above])
        elif name.startswith(WHITEOUT_PREFIX):
            self._hide_lower(_join(above, _hidden_name(name)))
        elif member.kind is Kind.CHARACTER_DEVICE and member.device == WHITEOUT_DEVICE:
            self._hide_lower(path)
        else:
            self._bring(path)
            self._put(path, member, chunks)

    def finish(self) -> None:
        """Take away what was there for its hard links alone."""
        if self._has_aufs_links:
            self._tree.remove(AUFS_LINKS)

    def _put(self, path: bytes, member: Member, chunks: Chunks) -> None:
        match member.kind:
            case Kind.DIRECTORY:
                self._tree.put_directory(path, member.attributes)
            case Kind.FILE:
                self._tree.put_file(path, member.attributes, member.size, chunks)
            case Kind.SYMLINK:
                if not member.link or b"\0" in member.link:
                    raise InvalidInputError("it is a symbolic link whose target is empty or contains a NUL")
                self._tree.put_symlink(path, member.attributes, member.link)
            case Kind.HARD_LINK:
                self._put_hard_link(path, self._link_path(member.link))
            case Kind.FIFO:
                self._tree.put_fifo(path, member.attributes)
            case Kind.CHARACTER_DEVICE | Kind.BLOCK_DEVICE:
                self._put_device(path, member)

    def _put_hard_link(self, path: bytes, existing: bytes) -> None:
        if self._tree.is_left_out(existing):
            self._leave_out(path)
            return
        try:
            self._tree.put_hard_link(path, existing)
        except FileNotFoundError as error:
            raise InvalidInputError(f"it is a hard link to {show(existing)}, which is not there") from error
        except PermissionError as error:
            raise InvalidInputError(f"it is a hard link to {show(existing)}: {error.strerror}") from error

    def _put_device(self, path: bytes, member: Member) -> None:
        self._tree.remove(path)
        if member.kind is Kind.CHARACTER_DEVICE and member.device in ALLOWED_DEVICES:
            with suppress(PermissionError):  # an ordinary user, or a user namespace
                self._tree.put_character_device(path, member.attributes, member.device)
                return
        self._leave_out(path)

    def _leave_out(self, path: bytes) -> None:
        self._tree.leave_out(path)
        self.left_out.append(path)

    def _link_path(self, link: bytes) -> bytes:
        try:
            return self._resolve(clean_path(link))
        except InvalidInputError as error:
            raise InvalidInputError(f"it is a hard link to {show(link)}: {error}") from error

    def _resolve(self, path: bytes) -> bytes:
        return _require_short(self._tree.resolve(path))

    def _bring(self, path: bytes) -> None:
        while path not in self._brought:
            self._budget.take_name(path)
            self._brought.add(path)
            path = path.rpartition(b"/")[0]

    def _hide_lower(self, path: bytes) -> None:
        """Remove this path and everything below it, except what this layer created."""
        if path in self._brought:
            self._clear([path])
        else:
            self._tree.remove(path)

    def _clear(self, directories: list[bytes]) -> None:
        """Remove what lower layers have brought into these, once: nothing of theirs comes after that."""
        while directories:
            directory = directories.pop()
            if directory in self._cleared:
                continue
            self._cleared.add(directory)
            for path in self._tree.children(directory):
                if path in self._brought:
                    directories.append(path)
                else:
                    self._tree.remove(path)


def clean_path(name: bytes) -> bytes:
    """Return a member's name as a path below the root; b"" is the root itself.

    An absolute name is meant from the root, and ".." goes back one part, as in Go's filepath.Clean, which other tools
    use. Raises InvalidInputError if the name leads out of the root, or cannot be a path.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise InvalidInputError("its path leads out of the root with '..'")
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    path = b"/".join(parts)
    if not name or b"\0" in path or len(path) > PATH_BYTES:
        raise InvalidInputError(f"its path is empty, contains a NUL, or is longer than {PATH_BYTES} bytes")
    return path


def _require_short(resolved: bytes) -> bytes:
    if len(resolved) > PATH_BYTES:
        raise InvalidInputError(f"its path is longer than {PATH_BYTES} bytes once its links are followed")
    return resolved


def _hidden_name(whiteout: bytes) -> bytes:
    name = whiteout.removeprefix(WHITEOUT_PREFIX)
    if name in {b"", b".", b".."}:
        raise InvalidInputError("it is a whiteout without a file name")
    return name


def _join(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name
