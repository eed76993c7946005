"""`polyadapt vision fit|validate|test` on pictures with masks, as a person uses them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import (
    Run,
    changed,
    command,
    rows_of,
    trained_in,
    write,
)
from polyadapt.tests.medical_cases import save_vessels
from polyadapt.tests.segmentation_cases import (
    DECODER_OPTIONS,
    OPTIONS,
    SIDE,
    configuration,
    save_pictures,
)
from polyadapt.tests.vision_cases import configuration as of_a_classifier
from polyadapt.tests.vision_cases import save_labelled
from polyadapt.vision.medical.describe import describe
from polyadapt.vision.medical.losses import SALTReleased
from polyadapt.vision.medical.mask_head import TextToken
from polyadapt.vision.medical.view import View

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

CONFIGS = sorted((Path(__file__).parent.parent / "configs/vision/medical").glob("*.yaml"))
WIDE = {"hidden_size": 768, "patch_size": 16, "num_hidden_layers": 1, "global_attn_indexes": [0]}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "vision")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "vision fit", configuration(), save_pictures)


class StopAfterOne(Callback):
    """Ends a run after its first epoch, as an interrupt would."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


# What is written


@pytest.mark.usefixtures("after_training")
def test_a_fit_leaves_a_run_whose_scores_are_of_whole_pictures() -> None:
    names = {file.name for file in Path("runs/a").iterdir()}
    assert {"adapter.safetensors", "config.yaml", "metrics.csv", "last.ckpt"} <= names
    rows = rows_of("runs/a/metrics.csv")
    scores = {"val_loss", "val_dice", "val_iou", "val_one_empty", "val_both_empty"}
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert scores <= rows[0].keys()
    assert not {"val_cldice", "val_hd95"} & rows[0].keys()
    assert {float(row["val_pictures"]) for row in rows} == {1.0}
    assert read_file("runs/a/adapter.safetensors").extra["task"] == "segmentation"
    assert yaml.safe_load(Path("runs/a/config.yaml").read_text())["model"]["prompt"] == "class"


@pytest.mark.usefixtures("after_training")
def test_a_test_leaves_a_row_and_a_picture_per_picture(run: Run) -> None:
    words = ["--config", "runs/a/config.yaml", "--set", "runs/a/adapter.safetensors"]
    assert run("test", *words).code == 0
    (means,) = rows_of("runs/a/test_metrics.csv")
    (row,) = rows_of("runs/a/test_pictures.csv")
    assert (row["name"], row["patient"], row["unit"]) == ("d", "d", "px")
    for score in ("dice", "iou", "cldice", "hd95"):
        assert float(means[f"test_{score}"]) == pytest.approx(float(row[score]), abs=1e-4)
    sizes = []
    for path in ("runs/a/test_overlays/d.png", "pictures/images/d.png"):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1]
    assert run("fit", "--config", "a.yaml", "--overwrite", "true").code == 0
    assert not list(Path("runs/a").rglob("test_*.*"))
    assert not list(Path("runs/a/test_overlays").iterdir())


@pytest.mark.usefixtures("after_training")
def test_a_file_is_validated_as_the_last_epoch_was(run: Run) -> None:
    words = ["--config", "runs/a/config.yaml", "--set", "runs/a/adapter.safetensors"]
    ran = run("validate", *words)
    assert ran.code == 0
    last = rows_of("runs/a/metrics.csv")[-1]
    assert f"{float(last['val_loss']):.3f}" in ran.out


@pytest.mark.usefixtures("after_training")
def test_a_resumed_run_ends_in_the_same_bits(run: Run) -> None:
    words = ["--config", "a.yaml", "--data.init_args.augmentation", "flip"]
    assert run("fit", *words, "--run", "whole", "--trainer.max_epochs", "2").code == 0
    # Half of it: the schedule is that of two epochs.
    stop = ["--trainer.callbacks+=polyadapt.tests.test_medical_cli.StopAfterOne"]
    assert run("fit", *words, *stop, "--run", "half").code == 0
    assert len(rows_of("half/metrics.csv")) == 1
    again = yaml.safe_load(Path("half/config.yaml").read_text())
    again["trainer"]["callbacks"] = None
    write("half/config.yaml", again)
    assert run("fit", "--resume", "half").code == 0
    one, other = (read_file(f"{name}/adapter.safetensors") for name in ("whole", "half"))
    for mine, theirs in ((one.tensors, other.tensors), (one.head, other.head)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_fit_tells_what_the_head_trains_beside_the_set(run: Run) -> None:
    save_pictures()
    write("a.yaml", configuration(trainer__max_epochs=1))
    ran = run("fit", "--config", "a.yaml")
    trained = sum(
        tensor.numel() for tensor in read_file("runs/a/adapter.safetensors").head.values()
    )
    assert ran.out.splitlines()[1] == f"head: {trained:,} trainable"


@pytest.mark.usefixtures("after_training")
def test_the_file_says_on_what_crops_and_levels_it_was_trained(run: Run) -> None:
    def said() -> list[object]:
        about = describe("runs/a/adapter.safetensors")
        return [about.crop, about.levels]

    assert said() == [None, None]
    crops = ["--data.init_args.crop", "16", "--data.init_args.window", "[-10, 300.5]"]
    words = ["--config", "a.yaml", "--overwrite", "true", "--trainer.max_epochs", "1", *crops]
    assert run("fit", *words).code == 0
    assert said() == [16, (-10.0, 300.5)]


# What is refused


def test_one_domain_tells_its_two_tasks_apart(run: Run) -> None:
    save_labelled()
    write("b.yaml", of_a_classifier())
    assert run("fit", "--config", "b.yaml").code == 0
    save_pictures()
    write("a.yaml", configuration())
    line = run("test", "--config", "a.yaml", "--set", "runs/b/adapter.safetensors").line()
    assert "is of the task 'image classification': SegmentationFolders is of pictures with" in line
    line = run("fit", "--config", "a.yaml", "--model.backbone", "TimmBackbone").line()
    assert "TimmBackbone" in line
    assert "LiteMedSAM" in line
    line = run("fit", "--config", "a.yaml", "--data", "ChaseDB2").line()
    assert "'ChaseDB2' is none of its classes; nearest: ChaseDB1" in line
    line = run("fit", "--config", "a.yaml", "--model.loss", "DiceBCE").line()
    assert "'DiceBCE' is none of its classes; nearest: DiceCE" in line


@pytest.mark.usefixtures("after_training")
def test_a_segmentation_is_not_measured_on_labelled_images(run: Run) -> None:
    save_labelled()
    write("b.yaml", of_a_classifier())
    line = run("test", "--config", "b.yaml", "--set", "runs/a/adapter.safetensors").line()
    assert "is of the task 'segmentation': ArrayData is of labelled images" in line


@pytest.mark.usefixtures("after_training")
def test_a_set_for_another_sam_is_one_line(run: Run) -> None:
    other = configuration(model__backbone__init_args__seed=1)
    write("b.yaml", other)
    line = run("validate", "--config", "b.yaml", "--set", "runs/a/adapter.safetensors").line()
    assert "was made on TransformersSAM(" in line
    assert "seed=0" in line


def _of_another_size() -> None:
    Image.new("L", (7, 5)).save("pictures/masks/a_mask.png")


def _patient_in_two_parts() -> None:
    shutil.rmtree("pictures")
    parts = {"p1_left": "train", "p1_right": "val", "p2_left": "train"}
    save_vessels(Path("pictures"), [*parts])
    rows = "".join(f"{name},{part}\n" for name, part in parts.items())
    Path("pictures/data_split.csv").write_text(f"imgs,split\n{rows}")


UNNAMED = {"val_patients": [], "test_patients": [], "patient": r"(p\d)_"}


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        (_of_another_size, {}, "a_mask.png"),
        (lambda: None, {"val_patients": ["d"]}, "patient 'd' is in two parts"),
        (
            _patient_in_two_parts,
            UNNAMED,
            "patient 'p1' is in two parts",
        ),
    ],
    ids=["a mask of another size", "a patient named twice", "a split file that parts a patient"],
)
def test_bad_pictures_are_one_line_and_no_run(
    run: Run, spoil: Callable[[], None], changes: dict[str, object], said: str
) -> None:
    save_pictures()
    spoil()
    write("a.yaml", configuration(**{f"data__init_args__{k}": v for k, v in changes.items()}))
    line = run("fit", "--config", "a.yaml").line()
    assert said in line
    assert not Path("runs").exists()


@pytest.mark.usefixtures("after_training")
def test_a_bad_picture_of_the_test_part_is_told_before_an_old_run_is_replaced(run: Run) -> None:
    before = Path("runs/a/adapter.safetensors").read_bytes()
    Image.new("L", (7, 5)).save("pictures/masks/d_mask.png")
    line = run("fit", "--config", "a.yaml", "--overwrite", "true").line()
    assert "d_mask.png is 5 x 7 pixels (height x width)" in line
    assert Path("runs/a/adapter.safetensors").read_bytes() == before


def test_empty_masks_are_counted_not_hidden(run: Run) -> None:
    save_pictures()
    blank = np.zeros((SIDE, SIDE + 8), dtype=np.uint8)
    for name in ("a", "d"):
        Image.fromarray(blank).save(f"pictures/masks/{name}_mask.png")
    write("a.yaml", configuration(trainer__max_epochs=1))
    assert run("fit", "--config", "a.yaml").code == 0
    words = ["--config", "a.yaml", "--set", "runs/a/adapter.safetensors"]
    assert run("test", *words).code == 0
    (means,) = rows_of("runs/a/test_metrics.csv")
    assert float(means["test_one_empty"]) + float(means["test_both_empty"]) == 1
    (row,) = rows_of("runs/a/test_pictures.csv")
    # Nothing is there: a prediction of something is wholly wrong, of nothing wholly right.
    diagonal = float(np.hypot(SIDE, SIDE + 8))
    wrong = float(row["dice"]) == 0
    assert float(row["hd95"]) == pytest.approx(diagonal if wrong else 0.0, rel=1e-4)


# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_whole_and_its_model_can_be_built(path: Path) -> None:
    from polyadapt.core.configuration import DomainCLI
    from polyadapt.core.fitting import calm
    from polyadapt.vision.configuration import domain_of

    made = yaml.safe_load(path.read_text())
    backbone = made["model"]["backbone"]
    if isinstance(backbone, dict) and backbone["class_path"] == "TransformersSAM":
        wide = path.stem == "salt_released"  # its ranks need SAM's width
        options = OPTIONS | (WIDE if wide else {})
        small = {"pretrained": False, "options": options, "decoder": DECODER_OPTIONS}
        backbone["init_args"] |= small | {"img_size": SIDE}
        if wide:
            changed(made, model__view__side=SIDE)
    write(f"{path.stem}.yaml", made)
    words = ["--config", f"{path.stem}.yaml"]
    features = torch.ones(1, 8)
    with calm(), pytest.MonkeyPatch.context() as patched:
        # The text tower needs a network.
        patched.setattr(
            "polyadapt.vision.medical.text_prompt.ClipText.features", lambda *_: features
        )
        built = DomainCLI(domain_of("fit", words), "fit", words)
    assert built.model.adapters.trainable_count() > 0
    assert built.folder == Path("runs") / path.stem
    if path.stem == "salt_released":
        assert built.model.loss == SALTReleased()
        assert built.model.view == View.salt(SIDE)
        assert isinstance(built.model.head.prompt, TextToken)


def test_there_are_configurations() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"vessels_quick", "chase_lora", "chase_salt", "chase_ssam", "salt_released"} < names
