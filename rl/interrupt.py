"""Ctrl-C as a request that is granted where the state of a run is whole."""

import signal
import threading


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped on request after writing a checkpoint, if there was an update; the message says how to go on.

    In processes that torchrun or `accelerate launch` started there must be time for it: their agent passes the signal
    on, and kills them after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds, 30 unless it is told otherwise.
    """


class StopSignal:
    """Within `with StopSignal() as stop:`, SIGINT and SIGTERM set `stop.requested`; a second one interrupts at once."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping: a checkpoint is written first; once more to stop at once", flush=True)
