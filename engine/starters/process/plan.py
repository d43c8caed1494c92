"""The plan that a container's process is given: what it is to become, in memory alone.

What of the engine's environment is handed on, and the secrets of one start, are in no file.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from limpet.engine.starters.environment import choose_host_environment
from limpet.engine.starters.process.accounts import HostAccounts
from limpet.engine.starters.users import may_set_groups
from limpet.schema.runtime_spec import MountSpec, Spec

_PROPAGATIONS = {"rslave": "slave", "rshared": "shared"}


def make_plan(
    spec: Spec,
    environment: Mapping[bytes, bytes],
    inherited: tuple[str, ...],
    secrets: Mapping[str, str],
    handed_on: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the plan; `keeper/root.py` and `keeper/gate.py` say what its fields mean.

    The host's part of the environment, for a container of the host's own root, is overridden by what config.json has,
    and that by the secrets. `handed_on` is what `read_handed_on` returns.
    """
    process, user = spec.process, spec.process.user
    is_root = os.geteuid() == 0
    merged = dict(entry.split("=", 1) for entry in process.env)
    if not spec.root.path:
        uid = os.geteuid() if user.uid is None else user.uid
        account = HostAccounts().find_user(uid)
        is_engine_user = uid == os.geteuid()
        merged = choose_host_environment(environment, inherited, account, is_engine_user=is_engine_user) | merged
    return {
        "args": process.args,
        "env": [f"{name}={value}" for name, value in (merged | dict(secrets)).items()],
        "cwd": process.cwd,
        "root": spec.root.path,
        "mounts": [_plan_mount(mount) for mount in spec.mounts],
        "uid": user.uid,
        "gid": user.gid,
        "groups": user.additional_gids,
        "setgroups": (bool(user.additional_gids) or user.uid is not None) and may_set_groups(),
        "no_new_privs": process.no_new_privileges,
        "own_uts_namespace": is_root,
        "hostname": spec.hostname,
        **handed_on,
    }


def write_plan(plan: Mapping[str, Any]) -> int:
    """Return a descriptor of memory that holds the plan, with offset 0; it is nowhere on disk. Raises OSError."""
    descriptor = os.memfd_create("limpet-plan", os.MFD_CLOEXEC)
    try:
        data = json.dumps(plan).encode()  # ASCII: surrogates are escaped
        while data:
            data = data[os.write(descriptor, data) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _plan_mount(mount: MountSpec) -> dict[str, Any]:
    propagation = next((_PROPAGATIONS[each] for each in mount.options if each in _PROPAGATIONS), "private")
    return {
        "source": mount.source,
        "target": mount.destination,
        "readonly": "ro" in mount.options,
        "propagation": propagation,
    }
