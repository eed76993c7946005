"""What the small network learns from: true matches, poses and pointmaps of pairs of known views."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import camera_points, inverse_poses, moved, pixels_of
from .correlation import Matches
from .labels import Labels
from .loss import confidence_loss
from .reconstruction import Reconstruction
from .rotations import angle_of
from .small import CELL, TOKEN, Answer

_FLAT = 0.03  # relative: a cell whose depth differs more lies on an edge and has no one match
_NEAR = 3.0  # cells: further off, the best cell was a wrong one, which refining does not mend
_SEEN = 0.03  # relative: a point that is deeper than what the other view shows there is hidden


class Truth(NamedTuple):
    """b ordered pairs of views. Lengths are in baselines, points in the first camera's frame.

    Cells are the n of the network's correlation, of the first image and of the second; `at` is
    where one lies in the other image, in that image's cells, `seen` whether it is seen there.
    """

    points1: Tensor  # [b, h, w, 3]
    points2: Tensor
    rotation: Tensor  # [b, 3, 3]
    centre: Tensor  # [b, 3], of length 1
    at: Tensor  # [b, 2, n, 2]
    seen: Tensor  # [b, 2, n] bool

    def labels(self) -> Labels:
        """The pointmaps as what to learn; every pixel of a generated scene is known."""
        known = self.points1[..., 0].isfinite(), self.points2[..., 0].isfinite()
        return Labels(self.points1, known[0], self.points2, known[1])


def truth_of(scene: Reconstruction, edges: Tensor) -> Truth:
    """The truth of pairs `edges` [b, 2] of a generated scene's views."""
    first, second = edges.unbind(1)
    into = inverse_poses(scene.poses)
    relative = into[first] @ scene.poses[second]
    baseline = relative[:, :3, 3].norm(dim=-1)
    metre = baseline[:, None, None, None]
    local = camera_points(scene.depths, scene.focals)
    there = _true_matches(scene, first, second, inverse_poses(relative))
    back = _true_matches(scene, second, first, relative)
    return Truth(
        local[first] / metre,
        moved(local[second], relative) / metre,
        relative[:, :3, :3],
        relative[:, :3, 3] / baseline[:, None],
        torch.stack([there[0], back[0]], 1),
        torch.stack([there[1], back[1]], 1),
    )


def joined(truths: list[Truth]) -> Truth:
    """Pairs of several scenes as one batch."""
    return Truth(*(torch.cat(parts) for parts in zip(*truths, strict=True)))


def _true_matches(
    scene: Reconstruction, here: Tensor, there: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the middles of cells of views `here` are seen in views `there`, and whether they are.

    `into` [b, 4, 4] takes the frame of a view here to that of the view there.
    """
    h, w = scene.depths.shape[-2:]
    depths = scene.depths[here][:, None]
    middle = F.avg_pool2d(depths, CELL)[:, 0]
    spread = F.max_pool2d(depths, CELL) + F.max_pool2d(-depths, CELL)
    points = moved(camera_points(middle, scene.focals[here] / CELL), into).flatten(1, 2)
    place, depth = pixels_of(points, scene.focals[there], h, w)
    grid = (2 * place / place.new_tensor([w, h]) - 1).nan_to_num(2.0)
    shown = F.grid_sample(
        scene.depths[there][:, None], grid[:, None], padding_mode="border", align_corners=False
    )[:, 0, 0]
    flat = spread[:, 0].flatten(1) < _FLAT * middle.flatten(1)
    seen = (grid.abs() < 1).all(-1) & ((depth - shown).abs() < _SEEN * shown) & flat
    return place.nan_to_num(0.0) / CELL - 0.5, seen


def correlation_loss(logits: Tensor, at: Tensor, seen: Tensor, columns: int) -> Tensor:
    """Cross-entropy of all cells with the four around the true match, weighted bilinearly.

    logits [b, n, m], at [b, n, 2], seen [b, n]: the mean over every third of the cells that the
    other image shows: neighbours say nearly the same, and all of them cost three times as much.
    """
    chosen = tuple(index[::3] for index in seen.nonzero(as_tuple=True))
    scores, match = logits[chosen].log_softmax(-1), at[chosen]
    rows = logits.shape[-1] // columns
    whole = match.floor()
    part = match - whole
    total = scores.new_zeros(())
    for right in (0, 1):
        for down in (0, 1):
            column = (whole[:, 0] + right).clamp(0, columns - 1).long()
            row = (whole[:, 1] + down).clamp(0, rows - 1).long()
            share = (part[:, 0] if right else 1 - part[:, 0]) * (
                part[:, 1] if down else 1 - part[:, 1]
            )
            hit = scores.gather(1, (row * columns + column)[:, None])[:, 0]
            total = total + (share * hit).sum()
    return -total / max(len(scores), 1)


def refinement_loss(matches: Matches, truth: Truth) -> Tensor:
    """Smooth L1 in cells between refined and true matches, where the best cell is near them."""
    off = (matches.at - truth.at).norm(dim=-1)
    close = off[truth.seen & (off.detach() < _NEAR)]
    total = F.smooth_l1_loss(close, torch.zeros_like(close), beta=0.1, reduction="sum")
    return total / max(len(close), 1)


def size_of(*points: Tensor) -> Tensor:
    """The mean distance from the first camera, over all pixels of [b, h, w, 3]: [b, 1, 1, 1]."""
    far = torch.cat([part.norm(dim=-1).flatten(1) for part in points], 1)
    return far.mean(1)[:, None, None, None]


def loss_of(answer: Answer, truth: Truth, columns: int) -> dict[str, Tensor]:
    """The parts of what is minimised, each weighted; their sum is the loss."""
    pair = answer.pair
    sizes = (size_of(pair.points1, pair.points2), size_of(truth.points1, truth.points2))
    turn, aim = (error[1:] for error in pose_errors(answer, truth))  # the first one is fitted
    there = correlation_loss(answer.logits, truth.at[:, 0], truth.seen[:, 0], columns)
    back = correlation_loss(answer.logits.mT, truth.at[:, 1], truth.seen[:, 1], columns)
    return {
        "match": 0.5 * (there + back),
        "refine": 2 * refinement_loss(answer.matches, truth),
        "points": confidence_loss(pair, truth.labels()),
        "size": 0.5 * (sizes[0].log() - sizes[1].log()).abs().mean(),
        "pose": 2 * turn.mean() + aim.mean(),
    }


def pose_errors(answer: Answer, truth: Truth) -> tuple[Tensor, Tensor]:
    """Radians between rotations and centres' directions, [k, b]: of the fit, then of each stage."""
    turns = [angle_of(pose.rotation.mT @ truth.rotation) for pose in answer.poses]
    aims = [
        2 * torch.asin(((pose.centre - truth.centre).norm(dim=-1) / 2).clamp(0, 0.9999))
        for pose in answer.poses
    ]
    return torch.stack(turns), torch.stack(aims)


def match_error(answer: Answer, truth: Truth) -> Tensor:
    """Of every cell that both images show: how many tokens (4 pixels) its match is off."""
    off: Tensor = (answer.matches.at - truth.at).norm(dim=-1)[truth.seen] * (CELL / TOKEN)
    return off
