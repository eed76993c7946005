"""One thin interface over the two Whisper classes: openai-whisper's and that of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whisper.decoding import DecodingResult, Inference, PyTorchInference
from whisper.model import ModelDimensions, Whisper

from ..core.errors import AdaptError
from .decoding import MULTILINGUAL, Decoding, Listener, decode
from .names import Layout
from .tokens import Prompt, Tokens

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class Speech(ABC):
    """A Whisper of either class. Adapters are attached to `model`, and act in all methods.

    `speech_of(model)` makes the right one.
    """

    layout: Layout

    def __init__(self, model: nn.Module, dims: ModelDimensions) -> None:
        self.model = model
        self.dims = dims

    @property
    def multilingual(self) -> bool:
        """The vocabulary holds languages and tasks."""
        return bool(self.dims.n_vocab >= MULTILINGUAL)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokens(self, prompt: Prompt | None = None) -> Tokens:
        """Texts as this model's tokens."""
        return Tokens(self.dims.n_vocab, prompt, self.dims.n_text_ctx)

    def encode(self, mel: Tensor) -> Tensor:
        """Spectrograms [b, n_mels, frames] -> states [b, frames / 2, d], in the dtype of `mel`.

        `frames` is any even number up to the model's own (3000). Whisper's classes take that one
        alone; a shorter context is the same forward with the first positions only, and much
        cheaper, but a model hears badly in a context that it was not trained for.
        """
        most = 2 * self.dims.n_audio_ctx
        if mel.ndim != 3 or mel.shape[1] != self.dims.n_mels:
            raise AdaptError(
                f"spectrograms are [b, {self.dims.n_mels}, frames], not {list(mel.shape)}"
            )
        if mel.shape[2] % 2 or not 0 < mel.shape[2] <= most:
            raise AdaptError(f"frames are an even number from 2 to {most}, not {mel.shape[2]}")
        return self._encode(mel, whole=mel.shape[2] == most)

    @abstractmethod
    def _encode(self, mel: Tensor, whole: bool) -> Tensor: ...

    @abstractmethod
    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Tokens [b, t] and states [b, n, d] -> float32 logits [b, t, V] of what comes next."""

    @abstractmethod
    def inference(self, begin: int) -> Inference:
        """A decoder with a key-value cache, for `begin` tokens at first and then one by one."""

    @property
    def listener(self) -> Listener:
        """This model as openai-whisper's decoding sees it."""
        return Listener(self.dims, self.logits, _NoBlocks())

    def decode(self, mel: Tensor, asked: Decoding | None = None) -> list[DecodingResult]:
        """Spectrograms [b, n_mels, frames] -> what is said in each."""
        with torch.no_grad():
            states = self.encode(mel.to(self.device))
        return self.decode_states(states, asked)

    def decode_states(self, states: Tensor, asked: Decoding | None = None) -> list[DecodingResult]:
        """Encoded clips [b, n, d] -> what is said in each.

        The adapter sets must be those that encoded, for the whole decode: the cache holds keys and
        values of theirs. Where sets differ by sample, decode without a beam.
        """
        return decode(self.listener, self.inference, states, asked or Decoding())


class _NoBlocks:
    """A decoder without keys to hook: the cache belongs to `inference`."""

    blocks: tuple[nn.Module, ...] = ()


class OpenAISpeech(Speech):
    """openai-whisper's class."""

    layout: Layout = "openai"
    model: Whisper

    def __init__(self, model: Whisper) -> None:
        if model.encoder.ln_post.weight.dtype != torch.float32:
            raise AdaptError(
                "openai-whisper computes in the dtype of its input and keeps float32 weights; its"
                f" LayerNorm refuses {model.encoder.ln_post.weight.dtype} ones: do not call"
                " .half() or .to(dtype), give half-precision spectrograms or use autocast"
            )
        super().__init__(model, model.dims)

    def _encode(self, mel: Tensor, whole: bool) -> Tensor:
        encoder = self.model.encoder
        states: Tensor = encoder(mel) if whole else _openai_states(encoder, mel)
        return states

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        found: Tensor = self.model.decoder(tokens, states)
        return found

    def inference(self, begin: int) -> Inference:
        return PyTorchInference(self.model, begin)


class TransformersSpeech(Speech):
    """transformers' `WhisperForConditionalGeneration`."""

    layout: Layout = "transformers"
    model: WhisperForConditionalGeneration

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__(model, dimensions(model.config))

    def _encode(self, mel: Tensor, whole: bool) -> Tensor:
        encoder = self.model.model.encoder
        mel = mel.to(encoder.conv1.weight.dtype)
        states: Tensor = (
            encoder(mel).last_hidden_state if whole else _transformers_states(encoder, mel)
        )
        return states

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        return self._forward(tokens, states, use_cache=False).logits.float()  # type: ignore[no-any-return]

    def inference(self, begin: int) -> Inference:
        return _Cached(self)

    def _forward(self, tokens: Tensor, states: Tensor, **options: Any) -> Any:
        return self.model(encoder_outputs=(states,), decoder_input_ids=tokens, **options)


class _Cached(Inference):  # type: ignore[misc]
    """transformers' own key-value cache, as openai-whisper's decoding drives it."""

    def __init__(self, speech: TransformersSpeech) -> None:
        self.speech = speech
        self.cache: Any = None

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        new = tokens if self.cache is None else tokens[:, -1:]
        found = self.speech._forward(new, states, past_key_values=self.cache, use_cache=True)
        self.cache = found.past_key_values
        logits: Tensor = found.logits[:, -len(tokens[0]) :].float()
        return logits

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        if source_indices != list(range(len(source_indices))):
            self.cache.reorder_cache(torch.tensor(source_indices, device=self.speech.device))

    def cleanup_caching(self) -> None:
        self.cache = None


def speech_of(model: nn.Module) -> Speech:
    """The interface for a model of either class, as `attach` also gets it.

    >>> from polyadapt.speech.offline import whisper_tiny_en
    >>> speech = speech_of(whisper_tiny_en())
    >>> speech.encode(torch.zeros(1, 80, 200)).shape  # two seconds
    torch.Size([1, 100, 384])
    """
    if isinstance(model, Whisper):
        return OpenAISpeech(model)
    # Known by its name: transformers takes seconds to import, and this needs nothing of it.
    if any(c.__name__ == "WhisperForConditionalGeneration" for c in type(model).__mro__):
        return TransformersSpeech(model)  # type: ignore[arg-type]
    raise AdaptError(
        f"{type(model).__name__} is no Whisper: openai-whisper's Whisper and transformers'"
        " WhisperForConditionalGeneration are"
    )


def dimensions(config: Any) -> ModelDimensions:
    """transformers' configuration in openai-whisper's words."""
    return ModelDimensions(
        n_mels=config.num_mel_bins,
        n_audio_ctx=config.max_source_positions,
        n_audio_state=config.d_model,
        n_audio_head=config.encoder_attention_heads,
        n_audio_layer=config.encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.max_target_positions,
        n_text_state=config.d_model,
        n_text_head=config.decoder_attention_heads,
        n_text_layer=config.decoder_layers,
    )


def _openai_states(encoder: Any, mel: Tensor) -> Tensor:
    """The encoder's forward for fewer frames: the positions that there are, the same modules."""
    states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    positions = encoder.positional_embedding[: states.shape[1]]
    states = (states + positions).to(states.dtype)
    for block in encoder.blocks:
        states = block(states)
    last: Tensor = encoder.ln_post(states)
    return last


def _transformers_states(encoder: Any, mel: Tensor) -> Tensor:
    """As `_openai_states`, with transformers' names and its dropout."""
    states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    positions = encoder.embed_positions(torch.arange(states.shape[1], device=mel.device))
    states = F.dropout(states + positions, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        states = layer(states, None)
    last: Tensor = encoder.layer_norm(states)
    return last
