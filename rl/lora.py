"""A LoRA on the U-Net of a diffusers pipeline: how it is made, read, saved and fused."""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from rl.adapter import DEFAULT_LORA_TARGETS, LORA_WEIGHTS, AdapterSettings, lora_file, require
from rl.adapter_file import sort_metadata
from rl.full_unet import prepare_for_trainer, shapes

logger = logging.getLogger(__name__)

_PEFT_PREFIX = "base_model.model."
_TRAINED, _INITIAL = "default", "initial"  # peft's names of the adapters


class Lora:
    """A LoRA on a frozen U-Net.

    One that starts from the base model's own weights (PiSSA, "Principal singular values and singular vectors
    adaptation", Meng et al. 2024; OLoRA, Büyükakyüz 2024) trains s B A on W - s B0 A0, where B0 A0 is how it started.
    Here the frozen U-Net keeps W, and a second, frozen adapter holds -B0 A0. It is the same function, but the base
    model is not rounded anew, comes back when both adapters are switched off, and is the one that plain diffusers adds
    what is saved to: the LoRA [A; A0], [B, -B0] of twice the rank.

    Attributes:
        network: a `PeftModel` around the U-Net.
    """

    what = "LoRA"
    has_reference = True

    def __init__(self, pipeline: DiffusionPipeline, settings: AdapterSettings, seed: int):
        """Put the LoRA on `pipeline.unet`; initial weights depend on `seed` only.

        Raises:
            ValueError: no layer matches the targets, or the initial weights or `init_adapter` do not fit them.
        """
        self._pipeline_class = type(pipeline)
        unet = pipeline.unet
        start = None
        if settings.init_adapter is not None:
            config, start = _read_adapter(pipeline, settings)
        else:
            layers = _targeted(unet, settings.lora_target_modules)
            _check_init(layers, settings)
            config = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=sorted(settings.lora_target_modules),
                lora_dropout=0.0,
                use_rslora=settings.use_rslora,
                use_dora=settings.use_dora,
                init_lora_weights=settings.peft_init,
            )
        base = {}
        if start is None and settings.starts_from_base:
            base = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: PeftModel = get_peft_model(unet, config)
        self._initial: dict[str, torch.Tensor] | None = None
        if start is not None:
            set_peft_model_state_dict(self.network, start)
        if base:
            for name, weight in base.items():
                unet.get_submodule(name).base_layer.weight.data = weight
            self._add_initial(config)
        prepare_for_trainer(self.network, unet)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the LoRA is switched off and the network is the base model."""
        layers = [layer for layer in self.network.modules() if isinstance(layer, LoraLayer)]
        # Not by peft's disable_adapter(), which would make the frozen initial adapter trainable behind it.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield None
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def save(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write `pytorch_lora_weights.safetensors`, from which plain diffusers makes the same pictures.

        Rank, alpha, targets and kind are saved with the weights: without them diffusers assumes alpha = rank, and
        pictures are silently wrong where it is not.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        weights = get_peft_model_state_dict(self.network, state_dict=state_dict, adapter_name=_TRAINED)
        weights = {name: weight.detach().cpu() for name, weight in weights.items()}
        config = copy.copy(self.network.peft_config[_TRAINED])
        config.init_lora_weights = True  # or diffusers would change the base's weights before it loads these
        if self._initial is not None:
            weights = {name: _joined(name, weight, self._initial[name]) for name, weight in weights.items()}
            config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # the same scale at rank 2 r
            config.r = 2 * config.r
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        self._pipeline_class.save_lora_weights(
            folder,
            unet_lora_layers={name.removeprefix(_PEFT_PREFIX): weight.contiguous() for name, weight in weights.items()},
            unet_lora_adapter_metadata=json.loads(json.dumps(metadata, default=str)),
        )
        sort_metadata(Path(folder) / LORA_WEIGHTS)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: no such file, or the LoRA has other layers, another rank or another kind.
        """
        file = Path(folder) / LORA_WEIGHTS
        if not file.is_file():
            raise ValueError(f"{folder} holds no {LORA_WEIGHTS}")
        weights = {_PEFT_PREFIX + name.removeprefix("unet."): weight for name, weight in load_file(file).items()}
        expected = get_peft_model_state_dict(self.network, adapter_name=_TRAINED)
        if self._initial is not None:
            expected = {name: _joined(name, weight.cpu(), self._initial[name]) for name, weight in expected.items()}
        if shapes(expected) != shapes(weights):
            raise ValueError(
                f"the LoRA in {file} has other layers or another rank than this run's; "
                "give lora_rank, lora_target_modules, use_dora and init_lora_weights the values it was trained with"
            )
        if self._initial is not None:
            parts = {name: _halves(name, weight) for name, weight in weights.items()}
            weights = {name: trained for name, (trained, _) in parts.items()}
            self._initial = {name: initial for name, (_, initial) in parts.items()}
            set_peft_model_state_dict(self.network, self._initial, adapter_name=_INITIAL)
        set_peft_model_state_dict(self.network, weights, adapter_name=_TRAINED)

    @staticmethod
    def usage(folder: str | Path) -> str:
        """A line of Python that loads what `save` wrote into a pipeline `pipe`."""
        return f'pipe.load_lora_weights("{folder}")'

    def _add_initial(self, config: LoraConfig) -> None:
        """The second, frozen adapter: minus what the first one starts as."""
        start = get_peft_model_state_dict(self.network, adapter_name=_TRAINED)
        self._initial = {
            name: (-weight if "lora_B" in name else weight).detach().cpu().clone() for name, weight in start.items()
        }
        plain = copy.copy(config)
        plain.init_lora_weights = True
        self.network.add_adapter(_INITIAL, plain)
        set_peft_model_state_dict(self.network, self._initial, adapter_name=_INITIAL)
        self.network.base_model.set_adapter([_TRAINED, _INITIAL])
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(f".{_TRAINED}." in name)


def fuse_base_adapters(pipeline: DiffusionPipeline, folders: Sequence[str]) -> None:
    """Add LoRAs, as diffusers loads them, to the weights of `pipeline`, one after another.

    Raises:
        ValueError: one of them does not fit this pipeline.
    """
    for folder in folders:
        with _in_float32(pipeline.unet):
            _load_with_diffusers(pipeline, folder)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()


def _targeted(unet: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that these targets name, by peft's rule: a whole name, or the end of one behind a dot.

    Raises:
        ValueError: none.
    """
    known = dict(unet.named_modules())
    idle = [target for target in targets if not any(_matches(name, target) for name in known)]
    if len(idle) == len(targets):
        raise ValueError(f"no layer of the U-Net is named like any of lora_target_modules: {', '.join(targets)}")
    if idle:
        logger.warning("no layer of the U-Net is named like these lora_target_modules: %s", ", ".join(idle))
    return {name: layer for name, layer in known.items() if any(_matches(name, target) for target in targets)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_init(layers: Mapping[str, nn.Module], settings: AdapterSettings) -> None:
    if settings.init_lora_weights in ("default", "gaussian"):
        return
    other = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if other:
        raise ValueError(
            f"init_lora_weights {settings.init_lora_weights} is for linear layers, and {other[0]} is none; "
            "set lora_target_modules to to_q to_k to_v to_out.0"
        )
    smallest = min(min(layer.weight.shape) for layer in layers.values())
    require(
        not settings.starts_from_base or settings.lora_rank <= smallest,
        f"init_lora_weights {settings.init_lora_weights} needs a lora_rank of at most {smallest}, the size of the "
        f"smallest layer; it is {settings.lora_rank}",
    )


def _read_adapter(pipeline: DiffusionPipeline, settings: AdapterSettings) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Config and weights of the LoRA to start from, whatever format diffusers reads it in; `pipeline` stays as it was.

    Raises:
        ValueError: it does not fit the pipeline, or a setting says otherwise.
    """
    unet, folder = pipeline.unet, settings.init_adapter
    with _in_float32(unet):
        _load_with_diffusers(pipeline, folder)
        config = getattr(unet, "peft_config", {}).get(_TRAINED)
        require(isinstance(config, LoraConfig), f"init_adapter {folder} holds no LoRA of a U-Net")
        weights = {name: weight.clone() for name, weight in get_peft_model_state_dict(unet).items()}
        pipeline.unload_lora_weights()
    found = {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    defaults = {setting.name: setting.default for setting in fields(AdapterSettings)}
    for name, value in found.items():
        asked = getattr(settings, name)
        require(
            asked in (value, defaults[name]),
            f"{name} is {asked}, but init_adapter {folder} was trained with {value}; leave {name} out",
        )
    layers = {name.partition(".lora_")[0] for name in weights}
    if tuple(settings.lora_target_modules) != DEFAULT_LORA_TARGETS:
        require(
            layers == set(_targeted(unet, settings.lora_target_modules)),
            f"init_adapter {folder} has a LoRA on other layers than lora_target_modules names, e.g. {min(layers)}; "
            "leave lora_target_modules out, they come from there",
        )
    config.inference_mode, config.lora_dropout, config.init_lora_weights = False, 0.0, True
    return config, {_PEFT_PREFIX + name: weight for name, weight in weights.items()}


def _load_with_diffusers(pipeline: DiffusionPipeline, folder: str) -> None:
    file = lora_file(folder)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_TRAINED)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the LoRA {folder} does not fit this pipeline: {error}") from error


@contextmanager
def _in_float32(unet: nn.Module) -> Iterator[None]:
    """LoRAs take on their network's dtype, so what is read or added within it is not rounded."""
    dtype = unet.dtype
    nn.Module.to(unet, torch.float32)  # diffusers' own warns of modules to be kept in float32; here are none
    try:
        yield
    finally:
        nn.Module.to(unet, dtype)


def _joined(name: str, trained: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """A (r, in) and A0 below one another, B (out, r) and -B0 beside one another."""
    return torch.cat([trained, initial], dim=0 if "lora_A" in name else 1)


def _halves(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_joined` joined."""
    first, second = weight.chunk(2, dim=0 if "lora_A" in name else 1)
    return first.contiguous(), second.contiguous()
