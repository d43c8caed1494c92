"""`limpet info`: versions, paths, and who has the state open."""

import os
import platform
from collections.abc import Iterator
from typing import Any

import click

from limpet.engine.cli.options import Place, output_option, place_option
from limpet.engine.cli.output import fill, paint, print_json, print_lines
from limpet.engine.control import NoEngineError, ask_live, find_pid
from limpet.engine.control.requests import Info, Known
from limpet.engine.database.sqlite import sqlite_version
from limpet.engine.inspection.snapshot import Snapshot, require_state
from limpet.engine.starters.process import find_facts
from limpet.engine.state.lock import find_holder, may_be_held_elsewhere
from limpet.schema.errors import LimpetError
from limpet.schema.release import read_version
from limpet.schema.revision import SCHEMA_REVISION

_ANSWER_SECONDS = 3.0
_INDENT = 10


@click.command("info")
@output_option
@place_option
def command(place: Place, *, as_json: bool) -> None:
    """Show the versions, the state directory and what is in it, the engine that has it open, the keeper, the cgroup.

    What limpet can do as the user who asks is shown, too. Changes nothing.
    """
    facts = _find(place)
    if as_json:
        print_json(info=facts)
    else:
        print_lines(_describe(facts))


def _find(place: Place) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "limpet": read_version(),
        "schema": SCHEMA_REVISION,
        "python": platform.python_version(),
        "sqlite": ".".join(map(str, sqlite_version())),
        "kernel": platform.release(),
        "uid": os.geteuid(),
        "state_dir": os.path.abspath(place.state_dir),
        "node": place.node,
        **dict.fromkeys(("problem", "epoch", "containers", "sandboxes", "holder", "engine", "engine_problem")),
    }
    try:
        path = facts["state_dir"] = require_state(place.state_dir)
        facts["holder"] = find_holder(path)
        facts["engine"], facts["engine_problem"] = _ask(path, place.node)
        with Snapshot.open(path, node=place.node) as snapshot:
            facts["containers"], facts["sandboxes"] = len(snapshot), len(snapshot.sandbox_ids)
            facts["epoch"] = snapshot.source.ask(lambda reader: reader.epochs())[place.node]
    except LimpetError as error:
        facts["problem"] = str(error)
    starter = find_facts(facts["state_dir"])
    facts["keeper"] = starter.keeper_pid
    facts["cgroup"], facts["cgroup_problem"] = starter.cgroup or None, starter.cgroup_problem or None
    facts["abilities"] = starter.abilities
    return facts


def _ask(path: str, node: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return what the live engine says of itself, None if there is none, and why it does not."""
    try:
        known: Known = ask_live(path, Info(), node=node, silence=_ANSWER_SECONDS)
        pid = find_pid(path)  # what it calls itself is the number in its own pid namespace
    except NoEngineError:
        if find_holder(path) is None and may_be_held_elsewhere(path):
            return None, "one of another pid namespace or host may be open, which cannot be seen from here"
        return None, None
    except LimpetError as error:
        return None, str(error)
    return {"pid": pid, "limpet": known.limpet, "starter": known.starter}, None


def _describe(facts: dict[str, Any]) -> Iterator[str]:
    lines = {
        "limpet": f"{facts['limpet']}, schema {facts['schema']}, Python {facts['python']}, SQLite {facts['sqlite']}",
        "kernel": facts["kernel"],
        "user": str(facts["uid"]),
        "state": facts["state_dir"],
        "problem": facts["problem"],
        "node": f"{facts['node']}, epoch {facts['epoch']}" if facts["epoch"] is not None else facts["node"],
        "holds": _tell_content(facts),
        "engine": _tell_engine(facts),
        "keeper": f"pid {facts['keeper']}" if facts["keeper"] else "none: it begins with the first container",
        "cgroup": facts["cgroup"] or f"no limits can be set: {facts['cgroup_problem']}",
        "can": _list_abilities(facts, wanted=True),
        "cannot": _list_abilities(facts, wanted=False),
    }
    for name, text in lines.items():
        for index, line in enumerate(fill(text, _INDENT) if text else ()):
            yield f"{paint(f'{name:{_INDENT}}', 'dim')}{line[_INDENT:]}" if index == 0 else line


def _list_abilities(facts: dict[str, Any], *, wanted: bool) -> str:
    return ", ".join(name.replace("_", " ") for name, has in facts["abilities"].items() if has is wanted)


def _tell_content(facts: dict[str, Any]) -> str:
    if facts["containers"] is None:
        return ""
    return f"containers: {facts['containers']}, sandboxes: {facts['sandboxes']}"


def _tell_engine(facts: dict[str, Any]) -> str:
    engine, holder = facts["engine"], facts["holder"]
    if engine is not None:
        pid = engine["pid"] or "of another pid namespace"
        return f"pid {pid}, limpet {engine['limpet']}, starter {engine['starter']}; it takes commands"
    if holder is None and not facts["engine_problem"]:
        return "none is open: a command that changes something opens one"
    why = facts["engine_problem"] or "it takes no commands: an older limpet, or a program with a store of its own"
    return f"pid {holder or 'unknown'}; {why}"
