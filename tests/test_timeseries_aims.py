"""What a window can be asked for: forecasts with quantiles, classes, anomalies, gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from polyadapt.core.errors import AdaptError
from polyadapt.tests.series_cases import TINY, Waves, stir, tiny_task
from polyadapt.tests.training_cases import quiet_trainer
from polyadapt.timeseries.adapters import code
from polyadapt.timeseries.aim import Aim
from polyadapt.timeseries.aims import Classify, Forecast, Impute, Reconstruct
from polyadapt.timeseries.backbones import NoLanguageModel
from polyadapt.timeseries.data_anomaly import AnomalyTable
from polyadapt.timeseries.data_competition import M4
from polyadapt.timeseries.data_labelled import UCR
from polyadapt.timeseries.forecaster import Forecaster
from polyadapt.timeseries.patches import Patches
from polyadapt.timeseries.series import Series
from polyadapt.timeseries.task import SeriesTask


class _Pairs(Waves):
    """Windows with labels of another kind, for the aims that are no forecast."""

    def __init__(self, test: list[Any], classes: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.items = test
        if classes is not None:
            self.classes = classes
            self.names = ("x", "y", "z")

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.items, 20)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader


def test_a_classifier_tells_rising_windows_from_falling_ones() -> None:
    steps = torch.linspace(-1, 1, 24).view(24, 1).expand(24, 3)
    items = [(steps * sign + torch.randn(24, 3) / 10, (sign + 1) // 2) for sign in (-1, 1) * 20]
    data = _Pairs(items, classes=("down", "up"))
    task = tiny_task(Classify(classes=("down", "up"), channels=3), adapter=code(rank=2).recipe)
    run = quiet_trainer(max_epochs=6)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    assert found["test_top1"] == 1
    assert found["test_loss"] < 0.3
    assert run.callback_metrics["test_macro_f1"] == 1
    data.names = ("x", "y")
    with pytest.raises(AdaptError, match="a patch of the network has 3 channels, the data 2"):
        quiet_trainer().test(task, data, verbose=False)
    data.classes = ("up", "down")
    with pytest.raises(AdaptError, match=r"the head knows \('down', 'up'\), the data has"):
        quiet_trainer().test(task, data, verbose=False)


def test_imputation_measures_hidden_values_only_and_hides_the_same_ones_each_time() -> None:
    task, data = tiny_task(Impute(share=0.5)), Waves()
    first, again = (quiet_trainer().test(task, data, verbose=False)[0] for _ in range(2))
    assert first == again
    assert data.horizon == 0
    x = torch.zeros(1, 24, 1)
    x[0, 3] = 100.0
    hidden = torch.ones_like(x, dtype=torch.bool)
    hidden[0, 3] = False
    task.eval()
    example = task.aim.example([x, hidden], None)
    answer = task(x, hidden).detach()
    measured = task.aim.measures(answer, example)
    assert measured.count == 1
    assert float(measured.values["mae"]) == pytest.approx(100 - float(answer[0, 3]), rel=1e-5)
    unseen = torch.where(hidden, x, float("nan"))
    assert torch.equal(task(unseen, hidden).detach(), answer)  # it does not look at what is hidden


def test_imputation_learns() -> None:
    task, data = tiny_task(Impute(share=0.3)), Waves()
    run = quiet_trainer(max_epochs=8)
    (before,) = run.validate(task, data, verbose=False)
    run.fit(task, data)
    assert run.callback_metrics["val_mse"] < 0.5 * before["val_mse"]


def test_an_outlier_is_found_by_its_reconstruction_with_and_without_adjustment() -> None:
    normal = [torch.sin(torch.arange(24.0) / 2 + i).view(24, 1) for i in range(40)]
    spoiled = [(x.clone(), torch.zeros(24)) for x in normal]
    for x, labels in spoiled[:4]:
        labels[10:14] = 1
        x[11] += 30  # one step of four stands out
    task = tiny_task(Reconstruct(share=0.01))

    class Data(_Pairs):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(normal, 20)  # type: ignore[arg-type]

    (found,) = quiet_trainer().test(task, Data(spoiled), verbose=False)
    assert found["test_recall"] < 1
    assert found["test_f1_adjusted"] > found["test_f1"] > 0
    assert found["test_threshold"] < found["test_threshold_joint"]
    with pytest.raises(AdaptError, match=r"a test for anomalies needs labels \[b, L\]"):
        quiet_trainer().test(task, Data(normal), verbose=False)


def test_a_labelled_table_is_tested_row_by_row(tmp_path: Path) -> None:
    wave = np.sin(np.arange(250) / 2)[:, None] + np.array([0.0, 5.0])
    np.save(tmp_path / "train.npy", wave)
    spoiled, labels = wave.copy(), np.zeros(250)
    spoiled[100:104, 1] += 40
    labels[100:104] = 1
    np.save(tmp_path / "test.npy", spoiled)
    np.save(tmp_path / "labels.npy", labels)
    data = AnomalyTable(*(str(tmp_path / f"{name}.npy") for name in ("train", "test", "labels")))
    task = tiny_task(Reconstruct(share=0.02))
    (found,) = quiet_trainer().test(task, data, verbose=False)
    assert data.look_back == 24
    assert found["test_f1_adjusted"] >= found["test_f1"] > 0
    assert 0.9 < found["test_area_roc"] <= 1
    assert found["test_recall"] > 0


@pytest.mark.slow
def test_a_set_of_the_archive_is_learned_with_all_channels_in_a_patch() -> None:
    data = UCR("BasicMotions", batch_size=8)
    classes = ("standing", "running", "walking", "badminton")
    task = SeriesTask(
        TINY,
        code(rank=4).recipe,
        aim=Classify(classes=classes, channels=6),
        look_back=100,
        lr=1e-2,
    )
    run = quiet_trainer(max_epochs=15)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    assert found["test_top1"] > 0.6
    assert task.about.names is not None
    assert len(task.about.names) == 6
    with pytest.raises(AdaptError, match="look_back=50: the series of BasicMotions have 100 rows"):
        quiet_trainer().test(tiny_task(task.aim, look_back=50), UCR("BasicMotions"), verbose=False)


def test_quantiles_are_sorted_and_their_loss_is_the_pinball_loss() -> None:
    aim = Forecast(horizon=4, loss="quantile", levels=(0.1, 0.5, 0.9))
    task = tiny_task(aim).eval()
    stir(task.adapters)
    answer = task(torch.randn(2, 24, 3))
    assert answer.shape == (2, 4, 3, 3)
    assert (answer.diff(dim=-1) >= 0).all()
    assert torch.equal(aim.point(answer), answer[..., 1])
    truth = aim.example([torch.zeros(1, 24, 1), torch.full((1, 4, 1), 2.0)], None)
    said = torch.tensor([1.0, 2.0, 4.0]).expand(1, 4, 1, 3)
    assert float(aim.loss_of(said, truth)) == pytest.approx((0.1 * 1 + 0 + 0.1 * 2) / 3)
    assert float(aim.measures(said, truth).values["coverage"]) == 1


def test_quantiles_learn_the_spread_of_noise() -> None:
    class Noise(Waves):
        def windows(self, seed: int) -> list[tuple[Tensor, ...]]:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(1500, 28, 1, generator=generator)
            return list(zip(x[:, :24], x[:, 24:], strict=True))

    aim = Forecast(horizon=4, loss="quantile")
    task, data = tiny_task(aim, NoLanguageModel(width=8)), Noise(batch_size=100)
    run = quiet_trainer(max_epochs=8)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    assert found["test_coverage"] == pytest.approx(0.8, abs=0.08)


def test_a_competition_is_trained_on_smape_and_tested_by_its_own_scores(tmp_path: Path) -> None:
    for part, rows in (("train", range(20)), ("test", range(20, 26))):
        lines = [f"Y{s}," + ",".join(str(100 + s + row) for row in rows) for s in range(12)]
        head = ",".join(f"V{number}" for number in range(len(rows) + 1))
        (tmp_path / f"Yearly-{part}.csv").write_text("\n".join([head, *lines]) + "\n")
    data = M4(str(tmp_path), "Yearly", batch_size=4)
    aim = Forecast(horizon=6, loss="smape")
    task = tiny_task(aim, look_back=12, patches=Patches(1, 1))
    run = quiet_trainer(max_epochs=20)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    assert found["test_loss"] < 5
    assert found["test_smape"] == pytest.approx(found["test_loss"], rel=1e-4)
    assert {"test_mase", "test_owa", "test_mse"} < set(found)
    longer = tiny_task(Forecast(horizon=8), look_back=12, patches=Patches(1, 1))
    (found,) = quiet_trainer().test(longer, data, verbose=False)
    assert found["test_owa"] > 0


def test_a_set_of_a_competition_forecasts_any_table(tmp_path: Path) -> None:
    for part, rows in (("train", range(20)), ("test", range(20, 26))):
        lines = [f"Y{s}," + ",".join(str(s + row) for row in rows) for s in range(12)]
        head = ",".join(f"V{number}" for number in range(len(rows) + 1))
        (tmp_path / f"Yearly-{part}.csv").write_text("\n".join([head, *lines]) + "\n")
    task = tiny_task(Forecast(horizon=6), look_back=12, patches=Patches(1, 1))
    quiet_trainer().fit(task, M4(str(tmp_path), "Yearly"))
    task.save_adapter(tmp_path / "set")
    series = Series(np.ones((15, 2)), ("a", "b"))
    assert Forecaster.from_file(tmp_path / "set").forecast(series).values.shape == (6, 2)


def test_the_smape_loss_trains_on_values_as_they_are() -> None:
    task = tiny_task(Forecast(horizon=4, loss="smape")).eval()
    x, y = torch.full((2, 24, 1), 10.0), torch.full((2, 4, 1), 30.0)
    example = task.aim.example([x, y], None)
    assert float(task.aim.loss_of(torch.full_like(y, 10.0), example)) == pytest.approx(100)
    assert float(task.training_loss([x, y]).detach()) == pytest.approx(100, rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon=0 is not allowed: a whole number from 1"),
        ({"loss": "mae"}, "loss='mae': one of mse, smape, quantile"),
        ({"levels": (0.1, 0.9)}, "levels=.* rising numbers between 0 and 1 with 0.5"),
        ({"levels": (0.5, 0.1)}, "levels=.* rising numbers"),
    ],
    ids=lambda value: str(value),
)
def test_forecasts_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Forecast(**settings)


def test_other_aims_that_cannot_be_are_refused() -> None:
    with pytest.raises(AdaptError, match="two names or more, each once"):
        Classify(classes=("a",))
    with pytest.raises(AdaptError, match="two names or more, each once"):
        Classify(classes=("a", "b", "a"))
    with pytest.raises(AdaptError, match="channels=0 is not allowed"):
        Classify(classes=("a", "b"), channels=0)
    with pytest.raises(AdaptError, match="Impute: share=1 is not allowed"):
        Impute(share=1)
    with pytest.raises(AdaptError, match="Reconstruct: share=0 is not allowed"):
        Reconstruct(share=0)


@pytest.mark.parametrize(
    "aim",
    [
        Forecast(horizon=7, loss="quantile", levels=(0.25, 0.5)),
        Classify(classes=("a", "b"), channels=3, rescale=True),
        Reconstruct(share=0.02),
        Impute(share=0.4),
    ],
    ids=lambda aim: type(aim).__name__,
)
def test_an_aim_comes_back_from_its_json(aim: Aim) -> None:
    assert Aim.from_json(json.loads(json.dumps(aim.to_json()))) == aim


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"aim": "Guess"}, "names no aim; there are Forecast, Classify, Reconstruct, Impute"),
        ({"aim": "Impute", "part": 1}, "Impute has the settings .* see 'part'"),
        ({"aim": "Forecast", "horizon": "4"}, "Forecast: horizon is a int, not '4'"),
        (None, "None names no aim"),
    ],
)
def test_json_that_is_no_aim_is_refused(data: object, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Aim.from_json(data)
