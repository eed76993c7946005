"""The law table: one row per method; a cell is a method at a layer kind through one slot.

A new method adds one row here and is then held to every law of `test_laws.py` and
`test_compile.py`. Run as a program it is the fresh process of law 6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyadapt.core import (
    AdapterSet,
    AdapterTune,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    Site,
    attach,
    load,
    select,
)
from polyadapt.core.sites import Sites, SlotKind
from polyadapt.tests.law_models import LAYERS

VECTORS = ("bias", "bias of attention", "norm")
BLOCKS = ("block", "block on a strided state")
MATRICES = tuple(name for name in LAYERS if name not in (*VECTORS, *BLOCKS))
LINEAR = tuple(name for name in MATRICES if "linear" in name or "Conv1D" in name)
LINEAR = tuple(name for name in LINEAR if name != "linear that is read")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a method promises: where it can sit, in which forms, and how many numbers it has."""

    recipe: Recipe
    layers: Sequence[str]
    trained: Callable[[Site], int]  # the formula of its card, for one site
    stored: Callable[[Site], int] | None = None  # None: what is trained
    weight: bool  # it has a weight form, so it merges
    output: bool


def size(site: Site) -> int:
    """Numbers of the adapted rows."""
    return torch.Size(site.shape).numel()


def pair(r: int) -> Callable[[Site], int]:
    """r (d_in + d_out)."""
    return lambda site: r * sum(site.shape)


def bottleneck(r: int, norm: bool = False) -> Callable[[Site], int]:
    """r d_in + r + d_out r + d_out, and 2 d_in for a norm; a block's width is both."""
    return lambda s: r * (s.shape[-1] + 1) + s.shape[0] * (r + 1) + 2 * norm * s.shape[-1]


def _linear_rows() -> dict[str, Row]:
    def row(recipe: Recipe) -> Row:
        return Row(recipe=recipe, layers=MATRICES, trained=pair(3), weight=True, output=True)

    called = [name for name in MATRICES if _slot(name) == "output"]
    dropped = {"layers": called, "trained": pair(3), "weight": True, "output": True}
    return {
        "LoRA": row(LoRA(rank=3, alpha=6)),
        "LoRA, rank-stabilised": row(LoRA(rank=3, alpha=2, scaling="rank_stabilised")),
        "LoRA, dropout in eval": Row(recipe=LoRA(rank=3, dropout=0.5), **dropped),  # type: ignore[arg-type]
        "DoRA": Row(
            recipe=DoRA(rank=3, alpha=6),
            layers=MATRICES,
            trained=lambda site: 3 * sum(site.shape) + site.shape[0],
            weight=True,
            output=True,
        ),
    }


def _bottleneck_rows() -> dict[str, Row]:
    def row(recipe: Recipe, layers: Sequence[str], norm: bool = False) -> Row:
        return Row(
            recipe=recipe, layers=layers, trained=bottleneck(3, norm), weight=False, output=True
        )

    serial = Row(
        recipe=Bottleneck(rank=3, scale=0.5),
        layers=(*LINEAR, "embedding", *BLOCKS),
        trained=lambda s: 2 * 3 * s.shape[0] + 3 + s.shape[0],
        weight=False,
        output=True,
    )
    experts = Row(
        recipe=MoSA(rank=3, experts=4, dropout=0.0),
        layers=BLOCKS,
        # one dense projection, one of 4 experts with a bias each
        trained=lambda s: 2 * 3 * s.shape[0] + 3 + 4 * s.shape[0] + 2 * s.shape[0],
        stored=bottleneck(3, norm=True),
        weight=False,
        output=True,
    )
    beside = Bottleneck(rank=3, placement="parallel", norm=True, activation="silu")
    return {
        "Bottleneck, serial": serial,
        "Bottleneck, parallel": row(beside, (*LINEAR, *BLOCKS), norm=True),
        "Bottleneck, parallel_ffn": row(Bottleneck(rank=3, placement="parallel_ffn"), BLOCKS),
        "Bottleneck, small start": row(Bottleneck(rank=3, init="small"), BLOCKS),
        "AdapterTune": row(AdapterTune(rank=3), BLOCKS),
        "MoSA": experts,
    }


def _baseline_rows() -> dict[str, Row]:
    def row(recipe: Recipe, layers: Sequence[str]) -> Row:
        return Row(recipe=recipe, layers=layers, trained=size, weight=True, output=False)

    return {
        "BitFit": row(BitFit(), ("bias", "bias of attention")),
        "LayerNormTuning": row(LayerNormTuning(), ("norm",)),
        "FullFineTuning": row(FullFineTuning(), (*MATRICES, *VECTORS)),
        "HeadOnly": Row(
            recipe=HeadOnly(), layers=("linear",), trained=size, weight=False, output=False
        ),
    }


def _slot(layer: str) -> SlotKind:
    """How a layer kind is reached unless asked otherwise."""
    return select(LAYERS[layer].model(), LAYERS[layer].at)[0].slot


ROWS = {**_linear_rows(), **_bottleneck_rows(), **_baseline_rows()}


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
    return [c for c in cells if not (c.slot == "weight" and getattr(c.row.recipe, "dropout", 0))]


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
