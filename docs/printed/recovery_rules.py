"""The recovery rules as a Markdown page, printed from the tables.

`python docs/printed/recovery_rules.py > docs/recovery-rules.md` writes the page; a test compares the two.
"""

import ast
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import StrEnum
from textwrap import dedent

from limpet.recovery.evidence import Boot, Bundle, Process, Stage
from limpet.recovery.intents import (
    INTENT_RULES,
    Attempts,
    Expiry,
    Home,
    Maker,
    Pause,
    Place,
    Standing,
    Step,
    Stop,
)
from limpet.recovery.orphans import GRACE_SECONDS, ORPHAN_RULES, QUARANTINE_MOST, Age, Kind, Origin, Use
from limpet.recovery.rules import RULES, Action, Ruling
from limpet.recovery.sandbox_rules import SANDBOX_RULES, Holdings, MadeReady, SandboxRuling
from limpet.schema.restart import RestartKind

_OPENING = """\
# Recovery rules

This page is printed by `python docs/printed/recovery_rules.py` from the tables in `recovery/rules.py`,
`recovery/intents.py`, `recovery/sandbox_rules.py` and `recovery/orphans.py`; to change a rule, edit those and print it
again.

A rule matches evidence and gives a ruling. Every combination of evidence matches exactly one rule, so their order does
not matter; a test checks all combinations. `any` means that every value matches."""

_CONTAINERS = """\
## Containers

There is one table for each stage, which is how far a container had come according to its record. A container that
exited is not examined again, unless it was released and its bundle still exists. If a container's probe raises an
exception or does not answer in time, no rule applies: the container is Unknown, and the report shows rule
`not-observed` with the reason.

An Unknown container's message says what settles it: another look, or a person's word, which `limpet resolve` and
`Engine.declare_gone` record."""

_INTENTS = """\
## What was decided

That somebody asked for a stop or a pause, a restart policy and an expiry are written down before anything of it is
done. After each recovery, and after each change, the second table says from what is true and what was decided which
step comes next: so whoever comes next finishes what an engine before it has decided. Every combination matches exactly
one row. A step that waits, for the delay of a restart or for an expiry, is asked for again when it is due."""


_SANDBOXES = """\
## Sandboxes

What a sandbox holds ends with the boot of its machine. So its status records the boot that it was made ready in. Where
an older version did not, processes of its containers tell: if all that ran were of other boots, it is of another, too.
A report names each sandbox whose record is changed, or may not be true, and each whose record cannot be read
(`sandbox-damaged`)."""

_ORPHANS = """\
## Orphans

An orphan is an entry of `containers/` or `sandboxes/` that no row owns. It is old after a grace period of {grace:.0f}
seconds, or if it is older than this boot. Quarantining moves it, by one rename, to `quarantine/` in the state
directory; limpet never removes anything there. The quarantine holds {most:,} entries at most: what does not fit stays
where it is, and the report says so."""


def render() -> str:
    """Return the page."""
    parts = [_OPENING, _CONTAINERS]
    for stage in Stage:
        parts += [f"### Stage: {stage.value}", _container_rules(stage)]
    parts += [_INTENTS, _intent_rules()]
    parts += [_SANDBOXES, _sandbox_rules()]
    parts += [_ORPHANS.format(grace=GRACE_SECONDS, most=QUARANTINE_MOST), _orphan_rules()]
    parts.append("## Words\n\nSelf-explanatory words are left out.")
    for title, enum in _WORDS:
        meanings = "\n".join(f"- **{word}**: {meaning}" for word, meaning in _explain(enum))
        parts.append(f"### {title}\n\n{meanings}")
    return "\n\n".join(parts) + "\n"


def _container_rules(stage: Stage) -> str:
    return _table(
        ("rule", "boot", "process", "bundle", "ruling", "reason", "action", "because", "what settles it"),
        (
            (
                f"`{rule.label}`",
                _name(rule.boot, Boot),
                _name(rule.process, Process),
                _name(rule.bundle, Bundle),
                rule.ruling.value,
                rule.reason.value if rule.reason else "",
                ", ".join(action.value for action in rule.actions),
                rule.because,
                rule.settle,
            )
            for rule in RULES
            if rule.stage is stage
        ),
    )


def _sandbox_rules() -> str:
    return _table(
        ("rule", "state", "made ready", "holdings", "ruling", "reason", "because"),
        (
            (
                f"`{rule.label}`",
                rule.state.name,
                _name(rule.made_ready, MadeReady),
                _name(rule.holdings, Holdings),
                rule.ruling.value,
                rule.reason.value if rule.reason else "",
                rule.because,
            )
            for rule in SANDBOX_RULES
        ),
    )


def _intent_rules() -> str:
    return _table(
        (
            "rule",
            "what is true",
            "stop",
            "expiry",
            "pause",
            "attempt",
            "made by",
            "sandbox",
            "policy",
            "restarts",
            "step",
            "because",
        ),
        (
            (
                f"`{rule.label}`",
                _name(rule.standing, Standing),
                _name(rule.stop, Stop),
                _name(rule.expiry, Expiry),
                _name(rule.pause, Pause),
                _name(rule.place, Place),
                _name(rule.maker, Maker),
                _name(rule.home, Home),
                _name(rule.policy, RestartKind),
                _name(rule.attempts, Attempts),
                rule.step.value,
                rule.because,
            )
            for rule in INTENT_RULES
        ),
    )


def _orphan_rules() -> str:
    return _table(
        ("rule", "kind", "origin", "use", "age", "disposal", "because"),
        (
            (
                f"`{rule.label}`",
                _name(rule.kind, Kind),
                _name(rule.origin, Origin),
                _name(rule.use, Use),
                _name(rule.age, Age),
                rule.disposal.value,
                rule.because,
            )
            for rule in ORPHAN_RULES
        ),
    )


_WORDS: Sequence[tuple[str, type[StrEnum]]] = (
    ("Stage", Stage),
    ("Process", Process),
    ("Bundle", Bundle),
    ("Ruling", Ruling),
    ("Action", Action),
    ("What is true of a container", Standing),
    ("Expiry", Expiry),
    ("Attempt", Place),
    ("Made by", Maker),
    ("Restart policy", RestartKind),
    ("Step", Step),
    ("Made ready", MadeReady),
    ("Holdings of a sandbox", Holdings),
    ("Ruling on a sandbox", SandboxRuling),
    ("Kind of an orphan", Kind),
    ("Origin of an orphan", Origin),
    ("Use of an orphan", Use),
)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(chosen: Collection[StrEnum], enum: type[StrEnum]) -> str:
    """Write a set of members briefly: "any", all but a few, or each one."""
    left_out = [member.value for member in enum if member not in chosen]
    if not left_out:
        return "any"
    if len(left_out) < len(chosen):
        return f"any but {', '.join(left_out)}"
    return ", ".join(member.value for member in enum if member in chosen)


def _explain(enum: type[StrEnum]) -> Iterator[tuple[str, str]]:
    """Yield each member's word with the docstring below it; skip members without one."""
    (definition,) = ast.parse(dedent(inspect.getsource(enum))).body
    assert isinstance(definition, ast.ClassDef)
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(meaning))):
                yield enum[name].value, meaning


def main() -> None:
    """Print the page."""
    sys.stdout.write(render())


if __name__ == "__main__":
    main()
