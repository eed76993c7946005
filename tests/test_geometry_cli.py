"""`polyadapt geometry3d`: from image files to a scene's set, a reconstruction and a table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from polyadapt.geometry3d import calibrate as verb
from polyadapt.geometry3d import telling
from polyadapt.geometry3d.asking import backbone_of
from polyadapt.geometry3d.scene_file import read_scene
from polyadapt.geometry3d.small import SmallNetwork
from polyadapt.tests.calibration_cases import FOCAL, HEIGHT, VIEWS, WIDTH, WORD, drawn, hills
from polyadapt.tests.command_cases import Run, command
from polyadapt.tests.scene_files import write_replica

QUICK = ("--sweeps", 10, "--mu", 10, "--rank", 2, "--lr", 0.05, "--epochs", 2, "--batch", 6)
KNOWN = ("--backbone", WORD, "--focal", FOCAL)


@pytest.fixture
def polyadapt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command: its exit code, what it prints, and its complaints; no progress on slow days."""
    monkeypatch.setattr(telling, "PATIENCE", math.inf)
    return command(capsys, "geometry3d")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    drawn(tmp_path / "images")
    return tmp_path / "images"


def test_a_scene_is_calibrated_stored_and_reconstructed(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    out = tmp_path / "hills.safetensors"
    code, said, err = polyadapt("calibrate", images, "--out", out, *KNOWN, *QUICK)
    assert (code, err) == (0, "")
    first, labels, judged, written = said.splitlines()
    assert first.startswith("6 images, 30 pairs: spread over partners ")
    assert "as far as views contradict each other): predicted gain " in first
    assert labels.endswith("mu 10")
    assert judged.startswith("error on pairs of 1 held-out view ")
    assert judged.endswith("the set is kept")
    assert written == f"written: {out}"
    scene, features = read_scene(out)
    assert (scene.name, scene.size, scene.focal) == ("hills", (HEIGHT, WIDTH), FOCAL)
    assert scene.space == "log"
    assert (scene.mu, scene.gate) == (10.0, 0.5)
    assert scene.cut == pytest.approx((math.log(50) + math.log(12)) / 8, rel=1e-3)
    assert scene.after < scene.before
    assert features.shape == (VIEWS, 64)

    folder = tmp_path / "found"
    code, said, err = polyadapt("reconstruct", images, "--set", out, "--out", folder)
    assert (code, err) == (0, "")
    assert (
        said == f"6 views, {VIEWS * HEIGHT * WIDTH:,} points: {folder / 'view.html'} shows them\n"
    )
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    depths = {f"depths/{view:04}.npy" for view in range(VIEWS)}
    colmap = {f"colmap/{name}.txt" for name in ("cameras", "images", "points3D")}
    assert files == depths | colmap | {"cameras.json", "cloud.ply", "cloud.glb", "view.html"}
    cameras = json.loads((folder / "cameras.json").read_text())
    assert [camera["name"] for camera in cameras] == hills().names
    assert cameras[0]["focal_in_image"] == pytest.approx(FOCAL)
    depth = torch.from_numpy(np.load(folder / "depths" / "0000.npy"))
    ratio = depth / hills().depths[0]
    assert float(ratio.std() / ratio.mean()) < 0.05


def test_where_calibration_does_not_help_no_file_is_written(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    out = tmp_path / "hills.safetensors"
    words = ("--lr", 1e-5, "--epochs", 1)
    code, said, _ = polyadapt("calibrate", images, "--out", out, *KNOWN, *QUICK, *words)
    assert code == 0
    *_, judged, last = said.splitlines()
    assert judged.endswith("the base is kept")
    assert last.startswith("no file is written: calibration does not help here")
    assert not out.exists()


def test_the_images_choose_among_scenes(tmp_path: Path, polyadapt: Run) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    for seed in (0, 1):
        drawn(tmp_path / f"images{seed}", seed=seed)
    backbone = json.dumps({"backbone": "FlatBackbone", "seed": 0})
    for seed in (0, 1):
        named = ("--out", sets / f"scene{seed}.safetensors", "--backbone", backbone)
        found = polyadapt("calibrate", tmp_path / f"images{seed}", *named, *QUICK)
        assert found[0] == 0
    assert len([*sets.iterdir()]) == 2
    words = ("--sets", sets, "--out", tmp_path / "found")
    code, said, _ = polyadapt("reconstruct", tmp_path / "images1", *words)
    assert code == 0
    assert said.startswith("scene: scene1\n")


def test_an_interrupted_calibration_leaves_nothing(
    images: Path, tmp_path: Path, polyadapt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "features_of", interrupted)
    out = tmp_path / "hills.safetensors"
    code, _, err = polyadapt("calibrate", images, "--out", out, *KNOWN, *QUICK)
    assert (code, err) == (130, "polyadapt: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_interrupted_reconstruction_leaves_nothing(
    images: Path, tmp_path: Path, polyadapt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polyadapt.geometry3d.reconstruct.write_viewer", interrupted)
    words = ("--out", tmp_path / "found", "--sweeps", 5)
    code, _, _ = polyadapt("reconstruct", images, *KNOWN, *words)
    assert code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_recordings_are_scored_method_by_method(tmp_path: Path, polyadapt: Run) -> None:
    folder = tmp_path / "office"
    write_replica(hills(), folder)
    out = tmp_path / "table.csv"
    words = ("--methods", "fixed,robust,self,truth", "--known-focals", "--out", out)
    code, said, err = polyadapt("evaluate", folder, "--backbone", WORD, *words, *QUICK)
    assert (code, err) == (0, "")
    rows = [*csv.DictReader(out.read_text().splitlines())]
    assert [row["method"] for row in rows] == ["fixed", "robust", "self", "truth"]
    assert {row["scene"] for row in rows} == {"office"}
    fixed, robust, own, known = ([float(row[k]) for k in ("pairs", "ate")] for row in rows)
    assert fixed[0] == robust[0]  # the network alone does not depend on the alignment
    assert own[0] < 0.5 * robust[0]
    assert known[0] < 0.5 * robust[0]
    assert own[1] < 0.5 * robust[1]
    assert rows[0]["gain"] == ""
    assert said.splitlines()[4].split()[:4] == ["scene", "method", "pairs", "aligned"]


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_images_and_images_with_alpha_are_right(
    mode: str, tmp_path: Path, polyadapt: Run
) -> None:
    drawn(tmp_path / "images", mode)
    words = ("--out", tmp_path / "found", "--sweeps", 5)
    code, said, _ = polyadapt("reconstruct", tmp_path / "images", *KNOWN, *words)
    assert code == 0
    assert said.startswith("6 views, ")


def test_images_of_another_size_and_orientation_are_brought_to_the_views(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    for name in ("hill0.png", "hill1.png"):
        with Image.open(images / name) as image:
            image.resize((4 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST).save(images / name)
    words = ("--backbone", WORD, "--out", tmp_path / "found", "--sweeps", 5)
    code, said, _ = polyadapt("reconstruct", images, *words)
    assert code == 0
    assert said.startswith("6 views, ")


def test_one_image_is_refused(images: Path, tmp_path: Path, polyadapt: Run) -> None:
    words = (images / "hill0.png", *KNOWN, "--out", tmp_path / "found")
    assert "at least 2 different ones" in polyadapt("reconstruct", *words).line()
    words = (images / "hill0.png", *KNOWN, "--out", tmp_path / "a.safetensors")
    assert "at least 4 different ones" in polyadapt("calibrate", *words).line()


def test_identical_images_are_left_out_and_told(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    (images / "zero.png").write_bytes((images / "hill0.png").read_bytes())
    words = ("--out", tmp_path / "found", "--sweeps", 5)
    code, said, _ = polyadapt("reconstruct", images, *KNOWN, *words)
    assert code == 0
    assert said.startswith("left out: zero.png is hill0.png again\n6 views, ")
    both = (images / "zero.png", images / "hill0.png")
    found = polyadapt("reconstruct", *both, *KNOWN, "--out", tmp_path / "other")
    assert "2 images are only 1 different ones" in found.line()


def test_a_file_that_is_no_image_is_named(images: Path, tmp_path: Path, polyadapt: Run) -> None:
    (images / "hill3.png").write_bytes(b"not a picture")
    words = (images, *KNOWN, "--out", tmp_path / "found")
    line = polyadapt("reconstruct", *words).line()
    assert "cannot read the image" in line
    assert "hill3.png" in line
    assert not (tmp_path / "found").exists()


def test_two_hundred_images_need_a_graph_or_a_limit(tmp_path: Path, polyadapt: Run) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(200):
        shade = torch.full((HEIGHT, WIDTH), number, dtype=torch.uint8)
        Image.fromarray(shade.numpy()).save(folder / f"{number:03}.png")
    words = (folder, *KNOWN, "--out", tmp_path / "found")
    line = polyadapt("reconstruct", *words).line()
    assert "200 images make 39800 ordered pairs, more than 1000" in line
    assert "`window` (a film) or `retrieval`" in line


def test_a_limit_takes_images_evenly(images: Path, tmp_path: Path, polyadapt: Run) -> None:
    words = ("--limit", 3, "--graph", "window", "--reach", 1, "--sweeps", 5)
    code, said, _ = polyadapt("reconstruct", images, *KNOWN, *words, "--out", tmp_path / "found")
    assert code == 0
    assert said.startswith("3 views, ")
    cameras = json.loads((tmp_path / "found" / "cameras.json").read_text())
    assert [camera["name"] for camera in cameras] == ["hill0.png", "hill2.png", "hill5.png"]


def test_a_network_that_is_sure_of_nothing_is_one_line(
    images: Path, tmp_path: Path, polyadapt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyadapt.tests.calibration_cases import Flat

    said = Flat.forward
    monkeypatch.setattr(
        Flat,
        "forward",
        lambda *a: said(*a)._replace(confidence2=torch.ones(len(a[1]), HEIGHT, WIDTH)),
    )
    words = (images, *KNOWN, "--out", tmp_path / "found")
    assert "overlaps no other" in polyadapt("reconstruct", *words).line()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--backbone", "gone.pth"), "--backbone 'gone.pth' is no file: a DUSt3R checkpoint,"),
        (("--backbone", "small"), "--backbone small needs --focal"),
        (("--backbone", "{"), "--backbone '{' is not JSON"),
        (("--backbone", '{"backbone": "X"}'), "names no backbone; there are "),
        (("--backbone", "random", "--size", "20x20"), "both sides must divide by 16"),
        (("--backbone", "random", "--size", "wide"), "'wide' is not WxH, such as 512x384"),
        (("--backbone", "random", "--reach", "2"), "--reach is for the graphs window and"),
        (("--backbone", "random", "--focal", "-3"), "'-3' is not a number above 0"),
        (("--backbone", "random", "--device", "tpux"), "no device 'tpux'"),
        (("--backbone", "random", "--limit", "1"), "--limit 1: at least 2 images are needed"),
        ((), "name one of --backbone, --set and --sets"),
        (("--backbone", "random", "--scene", "a"), "--scene names a scene of --sets"),
        (("--set", "gone.safetensors"), "there is no adapter file gone.safetensors"),
        (("--sets", "gone"), "there is no scene's file (*.safetensors) in gone"),
    ],
)
def test_words_that_do_not_suit_are_one_line(
    words: tuple[str, ...], complaint: str, images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    line = polyadapt("reconstruct", images, "--out", tmp_path / "found", *words).line()
    assert complaint in line
    assert not (tmp_path / "found").exists()


def test_weights_of_ones_own_small_network_are_known_by_what_they_say(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    file = tmp_path / "mine.safetensors"
    state = SmallNetwork().state_dict()
    save_file(state, file, {"pretraining": "{}"})
    built = backbone_of(str(file), focal=50.0).build().state_dict()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    words = ("--backbone", file, "--out", tmp_path / "found")
    assert "mine.safetensors needs --focal" in polyadapt("reconstruct", images, *words).line()
    state.pop("sharpness")
    save_file(state, file, {"pretraining": "{}"})
    line = polyadapt("reconstruct", images, *words, "--focal", 50).line()
    assert "does not hold weights that `polyadapt geometry3d pretrain-small` wrote" in line


def test_a_place_that_is_taken_is_refused_before_anything_is_computed(
    images: Path, tmp_path: Path, polyadapt: Run
) -> None:
    out = tmp_path / "old.safetensors"
    out.write_text("old")
    line = polyadapt("calibrate", images, "--out", out, *KNOWN).line()
    assert line.endswith("old.safetensors is there already: remove it, or name another --out")
    assert "is there already" in polyadapt("reconstruct", images, *KNOWN, "--out", images).line()
    words = ("--out", tmp_path / "gone" / "a.safetensors")
    assert "does not exist" in polyadapt("calibrate", images, *words, *KNOWN).line()
    assert out.read_text() == "old"
