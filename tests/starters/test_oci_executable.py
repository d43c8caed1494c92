"""Whether the kernel can execute a container's program, found in its root file system: the same as execve(2) says."""

import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from limpet.engine.starters.oci import executable
from limpet.engine.starters.oci.executable import MISSING, find_flaw


def put(root: Path, name: str, data: bytes, mode: int = 0o755) -> Path:
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def elf(interpreter: str = "", *, machine: int = 0) -> bytes:
    """The head of an ELF file of this machine, with one segment."""
    with open("/proc/self/exe", "rb") as file:
        head = bytearray(file.read(64))
    if machine:
        struct.pack_into("=H", head, 18, machine)
    struct.pack_into("=Q", head, 32, 64)
    struct.pack_into("=HH", head, 54, 56, 1)
    text = interpreter.encode() + b"\0"
    kind = 3 if interpreter else 1
    return bytes(head) + struct.pack("=IIQQQQQQ", kind, 4, 120, 0, 0, len(text), len(text), 1) + text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "/bin/static", elf())
    put(tmp_path, "/lib/ld.so", elf())
    put(tmp_path, "/bin/linked", elf("/lib/ld.so"))
    return tmp_path


def flaw(root: Path, *args: str, cwd: str = "/", mounts: tuple[str, ...] = (), env: tuple[str, ...] = ()) -> str:
    config: dict[str, Any] = {
        "process": {"args": list(args), "cwd": cwd, "env": list(env)},
        "root": {"path": str(root)},
        "mounts": [{"destination": each} for each in ("/proc", "/dev", *mounts)],
    }
    return find_flaw(config)


def test_programs_that_can_be_executed(root: Path) -> None:
    """By a path, in the working directory, by PATH, or through links, which stay in the root; also as scripts."""
    put(root, "/bin/script", b"#! /bin/linked -x\nexit\n")
    put(root, "/bin/of-script", b"#!/bin/script\n")
    put(root, "/work/here", b"#!bin/static")
    (root / "bin/link").symlink_to("/bin/linked")
    (root / "bin/up").symlink_to("../../../../bin/static")
    for program in ("static", "linked", "script", "of-script", "link", "up"):
        assert flaw(root, f"/bin/{program}") == ""
    assert flaw(root, "./here", cwd="/work") == flaw(root, "work/../work/here") == ""
    assert flaw(root, "static", env=("A=b", "PATH=/none:/bin")) == flaw(root, "static") == ""
    assert flaw(root, "here", env=("PATH=/none::/work",)) == ""
    assert find_flaw({}) == ""


def test_programs_that_are_not_there(root: Path) -> None:
    """Or are no files, or may be executed by nobody, or are looked for elsewhere."""
    put(root, "/bin/plain", elf(), 0o644)
    (root / "bin/circle").symlink_to("circle")
    for program in ("/bin/none", "/bin", "/bin/plain", "/bin/static/x", "/bin/circle", "static"):
        assert flaw(root, program, env=("PATH=/none",)) == MISSING
    assert flaw(root, "here", cwd="/bin") == flaw(root, f"/bin/{'n' * 300}") == MISSING


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "exec format error$"),
        (b"garbage", "exec format error$"),
        (b"#!", "its interpreter '' is missing"),
        (b"#!/no/such x\n", "its interpreter '/no/such' is missing"),
        (b"#!/bin/no\0such\n", "its interpreter '/bin/no' is missing"),
        (elf("/lib/none"), "its interpreter '/lib/none' is missing"),
        (elf(machine=8), "another kind of machine, or damaged"),
        (elf()[:63], "another kind of machine, or damaged"),
        (elf()[:119], "another kind of machine, or damaged"),
        (b"#!/bin/it\n", "too many levels of interpreters"),
    ],
)
def test_programs_that_cannot_be_executed(root: Path, data: bytes, why: str) -> None:
    """Each with the kernel's reason; the one whose interpreter it is, too, but for an ELF file's."""
    put(root, "/bin/it", data)
    assert why.rstrip("$") in flaw(root, "/bin/it")
    if why.endswith("$"):
        assert flaw(root, "/bin/it").endswith(why[:-1])
    put(root, "/bin/by-it", b"#!/bin/it\n")
    assert flaw(root, "/bin/by-it") != ""
    put(root, "/bin/loaded-by-it", elf("/bin/it"))
    assert flaw(root, "/bin/loaded-by-it") == ""


ALLOWED = """
import os, sys
from limpet.engine.starters.oci.executable import find_flaw
root, program = sys.argv[1:]
for uid, gid, groups in ((0, 0, []), (7, 7, []), (8, 7, []), (8, 8, [7]), (9, 9, [])):
    if os.fork() == 0:
        os.chroot(root)
        os.chdir("/")
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        try:
            os.execv(program, [program])
        except PermissionError:
            os._exit(126)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    effective = [] if uid else ["CAP_DAC_OVERRIDE"]
    user = {"uid": uid, "gid": gid, "additionalGids": groups}
    process = {"args": [program], "user": user, "capabilities": {"effective": effective}}
    found = find_flaw({"process": process, "root": {"path": root}})
    assert found.endswith("permission denied") == (code == 126), (uid, gid, groups, code, found)
    print(code, end=" ")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
@pytest.mark.parametrize(
    ("modes", "program", "codes"),
    [
        ({}, "/bin/program", "0 0 0 0 0"),
        ({"bin/program": 0o754}, "/bin/program", "0 0 0 0 126"),
        ({"bin/program": 0o745}, "/bin/program", "0 0 126 126 0"),
        ({"bin/program": 0o001}, "/bin/program", "0 126 126 126 0"),
        ({"bin": 0o750}, "/bin/program", "0 0 0 0 126"),
        ({"bin": 0o750}, "/link", "0 0 0 0 126"),
        ({"away": 0o700}, "/away/link", "0 0 126 126 126"),
        ({"bin/program": 0o700}, "/script", "0 0 126 126 126"),
        ({".": 0o700}, "/bin/program", "0 0 126 126 126"),
    ],
)
def test_who_may_execute_a_program(tmp_path: Path, modes: dict[str, int], program: str, codes: str) -> None:
    """The same as the kernel says of root, the owner, two ways of being in the group, and others."""
    put(tmp_path, "/bin/program", Path("/bin/true").read_bytes())
    listed = subprocess.run(["ldd", "/bin/true"], check=True, capture_output=True, text=True)
    for path in re.findall(r"(/\S+)", listed.stdout):
        put(tmp_path, path, Path(path).read_bytes())
    put(tmp_path, "/script", b"#!/bin/program\n")
    (tmp_path / "away").mkdir()
    (tmp_path / "away/link").symlink_to("../bin/program")
    (tmp_path / "link").symlink_to("bin/program")
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 7, 7, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o755)
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    found = subprocess.run(
        [sys.executable, "-c", ALLOWED, str(tmp_path), program], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == codes


PERMITTED = """
import ctypes, os, struct, sys
from limpet.engine.starters.oci.executable import find_flaw
program, script = sys.argv[1:]
libc = ctypes.CDLL(None)
seen = set()
for number, name in ((12, "CAP_NET_ADMIN"), (34, "CAP_SYSLOG")):
    for version in (0x02000000, 0x02000001):  # with the flag "effective", and without
        bits = 1 << number
        data = struct.pack("<5I", version, bits & 0xFFFFFFFF, 0, bits >> 32, 0)
        os.setxattr(program, "security.capability", data)
        for bounding in ([], [name]):
            for args in ([program], [script]):
                if os.fork() == 0:
                    if not bounding:
                        assert libc.prctl(24, number, 0, 0, 0) == 0  # PR_CAPBSET_DROP
                    try:
                        os.execv(args[0], args)
                    except PermissionError:
                        os._exit(126)
                is_refused = os.waitstatus_to_exitcode(os.wait()[1]) == 126
                seen.add(is_refused)
                capabilities = {"bounding": bounding, "effective": ["CAP_DAC_OVERRIDE"]}
                process = {"args": args, "capabilities": capabilities}
                found = find_flaw({"process": process, "root": {"path": "/"}})
                assert ("not permitted" in found) == is_refused, (name, version, bounding, args, found)
                assert found == "" or (name in found and args[0] in found)
assert seen == {True, False}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file capabilities")
def test_a_program_that_counts_on_capabilities(tmp_path: Path) -> None:
    """It is refused where its file has the flag "effective" and it would not get all, as the kernel does it."""
    program = put(tmp_path, "/program", Path("/bin/true").read_bytes())
    script = put(tmp_path, "/script", f"#!{program}\n".encode())
    subprocess.run([sys.executable, "-c", PERMITTED, str(program), str(script)], check=True)


def test_as_many_scripts_as_the_kernel_takes(tmp_path: Path) -> None:
    """Those that are each other's interpreters: the kernel itself says how many."""
    last = "/bin/true"
    for number in range(8):
        path = put(tmp_path, f"/{number}", f"#!{last}\n".encode())
        last = str(path)
        try:
            subprocess.run([last], check=True)
            expected = ""
        except OSError:
            expected = "too many levels of interpreters"
        config = {"process": {"args": [last], "env": []}, "root": {"path": "/"}}
        assert find_flaw(config)[-len("too many levels of interpreters") :] == expected


def test_what_is_on_a_mount_is_not_looked_into(root: Path) -> None:
    """It may be there, by itself, by a link, or by an interpreter; what every container has mounted does not count."""
    (root / "bin/link").symlink_to("/data/garbage")
    put(root, "/bin/script", b"#!/data/sh\n")
    put(root, "/bin/lost", b"#!/no/such\n")
    put(root, "/data/garbage", b"garbage")
    for program in ("/data/garbage", "/data/none", "/bin/link", "/bin/script", "/bin/lost"):
        assert flaw(root, program) != ""
        assert flaw(root, program, mounts=("/data/",)) == ""
    assert flaw(root, "/database/x", mounts=("/data",)) == flaw(root, "/proc/none") == MISSING
    assert flaw(root, "none", env=("PATH=/bin:/data",), mounts=("/data",)) == ""
    assert flaw(root, "static", env=("PATH=/bin:/data",), mounts=("/data",)) == ""


LONG = """
import os, resource
from limpet.engine.starters.oci.executable import find_flaw
limit = int(os.sys.argv[1])
resource.setrlimit(resource.RLIMIT_STACK, (limit, resource.getrlimit(resource.RLIMIT_STACK)[1]))
room = 6 << 20 if limit < 0 else max(min(limit // 4, 6 << 20), 128 << 10)
most, many = 32 * os.sysconf("SC_PAGE_SIZE"), room // 1000
for args, count in (
    (["x" * (most - 1)], 0), (["x" * most], 0),
    (["x" * 991] * (many - 8), 0), (["x" * 991] * (many + 8), 0), (["x" * 991] * (many // 2), many // 2 + 8),
):
    args, env = ["/bin/true", *args], {f"A{number:09}": "x" * 980 for number in range(count)}
    try:
        os.waitpid(os.posix_spawn("/bin/true", args, env), 0)
        expected = ""
    except OSError:
        expected = "exec /bin/true: argument list too long"
    process = {"args": args, "env": [f"{name}={value}" for name, value in env.items()]}
    found = find_flaw({"process": process, "root": {"path": "/"}})
    assert found == expected, (len(args), count, found, expected)
"""


@pytest.mark.parametrize("limit", [256 << 10, 1 << 20, 8 << 20, resource.RLIM_INFINITY])
def test_arguments_are_too_long_when_the_kernel_says_so(limit: int) -> None:
    """For one, and for all of them with the environment, by whatever limit of the stack there is."""
    subprocess.run([sys.executable, "-c", LONG, str(limit)], check=True)


def test_a_disk_that_fails_proves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be looked at now is raised, not said to be missing."""

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(executable, "open_in_root", fail)
    with pytest.raises(OSError, match="Input/output"):
        flaw(root, "/bin/static")
