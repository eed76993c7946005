"""A backbone's forward as a chain of blocks, which `PrefixCache` may cut before any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import AdaptError
from .sets import sets_of

Function = Callable[[Tensor], Tensor]

_RANDOM = ("p", "drop_prob", "prob", "dropout")  # of dropout, timm's drop path and patch dropout


@dataclass(frozen=True)
class Block:
    """A link of the chain: where it lies in the backbone, what it computes, and with which module.

    The function is the module's, or has layout changes around it.
    """

    path: str
    module: nn.Module
    function: Function


@dataclass(frozen=True, kw_only=True)
class Chain:
    """forward(x) = end(block_n(... block_1(embed(x)))), every state one tensor [n, ...].

    embedding: the modules of `embed`; owner: the module whose own parameters it uses, too (such as
    a table of positions); after: paths behind the blocks; whole: all blocks in one call, for sets
    that act on their list as a whole; fixed_statistics: running statistics are never updated.
    """

    embed: Function
    blocks: Sequence[Block]
    end: Function
    embedding: Sequence[nn.Module]
    owner: nn.Module
    after: Sequence[str]
    whole: Function | None = None
    fixed_statistics: bool = False

    def first_adapted(self, backbone: nn.Module) -> int:
        """The first block with a site of any attached set; their number if no block is adapted."""
        first = len(self.blocks)
        for name, adapters in sets_of(backbone).items():
            for site in adapters.adapters:
                first = min(first, self._block_of(name, site))
        return first

    def _block_of(self, name: str, site: str) -> int:
        for number, block in enumerate(self.blocks):
            if _within(site, block.path):
                return number
            if self.whole is not None and _within(block.path, site):
                return 0
        if not any(_within(site, path) for path in self.after):
            raise AdaptError(f"set {name!r} adapts {site!r}: nothing before it can be cached")
        return len(self.blocks)

    def prefix(self, first: int) -> list[nn.Module]:
        """The modules that the state entering block `first` depends on."""
        return [*self.embedding, *(block.module for block in self.blocks[:first])]

    def require_repeatable(self, first: int) -> None:
        """Refuse a prefix whose states differ from call to call."""
        for module in (inner for outer in self.prefix(first) for inner in outer.modules()):
            name = type(module).__name__
            if not self.fixed_statistics and has_statistics(module):
                raise AdaptError(
                    f"a prefix with {name} cannot be cached: its statistics are a batch's"
                )
            rates = [getattr(module, rate, 0) for rate in _RANDOM]
            if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
                raise AdaptError(
                    f"a prefix with {name} above 0 cannot be cached: it draws at random"
                )


def has_statistics(module: nn.Module) -> bool:
    """Whether training mode would have it use, and change, a batch's statistics."""
    return getattr(module, "running_mean", None) is not None


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def vision_transformer(backbone: nn.Module) -> Chain:
    """The chain of a timm `VisionTransformer`; any other backbone is refused by name."""
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer.forward, VisionTransformer.forward_features
    if (
        not isinstance(backbone, VisionTransformer)
        or (type(backbone).forward, type(backbone).forward_features) != plain
    ):
        raise AdaptError(
            f"a prefix cannot be cached for {type(backbone).__name__}: only for timm's"
            " VisionTransformer, whose forward is known"
        )
    model = backbone
    return Chain(
        embed=lambda x: model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))),
        blocks=[Block(f"blocks.{n}", block, block) for n, block in enumerate(model.blocks)],
        end=lambda x: model.forward_head(model.norm(x)),
        embedding=[model.patch_embed, model.pos_drop, model.patch_drop, model.norm_pre],
        owner=model,
        after=("norm", "fc_norm", "head", "attn_pool"),
        whole=model.blocks,
    )
