"""`polyadapt vlm few-shot`: methods by shots and seeds, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core import attach
from polyadapt.core.errors import AdaptError
from polyadapt.core.images.data import ArrayData
from polyadapt.core.records import RECORD, read_record
from polyadapt.tests.command_cases import rows_of, write
from polyadapt.tests.vlm_cases import COLOURS, TEMPLATE, TinyCLIP, configuration, save_colours
from polyadapt.vlm import few_shot, few_shot_words
from polyadapt.vlm.baselines import accuracy
from polyadapt.vlm.data_words import Where
from polyadapt.vlm.few_shot_report import picture, table
from polyadapt.vlm.few_shot_run import Comparison, Run
from polyadapt.vlm.frozen_features import FrozenFeatures
from polyadapt.vlm.methods import ADAPTERS, BASELINES, method_called
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.predict import Classifier
from polyadapt.vlm.records import Record

pytestmark = pytest.mark.slow  # whole runs

WORDS = ["--data", "arrays.npz", "--out", "out", "--template", TEMPLATE, "--steps-per-shot", "2"]
Command = Callable[..., None]


@pytest.fixture(autouse=True)
def _in_a_folder_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(few_shot_words, "backbone_called", lambda word: TinyCLIP(seed=len(word)))
    save_colours()


def compare(*words: str) -> None:
    assert few_shot.main([*WORDS, "--backbone", "tiny", *words]) == 0


def outcomes() -> list[dict[str, str]]:
    return rows_of("out/outcomes.csv")


def record(method: str, shots: int, seed: int, top1: float, **changes: Any) -> Record:
    made: dict[str, Any] = {
        "method": method,
        "shots": shots,
        "seed": seed,
        "backbone": "Tiny",
        "data": "pets",
        "template": TEMPLATE,
        "classes": 3,
        "train_images": 3 * shots,
        "test_images": 1200,
        "top1": top1,
        "trainable": 0,
        "stored": 0,
        "steps": 0,
        "seconds": 1.0,
        "memory_mib": None,
        "settings": "",
    }
    return Record(**made | changes)


def shared(**changes: Any) -> Comparison:
    settings: dict[str, Any] = {"where": Where(ArrayData, {"path": "arrays.npz"})}
    return Comparison(backbone=TinyCLIP(), **settings | {"template": TEMPLATE} | changes)


# The command


@pytest.mark.slow
def test_a_comparison_writes_every_run_a_table_and_a_picture_and_is_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("mine.yaml", configuration(model__lr=0.5, model__weight_decay=0.0))
    methods = ",".join([*BASELINES, "block-lora", "mine.yaml"])
    compare("--shots", "1,2", "--seeds", "3", "--methods", methods)
    rows = outcomes()
    found = {(row["method"], int(row["shots"])): row for row in rows}
    learning = [*BASELINES[1:], "block-lora", "mine"]
    assert set(found) == {("zero-shot", 0)} | {(m, k) for m in learning for k in (1, 2)}
    assert {row["train_images"] for row in rows if row["shots"] == "2"} == {"6"}
    assert {row["test_images"] for row in rows} == {"6"}
    assert [found["mine", k]["steps"] for k in (1, 2)] == ["2", "4"]
    assert int(found["mine", 2]["trainable"]) > int(found["block-lora", 2]["trainable"]) > 0
    assert "lr: 0.5" in Path("out/mine-1-shot-seed3/config.yaml").read_text()
    assert Path("out/few_shot.png").read_bytes()[1:4] == b"PNG"
    assert Path("out/table.md").read_text().startswith("| method | 1 shot | 2 shots |")
    capsys.readouterr()
    before = Path("out/outcomes.csv").read_bytes()
    monkeypatch.setattr(Run, "record", lambda run: pytest.fail(f"{run.folder} is run again"))
    compare("--shots", "1,2", "--seeds", "3", "--methods", methods)
    assert "11 runs, 11 of them finished before" in capsys.readouterr().out
    assert Path("out/outcomes.csv").read_bytes() == before
    with pytest.raises(AdaptError, match="holds a run with other settings: choose another --out"):
        compare("--shots", "1", "--seeds", "3", "--methods", "mine.yaml", "--batch-size", "8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "magic"], "unknown method 'magic'; there are zero-shot, linear-probe"),
        (["--methods", "none.yaml"], "there is no configuration none.yaml"),
        (["--methods", "clip-lora,clip-lora"], "two methods are called 'clip-lora'"),
        (["--data", "none"], "there is no data 'none': a file .npz, a folder of images, or one of"),
        (["--shots", "0"], "shots=0 is not allowed"),
        (["--shots", "1,1"], "'1,1' is not a list of different whole numbers"),
        (["--template", "a cat"], "has 0 slots"),
        (["--shots", "9", "--methods", "linear-probe"], "has only 8 training images"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(AdaptError, match=told) as caught:
        compare(*words)
    assert "\n" not in str(caught.value)


def test_data_without_a_test_part_is_refused() -> None:
    arrays = dict(np.load("arrays.npz"))
    kept = {name: array for name, array in arrays.items() if not name.startswith("test")}
    np.savez("arrays.npz", **kept)
    for method in ("zero-shot", "lora-1"):
        with pytest.raises(AdaptError, match="the data has no test part"):
            compare("--methods", method, "--shots", "1", "--seeds", "1")
    assert not list(Path("out").rglob("*.yaml")), "nothing was trained"


def test_a_damaged_record_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"method": "lora"}')
    with pytest.raises(AdaptError, match=r"record\.json is no record of a run"):
        read_record(Record, tmp_path, "")
    assert read_record(Record, tmp_path / "none", "") is None


# Methods


def test_the_methods_train_what_the_minimum_table_of_block_lora_counts() -> None:
    model = TinyCLIP().build()
    at, counts = sites_for(model), {}
    for name in ("clip-lora", "block-lora", "block-lora-input", "lora-1", "lora-1-fast"):
        made = attach(model, ADAPTERS[name], at=at, name=name)
        counts[name] = made.trainable_count()
        made.detach()
    whole = counts["clip-lora"]
    assert counts["block-lora"] == counts["block-lora-input"] == whole * 3 // 4
    assert counts["lora-1"] == counts["lora-1-fast"] == whole // 2


def test_block_lora_and_its_fast_lora_have_the_words_of_their_settings() -> None:
    (said,) = method_called("lora-1-fast").words
    assert '"class_path": "LoRA"' in said
    assert '"lr_ratio": 2.0' in said
    assert method_called("zero-shot").words == ()
    assert not method_called("zero-shot").learns


def test_settings_of_a_run_follow_what_it_depends_on() -> None:
    zero, probe = method_called("zero-shot"), method_called("linear-probe")
    base, other = shared(), shared(template="one {}.")
    assert base.settings(zero, 1, 1) == base.settings(zero, 4, 2)
    assert base.settings(zero, 1, 1) != other.settings(zero, 1, 1)
    assert base.settings(probe, 1, 1) != base.settings(probe, 1, 2)
    tip, few = method_called("tip-adapter"), shared(views=1)
    assert base.settings(probe, 1, 1) == few.settings(probe, 1, 1), "it has no views"
    assert base.settings(tip, 1, 1) != few.settings(tip, 1, 1)
    assert base.settings(method_called("lora-1"), 1, 1) != base.settings(
        method_called("lora-8"), 1, 1
    )


# Features


def test_features_are_normalised_and_views_are_those_of_training() -> None:
    frozen = FrozenFeatures(TinyCLIP(), shared().data, TEMPLATE)
    data = frozen.shots(2, 1)
    plain, views, labels = frozen.train(data, views=2)
    assert (plain.shape[0], views.shape[:2]) == (6, (2, 6))
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(views.norm(dim=-1), torch.ones(2, 6))
    assert not torch.allclose(views[0], views[1])
    with torch.no_grad():
        pixels, label = data.images("train")[1, 4]
        torch.testing.assert_close(views[1, 4], frozen.pair.image_features(pixels[None])[0])
    assert label == labels[4]


def test_zero_shot_is_what_the_classifier_of_prompts_says() -> None:
    run = Run(shared(), method_called("zero-shot"), 1, 1, Path("out"))
    model = TinyCLIP().build().eval()
    classifier = Classifier(TinyCLIP().image_text(model), COLOURS, (TEMPLATE,))
    data = ArrayData("arrays.npz", val_share=0.0)
    data.preprocessing = classifier.preprocessing
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert run.record().top1 == accuracy(classifier.probabilities(images), labels)


# The report


def test_the_table_has_a_row_per_method_with_mean_and_spread() -> None:
    runs = [
        record("zero-shot", 0, 1, 0.5),
        record("lora", 1, 1, 0.6, trainable=1500, stored=1500, steps=10, seconds=5.0),
        record("lora", 1, 2, 0.8, trainable=1500, stored=1500, steps=10, seconds=5.0),
        record("lora", 4, 1, 0.9, trainable=1500, stored=1500, steps=40, memory_mib=10.6),
    ]
    lines = table(runs).splitlines()
    assert lines[0] == "| method | 1 shot | 4 shots | trainable | stored | s per step | MiB |"
    assert lines[2] == "| zero-shot | 50.0 | 50.0 | 0 | 0 | - | - |"
    assert lines[3] == "| lora | 70.0 +- 14.1 | 90.0 | 1,500 | 1,500 | 0.500 | 11 |"
    assert "seeds 1, 2, on 1,200 test images of 3 classes" in lines[-1]
    assert picture(runs)[1:4] == b"PNG"
