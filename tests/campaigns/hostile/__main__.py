"""The long form: `python -m tests.campaigns.hostile --inputs 100000 --seed 1`. Status 1 if there is a finding."""

import argparse
import sys
import time

from tests.campaigns.hostile.campaign import KINDS, Tally, run_kind
from tests.campaigns.hostile.oracle import Fate
from tests.campaigns.sizes import CAMPAIGNS


class _Progress:
    """One line that is written over, on a terminal; a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begun, self._shown = total, 0, time.monotonic(), 0.0
        self.kind = ""
        self.findings = 0

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown < (0.2 if sys.stderr.isatty() else 20):
            return
        self._shown = now
        rate = self._done / max(now - self._begun, 0.001)
        line = f"{self._done:,} of {self._total:,} inputs, {rate:,.0f}/s, now {self.kind}, findings: {self.findings}"
        print(f"\r{line:78}" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def main() -> int:
    """Run a campaign, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.hostile", description=__doc__)
    parser.add_argument(
        "--inputs", type=int, default=CAMPAIGNS["hostile"].long_run, help="how many in all kinds together"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this; repeatable")
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--only", type=int, help="only the input with this number; needs one --kind")
    parser.add_argument("--dir", help="where to make worlds; in memory by default")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    whole = sum(KINDS[kind].share for kind in kinds)
    first = options.first if options.only is None else options.only
    counts = {
        kind: 1 if options.only is not None else round(options.inputs * KINDS[kind].share / whole) for kind in kinds
    }
    progress = _Progress(sum(counts.values()))
    tallies: dict[str, tuple[Tally, float]] = {}
    for kind, count in counts.items():
        progress.kind, begun = kind, time.monotonic()
        tally = run_kind(kind, options.seed, range(first, first + count), base=options.dir, note=progress)
        tallies[kind] = tally, time.monotonic() - begun
        progress.findings += len(tally.findings)
        for finding in tally.findings:
            print(finding, flush=True)
    print(f"\n{'KIND':10}{'INPUTS':>9}{'ACCEPTED':>10}{'REFUSED':>9}{'FINDINGS':>10}{'SECONDS':>9}")
    for kind, (tally, seconds) in tallies.items():
        cells = [sum(tally.counts.values()), *(tally.counts[fate] for fate in Fate)]
        print(f"{kind:10}{cells[0]:>9,}{cells[1]:>10,}{cells[2]:>9,}{cells[3]:>10,}{seconds:>9.1f}")
    return 1 if progress.findings else 0


if __name__ == "__main__":
    sys.exit(main())
