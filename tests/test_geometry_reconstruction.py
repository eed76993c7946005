"""A reconstruction's points lie where its cameras see them; shapes that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.reconstruction import Reconstruction


def _two_views() -> Reconstruction:
    poses = torch.eye(4).repeat(2, 1, 1)
    # The second camera stands at (1, 2, 3) and is turned a quarter to the right about y.
    poses[1, :3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    poses[1, :3, 3] = torch.tensor([1.0, 2, 3])
    depths = torch.full((2, 4, 6), 10.0)
    return Reconstruction(
        poses, torch.tensor([2.0, 5.0]), depths, depths / 10, torch.zeros(2, 3, 4, 6), ["a", "b"]
    )


def test_points_are_the_pixel_centres_at_their_depth_seen_from_the_camera() -> None:
    points = _two_views().points()
    assert points.shape == (2, 4, 6, 3)
    # Column 5, row 0: u - w/2 = 2.5, v - h/2 = -1.5.
    torch.testing.assert_close(points[0, 0, 5], torch.tensor([12.5, -7.5, 10]))
    # Focal 5: (5, -3, 10) in the camera; its z looks along the world's x, its x along -z.
    torch.testing.assert_close(points[1, 0, 5], torch.tensor([11.0, -1, -2]))


def test_what_is_not_measured_or_not_trusted_is_not_shown() -> None:
    scene = _two_views()
    scene.depths[0, 0, 0] = 0
    scene.depths[0, 0, 1] = float("nan")
    scene.weights[0, 0, 2] = 0
    assert scene.shown().sum() == 48 - 3
    assert not scene.shown()[0, 0, :3].any()


def test_some_of_the_views_keep_their_world() -> None:
    scene = _two_views()
    kept = scene.of_views([1])
    assert len(kept) == 1
    assert list(kept.names) == ["b"]
    assert torch.equal(kept.points()[0], scene.points()[1])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("poses", torch.zeros(2, 3, 4), r"poses are \[2, 3, 4\], not \[2, 4, 4\]"),
        ("focals", torch.ones(1), r"focals are \[1\], not \[2\]"),
        ("images", torch.zeros(2, 1, 4, 6), r"images are \[2, 1, 4, 6\], not \[2, 3, 4, 6\]"),
        ("depths", torch.zeros(4, 6), r"depths are \[4, 6\], not \[2, 0, 0\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    field: str, value: Tensor, said: str
) -> None:
    fields = {**vars(_two_views()), field: value}
    with pytest.raises(AdaptError, match=said):
        Reconstruction(**fields)


def test_every_view_has_a_name() -> None:
    with pytest.raises(AdaptError, match="2 views has 1 names"):
        Reconstruction(**{**vars(_two_views()), "names": ["a"]})
