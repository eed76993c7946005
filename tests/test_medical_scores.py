"""What a segmentation is measured by in validation and test: whole pictures, at their own size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.tests.medical_cases import SPARSE
from polyadapt.tests.segmentation_cases import SIDE, shift, task_of, vessels
from polyadapt.tests.training_cases import quiet_trainer
from polyadapt.vision.medical.data import Case, GeneratedVessels
from polyadapt.vision.medical.inference import in_windows
from polyadapt.vision.medical.masks import Picture
from polyadapt.vision.medical.measured import Measured, Scored, table
from polyadapt.vision.medical.metrics import MaskScores, means, score
from polyadapt.vision.medical.task import Segmentation


class Spaced(GeneratedVessels):
    """Vessels of which only some say how large their pixels are: `spacings` by place."""

    spacings: tuple[Any, ...] = ()

    def read(self) -> list[Case]:
        cases = super().read()
        test = [case for case in cases if case.part == "test"]
        others = [case for case in cases if case.part != "test"]
        spaced = zip(test, self.spacings, strict=True)
        return others + [replace(c, read=partial(_spaced, c, spacing)) for c, spacing in spaced]


def _spaced(case: Case, spacing: tuple[float, float] | None) -> tuple[Picture, Any]:
    picture, mask = case.read()
    return Picture(picture.pixels, spacing), mask


def spaced(*spacings: tuple[float, float] | None) -> Spaced:
    data = Spaced(train=1, val=1, test=len(spacings), height=24, width=SIDE, vessels=SPARSE)
    data.spacings = spacings
    return data


def test_a_validation_scores_overlap_alone_unless_all_is_asked_for() -> None:
    for asked, lines in (("dice", False), ("all", True)):
        task = task_of(val_scores=asked)
        shift(task)
        (found,) = quiet_trainer().validate(task, datamodule=vessels(), verbose=False)
        assert {"val_loss", "val_dice", "val_iou", "val_pictures"} <= found.keys()
        assert ({"val_cldice", "val_hd95"} <= found.keys()) == lines
        assert found["val_pictures"] == 2


def _whole(task: Segmentation, picture: Picture) -> Tensor:
    native: Tensor = task.view.native(task(task.view(picture.pixels)[None]), picture.size)[0, 0]
    return native


def _in_windows(task: Segmentation, picture: Picture) -> Tensor:
    return in_windows(lambda images, _=None: task(images), task.view, picture.pixels, 12)


@pytest.mark.parametrize(("crop", "answer"), [(None, _whole), (12, _in_windows)], ids=["", "crops"])
def test_the_means_are_those_of_the_pictures_by_hand(
    crop: int | None, answer: Callable[[Segmentation, Picture], Tensor]
) -> None:
    task = task_of()
    shift(task)
    data = vessels(crop=crop)
    (found,) = quiet_trainer().test(task, datamodule=data, verbose=False)
    task.eval()
    scores = []
    with torch.inference_mode():
        for case in data.cases("test"):
            picture, target = case.read()
            scores.append(score((answer(task, picture) > 0).numpy().astype(np.uint8), target))
    for name, mean in means(scores).items():
        assert found[f"test_{name}"] == pytest.approx(mean, abs=1e-4)


def test_distances_are_in_mm_where_all_pictures_say_how_large_a_pixel_is(tmp_path: Path) -> None:
    task = task_of()
    shift(task)
    found = []
    for spacing in (None, (1.0, 1.0), (0.5, 0.5)):
        data = spaced(spacing, spacing)
        trainer = quiet_trainer(callbacks=[Measured(tmp_path)])
        (scores,) = trainer.test(task, datamodule=data, verbose=False)
        found.append(scores["test_hd95"])
        rows = (tmp_path / "test_pictures.csv").read_text()
        assert (",px," in rows) == (spacing is None)
    assert found[0] == pytest.approx(found[1])
    assert found[2] == pytest.approx(found[0] / 2)


def test_distances_in_mm_and_in_pixels_have_no_mean() -> None:
    task = task_of()
    with pytest.raises(AdaptError) as refused:
        quiet_trainer().test(task, datamodule=spaced((1.0, 1.0), None), verbose=False)
    assert str(refused.value).startswith("test: HD95 of tree_0003 is in px, of those before in mm")


def test_a_row_says_what_the_picture_scored() -> None:
    mask = np.zeros((4, 4), dtype=np.uint8)
    picture = Picture(np.zeros((4, 4, 3), dtype=np.uint8), (1.0, 1.0))
    one = Scored("eye", "p1", picture, mask, mask, MaskScores(0.5, 1 / 3, 1.0, 2.5, empty=0))
    assert table([one]) == (
        "name,patient,dice,iou,cldice,hd95,unit,empty\neye,p1,0.5,0.333333,1,2.5,mm,0\n"
    )


def test_data_without_masks_are_refused() -> None:
    with pytest.raises(AdaptError, match="needs pictures with masks, not a LightningDataModule"):
        quiet_trainer().validate(task_of(), datamodule=LightningDataModule(), verbose=False)
