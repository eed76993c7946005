"""`polyadapt vision segment` with LiteMedSAM's real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyadapt.core import LoRA, cli
from polyadapt.vision.medical.backbones import LiteMedSAM
from polyadapt.vision.medical.task import Segmentation


@pytest.mark.slow
def test_a_box_around_a_disc_finds_it_at_the_photograph_s_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh set changes nothing, so that this is what the weights have learned."""
    monkeypatch.chdir(tmp_path)
    task = Segmentation(LiteMedSAM(img_size=64), LoRA(rank=2), at=["attention"], prompt="none")
    task.save_adapter("set.safetensors")
    y, x = np.mgrid[:150, :200]
    disc = (x - 120) ** 2 + (y - 70) ** 2 < 40**2
    noise = np.random.default_rng(0).normal(0, 8, disc.shape)
    Image.fromarray((60 + 140 * disc + noise).clip(0, 255).astype(np.uint8)).save("a.png")
    Path("true").mkdir()
    Image.fromarray((disc * 255).astype(np.uint8)).save("true/a.png")
    words = ["--out=masks", "--masks=true", "--boxes", "80,30,160,110"]
    assert cli.main(["vision", "segment", "a.png", "--set=set.safetensors", *words]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    scores = dict(part.split(" ") for part in summary.split(", "))
    assert float(scores["dice"]) > 0.9
    assert float(scores["hd95"]) < 8  # pixels of the photograph; one of the square's is 3
