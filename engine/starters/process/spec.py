"""From a container's config and its image to the config.json of its bundle, and back."""

import os

import msgspec

from limpet.engine.starters.contract import Launch
from limpet.engine.starters.environment import DEFAULT_PATH, add_missing, merge_environment
from limpet.engine.starters.host_path import require_plain
from limpet.engine.starters.process.accounts import HostAccounts, RootAccounts
from limpet.engine.starters.process.root_files import require_hostname
from limpet.engine.starters.process.unapplied import Abilities
from limpet.engine.starters.users import Rights, choose_user
from limpet.recovery.files import read_small_file
from limpet.schema.command_line import choose_args
from limpet.schema.cri import ContainerConfig, Mount, MountPropagation
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import InvalidInputError, StateDirectoryError, quote_path
from limpet.schema.layout import CONFIG_BYTES, CONFIG_FILE, ROOTFS, WORKING
from limpet.schema.lengths import require_path_fits, require_same_bytes
from limpet.schema.runtime_spec import MountSpec, ProcessSpec, Root, Spec

_spec = make_decoder(Spec)
_PROPAGATIONS = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}


def make_spec(launch: Launch, abilities: Abilities) -> Spec:
    """Return what is to be run. Nothing of the engine's environment is in it. Raises InvalidInputError."""
    config, image = launch.metadata.config, launch.metadata.image_manifest
    root = "" if image.is_builtin else os.path.join(launch.bundle_path, ROOTFS)
    accounts = RootAccounts(root) if root else HostAccounts()
    rights = Rights.of_this_process(has_own_root=bool(root))
    user, account = choose_user(image.config, config, accounts, rights)
    env = merge_environment(image.config, config)
    if root:
        env = add_missing(env, {"PATH": DEFAULT_PATH, "HOME": account.home if account else "/"})
    context = config.linux.security_context if config.linux else None
    hostname = launch.sandbox.config.hostname if launch.sandbox else ""
    return Spec(
        process=ProcessSpec(
            args=choose_args(image.config, config),
            env=env,
            cwd=_choose_directory(launch, config),
            user=user,
            no_new_privileges=context is not None and context.no_new_privs,
        ),
        root=Root(path=_to_utf8(root)),
        hostname=require_hostname(hostname) if hostname and abilities.own_hostname else "",
        mounts=tuple(map(_make_mount, _mounts_of(config))) if root and abilities.own_mounts else (),
    )


def _choose_directory(launch: Launch, config: ContainerConfig) -> str:
    image = launch.metadata.image_manifest
    chosen = config.working_dir or image.config.working_dir
    if not chosen:
        return os.path.join(_to_utf8(launch.bundle_path), WORKING) if image.is_builtin else "/"
    if not os.path.isabs(chosen):
        raise InvalidInputError(f"working_dir {quote_path(chosen)}: an absolute path is needed")
    require_path_fits("working_dir", chosen)
    return chosen


def _to_utf8(path: str) -> str:
    """Return a path of this file system as a text whose UTF-8 is the path's bytes, whatever the locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _mounts_of(config: ContainerConfig) -> list[Mount]:
    """Return the mounts of files and directories, outer ones first, as they must be made."""
    found = [mount for mount in config.mounts if mount.image is None]
    return sorted(found, key=lambda mount: os.path.normpath(mount.container_path).count("/"))


def _make_mount(mount: Mount) -> MountSpec:
    if not os.path.isabs(mount.container_path) or os.path.normpath(mount.container_path).strip("/") == "":
        raise InvalidInputError(
            f"mounts.container_path {quote_path(mount.container_path)}: an absolute path below / is needed"
        )
    require_path_fits("mounts.container_path", mount.container_path)
    require_same_bytes("mounts.host_path", mount.host_path)
    if not os.path.isabs(mount.host_path):
        raise InvalidInputError(f"mounts.host_path {quote_path(mount.host_path)}: an absolute path is needed")
    try:
        is_there = os.path.exists(mount.host_path)
    except ValueError:
        is_there = False
    if not is_there or "\0" in mount.container_path:
        raise InvalidInputError(
            f"mounts.host_path {quote_path(mount.host_path)} does not exist; make it, or leave out the mount at"
            f" {quote_path(mount.container_path)}"
        )
    require_plain("mounts.host_path", mount.host_path)
    options = ("rbind", *(("ro",) if mount.readonly else ()), _PROPAGATIONS[mount.propagation])
    return MountSpec(destination=mount.container_path, source=mount.host_path, options=options)


def read_spec(bundle_path: str) -> Spec:
    """Return what `make_spec` made, as the bundle has it. Raises StateDirectoryError if it is damaged or gone."""
    path = os.path.join(bundle_path, CONFIG_FILE)
    try:
        return _spec.decode(read_small_file(path, CONFIG_BYTES))
    except OSError as error:
        raise StateDirectoryError(f"bundle {bundle_path}: {error.strerror} ({error.filename or path})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StateDirectoryError(f"{path} is damaged: {error}; release the container and make it anew") from error
