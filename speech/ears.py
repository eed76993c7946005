"""Which Whisper, and which adapter set, listens: what the options of a command name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from ..core.errors import AdaptError
from ..core.sets import AdapterSet, sets_of
from .adapters import load_set
from .backbones import Backbone, OfflineTinyEn, OpenAIWhisper, TransformersWhisper
from .bundle import Bundle
from .description import Description, describe
from .fusion import Fusion
from .model import Speech, speech_of
from .offline import WEIGHTS
from .transcription import Choose, Conditions

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Wanted:
    """What was asked for: a model by name, a set's file or a bundle, and what overrides them."""

    model: str | None = None
    set: Path | None = None
    sets: Path | None = None
    select: str = AUTO
    language: str | None = None
    task: str | None = None
    timestamps: bool | None = None
    filmed: bool = False
    """The recordings have videos."""


def backbone_named(name: str) -> Backbone:
    """`tiny.en` or a .pt file: openai-whisper's; with a slash or a folder: transformers'.

    `offline`, or `offline:transformers`, is tiny.en from a package index.

    >>> backbone_named("openai/whisper-small"), backbone_named("offline")
    (TransformersWhisper(name='openai/whisper-small'), OfflineTinyEn(layout='openai'))
    """
    if name.partition(":")[0] == "offline":
        return OfflineTinyEn(layout=name.partition(":")[2] or "openai")  # type: ignore[arg-type]
    if Path(name).is_dir() or ("/" in name and not Path(name).is_file()):
        return TransformersWhisper(name=name)
    return OpenAIWhisper(name=name)


def ears(wanted: Wanted) -> tuple[Speech, Conditions | Choose]:
    """The Whisper with its sets attached, on the best device, and under which conditions it hears.

    Raises `AdaptError` for a set or bundle that is missing, damaged or made on another Whisper.
    """
    if wanted.set is not None and wanted.sets is not None:
        raise AdaptError("give --set FILE or --sets FOLDER, not both")
    if wanted.filmed and wanted.set is None and wanted.sets is None:
        raise AdaptError("--video needs an audio-visual set: give --set FILE or --sets FOLDER too")
    if wanted.set is not None:
        return _with_set(wanted, wanted.set)
    if wanted.sets is not None:
        return _with_bundle(wanted, Bundle.open(wanted.sets))
    backbone = backbone_named(wanted.model) if wanted.model else _default()
    return built(backbone), _told(Conditions(), wanted)


def _with_set(wanted: Wanted, file: Path) -> tuple[Speech, Conditions]:
    about = describe(file)
    if wanted.filmed:
        _require_filmed([about], file)
    speech = built(backbone_named(wanted.model) if wanted.model else about.backbone)
    if _blind(about, wanted):
        _say_blind(file)
        return speech, _told(Conditions(), wanted)
    made = load_set(speech, file)
    made.to(speech.device)
    return speech, _told(_conditions(about, made), wanted)


def _with_bundle(wanted: Wanted, bundle: Bundle) -> tuple[Speech, Conditions | Choose]:
    one = wanted.select not in (AUTO, NONE)
    if wanted.select == AUTO and bundle.deaf:
        raise AdaptError(
            f"{bundle.folder}: sets cannot be chosen automatically: {bundle.deaf}; name one of"
            f" {', '.join(bundle.names)} with --select"
        )
    if one and wanted.select in bundle.damaged:
        raise AdaptError(f"set {wanted.select!r} is damaged: {bundle.damaged[wanted.select]}")
    abouts = {name: describe(bundle.file(name)) for name in _needed(wanted.select, bundle)}
    if wanted.filmed:
        _require_filmed(abouts.values(), bundle.folder)
    speech = built(_backbone(wanted, bundle, list(abouts.values())))
    base = _told(Conditions(), wanted)
    if wanted.select == NONE:
        return speech, base
    if one and _blind(abouts[wanted.select], wanted):
        _say_blind(bundle.file(wanted.select))
        return speech, base
    if one:
        made = load_set(speech, bundle.file(wanted.select), wanted.select)
        made.to(speech.device)
        return speech, _told(_conditions(abouts[wanted.select], made), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said below, in our own words
        bundle.load_onto(speech)
    for name, cause in bundle.damaged.items():
        print(f"polyadapt: set {name!r} is left out: {cause}", file=sys.stderr)
    by_name = {
        name: _told(_conditions(abouts[name], made), wanted)
        for name, made in sets_of(speech.model).items()
        if not _blind(abouts[name], wanted)
    }
    for name in [n for n, about in abouts.items() if _blind(about, wanted)]:
        _say_blind(bundle.file(name))
    return speech, lambda audio: by_name.get(bundle.choose(audio).name or "", base)


def _needed(select: str, bundle: Bundle) -> list[str]:
    if select in (AUTO, NONE):
        return bundle.names
    bundle.file(select)  # refuses an unknown name
    return [select]


def _backbone(wanted: Wanted, bundle: Bundle, abouts: Sequence[Description]) -> Backbone:
    if wanted.model:
        return backbone_named(wanted.model)
    if not abouts:
        raise AdaptError(f"{bundle.folder} holds no intact set: name the Whisper with --model")
    return abouts[0].backbone


def _blind(about: Description, wanted: Wanted) -> bool:
    """The set acts on video only, and there is none."""
    return about.filmed and not wanted.filmed


def _say_blind(file: Path) -> None:
    said = "is an audio-visual set: without --video the plain Whisper hears"
    print(f"polyadapt: {file} {said}", file=sys.stderr)


def _require_filmed(abouts: Iterable[Description], where: Path) -> None:
    if not any(about.filmed for about in abouts):
        raise AdaptError(f"--video: {where} holds no audio-visual set")


def _conditions(about: Description, made: AdapterSet) -> Conditions:
    return Conditions(
        set=made.name,
        seconds=about.seconds,
        language=about.language,
        task=about.task,
        timestamps=about.timestamps,
        longest=about.longest,
        fusion=_fusion_of(made) if about.filmed else None,
    )


def _fusion_of(made: AdapterSet) -> Fusion:
    from .avsr import fusion_of  # takes Lightning, which makes one wait, for training

    return fusion_of(made)


def _told(conditions: Conditions, wanted: Wanted) -> Conditions:
    """The conditions, with what was asked for instead."""
    asked = {"language": wanted.language, "task": wanted.task, "timestamps": wanted.timestamps}
    return replace(conditions, **{k: v for k, v in asked.items() if v is not None})  # type: ignore[arg-type]


def _default() -> Backbone:
    try:
        metadata.distribution(WEIGHTS.package)
    except metadata.PackageNotFoundError:
        raise AdaptError(
            "name the Whisper with --model (tiny.en, base, small, ..., turbo; openai/whisper-small;"
            " a folder), or a set with --set: it knows its own"
        ) from None
    print("polyadapt: no --model given: tiny.en, English, from its package", file=sys.stderr)
    return OfflineTinyEn()


def built(backbone: Backbone) -> Speech:
    """The frozen Whisper, on the best device."""
    model = backbone.build().eval().requires_grad_(False)
    return speech_of(model.to("cuda" if torch.cuda.is_available() else "cpu"))
