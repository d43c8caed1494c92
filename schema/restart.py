"""Restart policies: what may be asked for, and how long each restart is put off. Pure; the table is in `recovery`."""

import re
from enum import StrEnum
from typing import NamedTuple

from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status

FIRST_DELAY_NS = 100_000_000
LONGEST_DELAY_NS = 60_000_000_000
STEADY_RUN_NS = 10_000_000_000
"""Who has run for as long begins with the first delay again."""


class RestartKind(StrEnum):
    """Which ends call for a restart. No policy undoes a stop."""

    NO = "no"
    """None."""
    ON_FAILURE = "on-failure"
    """All but the exit code 0, an unseen one and a program that could not be executed included."""
    ALWAYS = "always"
    """All."""
    UNLESS_STOPPED = "unless-stopped"
    """All: the same as `always`, for here a stop is kept in any case."""


class RestartPolicy(NamedTuple):
    """A restart policy: `no`, `on-failure`, `on-failure:3`, `always` or `unless-stopped`."""

    kind: RestartKind
    most: int = 0
    """How many restarts there are at most, with `on-failure`; 0 for any number."""

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.most}" if self.most else self.kind.value


_POLICY = re.compile(r"(no|always|unless-stopped|on-failure)(?::([1-9][0-9]{0,8}))?", re.ASCII)


def parse_restart_policy(text: object) -> RestartPolicy:
    """Return the policy that is written so. Raises InvalidInputError for anything else."""
    match = _POLICY.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match[2] and match[1] != RestartKind.ON_FAILURE):
        raise InvalidInputError(
            f"restart policy {quote(text)}: use 'no', 'on-failure', 'on-failure:3' (a number from 1 to 999999999),"
            " 'always' or 'unless-stopped'"
        )
    return RestartPolicy(RestartKind(match[1]), int(match[2] or 0))


def next_delay(metadata: Metadata, status: Status) -> int:
    """Return by how many nanoseconds the attempt after this one, which has ended, is put off.

    Twice as long as this one was, up to a minute; 100 ms for the first, and after a run of ten seconds.
    """
    ran = status.finished_at - status.started_at if status.started_at else 0
    if not metadata.restart_delay or ran >= STEADY_RUN_NS:
        return FIRST_DELAY_NS
    return min(2 * metadata.restart_delay, LONGEST_DELAY_NS)


def is_used_up(metadata: Metadata) -> bool:
    """Say whether the policy has made all the restarts that it allows, up to this attempt."""
    most = parse_restart_policy(metadata.restart_policy).most
    return bool(most) and metadata.restart_count >= most
