"""`polyadapt sweep`: which fits it starts, what it keeps of them, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from polyadapt.core import cli, sweep_point
from polyadapt.core.errors import AdaptError
from polyadapt.core.sweep_point import Job
from polyadapt.tests.command_cases import CODE, Run, command, rows_of, write
from polyadapt.tests.vision_cases import configuration, save_labelled

CONFIG = """model: {adapter: {class_path: LoRA, init_args: {rank: 2}}, lr: 0.1}
data: {path: a.npz, seed: 0}
"""
OVER = ["--over", "adapter.rank=4,8", "--over", "seed_everything=0,1"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "sweep")


def _values(job: Job) -> dict[str, str]:
    words = [word.partition("=") for word in job.words if word.startswith("--")]
    return {key.removeprefix("--"): value for key, sign, value in words if sign}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Every fit takes no time, and its accuracy is rank / 10 + seed / 100; rank 16 fails."""

    def parse(argv: list[str]) -> int:
        assert argv[:2] == ["fit", "--config"]
        assert argv[-1] == "--print_config"
        if any("lrr" in word for word in argv):
            raise AdaptError("unknown key 'model.lrr'; nearest: model.lr")
        sys.exit(0)

    module = ModuleType("pretended_domain")
    module.main = parse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = metadata.EntryPoint("vision", "pretended_domain:main", "polyadapt.domains")
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([entry]))
    asked: list[dict[str, str]] = []

    def fit(job: Job) -> int:
        values = _values(job)
        asked.append(values)
        rank, seed = int(values["model.adapter.rank"]), int(values.get("seed_everything", 0))
        if rank == 16:
            job.beside(".log").write_text("a note\npolyadapt: LoRA: rank 16 does not fit\n\n")
            return 2
        job.folder.mkdir()
        top1 = rank / 10 + seed / 100
        rows = f"1,{top1 + 1},0.5\n2,{top1},0.25\n"
        (job.folder / "metrics.csv").write_text(f"epoch,val_top1,val_loss\n{rows}")
        return 0

    monkeypatch.setattr(sweep_point, "_exit_code", fit)
    return asked


def _table() -> list[dict[str, str]]:
    return rows_of("sweeps/a/sweep.csv")


# What is fitted, and what is left


def test_every_combination_is_fitted_and_lies_in_one_table(
    run: Run, fits: list[dict[str, str]]
) -> None:
    ran = run("a.yaml", *OVER)
    assert ran.code == 0
    wanted = [(rank, seed) for rank in "48" for seed in "01"]
    assert [tuple(values.values()) for values in fits] == wanted
    assert [(row["model.adapter.rank"], row["seed_everything"]) for row in _table()] == wanted
    # The last epoch's: nothing was monitored.
    assert [float(row["val_top1"]) for row in _table()] == pytest.approx([0.4, 0.41, 0.8, 0.81])
    assert [row["epoch"] for row in _table()] == ["2"] * 4
    assert Path("sweeps/a/sweep.png").read_bytes()[1:4] == b"PNG"


def test_seeds_are_one_row_of_the_printed_table(run: Run, fits: list[dict[str, str]]) -> None:
    lines = run("a.yaml", *OVER).out.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("model.adapter.rank "))
    # The standard deviation of two values is their distance / sqrt(2): 0.01 / 1.41421 = 0.007071
    assert [re.split("  +", line) for line in lines[head : head + 3]] == [
        ["model.adapter.rank", "points", "val_top1", "val_loss"],
        ["4", "2", "0.405 +- 0.007071", "0.25 +- 0"],
        ["8", "2", "0.805 +- 0.007071", "0.25 +- 0"],
    ]


def test_the_row_is_that_of_the_best_epoch_when_a_metric_is_monitored(
    run: Run, fits: list[dict[str, str]]
) -> None:
    Path("a.yaml").write_text(CONFIG + "monitor: val_top1\n")
    assert run("a.yaml", "--over", "adapter.rank=4").code == 0
    assert [(row["epoch"], row["val_top1"]) for row in _table()] == [("1", "1.4")]


def test_the_same_command_fits_nothing_twice(run: Run, fits: list[dict[str, str]]) -> None:
    assert run("a.yaml", *OVER).code == 0
    table = Path("sweeps/a/sweep.csv").read_bytes()
    assert "4 points, 4 of them finished before" in run("a.yaml", *OVER).out
    assert len(fits) == 4
    Path("sweeps/a/points/001-rank=4-seed_everything=1.json").unlink()
    assert run("a.yaml", *OVER).code == 0
    assert fits[4:] == [fits[1]]
    assert Path("sweeps/a/sweep.csv").read_bytes().count(b"\n") == table.count(b"\n")


def test_a_point_that_fails_is_one_line_and_the_others_go_on(
    run: Run, fits: list[dict[str, str]]
) -> None:
    ran = run("a.yaml", "--over", "adapter.rank=16,4")
    assert ran.code == 1
    assert "1 of 2: model.adapter.rank=16: FAILED: LoRA: rank 16 does not fit\n" in ran.out
    assert "1 of 2 points failed" in ran.out
    assert [row["error"] for row in _table()] == ["LoRA: rank 16 does not fit", ""]
    assert run("a.yaml", "--over", "adapter.rank=16,4").code == 1
    assert [values["model.adapter.rank"] for values in fits] == ["16", "4", "16"]


def test_a_sweep_of_which_every_point_failed_has_a_table_and_no_picture(
    run: Run, fits: list[dict[str, str]]
) -> None:
    assert run("a.yaml", "--over", "adapter.rank=16").code == 1
    assert not Path("sweeps/a/sweep.png").exists()


def test_an_interrupt_leaves_the_whole_records_only(
    run: Run, fits: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep_point._exit_code

    def stopped(job: Job) -> int:
        if "rank=8" in job.folder.name:
            job.folder.mkdir()
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(sweep_point, "_exit_code", stopped)
    assert run("a.yaml", "--over", "adapter.rank=4,8").code == 130
    assert [file.name for file in Path("sweeps/a/points").glob("*.json")] == ["000-rank=4.json"]
    monkeypatch.setattr(sweep_point, "_exit_code", whole)
    assert run("a.yaml", "--over", "adapter.rank=4,8").code == 0
    assert [values["model.adapter.rank"] for values in fits] == ["4", "8"]


def test_without_ray_one_fit_follows_another(
    run: Run, fits: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "ray" else found(name, *of)
    )
    ran = run("a.yaml", *OVER, "--workers", "2")
    assert ran.code == 0
    assert ran.out.startswith("Ray is not installed (pip install 'polyadapt[sweep]'): one fit")
    assert len(fits) == 4


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("adapter.rank=4", "model.adapter.rank"),
        ("model.adapter.init_args.rank=4", "model.adapter.rank"),
    ],
)
def test_a_key_may_be_short_or_whole(
    run: Run, fits: list[dict[str, str]], said: str, key: str
) -> None:
    assert run("a.yaml", "--over", said).code == 0
    assert fits == [{key: "4"}]


# What is refused


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--over", "adapter.rank="], "--over adapter.rank= is not allowed: KEY=V1,V2,..."),
        (["--over", "adapter.rank=4,"], "without an empty value"),
        (["--over", "adapter.rank"], "--over adapter.rank is not allowed: KEY=V1,V2,..."),
        (["--over", "adapter.rank=4,4"], "--over adapter.rank=4,4: a value twice"),
        (
            ["--over", "adapter.rank=4", "--over", "model.adapter.init_args.rank=8"],
            "model.adapter.rank twice",
        ),
        (["--over", "run=x"], "--over run is not allowed: every point has a folder of its own"),
        (["--over", "lr=1", "--over", "lrr=1"], "unknown key 'model.lrr'; nearest: model.lr"),
        ([*OVER, "--workers", "0"], "--workers 0 is not allowed: 1 or more"),
        ([*OVER, "--workers", "two"], "argument --workers: invalid int value: 'two'"),
        ([*OVER, "--domain", "visoin"], "unknown domain 'visoin'; did you mean vision?"),
        ([*OVER, "--out", "full"], "full is there and holds no sweep: choose another --out"),
        ([], "the following arguments are required: --over"),
    ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(
    words: list[str], line: str, run: Run, fits: list[dict[str, str]]
) -> None:
    Path("full").mkdir()
    Path("full/mine").touch()
    assert line in run("a.yaml", *words).line()
    assert not Path("sweeps").exists()
    assert fits == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("gone.yaml", None, "cannot read gone.yaml: No such file"),
        ("b.yaml", "a: [", "b.yaml is no YAML: "),
        ("b.yaml", "just words", "b.yaml holds no keys with values"),
        ("b.yaml", "model: {a: 1}\ndata: {a: 2}", "--over a: which one? model.a or data.a"),
    ],
)
def test_a_configuration_that_cannot_be_swept_is_one_line(
    name: str, text: str | None, line: str, run: Run, fits: list[dict[str, str]]
) -> None:
    if text is not None:
        Path(name).write_text(text)
    assert line in run(name, "--over", "a=1").line()


def test_the_folder_of_another_sweep_is_left_alone(run: Run, fits: list[dict[str, str]]) -> None:
    assert run("a.yaml", "--over", "adapter.rank=4").code == 0
    line = run("a.yaml", "--over", "adapter.rank=8").line()
    assert "sweeps/a holds a sweep with over={'model.adapter.rank': ['4']}: choose" in line
    Path("a.yaml").write_text(CONFIG.replace("lr: 0.1", "lr: 0.2"))
    line = run("a.yaml", "--over", "adapter.rank=4").line()
    assert "sweeps/a holds a sweep with another configuration: choose another --out" in line
    Path("sweeps/a/sweep.json").write_text("{")
    assert "sweep.json is damaged" in run("a.yaml", "--over", "adapter.rank=4").line()
    assert len(fits) == 1


def test_a_metric_that_was_not_logged_is_refused_and_the_fits_are_kept(
    run: Run, fits: list[dict[str, str]]
) -> None:
    assert cli.main(["sweep", "a.yaml", "--over", "adapter.rank=4", "--metric", "top1"]) == 2
    assert run("a.yaml", "--over", "adapter.rank=4", "--metric", "val_top1").code == 0
    assert len(fits) == 1


# Real fits


@pytest.mark.slow
def test_ray_fits_what_is_fitted_one_after_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as each of two workers gets
    save_labelled()
    write("b.yaml", configuration(model__at="blocks.0.attn.qkv"))
    over = ["--over", "adapter.rank=2,0,3", "--over", "trainer.max_epochs=1"]
    side_by_side = run("b.yaml", *over, "--domain", "vision", "--workers", "2", "--out", "ray")
    assert side_by_side.code == 1
    assert "model.adapter.rank=0, trainer.max_epochs=1: FAILED: LoRA: rank 0 is not allowed" in (
        side_by_side.out
    )
    words = ["vision", "fit", "--config", "b.yaml", "--run", "alone", "--trainer.max_epochs=1"]
    assert cli.main([*words, "--model.adapter.init_args.rank=3"]) == 0
    point = Path("ray/points/002-rank=3-max_epochs=1")
    assert (point / "adapter.safetensors").read_bytes() == (
        Path("alone/adapter.safetensors").read_bytes()
    )
    record = json.loads(point.with_name(f"{point.name}.json").read_text())
    assert record["values"] == {"model.adapter.rank": "3", "trainer.max_epochs": "1"}
    assert record["row"]["epoch"] == 1


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_fit_behind() -> None:
    save_labelled()
    write("b.yaml", configuration(trainer__max_epochs=100_000))
    words = ["sweep", "b.yaml", "--domain", "vision", "--over", "adapter.rank=2", "--out", "killed"]
    process = subprocess.Popen([sys.executable, "-c", CODE, *words], stdout=subprocess.PIPE)
    metrics = Path("killed/points/000-rank=2/metrics.csv")
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # an epoch takes a tenth of that
    before = metrics.read_bytes()
    time.sleep(2)
    assert metrics.read_bytes() == before
    assert not list(Path("killed/points").glob("*.json"))
