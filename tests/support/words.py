"""A small real tokenizer for tests that train."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FIRST = ["red", "green", "blue", "one", "two", "three"]
WORDS = [*FIRST, "four", "five", "six", "seven", "the", "a", "cat", "dog", "sees", "likes"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a chat template; `<|end|>` ends a turn and is the EOS."""
    special = ["<pad>", "<unk>", "<|end|>", "<|start|>", "user", "assistant", "system"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
