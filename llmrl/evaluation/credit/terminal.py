"""The credit map in a terminal: tokens in colours with their rewards under them; without colours the numbers stay."""

from collections.abc import Iterator, Mapping, Sequence

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from llmrl.data.steps import Segmenter
from llmrl.evaluation.credit.answer import Credit, Step
from llmrl.evaluation.credit.numbers import Pair, Scale, visible

INDENT = 11
LESS, MORE = (213, 94, 0), (0, 114, 178)
"""Okabe and Ito's vermilion and blue: told apart with any common colour blindness."""


def show(pairs: Sequence[Pair], numbers: Mapping[str, float], split: Segmenter, console: Console) -> None:
    """Print each pair, the two answers above each other, step by step, and the summary of all."""
    scale = Scale.of(pairs)
    for pair in pairs:
        console.print(Text(f"\nrow {pair.row}: {' '.join(visible(pair.prompt).split())}", "bold"))
        for name, credit in pair.answers:
            _show_answer(name, credit, scale, split, console)
    console.print(Text(_summary(numbers)))


def _summary(numbers: Mapping[str, float]) -> str:
    low, high = numbers["accuracy_interval_low"], numbers["accuracy_interval_high"]
    shown = {key: f"{value:+.3g}" for key, value in numbers.items()}
    return (
        f"\nmean over {numbers['n']:.0f} of the data's rows: reward of chosen {shown['rewards/chosen']}, of rejected "
        f"{shown['rewards/rejected']}, margin {shown['rewards/margins']}; chosen above rejected in "
        f"{numbers['rewards/accuracies']:.0%} ({low:.0%} to {high:.0%})\n"
        f"per token: chosen {shown['rewards/chosen_per_token']}, rejected {shown['rewards/rejected_per_token']}, "
        f"reference drift {shown['reference_drift']} (what a token drawn from the reference loses on average)"
    )


def _show_answer(name: str, credit: Credit, scale: Scale, split: Segmenter, console: Console) -> None:
    steps = credit.steps(split)
    low = scale.lowest(steps)
    console.print(Text(f"{name}: reward {scale.text(credit.total)} over {len(credit.spans)} tokens", "bold"))
    for number, step in enumerate(steps):
        for line in _step_lines(number, step, credit, scale, number == low, console.width):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _step_lines(number: int, step: Step, credit: Credit, scale: Scale, is_lowest: bool, width: int) -> Iterator[Text]:
    """Lines in pairs: tokens, and under each its reward."""
    head = f"{number + 1}{'◂' if is_lowest else ' '}{scale.text(step.reward):>8} "
    tokens, rewards = Text(f"{head:<{INDENT}}", "bold" if is_lowest else ""), Text(" " * INDENT, "dim")
    for index in map(int, step.tokens):
        reward = float(credit.rewards[index])
        text, value = visible(credit.token_text(index)), scale.text(reward)
        cell = max(Text(text).cell_len, len(value)) + 1
        if tokens.cell_len > INDENT and tokens.cell_len + cell > max(width, INDENT + cell):
            yield _stripped(tokens)
            yield _stripped(rewards)
            tokens, rewards = Text(" " * INDENT), Text(" " * INDENT, "dim")
        tokens.append(text, _colour(reward, scale))
        tokens.append(" " * (cell - Text(text).cell_len))
        rewards.append(f"{value:<{cell}}")
    yield _stripped(tokens)
    yield _stripped(rewards)


def _colour(reward: float, scale: Scale) -> Style:
    """Black on a shade of blue or vermilion, the paler the nearer the reward is to 0."""
    strength = scale.strength(reward)
    if strength < 0.05:
        return Style()
    red, green, blue = (round(255 + (part - 255) * strength) for part in (LESS if reward < 0 else MORE))
    light = 0.3 * red + 0.6 * green + 0.1 * blue > 130
    return Style(color="black" if light else "white", bgcolor=Color.from_rgb(red, green, blue).name)


def _stripped(line: Text) -> Text:
    line.rstrip()
    return line
