"""`polyadapt speech fit-av|validate-av` as a person uses them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core.configuration import DomainCLI
from polyadapt.core.fitting import calm
from polyadapt.core.run_folder import say_how_to_go_on
from polyadapt.core.store import read_file
from polyadapt.speech.av_configuration import DOMAIN
from polyadapt.tests import speech_cases
from polyadapt.tests.command_cases import Run, command, rows_of, trained_in, write
from polyadapt.tests.filmed_cases import configuration, save_film, save_films
from polyadapt.tests.speech_cases import save_manifest, save_whisper

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

CONFIGS = Path(__file__).parent.parent / "configs" / "speech"
ADAPTER = "runs/a/adapter.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "speech")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = configuration(monitor="val_loss", monitor_mode="min")
    folder = tmp_path_factory.mktemp("filmed")
    return trained_in(folder, "speech fit-av", made, save_whisper, save_films)


@pytest.fixture
def before_training() -> None:
    save_whisper()
    save_films()


# What is written


@pytest.mark.usefixtures("after_training")
def test_a_run_leaves_its_files_its_losses_and_what_the_set_is_for() -> None:
    assert {"adapter.safetensors", "config.yaml", "last.ckpt", "metrics.csv"} < {
        file.name for file in Path("runs/a").iterdir()
    }
    epochs = rows_of("runs/a/metrics.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert {"train_loss", "val_loss", "val_mel", "val_states"} < set(epochs[0])
    extra = read_file(ADAPTER).extra
    assert (extra["task"], extra["seconds"], extra["stage"]) == ("audio-visual-speech", 0.6, 1)
    assert extra["label"]["category"] == "white"
    assert extra["label"]["snr_db"] == [-5, 0]


@pytest.mark.usefixtures("after_training")
def test_the_effective_configuration_gives_the_same_set_again(run: Run) -> None:
    assert run("fit-av", "--config", "runs/a/config.yaml", "--run", "again").code == 0
    assert Path(ADAPTER).read_bytes() == Path("again/adapter.safetensors").read_bytes()


@pytest.mark.usefixtures("before_training", "after_training")
def test_a_run_that_is_resumed_ends_as_one_that_was_not(run: Run) -> None:
    write("b.yaml", configuration(trainer__max_epochs=1, monitor="val_loss", monitor_mode="min"))
    assert run("fit-av", "--config", "b.yaml").code == 0
    assert run("fit-av", "--resume", "runs/b", "--trainer.max_epochs=2").code == 0
    whole, resumed = (read_file(f"runs/{name}/adapter.safetensors") for name in "ab")
    for name, tensor in (whole.tensors | whole.head).items():
        assert torch.equal((resumed.tensors | resumed.head)[name], tensor), name
    assert [row["val_loss"] for row in rows_of("runs/b/metrics.csv")] == [
        row["val_loss"] for row in rows_of("runs/a/metrics.csv")
    ]


@pytest.mark.usefixtures("after_training")
def test_a_set_is_validated_from_its_file_alone(run: Run) -> None:
    write("data.yaml", {key: configuration()[key] for key in ("data", "trainer")})
    ran = run("validate-av", "--config", "data.yaml", "--set", ADAPTER)
    assert ran.code == 0
    best = min(float(row["val_loss"]) for row in rows_of("runs/a/metrics.csv"))
    line = next(line for line in ran.out.splitlines() if "val_loss" in line)
    assert float(line.replace("│", " ").split()[-1]) == pytest.approx(best, abs=1e-5)


@pytest.mark.usefixtures("before_training")
def test_stages_are_commands_that_start_from_the_last_one_s_file_and_name_what_comes_next(
    run: Run,
) -> None:
    write("a.yaml", configuration(trainer__max_epochs=1, data__init_args__val_share=0.0))
    start: list[str] = []
    for stage in (1, 3, 4):
        folder = f"stage{stage}"
        words = ["--config", "a.yaml", f"--model.stage={stage}", "--run", folder, *start]
        ran = run("fit-av", *words)
        assert (ran.code, ran.err) == (0, "")
        start = [f"--model.start={folder}/adapter.safetensors"]
    file = "stage4/adapter.safetensors"
    assert ran.out.splitlines()[-2:] == [
        f"next: polyadapt speech validate-av --config stage4/config.yaml --set {file}",
        f"      polyadapt speech transcribe --set {file} FILE ... --video MOUTH ...",
    ]
    sites = [len(read_file(f"stage{n}/adapter.safetensors").sites) for n in (1, 3, 4)]
    assert sites == [8, 24, 24]


def test_mouths_that_are_generated_need_no_file(run: Run) -> None:
    save_whisper()
    made = configuration(trainer__max_epochs=1)
    small = {"video_channels": [2, 2, 2, 2], "video_blocks": [1, 1, 1, 1], "inner": 2, "crop": 44}
    made["model"]["sizes"] = {**made["model"]["sizes"], **small, "features": None}
    arguments = {"clips": 6, "seconds": 0.4, "size": 48, "batch_size": 3}
    made["data"] = {"class_path": "GeneratedFilms", "init_args": arguments}
    write("a.yaml", made)
    assert run("fit-av", "--config", "a.yaml").code == 0
    assert read_file(ADAPTER).extra["label"]["snr_db"] == [-15, 30]  # the paper's, as none is said


def test_the_configurations_are_whole_and_their_models_can_be_built() -> None:
    save_whisper()
    words = ["--model.backbone=OpenAIWhisper", "--model.backbone.init_args.name=tiny.pt"]
    words += ["--model.sizes.public_layout=true"]
    with calm():
        published, small = (
            DomainCLI(DOMAIN, "fit", ["--config", str(CONFIGS / f"{name}.yaml"), *words]).model
            for name in ("avsr", "avsr_offline")
        )
    assert sum(p.numel() for p in published.fusion.parameters()) == 13_190_880
    assert published.adapters.recipe.rank == 64
    assert (published.wants.seconds, small.wants.seconds) == (30.0, 2.0)
    assert published.wants.sizes.public_layout is small.wants.sizes.public_layout is True


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__stage": 5}, "stage 5 is not allowed: one of 1, 2, 3, 4"),
        ({"model__stge": 1}, "unknown key 'model.stge'; nearest: model.stage"),
        ({"model__warmup": 0.1}, "unknown key 'model.warmup'"),
        ({"model__start": "gone.safetensors"}, "gone.safetensors"),
        ({"model__sizes__mels": 128}, "mels=128 is not allowed: this Whisper hears 80"),
        ({"model__prompt": {"language": "de"}}, "English-only"),
        ({"data__init_args__path": "gone.csv"}, "there is no manifest gone.csv"),
        ({"data__init_args__val_share": 1.5}, "val_share=1.5 cannot be split off"),
        ({"model__seconds": 0.4}, "films/1.wav lasts 0.44 s, the context is 0.4 s"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("before_training")
def test_a_wrong_setting_is_one_line(run: Run, changes: dict[str, Any], said: str) -> None:
    write("a.yaml", configuration(**changes))
    assert said in run("fit-av", "--config", "a.yaml").line()
    assert not Path("runs").exists()


def _another_text(path: str) -> None:
    Path(path).write_text("audio,text\na.wav,one\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: Path("films/3.wav").unlink(), "there is no audio file films/3.wav"),
        (lambda: Path("films/3.npy").unlink(), "films/3.npy: no such file of mouth crops"),
        (lambda: Path("films/3.npy").write_text("mouth"), "films/3.npy cannot be read as an array"),
        (lambda: np.save("films/3.npy", np.zeros((30, 6))), "films/3.wav: the mel's 40 frames"),
        (lambda: _another_text("films.csv"), "films.csv, line 2: audio and video are needed"),
    ],
)
@pytest.mark.usefixtures("before_training")
def test_a_clip_that_cannot_be_used_is_one_line(
    run: Run, spoil: Callable[[], Any], said: str
) -> None:
    spoil()
    write("a.yaml", configuration())
    assert said in run("fit-av", "--config", "a.yaml").line()
    assert not Path("runs").exists()


@pytest.mark.usefixtures("after_training")
def test_a_file_of_other_sizes_or_another_whisper_is_no_start(run: Run) -> None:
    write("b.yaml", configuration(model__start=ADAPTER, model__sizes__layers=2))
    assert "has fusion=" in run("fit-av", "--config", "b.yaml").line()
    write("b.yaml", configuration(model__start=ADAPTER, model__adapter__init_args={"rank": 3}))
    assert "is no earlier stage of this run" in run("fit-av", "--config", "b.yaml").line()
    speech_cases.save_whisper("other.pt")
    backbone = {"class_path": "OpenAIWhisper", "init_args": {"name": "other.pt"}}
    write("b.yaml", configuration(model__start=ADAPTER, model__backbone=backbone))
    assert "has backbone=" in run("fit-av", "--config", "b.yaml").line()


@pytest.mark.usefixtures("after_training")
def test_sets_of_the_other_kind_are_sent_to_the_other_verb(run: Run) -> None:
    save_manifest(count=6)
    write("plain.yaml", speech_cases.configuration(trainer__max_epochs=1))
    line = run("test", "--config", "plain.yaml", "--set", ADAPTER).line()
    assert line.endswith("is an audio-visual set: validate-av measures it")
    assert run("fit", "--config", "plain.yaml").code == 0
    other = "runs/plain/adapter.safetensors"
    line = run("validate-av", "--config", "a.yaml", "--set", other).line()
    assert line.endswith("is no audio-visual set: `validate` measures it")
    line = run("validate-av", "--config", "a.yaml").line()
    assert "validate-av needs what to measure" in line


def test_an_interrupted_run_names_the_command_to_go_on_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("last.ckpt").touch()
    say_how_to_go_on(DOMAIN.command("fit"), Path())
    assert capsys.readouterr().err.endswith("to go on: polyadapt speech fit-av --resume .\n")


def test_crops_that_are_too_small_are_one_line(run: Run) -> None:
    save_whisper()
    for index in range(6):
        save_film(f"films/{index}", seed=index, crops=40)
    lines = [f"films/{index}.wav,films/{index}.npy" for index in range(6)]
    Path("films.csv").write_text("\n".join(["audio,video", *lines, ""]))
    sizes = {"features": None, "video_channels": [2, 2, 2, 2], "video_blocks": [1, 1, 1, 1]}
    made = configuration()
    made["model"]["sizes"] |= {**sizes, "inner": 2, "crop": 44}
    write("a.yaml", made)
    assert "40 x 40 pixels: at least 44 x 44" in run("fit-av", "--config", "a.yaml").line()
