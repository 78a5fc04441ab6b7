"""The rounds of Direct Advantage: stages A.1 to B.1, and the states on which the actor is trained (Algorithm 1).

OUTPUT_DIR/rounds/round_N holds what each stage has left (`stage_files`):

    states.jsonl        A.1  states of the answers that are kept
    completions.jsonl   A.2  what followed each state, how often it ended right
    critic/             A.3  the model, value_head.safetensors, training.jsonl, reliability.json
    actions.jsonl       B.1  the states' actions: values, advantages, the reference's log-probabilities
    stages.json              what the round began with: weights, data, configuration, functions; the stages' counts

Invariants: what a round samples follows from its number, the seed and the weights; a checkpoint is left before a round
begins, and it knows the weights of the round in which it stands, and the functions that judged and divided it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmrl.config.functions import file_named
from llmrl.config.resolved import fingerprint
from llmrl.data.order import rows_for_step
from llmrl.data.steps import segmenter
from llmrl.errors import RefusedError, RunFailedError
from llmrl.evaluation.progress import Ticker
from llmrl.files import digest, write_json, write_lines
from llmrl.learner.learner import Learner
from llmrl.learner.sequences import Group
from llmrl.learner.together import from_first
from llmrl.objectives.direct_advantage import reliability
from llmrl.rollout.protocol import row_seed
from llmrl.trainers.direct_advantage import critic as critics
from llmrl.trainers.direct_advantage.config import DirectAdvantageConfig
from llmrl.trainers.direct_advantage.stage_files import Line, StageFolder, Tallies
from llmrl.trainers.direct_advantage.stages import (
    Candidate,
    action_line,
    actor_group,
    candidates_of,
    completion_line,
    critic_groups,
    going_on,
    states_of,
    tasks_from,
)
from llmrl.trainers.online.metrics import rollout_metrics
from llmrl.trainers.online.run import SampledRun

STATES_AT_ONCE = 1024
"""States whose completions are sampled together and then written down: what a kill may cost, and what memory holds."""
SAID = ("reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")
"""What of the answers' metrics is logged with every step of their round."""


class Rounds:
    """`states_of(step)`: the groups of an optimizer step. `metrics`: of the round in which it is."""

    def __init__(self, config: DirectAdvantageConfig, sampled: SampledRun) -> None:
        self.config, self.sampled, self.run = config, sampled, sampled.run
        self.learner, self.accelerator = sampled.learner, sampled.learner.accelerator
        self.split = segmenter(config)
        self.metrics: Tallies = {}
        self._number, self._groups = -1, list[Group]()
        self._begun_with: dict[str, Any] = {}
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the weights and functions with which the round began."""
        return self._begun_with

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._begun_with = saved

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text = self.sampled.task.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def states_of(self, step: int) -> list[Group]:
        """The states of optimizer step `step` (from 0), each with all of its actions; at a round's first step
        everything that comes before it is done, or found done."""
        number, within = divmod(step, self.config.steps_per_round)
        if number != self._number:
            with self.sampled.session.before_updates(), _own_random_numbers():
                self._enter(number, step, begins=within == 0)
        count = min(self.config.states_per_step, len(self._groups))
        seed = row_seed(self.config.seed, number, 3) % 2**32
        return [self._groups[row] for row in rows_for_step(within, count, len(self._groups), seed)]

    def _enter(self, number: int, step: int, begins: bool) -> None:
        if begins:
            self.sampled.session.checkpoint()
            self._begun_with = from_first(
                self.accelerator,
                lambda: {"weights": digest_of_weights(self.learner), "functions": own_functions(self.config)},
            )
        identity = {
            **self._begun_with,
            "dataset": self.sampled.task.data.fingerprint,
            "configuration": fingerprint(self.config),
        }
        path = self.run.directory / "rounds" / f"round_{number + 1}"
        folder = StageFolder(path, identity, begins, self.run, self.accelerator)
        stages = _Stages(self, folder, number, number * self.config.steps_per_round)
        try:
            kept = [line for line in folder.lines("actions.jsonl", stages.actions) if line["kept"]]
        except RefusedError as error:  # what is refused leaves no run behind, and here are files that took long to make
            raise (RunFailedError(str(error)) if folder.tallies() else error) from error
        tallies = folder.tallies()
        self._record_critic(number * self.config.steps_per_round, tallies["critic"])
        if not kept:
            raise RunFailedError(
                f"no state of {path / 'actions.jsonl'} teaches anything: the values of its actions are nowhere "
                f"{self.config.min_spread:g} apart. Choose easier or harder prompts, more samples_per_prompt, a critic "
                "that is trained longer (critic_epochs, critic_learning_rate), or a lower min_spread"
            )
        self.metrics = {
            "round": float(number + 1),
            **{f"round/{name}": value for name, value in tallies["states.jsonl"].items() if name not in SAID},
            **{name: value for name, value in tallies["states.jsonl"].items() if name in SAID},
            **{f"round/{name}": value for name, value in tallies["actions.jsonl"].items()},
        }
        self._number, self._groups = number, [actor_group(line) for line in kept]

    def _record_critic(self, step: int, judged: Tallies) -> None:
        """Its calibration in evals.json, also where an earlier attempt at the run has trained it."""
        known = any((entry["step"], entry["name"]) == (step, "critic") for entry in self.run.metrics.evaluations)
        if not known:
            self.run.evaluation(step, "critic", judged)


class _Stages:
    """What makes a round's files; `step`: the optimizer steps before the round."""

    def __init__(self, rounds: Rounds, folder: StageFolder, number: int, step: int) -> None:
        self.rounds, self.folder, self.number, self.step = rounds, folder, number, step
        self.config, self.sampled, self.run = rounds.config, rounds.sampled, rounds.run
        self.learner, self.decode = rounds.learner, rounds.decode

    def watched(self, what: str) -> Ticker:
        """Says how far `what` is, and ends the run where a signal asks for it."""
        return self.sampled.session.watched(f"round {self.number + 1}, {what}")

    def states(self) -> tuple[list[Line], Tallies]:
        """A.1: answers of the actor, and the states of those that are kept."""
        collected = self.sampled.collect(self.step, first_row=self.number * self.config.prompts_per_round)
        lines, counts = states_of(collected.groups, self.config, self.rounds.split, self.decode)
        self.run.note(
            f"round {self.number + 1}: {counts['answers']:.0f} answers ({counts['right']:.0%} right), of which "
            f"{counts['kept']:.0f} are kept ({counts['of_one_step']:.0f} of one step): {counts['states']:.0f} states, "
            f"beside {counts['states_again']:.0f} that were there before"
        )
        metrics = rollout_metrics(collected)
        return lines, {**counts, **{name: metrics[name] for name in SAID if name in metrics}}

    def completions(self) -> tuple[list[Line], Tallies]:
        """A.2: completions from every state, and its success rate."""
        states = self.folder.lines("states.jsonl", self.states)
        rows = {prompt.number: prompt.row for prompt in self.sampled.task.data.train}
        tasks = tasks_from(states, rows, self.config, self.number)

        def part(first: int) -> list[Line]:
            asked = tasks[first : first + STATES_AT_ONCE]
            what = f"completions of round {self.number + 1}, states {first + 1} to {first + len(asked)} of {len(tasks)}"
            made = [
                completion_line(states[first + group.place], group, self.config.success_threshold, self.decode)
                for group in self.sampled.sampler.of_tasks(asked, what).groups
            ]
            return [line for line in made if line is not None]

        lines = self.folder.parts("completions.jsonl", range(0, len(tasks), STATES_AT_ONCE), part)
        if len(lines) < len(states):
            self.run.note(
                f"round {self.number + 1}: {len(states) - len(lines)} states without completions are left out"
            )
        rate = sum(line["rate"] for line in lines) / max(len(lines), 1)
        return lines, {"states": len(lines), "rate": rate}

    def critic(self, folder: Path) -> Tallies:
        """A.3: the critic, and how well it knows the success rates of prompts that it was not trained on."""
        completions = self.folder.lines("completions.jsonl", self.completions)
        states = self.folder.lines("states.jsonl", self.states)
        seed = row_seed(self.config.seed, self.number, 4) % 2**32
        end = int(self.sampled.task.tokenizer.eos_token_id)
        groups = critic_groups(states, completions, end, self.config.critic_validation, seed)
        training = critics.CriticTraining(
            epochs=self.config.critic_epochs,
            states_per_step=self.config.critic_states_per_step,
            learning_rate=self.config.critic_learning_rate,
            value_learning_rate=self.config.critic_value_learning_rate,
            seed=seed,
        )
        found = self._trained(groups.train, groups.validation, training, folder)
        critics.give_memory_back()
        return found

    def _trained(
        self, train: list[Group], validation: list[Group], training: critics.CriticTraining, folder: Path
    ) -> Tallies:
        course: list[Line] = []
        tick = self.watched("steps of the critic")

        def after_step(done: int, total: int, metrics: dict[str, float]) -> None:
            course.append({"step": done, **metrics})
            tick(done, total)

        critic = critics.fit(self.learner, train, training, after_step)
        predicted = critics.success(critic, validation, self.watched("groups of states valued for validation"))
        rates = [float(s.token_values["success_rate"][0]) for group in validation for s in group]
        judged = reliability([v for group in predicted for v in group], rates)
        critics.save(critic, folder)
        if self.run.is_main:
            self.sampled.task.tokenizer.save_pretrained(folder)
            write_lines(folder / "training.jsonl", course)
            bins = [b._asdict() for b in judged.bins]
            write_json(folder / "reliability.json", {**judged._asdict(), "bins": bins, "n": len(rates)})
        return {
            "brier": judged.brier,
            "brier_of_mean": judged.brier_of_mean,
            "calibration_error": judged.error,
            "n": len(rates),
            "states_trained_on": sum(map(len, train)),
            "loss_first": course[0]["critic_loss"],
            "loss_last": course[-1]["critic_loss"],
        }

    def actions(self) -> tuple[list[Line], Tallies]:
        """B.1: the first steps of the completions with their advantages, and what the reference says of them."""
        folder = self.folder.folder("critic", self.critic)
        completions = self.folder.lines("completions.jsonl", self.completions)
        states = self.folder.lines("states.jsonl", self.states)
        candidates = [candidates_of(line, self.rounds.split, self.decode) for line in completions]
        asked = [states[line["state"]] for line in completions]
        values = self._values(folder, asked, candidates)
        critics.give_memory_back()
        lines = [
            action_line(state, found, known, self.config.min_spread, self.decode)
            for state, found, known in zip(asked, candidates, values, strict=True)
        ]
        kept = [line for line in lines if line["kept"]]
        single = sum(len(line["actions"]) == 1 for line in lines)
        self._add_reference(kept)
        self.run.note(
            f"round {self.number + 1}: {len(kept)} of {len(lines)} states train the actor; {single} have one action, "
            f"{len(lines) - len(kept) - single} actions nearer than {self.config.min_spread:g}"
        )
        per_state = sum(len(line["actions"]) for line in kept) / max(len(kept), 1)
        return lines, {"states_kept": len(kept), "of_one_action": single, "actions_per_state": per_state}

    def _values(
        self, folder: Path, states: list[Line], candidates: list[list[Candidate]]
    ) -> list[dict[tuple[int, ...], float]]:
        """The critic's value of every action that does not end the answer, by state."""
        actions = [going_on(found) for found in candidates]
        end = int(self.sampled.task.tokenizer.eos_token_id)
        groups = [
            critics.state_group([[*state["prompt_ids"], *state["answer_ids"], *ids] for ids in different], end)
            for state, different in zip(states, actions, strict=True)
            if different
        ]
        critic = critics.load(folder, self.config, self.learner)
        found = iter(critics.success(critic, groups, self.watched("states whose actions are valued")))
        return [dict(zip(different, next(found), strict=True)) if different else {} for different in actions]

    def _add_reference(self, kept: list[Line]) -> None:
        """The log-probabilities of the actions' tokens with the weights of now, with which the round begins."""
        groups = [actor_group(line) for line in kept]
        known = self.learner.logprobs(groups, progress=self.watched("states scored by the reference"))
        for line, logprobs in zip(kept, known, strict=True):
            for action, numbers in zip(line["actions"], logprobs, strict=True):
                action["reference_logprobs"] = numbers.tolist()


def digest_of_weights(learner: Learner) -> str:
    """Of the policy's weights as they are now."""
    found = hashlib.sha256()
    for name, tensor in learner.weights():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def own_functions(config: DirectAdvantageConfig) -> dict[str, str | None]:
    """What the files of one's own hold that divide and judge answers, as digests: a round that a function has made is
    not that of the function as it was mended."""
    named = [config.environment, config.step_function, *(entry.function for entry in config.reward_keys().rewards)]
    files = {name: file_named(name) for name in named if name is not None}
    return {name: digest(file) for name, file in files.items() if file is not None}


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Whether a stage is made or found made, training draws the same afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
