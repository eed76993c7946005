"""Which pairs are asked: complete, window, retrieval."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.geometry3d.graph import Complete, Retrieval, Window, spanning_tree


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_ten_images_make_ninety_ordered_pairs() -> None:
    edges = Complete().edges(_images(10))
    assert edges.shape == (90, 2)
    assert len({tuple(edge) for edge in edges.tolist()}) == 90
    assert (edges[:, 0] != edges[:, 1]).all()


def test_two_hundred_images_are_too_many_for_a_complete_graph() -> None:
    with pytest.raises(AdaptError, match=r"200 images make 39800 .* more than 1000: .*window"):
        Complete().edges(torch.zeros(200, 3, 2, 2))


def test_a_window_reaches_as_far_as_it_says_and_round_the_end_where_closed() -> None:
    assert Window(1).edges(_images(3)).tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert [0, 2] in Window(1, closed=True).edges(_images(3)).tolist()
    assert len(Window(5).edges(torch.zeros(200, 3, 2, 2))) == 2 * (200 * 5 - 15)
    assert len(Window(9, closed=True).edges(_images(4))) == 12


def test_retrieval_joins_like_with_like_and_leaves_no_piece_apart() -> None:
    # Two pairs of twins: each twin's nearest is its twin; one more pair joins the two pieces.
    one, two = _images(2)
    images = torch.stack([one, two, one + 0.01 * two, two + 0.01 * one])
    edges = Retrieval(neighbours=1).edges(images).tolist()
    assert [0, 2] in edges
    assert [1, 3] in edges
    assert len(edges) == 6


def test_given_descriptors_are_used_for_retrieval() -> None:
    descriptors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    edges = Retrieval(neighbours=1).edges(_images(3), descriptors)
    assert edges.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_a_spanning_tree_takes_the_best_pair_first_and_stays_in_its_piece() -> None:
    score = torch.full((4, 4), -torch.inf)
    for i, j, value in ((0, 1, 1.0), (1, 2, 3.0)):
        score[i, j] = score[j, i] = value
    assert spanning_tree(score) == [(1, 2), (1, 0)]
    assert spanning_tree(torch.full((3, 3), -torch.inf)) == []


@pytest.mark.parametrize("graph", [Complete(), Window(), Retrieval()], ids=["all", "film", "loose"])
def test_one_image_is_no_scene(graph: Complete | Window | Retrieval) -> None:
    with pytest.raises(AdaptError, match="1 image: a scene needs two"):
        graph.edges(_images(1))


def test_graphs_that_reach_nowhere_are_refused() -> None:
    with pytest.raises(AdaptError, match="at least 1"):
        Window(0).edges(_images(3))
    with pytest.raises(AdaptError, match="at least 1"):
        Retrieval(0).edges(_images(3))
