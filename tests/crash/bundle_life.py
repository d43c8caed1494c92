"""The life of two bundles, for kill points and power cuts: one that holds content, and one that holds none."""

import os
import subprocess
from collections.abc import Callable, Sequence
from types import MappingProxyType

from limpet.engine.lifecycle import bundle
from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.state.durable import write_file
from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Bundle
from limpet.schema.errors import LimpetError
from limpet.testing import Violation

_FILES = ("file", "usr/bin/program")
_CONFIG = b'{"annotations":{"kept":"yes"}}'
_STEPS: Sequence[tuple[str, Callable[[ContainerBundle], object]]] = (
    ("bare", lambda one: (one.begin(has_root=False), one.finish(_CONFIG))),
    (
        "full",
        lambda one: (one.begin(), one.flush_marker(), _fill(one.rootfs), one.finish(_CONFIG, has_content=True)),
    ),
    ("full", lambda one: _fill(f"{one.rootfs}/srv")),
    ("full", lambda one: one.remove()),
    ("bare", lambda one: one.remove()),
    ("full", lambda one: (one.begin(), one.flush_marker(), _fill(one.rootfs), one.remove())),
    ("bare", lambda one: (one.begin(has_root=False), one.finish(_CONFIG))),
)
_WHOLE = MappingProxyType({"bare": {1, 2, 3, 7}, "full": {2, 3}})
"""After how many steps each is whole: not while one of its steps is under way."""


def _fill(directory: str) -> None:
    os.makedirs(f"{directory}/usr/bin")
    for name in _FILES:
        with open(f"{directory}/{name}", "w", encoding="ascii") as file:
            file.write("content")


def _is_full(directory: str) -> bool:
    """Say whether all that `_fill` writes is there."""
    try:
        for name in _FILES:
            with open(f"{directory}/{name}", encoding="ascii") as file:
                if file.read() != "content":
                    return False
    except FileNotFoundError:
        return False
    return True


def _remove_anything(one: ContainerBundle, name: str) -> bool:
    subprocess.run(["rm", "-r", os.path.join(one.path, name)], check=True)
    return True


class BundleLife:
    """Bundles are made, filled and removed; what a crash leaves is whole where that was said, and ours to remove."""

    replaced: Sequence[tuple[object, str, object]] = ()

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        for owner, name, value in self.replaced:
            setattr(owner, name, value)
        for number, (name, act) in enumerate(_STEPS, 1):
            act(_bundle(directory, name))
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        done = int(acknowledged[-1]) if acknowledged else 0
        under_way = _STEPS[done][0] if done < len(_STEPS) else ""
        for name, whole_after in _WHOLE.items():
            found, detail = observe_bundle(f"{directory}/{name}", name)
            if found in {Bundle.FOREIGN, Bundle.HIDDEN}:
                raise Violation("other", f"after step {done}, {name}: {found}, {detail}")
            if done in whole_after and name != under_way and found is not Bundle.WHOLE:
                raise Violation("lost", f"after step {done}, {name}: {found}")
            if name == "full" and done in {1, 2} and found is Bundle.WHOLE and not _is_full(f"{directory}/full/rootfs"):
                raise Violation("lost", f"after step {done}, {name}: it is whole, and its files are not")
            try:
                _bundle(directory, name).remove()
            except LimpetError as error:
                raise Violation("other", f"after step {done}, {name}: {error}") from error
        if left := os.listdir(directory):
            raise Violation("other", f"after step {done}: {left} is left")


def _bundle(directory: str, name: str) -> ContainerBundle:
    return ContainerBundle(f"{directory}/{name}", name, "local")


class Unmarked(BundleLife):
    """Its config.json does not carry the marker."""

    replaced = ((bundle, "_annotate", lambda config, _: config),)


class MarkedLate(BundleLife):
    """It does not flush the marker before an image is unpacked."""

    replaced = ((ContainerBundle, "flush_marker", lambda _: None),)


class HastyRemoval(BundleLife):
    """It removes the marker before the disk knows that the content is gone."""

    replaced = ((ContainerBundle, "_remove_if_empty", _remove_anything),)


class Nameless(BundleLife):
    """It does not flush the name of the bundle."""

    replaced = ((bundle, "sync_directory", lambda _: None),)


class Hollow(BundleLife):
    """It writes config.json before the files of the root file system are on the disk."""

    replaced = ((bundle, "write_with_tree", write_file),)
