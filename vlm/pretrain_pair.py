"""`polyadapt vlm pretrain-pair`: train the two projections of the offline pair again.

Both towers are frozen, so their features are computed once; minutes on one core. The same bits
for the same data, seed, number of threads and library versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.images.preprocessing import Preprocessing
from ..core.images.sources import Source, Sources, read_arrays
from ..core.images.subsets import few_per_class
from ..core.threads import on_threads
from .offline import IMAGE_PROJECTION, SCALE, TEXT_PROJECTION, WIDTH

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP

CAPTIONS = (
    "a photo of a {}.",
    "a small photo of a {}.",
    "a blurry picture of a {}.",
    "a close-up of one {}.",
    "this is a {}.",
    "an image that shows a {} in the middle.",
    "{}",
)
TEMPERATURE = 100.0  # of the logits, CLIP's last one, which the few-shot protocol takes, too
PER_CLASS, HELD_OUT, STEPS = 80, 20, 300
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


@dataclass(frozen=True)
class Features:
    """What the frozen towers say: images [n, 384], their labels [n], captions [k, classes, 384]."""

    images: Tensor
    labels: Tensor
    captions: Tensor


def main(argv: Sequence[str]) -> int:
    """Run the command; prints which images are used, progress and the accuracy."""
    asked = _parser().parse_args(argv)
    classes = asked.classes.split(",") if asked.classes else None
    with on_threads(asked.threads):
        pretrain_pair(asked.data, asked.out, classes, asked.per_class, asked.seed, asked.steps)
    print(f"written: {asked.out}")
    return 0


def pretrain_pair(
    data: Path,
    out: Path,
    classes: Sequence[str] | None = None,
    per_class: int = PER_CLASS,
    seed: int = 0,
    steps: int = STEPS,
) -> float:
    """Train the projections on some classes of an .npz of images and write them, atomically.

    Only *training* images of `classes` are looked at (None: every second class of the file, from
    its first one): `per_class` of each train the projections, 20 more of each measure them.
    The other classes and the file's test part are never seen, so zero-shot answers about the other
    classes are that. The file records all of it: classes, counts, seed and the data's SHA-256.

    Returns the share of the measuring images that are named right among `classes`. Raises
    `AdaptError` for a class that the data lacks, fewer than two, more images than there are, steps
    below 1 and a folder that is not there.
    """
    from .offline import joined_towers

    if steps < 1 or not out.parent.is_dir():
        raise AdaptError(f"steps={steps}: from 1; {out.parent}: a folder that is there")
    sources = read_arrays(str(data))
    seen = _chosen(sources, classes)
    indices = _indices(sources.train, [sources.classes.index(name) for name in seen], per_class)
    print(f"{len(indices)} training images of {', '.join(seen)}", flush=True)
    features = extract(joined_towers(), sources.train, indices, seen)
    used, held = _divided(features, per_class, seed)
    projections = train(used, seed, steps)
    right = accuracy(held, projections)
    print(f"{len(held.labels)} other training images of these classes: {right:.1%} right")
    record = {
        "classes": list(seen),
        "images": len(used.labels),
        "measured": [len(held.labels), round(right, 4)],
        "seed": seed,
        "steps": steps,
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }
    write(out, projections, record)
    return right


def extract(
    towers: CustomTextCLIP, source: Source, indices: Sequence[int], classes: Sequence[str]
) -> Features:
    """The towers' features before their projections, images one batch after another."""
    from .offline import pair_tokenizer

    wants, tokenizer, found = Preprocessing.of(towers.visual.trunk), pair_tokenizer(), []
    with torch.inference_mode():
        for at in range(0, len(indices), 20):
            views = [wants(source.image(i)) for i in indices[at : at + 20]]
            found.append(towers.visual.trunk(torch.stack(views)))
            print(f"{at + len(views)} of {len(indices)} images", flush=True)
        captions = [_pooled(towers, tokenizer([c.format(n) for n in classes])) for c in CAPTIONS]
    known = sorted({source.labels[i] for i in indices})
    labels = torch.tensor([known.index(source.labels[i]) for i in indices])
    return Features(torch.cat(found).clone(), labels, torch.stack(captions).clone())


def train(features: Features, seed: int = 0, steps: int = STEPS) -> dict[str, Tensor]:
    """Both projections by the cross-entropy of 100 cos(image, caption) over one caption a class.

    The text's starts with orthonormal rows, which keeps the angles between captions well enough
    that classes without images have their place. AdamW on all images at once, a cosine to 0.
    """
    generator = Generator().manual_seed(seed)
    count, classes, width = features.captions.shape
    orthonormal = torch.linalg.qr(torch.randn(width, WIDTH, generator=generator))[0]
    text = orthonormal.t().contiguous().requires_grad_()
    image = torch.randn(WIDTH, features.images.shape[1], generator=generator)
    image = (image / image.shape[1] ** 0.5).requires_grad_()
    optimizer = torch.optim.AdamW([image, text], LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        which = torch.randint(count, (classes,), generator=generator)
        captions = features.captions[which, torch.arange(classes)]
        loss = F.cross_entropy(_logits(features.images, captions, image, text), features.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {IMAGE_PROJECTION: image.detach(), TEXT_PROJECTION: text.detach()}


def accuracy(features: Features, projections: dict[str, Tensor]) -> float:
    """The share of images whose nearest caption, in the first of the wordings, is their class's."""
    image, text = projections[IMAGE_PROJECTION], projections[TEXT_PROJECTION]
    logits = _logits(features.images, features.captions[0], image, text)
    return float((logits.argmax(1) == features.labels).double().mean())


def write(out: Path, projections: dict[str, Tensor], record: dict[str, Any]) -> None:
    """The projections and the scale, with the record as the file's one entry of metadata."""
    from safetensors.torch import save

    scale = {SCALE: torch.tensor(TEMPERATURE).log()}
    write_atomically(out, save({**projections, **scale}, {"pretraining": json.dumps(record)}))


def _logits(images: Tensor, captions: Tensor, image: Tensor, text: Tensor) -> Tensor:
    seen = F.normalize(images @ image.t(), dim=1)
    return TEMPERATURE * seen @ F.normalize(captions @ text.t(), dim=1).t()


def _pooled(towers: CustomTextCLIP, tokens: Tensor) -> Tensor:
    mask = (tokens != towers.text.config.pad_token_id).long()
    pooled: Tensor = towers.text.pooler(
        towers.text.transformer(input_ids=tokens, attention_mask=mask), mask
    )
    return pooled


def _chosen(sources: Sources, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the data's order."""
    wanted = sources.classes[::2] if classes is None else tuple(classes)
    if odd := sorted(set(wanted) - set(sources.classes)):
        raise AdaptError(f"the data has no class {odd[0]!r}; it has {', '.join(sources.classes)}")
    if len(set(wanted)) < 2 or len(set(wanted)) < len(wanted):
        raise AdaptError(f"classes {', '.join(wanted)}: at least two different ones are wanted")
    return tuple(name for name in sources.classes if name in wanted)


def _indices(source: Source, labels: Sequence[int], per_class: int) -> list[int]:
    """The first images of every class: those to train with and those to measure."""
    found = [[i for i, label in enumerate(source.labels) if label == wanted] for wanted in labels]
    fewest = min(map(len, found)) - HELD_OUT
    if not 1 <= per_class <= fewest:
        raise AdaptError(f"per_class={per_class}: from 1 to {fewest}, {HELD_OUT} more measure")
    return sorted(i for images in found for i in images[: per_class + HELD_OUT])


def _divided(features: Features, per_class: int, seed: int) -> tuple[Features, Features]:
    labels = features.labels.tolist()
    used = few_per_class(labels, range(len(labels)), per_class, seed)
    held = sorted(set(range(len(labels))) - set(used))
    images, captions = features.images, features.captions
    return (
        Features(images[used], features.labels[used], captions),
        Features(images[held], features.labels[held], captions),
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt vlm pretrain-pair", description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA.npz", help="images with class names")
    parser.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument("--classes", metavar="A,B,...", help="default: every second class")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="images that train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="a part of what fixes the bits")
    return parser
