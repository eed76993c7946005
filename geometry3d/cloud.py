"""What is drawn of a reconstruction: coloured points, and a frame for every camera."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .reconstruction import Reconstruction


@dataclass(frozen=True, eq=False)
class Cloud:
    """p points in the world, their colours, and the view and pixel that each comes from."""

    points: Tensor  # [p, 3] fp32
    colours: Tensor  # [p, 3] uint8
    views: Tensor  # [p]
    pixels: Tensor  # [p, 2]: column, row


def cloud_of(scene: Reconstruction, above: float = 0.0, most: int | None = None) -> Cloud:
    """The points of all pixels whose weight is above `above`; of more than `most`, evenly many.

    Raises AdaptError where no pixel is, or cameras are not known (NaN).

    >>> one = torch.ones(1, 2, 2)
    >>> scene = Reconstruction(
    ...     torch.eye(4)[None], torch.ones(1), one, one, torch.ones(1, 3, 2, 2), ["a"]
    ... )
    >>> cloud = cloud_of(scene, most=2)
    >>> cloud.points.tolist(), cloud.colours[0].tolist()
    ([[-0.5, -0.5, 1.0], [0.5, 0.5, 1.0]], [255, 255, 255])
    """
    if not (scene.focals.isfinite().all() and scene.poses.isfinite().all()):
        raise AdaptError("a reconstruction with unknown focals or poses has no points to write")
    shown = (scene.shown() & (scene.weights > above)).nonzero()
    if len(shown) == 0:
        raise AdaptError(f"no point has a weight above {above:g}: there is nothing to write")
    if most is not None and len(shown) > most:
        shown = shown[torch.linspace(0, len(shown) - 1, most).round().long()]
    views, rows, columns = shown.unbind(1)
    colours = scene.images.permute(0, 2, 3, 1)[views, rows, columns]
    return Cloud(
        scene.points()[views, rows, columns].float().cpu(),
        (colours.clamp(0, 1) * 255).round().byte().cpu(),
        views.cpu(),
        torch.stack([columns, rows], 1).cpu(),
    )


def frames_of(scene: Reconstruction, share: float = 0.1) -> Tensor:
    """Lines [n * 8, 2, 3]: each camera's pyramid, the image `share` of the median depth away.

    A camera's first four lines go from its centre to the image's corners (left and right above,
    right and left below), the others around the image.
    """
    _, h, w = scene.depths.shape
    shown = scene.shown()
    away = share * scene.depths[shown].median() if shown.any() else scene.depths.new_ones(())
    corners = scene.poses.new_tensor([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
    image = corners / scene.focals[:, None, None]
    local = torch.cat([image, torch.ones_like(image[..., :1])], -1) * away
    centres = scene.poses[:, None, :3, 3].expand(-1, 4, -1)
    around = local @ scene.poses[:, :3, :3].mT + centres
    sides = torch.stack([around, around.roll(-1, 1)], 2)
    lines = torch.cat([torch.stack([centres, around], 2), sides], 1)
    return lines.reshape(-1, 2, 3).float().cpu()
