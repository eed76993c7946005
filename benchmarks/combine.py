"""Two LoRA sets of rank 16 on all linear layers of ViT-B become one of rank 16: ours and PEFT's.

The cost is told in forwards of one image through the plain model, and both results are compared
with the dense sum. Run: python benchmarks/combine.py [--rounds 5] [--without-peft]
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import AdapterSet, LoRA, attach, combine

RANK, WEIGHTS = 16, {"one": 0.7, "two": 0.3}
_SITE = re.compile(r"blocks\.\d+\.(attn|mlp)\.\w+")  # in a name of either library's tensors
AT = "blocks.*.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2}"


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    return model.eval()


def ours() -> tuple[nn.Module, dict[str, AdapterSet]]:
    model = vit()
    made = {name: attach(model, LoRA(rank=RANK), AT, name) for name in WEIGHTS}
    for n, adapters in enumerate(made.values()):
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(n))
    return model, made


def theirs(made: dict[str, AdapterSet]) -> Any:
    """PEFT's model with the very numbers of our sets."""
    from peft import LoraConfig, get_peft_model

    targets = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = get_peft_model(vit(), config, adapter_name="one")
    model.add_adapter("two", config)
    with torch.no_grad():
        for name, adapters in made.items():
            for site, adapter in adapters.adapters.items():
                layer: Any = model.get_submodule(f"base_model.model.{site}")
                state = adapter.state_dict()
                layer.lora_A[name].weight.copy_(state["A"])
                layer.lora_B[name].weight.copy_(state["B"])
    return model


def error(found: dict[str, Tensor], made: dict[str, AdapterSet]) -> float:
    """Relative Frobenius distance to the dense sum, over all sites."""
    missed = whole = 0.0
    states = {name: adapters.state_dict() for name, adapters in made.items()}
    factors = {
        (_SITE.search(key)[0], "A" if ("lora_A" in key or key.endswith("/A")) else "B"): tensor  # type: ignore[index]
        for key, tensor in found.items()
    }
    for site in made["one"].adapters:
        parts = (w * states[n][f"{site}/B"] @ states[n][f"{site}/A"] for n, w in WEIGHTS.items())
        exact = torch.stack(list(parts)).sum(0)
        delta = factors[site, "B"] @ factors[site, "A"]
        missed += float((delta - exact).square().sum())
        whole += float(exact.square().sum())
    return float((missed / whole) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-peft", action="store_true", help="PEFT takes most of the time")
    asked = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    model, made = ours()
    peft = None if asked.without_peft else theirs(made)
    plain, image = vit(), torch.randn(1, 3, 224, 224)

    def by(**options: Any) -> dict[str, Tensor]:
        combined = combine(model, WEIGHTS, **options)
        combined.detach()
        return combined.state_dict()

    def by_peft() -> dict[str, Tensor]:
        assert peft is not None, "left out below"
        weights = list(WEIGHTS.values())
        peft.add_weighted_adapter(list(WEIGHTS), weights, "made", "svd", svd_rank=RANK)
        state = peft.state_dict()
        peft.delete_adapter("made")
        return {key: t for key, t in state.items() if "made" in key}

    calls: dict[str, Callable[[], Any]] = {
        "forward of one image": lambda: plain(image),
        "ours, exact (rank 32)": by,
        "ours, svd to rank 16": lambda: by(method="svd", rank=RANK),
        "PEFT, svd to rank 16": by_peft,
    }
    if peft is None:
        del calls["PEFT, svd to rank 16"]
    with torch.no_grad():
        times = interleaved(calls, asked.rounds)
        print(machine("timm", "peft"))
        for name in list(calls)[1:]:
            print(times.line(name, "forward of one image"))
            print(f"  relative error against the dense sum {error(calls[name](), made):.6g}")


if __name__ == "__main__":
    main()
