"""Engines that see other files than their keeper, which began with other mounts: a container sees its engine's."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, find_interpreter, require_tools

BEGIN = """
import ctypes, os, subprocess, sys, threading
from limpet import Engine, errors

state, files = sys.argv[1:]
engine = Engine.open(state)
jobs = engine.get_or_create_sandbox({"metadata": {"name": "jobs"}})

def start(name, *command):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": command}
    container = engine.create_container(config, jobs)
    container.start()
    return container

def run(name, *command):
    try:
        return start(name, *command).wait(timeout=20).exit_code
    except errors.StartError as error:
        return error

def write_program(path, code):
    with open(path, "w") as file:
        file.write(f"#!/bin/sh\\nexit {code}\\n")
    os.chmod(path, 0o755)
"""
TWO_VIEWS = """
assert run("first", "true") == 0

def be_elsewhere():
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", files], check=True)
    write_program(f"{files}/program", 5)
    print(run("second", f"{files}/program"))
    os.mkdir(f"{files}/root")
    subprocess.run(["mount", "--rbind", "/", f"{files}/root"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", f"{files}/root/mnt"], check=True)
    os.chroot(f"{files}/root")
    write_program("/mnt/program", 6)
    print(run("third", "/mnt/program"))

thread = threading.Thread(target=be_elsewhere)  # all this is the thread's own
thread.start()
thread.join()
print(run("fourth", f"{files}/program"))
engine.close()
"""
LEAVE = "start('long', 'sleep', '1000'); engine.close()"
LOOK = """
print(run("second", f"{files}/program"))
print(run("third", "true"))
engine.get("long").stop(0)
engine.close()
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def run_script(interpreter: str, script: str, *arguments: object, before: tuple[str, ...] = ()) -> list[str]:
    command = [*before, interpreter, "-c", BEGIN + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd="/", env=PACKAGES)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_container_sees_what_the_engine_sees_that_starts_it(state_dir: str, tmp_path: Path) -> None:
    """In its mount namespace, below its root directory: what was there for the engine was no file for the keeper."""
    files = tmp_path / "files"
    files.mkdir()
    second, third, fourth = run_script(sys.executable, TWO_VIEWS, state_dir, files)
    assert (second, third) == ("5", "6")
    assert fourth.endswith(f"'{files}/program': No such file or directory")


def test_an_ordinary_user_is_told_why_a_file_is_missed() -> None:
    """Only root may enter other mounts (setns(2)). What is there for both is started as ever."""
    require_tools("setpriv", "unshare")
    user = 65534
    interpreter = find_interpreter(user)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    as_user = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    mount = 'mount -t tmpfs none "$0"; printf "#!/bin/sh\\nexit 5\\n" > "$0/program"; chmod 755 "$0/program"; exec "$@"'
    with tempfile.TemporaryDirectory(prefix="limpet-views-", dir="/tmp") as place:
        os.chown(place, user, user)
        state, files = f"{place}/state", f"{place}/files"
        os.mkdir(files)
        run_script(interpreter, LEAVE, state, files, before=as_user)
        before = ("unshare", "-m", "sh", "-c", mount, files, *as_user)
        second, third = run_script(interpreter, LOOK, state, files, before=before)
    assert f"'{files}/program': No such file or directory for its keeper, process" in second
    assert "(setns: Operation not permitted)" in second
    assert third == "0"
