"""Block-sparse attention over prefix trees: its mask, the blocks it computes, and what comes out (forward, on a CPU).

Its backward needs a GPU: there the trial in `block_attention` compares it before it is used.
"""

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from support.groups import branching_group, random_pairs
from support.models import VOCABULARY, make_tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from llmrl.learner import attention, batches, block_attention
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.prefix_tree import BLOCK, TreeLayout, pack
from llmrl.learner.sequences import Group, TokenSequence, completion


@st.composite
def forests(draw: Any) -> TreeLayout:
    """Layouts of two to five blocks: few distinct tokens, long common beginnings, branching at any depth."""
    groups: list[Group] = []
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for _ in range(draw(st.integers(1, 4))):
        stem = numbers.integers(0, 50, draw(st.integers(1, 200)))
        sequences = []
        for _ in range(draw(st.integers(1, 4))):
            cut = draw(st.integers(1, len(stem)))
            ids = np.concatenate([stem[:cut], numbers.integers(0, 50, draw(st.integers(0, 90)))])
            sequences.append(TokenSequence(ids, np.arange(len(ids)) > 0))
        groups.append(tuple(sequences))
    return pack(groups, whole_blocks=True).layout


def blocks_of(mask: Tensor) -> Tensor:
    """[T, T] -> [T / BLOCK, T / BLOCK, BLOCK * BLOCK]."""
    count = len(mask) // BLOCK
    return mask.view(count, BLOCK, count, BLOCK).transpose(1, 2).reshape(count, count, -1)


def evaluated(layout: TreeLayout, window: int | None) -> Tensor:
    """The mask function at every pair: [T, T]."""
    row = torch.arange(len(layout.positions))
    nothing = torch.zeros((), dtype=torch.int32)
    mask_mod = block_attention.block_mask(layout, window).mask_mod
    return mask_mod(nothing, nothing, row[:, None], row[None, :])


@given(forests(), st.none() | st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_the_mask_of_two_comparisons_is_the_trees(layout: TreeLayout, window: int | None) -> None:
    """`column <= row < subtree_end[column]`: exact because of the depth-first order."""
    assert torch.equal(evaluated(layout, window), layout.mask(window))


@given(forests())
@settings(max_examples=100, deadline=None)
def test_blocks_are_those_of_the_dense_mask(layout: TreeLayout) -> None:
    seen, whole = block_attention.block_occupancy(layout)
    blocks = blocks_of(layout.mask())
    assert torch.equal(seen, blocks.any(-1))
    assert torch.equal(whole, blocks.all(-1))


@given(forests(), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_blocks_in_a_window_miss_nothing_and_add_nothing(layout: TreeLayout, window: int) -> None:
    """A block that counts as seen by mistake costs time; one that is missed, or counts as whole, would be wrong."""
    seen, whole = block_attention.block_occupancy(layout, window)
    blocks = blocks_of(layout.mask(window))
    assert (seen | ~blocks.any(-1)).all()
    assert torch.equal(whole, blocks.all(-1))


def test_a_window_drops_the_blocks_that_it_cannot_reach() -> None:
    ids = np.arange(8 * BLOCK)
    layout = pack([(TokenSequence(ids, ids > 0),)], whole_blocks=True).layout
    seen, whole = block_attention.block_occupancy(layout, window=BLOCK)
    assert seen.sum() == 8 + 7
    assert not whole.any()


def test_the_block_mask_lists_partial_and_whole_blocks() -> None:
    """A prompt of two blocks and two answers of one block each, worked out by hand."""
    prompt = list(range(2 * BLOCK))
    layout = pack([(completion(prompt, [7] * BLOCK), completion(prompt, [8] * BLOCK))], whole_blocks=True).layout
    mask = block_attention.block_mask(layout)
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 1, 1]
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 2]
    assert [mask.full_kv_indices[0, 0, row, :n].tolist() for row, n in enumerate([0, 1, 2, 2])] == [
        [],
        [0],
        [0, 1],
        [0, 1],
    ]
    assert mask.full_q_num_blocks[0, 0].tolist() == [3, 2, 0, 0]
    assert block_attention.block_mask(layout) is mask


def test_filling_up_changes_no_place_and_is_seen_by_nobody(draw: np.random.Generator) -> None:
    groups = [branching_group(draw), *random_pairs(draw, 2)]
    plain, filled = pack(groups), pack(groups, whole_blocks=True)
    length = len(plain.token_ids)
    assert len(filled.token_ids) % BLOCK == 0
    assert len(filled.token_ids) == len(filled.layout.positions)
    np.testing.assert_array_equal(filled.token_ids[:length], plain.token_ids)
    assert all(np.array_equal(a, b) for a, b in zip(plain.places, filled.places, strict=True))
    mask = filled.layout.mask()
    assert torch.equal(mask[:length, :length], plain.layout.mask())
    assert not mask[:length, length:].any()
    assert not mask[length:, :length].any()
    assert int(filled.layout.positions[length:].max()) == 0


# -- attention -------------------------------------------------------------------------------------------------------


def random_layout(draw: np.random.Generator, num_blocks: int = 3) -> TreeLayout:
    prompt = draw.integers(0, 50, BLOCK + 30)
    group = tuple(completion(prompt, draw.integers(0, 50, n)) for n in (60, 40, (num_blocks - 2) * BLOCK - 110))
    return pack([group], whole_blocks=True).layout


def random_inputs(layout: TreeLayout, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """query, key, value as models have them: [1, heads, T, D], in memory [T, heads, D]."""
    return [torch.randn(1, len(layout.positions), n, 16).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention one operation at a time, as on a CPU it can be had for the forward at once."""
    monkeypatch.setattr(block_attention, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(block_attention, "_works", lambda kind: True)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_the_dense_mask(window: int | None, softcap: float | None, draw: np.random.Generator) -> None:
    layout = random_layout(draw, num_blocks=4)
    query, key, value = random_inputs(layout)
    with torch.no_grad():
        ours = block_attention.block_attention(query, key, value, layout, 0.3, window, softcap)
        grouped = [one.repeat_interleave(2, dim=1) for one in (key, value)]
        scores = query @ grouped[0].transpose(-1, -2) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        truth = scores.masked_fill(~layout.mask(window), float("-inf")).softmax(-1) @ grouped[1]
        ungrouped = attention._ungrouped(query, *grouped, layout, 0.3, window, softcap)
    assert ours is not None
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, ungrouped, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 12}),
        ("gemma2", {"sliding_window": 12, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}),
    ],
)
def test_whole_models_score_as_with_the_other_ways(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, draw: np.random.Generator
) -> None:
    groups = [branching_group(draw), *random_pairs(draw, 2)]
    model = make_tiny_model(kind, head_dim=16, **settings)
    learner = Learner(model, LearnerOptions(form="tree"), Accelerator(cpu=True), print)
    truth = learner.logprobs(groups)
    calls = []
    monkeypatch.setattr(batches, "pack", functools.partial(pack, whole_blocks=True))
    monkeypatch.setattr(block_attention, "_works", lambda kind: calls.append(kind) or True)
    for ours, true in zip(learner.logprobs(groups), truth, strict=True):
        for mine, theirs in zip(ours, true, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert calls
    assert {kind.has_window for kind in calls} == {"llama": {False}, "mistral": {True}, "gemma2": {True, False}}[kind]


def test_padded_rows_keep_the_soft_cap() -> None:
    """transformers' sdpa drops it in silence; the name that trees are registered under must not, trees or none."""
    model = make_tiny_model("gemma2", scale=6.0, sliding_window=12, attn_logit_softcapping=1.0, query_pre_attn_scalar=1)
    ids, mask = torch.randint(0, VOCABULARY, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0

    def logprobs(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[mask.bool()]

    truth = logprobs("eager")
    torch.testing.assert_close(logprobs(attention.NAME), truth, atol=1e-5, rtol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (logprobs("eager") - truth).abs().max() > 0.1  # it matters here


def test_one_kernel_serves_every_length(monkeypatch: pytest.MonkeyPatch, draw: np.random.Generator) -> None:
    """torch's compiler is asked once a kind: were a length compiled in, it would be for every micro-batch."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(block_attention, "_compiled", lambda: compiled)
    monkeypatch.setattr(block_attention, "_works", lambda kind: True)
    try:
        for window, softcap, kinds in ((None, None, 1), (50, None, 2), (60, None, 2), (50, 2.0, 3)):
            for num_blocks in (3, 4, 8, 13):
                layout = random_layout(draw, num_blocks)
                with torch.no_grad():
                    inputs = random_inputs(layout)
                    assert block_attention.block_attention(*inputs, layout, 0.3, window, softcap) is not None
            assert counter.frame_count == kinds
    finally:
        torch._dynamo.reset()


def test_what_cannot_be_compiled_gets_the_dense_mask_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, draw: np.random.Generator
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(block_attention, "_compiled", lambda: failing)
    block_attention._works.cache_clear()
    layout = random_layout(draw)
    inputs = random_inputs(layout)
    with pytest.warns(UserWarning, match=r"no such kernel.*dense mask"):
        assert block_attention.block_attention(*inputs, layout, 0.3) is None
    with warnings.catch_warnings(action="error"):  # the second time it is known
        assert block_attention.block_attention(*inputs, layout, 0.3) is None
    block_attention._works.cache_clear()


@pytest.mark.parametrize("wrong", ["mask", "gradient", "nothing"])
def test_a_wrong_kernel_is_found_by_the_trial(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial with a dense stand-in for the kernel: right, with a causal mask, with half of a key's gradient."""
    kind = block_attention.Kind(torch.device("cpu"), torch.float32, 4, 2, 16, True, 0.25, 5.0)
    layout = block_attention._trial_layout(kind.device)
    mask = layout.mask(150) if wrong != "mask" else torch.ones(640, 640, dtype=torch.bool).tril()

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        key = (key + key.detach()) / 2 if wrong == "gradient" else key
        return block_attention._dense(query, key, value, mask, kind)

    monkeypatch.setattr(block_attention, "_attend", stand_in)
    assert (block_attention._trial_error(kind) > block_attention.TRIAL_TOLERANCE) == (wrong != "nothing")


def test_the_trials_blocks_are_of_all_sorts() -> None:
    layout = block_attention._trial_layout(torch.device("cpu"))
    for window in (None, 150):
        seen, whole = block_attention.block_occupancy(layout, window)
        below = torch.ones_like(seen).tril(-1)
        assert whole.any() or window
        assert (seen & ~whole & below).any()
        assert (~seen & below).any()


def test_a_row_that_is_not_whole_blocks_is_left_to_the_dense_mask(draw: np.random.Generator) -> None:
    layout = pack(random_pairs(draw, 2)).layout
    assert block_attention.block_attention(*random_inputs(layout), layout, 0.3) is None
