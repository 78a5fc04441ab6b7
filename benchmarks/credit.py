"""Which line of a worked answer is wrong, by the credit that a DPO policy gives it: answers with one planted error.

    python benchmarks/credit.py                      the starter and SmolLM2, trained first where they are not there
    python benchmarks/credit.py --policies starter   about three minutes
    python benchmarks/credit.py --quick              a few answers

What has been measured stays in the file of measurements and is not measured again, but with --again. The answers are
made by data/arithmetic/generate.py for problems of its test split, which no policy was trained on.
"""

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import document
import dpo_policies
import studies

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = studies.RESULTS / "credit.json"
SCORES = {"reward": "implicit reward", "logprob": "log pi", "reference_logprob": "log pi_ref"}
KINDS = {"follow": "follow from the error", "stand": "as in the right answer"}
PER_LEVEL = {"starter": 80, "smollm2": 24}
"""Answers of each of the five kinds. There are few more problems in the split that are all different."""


@dataclass(frozen=True)
class Planted:
    """A question, its right answer and one with an error in line `step` (from 0)."""

    prompt: list[dict[str, str]]
    right: str
    wrong: str
    step: int
    error: str


def main() -> None:
    arguments = studies.parser(__doc__ or "", "two answers of each kind of problem", MEASUREMENTS).parse_args()
    results = studies.Results(None if arguments.quick else arguments.measurements)
    for name in arguments.policies:
        if results.lacking(name, KINDS, arguments.again):  # both are scored together
            final = dpo_policies.policy(name, arguments.folder)
            for kind, one in measured(name, final, 2 if arguments.quick else PER_LEVEL[name]).items():
                results.add(name, kind, one)
    text = report(results)
    if not arguments.quick:
        document.write_section(arguments.document, "credit", text)
    print(text)


# -- answers with one error ----------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "data/arithmetic/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def planted(kind: str, per_level: int) -> list[Planted]:
    """Answers to held-out problems. `follow`: the lines after the wrong one follow correctly from its result, as in the
    pairs that DPO is trained on; `stand`: they are those of the right answer."""
    found = []
    for row in generator().rows("pairs", "test", per_level):
        right, wrong = (row[side][0]["content"] for side in ("chosen", "rejected"))
        step = row["wrong_step"] - 1
        if kind == "stand":
            lines = right.split("\n")
            lines[step] = wrong.split("\n")[step]
            wrong = "\n".join(lines)
        found.append(Planted(row["prompt"], right, wrong, step, row["error"]))
    return found


def wrong_characters(right: str, wrong: str) -> list[bool]:
    """Of each character of a wrong line, whether it is not in the right one; where one was left out, the next."""
    flags = [False] * len(wrong)
    for tag, _, _, start, end in difflib.SequenceMatcher(None, right, wrong, autojunk=False).get_opcodes():
        if tag != "equal":
            flags[start : max(end, start + 1)] = [True] * (max(end, start + 1) - start)
    return flags[: len(wrong)] if any(flags[: len(wrong)]) else [True] * len(wrong)


# -- measuring -----------------------------------------------------------------------------------------------------


def measured(name: str, final: Path, per_level: int) -> dict[str, studies.Measured]:
    """For each kind of answer how often each score's lowest line is the wrong one, and the AUROC of its tokens."""
    from llmrl.evaluation.credit.model import CreditModel, Question
    from llmrl.evaluation.progress import Ticker

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    conditions = studies.conditions()
    model = CreditModel.load(str(final), dpo_policies.POLICIES[name].reference, say=say)
    cases = {kind: planted(kind, per_level) for kind in KINDS}
    # One question a problem, with all its answers: what they share is computed once.
    questions = [
        Question(first.prompt, (first.right, first.wrong, *([] if first.wrong == second.wrong else [second.wrong])))
        for first, second in zip(cases["follow"], cases["stand"], strict=True)
    ]
    credits = model.credits(questions, Ticker(say, f"{name}: answers scored"))
    found = {}
    for kind, place in (("follow", 1), ("stand", -1)):
        answers = [judged(case, each[place]) for case, each in zip(cases[kind], credits, strict=True)]
        found[kind] = {
            "answers": answers,
            "right_above_wrong": [each[0].total > each[place].total for each in credits],
            "conditions": conditions,
        }
    return found


def judged(case: Planted, credit: Any) -> dict[str, Any]:
    """One answer: its number of lines, and for each score whether its lowest line is the wrong one, and the AUROC."""
    import torch

    from llmrl.objectives.implicit_reward import auroc

    steps = credit.steps()
    lines = case.right.split("\n"), case.wrong.split("\n")
    assert len(steps) == len(lines[1]), (case.wrong, [step.text for step in steps])
    start = sum(len(line) + 1 for line in lines[1][: case.step])
    at = {start + i for i, flag in enumerate(wrong_characters(lines[0][case.step], lines[1][case.step])) if flag}
    inside = torch.tensor([bool(at & set(range(*span))) for span in credit.spans])
    tokens = {"reward": credit.rewards, "logprob": credit.logprobs, "reference_logprob": credit.reference_logprobs}
    result: dict[str, Any] = {"lines": len(steps), "error": case.error}
    for score in SCORES:
        lowest = min(range(len(steps)), key=lambda k: getattr(steps[k], score))
        result[score] = {
            "found": lowest == case.step,
            "auroc": round(auroc(torch.from_numpy(tokens[score].copy()), inside), 4),
        }
    return result


# -- the table -----------------------------------------------------------------------------------------------------

EXPLANATION = """\
Right worked answers to held-out problems (all five kinds in equal parts) in which one line was made wrong: a result off
by one or by ten, with two digits swapped, a carry forgotten, or an operand misread. *Later lines* either follow from
the error, as in the pairs that the policies were trained on, or stand as in the right answer, so that a later one does
not follow from the wrong one. *Found* is how often the line with the lowest sum is the wrong one, with Wilson's 95%
interval; a token that reaches into the next line counts for the one that it ends. *Chance* is that of a line drawn by
lot. The sums are those of the implicit reward, beta (log pi - log pi_ref), and beside it of log pi and log pi_ref
alone: how surprising a line is to the policy, and to the model before DPO. *AUROC* is the probability, within an
answer, that a wrong token (one whose characters are not in the right line) is lower than another token, equal ones
counted half; its mean over the answers with a 95% interval; 0.5 is chance."""


def report(results: studies.Results) -> str:
    """The section of the document."""
    from llmrl.evaluation.intervals import mean_interval

    def shown(values: Sequence[float], percent: bool) -> str:
        mean, low, high = mean_interval([float(value) for value in values])
        return f"{mean:.0%} ({low:.0%} to {high:.0%})" if percent else f"{mean:.2f} ({low:.2f} to {high:.2f})"

    rows = {True: list[list[str]](), False: list[list[str]]()}
    measured = [name for name in dpo_policies.POLICIES if name in results.of]
    for name in measured:
        for kind, later in KINDS.items():
            if (one := results.of[name].get(kind)) is None:
                continue
            answers = one["answers"]
            head = [f"{dpo_policies.POLICIES[name].title}; later lines {later}", str(len(answers))]
            chance = sum(1 / answer["lines"] for answer in answers) / len(answers)
            found = [shown([answer[score]["found"] for answer in answers], True) for score in SCORES]
            rows[True].append([*head, f"{chance:.0%}", *found, shown(one["right_above_wrong"], True)])
            rows[False].append([*head, *(shown([a[score]["auroc"] for a in answers], False) for score in SCORES)])
    conditions = studies.conditions_in_words(results, "credit")
    first = [
        "policy",
        "answers",
        "chance",
        *(f"found by {title}" for title in SCORES.values()),
        "right answer preferred",
    ]
    second = ["policy", "answers", *(f"AUROC of {title}" for title in SCORES.values())]
    trained = "\n".join(
        f"- {dpo_policies.POLICIES[name].title}: `accelerate launch {' '.join(dpo_policies.command(name, 'DIR'))}`"
        for name in measured
    )
    return "\n\n".join(
        ["## Credit: which line is wrong", conditions, EXPLANATION, document.table(first, rows[True]),
         document.table(second, rows[False]), f"The policies:\n\n{trained}"]
    )  # fmt: skip


if __name__ == "__main__":
    main()
