"""Write a set as a folder that PEFT loads: LoRA, rsLoRA, DoRA, AdaLoRA, and any plain low rank."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..drawer import DRAWER
from ..errors import StoreError
from ..sets import AdapterSet
from .config import CONFIG, TENSORS, divisor
from .hub import PREFIX as HUB
from .hub import push, repository
from .names import exactly, inside
from .pieces import Export, Piece, from_set, tensors_of, whole_layers


def export_peft(adapter_set: AdapterSet, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to a new folder, or to the hub.

    PEFT then gives the set's outputs: the factors are the set's, bit for bit, and
    `target_modules` names its sites and nothing else. Rows of a fused projection become one
    adapter of the whole: A of all parts one above the other, B with zero rows elsewhere. A method
    that is plain low rank s B diag(p) A but none of PEFT's is written as LoRA, p folded into A.
    `set.head` becomes `modules_to_save`: PEFT's model must have the modules of its names.
    `hub:owner/name` instead of a folder uploads it.
    Raises `AdaptError` for what PEFT cannot express (a weight that is read without its layer being
    called, dilated or grouped convolutions, other methods) and for a folder that holds something;
    the folder is there as a whole or not at all. Format: peft 0.21.2.

    >>> from torch import nn
    >>> from polyadapt.core import LoRA, attach
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_peft(attach(model, LoRA(rank=2), at="0"), f"{folder}/pets")
    ...     sorted(os.listdir(f"{folder}/pets"))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    write(from_set(adapter_set), folder)


def write(export: Export, folder: str | Path) -> None:
    """The folder, whole or not at all; on the hub when it is called `hub:owner/name`."""
    remote = str(folder).startswith(HUB)
    if remote:
        repository(folder)
    else:
        _refuse_occupied(Path(folder))
    pieces = whole_layers(export)
    tensors, config = tensors_of(export, pieces), _config(export, pieces)
    if not remote:
        return _write_folder(Path(folder), config, tensors)
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "adapter"
        _write_folder(whole, config, tensors)
        push(whole, folder)


def _refuse_occupied(folder: Path) -> None:
    if not folder.absolute().parent.is_dir():
        raise StoreError(f"cannot write {folder}: the folder {folder.parent} does not exist")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"cannot write {folder}: it is there and no folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise StoreError(f"cannot write {folder}: it is not empty, and is never overwritten")


def _write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files beside the folder's place, then rename: never half a folder."""
    from safetensors.torch import save

    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    temporary: str | None = None
    try:
        temporary = tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}.")
        _write_synced(Path(temporary) / CONFIG, text.encode())
        _write_synced(Path(temporary) / TENSORS, save(plain, {"format": "pt"}))
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)  # an empty folder is replaced, any other one is an error
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone when the rename went well


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _config(export: Export, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The settings, in the fewest fields that every version of PEFT understands."""
    paths = [piece.site.path for piece in pieces]
    known = None
    if export.backbone is not None:
        names = (name for name, _ in export.backbone.named_modules())
        known = [name for name in names if DRAWER not in name.split(".")]
    saved = _saved_modules(export, paths)
    config: dict[str, Any] = {
        "peft_type": export.peft_type,
        "task_type": export.labels.get("task_type"),
        "base_model_name_or_path": export.labels.get("base_model_name_or_path"),
        "auto_mapping": None,
        "inference_mode": True,
        "target_modules": exactly(paths, known),
        "modules_to_save": saved or None,
        "lora_dropout": export.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": all(piece.site.kind == "transposed linear" for piece in pieces),
    }
    own = _budget(export) if export.peft_type == "ADALORA" else _ranks(export, pieces)
    return config | own


def _saved_modules(export: Export, paths: Sequence[str]) -> list[str]:
    """The modules that the head's tensors belong to."""
    modules = sorted({key.rpartition(".")[0] for key in export.head})
    if "" in modules:
        raise StoreError(
            f"the set's head ({', '.join(sorted(export.head))}) has tensors of no module; PEFT"
            " saves modules: name them 'head.weight' or the like, or empty set.head"
        )
    clash = sorted(inside([re.escape(name) for name in modules], paths, paths))
    if clash:
        raise StoreError(f"{clash[0]} is adapted and lies in the set's head: PEFT allows one only")
    return modules


def _ranks(export: Export, pieces: Sequence[Piece]) -> dict[str, Any]:
    rank = Counter(piece.rank for piece in pieces).most_common(1)[0][0]
    given = getattr(export.recipe, "alpha", None)
    alphas = {piece.site.path: _alpha(export, piece, given) for piece in pieces}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    ranks = {piece.site.path: piece.rank for piece in pieces}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_only(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_only(path): a for path, a in alphas.items() if a != alpha},
        "use_rslora": export.rank_stabilised,
        "use_dora": type(export.recipe).__name__ == "DoRA",
    }


def _only(path: str) -> str:
    """A pattern that fits this path and no tail of another."""
    return f"^{re.escape(path)}"


def _alpha(export: Export, piece: Piece, given: float | None) -> float:
    """The number that PEFT divides to exactly this scale."""
    by = divisor(piece.rank, export.rank_stabilised)
    near = piece.scale * by
    tries = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    if given is not None:
        tries.insert(0, float(given))
    for alpha in tries:
        if alpha / by == piece.scale:
            return int(alpha) if alpha.is_integer() else alpha
    raise StoreError(f"{piece.site.name}: no lora_alpha gives the scale {piece.scale!r} in PEFT")


def _budget(export: Export) -> dict[str, Any]:
    """AdaLoRA's schedule as far as it is whole steps; PEFT wants a total, which we do not know."""
    recipe: Any = export.recipe
    steps = [t if isinstance(t, int) else 0 for t in (recipe.t_init, recipe.t_final)]
    alpha = recipe.scale * (recipe.r0 + 1e-5)
    near = round(alpha)
    return {
        "init_r": recipe.r0,
        "target_r": recipe.rank,
        "lora_alpha": near if near and near / (recipe.r0 + 1e-5) == recipe.scale else alpha,
        "tinit": steps[0],
        "tfinal": steps[1],
        "total_step": sum(steps) + 1,
        "deltaT": recipe.every,
        "beta1": recipe.beta1,
        "beta2": recipe.beta2,
        "orth_reg_weight": recipe.orthogonality,
    }
