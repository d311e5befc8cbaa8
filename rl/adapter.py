"""What of a pipeline is trained, a LoRA or all of the U-Net: the settings, and what is checked before loading."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers' `load_lora_weights(folder)` looks for."""

DEFAULT_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # attention
    *("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),  # convolutions
)

DEFAULT_TEXT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""A text encoder's attention, as diffusers' own scripts train it."""

NO_TEXT_DORA = "which diffusers does not load into text encoders: its magnitudes would be lost without a word"

_INITS = "default, gaussian, orthogonal, olora, pissa, pissa_niter_N"
_REFUSED_INITS = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "needs a pass over training data before training, which DDPO has not"),
    "loftq": "is for quantized weights, which are not supported",
    "mica": "freezes half of the LoRA",
    "false": "starts from a random LoRA, that is from a broken policy",
}


@dataclass(frozen=True)
class AdapterSettings:
    """What is trained; names and meanings are those of `DDPOConfig`, which holds the help.

    Raises:
        ValueError: values out of range, or that do not fit together.
    """

    tune: str = "lora"
    lora_rank: int = 8
    lora_alpha: float = 8.0
    lora_target_modules: Sequence[str] = DEFAULT_LORA_TARGETS
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    init_adapter: str | None = None
    base_adapters: Sequence[str] = ()
    train_text_encoder: bool = False
    text_lora_target_modules: Sequence[str] = DEFAULT_TEXT_LORA_TARGETS

    def __post_init__(self):
        require(self.tune in ("lora", "full"), f"tune is {self.tune!r}; it must be one of lora, full")
        require(self.lora_rank >= 1, f"lora_rank is {self.lora_rank}; it must be at least 1")
        require(self.lora_alpha > 0, f"lora_alpha is {self.lora_alpha}; it must be above 0")
        for name in ("lora_target_modules", "text_lora_target_modules"):
            require(len(getattr(self, name)) > 0, f"{name} is empty; name at least one layer")
        require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")
        require(self.init_adapter != "", "init_adapter is empty; name a LoRA's folder, or leave it out")
        name = str(self.init_lora_weights).lower()
        require(
            name not in _REFUSED_INITS,
            f"init_lora_weights {name} {_REFUSED_INITS.get(name)}; use one of {_INITS}",
        )
        require(
            name in ("default", "gaussian", "orthogonal") or self.starts_from_base,
            f"init_lora_weights is {self.init_lora_weights!r}; it must be one of {_INITS}",
        )
        require(
            name != "orthogonal" or self.lora_rank % 2 == 0,
            f"init_lora_weights orthogonal needs an even lora_rank; it is {self.lora_rank}",
        )
        require(
            not (self.starts_from_base and self.use_dora),
            f"init_lora_weights {name} with use_dora could not be saved as a LoRA of the unchanged base model; "
            "use one of the two",
        )
        require(
            self.tune == "lora" or self.init_adapter is None,
            "tune full trains the U-Net's own weights, and init_adapter is a LoRA to train on; "
            "to start from it, fuse it: base_adapters",
        )
        require(
            self.tune == "lora" or not self.train_text_encoder,
            "train_text_encoder puts LoRAs on the text encoders beside the U-Net's, and with tune full there is none; "
            "set tune to lora, or train_text_encoder to false",
        )
        require(
            not (self.train_text_encoder and self.use_dora),
            f"use_dora with train_text_encoder makes a DoRA of text encoders, {NO_TEXT_DORA}; use one of the two",
        )

    @property
    def starts_from_base(self) -> bool:
        """Whether the LoRA starts as a part of the base model's weights (PiSSA, OLoRA)."""
        return re.fullmatch(r"olora|pissa(_niter_\d+)?", str(self.init_lora_weights)) is not None

    @property
    def peft_init(self) -> bool | str:
        return True if self.init_lora_weights == "default" else self.init_lora_weights


def check_adapter_files(settings: AdapterSettings) -> None:
    """Complain about LoRA folders before models are loaded.

    Raises:
        ValueError: no such folder, no LoRA in it, or one that has nothing for the U-Net to start from.
    """
    for folder in (*settings.base_adapters, *filter(None, [settings.init_adapter])):
        file = lora_file(folder)
        try:
            with safe_open(file, framework="pt") as stored:
                names = list(stored.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
        if folder == settings.init_adapter:
            text = [name for name in names if name.startswith(("text_encoder", "lora_te"))]
            if text and not settings.train_text_encoder:
                raise ValueError(
                    f"init_adapter {folder} changes a text encoder too ({text[0]}); to train that on as well, set "
                    "train_text_encoder to true; to keep all of it under a new LoRA, fuse it: base_adapters"
                )
            require(bool(names), f"init_adapter {folder} holds no weights")


def lora_file(folder: str) -> Path:
    """The weights of a LoRA folder, or a single `.safetensors` file."""
    path = Path(folder)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        raise ValueError(f"there is no LoRA folder {folder}")
    if not (path / LORA_WEIGHTS).is_file():
        raise ValueError(f"the LoRA folder {folder} holds no {LORA_WEIGHTS}")
    return path / LORA_WEIGHTS


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
