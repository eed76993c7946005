"""What the tests of the adapter file share: a backbone, saved sets, and edited files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import (
    AdapterSet,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    attach,
    load,
)
from polyadapt.core import container as files
from polyadapt.core.errors import StoreError


class Net(nn.Module):
    """A fused projection, a branch called `mlp`, a layer called `head`."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y: Tensor = x + self.mlp(torch.softmax(q @ k.mT, -1) @ v)
        return y


def net(**sizes: int) -> Net:
    """Always the same weights; the global random state is left alone."""
    made = Net(**sizes).eval()
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def wake(adapters: AdapterSet) -> AdapterSet:
    """Trained-looking numbers in place of the zeros of the start."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapters


def lora(model: nn.Module, at: str = "blocks.*.qkv[q,v]", name: str = "pets") -> AdapterSet:
    generator = Generator().manual_seed(2)
    return wake(attach(model, LoRA(rank=2), at, name, generator=generator))


INPUT = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)

METHODS: list[tuple[Recipe, str | None]] = [
    (LoRA(rank=2, alpha=3, scaling="rank_stabilised"), "blocks.*.qkv[q,v]"),
    (LoRA(rank=4, ranks={"blocks.0.*": 1}), "blocks.*.mlp"),
    (DoRA(rank=2), "{blocks.*.mlp,head}"),
    (Bottleneck(rank=2, norm=True), "blocks.*"),
    (Bottleneck(rank=2, placement="parallel"), "blocks.*.mlp"),
    (MoSA(rank=4, experts=2), "blocks.*"),
    (BitFit(), None),
    (LayerNormTuning(), None),
    (FullFineTuning(), None),
    (HeadOnly(), None),
]


def state(model: nn.Module) -> list[object]:
    """Everything of a model that attaching may touch."""
    return [
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        [(name, type(module)) for name, module in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    ]


def refused(model: nn.Module, path: Path, **options: Any) -> str:
    """Loading is refused in one line that names the file, and leaves the model as it was."""
    before, there = state(model), path.exists()
    with pytest.raises(StoreError) as error:
        load(model, path, **options)
    line = str(error.value)
    assert line.isprintable()
    assert str(path) in line
    assert state(model) == before
    assert path.exists() is there
    return line


def saved(tmp_path: Path) -> Path:
    """A saved set named `pets`, LoRA of rank 2 on two parts of two layers."""
    model = net()
    made = lora(model)
    made.extra = {"labels": ["cat", "dog"]}
    made.head = {"weight": torch.ones(2, 3)}
    made.save(tmp_path / "pets.safetensors")
    return tmp_path / "pets.safetensors"


def edit(
    path: Path,
    record: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> Path:
    """A well-made file, digest included, with something else in it."""
    held, content = files.read(path)
    record(held)
    tensors(content)
    files.write(path, held, content)
    return path
