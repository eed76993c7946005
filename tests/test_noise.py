"""Mixing: the SNR that was asked for is there, by the convention that the label names."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from polyadapt.core import AdaptError
from polyadapt.speech.audio import SAMPLE_RATE
from polyadapt.speech.noise import (
    FULL,
    Active,
    Full,
    Label,
    convention_named,
    fitted,
    mix,
    scaled,
    usable,
)

SPEECH = torch.tensor([1.0, -1.0, 1.0, -1.0]) / 8
NOISE = torch.tensor([2.0, 0.0, -2.0, 0.0]) / 8


def noise(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, generator=Generator().manual_seed(seed)) / 10


def snr(speech: Tensor, added: Tensor, convention: Full | Active = FULL) -> float:
    return 10 * math.log10(convention.power(speech) / convention.power(added))


@pytest.mark.parametrize(
    ("decibels", "gain"), [(0, 0.70710678), (10, 0.22360680), (-10, 2.23606798)]
)
def test_the_gain_is_the_one_computed_by_hand(decibels: float, gain: float) -> None:
    said, added = scaled(SPEECH, NOISE, decibels)
    torch.testing.assert_close(added, gain * NOISE, atol=1e-7, rtol=0)
    assert torch.equal(said, SPEECH)
    assert snr(said, added) == pytest.approx(decibels, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    said=st.integers(1, 3000),
    heard=st.integers(1, 3000),
    decibels=st.floats(-30, 40),
    loudness=st.floats(1e-4, 30),
    convention=st.sampled_from([Full(), Active(), Active(40.0)]),
    seed=st.integers(0, 99),
)
def test_any_lengths_any_loudness_any_snr_are_mixed_exactly(
    said: int, heard: int, decibels: float, loudness: float, convention: Full | Active, seed: int
) -> None:
    speech, added = scaled(
        noise(said, 1) * loudness,
        noise(heard, 2),
        decibels,
        convention,
        Generator().manual_seed(seed),
    )
    assert speech.shape == added.shape == (said,)
    assert snr(speech, added, convention) == pytest.approx(decibels, abs=1e-3)
    assert float((speech + added).abs().max()) <= 1 + 1e-6


def test_a_mixture_that_would_clip_is_scaled_as_a_whole() -> None:
    speech, loud = noise(4000) * 8, noise(4000, 1)
    said, added = scaled(speech, loud, 0)
    mixture = mix(speech, loud, 0)
    assert float(mixture.abs().max()) == pytest.approx(1, abs=1e-6)
    assert snr(said, added) == pytest.approx(0, abs=1e-5)
    assert snr(0.25 * said, 0.25 * added) == pytest.approx(0, abs=1e-5)  # a gain on the mixture
    torch.testing.assert_close(mixture, said + added)
    assert mix(speech / 80, loud, 0).abs().max() < 1  # what fits is left alone
    assert torch.equal(scaled(speech / 80, loud, 0)[0], speech / 80)


def test_a_pause_of_half_the_clip_is_three_decibels_between_the_conventions() -> None:
    speech = noise(2 * SAMPLE_RATE)
    speech[SAMPLE_RATE:] = 0
    said, added = scaled(speech, noise(2 * SAMPLE_RATE, 1), 5, "full")
    assert snr(said, added) == pytest.approx(5, abs=1e-5)
    assert snr(said, added, Active()) == pytest.approx(8.0, abs=0.2)


def test_the_active_range_decides_which_frames_count() -> None:
    quiet = torch.cat([torch.ones(SAMPLE_RATE), torch.full((SAMPLE_RATE,), 0.02)])  # 34 dB below
    assert Active(30).power(quiet) == pytest.approx(1, abs=0.02)
    assert Active(40).power(quiet) == pytest.approx(0.5, abs=0.02)


def test_a_signal_shorter_than_a_frame_counts_in_full() -> None:
    assert Active().power(SPEECH) == Full().power(SPEECH)


def test_noise_of_a_second_fills_three_and_a_half_and_ten_seconds_are_cut_to_them() -> None:
    length = int(3.5 * SAMPLE_RATE)
    for heard in (SAMPLE_RATE, 10 * SAMPLE_RATE):
        speech, loudening = noise(length), noise(heard, 1) * torch.linspace(0.01, 1, heard)
        said, added = scaled(speech, loudening, 3)  # the used part, not the whole file, counts
        assert added.shape == (length,)
        assert snr(said, added) == pytest.approx(3, abs=1e-5)


def test_without_a_generator_the_part_is_the_start_and_with_one_it_moves() -> None:
    ramp = torch.arange(1000.0)
    assert torch.equal(fitted(ramp, 10), ramp[:10])
    starts = {float(fitted(ramp, 10, Generator().manual_seed(seed))[0]) for seed in range(8)}
    assert len(starts) > 4
    again = [fitted(ramp, 2500, Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(again[0], again[1])


def test_a_seam_is_faded_over_ten_milliseconds_without_a_click() -> None:
    level = fitted(torch.linspace(0, 1, SAMPLE_RATE), 2 * SAMPLE_RATE)
    period = SAMPLE_RATE - SAMPLE_RATE // 100
    steps = level.diff().abs()
    assert float(steps.max()) < 0.02  # a hard seam steps by 1
    assert torch.equal(level[:period], torch.linspace(0, 1, SAMPLE_RATE)[:period])
    later = slice(period + SAMPLE_RATE // 100, SAMPLE_RATE + period - SAMPLE_RATE // 100)
    assert torch.equal(level[later], torch.linspace(0, 1, SAMPLE_RATE)[SAMPLE_RATE // 100 : period])


def test_a_seam_keeps_the_power_of_noise() -> None:
    tiled = fitted(noise(SAMPLE_RATE), 40 * SAMPLE_RATE)
    assert Full().power(tiled) == pytest.approx(Full().power(noise(SAMPLE_RATE)), rel=0.02)


def test_silent_speech_stays_silent_whatever_the_noise() -> None:
    assert torch.equal(mix(torch.zeros(100), noise(100), 0), torch.zeros(100))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"noise": torch.zeros(10)}, "the noise is silent where it is used"),
        ({"noise": torch.tensor([1.0, math.nan])}, "the noise holds NaN or infinite samples"),
        ({"speech": torch.tensor([1.0, math.inf])}, "the speech holds NaN or infinite samples"),
        ({"speech": torch.zeros(2, 10)}, r"the speech has shape \[2, 10\]: one channel"),
        ({"speech": torch.zeros(0)}, "the speech is empty"),
        ({"noise": torch.zeros(4, dtype=torch.int16)}, "the noise is torch.int16: floating point"),
        ({"rate": 8000}, "the speech has 8000 samples a second: resample it to 16000 first"),
        ({"snr_db": math.nan}, "an SNR of nan dB is not allowed: from -100 to 100 dB"),
        ({"snr_db": math.inf}, "an SNR of inf dB is not allowed"),
        ({"convention": "loud"}, "unknown SNR convention 'loud'; allowed: full, active, active-D"),
        ({"convention": "active-0"}, "an active level of 0.0 dB is not allowed"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(changed: dict[str, object], said: str) -> None:
    asked = {"speech": SPEECH, "noise": NOISE, "snr_db": 0.0, **changed}
    with pytest.raises(AdaptError, match=said) as error:
        mix(**asked)  # type: ignore[arg-type]
    assert str(error.value).isprintable()


def test_a_signal_of_doubles_becomes_single_precision() -> None:
    assert usable(SPEECH.double()).dtype == torch.float32


@pytest.mark.parametrize(
    "label", [Label("babble", 2.5, Active(40.0)), Label("music", -5.0), Label("clean")]
)
def test_a_label_names_its_convention_and_survives_json(label: Label) -> None:
    assert Label.from_json(label.to_json()) == label
    assert convention_named(str(label.convention)) == label.convention


def test_a_label_reads_as_a_sentence_would() -> None:
    assert str(Label("babble", 2.5, Active())) == "babble at 2.5 dB (active-30)"
    assert str(Label("clean")) == "clean"
