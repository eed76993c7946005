"""Data in one word, for the command line, and either half of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import AdaptError
from ..core.images.data import ArrayData, ImageData, ImageFolders
from .coop import Half
from .data_sets import DATA_SETS, CoOpData
from .halves import HalfOfClasses


@dataclass(frozen=True)
class Where:
    """Images and their classes: a data module but for its shots, its seed and the like.

    >>> Where(CoOpData, {"name": "dtd", "root": "data"}).part("new").title
    'dtd-new'
    """

    kind: type[ImageData]
    source: Mapping[str, Any]
    """The settings of `kind` that say where the images are."""
    half: Half = "all"

    @property
    def title(self) -> str:
        """In a word."""
        source = self.source
        title = source["name"] if "name" in source else Path(*source.values()).name
        return title if self.half == "all" else f"{title}-{self.half}"

    def part(self, half: Half) -> Where:
        """Half of the classes."""
        return replace(self, half=half)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the module's class, as they are in a configuration."""
        if not self._wrapped:
            return {**self.source} if self.half == "all" else {**self.source, "half": self.half}
        whole = {"class_path": self.kind.__name__, "init_args": {**self.source}}
        return {"data": whole, "half": self.half}

    def spec(self, **common: Any) -> dict[str, Any]:
        """As `data` in a configuration."""
        name = (HalfOfClasses if self._wrapped else self.kind).__name__
        return {"class_path": name, "init_args": {**self.settings, **common}}

    def module(self, **common: Any) -> ImageData:
        """The data module; nothing is read yet."""
        if self._wrapped:
            return HalfOfClasses(self.kind(**self.source), self.half, **common)
        return self.kind(**self.settings, **common)

    @property
    def _wrapped(self) -> bool:
        """CoOp's data halves itself: it repeats images of a class that has too few of them."""
        return self.half != "all" and not issubclass(self.kind, CoOpData)


def require_test(data: ImageData, title: str = "the data") -> None:
    """`AdaptError` where nothing can be measured; `data` is set up and has its preprocessing."""
    if not len(data.images("test")):
        raise AdaptError(f"{title} has no test part: test_images, or a folder test/, is wanted")


def data_called(word: str, root: str) -> Where:
    """What a word stands for: a file of arrays, a folder, or a data set's name below `root`.

    >>> data_called("oxford_pets", "data").settings
    {'name': 'oxford_pets', 'root': 'data'}
    """
    if word in DATA_SETS:
        return Where(CoOpData, {"name": word, "root": root})
    if word.endswith(".npz"):
        return Where(ArrayData, {"path": word})
    if Path(word).is_dir():
        return Where(ImageFolders, {"root": word})
    raise AdaptError(
        f"there is no data {word!r}: a file .npz, a folder of images, or one of"
        f" {', '.join(DATA_SETS)} with --root"
    )
