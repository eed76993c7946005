"""Does the fusion module use the mouth? Voices in noise, with video and without; mel and states.

Generated voices of 1.6 s and generated mouths that open with them (`mouth_video`, 88 x 88 at half
its size): no licensed video can be had here, so this shows that the module learns and where video
helps, not what it would reach on people. Two small modules are trained alike per seed on the mel's
loss alone: one sees the mouth, one always that of another clip, from which it learns nothing. (A
constant picture would be no fair rival: batch-norm divides it by its own variance, 0, and such a
module breaks in eval mode.) Measured on other voices in other noise: mean |mel - clean mel|, and
mean |states - states of the clean mel| in the encoder of the frozen Whisper tiny.en. `wrong video`:
the module that sees, shown another clip's mouth.

Run: python benchmarks/speech_avsr.py [--seeds 3] [--steps 150] [--clips 96]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.speech.audio import log_mel
from polyadapt.speech.avsr import mel_loss
from polyadapt.speech.fusion import Fusion, FusionSizes
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.mouth_crops import normalised
from polyadapt.speech.mouth_video import mouth_video
from polyadapt.speech.noise import mix
from polyadapt.speech.offline import whisper_tiny_en
from polyadapt.speech.scenes import seeded
from polyadapt.speech.synthetic import GENERATORS, speech_like

SECONDS, SAMPLES, FRAMES = 1.6, 25_600, 160
KINDS = ("side", "babble")
LEVELS = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0)
MEASURES = ("mel", "states")
WAYS = ("noisy mel", "audio alone", "with video", "wrong video")
TESTED = 24  # clips of each kind at each level
POOL = 24  # noises of each kind to train with
SIZES = FusionSizes(
    audio_channels=8,
    audio_blocks=3,
    video_channels=(4, 8, 8, 16),
    video_blocks=(1, 1, 1, 1),
    inner=8,
    crop=44,
    layers=3,
    heads=2,
)

Figures = dict[tuple[str, str, float, str], Tensor]
"""(measure, kind, level, way) -> an error for every clip."""


class Voices:
    """Clips, made once: samples and mouth crops as the network gets them."""

    def __init__(self, count: int, *place: int | str) -> None:
        drawn = [seeded(*place, n) for n in range(count)]
        self.sounds = [speech_like(SAMPLES, generator) / 10 for generator in drawn]
        films = [mouth_video(s, g) for s, g in zip(self.sounds, drawn, strict=True)]
        pictures = torch.stack([normalised(film) for film in films])
        self.video = F.avg_pool3d(pictures, (1, 2, 2))  # 88 x 88 at half the size: a core is slow
        self.clean = log_mel(self.sounds, seconds=SECONDS)


def noises(count: int, *place: int | str) -> dict[str, list[Tensor]]:
    """So many of each kind, as long as a clip."""
    return {k: [GENERATORS[k](SAMPLES, seeded(*place, k, n)) for n in range(count)] for k in KINDS}


def batches(voices: Voices, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Noisy mels and the clips that they are of; kinds by chance, SNRs uniform in -15 to 10 dB."""
    pool = noises(POOL, seed, "noise")
    for step in range(steps):
        generator = seeded(seed, "batch", step)
        indices = torch.randint(len(voices.sounds), (size,), generator=generator).tolist()
        kinds = torch.randint(len(KINDS), (size,), generator=generator).tolist()
        levels = (25 * torch.rand(size, generator=generator) - 15).tolist()
        mixed = []
        for i, kind, snr in zip(indices, kinds, levels, strict=True):
            n, shift = torch.randint(SAMPLES, (2,), generator=generator).tolist()
            mixed.append(mix(voices.sounds[i], pool[KINDS[kind]][n % POOL].roll(shift), snr))
        yield log_mel(mixed, seconds=SECONDS), indices


def trained(voices: Voices, seeing: bool, steps: int, size: int, seed: int) -> Fusion:
    """A module that has been trained on the same mixtures, with the mouth or another clip's."""
    torch.manual_seed(seed)
    fusion = Fusion(SIZES)
    optimizer = AdamW(fusion.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, 3e-3, total_steps=steps)
    frames, losses = torch.full((size,), FRAMES), []
    for step, (mel, indices) in enumerate(batches(voices, steps, size, seed)):
        count = len(voices.sounds)
        other = [(i + 1 + step % (count - 1)) % count for i in indices]
        shown = indices if seeing else other
        loss = mel_loss(fusion(mel, voices.video[shown]), voices.clean[indices], frames)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fusion.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    tail = sum(losses[-50:]) / len(losses[-50:])
    name = "with video" if seeing else "audio alone"
    print(
        f"  seed {seed}, {name}: loss {losses[0]:.3f} at first, {tail:.3f} in the end", flush=True
    )
    return fusion.eval()


@torch.no_grad()
def measured(modules: Mapping[str, Fusion], voices: Voices, speech: Speech, seed: int) -> Figures:
    """The errors of each way for every test clip, the same mixtures for all ways."""
    found: Figures = {}
    video = voices.video
    wanted = speech.encode(voices.clean)
    for kind, several in noises(len(video), seed, "test noise").items():
        for level in LEVELS:
            pairs = zip(voices.sounds, several, strict=True)
            noisy = log_mel([mix(sound, n, level) for sound, n in pairs], seconds=SECONDS)
            mels = {
                "noisy mel": noisy,
                "audio alone": modules["audio alone"](noisy, video.roll(1, 0)),
                "with video": modules["with video"](noisy, video),
                "wrong video": modules["with video"](noisy, video.roll(1, 0)),
            }
            for way, mel in mels.items():
                states = speech.encode(mel)
                found["mel", kind, level, way] = (mel - voices.clean).abs().mean((1, 2))
                found["states", kind, level, way] = (states - wanted).abs().mean((1, 2))
    return found


def interval(differences: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of resampled clips: [seeds, clips] pairs, clips drawn for all seeds."""
    generator = seeded("bootstrap")
    clips = torch.randint(differences.shape[1], (draws, differences.shape[1]), generator=generator)
    means = differences.mean(0)[clips].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def report(runs: list[Figures]) -> bool:
    """A table for each measure and kind; True when video wins at -5 dB and below everywhere."""
    won = True
    for measure in MEASURES:
        for kind in KINDS:
            print(f"\nL1 of the {measure}, {kind}: mean (smallest to largest seed)")
            print(f"{'dB':>4}  " + "  ".join(f"{way:<21}" for way in WAYS) + "  gained by video")
            for level in LEVELS:
                each = {
                    way: torch.stack([run[measure, kind, level, way] for run in runs])
                    for way in WAYS
                }
                gain = each["audio alone"] - each["with video"]
                low, high = interval(gain)
                cells = "  ".join(f"{spread(each[way]):<21}" for way in WAYS)
                share = float(gain.mean() / each["audio alone"].mean())
                print(f"{level:>4g}  {cells}  {share:.1%} [{low:+.4f}, {high:+.4f}]")
                won = won and (level > -5 or low > 0)
    return won


def spread(errors: Tensor) -> str:
    """Mean over clips and seeds, and that of the best and the worst seed."""
    seeds = errors.mean(1)
    return f"{float(seeds.mean()):.3f} ({float(seeds.min()):.3f} to {float(seeds.max()):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("seeds", 3), ("steps", 150), ("clips", 96), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    one_thread()
    begin = time.perf_counter()
    print(machine("openai-whisper"))
    count = sum(p.numel() for p in Fusion(SIZES).parameters())
    print(
        f"{count:,} parameters; {asked.steps} steps of {asked.batch} clips of {SECONDS} s out of"
        f" {asked.clips}; {TESTED} other clips; {asked.seeds} seeds"
    )
    speech, runs = speech_of(whisper_tiny_en().eval()), []
    for seed in range(asked.seeds):
        voices, others = Voices(asked.clips, seed, "train"), Voices(TESTED, seed, "test")
        ways = {"audio alone": False, "with video": True}
        modules = {
            way: trained(voices, seeing, asked.steps, asked.batch, seed)
            for way, seeing in ways.items()
        }
        runs.append(measured(modules, others, speech, seed))
    won = report(runs)
    verdict = "beats" if won else "does not everywhere beat"
    print(f"\nat -5 dB and below, with video {verdict} audio alone (intervals above 0)")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
