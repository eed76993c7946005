"""The medical benchmark's records and tables, and that SALT meets a LoRA of its own size there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyadapt.benchmarks.medical_chase import verdicts
from polyadapt.benchmarks.medical_methods import SALT_OURS, equal_rank
from polyadapt.benchmarks.medical_records import Record, against, by_picture, measured, shown, table
from polyadapt.core import LoRA, attach
from polyadapt.tests.medical_cases import SPARSE
from polyadapt.vision.medical.data import GeneratedVessels
from polyadapt.vision.medical.lite_medsam import untrained


def record(method: str, seed: int, *dice: float) -> Record:
    scores = {"cldice": 0.5, "hd95": 2.0, "empty": 0}
    return Record(
        method=method,
        seed=seed,
        adapters=1000,
        trained=3000,
        stored=16000,
        steps=10,
        cpu_seconds=20.0,
        first_loss=1.5,
        last_loss=0.5,
        val_dice=0.4,
        pictures={f"p{n}": {"dice": value, **scores} for n, value in enumerate(dice)},
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = record("SALT", 0, 0.25, 0.75)
    made.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == made


def test_seeds_are_averaged_picture_by_picture_before_the_interval() -> None:
    found = [record("SALT", 0, 0.2, 0.6), record("SALT", 1, 0.4, 0.8)]
    assert by_picture(found, "dice").tolist() == pytest.approx([0.3, 0.7])
    # Of two pictures, a quarter of all redrawn pairs is twice the first, a quarter twice the other.
    row = table(found).splitlines()[-1]
    assert row == (
        "| SALT | 1,000 | 3,000 | 16,000 | 2 | 20 | 1.50 to 0.50 | 0.500 (0.300 to 0.700)"
        " | 0.500 (0.500 to 0.500) | 2.000 (2.000 to 2.000) |"
    )
    assert len({line.count("|") for line in table(found).splitlines()}) == 1


def test_two_methods_are_compared_on_the_same_pictures() -> None:
    found = [record("SALT", 0, 0.1, 0.9), record("LoRA equal", 0, 0.0, 0.8)]
    assert "dice 0.100 (0.100 to 0.100)" in against(found, "SALT", "LoRA equal")
    assert against(found[:1], "SALT", "LoRA equal").endswith("not both were run")


@pytest.mark.parametrize(("dice", "word"), [(0.7, "met"), (0.6, "NOT met")])
def test_the_gate_of_the_u_net_is_told(dice: float, word: str) -> None:
    (line,) = verdicts({"unet": [record("U-Net", 0, dice)]})
    assert line == f"gate: U-Net's Dice {dice:.3f}, above 0.65: {word}"


def test_pictures_are_scored_by_name_and_shown_beside_the_truth(tmp_path: Path) -> None:
    data = GeneratedVessels(1, 0, 2, 24, 24, vessels=SPARSE)
    data.setup()
    truth = {case.read()[0].pixels.tobytes(): case.read()[1] for case in data.cases("test")}

    def right(pixels: np.ndarray) -> np.ndarray:
        return truth[pixels.tobytes()]

    found = measured(right, data.cases("test"), tmp_path / "shown")
    assert [scores["dice"] for scores in found.values()] == [1.0, 1.0]
    names = [case.name for case in data.cases("test")]
    assert sorted(p.stem for p in (tmp_path / "shown").iterdir()) == sorted(names)


def test_a_figure_shows_the_runs_side_by_side(tmp_path: Path) -> None:
    for method in ("SALT", "U-Net"):
        (tmp_path / method).mkdir()
        record(method, 0, 0.5).save(tmp_path / method / "record.json")
        picture = np.zeros((8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / method / "p0.png")
    shown(sorted(p for p in tmp_path.iterdir()), tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as figure:
        assert figure.size == (540, 297)


@pytest.mark.slow
def test_the_lora_of_equal_size_trains_as_many_numbers_as_salt_to_a_twentieth() -> None:
    sam, at = untrained(), "vision_encoder.stages.*.blocks.*.attn.{qkv,proj}"
    rank = equal_rank(sam, at)
    counts = []
    for recipe in (SALT_OURS, LoRA(rank=rank)):
        adapters = attach(sam, recipe, at=at)
        counts.append(sum(p.numel() for p in adapters.trained().values()))
        adapters.detach()
    assert counts[1] == pytest.approx(counts[0], rel=0.05)
