"""What an environment is: messages in, messages and named rewards out.

Invariants: an environment is used once (there is no reset, so nothing leaks from one episode into the next); its data
row and a seed go into its constructor; it sees well-formed assistant messages only. How an episode ended for other
reasons (cut, out of time, unparsable) is the business of whoever owns the tokens, never the environment's.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`, possibly with `tool_calls`, `tool_call_id`, `name`."""
Opening = list[Message] | tuple[list[Message], list[dict[str, Any]]]
Split = Literal["train", "test"]
Row = dict[str, Any]


class StepResult(NamedTuple):
    """The answer to one assistant message.

    `messages` is empty when `done`. `rewards` are this turn's, finite, by name; they are summed over turns by name.
    A name that never comes is no score, which is not the same as 0.
    """

    messages: list[Message]
    done: bool = False
    rewards: dict[str, float] = {}  # noqa: RUF012 - nobody changes what a step returned


class Environment(Protocol):
    """One episode. Methods are plain or `async`; plain ones may block (they run in a thread), `async` ones may not."""

    def init(self) -> Opening | Awaitable[Opening]:
        """The opening messages, or these and the tools as JSON schemas."""
        ...

    def step(self, message: Message) -> StepResult | tuple[Any, ...] | Awaitable[StepResult | tuple[Any, ...]]:
        """What follows the assistant's `message`; a shorter tuple takes `StepResult`'s defaults."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Release what the episode holds; called once, however it ended."""
        ...


EnvironmentFactory = Callable[[Row, int], Environment]
"""(row, seed) -> environment. Plain code that may block: it runs in a thread."""
RowMaker = Callable[[Split, int, int], list[Row]]
"""(split, count, seed) -> at most `count` different rows, fewer where the world has no more. Whatever the seed, no row
of `train` is one of `test`."""


@dataclass(frozen=True)
class EnvironmentKind:
    """What a name and its options stand for: `make(row, seed)`, and `rows(split, count, seed)` where it brings its own.

    `rows` is None where the rows come from a data set. `text_prompt`: the row's prompt where it is text rather than
    messages; then reward functions get prompt and completion as text, as from TRL. `multi_turn`: an episode may take
    more than one message, so that a limit of one turn would cut it off; False where nobody said so.
    """

    make: EnvironmentFactory
    rows: RowMaker | None = None
    text_prompt: Callable[[Row], str | None] = lambda row: None
    multi_turn: bool = False
