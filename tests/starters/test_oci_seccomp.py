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


ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}


def ruled(**rule: Any) -> dict[str, Any]:
    """A profile with one rule."""
    return {**ALLOW, "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", **rule}]}


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ([], "Expected `object`"),
        ({}, "`defaultAction`"),
        ({"defaultAction": 5}, "Expected `str`"),
        ({"defaultAction": "SCMP_ACT_NOTHING"}, "'SCMP_ACT_NOTHING'"),
        ({**ALLOW, "defaultErrnoRet": -1}, "defaultErrnoRet"),
        ({**ALLOW, "architectures": ["SCMP_ARCH_ABACUS"]}, "there is no architecture 'SCMP_ARCH_ABACUS'"),
        ({**ALLOW, "flags": ["SECCOMP_FILTER_FLAG_ABACUS"]}, "flags"),
        ({**ALLOW, "syscalls": "mkdir"}, r"\$\.syscalls"),
        (ruled(names=[]), "a rule names no system call"),
        (ruled(action=None), "action"),
        (ruled(action="SCMP_ACT_NOTIFY"), "'SCMP_ACT_NOTIFY'"),
        (ruled(errnoRet=4096), "errnoRet"),
        (ruled(args=[{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]), r"args\[0\]\.index"),
        (ruled(args=[{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}]), r"args\[0\]\.value"),
        (ruled(args=[{"index": 0, "value": 0, "op": "SCMP_CMP_ABOUT"}]), "'SCMP_CMP_ABOUT'"),
    ],
)
def test_a_profile_that_no_runtime_takes_is_refused(tmp_path: Path, profile: object, why: str) -> None:
    """At once, and with the place in it; the runtimes say at the start that they cannot load their config."""
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    with pytest.raises(InvalidInputError, match=f"profile '{path}' is none: .*{why}"):
        make_seccomp(asked(path), [])


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    """As no profile."""
    path = tmp_path / "profile.json"
    path.write_bytes(text)
    with pytest.raises(InvalidInputError, match="is none: "):
        make_seccomp(asked(path), [])


def test_all_that_a_rule_says_is_handed_on(tmp_path: Path) -> None:
    """Its conditions on arguments, its errors, and the filter's flags; `name` is an older word for `names`."""
    path = tmp_path / "profile.json"
    most = 2**64 - 1
    args = [{"index": 5, "value": most, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]
    rules = [{"name": "mkdir", "action": "SCMP_ACT_ERRNO", "errnoRet": 0}, {**ruled(args=args)["syscalls"][0]}]
    flags = ["SECCOMP_FILTER_FLAG_LOG"]
    path.write_text(json.dumps({**ALLOW, "defaultErrnoRet": 38, "flags": flags, "syscalls": rules}))
    found = make_seccomp(asked(path), [])
    assert found is not None
    assert (found["defaultErrnoRet"], found["flags"]) == (38, flags)
    assert found["syscalls"] == [
        {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
        {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": args},
    ]
