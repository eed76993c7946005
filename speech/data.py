"""Data modules: clips with transcripts, as batches of spectrograms and tokens."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.batches import for_test, for_training, for_validation
from ..core.errors import AdaptError, require_word
from ..core.order import EpochAndPosition
from .audio import SAMPLE_RATE, log_mel
from .augmentation import SpecAugment, drawn_speed, frames_in, require_speeds
from .clips import Clip, Parts, joined, read_folders, read_manifest
from .scene_settings import Noise
from .scenes import Scene, seeded
from .tokens import Pair, Tokens, collate

OnBad = Literal["error", "skip"]
SplitBy = Literal["clip", "speaker"]


@dataclass(frozen=True)
class Wants:
    """What a Whisper wants its clips to be: a task says it to its data."""

    n_mels: int
    seconds: float
    tokens: Tokens
    mask_prompt: bool = True


class Sample(NamedTuple):
    """A clip, ready: its spectrogram [n_mels, t], (inputs, targets), what is said, its name."""

    mel: Tensor
    pair: Pair
    text: str
    name: str


class Batch(NamedTuple):
    """mel [b, n_mels, frames], decoder inputs [b, t], targets [b, t] (-100: none), texts, names."""

    mel: Tensor
    inputs: Tensor
    targets: Tensor
    texts: list[str]
    names: list[str]


@dataclass(frozen=True)
class Variation:
    """What happens to a clip between the file and the spectrogram."""

    speeds: Sequence[float] = (1.0,)
    spec_augment: SpecAugment | None = None
    noise: Noise | None = None
    scenes: Mapping[str, Scene] | None = None


class Clips(Dataset[Sample]):
    """The clips of a part, as a Whisper wants them; asked for by (epoch, position).

    What is drawn for a clip is a function of (seed, epoch, position), so that a resumed run draws
    the same.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        wants: Wants,
        variation: Variation,
        place: tuple[int | str, ...],
    ) -> None:
        self.clips = clips
        self.wants = wants
        self.variation = variation
        self.place = place

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, position = (0, key) if isinstance(key, int) else key
        clip, wants, how = self.clips[position], self.wants, self.variation
        generator = seeded(*self.place, epoch, position)
        audio = drawn_speed(how.speeds, clip.hear(), wants.seconds, generator)
        _require_short(clip, len(audio) / SAMPLE_RATE, wants)
        if how.noise is not None and how.scenes is not None:
            audio = how.noise.added(how.scenes, audio, generator, clip.speaker)
        mel = log_mel([audio], wants.n_mels, wants.seconds)[0]
        if how.spec_augment is not None:
            mel = how.spec_augment(mel, frames_in(audio), generator)
        pair = _pair(clip, len(audio) / SAMPLE_RATE, wants)
        return Sample(mel, pair, clip.text, clip.name)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Samples as one batch; the transcripts are padded to the longest."""
        masked = len(self.wants.tokens.prompt) - 1 if self.wants.mask_prompt else 0
        inputs, targets = collate([s.pair for s in samples], self.wants.tokens.eot, masked)
        mel = torch.stack([sample.mel for sample in samples])
        texts, names = [s.text for s in samples], [s.name for s in samples]
        return Batch(mel, inputs, targets, texts, names)


class SpeechData(LightningDataModule, ABC):
    """Clips in up to three parts, split by `seed`.

    val_share, test_share: of the training clips, split off where there is no such part; by
    `split_by` speaker, whole speakers are. speeds: factors of which training draws one for each
    clip in each epoch; spec_augment: masks on training spectrograms; noise: scenes that the clips
    of every part are mixed with (for validation and test always the same mixture of a clip);
    sort_within: batches hold transcripts of like length, sorted within so many batches (1: not);
    on_bad: "error" stops at the first clip that is missing, unreadable, longer than the context,
    without transcript or with more tokens than the decoder takes; "skip" reads all clips once and
    leaves those out, with a warning that counts and names them; num_workers: processes that prepare
    clips, 0 does it in between the steps.

    `wants` is the Whisper's: within a trainer its task says it, else set it before asking for
    batches. Raises `AdaptError` for settings out of range and what `read` refuses.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        val_share: float = 0.1,
        test_share: float = 0.0,
        split_by: SplitBy = "clip",
        seed: int = 0,
        speeds: list[float] | None = None,
        spec_augment: SpecAugment | None = None,
        noise: Noise | None = None,
        sort_within: int = 16,
        on_bad: OnBad = "error",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or sort_within < 1:
            raise AdaptError(
                f"batch_size={batch_size}, sort_within={sort_within}, num_workers={num_workers}:"
                " from 1, from 1 and from 0"
            )
        require_word("on_bad", on_bad, OnBad)
        require_word("split_by", split_by, SplitBy)
        require_speeds(speeds or [1.0])
        self.batch_size = batch_size
        self.shares = {"test": test_share, "val": val_share}
        self.split_by = split_by
        self.seed = seed
        self.speeds = tuple(speeds or [1.0])
        self.spec_augment = spec_augment
        self.noise = noise
        self.sort_within = sort_within
        self.on_bad = on_bad
        self.num_workers = num_workers
        self.wants: Wants | None = None
        self._parts: dict[str, list[Clip]] = {}

    @abstractmethod
    def read(self) -> Parts:
        """What is there, before anything is split off."""

    def setup(self, stage: str | None = None) -> None:
        task = None if self.trainer is None else self.trainer.lightning_module
        self.wants = getattr(task, "wants", None) or self.wants
        if self._parts:
            return
        parts = {part: list(clips) for part, clips in self.read().items()}
        if not parts.get("train"):
            raise AdaptError("there is no training clip: the parts are " + ", ".join(parts))
        if self.wants is not None:
            parts = {part: self._fitting(clips, self.wants) for part, clips in parts.items()}
        for part, share in self.shares.items():
            if part not in parts:
                place = (self.seed, "split", part)
                parts["train"], parts[part] = split_off(
                    parts["train"], share, self.split_by, seeded(*place)
                )
        if not parts["train"]:
            raise AdaptError("no clip is left for training: lower the shares")
        if self.noise is not None:
            self.noise.require_speakers(parts)
        self._parts = parts

    def _fitting(self, clips: Sequence[Clip], wants: Wants) -> list[Clip]:
        """Those that can be trained on; the others are refused or left out."""
        good: list[Clip] = []
        bad: list[str] = []
        for clip in clips:
            try:
                _require_fit(clip, wants, whole=self.on_bad == "skip")
                good.append(clip)
            except AdaptError as error:
                if self.on_bad == "error":
                    raise
                bad.append(str(error))
        if bad:
            told = "; ".join(bad)
            warnings.warn(f"skipped {len(bad)} of {len(clips)} clips: {told}", stacklevel=2)
        return good

    def clips(self, part: str) -> Clips:
        """The clips of "train", "val" or "test", as the Whisper gets them."""
        if self.wants is None:
            raise AdaptError("set data.wants first: the `wants` of a SpeechRecognition")
        own = self._parts[part]
        scenes = self.noise.scenes(part, self.seed, own) if self.noise is not None else None
        if part == "train":
            how = Variation(self.speeds, self.spec_augment, self.noise, scenes)
            return Clips(own, self.wants, how, (self.seed, part))
        # Like lengths together: a batch is decoded until its longest transcript ends.
        ordered = sorted(own, key=lambda clip: len(clip.text))
        how = Variation(noise=self.noise, scenes=scenes)
        return Clips(ordered, self.wants, how, (self.seed, part))

    def train_dataloader(self) -> DataLoader[Any]:
        clips = self.clips("train")
        sizes = [len(clip.text) for clip in clips.clips] if self.sort_within > 1 else None
        order = EpochAndPosition(
            len(clips),
            self.seed,
            sizes=sizes,
            batch_size=self.batch_size,
            pool=self.sort_within,
        )
        return for_training(self, clips, order, collate_fn=clips.batch)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        clips = self.clips("val")
        return for_validation(self, clips, collate_fn=clips.batch)

    def test_dataloader(self) -> DataLoader[Any]:
        clips = self.clips("test")
        return for_test(self, clips, collate_fn=clips.batch)


class Manifest(SpeechData):
    """Clips that a manifest names: CSV with the header `path,text`, or JSON lines with these keys.

    Further columns: `speaker`, and `split` (train, val or test). Or a file for each part: `path`,
    `val`, `test`. Several files of `path` are as one. Paths in a manifest begin at its folder.
    """

    def __init__(
        self,
        path: str | list[str],
        val: str | None = None,
        test: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.paths = [path] if isinstance(path, str) else path
        self.others = {part: f for part, f in (("val", val), ("test", test)) if f is not None}

    def read(self) -> Parts:
        part = "train" if self.others else None
        own = (read_manifest(path, part) for path in self.paths)
        return joined([*own, *(read_manifest(f, other) for other, f in self.others.items())])


class SpeechFolders(SpeechData):
    """Clips in root/train, with val/ and test/ beside it, or all in root.

    A transcript is NAME.txt beside NAME.wav; without any such file it is the name of a clip's
    folder (`yes/1.wav`; `_` stands for a blank).
    """

    def __init__(self, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.root = root

    def read(self) -> Parts:
        return read_folders(self.root)


class HuggingFace(SpeechData):
    """A data set of the Hugging Face hub, or a local one, by what `datasets.load_dataset` takes.

    `audio` and `text` name its columns, `speaker` too if it has one; `train`, `val` and `test` its
    splits (`train[:10%]` and the like may be used), None for one that it does not have.
    Raises `AdaptError` where the package `datasets` is missing.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        *,
        audio: str = "audio",
        text: str = "text",
        speaker: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        options: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.name_ = name
        self.config = config
        self.columns = (audio, text, speaker)
        self.splits = {"train": train, "val": val, "test": test}
        self.options = options or {}

    def read(self) -> Parts:
        from .hub_clips import read_hub

        wanted = {part: split for part, split in self.splits.items() if split is not None}
        return read_hub(self.name_, self.config, wanted, self.columns, self.options)


def split_off(
    clips: Sequence[Clip], share: float, by: SplitBy, generator: Generator
) -> tuple[list[Clip], list[Clip]]:
    """(kept, split off): a share of the clips, or the clips of a share of the speakers."""
    if not 0 <= share < 1:
        raise AdaptError(f"a share of {share} cannot be split off: from 0, below 1")
    names: list[Any] = list(range(len(clips)))
    if by == "speaker" and share > 0:
        if unnamed := [clip for clip in clips if clip.speaker is None]:
            raise AdaptError(f"split_by speaker: {unnamed[0].name} names no speaker")
        names = [clip.speaker for clip in clips]
    different = sorted(set(names))
    order = torch.randperm(len(different), generator=generator).tolist()
    wanted = max(1, round(share * len(different))) if share > 0 else 0
    taken = {different[i] for i in order[:wanted]}
    kept = [clip for clip, name in zip(clips, names, strict=True) if name not in taken]
    return kept, [clip for clip, name in zip(clips, names, strict=True) if name in taken]


def _require_fit(clip: Clip, wants: Wants, whole: bool) -> None:
    """Found at the start: a clip may come up after hours. `whole` reads it to its end."""
    seconds = len(clip.hear()) / SAMPLE_RATE if whole else clip.seconds_of()
    _require_short(clip, seconds, wants)
    _pair(clip, min(seconds, wants.seconds), wants)


def _require_short(clip: Clip, seconds: float, wants: Wants) -> None:
    if seconds > wants.seconds:
        raise AdaptError(
            f"{clip.name} lasts {seconds:.2f} s, the context is {wants.seconds:g} s: cut the clip"
            " and its transcript, or leave it out with on_bad: skip"
        )


def _pair(clip: Clip, seconds: float, wants: Wants) -> Pair:
    try:
        return wants.tokens.pair(clip.text, seconds)
    except AdaptError as error:
        raise AdaptError(f"{clip.name}: {error}") from error
