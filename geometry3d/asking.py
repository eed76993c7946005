"""What the verbs of this domain ask for alike: a network, its images, the pairs of them."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdaptError
from ..core.images.classifying import image_files
from .backbones import Backbone, Dust3rCheckpoint, RandomDust3r, SmallPointmaps
from .calibration import Schedule
from .connected import one_scene
from .graph import Complete, Graph, Retrieval, Window
from .pictures_in import Part, Pictures, read_pictures
from .pointmaps import PointmapNetwork
from .predictions import Predictions, predict
from .telling import Telling
from .weights import Calibrated

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Views:
    """Images as views on a device, the focals that are known [n], and the backbone for them."""

    pictures: Pictures
    images: Tensor
    focals: Tensor | None
    backbone: Backbone

    def network(self) -> PointmapNetwork:
        """The frozen network, where the images are."""
        network = self.backbone.build()
        if not isinstance(network, PointmapNetwork):
            raise AdaptError(f"{type(self.backbone).__name__} builds no pointmap network")
        return network.to(self.images.device).eval()


def views_of(
    paths: Sequence[Path],
    backbone: Backbone,
    size: Size,
    focal: float | None,
    device: str,
    limit: int | None = None,
    least: int = 2,
) -> Views:
    """Read images; of more than `limit`, as many, evenly chosen by their order."""
    files = image_files(paths)
    if limit is not None and limit < least:
        raise AdaptError(f"--limit {limit}: at least {least} images are needed")
    if limit is not None and len(files) > limit:
        files = [files[round(i * (len(files) - 1) / (limit - 1))] for i in range(limit)]
    pictures = read_pictures(files, size, least)
    for copy, original in pictures.copies.items():
        print(f"left out: {copy} is {original} again")
    known, backbone = known_focals(backbone, focal, pictures.parts)
    focals = None if known is None else known.to(device)
    return Views(pictures, pictures.images.to(device), focals, backbone)


def ask(network: PointmapNetwork, views: Views, graph: Graph, tell: Telling) -> Predictions:
    """What the network says of the graph's pairs, if the images make one scene; see `one_scene`."""
    edges = graph.edges(views.images).to(views.images.device)
    told = partial(tell, "pairs asked about")
    every = predict(network, views.images, edges, progress=told)
    tell.clear()
    found = one_scene(every, views.images, views.pictures.names, views.focals)
    if len(found.edges) < len(every.edges):
        lost = len(every.edges) - len(found.edges)
        print(f"left out: {lost} of {len(every.edges)} pairs, taken from one place")
    return found


def known_focals(
    backbone: Backbone, focal: float | None, parts: Sequence[Part]
) -> tuple[Tensor | None, Backbone]:
    """A focal in pixels of the original images as the views' [n], if it is known.

    And the backbone: a network that needs to know it (`SmallPointmaps`) is told the views'.
    """
    known = None if focal is None else torch.tensor([focal * part.scale for part in parts])
    if not isinstance(backbone, SmallPointmaps):
        return known, backbone
    if known is None:
        return torch.full((len(parts),), backbone.focal), backbone
    if not torch.allclose(known, known[0], rtol=1e-3):
        other = parts[int((known - known[0]).abs().argmax())]
        raise AdaptError(
            "the small network takes views of one focal length: these images have several sizes,"
            f" {parts[0].width}x{parts[0].height} and {other.width}x{other.height}"
        )
    return known, replace(backbone, focal=float(known[0]))


def backbone_of(word: str, focal: float | None) -> Backbone:
    """The backbone that a word of the command line names; see `add_network`."""
    if word == "random":
        return RandomDust3r()
    if word.startswith("{"):
        return Backbone.from_json(_parsed(word))
    own = word != "small"
    if own and not os.path.isfile(word):  # Path.is_file raises for a word that is too long
        raise AdaptError(
            f"--backbone {word!r} is no file: a DUSt3R checkpoint, a file of pretrain-small,"
            " `small`, `random` (to try things out) or settings as JSON are allowed"
        )
    if own and not _of_small(Path(word)):
        return Dust3rCheckpoint(file=word)
    if focal is None:
        raise AdaptError(
            f"--backbone {word} needs --focal, the focal length in pixels of the images"
        )
    return SmallPointmaps(file=word if own else None)


def _of_small(file: Path) -> bool:
    """Whether `pretrain-small` wrote the file: it says so."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return "pretraining" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False  # what it is, its own reader finds out


def _parsed(text: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise AdaptError(f"--backbone {text!r} is not JSON: {error}") from error
    return found


def size_for(backbone: Backbone, asked: Size | None) -> Size:
    """The size of the views: the backbone's own unless asked for, divisible as it needs."""
    size = backbone.image_size if asked is None else asked
    if any(side < backbone.divisor or side % backbone.divisor for side in size):
        raise AdaptError(
            f"views of {size[1]}x{size[0]} pixels do not suit {type(backbone).__name__}: both sides"
            f" must divide by {backbone.divisor}"
        )
    return size


def graph_of(kind: str, reach: int | None) -> Graph:
    """The graph that `--graph` and `--reach` name."""
    if kind == "complete":
        if reach is not None:
            raise AdaptError("--reach is for the graphs window and retrieval")
        return Complete()
    if kind == "window":
        return Window() if reach is None else Window(reach)
    return Retrieval() if reach is None else Retrieval(reach)


def add_network(parser: argparse.ArgumentParser, required: bool, focal: bool = True) -> None:
    """Options for a network, and for how images become its views."""
    add = parser.add_argument
    about = "a DUSt3R checkpoint, weights of pretrain-small, `small`, `random` (to try things out),"
    about += " or settings as JSON"
    add("--backbone", required=required, metavar="WORD", help=about)
    about = "of the views, such as 512x384; default: what the backbone was trained on"
    add("--size", type=_size, metavar="WxH", help=about)
    if focal:
        about = "focal length in pixels of the images, if known"
        add("--focal", type=_length, metavar="PIXELS", help=about)
    add("--device", default="cpu", type=_device, help="such as cuda; default: cpu")


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Options for which pairs are asked about."""
    add = parser.add_argument
    about = "complete: every pair (to 32 images); window: a film; retrieval: loose images"
    add("--graph", choices=("complete", "window", "retrieval"), default="complete", help=about)
    add("--reach", type=whole, metavar="N", help="of window and retrieval: partners of an image")
    add("--limit", type=whole, metavar="N", help="take at most N images, evenly chosen")
    add("--sweeps", type=whole, default=100, metavar="N", help="of the alignment; default: 100")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Options for weights, labels and the training on them."""
    add = parser.add_argument
    about = "images to validate on and not to learn from; default: one in five"
    add("--hold-out", type=whole, metavar="N", help=about)
    add("--rank", type=whole, default=16, help="of LoRA; default: 16")
    add("--lr", type=float, default=Schedule.lr, help=f"default: {Schedule.lr}")
    add("--epochs", type=whole, default=Schedule.epochs, help=f"default: {Schedule.epochs}")
    add("--batch", type=whole, default=Schedule.batch, help=f"pairs; default: {Schedule.batch}")
    add("--seed", type=_seed, default=0)
    add("--space", choices=("log", "raw"), default="log", help="of confidences; default: log")
    about = "length at which a weight falls to a quarter; default: the median residual"
    add("--mu", type=_length, help=about)
    about = "initial weight that counts for anything; default: the backbone's, 0 of the small"
    add("--gate", type=number, help=f"{about} network, {Calibrated.gate} of others")
    about = "weight that a label needs, the mean over a view's pairs; default: a quarter of the"
    add("--cut", type=number, help=f"{about} mean initial weight")


def schedule_of(asked: argparse.Namespace) -> Schedule:
    """The schedule that `add_training`'s options name."""
    last = min(asked.lr, Schedule.last_lr)
    return Schedule(lr=asked.lr, last_lr=last, epochs=asked.epochs, batch=asked.batch)


def rule_of(asked: argparse.Namespace, backbone: Backbone) -> Calibrated:
    """The rule of weights that `add_training`'s options name, for a backbone's confidences."""
    gate = backbone.gate if asked.gate is None else asked.gate
    return Calibrated(space=asked.space, mu=asked.mu, gate=gate)


def whole(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return found


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _size(text: str) -> Size:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH, such as 512x384")
    return int(height), int(width)


def _length(text: str) -> float:
    try:
        length = float(text)
    except ValueError:
        length = 0.0
    if not 0 < length < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return length


def _device(text: str) -> str:
    try:
        kind = torch.empty(0, device=text).device.type
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"no device {text!r}: {first}") from error
    if kind == "meta":
        raise argparse.ArgumentTypeError("the device 'meta' holds no numbers: name cpu or cuda")
    return text
