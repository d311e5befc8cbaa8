"""Which sampling steps to train next: the signal and the noise of each window's policy gradient, from the very updates
that train it.

Shapes: K steps of a window, C chunks of a rollout's pictures, d numbers of a gradient's sketch (`rl.gradient_sketch`).

A chunk is some pictures, whole groups. Gradients of two chunks share their expectation and nothing else, so the mean of
their inner products is the squared length of the expectation: the signal M of the window's gradient, without bias. The
mean square of a chunk's gradient, less that, is its noise N, and r = M / N the squared signal-to-noise ratio of a
chunk. (Prompts are drawn without repetition within one time round the list, see `rl.rollout.draw_prompts`; that takes
away the prompts' own variance over their number.)

Advantages are divided by their groups' std, on the average s, so s times the gradient is about that of the expected
reward, and an update of length 1 along the gradient of n chunks raises that, to first order, by s M / sqrt(M + N / n).
But lengths do not compare windows: advantages being of variance 1, N is the size of what the window's log density
changes by, so the same length leads sqrt(N) times as far, and the later a step the larger is N, by orders of magnitude.
At equal distance, in the root of the KL divergence, it is

    gain = s r / sqrt(r + 1 / n).

s and r are of just what is trained, with shared noise too (`rl.rollout.shared_places`): the later a window, the less of
the reward is left for it to decide, and the less noise is left. `auto` trains the window that promises the most gain
for its cost, in passes of the network (`rl.rollout_plan.passes`).

The signal is small: with few chunks r is known to +- e / sqrt(pairs of chunks), e being the spread of one pair's inner
product over N, alike for all windows. So what is known of r is a normal distribution: before anything is measured, of
mean 0 and as wide as one rollout's error; then as measured. The promise is of its mean and two std more ("optimism in
the face of uncertainty", as UCB, Auer et al. 2002): where nothing is told apart, windows are trained in turn, those
that decide more of the reward more often; what was measured long ago is forgotten, for the policy moves on. A window is
tried when the one before it has been, and is taken to decide as much, until it is known to decide less.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

MEMORY = 12
"""Rollouts that are remembered."""
OPTIMISM = 2.0
"""Std of what is known that are hoped for beyond the mean."""

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
    """What some chunks say of their gradients.

    Attributes:
        signal: M.
        noise: N.
        pairs: of different chunks, that M is the mean of.
        square: mean square of a pair's inner product.
    """

    signal: float
    noise: float
    pairs: int
    square: float

    @classmethod
    def of(cls, sketches: torch.Tensor) -> "Estimate":
        """From the gradients of at least 2 chunks, (C, d)."""
        products = sketches.double() @ sketches.double().T
        across = products[~torch.eye(len(products), dtype=torch.bool)]  # (a, b) and (b, a), which are one
        signal = float(across.mean())
        noise = float(products.diagonal().mean()) - signal
        return cls(signal, max(noise, 1e-30), len(across) // 2, float(across.square().mean()))

    @property
    def ratio(self) -> float:
        """r, negative by chance only."""
        return self.signal / self.noise

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of one chunk's gradient, with the sign of `ratio`."""
        return math.copysign(math.sqrt(abs(self.ratio)), self.ratio)


def gain(ratio: float, spread: float, chunks: float) -> float:
    """Of an update from `chunks` chunks; see above.

    Args:
        ratio: r; below 0 it counts as 0.
        spread: s.
    """
    ratio = max(ratio, 0.0)
    return spread * ratio / math.sqrt(ratio + 1 / chunks)


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
        self._spreads: list[float] = []  # s of the windows that were tried, from the first on, when each was last
        self._seen: list[tuple[int, torch.Tensor]] = []  # place of a window, sketches (C, K, d)

    def learn(self, sketches: torch.Tensor, spread: float) -> None:
        """Take in what the update of `window` told, and choose the next one.

        Args:
            sketches: (C, K, d), of the chunks of all ranks, step by step. If they are not finite, of an update that
                float16 could not hold, they tell nothing.
            spread: s, the mean std of what is compared within a group.
        """
        if not bool(sketches.isfinite().all()):
            return
        place = self.windows.index(self.window)
        self._spreads[place : place + 1] = [spread]
        self._seen = [*self._seen, (place, sketches.float().cpu())][-MEMORY:]
        worth = [gain / cost for gain, cost in zip(self.promises(), self._costs, strict=False)]
        self.window = self.windows[worth.index(max(worth))]

    def promises(self) -> list[float]:
        """The gain that each window may have, as far as is known: of those that were tried, and of the next one."""
        known = self._known()
        error = _error(known.values())
        first = math.comb(len(self._seen[-1][1]), 2)  # pairs of one rollout
        promised = []
        for place in range(min(len(self._spreads) + 1, len(self.windows))):
            mean, pairs = (known[place].ratio, known[place].pairs) if place in known else (0.0, 0)
            ratio = (mean * pairs + OPTIMISM * error * math.sqrt(pairs + first)) / (pairs + first)
            promised.append(gain(ratio, self._spreads[min(place, len(self._spreads) - 1)], self._chunks))
        return promised

    def snr(self) -> dict[int, float]:
        """Step -> signal-to-noise ratio of one chunk's gradient, of the steps that were trained lately."""
        found: dict[int, list[torch.Tensor]] = {}
        for place, sketches in self._seen:
            for k, step in enumerate(self.windows[place]):
                found.setdefault(step, []).append(sketches[:, k])
        return {step: Estimate.of(torch.cat(sketches)).snr for step, sketches in sorted(found.items())}

    def _known(self) -> dict[int, Estimate]:
        """Place of a window -> what is known of the sum of its steps' gradients."""
        found: dict[int, list[torch.Tensor]] = {}
        for place, sketches in self._seen:
            found.setdefault(place, []).append(sketches.sum(dim=1))
        return {place: Estimate.of(torch.cat(sketches)) for place, sketches in sorted(found.items())}

    def state(self) -> dict[str, torch.Tensor]:
        """As safetensors take it; empty before the first rollout."""
        if not self._seen:
            return {}
        places = torch.tensor([place for place, _ in self._seen])
        sketches = {f"sketches_{age}": one for age, (_, one) in enumerate(self._seen)}
        return {"places": places, "spreads": torch.tensor(self._spreads, dtype=torch.float64), **sketches}

    def load(self, state: dict[str, torch.Tensor], window: Window) -> None:
        """Go on from where `state` was made, `window` being the one to train next."""
        self.window = window
        if state:
            self._spreads = state["spreads"].tolist()
            self._seen = [(place, state[f"sketches_{age}"]) for age, place in enumerate(state["places"].tolist())]


def _error(known: Collection[Estimate]) -> float:
    """e: of the ratio that one pair of chunks tells."""
    pairs = sum(one.pairs for one in known)
    return math.sqrt(sum(one.pairs * one.square / one.noise**2 for one in known) / pairs)
