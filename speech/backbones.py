"""Frozen Whispers as plain settings that can build them again, on this machine or another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..core.errors import AdaptError
from .names import LAYOUTS, Layout
from .offline import whisper_tiny_en


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Settings that name one Whisper exactly; they travel in the adapter file as JSON.

    >>> Backbone.from_json(OfflineTinyEn().to_json())
    OfflineTinyEn(layout='openai')
    """

    def build(self) -> nn.Module:
        """The model, in float32, on the CPU, in eval mode; `speech_of` takes it."""
        raise AdaptError(f"Backbone is abstract: choose {', '.join(BACKBONES)}")

    def to_json(self) -> dict[str, Any]:
        """The kind of backbone and its settings as JSON values."""
        return {"backbone": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: object) -> Backbone:
        """The settings that `to_json` wrote; an unknown kind or setting is refused by name."""
        if not isinstance(data, Mapping) or data.get("backbone") not in BACKBONES:
            raise AdaptError(
                f"{data!r} names no backbone of polyadapt speech; there are {', '.join(BACKBONES)}"
            )
        settings = {str(key): value for key, value in data.items() if key != "backbone"}
        kind = BACKBONES[data["backbone"]]
        known = {f.name for f in dataclasses.fields(kind)}
        if settings.keys() != known:
            odd = sorted(settings.keys() ^ known)
            raise AdaptError(f"{kind.__name__} has the settings {sorted(known)}: see {odd[0]!r}")
        if wrong := [key for key, value in settings.items() if not isinstance(value, str)]:
            raise AdaptError(f"{kind.__name__}: {wrong[0]} is a text, not {settings[wrong[0]]!r}")
        return kind(**settings)


@dataclass(frozen=True, kw_only=True)
class OpenAIWhisper(Backbone):
    """openai-whisper's model by its name (tiny.en, base, small, medium, large-v3, turbo) or file.

    Raises `AdaptError` for an unknown name, and for weights that cannot be fetched.
    """

    name: str

    def build(self) -> nn.Module:
        import whisper

        try:
            model: nn.Module = whisper.load_model(self.name, device="cpu")
        except (RuntimeError, OSError, LookupError, EOFError, UnpicklingError) as error:
            # URLError and HTTPError are OSErrors; a broken or unknown file raises the others.
            raise AdaptError(_unfetched("openai-whisper", self.name, error)) from error
        model.eval()
        return model


@dataclass(frozen=True, kw_only=True)
class TransformersWhisper(Backbone):
    """transformers' Whisper by its name on the hub (openai/whisper-small) or its folder."""

    name: str

    def build(self) -> nn.Module:
        from transformers import WhisperForConditionalGeneration

        try:
            model = WhisperForConditionalGeneration.from_pretrained(self.name, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise AdaptError(_unfetched("transformers", self.name, error)) from error
        model.eval()
        return model


@dataclass(frozen=True, kw_only=True)
class OfflineTinyEn(Backbone):
    """Whisper tiny.en from the wheel that a package index brings, in either layout."""

    layout: Layout = "openai"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise AdaptError(f"layout {self.layout!r} is unknown: allowed are {', '.join(LAYOUTS)}")

    def build(self) -> nn.Module:
        model = whisper_tiny_en()
        if self.layout == "openai":
            found: nn.Module = model.eval()
            return found
        from .convert import as_transformers

        made: nn.Module = as_transformers(model).eval()
        return made


BACKBONES: dict[str, type[Backbone]] = {
    kind.__name__: kind for kind in (OpenAIWhisper, TransformersWhisper, OfflineTinyEn)
}


def _unfetched(source: str, name: str, error: Exception) -> str:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{source} cannot load Whisper {name!r}: {cause.rstrip('.')}. Without a network, give a"
        " local file or folder, or use OfflineTinyEn"
    )
