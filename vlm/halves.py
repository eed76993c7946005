"""Half of the classes of any data, as a data module (CoCoOp's protocol, arXiv 2203.05557)."""

from __future__ import annotations

from typing import Any

from ..core.images.data import ImageData
from ..core.images.sources import Sources
from .coop import Half, half_of


class HalfOfClasses(ImageData):
    """The base classes (the first ceil(n / 2)) or the new ones (the rest) of other data.

    `shots`, seed and the further settings are those given here, not those of `data`.

    >>> from polyadapt.core.images.data import ArrayData
    >>> import numpy as np
    >>> images = np.zeros((8, 4, 4), dtype=np.uint8)
    >>> np.savez("four.npz", train_images=images, train_labels=np.arange(8) % 4)
    >>> new = HalfOfClasses(ArrayData("four.npz"), "new", val_share=0.0)
    >>> new.setup()
    >>> new.classes
    ('2', '3')
    """

    def __init__(self, data: ImageData, half: Half, **common: Any) -> None:
        super().__init__(**common)
        self.whole = data
        self.half: Half = half

    def prepare_data(self) -> None:
        self.whole.prepare_data()

    def read(self) -> Sources:
        return half_of(self.whole.read(), self.half)
