"""A bundle: adapter sets of one Whisper, what each is for, and the selector that chooses.

A folder with `bundle.json`, a `NAME.safetensors` for every set (the core's adapter files, with what
travels in them: heads, fusion modules, batch-norm buffers) and `selector.safetensors`. A set can be
added later; the selector is then retrained, the other sets are not.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..core.container import write_atomically
from ..core.errors import AdaptError, StoreError
from ..core.fingerprint import digest, frozen_weights
from ..core.sets import AdapterSet, sets_of, switch
from ..core.store import read_file
from .adapters import in_layout, load_set
from .bundle_record import (
    SELECTOR,
    Entry,
    Hearing,
    Record,
    check_name,
    label_hash,
    read_record,
    sha256,
)
from .decision import NONE, Choice, Decision, Scenario
from .listening import listen
from .model import Speech, speech_of
from .names import to_transformers
from .selector import Selector, read_selector, save_selector


class Bundle:
    """An opened bundle; made by `create` and `Bundle.open`.

    `damaged`: sets whose file is not as it was, with the cause; the others work without them.
    `deaf`: why nothing can be chosen automatically; empty if it can.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder = folder
        self._take(record)

    def _take(self, record: Record) -> None:
        self.record = record
        self.damaged = {
            name: cause
            for name, entry in record.sets.items()
            if (cause := _damage(self.file(name), entry.sha256))
        }
        self.selector: Selector | None = None
        self.deaf = self._hear()

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle; raises `StoreError` where even the index is unusable."""
        return cls(Path(folder), read_record(Path(folder)))

    @property
    def names(self) -> list[str]:
        """The sets that are intact."""
        return [name for name in self.record.sets if name not in self.damaged]

    @property
    def labels(self) -> dict[str, Scenario]:
        """The scenario that each set is for."""
        return {name: entry.label for name, entry in self.record.sets.items()}

    @property
    def decision(self) -> Decision | None:
        """The cost matrix and how the selector is trusted."""
        return self.record.decision

    def file(self, name: str) -> Path:
        """Where a set's adapter file lies."""
        if name not in self.record.sets:
            raise AdaptError(
                f"{self.folder} has no set {name!r}; it has {', '.join(self.record.sets) or 'none'}"
            )
        return self.folder / f"{name}.safetensors"

    def load_onto(self, target: Speech | nn.Module) -> list[str]:
        """Attach every intact set under its name; none is active until it is chosen.

        `target` is a Whisper of either class. A damaged set is left out, with a warning that names
        it. Raises `StoreError`, before anything is attached, for another Whisper than the one that
        the sets were made on.
        """
        speech = target if isinstance(target, Speech) else speech_of(target)
        self._check_base(speech)
        if taken := sorted({*self.names} & {*sets_of(speech.model)}):
            raise AdaptError(f"sets called {', '.join(taken)} are attached already: detach them")
        loaded = []
        for name, cause in self.damaged.items():
            warnings.warn(f"{self.folder}: set {name!r} is left out: {cause}", stacklevel=2)
        for name in self.names:
            try:
                load_set(speech, self.file(name), name)
                loaded.append(name)
            except StoreError as error:
                self.damaged[name] = str(error)
                warnings.warn(f"{self.folder}: set {name!r} is left out: {error}", stacklevel=2)
        if loaded:
            switch(speech.model, None)
        return loaded

    def _check_base(self, speech: Speech) -> None:
        here = frozen_weights(speech.model, ())
        renamed = to_transformers if speech.layout == "transformers" else str
        wanted = {renamed(name): found for name, found in self.record.weights.items()}
        other = [n for n in wanted if n not in here or digest(here[n]) != wanted[n]]
        if other:
            raise StoreError(
                f"{self.folder} is for another Whisper ({self.record.backbone}): {len(other)} of "
                f"{len(wanted)} frozen weights differ, first {other[0]}"
            )

    def add(self, file: str | Path, label: Scenario, name: str | None = None) -> None:
        """Take a set's file into the bundle; the other sets stay as they are.

        Until `equip` brings a selector and a cost matrix that cover it, it is chosen by hand only.
        """
        path = Path(file)
        name = check_name(name or read_file(path).name)
        if name in self.record.sets:
            raise AdaptError(f"{self.folder} has a set {name!r} already: choose another name")
        record = _with_base(self.record, path)
        target = self.folder / f"{name}.safetensors"
        write_atomically(target, path.read_bytes())
        entry = Entry(label, sha256(target))
        self._replace(replace(record, sets={**record.sets, name: entry}))

    def equip(self, selector: Selector, decision: Decision, hearing: Hearing | None = None) -> None:
        """Give the bundle a selector and a cost matrix that cover all of its sets."""
        _check_equipment(self.labels, selector, decision)
        save_selector(
            selector, self.folder / SELECTOR, {"labels": label_hash(self.labels, decision)}
        )
        found = sha256(self.folder / SELECTOR)
        hearing = hearing or self.record.hearing
        self._replace(
            replace(self.record, selector_sha256=found, decision=decision, hearing=hearing)
        )

    def _replace(self, record: Record) -> None:
        record.write(self.folder)
        self._take(record)

    def _hear(self) -> str:
        """Read the selector; returns why it cannot be used, or nothing."""
        decision = self.record.decision
        if decision is None or self.record.selector_sha256 is None:
            return "the bundle has no selector"
        if uncovered := sorted({*self.record.sets} - {*decision.costs.sets}):
            return (
                f"its selector and cost matrix do not cover {', '.join(uncovered)}: retrain or "
                "extend them"
            )
        if cause := _damage(self.folder / SELECTOR, self.record.selector_sha256):
            return f"its selector is damaged: {cause}"
        try:
            selector, about = read_selector(self.folder / SELECTOR)
        except StoreError as error:
            return f"its selector is damaged: {error}"
        if selector.classes != decision.classes or about.get("labels") != self.record.label_hash():
            return "its labels are not those that the selector was made with (their hash differs)"
        self.selector = selector
        return ""

    def choose(self, heard: Tensor | Path) -> Choice:
        """The set for a file, samples [n] at 16 kHz, or a log-mel [n_mels, frames], unpadded.

        Silence and less than 0.1 s fall back to the general set or the base. Of a recording longer
        than 30 s, up to 8 windows are heard and their estimates averaged.
        """
        if self.selector is None or self.decision is None:
            raise AdaptError(
                f"{self.folder}: sets cannot be chosen automatically: {self.deaf}; choose by name: "
                f"{', '.join([*self.names, NONE])}"
            )
        found = listen(self.selector, self.record.hearing, heard)
        if found is None:
            fallback = self.decision.fallback(self.names)
            return Choice(fallback, "nothing to hear: silence, or less than 0.1 s")
        return self.decision.choose(*found, self.names)


def create(
    folder: str | Path,
    sets: Mapping[str, str | Path | AdapterSet],
    labels: Mapping[str, Scenario],
    selector: Selector | None = None,
    decision: Decision | None = None,
    hearing: Hearing | None = None,
) -> Bundle:
    """Make a bundle of sets (files or attached ones) and of what each is for; whole or not at all.

    Without a selector and a decision, sets are chosen by name only; `equip` brings them later.
    Raises `AdaptError` for a folder that is not empty, sets of different Whispers, and labels or a
    cost matrix that do not fit the sets.
    """
    folder = Path(folder)
    check_new(folder, sets, labels)
    if (selector is None) != (decision is None):
        raise AdaptError("a selector and a decision belong together: give both or neither")
    try:
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise StoreError(f"cannot make {folder}: {error.strerror}") from error
    try:
        _fill(work, sets, labels, hearing or Hearing())
        if selector is not None and decision is not None:
            Bundle.open(work).equip(selector, decision)
        work.chmod(0o755)
        work.replace(folder)
    except BaseException:
        shutil.rmtree(work)
        raise
    return Bundle.open(folder)


def _fill(
    work: Path,
    sets: Mapping[str, str | Path | AdapterSet],
    labels: Mapping[str, Scenario],
    hearing: Hearing,
) -> None:
    record = Record({}, None, hearing=hearing)
    entries = {}
    for name, held in sets.items():
        path = work / f"{check_name(name)}.safetensors"
        if isinstance(held, AdapterSet):
            held.save(path)
        else:
            read_file(held)  # says what is wrong by the name that the user knows
            write_atomically(path, Path(held).read_bytes())
        record = _with_base(record, path)
        entries[name] = Entry(labels[name], sha256(path))
    replace(record, sets=entries).write(work)


def _with_base(record: Record, path: Path) -> Record:
    """The record with the frozen weights that one more set was made on, which must be the same."""
    file = in_layout(read_file(path), "openai", path)
    known = record.weights
    other = [n for n, found in file.fingerprint.items() if known.get(n, found) != found]
    if other:
        raise StoreError(
            f"set {file.name!r} was made on another Whisper than the other sets of the bundle: "
            f"{other[0]} differs"
        )
    backbone = record.backbone or file.extra.get("backbone") or file.backbone_class
    return replace(record, weights={**known, **file.fingerprint}, backbone=backbone)


def check_new(folder: Path, sets: Mapping[str, object], labels: Mapping[str, object]) -> None:
    """Refuse a folder that a bundle cannot be made in, and sets without a label each."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdaptError(f"{folder} exists and is no empty folder: a bundle needs one of its own")
    if not folder.absolute().parent.is_dir():
        raise AdaptError(f"cannot make {folder}: the folder {folder.parent} does not exist")
    if not sets or {*sets} != {*labels}:
        raise AdaptError(
            f"a bundle needs a label for each of its sets: sets {', '.join(sets) or 'none'}, "
            f"labels for {', '.join(labels) or 'none'}"
        )


def _check_equipment(
    labels: Mapping[str, Scenario], selector: Selector, decision: Decision
) -> None:
    rows = {*decision.costs.sets} - {NONE}
    if rows != {*labels}:
        raise AdaptError(
            f"the cost matrix has rows for {', '.join(sorted(rows)) or 'none'}, the bundle has the "
            f"sets {', '.join(labels)}: it needs a row for each"
        )
    if selector.classes != decision.classes:
        raise AdaptError(
            f"the selector knows {list(selector.classes)}, the decision is about "
            f"{list(decision.classes)}: the same classes in the same order are needed"
        )
    if decision.costs.by_level and selector.snr is None:
        raise AdaptError("the cost matrix has columns by SNR, and the selector tells no SNR")


def _damage(path: Path, wanted: str) -> str:
    """What is wrong with a file of the bundle; empty if nothing."""
    try:
        found = sha256(path)
    except StoreError as error:
        return str(error)
    return "" if found == wanted else f"{path.name} is not the file that was put in (its sha256)"
