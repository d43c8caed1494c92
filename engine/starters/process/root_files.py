"""The files in /etc that a root file system gets of its sandbox and its host: resolv.conf, hosts, hostname.

As every runtime whose containers use the host's network has it; they take the place of the image's own. And room for
files that are mounted there.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from limpet.engine.starters.process.keeper.root import open_in_root
from limpet.engine.state.durable import sync_filesystem
from limpet.schema.cri import DNSConfig, Mount, PodSandboxConfig
from limpet.schema.errors import InvalidInputError, StateDirectoryError, quote

_MAX_BYTES = 1 << 20
_LOCALHOST = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_root_files(root: str, sandbox: PodSandboxConfig | None) -> None:
    """Write /etc/resolv.conf, /etc/hosts and /etc/hostname in the root file system `root`; nothing is flushed.

    Raises InvalidInputError for what such a file cannot hold, or where the image has something in their place that is
    neither file nor link; StateDirectoryError if the disk refuses.
    """
    files = {"resolv.conf": _resolv_conf(sandbox), "hosts": _hosts(sandbox), "hostname": _hostname(sandbox)}
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            etc = open_in_root(top, b"etc", make="directory")
        finally:
            os.close(top)
    except OSError as error:
        raise InvalidInputError(f"the image's /etc is no directory: {error.strerror}") from error
    try:
        for name, content in files.items():
            _replace(etc, name, content)
    except IsADirectoryError as error:
        raise InvalidInputError(f"the image's /etc/{error.filename} is a directory, a file is needed") from error
    except OSError as error:
        raise StateDirectoryError(f"root file system {root}: {error.strerror} (etc/{error.filename})") from error
    finally:
        os.close(etc)


def make_room(root: str, volumes: Sequence[str], mounts: Iterable[Mount]) -> None:
    """Remove the empty directory of an image's volume where a file is to be mounted, as others let one do."""
    places = {os.path.normpath(f"/{each.lstrip('/')}") for each in volumes}
    for mount in mounts:
        path = os.path.normpath(f"/{mount.container_path.lstrip('/')}")
        if path not in places or os.path.isdir(mount.host_path):
            continue
        with suppress(OSError, ValueError):  # whatever else is there: the mount says what is wrong with it
            top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                above = open_in_root(top, os.path.dirname(path).encode())
            finally:
                os.close(top)
            try:
                os.rmdir(os.path.basename(path), dir_fd=above)
            finally:
                os.close(above)


def name_address(root: str, hostname: str, address: str) -> None:
    """Have a hostname stand for an address in the /etc/hosts that was written below `root`, durably. Raises OSError."""
    etc = os.open(os.path.join(root, "etc"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with open(os.open("hosts", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=etc), "rb") as file:
            content = file.read()
        _replace(etc, "hosts", content.replace(_own_line("127.0.1.1", hostname), _own_line(address, hostname)))
        sync_filesystem(root)
    finally:
        os.close(etc)


def _own_line(address: str, hostname: str) -> bytes:
    return f"{address}\t{hostname}\n".encode()


def _replace(directory: int, name: str, content: bytes) -> None:
    """Put a new file in place of what has the name: a link is not followed, nor another name of the file changed.

    An empty directory, as of an image's volume, gives way, too.
    """
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError as error:
            try:
                os.rmdir(name, dir_fd=directory)
            except OSError:
                raise error from None
    descriptor = os.open(name, _NEW_FILE, 0o644, dir_fd=directory)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)
        file.write(content)


def _resolv_conf(sandbox: PodSandboxConfig | None) -> bytes:
    dns = None if sandbox is None else sandbox.dns_config
    if dns is None or dns == DNSConfig():
        return _read_host_file("/etc/resolv.conf")
    for field in ("servers", "searches", "options"):
        for word in getattr(dns, field):
            if not word or word.split() != [word] or not word.isprintable():
                raise InvalidInputError(f"dns_config.{field} {quote(word)}: a word without spaces is needed")
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines).encode()


def _hosts(sandbox: PodSandboxConfig | None) -> bytes:
    content = _read_host_file("/etc/hosts") or _LOCALHOST
    if sandbox is None or not sandbox.hostname:
        return content
    end = b"" if content.endswith(b"\n") else b"\n"
    return content + end + _own_line("127.0.1.1", require_hostname(sandbox.hostname))


def _hostname(sandbox: PodSandboxConfig | None) -> bytes:
    if sandbox and sandbox.hostname:
        return f"{require_hostname(sandbox.hostname)}\n".encode()
    return os.fsencode(socket.gethostname()) + b"\n"  # any bytes, as sethostname(2) takes them


def require_hostname(name: str) -> str:
    """Return a sandbox's hostname. Raises InvalidInputError if it is none (hostname(7))."""
    if not name.isascii() or len(name) > 64 or not name.replace("-", "").replace(".", "").isalnum():
        raise InvalidInputError(f"hostname {quote(name)}: up to 64 of a-z, 0-9, '-' and '.' are needed")
    return name


def _read_host_file(path: str) -> bytes:
    """Return the content of a file of the host, b"" if it is not there or too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError:
        return b""
    return content if len(content) <= _MAX_BYTES else b""
