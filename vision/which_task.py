"""Which task a configuration is for: its data decide, before anything else of it is read."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import AdaptError
from ..core.images.data import ImageData
from ..core.run_folder import CONFIG
from ..core.store import read_file

SEGMENTATION = "segmentation"


def is_segmentation(verb: str, words: Sequence[str]) -> bool:
    """Whether these words of `fit`, `validate` or `test` are about pictures with masks.

    The class of the data decides, in the last file or word that names one; where it is none that we
    know, the class of the backbone, so that what is wrong is told of the task that was meant; and
    without data the task of the `--set` file. Raises `AdaptError` for a file of the other task.
    """
    asked = _asked(words)
    data, backbone = _last(asked, "data"), _last(asked, "model", "backbone")
    by_data = None if data is None else _masked(data)
    if by_data is None:
        by_data = _is_sam(backbone)
    if verb == "fit" or asked.set is None:
        return by_data
    task = read_file(asked.set).extra.get("task")
    if data is None:
        return bool(task == SEGMENTATION)
    if (task == SEGMENTATION) != by_data:
        kind = "pictures with masks" if by_data else "labelled images"
        raise AdaptError(f"{asked.set} is of the task {task!r}: {data} is of {kind}")
    return by_data


def refuse_segmentation(command: str, config: Path) -> None:
    """`AdaptError` for a configuration that a command of classifiers does not take."""
    if is_segmentation("fit", [f"--config={config}"]):
        raise AdaptError(
            f"`polyadapt vision {command}` compares classifiers: {config} is of pictures with"
            " masks, which fit, validate, test and segment take"
        )


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[], nargs="?")
    for option in ("--resume", "--set"):
        parser.add_argument(option, nargs="?")
    for name in ("data", "model.backbone"):
        parser.add_argument(f"--{name}", f"--{name}.class_path", dest=name, nargs="?")
    asked, _ = parser.parse_known_args(words)
    if asked.resume is not None:
        asked.config.insert(0, str(Path(asked.resume) / CONFIG))
    return asked


def _last(asked: argparse.Namespace, *keys: str) -> str | None:
    """The class, without its module, that is named last at a key."""
    word: str | None = getattr(asked, ".".join(keys))
    if word is not None:
        return word
    found = None
    for file in filter(None, asked.config):
        found = next(_named(_read(file), keys), found)
    return found


def _read(file: str) -> Any:
    """What the file holds; what is wrong with it is told by those who read all of it."""
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _named(held: Any, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        held = held.get(key) if isinstance(held, Mapping) else None
    name = held.get("class_path") if isinstance(held, Mapping) else held
    if isinstance(name, str):
        yield name


def _masked(data: str) -> bool | None:
    """Whether a class of data is of pictures with masks; None for a name that is not known."""
    from .medical.data import SegmentationData

    module, _, name = data.rpartition(".")
    if module and not module.startswith("polyadapt."):
        try:
            importlib.import_module(module)  # a user's own: its base tells
        except (ImportError, ValueError):
            return None
    for base, masked in ((SegmentationData, True), (ImageData, False)):
        if name in _names(base):
            return masked
    return None


def _names(base: type) -> Iterator[str]:
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        yield kind.__name__
        yield from _names(kind)


def _is_sam(backbone: str | None) -> bool:
    from .medical.backbones import Backbone

    return backbone is not None and backbone.rpartition(".")[2] in Backbone.kinds()
