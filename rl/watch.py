"""Is the reward being gamed? What is measured of every rollout and evaluation, against the start.

What it means and should not cross stands in `rl.watch_limits`.

Shapes: N pictures over all ranks in groups of G of one prompt.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from reward.feedback import Reward, RewardFn
from rl.monitors import (
    agreement,
    dead_groups,
    diversity,
    file_size,
    map_entropy,
    paired_fall,
    saturation,
    standard_error,
)
from rl.scoring import score
from rl.watch_limits import FROM_REWARD, MONITORS, check_measured

logger = logging.getLogger(__name__)

WINDOW = 5
"""Rollouts over which rewards and their agreement are averaged."""

ERRORS = 3
"""Standard errors of a fall of a reward, or of a disagreement of two, that are taken for noise."""

_AVERAGED = ("reward", "held_out", "agreement")
"""The monitors that are averaged over `WINDOW` rollouts; with `<name>_error`, a rollout's standard error of each."""


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
        self._best_evaluated: dict[str, list[float]] = {}
        self._evaluations = 0
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

    def observe(self, measured: Mapping[str, float], shared: Sequence[int] = ()) -> dict[str, float]:
        """Take note of what was measured (see `measure_rollout`; `kl` comes by itself) and say once what crosses its
        limit.

        Args:
            shared: draws of noise that the pictures of a prompt had in common (`rl.rollout.shared_places`). They make
                them alike whatever the policy, so the diversity of a rollout is held against the first of its kind.

        Returns:
            monitor -> value of its curve, for those that were measured.

        Raises:
            ValueError: the run is to stop on a monitor that its first rollout does not measure.
        """
        if not self._looked:
            self._looked = True
            self._check_first(measured)
        starts = {"diversity": " ".join(["diversity", *map(str, shared)])}
        for name, value in measured.items():
            self._start.setdefault(starts.get(name, name), value)
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
                    start = self._start[starts.get(name, name)]
                    value = judged = measured[name] / start if start > 1e-8 else 1.0
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
        """Take note of an evaluation, and say once what crosses its limit. It is held against the first and, of each
        reward, the best so far.

        Args:
            rewards: `reward`, the trained one, and `held_out`, if there is one -> its mean over the pictures of each
                prompt.
            global_step: updates before it.

        Returns:
            as `observe`: what has fallen most surely, if there are prompts enough to tell.
        """
        self._evaluated = self._evaluated or {name: list(values) for name, values in rewards.items()}
        if "held_out" in rewards:
            self._asked = {"global_step": global_step, "held_out": sum(rewards["held_out"]) / len(rewards["held_out"])}
        falls = []
        for name, values in rewards.items():
            best = self._best_evaluated.get(name, [])
            falls += [paired_fall(self._evaluated.get(name, []), values), paired_fall(best, values, self._evaluations)]
            if not best or sum(values) > sum(best):
                self._best_evaluated[name] = list(values)
        self._evaluations += 1
        falls = [fall for fall in falls if fall is not None]
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
                 "evaluated": self._evaluated, "best_evaluated": self._best_evaluated,
                 "evaluations": self._evaluations, "asked": self._asked, "crossed": self.crossed}  # fmt: skip
        known["over"] = self.over  # for readers; it follows from the others and the limits
        return deepcopy(known)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; from nothing, as a checkpoint of an older version has it, anew.

        If this process made an evaluation before, and that is another one than the run's first, it is of other prompts:
        then later ones are held against it alone.
        """
        self._start = dict(state.get("start", {}))
        self._recent = list(state.get("recent", []))
        if not self._evaluated or self._evaluated == state.get("evaluated"):
            self._evaluated = dict(state.get("evaluated", {}))
            self._best_evaluated = dict(state.get("best_evaluated", {}))
            self._evaluations = state.get("evaluations", 0)
        self._asked, self._crossed = dict(state.get("asked", {})), set(state.get("crossed", []))
        self._judged, self.best = dict(state.get("judged", {})), state.get("best")


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
