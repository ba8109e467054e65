"""SIGTERM and Ctrl-C: asked once, a run ends at the next step with a checkpoint."""

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved what it has.

    Args:
        signum: by which signal.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class StopRequest:
    """Within it the two signals only leave a note; a second Ctrl-C interrupts at once.

    Signals reach the main thread only, so elsewhere nothing changes.
    """

    def __init__(self):
        self.signum, self._when = 0, 0.0
        self._before = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # torchrun passes on the Ctrl-C that the terminal has sent to every process already.
        if self.signum and signum == signal.SIGINT and now - self._when > 1:
            raise KeyboardInterrupt
        self.signum, self._when = signum, now
