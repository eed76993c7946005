"""Which pairs of images the network is asked about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import AdaptError

MOST_PAIRS = 1000  # ordered pairs of a complete graph: 32 images


@dataclass(frozen=True)
class Complete:
    """Every image with every other, in both orders: n (n - 1) pairs."""

    most_pairs: int = MOST_PAIRS

    def edges(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] -> ordered pairs [m, 2].

        >>> Complete().edges(torch.zeros(3, 3, 4, 4)).tolist()
        [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
        """
        n = _at_least_two(images)
        if n * (n - 1) > self.most_pairs:
            raise AdaptError(
                f"{n} images make {n * (n - 1)} ordered pairs, more than {self.most_pairs}: "
                "take the graph `window` (a film) or `retrieval` (loose images), or fewer images"
            )
        return _both_ways((i, j) for i in range(n) for j in range(i))


@dataclass(frozen=True)
class Window:
    """Every image with the `reach` next ones, in both orders: for frames of a film.

    `closed` joins the end to the beginning, for a camera that comes back.
    """

    reach: int = 5
    closed: bool = False

    def edges(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] -> ordered pairs [m, 2]."""
        n = _at_least_two(images)
        if self.reach < 1:
            raise AdaptError(f"a window that reaches {self.reach} images on: at least 1")
        steps = [(i, i + k) for i in range(n) for k in range(1, min(self.reach, n - 1) + 1)]
        return _both_ways((i, j % n) for i, j in steps if (self.closed or j < n) and j % n != i)


@dataclass(frozen=True)
class Retrieval:
    """Every image with the `neighbours` most alike, in both orders: for loose images.

    Alike is the cosine of the images' thumbnails (8 x 8 grey, mean and contrast removed) or of
    descriptors given to `edges`. A spanning tree of the most alike pairs keeps all in one piece.
    """

    neighbours: int = 8

    def edges(self, images: Tensor, descriptors: Tensor | None = None) -> Tensor:
        """Images [n, 3, h, w], perhaps descriptors [n, d] -> ordered pairs [m, 2]."""
        n = _at_least_two(images)
        if self.neighbours < 1:
            raise AdaptError(f"a graph with {self.neighbours} neighbours: at least 1")
        described = F.normalize(thumbnails(images) if descriptors is None else descriptors, dim=1)
        alike = (described @ described.mT).fill_diagonal_(-torch.inf)
        nearest = alike.topk(min(self.neighbours, n - 1)).indices.tolist()
        near = [(i, j) for i, row in enumerate(nearest) for j in row]
        return _both_ways([*near, *spanning_tree(alike)])


Graph = Complete | Window | Retrieval


def thumbnails(images: Tensor) -> Tensor:
    """Images [n, 3, h, w] as vectors [n, 64]: 8 x 8 grey values less their mean."""
    grey = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
    return grey - grey.mean(1, keepdim=True)


def spanning_tree(score: Tensor) -> list[tuple[int, int]]:
    """Of symmetric scores [n, n] the tree of the best pairs, each (a node in the tree, a new one).

    -inf says that two nodes cannot be joined; the tree then spans only the piece that holds the
    best pair, and is empty where there is no pair.
    """
    if score.max() == -torch.inf:
        return []
    root = int(score.argmax()) // len(score)
    inside = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    inside[root] = True
    tree: list[tuple[int, int]] = []
    while not inside.all():
        across = score.masked_fill(~inside[:, None] | inside[None, :], -torch.inf)
        if across.max() == -torch.inf:
            break
        known, new = divmod(int(across.argmax()), len(score))
        inside[new] = True
        tree.append((known, new))
    return tree


def _at_least_two(images: Tensor) -> int:
    if len(images) < 2:
        raise AdaptError(f"{len(images)} image: a scene needs two or more")
    return len(images)


def _both_ways(pairs: Iterable[tuple[int, int]]) -> Tensor:
    one_way = {(min(pair), max(pair)) for pair in pairs}
    return torch.tensor(sorted(one_way | {(j, i) for i, j in one_way}))
