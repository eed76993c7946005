"""Exported models answer as the adapter file's own, and say what they cost."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError
from polyadapt.core.cli import main
from polyadapt.tests.timeseries_sets import (
    BARE,
    FORECAST,
    HORIZON,
    LOOK_BACK,
    NAMES,
    SCALER,
    TINY,
    saved_set,
)
from polyadapt.timeseries import export
from polyadapt.timeseries.aim import Aim
from polyadapt.timeseries.aims import Classify, Forecast, Impute, Reconstruct
from polyadapt.timeseries.deployed import Deployed
from polyadapt.timeseries.description import describe, load_set
from polyadapt.timeseries.edge import Cost, measure
from polyadapt.timeseries.export import exported, fold
from polyadapt.timeseries.task import SeriesTask

AIMS: dict[str, Aim] = {
    "forecast": FORECAST,
    "quantiles": Forecast(horizon=HORIZON, loss="quantile"),
    "impute": Impute(),
    "reconstruct": Reconstruct(),
    "classify": Classify(classes=("calm", "storm"), channels=2),
}


def _rows(batch: int) -> Tensor:
    noise = torch.randn(batch, LOOK_BACK, 2, generator=torch.Generator().manual_seed(9))
    return noise * torch.tensor(SCALER.std) + torch.tensor(SCALER.mean)


@torch.no_grad()
def _by_hand(file: Path, rows: Tensor) -> Tensor:
    """The forecast of the set's own task, unmerged, scaled here."""
    mean, std = torch.tensor(SCALER.mean), torch.tensor(SCALER.std)
    task = SeriesTask.from_file(file).eval()
    answer: Tensor = task((rows - mean) / std) * std + mean
    return answer


@pytest.mark.slow
def test_a_program_of_torch_gives_the_forecasts_of_the_unmerged_set(tmp_path: Path) -> None:
    file = saved_set(tmp_path / "set.safetensors", backbone=TINY)
    content, far = exported(file, ".pt2")
    program = torch.export.load(io.BytesIO(content)).module()
    for batch in (1, 5):
        rows = _rows(batch)
        with torch.no_grad():
            torch.testing.assert_close(program(rows), _by_hand(file, rows), rtol=1e-5, atol=1e-5)
    assert 0 < far <= 1e-5


@pytest.mark.slow
def test_an_onnx_file_gives_the_forecasts_of_the_unmerged_set(tmp_path: Path) -> None:
    file = saved_set(tmp_path / "set.safetensors", backbone=TINY)
    content, _ = exported(file, ".onnx")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape[1:], given.name) == ("rows", [LOOK_BACK, 2], "answer")
    for batch in (1, 5):
        rows = _rows(batch)
        found = torch.from_numpy(session.run(None, {"rows": rows.numpy()})[0])
        torch.testing.assert_close(found, _by_hand(file, rows), rtol=1e-5, atol=1e-5)
    (said,) = onnx.load_model_from_string(content).metadata_props
    assert json.loads(said.value)["names"] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aim", "kind"),
    [
        ("quantiles", ".onnx"),  # sorts
        ("impute", ".onnx"),  # looks for NaN
        ("impute", ".pt2"),
        ("reconstruct", ".pt2"),
        ("classify", ".pt2"),
    ],
)
def test_every_aim_can_be_exported(aim: str, kind: str, tmp_path: Path) -> None:
    file = saved_set(tmp_path / "set.safetensors", aim=AIMS[aim])
    _, far = exported(file, kind)
    assert far <= 1e-5


def test_what_is_exported_answers_in_the_units_of_the_table(tmp_path: Path) -> None:
    rows = _rows(3)
    answers = {}
    for name, aim in AIMS.items():
        about = describe(saved_set(tmp_path / name, aim=aim))
        network = about.network().eval()
        load_set(network, tmp_path / name)
        with torch.no_grad():
            answers[name] = Deployed(about, network)(rows)
    assert {name: [*answer.shape] for name, answer in answers.items()} == {
        "forecast": [3, HORIZON, 2],
        "quantiles": [3, HORIZON, 2, 3],
        "impute": [3, LOOK_BACK, 2],
        "reconstruct": [3, LOOK_BACK],
        "classify": [3, 2],
    }
    torch.testing.assert_close(answers["forecast"], _by_hand(tmp_path / "forecast", rows))
    torch.testing.assert_close(answers["impute"], rows)  # there was no gap
    torch.testing.assert_close(answers["classify"].sum(-1), torch.ones(3))


def test_a_gap_is_filled_and_the_other_rows_stay(tmp_path: Path) -> None:
    about = describe(saved_set(tmp_path / "set", aim=Impute()))
    network = about.network().eval()
    load_set(network, tmp_path / "set")
    rows = _rows(1)
    gap = rows.clone()
    gap[0, 7, 1] = torch.nan
    with torch.no_grad():
        found = Deployed(about, network)(gap)
    assert found.isfinite().all()
    changed = (found != rows).nonzero().tolist()
    assert changed == [[0, 7, 1]]


def test_folding_leaves_a_plain_network_with_the_answers_of_the_set(tmp_path: Path) -> None:
    file = saved_set(tmp_path / "set.safetensors", backbone=TINY)
    network = describe(file).network().eval()
    names = set(network.state_dict())
    rows = torch.randn(2, LOOK_BACK, 1, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = network(rows)
        adapters = load_set(network, file)
        wanted = network(rows)
        fold(adapters, network)
        torch.testing.assert_close(network(rows), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.01
    assert set(network.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_command_prints_size_latency_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        export, "measure", lambda file, window: Cost([0.002, 0.003, 0.004], 1, 1, 50.0, 62.0)
    )
    file, out = saved_set(tmp_path / "set.safetensors"), tmp_path / "model.pt2"
    assert main(["timeseries", "export", "--set", str(file), "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{out}: {out.stat().st_size:,} bytes; the set {file.stat().st_size:,}"
    assert told[1].endswith("1e-05 is allowed")
    assert told[2].startswith("one window of 48 rows, 2 columns: median 3 ms, middle half 2 to 4")
    assert told[3] == "at most 62.0 MiB of memory, 50.0 MiB of it before the model is loaded"


@pytest.mark.slow
def test_the_cost_is_measured_in_a_process_of_one_thread_on_one_core(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    content, _ = exported(saved_set(tmp_path / "set.safetensors"), ".onnx")
    file.write_bytes(content)
    cost = measure(file, (LOOK_BACK, 2))
    assert (cost.threads, cost.cores) == (1, 1)
    assert len(cost.seconds) >= 3
    assert cost.before is not None
    assert cost.peak is not None
    assert 0 < cost.before < cost.peak


def test_a_file_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(AdaptError, match=r"model.onnx could not be measured: its process says \S+"):
        measure(file, (LOOK_BACK, 2))


def test_a_system_that_tells_no_memory_is_said_so() -> None:
    told = str(Cost([0.002, 0.003, 0.004], 1, 4, None, None))
    assert told.endswith("(3 calls, 1 thread, 4 cores)\nmemory: this system does not tell")


def test_a_model_that_differs_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: nn.Module, rows: Tensor, said: str) -> bytes:
        assert isinstance(model, Deployed)
        model.network.out_layer.bias.data.add_(
            1e-3
        )  # std and mean would not show: windows are normalised
        return export._program(model, rows, said)

    monkeypatch.setitem(export.WRITERS, ".pt2", spoilt)
    file, out = saved_set(tmp_path / "set.safetensors"), tmp_path / "model.pt2"
    assert main(["timeseries", "export", "--set", str(file), "--out", str(out)]) == 2
    assert "is not exported: as .pt2 it is 0.0" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [file]
    _, far = exported(file, ".pt2", tolerance=1e-2)  # it can be allowed
    assert 1e-5 < far < 1e-2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "nowhere/model.pt2"], "the folder nowhere does not exist"),
        (["--out", "model.pt2", "--tolerance", "0"], "--tolerance 0 is not allowed: above 0"),
    ],
    ids=["folder", "tolerance"],
)
def test_what_cannot_be_written_is_told_before_anything_is_computed(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeseries", "export", "--set", "none", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "model.pt", "model.ONNX"])
def test_another_ending_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["timeseries", "export", "--set", "none", "--out", str(tmp_path / name)]
    assert main(words) == 2
    assert "a name that ends with .pt2 or .onnx" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    file = saved_set(tmp_path / "set.safetensors", backbone=BARE)
    with pytest.raises(AdaptError, match=r"'onnxscript': pip install 'polyadapt\[export\]'"):
        exported(file, ".onnx")


def test_a_single_channel_and_no_scaling_are_fine(tmp_path: Path) -> None:
    about = describe(saved_set(tmp_path / "set", names=None, scaler=None))
    model = Deployed(about, about.network().eval())
    assert model.window == (LOOK_BACK, 1)
    found = model(torch.from_numpy(np.ones((2, LOOK_BACK, 1), np.float32)))
    assert found.shape == (2, HORIZON, 1)
