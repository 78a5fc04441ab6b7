"""Chat-template families with small tokenizers of their kinds, trained on the spot.

The templates are those that the installed `trl` carries, and four written here; nothing is fetched. The tokenizers have
each family's special tokens, with what is peculiar about them: Phi-3's swallow the blanks behind them, Gemma's text is
cut as SentencePiece does it, Mistral's turns have no special token in front and every text gets a blank before it.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmrl.envs.protocol import Message
from llmrl.envs.tool_calls import ParseFault, parse_tool_calls
from llmrl.models.starter import build_tokenizer
from llmrl.rollout.rendering import Renderer

ROOT = Path(__file__).parents[2]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "One."}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template with its manners.

    end: the token that the policy ends its turn with; eos: another that ends it. said: an answer in the very form in
    which the template writes it back when a user answers it; None where it never does so.
    """

    name: str
    special: tuple[str, ...]
    end: str
    eos: str
    bos: str | None = None
    template: str | None = None  # None: the one of trl with this name
    system: bool = True
    tools: bool = False
    alternates: bool = False  # user and assistant in turn, or it refuses
    kind: str = "bytes"
    delimited: bool = True
    said: str | None = "Yes, it is two."
    blanks_kept: bool = True  # the ids of a text decode to it, blanks included

    def chat_template(self) -> str:
        if self.template is not None:
            return self.template
        spec = find_spec("trl")
        assert spec is not None
        assert spec.submodule_search_locations
        return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{self.name}.jinja").read_text("utf-8")


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<｜User｜>",  # noqa: RUF001
    "<｜Assistant｜>",  # noqa: RUF001
    *(f"<｜tool▁{what}▁{end}｜>" for what in ("outputs", "output") for end in ("begin", "end")),  # noqa: RUF001
)
COHERE = ("<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
          "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")  # fmt: skip
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PHI3 = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GPTOSS = ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
LFM2 = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_response_start|>",
        "<|tool_response_end|>")  # fmt: skip
ENDOFTEXT = "<|endoftext|>"

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5", CHATML, "<|im_end|>", ENDOFTEXT, tools=True),
        Family("qwen3", CHATML, "<|im_end|>", ENDOFTEXT, tools=True),
        Family("qwen3_instruct_2507", CHATML, "<|im_end|>", ENDOFTEXT, tools=True),
        Family("qwen3_8", CHATML, "<|im_end|>", ENDOFTEXT, tools=True, said="Hm.\n</think>\n\nTwo."),
        Family("llama3", LLAMA3, "<|eot_id|>", "<|end_of_text|>", bos="<|begin_of_text|>"),
        Family("llama3_1", LLAMA3, "<|eot_id|>", "<|end_of_text|>", bos="<|begin_of_text|>", tools=True),
        Family("gemma", GEMMA, "<end_of_turn>", "<eos>", bos="<bos>", system=False, alternates=True, kind="gemma"),
        Family("gemma3", GEMMA, "<end_of_turn>", "<eos>", bos="<bos>", alternates=True, kind="gemma"),
        Family("deepseek_r1_distill", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[2], bos=DEEPSEEK[0], tools=True,
               said=None),
        Family("phi3", PHI3, "<|end|>", ENDOFTEXT, kind="swallowing", blanks_kept=False),
        Family("cohere2", COHERE, "<|END_RESPONSE|>", "<EOS_TOKEN>", bos="<BOS_TOKEN>", alternates=True),
        Family("glm4moe", GLM, "<|user|>", ENDOFTEXT, tools=True, said="\n<think></think>\nTwo."),
        Family("gptoss", GPTOSS, "<|return|>", "<|call|>", tools=True, said=None),
        Family("lfm2", LFM2, "<|im_end|>", ENDOFTEXT, bos="<|startoftext|>", tools=True),
        Family("smollm2", CHATML, "<|im_end|>", ENDOFTEXT, bos="<|im_start|>", template=SMOLLM2),
        Family("starter", CHATML, "<|im_end|>", ENDOFTEXT, kind="starter"),
        Family("mistral", ("<unk>", "<s>", "</s>"), "</s>", "<s>", bos="<s>", template=MISTRAL, system=False,
               alternates=True, kind="llama", blanks_kept=False),
        Family("vicuna", (ENDOFTEXT,), ENDOFTEXT, ENDOFTEXT, template=VICUNA, system=False, delimited=False,
               said=None),
    )
}  # fmt: skip


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    if family.kind == "starter":
        return build_tokenizer(ROOT / "data/arithmetic/mixed/train.jsonl")
    make = {"bytes": _byte_level, "swallowing": _byte_level, "gemma": _gemma_like, "llama": _llama_like}[family.kind]
    swallow = family.kind == "swallowing"
    special = [AddedToken(token, special=True, normalized=False, rstrip=swallow) for token in family.special]
    made = PreTrainedTokenizerFast(
        tokenizer_object=make(), bos_token=family.bos, eos_token=family.end, pad_token=family.special[0],
        clean_up_tokenization_spaces=False, chat_template=family.chat_template(),
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": special})
    made.name_or_path = name
    return made


def _corpus() -> list[str]:
    rows = (ROOT / "data/arithmetic/sft/train.jsonl").read_text("utf-8").splitlines()[:100]
    texts = [m["content"] for row in map(json.loads, rows) for m in row["prompt"] + row["completion"]]
    return [*texts, "user\nassistant\nsystem\ntool\n" * 20, "The answer to it is yes, or no. \n\n  \n" * 20]


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_corpus(), trainer)
    return backend


def _sentencepiece(normalizer: Any, strip: bool) -> Tokenizer:
    """Blanks are U+2581, unknown characters are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n|\u2581?[^\u2581\n]+|\u2581"), "isolated")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *bytes_], show_progress=False)
    backend.train_from_iterator(_corpus(), trainer)
    return backend


def _gemma_like() -> Tokenizer:
    return _sentencepiece(normalizers.Replace(" ", "\u2581"), strip=False)


def _llama_like() -> Tokenizer:
    """A blank is put before every text, and taken away again."""
    both = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _sentencepiece(both, strip=True)


def read_channels(text: str) -> "Message | ParseFault":
    """gpt-oss: thoughts, an answer and a call of a tool each have a channel. Anything else is no message."""
    parts = re.fullmatch(
        r"(?:<\|channel\|>analysis<\|message\|>(?P<thinking>[^<]*)<\|end\|><\|start\|>assistant)?"
        r"(?:<\|channel\|>final<\|message\|>(?P<content>[^<]*)"
        r"| to=functions\.(?P<name>\w+)<\|channel\|>commentary json<\|message\|>(?P<arguments>[^<]*))",
        text,
    )
    if parts is None:
        return ParseFault("no channel")
    thinking = {"thinking": parts["thinking"]} if parts["thinking"] else {}
    if parts["name"] is None:
        return {"content": parts["content"], **thinking}
    try:
        arguments = json.loads(parts["arguments"])
    except ValueError:
        return ParseFault("the arguments are no JSON")
    call = {"type": "function", "function": {"name": parts["name"], "arguments": arguments}}
    return {"content": "", **thinking, "tool_calls": [call]}


def renderer(name: str, **settings: Any) -> Renderer:
    """Of a family, reading tool calls in its format."""
    return Renderer(tokenizer(name), parse=read_channels if name == "gptoss" else parse_tool_calls, **settings)
