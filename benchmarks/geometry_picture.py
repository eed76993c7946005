"""A picture of `geometry_calibration`'s records: each scene's error, from the network to the truth.

Run: python benchmarks/geometry_picture.py FOLDER [FOLDER ...] --out geometry_calibration.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyadapt.benchmarks.geometry_gates import Record, found, in_use

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = {
    "the network": ("o", "black"),
    "self-calibrated": ("D", "tab:blue"),
    "trained on the truth": ("s", "tab:green"),
    "aligned, nothing trained": ("^", "tab:orange"),
}


def errors(records: Sequence[Record], shift: str) -> dict[str, list[float]]:
    """By name of what is shown the errors, scene by scene; NaN where one was not measured."""
    base = found(records, "base", shift)
    by = {"the network": [r["error"] for r in base]}
    for name, what in (("self-calibrated", "self"), ("trained on the truth", "truth")):
        used = {r["scene"]: in_use(r) for r in found(records, what, shift)}
        by[name] = [used.get(r["scene"], float("nan")) for r in base]
    return by | {"aligned, nothing trained": [r["error robust"] for r in base]}


def draw(axes: Axes, records: Sequence[Record], shift: str, views: int) -> None:
    """One panel: scenes across, errors up."""
    for name, values in errors(records, shift).items():
        marker, colour = SHOWN[name]
        axes.plot(values, marker, color=colour, label=name, fillstyle="none", markersize=7)
    axes.set(title=f"shift: {shift}, {views} views", xlabel="scene", yscale="log")
    axes.grid(alpha=0.3)


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("geometry_calibration.png"))
    asked = parser.parse_args()
    panels = []
    for folder in asked.folders:
        views = json.loads((folder / "settings.json").read_text())["views"]
        lines = (folder / "records.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        panels += [(records, shift, views) for shift in dict.fromkeys(r["shift"] for r in records)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for place, panel in zip(axes[0], panels, strict=True):
        draw(place, *panel)
    axes[0, 0].set_ylabel("error on pairs with a held-out view, share of their size")
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(asked.out, dpi=110)


if __name__ == "__main__":
    main()
