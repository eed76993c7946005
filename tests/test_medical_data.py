"""Which picture has which mask, who is in which part, and what a SAM gets to see."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.tests.medical_cases import SPARSE, as_nifti, save_vessels
from polyadapt.vision.medical.data import (
    Batch,
    ChaseDB1,
    GeneratedVessels,
    SegmentationData,
    SegmentationFolders,
)
from polyadapt.vision.medical.folders import find_pairs
from polyadapt.vision.medical.view import View

NAMES = [f"p{patient}_{eye}" for patient in range(5) for eye in "ab"]
PATIENT = r"(p\d+)_"


def folders(root: Path, **how: Any) -> SegmentationFolders:
    return SegmentationFolders(str(root), "_mask", **{"patient": PATIENT} | how)


def refused(root: Path, suffix: str = "_mask", **how: Any) -> str:
    with pytest.raises(AdaptError) as caught:
        find_pairs(str(root), suffix, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(data: SegmentationData) -> dict[str, list[str]]:
    data.setup()
    return {part: [case.name for case in data.cases(part)] for part in ("train", "val", "test")}


def split_file(root: Path, *rows: str, name: str = "data_split.csv") -> None:
    (root / name).write_text("\n".join(["imgs,split", *rows]) + "\n")


# Pairs


def test_the_layout_of_salt_is_read_with_its_split_file(tmp_path: Path) -> None:
    save_vessels(tmp_path, ["a", "b", "c", "d"])
    split_file(tmp_path, "a.png,train", "b.png,test", "c.png,val")
    pairs = find_pairs(str(tmp_path), "_mask")
    # d is in no split: left out.
    assert [(pair.name, pair.part) for pair in pairs] == [
        ("a", "train"),
        ("b", "test"),
        ("c", "val"),
    ]
    assert pairs[1].mask.name == "masks/b_mask.png"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a.png,train", "z.png,test"], "names 1 that are no pictures here, first z"),
        (["a.png,train", "a.png,test"], "a.png is in train and in test"),
        (["a.png,dev"], "the split of a.png is 'dev'"),
        (["a.png,"], "a value of imgs or split is empty"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(
    tmp_path: Path, rows: list[str], said: str
) -> None:
    save_vessels(tmp_path, ["a"])
    split_file(tmp_path, *rows)
    assert said in refused(tmp_path)


def test_a_split_file_that_is_missing_or_no_table_is_refused(tmp_path: Path) -> None:
    save_vessels(tmp_path, ["a"])
    assert "cannot read none.csv" in refused(tmp_path, split_file="none.csv")
    (tmp_path / "own.csv").write_text("image,part\na,train\n")
    assert "has no column 'imgs'" in refused(tmp_path, split_file="own.csv")


def test_a_picture_without_a_mask_is_refused_by_name(tmp_path: Path) -> None:
    save_vessels(tmp_path, ["a", "b"])
    (tmp_path / "masks/b_mask.png").unlink()
    assert "b.png has no mask: masks/b_mask with any suffix" in refused(tmp_path)
    assert "has no pictures" in refused(tmp_path / "masks")
    shutil.copy(tmp_path / "masks/a_mask.png", tmp_path / "masks/a_mask.bmp")
    said = refused(tmp_path)
    assert "a_mask.bmp and " in said
    assert "a_mask.png would be masks of one picture" in said


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    save_vessels(tmp_path / "train", ["a"])
    save_vessels(tmp_path / "test", ["a"])
    assert "test/images/a.png and train/images/a.png have one name" in refused(tmp_path)


def test_folders_named_after_parts_are_the_parts(tmp_path: Path) -> None:
    save_vessels(tmp_path / "training", ["a", "b"])
    save_vessels(tmp_path / "test", ["c"])
    data = SegmentationFolders(str(tmp_path), "_mask", val_share=0)
    assert names(data) == {"train": ["a", "b"], "val": [], "test": ["c"]}


def test_masks_beside_their_pictures_and_those_of_a_second_observer(tmp_path: Path) -> None:
    save_vessels(tmp_path / "made", ["x_1", "x_2"], "_1st")
    for file in sorted((tmp_path / "made").rglob("*.png")):
        shutil.copy(file, tmp_path / file.name)
    shutil.rmtree(tmp_path / "made")
    shutil.copy(tmp_path / "x_1_1st.png", tmp_path / "x_1_2nd.png")
    assert [pair.name for pair in find_pairs(str(tmp_path), "_1st")] == ["x_1", "x_2"]
    (tmp_path / "x_2_1st.png").unlink()
    assert "x_2.png has no mask" in refused(tmp_path, "_1st")


def test_a_zip_gives_what_its_folder_gives(tmp_path: Path) -> None:
    save_vessels(tmp_path / "in", NAMES[:2])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in sorted((tmp_path / "in").rglob("*.png")):
            archive.write(file, f"set/{file.relative_to(tmp_path / 'in')}")
    one, other = folders(tmp_path / "in"), folders(tmp_path / "in.zip")
    for data in (one, other):
        data.setup()
    for case, same in zip(one.cases("train"), other.cases("train"), strict=True):
        assert np.array_equal(case.read()[0].pixels, same.read()[0].pixels)
        assert np.array_equal(case.read()[1], same.read()[1])


@pytest.mark.parametrize("top", ["", "set/"], ids=["at the top", "in a folder"])
def test_the_tables_in_a_zip_are_read_like_those_in_a_folder(tmp_path: Path, top: str) -> None:
    save_vessels(tmp_path / "in", ["a", "b", "c"])
    split_file(tmp_path / "in", "a.png,test", "b.png,train", "c.png,val")
    (tmp_path / "in/who.csv").write_text("image,patient\na,x\nb,y\nc,z\n")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in sorted((tmp_path / "in").rglob("*.*")):
            archive.write(file, f"{top}{file.relative_to(tmp_path / 'in')}")
    for root in ("in", "in.zip"):
        pairs = find_pairs(str(tmp_path / root), "_mask", "who.csv")
        assert [(pair.patient, pair.part) for pair in pairs] == [
            ("x", "test"),
            ("y", "train"),
            ("z", "val"),
        ]
    assert "cannot read own.csv" in refused(tmp_path / "in.zip", split_file="own.csv")


def test_every_slice_of_a_volume_is_a_picture_of_its_patient(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    values = np.zeros((4, 6, 3), dtype=np.uint8)
    values[1, 2, 2] = 1
    as_nifti(tmp_path / "images/p7.nii.gz", values, (0.5, 0.5, 1))
    as_nifti(tmp_path / "masks/p7.nii.gz", values, (0.5, 0.5, 1))
    pairs = find_pairs(str(tmp_path))
    assert [(pair.name, pair.patient) for pair in pairs] == [
        (f"p7_000{layer}", "p7") for layer in range(3)
    ]
    data = SegmentationFolders(str(tmp_path), val_share=0)
    data.setup()
    picture, mask = data.cases("train")[2].read()
    assert picture.size == (6, 4)
    assert picture.spacing == (0.5, 0.5)
    assert np.argwhere(mask).tolist() == [[2, 1]]
    as_nifti(tmp_path / "masks/p7.nii.gz", values[..., :2], (0.5, 0.5, 1))
    assert "has 2 slices, its picture 3" in refused(tmp_path, "")


# Patients


def test_a_patient_in_two_parts_is_refused_by_name(tmp_path: Path) -> None:
    save_vessels(tmp_path, NAMES[:4])
    split_file(tmp_path, "p0_a,train", "p0_b,train", "p1_a,train", "p1_b,test")
    said = refused(tmp_path, patient=PATIENT)
    assert said == "patient 'p1' is in two parts: p1_a in train, p1_b in test"
    assert len(find_pairs(str(tmp_path), "_mask")) == 4  # without patients nobody can know
    (tmp_path / "who.csv").write_text("image,patient\np0_a,x\np0_b,y\np1_a,y\np1_b,z\n")
    assert len(find_pairs(str(tmp_path), "_mask", str(tmp_path / "who.csv"))) == 4
    (tmp_path / "who.csv").write_text("image,patient\np0_a,x\np0_b,y\np1_a,z\np1_b,x\n")
    assert "patient 'x' is in two parts" in refused(tmp_path, patient=str(tmp_path / "who.csv"))


def test_patients_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    save_vessels(tmp_path, ["p0_a", "other"])
    assert "finds no patient in the name 'other'" in refused(tmp_path, patient=PATIENT)
    assert "no regular expression" in refused(tmp_path, patient="(p")
    assert "has no group" in refused(tmp_path, patient="p")
    (tmp_path / "who.csv").write_text("image,patient\np0_a,x\n")
    assert "names no patient of other" in refused(tmp_path, patient=str(tmp_path / "who.csv"))


def test_parts_by_the_names_of_patients(tmp_path: Path) -> None:
    save_vessels(tmp_path, NAMES)
    got = names(folders(tmp_path, val_patients=("p1",), test_patients=("p0", "p4")))
    assert got["val"] == ["p1_a", "p1_b"]
    assert got["test"] == ["p0_a", "p0_b", "p4_a", "p4_b"]
    assert len(got["train"]) == 4
    with pytest.raises(AdaptError, match="no picture of patient 'p9'"):
        folders(tmp_path, test_patients=("p9",)).setup()
    with pytest.raises(AdaptError, match="patient 'p1' is in two parts: val, test"):
        folders(tmp_path, val_patients=("p1",), test_patients=("p1",)).setup()


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_drawn_by_seed_and_leave_patients_whole(tmp_path: Path, seed: int) -> None:
    save_vessels(tmp_path, NAMES)
    how: dict[str, Any] = {"val_share": 0.25, "test_share": 0.2, "seed": seed}
    got = names(folders(tmp_path, **how))
    assert {part: len(found) for part, found in got.items()} == {"train": 6, "val": 2, "test": 2}
    who = {part: {name[:2] for name in found} for part, found in got.items()}
    assert not who["train"] & who["val"]
    assert not who["train"] & who["test"]
    assert not who["val"] & who["test"]
    assert names(folders(tmp_path, **how)) == got


def test_folds_validate_every_patient_once_and_never_test_one(tmp_path: Path) -> None:
    save_vessels(tmp_path, NAMES)
    rounds = [
        names(folders(tmp_path, test_patients=("p2",), folds=3, fold=fold)) for fold in range(3)
    ]
    validated = sorted(name for got in rounds for name in got["val"])
    assert validated == [name for name in NAMES if not name.startswith("p2")]
    for got in rounds:
        assert got["test"] == ["p2_a", "p2_b"]
        assert sorted(got["train"] + got["val"]) == validated
    with pytest.raises(AdaptError, match="folds=9: there are only 5 patients"):
        folders(tmp_path, folds=9).setup()


def test_few_images_are_drawn_from_the_training_part_alone(tmp_path: Path) -> None:
    save_vessels(tmp_path, NAMES)
    all_, few, again, other = (
        names(folders(tmp_path, test_patients=("p0",), images=images, seed=seed))
        for images, seed in ((None, 1), (3, 1), (3, 1), (3, 2))
    )
    assert few == again != other
    assert len(few["train"]) == 3
    assert set(few["train"]) < set(all_["train"])
    assert (few["val"], few["test"]) == (all_["val"], all_["test"])
    folded = names(folders(tmp_path, images=3, folds=5, fold=1))
    assert {part: len(found) for part, found in folded.items()} == {"train": 3, "val": 2, "test": 0}
    with pytest.raises(AdaptError, match="images=30: there are only 10"):
        folders(tmp_path, images=30, val_share=0).setup()


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_share": 1.0},
        {"test_share": -0.1},
        {"folds": 1},
        {"folds": 3, "fold": 3},
        {"images": 0},
        {"batch_size": 0},
        {"crop": 0},
        {"augmentation": "mirror"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match=f"{next(iter(wrong))}="):
        GeneratedVessels(**wrong)


# Batches


def vessels(**how: Any) -> GeneratedVessels:
    counts: dict[str, Any] = {"train": 5, "val": 2, "test": 1, "height": 24, "width": 40}
    counts["vessels"] = SPARSE
    data = GeneratedVessels(**counts | how)
    data.setup()
    data.view = View.sam(32)
    return data


def batches(data: SegmentationData, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def same(one: list[Batch], other: list[Batch]) -> bool:
    def tensors(found: list[Batch]) -> list[Tensor]:
        return [tensor for batch in found for tensor in batch]

    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_a_batch_is_what_a_sam_takes_and_leads_back_to_its_picture() -> None:
    data = vessels(seed=3)
    for batch in data.val_dataloader():
        assert batch.image.shape == (2, 3, 32, 32)
        assert batch.image.dtype == batch.mask.dtype == torch.float32
        assert batch.mask.unique().tolist() == [0, 1]
        assert batch.size.tolist() == [[24, 40]] * 2
        for row, number in enumerate(batch.number.tolist()):
            picture, mask = data.cases("val")[number].read()
            assert torch.equal(batch.image[row], View.sam(32)(picture.pixels))
            assert torch.equal(batch.mask[row], View.sam(32).mask(mask))
        assert not batch.mask[:, :, 19:].any()  # 24 x 40 becomes 19 x 32


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_seed_and_epoch(workers: int) -> None:
    how: dict[str, Any] = {"augmentation": "turns", "crop": 16}
    one, other = vessels(**how), vessels(num_workers=workers, **how)
    for epoch in (0, 1):
        assert same(batches(one, epoch), batches(other, epoch))
    assert not same(batches(one, 0), batches(one, 1))
    assert not same(batches(one, 0), batches(vessels(seed=1, **how), 0))
    assert batches(one)[0].size.tolist() == [[16, 16]] * 2
    assert next(iter(one.val_dataloader())).size.tolist() == [[24, 40]] * 2  # whole


def test_a_training_on_masks_that_mark_nothing_is_refused(tmp_path: Path) -> None:
    save_vessels(tmp_path, NAMES)
    with pytest.raises(AdaptError, match=r"none of the 10 masks for training .* \(labels: \[7\]\)"):
        folders(tmp_path, labels=(7,), val_share=0).setup("fit")
    folders(tmp_path, labels=(7,), val_share=0).setup("test")  # right answers are empty


def test_the_parts_of_chase_are_fixed() -> None:
    for other in ({"split_file": "a.csv"}, {"test_patients": ("01",)}):
        with pytest.raises(AdaptError, match="the parts of ChaseDB1 are fixed"):
            ChaseDB1("nowhere", **other)


def test_other_trees_share_no_picture() -> None:
    one, other = vessels(), vessels(trees=1)
    masks = [c.read()[1].tobytes() for data in (one, other) for c in data.cases("train")]
    assert len(set(masks)) == 10


def test_batches_wait_for_the_view_and_a_test_part_is_wanted_for_a_test() -> None:
    data = vessels(test=0)
    with pytest.raises(AdaptError, match="no test part"):
        data.test_dataloader()
    data.view = None
    with pytest.raises(AdaptError, match=r"set data\.view first"):
        data.train_dataloader()


def test_chase_is_split_12_2_6_by_patient(shared_data: Path) -> None:
    data = ChaseDB1(str(shared_data / "chasedb1_small.zip"))
    got = names(data)
    assert {part: len(found) for part, found in got.items()} == {"train": 12, "val": 2, "test": 6}
    assert got["val"] == ["Image_07L", "Image_07R"]
    assert {case.patient for case in data.cases("test")} == {"08", "09", "10"}
    picture, mask = data.cases("test")[0].read()
    assert picture.size == mask.shape == (960, 999)
    assert 0.05 < mask.mean() < 0.1
