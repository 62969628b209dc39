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
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

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
    except BaseException:
        process.terminate()  # as gently as Ctrl-C: it saves its step
        raise
    finally:
        process.join()
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
# response -> extract_answer -> _tokens -> Parser -> sympy expressions and Nodes -> _same
#
# Equal: mathematically equal in any form. Units, degree, percent and currency signs are optional
# on one side. Lists without brackets have no order. x = 5 equals 5, f(x) = 2x equals 2x, x > 2
# equals (2, \infty), \pm is two values, 3:4 is a fraction, 12:30 a time of day, log is natural.
# Not equal: rounded values, 0.5 for 50%, other brackets, another base subscript, another unit, a
# missing or an extra value. What the grammar does not know (words, sums, integrals, limits) is
# compared as a string.
#
# Model output is hostile: nothing is evaluated as code; rationals are exact and bounded in size;
# the rest is a tree that sympy never simplifies (its rewriting has no time limit) and mpmath
# evaluates within bounds at two points. No signals: they fail off the main thread.

MAX_ANSWER, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1200, 400, 40, 40
MAX_BITS = 2**15            # of an exact number, and of the exponent of an evaluated one
MP = mpmath.MPContext()     # our own: threads that share mpmath.mp change each other's precision
MP.dps = 100                # equal means 75 of these digits; the rest pays for cancellation

Node = namedtuple("Node", "kind items")     # "," list, "{}" set, "(]" interval, "<", "=", "∪", ...


class Refused(Exception):
    """Syntax outside the grammar, or a value too large to build."""


BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
PHRASE = re.compile(
    r"####|\banswers?\b\W{0,4}(?:[^.:=\n]{0,60}?\b(?:is|are)\b|[:=\n])[\s:*_]*", re.I)
FOUND = re.compile(     # a formula in dollar signs or brackets, or a number
    r"\$+([^$\n]{1,300})\$+|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]"
    r"|((?<![\w.])-?\\?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:[/:][0-9]+)?|-?\.[0-9]+)", re.S)
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
    boxes, at = [], len(text)
    while len(boxes) < 3 and (at := max(text.rfind(b, 0, at) for b in ("\\boxed", "\\fbox"))) >= 0:
        boxes.append(_box(text, at))
    if boxes:
        answer = max(boxes)[1]          # of nested boxes, the outer one ends last
        sentence = len(BOX.findall(answer)) == 1 and WORD.search(BOX.sub("", answer))
        return (extract_answer(answer) if sentence else answer) or None
    tail = text[-4000:].strip(" \n\t*")
    if phrases := list(PHRASE.finditer(tail)):
        line = SENTENCE_END.split(tail[phrases[-1].end():].strip().split("\n")[0])[0].strip(" *")
        found = FOUND.findall(line)
        alone = len(found) == 1 and (not found[0][3] or len(WORD.findall(line)) > 2)
        return "".join(found[0]).strip() if alone else line or None
    words = WORD.findall(tail[:300])
    if len(tail) < 300 and (not words or words == [tail]):
        return tail or None
    found = ["".join(groups).strip(" ,") for groups in FOUND.findall(tail[-1000:])]
    return next((item for item in reversed(found) if re.search("[0-9]", item)), None)


def _box(text, start):
    """(end, content) of the box that starts here; (-1, "") if it is empty or does not close."""
    depth, opening = 0, BOX.match(text, start)
    brace = re.compile(r"\\.|[{}]", re.S)
    for sign in brace.finditer(text, opening.end() - 1, start + 2 * MAX_ANSWER) if opening else ():
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            content = text[opening.end():sign.start()].strip()
            return (sign.end(), content) if content else (-1, "")
    return -1, ""


# Tokens: one spelling for each sign; upright and spelled-out words go into double quotes
SPELLINGS = {spelling: token for token, spellings in {
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
}.items() for spelling in spellings.split()}
UNITS = {alias: names.split()[0] for names in (
    "cm centimeter centimetre", "m meter metre", "mm millimeter millimetre", "in inch inche",
    "km kilometer kilometre", "ft foot feet", "yd yard", "mi mile", "s sec second", "min minute",
    "h hr hour", "day", "wk week", "month mo", "yr year", "g gram", "kg kilogram kilo", "am", "pm",
    "mg milligram", "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre", "unit",
    r"$ \$ dollar usd", "¢ cent", "€ euro eur", "£ gbp", "¥", "₹", r"% \% percent", "rad radian",
    ) for alias in names.split()}
SHORT_WORDS = {"yes", "no", "odd", "red", "sq", "cu"}       # others are words from four letters
CHARACTERS = str.maketrans({
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "∛": r"\sqrt[3]",
    **{sign: rf"\frac{value} " for sign, value in {
        "½": 12, "⅓": 13, "⅔": 23, "¼": 14, "¾": 34, "⅕": 15, "⅛": 18}.items()}})


BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(),
                 range(2, 13), strict=True))
COUNTED = re.compile(r"(?:[0-9})/]|\b(?:sq|square|cu|cubic|per))\s*$")     # 5 km, but am + bn


def _upright(match):
    """A word of \\text{...}: the sign that it spells, or in quotes."""
    word = match[0]
    return SPELLINGS.get(word.lower(), word if word in ("i", "e") else f'"{word}"')


def _run(match):
    """A run of letters outside \\text: a word, or a product like xy."""
    word, lower, before = match[0], match[0].lower(), match.string[:match.start()]
    unit = lower.rstrip("s") in UNITS and (len(word) > 2 or COUNTED.search(before[-9:]))
    known = unit or lower in SPELLINGS or lower in SHORT_WORDS
    name = len(word) == 3 and (word.istitle() or word.isupper())
    return _upright(match) if known or name or len(word) > 3 else word


def _mixed(match):
    """1\\frac{4}{5} and 1 4/5 are sums, 2\\frac{5}{3} is a product."""
    whole, top, bottom = (part.strip("}") for part in match.groups() if part)
    proper = len(top) <= len(bottom) < 10 and int(top) < int(bottom)
    return f"({whole}{'+' if proper else '*'}{top}/{bottom})"


REWRITES = [(re.compile(pattern), target) for pattern, target in (
    (r"\\(?:text)?color\s*\{\w*\}", ""),
    (r"\\\\\s*\[-?[0-9.]+[a-z]{2}\]", r"\\\\"),                              # \\[4pt] in a matrix
    (r"(?:\\[!,]\s*)*(?:\{:\}|(?<!\\):)(?:\s*\\[!,])*", ":"),                # 4{:}30
    (r"\bmph\b", "miles per hour"),
    (r"\b([aApP])\.\s?([mM])\b\.?", r"\1\2"),                               # a.m.
    (r"\b(sq|cu|ft|in|hrs?|lbs?|oz|yd|mi)\.", r"\1"),
    (r"\\(?:text\w*|mathrm|mbox|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
     lambda match: re.sub(r"(?<![\\A-Za-z])[A-Za-z]+", _upright, f" {match[1]} ")),
    (r'(?<![\\A-Za-z"])[A-Za-z]{2,}(?!["A-Za-z])', _run),
    (r'"(?:sq|square)"\s*("[a-z]+")', r"\1^2"), (r'"(?:cu|cubic)"\s*("[a-z]+")', r"\1^3"),
    (r'\s*"thousand"', "*10^3"), (r'\s*"million"', "*10^6"), (r'\s*"billion"', "*10^9"),
    (r"\{([^{}]*)(\\over|\\choose)\b([^{}]*)\}", r"\2{\1}{\3}"),
    (r'(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\s*"degrees?"|°)(?:\s*"?([CF])\b"?)?',
     lambda match: f' "{match[1]}"' if match[1] else "° "),
    (r'("(?:day|hour|hr|minute|min|feet|foot|ft)s?")\s*∧', r"\1"),             # 2 hours and 5 min
    (r"(?<=[0-9])(?:,\\!|\{,\}|\\[, ]|\s)\s*(?=[0-9]{3}(?![0-9/]))", ""),     # 10,\!080  1{,}000
    (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", "*"),                                 # 1.2 x 10^5
    (r"(?<![\w^.])([0-9]+)\s*\\[dt]?frac\s*\{?([0-9](?:[0-9]*\})?)\}?\s*\{?([0-9](?:[0-9]*\})?)\}?"
     r"|(?<![\w^.])([0-9]+)\s+([0-9]+)/([0-9]+)", _mixed),
    (r'(?<=_)\s*\{?\s*"?([a-z]+)"?\s*\}?', lambda match: f"{BASES.get(match[1], match[0])}"),
    (r"[({]([0-9A-F]+)[)}]_", r"\1_"),                                       # {52}_8
    (r"\\mathbb\s*\{?R\}?|\\R\b", "ℝ"),
    (r'\\begin\s*\{"(?:small|[pb])?(?:matrix|array)"\}(?:\{[clr|"]*\})?(.*?)(?:\\\\\s*)?'
     r'\\end\s*\{"\w+"\}',      # a matrix is a row of rows
     lambda match: f"⟦⟦{match[1]}⟧⟧".replace("\\\\", "⟧,⟦").replace("&", ",")),
    (r"\\not\s*=", "≠"),
    (r"\{\}|^[\s=:]+|[\s.,;:\\]+$|(?<=^[A-J])\)$", ""),
)]
SUB = r"(?:_(?:\w|\{[^{}]*\}))?'*"
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
UNIT = re.compile(rf"""(?:/\s*|\\cdot\s*)?
    (?:[€£¢¥₹%]|\\[$%]|"(?:{'|'.join(filter(str.isalpha, UNITS))})s?")
    (?:\s*\^\s*\{{?\s*-?[0-9]\s*\}}?)?(?:\s*/\s*[hsm]\b)?""", re.X | re.I)
APPLES = re.compile(        # a number and any noun
    r'^(?=.*[0-9])((?:\\[A-Za-z]+|\\[^A-Za-z]|[^A-Za-z"\\])*)'
    r'((?:\s*"(?:[A-Z]|[A-Za-z]{2,})")+)\s*$', re.S)
SYMBOL = re.compile(r'"([A-Z]|[A-Za-z]{2}|[a-z]*[A-Z][A-Za-z]?)"')     # a unit: MW is not mW


def _tokens(text):
    """(tokens, the units taken out of them, the text in one spelling)."""
    if len(text) > MAX_ANSWER or '"' in text:
        raise Refused
    text = text.translate(CHARACTERS)
    for pattern, target in REWRITES:
        text = pattern.sub(target, text)
    plain = " ".join(filter(None, TOKEN.findall(text))).replace('"', "").casefold()
    units = [re.sub(r"[a-z]+|\\?[$%]", lambda m: UNITS.get(m[0], UNITS.get(m[0].rstrip("s"), m[0])),
                    re.sub(r'[\s{}"]', "", unit.lower())) for unit in UNIT.findall(text)]
    text, tokens, depth = UNIT.sub(" ", text), [], 0
    if apples := APPLES.match(text):
        text, nouns = apples.groups()
        units += SYMBOL.findall(nouns)
    for token in TOKEN.findall(text):
        token = SPELLINGS.get(token, token)
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if token[:1].isdigit() and "," in token:        # 1,234, but (1,234) is a pair
            tokens += re.split("(,)", token) if depth > 0 else [token.replace(",", "")]
        elif token:
            tokens.append(token)
    if len(tokens) > MAX_TOKENS:
        raise Refused
    return tokens, sorted(units), plain


# Values: exact rationals, or trees that are never simplified
FUNCTIONS = {"\\ln": sympy.log, "\\lg": sympy.log, **{
    "\\" + re.sub("^a", "arc", name): getattr(sympy, name)
    for name in "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log".split()}}
CONSTANTS = {"\\pi": sympy.pi, "e": sympy.E, "i": sympy.I, "\\infty": sympy.oo,
             "\\emptyset": Node("{}", ())}
NAME = re.compile(r"""[A-Za-zℝ](?![A-Za-z]).*|[A-Z]+|[0-9][\w.]*[_:].*|"[^"]*".*|m?\\(?:vec|hat
    |overline|mathbb|angle|triangle|ell|(?:var)?epsilon|[Tt]heta|[Ll]ambda|[Gg]amma|[Dd]elta
    |[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega|alpha|beta|zeta|eta|kappa|mu|nu|xi|rho|tau|chi)(?![a-z]).*""",
    re.X | re.S)
REALS, ONE, TWO = sympy.Symbol("ℝ"), sympy.Integer(1), sympy.Integer(2)


def _kind(value):
    return value.kind if isinstance(value, Node) else "scalar"


def _bits(number):
    return max(number.p.bit_length(), number.q.bit_length()) if number.is_Rational else 1


def _apply(function, a, b=None):
    """function(a, b): exact where that is a rational of bounded size, else a tree."""
    args = (a,) if b is None else (a, b)
    if not all(isinstance(arg, sympy.Expr) for arg in args):
        raise Refused
    exact = function in (sympy.Add, sympy.Mul) and a.is_Number and b.is_Number
    if function is sympy.Pow and a.is_Rational and b.is_Integer:
        exact = abs(b) * _bits(a) <= MAX_BITS
    if function is sympy.factorial:
        exact = a.is_Integer and 0 <= a <= 3000
    value = function(*args) if exact else function(*args, evaluate=False)
    if value in (sympy.nan, sympy.zoo) or _bits(value) > MAX_BITS:
        raise Refused
    return value


def _times(a, b):
    if isinstance(a, Node) and isinstance(b, Node):
        raise Refused
    for one, other in ((a, b), (b, a)):
        if _kind(one) == "⟦⟧":
            return Node("⟦⟧", tuple(_times(item, other) for item in one.items))
    return _apply(sympy.Mul, a, b)


def _plus(a, b, sign=ONE):
    return _apply(sympy.Add, a, b if sign == 1 else _times(b, sign))


def _divide(a, b):
    return _times(a, _apply(sympy.Pow, b, -ONE))


def _binomial(n, k):
    n_, k_, rest = (_apply(sympy.factorial, x) for x in (n, k, _plus(n, k, -ONE)))
    return _divide(n_, _times(k_, rest))


def _number(text):
    text, _, repeating = text.partition("\\")
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(text) > 400 or len(exponent) > 5:
        raise Refused
    value = sympy.Rational(int(whole + decimals or 0), 10 ** len(decimals))
    if repeating := re.sub("[^0-9]", "", repeating):
        value += sympy.Rational(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(decimals))
    return _times(value, _apply(sympy.Pow, sympy.Integer(10), sympy.Integer(exponent or 0)))


def _join(kind, a, b):
    """a ∪ b; a : b : c."""
    return Node(kind, (a.items if kind == _kind(a) == ":" else (a,)) + (b,))


RELATIONS = {"=": "=", "≈": "≈", "∈": "∈", "≠": "≠", "<": "<", "≤": "≤", ">": "<", "≥": "≤"}
OPERATORS = {   # binding power, meaning
    **{sign: (2, partial(_join, sign)) for sign in "∪∩∖"}, ":": (3, partial(_join, ":")),
    "+": (4, _plus), "-": (4, partial(_plus, sign=-ONE)), "*": (5, _times), "/": (5, _divide),
    "^": (7, partial(_apply, sympy.Pow))}
CLOSING = {"(": ")]", "[": "])", "\\{": ["\\}"], "{": "}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩", "|": "|",
           "⟦": "⟧"}
ROUND = {"|": sympy.Abs, "⌊": sympy.floor, "⌈": sympy.ceiling}


class Parser:
    """Operator-precedence parser over one answer's tokens."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, "", ""], 0, 0
        self.bars = self.angle = self.degrees = False   # in |...|; in sin(...); a ° elsewhere

    next = property(lambda self: self.tokens[self.at])

    def accept(self, wanted):
        token = self.next if self.next and self.next in wanted else ""
        self.at += bool(token)
        return token

    def listing(self):
        """item {"," item}; the conditions in "x > 2 and x < 5" hold together."""
        items, joints = [self.item()], set()
        while joint := self.accept(",∧"):
            joints.add(self.accept("∧") or joint)
            items.append(self.item())
        if len(items) > MAX_ITEMS:
            raise Refused
        both = joints == {"∧"} and all(_kind(item) in "<≤≠" for item in items)
        return items[0] if len(items) == 1 else Node("∩" if both else ",", tuple(items))

    def item(self):
        """a < b < c is two relations, a = b = c is a = c, and 10/3 ≈ 3.33 is 10/3."""
        sides, signs = [self.expression()], []
        while sign := self.accept(RELATIONS):
            signs.append(sign)
            sides.append(self.expression())
        if "≈" in signs:
            keep = signs.index("≈") or int(getattr(sides[0], "is_Symbol", False))
            signs, sides = ["="] * keep, sides[:keep + 1]
        if set(signs) == {"="}:
            return Node("=", (sides[0], sides[-1]))
        links = [Node(RELATIONS[sign], pair[::-1] if sign in ">≥" else pair)
                 for sign, pair in zip(signs, itertools.pairwise(sides), strict=True)]
        return [*links, sides[0]][0] if len(links) < 2 else Node("∩", tuple(links))

    def expression(self, floor=0):
        left = self.prefix()
        while True:
            token = self.next
            implicit = (5, _times) if self.starts_factor() else (0, None)
            power, build = OPERATORS.get(token, implicit)
            if self.accept("!") and self.next != "!":
                left = _apply(sympy.factorial, left)
            elif self.accept("°"):
                self.degrees |= not self.angle
                left = _times(left, sympy.pi / 180) if self.angle else left
            elif power <= floor:
                return left
            else:
                self.at += token in OPERATORS
                before, after = self.tokens[self.at - 1], self.tokens[self.at + 1]
                if token[0] in ".0123456789" and before not in (")", "!") and not (
                        before.isalpha() and after == "^"):
                    raise Refused       # 2 3 is not 6, but n2^n is n * 2^n
                left = build(left, self.expression(power - (token == "^")))

    def starts_factor(self):
        token = self.next
        return token[:1].isalnum() or token[:1] in (".", "\\") and token != "\\}" or (
            token in CLOSING and not (token == "|" and self.bars))

    def prefix(self):
        token = self.next
        self.at += 1
        if token in ("+", "-"):
            return _times(self.expression(6), -ONE if token == "-" else ONE)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in CLOSING:
            return self.group(token)
        if token in FUNCTIONS:
            return self.call(token)
        if token in ("\\frac", "\\binom"):
            build = _divide if token == "\\frac" else _binomial
            return build(self.argument(), self.argument())
        if token == "\\sqrt":
            index = self.group("[") if self.accept("[") else TWO
            return _apply(sympy.Pow, self.prefix(), _divide(ONE, index))
        if NAME.fullmatch(token) and (token[0] != '"' or self.next == "=" or len(token) == 3):
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
        outer, self.bars, self.depth = self.bars, opening == "|", self.depth + 1
        if opening == "\\{" and self.tokens[self.at + 1] in ("|", ":"):     # {x : x > 2}
            self.at += 2
        value = Node(",", ()) if opening + self.next == "\\{\\}" else self.listing()
        closing = self.accept(CLOSING[opening])
        if not closing or self.depth > MAX_DEPTH:
            raise Refused
        self.bars, self.depth = outer, self.depth - 1
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

    def call(self, token):
        """\\sin^2 x, \\log_2 8, \\cos 2x: up to the next function, bracket or sign."""
        base = sympy.Integer(10) if token == "\\lg" else None
        base = self.argument() if self.accept("_") else base
        exponent = self.expression(6) if self.accept("^") else ONE
        if exponent == -1 and "\\arc" + token[1:] in FUNCTIONS:
            token, exponent = "\\arc" + token[1:], ONE
        outer, self.angle, bracket = self.angle, True, self.next in CLOSING
        x = self.prefix() if bracket else self.expression(6)
        while not bracket and self.starts_factor() and self.next not in (*FUNCTIONS, *CLOSING):
            x = _times(x, self.expression(6))
        if self.accept("°"):
            x = _times(x, sympy.pi / 180)
        self.angle = outer
        value = _apply(FUNCTIONS[token], x)
        value = value if base is None else _divide(value, _apply(sympy.log, base))
        return value if exponent == 1 else _apply(sympy.Pow, value, exponent)


def _readings(tokens):
    """The tokens with either sign for each \\pm; a \\mp runs against all of them."""
    count = 1 if "∓" in tokens else tokens.count("±")
    if count > 2:
        raise Refused
    for signs in itertools.product("+-", repeat=count):
        sign = itertools.cycle(signs)
        yield [next(sign) if token == "±" else "+-"[signs[0] == "+"] if token == "∓" else token
               for token in tokens]


@lru_cache(512)
def _parse(text):
    """(value or None, units, the string to compare where there is no value)."""
    plain, values = text, []
    try:
        tokens, units, plain = _tokens(text)
        for reading in _readings(tokens):
            parser = Parser(reading)
            values.append(parser.listing())
            units = units or ["°"] * parser.degrees
            if parser.next:
                raise Refused
    except Exception:   # Refused, or whatever sympy raises on what it was given
        return None, [], plain
    if len(values) == 1:
        return values[0], units, plain
    kind = "{}" if _kind(values[0]) == "{}" else ","
    items = [value.items if _kind(value) in ("{}", ",") else [value] for value in values]
    return Node(kind, tuple(dict.fromkeys(itertools.chain(*items)))), units, plain


# Comparison
NUMERIC = {     # what a tree may hold besides rationals and symbols, and how it is evaluated
    sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1), sympy.ceiling: MP.ceil,
    **{getattr(sympy, name): getattr(MP, name) for name in (
        "sin cos tan asin acos atan sinh cosh tanh exp log floor factorial").split()},
    sympy.cot: lambda x: 1 / MP.tan(x), sympy.sec: lambda x: 1 / MP.cos(x), sympy.Abs: abs,
    sympy.csc: lambda x: 1 / MP.sin(x), sympy.Pow: lambda x, y: x ** y,
    sympy.Add: lambda *x: sum(x), sympy.Mul: lambda *x: math.prod(x)}


def _evaluate(expr, point):
    """expr at a point, to 100 digits; Refused where the value or its exponent is too large."""
    if expr.is_Rational:
        return MP.mpf(expr.p) / expr.q
    if expr in point or expr in NUMERIC:
        return MP.mpf(point[expr]) if expr in point else NUMERIC[expr]
    x, *y = values = [_evaluate(arg, point) for arg in expr.args]
    if expr.is_Pow:
        if x and abs(y[0]) * (abs(MP.mag(x)) + 1) > MAX_BITS:
            raise Refused
        odd = expr.exp.is_Rational and expr.exp.q % 2       # cube roots are real
        if odd and isinstance(x, MP.mpf) and x < 0:
            return (-1) ** (expr.exp.p % 2) * (-x) ** y[0]
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
    # powers modulo a prime: in a regular pattern, x - 1 = f(x) and n + 1 = k were proportional
    return [{symbol: sign * (-1) ** k * (1 + MP.mpf(pow(11, 9 * k + sign + 7, 1009)) / 1009)
             for k, symbol in enumerate(symbols)} for sign in ([1, -1] if symbols else [1])]


def _close(a, b):
    return abs(a - b) <= max(abs(a), abs(b), 1 if a == 0 or b == 0 else 0) * MP.mpf(10) ** -75


def _equal(a, b):
    """Scalars: exactly where both are rational, else to 75 digits."""
    if a == b or a.is_Number and b.is_Number or {a, b} & {sympy.oo, -sympy.oo}:
        return a == b       # inf <= inf * tolerance is true: infinities never get to the digits
    return all(_close(_evaluate(a, point), _evaluate(b, point)) for point in _points(a, b))


def _proportional(a, b):
    """Relations: left minus right side in a constant proportion, for < and ≤ a positive one."""
    a_, b_ = (_plus(*node.items, sign=-ONE) for node in (a, b))
    values = [(_evaluate(a_, point), _evaluate(b_, point)) for point in _points(a_, b_)]
    x, y = max(values, key=lambda pair: abs(pair[1]))
    if not x or not y or a.kind in "<≤" and not (MP.im(x / y) == 0 and MP.re(x / y) > 0):
        return False
    return all(_close(one * y, other * x) for one, other in values)


def _end(value):
    """A break point of a region, rounded so that equal ones are identical."""
    if isinstance(value, MP.mpc):
        raise Refused
    return MP.nint(value * 10**50) / 10**50


INFINITE = {sympy.oo: MP.inf, -sympy.oo: -MP.inf}
COMBINE = {"∪": any, ",": any, "∩": all, "∖": lambda inside: inside[0] and not inside[1]}


def _region(node):
    """(symbols, break points, membership test) of an interval, union, linear inequality ..."""
    kind, items = node if isinstance(node, Node) else (node, ())
    if kind == REALS:
        return set(), set(), lambda x: True
    if kind in ("()", "(]", "[)", "[]", "{}"):
        ends = [INFINITE[x] if x in INFINITE else _end(_evaluate(x, {})) for x in items]
        if kind == "{}":
            return set(), set(ends), lambda x: x in ends
        closed = [ends[k] for k in (0, -1) if kind[k] in "[]"]
        if len(ends) == 2 and ends[0] < ends[1] and not any(map(MP.isinf, closed)):
            return set(), set(ends), lambda x: ends[0] < x < ends[1] or x in closed
    elif kind == "∈":
        return {items[0]}, *_region(items[1])[1:]
    elif kind in COMBINE and (kind != "," or all(_kind(item) in "<≤≠∩" for item in items)):
        symbols, points, tests = zip(*map(_region, items), strict=True)
        return set().union(*symbols), set().union(*points), (
            lambda x: COMBINE[kind]([test(x) for test in tests]))
    elif kind in ("<", "≤") and any(isinstance(item, sympy.Abs) for item in items):
        if isinstance(items[0], sympy.Abs):     # |x| < c: -c < x and x < c
            joint, (x,), c = "∩", items[0].args, items[1]
            ends = (_times(c, -ONE), x), (x, c)
        else:                                   # c < |x|: x < -c or c < x
            joint, (x,), c = "∪", items[1].args, items[0]
            ends = (x, _times(c, -ONE)), (c, x)
        return _region(Node(joint, tuple(Node(kind, pair) for pair in ends)))
    elif kind in ("<", "≤", "≠"):
        difference = _plus(*items, sign=-ONE)
        symbols = difference.free_symbols
        at = [_evaluate(difference, dict.fromkeys(symbols, n)) for n in range(4)]
        slope = at[1] - at[0]
        if len(symbols) == 1 and slope and all(
                _close(b - a, slope) for a, b in itertools.pairwise(at)):
            root = _end(-at[0] / slope)
            return symbols, {root}, lambda x: (
                x != root if kind == "≠" else slope * (x - root) < 0 or kind == "≤" and x == root)
    raise Refused


def _same_region(a, b):
    """Membership agrees at each break point, between them and beyond them."""
    (x, points, inside), (y, more, within) = _region(a), _region(b)
    ends = sorted(point for point in points | more | {MP.zero} if not MP.isinf(point))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    tests = [ends[0] - 1, *ends, *middles, ends[-1] + 1]
    return len(x | y) < 2 and all(inside(test) == within(test) for test in tests)


def _bare(node):
    """A value without its label: x = 5 is 5, x \\in \\{1, 2\\} the set, 3:4 a fraction."""
    pair = isinstance(node, Node) and len(node.items) == 2
    kind, (left, right) = node if pair else ("", (0, 0))
    if kind == "=":
        names = left.items if _kind(left) == "()" else (left,)
        if all(getattr(name, "is_Symbol", False) for name in names) or not left.free_symbols:
            return right
        return left if getattr(right, "is_Symbol", False) else node
    if kind == "∈" and _kind(right) == "{}":
        return right
    return _divide(left, right) if kind == ":" else node


def _matched(items, others, repeats):
    """Each item equals one of the others; where repeats count, each a different one."""
    others = list(others)
    for item in items:
        index = next((k for k, other in enumerate(others) if _same(item, other)), None)
        if index is None:
            return False
        if repeats:
            del others[index]
    return not (repeats and others)


def _same(a, b):
    """Whether two parsed values are equal; the policy is at the top of this section."""
    if _kind(a) != _kind(b):
        a, b = _bare(a), _bare(b)
    kind, kinds = _kind(a), {_kind(a), _kind(b)}
    if kinds == {"scalar"}:
        return _equal(a, b)
    if kinds & {",", "{}"} and not kinds & set("∪∩∖∈<≤≠"):
        items, others = (v.items if _kind(v) in (",", "{}") else (v,) for v in (a, b))
        if "{}" in kinds:
            return _matched(items, others, False) and _matched(others, items, False)
        return _matched(items, others, True)
    if kinds == {":"}:
        a, b = (Node("()", tuple(_divide(x, v.items[0]) for x in v.items)) for v in (a, b))
    if len(kinds) == 1 and kind not in "∪∩∖∈<≤≠":
        if kind == "=" and not any(isinstance(side, Node) for side in a.items + b.items):
            return _proportional(a, b)
        return len(a.items) == len(b.items) and all(map(_same, a.items, b.items))
    try:
        return _same_region(a, b)
    except Refused:
        if len(kinds) > 1 or kind in "∪∖∈":
            return False
        return _matched(a.items, b.items, True) if kind == "∩" else _proportional(a, b)


CHOICE = re.compile(        # (C) 42
    r"(?:\\text\w*\s*\{\s*)?\(([A-J])\)\s*\}?(?:\\[ ,;]|[\s:.])*(?=[^\s}])"
    r"(?!.*\([A-J]\))(.+)", re.S)


def grade(response, gold) -> str:
    """"correct", "wrong", "unparsed" (differs, but only strings could be compared) or "missing".

    Total: any input, in bounded time, and nothing of it is evaluated as code.
    """
    answer = extract_answer(response)
    if not answer or not isinstance(gold, str) or not gold.strip():
        return "missing"
    if "\\boxed" in gold or "####" in gold:
        gold = extract_answer(gold) or gold
    if len(answer) <= MAX_ANSWER and answer.strip() == gold.strip():
        return "correct"
    if choice := CHOICE.match(answer):
        letter = re.fullmatch(r"\W*(?:text\w*)?\W*[A-J]\W*", gold)
        answer = choice[1 if letter else 2].strip(" }")
    (value, units, plain), (target, other, wanted) = _parse(answer), _parse(gold)
    if value is None or target is None:
        equal = sorted(plain.split(" , ")) == sorted(wanted.split(" , "))
        return "correct" if equal else "unparsed"
    try:
        compatible = not (units and other) or units == other
        return "correct" if compatible and _same(value, target) else "wrong"
    except Exception:   # a pole, or a number too large to evaluate
        return "unparsed"


def is_correct(response, gold) -> bool:
    """The reward: whether the response's final answer equals the gold one. Never raises."""
    return grade(response, gold) == "correct"


def grade_batch(responses, golds, grader=grade) -> list[str]:
    """Verdicts of a batch."""
    return [grader(*pair) for pair in zip(responses, golds, strict=True)]


if __name__ == "__main__":
    cli(main)
