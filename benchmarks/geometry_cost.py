"""Time and memory of calibrating a scene, by views and image size; an estimate for published size.

Measured on one core: the small network (random weights) asked about all ordered pairs, the robust
alignment of an oracle's answers about a generated room (its start, and a sweep), and a step of
training on a pair in both orders. Seconds are the process's CPU time on one thread, so that a busy
machine counts for less. Each row is a process of its own; memory is the most that a stage held
resident beyond what was held before it (Linux).

Counted, not run: the floating-point operations and kept activations of DUSt3R's published size at
512x384, on tensors that have no numbers, with LoRA of rank 16 on its default sites. Times derived
from them are estimates under a stated rate.

Run: python benchmarks/geometry_cost.py [--views 4,10,20] [--widths 32,64,128] [--sweeps 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core import attach
from polyadapt.geometry3d.alignment import STEPS, align
from polyadapt.geometry3d.backbones import SmallPointmaps
from polyadapt.geometry3d.calibration import RECIPE, Schedule, held_out_views
from polyadapt.geometry3d.dust3r import SITES, Dust3r, Dust3rSize
from polyadapt.geometry3d.graph import Complete
from polyadapt.geometry3d.labels import Labels, true_labels
from polyadapt.geometry3d.loss import confidence_loss
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.predictions import predict
from polyadapt.geometry3d.scenes.rooms import room

HEIGHT, WIDTH = 384, 512
RATES = (10, 20, 35.6)  # TFLOP/s; the last one is the data sheet's of an RTX 3090 in fp32
STEPS_TIMED = 4
PROCESS = Path("/proc/self")


# Measured


def cell(views: int, width: int, sweeps: int) -> dict[str, float]:
    """CPU seconds and MiB of each stage, in this process."""
    truth = room(0, "day", views, (width * 3 // 4, width), samples=1)
    network = SmallPointmaps(pretrained=False, focal=float(width)).build()
    edges = Complete().edges(truth.images)
    found: dict[str, float] = {"pairs": len(edges)}
    asking = Stage()
    predict(network, truth.images, edges)
    found |= asking.ended("asking")
    said = Oracle(truth, Flaws(noise=0.1)).predictions(edges)
    starting = Stage()
    align(said, steps=0)
    found |= starting.ended("start")
    aligning = Stage()
    align(said, steps=sweeps)
    found |= aligning.ended("aligning")
    found["sweep"] = max(0.0, found["aligning"] - found["start"]) / sweeps
    training = Stage()
    found["step"] = _step_seconds(network, truth.images, true_labels(truth, edges), edges)
    found["training MiB"] = training.ended("training")["training MiB"]
    return found


class Stage:
    """CPU seconds since it began, and the most that was held beyond what was held then."""

    def __init__(self) -> None:
        PROCESS.joinpath("clear_refs").write_text("5")  # forgets the peak so far
        self.began, self.held = time.process_time(), _mib("VmRSS")

    def ended(self, name: str) -> dict[str, float]:
        """Under the stage's name."""
        return {
            name: time.process_time() - self.began,
            f"{name} MiB": _mib("VmHWM") - self.held,
        }


def _mib(what: str) -> float:
    lines = PROCESS.joinpath("status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def _step_seconds(network: Any, images: Tensor, labels: Labels, edges: Tensor) -> float:
    """The median of a few steps on the first pair in both orders."""
    adapters = attach(network, RECIPE, SmallPointmaps.default_sites, "cost")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)
    chosen = torch.tensor([k for k, e in enumerate(edges.tolist()) if {*e} == {0, 1}])
    first, second = edges[chosen].unbind(1)
    taken = []
    for _ in range(STEPS_TIMED):
        began = time.process_time()
        loss = confidence_loss(network(images[first], images[second]), labels.chosen(chosen))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def steps_of(views: int, hold_out: bool = True) -> int:
    """How many steps calibration takes on all pairs of the views that are not held out."""
    left = views - (len(held_out_views(views)) if hold_out else 0)
    return Schedule.epochs * left * (left - 1) // Schedule.batch


def row(views: int, width: int, found: dict[str, float]) -> str:
    """A line of the table of what was measured."""
    steps = steps_of(views)
    whole = found["asking"] + found["start"] + STEPS * found["sweep"] + steps * found["step"]
    cells = [
        str(views),
        f"{width}x{width * 3 // 4}",
        f"{found['pairs']:.0f}",
        f"{found['asking']:.1f} / {found['asking MiB']:.0f}",
        f"{found['start']:.2f}",
        f"{1e3 * found['sweep']:.0f} / {found['aligning MiB']:.0f}",
        f"{1e3 * found['step']:.0f} / {found['training MiB']:.0f}",
        str(steps),
        f"{whole / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| views | pixels | pairs | asking, s / MiB | start, s | a sweep, ms / all, MiB |"
    f" a step, ms / MiB | steps | all with {STEPS} sweeps, min (computed) |\n"
    f"{'| --- ' * 9}|"
)


# Counted


class Counted(Dust3r):
    """Images without numbers cannot be compared: it is told whether both orders are there."""

    both_orders = True

    def _encoded(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if not self.both_orders:
            one, two = self.encode(torch.cat([first, second])).chunk(2)
            return one, two
        one, two = self.encode(torch.cat([first[::2], second[::2]])).chunk(2)
        return torch.stack([one, two], 1).flatten(0, 1), torch.stack([two, one], 1).flatten(0, 1)


@dataclass(frozen=True)
class Count:
    """Operations (a multiplication and an addition are two), and bytes."""

    asking: int  # a batch of 2 pairs that share no image order
    training: int  # a step on a pair in both orders: forward, loss and backward
    base: int  # bytes of the frozen weights in fp32
    adapters: int
    kept: int  # bytes of activations that a step keeps for its backward, attention being fused


def counted(size: Dust3rSize, height: int = HEIGHT, width: int = WIDTH) -> Count:
    """Count with tensors that have no numbers: nothing is computed."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # they have none
        return _counted(size, height, width)


def _counted(size: Dust3rSize, height: int, width: int) -> Count:
    network = Counted(size).eval().requires_grad_(False)
    images = torch.empty(2, 3, height, width)
    points, known = torch.empty(2, height, width, 3), torch.empty(2, height, width)
    base = sum(p.numel() * p.element_size() for p in network.parameters())
    network.both_orders = False
    with torch.no_grad():
        asking = _operations(lambda: network(images, images))
    network.both_orders = True
    adapters = attach(network, RECIPE, SITES, "count")
    kept: dict[int, Tensor] = {}  # held, or another storage would get its place
    own = {p.untyped_storage()._cdata for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pair = network(images, images)
            loss = sum((part * whole).sum() for part, whole in zip(pair, targets, strict=True))
        loss.backward()

    targets = (points, known, points, known)
    training = _operations(step)
    kept.clear()
    step()
    many = sum(p.numel() * p.element_size() for p in adapters.parameters())
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Count(asking, training, base, many, held)


def _operations(call: Callable[[], Any]) -> int:
    """With attention as plain products: the counter does not know the CPU's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def estimate(count: Count, views: int = 10) -> str:
    """What calibrating a scene of so many views needs, and how long under some rates."""
    pairs = views * (views - 1)
    asking = count.asking * (pairs // 2)
    lines = [
        f"{HEIGHT}x{WIDTH}: {count.asking / 1e12:.2f} TFLOP to ask about 2 pairs,"
        f" {count.training / 1e12:.2f} TFLOP a training step on a pair in both orders;"
        f" weights {count.base / 2**30:.2f} GiB, set {count.adapters / 1e6:.1f} MB,"
        f" activations kept {count.kept / 2**30:.2f} GiB with fused attention",
        "",
        f"| {views} views | operations, PFLOP | {' | '.join(f'at {r:g} TFLOP/s' for r in RATES)} |",
        "| --- " * (len(RATES) + 2) + "|",
        _estimated(f"asking about {pairs} pairs", asking),
    ]
    for what, hold_out in (("two views held out", True), ("none held out, as the paper", False)):
        steps = steps_of(views, hold_out)
        lines.append(_estimated(f"{steps} steps ({what})", steps * count.training))
    return "\n".join(lines)


def _estimated(what: str, operations: int) -> str:
    times = " | ".join(f"{operations / rate / 1e12 / 60:.1f} min" for rate in RATES)
    return f"| {what} | {operations / 1e15:.2f} | {times} |"


def extrapolated(found: dict[str, float], width: int, views: int = 10) -> str:
    """The alignment at the published size from one that was measured: time goes with the points."""
    points = 2 * found["pairs"] * width * (width * 3 // 4)
    wanted = 2 * views * (views - 1) * HEIGHT * WIDTH
    seconds = STEPS * found["sweep"] * wanted / points
    memory = found["aligning MiB"] * wanted / points / 1024
    return (
        f"Alignment of {views} views of {WIDTH}x{HEIGHT}, extrapolated from {width} pixels by the"
        f" number of points ({wanted / 1e6:.1f} million against {points / 1e6:.2f}):"
        f" {seconds / 60:.0f} min on one core here for {STEPS} sweeps, {memory:.1f} GiB"
        f" besides the answers' {wanted * 16 / 2**30:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--views", default="4,10,20")
    parser.add_argument("--widths", default="32,64,128", help="at ten views")
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--cell", nargs=2, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    one_thread()
    if asked.cell:
        views, width = asked.cell
        print(json.dumps(cell(views, width, asked.sweeps)))
        return
    wanted = [(int(views), 64) for views in asked.views.split(",")]
    wanted += [(10, int(width)) for width in asked.widths.split(",") if int(width) != 64]
    found = {}
    print(f"{machine()}\n\nMeasured, {asked.sweeps} sweeps, {STEPS_TIMED} steps a row:\n\n{HEAD}")
    for views, width in wanted:
        run = [sys.executable, __file__, "--sweeps", str(asked.sweeps)]
        run += ["--cell", str(views), str(width)]
        done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True)
        found[views, width] = json.loads(done.stdout)
        print(row(views, width, found[views, width]), flush=True)
    print("\nCounted for the published size: an estimate, nothing of it was run.\n")
    print(estimate(counted(Dust3rSize())))
    largest = max((at for at in found if at[0] == 10), key=lambda at: at[1], default=None)
    if largest:
        print(f"\n{extrapolated(found[largest], largest[1])}")
    print("\nThe paper's five minutes are its authors' figure on one RTX 3090.")


if __name__ == "__main__":
    main()
