"""What the configurations of audio-visual sets are made of."""

from __future__ import annotations

from ..core.configuration import Domain
from .avsr import AudioVisualDistillation
from .backbones import Backbone
from .filmed_data import FilmedData
from .task import backbone_of

DOMAIN = Domain(
    name="speech",
    things="filmed speech",
    task=AudioVisualDistillation,
    data=FilmedData,
    backbone=Backbone,
    subclasses=[Backbone],
    backbone_of=backbone_of,
    next_words="transcribe --set {adapter} FILE ... --video MOUTH ...",
    called={"fit": "fit-av", "validate": "validate-av"},
)
