"""Stage 1: a pretrained self-attention (SA) model becomes a sliding-window (SWA) one by supervised
fine-tuning (SFT).

The window is set and the model is fine-tuned on solutions written for full attention: that is all
of the conversion. Its held-out loss is logged beside the SA teacher's on the same text, so that one
sees what the window costs before, during and after.

In the order of the file: the settings of a stage; the conversion; then what both stages share: the
data, the training step over packed rows (Trainer), the folder of a run (Run: checkpoints, log), the
memory plan; at the end the tiny tasks and the pretraining of their bases.

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
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, cached_property
from itertools import compress, zip_longest
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from model import (
    LOGITS_PER_CHUNK,
    MODEL_FILES,
    Cache,
    ModelConfig,
    Tokenizer,
    Transformer,
    UsageError,
    append_file,
    check_window,
    cli,
    fingerprint,
    hub_in_reach,
    read_config,
    read_json,
    read_weights,
    reading,
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

    data_flag = "--data"  # where a message about the data sends the user

    model: str = setting("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                         "tiny, a Hugging Face folder or a hub id", free=True)
    window: int | None = setting(4096, "keys that a query sees, its own included; or full",
                                 type=window_arg)
    window_from: int | None = setting(
        None, "start stage 1 with this window and shrink to --window over half of it")
    sinks: int = setting(0, "first tokens that every query sees beside the window; as many as the "
                            "prompt has keep it in sight", least=0)
    full_layers: tuple = setting((), "layers that keep full attention, such as 0,14,27",
                                 type=layers_arg)
    nope_full: bool = setting(False, "those layers without RoPE: an experiment")
    instruction: str = setting(INSTRUCTION, "appended to each problem")
    seed: int = setting(0, "of everything random", least=0)
    micro_tokens: int = setting(16384, "tokens of one forward and backward: lower it when memory "
                                       "runs out", free=True)
    keep_blocks: int = setting(0, "blocks whose activations are kept, not recomputed in the "
                                  "backward: faster, where memory allows", least=0, free=True)
    compile: bool = setting(False, "torch.compile the blocks in training", free=True)
    offload: bool = setting(False, "weights and optimizer in host memory, for a small GPU",
                            free=True)
    save_minutes: float = setting(15.0, "between checkpoints: what kill -9 may lose; Ctrl-C saves; "
                                        "0: after every step", least=0, free=True)
    out: str = setting("out", "where <model>/<stage>-w<window>/ goes", free=True)
    device: str = setting("auto", "where to run", free=True, choices=["auto", "cpu", "cuda"])
    wandb: str | None = setting(None, "also log to this project of Weights & Biases", free=True)
    plan: bool = setting(False, "print the memory that the run will take, and stop: a GPU's, or a "
                                "CPU's without one; --device tells which", free=True)
    memory: float | None = setting(None, "GB that --plan is about: by default those of the GPU "
                                         "that it sees, or else of this machine", free=True)

    other_models = 0  # on the device, beside the trained one and its rollout copy
    given = frozenset()  # the names of those that were given, not defaults

    def __post_init__(self):
        if self.window is None:  # full attention is one run, whatever stands beside a window
            self.sinks = 0

    @classmethod
    def of(cls, **given):
        """Settings from the flags that were given; a tiny task's defaults, then the real ones."""
        if given.get("model") == "tiny" and given.get("data") in TASKS:
            given["model"] = given["data"]  # each tiny task has a model of its own
        tiny = TASKS.get(given.get("model"))
        settings = cls(**(tiny.defaults[cls.stage] if tiny else {}) | given)
        settings.given = frozenset(given)
        settings.check()
        return settings

    def but(self, **changes):
        """The same settings with changes."""
        other = replace(self, **changes)
        other.given = self.given | frozenset(changes)
        return other

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
        if self.tiny:
            self.attention_of(self.tiny.config)  # told before a base is trained

    @property
    def tiny(self):
        """The tiny task whose model this is about, or None."""
        return TASKS.get(self.model)

    @cached_property
    def task(self):
        """Where the problems come from: see Problems."""
        return TASKS.get(self.data) or Problems(self.data, self.data_flag, self.stage == "rl")

    def identity(self):
        """What a checkpoint must have been made with, to be continued."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}
        return json.loads(json.dumps({"stage": self.stage} | own))  # as it comes back from a file

    def folder(self, stage=None):
        """<out>/<model>/<stage>-w<window>, with -sinks<n>, -full<layers> and -nope where set."""
        path = Path(self.model)
        name = path.resolve().name if path.exists() else path.name
        variant = f"w{self.window or 'full'}"
        if self.sinks:
            variant += f"-sinks{self.sinks}"
        if self.window and self.full_layers:
            variant += "-full" + ".".join(map(str, self.full_layers)) + "-nope" * self.nope_full
        return Path(self.out) / name / f"{stage or self.stage}-{variant}"

    def base(self):
        """The folder of the SA model that stage 1 begins with; a tiny task's is made if missing."""
        return pretrain(self) if self.tiny else resolve(self.model, MODEL_FILES)

    def attention_of(self, config):
        """A model's configuration, with the attention of this run."""
        return replace(config, window=self.window, sinks=self.sinks, nope_full=self.nope_full,
                       full_layers=self.full_layers if self.window else ())

    def micro_batch(self):
        """Tokens of the largest micro-batch that can come."""
        longest = self.longest()
        return max(longest, min(self.micro_tokens, self.sequences() * longest))

    def start_device(self):
        if self.tiny:
            torch.set_num_threads(1)  # tiny matrices gain nothing from more
        return pick_device(self.device, group=self.offload)

    def trainer(self, model, device):
        return Trainer(model, device, self.micro_tokens, keep_blocks=self.keep_blocks,
                       compile=self.compile, offload=self.offload)


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

    def longest(self):
        return self.max_length

    def sequences(self):
        """Of a step."""
        return self.batch

    def most_slots(self):
        return 0  # no rollouts


# --------------------------------------------------------------------------------------------------
# the conversion


def convert(settings, then=None):
    """Stage 1: base -> SWA by SFT (SA, with the window None); returns the run's folder, made now or
    before. then(trainer, pace) tries out on a GPU what will follow and says how long it takes."""
    if settings.tiny:
        settings.task.sft(settings)  # a fault in the data is told before a base is trained
    device, base = settings.start_device(), settings.base()
    run = Run(settings, identity=settings.identity() | {"base": fingerprint(base)})
    if run.finished(settings.steps):
        return run.folder
    model = Transformer.from_pretrained(base, None, (), device, torch.float32)
    tokenizer = Tokenizer(model.tokenizer_files)
    train, held_out = (
        that_fit(side, lambda problem: len(sft_rows(settings, tokenizer, [problem])[0]["tokens"]),
                 settings.max_length, "raise --max-length of convert_sft.py")
        for side in settings.task.sft(settings))
    held_out = sft_rows(settings, tokenizer, held_out)
    # Of SA: before the window is set, before a resume
    teacher = held_out_loss(model, held_out, settings, device)

    model.config = settings.attention_of(model.config)
    preflight(settings, device)
    trainer = settings.trainer(model, device)
    run.start(trainer)
    if device.type == "cuda" and run.step == 0:
        some = sft_rows(settings, tokenizer, shuffled_slice(train, 0, 200, [settings.seed, 6]))
        tokens = settings.batch * sum(len(row["tokens"]) for row in some) / len(some)
        shakedown(run, trainer, settings.micro_batch(), lambda trainer, pace: (
            f"stage 1 takes about {duration(settings.steps * tokens * pace)}"), then)
    student = math.nan
    if held_out and run.step == 0:
        student = held_out_loss(model, held_out, settings, device)
        print(f"held-out loss before training: SA {teacher:.3f}, window {settings.window or 'full'}"
              f" {student:.3f} nats a token", flush=True)
    for step in run.steps(settings.steps):
        began = time.time()
        model.config.window = window_at(step, settings)
        problems = shuffled_slice(train, step * settings.batch, settings.batch, [settings.seed, 6])
        rows = sft_rows(settings, tokenizer, problems[RANK::WORLD])
        total = all_sum({"targets": sum(t >= 0 for row in rows for t in row["targets"]),
                         "tokens": sum(len(row["tokens"]) for row in rows)}, device)
        measured = {"loss": 0.0}

        def loss_fn(logprobs, micro):
            loss = -logprobs.sum() / total["targets"]
            measured["loss"] += loss.item()
            return loss

        lr = schedule(step, settings.steps, settings.lr, settings.warmup, "cosine")
        norm = trainer.update(rows, loss_fn, lr)

        loss, seconds = all_sum(measured, device)["loss"], time.time() - began
        tok_per_s = total["tokens"] / seconds
        record = {"loss": loss, "grad_norm": norm, "lr": lr, "window": model.config.window,
                  "tok_per_s": tok_per_s, "seconds": seconds}
        if step == 0:
            record |= {"before": student} if held_out else {}
            warn_of_reach([len(row["tokens"]) for row in rows + held_out], settings)
        shown = ""
        if held_out and ((step + 1) % settings.eval_every == 0 or step + 1 == settings.steps):
            with run.off_the_clock():
                loss_now = held_out_loss(trainer.model, held_out, settings, device)
            record |= {"held_out": loss_now, "gap_to_teacher": loss_now - teacher,
                       "teacher": teacher}
            shown = f" | held-out {loss_now:.3f} (SA {teacher:.3f})"
        run.log(record, f"sft w={settings.window or 'full'} step {step + 1}/{settings.steps} | "
                        f"loss {loss:.3f}{shown} | norm {norm or math.nan:.2f} | lr {lr:.1e} | "
                        f"{tok_per_s:,.0f} tok/s", every=0 if shown else 5)
    return run.finish()


def warn_of_reach(lengths, settings):
    """A window that hides nothing makes SWA the same as SA, without a word."""
    window, sinks = settings.window, settings.sinks
    if window and lengths and max(lengths) <= window + sinks and RANK == 0:
        print(f"warning: none of {len(lengths)} sequences is longer than the window of {window}"
              f"{f' and {sinks} sinks' if sinks else ''} (the longest has {max(lengths)} tokens): "
              "it hides nothing; give a smaller --window", file=sys.stderr, flush=True)


def window_at(step, settings):
    """The window of a step: --window, or shrinking to it geometrically over the first half."""
    if not settings.window_from:
        return settings.window
    share = min(1.0, 2 * (step + 1) / settings.steps)
    return round(settings.window_from * (settings.window / settings.window_from) ** share)


def sft_rows(settings, tokenizer, problems):
    """Problems -> rows: prompt by the chat template, loss on the response only. Made batch by
    batch: whole data sets would not fit as lists."""
    end = min(tokenizer.stop_ids, default=None) if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise UsageError(f"{settings.model} names no eos token: "
                         "add eos_token to its tokenizer_config.json")
    probe = tokenizer.decode(as_prompt(tokenizer, "0", ""), skip_special=False)
    rows, opening = [], probe.rpartition("0")[2]  # what the template puts before the response
    for problem in problems:
        prompt = as_prompt(tokenizer, problem["problem"], settings.instruction)
        response = without_opening(settings.task.response(problem), opening)
        rows.append(make_row(prompt, tokenizer.encode(response) + [end]))
    return rows


def without_opening(response, opening):
    """The response less what it begins with and the prompt ends with, such as a template's <think>:
    else a second one would be trained. Whatever the white space: `<think>Okay` begins with a
    template's `<think>` and newline, too."""
    said, text = opening.rstrip(), response.lstrip()
    for start in re.finditer(r"\b\w|\W", said):  # an overlap begins with a word, not within one
        if text.startswith(said[start.start():]):
            response = text[len(said) - start.start():]
            break
    return response if opening == said else response.lstrip()


@torch.no_grad()
def held_out_loss(model, rows, settings, device):
    """Mean -log p of the response tokens, nats a token; nan without rows."""
    total, count = 0.0, 0
    for micro in pack(rows, settings.micro_tokens, device):
        with compute_type(device):
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
    size = None  # f(problem) -> a number that accuracy is shown by
    held_out = 5  # percent of the problems, by a hash: the same ones in both stages

    def __init__(self, source, flag="--data", distinct=False):
        self.source, self.flag, self.distinct = source, flag, distinct

    @cached_property
    def all(self):
        return load_problems(self.source, self.flag, self.distinct)

    def only(self, select):
        """This task with those of its problems that select(problems) returns."""
        less = Problems(self.source, self.flag, self.distinct)
        less.all = select(self.all)
        return less

    def sides(self, problems):
        """(training problems, held-out problems)."""
        return [[p for p in problems if on_test_side(p["problem"], self.held_out) == test]
                for test in (False, True)]

    def sft(self, settings):
        """(training problems, held-out problems), all with solutions."""
        train, held_out = self.sides(keep(self.all, [p["solution"] for p in self.all],
                                          "without a (verified) solution"))
        if not train:
            raise UsageError(f"{self.flag} {self.source} has no solutions to train on: give data "
                             'with "solution", "messages" or verified "generations"')
        return train, held_out[:settings.eval_examples]

    @cached_property
    def for_rl(self):
        train, held_out = self.sides(self.all)
        if not train or not held_out:
            raise UsageError(f"{self.flag} {self.source} is too small to hold out problems for "
                             "validation: give more problems")
        return train, held_out

    def rl(self, settings, step, attempt):
        """The problems of an RL step; attempt: how often the step has asked already."""
        first = (step + attempt * settings.steps) * settings.prompts
        return shuffled_slice(self.for_rl[0], first, settings.prompts, [settings.seed, 8])

    def some(self, n, seed):
        """n training problems for an analysis."""
        return self.for_rl[0][:n]

    def response(self, problem):
        """What stage 1 learns to answer."""
        return solution_text(problem)

    def other_solutions(self, seed):
        """{name: problems} with solutions of another kind, for eval.py's conversion strategies."""
        return {}

    def validation(self, n, seed):
        """At most n held-out problems: the same before and after RL and for every run."""
        return self.for_rl[1][:n]


def keep(problems, fine, why):
    """The problems that are fine (a truth value each); says how many are not, and why."""
    kept = list(compress(problems, fine))
    if RANK == 0 and len(kept) < len(problems):
        print(f"{len(problems) - len(kept):,} of {len(problems):,} problems are left out: {why}",
              flush=True)
    return kept


def that_fit(problems, count, limit, cure):
    """The problems of at most `limit` tokens by count(problem).

    A byte is at most one token, so only long texts are counted: in threads, since tiktoken works
    without Python's lock.
    """
    template = count({"problem": "0", "answer": "", "solution": ""})

    def fits(problem):
        text = problem["problem"] + solution_text(problem)
        size = template + len(text.encode("utf-8", "replace"))
        return size <= limit or count(problem) <= limit

    mine = problems[RANK::WORLD]
    with ThreadPoolExecutor() as pool:
        fine = list(tqdm(pool.map(fits, mine), "counting tokens", len(mine), delay=5,
                         disable=RANK > 0))
    kept = keep(problems, shared_out(fine), f"longer than {limit:,} tokens ({cure})")
    if problems and not kept:
        raise UsageError(f"none of {len(problems):,} problems has at most {limit:,} tokens: {cure}")
    return kept


def shared_out(mine):
    """Every rank's list of its items RANK::WORLD -> the list of all items."""
    if WORLD == 1:
        return mine
    ranks = [None] * WORLD
    dist.all_gather_object(ranks, mine)
    return [item for row in zip_longest(*ranks) for item in row if item is not None]


NOT_A_PROBLEM = (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration,
                 RecursionError)


def load_problems(source, flag="--data", distinct=False):
    """A JSONL file or a hub id (`id[:config[:split]]`) -> list of {"problem", "answer",
    "solution"}; distinct: each problem once.

    Understands the fields of MATH-like files (problem, answer, solution), openai/gsm8k (question,
    answer with `#### 42`), open-r1/OpenR1-Math-220k (messages, generations) and DAPO-Math-17k
    (prompt, reward_model). UsageError names the file and the line of the first fault.
    """
    path, problems, total = Path(source), {}, 0
    if path.is_file():
        lines = enumerate(path.open("rb"), 1)  # of bytes: json.loads tells their encoding
        rows, parse = ((n, line) for n, line in lines if line.strip()), json.loads
    elif path.suffix or path.exists() or source.count("/") != 1:
        raise UsageError(f"{flag} {source}: no such file; "
                         "give a JSONL file or a hub id such as openai/gsm8k:main")
    else:
        rows, parse = enumerate(hub_rows(source, flag), 1), dict
    for number, row in tqdm(rows, "reading problems", delay=5, disable=RANK > 0):
        try:
            problem = as_problem(parse(row))
        except NOT_A_PROBLEM as error:
            raise UsageError(f"{flag} {source} line {number}: not a problem in JSON ({error}); "
                             'it needs at least "problem" and "answer"') from None
        total += 1
        problems.setdefault(normal(problem["problem"]) if distinct else total, problem)
    if not problems:
        raise UsageError(f"{flag} {source} is empty: it needs at least one problem")
    if RANK == 0 and len(problems) < total:
        print(f"{total - len(problems):,} of {total:,} problems are left out: repeats", flush=True)
    return list(problems.values())


COLUMNS = {"problem", "question", "prompt", "answer", "solution", "reward_model", "messages",
           "generations", "correctness_math_verify", "correctness_llama", "is_reasoning_complete"}


def load_hub(name, config, split):
    """A data set of the hub, or what was fetched of it before where the hub is out of reach."""
    import datasets  # imported here since it takes more than a second

    if not hub_in_reach():
        datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(name, config, split=split)


def hub_rows(source, flag):
    """The rows of a hub data set: batch by batch, since millions of dicts would not fit."""
    name, config, split = (source.split(":") + [None, None])[:3]
    try:
        rows = load_hub(name, config, split or "train")
    except Exception as error:  # network, unknown id, missing config: many types, one cure
        raise UsageError(f"{flag} {source} could not be fetched from the hub: check the name "
                         "and the connection, or give a JSONL file "
                         f"({type(error).__name__})") from None
    known = [name for name in rows.column_names if name in COLUMNS] or rows.column_names
    for batch in rows.select_columns(known).iter(1000):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


# The answer instruction that DAPO-Math-17k puts around each problem, against our own
WRAPPER = ("Solve the following math problem step by step. The last line of your response should "
           "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
           "problem.\n\n", '\n\nRemember to put your answer on its own line after "Answer:".')


def as_problem(row):
    """A row of any known layout -> {"problem", "answer", "solution"}."""
    problem = row.get("problem") or row.get("question") or row.get("prompt")
    answer, solution = row.get("answer"), row.get("solution") or ""
    if isinstance(problem, list):  # a chat
        problem = said_by("user", problem)
    if "reward_model" in row:
        answer = row["reward_model"]["ground_truth"]
    if row.get("generations"):
        solution = verified(row)
    elif row.get("messages"):
        problem = problem or said_by("user", row["messages"])
        solution = said_by("assistant", row["messages"])
    if not isinstance(problem, str) or answer is None:
        raise ValueError('no "problem" or no "answer"')
    if not isinstance(answer, (str, int, float)) or not isinstance(solution, str):
        raise ValueError("its answer or its solution is no text")
    if "####" in str(answer):  # GSM8K's own layout
        solution, answer = solution or answer, str(answer).split("####")[-1].strip()
    problem = problem.removeprefix(WRAPPER[0]).removesuffix(WRAPPER[1])
    return {"problem": problem, "answer": str(answer), "solution": solution}


def verified(row):
    """The first complete generation that Math-Verify, or else the judge, found correct; or ""."""
    names = "correctness_math_verify", "correctness_llama", "is_reasoning_complete"
    verdicts = (row.get(name) or [] for name in names)
    for text, right, judged, complete in zip_longest(row["generations"], *verdicts):
        if (right or judged) and complete is not False:
            return text
    return ""


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


def normal(problem):
    """The text but for case, white space and the form of its Unicode. Another wording of the same
    problem stays another problem."""
    return " ".join(unicodedata.normalize("NFC", problem.casefold()).split())


def on_test_side(problem, percent=20):
    """Whether a hash of its normal text puts a problem among those never trained on: the same in
    every run, every stage and all data."""
    return hashlib.sha256(normal(problem).encode("utf-8", "replace")).digest()[0] < 2.56 * percent


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
    return [join(group, device) for group in share_out(rows, micro_tokens)]


def share_out(rows, micro_tokens):
    """Rows -> the rows of each micro-batch."""
    groups, room = [], 0
    for row in sorted(rows, key=lambda row: -len(row["tokens"])):
        length = len(row["tokens"])
        if not groups or length > room:
            groups.append([])
            room = micro_tokens
        groups[-1].append(row)
        room -= length
    return groups


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
    """A model in training: float32 master weights and AdamW.

    A GPU computes in bfloat16 and recomputes all blocks but the last keep_blocks in the backward.
    Several ranks share all of it by FSDP2; so does one rank with offload, whose shard, the whole
    model and its optimizer, lies in host memory and visits the GPU block by block.
    """

    def __init__(self, model, device, micro_tokens=16384, weight_decay=0.0, grad_clip=1.0,
                 keep_blocks=0, compile=False, offload=False):
        self.device, self.micro_tokens, self.grad_clip = device, micro_tokens, grad_clip
        self.weight_decay, self.skipped = weight_decay, 0  # skipped: steps in a row
        self.sharded = WORLD > 1 or offload
        self.model = model.to("cpu" if offload else device, torch.float32)
        if device.type == "cuda":
            self.model.recomputed = max(0, model.config.num_hidden_layers - keep_blocks)
        blocks = self.model.model.layers
        if compile:  # packed rows have any length: one graph for all
            for block in blocks:
                block.compile(dynamic=True)
        if self.sharded:
            kind = {"mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if device.type == "cuda" else None,
                reduce_dtype=torch.float32)}
            if offload:
                on_gpu = device.type == "cuda"
                kind |= {"mesh": init_device_mesh(device.type, (WORLD,)),
                         "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu)}
            for block in blocks:
                fully_shard(block, **kind)
            fully_shard(self.model, **kind)
        self.reset_optimizer()

    def reset_optimizer(self):
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay},
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
        groups = share_out(rows, self.micro_tokens)
        micros = [join(group, self.device) for group in groups]
        for i, (_, logprobs) in enumerate(self.forwards(micros, temperature, model)):
            values, first = logprobs[0].tolist(), 0
            for row in groups[i] if i < len(groups) else ():  # the others are idle
                row[name] = values[first:first + len(row["tokens"])]
                first += len(row["tokens"])

    def weights(self, copied=False):
        """Full, unsharded, on request a GPU's as copies in host memory; a collective under FSDP, in
        which rank 0 gets them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=copied or WORLD > 1)
        return get_model_state_dict(self.model, options=options)

    def optimizer_state(self, copied=False):
        """Likewise; {} before the first step: to make one up, PyTorch would take a step."""
        if not self.optimizer.state:
            return {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=copied or WORLD > 1)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def load_state(self, weights, optimizer):
        """From rank 0, which has read them; other ranks give empty dictionaries."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)
        if weights and self.model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        set_model_state_dict(self.model, weights, options=options)
        if all_max(float(bool(optimizer)), self.device):
            set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)


def pick_device(name, group=False):
    """"auto", "cpu" or "cuda" -> torch.device; with a torchrun, or on request, its process group is
    started."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible here; "
                         "leave the flag out to run on the CPU")
    cuda = name != "cpu" and torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if (WORLD > 1 or group) and not dist.is_initialized():
        alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # So long a timeout, since rank 0 validates alone
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(hours=12), **alone,
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
        folder = run.finish()           # the model and run.json now lie in the folder itself

    Every random choice of a run derives from (seed, step), so the step is the whole data position
    and a resumed run repeats an undisturbed one bit by bit. Checkpoints are written under a
    temporary name; the last two are kept while the run goes on, the last one when it is finished.
    Left out: whoever writes into the folder while the run does, and a GPU that computes wrongly.
    """

    def __init__(self, settings, folder=None, identity=None):
        self.folder = Path(folder or settings.folder())
        self.identity = identity or settings.identity()
        self.defaults = {f.name: f.default for f in fields(settings)}
        self.save_seconds, self.wandb = 60 * settings.save_minutes, settings.wandb
        self.step, self.seconds, self.best, self.texts = 0, 0.0, -math.inf, {}
        self.stopping, self.records, self.writing = False, [], None

    def finished(self, steps, hours=0):
        """Whether the run is complete on the disk; nothing is written."""
        if not all((self.folder / name).exists() for name in ("run.json", "config.json")):
            return False
        step, seconds, identity = read_finished(self.folder)
        self.refuse_other(identity)
        done = step >= steps or bool(hours and seconds >= hours * 3600)
        if done:
            say_finished(self.folder, step)
        return done

    def refuse_other(self, identity):
        # A setting that is younger than the run had its default
        differ = [k for k, v in self.identity.items() if identity.get(k, self.defaults.get(k)) != v]
        if differ:
            raise UsageError(f"{self.folder} holds a run with other settings "
                             f"({', '.join(differ)}): give the same flags to continue it, "
                             "or another --out")

    # -- from start to finish

    def start(self, trainer):
        """From here on the folder is written to, by this process alone."""
        self.trainer = trainer
        self.handle_signals(dict.fromkeys(DEFAULT_HANDLERS, self.interrupt))
        if RANK == 0:
            self.take_lock()
        self.resume()
        self.began = self.saved = self.drawn = self.printed = time.time()
        self.first = self.step, self.began  # of this process, to tell the time left
        if RANK == 0:
            self.continue_files()

    def take_lock(self, patience=10):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}): "
                             "choose another --out") from None
        for attempt in range(patience):  # an owner that was killed may be about to end
            try:
                if fcntl:
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(1 if attempt < patience - 1 else 0)
        raise UsageError(f"{self.folder} is in use by another run: wait for it, stop it, "
                         "or choose another --out")

    def steps(self, total, hours=0):
        """Yields the steps (0-based) that are left. After each: counts it, saves where due, stops
        where Ctrl-C, SIGTERM or the clock ask for it; all ranks leave in the same step."""
        self.total, self.most_seconds = total, hours * 3600 or math.inf
        while self.step < total:
            if self.agreed(self.elapsed() > self.most_seconds):
                return
            (self.folder / "config.json").unlink(missing_ok=True)  # a longer run is not finished
            yield self.step
            self.step += 1
            stop = self.agreed(self.stopping)
            if stop or self.agreed(time.time() - self.saved >= self.save_seconds):
                self.save()
            if stop and self.step < total:
                self.wait()
                raise KeyboardInterrupt

    def finish(self):
        """The model into the folder itself, and the run's last picture -> the folder."""
        seconds = self.elapsed()
        self.wait()
        if not checkpoints(self.folder) or number(checkpoints(self.folder)[-1]) < self.step:
            self.save()
            self.wait()
        weights = self.trainer.weights()
        if RANK == 0:
            self.trainer.model.save_pretrained(self.folder, weights)
            told = {"step": self.step, "seconds": seconds, "identity": self.identity}
            write_file(self.folder / "run.json", lambda f: f.write_text(json.dumps(told)))
            prune(self.folder, keep=1)
            draw_curves(self.folder / "curves.png", self.records, str(self.folder))
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
        """Seconds of the run, over interruptions, without those off the clock."""
        return self.seconds + time.time() - self.began

    @contextmanager
    def off_the_clock(self):
        """What --hours does not count: validation and saving."""
        began = time.time()
        yield
        self.began += time.time() - began

    # -- checkpoints

    def save(self):
        """Writes step-N: on a GPU from a copy, while the run goes on, if host memory has room."""
        with self.off_the_clock():
            self.wait()
            size = 12 * sum(p.numel() for p in self.trainer.model.parameters())
            aside = self.trainer.device.type == "cuda" and host_memory() > 1.2 * size
            weights = self.trainer.weights(copied=aside)
            optimizer = self.trainer.optimizer_state(copied=aside)
            state = {"step": self.step, "seconds": self.elapsed(), "identity": self.identity,
                     "best": self.best, "texts": dict(self.texts), "optimizer": optimizer}
            if RANK == 0:
                self.writing = WRITER.submit(self.write_checkpoint, weights, state)
                if not aside:
                    self.wait()
                if time.time() - self.drawn > 60:
                    draw_curves(self.folder / "curves.png", self.records, str(self.folder))
                    self.drawn = time.time()
            if WORLD > 1:
                dist.barrier()
            self.saved = time.time()

    def wait(self):
        """For the checkpoint that is being written."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def write_checkpoint(self, weights, state):
        target, temporary = self.folder / f"step-{state['step']:06d}", self.folder / "step.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        prune(self.folder, keep=1)  # never more than two on the disk
        self.trainer.model.save_pretrained(temporary, weights)
        write_file(temporary / "trainer.pt", lambda f: torch.save(state, f))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)

    def resume(self):
        """Continues from the newest checkpoint that is whole; refuses one that was made with other
        settings. Rank 0 reads it."""
        weights, state = {}, {}
        for checkpoint in reversed(checkpoints(self.folder)) if RANK == 0 else ():
            try:
                state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
                weights = read_weights(checkpoint)
                self.step, self.seconds, self.best = (
                    state[key] for key in ("step", "seconds", "best"))
                self.texts, identity = dict(state["texts"]), dict(state["identity"])
                break
            except Exception as error:  # truncated, unreadable, not ours: the one before may do
                print(f"{checkpoint} is damaged ({type(error).__name__}): trying the one before",
                      file=sys.stderr)
                self.step, state = 0, {}
        if state:
            self.refuse_other(identity)
        self.step, self.seconds, self.best = (
            all_max(x, self.trainer.device) for x in (self.step, self.seconds, self.best))
        self.step = int(self.step)
        if self.agreed(state):
            self.trainer.load_state(weights, state.get("optimizer", {}))
        elif (self.folder / "run.json").exists():
            raise UsageError(f"{self.folder} is finished, and its optimizer's state was dropped: "
                             "it cannot be continued; choose another --out")

    def keep_best(self, value):
        """The model with the highest value so far lies in best/, beside the last one."""
        if value > self.best:
            self.best = value
            weights = self.trainer.weights()
            if RANK == 0:
                self.trainer.model.save_pretrained(self.folder / "best", weights)

    # -- log

    def continue_files(self):
        """Cuts the log and the texts off at the checkpoint: what came after will be done again."""
        path, kept = self.folder / "log.jsonl", []
        if self.step:
            print(f"{self.folder}: continuing after step {self.step}", flush=True)
            kept = [r for r in read_records(path) if r.get("step", 0) <= self.step]
        write_file(path, lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in kept)))
        for text in self.folder.glob("*.txt"):
            if not text.is_symlink():
                os.truncate(text, min(text.stat().st_size, self.texts.get(text.name, 0)))
        self.records = kept
        self.wandb = start_wandb(self.wandb, self.folder, self.identity) if self.wandb else None
        self.append({"settings": self.identity, **describe_machine(self.trainer.device)})

    def log(self, record, line="", every=0):
        """Appends the record of the step that runs; prints the line at most each `every` s."""
        record = {"step": self.step + 1, **record, "elapsed": self.elapsed()}
        if RANK != 0:
            return
        if line and time.time() - self.printed >= every:
            first, began = self.first
            pace = (time.time() - began) / (record["step"] - first)  # with saves and validation
            left = min(pace * (self.total - record["step"]), self.most_seconds - record["elapsed"])
            print(f"{line} | {duration(max(left, 0))} left", flush=True)
            self.printed = time.time()
        self.append(record)

    def append(self, record):
        self.records.append(record)
        append_file(self.folder / "log.jsonl", json.dumps(record) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def write_text(self, name, text):
        """Appends to a text for people, such as episodes.txt."""
        append_file(self.folder / name, text)
        self.texts[name] = (self.folder / name).stat().st_size


def read_finished(folder):
    """What a finished run says of itself: its steps, seconds and identity."""
    path = folder / "run.json"
    with reading(f"{path} is not what a run writes",
                 "remove it, and the same command continues from the last checkpoint"):
        told = read_json(path)
        return int(told["step"]), float(told["seconds"]), dict(told["identity"])


@cache
def say_finished(folder, step):
    """Once, that a run is used as it is: it may have more steps than were asked for."""
    if RANK == 0:
        print(f"{folder}: finished before, {step} steps", flush=True)


WRITER = ThreadPoolExecutor(1)


def checkpoints(folder):
    """The folders step-<digits>, oldest first; whatever else is called so is not ours."""
    return sorted((path for path in folder.glob("step-*")
                   if re.fullmatch(r"step-[0-9]+", path.name) and path.is_dir()
                   and not path.is_symlink()), key=number)


def number(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def prune(folder, keep=0):
    for old in checkpoints(folder)[:-keep or None]:
        shutil.rmtree(old)


def host_memory(pages="SC_AVPHYS_PAGES"):
    """Bytes, by default the free ones; 0 where the system does not tell."""
    if pages not in getattr(os, "sysconf_names", ()):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def duration(seconds):
    """12 s, 3:20 min or 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    unit, size = ("min", 60) if seconds < 3600 else ("h", 3600)
    return f"{int(seconds // size)}:{int(seconds % size * 60 // size):02d} {unit}"


def read_records(path):
    """The records of a log; lines that are none (cut off, damaged) are left out."""
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
    return records


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
    return [record for record in read_records(folder / "log.jsonl") if "step" in record]


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
    "reward": "mean reward", "validation": "validation accuracy", "length": "mean length (tokens)",
    "entropy": "policy entropy (nats/token)", "truncated": "truncated share",
    "grad_norm": "gradient norm before clipping", "tok_per_s": "tokens/s",
}


LEVELS = {"held_out": {"teacher": "SA", "before": "before training"}}  # lines across a curve


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
        for level, label in LEVELS.get(column, {}).items():
            for value in {r[level] for r in records if level in r}:
                axis.axhline(value, color="gray", linewidth=0.8, linestyle=":")
                axis.text(points[-1][0], value, label, fontsize=7, ha="right", va="bottom")
        axis.margins(y=0.12)
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
# before a run: what would end it after a night ends it in a minute


def memory_plan(config, tokens, slots=0, length=0, keep_blocks=0, offload=False, others=0):
    """[(phase, part, bytes)] of a GPU run; its peak is "always" plus the larger of the two others.

    tokens: of one micro-batch in the update; slots sequences of up to `length` tokens in rollouts.
    """
    C, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    P, root = parameters(config), config.vocab_size * C * (2 - config.tie_word_embeddings)
    one = (P - root) // L  # parameters of a block
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = 2 * tokens * (3 * I + 4 * C + 2 * heads)  # what a block's backward needs, bfloat16
    plan = [
        ("always", "weights, float32 masters", 4 * P),
        ("always", "AdamW, two moments, float32", 8 * P),
        ("update", "gradients, float32", 4 * P),
        ("update", "bfloat16 casts of the weights", 2 * (root + 2 * one))]
    if offload:  # the rest lies in host memory
        plan = [("update", "embedding and head, and their gradients", 6 * root),
                ("update", "two blocks and their gradients, bfloat16", 2 * 4 * one)]
    plan += [
        ("update", "block inputs kept for the backward", 2 * tokens * C * L),
        ("update", "one block recomputed, and its gradients", 2 * block),
        ("update", "a chunk of logits and its gradients",
         3 * 4 * min(LOGITS_PER_CHUNK, tokens * config.vocab_size))]
    if keep_blocks:
        plan.append(("update", f"{keep_blocks} blocks' activations", keep_blocks * block))
    if others:
        plan.append(("always", f"{others} other models, bfloat16", others * 2 * P))
    if slots:
        cache = slots * Cache.bytes_per_slot(config, length, torch.bfloat16)
        plan += [("always", "rollout copy, bfloat16", 2 * P),
                 ("rollout", f"ring cache of {slots} sequences", cache)]
    return plan


def cpu_plan(config, tokens, slots=0, length=0, others=0):
    """Likewise of a run on a CPU: all is float32, no block is recomputed, and the trained model
    itself rolls out."""
    C, L, D = config.hidden_size, config.num_hidden_layers, config.head_dim
    H, Hkv, P = config.num_attention_heads, config.num_key_value_heads, parameters(config)
    width = 4 * config.intermediate_size + 6 * C + 3 * (H + 2 * Hkv) * D  # floats a token
    plan = [
        ("always", "Python and its libraries", 4 * 10**8),
        ("always", "weights, float32", 4 * P),
        ("always", "AdamW, two moments, float32", 8 * P),
        ("update", "gradients, float32", 4 * P),
        ("update", "activations of all blocks, float32", 4 * tokens * width * L)]
    if others:
        plan.append(("always", f"{others} other models, float32", others * 4 * P))
    if config.window and config.window < tokens:  # see _attention_torch of swa_kernel.py
        block = min(max(config.window, 32), 128)
        seen = (config.window / block + 1) * (2 * Hkv * D + block) * (L - len(config.full_layers))
        plan.append(("update", "keys and values, copied for blocks of queries",
                     int(4 * tokens * seen)))
    plan.append(("update", "a chunk of logits and its gradients",
                 3 * 4 * min(LOGITS_PER_CHUNK, tokens * config.vocab_size)))
    if slots:
        cache = slots * Cache.bytes_per_slot(config, length, torch.float32)
        plan += [("rollout", "matrices once more, in the processor's layout", 4 * P),
                 ("rollout", f"ring cache of {slots} sequences", cache)]
    return plan


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def phases(plan):
    return {phase: sum(size for at, _, size in plan if at == phase) for phase, _, _ in plan}


def peak_bytes(plan):
    size = {"always": 0, "rollout": 0} | phases(plan)
    return size["always"] + max(size["update"], size["rollout"])


def config_of(model):
    """The configuration of --model."""
    if model in TASKS:
        return TASKS[model].config
    return read_config(resolve(model, ["config.json"]))


def plan_of(settings, cpu=False):
    """The plan of one GPU or a CPU, before anything is allocated; needs config.json only."""
    config = settings.attention_of(config_of(settings.model))
    sizes = settings.micro_batch(), settings.most_slots(), settings.longest()
    if cpu:
        return cpu_plan(config, *sizes, settings.other_models)
    return memory_plan(config, *sizes, settings.keep_blocks, settings.offload,
                       settings.other_models)


def print_plan(settings):
    """The plan, part by part; of several models (a,b), SA beside SWA, a line each."""
    models, gpu = settings.model.split(","), torch.cuda.is_available()
    cpu = settings.device == "cpu" or settings.device == "auto" and not (gpu or settings.memory)
    total = settings.memory or (cpu or gpu) and memory_of("cpu" if cpu else "cuda") / 1e9
    rows, rollouts = [], ""
    if slots := settings.most_slots():
        rollouts = f", {slots} sequences of {settings.longest():,} in rollouts"
    print(f"on a {'CPU' if cpu else 'GPU'}, window {settings.window or 'full'}, micro-batches of "
          f"{settings.micro_batch():,} tokens{rollouts}; computed\n")
    for model in models:
        for window in (None, settings.window) if len(models) > 1 else (settings.window,):
            plan = plan_of(settings.but(model=model, window=window), cpu)
            peak, disk = peak_bytes(plan) / 1e9, f"{disk_bytes(model) / 1e9:.1f}"
            answer = "yes" if peak <= 0.95 * total else "no"
            fits = {f"fits {total:.0f} GB": answer} if total else {}
            if len(models) == 1:
                rows = [{"when": phase, "what": part, "GB": f"{size / 1e9:.2f}"}
                        for phase, part, size in plan]
                rows += [{"what": "peak: always + the larger phase", "GB": f"{peak:.2f}"},
                         {"what": "disk, at most", "GB": disk}]
                rows += [{"what": name, "GB": answer} for name in fits]
            else:
                parts = {phase: f"{size / 1e9:.1f}" for phase, size in phases(plan).items()}
                rows.append({"model": model, "window": window or "full", **parts,
                             "peak, GB": f"{peak:.1f}", **fits, "disk, GB": disk})
    print("\n".join(markdown(rows)))
    if len(models) == 1 and fits and answer == "no":
        print(f"\n{SMALLER}")


def disk_bytes(model):
    """Two checkpoints of weights and moments, while one is replaced; the final and the best model.
    """
    return (2 * 12 + 2 * 4) * parameters(config_of(model))


SMALLER = "on a GPU give --offload, or lower --micro-tokens (training) or --slots (rollouts)"


def memory_of(kind):
    """Bytes of the GPU, or of the host; 0 where the system does not tell."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[1]
    return host_memory("SC_PHYS_PAGES")


def preflight(settings, device):
    """Refuses what the disk or the GPU cannot hold; says in a line what a run will take."""
    needed, place = disk_bytes(settings.model), Path(settings.out)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(f"{place} has {free / 1e9:.1f} GB free, and the run needs up to "
                         f"{needed / 1e9:.1f}: free some space or choose another --out")
    peak = peak_bytes(plan_of(settings, device.type == "cpu")) / 1e9
    total = memory_of(device.type) / 1e9
    if device.type == "cuda" and peak > total:  # a host may swap
        raise UsageError(f"the run takes about {peak:.0f} GB of GPU memory, and there are "
                         f"{total:.0f} (see --plan): {SMALLER}")
    if RANK == 0:
        there = f" of {total:.0f}" if total else ""
        print(f"{settings.folder()}: {settings.steps} steps, disk up to {needed / 1e9:.1f} of "
              f"{free / 1e9:.0f} GB, memory up to {peak:.1f}{there} GB", flush=True)


def shakedown(run, trainer, tokens, *stages):
    """The largest that will come, before the first step: micro-batches of so many tokens with
    optimizer's steps on zero gradients, what stages try out, a save and a load. It leaves the run
    as it was. stages: f(trainer, seconds a token of training) -> how long a stage takes, or None.
    """
    began = time.time()
    row = make_row([0], [0] * tokens, advantage=[0.0] * tokens, mask=[1.0] * tokens,
                   rollout_logprobs=[0.0] * tokens)

    def update(n):
        trainer.update([row] * n, lambda logprobs, micro: 0.0 * logprobs.sum(), lr=0.0)

    pace = seconds_each(update, 1, 3) / tokens / WORLD
    times = [stage(trainer, pace) for stage in stages if stage]
    run.save()
    run.wait()
    run.resume()
    trainer.reset_optimizer()  # its first step is still to come
    if RANK == 0:
        print(f"shakedown: {tokens:,} tokens, a rollout's slots, a save and a load passed in "
              f"{duration(time.time() - began)}; by its times {', '.join(times)}", flush=True)


def seconds_each(work, few, more):
    """Of one piece of work(n pieces), without what comes once: the first call compiles, and the
    difference of two others leaves the rest out."""
    seconds = []
    for n in (few, few, more):
        began = time.time()
        work(n)
        seconds.append(time.time() - began)
    return max(0.0, seconds[2] - seconds[1]) / (more - few)


# --------------------------------------------------------------------------------------------------
# the tiny tasks


class TinyTask:
    """A task for miniatures: its problems are made as they are asked for, by a seed each."""

    grade = None  # rl.py's answer checker, as for real problems

    def only(self, select):
        return self

    def rl(self, settings, step, attempt):
        return self.problems(settings.prompts, [settings.seed, 7, step, attempt])

    def some(self, n, seed):
        return self.problems(n, [seed, 13])

    def validation(self, n, seed):
        return self.problems(n, [seed, 10], test=True)

    def response(self, problem):
        return problem["solution"]

    def other_solutions(self, seed):
        return {}


class RunningSums(TinyTask):
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
               "lr": 7e-4, "warmup": 3, "validate": 512, "validate_every": 20, "data": "tiny",
               "instruction": ""},
    }
    pretraining = {"steps": 1500, "rounds": 4, "batch": 16, "length": 128, "lr": 3e-3,
                   "warmup": 75, "pass": 0.98}
    measures = {"restatements": lambda response: response.count("[")}
    longest_prompt = 18  # tokens, of 8 operands

    def size(self, problem):
        return len(problem) // 2  # operands

    def sft(self, settings):
        """(training problems, held-out problems): 80 % of the solutions hardly restate, 20 %
        nearly always."""
        def restate(rng):
            return 0.1 if rng.random() < 0.8 else 0.9

        return (self.problems(4000, [settings.seed, 4], restate=restate),
                self.problems(settings.eval_examples, [settings.seed, 5], True, restate))

    def other_solutions(self, seed):
        return {"restate-only": self.restating(1, seed)}

    def restating(self, probability, seed):
        """Solutions that all restate with one probability a step."""
        return self.problems(4000, [seed, 4], restate=lambda rng: probability)

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


class UnrestatedSums(RunningSums):
    """A control: the base never sees a restatement, and so cannot pass the gate."""

    pretraining = RunningSums.pretraining | {"rounds": 1}

    def documents(self, seed):
        problems = self.problems(12000, [seed, 1], restate=lambda rng: 0)
        return [p["problem"] + p["solution"] for p in problems]


class RollCall(TinyTask):
    """Each of the first n letters once, in any order, where an order that the last few letters
    suffice to continue stands in for the memory of what was named.

    Prompt `12`, answer `gcajbhlekdif`. The solutions are random permutations: nothing in them
    prefers an order, and all right answers are equally long. There are 15 prompts, n in 2..16, and
    all of them are trained on: what is validated is the answering, not new problems.
    """

    letters = "abcdefghijklmnop"
    longest_prompt = 2
    tokens = [*letters, *(str(n) for n in range(2, 17))]
    config = replace(RunningSums.config, vocab_size=34, intermediate_size=256)
    defaults = {
        "sft": {"window": 4, "steps": 600, "batch": 64, "lr": 1e-3, "warmup": 10,
                "max_length": 32, "eval_every": 100, "eval_examples": 200, "data": "roll-call",
                "instruction": ""},
        "rl": {"window": 4, "steps": 200, "prompts": 16, "group": 16, "max_new_tokens": 20,
               "lr": 5e-4, "warmup": 3, "validate": 480, "validate_every": 50,
               "data": "roll-call", "instruction": ""},
    }
    pretraining = {"steps": 2500, "rounds": 4, "batch": 16, "length": 64, "lr": 2e-3,
                   "warmup": 75, "pass": 0.95}

    def size(self, problem):
        return int(problem)  # letters

    def grade(self, response, gold):
        return "correct" if sorted(response) == sorted(gold) else "wrong"

    @staticmethod
    def order(response):
        """The correlation of place and letter: 1 for the alphabet, -1 for it backwards."""
        places = [RollCall.letters.find(letter) for letter in response]
        if len(set(places)) < 2:
            return 0.0
        return float(np.corrcoef(places, range(len(places)))[0, 1])

    measures = {"order": order}

    def sft(self, settings):
        return (self.problems(20000, [settings.seed, 4]),
                self.problems(settings.eval_examples, [settings.seed, 5]))

    def problems(self, n, seed, test=False):
        """n problems with their solutions; for a test each size in turn, the largest first."""
        rng, problems = np.random.default_rng(seed), []
        for i in range(n):
            size = 16 - i % 15 if test else int(rng.integers(2, 17))
            letters = self.letters[:size]
            solution = "".join(rng.permutation(list(letters)))
            problems.append({"problem": str(size), "answer": letters, "solution": solution})
        return problems

    def documents(self, seed):
        return [p["problem"] + p["solution"] for p in self.problems(100000, [seed, 1])]

    @torch.no_grad()
    def gate(self, model, tokenizer, seed, n=200):
        """The chance that an answer of full attention is right: what fresh random documents leave
        of it, letter by letter, and the end of the answer."""
        total = 0.0
        for document in self.problems(n, [seed, 3]):
            ids = tokenizer.encode(f"<bos>{document['problem']}")
            letters = tokenizer.encode(document["solution"])
            tokens = torch.tensor([ids + letters], device=model.device)
            p = model(tokens)[0, len(ids) - 1:].softmax(-1)
            legal = torch.zeros_like(p)
            for i in range(len(letters)):
                legal[i, letters[i:]] = 1
            legal[-1, list(tokenizer.stop_ids)] = 1
            total += (p * legal).sum(-1).prod().item()
        return total / n


TASKS = {"tiny": RunningSums(), "roll-call": RollCall(),  # by the name that --data takes
         "tiny-unrestated": UnrestatedSums()}


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
        if run.step > last:  # resumed in a later round: the gate has kept this model from passing
            continue
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
        if passed >= how["pass"]:
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
        kinds = {int: int, int | None: int, float: float, float | None: float}
        flag = {"action": "store_true"} if f.type is bool else {"type": kinds.get(f.type, str)}
        parser.add_argument(name, help=text.replace("%", "%%"), **flag | f.metadata["flag"])
    return parser


def parser():
    return flags(SFTSettings, __doc__.split("\n\n")[0])


def main():
    settings = SFTSettings.of(**vars(parser().parse_args()))
    if settings.plan:
        return print_plan(settings)
    print_settings(settings)
    print(f"done: {convert(settings)}")


def print_settings(settings):
    if RANK == 0:
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}
        print("settings:", json.dumps(values), flush=True)


if __name__ == "__main__":
    cli(main)
