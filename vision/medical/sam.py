"""One thin interface over Segment Anything models: images and prompts -> one mask per prompt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import AdaptError

if TYPE_CHECKING:
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to segment in b images: m masks of each. With nothing given, m = 1 and SAM guesses.

    Places are (x, y) in pixels of the network's square input. `labels`: 1 belongs to the object,
    0 does not, -10 is padding (of points that are fewer than another mask's); all 1 unless given.
    `tokens` are prompts without a place, such as a learned class token or a text's.
    """

    boxes: Tensor | None = None
    """[b, m, 4]: x0, y0, x1, y1."""
    points: Tensor | None = None
    """[b, m, n, 2]."""
    labels: Tensor | None = None
    """[b, m, n]."""
    tokens: Tensor | None = None
    """[m, t, d], the same for every image, or [b, m, t, d]."""

    def to(self, device: torch.device) -> Prompt:
        """The same where the images are."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Prompt(**{name: t if t is None else t.to(device) for name, t in given.items()})


class SegmentAnything(nn.Module):
    """SAM (arXiv 2304.02643) with single-mask output: the module that adapters are attached to.

    With s = `img_size`, p the pixels per side of an embedding and d = `width`:

    - `encode`: images [b, 3, s, s], as a `View` makes them -> embeddings [b, d, s / p, s / p]
    - `decode`: embeddings and a prompt -> logits [b, m, 4 s / p, 4 s / p] of low resolution
    - a call does both and enlarges the logits to [b, m, s, s], bilinearly as SAM does

    `vision_encoder` returns the embeddings, or has them in `last_hidden_state`; the other two parts
    are transformers' classes. Raises `AdaptError` for images or prompts of another shape.
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        prompt_encoder: SamPromptEncoder,
        mask_decoder: SamMaskDecoder,
    ) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @property
    def img_size(self) -> int:
        """s: height and width of the images."""
        return int(self.prompt_encoder.input_image_size)

    @property
    def width(self) -> int:
        """d of embeddings and prompt tokens."""
        return int(self.prompt_encoder.hidden_size)

    @property
    def mark(self) -> Tensor:
        """What a point on the object adds to its place, [1, d]."""
        return self.get_parameter("prompt_encoder.point_embed.1.weight")

    def forward(
        self, images: Tensor, prompt: Prompt | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Logits [b, m, s, s]; `embeddings` are what `encode` gave for the images, if it is known.

        A mask is where they are above 0.
        """
        found = self.encode(images) if embeddings is None else embeddings
        low = self.decode(found, prompt)
        return F.interpolate(low, images.shape[-2:], mode="bilinear", align_corners=False)

    def encode(self, images: Tensor) -> Tensor:
        """Images [b, 3, s, s] -> embeddings [b, d, s / p, s / p]."""
        size = self.img_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise AdaptError(f"images are [b, 3, {size}, {size}], not {list(images.shape)}")
        return self._encoded(images)

    def _encoded(self, images: Tensor) -> Tensor:
        found = self.vision_encoder(images)
        embeddings: Tensor = getattr(found, "last_hidden_state", found)
        return embeddings

    def decode(self, embeddings: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Embeddings [b, d, g, g] -> logits [b, m, 4 g, 4 g]."""
        sparse, dense = self._embedded(prompt or Prompt(), len(embeddings))
        return self._masks(embeddings, sparse, dense)[:, :, 0]

    def _masks(self, embeddings: Tensor, sparse: Tensor | None, dense: Tensor) -> Tensor:
        """Logits [b, m, 1, 4 g, 4 g]."""
        masks: Tensor = self.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=self._positions(embeddings),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]
        return masks

    def _embedded(self, prompt: Prompt, images: int) -> tuple[Tensor | None, Tensor]:
        """Prompt tokens [b, m, t, d], or None without a prompt, and SAM's "no mask" embedding."""
        tokens = _check(prompt, images, self.width)
        points, labels = prompt.points, prompt.labels
        if points is not None and labels is None:
            labels = torch.ones(points.shape[:-1], dtype=torch.int64, device=points.device)
        sparse, dense = self.prompt_encoder(
            input_points=points, input_labels=labels, input_boxes=prompt.boxes, input_masks=None
        )
        given = [part for part in (sparse, tokens) if part is not None]
        return (torch.cat(given, dim=2) if given else None), dense

    def _positions(self, embeddings: Tensor) -> Tensor:
        """Where each embedding lies, [b, d, g, g]: SAM's Fourier features of the cells' centres."""
        rows, columns = (
            (torch.arange(n, device=embeddings.device, dtype=torch.float32) + 0.5) / n
            for n in embeddings.shape[-2:]
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        embedded: Tensor = self.prompt_encoder.shared_embedding(torch.stack([x, y], dim=-1)[None])
        places = embedded.permute(0, 3, 1, 2).to(embeddings.dtype)
        return places.expand(len(embeddings), -1, -1, -1)


def _check(prompt: Prompt, images: int, width: int) -> Tensor | None:
    """The prompt's tokens as [b, m, t, d]; shapes that do not fit each other are refused by name.

    Unrefused, transformers would broadcast a batch of one, or mix up masks and points.
    """
    tokens = prompt.tokens
    if tokens is not None and tokens.ndim == 3:
        tokens = tokens.expand(images, *tokens.shape)
    wanted = {"boxes": (2, (4,)), "points": (3, (2,)), "labels": (3, ()), "tokens": (3, (width,))}
    given = {"boxes": prompt.boxes, "points": prompt.points, "labels": prompt.labels}
    shapes = {n: t.shape for n, t in {**given, "tokens": tokens}.items() if t is not None}
    for name, shape in shapes.items():
        dims, last = wanted[name]
        fits = len(shape) == dims + len(last) and tuple(shape[dims:]) == last
        if not fits or shape[0] != images:
            letters = ["m", "t" if name == "tokens" else "n"][: dims - 1]
            form = ", ".join([str(images), *letters, *map(str, last)])
            raise AdaptError(f"{name} of {images} images are [{form}], not {list(shape)}")
    if len({shape[1] for shape in shapes.values()}) > 1:
        found = ", ".join(f"{name} for {shape[1]}" for name, shape in shapes.items())
        raise AdaptError(f"the parts of a prompt are for equally many masks, not {found}")
    if "labels" in shapes and ("points" not in shapes or shapes["points"][:-1] != shapes["labels"]):
        raise AdaptError("labels are one per point: there are other, or no, points")
    return tokens
