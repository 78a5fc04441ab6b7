"""Beam search on a DPO policy: accuracy and length of its answers against the width of the beam.

python benchmarks/beam_width.py                    the starter and SmolLM2, trained first where they are not there
python benchmarks/beam_width.py --policies starter
python benchmarks/beam_width.py --quick            widths 1 and 2, eight problems

What has been measured stays in the file of measurements and is not measured again, but with --again.
"""

import os
import sys
from pathlib import Path
from statistics import fmean

import document
import dpo_policies
import pictures
import studies

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = studies.RESULTS / "beam_width.json"
PICTURE = ROOT / "docs" / "images" / "beam_width.svg"
WIDTHS = (1, 2, 5, 10)
BY = {"likelihood": "likelihood", "reward": "implicit reward"}
PROBLEMS = {"starter": 400, "smollm2": 50}
MAX_NEW_TOKENS = 80
ROWS = 640
"""Beams under way at once."""


def main() -> None:
    parser = studies.parser(__doc__ or "", "widths 1 and 2, eight problems", MEASUREMENTS)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args()
    results = studies.Results(None if arguments.quick else arguments.measurements)
    searches = [(by, width) for width in ([1, 2] if arguments.quick else arguments.widths) for by in BY]
    for name in arguments.policies:
        missing = results.lacking(name, [label(*search) for search in searches], arguments.again)
        study = Study(name, arguments.folder, 8 if arguments.quick else PROBLEMS[name]) if missing else None
        for search in searches:
            if study is not None and label(*search) in missing:
                one = study.measured(*search)
                results.add(name, label(*search), one)
                print(f"{name}, {label(*search)}: {fmean(one['correct']):.3f}", file=sys.stderr, flush=True)
    text = report(results, os.path.relpath(arguments.picture, arguments.document.parent))
    if not arguments.quick:
        document.write_section(arguments.document, "beam_width", text)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        arguments.picture.write_text(picture(results))
    print(text)


def label(by: str, width: int) -> str:
    return f"{by}, width {width}"


# -- measuring -----------------------------------------------------------------------------------------------------


class Study:
    """A policy with its reference, and held-out problems for it."""

    def __init__(self, name: str, folder: Path, num_problems: int) -> None:
        from llmrl.config import TaskEvaluationKeys
        from llmrl.data.problems import prepare_problems
        from llmrl.evaluation.credit.model import CreditModel

        final = dpo_policies.policy(name, folder)
        self.name = name
        self.model = CreditModel.load(str(final), dpo_policies.POLICIES[name].reference, say=self.say)
        keys = TaskEvaluationKeys(
            dataset_name=str(ROOT / "data/arithmetic/problems"), dataset_test_split="test", limit=num_problems
        )
        self.problems = list(prepare_problems(keys, self.model.tokenizer, self.say))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def measured(self, by: str, width: int) -> studies.Measured:
        """Every problem answered: whether rightly, how long, and what policy and reference say of the answer."""
        from llmrl.evaluation.progress import Ticker
        from llmrl.evaluation.search import BeamSearch
        from llmrl.learner.sequences import completion
        from llmrl.rewards.answers import is_correct

        implicit, conditions = self.model.implicit, studies.conditions()
        reference = None if implicit.reference is None else implicit.reference.causal_lm
        search = BeamSearch(
            implicit.policy.causal_lm,
            width,
            self.model.encoder.stop_ids,
            by=by,
            reference=reference,
            prompts_per_batch=max(1, ROWS // width),
        )
        prompts = [problem["prompt_ids"] for problem in self.problems]
        found = search(prompts, MAX_NEW_TOKENS, Ticker(self.say, f"{self.name}, {label(by, width)}: problems answered"))
        groups = [(completion(p, f.token_ids),) for p, f in zip(prompts, found, strict=True)]
        both = [scored[0] for scored in implicit.logprobs(groups)]
        texts = [self.model.tokenizer.decode(f.token_ids, skip_special_tokens=True) for f in found]
        return {
            "by": by,
            "width": width,
            "correct": [is_correct(text, p["answer"]) for text, p in zip(texts, self.problems, strict=True)],
            "lengths": [len(f.token_ids) for f in found],
            "ended": [f.ended for f in found],
            "logprobs": [round(float(mine.sum()), 5) for mine, _ in both],
            "rewards": [round(implicit.beta * float((mine - theirs).sum()), 5) for mine, theirs in both],
            "conditions": conditions,
        }


# -- the table and the picture -------------------------------------------------------------------------------------

EXPLANATION = f"""\
Held-out problems (data/arithmetic/problems, test, all five kinds), answered by beam search on the policy: by
likelihood, the sum of log pi, which is search by implicit reward kept to the reference (arXiv 2404.12358, Eqs. 12-13);
and by the implicit reward alone, beta (log pi - log pi_ref), among tokens that are at least a tenth as likely to the
policy as its likeliest. Width 1 by likelihood is greedy decoding. At most {MAX_NEW_TOKENS} new tokens. Accuracy is that
of the answer's final number (the reward `correct_number`), with Wilson's 95% interval; the gain over greedy decoding is
on the same problems, with Newcombe's interval for paired shares; length is in tokens, the one that ends the answer
included; log pi and reward are means of the answers' sums."""
HEADER = ["policy", "by", "width", "problems", "accuracy", "gain over greedy, points", "mean length", "ended",
          "log pi", "implicit reward"]  # fmt: skip


def report(results: studies.Results, picture_path: str) -> str:
    """The section of the document."""
    conditions = studies.conditions_in_words(results, "beam_width")
    rows = [_row(name, one, results) for name, one in _measured(results)]
    shown = f"![accuracy and length against width]({picture_path})"
    return "\n\n".join(
        [
            "## Search: the width of the beam",
            f"{conditions} The policies are those of the section on credit.",
            EXPLANATION,
            document.table(HEADER, rows),
            shown,
        ]
    )


def _measured(results: studies.Results) -> list[tuple[str, studies.Measured]]:
    """What has been measured of each policy, in the order of the table."""
    order = list(BY)
    return [
        (name, one)
        for name in dpo_policies.POLICIES
        for one in sorted(results.of.get(name, {}).values(), key=lambda m: (order.index(m["by"]), m["width"]))
    ]


def _row(name: str, one: studies.Measured, results: studies.Results) -> list[str]:
    from llmrl.evaluation.intervals import mean_interval, paired_difference_interval

    greedy = results.of[name].get(label("likelihood", 1))
    accuracy, low, high = mean_interval([float(right) for right in one["correct"]])
    gain = "-"
    if greedy is not None and one is not greedy:
        at, to = paired_difference_interval(one["correct"], greedy["correct"])
        gain = f"{100 * (accuracy - fmean(greedy['correct'])):+.1f} ({100 * at:+.1f} to {100 * to:+.1f})"
    return [
        dpo_policies.POLICIES[name].title,
        BY[one["by"]],
        str(one["width"]),
        str(len(one["correct"])),
        f"{accuracy:.1%} ({low:.0%} to {high:.0%})",
        gain,
        f"{fmean(one['lengths']):.1f}",
        f"{fmean(one['ended']):.0%}",
        f"{fmean(one['logprobs']):.2f}",
        f"{fmean(one['rewards']):+.3f}",
    ]


def picture(results: studies.Results) -> str:
    """Accuracy with its interval, and mean length, against the width: a line for each policy and score."""
    from llmrl.evaluation.intervals import mean_interval

    accuracy, length = pictures.Panel("accuracy, %"), pictures.Panel("mean length, tokens")
    for name, one in _measured(results):
        line = f"{name}, by {BY[one['by']]}"
        mean, low, high = mean_interval([float(right) for right in one["correct"]])
        accuracy.lines.setdefault(line, []).append((one["width"], 100 * mean, 100 * low, 100 * high))
        length.lines.setdefault(line, []).append((one["width"], *mean_interval([float(n) for n in one["lengths"]])))
    return pictures.drawn([accuracy, length], "width of the beam", "95% intervals")


if __name__ == "__main__":
    main()
