"""`polyadapt timeseries ...` as a person uses it: fit, validate, test, sites, what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from polyadapt.core import AdaptError
from polyadapt.core.store import read_file
from polyadapt.tests.command_cases import Ran, Run, command, rows_of, trained_in, write
from polyadapt.tests.series_cases import SIZES
from polyadapt.timeseries.configuration import Measured
from polyadapt.timeseries.task import SeriesTask

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "timeseries").glob("*.yaml"))
SET = "runs/a/adapter.safetensors"

pytestmark = pytest.mark.in_an_empty_folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys, "timeseries")


def line(ran: Ran) -> str:
    return ran.line().removeprefix("polyadapt: ")


def configuration(**changes: Any) -> dict[str, Any]:
    return {
        "monitor": "val_mse",
        "monitor_mode": "min",
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "backbone": {
                "class_path": "GPT2",
                "init_args": {"pretrained": False, "blocks": 1, "options": SIZES},
            },
            "adapter": {
                "class_path": "LoRA",
                "init_args": {"rank": 4, "alpha": 16, "scaling": "rank_stabilised"},
            },
            "aim": {"class_path": "Forecast", "init_args": {"horizon": 6}},
            "look_back": 24,
            "patches": {"length": 8, "stride": 4},
            "lr": 0.01,
            **changes.pop("model", {}),
        },
        "data": {
            "class_path": "TableData",
            "init_args": {"path": "table.csv", "time": "date", "batch_size": 32},
        },
        **changes,
    }


def save_table() -> None:
    """300 hours of two channels."""
    with Path("table.csv").open("w") as file:
        file.write("date,load,price\n")
        for hour in range(300):
            day, of_day = 1 + hour // 24, hour % 24
            load, price = 50 + 10 * math.sin(hour / 4), 3 + math.cos(hour / 4)
            file.write(f"2024-01-{day:02} {of_day:02}:00,{load:.4f},{price:.4f}\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return trained_in(folder, "timeseries fit", configuration(), save_table)


@pytest.mark.usefixtures("after_training")
def test_a_run_leaves_metrics_and_a_file_that_says_everything() -> None:
    rows = rows_of("runs/a/metrics.csv")
    assert {"train_loss", "val_loss", "val_mse", "val_mae"} < set(rows[0])
    assert float(rows[1]["val_mse"]) < float(rows[0]["val_mse"])
    extra = read_file(SET).extra
    assert extra["task"] == "time series"
    assert extra["names"] == ["load", "price"]
    assert (extra["frequency"], extra["period"]) == ("h", 24)
    assert extra["aim"] == {
        "aim": "Forecast",
        "horizon": 6,
        "loss": "mse",
        "levels": [0.1, 0.5, 0.9],
    }
    assert extra["patches"] == {"length": 8, "stride": 4}
    adapters = 4 * 4 * (64 + 16 + 6 * 16 + 6)
    assert extra["bytes"] == {
        "adapters": adapters,
        "with_frozen_layers": adapters + 4 * (16 * 8 + 16 + 6 * 6 * 16 + 6),
    }


@pytest.mark.usefixtures("after_training")
def test_the_test_part_is_measured_alike_by_file_and_by_checkpoint(run: Run) -> None:
    assert run("test", "--config", "runs/a/config.yaml", f"--set={SET}")[0] == 0
    (row,) = rows_of("runs/a/test_metrics.csv")
    assert set(row) == {"test_loss", "test_mse", "test_mae"}
    best = "--ckpt_path=runs/a/best.ckpt"
    assert run("test", "--config", "a.yaml", best, "--run=b")[0] == 0
    assert Path("b/test_metrics.csv").read_text() == Path("runs/a/test_metrics.csv").read_text()
    assert run("validate", "--config", "a.yaml", f"--set={SET}")[0] == 0


@pytest.mark.usefixtures("after_training")
def test_a_file_is_a_task_again_with_the_datas_scaler() -> None:
    task = SeriesTask.from_file(SET).eval()
    assert task.about.scaler is not None
    assert task.about.scaler.mean[0] == pytest.approx(50, abs=1)
    assert task(torch.zeros(1, 24, 2)).shape == (1, 6, 2)


@pytest.mark.usefixtures("after_training")
def test_another_aim_fits_by_the_configuration_alone(run: Run) -> None:
    aim = {"class_path": "Impute", "init_args": {"share": 0.5}}
    write("gaps.yaml", configuration(model={"aim": aim}))
    code, out, said = run("fit", "--config", "gaps.yaml", "--trainer.max_epochs=1")
    assert (code, said) == (0, "")
    assert out.splitlines()[-1].split()[:3] == ["polyadapt", "timeseries", "predict"]
    assert read_file("runs/gaps/adapter.safetensors").extra["aim"] == {
        "aim": "Impute",
        "share": 0.5,
    }


def test_quantiles_are_asked_for_by_the_configuration(run: Run) -> None:
    save_table()
    settings = {"horizon": 4, "loss": "quantile", "levels": [0.25, 0.5, 0.75]}
    write("q.yaml", configuration(model={"aim": {"class_path": "Forecast", "init_args": settings}}))
    assert run("fit", "--config", "q.yaml", "--trainer.max_epochs=1")[0] == 0
    assert "val_coverage" in rows_of("runs/q/metrics.csv")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"look_back": 9000}}, "makes 2250 patches, the blocks have 64 positions"),
        (
            {"model": {"look_back": 205}},
            "the train part has 210 rows, and a window of",
        ),
        ({"model": {"schedule": "linear"}}, "model.schedule: 'linear' is not allowed: constant,"),
        ({"model": {"patches": {"length": 8, "stride": 9}}}, "stride=9 would leave out steps"),
        (
            {"model": {"aim": {"class_path": "Forcast"}}},
            "model.aim: 'Forcast' is none of its classes; nearest: Forecast",
        ),
        (
            {"model": {"aim": {"class_path": "Forecast", "init_args": {"horizont": 4}}}},
            "model.aim: Forecast has no setting 'horizont'; nearest: horizon",
        ),
        (
            {"data": {"class_path": "TabelData"}},
            "data: 'TabelData' is none of its classes; nearest: TableData",
        ),
        (
            {"model": {"backbone": {"class_path": "GPT3"}}},
            "model.backbone: 'GPT3' is none of its classes; nearest: GPT2",
        ),
        (
            {"model": {"adapter": {"class_path": "LoRA", "init_args": {"rank": 16}}}},
            "LoRA: rank 16 does not fit out_layer: its weight is [6, 96], so at most 6",
        ),
        ({"model": {"at": "wte"}}, "nothing in Network is called 'wte'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_configuration_that_cannot_be_is_one_line(
    run: Run, changes: dict[str, Any], message: str
) -> None:
    save_table()
    write("a.yaml", configuration(**changes))
    assert message in line(run("fit", "--config", "a.yaml"))
    assert not Path("runs/a/adapter.safetensors").exists()


@pytest.mark.usefixtures("after_training")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.aim.init_args.horizon=90"], "the val part has 54 rows"),
        (["--data.init_args.few=0.01"], "the train part has 25 rows with few=0.01"),
        (["--data.init_args.columns=[date]"], "there is no column to forecast"),
    ],
    ids=["horizon", "few", "columns"],
)
def test_data_that_do_not_fit_leave_the_old_run_as_it_was(
    run: Run, words: list[str], message: str
) -> None:
    before = {path: path.read_bytes() for path in Path("runs/a").iterdir()}
    assert message in line(run("fit", "--config", "a.yaml", "--overwrite", "true", *words))
    assert {path: path.read_bytes() for path in Path("runs/a").iterdir()} == before
    assert message in line(run("fit", "--config", "a.yaml", "--run", "runs/new", *words))
    assert not Path("runs/new").exists()


@pytest.mark.usefixtures("after_training")
def test_a_test_is_of_one_process(run: Run) -> None:
    task, trainer = SeriesTask.from_file(SET), SimpleNamespace(world_size=2)
    with pytest.raises(AdaptError, match=r"test with --trainer\.devices 1, not with 2"):
        Measured(Path("runs/a")).on_test_start(cast(Any, trainer), task)


@pytest.mark.usefixtures("after_training")
def test_anomalies_without_labels_can_be_learned_but_not_tested(run: Run) -> None:
    write("odd.yaml", configuration(model={"aim": {"class_path": "Reconstruct"}}))
    assert run("fit", "--config", "odd.yaml", "--trainer.max_epochs=1")[0] == 0
    adapter = "runs/odd/adapter.safetensors"
    said = line(run("test", "--config", "odd.yaml", "--set", adapter))
    assert said.startswith("a test for anomalies needs labels [b, L] beside the windows")
    assert run("predict", "table.csv", "--set", adapter, "--time", "date")[0] == 0


@pytest.mark.usefixtures("after_training")
def test_another_backbone_or_aim_than_the_files_is_refused(run: Run) -> None:
    write("b.yaml", configuration(model={"backbone": {"class_path": "NoLanguageModel"}}))
    assert "was made on GPT2" in line(run("test", "--config", "b.yaml", f"--set={SET}"))
    write("b.yaml", configuration(model={"aim": {"class_path": "Impute"}}))
    said = line(run("validate", "--config", "b.yaml", f"--set={SET}"))
    assert said == f"{SET} was trained to Forecast, the configuration says Impute"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_whole_and_its_model_can_be_built(path: Path) -> None:
    from polyadapt.core.configuration import DomainCLI
    from polyadapt.core.fitting import calm
    from polyadapt.timeseries.configuration import DOMAIN

    words = ["--config", str(path), "--model.backbone=NoLanguageModel"]
    unread = dataclasses.replace(DOMAIN, check=lambda *_: None)
    with calm():
        built = DomainCLI(unread, "fit", words)
    task = built.model
    network, rank = task.network, task.adapters.recipe.rank
    last = task.adapters.recipe.ranks.get("out_layer", rank)
    outputs, flat = network.out_layer.weight.shape
    assert task.adapters.trainable_count() == rank * (1024 + 768) + last * (outputs + flat)
    assert task.weight_decay == 0


def test_there_are_configurations() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"one_for_all_code", "one_for_all_paper", "offline_etth1"} <= names


@pytest.mark.parametrize("name", ["code", "paper"])
def test_a_named_recipe_and_its_configuration_are_the_same(name: str) -> None:
    from polyadapt.core import Recipe
    from polyadapt.timeseries.adapters import PUBLISHED

    published = PUBLISHED[name]()
    (path,) = (path for path in CONFIGS if path.stem == f"one_for_all_{name}")
    model = yaml.safe_load(path.read_text())["model"]
    recipe = model["adapter"]["init_args"]
    made = type(published.recipe)(**recipe)
    assert isinstance(made, Recipe)
    assert made == published.recipe
    assert model["patches"] == published.patches.to_json()
    settings = published.training
    said = {key: model.get(key, settings[key]) for key in settings if key != "patches"}
    assert said == {key: value for key, value in settings.items() if key != "patches"}


def test_sites_shows_the_methods_two_and_those_that_are_asked_for(run: Run) -> None:
    code, out, _ = run("sites", "none", "--horizon", "24", "--stride", "16")
    assert code == 0
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [
        ["blocks.positions", "768x1024"],
        ["out_layer", "24x16896"],
    ]
    assert "in_layer" in run("sites", "attention", "in_layer", "blocks.qkv")[1]
    assert "nearest: in_layer" in line(run("sites", "none", "in_layr"))
