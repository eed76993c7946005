"""The quick start's tables, its picture, and the saved sets in use."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..core.activation import activate
from ..core.sets import AdapterSet
from ..core.store import load
from .backbones import TinyViT
from .digits import Digits, digits

if TYPE_CHECKING:
    from .quickstart import Result

HEADS = ("head, SGD", "head, converged")


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Method -> its results by seed, in the order of the first seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        found.setdefault(result.method, []).append(result)
    return found


def better_head(results: Sequence[Result]) -> str:
    """The head whose mean accuracy is higher: what an adapter has to beat."""
    grouped = by_method(results)
    return max(HEADS, key=lambda name: mean(r.accuracy for r in grouped[name]))


def table(results: Sequence[Result]) -> str:
    """Accuracy by method, and its gap to the better head, per seed and in the mean."""
    grouped, rival = by_method(results), better_head(results)
    rivals = [r.accuracy for r in grouped[rival]]
    lines = [
        f"{'method':28} {'mean':>6}  {'by seed':18}  {'gap to ' + rival:>24}"
        f"  {'trained':>8} {'stored':>8} {'s':>5}"
    ]
    for name, rows in grouped.items():
        values = [r.accuracy for r in rows]
        gaps = [100 * (a - b) for a, b in zip(values, rivals, strict=True)]
        seeds = " ".join(f"{100 * v:.1f}" for v in values)
        gap = f"{mean(gaps):+.1f} ({' '.join(f'{g:+.1f}' for g in gaps)})"
        lines.append(
            f"{name:28} {100 * mean(values):6.1f}  {seeds:18}  {gap:>24}"
            f"  {rows[0].trained:8,} {rows[0].stored:8,} {mean(r.seconds for r in rows):5.1f}"
        )
    return "\n".join(lines)


def picture(results: Sequence[Result], examples: Digits) -> bytes:
    """A PNG: some digits, and a bar per method for each variant, every seed as a dot."""
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 5))
    variants = list(dict.fromkeys(r.variant for r in results))
    for column, variant in enumerate(variants):
        strip, bars = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        pixels = examples.pixels[:14]
        pixels = 255 - pixels if variant == "inverted" else pixels
        strip.imshow(pixels.transpose(1, 0, 2).reshape(8, -1), cmap="gray", vmin=0, vmax=255)
        strip.set_axis_off()
        strip.set_title(f"{variant} digits, 300 labels")
        grouped = by_method([r for r in results if r.variant == variant])
        names = list(grouped)[::-1]
        values = [[100 * r.accuracy for r in grouped[name]] for name in names]
        colours = ["#9aa5b1" if n.startswith(("pixels", "head")) else "#2f6fb2" for n in names]
        bars.barh(names, [mean(v) for v in values], color=colours)
        for place, dots in enumerate(values):
            bars.plot(dots, [place] * len(dots), "o", color="black", markersize=3)
        lowest = min(min(v) for v in values)
        bars.set_xlim(max(0, lowest - 5), 100)
        bars.set_xlabel("test accuracy, % (bar: mean; dots: seeds)")
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def sets_in_use(results: Sequence[Result], seed: int) -> str:
    """Load both LoRA files on one backbone, switch between them, merge one; all measured."""
    spec = TinyViT()
    backbone = spec.build().eval()
    wants = spec.preprocessing(backbone)
    files = {r.variant: r.file for r in results if r.seed == seed and r.method.startswith("LoRA")}
    sets = {variant: load(backbone, file, name=variant) for variant, file in files.items()}
    lines = ["The two LoRA files on one backbone, switched (test accuracy in %):"]
    for shown in files:
        test = digits(seed, inverted=shown == "inverted")[1]
        images = test.prepared(wants)
        found = []
        for name, adapters in sets.items():
            with activate(backbone, name):
                logits = _logits(backbone, adapters.head, images)
            share = (logits.argmax(1) == test.labels).double().mean()
            found.append(f"set {name!r} {100 * share:.1f}")
        lines.append(f"  {shown} digits: {', '.join(found)}")
    return "\n".join([*lines, _merged(backbone, sets["upright"], images)])


def _merged(backbone: nn.Module, adapters: AdapterSet, images: Tensor) -> str:
    with activate(backbone, adapters.name):
        before = _logits(backbone, adapters.head, images)
    adapters.merge()
    after = _logits(backbone, adapters.head, images)
    adapters.unmerge()
    return f"  merged into the weights: logits differ by at most {(after - before).abs().max():.1e}"


@torch.inference_mode()
def _logits(backbone: nn.Module, head: dict[str, Tensor], images: Tensor) -> Tensor:
    features = torch.cat([backbone(part) for part in images.split(256)])
    return F.linear(features, head["head.weight"], head["head.bias"])
