"""Bundles for tests: a tiny random Whisper with LoRA sets, and a selector that hears by rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

from polyadapt.core import AdapterSet, LoRA, attach
from polyadapt.speech.audio import SAMPLE_RATE
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.bundle_record import Hearing
from polyadapt.speech.decision import NONE, Costs, Decision, Interval, Scenario
from polyadapt.speech.model import Speech
from polyadapt.speech.names import sites_for
from polyadapt.speech.scenes import seeded, synthetic_scenes
from polyadapt.speech.selector import Selector
from polyadapt.speech.selector_training import examples, train
from polyadapt.speech.synthetic import speech_like
from polyadapt.tests.saved_sets import wake
from polyadapt.tests.speech_models import tiny_speech

CLASSES = ("white", "side")
LABELS = {"hiss": Scenario("white"), "voice": Scenario("side"), "general": Scenario()}
COLUMNS = (Scenario("white"), Scenario("side"))
WER = {NONE: (90.0, 80.0), "hiss": (20.0, 95.0), "voice": (70.0, 25.0), "general": (30.0, 40.0)}
COSTS = Costs(tuple(WER), COLUMNS, tuple(WER.values()), "general")
GAIN = Interval(4.0, 1.5, 6.5)


def lora(speech: Speech, name: str, seed: int = 0, rank: int = 2) -> AdapterSet:
    """A set with trained-looking numbers of its own."""
    made = attach(
        speech.model,
        LoRA(rank=rank),
        sites_for(speech.layout),
        name,
        generator=Generator().manual_seed(seed),
    )
    made.extra = {"task": "speech-recognition", "label": {"category": name}}
    with torch.no_grad():
        for parameter in wake(made).parameters():
            parameter.mul_(1 + seed)
    made.freeze()
    return made


@cache
def trained_selector() -> Selector:
    """White noise from a second voice: learnt in seconds."""
    torch.manual_seed(0)
    clips = [speech_like(16_000, seeded(i)) / 10 for i in range(8)]
    data = examples(synthetic_scenes(CLASSES, (0.0,)), clips, 48, seconds=0.8)
    selector = Selector(CLASSES)
    train(selector, data, steps=60, batch_size=8)
    return selector


def decision(gain: Interval | None = GAIN, threshold: float = 0.0) -> Decision:
    return Decision(COSTS, CLASSES, sigma=3.0, threshold=threshold, gain=gain)


def bundle(folder: Path, selector: Selector | None = None) -> Bundle:
    """Three sets, and with a selector all that choosing needs."""
    speech = tiny_speech()
    sets = {name: lora(speech, name, seed) for seed, name in enumerate(LABELS)}
    chosen = None if selector is None else decision()
    return create(folder, sets, LABELS, selector, chosen, Hearing(split_seed=7))


def noisy(kind: str, seconds: float = 1.0) -> Tensor:
    """A voice of its own with one kind of noise at 0 dB."""
    clip = speech_like(int(seconds * SAMPLE_RATE), seeded("test clip")) / 10
    return synthetic_scenes((kind,), (0.0,))[kind].draw(clip, seeded("noise", kind))[0]
