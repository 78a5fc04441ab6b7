"""Beam search on a DPO policy: accuracy and length of its answers against the width of the beam.

python benchmarks/beam_width.py                    the starter and SmolLM2, trained first where they are not there
python benchmarks/beam_width.py --policies starter
python benchmarks/beam_width.py --quick            widths 1 and 2, eight problems
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import document
import dpo_policies
import measuring
import pictures

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = Path(__file__).resolve().parent / "results" / "beam_width.json"
PICTURE = ROOT / "docs" / "images" / "beam_width.svg"
WIDTHS = (1, 2, 5, 10)
BY = {"likelihood": "likelihood", "reward": "implicit reward"}
PROBLEMS = {"starter": 400, "smollm2": 50}
MAX_NEW_TOKENS = 80
ROWS = 640
"""Beams under way at once."""
Measurements = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dpo_policies.POLICIES)
    parser.add_argument("--policies", nargs="+", default=known, choices=known, help="default: all")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--folder", type=Path, default=dpo_policies.FOLDER, help="where policies are, or are trained")
    parser.add_argument("--quick", action="store_true", help="widths 1 and 2, eight problems")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file of measurements")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="every measurement, as JSON")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the table goes")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args()
    resumes = arguments.resume and arguments.measurements.exists()
    done: Measurements = json.loads(arguments.measurements.read_text()) if resumes else {}
    for name in arguments.policies:
        widths = [1, 2] if arguments.quick else arguments.widths
        if not (missing := [(by, width) for width in widths for by in BY if label(name, by, width) not in done]):
            continue
        study = Study(name, arguments.folder, 8 if arguments.quick else PROBLEMS[name])
        for by, width in missing:
            done[label(name, by, width)] = one = study.measured(by, width)
            arguments.measurements.parent.mkdir(parents=True, exist_ok=True)
            arguments.measurements.write_text(json.dumps(done) + "\n")
            print(f"{label(name, by, width)}: {fmean(one['correct']):.3f}", file=sys.stderr, flush=True)
    text = report(done, os.path.relpath(arguments.picture, arguments.document.parent))
    document.write_section(arguments.document, "beam_width", text)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(picture(done))
    print(text)


def label(name: str, by: str, width: int) -> str:
    return f"{name}, {by}, width {width}"


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

    def measured(self, by: str, width: int) -> dict[str, Any]:
        """Every problem answered: whether rightly, how long, and what policy and reference say of the answer."""
        from llmrl.evaluation.progress import Ticker
        from llmrl.evaluation.search import BeamSearch
        from llmrl.learner.sequences import completion
        from llmrl.rewards.answers import is_correct

        implicit, load = self.model.implicit, os.getloadavg()[0]
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
        found = search(prompts, MAX_NEW_TOKENS, Ticker(self.say, f"{label(self.name, by, width)}: problems answered"))
        groups = [(completion(p, f.token_ids),) for p, f in zip(prompts, found, strict=True)]
        both = [scored[0] for scored in implicit.logprobs(groups)]
        texts = [self.model.tokenizer.decode(f.token_ids, skip_special_tokens=True) for f in found]
        return {
            "correct": [is_correct(text, p["answer"]) for text, p in zip(texts, self.problems, strict=True)],
            "lengths": [len(f.token_ids) for f in found],
            "ended": [f.ended for f in found],
            "logprobs": [round(float(mine.sum()), 5) for mine, _ in both],
            "rewards": [round(implicit.beta * float((mine - theirs).sum()), 5) for mine, theirs in both],
            "load": load,
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
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


def report(done: Measurements, picture_path: str) -> str:
    """The section of the document."""
    loads, threads = [one["load"] for one in done.values()], sorted({one["threads"] for one in done.values()})
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}; threads: "
        f"{' or '.join(map(str, threads))}; load average {min(loads):.1f} to {max(loads):.1f}. "
        f"{measuring.versions('torch', 'transformers')}. The policies are those of the section on credit."
    )
    rows = [_row(name, by, width, done) for name, by, width in _measured(done)]
    shown = f"![accuracy and length against width]({picture_path})"
    return "\n\n".join(
        ["## Search: the width of the beam", conditions, EXPLANATION, document.table(HEADER, rows), shown]
    )


def _measured(done: Measurements) -> list[tuple[str, str, int]]:
    """(policy, by, width) of what has been measured, in the order of the table."""
    found = []
    for name in dpo_policies.POLICIES:
        for by in BY:
            prefix = f"{name}, {by}, width "
            found += [
                (name, by, width) for width in sorted(int(k.removeprefix(prefix)) for k in done if k.startswith(prefix))
            ]
    return found


def _row(name: str, by: str, width: int, done: Measurements) -> list[str]:
    from llmrl.evaluation.intervals import mean_interval, paired_difference_interval

    one, greedy = done[label(name, by, width)], done.get(label(name, "likelihood", 1))
    accuracy, low, high = mean_interval([float(right) for right in one["correct"]])
    gain = "-"
    if greedy is not None and one is not greedy:
        at, to = paired_difference_interval(one["correct"], greedy["correct"])
        gain = f"{100 * (accuracy - fmean(greedy['correct'])):+.1f} ({100 * at:+.1f} to {100 * to:+.1f})"
    return [
        dpo_policies.POLICIES[name].title,
        BY[by],
        str(width),
        str(len(one["correct"])),
        f"{accuracy:.1%} ({low:.0%} to {high:.0%})",
        gain,
        f"{fmean(one['lengths']):.1f}",
        f"{fmean(one['ended']):.0%}",
        f"{fmean(one['logprobs']):.2f}",
        f"{fmean(one['rewards']):+.3f}",
    ]


def picture(done: Measurements) -> str:
    """Accuracy with its interval, and mean length, against the width: a line for each policy and score."""
    from llmrl.evaluation.intervals import mean_interval

    accuracy, length = pictures.Panel("accuracy, %"), pictures.Panel("mean length, tokens")
    for name in dpo_policies.POLICIES:
        for by in BY:
            widths = [width for n, b, width in _measured(done) if (n, b) == (name, by)]
            points, lengths = [], []
            for width in widths:
                one = done[label(name, by, width)]
                mean, low, high = mean_interval([float(right) for right in one["correct"]])
                points.append((width, 100 * mean, 100 * low, 100 * high))
                lengths.append((width, *mean_interval([float(n) for n in one["lengths"]])))
            if points:
                accuracy.lines[f"{name}, by {BY[by]}"] = points
                length.lines[f"{name}, by {BY[by]}"] = lengths
    return pictures.drawn([accuracy, length], "width of the beam")


if __name__ == "__main__":
    main()
