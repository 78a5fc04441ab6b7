"""reasoning-gym's tasks: real ones, played; what is refused; scorers that hang or die; no text is ever run."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrl import envs
from llmrl.envs import reasoning_scorer, reasoning_tasks
from llmrl.envs.reasoning_tasks import extract, unsafe_scorer
from llmrl.envs.scoring import Scorer, scorer
from llmrl.errors import RefusedError

pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")


@pytest.fixture(scope="module", autouse=True)
def _end_the_children() -> Iterator[None]:
    yield
    scorer().close()
    scorer.cache_clear()


@pytest.mark.parametrize("task", ["chain_sum", "number_sorting", "isomorphic_strings", "graph_color"])
def test_tasks_are_played_and_judged(task: str, play: Any) -> None:
    kind = envs.load(f"reasoning_gym:{task}")
    assert kind.rows is not None
    train, test = kind.rows("train", 8, 0), kind.rows("test", 4, 1)
    assert len(train) == 8
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert kind.rows("train", 3, 0) == train[:3] != kind.rows("train", 3, 1)
    dialogue, rewards, done = play(kind.make(train[0], 0), lambda _: f"Hm.\n<answer>{train[0]['answer']}</answer>")
    assert [m["role"] for m in dialogue] == ["system", "user", "assistant"]
    assert "<answer>" in dialogue[0]["content"]
    assert done
    if task != "graph_color":  # it has many right answers and gives none
        assert rewards == {"score": 1.0}
    wrong = [play(kind.make(train[0], 0), lambda _, t=text: t)[1] for text in ("<answer>no</answer>", "no tag", "")]
    assert wrong == [{"score": 0.0}] * 3


def test_the_configuration_reaches_the_task_typed() -> None:
    rows = envs.load("reasoning_gym:chain_sum", {"max_terms": "2", "min_terms": 2, "answer_from": "text"}).rows
    assert rows is not None
    assert all(sum(row["prompt"].count(sign) for sign in (" + ", " - ")) == 1 for row in rows("train", 20, 0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "no task `chain_sums`; did you mean `reasoning_gym:chain_sum`"),
        ("chain_sum", {"max_term": 3}, r"`environment_options\.max_term` of .*did you mean `max_terms`"),
        ("chain_sum", {"max_terms": "many"}, r"`environment_options\.max_terms`"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "cannot be made with"),
        ("chain_sum", {"seed": 3}, r"environment_options\.seed"),
        ("chain_sum", {"answer_from": "middle"}, r"environment_options\.answer_from"),
        ("spiral_matrix", {}, "refused: its scorer is in a module that calls `eval`"),
        ("simple_integration", {}, "refused: its scorer is in a module that calls `parse_expr`"),
        ("composite", {}, "cannot be made with its defaults"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        envs.load(f"reasoning_gym:{name}", options)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=r"pip install 'llmrl\[envs\]'"):
        envs.load("reasoning_gym:chain_sum")


def test_every_module_that_calls_eval_on_answers_is_found() -> None:
    """As read in reasoning-gym 0.1.25: those that hand the answer to `eval` or sympy, less the two that we replace."""
    from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]

    unsafe = {task for task, (dataset, _) in DATASETS.items() if unsafe_scorer(task, dataset)}
    assert unsafe == {
        "binary_matrix", "intermediate_integration", "n_queens", "polynomial_multiplication", "simple_integration",
        "spiral_matrix", "string_insertion",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("2*3+4", 1.0), ("4 + (3*2)", 1.0), ("2*3*4", 0.05), ("2*5", 0.05), ("10", 0.05), ("2*3+4=10", 0.01),
        ("", 0.01),
        ("__import__('os').system('touch PLACE')", 0.01), ("(2*3+4", 0.01), ("2**3+4", 0.05), ("9" * 5000, 0.01),
    ],
)  # fmt: skip
def test_countdown_by_our_own_arithmetic(answer: str, score: float) -> None:
    entry = {"metadata": {"numbers": [2, 3, 4], "target": 10}}
    assert reasoning_scorer.countdown(answer, entry, None) == score


def test_countdown_agrees_with_the_original_scorer_on_harmless_answers() -> None:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("countdown", seed=3, size=20)
    for entry in dataset:
        numbers = entry["metadata"]["numbers"]
        tried = [entry["answer"], "+".join(map(str, numbers)), f"({numbers[0]}", "5", "-".join(map(str, numbers[:-1]))]
        for answer in tried:
            assert reasoning_scorer.countdown(answer, entry, None) == dataset.score_answer(answer, entry), answer


@pytest.mark.parametrize(
    ("answer", "score"), [("6*(5-1)*1", 1.0), ("(6-1-1)*5+4", 0.01), ("24", 0.01), ("6*4*1*1", 0.01)]
)
def test_puzzle24(answer: str, score: float) -> None:
    assert reasoning_scorer.puzzle24(answer, {"metadata": {"numbers": [1, 1, 5, 6]}}, None) == score


def test_hostile_answers_touch_nothing_and_never_raise(tmp_path: Path, play: Any) -> None:
    place = tmp_path / "touched"
    code = f"__import__('pathlib').Path({str(place)!r}).touch()"
    for task in ("countdown", "number_sorting", "propositional_logic", "bitwise_arithmetic", "polynomial_equations"):
        kind = envs.load(f"reasoning_gym:{task}", {"answer_from": "text"})
        assert kind.rows is not None
        row = kind.rows("train", 1, 0)[0]
        for text in (
            code,
            f"[{code}]",
            "9" * 5000,
            "(" * 5000,
            "[" * 20_000,
            "\0",
            "\ud800",
            "é🦊",
            "a" * 100_000,
            "1e999999999",
        ):
            rewards = play(kind.make(row, 0), lambda _, text=text: text)[1]
            assert rewards["score"] < 0.1
    assert not place.exists()


def item() -> dict[str, Any]:
    kind = envs.load("reasoning_gym:chain_sum")
    assert kind.rows is not None
    row = kind.rows("train", 1, 0)[0]
    where = {"task": "chain_sum", "config": {"seed": row["seed"], "size": reasoning_tasks.PAGE}, "index": row["index"]}
    return {**where, "question": row["prompt"], "answer": row["answer"]}


def test_a_scorer_that_is_late_or_dies_is_no_score_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    own, question = Scorer(), item()
    try:
        assert own.score(question, 30) == 1.0
        (first,) = own.pool.pids
        assert b"s3cret" not in Path(f"/proc/{first}/environ").read_bytes()
        os.kill(first, signal.SIGSTOP)  # it hangs
        assert own.score(question, 0.2) is None
        assert not Path(f"/proc/{first}").exists()
        assert own.score(question, 30) == 1.0
        (second,) = own.pool.pids
        os.kill(second, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (second, signal.SIGKILL)).start()
        assert own.score(question, 30) is None  # it dies over this answer
        assert own.score(question, 30) == 1.0
    finally:
        own.close()


def test_a_late_scorer_gives_no_reward_at_all(play: Any) -> None:
    kind = envs.load("reasoning_gym:chain_sum", {"deadline_seconds": 0.2})
    assert kind.rows is not None
    row = kind.rows("train", 1, 0)[0]
    for child in scorer().pool.pids:
        os.kill(child, signal.SIGSTOP)
    assert play(kind.make(row, 0), lambda _: f"<answer>{row['answer']}</answer>")[1:] == ({}, True)


def test_an_item_that_is_not_what_it_was_is_refused() -> None:
    with pytest.raises(RefusedError, match="same question twice"):
        scorer().score({**item(), "question": "another"}, 30)


@pytest.mark.parametrize(
    ("text", "tag", "last_line", "whole"),
    [
        ("a\n<answer> 5 </answer>\nb\n\n", "5", "b", "a\n<answer> 5 </answer>\nb"),
        ("<answer>1</answer><answer>2</answer>", "2", "<answer>1</answer><answer>2</answer>", None),
        ("<answer>1", None, "<answer>1", "<answer>1"),
        ("</answer>1<answer>", None, "</answer>1<answer>", None),
        ("", None, None, None),
        (" \n ", None, None, None),
    ],
)
def test_extract(text: str, tag: str | None, last_line: str | None, whole: str | None) -> None:
    assert extract(text, "tag") == tag
    assert extract(text, "last_line") == last_line
    assert extract(text, "text") == (whole or text.strip() or None)
