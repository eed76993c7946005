"""A thousand sets on one small ViT: attaching one more, switching, a mixed batch, memory per set.

Run: python benchmarks/resident.py [--sets 1000] [--out FOLDER]; writes a picture beside its table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core import LoRA, activate, attach, switch

AT = ["blocks.*.attn.qkv", "blocks.*.attn.proj"]
BATCH = 8
COLUMNS = ("attach one more, ms", "switch, ms", "mixed batch of 8, ms", "memory of all, MiB")


def median_ms(call: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


def resident_mib() -> float:
    """What this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def one_more(model: nn.Module, number: int) -> float:
    """Milliseconds that attaching set `number` takes; its factors are then moved off zero."""
    begin = time.perf_counter()
    adapters = attach(model, LoRA(rank=4), AT, f"s{number}")
    spent = 1e3 * (time.perf_counter() - begin)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.01)
    return spent


def measured(model: nn.Module, count: int, attaching: list[float], before: float) -> list[float]:
    """A row of the table at `count` sets."""
    images = torch.randn(BATCH, 3, 224, 224)
    names = [f"s{n * count // BATCH}" for n in range(BATCH)]

    def mixed() -> None:
        with torch.no_grad(), activate(model, per_sample=names):
            model(images)

    turns = [f"s{n}" for n in range(min(count, 20))]
    switching = median_ms(lambda: list(map(partial(switch, model), turns)), 5) / len(turns)
    recent = statistics.median(attaching[-20:])
    return [recent, switching, median_ms(mixed, 5), resident_mib() - before]


def draw(table: dict[int, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for column, (axis, title) in enumerate(zip(axes, COLUMNS, strict=True)):
        axis.plot(list(table), [row[column] for row in table.values()], marker="o")
        axis.set(title=title, xlabel="sets attached", xscale="log", ylim=(0, None))
        if column == 3:
            axis.set_xscale("linear")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    one_thread()
    model = timm.create_model("vit_tiny_patch16_224").eval()
    one_more(model, 0)
    before, attaching, table = resident_mib(), [], {}
    points = {n for n in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if n < asked.sets} | {asked.sets}
    for number in range(1, asked.sets):
        attaching.append(one_more(model, number))
        if number + 1 in points:
            table[number + 1] = measured(model, number + 1, attaching, before)
    print(machine("timm"))
    print("ViT-Ti, LoRA of rank 4 on qkv and proj of 12 blocks, 8 images, one thread")
    print("sets: " + "; ".join(COLUMNS))
    for count, row in table.items():
        print(f"{count:>5}: " + "; ".join(f"{value:.2f}" for value in row))
    count = max(table)
    print(f"memory per set: {1024 * table[count][3] / (count - 1):.0f} KiB")
    asked.out.mkdir(exist_ok=True)
    draw(table, asked.out / "resident.png")


if __name__ == "__main__":
    main()
