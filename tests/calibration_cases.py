"""A network whose second pointmap is too flat: what the first ones know can mend it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from polyadapt.geometry3d.backbones import Backbone
from polyadapt.geometry3d.calibration import Survey, survey
from polyadapt.geometry3d.cameras import camera_points, inverse_poses, moved
from polyadapt.geometry3d.pointmaps import Pair, PointmapNetwork
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.weights import Calibrated
from polyadapt.tests.geometry_cases import small_scene

HEIGHT, WIDTH, FOCAL = 12, 16, 14.0
VIEWS = 6
SITE = "flatten"
FAR = 8.0  # what a white pixel is


@cache
def hills(views: int = VIEWS, seed: int = 0) -> Reconstruction:
    """Cameras of `small_scene`, each before a smooth relief of its own, 2 to 6 away.

    The images hold the depth in 255 steps. An alignment does not ask whether views fit each other,
    and so the labels of one pair tell nothing of another's.
    """
    poses = small_scene(views).poses
    coarse = torch.randn(views, 1, 3, 4, generator=Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear", align_corners=True)
    images = ((4 + smooth.clamp(-2, 2)) / FAR * 255).round() / 255
    depths = FAR * images[:, 0]
    names = [f"hill{number}.png" for number in range(views)]
    focals, ones = torch.full((views,), FOCAL), torch.ones_like(depths)
    return Reconstruction(poses, focals, depths, ones, images.expand(-1, 3, -1, -1), names)


class Flat(PointmapNetwork):
    """Knows the cameras of `hills`, and that the images hold the depth.

    The first pointmap is right and sure. The second one's depth is m + (sum of W) (d - m), with m
    the mean depth: W's sum should be 1 and is 0.6, which loses 40 % of the relief.
    """

    def __init__(self, views: int = VIEWS, seed: int = 0) -> None:
        super().__init__()
        self.scene = hills(views, seed)
        self.flatten = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.flatten.weight.copy_(torch.tensor([[0.3, 0.3], [0.0, 0.0]]))

    def forward(self, first: Tensor, second: Tensor) -> Pair:
        i, j = self._numbers(first), self._numbers(second)
        focals, poses = self.scene.focals, self.scene.poses
        depth = FAR * second[:, 0]
        mean = depth.mean((1, 2), keepdim=True)
        relief = (depth - mean)[..., None].expand(-1, -1, -1, 2)
        flat = mean + self.flatten(relief).sum(-1)
        across = inverse_poses(poses[i]) @ poses[j]
        there = moved(camera_points(flat, focals[j]), across)
        here = camera_points(FAR * first[:, 0], focals[i])
        sure = torch.full_like(depth, 50.0)
        return Pair(here, sure, there, torch.full_like(sure, 12.0))

    def _numbers(self, images: Tensor) -> Tensor:
        """The views that images are nearest to."""
        off = (images[:, None] - self.scene.images).abs().mean((2, 3, 4))
        return off.argmin(1)


@dataclass(frozen=True, kw_only=True)
class FlatBackbone(Backbone):
    """`Flat` as a backbone that a file can name."""

    default_sites = (SITE,)
    divisor = 1
    image_size = (HEIGHT, WIDTH)

    views: int = VIEWS
    seed: int = 0

    def build(self) -> PointmapNetwork:
        return Flat(self.views, self.seed).eval()


WORD = '{"backbone": "FlatBackbone"}'


@cache
def surveyed() -> Survey:
    """A short survey of `Flat` whose weights hardly fall, so that flat maps keep their labels."""
    scene, rule = hills(), Calibrated(mu=10.0)
    return survey(Flat(), scene.images, rule=rule, focals=scene.focals, steps=20)


def drawn(folder: Path, mode: str = "RGB", seed: int = 0) -> list[Path]:
    """The images of `hills` as files."""
    scene = hills(VIEWS, seed)
    folder.mkdir(exist_ok=True)
    for name, image in zip(scene.names, scene.images, strict=True):
        eight = (255 * image[0]).round().byte().numpy()
        Image.fromarray(eight).convert(mode).save(folder / name)
    return [folder / name for name in scene.names]
