"""From a configuration to a domain's data, task and trainer."""

from __future__ import annotations

import argparse
import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .adapters import recipes
from .complaints import in_one_line
from .errors import AdaptError
from .nulls import refuse_chosen, refuse_nulls
from .recipe import Recipe
from .run_files import RunFiles
from .run_folder import CONFIG, LAST, StartOfRun
from .training import require_strategy
from .whole_numbers import refuse_huge

Verb = Literal["fit", "validate", "test"]

_ABOUT: dict[Verb, str] = {
    "fit": "Adapt a frozen backbone to {things} and write a run folder. "
    "`--resume FOLDER` goes on with a run that was stopped.",
    "validate": "Measure an adapter file (--set) or a checkpoint (--ckpt_path): validation part.",
    "test": "Measure an adapter file (--set) or a checkpoint (--ckpt_path): test part.",
}


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What `fit`, `validate` and `test` need to know of a domain.

    ============  ==================================================================
    things        what its data holds, in a word
    task          its `AdaptedModule`, with `from_file(path)` for an adapter file
    data          the base of its data modules, chosen by class_path
    backbone      the base of its backbones' settings
    subclasses    bases of all settings, beside recipes, that are chosen by class_path
    chosen        further keys of a configuration that name a class -> base of those that may be
    backbone_of   reads from an adapter file what it was made on
    refuse_file   refuses an adapter file beside a configuration's model of something else
    measured      makes the callback that writes what a test found into a folder
    test_files    the files that it writes there
    next_words    the words of a command to go on with, of which {adapter} is one; or what tells
                  them of a task
    called        what its verbs are called; one that it does not have is left out
    check         refuses task, data and trainer that do not fit, before anything is written
    ============  ==================================================================
    """

    name: str
    things: str
    task: type[Any]
    data: type[LightningDataModule]
    backbone: type[Any]
    subclasses: Sequence[type]
    backbone_of: Callable[[str], Any]
    refuse_file: Callable[[str, Mapping[str, Any]], None] = lambda *_: None
    measured: Callable[[Path], Callback] = lambda _: Callback()
    test_files: Sequence[str] = ()
    next_words: str | Callable[[Any], str]
    chosen: Mapping[str, type] = field(default_factory=dict)
    called: Mapping[Verb, str] = field(default_factory=lambda: {verb: verb for verb in _ABOUT})
    check: Callable[[Any, Any, Trainer], None] = lambda *_: None

    def command(self, verb: Verb) -> str:
        """What a user types for a verb."""
        return f"polyadapt {self.name} {self.called[verb]}"

    def class_names(self) -> dict[str, list[str]]:
        """Key of a configuration -> the short names of the classes that it may have."""
        own = {"model.adapter": list(recipes()), "model.backbone": [*self.backbone.kinds()]}
        bases = {"data": self.data, **self.chosen}
        return own | {key: [*dict.fromkeys(_concrete(base))] for key, base in bases.items()}


def _concrete(base: type) -> Iterator[str]:
    """The names of all classes below `base` that can be made."""
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        if not inspect.isabstract(kind):
            yield kind.__name__
        yield from _concrete(kind)


class DomainCLI(LightningCLI):
    """Parses a configuration and builds data, task and trainer; what is run is up to the caller.

    With `build=False` a configuration is read and checked, and nothing built from it.
    Lightning's sub-commands are not used: with them, the settings that a checkpoint was made with
    replace what the user asked for, without a word.
    """

    folder: Path

    def __init__(
        self, domain: Domain, verb: Verb, argv: Sequence[str], *, build: bool = True
    ) -> None:
        self.domain = domain
        self.verb = verb
        self.build = build
        self.set_file = None if verb == "fit" else _taken_out("--set", argv)[0]
        recipes()  # short names of classes are found among those that are imported
        # Else they would be taken for plain groups of settings, being dataclasses.
        set_parsing_settings(subclasses_enabled=[Recipe, *domain.subclasses])
        super().__init__(
            domain.task,
            domain.data,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 10, "logger": False, "enable_model_summary": False},
            parser_kwargs={
                "prog": domain.command(verb),
                "description": _ABOUT[verb].format(things=domain.things),
                "exit_on_error": False,
            },
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=_resumed(argv),
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{k}": value for k, value in self.trainer_defaults.items()})
        if self.set_file is None:
            parser.add_lightning_class_args(self.domain.task, "model")
        else:  # the file says what the model is; a model in the configuration is only compared
            parser.add_argument("--model", type=dict | None)  # as it is: no class of it is made
        # Lightning's way also allows null, and then an error within the class is told of badly.
        about = f"where {self.domain.things} come from"
        parser.add_argument("--data", type=self.domain.data, required=True, help=about)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add("--run", type=str | None, help="the run's folder; default: runs/<configuration's name>")
        add("--overwrite", type=bool, default=False, help="replace a run that is in the folder")
        add("--monitor", type=str | None, help="keep the epoch with the best value of this metric")
        add("--monitor_mode", type=Literal["max", "min"], default="max", help="which value is best")
        add("--ckpt_path", type=str | None, help="fit: go on from here; else: measure this state")
        if self.verb != "fit":
            add("--set", type=str | None, help="measure this adapter file")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with in_one_line(parser, self.domain.class_names()):
            self.config = parser.parse_args(args)
        if not isinstance(self.config.trainer, Namespace):
            said = self.config.trainer
            raise AdaptError(f"trainer: {said!r} is not allowed: settings such as max_epochs: 10")
        if self.config.get("set") != self.set_file:
            raise AdaptError("`set` belongs on the command line: --set FILE")
        given = self.config.as_dict()
        refuse_huge(given)
        refuse_chosen(given["data"], "data")
        if self.set_file is None:
            refuse_nulls(given["model"], self.domain.task, "model")
        else:
            self._refuse_another_backbone(self.config.model, self.set_file)
        if self.config.ckpt_path is not None:
            _require_checkpoint(Path(self.config.ckpt_path))
        files = self.config.get("config") or []
        name = Path(str(files[-1])).stem if files else self.domain.name
        self.folder = Path(self.config.run or f"runs/{name}")

    def instantiate_classes(self) -> None:
        if not self.build:
            return
        with in_one_line(self.parser, self.domain.class_names()):
            super().instantiate_classes()
        if self.set_file is not None:
            self.model = self.domain.task.from_file(self.set_file)
        if self.verb == "fit":  # before a file is written
            self.domain.check(self.model, self.datamodule, self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        callbacks = [*given, *self._callbacks()]
        try:
            trainer: Trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except ValueError as error:  # a name or a number that it does not take
            raise AdaptError(f"trainer: {' '.join(str(error).split())}") from error
        require_strategy(trainer.strategy)  # before it starts other processes
        return trainer

    def _callbacks(self) -> list[Callback]:
        if self.config.trainer.fast_dev_run or self.verb == "validate":
            return []
        if self.verb == "test":
            return [self.domain.measured(self.folder)]
        old = () if self.config.ckpt_path is not None else self.domain.test_files
        start = StartOfRun(self.folder, self.effective, self.config.ckpt_path is None, old)
        return [start, RunFiles(self.folder, self.config.monitor, self.config.monitor_mode)]

    def effective(self) -> str:
        """The configuration with all defaults, as YAML, to be used as it is for another run."""
        config = self.config.clone()
        config.run, config.overwrite, config.ckpt_path = str(self.folder), False, None
        text: str = self.parser.dump(config, skip_none=False, format="yaml")
        return text

    def _refuse_another_backbone(self, model: Mapping[str, Any] | None, set_file: str) -> None:
        """A configuration beside an adapter file must not say another backbone than the file."""
        made_on = self.domain.backbone_of(set_file)
        self.domain.refuse_file(set_file, model or {})
        for key in model or {}:
            if key.startswith("backbone."):  # of the command line, where no backbone is named
                raise AdaptError(
                    f"--model.{key} does not go with --set: the file says its backbone"
                )
        said = (model or {}).get("backbone")
        if said is None:
            return
        asked = {"class_path": said} if isinstance(said, str) else said
        settings = asked.get("init_args") or {} if isinstance(asked, Mapping) else None
        if not isinstance(settings, Mapping) or not isinstance(asked.get("class_path"), str):
            allowed = "a class_path with its init_args, or nothing: the file says it"
            raise AdaptError(f"model.backbone: {said!r} is not allowed: {allowed}")
        kind = asked["class_path"].rpartition(".")[2]
        wanted = self.domain.backbone.from_json({"backbone": kind, **settings})
        if wanted != made_on:
            raise AdaptError(f"{set_file} was made on {made_on}, not on {wanted}")


def _taken_out(option: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of an option that decides how the others are read, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", nargs="?")
    found, others = parser.parse_known_args(argv)
    return found.value, others


def _resumed(argv: Sequence[str]) -> list[str]:
    """`--resume FOLDER` means that run's configuration and the end of its last whole epoch."""
    resumed, others = _taken_out("--resume", argv)
    if resumed is None:
        if "--resume" in argv:
            raise AdaptError("--resume needs the folder of the run to go on with")
        return list(argv)
    folder = Path(resumed)
    for name in (CONFIG, LAST):
        if not (folder / name).is_file():
            raise AdaptError(f"cannot resume {folder}: there is no {folder / name}")
    start = ["--config", str(folder / CONFIG), "--run", resumed]
    return [*start, "--ckpt_path", str(folder / LAST), *others]


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
