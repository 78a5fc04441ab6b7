"""The sampling side of the online methods and what their loops share: `OnlineRun`.

Invariant: what a step rolls out follows from its number, the seed and the weights, so that a resumed run repeats it.
"""

import asyncio
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmrl import envs, models
from llmrl.data.order import RowCursor
from llmrl.data.prompts import PromptData, prompts_made, prompts_of_dataset
from llmrl.data.tokenization import check_vocabulary
from llmrl.envs.tool_calls import parse_tool_calls
from llmrl.errors import RefusedError, RunFailedError, RunInterruptedError
from llmrl.evaluation.intervals import mean_interval
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_config, load_tokenizer, max_positions
from llmrl.learner.sharding import gather_objects, zero_stage
from llmrl.objectives.policy_gradient import PolicyGradient
from llmrl.objectives.presets import Preset
from llmrl.objectives.scored import Objective
from llmrl.rewards.scoring import Scorer
from llmrl.rewards.shaping import soft_overlong
from llmrl.rollout.collector import Collected, Collector, GroupPolicy, Limits, Progress, Task
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import Engine, row_seed
from llmrl.rollout.rendering import Renderer
from llmrl.rollout.threads import call
from llmrl.rollout.trajectory import Rollout, RolloutGroup, mean_reward
from llmrl.runs import Run, ranks
from llmrl.trainers import checks
from llmrl.trainers.experience import Experience
from llmrl.trainers.online_config import OnlineConfig
from llmrl.trainers.session import Session
from llmrl.trainers.setup import build_learner, task_evaluation, task_problems

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import TrainerCallback

MOST_REFILLS = 10
SAID_AFTER_EMPTY = 3
RESERVED = ("prompts", "completions", "completion_ids", "log_extra", "log_metric", "trainer_state")
"""Names of reward functions' own arguments: columns called so do not reach them."""


class OnlineTask:
    """What is asked and how it is judged; everything that can be wrong with it is refused here."""

    def __init__(
        self, config: OnlineConfig, say: Callable[[str], None], dataset: "Dataset | DatasetDict | None" = None
    ) -> None:
        self.config = config
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
        environment = self.kind.make(row, 0)

        async def opening() -> Any:
            try:
                return await call(environment.init, timeout=self.config.rollout.environment_seconds)
            finally:
                await call(environment.close)

        found = asyncio.run(opening())
        messages, tools = found if isinstance(found, tuple) else (found, None)
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
        )


class OnlineRun:
    """A run of an online method: what is sampled, what is learned from it, and what surrounds both.

    The methods' loops stand in their own files; every step is `collect`, `experience`, advantages, `improve`, `record`.
    """

    def __init__(
        self,
        config: OnlineConfig,
        run: Run,
        algorithm: Preset,
        *,
        dataset: "Dataset | DatasetDict | None" = None,
        callbacks: "Sequence[TrainerCallback]" = (),
        **learner_options: Any,
    ) -> None:
        self.config, self.run, self.algorithm = config, run, algorithm
        self.task = task = OnlineTask(config, run.note, dataset)
        run.verify_dataset(task.data.fingerprint)
        problems = task_problems(config.task_evaluation, config, task.tokenizer, run.note)
        total_steps = config.num_steps(len(task.data.train))
        self.learner = online_learner(config, algorithm, total_steps, run.note, **learner_options)
        self.engine = build_engine(config, self.learner, task.tokenizer, task.max_length)
        self.objective = online_objective(config, algorithm).objective()
        self.cursor = RowCursor(len(task.data.train), config.seed)
        self.learner.accelerator.register_for_checkpointing(self.cursor)
        self._answers = task_evaluation(problems, self.learner.causal_lm, self.learner.accelerator, run)
        self.session = Session(
            run, self.learner, task.tokenizer, total_steps, task.data.fingerprint, self.evaluate, callbacks
        )
        self._version, self._synced = 0, -1  # how often the learner changed, and which of its states the engine has
        self._empty_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.engine.close()
        if self.task.scorer is not None:
            self.task.scorer.close()

    # -- sampling ------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Collected:
        """The rollouts of step `step` (from 0) with the policy as it is, the same on every rank.

        With dynamic sampling, prompts whose rollouts are equally good are replaced by the next ones, as often as needed
        but at most ten times (arXiv 2503.14476, Sec. 3.2, and its code).
        """
        position = self.cursor.position
        with self.session.before_updates():
            try:
                collected = self._asked(step, 0, self.config.prompts_per_step)
                for again in range(1, MOST_REFILLS + 1):
                    if not self.algorithm.dynamic_sampling:
                        break
                    collected.groups = [group for group in collected.groups if len(set(group.rewards)) > 1]
                    missing = self.config.prompts_per_step - len(collected.groups)
                    if not missing:
                        break
                    collected = added(collected, self._asked(step, again, missing))
            except BaseException:
                self.cursor.position = position  # a checkpoint that is left repeats this step
                raise
        self._write(step + 1, collected.groups)
        return collected

    def _asked(self, step: int, again: int, count: int) -> Collected:
        """Roll out the next `count` prompts."""
        seed = row_seed(self.config.seed, step, again)
        prompts = [self.task.data.train[row] for row in self.cursor.take(count)]
        tasks = [
            Task(prompt.number, prompt.row, self.config.samples_per_prompt, row_seed(seed, place, 0))
            for place, prompt in enumerate(prompts)
        ]
        keys = self.config.rollout
        least = min(keys.min_per_group, self.config.samples_per_prompt)
        policy = GroupPolicy(keys.on_error, keys.retries, least, keys.early_stop)
        return self._collect(tasks, self.config.temperature, policy, f"rollouts of step {step + 1}")

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Greedy rollouts of the held-out rows, and the answers to the problems of task_evaluation."""
        heldout = self.task.data.heldout
        found: dict[str, dict[str, float]] = {}
        if heldout:
            tasks = [Task(prompt.number, prompt.row, 1, i) for i, prompt in enumerate(heldout)]
            done = self._collect(tasks, 0.0, GroupPolicy("accept", min_rollouts=1), "held-out rows")
            rollouts = [rollout for group in done.groups for rollout in group.rollouts]
            found["heldout"] = heldout_metrics(rollouts, len(heldout))
        return found | self._answers()

    def _collect(self, tasks: list[Task], temperature: float, policy: GroupPolicy, what: str) -> Collected:
        """Each rank rolls out its share of the tasks, and all get the whole."""
        if self._synced != self._version:
            self.engine.sync(self.learner.weights(), self._version)
            self._synced = self._version
        accelerator = self.learner.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        collector = Collector(
            self.engine,
            self.task.renderer,
            self.task.kind.make,
            self.task.limits(),
            self._score if self.task.scorer is not None else None,
            policy,
            _Shown(self.run, what),
        )
        with accelerator.autocast():  # sampled in the precision that is trained in
            mine = collector.collect(tasks[rank::world], temperature)
        return merged(gather_objects(accelerator, mine), [task.number for task in tasks])

    async def _score(self, group: RolloutGroup) -> None:
        """Scores of the reward functions and of the environment, and their weighted sum."""
        scorer, rollouts = self.task.scorer, group.rollouts
        assert scorer is not None
        found = await scorer.score(
            prompts=[rollout.messages[: rollout.opening] for rollout in rollouts],
            completions=[rollout.messages[rollout.opening :] for rollout in rollouts],
            completion_ids=[rollout.sampled_ids for rollout in rollouts],
            columns={name: [value] * len(rollouts) for name, value in group.row.items() if name not in RESERVED},
        )
        for i, (rollout, total) in enumerate(zip(rollouts, found.totals_S, strict=True)):
            own = rollout.environment_rewards
            rollout.scores = {**own, **{name: scores[i] for name, scores in found.by_function.items()}}
            if total is not None:
                rollout.reward = total + self.config.environment_weight * sum(own.values())
                rollout.reward += self._overlong(rollout)

    def weigh(self, weights: dict[str, float]) -> None:
        """Change the weights of reward functions, by their names, from the next rollouts on."""
        assert self.task.scorer is not None
        self.task.scorer.weights |= weights

    def _overlong(self, rollout: Rollout) -> float:
        """Decoupled-clip DAPO's soft punishment of answers near the limit (0 for other algorithms)."""
        if self.algorithm.overlong_buffer is None:
            return 0.0
        longest = self.config.max_completion_length
        return soft_overlong(rollout.num_sampled, longest, int(self.algorithm.overlong_buffer * longest))

    def _write(self, number: int, groups: Iterable[RolloutGroup]) -> None:
        if not self.run.is_main:
            return
        folder = self.run.directory / "rollouts"
        folder.mkdir(exist_ok=True)
        file = folder / f"step_{number}.jsonl"
        temporary = file.with_name(f".tmp_{file.name}")
        with open(temporary, "w", encoding="utf-8") as out:
            for group in groups:
                for rollout in group.rollouts:
                    out.write(json.dumps(rollout.record(self.task.tokenizer.decode), ensure_ascii=False) + "\n")
        temporary.replace(file)

    # -- learning ------------------------------------------------------------------------------------------------

    def experience(self, collected: Collected) -> Experience:
        """The rollouts as the learner takes them, with what the algorithm compares with: the policy's own
        log-probabilities where it is updated more than once, the reference's, the critic's values."""
        experience = Experience(collected.groups)
        if len(experience):
            algorithm, size = self.algorithm, self.config.update_size
            several = algorithm.epochs > 1 or (size is not None and size < len(experience))
            experience.score(
                self.learner,
                old=several or algorithm.kl == "reward",
                reference=algorithm.needs_reference,
                values=algorithm.needs_critic,
            )
        return experience

    def improve(self, experience: Experience, step: int, objective: Objective | None = None) -> dict[str, float]:
        """The optimizer steps of one step, through the method's objective or another; the means of their metrics."""
        more = self.algorithm.kl == "loss" or self.config.entropy_coef > 0 or self.algorithm.needs_critic
        metrics = experience.train(
            self.learner,
            objective or self.objective,
            epochs=self.algorithm.epochs,
            rollouts_per_update=self.config.update_size,
            seed=row_seed(self.config.seed, step, 0),
            skip_idle=not more,
        )
        self._version += 1
        return metrics

    def record(self, collected: Collected, metrics: dict[str, float]) -> None:
        """Log the step; ends a run in which nothing has been learned for long."""
        scorer = self.task.scorer
        failures = (
            {} if scorer is None else {f"rewards/{n}/failures": float(t.failures) for n, t in scorer.tallies.items()}
        )
        self.session.record({**rollout_metrics(collected), **failures, **metrics})
        self._empty_steps = 0 if metrics["updates"] else self._empty_steps + 1
        if self._empty_steps not in (SAID_AFTER_EMPTY, self.config.max_empty_steps):
            return
        mean = mean_reward(collected.groups)
        cause = (
            "no rollout has a reward" if math.isnan(mean) else f"a prompt's rollouts are equally good (mean {mean:.4g})"
        )
        said = f"nothing was learned in {self._empty_steps} steps in a row: {cause}"
        self.run.note(said)
        if self._empty_steps == self.config.max_empty_steps:
            raise RunFailedError(
                f"{said}. Choose easier or harder prompts, a reward with more grades, more samples_per_prompt, or a "
                "higher temperature"
            )


def online_learner(
    config: OnlineConfig, algorithm: Preset, total_steps: int, say: Callable[[str], None], **further: Any
) -> Learner:
    """The learner that the algorithm needs: a value head, a reference, or (LOOP) one copy of the model and no more.

    `further`: LearnerOptions that the method sets.
    """
    if not algorithm.needs_reference:
        reference = "precomputed"  # never asked for
    else:
        reference = config.reference if config.reference != "auto" or config.use_peft else "frozen"
    keys = config.model_copy(update={"reference": reference})
    return build_learner(
        keys,
        keys,
        keys,
        total_steps,
        say,
        temperature=config.temperature,
        value_head=algorithm.needs_critic,
        most_skipped=config.most_skipped_updates,
        **further,
    )


def online_objective(config: OnlineConfig, algorithm: Preset) -> PolicyGradient:
    """The preset's objective with the configuration's settings over it."""
    rollouts = config.prompts_per_step * config.samples_per_prompt
    own = config.settings(on_policy_engine=config.engine.kind == "huggingface")
    return algorithm.policy_gradient(config.max_completion_length, min(config.update_size or rollouts, rollouts), **own)


def check_online(config: OnlineConfig, algorithm: Preset) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    said: list[str] = []
    task = OnlineTask(config, said.append)
    if task.scorer is not None:
        task.scorer.close()
    task_problems(config.task_evaluation, config, task.tokenizer, said.append)
    online_objective(config, algorithm)
    steps = config.num_steps(len(task.data.train))
    said.append(f"{len(task.data.train)} prompts to train on, {len(task.data.heldout)} held out; {steps} steps")
    return said + checks.fits(config, config, config)


@dataclass
class _Shown:
    """Progress of a collection, said now and then; ends it when a signal asked this process to stop."""

    run: Run
    what: str
    said_at: float = 0.0

    def __call__(self, progress: Progress) -> None:
        if self.run.training and self.run.interrupted and ranks.world_size() == 1:  # several ranks stop together, later
            raise RunInterruptedError(f"a signal asked for it during {self.what}")
        if progress.seconds - self.said_at > 10:
            self.said_at = progress.seconds
            rate = progress.num_sampled / max(progress.seconds, 1e-9)
            self.run.console.say(
                f"{self.what}: {progress.done} of {progress.total}, {rate:,.0f} sampled tokens/s, most wait for "
                f"{progress.waiting_for}"
            )


def build_engine(
    config: OnlineConfig, learner: Learner, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Engine:
    """The configured engine. Raises RefusedError where it cannot be."""
    keys = config.engine
    if keys.kind == "huggingface":
        if zero_stage(learner.accelerator) == 3:
            raise RefusedError(
                "engine.kind huggingface samples with the whole model on each process, which ZeRO-3 does not have; "
                "use vllm or vllm_server, or launch with ZeRO-2 or DDP"
            )
        return HuggingFaceEngine(learner.causal_lm, tokenizer, keys.max_rows, keys.max_cache_tokens)
    raise RefusedError(f"engine.kind {keys.kind} is not available yet")


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """TRL's names where the quantity is the same."""
    groups = collected.groups
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stds = [float(np.std(group.rewards, ddof=1)) for group in groups if len(group.rewards) > 1]
    equal = [float(len(set(group.rewards)) < 2) for group in groups]
    lengths = [rollout.num_sampled for rollout in rollouts]
    metrics: dict[str, float] = {
        "reward": mean_reward(groups),
        "reward_std": sum(stds) / max(len(stds), 1),
        "frac_reward_zero_std": sum(equal) / max(len(equal), 1),
        "rollouts": float(len(rollouts)),
        "rollout_seconds": collected.seconds,
        "sampled_tokens_per_second": collected.num_sampled / max(collected.seconds, 1e-9),
    }
    if rollouts:
        ended = [r.num_sampled for r in rollouts if not r.truncated]
        metrics |= {
            "completions/mean_length": float(np.mean(lengths)),
            "completions/min_length": float(min(lengths)),
            "completions/max_length": float(max(lengths)),
            "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0,
            "completions/clipped_ratio": 1 - len(ended) / len(rollouts),
            "rollout/turns": float(np.mean([len(r.turns) for r in rollouts])),
        }
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = [v for rollout in rollouts if (v := rollout.scores.get(name)) is not None]
        metrics[f"rewards/{name}/mean"] = float(np.mean(values)) if values else float("nan")
        metrics[f"rewards/{name}/std"] = float(np.std(values)) if values else float("nan")
    unusual = {n: c for n, c in collected.counts.items() if n not in ("rollouts", "completed") and c}
    return metrics | {f"rollout/{name}": float(count) for name, count in sorted(unusual.items())}


def heldout_metrics(rollouts: list[Rollout], asked: int) -> dict[str, float]:
    """Mean reward with a 95% interval, means of the scores, shares of the end states that are no completion."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    mean, low, high = mean_interval(rewards)
    metrics = {"reward": mean, "reward_interval_low": low, "reward_interval_high": high, "n": float(len(rewards))}
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = [v for rollout in rollouts if (v := rollout.scores.get(name)) is not None]
        metrics[name] = float(np.mean(values)) if values else float("nan")
    metrics["truncated"] = sum(r.truncated for r in rollouts) / max(len(rollouts), 1)
    metrics["mean_length"] = float(np.mean([r.num_sampled for r in rollouts])) if rollouts else 0.0
    if asked > len(rewards):
        metrics["without_reward"] = float(asked - len(rewards))
    return metrics


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


def added(first: Collected, second: Collected) -> Collected:
    """What two collections brought, one after the other."""
    counts = {n: first.counts.get(n, 0) + second.counts.get(n, 0) for n in {*first.counts, *second.counts}}
    return Collected(
        first.groups + second.groups,
        counts,
        first.seconds + second.seconds,
        first.num_sampled + second.num_sampled,
    )


def merged(shares: Sequence[Collected], order: Sequence[int]) -> Collected:
    """The ranks' collections, which went on beside each other, with groups in the order of the rows' numbers."""
    together = functools.reduce(added, shares)
    place = {number: position for position, number in reversed(list(enumerate(order)))}
    together.groups.sort(key=lambda group: place[group.number])
    together.seconds = max(share.seconds for share in shares)
    return together
