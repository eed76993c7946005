"""What `polyadapt adapters import` and `export` do: between PEFT folders and adapter files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdaptError, StoreError
from ..store import load, read_file
from .pieces import from_file
from .reading import import_peft
from .writing import export_peft, write


def import_folder(folder: str, model: str, weights: Path | None, out: Path, name: str) -> str:
    """PEFT folder -> adapter file for the backbone that `model` builds; a line that says so."""
    made = import_peft(named_model(model, weights), folder, name)
    if any(t.dtype == torch.float64 for t in made.state_dict().values()):
        raise StoreError(f"{folder} is in fp64, which adapter files do not hold; allowed: to fp32")
    made.save(out)
    return f"{out}: {made.recipe} at {len(made.sites)} sites of {type(made.backbone).__name__}"


def export_file(file: Path, model: str | None, weights: Path | None, out: str) -> str:
    """Adapter file -> PEFT folder; the backbone is needed for convolutions and fused rows only."""
    if model is None:
        if weights is not None:
            raise AdaptError("--weights are those of a --model: name that too")
        found = read_file(file)
        try:
            write(from_file(found), out)
        except AdaptError as error:
            raise StoreError(f"{file}: {error}") from error
        return f"{out}: {found.recipe} at {len(found.sites)} sites"
    made = load(named_model(model, weights), file)
    export_peft(made, out)
    return f"{out}: {made.recipe} at {len(made.sites)} sites"


def named_model(model: str, weights: Path | None) -> nn.Module:
    """The backbone that `timm:NAME` or `package.module:function` names, with weights of a file.

    A timm model is built without a download, so it needs `weights`; a function (called without
    arguments) may bring its own. Adapter files remember the weights, so the right ones matter.

    >>> type(named_model("torch.nn:Identity", None)).__name__
    'Identity'
    """
    made = _timm(model, weights) if model.startswith("timm:") else _called(model)
    if not isinstance(made, nn.Module):
        raise AdaptError(f"--model {model} gives {type(made).__name__}, not a torch module")
    if weights is not None:
        _load_weights(made, weights)
    return made.eval()


def _timm(model: str, weights: Path | None) -> object:
    if weights is None:
        raise AdaptError(f"--model {model} needs --weights FILE.safetensors: nothing is downloaded")
    timm: Any = _module("timm", model)
    try:
        return timm.create_model(model.removeprefix("timm:"), pretrained=False)
    except RuntimeError as error:  # an unknown name
        raise AdaptError(f"--model {model}: {error}") from error


def _called(model: str) -> object:
    module, colon, function = model.partition(":")
    if not (module and colon and function) or module.startswith("."):
        raise AdaptError(f"--model {model!r} is no model: timm:NAME or package.module:function")
    make: Callable[[], object] | None = getattr(_module(module, model), function, None)
    if not callable(make):
        raise AdaptError(f"--model {model}: {module} has no function {function!r}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise AdaptError(f"--model {model} cannot be called without arguments: {error}") from error
    except ValueError:  # it has no signature to look at
        pass
    return make()


def _module(name: str, model: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AdaptError(f"--model {model}: cannot import {name}: {error}") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise StoreError(f"there is no checkpoint {path}")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read as safetensors") from error
    except RuntimeError as error:  # torch lists every key over several lines
        first = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} does not fit {type(model).__name__}: {first}") from error
