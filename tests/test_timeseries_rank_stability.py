"""What the first update of LoRA does as the rank grows: measured, against the formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from polyadapt.core import LoRA
from polyadapt.core.errors import AdaptError
from polyadapt.timeseries import rank_stability
from polyadapt.timeseries.rank_stability import GROWTH, RULES, Curve, curve, table, update_norm


def ratio(optimiser: str, rule: str) -> float:
    """How many times the norm at rank 16 the norm at rank 256 is, over 32 draws."""
    return curve(optimiser, rule, ranks=(16, 256), draws=32).ratio(16, 256)


def test_with_sgd_the_rank_stabilised_scale_is_level() -> None:
    assert ratio("SGD", "alpha / sqrt(r)") == pytest.approx(1, rel=0.2)


def test_with_sgd_the_plain_scale_falls_sixteen_times() -> None:
    assert ratio("SGD", "alpha / r") == pytest.approx(1 / 16, rel=0.2)


def test_with_sgd_the_start_of_the_published_code_falls_256_times() -> None:
    assert ratio("SGD", "alpha / sqrt(r), A of std 1 / r") == pytest.approx(1 / 256, rel=0.2)


def test_with_adam_the_plain_scale_is_level_and_the_rank_stabilised_one_grows() -> None:
    assert ratio("Adam", "alpha / r") == pytest.approx(1, rel=0.1)
    assert ratio("Adam", "alpha / sqrt(r)") == pytest.approx(4, rel=0.1)
    assert ratio("Adam", "alpha / sqrt(r), A of std 1 / r") == pytest.approx(1 / 4, rel=0.1)


def test_the_norm_is_that_of_the_formula() -> None:
    """h s^2 |A x|^2 |v|, with the A and x that the seed gives."""
    recipe = LoRA(rank=3, alpha=6, init="gaussian", init_std=0.5)
    generator = torch.Generator().manual_seed(7)
    x, _ = (torch.randn(1, 16, generator=generator) for _ in range(2))
    a = torch.empty(3, 16).normal_(std=0.5, generator=generator)
    expected = 1e-3 * 2**2 * float((x @ a.T).square().sum())
    assert update_norm(recipe, "SGD", seed=7, width=16) == pytest.approx(expected, rel=1e-4)


def test_every_rule_has_a_formula_and_the_published_scale() -> None:
    assert {rule for _, rule in GROWTH} == set(RULES)
    scales = [RULES[rule](16).scale_of(16) for rule in RULES]
    assert scales == [1, 16 / math.sqrt(16), 16 / math.sqrt(16)]


def test_the_table_has_norms_by_rank_and_the_formula() -> None:
    found = Curve("SGD", "alpha / r", {4: 1.0, 16: 0.25})
    lines = table([found]).splitlines()
    assert lines[0] == "| optimiser | scale | r = 4 | r = 16 | formula |"
    assert lines[2] == "| SGD | alpha / r | 4 | 1 | r^-1 |"


def test_the_command_prints_a_table_and_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = {4: 1.0, 256: 2.0}
    monkeypatch.setattr(rank_stability, "curve", lambda o, rule, draws: Curve(o, rule, norms))
    out = tmp_path / "rank.png"
    assert rank_stability.main(["--out", str(out), "--draws", "1"]) == 0
    assert out.read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out.count("| Adam |") == 3
    with pytest.raises(AdaptError, match="draws=0 is not allowed"):
        rank_stability.main(["--draws", "0"])
    with pytest.raises(AdaptError, match=r"the folder .*nowhere does not exist"):
        rank_stability.main(["--out", str(tmp_path / "nowhere" / "rank.png")])
    assert capsys.readouterr().out == "", "nothing was measured"
