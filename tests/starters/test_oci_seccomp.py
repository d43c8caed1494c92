"""Which seccomp profile a container gets: pure, of a file with conditions, of the machine and of capabilities."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.starters.oci import seccomp
from limpet.engine.starters.oci.seccomp import make_seccomp
from limpet.schema.cri import LinuxContainerSecurityContext, ProfileType, SecurityProfile
from limpet.schema.errors import InvalidInputError, UnsupportedError

RULES: dict[str, dict[str, Any]] = {
    "always": {},
    "ours": {"includes": {"arches": ["amd64", "s390"]}},
    "theirs": {"includes": {"arches": ["s390"]}},
    "not_ours": {"excludes": {"arches": ["amd64"]}},
    "held": {"includes": {"caps": ["CAP_KILL"]}},
    "not_held": {"includes": {"caps": ["CAP_KILL", "CAP_SYS_ADMIN"]}},
    "without": {"excludes": {"caps": ["CAP_SYS_ADMIN"]}},
    "not_with": {"excludes": {"caps": ["CAP_KILL"]}},
}
PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "archMap": [
        {"architecture": "SCMP_ARCH_S390", "subArchitectures": ["SCMP_ARCH_S390X"]},
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
    ],
    "syscalls": [{"names": [name], "action": "SCMP_ACT_ALLOW", **rule} for name, rule in RULES.items()],
}


def asked(path: Path) -> LinuxContainerSecurityContext:
    profile = SecurityProfile(profile_type=ProfileType.LOCALHOST, localhost_ref=str(path))
    return LinuxContainerSecurityContext(seccomp=profile)


def test_what_a_profile_says_of_other_machines_and_capabilities_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime knows no conditions: what is not of this machine and this container is not given to it."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    found = make_seccomp(asked(path), ["KILL", "CHOWN"])
    assert found is not None
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert [rule["names"] for rule in found["syscalls"]] == [["always"], ["ours"], ["held"], ["without"]]
    path.write_text(json.dumps(PROFILE) + " " * (4 << 20))
    with pytest.raises(InvalidInputError, match="larger than 4194304 bytes"):
        make_seccomp(asked(path), [])


def test_a_host_without_a_profile_says_which_package_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that is to have the default one is not run without."""
    monkeypatch.setattr(seccomp, "DEFAULT_PROFILES", (str(tmp_path / "none"),))
    with pytest.raises(UnsupportedError, match=f"no profile in {tmp_path}/none; .* apt-get install golang"):
        make_seccomp(LinuxContainerSecurityContext(seccomp=SecurityProfile()), [])
