"""LAION's aesthetic predictor, version 2: how much people like the look of a picture, whatever was asked for."""

from pathlib import Path

import torch
from torch import nn

from reward.others.clip import ClipEye, check_processor
from reward.others.files import check_file, check_folder, load_tensors, read_weights
from reward.others.frozen import SeeingReward
from reward.others.linear_head import LinearHead
from reward.others.showing import Showing


class AestheticScore(SeeingReward):
    """LAION-Aesthetics V2 (Schuhmann 2022): a linear head on the normalised picture embedding of CLIP ViT-L/14.

    The reward "aesthetic quality" of DDPO (Black et al. 2023, arXiv 2305.13301, section 5.2). Trained to predict
    ratings of 1 to 10 (SAC, AVA, LAION-Logos), and not held to them. It sees no prompt.

    Generated pictures mostly get 4 to 7.5: two deviations below and above the averages that are published with theirs,
    5.37 - 2 * 0.68 (SDXL-DMD2) to 6.13 + 2 * 0.68 (a tuned SDXL-Turbo), each over 500 prompts (Lee et al. 2026,
    arXiv 2609.34673, tables 12 and 14). Stable Diffusion 1.5 gets 5.37 and SDXL 5.95 on average over 500 prompts of
    Pick-a-Pic (Liang et al. 2024, arXiv 2406.04314, tables 2 and 1).

    Args:
        model: the head's file, `sac+logos+ava1-l14-linearMSE.pth` of the repository
            christophschuhmann/improved-aesthetic-predictor; on the hub
            `trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth`.
        clip: folder or the hub's name of the CLIP whose embeddings it was trained on: `openai/clip-vit-large-patch14`.
        batch_size, dtype: see `FrozenReward`.
    """

    name = "aesthetic"

    def __init__(self, model: str | Path, clip: str | Path, batch_size: int = 32, dtype: str = "float32"):
        super().__init__(batch_size, dtype)
        check_file("model", model)
        check_folder("clip", clip, "clip")
        self.source, self.clip = model, check_processor(clip, None)

    @property
    def showing(self) -> Showing:
        return self.model["eye"].showing

    def _load(self) -> nn.Module:
        weights = read_weights(self.source)
        eye = ClipEye(self.clip, self.clip)
        head = LinearHead(eye.encoder.config.projection_dim)
        load_tensors(head, weights, self.source)
        return nn.ModuleDict({"eye": eye, "head": head})

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.model["head"](self._see(images).to(self.dtype)).squeeze(-1)

    def _see(self, images: torch.Tensor) -> torch.Tensor:
        return self.model["eye"](images)
