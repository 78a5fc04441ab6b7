"""The ways in which a command can end badly, one type each, so that exit codes never depend on a message's wording.

Exit codes are part of the contract with the user: 2 refused before anything began, 75 interrupted after a whole
checkpoint, 1 failed on the way.
"""


class LlmrlError(Exception):
    """Base of everything that llmrl raises on purpose; `exit_code` is what the command ends with."""

    exit_code = 1


class RefusedError(LlmrlError):
    """Refused before anything expensive began: configuration, data or environment.

    The message is one text for a person: what is wrong (file, row, column or key; rows and lines count from 1), why,
    and the remedy.
    """

    exit_code = 2


class RunFailedError(LlmrlError):
    """The run failed on the way; the newest whole checkpoint is intact and the message says what to do."""


class RunInterruptedError(LlmrlError):
    """A signal asked the run to stop; a whole checkpoint was written and the run can go on from it."""

    exit_code = 75
