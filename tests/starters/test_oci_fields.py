"""Each field of the CRI's configs does with an OCI runtime what docs/cri-fields.md says of it."""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from limpet import Engine
from limpet.engine.starters.oci import capabilities
from limpet.schema.cri import ContainerConfig, Mount, PodSandboxConfig
from tests.cri_page import make_value, parents, put, read_rows, strip, walk

_CONTEXT = "linux.security_context"
_LIMITS = "linux.resources"
ELSEWHERE = frozenset({"metadata.name", "metadata.attempt", "image.image", "labels", "stop_signal"})
"""What acts without the runtime, as for any starter."""
BY_CONMON = frozenset({"log_path", "stdin", "stdin_once"})
"""What conmon does: see `test_oci_life` and `test_oci_sessions`."""
AT_START = frozenset({f"{_LIMITS}.oom_score_adj", "linux.cgroup_parent", "linux.sysctls"})
"""What is put into config.json when the container is started: see `test_oci_spec` and `test_oci_sandboxes`."""
BY_SANDBOX = frozenset({"hostname", "log_directory", "dns_config", "linux.security_context.namespace_options"})
"""What acts in what a sandbox holds, or in its directory: see `test_oci_sandboxes`."""
GIVEN: Mapping[str, Any] = {
    "working_dir": "/tmp",
    "envs": [{"key": "A", "value": "b"}],
    "mounts": [{"container_path": "/mnt", "host_path": "/tmp"}],
    "devices": [{"container_path": "/dev/mine", "host_path": "/dev/null", "permissions": "rwm"}],
    "tty": True,
    f"{_LIMITS}.cpu_period": "50000",
    f"{_LIMITS}.cpu_quota": "20000",
    f"{_LIMITS}.cpu_shares": "512",
    f"{_LIMITS}.cpuset_cpus": "0",
    f"{_LIMITS}.cpuset_mems": "0",
    f"{_LIMITS}.unified": {"pids.max": "77"},
    f"{_LIMITS}.memory_limit_in_bytes": "67108864",
    f"{_LIMITS}.memory_swap_limit_in_bytes": "67108864",
    f"{_LIMITS}.hugepage_limits": [{"page_size": "2MB", "limit": "2097152"}],
    f"{_CONTEXT}.run_as_user": {"value": "1000"},
    f"{_CONTEXT}.run_as_group": {"value": "1003"},
    f"{_CONTEXT}.supplemental_groups": ["2000"],
    f"{_CONTEXT}.run_as_username": "web",
    f"{_CONTEXT}.supplemental_groups_policy": "Strict",
    f"{_CONTEXT}.capabilities": {"drop_capabilities": ["CHOWN"]},
    f"{_CONTEXT}.namespace_options": {"ipc": "NODE"},
    f"{_CONTEXT}.masked_paths": ["/proc/keys"],
    f"{_CONTEXT}.readonly_paths": ["/proc/sys"],
    f"{_CONTEXT}.seccomp": {"profile_type": "RuntimeDefault"},
    f"{_CONTEXT}.seccomp_profile_path": "runtime/default",
}
"""Values for fields that do not take just any."""
BESIDE: Mapping[str, Mapping[str, Any]] = {
    f"{_CONTEXT}.run_as_group": {f"{_CONTEXT}.run_as_user": {"value": "1000"}},
    f"{_CONTEXT}.supplemental_groups_policy": {f"{_CONTEXT}.run_as_username": "web"},
    f"{_LIMITS}.memory_swap_limit_in_bytes": {f"{_LIMITS}.memory_limit_in_bytes": "33554432"},
}
"""What else a field needs to have an effect."""
UNAVAILABLE = frozenset(
    {
        f"{_LIMITS}.hugepage_limits",
        f"{_LIMITS}.unified",
        f"{_CONTEXT}.apparmor",
        f"{_CONTEXT}.apparmor_profile",
    }
)
"""What only some hosts can do: told where this one cannot."""
_numbers = count()


def leaves(config: type[Any], rows: Mapping[str, str]) -> Iterator[tuple[str, inspect.Type]]:
    """Each field that is no message, and each message whose row stands for all in it."""
    whole = {row for row in rows if not any(each.startswith(f"{row}.") for each in rows)}
    for path, kind in walk(inspect.type_info(config)):
        if path in whole or (not isinstance(kind, inspect.StructType) and not set(parents(path)) & whole):
            yield path, kind


def create(engine: Engine, sandbox_id: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Create a container with these fields; return its config.json, less what names it, and what is not done."""
    asked: dict[str, Any] = {"metadata": {"name": f"f{next(_numbers)}"}, "image": {"image": "box:1"}}
    for path, value in {"command": ["/bin/true"], **fields}.items():
        asked = put(asked, path, value)
    container = engine.create_container(asked, sandbox_id)
    text = Path(container.metadata.root_dir, "config.json").read_text().replace(container.id, "ID")
    unapplied = container.status.unapplied
    container.release()
    container.delete()
    return json.loads(text), unapplied


@pytest.mark.long
def test_each_field_of_a_container(shared: Engine) -> None:
    """What is told is named with a reason, what is kept changes nothing, and what acts is in config.json."""
    rows = read_rows("ContainerConfig", of_oci=True)
    plain, _ = create(shared, "runc", {})
    for path, kind in leaves(ContainerConfig, rows):
        effect = next(rows[each] for each in (path, *parents(path)) if each in rows)
        if path in ELSEWHERE | BY_CONMON | AT_START:
            assert effect == "acts"
            continue
        beside = BESIDE.get(path, {})
        before = create(shared, "runc", beside)[0] if beside else plain
        after, unapplied = create(shared, "runc", {**beside, path: GIVEN.get(path, make_value(kind))})
        if effect == "told" or (path in UNAVAILABLE and unapplied):
            assert list(unapplied) == [path.rpartition(".")[2]]
        else:
            assert not unapplied, path
        assert (before != after) == (effect == "acts" and not unapplied), path


def test_each_field_of_a_mount(shared: Engine) -> None:
    """The same of the fields of a mount: what is not done is told with `mounts.` before it."""
    told = {"selinux_relabel", "uid_mappings", "gid_mappings", "image", "image_sub_path", "propagation"}
    asked = {"container_path": "/mnt", "host_path": "/tmp"}
    before, _ = create(shared, "runc", {"mounts": [asked]})
    mount = inspect.type_info(Mount)
    assert isinstance(mount, inspect.StructType)
    for field in mount.fields:
        if field.name in asked:
            continue
        value = "PROPAGATION_BIDIRECTIONAL" if field.name == "propagation" else make_value(strip(field.type))
        after, unapplied = create(shared, "runc", {"mounts": [{**asked, field.encode_name: value}]})
        if field.name == "propagation" and not unapplied:  # this host's /tmp is shared
            assert before != after
        elif field.name in told:
            assert list(unapplied) == [f"mounts.{field.name}"]
        else:
            assert not unapplied
            assert before != after, field.name


@pytest.mark.long
def test_each_field_of_a_sandbox(shared: Engine) -> None:
    """What is told is named in each of its containers."""
    rows = read_rows("PodSandboxConfig", of_oci=True)
    for path, kind in leaves(PodSandboxConfig, rows):
        effect = next(rows[each] for each in (path, *parents(path)) if each in rows)
        if effect == "acts":
            assert path in ELSEWHERE | AT_START | BY_SANDBOX, path
            continue
        asked = put({"metadata": {"name": f"s{next(_numbers)}"}}, path, make_value(kind))
        asked = put(asked, "metadata.name", f"s{next(_numbers)}")
        sandbox = shared.create_sandbox(asked, runtime_handler="runc")
        _, unapplied = create(shared, sandbox.id, {})
        sandbox.remove()
        name = path.removeprefix("linux.").partition(".")[0]
        assert list(unapplied) == ([f"sandbox.{name}"] if effect == "told" else []), path


def test_what_asks_for_nothing_is_not_told(shared: Engine) -> None:
    """A message that is there and has nothing in it, as clients in Go write it."""
    linux: dict[str, Any] = {"overhead": {}, "resources": {}, "security_context": {}}
    sandbox = shared.create_sandbox({"metadata": {"name": "empty"}, "linux": linux}, runtime_handler="runc")
    assert create(shared, sandbox.id, {f"{_CONTEXT}.selinux_options": {}})[1] == {}
    sandbox.remove()


def test_a_capability_that_the_engine_has_not_is_told(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it runs in a container itself."""
    monkeypatch.setattr(capabilities, "available", lambda: ("CHOWN", "SYS_TIME"))
    field = f"{_CONTEXT}.capabilities"
    asked = {"add_capabilities": ["SYS_BOOT", "SYS_TIME", "SYS_RAWIO"]}
    why = "the engine itself does not have SYS_BOOT, SYS_RAWIO"
    assert create(shared, "runc", {field: asked})[1] == {"capabilities": why}
    assert create(shared, "runc", {field: {"add_capabilities": ["SYS_TIME"]}})[1] == {}
    both = {"add_capabilities": ["SYS_TIME", "SYS_BOOT"], "drop_capabilities": ["CAP_SYS_TIME", "CHOWN"]}
    why = "the engine itself does not have SYS_BOOT; added as well, or ambient, and so not dropped: SYS_TIME"
    assert create(shared, "runc", {field: both})[1] == {"capabilities": why}
