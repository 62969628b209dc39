"""Speed and memory: attention kernels, generation, training; SA against SWA side by side in one
run.

Every comparison alternates its contestants and reports medians, so that ratios hold on a noisy
machine. On a GPU the shape is Qwen2.5-1.5B's by default; on a CPU the CPU paths run, at sizes that
take minutes. Weights are random: speed does not depend on them, and nothing is downloaded. Peers
run where they are installed.

Left out on purpose: accuracy (eval.py), and single absolute times as pass or fail.

    python bench.py                                     # everything that this machine can run
    python bench.py generate --shape smollm2-135m
"""

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from convert_sft import (
    COLORS,
    TASKS,
    FlagParser,
    Trainer,
    describe_machine,
    make_row,
    markdown,
    memory_plan,
    new_figure,
    peak_bytes,
    pick_device,
    save_figure,
)
from model import Cache, Decoder, ModelConfig, Transformer, captured, cli, generate, write_file
from rl import grpo_loss
from swa_kernel import swa_attention, swa_attention_reference, swa_decode

SHAPES = {  # the published configurations; tiny is the miniature's
    "tiny": TASKS["tiny"].config,
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192,
                                rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, model_type="qwen2",
                                rope_theta=1e6, max_position_embeddings=131072,
                                tie_word_embeddings=True),
}


# --------------------------------------------------------------------------------------------------
# measuring


def side_by_side(contestants, repeats, device, patience=math.inf):
    """{name: function} -> {name: median seconds}: one warm-up each, then turn by turn, each turn
    begun by the next (on a CPU the first finds the memory that the last has left). Whose turns took
    more than `patience` seconds together has no further one."""
    seconds, order = {name: [] for name in contestants}, list(contestants.items())
    for turn in range(repeats + 1):
        first = turn % max(1, len(order))
        for name, run in order[first:] + order[:first]:
            if sum(seconds[name]) > patience:
                continue
            taken = timed(run, device)
            if turn:
                seconds[name].append(taken)
            if taken > 2:
                print(f"  {name}: turn {turn} of {repeats}: {taken:.1f} s", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run, device):
    """Seconds of one call; on a GPU the GPU's own.

    There the L2 cache is overwritten first, or a call would find what the last one left in it. And
    the GPU is made to spin while the host enqueues the call, whose dispatch (50 us and more) would
    be timed else.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    l2_flush(device).zero_()
    torch.cuda._sleep(10**6)  # cycles, about half a millisecond
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


@cache
def l2_flush(device):
    """Larger than any L2 cache."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def copy_bandwidth(device):
    """Bytes a second of a large copy on the device, read plus written: the ceiling of decode."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(255)
    target = torch.empty_like(source)
    seconds = side_by_side({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.numel() / seconds


def matmul_rate(device, n=8192):
    """FLOP/s of a large bf16 matrix product (float32 on a CPU): the ceiling of training."""
    n, dtype = (n, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n**3 / side_by_side({"mm": lambda: a @ b}, 10, device)["mm"]


def random_model(shape, window, device, dtype):
    """Random weights as large as trained ones: with larger ones every distribution collapses, and
    a CPU computes its denormal numbers ten times as slowly."""
    torch.manual_seed(0)
    with device:
        model = Transformer(replace(SHAPES[shape], window=window))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(dtype)


def transformers_model(model):
    """The same weights in transformers, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        return peer.to(model.device)


def shown(value):
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def finish(args, name, rows, draw=None):
    """The table, the picture, the JSON file and the JSON line of one benchmark."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(markdown(rows, shown)))
    result = {"bench": name, "machine": describe_machine(args.torch_device), "rows": rows}
    write_file(folder / f"{name}.json", lambda f: f.write_text(json.dumps(result, indent=1)))
    if draw:
        figure = new_figure(8, 3.4)
        draw(figure, rows)
        save_figure(figure, folder / f"{name}.png")
    print(json.dumps(result), flush=True)


# --------------------------------------------------------------------------------------------------
# kernels

KERNEL_SECONDS = 360  # after them a GPU begins no other size: the last and decode end within eight


def pairs(T, W):
    """Query-key pairs inside the window: the work that is credited, whatever tiles compute."""
    W = min(W or T, T)
    return W * T - W * (W - 1) // 2


@dataclass
class Contestant:
    """An attention (q, k, v, window) -> o on (B, T, H, D)."""

    attend: object
    windowed: bool = True  # else full causal attention only
    longest: int = 2**20  # T that its memory allows


def sdpa(backend):
    """Full causal attention by one of PyTorch's backends."""
    def attend(q, k, v, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)

    return attend


def masked_sdpa():
    """SDPA with a boolean mask of the window: what one writes without a kernel."""
    masks = {}

    def attend(q, k, v, window):
        T = q.shape[1]
        if (T, window) not in masks:
            position = torch.arange(T, device=q.device)
            distance = position[:, None] - position
            masks[T, window] = (distance >= 0) & (distance < (window or T))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[T, window],
                                              enable_gqa=True).transpose(1, 2)

    return attend


def compiled(function, **options):
    """torch.compile for a contestant: each shape on its own, and really compiled."""
    torch._dynamo.config.recompile_limit = 1000  # from the ninth shape on it would run uncompiled
    torch._functorch.config.donated_buffer = False  # or backward runs once only: no retain_graph
    return torch.compile(function, dynamic=False, **options)


def flex_attention():
    """FlexAttention, compiled, with a sliding-window block mask."""
    from torch.nn.attention import flex_attention as flex

    attention, masks = compiled(flex.flex_attention), {}
    block_mask = compiled(flex.create_block_mask)  # uncompiled, it fills T x T numbers

    def attend(q, k, v, window):
        T, W = q.shape[1], window or q.shape[1]
        if (T, W) not in masks:
            masks[T, W] = block_mask(lambda b, h, i, j: (i >= j) & (i - j < W), None, None, T, T,
                                     device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, block_mask=masks[T, W], enable_gqa=True).transpose(1, 2)

    return attend


def bench_kernels(args):
    """Forward, backward and decode; credited operations 4 and 10 a pair, head and dimension."""
    device, gpu = args.torch_device, args.torch_device.type == "cuda"
    contestants = {"swa_kernel": Contestant(swa_attention),
                   "swa_kernel, 64 sinks": Contestant(partial(swa_attention, sinks=64))}
    if gpu:
        contestants |= {
            "FlexAttention": Contestant(flex_attention()),
            "SDPA flash": Contestant(sdpa(SDPBackend.FLASH_ATTENTION), windowed=False),
            "SDPA cuDNN": Contestant(sdpa(SDPBackend.CUDNN_ATTENTION), windowed=False),
            "naive twin": Contestant(swa_attention_reference, longest=4096)}
        # by default few, since FlexAttention compiles each size for half a minute
        lengths, windows = [4096, 32768, 131072], [4096, None]
        if args.full:
            lengths, windows = [2**n for n in range(11, 18)], [1024, 2048, 4096, 8192, None]
        dims, rings = (128, 64), [(1, 4096), (64, 4096), (16, 32768)]  # rings: batch, places
    else:
        contestants["SDPA, full mask"] = Contestant(masked_sdpa())
        lengths, windows = [1024, 4096, 16384], [512]
        dims, rings = (64,), [(128, 24), (8, 512)]
    ceilings = {"matmul": matmul_rate(device), "copy": copy_bandwidth(device)}
    print(f"ceilings: matrix product {ceilings['matmul'] / 1e12:.3g} TFLOP/s, "
          f"copy {ceilings['copy'] / 1e9:.3g} GB/s", flush=True)
    rows, ending = [], time.monotonic() + KERNEL_SECONDS
    for D, T, W in product(dims, lengths, windows):
        if W and W >= T:
            continue
        if gpu and not args.full and time.monotonic() > ending:
            print(f"  D={D} T={T} W={W or 'full'} left out for want of time: --full", flush=True)
            continue
        rows += attention_rows(contestants, D, T, W, ceilings["matmul"], args)
        print(f"  D={D} T={T} W={W or 'full'} done", flush=True)
    for batch, places in rings:
        rows += decode_rows(batch, places, dims[0], ceilings["copy"], args)
    finish(args, f"kernels-{'gpu' if gpu else 'cpu'}", rows, draw_kernels)


def random_heads(device, D, *lengths):
    """q, k, v (1, length, heads, D), of Qwen2.5-1.5B's heads on a GPU."""
    gpu = device.type == "cuda"
    H, Hkv = (12, 2) if gpu else (2, 1)
    kind = {"device": device, "dtype": torch.bfloat16 if gpu else torch.float32}
    return [torch.randn(*shape, heads, D, **kind) for shape, heads in zip(lengths, (H, Hkv, Hkv))]


def attention_rows(contestants, D, T, W, rate, args):
    """Each contestant's forward and backward at one size, or why there is none."""
    device, gpu = args.torch_device, args.torch_device.type == "cuda"
    q, k, v = (x.requires_grad_() for x in random_heads(device, D, (1, T), (1, T), (1, T)))
    gradient, runs, memory, rows = torch.randn_like(q), {}, {}, []
    size = {"D": D, "T": T, "W": W or "full"}
    for name, contestant in contestants.items():
        if T > contestant.longest or (W and not contestant.windowed):
            continue
        try:
            o, memory[name] = first_run(contestant.attend, (q, k, v), gradient, W, device)
        except Exception as error:  # no kernel for this shape, out of memory, a compiler's: any
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            print(f"  {name}, {size}: {reason}", flush=True)
            rows.append({"part": "forward, backward", "what": name, **size, "failed": reason})
            continue
        runs[name, "forward"] = torch.no_grad()(partial(contestant.attend, q, k, v, W))
        runs[name, "backward"] = partial(torch.autograd.grad, o, (q, k, v), gradient,
                                         retain_graph=True)
    turns, patience = (10 * args.repeats, 2) if gpu else (args.repeats, math.inf)
    for (name, part), seconds in side_by_side(runs, turns, device, patience).items():
        flops = (4 if part == "forward" else 10) * q.shape[2] * D * pairs(T, W)
        rows.append({"part": part, "what": name, **size,
                     "ms": seconds * 1e3, "TFLOP/s": flops / seconds / 1e12,
                     "of ceiling": flops / seconds / rate, "MB": memory[name]})
    return rows


def first_run(attend, qkv, gradient, W, device):
    """-> (output, MB that forward and backward take at their peak; None on a CPU)."""
    def both():
        o = attend(*qkv, W)
        torch.autograd.grad(o, qkv, gradient, retain_graph=True)
        return o

    if device.type != "cuda":
        return both(), None
    both()  # compiles, and makes masks: neither is what attention takes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return both(), (torch.cuda.max_memory_allocated() - before) / 1e6


def decode_rows(batch, places, D, bandwidth, args):
    """One token a sequence against a full ring; the ceiling is the time to read it."""
    device = args.torch_device
    q, k, v = random_heads(device, D, (batch,), (batch, places), (batch, places))
    position = torch.full((batch,), places + 3, device=device)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))  # in memory as the model's cache is
    runs = {"swa_kernel": partial(swa_decode, q, k.transpose(1, 2), v.transpose(1, 2), position),
            "SDPA": partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True)}
    if device.type == "cuda":  # as generation runs it, without launch gaps
        runs |= {f"{name}, graph": captured(run).replay for name, run in list(runs.items())}
    size = k.nbytes + v.nbytes
    return [{"part": "decode", "what": f"{name}, batch {batch}", "D": D, "T": 1, "W": places,
             "ms": seconds * 1e3, "TFLOP/s": None, "of ceiling": size / seconds / bandwidth,
             "MB": size / 1e6}
            for name, seconds in side_by_side(runs, 20 * args.repeats, device).items()]


def draw_kernels(figure, rows):
    """Time against length, a colour a contestant, a marker a window; the first head dimension."""
    colors = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    rows = [row for row in rows if row["part"] != "decode" and row["D"] == rows[0]["D"]]
    names, windows = (list(dict.fromkeys(row[key] for row in rows)) for key in ("what", "W"))
    styles = dict(zip(windows, ("o-", "s--", "^:", "v-.", "D-")))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, part in zip(axes, ("forward", "backward"), strict=True):
        for color, name in zip(colors, names):
            for W in windows:
                line = [(row["T"], row["ms"]) for row in rows
                        if (row["part"], row["what"], row["W"]) == (part, name, W)]
                if line:
                    axis.loglog(*zip(*line, strict=True), styles[W], color=color,
                                label=f"{name}, W={W}", markersize=4)
        axis.set(title=f"{part}, D={rows[0]['D']}", xlabel="sequence length (tokens)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time (ms)")
    axes[0].legend(fontsize=6)


# --------------------------------------------------------------------------------------------------
# generation

QUARTERS = [1 / 8, 3 / 8, 5 / 8, 7 / 8]  # the middle of each quarter of a generation


def decode_seconds(model, slots, length, steps=24):
    """Mean seconds of a decode step over a generation of `length` tokens, and its peak GB."""
    torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, slots, length, max_new_tokens=10**6 // slots + 2 * steps, n_ids=None)
    total = 0.0
    for share in QUARTERS:
        decoder.running.position.fill_(int(length * share))
        decoder.running.made.zero_()
        decoder.running.alive.fill_(True)
        for _ in range(3):
            decoder.replay(slots)
        seconds = timed(lambda: [decoder.replay(slots) for _ in range(steps)], model.device)
        total += seconds / steps / len(QUARTERS)
    return total, torch.cuda.max_memory_allocated() / 1e9


@torch.no_grad()
def bench_generate_gpu(args):
    """Tokens/s and memory against the context: each with the most slots that fit, and with the
    same batch."""
    device, rows = args.torch_device, []
    bandwidth = copy_bandwidth(device)
    for context in (4096, 8192, 16384, 32768, 65536):
        for window in (None, 2048, 4096, 8192):
            model = random_model(args.shape, window, device, torch.bfloat16)
            weights = sum(p.nbytes for p in model.parameters())
            slot = Cache.bytes_per_slot(model.config, context, torch.bfloat16)
            places = min(window or context, context)
            filled = sum(min(context * share, places) for share in QUARTERS) / len(QUARTERS)
            row = {"context": context, "window": window or "full", "cache MB/seq": slot / 1e6}
            most = min(2048, int(args.memory * 1e9 - weights) // slot)
            for name, slots in (("same memory", most), ("same batch", 16)):
                seconds, peak = decode_seconds(model, slots, context)
                read = weights + slots * slot * filled / places
                row |= {f"slots, {name}": slots, f"tok/s, {name}": slots / seconds,
                        f"share of bandwidth, {name}": read / bandwidth / seconds,
                        f"peak GB, {name}": peak}
            rows.append(row)
            print(f"  context {context}, window {window or 'full'}: "
                  f"{row['tok/s, same memory']:,.0f} tok/s", flush=True)
            del model
    finish(args, f"generate-{args.shape}", rows, draw_generate)


def draw_generate(figure, rows):
    axes = figure.subplots(1, 2)
    for window, style in (("full", "o-"), (2048, "s--"), (4096, "^--"), (8192, "v--")):
        own = [row for row in rows if row["window"] == window]
        for axis, column in zip(axes, ("tok/s, same memory", "cache MB/seq"), strict=True):
            axis.loglog([row["context"] for row in own], [row[column] for row in own], style,
                        base=2, color=COLORS["SA" if window == "full" else "SWA"],
                        label=f"window {window}")
            axis.set(xlabel="context (tokens)", ylabel=column)
    axes[0].legend(fontsize=8)


@torch.no_grad()
def bench_generate_cpu(args):
    """The memory of a long generation, then whole generations against transformers."""
    torch.set_num_threads(1)
    rows = long_generation_rows(args)  # first, before others raise the peak
    tiny = random_model("tiny", 24, args.torch_device, torch.float32)
    prompts = [[1, *range(3, 20)]] * 128
    seconds = side_by_side({"tiny": lambda: generate(tiny, prompts, 64, seed=0)}, 3,
                           args.torch_device)["tiny"]
    rows.append({"what": "tiny, 128 rollouts x 64 tokens, 1 thread", "tok/s": 128 * 64 / seconds})
    rows += generation_rows(args)
    columns = "what", "tok/s", "x transformers", "cache MB", "peak process MB"
    rows = [{column: row.get(column) for column in columns} for row in rows]
    finish(args, f"generate-cpu-{args.shape}", rows)


def long_generation_rows(args):
    """The cache and the process on the way to args.long tokens."""
    rows, marks = [], (256, args.long // 4, args.long // 2, args.long)
    for window in (256, None):
        config = replace(SHAPES["tiny"], window=window, max_position_embeddings=40000)
        decoder = Decoder(Transformer(config), 1, args.long, max_new_tokens=args.long)
        decoder.admit({0: [1]}, {0: 0})
        for i in range(1, args.long + 1):
            decoder.step(1)
            if i in marks:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                print(f"  window {window or 'full'}: token {i} of {args.long}", flush=True)
                rows.append({"what": f"tiny, window {window or 'full'}, token {i}",
                             "cache MB": decoder.cache.nbytes / 1e6, "peak process MB": peak})
    return rows


def generation_rows(args):
    """Eight answers by SA, SWA and transformers, in both types."""
    shape, device, contestants = args.shape, args.torch_device, {}
    prompts = torch.randint(0, SHAPES[shape].vocab_size, (8, 64)).tolist()
    ids = torch.tensor(prompts)
    for dtype in (torch.bfloat16, torch.float32):  # most checkpoints are stored in the former
        kind = str(dtype).removeprefix("torch.")
        for window in (None, 128):
            model = random_model(shape, window, device, dtype)
            contestants[f"{kind}, window {window or 'full'}"] = partial(
                generate, model, prompts, args.new, seed=0)
        if peer := transformers_model(random_model(shape, None, device, dtype)):
            contestants[f"{kind}, transformers"] = partial(
                peer.generate, ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0)
    seconds, rows = side_by_side(contestants, args.repeats, device), []
    for name, s in seconds.items():
        peer = seconds.get(f"{name.split(',')[0]}, transformers")
        rows.append({"what": f"{shape}, 8 x {args.new} tokens, {name}", "tok/s": 8 * args.new / s,
                     "x transformers": peer and peer / s})
    return rows


# --------------------------------------------------------------------------------------------------
# training


def bench_train(args):
    """An SFT step and an RL update at each length, SA against SWA; share of the matrix ceiling
    (MFU)."""
    device, gpu = args.torch_device, args.torch_device.type == "cuda"
    lengths, window, tokens = ((2048, 8192, 32768), 4096, 32768) if gpu else ((64, 512), 64, 1024)
    rate, rows = matmul_rate(device), []
    for T in lengths:
        data = torch.randint(0, SHAPES[args.shape].vocab_size, (tokens // T, T + 1)).tolist()
        contestants = {}
        for w in (None, window):
            if gpu:  # one model at a time, or the memory would not be its own
                contestants = {}
                torch.cuda.reset_peak_memory_stats()
            contestants |= training_steps(args.shape, w, T, data, tokens, device)
            if gpu:
                seconds = side_by_side(contestants, args.repeats, device)
                peak = torch.cuda.max_memory_allocated() / 1e9
                rows += train_rows(seconds, args.shape, T, tokens, rate, peak)
        if not gpu:
            if peer := transformers_step(args.shape, data, device):
                contestants[f"T={T}, transformers + AdamW, full"] = peer
            seconds = side_by_side(contestants, args.repeats, device)
            rows += train_rows(seconds, args.shape, T, tokens, rate)
    finish(args, f"train-{'gpu' if gpu else 'cpu'}-{args.shape}", rows)


def training_steps(shape, window, T, data, tokens, device):
    """{name: an SFT step, an RL update} of one model on the same rows."""
    trainer = Trainer(random_model(shape, window, device, torch.float32), device, tokens)
    rows = [make_row(ids[:1], ids[1:], advantage=[1.0] * T, mask=[1.0] * T) for ids in data]

    def sft_loss(logprobs, micro):
        return -logprobs.sum() / tokens

    def rl_loss(logprobs, micro):
        return grpo_loss(logprobs, logprobs.detach(), micro["advantage"], micro["mask"], tokens)

    name = f"T={T}, window {window or 'full'}"
    return {f"{name}, SFT": partial(trainer.update, rows, sft_loss, 1e-6),
            f"{name}, RL update": partial(trainer.update, rows, rl_loss, 1e-6)}


def transformers_step(shape, data, device):
    """A plain training step of transformers on the same weights and batch, or None."""
    peer = transformers_model(random_model(shape, None, device, torch.float32))
    if peer is None:
        return None
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6)
    ids = torch.tensor(data)

    def step():
        optimizer.zero_grad()
        peer(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return step


def train_rows(seconds, shape, T, tokens, rate, peak=None):
    rows = []
    for name, s in seconds.items():
        window = None if "full" in name else int(name.split("window ")[1].split(",")[0])
        config = replace(SHAPES[shape], window=window)
        with torch.device("meta"):
            P = sum(p.numel() for p in Transformer(config).parameters())
        # kernel convention: forward 4 and backward 10 operations a visible pair, head and dimension
        per_pair = 14 * config.num_attention_heads * config.head_dim
        attention = sum(per_pair * pairs(T, w) for w in config.windows) * (tokens // T)
        flops = 6 * P * tokens + attention
        plan = peak_bytes(memory_plan(config, tokens)) / 1e9 if peak else None
        rows.append({"what": name, "tok/s": tokens / s, "MFU": flops / s / rate, "peak GB": peak,
                     "planned GB": plan, "x the last": list(seconds.values())[-1] / s})
        print(f"  {name}: {tokens / s:,.0f} tok/s", flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# the command


def parser():
    parser = FlagParser(description=__doc__.split("\n\n")[0],
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "kernels", "generate", "train"],
                        default="all", help="part")
    parser.add_argument("--shape", choices=SHAPES,
                        help="model shape (GPU: qwen2.5-1.5b, CPU: smollm2-135m)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON files and pictures")
    parser.add_argument("--full", action="store_true",
                        help="all sizes of the kernels on a GPU; else 8 minutes' worth")
    parser.add_argument("--repeats", type=int, default=3,
                        help="turns of each contestant; medians count")
    parser.add_argument("--memory", type=float, default=60,
                        help="GB for weights and cache in the same-memory comparison")
    parser.add_argument("--new", type=int, default=256, help="new tokens of the CPU generation")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long CPU generation")
    return parser


def main():
    args = parser().parse_args()
    args.torch_device = pick_device(args.device)
    gpu = args.torch_device.type == "cuda"
    args.shape = args.shape or ("qwen2.5-1.5b" if gpu else "smollm2-135m")
    print(json.dumps(describe_machine(args.torch_device)), flush=True)
    if args.what in ("all", "kernels"):
        bench_kernels(args)
    if args.what in ("all", "generate"):
        (bench_generate_gpu if gpu else bench_generate_cpu)(args)
    if args.what in ("all", "train"):
        bench_train(args)


if __name__ == "__main__":
    cli(main)
