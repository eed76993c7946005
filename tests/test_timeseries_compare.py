"""`polyadapt timeseries compare`, and the protocol that all its methods share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from polyadapt.core.errors import AdaptError
from polyadapt.core.records import RECORD
from polyadapt.tests.command_cases import rows_of
from polyadapt.timeseries import compare as command
from polyadapt.timeseries import protocol
from polyadapt.timeseries.backbones import GPT2, NoLanguageModel
from polyadapt.timeseries.baselines import DLinear, LastValue
from polyadapt.timeseries.compare_report import picture, table
from polyadapt.timeseries.compare_run import Record, Run
from polyadapt.timeseries.data import TableData
from polyadapt.timeseries.methods import METHODS
from polyadapt.timeseries.peers import ONE_FOR_ALL, PEERS
from polyadapt.timeseries.protocol import Candidate, Protocol, fit, measure

WORDS = ["--data", "load.csv", "--time", "date", "--out", "out", "--look-back", "32"]
WORDS += ["--horizons", "4", "--seeds", "0", "--epochs", "1", "--batch-size", "64", "--rank", "2"]
TINY = GPT2(
    blocks=1,
    pretrained=False,
    options={"n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 1},
)


BACKBONES = {"minilm": TINY, "none": NoLanguageModel(width=8, positions=16)}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "backbone_called", lambda word, blocks: BACKBONES[word])
    hours = np.arange(400)
    noise = np.random.default_rng(0).normal(scale=0.1, size=(400, 2))
    wave = np.sin(2 * np.pi * hours / 24)
    times = pd.date_range("2024-01-01", periods=400, freq="h")
    values = {"a": wave + noise[:, 0], "b": 3 * wave + noise[:, 1]}
    pd.DataFrame({"date": times, **values}).to_csv("load.csv", index=False)


def compare(*words: str) -> None:
    assert command.main([*WORDS, *words]) == 0


def outcomes() -> list[dict[str, str]]:
    return rows_of("out/outcomes.csv")


def data(**changes: Any) -> TableData:
    made = TableData("load.csv", "date", **{"batch_size": 64, "every": 2} | changes)
    made.look_back, made.horizon = 32, 4
    made.setup()
    return made


def record(method: str, horizon: int, seed: int, mse: float, **changes: Any) -> Record:
    made: dict[str, Any] = {
        "method": method,
        "horizon": horizon,
        "seed": seed,
        "look_back": 336,
        "data": "ETTh1",
        "backbone": "",
        "mse": mse,
        "mae": mse / 2,
        "val_mse": None,
        "windows": 19495,
        "train_windows": 8192,
        "trainable": 1500,
        "stored_bytes": 6000,
        "whole_bytes": 9000,
        "lr": 1e-3,
        "epochs": 1,
        "best_epoch": 1,
        "steps": 32,
        "fit_seconds": 3.0,
        "test_seconds": 1.0,
        "settings": "",
    }
    return Record(**made | changes)


# The command


def test_all_methods_run_in_one_protocol_and_are_not_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare()
    rows = {row["method"]: row for row in outcomes()}
    assert list(rows) == list(METHODS)
    windows = 2 * (80 - 4 + 1)  # 400 rows cut 280, 40, 80
    assert {row["windows"] for row in rows.values()} == {str(windows)}
    learned = {name: row for name, row in rows.items() if METHODS[name].learns}
    assert {row["train_windows"] for row in learned.values()} == {str(2 * (280 - 32 - 4 + 1))}
    assert {row["steps"] for row in learned.values()} == {"8"}
    assert rows["last-value"]["trainable"] == "0"
    assert rows["seasonal-naive"]["mse"] < rows["last-value"]["mse"]
    assert {row["backbone"] for row in rows.values()} == {"", "gpt2, 1 blocks"}
    one, bare = rows["one-for-all"], rows["no-language-model"]
    assert one["trainable"] == bare["trainable"]
    assert int(one["stored_bytes"]) == 4 * int(one["trainable"]) < int(one["whole_bytes"])
    assert Path("out/comparison.png").read_bytes()[1:4] == b"PNG"
    assert Path("out/table.md").read_text().startswith("### 4 steps ahead, 154 test windows")
    before = Path("out/outcomes.csv").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(Run, "record", lambda run: pytest.fail(f"{run.folder} is run again"))
    compare()
    assert f"{len(METHODS)} runs, {len(METHODS)} of them finished" in capsys.readouterr().out
    assert Path("out/outcomes.csv").read_bytes() == before


def test_a_seed_says_all_of_a_run_and_another_seed_is_another_run() -> None:
    compare("--methods", "one-for-all", "--seeds", "0,1", "--windows-per-epoch", "100")
    first = [float(row["mse"]) for row in outcomes()]
    assert first[0] != first[1]
    compare("--methods", "one-for-all", "--seeds", "1", "--windows-per-epoch", "100", "--out", "2")
    again = json.loads(Path("2/one-for-all-4-seed1", RECORD).read_text())
    assert again["mse"] == pytest.approx(first[1], rel=1e-6)
    assert again["train_windows"] == 100


def test_few_training_rows_are_the_earliest_and_the_test_stays_whole() -> None:
    compare("--methods", "dlinear", "--few", "0.2")
    (row,) = outcomes()
    kept = (280 - 32) // 5  # of the rows that training could forecast
    assert row["train_windows"] == str(2 * (kept - 4 + 1))
    assert row["windows"] == "154"


def test_a_record_of_other_settings_is_refused_only_where_they_matter() -> None:
    compare("--methods", "last-value,dlinear")
    compare("--methods", "last-value,dlinear", "--rank", "3")  # of adapters that they do not have
    compare("--methods", "last-value", "--epochs", "2")
    for words in (["dlinear", "--epochs", "2"], ["dlinear:0.1"]):
        with pytest.raises(AdaptError, match="holds a run with other settings: choose another"):
            compare("--methods", *words)
    table = Path("load.csv").read_text()
    Path("load.csv").write_text(table.replace("2024-01-01 00:00:00,", "2024-01-01 00:00:00,1", 1))
    with pytest.raises(AdaptError, match="holds a run with other settings"):
        compare("--methods", "last-value")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "dlinear,dlinear:0.1"], "the method 'dlinear' is named twice"),
        (["--data", "none.csv"], "cannot read none.csv: No such file"),
        (["--horizons", "0"], "horizons=0 is not allowed"),
        (["--horizons", "4,60"], "the val part has 72 rows"),
        (["--seeds", "1,1"], "'1,1' is not a list of different whole numbers"),
        (["--epochs", "0"], "epochs=0 is not allowed"),
        (["--stride", "17", "--patch", "16"], "stride=17 would leave out steps"),
        (["--rank", "0"], "rank=0 is not allowed: a whole number from 1"),
        (["--rank", "5"], "rank 5 does not fit out_layer: its weight is .4, .*, so at most 4"),
        (["--look-back", "20"], "a past of 20 rows is shorter than a season of 24"),
        (["--backbone", "none"], "NoLanguageModel.* has no pretrained weights to do without"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_run(words: list[str], told: str) -> None:
    with pytest.raises(AdaptError, match=told) as caught:
        compare(*words)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_benchmarks_are_known_by_the_names_of_their_files() -> None:
    kinds = [command._source(path, None)[0] for path in ("a/ETTm1.csv", "weather.csv", "ETT.csv")]
    assert kinds == ["ETT", "Weather", "table, time=None"]
    assert command._source("ETTh1.csv", "date")[0] == "table, time=date"


# The protocol


class Constant(nn.Module):
    """Forecasts one learned number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))

    def forward(self, past: Tensor) -> Tensor:
        return self.value.expand(past.shape[0], 4, 1)


def test_errors_are_means_over_items_not_over_batches() -> None:
    past, right, wrong = torch.zeros(3, 2, 1), torch.zeros(3, 1, 1), torch.full((1, 1, 1), 4.0)
    found = measure(LastValue(1), [(past, right), (past[:1], wrong)])
    assert (found.mse, found.mae, found.items) == (4.0, 1.0, 4)


def test_the_best_epoch_is_kept_and_patience_ends_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constant = Constant(1.0)
    known = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    values: list[float] = []

    def scripted(model: nn.Module, batches: Any) -> protocol.Errors:
        values.append(float(constant.value.detach()))
        return protocol.Errors(next(known), 0.0, 1)

    monkeypatch.setattr(protocol, "measure", scripted)
    fitted = fit(Candidate(constant), data(), Protocol(epochs=9, patience=2), lr=0.01)
    assert (fitted.epochs, fitted.best_epoch, fitted.val.mse) == (4, 2, 1.0)
    assert fitted.steps == 4 * 8
    assert float(constant.value.detach()) == values[1]
    assert len(set(values)) == 4


def test_training_learns_and_leaves_the_model_as_it_was_measured() -> None:
    torch.manual_seed(0)
    model, windows = DLinear(32, 4), data()
    before = measure(model, windows.val_dataloader())
    fitted = fit(Candidate(model), windows, Protocol(epochs=3), lr=1e-2)
    assert fitted.val.mse < before.mse / 2
    assert measure(model, windows.val_dataloader()) == fitted.val
    assert fitted.val.items == 2 * 19  # every second of 37 windows, in both channels


def test_the_development_windows_do_not_thin_out_the_test() -> None:
    windows = data(every=5, windows_per_epoch=10)
    tested = sum(len(past) for past, _ in windows.test_dataloader())
    assert tested == len(windows.windows("test"))


def test_running_statistics_are_kept_with_what_was_trained() -> None:
    class Normed(Constant):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.norm = nn.BatchNorm1d(1)

    stored = Candidate(Normed()).stored()
    assert [t.numel() for t in stored] == [1, 1, 1, 1, 1]  # value, weight, bias, mean, variance


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(lr: float) -> None:
    with pytest.raises(AdaptError, match="lr="):
        fit(Candidate(Constant(0.0)), data(), Protocol(), lr=lr)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AdaptError, match="step 1: the loss is nan: lower the learning rate"):
        fit(Candidate(Constant(float("nan"))), data(), Protocol(), lr=1e-3)


# The report


def test_the_table_has_a_part_per_horizon_with_mean_spread_and_published_rows() -> None:
    runs = [
        record("last-value", 96, 0, 1.29, lr=0, trainable=0, fit_seconds=0.0),
        record("dlinear", 96, 0, 0.36),
        record("dlinear", 96, 1, 0.38),
        record("dlinear", 192, 0, 0.41, backbone="gpt2"),
    ]
    text = table(runs, published=True)
    assert "| last-value | 1.2900 | 0.6450 | 0 | 6,000 | 9,000 | 1 |" in text
    assert "| dlinear | 0.3700 +- 0.0141 | 0.1850 +- 0.0071 | 1,500 | 6,000 | 9,000 | 4 |" in text
    assert "| *DLinear, published* | 0.375 | 0.399 | - | - | - | - |" in text
    assert text.index("### 96 steps ahead") < text.index("### 192 steps ahead")
    assert "look-back 336, backbone gpt2; seeds 0, 1." in text
    assert "One-for-All's paper (GPT-2) has MSE 0.43" in text
    assert "published" not in table(runs).lower()
    assert picture(runs, published=True)[1:4] == b"PNG"


def test_published_means_agree_with_the_rows_behind_them() -> None:
    """GPT4TS on ETTh1 is .43 and .43 in One-for-All's table I, as means over four horizons."""
    rows = PEERS["ETTh1"]["GPT4TS"].values()
    assert [round(sum(pair[i] for pair in rows) / 4, 2) for i in (0, 1)] == [0.43, 0.43]
    assert ONE_FOR_ALL["ETTh1"] == (0.43, 0.43)
