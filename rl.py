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
miniature, the command; then, under its own banner, the answer checker.

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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
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
    Trainer,
    all_sum,
    as_prompt,
    convert,
    flags,
    make_row,
    markdown,
    new_figure,
    pretrain,
    print_plan,
    print_settings,
    read_log,
    save_figure,
    schedule,
    setting,
)
from model import Rollout, Tokenizer, Transformer, UsageError, cli, generate, read_json, write_file


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
    adv_std: bool = setting(False, "divide advantages by the group's standard deviation")
    min_informative: int = setting(0, "sample up to 3 times more until so many groups disagree",
                                   least=0)
    overlong_buffer: int = setting(0, "tokens before the limit in which a soft penalty grows",
                                   least=0)
    tis_cap: float = setting(0.0, "truncated importance sampling, such as 2; 0: off", least=0)
    validate: int = setting(128, "held-out problems for the accuracy before and after RL",
                            free=True)
    slots: int | None = setting(None, "sequences that run at a time: what free memory holds",
                                free=True)

    @classmethod
    def of(cls, **given):
        if Path(given.get("data", "")).is_file():
            given = {"sft_data": given["data"]} | given
        return super().of(**given)

    def stage1(self):
        """The settings of stage 1 that belong to these."""
        own = {"steps": self.sft_steps, "data": self.sft_data}
        shared = {f.name: getattr(self, f.name) for f in fields(Settings)}
        return SFTSettings.of(**shared, **{k: v for k, v in own.items() if v is not None})


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


def train_rl(settings, start):
    """GRPO from the model in folder `start`; returns the run's folder, made now or before."""
    device = settings.start_device()
    run = Run(settings)
    if run.finished(settings.steps, settings.hours):
        return run.folder
    model = Transformer.from_pretrained(start, device=device, dtype=torch.float32)
    if model.config.window != settings.window:
        raise UsageError(f"{start} has window {model.config.window or 'full'}, not "
                         f"{settings.window or 'full'}: give its window, or another --out")
    tokenizer = Tokenizer(model.tokenizer_files)
    trainer = Trainer(model, device, settings.micro_tokens)
    sampler = rollout_copy(trainer)

    run.start(trainer)
    for step in run.steps(settings.steps, settings.hours):
        began = time.time()
        refresh(sampler, trainer.model)
        groups = sample_groups(sampler, tokenizer, step, settings, device)
        rollout_seconds = time.time() - began

        rewards = rewards_of(groups, settings)  # (P, G)
        advantages = group_advantages(rewards, settings.adv_std)
        rows = training_rows(groups, rewards, advantages)
        total = all_sum(count_up(groups, rewards), device)

        update_began = time.time()
        lr, norm = schedule(step, settings.steps, settings.lr, settings.warmup), 0.0
        measured = {"logp_gap": 0.0, "tokens": 0.0}
        if total["informative"]:
            norm = update_policy(trainer, rows, total["tokens"], lr, settings, measured)
        measured = all_sum(measured, device)

        update_seconds, seconds = time.time() - update_began, time.time() - began
        record = {
            "reward": total["reward"] / total["episodes"],
            f"pass@{settings.group}": total["solved"] / total["groups"],
            "length": total["tokens"] / total["episodes"],
            "truncated": total["truncated"] / total["episodes"],
            "entropy": total["surprise"] / total["tokens"],
            "logp_gap": measured["logp_gap"] / max(measured["tokens"], 1),
            "grad_norm": norm, "lr": lr,
            **{name: total[name] for name in ("groups", "informative", *VERDICTS)},
            "tok_per_s": total["tokens"] / rollout_seconds,
            "update_tok_per_s": measured["tokens"] / max(update_seconds, 1e-9),
            "rollout_seconds": rollout_seconds, "update_seconds": update_seconds,
            "seconds": seconds}
        run.log(record, f"rl w={settings.window or 'full'} step {step + 1}/{settings.steps} | "
                        f"reward {record['reward']:.3f} | len {record['length']:.0f} | "
                        f"ent {record['entropy']:.2f} | norm {norm or 0:.3f} | lr {lr:.1e} | "
                        f"{seconds:.1f} s | {record['tok_per_s']:,.0f} tok/s"
                        + " | all agree" * (not total["informative"]))
        if RANK == 0:
            show_episodes(run.folder, step, (groups[0][0], groups[-1][-1]), tokenizer)
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


def training_rows(groups, rewards, advantages):
    """A row an episode, in which every response token has the episode's advantage. Groups that
    agree have advantage 0 throughout: they are left out, but their tokens still count."""
    rows = []
    for group, advantage, useful in zip(groups, advantages.tolist(), informative(rewards)):
        for episode, a in zip(group, advantage):
            n = len(episode.tokens)
            if useful:
                rows.append(make_row(episode.prompt, episode.tokens, advantage=[a] * n,
                                     mask=[1.0] * n, rollout_logprobs=episode.logprobs))
    return rows


VERDICTS = "correct", "unparsed", "missing"


def count_up(groups, rewards):
    """What a step's record is made of, as sums: ranks add theirs up."""
    episodes = [episode for group in groups for episode in group]
    total = {
        "episodes": len(episodes), "groups": len(groups), "informative": informative(rewards).sum(),
        "reward": rewards.sum(), "solved": (rewards > 0).any(-1).sum(),
        "tokens": sum(len(e.tokens) for e in episodes),
        "truncated": sum(not e.finished for e in episodes),
        "surprise": -sum(sum(e.logprobs) for e in episodes)}
    return total | {v: sum(e.verdict == v for e in episodes) for v in VERDICTS}


def update_policy(trainer, rows, n_tokens, lr, settings, measured):
    """The optimizer's steps on a batch of rows -> the last one's gradient norm; adds to `measured`
    the difference between the sampler's log-probabilities and the trained model's."""
    def loss_fn(logprobs, micro):
        old, sampled = micro.get("old_logprobs", logprobs.detach()), micro["rollout_logprobs"]
        gap = (logprobs.detach() - sampled).abs() * micro["mask"]
        measured["logp_gap"] += gap.sum().item()
        measured["tokens"] += micro["mask"].sum().item()
        return grpo_loss(logprobs, old, micro["advantage"], micro["mask"], n_tokens,
                         rollout_logprobs=sampled if settings.tis_cap else None,
                         tis_cap=settings.tis_cap)

    if settings.updates > 1:
        trainer.add_logprobs(rows, "old_logprobs", settings.temperature)
    for _ in range(settings.updates):
        norm = trainer.update(rows, loss_fn, lr, settings.temperature)
    return norm


def show_episodes(folder, step, episodes, tokenizer):
    """Some of a step's answers, to be read by people."""
    with open(folder / "episodes.txt", "a", encoding="utf-8") as f:
        for e in episodes:
            f.write(f"--- step {step + 1} | reward {e.reward:g} | {e.verdict} | "
                    f"{len(e.tokens)} tokens\n{tokenizer.decode(e.prompt)}\n>>> {e.text}\n")


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
    if trainer.device.type == "cpu" and WORLD == 1:
        return trainer.model
    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    with trainer.device:
        return Transformer(trainer.model.config).to(dtype)


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


def interval(means, level=0.95):
    return [float(x) for x in np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]


def bootstrap_ci(scores, level=0.95, seed=0):
    """scores (problems, repeats) -> (mean, low, high): percentile bootstrap over problems and,
    within each, repeats (the paper's intervals are over 8 to 32 repeats of a benchmark)."""
    return float(np.mean(scores)), *interval(resample(scores, seed=seed), level)


SAMPLINGS = {"greedy": 0.0, "T=1": 1.0}  # name: temperature


def validate(folder, settings):
    """Held-out accuracy of a stage's model, greedy and at T=1, kept in its folder ->
    {"greedy", "T=1"}: scores (n, 1), mean length in tokens, truncated share, and what the task
    measures of a response."""
    path, task = folder / "validation.json", settings.task
    of = [settings.data, settings.validate, settings.max_new_tokens, settings.seed]
    if path.exists() and path.stat().st_mtime > (folder / "model.safetensors").stat().st_mtime:
        found = read_json(path)
        if found["of"] == of:
            return found
    model, tokenizer = open_model(folder, settings)
    found, problems = {"of": of}, task.validation(settings.validate, settings.seed)
    for name, temperature in SAMPLINGS.items():
        groups = roll_out(model, tokenizer, problems, 1, 10**6 + settings.seed, temperature,
                          settings, f"validate {name}:")
        episodes = [episode for episode, in groups]
        found[name] = {"scores": [[int(e.reward)] for e in episodes],
                       "length": float(np.mean([len(e.tokens) for e in episodes])),
                       "truncated": float(np.mean([not e.finished for e in episodes]))}
        for measure, of_text in task.measures.items():
            found[name][measure] = float(np.mean([of_text(e.text) for e in episodes]))
    write_file(path, lambda f: f.write_text(json.dumps(found)))
    return found


def open_model(folder, settings):
    model = Transformer.from_pretrained(folder, device=settings.start_device())
    return model, Tokenizer(model.tokenizer_files)


def run_arm(settings):
    """Stage 1 if its checkpoint is missing, then stage 2; both validated -> {"sft": ..., "rl":
    ...}."""
    sft = settings.folder("sft")
    if not (sft / "config.json").exists():
        convert(settings.stage1())
    before = validate(sft, settings) if RANK == 0 else None
    rl = train_rl(settings, sft)
    return {"sft": before, "rl": validate(rl, settings) if RANK == 0 else None}


def tiny_recipe(settings):
    """Both arms, SA (full attention) and SWA, side by side in a process each; then the table and
    the picture."""
    began = time.time()
    if WORLD > 1:
        raise UsageError("--model tiny compares two arms in a process each: "
                         "start it without torchrun, or with --window full")
    pretrain(settings)
    full = replace(settings, window=None)
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
    report_recipe(found, settings, time.time() - began)


def other_arm(settings):
    """The other process: it ends with the one that started it, however that ends."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    cli(lambda: run_arm(settings))


def report_recipe(found, settings, seconds):
    """found {"SA": {"sft", "rl"}, "SWA": ...} -> the table, the picture, and one line of JSON."""
    cells, summary, lines = {}, {}, []
    for arm, stages in found.items():
        for stage, result in stages.items():
            cell = {name: bootstrap_ci(result[name]["scores"]) for name in SAMPLINGS}
            line = {"model": f"{arm}-{stage.upper()}"}
            line |= {name: "{:.3f} [{:.3f}, {:.3f}]".format(*cell[name]) for name in SAMPLINGS}
            line["length"] = f"{result['T=1']['length']:.1f}"
            line |= {m: f"{result['T=1'][m]:.2f}" for m in settings.task.measures}
            lines.append(line)
            cells[arm, stage] = cell["T=1"]
            summary[f"{arm.lower()}_{stage}"] = cell["T=1"][0]
    print(f"\nheld-out accuracy, n = {settings.validate}, 95 % bootstrap intervals, "
          f"window {settings.window}, seed {settings.seed}\n")
    print("\n".join(markdown(lines)))
    rl = settings.folder()
    picture = rl.parent / f"recipe-{rl.name.removeprefix('rl-')}.png"
    logs = {"SA": read_log(replace(settings, window=None).folder()), "SWA": read_log(rl)}
    draw_recipe(picture, cells, logs, settings)
    print(f"\npicture: {picture}")
    print(json.dumps({**summary, "seconds": round(seconds, 1), "seed": settings.seed,
                      "window": settings.window, "n": settings.validate}))


def draw_recipe(path, cells, logs, settings):
    """Left: accuracy at T=1 after SFT and after RL with intervals; right: reward over RL steps."""
    figure = new_figure(8, 3.2)
    bars, curves = figure.subplots(1, 2)
    labels = {"SA": "SA (full attention)", "SWA": f"SWA (window {settings.window})"}
    for i, (arm, label) in enumerate(labels.items()):
        mean, low, high = np.array([cells[arm, stage] for stage in ("sft", "rl")]).T
        at = np.arange(2) + 0.4 * i - 0.2
        bars.bar(at, mean, 0.38, yerr=(mean - low, high - mean), capsize=3, color=COLORS[arm],
                 label=label)
        for x, value, top in zip(at, mean, high):
            bars.text(x, top + 0.02, f"{value:.2f}", ha="center", fontsize=8)
        steps, rewards = zip(*((r["step"], r["reward"]) for r in logs[arm]))
        curves.plot(steps, rewards, color=COLORS[arm], label=label)
    bars.set(xticks=[0, 1], xticklabels=["after SFT", "after RL"], ylim=(0, 1.15),
             ylabel=f"accuracy at T=1 (n={settings.validate})")
    curves.set(xlabel="RL step", ylabel="mean reward on training prompts", ylim=(0, 1.05))
    curves.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"tiny task, seed {settings.seed}, 95 % bootstrap intervals", fontsize=9)
    save_figure(figure, path)


def parser():
    return flags(RLSettings, __doc__.split("\n\n")[0])


def main():
    settings = RLSettings.of(**vars(parser().parse_args()))
    if settings.plan:
        length = settings.max_new_tokens + 1024  # a prompt's share
        slots = settings.slots or settings.prompts * settings.group
        return print_plan(settings, length, slots, length)
    print_settings(settings)
    if settings.tiny and settings.window:
        return tiny_recipe(settings)
    results = run_arm(settings)
    if RANK == 0:
        print(json.dumps({stage: bootstrap_ci(found["T=1"]["scores"])
                          for stage, found in results.items()}))


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
# Equal: mathematically equal in any form. Units, degree, percent and currency signs are optional
# on one side. Lists without brackets have no order. x = 5 equals 5, f(x) = 2x equals 2x, x > 2
# equals (2, \infty), \pm is two values, 3:4 is a fraction, 12:30 a time of day, log is natural.
# Not equal: rounded values, 0.5 for 50%, other brackets, another base subscript, another unit, a
# missing or an extra value. What the grammar does not know (words, sums, integrals, limits) is
# compared as a string.
#
# Model output is hostile, so the work is bounded by construction, not by signals (they fail off the
# main thread): nothing is evaluated as code, text and numbers are bounded before work on them
# starts, and sympy only holds the trees. It never simplifies, which has no time limit; mpmath
# evaluates both sides at a few points instead.

MAX_ANSWER = 1200           # characters
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 400, 40, 40
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
        r" \quad \qquad \limits \mathbf \boldsymbol \mathit \mathcal \mathsf \bold \bf \rm \boxed"
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


SHORT_WORDS = {"yes", "no", "odd", "red", "sq", "cu"}       # xyz is a product, blue is a word
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
      | (?<![\\A-Za-z])[A-Z]+(?=\s*=) | (?:"[^"]*"\s*)+(?=\s*=)         # AB =, Area =
      | m?\\(?:vec|hat|overline|mathbb|angle|triangle)
        (?:\s*\{{?\s*"?[A-Za-z](?:_\{{?\w\}}?)?"?\s*\}}?)+
      | "[^"]*" | \\\\ | \\log | \\[A-Za-z]+{SUB} | \\. | [A-Za-z]{SUB} | [<>!=]= | \*\* | . )
    """, re.X | re.S)
# cm, /cm, cm^2, km/h
UNIT = re.compile(rf"""(?:/\s*|\\cdot\s*)?
    (?:[€£¢¥₹%]|\\[$%]|"(?:{'|'.join(filter(str.isalpha, UNIT_OF))})s?")
    (?:\s*\^\s*\{{?\s*-?[0-9]\s*\}}?)?(?:\s*/\s*[hsm]\b)?""", re.X | re.I)
NOUNS = re.compile(         # what follows a number: 42 apples
    r'^(?=.*[0-9])((?:\\[A-Za-z]+|\\[^A-Za-z]|[^A-Za-z"\\])*)'
    r'((?:\s*"(?:[A-Z]|[A-Za-z]{2,})")+)\s*$', re.S)
SYMBOL = re.compile(r'"([A-Z]|[A-Za-z]{2}|[a-z]*[A-Z][A-Za-z]?)"')     # a unit: MW is not mW


def _respell(text):
    """The text after all rewrites, bounded before them."""
    if len(text) > MAX_ANSWER or '"' in text:       # quotes are ours
        raise Refused
    text = text.translate(CHARACTERS)
    for pattern, replacement in COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _split_units(text):
    """(the text without its units and nouns, the units in one spelling, sorted)."""
    units = []
    for unit in UNIT.findall(text):
        unit = re.sub(r'[\s{}"]', "", unit.lower())
        units.append(re.sub(r"[a-z]+|\\?[$%]", _unit, unit))
    text = UNIT.sub(" ", text)
    if counted := NOUNS.match(text):
        text, nouns = counted.groups()
        units += SYMBOL.findall(nouns)
    return text, sorted(units)


def _unit(match):
    """One name for cm, centimeter and centimeters."""
    alias = match[0]
    return UNIT_OF.get(alias) or UNIT_OF.get(alias.rstrip("s"), alias)


def _tokenize(text):
    """Tokens of a text after _respell and _split_units."""
    tokens, depth = [], 0
    for token in filter(None, TOKEN.findall(text)):
        token = TOKEN_OF.get(token, token)
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if token[:1].isdigit() and "," in token:        # 1,234 is a number, but (1,234) a pair
            tokens += re.split("(,)", token) if depth > 0 else [token.replace(",", "")]
        elif token:
            tokens.append(token)
    if len(tokens) > MAX_TOKENS:
        raise Refused
    return tokens


# Values: exact rationals, trees that are never simplified, or Nodes of these
#
# Floats would make 2^53 + 1 equal 2^53 and 1e400 equal 1e500, so numbers are rationals, and the
# size of a power or factorial is known before it is built. All else is built with evaluate=False:
# otherwise sympy's constructors expand, factor and root without a limit of time or memory.


class Node(NamedTuple):
    """What is more than one number: a list, set, interval, relation, region, ratio, matrix."""

    kind: str       # "," list, "{}" set, "(]" interval, "<" relation, "∪" region, ":", "⟦⟧", ...
    items: tuple


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
PRODUCT, SIGN = 5, 6        # the binding powers of 2x and of -x
CLOSING = {"(": ")]", "[": "])", "\\{": ["\\}"], "{": "}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩", "|": "|",
           "⟦": "⟧"}
ROUND = {"|": sympy.Abs, "⌊": sympy.floor, "⌈": sympy.ceiling}


class Parser:
    """Operator-precedence parser over one answer's tokens."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, "", ""], 0, 0
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
        if len(items) > MAX_ITEMS:
            raise Refused
        if len(items) == 1:
            return items[0]
        conditions = all(_kind(item) in "<≤≠∩" for item in items)
        both = conditions and joints == {"∧"}           # x > 2 and x < 5
        return Node("∩" if both else ",", tuple(items))

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
        power = before.isalpha() and after == "^"
        if token[0] in ".0123456789" and before not in (")", "!") and not power:
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
            return _apply(sympy.Pow, self.prefix(), _divide(ONE, index))
        if token[:1] == '"' and self.next != "=" and len(token) > 3:    # "Area" = 5
            raise Refused
        if NAME.fullmatch(token):
            return sympy.Symbol(re.sub(r'[{}"\s]|^0(?=[0-9]:)', "", token))
        if token[:1] in (".", *"0123456789"):
            return _number(token)
        raise Refused

    def argument(self):
        """What \\frac takes: a group or a token, of a number one digit: \\frac12."""
        token = self.next
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return _number(token[0])
        return self.prefix()

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
    value: sympy.Expr | Node | None     # None: outside the grammar
    units: list
    plain: str                          # to be compared where there is no value


@lru_cache(512)     # the gold answer stands beside a whole group of responses
def _parse(text):
    """An answer's text -> Parsed; never raises."""
    plain, values = text, []
    try:
        text = _respell(text)
        plain = " ".join(filter(None, TOKEN.findall(text))).replace('"', "").casefold()
        text, units = _split_units(text)
        for reading in _readings(_tokenize(text)):
            parser = Parser(reading)
            values.append(parser.listing())
            if parser.next:
                raise Refused
            if parser.degrees and not units:
                units = ["°"]
    except Exception:   # Refused, or whatever sympy raises on what it was given
        return Parsed(None, [], plain)
    return Parsed(_both_signs(values), units, plain)


def _both_signs(values):
    """The values of all readings as one list, or one set: 1 ± 2 is the list 3, -1."""
    first = values[0]
    if len(values) == 1:
        return first
    items = []
    for value in values:
        items += value.items if _kind(value) in ("{}", ",") else [value]
    return Node("{}" if _kind(first) == "{}" else ",", tuple(dict.fromkeys(items)))


# Comparison: are two values equal?
#
# simplify() has no time limit and knows too little; two formulas that agree to 75 digits at
# scattered points are equal. Relations are compared by their two sides, or by the numbers that
# satisfy them.

NUMERIC = {     # what a tree may hold besides rationals and symbols, and how it is evaluated
    sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1),
    sympy.Add: lambda *terms: sum(terms), sympy.Mul: lambda *factors: math.prod(factors),
    sympy.Pow: lambda x, y: x ** y, sympy.Abs: abs, sympy.floor: MP.floor, sympy.ceiling: MP.ceil,
    **{getattr(sympy, name): getattr(MP, name) for name in (
        "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log factorial").split()}}


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
    values = [_evaluate(arg, point) for arg in expr.args]
    x = values[0]
    if expr.is_Pow:
        exponent = expr.exp
        if x and abs(values[1]) * (abs(MP.mag(x)) + 1) > MAX_BITS:
            raise Refused
        if exponent.is_Rational and exponent.q % 2 and isinstance(x, MP.mpf) and x < 0:
            return (-1) ** (exponent.p % 2) * (-x) ** values[1]     # cube roots are real
    elif not (expr.is_Add or expr.is_Mul) and abs(x) > 10**5:
        raise Refused
    value = NUMERIC[expr.func](*values)
    if not MP.isfinite(value) or value and MP.mag(value) > MAX_BITS:
        raise Refused
    return value


def _points(*exprs):
    """Two scattered points, each symbol with either sign; integers where a floor asks for them."""
    symbols = sorted(set().union(*(expr.free_symbols for expr in exprs)), key=str)
    if any(expr.has(sympy.floor, sympy.ceiling) for expr in exprs):
        return [{symbol: n + 3 * k for k, symbol in enumerate(symbols)} for n in range(2, 40)]
    points = []
    for sign in [1, -1] if symbols else [1]:
        point = {}
        for k, symbol in enumerate(symbols):
            # powers modulo a prime: in a regular pattern, x - 1 = f(x) and n + 1 = k held by chance
            scattered = 1 + MP.mpf(pow(11, 9 * k + sign + 7, 1009)) / 1009
            point[symbol] = sign * (-1) ** k * scattered
        points.append(point)
    return points


def _close(a, b):
    """Equal to 75 digits: of the larger one, or absolutely where one is zero."""
    scale = max(abs(a), abs(b), int(a == 0 or b == 0))
    return abs(a - b) <= scale * MP.mpf(10) ** -75


def _equal(a, b):
    """Scalars: exactly where both are rational, else to 75 digits."""
    if a == b or a.is_Number and b.is_Number or {a, b} & {sympy.oo, -sympy.oo}:
        return a == b       # inf <= inf * tolerance is true: infinities never get to the digits
    return all(_close(_evaluate(a, point), _evaluate(b, point)) for point in _points(a, b))


def _proportional(a, b):
    """Relations: left minus right side in a constant proportion, for < and ≤ a positive one."""
    a_, b_ = _minus(*a.items), _minus(*b.items)
    values = [(_evaluate(a_, point), _evaluate(b_, point)) for point in _points(a_, b_)]
    x, y = max(values, key=lambda pair: abs(pair[1]))
    if not x or not y:
        return False
    if a.kind in "<≤" and not (MP.im(x / y) == 0 and MP.re(x / y) > 0):
        return False
    return all(_close(one * y, other * x) for one, other in values)


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
    if kind in ("<", "≤") and any(isinstance(item, sympy.Abs) for item in items):
        return _region(_without_abs(kind, *items))
    if kind in ("<", "≤", "≠"):
        return _half_line(kind, _minus(*items))
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


def _without_abs(kind, left, right):
    """|x| < c is -c < x and x < c; c < |x| is x < -c or c < x."""
    if isinstance(left, sympy.Abs):
        joint, (x,), c = "∩", left.args, right
        pairs = (_times(c, -ONE), x), (x, c)
    else:
        joint, (x,), c = "∪", right.args, left
        pairs = (x, _times(c, -ONE)), (c, x)
    return Node(joint, tuple(Node(kind, pair) for pair in pairs))


def _half_line(kind, difference):
    """Where a linear difference < 0, ≤ 0 or ≠ 0."""
    symbols = difference.free_symbols
    values = [_evaluate(difference, dict.fromkeys(symbols, n)) for n in range(4)]
    slope = values[1] - values[0]
    linear = all(_close(b - a, slope) for a, b in itertools.pairwise(values))
    if len(symbols) != 1 or not slope or not linear:
        raise Refused
    root = _end(-values[0] / slope)
    if kind == "≠":
        return Region(symbols, {root}, lambda x: x != root)
    return Region(symbols, {root},
                  lambda x: slope * (x - root) < 0 or kind == "≤" and x == root)


def _same_region(a, b):
    """Membership agrees at each end, between two ends and beyond them."""
    a, b = _region(a), _region(b)
    ends = sorted({MP.zero} | a.ends | b.ends - set(INFINITE.values()))
    ends = [end for end in ends if not MP.isinf(end)]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    places = [ends[0] - 1, *ends, *middles, ends[-1] + 1]
    one_symbol = len(a.symbols | b.symbols) < 2
    return one_symbol and all(a.contains(x) == b.contains(x) for x in places)


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


def _items(value):
    return value.items if _kind(value) in (",", "{}") else (value,)


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
        same = sorted(ours.plain.split(" , ")) == sorted(theirs.plain.split(" , "))
        return "correct" if same else "unparsed"
    if ours.units and theirs.units and ours.units != theirs.units:
        return "wrong"
    try:
        return "correct" if _same(ours.value, theirs.value) else "wrong"
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
