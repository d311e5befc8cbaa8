"""The limits that what is watched should not cross, and when a run can watch it at all.

A rollout shows the policy as the updates before it left it, so its pictures tell for nothing whether a reward is still
obeyed or already gamed. Each monitor is a curve `watch/<name>`; `watch_limits` changes its limit, `stop_on` ends the
run at it, and leaves the weights of the best checkpoint. "Of the start" is of the first rollout.

    held_out      A reward that is not trained on fell while the trained one rose: the plainest sign. How far its mean
                  over the last 5 rollouts is from the start, in standard deviations of its first pictures. It counts
                  only by what is beyond three standard errors (over prompts): of runs of 30 rollouts of 8 prompts in
                  which nothing happens, one in a hundred crosses the limit, of 32 prompts none.
                  -0.2: a fifth of a standard deviation is what is commonly called a small effect.
    agreement     Whether the two prefer the same of a prompt's pictures: the mean of their correlation within prompts,
                  over the last 5 rollouts. That one prompt is easier than another does not move it, and it says where
                  training is going before it is there. It counts by the least of what the last 1, 2, .. 5 rollouts say,
                  three standard errors above each. 0: below, what pleases the one displeases the other.
    evaluated     The trained reward, or the held-out one, fell since before training, or since the evaluation in which
                  it was best, of the same held-out prompts from the same noise: in standard errors, those of few
                  prompts, or of a best one among many, taken for as much less as Student's t and Bonferroni say.
                  Measured by the evaluations in the midst of training, `eval_strategy`. -3: of 200 evaluations in which
                  neither reward changes, about one is below.
    reward        The reward that is trained on fell: the run breaks what it should improve, by too large a learning
                  rate or credit that leads elsewhere. As held_out.
    diversity     Pictures of one prompt become alike: their mean distance, of the start; between what the reward sees
                  in them where it tells (`features`), else between their pixels. Where rollouts differ in the noise
                  that a prompt's pictures share (`share_noise`), the start is the first of each kind. 0.7: sound runs
                  have lost a quarter, one 0.31 in a single rollout.
    drawn         Edges, of the start. 0.6: a policy that learns to draw less passes it on its way to nothing; sound
                  runs have stayed below 1.5. Texture that fools a predictor passes 1 / 0.6.
    file_size     Bytes of a JPEG, of the start; sees noise and texture that edges miss. 0.6 and 1 / 0.6, as above.
    kl            Divergence from the base, a latent element and trained step: the mean over all trained steps, of one
                  micro-batch a rollout, at one more pass of the network for each of these steps, which a limit of None
                  saves, unless `beta` needs it. 0.02: a step's mean has moved by a fifth of its noise (KL = d^2 / 2);
                  `make demo` ends at 0.0007.
    saturation    Share of scores within 1% of an end of their range. 0.5: the reward has no room left to tell the
                  better picture, and where a predictor is that sure it is often wrong.
    map_entropy   How evenly penalty maps are spread over places, of the start. 0.7: what is penalised has shrunk to
                  a few places, so that the maps no longer speak of the picture.
    dead_groups   Share of prompts whose pictures are all rewarded alike. 0.5: half of the pictures teach nothing.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward.feedback import RewardFn


@dataclass(frozen=True)
class Monitor:
    """What a curve says when it crosses its limit.

    Attributes:
        limit: in units of the curve.
        below, above: what is said when it is below the limit, or above; empty: nothing then. Of a ratio to the start,
            "above" means above 1 / limit.
        ratio: whether the curve is the measured value divided by that of the start.
        between: the limit lies between these two.
    """

    limit: float
    below: str = ""
    above: str = ""
    ratio: bool = False
    between: tuple[float, float] = (0.0, 1.0)

    def crossed(self, value: float, limit: float) -> str:
        """What is to be said of a curve at `value`; empty if it is within `limit`."""
        if self.below and value < limit:
            return self.below.format(value=value)
        if self.above and value > (1 / limit if self.ratio else limit):
            return self.above.format(value=value)
        return ""


MONITORS = {
    "held_out": Monitor(-0.2, below="the held-out reward falls while the trained one rises", between=(-math.inf, 0.0)),
    "agreement": Monitor(
        0.0,
        below="of a prompt's pictures, the trained reward prefers those that the held-out one likes less",
        between=(-1.0, 1.0),
    ),
    "evaluated": Monitor(
        -3.0,
        below="an evaluation finds the trained or the held-out reward lower than it was",
        between=(-math.inf, 0.0),
    ),
    "reward": Monitor(-0.2, below="the reward that is trained on falls", between=(-math.inf, 0.0)),
    "diversity": Monitor(
        0.7, below="pictures of one prompt differ by {value:.0%} of what they did at the start", ratio=True
    ),
    "drawn": Monitor(
        0.6,
        below="the pictures hold {value:.0%} of the edges they had at the start: the policy may be learning to draw "
        "less",
        above="the pictures hold {value:.0%} of the edges they had at the start: the policy may be adding texture",
        ratio=True,
    ),
    "file_size": Monitor(
        0.6,
        below="as files, the pictures have {value:.0%} of the size they had at the start: the policy may be emptying "
        "them",
        above="as files, the pictures have {value:.0%} of the size they had at the start: the policy may be adding "
        "noise",
        ratio=True,
    ),
    "kl": Monitor(0.02, above="the policy is far from the base", between=(0.0, math.inf)),
    "saturation": Monitor(0.5, above="{value:.0%} of the scores are at an end of their range"),
    "map_entropy": Monitor(
        0.7, below="the penalty maps are {value:.0%} as spread out as they were at the start", ratio=True
    ),
    "dead_groups": Monitor(0.5, above="for {value:.0%} of the prompts, all pictures are rewarded alike"),
}


FROM_REWARD = {
    "saturation": "the reward does not tell the `ranges` of its terms",
    "map_entropy": "the reward has no penalty maps",
}
"""What it means that a monitor of the reward's own was not measured, which only a rollout shows."""


def never_measured(num_generations: int, has_base: bool, evaluates: bool) -> dict[str, str]:
    """The monitors that such a run never measures -> why.

    Args:
        num_generations: pictures of a prompt.
        has_base: the base model is there to be asked.
        evaluates: in the midst of training.
    """
    off = {}
    if num_generations < 2:
        why = "num_generations is 1, and it compares pictures of one prompt"
        off |= {"agreement": why, "diversity": why, "dead_groups": why}
    if not evaluates:
        off["evaluated"] = "eval_strategy is no"
    if not has_base:
        off["kl"] = "tune is full and keeps no copy of the base unless beta is above 0"
    return off


def never_told(reward_fn: RewardFn, held_out: RewardFn | None) -> dict[str, str]:
    """The monitors that these rewards never give anything to measure -> why."""
    why = "there is no held-out reward; name one, watch_reward"
    off = {} if held_out is not None else {"held_out": why, "agreement": why}
    return off if getattr(reward_fn, "ranges", None) else off | {"saturation": FROM_REWARD["saturation"]}


def check_measured(stop_on: Sequence[str], off: Mapping[str, str]) -> None:
    """Complain if the run is to stop on a monitor that is never measured. `all` means all that are.

    Args:
        off: such monitors -> why.

    Raises:
        ValueError: `stop_on` names one.
    """
    for name in stop_on:
        if name in off:
            raise ValueError(f"stop_on names {name}, which this run never measures: {off[name]}; drop {name} there")


def check_watch(limits: Mapping[str, Any], stop_on: Sequence[str]) -> None:
    """Complain about `watch_limits` and `stop_on`.

    Raises:
        ValueError: a monitor that there is not (the nearest name is given), a limit that is no number or outside its
            range, a monitor to stop on that has no limit.
    """
    for setting, names in (("watch_limits", limits), ("stop_on", [name for name in stop_on if name != "all"])):
        for name in names:
            if name not in MONITORS:
                near = difflib.get_close_matches(str(name), MONITORS, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{setting}: there is no monitor {name!r} (nearest name: {near!r}); there are {', '.join(MONITORS)}"
                )
    for name, limit in limits.items():
        if limit is None:
            if name in stop_on:
                raise ValueError(f"stop_on names {name!r}, which has no limit; give it one in watch_limits, or drop it")
            continue
        low, high = MONITORS[name].between
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not low < limit < high:
            raise ValueError(
                f"watch_limits: the limit of {name} is {limit!r}; give a number between {low:g} and {high:g}, or null "
                "for none"
            )
