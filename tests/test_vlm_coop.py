"""CoOp's data: its split files, parts, shots and halves, and the eleven data sets on disk."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyadapt.core.errors import AdaptError
from polyadapt.core.images.preprocessing import Preprocessing
from polyadapt.core.images.sources import Source, Sources, array_source
from polyadapt.vlm.coop import (
    draw_shots,
    few_shot,
    half_of,
    read_split,
    split_by_seed,
)
from polyadapt.vlm.data_sets import DATA_SETS, CoOpData, read_data_set
from polyadapt.vlm.prompts import TEMPLATES

# Classes and test images of CoOp's table.
PUBLISHED = {
    "imagenet": (1000, 50000),
    "sun397": (397, 19850),
    "fgvc_aircraft": (100, 3333),
    "eurosat": (10, 8100),
    "stanford_cars": (196, 8041),
    "food101": (101, 30300),
    "oxford_pets": (37, 3669),
    "oxford_flowers": (102, 2463),
    "caltech101": (100, 2465),
    "dtd": (47, 1692),
    "ucf101": (101, 3783),
}
WITH_SPLIT = sorted(name for name, known in DATA_SETS.items() if known.split)
PETS = [["a.png", 0, "tabby cat"], ["b.png", 1, "Basset_hound"], ["c.png", 1, "Basset_hound"]]


def save(file: Path, colour: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file)


def pictures(folder: Path, classes: dict[str, int]) -> None:
    """Image files in a folder for each class."""
    for name, count in classes.items():
        for index in range(count):
            save(folder / name / f"{index}.png", index)


def split_file(folder: Path, **parts: Any) -> Path:
    """A split file beside the images a.png, b.png and c.png, whose red is 0, 1 and 2."""
    for colour, name in enumerate("abc"):
        save(folder / f"{name}.png", colour)
    file = folder / "split.json"
    file.write_text(json.dumps({"train": PETS, "val": [PETS[0]], "test": [PETS[2]]} | parts))
    return file


def source(counts: list[int]) -> Source:
    """counts[i] images of class i, the number of an image in its red."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return array_source(images, labels)


def reds(part: Source | None) -> list[int]:
    """What images a part holds."""
    assert part is not None
    return [np.asarray(part.image(i))[0, 0, 0].item() for i in range(len(part.labels))]


def test_a_split_file_decides_parts_labels_and_names(tmp_path: Path) -> None:
    sources = read_split(split_file(tmp_path), tmp_path)
    assert sources.classes == ("tabby cat", "Basset_hound")
    assert sources.train.labels == [0, 1, 1]
    assert reds(sources.train) == [0, 1, 2]
    assert (reds(sources.val), reds(sources.test)) == ([0], [2])


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"val": None}, "'val' is no list of"),
        ({"val": [["a.png", "0", "tabby cat"]]}, "'val' is no list of"),
        ({"val": [["a.png", -1, "tabby cat"]]}, "'val' is no list of"),
        ({"test": [["a.png", 0, "lynx"]]}, "the label 0 is 'tabby cat' and 'lynx'"),
        ({"test": [["a.png", 3, "lynx"]]}, "do not count from 0 to 2"),
        ({"test": [["a.png", 2, "lynx"]]}, "no training image of 'lynx'"),
        ({"test": [["d.png", 0, "tabby cat"]]}, "names 'd.png', but there is no file"),
        ({"train": [], "val": [], "test": []}, "do not count from 0"),
    ],
)
def test_a_split_file_of_another_form_is_refused(
    tmp_path: Path, parts: dict[str, Any], told: str
) -> None:
    with pytest.raises(AdaptError, match=told) as caught:
        read_split(split_file(tmp_path, **parts), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_split_file_that_is_no_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "split.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(AdaptError, match=r"split\.json"):
        read_split(file, tmp_path)


def test_without_a_published_split_every_class_is_halved_and_the_rest_divided_by_seed() -> None:
    made, again, other = (split_by_seed(("a", "b"), source([10, 20]), seed) for seed in (1, 1, 2))
    parts = [made.train, made.val, made.test]
    assert [Counter(part.labels) for part in parts if part] == [
        {0: 5, 1: 10},
        {0: 2, 1: 4},
        {0: 3, 1: 6},
    ]
    assert sorted(red for part in parts for red in reds(part)) == list(range(30))
    assert reds(made.train) == reds(again.train) != reds(other.train)


def test_shots_are_drawn_by_seed_without_repeats_where_there_are_enough() -> None:
    labels = [0] * 9 + [1] * 5
    drawn = draw_shots(labels, 4, seed=3)
    assert Counter(labels[i] for i in drawn) == {0: 4, 1: 4}
    assert len(set(drawn)) == 8
    assert drawn == draw_shots(labels, 4, seed=3) != draw_shots(labels, 4, seed=4)


def test_a_class_with_fewer_images_repeats_only_its_own_and_says_so() -> None:
    labels = [0] * 9 + [1] * 3
    with pytest.warns(UserWarning, match="shots=4: class 1 has only 3 images; .* more than once"):
        drawn = draw_shots(labels, 4, seed=0)
    assert Counter(labels[i] for i in drawn) == {0: 4, 1: 4}
    assert {i for i in drawn if i >= 9} == {9, 10, 11}
    assert len({i for i in drawn if i < 9}) == 4


def test_more_shots_than_images_are_refused_where_that_is_asked_for() -> None:
    with pytest.raises(AdaptError, match=r"shots=4: class 1 has only 3 images$"):
        draw_shots([0] * 9 + [1] * 3, 4, seed=0, fewer="refuse")
    with pytest.raises(AdaptError, match="shots=0"):
        draw_shots([0, 1], 0, seed=0)


@pytest.mark.parametrize(("shots", "validation"), [(1, 1), (4, 4), (8, 4)])
def test_few_shots_come_with_at_most_four_validation_images_a_class(
    shots: int, validation: int
) -> None:
    whole = Sources(("a", "b"), source([10, 10]), source([6, 6]), source([2, 3]))
    few = few_shot(whole, shots, seed=1)
    assert few.val is not None
    assert Counter(few.train.labels) == {0: shots, 1: shots}
    assert Counter(few.val.labels) == {0: validation, 1: validation}
    assert few.test is whole.test


def test_the_base_half_has_the_middle_class_and_new_classes_count_from_zero() -> None:
    whole = Sources(("a", "b", "c", "d", "e"), source([1, 1, 1, 1, 2]), None, source([0, 0, 1, 2]))
    base, new = half_of(whole, "base"), half_of(whole, "new")
    assert (base.classes, new.classes) == (("a", "b", "c"), ("d", "e"))
    assert (base.train.labels, new.train.labels) == ([0, 1, 2], [0, 1, 1])
    assert (reds(base.train), reds(new.train)) == ([0, 1, 2], [3, 4, 5])
    assert new.test is not None
    assert (new.test.labels, reds(new.test)) == ([0, 0], [1, 2])
    assert half_of(whole, "all") is whole


def test_the_eleven_data_sets_count_what_the_published_table_counts() -> None:
    assert {n: (known.classes, known.test_images) for n, known in DATA_SETS.items()} == PUBLISHED
    assert set(DATA_SETS) == set(TEMPLATES)


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_a_data_set_with_the_published_counts_is_read_without_a_warning(
    tmp_path: Path, name: str
) -> None:
    known = DATA_SETS[name]
    folder = tmp_path / known.folder
    save(folder / known.images / "one.png")
    rows = [["one.png", label, f"class {label}"] for label in range(known.classes)]
    test = [rows[i % known.classes] for i in range(known.test_images)]
    parts = {"train": rows, "val": rows, "test": test}
    (folder / str(known.split)).write_text(json.dumps(parts))
    sources = read_data_set(name, tmp_path)
    assert sources.test is not None
    assert (len(sources.classes), len(sources.test.labels)) == PUBLISHED[name]


def test_aircraft_is_read_from_its_own_lists(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    save(folder / "images" / "0034309.jpg")
    variants = [f"7{i:02}-100 ER" for i in range(100)]
    (folder / "variants.txt").write_text("\n".join(variants))
    for part, count in (("train", 3334), ("val", 3333), ("test", 3333)):
        lines = [f"0034309 {variants[i % 100]}\n" for i in range(count)]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    sources = read_data_set("fgvc_aircraft", tmp_path)
    assert sources.test is not None
    assert (len(sources.classes), len(sources.test.labels)) == PUBLISHED["fgvc_aircraft"]
    assert sources.classes[3] == "703-100 ER"
    (folder / "images_variant_val.txt").write_text("0034309 MiG-21\n")
    with pytest.raises(AdaptError, match="'0034309 MiG-21' names no variant"):
        read_data_set("fgvc_aircraft", tmp_path)


def test_imagenet_is_tested_on_its_validation_folder_and_counts_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    pictures(folder / "images" / "train", {"n02": 2, "n01": 3})
    pictures(folder / "images" / "val", {"n01": 1, "n02": 1})
    (folder / "classnames.txt").write_text("n02 tench\nn01 great white shark\n")
    with pytest.warns(UserWarning, match="2 classes and 2 test images here, 1000 and 50000 in"):
        sources = read_data_set("imagenet", tmp_path)
    assert sources.classes == ("tench", "great white shark")
    assert (sources.train.labels, sources.val) == ([0, 0, 1, 1, 1], None)


def test_without_a_split_file_class_folders_are_split_with_the_published_names(
    tmp_path: Path,
) -> None:
    folders = {"Faces": 10, "Faces_easy": 10, "BACKGROUND_Google": 10, "ant": 10}
    pictures(tmp_path / "caltech-101" / "101_ObjectCategories", folders)
    with pytest.warns(UserWarning, match="the parts are not the published ones"):
        sources = read_data_set("caltech101", tmp_path)
    assert sources.classes == ("face", "ant")
    parts = [sources.train, sources.val, sources.test]
    assert [len(part.labels) for part in parts if part] == [10, 4, 6]


@pytest.mark.parametrize("name", ["stanford_cars", "oxford_pets", "dtd"])
@pytest.mark.filterwarnings("ignore:.*the parts are not the published ones")
def test_a_data_set_that_is_not_there_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdaptError) as caught:
        read_data_set(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_data_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(AdaptError, match="unknown data set 'pets'; nearest: oxford_pets; there"):
        CoOpData("pets", "data")


@pytest.mark.filterwarnings("ignore:.*the parts are not the published ones")
def test_the_data_module_gives_k_images_of_every_class_of_a_half(tmp_path: Path) -> None:
    pictures(tmp_path / "dtd" / "images", {"banded": 8, "dotted": 8, "woven": 8})
    data = CoOpData("dtd", str(tmp_path), shots=2, half="base", seed=1)
    data.preprocessing = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    data.setup()
    assert data.classes == ("banded", "dotted")
    train = data.images("train")
    assert Counter(train[at][1] for at in range(len(train))) == {0: 2, 1: 2}
    assert [len(data.images(part)) for part in ("val", "test")] == [4, 4]


def test_a_whole_training_part_is_kept_where_no_shots_are_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path / "dtd" / "images", {"banded": 8, "dotted": 8})
    data = CoOpData("dtd", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data.setup()
    data.preprocessing = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert len(data.images("train")) == 8
