"""`polyadapt geometry3d pretrain-small`: train the small pointmap network on generated scenes.

One core, an hour or more. It saves what it needs to go on every few minutes and goes on from there
when it is run again; the same bits for the same seed, threads and library versions, however often
it was cut off.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.threads import on_threads
from .loss import distances
from .matching import (
    Truth,
    joined,
    loss_of,
    match_error,
    pose_errors,
    size_of,
    truth_of,
)
from .pointmaps import Pair
from .scenes.camouflage import camouflaged
from .small import CELL, Answer, Seen, SmallNetwork

SCENES, VIEWS = 4, 4  # of a step
PAIRS = ((0, 1), (2, 3), (1, 2))  # of a scene's views, in a random order
PEAK_LR, WEIGHT_DECAY, WARM_UP, CLIP = 1.5e-3, 0.02, 200, 1.0
NOISE = 0.01  # of the sensor, on images from 0 to 1
_HELD_OUT, _MEASURED = 10**9, 24  # the first seed of scenes that measure, and how many there are


@dataclass(frozen=True)
class Plan:
    """What fixes the weights' bits, besides library versions."""

    seed: int = 0
    steps: int = 4000
    threads: int = 1
    height: int = 48
    width: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1 or self.threads < 1:
            raise AdaptError(f"steps={self.steps} and threads={self.threads} must be at least 1")
        if self.height % 4 or self.width % 4 or min(self.height, self.width) < 24:
            raise AdaptError(f"images of {self.height} x {self.width}: from 24, divisible by 4")


def main(argv: Sequence[str]) -> int:
    """Run the command; prints losses, and how well scenes that do not train are seen."""
    asked = _parser().parse_args(argv)
    plan = Plan(asked.seed, asked.steps, asked.threads, asked.height, asked.width)
    finished = pretrain(asked.out, plan, asked.stop_after, asked.save_every, asked.measure_every)
    print(f"written: {asked.out}" if finished else "stopped: run the same command to go on")
    return 0


def pretrain(
    out: Path,
    plan: Plan,
    stop_after: float | None = None,
    save_every: float = 180.0,
    measure_every: int = 250,
) -> bool:
    """Train, or go on training, and write the weights; False if `stop_after` seconds ended it.

    The state lies beside the weights, in `<out>.state`, until the last step. Nothing is measured
    where `measure_every` is 0. Raises `AdaptError` for a folder that is not there and a state of
    another plan.
    """
    if not out.parent.is_dir():
        raise AdaptError(f"cannot write {out}: the folder {out.parent} does not exist")
    with on_threads(plan.threads):
        return _pretrain(out, plan, stop_after, save_every, measure_every)


def _pretrain(
    out: Path, plan: Plan, stop_after: float | None, save_every: float, measure_every: int
) -> bool:
    run = _Run(plan)
    state = out.with_name(out.name + ".state")
    if state.exists():
        run.load(state)
        print(f"goes on after step {run.step}", flush=True)
    started = saved = time.monotonic()
    before, busy = run.step, time.process_time()
    while run.step < plan.steps:
        run.advance()
        now = time.monotonic()
        if measure_every and (run.step % measure_every == 0 or run.step == plan.steps):
            per_step = (time.process_time() - busy) / (run.step - before)
            run.report(now - started, SCENES * len(PAIRS) / per_step)
        if stop_after is not None and now - started > stop_after:
            break
        if now - saved > save_every:
            run.save(out, state)
            saved = now
    finished = run.step == plan.steps
    run.save(out, None if finished else state)
    if finished:
        state.unlink(missing_ok=True)
    return finished


class _Run:
    """The network, its optimiser and the number of steps done."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step = plan, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.model = SmallNetwork(focal=float(plan.width))
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=PEAK_LR,
            betas=(0.9, 0.98),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share)
        self.recent: dict[str, float] = {}

    def _share(self, step: int) -> float:
        """Of the peak rate: rises over the first steps, then falls as a cosine."""
        falling = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.plan.steps)).item())
        return min(1.0, (step + 1) / WARM_UP) * falling

    def advance(self) -> None:
        """One step on scenes of its own, which its number and the seed fix."""
        self.model.train()
        first = self.plan.seed * 10**7 + self.step * SCENES
        generator = Generator().manual_seed(first)
        images, truth, edges = batch(range(first, first + SCENES), self.plan, generator)
        answer = answered(self.model, images, edges)
        parts = loss_of(answer, truth, self.plan.width // CELL)
        loss = torch.stack(list(parts.values())).sum()
        if not bool(loss.isfinite()):
            raise AdaptError(f"step {self.step + 1}: the loss is {float(loss.detach())}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        for name, value in parts.items():
            self.recent[name] = 0.95 * self.recent.get(name, value.item()) + 0.05 * value.item()

    def report(self, seconds: float, speed: float) -> None:
        """A line on the losses, with pairs trained per CPU second; a line on held-out scenes."""
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.recent.items())
        done = f"step {self.step} of {self.plan.steps}, {seconds:.0f} s, {speed:.1f} pairs a CPU s"
        print(f"{done}: {losses}", flush=True)
        found = measured(self.model, self.plan)
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)

    def save(self, out: Path, state: Path | None) -> None:
        """The weights, and what is needed to go on."""
        from safetensors.torch import save

        record = json.dumps({**asdict(self.plan), "done": self.step})
        tensors = {name: t.detach().contiguous() for name, t in self.model.state_dict().items()}
        write_atomically(out, save(tensors, {"pretraining": record}))
        if state is not None:
            kept = {"plan": asdict(self.plan), "step": self.step, "recent": self.recent}
            kept |= {"model": tensors, "optimizer": self.optimizer.state_dict()}
            buffer = io.BytesIO()
            torch.save({**kept, "schedule": self.schedule.state_dict()}, buffer)
            write_atomically(state, buffer.getvalue())

    def load(self, state: Path) -> None:
        """Go on from a state of the same plan."""
        kept: dict[str, Any] = torch.load(state, weights_only=True)
        if kept["plan"] != asdict(self.plan):
            raise AdaptError(
                f"{state} is of another plan, {kept['plan']}: ask for that, or remove the file"
            )
        self.step, self.recent = kept["step"], kept["recent"]
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.schedule.load_state_dict(kept["schedule"])


def batch(seeds: Sequence[int], plan: Plan, generator: Generator) -> tuple[Tensor, Truth, Tensor]:
    """Scenes as images [s * 4, 3, h, w], the truth of their pairs, and the pairs [b, 2]."""
    scenes = [camouflaged(seed, VIEWS, (plan.height, plan.width)) for seed in seeds]
    pairs = torch.tensor(PAIRS)
    edges = [torch.randperm(VIEWS, generator=generator)[pairs] for _ in scenes]
    truth = joined([truth_of(scene, e) for scene, e in zip(scenes, edges, strict=True)])
    images = torch.cat([scene.images for scene in scenes])
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    numbered = torch.cat([e + VIEWS * number for number, e in enumerate(edges)])
    return images.clamp(0, 1), truth, numbered


def answered(model: SmallNetwork, images: Tensor, edges: Tensor) -> Answer:
    """The network on pairs of images, each image encoded once."""
    seen = model.encode(images)
    first, second = (Seen(*(part[ends] for part in seen)) for ends in edges.unbind(1))
    return model.relate(first, second)


@torch.no_grad()
def measured(model: SmallNetwork, plan: Plan, scenes: int = _MEASURED) -> dict[str, float]:
    """Means over scenes that never train.

    match: error in tokens of 4 pixels, its median, and the share above 1; turn and aim: degrees of
    the pose; own and other: error of the first and second pointmap relative to the pair's size,
    own with the right second image, the first one again, and another scene's; scale: |log| of the
    pair's size in baselines.
    """
    model.eval()
    kept: dict[str, list[Tensor]] = {}
    for at in range(0, scenes, SCENES):
        seeds = range(_HELD_OUT + at, _HELD_OUT + min(at + SCENES, scenes))
        images, truth, edges = batch(seeds, plan, Generator().manual_seed(at))
        for name, values in _errors(model, images, truth, edges).items():
            kept.setdefault(name, []).append(values.flatten())
    joint = {name: torch.cat(values) for name, values in kept.items()}
    off = joint.pop("match")
    found = {"match": off.mean(), "median": off.median(), "above 1": (off > 1).float().mean()}
    return {name: float(v) for name, v in (found | {n: v.mean() for n, v in joint.items()}).items()}


def _errors(model: SmallNetwork, images: Tensor, truth: Truth, edges: Tensor) -> dict[str, Tensor]:
    right = answered(model, images, edges)
    again = answered(model, images, edges[:, :1].expand(-1, 2))
    elsewhere = torch.stack([edges[:, 0], edges[:, 1].roll(len(PAIRS))], 1)
    wrong = answered(model, images, elsewhere)
    turn, aim = pose_errors(right, truth)
    sizes = [size_of(p.points1, p.points2).log() for p in (right.pair, truth)]
    return {
        "match": match_error(right, truth),
        "turn, fitted": turn[0].rad2deg(),
        "turn": turn[-1].rad2deg(),
        "aim, fitted": aim[0].rad2deg(),
        "aim": aim[-1].rad2deg(),
        "own": own_error(right.pair, truth),
        "own, same image": own_error(again.pair, truth),
        "own, shuffled": own_error(wrong.pair, truth),
        "other": distances(right.pair, truth.labels())[1].flatten(1).mean(1),
        "other, same image": distances(again.pair, truth.labels())[1].flatten(1).mean(1),
        "other, shuffled": distances(wrong.pair, truth.labels())[1].flatten(1).mean(1),
        "scale": (sizes[0] - sizes[1]).abs(),
    }


def own_error(pair: Pair, truth: Truth) -> Tensor:
    """The error of the first pointmap's shape alone, each divided by its own size: [b]."""
    off = pair.points1 / size_of(pair.points1) - truth.points1 / size_of(truth.points1)
    error: Tensor = off.norm(dim=-1).flatten(1).mean(1)
    return error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt geometry3d pretrain-small", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="12 pairs each")
    parser.add_argument("--threads", type=int, default=1, help="a part of what fixes the bits")
    parser.add_argument("--height", type=int, default=Plan.height)
    parser.add_argument("--width", type=int, default=Plan.width)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="to go on later")
    parser.add_argument("--save-every", type=float, default=180.0, metavar="SECONDS")
    parser.add_argument("--measure-every", type=int, default=250, metavar="STEPS")
    return parser
