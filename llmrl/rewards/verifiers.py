"""Child processes that compare answers and match patterns: what may hang on what a model wrote."""

from llmrl.children.pool import ChildPool


class Verifiers(ChildPool):
    """`ask("equal", gold=, answer=)` and `ask("match", pattern=, text=)`: values 1.0 and 0.0, None where there is none
    (`verifying.py`)."""

    def __init__(self, processes: int = 2, seconds: float = 5.0, memory_mb: int = 1024) -> None:
        super().__init__("llmrl.rewards.verifying", processes, seconds, memory_mb)
