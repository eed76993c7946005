"""`cache_prefix`: what a SAM's frozen encoder computes of a picture before its first adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ...core.errors import AdaptError
from ...core.prefix_cache import PrefixCache
from ..frozen_prefix import require_one_process
from .data import Batch, SegmentationData
from .encoder_prefix import encoder_chain
from .mask_head import PARTS
from .sam import SegmentAnything

_PARTS = ("train", "val")


class KeptPrefix:
    """Embeddings of a data module's training and validation pictures, their prefix computed once.

    kept(batch, "train") is sam.encode(batch.image), up to rounding. See `PrefixCache` for bounds,
    the folder, and what is refused; data whose pictures vary are refused here.
    """

    def __init__(
        self,
        sam: SegmentAnything,
        data: SegmentationData,
        *,
        max_bytes: int = 2 << 30,
        folder: Path | None = None,
    ) -> None:
        require_fixed_pictures(data)
        counts = [len(data.cases(part)) for part in _PARTS]
        self._first = dict(zip(_PARTS, (0, counts[0]), strict=True))
        self.cache = PrefixCache(
            sam, sum(counts), max_bytes=max_bytes, folder=folder, chain=encoder_chain(sam)
        )

    def __call__(self, batch: Batch, part: str) -> Tensor:
        """Embeddings [b, d, g, g] of the pictures of one part."""
        return self.cache(batch.image, batch.number + self._first[part])

    def fill(self, data: SegmentationData, trainer: Trainer) -> None:
        """Compute all states that fit, in an order and in batches that never differ.

        A state's last bits may depend on the batch that it is computed in, and a resumed run must
        have the same states.
        """
        with trainer.precision_plugin.forward_context():
            for part in _PARTS:
                for batch in DataLoader(data.pictures(part), data.batch_size):
                    there = trainer.strategy.batch_to_device(
                        trainer.precision_plugin.convert_input(batch)
                    )
                    self.cache.fill(there.image, there.number + self._first[part])
                    if self.cache.full:
                        return


def require_fixed_pictures(data: object, trainer: Trainer | None = None) -> SegmentationData:
    """Refuse data whose pictures are not the same in every epoch, and several processes."""
    if trainer is not None:
        require_one_process(trainer)
    if not isinstance(data, SegmentationData):
        raise AdaptError(
            "cache_prefix needs a SegmentationData, which numbers its pictures, not"
            f" {type(data).__name__}"
        )
    for name, value, fixed in (
        ("augmentation", data.augmentation, "none"),
        ("crop", data.crop, None),
    ):
        if value != fixed:
            raise AdaptError(
                f"cache_prefix with {name}={value!r} is not allowed: a picture must be the same in"
                f" every epoch, so {name}: {fixed or 'null'}, or cache_prefix: none"
            )
    return data


def require_keepable(sam: SegmentAnything, parts: Sequence[str]) -> None:
    """Refuse, before there are data, a SAM whose prefix cannot be kept, or whose head has it."""
    if inside := [part for part in parts if PARTS[part].startswith("vision_encoder")]:
        raise AdaptError(
            f"cache_prefix with the part {inside[0]!r} is not allowed: what is kept of the encoder"
            " lacks it; leave it out, or cache_prefix: none"
        )
    PrefixCache(sam, samples=1, chain=encoder_chain(sam))
