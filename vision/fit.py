"""`polyadapt vision fit|validate|test`: a configuration, a run folder, errors in one line."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from ..core.adapters import recipes
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.recipe import Recipe
from ..core.run_files import RunFiles
from .backbones import BACKBONES, Backbone
from .complaints import in_one_line
from .data import ImageData
from .pictures import confusion_matrix
from .predict import describe
from .task import ImageClassification

Verb = Literal["fit", "validate", "test"]
CONFIG, ADAPTER, LAST = "config.yaml", "adapter.safetensors", "last.ckpt"
TEST_TABLE, TEST_PICTURE = "test_metrics.csv", "confusion_matrix.png"
_OF_A_RUN = (
    ADAPTER,
    LAST,
    "best.ckpt",
    "metrics.csv",
    "learning_curve.png",
    TEST_TABLE,
    TEST_PICTURE,
)


class VisionCLI(LightningCLI):
    """Parses a configuration and builds data, task and trainer; what is run is up to the caller.

    Lightning's sub-commands are not used: with them, the settings that a checkpoint was made with
    replace what the user asked for, without a word.
    """

    def __init__(self, verb: Verb, argv: Sequence[str]) -> None:
        self.verb = verb
        self.set_file = None if verb == "fit" else _value_of("--set", argv)
        recipes()  # short names of classes are found among those that are imported
        # Else they would be taken for plain groups of settings, being dataclasses.
        set_parsing_settings(subclasses_enabled=[Recipe, Backbone])
        super().__init__(
            ImageClassification,
            ImageData,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 10,
                "logger": False,
                "enable_model_summary": False,
            },
            parser_kwargs={
                "prog": f"polyadapt vision {verb}",
                "description": _ABOUT[verb],
                "exit_on_error": False,
            },
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=list(argv),
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.set_file is None:
            super().add_core_arguments_to_parser(parser)
            return
        # The adapter file says what the model is; a model in the configuration is only compared.
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults(
            {f"trainer.{key}": value for key, value in self.trainer_defaults.items()}
        )
        parser.add_argument("--model", type=dict[str, Any] | None)
        parser.add_lightning_class_args(ImageData, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add(
            "--run", type=str | None, help="the run's folder (default: runs/<configuration's name>)"
        )
        add("--overwrite", type=bool, default=False, help="replace a run that is in the folder")
        add("--monitor", type=str | None, help="keep the epoch with the best value of this metric")
        add("--monitor_mode", type=Literal["max", "min"], default="max", help="which value is best")
        add("--ckpt_path", type=str | None, help="fit: go on from here; else: measure this state")
        if self.verb != "fit":
            add("--set", type=str | None, help="measure this adapter file")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with in_one_line(parser, _class_names()):
            self.config = parser.parse_args(args)
        if self.config.get("set") != self.set_file:
            raise AdaptError("`set` belongs on the command line: --set FILE")
        if self.set_file is not None:
            _refuse_another_backbone(self.config.model, self.set_file)
        if self.config.ckpt_path is not None:
            _require_checkpoint(Path(self.config.ckpt_path))

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.set_file is not None:
            self.model = ImageClassification.from_file(self.set_file)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.folder = Path(self.config.run or f"runs/{self._config_name()}")
        if self.verb == "fit":
            files = RunFiles(self.folder, self.config.monitor, self.config.monitor_mode)
            own: list[Callback] = [files, StartOfRun(self)]
        else:
            own = [Measured(self.folder)] if self.verb == "test" else []
        given = self.config_init.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        trainer: Trainer = super().instantiate_trainer(callbacks=[*given, *own], **kwargs)
        return trainer

    def effective(self) -> str:
        """The configuration with all defaults, as YAML, to be used as it is for the next run."""
        config = self.config.clone()
        config.run, config.overwrite, config.ckpt_path = str(self.folder), False, None
        text: str = self.parser.dump(config, skip_none=False, format="yaml")
        return text

    def _config_name(self) -> str:
        files = self.config.get("config") or []
        return Path(str(files[-1])).stem if files else "vision"


_ABOUT = {
    "fit": "Adapt a frozen backbone to images and write a run folder. "
    "`--resume FOLDER` goes on with a run that was stopped.",
    "validate": "Measure an adapter file (--set) or a checkpoint (--ckpt_path): validation part.",
    "test": "Measure an adapter file (--set) or a checkpoint (--ckpt_path): test part.",
}


class StartOfRun(Callback):
    """When the data has been read and found good: write the configuration, clear an older run."""

    def __init__(self, cli: VisionCLI) -> None:
        self.cli = cli

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = self.cli.folder
        if not trainer.is_global_zero or self.cli.config.trainer.fast_dev_run:
            return
        _make(folder)
        if self.cli.config.ckpt_path is None:
            for name in _OF_A_RUN:
                (folder / name).unlink(missing_ok=True)
        write_atomically(folder / CONFIG, self.cli.effective().encode())
        print(f"configuration: {folder / CONFIG}", flush=True)


class Measured(Callback):
    """Counts what the test part was taken for, and writes the confusion matrix and the metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        classes = len(pl_module.classes)  # type: ignore[arg-type]
        self.counts = torch.zeros(classes, classes, dtype=torch.long)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        labels: Tensor = batch[1].cpu()
        ones = torch.ones_like(labels)
        self.counts.index_put_((labels, outputs.cpu()), ones, accumulate=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ImageClassification)
        _make(self.folder)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rows = f"{','.join(metrics)}\n{','.join(map(str, metrics.values()))}\n"
        write_atomically(self.folder / TEST_TABLE, rows.encode())
        title = f"{type(pl_module.adapters.recipe).__name__}: {metrics['test_top1']:.1%} right"
        picture = confusion_matrix(self.counts, pl_module.classes, title)
        write_atomically(self.folder / TEST_PICTURE, picture)


def main(verb: str, argv: Sequence[str]) -> int:
    """Run a verb with its words; what the user did wrong is an `AdaptError`."""
    with _calm(), _lightnings_errors():
        if verb == "fit":
            fit(argv)
        else:
            measure("test" if verb == "test" else "validate", argv)
    return 0


def fit(argv: Sequence[str]) -> VisionCLI:
    """Train; the run folder then holds the adapter file and what the run was."""
    cli = VisionCLI("fit", _resumed(argv))
    _refuse_to_replace(cli)
    print(str(cli.model.adapters).splitlines()[0], flush=True)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    except SystemExit:
        if cli.trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        _say_how_to_go_on(cli.folder)
        raise KeyboardInterrupt from None  # Lightning has turned it into exit code 1
    if (cli.folder / ADAPTER).is_file():
        _say_what_to_do_next(cli.folder)
    return cli


def measure(verb: Verb, argv: Sequence[str]) -> dict[str, float]:
    """Validate or test an adapter file or a checkpoint; the metrics by name."""
    cli = VisionCLI(verb, argv)
    if (cli.set_file is None) == (cli.config.ckpt_path is None):
        raise AdaptError(f"{verb} needs what to measure: either --set FILE or --ckpt_path FILE")
    run = cli.trainer.validate if verb == "validate" else cli.trainer.test
    (metrics,) = run(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path) or [{}]
    if verb == "test":
        print(f"{cli.folder / TEST_TABLE}\n{cli.folder / TEST_PICTURE}")
    return dict(metrics)


def _class_names() -> dict[str, list[str]]:
    """Key of a configuration -> the short names of the classes that it may have."""
    data = [kind.__name__ for kind in ImageData.__subclasses__()]
    return {"model.adapter": list(recipes()), "model.backbone": list(BACKBONES), "data": data}


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """The value of an option that decides how the others are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value", nargs="?")
    value: str | None = parser.parse_known_args(argv)[0].value
    return value


def _resumed(argv: Sequence[str]) -> list[str]:
    """`--resume FOLDER` means that run's configuration and the end of its last whole epoch."""
    resumed = _value_of("--resume", argv)
    if resumed is None:
        return list(argv)
    folder = Path(resumed)
    for name in (CONFIG, LAST):
        if not (folder / name).is_file():
            raise AdaptError(f"cannot resume {folder}: there is no {folder / name}")
    rest = [word for word in argv if word not in ("--resume", resumed, f"--resume={resumed}")]
    start = ["--config", str(folder / CONFIG), "--run", resumed]
    return [*start, "--ckpt_path", str(folder / LAST), *rest]


def _refuse_to_replace(cli: VisionCLI) -> None:
    folder, checkpoint = cli.folder, cli.config.ckpt_path
    if cli.config.overwrite or cli.config.trainer.fast_dev_run:
        return
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    if (folder / ADAPTER).exists() or (folder / LAST).exists():
        raise AdaptError(
            f"{folder} holds a run: --run FOLDER writes elsewhere, --overwrite true replaces it,"
            f" `fit --resume {shlex.quote(str(folder))}` goes on with it"
        )


def _refuse_another_backbone(model: dict[str, Any] | None, set_file: str) -> None:
    """A configuration beside an adapter file must not say another backbone than the file."""
    about = describe(set_file)
    said = (model or {}).get("backbone")
    if said is None:
        return
    path, settings = (said, {}) if isinstance(said, str) else (said["class_path"], said)
    kind = str(path).rpartition(".")[2]
    wanted = Backbone.from_json({"backbone": kind, **settings.get("init_args", {})})
    if wanted != about.backbone:
        raise AdaptError(
            f"{set_file} was made on {about.backbone}, the configuration says {wanted}"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdaptError(f"cannot make the folder {folder}: {error.strerror}") from error


def _require_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise AdaptError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise AdaptError(f"{path} is no whole checkpoint: {error}") from error
    if damaged is not None:
        raise AdaptError(f"{path} is damaged at {damaged}")


def _say_how_to_go_on(folder: Path) -> None:
    if (folder / LAST).is_file():
        again = f"polyadapt vision fit --resume {shlex.quote(str(folder))}"
        print(f"polyadapt: stopped; to go on: {again}", file=sys.stderr)
    else:
        print("polyadapt: stopped before the first epoch ended; start again", file=sys.stderr)


def _say_what_to_do_next(folder: Path) -> None:
    adapter, config = (shlex.quote(str(folder / name)) for name in (ADAPTER, CONFIG))
    for name in (*_OF_A_RUN, CONFIG):
        if (folder / name).is_file():
            print(folder / name)
    print(f"next: polyadapt vision test --config {config} --set {adapter}")
    print(f"      polyadapt vision predict --set {adapter} IMAGE ...", flush=True)


@contextmanager
def _calm() -> Iterator[None]:
    """Without Lightning's greetings; a warning is one line."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels, form = [log.level for log in loggers], warnings.formatwarning
    try:
        with warnings.catch_warnings():
            # Asked for: images are prepared in between the steps unless num_workers is set.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
            warnings.formatwarning = lambda message, *_: f"polyadapt: note: {message}\n"
            for log in loggers:
                log.setLevel(logging.WARNING)
            yield
    finally:
        warnings.formatwarning = form
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _lightnings_errors() -> Iterator[None]:
    """What Lightning or a data worker says about a user's mistake, in one line."""
    try:
        yield
    except AdaptError as error:
        if str(error).startswith("Caught "):  # a worker sends its traceback as the message
            raise AdaptError(str(error).splitlines()[-1].partition(": ")[2]) from None
        raise
    except MisconfigurationException as error:
        raise AdaptError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "conditioned on metric" in str(error):  # EarlyStopping
            raise AdaptError(" ".join(str(error).split())) from error
        raise
