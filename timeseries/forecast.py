"""`polyadapt timeseries forecast`: the rows after a table's last, by a set or by fitting one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.cli import OneLineParser
from ..core.container import require_place, write_atomically
from ..core.errors import AdaptError
from .backbone_words import HELP, backbone_called
from .forecaster import Forecaster, device
from .outlook import Outlook, as_csv
from .own_fit import Plan, described, fit_table
from .pictures import forecast_picture, panels_of
from .series import Series
from .table_words import Tables, add_table_arguments, tables_of

_OF_A_PLAN = ("look_back", "epochs", "windows", "seed")
_OF_A_FIT = (*_OF_A_PLAN, "backbone", "blocks", "save")


def main(argv: list[str]) -> int:
    """Forecast a table; the forecast goes to stdout or --out, all talk to stderr."""
    asked = _parser().parse_args(argv)
    _check(asked)
    known = Forecaster.from_file(asked.set, device()) if asked.set else None
    tables = tables_of(asked, known)
    forecaster = known or _fitted(asked, tables.whole["table"])
    found = {name: forecaster.forecast(s, asked.horizon) for name, s in tables.whole.items()}
    text = as_csv(tables.apart(found), asked.time or "row", asked.id)
    if asked.picture:
        write_atomically(asked.picture, _picture(tables, found, asked.table.stem))
        _say(f"picture: {asked.picture}")
    if asked.out is None:
        print(text, end="")
    else:
        write_atomically(asked.out, text.encode())
        _say(f"forecast: {asked.out}")
    return 0


def _fitted(asked: argparse.Namespace, series: Series) -> Forecaster:
    """Fit to the table, and say what that is worth."""
    backbone = backbone_called(asked.backbone or "minilm", asked.blocks, usual=3)
    plan = Plan(backbone=backbone, horizon=asked.horizon, **_given(asked, _OF_A_PLAN))
    _say(f"fitting {described(plan)}")
    fit = fit_table(series, plan)
    _say(f"fitted in {fit.seconds:.0f} s\n{fit.report()}")
    for measure, names in fit.better.items():
        needs = "needs" if len(names) == 1 else "need"
        _say(f"note: by {measure}, {' and '.join(names)} did no worse there, and {needs} no model")
    if asked.save is not None:
        fit.task.save_adapter(asked.save)
        _say(f"adapter file: {asked.save}")
    return Forecaster(fit.task.about, fit.task.network, "the fitted set")


def _given(asked: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}


def _check(asked: argparse.Namespace) -> None:
    """Before anything is read: a fit takes a minute, and must not be for nothing."""
    if asked.set is None and asked.horizon is None:
        raise AdaptError("--horizon STEPS is needed: how many rows to forecast")
    if asked.horizon is not None and asked.horizon < 1:
        raise AdaptError(f"--horizon {asked.horizon} is not allowed: from 1")
    if asked.set is not None and (idle := _given(asked, _OF_A_FIT)):
        raise AdaptError(f"--{next(iter(idle)).replace('_', '-')} is of a fit: with --set none is")
    for place in (asked.out, asked.picture, asked.save):
        if place is not None:
            require_place(place)


def _picture(tables: Tables, found: Mapping[str, Outlook], title: str) -> bytes:
    panels = [
        replace(panel, name=f"{name}: {panel.name}" if len(found) > 1 else panel.name)
        for name, outlook in found.items()
        for panel in panels_of(tables.whole[name], outlook)
    ]
    ahead = len(next(iter(found.values())).values)
    return forecast_picture(panels, f"{title}, {ahead} rows ahead")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt timeseries forecast",
        description="Forecast the rows after a table's last one: with an adapter file, or with a"
        " small model that is fitted to the first 70 % of the table and measured on the last 20 %"
        " beside the last value and the season before.",
    )
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="CSV or Parquet, a column for each series")
    add("--horizon", type=int, metavar="STEPS", help="rows to forecast; with --set, up to its own")
    add("--set", type=Path, metavar="FILE", help="an adapter file; nothing is fitted")
    add("--out", type=Path, metavar="FILE", help="the forecast as CSV; default: to stdout")
    add("--picture", type=Path, metavar="PNG", help="the past, the forecast and its intervals")
    table = parser.add_argument_group("how the table is read")
    add_table_arguments(table.add_argument)
    fit = parser.add_argument_group("what is fitted without --set")
    add = fit.add_argument
    add("--backbone", metavar="WORD", help=f"{HELP}; default: minilm")
    add("--blocks", type=int, metavar="N", help="of the language model; default: 3")
    add("--look-back", type=int, metavar="L", help="rows; default: a third of those trained on")
    add("--epochs", type=int, metavar="N", help="default: 5")
    add("--windows", type=int, metavar="N", help="trained on in an epoch; default: 1024")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--save", type=Path, metavar="FILE", help="keep what was fitted, for --set")
    return parser
