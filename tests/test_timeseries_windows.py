"""Windows: which rows and which channel an item holds, alone and as a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from polyadapt.core import AdaptError
from polyadapt.timeseries.windows import Windows, as_it_is, every_window


def table(rows: int, channels: int) -> torch.Tensor:
    """Row r of channel c is 100 c + r, so that a value says where it is from."""
    return 100.0 * torch.arange(channels) + torch.arange(rows)[:, None]


def test_channels_follow_each_other_and_starts_within_them() -> None:
    windows = Windows(table(6, 2), range(1, 6), look_back=2, horizon=1)
    assert (len(windows), windows.starts, windows.channels) == (6, 3, 2)
    seen = [torch.cat(windows[i]).flatten().tolist() for i in range(6)]
    assert seen[:3] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert seen[3:] == [[101, 102, 103], [102, 103, 104], [103, 104, 105]]
    past, future = windows[0]
    assert past.shape == (2, 1)
    assert future.shape == (1, 1)


def test_joint_windows_hold_all_channels() -> None:
    windows = Windows(table(6, 2), range(6), look_back=2, horizon=3, joint=True)
    assert len(windows) == 2
    past, future = windows[1]
    assert past.tolist() == [[1, 101], [2, 102]]
    assert future.tolist() == [[3, 103], [4, 104], [5, 105]]
    assert torch.equal(torch.cat(windows.window(1)), torch.cat([past, future]))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 6), st.integers(1, 3), st.booleans(), st.integers(0, 10))
def test_a_batch_is_its_items(
    look_back: int, horizon: int, channels: int, joint: bool, first: int
) -> None:
    rows = range(first, first + look_back + horizon + 4)
    windows = Windows(table(rows.stop + 2, channels), rows, look_back, horizon, joint)
    assert len(windows) == 5 * (1 if joint else channels)
    order = list(reversed(range(len(windows))))
    past, future = windows.__getitems__(order)
    items = [windows[i] for i in order]
    assert torch.equal(past, torch.stack([item[0] for item in items]))
    assert torch.equal(future, torch.stack([item[1] for item in items]))
    whole = torch.cat([past, future], dim=1) % 100
    assert whole.min() == rows.start
    assert whole.max() == rows.stop - 1


def test_a_loader_gives_the_last_short_batch_and_the_items_of_a_subset() -> None:
    windows = Windows(table(10, 1), range(10), look_back=2, horizon=1)
    chosen = Subset(windows, [7, 0, 3])
    batches = list(DataLoader(chosen, batch_size=2, collate_fn=as_it_is))
    assert [past[:, 0, 0].tolist() for past, _ in batches] == [[7, 0], [3]]


def test_every_k_th_window_is_taken_of_each_channel_from_its_first_on() -> None:
    windows = Windows(table(9, 2), range(9), look_back=2, horizon=1)  # 7 of each
    assert every_window(windows, 3) == [0, 3, 6, 7, 10, 13]
    assert every_window(Windows(table(2, 2), range(2), 2, 1), 3) == []


@pytest.mark.parametrize("start", [0, 8])
def test_a_window_outside_of_the_rows_is_refused(start: int) -> None:
    windows = Windows(table(10, 1), range(1, 10), look_back=2, horizon=1)
    with pytest.raises(AdaptError, match=f"no window begins at row {start}: they do from 1 to 7"):
        windows.window(start)


def test_a_window_without_past_is_refused() -> None:
    with pytest.raises(AdaptError, match="look_back=0, horizon=1: from 1 and from 0"):
        Windows(table(4, 1), range(4), look_back=0, horizon=1)
    with pytest.raises(IndexError):
        Windows(table(4, 1), range(4), look_back=2, horizon=1)[2]
