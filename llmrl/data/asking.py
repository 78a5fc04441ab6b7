"""Prompts as a model is asked them.

Invariant: a prompt's ids are those of the chat template with its generation prompt (of the plain text behind what the
tokenizer puts before every text, where it has no template), so a model is asked as it was trained.
"""

from collections.abc import Sequence
from typing import Any

from llmrl.data.columns import MEND, read_extras, read_text_or_dialogue
from llmrl.data.faults import RowFault, refusal
from llmrl.data.formats import Text
from llmrl.data.tokenization import Encoder, check_chat_template


class Asking:
    """Reads and renders the prompts of one source, which `where` names in messages."""

    def __init__(self, encoder: Encoder, where: str) -> None:
        self.encoder, self.where = encoder, where
        self.has_template = bool(encoder.tokenizer.chat_template)

    def read(self, row: dict[str, Any], column: str = "prompt") -> Text:
        """What a row asks: messages where the tokenizer has a chat template, for which a text is one user turn.

        Raises RowFault, and RefusedError for messages without a template.
        """
        prompt = read_text_or_dialogue(row[column], column)
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise RowFault(column, f"empty; {MEND}")
        if isinstance(prompt, list):
            check_chat_template(self.encoder.tokenizer, self.where)
        if self.has_template:
            read_extras(row)
            return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt

    def ids(self, prompts: Sequence[Text], rows: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[list[int]]:
        """Token ids of prompts that were read, each with what its row gives to the chat template.

        Raises RefusedError naming the rows (`numbers`) that the template refuses.
        """
        if not self.has_template:
            plain = self.encoder.ids([prompt for prompt in prompts if isinstance(prompt, str)])
            return [self.encoder.start_ids + ids for ids in plain]
        dialogues = [prompt for prompt in prompts if isinstance(prompt, list)]
        texts = self.encoder.render([(d, True, read_extras(row)) for d, row in zip(dialogues, rows, strict=True)])
        faults = {number: text for number, text in zip(numbers, texts, strict=True) if isinstance(text, RowFault)}
        if faults:
            raise refusal(self.where, faults)
        return self.encoder.ids([str(text) for text in texts])
