"""Is the reward being gamed? What is measured of every rollout, against the start, and the limits it should not cross.

A rollout shows the policy as the updates before it left it, so its pictures tell for nothing whether a reward is still
obeyed or already gamed. Each monitor is a curve `watch/<name>`; `watch_limits` changes its limit, `stop_on` ends the
run at it, and leaves the weights of the best checkpoint. "Of the start" is of the first rollout.

    held_out      A reward that is not trained on fell while the trained one rose: the plainest sign. How far its mean
                  over the last `WINDOW` rollouts is from the start, in standard deviations of its first pictures. It
                  counts only by what is beyond three standard errors (over prompts): of runs of 30 rollouts of 8
                  prompts in which nothing happens, one in a hundred crosses the limit, of 32 prompts none.
                  -0.2: a fifth of a standard deviation is what is commonly called a small effect.
    agreement     Whether the two prefer the same of a prompt's pictures: the mean of their correlation within prompts,
                  over the last `WINDOW` rollouts. That one prompt is easier than another does not move it, and it says
                  where training is going before it is there. It counts by the least of what the last 1, 2, .. `WINDOW`
                  rollouts say, three standard errors above each. 0: below, what pleases the one displeases the other.
    evaluated     The trained reward, or the held-out one, fell since before training, of the same held-out prompts from
                  the same noise: in standard errors, those of few prompts taken for as much less as Student's t says.
                  Measured by the evaluations in the midst of training, `eval_strategy`. -3: of 400 evaluations in which
                  neither reward changes, about one is below.
    reward        The reward that is trained on fell: the run breaks what it should improve, by too large a learning
                  rate or credit that leads elsewhere. As held_out.
    diversity     Pictures of one prompt become alike: their mean distance, of the start; between what the reward sees
                  in them where it tells (`features`), else between their pixels. 0.7: sound runs lose a tenth.
    drawn         Edges, of the start. 0.6: a policy that learns to draw less passes it on its way to nothing; sound
                  runs stay within a quarter. Texture that fools a predictor passes 1 / 0.6.
    file_size     Bytes of a JPEG, of the start; sees noise and texture that edges miss. 0.6 and 1 / 0.6, as above.
    kl            Divergence from the base, a latent element and trained step: the mean over all trained steps, of one
                  micro-batch a rollout. 0.02: a step's mean has moved by a fifth of its noise (KL = d^2 / 2); `make
                  demo` ends at 0.0007.
    saturation    Share of scores within 1% of an end of their range. 0.5: the reward has no room left to tell the
                  better picture, and where a predictor is that sure it is often wrong.
    map_entropy   How evenly penalty maps are spread over places, of the start. 0.7: what is penalised has shrunk to
                  a few places, so that the maps no longer speak of the picture.
    dead_groups   Share of prompts whose pictures are all rewarded alike. 0.5: half of the pictures teach nothing.

Shapes: N pictures over all ranks in groups of G of one prompt.
"""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import TrainerCallback, TrainerControl, TrainerState

from reward.feedback import Reward, RewardFn
from rl.monitors import agreement, dead_groups, diversity, file_size, map_entropy, saturation, standard_error
from rl.scoring import score

logger = logging.getLogger(__name__)

WINDOW = 5
"""Rollouts over which rewards and their agreement are averaged."""

ERRORS = 3
"""Standard errors of a fall of a reward, or of a disagreement of two, that are taken for noise."""

_AVERAGED = ("reward", "held_out", "agreement")
"""The monitors that are averaged over `WINDOW` rollouts; with `<name>_error`, a rollout's standard error of each."""


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
        below="an evaluation finds the trained or the held-out reward lower than before training",
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
                raise ValueError(f"stop_on names {name!r}, whose limit watch_limits takes away; drop one of the two")
            continue
        low, high = MONITORS[name].between
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not low < limit < high:
            raise ValueError(
                f"watch_limits: the limit of {name} is {limit!r}; give a number between {low:g} and {high:g}, or null "
                "for none"
            )


# ---- What is measured ----


def measure_pictures(
    images: torch.Tensor,
    prompts: Sequence[str],
    reward: Reward,
    reward_fn: RewardFn,
    held_out: RewardFn | None,
    batch_size: int | None,
) -> dict[str, torch.Tensor]:
    """What there is to measure of each of B pictures (B, 3, H, W) beside its reward: name -> (B,) float32.

    Raises:
        RewardError: what `held_out` says is not finite.
    """
    found = {"file_size": file_size(images)}
    if held_out is not None:
        found["held_out"] = score(held_out, images, prompts, batch_size).objective
    ranges = {name: limits for name, limits in getattr(reward_fn, "ranges", {}).items() if name in reward.terms}
    if ranges:
        found["saturation"] = saturation(reward.terms, ranges)
    if reward.penalties:
        spread = [map_entropy(maps).to(images.device) for maps in reward.penalties.values()]
        found["map_entropy"] = torch.stack(spread).mean(dim=0)
    return {name: value.float().to(images.device) for name, value in found.items()}


def measure_rollout(
    pictures: Mapping[str, torch.Tensor],
    compared: torch.Tensor,
    seen: torch.Tensor,
    group_size: int,
    std_floor: float,
) -> dict[str, float]:
    """What `Watch.observe` wants to know of a rollout.

    Args:
        pictures: as `measure_pictures` gives it, and `drawn`, over all ranks: name -> (N,).
        compared: (N,), the trained reward as it is compared within groups.
        seen: (N, D) features, or (N, 3, H, W) pictures.
        std_floor: below this std, in units of the reward, a group is dead.
    """
    rewards = {"reward": compared} | {name: pictures[name] for name in ("held_out",) if name in pictures}
    found = {name: float(value.mean()) for name, value in {**pictures, **rewards}.items()}
    for name, values in rewards.items():
        found[f"{name}_error"] = standard_error(values, group_size)
        found[f"{name}_spread"] = float(values.std())
    if group_size > 1:
        found["diversity"] = float(diversity(seen, group_size).mean())
        found["dead_groups"] = dead_groups(compared, group_size, std_floor)
        if "held_out" in rewards:
            found["agreement"], found["agreement_error"] = agreement(*rewards.values(), group_size)
    return found


# ---- What is made of it ----


class Watch:
    """Compares every rollout with the start and with the limits. It depends on what it is shown only, so all ranks that
    are shown the same know the same, and a run that is resumed with `state` goes on as if it had not been stopped.

    Args:
        limits: monitor -> its limit in place of the default, None for none.
        stop_on: monitors to stop on, or `all`.
        speaks: whether it warns on the console.
        off: monitors that are never measured -> why.

    Raises:
        ValueError: `stop_on` names one of `off`.

    Attributes:
        over: the monitors that are across their limits, in the order of `MONITORS`.
        crossed: those that ever were, likewise.
        best: of the checkpoints that rollouts were drawn from, the one to keep: that with the best held-out reward,
            `global_step` and `held_out`, its mean in that rollout, or, with `evaluated`, in the evaluation of these
            weights, which comes before any rollout's; where none is watched, the last one of which no monitor of
            `stop_on` (of all, where it names none) was over its limit, `global_step`. None before the first.
    """

    def __init__(
        self,
        limits: Mapping[str, float | None],
        stop_on: Sequence[str] = (),
        speaks: bool = True,
        off: Mapping[str, str] | None = None,
    ):
        self.off = dict(off or {})
        check_measured(stop_on, self.off)
        self.limits = {name: limits.get(name, monitor.limit) for name, monitor in MONITORS.items()}
        self._named = set(stop_on) - {"all"}
        self._looked = False
        self.stop_on = set(MONITORS) if "all" in stop_on else set(stop_on)
        self.speaks = speaks
        self.best: dict[str, float] | None = None
        self._start: dict[str, float] = {}
        self._evaluated: dict[str, list[float]] = {}  # before training; see `observe_evaluation`
        self._asked: dict[str, float] = {}  # what the held-out reward said in the last evaluation, and when
        self._recent: list[dict[str, float]] = []  # rollouts, the newest last
        self._crossed: set[str] = set()
        self._judged: dict[str, float] = {}  # monitor -> what was held against its limit last

    @property
    def over(self) -> list[str]:
        return [name for name in MONITORS if name in self._judged and self._says(name, self._judged[name])]

    @property
    def crossed(self) -> list[str]:
        return [name for name in MONITORS if name in self._crossed]

    @property
    def judged(self) -> dict[str, float]:
        """Monitor -> what was held against its limit last; of `held_out`, `reward` and `agreement` not the curve."""
        return dict(self._judged)

    @property
    def stopping(self) -> list[str]:
        """The monitors for which the run is to end."""
        return [name for name in self.over if name in self.stop_on]

    def observe(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Take note of what was measured (see `measure_rollout`; `kl` comes by itself) and say once what crosses its
        limit.

        Returns:
            monitor -> value of its curve, for those that were measured.

        Raises:
            ValueError: the run is to stop on a monitor that its first rollout does not measure.
        """
        if not self._looked:
            self._looked = True
            self._check_first(measured)
        for name, value in measured.items():
            self._start.setdefault(name, value)
        if "reward" in measured:  # of a rollout; KL comes by itself
            told = {
                name: measured[name] for name in (*_AVERAGED, *map("{}_error".format, _AVERAGED)) if name in measured
            }
            self._recent = [*self._recent, told][-WINDOW:]
        curves = {}
        for name, monitor in MONITORS.items():
            if name in measured:
                value = judged = measured[name]
                if name == "agreement":
                    value, judged = self._agreement()
                elif name in _AVERAGED:
                    value, judged = self._fall(name)
                elif monitor.ratio:  # where there was nothing at the start, nothing can be lost
                    value = judged = measured[name] / self._start[name] if self._start[name] > 1e-8 else 1.0
                self._judge(name, judged)
                curves[name] = value
        return curves

    def _check_first(self, measured: Mapping[str, float]) -> None:
        for name, why in FROM_REWARD.items():
            if name in measured or name in self.off or name not in self.stop_on:
                continue
            if name in self._named:
                raise ValueError(f"stop_on names {name}, which the first rollout does not measure: {why}; drop it")
            if self.speaks:
                logger.warning("stop_on all does not stop on %s: %s", name, why)

    def observe_evaluation(self, rewards: Mapping[str, Sequence[float]], global_step: int = 0) -> dict[str, float]:
        """Take note of an evaluation, and say once what crosses its limit. The first is what others are held against.

        Args:
            rewards: `reward`, the trained one, and `held_out`, if there is one -> its mean over the pictures of each
                prompt.
            global_step: updates before it.

        Returns:
            as `observe`: what has fallen most, if there are prompts enough to tell.
        """
        self._evaluated = self._evaluated or {name: list(values) for name, values in rewards.items()}
        if "held_out" in rewards:
            self._asked = {"global_step": global_step, "held_out": sum(rewards["held_out"]) / len(rewards["held_out"])}
        falls = [
            fall for name, values in rewards.items()
            if (fall := paired_fall(self._evaluated.get(name, []), values)) is not None
        ]  # fmt: skip
        if not falls:
            return {}
        self._judge("evaluated", min(falls))
        return {"evaluated": min(falls)}

    def _fall(self, name: str) -> tuple[float, float]:
        """The curve of a reward, and the value that is judged: what is left of the fall beyond what may be noise."""
        mean, error = self._lately(name, WINDOW)
        spread = self._start[f"{name}_spread"] or 1.0
        shift = (mean - self._start[name]) / spread
        noise = math.hypot(error, self._start[f"{name}_error"]) / spread
        judged = min(shift + ERRORS * noise, 0.0)
        if name == "held_out" and self._lately("reward", WINDOW)[0] <= self._start["reward"]:
            judged = 0.0  # no gaming: `reward` has its own
        return shift, judged

    def _agreement(self) -> tuple[float, float]:
        """The curve, and the value that is judged: the most that it may be."""
        windows = [self._lately("agreement", count) for count in range(1, len(self._recent) + 1)]
        return windows[-1][0], min(min(mean + ERRORS * error for mean, error in windows), 1.0)

    def _lately(self, name: str, count: int) -> tuple[float, float]:
        """Mean over the last `count` rollouts, fewer if there are fewer, and its standard error."""
        recent = [entry for entry in self._recent if f"{name}_error" in entry][-count:]
        variance = sum(entry[f"{name}_error"] ** 2 for entry in recent) / len(recent) ** 2
        return sum(entry[name] for entry in recent) / len(recent), math.sqrt(variance)

    def _judge(self, name: str, value: float) -> None:
        says = self._says(name, value)
        if says and name not in self.over and self.speaks:
            logger.warning("%s (watch/%s is %.3g, its limit %.3g)", says, name, value, self.limits[name])
        self._judged[name] = value
        if says:
            self._crossed.add(name)

    def _says(self, name: str, value: float) -> str:
        limit = self.limits[name]
        return "" if limit is None else MONITORS[name].crossed(value, limit)

    def note_checkpoint(self, global_step: int, held_out: float | None = None) -> None:
        """The rollout that was observed last was drawn from the checkpoint behind `global_step` updates.

        Args:
            held_out: mean of the held-out reward in it, if there is one.
        """
        if held_out is None:
            if not (self.stopping if self.stop_on else self.over):
                self.best = {"global_step": global_step}
            return
        found = {"global_step": global_step, "held_out": held_out}
        if self._asked and self._asked["global_step"] == global_step:
            found = self._asked | {"evaluated": True}

        def worth(checkpoint: Mapping[str, float]) -> tuple[bool, float]:
            return bool(checkpoint.get("evaluated")), checkpoint.get("held_out", -math.inf)

        if self.best is None or worth(found) > worth(self.best):
            self.best = found

    def state(self) -> dict[str, Any]:
        """Everything that it knows, as JSON can hold it (a float comes back to the bit)."""
        known = {"start": self._start, "recent": self._recent, "judged": self._judged, "best": self.best,
                 "evaluated": self._evaluated, "asked": self._asked, "crossed": self.crossed}  # fmt: skip
        known["over"] = self.over  # for readers; it follows from the others and the limits
        return deepcopy(known)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; from nothing, as a checkpoint of an older version has it, anew.

        Evaluations are held against the one that this process made before, if it did: they are of the same prompts.
        """
        self._start = dict(state.get("start", {}))
        self._recent = list(state.get("recent", []))
        self._evaluated = self._evaluated or dict(state.get("evaluated", {}))
        self._asked, self._crossed = dict(state.get("asked", {})), set(state.get("crossed", []))
        self._judged, self.best = dict(state.get("judged", {})), state.get("best")


def paired_fall(before: Sequence[float], after: Sequence[float]) -> float | None:
    """The mean of `after` less `before`, of the same P prompts, in standard errors: Student's t of P - 1 degrees of
    freedom, as the number that a normal variable is above, or below, as seldom; between -37 and 37. None for fewer
    than two prompts, or where their counts differ."""
    if len(before) != len(after) or len(before) < 2:
        return None
    differences = np.subtract(after, before)
    mean, error = differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5
    chance = stats.t.sf(abs(mean) / max(error, 1e-12), len(differences) - 1)
    return float(np.copysign(stats.norm.isf(max(chance, 1e-300)), mean))


class StopWhenGamed(TrainerCallback):
    """Ends the run behind the rollout in which a monitor of `stop_on` is across its limit."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_epoch_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.watch.stopping and state.global_step < state.max_steps:
            control.should_training_stop = True
            if self.watch.speaks:
                logger.warning(
                    "stopping after %d of %d updates: %s across its limit (stop_on)",
                    state.global_step, state.max_steps, ", ".join(f"watch/{name}" for name in self.watch.stopping),
                )  # fmt: skip
