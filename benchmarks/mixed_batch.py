"""One batch, 32 sets: GPT-2 decoding one token for 32 samples, each through a set of its own.

Both sides are measured against their own single-set throughput, so that what a step costs by
itself drops out. Run: python benchmarks/mixed_batch.py [--sets 32] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import LoRA, activate, attach, stack

BATCH, CONTEXT, STEPS, RANK = 32, 16, 32, 8
LAYERS = ["h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj"]


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 small with random weights."""
    torch.manual_seed(0)
    model: GPT2LMHeadModel = GPT2LMHeadModel(GPT2Config()).eval()
    return model


def decoding(model: nn.Module, **kwargs: Any) -> Callable[[], Any]:
    """One decoding step after `CONTEXT` tokens."""
    prompt = torch.randint(0, 50257, (BATCH, CONTEXT))
    token = torch.randint(0, 50257, (BATCH, 1))
    with torch.no_grad():
        cache = model(prompt, use_cache=True, past_key_values=DynamicCache()).past_key_values

    def step() -> Any:
        with torch.no_grad():
            logits = model(token, past_key_values=cache, use_cache=True, **kwargs).logits
        cache.crop(-1)  # the next step is the same one
        return logits

    return step


def ours(sets: int) -> nn.Module:
    """Our model with its sets, not fresh ones: nothing is a product with zeros."""
    model = gpt2()
    for n in range(sets):
        adapters = attach(model, LoRA(rank=RANK), [f"transformer.{p}" for p in LAYERS], f"s{n}")
        for adapter in adapters.adapters.values():
            nn.init.normal_(adapter.get_parameter("B"), std=0.01)
        adapters.freeze()
    return model


def theirs(sets: int) -> nn.Module:
    """PEFT's, with the same sets."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_alpha=RANK
    )
    model = get_peft_model(gpt2(), config, adapter_name="s0")
    for n in range(1, sets):
        model.add_adapter(f"s{n}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    one_thread()
    names = [f"s{n % asked.sets}" for n in range(BATCH)]
    model, peft = ours(asked.sets), theirs(asked.sets)
    served = stack(model)
    step, their_single = decoding(model), decoding(peft)
    their_mixed = decoding(peft, adapter_names=names)

    def steps(one: Callable[[], Any], context: Callable[[], Any] = nullcontext) -> Any:
        with context():
            return [one() for _ in range(STEPS)]

    calls = {
        "one set": lambda: steps(step, lambda: activate(model, "s0")),
        "one set per sample": lambda: steps(step, lambda: activate(model, per_sample=names)),
        "one set per sample, stacked": lambda: steps(
            step, lambda: served.route(served.index(names))
        ),
        "PEFT one set": lambda: steps(their_single),
        "PEFT one set per sample": lambda: steps(their_mixed),
    }
    times = interleaved(calls, asked.rounds, warm=2)
    print(machine("transformers", "peft"))
    print(
        f"GPT-2 small, {BATCH} samples, {STEPS} decoding steps per activation,"
        f" {asked.sets} sets, rank {RANK}"
    )
    print("share of the own single-set throughput that is left:")
    print(times.line("one set", to="one set per sample"))
    print(times.line("one set", to="one set per sample, stacked"))
    print(times.line("PEFT one set", to="PEFT one set per sample"))


if __name__ == "__main__":
    main()
