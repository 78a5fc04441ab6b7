"""The collector with a real engine: nobody waits for anybody, every rollout ends once, broken ones are dealt with."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.models import make_tiny_model
from support.words import word_tokenizer

from llmrl.envs.protocol import Message, StepResult
from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.collector import Collected, Collector, GroupPolicy, ScoreGroup, Task
from llmrl.rollout.episode import Limits
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.rendering import Renderer
from llmrl.rollout.trajectory import RolloutGroup

TOKENIZER = word_tokenizer()


class Talk:
    """Says one word after another, `turns` times; every answer earns its number of words."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        self.row, self.seed, self.turn = row, seed, 0

    async def init(self) -> list[Message]:
        return [{"role": "user", "content": self.row["word"]}]

    async def step(self, message: Message) -> StepResult:
        self.turn += 1
        reward = {"words": float(len(message["content"].split()))}
        return StepResult([{"role": "user", "content": "cat"}], self.turn == self.row.get("turns", 3), reward)

    async def close(self) -> None:
        pass


def engine(**options: Any) -> HuggingFaceEngine:
    lm = make_tiny_model(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id, scale=0.1)
    return HuggingFaceEngine(lm, TOKENIZER, **options)  # next to uniform, so a turn ends after 23 tokens or so


LIMITS = Limits(max_turns=3, max_completion_length=60, cut_turns="end")


async def own_rewards(group: RolloutGroup) -> None:
    """The environment's rewards alone."""
    for rollout in group.rollouts:
        rollout.reward = sum(rollout.environment_rewards.values())


def collect(
    environment: Callable[..., Any] = Talk,
    tasks: int = 3,
    samples: int = 4,
    limits: Limits = LIMITS,
    own_engine: HuggingFaceEngine | None = None,
    score: ScoreGroup = own_rewards,
    **options: Any,
) -> Collected:
    words = ["red", "green", "blue", "one", "two"]
    asked = [Task(i + 1, {"word": words[i % 5]}, samples, seed=100 + i) for i in range(tasks)]
    collector = Collector(own_engine or engine(), Renderer(TOKENIZER), environment, limits, score, **options)
    return collector.collect(asked)


def test_tokens_turns_and_rewards_are_those_of_the_episode() -> None:
    found = collect()
    assert [group.number for group in found.groups] == [1, 2, 3]
    rollouts = [rollout for group in found.groups for rollout in group.rollouts]
    assert len(rollouts) == found.counts["rollouts"] == 12
    assert {rollout.end_state for rollout in rollouts} >= {"completed"}
    for rollout in rollouts:
        assert len({r.seed for r in rollouts}) == 12
        for turn in rollout.turns:
            sampled = rollout.pieces[turn.piece][turn.start : turn.end]
            assert len(sampled) == len(turn.logprobs) <= 60
            assert (sampled[-1] == TOKENIZER.eos_token_id) == (turn.finish_reason == "stop")
        said = [m for m in rollout.messages if m["role"] == "assistant"]
        if rollout.end_state == "completed":
            assert len(rollout.turns) == 3
            assert rollout.reward == sum(len(m["content"].split()) for m in said)
        assert rollout.num_sampled == len(rollout.sampled_ids)
    assert found.num_sampled == sum(rollout.num_sampled for rollout in rollouts)


def test_the_same_seeds_give_the_same_rollouts_to_the_bit_whatever_runs_beside() -> None:
    first, second = collect(), collect()
    assert [g.rollouts[0].turns for g in first.groups] == [g.rollouts[0].turns for g in second.groups]
    alone = collect(tasks=1)
    assert [r.sampled_ids for r in alone.groups[0].rollouts] == [r.sampled_ids for r in first.groups[0].rollouts]
    few = collect(limits=replace(LIMITS, concurrent_rollouts=2))
    assert [r.sampled_ids for g in few.groups for r in g.rollouts] == [
        r.sampled_ids for g in first.groups for r in g.rollouts
    ]


class Sleeper(Talk):
    """Blocks its thread before every answer, if it is the first row's."""

    def step(self, message: Message) -> StepResult:  # type: ignore[override]
        if self.row["word"] == "red":
            time.sleep(0.4)
        return asyncio.run(Talk.step(self, message))


def test_an_environment_that_sleeps_delays_nobody_else() -> None:
    """Whoever has ended before the sleeper's first answer did not wait for it: order of events, no clock."""
    ended: list[str] = []

    class Noted(Sleeper):
        async def close(self) -> None:
            ended.append(self.row["word"])

    collect(Noted, tasks=5, samples=2)
    assert sorted(ended[:8]) == sorted(["green", "blue", "one", "two"] * 2)
    assert ended[8:] == ["red"] * 2


class Built(Talk):
    """Its constructor waits for an event, if it is the first row's."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        if row["word"] == "red":
            assert type(self).event.wait(20)
        super().__init__(row, seed)


def built(event: threading.Event, **members: Any) -> type[Built]:
    return type("Own", (Built,), {"event": event, **members})


def test_a_constructor_that_blocks_delays_nobody_else() -> None:
    """It ends only once all others have, which they could not if it held them up."""
    others_ended, ended = threading.Event(), []

    async def close(self: Built) -> None:
        ended.append(self.row["word"])
        if len(ended) == 8:
            others_ended.set()

    found = collect(built(others_ended, close=close), tasks=5, samples=2)
    assert [len(g.rollouts) for g in found.groups] == [2] * 5
    assert ended[8:] == ["red"] * 2


def test_a_constructor_that_takes_too_long_breaks_its_rollout_and_what_it_made_is_closed() -> None:
    late, closed = threading.Event(), threading.Event()

    async def close(self: Built) -> None:
        if self.row["word"] == "red":
            closed.set()

    limits = Limits(max_turns=3, max_completion_length=60, environment_seconds=0.2)
    found = collect(built(late, close=close), limits=limits, policy=GroupPolicy(on_error="accept"))
    assert [g.number for g in found.groups] == [2, 3]
    assert found.counts["error-timeout"] == 4
    assert not closed.is_set()
    late.set()
    assert closed.wait(20)
    with pytest.raises(RunFailedError, match=r"row 1.*error-timeout.*__init__\(\) took longer than 0.2 s"):
        collect(built(threading.Event()), limits=limits, policy=GroupPolicy(on_error="fail"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("no such board"), r"__init__\(\) raised KeyError: 'no such board' \(.*test_collector"),
        (TimeoutError("the server is asleep"), r"__init__\(\) raised TimeoutError: the server is asleep"),
        (SystemExit(3), r"__init__\(\) raised RuntimeError: SystemExit\(3\) \(.*test_collector"),
    ],
)
def test_what_a_constructor_raises_breaks_its_rollout_in_words(error: BaseException, words: str) -> None:
    class Unmade(Talk):
        def __init__(self, row: dict[str, Any], seed: int) -> None:
            raise error

    with pytest.raises(RunFailedError, match=f"row 1.*error-abort.*{words}"):
        collect(Unmade, policy=GroupPolicy(on_error="fail"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cancelled", r"step\(\) cancelled itself"),
        ("late", r"step\(\) raised TimeoutError: no answer from the game"),
        ("exit", r"step\(\) raised SystemExit: 3"),
        ("half a character", r"the tokenizer cannot take .*\\ud83d"),
    ],
)
def test_odd_ends_of_a_step_break_its_rollout_and_not_the_run(fault: str, words: str) -> None:
    class Odd(Talk):
        async def step(self, message: Message) -> StepResult:
            if fault == "cancelled":
                gone = asyncio.get_running_loop().create_future()
                gone.cancel()
                await gone
            if fault == "late":
                raise TimeoutError("no answer from the game")
            if fault == "exit":
                raise SystemExit(3)
            return StepResult([{"role": "user", "content": "red \ud83d"}])

    with pytest.raises(RunFailedError, match=f"row \\d.*error-abort.*{words}"):
        collect(Odd, policy=GroupPolicy(on_error="fail"))


class Raiser(Talk):
    """Raises in its `step`, as long as its first seeds last."""

    calls = 0
    failures = 1

    async def step(self, message: Message) -> StepResult:
        type(self).calls += 1
        if self.row["word"] == "green" and type(self).failures > 0:
            type(self).failures -= 1
            raise KeyError("no such cat")
        return await super().step(message)


def raiser(failures: int) -> type[Raiser]:
    return type("Own", (Raiser,), {"failures": failures})


def test_a_broken_rollout_is_tried_again_with_another_seed() -> None:
    found = collect(raiser(1))
    assert found.counts["retried"] == 1
    assert [len(g.rollouts) for g in found.groups] == [4, 4, 4]
    assert len({r.seed for g in found.groups for r in g.rollouts}) == 12


def test_what_keeps_breaking_is_an_error_with_row_place_and_remedy() -> None:
    with pytest.raises(RunFailedError, match=r"row 2.*3 times.*KeyError: 'no such cat'.*test_collector.*on_error"):
        collect(raiser(10**6))
    with pytest.raises(RunFailedError, match=r"row 2.*error-abort"):
        collect(raiser(1), policy=GroupPolicy(on_error="fail"))


def test_fewer_rollouts_can_be_accepted_and_small_groups_go() -> None:
    found = collect(raiser(1), policy=GroupPolicy(on_error="accept", min_rollouts=2))
    assert [len(g.rollouts) for g in found.groups] == [4, 3, 4]
    assert found.counts["left_out"] == found.counts["error-abort"] == 1
    found = collect(raiser(10**6), policy=GroupPolicy(on_error="accept", min_rollouts=2))
    assert [g.number for g in found.groups] == [1, 3]
    assert found.counts["groups_left_out"] == 1


class Endless(Talk):
    async def step(self, message: Message) -> StepResult:
        if self.row["word"] == "green":
            await asyncio.sleep(3600)
        return await super().step(message)


def test_an_environment_that_never_ends_is_timed_out_by_name() -> None:
    limits = Limits(max_turns=3, max_completion_length=60, environment_seconds=0.2)
    with pytest.raises(RunFailedError, match=r"row 2.*error-timeout.*step\(\) took longer than 0.2 s"):
        collect(Endless, limits=limits, policy=GroupPolicy(on_error="fail"))
    whole = Limits(max_turns=3, max_completion_length=60, rollout_seconds=4.0)
    found = collect(Endless, limits=whole, policy=GroupPolicy(on_error="accept"))
    assert [g.number for g in found.groups] == [1, 3]
    assert found.counts["error-timeout"] == 4


def test_a_blocked_thread_does_not_keep_the_process() -> None:
    class Blocked(Talk):
        def step(self, message: Message) -> StepResult:  # type: ignore[override]
            time.sleep(3600)
            raise AssertionError

    limits = Limits(max_turns=3, max_completion_length=60, environment_seconds=0.2)
    found = collect(Blocked, limits=limits, policy=GroupPolicy(on_error="accept"))
    assert found.groups == []


def test_stragglers_are_given_up_once_enough_is_there() -> None:
    class Straggler(Talk):
        started = 0

        def __init__(self, row: dict[str, Any], seed: int) -> None:
            super().__init__(row, seed)
            type(self).started += row["word"] == "blue"
            self.slow = row["word"] == "blue" and type(self).started == 4

        async def step(self, message: Message) -> StepResult:
            if self.slow:
                await asyncio.sleep(3600)
            return await super().step(message)

    found = collect(Straggler, policy=GroupPolicy(min_rollouts=3, early_stop=0.9))
    assert [len(g.rollouts) for g in found.groups] == [4, 4, 3]
    assert found.counts["given_up"] == 1


def test_what_broke_has_ended_too_and_holds_no_early_stop_up() -> None:
    """Nine of twelve are sound, less than the share asked for; one rollout never ends, and a whole row breaks."""

    class Few(Talk):
        slow = False

        async def step(self, message: Message) -> StepResult:
            if self.row["word"] == "green":
                raise ValueError("broken board")
            if self.row["word"] == "blue" and not type(self).slow:
                type(self).slow = True
                await asyncio.sleep(3600)
            return await super().step(message)

    found = collect(Few, policy=GroupPolicy(on_error="accept", min_rollouts=3, early_stop=0.9))
    assert [(g.number, len(g.rollouts)) for g in found.groups] == [(1, 4), (3, 3)]
    assert (found.counts["given_up"], found.counts["error-abort"]) == (1, 4)


def test_the_first_error_ends_what_never_would() -> None:
    class Faulty(Endless):
        async def step(self, message: Message) -> StepResult:
            if self.row["word"] == "red":
                raise KeyError("no such cat")
            return await super().step(message)

    with pytest.raises(RunFailedError, match=r"row 1.*no such cat"):
        collect(Faulty, policy=GroupPolicy(on_error="fail"))

    async def score(group: RolloutGroup) -> None:
        raise RunFailedError("no judge")

    with pytest.raises(RunFailedError, match="no judge"):
        collect(Endless, score=score)


def test_limits_of_turns_and_of_length() -> None:
    found = collect(limits=Limits(max_turns=2, max_completion_length=60, cut_turns="end"))
    states = {r.end_state for g in found.groups for r in g.rollouts}
    assert states <= {"truncated-turns", "truncated-length"}
    assert "truncated-turns" in states
    found = collect(limits=Limits(max_turns=3, max_completion_length=60, max_length=3))
    assert {r.end_state for g in found.groups for r in g.rollouts} == {"truncated-prompt"}
    found = collect(limits=Limits(max_turns=3, max_completion_length=60, max_length=26))
    assert all(len(piece) <= 26 for g in found.groups for r in g.rollouts for piece in r.pieces)


def test_groups_are_scored_as_soon_as_they_are_whole() -> None:
    """A reward that takes long does not hold the other groups' rollouts up, and gets the whole group."""
    events: list[str] = []

    class Noted(Sleeper):
        async def close(self) -> None:
            events.append(self.row["word"])

    async def score(group: RolloutGroup) -> None:
        events.append(f"scores {group.row['word']}")
        assert len(group.rollouts) == 2
        for rollout in group.rollouts:
            rollout.reward = 1.0

    found = collect(Noted, tasks=3, samples=2, score=score)
    assert events.index("scores green") < events.index("red")
    assert all(r.reward == 1.0 for g in found.groups for r in g.rollouts)


def test_rollouts_without_a_score_are_left_out_and_counted() -> None:
    async def score(group: RolloutGroup) -> None:
        for rollout in group.rollouts[1:]:
            rollout.reward = 0.5

    found = collect(score=score)
    assert [len(g.rollouts) for g in found.groups] == [3, 3, 3]
    assert found.counts["left_out"] == 3


def test_an_error_of_the_engine_ends_the_collection() -> None:
    own = engine()
    with pytest.raises(RefusedError, match=r"row \d.*exceeds the model's 256 positions"):
        collect(own_engine=own, limits=Limits(max_turns=3, max_completion_length=300))
    for parameter in own.model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(RunFailedError, match="not finite"):
        collect(own_engine=own)


def test_opening_messages_with_tools_and_short_tuples_are_taken() -> None:
    class Plain:
        def __init__(self, row: dict[str, Any], seed: int) -> None:
            pass

        def init(self) -> tuple[list[Message], list[dict[str, Any]]]:
            return [{"role": "user", "content": "red"}], []

        def step(self, message: Message) -> tuple[list[Message], bool, dict[str, float]]:
            return [], True, {"said": 0.0}

        def close(self) -> None:
            pass

    found = collect(Plain)
    assert all(r.reward == 0.0 for g in found.groups for r in g.rollouts)


def test_a_cut_turn_ends_the_rollout_or_is_closed_and_answered() -> None:
    ended = collect(limits=Limits(max_turns=3, max_completion_length=2, cut_turns="end"))
    assert {r.end_state for g in ended.groups for r in g.rollouts} == {"truncated-length"}
    gone_on = collect(limits=Limits(max_turns=3, max_completion_length=2))
    rollouts = [r for g in gone_on.groups for r in g.rollouts]
    assert {r.end_state for r in rollouts} == {"completed"}
    for rollout in rollouts:
        assert [turn.end - turn.start <= 2 for turn in rollout.turns] == [True] * 3
        for turn, following in zip(rollout.turns, rollout.turns[1:], strict=False):
            if turn.finish_reason == "length":  # the closing token stands behind it, and nobody sampled it
                assert rollout.pieces[turn.piece][turn.end] == TOKENIZER.eos_token_id
                assert following.start > turn.end


def test_a_rollout_goes_on_from_tokens_that_it_is_given() -> None:
    """What the policy would say greedily after its own first tokens is what it said after them."""
    one = Limits(max_turns=1, max_completion_length=20)
    collector = Collector(engine(), Renderer(TOKENIZER), Talk, one, own_rewards)
    task = Task(1, {"word": "red", "turns": 1}, 1, seed=7)
    (whole,) = collector.collect([task], temperature=0).groups[0].rollouts
    given = tuple(whole.sampled_ids[:5])
    (after,) = collector.collect([replace(task, given=given)], temperature=0).groups[0].rollouts
    assert after.pieces == whole.pieces
    assert after.messages == whole.messages
    assert after.reward == whole.reward
    assert after.end_state == whole.end_state
    (turn,) = after.turns
    assert (turn.given, after.num_sampled) == (5, whole.num_sampled - 5)
    assert all(math.isnan(logprob) for logprob in turn.logprobs[:5])
    assert turn.logprobs[5:] == pytest.approx(whole.turns[0].logprobs[5:], abs=1e-4)


def test_tokens_that_leave_no_room_end_a_rollout() -> None:
    one = Limits(max_turns=1, max_completion_length=5)
    collector = Collector(engine(), Renderer(TOKENIZER), Talk, one, own_rewards)
    task = Task(1, {"word": "red", "turns": 1}, 1, seed=7, given=(8, 9, 10, 11, 12))
    (rollout,) = collector.collect([task]).groups[0].rollouts
    assert (rollout.end_state, rollout.turns) == ("truncated-prompt", [])
