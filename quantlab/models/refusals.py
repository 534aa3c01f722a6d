"""What a model must be before anything is done with it, told from configuration and headers (no torch).

Every verb asks :func:`refuse_unusable` before heavy work, so that a model is refused at once, in one line, and in the
same words by every method. Whether the weights are numbers takes a reading of all of them and is asked last:
``finite.refuse_nonfinite``.
"""

from __future__ import annotations

import re
from typing import Any

from quantlab.errors import DataError
from quantlab.models.safetensors.files import ModelFiles
from quantlab.models.vocabulary import refuse_foreign_tokens

# Heads of models that do not continue text from left to right, as they end the names of transformers' classes.
NOT_CAUSAL = re.compile(
    r"For(MaskedLM|PreTraining|\w*Classification|\w*QuestionAnswering|MultipleChoice|NextSentencePrediction)$"
)
# How a wrapper around a language model shows: a configuration for each part, or the class of the whole.
PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config", "audio_config",
         "speech_config", "video_config", "visual", "vision_tower", "mm_vision_tower")  # fmt: skip
HEARING = ("audio_config", "speech_config", "thinker_config")
WRAPPER = re.compile(r"For(ConditionalGeneration|ImageTextToText|Vision2Seq|VisionText2Text)$")
CAUSAL_HINT = "give a causal language model (a decoder alone, as Llama, Qwen or Gemma are)"


def refuse_unusable(files: ModelFiles) -> None:
    """Refuse what no verb can work with.

    Raises:
        DataError: no causal language model, or tokens that the embedding has no row for.
    """
    refuse_other_kinds(files)
    refuse_foreign_tokens(files)


def refuse_other_kinds(files: ModelFiles) -> None:
    """Refuse what configuration alone shows to be no causal language model of text, or of images and text.

    Raises:
        DataError: an encoder-decoder, a model with another head, a language model inside one of another kind.
    """
    architectures = _architectures(files.config)
    called = _called(files)
    if files.config.get("is_encoder_decoder"):
        raise DataError(f"{files.name}: {called} is an encoder with a decoder", hint=CAUSAL_HINT)
    if architectures and all(NOT_CAUSAL.search(name) for name in architectures):
        raise DataError(f"{files.name}: {called} is not a causal language model", hint=CAUSAL_HINT)
    part = wrapping(files)
    sees = isinstance(files.config.get("text_config"), dict) and files.config.get("vision_config")
    hears = any(files.config.get(name) for name in HEARING)
    if part and (hears or not sees):
        raise DataError(
            f"{files.name}: {called} is a multimodal wrapper around a language model{part}; of these the ones that "
            "transformers has for images and text (text_config and vision_config) are supported",
            hint="give the language model alone, saved as a causal language model of its own",
        )


def refuse_wrapper(files: ModelFiles) -> None:
    """Refuse a language model inside a multimodal one, for verbs that want the language model alone.

    Raises:
        DataError: it is one.
    """
    if part := wrapping(files):
        raise DataError(
            f"{files.name}: {_called(files)} is a multimodal wrapper around a language model{part}; it can be "
            "quantized and evaluated on text, not trained",
            hint="give the language model alone, saved as a causal language model of its own",
        )


def wrapping(files: ModelFiles) -> str:
    """How it shows that a language model is inside a multimodal one, for messages; empty where it is not."""
    architectures = _architectures(files.config)
    found = next((part for part in PARTS if files.config.get(part)), None)
    if found:
        return f" ({found} in config.json)"
    return " (by its class)" if architectures and all(WRAPPER.search(name) for name in architectures) else ""


def _architectures(config: Any) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _called(files: ModelFiles) -> str:
    return ", ".join(_architectures(files.config)) or str(files.config.get("model_type", "a model"))
