"""What is known of a bundle, and of an orphan, from what a power cut may leave of them."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Bundle
from limpet.recovery.orphans import Disposal, judge_orphan
from limpet.recovery.users import Users
from limpet.schema.errors import StateDirectoryError

MARKER = '{"limpet":"container","id":"one","node":"local"}'
OTHER = MARKER.replace("one", "two")
CONFIG = '{"annotations":{"limpet.marker":"%s"}}' % MARKER.replace('"', '\\"')  # noqa: UP031  # braces
WHOLE, PARTIAL, FOREIGN = Bundle.WHOLE, Bundle.PARTIAL, Bundle.FOREIGN


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, PARTIAL),
        ({".tmp-1": "x"}, PARTIAL),
        ({".limpet.json": ""}, PARTIAL),
        ({".limpet.json": "\0" * 50, "rootfs/": "", "working/": ""}, PARTIAL),
        ({"rootfs/": ""}, PARTIAL),
        ({".limpet.json": MARKER}, PARTIAL),
        ({".limpet.json": OTHER}, FOREIGN),
        ({".limpet.json": MARKER, "rootfs/": "", "config.json": "{}"}, WHOLE),
        ({".limpet.json": MARKER, "working/": "", "config.json": "{}"}, WHOLE),
        ({".limpet.json": "", "rootfs/": "", "config.json": CONFIG}, WHOLE),
        ({".limpet.json": "\0" * 50, "rootfs/file": "x", "config.json": CONFIG}, WHOLE),
        ({"rootfs/file": "x", "config.json": CONFIG}, WHOLE),
        ({"config.json": CONFIG}, PARTIAL),
        ({"config.json": CONFIG[:-1] + r',"process":{"args":["\udc80"]}}'}, PARTIAL),
        ({"config.json": "[]"}, FOREIGN),
        ({"config.json": '{"annotations":[]}'}, FOREIGN),
        ({"config.json": '{"annotations":{"limpet.marker":7}}'}, FOREIGN),
        ({"config.json": "{}"}, FOREIGN),
        ({"config.json": "{"}, FOREIGN),
        ({"config.json": CONFIG.replace("one", "two")}, FOREIGN),
        ({".limpet.json": OTHER, "rootfs/": "", "config.json": CONFIG}, FOREIGN),
        ({".limpet.json": "{}", "rootfs/": "", "config.json": CONFIG}, FOREIGN),
        ({".limpet.json": "", "rootfs/file": "x"}, FOREIGN),
        ({"rootfs/": "", "other/": ""}, FOREIGN),
        ({"rootfs/rootfs/": ""}, FOREIGN),
        ({"rootfs": ""}, FOREIGN),
        ({"working/file": ""}, FOREIGN),
    ],
)
def test_a_bundle_is_ours_by_its_marker_or_because_it_holds_nothing(
    tmp_path: Path, files: Mapping[str, str], expected: Bundle
) -> None:
    """An unflushed marker may be empty or zeros: config.json decides then; any content without either is foreign."""
    _put(tmp_path / "one", files)
    assert observe_bundle(str(tmp_path / "one"), "one")[0] is expected


@pytest.mark.parametrize("place", ["missing/one", "file/one", "file"])
def test_a_bundle_that_cannot_be_made_is_an_error_that_callers_catch(tmp_path: Path, place: str) -> None:
    """Whatever the disk says, it comes as a StateDirectoryError with the path, and nothing is left."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StateDirectoryError, match=place):
        ContainerBundle(str(tmp_path / place), "one", "local").begin()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("seconds", [-100, 100])
@pytest.mark.parametrize("files", [{".limpet.json": MARKER, "rootfs/file": "x"}, {"rootfs/": ""}, {"file": "x"}])
def test_an_orphan_from_before_the_boot_is_old(tmp_path: Path, files: Mapping[str, str], seconds: int) -> None:
    """No change in progress has outlived a boot: what is ours from before it is removed, in the grace period too."""
    _put(tmp_path / "one", files)
    now = time.time()
    changed = now - time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
    os.utime(tmp_path / "one", (changed, changed))
    verdict = judge_orphan(str(tmp_path / "one"), node="local", users=Users(), now=now, grace_seconds=now)
    is_removed = seconds < 0 and "file" not in files
    assert verdict.disposal is (Disposal.REMOVE if is_removed else Disposal.QUARANTINE)


def _put(directory: Path, files: Mapping[str, str]) -> None:
    directory.mkdir()
    for name, text in files.items():
        path = directory / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
