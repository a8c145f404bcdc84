"""DPO on the same packed rows in plain PyTorch: the cost of a training step without Megatron and without our package.

Prefix-shared rows, attention per pair at its true length, log-probs in chunks whose logits are computed again in the
backward pass, and AdamW: the same floating-point operations as a step of `megatron-spo train`, and the same losses.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Turn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from megatron_spo.data.rows import PackedRow

CHUNK = 2**24
"""Number of logits that are computed at a time."""


class Llama(nn.Module):
    """A Llama with the weights of a transformers model; query, key, value and gate, up are fused matrices."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        source = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = source.config
        self.heads, self.groups, self.eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        self.size = config.hidden_size // self.heads
        self.frequencies = source.model.rotary_emb.inv_freq
        self.embedding = nn.Parameter(source.model.embed_tokens.weight.detach().clone())
        self.norm, self.head = source.model.norm.weight, source.lm_head.weight
        self.layers = nn.ParameterList()
        for layer in source.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            parts = (
                layer.input_layernorm.weight,
                torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
            )
            self.layers.append(nn.ParameterList([nn.Parameter(part.detach().clone()) for part in parts]))

    def forward(self, row: PackedRow) -> Tensor:
        """Returns the log-prob sums of a row in nats, [pairs, 2] (chosen, rejected)."""
        x = self.embedding[torch.from_numpy(row.tokens)]
        angles = torch.outer(torch.from_numpy(row.positions).float(), self.frequencies).repeat(1, 2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        for norm, qkv, out, second_norm, up, down in self.layers:
            q, k, v = F.linear(self._normed(x, norm), qkv).view(len(x), -1, self.size).split(
                [self.heads, self.groups, self.groups], dim=1
            )  # fmt: skip
            q, k = q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin
            x = x + F.linear(self._attention(q, k, v, row), out)
            gate, value = F.linear(self._normed(x, second_norm), up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * value, down)
        hidden = self._normed(x, self.norm)[torch.from_numpy(row.predict_at)]
        size = max(1, CHUNK // len(self.head))
        targets = torch.from_numpy(row.targets)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        logprobs = torch.cat([checkpoint(_logprobs, h, self.head, t, use_reentrant=False) for h, t in parts])
        scored = logprobs[torch.from_numpy(row.score_index)].split(row.score_lengths.tolist())
        return torch.stack([part.sum() for part in scored]).view(-1, 2)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
        """Returns [T, heads * size]: causal over shared tokens and chosen tail; the rejected tail skips the chosen."""
        outs = []
        for start, shared, chosen, rejected in row.segments.tolist():
            first = slice(start, start + shared + chosen)
            tail = slice(first.stop, first.stop + rejected)
            outs.append(_attend(q[first], k[first], v[first], is_causal=True))
            seen = (torch.cat([part[start : start + shared], part[tail]]) for part in (k, v))
            mask = torch.ones(rejected, shared + rejected, dtype=torch.bool).tril(shared)
            outs.append(_attend(q[tail], *seen, attn_mask=mask))
        return torch.cat(outs).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, **masking: Any) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **masking)[0].transpose(0, 1)


def _half_turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


def _logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, head), targets, reduction="none")


def steps(folder: Path, batches: Sequence[Sequence[PackedRow]], *, lr: float, beta: float = 0.1) -> Turn:
    """Runs one training step per batch; the reference is the initial model, computed before and not timed."""
    model = Llama(folder)
    with torch.no_grad():
        references = [[model(row) for row in rows] for rows in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    turn, begin = Turn(), 0.0
    for number, (rows, known) in enumerate(zip(batches, references, strict=True)):
        pairs, loss = sum(len(row.pairs) for row in rows), 0.0
        for row, reference in zip(rows, known, strict=True):
            ratios = model(row) - reference
            objective = -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).sum() / pairs
            objective.backward()
            loss += float(objective.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = time.process_time()
        turn.lines.append({"loss": loss})
        if number:
            turn.seconds.append(end - begin)
        begin = end
    return turn
