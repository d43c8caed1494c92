"""A container gets what its image and its config say, and nothing of the engine's; what is not done is told."""

import ctypes
import itertools
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet.engine import Container, Engine, errors
from limpet.engine.fleet import batch
from limpet.engine.lifecycle.cri_status import to_cri_status
from limpet.engine.starters.environment import require_secrets
from limpet.engine.starters.process.accounts import RootAccounts
from limpet.engine.starters.process.keeper.root import _mount, open_in_root
from limpet.engine.starters.process.root_files import write_root_files
from limpet.engine.starters.process.starter import ProcessStarter
from limpet.engine.starters.users import Rights, RootRights, choose_user
from limpet.schema import ImageConfig
from limpet.schema.cri import ContainerUser, LinuxContainerUser, Signal, parse_container_config
from limpet.schema.signals import number_of_signal, to_cri_signal
from tests import oci_layout
from tests.conftest import PACKAGES, find_interpreter, find_processes, in_thread, read_output, wait_until
from tests.starters.oci import end_everything, load_busybox, open_engine
from tests.tools_image import load_tools, write_tools

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbad line\napp:x:1234:4321:app:/home/app:/bin/sh\n"
GROUP = b"root:x:0:\napp:x:4321:\naudio:x:29:app\nvideo:x:44:\n"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("private") / "state")


@pytest.fixture(scope="module")
def engine(state_dir: str) -> Iterator[Engine]:
    """An engine whose own environment has a secret; its sandbox has a hostname and DNS servers."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Engine.open(state_dir, inherit_env=["WANTED", "NOT_SET"]) as opened,
    ):
        patch.setenv("DATABASE_PASSWORD", "hunter2")
        patch.setenv("WANTED", "yes")
        opened.create_sandbox(
            {"metadata": {"name": "s"}, "hostname": "web-1", "dns_config": {"servers": ["192.0.2.1"]}}, id="s"
        )
        yield opened
        for container in opened.list():
            container.stop(0)


@pytest.fixture(scope="module")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with users of its own, a working directory that it does not bring, and a link out of it."""
    config = {"Env": ["PATH=/bin", "FROM_IMAGE=1"], "WorkingDir": "/srv/app", "StopSignal": "RTMIN+3"}
    members = [
        oci_layout.member("etc/passwd", PASSWD),
        oci_layout.member("etc/group", GROUP),
        oci_layout.symlink("etc/resolv.conf", "../../../../../../../../tmp/outside"),
        oci_layout.symlink("out", "/../../../../../../.."),
    ]
    return str(load_tools(engine, tmp_path_factory.mktemp("images") / "tools", config, *members))


_numbers = itertools.count()


def ask(image: str, *command: str, **fields: Any) -> dict[str, Any]:
    """Return a config with a name of its own."""
    return {"metadata": {"name": f"c{next(_numbers)}"}, "image": {"image": image}, "command": command, **fields}


def run(engine: Engine, image: str, script: str, *, secrets: Any = None, **fields: Any) -> str:
    """Run a shell script, and return what it wrote to the file `told` in its working directory or in /told."""
    container = engine.create_container(ask(image, "sh", "-c", script, **fields), "s")
    container.start(secret_env=secrets)
    status = container.wait(30)
    assert status.exit_code == 0, status
    return read(container)


def read(container: Container) -> str:
    places = ("working/told", "rootfs/srv/app/told", "rootfs/told")
    path = next(Path(container.metadata.root_dir, each) for each in places if _is_file(container, each))
    return path.read_text()


def _is_file(container: Container, name: str) -> bool:
    return Path(container.metadata.root_dir, name).is_file()


# --- environment ---------------------------------------------------------------------------------------------------


def test_the_host_image_gets_path_and_home_and_what_is_named(engine: Engine, state_dir: str) -> None:
    """No other variable of the engine reaches the container, and none is written down; a secret of the start does."""
    text = run(engine, "host", "env > told", secrets={"TOKEN": "s3cret"}, envs=[{"key": "LANG", "value": "C"}])
    found = dict(line.split("=", 1) for line in text.splitlines())
    assert found["PATH"] == os.environ["PATH"]
    assert (found["HOME"], found["WANTED"], found["TOKEN"], found["LANG"]) == (os.environ["HOME"], "yes", "s3cret", "C")
    assert set(found) <= {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "WANTED", "TOKEN"),
        *("PWD", "SHLVL", "OLDPWD", "_"),
    }
    for path in (path for path in Path(state_dir).rglob("*") if path.is_file() and path.name != "told"):
        content = path.read_bytes()
        assert b"hunter2" not in content, path
        assert b"s3cret" not in content, path


def test_an_image_gets_nothing_of_the_engine(engine: Engine, image: str) -> None:
    """Its environment is the image's, the config's, and HOME from its own /etc/passwd."""
    text = run(engine, image, "env > told")
    names = {line.partition("=")[0] for line in text.splitlines()}
    assert names <= {"PATH", "FROM_IMAGE", "HOME", "PWD", "SHLVL", "OLDPWD", "_"}
    assert "HOME=/root" in text.splitlines()


def test_an_image_without_a_path_has_the_usual_one(engine: Engine, tmp_path: Path) -> None:
    """As in an OCI container, and in containerd and Docker: its programs are found, also those that others start."""
    program = oci_layout.member("usr/local/sbin/told", b'#!/bin/sh\necho "$PATH" > /told\n', mode=0o755)
    name = str(load_tools(engine, tmp_path / "pathless", {}, program))
    container = engine.create_container(ask(name, "told"), "s")
    container.start()
    assert container.wait(30).exit_code == 0
    assert read(container) == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"


def test_arguments_and_environment_are_bytes(tmp_path: Path) -> None:
    """What is not UTF-8 in the host's variables, and text in a config, reach the program byte for byte."""
    starter = ProcessStarter({**os.environb, b"TZ": b"\xff\xe9"})
    with Engine.open(tmp_path / "other", starter=starter) as other:
        other.create_sandbox({"metadata": {"name": "s"}}, id="s")
        script = 'printf "%s|%s" "$TZ" "$1" > told'
        fields = {"metadata": {"name": "b"}, "image": {"image": "host"}}
        container = other.create_container({**fields, "command": ["sh", "-c", script, "sh", "gr\u00fc\u00df"]}, "s")
        container.start()
        container.wait(30)
        told = Path(container.metadata.root_dir, "working", "told").read_bytes()
    assert told == b"\xff\xe9|gr\xc3\xbc\xc3\x9f"


@pytest.mark.parametrize("name", ["", "A=B", "A\0"])
def test_names_that_are_none_are_refused_without_a_value(engine: Engine, name: str) -> None:
    """A secret's value is in no error."""
    container = engine.create_container(ask("host", "true"), "s")
    with pytest.raises(errors.InvalidInputError, match="secret_env") as caught:
        container.start(secret_env={name: "s3cret"})
    assert "s3cret" not in str(caught.value)
    with pytest.raises(errors.InvalidInputError, match="inherit_env"):
        ProcessStarter(inherit_env=[name])
    with pytest.raises(errors.InvalidInputError, match="inherit_env"):
        ProcessStarter(inherit_env="PATH")


# --- keyring -------------------------------------------------------------------------------------------------------

_ASK_FOR_KEYS = """
import ctypes, os
call = ctypes.CDLL(None, use_errno=True).syscall
numbers = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
search, session = 10, -3
print(call(numbers[1], search, session, b"user", b"limpet-test-host", 0) > 0, end=" ")
print(call(numbers[1], search, session, b"user", b"limpet-test-other", 0) > 0, end=" ")
print(call(numbers[0], b"user", b"limpet-test-other", b"x", ctypes.c_size_t(1), session) > 0)
"""


@pytest.mark.usefixtures("namespaces")
@as_root
@pytest.mark.parametrize("runtime", ["", "runc", "crun"])
def test_the_session_keyring_is_its_own(state_dir: str, tmp_path: Path, runtime: str) -> None:
    """Keys of the host program's session are for no container to find, nor one container's for the next."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    add, control = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]

    def live() -> list[str]:
        # A thread has credentials of its own: the key is in no other test's session.
        assert call(control, 1, None) > 0
        assert call(add, b"user", b"limpet-test-host", b"secret", ctypes.c_size_t(6), -3) > 0
        with open_engine(str(tmp_path / "state")) as opened:
            if runtime:
                load_busybox(opened, tmp_path / "image")
            opened.create_sandbox({"metadata": {"name": "s"}}, id="s", runtime_handler=runtime)
            told = []
            for name in ("first", "second"):
                fields = {"image": {"image": "box:1" if runtime else "host"}, "log_path": f"{name}.log"}
                enter = ["/bin/busybox", "chroot", "/host"] if runtime else []
                mounts = [{"container_path": "/host", "host_path": "/"}] if runtime else []
                command = [*enter, sys.executable, "-c", _ASK_FOR_KEYS]
                container = opened.create_container(
                    {"metadata": {"name": name}, "command": command, "mounts": mounts, **fields}, "s", id=name
                )
                container.start()
                assert container.wait(30).exit_code == 0
                told += read_output(container, 1)
                container.release()
            return told

    thread, outcome = in_thread(live)
    thread.join(90)
    end_everything(str(tmp_path / "state"))
    assert outcome == [["False False True"] * 2]


# --- users ---------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int, set[int]]]] = {
    "nobody is asked for": ("", {}, (0, 0, set())),
    "image user by name": ("app", {}, (1234, 4321, {29})),
    "image user and group by name": ("app:video", {}, (1234, 44, {4321, 29} - {4321})),
    "image user by number": ("1234", {}, (1234, 4321, {29})),
    "image numbers": ("7:8", {}, (7, 8, set())),
    "unknown number": ("", {"run_as_user": {"value": 99}}, (99, 0, set())),
    "run_as_user": ("root", {"run_as_user": {"value": 1234}}, (1234, 4321, {29})),
    "run_as_username": ("", {"run_as_username": "app"}, (1234, 4321, {29})),
    "run_as_group": ("", {"run_as_username": "app", "run_as_group": {"value": 5}}, (1234, 5, {29})),
    "supplemental_groups": ("app", {"supplemental_groups": [3]}, (1234, 4321, {3, 29})),
    "Strict": (
        "app",
        {"supplemental_groups": [3], "supplemental_groups_policy": "Strict"},
        (1234, 4321, {3}),
    ),
}


@pytest.mark.parametrize(("user", "context", "expected"), CASES.values(), ids=CASES)
def test_who_the_program_runs_as(
    tmp_path: Path, user: str, context: dict[str, Any], expected: tuple[int, int, set[int]]
) -> None:
    """Config before image, names and numbers from the root's own /etc/passwd and /etc/group; its group is of all."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_bytes(PASSWD)
    (tmp_path / "etc" / "group").write_bytes(GROUP)
    config = parse_container_config(
        {"metadata": {"name": "n"}, "image": {"image": "x"}, "linux": {"security_context": context}}
    )
    chosen, _ = choose_user(ImageConfig(user=user), config, RootAccounts(str(tmp_path)), Rights(0, 0, (), True))
    uid, gid, more = expected
    assert (chosen.uid, chosen.gid, set(chosen.additional_gids)) == (uid, gid, {gid, *more})


@as_root
@pytest.mark.parametrize("name", ["host", "tools"])
def test_nobody_can_give_up_what_its_group_is_forbidden(engine: Engine, image: str, name: str) -> None:
    """The group is one of all that the program has, as after a login: else a setgid program could take its place."""
    context = {"run_as_user": {"value": 1234}, "run_as_group": {"value": 4321}, "supplemental_groups": [3]}
    fields = {"linux": {"security_context": context}, "log_path": f"groups-{name}"}
    command = ("sh", "-c", "while read -r line; do case $line in Groups*) echo $line;; esac; done < /proc/self/status")
    container = engine.create_container(ask(image if name == "tools" else name, *command, **fields), "s")
    container.start()
    assert container.wait(30).exit_code == 0
    wait_until(lambda: read_output(container, 1), "the groups")
    of_the_image = {"29"} if name == "tools" else set()
    assert set(read_output(container, 1)[0].split()) == {"Groups:", "3", "4321"} | of_the_image


NO_IDS: dict[str, tuple[str, str, str]] = {
    "the kernel's own user": ("app:x:4294967295:5::/:", "", "image user 4294967295: a number"),
    "the kernel's own group": ("app:x:7:4294967295::/:", "", "image user 7: group 4294967295: a number"),
    "large": ("app:x:1099511627776:5::/:", "", "image user 1099511627776: a number"),
    "endless": (f"app:x:{'1' * 5000}:5::/:", "", "image user 1{20}: a number"),
    "group of the image": ("app:x:7:8::/:", "own:x:4294967295:", "image group 4294967295: a number"),
    "supplementary group": ("app:x:7:8::/:", "own:x:8:\nmore:x:4294967295:app", "/etc/group: group 4294967295"),
}


@pytest.mark.parametrize(("passwd", "group", "told"), NO_IDS.values(), ids=NO_IDS)
def test_an_images_files_name_no_id_that_none_can_have(tmp_path: Path, passwd: str, group: str, told: str) -> None:
    """Whom the kernel cannot have a process be is refused: with 4294967295 the program would go on as root."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text(f"other:x:{'9' * 5000}:1::/:\n{passwd}\n")
    (tmp_path / "etc" / "group").write_text(f"other:x:{'9' * 5000}:\n{group}\n")
    config = parse_container_config({"metadata": {"name": "n"}, "image": {"image": "x"}})
    image = ImageConfig(user="app:own" if "own" in group else "app")
    with pytest.raises(errors.InvalidInputError, match=told):
        choose_user(image, config, RootAccounts(str(tmp_path)), Rights(0, 0, (), True))


@pytest.mark.parametrize("comment", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_line_of_the_images_passwd_ends_with_a_newline_alone(tmp_path: Path, comment: str) -> None:
    """No other character of a comment cuts an account off, or makes one up."""
    (tmp_path / "etc").mkdir()
    line = f"app:x:7:8:a{comment}made-up:x:0:0::/root:/bin/sh"
    (tmp_path / "etc" / "passwd").write_text(f"{line}\nlast:x:9:9::/last:/bin/sh", encoding="utf-8")
    accounts = RootAccounts(str(tmp_path))
    found = {name: accounts.find_user(name) for name in ("app", "made-up", "last")}
    assert {name: each.uid for name, each in found.items() if each is not None} == {"app": 7, "last": 9}


@pytest.mark.parametrize("home", ["", "/a\0b", "/\udcff", "/" + "h" * 200_000])
def test_a_home_that_no_environment_can_hold_is_the_root(tmp_path: Path, home: str) -> None:
    """The start would fail of it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_bytes(f"app:x:7:8::{home}:/bin/sh\n".encode("utf-8", "surrogateescape"))
    found = RootAccounts(str(tmp_path)).find_user("app")
    assert found is not None
    assert found.home == "/"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"run_as_user": {"value": -1}}, "run_as_user -1"),
    "the kernel's own": ({"run_as_user": {"value": 2**32 - 1}}, "run_as_user 4294967295"),
    "large": ({"run_as_user": {"value": 2**40}}, "run_as_user"),
    "group large": ({"run_as_user": {"value": 0}, "run_as_group": {"value": 2**32}}, "run_as_group"),
    "group alone": ({"run_as_group": {"value": 29}}, "run_as_group"),
    "groups": ({"supplemental_groups": [-5]}, "supplemental_groups"),
    "unknown": ({"run_as_username": "no-such-user"}, "run_as_username 'no-such-user'"),
    "two": ({"run_as_username": "root", "run_as_user": {"value": 0}}, "run_as_user and run_as_username"),
}


@pytest.mark.parametrize(("context", "told"), REFUSED.values(), ids=REFUSED)
def test_a_user_that_cannot_be_is_refused_at_create(engine: Engine, context: dict[str, Any], told: str) -> None:
    """The error names the field, and nothing is left of the container."""
    asked = ask("host", "true")
    with pytest.raises(errors.InvalidInputError, match=told):
        engine.create_container({**asked, "linux": {"security_context": context}}, "s")
    assert not engine.list(name=asked["metadata"]["name"])


HALF_ROOT = """
import sys
from limpet.engine import Engine, errors
with Engine.open(sys.argv[1]) as engine:
    (image,) = engine.images.load(sys.argv[2])
    pod = engine.create_sandbox({"metadata": {"name": "pod"}})
    config = {"metadata": {"name": "one"}, "image": {"image": str(image)}, "command": ["/bin/sh", "-c", "id -u"]}
    container = engine.create_container({**config, "log_path": "one.log"}, pod)
    container.start()
    print(container.wait(30).exit_code, b"".join(entry.text for entry in container.read_log()))
    print(*container.status.unapplied)
    for name, field in (("two", {"run_as_user": {"value": 1234}}), ("three", {"supplemental_groups": [29]})):
        try:
            engine.create_container({**config, "metadata": {"name": name}, "linux": {"security_context": field}}, pod)
        except errors.InvalidInputError as error:
            print(str(error).split(":")[0])
    pod.remove(force=True, timeout=0)
"""


@pytest.mark.usefixtures("namespaces")
def test_root_in_a_user_namespace_of_one_user_runs_images(tmp_path: Path) -> None:
    """It may set no groups there, and become nobody else: what asks for that is refused, or told, and nothing fails."""
    group = oci_layout.member("etc/group", GROUP.replace(b"video:x:44:", b"video:x:44:root"))
    write_tools(tmp_path / "image", {}, oci_layout.member("etc/passwd", PASSWD), group)
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", HALF_ROOT]
    done = subprocess.run(
        [*command, str(tmp_path / "state"), str(tmp_path / "image")], capture_output=True, text=True, check=False
    )
    told = ["0 b'0\\n'", "supplemental_groups_policy", "run_as_user 1234", "supplemental_groups 29"]
    assert (done.stdout.splitlines(), done.stderr) == (told, "")


def test_root_that_may_not_all_is_told_what_it_may_not_do(tmp_path: Path) -> None:
    """Its own groups may be asked for, and users and groups that it may become."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_bytes(b"app:x:1500:1500::/:\n")
    of_root = RootRights(sets_groups=False, uids=(range(1), range(1000, 2000)), gids=(range(100),))
    rights = Rights(0, 0, (27,), True, lambda: of_root)

    def choose(**context: Any) -> Any:
        config = {"metadata": {"name": "n"}, "image": {"image": "x"}, "linux": {"security_context": context}}
        return choose_user(ImageConfig(), parse_container_config(config), RootAccounts(str(tmp_path)), rights)[0]

    assert choose(run_as_user={"value": 1999}, run_as_group={"value": 99}, supplemental_groups=[27, 0]).uid == 1999
    for context, told in (
        ({"run_as_user": {"value": 2000}}, "run_as_user 2000: "),
        ({"run_as_user": {"value": 0}, "run_as_group": {"value": 100}}, "run_as_group 100: "),
        ({"run_as_user": {"value": 1500}}, "run_as_user 1500: group 1500: "),
        ({"supplemental_groups": [27, 100]}, "supplemental_groups 100: "),
        ({"supplemental_groups": [27, 28]}, r"supplemental_groups \[28\]: "),
    ):
        with pytest.raises(errors.InvalidInputError, match=told):
            choose(**context)


def test_an_ordinary_user_is_told_what_it_may_not_do(tmp_path: Path) -> None:
    """Another uid, another gid and foreign groups are refused by the field's name; its own are taken."""
    accounts, rights = RootAccounts(str(tmp_path)), Rights(1000, 1000, (27,), False)
    for context, told in (
        ({"run_as_user": {"value": 0}}, "run_as_user 0"),
        ({"run_as_user": {"value": 1000}, "run_as_group": {"value": 0}}, "run_as_group 0"),
        ({"supplemental_groups": [27, 29]}, r"supplemental_groups \[29\]"),
        ({"run_as_user": {"value": 1000}, "supplemental_groups": [27]}, ""),
    ):
        config = parse_container_config(
            {"metadata": {"name": "n"}, "image": {"image": "x"}, "linux": {"security_context": context}}
        )
        if not told:
            assert choose_user(ImageConfig(), config, accounts, rights)[0].uid == 1000
            continue
        with pytest.raises(errors.InvalidInputError, match=told):
            choose_user(ImageConfig(), config, accounts, rights)


@as_root
def test_another_user_of_the_host_has_its_group_home_and_directory(engine: Engine) -> None:
    """run_as_user alone: the group and HOME of /etc/passwd, none of root's groups, a default directory of its own."""
    context = {"security_context": {"run_as_user": {"value": 65534}, "no_new_privs": True}}
    script = "{ id -u; id -g; id -G; echo $HOME; grep NoNewPrivs /proc/self/status; } > told"
    lines = run(engine, "host", script, linux=context).splitlines()
    assert lines == ["65534", "65534", "65534", "/nonexistent", "NoNewPrivs:\t1"]


@as_root
@pytest.mark.parametrize(("real", "effective"), [(0, 65534), (65534, 0)])
def test_a_container_is_the_effective_user_alone(real: int, effective: int) -> None:
    """A host program may keep another user to go back to, as a setuid program does: its containers do not."""
    script = f"""
import os, sys
from pathlib import Path
from limpet import Engine
os.setgroups([])
os.setresgid({real}, {effective}, {effective})
os.setresuid({real}, {effective}, {real})
with Engine.open(sys.argv[1]) as engine:
    engine.create_sandbox({{"metadata": {{"name": "s"}}}}, id="s")
    config = {{"metadata": {{"name": "c"}}, "image": {{"image": "host"}}}}
    command = ["sh", "-c", "grep -E '^[UG]id' /proc/self/status > told"]
    container = engine.create_container({{**config, "command": command}}, "s")
    container.start()
    container.wait(30)
    print(Path(container.metadata.root_dir, "working", "told").read_text())
    container.remove()
"""
    interpreter = find_interpreter(65534)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory(prefix="limpet-ids-", dir="/tmp") as place:
        os.chown(place, effective, effective)
        command = [interpreter, "-c", script, f"{place}/state"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/", env=PACKAGES)
    assert done.stdout.split() == ["Uid:", *[str(effective)] * 4, "Gid:", *[str(effective)] * 4], done.stderr


@as_root
def test_a_daemon_of_an_ordinary_user_belongs_to_a_container_whose_image_has_layers() -> None:
    """Nothing told whose it was once it had left its session and its parent: it outlived `stop` and `release`."""
    user, mark = 65534, f"31{os.getpid()}"
    script = """
import sys
from limpet import Engine
state, image, program = sys.argv[1:]
with Engine.open(state) as engine:
    (name,) = engine.images.load(image)
    jobs = engine.create_sandbox({"metadata": {"name": "jobs"}})
    config = {"metadata": {"name": "c"}, "image": {"image": str(name)}, "command": ["sh", "-c", program]}
    container = engine.create_container(config, jobs)
    container.start()
    print(container.wait(30).exit_code)
    container.release()
"""
    interpreter = find_interpreter(user)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory(prefix="limpet-daemon-", dir="/tmp") as place:
        write_tools(Path(place, "image"), {})
        os.chown(place, user, user)
        command = [interpreter, "-c", script, f"{place}/state", f"{place}/image", f"(setsid sleep {mark} &); sleep 0.3"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
            env=PACKAGES,
            user=user,
            group=user,
        )
    assert done.stdout == "0\n", done.stderr
    left = find_processes("sleep", mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


UNABLE = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19
assert not ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
DAEMON = """
import os, signal, sys, time
from limpet.engine import Engine
from limpet.engine.starters.process import find_facts
state, mark = sys.argv[1:]
with Engine.open(state) as engine:
    jobs = engine.create_sandbox({"metadata": {"name": "jobs"}})
    linux = {"security_context": {"run_as_user": {"value": 1234}}}
    command = ["sh", "-c", f"(setsid sleep {mark} &); echo; sleep 600"]
    for name in ("one", "two"):
        config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": command, "log_path": name}
        container = engine.create_container({**config, "linux": linux}, jobs)
        container.start()
        while not any(container.read_log()):
            time.sleep(0.01)
        print(container.stop(20).exit_code)
        container.release()
        os.kill(find_facts(state).keeper_pid, signal.SIGKILL)  # the next is told what the one before it knew
"""


@pytest.mark.usefixtures("namespaces")
@as_root
def test_daemons_of_another_user_are_told_without_the_right_to_look_into_them(tmp_path: Path) -> None:
    """As in a container of somebody else that has CAP_SYS_ADMIN and not CAP_SYS_PTRACE: they end with their own."""
    mark = f"7{os.getpid()}"
    command = [sys.executable, "-c", UNABLE, DAEMON, str(tmp_path / "state"), mark]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    left = find_processes("sleep", mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (done.stdout.split(), left) == (["143", "143"], []), done.stderr


@as_root
def test_the_images_passwd_is_read_within_bounds_and_within_the_root(tmp_path: Path) -> None:
    """A link leads nowhere outside, a device or a huge file is refused."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "passwd").write_bytes(b"evil:x:1:1::/:\n")
    (root / "etc" / "passwd").symlink_to("../../passwd")
    assert RootAccounts(str(root)).find_user("evil") is None
    (root / "etc" / "passwd").unlink()
    os.mkfifo(root / "etc" / "passwd")
    with pytest.raises(errors.InvalidInputError, match="not a regular file"):
        RootAccounts(str(root)).find_user("evil")
    (root / "etc" / "passwd").unlink()
    with open(root / "etc" / "passwd", "wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(errors.InvalidInputError, match="larger"):
        RootAccounts(str(root)).find_user("evil")


def test_a_name_of_the_host_that_is_no_text_is_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sethostname(2) takes any bytes: they are in the image's /etc/hostname, and escaped where the fleet is told."""
    monkeypatch.setattr(socket, "gethostname", lambda: "caf\udce9")
    write_root_files(str(tmp_path), None)
    assert (tmp_path / "etc" / "hostname").read_bytes() == b"caf\xe9\n"
    assert batch._name("n", "id", "/state")["host"] == "caf\\xe9"


# --- a root of its own ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("namespaces")
def test_a_root_has_what_programs_count_on(engine: Engine, image: str) -> None:
    """Devices, links to the streams, shared memory, terminals, and the working directory that the image forgot."""
    script = (
        "set -e; { pwd; test -c /dev/null; echo x > /dev/shm/x; test -e /dev/ptmx; test -d /dev/pts; ls /dev/fd/;"
        " cat /etc/hostname; cat /etc/resolv.conf; test -s /etc/hosts; echo gone >> /dev/stdout; } > told; "
        "echo x >> /dev/stderr"
    )
    lines = run(engine, image, script).splitlines()
    assert lines[0] == "/srv/app"
    assert {"0", "1", "2"} <= set(lines)
    assert lines[-3:] == ["web-1", "nameserver 192.0.2.1", "gone"]
    assert not os.path.exists("/tmp/outside")  # where the image's link leads


@pytest.mark.usefixtures("namespaces")
@as_root
def test_mounts_are_made(engine: Engine, image: str, tmp_path: Path) -> None:
    """Files and directories, read-only, in a missing place; never through a link out; the host keeps no mount."""
    (tmp_path / "file").write_text("from the host\n")
    (tmp_path / "data").mkdir()
    mounts = [
        {"host_path": str(tmp_path / "file"), "container_path": "/etc/new/file", "readonly": True},
        {"host_path": str(tmp_path / "data"), "container_path": "/data"},
        {"host_path": str(tmp_path / "file"), "container_path": "/out/escaped"},
    ]
    script = (
        "cat /etc/new/file > told; echo x > /etc/new/file && exit 1; echo made > /data/made;"
        " cat /escaped >> told; grep -q . /data/made || exit 0"
    )
    assert run(engine, image, script, mounts=mounts) == "from the host\n" * 2
    assert (tmp_path / "data" / "made").read_text() == "made\n"
    assert not os.path.lexists("/escaped")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.usefixtures("namespaces")
def test_what_a_mount_cannot_pass_on_is_told(engine: Engine, image: str, tmp_path: Path) -> None:
    """Propagation needs a shared mount on the host's side: without one the status says so."""
    asked = ask(image, "true")
    mount = {"host_path": "/proc", "container_path": "/x", "propagation": "PROPAGATION_BIDIRECTIONAL"}
    told = engine.create_container({**asked, "mounts": [mount]}, "s").status.unapplied
    is_shared = any(
        fields[4] == "/proc" and "shared:" in " ".join(fields)
        for fields in (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    )
    assert ("mounts.propagation" in told) == (not is_shared or os.geteuid() != 0)


@pytest.mark.usefixtures("namespaces")
def test_a_mount_without_its_source_is_refused(engine: Engine, image: str, tmp_path: Path) -> None:
    """At create, by its name."""
    asked = ask(image, "true")
    for mount, told in (
        ({"host_path": str(tmp_path / "none"), "container_path": "/x"}, "host_path .*none.* does not exist"),
        ({"host_path": "etc", "container_path": "/x"}, "host_path"),
        ({"host_path": "/etc", "container_path": "x"}, "container_path"),
        ({"host_path": "/etc", "container_path": "/"}, "container_path"),
        ({"host_path": "/proc/self/cwd", "container_path": "/x"}, "host_path .*cwd.* leads elsewhere for each process"),
        ({"host_path": "/dev/fd", "container_path": "/x"}, "host_path .*fd.* leads elsewhere for each process"),
    ):
        with pytest.raises(errors.InvalidInputError, match=told):
            engine.create_container({**asked, "mounts": [mount]}, "s")


def test_a_path_in_a_root_never_leads_out(tmp_path: Path) -> None:
    """Links, "..", absolute links and loops are followed as a process with that root would follow them."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "up").symlink_to("../../../..")
    (root / "abs").symlink_to("/a")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("/not/there")
    top = os.open(root, os.O_PATH)
    try:
        for path, inside in (
            (b"a/up", "."),
            (b"abs", "a"),
            (b"../../..", "."),
            (b"a/up/abs/up", "."),
            (b"/abs/.", "a"),
        ):
            found = open_in_root(top, path)
            assert os.path.samestat(os.fstat(found), os.stat(root / inside)), path
            os.close(found)
        with pytest.raises(OSError, match="loop"):
            open_in_root(top, b"loop")
        found = open_in_root(top, b"dangling/file", make="file")
        assert stat.S_ISREG(os.fstat(found).st_mode)
        os.close(found)
    finally:
        os.close(top)
    assert (root / "not" / "there" / "file").is_file()


def test_as_many_links_are_followed_as_the_kernel_follows(tmp_path: Path) -> None:
    """One more is a loop, for both."""
    (tmp_path / "0").mkdir()
    for number in range(1, 42):
        (tmp_path / str(number)).symlink_to(str(number - 1))
    top = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        os.close(open_in_root(top, b"40"))
        os.stat(tmp_path / "40")
        with pytest.raises(OSError, match="levels of symbolic links"):
            open_in_root(top, b"41")
        with pytest.raises(OSError, match="levels of symbolic links"):
            os.stat(tmp_path / "41")
    finally:
        os.close(top)


def test_a_mount_that_is_refused_is_an_error(tmp_path: Path) -> None:
    """It names what was to be mounted: nothing runs without a mount, or with one that is not read-only."""
    with pytest.raises(OSError, match=r"mounting it: .*nosuchfs"):
        _mount("x", str(tmp_path), "nosuchfs", 0, None)
    with pytest.raises(OSError, match=rf"mounting it: .*{tmp_path}"):
        _mount(None, str(tmp_path), None, 32 | 4096 | 1, None)  # MS_REMOUNT | MS_BIND | MS_RDONLY: it is no mount


@as_root
def test_a_working_directory_may_be_one_that_the_user_may_not_enter(engine: Engine, tmp_path: Path) -> None:
    """Images have root's own at times; every runtime runs them, and from there nothing of it can be reached."""
    directories = [oci_layout.directory("root", mode=0o700), oci_layout.directory("root/below", mode=0o755)]
    config = {"User": "1234", "WorkingDir": "/root", "Env": ["PATH=/bin"]}
    name = load_tools(engine, tmp_path / "closed", config, *directories)
    script = 'test "$(pwd)" = /root && ! ls . && ! cd /root && cd / && ! cd root/below'
    container = engine.create_container(ask(str(name), "sh", "-c", script), "s")
    container.start()
    assert container.wait(30).exit_code == 0


@pytest.mark.usefixtures("namespaces")
def test_a_file_may_be_mounted_on_an_images_volume(engine: Engine, tmp_path: Path) -> None:
    """A volume is a directory, unless the config mounts something else there."""
    (tmp_path / "file").write_text("content")
    name = str(load_tools(engine, tmp_path / "volumes", {"Env": ["PATH=/bin"], "Volumes": {"/a": {}, "/b/": {}}}))
    mount = {"host_path": str(tmp_path / "file"), "container_path": "/a"}
    script = 'test "$(cat /a)" = content && test -d /b'
    container = engine.create_container(ask(name, "sh", "-c", script, mounts=[mount]), "s")
    container.start()
    assert container.wait(30).exit_code == 0


def test_a_relative_working_directory_is_refused(engine: Engine) -> None:
    """It would be taken from wherever the engine is."""
    asked = ask("host", "true", working_dir="tmp")
    with pytest.raises(errors.InvalidInputError, match="working_dir"):
        engine.create_container(asked, "s")


# --- what is not done ----------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "tty": True,
    "stdin": True,
    "mounts": [{"host_path": "/etc", "container_path": "/x"}],
    "devices": [{"host_path": "/dev/fuse", "container_path": "/dev/fuse"}],
    "linux": {
        "security_context": {
            "privileged": True,
            "readonly_rootfs": True,
            "capabilities": {"drop_capabilities": ["ALL"]},
            "seccomp": {"profile_type": "RuntimeDefault"},
            "apparmor": {"profile_type": "Unconfined"},
            "no_new_privs": True,
            "namespace_options": {"network": "NODE", "pid": "NODE", "ipc": "NODE"},
        }
    },
}
UNAPPLIED = {"tty", "stdin", "mounts", "devices", "privileged", "readonly_rootfs", "capabilities", "seccomp"}


def test_what_is_not_done_is_told_and_refused_if_strict(engine: Engine) -> None:
    """By the field's name, with the reason, in the status; what is done, or asks for nothing, is not."""
    asked = ask("host", "true", **ASKED)
    with pytest.raises(errors.InvalidInputError, match="readonly_rootfs") as caught:
        engine.create_container(asked, "s", strict=True)
    assert all(re.search(rf"\b{name}\b", str(caught.value)) for name in UNAPPLIED)
    assert not engine.list(name=asked["metadata"]["name"])
    container = engine.create_container(asked, "s")
    assert set(container.status.unapplied) - {"sandbox.hostname"} == UNAPPLIED | {"sandbox.dns_config"}
    assert all(container.status.unapplied.values())
    assert container.cri_status().mounts == ()
    container.start()
    assert container.wait(30).unapplied == container.status.unapplied
    plain = ask("host", "true")
    engine.create_sandbox({"metadata": {"name": "plain"}}, id="plain")
    assert engine.create_container(plain, "plain", strict=True).status.unapplied == {}


# --- stop signals --------------------------------------------------------------------------------------------------


def test_each_name_of_a_signal_is_one_signal(engine: Engine, image: str) -> None:
    """All names of the CRI are taken; SIGRTMIN+3, RTMIN+3, SIGRTMINPLUS3 and 37 are one signal."""
    numbers = {name: number_of_signal(name.value) for name in Signal if name is not Signal.RUNTIME_DEFAULT}
    assert set(numbers.values()) == {*range(1, 32), *range(34, 65)}
    assert {number_of_signal(each) for each in ("SIGRTMIN+3", "rtmin+3", "SIGRTMINPLUS3", "RTMAX-27", "37")} == {37}
    for bad in ("SIGRTMIN+31", "RTMAX-31", "0", "32", "65", "SIGWHAT", "", "SIGRTMIN-1", "\u0663"):
        with pytest.raises(errors.InvalidInputError, match="stop signal"):
            number_of_signal(bad)
    container = engine.create_container(ask(image, "sleep", "100"), "s")
    assert container.metadata.stop_signal == "SIGRTMIN+3"
    assert container.cri_status().stop_signal is Signal.SIGRTMINPLUS3
    container.start()
    assert container.stop(20).exit_code == 128 + 37


@pytest.mark.usefixtures("namespaces")
@as_root
def test_the_streams_can_be_opened_by_the_containers_user(engine: Engine, image: str) -> None:
    """Programs that write to /dev/stdout and /dev/stderr by name reach the log, whoever they run as."""
    context = {"security_context": {"run_as_username": "app"}}
    script = "echo first > /dev/stdout; echo second >> /dev/stderr; echo third > /dev/stdout"
    container = engine.create_container(ask(image, "sh", "-c", script, linux=context, log_path="streams"), "s")
    assert container.cri_status().user == ContainerUser(
        linux=LinuxContainerUser(uid=1234, gid=4321, supplemental_groups=(4321, 29))
    )
    container.start()
    assert container.wait(30).exit_code == 0
    log = Path(container.metadata.log_path)
    wait_until(lambda: log.exists() and "third" in log.read_text(), "the log to be whole")
    assert sorted(line.split()[-1] for line in log.read_text().splitlines()) == ["first", "second", "third"]


def test_the_cri_status_has_image_user_and_signal(engine: Engine, image: str) -> None:
    """As a kubelet expects them; before the bundle is made, the user's numbers of the config."""
    context = {"run_as_user": {"value": 7}, "run_as_group": {"value": 8}, "supplemental_groups": [9]}
    asked = ask(image, "true", stop_signal="SIGINT")
    added = engine.add_container({**asked, "linux": {"security_context": context}}, "s")
    assert to_cri_status(added.metadata, added.status).created_at == 1, "a kubelet refuses 0"
    told = added.cri_status()
    assert told.image_id.startswith("sha256:")
    assert told.user is not None
    assert told.user.linux is not None
    assert (told.user.linux.uid, told.user.linux.gid, told.user.linux.supplemental_groups) == (7, 8, (9,))
    assert told.stop_signal is Signal.SIGINT
    assert signal.Signals[told.stop_signal.value] == signal.SIGINT


def test_each_real_time_signal_has_one_name_of_the_cri() -> None:
    """SIGRTMIN+15 is followed by SIGRTMAX-14; from each name its number is found again."""
    for number in range(34, 65):
        assert number_of_signal(to_cri_signal(str(number)).value) == number
    assert [to_cri_signal(each).value for each in ("49", "50")] == ["SIGRTMINPLUS15", "SIGRTMAXMINUS14"]


@pytest.mark.parametrize(
    "bad", [{"a": 7}, {7: "a"}, {"a": "\ud800"}, {"\ud800": "a"}, {"": "a"}, {"a=b": "c"}, {"a": "\0"}], ids=repr
)
def test_secrets_that_no_environment_holds_are_refused(bad: dict[Any, Any]) -> None:
    """With the name and never with the value; bytes that are no text are held."""
    with pytest.raises(errors.InvalidInputError, match="secret_env"):
        require_secrets(bad)
    assert require_secrets({"a": "\udcff"}) == {"a": "\udcff"}


@pytest.mark.usefixtures("namespaces")
@as_root
@pytest.mark.parametrize(("propagation", "told"), [("shared", "shared:"), ("private", "")])
def test_whether_a_mount_is_shared_is_read_of_the_very_mount(tmp_path: Path, propagation: str, told: str) -> None:
    """Not of another one; a path that is none has none, and no descriptor stays."""
    script = (
        "import os, signal, sys; from limpet.engine.starters.propagation import read_propagation\n"
        "fds = os.listdir('/proc/self/fd')\n"
        "print(read_propagation('/'), read_propagation(sys.argv[1]), sep='|')\n"
        "assert read_propagation('/no/such') is read_propagation('a\\0b') is None\n"
        "assert os.listdir('/proc/self/fd') == fds\n"
        "os.mkfifo(sys.argv[1] + '/fifo'); signal.alarm(10)\n"
        "assert read_propagation(sys.argv[1] + '/fifo') == read_propagation(sys.argv[1])\n"
    )
    mount = f'mount -t tmpfs none "$0"; mount --make-{propagation} "$0"; exec "$@"'
    other = "private" if propagation == "shared" else "shared"
    command = [
        "unshare",
        "--mount",
        "--propagation",
        other,
        "sh",
        "-c",
        mount,
        str(tmp_path),
        sys.executable,
        "-c",
        script,
    ]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60)
    root, mounted = ran.stdout.strip().split("|")
    assert mounted.startswith(told)
    assert bool(mounted) == bool(told)
    assert root.startswith("shared:") != bool(told)
