"""The seam for other kinds of attention, proved by one: causal linear attention.

It keeps a state of constant size in place of keys, and touches nothing but model.attention_layers;
training, prefill, decode, generation, the memory plan and locality follow. Copy it to begin a fork.
"""

import pytest
import torch
import torch.nn.functional as F
from test_model import PROMPTS, close, randomize, tiny, tokens_of

import model as nano
from convert_sft import memory_plan
from eval import information_gap
from model import Cache, Rollout, generate


class LinearAttention:
    """o_i = phi(q_i) S_i / (phi(q_i) z_i), where S_i and z_i sum phi(k_j) v_j and phi(k_j) over
    j <= i, and phi(x) = elu(x) + 1 (arXiv 2006.16236)."""

    def __init__(self, config, window):
        self.config = config

    def sums(self, k, v, groups):
        """k, v (..., Hkv, D) -> the terms of S (..., H, D, D) and of z (..., H, D)."""
        k, v = (x.repeat_interleave(groups, -2) for x in (F.elu(k) + 1, v))
        return k[..., :, None] * v[..., None, :], k

    def read(self, q, S, z):
        q = F.elu(q) + 1
        return torch.einsum("...d,...de->...e", q, S) / (q * z).sum(-1, keepdim=True)

    def row(self, q, k, v, S=0, z=0):
        """A row (T, H, D) after the state (S, z) -> outputs and the states after each token."""
        terms, ks = self.sums(k, v, q.shape[-2] // k.shape[-2])
        S, z = S + terms.cumsum(0), z + ks.cumsum(0)
        return self.read(q, S, z), S, z

    def full(self, q, k, v, cu_seqlens=None):
        ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        rows = [[self.row(q[b, i:j], k[b, i:j], v[b, i:j])[0] for i, j in zip(ends, ends[1:])]
                for b in range(len(q))]
        return torch.stack([torch.cat(row) for row in rows])

    def empty_cache(self, slots, length, **kind):
        H, D = self.config.num_attention_heads, self.config.head_dim
        return torch.zeros(slots, H, D, D, **kind), torch.zeros(slots, H, D, **kind)

    def prefill(self, cache, q, k, v, chunk):
        (S, z), outputs = cache, []
        ends = chunk.cu_seqlens.tolist()
        for slot, i, j in zip(chunk.slots, ends, ends[1:]):
            past = (S[slot], z[slot]) if chunk.start else ()  # a slot's last owner left its own
            o, states, sums = self.row(q[0, i:j], k[0, i:j], v[0, i:j], *past)
            S[slot], z[slot] = states[-1], sums[-1]
            outputs.append(o)
        return torch.cat(outputs)[None]

    def decode(self, cache, q, k, v, position):
        S, z = (state[:len(q)] for state in cache)
        terms, ks = self.sums(k, v, q.shape[1] // k.shape[1])
        running = position > 0  # a prompt of one token has no prefill that would reset its slot
        S.copy_(S * running[:, None, None, None] + terms)
        z.copy_(z * running[:, None, None] + ks)
        return self.read(q, S, z)


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    monkeypatch.setattr(nano, "attention_layers", lambda config: [
        LinearAttention(config, window) for window in config.windows])


def test_packed_rows_are_separate_rows():
    ours, lengths = tiny(), [1, 5, 13, 2]
    x = tokens_of(1, sum(lengths))
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    close(ours(x, cu_seqlens), torch.cat([ours(part) for part in x.split(lengths, 1)], 1))
    assert (ours(x) - ours(x, cu_seqlens)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prefill_tokens", [3, 16, 8192])
def test_generation_is_the_training_forward(monkeypatch, prefill_tokens):
    """Slots are used again, prompts come in chunks, packed and shared, some of one token."""
    monkeypatch.setattr(nano, "PREFILL_TOKENS", prefill_tokens)
    ours = randomize(tiny(full_layers=(1,)))
    for slots in (1, 4, None):
        rollouts = generate(ours, PROMPTS[::-1], 12, 0.9, stop_ids={7, 8}, slots=slots, seed=1)
        for r in rollouts:
            ids = torch.tensor([r.prompt + r.tokens])
            logp = ours(ids[:, :-1], targets=ids[:, 1:], temperature=0.9)
            expected = logp[0, len(r.prompt) - 1:].float()
            close(torch.tensor(r.logprobs), expected, 1e-5)
    assert len({len(r.tokens) for r in rollouts}) > 1


def test_the_state_has_a_constant_size():
    config = tiny().config
    H, D, layers = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    for length in (10, 10_000):
        assert Cache.bytes_per_slot(config, length, torch.bfloat16) == 2 * layers * H * D * (D + 1)
    plans = [memory_plan(config, 10, slots=8, length=n) for n in (10, 10_000)]
    assert plans[0] == plans[1]


def test_locality_measures_this_attention():
    """The gap against a second forward of the last tokens, not against a window's."""
    ours, window = tiny(), 6
    ids = tokens_of(20).tolist()
    [gap] = information_gap(ours, [Rollout(ids[:5], ids[5:], [], True)], window)
    for at in range(window + 1, 20):
        full, short = (ours(torch.tensor([x]))[0, -1].log_softmax(-1)[ids[at]]
                       for x in (ids[:at], ids[at - window:at]))
        assert abs(gap[at - 5] - (full - short)) < 1e-10
    assert gap.abs().max() > 1e-3
