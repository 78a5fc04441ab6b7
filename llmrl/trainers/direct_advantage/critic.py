"""The critic of Direct Advantage: a copy of the actor with a value head, trained apart on success rates (Algorithm 1,
A.3), kept in a folder, and loaded from there when candidate steps are valued.

Invariant: the critic has an accelerator, an optimizer and weights of its own, and is gone before the actor is updated
again; what values the steps is always what the folder holds, so that a resumed run has the same values.
"""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from llmrl.config import ModelKeys
from llmrl.data.order import epoch_order
from llmrl.errors import RefusedError
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_model
from llmrl.learner.sequences import Group, TokenSequence
from llmrl.learner.sharding import build_accelerator
from llmrl.learner.value_head import load_value_head, save_value_head
from llmrl.objectives.direct_advantage import SuccessRateCritic
from llmrl.runs import ranks

Say = Callable[[str], None]
Tell = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class CriticTraining:
    """How the critic is trained: rates are AdamW's, `states_per_step` states make an optimizer step."""

    epochs: int = 1
    states_per_step: int = 512
    learning_rate: float = 5e-6
    value_learning_rate: float | None = None
    seed: int = 0


def refuse_split() -> None:
    """A critic is a second model; raises RefusedError where the first one cannot be copied."""
    if ranks.zero_stage() == 3:
        raise RefusedError(
            "direct_advantage copies the actor for its critic, and under ZeRO-3 no process has the whole of it: launch "
            "with ZeRO-2 or DDP (launch/accelerate/zero2.yaml, ddp8.yaml), and use_peft: true where memory is short"
        )


def critic_of(actor: Learner, training: CriticTraining, num_steps: int) -> Learner:
    """The actor's weights as they are now, with a value head, in a learner of its own."""
    options = dataclasses.replace(
        actor.options,
        learning_rate=training.learning_rate,
        value_learning_rate=training.value_learning_rate,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs={},
        warmup_steps=0,
        total_steps=num_steps,
        reference="none",
        value_head=True,
        value_gradient=True,
    )
    refuse_split()
    return Learner(deepcopy(actor.causal_lm), options, build_accelerator(actor.accelerator.mixed_precision), _silent)


def save(critic: Learner, folder: Path) -> None:
    """The model as transformers or PEFT saves it, and its value head beside it, into an existing folder; on all
    ranks."""
    critic.export(folder)
    save_value_head(critic, folder)


def load(folder: Path, keys: ModelKeys, actor: Learner) -> Learner:
    """What `save` wrote, ready to value states. Raises RefusedError where the folder holds no critic."""
    model = load_model(str(folder), keys.model_copy(update={"use_peft": False}), actor.causal_lm.dtype, _silent)
    model.requires_grad_(True)  # an adapter was merged into what it had frozen, and a learner wants something to train
    options = dataclasses.replace(actor.options, reference="none", value_head=True, gradient_checkpointing=False)
    critic = Learner(model, options, build_accelerator(actor.accelerator.mixed_precision), _silent)
    load_value_head(critic, folder)
    return critic


def give_memory_back() -> None:
    """What a critic held that nobody holds any more, the GPU's memory, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def state_group(states: Sequence[Sequence[int]], behind: int, rates: Sequence[float] | None = None) -> Group:
    """States that begin alike, as token ids, each with the token `behind` after it, at which the value is read."""
    return tuple(
        TokenSequence(
            np.asarray([*ids, behind], np.int64),
            np.arange(len(ids) + 1) == len(ids),
            token_values={} if rates is None else {"success_rate": np.asarray([rates[i]], np.float32)},
        )
        for i, ids in enumerate(states)
    )


def batches(groups: Sequence[Group], training: CriticTraining) -> list[list[Group]]:
    """The optimizer steps: every epoch all groups once in an order of its own, about `states_per_step` states a
    step."""
    found: list[list[Group]] = []
    for epoch in range(training.epochs):
        batch: list[Group] = []
        for index in epoch_order(len(groups), training.seed, epoch):
            batch.append(groups[index])
            if sum(map(len, batch)) >= training.states_per_step:
                found.append(batch)
                batch = []
        found += [batch] if batch else []
    return found


def fit(
    actor: Learner,
    groups: Sequence[Group],
    training: CriticTraining,
    after_step: Callable[[int, int, dict[str, float]], None],
) -> Learner:
    """Train a critic on `groups` of states with rates; `after_step` hears (steps done, of how many, metrics) and may
    raise."""
    steps = batches(groups, training)
    critic, objective = critic_of(actor, training, len(steps)), SuccessRateCritic().objective()
    for done, batch in enumerate(steps, 1):
        after_step(done, len(steps), critic.update(batch, objective))
    return critic


def success(critic: Learner, groups: Sequence[Group], progress: Tell) -> list[list[float]]:
    """V of each state of each group: the probability that the reference, going on from it, ends right."""
    return [
        [float(1 / (1 + np.exp(-np.float64(scores.values[0])))) for scores in group if scores.values is not None]
        for group in critic.scores(list(groups), progress=progress)
    ]


def _silent(text: str) -> None:
    """What the actor has said is true of its copy."""
