"""What an online method asks of its policy, and how that is judged: rows, environment, chat template, rewards."""

import asyncio
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
from llmrl.objectives.presets import Preset
from llmrl.rewards.scoring import Scorer
from llmrl.rewards.shaping import soft_overlong
from llmrl.rollout.collector import Limits
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.rendering import Renderer
from llmrl.rollout.threads import call
from llmrl.rollout.trajectory import Rollout, RolloutGroup
from llmrl.trainers.online_config import OnlineConfig

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

RESERVED = ("prompts", "completions", "completion_ids", "log_extra", "log_metric", "trainer_state")
"""Names of reward functions' own arguments: columns called so do not reach them."""


class OnlineTask:
    """What is asked and how it is judged; everything that can be wrong with it is refused here."""

    def __init__(
        self,
        config: OnlineConfig,
        algorithm: Preset,
        say: Callable[[str], None],
        dataset: "Dataset | DatasetDict | None" = None,
    ) -> None:
        self.config, self.algorithm = config, algorithm
        self.trainer_state: Any = None  # what reward functions get under this name; there is one once training begins
        path = models.resolve(config.model_name_or_path)
        self.tokenizer = load_tokenizer(path)
        check_vocabulary(self.tokenizer, load_config(path))
        self.max_length = _longest(config, max_positions(path))
        self.kind = envs.load(config.environment, config.environment_options)
        self.renderer = Renderer(
            self.tokenizer,
            template_kwargs=config.chat_template_kwargs,
            parse=parse_tool_calls,
            history=config.history,
        )
        self.data = self._data(say, dataset)
        self.scorer = Scorer(config, say) if config.rewards else None
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
            for row in (*train[:16], *heldout[:16]):
                self.prompt_length(row)
            return prompts_made(train, heldout, say)
        room = None if self.max_length is None else self.max_length - config.max_completion_length
        return prompts_of_dataset(config, self.prompt_length, room, say, dataset)

    def prompt_length(self, row: dict[str, Any]) -> int:
        """Tokens of the row's first prompt, as the environment puts it. Raises RefusedError."""
        seconds = self.config.rollout.environment_seconds

        async def opening() -> Any:
            environment = self.kind.make(row, 0)
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
            what = f"init() took longer than {seconds:g} s" if isinstance(error, TimeoutError) else _said(error)
            raise RefusedError(f"the environment {self.config.environment} does not begin: {what}") from error
        return len(Dialogue(self.renderer, messages, tools).prompt_ids)

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
        )

    async def score(self, group: RolloutGroup) -> None:
        """Scores of the reward functions and of the environment, and their weighted sum."""
        scorer, rollouts = self.scorer, group.rollouts
        assert scorer is not None
        found = await scorer.score(
            prompts=[rollout.messages[: rollout.opening] for rollout in rollouts],
            completions=[rollout.messages[rollout.opening :] for rollout in rollouts],
            completion_ids=[rollout.sampled_ids for rollout in rollouts],
            trainer_state=self.trainer_state,
            columns={name: [value] * len(rollouts) for name, value in group.row.items() if name not in RESERVED},
        )
        for i, (rollout, total) in enumerate(zip(rollouts, found.totals_S, strict=True)):
            own = rollout.environment_rewards
            rollout.extra = {name: values[i] for name, values in found.extra.items()}
            rollout.scores = {**own, **{name: scores[i] for name, scores in found.by_function.items()}}
            if total is not None:
                rollout.reward = total + self.config.environment_weight * sum(own.values())
                rollout.reward += self._overlong(rollout)

    def _overlong(self, rollout: Rollout) -> float:
        """Decoupled-clip DAPO's soft punishment of answers near the limit (0 for other algorithms)."""
        if self.algorithm.overlong_buffer is None:
            return 0.0
        longest = self.config.max_completion_length
        return soft_overlong(rollout.num_sampled, longest, int(self.algorithm.overlong_buffer * longest))

    def close(self) -> None:
        """End the reward functions' processes."""
        if self.scorer is not None:
            self.scorer.close()


def _said(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _longest(config: OnlineConfig, positions: int | None) -> int | None:
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
