"""SeriesTask: what is trained, by which rate, what is logged, and what data it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from polyadapt.core import RunFiles
from polyadapt.core.errors import AdaptError, SiteError
from polyadapt.tests.series_cases import Waves, factors, tiny_task
from polyadapt.tests.training_cases import quiet_trainer
from polyadapt.timeseries.adapters import code, paper
from polyadapt.timeseries.backbones import NoLanguageModel, OneAttention
from polyadapt.timeseries.scaling import Scaler
from polyadapt.timeseries.task import SeriesTask


def test_training_lowers_the_error_and_leaves_everything_but_the_factors_alone() -> None:
    task, data = tiny_task(), Waves()
    before = {n: p.clone() for n, p in task.network.named_parameters() if not p.requires_grad}
    run = quiet_trainer(max_epochs=8)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    assert found["test_mse"] < 0.2 * _error_of_the_untrained()
    for name, parameter in task.network.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert sum(p.requires_grad for p in task.parameters()) == 4


def _error_of_the_untrained() -> float:
    (found,) = quiet_trainer().test(tiny_task(), Waves(), verbose=False)
    return found["test_mse"]


def test_the_logged_errors_are_means_over_all_windows_and_channels() -> None:
    task, data = tiny_task(), Waves()
    (found,) = quiet_trainer().test(task, data, verbose=False)
    x, y = (torch.stack(tensors) for tensors in zip(*data.windows(2), strict=True))
    task.eval()
    with torch.no_grad():
        error = task(x) - y
    assert found["test_mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert found["test_mae"] == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert found["test_loss"] == found["test_mse"]


def test_every_channel_is_forecast_as_if_it_were_alone() -> None:
    task = tiny_task().eval()
    x = torch.randn(2, 24, 3)
    together = task(x)
    for channel in range(3):
        alone = task(x[..., channel : channel + 1])
        torch.testing.assert_close(together[..., channel : channel + 1], alone)


def test_the_data_is_told_the_window_and_tells_what_it_is() -> None:
    task, data = tiny_task(), Waves()
    quiet_trainer(fast_dev_run=True).fit(task, data)
    assert (data.look_back, data.horizon) == (24, 4)
    assert (task.about.names, task.about.period) == (("left", "right"), 24)
    assert task.about.scaler == Scaler((1.0, -2.0), (2.0, 0.5))
    assert task.adapters.extra["scaler"] == {"mean": [1.0, -2.0], "std": [2.0, 0.5]}


def _rates(task: SeriesTask, epochs: int) -> list[float]:
    run = quiet_trainer(max_epochs=epochs, limit_train_batches=1, limit_val_batches=0)
    seen: list[float] = []
    step = task.on_before_optimizer_step

    def noting(optimizer: torch.optim.Optimizer) -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    task.on_before_optimizer_step = noting  # type: ignore[method-assign]
    run.fit(task, Waves())
    return seen


def test_the_rate_stays_or_falls_as_a_cosine_by_epoch_to_half_in_ten_of_twenty() -> None:
    assert _rates(tiny_task(**_training(paper())), 3) == [1e-3] * 3
    rates = _rates(tiny_task(**_training(code())), 11)
    assert rates[0] == 1e-4
    assert rates[10] == pytest.approx(5e-5, rel=1e-3)
    assert rates == sorted(rates, reverse=True)


def _training(published: Any) -> dict[str, Any]:
    """The published settings, with patches that fit the small window."""
    return {**published.training, "adapter": published.recipe.replace(rank=4)}


def test_the_optimiser_is_adam_without_weight_decay() -> None:
    task = tiny_task()
    run = quiet_trainer(max_epochs=1, limit_train_batches=1)
    run.fit(task, Waves())
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.0]
    assert not factors(task.adapters, "wpe").A[:, 3:].any()  # 3 patches


def test_dropout_acts_in_training_only_and_its_strength_can_be_set() -> None:
    x = torch.randn(2, 24, 1)
    task = tiny_task()
    assert not torch.equal(task(x), task(x))
    task.eval()
    assert torch.equal(task(x), task(x))
    none = tiny_task(adapter=paper(rank=2).recipe, dropout=0.0)
    assert none.training
    assert torch.equal(none(x), none(x))
    assert {m.p for m in tiny_task(dropout=0.3).network.modules() if isinstance(m, nn.Dropout)} == {
        0.3
    }


def test_early_stopping_and_the_best_epoch_work_as_the_configurations_have_it(
    tmp_path: Path,
) -> None:
    task, data = tiny_task(lr=0.05), Waves()
    stop = EarlyStopping("val_mse", patience=1, min_delta=10)  # nothing is that much better
    run = quiet_trainer(
        max_epochs=9, enable_checkpointing=True, callbacks=[stop, _files(tmp_path, "val_mse")]
    )
    run.fit(task, data)
    assert run.current_epoch == 2
    assert (tmp_path / "adapter.safetensors").is_file()


def _files(folder: Path, monitor: str | None = None) -> RunFiles:
    return RunFiles(folder, monitor, "min")


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, start: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(4)
        task = tiny_task(seed=1, schedule="cosine", cosine_epochs=4)
        fit = quiet_trainer(
            max_epochs=4, enable_checkpointing=True, callbacks=[_files(tmp_path / folder)]
        )
        fit.fit_loop.max_epochs = epochs
        fit.fit(task, Waves(), ckpt_path=start)
        return {name: tensor.clone() for name, tensor in task.state_dict().items()}

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, tmp_path / "parts" / "last.ckpt")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_checkpoint_of_other_frozen_layers_is_refused_also_for_measuring(tmp_path: Path) -> None:
    fit = quiet_trainer(enable_checkpointing=True, callbacks=[_files(tmp_path)])
    fit.fit(tiny_task(seed_of_layers=1), Waves())
    with pytest.raises(AdaptError, match="trained on other frozen layers: use its seed_of_layers"):
        quiet_trainer().test(tiny_task(), Waves(), ckpt_path=tmp_path / "last.ckpt")
    quiet_trainer().test(
        tiny_task(seed_of_layers=1), Waves(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )


@pytest.mark.parametrize(
    "backbone", [NoLanguageModel(width=8), OneAttention(width=8, heads=2)], ids=lambda b: str(b)
)
def test_baselines_without_a_language_model_train_alike(backbone: Any) -> None:
    task = tiny_task(backbone=backbone)
    quiet_trainer(max_epochs=2).fit(task, Waves())
    assert factors(task.adapters, "positions").A[:, :3].any()
    assert factors(task.adapters, "out_layer").B.any()


def test_the_input_layer_can_be_a_third_site() -> None:
    network = tiny_task().network
    task = tiny_task(at=[*network.sites, "in_layer"])
    quiet_trainer().fit(task, Waves())
    assert factors(task.adapters, "in_layer").B.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "schedule='linear' is not allowed: constant or cosine"),
        ({"frozen_layers": "none"}, "frozen_layers='none' is not allowed: seed or tensors"),
        ({"last_lr": 1.0}, "last_lr=1.0 is not allowed: from 0 to lr=0.01"),
        ({"cosine_epochs": 0}, "cosine_epochs=0 is not allowed"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed"),
        ({"look_back": 8}, "a window of 8 steps is shorter than a patch of 16"),
        ({"look_back": 600}, "makes 75 patches, the blocks have 64 positions"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdaptError, match=message) as caught:
        tiny_task(**settings)
    assert "\n" not in str(caught.value)


def test_a_rank_above_the_outputs_and_an_unknown_site_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"rank 8 does not fit out_layer: its weight is \[4, 48\]"):
        tiny_task(adapter=code(rank=8).recipe)
    with pytest.raises(SiteError, match="nothing in Network is called 'wte'"):
        tiny_task(at="wte")


def test_batches_of_another_kind_are_refused_in_one_line() -> None:
    task = tiny_task()
    with pytest.raises(AdaptError, match=r"needs truths \[b, 4, 2\], got \[3, 5, 2\]"):
        task.training_loss([torch.zeros(3, 24, 2), torch.zeros(3, 5, 2)])
    with pytest.raises(AdaptError, match="a batch has 1 tensors, this aim needs 2"):
        task.training_loss(torch.zeros(3, 24, 2))
    with pytest.raises(AdaptError, match=r"windows \[b, 24, 1\], got \[6, 20, 1\]"):
        task.training_loss([torch.zeros(3, 20, 2), torch.zeros(3, 4, 2)])
