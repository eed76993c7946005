"""Words of `polyadapt geometry3d` that once ended in a page of Python: one clear line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from polyadapt.core import cli
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d import telling
from polyadapt.geometry3d.graph import Complete
from polyadapt.geometry3d.parallax import turned
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.tests.calibration_cases import FOCAL, HEIGHT, WIDTH, WORD, Flat, drawn

pytestmark = pytest.mark.slow

Refused = Callable[..., str]
FLAT = ("--backbone", WORD)
MEMORY = "out of memory reconstructing: take fewer or smaller images (--limit, --size)"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    drawn(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def refused(
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """The one line that a verb answers with; no progress on slow days, and nothing is left."""
    monkeypatch.setattr(telling, "PATIENCE", math.inf)

    def run(verb: str, *words: object) -> str:
        out = tmp_path / "out.safetensors"
        code = cli.main(["geometry3d", verb, str(images), "--out", str(out), *map(str, words)])
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
        assert isinstance(line, str)
        return line

    return run


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((*FLAT, "--points", "0"), "argument --points: '0' is not a whole number from 1"),
        ((*FLAT, "--above", "nan"), "argument --above: 'nan' is not a finite number"),
        ((*FLAT, "--device", "meta"), "the device 'meta' holds no numbers"),
        (("--backbone", "x" * 5000), "is no file: a DUSt3R checkpoint,"),
        (("--backbone", "random", "--size", "160000000x160000000"), MEMORY),
    ],
    ids=str.split("points above meta long size"),
)
def test_words_that_reconstruct_cannot_take(
    words: tuple[str, ...], complaint: str, refused: Refused
) -> None:
    assert complaint in refused("reconstruct", *words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--seed", "9" * 30), f"'{'9' * 30}' is not a whole number from 0 to 2^63 - 1"),
        (("--seed", "-1"), "'-1' is not a whole number from 0 to 2^63 - 1"),
        (("--mu", "inf"), "argument --mu: 'inf' is not a number above 0"),
        (("--gate", "nan"), "argument --gate: 'nan' is not a finite number"),
        (("--cut", "inf"), "argument --cut: 'inf' is not a finite number"),
        (("--hold-out", "4"), "6 images are given: at least 7 different ones"),
    ],
    ids=str.split("seed negative mu gate cut held"),
)
def test_words_that_calibrate_cannot_take(
    words: tuple[str, ...], complaint: str, refused: Refused
) -> None:
    assert complaint in refused("calibrate", *FLAT, *words)


def test_a_device_that_does_not_hold_the_network_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.1 GiB ...")

    monkeypatch.setattr(Flat, "to", full)
    assert refused("reconstruct", *FLAT) == f"polyadapt: {MEMORY}"
    line = refused("calibrate", *FLAT)
    assert line.startswith("polyadapt: out of memory calibrating: take fewer or smaller images")


def test_a_name_with_a_line_break_is_refused_before_anything_is_asked(
    images: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(Flat, "forward", asked)
    (images / "hill0.png").rename(images / "hill\n0.png")
    assert r"no place for the name 'hill\n0.png'" in refused("reconstruct", *FLAT)


def test_the_small_network_says_which_sizes_differ(images: Path, refused: Refused) -> None:
    with Image.open(images / "hill2.png") as image:
        image.resize((640, 480)).save(images / "hill2.png")
    line = refused("reconstruct", "--backbone", "small", "--focal", FOCAL)
    assert line.endswith(f"these images have several sizes, {WIDTH}x{HEIGHT} and 640x480")


def test_a_checkpoint_that_is_none_is_not_advised_to_be_run(images: Path, refused: Refused) -> None:
    line = refused("reconstruct", "--backbone", images / "hill0.png")
    assert line.endswith("holds more than plain data, which is not run")
    assert "weights_only" not in line


def test_a_view_whose_pointmaps_tell_no_focal_is_named() -> None:
    images, edges = torch.rand(2, 3, 48, 64), Complete().edges(torch.zeros(2, 3, 8, 8))
    points, sure = torch.randn(2, 48, 64, 3), torch.full((2, 48, 64), 5.0)
    behind: Tensor = torch.cat([points[..., :2], -1 - points[..., 2:].abs()], -1)
    said = Predictions(edges, Pair(behind, sure, points, sure))
    with pytest.raises(AdaptError, match=r"^view 0: no focal length: "):
        turned(said, images)
