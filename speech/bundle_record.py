"""What `bundle.json` says: the base, the sets with their labels and digests, and how to choose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.container import write_atomically
from ..core.errors import AdaptError, StoreError
from .audio import HOP, SAMPLE_RATE
from .decision import Costs, Decision, Interval, Scenario
from .noise import FULL, Convention, convention_named

FORMAT = 1
INDEX, SELECTOR = "bundle.json", "selector.safetensors"


@dataclass(frozen=True)
class Hearing:
    """How the selector was trained and is to be used, besides its weights.

    `convention`: that of the SNRs it was trained on. `temperature`: the divisor of its logits.
    `split_seed`: that of the split of speakers and recordings, so that it can be repeated.
    """

    convention: Convention = FULL
    temperature: float = 1.0
    n_mels: int = 80
    split_seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < 1e6:
            raise AdaptError(f"a temperature of {self.temperature} is not allowed: above 0")

    def to_json(self) -> dict[str, Any]:
        mel = {"n_mels": self.n_mels, "sample_rate": SAMPLE_RATE, "hop": HOP}
        return {
            "snr_convention": str(self.convention),
            "temperature": self.temperature,
            "mel": mel,
            "split_seed": self.split_seed,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hearing:
        mel = value["mel"]
        if (mel["sample_rate"], mel["hop"]) != (SAMPLE_RATE, HOP):
            raise ValueError(f"mel {mel!r}")
        seed = value["split_seed"]
        return cls(
            convention_named(str(value["snr_convention"])),
            float(value["temperature"]),
            int(mel["n_mels"]),
            None if seed is None else int(seed),
        )


@dataclass(frozen=True)
class Entry:
    """A set of the bundle: the scenario that it is for, and the digest of its file."""

    label: Scenario
    sha256: str


@dataclass(frozen=True)
class Record:
    """The content of `bundle.json`.

    `weights`: frozen parameter (by openai-whisper's name) -> digest, over all sets. `backbone`:
    what the sets call their backbone.
    """

    weights: Mapping[str, str]
    backbone: Any
    sets: Mapping[str, Entry] = field(default_factory=dict)
    selector_sha256: str | None = None
    decision: Decision | None = None
    hearing: Hearing = Hearing()

    def label_hash(self) -> str:
        """Over the classes, the sets' labels, rows and columns: in their order, by their names."""
        if self.decision is None:
            return ""
        return label_hash({n: e.label for n, e in self.sets.items()}, self.decision)

    def write(self, folder: Path) -> None:
        """Replace the index of a bundle in one step."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        write_atomically(folder / INDEX, text.encode() + b"\n")

    def to_json(self) -> dict[str, Any]:
        sets = {
            name: {"label": entry.label.to_json(), "sha256": entry.sha256}
            for name, entry in self.sets.items()
        }
        return {
            "format": FORMAT,
            "base": {"backbone": self.backbone, "weights": dict(self.weights)},
            "sets": sets,
            "selector_sha256": self.selector_sha256,
            "decision": None if self.decision is None else _decision_to_json(self.decision),
            "hearing": self.hearing.to_json(),
        }


def read_record(folder: Path) -> Record:
    """The index of a bundle, checked; raises `StoreError` in one line."""
    path = folder / INDEX
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise StoreError(f"{folder} is no bundle: {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else None
        raise StoreError(f"{path} has format {found!r}; this version reads {FORMAT}")
    try:
        return _record(value)
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: it lacks or misstates {error}") from error


def _record(value: Mapping[str, Any]) -> Record:
    sets = {
        check_name(name): Entry(Scenario.from_json(entry["label"]), str(entry["sha256"]))
        for name, entry in value["sets"].items()
    }
    decision, selector = value["decision"], value["selector_sha256"]
    return Record(
        weights={str(k): str(v) for k, v in value["base"]["weights"].items()},
        backbone=value["base"]["backbone"],
        sets=sets,
        selector_sha256=None if selector is None else str(selector),
        decision=None if decision is None else _decision(decision),
        hearing=Hearing.from_json(value["hearing"]),
    )


def _decision_to_json(decision: Decision) -> dict[str, Any]:
    gain = decision.gain
    return {
        "classes": list(decision.classes),
        "sets": list(decision.costs.sets),
        "scenarios": [scenario.to_json() for scenario in decision.costs.scenarios],
        "wer": [list(row) for row in decision.costs.wer],
        "general": decision.costs.general,
        "sigma": decision.sigma,
        "threshold": decision.threshold,
        "gain": None if gain is None else [gain.value, gain.low, gain.high],
    }


def _decision(value: Mapping[str, Any]) -> Decision:
    costs = Costs(
        tuple(map(str, value["sets"])),
        tuple(map(Scenario.from_json, value["scenarios"])),
        tuple(tuple(map(float, row)) for row in value["wer"]),
        str(value["general"]),
    )
    gain = value["gain"]
    return Decision(
        costs,
        tuple(map(str, value["classes"])),
        float(value["sigma"]),
        float(value["threshold"]),
        None if gain is None else Interval(*map(float, gain)),
    )


def label_hash(labels: Mapping[str, Scenario], decision: Decision) -> str:
    """The hash that ties a selector to the names and the order of what it chooses from."""
    what = [
        list(decision.classes),
        {name: label.to_json() for name, label in labels.items()},
        list(decision.costs.sets),
        [scenario.to_json() for scenario in decision.costs.scenarios],
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def check_name(name: str) -> str:
    """A set's name is a file's name too, and none of the words that choose."""
    plain = name.replace("_", "").replace("-", "")
    if not (plain.isascii() and plain.isalnum()) or name.lower() in ("none", "auto", "selector"):
        raise AdaptError(
            f"a set of a bundle cannot be called {name!r}: letters, digits, _ and -, and not none, "
            "auto or selector"
        )
    return name


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
