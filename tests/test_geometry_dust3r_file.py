"""DUSt3R's files load under their own names, and nothing in them is run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.backbones import Backbone, Dust3rCheckpoint, RandomDust3r
from polyadapt.geometry3d.dust3r import Dust3r, Dust3rSize
from polyadapt.geometry3d.dust3r_file import facts_of, load_dust3r
from polyadapt.geometry3d.heads import HeadKind

PUBLISHED = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', "
    "img_size=(512, 512), head_type='dpt', output_mode='pts3d', depth_mode=('exp', -inf, inf), "
    "conf_mode=('exp', 1, inf), enc_embed_dim=16, enc_depth=1, enc_num_heads=2, "
    "dec_embed_dim=24, dec_depth=4, dec_num_heads=2)"
)


def network(head: HeadKind = "dpt") -> Dust3r:
    torch.manual_seed(1)
    size = Dust3rSize(
        encoder_width=16, encoder_depth=1, encoder_heads=2, width=24, depth=4, heads=2, head=head,
        layer_widths=(4, 6, 8, 10), features=6,
    )  # fmt: skip
    return Dust3r(size).eval()


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fusion's first convolutions lie in the files twice."""
    twice = dict(state)
    for name, tensor in state.items():
        for number in range(4):
            if f".scratch.layer{number + 1}_rn." in name:
                listed = f".scratch.layer_rn.{number}."
                twice[name.replace(f".scratch.layer{number + 1}_rn.", listed)] = tensor
    return twice


def written(folder: Path, text: str = PUBLISHED, head: HeadKind = "dpt", **change: Any) -> Path:
    state = as_published(network(head).state_dict())
    stored = {"model": state, "args": argparse.Namespace(model=text, lr=1e-4), "epoch": 1}
    torch.save({**stored, **change}, folder / "base.pth")
    return folder / "base.pth"


@torch.no_grad()
def same_answers(one: Dust3r, two: Dust3r) -> bool:
    first, second = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = zip(one(first, second), two(first, second), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in pairs)


def test_a_published_file_loads_and_answers_as_the_network_it_came_from(tmp_path: Path) -> None:
    loaded = load_dust3r(written(tmp_path))
    assert loaded.size == network().size
    assert not loaded.training
    assert same_answers(loaded, network())


def test_a_linear_heads_file_loads(tmp_path: Path) -> None:
    text = PUBLISHED.replace("'dpt'", "'linear'")
    assert same_answers(load_dust3r(written(tmp_path, text, "linear")), network("linear"))


def test_a_wrappers_prefix_and_half_precision_load_in_fp32(tmp_path: Path) -> None:
    state = {f"module.{k}": v.half() for k, v in network().state_dict().items()}
    loaded = load_dust3r(written(tmp_path, model=state))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.enc_norm.bias, network().enc_norm.bias)


def test_a_safetensors_file_loads_with_and_without_its_configuration(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in network().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert load_dust3r(tmp_path / "model.safetensors").size.heads == 1  # 64 numbers each, at least
    facts = {
        "conf_mode": ["exp", 1, float("inf")], "depth_mode": ["exp", "-Infinity", "Infinity"],
        "enc_num_heads": 2, "dec_num_heads": 2, "architectures": ["x"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert same_answers(load_dust3r(tmp_path / "model.safetensors"), network())


def test_the_loaded_weights_outlive_their_file(tmp_path: Path) -> None:
    loaded = load_dust3r(written(tmp_path))
    (tmp_path / "base.pth").write_bytes(b"")
    assert same_answers(loaded, network())


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "AsymmetricCroCo3DStereo(enc_depth=__import__('os').getpid())",
        "AsymmetricCroCo3DStereo(enc_depth=[1 for _ in 'ab'][0])",
        "AsymmetricCroCo3DStereo(enc_depth=inf.real)",
        "AsymmetricCroCo3DStereo(24)",
        "AsymmetricCroCo3DStereo(**{'enc_depth': 1})",
        "AsymmetricCroCo3DStereo(enc_depth=-'a')",
        "AsymmetricCroCo3DStereo()()",
        "AsymmetricMASt3R(enc_depth=24)",
        "AsymmetricCroCo3DStereo(enc_depth=" + "(" * 300 + "1" + ")" * 300 + ")",
        "AsymmetricCroCo3DStereo(img_size=(" + "1, " * 3000 + "))",
        "not a call",
        "",
        "a\0b",
    ],
    ids=str.split("os call loop attribute places stars sign twice mast3r deep long words none nul"),
)
def test_a_constructors_text_is_parsed_and_never_run(text: str) -> None:
    with pytest.raises(AdaptError, match=r"^the file's constructor .*$"):
        facts_of(text)


def test_the_published_text_is_known() -> None:
    facts = facts_of(PUBLISHED)
    assert facts["depth_mode"] == ("exp", -float("inf"), float("inf"))
    assert facts["img_size"] == (512, 512)
    assert facts["dec_num_heads"] == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("'RoPE100'", "'cosine'", "pos_embed='cosine'; ours has 'RoPE100'"),
        ("('exp', -inf, inf)", "('linear', -inf, inf)", "depth_mode=.*linear"),
        ("('exp', 1, inf)", "('exp', 0, inf)", "conf_mode=.*0"),
        ("'pts3d'", "'pts3d+desc24'", "output_mode='pts3d.desc24'"),
        ("enc_depth=1", "enc_depth=2", "says enc_depth=2, its tensors 1"),
        ("dec_num_heads=2", "dec_num_heads='2'", "dec_num_heads='2', not a whole number"),
        ("dec_num_heads=2", "dec_num_heads=5", "5 heads of 24 numbers"),
        ("head_type='dpt'", "head_type='linear'", "says head_type='linear', its tensors 'dpt'"),
        ("dec_num_heads=2", "two_confs=True", "option 'two_confs', which is not known"),
    ],
    ids=str.split("positions depth confidence output blocks word heads head option"),
)
def test_a_network_that_ours_is_not_is_refused(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    assert old in PUBLISHED
    with pytest.raises(AdaptError, match=said):
        load_dust3r(written(tmp_path, PUBLISHED.replace(old, new)))


class Foreign:
    """What a pickle would make, were it allowed to."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"epoch": Foreign()},
            "cannot load the checkpoint .* holds more than plain data, which is not run$",
        ),
        ({"model": [1]}, "not a dictionary with an entry 'model'"),
        ({"model": {"patch_embed.proj.weight": "text"}}, "is a str, not a tensor"),
        ({"model": {}}, "not a DUSt3R file: 'patch_embed.proj.weight' is missing"),
        ({"model": {"head_local_features": torch.ones(1)}}, "MASt3R"),
        ({"args": argparse.Namespace(model=3)}, "args.model is a int"),
    ],
    ids=str.split("pickle list text empty mast3r number"),
)
def test_files_that_hold_something_else_are_refused_in_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AdaptError, match=said) as refused:
        load_dust3r(written(tmp_path, **change))
    assert "\n" not in str(refused.value)


def damaged(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    match name:
        case "missing":
            del state["dec_norm.weight"]
        case "extra":
            state["aux.weight"] = torch.ones(1)
        case "shape":
            state["dec_norm.weight"] = torch.ones(3)
        case "differs":
            listed = "downstream_head1.dpt.scratch.layer_rn.0.weight"
            state[listed] = state[listed] + 1
    return state


@pytest.mark.parametrize("name", ["missing", "extra", "shape", "differs"])
def test_a_state_that_does_not_fit_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, model=damaged(name, as_published(network().state_dict())))
    with pytest.raises(AdaptError, match=r"cannot load|hold different numbers") as refused:
        load_dust3r(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("length", [0, 5, 200, 4000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_cut_off_file_is_refused_in_one_line(length: int, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"cut{suffix}"
    file.write_bytes(written(tmp_path).read_bytes()[:length])
    with pytest.raises(AdaptError, match="cannot load the checkpoint") as refused:
        load_dust3r(file)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(AdaptError, match=r"there is no checkpoint 'none\.pth'"):
        load_dust3r("none.pth")


def test_backbones_travel_as_json_and_are_built_again(tmp_path: Path) -> None:
    file = Dust3rCheckpoint(file=str(written(tmp_path)))
    for backbone in (file, RandomDust3r(seed=3)):
        again = Backbone.from_json(json.loads(json.dumps(backbone.to_json())))
        assert again == backbone
        one, two = backbone.build(), again.build()
        assert isinstance(one, Dust3r)
        assert isinstance(two, Dust3r)
        assert same_answers(one, two)
    assert not same_answers(RandomDust3r(seed=3).build(), RandomDust3r(seed=4).build())
