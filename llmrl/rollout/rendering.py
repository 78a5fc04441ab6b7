"""Messages as the text and token ids that a policy continues, and what it said as a message again.

Invariants: a prompt's ids are those of `tokenizer.apply_chat_template`; text that is put behind sampled ids is
tokenised as it would be behind their text, and where a tokenizer cannot promise that, this is said; the text of a
sampled completion is what it adds to the text before it (a tokenizer may decode a blank only after something).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from llmrl.envs.protocol import Message
from llmrl.envs.tool_calls import ParseFault, ToolCall
from llmrl.errors import RefusedError

History = Literal["as_template", "keep"]

# What a template that does not like its messages raises; the latter four when it expects another type somewhere.
REFUSALS = (TemplateError, ValueError, TypeError, KeyError, AttributeError)
THINK, THOUGHT = "<think>", "</think>"
REASONING = "reasoning_content"
# Texts put before one that is tokenised on its own, so that a tokenizer that treats the start of a text differently
# sees a middle. Dropped again.
GUARDS = ("", "\n", ".", "0", "a")
CONTEXT = 4  # ids before a completion that decide how its first characters are decoded; one is enough for all known


# From the text of a completion, its thoughts split off where the template knows them: content and tool calls
# (`envs.tool_calls.parse_tool_calls`), or the message's keys (for formats with channels).
Parse = Callable[[str], "tuple[str, list[ToolCall]] | Message | ParseFault"]


class Renderer:
    """A tokenizer with its chat template: one per run, shared by all rollouts.

    template_kwargs: the template's own arguments (`enable_thinking`, ...). parse: reads tool calls out of text;
    `parse_without_tools` False: only where the environment offers tools. history: what happens where the template
    writes an earlier turn of the policy otherwise than the policy said it (thoughts stripped, blanks trimmed, tool
    calls written anew). `as_template` obeys it: the policy is trained on the prompts that it will meet in use. `keep`
    leaves the turn as it was said. stop_tokens: texts that end a turn beside the model's own end tokens, each of one
    token. `stop_token_ids` are theirs; `said_stop_ids` those that the tokenizer does not call special: they are part of
    what was said, and the template closes the turn behind them.

    `delimited`: a special token follows the policy's text in a dialogue, so that ids kept and text added never differ
    from the template's text tokenised in one. False too where the template refuses the probe.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: dict[str, Any] | None = None,
        parse: Parse | None = None,
        parse_without_tools: bool = True,
        history: History = "as_template",
        stop_tokens: Sequence[str] = (),
    ) -> None:
        if history not in get_args(History):
            raise RefusedError(f"history: {history!r} is unknown; known are {', '.join(get_args(History))}")
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.parse = parse
        self.parse_without_tools = parse_without_tools
        self.history = history
        self.has_template = bool(tokenizer.chat_template)
        self.knows_reasoning = self.has_template and REASONING in str(tokenizer.chat_template)
        # The tokens at which a tokenizer cuts a text before it does anything else.
        self._cutting = frozenset(tokenizer.added_tokens_decoder)
        self.delimited = self.has_template and self._probe()
        self.stop_token_ids = tuple(self._one_token(text) for text in stop_tokens)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.said_stop_ids = frozenset(self.stop_token_ids) - special

    def _probe(self) -> bool:
        mark = "answer0"
        roles = ("user", "assistant", "user")
        try:
            text = self.render([{"role": role, "content": f"{role[0]}{mark[1:]}"} for role in roles], None)
        except REFUSALS:
            return False
        _, found, rest = text.rpartition(mark)
        return bool(found and rest) and self.added_ids([], None, rest)[1]

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, generation: bool = True) -> str:
        """The template's text, with the head of the policy's next turn if `generation`. Raises one of `REFUSALS`."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generation, **self.template_kwargs
        )

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """As `render`, for messages that are not the policy's: a refusal is a `RefusedError`."""
        try:
            return self.render(messages, tools)
        except REFUSALS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RefusedError(
                f"the chat template ({self.tokenizer.name_or_path}) refuses the dialogue (roles: {roles}): {error}. "
                "Remedy: let the environment send roles and contents that the template knows, or use another model"
            ) from error

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added. Raises RefusedError for what is no text, such as half a character."""
        try:
            encoded = self.tokenizer(
                text,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except (TypeError, UnicodeError) as error:
            raise RefusedError(
                f"the tokenizer cannot take {text!r:.80}: {error}. Remedy: send valid Unicode"
            ) from error
        return list(encoded["input_ids"])

    def _one_token(self, text: str) -> int:
        """The token that this text is, at the start of a text or behind another."""
        for guard in GUARDS:
            head, whole = self.ids(guard), self.ids(guard + text)
            if whole[:-1] == head and self.decode(whole[-1:]) == text:
                return whole[-1]
        pieces = ", ".join(repr(self.decode([i])) for i in self.ids(text))
        raise RefusedError(
            f"stop_tokens: {text!r} is not one token of the tokenizer ({self.tokenizer.name_or_path}): it falls into "
            f"{pieces}. Remedy: name a token, or let max_completion_length end the turn"
        )

    def beside_stop_tokens(self) -> dict[str, list[str]]:
        """For each stop token's text the longer tokens that hold it, too, and do not stop."""
        if not self.stop_token_ids:
            return {}
        every = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        texts = [self.decode([i]) for i in self.stop_token_ids]
        found = {text: [other for other in every if text in other and text != other] for text in texts}
        return {text: others for text, others in found.items() if others}

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text prompt for a model without turns: with what the tokenizer puts in front (often BOS)."""
        bare, dressed = self.ids(text), list(self.tokenizer(text, verbose=False)["input_ids"])
        extra = len(dressed) - len(bare)
        start = next((n for n in range(extra + 1) if dressed[n : n + len(bare)] == bare), 0)
        return dressed[:start] + bare

    def added_ids(self, before: Sequence[int], end_id: int | None, text: str) -> tuple[list[int], bool]:
        """Ids of a text that is put behind ids, and whether a special token makes the boundary exact.

        before: the ids, sampled ones last; end_id: the last of them if it ended the policy's turn.
        """
        if end_id in self._cutting:
            assert end_id is not None
            # Behind the very token: some swallow the blanks after them.
            ids = self.ids(self.decode([end_id]) + text)
            if ids[:1] == [end_id]:
                return ids[1:], True
        ids = self.ids(text)
        if ids and ids[0] in self._cutting:
            return ids, True
        context = list(before[-CONTEXT:])
        wanted = self.decode(context) + text
        for guard in GUARDS:
            guard_ids, guarded = self.ids(guard), self.ids(guard + text)
            part = guarded[len(guard_ids) :]
            if guarded[: len(guard_ids)] == guard_ids and self.decode(context + part) == wanted:
                return part, False
        return ids, False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens and blanks as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def said(self, before: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
        """The text of sampled ids: what it adds to the text before it, and on its own (without a leading blank)."""
        context = list(before[-CONTEXT:])
        head, alone = self.decode(context), self.decode(ids)
        joined = self.decode([*context, *ids])
        return (joined[len(head) :] if joined.startswith(head) else alone), alone

    def message(self, text: str, prompt: str, with_tools: bool = False) -> Message | ParseFault:
        """The assistant's message from what it said after `prompt`; `with_tools`: it was offered some."""
        thoughts, content = self._divided(text, prompt.rstrip().endswith(THINK))
        parses = self.parse is not None and (with_tools or self.parse_without_tools)
        parsed = self.parse(content) if parses and self.parse else (content, [])
        if isinstance(parsed, ParseFault):
            return parsed
        if isinstance(parsed, tuple):
            content, calls = parsed
            parsed = {"content": content, **({"tool_calls": calls} if calls else {})}
        reasoning = {} if thoughts is None else {REASONING: thoughts}
        return {"role": "assistant", **reasoning, **parsed}

    def _divided(self, text: str, opened: bool) -> tuple[str | None, str]:
        """Thoughts (None: there are none, or the template does not know them) and the rest.

        opened: the prompt has begun them. Thoughts that do not end, as when the length ran out, leave nothing said.
        """
        bare = text.lstrip().removeprefix(THINK) if text.lstrip().startswith(THINK) else None
        if not self.knows_reasoning or (bare is None and not opened):
            return None, text
        thoughts, _, content = (text if bare is None else bare).partition(THOUGHT)
        return thoughts.strip("\n"), content.lstrip("\n")
