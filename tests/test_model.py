"""The model against transformers, the ring cache against the full forward, generation, folders."""

import json
import shutil
import weakref
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import model as nano
from model import Cache, ModelConfig, Tokenizer, Transformer, UsageError, generate, sample

W = 5
SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 256}


def randomize(module, seed=0):
    """fp64 and random everywhere: norms of 1 and biases of 0 would hide that they are ignored."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.double().named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data = 1 + 0.3 * noise if "norm" in name else (1.0 if "embed" in name else 0.4) * noise
    return module.eval().requires_grad_(False)


def tiny(window=W, full_layers=(), model_type="qwen3", **changes):
    shape = SHAPE | changes | {"model_type": model_type}
    return randomize(Transformer(ModelConfig(**shape, window=window, full_layers=full_layers)))


def tokens_of(*shape, seed=1, vocab=61):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------- transformers


def exact_norm(self, x):
    """transformers' RMSNorm without its detour through float32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def exact(hf):
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(exact_norm, module)
    return hf.eval()


def opened(folder):
    """The folder as others see it."""
    transformers = pytest.importorskip("transformers")
    return exact(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CHECKPOINTS = {  # name: (class, its own configuration, the window and full layers that it means)
    "qwen2": ("Qwen2", {}, None, ()),
    "qwen2 with an unused window": ("Qwen2", {"use_sliding_window": False, "sliding_window": W,
                                              "max_window_layers": 1}, None, ()),
    "qwen2 windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": W,
                                 "max_window_layers": 0}, W, ()),
    "qwen2 windowed from layer 2": ("Qwen2", {"use_sliding_window": True, "sliding_window": W,
                                              "max_window_layers": 2}, W, (0, 1)),
    "qwen2 never windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": W}, None, ()),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}, None, ()),
    "qwen3 mixed": ("Qwen3", {"use_sliding_window": True, "sliding_window": W,
                              "layer_types": MIXED}, W, (1,)),
    "llama tied": ("Llama", {"tie_word_embeddings": True}, None, ()),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}, None, ()),
    "mistral": ("Mistral", {"sliding_window": W}, W, ()),
    "mistral without": ("Mistral", {"sliding_window": None}, None, ()),
    "ministral": ("Ministral", {"sliding_window": W, "layer_types": MIXED}, W, (1,)),
}


def older_config(folder, own):
    """config.json as most of the hub has it: the family's own keys, nothing that they imply."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= own | {"rope_parameters": None, "rope_theta": rope.pop("rope_theta")}
    config["rope_scaling"] = rope if len(rope) > 1 else None
    if "layer_types" not in own:
        config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_agrees_both_ways(tmp_path, name):
    """Their folder in ours, single and sharded; ours in theirs, with the window we set."""
    transformers = pytest.importorskip("transformers")
    kind, own, window, full_layers = CHECKPOINTS[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | own)
    theirs = exact(randomize(getattr(transformers, f"{kind}ForCausalLM")(config)))
    x = tokens_of(2, 24)
    theirs.save_pretrained(tmp_path / "one")
    older_config(tmp_path / "one", own)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        ours = Transformer.from_pretrained(tmp_path / folder)
        assert ours.dtype == torch.float64
        assert (ours.config.window, ours.config.full_layers) == (window, full_layers)
        close(ours(x), theirs(x).logits)

    seen = []
    for n, (window, full_layers) in enumerate([(None, ()), (W, ()), (W - 1, ()), (W, (0, 2))]):
        ours = Transformer.from_pretrained(tmp_path / "one", window, full_layers)
        ours.save_pretrained(tmp_path / str(n))
        again = Transformer.from_pretrained(tmp_path / str(n))
        assert (again.config.window, again.config.full_layers) == (window, full_layers)
        seen.append(opened(tmp_path / str(n))(x).logits)
        close(ours(x), seen[-1])
        close(again(x), seen[-1])
        for other in seen[:-1]:  # a window that is written but not honoured changes nothing
            assert (seen[-1] - other).abs().max() > 1e-3


@torch.no_grad()
def test_smollm2_logits_and_greedy_text(smollm2):
    """Real weights and the real tokenizer give transformers' logits and its own greedy text."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours, tokenizer = Transformer.from_pretrained(smollm2), Tokenizer.from_pretrained(smollm2)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    close(ours(torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits, 1e-3)
    said = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    [rollout] = generate(ours, [prompt], 20, temperature=0, stop_ids=tokenizer.stop_ids)
    assert rollout.tokens == said[0, len(prompt):].tolist()
    assert "Paris" in tokenizer.decode(rollout.tokens)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("own", [{"nope_full": True}, {"sinks": 2},
                                 {"sinks": 2, "nope_full": True}])
def test_nobody_else_opens_sinks_and_full_layers_without_rope(tmp_path, own, kind):
    transformers = pytest.importorskip("transformers")
    ours = tiny(full_layers=(1,), model_type=kind, **own)
    x = tokens_of(1, 3 * W)
    plain = tiny(full_layers=(1,), model_type=kind)
    assert (ours(x) - plain(x)).abs().max() > 1e-3
    ours.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in own} == own
    close(again(x), ours(x))
    with pytest.raises((ValueError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def on_a_gpu(module):
    """Its parameters as fake float32 ones, which training keeps."""
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            weight = torch.empty(p.shape, device="cuda")
            setattr(child, name, torch.nn.Parameter(weight, requires_grad=False))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_types_under_autocast_on_a_gpu(family):
    """There rms_norm is computed in float32; the attention gets bfloat16 all the same."""
    seen, block = [], tiny(model_type=family).model.layers[0]

    def attend(*qkv):
        seen.extend(qkv)
        return qkv[0]

    with FakeTensorMode(allow_non_fake_inputs=True):
        on_a_gpu(block)
        x, rope = (torch.empty(shape, device="cuda", dtype=torch.bfloat16)
                   for shape in ((1, 7, 32), (1, 7, 1, 8)))
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            y = block(x, (rope, rope), attend)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
    assert [t.dtype for t in (*seen, y)] == [torch.bfloat16] * 4


# -------------------------------------------------------------------------------- full and cached


@pytest.mark.parametrize(("full_layers", "sinks"), [((), 0), ((), 3), ((1,), 0)])
def test_reach_is_layers_times_window_minus_one_and_the_sinks(full_layers, sinks):
    ours, T = tiny(full_layers=full_layers, sinks=sinks), 20
    seen = []
    ours.model.embed_tokens.register_forward_hook(
        lambda module, _, x: seen.append(x.requires_grad_()) or x)
    ours(tokens_of(1, T))[0, -1].sum().backward()
    touched = seen[0].grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    near = range(0 if full_layers else T - 1 - 3 * (W - 1), T)
    assert touched == [*range(sinks), *near]


@pytest.mark.parametrize("sinks", [0, 3])
def test_packed_rows_are_separate_rows(sinks):
    ours, lengths = tiny(sinks=sinks), [1, W, 13, 2]
    x = tokens_of(1, sum(lengths))
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    apart = torch.cat([ours(part) for part in x.split(lengths, 1)], 1)
    close(ours(x, cu_seqlens), apart)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_in_chunks(monkeypatch, temperature):
    """log p is that of softmax(logits / T), however the logits are chunked; so is the gradient."""
    results = []
    targets = tokens_of(2, 11, seed=2)
    targets[0, :6] = -1
    for elements in (nano.LOGITS_PER_CHUNK, 4 * 61):
        monkeypatch.setattr(nano, "LOGITS_PER_CHUNK", elements)
        ours = tiny().requires_grad_()
        logp = ours(tokens_of(2, 11), targets=targets, temperature=temperature)
        (logp * torch.arange(22).view(2, 11)).sum().backward()
        results.append([logp, *(p.grad for p in ours.parameters())])
    for one, many in zip(*results, strict=True):
        close(one, many)
    reference = F.log_softmax(ours(tokens_of(2, 11)) / temperature, -1)
    asked = targets >= 0
    close(logp, reference.gather(-1, targets.clamp(0)[..., None])[..., 0] * asked)
    assert not ours(tokens_of(1, 3), targets=torch.full((1, 3), -1)).any()


KINDS = {"windowed": {}, "mixed": {"full_layers": (0,)}, "full": {"window": None},
         "W=1": {"window": 1}, "qwen2": {"model_type": "qwen2"}, "sinks": {"sinks": 3},
         "sinks, W=1, mixed": {"sinks": 1, "window": 1, "full_layers": (1,)},
         "sinks beyond the window": {"sinks": 2 * W}, "nothing but sinks": {"sinks": 5 * W}}


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_ring_cache_is_the_full_forward(kind, chunk):
    """Prefill whole, packed or chunk by chunk, then token by token across wrap-around, rows at
    different positions; unwritten slots are NaN, and the slots are then used a second time."""
    ours = tiny(**KINDS[kind])
    cache = Cache(ours.config, 4, 5 * W, dtype=torch.float64)
    for keys, values in cache.layers:
        keys.fill_(torch.nan), values.fill_(torch.nan)
    slots = [3, 0, 2, 1]  # of the rows
    for lengths in ([W - 1, W, W + 1, 2 * W + 3], [2, 1, W + 1, W - 2]):
        rows = [tokens_of(n + 2 * W, seed=n) for n in lengths]
        full = [ours(row[None])[0] for row in rows]
        prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        if chunk == 1000:  # all prompts in one packed forward
            attend, positions = cache.prefill(slots, lengths)
            x = ours.lm_head(ours.hidden(torch.cat(prompts)[None], positions, attend))[0]
            close(x, torch.cat([full[i][:n] for i, n in enumerate(lengths)]))
        for i, prompt in enumerate(prompts if chunk < 1000 else []):
            for start in range(0, len(prompt), chunk):
                part = prompt[start:start + chunk]
                attend, positions = cache.prefill([slots[i]], [len(part)], start)
                x = ours.lm_head(ours.hidden(part[None], positions, attend))[0]
                close(x, full[i][start:start + len(part)])
        for t in range(2 * W):
            at = [(slots.index(slot), lengths[slots.index(slot)] + t) for slot in range(4)]
            position = torch.tensor([p for _, p in at])
            token = torch.stack([rows[i][p] for i, p in at])
            x = ours.hidden(token[:, None], position[:, None], cache.decode(position))
            close(ours.lm_head(x[:, 0]), torch.stack([full[i][p] for i, p in at]))


@pytest.mark.parametrize("sinks", [0, 1, 3, 3 * W, 6 * W])
def test_what_a_cache_holds_lies_apart(sinks):
    """Two positions in one place would be written in any order, on a GPU."""
    attention = nano.SlidingWindow(tiny(sinks=sinks).config, W)
    for length in (2, W, W + sinks, 6 * W):
        places = attention.empty_cache(1, length)[0].shape[1]
        for end in range(1, length + 1):
            position = torch.arange(end)
            held = position[attention.held(position, end, places)]
            assert held.tolist() == [p for p in range(end) if p < sinks or p >= end - W]
            at = attention.place(held, places).tolist()
            assert len(set(at)) == len(at) and max(at) < places


def test_cache_memory_is_constant_under_a_window():
    def size(length, **kind):
        config = tiny(**kind).config
        cache = Cache(config, 3, length, dtype=torch.bfloat16)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer)
        assert held == cache.nbytes == 3 * Cache.bytes_per_slot(config, length, torch.bfloat16)
        return held

    assert size(100) == size(10_000) == 3 * 2 * 3 * W * 2 * 8 * 2
    assert size(100, full_layers=(1,)) < size(10_000, full_layers=(1,))
    assert size(100, window=None) * 100 == size(10_000, window=None)
    assert size(2) < size(100)  # a ring longer than the longest sequence would be wasted
    assert size(10_000, sinks=3) == 3 * 2 * 3 * (W + 3) * 2 * 8 * 2
    assert size(W + 2, sinks=3) == size(W + 2, window=None)


# ------------------------------------------------------------------------------------- generation

PROMPTS = [tokens_of(n, seed=n).tolist() for n in (1, W - 1, W, W + 1, 2 * W + 3, 2)]
PROMPTS += [PROMPTS[4], PROMPTS[1], PROMPTS[4]]


@torch.no_grad()
def greedy(ours, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(ours(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("prefill_tokens", [4, 16, 8192])
@pytest.mark.parametrize("kind", ["windowed", "mixed", "full", "sinks"])
def test_greedy_is_the_argmax_of_the_full_forward(monkeypatch, kind, prefill_tokens):
    monkeypatch.setattr(nano, "PREFILL_TOKENS", prefill_tokens)
    ours = tiny(**KINDS[kind])
    expected = [greedy(ours, p, 2 * W) for p in PROMPTS]
    stop = expected[4][W]  # some end early, so that rows are freed, refilled and moved together
    for slots in (1, 4, None):
        rollouts = generate(ours, PROMPTS, 2 * W, temperature=0, slots=slots, stop_ids={stop, 60})
        for rollout, prompt, tokens in zip(rollouts, PROMPTS, expected, strict=True):
            ends = [i for i, t in enumerate(tokens) if t in (stop, 60)]
            assert rollout.prompt == prompt
            assert rollout.tokens == tokens[:ends[0] + 1 if ends else None]
            assert rollout.finished == bool(ends)


def test_equal_prompts_share_a_prefill(monkeypatch):
    prefilled, prefill = [], Cache.prefill
    monkeypatch.setattr(Cache, "prefill", lambda self, slots, lengths, start=0:
                        prefilled.extend(lengths) or prefill(self, slots, lengths, start))
    alone = [generate(tiny(), [PROMPTS[4]], 2 * W, seed=s)[0].tokens for s in range(6)]
    assert prefilled == [2 * W + 2] * 6
    prefilled.clear()
    together = generate(tiny(), [PROMPTS[4]] * 6 + [PROMPTS[1]], 2 * W, seed=[*range(6), 0])
    assert sorted(prefilled) == [W - 2, 2 * W + 2]
    assert [r.tokens for r in together[:6]] == alone
    assert len(set(map(tuple, alone))) > 1


def test_an_answer_depends_on_its_own_seed_only():
    ours, seeds = tiny(), list(range(50, 59))
    runs = [generate(ours, PROMPTS, 12, 0.8, stop_ids={3, 4, 5}, slots=slots, seed=seeds)
            for slots in (None, 1, 2, 5)]
    order = [5, 2, 8, 0, 7, 1, 3, 6, 4]
    shuffled = generate(ours, [PROMPTS[i] for i in order], 12, 0.8, stop_ids={3, 4, 5}, slots=3,
                        seed=[seeds[i] for i in order])
    runs.append([shuffled[order.index(i)] for i in range(9)])
    for run in runs[1:]:
        assert [r.tokens for r in run] == [r.tokens for r in runs[0]]
        assert [r.finished for r in run] == [r.tokens[-1] in (3, 4, 5) for r in runs[0]]
        for a, b in zip(run, runs[0], strict=True):
            close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), 1e-5)
    assert generate(ours, PROMPTS, 12, 0.8, seed=50)[3].tokens[:3] == runs[0][3].tokens[:3]
    assert runs[0][4].tokens != runs[0][6].tokens  # one prompt, two seeds


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_training_forward(temperature):
    ours = tiny(full_layers=(2,))
    for r in generate(ours, PROMPTS, 9, temperature, stop_ids={7}, seed=1, top_k=20, n_ids=50):
        ids = torch.tensor([r.prompt + r.tokens])
        targets = ids[:, 1:].clone()
        targets[:, :len(r.prompt) - 1] = -1
        logp = ours(ids[:, :-1], targets=targets, temperature=temperature)
        close(torch.tensor(r.logprobs), logp[0, len(r.prompt) - 1:].float(), 1e-5)
        assert max(r.tokens) < 50 and 0 < len(r.tokens) <= 9


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_blocked_matrices_are_the_weights_of_now(dtype, tolerance):
    ours = tiny(model_type="qwen2", hidden_size=256, intermediate_size=512).to(dtype)
    for p in ours.parameters():
        p.mul_(1 if p.dim() == 1 else 0.3)
    if not nano.can_block(ours.model.layers[0].mlp.up_proj.weight):
        pytest.skip("this CPU does not block")
    kinds = [type(module) for module in nano.blocked(ours).modules()]
    assert kinds.count(nano.BlockedLinear) == 9 and torch.nn.Linear in kinds  # MLPs, not q to o
    assert not any(isinstance(module, nano.BlockedLinear) for module in ours.modules())
    for _ in range(2):  # weights that change between two generations: RL's refreshed copy
        logprobs, expected = [], []
        for r in generate(ours, PROMPTS[:3], 9, seed=1):
            ids = torch.tensor([r.prompt + r.tokens])
            logp = ours(ids[:, :-1], targets=ids[:, 1:])
            logprobs += r.logprobs
            expected += logp[0, len(r.prompt) - 1:].tolist()
        close(torch.tensor(logprobs), torch.tensor(expected), tolerance)
        assert torch.tensor(expected).std() > 3 * tolerance
        for block in ours.model.layers:
            block.mlp.up_proj.weight *= -2


def chi_square(tokens, p):
    expected = p * len(tokens)
    return ((torch.bincount(tokens, minlength=len(p)) - expected) ** 2 / expected).sum()


@torch.no_grad()
def test_sampling_frequencies_are_the_softmax():
    """A chi-square with 7 degrees of freedom exceeds 45 once in ten million."""
    ours = tiny(vocab_size=8)
    ours.lm_head.weight *= 0.3
    p = (ours(torch.tensor([[1, 2, 3]]))[0, -1] / 0.9).softmax(-1)
    rollouts = generate(ours, [[1, 2, 3]] * 4000, 1, 0.9, seed=0)
    drawn = torch.tensor([r.tokens[0] for r in rollouts])
    assert p.max() < 0.9 and chi_square(drawn, p) < 45
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    best = p.argsort(descending=True)
    for kept, options in ((best[:3], {"top_k": 3}), (best[:2], {"top_p": p[best[:2]].sum() - 1e-9}),
                          (best[:1], {"top_p": 1e-9}), (torch.arange(5), {"n_ids": 5})):
        tokens, logp = sample(p.log().expand(4000, 8), uniform, **options)
        q = torch.zeros(8, dtype=p.dtype).index_copy(0, kept, p[kept] / p[kept].sum())
        assert not q[tokens].eq(0).any()
        assert chi_square(tokens, q.clamp(min=1e-12)) < 45
        close(logp, p.log()[tokens])  # untruncated
    for u in (0.0, 1 - 2**-24):  # the ends of the interval fall on tokens that may be drawn
        token, _ = sample(torch.tensor([[-torch.inf, 0, 1, -torch.inf]]), torch.tensor([u]))
        assert token.item() in (1, 2)


def test_stream_and_limits():
    ours, got = tiny(), {}
    rollouts = generate(ours, PROMPTS, 6, seed=3, slots=2, stop_ids={8},
                        stream=lambda i, new: got.setdefault(i, []).extend(new))
    assert [got[i] for i in range(len(PROMPTS))] == [r.tokens for r in rollouts]
    assert generate(ours, [], 5) == []
    [nothing] = generate(ours, [[1, 2]], 0)
    assert (nothing.tokens, nothing.logprobs, nothing.finished) == ([], [], False)
    assert len(generate(ours, [[1] * 250], 6)[0].tokens) == 6
    for prompts, n, message in (([[1], []], 5, "empty"), ([[1] * 251], 6, "256 positions")):
        with pytest.raises(UsageError, match=message):
            generate(ours, prompts, n)


def test_cancelled_generation_frees_its_memory(monkeypatch):
    class Watched(Cache):
        def __init__(self, *args):
            super().__init__(*args)
            tensors = [t for layer in self.layers for t in layer if t.device.type != "meta"]
            alive.extend(map(weakref.ref, tensors))

    def cancel(i, tokens):
        raise KeyboardInterrupt

    alive = []
    monkeypatch.setattr(nano, "Cache", Watched)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny(), PROMPTS, 6, stream=cancel)
    generate(tiny(), PROMPTS, 6)
    assert len(alive) == 12 and not any(ref() is not None for ref in alive)


# ---------------------------------------------------------------------------------------- folders


def test_window_of_a_folder(tmp_path):
    """A converted model keeps its window unless told otherwise, and its sinks beside any window;
    tokenizer files come along."""
    ours = tiny(sinks=2)
    ours.tokenizer_files = {"tokenizer.json": b"{}"}
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"
    assert not list(tmp_path.glob("*.tmp"))
    x = tokens_of(1, 3 * W)
    for window, same in (("config", True), (W, True), (None, False), (W + 1, False)):
        again = Transformer.from_pretrained(tmp_path, window, dtype=torch.float64)
        assert again.config.window == (W if window == "config" else window)
        assert again.config.sinks == (2 if window else 0)
        assert torch.allclose(again(x), ours(x)) == same
    assert Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    for window in (0, -1, 2.0, True, "5", "full"):
        with pytest.raises(UsageError, match="window"):
            Transformer.from_pretrained(tmp_path, window)
    with pytest.raises(UsageError, match="full layers"):
        Transformer.from_pretrained(tmp_path, W, full_layers=[3])


def edit(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {name: value for name, value in config.items() if value != "drop"}
        (folder / "config.json").write_text(json.dumps(config))
    return change


def weights(change):
    def rewrite(folder):
        tensors = nano.read_weights(folder)
        change(tensors)
        nano.save_file(tensors, folder / "model.safetensors")
    return rewrite


def sharded(weight_map, **shards):
    def split(folder):
        for name, tensors in shards.items():
            nano.save_file(tensors, folder / f"{name}.safetensors")
        index = {"weight_map": weight_map} if weight_map != "drop" else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return split


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS = {  # what is done to a good folder -> what the message says
    "no folder": (shutil.rmtree, "not a model folder"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config.json cut": (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
    "config.json a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "no width": (edit(hidden_size="drop"), "lacks hidden_size"),
    "other architecture": (edit(model_type="gpt2"), "model_type 'gpt2'"),
    "other activation": (edit(hidden_act="gelu"), "hidden_act='gelu'"),
    "other RoPE": (edit(rope_parameters={"rope_type": "yarn", "factor": 4}), "'yarn'"),
    "older RoPE": (edit(rope_parameters="drop", rope_scaling={"type": "linear"}), "'linear'"),
    "bad window": (edit(sliding_window=0), "window 0"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors only"),
    "weights cut": (cut, "damaged or truncated"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or truncated"),
    "shard missing": (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {Q: "model-00001-of-00002.safetensors"}})), "has no model-00001"),
    "tensor missing": (weights(lambda t: t.pop(Q)), f"lacks tensors {Q}"),
    "tensor unknown": (weights(lambda t: t.update(x=torch.ones(1))), "has unknown tensors x"),
    "tensor misshapen": (weights(lambda t: t.update({Q: torch.ones(3, 3)})), "has shape"),
    "tensor twice": (sharded({"x": "a.safetensors", Q: "b.safetensors"}, a={Q: torch.ones(2)},
                             b={Q: torch.ones(2)}), f"{Q} in two files"),
    "int8": (weights(lambda t: t.update({Q: t[Q].to(torch.int8)})), "q_proj.* as I8.*quantised"),
    "fp8": (weights(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    "weight NaN": (weights(lambda t: t[Q][0].fill_(torch.nan)), "q_proj.* NaN or infinity"),
    "weight inf": (weights(lambda t: t[Q][0].fill_(-torch.inf)), "q_proj.* NaN or infinity"),
    "index without map": (sharded("drop"), "index.json is malformed"),
    "index map a list": (sharded([Q]), "index.json is malformed"),
    "index map empty": (sharded({}), "names no files"),
    "index of numbers": (sharded({Q: 1, "x": "a"}), "index.json is malformed"),
    "index names above": (sharded({Q: "../model.safetensors"}), "outside of the folder"),
    "index names elsewhere": (sharded({Q: "/etc/passwd"}), "outside of the folder"),
    "config.json 200,000 deep": (lambda f: (f / "config.json").write_text("[" * 200_000),
                                 "not readable JSON"),
    "config.json a folder": (lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
                             "config.json is not readable"),
    "config.json with no text": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
                                 "not readable JSON"),
    "a name of two lines": (edit(model_type="a\nb" * 10**6), "model_type"),
}
LLAMA3_WITHOUT = {key: value for key, value in LLAMA3.items() if key != "factor"}
ENTRIES = {  # what config.json says -> what the message says
    "hidden_size": [0, -32, "32", 32.5, True, [32], 10**12, {}],
    "vocab_size": [0, 10**18, "61"],
    "intermediate_size": [-1, 1e3],
    "num_hidden_layers": [0, -3, 20_000, 10**9, "3", True],
    "num_attention_heads": [0, "4", 3, 10**9],  # 3 is no multiple of the two KV heads
    "num_key_value_heads": [-2, "2", 3],
    "head_dim": [-8, 7, "8", [8], 10**9],
    "max_position_embeddings": [-1, "256"],
    "rms_norm_eps": ["1e-6", -1, float("nan"), float("inf"), [0], True],
    "rope_parameters": [[1], "default", {"rope_type": ["llama3"]}, LLAMA3_WITHOUT,
                        LLAMA3 | {"factor": "8"}, LLAMA3 | {"factor": 0},
                        LLAMA3 | {"high_freq_factor": 1.0}, {"rope_theta": float("nan")},
                        {"rope_theta": "x"}, {"rope_theta": -5.0}],
    "rope_theta": [float("nan"), float("inf"), "10000", -1, [1]],
    "tie_word_embeddings": ["false", 0, "no"],
    "sinks": [-1, 256, "4", 2.5, True, 10**30, [4]],
    "use_sliding_window": ["false", 1],
    "sliding_window": ["5", -1, 2.5, 10**30, [5], True],
    "max_window_layers": ["2", -1],
    "layer_types": [3, ["full_attention"], [1, 2, 3], [["full_attention"]] * 3, "full_attention",
                    ["full_attention", "sliding_attention", "linear_attention"]],
    "model_type": [["qwen3"], 3, {}, "nanoswarr"],
}
WORDS = {"head_dim": "head", "num_attention_heads": "heads", "num_key_value_heads": "heads",
         "rope_parameters": "RoPE|rope|factor|lacks", "sliding_window": "window",
         "model_type": "model_type"}
FAULTS |= {f"{key} {str(value)[:90]}": (edit(**{key: value}), WORDS.get(key, key))
           for key, values in ENTRIES.items() for value in values}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_one_sentence(tmp_path, fault):
    damage, message = FAULTS[fault]
    tiny().save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UsageError, match=message) as error:
        Transformer.from_pretrained(tmp_path / "model")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_headers_are_compared_before_anything_is_built(tmp_path, monkeypatch):
    """A folder of 3 layers whose config.json says 900, with 16 million ids."""
    tiny().save_pretrained(tmp_path)
    edit(num_hidden_layers=900, vocab_size=nano.MAX_IDS, layer_types="drop")(tmp_path)
    built, init = [], nano.Block.__init__
    monkeypatch.setattr(nano.Block, "__init__", lambda *a: built.append(a) or init(*a))
    monkeypatch.setattr(nano, "read_weights", None)
    with pytest.raises(UsageError, match="lacks tensors .* and 9864 more: the weights"):
        Transformer.from_pretrained(tmp_path)
    assert len(built) <= 1


def test_what_a_folder_may_leave_out(tmp_path):
    """null is absent; a tied model's file may hold a head, which is not read as one."""
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    absent = dict.fromkeys(("rms_norm_eps", "rope_scaling", "layer_types", "nope_full",
                            "max_window_layers", "max_position_embeddings"))
    edit(**absent)(tmp_path)
    weights(lambda t: t.update({"lm_head.weight": torch.ones(1)}))(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config.rms_norm_eps == 1e-6 and ours.config.max_position_embeddings == 2048


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for load in (Transformer, Tokenizer):
        with pytest.raises(UsageError, match="fetched from the hub.*ConnectionError") as error:
            load.from_pretrained("nobody/nothing")
        assert "\n" not in str(error.value)
