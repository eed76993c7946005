"""Two processes, and workers that prepare clips: they train a shared bank as one process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from polyadapt.core import cli
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import write
from polyadapt.tests.speech_cases import (
    configuration,
    save_clip,
    save_manifest,
    save_whisper,
)
from polyadapt.tests.test_processes import assert_same, finished, started

pytestmark = pytest.mark.slow  # whole runs


def test_two_processes_with_workers_train_s2_lora_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_whisper()
    lines = ["path,text,split"]
    for index in range(12):  # two processes divide both parts, and get unequal numbers of tokens
        save_clip(f"{index}.wav", 0.4, index)
        part = "val" if index >= 8 else "train"
        lines.append(f"{index}.wav,{('one', 'twenty-seven', 'six')[index % 3]},{part}")
    Path("m.csv").write_text("\n".join(lines) + "\n")
    made = configuration(model__lr=0.01, trainer__max_epochs=3)
    made["model"]["adapter"] = {"class_path": "S2LoRA", "init_args": {"rank": 4, "l1": 0.1}}
    made["data"]["init_args"] |= {
        "batch_size": 4,
        "speeds": [0.9, 1.1],
        "noise": {"kinds": ["pink"]},
    }
    write("a.yaml", made)
    assert cli.main(["speech", "fit", "--config", "a.yaml", "--run", "one"]) == 0
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.init_args.batch_size=2"]
    words = ["--config", "a.yaml", "--run", "two", *two, "--data.init_args.num_workers=2"]
    finished(started(*words, domain="speech"))
    assert_same("two", "one")
    tensors = read_file("two/adapter.safetensors").tensors
    assert sum(name.startswith(".bank/") for name in tensors) == 2, "A and B, once"


def test_a_clip_that_a_worker_cannot_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_whisper()
    save_manifest(count=5)
    samples = np.full(6_400, 0.1)
    samples[3_200:] = np.nan
    soundfile.write("clips/2.wav", samples, 16_000, subtype="FLOAT")
    write("a.yaml", configuration(data__init_args__num_workers=1))
    assert cli.main(["speech", "fit", "--config", "a.yaml"]) == 2
    said = "polyadapt: clips/2.wav holds samples that are NaN or infinite, from 0.2 s on\n"
    assert capsys.readouterr().err == said
    assert not Path("runs/a/adapter.safetensors").exists()
