"""The bottleneck: its formula by hand, where it acts, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.core import AdaptError, Bottleneck, Site, attach
from polyadapt.core.adapters.bottleneck import BottleneckAdapter, transformer_blocks
from polyadapt.core.errors import SiteError
from polyadapt.core.layers import BlockLayer

HERE = BlockLayer(nn.Identity(), None)  # a bottleneck asks nothing of the frozen layer


def block(width: int) -> Site:
    return Site("blocks.0", None, None, None, "block", (width,), "output", "a whole module")


def built(recipe: Bottleneck, width: int, seed: int = 0) -> BottleneckAdapter:
    adapter = recipe.build(block(width), None, Generator().manual_seed(seed))
    assert isinstance(adapter, BottleneckAdapter)
    return adapter


def fill(adapter: nn.Module, **values: Sequence[object]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            adapter.get_parameter(name).copy_(torch.tensor(value))


def wake(module: nn.Module) -> None:
    """Numbers in place of the zeros of the start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3)


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    ).eval()


# ---- the formula


@pytest.mark.parametrize(
    ("activation", "hidden"),
    [("gelu", 0.8413447), ("relu", 1.0), ("silu", 0.7310586), ("identity", 1.0)],
)
def test_a_bottleneck_by_hand(activation: str, hidden: float) -> None:
    adapter = built(Bottleneck(rank=1, activation=activation, scale=0.5), 2)
    fill(adapter, down=[[1, 0]], up=[[2], [0]], up_bias=[0, 1])
    y = adapter.output(torch.zeros(2), torch.tensor([1.0, 3.0]), HERE)
    torch.testing.assert_close(y, torch.tensor([1 + hidden, 3.5]))


def test_both_biases_act() -> None:
    adapter = built(Bottleneck(rank=1, activation="relu"), 2)
    fill(adapter, down=[[1, 1]], down_bias=[-3], up=[[1], [2]], up_bias=[10, 20])
    y = adapter.output(torch.zeros(2), torch.tensor([1.0, 4.0]), HERE)  # hidden = 1 + 4 - 3 = 2
    assert y.tolist() == [1 + 12, 4 + 24]


def test_the_scale_is_not_divided_by_the_rank() -> None:
    adapter = built(Bottleneck(rank=4, activation="identity", scale=3.0, bias=False), 4)
    fill(adapter, down=torch.eye(4).tolist(), up=torch.eye(4).tolist())
    assert adapter.output(torch.ones(4), torch.ones(4), HERE).tolist() == [4.0] * 4


def test_the_extra_norm_comes_first_and_is_trained() -> None:
    adapter = built(Bottleneck(rank=1, activation="identity", norm=True), 2)
    fill(adapter, down=[[1, 0]], up=[[1], [0]])
    y = torch.tensor([1.0, 5.0])  # normalised: (-1, 1)
    torch.testing.assert_close(adapter.output(y, y, HERE), torch.tensor([0.0, 5.0]))
    fill(adapter, norm_gain=[2, 1], norm_bias=[0.5, 0])
    torch.testing.assert_close(adapter.output(y, y, HERE), torch.tensor([1 - 1.5, 5.0]))


def test_dropout_acts_in_training_only() -> None:
    adapter = built(Bottleneck(rank=64, dropout=0.5, activation="relu"), 64)
    fill(adapter, down=torch.eye(64).tolist(), up=torch.eye(64).tolist())
    ones = torch.ones(64)
    assert set(adapter.train().output(ones, ones, HERE).tolist()) == {1.0, 3.0}
    assert set(adapter.eval().output(ones, ones, HERE).tolist()) == {2.0}


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, False), (True, True)])
def test_the_count_is_that_of_the_formula(bias: bool, norm: bool) -> None:
    adapter = built(Bottleneck(rank=3, bias=bias, norm=norm), 8)
    count = 2 * 8 * 3 + (3 + 8) * bias + 2 * 8 * norm
    assert sum(p.numel() for p in adapter.parameters()) == count


# ---- the start


@pytest.mark.parametrize(
    ("down_init", "bound"), [("xavier", math.sqrt(6 / (256 + 64))), ("kaiming", 1 / 16)]
)
def test_the_down_projection_is_uniform_within_its_bound(down_init: str, bound: float) -> None:
    adapter = built(Bottleneck(rank=64, down_init=down_init), 256)
    down = adapter.tensors().down
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_small_start_has_deviation_1e_4_and_is_no_identity() -> None:
    adapter = built(Bottleneck(rank=64, init="small"), 512)
    assert adapter.tensors().up.std().item() == pytest.approx(1e-4, rel=0.03)
    shift = adapter.tensors().up_bias
    assert shift is not None
    assert shift.std().item() == pytest.approx(1e-4, rel=0.15)
    assert Bottleneck().identity
    assert not Bottleneck(init="small").identity


def test_a_generator_decides_the_start_and_the_global_one_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (built(Bottleneck(), 32, seed) for seed in (5, 5, 6))
    assert torch.equal(one.tensors().down, same.tensors().down)
    assert not torch.equal(one.tensors().down, other.tensors().down)
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_are_fp32_on_the_cpu_whatever_the_defaults_are() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            adapter = Bottleneck(norm=True, init="small").build(block(32), None, None)
    finally:
        torch.set_default_dtype(torch.float32)
    kinds = {(p.dtype, p.device.type) for p in adapter.parameters()}
    assert kinds == {(torch.float32, "cpu")}


# ---- where it acts


def test_serial_after_a_block_adapts_the_blocks_output() -> None:
    vit, image = tiny_vit(), torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    watch = vit.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    vit(image)
    made = attach(vit, Bottleneck(rank=4, scale=0.7), at="blocks.1")
    wake(made)
    vit(image)
    watch.remove()
    base, adapted = seen
    p = dict(made.adapters["blocks.1"].named_parameters())
    inner = F.gelu(base @ p["down"].T + p["down_bias"])
    torch.testing.assert_close(adapted, base + 0.7 * (inner @ p["up"].T + p["up_bias"]))


def test_parallel_to_the_mlp_adapts_what_enters_the_branch() -> None:
    vit, tokens = tiny_vit(), torch.randn(2, 5, 16)
    frozen: Any = vit.blocks[0]
    state = tokens + frozen.attn(frozen.norm1(tokens))
    base = state + frozen.mlp(frozen.norm2(state))
    recipe = Bottleneck(rank=4, placement="parallel_ffn", activation="relu", scale=0.1)
    made = attach(vit, recipe, at="blocks.0")
    wake(made)
    p = dict(made.adapters["blocks.0"].named_parameters())
    inner = F.relu(state @ p["down"].T + p["down_bias"])
    expected = base + 0.1 * (inner @ p["up"].T + p["up_bias"])
    torch.testing.assert_close(frozen(tokens), expected)


def test_pfeiffers_adapter_sits_after_the_mlp_inside_its_branch() -> None:
    vit, tokens = tiny_vit(), torch.randn(2, 5, 16)
    frozen: Any = vit.blocks[0]
    state = tokens + frozen.attn(frozen.norm1(tokens))
    branch = frozen.mlp(frozen.norm2(state))
    made = attach(vit, Bottleneck(rank=4, activation="relu", bias=False), at="blocks.*.mlp")
    wake(made)
    p = dict(made.adapters["blocks.0.mlp"].named_parameters())
    expected = state + branch + F.relu(branch @ p["down"].T) @ p["up"].T
    torch.testing.assert_close(frozen(tokens), expected)


def test_parallel_to_a_linear_layer_maps_its_input_width_to_its_output_width() -> None:
    layers, x = nn.Sequential(nn.Linear(6, 10)), torch.randn(4, 6)
    base = layers(x)
    made = attach(layers, Bottleneck(rank=3, placement="parallel", activation="silu"), at="0")
    assert made.trainable_count() == 3 * 6 + 3 + 10 * 3 + 10
    assert torch.equal(layers(x), base)
    wake(made)
    p = dict(made.adapters["0"].named_parameters())
    inner = F.silu(x @ p["down"].T + p["down_bias"])
    torch.testing.assert_close(layers(x), base + inner @ p["up"].T + p["up_bias"])


def test_parallel_to_a_block_adapts_the_blocks_own_input() -> None:
    vit, tokens = tiny_vit(), torch.randn(2, 5, 16)
    base = vit.blocks[0](tokens)
    made = attach(vit, Bottleneck(rank=4, placement="parallel", bias=False), at="blocks.0")
    wake(made)
    p = dict(made.adapters["blocks.0"].named_parameters())
    expected = base + F.gelu(tokens @ p["down"].T) @ p["up"].T
    torch.testing.assert_close(vit.blocks[0](tokens), expected)


def test_parts_of_a_fused_projection_get_their_own_bottlenecks() -> None:
    vit, x = tiny_vit(), torch.randn(2, 5, 16)
    qkv = vit.get_submodule("blocks.0.attn.qkv")
    base = qkv(x)
    made = attach(vit, Bottleneck(rank=2, placement="parallel"), at="blocks.0.attn.qkv[q,v]")
    wake(made)
    change = (qkv(x) - base).abs().amax(dim=(0, 1)).view(3, 16).amin(dim=1)
    assert change[0] > 0
    assert change[2] > 0
    assert torch.equal(qkv(x)[..., 16:32], base[..., 16:32])


@pytest.mark.parametrize("placement", ["serial", "parallel", "parallel_ffn"])
def test_swins_spatial_blocks_are_adapted_per_token(placement: str) -> None:
    shape: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    swin = SwinTransformer(img_size=16, patch_size=2, window_size=4, **shape).eval()
    image = torch.randn(2, 3, 16, 16)
    seen: dict[str, Tensor] = {}
    first: Any = swin.get_submodule("layers.0.blocks.0")
    hooks = [
        first.register_forward_hook(lambda m, a, out: seen.update(parallel=a[0], serial=out)),
        first.norm2.register_forward_hook(lambda m, a, out: seen.update(parallel_ffn=a[0])),
    ]
    swin(image)
    base, h = seen["serial"], seen[placement].reshape(2, 8, 8, 8)
    for hook in hooks:
        hook.remove()
    made = attach(swin, Bottleneck(rank=2, placement=placement, bias=False))
    assert list(made.adapters) == ["layers.0.blocks.0", "layers.1.blocks.0"]
    assert made.trainable_count() == 2 * 2 * 8 + 2 * 2 * 16
    wake(made)
    first.register_forward_hook(lambda m, a, out: seen.update(adapted=out))
    swin(image)
    p = dict(made.adapters["layers.0.blocks.0"].named_parameters())
    torch.testing.assert_close(seen["adapted"], base + F.gelu(h @ p["down"].T) @ p["up"].T)


# ---- number formats and compilation


def test_a_bf16_backbone_gets_bf16_near_the_fp32_result() -> None:
    adapter = built(Bottleneck(rank=8, norm=True), 32)
    wake(adapter)
    y = torch.randn(4, 32)
    half = adapter.output(y.bfloat16(), y.bfloat16(), HERE)
    assert half.dtype == torch.bfloat16
    exact = adapter.output(y, y, HERE)
    assert (half.float() - exact).norm() < 0.02 * exact.norm()


def test_autocast_keeps_the_outputs_type_and_the_adapters_fp32_gradients() -> None:
    adapter = built(Bottleneck(rank=8, norm=True), 32)
    wake(adapter)
    y = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = adapter.output(y, y, HERE)
    assert cast.dtype == torch.float32
    exact = adapter.output(y, y, HERE)
    assert 0 < (cast - exact).norm() < 0.02 * exact.norm()
    cast.sum().backward()
    gradients = [p.grad for p in adapter.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_a_double_input_is_computed_in_double() -> None:
    adapter = built(Bottleneck(rank=8, norm=True), 32)
    wake(adapter)
    y = torch.randn(4, 32, dtype=torch.float64)
    p = {name: tensor.double() for name, tensor in adapter.named_parameters()}
    normed = F.layer_norm(y, (32,), p["norm_gain"], p["norm_bias"], 1e-6)
    inner = F.gelu(normed @ p["down"].T + p["down_bias"])
    expected = y + inner @ p["up"].T + p["up_bias"]
    torch.testing.assert_close(adapter.output(y, y, HERE), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_an_adapted_vit_compiles_into_one_graph() -> None:
    vit, image = tiny_vit(), torch.randn(2, 3, 16, 16)
    made = attach(vit, Bottleneck(rank=4, placement="parallel_ffn", norm=True))
    wake(made)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), vit(image))


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"rank": True}, "rank True is not allowed"),
        ({"rank": 2.5}, "rank 2.5 is not allowed"),
        ({"placement": "after"}, "placement='after' is not allowed: one of serial, parallel"),
        ({"activation": "tanh"}, "activation='tanh' is not allowed: one of gelu, relu"),
        ({"init": "one"}, "init='one' is not allowed"),
        ({"down_init": "zero"}, "down_init='zero' is not allowed"),
        ({"scale": math.nan}, "scale=nan is not allowed"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed"),
        ({"dropout": -0.1}, "dropout=-0.1 is not allowed"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(AdaptError, match=f"Bottleneck: {told}"):
        Bottleneck(**settings)


def test_a_rank_above_the_width_is_refused_by_site() -> None:
    with pytest.raises(AdaptError, match=r"rank 17 does not fit blocks\.0, which maps 16 to 16"):
        attach(tiny_vit(), Bottleneck(rank=17), at="blocks.0")


@pytest.mark.parametrize(
    ("at", "placement", "kind"),
    [
        ("patch_embed.proj", "serial", "conv2d"),
        ("patch_embed.proj", "parallel", "conv2d"),
        ("blocks.0.attn.qkv", "parallel_ffn", "linear"),
    ],
)
def test_a_site_of_a_kind_that_does_not_suit_is_refused(at: str, placement: str, kind: str) -> None:
    with pytest.raises(
        SiteError, match=f"{at}: a {placement} bottleneck cannot sit on a site of kind {kind}"
    ):
        attach(tiny_vit(), Bottleneck(placement=placement), at=at)


def test_row_numbers_cannot_enter_a_bottleneck() -> None:
    table, rows = nn.Sequential(nn.Embedding(7, 8)), torch.tensor([1, 2])
    with pytest.raises(
        SiteError, match="0: a parallel bottleneck cannot sit on a site of kind embedding"
    ):
        attach(table, Bottleneck(rank=2, placement="parallel"), at="0")
    made = attach(table, Bottleneck(rank=2), at="0")
    base = table(rows)
    wake(made)
    assert not torch.equal(table(rows), base)


def test_channels_that_are_not_last_are_named_when_the_block_is_called() -> None:
    stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
    attach(stem, Bottleneck(rank=2), at="0")
    with pytest.raises(
        SiteError, match=r"0: its serial adapter maps 8 to 8 channels .* \[1, 8, 4, 5\]"
    ):
        stem(torch.randn(1, 3, 4, 5))


def test_a_block_that_drops_tokens_cannot_have_a_parallel_adapter() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.MaxPool2d((2, 1))))  # half the tokens
    attach(model, Bottleneck(rank=2, placement="parallel"), at="0")
    with pytest.raises(SiteError, match=r"given \[3, 4, 8\] to add to \[3, 2, 8\]"):
        model(torch.randn(3, 4, 8))


# ---- a transformer's blocks


class Two(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_blocks_are_found_wherever_the_one_list_is() -> None:
    wrapped = Two(encoder=tiny_vit(), head=nn.Linear(16, 2))
    assert transformer_blocks(wrapped) == ["encoder.blocks.0", "encoder.blocks.1"]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Two(encoder=tiny_vit(), decoder=tiny_vit()), "decoder.blocks and encoder.blocks"),
        (nn.Sequential(nn.Linear(2, 2)), "nothing"),
        (Two(blocks=nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)))), "nothing"),
    ],
)
def test_a_model_without_one_list_of_blocks_needs_a_pattern(model: nn.Module, told: str) -> None:
    with pytest.raises(AdaptError, match=rf"has {told} where one list 'blocks' .* pass at="):
        attach(model, Bottleneck(rank=2))
