"""Networks made by CNI plugins (the Container Network Interface, version 1): programs, called as the spec says.

What is asked of the plugins is written down, durably, before it is done: `network.json` in the sandbox's directory. It
goes once DEL has succeeded, so that whoever comes after a kill, or a plugin that failed, tries that again. While one is
at work `plugin.json` tells which process it is: one that hangs is ended by the next engine, if this one is killed. A
plugin has that file open as it begins, by which it is known before its process is written down.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from ipaddress import ip_interface
from typing import Any

import msgspec

from limpet.engine.starters.oci.command import Outcome, clean_environment, run
from limpet.engine.starters.oci.family import kill_family, list_processes
from limpet.engine.state.durable import sync_directory, write_file, write_unflushed
from limpet.engine.state.holders import has_open
from limpet.engine.state.identity import read_identity
from limpet.engine.state.surroundings import may_access
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.files import read_small_file
from limpet.recovery.host import compare, identify, observe_boot, open_pidfd, wait_for_end
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import (
    InvalidInputError,
    ResourcesError,
    StateDirectoryError,
    UnsupportedError,
    escape,
    quote,
    quote_path,
)
from limpet.schema.identity import ProcessIdentity

PLUGINS = "/opt/cni/bin:/usr/lib/cni"
"""Where they are looked for: the spec's directory, and Debian's."""
_FILE = "network.json"
_AT_WORK = "plugin.json"
_INTERFACE = "eth0"
_MOST_BYTES = 1 << 20
"""How large a configuration may be, and what a plugin answers."""
_NETWORK_BYTES = 16 << 20
"""How large what is written down of both can be."""
_ENVIRONMENT_BYTES = 64 << 10
_END_SECONDS = 5.0
_under_way: set[int] = set()
"""The pids of this process's own plugins: nobody's leftovers."""
_PLUGIN = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_NUMBERS = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}", re.ASCII)
_VERSION, _OLDEST = "1.0.0", (0, 3, 0)
"""Of the spec: what is meant where a configuration names none, and the oldest whose results have `ips`."""


class _AtWork(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that was called and has not ended."""

    process: ProcessIdentity | None
    """None until it is known. It was asked nothing then, and has started nothing."""
    directory: tuple[int, int]
    """Device and inode of the sandbox's directory: in a copy of it, this is the original's plugin."""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the plugins for one sandbox."""

    name: str
    version: str
    plugins: list[dict[str, Any]]
    container_id: str
    namespace: str
    state: str = ""
    """The id of the state directory that it was written down in: a copy has another. "" where none was noted."""
    result: dict[str, Any] | None = None
    """What the last plugin answered; None until all have."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The sandbox's IP addresses, the first one first."""
        found = (self.result or {}).get("ips") or []
        return tuple(str(each["address"]).partition("/")[0] for each in found)


_at_work, _network = make_decoder(_AtWork), make_decoder(Network)


class Plugins:
    """The plugins of a configuration directory, whose first file by name is used."""

    def __init__(self, config_dir: str, plugins: str = PLUGINS) -> None:
        self._config_dir = os.path.abspath(config_dir)
        # Who is called works in another directory.
        self._plugins = ":".join(os.path.abspath(each) for each in plugins.split(":") if each)

    def add(self, directory: str, namespace: str, timeout: float) -> Network:
        """Have the sandbox's network made; what is left of an earlier try goes first. `directory` is the sandbox's.

        Raises UnsupportedError if there is no configuration, or a plugin refuses: then nothing is left, or DEL is to be
        repeated. Raises OSError.
        """
        self.delete(directory, timeout)
        network = self._read_config(directory, namespace)
        for plugin in network.plugins:  # before any is asked: no DEL is due then, which would need them, too
            self._find(plugin["type"])
        path = os.path.join(directory, _FILE)
        write_file(path, msgspec.json.encode(network))
        try:
            result: dict[str, Any] | None = None
            for plugin in network.plugins:
                result = self._ask(directory, network, plugin, "ADD", result, timeout)
            network = msgspec.structs.replace(network, result=_require_result(result))
        except UnsupportedError as error:
            try:
                self.delete(directory, timeout)
            except ResourcesError as second:
                raise UnsupportedError(f"{error}; and then: {second}") from error
            raise
        write_file(path, msgspec.json.encode(network))
        return network

    def delete(self, directory: str, timeout: float) -> None:
        """Have the network removed that was made for a sandbox. May be repeated.

        Raises ResourcesError if a plugin fails: then it is to be repeated.
        """
        end_left(directory)
        network = read_network(directory)
        if network is None:
            return
        for plugin in reversed(network.plugins):
            try:
                self._ask(directory, network, plugin, "DEL", network.result, timeout)
            except UnsupportedError as error:
                raise ResourcesError(f"{error}; its network stays until that works, try again") from error
        os.unlink(os.path.join(directory, _FILE))
        sync_directory(directory)

    def _read_config(self, directory: str, namespace: str) -> Network:
        try:
            names = sorted(each for each in os.listdir(self._config_dir) if each.endswith((".conflist", ".conf")))
        except OSError as error:
            raise UnsupportedError(f"CNI: {quote_path(self._config_dir)}: {error.strerror}") from error
        if not names:
            raise UnsupportedError(f"CNI: {quote_path(self._config_dir)} has no file of a network (*.conflist)")
        path = os.path.join(self._config_dir, names[0])
        state = _read_state_id(directory)
        try:
            config = json.loads(read_small_file(path, _MOST_BYTES))
            plugins = config["plugins"] if path.endswith(".conflist") else [config]
            if not plugins:
                raise ValueError("it lists no plugins")
            network = Network(
                name=_require_match("name", config["name"], _NETWORK),
                version=_require_version(config.get("cniVersion", _VERSION)),
                plugins=[
                    {**plugin, "type": _require_match("a plugin's type", plugin["type"], _PLUGIN)} for plugin in plugins
                ],
                container_id=_make_id(state, directory),
                namespace=namespace,
                state=state,
            )
            msgspec.json.encode(network)  # as it is going to be written down
            return network
        except OSError as error:
            raise UnsupportedError(f"CNI: {quote_path(path)}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInputError(f"CNI: {quote_path(path)} is no network's configuration: {error!r}") from error

    def _find(self, name: str) -> str:
        """Return the program of a plugin. Raises UnsupportedError if it is not there."""
        paths = [os.path.join(each, name) for each in self._plugins.split(":") if each]
        found = (path for path in paths if os.path.isfile(path) and may_access(path, os.X_OK))
        program = next(found, "")
        if not program:
            raise UnsupportedError(
                f"CNI: the plugin {name!r} is not in {self._plugins}; on Debian: apt-get install"
                " containernetworking-plugins"
            )
        return program

    def _ask(
        self,
        directory: str,
        network: Network,
        plugin: Mapping[str, Any],
        command: str,
        before: dict[str, Any] | None,
        timeout: float,
    ) -> dict[str, Any] | None:
        """Call one plugin, and return what it answers. Raises UnsupportedError with what it says."""
        name = plugin["type"]
        program = self._find(name)
        config = {**plugin, "name": network.name, "cniVersion": network.version}
        if before is not None:
            config["prevResult"] = before
        # A namespace that is gone, as after a reboot, is not named: DEL then frees what the plugin keeps elsewhere.
        namespace = network.namespace if command == "ADD" or os.path.ismount(network.namespace) else ""
        environment = {
            **clean_environment(),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": network.container_id,
            "CNI_NETNS": namespace,
            "CNI_IFNAME": _INTERFACE,
            "CNI_PATH": self._plugins,
        }
        try:
            with _noted(directory) as (sign, note):
                outcome = run(
                    [program], timeout=timeout, given=json.dumps(config).encode(), environment=environment,
                    most_bytes=_MOST_BYTES, begin=note, pass_fds=[sign],
                )  # fmt: skip
        except OSError as error:
            raise UnsupportedError(f"CNI: {quote_path(program)} cannot be executed: {error.strerror}") from error
        if outcome.code != 0:
            raise UnsupportedError(f"CNI: {name} {command} failed: {_tell(outcome)}")
        try:
            answer = json.loads(outcome.output) if outcome.output.strip() and command == "ADD" else None
        except (ValueError, RecursionError) as error:
            raise UnsupportedError(f"CNI: {name} {command} answers what is no JSON") from error
        if answer is not None and not isinstance(answer, dict):
            raise UnsupportedError(f"CNI: {name} {command} answers no object")
        return answer


@contextmanager
def _noted(directory: str) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Note that a plugin is called, until it is over.

    Yield a descriptor that it is to have, and what writes down which process it is: it is asked nothing before.
    """
    path = os.path.join(directory, _AT_WORK)
    found = os.stat(directory)
    pids = []

    def write(process: ProcessIdentity | None) -> None:
        at_work = _AtWork(process=process, directory=(found.st_dev, found.st_ino))
        write_unflushed(path, msgspec.json.encode(at_work))

    def note(pid: int) -> None:
        pids.append(pid)
        _under_way.add(pid)
        with open_pidfd(pid) as pidfd:
            write(identify(pid, pidfd))

    write(None)
    sign = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield sign, note
    finally:
        os.close(sign)
        with suppress(OSError):  # what stays names a process that has ended
            os.unlink(path)
        _under_way.difference_update(pids)


def end_left(directory: str) -> None:
    """Kill the plugin that an engine which is dead has left at work for this sandbox, with what it has started."""
    path = os.path.join(directory, _AT_WORK)
    try:
        left = _at_work.decode(read_small_file(path, _MOST_BYTES))
        found = os.stat(directory)
        if left.directory != (found.st_dev, found.st_ino):
            return
        if left.process is None:
            _end_unnoted(path)
        elif observe_boot(left.process) is Boot.SAME:
            with open_pidfd(left.process.pid) as pidfd:
                if compare(left.process, pidfd)[0] is Process.ALIVE and left.process.pid not in _under_way:
                    _end(left.process.pid, pidfd)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, StateDirectoryError):
        return  # there is none, or nothing proves that it is one


def _end_unnoted(path: str) -> None:
    """Kill the plugin that was called, and of which nobody has written down which process it is. Raises OSError."""
    note, network = os.stat(path), read_network(os.path.dirname(path))
    called_for = f"CNI_CONTAINERID={network.container_id if network is not None else ''}"
    for pid, parent, _ in list_processes():
        if os.getpid() not in {pid, parent}:
            with suppress(OSError), open_pidfd(pid) as pidfd:
                # Asked after it was opened: it is the one. A fork of that engine has the file open, too.
                if has_open(pid, _AT_WORK, note) and called_for.encode() in _read_environment(pid):
                    _end(pid, pidfd)


def _read_environment(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read(_ENVIRONMENT_BYTES).split(b"\0")


def _end(pid: int, pidfd: int) -> None:
    kill_family(pid, pidfd, sessions=True)
    wait_for_end(pidfd, _END_SECONDS)


def read_network(directory: str) -> Network | None:
    """Return what was asked of plugins for the sandbox of this directory. Raises StateDirectoryError if damaged.

    None in a copy of a state directory: the network is the original's.
    """
    path = os.path.join(directory, _FILE)
    try:
        network = _network.decode(read_small_file(path, _NETWORK_BYTES))
        return network if network.state in {"", _read_state_id(directory)} else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise StateDirectoryError(f"{quote_path(path)} cannot be read: {error}") from error


def _read_state_id(directory: str) -> str:
    """Return the id of the state directory that a sandbox's directory is in. Raises OSError."""
    identity = read_identity(os.path.dirname(os.path.dirname(directory)))
    return identity.id if identity is not None else ""


def _make_id(state: str, directory: str) -> str:
    """Return what plugins know a sandbox by: of characters that they take, and no other state directory's."""
    return sha256(f"{state}/{os.path.basename(directory)}".encode()).hexdigest()


def _require_match(field: str, name: object, pattern: re.Pattern[str]) -> str:
    """Return a name. Raises ValueError if it is none: a plugin's would be a path, or nothing that can be executed."""
    if not isinstance(name, str) or not pattern.fullmatch(name) or name in {".", ".."}:
        raise ValueError(f"{field} {quote(name)} is none as the spec has it")
    return name


def _require_version(version: object) -> str:
    """Return a version of the spec. Raises ValueError for one that is too old: its results have no `ips`."""
    numbers = _require_match("cniVersion", version, _NUMBERS)
    if tuple(map(int, numbers.split("."))) < _OLDEST:
        raise ValueError(f"cniVersion {quote(version)} is too old; {'.'.join(map(str, _OLDEST))} or newer is needed")
    return numbers


def _require_result(result: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the last plugin answered. Raises UnsupportedError if that names no addresses as it must."""
    try:
        for each in (result or {}).get("ips") or []:
            # A scope may be any text, and would go to /etc/hosts.
            if "%" in str(ip_interface(str(each["address"]))):
                raise ValueError(f"{quote(str(each['address']))} has a scope")
        msgspec.json.encode(result)  # which refuses some of what json reads
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UnsupportedError(f"CNI: the last plugin answers no result as the spec has it: {error!r}") from error
    if result is None:
        raise UnsupportedError("CNI: the last plugin answers no result")
    return result


def _tell(outcome: Outcome) -> str:
    try:
        answer = json.loads(outcome.output)
        return escape(f"{answer['msg']} {answer.get('details', '')}".strip())[-500:]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return outcome.problem
