"""Stage 1: a pretrained self-attention (SA) model becomes a sliding-window (SWA) one by supervised
fine-tuning (SFT).

The window is set and the model is fine-tuned on solutions written for full attention: that is all
of the conversion. Its held-out loss is logged beside the SA teacher's on the same text, so that one
sees what the window costs before, during and after.

In the order of the file: the settings of a stage; the conversion; then what both stages share: the
data, the training step over packed rows (Trainer), the folder of a run (Run: checkpoints, log), the
memory plan; at the end the tiny task and the pretraining of its base.

Left out on purpose: LoRA, sequence parallelism, a data-loading service (the data position is the
step).

    python convert_sft.py --model tiny --window 24
    python convert_sft.py --window 4096               # DeepSeek-R1-Distill-Qwen-1.5B, one GPU
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model import (
    LOGITS_PER_CHUNK,
    Cache,
    ModelConfig,
    Tokenizer,
    Transformer,
    UsageError,
    check_readable,
    check_window,
    cli,
    read_config,
    read_weights,
    resolve,
    write_file,
)

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Read by PyTorch at its first large buffer on a CPU: huge pages. With 4 kB pages a tenth of a
# training step of a real model goes into mapping them
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# --------------------------------------------------------------------------------------------------
# settings: a field is a flag, its default that of a real model; a tiny task brings its own


def setting(default, text, least=None, free=False, **flag):
    """A field of a stage's settings.

    least: numbers must be at least this; None: above 0. free: a run may be continued with another
    value; all other settings make up its identity. flag: more for argparse.
    """
    more = {"text": text, "least": least, "free": free, "flag": flag}
    return field(default=default, metadata=more)


def window_arg(text):
    """`full` (None), or a whole number of keys >= 1."""
    try:
        window = None if text == "full" else int(text)
        check_window(window)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a whole number of keys >= 1, or full") from None
    return window


def layers_arg(text):
    try:
        return tuple(sorted({int(x) for x in text.split(",") if x}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give layer numbers such as 0,14,27") from None


@dataclass
class Settings:
    """What both stages are told."""

    model: str = setting("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                         "tiny, a Hugging Face folder or a hub id", free=True)
    window: int | None = setting(4096, "keys that a query sees, its own included; or full",
                                 type=window_arg)
    window_from: int | None = setting(
        None, "start stage 1 with this window and shrink to --window over half of it")
    full_layers: tuple = setting((), "layers that keep full attention, such as 0,14,27",
                                 type=layers_arg)
    nope_full: bool = setting(False, "those layers without RoPE: an experiment")
    instruction: str = setting(INSTRUCTION, "appended to each problem")
    seed: int = setting(0, "of everything random", least=0)
    micro_tokens: int = setting(16384, "tokens of one forward and backward: lower it when memory "
                                       "runs out", free=True)
    save_every: int = setting(1, "steps between checkpoints: what kill -9 may lose; raise it where "
                                 "a save takes long", free=True)
    out: str = setting("out", "where <model>/<stage>-w<window>/ goes", free=True)
    device: str = setting("auto", "where to run", free=True, choices=["auto", "cpu", "cuda"])
    wandb: str | None = setting(None, "also log to this project of Weights & Biases", free=True)
    plan: bool = setting(False, "print the memory that the run will take, and stop", free=True)

    @classmethod
    def of(cls, **given):
        """Settings from the flags that were given; a tiny task's defaults, then the real ones."""
        tiny = TASKS.get(given.get("model"))
        settings = cls(**(tiny.defaults[cls.stage] if tiny else {}) | given)
        settings.check()
        return settings

    def check(self):
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if type(value) in (int, float):
                fine = value > 0 if least is None else value >= least
                if not (fine and math.isfinite(value)):
                    bound = "above 0" if least is None else f"of at least {least}"
                    raise UsageError(f"--{f.name.replace('_', '-')} {value}: give a number {bound}")
        if self.window_from and self.window is None:
            raise UsageError("--window-from shrinks towards a --window, and full has no size: "
                             "give a number of keys")

    @property
    def tiny(self):
        """The tiny task whose model this is about, or None."""
        return TASKS.get(self.model)

    @cached_property
    def task(self):
        """Where the problems come from: see Problems."""
        return TASKS.get(self.data) or Problems(self.data)

    def identity(self):
        """What a checkpoint must have been made with, to be continued."""
        names = [f.name for f in fields(self) if not f.metadata["free"]]
        return {"stage": self.stage} | {name: getattr(self, name) for name in names}

    def folder(self, stage=None):
        """<out>/<model>/<stage>-w<window>, with -full<layers> and -nope where set."""
        path = Path(self.model)
        name = path.resolve().name if path.exists() else path.name
        variant = f"w{self.window or 'full'}"
        if self.window and self.full_layers:
            variant += "-full" + ".".join(map(str, self.full_layers)) + "-nope" * self.nope_full
        return Path(self.out) / name / f"{stage or self.stage}-{variant}"

    def start_device(self):
        if self.tiny:
            torch.set_num_threads(1)  # tiny matrices gain nothing from more
        return pick_device(self.device)


@dataclass
class SFTSettings(Settings):
    """Stage 1."""

    stage = "sft"
    data: str = setting("open-r1/OpenR1-Math-220k", "JSONL file or hub id[:config[:split]]")
    steps: int = setting(1000, "optimizer steps", least=0)
    batch: int = setting(64, "examples a step")
    lr: float = setting(1e-5, "peak learning rate")
    warmup: int = setting(30, "steps of linear warm-up", least=0)
    max_length: int = setting(16384, "tokens of an example; longer ones are left out")
    eval_every: int = setting(50, "steps between held-out losses")
    eval_examples: int = setting(200, "examples for the held-out loss")


# --------------------------------------------------------------------------------------------------
# the conversion


def convert(settings):
    """Stage 1: base -> SWA by SFT (SA, with the window None); returns the run's folder, made now or
    before."""
    device = settings.start_device()
    run = Run(settings)
    if run.finished(settings.steps):
        return run.folder
    base = pretrain(settings) if settings.tiny else settings.model
    model = Transformer.from_pretrained(base, None, (), device, torch.float32)
    tokenizer = Tokenizer(model.tokenizer_files)
    train, held_out = settings.task.sft(settings)
    held_out = sft_rows(settings, tokenizer, held_out)
    teacher = held_out_loss(model, held_out, settings)  # SA: before the window, before a resume

    model.config = replace(model.config, window=settings.window, nope_full=settings.nope_full,
                           full_layers=settings.full_layers if settings.window else ())
    trainer = Trainer(model, device, settings.micro_tokens)
    run.start(trainer)
    if held_out and run.step == 0:
        student = held_out_loss(model, held_out, settings)
        print(f"held-out loss before training: SA {teacher:.3f}, window {settings.window or 'full'}"
              f" {student:.3f} nats a token", flush=True)
    for step in run.steps(settings.steps):
        began = time.time()
        model.config.window = window_at(step, settings)
        problems = shuffled_slice(train, step * settings.batch, settings.batch, [settings.seed, 6])
        rows = sft_rows(settings, tokenizer, problems)
        n_tokens = sum(target >= 0 for row in rows for target in row["targets"])
        total = {"loss": 0.0}

        def loss_fn(logprobs, micro):
            loss = -logprobs.sum() / n_tokens
            total["loss"] += loss.item()
            return loss

        lr = schedule(step, settings.steps, settings.lr, settings.warmup, "cosine")
        norm = trainer.update(rows[RANK::WORLD], loss_fn, lr)

        loss, seconds = all_sum(total, device)["loss"], time.time() - began
        tok_per_s = sum(len(row["tokens"]) for row in rows) / seconds
        record = {"loss": loss, "grad_norm": norm, "lr": lr, "window": model.config.window,
                  "tok_per_s": tok_per_s, "seconds": seconds}
        shown = ""
        if held_out and ((step + 1) % settings.eval_every == 0 or step + 1 == settings.steps):
            loss_now = held_out_loss(trainer.model, held_out, settings)
            record |= {"held_out": loss_now, "gap_to_teacher": loss_now - teacher}
            shown = f" | held-out {loss_now:.3f} (SA {teacher:.3f})"
        run.log(record, f"sft w={settings.window or 'full'} step {step + 1}/{settings.steps} | "
                        f"loss {loss:.3f}{shown} | norm {norm or math.nan:.2f} | lr {lr:.1e} | "
                        f"{tok_per_s:,.0f} tok/s", every=0 if shown else 5)
    return run.finish()


def window_at(step, settings):
    """The window of a step: --window, or shrinking to it geometrically over the first half."""
    if not settings.window_from:
        return settings.window
    share = min(1.0, 2 * (step + 1) / settings.steps)
    return round(settings.window_from * (settings.window / settings.window_from) ** share)


def sft_rows(settings, tokenizer, problems):
    """Problems -> rows: prompt by the chat template, loss on the response only; longer than
    --max-length are left out. Made batch by batch: whole data sets would not fit as lists."""
    end = min(tokenizer.stop_ids, default=None) if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise UsageError(f"{settings.model} names no eos token: "
                         "add eos_token to its tokenizer_config.json")
    rows = []
    for problem in problems:
        prompt = as_prompt(tokenizer, problem["problem"], settings.instruction)
        response = tokenizer.encode(solution_text(problem)) + [end]
        if len(prompt) + len(response) - 1 <= settings.max_length:
            rows.append(make_row(prompt, response))
    if problems and not rows:
        raise UsageError(f"none of {len(problems)} examples has at most {settings.max_length} "
                         "tokens: raise --max-length")
    return rows


@torch.no_grad()
def held_out_loss(model, rows, settings):
    """Mean -log p of the response tokens, nats a token; nan without rows."""
    total, count = 0.0, 0
    for micro in pack(rows, settings.micro_tokens, model.device):
        with compute_type(model.device):
            logprobs = model(micro["tokens"], micro["cu_seqlens"], micro["targets"])
        total -= logprobs.sum().item()
        count += (micro["targets"] >= 0).sum().item()
    return total / count if count else math.nan


# --------------------------------------------------------------------------------------------------
# data: problems as {"problem", "answer", "solution"}


class Problems:
    """The task of a real model: the problems of a JSONL file or a hub data set.

    A task says where problems come from and how an answer is graded; RunningSums, at the end of
    this file, is another one. Whoever wants a third writes a class with these methods.
    """

    grade = None  # f(response, gold) -> verdict; None: the answer checker of rl.py
    measures = {}  # {name: f(response) -> number} of what validation reports beside accuracy
    sft_held_out, rl_held_out = 2, 5  # percent of the problems, by a hash

    def __init__(self, source):
        self.source = source

    @cached_property
    def all(self):
        return load_problems(self.source)

    def side(self, percent, test):
        return [p for p in self.all if on_test_side(p["problem"], percent) == test]

    def sft(self, settings):
        """(training problems, held-out problems), all with solutions."""
        train, held_out = ([p for p in self.side(self.sft_held_out, test) if p["solution"]]
                           for test in (False, True))
        if not train:
            raise UsageError(f"--data {self.source} has no solutions to train on: give data with "
                             '"solution", "generations" or "messages"')
        return train, held_out[:settings.eval_examples]

    @cached_property
    def for_rl(self):
        return self.side(self.rl_held_out, test=False)

    def rl(self, settings, step, attempt):
        """The problems of an RL step; attempt: how often the step has asked already."""
        first = (step + attempt * settings.steps) * settings.prompts
        return shuffled_slice(self.for_rl, first, settings.prompts, [settings.seed, 8])

    def some(self, n, seed):
        """n training problems for an analysis."""
        return self.for_rl[:n]

    def other_solutions(self, seed):
        """{name: problems} with solutions of another kind, for eval.py's conversion strategies."""
        return {}

    def validation(self, n, seed):
        """At most n held-out problems: the same before and after RL and for every run."""
        problems = self.side(self.rl_held_out, test=True)[:n]
        if not problems:
            raise UsageError(f"--data {self.source} is too small to hold out problems for "
                             "validation: give more problems")
        return problems


NOT_A_PROBLEM = ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration


def load_problems(source):
    """A JSONL file or a hub id (`id[:config[:split]]`) -> list of {"problem", "answer",
    "solution"}.

    Understands the fields of MATH-like files (problem, answer, solution), openai/gsm8k (question,
    answer with `#### 42`), open-r1/OpenR1-Math-220k (messages, generations) and DAPO-Math-17k
    (prompt, reward_model). UsageError names the file and the line of the first fault.
    """
    path = Path(source)
    if path.is_file():
        problems = []
        for number, line in enumerate(path.open(encoding="utf-8", errors="replace"), 1):
            if line.strip():
                try:
                    problems.append(as_problem(json.loads(line)))
                except NOT_A_PROBLEM as error:
                    raise UsageError(f"{path} line {number}: not a problem in JSON ({error}); "
                                     'a line needs at least "problem" and "answer"') from None
    elif path.suffix or path.exists() or source.count("/") != 1:
        raise UsageError(f"--data {source}: no such file; "
                         "give a JSONL file or a hub id such as openai/gsm8k:main")
    else:
        import datasets  # imported here since it takes more than a second

        name, config, split = (source.split(":") + [None, None])[:3]
        try:
            rows = datasets.load_dataset(name, config, split=split or "train")
        except Exception as error:  # network, unknown id, missing config: many types, one cure
            raise UsageError(f"--data {source} could not be fetched from the hub: check the name "
                             f"and the connection ({type(error).__name__})") from None
        try:
            problems = [as_problem(row) for row in rows]
        except NOT_A_PROBLEM as error:
            raise UsageError(f"--data {source}: its rows are not in a known layout "
                             f"({error})") from None
    if not problems:
        raise UsageError(f"--data {source} is empty: it needs at least one problem")
    return problems


def as_problem(row):
    """A row of any known layout -> {"problem", "answer", "solution"}."""
    problem = row.get("problem") or row.get("question") or row.get("prompt")
    answer, solution = row.get("answer"), row.get("solution") or ""
    if isinstance(problem, list):  # a chat
        problem = said_by("user", problem)
    if "reward_model" in row:
        answer = row["reward_model"]["ground_truth"]
    if row.get("generations"):  # several solutions, of which some were verified
        right = row.get("correctness_math_verify") or [True]
        solution = row["generations"][right.index(True) if True in right else 0]
    elif row.get("messages"):
        problem = problem or said_by("user", row["messages"])
        solution = said_by("assistant", row["messages"])
    if "####" in str(answer):  # GSM8K's own layout
        solution, answer = solution or answer, str(answer).split("####")[-1].strip()
    if not isinstance(problem, str) or answer is None:
        raise ValueError('no "problem" or no "answer"')
    return {"problem": problem, "answer": str(answer), "solution": solution}


def said_by(role, messages):
    return next(message["content"] for message in messages if message["role"] == role)


def solution_text(problem):
    """The solution as a response: calculator marks removed, the answer in a box at the end."""
    text = re.sub(r"<<[^<>]*>>", "", problem["solution"]).split("\n####")[0].rstrip()
    if "\\boxed" in text:
        return text
    return f"{text}\nThe final answer is $\\boxed{{{problem['answer']}}}$."


def as_prompt(tokenizer, problem, instruction):
    return tokenizer.chat([{"role": "user", "content": problem + instruction}])


def on_test_side(problem, percent=20):
    """Whether a hash puts this problem among those never trained on: the same in every run."""
    return hashlib.sha256(problem.encode("utf-8", "replace")).digest()[0] < 2.56 * percent


def shuffled_slice(items, first, count, seed):
    """Items `first` to `first + count` of an endless stream of shuffled epochs: there is no state
    but the position, so a resumed run sees what an undisturbed one would."""
    epochs = range(first // len(items), (first + count - 1) // len(items) + 1)
    order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(len(items))
                            for epoch in epochs])
    return [items[i] for i in order[first % len(items):][:count]]


# --------------------------------------------------------------------------------------------------
# the training step: rows, packed without padding, on one GPU, several, or a CPU


def make_row(prompt, response, **columns):
    """A row: inputs, next-token targets (-1 under the prompt), columns aligned to the targets.

        prompt 5 6 7, response 8 9  ->  tokens  5  6  7  8
                                        targets -1 -1 8  9
    """
    ids, pad = list(prompt) + list(response), len(prompt) - 1
    row = {"tokens": ids[:-1], "targets": [-1] * pad + ids[len(prompt):]}
    return row | {name: [0.0] * pad + list(values) for name, values in columns.items()}


def pack(rows, micro_tokens, device="cpu"):
    """Rows -> micro-batches of about micro_tokens tokens without padding, longest rows first.

    Each is a dict of (1, T) tensors (tokens, targets, other columns in float32) and cu_seqlens
    (N+1,).
    """
    groups, room = [], 0
    for row in sorted(rows, key=lambda row: -len(row["tokens"])):
        length = len(row["tokens"])
        if not groups or length > room:
            groups.append([])
            room = micro_tokens
        groups[-1].append(row)
        room -= length
    return [join(group, device) for group in groups]


def join(rows, device):
    """Rows one after another -> a micro-batch."""
    micro = {}
    for name in rows[0]:
        values = [value for row in rows for value in row[name]]
        dtype = torch.long if name in ("tokens", "targets") else torch.float32
        micro[name] = torch.tensor(values, dtype=dtype, device=device)[None]  # (1, T)
    ends = np.cumsum([0] + [len(row["tokens"]) for row in rows])
    micro["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return micro


def schedule(step, steps, lr, warmup, kind="constant", decay_from=0.0, floor=0.1):
    """Learning rate of a step (0-based): linear warm-up, then constant, cosine, or linear from
    `decay_from` of the run on; both decays end at `floor` of the rate."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    x = min(1.0, max(0.0, (step / steps - decay_from) / (1 - decay_from)))
    shape = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * x), "linear": 1 - x}[kind]
    return lr * (floor + (1 - floor) * shape)


class Trainer:
    """A model in training: float32 master weights, AdamW, and, with several ranks, FSDP2's shards.

    A GPU computes in bfloat16 and recomputes each block in the backward.
    """

    def __init__(self, model, device, micro_tokens=16384, weight_decay=0.0, grad_clip=1.0):
        self.device, self.micro_tokens, self.grad_clip = device, micro_tokens, grad_clip
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.model = model.to(device, torch.float32)
        self.model.checkpointing = device.type == "cuda"
        if WORLD > 1:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if device.type == "cuda" else None,
                reduce_dtype=torch.float32)
            for block in self.model.model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(self.model, mp_policy=policy)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95),
                                           fused=True)

    def update(self, rows, loss_fn, lr, temperature=1.0):
        """One optimizer step on this rank's rows -> the gradient's norm, or None if not finite.

        loss_fn(logprobs, micro) is a sum already divided by the count of the *whole* batch over
        micro-batches and ranks, so the gradient does not depend on how rows are packed or spread.
        """
        self.optimizer.zero_grad()
        micros = pack(rows, self.micro_tokens, self.device)
        for micro, logprobs in self.forwards(micros, temperature):
            loss = logprobs.sum() * 0.0 if "idle" in micro else loss_fn(logprobs, micro)
            (loss * WORLD).backward()  # FSDP averages over the ranks; the loss is a sum
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            self.skip()
            return None
        self.skipped = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()  # their memory is the next rollouts'
        return norm

    def skip(self):
        self.skipped += 1
        print("loss or gradient is not finite, step skipped", flush=True)
        if self.skipped == 5:
            raise UsageError("five steps in a row had a gradient that is not finite: "
                             "lower --lr, or look at the data of these steps")

    def forwards(self, micros, temperature, model=None):
        """(micro-batch, log-probabilities), one after another; under FSDP every rank must join in
        every forward and backward, so a rank with fewer micro-batches idles along on a dummy."""
        model = model or self.model
        idle = join([make_row([0], [0])], self.device)
        idle |= {"targets": idle["targets"] - 1, "idle": True}
        most = int(all_max(len(micros), self.device))
        for micro in micros + [idle] * (most - len(micros)):
            with compute_type(self.device):
                logprobs = model(micro["tokens"], micro["cu_seqlens"], micro["targets"],
                                 temperature)
            yield micro, logprobs

    @torch.no_grad()
    def add_logprobs(self, rows, name, temperature=1.0, model=None):
        """Adds a model's (this one's) log-probabilities of the targets to the rows, as a column."""
        singles = [join([row], self.device) for row in rows]
        for i, (_, logprobs) in enumerate(self.forwards(singles, temperature, model)):
            if i < len(rows):  # the others are idle
                rows[i][name] = logprobs[0].tolist()

    def state(self):
        """Full, unsharded (weights, optimizer state); a collective under FSDP."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=WORLD > 1)
        return (get_model_state_dict(self.model, options=options),
                get_optimizer_state_dict(self.model, self.optimizer, options=options))

    def load_state(self, weights, optimizer):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)
        if self.model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        set_model_state_dict(self.model, weights, options=options)
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device, with the process group of a torchrun started."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible here; "
                         "leave the flag out to run on the CPU")
    cuda = name != "cpu" and torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if WORLD > 1 and not dist.is_initialized():
        # So long a timeout, since rank 0 validates alone
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12),
                                **({"device_id": device} if cuda else {}))
    return device


def compute_type(device):
    """bfloat16 matrix products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def all_sum(values, device):
    """{name: number} summed over the ranks, in float64."""
    if WORLD == 1:
        return {name: float(value) for name, value in values.items()}
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64,
                         device=device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def all_max(value, device):
    if WORLD == 1:
        return value
    value = torch.tensor(float(value), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


# --------------------------------------------------------------------------------------------------
# a run's folder


DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Run:
    """A run on the disk: step-N/ (a Hugging Face folder plus trainer.pt), log.jsonl, curves.png.

        run = Run(settings)
        if run.finished(n): ...
        run.start(trainer)              # locks the folder, continues from the newest checkpoint
        for step in run.steps(n):       # counts, saves, stops when asked to
            ...
            run.log(record)
        folder = run.finish()           # the model now lies in the folder itself

    Every random choice of a run derives from (seed, step), so the step is the whole data position
    and a resumed run repeats an undisturbed one bit by bit. Checkpoints are written under a
    temporary name; the last two are kept.
    """

    def __init__(self, settings, folder=None, identity=None):
        self.folder = Path(folder or settings.folder())
        self.identity = identity or settings.identity()
        self.save_every, self.wandb = settings.save_every, settings.wandb
        self.step, self.seconds, self.began = 0, 0.0, time.time()
        self.stopping, self.records, self.drawn, self.printed = False, [], 0.0, time.time()

    def finished(self, steps, hours=0):
        """Whether the run is complete on the disk; nothing is written."""
        newest = self.newest()
        if newest is None or not (self.folder / "config.json").exists():
            return False
        state = newest[1]
        return state["step"] >= steps or bool(hours and state["seconds"] >= hours * 3600)

    def newest(self):
        """(folder, state) of the newest checkpoint that is whole, or None; refuses one that was
        made with other settings."""
        for checkpoint in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                state = load_state(checkpoint, mmap=True)  # nothing large is read yet
                check_readable(checkpoint)
                differ = [k for k, v in self.identity.items() if state["identity"].get(k) != v]
            except Exception as error:  # truncated, unreadable, not ours: the one before may do
                print(f"{checkpoint} is damaged ({type(error).__name__}): trying the one before",
                      file=sys.stderr)
                continue
            if differ:
                raise UsageError(f"{self.folder} holds a run with other settings "
                                 f"({', '.join(differ)}): give the same flags to continue it, "
                                 "or another --out")
            return checkpoint, state
        return None

    def start(self, trainer):
        """From here on the folder is written to, by this process alone."""
        self.trainer = trainer
        self.handle_signals(dict.fromkeys(DEFAULT_HANDLERS, self.interrupt))
        if RANK == 0:
            self.take_lock()
        if newest := self.newest():
            checkpoint, state = newest
            trainer.load_state(read_weights(checkpoint), load_state(checkpoint)["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        self.began = time.time()
        if RANK == 0:
            self.continue_log()

    def take_lock(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}): "
                             "choose another --out") from None
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.folder} is in use by another run: wait for it, stop it, "
                             "or choose another --out") from None

    def continue_log(self):
        """Keeps the records up to the checkpoint: what came after it will be done again."""
        path, kept = self.folder / "log.jsonl", []
        if self.step:
            print(f"{self.folder}: continuing after step {self.step}", flush=True)
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [r for r in map(json.loads, lines) if r.get("step", 0) <= self.step]
        write_file(path, lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in kept)))
        self.records = kept
        self.wandb = start_wandb(self.wandb, self.folder, self.identity) if self.wandb else None
        self.append({"settings": self.identity, **describe_machine(self.trainer.device)})

    def steps(self, total, hours=0):
        """Yields the steps (0-based) that are left. After each: counts it, saves where due, stops
        where Ctrl-C, SIGTERM or the clock ask for it; all ranks leave in the same step."""
        while self.step < total:
            if self.agreed(hours and self.elapsed() > hours * 3600):
                return self.save()  # once more: its clock says that the run is complete
            (self.folder / "config.json").unlink(missing_ok=True)  # a longer run is not finished
            yield self.step
            self.step += 1
            stop = self.agreed(self.stopping)
            if stop or self.step >= total or self.step % self.save_every == 0:
                self.save()
            if stop and self.step < total:
                raise KeyboardInterrupt

    def finish(self):
        """The model into the folder itself, and the run's last picture -> the folder."""
        if self.step == 0:  # --steps 0: the window is set, nothing is trained
            self.save()
        weights, _ = self.trainer.state()
        if RANK == 0:
            self.on_disk(lambda: self.trainer.model.save_pretrained(self.folder, weights))
            self.on_disk(self.draw)
            self.lock.close()
        if WORLD > 1:
            dist.barrier()
        self.handle_signals(DEFAULT_HANDLERS)
        return self.folder

    def interrupt(self, number, frame):
        """Ctrl-C or SIGTERM: finish the step, save, stop; a second one of its kind stops at once
        (the recipe's other process may get one of each)."""
        self.stopping = True
        print("\nstopping after this step", file=sys.stderr, flush=True)
        signal.signal(number, DEFAULT_HANDLERS[number])

    def handle_signals(self, handlers):
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def agreed(self, condition):
        """Whether it holds on any rank."""
        return all_max(float(bool(condition)), self.trainer.device) > 0

    def elapsed(self):
        """Seconds of the run, over interruptions."""
        return self.seconds + time.time() - self.began

    def log(self, record, line="", every=0):
        """Appends the record of the step that runs; prints the line at most each `every` s."""
        record = {"step": self.step + 1, **record, "elapsed": self.elapsed()}
        if RANK != 0:
            return
        if line and time.time() - self.printed >= every:
            print(f"{line} | {record['elapsed']:.0f} s", flush=True)
            self.printed = time.time()
        self.append(record)

    def append(self, record):
        self.records.append(record)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def save(self):
        """Writes step-N and, now and then, the picture."""
        weights, optimizer = self.trainer.state()
        if RANK == 0:
            self.on_disk(lambda: self.write_checkpoint(weights, optimizer))
            if time.time() - self.drawn > 60:
                self.on_disk(self.draw)
        if WORLD > 1:
            dist.barrier()

    def write_checkpoint(self, weights, optimizer):
        target, temporary = self.folder / f"step-{self.step:06d}", self.folder / "step.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        self.trainer.model.save_pretrained(temporary, weights)
        state = {"step": self.step, "seconds": self.elapsed(), "identity": self.identity,
                 "optimizer": optimizer}
        write_file(temporary / "trainer.pt", lambda f: torch.save(state, f))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in sorted(self.folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def draw(self):
        draw_curves(self.folder / "curves.png", self.records, str(self.folder))
        self.drawn = time.time()

    def on_disk(self, write):
        try:
            write()
        except OSError as error:
            raise UsageError(f"{self.folder} could not be written ({error.strerror}): free some "
                             "space or choose another --out; the checkpoint before it is whole"
                             ) from None


def load_state(checkpoint, mmap=False):
    return torch.load(checkpoint / "trainer.pt", map_location="cpu", mmap=mmap, weights_only=True)


def start_wandb(project, folder, settings):
    try:
        import wandb
    except ImportError:
        raise UsageError("--wandb needs the package: pip install wandb, "
                         "or leave the flag out") from None
    return wandb.init(project=project, name=str(folder), config=settings, resume="allow",
                      id=str(folder).replace("/", "-"))


def read_log(folder):
    """The records of the steps in a run's log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def describe_machine(device):
    """What a log must say of where it was made."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                         cwd=Path(__file__).parent).stdout.strip()
    return {"git": git or None, "python": platform.python_version(), "torch": torch.__version__,
            "device": (torch.cuda.get_device_name() if device.type == "cuda"
                       else platform.processor() or "cpu"),
            "threads": torch.get_num_threads(), "ranks": WORLD, "argv": sys.argv}


# --------------------------------------------------------------------------------------------------
# tables and pictures

COLORS = {"SA": "#0072B2", "SWA": "#D55E00", "hybrid": "#009E73"}  # Okabe and Ito's, for all eyes

CURVES = {  # column of log.jsonl: label; a run's picture shows those that it has
    "loss": "training loss (nats/token)", "held_out": "held-out loss (nats/token)",
    "reward": "mean reward", "length": "mean length (tokens)",
    "entropy": "policy entropy (nats/token)", "truncated": "truncated share",
    "grad_norm": "gradient norm before clipping", "tok_per_s": "tokens/s",
}


def new_figure(*size, **more):
    """A matplotlib Figure of its own: no pyplot, no backend, nothing to close."""
    from matplotlib.figure import Figure  # takes a second

    return Figure(figsize=size, **{"layout": "tight"} | more)


def save_figure(figure, path, dpi=110):
    write_file(path, lambda f: figure.savefig(f, dpi=dpi, format="png"))


def draw_curves(path, records, title):
    """The run's log as small multiples."""
    columns = [c for c in CURVES if any(c in r for r in records)]
    if not columns:
        return
    lines = -(-len(columns) // 2)
    figure = new_figure(8, 2.2 * lines)
    axes = figure.subplots(lines, 2, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        points = [(r["step"], r[column]) for r in records if r.get(column) is not None]
        axis.plot(*zip(*points, strict=True), color="black", linewidth=1.2,
                  marker="." if len(points) < 60 else "")
        axis.set(title=CURVES[column], xlabel="step")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(columns):]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def markdown(rows, cell=str):
    """Rows (dicts) -> the lines of a Markdown table; cell(value) is a value as text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = [keys, ["---"] * len(keys)]
    table += [[cell(row[key]) if key in row else "" for key in keys] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in table]


# --------------------------------------------------------------------------------------------------
# memory


def memory_plan(config, tokens, slots=0, length=0):
    """[(phase, part, bytes)] of a GPU run; its peak is "always" plus the larger of the two others.

    tokens: of one micro-batch in the update; slots sequences of up to `length` tokens in rollouts.
    """
    with torch.device("meta"):
        P = sum(p.numel() for p in Transformer(config).parameters())
    C, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = 3 * I + 4 * C + 2 * heads  # what the backward of a block needs of each token
    plan = [
        ("always", "weights, float32 masters", 4 * P),
        ("always", "AdamW, two moments, float32", 8 * P),
        ("update", "gradients, float32", 4 * P),
        ("update", "bfloat16 casts of the weights", 2 * P),
        ("update", "block inputs kept for the backward", 2 * tokens * C * L),
        ("update", "one block recomputed, and its gradients", 2 * 2 * tokens * block),
        ("update", "a chunk of logits and its gradients",
         3 * 4 * min(LOGITS_PER_CHUNK, tokens * config.vocab_size))]
    if slots:
        cache = slots * Cache.bytes_per_slot(config, length, torch.bfloat16)
        plan += [("always", "rollout copy, bfloat16", 2 * P),
                 ("rollout", f"ring cache of {slots} sequences", cache)]
    return plan


def peak_bytes(plan):
    phases = {phase: sum(size for at, _, size in plan if at == phase) for phase, _, _ in plan}
    return phases["always"] + max(phases["update"], phases.get("rollout", 0))


def config_of(model):
    """The configuration of --model."""
    if model in TASKS:
        return TASKS[model].config
    return read_config(resolve(model, ["config.json"]))


def print_plan(settings, tokens, slots=0, length=0):
    """The plan of one GPU, before anything is allocated; needs config.json only."""
    config = replace(config_of(settings.model), window=settings.window,
                     full_layers=settings.full_layers)
    tokens = max(tokens, settings.micro_tokens)
    plan = memory_plan(config, tokens, slots, length)
    plan.append(("", "peak: always + the larger phase", peak_bytes(plan)))
    print(f"{settings.model}, window {settings.window or 'full'}, micro-batches of {tokens:,} "
          "tokens; computed\n")
    rows = [{"when": phase, "what": part, "GB": f"{size / 1e9:.2f}"} for phase, part, size in plan]
    print("\n".join(markdown(rows)))


# --------------------------------------------------------------------------------------------------
# the tiny task


class RunningSums:
    """Running sums with named operands, where restating brings far operands near.

    Prompt `a3b0c4d1?`: n in 4..8 operands of 0..4. Answer `a3+0=3;b0+3=3;...\\boxed{8}`. Reading
    the k-th operand out of the prompt reaches back 2n + 5k tokens; after a step the operands that
    remain may be restated, `[c4d1]`, and are then near: nothing in the prompt asks for it. A token
    is a character, but for the box.
    """

    config = ModelConfig(vocab_size=33, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                         max_position_embeddings=512)
    tokens = [*"0123456789abcdefghijkl+=;[]?", r"\boxed{", "}"]
    defaults = {
        "sft": {"window": 24, "steps": 200, "batch": 32, "lr": 1e-3, "warmup": 10,
                "max_length": 256, "eval_every": 50, "eval_examples": 200, "data": "tiny",
                "instruction": ""},
        "rl": {"window": 24, "steps": 40, "prompts": 16, "group": 8, "max_new_tokens": 140,
               "lr": 7e-4, "warmup": 3, "validate": 512, "data": "tiny", "instruction": ""},
    }
    pretraining = {"steps": 1500, "rounds": 4, "batch": 16, "length": 128, "lr": 3e-3,
                   "warmup": 75}
    grade = None  # rl.py's answer checker, as for real problems
    measures = {"restatements": lambda response: response.count("[")}

    def sft(self, settings):
        """(training problems, held-out problems): 80 % of the solutions hardly restate, 20 %
        nearly always."""
        def restate(rng):
            return 0.1 if rng.random() < 0.8 else 0.9

        return (self.problems(4000, [settings.seed, 4], restate=restate),
                self.problems(settings.eval_examples, [settings.seed, 5], True, restate))

    def rl(self, settings, step, attempt):
        return self.problems(settings.prompts, [settings.seed, 7, step, attempt])

    def some(self, n, seed):
        return self.problems(n, [seed, 13])

    def other_solutions(self, seed):
        return {"restate-only": self.problems(4000, [seed, 4], restate=lambda rng: 1)}

    def validation(self, n, seed):
        return self.problems(n, [seed, 10], test=True)

    def problems(self, n, seed, test=False, restate=None):
        """n problems of one side of the hash split; test problems are distinct.

        restate(rng) -> the probability of one solution's restatements; None: without solutions.
        """
        rng, problems, seen = np.random.default_rng(seed), [], set()
        while len(problems) < n:
            problem = self.problem(rng)
            if on_test_side(problem) != test or (test and problem in seen):
                continue
            seen.add(problem)
            total = sum(int(value) for value in problem[1::2]) % 10
            solution = self.solution(problem, rng, restate(rng)) if restate else ""
            problems.append({"problem": problem, "answer": str(total), "solution": solution})
        return problems

    def problem(self, rng):
        n = rng.integers(4, 9)
        return "".join(f"{letter}{rng.integers(5)}" for letter in "abcdefgh"[:n]) + "?"

    def solution(self, problem, rng, restate):
        """restate: the probability, after a step, where two operands or more remain."""
        operands = [problem[i:i + 2] for i in range(0, len(problem) - 1, 2)]
        text, total = "", 0
        for i, (letter, value) in enumerate(operands):
            text += f"{letter}{value}+{total}="
            total = (total + int(value)) % 10
            text += f"{total};"
            if len(operands) - i > 2 and rng.random() < restate:
                text += f"[{''.join(operands[i + 1:])}]"
        return text + f"\\boxed{{{total}}}"

    def documents(self, seed):
        """What the base is pretrained on: each document restates with a probability of its own."""
        problems = self.problems(12000, [seed, 1], restate=lambda rng: rng.random())
        return [p["problem"] + p["solution"] for p in problems]

    @torch.no_grad()
    def gate(self, model, tokenizer, seed, n=200):
        """What RL will amplify must be there: the share of digits that the base reads right out of
        restatements, the result's into the box included, in the longest problems.

        The prompt's own operands are hidden by the window, so that only restatements can be read.
        """
        rng, right, asked = np.random.default_rng([seed, 3]), 0, 0
        model.config.window = 24
        try:
            for _ in range(n // 50):
                texts = []
                while len(texts) < 50:
                    problem = self.problem(rng)
                    if len(problem) >= 15:  # 7 or 8 operands
                        texts.append(problem + self.solution(problem, rng, restate=1))
                rows = [tokenizer.encode("<bos>" + text) for text in texts]
                tokens = torch.zeros(50, max(map(len, rows)), dtype=torch.long, device=model.device)
                for i, row in enumerate(rows):
                    tokens[i, :len(row)] = torch.tensor(row)
                guess = model(tokens).argmax(-1)
                for i, text in enumerate(texts):
                    for match in re.finditer(r"(?<=\])[a-h]|\\boxed", text):
                        at = match.start() + 1  # a character is a token up to the box; <bos> is one
                        right += (guess[i, at] == tokens[i, at + 1]).item()
                        asked += 1
        finally:
            model.config.window = None
        return right / asked


TASKS = {"tiny": RunningSums()}  # by the name that --model and --data take


def pretrain(settings):
    """The SA base of a tiny task -> its folder: language modelling on documents, then the gate.

    A base that cannot read values out of restatements looks as good as any after SFT and yet gives
    RL nothing to amplify; so pretraining goes on in rounds until it can.
    """
    task, how, device = settings.tiny, settings.tiny.pretraining, settings.start_device()
    run = Run(settings, Path(settings.out) / settings.model / "base-wfull",
              {"stage": "base", "seed": settings.seed})
    if run.finished(1):
        return run.folder
    model = untrained(task, settings.seed)
    tokenizer = Tokenizer(model.tokenizer_files)
    stream = []  # the documents one after another
    for document in task.documents(settings.seed):
        stream += tokenizer.encode(f"<bos>{document}<eos>")
    stream, length = torch.tensor(stream), how["length"]

    def loss_fn(logprobs, micro):
        return -logprobs.sum() / (how["batch"] * length)

    trainer = Trainer(model, device, weight_decay=0.01)
    run.start(trainer)
    for last in range(how["steps"], how["steps"] * how["rounds"] + 1, how["steps"]):
        for step in run.steps(last):
            rng = np.random.default_rng([settings.seed, 2, step])
            starts = rng.integers(0, len(stream) - length - 1, how["batch"])
            crops = [stream[i:i + length + 1].tolist() for i in starts]
            rows = [{"tokens": crop[:-1], "targets": crop[1:]} for crop in crops]
            lr = schedule(step % how["steps"], how["steps"], how["lr"], how["warmup"], "linear",
                          decay_from=0.6)
            trainer.update(rows[RANK::WORLD], loss_fn, lr)
            run.log({}, f"base step {step + 1}/{last}", every=10)
        passed = task.gate(model, tokenizer, settings.seed)
        print(f"base: step {run.step}, passes {passed:.3f} of the gate", flush=True)
        if passed >= 0.98:
            break
    return run.finish()


def untrained(task, seed=0):
    """A tiny task's model before pretraining, with an initialisation of its own."""
    torch.manual_seed(seed)
    model = Transformer(replace(task.config))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            own = {"model.embed_tokens.weight": 0.7, "lm_head.weight": 0.02}
            std = own.get(name, p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * task.config.num_hidden_layers)
            torch.nn.init.normal_(p, std=std)
    model.tokenizer_files = tokenizer_files(task.tokens)
    return model


def tokenizer_files(tokens):
    """{file name: bytes} of a tokenizer without merges, in Hugging Face's format.

    A token is a character, a longer one an added token; other characters are dropped.
    """
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = [*special, *tokens]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "special": token in special, **flags}
             for i, token in enumerate(tokens) if len(token) > 1]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": added,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        # Also the added tokens: Hugging Face gives those missing here ids of its own choice
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>",
        "chat_template": "{{ bos_token }}{{ messages[-1]['content'] }}",
    }
    return {"tokenizer.json": json.dumps(tokenizer).encode(),
            "tokenizer_config.json": json.dumps(config).encode()}


# --------------------------------------------------------------------------------------------------
# the command


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def flags(stage, description):
    """The command line of a stage: a flag for each of its settings, absent where not given."""
    parser = FlagParser(description=description, argument_default=argparse.SUPPRESS)
    tiny = TASKS["tiny"].defaults[stage.stage]
    for f in fields(stage):
        name, text = f"--{f.name.replace('_', '-')}", f.metadata["text"]
        if f.default not in (None, (), False):
            own = f", tiny: {tiny[f.name]!r}" if f.name in tiny else ""
            text += f" (default: {f.default!r}{own})"
        kinds = {int: int, int | None: int, float: float}
        flag = {"action": "store_true"} if f.type is bool else {"type": kinds.get(f.type, str)}
        parser.add_argument(name, help=text.replace("%", "%%"), **flag | f.metadata["flag"])
    return parser


def parser():
    return flags(SFTSettings, __doc__.split("\n\n")[0])


def main():
    settings = SFTSettings.of(**vars(parser().parse_args()))
    if settings.plan:
        return print_plan(settings, settings.max_length)
    print_settings(settings)
    print(f"done: {convert(settings)}")


def print_settings(settings):
    if RANK == 0:
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}
        print("settings:", json.dumps(values), flush=True)


if __name__ == "__main__":
    cli(main)
