"""State directories as each revision's own code left them, and what that code read from them.

states/README.md tells what is in them. `Said` is read back with today's code in the same form.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from limpet import Store, errors
from limpet.schema.item import Item

STATES = Path(__file__).with_name("states")
NAMES = sorted(path.name.removesuffix(".tar.gz") for path in STATES.glob("*.tar.gz"))

Said = list[dict[str, Any]]
"""For each node its containers and sandboxes, by id."""


def unpack(name: str, directory: str) -> str:
    """Unpack a saved state directory below `directory`, and return its path."""
    with tarfile.open(STATES / f"{name}.tar.gz") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(directory)  # before Python 3.11.4 there is no filter; what is in it is ours
    state_dir = os.path.join(directory, "state")
    for path, _, _ in os.walk(state_dir):
        os.chmod(path, 0o700)  # the filter leaves directories to the umask
    return state_dir


def expected(name: str) -> Said:
    """Return what the code of its time read from a saved state directory."""
    return msgspec.json.decode((STATES / f"{name}.json").read_bytes(), type=Said)


def read(state_dir: str, nodes: list[str]) -> Said:
    """Open the state directory as each node, and return what the store says before any recovery."""
    said: Said = []
    for node in nodes:
        with Store.open(state_dir, node=node) as store:
            said.append(
                {
                    "node": node,
                    "containers": {record.id: read_container(store, record.id) for record in store.list()},
                    "sandboxes": {key: {"name": None, "readable": False} for key in sorted(store.sandbox_ids)}
                    | {one.id: read_sandbox(store, one.id) for one in store.list_sandboxes()},
                    "items": {item.key: msgspec.to_builtins(item) for item in read_items(store)},
                }
            )
    return said


def read_sandbox(store: Store, id: str) -> dict[str, Any]:
    """Return what the store says of one sandbox that can be read."""
    status = msgspec.json.decode(msgspec.json.encode(store.sandbox_status(id)))
    return {"name": store.get_sandbox(id).name, "readable": True, "status": status}


def read_items(store: Store) -> Iterator[Item]:
    """Yield those of the runtime's own items that can be read."""
    for key in ("volume-1", "soon damaged"):
        with suppress(errors.StoreDamagedError):
            found = store.find("volume", key)
            if found is not None:
                yield found


def read_container(store: Store, id: str) -> dict[str, Any]:
    """Return what the store says of one container."""
    with store.transaction() as draft:
        checkpoint = draft.checkpoint(id)
    try:
        metadata = store.metadata(id)
    except (errors.StoreDamagedError, errors.NotFoundError):
        metadata = None
    return {
        "checkpoint": msgspec.json.decode(msgspec.json.encode(checkpoint)),
        "metadata_readable": metadata is not None,
        "damaged": store.is_damaged(id),
        "name": metadata and metadata.name,
        "sandbox_id": metadata and metadata.sandbox_id,
        "history": [[one.number, int(one.state), one.exit_code, one.reason] for one in store.history(id)],
    }


def find_differences(name: str, state_dir: str) -> list[str]:
    """Open a copy of a saved state, and return in words where today's code says anything else.

    A sandbox of another node whose row is damaged is nobody's, and so is listed as damaged with each.
    """
    was = expected(name)
    now = read(state_dir, [each["node"] for each in was])
    found = []
    for before, after in zip(was, now, strict=True):
        for kind in ("containers", "sandboxes", "items"):
            if kind not in before:
                continue
            for key in before[kind].keys() | after[kind].keys():
                one, other = before[kind].get(key), after[kind].get(key)
                is_strangers = kind == "sandboxes" and one is None and other is not None and not other["readable"]
                if one != _as_then(one, other) and not is_strangers:
                    found.append(f"{name}, {before['node']}, {kind}, {key}: {one} became {other}")
    return found


def _as_then(then: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what is said now without the fields that came later, which have their defaults."""
    if then is None or now is None:
        return now
    return {
        name: _as_then(value, now.get(name)) if name in {"checkpoint", "status"} else now.get(name)
        for name, value in then.items()
    }
