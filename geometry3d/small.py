"""A small pointmap network that truly uses its second image; its camera's focal length is known.

Descriptors of both images are correlated; where each place is seen in the other image, how sure
that is and whether the way back agrees enter the tokens. A relative pose is fitted to the matches;
stages of attention improve it, each told where the rays of matches cross under the last one. Own
design; correlation over all pairs as in RAFT (arXiv 2003.12039), pose updates from residuals as in
DROID-SLAM (arXiv 2108.10869).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import AdaptError
from .blocks import Block
from .cameras import rays
from .correlation import Matches, cell_middles, correlation, matched
from .pointmaps import Pair, PointmapNetwork
from .rope import Rotary, grid_positions, rotary
from .rotations import rotation_of
from .two_rays import crossing
from .two_view_pose import Pose, two_view_pose

WEIGHTS = Path(__file__).parent / "weights" / "small_pointmaps.safetensors"
HEIGHT, WIDTH = 48, 64  # of the images that it is trained on
CELL, TOKEN = 2, 4  # pixels of a cell of the correlation, and of a token
_SIDE = TOKEN // CELL
_CELLS = _SIDE**2  # of a token
_TYPICAL = 1.5  # log of a depth in baselines, from which the network counts


class Seen(NamedTuple):
    """What the encoder says of images."""

    tokens: Tensor  # [b, tokens, d]
    descriptors: Tensor  # [b, 64, rows, columns] of the cells
    details: Tensor  # [b, 32, rows, columns]


class Answer(NamedTuple):
    """Everything that training looks at."""

    pair: Pair
    logits: Tensor
    matches: Matches
    poses: list[Pose]


class Residual(nn.Module):
    """Two 3x3 convolutions around what passes: [b, d, h, w] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, image: Tensor) -> Tensor:
        seen: Tensor = image + self.conv2(F.gelu(self.conv1(self.norm(image))))
        return seen


class Encoder(nn.Module):
    """Images [b, 3, h, w] -> `Seen`, a token for every 4 x 4 pixels, a cell for every 2 x 2."""

    def __init__(self, width: int, heads: int, depth: int, narrow: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, narrow, 5, stride=CELL, padding=2)
        self.fine = nn.Sequential(Residual(narrow), Residual(narrow))
        self.down = nn.Conv2d(narrow, width, 3, stride=TOKEN // CELL, padding=1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.describe = nn.Conv2d(narrow + width, 64, 1)

    def forward(self, images: Tensor, places: Rotary) -> Seen:
        details = self.fine(self.stem((images - 0.5) / 0.25))
        coarse = self.down(details)
        tokens = coarse.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, places)
        tokens = self.norm(tokens)
        wide = F.interpolate(tokens.mT.unflatten(-1, coarse.shape[-2:]), scale_factor=2)
        return Seen(tokens, self.describe(torch.cat([details, wide], 1)), details)


class Stage(nn.Module):
    """Told where matched rays cross, both images' tokens exchange, and the pose is bettered."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.told = nn.Linear(4 * _CELLS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(2 * width)
        last = nn.Linear(width, 6)
        nn.init.zeros_(last.weight)  # at first, the fitted pose stays
        nn.init.zeros_(last.bias)
        self.move = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), last)

    def forward(
        self, tokens: Tensor, told: Tensor, pose: Pose, places: Rotary
    ) -> tuple[Tensor, Pose]:
        tokens = tokens + self.told(told)
        for block in self.blocks:
            tokens = block(tokens, places)
        first, second = (half.mean(1) for half in tokens.chunk(2, 1))
        move = self.move(self.norm(torch.cat([first, second], -1)))
        rotation = rotation_of(move[:, :3]) @ pose.rotation
        return tokens, Pose(rotation, F.normalize(pose.centre + move[:, 3:], dim=-1))


class SmallNetwork(PointmapNetwork):
    """Images whose sides divide by 4, at the `focal` in pixels that all of them share.

    Lengths are in baselines: the second camera stands 1 away from the first. A pointmap is the
    depth along each pixel's ray, the second one moved by the pose; confidences are 1 + exp(c).

    Raises `AdaptError` for images of other or different sizes.

    >>> pair = SmallNetwork(focal=32.0)(torch.rand(1, 3, 24, 32), torch.rand(1, 3, 24, 32))
    >>> pair.points2.shape, bool((pair.confidence1 > 1).all())
    (torch.Size([1, 24, 32, 3]), True)
    """

    def __init__(
        self,
        focal: float = 64.0,
        width: int = 96,
        heads: int = 3,
        encoder_depth: int = 2,
        stages: int = 3,
        stage_depth: int = 1,
    ) -> None:
        super().__init__()
        self.focal, self.head_width = focal, width // heads
        self.encoder = Encoder(width, heads, encoder_depth)
        self.sharpness = nn.Parameter(torch.tensor(2.5))
        self.placed = nn.Linear(6 * _CELLS, width)
        self.view = nn.Parameter(0.02 * torch.randn(2, width))
        self.stages = nn.ModuleList(Stage(width, heads, stage_depth) for _ in range(stages))
        narrow = self.encoder.stem.out_channels
        known = width + _CELLS * (narrow + 4)
        self.head = nn.Sequential(
            nn.LayerNorm(known),
            nn.Linear(known, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * TOKEN**2),
        )

    def forward(self, first: Tensor, second: Tensor) -> Pair:
        if (
            first.shape[1:] != second.shape[1:]
            or first.shape[-2] % TOKEN
            or first.shape[-1] % TOKEN
        ):
            raise AdaptError(
                f"the small network takes two images of one size, sides divisible by {TOKEN},"
                f" not {list(first.shape[-2:])} and {list(second.shape[-2:])}"
            )
        both = self.encode(torch.cat([first, second]))
        halves = zip(*(part.chunk(2) for part in both), strict=True)
        one, two = (Seen(*parts) for parts in halves)
        return self.relate(one, two).pair

    def encode(self, images: Tensor) -> Seen:
        """What the encoder says of images [b, 3, h, w], whatever pairs they will be in."""
        height, width = images.shape[-2:]
        seen: Seen = self.encoder(images, self._places(height, width, images))
        return seen

    def relate(self, first: Seen, second: Seen) -> Answer:
        """What follows from what was seen in the images of pairs."""
        rows, columns = first.details.shape[-2:]
        logits = correlation(first.descriptors, second.descriptors, self.sharpness)
        matches = matched(logits, rows, columns)
        own, other = self._rays(rows, columns, matches.at)
        places = self._places(rows * CELL, columns * CELL, logits)
        places = Rotary(*(torch.cat([part, part]) for part in places))
        found = self._found(own, other, matches)
        tokens = torch.cat([first.tokens, second.tokens], 1)
        tokens = tokens + self.placed(_of_tokens(found, rows, columns)) + self._views(tokens)
        poses = [_fitted(own, other, matches)]
        for stage in self.stages:
            told = _of_tokens(_told(own, other, poses[-1]), rows, columns)
            tokens, pose = stage(tokens, told, poses[-1], places)
            poses.append(pose)
        details = torch.stack([first.details, second.details], 1).flatten(3).mT
        known = torch.cat([details, _told(own, other, poses[-1])], -1)
        raw = self.head(torch.cat([tokens, _of_tokens(known, rows, columns)], -1))
        return Answer(self._pair(raw, poses[-1], rows, columns), logits, matches, poses)

    def _places(self, height: int, width: int, like: Tensor) -> Rotary:
        grid = grid_positions(height // TOKEN, width // TOKEN, like.device)
        return rotary(grid, self.head_width)

    def _views(self, tokens: Tensor) -> Tensor:
        """What tells the first image's tokens from the second's, [2 n, d]."""
        return self.view.repeat_interleave(tokens.shape[1] // 2, 0)

    def _rays(self, rows: int, columns: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rays of every cell of both images, and those of their matches: both [b, 2, n, 3]."""
        middle = at.new_tensor([columns - 1, rows - 1]) / 2
        own = cell_middles(rows, columns, at).expand_as(at)
        to_rays = CELL / self.focal
        return F.pad((own - middle) * to_rays, (0, 1), value=1), F.pad(
            (at - middle) * to_rays, (0, 1), value=1
        )

    @staticmethod
    def _found(own: Tensor, other: Tensor, matches: Matches) -> Tensor:
        """Of every cell its ray, the way to its match, the match's mass and cycle error."""
        sure = torch.stack([matches.mass, matches.cycle.log1p()], -1)
        return torch.cat([2 * own[..., :2], 4 * (other - own)[..., :2], sure], -1)

    def _pair(self, raw: Tensor, pose: Pose, rows: int, columns: int) -> Pair:
        """Depth along each pixel's ray, in baselines, and confidence; the second view moved."""
        grid = raw.mT.unflatten(-1, (2, rows // _SIDE, columns // _SIDE)).transpose(1, 2)
        depth, sure = F.pixel_shuffle(grid, TOKEN).unbind(2)  # [b, 2, h, w]
        ahead = rays(depth.new_tensor(self.focal), *depth.shape[-2:])
        points = (depth + _TYPICAL).clamp(-3, 6).exp()[..., None] * ahead
        sure = 1 + sure.exp()
        there = points[:, 1] @ pose.rotation[:, None].mT + pose.centre[:, None, None]
        return Pair(points[:, 0], sure[:, 0], there, sure[:, 1])


def small_network(
    focal: float = float(WIDTH), pretrained: bool = True, file: str | Path | None = None
) -> SmallNetwork:
    """The small network, with the packaged weights, those that `pretrain-small` wrote, or random.

    Raises `AdaptError` when a file is missing or no such weights, and for a focal length not above
    0.
    """
    if not 0 < focal < float("inf"):
        raise AdaptError(f"focal={focal} is not allowed: pixels, above 0")
    model = SmallNetwork(focal)
    if file is not None:
        _read_weights(model, Path(file))
    elif pretrained:
        if not WEIGHTS.is_file():
            raise AdaptError(
                f"the small pointmap network has no weight file {WEIGHTS.name}: reinstall the"
                " package, or make it with `polyadapt geometry3d pretrain-small`"
            )
        _read_weights(model, WEIGHTS)
    return model


def _read_weights(model: SmallNetwork, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise AdaptError(
            f"{file} does not hold weights that `polyadapt geometry3d pretrain-small` wrote:"
            f" {first}"
        ) from error


def _fitted(own: Tensor, other: Tensor, matches: Matches) -> Pose:
    """The pose that the first image's matches say, the surer the more."""
    sure = matches.mass * (-3 * matches.cycle).exp()
    return two_view_pose(own[:, 0], other[:, 0], sure[:, 0])


def _told(own: Tensor, other: Tensor, pose: Pose) -> Tensor:
    """What the crossing rays of all matches say under a pose: [b, 2, n, 4]."""
    rotation, centre = pose.rotation.detach(), pose.centre.detach()
    back = rotation.mT
    rotations = torch.stack([rotation, back], 1)
    centres = torch.stack([centre, -(back @ centre[..., None])[..., 0]], 1)
    cross = crossing(own, other, rotations, centres)
    return torch.stack(
        [2 * cross.parallax, cross.depth - _TYPICAL, 4 * cross.angle, 10 * cross.miss], -1
    )


def _of_tokens(cells: Tensor, rows: int, columns: int) -> Tensor:
    """What is known of cells [b, 2, n, k], for the tokens of both images: [b, 2 tokens, 4 k]."""
    grid = cells.unflatten(2, (rows // _SIDE, _SIDE, columns // _SIDE, _SIDE))
    tokens: Tensor = grid.transpose(3, 4).flatten(4).flatten(1, 3)
    return tokens
