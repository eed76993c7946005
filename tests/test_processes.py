"""Several processes train as one does, go on where they stopped, or are refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from polyadapt.core import SALT, AdaptError, LoRA, cli
from polyadapt.core.store import read_file
from polyadapt.core.training import require_strategy
from polyadapt.tests.command_cases import CODE, rows_of, write
from polyadapt.tests.test_training import QKV, Task, fit
from polyadapt.tests.vision_cases import configuration, save_labelled

pytestmark = pytest.mark.slow  # whole runs


TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "6"]
# Measured: 1.3e-7 after 9 steps of AdamW, on tensors of at most 0.14.
BOUND = 1e-6


def started(*words: str, domain: str = "vision") -> subprocess.Popen[str]:
    """`polyadapt DOMAIN fit`, from a file: Lightning starts the other process as this one was."""
    Path("command.py").write_text(CODE)
    command = [sys.executable, "command.py", domain, "fit", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def epochs(folder: str) -> list[dict[str, float]]:
    rows = rows_of(Path(folder, "metrics.csv"))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def assert_same(folder: str, alone: str) -> None:
    ours, wanted = (read_file(Path(f, "adapter.safetensors")) for f in (folder, alone))
    for name, tensor in {**wanted.tensors, **wanted.head}.items():
        found = {**ours.tensors, **ours.head}[name]
        assert torch.allclose(found, tensor, rtol=0, atol=BOUND), name
    assert len(epochs(alone)) == 3
    for row, one in zip(epochs(folder), epochs(alone), strict=True):
        assert row == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_two_processes_and_accumulated_gradients_train_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_labelled(count=40)  # 36 for training, 4 for validation: two processes divide both
    options: dict[str, Any] = {"augmentation": "flip", "batch_size": 12}
    made = configuration(model__lr=0.01, trainer__max_epochs=3)
    made["data"]["init_args"].update(options)
    write("a.yaml", made)
    fit = ["vision", "fit", "--config", "a.yaml"]
    assert cli.main([*fit, "--run", "one"]) == 0
    half = ["--data.batch_size=6", "--trainer.accumulate_grad_batches=2"]
    assert cli.main([*fit, "--run", "halves", *half]) == 0
    assert_same("halves", "one")
    said = finished(started("--config", "a.yaml", "--run", "two", *TWO))
    assert said.count("trainable") == said.count("next: ") == 1, "one process speaks"
    assert_same("two", "one")


@pytest.mark.slow
def test_two_processes_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_labelled(count=40)
    dropout = {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.2}}
    write("a.yaml", configuration(model__adapter=dropout, trainer__max_epochs=30))
    process = started("--config", "a.yaml", "--run", "whole", *TWO, "--monitor=val_loss")
    while not Path("whole/last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    # As a process that was killed here would have left it.
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns(".*"))
    assert not Path("parts/adapter.safetensors").exists()
    finished(process)
    said = finished(started("--resume", "parts"))
    assert "adapter.safetensors" in said
    for name in ("adapter.safetensors", "metrics.csv"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()


class Derived(DDPStrategy):
    """As Lightning's DeepSpeedStrategy is one."""


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (ModelParallelStrategy(), "ModelParallelStrategy"),
        (FSDPStrategy(), "FSDPStrategy"),
        (DDPStrategy(start_method="spawn"), "DDPStrategy with start_method='spawn'"),
        (Derived(), "Derived"),
    ],
)
def test_strategies_that_divide_what_is_trained_are_refused(strategy: Strategy, name: str) -> None:
    message = f"strategy {name} is not supported: train on one device, or with strategy='ddp'"
    with pytest.raises(AdaptError, match=message):
        require_strategy(strategy)


def test_a_task_refuses_fsdp2_before_it_divides_anything() -> None:
    task = Task(LoRA(rank=2), QKV)
    task.trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(AdaptError, match="strategy ModelParallelStrategy is not supported"):
        task.configure_model()


def test_the_command_refuses_such_a_strategy_before_it_starts_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_labelled()
    write("a.yaml", configuration(trainer__strategy="ddp_spawn", trainer__devices=2))
    assert cli.main(["vision", "fit", "--config", "a.yaml"]) == 2
    assert (
        "strategy DDPStrategy with start_method='spawn' is not supported" in capsys.readouterr().err
    )
    assert not Path("runs").exists()


def test_processes_do_not_send_each_other_what_each_has_computed() -> None:
    task = Task(SALT(top=2, rank=2), QKV)
    fit(task)
    ignored = task._ddp_params_and_buffers_to_ignore
    sizes = {name: buffer.numel() for name, buffer in task.named_buffers() if name in ignored}
    assert {name.rpartition(".")[2] for name in sizes} == {"U", "s", "V"}
    assert sum(sizes.values()) == 48 * 16 + 16 + 16 * 16
