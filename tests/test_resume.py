"""A run that was stopped and resumed is the run that was not stopped, bit for bit.

Run as a script, this file is the run that a test kills: `test_resume.py FOLDER`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import AdaLoRA, AdaptError, LoRA, MoSA, Recipe
from polyadapt.core.order import epoch_loader
from polyadapt.core.run_files import RunFiles
from polyadapt.core.training import AdaptedModule

pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


class Task(AdaptedModule):
    """Dropout in the backbone and in the adapters: every step draws random numbers."""

    def __init__(self, adapter: Recipe, **options: Any) -> None:
        torch.manual_seed(1)  # the frozen backbone and the head's start
        backbone = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0,
            proj_drop_rate=0.1,
        )  # fmt: skip
        at = "blocks.*.attn.qkv" if isinstance(adapter, LoRA | AdaLoRA) else None
        super().__init__(backbone, adapter, at, **options)
        self.head = nn.Linear(16, 3)

    def training_loss(self, batch: Any) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(self.head(self.backbone(pictures)), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_loss(batch))


class Stop(Callback):
    """Ends the run in the middle of its third epoch: by an error, or by killing the process."""

    def __init__(self, kill: bool) -> None:
        self.kill = kill

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (2, 2):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("stopped")


def loaders(plain: bool, workers: int) -> list[DataLoader[Any]]:
    own = Generator().manual_seed(2)
    pictures = torch.randn(20, 3, 16, 16, generator=own)
    data = TensorDataset(pictures, torch.randint(3, (20,), generator=own))
    if plain:  # order and worker seeds come from torch's global generator
        return [DataLoader(data, 4, shuffle=True, num_workers=workers), DataLoader(data, 10)]
    training = epoch_loader(data, 4, seed=3, num_workers=workers)
    return [training, epoch_loader(data, 10, seed=4, shuffle=False)]


def run(
    task: AdaptedModule,
    folder: Path,
    *callbacks: Callback,
    resume: Path | None = None,
    plain: bool = False,
    workers: int = 0,
    seed: int = 5,
    **options: Any,
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, RunFiles(folder)],
        **{"max_epochs": 4, **options},
    )
    training, held_out = loaders(plain, workers)
    trainer.fit(task, training, held_out, ckpt_path=resume)
    return task.state_dict()


def assert_same_runs(
    first: dict[str, Tensor], second: dict[str, Tensor], folders: Sequence[Path]
) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    one, other = (Path(folder, "metrics.csv").read_text() for folder in folders)
    assert one == other
    assert len(one.splitlines()) == 5  # a header and four epochs


RECIPES: dict[str, Recipe] = {
    "lora": LoRA(rank=2, dropout=0.1),
    "mosa": MoSA(rank=4),
    "adalora": AdaLoRA(rank=2, initial_rank=4, t_init=2, every=1),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workers": 2},
        {"plain": True},
        pytest.param({"plain": True, "workers": 2}, marks=pytest.mark.slow),
        pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        {"max_steps": 20, "max_epochs": -1},
        pytest.param({"max_steps": 18}, marks=pytest.mark.slow),
        pytest.param({"val_check_interval": 0.5}, marks=pytest.mark.slow),
        pytest.param({"check_val_every_n_epoch": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    recipe: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = run(Task(RECIPES[recipe]), whole, **options)
    with pytest.raises(OSError, match="stopped"):
        run(Task(RECIPES[recipe]), parts, Stop(kill=False), **options)
    second = run(Task(RECIPES[recipe]), parts, resume=parts / "last.ckpt", seed=99, **options)
    assert_same_runs(first, second, [whole, parts])


class SaveFirst(Callback):
    """Writes a checkpoint before the first batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_run_can_be_resumed_again_before_it_went_on(tmp_path: Path) -> None:
    whole, parts, again = tmp_path / "whole", tmp_path / "parts", tmp_path / "again.ckpt"
    first = run(Task(RECIPES["lora"]), whole)
    with pytest.raises(OSError, match="stopped"):
        run(Task(RECIPES["lora"]), parts, Stop(kill=False))
    run(Task(RECIPES["lora"]), parts, SaveFirst(again), resume=parts / "last.ckpt", seed=98)
    second = run(Task(RECIPES["lora"]), parts, resume=again, seed=99)
    assert_same_runs(first, second, [whole, parts])


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = subprocess.run([sys.executable, __file__, str(parts)], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert sorted(p.name for p in parts.iterdir()) == ["last.ckpt", "metrics.csv"]
    first = run(Task(RECIPES["mosa"]), whole)
    second = run(Task(RECIPES["mosa"]), parts, resume=parts / "last.ckpt", seed=99)
    assert_same_runs(first, second, [whole, parts])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_lightnings_own_callback_is_resumed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = run(Task(RECIPES["lora"]), whole)
    lightnings = ModelCheckpoint(tmp_path / "lightning", "second", every_n_epochs=2)
    with pytest.raises(OSError, match="stopped"):
        run(Task(RECIPES["lora"]), parts, lightnings, Stop(kill=False))
    second_epoch = tmp_path / "lightning" / "second.ckpt"
    second = run(Task(RECIPES["lora"]), parts, resume=second_epoch, seed=99)
    assert_same_runs(first, second, [whole, parts])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("when", [{"every_n_train_steps": 3}, {"save_on_train_epoch_end": False}])
def test_a_checkpoint_from_before_the_end_of_an_epoch_is_refused(
    when: dict[str, Any], tmp_path: Path
) -> None:
    lightnings = ModelCheckpoint(tmp_path / "lightning", "early", **when)
    run(Task(RECIPES["lora"]), tmp_path / "run", lightnings, max_epochs=1)
    early = tmp_path / "lightning" / "early.ckpt"
    with pytest.raises(AdaptError, match="written before the end of an epoch"):
        run(Task(RECIPES["lora"]), tmp_path / "run", resume=early)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (LoRA(rank=2, dropout=0.1), {"lr": 0.5}, r"made with lr=0\.001, not with 0\.5"),
        (LoRA(rank=2, dropout=0.1), {"warmup": 0.5}, r"made with warmup=0\.1, not with 0\.5"),
        (LoRA(rank=2, alpha=64), {}, r"made with adapter=\{.*\}, not with \{"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    recipe: Recipe, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run(Task(RECIPES["lora"]), tmp_path, max_epochs=1)
    with pytest.raises(AdaptError, match=message):
        run(Task(recipe, **options), tmp_path, resume=tmp_path / "last.ckpt")


def test_evaluation_takes_another_learning_rate_but_not_another_method(tmp_path: Path) -> None:
    run(Task(RECIPES["lora"]), tmp_path, max_epochs=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    held_out = loaders(plain=False, workers=0)[1]
    last = tmp_path / "last.ckpt"
    found = trainer.validate(Task(RECIPES["lora"], lr=0.5), held_out, last, verbose=False)
    row = (tmp_path / "metrics.csv").read_text().splitlines()[1].split(",")
    assert float(row[-1]) == pytest.approx(found[0]["val_loss"], rel=1e-7)
    with pytest.raises(AdaptError, match="made with adapter="):
        trainer.validate(Task(LoRA(rank=2, alpha=64)), held_out, last, verbose=False)


def test_evaluating_a_checkpoint_leaves_the_next_run_alone(tmp_path: Path) -> None:
    first = run(Task(RECIPES["lora"]), tmp_path / "first", max_epochs=1)
    task = Task(RECIPES["lora"])
    started = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    held_out = loaders(plain=False, workers=0)[1]
    trainer.validate(task, held_out, tmp_path / "first" / "last.ckpt", verbose=False)
    task.load_state_dict(started)
    second = run(task, tmp_path / "second", max_epochs=1)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Foreign(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(batch[0].flatten(1)[:, :16]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=1,
    )
    trainer.fit(Foreign(), loaders(plain=False, workers=0)[0])
    trainer.save_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(AdaptError, match="not written by an AdaptedModule"):
        run(Task(RECIPES["lora"]), tmp_path, resume=tmp_path / "foreign.ckpt")


if __name__ == "__main__":
    run(Task(RECIPES["mosa"]), Path(sys.argv[1]), Stop(kill=True))
