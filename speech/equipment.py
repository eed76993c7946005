"""What a bundle chooses by, made from its sets and from clips: selector, cost matrix, gain.

The selector is trained on the training clips, in the noise that the sets are for. Its temperature,
the matrix and the gain are measured on the validation clips, in validation noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.errors import AdaptError
from ..core.sets import switch
from .adapters import load_set
from .audio import frames_of
from .bundle_record import Hearing
from .clips import Clip
from .data import SpeechData, Wants
from .decision import NONE, Decision, Scenario
from .description import Description, describe
from .ears import built
from .mixtures import Mixture, grid
from .model import Speech
from .noise import CLEAN
from .purpose import Purpose, levels, noise_for, scenarios
from .scenes import Scene
from .selector import Selector
from .selector_training import Measured, examples, measure, train
from .tokens import Prompt
from .trial import Trial, tried
from .validation import costs_of, gain_of
from .words import count

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a bundle's equipment is made.

    `general`: the set that unknown or unsure sound falls back to. `noise_folder`: recordings in
    place of generated noise. `clean`: speech without noise is a scenario, too. `threshold`: see
    `Decision`. `limit`: so many validation clips at most. `steps`, `seconds`: of the selector's
    training, and its clips' length. `seed` is for all that is drawn but the division of speakers
    and recordings, which is the data's.
    """

    general: str = NONE
    noise_folder: str | None = None
    clean: bool = False
    threshold: float = 0.0
    limit: int | None = None
    steps: int = 400
    seconds: float = 3.0
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        frames_of(self.seconds)
        if not 0 <= self.threshold <= 1:
            raise AdaptError(f"threshold {self.threshold} is not allowed: from 0 to 1")


@dataclass(frozen=True)
class Equipment:
    """For `Bundle.equip`, and what the selector found on validation examples."""

    selector: Selector
    decision: Decision
    hearing: Hearing
    measured: Measured


def equipment(
    files: Mapping[str, Path],
    purposes: Mapping[str, Purpose],
    data: SpeechData,
    how: Making | None = None,
    told: Told = print,
) -> Equipment:
    """Train the selector and measure what every set costs; nothing is written.

    `files` and `purposes` are those of each set by its name. Noise that `data` itself would add is
    left out. Raises `AdaptError` for sets that do not go together and clips that are too few.
    """
    how = how or Making()
    abouts = _described(files, how.general)
    noise = noise_for(purposes.values(), how.noise_folder)
    speech = built(next(iter(abouts.values())).backbone)
    for name, file in files.items():
        load_set(speech, file, name).to(speech.device)
    switch(speech.model, None)
    parts = _clips(data, speech, abouts, how.limit)
    noise.require_speakers(parts)
    scenes = {part: noise.scenes(part, data.seed, clips) for part, clips in parts.items()}
    if how.clean or any(CLEAN in purpose.categories for purpose in purposes.values()):
        scenes = {part: {**found, CLEAN: Scene(CLEAN)} for part, found in scenes.items()}
    n_mels = speech.dims.n_mels
    selector, measured = _selector(scenes, parts, how, n_mels, told)
    told(_found(measured))
    hearing = Hearing(
        next(iter(purposes.values())).convention, measured.temperature, n_mels, data.seed
    )
    mixtures = grid(parts["val"], scenes["val"], levels(purposes.values()), ("grid", how.seed))
    told(_plan(mixtures, parts["val"], files))
    trial = tried(speech, abouts, mixtures, (selector, hearing), how.batch, told)
    columns = scenarios(selector.classes, purposes.values())
    decision = _decision(trial, columns, selector.classes, measured.snr_sigma, how)
    return Equipment(selector, decision, hearing, measured)


def _described(files: Mapping[str, Path], general: str) -> dict[str, Description]:
    """What the sets' files say, if error rates of all can be measured and compared."""
    if general not in (NONE, *files):
        raise AdaptError(
            f"the general set {general!r} is none of the sets: {', '.join((*files, NONE))}"
        )
    abouts = {name: describe(file) for name, file in files.items()}
    first, *_ = abouts
    for name, about in abouts.items():
        if about.filmed:
            raise AdaptError(
                f"set {name!r} is an audio-visual one: error rates with video are not measured here"
            )
        for what in ("language", "task", "normaliser"):
            one, other = getattr(abouts[first], what), getattr(about, what)
            if one != other:
                raise AdaptError(
                    f"sets {first!r} and {name!r} differ in {what}, {one} and {other}: their error "
                    "rates cannot be compared"
                )
    return abouts


def _clips(
    data: SpeechData, speech: Speech, abouts: Mapping[str, Description], limit: int | None
) -> dict[str, list[Clip]]:
    """Training clips, and validation clips in which a word is said, evenly thinned to the limit."""
    rule = next(iter(abouts.values()))
    prompt = Prompt(language=rule.language, task=rule.task, timestamps=rule.timestamps)
    context = min(about.seconds for about in abouts.values())
    data.noise, data.wants = None, Wants(speech.dims.n_mels, context, speech.tokens(prompt))
    data.setup()
    val = [
        clip
        for clip in data.clips("val").clips
        if count("", clip.text, rule.normaliser, rule.language).words
    ]
    val = val[:: -(-len(val) // limit)] if limit and val else val
    if len({clip.name for clip in val}) < 2:
        raise AdaptError(
            f"{len(val)} validation clips with words are too few to measure sets on: at least 2 "
            "(a manifest's column `split` says val)"
        )
    return {"train": list(data.clips("train").clips), "val": val}


def _selector(
    scenes: Mapping[str, Mapping[str, Scene]],
    parts: Mapping[str, list[Clip]],
    how: Making,
    n_mels: int,
    told: Told,
) -> tuple[Selector, Measured]:
    """Trained on four examples a step, so that each is seen eight times; and what it finds."""
    counts = {"train": 4 * how.steps, "val": max(how.steps, 2 * len(scenes["val"]))}
    said = ", ".join(scenes["train"])
    told(f"selector: {counts['train']} mixtures of {len(parts['train'])} clips with {said}")
    made = {
        part: examples(scenes[part], parts[part], number, how.seconds, how.seed, n_mels)
        for part, number in counts.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        selector = Selector(tuple(scenes["train"]))
    told(f"selector: {how.steps} steps")
    train(selector, made["train"], how.steps, seed=how.seed)
    return selector, measure(selector, made["val"])


def _found(measured: Measured) -> str:
    return (
        f"selector: {measured.accuracy:.1%} of {int(measured.confusion.sum())} validation mixtures"
        f" found, SNR off by {measured.snr_error:.1f} dB"
    )


def _plan(mixtures: list[Mixture], clips: list[Clip], files: Mapping[str, Path]) -> str:
    return (
        f"{len(mixtures)} mixtures of {len(clips)} validation clips are transcribed without a set"
        f" and with {', '.join(files)}"
    )


def _decision(
    trial: Trial,
    columns: tuple[Scenario, ...],
    classes: tuple[str, ...],
    sigma: float,
    how: Making,
) -> Decision:
    """The cost matrix of the trial, and what choosing by it gains in the same trial."""
    costs = costs_of(trial.errors, trial.words, trial.labels, columns, how.general)
    decision = Decision(costs, classes, sigma if costs.by_level else 0.0, how.threshold)
    chosen = [
        decision.fallback() if heard is None else decision.choose(*heard).name
        for heard in trial.heard
    ]
    gain = gain_of(costs, trial.errors, trial.words, chosen, trial.clips)
    return replace(decision, gain=gain)
