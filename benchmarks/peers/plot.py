"""Draw how long each manager took to answer after its crash: python benchmarks/peers/plot.py RESULTS.json FILE.svg.

RESULTS.json is what `crashes.py --json` has printed. It needs matplotlib: pip install 'limpet[plots]'.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_COLOURS = {
    "limpet, host processes": "#c2410c",
    "limpet, runc": "#fb923c",
    "Podman, runc": "#7c3aed",
    "containerd, runc": "#2563eb",
    "supervisor, host processes": "#059669",
}
_STYLE = {"svg.hashsalt": "limpet", "axes.spines.top": False, "axes.spines.right": False}


def main(results: str, target: str) -> None:
    """Draw a line for each manager; where it did not run there is no point."""
    matplotlib: Any = import_module("matplotlib")
    with matplotlib.rc_context(_STYLE):
        figure = import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        tried = json.loads(Path(results).read_text(encoding="utf-8"))["results"]
        ran = [one for one in tried if one["trial"] == "crash" and "error" not in one]
        for name in dict.fromkeys(one["manager"] for one in ran):
            points = [(one["count"], one["seconds"]) for one in ran if one["manager"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=_COLOURS.get(name))
        axes.set(xscale="log", yscale="log", xlabel="containers", ylabel="seconds until it answers")
        counts = sorted({one["count"] for one in ran})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color="#e5e7eb")
        axes.legend(frameon=False)
        figure.savefig(target, metadata={"Date": None} if target.endswith(".svg") else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
