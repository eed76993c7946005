"""The medical benchmark's records and tables, and that SALT meets a LoRA of its own size there."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyadapt.benchmarks import medical_chase, medical_rates
from polyadapt.benchmarks.medical_chase import STEPS, folder_of, of_step, records_of, verdicts
from polyadapt.benchmarks.medical_methods import RATES, SALT_OURS, Setting, equal_rank
from polyadapt.benchmarks.medical_rates import Trial, best, grid, rates_table, tried
from polyadapt.benchmarks.medical_records import Record, against, by_seed, measured, shown, table
from polyadapt.core import LoRA, attach
from polyadapt.tests.medical_cases import SPARSE
from polyadapt.vision.medical.data import GeneratedVessels
from polyadapt.vision.medical.lite_medsam import untrained


def record(method: str, seed: int, *dice: float) -> Record:
    scores = {"cldice": 0.5, "hd95": 2.0, "empty": 0}
    return Record(
        method=method,
        seed=seed,
        rate=3e-3,
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


def test_the_interval_is_over_seeds_and_pictures() -> None:
    found = [record("SALT", 0, 0.2, 0.6), record("SALT", 1, 0.4, 0.8)]
    assert by_seed(found, "dice").tolist() == [[0.2, 0.6], [0.4, 0.8]]
    # A quarter of all redrawn pairs of seeds is twice the first, and so with pictures: a sixteenth
    # of the means is 0.2, another one 0.8.
    row = table(found).splitlines()[-1]
    assert row == (
        "| SALT | 0.003 | 1,000 | 3,000 | 16,000 | 2 | 20 | 1.50 to 0.50 | 0.500 (0.200 to 0.800)"
        " | 0.500 (0.500 to 0.500) | 2.000 (2.000 to 2.000) |"
    )
    assert len({line.count("|") for line in table(found).splitlines()}) == 1
    # Of one seed, a quarter of the pairs of pictures is twice the first.
    assert "| 0.400 (0.200 to 0.600) |" in table(found[:1])


def test_two_methods_are_compared_on_the_same_seeds_and_pictures() -> None:
    found = [record("SALT", 0, 0.1, 0.9), record("LoRA equal", 0, 0.0, 0.8)]
    later = [record("SALT", 1, 0.9, 0.9)]  # LoRA has not been run with this seed
    assert "dice 0.100 (0.100 to 0.100)" in against(found + later, "SALT", "LoRA equal")
    assert against(found[:1], "SALT", "LoRA equal").endswith("not both were run")
    assert against(found[1:] + later, "SALT", "LoRA equal").endswith("not both were run")


def test_a_table_is_of_all_that_was_run_of_a_step(tmp_path: Path) -> None:
    for step, method, seed in (
        ("report", "U-Net", 0),
        ("report", "LoRA equal", 1),
        ("report", "LoRA equal", 0),
        ("quick", "SALT", 0),
    ):
        folder = folder_of(tmp_path, step, method, seed)
        folder.mkdir()
        record(method, seed, 0.5).save(folder / "record.json")
    folder_of(tmp_path, "report", "SALT", 0).mkdir()  # was interrupted
    found = [(r.method, r.seed) for r in records_of("report", tmp_path)]
    assert found == [("LoRA equal", 0), ("LoRA equal", 1), ("U-Net", 0)]


def test_a_step_may_be_run_in_parts() -> None:
    asked = argparse.Namespace(epochs=1, methods=["SALT", "U-Net"], seeds=[2])
    step = of_step(STEPS["report"], asked)
    assert (step.setting.epochs, step.methods, step.seeds, step.unet) == (1, ["SALT"], [2], "SALT")
    asked = argparse.Namespace(epochs=None, methods=["decoder"], seeds=None)
    step = of_step(STEPS["report"], asked)
    assert (step.setting.epochs, step.methods, step.seeds, step.unet) == (
        20,
        ["decoder"],
        (0, 1, 2),
        None,
    )


@pytest.mark.parametrize(("dice", "word"), [(0.7, "met"), (0.6, "NOT met")])
def test_the_gate_of_the_u_net_is_told(dice: float, word: str) -> None:
    (line,) = verdicts({"unet": [record("U-Net", 0, dice)]})
    assert line == f"gate: U-Net's Dice {dice:.3f}, above 0.65: {word}"


def trial(rate: float, val_dice: float, seed: int = 100) -> Trial:
    return Trial(method="SALT", rate=rate, seed=seed, last_loss=0.5, val_dice=val_dice)


def test_the_rate_is_the_best_of_those_that_were_tried_twice() -> None:
    once = [trial(3e-4, 0.3), trial(1e-3, 0.6), trial(3e-3, 0.7)]
    assert best(once) == 3e-3
    twice = [*once, trial(1e-3, 0.5, 101), trial(3e-3, 0.2, 101)]
    assert best(twice) == 1e-3
    assert best([trial(3e-3, 0.6), trial(1e-3, 0.6)]) == 1e-3
    lines = rates_table({"SALT": twice, "decoder": [trial(3e-4, 0.125)]}).splitlines()
    assert lines[0] == "| method | 0.0003 | 0.001 | 0.003 |"
    assert lines[2] == (
        "| SALT | 0.300 (0.50) | **0.600 (0.50), 0.500 (0.50)** | 0.700 (0.50), 0.200 (0.50) |"
    )
    assert lines[3] == "| decoder | **0.125 (0.50)** | - | - |"


def test_every_rate_is_one_of_those_that_are_tried() -> None:
    rates = [RATES, *(step.setting.rates for step in STEPS.values())]
    assert all(rate in grid(method) for some in rates for method, rate in some.items())
    assert all(set(some) == set(RATES) for some in rates)


def test_rates_that_were_tried_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, int]] = []

    def trained(method: str, rate: float, seed: int, setting: Setting, data: object) -> Trial:
        asked.append((rate, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return trial(rate, rate, seed)

    monkeypatch.setattr(medical_rates, "_trial", trained)
    data, setting = GeneratedVessels(1, 1, 0, 24, 24), STEPS["quick"].setting
    with pytest.raises(KeyboardInterrupt):
        tried("SALT", setting, data, tmp_path / "rates")
    found = tried("SALT", setting, data, tmp_path / "rates")
    low, some, more, high = grid("SALT")
    assert asked == [
        *((rate, 100) for rate in (low, some, more)),
        *((rate, 100) for rate in (more, high)),  # the interrupted one once more
        *((rate, 101) for rate in (high, more)),  # the two best
    ]
    assert best(found) == high


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


@pytest.mark.parametrize(("runs", "size"), [(2, (540, 297)), (5, (1080, 594))])
def test_a_figure_shows_the_runs_in_rows_of_four(
    runs: int, size: tuple[int, int], tmp_path: Path
) -> None:
    for number in range(runs):
        folder = tmp_path / f"quick-{number}"
        folder.mkdir()
        record("SALT", 0, 0.5).save(folder / "record.json")
        picture = np.zeros((8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "p0.png")
    shown(sorted(p for p in tmp_path.iterdir()), tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as figure:
        assert figure.size == size
        black = (np.asarray(figure.convert("L")) < 50).sum() / (270 * 297)
    assert black == pytest.approx(0.85 * runs, rel=0.1)  # panels


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


@pytest.mark.slow
def test_a_step_runs_on_generated_vessels_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(*counts: int, **common: Any) -> GeneratedVessels:
        return GeneratedVessels(2, 1, 1, 48, 48, vessels=SPARSE, **common)

    monkeypatch.setattr(medical_chase, "GeneratedVessels", small)
    setting = replace(STEPS["quick"].setting, size=64, epochs=2)
    step = replace(STEPS["quick"], setting=setting, methods=("SALT",), seeds=(0,))
    found = medical_chase.run("quick", step, None, tmp_path)
    assert [(r.method, r.steps > 0) for r in found] == [("SALT", True), ("U-Net", True)]
    assert found[0].last_loss < found[0].first_loss
    assert found[1].cpu_seconds >= found[0].cpu_seconds

    def never(*_: object) -> Record:
        raise AssertionError("it has been run")

    monkeypatch.setattr(medical_chase, "run_sam", never)
    monkeypatch.setattr(medical_chase, "run_unet", never)
    assert medical_chase.run("quick", step, None, tmp_path) == found


def test_a_u_net_without_the_run_that_tells_its_seconds_is_refused(tmp_path: Path) -> None:
    step = replace(STEPS["quick"], methods=(), seeds=(0,))
    with pytest.raises(SystemExit, match="has SALT's CPU seconds, and quick-SALT-seed0 is not"):
        medical_chase.run("quick", step, None, tmp_path)
