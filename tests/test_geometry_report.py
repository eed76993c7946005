"""What the geometry benchmarks print, on inputs whose numbers are known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyadapt.benchmarks.geometry_alignment import (
    ALL,
    CASES,
    EXACT,
    ONE,
    Row,
    outliers,
    row,
    told,
    verdicts,
)
from polyadapt.benchmarks.geometry_calibration import Known, Records, calibrated
from polyadapt.benchmarks.geometry_cost import Count, counted, estimate, extrapolated, steps_of
from polyadapt.benchmarks.geometry_gates import report
from polyadapt.core import LoRA
from polyadapt.geometry3d.calibration import Schedule
from polyadapt.geometry3d.dust3r import Dust3rSize
from polyadapt.geometry3d.oracle import Oracle
from polyadapt.tests.calibration_cases import SITE, Flat, surveyed
from polyadapt.tests.geometry_cases import all_pairs, small_scene

Record = dict[str, Any]


def _row(rule: str, ate: float, case: str = ONE) -> Row:
    return Row(case, "room", 0, rule, ate, 0.0, 0.1, 0.1, 0.02, 0.05, 0.97, 0.5)


def test_a_verdict_names_the_worst_seed_and_whether_it_holds() -> None:
    text = verdicts([_row("fixed", 0.01), _row("robust", 0.004)])
    assert f"| {ONE} | fixed ATE over robust, least 5 | 2.5 **no** |" in text
    assert f"| {ONE} | AUC of w, least 0.95 | 0.97 yes |" in text
    assert f"| {ONE} | AUC of w less that of C, least 0 | 0.47 yes |" in text
    assert EXACT not in text  # not run, not judged


def test_spread_is_told_without_what_is_not_known() -> None:
    assert told([3.0, 1.0, 2.0, float("nan")]) == "2 (1 to 3)"
    assert told([float("nan")]) == "-"


def test_the_oracles_outliers_are_counted_exactly() -> None:
    scene = small_scene(3)
    said = Oracle(scene, CASES[ALL], seed=5).predictions(all_pairs(3))
    wrong = outliers(said, scene, CASES[ALL], seed=5)
    assert wrong.float().mean().item() == pytest.approx(0.2, abs=0.002)
    assert wrong.flatten(2).float().mean(2).amin().item() == pytest.approx(0.2, abs=0.002)


def test_an_exact_oracle_has_no_error_and_no_outliers_to_find() -> None:
    found = row(EXACT, "corner", 0, "robust", small_scene(4), steps=5)
    assert found.ate < 1e-4
    assert max(found.own, found.other, found.own_before) < 1e-4
    assert found.weight_auc != found.weight_auc  # NaN


def _base(scene: int, other: float) -> Record:
    errors = dict.fromkeys(("own", "other", "own robust", "error", "error fixed"), 0.2)
    more = dict.fromkeys(("ate fixed", "ate robust", "spread", "bias", "predicted", "guessed"), 0.1)
    aligned = {"other robust": other, "error robust": other}
    return {"shift": "none", "scene": scene, "what": "base", **errors, **more, **aligned}


def _trained(what: str, shift: str, after: float, kept: bool = True) -> Record:
    found = {"before": 0.2, "after": after, "ate": 0.05, "kept": kept}
    return {"shift": shift, "scene": 0, "what": what, **found}


def test_gate_1_compares_with_the_same_and_another_scenes_image() -> None:
    partners = {"right": 0.06, "same": 0.08, "shuffled": 0.1}
    text = report([{"shift": "none", "scene": 0, "what": "partners", **partners}])
    assert "+25.0% better than the same again" in text
    assert "+40.0% better than a shuffled one (asked: 25 %): held" in text


def test_gate_2_wants_three_scenes_of_four_and_a_median() -> None:
    better = [_base(n, 0.15) for n in range(3)]
    assert "lower in 3 of 4 (asked: 3), median +25.0%" in report([*better, _base(3, 0.3)])
    assert "lower in 2 of 4 (asked: 3)" in report([*better[:2], _base(2, 0.3), _base(3, 0.3)])


def test_gate_3_holds_what_oracles_teach_against_the_truth() -> None:
    gained = [_trained("truth", "night", 0.1), _trained("oracle", "night", 0.12)]
    text = report([*gained, _trained("shuffled", "night", 0.22)])
    assert "oracle over truth (means) 80% (asked: 50 %): held" in text
    text = report([*gained, _trained("shuffled", "night", 0.18)])  # learns from nonsense
    assert "80% (asked: 50 %): **NOT held**" in text


def test_gate_4_counts_sets_that_harm_and_that_were_missed() -> None:
    text = report([_trained("self", "night", 0.22), _trained("self", "none", 0.1, kept=False)])
    assert "1 kept their set; the truth says that 1 of these harm (night 0: -10.0%)" in text
    assert "1 would have gained at least 1% (none 0: +50.0%)" in text
    assert "self, as kept: +0.0%" in text  # in `none` the user is left with the base


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    records = Records(tmp_path, {"views": 4})
    records.add("none", 0, "base", {"error": 0.5})
    with records.file.open("a") as file:
        file.write('{"shift": "no')
    again = Records(tmp_path, {"views": 4})
    assert again.has("none", 0, "base")
    assert again.all == [{"shift": "none", "scene": 0, "what": "base", "error": 0.5}]
    assert not again.has("night", 0, "base")
    with pytest.raises(SystemExit, match="views"):
        Records(tmp_path, {"views": 5})


def test_training_on_the_truth_is_scored_by_the_truth_and_leaves_the_network_as_it_was() -> None:
    network = Flat()
    first, second = network.scene.images[:1], network.scene.images[1:2]
    before = network(first, second).points2
    quick, lora = Schedule(lr=0.05, epochs=3, batch=6), LoRA(rank=1)
    found = calibrated("truth", Known(network.scene, network, surveyed()), [SITE], quick, lora)
    assert found["kept"]
    assert found["after"] < found["before"]
    assert found["judged gain"] == pytest.approx(1 - found["after"] / found["before"], abs=1e-4)
    assert torch.equal(network(first, second).points2, before)


def test_operations_are_counted_as_by_hand() -> None:
    d, n = 32, 6  # 32x48 pixels are 6 patches
    size = Dust3rSize(
        encoder_width=d, encoder_depth=1, encoder_heads=2, width=d, depth=1, heads=2, head="linear"
    )
    count = counted(size, 32, 48)
    patches, embedding, head = 2 * n * 768 * d, 2 * n * d * d, 2 * n * d * 1024
    encoder = 2 * n * 12 * d * d + 4 * n * n * d
    decoder = 2 * n * 16 * d * d + 2 * 4 * n * n * d
    assert count.asking == 4 * (patches + embedding + head + encoder + decoder)
    assert count.adapters == 4 * 16 * (4 * d + 2 * (4 * d + 3 * 2 * d))  # qkv; then cross q, k, v
    assert count.kept > 0


def test_estimates_multiply_counts_by_steps() -> None:
    assert (steps_of(10), steps_of(10, hold_out=False)) == (280, 450)
    text = estimate(Count(2 * 10**12, 6 * 10**12, 2**30, 10**6, 2**30))
    assert "| asking about 90 pairs | 0.09 | 0.1 min |" in text
    assert "| 450 steps (none held out, as the paper) | 2.70 | 4.5 min | 2.2 min |" in text
    one = {"pairs": 90.0, "sweep": 0.06, "aligning MiB": 16.0}
    assert (
        "(35.4 million against 0.55): 6 min on one core here for 100 sweeps, 1.0 GiB"
        in extrapolated(one, 64)
    )
