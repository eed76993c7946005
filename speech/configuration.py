"""What the configurations of the speech domain are made of."""

from __future__ import annotations

from ..core.configuration import Domain
from .backbones import Backbone
from .data import SpeechData
from .measured import TEST_TABLE, TRANSCRIPTS, Measured
from .task import SpeechRecognition, backbone_of

DOMAIN = Domain(
    name="speech",
    things="speech",
    task=SpeechRecognition,
    data=SpeechData,
    backbone=Backbone,
    subclasses=[Backbone],
    backbone_of=backbone_of,
    measured=Measured,
    test_files=[TEST_TABLE, TRANSCRIPTS],
    next_words="transcribe --set {adapter} FILE ...",
)
