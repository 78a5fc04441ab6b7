"""An episode is opened once, played until it is over, and never used again."""

from typing import Literal


class SingleUse:
    """Raises RuntimeError, naming the environment, where its methods are called out of order: a mistake of the caller,
    never of the model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._state: Literal["new", "playing", "over"] = "new"

    def begin(self) -> None:
        """To be called by `init`."""
        if self._state != "new":
            raise RuntimeError(f"{self._name}: init() is called once, on a new environment")
        self._state = "playing"

    def turn(self) -> None:
        """To be called by `step`."""
        if self._state != "playing":
            raise RuntimeError(f"{self._name}: step() comes after init() and not after the end of the episode")

    def end(self) -> None:
        """To be called when the episode is done, and by `close`."""
        self._state = "over"
