"""`polyadapt vlm ...` as a person uses it: what it writes and prints, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from polyadapt.core import cli
from polyadapt.core.errors import StoreError
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import Run, command, rows_of, trained_in, write
from polyadapt.tests.vision_cases import image, noise
from polyadapt.tests.vlm_cases import COLOURS, TinyCLIP, configuration, save_colours
from polyadapt.vlm import backbone_words, zero_shot
from polyadapt.vlm.adapters import load_set

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "vlm").glob("*.yaml"))
SET = "runs/a/adapter.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "vlm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "vlm fit", configuration(), save_colours)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--backbone tiny7` is the tiny CLIP with the weights of seed 7; templates are short."""

    def named(word: str) -> Any:
        return TinyCLIP(seed=int(word.removeprefix("tiny") or 0))

    monkeypatch.setattr(zero_shot, "backbone_called", named)


# What is written


@pytest.mark.usefixtures("after_training")
def test_a_run_takes_its_steps_and_its_file_says_everything() -> None:
    folder = Path("runs/a")
    rows = rows_of(folder / "metrics.csv")
    assert rows[-1]["step"] == "6"  # 2 shots, 3 steps each
    assert {"train_loss", "val_loss", "val_top1", "val_macro_f1"} < set(rows[0])
    effective = yaml.safe_load((folder / "config.yaml").read_text())
    assert effective["model"]["scale"] == 100.0
    found = read_file(folder / "adapter.safetensors")
    assert found.extra["classes"] == list(COLOURS)
    assert found.extra["backbone"] == {"backbone": "TinyCLIP", "seed": 0}
    assert found.head == {}
    assert len(found.sites) == 12


@pytest.mark.usefixtures("after_training")
def test_the_test_part_gives_metrics_and_a_confusion_matrix(run: Run) -> None:
    assert run("test", "--config", "runs/a/config.yaml", f"--set={SET}").code == 0
    (row,) = rows_of("runs/a/test_metrics.csv")
    assert set(row) == {"test_loss", "test_top1", "test_macro_f1", "test_calibration_error"}
    assert Path("runs/a/confusion_matrix.png").read_bytes()[1:4] == b"PNG"
    by_checkpoint = run("test", "--config", "a.yaml", "--ckpt_path=runs/a/last.ckpt", "--run=b")
    assert by_checkpoint.code == 0
    assert Path("b/test_metrics.csv").read_text() == Path("runs/a/test_metrics.csv").read_text()


@pytest.mark.usefixtures("after_training")
def test_predict_prints_path_class_and_probability(run: Run) -> None:
    Path("folder").mkdir()
    images = [image("one.png", 1), image("folder/two.jpg", 2)]
    ran = run("predict", f"--set={SET}", "one.png", "folder", "--out=p.csv")
    assert (ran.code, ran.err) == (0, "")
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert [row[0] for row in rows] == images
    assert {row[1] for row in rows} <= {*COLOURS}
    assert len(Path("p.csv").read_text().splitlines()) == 3


@pytest.mark.usefixtures("after_training", "tiny")
def test_zero_shot_takes_any_classes_with_a_set_or_without(run: Run) -> None:
    Path("names.txt").write_text("cat\n\nsea_lion, wet\n", encoding="utf-8")
    image("one.png", 1)
    words = ["zero-shot", "one.png", "--template", "a {}", "--template", "the {}"]
    for model in (["--set", SET], ["--set", SET, "--backbone", "tiny"], ["--backbone", "tiny7"]):
        ran = run(*words, *model, "--labels-file", "names.txt")
        assert (ran.code, ran.err) == (0, "")
        path, label, probability = ran.out.strip().split("\t")
        assert path == "one.png"
        assert label in ("cat", "sea_lion, wet")
        assert 0.5 <= float(probability) <= 1
    assert run(*words, "--backbone", "tiny", "--labels", "cat, dog").code == 0


@pytest.mark.usefixtures("after_training")
@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGBA", "P"])
def test_images_of_other_colour_modes_are_classified(run: Run, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    noise(0).convert(mode).save(name)
    assert run("predict", f"--set={SET}", name).code == 0


def test_sites_prints_where_adapters_would_go(run: Run) -> None:
    words = ["sites", "ViT-S-32-alt", "--encoder", "text", "--parts", "qv", "--layers", "top3"]
    ran = run(*words)
    assert ran.code == 0
    assert ran.out.count("q_proj") >= 3
    assert "visual" not in ran.out
    named = run("sites", "ViT-S-32-alt", "visual.transformer.resblocks.0.mlp.c_fc")
    assert "visual.transformer.resblocks.0.mlp.c_fc" in named.out


# What is refused


@pytest.mark.usefixtures("after_training", "tiny")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "cat"], "at least two classes, got ['cat']"),
        (["--labels", "cat,dog,cat"], "'cat' is there twice"),
        (["--labels", "cat,,dog"], "a class is called ''"),
        (["--labels", "cat,CAT"], "'cat' and 'CAT' are the same to the tokenizer"),
        (["--labels", "cat,dog", "--template", "a photo"], "the template 'a photo' has 0 slots"),
        (["--labels", "cat,dog", "--template", "oxford_pets"], "longer than the 8 tokens"),
        ([], "either --labels cat,dog or --labels-file FILE"),
        (["--labels", "a,b", "--labels-file", "x"], "either --labels cat,dog or --labels-file"),
        (["--labels-file", "gone.txt"], "cannot read the classes in gone.txt"),
        (["--labels", "cat,dog", "--set", SET], "was made on TinyCLIP(seed=0), not on tiny7"),
    ],
)
def test_words_that_cannot_be_meant_are_one_line(run: Run, words: list[str], said: str) -> None:
    image("one.png")
    template = [] if "--template" in words else ["--template", "a {}"]
    ran = run("zero-shot", "one.png", "--backbone", "tiny7", *words, *template)
    assert said in ran.line()
    assert ran.out == ""


def test_images_that_cannot_be_read_are_one_line(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken.png").write_bytes(b"\x89PNG nonsense")
    noise(0, 200, 100).save("huge.png")
    words = ["predict", "--set", str(trained / SET)]
    assert "broken.png" in run(*words, "broken.png").line()
    assert "gone.png" in run(*words, "gone.png").line()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert "huge.png: Image size (20000 pixels) exceeds limit" in run(*words, "huge.png").line()


@pytest.mark.usefixtures("after_training")
def test_a_set_of_another_tower_is_one_line(run: Run) -> None:
    with pytest.raises(StoreError) as refused:
        load_set(TinyCLIP(seed=1).build(), SET)
    assert "\n" not in str(refused.value)
    other = {"class_path": "TinyCLIP", "init_args": {"seed": 1}}
    write("b.yaml", configuration(model__backbone=other))
    line = run("test", "--config", "b.yaml", f"--set={SET}").line()
    assert "was made on TinyCLIP(seed=0), not on TinyCLIP(seed=1)" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__init_args__shots": 99}, "shots=99: class 0 has only"),
        ({"model__template": "photo"}, "the template 'photo' has 0 slots"),
        ({"model__template": "a very long photo of the one {}"}, "longer than the 8 tokens"),
        ({"model__classes": ["red", "green"]}, "the data has"),
        ({"model__encoder": "ears"}, "ears"),
        ({"model__parts": "qz"}, "'z'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line_and_leaves_nothing(
    run: Run, changes: dict[str, Any], said: str
) -> None:
    save_colours()
    write("a.yaml", configuration(**changes))
    assert said in run("fit", "--config", "a.yaml").line()
    assert not Path("runs/a/adapter.safetensors").exists()


# Configurations and help


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_whole_and_its_model_can_be_built(path: Path) -> None:
    from polyadapt.core.configuration import DomainCLI
    from polyadapt.core.fitting import calm
    from polyadapt.vlm.configuration import DOMAIN

    save_colours()
    words = ["--config", str(path), "--model.backbone=TinyCLIP"]
    if path.stem.startswith("offline"):  # for the images that a user has
        words.append("--data.init_args.path=arrays.npz")
    with calm():
        built = DomainCLI(DOMAIN, "fit", words)
    assert built.model.adapters.trainable_count() > 0
    assert len(built.model.adapters.sites) == 12


def test_a_data_set_of_coop_can_be_named(run: Run) -> None:
    data = {"class_path": "CoOpData", "init_args": {"name": "fgvc_aircraft", "root": "nowhere"}}
    write("a.yaml", configuration(data=data))
    assert (
        "cannot read nowhere/fgvc_aircraft/variants.txt" in run("fit", "--config", "a.yaml").line()
    )


def test_there_are_configurations() -> None:
    assert {"block_lora", "clip_lora"} <= {path.stem for path in CONFIGS}


def test_a_word_names_a_backbone() -> None:
    from polyadapt.vlm.backbones import OfflinePair, OpenCLIP, TransformersCLIP

    named = backbone_words.backbone_called
    assert named("ViT-B-16/laion2b_s34b_b88k") == OpenCLIP(
        name="ViT-B-16", pretrained="laion2b_s34b_b88k"
    )
    assert named("ViT-B-16") == OpenCLIP(name="ViT-B-16", pretrained=None)
    assert named("ViT-B-16/my/weights.pt").to_json()["pretrained"] == "my/weights.pt"
    for brings_its_own in ("hf-hub:timm/ViT-B-16-SigLIP", "local-dir:my/model"):
        assert named(brings_its_own) == OpenCLIP(name=brings_its_own, pretrained=None)
    assert named("hf:google/siglip-base") == TransformersCLIP(name="google/siglip-base")
    assert named("offline") == OfflinePair()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("", "open_clip has no model ''"),
        ("ViT-B-99", "open_clip has no model 'ViT-B-99'; nearest: ViT-B-"),
        ("openai/clip-vit-base-patch16", "transformers are TransformersCLIP, hf:NAME in a command"),
        ("ViT-B-32/nothing", "no weights 'nothing' for 'ViT-B-32', and there is no such file"),
        ("ViT-B-32/openai", "another activation than 'ViT-B-32' has: name 'ViT-B-32-quickgelu'"),
        ("local-dir:nowhere", "cannot load open_clip's 'local-dir:nowhere'"),
        ("hf:nowhere/./none", "cannot load transformers' 'nowhere/./none'"),
    ],
)
def test_a_word_that_names_no_backbone_is_one_line(run: Run, word: str, said: str) -> None:
    assert said in run("sites", word).line()


def test_help_of_the_domain_loads_nothing_that_makes_one_wait() -> None:
    code = (
        "import sys\nfrom polyadapt.core.cli import main\n"
        "try: main(['vlm', '--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'open_clip') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "zero-shot" in ran.stdout


@pytest.mark.parametrize(
    "verb", ["fit", "test", "predict", "zero-shot", "few-shot", "transfer", "sites"]
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["vlm", verb, "--help"])
    assert left.value.code == 0
    assert f"polyadapt vlm {verb}" in capsys.readouterr().out
