"""Lengths: the longest that the kernel takes is taken, and no more, before anything is made."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from limpet import Engine
from limpet.schema.errors import InvalidInputError
from limpet.schema.lengths import require_path_fits

MOST = 32 * resource.getpagesize()
"""Bytes of an argument or variable, with its end."""


def test_the_longest_path() -> None:
    """As the kernel takes it, below the root file system."""
    require_path_fits("x", "/" + "y" * 255)
    require_path_fits("x", "/y" * 2047 + "z")
    require_path_fits("x", "/y" * 2045, "/root")
    for path, root in (("/" + "y" * 256, ""), ("/y" * 2048, ""), ("/y" * 2045 + "z", "/root")):
        with pytest.raises(InvalidInputError, match=r"^x "):
            require_path_fits("x", path, root)


OTHERWISE = """
from limpet.engine.starters import choose_log_path
from limpet.engine.starters.oci import mounts, resources
from limpet.engine.starters.process import spec
from limpet.schema.cri import ContainerConfig, ContainerMetadata, Device, ImageSpec, Mount
from limpet.schema.errors import InvalidInputError
from limpet.schema.lengths import require_path_fits

path = "/caf\\xe9"
mount = Mount(host_path=path, container_path="/there")
config = ContainerConfig(
    metadata=ContainerMetadata(name="c"), image=ImageSpec(image="i"), devices=(Device(host_path=path),)
)
for ask in (
    lambda: choose_log_path(path, "one.log"),
    lambda: choose_log_path("/", path[1:]),
    lambda: require_path_fits("working_dir", path),
    lambda: spec._make_mount(mount),
    lambda: mounts._bind(mount),
    lambda: resources.make_devices(config, "/", privileged=False),
):
    try:
        ask()
    except InvalidInputError as error:
        field, _, why = str(error).partition(" ")
        assert "ascii" in why and "PYTHONUTF8" in why, why
        print(field)
"""


def test_a_path_that_is_other_bytes_here_than_for_the_keeper_is_refused() -> None:
    """As in a locale that is not UTF-8, where Python is told not to mind: the error names field and way out."""
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", OTHERWISE]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    fields = ["log_directory", "log_path", "working_dir", "mounts.host_path", "mounts.host_path", "devices.host_path"]
    assert (done.stdout.split(), done.stderr) == (fields, "")


@pytest.mark.parametrize("where", ["command", "args", "envs", "secret_env"])
def test_the_longest_text(engine: Engine, where: str) -> None:
    """The kernel starts a program with it; one byte more is refused by name, before anything is made."""
    engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
    count = 'test "$(printf %s "$LONG$1" | wc -c)" = "$2"'
    for number, (letter, is_too_long) in enumerate((("x", False), ("x", True), ("\u00e9", True))):
        room = MOST - 1 - (len("LONG=") if "env" in where else 0)
        text = letter * (room + 1 if letter == "x" and is_too_long else room)
        script, variables = ["sh", "-c", count, "sh"], {"LONG": text} if "env" in where else {}
        given = ["" if variables else text, str(room)]
        config = {
            "metadata": {"name": f"c{number}"},
            "image": {"image": "host"},
            "command": script if where != "command" else [*script, *given],
            "args": [] if where == "command" else given,
            "envs": [{"key": "LONG", "value": text}] if where == "envs" else [],
        }
        secrets = variables if where == "secret_env" else {}
        if not is_too_long:
            engine.create_container(config, "jobs", id="longest").start(secret_env=secrets)
            assert engine.get("longest").wait(20).exit_code == 0
            continue
        with pytest.raises(InvalidInputError, match=r"and the kernel takes \d+; use a file$") as refused:
            engine.create_container(config, "jobs", id="longer").start(secret_env=secrets)
        assert letter * 9 not in str(refused.value)
        assert [one.id for one in engine.list()] == (["longer", "longest"] if secrets else ["longest"])
        if secrets:
            engine.get("longer").remove()


def test_a_log_that_nothing_can_be_called(engine: Engine, tmp_path: Path) -> None:
    """A directory's name, and the whole, also where the log's own name is short."""
    engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
    for log_path in ("y" * 256 + "/one.log", "y/" * 2048 + "one.log"):
        config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["true"], "log_path": log_path}
        with pytest.raises(InvalidInputError, match=r"^log_path .* has more than \d+ bytes"):
            engine.create_container(config, "jobs")
    for directory in (tmp_path / ("y" * 256), os.path.join(tmp_path, *["y"] * 2048)):
        with pytest.raises(InvalidInputError, match=r"^log_directory .* has more than \d+ bytes"):
            engine.create_sandbox({"metadata": {"name": "others"}, "log_directory": str(directory)})
