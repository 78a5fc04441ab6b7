"""What is said when something is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.pairs import keys
from transformers import PreTrainedTokenizerBase

from llmrl.errors import RefusedError


def refusal(call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The message with which the call is refused."""
    with pytest.raises(RefusedError) as refused:
        call(*arguments, **named)
    return str(refused.value)


def file_refusal(
    prepare: Callable[..., object],
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    rows: list[dict[str, Any]],
    **changed: Any,
) -> str:
    """The message with which a `prepare_` function of `llmrl.data` refuses a file of these rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return refusal(prepare, keys(dataset_name=str(file), **changed), tokenizer, lambda text: None)
