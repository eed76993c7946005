"""A reconstructed scene: cameras, depths, confidences and images of its views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .cameras import world_points


@dataclass(frozen=True, eq=False)  # two tensors do not compare to one truth
class Reconstruction:
    """n views of one size [h, w]: what an alignment finds, and the truth of a generated scene.

    poses:    [n, 4, 4] camera to world, cameras look along +z, x to the right, y down
    focals:   [n] in pixels of these images, the principal point is (w / 2, h / 2)
    depths:   [n, h, w] z in the camera's frame; 0 or less, or NaN: no measurement
    weights:  [n, h, w] confidence of each depth; 0: not to be shown
    images:   [n, 3, h, w] in 0..1
    names:    one per view

    Raises `AdaptError` where the shapes do not belong together.

    >>> import torch
    >>> one = torch.ones(1, 2, 4)
    >>> scene = Reconstruction(
    ...     torch.eye(4)[None], torch.tensor([2.0]), one, one, torch.zeros(1, 3, 2, 4), ["a"]
    ... )
    >>> scene.points()[0, 0, 0].tolist()  # its pixel's centre is (0.5, 0.5): x = (0.5 - 2) / 2
    [-0.75, -0.25, 1.0]
    """

    poses: Tensor
    focals: Tensor
    depths: Tensor
    weights: Tensor
    images: Tensor
    names: Sequence[str]

    def __post_init__(self) -> None:
        n, h, w = self.depths.shape if self.depths.ndim == 3 else (len(self.names), 0, 0)
        wanted = {
            "poses": (n, 4, 4),
            "focals": (n,),
            "depths": (n, h, w),
            "weights": (n, h, w),
            "images": (n, 3, h, w),
        }
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise AdaptError(f"a reconstruction's {name} are {list(found)}, not {list(shape)}")
        if len(self.names) != n:
            raise AdaptError(f"a reconstruction of {n} views has {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.names)

    def points(self) -> Tensor:
        """[n, h, w, 3] in the world: R (d (u - w/2) / f, d (v - h/2) / f, d) + t.

        Pixel (row j, column i) has u = i + 0.5 and v = j + 0.5.
        """
        return world_points(self.depths, self.focals, self.poses)

    def shown(self) -> Tensor:
        """[n, h, w] bool: measured, finite and of a weight above 0."""
        return self.depths.isfinite() & (self.depths > 0) & (self.weights > 0)

    def to(self, device: torch.device | str) -> Reconstruction:
        """The same on another device."""
        return Reconstruction(
            self.poses.to(device),
            self.focals.to(device),
            self.depths.to(device),
            self.weights.to(device),
            self.images.to(device),
            self.names,
        )

    def of_views(self, views: Sequence[int]) -> Reconstruction:
        """The same world with some of its views, in the order asked."""
        chosen = list(views)
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: value[chosen] for name, value in named.items() if isinstance(value, Tensor)}
        return Reconstruction(**kept, names=[self.names[view] for view in chosen])
