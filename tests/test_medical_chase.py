"""The quick track on real photographs: the last stage's attention of LiteMedSAM, at 128 pixels."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyadapt.benchmarks.medical_chase import STEPS, data_of
from polyadapt.benchmarks.medical_methods import run_sam
from polyadapt.benchmarks.medical_records import mean_dice
from polyadapt.vision.medical.describe import Segmenter
from polyadapt.vision.medical.metrics import score

pytestmark = pytest.mark.slow

QUICK = STEPS["quick"]


@pytest.mark.parametrize("method", ["SALT", "LoRA equal"])
def test_ten_epochs_find_vessels_and_the_file_finds_the_same(
    method: str, shared_data: Path, tmp_path: Path
) -> None:
    """A tenth of the pixels are vessels: to mark them all scores 0.18, none 0."""
    data = data_of(shared_data / "chasedb1_small.zip", QUICK, 0)
    record = run_sam(method, QUICK.setting, data, 0, tmp_path)
    assert record.steps == 60
    assert record.last_loss < 0.7 * record.first_loss
    assert mean_dice(record.pictures) > 0.22
    case = data.cases("test")[0]
    picture, target = case.read()
    marked = (Segmenter(tmp_path / "adapter.safetensors").native(picture.pixels) > 0).numpy()
    found = score(marked.squeeze(), target, overlap_only=True)
    assert found.dice == pytest.approx(record.pictures[case.name]["dice"], abs=1e-3)
