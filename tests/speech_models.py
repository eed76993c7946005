"""Whispers of both classes at tiny random size: two and two blocks of width 64."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn
from whisper.model import ModelDimensions, Whisper

from polyadapt.speech.convert import as_transformers
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.names import Layout

ENGLISH, MULTILINGUAL = 51864, 51865


def tiny_whisper(n_vocab: int = ENGLISH, seed: int = 0) -> Whisper:
    """openai-whisper's class with full contexts (3000 frames, 448 tokens) and random weights."""
    dims = ModelDimensions(80, 1500, 64, 2, 2, n_vocab, 448, 64, 2, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Whisper(dims).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
            elif "embedding" in name:
                parameter.normal_(std=0.25)
    return model


def tiny_speech(layout: Layout = "openai", n_vocab: int = ENGLISH, seed: int = 0) -> Speech:
    """The same random weights in either layout."""
    return speech_of(copy.deepcopy(_made(layout, n_vocab, seed)))


@cache
def _made(layout: Layout, n_vocab: int, seed: int) -> nn.Module:
    model = tiny_whisper(n_vocab, seed)
    made: nn.Module = as_transformers(model) if layout == "transformers" else model
    return made.requires_grad_(False)
