"""SpeechRecognition: what is trained, on which loss, and how its errors are counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from polyadapt.core import AdaLoRA, BitFit, FullFineTuning, LoRA, Recipe, RunFiles, S2LoRA
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.store import read_file
from polyadapt.speech.augmentation import SpecAugment
from polyadapt.speech.backbones import OpenAIWhisper
from polyadapt.speech.data import Batch, Manifest
from polyadapt.speech.description import describe
from polyadapt.speech.scene_settings import Noise
from polyadapt.speech.task import ErrorCounts, SpeechRecognition
from polyadapt.speech.tokens import IGNORED
from polyadapt.speech.words import Counts, Normaliser, count
from polyadapt.tests.speech_cases import save_manifest, save_whisper
from polyadapt.tests.speech_models import MULTILINGUAL
from polyadapt.tests.training_cases import quiet_trainer


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    save_whisper()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
        yield


def task_of(recipe: Recipe | None = None, at: Any = None, **settings: Any) -> SpeechRecognition:
    settings = {"seconds": 0.6, "longest": 3, "seed": 0, **settings}
    return SpeechRecognition(OpenAIWhisper(name="tiny.pt"), recipe or LoRA(rank=4), at, **settings)


def trainer(epochs: int = 1, **settings: Any) -> Trainer:
    kept = bool(settings.get("callbacks"))
    return quiet_trainer(
        max_epochs=epochs, enable_checkpointing=kept, log_every_n_steps=1, **settings
    )


def one_batch(task: SpeechRecognition) -> Batch:
    save_manifest("m.csv", count=3)
    data = Manifest("m.csv", val_share=0.0)
    data.wants = task.wants
    data.setup()
    (batch,) = data.train_dataloader()
    assert isinstance(batch, Batch)
    return batch


# Where adapters go


def test_adapters_go_on_all_attention_unless_the_method_has_sites_of_its_own() -> None:
    lora = task_of(LoRA(rank=4))
    assert len(lora.adapters.adapters) == 24  # 2 encoder blocks of 4 linears, 2 decoder ones of 8
    assert lora.adapters.trainable_count() == 12_288
    biases = [p.numel() for n, p in lora.speech.model.named_parameters() if n.endswith("bias")]
    assert task_of(BitFit()).adapters.trainable_count() == sum(biases)


@pytest.mark.parametrize(
    ("at", "sites"),
    [("mlp", 8), ("linear", 32), ("encoder-attention", 8), (["**.mlp.0"], 4), ("**.mlp.2", 4)],
)
def test_sites_have_names_beside_patterns(at: Any, sites: int) -> None:
    assert len(task_of(at=at).adapters.adapters) == sites


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"language": "de"}, "English-only"),
        ({"task": "translate"}, "cannot translate"),
        ({"seconds": 31.0}, "at most 30 s, not 31"),
        ({"seconds": 0.0}, "not 0"),
        ({"at": "attentions"}, "no sites are called 'attentions'; there are attention"),
    ],
)
def test_what_this_whisper_does_not_have_is_refused_in_one_line(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said) as refused:
        task_of(**settings)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_another_task_is_refused() -> None:
    task = task_of()
    task.adapters.extra = {"task": "image classification"}
    task.save_adapter("a.safetensors")
    with pytest.raises(StoreError, match="no set for speech recognition: task 'image"):
        describe("a.safetensors")


# The loss


def test_the_loss_is_the_mean_over_text_tokens_and_ends() -> None:
    task = task_of()
    batch = one_batch(task)
    logits = task(batch.mel, batch.inputs).log_softmax(-1).detach()
    learnt = [
        -logits[clip, place, target]
        for clip, row in enumerate(batch.targets.tolist())
        for place, target in enumerate(row)
        if target != IGNORED
    ]
    lengths = [len(task.wants.tokens.pair(text)[0]) - 1 for text in batch.texts]
    assert len(learnt) == sum(lengths)  # the prompt has one target: <|notimestamps|>
    assert float(task.training_loss(batch).detach()) == pytest.approx(
        float(sum(learnt)) / len(learnt)
    )


def test_a_multilingual_prompt_holds_the_language_and_the_task() -> None:
    save_whisper("tiny.pt", MULTILINGUAL)
    task = task_of(language="german", task="translate")
    assert task.wants.tokens.prompt == (50258, 50261, 50358, 50363)
    assert task.about.language == "de"
    assert task.asked.task == "translate"


def test_timestamps_enclose_the_text() -> None:
    batch = one_batch(task_of(timestamps=True))
    first, last = batch.targets[0, 0], batch.targets[0][batch.targets[0] != IGNORED][-2]
    assert int(first) == 50363  # <|0.00|>
    assert int(last) == 50363 + round(len_of(batch) / 0.02)


def len_of(batch: Batch) -> float:
    from polyadapt.speech.audio import read_audio

    return len(read_audio(batch.names[0])) / 16_000


# What is measured


def heard(*texts: str) -> Any:
    return lambda states, asked: [SimpleNamespace(text=text) for text in texts]


def test_errors_are_summed_over_all_clips_on_normalised_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_manifest("m.csv", count=6)  # 0: seven three, 1: one, 2: the cat sat on the mat, ...
    lines = Path("m.csv").read_text().replace(",train", ",val").splitlines()
    lines[2] = "clips/1.wav,[noise],s1,val"
    train = "clips/0.wav,one,s0,train"
    Path("m.csv").write_text("\n".join([*lines, train]) + "\n")
    task = task_of(normaliser=Normaliser(digits=True))
    said = {"[noise]": "Thank you", "seven three": "73.", "one": "two", TEXT: TEXT.upper()}

    def decode(states: Any, asked: Any) -> Any:
        return [SimpleNamespace(text=said[text]) for text in current[0]]

    current: list[list[str]] = []
    measure = task._measure

    def measured(part: str, batch: Batch) -> list[str]:
        current[:] = [batch.texts]
        return measure(part, batch)

    monkeypatch.setattr(task.speech, "decode_states", decode)
    monkeypatch.setattr(task, "_measure", measured)
    data = Manifest("m.csv", batch_size=2)
    (found,) = trainer().validate(task, datamodule=data, verbose=False)
    # words: 2 + 2 (seven three), 1 (one), 6 (the cat ...); wrong: "two" for "one"
    assert found["val_wer"] == pytest.approx(1 / 11)
    assert found["val_heard_in_silence"] == 2
    assert found["val_cer"] == pytest.approx(1 / (3 + 3 + 1 + 22))


TEXT = "the cat sat on the mat"


def test_the_measured_loss_is_the_mean_over_all_tokens() -> None:
    save_manifest("m.csv", count=8)
    data = Manifest("m.csv", batch_size=3, val_share=0.5)
    task = task_of()
    (found,) = trainer().validate(task, datamodule=data, verbose=False)
    with torch.no_grad():
        every = [(task(b.mel, b.inputs), b.targets) for b in data.val_dataloader()]
    sums = [float(F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum")) for z, t in every]
    tokens = sum(int((t != IGNORED).sum()) for _, t in every)
    assert found["val_loss"] == pytest.approx(sum(sums) / tokens, rel=1e-5)


def test_counts_of_processes_are_added() -> None:
    metric = ErrorCounts()
    for said, text in (("a x", "a b"), ("c d", "c")):
        metric.update(count(said, text, Normaliser(style="plain")))
    assert Counts(*metric.compute().tolist()).wer == 2 / 3


# The file


def test_the_file_says_how_the_set_is_to_be_used() -> None:
    made = task_of(language="English", normaliser=Normaliser(digits=True), label={"category": "x"})
    made.save_adapter("a.safetensors")
    assert read_file("a.safetensors").extra == {
        "task": "speech-recognition",
        "backbone": {"backbone": "OpenAIWhisper", "name": "tiny.pt"},
        "seconds": 0.6,
        "language": "en",
        "says": "transcribe",
        "timestamps": False,
        "normaliser": {"style": "auto", "digits": True, "letters": False},
        "longest": 3,
        "label": {"category": "x"},
    }


def test_a_task_of_a_file_hears_what_the_trained_one_does() -> None:
    task = task_of(LoRA(rank=2))
    batch = one_batch(task)
    with torch.no_grad():
        for parameter in task.adapters.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    task.save_adapter("a.safetensors")
    again = SpeechRecognition.from_file("a.safetensors")
    assert again.about == task.about
    assert again(batch.mel, batch.inputs).equal(task(batch.mel, batch.inputs))


# Training


METHODS = (LoRA(rank=2), S2LoRA(rank=4), AdaLoRA(rank=2), BitFit(), FullFineTuning())


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: type(recipe).__name__)
def test_every_method_learns_and_leaves_the_backbone_alone(recipe: Recipe) -> None:
    save_manifest("m.csv", count=8)
    task = task_of(recipe, lr=1e-2)
    before = {name: t.clone() for name, t in task.speech.model.state_dict().items()}
    batch_loss: list[float] = []
    task.training_loss = _noted(task.training_loss, batch_loss)  # type: ignore[method-assign]
    trainer(2).fit(task, datamodule=Manifest("m.csv", batch_size=8, val_share=0.0))
    assert batch_loss[-1] < batch_loss[0]
    task.adapters.detach()
    after = task.speech.model.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def _noted(loss: Any, noted: list[float]) -> Any:
    def call(batch: Batch) -> Any:
        found = loss(batch)
        noted.append(float(found.detach()))
        return found

    return call


def test_noise_of_the_data_is_the_label_of_the_set() -> None:
    save_manifest("m.csv", count=8)
    noise = Noise(kinds=["white"], low=-5, high=0)
    task = task_of()
    trainer(1, limit_train_batches=1).fit(
        task, datamodule=Manifest("m.csv", noise=noise, val_share=0.0)
    )
    assert task.adapters.extra["label"] == noise.label()


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    save_manifest("m.csv", count=12)

    def fit(folder: str, epochs: int, **go_on: Any) -> dict[str, torch.Tensor]:
        how: dict[str, Any] = {"speeds": [0.9, 1.1], "spec_augment": SpecAugment()}
        data = Manifest("m.csv", batch_size=3, **how, noise=Noise(kinds=["pink"]))
        task = task_of(LoRA(rank=2), lr=1e-2, warmup=0.0)
        running = trainer(2, callbacks=[RunFiles(folder), *go_on.pop("callbacks", ())])
        running.fit(task, datamodule=data, **go_on)
        return {name: tensor.clone() for name, tensor in task.adapters.state_dict().items()}

    whole = fit("whole", 2, callbacks=[KeepFirst()])
    resumed = fit("resumed", 2, ckpt_path="first.ckpt")
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())
    assert Path("resumed/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()


def _keep_first() -> Any:
    from lightning.pytorch import Callback

    class Keep(Callback):
        """Copies the checkpoint of the first epoch when the second one starts."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                Path("first.ckpt").write_bytes(Path("whole/last.ckpt").read_bytes())

    return Keep


KeepFirst = _keep_first()
