"""LAION's aesthetic predictor, version 2: how much people like the look of a picture, whatever was asked for."""

from pathlib import Path

import torch
from torch import nn

from reward.others.clip import ClipEye, check_processor
from reward.others.files import check_file, check_folder, load_tensors, read_weights
from reward.others.frozen import SeeingReward
from reward.others.linear_head import LinearHead


class AestheticScore(SeeingReward):
    """LAION-Aesthetics V2 (Schuhmann 2022): a linear head on the normalised picture embedding of CLIP ViT-L/14.

    The reward "aesthetic quality" of DDPO (Black et al. 2023, arXiv 2305.13301, section 5.2). Trained to predict
    ratings of 1 to 10 (SAC, AVA, LAION-Logos), and not held to them; generated pictures mostly get 4.5 to 7. It sees no
    prompt.

    Args:
        model: the head's file, `sac+logos+ava1-l14-linearMSE.pth` of the repository
            christophschuhmann/improved-aesthetic-predictor.
        clip: folder or the hub's name of the CLIP whose embeddings it was trained on: `openai/clip-vit-large-patch14`.
        batch_size, dtype: see `FrozenReward`.
    """

    name = "aesthetic"

    def __init__(self, model: str | Path, clip: str | Path, batch_size: int = 32, dtype: str = "float32"):
        super().__init__(batch_size, dtype)
        check_file("model", model)
        check_folder("clip", clip, "clip")
        self.source, self.clip = model, check_processor(clip, None)

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
