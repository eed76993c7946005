"""The table of `speech_digits`: a row per method, with intervals.

Rates are in per cent. Intervals (95 %) are bootstraps over clips or sentences, whose errors are
averaged over folds and seeds; differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def interval(
    edits: np.ndarray[Any, Any], words: np.ndarray[Any, Any]
) -> tuple[float, float, float]:
    """(value, low, high) of 100 sum(edits) / sum(words), resampling both together."""
    draws = np.random.default_rng(0).integers(0, len(words), (2000, len(words)))
    rates = 100 * edits[draws].sum(1) / words[draws].sum(1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(100 * edits.sum() / words.sum()), float(low), float(high)


def averaged(records: Sequence[Mapping[str, Any]], part: str) -> dict[str, tuple[float, int]]:
    """Clip -> (edits, mean over the records that hold it; words)."""
    sums: dict[str, list[int]] = {}
    words: dict[str, int] = {}
    for record in records:
        for name, (edits, length) in record[part].items():
            sums.setdefault(name, []).append(edits)
            words[name] = length
    return {name: (float(np.mean(values)), words[name]) for name, values in sums.items()}


def cell(
    found: Mapping[str, tuple[float, int]], base: Mapping[str, tuple[float, int]] | None = None
) -> str:
    """A rate with its interval; or its difference to `base` on the same clips."""
    names = [name for name in found if found[name][1] and (base is None or name in base)]
    if not names:
        return "-"
    edits = np.array([found[n][0] - (base[n][0] if base else 0.0) for n in names])
    value, low, high = interval(edits, np.array([found[n][1] for n in names]))
    return (
        f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
        if base
        else f"{value:.2f} ({low:.2f} to {high:.2f})"
    )


def table(records: Sequence[Mapping[str, Any]], methods: Sequence[str], recording: str) -> str:
    """A row per method, over all its folds and seeds; `recording`: the text of the real one."""
    by_method = {m: [r for r in records if r["method"] == m] for m in methods}
    digits = {m: averaged(found, "digits") for m, found in by_method.items() if found}
    words = {m: averaged(found, "sentences") for m, found in by_method.items() if found}
    lines = [
        "| method | trained | folds x seeds | WER % on digits | less LoRA's | per seed |"
        " WER % of sentences at 30 s | less frozen's | jfk % |",
        "| --- " * 9 + "|",
    ]
    for method in digits:
        mine = by_method[method]
        live = [r["live"] for r in mine if r["live"] is not None]
        count_ = f"{mine[0]['trainable']:,}" + (f" ({np.mean(live):.0f} live)" if live else "")
        plain = {text: value for text, value in words[method].items() if text != recording}
        cells = [
            *(method, count_, _runs(mine), cell(digits[method])),
            *(_against(digits, method, "LoRA"), _per_seed(mine), cell(plain)),
            *(_against(words, method, "frozen"), _rate(words[method].get(recording))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(found: Mapping[str, Mapping[str, tuple[float, int]]], method: str, base: str) -> str:
    return cell(found[method], found[base]) if base in found and base != method else "-"


def _runs(records: Sequence[Mapping[str, Any]]) -> str:
    folds, seeds = ({record[key] for record in records} for key in ("fold", "seed"))
    return f"{len(folds)} x {len(seeds)}"


def _per_seed(records: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({record["seed"] for record in records})
    rates = []
    for seed in seeds:
        found = averaged([r for r in records if r["seed"] == seed], "digits").values()
        rates.append(100 * sum(e for e, _ in found) / sum(w for _, w in found))
    return " ".join(f"{rate:.2f}" for rate in rates)


def _rate(found: tuple[float, int] | None) -> str:
    return "-" if found is None else f"{100 * found[0] / found[1]:.1f}"
