"""A LoRA on one network of a pipeline, the U-Net or a text encoder."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from rl.adapter import AdapterSettings, require

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
TRAINED, INITIAL = "default", "initial"  # peft's names of the adapters


class PartLora:
    """A LoRA on a frozen network.

    One that starts from the base model's own weights (PiSSA, "Principal singular values and singular vectors
    adaptation", Meng et al. 2024; OLoRA, Büyükakyüz 2024) trains s B A on W - s B0 A0, where B0 A0 is how it started.
    Here the frozen network keeps W, and a second, frozen adapter holds -B0 A0. It is the same function, but the base
    model is not rounded anew, comes back when both adapters are switched off, and is the one that plain diffusers adds
    what is saved to: the LoRA [A; A0], [B, -B0] of twice the rank.

    Weights are named as in the network itself, without peft's prefix.

    Attributes:
        network: a `PeftModel` around it.
    """

    def __init__(self, module: nn.Module, config: LoraConfig, start: Mapping[str, torch.Tensor] | None = None):
        """Put a LoRA on `module`; its initial weights are `start`, or drawn from torch's generator as `config` says."""
        base = {}
        if start is None and starts_from_base(config):
            layers = targeted(module, config.target_modules, config.exclude_modules)
            base = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        with warnings.catch_warnings():  # peft asks a text encoder by a name that transformers is to give up
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.network: PeftModel = get_peft_model(module, config)
        self._initial: dict[str, torch.Tensor] | None = None
        if start is not None:
            set_peft_model_state_dict(self.network, _with_prefix(start))
        if base:
            for name, weight in base.items():
                module.get_submodule(name).base_layer.weight.data = weight
            self._add_initial(config)

    @property
    def layers(self) -> list[LoraLayer]:
        return [layer for layer in self.network.modules() if isinstance(layer, LoraLayer)]

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within it, the network computes with W + s B A in place of W and of the LoRA beside it: the same function, up
        to rounding, at the base model's cost in time, and with a second copy of these weights. Without gradients only.

        Where weights are rounded coarser than float32 it would lose what the LoRA has learned so far, and where an
        engine has taken them apart (ZeRO-3) or the LoRA is not a sum (DoRA) it is more than an addition. There
        everything stays as it is.
        """
        layers = [layer for layer in self.layers if not layer.disable_adapters]
        if not all(map(_can_fold, layers)):
            layers = []
        weights = [layer.get_base_layer().weight for layer in layers]
        kept = [weight.data for weight in weights]  # given back, not computed back: not a bit may change
        try:
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = weight.data + sum(layer.get_delta_weight(name).detach() for name in layer.active_adapters)
                layer._disable_adapters = True
            yield
        finally:
            for layer, weight, data in zip(layers, weights, kept, strict=True):
                weight.data = data
                layer._disable_adapters = False

    def weights(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What plain diffusers adds to the base model.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        weights = get_peft_model_state_dict(self.network, state_dict=state_dict, adapter_name=TRAINED)
        weights = {name: weight.detach().cpu() for name, weight in weights.items()}
        if self._initial is not None:
            weights = {name: _joined(name, weight, self._initial[name]) for name, weight in weights.items()}
        return {name.removeprefix(PEFT_PREFIX): weight.contiguous() for name, weight in weights.items()}

    def metadata(self) -> dict[str, Any]:
        """The config of `weights`, as JSON can hold it. Without it diffusers assumes alpha = rank."""
        config = copy.copy(self.network.peft_config[TRAINED])
        config.init_lora_weights = True  # or diffusers would change the base's weights before it loads these
        if self._initial is not None:
            config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # the same scale at rank 2 r
            config.r = 2 * config.r
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        return json.loads(json.dumps(metadata, default=str))

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take in what `weights` gave, of the same names and shapes."""
        weights = _with_prefix(weights)
        if self._initial is not None:
            parts = {name: _halves(name, weight) for name, weight in weights.items()}
            weights = {name: trained for name, (trained, _) in parts.items()}
            self._initial = {name: initial for name, (_, initial) in parts.items()}
            set_peft_model_state_dict(self.network, self._initial, adapter_name=INITIAL)
        set_peft_model_state_dict(self.network, weights, adapter_name=TRAINED)

    def _add_initial(self, config: LoraConfig) -> None:
        """The second, frozen adapter: minus what the first one starts as."""
        start = get_peft_model_state_dict(self.network, adapter_name=TRAINED)
        self._initial = {
            name: (-weight if "lora_B" in name else weight).detach().cpu().clone() for name, weight in start.items()
        }
        plain = copy.copy(config)
        plain.init_lora_weights = True
        self.network.add_adapter(INITIAL, plain)
        set_peft_model_state_dict(self.network, self._initial, adapter_name=INITIAL)
        self.network.base_model.set_adapter([TRAINED, INITIAL])
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(f".{TRAINED}." in name)


def new_config(settings: AdapterSettings, module: nn.Module, targets: Sequence[str], what: str, setting: str,
               exclude: str | None = None) -> LoraConfig:  # fmt: skip
    """The config of a fresh LoRA.

    Args:
        targets: names of layers, or the ends of such behind a dot.
        what: the network, for messages.
        setting: that names the targets, likewise.
        exclude: a regular expression of whole names that are left out.

    Raises:
        ValueError: no layer matches the targets, or the initial weights do not fit them.
    """
    named = targeted(module, targets, exclude)
    idle = [target for target in targets if not any(_matches(name, target) for name in named)]
    require(bool(named), f"no layer of {what} is named like any of {setting}: {', '.join(targets)}")
    if idle:
        logger.warning("no layer of %s is named like these %s: %s", what, setting, ", ".join(idle))
    _check_init(named, settings, setting)
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=sorted(targets),
        exclude_modules=exclude,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.peft_init,
    )


def _can_fold(layer: LoraLayer) -> bool:
    base = layer.get_base_layer()
    exact = isinstance(base, (nn.Linear, nn.Conv2d)) and base.weight.dtype in (torch.float32, torch.float64)
    whole = not hasattr(base.weight, "ds_id")  # as DeepSpeed marks what it has taken apart
    return exact and whole and not layer.lora_variant and not torch.is_autocast_enabled(base.weight.device.type)


def starts_from_base(config: LoraConfig) -> bool:
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(("olora", "pissa"))


def targeted(module: nn.Module, targets: Sequence[str], exclude: str | None = None) -> dict[str, nn.Module]:
    """The layers that these targets name, by peft's rule: a whole name, or the end of one behind a dot."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if any(_matches(name, target) for target in targets) and not (exclude and re.fullmatch(exclude, name))
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_init(layers: Mapping[str, nn.Module], settings: AdapterSettings, setting: str) -> None:
    if settings.init_lora_weights in ("default", "gaussian"):
        return
    other = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if other:
        raise ValueError(
            f"init_lora_weights {settings.init_lora_weights} is for linear layers, and {other[0]} is none; "
            f"set {setting} to to_q to_k to_v to_out.0"
        )
    smallest = min(min(layer.weight.shape) for layer in layers.values())
    require(
        not settings.starts_from_base or settings.lora_rank <= smallest,
        f"init_lora_weights {settings.init_lora_weights} needs a lora_rank of at most {smallest}, the size of the "
        f"smallest layer; it is {settings.lora_rank}",
    )


def _with_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {PEFT_PREFIX + name: weight for name, weight in weights.items()}


def _joined(name: str, trained: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """A (r, in) and A0 below one another, B (out, r) and -B0 beside one another."""
    return torch.cat([trained, initial], dim=0 if "lora_A" in name else 1)


def _halves(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_joined` joined."""
    first, second = weight.chunk(2, dim=0 if "lora_A" in name else 1)
    return first.contiguous(), second.contiguous()
