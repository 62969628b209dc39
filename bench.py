"""Speed and memory: attention kernels, generation, training;
SA against SWA side by side in one run.

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
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from convert_sft import (
    COLORS,
    TINY,
    FlagParser,
    Trainer,
    describe_machine,
    make_row,
    memory_plan,
    peak_bytes,
    pick_device,
)
from model import Decoder, ModelConfig, RingCache, Transformer, cli, generate, write_file
from rl import grpo_loss
from swa_kernel import swa_attention, swa_attention_reference, swa_decode

SHAPES = {  # the published configurations; tiny is the miniature's
    "tiny": TINY,
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192,
                                rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, model_type="qwen2",
                                rope_theta=1e6, max_position_embeddings=131072,
                                tie_word_embeddings=True),
}


# --------------------------------------------------------------------------------------------------
# measuring


def side_by_side(contestants, repeats, device):
    """{name: function} -> {name: median seconds}: one warm-up each, then turn by turn, each turn
    begun by the next (on a CPU the first finds the memory that the last has left)."""
    seconds, order = {name: [] for name in contestants}, list(contestants.items())
    for turn in range(repeats + 1):
        first = turn % len(order)
        for name, run in order[first:] + order[:first]:
            began = clock(device)
            run()
            taken = clock(device) - began
            if turn:
                seconds[name].append(taken)
            if taken > 2:
                print(f"  {name}: turn {turn} of {repeats}: {taken:.1f} s", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
    config = ModelConfig(**{**vars(SHAPES[shape]), "window": window})
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(dtype)


def table(rows):
    """Prints a list of dicts as Markdown, aligned."""
    def text(x):
        return (x if isinstance(x, str) else "-" if x is None
                else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}")

    lines = [list(rows[0]), *([text(row.get(name)) for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def finish(args, name, rows, draw=None):
    """The table, the picture, the JSON file and the JSON line of one benchmark."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    table(rows)
    result = {"bench": name, "machine": describe_machine(args.torch_device), "rows": rows}
    write_file(folder / f"{name}.json", lambda f: f.write_text(json.dumps(result, indent=1)))
    if draw:
        from matplotlib.figure import Figure  # takes a second

        figure = Figure(figsize=(8, 3.4), layout="tight")
        draw(figure)
        write_file(folder / f"{name}.png", lambda f: figure.savefig(f, dpi=110, format="png"))
    print(json.dumps(result), flush=True)


# --------------------------------------------------------------------------------------------------
# kernels


def pairs(T, W):
    """Query-key pairs inside the window: the work that is credited, whatever tiles compute."""
    W = min(W or T, T)
    return W * T - W * (W - 1) // 2


def sdpa(backend=None, masked=False):
    """F.scaled_dot_product_attention on (B, T, H, D): full causal, or with a boolean mask of the
    window."""
    masks = {}

    def attend(q, k, v, window):
        T, kind = q.shape[1], {"is_causal": True}
        if masked:
            if (T, window) not in masks:
                position = torch.arange(T, device=q.device)
                distance = position[:, None] - position
                masks[T, window] = (distance >= 0) & (distance < (window or T))
            kind = {"attn_mask": masks[T, window]}
        with sdpa_kernel([backend] if backend else list(SDPBackend.__members__.values())):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)),
                                                  enable_gqa=True, **kind).transpose(1, 2)

    return attend


def flex_attention():
    """FlexAttention, compiled, with a sliding-window block mask."""
    from torch.nn.attention import flex_attention as flex

    compiled, masks = torch.compile(flex.flex_attention, dynamic=False), {}

    def attend(q, k, v, window):
        T, W = q.shape[1], window or q.shape[1]
        if (T, W) not in masks:
            masks[T, W] = flex.create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < W),
                                                 None, None, T, T, device=q.device)
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=masks[T, W],
                        enable_gqa=True).transpose(1, 2)

    return attend


def bench_kernels(args):
    """Forward, backward and decode; credited operations 4 and 10 a pair, head and dimension."""
    device, gpu = args.torch_device, args.torch_device.type == "cuda"
    dtype, (H, Hkv) = (torch.bfloat16, (12, 2)) if gpu else (torch.float32, (2, 1))
    lengths, windows = (([2**n for n in range(11, 18)], [1024, 2048, 4096, 8192, None])
                        if gpu else ([1024, 4096, 16384], [512]))
    contestants = {  # name: (function, takes a window, longest T)
        "swa_kernel": (swa_attention, True, 2**20),
        **({"FlexAttention": (flex_attention(), True, 2**20),
            "SDPA flash": (sdpa(SDPBackend.FLASH_ATTENTION), False, 2**20),
            "SDPA cuDNN": (sdpa(SDPBackend.CUDNN_ATTENTION), False, 2**20),
            "naive twin": (swa_attention_reference, True, 4096)}
           if gpu else {"SDPA, full mask": (sdpa(masked=True), True, 2**20)}),
    }
    rate, bandwidth, rows = matmul_rate(device), copy_bandwidth(device), []
    print(f"ceilings: matrix product {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s",
          flush=True)
    for D in (128, 64) if gpu else (64,):
        for T in lengths:
            q, k, v = (torch.randn(1, T, h, D, device=device, dtype=dtype, requires_grad=True)
                       for h in (H, Hkv, Hkv))
            gradient = torch.randn_like(q)
            for W in [w for w in windows if (w or 0) < T]:
                runs, memory = {}, {}
                for name, (attend, windowed, longest) in contestants.items():
                    if T > longest or not windowed and W:
                        continue
                    try:
                        if gpu:
                            torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated() if gpu else 0
                        o = attend(q, k, v, W)
                        torch.autograd.grad(o, (q, k, v), gradient, retain_graph=True)
                        peak = torch.cuda.max_memory_allocated() if gpu else 0
                        memory[name] = (peak - before) / 1e6 if gpu else None
                    except RuntimeError as error:
                        # A peer without a kernel for this shape, or out of memory
                        print(f"  {name}, T={T}, W={W}, D={D} left out: "
                              f"{str(error).splitlines()[0][:90]}", flush=True)
                        continue
                    runs[name, "forward"] = torch.no_grad()(
                        lambda attend=attend, W=W, x=(q, k, v): attend(*x, W))
                    runs[name, "backward"] = lambda o=o, x=(q, k, v), g=gradient: (
                        torch.autograd.grad(o, x, g, retain_graph=True))
                turns = 10 * args.repeats if gpu else args.repeats
                for (name, part), s in side_by_side(runs, turns, device).items():
                    flops = (4 if part == "forward" else 10) * H * D * pairs(T, W)
                    rows.append({"part": part, "what": name, "D": D, "T": T, "W": W or "full",
                                 "ms": s * 1e3, "TFLOP/s": flops / s / 1e12,
                                 "of ceiling": flops / s / rate, "MB": memory[name]})
                print(f"  D={D} T={T} W={W or 'full'} done", flush=True)
    for B, S in ((1, 4096), (64, 4096), (16, 32768)) if gpu else ((128, 24), (8, 512)):
        D = 128 if gpu else 64
        q, k, v = (torch.randn(*shape, device=device, dtype=dtype)
                   for shape in ((B, H, D), (B, S, Hkv, D), (B, S, Hkv, D)))
        position, size = torch.full((B,), S + 3, device=device), 2 * k.numel() * k.element_size()
        heads_first = q[:, :, None], k.transpose(1, 2), v.transpose(1, 2)
        runs = {"swa_kernel": lambda x=(q, k, v, position): swa_decode(*x),
                "SDPA": lambda x=heads_first: F.scaled_dot_product_attention(*x, enable_gqa=True)}
        if gpu:  # as generation runs it, without launch gaps
            runs |= {f"{name}, graph": captured(run) for name, run in list(runs.items())}
        for name, s in side_by_side(runs, 20 * args.repeats, device).items():
            rows.append({"part": "decode", "what": f"{name}, batch {B}", "D": D, "T": 1, "W": S,
                         "ms": s * 1e3, "TFLOP/s": None, "of ceiling": size / s / bandwidth,
                         "MB": size / 1e6})

    def draw(figure):
        axes = figure.subplots(1, 2, sharey=True)
        D = rows[0]["D"]
        for axis, part in zip(axes, ("forward", "backward"), strict=True):
            names = dict.fromkeys(r["what"] for r in rows if r["part"] == part)
            for color, name in zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), names,
                                   strict=False):
                for W, style in zip([w or "full" for w in windows],
                                    ("o-", "s--", "^:", "v-.", "D-"), strict=False):
                    line = [(r["T"], r["ms"]) for r in rows
                            if (r["part"], r["what"], r["W"], r["D"]) == (part, name, W, D)]
                    if line:
                        axis.loglog(*zip(*line, strict=True), style, color=color,
                                    label=f"{name}, W={W}", markersize=4)
            axis.set(title=f"{part}, D={D}", xlabel="sequence length (tokens)")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("time (ms)")
        axes[0].legend(fontsize=6)

    finish(args, f"kernels-{'gpu' if gpu else 'cpu'}", rows, draw)


def captured(run):
    """A function as a CUDA graph's replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --------------------------------------------------------------------------------------------------
# generation


def decode_seconds(model, slots, length, steps=24, points=4):
    """Mean seconds of a decode step over a generation of `length` tokens: the middle of each
    quarter."""
    decoder = Decoder(model, slots, length, max_new_tokens=10**6 // slots + 2 * steps, n_ids=None)
    total = 0.0
    for i in range(points):
        decoder.rows["position"].fill_(int(length * (i + 0.5) / points))
        decoder.rows["made"].zero_()
        decoder.rows["alive"].fill_(True)
        for _ in range(3):
            decoder.replay(slots)
        began = clock(model.device)
        for _ in range(steps):
            decoder.replay(slots)
        total += (clock(model.device) - began) / steps / points
    return total


@torch.no_grad()
def bench_generate_gpu(args):
    """Tokens/s and memory against the context: each with the most slots that fit, and with the
    same batch."""
    device, rows, batch = args.torch_device, [], 16
    bandwidth = copy_bandwidth(device)
    for context in (4096, 8192, 16384, 32768, 65536):
        for window in (None, 2048, 4096, 8192):
            model = random_model(args.shape, window, device, torch.bfloat16)
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            slot = RingCache.bytes_per_slot(model.config, context, torch.bfloat16)
            most = min(2048, int(args.memory * 1e9 - weights) // slot)
            row = {"context": context, "window": window or "full", "cache MB/seq": slot / 1e6}
            for name, slots in (("same memory", most), ("same batch", batch)):
                torch.cuda.reset_peak_memory_stats()
                seconds = decode_seconds(model, slots, context)
                filled = sum(min(context * (i + 0.5) / 4, (w or context))
                             for w in model.config.windows for i in range(4)) / 4
                positions = sum(min(w or context, context) for w in model.config.windows)
                read = weights + slots * filled * slot / positions
                row |= {f"slots, {name}": slots, f"tok/s, {name}": slots / seconds,
                        f"share of bandwidth, {name}": read / bandwidth / seconds,
                        f"peak GB, {name}": torch.cuda.max_memory_allocated() / 1e9}
            rows.append(row)
            print(f"  context {context}, window {window or 'full'}: "
                  f"{row['tok/s, same memory']:,.0f} tok/s", flush=True)
            del model

    def draw(figure):
        axes = figure.subplots(1, 2)
        for window, style in (("full", "o-"), (2048, "s--"), (4096, "^--"), (8192, "v--")):
            own = [r for r in rows if r["window"] == window]
            for axis, column in zip(axes, ("tok/s, same memory", "cache MB/seq"), strict=True):
                axis.loglog([r["context"] for r in own], [r[column] for r in own], style, base=2,
                            color=COLORS["SA" if window == "full" else "SWA"],
                            label=f"window {window}")
                axis.set(xlabel="context (tokens)", ylabel=column)
        axes[0].legend(fontsize=8)

    finish(args, f"generate-{args.shape}", rows, draw)


@torch.no_grad()
def bench_generate_cpu(args):
    """Whole generations against transformers, and the memory of a long one."""
    device, rows = args.torch_device, []
    torch.set_num_threads(1)
    for window in (256, None):  # first, before others raise the peak
        config = ModelConfig(**{**vars(TINY), "window": window, "max_position_embeddings": 40000})
        decoder = Decoder(Transformer(config), 1, args.long, max_new_tokens=args.long)
        decoder.admit({0: [1]}, {0: 0})
        marks = {256, args.long // 4, args.long // 2, args.long}
        cache = sum(t.numel() * 4 for t in decoder.cache.k + decoder.cache.v) / 1e6
        for i in range(1, args.long + 1):
            decoder.step(1)
            if i in marks:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                rows.append({"what": f"tiny, window {window or 'full'}, token {i}",
                             "cache MB": cache, "peak process MB": peak})
    tiny = random_model("tiny", 24, device, torch.float32)
    prompts = [[1, *range(3, 20)]] * 128
    seconds = side_by_side({"tiny": lambda: generate(tiny, prompts, 64, seed=0)}, 3, device)["tiny"]
    rows.append({"what": "tiny, 128 rollouts x 64 tokens, 1 thread", "tok/s": 128 * 64 / seconds})

    shape = args.shape
    prompts = torch.randint(0, SHAPES[shape].vocab_size, (8, 64)).tolist()
    ids, contestants = torch.tensor(prompts), {}
    for dtype in (torch.bfloat16, torch.float32):  # most checkpoints are stored in the former
        model, kind = random_model(shape, None, device, dtype), str(dtype)[6:]
        short = random_model(shape, 128, device, dtype)
        contestants[f"{kind}, window full"] = lambda m=model: generate(m, prompts, args.new, seed=0)
        contestants[f"{kind}, window 128"] = lambda m=short: generate(m, prompts, args.new, seed=0)
        if (peer := transformers_model(model)) is not None:
            contestants[f"{kind}, transformers"] = lambda peer=peer: peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0)
    seconds = side_by_side(contestants, args.repeats, device)
    for name, s in seconds.items():
        peer = seconds.get(f"{name.split(',')[0]}, transformers")
        rows.append({"what": f"{shape}, 8 x {args.new} tokens, {name}", "tok/s": 8 * args.new / s,
                     "x transformers": peer and peer / s})
    finish(args, f"generate-cpu-{shape}", [{"what": r["what"], **{k: r.get(k) for k in (
        "tok/s", "x transformers", "cache MB", "peak process MB")}} for r in rows])


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


# --------------------------------------------------------------------------------------------------
# training


def attention_flops(config, lengths):
    """Forward 4 and backward 10 operations a visible pair, head and dimension (kernel
    convention)."""
    per_pair = 14 * config.num_attention_heads * config.head_dim
    return sum(per_pair * pairs(T, w) for T in lengths for w in config.windows)


def bench_train(args):
    """An SFT step and an RL update at each length, SA against SWA; share of the matrix ceiling
    (MFU)."""
    device, rows = args.torch_device, []
    gpu = device.type == "cuda"
    dtype, rate = torch.float32, matmul_rate(device)
    lengths, window = ((2048, 8192, 32768), 4096) if gpu else ((64, 512), 64)
    tokens = 32768 if gpu else 1024
    for T in lengths:
        contestants, peaks = {}, {}
        for w in (None, window):
            model = random_model(args.shape, w, device, dtype)
            trainer = Trainer(model, tempfile.mkdtemp(), {}, device, micro_tokens=tokens)
            data = torch.randint(0, model.config.vocab_size, (tokens // T, T + 1)).tolist()
            data = [make_row(ids[:1], ids[1:], advantage=[1.0] * T, mask=[1.0] * T) for ids in data]

            def sft(trainer=trainer, data=data):
                trainer.update(data, lambda logp, m: -logp.sum() / tokens, 1e-6)

            def rl(trainer=trainer, data=data):
                trainer.update(data, lambda logp, m: grpo_loss(
                    logp, logp.detach(), m["advantage"], m["mask"], tokens), 1e-6)

            name = f"T={T}, window {w or 'full'}"
            if gpu:  # one model at a time, or the memory would not be its own
                torch.cuda.reset_peak_memory_stats()
                seconds = side_by_side({f"{name}, SFT": sft, f"{name}, RL update": rl},
                                       args.repeats, device)
                peaks[w] = torch.cuda.max_memory_allocated() / 1e9
                rows += train_rows(seconds, model.config, T, tokens, rate, peaks[w])
                del model, trainer, sft, rl
            else:
                contestants |= {f"{name}, SFT": sft, f"{name}, RL update": rl}
        if not gpu:
            peer = transformers_step(random_model(args.shape, None, device, dtype), data)
            if peer:
                contestants[f"T={T}, transformers + AdamW, full"] = peer
            seconds = side_by_side(contestants, args.repeats, device)
            rows += train_rows(seconds, SHAPES[args.shape], T, tokens, rate)
    finish(args, f"train-{'gpu' if gpu else 'cpu'}-{args.shape}", rows)


def train_rows(seconds, config, T, tokens, rate, peak=None):
    rows = []
    with torch.device("meta"):
        P = sum(p.numel() for p in Transformer(config).parameters())
    for name, s in seconds.items():
        window = None if "full" in name else int(name.split("window ")[1].split(",")[0])
        windowed = ModelConfig(**{**vars(config), "window": window})
        flops = 6 * P * tokens + attention_flops(windowed, [T] * (tokens // T))
        plan = peak_bytes(memory_plan(windowed, tokens)) / 1e9 if peak else None
        rows.append({"what": name, "tok/s": tokens / s, "MFU": flops / s / rate, "peak GB": peak,
                     "planned GB": plan, "x the last": list(seconds.values())[-1] / s})
        print(f"  {name}: {tokens / s:,.0f} tok/s", flush=True)
    return rows


def transformers_step(model, data):
    """A plain training step of transformers on the same weights and batch, or None."""
    peer = transformers_model(model)
    if peer is None:
        return None
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6)
    ids = torch.tensor([row["tokens"] + row["targets"][-1:] for row in data])

    def step():
        optimizer.zero_grad()
        peer(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return step


# --------------------------------------------------------------------------------------------------


def parser():
    parser = FlagParser(description=__doc__.split("\n\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "kernels", "generate", "train"],
                        default="all", help="part")
    parser.add_argument("--shape", choices=SHAPES,
                        help="model shape (GPU: qwen2.5-1.5b, CPU: smollm2-135m)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON files and pictures")
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
