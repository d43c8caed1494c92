"""How large each campaign is, in `make test`, in `make gate` and in the long run: `python -m tests.campaigns.sizes`.

A campaign tries the same promise again and again: at each k-th point, over seeds. `make test` takes every fortieth
of what `make gate` takes, from all over, so that a broken promise that shows in many places shows there, too.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

PART: Final = 40
"""`make test` tries one in so many."""


class Campaign(NamedTuple):
    """One kind of trial, and how many there are at least."""

    counts: str
    test: int
    """About a fortieth of those in the gate: how many calls a life makes differs by its seed. 0 if none are tried."""
    gate: int
    long_run: int = 0
    """0 if the long run has none of these."""
    every: int = 1
    """In the gate each so many-th point is tried; the long run tries them all."""


CAMPAIGNS: Final[Mapping[str, Campaign]] = {
    "kill": Campaign("kill points, as what a kill there leaves", 84, 3_950, 200_000, every=5),
    "sigkill": Campaign("SIGKILLs at such points, also of an engine", 3, 130, 2_000, every=2),
    "engine": Campaign("kill points of an engine with real processes", 7, 300, every=2),
    "copier": Campaign("kills of the log copier, before, amid and after a call", 4, 180),
    "power": Campaign("power-cut images of a store and an engine", 130, 7_700, 2_000_000, every=13),
    "recovery": Campaign("power-cut images of a recovery", 0, 1_150, 100_000, every=12),
    "wal": Campaign("power-cut images while the WAL begins anew", 0, 2_000, every=9),
    "upgrade": Campaign("kill points and power-cut images of an upgrade, of each saved state", 1, 45, every=24),
    "errors": Campaign("failed operations, each with the disks after it", 4, 190, 5_000, every=12),
    "refusals": Campaign("system calls of an engine and its keeper that are refused", 6, 240, 5_000),
    "stops": Campaign("stops of the keeper's processes, each at a call", 1, 55, every=2),
    "deaths": Campaign("kills of several of an engine's processes at once", 1, 40),
    "damage": Campaign("damaged states", 120, 2_500, 100_000),
    "bits": Campaign("flipped bits of a closed database", 45, 1_800, 48_000),
    "hostile": Campaign("hostile inputs", 90, 3_630, 100_000),
    "worlds": Campaign("worlds that Hypothesis draws", 2, 48, 600),
    "interrupts": Campaign("interrupts and failing allocations in a store's and an engine's life", 8, 280, 5_000),
    "disks": Campaign("power cuts of real file systems", 0, 24, 300),
    "reuse": Campaign("verdicts after pids were reused", 0, 20, 1_000),
    "reboot": Campaign("verdicts after reboots", 0, 20, 1_000),
    "executor": Campaign("kills of the CI executor of the documentation, amid 50 jobs", 0, 20),
    "amid": Campaign("kills amid what is done with a container of runc or crun that runs", 2, 44),
    "fleet": Campaign("kills, cuts and crashes while a node sends to a fleet", 8, 200, 20_000),
    "teeth": Campaign("engines with a broken promise, found out by the drill", 0, 7),
    "keeper": Campaign("verdicts after kills of the keeper", 0, 20, 1_000),
}


class Size(NamedTuple):
    """How much of a campaign one run tries."""

    least: int
    """So many trials at least; a run with fewer proves less than it says."""
    every: int
    """Which of the points, inputs or bits are tried: each so many-th."""


def size_of(name: str, *, is_gate: bool) -> Size:
    """Return the size of a campaign in the gate, or in `make test`. Raises KeyError for a name that is none."""
    campaign = CAMPAIGNS[name]
    return Size(campaign.gate, campaign.every) if is_gate else Size(campaign.test, PART * campaign.every)


def render() -> str:
    """Return the table, as Markdown."""
    lines = ["| campaign | what | `make test` | `make gate` | long run |", "| --- | --- | --- | --- | --- |"]
    for name, campaign in CAMPAIGNS.items():
        test, gate, long_run = (
            f"{count:,}" if count else "-" for count in (campaign.test, campaign.gate, campaign.long_run)
        )
        lines.append(f"| `{name}` | {campaign.counts} | {test} | {gate} | {long_run} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
