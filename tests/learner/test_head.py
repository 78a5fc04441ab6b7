"""The chunked head against full logits: values, gradients, and what it holds in memory."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from llmrl.learner import head

CASES = list(itertools.product([None, 5.0], [1.0, 0.3], [1.0, 0.7], [True, False], [True, False], [True, False]))


def full(layer: nn.Linear, hidden: Tensor, targets: Tensor, transform: head.LogitTransform) -> tuple[Tensor, Tensor]:
    logits = nn.functional.linear(hidden, layer.weight, layer.bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_p = (logits / transform.temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("softcap", "scale", "temperature", "bias", "entropy", "frozen"), CASES)
def test_equals_full_logits(
    monkeypatch: pytest.MonkeyPatch,
    softcap: float | None,
    scale: float,
    temperature: float,
    bias: bool,
    entropy: bool,
    frozen: bool,
) -> None:
    monkeypatch.setattr(head, "MAX_CHUNK_ROWS", {"cpu": 7})
    monkeypatch.setattr(head, "KEPT_ELEMENTS", {"cpu": 14 * 31})  # two chunks of four
    torch.manual_seed(0)
    layer = nn.Linear(16, 31, bias=bias).requires_grad_(not frozen)
    head.install(layer)
    hidden = torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(0, 31, (23,))
    transform = head.LogitTransform(scale, softcap, temperature)
    by_logprob, by_entropy = torch.randn(23), torch.randn(23) * float(entropy)

    def gradients(logprobs: Tensor, entropies: Tensor) -> list[Tensor]:
        loss = (logprobs * by_logprob).sum() + ((entropies * by_entropy).sum() if entropy else 0.0)
        wanted = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(loss, wanted))

    logprobs, entropies = layer(hidden, targets, transform, entropy)
    true_logprobs, true_entropies = full(layer, hidden, targets, transform)
    torch.testing.assert_close(logprobs, true_logprobs, atol=1e-5, rtol=1e-5)
    if entropy:
        torch.testing.assert_close(entropies, true_entropies, atol=1e-5, rtol=1e-5)
    for ours, true in zip(gradients(logprobs, entropies), gradients(true_logprobs, true_entropies), strict=True):
        torch.testing.assert_close(ours, true, atol=5e-6 * float(true.abs().max()), rtol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_weights_gradient_changes_nothing_but_work(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(head, "MAX_CHUNK_ROWS", {"cpu": 7})
    torch.manual_seed(0)
    layer = nn.Linear(16, 31)
    head.install(layer)
    hidden, targets, upstream = torch.randn(23, 16), torch.randint(0, 31, (23,)), torch.randn(23)

    def gradients(kept_rows: int) -> tuple[list[Tensor], int]:
        monkeypatch.setattr(head, "KEPT_ELEMENTS", {"cpu": kept_rows * 31})
        computed = []
        monkeypatch.setattr(head, "_raw_logits", lambda *given: computed.append(1) or raw_logits(*given))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (layer(hidden, targets, head.LogitTransform(softcap=softcap), False)[0] * upstream).sum()
        return list(torch.autograd.grad(loss, list(layer.parameters()))), len(computed)

    raw_logits = head._raw_logits
    never, eight = gradients(0)
    for kept_rows, chunks in ((15, 6), (10**6, 4)):  # of four chunks: two kept, all kept
        found, count = gradients(kept_rows)
        assert (eight, count) == (8, chunks)
        for ours, plain in zip(found, never, strict=True):
            torch.testing.assert_close(ours, plain, atol=(1e-2 if dtype == torch.bfloat16 else 1e-6), rtol=1e-2)


def test_without_gradients_no_jacobian_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is trained stays one under no_grad."""
    made = []
    minus_at = head._minus_at
    monkeypatch.setattr(head, "_minus_at", lambda *given: made.append(1) or minus_at(*given))
    layer = nn.Linear(16, 31)
    head.install(layer)
    hidden = torch.randn(23, 16, requires_grad=True)
    given = (hidden, torch.zeros(23, dtype=torch.long), head.LogitTransform(), False)
    with torch.no_grad():
        scored = layer(*given)[0]
    assert not made
    assert torch.equal(layer(*given)[0], scored)
    assert made


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 11).double()
    head.install(layer)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 3, 10])
    # The head works in float32 inside, so the differences are taken wide and compared loosely.
    assert torch.autograd.gradcheck(
        lambda h: layer(h, targets, head.LogitTransform(), False)[0], hidden, eps=1e-2, atol=1e-3, rtol=1e-2
    )


def test_without_targets_the_layer_is_what_it_was() -> None:
    layer = nn.Linear(5, 11)
    hidden = torch.randn(4, 5)
    before = layer(hidden)
    head.install(layer)
    assert torch.equal(layer(hidden), before)


@pytest.mark.parametrize("vocabulary", [4096, 131072])
def test_no_tensor_of_tokens_times_vocabulary_is_held(vocabulary: int) -> None:
    """What a frozen head keeps and makes at once stays far below one [N, V] matrix, in forward and backward."""
    rows, width = 2048, 32
    layer = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    head.install(layer)
    hidden, targets = torch.randn(rows, width, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(hidden, targets, head.LogitTransform(), False)[0].sum().backward()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest <= head.CHUNK_ELEMENTS["cpu"] * 4
    assert largest < rows * vocabulary * 4 / 3
