"""The pointmap networks that a configuration can name."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..core import backbone as core
from ..core.building import seeded
from .dust3r import SITES, Dust3r, Dust3rSize
from .dust3r_file import load_dust3r
from .heads import PATCH, HeadKind
from .pointmaps import PointmapNetwork
from .small import HEIGHT, TOKEN, WIDTH, small_network
from .weights import Calibrated


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """A frozen pointmap network on the CPU, in eval mode.

    >>> Backbone.from_json(SmallPointmaps(focal=50.0).to_json())
    SmallPointmaps(focal=50.0, pretrained=True, file=None, seed=0)
    """

    default_sites: ClassVar[tuple[str, ...]]
    """Patterns of the layers that a scene's set adapts."""
    divisor: ClassVar[int]
    """What both sides of an image must divide by."""
    image_size: ClassVar[tuple[int, int]]
    """(height, width) of a landscape image that the network was trained on."""
    gate: ClassVar[float] = Calibrated.gate
    """Initial weights below it count as 0; see `Calibrated`."""

    @abstractmethod
    def build(self) -> PointmapNetwork: ...


@dataclass(frozen=True, kw_only=True)
class Dust3rCheckpoint(Backbone):
    """A DUSt3R file of yours, such as DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth.

    The authors' weights are CC BY-NC-SA 4.0: not for commercial use. Nothing in the file is run.

    Raises `AdaptError` for a file that cannot be read, or holds something else.
    """

    default_sites = SITES
    divisor = PATCH
    image_size = (384, 512)

    file: str

    def build(self) -> Dust3r:
        return load_dust3r(self.file)


@dataclass(frozen=True, kw_only=True)
class RandomDust3r(Backbone):
    """A network of DUSt3R's kind with random weights from `seed`, small unless told otherwise.

    It knows nothing of geometry: for tests, and to measure time and memory.

    >>> network = RandomDust3r(encoder_depth=1, depth=1, head="linear").build()
    >>> len(network.enc_blocks), network.training
    (1, False)
    """

    default_sites = SITES
    divisor = PATCH
    image_size = (48, 64)

    encoder_width: int = 32
    encoder_depth: int = 2
    encoder_heads: int = 2
    width: int = 32
    depth: int = 4
    heads: int = 2
    head: HeadKind = "dpt"
    seed: int = 0

    def build(self) -> Dust3r:
        narrow = self.width // 4  # of the DPT head, as far narrower than the blocks as published
        size = Dust3rSize(
            encoder_width=self.encoder_width,
            encoder_depth=self.encoder_depth,
            encoder_heads=self.encoder_heads,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            head=self.head,
            layer_widths=(self.width // 8, narrow, self.width // 2, self.width),
            features=self.width // 3,
        )
        with seeded(self.seed):
            return Dust3r(size).eval()


@dataclass(frozen=True, kw_only=True)
class SmallPointmaps(Backbone):
    """The small network whose weights lie in this repository: 64 x 48 pixels, focal length known.

    `focal` in pixels of those images. `file`: weights that `pretrain-small` wrote, instead of the
    packaged ones. `pretrained=False` draws random weights from `seed`.

    >>> SmallPointmaps(pretrained=False, focal=50.0).build().focal
    50.0
    """

    default_sites = ("**.attn.qkv",)
    divisor = TOKEN
    image_size = (HEIGHT, WIDTH)
    gate = 0.0  # on hard scenes it is sure of little, and rightly so: 0.5 would leave 12 to 29 %

    focal: float = float(WIDTH)
    pretrained: bool = True
    file: str | None = None
    seed: int = 0

    def build(self) -> PointmapNetwork:
        with seeded(self.seed):
            return small_network(self.focal, self.pretrained, self.file).eval()
