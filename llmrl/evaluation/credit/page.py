"""The credit map as one self-contained HTML page.

Invariants: every word that comes from data or models is escaped; the page forbids scripts and anything from the network
by its own policy as well; what colours and tooltips say stands in tables, too.
"""

from collections.abc import Mapping, Sequence
from html import escape

from llmrl.data.steps import Segmenter
from llmrl.evaluation.credit.answer import Credit, Step
from llmrl.evaluation.credit.numbers import Pair, Scale, visible
from llmrl.runs.report import POLICY
from llmrl.runs.report_style import STYLE

MAP_STYLE = """
.legend { display: flex; align-items: center; gap: .7rem; color: var(--soft); font-size: .85rem; margin: 1rem 0 0; }
.legend i { width: 13rem; height: .9rem; border-radius: 4px; background: linear-gradient(90deg,
  rgba(213,94,0,.75), transparent, rgba(0,114,178,.75)); border: 1px solid var(--faint); }
.credit { padding: .9rem 1rem; margin-bottom: .9rem; }
.credit .prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem; font-weight: 550; }
.credit table > thead th.number:first-child { min-width: 6.6rem; }
.credit h3 { font-size: .85rem; margin: .9rem 0 .2rem; } .credit h3 .interval { font-weight: 400; color: var(--soft); }
.credit td.tokens { font: 13.5px/1.9 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; width: 100%; }
.credit td.tokens span { padding: .16rem 0; border-radius: 3px; box-shadow: inset 1px 0 var(--faint); }
.credit tr.lowest td { background: var(--mark); } .credit tr.lowest td.number:first-child { font-weight: 700; }
.credit details { padding: .2rem 0 0; margin: .4rem 0 0; } .credit summary { font-size: .82rem; color: var(--soft); }
"""
TITLES = {
    "rewards/chosen": "chosen, mean reward",
    "rewards/rejected": "rejected, mean reward",
    "rewards/margins": "margin",
    "rewards/chosen_per_token": "chosen, mean per token",
    "rewards/rejected_per_token": "rejected, mean per token",
    "reference_drift": "reference drift, mean per token",
}
HELP = (
    "Each token is coloured by its implicit reward beta (log pi - log pi_ref): blue, the policy says it more often "
    "than its reference; orange, less often. Point at a token for its numbers. The sums of the steps add up to "
    "the answer's reward, which is what DPO compares; the lowest is marked where it is below 0. A 0 is what rounds "
    "to 0 at the digits that suit the largest reward. Rewards are known up to a potential of the state: compare tokens "
    "of two answers that have been the same so far, rather than tokens far apart."
)


def page(pairs: Sequence[Pair], facts: Mapping[str, str], numbers: Mapping[str, float], split: Segmenter) -> str:
    """The page. facts: what it was made of, shown at its top; numbers: `summary`; split: what divides answers
    into steps."""
    scale = Scale.of(pairs)
    cards = "".join(_card(pair, scale, split) for pair in pairs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Credit map</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{MAP_STYLE}</style></head><body><main><header><h1>Credit map</h1></header>"
        f"{_facts({**facts, **_numbers(numbers)})}<p>{escape(HELP)}</p>"
        f'<p class="legend">{scale.text(-scale.full)}<i></i>{scale.text(scale.full)} and beyond</p>'
        f"<h2>Pairs</h2>{cards}</main></body></html>\n"
    )


def _numbers(numbers: Mapping[str, float]) -> dict[str, str]:
    low, high = numbers["accuracy_interval_low"], numbers["accuracy_interval_high"]
    accuracy = f"{numbers['rewards/accuracies']:.0%} ({low:.0%} to {high:.0%}, n = {numbers['n']:.0f})"
    return {**{title: f"{numbers[key]:+.3g}" for key, title in TITLES.items()}, "chosen above rejected": accuracy}


def _facts(facts: Mapping[str, str]) -> str:
    entries = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{entries}</dl>'


def _card(pair: Pair, scale: Scale, split: Segmenter) -> str:
    answers = "".join(_answer(name, credit, scale, split) for name, credit in pair.answers)
    prompt = f'<p class="prompt"><span class="interval">row {pair.row}</span> {escape(pair.prompt)}</p>'
    return f'<section class="card credit">{prompt}{answers}</section>'


def _answer(name: str, credit: Credit, scale: Scale, split: Segmenter) -> str:
    steps = credit.steps(split)
    low = scale.lowest(steps)
    rows = "".join(_step(number, step, credit, scale, number == low) for number, step in enumerate(steps))
    head = '<th class="number">step</th><th>tokens</th><th class="number">sum</th><th class="number">per token</th>'
    total = f'<span class="interval">reward {scale.text(credit.total)} over {len(credit.spans)} tokens</span>'
    return (
        f'<h3>{escape(name)} {total}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_all_tokens(credit, scale)}"
    )


def _step(number: int, step: Step, credit: Credit, scale: Scale, is_lowest: bool) -> str:
    tokens = "".join(_token(credit, int(index), scale) for index in step.tokens)
    mark, kind = (" ◂ lowest", ' class="lowest"') if is_lowest else ("", "")
    return (
        f'<tr{kind}><td class="number">{number + 1}{mark}</td><td class="tokens">{tokens}</td>'
        f'<td class="number">{scale.text(step.reward)}</td><td class="number">{scale.text(step.mean)}</td></tr>'
    )


def _token(credit: Credit, index: int, scale: Scale) -> str:
    reward = float(credit.rewards[index])
    colour = f"rgba({'213,94,0' if reward < 0 else '0,114,178'},{0.75 * scale.strength(reward):.2f})"
    hint = (
        f"reward {scale.text(reward)} · log pi {credit.logprobs[index]:.3f} · log pi_ref "
        f"{credit.reference_logprobs[index]:.3f} · so far {scale.text(float(credit.cumulative[index]))}"
    )
    text = escape(visible(_text(credit, index)))
    return f'<span style="background:{colour}" title="{hint}">{text}</span>'


def _all_tokens(credit: Credit, scale: Scale) -> str:
    head = "".join(
        f'<th class="number">{title}</th>' for title in ("token", "id", "reward", "log pi", "log pi_ref", "so far")
    )
    rows = "".join(
        f'<tr><td class="number">{escape(visible(_text(credit, i)))}</td><td class="number">{token}</td>'
        f'<td class="number">{scale.text(float(reward))}</td><td class="number">{mine:.4f}</td>'
        f'<td class="number">{theirs:.4f}</td><td class="number">{scale.text(float(sum_))}</td></tr>'
        for i, (token, reward, mine, theirs, sum_) in enumerate(
            zip(
                credit.token_ids,
                credit.rewards,
                credit.logprobs,
                credit.reference_logprobs,
                credit.cumulative,
                strict=True,
            )
        )
    )
    return (
        f'<details><summary>every token in numbers</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _text(credit: Credit, index: int) -> str:
    """A token's characters; of several that share a character the first has it, the others show that they go on."""
    shared = index > 0 and credit.spans[index] == credit.spans[index - 1]
    return "…" if shared else credit.token_text(index)
