"""Text and dialogues as token ids, with the boundary between prompt and completion exact.

Invariants: the prompt's ids are those that the policy sees when it generates; no token of the prompt is in a
completion; prompt ids + completion ids decode to the joint text; a completion ends with one stop token, and nothing
that the policy would never produce (a template's newline after the end of a turn) follows it.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmrl.data.faults import RowFault
from llmrl.data.messages import Message, shared_length
from llmrl.errors import RefusedError

# Texts put before a completion that is tokenised on its own, so that a tokenizer that treats the start of a text
# differently (SentencePiece's added blank) sees a middle. Dropped again; the first that gives the text back is used.
GUARDS = ("", "\n", ".", "0", "a")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and one completion. `remade`: how the boundary had to be made, for counting.

    `ends`: the completion holds a stop token (its last), so that the policy learns when to stop.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    ends: bool
    retokenised: bool = False
    rerendered: bool = False


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Refuse a tokenizer that makes ids for which the model has no embedding."""
    size = model_config.get_text_config().vocab_size
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= size)
    if beyond:
        index, token = beyond[0]
        raise RefusedError(
            f"the tokenizer ({tokenizer.name_or_path}) and the model do not belong together: token {token!r} has id "
            f"{index}, but the model ({model_config.name_or_path}) embeds only {size} ids ({len(beyond)} tokens lie "
            "beyond). Use the model's own tokenizer, or resize the model's embeddings and save it before training"
        )


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a dialogue without a chat template to render it."""
    if not tokenizer.chat_template:
        raise RefusedError(
            f"{where}: holds dialogues (lists of messages), but the tokenizer ({tokenizer.name_or_path}) has no chat "
            "template to write them as text. Use an instruct model or its tokenizer, set `chat_template` in "
            "tokenizer_config.json, or give plain text"
        )


class Encoder:
    """A tokenizer with what has to be known of it: the ids that it puts before every text, and those that end one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.stop_ids = frozenset(stop_token_ids) | ({self.eos_token_id} - {None})
        self.start_ids = self._start_ids()
        # Special tokens that a tokenizer finds in a text before it does anything else with it.
        self.marks = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        ]

    def _start_ids(self) -> list[int]:
        """What the tokenizer adds in front (often BOS). What some add behind (EOS) is left to us, to be there once."""
        bare, dressed = self.ids(["a"])[0], self.tokenizer("a", add_special_tokens=True)["input_ids"]
        extra = len(dressed) - len(bare)
        return next((dressed[:n] for n in range(extra + 1) if dressed[n : n + len(bare)] == bare), [])

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens and blanks as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def plain(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Plain texts: for each prompt its completions, with EOS after each (once, also where the text has it)."""
        if not prompts:
            return []
        eos = self.tokenizer.eos_token
        if eos is None or self.eos_token_id is None:
            raise RefusedError(
                f"the tokenizer ({self.tokenizer.name_or_path}) has no EOS token; set eos_token in its config"
            )
        stripped = [[_without_end(text, eos) for text in texts] for texts in completions]
        prompt_ids = self.ids(prompts)
        joint_ids = iter(
            self.ids([prompt + text for prompt, texts in zip(prompts, stripped, strict=True) for text in texts])
        )
        encoded = []
        for ids, texts in zip(prompt_ids, stripped, strict=True):
            parts = [self.divided(ids, next(joint_ids), text) for text in texts]
            encoded.append(
                [Encoded(self.start_ids + ids, [*part, self.eos_token_id], True, again) for part, again in parts]
            )
        return encoded

    def divided(self, prompt_ids: list[int], joint_ids: list[int], completion: str) -> tuple[list[int], bool]:
        """The completion's ids after the prompt's, and whether it had to be tokenised apart from the prompt.

        They are those of the joint text where that begins with the prompt's ids. Where a token spans the boundary it
        cannot be scored without scoring a part of the prompt: the policy, given the prompt, never produces it.
        """
        length = len(prompt_ids)
        if joint_ids[:length] == prompt_ids:
            return joint_ids[length:], False
        wanted = self.decode(joint_ids)
        apart = []
        for guard in GUARDS:
            guard_ids, ids = self.ids([guard, guard + completion])
            if ids[: len(guard_ids)] == guard_ids:
                apart.append(ids[len(guard_ids) :])
                if self.decode(prompt_ids + apart[-1]) == wanted:
                    return apart[-1], True
        return apart[0], True

    def rendered(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[Sequence[list[Message]]],
        extras: Sequence[dict[str, Any]],
    ) -> list[list[Encoded] | RowFault]:
        """Dialogues: for each prompt its completions, of one assistant message each, written by the chat template.

        extras: for each prompt `tools` and other arguments of the template. A row that it refuses gives a fault.
        """
        requests = [(prompt, True, extra) for prompt, extra in zip(prompts, extras, strict=True)]
        for prompt, answers, extra in zip(prompts, completions, extras, strict=True):
            requests += [(prompt + answer, False, extra) for answer in answers]
        texts = self.render(requests)
        heads, bodies = texts[: len(prompts)], iter(texts[len(prompts) :])
        joints = [
            [_joined(head, next(bodies), answer) for answer in answers]
            for head, answers in zip(heads, completions, strict=True)
        ]
        prompts_as_text = [head if isinstance(head, str) else "" for head in heads]
        cuts = self._cuts(prompts_as_text)
        begin_ids = self.ids([text[:cut] for text, cut in zip(prompts_as_text, cuts, strict=True)])
        end_ids = self.ids([text[cut:] for text, cut in zip(prompts_as_text, cuts, strict=True)])
        joined = [j.text[cut:] for row, cut in zip(joints, cuts, strict=True) for j in row if isinstance(j, _Joint)]
        joint_ids = iter(self.ids(joined))
        parts = zip(begin_ids, end_ids, joints, strict=True)
        return [self._assembled(begin, end, row, joint_ids) for begin, end, row in parts]

    def _cuts(self, prompts: list[str]) -> list[int]:
        """Where each prompt may be cut so that its first part, the longer one, is tokenised once for all completions.

        Before its last special token, where a tokenizer cuts a text itself. That it does is tried on the first prompt.
        """
        cuts = [max((prompt.rfind(mark) for mark in self.marks), default=0) for prompt in prompts]
        cuts = [max(cut, 0) for cut in cuts]
        if any(cuts):
            prompt, cut = next((prompt, cut) for prompt, cut in zip(prompts, cuts, strict=True) if cut)
            whole, begin, end = self.ids([prompt, prompt[:cut], prompt[cut:]])
            if whole != begin + end:
                self.marks = []
                return [0] * len(prompts)
        return cuts

    def _assembled(
        self, begin_ids: list[int], end_ids: list[int], row: "list[_Joint | RowFault]", joint_ids: Iterator[list[int]]
    ) -> "list[Encoded] | RowFault":
        """One prompt (in two parts) with its completions; `joint_ids`: the second part with each of them, in turn."""
        encoded: list[Encoded] = []
        fault: RowFault | None = None
        for joint in row:
            if isinstance(joint, RowFault):
                fault = fault or joint
                continue
            completion_ids, again = self.divided(end_ids, next(joint_ids), joint.text[joint.boundary :])
            ended = self._ended(completion_ids)
            encoded.append(
                Encoded(begin_ids + end_ids, ended or completion_ids, ended is not None, again, joint.rerendered)
            )
        return fault or encoded

    def _ended(self, ids: list[int]) -> list[int] | None:
        """The ids up to and including the stop token at which generation would have ended, or None without one."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return None if end is None else ids[: end + 1]

    def render(self, requests: Sequence[tuple[list[Message], bool, dict[str, Any]]]) -> "list[str | RowFault]":
        """Texts of (messages, add the generation prompt, template arguments); equal arguments share a call."""
        texts: list[str | RowFault] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, (_, generation, extra) in enumerate(requests):
            alike.setdefault(json.dumps([generation, extra], sort_keys=True), []).append(index)
        for indices in alike.values():
            _, generation, extra = requests[indices[0]]
            results = self._render_alike([requests[i][0] for i in indices], generation, extra)
            for index, text in zip(indices, results, strict=True):
                texts[index] = text
        return texts

    def _render_alike(
        self, dialogues: list[list[Message]], generation: bool, extra: dict[str, Any]
    ) -> "list[str | RowFault]":
        def apply(batch: list[list[Message]]) -> list[str]:
            return self.tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=generation, **extra)

        try:
            return list(apply(dialogues))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
            return [_rendered_alone(apply, messages) for messages in dialogues]


@dataclass(frozen=True)
class _Joint:
    """Prompt and completion as one text, the completion from `boundary` on."""

    text: str
    boundary: int
    rerendered: bool


def _rendered_alone(apply: Callable[[list[list[Message]]], list[str]], messages: list[Message]) -> "str | RowFault":
    try:
        return apply([messages])[0]
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        return RowFault("prompt", f"the chat template refuses its messages ({roles}): {error}; mend or remove the row")


def _joined(prompt: "str | RowFault", whole: "str | RowFault", answer: list[Message]) -> "_Joint | RowFault":
    """The text that is trained: the prompt as it is when the policy generates, then the completion.

    Some templates write the end of a prompt differently once an answer follows (an empty block of thoughts that comes
    and goes). Then the answer, as the template writes it, is put behind the prompt that generation will see.
    """
    if isinstance(prompt, RowFault) or isinstance(whole, RowFault):
        return prompt if isinstance(prompt, RowFault) else whole  # type: ignore[return-value]
    if whole.startswith(prompt):
        return _Joint(whole, len(prompt), False)
    shared = shared_length(prompt, whole)
    content = (answer[0].get("content") or "").strip()
    if content and whole[shared:].lstrip().startswith(content):
        return _Joint(prompt + whole[shared:], len(prompt), True)
    return RowFault(
        "prompt",
        "the chat template writes the prompt differently when an answer follows (from "
        f"{prompt[shared : shared + 40]!r}), so that the model would be trained on another prompt than it sees; set "
        "chat_template_kwargs, or use another template",
    )


def _without_end(text: str, eos: str) -> str:
    while text.endswith(eos):
        text = text[: -len(eos)]
    return text
