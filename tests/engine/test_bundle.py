"""A bundle is known as ours, and nothing else is touched."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from limpet.engine import errors
from limpet.engine.lifecycle.bundle import Bundle, ContainerBundle
from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Bundle as Found


@pytest.mark.parametrize("lost", ["", "\0" * 60])
def test_config_json_names_the_owner_where_a_power_cut_took_the_marker(tmp_path: Path, lost: str) -> None:
    """The marker is not flushed by itself: what config.json says keeps the bundle ours, beside other annotations."""
    bundle = ContainerBundle(str(tmp_path / "one"), "one", "local")
    bundle.begin()
    bundle.finish(b'{"annotations":{"a":"b"},"process":{"args":["\\udc80"]}}')
    (tmp_path / "one/.limpet.json").write_text(lost)
    assert observe_bundle(bundle.path, "one") == (Found.WHOLE, "")
    config = json.loads((tmp_path / "one/config.json").read_bytes())
    assert (config["annotations"]["a"], config["process"]) == ("b", {"args": ["\udc80"]})
    bundle.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("owner", "node"), [("aaa", "local"), ("zzz", "local"), ("one", "aaa"), ("one", "zzz")])
def test_the_bundle_of_another_is_left_alone(tmp_path: Path, owner: str, node: str) -> None:
    """Another container's, or another node's: neither taken nor removed, whatever its name."""
    ContainerBundle(str(tmp_path / "one"), owner, node).begin()
    (tmp_path / "one/rootfs/file").write_text("kept")
    ours = ContainerBundle(str(tmp_path / "one"), "one", "local")
    with pytest.raises(errors.InvalidStateError, match="not ours"):
        ours.remove()
    with pytest.raises(errors.StateDirectoryError, match="not ours"):
        ours.make()
    assert (tmp_path / "one/rootfs/file").read_text() == "kept"


def test_a_bundle_of_ours_is_kept_without_what_a_kill_left(tmp_path: Path) -> None:
    """Made again, it loses the temporary file of a marker that was being written, and nothing else."""
    bundle = Bundle(str(tmp_path / "pod"), "pod", "local")
    bundle.make()
    (tmp_path / "pod/.tmp-1").write_text("half")
    (tmp_path / "pod/kept").write_text("kept")
    bundle.make()
    assert sorted(os.listdir(bundle.path)) == [".limpet.json", "kept"]


def test_what_stands_in_the_place_of_config_json_goes_with_the_bundle(tmp_path: Path) -> None:
    """What cannot be unlinked is no reason to leave a bundle that is ours by its marker, and to say that it is gone."""
    bundle = ContainerBundle(str(tmp_path / "one"), "one", "local")
    bundle.begin()
    (tmp_path / "one/config.json/below").mkdir(parents=True)
    bundle.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user mounts nothing")
@pytest.mark.parametrize("place", ["", "rootfs", "working", "config.json"])
def test_nothing_is_removed_through_a_mount(tmp_path: Path, place: str) -> None:
    """Neither what is mounted in a bundle nor what is on it, even if that bears the same marker and is as empty."""
    bundle = ContainerBundle(str(tmp_path / "one"), "one", "local")
    bundle.begin(has_root=place != "working")
    bundle.finish(b"{}")
    twin = shutil.copytree(bundle.path, tmp_path / "twin")
    subprocess.run(["mount", "--bind", twin / place, tmp_path / "one" / place], check=True)
    try:
        with pytest.raises(errors.InvalidStateError, match="is mounted"):
            bundle.remove()
    finally:
        subprocess.run(["umount", tmp_path / "one" / place], check=True)
    assert sorted(os.listdir(twin)) == [".limpet.json", "config.json", "working" if place == "working" else "rootfs"]
    assert {".limpet.json", "config.json"} <= set(os.listdir(bundle.path))  # it is known as ours still
    bundle.remove()
    assert os.listdir(tmp_path) == ["twin"]
