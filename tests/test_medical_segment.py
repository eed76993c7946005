"""`polyadapt vision segment` as a person uses it: files in, masks out, and what goes wrong."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from polyadapt.core import LoRA, attach
from polyadapt.tests.command_cases import Ran, Run, command, rows_of
from polyadapt.tests.medical_cases import as_dicom, as_nifti
from polyadapt.tests.sam_models import noisy
from polyadapt.tests.segment_cases import BRIGHT, SIDE, bright, in_boxes
from polyadapt.tests.vision_cases import started
from polyadapt.vision.medical.backbones import TransformersSAM
from polyadapt.vision.medical.describe import Segmenter
from polyadapt.vision.medical.files import File
from polyadapt.vision.medical.inference import in_windows
from polyadapt.vision.medical.masks import read_mask
from polyadapt.vision.medical.task import Segmentation

pytestmark = pytest.mark.in_an_empty_folder

VISION = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
TINY = TransformersSAM(
    pretrained=False,
    img_size=SIDE,
    options=VISION | {"image_size": 64, "output_channels": 16, "global_attn_indexes": [1]},
    decoder={"mlp_dim": 8, "num_attention_heads": 2},
)


def save_tiny_set(path: Path, says: TransformersSAM = TINY, **told: Any) -> Path:
    """LoRA on a SAM of random numbers, and a head; `says`: the backbone that the file names.

    `told`: what else the file has instead of its own.
    """
    task = Segmentation(TINY, LoRA(rank=2), at=["attention"], view=BRIGHT)
    noisy(task.head, 0.1)
    task.adapters.extra |= {"backbone": says.to_json()} | told
    task.save_adapter(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_set(tmp_path_factory.mktemp("set") / "tiny.safetensors")


@pytest.fixture
def run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    segment = command(capsys, "vision", "segment")

    def run(*words: str, set_file: Path = tiny) -> Ran:
        return segment(f"--set={set_file}", "--out=masks", *words)

    return run


@pytest.fixture
def by_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny set's network replaced by one whose answer is known."""
    monkeypatch.setattr(Segmenter, "logits", staticmethod(bright))


def board(height: int = 48, width: int = 64, cell: int = 16) -> Any:
    y, x = np.mgrid[:height, :width] // cell
    return ((y + x) % 2 * 255).astype(np.uint8)


def save(name: str, values: Any, **how: Any) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(name, **how)
    return name


def mask_of(name: str) -> Any:
    with Image.open(name) as image:
        stored = np.array(image)
    assert stored.dtype == np.uint8
    assert set(np.unique(stored)) <= {0, 255}
    return stored == 255


def size_of(name: str) -> tuple[int, int]:
    with Image.open(name) as image:
        return image.size


def rows() -> list[dict[str, str]]:
    return rows_of("masks/areas.csv")


# What is written


def test_a_tiny_set_segments_as_its_network_says(run: Run, tiny: Path) -> None:
    save("in/a.png", board())
    ran = run("in")
    assert (ran.code, ran.err) == (0, "")
    pixels = np.repeat(board()[..., None], 3, axis=-1)
    wanted = (Segmenter(tiny).native(pixels) > 0).numpy()
    assert np.array_equal(mask_of("masks/a.png"), wanted)
    marked = int(wanted.sum())
    assert ran.out == f"masks/a.png\t{marked} px\t{marked / wanted.size:.2%}\n"
    (row,) = rows()
    assert row == {
        "image": "in/a.png",
        "slice": "",
        "height": "48",
        "width": "64",
        "pixels": str(marked),
        "mm2": "",
    }


@pytest.mark.usefixtures("by_brightness")
def test_pictures_of_every_kind_have_masks_of_their_own_size(run: Run) -> None:
    grey = board()
    colours = np.repeat(grey[..., None], 3, axis=-1)
    clear = np.concatenate([colours, np.full_like(grey, 7)[..., None]], axis=-1)
    save("in/grey.png", grey)
    save("in/rgba.png", clear)
    save("in/photo.jpg", colours, quality=95)
    save("in/deep.tif", grey.astype(np.uint16) * 40 + 1000)
    save("in/bits.bmp", grey > 0)
    assert run("in", "--window=32", "--overlays=seen").code == 0
    for name in ("grey", "rgba", "photo", "deep", "bits"):
        assert (mask_of(f"masks/{name}.png") == (grey > 0)).mean() > 0.99
        assert size_of(f"seen/{name}.png") == (64, 48)
    assert [row["image"] for row in rows()] == sorted(row["image"] for row in rows())


@pytest.mark.usefixtures("by_brightness")
def test_a_turned_photograph_has_an_upright_mask(run: Run) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    half = np.zeros((40, 80), dtype=np.uint8)
    half[:, :40] = 255
    save("a.jpg", half, exif=exif, quality=95)
    assert run("a.jpg").code == 0
    mask = mask_of("masks/a.png")
    assert mask.shape == (80, 40)
    assert mask[:38].all()
    assert not mask[42:].any()


@pytest.mark.usefixtures("by_brightness")
def test_a_volume_has_a_mask_of_its_geometry_and_areas_in_mm(run: Run) -> None:
    volume = np.zeros((32, 16, 3), dtype=np.int16)  # across, down, slices
    volume[:16, :, 1] = 900
    as_nifti(Path("v.nii.gz"), volume, spacing=(0.5, 0.25, 2))
    ran = run("v.nii.gz", "--overlays=seen", "--window=32")
    assert (ran.code, ran.out) == (0, "masks/v.nii.gz\t256 px\t16.67%\n")
    made: Any = nibabel.load("masks/v.nii.gz")
    assert np.array_equal(np.asarray(made.dataobj), volume // 900)
    assert [float(z) for z in made.header.get_zooms()] == [0.5, 0.25, 2]
    assert [(row["slice"], row["pixels"], row["mm2"]) for row in rows()] == [
        ("0", "0", "0.0"),
        ("1", "256", "32.0"),
        ("2", "0", "0.0"),
    ]
    assert sorted(path.name for path in Path("seen").iterdir()) == [
        f"v_000{layer}.png" for layer in range(3)
    ]


@pytest.mark.usefixtures("by_brightness")
def test_dicom_gives_dicom_and_levels_say_what_is_bright(run: Run) -> None:
    stored = (board(32, 32) // 255).astype(np.uint16) * 100 + 1000
    stored[0, 0] = 4000  # metal, which alone would be bright
    Path("in").mkdir()
    as_dicom(Path("in/a.dcm"), stored)
    assert run("in", "--levels", "1000", "1100").code == 0
    found = read_mask(File.at("masks/a.dcm"))
    assert np.array_equal(found[1:], (board(32, 32) > 0)[1:])
    assert pydicom.dcmread("masks/a.dcm").PixelSpacing == [0.3, 0.2]
    (row,) = rows()
    assert float(row["mm2"]) == pytest.approx(0.06 * int(row["pixels"]))
    assert run("in").code == 0
    assert read_mask(File.at("masks/a.dcm")).sum() <= 4


@pytest.mark.usefixtures("by_brightness")
def test_crops_and_levels_are_those_of_the_training_unless_others_are_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_tiny_set(tmp_path / "crops.safetensors", crop=16, levels=[1000, 1100])
    as_dicom(Path("a.dcm"), (board(32, 32) // 255).astype(np.uint16) * 100 + 1000)
    windows: list[int] = []

    def counted(*words: Any) -> torch.Tensor:
        windows.append(words[3])
        return in_windows(*words)

    monkeypatch.setattr("polyadapt.vision.medical.segmenting.in_windows", counted)
    ran = run("a.dcm", set_file=file)
    assert ran.err == "polyadapt: as in training: --window 16 --levels 1000 1100\n"
    assert windows == [16]
    assert np.array_equal(read_mask(File.at("masks/a.dcm")), board(32, 32) > 0)
    ran = run("a.dcm", "--window", "0", "--levels", "2000", "2100", set_file=file)
    assert (ran.err, windows, rows()[0]["pixels"]) == ("", [16], "0")
    monkeypatch.setattr(Segmenter, "logits", staticmethod(in_boxes))
    ran = run("a.dcm", "--boxes", "1,1,9,9", set_file=file)
    assert (ran.err, windows) == ("polyadapt: as in training: --levels 1000 1100\n", [16])


@pytest.mark.usefixtures("by_brightness")
def test_a_picture_of_8000_pixels_is_segmented_at_its_size(run: Run) -> None:
    large = np.zeros((8000, 300), dtype=np.uint8)
    large[4000:] = 255
    save("a.png", large)
    assert run("a.png", "--overlays=seen").code == 0
    mask = mask_of("masks/a.png")
    assert mask.shape == (8000, 300)
    assert mask[4500:].all()
    assert not mask[:3500].any()
    assert size_of("seen/a.png") == (77, 2048)


def test_boxes_say_where_to_look(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmenter, "logits", staticmethod(in_boxes))
    save("in/a.png", board(64, 64))
    save("in/b.png", board(64, 64))
    Path("boxes.csv").write_text("image,x0,y0,x1,y1\na,0,0,32,64\nb.png,32,32,64,64\n")
    assert run("in", "--boxes", "boxes.csv").code == 0
    assert mask_of("masks/a.png").mean() == pytest.approx(0.5, abs=0.02)
    assert mask_of("masks/b.png").mean() == pytest.approx(0.25, abs=0.02)
    line = run("in", "--window", "32", "--boxes", "0,0,9,9").line()
    assert "leave out --boxes and --points" in line


def test_boxes_and_points_reach_the_set_s_own_decoder(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, own = [], Segmenter.logits

    def kept(self: Segmenter, images: torch.Tensor, prompt: Any = None) -> torch.Tensor:
        answers.append(own(self, images, prompt))
        return answers[-1]

    monkeypatch.setattr(Segmenter, "logits", kept)
    save("a.png", board())
    for words in (["--boxes", "4,4,30,30", "8,8,60,40"], ["--points", "10,10", "50,40,0"], []):
        assert run("a.png", *words).code == 0
    boxes, points, nothing = answers
    assert [len(found[0]) for found in answers] == [2, 1, 1]
    assert len({float(found[0, 0].std()) for found in answers}) == 3
    for found in (boxes[:, :1], boxes[:, 1:], points):
        assert (found - nothing).abs().max() > 1e-3 * nothing.abs().max()


@pytest.mark.usefixtures("by_brightness")
def test_true_masks_give_scores(run: Run) -> None:
    save("in/a.png", board())
    save("true/a_gt.png", board())
    ran = run("in", "--window=32", "--masks=true", "--mask-suffix=_gt", "--overlays=seen")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == (
        "dice 1, iou 1, cldice 1, hd95 0, pictures 1, one_empty 0, both_empty 0"
    )
    assert [rows()[0][name] for name in ("dice", "hd95", "empty")] == ["1.0", "0.0", "0"]
    assert "has no mask a in true" in run("in", "--masks=true").line()
    save("true/a_gt.png", board() // 255 * np.uint8(3) + np.eye(48, 64, dtype=np.uint8))
    assert "`labels` names those" in run("in", "--masks=true", "--mask-suffix=_gt").err
    ran = run("in", "--masks=true", "--mask-suffix=_gt", "--labels", "3", "4", "--window=32")
    assert ran.out.splitlines()[-1].startswith("dice 1, ")


# What goes wrong


@pytest.mark.usefixtures("by_brightness")
def test_bad_files_among_good_ones_are_told_at_the_end(run: Run) -> None:
    save("in/a.png", board())
    save("in/z.png", board())
    Path("in/b.png").write_bytes(b"no picture")
    as_nifti(Path("in/c.nii"), np.full((8, 8, 2), np.nan))
    Path("in/d.dcm").write_bytes(b"x" * 300)
    Path("notes.txt").write_text("x")
    ran = run("in", "notes.txt")
    assert ran.code == 2
    assert [line.split("\t")[0] for line in ran.out.splitlines()] == ["masks/a.png", "masks/z.png"]
    causes = ["cannot read the image in/b.png", "in/c.nii, slice 0 has values that are no finite"]
    causes += ["cannot read the scan in/d.dcm", "notes.txt: of no kind that is read"]
    lines = ran.err.splitlines()
    assert len(lines) == 4
    for line, cause in zip(lines, causes, strict=True):
        assert line.startswith(f"polyadapt: not segmented: {cause}")
    assert sorted(p.name for p in Path("masks").iterdir()) == ["a.png", "areas.csv", "z.png"]


@pytest.mark.usefixtures("by_brightness")
def test_a_volume_with_one_bad_slice_leaves_no_half_mask(run: Run) -> None:
    volume = np.zeros((8, 8, 3))
    volume[0, 0, 2] = np.inf
    as_nifti(Path("v.nii"), volume)
    save("w.png", board())
    ran = run("v.nii", "w.png", "--overlays=seen", "--batch=1")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "slice 2 has values that are no finite numbers" in ran.err
    assert sorted(p.name for p in Path("masks").iterdir()) == ["areas.csv", "w.png"]
    assert [p.name for p in Path("seen").iterdir()] == ["w.png"]
    assert [row["image"] for row in rows()] == ["w.png"]


@pytest.mark.usefixtures("by_brightness")
def test_a_spacing_that_is_no_length_is_told(run: Run) -> None:
    as_dicom(Path("a.dcm"), np.zeros((4, 4), dtype=np.uint16), PixelSpacing=[0, 1])
    ran = run("a.dcm")
    assert ran.code == 2
    assert ran.err == "polyadapt: not segmented: a.dcm says that its pixels are 0 x 1 mm\n"
    assert not Path("masks").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["gone.png"], "there is no picture, folder or .zip gone.png"),
        (["a.png", "--threshold=1"], "'1' is not a number above 0 and below 1"),
        (["a.png", "--window=-1"], "'-1' is not a whole number from 0"),
        (["a.png", "--batch=0"], "'0' is not a whole number from 1"),
        (["a.png", "--levels", "5", "4"], "--levels 5 4 is not allowed: low, then high"),
        (["a.png", "--overlays=masks"], "masks and overlays have one name"),
        (["a.png", "--out=."], "a.png is read: it would be overwritten"),
        (["a.png", "--boxes", "0,0,9"], "--boxes: '0,0,9' is not x0,y0,x1,y1"),
        (["a.png", "--set=absent"], "there is no adapter file absent"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything_is_written(
    run: Run, words: list[str], cause: str
) -> None:
    save("a.png", board())
    assert cause in run(*words).line()
    assert [path.name for path in Path().iterdir()] == ["a.png"]


def test_masks_drawn_by_hand_survive(run: Run) -> None:
    save("in/a.png", board())
    save("masks/a.png", board(48, 64, 8))
    before = Path("masks/a.png").read_bytes()
    assert "may be drawn by hand" in run("in").line()
    assert Path("masks/a.png").read_bytes() == before


def test_a_set_of_another_kind_or_for_another_sam_is_one_line(run: Run, tmp_path: Path) -> None:
    save("a.png", board())
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    attach(network, LoRA(rank=2), at="0", name="other").save(tmp_path / "other.safetensors")
    said = run("a.png", set_file=tmp_path / "other.safetensors").line()
    assert "holds no segmentation: task None" in said
    other = save_tiny_set(tmp_path / "seed.safetensors", says=replace(TINY, seed=5))
    assert "vision_encoder.layers" in run("a.png", set_file=other).line()
    for told in ({"crop": 0}, {"crop": "9"}, {"levels": [5, 5]}):
        other = save_tiny_set(tmp_path / "told.safetensors", **told)
        assert f"misstates {next(iter(told))}=" in run("a.png", set_file=other).line()
    torch.save({"a": torch.zeros(1)}, tmp_path / "sam.pth")
    assert "torch.save file" in run("a.png", set_file=tmp_path / "sam.pth").line()
    assert not Path("masks").exists()


# Stopped


@pytest.mark.slow
def test_an_interrupt_keeps_the_masks_that_are_whole(tiny: Path) -> None:
    for number in range(300):
        save(f"in/{number:03}.png", board(64, 64))
    words = ("segment", "in", f"--set={tiny}", "--out=masks", "--batch=1", "--window=32")
    process = started(*words)
    while not Path("masks/000.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    masks = sorted(path for path in Path("masks").iterdir() if path.suffix == ".png")
    said = f"polyadapt: interrupted: {len(masks)} of 300 files are done"
    assert err.splitlines()[-1] == said  # progress may come before
    assert len(rows()) == len(masks) == len(out.splitlines()) < 300
    assert all(mask_of(str(path)).shape == (64, 64) for path in masks)
