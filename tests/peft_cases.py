"""Models that real PEFT adapts and saves, for the tests of PEFT folders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyadapt.core.peft.config import CONFIG, TENSORS
from polyadapt.tests.law_real_models import OTHERS, TIMM, Real

REALS = TIMM | OTHERS
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "AdaLoRA": {"init_r": 4, "target_r": 3, "total_step": 100},
}


@dataclass(frozen=True)
class Case:
    """A model and the layers that PEFT is told to adapt."""

    real: Real
    target: list[str]
    adalora: list[str]  # PEFT has it for Linear, Conv1D and Conv2d only
    settings: Mapping[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return self.real.model().to(dtype)


CASES = {
    "timm ViT": Case(
        REALS["timm ViT"], ["qkv", "mlp.fc1", "patch_embed.proj"], ["attn.proj", "patch_embed.proj"]
    ),
    "GPT-2": Case(
        REALS["GPT-2"],
        ["c_attn", "mlp.c_proj", "wpe", "wte"],
        ["c_attn", "c_fc"],
        {"fan_in_fan_out": True},
    ),
    "transformers Whisper": Case(
        # its encoder asks conv1 for its stride, which PEFT's wrapper has not: no convolutions
        REALS["transformers Whisper"],
        ["q_proj", "fc1", "out_proj"],
        ["v_proj", "fc2"],
    ),
    "openai Whisper": Case(
        REALS["openai Whisper"], ["query", "mlp.0", "conv1", "conv2"], ["value", "mlp.2"]
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of layers' storage and of embeddings, which these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outputs(real: Real, model: nn.Module) -> Tensor:
    """What the model gives in its own dtype, without gradients."""
    dtype = next(model.parameters()).dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the inputs are drawn in it
    try:
        with torch.no_grad(), quiet():
            return real.call(model)
    finally:
        torch.set_default_dtype(before)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def peft_model(model: nn.Module, target: Any, method: str = "LoRA", **settings: Any) -> Any:
    """The model in PEFT, every adapter tensor moved off its start."""
    import peft

    cls: Callable[..., Any] = peft.AdaLoraConfig if method == "AdaLoRA" else peft.LoraConfig
    own = {"lora_alpha": 6} if method == "AdaLoRA" else {"r": 4, "lora_alpha": 6}
    with quiet():
        made = peft.get_peft_model(
            model, cls(**own | METHODS[method] | settings, target_modules=target)
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) / 8
                parameter.add_(noise.to(parameter.dtype))
    return made.eval()


def saved(made: Any, folder: Path) -> Path:
    """The folder that PEFT writes."""
    with quiet():
        made.save_pretrained(folder)
    return folder


def loaded(model: nn.Module, folder: Path) -> Any:
    """What PEFT makes of a folder, which must hold all that it expects and no more."""
    import peft

    with quiet():
        made = peft.PeftModel.from_pretrained(model, str(folder))
        found: Any = peft.set_peft_model_state_dict(made, load_file(folder / TENSORS))
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".lora_" in key]
    return made.eval()


def wrapped(made: Any) -> set[str]:
    """The paths that PEFT put an adapter on."""
    from peft.tuners.lora import LoraLayer

    modules = made.get_base_model().named_modules()
    return {name for name, module in modules if isinstance(module, LoraLayer)}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def rewrite(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], object] | None = None,
) -> None:
    """Change a folder's config, its tensors, or both."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | dict(settings or {})))
    if change is not None:
        found = tensors(folder)
        change(found)
        save_file(found, folder / TENSORS)


class Nested(nn.Module):
    """Names that are tails of other names, as PEFT's lists cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.patch = nn.ModuleDict({"proj": nn.Linear(6, 6)})
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch["proj"](torch.tanh(self.proj(x)))
        out: Tensor = self.fc(torch.tanh(x))
        return out


def nested() -> Nested:
    """The same bits each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Nested().eval()


def states() -> Tensor:
    """A batch for it."""
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
