"""A rollout's tokens against many families' chat templates: nothing sampled is edited, nothing added is guessed."""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.templates import FAMILIES, TOOLS, Family, renderer, tokenizer
from support.words import word_tokenizer

from llmrl.envs.tool_calls import ParseFault, parse_tool_calls
from llmrl.errors import RefusedError
from llmrl.rollout.dialogue import Dialogue, Piece
from llmrl.rollout.rendering import Renderer

NAMES = sorted(FAMILIES)
BYTE_LEVEL = [name for name in NAMES if FAMILIES[name].kind == "bytes" and FAMILIES[name].delimited]
QUESTION, NEXT = [{"role": "user", "content": "What is 1 + 1?"}], [{"role": "user", "content": "And 2 + 2?"}]
RESULT = [{"role": "tool", "name": "add", "content": "3"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
WORDS = ["yes", "3", " ", "  ", "\n", "\n\n", "\t", ".", "né", "日本", "🤖", "👩‍👩‍👧", "{", '"', "'", "[INST]", "tool",
         "<think>", "</think>", "<think>\nhm\n</think>\n\n", "<tool_response>", "{{ x }}", "\u2581"]  # fmt: skip


def encoded(name: str, text: str) -> list[int]:
    return tokenizer(name)(text, add_special_tokens=False)["input_ids"]


def end_id(name: str) -> int:
    return tokenizer(name).convert_tokens_to_ids(FAMILIES[name].end)


def template_ids(name: str, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """What a user of the template gets."""
    return tokenizer(name).apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)


def asked(name: str, **options: Any) -> Dialogue:
    return Dialogue(renderer(name, **options), QUESTION)


def sampled(pieces: list[Piece]) -> list[list[int]]:
    """The ids of the actions, turn by turn; the turns must be numbered through."""
    turns = [(turn, piece.token_ids[start:end]) for piece in pieces for turn, start, end in piece.turns]
    assert [turn for turn, _ in turns] == list(range(len(turns)))
    return [ids for _, ids in turns]


# -- any conversation, any family ------------------------------------------------------------------------------------


def texts(family: Family) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*WORDS, *family.special]), max_size=8).map("".join)


@st.composite
def completions(draw: st.DrawFn, family: Family) -> tuple[list[int], str]:
    """Ids and why they end: texts tokenised well, or in single characters, or single bytes cut anywhere, or any ids."""
    name = family.name
    known = [family.said or "Two.", "<think>\nhm\n</think>\n\nTwo.", "\n<think>hm</think>\nTwo.", f"Now.\n{CALL}", CALL]
    if name == "gptoss":
        final = "<|channel|>final<|message|>Two."
        thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        known = [final, thought + final, ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}']
    text = draw(st.one_of(st.sampled_from(known), texts(family)))
    how = draw(st.sampled_from(["whole", "whole", "spelled", "cut", "any"]))
    if how == "whole":
        ids = encoded(name, text)
    elif how == "any":
        ends = {tokenizer(name).convert_tokens_to_ids(token) for token in (family.end, family.eos)}
        ids = draw(st.lists(st.integers(0, len(tokenizer(name)) - 1).filter(lambda i: i not in ends), max_size=6))
    else:
        ids = [i for character in text for i in encoded(name, character)]
        ids = ids[: draw(st.integers(0, len(ids)))] if how == "cut" else ids
    if draw(st.integers(0, 3)) == 0:
        return ids, "length"
    ending = draw(st.sampled_from([family.end] * 4 + [family.eos]))
    return [*ids, tokenizer(name).convert_tokens_to_ids(ending)], "stop"


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[list[dict], list, bool]:
    """Opening messages; completions and the answers to them; whether there are tools."""
    family = FAMILIES[name]
    user = texts(family).map(lambda text: {"role": "user", "content": f"q{text}"})
    tool = texts(family).map(lambda text: {"role": "tool", "name": "add", "content": f"r{text}"})
    system = texts(family).map(lambda text: {"role": "system", "content": f"s{text}"})
    opening = [draw(user)]
    if family.system and draw(st.booleans()):
        opening.insert(0, draw(system))
    answers = user.map(lambda message: [message])
    if family.tools:
        answers = st.one_of(answers, st.lists(tool, min_size=1, max_size=2))
    turns = draw(st.lists(st.tuples(completions(family), answers), min_size=1, max_size=4))
    return opening, turns, family.tools and draw(st.booleans())


def text_of(name: str, ids: list[int]) -> str:
    """What ids stand for, less blanks where the family's tokenizer adds or swallows some."""
    text = tokenizer(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if FAMILIES[name].blanks_kept else "".join(text.split())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_prompts_are_the_templates_and_the_actions_are_what_was_sampled(name: str, data: st.DataObject) -> None:
    opening, turns, with_tools = data.draw(conversations(name))
    tools = TOOLS if with_tools else None
    dialogue = Dialogue(renderer(name), opening, tools)
    assert dialogue.prompt_ids == template_ids(name, opening, tools)
    given_ids, pieces, uncertain = [], 1, 0
    for (ids, reason), answer in turns:
        prompt = list(dialogue.prompt_ids)
        message = dialogue.complete(ids, reason)
        given_ids.append(ids)
        assert sampled(dialogue.pieces()) == given_ids
        assert dialogue.pieces()[-1].token_ids == prompt + ids
        if isinstance(message, ParseFault):
            break
        try:
            whole = template_ids(name, [*dialogue.messages, *answer], tools)
        except Exception:  # gpt-oss: a tool answers though none was called
            with pytest.raises(RefusedError, match="refuses the dialogue"):
                dialogue.extend(answer)
            break
        went_on = dialogue.extend(answer)
        if went_on:
            assert dialogue.prompt_ids[: len(prompt) + len(ids)] == prompt + ids
            assert text_of(name, dialogue.prompt_ids) == text_of(name, whole)
        else:
            assert dialogue.prompt_ids == whole
        pieces += not went_on
        assert sampled(dialogue.pieces()) == given_ids
        # Where the length ran out, a template may go on in words: the end of a block of thoughts, a blank.
        uncertain += went_on and (reason == "length" or not FAMILIES[name].delimited)
        assert dialogue.undelimited <= uncertain
    assert len(dialogue.rewrites) == pieces - 1
    assert all(piece.turns and piece.token_ids[: piece.turns[-1][2]] == piece.token_ids for piece in dialogue.pieces())


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].said])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_answer_in_the_templates_form_goes_on_with_the_ids_of_the_whole(name: str, reason: str) -> None:
    """Not only the text: every id is the one that tokenising the whole dialogue gives."""
    said = FAMILIES[name].said
    assert said is not None
    opening = template_ids(name, QUESTION)
    dialogue = asked(name)
    text = tokenizer(name).apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    # What the policy would have to sample for the whole to be tokenised as one: after the prompt, not on its own.
    ids = encoded(name, text + said + (" " if name == "mistral" else ""))[len(opening) :]
    if name == "mistral":  # writes a blank before each answer, which the policy has to sample
        ids = encoded(name, text + " " + said)[len(opening) :]
    assert isinstance(dialogue.complete([*ids, end_id(name)] if reason == "stop" else ids, reason), dict)
    assert dialogue.extend(NEXT)
    assert dialogue.prompt_ids == template_ids(name, dialogue.messages)
    assert (dialogue.rewrites, dialogue.undelimited) == ([], 0)


@pytest.mark.parametrize("name", NAMES)
def test_construction_tells_whether_special_tokens_delimit_turns(name: str) -> None:
    assert renderer(name).delimited == FAMILIES[name].delimited


# -- what is an action -----------------------------------------------------------------------------------------------


def test_positions_worked_out_by_hand() -> None:
    """Of a tokenizer with one token a word: <|start|> user the cat <|end|> <|start|> assistant | the dog | ..."""
    words = word_tokenizer()
    start, end, user, assistant = words.convert_tokens_to_ids(["<|start|>", "<|end|>", "user", "assistant"])
    the, a, cat, dog = words.convert_tokens_to_ids(["the", "a", "cat", "dog"])
    dialogue = Dialogue(Renderer(words), [{"role": "user", "content": "the cat"}])
    assert dialogue.prompt_ids == [start, user, the, cat, end, start, assistant]
    assert dialogue.complete([a, dog, end], "stop") == {"role": "assistant", "content": "a dog"}
    assert dialogue.extend([{"role": "user", "content": "a cat"}])
    assert dialogue.complete([the], "length") == {"role": "assistant", "content": "the"}
    assert dialogue.extend([{"role": "user", "content": "dog"}])
    assert dialogue.complete([dog, end], "stop") == {"role": "assistant", "content": "dog"}
    row = [start, user, the, cat, end, start, assistant, a, dog, end, start, user, a, cat, end, start, assistant, the]
    # The length ran out after `the`: the end token is the template's, and no action.
    row += [end, start, user, dog, end, start, assistant, dog, end]
    assert dialogue.pieces() == [Piece(row, [(0, 7, 10), (1, 17, 18), (2, 25, 27)])]


def test_what_closes_a_turn_is_no_action() -> None:
    dialogue = asked("qwen2_5")
    prompt, ids = list(dialogue.prompt_ids), encoded("qwen2_5", "Two")
    dialogue.complete([*ids, end_id("qwen2_5")], "stop")
    dialogue.extend(NEXT)
    dialogue.complete(ids, "length")
    (piece,) = dialogue.pieces()
    (_, start, end), (_, again, last) = piece.turns
    assert (start, end, last) == (len(prompt), len(prompt) + len(ids) + 1, len(piece.token_ids))
    added = tokenizer("qwen2_5").decode(piece.token_ids[end:again])
    assert added == "\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_was_never_completed_is_in_no_piece() -> None:
    dialogue = asked("llama3")
    assert dialogue.pieces() == []
    ids = [*encoded("llama3", "Two "), end_id("llama3")]  # a blank that the template trims
    dialogue.complete(ids, "stop")
    before = dialogue.pieces()
    assert not dialogue.extend(NEXT)
    assert dialogue.pieces() == before
    assert sampled(before) == [ids]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_spelled_special_tokens_and_halves_of_characters_stay_as_they_were_sampled(name: str) -> None:
    """The text `<|im_end|>` in letters is no end of a turn, and half an emoji (a replacement mark, as text) no more."""
    family, half = FAMILIES[name], encoded(name, "🤖")[:2]
    begin = "<|channel|>final<|message|>" if name == "gptoss" else "Hm.\n</think>\n\n" if name == "qwen3_8" else ""
    spelled = [i for character in f"It is {family.special[1]}" for i in encoded(name, character)]
    ids = [*encoded(name, begin), *spelled, *half, *encoded(name, "x"), *half]
    dialogue = asked(name)
    prompt = list(dialogue.prompt_ids)
    message = dialogue.complete(ids, "length")
    if name == "gptoss":
        assert isinstance(message, ParseFault)
        return
    assert isinstance(message, dict)
    assert message["content"].endswith(f"{family.special[1]}\ufffdx\ufffd")
    if name in ("deepseek_r1_distill", "glm4moe"):  # these write a block of thoughts otherwise than it was said
        assert not dialogue.extend(NEXT)
    else:
        assert dialogue.extend(NEXT)
        assert dialogue.prompt_ids[: len(prompt) + len(ids)] == prompt + ids
        assert dialogue.prompt_ids[len(prompt) + len(ids)] == end_id(name)


# -- templates that write history anew -------------------------------------------------------------------------------

THOUGHT = "<think>\nOne and one.\n</think>\n\nTwo."


def thinking(name: str = "qwen3", **options: Any) -> tuple[Dialogue, list[int]]:
    dialogue = asked(name, **options)
    ids = [*encoded(name, THOUGHT), end_id(name)]
    expected = {"role": "assistant", "reasoning_content": "One and one.", "content": "Two."}
    assert dialogue.complete(ids, "stop") == expected
    return dialogue, ids


def test_stripped_thoughts_start_a_piece_that_holds_what_the_template_left() -> None:
    dialogue, ids = thinking()
    assert not dialogue.extend(NEXT)
    text = tokenizer("qwen3").decode(dialogue.prompt_ids)
    assert "<think>" not in text
    assert "<|im_start|>assistant\nTwo.<|im_end|>" in text
    said, written = f"{THOUGHT}<|im_end|>", "Two.<|im_end|>\n<|im_start|>user\nAnd 2 + 2?"
    assert dialogue.rewrites == [f"turn 1: said {said[:40]!r}, the template writes {written[:40]!r}"]
    dialogue.complete(ids, "stop")
    first, second = dialogue.pieces()
    assert (first.turns[0][0], second.turns[0][0]) == (0, 1)
    assert sampled([first, second]) == [ids, ids]


def test_thoughts_between_tool_calls_stay_and_the_piece_goes_on() -> None:
    dialogue = Dialogue(renderer("qwen3"), QUESTION, TOOLS)
    ids = [*encoded("qwen3", f"<think>\nAdd.\n</think>\n\n{CALL}"), end_id("qwen3")]
    message = dialogue.complete(ids, "stop")
    assert isinstance(message, dict)
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert message["reasoning_content"] == "Add."
    assert dialogue.extend(RESULT)
    assert (
        tokenizer("qwen3")
        .decode(dialogue.prompt_ids)
        .endswith(
            f"<think>\nAdd.\n</think>\n\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    )


def test_kept_history_has_the_policys_own_thoughts() -> None:
    dialogue, ids = thinking(history="keep")
    prompt = list(dialogue.prompt_ids)
    assert dialogue.extend(NEXT)
    added = encoded("qwen3", "\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert dialogue.prompt_ids == prompt + ids + added
    dialogue.complete(ids, "stop")
    assert dialogue.extend(QUESTION)
    assert (dialogue.kept, dialogue.rewrites, len(dialogue.pieces())) == (2, [], 1)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "llama3", "gemma", "glm4moe", "qwen2_5", "phi3", "mistral"])
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_kept_history_adds_the_same_whatever_the_policy_says(name: str, data: st.DataObject) -> None:
    """One piece for any text that the family's end token ends, and the ids between the actions do not depend on it."""

    def between(texts: list[str]) -> list[list[int]]:
        dialogue = Dialogue(Renderer(tokenizer(name), history="keep"), QUESTION)
        for text in texts:
            assert isinstance(dialogue.complete([*encoded(name, text), end_id(name)], "stop"), dict)
            assert dialogue.extend(NEXT)
        (piece,) = dialogue.pieces()
        starts, ends = [start for _, start, _ in piece.turns], [end for _, _, end in piece.turns]
        return [piece.token_ids[end:start] for end, start in zip([0, *ends[:-1]], starts, strict=True)]

    said = data.draw(st.lists(st.one_of(st.just(THOUGHT), texts(FAMILIES[name])), min_size=2, max_size=3))
    assert between(said) == between(["Two."] * len(said))


def test_what_the_end_token_does_not_close_is_never_kept() -> None:
    """A turn that was ended by another token than the template's: no row of ids holds both."""
    for history in ("as_template", "keep"):
        dialogue = asked("qwen2_5", history=history)
        other = tokenizer("qwen2_5").convert_tokens_to_ids("<|endoftext|>")
        dialogue.complete([*encoded("qwen2_5", "Two."), other], "stop")
        assert not dialogue.extend(NEXT)
        assert dialogue.prompt_ids == template_ids("qwen2_5", dialogue.messages)


@pytest.mark.parametrize(
    "written",
    [
        "{{ 'be brief' if loop.last }}{{ m.content }}",  # moves what it wrote before
        "{{ 'to ' + messages[loop.index0 - 1].content if not loop.first }}{{ m.content }}",  # says it once more
        "{{ messages[loop.index0 - 1].content | length if not loop.first }}{{ m.content }}",  # depends on it
        "{{ m.content }}<|im_end|>{% break %}",  # leaves out the rest
    ],
)
def test_a_template_that_does_more_than_write_the_policys_turn_otherwise_is_never_kept(written: str) -> None:
    other = copy.deepcopy(tokenizer("qwen2_5"))
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}" + written + "{% else %}{{ m.content | trim }}"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    dialogue = Dialogue(Renderer(other, history="keep"), QUESTION)
    dialogue.complete([*encoded("qwen2_5", "Two. "), end_id("qwen2_5")], "stop")
    assert not dialogue.extend(NEXT)
    assert dialogue.prompt_ids == other.apply_chat_template(
        dialogue.messages, add_generation_prompt=True, return_dict=False
    )


def test_tool_calls_written_otherwise_start_a_piece() -> None:
    dialogue = Dialogue(renderer("qwen2_5"), QUESTION, TOOLS)
    ids = [*encoded("qwen2_5", CALL.replace(": ", ":")), end_id("qwen2_5")]
    dialogue.complete(ids, "stop")
    assert not dialogue.extend(RESULT)
    assert dialogue.prompt_ids == template_ids("qwen2_5", dialogue.messages, TOOLS)


def test_a_call_in_llama_3s_notation_goes_on() -> None:
    dialogue = Dialogue(renderer("llama3_1"), QUESTION, TOOLS)
    text = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
    message = dialogue.complete([*encoded("llama3_1", text), end_id("llama3_1")], "stop")
    assert isinstance(message, dict)
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": 2}
    assert dialogue.extend(RESULT)
    assert dialogue.prompt_ids == template_ids("llama3_1", dialogue.messages, TOOLS)


def test_channels_of_a_family_whose_template_knows_calls() -> None:
    dialogue = Dialogue(renderer("gptoss"), QUESTION, TOOLS)
    call_id = tokenizer("gptoss").convert_tokens_to_ids("<|call|>")
    text = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}'
    message = dialogue.complete([*encoded("gptoss", text), call_id], "stop")
    assert isinstance(message, dict)
    assert message["tool_calls"][0]["function"]["name"] == "add"
    assert dialogue.extend(RESULT)
    assert (
        tokenizer("gptoss")
        .decode(dialogue.prompt_ids)
        .endswith(
            '{"a": 1, "b": 2}<|call|><|start|>functions.add to=assistant<|channel|>commentary<|message|>"3"<|end|>'
            "<|start|>assistant"
        )
    )


def test_turns_that_no_special_token_delimits_are_counted_and_kept() -> None:
    dialogue = asked("vicuna")
    ids, prompt = encoded("vicuna", "Two."), list(dialogue.prompt_ids)
    dialogue.complete(ids, "length")
    assert dialogue.extend(NEXT)
    assert dialogue.prompt_ids[: len(prompt) + len(ids)] == prompt + ids
    assert tokenizer("vicuna").decode(dialogue.prompt_ids).endswith("Two.\nUSER: And 2 + 2?\nASSISTANT: ")
    assert dialogue.undelimited == 1


def test_a_tokenizer_that_puts_a_blank_before_every_text_puts_none_in_the_middle() -> None:
    other = copy.deepcopy(tokenizer("mistral"))
    other.chat_template = FAMILIES["vicuna"].chat_template()
    dialogue = Dialogue(Renderer(other), QUESTION)
    ids = other("Two.", add_special_tokens=False)["input_ids"]
    dialogue.complete(ids, "length")
    assert dialogue.extend(NEXT)
    added = dialogue.prompt_ids[dialogue.pieces()[0].turns[0][2] :]
    assert other.convert_ids_to_tokens(added)[0] == "\n"


# -- messages out of text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "thoughts", "content"),
    [
        ("qwen3", "<think>\n a \n</think>\n\n b", " a ", " b"),
        ("qwen3", "<think>\n\n</think>\n\nb", "", "b"),
        ("qwen3", "a <think>b</think> c", None, "a <think>b</think> c"),
        ("qwen3", "a</think>b", None, "a</think>b"),
        ("qwen3", "<think>\nand so", "and so", ""),
        ("qwen3", "<think>a</think>b</think>c", "a", "b</think>c"),
        ("qwen3_8", "a\n</think>\n\nb", "a", "b"),
        ("qwen3_8", "and so", "and so", ""),
        ("qwen3_8", "", "", ""),
        ("glm4moe", "\n<think>a</think>\nb", "a", "b"),
        ("qwen2_5", THOUGHT, None, THOUGHT),
    ],
)
def test_thoughts_are_divided_off_where_the_template_knows_them(
    name: str, text: str, thoughts: str | None, content: str
) -> None:
    expected = {"role": "assistant", "content": content}
    if thoughts is not None:
        expected["reasoning_content"] = thoughts
    assert asked(name).complete([*encoded(name, text), end_id(name)], "stop") == expected


def test_a_prompt_that_closes_the_thoughts_has_none_to_divide_off() -> None:
    dialogue = asked("qwen3", template_kwargs={"enable_thinking": False})
    assert tokenizer("qwen3").decode(dialogue.prompt_ids).endswith("<think>\n\n</think>\n\n")
    ids = [*encoded("qwen3", "Two."), end_id("qwen3")]
    assert dialogue.complete(ids, "stop") == {"role": "assistant", "content": "Two."}


def test_what_is_no_message_ends_the_rollout_and_keeps_its_tokens() -> None:
    dialogue = asked("qwen2_5")
    ids = [*encoded("qwen2_5", "<tool_call>\n{'name'}\n</tool_call>"), end_id("qwen2_5")]
    fault = dialogue.complete(ids, "stop")
    assert isinstance(fault, ParseFault)
    assert "JSON" in fault.reason
    assert sampled(dialogue.pieces()) == [ids]
    assert dialogue.messages[-1]["content"].startswith("<tool_call>")


def test_what_the_template_cannot_write_is_no_message() -> None:
    """Channels of gpt-oss in the content; two calls at once of Llama 3.1, whose template writes one."""
    dialogue = Dialogue(Renderer(tokenizer("gptoss")), QUESTION)
    fault = dialogue.complete(encoded("gptoss", "<|channel|>final<|message|>Two."), "length")
    assert isinstance(fault, ParseFault)
    assert "cannot write it" in fault.reason
    dialogue = Dialogue(Renderer(tokenizer("llama3_1"), parse=parse_tool_calls), QUESTION, TOOLS)
    fault = dialogue.complete([*encoded("llama3_1", f"{CALL}\n{CALL}"), end_id("llama3_1")], "stop")
    assert isinstance(fault, ParseFault)
    assert "single tool-calls" in fault.reason


def test_the_environments_hands_do_not_reach_in() -> None:
    opening, answer = copy.deepcopy(QUESTION), copy.deepcopy(NEXT)
    dialogue = Dialogue(renderer("qwen2_5"), opening)
    opening[0]["content"] = "changed"
    message = dialogue.complete([*encoded("qwen2_5", "Two."), end_id("qwen2_5")], "stop")
    assert isinstance(message, dict)
    message["content"] = "changed"
    assert dialogue.extend(answer)
    answer[0]["content"] = "changed"
    assert [m["content"] for m in dialogue.messages] == ["What is 1 + 1?", "Two.", "And 2 + 2?"]


# -- refusals, and prompts without turns -----------------------------------------------------------------------------


def test_messages_that_the_template_refuses_are_the_environments_fault() -> None:
    with pytest.raises(RefusedError, match=r"refuses the dialogue \(roles: user, user\).*Remedy"):
        Dialogue(renderer("gemma"), [*QUESTION, *NEXT])
    dialogue = asked("gemma")
    dialogue.complete([*encoded("gemma", "Two."), end_id("gemma")], "stop")
    with pytest.raises(RefusedError, match="roles: user, assistant, tool"):
        dialogue.extend(RESULT)
    with pytest.raises(RefusedError, match="without saying anything"):
        dialogue.extend([])
    with pytest.raises(RefusedError, match="opening message"):
        Dialogue(renderer("gemma"), [])
    with pytest.raises(RefusedError, match="known are as_template, keep"):
        renderer("gemma", history="forget")


@pytest.mark.parametrize("template", [True, False])
def test_a_text_prompt_is_completed_once(template: bool) -> None:
    plain = copy.deepcopy(tokenizer("llama3"))
    if not template:
        plain.chat_template = None
    dialogue = Dialogue(
        Renderer(plain), "One and one is" if template else [{"role": "user", "content": "One and one is"}]
    )
    assert plain.decode(dialogue.prompt_ids) == "One and one is"
    ids = [*plain(" two", add_special_tokens=False)["input_ids"], plain.eos_token_id]
    assert dialogue.complete(ids, "stop") == {"role": "assistant", "content": " two"}
    assert dialogue.pieces() == [
        Piece(dialogue.prompt_ids + ids, [(0, len(dialogue.prompt_ids), len(dialogue.prompt_ids) + len(ids))])
    ]
    with pytest.raises(RefusedError, match="completed once"):
        dialogue.extend(NEXT)


def test_a_text_prompt_begins_with_what_the_tokenizer_puts_in_front_and_does_not_end() -> None:
    from tokenizers.processors import TemplateProcessing

    dressed = copy.deepcopy(tokenizer("llama3"))
    ids = [(token, dressed.convert_tokens_to_ids(token)) for token in ("<|begin_of_text|>", "<|end_of_text|>")]
    dressed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=ids
    )
    assert dressed("a")["input_ids"] == [ids[0][1], *encoded("llama3", "a"), ids[1][1]]
    assert Dialogue(Renderer(dressed), "a").prompt_ids == [ids[0][1], *encoded("llama3", "a")]


def test_turns_need_a_chat_template() -> None:
    plain = copy.deepcopy(tokenizer("llama3"))
    plain.chat_template = None
    with pytest.raises(RefusedError, match=r"no chat template.*not 2 messages.*Remedy"):
        Dialogue(Renderer(plain), [*QUESTION, *NEXT])
    with pytest.raises(RefusedError, match="with tools"):
        Dialogue(Renderer(plain), QUESTION, TOOLS)
