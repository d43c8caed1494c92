"""What a sandbox holds: its namespaces, pinned without a process, its /dev/shm, and its files in /etc.

Pins are on a tmpfs, as they end with the boot: `/run/limpet/<boot>.<...>/<sandbox>/{net,ipc,uts,pid,shm}`. The middle
name is that of the runtime's own directory (see `root`), so what is there is this state directory's and no copy's. A
directory is locked while it is worked on, also by a `pin` that outlives its engine.

A mount is seen in one mount namespace, and a unit of systemd's may have a new one each time that it is started. Such a
one follows that of process 1, in which pins are made then. Where none follows another, what an engine has pinned is not
seen by one elsewhere: it is held nevertheless, while a process is where it was made, and freed by any.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

from limpet.engine.starters.abilities import Holdings
from limpet.engine.starters.oci import pin
from limpet.engine.starters.oci.cni import Plugins, end_left, read_network
from limpet.engine.starters.oci.command import LOOK_SECONDS, Outcome, is_any_left, run
from limpet.engine.starters.oci.family import have_holders_go_on, list_processes
from limpet.engine.starters.oci.namespaces import options_of_sandbox
from limpet.engine.starters.oci.root import RuntimeRoot
from limpet.engine.starters.oci.rootless import name_engine, require_mapped_groups
from limpet.engine.starters.orphans import reap_when_over
from limpet.engine.starters.process.interpreter import find_any_interpreter
from limpet.engine.starters.process.root_files import name_address, require_hostname, write_root_files
from limpet.engine.starters.propagation import read_propagation
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.durable import sync_filesystem
from limpet.recovery.host import has_ended, open_pidfd, read_boot_id, read_name
from limpet.recovery.mounts import find_mounts, open_lines
from limpet.schema.cri import NamespaceMode, PodSandboxConfig
from limpet.schema.errors import InvalidInputError, ResourcesError, StartError, UnsupportedError, quote, quote_path
from limpet.schema.file_name import file_name
from limpet.schema.metadata import SandboxMetadata

PINS = "/run/limpet"
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from pin import main; main()"
"""Imported, not run as a file: the package may be in a zip archive."""
ETC = ("hosts", "hostname", "resolv.conf")
_FILES = {"network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid"}
"""The name of each pin, by type as in the runtime-spec; /proc/PID/ns has the same."""
_OF_IPC = re.compile(
    r"kernel\.(msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced|(msg|sem|shm)_next_id)|fs\.mqueue\.[a-z_]+"
)
"""What ipc_namespaces(7) lists."""
HOSTNAME = "kernel.hostname"
_NAMES = frozenset({HOSTNAME, "kernel.domainname"})
_OF_NO_RUNTIME = re.compile(r"kernel\.(msg|sem|shm)_next_id")
"""What runc and crun take for the host's, and refuse."""
_OF_GROUPS = "net.ipv4.ping_group_range"
"""Whose values are groups: which of them there are is another matter in the user namespace of a container."""
_HOST_NAME_BYTES = 64
"""Of each of these (uname(2)); the kernel drops the rest without a word."""
_FIRST = b"limpet-pause"
"""What the first process of a pid namespace calls itself: see `pin`."""
_MOUNTS = "mounts"
_SHM = "shm"
_SHM_BYTES = 64 << 20
_LOCK_SECONDS = 10.0
_END_SECONDS = 5.0
_MAKE_TRIES = 10
_MNT_DETACH = 2
_NS_GET_PID_FROM_PIDNS = 0x8004B706  # linux/nsfs.h: which process here has this pid there
_libc = ctypes.CDLL(None, use_errno=True)


class SandboxHoldings:
    """What the sandboxes of one starter in one state directory hold."""

    def __init__(self, sandboxes_dir: str, root: RuntimeRoot, plugins: Plugins | None = None) -> None:
        self._sandboxes_dir = sandboxes_dir
        self._root = root
        self._plugins = plugins

    def furnish(self, sandbox: SandboxMetadata, given: Mapping[str, str], timeout: float) -> Holdings:
        """Write its files and make the namespaces that it is to hold, but for those that are given, not by us.

        Raises InvalidInputError for what /etc cannot hold, UnsupportedError, ResourcesError if it cannot be made.
        """
        require_sysctls(sandbox.config)
        self._require_not_pinned(sandbox.id, given)
        directory = self.directory_of(sandbox.id)
        if _names_all(sandbox.config, given):  # they may be in use: its files alone are missing
            _write_files(directory, sandbox.config)
            network = read_network(directory)
            _name_first(directory, sandbox.config, network.addresses if network else ())
            return Holdings(given)
        self._delete_network(directory, timeout)
        _write_files(directory, sandbox.config)
        kept = {kind: path for kind, path in given.items() if not is_pin(path)}
        kinds = [kind for kind in choose_kinds(sandbox.config) if kind not in kept]
        self._root.make()
        path = self.pins_of(sandbox.id)
        _make(path)
        with _locked(path) as lock:
            self._clear(path)
            if kinds:
                self._pin(path, kinds, sandbox.config, lock, timeout)
        made = {kind: os.path.join(path, _FILES[kind]) for kind in kinds}
        addresses: tuple[str, ...] = ()
        if self._plugins is not None and "network" in made:
            try:
                addresses = self._plugins.add(directory, made["network"], timeout).addresses
            except BaseException:
                self._remove(path)
                raise
            _name_first(directory, sandbox.config, addresses)
        return Holdings({**kept, **made}, addresses)

    def _require_not_pinned(self, sandbox_id: str, given: Mapping[str, str]) -> None:
        """Raise InvalidInputError for a namespace that is held for another sandbox: it would end with that one."""
        own = f"{self.pins_of(sandbox_id)}/"
        for kind, path in given.items():
            if is_pin(path) and not path.startswith(own):
                raise InvalidInputError(
                    f"namespaces {quote(kind)}: {quote_path(path)} is held for another sandbox, and ends with it; give"
                    " one that is your own"
                )

    def _delete_network(self, directory: str, timeout: float) -> None:
        if read_network(directory) is not None:
            if self._plugins is None:
                raise ResourcesError(
                    f"{quote_path(directory)}: CNI plugins made its network; open an engine with `cni` to remove it"
                )
            self._plugins.delete(directory, timeout)

    def is_furnished(self, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> bool:
        """Say whether its files were written, and its record names all that it is to hold."""
        etc = os.path.join(self.directory_of(sandbox.id), "etc")
        return _names_all(sandbox.config, namespaces) and all(os.path.isfile(os.path.join(etc, name)) for name in ETC)

    def _pin(self, path: str, kinds: Sequence[str], config: PodSandboxConfig, lock: int, timeout: float) -> None:
        asked = {
            "directory": path,
            "kinds": [_FILES[kind] for kind in kinds],
            "hostname": require_hostname(config.hostname) if config.hostname else "",
            "sysctls": {name: value for name, value in sysctls_of(config).items() if kind_of_sysctl(name) in kinds},
            "shm_bytes": _SHM_BYTES,
            "follows_first": _follows_first(path),
            "mark": _mark_of(path),
        }
        outcome = _run_pin(asked, timeout, (lock,))
        if outcome.code != 0:
            self._clear(path)
            raise UnsupportedError(f"a sandbox's namespaces cannot be made: {outcome.problem}")

    def holds(self, sandbox_id: str, namespaces: Mapping[str, str]) -> bool:
        """Say whether those of the namespaces that are ours, and /dev/shm, are there, and of use. Raises OSError."""
        pins = self.pins_of(sandbox_id)
        wanted, view = {path for path in namespaces.values() if is_pin(path)}, ""
        if (ipc := namespaces.get("ipc", "")) in wanted:
            wanted.add(_shm_of(ipc))
        if wanted and not wanted <= set(find_mounts(pins)):
            view = _find_view(pins)
            if not view or not all(map(_is_pinned, (view + path for path in wanted))):
                return False
        pids = namespaces.get("pid", "")
        return not is_pin(pids) or has_first(view + pids)

    def vacate(self, sandbox_id: str, timeout: float) -> None:
        """Free all that it holds; what is already free is fine. Raises ResourcesError if something cannot be freed."""
        self._delete_network(self.directory_of(sandbox_id), timeout)
        if self._root.find():
            self._remove(self.pins_of(sandbox_id))

    def vacate_others(self, find_ids: Callable[[], Collection[str]]) -> Iterator[str]:
        """Free what sandboxes hold that have neither record nor directory; yield what cannot be freed. Raises OSError.

        Records are asked for last: one is there before what it holds, and goes after it.
        """
        above = os.path.dirname(self.pins_of("x")) if self._root.find() else ""
        if not os.path.isdir(above):
            return
        names = os.listdir(above)
        kept = {*map(file_name, find_ids()), *os.listdir(self._sandboxes_dir)}
        for name in names:
            if name not in kept:
                try:
                    self._remove(os.path.join(above, name))
                except (OSError, ResourcesError) as error:
                    yield str(error)

    def end_plugins(self) -> None:
        """End the plugins that an engine which is dead has left at work. Raises OSError."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self._sandboxes_dir):
                end_left(os.path.join(self._sandboxes_dir, name))

    def remove_old(self) -> None:
        """Remove what earlier boots have left where pins are on a disk: files that hold nothing any more."""
        boot_id = read_boot_id()
        with suppress(FileNotFoundError):
            for name in os.listdir(PINS):
                if boot_id and len(name.split(".")[0]) == len(boot_id) and not name.startswith(f"{boot_id}."):
                    for above, directories, files in os.walk(os.path.join(PINS, name), topdown=False):
                        for each in files:
                            os.unlink(os.path.join(above, each))
                        for each in directories:
                            os.rmdir(os.path.join(above, each))
                    os.rmdir(os.path.join(PINS, name))

    def mounts_for(self, sandbox_id: str, namespaces: Mapping[str, str]) -> dict[str, str]:
        """Return what its containers mount of it: where in the container, and the path here."""
        found = {}
        ipc = namespaces.get("ipc", "")
        if os.path.dirname(ipc) == self.pins_of(sandbox_id):
            found["/dev/shm"] = _shm_of(ipc)  # noqa: S108
        for name in ETC:
            path = os.path.join(self.directory_of(sandbox_id), "etc", name)
            if os.path.isfile(path):
                found[f"/etc/{name}"] = path
        return found

    def directory_of(self, sandbox_id: str) -> str:
        """Return the sandbox's directory."""
        return os.path.join(self._sandboxes_dir, file_name(sandbox_id))

    def pins_of(self, sandbox_id: str) -> str:
        """Return where its pins are, or would be."""
        return os.path.join(PINS, os.path.basename(self._root.find()) or "none", file_name(sandbox_id))

    def _remove(self, path: str) -> None:
        if not os.path.isdir(path):
            return
        with _locked(path):
            self._clear(path)
            with suppress(FileNotFoundError):
                os.rmdir(path)
        with suppress(OSError):  # unless there are others
            os.rmdir(os.path.dirname(path))

    def _clear(self, path: str) -> None:
        """End the first process of its pid namespace, and unmount and remove all pins."""
        pinned = os.path.join(path, "pid")
        mounted = list(find_mounts(path))  # perhaps one over another, by somebody else
        view = "" if pinned in mounted else _find_view(path)
        if pinned in mounted or (view and _is_pinned(view + pinned)):
            _end_pids(view + pinned)
        elif os.path.lexists(pinned):  # somebody has unmounted it
            _end_unpinned(path)
        for name in (*_FILES.values(), _SHM):
            each = os.path.join(path, name)
            for _ in range(mounted.count(each)):
                _unmount(each)
            with suppress(FileNotFoundError):
                if name == _SHM:
                    os.rmdir(each)
                else:
                    os.unlink(each)  # which unmounts it in other mount namespaces
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(path, _MOUNTS))


def _make(path: str) -> None:
    """Make the directory of a sandbox's pins. Raises OSError."""
    for _ in range(_MAKE_TRIES - 1):
        with suppress(FileNotFoundError):  # the one above was removed just then, with the last that was in it
            os.makedirs(path, 0o700, exist_ok=True)
            return
    os.makedirs(path, 0o700, exist_ok=True)


def _write_files(directory: str, config: PodSandboxConfig) -> None:
    write_root_files(directory, config)
    sync_filesystem(directory)


def _name_first(directory: str, config: PodSandboxConfig, addresses: Sequence[str]) -> None:
    """Have the sandbox's hostname stand for the first of its addresses, if it has both."""
    if addresses and config.hostname:
        name_address(directory, config.hostname, addresses[0])


def _names_all(config: PodSandboxConfig, namespaces: Mapping[str, str]) -> bool:
    """Return whether these are all that a sandbox is to have, as its record says once all was made."""
    return set(choose_kinds(config)) <= set(namespaces)


def _shm_of(ipc: str) -> str:
    """Return where the /dev/shm is that is pinned with an IPC namespace."""
    return os.path.join(os.path.dirname(ipc), _SHM)


def require_pinned(path: str) -> None:
    """Raise StartError for a namespace's pin that is none any more, or one in another mount namespace.

    No runtime that is started here could use it. With an IPC namespace goes its /dev/shm.
    """
    for each in (path, *((_shm_of(path),) if os.path.basename(path) == _FILES["ipc"] else ())):
        if not _is_pinned(each):
            if _find_view(os.path.dirname(each)):
                raise StartError(
                    f"namespaces: {quote_path(each)} is mounted in another mount namespace, that of the engine which"
                    " made the sandbox; start it from there, or make another sandbox"
                )
            raise StartError(f"namespaces: somebody has unmounted {quote_path(each)}; make another sandbox")


def _is_pinned(path: str) -> bool:
    """Return whether something is mounted at the path of a pin: what is there is of another file system."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    return False


def _find_view(pins: str) -> str:
    """Return what is before the path of a directory of pins where those are mounted, if they were made elsewhere.

    That is the root directory of a process in the mount namespace of then. "" if they were made in ours, or no process
    is left there. Raises OSError.
    """
    try:
        with open(os.path.join(pins, _MOUNTS), encoding="ascii") as file:
            made_in = file.read()
    except FileNotFoundError:
        return ""
    if made_in == os.readlink("/proc/self/ns/mnt"):
        return ""
    here = os.stat(pins)
    for pid, _, _ in list_processes():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            view = f"/proc/{pid}/root"
            if os.readlink(f"/proc/{pid}/ns/mnt") == made_in and os.path.samestat(os.stat(view + pins), here):
                return view
    return ""


def _follows_first(path: str) -> bool:
    """Return whether what is mounted below a path in the mount namespace of process 1 is seen in ours, and not back."""
    found = re.search(r"\bmaster:([0-9]+)", read_propagation(path) or "")
    if found is None:
        return False
    with suppress(OSError), open_lines("/proc/1/mountinfo") as file:
        return any(f"shared:{found[1]}" in line.partition(" - ")[0].split(" ") for line in file)
    return False


def choose_kinds(config: PodSandboxConfig) -> list[str]:
    """Return the types of namespaces that a sandbox holds: network and UTS, IPC, and pid if it is said to be shared."""
    options = options_of_sandbox(config)
    pod = NamespaceMode.POD
    found = []
    if options is None or options.network is pod:
        found += ["network", "uts"]
    if options is None or options.ipc is pod:
        found.append("ipc")
    if options is not None and options.pid is pod:
        found.append("pid")
    return found


def is_pin(path: str) -> bool:
    """Return whether a namespace's path is that of a pin of ours."""
    return path.startswith(f"{PINS}/")


def sysctls_of(config: PodSandboxConfig) -> Mapping[str, str]:
    """Return the sandbox's sysctls."""
    return config.linux.sysctls if config.linux else {}


def is_of_runtime(name: str) -> bool:
    """Return whether the runtimes set a sysctl in a container's own namespaces; the host's name they set otherwise."""
    return name != HOSTNAME and not _OF_NO_RUNTIME.fullmatch(name)


def try_sysctls(config: PodSandboxConfig, timeout: float) -> None:
    """Set the sandbox's sysctls in namespaces of an ordinary user, as its containers have them, that end at once.

    Raises InvalidInputError, also for one that only root may set, or that this kernel has not; UnsupportedError.
    """
    require_sysctls(config)
    if (groups := sysctls_of(config).get(_OF_GROUPS)) is not None:
        require_mapped_groups(f"sysctls {_OF_GROUPS!r}", groups)
    names = [name for name in sysctls_of(config) if is_of_runtime(name) and name != _OF_GROUPS]
    if not names:
        return
    asked = {
        "directory": "",
        "kinds": ["net", "ipc", "uts"],
        "hostname": "",
        "sysctls": {name: sysctls_of(config)[name] for name in names},
        "is_trial": True,
    }
    outcome = _run_pin(asked, timeout)
    if outcome.code == 0:
        return
    if "sysctls " not in outcome.problem:
        raise UnsupportedError(f"a sandbox's namespaces cannot be made: {outcome.problem}")
    raise InvalidInputError(f"{outcome.problem}; a sandbox of {name_engine()} cannot have it")


def _run_pin(asked: Mapping[str, Any], timeout: float, pass_fds: Sequence[int] = ()) -> Outcome:
    where = os.path.abspath(os.path.dirname(pin.__file__))
    command = [find_any_interpreter(), "-I", "-S", "-X", "utf8", "-c", _PROGRAM, where]
    return run(command, timeout=timeout, pass_fds=pass_fds, given=json.dumps(asked).encode())


def kind_of_sysctl(name: str) -> str:
    """Return the type of the namespace that a sysctl belongs to (sysctl(8)), "" for the host's."""
    if name.startswith("net."):
        return "network"
    if name in _NAMES:
        return "uts"
    return "ipc" if _OF_IPC.fullmatch(name) else ""


def require_sysctls(config: PodSandboxConfig) -> None:
    """Refuse sysctls that belong to no namespace: who sets them sets the host's. Raises InvalidInputError.

    So are values of which the kernel would read nothing, or a part, and another name of the host than the config's.
    """
    for name, value in sysctls_of(config).items():
        if not value.strip() or not value.replace("\t", " ").isprintable():
            raise InvalidInputError(f"sysctls {quote(name)}: a value in one line is needed, not {quote(value)}")
        if name in _NAMES and len(os.fsencode(value)) > _HOST_NAME_BYTES:
            raise InvalidInputError(
                f"sysctls {quote(name)}: the kernel keeps {_HOST_NAME_BYTES} bytes of it, and {quote(value)} has more"
            )
        if name == HOSTNAME and config.hostname not in {"", value}:
            raise InvalidInputError(f"sysctls {quote(name)}: the sandbox has a hostname, {quote(config.hostname)}")
        if not kind_of_sysctl(name):
            raise InvalidInputError(
                f"sysctls {quote(name)}: it belongs to no namespace, so it is the host's; net.*, fs.mqueue.*,"
                " kernel.shm*, kernel.msg*, kernel.sem, kernel.hostname and kernel.domainname can be set"
            )


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """Hold the lock of a directory of pins. Raises ResourcesError if somebody else keeps it for long.

    A `pin` that its engine has left there, or the first process that it began, goes on if a signal has stopped it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        look_at = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ResourcesError(f"{quote_path(path)}: another process is at work there; try again") from None
                if time.monotonic() > look_at:
                    have_holders_go_on(descriptor)
                    look_at = time.monotonic() + LOOK_SECONDS
                time.sleep(0.01)
        yield descriptor
    finally:
        if not is_any_left():  # a fork of this process may have a copy of the descriptor, and keep it for long
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _unmount(path: str) -> None:
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in {errno.EINVAL, errno.ENOENT}:
        number = ctypes.get_errno()
        raise ResourcesError(f"{quote_path(path)} cannot be unmounted: {os.strerror(number)}; try again")


def has_first(path: str) -> bool:
    """Return whether the first process of a pinned pid namespace lives: without it no other is made there.

    One that a signal has stopped goes on: it would reap nothing.
    """
    for pid, pidfd in _find_first(path):
        if not has_ended(pidfd):
            let_go_on(pid, pidfd)
            return True
    return False


def _end_pids(path: str) -> None:
    """Kill the first process of a pid namespace that is pinned, and so all in it; wait until it is gone."""
    for _, pidfd in _find_first(path):
        _kill(pidfd)


def _end_unpinned(directory: str) -> None:
    """Do the same where the namespace is pinned no more: its first process has a root directory with a mark."""
    mark = f" - tmpfs {_mark_of(directory)} "
    for pid, _, _ in list_processes():
        with suppress(ProcessLookupError, FileNotFoundError, PermissionError), open_pidfd(pid) as pidfd:
            if read_name(pid) == _FIRST and mark in _read_root_mount(pid):
                _kill(pidfd)


def _mark_of(directory: str) -> str:
    """Return what tells the first process that belongs to a directory of pins: containers see it, and no path in it."""
    return f"limpet-{sha256(os.fsencode(directory)).hexdigest()[:32]}"


def _read_root_mount(pid: int) -> str:
    """Return the line of /proc/PID/mountinfo on its root directory, "" if more is mounted in its mount namespace."""
    with suppress(OSError), open_lines(f"/proc/{pid}/mountinfo") as file:
        lines = [line for _, line in zip(range(2), file, strict=False)]
        return lines[0] if len(lines) == 1 else ""
    return ""


def _kill(pidfd: int) -> None:
    """Kill the first process of a pid namespace, and wait until it is gone."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    reap_when_over(pidfd)
    deadline = time.monotonic() + _END_SECONDS
    while not has_ended(pidfd) and time.monotonic() < deadline:
        time.sleep(0.005)


def _find_first(path: str) -> Iterator[tuple[int, int]]:
    """Yield the first process of a pid namespace and a pidfd of it, which is closed after that; nothing if it is gone.

    Raises OSError; PermissionError if it may be one that has more rights than this process.
    """
    namespace, hidden = os.stat(path), None
    for pid in _find_candidates(path):
        try:
            with open_pidfd(pid) as pidfd:
                if _is_first(pid, namespace):
                    yield pid, pidfd
                    return
        except (ProcessLookupError, FileNotFoundError):
            continue
        except PermissionError as error:
            hidden = error
    if hidden is not None:
        raise hidden


def _find_candidates(path: str) -> list[int]:
    """Return which processes may be the first of a pid namespace. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [fcntl.ioctl(descriptor, _NS_GET_PID_FROM_PIDNS, 1)]
    except OSError as error:
        if error.errno == errno.ESRCH:
            return []
        if error.errno not in {errno.ENOTTY, errno.EINVAL}:
            raise
    finally:
        os.close(descriptor)
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # before Linux 6.12


def _is_first(pid: int, namespace: os.stat_result) -> bool:
    with open_lines(f"/proc/{pid}/status") as file:
        numbers = next((line.split()[1:] for line in file if line.startswith("NSpid:")), [])
    # Anybody may ask for these; into a process with more rights, as the first of our own namespace has, nobody looks.
    return len(numbers) > 1 and numbers[-1] == "1" and os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), namespace)
