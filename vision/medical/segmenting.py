"""From files to masks, slice by slice: nothing but a batch is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import AdaptError
from .files import DICOM, NIFTI, File
from .inference import Network, in_windows, prompted, whole
from .jobs import Job
from .masks import Picture, read_mask, read_picture
from .prompts import Places
from .sam import Prompt
from .scans import layers_of
from .view import View

Mask = NDArray[np.uint8]
_MOST_PIXELS = 16_000_000  # of a batch, at their own size: photographs of 50 million come alone


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How pictures are segmented.

    threshold: the probability above which a pixel is marked; window: side of sliding windows in
    native pixels, None sees each picture as a whole; batch: squares at once; levels: the window of
    `read_picture`; places: boxes and points; labels: values of true masks that count.
    """

    threshold: float = 0.5
    window: int | None = None
    batch: int = 4
    levels: tuple[float, float] | None = None
    places: Places | None = None
    labels: tuple[int, ...] = ()

    @property
    def limit(self) -> float:
        """The logit above which a pixel is marked.

        >>> Manner().limit, round(Manner(threshold=0.9).limit, 3)
        (0.0, 2.197)
        """
        return math.log(self.threshold / (1 - self.threshold))


@dataclass(frozen=True)
class Seen:
    """A picture, or slice number `layer` of a scan of `layers`, as it was read."""

    job: Job
    layer: int
    layers: int
    picture: Picture
    prompt: Prompt | None
    truth: Mask | None


@dataclass(frozen=True)
class Failed:
    """A file that could not be read as asked; some of its slices may have come before."""

    job: Job
    error: AdaptError


def segment_all(
    network: Network,
    view: View,
    jobs: Iterable[Job],
    manner: Manner,
    done: Callable[[Job, float], None] = lambda *_: None,
) -> Iterator[tuple[Seen, Mask] | Failed]:
    """The mask of each picture and slice, uint8 [h, w] of 0 and 1, in order.

    `done` is told how much of a file is through. A file that cannot be read is told in its place,
    and the others are segmented.
    """
    alone = manner.window is not None or manner.places is not None
    for batch in _batches(_read(jobs, view, manner), 1 if alone else manner.batch):
        yield from _segmented(network, view, batch, manner, done)
        batch.clear()  # before the next large picture is read


def _segmented(
    network: Network,
    view: View,
    batch: Sequence[Seen | Failed],
    manner: Manner,
    done: Callable[[Job, float], None],
) -> Iterator[tuple[Seen, Mask] | Failed]:
    good = [one for one in batch if isinstance(one, Seen)]
    found = _answers(network, view, good, manner, done)
    for one in batch:
        if isinstance(one, Failed):
            yield one
        else:
            yield one, (next(found) > manner.limit).numpy().view(np.uint8)


def _read(jobs: Iterable[Job], view: View, manner: Manner) -> Iterator[Seen | Failed]:
    for job in jobs:
        try:
            yield from _slices(job, view, manner)
        except AdaptError as error:
            yield Failed(job, error)


def _slices(job: Job, view: View, manner: Manner) -> Iterator[Seen]:
    truth, layers = job.truth, _layers(job.file)
    if truth is not None and _layers(truth) != layers:
        raise AdaptError(f"{truth} has {_layers(truth)} slices, {job.file} {layers}")
    for layer in range(layers):
        picture = read_picture(_slice(job.file, layer), manner.levels)
        true = None
        if truth is not None:
            true = read_mask(_slice(truth, layer), picture, manner.labels)
        names = [job.name, job.file.stem]
        prompt = manner.places.prompt(names, picture.size, view) if manner.places else None
        yield Seen(job, layer, layers, picture, prompt, true)


def _layers(file: File) -> int:
    return layers_of(file) if is_scan(file) else 1


def is_scan(file: File) -> bool:
    """Whether it may have several slices."""
    return file.suffix in (*NIFTI, *DICOM)


def _slice(file: File, layer: int) -> File:
    return replace(file, layer=layer) if is_scan(file) else file


def _batches(read: Iterable[Seen | Failed], most: int) -> Iterator[list[Seen | Failed]]:
    """At most so many, and fewer of large pictures."""
    batch: list[Seen | Failed] = []
    pixels = 0
    for one in read:
        batch.append(one)
        pixels += math.prod(one.picture.size) if isinstance(one, Seen) else 0
        if len(batch) == most or pixels >= _MOST_PIXELS:
            yield batch
            batch, pixels = [], 0
            del one  # before the next large picture is read
    if batch:
        yield batch


def _answers(
    network: Network,
    view: View,
    seen: Sequence[Seen],
    manner: Manner,
    done: Callable[[Job, float], None],
) -> Iterator[Tensor]:
    if manner.window is None and manner.places is None and seen:
        yield from whole(network, view, [one.picture.pixels for one in seen])
        return
    for one in seen:
        pixels = one.picture.pixels
        if one.prompt is not None:
            yield prompted(network, view, pixels, one.prompt)
        elif manner.window is not None:
            through = partial(_through, one, done)
            yield in_windows(network, view, pixels, manner.window, manner.batch, through)


def _through(one: Seen, done: Callable[[Job, float], None], share: float) -> None:
    done(one.job, (one.layer + share) / one.layers)
