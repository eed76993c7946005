"""What a PEFT folder is written from: per layer the factors, in PEFT's shapes or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StoreError
from ..kinds import layer_at
from ..low_rank import folded
from ..recipe import Adapter, LowRank, Recipe
from ..sets import AdapterSet, check_tensors
from ..sites import Site
from ..store import AdapterFile
from ..unattached import unattached
from .reads import refuse_unless_called
from .tensors import PREFIX, Place, own_shape, refuse_kind, refuse_layer

_FORMS = ("LoRA", "DoRA", "AdaLoRA")


@dataclass(frozen=True)
class Piece:
    """What one site gives: its tensors A, B and m or E, and its scale."""

    site: Site
    tensors: Mapping[str, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.tensors["A"])


@dataclass(frozen=True)
class Export:
    """What a folder is written from; `backbone` is None when all that is known is a file."""

    recipe: Recipe
    pieces: Sequence[Piece]
    head: Mapping[str, Tensor]
    labels: Mapping[str, Any]
    backbone: nn.Module | None

    @property
    def peft_type(self) -> str:
        return "ADALORA" if type(self.recipe).__name__ == "AdaLoRA" else "LORA"

    @property
    def rank_stabilised(self) -> bool:
        return getattr(self.recipe, "scaling", "") == "rank_stabilised"

    @property
    def dropout(self) -> float:
        return float(getattr(self.recipe, "dropout", 0.0))


def from_set(adapter_set: AdapterSet) -> Export:
    """What an attached set is written from."""
    pieces = [_piece(adapter_set, site, adapter) for site, adapter in adapter_set.pairs()]
    labels = _labels(adapter_set.extra)
    return Export(adapter_set.recipe, pieces, adapter_set.head, labels, adapter_set.backbone)


def _labels(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `import_peft` kept of the folder that a set comes from."""
    about = extra.get("peft")
    return about if isinstance(about, dict) else {}


def from_file(file: AdapterFile) -> Export:
    """What a file's set is written from, without its backbone."""
    method = type(file.recipe).__name__
    if method not in _FORMS:
        least = [file.recipe.least_numbers(site) for site in file.sites]
        if not least or None in least:
            raise _no_form(method)
        made = unattached(file, "the file")
        pieces = [_piece(made, site, adapter) for site, adapter in made.pairs()]
        return Export(file.recipe, pieces, file.head, _labels(file.extra), None)
    factors = {"LoRA": "AB", "DoRA": "ABm", "AdaLoRA": "ABE"}[method]
    shapes: dict[str, tuple[int, ...]] = {}
    pieces = []
    for site in file.sites:
        rank, scale = _rank_and_scale(file.recipe, site)
        own = {f: own_shape(site.shape, f, rank) for f in factors}
        shapes |= {f"{site.name}/{f}": shape for f, shape in own.items()}
        tensors = {f: file.tensors.get(f"{site.name}/{f}", torch.empty(0)) for f in factors}
        pieces.append(Piece(site, tensors, scale))
    wanted = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    check_tensors(file.tensors, wanted, "the file")
    return Export(file.recipe, pieces, file.head, _labels(file.extra), None)


def _rank_and_scale(recipe: Any, site: Site) -> tuple[int, float]:
    if len(site.shape) != 2:
        raise StoreError(f"{site.name} is {list(site.shape)}, not a matrix")
    if type(recipe).__name__ == "AdaLoRA":
        return recipe.r0, recipe.scale
    rank = recipe.rank_at(site)
    return rank, recipe.scale_of(rank)


def _piece(adapters: AdapterSet, site: Site, adapter: Adapter) -> Piece:
    if type(adapters.recipe).__name__ in _FORMS:
        known: Any = adapter.deployed()
        return Piece(site, known.state_dict(), known.scale)
    if not isinstance(adapter, LowRank):
        raise _no_form(type(adapters.recipe).__name__)
    a, b, p, scale = adapter.factors()
    if p is None:
        return Piece(site, {"A": a, "B": b}, scale)
    live = folded((a, b, p, 1.0), 1.0)  # dead ranks are left out, but for one where all are
    return Piece(site, {"A": live.A, "B": live.B}, scale)


def _no_form(method: str) -> StoreError:
    return StoreError(
        f"{method} has no form in PEFT's files; allowed: {', '.join(_FORMS)} and methods with plain"
        " low-rank factors"
    )


def tensors_of(export: Export, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The tensors of the file, the head's behind the adapters'."""
    places = [_place(export, piece.site) for piece in pieces]
    tensors = {
        place.key(factor): tensor.detach().cpu().reshape(place.shape(factor, piece.rank))
        for place, piece in zip(places, pieces, strict=True)
        for factor, tensor in piece.tensors.items()
    }
    tensors |= {f"{PREFIX}{key}": tensor.detach().cpu() for key, tensor in export.head.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StoreError(f"not exported: {key} holds NaN or infinity")
    return tensors


def whole_layers(export: Export) -> list[Piece]:
    """One piece per layer: rows of a fused projection are put together."""
    if not export.pieces:
        raise StoreError("a set without sites has nothing that PEFT could load")
    by_path: dict[str, list[Piece]] = {}
    for piece in export.pieces:
        _refuse_site(export, piece.site)
        by_path.setdefault(piece.site.path, []).append(piece)
    return [own[0] if own[0].site.rows is None else _fused(export, own) for own in by_path.values()]


def _refuse_site(export: Export, site: Site) -> None:
    """PEFT changes what a layer returns when it is called, and nothing else."""
    if site.parameter != "weight" or site.kind in ("parameter", "block") or not site.path:
        raise StoreError(f"{site.name} is no weight of a layer in the model: PEFT has no adapter")
    if export.backbone is not None:
        module = export.backbone.get_submodule(site.path)
        refuse_unless_called(export.backbone, site.path, module, site.kind)
    elif site.slot != "output":
        raise _needs_backbone(site, "who else reads its weight")


def _fused(export: Export, pieces: Sequence[Piece]) -> Piece:
    """[A_q; A_v] and B with B_q, B_v in their rows and columns: s B A is that of the parts."""
    first = pieces[0]
    if export.backbone is None:
        raise _needs_backbone(first.site, "how many rows the whole projection has")
    simple = all(set(p.tensors) == {"A", "B"} and p.scale == first.scale for p in pieces)
    if not simple or export.dropout:
        raise StoreError(
            f"{first.site.name}: rows of a fused projection have a form in PEFT's files for LoRA"
            " with one scale and without dropout only"
        )
    matrix = layer_at(export.backbone, dataclasses.replace(first.site, rows=None)).matrix()
    a = torch.cat([piece.tensors["A"].detach() for piece in pieces])
    b = a.new_zeros(len(matrix), len(a))
    done = 0
    for piece in pieces:
        start, stop = piece.site.rows or (0, 0)
        b[start:stop, done : done + piece.rank] = piece.tensors["B"].detach()
        done += piece.rank
    whole = dataclasses.replace(first.site, part=None, rows=None, shape=tuple(matrix.shape))
    return Piece(whole, {"A": a, "B": b}, first.scale)


def _place(export: Export, site: Site) -> Place:
    if export.backbone is not None:
        module = export.backbone.get_submodule(site.path)
        refuse_layer(export.peft_type, site.path, site.kind, module)
    else:
        refuse_kind(export.peft_type, site.path, site.kind)
    kernel: tuple[int, ...] = ()
    if "conv" in site.kind:
        if export.backbone is None:
            raise _needs_backbone(site, "the size of the kernel")
        kernel = tuple(layer_at(export.backbone, site).stored.shape[1:])
    d_out, d_in = site.shape
    return Place(export.peft_type, site.path, site.kind, d_out, d_in, kernel)


def _needs_backbone(site: Site, what: str) -> StoreError:
    return StoreError(
        f"{site.name}: {what} is not in the file; give its backbone too (--model), or call"
        " export_peft on the loaded set"
    )
