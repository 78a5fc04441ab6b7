"""What an online method asks of its policy, and how that is judged: rows, environment, chat template, rewards."""

import asyncio
import copy
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llmrl import envs, models
from llmrl.data.prompts import PromptData, prompts_made, prompts_of_dataset
from llmrl.data.tokenization import check_vocabulary
from llmrl.envs import returned
from llmrl.envs.tool_calls import parse_tool_calls
from llmrl.errors import RefusedError
from llmrl.learner.loading import load_config, load_tokenizer, max_positions
from llmrl.rewards.scoring import Scorer, Scores
from llmrl.rewards.shaping import soft_overlong
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.episode import Limits
from llmrl.rollout.rendering import REASONING, Renderer
from llmrl.rollout.threads import Maker, OverdueError, call
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn
from llmrl.trainers.online.config import SamplingConfig

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import TrainerState

TRIED_ROWS = 16
"""Rows with which an environment that is not known is begun before anything else, to see whether it begins."""
TRIED_ANSWER = "The answer is 1."
RESERVED = ("prompts", "completions", "completion_ids", "log_extra", "log_metric", "trainer_state")
"""Names of reward functions' own arguments: columns called so do not reach them."""


class OnlineTask:
    """What is asked and how it is judged; everything that can be wrong with it is refused here.

    `overlong_buffer`: the share of a turn's limit in which length is punished beside the reward (0: none).
    """

    def __init__(
        self,
        config: SamplingConfig,
        say: Callable[[str], None],
        dataset: "Dataset | DatasetDict | None" = None,
        overlong_buffer: float = 0.0,
    ) -> None:
        self.config, self.overlong_buffer = config, overlong_buffer
        self.trainer_state: Callable[[], TrainerState] | None = None  # what reward functions get, once training begins
        path = models.resolve(config.model_name_or_path)
        self.tokenizer = load_tokenizer(path)
        check_vocabulary(self.tokenizer, load_config(path))
        self.max_length = _longest(config, max_positions(path))
        self.kind = envs.load(config.environment, config.environment_options)
        if self.kind.multi_turn and config.rollout.max_turns == 1:
            raise RefusedError(
                f"an episode of environment {config.environment} may take several turns, and rollout.max_turns 1 would "
                "cut it off after the first: set it to as many as there may be"
            )
        self.renderer = Renderer(
            self.tokenizer,
            template_kwargs=config.chat_template_kwargs,
            parse=parse_tool_calls,
            parse_without_tools=False,
            history=config.history,
            stop_tokens=config.stop_tokens,
        )
        for text, others in self.renderer.beside_stop_tokens().items():
            few = ", ".join(map(repr, sorted(others, key=len)[:5]))
            say(f"stop_tokens: {text!r} stops where it is a token of its own, not within {len(others)} others ({few})")
        self.data = self._data(say, dataset)
        judged_by = config.reward_keys()
        self.scorer = Scorer(judged_by, say) if judged_by.rewards else None
        if self.scorer is not None:
            self.scorer.check(self.data.columns, config.dataset_name or f"rows of {config.environment}")

    def _data(self, say: Callable[[str], None], dataset: "Dataset | DatasetDict | None") -> PromptData:
        config = self.config
        if config.dataset_name is None and dataset is None:
            if self.kind.rows is None:
                raise RefusedError(
                    f"environment {config.environment} makes no rows of its own: name the prompts with dataset_name"
                )
            train = self.kind.rows("train", config.environment_rows, config.seed)
            heldout = self.kind.rows("test", config.eval_rows, config.seed) if config.eval_rows else []
            for row in (*train[:TRIED_ROWS], *heldout[:TRIED_ROWS]):
                self.prompt_length(row)
            return prompts_made(train, heldout, say)
        room = None if self.max_length is None else self.max_length - config.max_completion_length
        # Other environments than this one may be slow to begin; a prompt of theirs that is too long ends its rollout.
        tried = None if config.environment == "question_answer" else TRIED_ROWS
        return prompts_of_dataset(config, self.prompt_length, room, say, dataset, tried)

    def prompt_length(self, row: dict[str, Any]) -> int:
        """Tokens of the row's first prompt, as the environment puts it. Raises RefusedError."""
        return len(self._begun(row).prompt_ids)

    def _begun(self, row: dict[str, Any]) -> Dialogue:
        """The row's dialogue before the policy speaks. Raises RefusedError where the environment does not begin."""
        seconds = self.config.rollout.environment_seconds
        method = "__init__"

        async def opening() -> Any:
            nonlocal method
            environment = await Maker(self.kind.make, seconds).make(row, 0)
            method = "init"
            try:
                return await call(environment.init, timeout=seconds)
            finally:
                with suppress(Exception):  # what cannot be closed is counted when there are rollouts
                    await call(environment.close, timeout=seconds)

        try:
            messages, tools = returned.opening(asyncio.run(opening()))
        except RefusedError:
            raise
        except Exception as error:
            what = f"{method}() {error}" if isinstance(error, OverdueError) else _said(error)
            has_own = self.kind.rows is not None and self.config.dataset_name is not None
            own = "; it has rows of its own, which --dataset_name null uses" if has_own else ""
            raise RefusedError(f"the environment {self.config.environment} does not begin: {what}{own}") from error
        return Dialogue(self.renderer, messages, tools)

    def limits(self) -> Limits:
        keys = self.config.rollout
        return Limits(
            max_turns=keys.max_turns,
            max_completion_length=self.config.max_completion_length,
            max_length=self.max_length,
            environment_seconds=keys.environment_seconds,
            rollout_seconds=keys.rollout_seconds,
            concurrent_rollouts=keys.concurrent,
            cut_turns=keys.cut_turns,
            stop_token_ids=self.renderer.stop_token_ids,
        )

    async def score(self, group: RolloutGroup, steps_done: int | None = None) -> None:
        """Scores of the environment and of the reward functions, their weighted sum, and the algorithm's penalty.

        `steps_done`: of the training that the rollouts are for, which may lie ahead of the step that is now trained.
        """
        rollouts, weight = group.rollouts, self.config.environment_weight
        found = None if self.scorer is None else await self._judged(self.scorer, group, steps_done)
        for i, rollout in enumerate(rollouts):
            own = rollout.environment_rewards
            # An episode that came to its end without any reward was not judged, which is not the same as 0.
            judged = bool(own) or (found is None and rollout.end_state != "completed")
            total = weight * sum(own.values()) if judged else None
            rollout.scores = dict(own)
            if found is not None:
                rollout.scores |= {name: scores[i] for name, scores in found.by_function.items()}
                rollout.extra = {name: values[i] for name, values in found.extra.items()}
                part = found.totals_S[i]
                silent = part is None and self.config.reward_missing == "no_score"
                total = None if silent else part if total is None else total + (part or 0.0)
            rollout.reward, rollout.penalty = total, self._overlong(rollout)

    def try_rewards(self) -> None:
        """Have the user's own reward functions judge a short answer to the first row, before anything is trained.

        Raises RefusedError for one that cannot.
        """
        if self.scorer is None or not self.data.train:
            return
        from transformers import TrainerState

        prompt = self.data.train[0]
        dialogue = self._begun(prompt.row)
        before, ids = list(dialogue.prompt_ids), self.tokenizer.encode(TRIED_ANSWER, add_special_tokens=False)
        turn = Turn(0, len(before), len(before) + len(ids), [0.0] * len(ids), "stop", 0)
        said = [*dialogue.messages, {"role": "assistant", "content": TRIED_ANSWER}]
        answered = Rollout(
            row=prompt.number,
            sample=0,
            seed=0,
            pieces=[before + ids],
            turns=[turn],
            messages=said,
            opening=len(said) - 1,
            end_state="completed",
        )
        call = self._call(RolloutGroup(prompt.number, prompt.row, [answered]))
        asyncio.run(self.scorer.try_out(**call, trainer_state=TrainerState()))

    async def _judged(self, scorer: Scorer, group: RolloutGroup, steps_done: int | None) -> Scores:
        return await scorer.score(**self._call(group), trainer_state=self._state(steps_done))

    def _call(self, group: RolloutGroup) -> dict[str, Any]:
        """What the scorer is asked. Prompts and completions are text where the row's prompt is, else messages: as
        reward functions for TRL expect them. A reward model reads the dialogue that the policy saw."""
        rollouts = group.rollouts
        dialogues = [(rollout.messages[: rollout.opening], self._as_sampled(rollout)) for rollout in rollouts]
        ids, text = [rollout.sampled_ids for rollout in rollouts], self.kind.text_prompt(group.row)
        texts = None if text is None else [(text, self.tokenizer.decode(one, skip_special_tokens=True)) for one in ids]
        prompts, completions = zip(*(texts or dialogues), strict=True)
        return {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": ids,
            "columns": {name: [value] * len(rollouts) for name, value in group.row.items() if name not in RESERVED},
            "dialogues": dialogues if self.renderer.has_template else texts,
        }

    def _state(self, steps_done: int | None) -> "TrainerState | None":
        """A copy, so that it stands still while a reward function reads it."""
        if self.trainer_state is None:
            return None
        state = copy.copy(self.trainer_state())
        state.global_step = state.global_step if steps_done is None else steps_done
        return state

    def _as_sampled(self, rollout: Rollout) -> list[dict[str, Any]]:
        """What was said since the opening, the policy's turns with their thoughts, as reward functions expect them."""
        turns = iter(rollout.turns)
        messages = []
        for message in rollout.messages[rollout.opening :]:
            turn = next(turns, None) if message["role"] == "assistant" else None
            if turn is not None and message.get(REASONING):
                ids = rollout.pieces[turn.piece][turn.start : turn.end]
                message = {**message, "content": self.tokenizer.decode(ids, skip_special_tokens=True)}
            messages.append(message)
        return messages

    def _overlong(self, rollout: Rollout) -> float:
        """The soft punishment of a turn near its limit (DAPO, arXiv 2503.14476, Eq. 13); 0 without a buffer."""
        if not self.overlong_buffer or not rollout.turns:
            return 0.0
        longest = self.config.max_completion_length
        buffer = max(int(self.overlong_buffer * longest), 1)
        return soft_overlong(max(turn.end - turn.start for turn in rollout.turns), longest, buffer)

    def of_judging(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        """What reward functions logged since this was last asked, and tallies of their calls (`Collected`)."""
        return ({}, {}) if self.scorer is None else self.scorer.noted()

    def close(self) -> None:
        """End the reward functions' processes."""
        if self.scorer is not None:
            self.scorer.close()


def _said(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _longest(config: SamplingConfig, positions: int | None) -> int | None:
    """Tokens of a rollout: what was asked for, if the model can take it."""
    if positions is not None and config.max_length is not None and config.max_length > positions:
        raise RefusedError(f"max_length {config.max_length} exceeds the model's {positions} positions; lower it")
    longest = config.max_length or positions
    if longest is not None and config.max_completion_length >= longest:
        raise RefusedError(
            f"max_completion_length {config.max_completion_length} leaves no room for a prompt within {longest} "
            "tokens; lower it"
        )
    return longest
