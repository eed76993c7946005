"""`cache_prefix`: what the frozen backbone computes of an image before its first adapted block."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from torch import Generator
from torch.utils.data import DataLoader

from ..core.errors import AdaptError
from ..core.images.data import ImageData
from ..core.prefix_cache import PrefixCache
from ..core.run_files import RunFiles

Keep = Literal["none", "memory", "disk"]


def require_fixed_images(data: object, trainer: Trainer) -> ImageData:
    """Refuse data whose images are not the same in every epoch, or that are not numbered."""
    if not isinstance(data, ImageData):
        raise AdaptError(
            f"cache_prefix needs an ImageData, which numbers its images, not {type(data).__name__}"
        )
    if data.augmentation != "none":
        raise AdaptError(
            f"cache_prefix with augmentation={data.augmentation!r} is not allowed: an image must be"
            " the same in every epoch, so augmentation: none, or cache_prefix: none"
        )
    require_one_process(trainer)
    return data


def require_one_process(trainer: Trainer) -> None:
    """Refuse several: each would compute, and keep, what another one needs."""
    if trainer.world_size > 1:
        raise AdaptError(
            f"cache_prefix on {trainer.world_size} processes is not supported: train on one device,"
            " or with cache_prefix: none"
        )


def fill(cache: PrefixCache, data: ImageData, trainer: Trainer) -> None:
    """Compute the states of the training and validation images, until the cache is full.

    In the data's own order and in batches that never differ: a state's last bits may depend on the
    batch that it is computed in, and a resumed run must have the same states.
    """
    # A generator of its own: the run draws the same numbers with and without a cache.
    images, own = data.numbered_images(), Generator()
    loader = DataLoader(images, data.batch_size, num_workers=data.num_workers, generator=own)
    with trainer.precision_plugin.forward_context():
        for batch in loader:
            converted = trainer.precision_plugin.convert_input(batch)
            pictures, _, numbers = trainer.strategy.batch_to_device(converted)
            cache.fill(pictures, numbers)
            if cache.full:
                return


def folder_of(trainer: Trainer) -> Path:
    """Where the run writes its files, else the system's temporary folder."""
    runs = [callback.folder for callback in trainer.callbacks if isinstance(callback, RunFiles)]  # type: ignore[attr-defined]
    return runs[0] if runs and runs[0].is_dir() else Path(tempfile.gettempdir())
