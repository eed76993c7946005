"""The same Whisper in the other layout: weights by the table of names, settings by meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from .decoding import MULTILINGUAL
from .model import dimensions
from .names import to_openai, to_transformers
from .tokens import tokenizer_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

_TIED = "proj_out.weight"  # transformers' second name of the token embedding


def as_transformers(model: Whisper) -> WhisperForConditionalGeneration:
    """openai-whisper's model -> transformers' class, with weights and settings of its own.

    `generate` works on it: its settings are those of the published models of that vocabulary.
    """
    from transformers import WhisperForConditionalGeneration

    made = WhisperForConditionalGeneration(configuration(model.dims))
    weights = {to_transformers(name): t.clone() for name, t in model.state_dict().items()}
    weights[_TIED] = weights["model.decoder.embed_tokens.weight"]
    made.load_state_dict(weights, strict=True)
    made.tie_weights()
    made.generation_config = _generation(model)
    made.train(model.training)
    return made


def as_openai(model: WhisperForConditionalGeneration) -> Whisper:
    """transformers' model -> openai-whisper's class, in float32, with weights of its own."""
    made = Whisper(dimensions(model.config))
    weights: dict[str, Tensor] = {
        to_openai(name): t.float().clone()
        for name, t in model.state_dict().items()
        if name != _TIED
    }
    made.load_state_dict(weights, strict=True)
    if pairs := getattr(model.generation_config, "alignment_heads", None):
        heads = torch.zeros(made.dims.n_text_layer, made.dims.n_text_head, dtype=torch.bool)
        heads[tuple(zip(*pairs, strict=True))] = True
        made.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return made.train(model.training)


def configuration(dims: ModelDimensions) -> WhisperConfig:
    """All of it explicit: the class's defaults are of an English model with another vocabulary."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=dims.n_vocab,
        num_mel_bins=dims.n_mels,
        d_model=dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        decoder_layers=dims.n_text_layer,
        decoder_attention_heads=dims.n_text_head,
        decoder_ffn_dim=4 * dims.n_text_state,
        max_source_positions=dims.n_audio_ctx,
        max_target_positions=dims.n_text_ctx,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **_ends(dims.n_vocab),
    )


def _ends(n_vocab: int) -> dict[str, Any]:
    """The tokens that begin and end: transformers pads with the one that ends."""
    tokenizer = tokenizer_of(n_vocab, "en", "transcribe")
    eot = tokenizer.eot
    return {
        "decoder_start_token_id": tokenizer.sot,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": eot,
    }


def _generation(model: Whisper) -> GenerationConfig:
    from transformers import GenerationConfig

    n_vocab = model.dims.n_vocab
    tokenizer = tokenizer_of(n_vocab, "en", "transcribe")
    never = {tokenizer.transcribe, tokenizer.translate, tokenizer.sot, tokenizer.sot_prev}
    never |= {tokenizer.sot_lm, tokenizer.no_speech, *tokenizer.non_speech_tokens}
    settings: dict[str, Any] = {
        **_ends(n_vocab),
        "max_length": model.dims.n_text_ctx,
        "is_multilingual": n_vocab >= MULTILINGUAL,
        "suppress_tokens": sorted(never),
        "begin_suppress_tokens": [*tokenizer.encode(" "), tokenizer.eot],
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "prev_sot_token_id": tokenizer.sot_prev,
        "max_initial_timestamp_index": 50,  # one second
        "return_timestamps": False,
        "alignment_heads": model.alignment_heads.indices().T.tolist(),
    }
    if n_vocab >= MULTILINGUAL:
        languages = zip(tokenizer.all_language_codes, tokenizer.all_language_tokens, strict=True)
        settings["lang_to_id"] = {f"<|{code}|>": token for code, token in languages}
        settings["task_to_id"] = {
            "transcribe": tokenizer.transcribe,
            "translate": tokenizer.translate,
        }
    return GenerationConfig(**settings)
