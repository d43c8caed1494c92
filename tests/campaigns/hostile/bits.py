"""Each bit of a closed database flipped: `python -m tests.campaigns.hostile.bits`. Status 1 if there is a finding."""

import os
import sys

from limpet.engine.drill.damage import flip_bits

if __name__ == "__main__":
    report = flip_bits(workers=2 * (os.cpu_count() or 1))
    print(f"{report.damaged:,} bits flipped, {report.violations} findings")
    for finding in report.findings:
        print(f"  {finding}")
    sys.exit(bool(report.violations))
