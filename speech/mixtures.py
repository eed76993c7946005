"""Clips in noise that is always the same, so that several sets can be compared on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .clips import Clip
from .noise import Label
from .scenes import Scene, seeded


@dataclass(frozen=True)
class Mixture:
    """A clip in a scene; what is drawn for it is a function of its place."""

    clip: Clip
    scene: Scene
    place: tuple[int | str, ...]

    def draw(self) -> tuple[Tensor, Label]:
        """The samples [n] and what they are."""
        return self.scene.draw(self.clip.hear(), seeded(*self.place), self.clip.speaker)


def grid(
    clips: Sequence[Clip],
    scenes: Mapping[str, Scene],
    levels: Sequence[float],
    place: tuple[int | str, ...],
) -> list[Mixture]:
    """Each clip in each scene, at one of the SNRs in turn; at several where clips are few.

    So every scene is heard at every SNR. A scene without noise is heard once by each clip.

    >>> from .scenes import synthetic_scenes
    >>> clips = [Clip(name, "", None, None) for name in "abcd"]
    >>> made = grid(clips, synthetic_scenes(("music", "pink")), (0.0, 5.0), ("val",))
    >>> [(m.clip.name, m.scene.category, *m.scene.snr_db) for m in made[:3]]
    [('a', 'music', 0.0), ('a', 'pink', 5.0), ('b', 'music', 5.0)]
    """
    rounds = -(-len(levels) // len(clips)) if clips else 0
    made = []
    for i, clip in enumerate(clips):
        for turn in range(rounds):
            for c, (name, scene) in enumerate(scenes.items()):
                if turn and scene.source is None:
                    continue
                level = levels[(i + c + turn * len(clips)) % len(levels)]
                at = (*place, clip.name, name)
                made.append(Mixture(clip, replace(scene, snr_db=(level,)), at))
    return made
