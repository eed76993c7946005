"""CHASE_DB1 with LiteMedSAM: adapters, the decoder alone, all of it, and a U-Net from nothing.

Every SAM method trains the same parts of the decoder, a class token and, but for the decoder alone,
what it adapts of the encoder, for the same number of steps; the last state is tested once, at the
pictures' own size. The U-Net is limited by CPU seconds instead: 300, or in the steps with SAM
methods what SALT took. The steps are

  unet       the U-Net in 300 CPU seconds; the gate: Dice above 0.65
  decoder    the decoder alone at 256 px, on embeddings that are computed once
  quick      SALT and LoRA of equal size, the decoder alone and the U-Net; 128 px, attention of
             the last stage, the states before it computed once; three seeds
  report     all methods at 256 px, three seeds, varied pictures: hours, see --estimate

Run: python benchmarks/medical_chase.py chasedb1.zip --out FOLDER [--steps unet,decoder,quick]
  [--methods SALT,U-Net] [--seeds 0,1] [--epochs N] [--vessels]; with --estimate each step's CPU
time of training is told by one picture per method, and nothing is trained. What is finished is not
run again, so a step may be run in parts; its table is of all that lies in FOLDER. --rates tries the
learning rates of `medical_rates` in the quick step's setting, whose best are `RATES`. --vessels
takes generated vessels instead of the data. Predictions lie beside each run, those of the first
test picture also in FOLDER/predictions.png: green is right, blue was missed, orange is false.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polyadapt.benchmarks.medical_methods import (
    RATES,
    SAM_METHODS,
    Setting,
    run_sam,
    run_unet,
    sam_task,
)
from polyadapt.benchmarks.medical_rates import rates_table, tried
from polyadapt.benchmarks.medical_records import (
    Record,
    against,
    by_seed,
    interval,
    shown,
    table,
)
from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.vision.medical.backbones import LiteMedSAM
from polyadapt.vision.medical.data import ChaseDB1, GeneratedVessels, SegmentationData
from polyadapt.vision.medical.frozen_prefix import KeptPrefix
from polyadapt.vision.medical.metrics import ceiling
from polyadapt.vision.medical.task import Segmentation
from polyadapt.vision.medical.unet import PatchUNet
from polyadapt.vision.medical.view import View

GATE = 0.65
_LAST = "vision_encoder.stages.3.blocks"


@dataclass(frozen=True)
class Step:
    """Some runs with one setting; `unet`: its CPU seconds, or the method that tells them."""

    setting: Setting
    methods: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    unet: float | str | None = None
    augmentation: str = "none"


_WHOLE = Setting(
    size=256, at=LiteMedSAM.places["attention"], blocks=("vision_encoder",), epochs=20, keep="none"
)
STEPS: Mapping[str, Step] = {
    "unet": Step(_WHOLE, unet=300.0),
    "decoder": Step(replace(_WHOLE, epochs=15, keep="memory"), ("decoder",)),
    "quick": Step(
        Setting(
            size=128, at=f"{_LAST}.*.attn.{{qkv,proj}}", blocks=(_LAST,), epochs=10, keep="memory"
        ),
        ("decoder", "SALT", "LoRA equal"),
        (0, 1, 2),
        unet="SALT",
    ),
    # At this size the validation photographs are for 1e-3 instead of 3e-4: 0.744 against 0.675.
    "report": Step(
        replace(_WHOLE, rates={**RATES, "LoRA equal": 1e-3}),
        SAM_METHODS,
        (0, 1, 2),
        "SALT",
        "turns",
    ),
}


def data_of(path: Path | None, step: Step, seed: int) -> SegmentationData:
    """The data at their three parts; generated vessels where there is no path."""
    common: dict[str, Any] = {
        "batch_size": step.setting.batch,
        "seed": seed,
        "augmentation": step.augmentation,
    }
    made: SegmentationData = (
        GeneratedVessels(12, 2, 6, 512, 512, **common)
        if path is None
        else ChaseDB1(str(path), **common)
    )
    made.setup()
    return made


def run(name: str, step: Step, path: Path | None, out: Path) -> list[Record]:
    """A step; what was found before is taken as it is. All records of the step there are."""
    print(f"\n## Step {name}\n", flush=True)
    for seed in step.seeds:
        data = data_of(path, step, seed)
        for method in step.methods:
            folder = folder_of(out, name, method, seed)
            kept(folder, partial(run_sam, method, step.setting, data, seed))
        if step.unet is not None:
            folder = folder_of(out, name, "U-Net", seed)
            seconds = _seconds(step.unet, folder_of(out, name, "SALT", seed))
            kept(folder, partial(run_unet, PatchUNet(), data, seed, seconds))
    found = records_of(name, out)
    print(perfect(step, path))
    print(table(found), flush=True)
    return found


def folder_of(out: Path, step: str, method: str, seed: int) -> Path:
    return out / f"{step}-{method.replace(' ', '-')}-seed{seed}"


def records_of(name: str, out: Path) -> list[Record]:
    """What has been run of a step, method by method."""
    found = [Record.load(file) for file in sorted(out.glob(f"{name}-*-seed*/record.json"))]
    order = (*SAM_METHODS, "U-Net")
    return sorted(found, key=lambda record: (order.index(record.method), record.seed))


def _seconds(limit: float | str, before: Path) -> float:
    """The U-Net's CPU seconds: given, or those of the run in the folder."""
    if not isinstance(limit, str):
        return limit
    if not (before / "record.json").exists():
        raise SystemExit(f"the U-Net has {limit}'s CPU seconds, and {before.name} is not there")
    return Record.load(before / "record.json").cpu_seconds


def kept(folder: Path, make: partial[Record]) -> Record:
    """The record in the folder, else the one that is made now."""
    file = folder / "record.json"
    if not file.exists():
        record = make(folder)
        record.save(file)  # last: a run that was interrupted has none
        print(f"{folder.name}: validation Dice {record.val_dice:.3f}", flush=True)
    return Record.load(file)


def perfect(step: Step, path: Path | None) -> str:
    """What the best possible answers at the step's size would score."""
    view, cases = View.sam(step.setting.size), data_of(path, step, 0).cases("test")
    masks = [case.read()[1] for case in cases]
    rows = []
    for whole, words in ((False, "shares of pixels"), (True, "whole pixels")):
        scores = [ceiling(mask, view, whole) for mask in masks]
        cells = [
            f"{word} {interval(np.array([[getattr(s, key) for s in scores]]))}"
            for word, key in (("Dice", "dice"), ("clDice", "cldice"), ("HD95", "hd95"))
        ]
        rows.append(f"a perfect answer at {step.setting.size} px, {words}: {', '.join(cells)}\n")
    return "".join(rows)


def estimate(step: Step, path: Path | None) -> float:
    """CPU seconds of a step's training, from one training step of each method on one picture."""
    data = data_of(path, replace(step, setting=replace(step.setting, batch=1)), 0)
    count, total, salt = len(data.cases("train")), 0.0, 0.0
    for method in step.methods:
        first, later = _picture(sam_task(method, step.setting, 0), data)
        one = (first + later * (step.setting.epochs - 1)) * count
        salt = one if method == "SALT" else salt
        print(f"  {method}: {one / 60:.1f} CPU minutes a run", flush=True)
        total += one
    unet = salt if isinstance(step.unet, str) else step.unet or 0.0
    return (total + unet) * len(step.seeds)


def _picture(task: Segmentation, data: SegmentationData) -> tuple[float, float]:
    """CPU seconds of a picture in its first epoch, and in a later one when its prefix is kept."""
    data.view, data.fractions = task.view, task.fractions
    batch, kept = next(iter(data.train_dataloader())), task.cache_prefix != "none"
    task._kept = KeptPrefix(task.backbone, data) if kept else None
    seconds = []
    for _ in range(2 if kept else 1):
        begin = time.process_time()
        task.training_loss(batch).backward()
        seconds.append(time.process_time() - begin)
    return seconds[0], seconds[-1]


def verdicts(found: Mapping[str, Sequence[Record]]) -> list[str]:
    """The gate, and SALT against LoRA of equal size."""
    lines = []
    for name, records in found.items():
        if name == "unet":
            dice = float(by_seed(records, "dice").mean())
            met = "met" if dice > GATE else "NOT met"
            lines.append(f"gate: U-Net's Dice {dice:.3f}, above {GATE}: {met}")
        if {"SALT", "LoRA equal"} <= {r.method for r in records}:
            lines.append(f"step {name}, {against(records, 'SALT', 'LoRA equal')}")
    return lines


def main() -> None:
    asked = _parser().parse_args()
    one_thread()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's advice on workers and intervals
    path = None if asked.vessels else asked.data
    steps = {name: of_step(STEPS[name], asked) for name in asked.steps}
    if asked.rates:
        step = of_step(STEPS["quick"], asked)
        data, methods = data_of(path, step, 0), asked.methods or SAM_METHODS
        out, sams = asked.out / "rates", [m for m in methods if m in SAM_METHODS]
        print(rates_table({m: tried(m, step.setting, data, out) for m in sams}))
    elif asked.estimate:
        for name, step in steps.items():
            print(f"step {name}: {estimate(step, path) / 60:.1f} CPU minutes", flush=True)
    else:
        report(steps, path, asked.out)
    print(f"\n{machine('monai', 'timm', 'transformers', 'lightning')}")


def of_step(step: Step, asked: argparse.Namespace) -> Step:
    """A step with the epochs, methods and seeds that were asked for."""
    if asked.epochs is not None:
        step = replace(step, setting=replace(step.setting, epochs=asked.epochs))
    if asked.seeds is not None:
        step = replace(step, seeds=asked.seeds)
    if asked.methods is None:
        return step
    unet = step.unet if "U-Net" in asked.methods else None
    return replace(step, methods=[m for m in step.methods if m in asked.methods], unet=unet)


def report(steps: Mapping[str, Step], path: Path | None, out: Path) -> None:
    """Run steps, tell the gate and the differences, draw the predictions."""
    found = {name: run(name, step, path, out) for name, step in steps.items()}
    print("\n".join(["", *verdicts(found)]))
    done = [file.parent for file in sorted(out.glob("*-seed0/record.json"))]
    if done:
        shown(done, out / "predictions.png")


def _names(text: str, allowed: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in allowed]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
    return names


def _steps(text: str) -> list[str]:
    return _names(text, list(STEPS))


def _methods(text: str) -> list[str]:
    return _names(text, (*SAM_METHODS, "U-Net"))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="CHASE_DB1: a folder or a .zip")
    add("--out", type=Path, default=Path("chase"), metavar="FOLDER", help="of runs and pictures")
    add("--steps", type=_steps, default=["unet", "decoder", "quick"], help=f"of {','.join(STEPS)}")
    add(
        "--methods", type=_methods, help=f"these of a step's alone: {', '.join(SAM_METHODS)}, U-Net"
    )
    add("--seeds", type=_numbers, help="instead of the steps' own: 0,1,2")
    add("--epochs", type=int, help="instead of the steps' own")
    add("--vessels", action="store_true", help="generated vessels instead of the data")
    add("--estimate", action="store_true", help="tell how long the steps take, run nothing")
    add("--rates", action="store_true", help="try learning rates, run nothing else")
    return parser


if __name__ == "__main__":
    main()
