"""UCR and UEA sets: those in aeon's wheel, unequal lengths, classes by name, refusals."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.timeseries.data_labelled import UCR


def save(folder: Path, train: list[str], test: list[str], equal: bool = True) -> str:
    """A set called Tiny with the classes up and down; a line is `1,2,3:up`."""
    head = ["@problemName Tiny", "@timeStamps false", "@missing false", "@univariate true"]
    head += [f"@equalLength {str(equal).lower()}", *(["@seriesLength 3"] if equal else [])]
    head += ["@classLabel true up down", "@data"]
    (folder / "Tiny").mkdir(exist_ok=True)
    for part, lines in (("TRAIN", train), ("TEST", test)):
        (folder / "Tiny" / f"Tiny_{part}.ts").write_text("\n".join([*head, *lines]) + "\n")
    return str(folder)


def ready(name: str, folder: str = "data", **settings: Any) -> UCR:
    data = UCR(name, folder, **settings)
    data.prepare_data()
    data.setup()
    return data


def test_japanese_vowels_are_filled_up_to_the_longest() -> None:
    data = ready("JapaneseVowels", val_share=0.2)
    assert data.classes == tuple("123456789")
    assert (data.length, len(data.names)) == (29, 12)
    assert [len(data.part(part)) for part in ("train", "val", "test")] == [216, 54, 370]
    x, labels = data.part("train").tensors
    assert x.shape == (216, 29, 12)
    assert labels.bincount().tolist() == [24] * 9
    assert torch.equal(x[:, -1], x[:, -2])  # the longest training series has 26 rows
    assert all(len(batch) <= 16 for batch, _ in data.test_dataloader())
    assert sum(len(batch) for batch, _ in data.test_dataloader()) == 370


def test_basic_motions_has_its_classes_by_name() -> None:
    data = ready("BasicMotions", val_share=0.0)
    assert data.classes == ("standing", "running", "walking", "badminton")
    assert (data.length, len(data.names)) == (100, 6)
    x, labels = data.part("train").tensors
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    assert x.mean(dim=(0, 1)).abs().max() < 1e-4
    assert (x.std(dim=(0, 1), correction=0) - 1).abs().max() < 1e-4
    assert data.val_dataloader() == []


def test_gun_point_stays_in_its_own_units_where_asked() -> None:
    data = ready("GunPoint", scale=False)
    assert data.scaler is None
    assert [len(data.part(part)) for part in ("train", "val", "test")] == [45, 5, 150]
    assert data.part("test").tensors[0].shape == (150, 150, 1)


def test_the_order_of_training_is_of_the_seed_and_the_parts_are_disjoint(tmp_path: Path) -> None:
    lines = [f"{n},{n},{n}:{'up' if n % 2 else 'down'}" for n in range(1, 21)]
    folder = save(tmp_path, lines, lines[:3])

    def seen(seed: int) -> list[int]:
        data = ready("Tiny", folder, scale=False, seed=seed, val_share=0.2)
        held = data.part("val").tensors[0][:, 0, 0].tolist()
        order = [int(n) for x, _ in data.train_dataloader() for n in x[:, 0, 0]]
        assert sorted([*order, *held]) == list(range(1, 21))
        assert sum(n % 2 for n in held) == 2  # of each class
        return order

    assert seen(0) == seen(0)
    assert seen(0) != seen(1)


def test_a_short_series_repeats_its_last_row_and_no_filling_is_scaled_with(tmp_path: Path) -> None:
    folder = save(tmp_path, ["1:down", "2,3,4,5:up"], ["6,7,8,9,10:up"], equal=False)
    data = ready("Tiny", folder, val_share=0.0)
    assert data.classes == ("up", "down")
    assert data.scaler is not None
    assert data.scaler.mean == (3.0,)
    x, labels = data.part("train").tensors
    assert labels.tolist() == [1, 0]
    undone = data.scaler.undo(x.double().numpy())[..., 0]
    assert np.rint(undone).tolist() == [[1, 1, 1, 1, 1], [2, 3, 4, 5, 5]]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (["1,2,3:up", "2,2,2:up"], ["1,2,3:up"], "all training series are of one class"),
        (
            ["1,NaN,3:up", "2,2,2:down"],
            ["1,2,3:up"],
            "series 1, column 'channel 0' has no value in",
        ),
        (["1,2,3:up", "2,x,2:down"], ["1,2,3:up"], "aeon cannot give the train part of 'Tiny'"),
    ],
)
def test_sets_that_do_not_fit_are_refused(
    tmp_path: Path, train: list[str], test: list[str], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        ready("Tiny", save(tmp_path, train, test))


def test_a_set_that_cannot_be_fetched_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aeon.datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(aeon.datasets, "load_classification", offline)
    with pytest.raises(AdaptError) as caught:
        ready("Heartbeat", str(tmp_path))
    assert "aeon cannot give the train part of 'Heartbeat'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_task_asks_has_to_fit() -> None:
    with pytest.raises(AdaptError, match="batch_size=0"):
        UCR("GunPoint", batch_size=0)
    data = UCR("GunPoint")
    with pytest.raises(AdaptError, match=r"call setup\(\) first"):
        data.test_dataloader()
    data.setup()
    data.look_back = 96
    with pytest.raises(AdaptError, match="look_back=96: the series of GunPoint have 150 rows"):
        data.test_dataloader()
    with pytest.raises(AdaptError, match="a share of 1 cannot be split off"):
        ready("GunPoint", val_share=1)
