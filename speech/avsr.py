"""Audio-visual speech recognition: adapter sets learned from clean speech, without text.

arXiv 2502.01709: a fusion module before a frozen Whisper and LoRA on its attention are trained so
that noisy speech with video is heard as the same Whisper hears the clean speech. The paper fixes
the losses, the stages (see `av_plan`) and rank 64. Ours: alpha = rank, no dropout and no bias in
LoRA (not to be found; a bias would block merging), AdamW without decay for Adam, and the teacher's
decoded tokens as targets, without those that Whisper's decoding never says.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from whisper.decoding import DecodingResult

from ..core.activation import activate
from ..core.adapters.lora import LoRA
from ..core.errors import AdaptError
from ..core.fingerprint import fingerprint
from ..core.recipe import Recipe
from ..core.recomputation import Mode
from ..core.sets import AdapterSet
from ..core.store import read_file
from ..core.training import AdaptedModule
from .adapters import load_set
from .audio import LONGEST, frames_of
from .av_data import FilmWants, Pairs
from .av_plan import STAGES
from .backbones import Backbone
from .decoding import Decoding
from .description import FILMED, Description, described
from .filmed_data import FilmedData
from .fusion import Fusion, FusionSizes
from .model import Speech, speech_of
from .names import sites_for
from .tokens import IGNORED, Prompt, collate, language_code

_HEAD = "fusion."


def mel_loss(predicted: Tensor, clean: Tensor, frames: Tensor) -> Tensor:
    """Mean |mel_p - mel_c| over the frames [b] that the clips have.

    >>> predicted = torch.tensor([[[1.0, 2.0, 99.0]]])
    >>> mel_loss(predicted, torch.zeros(1, 1, 3), torch.tensor([2]))
    tensor(1.5000)
    """
    index = torch.arange(predicted.shape[-1], device=predicted.device)
    there = index < frames.to(predicted.device).unsqueeze(1)
    errors = (predicted - clean).abs().mean(1)
    return errors[there].mean()


class AudioVisualDistillation(AdaptedModule):
    """Trains one AVSR set: LoRA on a frozen Whisper's attention and the fusion module before it.

    With c the frozen Whisper on clean speech and n the adapted one on the fused mel,

        L_pre = 0.5 L1(mel_p, mel_c) + L1(enc_n, enc_c)          stages 1 and 2
        L_ft  = L_pre + CE(tokens of c's greedy decode, logits_n)  stages 3 and 4

    L1 is a mean absolute error, of the mel over a clip's own frames, of the states over all.
    Batches are `Pairs`. `start` is the file of an earlier stage, whose tensors are taken over:
    stages 1 and 2 have adapters in the encoder only, 3 and 4 everywhere. `lr` is the stage's unless
    given, and runs to the stage's last as a geometric series. `seconds` is the context that clips
    are padded to; frozen Whispers fail in less than 30 s, so a set must be used as it was trained,
    and its file says so. `label` says what the set is for; `FilmedData` says it otherwise.

    `AdaptError` for an unknown stage, other mel bands than the Whisper's, and a file of other
    sizes, recipe or Whisper.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe | None = None,
        *,
        stage: int = 1,
        sizes: FusionSizes | None = None,
        start: str | Path | None = None,
        label: Mapping[str, Any] | None = None,
        seconds: float = LONGEST,
        prompt: Prompt | None = None,
        longest: int | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
        set_name: str = "default",
        seed: int | None = None,
        recompute: Mode = "none",
    ) -> None:
        frames_of(seconds)
        if stage not in STAGES:
            raise AdaptError(
                f"stage {stage!r} is not allowed: one of {', '.join(map(str, STAGES))}"
            )
        self.stage = STAGES[stage]
        speech = speech_of(backbone.build())
        sizes = _fitting(sizes, speech)
        super().__init__(
            speech.model,
            adapter or LoRA(rank=64),
            list(sites_for(speech.layout, self.stage.sites)),
            lr=self.stage.lr if lr is None else lr,
            weight_decay=weight_decay,
            warmup=0.0,
            set_name=set_name,
            seed=seed,
            recompute=recompute,
        )
        self.prompt, self.longest = prompt or Prompt(), longest
        self.wants = FilmWants(sizes, seconds)
        self.fusion = _fusion(sizes, seed)
        about = self._description(backbone, label)
        self.adapters.extra = {**about.to_json(), "fusion": sizes.to_json(), "stage": stage}
        if start is not None:
            self._take_over(start)

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> Self:
        """The task of a set's file, to be validated; the file says everything."""
        file = read_file(path)
        about = described(file.extra, path)
        if not about.filmed:
            raise AdaptError(f"{path} is no audio-visual set: `validate` measures it")
        task = cls(
            about.backbone,
            LoRA(rank=1),  # the file's own recipe takes its place
            stage=file.extra.get("stage", 0),
            sizes=FusionSizes.from_json(file.extra.get("fusion", {})),
            seconds=about.seconds,
            prompt=Prompt(language=about.language, task=about.task, timestamps=about.timestamps),
            longest=about.longest,
            **settings,
        )
        task.adapters.detach()
        load_set(task.speech, path, task.set_name)
        task.fusion = fusion_of(task.adapters)
        return task

    def _description(self, backbone: Backbone, label: Mapping[str, Any] | None) -> Description:
        asked = self.prompt
        return Description(
            backbone,
            self.wants.seconds,
            language_code(asked.language, self.speech.dims.n_vocab),
            asked.task,
            asked.timestamps,
            longest=self.longest,
            label=label,
            filmed=True,
        )

    def setup(self, stage: str) -> None:
        """Take the label from the data's noise."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, FilmedData):
            self.adapters.extra = {"label": data.noise.label(), **self.adapters.extra}

    @property
    def speech(self) -> Speech:
        """The backbone with its interface."""
        return speech_of(self.backbone)

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The fused mel and the adapted encoder's states of it."""
        mel = self.fusion.restored(pairs.noisy, pairs.video, pairs.frames)
        return mel, self.speech.encode(mel)

    def training_loss(self, batch: Pairs) -> Tensor:
        return self.losses(batch)["loss"]

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        for name, value in self.losses(batch).items():
            self.log(f"val_{name}", value, batch_size=len(batch.frames), sync_dist=True)

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """`loss`, and the parts of which it is the sum: mel, states and, from stage 3, tokens."""
        with torch.no_grad(), activate(self.backbone, None):
            wanted = self.speech.encode(pairs.clean)
            taught = self._taught(wanted) if self.stage.tokens else None
        mel, states = self(pairs)
        parts = {
            "mel": 0.5 * mel_loss(mel, pairs.clean, pairs.frames),
            "states": F.l1_loss(states, wanted),
        }
        if taught is not None:
            inputs, targets = taught
            logits = self.speech.logits(inputs, states).flatten(0, 1)
            parts["tokens"] = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        return {"loss": torch.stack([*parts.values()]).sum(), **parts}

    def _taught(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen Whisper says to clean speech, as the decoder's inputs and targets."""
        asked = Decoding(
            language=self.prompt.language,
            task=self.prompt.task,
            timestamps=self.prompt.timestamps,
            longest=self.longest,
        )
        tokens = self.speech.tokens(self.prompt)
        said = [list(found.tokens) for found in self.speech.decode_states(states, asked)]
        lines = [[*tokens.prompt, *ids] for ids in said]
        pairs = [(line, [*line[1:], tokens.eot]) for line in lines]
        inputs, targets = collate(pairs, tokens.eot, masked=len(tokens.prompt) - 1)
        return inputs.to(states.device), targets.to(states.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The base's optimiser; its rate runs from the stage's first to its last."""
        made = super().configure_optimizers()
        total, ratio = self._total_steps() or 1, self.stage.last_lr / self.stage.lr
        schedule = LambdaLR(made["optimizer"], lambda step: float(ratio ** (step / total)))
        return {**made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _take_over(self, path: str | Path) -> None:
        """The tensors of an earlier stage; sites that it lacks keep their start, which is zero."""
        file, own = read_file(path), self.adapters
        _require(file.extra, path, own.extra)
        if file.recipe != own.recipe or not set(file.tensors) <= set(own.state_dict()):
            raise AdaptError(
                f"{path} is no earlier stage of this run: it holds {file.recipe} on"
                f" {len(file.sites)} sites, wanted is {own.recipe} on some of {len(own.sites)}"
            )
        here = fingerprint(self.backbone, own.sites)
        if other := [n for n, found in file.fingerprint.items() if here.get(n, found) != found]:
            raise AdaptError(f"{path} was made on another Whisper: {other[0]} differs")
        own.load_state_dict({**own.state_dict(), **file.tensors})
        self.fusion.load_state_dict(_of_fusion(file.head))


@dataclass(frozen=True)
class AudioVisual:
    """A Whisper with one audio-visual set: with video it hears through the set, without it plainly.

    Without video no adapter acts and the mel goes in as it is: bit for bit the frozen Whisper.
    """

    speech: Speech
    adapters: AdapterSet
    fusion: Fusion

    def states(self, mel: Tensor, video: Tensor | None, frames: Tensor | None = None) -> Tensor:
        """mel [b, n_mels, t], video [b, ...] of the first frames -> the encoder's states."""
        with torch.no_grad(), self._acting(video):
            return self.speech.encode(self._fused(mel, video, frames))

    def decode(
        self,
        mel: Tensor,
        video: Tensor | None,
        frames: Tensor | None = None,
        asked: Decoding | None = None,
    ) -> list[DecodingResult]:
        """What is said in each clip; one set encodes and decodes."""
        with torch.no_grad(), self._acting(video):
            return self.speech.decode(self._fused(mel, video, frames), asked)

    def _acting(self, video: Tensor | None) -> AbstractContextManager[None]:
        return activate(self.speech.model, None if video is None else self.adapters.name)

    def _fused(self, mel: Tensor, video: Tensor | None, frames: Tensor | None) -> Tensor:
        return mel if video is None else self.fusion.restored(mel, video, frames)


def load_avsr(speech: Speech, path: str | Path, name: str | None = None) -> AudioVisual:
    """Attach a saved set of `AudioVisualDistillation`, and its fusion module as it was saved."""
    made = load_set(speech, path, name)
    try:
        return AudioVisual(speech, made, fusion_of(made))
    except AdaptError:
        made.detach()
        raise


def fusion_of(made: AdapterSet) -> Fusion:
    """The fusion module of a loaded AVSR set: frozen, in eval mode, with its running statistics.

    It is made of the set's own file: two sets never share one, whatever was active before.
    """
    if made.extra.get("task") != FILMED:
        raise AdaptError(f"set {made.name!r} is no audio-visual set: {made.extra.get('task')!r}")
    fusion = _fusion(FusionSizes.from_json(made.extra.get("fusion", {})), seed=0)
    try:
        fusion.load_state_dict(_of_fusion(made.head))
    except RuntimeError as error:
        raise AdaptError(
            f"set {made.name!r}: its fusion module is not of the sizes that its file states:"
            f" {str(error).splitlines()[-1].strip()}"
        ) from error
    device = next(made.backbone.parameters()).device
    return fusion.to(device).eval().requires_grad_(False)


def _fitting(sizes: FusionSizes | None, speech: Speech) -> FusionSizes:
    """The sizes, or the published ones for this Whisper's mel."""
    bands = speech.dims.n_mels
    if sizes is not None and sizes.mels != bands:
        raise AdaptError(f"fusion: mels={sizes.mels} is not allowed: this Whisper hears {bands}")
    return sizes or FusionSizes(mels=bands)


def _fusion(sizes: FusionSizes, seed: int | None) -> Fusion:
    """Drawn from a random state of its own when there is a seed."""
    if seed is None:
        return Fusion(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Fusion(sizes)


def _of_fusion(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(_HEAD): t for k, t in head.items() if k.startswith(_HEAD)}


def _require(found: Mapping[str, Any], path: str | Path, wanted: Mapping[str, Any]) -> None:
    for key in ("task", "backbone", "fusion"):
        if found.get(key) != wanted[key]:
            raise AdaptError(f"{path} has {key}={found.get(key)!r}, wanted is {wanted[key]!r}")
