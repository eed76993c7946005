"""The audio-visual fusion module: its published size, windows, head layouts and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError
from polyadapt.speech.fusion import Fusion, FusionLayer, FusionSizes, WindowedFusion, trimmed

SMALL = FusionSizes(
    audio_channels=4,
    audio_blocks=3,
    video_channels=(4, 6, 8, 8),
    video_blocks=(1, 1, 1, 1),
    inner=4,
    crop=32,
    layers=2,
    heads=2,
)
FEATURES = replace(SMALL, features=6)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_module_has_its_published_size_and_keeps_the_mel_s_shape() -> None:
    fusion = Fusion().eval()
    parts = [count(part) for part in (fusion.audio, fusion.video, fusion.attention)]
    assert parts == [1_635_808, 7_732_112, 3_822_960]
    assert count(fusion) == 13_190_880
    with torch.no_grad():
        assert fusion(torch.randn(1, 80, 200), torch.randn(1, 1, 50, 88, 88)).shape == (1, 80, 200)


@pytest.mark.parametrize(("frames", "mels"), [(50, 200), (80, 320), (1, 4)])
@pytest.mark.parametrize("sizes", [SMALL, FEATURES], ids=["crops", "features"])
def test_video_at_25_hz_becomes_features_at_100_hz(
    sizes: FusionSizes, frames: int, mels: int
) -> None:
    fusion = Fusion(sizes).eval()
    assert fusion.video(_video(sizes, frames)).shape == (1, mels, 80)
    assert fusion(torch.randn(1, 80, mels), _video(sizes, frames)).shape == (1, 80, mels)


def _video(sizes: FusionSizes, frames: int, batch: int = 1) -> Tensor:
    if sizes.features:
        return torch.randn(batch, frames, sizes.features)
    return torch.randn(batch, 1, frames, sizes.crop, sizes.crop)


def _reached(layer: FusionLayer, frame: int) -> list[int]:
    """The frames of one window whose output changes with one key frame (its own value apart)."""
    layer = layer.double()
    q, a = torch.randn(2, 1, 160, 8, dtype=torch.double)
    other, seen = a.clone(), torch.ones(1, 160, dtype=torch.bool)
    other[0, frame] += 1
    with torch.no_grad():
        changed = (layer(q, a, seen) != layer(q, other, seen)).any(-1)[0]
    return [int(n) for n in changed.nonzero()]


def test_one_key_frame_reaches_its_whole_window() -> None:
    assert _reached(FusionLayer(8, 12), 5) == list(range(160))


def test_in_the_public_layout_a_frame_reaches_fourteen() -> None:
    """160 frames x 12 slots in rows of 160: a row holds 13 1/3 frames, cut at its ends."""
    layer = FusionLayer(8, 12, public_layout=True)
    assert _reached(layer, 5) == list(range(14))
    assert _reached(layer, 13) == list(range(27))  # it lies in two rows


def test_a_layer_is_attention_of_whole_width_heads_then_a_linear_map() -> None:
    """LN(MHA(q, a, a) + a), LN(W x + x), written out head by head."""
    layer = FusionLayer(4, 3)
    q, a = torch.randn(2, 2, 8, 4)
    queries, keys, values = (
        m(t).split(4, dim=-1) for m, t in ((layer.query, q), (layer.key, a), (layer.value, a))
    )
    heads = [
        (one @ key.mT / 4**0.5).softmax(-1) @ value
        for one, key, value in zip(queries, keys, values, strict=True)
    ]
    x = layer.norms[0](layer.out(torch.cat(heads, dim=-1)) + a)
    wanted = layer.norms[1](layer.linear(x) + x)
    found = layer(q, a, torch.ones(2, 8, dtype=torch.bool))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_both_layouts_have_the_same_parameters() -> None:
    ours, public = Fusion(FEATURES), Fusion(replace(FEATURES, public_layout=True))
    public.load_state_dict(ours.state_dict())
    inputs = torch.randn(1, 80, 160), _video(FEATURES, 40)
    assert not torch.allclose(ours.eval()(*inputs), public.eval()(*inputs))


def test_windows_overlap_by_half_and_give_their_middle_halves() -> None:
    windowed = WindowedFusion(1, 1, 1, 8)
    x = torch.arange(20.0).view(1, 20, 1)
    windows = windowed._windows(x)
    assert windows[:, :, 0].tolist()[1] == [4, 5, 6, 7, 8, 9, 10, 11]
    assert len(windows) == 4  # starts 0, 4, 8 and 12
    marked = windows + 100 * torch.arange(4.0).view(4, 1, 1)
    joined = windowed._joined(marked.view(1, 4, 8, 1))[0, :, 0]
    assert (joined % 100).tolist() == list(range(20))
    assert (joined // 100).tolist() == [0] * 6 + [1] * 4 + [2] * 4 + [3] * 6


@pytest.mark.parametrize("frames", [4, 156, 160, 164, 240, 244, 500])
def test_any_length_is_windowed_and_joined_again(frames: int) -> None:
    windowed = WindowedFusion(3, 1, 1, 160)
    x = torch.randn(2, frames, 3)
    windows = windowed._windows(x)
    joined = windowed._joined(windows.view(2, -1, 160, 3))
    assert torch.equal(joined[:, :frames], x)
    assert not joined[:, frames:].any()
    assert joined.shape[1] % 80 == 0


def test_padding_is_hidden_from_attention() -> None:
    """What the layers see of a short clip does not depend on the length of the window."""
    torch.manual_seed(0)
    short = WindowedFusion(4, 2, 2, 16)
    long = WindowedFusion(4, 2, 2, 32)
    long.load_state_dict(short.state_dict())
    a, v = torch.randn(2, 1, 16, 4)
    assert torch.allclose(short(a, v), long(a, v), atol=1e-6)


def test_windows_that_are_not_kept_do_not_reach_each_other() -> None:
    """A frame reaches the frames of the windows that hold it, no further."""
    windowed = WindowedFusion(4, 2, 2, 16).double()
    a, v = torch.randn(2, 1, 64, 4, dtype=torch.double)
    other = a.clone()
    other[0, 2] += 1  # in the first window alone, of which frames 0 to 11 are kept
    changed = (windowed(a, v) != windowed(other, v)).any(-1)[0].nonzero()
    assert [int(n) for n in changed] == list(range(12))


def test_the_clips_of_a_batch_do_not_meet() -> None:
    fusion = Fusion(SMALL).eval()
    mel, video = torch.randn(3, 80, 168), _video(SMALL, 42, batch=3)
    with torch.no_grad():
        together = fusion(mel, video)
        alone = fusion(mel[1:2], video[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_every_parameter_learns() -> None:
    for sizes in (SMALL, FEATURES):
        fusion = Fusion(sizes)
        fusion(torch.randn(2, 80, 160), _video(sizes, 40, batch=2)).square().sum().backward()
        assert all(p.grad is not None for p in fusion.parameters())
        # A key's bias moves all scores of a query alike.
        still = [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
        assert all(name.endswith("key.bias") for name in still)


@pytest.mark.parametrize(
    ("mel", "video", "words"),
    [
        ((1, 80, 160), (1, 1, 41, 32, 32), "41 video frames at 25 Hz are 164 mel frames"),
        ((1, 79, 160), (1, 1, 40, 32, 32), r"the mel is \[1, 79, 160\], expected \[batch, 80, t\]"),
        ((80, 160), (1, 1, 40, 32, 32), r"the mel is \[80, 160\]"),
        ((1, 80, 160), (1, 3, 40, 32, 32), r"expected \[1, 1, f, 32, 32\]"),
        ((1, 80, 160), (1, 1, 40, 88, 88), r"expected \[1, 1, f, 32, 32\]"),
        ((2, 80, 160), (1, 1, 40, 32, 32), r"expected \[2, 1, f, 32, 32\]"),
        ((1, 80, 0), (1, 1, 0, 32, 32), r"the video is \[1, 1, 0, 32, 32\]"),
        ((1, 80, 160), (40,), r"the video is \[40\]"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    mel: tuple[int, ...], video: tuple[int, ...], words: str
) -> None:
    with pytest.raises(AdaptError, match=words) as refusal:
        Fusion(SMALL)(torch.zeros(mel), torch.zeros(video))
    assert "\n" not in str(refusal.value)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"expected \[1, f, 6\]"):
        Fusion(FEATURES)(torch.zeros(1, 80, 160), torch.zeros(1, 40, 7))


def test_mel_and_video_are_cut_to_the_time_that_both_have() -> None:
    mel, video = trimmed(torch.zeros(80, 330), torch.zeros(80, 88, 88))
    assert (mel.shape, video.shape) == ((80, 320), (80, 88, 88))
    mel, video = trimmed(torch.zeros(80, 303), torch.zeros(80, 88, 88))
    assert (mel.shape, video.shape) == ((80, 300), (75, 88, 88))
    with pytest.raises(AdaptError, match="the video has 81"):
        trimmed(torch.zeros(80, 300), torch.zeros(81, 88, 88))


def test_sizes_survive_json() -> None:
    assert FusionSizes.from_json(json.loads(json.dumps(FEATURES.to_json()))) == FEATURES


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"heads": 2.0},
        {"window": 162},
        {"audio_blocks": 1},
        {"features": -1},
        {"video_channels": [4, 8]},
        {"video_blocks": (1, 1, 1, True)},
        {"depth": 2},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match=next(iter(wrong))):
        FusionSizes.from_json(wrong)
