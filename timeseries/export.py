"""`polyadapt timeseries export`: the merged model as one file for torch.export or ONNX."""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.cli import OneLineParser
from ..core.container import require_place, write_atomically
from ..core.errors import AdaptError
from ..core.sets import AdapterSet
from .aims import Forecast, Impute
from .deployed import Deployed, channels_of
from .description import Description, describe, load_set
from .edge import measure, opener
from .network import Network

TOLERANCE = 1e-5
_MOST = 1 << 16  # windows in a batch of the exported model


def fold(adapters: AdapterSet, network: Network) -> None:
    """Merge a set for good: the network's own weights hold it, and the set is gone."""
    adapters.merge()
    merged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapters.detach()
    network.load_state_dict({name: merged[name] for name in network.state_dict()})
    network.requires_grad_(False)


def exported(file: str | Path, kind: str, tolerance: float = TOLERANCE) -> tuple[bytes, float]:
    """(the merged model of an adapter file as .pt2 or .onnx, how far it is from the unmerged one).

    The bytes are read back and asked for other windows, in a batch of another size, than they were
    made with; the distance is a share of |value| + standard deviation of its column. Raises
    `StoreError` for a file that holds no time series model, and `AdaptError` above `tolerance`.
    """
    about = describe(file)
    network = about.network().eval()
    adapters = load_set(network, file)
    model = Deployed(about, network).eval()
    asked = model.examples(3, seed=1)
    with torch.no_grad():
        wanted = model(asked)
        fold(adapters, network)
        content = WRITERS[kind](model, model.examples(2, seed=0), _said(about))
    found = torch.from_numpy(opener(kind)(content)(asked.numpy()))
    far = _distance(found, wanted, model)
    if not far <= tolerance:  # also if it is no number
        raise AdaptError(
            f"{file} is not exported: as {kind} it is {far:.2g} from the set's own answers,"
            f" {tolerance:g} is allowed (--tolerance)"
        )
    return content, far


def _distance(found: Tensor, wanted: Tensor, model: Deployed) -> float:
    scale = torch.ones(())
    if isinstance(model.aim, Forecast | Impute):
        scale = model.std.view((-1,) + (1,) * (wanted.ndim - 3))
    return float(((found - wanted).abs() / (wanted.abs() + scale)).max())


def _program(model: nn.Module, rows: Tensor, said: str) -> bytes:
    """For `torch.export.load`, which needs torch and nothing of ours."""
    made = torch.export.export(model, (rows,), dynamic_shapes=_any_batch())
    file = io.BytesIO()
    torch.export.save(made, file, extra_files={"polyadapt.json": said})
    return file.getvalue()


def _onnx(model: nn.Module, rows: Tensor, said: str) -> bytes:
    """For any ONNX runtime: input `rows`, output `answer`."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # what is written is tried
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ModuleNotFoundError as error:
        raise AdaptError(
            f"ONNX needs the package {error.name!r}: pip install 'polyadapt[export]'"
        ) from error
    with _quiet():
        made = torch.onnx.export(
            model,
            (rows,),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["rows"],
            output_names=["answer"],
            verbose=False,
        )
    assert made is not None, "the exporter of programs returns one"
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {"polyadapt": said})
    content: bytes = proto.SerializeToString()
    return content


WRITERS: dict[str, Callable[[nn.Module, Tensor, str], bytes]] = {".pt2": _program, ".onnx": _onnx}


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=_MOST)},)


def _said(about: Description) -> str:
    """What who runs the model has to know, as JSON."""
    return json.dumps(
        {key: about.to_json()[key] for key in ("look_back", "aim", "names", "frequency")}
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on constants that it could not fold."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def main(argv: list[str]) -> int:
    """Write the file, then print its size, its speed on one core and its memory."""
    asked = _parser().parse_args(argv)
    kind = asked.out.suffix
    if kind not in WRITERS:
        raise AdaptError(f"--out {asked.out} is not allowed: a name that ends with .pt2 or .onnx")
    require_place(asked.out)
    if not asked.tolerance > 0:
        raise AdaptError(f"--tolerance {asked.tolerance:g} is not allowed: above 0")
    about = describe(asked.set)
    content, far = exported(asked.set, kind, asked.tolerance)
    write_atomically(asked.out, content)
    print(f"{asked.out}: {len(content):,} bytes; the set {asked.set.stat().st_size:,}")
    print(f"differs from the unmerged model by {far:.1e} at most, {asked.tolerance:g} is allowed")
    window = about.look_back, channels_of(about)
    cost = measure(asked.out, window)
    print(f"one window of {window[0]} rows, {window[1]} column{'s' * (window[1] != 1)}: {cost}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt timeseries export",
        description="Write the merged model of an adapter file, checked against the unmerged one,"
        " and print size, latency on one core and memory of a process that only runs it.",
        epilog="It takes rows [batch, look-back, columns] in the table's units. ONNX needs"
        " pip install 'polyadapt[export]'.",
    )
    parser.add_argument("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    form = "model.pt2 for torch.export.load, model.onnx for an ONNX runtime"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=form)
    about = "how far from the unmerged model; default: 1e-05 of value and standard deviation"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="X", help=about)
    return parser
