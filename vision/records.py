"""One fit, measured and recorded; a record that is there already stands for its fit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.records import RECORD, digest

if TYPE_CHECKING:
    from ..core.configuration import DomainCLI

Part = Literal["val", "test"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a number needs beside it to be compared with another."""

    name: str
    method: str
    rank: int | None
    backbone: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    interpolation: str
    train_images: int
    part: str
    seed: int
    epochs: int
    epoch_rule: str
    mean_convention: str
    top1: float
    macro_f1: float
    calibration_error: float
    loss: float
    trainable: int
    head: int
    with_head: int
    seconds: float
    settings: str
    """SHA-256 of the run's whole configuration."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fit by the words of `polyadapt vision fit`; its last epoch's file, measured on one part.

    `folder` gets the run's files and, last of all, its record. A fit whose record is there is not
    repeated; one that was stopped before its record was written starts again.
    """

    words: tuple[str, ...]
    folder: Path
    part: Part
    name: str
    mean_convention: str = "none"

    def finished(self) -> Record | None:
        """The record, if it is there. Nothing is fitted, but the configuration is read.

        Raises `AdaptError` for a configuration that cannot be read, for a record of other settings
        and for a `monitor`, which would report another epoch than the last.
        """
        found = read_record(self.folder)
        mine = self._settings(), self.part, self.name
        if found is not None and (found.settings, found.part, found.name) != mine:
            raise AdaptError(f"{self.folder} holds a run with other settings: choose another --out")
        return found

    def record(self) -> Record:
        """Fit and measure, unless that is done."""
        from ..core.complaints import errors_in_one_line
        from ..core.fitting import calm

        found = self.finished()
        if found is None:
            with calm(), errors_in_one_line():
                measured = _fitted([*self.words, f"--run={self.folder}"], self.folder, self.part)
            found = Record(
                name=self.name,
                mean_convention=self.mean_convention,
                settings=self._settings(),
                **measured,
            )
            content = json.dumps(dataclasses.asdict(found)).encode()
            write_atomically(self.folder / RECORD, content)
        return found

    def _settings(self) -> str:
        from ..core.configuration import DomainCLI
        from ..core.fitting import calm
        from .configuration import DOMAIN

        with calm():
            parsed = DomainCLI(DOMAIN, "fit", self.words, build=False)
        if parsed.config.monitor is not None:
            raise AdaptError(
                f"monitor={parsed.config.monitor!r} is not allowed here: what is reported is the"
                " last epoch, not the best one"
            )
        return digest(parsed.effective())


def records_of(fits: Sequence[Fit]) -> list[Record]:
    """Every fit's record, those that are missing made; nothing is fitted if any is refused."""
    done = [fit.finished() for fit in fits]
    left = done.count(None)
    print(f"{len(fits)} fits, {len(fits) - left} of them finished before", flush=True)
    found: list[Record] = []
    for fit, record in zip(fits, done, strict=True):
        found.append(record or fit.record())
        if record is None:
            told = f"{found[-1].top1:.1%}, {found[-1].seconds:.0f} s"
            print(f"{fit.name}, seed {found[-1].seed}: {told}", flush=True)
    return found


def seeded(seed: int) -> list[str]:
    """The words that give a fit and its data a seed."""
    return [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]


def read_record(folder: Path) -> Record | None:
    """The record of a finished fit, if there is one."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(file.read_text())
        return Record(**fields | {name: tuple(fields[name]) for name in ("mean", "std")})
    except (KeyError, TypeError, ValueError) as error:
        raise AdaptError(f"{file} is no record of a fit: {error}; remove it") from error


def _fitted(words: Sequence[str], folder: Path, part: Part) -> dict[str, Any]:
    from ..core.configuration import DomainCLI
    from ..core.fitting import measure, train
    from ..core.run_folder import ADAPTER, CONFIG
    from .configuration import DOMAIN

    cli = DomainCLI(DOMAIN, "fit", words)
    start = time.perf_counter()
    train(cli)
    seconds = time.perf_counter() - start
    saved = [f"--config={folder / CONFIG}", f"--set={folder / ADAPTER}"]
    metrics = measure(DOMAIN, "validate" if part == "val" else "test", saved, verbose=False)
    shares = ("top1", "macro_f1", "calibration_error", "loss")
    found = {share: metrics[f"{part}_{share}"] for share in shares}
    return {**_about(cli), **found, "part": part, "seconds": seconds}


def _about(cli: DomainCLI) -> dict[str, Any]:
    task, wants = cli.model, cli.model.preprocessing
    spec = task.spec.to_json()
    recipe = task.adapters.recipe
    trainable = task.adapters.trainable_count()
    head = sum(parameter.numel() for parameter in task.head.parameters())
    crop = "" if wants.crop_pct == 1 else f" of 1 / {wants.crop_pct:g}"
    resize = "squash" if wants.crop_mode == "squash" else "shorter side, centre crop"
    return {
        "method": type(recipe).__name__,
        "rank": getattr(recipe, "rank", None),
        "backbone": spec.get("name", spec["backbone"]),
        "mean": wants.mean,
        "std": wants.std,
        "resize": f"{wants.size[0]}x{wants.size[1]}, {resize}{crop}",
        "interpolation": wants.interpolation,
        "train_images": len(cli.datamodule.images("train")),
        "seed": cli.datamodule.seed,
        "epochs": cli.trainer.current_epoch,
        "epoch_rule": "last",
        "trainable": trainable,
        "head": head,
        "with_head": trainable + head,
    }
