"""Which sampling steps are worth training: the signal and the noise of each step's policy gradient, from rollouts.

Shapes: C chunks of pictures, S steps with noise, P trained weights, d numbers of a sketch.

A chunk is some pictures, whole groups, their prompts drawn from the list as `rl.rollout.draw_prompts` does. Gradients
of two chunks a, b share their expectation and nothing else, so for steps j, k the mean over a != b of <g_j^a, g_k^b>
estimates <E g_j, E g_k>: the signal M (S, S). (Without bias where the prompts of two chunks are drawn independently, as
those of two times round the list are; within one time round they differ, which takes away the prompts' own variance
over their number.) The mean over a of <g_j^a, g_k^a>, less M, is the noise N (S, S) of one chunk. An update along g =
the sum of the gradients of the steps in W, from n chunks and scaled to length 1, raises what the gradients are of, to
first order and in its units, by

    gain(W) = <E g, sum of E g_k over all steps> / sqrt(E |g|^2) = 1_W' M 1 / sqrt(1_W' (M + N / n) 1_W)

`auto` makes gain(W) / cost(W) as large as it can, W having a given number of steps and a rollout's time, `cost`, being
counted in passes of the network (`rl.rollout_plan.passes`): where groups share their noise, the sooner the first
trained step the more is drawn picture by picture. Decoding and the reward take the same time whatever is trained, and
are not counted. The noise is that of pictures that share nothing, also where training will share some of it.

The signal is small: inner products are taken between gradients whose every weight was scaled by the fourth root of its
mean square (half of what Adam does to it), which on the small world makes the error a third smaller; and errors still
exceed most signals. So estimates are shrunk towards their common mean, as far as their errors explain their
differences (empirical Bayes); then steps of less noise win until the signals have been told apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from rl.rollout import keyed_generator

WIDTH = 4096
"""d: an inner product of sketches errs by about |g| |h| / sqrt(d), far below the noise between chunks."""
FLOOR = 0.01
"""Smallest mean square of a weight's gradient that counts, in units of the mean over all weights."""
MEMORY = 6
"""Rollouts whose gradients are kept; the policy moves on, so older ones are forgotten."""
MOST_SETS = 20_000
"""More sets of steps than this are not all tried: steps are then chosen one after another."""


def metric(gradients: torch.Tensor) -> torch.Tensor:
    """What each weight's gradient is multiplied by, from one chunk's gradients (S, P) -> (P,)."""
    square = sum(gradient.float().square() for gradient in gradients) / len(gradients)  # no second (S, P) in memory
    return (square + FLOOR * square.mean().clamp(min=torch.finfo(torch.float32).tiny)) ** -0.25


def random_signs(count: int, seed: int) -> torch.Tensor:
    """(P,) int8 of -1 and 1, the same on every machine."""
    return torch.randint(2, (count,), generator=keyed_generator(seed, "signs"), dtype=torch.int8) * 2 - 1


def sketch(gradients: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    """Gradients (S, P) -> (S, d), whose inner products are those of the scaled gradients in expectation.

    A count sketch ("Finding frequent items in data streams", Charikar et al. 2002): weight i, with a random sign, is
    added to number i mod d.
    """
    padding = (0, -gradients.shape[1] % width)
    scaled = (torch.nn.functional.pad(gradient.float() * scale * signs, padding) for gradient in gradients)
    return torch.stack([gradient.unflatten(0, (-1, width)).sum(dim=0) for gradient in scaled])


@dataclass(frozen=True)
class StepEstimate:
    """What is known of the steps' gradients.

    Attributes:
        signal: (S, S) float64, M.
        error: (S, S), standard error of each entry of `signal`.
        noise: (S, S), N of one chunk.
    """

    signal: torch.Tensor
    error: torch.Tensor
    noise: torch.Tensor

    def snr(self) -> list[float]:
        """Signal-to-noise ratio of one chunk's gradient at each step, signed: it is negative by chance only."""
        signal, noise = self.signal.diagonal(), self.noise.diagonal()
        return (signal.sign() * (signal.abs() / noise.clamp(min=1e-30)).sqrt()).tolist()

    def shrunk(self) -> torch.Tensor:
        """(S, S): the signal, drawn towards its mean as far as its errors explain its differences.

        A mean that is not above 0 says that nothing is known; it is replaced by a small positive number.
        """
        upper = torch.triu_indices(*self.signal.shape)
        signal, variance = self.signal[upper[0], upper[1]], self.error[upper[0], upper[1]].square()
        trust = 1 / variance.clamp(min=1e-30)
        mean = float((trust * signal).sum() / trust.sum())
        if mean <= 0:
            mean = 1e-3 * float(self.noise.diagonal().mean())
        spread = max(0.0, float(((signal - mean).square() - variance).mean()))
        square = self.error.square()
        return (spread * self.signal + square * mean) / (spread + square).clamp(min=1e-30)


def estimate(sketches: torch.Tensor) -> StepEstimate:
    """From the gradients of C chunks, (C, S, d), C at least 3."""
    chunks, steps, _ = sketches.shape
    assert chunks >= 3, chunks
    flat = sketches.double().flatten(0, 1)
    products = (flat @ flat.T).unflatten(0, (chunks, steps)).unflatten(2, (chunks, steps))
    products = products.permute(1, 3, 0, 2)  # (S, S, C, C)
    own = torch.eye(chunks, dtype=torch.bool)
    across = products[:, :, ~own]  # (S, S, C * (C - 1))
    signal = across.mean(dim=-1)
    pairs = torch.full((steps, steps), float(chunks * (chunks - 1)))
    pairs.fill_diagonal_(chunks * (chunks - 1) / 2)  # (a, b) and (b, a) are one there
    error = across.std(dim=-1) / pairs.double().sqrt()
    return StepEstimate(signal, error, products[:, :, own].mean(dim=-1) - signal)


def gain(members: Sequence[int], signal: torch.Tensor, noise: torch.Tensor, chunks: float) -> float:
    """Expected gain of an update of length 1 along the gradients of the steps `members`, from `chunks` chunks.

    Args:
        signal, noise: (S, S), M and N.
    """
    inside = torch.zeros(len(signal), dtype=signal.dtype)
    inside[list(members)] = 1
    square = (inside @ signal @ inside).clamp(min=0) + inside @ noise @ inside / chunks
    return float(inside @ signal.sum(dim=1) / square.clamp(min=1e-30).sqrt())


def best_steps(
    count: int,
    signal: torch.Tensor,
    noise: torch.Tensor,
    chunks: float,
    cost: Callable[[Sequence[int]], float] = lambda members: 1.0,
) -> tuple[int, ...]:
    """The `count` steps of the largest `gain` for their `cost`, in rising order."""
    steps = range(len(signal))

    def worth(members: Sequence[int]) -> float:
        return gain(members, signal, noise, chunks) / cost(members)

    if math.comb(len(steps), count) <= MOST_SETS:
        return max(combinations(steps, count), key=worth)
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        rest = [step for step in steps if step not in chosen]
        chosen += (max(rest, key=lambda step: worth((*chosen, step))),)
    return tuple(sorted(chosen))


class StepProbe:
    """What a run has measured of its steps, and which of them it should train.

    Args:
        steps: the S steps to choose from, indices into the schedule.
        count: how many to choose.
        chunks: n, chunks of an update.
        weights: P.
        seed: of the sketches.
        cost: of a rollout that trains some of `steps`, in any unit.
    """

    def __init__(
        self,
        steps: Sequence[int],
        count: int,
        chunks: float,
        weights: int,
        seed: int,
        cost: Callable[[Sequence[int]], float],
    ):
        self.steps, self.count, self.chunks, self.cost = tuple(steps), count, chunks, cost
        self.signs = random_signs(weights, seed)
        self.scale: torch.Tensor | None = None
        self._rollouts: list[torch.Tensor] = []

    def sketch(self, gradients: torch.Tensor) -> torch.Tensor:
        """(S, P) -> (S, d) of one chunk; `scale` must be there (`metric` of the first chunk ever)."""
        assert self.scale is not None
        return sketch(gradients, self.scale.to(gradients.device), self.signs.to(gradients.device))

    def learn(self, sketches: torch.Tensor) -> tuple[tuple[int, ...], StepEstimate]:
        """Take in one rollout's chunks (C, S, d), of all ranks; the steps to train now, and what they rest on."""
        self._rollouts = [*self._rollouts, sketches.float().cpu()][-MEMORY:]
        found = estimate(torch.cat(self._rollouts))
        members = best_steps(self.count, found.shrunk(), found.noise, self.chunks, self._cost)
        return tuple(self.steps[member] for member in members), found

    def _cost(self, members: Sequence[int]) -> float:
        return self.cost([self.steps[member] for member in members])

    def state(self) -> dict[str, torch.Tensor]:
        """As safetensors take it; empty before the first rollout."""
        if self.scale is None:
            return {}
        return {"scale": self.scale.cpu(), **{f"rollout_{age}": one for age, one in enumerate(self._rollouts)}}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.scale = state.get("scale")
        self._rollouts = [state[f"rollout_{age}"] for age in range(len(state) - 1)] if state else []
