"""The set of one run, measured on classes that it was not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.images.data import ImageData
from ..core.records import digest, read_record, write_record
from ..core.run_folder import ADAPTER
from .data_words import Where, require_test
from .elsewhere import top1
from .few_shot_run import Run
from .model import ImageText
from .predict import Classifier, device
from .prompts import class_tokens
from .records import Record


@dataclass(frozen=True)
class Target:
    """Data to be measured on, and its template."""

    where: Where
    template: str

    @cached_property
    def data(self) -> ImageData:
        """Read, for its test part."""
        data = self.where.module(val_share=0.0)
        data.prepare_data()
        data.setup()
        return data

    def require(self, pair: ImageText) -> None:
        """`AdaptError` for prompts that the model cannot read, and without a test part."""
        class_tokens(pair.tokenize, self.data.classes, self.template)
        self.data.preprocessing = pair.preprocessing
        require_test(self.data, self.where.title)


class Elsewhere:
    """A run's adapted model, or the frozen one of `zero-shot`, on one target after the other.

    Every outcome has a record in the run's folder, in `on/<target>`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def finished(self, target: Target) -> Record | None:
        """The record, if it is there; nothing is computed."""
        return read_record(Record, self._folder(target), self._settings(target))

    def record(self, target: Target, trained: Record) -> Record:
        """Measure; `trained` is the run's own record."""
        classifier = self._classifier(target.data.classes, target.template)
        found = dataclasses.replace(
            trained,
            data=target.where.title,
            template=target.template,
            classes=len(classifier.classes),
            top1=top1(classifier, target.data),
            test_images=len(target.data.images("test")),
            settings=self._settings(target),
        )
        write_record(self._folder(target), found)
        return found

    def _folder(self, target: Target) -> Path:
        return self.run.folder / "on" / target.where.title

    def _settings(self, target: Target) -> str:
        run = self.run
        mine = run.shared.settings(run.method, run.shots, run.seed)
        return digest([mine, target.where.spec(), target.template])

    def _classifier(self, classes: Sequence[str], template: str) -> Classifier:
        if self.run.method.words:
            return self._trained.naming(classes, (template,))
        return Classifier(self.run.shared.frozen.pair, classes, (template,))

    @cached_property
    def _trained(self) -> Classifier:
        return Classifier.from_file(self.run.folder / ADAPTER, device())
