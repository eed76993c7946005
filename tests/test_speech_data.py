"""Clips from manifests, folders and data sets; batches as a Whisper wants them."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Generator, Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.order import EpochAndPosition
from polyadapt.speech.audio import log_mel, read_audio
from polyadapt.speech.augmentation import SpecAugment, at_speed, drawn_speed
from polyadapt.speech.clips import Clip, read_folders, read_manifest
from polyadapt.speech.data import (
    Batch,
    HuggingFace,
    Manifest,
    SpeechData,
    SpeechFolders,
    Wants,
    split_off,
)
from polyadapt.speech.scene_settings import Noise
from polyadapt.speech.tokens import IGNORED, Tokens
from polyadapt.tests.speech_cases import TEXTS, save_clip, save_manifest

pytestmark = pytest.mark.in_an_empty_folder

TOKENS = Tokens(51864)
WANTS = Wants(80, 0.6, TOKENS)


def ready(data: SpeechData, wants: Wants = WANTS) -> SpeechData:
    data.wants = wants
    data.setup()
    return data


def batches(data: SpeechData, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, EpochAndPosition)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def names(parts: Any) -> dict[str, list[str]]:
    return {part: [Path(clip.name).stem for clip in clips] for part, clips in parts.items()}


# Where clips come from


def test_csv_and_json_lines_name_the_same_clips_from_the_manifests_folder() -> None:
    Path("here").mkdir()
    save_manifest("here/m.csv", count=6)
    found = read_manifest("here/m.csv")
    assert names(found) == {"train": ["0", "1", "2", "3", "4"], "test": ["5"]}
    rows = [
        {"path": f"clips/{clip}.wav", "text": TEXTS[int(clip) % 3], "split": part, "extra": 1}
        for part, clips in names(found).items()
        for clip in clips
    ]
    Path("here/m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    again = read_manifest("here/m.jsonl")
    assert names(again) == names(found)
    assert [c.text for c in again["train"]] == [c.text for c in found["train"]]
    assert found["train"][3].speaker == "s3"
    assert again["train"][3].speaker is None
    assert found["train"][2].seconds_of() == pytest.approx(0.42)
    assert found["train"][2].hear().shape == (6720,)


def test_each_part_may_have_a_manifest_of_its_own() -> None:
    save_manifest("a.csv", count=6)
    save_manifest("b.csv", count=3)
    found = Manifest("a.csv", val="b.csv").read()
    assert [len(found[part]) for part in ("train", "val")] == [6, 3]
    assert "test" not in found


def test_folders_have_a_transcript_beside_each_clip() -> None:
    for part, name in (("train", "a"), ("train", "deep/b"), ("dev", "c")):
        save_clip(f"d/{part}/{name}.wav").with_suffix(".txt").write_text(f" said in {name}\n")
    found = read_folders("d")
    assert {part: [clip.text.strip() for clip in clips] for part, clips in found.items()} == {
        "train": ["said in a", "said in deep/b"],
        "val": ["said in c"],
    }


def test_folders_may_bear_the_transcripts() -> None:
    save_clip("d/turn_left/1.wav")
    save_clip("d/stop/1.flac")
    assert [clip.text for clip in read_folders("d")["train"]] == ["stop", "turn left"]


class NotWholeError(Exception):
    """What the package raises where a data set cannot be built."""


class Table:
    """What `datasets.load_dataset` returns, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.undecoded: list[str] = []

    def cast_column(self, name: str, feature: Any) -> Table:
        assert feature == {"decode": False}
        self.undecoded.append(name)
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Table:
    content = io.BytesIO()
    soundfile.write(content, torch.zeros(8_000).numpy(), 16_000, format="WAV")
    save_clip("b.wav", 0.3)
    table = Table(
        [
            {"audio": {"bytes": content.getvalue(), "path": "a.wav"}, "said": "one", "who": 7},
            {"audio": {"bytes": None, "path": "b.wav"}, "said": "two", "who": 8},
            {"audio": {"bytes": None, "path": None}, "said": "three", "who": 8},
        ]
    )

    def load_dataset(name: str, config: str | None, split: str, **options: Any) -> Table:
        if name == "cut":
            raise NotWholeError("an error occurred") from ValueError("row 3 is no row")
        if name != "set":
            raise FileNotFoundError(f"no {name},\n{config} {split} {options}")
        return table

    fake: Any = types.ModuleType("datasets")
    fake.load_dataset, fake.Audio = load_dataset, dict
    fake.exceptions = types.SimpleNamespace(DatasetsError=NotWholeError)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return table


def test_data_sets_of_hugging_face_are_heard_from_bytes_or_files(hub: Table) -> None:
    data = HuggingFace("set", text="said", speaker="who", test="test[:10%]")
    found = data.read()
    assert hub.undecoded == ["audio", "audio"]
    assert list(found) == ["train", "test"]
    first, second, third = found["train"]
    assert (first.text, first.speaker, first.seconds_of()) == ("one", "7", 0.5)
    assert second.hear().shape == (4_800,)
    with pytest.raises(AdaptError, match="row 2 of the column 'audio' holds no audio"):
        third.seconds_of()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "other", "config": "x"}, r"'other' \(train\) cannot be had: no other, x train"),
        ({"name": "cut"}, r"'cut' \(train\) cannot be had: row 3 is no row"),
        ({"name": "set"}, "'set' has no column 'text'; it has audio, said, who"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        HuggingFace(**settings).read()


def test_the_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AdaptError, match=r"'datasets', which is not installed: pip install 'data"):
        HuggingFace("set").read()


# What is refused, in one line that names it


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,text\n", "names no clip"),
        ("file,words\na.wav,one\n", r"m.csv, line 2: path and text are needed, found \['file'"),
        ("path,text,split\na.wav,one,best\n", "line 2: split 'best' is not allowed: train, val"),
        ("path,text\na.wav,one\nb.wav,two\n", "there is no audio file b.wav"),
        ("path,text\na.wav,\n", "a.wav: the transcript is empty"),
        ("path,text\nlong.wav,one\n", "long.wav lasts 0.70 s, the context is 0.6 s: cut the clip"),
        ("path,text\nfake.wav,one\n", "fake.wav is not audio"),
        (f"path,text\na.wav,{'one two ' * 300}\n", "a.wav: the transcript has 60"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_by_name(content: str, said: str) -> None:
    save_clip("a.wav")
    save_clip("long.wav", 0.7)
    Path("fake.wav").write_text("no audio at all")
    Path("m.csv").write_text(content)
    with pytest.raises(AdaptError, match=said) as refused:
        ready(Manifest("m.csv"))
    assert len(str(refused.value).splitlines()) == 1


def test_a_manifest_that_is_not_there_or_no_text_is_refused_by_name() -> None:
    with pytest.raises(AdaptError, match=r"no manifest gone.csv"):
        read_manifest("gone.csv")
    Path("m.csv").write_bytes(b"path,text\n\xff\xfe,one")
    with pytest.raises(AdaptError, match=r"cannot read the manifest m.csv"):
        read_manifest("m.csv")
    Path("m.jsonl").write_text('{"path": "a.wav", "text": "one"}\n{"path": 3}\n')
    with pytest.raises(AdaptError, match="line 2: path is a text, not 3"):
        read_manifest("m.jsonl")
    Path("m.jsonl").write_text("[1]\nno")
    with pytest.raises(AdaptError, match="line 1 is no object with keys and texts"):
        read_manifest("m.jsonl")


def test_folders_without_transcripts_are_refused_by_name() -> None:
    with pytest.raises(AdaptError, match="no folder gone"):
        read_folders("gone")
    save_clip("d/1.wav")
    with pytest.raises(AdaptError, match="d: no clip has a transcript"):
        read_folders("d")
    save_clip("d/2.wav").with_suffix(".txt").write_text("two")
    with pytest.raises(AdaptError, match=r"d/1.wav: cannot read its transcript d/1.txt"):
        read_folders("d")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"on_bad": "cry"}, "on_bad='cry' is not allowed: error, skip"),
        ({"split_by": "day"}, "split_by='day' is not allowed: clip, speaker"),
        ({"speeds": [0.1]}, r"speeds=\[0.1\] is not allowed: factors from 0.5 to 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        SpeechFolders("d", **settings)


@pytest.mark.parametrize("how", [{"clean_share": 2.0}, {"kinds": []}, {"low": 5.0, "high": 1.0}])
def test_noise_out_of_range_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(AdaptError):
        Noise(**how)


def test_what_cannot_be_used_is_left_out_on_request_and_named() -> None:
    save_manifest("m.csv", count=4)
    lines = Path("m.csv").read_text() + "gone.wav,one,s0,train\nclips/0.wav,,s0,train\n"
    Path("cut.wav").write_bytes(Path("clips/1.wav").read_bytes()[:30])
    Path("m.csv").write_text(lines + "cut.wav,one,s0,train\n")
    with pytest.warns(UserWarning, match="skipped 3 of 7 clips: there is no audio file gone.wav"):
        data = ready(Manifest("m.csv", on_bad="skip", val_share=0.0))
    assert len(data.clips("train")) == 4


# Parts and batches


def test_whole_speakers_are_split_off() -> None:
    save_manifest("m.csv", count=12)
    clips = read_manifest("m.csv")["train"]
    kept, off = split_off(clips, 0.25, "speaker", Generator().manual_seed(0))
    assert len({clip.speaker for clip in off}) == 1
    assert not {clip.speaker for clip in off} & {clip.speaker for clip in kept}
    assert sorted(map(str, [*kept, *off])) == sorted(map(str, clips))
    unnamed = [Clip("x.wav", "", clips[0].hear, clips[0].seconds_of)]
    with pytest.raises(AdaptError, match=r"split_by speaker: x.wav names no speaker"):
        split_off(unnamed, 0.5, "speaker", Generator())


def test_a_batch_holds_each_clips_own_spectrogram_and_its_tokens() -> None:
    save_manifest("m.csv", count=3)
    (batch,) = batches(ready(Manifest("m.csv", val_share=0.0)))
    assert batch.mel.shape == (3, 80, 60)
    for mel, name, text in zip(batch.mel, batch.names, batch.texts, strict=True):
        assert mel.equal(log_mel([read_audio(name)], seconds=0.6)[0])
        assert text == TEXTS[int(Path(name).stem)]
    assert batch.inputs[:, 0].eq(TOKENS.prompt[0]).all()
    assert batch.targets[:, 0].eq(IGNORED).all(), "the prompt is given, not learnt"
    assert batch.targets.eq(TOKENS.eot).sum(1).eq(1).all(), "the end is learnt"


def test_the_prompt_can_be_learnt() -> None:
    save_manifest("m.csv", count=3)
    wants = Wants(80, 0.6, TOKENS, mask_prompt=False)
    (batch,) = batches(ready(Manifest("m.csv", val_share=0.0), wants))
    assert batch.targets[:, 0].eq(TOKENS.prompt[1]).all()


def test_batches_hold_transcripts_of_like_length_in_another_order_each_epoch() -> None:
    save_manifest("m.csv", count=24)
    data = ready(Manifest("m.csv", val_share=0.0, batch_size=5))
    first, second = batches(data, 0), batches(data, 1)
    for epoch in (first, second):
        mixed = sum(len(set(batch.texts)) > 1 for batch in epoch)
        assert mixed <= 2, "of three texts and four batches"
    heard = [[name for batch in epoch for name in batch.names] for epoch in (first, second)]
    assert sorted(heard[0]) == sorted(heard[1])
    assert heard[0] != heard[1]
    again = batches(data, 0)
    assert all(a.mel.equal(b.mel) for a, b in zip(first, again, strict=True))


# How clips are varied


def test_a_speed_is_drawn_among_those_that_fit_the_context() -> None:
    clip = torch.rand(16_000)
    drawn = {
        len(drawn_speed([0.5, 1.0, 1.25], clip, 1.0, Generator().manual_seed(seed)))
        for seed in range(20)
    }
    assert drawn == {16_000, 12_800}
    assert drawn_speed([0.5], clip, 1.0, Generator()) is clip


def test_a_faster_clip_sounds_higher() -> None:
    tone = torch.sin(torch.arange(16_000) * 2 * torch.pi * 400 / 16_000)
    spectrum = torch.fft.rfft(at_speed(tone, 1.25)).abs()
    assert int(spectrum.argmax()) * 16_000 / 12_800 == pytest.approx(500, abs=2)


def masked_columns(mel: Tensor) -> list[int]:
    return [i for i in range(mel.shape[1]) if mel[:, i].unique().numel() == 1]


def test_stretches_are_masked_within_the_clip_only_and_keep_its_mean() -> None:
    mel = torch.rand(80, 100, generator=Generator().manual_seed(0))
    augment = SpecAugment(bands=0, stretches=1, stretch_width=50, stretch_share=1.0)
    widths = set()
    for seed in range(30):
        masked = augment(mel, 40, Generator().manual_seed(seed))
        columns = masked_columns(masked)
        assert columns == list(range(columns[0], columns[-1] + 1)) if columns else True
        assert all(column < 40 for column in columns)
        assert all(masked[0, column] == mel[:, :40].mean() for column in columns)
        widths.add(len(columns))
    assert max(widths) > 20
    assert SpecAugment(bands=0, stretch_share=0.0)(mel, 40, Generator()).equal(mel)


def test_training_is_varied_by_seed_epoch_and_clip_and_validation_is_not() -> None:
    save_manifest("m.csv", count=12)
    how: dict[str, Any] = {"speeds": [0.9, 1.1], "spec_augment": SpecAugment(), "val_share": 0.2}
    data = ready(Manifest("m.csv", **how))
    clips = data.clips("train")
    assert clips[0, 0].mel.equal(clips[0, 0].mel)
    assert not clips[0, 0].mel.equal(clips[1, 0].mel)
    plain = data.clips("val")
    assert plain[0, 0].mel.equal(log_mel([plain.clips[0].hear()], seconds=0.6)[0])


def test_every_part_is_heard_in_noise_and_validation_always_in_the_same() -> None:
    save_manifest("m.csv", count=12)
    noise = Noise(kinds=["white"], low=0, high=5)
    data = ready(Manifest("m.csv", noise=noise, val_share=0.2))
    train, val = data.clips("train"), data.clips("val")
    assert not train[0, 0].mel.equal(train[1, 0].mel)
    clean = log_mel([val.clips[0].hear()], seconds=0.6)[0]
    assert val[0].mel.equal(val[0].mel)
    assert not val[0].mel.equal(clean)
    assert noise.label() == {"category": "white", "snr_db": [0, 5], "convention": "full"}


def test_noise_from_a_folder_is_divided_among_the_parts() -> None:
    for index in range(10):
        save_clip(f"hum/{index}.wav", 0.5, index)
    noise = Noise(folder="hum")
    sources = [noise.scenes(part, 0)["hum"].source for part in ("train", "val", "test")]
    files = [sorted(source.files) for source in sources]  # type: ignore[union-attr]
    assert [len(part) for part in files] == [8, 1, 1]
    assert len({name for part in files for name in part}) == 10
    with pytest.raises(AdaptError, match="hum has no noise 'music'; it has hum"):
        Noise(folder="hum", kinds=["music"]).scenes("train", 0)
