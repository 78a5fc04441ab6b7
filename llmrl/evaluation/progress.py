"""How far something long is, for whoever waits: a line now and then where no progress bar can stand."""

import time
from collections.abc import Callable

SAID_EVERY_SECONDS = 10.0


class Ticker:
    """Called with what is done and the total; says so every ten seconds, and nothing of what is over sooner."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self.say, self.what, self._said_at = say, what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() - self._said_at > SAID_EVERY_SECONDS:
            self._said_at = time.monotonic()
            self.say(f"{self.what}: {done} of {total}")
