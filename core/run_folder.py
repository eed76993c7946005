"""What a run leaves in its folder besides `RunFiles`' files, and what keeps it from being lost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from .container import write_atomically
from .errors import AdaptError

CONFIG, ADAPTER, LAST = "config.yaml", "adapter.safetensors", "last.ckpt"
OF_A_RUN = (ADAPTER, LAST, "best.ckpt", "metrics.csv", "learning_curve.png")


class StartOfRun(Callback):
    """Writes the configuration, but only once the data has been read and found good.

    A new run (`fresh`) also clears away what an older one left in the folder, with the files that
    a test of the older one left there, `others`, names or patterns such as `pictures/*.png`.
    """

    def __init__(
        self,
        folder: Path,
        effective: Callable[[], str],
        fresh: bool,
        others: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.effective = effective
        self.old = (*OF_A_RUN, *others) if fresh else ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        make_folder(self.folder)
        for pattern in self.old:
            for file in self.folder.glob(pattern):
                file.unlink()
        write_atomically(self.folder / CONFIG, self.effective().encode())
        print(f"configuration: {self.folder / CONFIG}", flush=True)


def write_test_table(folder: Path, name: str, trainer: Trainer) -> dict[str, float]:
    """Write what a test logged as a CSV file of one row; the metrics by name."""
    make_folder(folder)
    metrics = {metric: float(value) for metric, value in trainer.callback_metrics.items()}
    rows = f"{','.join(metrics)}\n{','.join(map(str, metrics.values()))}\n"
    write_atomically(folder / name, rows.encode())
    return metrics


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdaptError(f"cannot make the folder {folder}: {error.strerror}") from error


def refuse_to_replace(folder: Path, checkpoint: str | None) -> None:
    """A folder that holds another run is left alone; going on with its own run is fine."""
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    if (folder / ADAPTER).exists() or (folder / LAST).exists():
        raise AdaptError(
            f"{folder} holds a run: --run FOLDER writes elsewhere, --overwrite true replaces it,"
            f" --resume {shlex.quote(str(folder))} goes on with it"
        )


def say_how_to_go_on(fit: str, folder: Path) -> None:
    """After an interrupt of the command `fit`."""
    if (folder / LAST).is_file():
        again = f"{fit} --resume {shlex.quote(str(folder))}"
        print(f"polyadapt: stopped; to go on: {again}", file=sys.stderr)
    else:
        print("polyadapt: stopped before the first epoch ended; start again", file=sys.stderr)


def say_what_to_do_next(folder: Path, measure: str, use: str) -> None:
    """After a whole run: its files, and the commands to go on with; `use` holds {adapter}."""
    for name in (CONFIG, *OF_A_RUN):
        if (folder / name).is_file():
            print(folder / name)
    adapter, config = (shlex.quote(str(folder / name)) for name in (ADAPTER, CONFIG))
    print(f"next: {measure} --config {config} --set {adapter}")
    print(f"      {use.format(adapter=adapter)}", flush=True)
