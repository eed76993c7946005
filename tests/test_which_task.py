"""Which task of the vision domain a command is for: its data decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from polyadapt.core.errors import AdaptError
from polyadapt.tests.command_cases import write
from polyadapt.vision.medical.data import Case, SegmentationData
from polyadapt.vision.which_task import is_segmentation, refuse_segmentation


class OwnMasks(SegmentationData):
    """A user's own."""

    def read(self) -> list[Case]:
        return []


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ChaseDB1", "ArrayData"):
        write(f"{name}.yaml", {"data": {"class_path": name, "init_args": {"batch_size": 2}}})
    write("short.yaml", {"data": "GeneratedVessels"})
    write("sam.yaml", {"model": {"backbone": {"class_path": "LiteMedSAM"}}, "data": "ChaseDB2"})
    write("none.yaml", {"trainer": {"max_epochs": 1}})
    Path("runs").mkdir()
    write("runs/config.yaml", {"data": {"class_path": "polyadapt.vision.medical.data.ChaseDB1"}})
    for name, text in (("list.yaml", "- 1\n"), ("broken.yaml", "data: [\n"), ("bytes.yaml", "\0")):
        Path(name).write_text(text)


@pytest.mark.parametrize(
    ("words", "masked"),
    [
        ("--config ChaseDB1.yaml", True),
        ("-c ChaseDB1.yaml", True),
        ("--config=ArrayData.yaml", False),
        ("--config short.yaml --data.init_args.train 3", True),
        ("--config ChaseDB1.yaml --config ArrayData.yaml", False),
        ("--config ArrayData.yaml --config ChaseDB1.yaml --config none.yaml", True),
        ("--config ArrayData.yaml --data ChaseDB1", True),
        ("--config ArrayData.yaml --data=ChaseDB1 --data.init_args.root x", True),
        ("--config ChaseDB1.yaml --data.class_path ArrayData", False),
        ("--config ArrayData.yaml --data polyadapt.tests.test_which_task.OwnMasks", True),
        ("--config ArrayData.yaml --data no_such_module.Masks", False),
        ("--config sam.yaml", True),
        ("--config sam.yaml --model.backbone TimmBackbone", False),
        ("--resume runs", True),
        ("--resume runs --data ArrayData", False),
        ("--config none.yaml", False),
        ("--config missing.yaml", False),
        ("--config list.yaml", False),
        ("--config broken.yaml", False),
        ("--config bytes.yaml", False),
        ("--config", False),
        ("--data", False),
        ("--help", False),
        ("", False),
    ],
)
def test_the_data_named_last_decide(words: str, masked: bool) -> None:
    assert is_segmentation("fit", words.split()) == masked


def test_a_configuration_of_any_other_shape_is_left_to_those_who_read_it_all() -> None:
    odd: list[Any] = [None, 3, [], {"class_path": 4}, {"class_path": None}, {"init_args": {}}, ""]
    for number, data in enumerate(odd):
        Path(f"{number}.yaml").write_text(yaml.safe_dump({"data": data}))
        assert not is_segmentation("fit", ["--config", f"{number}.yaml"])


def test_commands_of_classifiers_refuse_pictures_with_masks() -> None:
    refuse_segmentation("compare", Path("ArrayData.yaml"))
    with pytest.raises(AdaptError) as caught:
        refuse_segmentation("compare", Path("ChaseDB1.yaml"))
    said = (
        "`polyadapt vision compare` compares classifiers: ChaseDB1.yaml is of pictures with masks"
    )
    assert str(caught.value).startswith(said)
