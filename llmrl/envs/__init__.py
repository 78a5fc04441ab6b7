"""Environments that a model acts in, turn by turn: what they are, those built in, and how a name becomes one."""

from llmrl.envs.loading import BUILT_IN, load
from llmrl.envs.protocol import Environment, EnvironmentFactory, EnvironmentKind, Message, StepResult

__all__ = ["BUILT_IN", "Environment", "EnvironmentFactory", "EnvironmentKind", "Message", "StepResult", "load"]
