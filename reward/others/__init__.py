"""Rewards that others trained or defined: a number a picture, each as a `RewardFn`.

    reward: reward.others:PickScore
    reward_kwargs: {model: yuvalkirstain/PickScore_v1, processor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K}

Models are loaded from a local folder or the hub, when they are first used; a weighted sum of several rewards is
`rewards:` in a YAML (`reward.by_name`). What each gives to four drawings whose prompts are known, and to noise:

    python -m reward.others --self_check --reward pickscore --model DIR

Not here: MPS (Zhang et al., CVPR 2024), whose one published file is a pickle of a whole module, which runs code when it
is read, and whose cross-attention's weights are published in no other form.
"""

from reward.others.aesthetic import AestheticScore
from reward.others.clip import CLIPScore, HPSv2, PickScore
from reward.others.image_reward import ImageReward
from reward.others.jpeg import JpegCompressibility, JpegIncompressibility
from reward.others.vqa import VQAScore

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "HPSv2",
    "ImageReward",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PickScore",
    "VQAScore",
]
