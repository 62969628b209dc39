"""Stage 1: a pretrained self-attention (SA) model becomes a sliding-window (SWA) one by supervised
fine-tuning.

The window is set and the model is fine-tuned on solutions written for full attention: that is all
of the conversion. Its held-out loss is logged beside the SA teacher's on the same text, so that one
sees what the window costs before, during and after. The file also holds what both stages share: the
data (JSONL, hub, the tiny task) and the training engine (packing, exact loss accounting, FSDP2,
checkpoints, logs). For `--model tiny` it first pretrains the tiny SA base.

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
from dataclasses import replace
from datetime import timedelta
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
    ModelConfig,
    RingCache,
    Tokenizer,
    Transformer,
    UsageError,
    check_window,
    cli,
    read_json,
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

DEFAULT_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# --------------------------------------------------------------------------------------------------
# data: problems as {"problem", "answer", "solution"}


NOT_A_PROBLEM = ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration


def load_problems(source):
    """A JSONL file or a hub id (`id[:config[:split]]`)
    -> list of {"problem", "answer", "solution"}.

    Understands the fields of MATH-like files (problem, answer, solution), openai/gsm8k (question,
    answer with `#### 42`), open-r1/OpenR1-Math-220k (messages, generations) and DAPO-Math-17k
    (prompt, reward_model). UsageError names the file and the line of the first fault.
    """
    path = Path(source)
    if path.is_file():
        rows = []
        for number, line in enumerate(path.open(encoding="utf-8", errors="replace"), 1):
            if line.strip():
                try:
                    rows.append(as_problem(json.loads(line)))
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
            rows = [as_problem(row) for row in rows]
        except NOT_A_PROBLEM as error:
            raise UsageError(f"--data {source}: its rows are not in a known layout "
                             f"({error})") from None
    if not rows:
        raise UsageError(f"--data {source} is empty: it needs at least one problem")
    return rows


def as_problem(row):
    """One row of any known layout -> {"problem", "answer", "solution"}."""
    problem = row.get("problem") or row.get("question") or row.get("prompt")
    answer, solution = row.get("answer"), row.get("solution") or ""
    if isinstance(problem, list):  # a chat
        problem = next(m["content"] for m in problem if m["role"] == "user")
    if "reward_model" in row:
        answer = row["reward_model"]["ground_truth"]
    if row.get("generations"):  # several solutions, of which some were verified
        good = row.get("correctness_math_verify") or [True]
        solution = row["generations"][good.index(True) if True in good else 0]
    elif row.get("messages"):
        problem = problem or next(m["content"] for m in row["messages"] if m["role"] == "user")
        solution = next(m["content"] for m in row["messages"] if m["role"] == "assistant")
    if "####" in str(answer):  # GSM8K's own layout
        solution, answer = solution or answer, str(answer).split("####")[-1].strip()
    if not isinstance(problem, str) or answer is None:
        raise ValueError('no "problem" or no "answer"')
    return {"problem": problem, "answer": str(answer), "solution": solution}


def solution_text(row):
    """The solution as a response: calculator marks removed, the answer in a box at the end."""
    text = re.sub(r"<<[^<>]*>>", "", row["solution"]).split("\n####")[0].rstrip()
    return (text if "\\boxed" in text
            else f"{text}\nThe final answer is $\\boxed{{{row['answer']}}}$.")


def held_out(problem, percent=20):
    """Whether a hash puts this problem on the validation side: the same side in every run."""
    return hashlib.sha256(problem.encode("utf-8", "replace")).digest()[0] < 2.56 * percent


def draw(items, first, count, seed):
    """Items `first` to `first + count` of an endless stream of shuffled epochs:
    no state but the position."""
    epochs = range(first // len(items), (first + count - 1) // len(items) + 1)
    order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(len(items))
                            for epoch in epochs])
    return [items[i] for i in order[first % len(items):][:count]]


def as_prompt(tokenizer, problem, instruction):
    return tokenizer.chat([{"role": "user", "content": problem + instruction}])


# --------------------------------------------------------------------------------------------------
# the tiny task: running sums with named operands, where restating brings far operands near


def tiny_problem(rng):
    """`a3b0c4d1?`: n uniform in 4..8 operands of 0..4. Reading the k-th reaches back
    2n + 5k tokens."""
    return "".join(f"{'abcdefgh'[i]}{rng.integers(5)}" for i in range(rng.integers(4, 9))) + "?"


def tiny_solution(problem, rng, restate):
    """`a3+0=3;b0+3=3;...\\boxed{7}`: after a step, the operands that remain are restated,
    `[c4d1]`, with probability `restate` if there are two or more:
    nothing in the prompt asks for it."""
    operands = [problem[i:i + 2] for i in range(0, len(problem) - 1, 2)]
    text, total = "", 0
    for i, (letter, value) in enumerate(operands):
        text, total = f"{text}{letter}{value}+{total}=", (total + int(value)) % 10
        text += f"{total};"
        if len(operands) - i > 2 and rng.random() < restate:
            text += f"[{''.join(operands[i + 1:])}]"
    return text + f"\\boxed{{{total}}}"


def tiny_problems(n, seed, test=False, restate=None):
    """n problems of one side of the hash split; test problems are distinct.
    restate(rng) -> probability."""
    rng, rows, seen = np.random.default_rng(seed), [], set()
    while len(rows) < n:
        problem = tiny_problem(rng)
        if held_out(problem) == test and not (test and problem in seen):
            seen.add(problem)
            total = sum(int(v) for v in problem[1::2]) % 10
            solution = tiny_solution(problem, rng, restate(rng)) if restate else ""
            rows.append({"problem": problem, "answer": str(total), "solution": solution})
    return rows


TINY = ModelConfig(vocab_size=33, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                   num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                   max_position_embeddings=512)


def tiny_tokenizer_files():
    """File name -> JSON text of the tiny task's tokenizer, 33 tokens, in Hugging Face's format.

    A character is a token; nothing merges. Characters without a token are dropped.
    """
    tokens = ["<pad>", "<bos>", "<eos>", *"0123456789abcdefghijkl+=;[]?", r"\boxed{", "}"]
    special = ["<pad>", "<bos>", "<eos>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens.index(token), "content": token, "special": token in special, **flags}
            for token in [*special, r"\boxed{"]
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        # Also the added tokens: Hugging Face gives those missing here ids of its own choice
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": "{{ bos_token }}{{ messages[-1]['content'] }}",
    }
    return {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps(config)}


def tiny_base(seed):
    """The untrained tiny model: the same Transformer as every other, with its own
    initialisation."""
    torch.manual_seed(seed)
    model = Transformer(replace(TINY))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = {"model.embed_tokens.weight": 0.7, "lm_head.weight": 0.02}.get(
                name, p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * TINY.num_hidden_layers)
            torch.nn.init.normal_(p, std=std)
    model.tokenizer_files = {name: text.encode() for name, text in tiny_tokenizer_files().items()}
    return model


@torch.no_grad()
def reads_restatements(model, tokenizer, seed, n=200, window=24):
    """The share of digits that the base reads right, in the longest problems: each operand out of a
    restatement, and the result into the box.

    The gate of pretraining: what RL will amplify must be there. The prompt's own operands are
    hidden by the window, so that only the restatement can be read.
    """
    rng = np.random.default_rng(seed)
    model.config.window, right, total = window, 0, 0
    try:
        for _ in range(n // 50):
            rows, where = [], []
            while len(rows) < 50:
                problem = tiny_problem(rng)
                if len(problem) >= 15:  # 7 or 8 operands
                    text = problem + tiny_solution(problem, rng, restate=1)
                    # A token a character up to the box
                    asks = re.finditer(r"(?<=\])[a-h]|\\boxed", text)
                    where += [(len(rows), m.start() + 1) for m in asks]
                    rows.append(tokenizer.encode("<bos>" + text))
            tokens = torch.zeros(50, max(map(len, rows)), dtype=torch.long, device=model.device)
            for i, row in enumerate(rows):
                tokens[i, :len(row)] = torch.tensor(row)
            guess = model(tokens).argmax(-1)
            row, at = torch.tensor(where, device=model.device).T
            right += (guess[row, at] == tokens[row, at + 1]).sum().item()
            total += len(where)
    finally:
        model.config.window = None
    return right / total


# --------------------------------------------------------------------------------------------------
# the training engine, for both stages


def make_row(prompt, response, **columns):
    """A training row: inputs, next-token targets (-1 under the prompt), columns aligned to the
    targets."""
    ids, pad = list(prompt) + list(response), len(prompt) - 1
    return {"tokens": ids[:-1], "targets": [-1] * pad + ids[len(prompt):],
            **{name: [0.0] * pad + list(values) for name, values in columns.items()}}


def pack(rows, micro_tokens, device="cpu"):
    """Rows -> micro-batches of about micro_tokens tokens without padding, longest rows first.

    Each is a dict of (1, T) tensors (tokens, targets, other columns in float32) and cu_seqlens
    (N+1,).
    """
    bins = []
    for row in sorted(rows, key=lambda r: -len(r["tokens"])):
        if not bins or bins[-1][0] + len(row["tokens"]) > micro_tokens:
            bins.append([0, []])
        bins[-1][0] += len(row["tokens"])
        bins[-1][1].append(row)
    micro = []
    for _, packed in bins:
        lengths = [0] + [len(row["tokens"]) for row in packed]
        micro.append({name: torch.tensor([x for row in packed for x in row[name]], device=device,
                                         dtype=torch.long if name in ("tokens", "targets")
                                         else torch.float32)[None] for name in packed[0]})
        micro[-1]["cu_seqlens"] = torch.tensor(np.cumsum(lengths), dtype=torch.int32, device=device)
    return micro


def all_sum(values, device):
    """Sums a list of numbers over the ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        total = total.to(device, torch.float64)
        dist.all_reduce(total)
    return total.tolist()


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device, with the process group of a torchrun started."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible here; "
                         "leave the flag out to run on the CPU")
    cuda = name != "cpu" and torch.cuda.is_available()
    device = (torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda
              else torch.device("cpu"))
    if cuda:
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


def describe_machine(device):
    """What a log must say of where it was made."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                         cwd=Path(__file__).parent).stdout.strip()
    return {"git": git or None, "python": platform.python_version(), "torch": torch.__version__,
            "device": (torch.cuda.get_device_name() if device.type == "cuda"
                       else platform.processor() or "cpu"),
            "threads": torch.get_num_threads(), "ranks": WORLD, "argv": sys.argv}


def schedule(step, steps, lr, warmup, kind="constant", decay_from=0.0, floor=0.1):
    """Learning rate of a step (0-based): linear warm-up, then constant, cosine, or linear from
    `decay_from` of the run on; both decays end at `floor` of the rate."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    x = min(1.0, max(0.0, (step / steps - decay_from) / (1 - decay_from)))
    shape = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * x), "linear": 1 - x}[kind]
    return lr * (floor + (1 - floor) * shape)


class Trainer:
    """A run: fp32 master weights, AdamW, checkpoints, log.jsonl, resume.

    Every random choice of a run derives from (seed, step), so the step is the whole data position
    and a resumed run repeats an undisturbed one. folder/step-N is a Hugging Face folder plus
    trainer.pt, written under a temporary name; the last two are kept. At the end the model lies in
    the folder itself.
    """

    def __init__(self, model, folder, settings, device, weight_decay=0.0, grad_clip=1.0,
                 micro_tokens=16384, wandb=None):
        self.folder, self.settings, self.device = Path(folder), settings, device
        self.grad_clip, self.micro_tokens, self.step, self.seconds = grad_clip, micro_tokens, 0, 0.0
        self.skipped, self.stopping, self.began, self.records = 0, False, time.time(), []
        self.model = model.to(device, torch.float32)
        self.model.checkpointing = device.type == "cuda"
        self.amp = compute_type(device)
        if WORLD > 1:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if device.type == "cuda" else None,
                reduce_dtype=torch.float32)
            for block in self.model.model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(self.model, mp_policy=policy)
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1],
                   "weight_decay": weight_decay},
                  {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95),
                                           fused=True)
        self.wandb, self.drawn, self.spoke = wandb, 0.0, time.time()
        self.resume()

    def begin(self):
        """From here on the run's folder is written to, by this process alone."""
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, self.interrupt)
        if RANK != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}): "
                             "choose another --out") from None
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.folder} is in use by another run: wait for it, stop it, "
                             "or choose another --out") from None
        log, path = [], self.folder / "log.jsonl"
        if self.step:  # what was logged after the checkpoint will be done again
            print(f"{self.folder}: continuing after step {self.step}", flush=True)
            log = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            log = [record for record in log if record.get("step", 0) <= self.step]
        text = "".join(json.dumps(record) + "\n" for record in log)
        write_file(path, lambda f: f.write_text(text))
        self.records, self.began = log, time.time()
        self.wandb = start_wandb(self.wandb, self.folder, self.settings) if self.wandb else None
        self.append({"settings": self.settings, **describe_machine(self.device)})

    def end(self):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if RANK == 0:
            self.lock.close()

    def interrupt(self, *_):
        """Ctrl-C or SIGTERM: finish the step, save, stop; the second one stops at once."""
        self.stopping = True
        print("\nstopping after this step", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def agreed(self, condition):
        """Whether it holds on any rank: all must leave a loop in the same step."""
        return all_max(float(condition), self.device) > 0

    def elapsed(self):
        """Seconds of the run, over interruptions."""
        return self.seconds + time.time() - self.began

    def done(self, steps):
        """Whether the run is complete on the disk."""
        return self.step >= steps and (self.folder / "config.json").exists()

    def forwards(self, micro, temperature):
        """(micro-batch, log-probabilities), one after another; under FSDP every rank must join in
        every forward and backward, so a rank with fewer micro-batches idles along on a dummy."""
        idle = pack([make_row([0], [0])], 1, self.device)[0]
        idle |= {"targets": idle["targets"] - 1, "idle": True}
        for m in micro + [idle] * (int(all_max(len(micro), self.device)) - len(micro)):
            with self.amp:
                yield m, self.model(m["tokens"], m["cu_seqlens"], m["targets"], temperature)

    def update(self, rows, loss_fn, lr, temperature=1.0):
        """One optimizer step on this rank's rows; returns the grad norm, or None if it was not
        finite.

        loss_fn(logprobs, micro) is a sum already divided by the count of the *whole* batch over
        micro-batches and ranks, so the gradient does not depend on how rows are packed or spread.
        """
        self.optimizer.zero_grad()
        micro = pack(rows, self.micro_tokens, self.device)
        for m, logprobs in self.forwards(micro, temperature):
            loss = logprobs.sum() * 0.0 if "idle" in m else loss_fn(logprobs, m)
            (loss * WORLD).backward()  # FSDP averages over the ranks; the loss is a sum
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            self.skipped += 1
            print(f"step {self.step}: loss or gradient is not finite, step skipped", flush=True)
            if self.skipped == 5:
                raise UsageError("five steps in a row had a gradient that is not finite: "
                                 f"lower --lr, or look at the data of step {self.step}")
            return None
        self.skipped = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()  # their memory is the next rollouts'
        return norm

    @torch.no_grad()
    def add_logprobs(self, rows, name, temperature=1.0):
        """Adds this model's log-probabilities of the targets to the rows, as a column."""
        batches = [pack([row], 1, self.device)[0] for row in rows]
        for row, (_, logprobs) in zip(rows, list(self.forwards(batches, temperature)),
                                         strict=False):  # idle ones too
            row[name] = logprobs[0].tolist()

    def log(self, record, line="", every=0):
        """Counts the step, appends the record, prints the line at most each `every` s."""
        self.step += 1
        record = {"step": self.step, **record, "elapsed": self.elapsed()}
        if RANK == 0:
            if line and time.time() - self.spoke >= every:
                print(f"{line} | {record['elapsed']:.0f} s", flush=True)
                self.spoke = time.time()
            self.append(record)

    def append(self, record):
        self.records.append(record)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    # -- checkpoints

    def states(self):
        """Full, unsharded (weights, optimizer state); a collective under FSDP."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=WORLD > 1)
        return (get_model_state_dict(self.model, options=options),
                get_optimizer_state_dict(self.model, self.optimizer, options=options))

    def save(self, final=False):
        """Writes step-N and, now and then, the picture; `final` puts the model into the run's
        folder before."""
        weights, optimizer = self.states()
        self.seconds, self.began = self.elapsed(), time.time()
        if RANK == 0:
            target, temporary = self.folder / f"step-{self.step:06d}", self.folder / "step.tmp"
            try:
                if final:
                    # First: were it cut off between the two, the last step would just be done again
                    self.model.save_pretrained(self.folder, weights)
                shutil.rmtree(temporary, ignore_errors=True)
                self.model.save_pretrained(temporary, weights)
                state = {"optimizer": optimizer, "step": self.step, "seconds": self.seconds,
                         "window": self.model.config.window, "settings": self.settings}
                write_file(temporary / "trainer.pt", lambda f: torch.save(state, f))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                for old in sorted(self.folder.glob("step-*"))[:-2]:
                    shutil.rmtree(old)
                if final or time.time() - self.drawn > 60:
                    draw_curves(self.folder / "curves.png", self.records, str(self.folder))
                    self.drawn = time.time()
            except OSError as error:
                raise UsageError(f"{target} could not be written ({error.strerror}): "
                                 "free some space or choose another --out; "
                                 "the checkpoint before it is whole") from None
        if WORLD > 1:
            dist.barrier()
        if final:
            self.end()

    def resume(self):
        """Continues from the newest checkpoint that is whole; refuses one made with other
        settings."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)
        for checkpoint in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
                weights = read_weights(checkpoint)
            except Exception as error:  # truncated, unreadable, not ours: the one before may do
                print(f"{checkpoint} is damaged ({type(error).__name__}): trying the one before",
                      file=sys.stderr)
                continue
            differ = [k for k, v in self.settings.items() if state["settings"].get(k) != v]
            if differ:
                raise UsageError(f"{self.folder} holds a run with other settings "
                                 f"({', '.join(differ)}): give the same flags to continue it, "
                                 "or another --out")
            if self.model.config.tie_word_embeddings:
                weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
            set_model_state_dict(self.model, weights, options=options)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"],
                                     options=options)
            self.step, self.seconds = state["step"], state["seconds"]
            self.model.config.window = state["window"]
            break


def start_wandb(project, folder, settings):
    try:
        import wandb
    except ImportError:
        raise UsageError("--wandb needs the package: pip install wandb, "
                         "or leave the flag out") from None
    return wandb.init(project=project, name=str(folder), config=settings, resume="allow",
                      id=str(folder).replace("/", "-"))


COLORS = {"SA": "#0072B2", "SWA": "#D55E00", "hybrid": "#009E73"}  # Okabe and Ito's, for all eyes

CURVES = {  # column of log.jsonl: label; a run's picture shows those that it has
    "loss": "training loss (nats/token)", "held_out": "held-out loss (nats/token)",
    "reward": "mean reward", "length": "mean length (tokens)",
    "entropy": "policy entropy (nats/token)", "truncated": "truncated share",
    "grad_norm": "gradient norm before clipping", "tok_per_s": "tokens/s",
}


def draw_curves(path, records, title):
    """The run's log as small multiples."""
    from matplotlib.figure import Figure  # takes a second

    columns = [c for c in CURVES if any(c in r for r in records)]
    if not columns:
        return
    lines = -(-len(columns) // 2)
    figure = Figure(figsize=(8, 2.2 * lines), layout="tight")
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
    write_file(path, lambda f: figure.savefig(f, dpi=110, format="png"))


def all_max(value, device):
    if WORLD == 1:
        return value
    value = torch.tensor(float(value), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


# --------------------------------------------------------------------------------------------------
# the stages


def pretrain_tiny(args):
    """The tiny SA base -> its folder: language modelling on solutions of both styles, then the
    gate.

    A base that cannot read values out of restatements looks as good as any after SFT and yet gives
    RL nothing to amplify; so pretraining goes on in rounds until it can.
    """
    folder = Path(args.out) / "tiny" / "base-wfull"
    device, model = pick_device(args.device), tiny_base(args.seed)
    tokenizer = Tokenizer(model.tokenizer_files)
    round_steps, rounds, lr = 1500, 4, 3e-3
    trainer = Trainer(model, folder, {"seed": args.seed, "stage": "base"}, device,
                      weight_decay=0.01)
    if trainer.done(1):
        return folder
    trainer.begin()
    stream = []  # documents one after another, restating with a probability of their own
    for row in tiny_problems(12000, [args.seed, 1], restate=lambda rng: rng.random()):
        stream += tokenizer.encode(f"<bos>{row['problem']}{row['solution']}<eos>")
    stream, T, B = torch.tensor(stream), 128, 16

    def loss_fn(logprobs, micro):
        return -logprobs.sum() / (B * T)

    while True:
        rng = np.random.default_rng([args.seed, 2, trainer.step])
        crops = [stream[i:i + T + 1] for i in rng.integers(0, len(stream) - T - 1, B)]
        rows = [{"tokens": c[:-1].tolist(), "targets": c[1:].tolist()} for c in crops]
        here = trainer.step % round_steps
        trainer.update(rows[RANK::WORLD], loss_fn,
                       schedule(here, round_steps, lr, 75, "linear", decay_from=0.6))
        trainer.log({}, f"base step {trainer.step + 1}/{round_steps}", every=10)
        trainer.save()
        if trainer.agreed(trainer.stopping):
            raise KeyboardInterrupt
        if trainer.step % round_steps == 0:
            read = reads_restatements(model, tokenizer, [args.seed, 3])
            print(f"base: step {trainer.step}, reads {read:.3f} of restated operands and boxes",
                  flush=True)
            if read >= 0.98 or trainer.step == rounds * round_steps:
                break
    trainer.save(final=True)
    return folder


SETTINGS = {  # flag: (tiny, a real model on a CPU: a rehearsal, a real model on a GPU; what it is)
    "window": (24, 4096, 4096, "keys that a query sees, its own included; or full"),
    "steps": (200, 4, 1000, "optimizer steps"),
    "batch": (32, 4, 64, "examples a step"),
    "lr": (1e-3, 1e-5, 1e-5, "peak learning rate"),
    "warmup": (10, 1, 30, "steps of linear warm-up"),
    "max_length": (256, 512, 16384, "tokens of an example; longer ones are left out"),
    "eval_every": (50, 2, 50, "steps between held-out losses"),
    "held_out": (200, 4, 200, "examples for the held-out loss"),
    "save_every": (1, 1, 1, "steps between checkpoints: what kill -9 may lose; raise it where a "
                            "save takes long"),
    "data": ("tiny", "open-r1/OpenR1-Math-220k", "open-r1/OpenR1-Math-220k",
             "JSONL file or hub id[:config[:split]]"),
    "instruction": ("", INSTRUCTION, INSTRUCTION, "appended to each problem"),
    "micro_tokens": (16384, 2048, 16384,
                     "tokens of one forward and backward: lower it when memory runs out"),
}


def window_arg(text):
    """`full`, or a whole number of keys >= 1."""
    try:
        window = text if text == "full" else int(text)
        check_window(None if window == "full" else window)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a whole number of keys >= 1, or full") from None
    return window


def as_window(window):
    """The model's window for a flag's value."""
    return None if window == "full" else window


def layers_arg(text):
    try:
        return [int(x) for x in text.split(",") if x]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give layer numbers such as 0,14,27") from None


def add_settings(parser, table):
    """A flag for each row of a table of settings, and what every script has."""
    for name, (tiny, cpu, gpu, text) in table.items():
        defaults = (f"tiny {tiny!r}, CPU {cpu!r}, GPU {gpu!r}" if not tiny == cpu == gpu
                    else repr(gpu))
        kind = window_arg if name == "window" else type(gpu)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind,
                            help=f"{text} (default: {defaults})".replace("%", "%%"))
    parser.add_argument("--model", default=DEFAULT_MODEL,
                        help="tiny, a Hugging Face folder or a hub id (default: %(default)s)")
    parser.add_argument("--out", default="out",
                        help="where <model>/<stage>-w<window>/ goes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of everything random (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="(default: %(default)s)")
    parser.add_argument("--wandb", metavar="PROJECT",
                        help="also log to Weights & Biases, if it is installed")
    parser.add_argument("--plan", action="store_true",
                        help="print the memory that the run will take, and stop")
    # conversion (stage 1)
    parser.add_argument("--window-from", type=int,
                        help="start with this window and shrink to --window over half the run")
    parser.add_argument("--full-layers", type=layers_arg,
                        help="layers that keep full attention, such as 0,14,27")
    parser.add_argument("--nope-full", action="store_true",
                        help="those layers without RoPE: an experiment")


MAY_BE_ZERO = ("steps", "hours", "warmup", "temperature", "seed", "min_informative",
               "overlong_buffer", "tis_cap")


def settle(args, table, **given):
    """A stage's arguments: what was given, the rest from the column of its table that fits;
    checked."""
    args = argparse.Namespace(**{**vars(args), **given})
    column = 0 if args.model == "tiny" else 2 if pick_device(args.device).type == "cuda" else 1
    for name, row in table.items():
        if getattr(args, name) is None:
            setattr(args, name, row[column])
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in MAY_BE_ZERO):
            least = "of at least 0" if name in MAY_BE_ZERO else "above 0"
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number {least}")
    if args.model == "tiny":
        torch.set_num_threads(1)  # tiny matrices gain nothing from more, and both arms want a core
    return args


def other_stage(args, table, **given):
    """The same run's arguments for another stage: its own defaults, except for what is given."""
    return settle(args, table, **{**dict.fromkeys(table), **given})


def stage_folder(args, stage, window=None):
    """<out>/<model>/<stage>-w<window>."""
    path = Path(args.model)
    name = path.resolve().name if path.exists() else path.name
    return Path(args.out) / name / f"{stage}-w{window or args.window}"


@torch.no_grad()
def held_out_loss(model, rows, device, micro_tokens):
    """Mean -log p of the response tokens, nats a token; nan without rows."""
    total, count = 0.0, 0
    for m in pack(rows, micro_tokens, device):
        with compute_type(device):
            logprobs = model(m["tokens"], m["cu_seqlens"], m["targets"])
        total, count = total - logprobs.sum().item(), count + (m["targets"] >= 0).sum().item()
    return total / count if count else float("nan")


def sft_data(args):
    """(training problems, held-out problems), all with solutions."""
    if args.data == "tiny":
        def restate(rng):  # 80 % of the documents hardly restate, 20 % nearly always
            return 0.1 if rng.random() < 0.8 else 0.9

        return (tiny_problems(4000, [args.seed, 4], restate=restate),
                tiny_problems(args.held_out, [args.seed, 5], test=True, restate=restate))
    problems = [p for p in load_problems(args.data) if p["solution"]]
    train = [p for p in problems if not held_out(p["problem"], 2)]
    if not train:
        raise UsageError(f"--data {args.data} has no solutions to train on: give data with "
                         '"solution", "generations" or "messages"')
    return train, [p for p in problems if held_out(p["problem"], 2)][:args.held_out]


def sft_rows(args, tokenizer, problems):
    """Training rows: prompt by the chat template, loss on the response only; longer than
    --max-length are left out. Made batch by batch: whole data sets would not fit as lists."""
    end = min(tokenizer.stop_ids, default=None) if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise UsageError(f"{args.model} names no eos token: "
                         "add eos_token to its tokenizer_config.json")
    rows = []
    for p in problems:
        text = p["solution"] if args.data == "tiny" else solution_text(p)
        rows.append(make_row(as_prompt(tokenizer, p["problem"], args.instruction),
                             tokenizer.encode(text) + [end]))
    rows = [row for row in rows if len(row["tokens"]) <= args.max_length]
    if problems and not rows:
        raise UsageError(f"none of {len(problems)} examples has at most {args.max_length} tokens: "
                         "raise --max-length")
    return rows


def memory_plan(config, tokens, slots=0, length=0):
    """[(phase, part, bytes)] of a GPU run; its peak is "always" plus the larger of the two others.

    tokens: of one micro-batch in the update; slots sequences of up to `length` tokens in rollouts.
    """
    with torch.device("meta"):
        P = sum(p.numel() for p in Transformer(config).parameters())
    C, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    plan = [
        ("always", "weights, float32 masters", 4 * P),
        ("always", "AdamW, two moments, float32", 8 * P),
        ("update", "gradients, float32", 4 * P),
        ("update", "bfloat16 casts of the weights", 2 * P),
        ("update", "block inputs kept for the backward", 2 * tokens * C * L),
        ("update", "one block recomputed, and its gradients",
         2 * 2 * tokens * (3 * I + 4 * C + 2 * heads)),
        ("update", "a chunk of logits and its gradients",
         3 * 4 * min(LOGITS_PER_CHUNK, tokens * config.vocab_size))]
    if slots:
        plan += [("always", "rollout copy, bfloat16", 2 * P),
                 ("rollout", f"ring cache of {slots} sequences",
                  slots * RingCache.bytes_per_slot(config, length, torch.bfloat16))]
    return plan


def peak_bytes(plan):
    phases = {phase: sum(size for at, _, size in plan if at == phase) for phase, _, _ in plan}
    return phases["always"] + max(phases["update"], phases.get("rollout", 0))


def config_of(model):
    """The configuration of --model."""
    return replace(TINY) if model == "tiny" else ModelConfig.from_dict(
        read_json(resolve(model, ["config.json"]) / "config.json"))


def print_plan(args, tokens, slots=0, length=0):
    """The plan of one GPU, before anything is allocated; needs config.json only."""
    config = config_of(args.model)
    config.window, config.full_layers = as_window(args.window), tuple(args.full_layers or ())
    tokens = max(tokens, args.micro_tokens)
    plan = memory_plan(config, tokens, slots, length)
    print(f"{args.model}, window {args.window}, micro-batches of {tokens:,} tokens; computed\n\n"
          "| when | what | GB |\n|---|---|---:|")
    for phase, part, size in [*plan, ("", "peak: always + the larger phase", peak_bytes(plan))]:
        print(f"| {phase} | {part} | {size / 1e9:.2f} |")


def convert(args):
    """Stage 1: base -> SWA by SFT (or SA, with --window full); returns the folder, done already
    or now."""
    if args.window_from and args.window == "full":
        raise UsageError("--window-from shrinks towards a --window, and full has no size: "
                         "give a number of keys")
    folder = stage_folder(args, "sft")
    device = pick_device(args.device)
    base = pretrain_tiny(args) if args.model == "tiny" else args.model
    names = [*SETTINGS, "seed", "window_from", "full_layers", "nope_full"]
    settings = {k: getattr(args, k) for k in names if k not in ("save_every", "micro_tokens")}
    settings |= {"stage": "sft"}
    window = as_window(args.window)
    model = Transformer.from_pretrained(base, None, (), device, torch.float32)
    tokenizer, (train, held) = Tokenizer(model.tokenizer_files), sft_data(args)
    held = sft_rows(args, tokenizer, held)
    # SA, before a resume changes the weights
    teacher = held_out_loss(model, held, device, args.micro_tokens)
    model.config = replace(model.config, window=window, full_layers=tuple(args.full_layers or ()),
                           nope_full=args.nope_full)
    trainer = Trainer(model, folder, settings, device, micro_tokens=args.micro_tokens,
                      wandb=args.wandb)
    if trainer.done(args.steps):
        return folder
    trainer.begin()
    if held and trainer.step == 0:
        student = held_out_loss(model, held, device, args.micro_tokens)
        print(f"held-out loss before training: SA {teacher:.3f}, window {args.window} "
              f"{student:.3f} nats a token", flush=True)
    while trainer.step < args.steps:
        step, began = trainer.step, time.time()
        if args.window_from:  # shrink geometrically over the first half, then stay
            share = min(1.0, 2 * (step + 1) / args.steps)
            model.config.window = round(args.window_from * (window / args.window_from) ** share)
        rows = draw(train, step * args.batch, args.batch, [args.seed, 6])
        rows = sft_rows(args, tokenizer, rows)
        n_tokens = sum(t >= 0 for row in rows for t in row["targets"])
        total = [0.0]

        def loss_fn(logprobs, micro):
            loss = -logprobs.sum() / n_tokens
            total[0] += loss.item()
            return loss

        lr = schedule(step, args.steps, args.lr, args.warmup, "cosine")
        norm = trainer.update(rows[RANK::WORLD], loss_fn, lr)
        loss, seconds = all_sum(total, device)[0], time.time() - began
        tok_per_s = sum(len(r["tokens"]) for r in rows) / seconds
        record = {"loss": loss, "grad_norm": norm, "lr": lr, "window": model.config.window,
                  "tok_per_s": tok_per_s, "seconds": seconds}
        last = step + 1 == args.steps
        if held and ((step + 1) % args.eval_every == 0 or last):
            loss_now = held_out_loss(trainer.model, held, device, args.micro_tokens)
            record |= {"held_out": loss_now, "gap_to_teacher": loss_now - teacher}
        shown = (f" | held-out {record['held_out']:.3f} (SA {teacher:.3f})"
                 if "held_out" in record else "")
        trainer.log(record, f"sft w={args.window} step {step + 1}/{args.steps} | loss {loss:.3f}"
                            f"{shown} | norm {norm or float('nan'):.2f} | lr {lr:.1e} "
                            f"| {tok_per_s:,.0f} tok/s", every=0 if shown else 5)
        stop = trainer.agreed(trainer.stopping)
        if stop or last or trainer.step % args.save_every == 0:
            trainer.save(final=last)
        if stop and not last:
            raise KeyboardInterrupt
    if not trainer.done(args.steps):  # --steps 0: the window is set, nothing is trained
        trainer.save(final=True)
    return folder


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def parser():
    parser = FlagParser(description=__doc__.split("\n\n")[0])
    add_settings(parser, SETTINGS)
    return parser


def main():
    args = settle(parser().parse_args(), SETTINGS)
    if args.plan:
        return print_plan(args, args.max_length)
    if RANK == 0:
        print("settings:", json.dumps(vars(args)), flush=True)
    print(f"done: {convert(args)}")


if __name__ == "__main__":
    cli(main)
