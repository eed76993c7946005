"""The smallest configuration of every domain, and what becomes of it when it is changed."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from polyadapt.core.complaints import errors_in_one_line
from polyadapt.core.configuration import Domain, DomainCLI, Verb
from polyadapt.core.errors import AdaptError
from polyadapt.core.fitting import calm
from polyadapt.tests import speech_cases, vision_cases, vlm_cases

_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "width": 64, "heads": 1, "layers": 1},
}
_GPT2 = {"n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 1}


def _vision() -> dict[str, Any]:
    made = copy.deepcopy(vision_cases.configuration())
    made["data"]["init_args"]["augmentation"] = "flip"
    made["model"].update(lr=1e-3, warmup=0.1, weight_decay=0.05, set_name="pets")
    return made


def _vlm() -> dict[str, Any]:
    settings = {"name": "ViT-B-32", "pretrained": None, "options": copy.deepcopy(_CLIP)}
    backbone = {"class_path": "OpenCLIP", "init_args": settings}
    return vlm_cases.configuration(model__backbone=backbone)


def _timeseries() -> dict[str, Any]:
    settings = {"pretrained": False, "blocks": 1, "options": dict(_GPT2)}
    return {
        "monitor": "val_mse",
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "backbone": {"class_path": "GPT2", "init_args": settings},
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 4, "alpha": 16}},
            "aim": {"class_path": "Forecast", "init_args": {"horizon": 6}},
            "look_back": 24,
            "patches": {"length": 8, "stride": 4},
            "lr": 0.01,
        },
        "data": {
            "class_path": "TableData",
            "init_args": {"path": "table.csv", "time": "date", "batch_size": 32},
        },
    }


def _save_table() -> None:
    rows = ["date,load"]
    rows += [f"2024-01-{1 + h // 24:02} {h % 24:02}:00,{math.sin(h / 4):.4f}" for h in range(200)]
    Path("table.csv").write_text("\n".join(rows) + "\n")


def _save_speech() -> None:
    speech_cases.save_whisper()
    speech_cases.save_manifest()


@dataclass(frozen=True)
class Case:
    """A domain's smallest configuration, what it needs in a folder, and where any value may be."""

    domain: Callable[[], Domain]
    configuration: Callable[[], dict[str, Any]]
    save: Callable[[], None]
    options: tuple[str, ...]


def _domain(name: str) -> Callable[[], Domain]:
    def domain() -> Domain:
        found: Domain = import_module(f"polyadapt.{name}.configuration").DOMAIN
        return found

    return domain


_OPTIONS = ("model", "backbone", "init_args", "options")
_BAR = ("trainer", "callbacks", "init_args", "console_kwargs")
CASES = {
    "vision": Case(_domain("vision"), _vision, lambda: vision_cases.save_labelled(12), _OPTIONS),
    "vlm": Case(_domain("vlm"), _vlm, lambda: vision_cases.save_labelled(12), _OPTIONS),
    "speech": Case(_domain("speech"), speech_cases.configuration, _save_speech, _BAR),
    "timeseries": Case(_domain("timeseries"), _timeseries, _save_table, _OPTIONS),
}


def outcome(case: Case, text: str, *words: str, verb: Verb = "fit", build: bool = True) -> str:
    """`works`, or the one line that refuses it; nothing may be written before a run starts."""
    Path("c.yaml").write_text(text)
    before = sorted(os.listdir())
    try:
        with calm(), errors_in_one_line():
            DomainCLI(case.domain(), verb, ["--config", "c.yaml", *words], build=build)
    except AdaptError as error:
        line = str(error)
        assert line
        assert line.isprintable()
        return line
    finally:
        assert sorted(os.listdir()) == before
    return "works"


def with_value(case: Case, place: tuple[str, ...], value: Any) -> str:
    """The configuration with another value at a place, as YAML."""
    made = case.configuration()
    inner: Any = made
    for key in place[:-1]:
        if key == "callbacks":  # none is there
            inner[key] = {"class_path": "RichProgressBar"}
        inner = inner.setdefault(key, {})
    inner[place[-1]] = value
    return yaml.safe_dump(made)
