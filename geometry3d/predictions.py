"""A network's answers about every pair of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .pointmaps import Pair, PointmapNetwork

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True, eq=False)
class Predictions:
    """m ordered pairs of n views of one size, and what the network said of each.

    edges: [m, 2], row (i, j): points1 is view i's pointmap, points2 view j's, both in i's frame.
    pair:  the pointmaps [m, h, w, 3] and confidences [m, h, w].
    """

    edges: Tensor
    pair: Pair

    def __post_init__(self) -> None:
        if self.pair.points1.shape != self.pair.points2.shape:
            one, two = (tuple(p.shape[1:3]) for p in (self.pair.points1, self.pair.points2))
            raise AdaptError(f"views of {one} and {two} pixels: all views need one size")
        if len(self.edges) != len(self.pair.points1) or not len(self.edges):
            raise AdaptError(f"{len(self.pair.points1)} predictions for {len(self.edges)} pairs")

    @property
    def views(self) -> int:
        """How many views the pairs speak of."""
        return int(self.edges.max()) + 1

    def to(self, device: torch.device | str) -> Predictions:
        """The same on another device, where an alignment then runs."""
        return Predictions(self.edges.to(device), Pair(*(part.to(device) for part in self.pair)))

    def only(self, chosen: Tensor) -> Predictions:
        """Some of the pairs: indices, or a bool for each."""
        return Predictions(self.edges[chosen], Pair(*(part[chosen] for part in self.pair)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every view."""
        height, width = self.pair.points1.shape[1:3]
        return height, width


def predict(
    network: PointmapNetwork,
    images: Tensor,
    edges: Tensor,
    batch: int = 2,
    progress: Progress | None = None,
) -> Predictions:
    """Ask the network about every pair: images [n, 3, h, w], edges [m, 2], `batch` at a time.

    The images go to the network's device batch by batch and the answers come back to the images'.
    The network stays in the mode it is in: call `eval` first.
    Raises AdaptError, one line, where the memory does not hold a batch.
    """
    home = next((p.device for p in network.parameters()), images.device)
    answers: list[Pair] = []
    height, width = images.shape[-2:]
    doing = f"asking about {batch} pairs of {width}x{height} pixels at a time"
    mend = "take a smaller batch, smaller images or fewer pairs"
    with torch.no_grad(), one_line_if_out_of_memory(doing, mend):
        for start in range(0, len(edges), batch):
            first, second = edges[start : start + batch].T
            said = network(images[first].to(home), images[second].to(home))
            answers.append(Pair(*(part.to(images.device, torch.float32) for part in said)))
            if progress:
                progress(min(start + batch, len(edges)), len(edges))
    return Predictions(edges, Pair(*map(torch.cat, zip(*answers, strict=True))))


@contextmanager
def one_line_if_out_of_memory(doing: str, mend: str) -> Iterator[None]:
    """An AdaptError in place of the allocator's page."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        exhausted = isinstance(error, MemoryError)
        exhausted |= isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not exhausted:
            raise
        raise AdaptError(f"out of memory {doing}: {mend}") from None
