"""The model: transformer, ring cache, generation, Hugging Face folders, tokenizer.

One decoder-only transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) covers Qwen2/Qwen2.5,
Qwen3 and the Llama family, with Hugging Face's parameter names, so that real weights load without
renaming or permuting. Sliding-window attention (SWA) is one number in the config, `window`; full
self-attention (SA) is `window=None` on the same code path.

The blocks do not know about windows or caches. They call a function `attend(layer, q, k, v)`, and
training, prefill and decode differ in that function alone. What it does stands in one class,
SlidingWindow: to try another attention, replace that class.

Left out on purpose: mixture of experts, dropout, quantisation, tensor parallelism, paged caches (a
ring has constant size, so there is nothing to page), RoPE scalings other than Llama-3's.

    python eval.py --model out/tiny/rl-w24 --prompt "a3b0c4d1?"
    python -m pytest tests/test_model.py
"""

import copy
import hashlib
import json
import math
import os
import re
import reprlib
import sys
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import cache, cached_property, partial, reduce, wraps
from pathlib import Path
from types import BuiltinMethodType

import regex  # comes with tiktoken
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from swa_kernel import swa_attention, swa_decode

# Elements of one chunk of logits: 256 MB in float32, whatever the vocabulary
LOGITS_PER_CHUNK = 2**26
PREFILL_TOKENS = 8192  # tokens of one prefill forward; longer prompts go chunk by chunk


@dataclass
class ModelConfig:
    """A config.json, under Hugging Face's names, plus the window.

    window: keys a query sees, its own included (`0 <= i - j < window`), or None for full attention.
    sinks: the first so many tokens, which every query sees beside the window.
    full_layers: indices of layers that keep full attention in a windowed model (hybrids).
    nope_full: those layers without RoPE. Sinks and this other libraries cannot open.
    extra: whatever else config.json says, written back unchanged.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    window: int | None = None
    sinks: int = 0
    full_layers: tuple[int, ...] = ()
    nope_full: bool = False
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        check_window(self.window)
        if self.window is None:
            self.sinks = 0
        if not 0 <= self.sinks < self.max_position_embeddings:
            raise UsageError(f"sinks {reprlib.repr(self.sinks)}: give a whole number of at least 0 "
                             f"and below the model's {self.max_position_embeddings} positions")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UsageError(f"head_dim {self.head_dim}: RoPE turns pairs, give an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(f"{self.num_attention_heads} attention heads are no multiple of "
                             f"{self.num_key_value_heads} KV heads: groups must be equal")
        self.full_layers = tuple(sorted(set(self.full_layers)))
        if any(not 0 <= i < self.num_hidden_layers for i in self.full_layers):
            raise UsageError(f"full layers {self.full_layers}: this model's layers are 0 to "
                             f"{self.num_hidden_layers - 1}")

    @property
    def windows(self):
        """The window of each layer."""
        return [None if i in self.full_layers else self.window
                for i in range(self.num_hidden_layers)]


def check_window(window):
    whole = isinstance(window, int) and not isinstance(window, bool)
    if window is not None and not (whole and 1 <= window < 2**31):
        raise UsageError(f"window {reprlib.repr(window)}: give a whole number of keys >= 1, "
                         "or full for full attention")


# --------------------------------------------------------------------------------------------------
# transformer


def rope_frequencies(config):
    """Angles per position, (D/2,) float32, half-split convention; Llama-3's scaling if asked for.

    Source: arXiv 2104.09864; the scaling as in transformers' `rope_type: llama3`.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched; 1: fast, kept
    return (1 - smooth) * frequency / factor + smooth * frequency


def rope_tables(positions, frequencies, dtype):
    """positions (B or 1, T) -> cos and sin, each (B or 1, T, 1, D); sin with rotate's signs."""
    angle = positions[..., None].float() * frequencies  # (B or 1, T, D/2), float32 as transformers
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]


def rotate(x, rope):
    """x (B, T, H, D) turned by its positions."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(x.dtype)  # CUDA's autocast computes it in float32 and leaves it there


class Attention(nn.Module):
    """The projections around an attention that is handed in."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        bias = config.model_type == "qwen2"
        self.D = D
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, Hkv * D, bias=bias)
        self.v_proj = nn.Linear(C, Hkv * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, rope, attend):  # x (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.D)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.D)  # (B, T, Hkv, D)
        v = self.v_proj(x).view(B, T, -1, self.D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:  # before the key is cached: a ring slot then never needs its position
            q, k = rotate(q, rope), rotate(k, rope)
        o = uncompiled(attend, q, k, v)  # (B, T, H, D)
        return self.o_proj(o.reshape(B, T, -1))


@torch.compiler.disable
def uncompiled(attend, *arguments):
    """Keeps torch.compile out of the attention, and from compiling blocks anew for each attend."""
    return attend(*arguments)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, I, bias=False)
        self.up_proj = nn.Linear(C, I, bias=False)
        self.down_proj = nn.Linear(I, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder. The backward recomputes the first `recomputed` blocks and stores the others."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recomputed, self.tokenizer_files = config, 0, {}
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = rope_frequencies(config)  # float32 whatever the weights' type
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    def forward(self, tokens, cu_seqlens=None, targets=None, temperature=1.0):
        """tokens (B, T) -> logits (B, T, V).

        cu_seqlens (N+1,) int32: B is 1 and N rows lie packed one after another.
        targets (B, T), -1 where nothing is asked: returns instead log p(target) in nats, (B, T)
        float32 and 0 where not asked, of softmax(logits / temperature).
        """
        x = self.states(tokens, cu_seqlens)
        return self.logits(x) if targets is None else self.score(x, targets, temperature)

    def states(self, tokens, cu_seqlens=None):
        """tokens (B, T) -> the last layer's normalised states (B, T, C), of whole rows."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is not None:
            row = torch.searchsorted(cu_seqlens, positions, right=True) - 1
            positions = positions - cu_seqlens[row]
        attention = attention_layers(self.config)

        def attend(layer, q, k, v):
            return attention[layer].full(q, k, v, cu_seqlens)

        return self.hidden(tokens, positions[None], attend)

    def hidden(self, tokens, positions, attend):
        """tokens (B, T), positions (B or 1, T) -> the last layer's normalised states (B, T, C)."""
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.frequencies.device != x.device:
            self.frequencies = self.frequencies.to(x.device)
        rope = rope_tables(positions, self.frequencies, x.dtype)
        no_position = self.config.full_layers if self.config.nope_full else ()
        for i, block in enumerate(self.model.layers):
            inputs = x, None if i in no_position else rope, partial(attend, i)
            if i < self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.model.norm(x)

    def logits(self, x):
        """States (..., C) -> logits (..., V), on a GPU in float32 also of bfloat16 states."""
        if x.is_cuda and x.dtype != torch.float32:
            return Float32Product.apply(x, self.lm_head.weight)
        return self.lm_head(x)

    def score(self, x, targets, temperature=1.0):
        """States x (B, T, C), targets (B, T) -> log-probabilities (B, T); see forward.

        The logits are made in chunks of tokens and again in the backward, so that a (T, V) matrix
        never exists: at 32k tokens and 152k words it would take 20 GB.
        """
        def chunk_logprobs(x, target):
            logp = log_softmax(self.logits(x), temperature)  # (n, V)
            return logp.gather(-1, target[:, None])[:, 0]

        asked = (targets >= 0).nonzero(as_tuple=True)
        x, target = x[asked], targets[asked]  # (n, C), (n,)
        size = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        if len(x) <= size:
            logprobs = chunk_logprobs(x, target)
        else:
            logprobs = torch.cat([checkpoint(chunk_logprobs, *part, use_reentrant=False)
                                  for part in zip(x.split(size), target.split(size))])
        zeros = torch.zeros(targets.shape, dtype=logprobs.dtype, device=x.device)
        return zeros.index_put(asked, logprobs)

    # -- Hugging Face folders; what they call stands below, in the section of that name

    @classmethod
    def from_pretrained(cls, name_or_path, window="config", full_layers="config", device=None,
                        dtype=None):
        """A Hugging Face folder or hub id -> Transformer; safetensors only, every tensor accounted
        for.

        window: "config" keeps what the folder says (a converted model keeps its window), None is
        full attention, an int that many keys. full_layers: "config", or the layers that stay at
        full attention. dtype: None keeps the folder's. UsageError: one sentence about what is
        missing or wrong.
        """
        folder = resolve(name_or_path, MODEL_FILES)
        config = read_config(folder)
        window = config.window if window == "config" else window
        if full_layers == "config":
            full_layers = config.full_layers
        config = replace(config, window=window, full_layers=() if window is None else full_layers)
        check_weights(read_headers(folder), config, folder)
        with torch.device("meta"):
            model = cls(config)
        weights = read_weights(folder, dtype, device)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, assign=True)
        model.tie()
        model.tokenizer_files = read_tokenizer_files(folder)
        return model

    def save_pretrained(self, folder, weights=None):
        """config.json, model.safetensors and the tokenizer's files: a plain Hugging Face folder.

        weights: a full state dict where the parameters are sharded. config.json comes last, under
        its final name only when complete: a folder without one is no model, whenever the power
        fails.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        weights = {k: v.detach().contiguous() for k, v in (weights or self.state_dict()).items()
                   if not (self.config.tie_word_embeddings and k == "lm_head.weight")}
        write_file(folder / "model.safetensors", lambda f: save_file(weights, f, {"format": "pt"}))
        for name in TOKENIZER_FILES:
            if name in self.tokenizer_files:
                write_file(folder / name, lambda f: f.write_bytes(self.tokenizer_files[name]))
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config = config_to_json(self.config) | {"torch_dtype": dtype}
        write_file(folder / "config.json", lambda f: f.write_text(json.dumps(config, indent=2)))


class Float32Product(torch.autograd.Function):
    """x (..., C) @ weight (V, C).T, multiplied as x's type and kept in float32.

    Rounded to bfloat16, logits of 16 to 32 lie .125 apart: the sampler's and the trained policy's
    probabilities then differ by that, and RL suffers (arXiv 2506.13585). The weight's gradient is
    in float32 too, since score() sums it over chunks.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, -2)
        return float32_mm(rows, weight.to(x.dtype).T).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows, gradient = x.flatten(0, -2), gradient.to(x.dtype).flatten(0, -2)
        of_x = torch.mm(gradient, weight.to(x.dtype)).view_as(x)
        return of_x, float32_mm(gradient.T, rows).to(weight.dtype)


def float32_mm(a, b):
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def log_softmax(logits, temperature=1.0):
    """In float32 at least; temperature 0 means greedy and leaves the distribution as it is."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    return F.log_softmax(logits, -1)


# --------------------------------------------------------------------------------------------------
# attention and its cache: the seam for other kinds of attention


class SlidingWindow:
    """One layer's attention: over whole rows, over a prompt, and token by token.

    The only place that knows what a layer computes and what it keeps of the past. A kind of
    attention is a class with these four methods, handed out by attention_layers(); training,
    generation, the analyses and the memory plan then follow.

    Kept of the past: the last W keys and values, in a ring behind the sinks. With W = 4, 2 sinks:

        place              0  1    2  3  4  5
        after 6 tokens     0  1    2  3  4  5
        after 8 tokens     0  1    6  7  4  5     p overwrites p - W, which no later query sees
    """

    def __init__(self, config, window):
        self.config, self.window = config, window
        self.sinks = config.sinks if window else 0

    def full(self, q, k, v, cu_seqlens=None):
        """Whole rows, differentiable. q (B, T, H, D); k, v (B, S, Hkv, D) -> (B, T, H, D).

        S > T: what was before the T queries, of which only what they see need be there.
        """
        return swa_attention(q, k, v, self.window, cu_seqlens, self.sinks)

    def empty_cache(self, slots, length, **kind):
        """What `slots` sequences of at most `length` tokens need: tensors, the slot first.

        Full attention is the same ring with as many places as the longest sequence has tokens.
        """
        places = min(self.sinks + self.window, length) if self.window else length
        shape = slots, self.config.num_key_value_heads, places, self.config.head_dim
        # In memory a head's keys lie side by side, as decoding reads them
        return tuple(torch.zeros(shape, **kind).transpose(1, 2) for _ in ("keys", "values"))

    def place(self, position, places):
        """Where in the cache a position lies."""
        sinks = min(self.sinks, places - 1)  # fewer in a cache that is shorter than they are
        if not sinks:
            return position % places
        return position.clamp(max=sinks) + (position - sinks).clamp(min=0) % (places - sinks)

    def held(self, position, end, places):
        """Whether the cache still holds a position when `end` positions are written."""
        return (position < self.sinks) | (position >= end - (places - self.sinks))

    def prefill(self, cache, q, k, v, chunk):
        """The prompt tokens of a Chunk, packed: q (1, T, H, D) -> (1, T, H, D); fills the cache."""
        keys, values = cache
        places = keys.shape[1]
        if chunk.start == 0:
            o = self.full(q, k, v, chunk.cu_seqlens)
        else:  # what the cache holds, oldest first, is joined before anything is overwritten
            slot, past = chunk.slots[0], torch.arange(chunk.start, device=q.device)
            past = self.place(past[self.held(past, chunk.start, places)], places)
            o = self.full(q, torch.cat((keys[slot, past][None], k), 1),
                          torch.cat((values[slot, past][None], v), 1))
        last = self.held(chunk.position, chunk.end, places)  # a long prompt leaves its last keys
        at = chunk.slot[last], self.place(chunk.position[last], places)
        keys[at], values[at] = k[0, last], v[0, last]
        return o

    def decode(self, cache, q, k, v, position):
        """One token in each of the first B slots, at position (B,). q (B, H, D) -> (B, H, D)."""
        B = len(position)
        keys, values = (ring[:B] for ring in cache)
        at = torch.arange(B, device=q.device), self.place(position, keys.shape[1])
        keys[at], values[at] = k, v
        return swa_decode(q, keys, values, position, self.sinks)


def attention_layers(config):
    """The attention of each layer: a fork with another kind begins here."""
    return [SlidingWindow(config, window) for window in config.windows]


@dataclass
class Chunk:
    """Where the packed tokens of a prefill belong; T tokens of N prompts, or the next T of one."""

    slots: list  # of each prompt
    start: int  # tokens of the one prompt that are cached already; 0 where there are several
    cu_seqlens: torch.Tensor  # (N+1,) int32
    slot: torch.Tensor  # (T,) of each token
    position: torch.Tensor  # (T,) in its prompt
    end: torch.Tensor  # (T,) tokens of its prompt that are cached afterwards


class Cache:
    """What up to `slots` running sequences keep of their past, layer by layer.

    Its size is constant from the first token on, so a slot that is free again serves the next
    prompt as it is: what the last owner left is masked until it is overwritten.
    """

    def __init__(self, config, slots, length, device=None, dtype=None):
        self.attention = attention_layers(config)
        self.layers = [attention.empty_cache(slots, length, device=device, dtype=dtype)
                       for attention in self.attention]

    @property
    def nbytes(self):
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @staticmethod
    def bytes_per_slot(config, length, dtype):
        """Bytes of one sequence of at most `length` tokens; nothing is allocated."""
        return Cache(config, 1, length, "meta", dtype).nbytes

    def prefill(self, slots, lengths, start=0):
        """-> (attend, positions (1, T)) for packed prompts: lengths[i] tokens go to slots[i].

        start > 0: one prompt only, the next chunk after its first `start` tokens.
        """
        device = self.layers[0][0].device
        lengths = torch.tensor(lengths, device=device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        prompt = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        position = start + torch.arange(len(prompt), device=device) - cu_seqlens[prompt]
        slot = torch.tensor(slots, device=device)[prompt]
        chunk = Chunk(slots, start, cu_seqlens, slot, position, end=start + lengths[prompt])

        def attend(layer, q, k, v):
            return self.attention[layer].prefill(self.layers[layer], q, k, v, chunk)

        return attend, position[None]

    def decode(self, position):
        """-> attend for one token in each of the first B slots, at position (B,)."""
        def attend(layer, q, k, v):  # q (B, 1, H, D)
            q, k, v = q[:, 0], k[:, 0], v[:, 0]
            return self.attention[layer].decode(self.layers[layer], q, k, v, position)[:, None]

        return attend

    def copy(self, source, targets):
        """One slot's content into others."""
        for layer in self.layers:
            for tensor in layer:
                tensor[targets] = tensor[source].clone()


# --------------------------------------------------------------------------------------------------
# generation


@dataclass
class Rollout:
    """A sampled answer: .tokens end with a stop id if .finished; .logprobs (nats) are theirs."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, stop_ids=(), slots=None, seed=None,
             top_k=0, top_p=1.0, n_ids=None, progress=None, stream=None):
    """Samples one answer for each of prompts (lists of ids) -> list[Rollout], in their order.

    Continuous batching: `slots` sequences run at a time (None: what free memory holds, at most
    1024), the next prompt enters as soon as one ends, and equal prompts that enter
    together share one prefill. temperature 0 is greedy. seed: an int (prompt i then uses seed + i)
    or one a prompt; an answer depends on its own seed only, exactly so in exact arithmetic (matrix
    products of another batch size may round differently). top_k and top_p are for evaluation: they
    bias RL's ratios. progress: a label for a line every ten seconds; stream(i, tokens): called
    with prompt i's new tokens as they come.
    """
    if not prompts or max_new_tokens == 0:
        return [Rollout(list(p), [], [], False) for p in prompts]
    longest = check_prompts(model, prompts, max_new_tokens)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    slots = min(slots or choose_slots(model, len(prompts), longest + max_new_tokens), len(prompts))
    decoder = Decoder(model, slots, longest + max_new_tokens, max_new_tokens, temperature, stop_ids,
                      top_k=top_k, top_p=top_p, n_ids=n_ids)
    on_gpu = model.device.type == "cuda"
    waiting = list(range(len(prompts)))[::-1]  # indices of prompts, the next one last
    owner, done, streamed = {}, {}, {}  # owner: slot -> index; done: index -> Rollout
    report = Progress(progress, len(prompts), slots)
    while waiting or owner:
        # free slots take in the next prompts
        free = [slot for slot in range(slots) if slot not in owner]
        entering = {slot: waiting.pop() for slot in free[:len(waiting)]}
        if entering:
            owner |= entering
            decoder.admit({slot: prompts[i] for slot, i in entering.items()},
                          {slot: seeds[i] for slot, i in entering.items()})
        # once nobody waits, the last slots move into the holes, so that the batch shrinks
        running = len(owner)
        holes = [slot for slot in range(running) if slot not in owner]
        beyond = [slot for slot in owner if slot >= running]
        for hole, slot in zip(holes, beyond, strict=True):
            decoder.move(slot, hole)
            owner[hole] = owner.pop(slot)
        # a GPU decodes powers of two, for few graphs, and is asked every eighth step who has ended
        if on_gpu:
            batch = min(slots, 1 << (running - 1).bit_length())
            for _ in range(8):
                decoder.replay(batch)
        else:
            decoder.step(running)
        # who has ended leaves
        state = decoder.running
        alive, made = state.alive[:running].tolist(), state.made[:running].tolist()
        for slot, i in list(owner.items()):
            if stream:
                stream(i, state.tokens[slot, streamed.get(i, 0):made[slot]].tolist())
                streamed[i] = made[slot]
            if not alive[slot]:
                tokens = state.tokens[slot, :made[slot]].tolist()
                logprobs = state.logprobs[slot, :made[slot]].tolist()
                done[i] = Rollout(list(prompts[i]), tokens, logprobs, tokens[-1] in stop_ids)
                del owner[slot]
        report(done.values(), [made[slot] for slot in owner])
    return [done[i] for i in range(len(prompts))]


def check_prompts(model, prompts, max_new_tokens):
    """The longest prompt's tokens; UsageError where one is empty or the positions do not do."""
    if min(map(len, prompts)) == 0:
        raise UsageError("a prompt is empty: give at least one token")
    longest, positions = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise UsageError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's {positions} positions: lower --max-new-tokens")
    return longest


def choose_slots(model, n, length):
    """As many slots as n sequences need and free memory holds, but for activations."""
    if model.device.type == "cuda":
        # What PyTorch keeps of what it has freed is free as well: without it, the number of slots
        # would depend on what ran before
        kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = 0.85 * (torch.cuda.mem_get_info(model.device)[0] + kept)
    elif sys.platform == "linux":
        free = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    else:
        free = 2**31
    fitting = int(free / Cache.bytes_per_slot(model.config, length, model.dtype))
    return max(1, min(n, 1024, fitting))


class Progress:
    """A line of a generation every ten seconds."""

    def __init__(self, label, prompts, slots):
        self.label, self.prompts, self.slots = label, prompts, slots
        self.began = self.shown = time.time()

    def __call__(self, done, running):
        """done: rollouts; running: tokens of each sequence so far."""
        if not self.label or time.time() - self.shown < 10:
            return
        self.shown = time.time()
        tokens = sum(len(rollout.tokens) for rollout in done) + sum(running)
        print(f"  {self.label} {len(done)}/{self.prompts} "
              f"| {tokens / (self.shown - self.began):,.0f} tok/s "
              f"| {len(running)}/{self.slots} slots busy "
              f"| mean length so far {tokens / (len(done) + len(running)):.0f}", flush=True)


@dataclass
class Running:
    """The running sequences, one a slot; R slots, at most M new tokens."""

    token: torch.Tensor  # (R,) the next input
    position: torch.Tensor  # (R,) its position
    made: torch.Tensor  # (R,) tokens sampled so far
    alive: torch.Tensor  # (R,) bool
    uniform: torch.Tensor  # (R, M+1) in [0, 1): a random number a token
    tokens: torch.Tensor  # (R, M+1) sampled
    logprobs: torch.Tensor  # (R, M+1) theirs

    @classmethod
    def empty(cls, slots, new, device):
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(zeros(slots), zeros(slots), zeros(slots), zeros(slots, dtype=torch.bool),
                   zeros(slots, new + 1, dtype=torch.float32), zeros(slots, new + 1),
                   zeros(slots, new + 1, dtype=torch.float32))

    def first(self, n):
        """Views of the first n slots."""
        return Running(*(tensor[:n] for tensor in vars(self).values()))


class Decoder:
    """Sequences that run side by side: each owns a slot of the cache and of every tensor here.

    The tensors never move, so that a captured CUDA graph finds them again. A slot whose sequence
    has ended computes along but changes nothing. Everything is on the device; nothing waits for
    the host.
    """

    def __init__(self, model, slots, length, max_new_tokens, temperature=1.0, stop_ids=(),
                 **truncation):
        # Blocked anew for each generation, and so never older than the weights
        self.model, self.temperature, self.truncation = blocked(model), temperature, truncation
        self.max_new_tokens, self.graphs = max_new_tokens, {}
        self.cache = Cache(model.config, slots, length, model.device, model.dtype)
        self.stops = torch.tensor(sorted(stop_ids) or [-1], device=model.device)
        self.running = Running.empty(slots, max_new_tokens, model.device)

    def admit(self, prompts, seeds):
        """prompts, seeds: {slot: prompt}, {slot: seed}. Fills the cache with all but each last
        token: that one is the first step's input, so that a single place samples."""
        new, sharing = self.running, {}  # equal prompts share one prefill
        for slot, prompt in prompts.items():
            new.token[slot], new.position[slot] = prompt[-1], len(prompt) - 1
            new.made[slot], new.alive[slot] = 0, True
            generator = torch.Generator().manual_seed(seeds[slot])
            new.uniform[slot, :-1] = torch.rand(self.max_new_tokens, generator=generator)
            if len(prompt) > 1:
                sharing.setdefault(tuple(prompt[:-1]), []).append(slot)
        together = {}  # whole prompts up to PREFILL_TOKENS; a longer one goes alone, in chunks
        for prompt, slots in sharing.items():
            if together and sum(map(len, together)) + len(prompt) > PREFILL_TOKENS:
                self.prefill(together)
                together = {}
            together[prompt] = slots
        if together:
            self.prefill(together)

    def prefill(self, prompts):
        """prompts: {prompt: the slots that begin with it}."""
        tokens = [token for prompt in prompts for token in prompt]
        tokens = torch.tensor(tokens, device=self.model.device)[None]  # (1, T)
        firsts = [slots[0] for slots in prompts.values()]
        for start in range(0, tokens.shape[1], PREFILL_TOKENS):
            part = tokens[:, start:start + PREFILL_TOKENS]
            lengths = [len(p) for p in prompts] if len(prompts) > 1 else [part.shape[1]]
            attend, position = self.cache.prefill(firsts, lengths, start)
            self.model.hidden(part, position, attend)
        for first, *others in prompts.values():
            if others:
                self.cache.copy(first, others)

    def move(self, slot, hole):
        """A running sequence takes the place of one that has ended."""
        for tensor in vars(self.running).values():
            tensor[hole] = tensor[slot]
        self.cache.copy(slot, [hole])
        self.running.alive[slot] = False

    def step(self, n):
        """The first n slots each take in one token and sample the next."""
        now = self.running.first(n)
        attend = self.cache.decode(now.position)
        x = self.model.hidden(now.token[:, None], now.position[:, None], attend)  # (n, 1, C)
        logits = self.model.logits(x[:, 0])  # (n, V)
        at = now.made[:, None]
        uniform = now.uniform.gather(1, at)[:, 0]
        token, logprob = sample(logits, uniform, self.temperature, **self.truncation)
        now.tokens.scatter_(1, at, token[:, None])
        now.logprobs.scatter_(1, at, logprob[:, None].float())
        now.token.copy_(token)
        now.position += now.alive
        now.made += now.alive
        now.alive &= (token[:, None] != self.stops).all(-1) & (now.made < self.max_new_tokens)
        now.position *= now.alive  # who has ended reads one key, not a whole ring

    def replay(self, n):
        """step(n), from its second time on as a CUDA graph."""
        if n in self.graphs:
            return self.graphs[n].replay()
        if self.model.device.type == "cuda":
            self.graphs[n] = captured(partial(self.step, n))
        else:
            self.step(n)


@cache
def graph_place():
    """The stream on which all CUDA graphs are recorded and the memory pool in which they compute.

    One of each: another pool would hold a step's logits again, another stream cuBLAS's workspace.
    Graphs may share them since no two run at once, and none leaves anything in the pool.
    """
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def captured(run):
    """Runs `run` once, then records it as a CUDA graph.

    The run compiles the kernels and makes cuBLAS's workspace, on the recording's stream but outside
    its pool: the graph depends on nothing that lies there. Recording is thread-local, or what
    another thread does with the GPU meanwhile would be an error here.
    """
    stream, pool = graph_place()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):  # synchronizes
        run()
    return graph


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, n_ids=None):
    """logits (B, V), uniform (B,) in [0, 1) -> tokens (B,) and their log-probabilities (B,).

    The inverse of the cumulative distribution at `uniform`: one random number a token, so that a
    sequence's tokens depend on its own seed alone. The log-probabilities are those of
    softmax(logits / temperature), untruncated by top_k, top_p and n_ids (ids the tokenizer lacks).
    """
    logp = log_softmax(logits, temperature)
    if temperature == 0:
        token = logp[:, :n_ids].argmax(-1)
    else:
        p = logp[:, :n_ids].exp()
        if top_k or top_p < 1:
            p = truncate(p, top_k, top_p)
        cdf = p.cumsum(-1)
        height = uniform[:, None].to(cdf) * cdf[:, -1:]  # truncated, p does not sum to 1
        token = torch.searchsorted(cdf, height, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


def truncate(p, top_k, top_p):
    """p (B, V) with all but the top_k likeliest, or those that make up top_p, set to 0."""
    ranked, order = p.sort(-1, descending=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    mass_before = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True)
    kept = (mass_before < top_p) & (rank < (top_k or p.shape[-1]))
    return torch.zeros_like(p).scatter(-1, order, ranked * kept)


class BlockedLinear(nn.Module):
    """A linear layer for a CPU: its matrix in oneDNN's blocked layout."""

    def __init__(self, linear):
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        # 16 rows: a usual batch. torch.compile with freezing packs as well, but bfloat16 only (0.54
        # of the plain time, 0.55 here; float32 0.91, 0.58 here), and needs a C++ compiler
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def blocked(module):
    """A twin of the module that shares everything but its large matrices on a CPU: blocked.

    A step of decoding on a CPU is a few rows times large matrices; blocked, they take 0.6 of the
    time. The price is a second copy of the weights for as long as a generation runs.
    """
    if isinstance(module, nn.Linear):
        return BlockedLinear(module) if can_block(module.weight) else module
    twin = copy.copy(module)
    twin._modules = {name: blocked(child) for name, child in module._modules.items()}
    return twin


def can_block(weight):
    if weight.device.type != "cpu" or weight.numel() < 2**16:  # small ones cost more blocked
        return False
    avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not (avx and torch.backends.mkldnn.is_available()):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --------------------------------------------------------------------------------------------------
# Hugging Face folders

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                   "special_tokens_map.json", "chat_template.jinja")
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "ministral": "MinistralForCausalLM"}
# What config_to_json writes by itself; whatever else a config.json says passes through in `extra`
OWN_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
            "rope_parameters", "architectures", "base_model_type"}
LAYER_TYPES = "full_attention", "sliding_attention"
MAX_IDS = 2**24
# Types and ranges of what is read from config.json and its RoPE entry: far beyond any model, short
# of what hangs or fills the memory
ENTRIES = {
    "model_type": (str,), "base_model_type": (str,), "layer_types": (list,),
    "rope_parameters": (dict,), "rope_scaling": (dict,),
    "vocab_size": (int, 1, MAX_IDS), "hidden_size": (int, 1, 2**20),
    "intermediate_size": (int, 1, 2**20), "num_hidden_layers": (int, 1, 1000),
    "num_attention_heads": (int, 1, 2**16), "num_key_value_heads": (int, 1, 2**16),
    "head_dim": (int, 2, 2**16), "max_position_embeddings": (int, 1, 2**40),
    "max_window_layers": (int, 0, 2**31), "use_sliding_window": (bool,), "sinks": (int,),
    "tie_word_embeddings": (bool,), "nope_full": (bool,), "rms_norm_eps": (float, 0, 1),
    "rope_theta": (float, 1, 1e15), "factor": (float, 1e-3, 1e6),
    "low_freq_factor": (float, 1e-3, 1e6), "high_freq_factor": (float, 1e-3, 1e6),
    "original_max_position_embeddings": (int, 1, 2**40),
}


@contextmanager
def reading(fault, cure="fetch it again, or use another checkpoint"):
    """Around whatever reads what comes from outside: any failure is one sentence.

    Left out: somebody who changes the files while they are read, and links inside a folder.
    """
    try:
        yield
    except (UsageError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # tiktoken's panics are no Exceptions
        raise UsageError(f"{fault} ({type(error).__name__}: {error}): {cure}") from error


def check_entries(d):
    """UsageError unless an object's entries are of ENTRIES' types and ranges; null is absent."""
    for key, (kind, *bounds) in ENTRIES.items():
        value = d.get(key)
        typed = type(value) is kind or (kind is float and type(value) is int)
        if value is None or typed and (not bounds or bounds[0] <= value <= bounds[1]):
            continue
        between = f" from {bounds[0]} to {bounds[1]}" if bounds else ""
        raise UsageError(f"config.json says {key}={reprlib.repr(value)}, not {kind.__name__}"
                         f"{between}: mend it, or use another checkpoint")


def config_from_json(d):
    """A parsed config.json -> ModelConfig; UsageError names what this transformer cannot do."""
    check_entries(d)
    if d.get("model_type") == "nanoswarr":
        d = d | {"model_type": d["base_model_type"]}
    kind = d.get("model_type")
    if kind not in ARCHITECTURES:
        raise UsageError(f"model_type {kind!r} is not supported: use a Qwen2, Qwen2.5, Qwen3, "
                         "Llama or Mistral checkpoint")
    computed_here = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": kind == "qwen2",
                     "partial_rotary_factor": 1.0}
    for key, value in computed_here.items():
        if d.get(key, value) != value:
            raise UsageError(f"config.json says {key}={d[key]!r}, which is not supported here")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads")
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}  # transformers 5, or before
    check_entries(rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UsageError(f"RoPE scaling {rope_type!r} is not supported (default and llama3 are)")
    if rope_type == "llama3":
        needed += ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")
    if missing := [key for key in needed if (d | rope).get(key) is None]:
        raise UsageError(f"config.json lacks {', '.join(missing)}: "
                         "it is not a causal language model's")
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UsageError("config.json's low_freq_factor is not below its high_freq_factor: "
                         "mend it, or use another checkpoint")
    window, full_layers = window_from_json(d, kind)
    derived = {
        "num_key_value_heads": d.get("num_key_value_heads") or d["num_attention_heads"],
        "head_dim": d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"],
        "rope_theta": float(d.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": rope if rope_type == "llama3" else None,
        "window": window, "full_layers": full_layers}
    names = {f.name for f in fields(ModelConfig)} - {"extra"}
    plain = {name: d[name] for name in names if d.get(name) is not None}
    extra = {key: value for key, value in d.items() if key not in names | OWN_KEYS}
    return ModelConfig(**plain | derived, extra=extra)


def window_from_json(d, kind):
    """(window, full layers), by each family's own rule for who slides."""
    qwen, n = kind.startswith("qwen"), d["num_hidden_layers"]
    if kind == "llama" or (qwen and not d.get("use_sliding_window", False)):
        return None, ()  # Qwen's config names a window that it does not use
    window, full = d.get("sliding_window", 4096), ()
    if types := d.get("layer_types"):
        if len(types) != n or any(t not in LAYER_TYPES for t in types):
            raise UsageError(f"config.json's layer_types are not {n} of {', '.join(LAYER_TYPES)}")
        full = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    elif qwen:
        most = d.get("max_window_layers")
        full = tuple(range(min(n, 28 if most is None else most)))
    return (None, ()) if window is None or len(full) == n else (window, full)


def config_to_json(config):
    """A config.json that transformers and vLLM open with the same window in the same layers."""
    ours = {"extra", "window", "full_layers", "sinks", "nope_full"}
    d = config.extra | {k: v for k, v in vars(config).items() if k not in ours}
    d["rope_parameters"] = {"rope_type": "default", **(config.rope_scaling or {}),
                            "rope_theta": config.rope_theta}
    layer_types = [LAYER_TYPES[w is not None] for w in config.windows]
    if config.model_type.startswith("qwen"):
        d |= {"use_sliding_window": config.window is not None, "sliding_window": config.window,
              "max_window_layers": 0 if config.window else config.num_hidden_layers,
              "layer_types": layer_types}
    elif config.window is None:
        d["model_type"] = "llama"
    else:  # Llama ignores a window silently; Mistral has the same weights and honours it
        d |= {"model_type": "ministral" if config.full_layers else "mistral",
              "sliding_window": config.window, "layer_types": layer_types}
    d["architectures"] = [ARCHITECTURES[d["model_type"]]]
    own = {name: getattr(config, name) for name in ("sinks", "nope_full") if getattr(config, name)}
    if own:  # nobody else computes this, so nobody else may open it as something it is not
        d |= own | {"model_type": "nanoswarr", "base_model_type": d["model_type"]}
    return d


def read_config(folder):
    path = folder / "config.json"
    with reading(f"{path} is malformed"):
        return config_from_json(read_json(path))


def resolve(name_or_path, patterns):
    """A local folder as it is, or a hub id's snapshot with the files that match `patterns`."""
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"{name} is not a model folder: give a folder with config.json, "
                         "or a Hugging Face id such as Qwen/Qwen2.5-0.5B")
    import huggingface_hub  # a dependency of datasets; imported here since it takes a second

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns,
                                                      local_files_only=not hub_in_reach()))
    except Exception as error:  # network, authorisation, unknown id: many types, one cure
        raise UsageError(f"{name} is neither a folder here nor could it be fetched from "
                         "the hub: check the name and the connection "
                         f"({type(error).__name__})") from None


def hub_in_reach():
    """Whether the hub answers within seconds; its libraries would try for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        return True
    except Exception:  # no way there, of whatever kind: what was fetched before still serves
        return False


def read_json(path):
    with reading(f"{path} is not readable"):
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist: give a Hugging Face model folder")
        return parse_json(path, Path(path).read_bytes())


def parse_json(name, data):
    with reading(f"{name} is not readable JSON"):
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content


def weight_files(folder):
    """The names of a folder's safetensors files, single or sharded."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    with reading(f"{index} is malformed"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map names no files, or files outside of the folder")
    return names


def read_weights(folder, dtype=None, device=None):
    """All tensors of a folder's safetensors files, each of them finite; never pickles."""
    weights = {}
    for name in weight_files(folder):
        with open_weights(folder, name, device) as f:
            for key in f.keys():
                weights[key] = f.get_tensor(key).to(dtype)
                if not torch.stack(weights[key].aminmax()).isfinite().all():
                    raise UsageError(f"{folder / name}: {key} holds NaN or infinity: "
                                     "fetch it again, or use another checkpoint")
    return weights


def read_headers(folder):
    """{tensor: (shape, type)} of a folder's safetensors files, from their headers alone."""
    found = {}
    for name in weight_files(folder):
        with open_weights(folder, name) as f:
            for key in f.keys():
                if key in found:
                    raise UsageError(f"{folder} has the tensor {key} in two files: fetch it again")
                found[key] = tuple(f.get_slice(key).get_shape()), f.get_slice(key).get_dtype()
    return found


def fingerprint(folder):
    """A hash of a folder's weights: what was made from them says so."""
    digest = hashlib.sha256()
    for name in weight_files(folder):
        with open_weights(folder, name), open(folder / name, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def open_weights(folder, name, device=None):
    with reading(f"{folder / name} is damaged or truncated"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}: weights load from safetensors only")
        with safe_open(folder / name, framework="pt", device=str(device or "cpu")) as f:
            yield f


def expected_shapes(config):
    """{name: shape} of a model's tensors, from one layer: a deep one is not built to be refused."""
    with torch.device("meta"):
        shallow = Transformer(replace(config, num_hidden_layers=1, full_layers=())).state_dict()
    return {name.replace(".layers.0.", f".layers.{layer}."): tuple(tensor.shape)
            for name, tensor in shallow.items()
            for layer in range(config.num_hidden_layers if ".layers.0." in name else 1)}


def check_weights(found, config, folder):
    """UsageError unless the headers are those of the configuration: names, shapes and types."""
    expected = expected_shapes(config)
    for names in (found, expected) if config.tie_word_embeddings else ():
        names.pop("lm_head.weight", None)  # it is the embedding, whatever a file calls one
    for name, (_, kind) in found.items():
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise UsageError(f"{folder}: {name} is stored as {kind}, which is not supported: "
                             "use a checkpoint that is not quantised")
    for what, names in (("lacks", expected.keys() - found.keys()),
                        ("has unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"{folder} {what} tensors {', '.join(sorted(names)[:3])}{more}: the "
                             "weights and config.json do not belong together, or a download "
                             "is incomplete")
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise UsageError(f"{folder}: {name} has shape {found[name][0]}, "
                             f"config.json asks for {shape}")


def read_tokenizer_files(folder):
    """{name: bytes}; with config.json, which may be the only one to name the stop ids."""
    names = (*TOKENIZER_FILES, "config.json")
    with reading(f"a tokenizer's file in {folder} is not readable"):
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_file(path, write):
    """write(temporary path), flushed to the disk, then renamed: path is never seen half-written.

    UsageError if the disk is full or refuses, in whatever way write notices; path stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from None


def append_file(path, text):
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path, error):
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UsageError(f"{path} could not be written ({reason}): free some space or choose another "
                      "--out; what was there before is whole, and the same command continues")


# --------------------------------------------------------------------------------------------------
# tokenizer

# tokenizer.json spells a byte as a character: itself where it prints, the other 68 from U+0100 on
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_TO_CHAR = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_TO_BYTE = dict.fromkeys(HIDDEN, 0xFFFF) | {ord(c): b for b, c in BYTE_TO_CHAR.items()}

GPT2_CHUNKS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where every digit is cut out first: the text ends there, hence \s+(?=\p{N})
DIGIT_CHUNKS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
SLOW = 60  # seconds that a folder's own pattern may take over a text, where regex runs it
TEMPLATE_BUDGET = 2**28  # characters, and 100 for each step of a loop
REPEATING = {"replace", "do_replace", "join", "do_join"}  # here sizes multiply, too
# Some 500,000 overflow the stack of tiktoken's regex; sought from a run's first character only
LONG_RUN = re.compile(r"\s(?<!\s\s)\s{99999}")


def unsupported(what):
    return UsageError(
        f"tokenizer.json has {what}, which is not supported: use a checkpoint with byte-level BPE, "
        "such as Qwen2.5, Qwen3, Llama 3, SmolLM2 or a DeepSeek-R1 distillation of these"
    )


def is_id(i):
    return type(i) is int and 0 <= i < MAX_IDS


def token_bytes(token):
    """The bytes a token stands for; its own UTF-8 where a character of it spells no byte."""
    try:
        return token.translate(CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def chunk_pattern(pre_tokenizer):
    """The regex whose matches are merged each on its own, from tokenizer.json's entry."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return GPT2_CHUNKS
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return DIGIT_CHUNKS
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": own}},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return own
    kinds = " + ".join(step["type"] for step in steps) or "none"
    raise unsupported(f"a pre-tokenizer ({kinds}) or settings of it")


class GenerationBlock(Extension):
    """`{% generation %}` in a chat template marks the assistant's text; here it only renders."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def template_error(message):
    raise ValueError(message)


def template_json(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with a budget: a rendering spends it on the steps of its loops, on what
    operators, filters and methods could build, and on the output.

    Left out: what is endless without a loop (a macro that calls itself twice), the widths inside
    format strings, and a list that holds one long string many times over.
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, **options):
        super().__init__(**options)
        self.spent = 0
        filters = self.filters | {"tojson": template_json}
        self.filters = {name: self.metered(f) for name, f in filters.items()} | {
            "steps": self.steps}
        del self.globals["lipsum"]

    def spend(self, amount):
        self.spent += amount
        if not self.spent <= TEMPLATE_BUDGET:  # nor NaN
            raise OverflowError("it loops or builds without bound")

    def steps(self, items):
        for item in items:
            self.spend(100)
            yield item

    def metered(self, function):
        """The function; before it is called, its sizes times its numbers are spent."""
        combine = math.prod if function.__name__ in REPEATING else sum

        @wraps(function)
        def call(*args, **kwargs):
            given = [getattr(function, "__self__", None), *args, *kwargs.values()]
            numbers = [max(1, abs(x)) for x in given if isinstance(x, (int, float))]
            sizes = [len(x) + 1 for x in given if hasattr(x, "__len__")]
            self.spend(math.prod(numbers) * max(1, combine(sizes)))
            return function(*args, **kwargs)

        return call

    def call(__self, __context, __obj, *args, **kwargs):
        if isinstance(__obj, BuiltinMethodType):
            __obj = __self.metered(__obj)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        function = self.binop_table[operator]
        if operator != "+" or hasattr(left, "__len__"):  # sums of numbers stay small
            function = self.metered(function)
        return function(left, right)

    def _parse(self, *source):
        """Where jinja has no hook: loops run through `steps`, and a ~ b is a | string + ..."""
        tree = super()._parse(*source)
        for node in tree.find_all((nodes.For, nodes.Concat)):
            if isinstance(node, nodes.For):
                node.iter = nodes.Filter(node.iter, "steps", [], [], None, None)
            else:
                parts = [nodes.Filter(p, "string", [], [], None, None) for p in node.nodes]
                node.nodes = [reduce(nodes.Add, parts)]
        return tree.set_environment(self)

    def text(self, template, inputs):
        self.spent, pieces = 0, []
        for piece in template.generate(inputs):
            self.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


# As in transformers; sandboxed, since a template is code from the hub
TEMPLATES = Sandbox(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
)
TEMPLATES.globals["raise_exception"] = template_error
TEMPLATES.globals["strftime_now"] = lambda form: datetime.now().strftime(form)


class Tokenizer:
    """A checkpoint's byte-level BPE on tiktoken, with the ids of Hugging Face's `tokenizers`.

    files: name -> bytes, of TOKENIZER_FILES and config.json; only tokenizer.json is needed.
    All ids are below n_ids; an embedding may have more rows, which are never to be sampled.
    stop_ids: every eos the files declare; eos_id: the one of the tokenizer, to end a text with.
    Left out, UsageError: SentencePiece, WordPiece, normalizers but NFC, tokens with lstrip, rstrip.
    """

    def __init__(self, files):
        self.files = files
        with reading("tokenizer.json is missing or malformed"):
            self._build(self._json("tokenizer.json"))
        self.config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        named = {key: value for key, value in self.config.items() if key.endswith("_token")}
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
        self.named = {key: value for key, value in named.items() if isinstance(value, str)}
        self.bos_id = self.id_of.get(self.named.get("bos_token"))
        self.eos_id = self.id_of.get(self.named.get("eos_token"))
        self.stop_ids = {self.eos_id}
        for name in ("generation_config.json", "config.json"):
            ids = self._json(name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if not all(i is None or is_id(i) for i in ids):
                raise UsageError(f"{name} says eos_token_id={reprlib.repr(ids)}, which are no ids: "
                                 "mend it, or use another checkpoint")
            self.stop_ids |= set(ids)
        self.stop_ids -= {None}

    @classmethod
    def from_pretrained(cls, name_or_path):
        """From a Hugging Face folder, or by hub id: only the tokenizer's files are fetched."""
        folder = resolve(name_or_path, (*TOKENIZER_FILES, "config.json"))
        return cls(read_tokenizer_files(folder))

    def _json(self, name):
        return parse_json(name, self.files.get(name, b"{}"))

    def _build(self, spec):
        bpe, added = spec["model"], spec["added_tokens"]
        if bpe["type"] != "BPE":
            raise unsupported(f"a {bpe['type']} model")
        options = "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"
        if used := [option for option in options if bpe.get(option)]:
            raise unsupported(f"the option {used[0]}")
        if (spec["decoder"] or {}).get("type") != "ByteLevel":
            raise unsupported("a decoder other than ByteLevel")
        if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added):
            raise unsupported("added tokens with lstrip, rstrip or single_word")
        normalizer = spec["normalizer"] or {"normalizers": []}
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        if steps not in ([], ["NFC"]):
            raise unsupported(f"a normalizer ({' + '.join(steps)})")
        self.nfc = bool(steps)

        # A rank is no id: ranks are the 256 bytes, all of them or tiktoken panics, then the merges
        vocab = bpe["vocab"]
        self.id_of_rank = [vocab.get(BYTE_TO_CHAR[byte]) for byte in range(256)]
        ranks = {bytes([byte]): byte for byte in range(256)}
        for merge in bpe["merges"]:
            token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
            if ranks.setdefault(token_bytes(token), len(ranks)) == len(self.id_of_rank):
                self.id_of_rank.append(vocab[token])
        self.absent = bytes(byte for byte in range(256) if self.id_of_rank[byte] is None)
        if self.absent and bpe.get("unk_token"):
            raise unsupported("an unk_token for bytes that the vocabulary lacks")
        unmade = set(vocab.values()) - set(self.id_of_rank) - {t["id"] for t in added}
        if bpe.get("ignore_merges") and unmade:  # what merges make, tiktoken prefers whole too
            raise unsupported("ignore_merges with tokens that no merge makes")

        self.chunks = chunk_pattern(spec["pre_tokenizer"])
        try:
            self.bpe = tiktoken.Encoding(
                "bpe", pat_str=self.chunks, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            raise unsupported(f"a pattern that tiktoken cannot read ({error})") from error
        probe = "".join(map(chr, range(0x3000)))
        if not all(match[0] for match in regex.finditer(self.chunks, probe, timeout=SLOW)):
            raise unsupported("a pattern that matches nothing at all")  # which tiktoken panics at
        if self.bpe.decode_bytes(self.bpe.encode_ordinary(probe)) != probe.encode():
            raise unsupported("a pattern that leaves out characters")  # which tiktoken loses

        # Added tokens cut the text, special or not; where several begin, the longest wins
        self.special_ids = {t["id"] for t in added if t["special"]}
        self.id_of = vocab | {t["content"]: t["id"] for t in added}
        ids = list(self.id_of.values())
        if "" in self.id_of or not all(map(is_id, ids)) or len(set(ids)) < len(ids):
            raise unsupported("empty tokens, ids that are used twice, or ids that are none")
        longest_first = sorted((re.escape(t["content"]) for t in added), key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.pieces = {i: token_bytes(token) for token, i in self.id_of.items()}
        self.n_ids = max(self.pieces) + 1

    def encode(self, text):
        """Ids of a text; added tokens in it are recognised. No bos; lone surrogates are U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        with reading("tokenizer.json's pattern fails on a text", "use another checkpoint"):
            for i, part in enumerate(self.added.split(text)):  # text, token, text, ..., text
                ids += [self.id_of[part]] if i % 2 else self._merge(part)
        return ids

    def _merge(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        data = text.encode()
        if LONG_RUN.search(text) or data.translate(None, self.absent) != data:
            # Slow and exact. Hugging Face drops the bytes that the vocabulary lacks after the cut
            # into chunks and before the merges, so that their neighbours may merge
            matches = regex.finditer(self.chunks, text, timeout=SLOW)
            chunks = (match[0].encode() for match in matches)
            chunks = filter(None, (chunk.translate(None, self.absent) for chunk in chunks))
            ranks = (rank for chunk in chunks for rank in self.bpe._encode_single_piece(chunk))
        else:
            ranks = self.bpe.encode_ordinary(text)
        return [self.id_of_rank[rank] for rank in ranks]

    def decode(self, ids, skip_special=True):
        """Text of the ids, U+FFFD for broken UTF-8; <think> is added but not special: it stays."""
        skipped = self.special_ids if skip_special else ()
        data = b"".join(self.pieces.get(i, b"") for i in ids if i not in skipped)
        return data.decode("utf-8", "replace")

    @cached_property
    def template(self):
        source = self.config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}["default"]
        if "chat_template.jinja" in self.files:
            source = self.files["chat_template.jinja"].decode()
        if not isinstance(source, str | None):
            raise TypeError(f"it is no text but {reprlib.repr(source)}")
        return TEMPLATES.from_string(source) if source else None

    def chat(self, messages):
        """Ids of the messages ({"role", "content"}) up to where the assistant's answer begins.

        Without a chat template: bos if declared, "User: ..." a message, blank lines, "Assistant:".
        """
        with reading("the chat template cannot render the messages"):
            if not self.template:
                turns = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages]
                text = "".join([self.named.get("bos_token", ""), *turns, "Assistant:"])
            else:
                inputs = {"messages": messages, "tools": None, "documents": None}
                inputs |= {"add_generation_prompt": True, **self.named}
                text = TEMPLATES.text(self.template, inputs)
        return self.encode(text)


# --------------------------------------------------------------------------------------------------
# the command line, for every script


class UsageError(ValueError):
    """What the user can mend: the message is one sentence that says how."""

    def __str__(self):  # on one line, whatever of others' files it quotes
        text = "".join(c if c.isprintable() else " " for c in super().__str__())
        return text if len(text) < 1000 else f"{text[:700]} ... {text[-200:]}"


def cli(main):
    """Runs a script's main(); what the user can mend, or Ctrl-C, becomes one sentence on stderr and
    an exit code."""
    try:
        main()
        if torch.distributed.is_initialized():
            # Or else a thread of gloo that still holds a tensor may abort the exiting process. Not
            # after an error: that could wait for the other ranks, which torchrun will end
            torch.distributed.destroy_process_group()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print("error: out of memory: lower --slots (generation) or --micro-tokens (training), or "
              f"shorten --max-new-tokens ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'a file'} cannot be used ({error.strerror or error}): "
              "free some space, or choose another --out; the same command continues",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
