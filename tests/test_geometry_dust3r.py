"""Our transformer of DUSt3R's kind: published size and names, maps, one encoding, adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import LoRA, attach, select
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.dust3r import ALL_ATTENTION, SITES, Dust3r, Dust3rSize
from polyadapt.geometry3d.heads import DPTHead, HeadKind, LinearHead, points_of

TINY = Dust3rSize(
    encoder_width=16, encoder_depth=2, encoder_heads=2, width=24, depth=4, heads=2,
    layer_widths=(4, 6, 8, 10), features=6,
)  # fmt: skip


def tiny(size: Dust3rSize = TINY) -> Dust3r:
    torch.manual_seed(0)
    return Dust3r(size).eval()


def images(count: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def published() -> Dust3r:
    with torch.device("meta"):
        return Dust3r(Dust3rSize())


def test_the_published_size_has_571171208_parameters(published: Dust3r) -> None:
    assert sum(p.numel() for p in published.parameters()) == 571_171_208


def test_modules_have_the_names_in_the_published_files(published: Dust3r) -> None:
    shapes = {name: list(p.shape) for name, p in published.named_parameters()}
    expected = {
        "mask_token": [1, 1, 768],
        "patch_embed.proj.weight": [1024, 3, 16, 16],
        "enc_blocks.23.attn.qkv.weight": [3072, 1024],
        "enc_norm.bias": [1024],
        "decoder_embed.weight": [768, 1024],
        "dec_blocks.11.norm_y.weight": [768],
        "dec_blocks2.0.cross_attn.projk.weight": [768, 768],
        "dec_blocks2.11.mlp.fc1.weight": [3072, 768],
        "dec_norm.weight": [768],
        "downstream_head1.dpt.act_postprocess.0.1.weight": [96, 96, 4, 4],
        "downstream_head1.dpt.act_postprocess.3.1.weight": [768, 768, 3, 3],
        "downstream_head1.dpt.scratch.layer3_rn.weight": [256, 384, 3, 3],
        "downstream_head2.dpt.scratch.refinenet4.resConfUnit1.conv2.bias": [256],
        "downstream_head2.dpt.scratch.refinenet1.out_conv.weight": [256, 256, 1, 1],
        "downstream_head2.dpt.head.4.weight": [4, 128, 1, 1],
    }
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("sites", "numbers"), [(SITES, 4_521_984), (ALL_ATTENTION, 6_488_064)], ids=["default", "all"]
)
def test_rank_16_on_the_published_size_has_the_published_numbers(
    sites: tuple[str, ...], numbers: int
) -> None:
    with torch.device("meta"):
        published = Dust3r(Dust3rSize())
    adapters = attach(published, LoRA(rank=16), sites, "scene")
    trained = [p for p in adapters.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == numbers
    assert sum(p.numel() * p.element_size() for p in trained) == 4 * numbers


def test_a_set_of_the_published_size_is_a_file_of_18087936_bytes_and_a_header(
    published: Dust3r, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backbone has no numbers here that a digest could be made of.
    monkeypatch.setattr("polyadapt.core.store.fingerprint", lambda *_: {})
    adapters = attach(published, LoRA(rank=16), SITES, "scene")
    adapters.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.zero_()
    file = tmp_path / "scene.safetensors"
    adapters.save(file)
    adapters.detach()
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == 18_087_936
    assert header < 200_000


def test_the_default_sites_are_every_attentions_inputs_and_nothing_of_the_heads() -> None:
    sites = select(tiny(), SITES)
    assert len(sites) == 2 + 2 * 4 * 4
    assert {site.path.rsplit(".", 1)[-1] for site in sites} == {"qkv", "projq", "projk", "projv"}
    assert not [site for site in sites if "head" in site.path]


@torch.no_grad()
def test_a_raw_vector_becomes_a_point_as_far_as_its_length_says() -> None:
    raw = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    points, confidence = points_of(raw)
    length = raw[:, :3].norm(dim=1)
    torch.testing.assert_close(points.norm(dim=-1), length.exp() - 1)
    torch.testing.assert_close(points / points.norm(dim=-1, keepdim=True),
                               (raw[:, :3] / length[:, None]).movedim(1, -1))  # fmt: skip
    torch.testing.assert_close(confidence, 1 + raw[:, 3].exp())
    assert points_of(torch.zeros(1, 4, 1, 1))[0].tolist() == [[[[0, 0, 0]]]]


def test_a_raw_vector_of_zeros_has_a_finite_gradient() -> None:
    raw = torch.zeros(1, 4, 1, 1, requires_grad=True)
    sum(part.sum() for part in points_of(raw)).backward()  # type: ignore[union-attr]
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("head", ["dpt", "linear"])
@torch.no_grad()
def test_every_pixel_of_both_images_gets_a_point_and_a_confidence(head: HeadKind) -> None:
    network = tiny(replace(TINY, head=head))
    pair = network(images(2, 48, 80), images(2, 32, 48, seed=1))
    assert [tuple(part.shape) for part in pair] == [
        (2, 48, 80, 3), (2, 48, 80), (2, 32, 48, 3), (2, 32, 48),
    ]  # fmt: skip
    assert all(part.isfinite().all() for part in pair)
    assert min(pair.confidence1.min(), pair.confidence2.min()) > 1


@torch.no_grad()
def test_a_linear_heads_numbers_lie_in_their_tokens_pixels() -> None:
    head = LinearHead(1)
    head.proj.weight.zero_()
    head.proj.bias.copy_(torch.arange(1024.0))
    raw = head([torch.zeros(1, 2, 1)], 1, 2)
    assert raw.shape == (1, 4, 16, 32)
    assert torch.equal(raw[0, 0, 3, 16:], torch.arange(48.0, 64))  # channel 0, row 3 of token 2
    assert torch.equal(raw[0, 2, :, 0], torch.arange(512.0, 768, 16))


@torch.no_grad()
def test_a_dpt_head_reads_the_encoder_and_three_layers_of_the_decoder() -> None:
    torch.manual_seed(0)
    head = DPTHead(6, 4, 12, (4, 4, 4, 4), 32)
    layers = [torch.randn(1, 6, 6), *(torch.randn(1, 6, 4) for _ in range(12))]
    whole = head(layers, 2, 3)
    assert whole.shape == (1, 4, 32, 48)
    changed = []
    for number in range(13):
        other = [layer + (number == k) for k, layer in enumerate(layers)]
        changed.append(not torch.equal(head(other, 2, 3), whole))
    assert [number for number, moved in enumerate(changed) if moved] == [0, 6, 9, 12]


@torch.no_grad()
def test_both_answers_depend_on_both_images() -> None:
    network, first, second = tiny(), images(), images(seed=1)
    pair, other = network(first, second), network(first, second.flip(-1))
    assert not torch.allclose(pair.points1, other.points1)
    assert not torch.allclose(pair.points2, network(first.flip(-1), second).points2)


@torch.no_grad()
def test_pairs_in_both_orders_are_encoded_once() -> None:
    network, a, b = tiny(), images(), images(seed=1)
    first, second = (torch.stack(both, 1).flatten(0, 1) for both in ((a, b), (b, a)))
    encoded: list[int] = []
    network.enc_norm.register_forward_hook(lambda _m, _a, out: encoded.append(len(out)))
    together = network(first, second)
    assert encoded == [4]
    apart = [network(first[k : k + 1], second[k : k + 1]) for k in range(4)]
    assert encoded == [4, 2, 2, 2, 2]
    for part, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(parts), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_heads_run_in_fp32_under_autocast() -> None:
    network = tiny()
    seen: dict[str, torch.dtype] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _a, out, name=name: seen.__setitem__(name, out.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        pair = network(images(1), images(1, seed=1))
    assert {part.dtype for part in pair} == {torch.float32}
    assert {t for name, t in seen.items() if "head" in name} == {torch.float32}
    assert seen["dec_blocks.0.attn.qkv"] == torch.bfloat16


def test_a_new_set_changes_no_bit_and_leaves_heads_and_mlps_without_gradients() -> None:
    network, first, second = tiny(), images(), images(seed=1)
    before = network(first, second)
    adapters = attach(network, LoRA(rank=2), SITES, "scene")
    after = network(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sum(part.mean() for part in after).backward()
    trained = {id(p) for p in adapters.parameters()}
    assert {id(p) for p in network.parameters() if p.grad is not None} == trained
    assert all(p.grad is None for n, p in network.named_parameters() if ".mlp." in n)


@pytest.mark.parametrize("height", [40, 8])
def test_sides_that_do_not_divide_by_16_are_refused(height: int) -> None:
    with pytest.raises(AdaptError, match=f"images of {height} x 48 pixels: .* divide by 16"):
        tiny()(images(height=height), images())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "5 heads of 24 numbers"),
        ({"encoder_heads": 0}, "0 heads"),
        ({"depth": 3}, "3 decoder blocks"),
    ],
    ids=["heads", "none", "depth"],
)
def test_sizes_that_no_network_has_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        replace(TINY, **change)  # type: ignore[arg-type]
