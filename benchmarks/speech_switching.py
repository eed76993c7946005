"""Adapter sets of Whisper tiny.en: what switching between utterances and mixing in a batch cost.

Switching sets before an utterance against that utterance's encode, and a batch whose samples go
through four different sets against the same batch through one: its encode, and steps of its decode
with the key-value cache. LoRA of rank 8 on all attention, interleaved rounds.

Run: python benchmarks/speech_switching.py [--seconds 30] [--batch 8] [--tokens 24] [--rounds 7]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import Times, interleaved, machine, one_thread
from polyadapt.core import LoRA, activate, attach, stack, switch
from polyadapt.speech.audio import HOP, SAMPLE_RATE, log_mel
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.names import sites_for
from polyadapt.speech.offline import whisper_tiny_en
from polyadapt.speech.scenes import seeded
from polyadapt.speech.synthetic import speech_like

SETS = ("babble", "music", "white", "engine")
SWITCHES = 100

Context = Callable[[], AbstractContextManager[None]]


def with_sets() -> Speech:
    """Whisper with four frozen sets, not fresh ones: nothing is a product with zeros."""
    speech = speech_of(whisper_tiny_en().eval())
    for n, name in enumerate(SETS):
        generator = torch.Generator().manual_seed(n)
        adapters = attach(speech.model, LoRA(rank=8), list(sites_for(speech.layout)), name)
        for adapter in adapters.adapters.values():
            nn.init.normal_(adapter.get_parameter("B"), std=0.01, generator=generator)
        adapters.freeze()
    switch(speech.model, None)
    return speech


def switching(speech: Speech, mel: Tensor, rounds: int) -> Times:
    """Encoding one utterance, and changing the set so many times."""
    names = itertools.cycle(SETS)

    def switches() -> None:
        for _ in range(SWITCHES):
            switch(speech.model, next(names))

    def entered() -> None:
        for _ in range(SWITCHES):
            with activate(speech.model, next(names)):
                pass

    def encode() -> Tensor:
        with torch.no_grad(), activate(speech.model, SETS[0]):
            return speech.encode(mel)

    return interleaved({"encode": encode, "switch": switches, "activate": entered}, rounds)


def share(times: Times, name: str) -> str:
    """What one change costs, of an encode."""
    each = [ratio / SWITCHES for ratio in times.ratios(name, to="encode")]
    return (
        f"{name}: {100 * statistics.median(each):.3f} % of an encode"
        f" (spread {100 * min(each):.3f} to {100 * max(each):.3f}, {len(each)} rounds;"
        f" {1e6 * times.median(name) / SWITCHES:.0f} us against"
        f" {1e3 * times.median('encode'):.1f} ms)"
    )


def contexts(speech: Speech, batch: int) -> dict[str, Context]:
    """The ways for a batch to go through sets."""
    names = [SETS[n % len(SETS)] for n in range(batch)]
    served = stack(speech.model)
    rows = served.index(names)
    return {
        "one set": lambda: activate(speech.model, SETS[0]),
        "four sets": lambda: activate(speech.model, per_sample=names),
        "four sets, stacked": lambda: served.route(rows),
        "no set": nullcontext,
    }


def encoding(speech: Speech, mel: Tensor, context: Context) -> Callable[[], Tensor]:
    """Encoding a batch."""

    def call() -> Tensor:
        with torch.no_grad(), context():
            return speech.encode(mel)

    return call


def decoding(speech: Speech, states: Tensor, tokens: int, context: Context) -> Callable[[], Tensor]:
    """Decoding a batch for so many steps, whatever the sets would say: all do the same work."""
    prompt = torch.tensor(speech.tokens().prompt).expand(len(states), -1)
    drawn = torch.randint(0, 50_000, (len(states), tokens), generator=seeded("tokens"))
    said = torch.cat([prompt, drawn], 1)

    def call() -> Tensor:
        inference = speech.inference(prompt.shape[1])
        with torch.no_grad(), context():
            for end in range(prompt.shape[1], said.shape[1]):
                logits: Tensor = inference.logits(said[:, :end], states)
        inference.cleanup_caching()
        return logits

    return call


def report(title: str, calls: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    """The share of the throughput with one set that each way keeps."""
    times = interleaved(calls, rounds)
    print(f"\n{title}: share of the throughput with one set")
    for name in calls:
        if name != "one set":
            ratios = times.ratios("one set", to=name)
            print(
                f"  {name}: {statistics.median(ratios):.3f} (spread {min(ratios):.3f} to"
                f" {max(ratios):.3f}, {len(ratios)} rounds; {1e3 * times.median(name):.1f} ms"
                f" against {1e3 * times.median('one set'):.1f} ms)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="the context")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="steps of the decode")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    one_thread()
    speech = with_sets()
    length = int(asked.seconds * SAMPLE_RATE / HOP) * HOP
    clips = [speech_like(length, seeded("clip", n)) / 10 for n in range(asked.batch)]
    mel = log_mel(clips, speech.dims.n_mels, asked.seconds)
    print(machine("openai-whisper"))
    print(f"Whisper tiny.en, {asked.seconds:g} s, four sets of LoRA r8 on attention")
    print("\none utterance:")
    times = switching(speech, mel[:1], asked.rounds)
    print(f"  {share(times, 'switch')}\n  {share(times, 'activate')}", flush=True)
    ways = contexts(speech, asked.batch)
    encodes = {name: encoding(speech, mel, way) for name, way in ways.items()}
    report(f"encode of {asked.batch}", encodes, asked.rounds)
    states = encodes["one set"]()
    decodes = {name: decoding(speech, states, asked.tokens, way) for name, way in ways.items()}
    report(f"{asked.tokens} steps of decoding {asked.batch}", decodes, asked.rounds)


if __name__ == "__main__":
    main()
