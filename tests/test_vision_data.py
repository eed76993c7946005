"""Where images come from, how they are split by seed, and what a backbone gets to see."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.images.data import ArrayData, ImageData, ImageFolders, TorchvisionData
from polyadapt.core.images.preprocessing import Preprocessing, open_image
from polyadapt.core.images.sources import TORCHVISION, array_source, read_arrays
from polyadapt.core.images.subsets import few_per_class, split_off
from polyadapt.tests.vision_cases import noise, save_images

WANTS = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def save_arrays(path: Path, number: int = 4, count: int = 40, **more: Any) -> None:
    labels = np.arange(count) % number
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    arrays: dict[str, Any] = {"train_images": images, "train_labels": labels} | more
    np.savez(path, **arrays)


def prepared(data: ImageData) -> ImageData:
    data.setup()
    data.preprocessing = WANTS
    return data


def batches(data: ImageData, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [(images, labels) for images, labels in loader]


# Subsets


def test_a_share_is_split_off_in_proportion_to_the_classes() -> None:
    labels = [0] * 30 + [1] * 10
    kept, off = split_off(labels, range(40), 0.2, seed=3)
    assert sorted(kept + off) == list(range(40))
    assert [sum(labels[i] == c for i in off) for c in (0, 1)] == [6, 2]
    assert split_off(labels, range(40), 0.2, seed=3) == (kept, off)
    assert split_off(labels, range(40), 0.2, seed=4) != (kept, off)


def test_few_per_class_are_as_many_of_each() -> None:
    labels = [i % 3 for i in range(30)]
    chosen = few_per_class(labels, range(30), shots=2, seed=0)
    assert sorted(labels[i] for i in chosen) == [0, 0, 1, 1, 2, 2]
    assert chosen == few_per_class(labels, range(30), shots=2, seed=0)
    assert chosen != few_per_class(labels, range(30), shots=2, seed=1)


@pytest.mark.parametrize("shots", [0, 4])
def test_shots_that_no_class_has_are_refused(shots: int) -> None:
    with pytest.raises(AdaptError, match=f"shots={shots}"):
        few_per_class([0, 0, 0, 1, 1, 1], range(6), shots, seed=0)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(AdaptError, match="from 0, below 1"):
        split_off([0, 1], range(2), share, seed=0)


# Data modules


def test_the_parts_share_no_image_and_shots_count_for_training_only(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = prepared(ArrayData(str(tmp_path / "a.npz"), val_share=0.2, test_share=0.1, shots=3))
    used = {part: set(data.images(part).indices) for part in ("train", "val", "test")}
    assert {part: len(indices) for part, indices in used.items()} == {
        "train": 12,
        "val": 7,
        "test": 4,
    }
    assert len(used["train"] | used["val"] | used["test"]) == 23


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_seed_and_epoch(tmp_path: Path, workers: int) -> None:
    save_arrays(tmp_path / "a.npz")
    common: dict[str, Any] = {"augmentation": "random_resized_crop", "batch_size": 16}
    alone = prepared(ArrayData(str(tmp_path / "a.npz"), **common))
    other = prepared(ArrayData(str(tmp_path / "a.npz"), num_workers=workers, **common))
    for epoch in (0, 1):
        pairs = zip(batches(alone, epoch), batches(other, epoch), strict=True)
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))
    assert not torch.equal(batches(alone, 0)[0][0], batches(alone, 1)[0][0])


def test_data_of_one_class_is_refused(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz", number=1)
    with pytest.raises(AdaptError, match="all 40 training images are of one class, '0'"):
        ArrayData(str(tmp_path / "a.npz")).setup()


def test_a_test_part_that_is_not_there_is_said(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = prepared(ArrayData(str(tmp_path / "a.npz"), val_share=0.0))
    assert data.val_dataloader() == []
    with pytest.raises(AdaptError, match="no test part"):
        data.test_dataloader()


def test_batches_without_preprocessing_are_refused(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = ArrayData(str(tmp_path / "a.npz"))
    data.setup()
    with pytest.raises(AdaptError, match=r"data\.preprocessing"):
        data.train_dataloader()


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"augmentation": "mixup"}, {"num_workers": -1}]
)
def test_settings_of_data_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match=next(iter(setting))):
        ArrayData("a.npz", **setting)


# Arrays


def test_arrays_may_be_grey_and_bring_names_and_parts(tmp_path: Path) -> None:
    grey = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    save_arrays(
        tmp_path / "a.npz",
        train_images=grey,
        train_labels=np.array([1, 0]),
        test_images=grey[..., 0],
        test_labels=np.array([0, 1]),
        classes=np.array(["cat", "dog"]),
    )
    sources = read_arrays(str(tmp_path / "a.npz"))
    assert sources.classes == ("cat", "dog")
    assert sources.val is None
    assert sources.test is not None
    assert list(sources.train.labels) == [1, 0]
    assert np.array_equal(np.array(sources.train.image(1)), grey[1, :, :, 0])
    assert np.array_equal(np.array(sources.test.image(1)), grey[1, :, :, 0])


IMAGES = np.zeros((4, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES.astype(np.float32), LABELS, "float32"),
        (IMAGES.transpose(0, 3, 1, 2), LABELS, r"\[4, 3, 8, 8\]"),
        (IMAGES, LABELS[:3], "for 4 images"),
        (IMAGES, LABELS.astype(float), "float64"),
        (IMAGES, LABELS - 1, "a label is -1"),
        (IMAGES[:0], LABELS[:0], "for 0 images"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(
    images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        array_source(images, labels)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": IMAGES}, "has no train_images; it has images"),
        ({"train_images": IMAGES}, "without train_labels"),
        (
            {"train_images": IMAGES, "train_labels": LABELS, "classes": np.array(["one"])},
            "a label is 1, but there are 1 classes",
        ),
        ({"train_images": np.array([{}], dtype=object), "train_labels": LABELS}, "plain arrays"),
    ],
)
def test_a_file_of_other_arrays_is_refused(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
    with pytest.raises(AdaptError, match=said):
        read_arrays(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "text"])
def test_a_damaged_array_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npz"
    save_arrays(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    contents = {"empty": b"", "truncated": whole[:-50], "flipped": flipped, "text": b"hello"}
    path.write_bytes(contents.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(AdaptError, match=str(path)) as refused:
        read_arrays(str(path))
    assert "\n" not in str(refused.value)


# Folders


def test_folders_with_parts_are_read_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("valid", 2), ("test", 3)):
        for name in ("cat", "dog"):
            save_images(tmp_path / part / name, count)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = prepared(ImageFolders(str(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert [len(data.images(part)) for part in ("train", "val", "test")] == [8, 4, 6]
    assert [data.images("test")[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.images("test")[1][0], WANTS(noise(1)))


def test_one_folder_is_split_by_seed(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 10)
    data = prepared(ImageFolders(str(tmp_path), val_share=0.25, test_share=0.2))
    assert [len(data.images(part)) for part in ("train", "val", "test")] == [12, 4, 4]


def test_an_unreadable_image_is_named_or_skipped_on_request(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 5)
    bad = tmp_path / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = prepared(ImageFolders(str(tmp_path), val_share=0.0))
    with pytest.raises(AdaptError, match=str(bad)):
        list(data.train_dataloader())
    with pytest.warns(UserWarning, match=f"skipped 1 of 10 images.*{bad}"):
        skipping = prepared(ImageFolders(str(tmp_path), "skip", val_share=0.0))
    assert len(skipping.images("train")) == 9
    assert sum(len(labels) for _, labels in skipping.train_dataloader()) == 9


def make_foreign_test_class(top: Path) -> None:
    for folder in ("train/a", "train/b", "test/c"):
        save_images(top / folder, 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda top: None, "there is no folder"),
        (lambda top: top.mkdir(), "no sub-folders"),
        (lambda top: (top / "cat").mkdir(parents=True), "holds no image"),
        (lambda top: save_images(top / "cat", 3), "of one class, 'cat'"),
        (
            make_foreign_test_class,
            "class without training images",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "top")
    with pytest.raises(AdaptError, match=said):
        ImageFolders(str(tmp_path / "top")).setup()


def test_an_image_with_more_than_8_bits_is_refused_instead_of_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(AdaptError, match="more than 8 bits"):
        open_image(tmp_path / "deep.png")


# torchvision


def test_every_known_data_set_is_torchvision_s() -> None:
    assert all(hasattr(torchvision.datasets, name) for name in TORCHVISION)


def test_an_unknown_data_set_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(AdaptError, match="unknown data set 'cifar_10'; nearest: CIFAR10"):
        TorchvisionData("cifar_10")


def make_eurosat(root: Path) -> None:
    for name in ("Forest", "River"):
        save_images(root / "eurosat" / "2750" / name, 5)


def make_dtd(root: Path) -> None:
    top = root / "dtd" / "dtd"
    for name in ("banded", "dotted"):
        save_images(top / "images" / name, 3)
    (top / "labels").mkdir()
    for part, index in (("train", 0), ("val", 1), ("test", 2)):
        lines = [f"{name}/{index}.png" for name in ("banded", "dotted")]
        (top / "labels" / f"{part}1.txt").write_text("\n".join(lines))


def make_pets(root: Path) -> None:
    top = root / "oxford-iiit-pet"
    save_images(top / "images", 4)
    for index in range(4):
        name = f"{('Abyssinian', 'beagle')[index % 2]}_{index}"
        (top / "images" / f"{index}.png").rename(top / "images" / f"{name}.jpg")
    (top / "annotations").mkdir()
    for part, indices in (("trainval", (0, 1)), ("test", (2, 3))):
        lines = [
            f"{('Abyssinian', 'beagle')[index % 2]}_{index} {index % 2 + 1} 1 1"
            for index in indices
        ]
        (top / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def make_gtsrb(root: Path) -> None:
    for label in (0, 1):
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        save_images(folder, 2)
        for index in range(2):
            noise(index).save(folder / f"{index}.ppm")
    images = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    save_images(images, 2)
    rows = "".join(f"{index}.png;1;1;0;0;1;1;{index}\n" for index in range(2))
    (root / "gtsrb" / "GT-final_test.csv").write_text(
        "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows
    )


@pytest.mark.parametrize(
    ("name", "make", "shares", "classes", "sizes"),
    [
        ("EuroSAT", make_eurosat, {"test_share": 0.2}, ("Forest", "River"), (6, 2, 2)),
        ("DTD", make_dtd, {}, ("banded", "dotted"), (2, 2, 2)),
        ("OxfordIIITPet", make_pets, {"val_share": 0.0}, ("Abyssinian", "Beagle"), (2, 0, 2)),
        ("GTSRB", make_gtsrb, {"val_share": 0.5}, ("0", "1"), (2, 2, 2)),
    ],
)
def test_a_data_set_of_torchvision_is_read_by_its_own_class(
    tmp_path: Path, name: str, make: Any, shares: dict[str, Any], classes: Any, sizes: Any
) -> None:
    make(tmp_path)
    data = TorchvisionData(name, str(tmp_path), download=False, **({"val_share": 0.2} | shares))
    data.prepare_data()
    prepared(data)
    assert data.classes == classes
    assert tuple(len(data.images(part)) for part in ("train", "val", "test")) == sizes
    image, label = data.images("train")[1]
    assert image.shape == (3, 8, 8)
    assert label in (0, 1)


def test_a_data_set_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match=r"SVHN is not whole in .* not found"):
        TorchvisionData("SVHN", str(tmp_path), download=False).setup()


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> io.BytesIO:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(AdaptError, match="CIFAR10 cannot be fetched") as refused:
        TorchvisionData("CIFAR10", str(tmp_path)).prepare_data()
    assert "\n" not in str(refused.value)
