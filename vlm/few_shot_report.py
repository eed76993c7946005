"""A few-shot comparison as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from ..core.images.pictures import png
from .records import Record


def table(records: Sequence[Record]) -> str:
    """Markdown: a row per method, its mean top-1 (+- standard deviation over seeds) by shots."""
    shots = sorted({record.shots for record in records if record.shots})
    head = [f"{k} shots" if k > 1 else "1 shot" for k in shots]
    rows = [["method", *head, "trainable", "stored", "s per step", "MiB"]]
    rows += [["---"] * len(rows[0])]
    rows += [_row(name, records, shots) for name in dict.fromkeys(r.method for r in records)]
    first = records[0]
    seeds = ", ".join(str(seed) for seed in sorted({record.seed for record in records}))
    told = (
        f"Top-1 %, mean +- standard deviation over the seeds {seeds}, on {first.test_images:,} test"
        f" images of {first.classes} classes. Data {first.data}, backbone {first.backbone},"
        f" template {first.template!r}. Trainable and stored numbers are those at the most shots."
        " MiB: torch's peak in training, on a GPU only."
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", told])


def _row(name: str, records: Sequence[Record], shots: Sequence[int]) -> list[str]:
    mine = [record for record in records if record.method == name]
    last = max(mine, key=lambda record: record.shots)
    cells = [share([r.top1 for r in mine if r.shots in (0, k)]) for k in shots or [0]]
    speed = [r.seconds / r.steps for r in mine if r.steps]
    memory = [r.memory_mib for r in mine if r.memory_mib is not None]
    return [
        name,
        *cells,
        f"{last.trainable:,}",
        f"{last.stored:,}",
        f"{statistics.median(speed):.3f}" if speed else "-",
        f"{max(memory):.0f}" if memory else "-",
    ]


def share(values: Sequence[float]) -> str:
    """Shares as a mean in per cent, with their standard deviation if there are several.

    >>> share([0.5, 0.7])
    '60.0 +- 14.1'
    """
    if not values:
        return "-"
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def picture(records: Sequence[Record]) -> bytes:
    """A PNG: top-1 over shots, a line through each method's means, every seed as a dot."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    shots = sorted({record.shots for record in records if record.shots}) or [1]
    for name in dict.fromkeys(record.method for record in records):
        mine = [record for record in records if record.method == name]
        if all(record.shots == 0 for record in mine):
            axis.axhline(100 * mine[0].top1, color="black", linestyle="--", label=name)
            continue
        counts = sorted({record.shots for record in mine})
        means = [100 * statistics.mean(r.top1 for r in mine if r.shots == k) for k in counts]
        (line,) = axis.plot(counts, means, label=name)
        x, y = [r.shots for r in mine], [100 * r.top1 for r in mine]
        axis.plot(x, y, "o", color=line.get_color(), alpha=0.5, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(k) for k in shots])
    title = f"{records[0].data}, {records[0].backbone}"
    axis.set(title=title, xlabel="shots (dot: one seed, line: mean)", ylabel="test top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return png(figure)
