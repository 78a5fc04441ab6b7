"""Speaking to a person, and never failing because nobody listens.

Invariants: a closed pipe, a vanished terminal or one that cannot show a character stops nothing; only rank 0 speaks.
"""

import os
import sys
from typing import Any, TextIO


class SafeStream:
    """A text stream whose failures are swallowed: after the first one it stays silent."""

    def __init__(self, stream: TextIO | None) -> None:
        # Python has none where the process was started with the stream closed.
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115
        self._dead = False

    def write(self, text: str) -> int:
        """Writes the text, characters that the stream cannot hold as escapes."""
        if not self._dead:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._attempt(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError):
                self._give_up()
            except RuntimeError:  # a signal handler speaks while the same stream is being written: its words are lost
                pass
        return len(text)

    def flush(self) -> None:
        """Flushes, or notes that nobody is there."""
        if not self._dead:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        """Whether a person may be looking at a terminal."""
        try:
            return not self._dead and self._stream.isatty()
        except ValueError:
            return False

    def _attempt(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        self._dead = True
        # Python flushes the streams once more at its end and would then change the exit code to 120.
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Console:
    """Lines for a person on standard output; silent where `quiet`."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = SafeStream(stream or sys.stdout)
        self._live: Any = None

    @property
    def is_terminal(self) -> bool:
        """Whether a moving progress bar can be shown."""
        return not self.quiet and self.stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def attach(self, live: Any) -> None:
        """Has lines go through rich's console while its bar is on the screen; None ends that."""
        self._live = live


def complain(text: str) -> None:
    """A line on standard error, whatever state it is in."""
    stream = SafeStream(sys.stderr)
    stream.write(text + "\n")
    stream.flush()
