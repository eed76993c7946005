"""The adapter file of a time series model: what it says, how big it is, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.store import read_file
from polyadapt.tests.series_cases import TINY, Waves, stir, tiny_task
from polyadapt.tests.training_cases import quiet_trainer
from polyadapt.timeseries.adapters import code
from polyadapt.timeseries.aims import Forecast, Impute
from polyadapt.timeseries.backbones import NoLanguageModel
from polyadapt.timeseries.description import describe, load_set
from polyadapt.timeseries.patches import Patches
from polyadapt.timeseries.task import SeriesTask

PUBLISHED = {"adapters": 2_185_216, "with_frozen_layers": 2_185_216 + 4 * 3_109_728}


@pytest.mark.parametrize("kept", ["seed", "tensors"])
def test_at_the_published_setting_both_sizes_are_stated_and_true(tmp_path: Path, kept: str) -> None:
    task = SeriesTask(
        NoLanguageModel(),  # the sizes are those of GPT-2's width and positions
        code().recipe,
        aim=Forecast(horizon=96),
        look_back=336,
        frozen_layers=kept,  # type: ignore[arg-type]
    )
    file = tmp_path / "set.safetensors"
    task.save_adapter(file)
    assert read_file(file).extra["bytes"] == PUBLISHED
    held = PUBLISHED["adapters" if kept == "seed" else "with_frozen_layers"]
    assert held < file.stat().st_size < held + 10_000
    assert len(read_file(file).head) == (0 if kept == "seed" else 4)


def test_a_description_comes_back_as_it_was_written(tmp_path: Path) -> None:
    aim = Forecast(horizon=4, loss="quantile", levels=(0.25, 0.5, 0.75))
    task = tiny_task(aim, patches=Patches(8, 4), seed_of_layers=3, adapter=code(rank=3).recipe)
    quiet_trainer(fast_dev_run=True).fit(task, Waves())
    task.save_adapter(tmp_path / "set.safetensors")
    about = describe(tmp_path / "set.safetensors")
    assert about == task.about
    assert about.backbone == TINY
    assert (about.names, about.frequency, about.period) == (("left", "right"), "h", 24)


def test_a_restored_task_can_be_written_again_with_its_layers(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    task = tiny_task(frozen_layers="tensors", seed_of_layers=2)
    stir(task.adapters)
    task.save_adapter(first)
    SeriesTask.from_file(first).save_adapter(second)
    found = [read_file(path) for path in (first, second)]
    for name, tensor in found[0].head.items():
        assert torch.equal(tensor, found[1].head[name])
    for name, tensor in found[0].tensors.items():
        assert torch.equal(tensor, found[1].tensors[name])


def test_a_set_that_is_merged_is_still_written_with_the_layers_it_was_made_on(
    tmp_path: Path,
) -> None:
    task = tiny_task(frozen_layers="tensors").eval()
    stir(task.adapters)
    x = torch.randn(2, 24, 1)
    apart = task(x)
    task.adapters.merge()
    task.save_adapter(tmp_path / "set.safetensors")
    restored = SeriesTask.from_file(tmp_path / "set.safetensors").eval()
    assert torch.equal(restored(x), apart)


def test_a_tested_file_measures_what_the_trained_task_did(tmp_path: Path) -> None:
    task, data = tiny_task(), Waves()
    run = quiet_trainer(max_epochs=2)
    run.fit(task, data)
    expected = run.test(task, data, verbose=False)
    task.save_adapter(tmp_path / "set.safetensors")
    restored = SeriesTask.from_file(tmp_path / "set.safetensors")
    assert quiet_trainer().test(restored, data, verbose=False) == expected


def _damaged(tmp_path: Path, **changes: Any) -> Path:
    """A file whose description is changed, at the top or, by `a__b`, one level below."""
    task = tiny_task()
    task.save_adapter(tmp_path / "whole.safetensors")
    extra = dict(task.adapters.extra)
    for key, value in changes.items():
        top, _, below = key.partition("__")
        extra[top] = {**extra[top], below: value} if below else value
    task.adapters.extra = extra
    task.adapters.save(tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "poems"}, "holds no time series model: task 'poems'"),
        ({"look_back": "24"}, "'24' is no whole number"),
        ({"look_back": 8}, "a window of 8 steps is shorter than a patch of 16"),
        ({"patches": {"length": 0}}, "length=0 is not allowed"),
        ({"patches": {"size": 4}}, "lacks or misstates"),
        ({"aim": {"aim": "Guess"}}, "names no aim; there are Forecast"),
        ({"backbone": {"backbone": "GPT7"}}, "names no backbone; there are GPT2"),
        ({"frozen_layers": None}, "lacks or misstates"),
        ({"frozen_layers__kept": "none"}, "frozen_layers='none' is not known"),
        ({"frozen_layers__sha256": "0" * 64}, "have the SHA-256 000000000000"),
        (
            {"frozen_layers__kept": "tensors"},
            r"in_layer.weight is .*, the file has nothing",
        ),
        ({"frozen_layers__seed": 1}, "the frozen layers of seed 1 have the SHA-256"),
        ({"scaler": {"mean": [1.0], "std": [0.0]}}, "std > 0"),
        ({"blocks": "0" * 64}, "these are not the weights of GPT2.* that it was trained with"),
        ({"period": 2.5}, "2.5 is no whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_misstates_something_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = _damaged(tmp_path, **changes)
    with pytest.raises(AdaptError, match=message) as caught:
        SeriesTask.from_file(file)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_key_of_its_description_is_refused(tmp_path: Path) -> None:
    file = _damaged(tmp_path)
    task = tiny_task()
    del task.adapters.extra["names"]
    task.adapters.save(file)
    with pytest.raises(StoreError, match="lacks or misstates 'names' of a time series model"):
        describe(file)


def test_a_set_of_another_domain_is_refused(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    attach(layer, LoRA(rank=2), "0").save(tmp_path / "set.safetensors")
    with pytest.raises(StoreError, match="holds no time series model: task None"):
        SeriesTask.from_file(tmp_path / "set.safetensors")


def test_a_network_of_another_size_keeps_its_layers(tmp_path: Path) -> None:
    task = tiny_task(frozen_layers="tensors")
    task.save_adapter(tmp_path / "set.safetensors")
    other = tiny_task(Forecast(horizon=6)).about.network()
    before = {name: tensor.clone() for name, tensor in other.frozen_layers().items()}
    with pytest.raises(StoreError, match=r"out_layer.weight is \[6, 48\], the file has \[4, 48\]"):
        load_set(other, tmp_path / "set.safetensors")
    for name, tensor in other.frozen_layers().items():
        assert torch.equal(tensor, before[name])


def test_blocks_of_another_seed_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    task = tiny_task(frozen_layers="tensors")
    task.save_adapter(tmp_path / "set.safetensors")
    assert task.about.blocks is not None
    other = replace(task.about, backbone=replace(TINY, seed=1), seed=4).network()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StoreError, match="these are not the weights of GPT2"):
        load_set(other, tmp_path / "set.safetensors")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_sets_of_two_horizons_need_networks_of_their_own(tmp_path: Path) -> None:
    for horizon in (4, 6):
        tiny_task(Forecast(horizon=horizon)).save_adapter(tmp_path / f"{horizon}.safetensors")
    made = [SeriesTask.from_file(tmp_path / f"{horizon}.safetensors") for horizon in (4, 6)]
    assert [task(torch.zeros(1, 24, 2)).shape[1] for task in made] == [4, 6]
    impute = tiny_task(Impute())
    impute.save_adapter(tmp_path / "gaps.safetensors")
    assert SeriesTask.from_file(tmp_path / "gaps.safetensors").aim == Impute()
