"""What saves memory or time on the device: parts that are there only when needed, decoding in pieces, compilation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from reward.feedback import Reward, RewardFn


@dataclass(frozen=True)
class MemorySettings:
    """Names and meanings are those of `DDPOConfig`, which holds the help."""

    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: bool = False
    torch_compile_unet: bool = False


@contextmanager
def borrowed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it `modules` are on `device`, behind it where they were."""
    with ExitStack() as back:
        for module in modules:
            home = next(module.parameters()).device
            if home != device:
                module.to(device)
                back.callback(module.to, home)
        yield


class OffloadedReward:
    """A reward whose model is on the device only while it is asked; it has `ranges` and `features` if that one has.

    Args:
        reward_fn: with a method `to`.
        device: where it is asked; between, it is on the CPU.
    """

    def __init__(self, reward_fn: RewardFn, device: torch.device):
        self.reward_fn, self.device = reward_fn, device
        self.differentiable = getattr(reward_fn, "differentiable", False)
        if hasattr(reward_fn, "ranges"):
            self.ranges = reward_fn.ranges
        if hasattr(reward_fn, "features"):
            self.features = self._features
        reward_fn.to("cpu")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        with self._there():
            return self.reward_fn(images, prompts)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with self._there():
            return self.reward_fn.features(images)

    @contextmanager
    def _there(self) -> Iterator[None]:
        self.reward_fn.to(self.device)
        try:
            yield
        finally:
            self.reward_fn.to("cpu")


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Compile the transformer blocks of a U-Net in place, with the LoRA on them.

    Blocks of one shape share what is compiled, and names of weights stay as they are, so checkpoints do too.
    """
    # Each shape of block is compiled with and without gradients, LoRA and dropped inputs: more than dynamo's default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Credit by words hangs hooks on the blocks' attention for the time of a rollout: dynamo must look for them.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    unet.compile_repeated_blocks(fullgraph=True)
