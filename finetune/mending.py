"""One picture mended: what a reward's penalty maps mark in it is drawn again, and the best of several is kept.

"Rich Human Feedback for Text-to-Image Generation" (Liang et al. 2023, arXiv 2312.10240), section 5, done again on the
picture kept; the original is one of those to choose from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from finetune.inpaint_arguments import InpaintArguments
from finetune.region import put_in, region
from reward.feedback import Reward, RewardFn
from rl.keyed import keyed_generator
from rl.scoring import score

FIXED, NOTHING, TOO_LARGE, NO_BETTER = "fixed", "nothing found", "region too large", "no candidate better"
"""What became of a picture; it is kept as it was but for the first."""


@dataclass(frozen=True)
class Round:
    """One look at a picture.

    Attributes:
        share: (H, W) in [0, 1], the region; see `finetune.region.region`.
        scores: of the candidates; none where nothing was drawn.
        kept: which candidate was kept; None: the picture as it was.
    """

    share: torch.Tensor
    scores: tuple[float, ...] = ()
    kept: int | None = None


@dataclass(frozen=True)
class Mended:
    """What became of a picture.

    Attributes:
        picture: (3, H, W) uint8.
        status: `FIXED`, or why it is the original.
        before, after: the reward of the original and of `picture`.
        rounds: in order; at least one.
    """

    picture: torch.Tensor
    status: str
    before: Reward
    after: Reward
    rounds: tuple[Round, ...]

    @property
    def share(self) -> torch.Tensor:
        """(H, W) in [0, 1]: all that was drawn again, or, if nothing was kept, what was looked at first."""
        shares = [one.share for one in self.rounds if one.kept is not None] or [self.rounds[0].share]
        return torch.stack(shares).amax(dim=0)


def mend(picture: torch.Tensor, prompt: str, uid: str, run: InpaintArguments, reward: RewardFn, draw) -> Mended:
    """Draw the problem region of one picture (3, H, W) uint8 again; see the head of the file.

    Args:
        uid: the noise is keyed by (`run.seed`, uid, round, candidate).
        draw: an `Inpainter`, or what is called like one.

    Raises:
        ValueError: the reward has no such penalty maps as the thresholds name.
        RewardError: what the reward says cannot be compared.
    """
    before = said = judge(reward, picture[None], prompt, run)
    check_maps(said, run.thresholds)
    rounds: list[Round] = []
    size = tuple(picture.shape[-2:])
    for number in range(run.rounds):
        maps = {name: said.penalties[name][0] for name in run.thresholds}
        share = region(maps, run.thresholds, size, run.dilate, run.feather)
        area = float((share > 0).float().mean())
        if area == 0 or area > run.max_area:
            why = NOTHING if area == 0 else TOO_LARGE
            rounds.append(Round(share))
            break
        sources = [keyed_generator(run.seed, "inpaint", uid, number, one) for one in range(run.num_candidates)]
        candidates = put_in(picture, draw(picture.float() / 255, share, prompt, sources), share)
        pairs = judge_beside(reward, picture, candidates, prompt, run)
        gains = [float(new.objective) - float(old.objective) for old, new in pairs]
        best = max(range(len(gains)), key=gains.__getitem__)
        better = gains[best] > run.min_gain
        rounds.append(Round(share, tuple(float(new.objective) for _, new in pairs), best if better else None))
        old, new = pairs[best]
        if number == 0:
            before = said = old
        if not better:
            why = NO_BETTER
            break
        picture, said = candidates[best], new
    fixed = any(one.kept is not None for one in rounds)
    return Mended(picture, FIXED if fixed else why, before, said, tuple(rounds))


def judge_beside(
    reward: RewardFn, picture: torch.Tensor, candidates: torch.Tensor, prompt: str, run: InpaintArguments
) -> list[tuple[Reward, Reward]]:
    """What a reward says of `picture` (3, H, W) uint8 and of N candidates (N, 3, H, W), on the CPU.

    It is asked about `run.batch_size` pictures at most, but at least 2, in questions of one size that hold the picture
    each: what was judged in batches of different sizes could differ by rounding alone. With 3 candidates and a
    batch_size of 3: [picture, 0, 1], [picture, 2, 2].

    Returns:
        for each candidate the picture's reward and the candidate's, of one question.
    """
    count = math.ceil(len(candidates) / max(run.batch_size - 1, 1))
    each = math.ceil(len(candidates) / count)
    pairs = []
    for start in range(0, len(candidates), each):
        part = candidates[start : start + each]
        filled = torch.cat([picture[None], part, part[-1:].expand(each - len(part), -1, -1, -1)])
        said = judge(reward, filled, prompt, run)
        pairs += [(_only(said, 0), _only(said, 1 + place)) for place in range(len(part))]
    return pairs


def judge(reward: RewardFn, pictures: torch.Tensor, prompt: str, run: InpaintArguments) -> Reward:
    """The reward of pictures (N, 3, H, W) uint8 of one prompt, asked for at once, on the CPU."""
    images = (pictures.float() / 255).to(run.device)
    said = score(reward, images, [prompt] * len(pictures))
    return Reward(
        total=said.total.cpu(),
        penalties={name: maps.cpu() for name, maps in said.penalties.items()},
        terms={name: value.cpu() for name, value in said.terms.items()},
    )


def check_maps(said: Reward, thresholds: Mapping[str, float]) -> None:
    """Complain about thresholds of maps that a reward does not have.

    Raises:
        ValueError: with those that it has.
    """
    if unknown := sorted(set(thresholds) - set(said.penalties)):
        raise ValueError(
            f"thresholds names {', '.join(unknown)}, but the reward's penalty maps are "
            f"{', '.join(sorted(said.penalties)) or 'none'}; RichReward has those that its penalty_weights name"
        )


def as_row(mended: Mended) -> dict:
    """A line of `results.jsonl`, but for the files: what became of the picture, and the reward before and after."""
    return {
        "status": mended.status,
        "area": float((mended.share > 0).float().mean()),
        "rounds": [{"scores": list(one.scores), "kept": one.kept} for one in mended.rounds],
        **{
            side: {"reward": float(said.objective[0]), **{name: float(value[0]) for name, value in said.terms.items()}}
            for side, said in (("before", mended.before), ("after", mended.after))
        },
    }


def _only(said: Reward, index: int) -> Reward:
    """The reward of one picture of several."""
    one = slice(index, index + 1)
    return Reward(
        total=said.total[one],
        penalties={name: maps[one] for name, maps in said.penalties.items()},
        terms={name: value[one] for name, value in said.terms.items()},
    )
