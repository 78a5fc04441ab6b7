"""The keys that say how an answer is divided into steps: the same wherever steps are trained or looked at."""

from typing import Self

from pydantic import model_validator

from llmrl.config.keys import Keys, Text

NEWLINE = "\n"


class AnswerStepKeys(Keys):
    """Steps of an answer: where one ends (llmrl/data/steps.py)."""

    step_delimiter: Text = NEWLINE
    """Regular expression that ends a step, to which it belongs."""
    step_function: Text | None = None
    """Your own instead: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, from an answer's text to the list of its steps."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.step_function is not None and self.step_delimiter != NEWLINE:
            raise ValueError("step_function divides answers by itself: leave step_delimiter out")
        return self
