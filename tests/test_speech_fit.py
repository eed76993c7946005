"""`polyadapt speech fit|validate|test|sites` as a person uses them, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyadapt.core.configuration import DomainCLI
from polyadapt.core.fitting import calm
from polyadapt.core.store import read_file
from polyadapt.speech.configuration import DOMAIN
from polyadapt.tests.command_cases import Run, command, rows_of, trained_in, write
from polyadapt.tests.speech_cases import configuration, save_clip, save_manifest, save_whisper

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

FOLDER = Path(__file__).parent.parent / "configs" / "speech"
CONFIGS = sorted({*FOLDER.glob("*.yaml")} - {*FOLDER.glob("avsr*.yaml")})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "speech")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = configuration(monitor="val_wer", monitor_mode="min")
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "speech fit", made, save_whisper, save_manifest)


# What is written


@pytest.mark.usefixtures("after_training")
def test_a_run_leaves_its_files_and_its_rates_for_each_epoch() -> None:
    assert {file.name for file in Path("runs/a").iterdir()} == {
        "adapter.safetensors",
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "learning_curve.png",
        "metrics.csv",
    }
    epochs = rows_of("runs/a/metrics.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert {"val_loss", "val_wer", "val_cer", "val_heard_in_silence"} < set(epochs[0])
    extra = read_file("runs/a/adapter.safetensors").extra
    assert (extra["seconds"], extra["language"], extra["longest"]) == (0.6, "en", 3)


@pytest.mark.usefixtures("after_training")
def test_the_effective_configuration_gives_the_same_adapters_again(run: Run) -> None:
    assert run("fit", "--config", "runs/a/config.yaml", "--run", "again").code == 0
    ours, theirs = (
        Path(folder, "adapter.safetensors").read_bytes() for folder in ("runs/a", "again")
    )
    assert ours == theirs


@pytest.mark.usefixtures("after_training")
def test_a_test_writes_what_was_heard_in_each_clip(run: Run) -> None:
    file = "--set=runs/a/adapter.safetensors"
    assert run("test", "--config", "runs/a/config.yaml", file).code == 0
    heard = rows_of("runs/a/transcripts.csv")
    assert sorted(row["clip"] for row in heard) == ["clips/11.wav", "clips/5.wav"]
    (rates,) = rows_of("runs/a/test_metrics.csv")
    edits, words = (sum(int(row[name]) for row in heard) for name in ("edits", "words"))
    assert words == 12
    assert float(rates["test_wer"]) == pytest.approx(edits / words)


@pytest.mark.usefixtures("after_training")
def test_a_file_needs_no_model_in_the_configuration(run: Run) -> None:
    write("data.yaml", {key: configuration()[key] for key in ("data", "trainer")})
    ran = run("validate", "--config", "data.yaml", "--set", "runs/a/adapter.safetensors")
    assert ran.code == 0
    assert "val_wer" in ran.out


def test_the_run_names_the_commands_to_go_on_with(run: Run) -> None:
    save_whisper()
    save_manifest(count=6)
    write("a.yaml", configuration(trainer__max_epochs=1, data__init_args__val_share=0.0))
    ran = run("fit", "--config", "a.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-2:] == [
        "next: polyadapt speech test --config runs/a/config.yaml --set runs/a/adapter.safetensors",
        "      polyadapt speech transcribe --set runs/a/adapter.safetensors FILE ...",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_whole_and_its_model_can_be_built(path: Path) -> None:
    save_whisper()
    words = ["--config", str(path), "--model.backbone=OpenAIWhisper"]
    words += ["--model.backbone.init_args.name=tiny.pt", "--data.init_args.path=m.csv"]
    with calm():
        built = DomainCLI(DOMAIN, "fit", words)
    assert built.model.adapters.trainable_count() > 0
    assert built.folder == Path("runs") / path.stem


def test_there_are_configurations() -> None:
    assert {"lora", "s2lora", "adalora", "bitfit", "full"} < {path.stem for path in CONFIGS}


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__language": "de"}, "English-only"),
        ({"model__seconds": 45}, "at most 30 s, not 45"),
        ({"model__secnds": 1}, "unknown key 'model.secnds'; nearest: model.seconds"),
        ({"model__at": "encoder.blocks.*.atn"}, "encoder.blocks.*.atn"),
        ({"model__adapter": "LoRAA"}, "nearest: LoRA"),
        ({"model__backbone": "TinyEn"}, "nearest: OfflineTinyEn"),
        ({"model__backbone__init_args__name": "tinny"}, "cannot load Whisper 'tinny'"),
        ({"model__normaliser": {"style": "french"}}, "'french'"),
        ({"data__class_path": "Manifests"}, "nearest: Manifest"),
        ({"data__init_args__path": "gone.csv"}, "there is no manifest gone.csv"),
        ({"data__init_args__noise": {"kinds": ["musik"]}}, "unknown synthetic noise 'musik'"),
        ({"data__init_args__speeds": [3.0]}, "factors from 0.5 to 2"),
        ({"data__init_args__spec_augment": {"bands": -1}}, "bands=-1"),
        ({"model__seconds": 0.3}, "lasts 0.40 s, the context is 0.3 s"),
        ({"monitor": "val_top1"}, "monitor='val_top1' is not logged"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(run: Run, changes: dict[str, Any], said: str) -> None:
    save_whisper()
    save_manifest(count=6)
    write("a.yaml", configuration(**changes))
    assert said in run("fit", "--config", "a.yaml").line()
    assert not Path("runs/a/adapter.safetensors").exists()
    assert "monitor" in changes or not Path("runs").exists()


def test_clips_that_cannot_be_used_are_named_and_skipped_on_request(run: Run) -> None:
    save_whisper()
    save_manifest(count=6)
    save_clip("long.wav", 2.0)
    with Path("m.csv").open("a") as file:
        file.write("gone.wav,one,s0,train\nlong.wav,one,s0,train\n")
    write("a.yaml", configuration(trainer__max_epochs=1))
    assert run("fit", "--config", "a.yaml").line().endswith("there is no audio file gone.wav")
    with pytest.warns(UserWarning, match="skipped 2 of 7 clips: there is no audio file gone"):
        ran = run("fit", "--config", "a.yaml", "--data.init_args.on_bad=skip")
    assert ran.code == 0


@pytest.mark.usefixtures("after_training")
def test_a_file_of_another_whisper_is_refused(run: Run) -> None:
    write("b.yaml", configuration(model__backbone__init_args={"name": "other.pt"}))
    line = run("test", "--config", "b.yaml", "--set", "runs/a/adapter.safetensors").line()
    assert "was made on OpenAIWhisper(name='tiny.pt'), not on" in line


@pytest.mark.usefixtures("after_training")
def test_another_whisper_under_the_same_name_is_refused(run: Run) -> None:
    save_whisper("tiny.pt", n_vocab=51865)
    line = run("test", "--config", "a.yaml", "--set", "runs/a/adapter.safetensors").line()
    assert "runs/a/adapter.safetensors" in line


# The other verbs


def test_sites_prints_where_a_pattern_leads(run: Run) -> None:
    ran = run("sites", "large", "decoder.blocks.{0,31}.cross_attn.key")
    assert ran.code == 0
    assert ran.out.count("1280x1280") == 2
    assert run("sites", "tiny", "mlp", "--layout", "transformers").out.count("1536x384") == 8
    assert "nearest: decoder" in run("sites", "tiny", "decodr.blocks.*").line()


def test_help_names_the_verbs_and_loads_nothing_that_makes_one_wait() -> None:
    code = (
        "import sys\n"
        "from polyadapt.core.cli import main\n"
        "try: main(['speech', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'numpy', 'whisper', 'transformers'}\n"
        "print('loaded:', *heavy & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("fit", "validate", "test", "transcribe", "select", "sites"):
        assert f"\n{verb} " in ran.stdout
    assert ran.stdout.rstrip().endswith("loaded:")


def test_the_effective_configuration_says_all_settings_of_speech(run: Run) -> None:
    save_whisper()
    save_manifest(count=6)
    write("a.yaml", configuration())
    with calm():
        built = DomainCLI(DOMAIN, "fit", ["--config", "a.yaml"])
    said = yaml.safe_load(built.effective())
    assert said["data"]["init_args"]["sort_within"] == 16
    assert said["model"]["mask_prompt"] is True
