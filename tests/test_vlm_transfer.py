"""`polyadapt vlm transfer`: what sets do on classes and on data that they have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyadapt.core import cli
from polyadapt.core.configuration import DomainCLI
from polyadapt.core.errors import AdaptError
from polyadapt.core.fitting import calm
from polyadapt.core.images.data import ArrayData, ImageFolders
from polyadapt.tests.command_cases import rows_of, write
from polyadapt.tests.vision_cases import noise
from polyadapt.tests.vlm_cases import COLOURS, TEMPLATE, TinyCLIP, configuration, save_colours
from polyadapt.vlm import few_shot, few_shot_words, transfer
from polyadapt.vlm.configuration import DOMAIN
from polyadapt.vlm.data_sets import CoOpData
from polyadapt.vlm.data_words import Where, data_called
from polyadapt.vlm.elsewhere import base_to_new, cross_data_set, top1_on
from polyadapt.vlm.few_shot_run import Run
from polyadapt.vlm.halves import HalfOfClasses
from polyadapt.vlm.records import Record
from polyadapt.vlm.transfer_report import AVERAGE, HARMONIC, table

WORDS = ["--out", "out", "--template", TEMPLATE, "--steps-per-shot", "2", "--shots", "2"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(few_shot_words, "backbone_called", lambda word: TinyCLIP(seed=len(word)))
    save_colours()
    save_four()


def save_four(path: str = "four.npz", *, test: bool = True) -> None:
    labels = np.arange(24) % 4
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    arrays: dict[str, Any] = {"train_images": images, "train_labels": labels}
    if test:  # in unequal numbers: one answer for all images is right for 7 of 9, 2 of 9, ...
        arrays |= {"test_images": images[:15], "test_labels": [0] * 7 + [1] * 2 + [2] + [3] * 5}
    np.savez(path, **arrays, classes=[*COLOURS, "grey"])


def transferred(*words: str) -> list[dict[str, str]]:
    assert transfer.main([*WORDS, "--backbone", "tiny", *words]) == 0
    return rows_of("out/transfer.csv")


# The command


@pytest.mark.slow
def test_sets_of_the_base_half_are_tested_on_both_halves_and_not_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", "four.npz", "--methods", "zero-shot,lora-1", "--seeds", "1,2"]
    rows = transferred(*words)
    found = {(row["method"], row["seed"], row["data"]): float(row["top1"]) for row in rows}
    assert len(rows) == len(found) == 6
    file = "out/lora-1-2-shot-seed2/adapter.safetensors"
    both = base_to_new(file, ArrayData("four.npz"))
    assert found["lora-1", "2", "four.npz-base"] == pytest.approx(both.base)
    assert found["lora-1", "2", "four.npz-new"] == pytest.approx(both.new)
    assert {(row["classes"], row["test_images"]) for row in rows} == {("2", "9"), ("2", "6")}
    assert "half: base\n" in Path("out/lora-1-2-shot-seed2/config.yaml").read_text()
    head = "| method | trainable | four.npz-base | four.npz-new | harmonic mean |"
    assert Path("out/transfer.md").read_text().startswith(head)
    capsys.readouterr()
    before = Path("out/transfer.csv").read_bytes()
    monkeypatch.setattr(Run, "record", lambda run: pytest.fail(f"{run.folder} is run again"))
    transferred(*words)
    assert "3 runs, 3 of them finished before" in capsys.readouterr().out
    assert Path("out/transfer.csv").read_bytes() == before
    with pytest.raises(AdaptError, match="holds a run with other settings: choose another --out"):
        transferred(*words, "--batch-size", "8")


@pytest.mark.slow
def test_runs_of_few_shot_are_tested_on_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*WORDS, "--data", "arrays.npz", "--seeds", "1", "--methods", "clip-lora"]
    assert few_shot.main([*run, "--backbone", "tiny"]) == 0
    trained = Path("out/clip-lora-2-shot-seed1/adapter.safetensors")
    written = trained.stat().st_mtime_ns
    save_folders("pets")
    rows = transferred(
        *("--data", "arrays.npz", "--seeds", "1", "--methods", "clip-lora"),
        *("--to", "four.npz", "pets"),
    )
    assert trained.stat().st_mtime_ns == written, "what few-shot trained is taken"
    wanted = cross_data_set(
        trained,
        {"four.npz": ArrayData("four.npz"), "pets": ImageFolders("pets")},
    )
    found = {row["data"]: float(row["top1"]) for row in rows}
    assert found["four.npz"] == pytest.approx(wanted["four.npz"])
    assert found["pets"] == pytest.approx(wanted["pets"])
    assert found["arrays.npz"] == pytest.approx(top1_on(trained, ArrayData("arrays.npz")))
    assert cross_data_set(trained, {"four": ArrayData("four.npz")}, {"four": "one {}."}) == {
        "four": pytest.approx(top1_on(trained, ArrayData("four.npz"), "one {}.")),
        "average": pytest.approx(top1_on(trained, ArrayData("four.npz"), "one {}.")),
    }
    assert "| average of the others |" in capsys.readouterr().out


def save_folders(root: str) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "owl")):
            folder = Path(root, part, name)
            folder.mkdir(parents=True)
            for index in range(2):
                noise(10 * number + index).save(folder / f"{index}.png")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "linear-probe"], "linear-probe answers only the classes that it was"),
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "lora-1,lora-1"], "two methods are called 'lora-1'"),
        (["--to", "none"], "there is no data 'none': a file .npz, a folder of images, or one of"),
        (["--to", "four.npz", "sub/four.npz"], "two data sets are called 'four.npz'"),
        (["--to", "bare.npz"], "bare.npz has no test part: test_images, or a folder test/"),
        (["--data", "bare.npz"], "bare.npz-base has no test part"),
        ([], "are of one class, 'blue': a classifier needs at least two"),  # of three, one is new
        (["--to", "four.npz", "--template", "a cat"], "has 0 slots"),
        (["--to", "wordy.npz"], "is longer than the 8 tokens that the model reads"),
        (["--to", "twice.npz"], "'Cat' and 'cat' are the same to the tokenizer"),
        (["--to", "imagenet"], "cannot read data/imagenet/classnames.txt"),
        (["--shots", "0"], "'0' is not a whole number from 1"),
        (["--to", "four.npz", "--shots", "9"], "has only 8 training images"),
    ],
)
def test_what_cannot_be_transferred_is_refused_in_one_line_before_anything_is_trained(
    words: list[str], told: str
) -> None:
    save_four("bare.npz", test=False)
    for name, classes in (("wordy", ["cat", " ".join(["long"] * 9)]), ("twice", ["Cat", "cat"])):
        arrays = dict(np.load("arrays.npz"))
        for part in ("train", "test"):
            arrays[f"{part}_labels"] = arrays[f"{part}_labels"] % 2
        np.savez(f"{name}.npz", **arrays | {"classes": np.array(classes)})
    with pytest.raises(AdaptError, match=told) as caught:
        transferred("--data", "arrays.npz", "--methods", "lora-1", "--seeds", "1", *words)
    assert "\n" not in str(caught.value)
    assert not list(Path().rglob("adapter.safetensors"))


# Words for data


def test_a_word_names_data_and_either_half_of_its_classes() -> None:
    dtd = data_called("dtd", "there")
    assert dtd == Where(CoOpData, {"name": "dtd", "root": "there"})
    assert dtd.part("base").spec(shots=4) == {
        "class_path": "CoOpData",
        "init_args": {"name": "dtd", "root": "there", "half": "base", "shots": 4},
    }
    four = data_called("four.npz", "").part("new")
    assert four.spec(shots=4) == {
        "class_path": "HalfOfClasses",
        "init_args": {
            "data": {"class_path": "ArrayData", "init_args": {"path": "four.npz"}},
            "half": "new",
            "shots": 4,
        },
    }
    module = four.module(shots=2, val_share=0.0)
    module.setup()
    assert module.classes == ("blue", "grey")
    assert four.title == "four.npz-new"


def test_a_configuration_names_half_of_the_classes_by_a_short_name() -> None:
    four = {"class_path": "ArrayData", "init_args": {"path": "four.npz"}}
    half = {"data": four, "half": "base", "shots": 2, "batch_size": 4}
    write("a.yaml", configuration(data={"class_path": "HalfOfClasses", "init_args": half}))
    with calm():
        built = DomainCLI(DOMAIN, "fit", ["--config", "a.yaml"])
    assert isinstance(built.datamodule, HalfOfClasses)
    built.datamodule.setup()
    assert built.datamodule.classes == ("red", "green")


def test_an_unknown_half_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    four = {"class_path": "ArrayData", "init_args": {"path": "four.npz"}}
    half = {"data": four, "half": "third"}
    write("a.yaml", configuration(data={"class_path": "HalfOfClasses", "init_args": half}))
    assert cli.main(["vlm", "fit", "--config", "a.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "third" in said


# The table


def test_the_table_has_a_column_for_each_data_set_and_one_over_them() -> None:
    def record(method: str, shots: int, seed: int, data: str, top1: float) -> Record:
        return Record(
            method=method, shots=shots, seed=seed, backbone="Tiny", data=data, template=TEMPLATE,
            classes=2, train_images=4, test_images=1200, top1=top1, trainable=1500, stored=1500,
            steps=1, seconds=1.0, memory_mib=None, settings="",
        )  # fmt: skip

    runs = [
        *(record("zero-shot", 0, 1, "a", 0.5), record("zero-shot", 0, 1, "b", 0.5)),
        *(record("lora", 4, 1, "a", 0.6), record("lora", 4, 1, "b", 0.3)),
        *(record("lora", 4, 2, "a", 0.8), record("lora", 4, 2, "b", 0.2)),
    ]
    lines = table(runs, HARMONIC).splitlines()
    assert lines[0] == "| method | trainable | a | b | harmonic mean |"
    assert lines[2] == "| zero-shot | 1,500 | 50.0 | 50.0 | 50.0 |"
    # 2 * 0.6 * 0.3 / 0.9 = 0.4 and 2 * 0.8 * 0.2 / 1.0 = 0.32
    assert lines[3] == "| lora | 1,500 | 70.0 +- 14.1 | 25.0 +- 7.1 | 36.0 +- 5.7 |"
    assert "seeds 1, 2. Trained on 4 shots of a. Backbone Tiny" in lines[-1]
    assert "Trained" not in table(runs[:2], HARMONIC)
    assert "a 2 (1,200), b 2 (1,200)" in lines[-1]
    averaged = table([*runs, *(record("lora", 4, s, "c", 0.5) for s in (1, 2))][2:], AVERAGE)
    assert averaged.splitlines()[2].endswith("| 37.5 +- 3.5 |")
