"""`polyadapt sweep`: one configuration fitted with every combination of some values.

Every point is a fit of its own in a process of its own. What it measured is kept as a record, so
that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cli import OneLineParser, command_named, domain_commands
from .errors import AdaptError
from .sweep_point import Job, Record, recorded, run, write_record

PLAN, CONFIG, POINTS = "sweep.json", "config.yaml", "points"


@dataclass(frozen=True)
class Plan:
    """What a sweep is: the same plan goes on, another one is refused."""

    domain: str
    settings: dict[str, Any]
    over: dict[str, list[str]]


def main(argv: Sequence[str]) -> int:
    """Fit every point that is not finished, then write one table and one picture."""
    asked = _parser().parse_args(argv)
    from .sweep_report import report

    settings = _settings_of(asked.config)
    plan = Plan(_domain_of(asked), settings, _over(asked.over, settings))
    workers = _possible(asked.workers)
    out: Path = asked.out or Path("sweeps") / asked.config.stem
    if not _goes_on(out, plan):
        _refuse_bad_values(asked.config, plan)
        _start(out, plan, asked.config)
    jobs = list(_jobs(out, plan, workers))
    left = [job for job in jobs if "row" not in recorded(job)]
    print(f"{out}: {len(jobs)} points, {len(jobs) - len(left)} of them finished before", flush=True)
    for number, record in enumerate(_fitted(left, workers), start=1):
        print(f"{number} of {len(left)}: {_line(record)}", flush=True)
    records = [recorded(job) for job in jobs]
    print(report(out, list(plan.over), records, asked.metric or settings.get("monitor")))
    return 0 if all("row" in record for record in records) else 1


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt sweep",
        description="Fit CONFIG once for every combination of the values, then print a table and"
        " write it (sweep.csv) and a picture (sweep.png). The same command goes on where it was"
        " stopped: finished points are kept, failed ones are tried again.",
        epilog="example: polyadapt sweep configs/vision/tiny_vit_arrays.yaml"
        " --over adapter.rank=4,8,16 --over seed_everything=0,1 --workers 2",
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="what `polyadapt DOMAIN fit --config` takes")
    add(
        "--over",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="a key of the configuration and its values; once for every key. The section may be"
        " left out: adapter.rank is model.adapter.rank",
    )
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="fits at the same time, through Ray (pip install 'polyadapt[sweep]'); default: 1",
    )
    add("--out", type=Path, metavar="FOLDER", help="default: sweeps/<the configuration's name>")
    add("--domain", metavar="NAME", help="default: the one that a folder of CONFIG is named after")
    add("--metric", metavar="NAME", help="what is drawn; default: what is monitored, or the loss")
    return parser


# What was asked for


def _settings_of(config: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(config.read_text())
    except OSError as error:
        raise AdaptError(f"cannot read {config}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdaptError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise AdaptError(f"{config} holds no keys with values")
    return found


def _domain_of(asked: argparse.Namespace) -> str:
    domains = list(domain_commands())
    if asked.domain is not None:
        command_named(asked.domain, domain_commands(), "domain")
        return str(asked.domain)
    parts = asked.config.resolve().parent.parts
    named = [part for part in reversed(parts) if part in domains]
    if named or len(domains) == 1:
        return (named or domains)[0]
    raise AdaptError(
        f"whose configuration is {asked.config}? --domain NAME; allowed: {', '.join(domains)}"
    )


def _over(said: Sequence[str], settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Full key -> its values, as they were written."""
    over: dict[str, list[str]] = {}
    for words in said:
        short, _, listed = words.partition("=")
        values = [value.strip() for value in _split(listed)]
        if not short or "" in values:
            raise AdaptError(f"--over {words} is not allowed: KEY=V1,V2,... without an empty value")
        if len(set(values)) < len(values):
            raise AdaptError(f"--over {words}: a value twice")
        key = _full_key(short, settings)
        if key in over:
            raise AdaptError(f"--over {words}: {key} twice")
        over[key] = values
    return over


def _split(listed: str) -> list[str]:
    """The values between the commas that stand in no bracket.

    >>> _split("4,[1,2],{a: 1, b: 2}")
    ['4', '[1,2]', '{a: 1, b: 2}']
    """
    parts, depth = [""], 0
    for sign in listed:
        depth += (sign in "[{(") - (sign in ")}]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _full_key(key: str, settings: Mapping[str, Any]) -> str:
    """The key with its section, and without `init_args`, which the domain's parser puts in again.

    >>> _full_key("adapter.init_args.rank", {"model": {"adapter": {}}, "data": {"path": "a"}})
    'model.adapter.rank'
    """
    key = key.replace(".init_args.", ".")
    first = key.partition(".")[0]
    if first in ("run", "overwrite", "ckpt_path"):
        raise AdaptError(f"--over {key} is not allowed: every point has a folder of its own")
    if first in settings:
        return key
    inside = [name for name, part in settings.items() if isinstance(part, dict) and first in part]
    if len(inside) > 1:
        raise AdaptError(f"--over {key}: which one? {' or '.join(f'{n}.{key}' for n in inside)}")
    return ".".join([*inside, key])


def _refuse_bad_values(config: Path, plan: Plan) -> None:
    """Let the domain's parser read every value once, before anything is fitted."""
    fit = domain_commands()[plan.domain]
    for key, values in plan.over.items():
        for value in values:
            words = ["fit", "--config", str(config), f"--{key}={value}", "--print_config"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                fit(words)


# The folder


def _goes_on(out: Path, plan: Plan) -> bool:
    """Whether the folder holds this very sweep; another one, or anything else, is refused."""
    if not (out / PLAN).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AdaptError(f"{out} is there and holds no sweep: choose another --out")
        return False
    try:
        found = json.loads((out / PLAN).read_text())
    except ValueError as error:
        raise AdaptError(f"{out / PLAN} is damaged: choose another --out") from error
    for name, value in json.loads(_as_json(asdict(plan))).items():
        if found.get(name) != value:
            told = "another configuration" if name == "settings" else f"{name}={found.get(name)}"
            raise AdaptError(f"{out} holds a sweep with {told}: choose another --out")
    return True


def _start(out: Path, plan: Plan, config: Path) -> None:
    from .container import write_atomically

    try:
        (out / POINTS).mkdir(parents=True, exist_ok=True)
        text = config.read_bytes()
    except OSError as error:
        raise AdaptError(f"cannot make the folder {out}: {error.strerror}") from error
    write_atomically(out / CONFIG, text)
    write_atomically(out / PLAN, _as_json(asdict(plan)).encode())


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, default=str)  # YAML also knows dates


def _jobs(out: Path, plan: Plan, workers: int) -> Iterator[Job]:
    threads = None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    for number, values in enumerate(itertools.product(*plan.over.values())):
        point = dict(zip(plan.over, values, strict=True))
        short = [f"{key.rpartition('.')[2]}={value}" for key, value in point.items()]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join([f"{number:03d}", *short]))[:100]
        folder = (out / POINTS / name).resolve()
        words = [f"--{key}={value}" for key, value in point.items()]
        config = ["--config", str((out / CONFIG).resolve()), "--run", str(folder)]
        monitor = point.get("monitor") or plan.settings.get("monitor")
        mode = point.get("monitor_mode") or plan.settings.get("monitor_mode") or "max"
        yield Job((plan.domain, "fit", *config, *words), folder, point, threads, monitor, mode)


# Running


def _possible(workers: int) -> int:
    if workers < 1:
        raise AdaptError(f"--workers {workers} is not allowed: 1 or more")
    if workers > 1 and importlib.util.find_spec("ray") is None:
        print("Ray is not installed (pip install 'polyadapt[sweep]'): one fit after another")
        return 1
    return workers


def _fitted(jobs: Sequence[Job], workers: int) -> Iterator[Record]:
    if workers == 1 or len(jobs) < 2:
        return map(run, jobs)
    return _side_by_side(jobs, workers)


def _side_by_side(jobs: Sequence[Job], workers: int) -> Iterator[Record]:
    """Through Ray, on this machine; when this process ends, so do its fits."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,  # only records go through it, not a third of the memory
    )
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(run)
        jobs_of = {remote.remote(job): job for job in jobs}
        while jobs_of:
            (ready,), _ = ray.wait(list(jobs_of))
            job = jobs_of.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:  # its worker was killed, for memory perhaps
                said = str(error).strip().splitlines() or [type(error).__name__]
                yield write_record(job, {"error": said[0]})
    finally:
        ray.shutdown()


def _line(record: Record) -> str:
    point = ", ".join(f"{key}={value}" for key, value in record["values"].items())
    if "error" in record:
        return f"{point}: FAILED: {record['error']}"
    return f"{point}: {record['seconds']:.0f} s"
