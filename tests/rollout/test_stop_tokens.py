"""Texts that end a turn beside the model's own end tokens: each one token, an action, and closed by the template."""

from typing import Any

import pytest
from support.models import make_tiny_model
from support.templates import FAMILIES, renderer, tokenizer
from support.words import word_tokenizer

from llmrl.envs.protocol import Message, StepResult
from llmrl.errors import RefusedError
from llmrl.rollout.collector import Collector, Task
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.episode import Limits
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.rendering import Renderer
from llmrl.rollout.trajectory import RolloutGroup

WORDS = word_tokenizer()
CAT, DOG, END = WORDS.convert_tokens_to_ids(["cat", "dog", "<|end|>"])
QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]


def test_a_stop_token_is_said_unless_it_is_special() -> None:
    made = Renderer(WORDS, stop_tokens=["cat", "<|end|>"])
    assert made.stop_token_ids == (CAT, END)
    assert made.said_stop_ids == {CAT}


@pytest.mark.parametrize(("text", "pieces"), [("cat dog", "'cat', 'dog'"), ("zebra", "'<unk>'"), (" ", "")])
def test_what_is_not_one_token_is_refused_with_its_pieces(text: str, pieces: str) -> None:
    with pytest.raises(RefusedError, match=rf"stop_tokens: '{text}' is not one token .*: it falls into {pieces}\. Rem"):
        Renderer(WORDS, stop_tokens=["dog", text])


def test_longer_tokens_that_hold_a_stop_token_are_known() -> None:
    """The starter says " + " in one token, so that "+" would never stop it."""
    beside = renderer("starter", stop_tokens=["+", FAMILIES["starter"].end]).beside_stop_tokens()
    assert {text: sorted(others) for text, others in beside.items()} == {"+": [" + ", "+ "]}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_familys_end_token_and_a_sign_are_one_token(name: str) -> None:
    """SentencePiece puts a blank before a text that stands alone."""
    made = renderer(name, stop_tokens=[FAMILIES[name].end, "?"])
    end, sign = made.stop_token_ids
    assert end == tokenizer(name).convert_tokens_to_ids(FAMILIES[name].end)
    assert tokenizer(name).convert_ids_to_tokens(sign).strip("\u2581") == "?"
    assert made.said_stop_ids == {sign}


@pytest.mark.parametrize("name", [name for name in sorted(FAMILIES) if FAMILIES[name].said and name != "mistral"])
def test_the_template_closes_a_turn_behind_a_stop_token_that_was_said(name: str) -> None:
    """The sign is an action, and said; the end of the turn and the next prompt are not, and one piece stays."""
    dialogue = Dialogue(renderer(name, stop_tokens=["?"]), QUESTION)
    said = dialogue.renderer.ids(str(FAMILIES[name].said).removesuffix("."))
    ids = [*said, *dialogue.renderer.stop_token_ids]
    opening = len(dialogue.prompt_ids)
    message = dialogue.complete(ids, "stop")
    assert isinstance(message, dict)
    assert message["content"].endswith("wo?")
    assert dialogue.extend([{"role": "user", "content": "Yes."}])
    assert dialogue.prompt_ids == tokenizer(name).apply_chat_template(
        dialogue.messages, add_generation_prompt=True, return_dict=False
    )
    (piece,) = dialogue.pieces()
    assert piece.turns == [(0, opening, opening + len(ids))]
    assert piece.token_ids[opening:] == ids


class Twice:
    """Two turns, whatever is said."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        self.turn = 0

    async def init(self) -> list[Message]:
        return [{"role": "user", "content": "the dog"}]

    async def step(self, message: Message) -> StepResult:
        self.turn += 1
        return StepResult([{"role": "user", "content": "a"}] if self.turn == 1 else [], self.turn == 2)

    async def close(self) -> None:
        pass


async def nothing(group: RolloutGroup) -> None:
    for rollout in group.rollouts:
        rollout.reward = 0.0


def test_the_engine_stops_there_and_the_rollout_goes_on() -> None:
    lm = make_tiny_model(vocab_size=len(WORDS), eos_token_id=END, scale=0.1)
    made = Renderer(WORDS, stop_tokens=["cat", "dog"])
    limits = Limits(max_turns=2, max_completion_length=40, stop_token_ids=made.stop_token_ids)
    collector = Collector(HuggingFaceEngine(lm, WORDS), made, Twice, limits, nothing)
    found = collector.collect([Task(1, {}, 24, seed=5)])
    turns = [
        (rollout.pieces[turn.piece], turn, said)
        for rollout in found.groups[0].rollouts
        for turn, said in zip(rollout.turns, [m for m in rollout.messages if m["role"] == "assistant"], strict=True)
    ]
    assert len(turns) == 48
    for ids, turn, said in turns:
        *before, last = ids[turn.start : turn.end]
        assert not {CAT, DOG, END} & set(before)
        assert (last in (CAT, DOG, END)) == (turn.finish_reason == "stop")
        if last in (CAT, DOG):
            assert said["content"].split()[-1] == WORDS.decode([last])
            assert len(ids) == turn.end or ids[turn.end] == END  # what closes the turn is the template's
    assert {ids[turn.end - 1] for ids, turn, _ in turns} >= {CAT, DOG, END}
    assert all(len(rollout.pieces) == 1 for rollout in found.groups[0].rollouts)
