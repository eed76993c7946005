"""Speech recognition: a frozen Whisper and one adapter set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from ..core.adapters.head_only import HeadOnly
from ..core.errors import AdaptError
from ..core.recipe import Recipe
from ..core.training import AdaptedModule
from .adapters import load_set
from .audio import LONGEST, frames_of
from .backbones import Backbone
from .data import Batch, SpeechData, Wants
from .decoding import Decoding
from .description import Description, describe
from .model import Speech, speech_of
from .names import sites_for
from .tokens import IGNORED, Prompt, language_code
from .words import Counts, Normaliser, count


class SpeechRecognition(AdaptedModule):
    """Trains adapters of a frozen Whisper: spectrograms and what has been said -> the next token.

    The loss is the cross entropy of text tokens and the end of the text, teacher-forced, mean over
    the batch's tokens; with `mask_prompt` the language, task and timestamp tokens, which are given
    when decoding, are no targets. Validation and test report that loss and, of a greedy decode, the
    word and letter error rates: edits summed over all clips by reference words (letters), both
    sides normalised. Clips whose reference has no word after that are left out; how many words were
    heard in them is logged as `heard_in_silence`. `longest`: tokens that a decode stops after.

    `seconds` is the context that clips are padded to, 30 for a Whisper as it is. A shorter one is
    much cheaper, but frozen Whispers fail in it: a set trained so must be used so, and its file
    says so. `at`: patterns of sites, or one of attention, encoder-attention, decoder-attention,
    query-value, mlp and linear; without it a method's own sites, or else attention, which is all
    query, key, value and output projections. `label` says what the set is for (noise, SNR); data
    with noise says it otherwise. The other settings are `AdaptedModule`'s.

    Raises `AdaptError` for settings that the Whisper does not have, such as another language than
    English for tiny.en.

    >>> from polyadapt.core import LoRA
    >>> from polyadapt.speech.backbones import OfflineTinyEn
    >>> task = SpeechRecognition(OfflineTinyEn(), LoRA(rank=8), seconds=1.5)
    >>> task.adapters.trainable_count()
    294912
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        seconds: float = LONGEST,
        language: str = "en",
        task: str = "transcribe",
        timestamps: bool = False,
        mask_prompt: bool = True,
        normaliser: Normaliser | None = None,
        longest: int | None = None,
        label: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:
        frames_of(seconds)
        model = backbone.build()
        speech = speech_of(model)
        tokens = speech.tokens(Prompt(language=language, task=task, timestamps=timestamps))
        super().__init__(model, adapter, _sites(speech, adapter, at), **training)
        code = language_code(language, speech.dims.n_vocab)
        self.speech = speech
        self.wants = Wants(speech.dims.n_mels, seconds, tokens, mask_prompt)
        self.asked = Decoding(language=code, task=task, timestamps=timestamps, longest=longest)
        self.normaliser = normaliser or Normaliser()
        self.about = Description(
            backbone, seconds, code, task, timestamps, self.normaliser, longest, label
        )
        self.errors = nn.ModuleDict({part: ErrorCounts() for part in ("val", "test")})
        self.adapters.extra = self.about.to_json()

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> Self:
        """The task of an adapter file, to be validated and tested; the file says everything."""
        about = describe(path)
        if about.filmed:
            raise AdaptError(f"{path} is an audio-visual set: validate-av measures it")
        task = cls(
            about.backbone,
            HeadOnly(),
            seconds=about.seconds,
            language=about.language,
            task=about.task,
            timestamps=about.timestamps,
            normaliser=about.normaliser,
            longest=about.longest,
            **settings,
        )
        task.adapters.detach()
        load_set(task.speech, path, task.set_name)
        return task

    def setup(self, stage: str) -> None:
        """Take the label from data with noise."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        noise = data.noise if isinstance(data, SpeechData) else None
        if stage == "fit" and noise is not None:
            self.adapters.extra = {"label": noise.label(), **self.adapters.extra}

    def forward(self, mel: Tensor, inputs: Tensor) -> Tensor:
        """[b, n_mels, frames] and tokens [b, t] -> logits [b, t, V]."""
        return self.speech.logits(inputs, self.speech.encode(mel))

    def training_loss(self, batch: Batch) -> Tensor:
        loss = _loss(self(batch.mel, batch.inputs), batch.targets)
        return loss * _share((batch.targets != IGNORED).sum().float())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[str]]:
        return {"said": self._measure("test", batch)}

    def _measure(self, part: str, batch: Batch) -> list[str]:
        """Log a batch's loss and count its errors; what was heard."""
        states = self.speech.encode(batch.mel)
        loss = _loss(self.speech.logits(batch.inputs, states), batch.targets)
        tokens = int((batch.targets != IGNORED).sum())
        self.log(f"{part}_loss", loss, batch_size=tokens, on_epoch=True, sync_dist=True)
        said = [result.text for result in self.speech.decode_states(states, self.asked)]
        errors = self.errors[part]
        assert isinstance(errors, ErrorCounts)
        for heard, text in zip(said, batch.texts, strict=True):
            errors.update(count(heard, text, self.normaliser, self.about.language))
        return said

    def on_validation_epoch_end(self) -> None:
        self._log_rates("val")

    def on_test_epoch_end(self) -> None:
        self._log_rates("test")

    def _log_rates(self, part: str) -> None:
        errors = self.errors[part]
        assert isinstance(errors, ErrorCounts)
        found = Counts(*errors.compute().tolist())
        errors.reset()
        rates = {"wer": found.wer, "cer": found.cer, "heard_in_silence": float(found.heard)}
        # All processes have the same sums already; else Lightning warns.
        self.log_dict({f"{part}_{name}": rate for name, rate in rates.items()}, sync_dist=True)


def _share(tokens: Tensor) -> Tensor:
    """This process's tokens in relation to the mean of all processes, whose losses are averaged.

    So every token counts alike, as it does for one process that has the clips of all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.ones_like(tokens)
    every = tokens.clone()
    dist.all_reduce(every)
    return tokens * dist.get_world_size() / every


class ErrorCounts(Metric):
    """`Counts`, summed over batches and processes."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(Counts().as_tuple()), dtype=torch.long)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    def update(self, found: Counts) -> None:
        """Add the counts of a clip."""
        self.counts += torch.tensor(found.as_tuple(), device=self.counts.device)

    def compute(self) -> Tensor:
        """The sums, in the order of the fields."""
        return self.counts


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """[b, t, V] and [b, t] -> mean cross entropy over targets that are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _sites(speech: Speech, adapter: Recipe, at: str | list[str] | None) -> list[str] | None:
    """Patterns in the spelling of this Whisper; None: the method's own sites."""
    if at is None:
        own = type(adapter).default_at is not Recipe.default_at
        return None if own else list(sites_for(speech.layout))
    if isinstance(at, str) and re.fullmatch(r"[a-z-]+", at):
        return list(sites_for(speech.layout, at))
    return [at] if isinstance(at, str) else at


def backbone_of(path: str | Path) -> Backbone:
    """The Whisper that the set of a file was made on."""
    return describe(path).backbone
