"""What the pictures of a group have in common is computed once.

With shared noise (`rl.rollout.shared_places`) the pictures of a group have one latent until the first trained step's
own noise parts them. So up to that step, and in its update, the network need see one picture of each group only: the
others' outputs are the same, and their gradients are summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trunks:
    """Which of B pictures are still one; U of them differ.

    Attributes:
        first: (U,) int64, the place of the first picture of each group.
        of: (B,) int64, which of these groups each picture belongs to.
    """

    first: torch.Tensor
    of: torch.Tensor

    @classmethod
    def of_groups(cls, pictures: Sequence[int], group: int, device: torch.device | str = "cpu") -> "Trunks":
        """Of a batch of a rollout, whose prompts have `group` pictures each; a group may lie in several batches.

        Args:
            pictures: their numbers in the rollout.
        """
        groups = [picture // group for picture in pictures]
        different = list(dict.fromkeys(groups))
        first = [groups.index(one) for one in different]
        of = [different.index(one) for one in groups]
        return cls(torch.tensor(first, device=device), torch.tensor(of, device=device))
