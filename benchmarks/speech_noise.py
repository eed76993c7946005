"""Spoken digits in noise: adapter sets for each noise against one set for all, with a selector.

Babble of sentences, music, white and pink noise, engines at -5, 0, 5 and 10 dB (mean square of the
whole clip), on two speakers and on noise that nothing was trained on; see `speech_mixtures`. A test
clip is heard in every noise, at one SNR each, in turn. Every set, that for all included, is trained
for the same steps of 8 mixtures from -5 to 10 dB. Compared on the same test mixtures:
the frozen Whisper (at 30 s, where it is at its best); one set for all; the true noise's own set
(oracle); the set that the trained selector and the validation cost matrix choose (least expected
WER, through a bundle as users have it); always wrong, which is the mean of the three other sets,
and the costliest of the three by validation.

Run: python benchmarks/speech_noise.py DIGITS.zip [--methods LoRA,S2LoRA] [--folds 0,1,2]
  [--seeds 0] [--steps 300] [--seconds 1.4] [--limit N] [--out speech_noise]
DIGITS.zip holds `digit_speaker_index.wav` files (the free spoken digit data set). Each trained set,
selector and WER is kept in the folder --out: a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.benchmarks.speech_digits import BATCH, Digits, Errors, heard, parser, recogniser
from polyadapt.benchmarks.speech_digits import trained as trained_task
from polyadapt.benchmarks.speech_mixtures import (
    CATEGORIES,
    Fold,
    Noises,
    has_espeak,
    named,
    training,
)
from polyadapt.benchmarks.speech_noise_table import ALL, FROZEN, SELECTOR, report
from polyadapt.core.adapters.head_only import HeadOnly
from polyadapt.core.container import write_atomically
from polyadapt.speech.audio import LONGEST
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.bundle_record import Hearing
from polyadapt.speech.clips import Clip
from polyadapt.speech.decision import NONE, Choice, Decision, Scenario
from polyadapt.speech.selector import Selector, read_selector, save_selector
from polyadapt.speech.selector_training import examples, measure, train
from polyadapt.speech.task import SpeechRecognition
from polyadapt.speech.validation import costs_of, gain_of

SETS = {**{category: (category,) for category in CATEGORIES}, ALL: CATEGORIES}
"""Set -> the noise that it is trained in."""
LABELS = {category: Scenario(category) for category in CATEGORIES} | {ALL: Scenario()}

Key = tuple[str, int, int, str]
"""Method, fold, seed, and the set or what else was measured."""


class Records:
    """What was measured, as lines of JSON in a folder that belongs to one choice of settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "records.jsonl"
        kept = folder / "settings.json"
        if not kept.exists():
            write_atomically(kept, json.dumps(settings).encode())
        if (found := json.loads(kept.read_text())) != settings:
            raise SystemExit(f"{folder} was made with {found}, not {settings}: choose another")
        self.records = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the last run ended within a line
            write_atomically(self.file, "".join(lines[:-1]).encode())
            lines.pop()
        yield from map(json.loads, lines)

    def get(self, key: Key) -> dict[str, Any] | None:
        """The record of a key, if it was measured."""
        return next((r for r in self.records if _key(r) == key), None)

    def add(self, key: Key, found: dict[str, Any]) -> dict[str, Any]:
        """Keep a record."""
        line = json.dumps(dict(zip(("method", "fold", "seed", "what"), key, strict=True)) | found)
        with self.file.open("a") as file:
            file.write(line + "\n")
        self.records.append(json.loads(line))
        return self.records[-1]


def _key(record: dict[str, Any]) -> Key:
    return record["method"], record["fold"], record["seed"], record["what"]


# Sets


def score(task: SpeechRecognition, fold: Fold) -> dict[str, Errors]:
    """Errors on the validation and test mixtures."""
    task.eval()
    return {"val": heard(task, fold.val), "test": heard(task, fold.test)}


def frozen(fold: Fold, records: Records) -> None:
    """The Whisper as it is."""
    key = (FROZEN, fold.number, 0, NONE)
    if records.get(key) is None:
        records.add(key, score(recogniser(HeadOnly(), LONGEST), fold))
        _said(key)


def trained_set(key: Key, fold: Fold, records: Records, asked: argparse.Namespace) -> Path:
    """The file of a set, trained unless it is there, and its errors."""
    method, number, seed, name = key
    file = records.folder / f"{method}_fold{number}_seed{seed}_{name}.safetensors"
    if not file.exists():
        clips = training(fold, SETS[name], asked.steps * BATCH, seed)
        task = trained_task(method, clips, seed, asked)
        label = {"category": "+".join(SETS[name]), "snr_db": [-5.0, 10.0], "convention": "full"}
        task.adapters.extra = {**task.adapters.extra, "label": label}
        task.save_adapter(file)
    if records.get(key) is None:
        records.add(key, score(SpeechRecognition.from_file(file), fold))
        _said(key)
    return file


def _said(key: Key) -> None:
    method, fold, seed, name = key
    spent = time.process_time() / 60
    print(f"{method}, fold {fold}, seed {seed}: {name} ({spent:.1f} CPU min so far)", flush=True)


# The selector and its choices


def trained_selector(
    fold: Fold, seed: int, folder: Path, asked: argparse.Namespace
) -> tuple[Selector, Hearing]:
    """Trained on the speakers and noise of the training part, its temperature by validation."""
    file = folder / f"selector_fold{fold.number}_seed{seed}.safetensors"
    if not file.exists():
        torch.manual_seed(seed)
        selector = Selector(CATEGORIES)
        parts = {"train": fold.train, "val": fold.clean["val"]}
        made = {
            part: examples(
                fold.noises.scenes(part),
                [clip.hear() for clip in clips],
                4 * asked.selector_steps,
                asked.seconds,
            )
            for part, clips in parts.items()
        }
        train(selector, made["train"], asked.selector_steps, seed=seed)
        found = measure(selector, made["val"])
        save_selector(selector, file, {"temperature": found.temperature})
        print(f"selector, fold {fold.number}, seed {seed}: {found.accuracy:.1%} in validation")
    selector, about = read_selector(file)
    return selector, Hearing(temperature=about["temperature"])


def bundled(method: str, fold: Fold, seed: int, files: dict[str, Path], records: Records) -> Bundle:
    """The bundle of a method's sets; without a selector at first."""
    folder = records.folder / f"bundle_{method}_fold{fold.number}_seed{seed}"
    return Bundle.open(folder) if folder.exists() else create(folder, files, LABELS)


def choices(
    method: str,
    fold: Fold,
    seed: int,
    bundle: Bundle,
    records: Records,
    hearing: tuple[Selector, Hearing],
) -> None:
    """Equip the bundle by the validation data, let it choose for the test mixtures; keep both."""
    errors, words = validation_errors(method, fold, seed, records)
    labels = [named(clip.name)[1] for clip in fold.val]
    costs = costs_of(errors, words, labels, [LABELS[name] for name in CATEGORIES], ALL)
    decision = Decision(costs, CATEGORIES)
    bundle.equip(hearing[0], decision, hearing[1])
    chosen = [choice.name for choice in chosen_for(bundle, fold.val)]
    clips = [named(clip.name)[0] for clip in fold.val]
    gain = gain_of(costs, errors, words, chosen, clips)
    bundle.equip(hearing[0], replace(decision, gain=gain), hearing[1])
    found = chosen_for(bundle, fold.test)
    names = [clip.name for clip in fold.test]
    taken = {n: (c.scenario, c.name or NONE) for n, c in zip(names, found, strict=True)}
    assert bundle.decision is not None
    print(f"{method}, fold {fold.number}, seed {seed}, validation: {bundle.decision.advice()}")
    costs_by_set = dict(zip(costs.sets, costs.wer, strict=True))
    key = (method, fold.number, seed, SELECTOR)
    records.add(key, {"chosen": taken, "costs": costs_by_set, "validation": str(gain)})


def chosen_for(bundle: Bundle, mixtures: list[Clip]) -> list[Choice]:
    """What the bundle would use for each."""
    return [bundle.choose(clip.hear()) for clip in mixtures]


def validation_errors(
    method: str, fold: Fold, seed: int, records: Records
) -> tuple[dict[str, list[float]], list[float]]:
    """Set -> errors of the validation mixtures; and their words."""
    keys = {NONE: (FROZEN, fold.number, 0, NONE)}
    keys |= {name: (method, fold.number, seed, name) for name in SETS}
    errors: dict[str, list[float]] = {}
    words: list[float] = []
    for name, key in keys.items():
        record = records.get(key)
        assert record is not None
        pairs = [record["val"][clip.name] for clip in fold.val]
        errors[name] = [edits for edits, _ in pairs]
        words = [length for _, length in pairs]
    return errors, words


# The command


def run(method: str, fold: Fold, seed: int, records: Records, asked: argparse.Namespace) -> None:
    """Sets, selector and choices of one method, fold and seed, as far as they are missing."""
    if records.get((method, fold.number, seed, SELECTOR)) is not None:
        return
    frozen(fold, records)
    files = {n: trained_set((method, fold.number, seed, n), fold, records, asked) for n in SETS}
    hearing = trained_selector(fold, seed, records.folder, asked)
    bundle = bundled(method, fold, seed, files, records)
    choices(method, fold, seed, bundle, records, hearing)


def main() -> None:
    """Run what is not in the folder yet, then print the tables of all that is."""
    asked = _parser().parse_args()
    one_thread()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    names = ("steps", "seconds", "limit", "selector_steps")
    settings = {name: getattr(asked, name) for name in names}
    records = Records(asked.out, settings | {"espeak": has_espeak()})
    digits = Digits(asked.data)
    noises = Noises(records.folder)
    folds = [Fold(digits, number, noises, asked.limit) for number in asked.folds]
    for seed, fold, method in itertools.product(asked.seeds, folds, asked.methods):
        run(method, fold, seed, records, asked)
    print(f"\n{report(records.records, asked.methods, records.folder)}\n")
    babble = "eSpeak sentences" if has_espeak() else "generated voices"
    print(f"{machine('openai-whisper', 'lightning')}; babble of {babble}; {settings}")


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.set_defaults(methods=["LoRA", "S2LoRA"], seeds=[0])
    add = made.add_argument
    add("--selector-steps", type=int, default=400)
    add("--limit", type=int, help="so many validation and test clips of a fold alone")
    add("--out", type=Path, default=Path("speech_noise"), help="the folder of what is kept")
    return made


if __name__ == "__main__":
    main()
