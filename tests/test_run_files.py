"""RunFiles: the files that a training run leaves in its folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import AdaptError, LoRA, load
from polyadapt.core.run_files import RunFiles, learning_curve
from polyadapt.core.store import read_file
from polyadapt.core.training import AdaptedModule
from polyadapt.tests.command_cases import rows_of
from polyadapt.tests.training_cases import quiet_trainer

FILES = ["adapter.safetensors", "last.ckpt", "learning_curve.png", "metrics.csv"]
SCORES = [0.5, 0.75, 0.25, 0.125]  # by epoch


class Task(AdaptedModule):
    """Its training loss is the batch's number, its validation score one of SCORES."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), "0", lr=0.1, warmup=0.0)
        self.head = nn.Linear(4, 2)
        self.heads: list[Tensor] = []

    def training_loss(self, batch: Any) -> Tensor:
        value = self.head(self.backbone(torch.ones(1, 4))).sum()
        return batch[0].mean() + value - value.detach()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", SCORES[self.current_epoch])

    def on_train_epoch_end(self) -> None:
        self.log("late", 1.5)
        self.heads.append(self.head.weight.detach().clone())


def fit(
    task: LightningModule, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Trainer:
    settings = {"max_epochs": 2, "enable_checkpointing": True, **options}
    trainer = quiet_trainer(callbacks=list(callbacks), **settings)
    numbers: DataLoader[Any] = DataLoader(TensorDataset(torch.tensor([1.0, 2.0, 6.0, 7.0])))
    trainer.fit(task, numbers, numbers, ckpt_path=resume)
    return trainer


def table(folder: Path) -> list[dict[str, str]]:
    return rows_of(folder / "metrics.csv")


def test_a_run_leaves_its_files_and_nothing_else(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path / "runs" / "first"))
    assert sorted(p.name for p in (tmp_path / "runs" / "first").iterdir()) == FILES


def test_the_table_has_a_row_per_epoch(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path))
    # 8 steps: the rate of the last step in each epoch is 0.1 (1 + cos(pi k / 8)) / 2, k = 3 and 7.
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "epoch,step,lr,train_loss,val_score,late",
        "1,4,0.069134172,4,0.5,1.5",
        "2,8,0.0038060234,4,0.75,1.5",
    ]


def test_accumulated_gradients_do_not_change_the_reported_loss(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path), accumulate_grad_batches=2)
    assert [(row["step"], row["train_loss"]) for row in table(tmp_path)] == [("2", "4"), ("4", "4")]


def test_an_epoch_without_validation_repeats_no_old_value(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path), max_epochs=4, check_val_every_n_epoch=2)
    assert [row["val_score"] for row in table(tmp_path)] == ["", "0.75", "", "0.125"]


def test_the_adapter_file_holds_set_and_head(tmp_path: Path) -> None:
    task = Task()
    fit(task, RunFiles(tmp_path))
    file = read_file(tmp_path / "adapter.safetensors")
    assert sorted(file.head) == ["head.bias", "head.weight"]
    assert torch.equal(file.head["head.weight"], task.head.weight)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(4, 4))
    load(fresh, tmp_path / "adapter.safetensors")
    x = torch.randn(3, 4)
    assert torch.equal(fresh(x), task.backbone(x))


def test_the_best_epoch_is_kept_and_becomes_the_result(tmp_path: Path) -> None:
    task, files = Task(), RunFiles(tmp_path, monitor="val_score")
    trainer = fit(task, files, max_epochs=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, "best.ckpt"])
    assert files.best == 0.75
    head = read_file(tmp_path / "adapter.safetensors").head["head.weight"]
    assert torch.equal(head, task.heads[1])
    assert torch.equal(task.head.weight, task.heads[1])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["head.weight"]
    assert torch.equal(last, task.heads[3])
    assert trainer.checkpoint_callback is files
    assert files.best_model_path == str(tmp_path / "best.ckpt")


def test_the_smallest_value_can_be_the_best(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, monitor="val_score", mode="min")
    fit(Task(), files, max_epochs=4)
    assert files.best == 0.125


def test_stopping_early_ends_with_all_files(tmp_path: Path) -> None:
    stop = EarlyStopping("val_score", mode="max", patience=1)
    fit(Task(), stop, RunFiles(tmp_path, monitor="val_score"), max_epochs=4)
    assert [row["val_score"] for row in table(tmp_path)] == ["0.5", "0.75", "0.25"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, "best.ckpt"])


def test_last_ckpt_knows_the_state_of_the_other_callbacks(tmp_path: Path) -> None:
    other = ModelCheckpoint(tmp_path / "other", monitor="val_score", mode="max")
    fit(Task(), other, RunFiles(tmp_path))
    callbacks = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert callbacks[other.state_key]["best_model_score"] == 0.75


def test_a_run_cut_within_an_epoch_keeps_the_last_whole_one(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path), max_steps=6)
    assert [row["step"] for row in table(tmp_path)] == ["4", "6"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


class Failing(Task):
    def training_loss(self, batch: Any) -> Tensor:
        bad = float("nan") if self.trainer.global_step == 5 else 0.0
        return super().training_loss(batch) + bad


def test_a_run_that_fails_leaves_the_epochs_that_were_whole(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="step 6: the loss is nan"):
        fit(Failing(), RunFiles(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "metrics.csv"]
    assert [row["epoch"] for row in table(tmp_path)] == ["1"]


def test_a_trial_run_touches_no_file(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path / "run"), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_the_learning_curve_is_a_picture_with_a_panel_per_metric() -> None:
    rows = [{"epoch": n, "step": n, "lr": 0.1, "train_loss": 1 / n, "top1": n / 4} for n in (1, 2)]
    one = [{name: value for name, value in row.items() if name != "top1"} for row in rows]
    assert _size(learning_curve(rows, "Two panels")) == (1152, 468)
    assert _size(learning_curve(one, "One panel")) == (576, 468)


def _size(picture: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        return image.size


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdaptError, match=r"cannot make the folder .*file: "):
        fit(Task(), RunFiles(tmp_path / "file"))


def test_a_monitor_that_is_not_logged_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match=r"monitor='val_top1' is not logged; logged: .*val_score"):
        fit(Task(), RunFiles(tmp_path, monitor="val_top1"))
    with pytest.raises(AdaptError, match="monitor='val_score' is not logged"):
        fit(Task(), RunFiles(tmp_path, monitor="val_score"), limit_val_batches=0)
    with pytest.raises(AdaptError, match="mode='higher' is not allowed: 'max' or 'min'"):
        RunFiles(tmp_path, mode="higher")


def test_a_misspelt_monitor_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, monitor="val_scroe")
    said = (
        r"monitor='val_scroe' is not logged; logged: \['val_score'\] by .* before the first epoch"
    )
    with pytest.raises(AdaptError, match=said):
        fit(Task(), files, num_sanity_val_steps=1)
    assert files.rows == []
    fit(Task(), RunFiles(tmp_path, monitor="train_loss"), num_sanity_val_steps=1)


def test_resuming_without_the_best_epoch_is_refused(tmp_path: Path) -> None:
    fit(Task(), RunFiles(tmp_path / "one", monitor="val_score"))
    files = RunFiles(tmp_path / "other", monitor="val_score")
    with pytest.raises(AdaptError, match=r"best epoch is not in .*other: resume in the folder"):
        fit(Task(), files, resume=tmp_path / "one" / "last.ckpt")


class Plain(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_another_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="RunFiles needs an AdaptedModule, not Plain"):
        fit(Plain(), RunFiles(tmp_path))
