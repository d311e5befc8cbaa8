"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def now(device: torch.device) -> float:
    """Seconds, once `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PhaseClock:
    """Sums the wall-clock seconds of named phases: `with clock("decode"): ...`. Phases must not nest.

    On an accelerator each phase waits for its own kernels, so that they are not counted to the next one.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start

    def summary(self, total: float) -> dict[str, float]:
        """Seconds of each phase, `rest` (what no phase counted) and `total`."""
        return {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}
