"""One point of a sweep: its fit in a process of its own, and the record that it leaves.

Run as a module, this file is that process: `python -m polyadapt.core.sweep_point DOMAIN fit ...`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A fit: the words of its command, the folder of its run, what it was asked to monitor."""

    words: tuple[str, ...]
    folder: Path
    values: dict[str, str]
    threads: int | None = None
    monitor: str | None = None
    mode: str = "max"

    def beside(self, ending: str) -> Path:
        """A file next to the run's folder."""
        return self.folder.with_name(self.folder.name + ending)


def run(job: Job) -> Record:
    """Fit from the beginning; the record of what came of it, which is also written.

    A record holds `values`, and `row` (of metrics.csv, of the epoch that the adapter file is from)
    with `seconds`, or the `error` in one line.
    """
    shutil.rmtree(job.folder, ignore_errors=True)  # of a fit that was stopped or failed
    start = time.perf_counter()
    code = _exit_code(job)
    if code != 0:
        return write_record(job, {"error": _complaint(job, code)})
    row = _kept_row(job)
    if row is None:
        return write_record(job, {"error": f"it wrote no {job.folder / 'metrics.csv'}"})
    return write_record(job, {"row": row, "seconds": round(time.perf_counter() - start, 3)})


def recorded(job: Job) -> Record:
    """What the job's record says; without one, only its values."""
    try:
        found = json.loads(job.beside(".json").read_text())
    except (FileNotFoundError, ValueError):
        return {"values": job.values}
    return {**found, "values": job.values} if isinstance(found, dict) else {"values": job.values}


def write_record(job: Job, content: Mapping[str, Any]) -> Record:
    """Write a record, whole or not at all."""
    from .container import write_atomically

    record = {"values": job.values, **content}
    write_atomically(job.beside(".json"), json.dumps(record, indent=1).encode())
    return record


def _exit_code(job: Job) -> int:
    own = {}
    if job.threads is not None:
        own = {n: str(min(job.threads, int(os.environ.get(n) or job.threads))) for n in _THREADS}
    with job.beside(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *job.words],
            stdin=subprocess.PIPE,  # held open as long as we live: see _end_with_the_parent
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
        )
        try:
            return process.wait()
        finally:
            process.kill()  # nothing if it has ended; else we were interrupted
            process.communicate()


def _complaint(job: Job, code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    said = job.beside(".log").read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
    return last.removeprefix("polyadapt: ")


def _kept_row(job: Job) -> dict[str, float] | None:
    """The last epoch's, or the first of the best ones if a metric was monitored."""
    try:
        with (job.folder / "metrics.csv").open(newline="") as file:
            rows = [{n: _number(v) for n, v in row.items() if v} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return None
    known = [row for row in rows if job.monitor in row]
    if not known or job.monitor is None:
        return rows[-1] if rows else None
    best = (max if job.mode == "max" else min)(row[job.monitor] for row in known)
    return next(row for row in known if row[job.monitor] == best)


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def _end_with_the_parent() -> None:
    """Its end closes our standard input, however it ended: a sweep that is killed fits nothing."""
    while os.read(0, 1):  # not by sys.stdin: its lock, held here, would abort our own end
        pass
    os._exit(130)


if __name__ == "__main__":
    from .cli import main

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.exit(main(sys.argv[1:]))
