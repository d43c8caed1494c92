"""Where a path of the host leads: followed as the kernel does, and no further."""

import os
from pathlib import Path

import pytest

from limpet import Engine, errors
from limpet.engine.starters.host_path import require_plain
from tests.starters.host import make


def link(path: Path, target: str) -> str:
    path.symlink_to(target)
    return str(path)


def chain(directory: Path, links: int, target: str) -> str:
    """Make links of which each leads to the next, the last one to the target; return the first."""
    names = [f"link{number}" for number in range(links)]
    for name, leads_to in zip(names, [*names[1:], target], strict=True):
        (directory / name).symlink_to(leads_to)
    return str(directory / names[0])


def test_a_link_of_proc_is_found_wherever_a_path_leads(tmp_path: Path) -> None:
    """Itself, below it, and behind as many links as the kernel follows; one more leads nowhere, for the kernel too."""
    (tmp_path / "below").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "farther").mkdir()
    through = [
        "/proc/self/cwd",
        "/dev/fd/0",
        "/proc/../proc//self/./root/etc",
        link(tmp_path / "absolute", "/proc/self"),
        link(tmp_path / "relative", "below/../absolute/fd"),
        chain(tmp_path / "far", 39, "/proc/mounts"),  # itself the fortieth
    ]
    for path in through:
        with pytest.raises(errors.InvalidInputError, match=r"mounts\.host_path .*: a link of /proc is on its way"):
            require_plain("mounts.host_path", path)
    for path in ("/", "/etc/passwd", "/proc/1/status", str(tmp_path / "below/../below"), "/none", "/etc/passwd/none"):
        require_plain("mounts.host_path", path)
    too_far = chain(tmp_path / "farther", 40, "/proc/mounts")
    with pytest.raises(OSError, match="Too many levels"):
        os.stat(too_far)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", ["loop", "./loop/loop", "/proc/../{path}"])
def test_a_link_that_leads_to_itself_leads_nowhere(engine: Engine, tmp_path: Path, target: str) -> None:
    """It ends, and so does a create whose config mounts it."""
    path = link(tmp_path / "loop", target.format(path=tmp_path / "loop"))
    require_plain("mounts.host_path", path)
    one = make(engine, "one", "true", mounts=[{"container_path": "/mnt", "host_path": path}])
    one.remove()
