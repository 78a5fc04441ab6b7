"""What the stages of a Direct Advantage round make of one another's files; no model is asked here (Algorithm 1).

    A.1 states_of        answers with rewards        -> the states of those that are kept           states.jsonl
    A.2 tasks_from, completion_line                  -> success rates, and the completions          completions.jsonl
    A.3 critic_groups                                -> what the critic is trained and judged on    critic/
    B.1 candidates_of, action_line                   -> actions with their advantages               actions.jsonl
    B.2 actor_group                                  -> what the actor is trained on

A line is a JSON object; token ids are those that were sampled, and `answer_ids` begin after the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.data.order import epoch_order
from llmrl.data.steps import Decode, Segmenter, first_step_end, step_ends
from llmrl.errors import RefusedError
from llmrl.learner.sequences import Group, TokenSequence
from llmrl.objectives.direct_advantage import spread, step_advantages
from llmrl.rollout.collector import Task
from llmrl.rollout.protocol import row_seed
from llmrl.rollout.trajectory import Rollout, RolloutGroup
from llmrl.trainers.direct_advantage.config import DirectAdvantageConfig
from llmrl.trainers.direct_advantage.critic import state_group
from llmrl.trainers.direct_advantage.stage_files import Line, Tallies

Action = tuple[int, ...]


def is_right(rollout: Rollout, threshold: float | None) -> bool:
    """Whether its reward says so. Raises RefusedError for one that does not."""
    assert rollout.reward is not None
    if threshold is not None:
        return rollout.reward >= threshold
    if rollout.reward not in (0, 1):
        raise RefusedError(
            f"row {rollout.row}, answer {rollout.sample + 1}: the reward is {rollout.reward:g}, and success is 0 or 1. "
            "Remedy: set success_threshold to the least reward of a right answer, or use a reward of 0 and 1 alone"
        )
    return rollout.reward == 1


def balanced(right: Sequence[bool], count: int) -> list[int]:
    """Indices of `count` answers, as evenly right and wrong as there are, the first of each kind."""
    good, bad = ([i for i, is_good in enumerate(right) if is_good is kind] for kind in (True, False))
    num_good = min(len(good), max(count // 2, count - len(bad)))
    return sorted(good[:num_good] + bad[: count - num_good])


def spread_over(num_steps: int, most: int | None) -> list[int]:
    """Which of the states 0 .. num_steps - 1 of an answer are looked at: all, or `most` from the first to the last."""
    if most is None or num_steps <= most:
        return list(range(num_steps))
    return sorted({round(i * (num_steps - 1) / max(most - 1, 1)) for i in range(most)})


# -- A.1 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer of a prompt: the policy's tokens, those of the prompt before it, whether it is right."""

    ids: Action
    prompt_ids: list[int]
    right: bool


def kept_answers(group: RolloutGroup, config: DirectAdvantageConfig) -> list[Answer]:
    """The answers of a prompt that are divided into steps, equal ones once."""
    found: dict[Action, Answer] = {}
    for rollout in group.rollouts:
        if rollout.turns:
            prompt_ids = rollout.pieces[0][: rollout.turns[0].start]
            ids = tuple(rollout.sampled_ids)
            found.setdefault(ids, Answer(ids, prompt_ids, is_right(rollout, config.success_threshold)))
    answers = list(found.values())
    return [answers[i] for i in balanced([answer.right for answer in answers], config.kept_per_prompt)]


def states_of(
    groups: Sequence[RolloutGroup], config: DirectAdvantageConfig, split: Segmenter, decode: Decode
) -> tuple[list[Line], Tallies]:
    """The states of the answers that are kept, a prompt's equal states once; counts of what there was.

    Raises RefusedError where no answer has a reward, or none more than one step.
    """
    lines: list[Line] = []
    judged = [is_right(rollout, config.success_threshold) for group in groups for rollout in group.rollouts]
    if not judged:
        raise RefusedError(_nothing_judged(config))
    kept = [(group.number, number, a) for group in groups for number, a in enumerate(kept_answers(group, config))]
    seen: set[tuple[int, Action]] = set()
    whole = again = 0
    for row, number, answer in kept:
        ends = [0, *step_ends(answer.ids, split, decode)]
        whole += len(ends) == 2
        for step in spread_over(len(ends) - 1, config.max_states_per_response):
            begun = answer.ids[: ends[step]]
            if (row, begun) in seen:
                again += 1
                continue
            seen.add((row, begun))
            lines.append({
                "state": len(lines), "row": row, "answer": number, "right": answer.right, "step": step,
                "steps": len(ends) - 1, "prompt_ids": answer.prompt_ids, "answer_ids": list(begun),
                "text": decode(begun),
            })  # fmt: skip
    if kept and whole == len(kept):
        named = config.step_function or f"step_delimiter {config.step_delimiter!r}"
        row, _, longest = max(kept, key=lambda each: len(each[2].ids))
        raise RefusedError(
            f"none of {whole} answers has more than one step by {named}; the longest, of row {row}: "
            f"{decode(longest.ids)!r:.200}. Remedy: another step_delimiter, or a prompt that asks for steps"
        )
    return lines, {
        "answers": len(judged), "right": sum(judged) / max(len(judged), 1), "kept": len(kept), "of_one_step": whole,
        "states": len(lines), "states_again": again,
    }  # fmt: skip


def _nothing_judged(config: DirectAdvantageConfig) -> str:
    """Where every answer ended without a reward."""
    names = ", ".join(entry.label for entry in config.reward_keys().rewards)
    judge = f"the reward function {names}" if names else f"environment {config.environment}"
    return (
        f"no answer of the round has a reward, so that none is right or wrong: {judge} gave none a number. Remedy: one "
        "that scores every answer, 0 where it is wrong"
    )


# -- A.2 -------------------------------------------------------------------------------------------------------------


def tasks_from(
    states: Sequence[Line], rows: Mapping[int, dict[str, Any]], config: DirectAdvantageConfig, number: int
) -> list[Task]:
    """What is asked from each state in round `number`; its random numbers follow from the state's number."""
    seed = row_seed(config.seed, number, 2)
    return [
        Task(
            s["row"],
            rows[s["row"]],
            config.completions_per_state,
            row_seed(seed, s["state"], 0),
            tuple(s["answer_ids"]),
        )
        for s in states
    ]


def completion_line(state: Line, group: RolloutGroup, threshold: float | None, decode: Decode) -> Line | None:
    """What followed a state and how often it ended right; None where nothing did."""
    found = []
    for rollout in group.rollouts:
        for turn in rollout.turns:
            ids = rollout.pieces[turn.piece][turn.start + turn.given : turn.end]
            right = is_right(rollout, threshold)
            found.append({"ids": ids, "right": right, "reward": rollout.reward, "text": decode(ids)})
    if not found:
        return None
    rate = sum(bool(one["right"]) for one in found) / len(found)
    return {"state": state["state"], "row": state["row"], "rate": rate, "completions": found}


# -- A.3 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CriticGroups:
    """Groups of states with success rates, those of one answer together: to train on, and of other prompts to judge."""

    train: list[Group]
    validation: list[Group]


def critic_groups(
    states: Sequence[Line], completions: Sequence[Line], behind: int, validation: float, seed: int
) -> CriticGroups:
    """`behind`: the token at which a state's value is read. `validation`: share of the prompts that are held out, at
    least one. Raises RefusedError where only one prompt has states."""
    rows = sorted({line["row"] for line in completions})
    if not rows:
        raise RefusedError(
            f"none of the completions from {len(states)} states has a reward. Remedy: a reward function that judges "
            "them; rollouts/step_N.jsonl shows answers with their rewards"
        )
    if len(rows) < 2:
        raise RefusedError(
            f"states of {len(rows)} prompt(s): the critic is trained on some prompts and judged on others. Remedy: "
            "more prompts_per_round"
        )
    num_held = min(max(1, round(validation * len(rows))), len(rows) - 1)
    held = {rows[i] for i in epoch_order(len(rows), seed, 0)[:num_held]}
    members: dict[tuple[int, int], list[tuple[list[int], float]]] = {}
    for line in completions:
        state = states[line["state"]]
        found = members.setdefault((state["row"], state["answer"]), [])
        found.append((state["prompt_ids"] + state["answer_ids"], line["rate"]))
    parts: tuple[list[Group], list[Group]] = ([], [])
    for (row, _), found in members.items():
        parts[row in held].append(state_group([ids for ids, _ in found], behind, [rate for _, rate in found]))
    return CriticGroups(*parts)


# -- B.1 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """The first step of a completion; `ends`: it is all of it, so that `right`, the completion's outcome, is its
    value."""

    ids: Action
    ends: bool
    right: bool


def candidates_of(completions: Line, split: Segmenter, decode: Decode) -> list[Candidate]:
    """A candidate for each completion of a state."""
    found = []
    for one in completions["completions"]:
        end = first_step_end(one["ids"], split, decode)
        found.append(Candidate(tuple(one["ids"][:end]), end == len(one["ids"]), one["right"]))
    return found


def going_on(candidates: Iterable[Candidate]) -> list[Action]:
    """The different actions that do not end the answer, whose values are the critic's."""
    return list(dict.fromkeys(candidate.ids for candidate in candidates if not candidate.ends))


def action_line(
    state: Line, candidates: Sequence[Candidate], values: Mapping[Action, float], min_spread: float, decode: Decode
) -> Line:
    """The state's actions with values and advantages (Eq. 13); `kept`: they train the actor."""
    actions = [candidate.ids for candidate in candidates]
    found = [float(c.right) if c.ends else values[c.ids] for c in candidates]
    advantages = step_advantages(found, actions)
    apart = spread(advantages)
    base = sum(found) / len(found)
    return {
        **{key: state[key] for key in ("state", "row", "step", "prompt_ids", "answer_ids", "text")},
        "value": base,
        "spread": apart,
        "kept": len(advantages) > 1 and apart >= min_spread,
        "actions": [
            {
                "ids": list(ids),
                "text": decode(ids),
                "count": actions.count(ids),
                "ends": all(c.ends for c in candidates if c.ids == ids),
                "value": base + advantage,
                "advantage": advantage,
            }
            for ids, advantage in advantages.items()
        ],
    }


# -- B.2 -------------------------------------------------------------------------------------------------------------


def actor_group(line: Line) -> Group:
    """All actions of a state: rows (state, action), scored on the action, with advantage and, where the line has them,
    the reference's log-probabilities."""
    begun = [*line["prompt_ids"], *line["answer_ids"]]
    return tuple(
        TokenSequence(
            np.asarray([*begun, *action["ids"]], np.int64),
            np.arange(len(begun) + len(action["ids"])) >= len(begun),
            reference_logprobs=(
                np.asarray(action["reference_logprobs"], np.float32) if "reference_logprobs" in action else None
            ),
            values={"advantage": action["advantage"]},
        )
        for action in line["actions"]
    )
