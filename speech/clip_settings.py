"""Clips that a command names: manifests, or the data of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.complaints import in_one_line
from ..core.errors import AdaptError
from .data import Manifest, SpeechData


def data_named(files: Sequence[Path]) -> SpeechData:
    """The data of one configuration (.yaml, with `data` as `fit` has it), or of manifests."""
    settings = [file for file in files if file.suffix.lower() in (".yaml", ".yml")]
    if not settings:
        return Manifest([str(file) for file in files])
    if len(files) > 1:
        raise AdaptError(f"{settings[0]} is a configuration: give one, or manifests alone")
    return _configured(settings[0])


def _configured(file: Path) -> SpeechData:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=SpeechData, required=True)
    kinds = [kind.__name__ for kind in SpeechData.__subclasses__()]
    with in_one_line(parser, {"data": kinds}):
        built = parser.instantiate_classes(parser.parse_object({"data": _section(file)})).data
    assert isinstance(built, SpeechData)
    return built


def _section(file: Path) -> Any:
    import yaml

    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AdaptError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not isinstance(held, dict) or "data" not in held:
        raise AdaptError(f"the configuration {file} has no key 'data'")
    return held["data"]
