"""How well a reward model tells the preferred from the dispreferred answer on held-out pairs."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from llmrl.evaluation.intervals import wilson_interval
from llmrl.evaluation.progress import Ticker
from llmrl.rewards.model import score


def pair_metrics(
    model: nn.Module,
    pairs: Iterable[dict[str, Any]],
    pad_token_id: int,
    rows: int = 16,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """How well a reward model tells the chosen from the rejected sequence (columns `chosen_ids`, `rejected_ids`).

    `loss` (Bradley-Terry, a pair), `accuracy` with its 95% Wilson interval, `margin` (mean difference), `n`. A tie is
    half a success. `say` hears now and then how far it is.
    """
    pairs = list(pairs)
    sequences = [ids for p in pairs for ids in (p["chosen_ids"], p["rejected_ids"])]
    both = score(model, sequences, pad_token_id, rows, Ticker(say, "held-out answers scored"))
    margins = both[0::2] - both[1::2]
    n = len(pairs)
    right = float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())
    low, high = wilson_interval(right, n)
    return {
        "loss": float(-nn.functional.logsigmoid(margins).mean()),
        "accuracy": right / n,
        "accuracy_interval_low": low,
        "accuracy_interval_high": high,
        "margin": float(margins.mean()),
        "n": float(n),
    }
