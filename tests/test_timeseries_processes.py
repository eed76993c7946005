"""Two processes train a forecaster as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyadapt.core import cli
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import write
from polyadapt.tests.test_processes import assert_same, finished, started
from polyadapt.tests.test_timeseries_cli import configuration, save_table

pytestmark = pytest.mark.slow  # whole runs


def test_two_processes_train_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_table()
    made = configuration()
    made["model"] |= {"dropout": 0.0, "lr": 0.001}
    made["trainer"]["max_epochs"] = 3
    # 96 windows are 3 steps of 32; each process validates on 25 of the 50 validation windows.
    made["data"]["init_args"]["windows_per_epoch"] = 96
    write("a.yaml", made)
    assert cli.main(["timeseries", "fit", "--config", "a.yaml", "--run", "one"]) == 0
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.init_args.batch_size=16"]
    said = finished(started("--config", "a.yaml", "--run", "two", *two, domain="timeseries"))
    assert said.count("trainable") == said.count("next: ") == 1, "one process speaks"
    assert_same("two", "one")
    trained = read_file("two/adapter.safetensors").tensors.values()
    assert all(tensor.abs().max() > 0 for tensor in trained), "all were trained"
