"""The model: config, transformer, ring cache, tokenizer, Hugging Face load/save, generation.

One decoder-only transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) covers Qwen2/Qwen2.5,
Qwen3 and the Llama family, with Hugging Face's parameter names, so that real weights load without
renaming or permuting. Sliding-window attention (SWA) is one number in the config, `window`; full
self-attention (SA) is `window=None` on the same code path. The transformer does not know about
caches: it is handed a function `attend(layer, q, k, v)`, which is swa_attention in training and a
RingCache's prefill or decode in generation.

Left out on purpose: mixture of experts, dropout, quantisation, tensor parallelism, paged caches (a
ring has constant size, so there is nothing to page), RoPE scalings other than Llama-3's.

    python eval.py --model out/tiny/rl-w24 --prompt "a3b0c4d1?"
    python -m pytest tests/test_model.py
"""

import copy
import json
import os
import re
import sys
import time
import unicodedata
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cached_property
from pathlib import Path

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


class UsageError(ValueError):
    """What the user can mend: the message is one sentence that says how."""


def cli(main):
    """Runs a script's main(); a UsageError or Ctrl-C becomes one sentence on stderr and an exit
    code."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print("error: out of memory: lower --slots (generation) or --micro-tokens (training), or "
              f"shorten --max-new-tokens ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ModelConfig:
    """A config.json, under Hugging Face's names, plus the window.

    window: keys a query sees, its own included (`0 <= i - j < window`), or None for full attention.
    full_layers: indices of layers that keep full attention in a windowed model (hybrids).
    nope_full: those layers without RoPE, an experiment that other libraries cannot open.
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
    full_layers: tuple[int, ...] = ()
    nope_full: bool = False
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        check_window(self.window)
        self.full_layers = tuple(sorted(set(self.full_layers)))
        if any(not 0 <= i < self.num_hidden_layers for i in self.full_layers):
            raise UsageError(f"full layers {self.full_layers}: this model's layers are 0 to "
                             f"{self.num_hidden_layers - 1}")

    @property
    def windows(self):
        """The window of each layer."""
        return [None if i in self.full_layers else self.window
                for i in range(self.num_hidden_layers)]

    @classmethod
    def from_dict(cls, d):
        """From a parsed config.json; UsageError names whatever this transformer does not
        compute."""
        if d.get("model_type") == "nanoswarr":
            d = d | {"model_type": d["base_model_type"]}
        kind = d.get("model_type")
        if kind not in ("qwen2", "qwen3", *LLAMA_FAMILY):
            raise UsageError(f"model_type {kind!r} is not supported: use a Qwen2, Qwen2.5, Qwen3, "
                             "Llama or Mistral checkpoint")
        unsupported = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": kind == "qwen2",
                       "partial_rotary_factor": 1.0}
        for key, computed in unsupported.items():
            if d.get(key, computed) != computed:
                raise UsageError(f"config.json says {key}={d[key]!r}, which is not supported here")
        known = {f.name for f in fields(cls)} - {"extra", "rope_scaling", "window", "full_layers"}
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size",
                               "num_hidden_layers", "num_attention_heads") if k not in d]
        if missing:
            raise UsageError(f"config.json lacks {', '.join(missing)}: "
                             "it is not a causal language model's")
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}  # transformers 5, or before
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise UsageError(f"RoPE scaling {rope_type!r} is not supported "
                             "(default and llama3 are)")
        derived = {
            "num_key_value_heads": d.get("num_key_value_heads") or d["num_attention_heads"],
            "head_dim": d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"],
            "rope_theta": float(d.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            "rope_scaling": rope if rope_type == "llama3" else None,
        }
        window, full = cls._window_of(d, kind)
        extra = {k: v for k, v in d.items() if k not in known and k not in WINDOW_KEYS}
        return cls(**({k: d[k] for k in known if k in d} | derived), window=window,
                   full_layers=full, extra=extra)

    @staticmethod
    def _window_of(d, kind):
        """(window, full layers), by each family's own rule for who slides."""
        n = d["num_hidden_layers"]
        if kind == "llama" or (kind.startswith("qwen") and not d.get("use_sliding_window", False)):
            return None, ()  # Qwen's config names a window that it does not use
        window = d.get("sliding_window", 4096)
        if d.get("layer_types"):
            full = tuple(i for i, t in enumerate(d["layer_types"]) if t == "full_attention")
        else:
            full = (tuple(range(min(n, d.get("max_window_layers", 28))))
                    if kind.startswith("qwen") else ())
        return (None, ()) if window is None or len(full) == n else (window, full)

    def to_dict(self):
        """A config.json that transformers and vLLM open with the same window in the same layers."""
        d = {f.name: getattr(self, f.name) for f in fields(self)}
        d = d.pop("extra") | {k: v for k, v in d.items()
                              if k not in ("window", "full_layers", "nope_full")}
        d["rope_parameters"] = {"rope_type": "default", **(self.rope_scaling or {}),
                                "rope_theta": self.rope_theta}
        layer_types = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
        if self.model_type.startswith("qwen"):
            d |= {"use_sliding_window": self.window is not None, "sliding_window": self.window,
                  "max_window_layers": 0 if self.window else self.num_hidden_layers,
                  "layer_types": layer_types}
        elif self.window is None:
            d["model_type"] = "llama"
        else:  # Llama ignores a window silently; Mistral has the same weights and honours it
            d |= {"model_type": "ministral" if self.full_layers else "mistral",
                  "sliding_window": self.window, "layer_types": layer_types}
        architectures = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", **LLAMA_FAMILY}
        d["architectures"] = [architectures[d["model_type"]]]
        if self.nope_full:
            # Nobody else computes this, so nobody else may open it as something it is not
            d |= {"nope_full": True, "model_type": "nanoswarr", "base_model_type": d["model_type"]}
        return d


LLAMA_FAMILY = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                "ministral": "MinistralForCausalLM"}
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
               "rope_parameters", "architectures", "full_layers", "window", "rope_scaling",
               "base_model_type")


def check_window(window):
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)
                               or window < 1):
        raise UsageError(f"window {window!r}: give a whole number of keys >= 1, "
                         "or full for full attention")


# --------------------------------------------------------------------------------------------------
# transformer


def rope_frequencies(config):
    """Angles per position, (D/2,) float32, half-split convention;
    Llama-3's scaling where asked for."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling:
        factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched; 1: fast, kept
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    return frequency


def rotate(x, rope):
    """x (B, T, H, D) turned by its positions; rope: cos and sin, (B or 1, T, 1, D), sin signed."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D, H, Hkv = (config.hidden_size, config.head_dim, config.num_attention_heads,
                        config.num_key_value_heads)
        bias = config.model_type == "qwen2"
        self.layer, self.D = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, Hkv * D, bias=bias)
        self.v_proj = nn.Linear(C, Hkv * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(D, config.rms_norm_eps) for _ in "qk")

    def forward(self, x, rope, attend):  # x (B, T, C)
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.D) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:  # before the key is cached: a ring slot then never needs its position
            q, k = rotate(q, rope), rotate(k, rope)
        o = attend(self.layer, q, k, v)  # (B, T, H, D)
        return self.o_proj(o.reshape(B, T, -1))


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
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder. `checkpointing = True` recomputes each block in backward instead of
    storing it."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing, self.tokenizer_files = config, False, {}
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
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

    def hidden(self, tokens, positions, attend):
        """tokens (B, T), positions (B or 1, T) -> the last layer's normalised states (B, T, C)."""
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.frequencies.device != x.device:
            self.frequencies = self.frequencies.to(x.device)
        # (B or 1, T, D/2), float32 as in transformers
        angle = positions[..., None].float() * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        rope = [t.to(x.dtype)[:, :, None] for t in rope]  # (B or 1, T, 1, D)
        no_position = self.config.full_layers if self.config.nope_full else ()
        for i, block in enumerate(self.model.layers):
            inputs = x, None if i in no_position else rope, attend
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.model.norm(x)

    def forward(self, tokens, cu_seqlens=None, targets=None, temperature=1.0):
        """tokens (B, T) -> logits (B, T, V).

        cu_seqlens (N+1,) int32: B is 1 and N rows lie packed one after another.
        targets (B, T), -1 where nothing is asked: returns instead log p(target) in nats, (B, T)
        float32 and 0 where not asked, of softmax(logits / temperature). The logits are made in
        chunks of tokens, so that a (T, V) matrix never exists: at 32k tokens and 152k words it
        would take 20 GB.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is not None:
            row = torch.searchsorted(cu_seqlens, positions, right=True) - 1
            positions = positions - cu_seqlens[row]
        windows = self.config.windows

        def attend(layer, q, k, v):
            return swa_attention(q, k, v, windows[layer], cu_seqlens)

        x = self.hidden(tokens, positions[None], attend)
        return self.lm_head(x) if targets is None else self.score(x, targets, temperature)

    def score(self, x, targets, temperature=1.0):
        """States x (B, T, C), targets (B, T) -> log-probabilities (B, T); see forward."""

        def chunk(x, target):
            logp = log_softmax(self.lm_head(x), temperature)  # (n, V)
            return logp.gather(-1, target[:, None])[:, 0]

        asked = (targets >= 0).nonzero(as_tuple=True)
        x, target = x[asked], targets[asked]  # (n, C), (n,)
        size = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        parts = [checkpoint(chunk, x[i:i + size], target[i:i + size], use_reentrant=False)
                 if len(x) > size else chunk(x, target) for i in range(0, max(len(x), 1), size)]
        logp = torch.zeros(targets.shape, dtype=parts[0].dtype, device=x.device)
        return logp.index_put(asked, torch.cat(parts))

    # -- Hugging Face folders

    @classmethod
    def from_pretrained(cls, name_or_path, window="config", full_layers="config", device=None,
                        dtype=None):
        """A Hugging Face folder or hub id -> Transformer; safetensors only, every tensor
        accounted for.

        window: "config" keeps what the folder says (a converted model keeps its window), None is
        full attention, an int that many keys. full_layers: "config", or the layers that stay at
        full attention. dtype: None keeps the folder's. UsageError: one sentence about what is
        missing or wrong.
        """
        folder = resolve(name_or_path, ["*.json", "*.safetensors", "*.jinja"])
        d = read_json(folder / "config.json")
        config = ModelConfig.from_dict(d)
        if window != "config":
            config.window = window
        if full_layers != "config" or config.window is None:
            config.full_layers = () if full_layers == "config" else tuple(full_layers)
        config.__post_init__()
        with torch.device("meta"):
            model = cls(config)
        weights = read_weights(folder, dtype, device)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
        expected = model.state_dict()
        for what, names in (("lacks", expected.keys() - weights),
                            ("has unknown", weights.keys() - expected)):
            if names:
                raise UsageError(f"{folder} {what} tensors {', '.join(sorted(names)[:3])}"
                                 f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: the "
                                 "weights and config.json do not belong together, or a download "
                                 "is incomplete")
        for name, tensor in expected.items():
            if weights[name].shape != tensor.shape:
                raise UsageError(f"{folder}: {name} has shape {tuple(weights[name].shape)}, "
                                 f"config.json asks for {tuple(tensor.shape)}")
        model.load_state_dict(weights, assign=True)
        model.tie()
        # config.json may be the only one to name the stop ids
        names = (*TOKENIZER_FILES, "config.json")
        model.tokenizer_files = {p.name: p.read_bytes() for p in folder.iterdir()
                                 if p.name in names}
        return model

    def save_pretrained(self, folder, weights=None):
        """config.json, model.safetensors and the tokenizer's files: a plain Hugging Face folder.

        weights: a full state dict where the parameters are sharded. config.json comes last, under
        its final name only when complete: a folder without one is no model, whenever the power
        fails.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().contiguous() for k, v in (weights or self.state_dict()).items()
                   if not (self.config.tie_word_embeddings and k == "lm_head.weight")}
        dtype = next(iter(weights.values())).dtype
        config = self.config.to_dict() | {"torch_dtype": str(dtype)[6:]}
        (folder / "config.json").unlink(missing_ok=True)
        write_file(folder / "model.safetensors", lambda f: save_file(weights, f, {"format": "pt"}))
        for name in TOKENIZER_FILES:
            if name in self.tokenizer_files:
                write_file(folder / name,
                           lambda f: f.write_bytes(self.tokenizer_files[name]))
        write_file(folder / "config.json", lambda f: f.write_text(json.dumps(config, indent=2)))


def log_softmax(logits, temperature=1.0):
    """In float32 at least; temperature 0 means greedy and leaves the distribution as it is."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits / temperature if temperature not in (0, 1) else logits, -1)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                   "special_tokens_map.json", "chat_template.jinja")


def resolve(name_or_path, patterns):
    """A local folder as it is, or a hub id's snapshot with the files that match `patterns`."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if (path.exists() or str(name_or_path).count("/") != 1
            or str(name_or_path).startswith((".", "/", "~"))):
        raise UsageError(f"{name_or_path} is not a model folder: give a folder with config.json, "
                         "or a Hugging Face id such as Qwen/Qwen2.5-0.5B")
    import huggingface_hub  # a dependency of datasets; imported here since it takes a second

    try:
        return Path(huggingface_hub.snapshot_download(str(name_or_path), allow_patterns=patterns))
    except Exception as error:  # network, authorisation, unknown id: many types, one cure
        raise UsageError(f"{name_or_path} is neither a folder here nor could it be fetched from "
                         "the hub: check the name and the connection "
                         f"({type(error).__name__})") from None


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: give a Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from None


def read_weights(folder, dtype=None, device=None):
    """All tensors of a folder's safetensors files, single or sharded; never pickles."""
    index = folder / "model.safetensors.index.json"
    names = (sorted(set(read_json(index)["weight_map"].values())) if index.exists()
             else ["model.safetensors"])
    weights = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt", device=str(device or "cpu")) as f:
                weights |= {key: f.get_tensor(key).to(dtype) for key in f.keys()}
        except FileNotFoundError:
            raise UsageError(f"{folder} has no {name}: "
                             "weights load from safetensors only") from None
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{folder / name} is damaged or truncated ({error}): "
                             "fetch it again") from None
    return weights


def write_file(path, write):
    """write(temporary path), flushed to the disk, then renamed: path is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


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
LONG_RUN = re.compile(r"\s{100000}")  # some 500,000 overflow the stack of tiktoken's regex


def unsupported(what):
    return UsageError(
        f"tokenizer.json has {what}, which is not supported: use a checkpoint with byte-level BPE, "
        "such as Qwen2.5, Qwen3, Llama 3, SmolLM2 or a DeepSeek-R1 distillation of these"
    )


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


# As in transformers; sandboxed, since a template is code from the hub
TEMPLATES = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
)
TEMPLATES.filters["tojson"] = template_json
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
        try:
            self._build(self._json("tokenizer.json"))
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"tokenizer.json is missing or malformed ({error!r}): fetch it, or convert the "
                "tokenizer to that format"
            ) from error
        self.config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        named = {key: value for key, value in self.config.items() if key.endswith("_token")}
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
        self.named = {key: value for key, value in named.items() if isinstance(value, str)}
        self.bos_id = self.id_of.get(self.named.get("bos_token"))
        self.eos_id = self.id_of.get(self.named.get("eos_token"))
        self.stop_ids = {self.eos_id}
        for name in ("generation_config.json", "config.json"):
            ids = self._json(name).get("eos_token_id")
            self.stop_ids |= set(ids if isinstance(ids, list) else [ids])
        self.stop_ids -= {None}

    @classmethod
    def from_pretrained(cls, name_or_path):
        """From a Hugging Face folder, or by hub id: only the tokenizer's files are fetched."""
        names = (*TOKENIZER_FILES, "config.json")
        folder = resolve(name_or_path, names)
        return cls({n: (folder / n).read_bytes() for n in names if (folder / n).is_file()})

    def _json(self, name):
        try:
            return dict(json.loads(self.files.get(name, b"{}")))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} is no JSON object ({error}): fetch it again") from error

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
        probe = "".join(map(chr, range(0x3000)))  # tiktoken loses what the pattern does not match
        if self.bpe.decode_bytes(self.bpe.encode_ordinary(probe)) != probe.encode():
            raise unsupported("a pattern that leaves out characters")

        # Added tokens cut the text, special or not; where several begin, the longest wins
        self.special_ids = {t["id"] for t in added if t["special"]}
        self.id_of = vocab | {t["content"]: t["id"] for t in added}
        longest_first = sorted((re.escape(t["content"]) for t in added), key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.pieces = {i: token_bytes(token) for token, i in self.id_of.items()}
        self.n_ids = max(self.pieces) + 1

    def encode(self, text):
        """Ids of a text; added tokens in it are recognised. No bos; lone surrogates are U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for i, part in enumerate(self.added.split(text)):  # text, token, text, ..., text
            ids += [self.id_of[part]] if i % 2 else self._merge(part)
        return ids

    def _merge(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        data = text.encode()
        if LONG_RUN.search(text) or data.translate(None, self.absent) != data:
            # Slow and exact. Hugging Face drops the bytes that the vocabulary lacks after the cut
            # into chunks and before the merges, so that their neighbours may merge
            chunks = (match[0].encode() for match in regex.finditer(self.chunks, text))
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
        return TEMPLATES.from_string(source) if source else None

    def chat(self, messages):
        """Ids of the messages ({"role", "content"}) up to where the assistant's answer begins.

        Without a chat template: bos if declared, "User: ..." a message, blank lines, "Assistant:".
        """
        try:
            if not self.template:
                turns = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages]
                text = "".join([self.named.get("bos_token", ""), *turns, "Assistant:"])
            else:
                inputs = {"messages": messages, "tools": None, "documents": None}
                text = self.template.render(inputs, add_generation_prompt=True, **self.named)
        except Exception as error:  # anything: the template is the checkpoint's own code
            raise UsageError(f"the chat template cannot render the messages: {error}") from error
        return self.encode(text)


# --------------------------------------------------------------------------------------------------
# ring cache


class RingCache:
    """Keys and values of up to `slots` running sequences, each layer a ring of S positions.

    S is min(window, length) in a sliding layer, `length` (the longest sequence) in a full one: SA
    is the same code with a longer ring. Position p lies at p % S, keys after RoPE. Memory is
    constant from the first token on, so a freed slot serves the next prompt as it is; what the
    last owner left is masked until it is overwritten.
    """

    def __init__(self, config, slots, length, device=None, dtype=None):
        sizes = [min(w or length, length) for w in config.windows]
        self.windows = config.windows
        self.k, self.v = ([torch.zeros(slots, S, config.num_key_value_heads, config.head_dim,
                                       device=device, dtype=dtype) for S in sizes] for _ in "kv")

    @staticmethod
    def bytes_per_slot(config, length, dtype):
        """Bytes of one sequence's cache."""
        positions = sum(min(w or length, length) for w in config.windows)
        return 2 * positions * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def prefill(self, slots, lengths, start=0):
        """-> attend() for packed prompts: row i has lengths[i] tokens and goes to slots[i].

        start > 0: one row only, the next chunk of a prompt whose first `start` tokens are cached.
        """
        device = self.k[0].device
        lengths = torch.tensor(lengths, device=device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        position = start + torch.arange(len(row), device=device) - cu_seqlens[row]
        slot, end = torch.tensor(slots, device=device)[row], start + lengths[row]

        def attend(layer, q, k, v):
            ring_k, ring_v, window = self.k[layer], self.v[layer], self.windows[layer]
            S = ring_k.shape[1]
            if start:  # the old keys and the chunk, joined before anything is overwritten
                old = torch.arange(max(0, start - S), start, device=device) % S
                o = swa_attention(q, torch.cat((ring_k[slots, old][None], k), 1),
                                  torch.cat((ring_v[slots, old][None], v), 1), window)
            else:
                o = swa_attention(q, k, v, window, cu_seqlens)
            last = position >= end - S  # a prompt longer than the ring leaves only its last S keys
            ring_k[slot[last], position[last] % S] = k[0, last]
            ring_v[slot[last], position[last] % S] = v[0, last]
            return o

        return attend, position[None]

    def decode(self, position):
        """-> attend() for one token a row: row i, at position[i] (B,), owns slot i."""
        B = len(position)
        rows = torch.arange(B, device=position.device)

        def attend(layer, q, k, v):  # q (B, 1, H, D)
            ring_k, ring_v = self.k[layer][:B], self.v[layer][:B]
            slot = position % ring_k.shape[1]
            ring_k[rows, slot], ring_v[rows, slot] = k[:, 0], v[:, 0]
            return swa_decode(q[:, 0], ring_k, ring_v, position)[:, None]

        return attend

    def copy(self, source, targets):
        for ring in self.k + self.v:
            ring[targets] = ring[source].clone()


# --------------------------------------------------------------------------------------------------
# generation


@dataclass
class Rollout:
    """A sampled answer: .tokens end with a stop id if .finished;
    .logprobs (nats) belong to .tokens."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, n_ids=None):
    """logits (B, V), uniform (B,) in [0, 1) -> tokens (B,) and their log-probabilities (B,).

    The inverse of the cumulative distribution at `uniform`: one random number a token, so that a
    sequence's draws depend on its own seed alone. The log-probabilities are those of
    softmax(logits / temperature), untruncated by top_k, top_p and n_ids (ids the tokenizer lacks).
    """
    logp = log_softmax(logits, temperature)
    if temperature == 0:
        token = logp[:, :n_ids].argmax(-1)
    else:
        p = logp[:, :n_ids].exp()
        if top_k or top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            rank = torch.arange(p.shape[-1], device=p.device)
            mass_before = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True)
            ranked = ranked * ((mass_before < top_p) & (rank < (top_k or p.shape[-1])))
            p = torch.zeros_like(p).scatter(-1, order, ranked)
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, uniform[:, None].to(cdf) * cdf[:, -1:], right=True)[:, 0]
        token = token.clamp(max=p.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


def choose_slots(model, n, length):
    """As many slots as the sequences need and half of the free memory holds (the rest is
    activations)."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    elif sys.platform == "linux":
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    else:
        free = 2**32
    slot = RingCache.bytes_per_slot(model.config, length, model.dtype)
    return max(1, min(n, 1024, int(0.5 * free / slot)))


class PackedLinear(nn.Module):
    """A linear layer for a CPU: its matrix in oneDNN's blocked layout."""

    def __init__(self, linear):
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        # 16 rows: a usual batch. torch.compile packs with the same operators, but needs a compiler
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(module):
    """A twin of the module that shares everything but its large matrices on a CPU: packed.

    A step of decoding on a CPU is a few rows times large matrices; packed, they take 0.6 of the
    time. The price is a second copy of the weights for as long as a generation runs.
    """
    if isinstance(module, nn.Linear):
        return PackedLinear(module) if can_pack(module.weight) else module
    twin = copy.copy(module)
    twin._modules = {name: packed(child) for name, child in module._modules.items()}
    return twin


def can_pack(weight):
    return (weight.device.type == "cpu" and weight.numel() >= 2**16  # small ones cost more packed
            and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
                 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Decoder:
    """The running sequences: row i of every tensor, and slot i of the cache, belong to one of them.

    The tensors never move, so that a captured CUDA graph finds them again. A row whose sequence
    has ended computes along but changes nothing. Everything here is on the device; nothing waits
    for the host.
    """

    def __init__(self, model, slots, length, max_new_tokens, temperature=1.0, stop_ids=(),
                 **sampling):
        device = model.device
        integers = {"device": device, "dtype": torch.long}
        # Packed anew for each generation, and so never older than the weights
        self.model, self.temperature, self.sampling = packed(model), temperature, sampling
        self.max_new_tokens, self.graphs = max_new_tokens, {}
        self.cache = RingCache(model.config, slots, length, device, model.dtype)
        self.stops = torch.tensor(sorted(stop_ids) or [-1], device=device)
        self.rows = {
            "token": torch.zeros(slots, **integers),  # the next input
            "position": torch.zeros(slots, **integers),  # its position
            "made": torch.zeros(slots, **integers),  # tokens sampled so far
            "alive": torch.zeros(slots, device=device, dtype=torch.bool),
            # A random number a token
            "uniform": torch.zeros(slots, max_new_tokens + 1, device=device),
            "tokens": torch.zeros(slots, max_new_tokens + 1, **integers),
            "logprobs": torch.zeros(slots, max_new_tokens + 1, device=device),
        }

    def admit(self, prompts, seeds):
        """prompts, seeds: {row: prompt}, {row: seed}. Fills the cache with all but each last
        token: that one is the first step's input, so that a single place samples."""
        for row, prompt in prompts.items():
            self.rows["token"][row], self.rows["position"][row] = prompt[-1], len(prompt) - 1
            generator = torch.Generator().manual_seed(seeds[row])
            uniform = torch.rand(self.max_new_tokens, generator=generator)
            self.rows["uniform"][row, :-1] = uniform
        rows = torch.tensor(list(prompts), device=self.model.device)
        self.rows["made"][rows], self.rows["alive"][rows] = 0, True
        sharing = {}  # equal prompts share one prefill
        for row, prompt in prompts.items():
            sharing.setdefault(tuple(prompt[:-1]), []).append(row)
        packed = []  # whole prompts go together up to PREFILL_TOKENS, a longer one alone in chunks
        for prompt in [p for p in sharing if p]:
            if packed and sum(map(len, packed)) + len(prompt) > PREFILL_TOKENS:
                self.prefill(packed, sharing)
                packed = []
            packed.append(prompt)
        if packed:
            self.prefill(packed, sharing)

    def prefill(self, prompts, sharing):
        tokens = torch.tensor([t for prompt in prompts for t in prompt],
                              device=self.model.device)[None]
        for start in range(0, tokens.shape[1], PREFILL_TOKENS):
            chunk = tokens[:, start:start + PREFILL_TOKENS]
            lengths = [len(p) for p in prompts] if len(prompts) > 1 else [chunk.shape[1]]
            attend, position = self.cache.prefill([sharing[p][0] for p in prompts], lengths, start)
            self.model.hidden(chunk, position, attend)
        for prompt in prompts:
            first, *others = sharing[prompt]
            if others:
                self.cache.copy(first, others)

    def move(self, row, hole):
        """A running row takes the place of one that has ended."""
        for tensor in self.rows.values():
            tensor[hole] = tensor[row]
        self.cache.copy(row, [hole])
        self.rows["alive"][row] = False

    def step(self, n):
        """Rows 0 to n - 1 each take in one token and sample the next."""
        token, position, made, alive, uniform, tokens, logprobs = (
            t[:n] for t in self.rows.values())
        x = self.model.hidden(token[:, None], position[:, None], self.cache.decode(position))
        at = made[:, None]
        new, logp = sample(self.model.lm_head(x[:, 0]), uniform.gather(1, at)[:, 0],
                           self.temperature, **self.sampling)
        tokens.scatter_(1, at, new[:, None])
        logprobs.scatter_(1, at, logp[:, None].float())
        token.copy_(new)
        position += alive
        made += alive
        alive &= (new[:, None] != self.stops).all(-1) & (made < self.max_new_tokens)

    def replay(self, n):
        """step(n) as a CUDA graph: the first step of a size runs as it is and is its warm-up."""
        if n in self.graphs:
            return self.graphs[n].replay()
        self.step(n)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
            self.graphs[n] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[n]):
                self.step(n)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, stop_ids=(), slots=None, seed=None,
             top_k=0, top_p=1.0, n_ids=None, progress=None, stream=None):
    """Samples one answer for each of prompts (lists of ids) -> list[Rollout], in their order.

    Continuous batching: `slots` sequences run at a time (None: what half of the free memory holds,
    at most 1024), the next prompt enters as soon as one ends, and equal prompts that enter
    together share one prefill. temperature 0 is greedy. seed: an int (prompt i then uses seed + i)
    or one a prompt; an answer depends on its own seed only, exactly so in exact arithmetic (matrix
    products of another batch size may round differently). top_k and top_p are for evaluation: they
    bias RL's ratios. progress: a label for a line every ten seconds; stream(i, tokens): called
    with prompt i's new tokens as they come.
    """
    if not prompts or max_new_tokens == 0:
        return [Rollout(list(p), [], [], False) for p in prompts]
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise UsageError("a prompt is empty: give at least one token")
    if longest + max_new_tokens > model.config.max_position_embeddings:
        raise UsageError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's {model.config.max_position_embeddings} positions: "
                         "lower --max-new-tokens")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    seeds = (list(seed) if isinstance(seed, (list, tuple))
             else [seed + i for i in range(len(prompts))])
    slots = min(slots or choose_slots(model, len(prompts), longest + max_new_tokens), len(prompts))
    decoder = Decoder(model, slots, longest + max_new_tokens, max_new_tokens, temperature, stop_ids,
                      top_k=top_k, top_p=top_p, n_ids=n_ids)
    rows, on_gpu = decoder.rows, model.device.type == "cuda"
    waiting, owner, done = list(range(len(prompts)))[::-1], {}, {}  # owner: row -> prompt index
    streamed, finished_tokens, began = {}, 0, time.time()
    shown = began
    while waiting or owner:
        entering = {row: waiting.pop() for row in range(slots) if row not in owner and waiting}
        if entering:
            owner |= entering
            decoder.admit({r: prompts[i] for r, i in entering.items()},
                          {r: seeds[i] for r, i in entering.items()})
        running = len(owner)
        # Holes only when nobody waits any more: the last rows move up, so that the batch shrinks
        holes = [row for row in range(running) if row not in owner]
        for hole, row in zip(holes, [row for row in owner if row >= running], strict=True):
            decoder.move(row, hole)
            owner[hole] = owner.pop(row)
        # Few graphs: powers of two
        n = min(slots, 1 << (running - 1).bit_length()) if on_gpu else running
        for _ in range(8 if on_gpu else 1):  # a GPU is asked only every eighth step who has ended
            decoder.replay(n)
        alive, made = rows["alive"][:running].tolist(), rows["made"][:running].tolist()
        for row, i in list(owner.items()):
            if stream:
                stream(i, rows["tokens"][row, streamed.get(i, 0):made[row]].tolist())
                streamed[i] = made[row]
            if not alive[row]:
                tokens, logprobs = (rows[k][row, :made[row]].tolist()
                                    for k in ("tokens", "logprobs"))
                done[owner.pop(row)] = Rollout(list(prompts[i]), tokens, logprobs,
                                               tokens[-1] in stop_ids)
                finished_tokens += len(tokens)
        if progress and time.time() - shown > 10:
            shown, total = time.time(), finished_tokens + sum(made[row] for row in owner)
            print(f"  {progress} {len(done)}/{len(prompts)} "
                  f"| {total / (shown - began):,.0f} tok/s | {len(owner)}/{slots} slots busy "
                  f"| mean length so far {total / (len(done) + len(owner)):.0f}", flush=True)
    return [done[i] for i in range(len(prompts))]
