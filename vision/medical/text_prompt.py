"""Names of classes as text features of a CLIP, computed once: the start of a text prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.building import made, refuse_code, seeded, whole
from ...core.errors import AdaptError


@dataclass(frozen=True, kw_only=True)
class ClipText:
    """One of open_clip's text towers: class names -> float32 [m, t], frozen.

    `template` holds one `{}` for the name. `pretrained=None` draws random weights; `options` go to
    `open_clip.create_model`. The default is the CLIP (arXiv 2103.00020) that SALT reads.

    Raises `AdaptError` for what cannot be made or fetched; random weights never stand in.
    """

    name: str = "ViT-B-32-quickgelu"
    pretrained: str | None = "openai"
    template: str = "{}"
    options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def features(self, names: Sequence[str]) -> Tensor:
        """The text features of these class names, not normalised."""
        if isinstance(names, str) or not names:
            raise AdaptError(f"a text prompt needs a list of class names, not {names!r}")
        if self.template.count("{}") != 1:
            raise AdaptError(f"template {self.template!r} is not allowed: it holds one {{}}")
        refuse_code(self.options)
        weights = self.pretrained is not None
        hint = " (without a network: a file, or a learned token)" if weights else ""
        with seeded(0), made(f"open_clip's {self.name!r}{hint}"):
            import open_clip

            make = partial(open_clip.create_model, pretrained=self.pretrained)
            model = whole(
                partial(make, self.name, require_pretrained=weights, **self.options), self
            )
            model.eval()
            texts = open_clip.get_tokenizer(self.name)(
                [self.template.replace("{}", name) for name in names],
                context_length=model.context_length,
            )
            features: Tensor = model.encode_text(texts)
        return features.float()
