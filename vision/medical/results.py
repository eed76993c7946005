"""What a run of `segment` leaves: a mask for each file, overlays and a table of areas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.container import write_atomically
from ...core.errors import StoreError
from .jobs import Job
from .mask_files import mask_content
from .metrics import MaskScores, means, score
from .overlay import overlay
from .segmenting import Seen

Mask = NDArray[np.uint8]
TABLE = "areas.csv"
LARGEST_OVERLAY = 2048
_COLUMNS = ("image", "slice", "height", "width", "pixels", "mm2")
_SCORES = ("dice", "iou", "cldice", "hd95", "empty")


@dataclass(frozen=True)
class Row:
    """One picture or slice: its size, how much of it is marked, and how well."""

    image: str
    slice: int | None
    height: int
    width: int
    pixels: int
    mm2: float | None
    scores: MaskScores | None

    @staticmethod
    def of(seen: Seen, mask: Mask) -> Row:
        """mm2 is known where the file's header has the pixels' spacing."""
        picture, marked = seen.picture, int(mask.sum(dtype=np.int64))
        area = picture.spacing and picture.spacing[0] * picture.spacing[1] * marked
        layer = seen.layer if seen.layers > 1 else None
        scores = None if seen.truth is None else score(mask, seen.truth, picture.spacing)
        return Row(str(seen.job.file), layer, *picture.size, marked, area, scores)


@dataclass
class Results:
    """Takes masks as they come; a file's own are written when its last slice is there.

    `out` gets masks and the table, `overlays` a picture of each mask (at most 2,048 pixels a side)
    in the picture's place. So what was stopped leaves whole files, and the table of those.
    """

    out: Path
    overlays: Path | None = None
    rows: list[Row] = field(default_factory=list)
    _open: list[tuple[Row, Mask, bytes | None]] = field(default_factory=list)

    def take(self, seen: Seen, mask: Mask) -> list[Row]:
        """Rows of the file that is complete with this mask, if it is."""
        if seen.layer == 0:  # what is left of a file that failed in between is dropped
            self._open = []
        shown = None if self.overlays is None else _overlay(seen, mask)
        self._open.append((Row.of(seen, mask), mask, shown))
        return self._write(seen.job) if len(self._open) == seen.layers else []

    def _write(self, job: Job) -> list[Row]:
        found, self._open = self._open, []
        _write(job.mask, mask_content(job.file, [mask for _, mask, _ in found]))
        for row, _, shown in found:
            if self.overlays is not None and shown is not None:
                _write(overlay_file(self.overlays, job, row.slice), shown)
        new = [row for row, _, _ in found]
        self.rows += new
        return new

    def write_table(self) -> None:
        """Areas, and scores where there are true masks, as CSV."""
        _write(self.out / TABLE, table(self.rows))

    def summary(self) -> str:
        """The mean scores in a line; empty without true masks."""
        scores = [row.scores for row in self.rows if row.scores is not None]
        if not scores:
            return ""
        return ", ".join(f"{name} {value:.4g}" for name, value in means(scores).items())


def overlay_file(folder: Path, job: Job, layer: int | None) -> Path:
    """Where an overlay goes: NAME.png, of a volume NAME_0000.png and so on."""
    return folder / (f"{job.name}.png" if layer is None else f"{job.name}_{layer:04}.png")


def _overlay(seen: Seen, mask: Mask) -> bytes:
    return overlay(*(_small(a) for a in (seen.picture.pixels, mask, seen.truth) if a is not None))


def _small(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[h, w, 3] or a mask [h, w], for the eye; a mask's pixel is marked where half of it was."""
    scale = LARGEST_OVERLAY / max(values.shape[:2])
    if scale >= 1:
        return values
    size = max(round(values.shape[1] * scale), 1), max(round(values.shape[0] * scale), 1)
    full = values if values.ndim == 3 else values * np.uint8(255)
    small = np.asarray(Image.fromarray(full).resize(size, Image.Resampling.BOX))
    return small if values.ndim == 3 else (small > 127).astype(np.uint8)


def table(rows: Sequence[Row]) -> bytes:
    """CSV, with the scores' columns where any row has scores; what is not known is empty.

    >>> table([Row("a.png", None, 2, 3, 4, 0.5, None)])
    b'image,slice,height,width,pixels,mm2\\na.png,,2,3,4,0.5\\n'
    """
    scored = any(row.scores for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        _COLUMNS + (_SCORES if scored else ()),
        restval="",
        extrasaction="ignore",
        lineterminator="\n",
    )
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row) | (asdict(row.scores) if row.scores else {}))
    return text.getvalue().encode()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    write_atomically(path, content)
