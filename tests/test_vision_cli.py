"""`polyadapt vision ...` as a person uses it: what it writes, and how it goes on when stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from polyadapt.core import cli
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import Run, command, rows_of, trained_in, write
from polyadapt.tests.vision_cases import (
    TINY,
    TINY_OPTIONS,
    configuration,
    finished,
    image,
    save_labelled,
    started,
)

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "vision").glob("*.yaml"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "vision")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "vision fit", configuration(), save_labelled)


def until(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# What is written


@pytest.mark.usefixtures("after_training")
def test_a_run_leaves_its_files_and_its_effective_configuration() -> None:
    folder = Path("runs/a")
    assert {file.name for file in folder.iterdir()} == {
        "adapter.safetensors",
        "config.yaml",
        "last.ckpt",
        "learning_curve.png",
        "metrics.csv",
    }
    rows = rows_of(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "val_loss", "val_top1", "val_macro_f1"} < set(rows[0])
    effective = yaml.safe_load((folder / "config.yaml").read_text())
    assert effective["model"]["lr"] == 1e-3
    assert effective["seed_everything"] == 0
    assert effective["run"] == "runs/a"
    assert list(read_file(folder / "adapter.safetensors").head) == ["head.bias", "head.weight"]


@pytest.mark.usefixtures("after_training")
def test_the_effective_configuration_gives_the_same_adapters_again(run: Run) -> None:
    assert run("fit", "--config", "runs/a/config.yaml", "--run", "again").code == 0
    ours, theirs = (
        Path(folder, "adapter.safetensors").read_bytes() for folder in ("runs/a", "again")
    )
    assert ours == theirs


@pytest.mark.usefixtures("after_training")
def test_the_test_part_gives_metrics_and_a_confusion_matrix(run: Run) -> None:
    file = "--set=runs/a/adapter.safetensors"
    assert run("test", "--config", "runs/a/config.yaml", file).code == 0
    (row,) = rows_of("runs/a/test_metrics.csv")
    assert set(row) == {"test_loss", "test_top1", "test_macro_f1", "test_calibration_error"}
    assert Path("runs/a/confusion_matrix.png").read_bytes()[1:4] == b"PNG"
    by_checkpoint = run("test", "--config", "a.yaml", "--ckpt_path=runs/a/last.ckpt", "--run=b")
    assert by_checkpoint.code == 0
    assert Path("b/test_metrics.csv").read_text() == Path("runs/a/test_metrics.csv").read_text()


@pytest.mark.usefixtures("after_training")
def test_an_adapter_file_needs_no_model_in_the_configuration(run: Run) -> None:
    write("data.yaml", {key: configuration()[key] for key in ("data", "trainer")})
    ran = run("validate", "--config", "data.yaml", "--set", "runs/a/adapter.safetensors")
    assert ran.code == 0
    assert "val_top1" in ran.out


@pytest.mark.usefixtures("after_training")
def test_mosa_is_tested_from_the_plain_adapter_that_its_file_holds(run: Run) -> None:
    mosa = {"class_path": "MoSA", "init_args": {"rank": 4, "experts": 2}}
    write("m.yaml", configuration(model__adapter=mosa, model__at=None))
    assert run("fit", "--config", "m.yaml").code == 0
    file = "runs/m/adapter.safetensors"
    assert type(read_file(file).recipe).__name__ == "Bottleneck"
    assert run("test", "--config", "runs/m/config.yaml", "--set", file).code == 0


@pytest.mark.usefixtures("after_training")
def test_predict_prints_path_class_and_probability(run: Run) -> None:
    Path("folder").mkdir()
    images = [image("one.png", 1), image("folder/two.jpg", 2)]
    ran = run("predict", "--set=runs/a/adapter.safetensors", "one.png", "folder", "--out=p.csv")
    assert (ran.code, ran.err) == (0, "")
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert [row[0] for row in rows] == images
    assert {row[1] for row in rows} <= {"cat", "dog", "eel"}
    table = rows_of("p.csv")
    assert [(row["path"], row["class"]) for row in table] == [(row[0], row[1]) for row in rows]
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in table)


@pytest.mark.usefixtures("after_training")
def test_predict_stops_at_an_unreadable_image_or_passes_over_it(run: Run) -> None:
    names = [image("a.png"), "b.png", image("c.png")]
    Path("b.png").write_bytes(b"\x89PNG nonsense")
    words = ["predict", "--set", "runs/a/adapter.safetensors", "--out", "p.csv", *names]
    assert "b.png" in run(*words).line()
    assert not Path("p.csv").exists()
    ran = run(*words, "--skip-unreadable")
    assert ran.code == 0
    assert "skipped 1 of 3" in ran.err
    assert [line.split("\t")[0] for line in ran.out.splitlines()] == ["a.png", "c.png"]


@pytest.mark.slow
def test_compare_trains_each_configuration_with_each_seed() -> None:
    save_labelled(count=60)
    head = configuration(model__adapter="HeadOnly", model__at=None)
    write("lora.yaml", configuration(data__init_args__shots=8))
    head["data"]["init_args"]["shots"] = 8
    write("head.yaml", head)
    words = ["compare", "--configs", "lora.yaml", "head.yaml", "--out", "cmp", "--seeds", "0,3"]
    process = started(*words)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    rows = rows_of("cmp/outcomes.csv")
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("lora", "0"),
        ("head", "0"),
        ("lora", "3"),
        ("head", "3"),
    ]
    # qkv of two blocks: 2 (96 + 288) numbers each; a head of 3 classes on 96 features
    assert [int(row["trainable"]) for row in rows[:2]] == [2 * 2 * (96 + 288), 0]
    assert {int(row["head"]) for row in rows} == {3 * 96 + 3}
    assert Path("cmp/table.txt").read_text() in out
    assert Path("cmp/comparison.png").read_bytes()[1:4] == b"PNG"
    assert all(Path("cmp", f"head-seed{seed}", "adapter.safetensors").exists() for seed in (0, 3))
    assert "holds a comparison" in finished(*words).line()


def test_compare_refuses_configurations_with_other_data(run: Run) -> None:
    write("a.yaml", configuration())
    write("b.yaml", configuration(data__init_args__batch_size=7))
    words = ["compare", "--configs", "a.yaml", "b.yaml", "--out", "cmp"]
    assert "b.yaml and a.yaml differ in their data" in run(*words).line()
    assert not Path("cmp").exists()


def test_sites_knows_the_places_of_a_sam(run: Run) -> None:
    ran = run("sites", "LiteMedSAM", "neck", "vision_encoder.stages.1.blocks.0.attn.qkv")
    assert ran.code == 0
    for path in ("vision_encoder.neck.conv2", "vision_encoder.stages.1.blocks.0.attn.qkv"):
        assert path in ran.out


def test_sites_prints_where_a_pattern_leads(run: Run) -> None:
    ran = run("sites", "vit_tiny_patch16_224", "blocks.{0,2}.attn.qkv[q,v]")
    assert ran.code == 0
    assert ran.out.count("192x192") == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_whole_and_its_model_can_be_built(path: Path) -> None:
    from polyadapt.core.configuration import DomainCLI
    from polyadapt.core.fitting import calm
    from polyadapt.vision.configuration import DOMAIN

    save_labelled()
    words = ["--config", str(path)]
    if "TimmBackbone" in path.read_text():
        small = {"pretrained": "false", "img_size": "16", "options": str(TINY_OPTIONS)}
        words += [f"--model.backbone.init_args.{key}={value}" for key, value in small.items()]
    else:
        words += ["--data.init_args.path=arrays.npz", "--model.backbone=TimmBackbone"]
        words += [f"--model.backbone.init_args.{key}={value}" for key, value in TINY.items()]
    with calm():
        built = DomainCLI(DOMAIN, "fit", words)
    assert built.model.adapters.trainable_count() > 0
    assert built.folder == Path("runs") / path.stem


def test_there_are_configurations() -> None:
    names = {path.stem for path in CONFIGS}
    assert {f"cifar10_{method}" for method in ("adaptertune", "lora", "mosa")} < names


# Checkpoints and interrupts


@pytest.mark.usefixtures("after_training")
def test_a_checkpoint_does_not_change_what_was_asked_for(run: Run) -> None:
    words = ["fit", "--config", "a.yaml", "--ckpt_path=runs/a/last.ckpt", "--run=b"]
    line = run(*words, "--model.lr=0.5").line()
    assert "lr=0.001, not with 0.5" in line
    assert run(*words, "--trainer.max_epochs=3").code == 0
    assert yaml.safe_load(Path("b/config.yaml").read_text())["model"]["lr"] == 1e-3


@pytest.mark.usefixtures("after_training")
def test_a_damaged_checkpoint_is_one_line(run: Run) -> None:
    whole = Path("runs/a/last.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[:-100])
    middle = len(whole) // 2
    Path("flipped.ckpt").write_bytes(whole[:middle] + b"\0" * 64 + whole[middle + 64 :])
    for name in ("cut.ckpt", "flipped.ckpt"):
        line = run("fit", "--config", "a.yaml", "--ckpt_path", name, "--run=b").line()
        assert name in line
    assert not Path("b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_file(number: signal.Signals) -> None:
    save_labelled(count=48)
    # Enough that the signal comes before the end, however busy the machine is.
    epochs = {"trainer__max_epochs": 150, "data__init_args__augmentation": "flip"}
    write("a.yaml", configuration(**epochs))
    folder = Path("runs/a")
    process = started("fit", "--config", "a.yaml")
    until(folder / "last.ckpt", process)
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "polyadapt vision fit --resume runs/a" in err
        assert "Traceback" not in err
    else:
        assert process.returncode == -number
    assert not (folder / "adapter.safetensors").exists()
    assert finished("fit", "--resume", "runs/a")[0] == 0
    assert finished("fit", "--config", "a.yaml", "--run", "whole")[0] == 0
    assert {f.name for f in folder.iterdir()} == {f.name for f in Path("whole").iterdir()}
    for name in ("adapter.safetensors", "metrics.csv"):
        assert (folder / name).read_bytes() == Path("whole", name).read_bytes()


# Help


def test_help_of_the_domain_loads_nothing_that_makes_one_wait() -> None:
    code = (
        "import sys\nfrom polyadapt.core.cli import main\n"
        "try: main(['vision', '--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'lightning', 'timm') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "compare" in ran.stdout


@pytest.mark.parametrize(
    "verb", ["fit", "test", "predict", "compare", "sites", "vtab", "sweep-rank"]
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["vision", verb, "--help"])
    assert left.value.code == 0
    assert f"polyadapt vision {verb}" in capsys.readouterr().out
