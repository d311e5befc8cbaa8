"""The text models that RAHF is built on: T5 (v1.1 and Flan-T5 included), mT5 and UMT5."""

from transformers import MT5Config, PreTrainedConfig, PreTrainedModel, T5Config, UMT5Config
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.umt5.modeling_umt5 import UMT5Stack

_STACKS = {T5Config: T5Stack, MT5Config: MT5Stack, UMT5Config: UMT5Stack}


def check_text_config(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if `config` is of another family."""
    if type(config) not in _STACKS:
        names = ", ".join(kind.model_type for kind in _STACKS)
        raise ValueError(f"the text model is a {config.model_type!r}; RAHF is built on one of {names}")


def new_stack(config: PreTrainedConfig, decoder: bool = False) -> PreTrainedModel:
    """An untrained encoder or decoder of the family's own kind; it loads the weights of a pretrained one."""
    settings = type(config).from_dict(config.to_dict())
    settings.is_decoder, settings.use_cache = decoder, False
    if decoder:
        settings.num_layers = settings.num_decoder_layers
    settings._attn_implementation = config._attn_implementation
    return _STACKS[type(config)](settings)


def output_scale(config: PreTrainedConfig) -> float:
    """What the family multiplies a decoder's states with before its word matrix."""
    scaled = getattr(config, "scale_decoder_outputs", config.model_type == "umt5" and config.tie_word_embeddings)
    return config.d_model**-0.5 if scaled else 1.0
