"""Training all weights of the U-Net instead of a LoRA."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

UNET_FOLDER = "unet"
"""Where a whole U-Net is left, as `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` reads it."""


class FullUnet:
    """All weights of the U-Net, in float32.

    Attributes:
        network: a module around the U-Net.
        base: a frozen copy of the U-Net as it was; None if it is not kept.
    """

    what = "U-Net"
    trains_text = False
    dropout = None

    def __init__(self, pipeline: DiffusionPipeline, keep_reference: bool):
        """Make `pipeline.unet` trainable.

        Args:
            keep_reference: whether a copy of the base model is kept, for `reference`; it is as large as the U-Net.
        """
        unet = pipeline.unet.float()
        self.base = copy.deepcopy(unet) if keep_reference else None
        self.network = _WholeUnet(unet.requires_grad_(True))
        prepare_for_trainer(self.network, unet, self.run_and_run_again)

    @property
    def has_reference(self) -> bool:
        return self.base is not None

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network to use instead, which is the base model."""
        assert self.base is not None, "no reference is kept"
        if self.base.dtype != self.network.unet.dtype:  # an engine has cast the network
            self.base.to(self.network.unet.dtype)
        yield self.base

    @staticmethod
    def run_and_run_again(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """A block of which only the inputs are kept for the backward pass, where it runs again."""
        return checkpoint(block, *inputs, use_reentrant=False)

    def folded(self) -> AbstractContextManager[None]:
        """Nothing is beside the U-Net's own weights."""
        return nullcontext()

    def to(self, device: torch.device) -> None:
        for module in filter(None, (self.network, self.base)):
            module.to(device)

    def save(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the folder `unet`.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        unet = self.network.unet
        if state_dict is not None:
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(unet.config)
            unet.load_state_dict(
                {name.removeprefix("unet."): weight for name, weight in state_dict.items()}, assign=True
            )
        unet.save_pretrained(Path(folder) / UNET_FOLDER)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: no such folder, or a U-Net of another shape.
        """
        if not (Path(folder) / UNET_FOLDER / "config.json").is_file():
            raise ValueError(f"{folder} holds no folder `{UNET_FOLDER}` with a U-Net")
        saved = UNet2DConditionModel.from_pretrained(folder, subfolder=UNET_FOLDER).state_dict()
        if shapes(saved) != shapes(self.network.unet.state_dict()):
            raise ValueError(f"the U-Net in {folder} has other layers than this run's; give `policy` the value it had")
        self.network.unet.load_state_dict(saved)

    @staticmethod
    def usage(folder: str | Path) -> str:
        """A line of Python that loads what `save` wrote into a pipeline `pipe`."""
        return f'pipe.unet = UNet2DConditionModel.from_pretrained("{folder}", subfolder="{UNET_FOLDER}")'


class _WholeUnet(nn.Module):
    """A U-Net without diffusers' `config`, which Trainer's callbacks take for one of transformers."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)


def prepare_for_trainer(network: nn.Module, unet: UNet2DConditionModel, run_and_run_again: Callable) -> None:
    """Make `network`, around `unet`, one that Trainer takes.

    Args:
        run_and_run_again: (block, *inputs) -> its output, of which only the inputs are kept for the backward pass.
    """
    # Trainer's callbacks take a model's config for one of transformers and call methods that diffusers' lacks.
    network.config = None
    # What Trainer calls for `activation_checkpointing: true`; neither a PEFT model of diffusers' nor ours has it.
    network.activation_checkpointing_enable = lambda **settings: unet.enable_gradient_checkpointing(run_and_run_again)


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
