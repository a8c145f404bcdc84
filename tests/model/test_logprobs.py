"""Compares the chunked head with a plain log-softmax."""

import pytest
import torch

from tests.support.megatron import one_process


@pytest.mark.parametrize("chunk", [16 * 50, 2**24])
def test_values_and_gradients(monkeypatch, chunk):
    one_process()
    from megatron_spo.model import logprobs

    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    scale = torch.randn(37, generator=generator)
    ours, entropies = logprobs.VocabParallelLogProb.apply(hidden, weight, targets, 0, None)
    ours_gradients = torch.autograd.grad((ours * scale).sum(), (hidden, weight))
    plain = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((plain * scale).sum(), (hidden, weight))
    torch.testing.assert_close(ours, plain)
    expected = torch.distributions.Categorical(logits=hidden @ weight.t()).entropy()
    torch.testing.assert_close(entropies, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_bf16_logits_have_the_digits_of_fp32():
    """Also where a CPU multiplies by its bf16 instructions; the setting for them is as before afterwards."""
    one_process()
    from megatron_spo.model.logprobs import VocabParallelLogProb

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(90, 256, generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(3000, 256, generator=generator, dtype=torch.bfloat16)
    targets = torch.randint(0, 3000, (90,), generator=generator)
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(settings, "fp32_precision", None)
    ours, _ = VocabParallelLogProb.apply(hidden, weight, targets, 0, None)
    assert getattr(settings, "fp32_precision", None) == before
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-5)


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    """Logits exist for one chunk only: it is the largest tensor, for any number of tokens."""
    one_process()
    from megatron_spo.model import logprobs

    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 64 * 1000)
    largest = 0
    original = logprobs._product

    def watched(left: torch.Tensor, right: torch.Tensor, name: str) -> torch.Tensor:
        nonlocal largest
        product = original(left, right, name)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(logprobs, "_product", watched)
    hidden = torch.randn(500, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    logprobs.VocabParallelLogProb.apply(hidden, weight, torch.arange(500), 0, None)[0].sum().backward()
    assert largest == 64 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_used_again_mixes_no_rows_and_no_models(monkeypatch, dtype):
    """As in a pipeline, two rows are computed before the backward pass of the first; here by two models, the second
    with a smaller vocabulary. The first pass is one without gradients."""
    one_process()
    from megatron_spo.model import logprobs

    generator = torch.Generator().manual_seed(0)
    rows = []
    for entries, vocab in ((40, 60), (30, 50)):
        hidden, weight = (
            torch.randn(size, 8, generator=generator).to(dtype).requires_grad_() for size in (entries, vocab)
        )
        rows.append((hidden, weight, torch.randint(0, vocab, (entries,), generator=generator), 0, None))

    def backward(row, logprob):
        return torch.autograd.grad(logprob.sum(), row[:2])

    alone = []
    for row in rows:
        monkeypatch.setattr(logprobs, "KEPT", {})
        alone.append(backward(row, logprobs.VocabParallelLogProb.apply(*row)[0]))
    monkeypatch.setattr(logprobs, "KEPT", {})
    with torch.inference_mode():
        logprobs.VocabParallelLogProb.apply(*rows[0])
    first, second = (logprobs.VocabParallelLogProb.apply(*row)[0] for row in rows)
    found = [backward(rows[0], first), backward(rows[1], second)]
    torch.testing.assert_close(found, alone, rtol=0, atol=0)
    kept = {name: memory.data_ptr() for name, memory in logprobs.KEPT.items()}
    assert set(kept) >= {"logits", "shares"} and ("d_weight" in kept) == (dtype == torch.bfloat16)
    backward(rows[0], logprobs.VocabParallelLogProb.apply(*rows[0])[0])
    assert kept == {name: memory.data_ptr() for name, memory in logprobs.KEPT.items()}


def test_no_scored_tokens(tmp_path):
    one_process()
    from megatron_spo.model.logprobs import VocabParallelLogProb

    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    VocabParallelLogProb.apply(hidden, weight, torch.zeros(0, dtype=torch.long), 0, None)[0].sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(9, 4))
