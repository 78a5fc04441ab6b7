"""One question, one answer, judged by reward functions."""

from typing import Any

from llmrl.envs.options import Options, checked, column
from llmrl.envs.protocol import EnvironmentKind, Message, Row, StepResult
from llmrl.envs.single_use import SingleUse
from llmrl.errors import RefusedError

NAME = "question_answer"


class QuestionAnswerOptions(Options):
    prompt_column: str = "prompt"
    """The column that holds the prompt: text, or a list of messages."""
    system_prompt: str | None = None
    """Put before the prompt as a system message."""


class QuestionAnswer:
    """A single turn over any row that has a prompt. It gives no rewards of its own."""

    def __init__(self, row: Row, seed: int, options: QuestionAnswerOptions) -> None:
        prompt = column(row, options.prompt_column, object, NAME)
        opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _is_dialogue(opening):
            raise RefusedError(
                f"{NAME}: column `{options.prompt_column}` holds {prompt!r:.80}, where text or a list of messages with "
                "`role` and `content` is expected"
            )
        system = [] if options.system_prompt is None else [{"role": "system", "content": options.system_prompt}]
        self._opening: list[Message] = [*system, *(dict(message) for message in opening)]
        self._use = SingleUse(NAME)

    async def init(self) -> list[Message]:
        self._use.begin()
        return self._opening

    async def step(self, message: Message) -> StepResult:
        self._use.turn()
        self._use.end()
        return StepResult([], done=True)

    async def close(self) -> None:
        self._use.end()


def load(options: dict[str, Any]) -> EnvironmentKind:
    """Rows come from a data set."""
    own = checked(QuestionAnswerOptions, options, NAME)

    def text_prompt(row: Row) -> str | None:
        prompt = row[own.prompt_column]
        return prompt if isinstance(prompt, str) else None

    return EnvironmentKind(lambda row, seed: QuestionAnswer(row, seed, own), text_prompt=text_prompt)


def _is_dialogue(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in value)
    )
