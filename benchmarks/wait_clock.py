"""What a rollout costs by phase, where ranks wait for each other."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from rl.timing import PhaseClock


class WaitClock(PhaseClock):
    """What is waited in the midst of a phase is not counted to it."""

    phase: str | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = phase
        try:
            with super().__call__(phase):
                yield
        finally:
            self.phase = None

    def waiting(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.perf_counter() - began
            self.seconds["wait"] += spent
            if self.phase is not None:
                self.seconds[self.phase] -= spent
            return result

        return call


class RolloutCosts(TrainerCallback):
    """Notes what each rollout took."""

    def __init__(self, clock: WaitClock):
        self.clock, self.costs = clock, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.clock.seconds.clear()
        self.began = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.costs.append(self.clock.summary(time.perf_counter() - self.began))
