"""The boundary between prompt and completion, for tokenizers of every kind: properties that hold for any text."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, PreTrainedTokenizerFast

from llmrl.data.faults import RowFault
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template, check_vocabulary
from llmrl.errors import RefusedError

Tokenizers = dict[str, PreTrainedTokenizerFast]

PLAIN = ("plain", "bos", "bos_and_eos", "sentencepiece", "merging")
CHAT = ("chat", "chat_without_newline", "merging_chat", "sentencepiece_chat")
# Words, digits and blanks from which the tokenizers have merges, and any other character.
pieces = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "The", " quick", "12", "3", " = ", "Answer:", "answer", "é", "日本", "😀"]
)
texts = st.lists(pieces | st.characters(exclude_categories=("Cs", "Cc")), max_size=12).map("".join)
marks = st.sampled_from(["", "<|im_start|>", "<|im_end|>", "</s>", "<|im_"])
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded_plain(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> tuple[Encoder, Encoded]:
    encoder = Encoder(tokenizer)
    ((encoded,),) = encoder.plain([prompt], [[completion]])
    return encoder, encoded


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", PLAIN)
@relaxed
@given(texts, texts)
@example("2+2=", " 4")
@example("The answer is ", "12")
@example("The qui", "ck brown fox")
@example("Question\n", "\nAnswer: 12")
@example("", "12")
@example("é", "\u0301")
def test_plain_text_is_divided_at_the_boundary(tokenizers: Tokenizers, name: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizers[name]
    encoder, encoded = encoded_plain(tokenizer, prompt, completion)
    eos = tokenizer.eos_token_id
    alone = tokenizer(prompt)["input_ids"]
    # The prompt's ids are those that generation starts from, so none of its tokens is scored.
    assert encoded.prompt_ids == (alone[:-1] if name == "bos_and_eos" else alone)
    assert encoded.completion_ids[-1] == eos
    assert encoded.completion_ids.count(eos) == 1
    assert eos not in encoded.prompt_ids
    body = (encoded.prompt_ids + encoded.completion_ids)[len(encoder.start_ids) : -1]
    assert encoder.decode(body) == encoder.decode(encoder.ids([prompt + completion])[0])
    # All these tokenizers keep every character, so that the joint text is the text itself.
    assert encoder.decode(body) == prompt + completion


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "merging"])
def test_ids_are_those_of_the_joint_text_where_the_prompt_ends_on_a_token(tokenizers: Tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]
    prompt, completion = "What is 12 + 30?\n", "10 + 30 = 40"
    encoder, encoded = encoded_plain(tokenizer, prompt, completion)
    joint = encoder.ids([prompt + completion])[0]
    assert joint[: len(encoder.ids([prompt])[0])] == encoder.ids([prompt])[0]
    assert encoded.prompt_ids + encoded.completion_ids == [*encoder.start_ids, *joint, tokenizer.eos_token_id]
    assert not encoded.retokenised


def test_a_token_across_the_boundary_is_made_of_two_and_counted(tokenizers: Tokenizers) -> None:
    encoder, encoded = encoded_plain(tokenizers["plain"], "The qui", "ck brown")
    assert encoder.ids(["The qui"])[0] != encoder.ids(["The quick brown"])[0][: len(encoder.ids(["The qui"])[0])]
    assert encoded.retokenised
    assert encoder.decode(encoded.completion_ids) == "ck brown</s>"


def test_a_blank_added_before_every_text_does_not_slip_in_between(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["sentencepiece"]
    encoder, encoded = encoded_plain(tokenizer, "The qui", "ck")
    assert encoder.decode(encoder.ids(["ck"])[0] * 2) == "ck ck"
    assert encoded.retokenised
    assert encoder.decode(encoded.prompt_ids[1:] + encoded.completion_ids) == "The quick</s>"


@pytest.mark.parametrize("ending", ["</s>", "</s></s>"])
def test_an_end_that_is_written_out_is_not_doubled(tokenizers: Tokenizers, ending: str) -> None:
    _, with_end = encoded_plain(tokenizers["plain"], "2+2=", " 4" + ending)
    _, without = encoded_plain(tokenizers["plain"], "2+2=", " 4")
    assert with_end == without


@pytest.mark.parametrize("name", CHAT)
@relaxed
@given(st.tuples(texts, marks, texts).map("".join), texts, st.booleans())
@example("a", "\n\n12", False)
@example("a", " ", True)
@example("a<|im_start|>", "12", True)
def test_a_dialogue_is_divided_at_the_boundary(
    tokenizers: Tokenizers, name: str, question: str, answer: str, system: bool
) -> None:
    tokenizer = tokenizers[name]
    encoder = Encoder(tokenizer)
    prompt = [said("system", "The fox.")] * system + [said("user", question)]
    row = encoder.rendered([prompt], [[[said("assistant", answer)]]], [{}])[0]
    assert not isinstance(row, RowFault)
    (encoded,) = row
    seen = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert encoded.prompt_ids == encoder.ids([seen])[0]
    joint = encoder.ids([seen + answer + "<|im_end|>"])[0]
    assert encoder.decode(encoded.prompt_ids + encoded.completion_ids) == encoder.decode(joint)
    assert encoded.retokenised == (joint[: len(encoded.prompt_ids)] != encoded.prompt_ids)
    assert encoded.retokenised or joint == encoded.prompt_ids + encoded.completion_ids
    assert encoded.completion_ids[-1] == tokenizer.eos_token_id
    assert encoded.completion_ids.count(tokenizer.eos_token_id) == 1
    assert encoded.ends


def test_without_a_stop_token_the_whole_completion_is_kept_and_said_not_to_end(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["chat"]
    encoder = Encoder(tokenizer)
    encoder.stop_ids = frozenset({0})
    row = encoder.rendered([[said("user", "a")]], [[[said("assistant", "12")]]], [{}])[0]
    assert not isinstance(row, RowFault)
    assert not row[0].ends
    assert encoder.decode(row[0].completion_ids) == "12<|im_end|>\n"


def test_stop_tokens_of_the_generation_configuration_count(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["plain"]
    encoder = Encoder(tokenizer, stop_token_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert encoder.stop_ids == {2, 4}


TEMPLATES = {
    "an empty thought is in the prompt only": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>\n{% endif %}",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>\n",
    ),
    "blanks around an answer are removed": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
    ),
}


def templated(tokenizer: PreTrainedTokenizerFast, template: str) -> Encoder:
    changed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    return Encoder(changed)


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_with_a_will_of_their_own(plain: PreTrainedTokenizerFast, case: str) -> None:
    template, seen = TEMPLATES[case]
    encoder = templated(plain, template)
    row = encoder.rendered([[said("user", "a")]], [[[said("assistant", " 12 ")], [said("assistant", "3")]]], [{}])[0]
    assert not isinstance(row, RowFault)
    assert {encoder.decode(e.prompt_ids) for e in row} == {seen}
    assert encoder.decode(row[1].completion_ids) == "3<|im_end|>"
    assert encoder.decode(row[0].completion_ids).strip() == ("12<|im_end|>" if "trim" in template else "12 <|im_end|>")
    assert row[0].rerendered == ("<think>" in template)


def test_a_template_that_changes_the_prompt_itself_is_a_fault(plain: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}<|im_end|>{% endfor %}"
    row = templated(plain, template).rendered([[said("user", "a")]], [[[said("assistant", "b")]]], [{}])[0]
    assert isinstance(row, RowFault)
    assert "chat_template_kwargs" in str(row)


def test_a_row_that_the_template_refuses_is_a_fault_and_the_others_are_not(plain: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    prompts = [[said("user", "a")], [said("system", "s"), said("user", "a")], [said("user", "b")]]
    rows = templated(plain, template).rendered(prompts, [[[said("assistant", "12")]]] * 3, [{}] * 3)
    assert [isinstance(row, RowFault) for row in rows] == [False, True, False]
    assert "no system turn" in str(rows[1])


def test_tools_and_template_arguments_reach_the_template(plain: PreTrainedTokenizerFast) -> None:
    template = (
        "{% if tools %}{{ tools | length }} tools {% endif %}{% if loud %}LOUD {% endif %}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    encoder = templated(plain, template)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    extras = [{"tools": [tool]}, {"tools": None, "loud": True}, {"tools": None}]
    rows = encoder.rendered([[said("user", "a")]] * 3, [[[said("assistant", "12")]]] * 3, extras)
    begins = [encoder.decode(row[0].prompt_ids) for row in rows if not isinstance(row, RowFault)]
    assert begins == ["1 tools a<|im_end|>", "LOUD a<|im_end|>", "a<|im_end|>"]


def test_a_model_that_embeds_fewer_ids_than_the_tokenizer_makes_is_refused(plain: PreTrainedTokenizerFast) -> None:
    size = max(plain.get_vocab().values()) + 1
    check_vocabulary(plain, GPT2Config(vocab_size=size))
    check_vocabulary(plain, GPT2Config(vocab_size=size + 64))
    with pytest.raises(RefusedError, match=rf"has id {size - 1}.*embeds only {size - 1} ids"):
        check_vocabulary(plain, GPT2Config(vocab_size=size - 1))


def test_a_tokenizer_without_a_template_cannot_take_dialogues(tokenizers: Tokenizers) -> None:
    check_chat_template(tokenizers["chat"], "d.jsonl")
    with pytest.raises(RefusedError, match=r"d\.jsonl.*no chat template"):
        check_chat_template(tokenizers["plain"], "d.jsonl")


def test_plain_text_needs_an_end_token(plain: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    with pytest.raises(RefusedError, match="no EOS token"):
        Encoder(endless).plain(["a"], [["b"]])


def test_where_cutting_a_prompt_changes_its_ids_it_is_not_cut(chat: PreTrainedTokenizerFast) -> None:
    prompt, answers = [said("user", "The quick brown fox")], [[said("assistant", "12")], [said("assistant", "\n")]]
    whole, cut = Encoder(chat), Encoder(chat)
    cut.marks = ["ick"]
    begin, end, whole_ids = cut.ids(["The qu", "ick", "The quick"])
    assert begin + end != whole_ids
    assert cut.rendered([prompt], [answers], [{}]) == whole.rendered([prompt], [answers], [{}])
    assert cut.marks == []
