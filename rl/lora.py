"""The LoRAs on a diffusers pipeline, on its U-Net and, if wanted, its text encoders: how they are made, read, saved and
fused."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl.adapter import (
    DEFAULT_LORA_TARGETS,
    DEFAULT_TEXT_LORA_TARGETS,
    LORA_WEIGHTS,
    NO_TEXT_DORA,
    AdapterSettings,
    lora_file,
    require,
)
from rl.adapter_file import sort_metadata
from rl.full_unet import prepare_for_trainer, shapes
from rl.lora_dropout import LoraDropout
from rl.part_lora import PEFT_PREFIX, TRAINED, PartLora, new_config, targeted
from rl.pipelines import family_of

UNET = "unet"
_NESTED = "text_model."
"""Behind `text_encoder.` in the names of a LoRA's weights, whether or not the text encoder itself has it: transformers
before 5 had it in every CLIP, and diffusers takes it away where there is none."""


class Lora:
    """A LoRA on a frozen U-Net, and, with `train_text_encoder`, one on each text encoder; see `PartLora`.

    Attributes:
        network: a `PeftModel` around the U-Net; a module that holds the text encoders' beside it, where these are
            trained.
        trains_text: whether they are.
        dropout: of the U-Net's LoRA; None: it has none. A text encoder's never has.
    """

    what = "LoRA"
    has_reference = True

    def __init__(self, pipeline: DiffusionPipeline, settings: AdapterSettings, seed: int):
        """Put the LoRAs on the parts of `pipeline`; initial weights depend on `seed` only.

        Raises:
            ValueError: no layer matches the targets, or the initial weights or `init_adapter` do not fit them.
        """
        self._pipeline_class = type(pipeline)
        self.trains_text = settings.train_text_encoder
        names = (UNET, *(family_of(pipeline).text_encoders if self.trains_text else ()))
        found = _read_adapter(pipeline, settings, names) if settings.init_adapter is not None else {}
        # All before any: what does not fit is said before a part has changed.
        configs = {name: found[name][0] if name in found else _fresh_config(pipeline, settings, name) for name in names}
        starts = {name: start for name, (_, start) in found.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._parts = {name: PartLora(getattr(pipeline, name), configs[name], starts.get(name)) for name in names}
        self.dropout: LoraDropout | None = None
        if settings.lora_dropout > 0:
            self.dropout = LoraDropout(self._parts[UNET].layers, settings.lora_dropout)
        networks = {name: part.network for name, part in self._parts.items()}
        self.network: nn.Module = _WithTextEncoders(networks) if self.trains_text else networks[UNET]
        prepare_for_trainer(self.network, pipeline.unet, self.run_and_run_again)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the LoRAs are switched off and the pipeline is the base model."""
        with self._switched(off=True):
            yield None

    @contextmanager
    def _switched(self, off: bool) -> Iterator[None]:
        layers = [layer for part in self._parts.values() for layer in part.layers]
        before = layers[0].disable_adapters
        # Not by peft's disable_adapter(), which would make the frozen initial adapter trainable behind it.
        for layer in layers:
            layer._disable_adapters = off
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = before

    def run_and_run_again(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """A block of which only the inputs are kept for the backward pass. There it runs with the LoRAs switched on or
        off, and their inputs dropped, as they are now: a `reference` that gradients flow through has ended by then."""
        off = self._parts[UNET].layers[0].disable_adapters
        kept = self.dropout and self.dropout.kept

        @contextmanager
        def as_now() -> Iterator[None]:
            with self._switched(off), self.dropout.applied(kept) if self.dropout else nullcontext():
                yield

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now()))

    def folded(self) -> AbstractContextManager[None]:
        """Within it the U-Net may compute as fast as the base model's; see `PartLora.folded`."""
        return self._parts[UNET].folded()

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def save(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write `pytorch_lora_weights.safetensors`, from which plain diffusers makes the same pictures.

        Rank, alpha, targets and kind are saved with the weights: without them diffusers assumes alpha = rank, and
        pictures are silently wrong where it is not.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        arguments = {}
        for name, part in self._parts.items():
            own = state_dict
            if state_dict is not None and self.trains_text:
                own = {key.removeprefix(f"{name}."): weight for key, weight in state_dict.items() if _is_of(key, name)}
            weights = part.weights(own)
            if name != UNET:
                weights = {_NESTED + key.removeprefix(_NESTED): weight for key, weight in weights.items()}
            arguments |= {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": part.metadata()}
        self._pipeline_class.save_lora_weights(folder, **arguments)
        sort_metadata(Path(folder) / LORA_WEIGHTS)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: no such file, or the LoRA has other parts, other layers, another rank or another kind.
        """
        file = Path(folder) / LORA_WEIGHTS
        if not file.is_file():
            raise ValueError(f"{folder} holds no {LORA_WEIGHTS}")
        read = load_file(file)
        weights = {name: _own_names(part.network.get_base_model(), read, name) for name, part in self._parts.items()}
        same = all(shapes(weights[name]) == shapes(part.weights()) for name, part in self._parts.items())
        if not same or sum(map(len, weights.values())) != len(read):
            raise ValueError(
                f"the LoRA in {file} has other layers or another rank than this run's; give lora_rank, "
                "lora_target_modules, use_dora, init_lora_weights and train_text_encoder the values it was trained with"
            )
        for name, part in self._parts.items():
            part.load(weights[name])

    @staticmethod
    def usage(folder: str | Path) -> str:
        """A line of Python that loads what `save` wrote into a pipeline `pipe`."""
        return f'pipe.load_lora_weights("{folder}")'


class _WithTextEncoders(nn.Module):
    """The U-Net, which is what it computes, and the text encoders, so that an engine sees their weights too."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network if name == UNET else network.eval())

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As usual, but that frozen weights may be missing: DeepSpeed's checkpoints leave them out."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        if strict and (astray := [*(set(found.missing_keys) - frozen), *found.unexpected_keys]):
            raise RuntimeError(f"the weights do not fit the LoRAs: {', '.join(sorted(astray)[:3])} missing or unknown")
        return found

    def train(self, mode: bool = True) -> "_WithTextEncoders":
        """Of the U-Net alone: what a text encoder dropped in the update would make the ratio differ from 1."""
        self.training = mode
        self.unet.train(mode)
        return self


def _is_of(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")


def _own_names(module: nn.Module, weights: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """A LoRA file's weights of one part, as `module` names its layers."""
    own = {name.removeprefix(f"{part}."): weight for name, weight in weights.items() if _is_of(name, part)}
    if part == UNET or hasattr(module, _NESTED.rstrip(".")):
        return own
    return {name.removeprefix(_NESTED): weight for name, weight in own.items()}


def fuse_base_adapters(pipeline: DiffusionPipeline, folders: Sequence[str]) -> None:
    """Add LoRAs, as diffusers loads them, to the weights of `pipeline`, one after another.

    Raises:
        ValueError: one of them does not fit this pipeline.
    """
    for folder in folders:
        with _in_float32(pipeline):
            _load_with_diffusers(pipeline, folder)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()


def _targets_of(settings: AdapterSettings, part: str) -> tuple[str, Sequence[str], Sequence[str]]:
    """The setting that names a part's layers, its value, and its default."""
    if part == UNET:
        return "lora_target_modules", settings.lora_target_modules, DEFAULT_LORA_TARGETS
    return "text_lora_target_modules", settings.text_lora_target_modules, DEFAULT_TEXT_LORA_TARGETS


def _fresh_config(pipeline: DiffusionPipeline, settings: AdapterSettings, part: str) -> LoraConfig:
    setting, targets, _ = _targets_of(settings, part)
    module, unread = getattr(pipeline, part), family_of(pipeline).unread_layers.get(part, 0)
    exclude = None
    if unread:
        layers = module.config.num_hidden_layers
        exclude = rf"(.*\.)?layers\.({'|'.join(str(layer) for layer in range(layers - unread, layers))})\..*"
    what = "the U-Net" if part == UNET else f"the {part}"
    return new_config(settings, module, targets, what, setting, exclude)


def _read_adapter(
    pipeline: DiffusionPipeline, settings: AdapterSettings, parts: Sequence[str]
) -> dict[str, tuple[LoraConfig, dict[str, torch.Tensor]]]:
    """Config and weights of the LoRA to start from, whatever format diffusers reads it in, of those of `parts` that it
    is on; `pipeline` stays as it was.

    Raises:
        ValueError: it does not fit the pipeline, has none for the U-Net, or a setting says otherwise.
    """
    folder, found = settings.init_adapter, {}
    with _in_float32(pipeline):
        _load_with_diffusers(pipeline, folder)
        for part in parts:
            module = getattr(pipeline, part)
            config = getattr(module, "peft_config", {}).get(TRAINED)
            if isinstance(config, LoraConfig):
                weights = get_peft_model_state_dict(module, adapter_name=TRAINED)
                weights = {name.removeprefix(PEFT_PREFIX): weight.clone() for name, weight in weights.items()}
                found[part] = config, weights
        pipeline.unload_lora_weights()
    require(UNET in found, f"init_adapter {folder} holds no LoRA of a U-Net")
    _check_settings(settings, found[UNET][0])
    for part, (config, weights) in found.items():
        setting, targets, default = _targets_of(settings, part)
        layers = {name.partition(".lora_")[0] for name in weights}
        if tuple(targets) != default:
            exclude = config.exclude_modules if isinstance(config.exclude_modules, str) else None
            require(
                layers == set(targeted(getattr(pipeline, part), targets, exclude)),
                f"init_adapter {folder} has a LoRA on other layers than {setting} names, e.g. {min(layers)}; "
                f"leave {setting} out, they come from there",
            )
        # diffusers has just lost its magnitudes.
        require(part == UNET or not config.use_dora, f"init_adapter {folder} has a DoRA on the {part}, {NO_TEXT_DORA}")
        config.inference_mode, config.init_lora_weights = False, True
        config.lora_dropout = 0.0  # `rl.lora_dropout` takes its place
    return found


def _check_settings(settings: AdapterSettings, config: LoraConfig) -> None:
    """Complain about settings that contradict the U-Net's LoRA that is started from."""
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
            f"{name} is {asked}, but init_adapter {settings.init_adapter} was trained with {value}; leave {name} out",
        )


def _load_with_diffusers(pipeline: DiffusionPipeline, folder: str) -> None:
    file = lora_file(folder)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=TRAINED)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the LoRA {folder} does not fit this pipeline: {error}") from error


@contextmanager
def _in_float32(pipeline: DiffusionPipeline) -> Iterator[None]:
    """LoRAs take on their network's dtype, so what is read or added within it is not rounded."""
    with ExitStack() as back:
        for part in (UNET, *family_of(pipeline).text_encoders):
            module = getattr(pipeline, part)
            dtype = module.dtype
            nn.Module.to(module, torch.float32)  # diffusers' own warns of modules to be kept in float32; here are none
            back.callback(nn.Module.to, module, dtype)
        yield
