"""The token bookkeeping of one rollout: prompts, what was sampled, what a chat template adds, turn after turn.

Invariants: sampled ids are kept as they were sampled, never re-tokenised and never edited; a piece is a row of ids in
which every prompt is the previous prompt, then the previous completion, then ids that the policy did not choose; only
sampled ids are actions, so that a token which closes a turn after the length ran out is none. Where the template does
not write the policy's turn as the policy said it, no such row exists: a new piece starts, and is counted.

Pure and synchronous: no engine, no environment, no limits.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.envs.protocol import Message
from llmrl.envs.tool_calls import ParseFault
from llmrl.errors import RefusedError
from llmrl.rollout.rendering import REFUSALS, Renderer

# Stand-ins for what the policy said, to learn what the template writes around it.
EARLIER, MARKS = "earlier7131", ("marked2861", "answer93407")


@dataclass(frozen=True)
class Piece:
    """One row of ids that a policy saw and continued; it ends with its last action.

    turns: (number of the turn in the rollout, start, end) of each run of sampled ids within `token_ids`, in order.
    """

    token_ids: list[int]
    turns: list[tuple[int, int, int]]


class Dialogue:
    """Give it opening messages; then in turn `complete` with what was sampled and `extend` with the answer to it.

    messages: a text instead of messages is a prompt without turns, taken as it is and completed once.
    `prompt_ids`: what the engine is to continue. `messages`: everything said so far, by whom; not to be changed.
    `rewrites`: a line for each piece that had to be started. `kept`: turns that stayed as they were said against the
    template (`history` "keep"). `undelimited`: additions before which no special token stood, so that the template's
    text tokenised in one may be divided differently there.
    """

    def __init__(
        self, renderer: Renderer, messages: list[Message] | str, tools: list[dict[str, Any]] | None = None
    ) -> None:
        self.renderer = renderer
        self.tools = copy.deepcopy(tools) or None
        self.messages: list[Message] = _as_messages(messages)
        self.rewrites: list[str] = []
        self.kept = self.undelimited = 0
        self._plain = isinstance(messages, str) or not renderer.has_template
        self._closed: list[Piece] = []
        self._num_turns = 0
        self._waiting = True  # for a completion
        self._ended: ParseFault | None = None
        if self._plain:
            self._check_plain()
            text = str(self.messages[0]["content"])
            self._start(text, renderer.plain_ids(text))
        else:
            text = renderer.prompt(self.messages, self.tools)
            self._start(text, renderer.ids(text))

    def _check_plain(self) -> None:
        if len(self.messages) > 1 or self.tools:
            raise RefusedError(
                f"the tokenizer ({self.renderer.tokenizer.name_or_path}) has no chat template, so that it can take one "
                f"text prompt, not {len(self.messages)} messages{' with tools' if self.tools else ''}. Remedy: use an "
                "instruct model or its tokenizer, or set `chat_template` in tokenizer_config.json"
            )

    def _start(self, text: str, ids: list[int]) -> None:
        """A new piece. `_text` is the text of `prompt_ids`: what the template wrote, not what the ids decode to."""
        self._text = text
        self.prompt_ids = ids
        self._ids = ids
        self._turns: list[tuple[int, int, int]] = []

    def complete(self, token_ids: Sequence[int], finish_reason: str) -> Message | ParseFault:
        """Take what was sampled after `prompt_ids`; the assistant's message, for the environment.

        finish_reason: "stop" if the last id ended the turn, "length" if there is no such id. A stop token that is no
        special one (`Renderer`) is part of the message; what closes the turn behind it is no action.
        """
        assert self._waiting, "complete: this prompt has been completed; extend the dialogue first"
        self._waiting = False
        start = len(self.prompt_ids)
        self._ids = [*self.prompt_ids, *token_ids]
        self._turns.append((self._num_turns, start, len(self._ids)))
        self._num_turns += 1
        ended = finish_reason == "stop" and token_ids and token_ids[-1] not in self.renderer.said_stop_ids
        self._end_id = token_ids[-1] if ended else None
        self._end = "" if self._end_id is None else self.renderer.decode([self._end_id])
        body = token_ids if self._end_id is None else token_ids[:-1]
        self._said = self.renderer.said(self.prompt_ids, body)
        message = self._message(self._said[1])
        if isinstance(message, ParseFault):
            self._ended = message
            self.messages.append(_answer(self._said[1]))
            return message
        self.messages.append(message)
        return copy.deepcopy(message)

    def _message(self, text: str) -> Message | ParseFault:
        if self._plain:
            return _answer(text)
        message = self.renderer.message(text, self._text, bool(self.tools))
        if isinstance(message, ParseFault):
            return message
        try:
            self.renderer.render([*self.messages, message], self.tools, generation=False)
        except REFUSALS as error:
            return ParseFault(f"the chat template cannot write it: {error}")
        return message

    def extend(self, messages: list[Message]) -> bool:
        """Append what the environment answers. False: a new piece starts with the next prompt.

        True: `prompt_ids` begins with the previous prompt and what was sampled, and its text is what the template
        writes for the whole dialogue (with `history` "keep": but for the policy's own turns).
        """
        self._check_extension(messages)
        whole = self.renderer.prompt([*self.messages, *messages], self.tools)
        added = self._continuation(whole)
        if added is None and self.renderer.history == "keep":
            added = self._kept(messages)
            self.kept += added is not None
        self.messages += copy.deepcopy(messages)
        self._waiting = True
        if added is None:
            self.rewrites.append(self._difference(whole))
            self._closed.append(self._piece())
            self._start(whole, self.renderer.ids(whole))
            return False
        added_text, self._text = added
        ids, exact = self.renderer.added_ids(self._ids, self._end_id, added_text)
        self.undelimited += not exact
        self.prompt_ids = self._ids = self._ids + ids
        return True

    def _check_extension(self, messages: list[Message]) -> None:
        assert not self._waiting, "extend: the prompt has not been completed yet"
        assert self._ended is None, "extend: the last completion was no message, the rollout is over"
        if self._plain:
            raise RefusedError(
                "a text prompt without a chat template is completed once, but the environment goes on. Remedy: use an "
                "instruct model and messages, or an environment of a single turn"
            )
        if not messages:
            raise RefusedError("the environment goes on without saying anything: it must send a message or be done")

    def _continuation(self, whole: str) -> tuple[str, str] | None:
        """What follows the completion in the template's text of the whole dialogue, and that text; None if it differs.

        The text is compared, not its ids: that another division into tokens gives the same text is no difference.
        """
        for said in self._said:
            before = self._text + said + self._end
            if whole.startswith(before):
                return whole[len(before) :], whole
        return None

    def _kept(self, messages: list[Message]) -> tuple[str, str] | None:
        """As `_continuation`, where the template differs in nothing but the policy's own turns.

        What it writes after a turn is learned from a dialogue with stand-ins for all that the policy said.
        """
        earlier = [_answer(EARLIER) if message["role"] == "assistant" else message for message in self.messages[:-1]]
        try:
            # A head of the turn may be written before the policy speaks only (an opened block of thoughts), an end of
            # the text only when it does not: either way of ending the dialogue before the turn will do.
            heads = [self.renderer.render(earlier, self.tools, generation) for generation in (True, False)]
            wholes = [self.renderer.render([*earlier, _answer(mark), *messages], self.tools) for mark in MARKS]
        except REFUSALS:
            return None
        tails = set()
        for mark, whole in zip(MARKS, wholes, strict=True):
            before, found, tail = whole.partition(mark)
            if not (found and (before == heads[0] or before.startswith(heads[1]))):
                return None
            tails.add(tail)
        tail = tails.pop()
        if tails or not tail.startswith(self._end):
            return None  # it depends on what was said, or the turn was ended by another token than the template's
        added = tail[len(self._end) :]
        return added, self._text + self._said[0] + self._end + added

    def _difference(self, whole: str) -> str:
        said = self._text + self._said[0] + self._end
        at = next((i for i, (ours, theirs) in enumerate(zip(said, whole, strict=False)) if ours != theirs), len(said))
        return f"turn {self._num_turns}: said {said[at : at + 40]!r}, the template writes {whole[at : at + 40]!r}"

    def _piece(self) -> Piece:
        return Piece(self._ids[: self._turns[-1][2]], list(self._turns))

    def pieces(self) -> list[Piece]:
        """What was seen and sampled so far; a prompt that nothing was sampled for is in none."""
        return [*self._closed, *([self._piece()] if self._turns else [])]


def _as_messages(messages: list[Message] | str) -> list[Message]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not messages:
        raise RefusedError("a dialogue needs an opening message, but the environment sent none")
    return copy.deepcopy(messages)


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}
