"""What the tests of merging files share: a layer of every kind, a set on it, a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, nn

from polyadapt.core import LoRA, Recipe, attach
from polyadapt.tests.law_models import Conv1D


class Zoo(nn.Module):
    """One layer of every kind; it is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.qkv = nn.Linear(4, 12)
        self.c_attn = Conv1D(4, 12)
        self.embed = nn.Embedding(7, 4)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
        self.attn = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.batch = nn.BatchNorm1d(4)


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    made = Zoo()
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made.to(dtype)


def save(path: Path, recipe: Recipe, at: str | list[str] | None, model: nn.Module) -> Path:
    """A set of trained-looking numbers as a file; the model keeps it attached."""
    made = attach(model, recipe, at)
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    made.save(path)
    return path


def good_files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A LoRA file, the checkpoint it belongs to, and a place for the result."""
    adapter = save(tmp_path / "set.safetensors", LoRA(rank=2), "linear", zoo())
    save_file(zoo().state_dict(), tmp_path / "base.safetensors")
    return adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors"
