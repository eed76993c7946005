"""Speech of known text from eSpeak NG, through the library that the wheel espeakng-loader brings.

eSpeak NG is GPL-3: nothing of the package uses it, only benchmarks and tests do.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

VOICES = ("en-us", "en", "en-us+f2", "en+m3", "en-us+m1", "en+f4")
_RATE = 1  # espeakRATE: words per minute
_RETRIEVE, _CHARACTERS, _UTF8 = 1, 1, 1

_WHO = ("The old teacher", "A young doctor", "My neighbour", "The small dog", "Our captain")
_DID = ("walked slowly to", "looked carefully at", "was waiting near", "had forgotten about")
_WHAT = ("the wooden bridge", "a green garden", "the railway station", "the yellow boat")
_WHEN = ("in the morning", "after the storm", "before dinner", "last winter")


def sentences(count: int) -> list[str]:
    """The first of 320 plain English sentences, varied in all their parts.

    >>> sentences(2)
    ['The old teacher walked slowly to the wooden bridge in the morning.', \
'A young doctor looked carefully at a green garden after the storm.']
    """
    every = list(itertools.product(_WHO, _DID, _WHAT, _WHEN))
    # Steps that share no factor with the length: each sentence once, its parts all moving.
    step = 64 + 16 + 4 + 1
    chosen = [every[(i * step + i // 64) % len(every)] for i in range(count)]
    return [f"{' '.join(parts)}." for parts in chosen]


def say(text: str, voice: str = "en-us", words_per_minute: int = 160) -> Tensor:
    """A text -> its samples [n], 16 kHz, fp32, from -1 to 1."""
    library, rate, heard = _library()
    heard.clear()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice!r}")
    library.espeak_SetParameter(_RATE, words_per_minute, 0)
    content = text.encode()
    library.espeak_Synth(content, len(content) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.frombuffer(b"".join(heard), dtype=np.int16).astype(np.float32) / 32768
    return torch.from_numpy(soxr.resample(samples, rate, 16_000))


@cache
def _library() -> tuple[Any, int, list[bytes]]:
    """The library, its sampling rate, and the list that it puts samples into."""
    import espeakng_loader

    library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )
    heard: list[bytes] = []

    def keep(samples: Any, count: int, _: Any) -> int:
        if count > 0:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = kind(keep)
    rate = library.espeak_Initialize(_RETRIEVE, 0, espeakng_loader.get_data_path().encode(), 0)
    library.espeak_SetSynthCallback(callback)
    library.kept_alive = callback
    return library, int(rate), heard
