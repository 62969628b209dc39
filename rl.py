"""Stage 2: on-policy RL under the window (GRPO), with a sympy answer checker as the reward.

SFT data are written for full attention and lean on what a window cannot see. RL trains the model on
its own trajectories instead, generated under the window it will be used with, so that it keeps the
ways of working that the window can carry. One step, with its shapes (P prompts, G answers each):

    prompts      P lists of ids, each repeated G times     Problems.rl, generate
    groups       P x G Episodes: tokens, log-probabilities, text, verdict, reward 0 or 1
    rewards      (P, G) -> advantages (P, G): each reward minus its group's mean
    rows         one an episode of each group that disagrees: tokens, targets (-1 under the
                 prompt), advantage, mask and the sampler's log-probabilities a token
    micro-batch  rows packed one after another: (1, T) tensors and cu_seqlens (N+1,)
    loss         log-probabilities (1, T) -> the surrogate, summed over T and micro-batches,
                 divided by the response tokens of the whole batch -> one optimizer step

In the order of the file: GRPO's mathematics, the RL loop, rollouts, validation and the recipe in
miniature, the settings and the command; then, under its own banner, the answer checker.

Left out on purpose: a reference model and KL, a value model, reward models, asynchronous rollouts.

    python rl.py --model tiny           # the whole recipe in miniature, on a CPU, in minutes
    python rl.py --window 4096          # DeepSeek-R1-Distill-Qwen-1.5B on one GPU
"""

import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import mpmath  # comes with sympy
import numpy as np
import sympy
import torch

from convert_sft import (
    COLORS,
    RANK,
    WORLD,
    Run,
    Settings,
    SFTSettings,
    all_sum,
    as_prompt,
    config_of,
    convert,
    duration,
    flags,
    make_row,
    markdown,
    new_figure,
    preflight,
    pretrain,
    print_plan,
    print_settings,
    prune,
    read_finished,
    read_log,
    save_figure,
    say_finished,
    schedule,
    seconds_each,
    setting,
    shakedown,
    that_fit,
    warn_of_reach,
    window_arg,
)
from model import (
    Rollout,
    Tokenizer,
    Transformer,
    UsageError,
    cli,
    fingerprint,
    generate,
    write_file,
)

# --------------------------------------------------------------------------------------------------
# GRPO


def group_advantages(rewards, std=False):
    """rewards (prompts, G) -> advantages (prompts, G): reward minus the group's mean (Dr. GRPO,
    arXiv 2503.20783); std=True also divides by the group's standard deviation (GRPO, arXiv
    2402.03300)."""
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    return advantages


def advantages_of(rewards, settings):
    """rewards (prompts, G) -> advantages (prompts, G), by the choice of --advantage. GRPO's is 0 in
    groups that agree; distillation's is a token's own, see token_advantages."""
    if settings.advantage == "filtered":
        return (rewards > 0).float()
    if settings.advantage == "distill":
        return torch.ones_like(rewards)
    return group_advantages(rewards, settings.adv_std) * informative(rewards)[:, None]


def token_advantages(micro, old_logprobs):
    """The advantages of a micro-batch, (1, T). With a teacher's log-probabilities: on-policy
    distillation (arXiv 2306.13649), whose reverse KL is smallest where each token's
    log p_teacher - log p is 0; clamped, since a single token of a lost teacher would decide."""
    if "teacher" not in micro:
        return micro["advantage"]
    return micro["advantage"] * (micro["teacher"] - old_logprobs).clamp(-5, 5)


def grpo_loss(logprobs, old_logprobs, advantages, mask, n_tokens, clip=(0.2, 0.28),
              rollout_logprobs=None, tis_cap=2.0):
    """The clipped surrogate (PPO), summed over tokens and divided by n_tokens (DAPO, arXiv
    2503.14476).

    All tensors have one shape, e.g. (1, T) packed; mask is 1 on response tokens. n_tokens counts
    the response tokens of the whole batch, over micro-batches and ranks. On the first update of a
    batch old_logprobs == logprobs, so the ratio is 1 and only its gradient is left.
    rollout_logprobs: what the sampler said; tokens are then weighted by
    min(p_old / p_rollout, tis_cap), truncated importance sampling against the mismatch of the bf16
    rollout copy.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if rollout_logprobs is not None:
        surrogate = surrogate * (old_logprobs - rollout_logprobs).exp().clamp(max=tis_cap)
    return -(surrogate * mask).sum() / n_tokens


def overlong_penalty(length, limit, buffer):
    """DAPO's soft penalty: 0 up to limit - buffer tokens, then linear to -1 at the limit."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0


# --------------------------------------------------------------------------------------------------
# the RL loop


def train_rl(settings, start, teacher=None):
    """GRPO, or what --advantage makes of it, from the model in folder `start`; teacher: the folder
    of SA-SFT, for distillation. Returns the run's folder, made now or before."""
    device = settings.start_device()
    models = {"start": start, "teacher": teacher, "sampler": settings.rollouts_by}
    run = Run(settings, identity=settings.identity() | {
        name: fingerprint(Path(folder)) for name, folder in models.items() if folder})
    if run.finished(settings.steps, settings.hours):
        return run.folder
    model = Transformer.from_pretrained(start, device=device, dtype=torch.float32)
    if model.config.window != settings.window:
        raise UsageError(f"{start} has window {model.config.window or 'full'}, not "
                         f"{settings.window or 'full'}: give its window, or another --out")
    tokenizer = Tokenizer(model.tokenizer_files)
    trainer = settings.trainer(model, device)
    policy = sampler = rollout_copy(trainer)
    if settings.rollouts_by:
        sampler, _ = open_model(settings.rollouts_by, settings)
    if teacher:
        teacher, _ = open_model(teacher, settings)

    run.start(trainer)
    if RANK == 0:
        prune(start)  # stage 1 is done: its optimizer's state, most of its size, may go
    if device.type == "cuda" and run.step == 0:
        shakedown(run, trainer, settings.micro_batch(), partial(expected_time, settings, policy))
    for step in run.steps(settings.steps, settings.hours):
        began = time.time()
        refresh(policy, trainer.model)
        with under(settings.rollout_window, sampler):
            groups = sample_groups(sampler, tokenizer, step, settings, device)
        rollout_seconds = time.time() - began

        rewards = rewards_of(groups, settings)  # (P, G)
        advantages = advantages_of(rewards, settings)
        rows = training_rows(groups, advantages)
        total = all_sum(count_up(groups, rewards, advantages), device)

        update_began = time.time()
        lr, norm = schedule(step, settings.steps, settings.lr, settings.warmup), 0.0
        measured = {"logp_gap": 0.0, "tokens": 0.0}
        # GRPO: groups that agree count, as answers without a gradient; those sampled again do not
        all_count = settings.advantage == "grpo" and not settings.min_informative
        n_tokens = total["tokens" if all_count else "useful_tokens"]
        if total["useful_tokens"]:
            norm = update_policy(trainer, rows, n_tokens, lr, settings, measured, teacher)
        measured = all_sum(measured, device)

        update_seconds, seconds = time.time() - update_began, time.time() - began
        record = record_of(total, measured, rollout_seconds, update_seconds, settings) | {
            "grad_norm": norm, "lr": lr, "seconds": seconds}
        shown = "" if total["useful_tokens"] else " | all agree"
        if settings.validate_every and (step + 1) % settings.validate_every == 0:
            with run.off_the_clock():
                record["validation"] = accuracy_now(policy, trainer, tokenizer, settings)
                run.keep_best(record["validation"])
            shown += f" | validation {record['validation']:.3f}"
        run.log(record, f"rl w={settings.window or 'full'} step {step + 1}/{settings.steps} | "
                        f"reward {record['reward']:.3f} | len {record['length']:.0f} | "
                        f"ent {record['entropy']:.2f} | norm {norm or 0:.3f} | lr {lr:.1e} | "
                        f"{seconds:.1f} s | {record['tok_per_s']:,.0f} tok/s{shown}")
        if step == 0:
            warn_of_reach([len(e.prompt) + len(e.tokens) for g in groups for e in g], settings)
        if RANK == 0:
            texts = [as_text(step, e, tokenizer) for e in (groups[0][0], groups[-1][-1])]
            run.write_text("episodes.txt", "".join(texts))
    if run.step and RANK == 0 and not any(r.get("useful_tokens") for r in run.records):
        print("warning: no group of answers ever disagreed, so nothing was learned: problems that "
              "are neither too easy nor too hard are needed", file=sys.stderr, flush=True)
    return run.finish()


def sample_groups(sampler, tokenizer, step, settings, device):
    """This rank's groups of a step; with --min-informative more of them (DAPO's dynamic sampling)
    until enough disagree. A function of the seed and the step, whatever the number of ranks."""
    groups = []
    for attempt in range(4):
        problems = settings.task.rl(settings, step, attempt)
        rng = np.random.default_rng([settings.seed, 9, step, attempt])
        seeds = rng.integers(2**62, size=(settings.prompts, settings.group))
        label = f"step {step + 1}: roll out" if RANK == 0 else None
        groups += roll_out(sampler, tokenizer, problems[RANK::WORLD], settings.group,
                           seeds[RANK::WORLD], settings.temperature, settings, label)
        found = informative(rewards_of(groups, settings)).sum()
        if all_sum({"informative": found}, device)["informative"] >= settings.min_informative:
            break
    return groups


def rewards_of(groups, settings):
    """(P, G): each episode's reward, less the soft penalty for length where it is asked for."""
    def reward(episode):
        return episode.reward + overlong_penalty(len(episode.tokens), settings.max_new_tokens,
                                                 settings.overlong_buffer)

    rewards = [reward(episode) for group in groups for episode in group]
    return torch.tensor(rewards).view(len(groups), settings.group)


def informative(rewards):
    """Which groups of rewards (P, G) disagree: only these carry a gradient."""
    return (rewards != rewards[:, :1]).any(-1)


def training_rows(groups, advantages):
    """A row an episode, in which every response token has the episode's advantage. Those of
    advantage 0 have no gradient: they are left out."""
    rows = []
    for group, advantage in zip(groups, advantages.tolist()):
        for episode, a in zip(group, advantage):
            n = len(episode.tokens)
            if a:
                rows.append(make_row(episode.prompt, episode.tokens, advantage=[a] * n,
                                     mask=[1.0] * n, rollout_logprobs=episode.logprobs))
    return rows


VERDICTS = "correct", "unparsed", "missing"


def count_up(groups, rewards, advantages):
    """What a step's record is made of, as sums: ranks add theirs up."""
    episodes = [episode for group in groups for episode in group]
    total = {
        "episodes": len(episodes), "groups": len(groups), "informative": informative(rewards).sum(),
        "reward": rewards.sum(), "solved": (rewards > 0).any(-1).sum(),
        "tokens": sum(len(e.tokens) for e in episodes),
        "useful_tokens": sum(len(e.tokens) for e, a in zip(episodes, advantages.flatten()) if a),
        "truncated": sum(not e.finished for e in episodes),
        "surprise": -sum(sum(e.logprobs) for e in episodes)}
    return total | {v: sum(e.verdict == v for e in episodes) for v in VERDICTS}


def record_of(total, measured, rollout_seconds, update_seconds, settings):
    """What log.jsonl says of a step."""
    return {
        "reward": total["reward"] / total["episodes"],
        f"pass@{settings.group}": total["solved"] / total["groups"],
        "length": total["tokens"] / total["episodes"],
        "truncated": total["truncated"] / total["episodes"],
        "entropy": total["surprise"] / total["tokens"],
        "logp_gap": measured["logp_gap"] / max(measured["tokens"], 1),
        **{name: total[name] for name in ("groups", "informative", "useful_tokens", *VERDICTS)},
        "tok_per_s": total["tokens"] / rollout_seconds, "rollout_seconds": rollout_seconds,
        "update_tok_per_s": measured["tokens"] / max(update_seconds, 1e-9),
        "update_seconds": update_seconds}


def update_policy(trainer, rows, n_tokens, lr, settings, measured, teacher=None):
    """The optimizer's steps on a batch of rows -> the last one's gradient norm; adds to `measured`
    the difference between the sampler's log-probabilities and the trained model's."""
    def loss_fn(logprobs, micro):
        old, sampled = micro.get("old_logprobs", logprobs.detach()), micro["rollout_logprobs"]
        gap = (logprobs.detach() - sampled).abs() * micro["mask"]
        measured["logp_gap"] += gap.sum().item()
        measured["tokens"] += micro["mask"].sum().item()
        weighted = settings.tis_cap and not settings.rollouts_by  # another's: plain likelihood
        return grpo_loss(logprobs, old, token_advantages(micro, old), micro["mask"], n_tokens,
                         rollout_logprobs=sampled if weighted else None, tis_cap=settings.tis_cap)

    if teacher:
        trainer.add_logprobs(rows, "teacher", settings.temperature, teacher)
    if settings.updates > 1:
        trainer.add_logprobs(rows, "old_logprobs", settings.temperature)
    for _ in range(settings.updates):
        norm = trainer.update(rows, loss_fn, lr, settings.temperature)
    return norm


def as_text(step, e, tokenizer):
    """An episode, to be read by people."""
    return (f"--- step {step + 1} | reward {e.reward:g} | {e.verdict} | {len(e.tokens)} tokens\n"
            f"{tokenizer.decode(e.prompt)}\n>>> {e.text}\n")


def accuracy_now(sampler, trainer, tokenizer, settings):
    """Accuracy at T=1 on the validation problems, which all ranks share out."""
    refresh(sampler, trainer.model)
    problems = settings.task.validation(settings.validate, settings.seed)
    seeds = 10**6 + settings.seed + np.arange(len(problems))  # those of validate()
    groups = roll_out(sampler, tokenizer, problems[RANK::WORLD], 1, seeds[RANK::WORLD], 1.0,
                      settings, "validate:" if RANK == 0 else None)
    total = {"right": sum(e.reward for e, in groups), "n": len(groups)}
    total = all_sum(total, trainer.device)
    return total["right"] / total["n"]


# --------------------------------------------------------------------------------------------------
# rollouts


@dataclass
class Episode(Rollout):
    """A rollout, its text, the checker's verdict on it and the reward."""

    text: str
    verdict: str
    reward: float


def roll_out(model, tokenizer, problems, samples, seeds, temperature, settings, label=None,
             **truncation):
    """Problems -> groups: for each a list of `samples` Episodes.

    seeds: an int, or (problems, samples) of them. settings: its instruction, max_new_tokens, slots
    and task, whose grader decides; a truncated response earns 0. truncation: top_p, top_k.
    """
    prompts = [as_prompt(tokenizer, p["problem"], settings.instruction) for p in problems]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    golds = [p["answer"] for p in problems for _ in range(samples)]
    seeds = seeds if isinstance(seeds, int) else seeds.flatten().tolist()
    rollouts = generate(model, prompts, settings.max_new_tokens, temperature, tokenizer.stop_ids,
                        settings.slots, seeds, n_ids=tokenizer.n_ids, progress=label, **truncation)
    texts = [tokenizer.decode(rollout.tokens) for rollout in rollouts]
    verdicts = grade_batch(texts, golds, settings.task.grade or grade)
    episodes = [Episode(**vars(rollout), text=text, verdict=verdict,
                        reward=float(verdict == "correct" and rollout.finished))
                for rollout, text, verdict in zip(rollouts, texts, verdicts)]
    return [episodes[i:i + samples] for i in range(0, len(episodes), samples)]


def rollout_copy(trainer):
    """The model that generates: on one CPU the trained one itself, else a full copy (bf16 on a
    GPU)."""
    if trainer.device.type == "cpu" and not trainer.sharded:
        return trainer.model
    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    with trainer.device:
        return Transformer(trainer.model.config).to(dtype)


def expected_time(settings, sampler, trainer, pace):
    """What RL will take at most, in words; sampler None: a copy of the trainer's, for now."""
    token = seconds_each(partial(fill_slots, sampler or rollout_copy(trainer), settings), 8, 72)
    update = settings.sequences() * settings.longest() * settings.updates * pace
    attempts, new = 4 if settings.min_informative else 1, settings.max_new_tokens
    most = settings.steps * attempts * (new * token + update)
    most = min(most, 3600 * settings.hours or math.inf)
    return f"RL at most about {duration(most)} (were all answers of {new:,} tokens)"


def fill_slots(sampler, settings, new):
    """The last tokens of a rollout in which all sequences are as long as they may be."""
    length = min(settings.longest(), sampler.config.max_position_embeddings)
    prompts = [[0] * (length - new)] * (-(-settings.prompts // WORLD) * settings.group)
    generate(sampler, prompts, new, slots=settings.slots)


@contextmanager
def under(window, model):
    """The model with another window, for a while; "own": with its own."""
    own = model.config.window
    model.config.window = own if window == "own" else window
    try:
        yield
    finally:
        model.config.window = own


@torch.no_grad()
def refresh(sampler, model):
    """The trained weights into the rollout copy; under FSDP every rank gathers, tensor by
    tensor."""
    if sampler is not model:
        for target, source in zip(sampler.parameters(), model.parameters()):
            target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


# --------------------------------------------------------------------------------------------------
# validation, and the whole recipe


def resample(scores, n=2000, seed=0, stream=0):
    """scores (P problems, R repeats) -> n bootstrap means: problems drawn by seed, repeats by
    (seed, stream).

    Two models with one seed and different streams thus draw the same problems: a paired bootstrap.
    """
    scores = np.asarray(scores, float)
    P, R = scores.shape
    problem = np.random.default_rng([seed, 0]).integers(P, size=(n, P))
    repeats = np.random.default_rng([seed, 1, stream])
    return sum(scores[problem, repeats.integers(R, size=(n, P))].mean(1) for _ in range(R)) / R


def interval(means, level=0.95, scores=()):
    """The percentiles of resampled means. Where all scores are 1, or 0, no resampling differs:
    there Clopper and Pearson's bound, the rate that would give it with a chance of 1 - level."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    if len(scores) and low == high and low in (0, 1):
        bound = (1 - level) ** (1 / len(scores))
        low, high = (bound, 1) if low else (0, 1 - bound)
    return [float(low), float(high)]


def bootstrap_ci(scores, level=0.95, seed=0):
    """scores (problems, repeats) -> (mean, low, high): percentile bootstrap over problems and,
    within each, repeats (the paper's intervals are over 8 to 32 repeats of a benchmark)."""
    return float(np.mean(scores)), *interval(resample(scores, seed=seed), level, scores)


SAMPLINGS = {"greedy": 0.0, "T=1": 1.0}  # name: temperature


def validate(folder, settings, window="own"):
    """Held-out accuracy of a stage's model, greedy and at T=1, kept in its folder ->
    {"greedy", "T=1"}: scores (n, 1), mean length in tokens, truncated share, entropy (nats an
    answer: mean -log p of what was sampled), an example, and what the task measures of a response.

    Greedy answers to equal prompts are equal: each prompt is then asked once. window: in place of
    the model's own."""
    name = "validation" + (f"-w{window or 'full'}" if window != "own" else "") + ".json"
    path, task = Path(folder) / name, settings.task
    of = {name: getattr(settings, name) for name in (
        "data", "validate", "max_new_tokens", "instruction", "seed")}
    of |= {"weights": fingerprint(folder), "samplings": SAMPLINGS, "measures": [*task.measures]}
    try:
        found = json.loads(path.read_bytes())
        if found["of"] == of and all(np.shape(found[name]["scores"])[1:] == (1,) and
                                     found[name]["entropy"] >= 0 for name in SAMPLINGS):
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # missing, or not what is written below
    model, tokenizer = open_model(folder, settings)
    found, problems = {"of": of}, task.validation(settings.validate, settings.seed)
    for name, temperature in SAMPLINGS.items():
        asked = problems if temperature else list({p["problem"]: p for p in problems}.values())
        with under(window, model):
            groups = roll_out(model, tokenizer, asked, 1, 10**6 + settings.seed, temperature,
                              settings, f"validate {name}:")
        episodes = [episode for episode, in groups]
        of_answer = {"length": lambda e: len(e.tokens), "truncated": lambda e: not e.finished,
                     "entropy": lambda e: -sum(e.logprobs),
                     **{m: lambda e, of_text=f: of_text(e.text) for m, f in task.measures.items()}}
        found[name] = {"scores": [[int(e.reward)] for e in episodes],
                       "example": [asked[0]["problem"], episodes[0].text],
                       **{m: float(np.mean([f(e) for e in episodes]))
                          for m, f in of_answer.items()}}
    write_file(path, lambda f: f.write_text(json.dumps(found)))
    return found


def open_model(folder, settings):
    """-> (model, tokenizer) to generate with, on a GPU in bfloat16 as the rollouts are."""
    device = settings.start_device()
    dtype = torch.bfloat16 if device.type == "cuda" else None
    model = Transformer.from_pretrained(folder, device=device, dtype=dtype)
    return model, Tokenizer(model.tokenizer_files)


def run_arm(settings):
    """Stage 1 if its checkpoint is missing, then stage 2; both validated -> {"sft": ..., "rl":
    ...}."""
    sft, teacher = stage1_folder(settings), None
    before = validate(sft, settings) if RANK == 0 else None
    if settings.advantage == "distill":
        teacher = stage1_folder(settings.full())
    rl = train_rl(settings, sft, teacher)
    return {"sft": before, "rl": validate(rl, settings) if RANK == 0 else None}


def stage1_folder(settings):
    """The folder of stage 1's model: made now, or before with what is asked for now. RL's data,
    disk and memory are looked at first: a fault would cost stage 1's hours."""
    device, folder = settings.start_device(), settings.folder("sft")
    made = (folder / "config.json").exists()
    leave_out_long(folder if made else settings.base(), settings)
    preflight(settings, device)
    if not made:
        return convert(settings.stage1, partial(expected_time, settings, None))
    if (folder / "run.json").exists():  # else the model was put there by hand
        (step, _, made_with), asked = read_finished(folder), settings.stage1
        identity = asked.identity() | {"base": fingerprint(asked.base())}
        differ = [name for name, value in identity.items()
                  if name in asked.given | {"base"} and made_with.get(name) != value]
        if differ:
            raise UsageError(f"{folder} was made with other settings ({', '.join(differ)}): give "
                             "the same ones, or another --out")
        say_finished(folder, step)
    return folder


def leave_out_long(start, settings):
    """From here on the task has only problems whose prompt leaves room for a whole response."""
    room = config_of(start).max_position_embeddings - settings.max_new_tokens
    tokenizer = Tokenizer.from_pretrained(start)

    def count(problem):
        return len(as_prompt(tokenizer, problem["problem"], settings.instruction))

    settings.task = settings.task.only(
        lambda problems: that_fit(problems, count, room, "lower --max-new-tokens"))
    settings.task.validation(1, settings.seed)  # too few to hold any out: said now


def tiny_recipe(settings):
    """Both arms, SA (full attention) and SWA, side by side in a process each; then the table and
    the picture."""
    began = time.time()
    if WORLD > 1:
        raise UsageError("--model tiny compares two arms in a process each: "
                         "start it without torchrun, or with --window full")
    pretrain(settings)
    full = settings.full()
    if settings.advantage == "distill":
        stage1_folder(full)  # the teacher of both
    # A fresh interpreter: a fork would copy threads that run
    process = multiprocessing.get_context("spawn").Process(target=other_arm, args=(full,))
    process.start()
    try:
        swa = run_arm(settings)
        process.join()
    except BaseException:
        process.terminate()  # as gently as Ctrl-C: it saves its step
        process.join()
        raise
    if process.exitcode:
        raise UsageError("the full-attention arm stopped early (see above): "
                         "the same command continues")
    found = {"SA": run_arm(full), "SWA": swa}  # the first is done, and only reports
    report(found, settings, time.time() - began)


def other_arm(settings):
    """The other process: it ends with the one that started it, however that ends."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    cli(lambda: run_arm(settings))


def report(found, settings, seconds):
    """found {"SA": {"sft", "rl"}, "SWA": ...}, or one of them -> the table, the picture, and one
    line of JSON."""
    folder, rows, summary, examples = settings.folder(), [], {}, []
    second = folder.name.split("-")[0]  # rl, or another choice of --advantage
    for arm, stages in found.items():
        for stage, name in (("sft", "sft"), ("rl", second)):
            result, row = stages[stage]["T=1"], {"model": f"{arm}-{name.upper()}"}
            for sampling in SAMPLINGS:
                mean, low, high = bootstrap_ci(stages[stage][sampling]["scores"])
                row[sampling] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            rows.append(row | {"length": f"{result['length']:.1f}",
                               "truncated": f"{result['truncated']:.3f}",
                               "entropy": f"{result['entropy']:.2f}",
                               **{m: f"{result[m]:.2f}" for m in settings.task.measures}})
            summary[f"{arm.lower()}_{name}"] = float(np.mean(result["scores"]))
            problem, text = result["example"]
            verdict = "right" if result["scores"][0][0] else "wrong"
            examples.append(f"{row['model']:>11} {verdict}  {shortened(text)}")
    n, n_greedy = (len(stages["sft"][sampling]["scores"]) for sampling in ("T=1", "greedy"))
    print(f"\nheld-out accuracy, n = {n}{f' (greedy {n_greedy})' if n_greedy < n else ''}, 95 % "
          f"intervals, window {settings.window or 'full'}, seed {settings.seed}; entropy in nats "
          "an answer\n")
    print("\n".join([*markdown(rows), "", f"one answer of each at T=1 to {shortened(problem)}",
                     *examples]))
    picture = folder.parent / f"recipe-{folder.name.removeprefix('rl-')}.png"
    draw_recipe(picture, found, settings, second)
    print(f"\nmodel: {folder}, picture: {picture}")
    print(json.dumps({**summary, "seconds": round(seconds, 1), "seed": settings.seed,
                      "window": settings.window, "n": n}))


def shortened(text, most=90):
    """A text on one line, without its middle where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def draw_recipe(path, found, settings, second):
    """Accuracy at T=1 after SFT and after RL; by problem size, where problems have one; reward over
    RL steps."""
    sizes = settings.task.size and np.array([
        settings.task.size(p["problem"])
        for p in settings.task.validation(settings.validate, settings.seed)])
    figure = new_figure(11 if sizes is not None else 8, 3.2)
    bars, *by_size, curves = figure.subplots(1, 2 + (sizes is not None))
    labels = {"SA": "SA (full attention)", "SWA": f"SWA (window {settings.window})"}
    for i, (arm, stages) in enumerate(found.items()):
        scores = {stage: np.array(stages[stage]["T=1"]["scores"]) for stage in stages}
        mean, low, high = np.array([bootstrap_ci(scores[stage]) for stage in ("sft", "rl")]).T
        at, color = np.arange(2) + 0.4 * i - 0.2, COLORS[arm]
        bars.bar(at, mean, 0.38, yerr=(mean - low, high - mean), capsize=3, color=color,
                 label=labels[arm])
        for x, value, top in zip(at, mean, high):
            bars.text(x, top + 0.02, f"{value:.2f}", ha="center", fontsize=8)
        for axis in by_size:
            for stage, look in (("sft", {"ls": "--", "mfc": "white"}), ("rl", {})):
                axis.plot(np.unique(sizes), [scores[stage][sizes == size].mean()
                                             for size in np.unique(sizes)],
                          color=color, marker="o", ms=4, **look)
        log = read_log((settings if arm == "SWA" else settings.full()).folder())
        if log:
            steps, rewards = zip(*((r["step"], r["reward"]) for r in log))
            curves.plot(steps, rewards, color=color)
    n = len(scores["rl"])
    bars.set(xticks=[0, 1], xticklabels=["after SFT", f"after {second.upper()}"], ylim=(0, 1.35),
             ylabel=f"accuracy at T=1 (n={n})", yticks=np.arange(0, 1.1, 0.2))
    bars.legend(loc="upper left", fontsize=8, frameon=False)
    for axis in by_size:
        axis.set(xlabel="size of the problem", ylim=(-0.03, 1.05), ylabel="accuracy at T=1")
        axis.set_title("dashed: after SFT", fontsize=8)
    curves.set(xlabel="step", ylabel="mean reward of a step", ylim=(0, 1.05))
    figure.suptitle(f"{path.parent.name}, seed {settings.seed}, 95 % intervals", fontsize=9)
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# the command, and its settings


def own_or_window(text):
    return text if text == "own" else window_arg(text)


@dataclass
class RLSettings(Settings):
    """Stage 2; the settings of stage 1 that it shares go to stage 1 as well."""

    stage = "rl"
    data: str = setting("BytedTsinghua-SIA/DAPO-Math-17k", "JSONL file or hub id[:config[:split]]")
    sft_data: str | None = setting(None, "data of stage 1: its own default, or a JSONL file in "
                                         "--data", free=True)
    sft_steps: int | None = setting(None, "steps of stage 1, which runs if its checkpoint is "
                                          "missing: its own default", least=0, free=True)
    steps: int = setting(500, "RL steps, one rollout batch each", least=0, free=True)
    hours: float = setting(0.0, "stop after these hours of the run, 0: no limit (for equal-time "
                                "comparisons)", least=0, free=True)
    prompts: int = setting(32, "prompts a step")
    group: int = setting(8, "answers sampled for each prompt, G")
    max_new_tokens: int = setting(8192, "tokens of a response; a truncated one earns 0")
    lr: float = setting(1e-6, "learning rate, constant after warm-up")
    warmup: int = setting(5, "steps of linear warm-up", least=0)
    temperature: float = setting(1.0, "of sampling and of the policy that is trained; no top-k or "
                                      "top-p", least=0)
    updates: int = setting(1, "optimizer updates a rollout batch; the clip wakes above 1")
    advantage: str = setting("grpo", "what an answer's tokens are worth: grpo, reward minus the "
                                     "group's mean; filtered, 1 if it is right, else 0 (filtered "
                                     "on-policy SFT); distill, log p_teacher - log p, the teacher "
                                     "being SA-SFT (on-policy distillation)",
                             choices=["grpo", "filtered", "distill"])
    rollouts_by: str | None = setting(None, "train on the answers of the model in this folder: "
                                            "off-policy, a control")
    rollout_window: int | None | str = setting("own", "sample under this window: a control",
                                               type=own_or_window)
    adv_std: bool = setting(False, "divide advantages by the group's standard deviation")
    min_informative: int = setting(0, "sample up to 3 times more until so many groups disagree",
                                   least=0)
    overlong_buffer: int = setting(0, "tokens before the limit in which a soft penalty grows",
                                   least=0)
    tis_cap: float = setting(2.0, "truncated importance sampling, against the difference between a "
                                  "bfloat16 sampler and the trained policy; 0: off", least=0)
    validate: int = setting(128, "held-out problems for the accuracy before, during and after RL",
                            free=True)
    validate_every: int = setting(50, "steps between validations, of which the best model is kept "
                                      "in best/; 0: none", least=0, free=True)
    slots: int | None = setting(None, "sequences that run at a time: what free memory holds",
                                free=True)

    @classmethod
    def of(cls, **given):
        settings = super().of(**given)
        if settings.sft_data is None and Path(settings.data).is_file():
            settings.sft_data = settings.data
        return settings

    def folder(self, stage=None):
        """Of RL, or of another choice of --advantage under its name."""
        return super().folder(stage or ("rl" if self.advantage == "grpo" else self.advantage))

    def full(self):
        """The same for the SA arm."""
        return self.but(window=None, window_from=None)

    @property
    def other_models(self):
        """How many models there are besides the trained one and its rollout copy."""
        return (self.advantage == "distill") + bool(self.rollouts_by)

    def longest(self, prompt=1024):
        """Tokens of the longest sequence: a response and a prompt's share."""
        return self.max_new_tokens + prompt

    def sequences(self):
        """Of a step."""
        return self.prompts * self.group

    def most_slots(self):
        return self.slots or self.sequences()

    def check(self):
        super().check()
        for wrong, sentence in (
                (self.group < 2, f"--group {self.group}: one answer has nothing to be compared "
                                 "with; give at least 2"),
                (self.temperature == 0, "--temperature 0: greedy answers are all the same, and "
                                        "nothing is learned; give a number above 0"),
                (self.min_informative > 4 * self.prompts,
                 f"--min-informative {self.min_informative}: a step samples at most 4 times "
                 f"--prompts {self.prompts}; give at most {4 * self.prompts}")):
            if wrong:
                raise UsageError(sentence)

    @cached_property
    def stage1(self):
        """The settings of stage 1 that belong to these."""
        ours = {f.name: f.name for f in fields(Settings)} | {"steps": "sft_steps",
                                                             "data": "sft_data"}
        values = {name: getattr(self, own) for name, own in ours.items()}
        for name in ("steps", "data"):
            if values[name] is None:
                del values[name]
        settings = SFTSettings.of(**values)
        settings.given = frozenset(name for name, own in ours.items() if own in self.given)
        settings.data_flag = "--sft-data"
        return settings


def parser():
    return flags(RLSettings, __doc__.split("\n\n")[0])


def main():
    settings = RLSettings.of(**vars(parser().parse_args()))
    if settings.plan:
        return print_plan(settings)
    print_settings(settings)
    if settings.tiny:
        settings.task.validation(1, settings.seed)  # a fault in the data is told before all else
    if settings.tiny and settings.window:
        return tiny_recipe(settings)
    began = time.time()
    found = {"SWA" if settings.window else "SA": run_arm(settings)}
    if RANK == 0:
        report(found, settings, time.time() - began)


# --------------------------------------------------------------------------------------------------
# the answer checker
#
# Is the final answer of a response the gold one? This is the reward and every benchmark's grader:
#
#     extract_answer   the answer's text within the response
#     _tokenize        one spelling for everything that is written in several ways
#     Parser           tokens -> a value: a sympy expression, or a Node of values
#     _same            whether two values are equal
#     grade            the verdict
#
# Equal: mathematically equal in any form, for all numbers where both sides are defined and real.
# Units, degree, percent and currency signs and nouns are optional on one side. Lists without
# brackets have no order. x = 5 equals 5, f(x) = 2x equals 2x, x > 2 equals (2, \infty), \pm is two
# values, 3:4 is a fraction, 12:30 a time of day, log is natural. In a floor, i to n are integers.
# Not equal: rounded values, 0.5 for 50%, other brackets, another base subscript, another unit or
# noun, a missing or an extra value. What the grammar does not know (sums, integrals, limits, words
# among formulas) is compared as a string, in which only words may differ in case.
#
# Model output is hostile, so the work is bounded by construction, not by signals (they fail off the
# main thread): nothing is evaluated as code, text and numbers are bounded before work on them
# starts, and sympy only holds the trees. It never simplifies, which has no time limit; mpmath
# evaluates both sides at a few points instead.

MAX_ANSWER = 1200           # characters
MAX_TOKENS, MAX_DEPTH, MAX_BENDS = 400, 40, 20
MAX_ITEMS, MAX_FORMULAS = 40, 16    # of a list; each is compared with each of the other list
MAX_BITS = 2**15            # of an exact number, and of the exponent of an evaluated one
MP = mpmath.MPContext()     # our own: threads that share mpmath.mp change each other's precision
MP.dps = 100                # equal means 75 of these digits; the rest pays for cancellation


class Refused(Exception):
    """Syntax outside the grammar, or a value too large to build."""


# Extraction: the answer's text
#
# Responses box what they found on the way, put a box into a box, stop within one at the token
# limit, or box nothing. Only the last boxes count, and the search for a closing brace is capped: a
# degenerate response holds a million opening ones.

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.S)       # the first branch steps over \{ and \}
PHRASE = re.compile(
    r"####|\banswers?\b\W{0,4}(?:[^.:=\n]{0,60}?\b(?:is|are)\b|[:=\n])[\s:*_]*", re.I)
FORMULA = r"\$+([^$\n]{1,300})\$+|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]"
NUMERAL = r"(?<![\w.])-?\\?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:[/:][0-9]+)?|-?\.[0-9]+"
FOUND = re.compile(rf"{FORMULA}|({NUMERAL})", re.S)
SENTENCE_END = re.compile(r"\.(?:\s|$)|,? (?:because|since|which|so) ")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def extract_answer(text: str) -> str | None:
    """The answer in a response, or None.

    The outermost of the last three \\boxed or \\fbox; one that is empty or never closes is no
    answer. Without a box: what follows the last "####" or "answer is"; else a response that is
    a bare expression; else the last formula in dollar signs or number.
    """
    if not isinstance(text, str):
        return None
    if boxes := _last_boxes(text):
        _, answer = max(boxes)          # of nested boxes, the outer one ends last
        inner = len(BOX.findall(answer))
        if inner == 1 and WORD.search(BOX.sub("", answer)):     # a boxed sentence around a box
            return extract_answer(answer)
        return answer or None

    tail = text[-4000:].strip(" \n\t*")
    if phrases := list(PHRASE.finditer(tail)):
        return _in_sentence(tail[phrases[-1].end():])
    words = WORD.findall(tail[:300])
    if len(tail) < 300 and (not words or words == [tail]):
        return tail or None
    for groups in reversed(FOUND.findall(tail[-1000:])):
        found = "".join(groups).strip(" ,")
        if re.search("[0-9]", found):
            return found
    return None


def _last_boxes(text):
    """(end, content) of the last three boxes."""
    boxes, at = [], len(text)
    while len(boxes) < 3:       # a response may hold a million of them
        at = max(text.rfind(command, 0, at) for command in ("\\boxed", "\\fbox"))
        if at < 0:
            break
        boxes.append(_box(text, at))
    return boxes


def _box(text, start):
    """(end, content) of the box that starts here; (-1, "") if it is empty or does not close."""
    opening = BOX.match(text, start)
    if not opening:
        return -1, ""
    depth = 0
    for sign in BRACE.finditer(text, opening.end() - 1, start + 2 * MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            content = text[opening.end():sign.start()].strip()
            return (sign.end(), content) if content else (-1, "")
    return -1, ""


def _in_sentence(text):
    """The answer in what follows "the answer is": its one formula, or all of it."""
    line = text.strip().split("\n")[0]
    line = SENTENCE_END.split(line)[0].strip(" *")
    found = FOUND.findall(line)
    if len(found) == 1:
        *formulas, numeral = found[0]
        if not numeral or len(WORD.findall(line)) > 2:      # "3 red" is more than its number
            return "".join([*formulas, numeral]).strip()
    return line or None


# Tokens: one spelling for each sign
#
# Characters are translated, REWRITES run in order, units and nouns are taken out, TOKEN cuts what
# is left and TOKEN_OF respells it. In between, a word (of \text, or letters that are no product)
# stands in double quotes: by them, later steps tell the unit "in" from i * n. So a raw text with
# double quotes is refused.

SPELLINGS = {
    "": r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle"
        r" \quad \qquad \mathbf \boldsymbol \mathit \mathcal \mathsf \bold \bf \rm \boxed"
        r" \fbox \underline \large \Large \small",
    "-": "− – — ‐", "*": r"\cdot \times \ast × · ⋅ ∗ ∙", "/": r"\div ÷ ∕ ⁄ per", "^": "**",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant \leqq <= ⩽ ≦", "≠": r"\ne \neq !=",
    "≥": r"\ge \geq \geqslant \geqq >= ⩾ ≧", "≈": r"\approx ≃ ≅", "=": "==", ":": r"to \colon",
    "±": r"\pm", "∓": r"\mp", "∈": r"\in", "∪": r"\cup \bigcup", "∩": r"\cap", ",": "; or",
    "∖": r"\setminus \backslash", "|": r"\lvert \rvert \vert \mid \|", "∧": r"and \land \wedge",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "⟨": r"\langle",
    "⟩": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", r"\infty": "∞ infinity inf",
    r"\frac": r"\dfrac \tfrac \cfrac \sfrac \over", r"\binom": r"\dbinom \tbinom \choose",
    r"\sqrt": "√ sqrt", r"\emptyset": r"\varnothing ∅", r"\pi": "π pi", r"\theta": "θ",
    r"\alpha": "α", r"\beta": "β", r"\lambda": "λ", r"\phi": r"φ \varphi",
    **{"\\" + name: name for name in (
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp").split()},
}
TOKEN_OF = {alias: token for token, aliases in SPELLINGS.items() for alias in aliases.split()}

UNITS = r"""
cm centimeter centimetre, m meter metre, mm millimeter millimetre, km kilometer kilometre,
in inch inche, ft foot feet, yd yard, mi mile, s sec second, min minute, h hr hour, day, wk week,
month mo, yr year, am, pm, g gram, kg kilogram kilo, mg milligram, lb pound, oz ounce,
l liter litre, ml milliliter millilitre, unit, $ \$ dollar usd, ¢ cent, € euro eur, £ gbp, ¥, ₹,
% \% percent, rad radian"""
UNIT_OF = {alias: names.split()[0] for names in UNITS.split(",") for alias in names.split()}

BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11,
             twelve=12)
CHARACTERS = str.maketrans({
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
    "⅕": r"\frac15 ", "⅛": r"\frac18 ", "∛": r"\sqrt[3]"})


def _upright(match):
    """A word of \\text{...}: the sign that it spells, or in quotes."""
    word = match[0]
    return TOKEN_OF.get(word.lower(), word if word in ("i", "e") else f'"{word}"')


def _text(match):
    """\\text{...}, its words in quotes."""
    return re.sub(r"(?<![\\A-Za-z])[A-Za-z]+", _upright, f" {match[1]} ")


SHORT_WORDS = {"yes", "no", "odd", "red", "sq", "cu"}       # xyz is a product, blue a word
COUNTED = re.compile(r"(?:[0-9})/]|\b(?:sq|square|cu|cubic|per))\s*$")


def _letters(match):
    """A run of letters outside \\text: a word, or a product like xy."""
    word, lower, before = match[0], match[0].lower(), match.string[:match.start()]
    unit = lower.rstrip("s") in UNIT_OF
    if unit and len(word) == 2:             # the cm of 5 cm, but not of am + cm
        unit = COUNTED.search(before[-9:])
    name = len(word) == 3 and (word.istitle() or word.isupper())
    known = unit or name or lower in TOKEN_OF or lower in SHORT_WORDS
    return _upright(match) if known or len(word) > 3 else word


def _mixed(match):
    """1\\frac{4}{5} and 1 4/5 are sums, 2\\frac{5}{3} is a product."""
    whole, top, bottom = (part.strip("}") for part in match.groups() if part)
    proper = len(top) <= len(bottom) < 10 and int(top) < int(bottom)
    return f"({whole}{'+' if proper else '*'}{top}/{bottom})"


def _matrix(match):
    """A matrix is a row of rows."""
    rows = match[1].replace("\\\\", "⟧,⟦")
    return f"⟦⟦{rows}⟧⟧".replace("&", ",")


class Rewrite(NamedTuple):
    """A step towards one spelling: in `before`, its pattern and replacement alone give `after`."""

    name: str
    before: str
    after: str
    pattern: str
    replacement: str | Callable


REWRITES = [Rewrite(*row) for row in [  # in this order: later rows expect what earlier ones write
    ("limits", r"\sum\limits_{n}", r"\sum_{n}", r"\\limits(?![a-z])", ""),
    ("color", r"\color{red}7", "7", r"\\(?:text)?color\s*\{\w*\}", ""),
    ("row distance", r"1\\[4pt]2", r"1\\2", r"\\\\\s*\[-?[0-9.]+[a-z]{2}\]", r"\\\\"),
    ("spaced colon", r"4{:}30", "4:30",
     r"(?:\\[!,]\s*)*(?:\{:\}|(?<!\\):)(?:\s*\\[!,])*", ":"),
    ("mph", "60 mph", "60 miles per hour", r"\bmph\b", "miles per hour"),
    ("a.m.", "9 a.m.", "9 am", r"\b([aApP])\.\s?([mM])\b\.?", r"\1\2"),
    ("abbreviation", "5 ft. 2", "5 ft 2", r"\b(sq|cu|ft|in|hrs?|lbs?|oz|yd|mi)\.", r"\1"),
    ("text", r"5\text{ cats}", '5  "cats" ',
     r"\\(?:text\w*|mathrm|mbox|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", _text),
    ("word", "blue or xy", '"blue" , xy', r'(?<![\\A-Za-z"])[A-Za-z]{2,}(?!["A-Za-z])',
     _letters),
    ("square", '5 "square" "feet"', '5 "feet"^2', r'"(?:sq|square)"\s*("[a-z]+")', r"\1^2"),
    ("cubic", '5 "cu" "ft"', '5 "ft"^3', r'"(?:cu|cubic)"\s*("[a-z]+")', r"\1^3"),
    ("thousand", '5 "thousand"', "5*10^3", r'\s*"thousand"', "*10^3"),
    ("million", '5 "million"', "5*10^6", r'\s*"million"', "*10^6"),
    ("billion", '5 "billion"', "5*10^9", r'\s*"billion"', "*10^9"),
    ("over", r"{a\over b}", r"\over{a}{ b}",
     r"\{([^{}]*)(\\over|\\choose)\b([^{}]*)\}", r"\2{\1}{\3}"),
    ("degree", r"20^{\circ}", "20° ",
     r'(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\s*"degrees?"|°)', "° "),
    ("temperature", '20°  "C"', '20 "C"', r'°\s*"?([CF])\b"?', r' "\1"'),
    ("hours and minutes", '2 "hours" ∧ 5 "min"', '2 "hours" 5 "min"',
     r'("(?:day|hour|hr|minute|min|feet|foot|ft)s?")\s*∧', r"\1"),
    ("thousands", r"10,\!080 + 1{,}000", "10080 + 1000",
     r"(?<=[0-9])(?:,\\!|\{,\}|\\[, ]|\s)\s*(?=[0-9]{3}(?![0-9/]))", ""),
    ("scientific", "1.2 x 10^5", "1.2*10^5", r"(?<=[0-9])\s*x\s*(?=10\s*\^)", "*"),
    ("mixed number", r"1\frac{4}{5}", "(1+4/5)",
     r"(?<![\w^.])([0-9]+)\s*\\[dt]?frac\s*\{?([0-9](?:[0-9]*\})?)\}?"
     r"\s*\{?([0-9](?:[0-9]*\})?)\}?", _mixed),
    ("mixed number in a line", "1 4/5", "(1+4/5)",
     r"(?<![\w^.])([0-9]+)\s+([0-9]+)/([0-9]+)", _mixed),
    ("base in words", '52_{"eight"}', "52_8", r'(?<=_)\s*\{?\s*"?([a-z]+)"?\s*\}?',
     lambda match: f"{BASES.get(match[1], match[0])}"),
    ("number with a base", "{52}_8", "52_8", r"[({]([0-9A-F]+)[)}]_", r"\1_"),
    ("real numbers", r"\mathbb{R}", "ℝ", r"\\mathbb\s*\{?R\}?|\\R\b", "ℝ"),
    ("matrix", r'\begin{"pmatrix"}1&2\\3&4\end{"pmatrix"}', "⟦⟦1,2⟧,⟦3,4⟧⟧",
     r'\\begin\s*\{"(?:small|[pb])?(?:matrix|array)"\}(?:\{[clr|"]*\})?(.*?)(?:\\\\\s*)?'
     r'\\end\s*\{"\w+"\}', _matrix),
    ("decimal logarithm", r"\lg x", r"\log_{10} x", r"\\lg\b", r"\\log_{10}"),
    ("not equal", r"x\not=1", "x≠1", r"\\not\s*=", "≠"),
    ("empty braces", "{}5", "5", r"\{\}", ""),
    ("leading sign", "= 5", "5", r"^[\s=:]+", ""),
    ("final stop", "5. ", "5", r"[\s.,;:\\]+$", ""),
    ("choice", "A)", "A", r"(?<=^[A-J])\)$", ""),
]]
COMPILED = [(re.compile(rewrite.pattern), rewrite.replacement) for rewrite in REWRITES]

# Longest first: what stands higher would be cut to pieces by what stands lower.
SUB = r"(?:_(?:\w|\{[^{}]*\}))?'*"      # of a name: x_1, x_{12}, x'
TOKEN = re.compile(rf"""
    \s | [~$] | \\[\s,!;:>()\[\]]                                       # space
    | ( (?<![0-9:])[0-9]{{1,2}}:[0-5][0-9](?![0-9:])                    # 12:30
      | (?<![0-9],)[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?(?![0-9]|,[0-9])
      | [0-9][0-9A-F.]*_(?:\w|\{{[^{{}}]*\}})                           # 52_8 stays a name
      | [0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{{?[0-9]+\}}?           # 0.1\overline{{6}}
      | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?
      | (?<![\\A-Za-z])[A-Za-z]{SUB}(?:\^\{{-1\}})?\([\w,"]+\)(?=\s*=)  # f(x) =
      | (?<![\\A-Za-z])[A-Z]+(?=\s*=)                                  # AB =
      | m?\\(?:vec|hat|overline|mathbb|angle|triangle)
        (?:\s*\{{?\s*"?[A-Za-z](?:_\{{?\w\}}?)?"?\s*\}}?)+
      | (?:"[^"]*"\s*)*"[^"]{{2,}}"(?:\s*"[^"]*")* | "[^"]*"             # words
      | \\\\ | \\log | \\[A-Za-z]+{SUB} | \\. | [A-Za-z]{SUB} | [<>!=]= | \*\* | . )
    """, re.X | re.S)
# cm, /cm, cm^2, km/h; but "in total" is no inch
UNIT = re.compile(rf"""(?:/\s*|\\cdot\s*)?
    (?:[€£¢¥₹%]|\\[$%]|(?!"in"\s*")"(?:{'|'.join(filter(str.isalpha, UNIT_OF))})s?")
    (?:\s*\^\s*\{{?\s*-?[0-9]\s*\}}?)?(?:\s*/\s*[hsm]\b)?""", re.X | re.I)
NOUNS = re.compile(         # what follows a number: 42 apples
    r'^(?=.*[0-9])((?:[A-Za-z]\s*=)?(?:\\[A-Za-z]+|\\[^A-Za-z]|[^A-Za-z"\\])*)'
    r'((?:\s*"(?:[A-Z]|[A-Za-z]{2,})")+)\s*$', re.S)


def _respell(text):
    """The text after all rewrites, bounded before them."""
    if len(text) > MAX_ANSWER or '"' in text:       # quotes are ours
        raise Refused
    text = text.translate(CHARACTERS)
    for pattern, replacement in COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _split_units(text):
    """(the text without its units and nouns, the units in one spelling, the stems of the nouns)."""
    units, nouns = [], ""
    for unit in UNIT.findall(text):
        unit = re.sub(r'[\s{}"]', "", unit.lower())
        units.append(re.sub(r"[a-z]+|\\?[$%]", _unit, unit))
    text = UNIT.sub(" ", text)
    if counted := NOUNS.match(text):
        text, nouns = counted.groups()
    return text, sorted(units), {_stem(_fold(noun)) for noun in re.findall("[A-Za-z]+", nouns)}


def _fold(word):
    """Monday, monday and MONDAY are one word, but mW is not MW, nor N n."""
    usual = word[1:].islower() or len(word) > 2 and word.isupper()
    return word.lower() if usual or word.lower() in SHORT_WORDS else word


def _stem(noun):
    """One stem for box and boxes, city and cities, pie and pies."""
    return re.sub("e?(?<!s)s$|e$", "", re.sub("ies?$", "y", noun))


def _unit(match):
    """One name for cm, centimeter and centimeters."""
    alias = match[0]
    return UNIT_OF.get(alias) or UNIT_OF.get(alias.rstrip("s"), alias)


def _tokenize(text):
    """Tokens of a text after _respell and _split_units."""
    tokens, depth = [], 0
    for token in filter(None, TOKEN.findall(text)):
        token = TOKEN_OF.get(token, token)
        if token.startswith('"'):
            token = re.sub("[A-Za-z]+", lambda word: _fold(word[0]), token)
            token = token[1] if len(token) == 3 else token      # \text{A} is A
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if token[:1].isdigit() and "," in token:        # 1,234 is a number, but (1,234) a pair
            tokens += re.split("(,)", token) if depth > 0 else [token.replace(",", "")]
        elif token:
            tokens.append(token)
    if len(tokens) > MAX_TOKENS:
        raise Refused
    return tokens


def _plain(text):
    """The string to compare where there is no value; a list without brackets has no order."""
    try:
        tokens = _tokenize(text)
    except Refused:
        return text
    plain = re.sub(r"\{ ?(\w+) ?\}", r"\1", " ".join(tokens))      # ^{N} is ^N
    ordered = set(tokens) & {"(", "[", "\\{"}
    return plain if ordered else " , ".join(sorted(plain.split(" , ")))


# Values: exact rationals, trees that are never simplified, or Nodes of these
#
# Floats would make 2^53 + 1 equal 2^53 and 1e400 equal 1e500, so numbers are rationals, and the
# size of a power or factorial is known before it is built. All else is built with evaluate=False:
# otherwise sympy's constructors expand, factor and root without a limit of time or memory.


class Node(NamedTuple):
    """What is more than one number: a list, set, interval, relation, region, ratio, matrix."""

    kind: str       # "," list, "{}" set, "(]" interval, "<" relation, "∪" region, ":", "⟦⟧", ...
    items: tuple

    @property
    def free_symbols(self):     # as sympy's
        return set().union(*(item.free_symbols for item in self.items))


ONE, TWO = sympy.Integer(1), sympy.Integer(2)
REALS = sympy.Symbol("ℝ")
CONSTANTS = {"\\pi": sympy.pi, "e": sympy.E, "i": sympy.I, "\\infty": sympy.oo,
             "\\emptyset": Node("{}", ())}
FUNCTIONS = {
    "\\arcsin": sympy.asin, "\\arccos": sympy.acos, "\\arctan": sympy.atan, "\\ln": sympy.log,
    **{"\\" + name: getattr(sympy, name)
       for name in "sin cos tan cot sec csc sinh cosh tanh exp log".split()}}


def _kind(value):
    """"scalar" for what has no kind of its own."""
    return value.kind if isinstance(value, Node) else "scalar"


def _bits(number):
    """The size of a rational; 1 for a tree, which costs nothing until it is evaluated."""
    return max(number.p.bit_length(), number.q.bit_length()) if number.is_Rational else 1


def _apply(function, *args):
    """function(*args): exact where that is a rational of bounded size, else a tree."""
    if not all(isinstance(arg, sympy.Expr) for arg in args):
        raise Refused
    a, b = args[0], args[-1]
    exact = False
    if function in (sympy.Add, sympy.Mul):
        exact = a.is_Number and b.is_Number
    elif function is sympy.Pow:         # its size is known before it is built
        exact = a.is_Rational and b.is_Integer and abs(b) * _bits(a) <= MAX_BITS
    elif function is sympy.factorial:
        exact = a.is_Integer and 0 <= a <= 3000
    value = function(*args) if exact else function(*args, evaluate=False)
    if value in (sympy.nan, sympy.zoo) or _bits(value) > MAX_BITS:
        raise Refused
    return value


def _times(a, b):
    """a * b; a matrix times a number is the matrix of the products."""
    for one, other in ((a, b), (b, a)):
        if _kind(one) == "⟦⟧" and not isinstance(other, Node):
            return Node("⟦⟧", tuple(_times(item, other) for item in one.items))
    return _apply(sympy.Mul, a, b)


def _plus(a, b):
    return _apply(sympy.Add, a, b)


def _minus(a, b):
    return _plus(a, _times(b, -ONE))


def _divide(a, b):
    return _times(a, _apply(sympy.Pow, b, -ONE))


def _binomial(n, k):
    """By factorials, whose size _apply bounds."""
    below = _times(_apply(sympy.factorial, k), _apply(sympy.factorial, _minus(n, k)))
    return _divide(_apply(sympy.factorial, n), below)


def _number(text):
    """The exact rational of 12, 1.5, 1.5e3 or 0.1\\overline{6}."""
    text, _, repeating = text.partition("\\")
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(text) > 400 or len(exponent) > 5:
        raise Refused
    scale = 10 ** len(decimals)
    value = sympy.Rational(int(whole + decimals or 0), scale)
    if repeating := re.sub("[^0-9]", "", repeating):
        nines = 10 ** len(repeating) - 1
        value += sympy.Rational(int(repeating), nines * scale)
    return _times(value, _apply(sympy.Pow, sympy.Integer(10), sympy.Integer(exponent or 0)))


def _collect(items, together=False):
    """A list; or one region, where conditions hold together: x > 2 and x < 5; x ≠ 0, x ≠ 1."""
    if len(items) == 1:
        return items[0]
    conditions = all(_kind(item) in "<≤≠∩" for item in items)
    both = conditions and (together or any(map(_excludes, items)))
    return Node("∩" if both else ",", tuple(items))


def _excludes(value):
    """x ≠ 0, or x ≠ 0 with further conditions."""
    return _kind(value) == "≠" or _kind(value) == "∩" and any(map(_excludes, value.items))


def _join(kind, a, b):
    """a ∪ b; a : b, and a : b : c as one ratio."""
    before = a.items if kind == _kind(a) == ":" else (a,)
    return Node(kind, (*before, b))


# The parser: tokens -> a value
#
#     listing     relation {"," relation}
#     relation    expression {"<" expression}
#     expression  prefix {operator expression}, a missing operator being a product
#     prefix      number, name, sign expression, "(" listing ")", \frac, \sqrt, \sin ...
#
# What does not fit is Refused, and then strings decide: a guess would accept what it misread.

NAME = re.compile(r"""[A-Za-zℝ](?![A-Za-z]).*|[A-Z]+|[0-9][\w.]*[_:].*|"[^"]*".*|m?\\(?:vec|hat
    |overline|mathbb|angle|triangle|ell|(?:var)?epsilon|[Tt]heta|[Ll]ambda|[Gg]amma|[Dd]elta
    |[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega|alpha|beta|zeta|eta|kappa|mu|nu|xi|rho|tau|chi)(?![a-z]).*""",
    re.X | re.S)
RELATIONS, TURNED = "=≈∈≠<≤>≥", {">": "<", "≥": "≤"}       # 2 > x is x < 2
OPERATORS = {   # binding power, meaning
    "∪": (2, partial(_join, "∪")), "∩": (2, partial(_join, "∩")), "∖": (2, partial(_join, "∖")),
    ":": (3, partial(_join, ":")), "+": (4, _plus), "-": (4, _minus), "*": (5, _times),
    "/": (5, _divide), "^": (7, partial(_apply, sympy.Pow))}
DIGITS = tuple(".0123456789")
PRODUCT, SIGN = 5, 6        # the binding powers of 2x and of -x
CLOSING = {"(": ")]", "[": "])", "\\{": ["\\}"], "{": "}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩", "|": "|",
           "⟦": "⟧"}
ROUND = {"|": sympy.Abs, "⌊": sympy.floor, "⌈": sympy.ceiling}


class Parser:
    """Operator-precedence parser over one answer's tokens."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, "", ""], 0, 0
        self.number_end = 0     # where the last number ended that is no argument of a command
        self.in_bars = False    # whether a bar closes |...| or opens it
        self.in_angle = False   # whether a degree sign converts to radians or is a unit,
        self.degrees = False    # and whether there was one that is a unit

    @property
    def next(self):
        return self.tokens[self.at]

    def accept(self, wanted):
        """The next token, stepped over, if it is among those wanted; else ""."""
        token = self.next
        if not token or token not in wanted:
            return ""
        self.at += 1
        return token

    def listing(self):
        """A value, or the values between commas as one Node."""
        items, joints = [self.relation()], set()
        while joint := self.accept(",∧"):
            joints.add(self.accept("∧") or joint)       # "a, and b"
            items.append(self.relation())
        if len(items) > (MAX_FORMULAS if Node(",", items).free_symbols else MAX_ITEMS):
            raise Refused
        for k in range(1, len(items)):      # x ≠ 0, 1 is x ≠ 0, x ≠ 1
            if _kind(items[k - 1]) == "≠" and _kind(items[k]) == "scalar":
                items[k] = Node("≠", (items[k - 1].items[0], items[k]))
        return _collect(items, joints == {"∧"})

    def relation(self):
        """a < b < c is two relations, a = b = c is a = c, and 10/3 ≈ 3.33 is 10/3."""
        sides, signs = [self.expression()], []
        while sign := self.accept(RELATIONS):
            signs.append(sign)
            sides.append(self.expression())
        if "≈" in signs:        # x ≈ 3.33 is x = 3.33
            keep = signs.index("≈") or int(getattr(sides[0], "is_Symbol", False))
            signs, sides = ["="] * keep, sides[:keep + 1]
        if not signs:
            return sides[0]
        if set(signs) == {"="}:
            return Node("=", (sides[0], sides[-1]))
        links = []
        for sign, (left, right) in zip(signs, itertools.pairwise(sides), strict=True):
            pair = (right, left) if sign in TURNED else (left, right)
            links.append(Node(TURNED.get(sign, sign), pair))
        return links[0] if len(links) == 1 else Node("∩", tuple(links))

    def expression(self, floor=0):
        """Factors joined by all operators that bind more tightly than floor."""
        left = self.prefix()
        while True:
            if self.accept("!"):
                if self.next == "!":        # n!! is not (n!)!
                    raise Refused
                left = _apply(sympy.factorial, left)
                continue
            if self.accept("°"):        # sin(30°) is 1/2, but an angle of 30° is the number 30
                self.degrees |= not self.in_angle
                left = _times(left, sympy.pi / 180) if self.in_angle else left
                continue
            implicit = (PRODUCT, _times) if self.starts_factor() else (0, None)
            power, build = OPERATORS.get(self.next, implicit)
            if power <= floor:
                return left
            operator = self.accept(OPERATORS)
            if not operator:
                self.check_product()
            left = build(left, self.expression(power - (operator == "^")))      # 2^3^2 = 2^9
            if operator == "^":
                self.number_end = 0

    def starts_factor(self):
        """Whether the next token can begin the second factor of a product like 2x or 2(x + 1)."""
        token = self.next
        if token == "|":
            return not self.in_bars
        return token in CLOSING or token[:1].isalnum() or (
            token[:1] in (".", "\\") and token != "\\}")

    def check_product(self):
        """2 3 is not 6, nor is x 3 a product, but n2^n is n * 2^n."""
        before, token, after = self.tokens[self.at - 1:self.at + 2]
        power = after == "^" and self.at != self.number_end
        if token.startswith(DIGITS) and before not in (")", "!") and not power:
            raise Refused

    def prefix(self):
        """A factor: number, name, bracket, function, with its sign."""
        token = self.next
        self.at += 1
        if token in ("+", "-"):         # -x^2 is -(x^2)
            return _times(self.expression(SIGN), -ONE if token == "-" else ONE)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in CLOSING:
            return self.group(token)
        if token in FUNCTIONS:
            return self.call(token)
        if token in ("\\frac", "\\binom"):
            a, b = self.argument(), self.argument()
            return _divide(a, b) if token == "\\frac" else _binomial(a, b)
        if token == "\\sqrt":
            index = self.group("[") if self.accept("[") else TWO
            radicand = self.prefix()
            self.number_end = 0
            return _apply(sympy.Pow, radicand, _divide(ONE, index))
        if NAME.fullmatch(token):
            return sympy.Symbol(re.sub(r'[{}"\s]|^0(?=[0-9]:)', "", token))
        if token.startswith(DIGITS):
            self.number_end = self.at
            return _number(token)
        raise Refused

    def argument(self):
        """What \\frac takes: a group or a token, of a number one digit: \\frac12."""
        token = self.next
        if not token.isdigit():
            return self.prefix()
        self.tokens[self.at] = token[1:]
        self.at += len(token) == 1
        return _number(token[0])

    def group(self, opening):
        """What stands between an opening bracket, already read, and its closing one."""
        outer = self.in_bars
        self.in_bars, self.depth = opening == "|", self.depth + 1
        if opening == "\\{" and self.tokens[self.at + 1] in ("|", ":"):     # {x : x > 2}
            self.at += 2
        empty = opening == "\\{" and self.next == "\\}"
        value = Node(",", ()) if empty else self.listing()
        closing = self.accept(CLOSING[opening])
        if not closing or self.depth > MAX_DEPTH:
            raise Refused
        self.in_bars, self.depth = outer, self.depth - 1

        if opening in ROUND:
            return _apply(ROUND[opening], value)
        pair = (opening + closing).replace("\\", "")
        if _kind(value) == ",":
            return Node(pair, value.items)
        if opening in ("\\{", "⟦") and _kind(value) not in "<≤≠∩":
            return Node(pair, (value,))
        if pair not in ("()", "[]", "{}"):
            raise Refused
        return value

    def call(self, name):
        """\\sin^2 x, \\log_2 8, \\cos 2x: up to the next function, bracket or sign."""
        base = self.argument() if self.accept("_") else None
        exponent = self.expression(SIGN) if self.accept("^") else ONE
        if exponent == -1 and "\\arc" + name[1:] in FUNCTIONS:      # \sin^{-1}
            name, exponent = "\\arc" + name[1:], ONE
        outer, self.in_angle = self.in_angle, True
        if self.next in CLOSING:
            x = self.prefix()
        else:
            x = self.expression(SIGN)
            while self.starts_factor() and self.next not in (*FUNCTIONS, *CLOSING):
                x = _times(x, self.expression(SIGN))
        if self.accept("°"):
            x = _times(x, sympy.pi / 180)
        self.in_angle = outer
        value = _apply(FUNCTIONS[name], x)
        if base is not None:
            value = _divide(value, _apply(sympy.log, base))
        return value if exponent == 1 else _apply(sympy.Pow, value, exponent)


def _readings(tokens):
    """The tokens with either sign for each \\pm; a \\mp runs against all of them."""
    count = 1 if "∓" in tokens else tokens.count("±")
    if count > 2:
        raise Refused
    for signs in itertools.product("+-", repeat=count):
        plus_minus = itertools.cycle(signs)
        minus_plus = "-" if signs[:1] == ("+",) else "+"
        yield [next(plus_minus) if token == "±" else minus_plus if token == "∓" else token
               for token in tokens]


class Parsed(NamedTuple):
    """An answer, ready to be compared."""

    value: sympy.Expr | Node | None     # None: outside the grammar, and then
    units: list
    nouns: set
    plain: str | None                   # a string is compared instead


@lru_cache(512)     # the gold answer stands beside a whole group of responses
def _parse(answer):
    """An answer's text -> Parsed; never raises."""
    text, values = answer, []
    try:
        text = _respell(answer)
        bare, units, nouns = _split_units(text)
        for reading in _readings(_tokenize(bare)):
            parser = Parser(reading)
            values.append(parser.listing())
            if parser.next:
                raise Refused
            if parser.degrees and not units:
                units = ["°"]
    except Exception:   # Refused, or whatever sympy raises on what it was given
        return Parsed(None, [], set(), _plain(text) or answer)
    return Parsed(_both_signs(values), units, nouns, None)


def _both_signs(values):
    """The values of all readings as one list, or one set: 1 ± 2 is the list 3, -1."""
    if len(values) == 1:
        return values[0]
    items = list(dict.fromkeys(item for value in values for item in _items(value)))
    return Node("{}", tuple(items)) if _kind(values[0]) == "{}" else _collect(items)


def _items(value):
    """The members of a list or set; any other value is its own only one."""
    return value.items if _kind(value) in (",", "{}") else (value,)


# Comparison: are two values equal?
#
# simplify() has no time limit and knows too little; two formulas that agree to 75 digits at
# scattered points are equal. Relations are compared by their two sides, or by the numbers that
# satisfy them.

TINY = MP.mpf(10) ** -40
COSTLY = {getattr(sympy, name): getattr(MP, name) for name in (     # for large arguments
    "sin cos tan cot sec csc sinh cosh tanh exp factorial").split()}
NUMERIC = {     # what a tree may hold besides rationals and symbols, and how it is evaluated
    sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1),
    sympy.Add: lambda *terms: sum(terms), sympy.Mul: lambda *factors: math.prod(factors),
    sympy.Pow: lambda x, y: x ** y, sympy.Abs: abs, sympy.log: MP.log, sympy.asin: MP.asin,
    sympy.acos: MP.acos, sympy.atan: MP.atan, **COSTLY,
    sympy.floor: lambda x: MP.floor(x + TINY),      # ln 8 / ln 2 is 2.999...
    sympy.ceiling: lambda x: MP.ceil(x - TINY)}


def _evaluate(expr, point):
    """expr at a point {symbol: value}, to 100 digits.

    Refused where a number gets too large: e^{e^{e^{10}}} would fill the memory with its exponent,
    and sin(9^{9999}) would need that many digits of pi.
    """
    if expr.is_Rational:
        return MP.mpf(expr.p) / expr.q
    if expr in point:
        return MP.mpf(point[expr])
    if expr in NUMERIC:
        return NUMERIC[expr]
    if not expr.args:
        raise Refused   # an infinity
    values = [_evaluate(arg, point) for arg in expr.args]
    x = values[0]
    if expr.is_Pow:
        exponent = expr.exp
        if x and abs(values[1]) * (abs(MP.mag(x)) + 1) > MAX_BITS:
            raise Refused
        if exponent.is_Rational and exponent.q % 2 and isinstance(x, MP.mpf) and x < 0:
            return (-1) ** (exponent.p % 2) * (-x) ** values[1]     # cube roots are real
    elif expr.func in COSTLY and abs(x) > 10**5:
        raise Refused
    value = NUMERIC[expr.func](*values)
    if not MP.isfinite(value) or value and MP.mag(value) > MAX_BITS:
        raise Refused
    return value


def _nodes(*exprs):
    """The expressions and all their parts."""
    nodes = list(exprs)
    for node in nodes:      # grows meanwhile: trees may be deeper than Python's stack
        nodes.extend(node.args)
    return set(nodes)


ROUNDING = {sympy.floor, sympy.ceiling}
BRANCHING = {sympy.Abs, sympy.log, sympy.asin, sympy.acos, sympy.atan, *ROUNDING}


def _branches(node):
    """Whether it may agree with something else here and differ there, as |x| with x."""
    root = node.is_Pow and not node.exp.is_Integer and node.base.free_symbols
    return root or node.func in BRANCHING and node.free_symbols


def _points(a, b):
    """Points {symbol: value} that tell two different expressions apart.

    Without branches (polynomials, sin, e^x), what agrees at a scattered point agrees everywhere.
    Others get several sign patterns, near zero, near one and beyond their largest number, exponents
    that make a root, integers and fractions where a floor jumps, and both sides of each bend.
    """
    nodes = _nodes(a, b)
    symbols = sorted((node for node in nodes if node.is_Symbol), key=str)
    if not symbols:
        return [{}]
    if not any(map(_branches, nodes)):
        return _scattered(symbols, [(1, 2)])[:2]
    rounded = {node.args[0] for node in nodes if node.func in ROUNDING}
    integers = _aligned(symbols, range(1, 30)) if rounded else []
    counting = all(str(symbol) in "ijklmn" for symbol in symbols)
    if rounded and counting and not rounded & set(symbols):     # floor(n) says that n is no integer
        return integers

    numbers = [node for node in nodes if node.is_Rational]
    size = int(min(10 + max(map(abs, numbers), default=0), 1000))
    ranges = [(1, 2), (size, 2 * size), (0, size), (0, 1)]
    points = _scattered(symbols, ranges + ranges) + integers
    if any(node.is_Pow and node.exp.free_symbols for node in nodes):    # (x^2)^{1/2} is not x
        for values in itertools.permutations((-1.5, 0.5, 2, 3), min(3, len(symbols))):
            points.append(dict(zip(symbols, itertools.cycle(values))))
    if rounded:
        step = min(math.lcm(*(number.q for number in numbers)), 12)
        points += _aligned(symbols, [MP.mpf(n) / step for n in range(-12, 13)])
    if len(symbols) == 1:
        with suppress(Refused):         # |x - 3| + |x - 4| is |2x - 7|, but for 3 < x < 4
            points += _aligned(symbols, _places(_bends(a) | _bends(b)))
    return points


def _scattered(symbols, ranges):
    """Per range of absolute values: all symbols positive, one negative, all negative; at most 12.

    Every set of symbols has a product that is negative at some of these points.
    """
    signs = dict.fromkeys([(), *zip(symbols), tuple(symbols)])
    points = []
    for (low, high), negative in itertools.islice(itertools.product(ranges, signs), 12):
        point = {}
        for k, symbol in enumerate(symbols):
            # powers modulo a prime: in a regular pattern, x - 1 = f(x) and n + 1 = k held by chance
            share = MP.mpf(pow(11, 9 * k + len(points) + 8, 1009)) / 1009
            value = low + (high - low) * share
            point[symbol] = -value if symbol in negative else value
        points.append(point)
    return points


def _aligned(symbols, values):
    """A point for each value, that of the first symbol; the others follow at distances of 3."""
    return [{symbol: value + 3 * k for k, symbol in enumerate(symbols)} for value in values]


def _values(a, b):
    """Yields the values of two expressions where both are defined and real: 2 ln x is ln x^2.

    Complex values count where there are hardly any real ones.
    """
    n_real, complex_pairs = 0, []
    for point in _points(a, b):
        try:
            pair = _evaluate(a, point), _evaluate(b, point)
        except (ArithmeticError, ValueError):       # a pole
            continue
        except Refused:     # too large: excused far from zero, not already at the first points
            if n_real or complex_pairs:
                continue
            raise
        if all(isinstance(value, MP.mpf) for value in pair):    # i * i is no mpf, but an mpc of -1
            n_real += 1
            yield pair
        else:
            complex_pairs.append(pair)
    if n_real < 2:
        yield from complex_pairs
    if not n_real and not complex_pairs:
        raise Refused


def _close(a, b):
    """Equal to 75 digits: of the larger one, or absolutely where one is zero."""
    scale = max(abs(a), abs(b), int(a == 0 or b == 0))
    return abs(a - b) <= scale * MP.mpf(10) ** -75


def _equal(a, b):
    """Scalars: exactly where both are rational, else to 75 digits."""
    if a == b or a.is_Number and b.is_Number or {a, b} & {sympy.oo, -sympy.oo}:
        return a == b       # inf <= inf * tolerance is true: infinities never get to the digits
    return all(_close(x, y) for x, y in _values(a, b))


def _proportional(a, b):
    """Relations: left minus right side in a constant proportion, for < and ≤ a positive one."""
    n_values, x0, y0 = 0, 0, 0
    for x, y in _values(_minus(*a.items), _minus(*b.items)):
        n_values += 1
        if not x0:
            x0, y0 = x, y
        if bool(x) != bool(y) or not _close(x * y0, y * x0):
            return False
    if n_values < 2 or not x0:
        return False
    return a.kind not in "<≤" or MP.im(x0 / y0) == 0 and MP.re(x0 / y0) > 0


INFINITE = {sympy.oo: MP.inf, -sympy.oo: -MP.inf}
COMBINE = {"∪": any, ",": any, "∩": all, "∖": lambda inside: inside[0] and not inside[1]}


class Region(NamedTuple):
    """A set of reals. Between two neighbouring ends membership does not change."""

    symbols: set
    ends: set
    contains: Callable


def _region(node):
    """The Region of an interval, a set, a union, a linear inequality ...; else Refused."""
    kind, items = node if isinstance(node, Node) else ("scalar", ())
    if node == REALS:
        return Region(set(), set(), lambda x: True)
    if kind in ("()", "(]", "[)", "[]", "{}"):
        return _interval(kind, items)
    if kind == "∈":
        name, region = items
        return _region(region)._replace(symbols={name})
    if kind in COMBINE and (kind != "," or all(_kind(item) in "<≤≠∩" for item in items)):
        symbols, ends, tests = zip(*map(_region, items), strict=True)
        return Region(set().union(*symbols), set().union(*ends),
                      lambda x: COMBINE[kind]([test(x) for test in tests]))
    if kind in ("<", "≤", "≠"):
        return _solutions(kind, _minus(*items))
    raise Refused


def _interval(kind, items):
    ends = [INFINITE[x] if x in INFINITE else _end(_evaluate(x, {})) for x in items]
    if kind == "{}":
        return Region(set(), set(ends), lambda x: x in ends)
    if len(ends) != 2:      # (1, 2, 3) is a tuple
        raise Refused
    low, high = ends
    closed = {end for end, bracket in zip(ends, kind, strict=True) if bracket in "[]"}
    if low >= high or closed & {MP.inf, -MP.inf}:
        raise Refused
    return Region(set(), set(ends), lambda x: low < x < high or x in closed)


def _end(value):
    """An end of a region, rounded so that equal ones are identical."""
    if isinstance(value, MP.mpc):
        raise Refused
    return MP.nint(value * 10**50) / 10**50


def _solutions(kind, difference):
    """Where a piecewise linear difference is < 0, ≤ 0 or ≠ 0."""
    symbols = difference.free_symbols
    if len(symbols) != 1:
        raise Refused

    def contains(x):
        value = _evaluate(difference, dict.fromkeys(symbols, x))
        if abs(value) < TINY:
            return kind == "≤"
        return kind == "≠" or value < 0
    return Region(symbols, _roots(difference), contains)


def _bends(expr):
    """Where a piecewise linear expression in one symbol bends; Refused if it is something else."""
    moving = [arg for arg in expr.args if arg.free_symbols]
    if not moving:
        return set()
    if expr.is_Add or expr.is_Mul and len(moving) == 1:
        return set().union(*map(_bends, moving))
    if isinstance(expr, sympy.Abs):
        return _roots(expr.args[0])
    if expr.is_Pow and expr.exp == ONE / 2 and expr.base.is_Pow and expr.base.exp == 2:
        return _roots(expr.base.base)       # sqrt(x^2) is |x|
    raise Refused


def _roots(expr):
    """The bends of a piecewise linear expression, and where its pieces, prolonged, are zero."""
    bends, symbols = _bends(expr), expr.free_symbols
    if len(bends) > MAX_BENDS:
        raise Refused
    roots = set(bends)
    values = [(x, _evaluate(expr, dict.fromkeys(symbols, x))) for x in _places(bends)]
    for (x0, y0), (x1, y1) in itertools.pairwise(values):
        if y0 != y1:
            roots.add(_end(x0 - y0 * (x1 - x0) / (y1 - y0)))
    return roots


def _places(ends):
    """The ends, a place between any two neighbours and two beyond them all."""
    ends = sorted(end for end in {MP.zero, *ends} if not MP.isinf(end))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    return sorted([ends[0] - 1, *ends, *middles, ends[-1] + 1])


def _same_region(a, b):
    """Membership agrees at each end, between two ends and beyond them."""
    a, b = _region(a), _region(b)
    if len(a.symbols | b.symbols) > 1:
        raise Refused
    return all(a.contains(x) == b.contains(x) for x in _places(a.ends | b.ends))


def _bare(node):
    """A value without its label: x = 5 is 5, x \\in \\{1, 2\\} the set, 3:4 a fraction."""
    if not isinstance(node, Node) or len(node.items) != 2:
        return node
    left, right = node.items
    if node.kind == "=":
        names = left.items if _kind(left) == "()" else (left,)
        if all(getattr(name, "is_Symbol", False) for name in names) or not left.free_symbols:
            return right
        return left if getattr(right, "is_Symbol", False) else node
    if node.kind == "∈" and _kind(right) == "{}":
        return right
    return _divide(left, right) if node.kind == ":" else node


def _matched(items, others, repeats):
    """Each item equals one of the others; where repeats count, each a different one."""
    others = list(others)
    for item in items:
        partner = next((k for k, other in enumerate(others) if _same(item, other)), None)
        if partner is None:
            return False
        if repeats:
            del others[partner]
    return not (repeats and others)


# Kinds of which two different ones may hold the same numbers: x > 2, (2, oo), R \ (-oo, 2]
REGIONS = set("∪∩∖∈<≤≠")


def _same(a, b):
    """Whether two parsed values are equal; the policy is at the top of this section."""
    if _kind(a) != _kind(b):
        a, b = _bare(a), _bare(b)
    kind, kinds = _kind(a), {_kind(a), _kind(b)}
    if kinds == {"scalar"}:
        return _equal(a, b)
    if kinds & REGIONS:
        return _same_relation(a, b)
    if "{}" in kinds:       # {1, 1} is {1}
        items, others = _items(a), _items(b)
        return _matched(items, others, False) and _matched(others, items, False)
    if "," in kinds:        # 1, 1 has two values
        return _matched(_items(a), _items(b), True)
    if len(kinds) > 1:      # (-oo, oo) is R
        return _same_relation(a, b)
    if kind == "=" and not any(isinstance(side, Node) for side in a.items + b.items):
        return _proportional(a, b)
    if kind == ":":         # 2:4 is 1:2
        a, b = (Node("()", tuple(_divide(x, v.items[0]) for x in v.items)) for v in (a, b))
    return len(a.items) == len(b.items) and all(map(_same, a.items, b.items))


def _same_relation(a, b):
    """Regions by their members; what is not linear, or in two symbols, by its two sides."""
    try:
        return _same_region(a, b)
    except Refused:
        kind = _kind(a)
        if kind != _kind(b) or kind in "∪∖∈":
            return False
        if kind == "∩":
            return _matched(a.items, b.items, True)
        return _proportional(a, b)


def _same_unit(a, b):
    """Optional on one side; 5 red apples are 5 apples, but neither 5 pears nor 5 cm."""
    if not (a.units or a.nouns) or not (b.units or b.nouns):
        return True
    return a.units == b.units and (a.nouns <= b.nouns or b.nouns <= a.nouns)


# The verdict
#
# Only "correct" earns the reward; the others are told apart in the log. Many "unparsed" mean that
# the grammar lacks something, many "missing" that responses end before their answer.

CHOICE = re.compile(        # (C) 42
    r"(?:\\text\w*\s*\{\s*)?\(([A-J])\)\s*\}?(?:\\[ ,;]|[\s:.])*(?=[^\s}])"
    r"(?!.*\([A-J]\))(.+)", re.S)
LETTER = re.compile(r"\W*(?:text\w*)?\W*[A-J]\W*")


def grade(response, gold) -> str:
    """The verdict on a response (text, boxed or not) beside a gold answer (text, usually LaTeX).

    "correct"; "wrong"; "unparsed": it differs, but only strings could be compared; "missing": no
    answer or no gold. Total: any two objects, in bounded time, nothing of them evaluated as code.
    """
    answer = extract_answer(response)
    if not answer or not isinstance(gold, str) or not gold.strip():
        return "missing"
    if "\\boxed" in gold or "####" in gold:
        gold = extract_answer(gold) or gold
    if len(answer) <= MAX_ANSWER and answer.strip() == gold.strip():
        return "correct"
    if choice := CHOICE.match(answer):      # (C) 42 answers both C and 42
        letter, content = choice.groups()
        answer = letter if LETTER.fullmatch(gold) else content.strip(" }")
    ours, theirs = _parse(answer), _parse(gold)
    if ours.value is None or theirs.value is None:
        return "correct" if ours.plain == theirs.plain else "unparsed"
    try:
        same = _same_unit(ours, theirs) and _same(ours.value, theirs.value)
        return "correct" if same else "wrong"
    except Exception:   # a pole, or a number too large to evaluate
        return "unparsed"


def is_correct(response, gold) -> bool:
    """The reward: whether the response's final answer equals the gold one. Never raises."""
    return grade(response, gold) == "correct"


def grade_batch(responses, golds, grader=grade) -> list[str]:
    """The verdict of each response on its gold answer; ValueError where the lengths differ."""
    return [grader(*pair) for pair in zip(responses, golds, strict=True)]


if __name__ == "__main__":
    cli(main)
