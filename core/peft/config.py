"""PEFT's `adapter_config.json`: every field is understood, without effect, or refused by name.

Facts of peft 0.21.2, whose `LoraConfig` and `AdaLoraConfig` these are.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ("LORA", "ADALORA")
MOST = 10**300
"""Of a rank or a number of steps: JSON's whole numbers have no end, those that a float holds do."""

# Names and versions, how start values were drawn (the file's tensors replace them), how a GPU is
# used, how W0 is stored (PEFT corrects it by the layer's class), and qalora's size without qalora.
NO_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "task_type"),
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    )
)
UNDERSTOOD = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "modules_to_save",
    )
)
OF_METHOD = {
    "LORA": frozenset(("alpha_pattern", "use_dora", "use_rslora")),
    "ADALORA": frozenset(
        (
            *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal"),
            *("tinit", "total_step"),
        )
    ),
}
# Each changes numbers in a way that we have no form for. What is neutral: none, false, empty.
REFUSED = frozenset(
    (
        *("alora_invocation_tokens", "arrow_config", "bias", "ensure_weight_tying", "kasa_config"),
        *("layer_replication", "lora_bias", "megatron_config", "monteclora_config"),
        *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
        "velora_config",
    )
)
# Start values that leave W0 as it is; pissa, olora, corda, loftq, lora_ga and mica do not.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says, checked."""

    peft_type: str
    rank: int
    alpha: float
    dropout: float
    rank_stabilised: bool
    dora: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, float]
    target: Sequence[str] | str
    exclude: Sequence[str] | str
    layers: Sequence[int]
    layers_pattern: Sequence[str]
    saved_modules: Sequence[str]
    fields: Mapping[str, Any]
    """The file as it is."""

    @property
    def factors(self) -> str:
        """The tensors of a layer, a letter each."""
        if self.peft_type == "ADALORA":
            return "ABE"
        return "ABm" if self.dora else "AB"

    def labels(self) -> dict[str, str]:
        """What the folder says about its origin and a writer gives back."""
        found = {key: self.fields.get(key) for key in ("base_model_name_or_path", "task_type")}
        return {k: v for k, v in found.items() if isinstance(v, str) and v and v.isprintable()}


def read_config(folder: Path) -> PeftConfig:
    """The folder's config; a field that changes numbers and has no form here is refused by name."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise StoreError(f"there is no PEFT folder {folder}")
    if not path.is_file():
        raise StoreError(f"{folder} has no {CONFIG}: it is not a PEFT folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read as JSON: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise StoreError(f"{path} is {type(fields).__name__}, not an object of settings")
    try:
        return _checked(fields)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _checked(fields: dict[str, Any]) -> PeftConfig:
    peft_type = fields.get("peft_type")
    if peft_type not in METHODS:
        raise StoreError(f"peft_type is {_short(peft_type)}; allowed: {' and '.join(METHODS)}")
    _refuse_unknown(fields, peft_type)
    adalora = peft_type == "ADALORA"
    return PeftConfig(
        peft_type=peft_type,
        rank=_whole(fields, "init_r", 12) if adalora else _whole(fields, "r", 8),
        alpha=_number(fields, "lora_alpha", 8),
        dropout=_number(fields, "lora_dropout", 0.0),
        rank_stabilised=_flag(fields, "use_rslora"),
        dora=_flag(fields, "use_dora"),
        rank_pattern=_mapping(fields, "rank_pattern"),
        alpha_pattern=_numbers(fields, "alpha_pattern"),
        target=_names(fields, "target_modules"),
        exclude=_names(fields, "exclude_modules"),
        layers=_layers(fields),
        layers_pattern=_listed(fields, "layers_pattern"),
        saved_modules=_listed(fields, "modules_to_save"),
        fields=fields,
    )


def is_neutral(value: object) -> bool:
    """None, false and what is empty: as good as not there."""
    return value is None or value is False or value in ("", [], {})


def _refuse_unknown(fields: Mapping[str, Any], peft_type: str) -> None:
    allowed = NO_EFFECT | UNDERSTOOD | OF_METHOD[peft_type]
    for key, value in sorted(fields.items()):
        if key in allowed or is_neutral(value) or (key == "bias" and value == "none"):
            continue
        why = "has no form here" if key in REFUSED else f"is no setting of {peft_type} that we know"
        raise StoreError(f"{_short(key)}: {_short(value)} {why}; allowed: null or false")
    start = fields.get("init_lora_weights", True)
    if not any(type(start) is type(known) and start == known for known in _HARMLESS_STARTS):
        raise StoreError(
            f"init_lora_weights is {_short(start)}, which may change the frozen weights; allowed:"
            f" {', '.join(map(str, _HARMLESS_STARTS))} (PEFT can save the set as a plain LoRA)"
        )


def _wrong(key: str, value: object, allowed: str) -> StoreError:
    return StoreError(f"{key} is {_short(value)}; allowed: {allowed}")


def _short(value: object) -> str:
    return reprlib.repr(value)


def _whole(fields: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    value = fields.get(key, default)
    if type(value) is not int or not least <= value <= MOST:
        raise _wrong(key, value, f"a whole number from {least} to {MOST:.0e}")
    return value


def _number(fields: Mapping[str, Any], key: str, default: float) -> float:
    return as_number(key, fields.get(key, default))


def as_number(key: str, value: object) -> float:
    """A finite float; whole numbers that no float can hold are refused like any other value."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # type: ignore[operator]
        raise _wrong(key, value, "a finite number")
    return float(value)  # type: ignore[arg-type]


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and type(value) is not bool:
        raise _wrong(key, value, "true or false")
    return bool(value)


def _mapping(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = {} if is_neutral(fields.get(key)) else fields[key]
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return value


def _numbers(fields: Mapping[str, Any], key: str) -> dict[str, float]:
    return {name: as_number(key, value) for name, value in _mapping(fields, key).items()}


def _names(fields: Mapping[str, Any], key: str) -> list[str] | str:
    value = [] if is_neutral(fields.get(key)) else fields[key]
    if not isinstance(value, str | list) or not all(isinstance(name, str) for name in value):
        raise _wrong(key, value, "a list of names, or one regular expression")
    return value


def _listed(fields: Mapping[str, Any], key: str) -> list[str]:
    names = _names(fields, key)
    return [names] if isinstance(names, str) else names


def _layers(fields: Mapping[str, Any]) -> list[int]:
    value = fields.get("layers_to_transform")
    numbers = [value] if type(value) is int else [] if is_neutral(value) else value
    if fields.get("layers_pattern") and not numbers:
        raise _wrong("layers_pattern", fields["layers_pattern"], "null without layers_to_transform")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise _wrong("layers_to_transform", value, "a whole number or a list of them")
    return numbers


@dataclass(frozen=True)
class Schedule:
    """AdaLoRA's budget and penalty, under our names."""

    rank: int
    t_init: int
    t_final: int
    every: int
    beta1: float
    beta2: float
    orthogonality: float


def read_schedule(config: PeftConfig) -> Schedule:
    """The training settings of an AdaLoRA config."""
    fields = config.fields
    t_init, t_final = _whole(fields, "tinit", 0, 0), _whole(fields, "tfinal", 0, 0)
    if t_init + t_final >= _whole(fields, "total_step", 0):
        raise _wrong("total_step", fields["total_step"], f"more than {t_init} + {t_final}")
    return Schedule(
        rank=min(_whole(fields, "target_r", 8), config.rank),
        t_init=t_init,
        t_final=t_final,
        every=_whole(fields, "deltaT", 1),
        beta1=_number(fields, "beta1", 0.85),
        beta2=_number(fields, "beta2", 0.85),
        orthogonality=_number(fields, "orth_reg_weight", 0.5),
    )


def divisor(rank: int, rank_stabilised: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if rank_stabilised else rank
