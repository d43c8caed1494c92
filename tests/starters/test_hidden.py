"""A keeper whose processes /proc does not show to the engine: what runs is known, and what cannot begin says why."""

import os
import subprocess
import tempfile

import pytest

from tests.conftest import PACKAGES, find_interpreter

ENGINE = """
import sys
from limpet import Engine, errors
with Engine.open(sys.argv[1]) as engine:
    pod = engine.get_or_create_sandbox({"metadata": {"name": "pod"}})
    before = [(container.state.name, container.stop(20).exit_code) for container in engine.list()]
    config = {"metadata": {"name": f"{len(before)}"}, "image": {"image": "host"}, "command": ["sleep", "600"]}
    container = engine.create_container(config, pod)
    try:
        container.start()
        print(before, container.state.name)
    except errors.StartError as error:
        print(before, str(error).partition(": ")[2])
    if before:
        pod.remove(force=True, timeout=0)
"""
AS_NOBODY = """
import os, subprocess, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for _ in range(2):
    command = ["unshare", "--user", "--map-current-user", sys.executable, "-c", *sys.argv[1:]]
    subprocess.run(command, check=True, timeout=60)
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount /proc so")
@pytest.mark.parametrize("hidepid", [1, 2])
def test_a_keeper_of_another_user_namespace_that_proc_hides(hidepid: int) -> None:
    """As in a unit of systemd's with PrivateUsers= and ProtectProc= after its restart.

    Its containers are known and can be stopped. None can be started, and what is to be done about it is said.
    """
    interpreter = find_interpreter(65534)
    if not interpreter:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory(prefix="limpet-hidden-", dir="/tmp") as place:
        os.chown(place, 65534, 65534)
        hidden = ["sh", "-c", f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"', "sh"]
        script = [interpreter, "-c", AS_NOBODY, ENGINE, f"{place}/state"]
        done = subprocess.run(
            ["unshare", "--mount", *hidden, *script],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=PACKAGES,
        )
    first, second = done.stdout.splitlines()
    assert first == "[] RUNNING", done.stderr
    assert second.startswith("[('RUNNING', 143)] its process, "), done.stderr
    assert "lives and /proc does not show it" in second
    assert "PrivateUsers=" in second
