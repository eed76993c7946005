"""Two processes train both towers as one process does, prompts in chunks and all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyadapt.core import cli
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import write
from polyadapt.tests.test_processes import assert_same, finished, started
from polyadapt.tests.vlm_cases import COLOURS, configuration, save_colours

pytestmark = pytest.mark.slow  # whole runs


def test_two_processes_train_both_towers_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_colours(count=36)
    adapter: dict[str, Any] = {"class_path": "BlockLoRA", "init_args": {"rank": 2, "blocks": 2}}
    # 2 shots of 3 classes are 2 steps an epoch, and 6 steps are 3 epochs.
    made = configuration(model__adapter=adapter, model__lr=0.01, model__scale=10.0)
    made["model"]["backbone"] = "polyadapt.tests.vlm_cases.TinyCLIP"
    made["data"]["init_args"] |= {"augmentation": "random_resized_crop", "val_share": 1 / 6}
    write("a.yaml", made)
    assert cli.main(["vlm", "fit", "--config", "a.yaml", "--run", "one"]) == 0
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.init_args.batch_size=2"]
    chunks = ["--model.text_chunk=2", "--data.init_args.num_workers=1"]
    said = finished(started("--config", "a.yaml", "--run", "two", *two, *chunks, domain="vlm"))
    assert said.count("trainable") == said.count("next: ") == 1, "one process speaks"
    assert_same("two", "one")
    found = read_file("two/adapter.safetensors")
    assert found.extra["classes"] == [*COLOURS]
    assert any(site.path.startswith("transformer.") for site in found.sites), "texts, too"
    assert all(tensor.abs().max() > 0 for tensor in found.tensors.values()), "all were trained"
