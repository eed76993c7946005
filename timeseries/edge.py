"""What an exported model costs on one core, measured in a process that does nothing else."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import AdaptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Model = Callable[[NDArray[Any]], NDArray[Any]]
    Opener = Callable[[Path | bytes], Model]

_WARM_UP, _CALLS, _PATIENCE = 3, 50, 20.0  # _PATIENCE: seconds for all calls that are measured


@dataclass(frozen=True)
class Cost:
    """Seconds of single calls; MiB of the process before the model was loaded, and at most.

    >>> print(Cost(seconds=[0.011, 0.010, 0.018], threads=1, cores=1, before=41.0, peak=62.5))
    median 11 ms, middle half 10 to 18 ms (3 calls, 1 thread, 1 core)
    at most 62.5 MiB of memory, 41.0 MiB of it before the model is loaded
    """

    seconds: list[float]
    threads: int
    cores: int
    before: float | None
    peak: float | None

    def __str__(self) -> str:
        low, middle, high = (1e3 * found for found in statistics.quantiles(self.seconds, n=4))
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        where = f"{len(self.seconds)} calls, {threads}, {cores}"
        spread = f"median {middle:.3g} ms, middle half {low:.3g} to {high:.3g} ms ({where})"
        return f"{spread}\n{self._memory()}"

    def _memory(self) -> str:
        if self.before is None or self.peak is None:
            return "memory: this system does not tell"
        begin = f"{self.before:.1f} MiB of it before the model is loaded"
        return f"at most {self.peak:.1f} MiB of memory, {begin}"


def measure(file: Path, window: tuple[int, int]) -> Cost:
    """The cost of an exported model on one `window` (rows, columns) at a time.

    A process of its own imports what runs the file and nothing else, takes one thread and, where
    the system lets it choose, one core. `AdaptError` with its last line if it fails.
    """
    words = [sys.executable, "-m", __name__, str(file), *map(str, window)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, capture_output=True, text=True, env=alone)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["nothing"])[-1]
        raise AdaptError(f"{file} could not be measured: its process says {last}")
    return Cost(**json.loads(ran.stdout.splitlines()[-1]))


def opener(kind: str) -> Opener:
    """Opens files of a kind, .onnx or .pt2: the libraries are imported, no file is read yet."""
    return _onnx_opener() if kind == ".onnx" else _program_opener()


def _onnx_opener() -> Opener:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    def opened(file: Path | bytes) -> Model:
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        (taken,) = (each.name for each in session.get_inputs())
        return lambda rows: session.run(None, {taken: rows})[0]

    return opened


def _program_opener() -> Opener:
    import torch

    def opened(file: Path | bytes) -> Model:
        program = torch.export.load(io.BytesIO(file) if isinstance(file, bytes) else file).module()

        def answer(rows: NDArray[Any]) -> NDArray[Any]:
            with torch.inference_mode():
                found: NDArray[Any] = program(torch.from_numpy(rows)).numpy()
            return found

        return answer

    return opened


def _main(words: Sequence[str]) -> None:
    """The process of `measure`: prints a `Cost` as JSON."""
    file, window = Path(words[0]), tuple(map(int, words[1:]))
    cores = _take_one_core()
    open_file = opener(file.suffix)
    import numpy as np

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    rows = np.random.default_rng(0).standard_normal((1, *window), np.float32)
    before = _memory("VmRSS")
    model = open_file(file)
    seconds = _timed(lambda: model(rows))
    cost = Cost(seconds=seconds, threads=1, cores=cores, before=before, peak=_memory("VmHWM"))
    print(json.dumps(asdict(cost)))


def _timed(call: Callable[[], object]) -> list[float]:
    for _ in range(_WARM_UP):
        call()
    seconds: list[float] = []
    while len(seconds) < _CALLS and (sum(seconds) < _PATIENCE or len(seconds) < 3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _take_one_core() -> int:
    """How many cores this process may use from now on: one, if the system lets it choose."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return 1


def _memory(field: str) -> float | None:
    """A size that Linux tells of this process, in MiB. Not getrusage: its peak is inherited."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


if __name__ == "__main__":
    _main(sys.argv[1:])
