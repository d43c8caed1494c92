"""The directory that a root file system is unpacked into, and all operations on it.

Every path is walked from the directory's own descriptor, one name at a time, without following a symbolic
link (openat(2), O_NOFOLLOW): whatever names and links a stranger's archive contains, nothing outside is
reached. That holds as long as nobody else moves directories about in it meanwhile. Links among the parents of a path
are resolved before, by `resolve`, as if the directory were the root of the file system.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Self

from limpet.engine.images.limits import Budget
from limpet.engine.images.tar import Attributes, Chunks
from limpet.engine.images.tar_fields import show
from limpet.engine.state.durable import empty_directory, make_one_directory
from limpet.engine.state.forks import opened_here
from limpet.schema.errors import InvalidInputError

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_IMPLIED = Attributes(mode=0o755, uid=0, gid=0, mtime_ns=None, xattrs={})
"""For the root, and for directories without a member of their own."""

KEPT_XATTRS = (b"user.", b"security.capability")
"""Kept if the file system and our rights allow it. All others belong to the host: ACLs, labels of
its security modules, and trusted.overlay.*, by which a layer could redirect a later overlay mount."""


_MAX_LINKS = 40
"""The kernel's own limit for the links in one path."""
_MAX_STEPS = 4096
"""The limit for the names in one path and in its links together."""


class Tree:
    """A tree under construction. Paths are bytes, relative, without "." and ".."; b"" is the root.

    Directories are private while files are put into them, because an ordinary user cannot fill one of mode
    0555; `finish` gives them their attributes. Owners are set only as root. OSError passes through.
    """

    def __init__(self, target: str, budget: Budget, *, with_content: bool = True) -> None:
        """Build in the empty directory `target`; without content, files get their size but no data.

        The steps that its paths take are taken from the budget.
        """
        self._budget = budget
        self._with_content = with_content
        self._root = os.open(target, _DIRECTORY_FLAGS)
        self._is_root_user = os.geteuid() == 0
        self._directories = {b"": _IMPLIED}
        self._left_out: set[bytes] = set()
        self._near: tuple[bytes, int] = b"", os.dup(self._root)
        """The last opened directory, because members come in the order of a walk."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._near[1])
        os.close(self._root)

    def resolve(self, path: bytes) -> bytes:
        """Return `path` with the links among its parents followed, never out of the root; the last name is kept.

        Raises OSError (ELOOP) for too many links.
        """
        above, _, name = path.rpartition(b"/")
        try:
            with self._directory(above):
                return path
        except FileNotFoundError:  # there is no link before what is missing
            return path
        except NotADirectoryError:
            return os.path.join(self.follow(above), name)

    def follow(self, path: bytes) -> bytes:
        """Return the directory that `path` leads to, as for a process whose root this is. Raises OSError (ELOOP)."""
        resolved: list[bytes] = []
        left = path.split(b"/")[::-1]
        links = steps = 0
        while left:
            name = left.pop()
            steps += 1
            self._budget.take_step()
            if links > _MAX_LINKS or steps > _MAX_STEPS:
                raise OSError(errno.ELOOP, "it leads through too many symbolic links")
            if name == b"..":
                del resolved[-1:]
            elif name not in {b"", b"."}:
                link = self._read_link(b"/".join([*resolved, name]))
                if link is None:
                    resolved.append(name)
                    continue
                links += 1
                if link.startswith(b"/"):
                    resolved.clear()
                left += link.split(b"/")[::-1]
        return b"/".join(resolved)

    def _read_link(self, path: bytes) -> bytes | None:
        """Return a link's target; None if there is none, or something else."""
        try:
            with self._parent(path, make=False) as (parent, name):
                return os.readlink(name, dir_fd=parent)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EINVAL}:
                return None
            raise

    def put_directory(self, path: bytes, attributes: Attributes) -> None:
        """Create a directory; an existing one keeps its content and gets these attributes."""
        if path and not self._is_directory(path):
            self.remove(path)
            with self._parent(path) as (parent, name):
                make_one_directory(name, dir_fd=parent)
        self._directories[path] = attributes

    def make_directory(self, path: bytes) -> None:
        """Create a directory, and those on its way, where nothing is. Raises NotADirectoryError for something else."""
        with self._directory(path, make=True):
            pass

    def put_file(self, path: bytes, attributes: Attributes, size: int, chunks: Chunks) -> None:
        """Create a file, replacing what exists, as a new inode: other links keep the old content."""
        self.remove(path)
        # A fork that kept it open would keep it from being executed.
        with self._parent(path) as (parent, name), opened_here(name, _FILE_FLAGS, 0o600, dir_fd=parent) as descriptor:
            for offset, chunk in chunks:
                if self._with_content:
                    _write_at(descriptor, chunk, offset)
            os.ftruncate(descriptor, size)
            self._apply(descriptor, attributes)

    def put_symlink(self, path: bytes, attributes: Attributes, link: bytes) -> None:
        """Create a symbolic link, replacing what exists. It may point anywhere: nothing here follows it."""
        self.remove(path)
        with self._parent(path) as (parent, name):
            os.symlink(link, name, dir_fd=parent)
            self._apply_by_name(parent, name, attributes)

    def put_fifo(self, path: bytes, attributes: Attributes) -> None:
        """Create a named pipe, replacing what exists."""
        self.remove(path)
        with self._parent(path) as (parent, name):
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._apply_by_name(parent, name, attributes)
            os.chmod(name, attributes.mode, dir_fd=parent)

    def put_character_device(self, path: bytes, attributes: Attributes, device: tuple[int, int]) -> None:
        """Create a device node where nothing is. Raises PermissionError without the right to."""
        with self._parent(path) as (parent, name):
            os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(*device), dir_fd=parent)
            self._apply_by_name(parent, name, attributes)
            os.chmod(name, attributes.mode, dir_fd=parent)

    def leave_out(self, path: bytes) -> None:
        """Have nothing at `path`, where a layer has something that is not to be made."""
        self.remove(path)
        self._left_out.add(path)

    def is_left_out(self, path: bytes) -> bool:
        """Return whether nothing is at `path` because that was left out."""
        if path not in self._left_out:
            return False
        with contextlib.suppress(FileNotFoundError), self._parent(path, make=False) as (parent, name):
            os.stat(name, dir_fd=parent, follow_symlinks=False)
            return False
        return True

    def put_hard_link(self, path: bytes, existing: bytes) -> None:
        """Make `path` another name of `existing`, which may itself be a symbolic link."""
        if (existing + b"/").startswith(path + b"/"):
            raise InvalidInputError(f"it is a hard link to {show(existing)}, which it would replace")
        self.remove(path)
        with self._parent(existing) as (source, source_name), self._parent(path) as (parent, name):
            os.link(source_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def remove(self, path: bytes) -> None:
        """Remove whatever is at `path`, directories with their content. A missing path is not an error."""
        if not path:
            raise InvalidInputError("it would replace the root directory")
        # NotADirectoryError: nothing can be below a file.
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with missing, self._parent(path, make=False) as (parent, name):
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=parent)
                return
            descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
            try:
                empty_directory(descriptor)
            finally:
                os.close(descriptor)
            os.rmdir(name, dir_fd=parent)  # the remembered directory is `parent`, so it stays valid

    def children(self, path: bytes) -> list[bytes]:
        """Return the paths of the directory's entries; none if it is missing, or something else."""
        try:
            with self._directory(path) as descriptor:
                names = os.listdir(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [os.path.join(path, os.fsencode(name)) for name in names]

    def finish(self) -> None:
        """Set the directories' attributes, each after those in it, so that none becomes inaccessible too early.

        In this order each is near the one before.
        """
        for path in sorted(self._directories, key=lambda path: path.split(b"/"), reverse=True):
            # Some were removed or replaced since; a directory that was created again is listed again.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if path:
                    with self._parent(path, make=False) as (parent, name):
                        self._apply_to_directory(parent, name, self._directories[path])
                else:
                    self._apply(self._root, self._directories[path])

    def _is_directory(self, path: bytes) -> bool:
        with self._parent(path) as (parent, name):
            try:
                return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                return False

    @contextlib.contextmanager
    def _parent(self, path: bytes, *, make: bool = True) -> Iterator[tuple[int, bytes]]:
        """Open the parent directory of `path`; yield it with the last name."""
        above, _, name = path.rpartition(b"/")
        with self._directory(above, make=make) as descriptor:
            yield descriptor, name

    @contextlib.contextmanager
    def _directory(self, path: bytes, *, make: bool = False) -> Iterator[int]:
        """Open the directory `path`; if `make` is set, create it and its missing parents first."""
        walked, current = self._approach(path)
        try:
            for name in path[len(walked) :].split(b"/"):
                if name:
                    walked = os.path.join(walked, name)
                    following = self._enter(current, name, walked, make=make)
                    os.close(current)
                    current = following
            self._remember(path, os.dup(current))
            yield current
        finally:
            os.close(current)

    def _approach(self, path: bytes) -> tuple[bytes, int]:
        """Open a directory on the way to `path`: the last opened one, the one above both, or the root."""
        near, opened = self._near
        walked = near
        while walked and walked != path and not path.startswith(walked + b"/"):
            walked = walked.rpartition(b"/")[0]
        up = near.count(b"/", len(walked)) + (not walked and bool(near))
        if up > walked.count(b"/") + 1:
            return b"", os.dup(self._root)
        current = os.dup(opened)
        try:
            for _ in range(up):  # each was entered by its name, so this is the one that it is in
                above = os.open(b"..", _DIRECTORY_FLAGS, dir_fd=current)
                os.close(current)
                current = above
                self._budget.take_step()
        except BaseException:
            os.close(current)
            raise
        return walked, current

    def _enter(self, parent: int, name: bytes, path: bytes, *, make: bool) -> int:
        self._budget.take_step()
        try:
            return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            make_one_directory(name, dir_fd=parent)
            self._directories[path] = _IMPLIED
            return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
        except OSError as error:
            if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
                raise
            reason = f"it leads through {show(path)}, which is a symbolic link or a file, not a directory"
            raise NotADirectoryError(errno.ENOTDIR, reason) from error

    def _remember(self, path: bytes, descriptor: int) -> None:
        os.close(self._near[1])
        self._near = path, descriptor

    def _apply_to_directory(self, parent: int, name: bytes, attributes: Attributes) -> None:
        descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
        try:
            self._apply(descriptor, attributes)
        finally:
            os.close(descriptor)

    def _apply(self, descriptor: int, attributes: Attributes) -> None:
        """Set the owner before mode and capabilities, which a change of owner resets; set times last."""
        if self._is_root_user:
            os.fchown(descriptor, attributes.uid, attributes.gid)
        os.fchmod(descriptor, attributes.mode)
        for name, value in attributes.xattrs.items():
            if name.startswith(KEPT_XATTRS) and b"\0" not in name:
                with contextlib.suppress(OSError):  # not every file system and user can; see KEPT_XATTRS
                    os.setxattr(descriptor, name, value)
        if attributes.mtime_ns is not None:
            os.utime(descriptor, ns=(attributes.mtime_ns, attributes.mtime_ns))

    def _apply_by_name(self, parent: int, name: bytes, attributes: Attributes) -> None:
        """Set owner and times of a file that cannot or should not be opened: a link, a pipe."""
        if self._is_root_user:
            os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        if attributes.mtime_ns is not None:
            times = attributes.mtime_ns, attributes.mtime_ns
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
