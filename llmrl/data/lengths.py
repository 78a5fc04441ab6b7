"""What happens to a row that is longer than max_length.

| truncation_mode | a prompt with completions that do not fit |
|---|---|
| keep_start | each completion loses its end |
| keep_end | the prompt loses its start, the same for all its completions |
| drop | the row is dropped |
| error | the row is refused |

A prompt that leaves no room for one token of a completion (with keep_end: completions that leave none for one token of
the prompt) is for `overlong_prompts` to decide in every mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llmrl.errors import RefusedError

TruncationMode = Literal["keep_start", "keep_end", "drop", "error"]


class LengthKeys(Protocol):
    """The keys read here; `llmrl.config`'s DataKeys has them."""

    @property
    def max_length(self) -> int: ...
    @property
    def truncation_mode(self) -> TruncationMode: ...
    @property
    def overlong_prompts(self) -> Literal["error", "drop"]: ...


class OverlongError(Exception):
    """A row that cannot be cut to fit. `no_room`: `overlong_prompts` decides on it, else `truncation_mode`. `column`:
    where what is too long stands; None: the prompt."""

    def __init__(self, reason: str, no_room: bool, column: str | None = None) -> None:
        super().__init__(reason)
        self.no_room, self.column = no_room, column

    def dropped(self, keys: LengthKeys, place: str, column: str = "prompt") -> str:
        """What a row that is dropped for it is counted as; raises RefusedError (`place`: its file and number, `column`:
        the prompt's) where the keys do not have it dropped."""
        key = "overlong_prompts" if self.no_room else "truncation_mode"
        if (keys.overlong_prompts if self.no_room else keys.truncation_mode) != "drop":
            raise RefusedError(
                f"{place}, column `{self.column or column}`: {self}; raise max_length, set {key}: drop (dropped rows "
                "are counted), or shorten the row"
            )
        return "dropped_overlong_prompts" if self.no_room else "dropped_overlong_completions"


@dataclass(frozen=True)
class Fitting:
    """Ids that fit: prompt + each completion has at most max_length tokens."""

    prompt_ids: list[int]
    completions: list[list[int]]
    cut_prompts: int
    cut_completions: int


def fit(
    prompt_ids: list[int], completions: Sequence[list[int]], max_length: int, truncation_mode: TruncationMode
) -> Fitting:
    """Cut a prompt and its completions to max_length; raises OverlongError."""
    longest = max(map(len, completions))
    if len(prompt_ids) + longest <= max_length:
        return Fitting(prompt_ids, list(completions), 0, 0)
    if truncation_mode == "keep_end":
        room = max_length - longest
        if room < 1:
            raise OverlongError(
                f"a completion of {longest} tokens leaves no room for the prompt within max_length {max_length}", True
            )
        return Fitting(prompt_ids[-room:], list(completions), 1, 0)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise OverlongError(
            f"the prompt's {len(prompt_ids)} tokens leave no room for a completion within max_length {max_length}",
            True,
        )
    if truncation_mode == "keep_start":
        return Fitting(prompt_ids, [ids[:room] for ids in completions], 0, sum(len(ids) > room for ids in completions))
    raise OverlongError(
        f"prompt and completion have {len(prompt_ids)} + {longest} tokens, more than max_length {max_length}", False
    )
