"""The run directory and what surrounds a training loop: launching, metrics, checkpoints, signals, the report.

Nothing here imports torch, except the trackers that a user asks for.
"""

from llmrl.runs.directory import Run
from llmrl.runs.launch import main

__all__ = ["Run", "main"]
