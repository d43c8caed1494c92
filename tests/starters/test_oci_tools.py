"""The programs that the OCI starter needs are found, and known by what they say of themselves."""

import os
from pathlib import Path

import pytest

from limpet.engine.starters.oci import OciStarter, tools
from limpet.engine.starters.oci.tools import Tool, Tools, command_of, has_hybrid_cgroups
from limpet.schema.errors import InvalidInputError, UnsupportedError


def make(path: Path, said: str, code: int = 0) -> str:
    path.write_text(f"#!/bin/sh\ntest \"$1\" = --version && printf '{said}'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("said", "kind", "version"),
    [
        ("runc version 1.1.5+ds1\\ncommit: x\\n", "runc", (1, 1)),
        ("runc version 2.0", "runc", (2, 0)),
        ("crun version 1.0\\n", "crun", (1, 0)),
        ("crun version 1.23.1", "crun", (1, 23)),
        ("conmon version 2.1.6", "conmon", (2, 1)),
    ],
)
def test_what_is_known(tmp_path: Path, said: str, kind: str, version: tuple[int, int]) -> None:
    """Whatever the file is called; by its path or by PATH."""
    path = make(tmp_path / "it", said)
    assert Tools().find(path) == Tool(kind, path, version)


@pytest.mark.parametrize(
    ("said", "code", "why"),
    [
        ("runc version 1.0.3", 0, r"is runc 1\.0; 1\.1 or newer is needed"),
        ("crun version 0.21", 0, r"is crun 0\.21; 1\.0 or newer"),
        ("conmon version 2.0.9", 0, r"is conmon 2\.0; 2\.1 or newer"),
        ("runc version 1.1.5", 3, "neither runc, crun nor conmon says 'runc version 1.1.5'"),
        ("youki version 1.1.5", 0, "neither runc, crun nor conmon says 'youki version 1.1.5'"),
        ("", 3, "it ended with 3 and said nothing"),
    ],
)
def test_what_is_not(tmp_path: Path, said: str, code: int, why: str) -> None:
    """Too old, something else, or something that fails: with what is needed, or what it said."""
    with pytest.raises(UnsupportedError, match=why):
        Tools().find(make(tmp_path / "it", said, code))


def test_what_is_not_there_or_cannot_be_executed(tmp_path: Path) -> None:
    """With the package's name, or the kernel's reason."""
    with pytest.raises(UnsupportedError, match=r"^nosuchrunc is not installed; on Debian: apt-get install nosuchrunc$"):
        Tools().find("nosuchrunc")
    with pytest.raises(UnsupportedError, match=r"^/nowhere/conmon is not installed; .* apt-get install conmon$"):
        Tools().find("/nowhere/conmon")
    (tmp_path / "lost").write_text("#!/no/such\n")
    (tmp_path / "lost").chmod(0o755)
    with pytest.raises(UnsupportedError, match="cannot be executed: No such file or directory"):
        Tools().find(str(tmp_path / "lost"))


@pytest.mark.parametrize("path", ["", "bin"])
def test_a_relative_path_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Given as the program's, or in PATH: what runs it works elsewhere, and found /bin's there, or none."""
    (tmp_path / "bin").mkdir()
    made = make(tmp_path / "bin" / "myrunc", "runc version 1.1.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    assert Tools().find("myrunc" if path else "bin/myrunc").path == made


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/", "a\nb"])
def test_a_starters_name_is_that_of_a_directory(name: str) -> None:
    """Or what the runtime keeps would be elsewhere in the state directory, or outside."""
    with pytest.raises(InvalidInputError, match=r"^name "):
        OciStarter("runc", name=name)


def test_a_program_is_asked_again_when_it_has_changed_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before; one that was removed is looked for anew, in all of PATH."""
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
    monkeypatch.setenv("PATH", f"{first}:{second}:{os.environ['PATH']}")
    make(first / "myrunc", "runc version 1.1.1")
    make(second / "myrunc", "runc version 1.4")
    found = Tools()
    assert found.find("myrunc").version == (1, 1)
    asked = tools._identify
    monkeypatch.setattr(tools, "_identify", lambda path: pytest.fail(f"{path} was asked again"))
    assert found.find("myrunc").version == (1, 1)
    monkeypatch.setattr(tools, "_identify", asked)
    make(first / "myrunc", "runc version 1.2.34")
    assert found.find("myrunc").version == (1, 2)
    (first / "myrunc").unlink()
    assert found.find("myrunc") == Tool("runc", str(second / "myrunc"), (1, 4))
    (second / "myrunc").unlink()
    with pytest.raises(UnsupportedError, match="myrunc is not installed"):
        found.find("myrunc")


def test_crun_gets_a_mount_namespace_where_it_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where version 2 of cgroups has controllers beside version 1; runc never."""
    monkeypatch.setattr(tools, "_UNIFIED", str(tmp_path))
    crun, runc = Tool("crun", "/bin/crun", (1, 8)), Tool("runc", "/bin/runc", (1, 1))
    assert not has_hybrid_cgroups()
    (tmp_path / "cgroup.controllers").write_text("\n")
    assert not has_hybrid_cgroups()
    assert command_of(crun) == ("/bin/crun",)
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    assert has_hybrid_cgroups()
    assert command_of(runc) == ("/bin/runc",)
    program, *words, last = command_of(crun)
    assert (os.path.basename(program), words[:3], last) == ("unshare", ["-m", "--propagation", "slave"], "/bin/crun")
    monkeypatch.setattr(tools, "clean_environment", lambda: {"PATH": str(tmp_path)})
    with pytest.raises(UnsupportedError, match=r"unshare is not installed, .*apt-get install util-linux"):
        command_of(crun)
