"""The rank sweep: what it fits, keeps and finds."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from polyadapt.core import Bottleneck, Site, cli
from polyadapt.core.adapters.bottleneck import BottleneckAdapter
from polyadapt.core.layers import BlockLayer
from polyadapt.tests.command_cases import Ran, command, rows_of, write
from polyadapt.tests.vision_cases import configuration, save_labelled
from polyadapt.vision.sweep_rank import elbow, good_enough

pytestmark = pytest.mark.slow  # whole runs


ADAPTER = {"class_path": "AdapterTune", "init_args": {"rank": 3}}


def sweep(capsys: pytest.CaptureFixture[str], *more: str) -> Ran:
    return command(capsys, "vision", "sweep-rank", "--config=a.yaml", "--out=out")(*more)


def save_inputs(**changes: Any) -> None:
    save_labelled(count=30)
    settings = {"model__adapter": ADAPTER, "model__at": None, "trainer__max_epochs": 1, **changes}
    write("a.yaml", configuration(**settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep over two ranks and two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    words = ["vision", "sweep-rank", "--config=a.yaml", "--out=out", "--ranks=4,2", "--seeds=0,1"]
    with contextlib.chdir(folder):
        save_inputs()
        assert cli.main(words) == 0
    return folder


@pytest.fixture
def _swept(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


# The elbow


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ({1: 0.5, 2: 0.7, 4: 0.8, 8: 0.82, 16: 0.83}, 4),  # above the line: .356 .409 .220
        ({16: 0.83, 8: 0.82, 1: 0.5, 4: 0.8, 2: 0.7}, 4),  # in any order
        ({1: 0.5, 2: 0.8, 4: 0.85, 8: 0.7}, 2),  # the estimation part: what falls again is left out
        ({1: 0.5, 2: 0.6, 4: 0.7, 8: 0.8}, None),  # as much from every doubling
        ({1: 0.5, 2: 0.5, 4: 0.9}, None),  # the gain grows
        ({1: 0.9, 2: 0.8, 4: 0.7}, None),  # no gain
        ({1: 0.5, 2: 0.9}, None),
        ({8: 0.5}, None),
    ],
)
def test_the_elbow_is_the_rank_farthest_above_the_line(
    scores: dict[int, float], rank: int | None
) -> None:
    assert elbow(scores) == rank


def test_the_smallest_rank_within_a_standard_error_of_the_best() -> None:
    scores = {2: [0.70, 0.72], 4: [0.80, 0.80], 8: [0.79, 0.83], 16: [0.80, 0.81]}
    assert good_enough(scores) == 4  # best 0.81, standard error 0.02
    assert good_enough({2: [0.7], 4: [0.8]}) is None


def test_a_target_of_four_directions_has_its_elbow_at_rank_four() -> None:
    sigma = torch.tensor([3.0, 3.0, 3.0, 3.0, 0.3, 0.3, 0.3, 0.3])
    left, right = (torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2))
    wanted = left @ sigma.diag() @ right
    errors = {rank: trained_error(wanted, rank) for rank in (1, 2, 4, 8)}
    for rank in (1, 2, 4):
        assert errors[rank] == pytest.approx(sigma[rank:].square().sum().item(), rel=0.01)
    assert errors[8] < 1e-3
    assert elbow({rank: -error for rank, error in errors.items()}) == 4


def trained_error(wanted: Tensor, rank: int) -> float:
    """|S - BA|^2 of a linear adapter trained on u -> u + S u."""
    width = len(wanted)
    u = torch.cat([torch.eye(width), -torch.eye(width)])
    site = Site("blocks.0", None, None, None, "block", (width,), "output", "a whole module")
    recipe = Bottleneck(rank=rank, activation="identity")
    adapter = recipe.build(site, None, Generator().manual_seed(0))
    assert isinstance(adapter, BottleneckAdapter)
    layer = BlockLayer(torch.nn.Identity(), None)
    optimiser = torch.optim.LBFGS(adapter.parameters(), lr=0.5, max_iter=500)

    def error() -> Tensor:
        y = adapter.output(u, u, layer)
        return F.mse_loss(y, u + u @ wanted.T, reduction="sum") / 2

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        return loss

    optimiser.step(closure)
    return error().item()


# The command


@pytest.mark.usefixtures("_swept")
def test_every_rank_is_fitted_with_every_seed() -> None:
    rows = rows_of("out/sweep.csv")
    assert [(row["rank"], row["seed"]) for row in rows] == [
        ("4", "0"),
        ("2", "0"),
        ("4", "1"),
        ("2", "1"),
    ]
    # two blocks of width 96: 2 d r + r + d each; a head of 3 classes
    assert [int(row["trainable"]) for row in rows[:2]] == [2 * 868, 2 * 482]
    assert {row["with_head"] for row in rows[1::2]} == {str(2 * 482 + 3 * 97)}
    assert {row["part"] for row in rows} == {"val"}
    assert {row["epoch_rule"] for row in rows} == {"last"}
    text = Path("out/sweep.txt").read_text()
    assert "elbow: none among these ranks" in text
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["rank", "2", "4"]
    assert Path("out/sweep.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.usefixtures("_swept")
def test_a_second_call_fits_only_what_has_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("out/rank2-seed0/adapter.safetensors")
    stamp, table = kept.stat().st_mtime_ns, Path("out/sweep.txt").read_text()
    Path("out/rank4-seed1/record.json").unlink()  # stopped before its end
    Path("out/sweep.csv").unlink()
    ran = sweep(capsys, "--ranks=4,2", "--seeds=0,1")
    assert ran.code == 0
    assert kept.stat().st_mtime_ns == stamp
    assert Path("out/sweep.txt").read_text() == table
    assert table in ran.out
    assert json.loads(Path("out/rank4-seed1/record.json").read_text())["rank"] == 4


@pytest.mark.usefixtures("_swept")
def test_a_changed_configuration_is_not_mixed_with_what_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = Path("out/sweep.csv").read_bytes()
    save_inputs(model__lr=0.5)
    assert "out/rank4-seed0 holds a run with other settings" in sweep(capsys, "--ranks=4").line()
    assert Path("out/sweep.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ranks=4,x"], "'4,x' is not a list of different whole numbers"),
        (["--ranks=4,4"], "'4,4' is not a list of different whole numbers"),
        (["--ranks=4,0"], "rank 0 is not allowed"),
        ([], "the following arguments are required: --ranks"),
    ],
)
def test_ranks_that_are_none_are_refused(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_inputs()
    assert told in sweep(capsys, *words).line()
    assert not Path("out").exists()


@pytest.mark.usefixtures("_swept")
def test_nothing_is_fitted_when_one_of_the_points_cannot_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("out/rank4-seed0/record.json").write_text('{"name": "rank 4"}')
    assert "is no record of a fit" in sweep(capsys, "--ranks=8,4").line()
    assert not Path("out/rank8-seed0").exists()


def test_a_method_without_a_rank_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_inputs(model__adapter="HeadOnly")
    assert "rank" in sweep(capsys, "--ranks=4").line()
