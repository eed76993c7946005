"""What `polyadapt vision ...` refuses: a mistake is one line that names it, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyadapt.tests.command_cases import Run, command, trained_in, write
from polyadapt.tests.vision_cases import TINY, configuration, finished, image, save_labelled

pytestmark = pytest.mark.in_an_empty_folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "vision")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "vision fit", configuration(), save_labelled)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modell": 1}, "unknown key 'modell'; nearest: model"),
        ({"trainer__max_epoch": 1}, "unknown key 'trainer.max_epoch'; nearest: trainer.max_epochs"),
        ({"model__att": "blocks.*"}, "unknown key 'model.att'; nearest: model.at"),
        ({"model__adapter__class_path": "LoRAA"}, "'LoRAA' is none of its classes; nearest: LoRA"),
        ({"model__adapter__class_path": "torch.nn.Linear"}, "model.adapter: 'torch.nn.Linear' is"),
        ({"model__adapter__init_args__rnk": 3}, "LoRA has no setting 'rnk'; nearest: rank"),
        ({"model__adapter__init_args__rank": "two"}, "init_args.rank: 'two' is not allowed: int"),
        ({"model__adapter__init_args__rank": 0}, "LoRA: rank 0 is not allowed"),
        ({"model__adapter__init_args__rank": 500}, "rank 500 does not fit blocks.0.attn.qkv"),
        ({"model__at": "block.*.attn.qkv"}, "nearest: blocks.*.attn.qkv"),
        ({"data__init_args__seed": 2**70}, "data.init_args.seed: 1180591620717411303424 is not"),
        ({"seed_everything": 2**40}, "seed_everything: 1099511627776 is not allowed: whole"),
        ({"model__lr": "fast"}, "model.lr: 'fast' is not allowed: float"),
        ({"model__lr": -1.0}, "lr=-1.0 is not allowed"),
        ({"model__preprocessing": "imagnet"}, "'imagnet' is not allowed: backbone, imagenet"),
        ({"model__backbone": "TinyVit"}, "'TinyVit' is none of its classes; nearest: TinyViT"),
        ({"model__backbone__init_args__name": "vit_tny"}, "timm has no model 'vit_tny'"),
        ({"model__backbone__init_args__name": None}, "TimmBackbone needs name"),
        ({"model": None}, "the configuration lacks model.backbone, model.adapter"),
        ({"data__class_path": "ArrayDat"}, "data: 'ArrayDat' is none of its classes; nearest"),
        ({"data__init_args__pat": "x"}, "ArrayData has no setting 'pat'; nearest: path"),
        ({"data__init_args__batch_size": "six"}, "batch_size: 'six' is not allowed: int"),
        (
            {"data__init_args__augmentation": "flop"},
            "'flop' is not allowed: none, flip, random_resized_crop",
        ),
        ({"data__init_args__path": "gone.npz"}, "there is no file gone.npz"),
        ({"data__init_args__shots": 100}, "shots=100: class 0 has only"),
        ({"trainer__accelerator": "gpux"}, "gpux"),
        ({"model__preprocessing": {"size": [8, 8], "mean": [0.5], "std": [0]}}, "std=(0.0,) is"),
        ({"monitor": "val_top2", "trainer__max_epochs": 1}, "monitor='val_top2' is not logged"),
        (
            {"trainer__callbacks": [{"class_path": "EarlyStopp", "init_args": {}}]},
            "trainer.callbacks",
        ),
        (
            {
                "trainer__callbacks": [
                    {"class_path": "EarlyStopping", "init_args": {"monitor": "val_top2"}}
                ]
            },
            "val_top2",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line(run: Run, changes: dict[str, Any], said: str) -> None:
    save_labelled()
    write("a.yaml", configuration(**changes))
    assert said in run("fit", "--config", "a.yaml").line()
    assert not Path("runs/a/adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "File does not exist"),
        ("", "empty, or not keys with values"),
        ("- 1\n", "empty, or not keys with values"),
        ("model: [\n", "line"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(
    run: Run, content: str | None, said: str
) -> None:
    if content is not None:
        Path("a.yaml").write_text(content)
    assert said in run("fit", "--config", "a.yaml").line()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fti"], "unknown verb 'fti'; did you mean fit?"),
        ([], "required: VERB"),
        (["fit", "--bogus", "1"], "unknown key 'bogus'"),
        (["fit", "stray"], "unknown key 'stray'"),
        (["fit", "--resume", "runs/none"], "cannot resume runs/none"),
        (["test", "--config", "a.yaml"], "test needs what to measure"),
        (["test", "--config", "a.yaml", "--set", "gone.safetensors"], "gone.safetensors"),
        (["test", "--config", "a.yaml", "--ckpt_path", "gone.ckpt"], "no checkpoint gone.ckpt"),
        (["test", "--config", "a.yaml", "--ckpt_path", "a.yaml"], "a.yaml is no whole checkpoint"),
        (["predict", "x.png"], "required: --set"),
        (["predict", "--set", "gone.safetensors", "a.yaml"], "gone.safetensors"),
        (["predict", "--set", "a.yaml", "a.yaml"], "a.yaml"),
        (["predict", "--set", "a.yaml", "."], "holds no image"),
        (["compare", "--configs", "a.yaml", "a.yaml", "--out", "c"], "two configurations"),
        (["compare", "--configs", "a.yaml", "--out", "c", "--seeds", "0,0"], "list of different"),
        (["sites", "vit_tny_patch16_224", "blocks.*"], "nearest: vit_tiny_patch16_224"),
        (["sites", "vit_tiny_patch16_224", "block.*"], "nearest: blocks.*"),
        (["fit", "--resume"], "--resume needs the folder of the run to go on with"),
    ],
)
def test_a_wrong_word_is_one_line(run: Run, words: list[str], said: str) -> None:
    save_labelled()
    write("a.yaml", configuration())
    assert said in run(*words).line()
    assert {path.name for path in Path().iterdir()} == {"a.yaml", "arrays.npz"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("cifar_10", "nearest: CIFAR10"), ("EuroSAT", "EuroSAT is not whole in data")],
)
def test_a_data_set_that_cannot_be_had_is_one_line(run: Run, name: str, said: str) -> None:
    data = {"class_path": "TorchvisionData", "init_args": {"name": name, "download": False}}
    write("a.yaml", configuration(data=data))
    assert said in run("fit", "--config", "a.yaml").line()
    assert not Path("runs").exists()


def test_data_of_one_class_is_refused_before_anything_is_written(run: Run) -> None:
    save_labelled(classes=1)
    write("a.yaml", configuration())
    assert "one class, 'cat'" in run("fit", "--config", "a.yaml").line()
    assert not Path("runs").exists()


def image_folders() -> dict[str, Any]:
    for name in ("cat", "dog"):
        Path("images", name).mkdir(parents=True)
        for index in range(4):
            image(f"images/{name}/{index}.png", index)
    Path("images/cat/2.png").write_bytes(b"")
    return {"class_path": "ImageFolders", "init_args": {"root": "images", "val_share": 0.0}}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_training_image_is_named(run: Run, workers: int) -> None:
    data = image_folders()
    data["init_args"]["num_workers"] = workers
    write("a.yaml", configuration(data=data))
    assert "cannot read the image images/cat/2.png" in run("fit", "--config", "a.yaml").line()
    assert not Path("runs/a/adapter.safetensors").exists()


@pytest.mark.slow
def test_an_unreadable_training_image_is_skipped_on_request() -> None:
    data = image_folders()
    data["init_args"]["on_unreadable"] = "skip"
    write("a.yaml", configuration(data=data))
    code, _, err = finished("fit", "--config", "a.yaml")
    assert code == 0
    said = "skipped 1 of 8 images, which cannot be read: images/cat/2.png"
    assert err == f"polyadapt: note: {said}\n"


@pytest.mark.usefixtures("after_training")
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "pickle"])
def test_a_damaged_adapter_file_is_one_line(run: Run, damage: str) -> None:
    whole = Path("runs/a/adapter.safetensors").read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    last = Path("runs/a/last.ckpt").read_bytes()
    contents = {"empty": b"", "truncated": whole[:-9], "flipped": flipped, "pickle": last}
    Path("bad.safetensors").write_bytes(contents[damage])
    assert "bad.safetensors" in run("predict", "--set", "bad.safetensors", image("x.png")).line()
    words = ["test", "--config", "runs/a/config.yaml", "--set", "bad.safetensors", "--run", "t"]
    assert "bad.safetensors" in run(*words).line()
    assert not Path("t").exists()


@pytest.mark.usefixtures("after_training")
def test_an_adapter_file_of_another_backbone_is_refused(run: Run) -> None:
    other = {**TINY, "seed": 1}
    write("b.yaml", configuration(model__backbone__init_args=other))
    ran = run("test", "--config", "b.yaml", "--set", "runs/a/adapter.safetensors")
    assert "was made on" in ran.line()
    assert "seed=1" in ran.err


@pytest.mark.usefixtures("after_training")
def test_settings_of_a_backbone_without_its_name_are_refused_beside_a_file(run: Run) -> None:
    write("data.yaml", configuration(model=None))
    setting = "--set", "runs/a/adapter.safetensors", "--model.backbone.init_args.seed", "1"
    line = run("test", "--config", "a.yaml", *setting).line()
    assert "a class_path with its init_args, or nothing: the file says it" in line
    line = run("test", "--config", "data.yaml", *setting).line()
    assert "--model.backbone.init_args.seed does not go with --set: the file says its" in line


@pytest.mark.usefixtures("after_training")
def test_a_run_is_not_replaced_unless_asked(run: Run) -> None:
    before = Path("runs/a/adapter.safetensors").read_bytes()
    line = run("fit", "--config", "a.yaml", "--model.lr=0.01").line()
    assert "runs/a holds a run" in line
    assert Path("runs/a/adapter.safetensors").read_bytes() == before
    replacing = ["fit", "--config", "a.yaml", "--model.lr=0.01", "--overwrite=true"]
    assert run(*replacing).code == 0
    assert Path("runs/a/adapter.safetensors").read_bytes() != before
