"""The tables and pictures of `speech_noise`: ways of using adapter sets, by noise and by SNR.

WER is errors over words, pooled over folds, seeds and mixtures. Intervals (95 %) are paired
bootstraps over the spoken clips of all folds: a clip is drawn with all its mixtures and seeds; and
once more over speakers, of which there are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyadapt.benchmarks.speech_mixtures import CATEGORIES, SNRS, named
from polyadapt.speech.decision import NONE, Costs, Decision, Interval, Scenario
from polyadapt.speech.noise import Label
from polyadapt.speech.pictures import confusion_matrix, wer_heat_map
from polyadapt.speech.validation import costs_of, gain_of, paired_bootstrap

ALL, FROZEN, SELECTOR = "all", "frozen", "selector"
ORACLE, WRONG, WORST = "oracle", "always wrong: mean", "always wrong: costliest"
WAYS = (FROZEN, "one set for all", ORACLE, SELECTOR, WRONG, WORST)

Record = Mapping[str, Any]


@dataclass
class Heard:
    """Test mixtures with the sets of a method, in folds and with seeds: columns of one length."""

    folds: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    """The likeliest noise."""
    chosen: list[str] = field(default_factory=list)
    """The set with the least expected WER."""
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Set -> errors."""
    ways: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    """Way -> errors."""

    def wer(self, way: str, rows: Sequence[int]) -> float:
        """In per cent."""
        words = sum(self.words[i] for i in rows)
        return 100 * sum(self.ways[way][i] for i in rows) / words if words else float("nan")

    @property
    def speakers(self) -> list[str]:
        """Who says each."""
        return [clip.split("_")[1] for clip in self.clips]


def heard_with(records: Sequence[Record], method: str) -> Heard:
    """All folds and seeds that are complete."""
    made = Heard()
    for choices in (r for r in records if (r["method"], r["what"]) == (method, SELECTOR)):
        here = [r for r in records if r["fold"] == choices["fold"]]
        mine = [r for r in here if (r["method"], r["seed"]) == (method, choices["seed"])]
        sets = {r["what"]: r["test"] for r in here if r["method"] == FROZEN}
        sets |= {r["what"]: r["test"] for r in mine if r["what"] != SELECTOR}
        for name in choices["chosen"]:
            _take(made, name, sets, choices)
    return made


def _take(made: Heard, name: str, sets: Mapping[str, Any], choices: Record) -> None:
    """Add one mixture."""
    clip, label = named(name)
    found, chosen = choices["chosen"][name]
    errors = {of: tests[name][0] for of, tests in sets.items()}
    made.folds.append(choices["fold"])
    made.seeds.append(choices["seed"])
    made.clips.append(clip)
    made.labels.append(label)
    made.words.append(sets[NONE][name][1])
    made.found.append(found)
    made.chosen.append(chosen)
    for of, edits in errors.items():
        made.errors.setdefault(of, []).append(edits)
    costs, place = choices["costs"], CATEGORIES.index(label.category)
    others = [of for of in CATEGORIES if of != label.category]
    by_way = {
        FROZEN: errors[NONE],
        "one set for all": errors[ALL],
        ORACLE: errors[label.category],
        SELECTOR: errors[chosen],
        WRONG: sum(errors[of] for of in others) / len(others),
        WORST: errors[max(others, key=lambda of: costs[of][place])],
    }
    for way, edits in by_way.items():
        made.ways[way].append(edits)


def report(records: Sequence[Record], methods: Sequence[str], folder: Path) -> str:
    """Everything there is to say of these methods, in Markdown; pictures go into the folder."""
    parts = []
    for method in methods:
        made = heard_with(records, method)
        if made.clips:
            parts += [f"## {method}", *_told(made, method, folder)]
    return "\n\n".join(parts)


def _told(made: Heard, method: str, folder: Path) -> Iterator[str]:
    folds, seeds = len({*made.folds}), len({*made.seeds})
    yield (
        f"{len({*made.clips})} clips of {len({*made.speakers})} speakers, {len(made.clips):,}"
        f" mixtures heard; {folds} fold(s), {seeds} seed(s)"
    )
    yield by_noise(made)
    yield by_level(made)
    yield differences(made)
    yield selection(made)
    columns = [Scenario(category) for category in CATEGORIES]
    costs = costs_of(made.errors, made.words, made.labels, columns, ALL)
    yield _verdict(made, costs)
    picture = wer_heat_map(costs, f"{method}: test WER by set and noise")
    (folder / f"wer_{method}.png").write_bytes(picture)
    title = "Selector on test mixtures"
    (folder / "confusion.png").write_bytes(confusion_matrix(confusion(made), CATEGORIES, title))


def by_noise(made: Heard) -> str:
    """A row for each way: WER by noise, of all with its interval, by fold and by seed."""
    lines = [
        f"| WER % | {' | '.join(CATEGORIES)} | all noise | per fold | per seed |",
        "| --- " * (len(CATEGORIES) + 4) + "|",
    ]
    rows = range(len(made.clips))
    for way in WAYS:
        noise = [
            f"{made.wer(way, [i for i in rows if made.labels[i].category == c]):.1f}"
            for c in CATEGORIES
        ]
        zeros = [0.0] * len(made.words)
        whole = paired_bootstrap(made.ways[way], zeros, made.words, made.clips)
        spread = [_grouped(made, way, column) for column in (made.folds, made.seeds)]
        every = f"{whole.value:.1f} ({whole.low:.1f} to {whole.high:.1f})"
        lines.append("| " + " | ".join([way, *noise, every, *spread]) + " |")
    return "\n".join(lines)


def _grouped(made: Heard, way: str, column: Sequence[int]) -> str:
    places = [[i for i, c in enumerate(column) if c == value] for value in sorted({*column})]
    return " ".join(f"{made.wer(way, rows):.1f}" for rows in places)


def by_level(made: Heard) -> str:
    """A row for each way: WER by SNR."""
    lines = [
        f"| WER % | {' | '.join(f'{snr:g} dB' for snr in SNRS)} |",
        "| --- " * (len(SNRS) + 1) + "|",
    ]
    for way in WAYS:
        wers = [
            made.wer(way, [i for i, label in enumerate(made.labels) if label.snr_db == snr])
            for snr in SNRS
        ]
        lines.append(f"| {way} | {' | '.join(f'{wer:.1f}' for wer in wers)} |")
    return "\n".join(lines)


def differences(made: Heard) -> str:
    """The comparisons that the question is about, with paired intervals."""
    pairs = (
        ("one set for all", ORACLE, "above zero: sets for each noise are better"),
        ("one set for all", SELECTOR, "above zero: choosing is better"),
        (SELECTOR, ORACLE, "what the selector loses; target: at most 1"),
        (WRONG, "one set for all", "what a wrong set costs; target: clearly above zero"),
    )
    lines = ["| minus | | points over clips | over speakers | |", "| --- " * 5 + "|"]
    for first, second, meaning in pairs:
        clips, speakers = (
            paired_bootstrap(made.ways[first], made.ways[second], made.words, groups)
            for groups in (made.clips, made.speakers)
        )
        lines.append(f"| {first} | {second} | {_signed(clips)} | {_signed(speakers)} | {meaning} |")
    return "\n".join(lines)


def _signed(found: Interval) -> str:
    return f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def confusion(made: Heard) -> Tensor:
    """Counts [true, found] of the likeliest noise."""
    counts = torch.zeros(len(CATEGORIES), len(CATEGORIES), dtype=torch.int64)
    for label, found in zip(made.labels, made.found, strict=True):
        counts[CATEGORIES.index(label.category), CATEGORIES.index(found)] += 1
    return counts


def selection(made: Heard) -> str:
    """How well the noise is heard, and what was chosen."""
    counts = confusion(made)
    per_class = (100 * counts.diag() / counts.sum(1).clamp(min=1)).tolist()
    classes = ", ".join(f"{c} {p:.1f}" for c, p in zip(CATEGORIES, per_class, strict=True))
    rows = range(len(made.clips))
    true = sum(made.chosen[i] == made.labels[i].category for i in rows)
    taken = {name: made.chosen.count(name) for name in made.errors if name in made.chosen}
    return (
        f"selector accuracy {100 * float(counts.trace() / counts.sum()):.1f} % (target: over 90):"
        f" {classes}; the set of the true noise was chosen in {100 * true / len(rows):.1f} %;"
        f" chosen: {', '.join(f'{name} {count}' for name, count in taken.items())}"
    )


def _verdict(made: Heard, costs: Costs) -> str:
    """Whether choosing pays on the test mixtures: against the fixed set that is best there."""
    gain = gain_of(costs, made.errors, made.words, made.chosen, made.clips)
    return f"on the test mixtures, {Decision(costs, CATEGORIES, gain=gain).advice()}"
