"""VTAB-1k: its tasks, splits, means and preprocessing, and the command that runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from polyadapt.core import AdaptError
from polyadapt.core.images.data import ImageData, ImageLists
from polyadapt.core.images.lists import read_list, read_lists
from polyadapt.core.images.preprocessing import Mode, Preprocessing
from polyadapt.tests.command_cases import Ran, command, rows_of, write
from polyadapt.tests.vision_cases import configuration
from polyadapt.tests.vtab_cases import save_task, save_vtab_mini
from polyadapt.vision.vtab_tasks import (
    FINAL,
    GROUPS,
    TASKS,
    TUNE,
    check_lists,
    deviations,
    means,
    tasks_in,
)

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]  # whole runs


KITTI = next(task for task in TASKS if task.name == "kitti")
CAMELYON = next(task for task in TASKS if task.name == "patch_camelyon")

# Per task as its authors print them, in the usual order of the tasks.
HYDRA = [72.7, 91.3, 72.0, 99.2, 91.4, 90.7, 55.5, 85.8, 96.0, 86.1, 75.9]
HYDRA += [83.2, 68.2, 50.9, 82.3, 80.3, 50.8, 34.5, 43.1]

# Group means of published rows, and both means over all tasks.
PUBLISHED = {
    "Full": (75.89, 83.38, 47.64, 68.97, 65.57),
    "Linear": (69.07, 77.12, 26.85, 57.68, 52.99),
    "Adapter": (79.01, 84.08, 58.49, 73.86, 71.44),
    "AdaptFormer": (80.56, 84.88, 58.83, 74.75, 72.32),
    "LoRA": (79.49, 84.55, 59.78, 74.60, 72.25),
    "VPT-Deep": (78.49, 82.42, 55.00, 71.97, 69.43),
    "NOAH": (80.26, 84.88, 61.30, 75.48, 73.25),
    "SSF": (81.57, 86.55, 58.96, 75.69, 73.10),
    "FacT-TK": (80.64, 85.30, 60.71, 75.55, 73.23),
    "RepAdapter": (81.63, 85.42, 61.23, 76.09, 73.84),
    "Hydra": (81.83, 85.95, 61.66, 76.48, 74.21),
    "SNELL-16": (82.39, 86.08, 61.66, 76.71, 74.44),
}


def lists_of(folder: str, **texts: str) -> Path:
    root = Path(folder)
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return root


def save_configuration(**changes: Any) -> None:
    """a.yaml: a tiny ViT for one epoch; the command says where images come from."""
    data = {"root": "nowhere", "batch_size": 6}
    settings = {"data__class_path": "ImageLists", "data__init_args": data}
    write("a.yaml", configuration(**settings, **{"trainer__max_epochs": 1, **changes}))


def vtab(capsys: pytest.CaptureFixture[str], *more: str) -> Ran:
    words = ("--root=mini", "--config=a.yaml", "--out=out", *more)
    return command(capsys, "vision", "vtab")(*words)


def records() -> dict[str, dict[str, Any]]:
    return {f.parent.name: json.loads(f.read_text()) for f in Path("out").glob("*/record.json")}


# Tasks and means


def test_the_groups_have_7_4_and_8_tasks() -> None:
    assert [sum(task.group == group for task in TASKS) for group in GROUPS] == [7, 4, 8]


def test_the_classes_sum_to_940_and_to_a_mean_head_of_38_045_numbers() -> None:
    counts = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert [task.classes for task in TASKS] == counts
    assert sum(counts) == 940
    assert round(sum(769 * count for count in counts) / 19) == 38_045


def test_the_means_of_a_published_row_task_by_task() -> None:
    found = means(dict(zip((task.name for task in TASKS), HYDRA, strict=True)))
    groups = {group: round(value, 2) for group, value in found.groups.items()}
    assert groups == {"Natural": 81.83, "Specialized": 85.95, "Structured": 61.66}
    assert (round(found.a, 2), round(found.b, 2)) == (76.48, 74.21)


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_both_means_of_published_group_means(row: tuple[float, ...]) -> None:
    group_means = dict(zip(GROUPS, row, strict=False))
    found = means({task.name: group_means[task.group] for task in TASKS})
    assert found.a == pytest.approx(row[3], abs=0.011)  # from group means of two decimals
    assert found.b == pytest.approx(row[4], abs=0.011)


def test_the_deviation_of_a_mean_is_the_root_of_the_squares_by_their_number() -> None:
    found = deviations({"cifar": 3.0, "svhn": 4.0, "kitti": 6.0})
    assert found.groups == {"Natural": 2.5, "Structured": 6.0}
    assert found.a == pytest.approx((2.5**2 + 6**2) ** 0.5 / 2)
    assert found.b == pytest.approx((9 + 16 + 36) ** 0.5 / 3)


def test_a_mean_of_no_task_or_of_an_unknown_one_is_refused() -> None:
    with pytest.raises(AdaptError, match="no task 'cifar10'"):
        means({"cifar10": 1.0})
    with pytest.raises(AdaptError, match="no task to take a mean of"):
        means({})


# Lists


def test_a_list_gives_images_and_labels_in_its_order() -> None:
    save_task(Path("mini"), KITTI)
    data = ImageLists("mini/kitti", val="val200.txt", train="train800.txt", classes=4)
    data.setup()
    data.preprocessing = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    assert [len(data.images(part)) for part in ("train", "val", "test")] == [8, 4, 4]
    assert data.classes == ("0", "1", "2", "3")
    image, label = data.images("val")[2]
    with Image.open("mini/kitti/images/val200/2.png") as file:
        assert torch.equal(image, data.preprocessing(file))
    assert label == 2


def test_the_final_training_takes_all_images_when_no_share_is_split_off() -> None:
    save_task(Path("mini"), KITTI)
    data = ImageLists("mini/kitti", val_share=0.0)
    data.setup()
    data.preprocessing = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    assert [len(data.images(part)) for part in ("train", "val", "test")] == [12, 0, 4]


def test_a_path_may_hold_blanks_and_a_mark_of_the_encoding_is_no_part_of_it() -> None:
    root = lists_of("a", train="\ufeffone two.png 1\n\nx.png  0\n")
    assert read_list(root / "train.txt") == [("one two.png", 1), ("x.png", 0)]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({}, "there is no list a/train.txt"),
        ({"train": "\n"}, "the list a/train.txt is empty"),
        ({"train": "x.png 0\ny.png\n"}, "a/train.txt, line 2: 'y.png' is not a path and a label"),
        ({"train": "x.png -1\n"}, "line 1: 'x.png -1'"),
        ({"train": f"x.png {'9' * 5000}\n"}, "label from 0 .of 6 digits at most"),
        ({"train": "x.png 0\n"}, "a/train.txt names x.png, which is no file in a .1 of 1 images"),
        ({"train": "x.png 0\ny.png 3\n"}, "a label is 3, but there are 3 classes"),
        ({"train": "x.png 0\ny.png 1\n", "test": "y.png 1\n"}, "y.png is in train.txt and test"),
        ({"train": "x.png 0\n", "val": "x.png 1\n"}, "x.png is in train.txt and val.txt"),
    ],
)
def test_a_bad_list_is_refused(texts: dict[str, str], told: str) -> None:
    root = lists_of("a", **texts)
    parts = {part: f"{part}.txt" for part in texts} | {"train": "train.txt"}
    with pytest.raises(AdaptError, match=told):
        read_lists(root, parts, classes=3)


def test_lists_that_do_not_add_up_are_refused() -> None:
    save_task(Path("mini"), KITTI)
    check_lists(Path("mini"), KITTI, FINAL)
    lists_of("mini/kitti", train800val200="images/train800/0.png 0\n")
    with pytest.raises(AdaptError, match=r"has 1 lines, train800\.txt and val200\.txt together 12"):
        check_lists(Path("mini"), KITTI, FINAL)


def test_tasks_are_found_by_the_lists_that_a_split_needs() -> None:
    save_vtab_mini(Path("mini"), [KITTI, CAMELYON])
    Path("mini/kitti/val200.txt").unlink()
    Path("mini/kitti/train800val200.txt").unlink()
    assert tasks_in(Path("mini"), TUNE) == [CAMELYON]
    Path("empty").mkdir()
    with pytest.raises(AdaptError, match="empty holds no task of VTAB-1k"):
        tasks_in(Path("empty"), TUNE)


# Preprocessing

OWN = Preprocessing(size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


@pytest.mark.parametrize(
    ("mode", "interpolation", "white"),
    [
        ("vtab_orig", "bilinear", [1.0, 1.0, 1.0]),
        ("vtab_vpt", "bilinear", [2.2489, 2.4286, 2.6400]),
        ("vtab_fact", "bicubic", [2.2489, 2.4286, 2.6400]),
        ("vtab_raw", "bicubic", [1.0, 1.0, 1.0]),
    ],
)
def test_a_mode_squashes_the_image_and_scales_as_its_line_of_work_does(
    mode: Mode, interpolation: str, white: list[float]
) -> None:
    wants = OWN.in_mode(mode)
    assert (wants.interpolation, wants.crop_mode, wants.crop_pct) == (interpolation, "squash", 1.0)
    pixels = wants(Image.new("RGB", (9, 3), "white"))
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor(white), atol=1e-4, rtol=0)
    black = wants(Image.new("RGB", (9, 3)))[0, 0, 0].item()
    assert black == pytest.approx({"vtab_orig": -1.0, "vtab_raw": 0.0}.get(mode, -2.1179), abs=1e-4)


def test_the_other_modes_are_the_backbones_own_and_imagenets() -> None:
    assert OWN.in_mode("backbone") == OWN
    assert OWN.in_mode("imagenet") == OWN.imagenet()


# The command


def test_a_task_is_trained_on_all_images_and_tested_once_after_the_last_epoch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vtab_mini(Path("mini"), [KITTI])
    save_configuration(trainer__max_epochs=2)
    opened: list[str] = []
    real = ImageData.test_dataloader

    def counted(self: ImageData) -> DataLoader[Any]:
        opened.append(type(self).__name__)
        return real(self)

    monkeypatch.setattr(ImageData, "test_dataloader", counted)
    ran = vtab(capsys, "--seeds=0,3", "--preprocessing=raw")
    assert (ran.code, ran.err) == (0, "")
    assert opened == ["ImageLists"] * 2  # once for each of two runs
    found = records()
    assert set(found) == {"kitti-seed0", "kitti-seed3"}
    record = found["kitti-seed3"]
    (row,) = rows_of("out/kitti-seed3/test_metrics.csv")
    assert float(row["test_top1"]) == record["top1"]
    expected = {
        "name": "kitti",
        "method": "LoRA",
        "backbone": "vit_tiny_patch16_224",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "resize": "16x16, squash",
        "interpolation": "bicubic",
        "seed": 3,
        "epochs": 2,
        "epoch_rule": "last",
        "mean_convention": "A: mean of the 3 group means; B: flat mean of the tasks",
        "train_images": 12,
        "part": "test",
        "trainable": 2 * 2 * (96 + 288),
        "head": 4 * 97,
        "with_head": 2 * 2 * (96 + 288) + 4 * 97,
    }
    assert {name: record[name] for name in expected} == expected
    effective = yaml.safe_load(Path("out/kitti-seed3/config.yaml").read_text())
    assert effective["seed_everything"] == effective["data"]["init_args"]["seed"] == 3


def test_tuning_trains_on_800_and_measures_the_other_200(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vtab_mini(Path("mini"), [KITTI])
    save_configuration()
    monkeypatch.setattr(ImageData, "test_dataloader", None)  # the test part is not touched
    ran = vtab(capsys, "--split=tune")
    assert (ran.code, ran.err) == (0, "")
    (record,) = records().values()
    assert (record["part"], record["train_images"]) == ("val", 8)
    assert "measured on val200 after training on train800" in ran.out


def test_the_table_names_the_tasks_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    save_vtab_mini(Path("mini"), [CAMELYON, KITTI])
    save_configuration()
    ran = vtab(capsys)
    assert ran.code == 0
    table = Path("out/table.txt").read_text()
    assert table in ran.out
    lines = table.splitlines()
    (missing,) = (line for line in lines if line.startswith("missing 17 of 19: cifar, caltech101"))
    assert "kitti" not in missing
    assert missing.endswith("not over VTAB-1k")
    top1 = {name: 100 * record["top1"] for name, record in records().items()}
    mean = f"{sum(top1.values()) / 2:.2f}"
    assert [line.split()[-1] for line in lines if line[:2] in ("A ", "B ")] == [mean, mean]
    assert "not VTAB-1k's 1000 training images: kitti, patch_camelyon" in lines
    rows = rows_of("out/results.csv")
    assert [row["name"] for row in rows] == ["patch_camelyon", "kitti"]
    assert rows[0]["mean"] == "0.5 0.5 0.5"


def test_a_second_call_repeats_no_finished_fit_and_does_the_missing_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_vtab_mini(Path("mini"), [CAMELYON, KITTI])
    save_configuration()
    assert vtab(capsys).code == 0
    results, kept = Path("out/results.csv").read_text(), Path("out/kitti-seed0/adapter.safetensors")
    stamp = kept.stat().st_mtime_ns
    Path("out/patch_camelyon-seed0/record.json").unlink()  # as if it had been stopped
    assert vtab(capsys).code == 0
    assert kept.stat().st_mtime_ns == stamp
    again = Path("out/results.csv").read_text()
    strip = [line.rsplit(",", 2)[0] for line in results.splitlines()]  # without the seconds
    assert [line.rsplit(",", 2)[0] for line in again.splitlines()] == strip


@pytest.mark.parametrize("wrong", ["images/test/0.png", "train800val200.txt"])
def test_what_is_wrong_with_the_last_task_is_told_before_the_first_is_trained(
    capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    save_vtab_mini(Path("mini"), [CAMELYON, KITTI])
    save_configuration()
    Path("mini/kitti/val200.txt").unlink()
    if wrong.endswith(".png"):
        Path("mini/kitti", wrong).unlink()
        told = "mini/kitti/test.txt names images/test/0.png, which is no file in mini/kitti (1 of 4"
    else:
        Path("mini/kitti", wrong).write_text("images/train800/0.png 4\n")
        told = "mini/kitti: a label is 4, but there are 4 classes"
    assert told in vtab(capsys).line()
    assert not Path("out").exists()


def test_records_of_other_settings_are_not_taken_for_these(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_vtab_mini(Path("mini"), [KITTI])
    save_configuration()
    assert vtab(capsys).code == 0
    line = vtab(capsys, "--preprocessing=vpt").line()
    assert "out/kitti-seed0 holds a run with other settings: choose another --out" in line
    Path("out/kitti-seed0/record.json").write_text("{}")
    assert "record.json is no record of a fit" in vtab(capsys).line()


def test_another_epoch_than_the_last_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    save_vtab_mini(Path("mini"), [KITTI])
    save_configuration(monitor="val_top1")
    assert "monitor='val_top1' is not allowed here" in vtab(capsys).line()
    assert not records()


@pytest.mark.slow
def test_all_19_tasks_give_a_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    save_vtab_mini(Path("mini"))
    save_configuration()
    ran = vtab(capsys)
    assert (ran.code, ran.err) == (0, "")
    found = {record["name"]: 100 * record["top1"] for record in records().values()}
    assert found.keys() == {task.name for task in TASKS}
    lines = Path("out/table.txt").read_text().splitlines()
    assert not any(line.startswith("missing") for line in lines)
    summary = means(found)
    shown = {line.split()[0]: line.split()[-1] for line in lines if "mean of the" in line}
    assert shown == {"A": f"{summary.a:.2f}", "B": f"{summary.b:.2f}"}
    classes = {line.split()[1]: line.split()[2] for line in lines[1:20]}
    assert classes == {task.name: str(task.classes) for task in TASKS}
