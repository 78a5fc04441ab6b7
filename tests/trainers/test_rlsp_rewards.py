"""RLSP's rewards as its configuration makes them: the paper's form and its code's, without and with a judge."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.online_run import write_online_config
from support.recipe_run import metrics, run_method

from llmrl.rewards.scoring import Scorer
from llmrl.trainers.rlsp import RLSPConfig

JUDGES = '''
def effort(completions, grade=0.6):
    """Everybody tries equally hard."""
    return [grade] * len(completions)

async def brevity(completions, prompts):
    return [1 / (1 + len(said.split())) for said in completions]
'''


@pytest.fixture
def judge(tmp_path: Path) -> str:
    (tmp_path / "judge.py").write_text(JUDGES)
    return f"{tmp_path / 'judge.py'}:effort"


def rlsp(**settings: Any) -> RLSPConfig:
    return RLSPConfig(model_name_or_path="starter", output_dir="unused", dataset_name="unused", **settings)


def total(config: RLSPConfig, text: str, tokens: int = 1) -> float:
    scorer = Scorer(config.reward_keys(), lambda said: None)
    try:
        (found,) = asyncio.run(scorer.score([""], [text], [list(range(tokens))], {"answer": ["10"]})).totals_S
    finally:
        scorer.close()
    assert found is not None
    return found


def reasoned(tokens: int, end: str) -> str:
    """A response that the authors' server takes to be so many tokens before `end`, a box."""
    return "x" * (4 * tokens) + end


# The page's T1: C 1000, alpha 0.8, judge 0.6. Each row: text, tokens of the length term, then R of Eq. 1, of the code,
# of the code with a judge. A box is behind what counts as length.
T1 = [
    (reasoned(500, r"\boxed{10}"), 500, 0.4, -1.0, -0.68),
    (reasoned(4000, r"\boxed{9}"), 4000, -0.05, -0.25, -0.08),
    (reasoned(4096, ""), 4096, -0.048828125, -0.744140625, -0.4753125),
]


@pytest.mark.parametrize("verifier", ["correct_number", "accuracy"])
@pytest.mark.parametrize(("text", "tokens", "equation_1", "code", "code_and_judge"), T1)
def test_the_pages_numbers(
    verifier: str, text: str, tokens: int, equation_1: float, code: float, code_and_judge: float, judge: str
) -> None:
    assert total(rlsp(verifier=verifier), text, tokens) == pytest.approx(equation_1, abs=1e-9)
    assert total(rlsp(verifier=verifier, form_of_reward="code"), text) == pytest.approx(code, abs=1e-9)
    with_judge = rlsp(verifier=verifier, form_of_reward="code", judge=judge)
    assert total(with_judge, text) == pytest.approx(code_and_judge, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, {"verifier": 0.8, "exploration": 0.2}),
        ({"judge": "j.py:f"}, {"verifier": 0.8, "judge": 0.2}),
        ({"form_of_reward": "code"}, {"verifier": 1, "boxed": 1, "exploration": 1}),
        (
            {"form_of_reward": "code", "judge": "j.py:f"},
            {"verifier": 0.8, "boxed": 0.8, "exploration": 0.8, "judge": 0.2},
        ),
    ],
)
def test_the_published_weights(settings: dict[str, Any], weights: dict[str, float]) -> None:
    made = rlsp(**settings).reward_keys().rewards
    assert {entry.label: entry.weight for entry in made} == pytest.approx(weights)


def test_the_papers_form_with_a_judge_has_no_reward_for_length(judge: str) -> None:
    config = rlsp(verifier="correct_number", judge={"function": judge, "options": {"grade": 0.5}})
    assert total(config, r"\boxed{10}", 5) == total(config, r"\boxed{10}", 5000) == pytest.approx(0.8 + 0.2 * 0.5)
    assert total(config, "no idea", 5) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("the answer is 10", -0.5), ("3+7 = 10", -0.5), (r"\boxed{10", -0.5), (r"\boxed{10} or \boxed{11}", 1.0)],
)
@pytest.mark.parametrize("verifier", ["correct_number", "accuracy"])
def test_in_the_codes_form_an_answer_without_a_box_is_none(verifier: str, answer: str, reward: float) -> None:
    """The length term is taken away: C / n with C = 1e-9."""
    config = rlsp(verifier=verifier, form_of_reward="code", length_constant=1e-9)
    assert total(config, answer) == pytest.approx(reward, abs=1e-6)
    assert total(rlsp(verifier=verifier, length_constant=1e-9), "the answer is 10") == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judge": {"function": "j.py:f", "weight": 0.3}}, "judge: .*its weight is 1 - alpha"),
        ({"judge": "j.py:f", "length_constant": 300}, "no reward for length: leave out length_constant"),
        ({"judge": "j.py:f", "rewards": ["correct_number"]}, "judge would be ignored"),
        ({"form_of_reward": "code", "alpha": 0.5}, "alpha has no meaning in the code's form without a judge"),
        ({"form_of_reward": "code", "verifier": "exact_match"}, "verifier must be correct_number or accuracy"),
        ({"alpha": 0.5, "rewards": ["correct_number"]}, "alpha would be ignored"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        rlsp(**settings)


def test_a_run_with_a_judge_whose_weight_grows(tmp_path: Path, judge: str) -> None:
    config = write_online_config(
        tmp_path, rewards=None, verifier="exact_match", alpha=1.0, alpha_end=0.5, max_steps=3, eval_rows=0,
        samples_per_prompt=2, judge=judge.replace("effort", "brevity"), critic_warmup=0,
    )  # fmt: skip
    assert run_method("rlsp", config) == 0
    assert [line["alpha"] for line in metrics(tmp_path / "run")] == [1.0, 0.75, 0.5]
    for line in metrics(tmp_path / "run"):
        parts = line["alpha"] * line["rewards/verifier/mean"] + (1 - line["alpha"]) * line["rewards/judge/mean"]
        assert line["reward"] == pytest.approx(parts)
    again = tmp_path / "again"
    assert run_method("rlsp", tmp_path / "run" / "config.yaml", "--output_dir", str(again), "--alpha", "0.5") == 0
    assert [line["alpha"] for line in metrics(again)] == [0.5, 0.5, 0.5]
    first = metrics(again)[0]
    assert first["reward"] == pytest.approx(0.5 * first["rewards/verifier/mean"] + 0.5 * first["rewards/judge/mean"])
