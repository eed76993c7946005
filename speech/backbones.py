"""The Whispers that a configuration can name."""

from __future__ import annotations

from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from torch import nn

from ..core import backbone as core
from ..core.errors import AdaptError
from .names import LAYOUTS, Layout
from .offline import whisper_tiny_en


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """A Whisper, in float32, on the CPU, in eval mode; `speech_of` takes it.

    >>> Backbone.from_json(OfflineTinyEn().to_json())
    OfflineTinyEn(layout='openai')
    """


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


def _unfetched(source: str, name: str, error: Exception) -> str:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{source} cannot load Whisper {name!r}: {cause.rstrip('.')}. Without a network, give a"
        " local file or folder, or use OfflineTinyEn"
    )
