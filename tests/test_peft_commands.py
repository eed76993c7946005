"""`polyadapt adapters import` and `export`, and folders on the hub."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from torch import nn

from polyadapt.core import (
    AdaLoRA,
    AdaptError,
    BitFit,
    DoRA,
    LoRA,
    attach,
    cli,
    container,
    export_peft,
    import_peft,
    load,
)
from polyadapt.core.peft.command import export_file
from polyadapt.tests.law_table import stir
from polyadapt.tests.peft_cases import apart, loaded, nested, peft_model, saved, states, tensors

MODEL = "polyadapt.tests.peft_cases:nested"


class Convolved(nn.Sequential):
    """A convolution and a fused projection, which an export needs the backbone for."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 4, 3)
            self.qkv = nn.Linear(4, 12)


def run(*words: str | Path) -> int:
    return cli.main(["adapters", *map(str, words)])


def test_import_writes_a_file_that_gives_pefts_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = peft_model(nested(), ["fc", "proj"], "DoRA")
    expected = made(states())
    saved(made, tmp_path / "peft")
    out = tmp_path / "pets.safetensors"
    assert run("import", tmp_path / "peft", "--model", MODEL, "--name", "pets", "--out", out) == 0
    printed = capsys.readouterr()
    assert (printed.out.startswith(f"{out}: DoRA("), printed.err) == (True, "")
    model = nested()
    assert load(model, out).name == "pets"
    assert apart(model(states()), expected) <= 1e-6


@pytest.mark.parametrize(
    "recipe", [LoRA(rank=2, alpha=3), DoRA(rank=2), AdaLoRA(rank=2)], ids=lambda r: type(r).__name__
)
def test_export_needs_no_model_for_plain_layers(recipe: Any, tmp_path: Path) -> None:
    model = nested()
    ours = stir(attach(model, recipe, ["fc", "proj"]))
    ours.save(tmp_path / "set.safetensors")
    assert run("export", tmp_path / "set.safetensors", "--out", tmp_path / "set") == 0
    assert apart(loaded(nested(), tmp_path / "set")(states()), model(states())) <= 1e-6
    export_peft(ours, tmp_path / "live")
    live = tensors(tmp_path / "live")
    assert all(torch.equal(t, live[key]) for key, t in tensors(tmp_path / "set").items())


def test_a_forged_file_is_refused_before_it_is_exported(tmp_path: Path) -> None:
    file = tmp_path / "set.safetensors"
    attach(nested(), DoRA(rank=2), "fc").save(file)
    record, found = container.read(file)
    changes: list[tuple[str, torch.Tensor | None]] = [
        ("fc/A", None),
        ("fc/m", None),
        ("fc/A", torch.ones(())),
        ("fc/A", torch.ones(3, 6)),
        ("fc/B", torch.ones(2, 6)),
        ("fc/E", torch.ones(2)),
    ]
    for key, tensor in changes:
        forged = {k: t for k, t in found.items() if k != key}
        container.write(file, record, forged if tensor is None else {**forged, key: tensor})
        with pytest.raises(AdaptError, match=f"the file: (tensor )?'{key}'"):
            export_file(file, None, None, str(tmp_path / "out"))
    record["sites"][0]["shape"] = [6]
    container.write(file, record, found)
    with pytest.raises(AdaptError, match="not a matrix"):
        export_file(file, None, None, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_export_asks_for_the_model_where_the_file_does_not_say_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = tmp_path / "set.safetensors", f"{__name__}:Convolved"
    for at in ("conv", "qkv[q,v]"):
        attach(Convolved(), LoRA(rank=2), at).save(file)
        assert run("export", file, "--out", tmp_path / "set") == 2
        assert "give its backbone too (--model)" in capsys.readouterr().err
        assert run("export", file, "--model", model, "--out", tmp_path / at) == 0
        capsys.readouterr()
    a = tensors(tmp_path / "conv")["base_model.model.conv.lora_A.weight"]
    assert a.shape == (2, 2, 3, 3)


def test_weights_of_a_file_are_loaded_first(tmp_path: Path) -> None:
    other = nested()
    with torch.no_grad():
        other.fc.weight.add_(1)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    saved(peft_model(nested(), ["fc"]), tmp_path / "peft")
    weights, out = tmp_path / "w.safetensors", tmp_path / "set.safetensors"
    words = ("import", tmp_path / "peft", "--model", MODEL, "--weights", weights, "--out", out)
    assert run(*words) == 0
    load(other, out)  # its fingerprint is that of the weights
    with pytest.raises(AdaptError, match="other weights"):
        load(nested(), out)


def test_a_timm_model_is_named_by_its_name(tmp_path: Path) -> None:
    import timm

    name = "test_vit"
    model = timm.create_model(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    export_peft(attach(model, LoRA(rank=2), "blocks.*.attn.qkv"), tmp_path / "peft")
    own = ("--weights", tmp_path / "w.safetensors", "--out", tmp_path / "set.safetensors")
    assert run("import", tmp_path / "peft", "--model", f"timm:{name}", *own) == 0


def test_bad_words_are_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(peft_model(nested(), ["fc"]), tmp_path / "peft")
    file, out = tmp_path / "set.safetensors", tmp_path / "out"
    attach(nested(), BitFit(), "**.bias").save(file)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    double = saved(peft_model(nested().double(), ["fc"]), tmp_path / "double")
    asked: list[tuple[tuple[str | Path, ...], str]] = [
        (("import", folder, "--out", out), "--model"),
        (("import", tmp_path, "--model", MODEL, "--out", out), "has no adapter_config.json"),
        (("import", folder, "--model", "nested", "--out", out), "timm:NAME or"),
        (("import", folder, "--model", "no_such:f", "--out", out), "cannot import no_such"),
        (("import", folder, "--model", "torch.nn:f", "--out", out), "has no function 'f'"),
        (("import", folder, "--model", "builtins:dict", "--out", out), "not a torch module"),
        (("import", folder, "--model", "torch.nn:Linear", "--out", out), "without arguments: "),
        (("import", folder, "--model", ".nested:f", "--out", out), "package.module:function"),
        (("import", folder, "--model", "timm:vit", "--out", out), "needs --weights"),
        (("import", folder, "--model", "torch.nn:Identity", "--out", out), "Identity"),
        (("import", double, "--model", MODEL, "--out", out), "fp64"),
        (("export", file, "--out", out), "BitFit has no form"),
        (("export", tmp_path / "none", "--out", out), "there is no adapter file"),
        (("export", file, "--weights", file, "--out", out), "--model"),
        (("export", file, "--model", MODEL, "--out", out), "BitFit has no form"),
    ]
    for weights, words in (("w", "cannot be read"), ("x", "does not fit"), ("y", "no checkpoint")):
        own = (tmp_path / f"{weights}.safetensors", "--out", out)
        asked.append((("import", folder, "--model", MODEL, "--weights", *own), words))
    own = (tmp_path / "x.safetensors", "--out", out)
    asked.append((("import", folder, "--model", "timm:no", "--weights", *own), "Unknown model"))
    for argv, words in asked:
        assert run(*argv) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("polyadapt: ")
        assert words in line
        assert not out.exists()


def test_the_hub_is_pulled_from_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = peft_model(nested(), ["fc"])
    saved(made, tmp_path / "cache")
    asked = []

    def download(**settings: Any) -> str:
        asked.append(settings)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_peft(nested(), tmp_path / "cache")
    assert not asked
    model = nested()
    import_peft(model, "hub:owner/name")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [{"repo_id": "owner/name", "allow_patterns": files}]
    assert apart(model(states()), made(states())) <= 1e-6


def test_the_hub_is_pushed_to_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def upload(repo_id: str, folder_path: Path) -> None:
        shutil.copytree(folder_path, tmp_path / "there")
        done.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda **s: done.append(s))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    ours = stir(attach(nested(), LoRA(rank=2), "fc"))
    export_peft(ours, "hub:owner/name")
    assert done == [{"repo_id": "owner/name", "exist_ok": True}, "owner/name"]
    again = import_peft(nested(), tmp_path / "there")
    assert torch.equal(again.state_dict()["fc/B"], ours.state_dict()["fc/B"])


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attach(nested(), LoRA(rank=2), "fc")
    answer: Any = SimpleNamespace(headers={}, request=None)
    (transport,) = (c for c in RepositoryNotFoundError.__mro__ if c.__name__ == "HTTPError")
    unreachable: Any = transport  # of the library that this version of the hub uses
    failures: list[Exception] = [
        LocalEntryNotFoundError("it cannot\nbe reached"),
        RepositoryNotFoundError("404\nnot found", response=answer),
        unreachable("no route"),
        OSError("disk"),
        ValueError("name"),
    ]
    for failure in failures:

        def fails(failure: Exception = failure, **settings: Any) -> None:
            raise failure

        for name in ("snapshot_download", "create_repo"):
            monkeypatch.setattr(huggingface_hub, name, fails)
        first = str(failure).splitlines()[0]
        with pytest.raises(AdaptError, match=f"^cannot pull hub:owner/name: {first}$"):
            import_peft(nested(), "hub:owner/name")
        with pytest.raises(AdaptError, match=f"^cannot push to hub:owner/name: {first}$"):
            export_peft(ours, "hub:owner/name")
    for name in ("hub:name", "hub:a/b/c", "hub:/x", "hub:"):
        with pytest.raises(AdaptError, match="is no repository: hub:owner/name"):
            import_peft(nested(), name)
        with pytest.raises(AdaptError, match="is no repository: hub:owner/name"):
            export_peft(ours, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AdaptError, match="pip install huggingface_hub"):
        import_peft(nested(), "hub:owner/name")


def test_the_written_config_is_short_and_pefts(tmp_path: Path) -> None:
    export_peft(attach(nested(), LoRA(rank=2, alpha=4), "fc"), tmp_path / "set")
    config = json.loads((tmp_path / "set" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["fc"]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
