"""Many scenes' sets on one frozen network: found by name or by images, resident, switched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.activation import activate
from ..core.errors import AdaptError
from ..core.sets import sets_of, switch
from ..core.store import load
from .backbones import Backbone
from .dust3r import Dust3r
from .graph import thumbnails
from .pointmaps import PointmapNetwork
from .scene_file import Scene, read_scene
from .small import SmallNetwork

# Lowe's ratio: the best scene's distance must be this much below the second's.
CLEARLY = 0.8


class SceneIndex:
    """The scenes' files of a folder, all of one backbone.

    `network` is that backbone; assign your own, or it is built at its first use. Raises AdaptError
    for a folder without scenes, two files of one scene, and scenes of different backbones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files, self.scenes, self.features = _read(folder)
        self.backbone = _backbone(folder, list(self.scenes.values()))

    @cached_property
    def network(self) -> PointmapNetwork:
        """The frozen network that the scenes' sets act on."""
        built: PointmapNetwork = self.backbone.build()
        return built

    def scene_at(self, name: str) -> Scene:
        """What the file of a scene says, by its name."""
        if name not in self.scenes:
            raise AdaptError(f"no scene {name!r} in {self.folder}: {', '.join(self.scenes)}")
        return self.scenes[name]

    def find(self, images: Tensor) -> str:
        """The scene that images [k, 3, h, w] show, of the size that the scenes were made at.

        By `features_of` the untouched network, centred at all scenes' mean. An image is as far
        from a scene as from its nearest view (1 - cosine), several images as their median. A scene
        may be it where they are no farther than its own views are from each other at most; of
        several such scenes the nearest is taken if it is less than 0.8 times as far as the next.

        Raises AdaptError, naming the nearest, where no scene or more than one may be it.
        """
        centre = torch.cat(list(self.features.values())).mean(0)
        asked = F.normalize(features_of(self.network, images).cpu() - centre, dim=1)
        far, known = {}, {}
        for name, features in self.features.items():
            own = F.normalize(features - centre, dim=1)
            far[name] = float((1 - (asked @ own.mT).amax(1)).clamp_min(0).median())
            known[name] = far[name] <= _reach(own)
        order = sorted(far, key=lambda name: far[name])
        may = [name for name in order if known[name]]
        if not may:
            raise AdaptError(
                f"the images are like no scene in {self.folder}: the nearest is {order[0]!r}, at"
                f" {far[order[0]]:.3f}; name one of {', '.join(self.scenes)}, or use none"
            )
        if len(may) > 1 and far[may[0]] >= CLEARLY * far[may[1]]:
            raise AdaptError(
                f"the images may show {may[0]!r} ({far[may[0]]:.3f} away) or {may[1]!r}"
                f" ({far[may[1]]:.3f}): name one"
            )
        return may[0]

    def use(self, name: str | None) -> None:
        """Let one scene's set act, loaded at its first use and resident from then on; None: none.

        `activate(index.network, names)` chooses for single calls, or per pair of a batch.
        """
        if name is not None:
            self.scene_at(name)
            if name not in sets_of(self.network):
                load(self.network, self.files[name], name)
        if sets_of(self.network):
            switch(self.network, name)


def features_of(network: PointmapNetwork, images: Tensor) -> Tensor:
    """One feature per image [n, d]: the mean token of the untouched network's encoder.

    Networks without an encoder of single images get 8 x 8 thumbnails.
    """
    home = next((p.device for p in network.parameters()), images.device)
    untouched = activate(network, None) if sets_of(network) else nullcontext()
    with torch.no_grad(), untouched:
        return torch.cat([_feature(network, image[None].to(home)) for image in images])


def _feature(network: PointmapNetwork, image: Tensor) -> Tensor:
    if isinstance(network, Dust3r):
        return network.encode(image).mean(1)
    if isinstance(network, SmallNetwork):
        return network.encode(image).tokens.mean(1)
    return thumbnails(image)


def _reach(own: Tensor) -> float:
    """How far the loneliest of a scene's views is from the others; 0 for a single view."""
    if len(own) < 2:
        return 0.0
    alike = (own @ own.mT).fill_diagonal_(-torch.inf)
    return float(1 - alike.amax(1).min())


def _read(folder: Path) -> tuple[dict[str, Path], dict[str, Scene], dict[str, Tensor]]:
    files: dict[str, Path] = {}
    scenes: dict[str, Scene] = {}
    features: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        scene, found = read_scene(path)
        if scene.name in files:
            raise AdaptError(f"{path} and {files[scene.name]} are both of scene {scene.name!r}")
        files[scene.name], scenes[scene.name], features[scene.name] = path, scene, found
    if not files:
        raise AdaptError(f"there is no scene's file (*.safetensors) in {folder}")
    return files, scenes, features


def _backbone(folder: Path, scenes: Sequence[Scene]) -> Backbone:
    first = scenes[0]
    for scene in scenes[1:]:
        if (scene.backbone, scene.size) != (first.backbone, first.size):
            raise AdaptError(
                f"the scenes {first.name!r} and {scene.name!r} in {folder} are of different"
                " backbones or sizes: keep them in different folders"
            )
    return first.backbone
