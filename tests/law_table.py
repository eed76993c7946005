"""The law table: one row per method; a cell is a method at a layer kind through one slot.

A new method adds one row here and is then held to every law of `test_laws.py` and
`test_compile.py`. Run as a program it is the fresh process of law 6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from polyadapt.core import (
    IA3,
    SALT,
    SSAM,
    VPT,
    AdaLoRA,
    AdapterPlus,
    AdapterSet,
    AdapterTune,
    AdaptFormer,
    BitFit,
    BlockLoRA,
    Bottleneck,
    DoRA,
    FullFineTuning,
    GatedCrossAttention,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    S2LoRA,
    Site,
    attach,
    load,
    select,
)
from polyadapt.core.sites import Sites, SlotKind
from polyadapt.tests.law_models import LAYERS

VECTORS = ("bias", "bias of attention", "norm")
BLOCKS = ("block", "block on a strided state")
ATTENDING = ("block with attention",)
FEATURES = ("block with features",)
MATRICES = tuple(name for name in LAYERS if name not in (*VECTORS, *BLOCKS, *ATTENDING, *FEATURES))
LINEAR = tuple(name for name in MATRICES if "linear" in name or "Conv1D" in name)
LINEAR = tuple(name for name in LINEAR if name != "linear that is read")
WHOLE_LINEAR = (*(name for name in LINEAR if "rows" not in name), "linear that is read")
TYPICAL = ("rows of a linear", "conv2d", "in_proj of attention", "embedding", "block", "norm")

Count = Callable[[Site], int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a method promises: where it can sit, in which forms, and how many numbers it has."""

    recipe: Recipe
    layers: Sequence[str]
    trained: Count  # the formula of its card, for one site
    stored: Count | None = None  # None: what is trained
    shared: Callable[[Sequence[Site]], int] = lambda sites: 0  # numbers of the bank
    weight: bool = False  # it has a weight form, so it merges
    output: bool = False
    near: bool = True  # it starts near the backbone
    like: str = ""  # the row of the same adapter class: its cells stand for these in fast runs


def size(s: Site) -> int:
    """Numbers of the adapted rows."""
    return torch.Size(s.shape).numel()


def pair(s: Site) -> int:
    """A [3, d_in] and B [d_out, 3]."""
    return 3 * sum(s.shape)


def pair_per_shape(sites: Sequence[Site]) -> int:
    """A pair for each distinct shape: S2LoRA's bank."""
    return 3 * sum(sum(shape) for shape in {s.shape for s in sites})


def serial(s: Site) -> int:
    """d to 3 to d channels, with biases; a block's shape is (d,)."""
    return 2 * 3 * s.shape[0] + 3 + s.shape[0]


def parallel(s: Site) -> int:
    """d_in to 3 to d_out channels, with biases."""
    return 3 * s.shape[-1] + 3 + 3 * s.shape[0] + s.shape[0]


def norm(s: Site) -> int:
    """A LayerNorm over the input."""
    return 2 * s.shape[-1]


def drops(recipe: Recipe) -> bool:
    """It has dropout, which needs the input of a call."""
    return bool(getattr(recipe, "dropout", 0))


def both_forms(recipe: Recipe, trained: Count = pair, like: str = "") -> Row:
    """A method at every matrix; with dropout, only where a layer is called."""
    called = [name for name in MATRICES if _slot(name) == "output"]
    layers = called if drops(recipe) else MATRICES
    return Row(recipe=recipe, layers=layers, trained=trained, weight=True, output=True, like=like)


def beside(
    recipe: Recipe,
    layers: Sequence[str],
    trained: Count,
    stored: Count | None = None,
    like: str = "",
) -> Row:
    """A method that acts on activations."""
    return Row(recipe=recipe, layers=layers, trained=trained, stored=stored, output=True, like=like)


def spectral(recipe: SALT, like: str = "") -> Row:
    """SALT at every matrix: its full clamp has the weight form alone."""

    def trained(s: Site) -> int:
        return int(2 * recipe.top + 2 * recipe.rank * (min(s.shape) - recipe.top))

    def stored(s: Site) -> int:
        k = min(s.shape)
        return trained(s) + (k if recipe.vectors == "recomputed" else k * (1 + sum(s.shape)))

    row = replace(both_forms(recipe, trained, like), stored=stored)
    return replace(row, output=recipe.clamp != "full")


def in_place(recipe: Recipe, layers: Sequence[str]) -> Row:
    """A method that trains a copy of a parameter."""
    return Row(recipe=recipe, layers=layers, trained=size, weight=True)


def _slot(layer: str) -> SlotKind:
    """How a layer kind is reached unless asked otherwise."""
    return select(LAYERS[layer].model(), LAYERS[layer].at)[0].slot


ROWS = {
    "LoRA": both_forms(LoRA(rank=3, alpha=6)),
    "LoRA, rank-stabilised": both_forms(
        LoRA(rank=3, alpha=2, scaling="rank_stabilised"), like="LoRA"
    ),
    "LoRA, dropout in eval": both_forms(LoRA(rank=3, dropout=0.5), like="LoRA"),
    "DoRA": both_forms(DoRA(rank=3, alpha=6), trained=lambda s: pair(s) + s.shape[0]),
    "AdaLoRA": both_forms(
        # noise of 1/4 in a third factor, E: a scale 4 times as large makes the update as large
        AdaLoRA(rank=2, initial_rank=3, alpha=24),
        trained=lambda s: 3 * (sum(s.shape) + 1),
    ),
    "BlockLoRA": both_forms(
        BlockLoRA(rank=6, alpha=5), trained=lambda s: 3 * s.shape[1] + 6 * s.shape[0]
    ),
    "BlockLoRA, input": replace(
        both_forms(
            BlockLoRA(rank=3, alpha=3.5, split="input"),
            trained=lambda s: 3 * s.shape[1] // 2 + 3 * s.shape[0],
        ),
        layers=[name for name in MATRICES if name != "embedding"],  # of 11 rows: no two slices
    ),
    "BlockLoRA, dropouts in eval": both_forms(
        BlockLoRA(rank=6, dropout=0.5, arm_dropout=0.5),
        trained=lambda s: 3 * s.shape[1] + 6 * s.shape[0],
        like="BlockLoRA",
    ),
    "S2LoRA": replace(
        both_forms(S2LoRA(rank=3, alpha=24, share="shape"), trained=lambda s: 3),
        shared=pair_per_shape,
    ),
    "SALT": spectral(SALT(top=1, rank=2)),
    "SALT, vectors in the file": spectral(
        SALT(top=1, rank=2, clamp="none", init="gaussian", vectors="stored"), like="SALT"
    ),
    "SALT, full clamp": spectral(SALT(top=4, rank=5, clamp="full")),
    "SALT, full clamp, paper's start": replace(
        spectral(SALT(top=4, rank=5, clamp="full", init="paper"), like="SALT, full clamp"),
        near=False,  # 0.001 of the largest output where the spectrum is flat
    ),
    "SSAM": Row(
        recipe=SSAM(),
        layers=MATRICES,
        trained=lambda s: 2 * min(s.shape),
        stored=lambda s: 3 * min(s.shape),
        weight=True,
    ),
    "IA3": both_forms(IA3(), trained=lambda s: s.shape[0]),
    "IA3, inputs": replace(
        both_forms(IA3(inputs=["*"]), trained=lambda s: s.shape[-1]), layers=WHOLE_LINEAR
    ),
    "Bottleneck, serial": beside(
        Bottleneck(rank=3, scale=0.5), (*LINEAR, "embedding", *BLOCKS), serial
    ),
    "Bottleneck, parallel": beside(
        Bottleneck(rank=3, placement="parallel", norm=True, activation="silu"),
        (*LINEAR, *BLOCKS),
        lambda s: parallel(s) + norm(s),
    ),
    "Bottleneck, parallel_ffn": beside(
        Bottleneck(rank=3, placement="parallel_ffn"), BLOCKS, serial
    ),
    "Bottleneck, small start": beside(
        Bottleneck(rank=3, init="small"), BLOCKS, serial, like="Bottleneck, serial"
    ),
    "AdapterTune": beside(AdapterTune(rank=3), BLOCKS, serial),
    "AdaptFormer": beside(
        AdaptFormer(rank=3, dropout=0.0), BLOCKS, serial, like="Bottleneck, parallel_ffn"
    ),
    "AdapterPlus": beside(AdapterPlus(rank=3), BLOCKS, lambda s: serial(s) + s.shape[0]),
    "MoSA": beside(
        MoSA(rank=3, experts=4, dropout=0.0),
        BLOCKS,
        # the upper projection's experts share a matrix, and have a bias each
        trained=lambda s: serial(s) + norm(s) + 3 * s.shape[0],
        stored=lambda s: serial(s) + norm(s),
    ),
    "VPT": Row(
        recipe=VPT(prompts=3),
        layers=ATTENDING,
        trained=lambda s: 3 * s.shape[0],
        output=True,
        near=False,
    ),
    "GatedCrossAttention": beside(
        GatedCrossAttention(head_width=4),
        FEATURES,
        lambda s: 12 * s.shape[0] ** 2 + 12 * s.shape[0] + 2,
    ),
    "BitFit": in_place(BitFit(), ("bias", "bias of attention")),
    "LayerNormTuning": in_place(LayerNormTuning(), ("norm",)),
    "FullFineTuning": in_place(FullFineTuning(), (*MATRICES, *VECTORS)),
    "HeadOnly": Row(recipe=HeadOnly(), layers=("linear",), trained=size),
}


@dataclass(frozen=True)
class Cell:
    """One method at one layer kind through one slot."""

    method: str
    layer: str
    slot: SlotKind

    def __str__(self) -> str:
        return f"{self.method} at {self.layer} by {self.slot}"

    @property
    def row(self) -> Row:
        return ROWS[self.method]

    @property
    def identity(self) -> bool:
        return self.row.recipe.identity

    @property
    def typical(self) -> bool:
        """It is tried in fast runs: each adapter class at the layer kinds that differ most."""
        return self.layer in TYPICAL and not self.row.like

    @property
    def acts(self) -> bool:
        """It has adapters."""
        return self.row.weight or self.row.output

    @property
    def both_forms(self) -> bool:
        """The other form can act here too."""
        return Cell(self.method, self.layer, "weight") in CELLS and self.slot == "output"

    def model(self, seed: int = 0) -> nn.Module:
        return LAYERS[self.layer].model(seed)

    def inputs(self) -> Tensor:
        return LAYERS[self.layer].inputs()

    def sites(self, model: nn.Module, slot: SlotKind | None = None) -> Sites:
        if self.method == "HeadOnly":
            return Sites()
        both = self.row.weight and self.row.output and _slot(self.layer) == "output"
        return select(model, LAYERS[self.layer].at, slot=slot or (self.slot if both else None))

    def attach(
        self, model: nn.Module, name: str = "a", seed: int = 1, slot: SlotKind | None = None
    ) -> AdapterSet:
        """A fresh set, as the recipe starts it."""
        generator = torch.Generator().manual_seed(seed)
        return attach(model, self.row.recipe, self.sites(model, slot), name, generator=generator)

    def adapted(self, model: nn.Module, name: str = "a", seed: int = 1) -> AdapterSet:
        """A set that has been trained, as far as any test can tell."""
        return stir(self.attach(model, name, seed), seed)


def stir(adapters: AdapterSet, seed: int = 1) -> AdapterSet:
    """Move every parameter off its start by noise as large as a weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            noise = torch.randn(parameter.shape, generator=generator) / 4
            parameter.add_(noise.to(parameter.dtype))
    return adapters


def _cells() -> list[Cell]:
    cells: list[Cell] = []
    for method, row in ROWS.items():
        for layer in row.layers:
            natural = _slot(layer)
            slots = {natural, "weight"} if row.weight and row.output else {natural}
            slots = slots if row.output else {"weight"}
            cells += [Cell(method, layer, slot) for slot in sorted(slots)]
    return [c for c in cells if c.slot == "output" or not drops(c.row.recipe)]


CELLS = _cells()


def outputs_after_loading(folder: Path) -> dict[str, Tensor]:
    """What each cell's model puts out under the file that law 6 saved for it."""
    found = {}
    for number, cell in enumerate(CELLS):
        model = cell.model()
        load(model, folder / f"{number}.safetensors")
        with torch.no_grad():
            found[str(cell)] = model(cell.inputs())
    return found


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    torch.save(outputs_after_loading(Path(sys.argv[1])), Path(sys.argv[1]) / "outputs.pt")
