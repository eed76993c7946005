"""Clean spoken digits: adapters of Whisper tiny.en on speakers that they have not heard.

Three folds of two held-out speakers each, pooled. The frozen Whisper hears 30 s, where it is at its
best; the others are trained and scored in a context of `--seconds`, for the same steps. Digits are
compared after Whisper's normaliser, with runs of digits split. What a set forgets is measured at
30 s on eSpeak sentences and, with `--jfk`, on a real recording. Intervals (95 %) are bootstraps
over clips or sentences, whose errors are averaged over folds and seeds; differences are paired.

Run: python benchmarks/speech_digits.py DIGITS.zip [--jfk jfk.flac] [--methods LoRA,S2LoRA]
  [--folds 0,1,2] [--seeds 0,1,2] [--steps 300] [--sentences 60] [--out FILE.jsonl]
DIGITS.zip holds `digit_speaker_index.wav` files (the free spoken digit data set). What --out holds
already is not run again: an interrupted run goes on with the same sentences, kept beside --out.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import soundfile
import soxr
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from polyadapt.benchmarks.espeak import VOICES, say, sentences
from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.benchmarks.speech_digits_table import averaged, cell, table
from polyadapt.core import AdaLoRA, BitFit, FullFineTuning, LoRA, Recipe, S2LoRA, container
from polyadapt.core.adapters.head_only import HeadOnly
from polyadapt.core.adapters.s2lora import S2LoRAAdapter
from polyadapt.speech.audio import LONGEST, log_mel, read_audio
from polyadapt.speech.backbones import OfflineTinyEn
from polyadapt.speech.clips import Clip, Parts
from polyadapt.speech.data import SpeechData
from polyadapt.speech.task import SpeechRecognition
from polyadapt.speech.words import Normaliser, count

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
JFK = (
    "And so my fellow Americans, ask not what your country can do for you,"
    " ask what you can do for your country."
)
BATCH = 8

Errors = dict[str, tuple[int, int]]
"""Clip -> (edits, words of the reference)."""


@dataclass(frozen=True)
class Method:
    """A recipe and its learning rate, chosen beforehand, not on these speakers."""

    recipe: Recipe
    lr: float


METHODS = {
    "LoRA": Method(LoRA(rank=8), 1e-3),
    "S2LoRA": Method(S2LoRA(rank=32), 5e-3),
    "AdaLoRA": Method(AdaLoRA(rank=8, initial_rank=12), 3e-3),
    "BitFit": Method(BitFit(), 1e-3),
    "FullFineTuning": Method(FullFineTuning(), 1e-5),
}


class Digits:
    """The clips of the zip by speaker, decoded when they are first heard."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".wav"))
            self.files = {Path(name).stem: file.read(name) for name in names}

    @cached_property
    def speakers(self) -> list[str]:
        return sorted({name.split("_")[1] for name in self.files})

    @cached_property
    def clips(self) -> list[Clip]:
        made = []
        for name, content in self.files.items():
            digit, speaker, _ = name.split("_")
            audio = _decoded(content)
            seconds = len(audio) / 16_000
            hear, lasts = partial(_same, audio), partial(_lasts, seconds)
            made.append(Clip(name, DIGITS[int(digit)], hear, lasts, speaker))
        return made

    def fold(self, number: int) -> tuple[list[Clip], list[Clip]]:
        """(training, test): two of the speakers are held out."""
        held = self.speakers[2 * number : 2 * number + 2]
        return (
            [clip for clip in self.clips if clip.speaker not in held],
            [clip for clip in self.clips if clip.speaker in held],
        )


def _decoded(content: bytes) -> Tensor:
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    return torch.from_numpy(soxr.resample(samples, rate, 16_000))


def _same(audio: Tensor) -> Tensor:
    return audio


def _lasts(seconds: float) -> float:
    return seconds


class Given(SpeechData):
    """Clips that are there already."""

    def __init__(self, parts: Parts, seed: int) -> None:
        super().__init__(batch_size=BATCH, val_share=0.0, seed=seed)
        self.given = parts

    def read(self) -> Parts:
        return self.given


def trained(method: str, train: Sequence[Clip], seed: int, asked: argparse.Namespace) -> Any:
    """A task after `steps` optimiser steps."""
    how = METHODS[method]
    task = recogniser(how.recipe, asked.seconds, lr=how.lr, seed=seed)
    trainer = Trainer(
        max_steps=asked.steps,
        max_epochs=-1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=Given({"train": train, "val": [], "test": []}, seed))
    return task


def recogniser(recipe: Recipe, seconds: float, **training: Any) -> SpeechRecognition:
    """Whisper tiny.en with a set; digits are scored one by one."""
    return SpeechRecognition(
        OfflineTinyEn(),
        recipe,
        seconds=seconds,
        normaliser=Normaliser(digits=True),
        longest=24,  # a digit is one or two tokens: what runs on is wrong anyway
        weight_decay=0.01,
        **training,
    )


def heard(task: SpeechRecognition, clips: Sequence[Clip]) -> Errors:
    """Errors on clips in the context of the task."""
    data = Given({"train": clips, "val": [], "test": clips}, seed=0)
    data.wants = task.wants
    data.setup()
    found: Errors = {}
    for batch in data.test_dataloader():
        with torch.no_grad():
            states = task.speech.encode(batch.mel)
        results = task.speech.decode_states(states, task.asked)
        for name, text, said in zip(batch.names, batch.texts, results, strict=True):
            counts = count(said.text, text, task.normaliser)
            found[name] = counts.edits, counts.words
    return found


def at_30_seconds(task: SpeechRecognition, spoken: Mapping[str, Tensor]) -> Errors:
    """Errors on sentences (the keys), in the context that Whisper was made for."""
    found: Errors = {}
    texts = list(spoken)
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for text, said in zip(
            batch, task.speech.decode(log_mel([spoken[t] for t in batch])), strict=True
        ):
            counts = count(said.text, text, Normaliser())
            found[text] = counts.edits, counts.words
    return found


def run(
    method: str,
    fold: int,
    seed: int,
    digits: Digits,
    spoken: Mapping[str, Tensor],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    """One record: a method on a fold with a seed."""
    train, test = digits.fold(fold)
    start = time.perf_counter()
    if method == "frozen":
        task = recogniser(HeadOnly(), LONGEST)
    else:
        task = trained(method, train, seed, asked)
    seconds = time.perf_counter() - start
    task.eval()
    return {
        "method": method,
        "fold": fold,
        "seed": seed,
        "steps": 0 if method == "frozen" else asked.steps,
        "context": task.wants.seconds,
        "trainable": task.adapters.trainable_count(),
        "live": _live(task),
        "training_seconds": round(seconds, 1),
        "digits": heard(task, test),
        "sentences": at_30_seconds(task, spoken),
    }


def _live(task: SpeechRecognition) -> int | None:
    """Coefficients of S2-LoRA that are not zero."""
    own = task.adapters.adapters.values()
    ranks = [a.rank() for a in own if isinstance(a, S2LoRAAdapter)]
    return sum(ranks) if ranks else None


def spoken_sentences(number: int, jfk: Path | None, kept: Path) -> dict[str, Tensor]:
    """Text -> speech: eSpeak's voices in turn, and the recording.

    eSpeak says a sentence a little differently in each process: the file `kept` is what all hear.
    """
    texts = sentences(number)
    if not kept.exists():
        made = {str(i): say(text, VOICES[i % len(VOICES)]) for i, text in enumerate(texts)}
        container.write(kept, {"kind": "speech", "texts": texts}, made)
    about, sounds = container.read(kept)
    if about["texts"] != texts:
        raise SystemExit(f"{kept} holds {len(about['texts'])} sentences, not {number}: remove it")
    spoken = {text: sounds[str(i)] for i, text in enumerate(texts)}
    return spoken | ({} if jfk is None else {JFK: read_audio(jfk)})


# The command


def points(asked: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(method, fold, seed); the frozen Whisper has no seed, and forgets nothing per fold."""
    for fold in asked.folds:
        yield "frozen", fold, 0
        for seed in asked.seeds:
            yield from ((method, fold, seed) for method in asked.methods)


def main() -> None:
    """Run what is not in the file yet, then print the table of all that is."""
    asked = _parser().parse_args()
    one_thread()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    digits, kept = Digits(asked.data), asked.out.with_suffix(".safetensors")
    spoken = spoken_sentences(asked.sentences, asked.jfk, kept)
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(r["method"], r["fold"], r["seed"]) for r in records}
    for method, fold, seed in points(asked):
        if (method, fold, seed) in done:
            continue
        found = run(method, fold, seed, digits, spoken, asked)
        with asked.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        records.append(json.loads(json.dumps(found)))
        print(
            f"{method}, fold {fold}, seed {seed}: {cell(averaged([found], 'digits'))} % on digits,"
            f" {found['training_seconds']:.0f} s of training",
            flush=True,
        )
    print(f"\n{table(records, ('frozen', *METHODS), JFK)}\n\n{machine()}")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    return names


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks on digits share."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    add = made.add_argument
    add("data", type=Path, help="a zip of digit_speaker_index.wav files")
    add("--methods", type=_names, default=list(METHODS), help=",".join(METHODS))
    add("--folds", type=_numbers, default=[0, 1, 2])
    add("--seeds", type=_numbers, default=[0, 1, 2])
    add("--steps", type=int, default=300, help="of every set")
    add("--seconds", type=float, default=1.4, help="the context of training and scoring")
    return made


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--jfk", type=Path, help="the recording of Kennedy's sentence")
    made.add_argument("--sentences", type=int, default=60)
    made.add_argument("--out", type=Path, default=Path("speech_digits.jsonl"))
    return made


if __name__ == "__main__":
    main()
