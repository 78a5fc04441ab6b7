"""From the text in `rewards` to the function: a built-in's name, a function of the user's, a reward model.

Invariant: whatever is wrong with a function that can be seen without calling it is refused here.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl.config.functions import FUNCTION, function_named
from llmrl.config.nearest import nearest
from llmrl.errors import RefusedError
from llmrl.rewards.functions import ARGUMENTS, FUNCTIONS, RewardFunction, build
from llmrl.rewards.keys import RewardFunctionKeys
from llmrl.rewards.verifiers import Verifiers

SUPPLIED = (*ARGUMENTS, "log_extra", "log_metric", "trainer_state")


def load(entry: RewardFunctionKeys, pool: Verifiers, say: Callable[[str], None]) -> RewardFunction:
    """The function of one entry. Raises RefusedError for what is not there, cannot be loaded, or does not take its
    options."""
    name = entry.function
    if name in FUNCTIONS:
        return build(name, entry.options, pool)
    if FUNCTION.fullmatch(name):
        return own(name, function_named(name, "rewards"), entry.options)
    if "/" in name or Path(name).is_dir():
        from llmrl.rewards.classifier import reward_model

        return reward_model(name, entry.options, say)
    raise RefusedError(
        f"rewards: there is no reward function `{name}`; did you mean `{nearest(name, FUNCTIONS)}`? Built in are "
        f"{', '.join(FUNCTIONS)}; your own is FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION; a reward model is a folder "
        "or a hub id"
    )


def own(name: str, call: Callable[..., Any], options: dict[str, Any]) -> RewardFunction:
    """A function of the user's: it gets its options and what of the rest its signature takes."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return RewardFunction(lambda **arguments: call(**arguments, **options))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option in SUPPLIED or not (takes_all or option in named):
            raise RefusedError(f"rewards: {name} takes no option `{option}`; it takes {', '.join(named) or 'nothing'}")

    def chosen(arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in arguments.items() if takes_all or key in named} | options

    needs = tuple(
        (key,)
        for key, p in parameters.items()
        if key in named and p.default is p.empty and key not in SUPPLIED and key not in options
    )
    if is_async(call):

        async def asynchronous(**arguments: Any) -> Any:
            return await call(**chosen(arguments))

        return RewardFunction(asynchronous, needs, own=True)
    return RewardFunction(lambda **arguments: call(**chosen(arguments)), needs, own=True)


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it gives something to be awaited; an object counts by its `__call__`."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
