"""Rotary positions in two dimensions, and attention that knows places by them alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadapt.geometry3d.blocks import Attention, CrossAttention
from polyadapt.geometry3d.rope import Rotary, grid_positions, rotary, turned


def at(row: int, column: int, head_width: int = 8) -> Rotary:
    return rotary(torch.tensor([[row, column]]), head_width)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_row_turns_the_first_half_of_a_head_and_a_column_the_second() -> None:
    one = torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 0]])
    first, second = turned(one, at(1, 0)).chunk(2, -1)
    # Two planes a half, (0, 2) and (1, 3), turned by 1 and by 100^(-1/2).
    expected = [math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)]
    torch.testing.assert_close(first[0], torch.tensor(expected))
    assert second.tolist() == [[1, 1, 0, 0]]
    assert torch.equal(turned(one, at(0, 1)), torch.cat([second, first], -1))


def test_turning_keeps_lengths_and_the_origin_stays() -> None:
    heads = random(2, 3, 6, 16)
    places = rotary(grid_positions(2, 3), 16)
    seen = turned(heads, places)
    torch.testing.assert_close(seen.norm(dim=-1), heads.norm(dim=-1))
    assert torch.equal(seen[:, :, 0], heads[:, :, 0])
    assert not torch.allclose(seen[:, :, 5], heads[:, :, 5])


def test_a_product_depends_on_the_way_between_two_places_alone() -> None:
    query, key = random(2, 1, 16)
    here = turned(query, at(2, 1, 16)) @ turned(key, at(5, 3, 16)).T
    there = turned(query, at(4, 6, 16)) @ turned(key, at(7, 8, 16)).T
    elsewhere = turned(query, at(2, 1, 16)) @ turned(key, at(5, 4, 16)).T
    torch.testing.assert_close(here, there)
    assert (here - elsewhere).abs() > 1e-3


def test_without_turns_attention_is_torchs() -> None:
    torch.manual_seed(0)
    attention, tokens = Attention(12, 3), random(2, 5, 12)
    still = Rotary(torch.ones(5, 4), torch.zeros(5, 4))
    expected = F.multi_head_attention_forward(
        tokens.transpose(0, 1), tokens.transpose(0, 1), tokens.transpose(0, 1),
        12, 3, attention.qkv.weight, attention.qkv.bias, None, None, False, 0.0,
        attention.proj.weight, attention.proj.bias,
    )[0]  # fmt: skip
    torch.testing.assert_close(attention(tokens, still), expected.transpose(0, 1))


def test_without_turns_cross_attention_is_torchs() -> None:
    torch.manual_seed(0)
    attention, tokens, others = CrossAttention(12, 3), random(2, 5, 12), random(2, 7, 12)
    still = [Rotary(torch.ones(n, 4), torch.zeros(n, 4)) for n in (5, 7)]
    parts = (attention.projq, attention.projk, attention.projv)
    expected = F.multi_head_attention_forward(
        tokens.transpose(0, 1), others.transpose(0, 1), others.transpose(0, 1),
        12, 3, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]),
        None, None, False, 0.0, attention.proj.weight, attention.proj.bias,
    )[0]  # fmt: skip
    torch.testing.assert_close(attention(tokens, others, *still), expected.transpose(0, 1))
