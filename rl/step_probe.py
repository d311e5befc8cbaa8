"""Which sampling steps to train next: the signal and the noise of each window's policy gradient, from the very updates
that train it.

Shapes: K steps of a window, C chunks of a rollout's pictures, d numbers of a gradient's sketch (`rl.gradient_sketch`).

A chunk is some pictures, whole groups. Gradients of two chunks of a rollout share their expectation and nothing else,
so the mean of their inner products is the squared length of the expectation: the signal M of the window's gradient,
without bias. (Prompts are drawn without repetition within one time round the list, see `rl.rollout.draw_prompts`; that
takes away the prompts' own variance over their number. Where a rollout makes several updates, gradients behind the
first are of a policy that has moved by it.) The mean square of a chunk's gradient, less M, is its noise N, and r = M /
N the squared signal-to-noise ratio of a chunk. It is of the loss that is trained: with `beta`, of the reward less the
KL.

Advantages are divided by their groups' std, on the average s, so s times the gradient is about that of the expected
reward. An update of length 1 along the gradient of n chunks, g in length each, raises that, to first order, by

    gain = reach * r / sqrt((1 + r) (r + 1 / n)),    reach = s g,

where s and g are of just what is trained, with shared noise too (`rl.rollout.shared_places`): the later a window, the
less of the reward it decides, and the farther a step of the weights moves it. `auto` trains the window that promises
the most gain for its cost, in passes of the network (`rl.rollout_plan.passes`). (r is of gradients that are scaled as
`rl.gradient_sketch.metric` says, g of them as they are; the length of an update is left to the optimizer: Adam, whose
memory of squares all windows share, makes longer ones where gradients are longer.)

The signal is small, and one rollout says little. So what is known of r is a normal distribution: before anything is
measured, of mean 0 and as wide as one rollout's error, then as measured, what is older counting less, for the policy
moves on. The promise is of its mean and two std more ("optimism in the face of uncertainty", as UCB, Auer et al. 2002):
where nothing is told apart windows take turns, those of more reach more often. A window is tried when the one before it
has been, and is taken to reach as far as that, until it is known not to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch

HALF_LIFE = 16
"""Rollouts after which a measurement counts half."""
OPTIMISM = 2.0
"""Std of what is known that are hoped for beyond the mean."""
ALIKE = 0.1
"""Rollouts that it counts for that a window reaches as far as the one before it."""

Window = tuple[int, ...]
"""Consecutive sampling steps, indices into the schedule."""


def windows(steps: Sequence[int], count: int) -> list[Window]:
    """`count` consecutive ones of `steps` each, half as many further on, the first and the last of them included.

    Example: of the steps 0 to 5, 3 each: (0, 1, 2), (1, 2, 3), (2, 3, 4) and (3, 4, 5); 4 each: (0 .. 3), (2 .. 5).
    """
    last = len(steps) - count
    return [tuple(steps[first : first + count]) for first in sorted({*range(0, last, max(1, count // 2)), last})]


@dataclass(frozen=True)
class Estimate:
    """What the chunks of one rollout say of a gradient.

    Attributes:
        ratio: r, negative by chance only.
        variance: of `ratio`.
    """

    ratio: float
    variance: float

    @classmethod
    def of(cls, sketches: torch.Tensor) -> "Estimate":
        """From (C, d), C at least 3, and not all zero.

        The mean of C (C - 1) / 2 inner products has the variance of one over their number, if they are independent. Two
        that have a chunk in common are not where there is a signal: both are the larger, the further the chunk's noise
        lies along it. Of noise that is alike in all directions that is r times the variance of one, where r is small,
        and less where it is not.
        """
        count = len(sketches)
        products = sketches.double() @ sketches.double().T
        upper = torch.triu_indices(count, count, offset=1)
        pairs = products[upper[0], upper[1]]
        signal = pairs.mean()
        noise = (products.diagonal().mean() - signal).clamp(min=torch.finfo(pairs.dtype).tiny)
        ratio = float(signal / noise)
        shared = 4 * (count - 2) / (count * (count - 1)) * max(ratio, 0.0)
        return cls(ratio, float(pairs.var() / noise.square()) * (1 / len(pairs) + shared))

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of one chunk's gradient, with the sign of `ratio`."""
        return math.copysign(math.sqrt(abs(self.ratio)), self.ratio)


@dataclass(frozen=True)
class Measured:
    """What the update of one rollout told.

    Attributes:
        place: of the window that it trained, among the windows.
        ratio, variance: see `Estimate`, of the sum of the window's steps.
        reach: s g, as far as windows can be compared by it: the mean std of what is compared within a group, times the
            root of the mean squared length of the gradient of a micro-batch at one step. Where most of it is noise, a
            chunk's is that times a factor that all windows have.
    """

    place: int
    ratio: float
    variance: float
    reach: float


def gain(ratio: float, reach: float, chunks: float) -> float:
    """Of an update of length 1 from `chunks` chunks; see above.

    Args:
        ratio: r; below 0 it counts as 0.
    """
    ratio = max(ratio, 0.0)
    return reach * ratio / math.sqrt((1 + ratio) * (ratio + 1 / chunks))


class StepProbe:
    """What a run has measured of its steps, and which window of them it should train.

    Args:
        steps: to choose from, indices into the schedule, in rising order.
        count: K, how many of them a rollout trains.
        chunks: n, of an update.
        cost: of a rollout that trains a window, in any unit.

    Attributes:
        window: the one to train next.
    """

    def __init__(self, steps: Sequence[int], count: int, chunks: float, cost: Callable[[Window], float]):
        self.steps, self.windows = tuple(steps), windows(steps, count)
        self.window = self.windows[0]
        self._chunks, self._costs = chunks, [cost(window) for window in self.windows]
        self._measured: list[Measured] = []

    def learn(self, sketches: torch.Tensor, reach: float) -> dict[int, float]:
        """Take in what the update of `window` told, and choose the next one.

        Args:
            sketches: (C, K, d), of the chunks of all ranks, step by step. If they are not finite, of an update that
                float16 could not hold, or all zero, of groups that are all alike, they tell nothing.
            reach: see `Measured`; in any unit, and finite where `sketches` are.

        Returns:
            Step -> signal-to-noise ratio of one chunk's gradient; empty where nothing was told.
        """
        if not (bool(sketches.isfinite().all()) and bool(sketches.any())):
            return {}
        assert math.isfinite(reach), reach
        whole = Estimate.of(sketches.sum(dim=1))
        told = Measured(self.windows.index(self.window), whole.ratio, whole.variance, reach)
        self._measured.append(told)
        found = {step: Estimate.of(sketches[:, k]).snr for k, step in enumerate(self.window)}
        worth = [gain / cost for gain, cost in zip(self.promises(), self._costs, strict=False)]
        self.window = self.windows[worth.index(max(worth))]
        return found

    def promises(self) -> list[float]:
        """The gain that each window may have, as far as is known, up to the next one behind the last that was tried."""
        weights = [0.5 ** (age / HALF_LIFE) for age in reversed(range(len(self._measured)))]
        pairs = list(zip(weights, self._measured, strict=True))
        variance = sum(weight * one.variance for weight, one in pairs) / sum(weights)
        promised, reach = [], self._measured[0].reach
        for place in range(min(2 + max(one.place for one in self._measured), len(self.windows))):
            mine = [(weight, one) for weight, one in pairs if one.place == place]
            known = sum(weight for weight, _ in mine)
            mean = sum(weight * one.ratio for weight, one in mine) / (1 + known)
            reach = (ALIKE * reach + sum(weight * one.reach for weight, one in mine)) / (ALIKE + known)
            ratio = mean + OPTIMISM * math.sqrt(variance / (1 + known))
            promised.append(gain(ratio, reach, self._chunks))
        return promised

    def state(self) -> list[list[float]]:
        """As JSON can hold it."""
        return [list(astuple(one)) for one in self._measured]

    def load(self, state: Sequence[Sequence[float]], window: Window) -> None:
        """Go on from where `state` was made, `window` being the one to train next; from the first, if it is none of
        the windows, as an earlier version chose it."""
        self._measured = [Measured(int(place), *rest) for place, *rest in state]
        self.window = window if window in self.windows else self.windows[0]
