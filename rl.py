"""Stage 2: on-policy RL under the window (GRPO), with a sympy answer checker as the reward.

SFT data are written for full attention and lean on what a window cannot see. RL trains the model on its own
trajectories instead, generated under the window it will be used with, so that it keeps the ways of working
that the window can carry. One step: G answers to each prompt, a reward of 1 for a right answer, advantages
within the group, one policy-gradient update.

Left out on purpose: a reference model and KL, a value model, reward models, asynchronous rollouts.

    python rl.py --model tiny                      # the whole recipe in miniature, on a CPU, in minutes
    python rl.py --window 4096                     # DeepSeek-R1-Distill-Qwen-1.5B on one GPU
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import convert_sft
from convert_sft import (RANK, WORLD, Parser, Trainer, add_settings, all_sum, as_prompt, as_window, convert, draw, held_out,
                         load_problems, make_row, other_stage, pick_device, print_plan, schedule, settle, stage_folder,
                         tiny_problems)
from model import Rollout, Tokenizer, Transformer, UsageError, cli, generate, read_json, write_file

# ----------------------------------------------------------------------------------------------------
# the answer checker


def extract_answer(text):
    """The last `\\boxed{...}`, else what follows `####`, else the last number; None without any."""
    at = text.rfind("\\boxed{")
    if at >= 0:
        depth = 0
        for i in range(at + 6, min(len(text), at + 1200)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[at + 7:i].strip() or None
        return None
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text[-1000:])
    return found[-1] if found else None


def is_correct(response, gold):
    answer = extract_answer(response)

    def value(text):
        text = text.strip().replace(",", "").strip("$")
        return Fraction(text) if re.fullmatch(r"-?[0-9]{1,400}(\.[0-9]{1,400})?", text) else text

    return answer is not None and value(answer) == value(gold)


def grade_batch(responses, golds):
    return ["correct" if is_correct(r, g) else "wrong" for r, g in zip(responses, golds)]


# ----------------------------------------------------------------------------------------------------
# GRPO


def group_advantages(rewards, std=False):
    """rewards (prompts, G) -> advantages (prompts, G): reward minus the group's mean (Dr. GRPO, arXiv
    2503.20783); std=True also divides by the group's standard deviation (GRPO, arXiv 2402.03300)."""
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    return advantages


def grpo_loss(logprobs, old_logprobs, advantages, mask, n_tokens, clip=(0.2, 0.28), rollout_logprobs=None,
              tis_cap=2.0):
    """The clipped surrogate (PPO), summed over tokens and divided by n_tokens (DAPO, arXiv 2503.14476).

    All tensors have one shape, e.g. (1, T) packed; mask is 1 on response tokens. n_tokens counts the
    response tokens of the whole batch, over micro-batches and ranks. On the first update of a batch
    old_logprobs == logprobs, so the ratio is 1 and only its gradient is left. rollout_logprobs: what the
    sampler said; tokens are then weighted by min(p_old / p_rollout, tis_cap), truncated importance
    sampling against the mismatch of the bf16 rollout copy.
    """
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if rollout_logprobs is not None:
        surrogate = surrogate * (old_logprobs - rollout_logprobs).exp().clamp(max=tis_cap)
    return -(surrogate * mask).sum() / n_tokens


def overlong_penalty(length, limit, buffer):
    """DAPO's soft penalty: 0 up to limit - buffer tokens, then linear to -1 at the limit."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0


# ----------------------------------------------------------------------------------------------------
# rollouts


@dataclass
class Episode(Rollout):
    """A rollout, its text, the checker's verdict on it and the reward."""

    text: str
    verdict: str
    reward: float


def roll_out(model, tokenizer, questions, seeds, args, temperature, label):
    """questions [(prompt ids, gold)] -> one Episode each; a truncated response earns 0."""
    rollouts = generate(model, [prompt for prompt, _ in questions], args.max_new_tokens, temperature, tokenizer.stop_ids,
                        args.slots, seeds, n_ids=tokenizer.n_ids, progress=label)
    texts = [tokenizer.decode(r.tokens) for r in rollouts]
    verdicts = grade_batch(texts, [gold for _, gold in questions])
    return [Episode(**vars(r), text=text, verdict=verdict, reward=float(verdict == "correct" and r.finished))
            for r, text, verdict in zip(rollouts, texts, verdicts)]


def rollout_copy(trainer):
    """The model that generates: on one CPU the trained one itself, else a full copy (bf16 on a GPU)."""
    if trainer.device.type == "cpu" and WORLD == 1:
        return trainer.model
    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    with trainer.device:
        return Transformer(trainer.model.config).to(dtype)


@torch.no_grad()
def refresh(copy, model):
    """The trained weights into the rollout copy; under FSDP every rank gathers, tensor by tensor."""
    if copy is not model:
        for target, source in zip(copy.parameters(), model.parameters()):
            target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


# ----------------------------------------------------------------------------------------------------
# the RL run

SETTINGS = {  # flag: (tiny, a real model on a CPU: a rehearsal, a real model on a GPU; what it is)
    "window": convert_sft.SETTINGS["window"],
    "steps": (40, 2, 500, "RL steps, one rollout batch each"),
    "hours": (0.0, 0.0, 0.0, "stop after these hours of the run, 0: no limit (for equal-time comparisons)"),
    "prompts": (16, 2, 32, "prompts a step"),
    "group": (8, 4, 8, "answers sampled for each prompt, G"),
    "max_new_tokens": (140, 128, 8192, "tokens of a response; a truncated one earns 0"),
    "lr": (7e-4, 1e-6, 1e-6, "learning rate, constant after warm-up"),
    "warmup": (3, 1, 5, "steps of linear warm-up"),
    "temperature": (1.0, 1.0, 1.0, "of sampling and of the policy that is trained; no top-k or top-p"),
    "updates": (1, 1, 1, "optimizer updates a rollout batch; the clip wakes above 1"),
    "validate": (512, 4, 128, "held-out problems for the accuracy before and after RL"),
    "save_every": (1, 1, 1, "steps between checkpoints; kill -9 loses at most these"),
    "data": ("tiny", "openai/gsm8k:main", "BytedTsinghua-SIA/DAPO-Math-17k", "JSONL file or hub id[:config[:split]]"),
    "sft_data": convert_sft.SETTINGS["data"][:3] + ("data of stage 1; with a JSONL file in --data, that file",),
    "sft_steps": convert_sft.SETTINGS["steps"][:3] + ("steps of stage 1, which runs if its checkpoint is missing",),
    "instruction": convert_sft.SETTINGS["instruction"],
    "micro_tokens": convert_sft.SETTINGS["micro_tokens"],
}
HELD_OUT = 5  # percent of the problems, by a hash: never trained on, used for validation


def questions_of_step(args, tokenizer, problems, step, attempt=0):
    """This rank's ([(prompt, gold)], seeds) of a step, each prompt G times: a function of the seed and the
    step alone, whatever the number of ranks."""
    if problems is None:
        chosen = tiny_problems(args.prompts, [args.seed, 7, step, attempt])
    else:
        chosen = draw(problems, (step + attempt * args.steps) * args.prompts, args.prompts, [args.seed, 8])
    seeds = np.random.default_rng([args.seed, 9, step, attempt]).integers(2**62, size=(args.prompts, args.group))
    questions = [(as_prompt(tokenizer, p["problem"], args.instruction), p["answer"]) for p in chosen]
    return [q for q in questions[RANK::WORLD] for _ in range(args.group)], seeds[RANK::WORLD].flatten().tolist()


def informative(rewards):
    """Which groups of rewards (prompts, G) disagree: only these carry a gradient."""
    return (rewards != rewards[:, :1]).any(-1)


def train_rl(args, start):
    """GRPO from the model in folder `start`; returns the run's folder, done already or now."""
    folder, device, G = stage_folder(args, "rl"), pick_device(args.device), args.group
    model = Transformer.from_pretrained(start, device=device, dtype=torch.float32)
    if model.config.window != as_window(args.window):
        raise UsageError(f"{start} has window {model.config.window}, not {args.window}: give its window, or another --out")
    tokenizer = Tokenizer(model.tokenizer_files)
    problems = None if args.data == "tiny" else \
        [p for p in load_problems(args.data) if not held_out(p["problem"], HELD_OUT)]
    same = ("window", "prompts", "group", "max_new_tokens", "lr", "warmup", "temperature", "updates", "data", "instruction",
            "seed", "adv_std", "min_informative", "overlong_buffer", "tis_cap")
    settings = {"stage": "rl", **{name: getattr(args, name) for name in same}}
    trainer = Trainer(model, folder, settings, device, micro_tokens=args.micro_tokens, wandb=args.wandb)
    sampler = rollout_copy(trainer)

    def out_of_time():
        return args.hours and trainer.elapsed() > args.hours * 3600

    def sample_step(step, attempt):
        """Episodes and their rewards (prompts, G)."""
        label = f"step {step + 1}: roll out" if RANK == 0 else None
        episodes = roll_out(sampler, tokenizer, *questions_of_step(args, tokenizer, problems, step, attempt), args,
                            args.temperature, label)
        penalties = [overlong_penalty(len(e.tokens), args.max_new_tokens, args.overlong_buffer) for e in episodes]
        return episodes, torch.tensor([e.reward + p for e, p in zip(episodes, penalties)]).view(-1, G)

    if trainer.done(args.steps) or (out_of_time() and trainer.done(1)):
        return folder
    trainer.begin()
    while trainer.step < args.steps:
        # roll out
        step, began = trainer.step, time.time()
        refresh(sampler, trainer.model)
        episodes, rewards = sample_step(step, 0)
        for attempt in range(1, 4):  # dynamic sampling (DAPO): more prompts until enough groups disagree
            if all_sum([informative(rewards).sum().item()], device)[0] >= args.min_informative:
                break
            more = sample_step(step, attempt)
            episodes, rewards = episodes + more[0], torch.cat((rewards, more[1]))
        rollout_seconds = time.time() - began

        # learn: groups that agree have advantage 0 throughout, so they are left out but stay in n_tokens
        useful, advantages = informative(rewards), group_advantages(rewards, args.adv_std)
        rows = [make_row(e.prompt, e.tokens, advantage=[a] * len(e.tokens), mask=[1.0] * len(e.tokens),
                         rollout_logprobs=e.logprobs)
                for e, a, u in zip(episodes, advantages.flatten().tolist(), useful.repeat_interleave(G)) if u]
        n_tokens, n_useful = all_sum([sum(len(e.tokens) for e in episodes), useful.sum().item()], device)
        sums = {"entropy": 0.0, "logp_gap": 0.0, "tokens": 0.0}

        def loss_fn(logprobs, entropy, m):
            old = m.get("old_logprobs", logprobs.detach())
            sums["entropy"] += (entropy * m["mask"]).sum().item()
            sums["logp_gap"] += ((logprobs.detach() - m["rollout_logprobs"]).abs() * m["mask"]).sum().item()
            sums["tokens"] += m["mask"].sum().item()
            return grpo_loss(logprobs, old, m["advantage"], m["mask"], n_tokens,
                             rollout_logprobs=m["rollout_logprobs"] if args.tis_cap else None, tis_cap=args.tis_cap)

        lr, norm, update_began = schedule(step, args.steps, args.lr, args.warmup), 0.0, time.time()
        if n_useful and args.updates > 1:
            trainer.add_logprobs(rows, "old_logprobs", args.temperature)
        for _ in range(args.updates if n_useful else 0):
            norm = trainer.update(rows, loss_fn, lr, args.temperature)
        seconds, update_seconds = time.time() - began, time.time() - update_began

        # log
        kinds = ("correct", "unparsed", "missing", "timeout")
        n, groups, reward, truncated, solved, entropy, gap, tokens, *counts = all_sum(
            [len(episodes), len(rewards), rewards.sum().item(), sum(not e.finished for e in episodes),
             (rewards > 0).any(-1).sum().item(), *sums.values(), *(sum(e.verdict == k for e in episodes) for k in kinds)],
            device)
        record = {
            "reward": reward / n, f"pass@{G}": solved / groups, "length": n_tokens / n, "truncated": truncated / n,
            "entropy": entropy / max(tokens, 1), "logp_gap": gap / max(tokens, 1), "grad_norm": norm, "lr": lr,
            "groups": groups, "informative": n_useful, **dict(zip(kinds, counts)),
            "tok_per_s": n_tokens / rollout_seconds, "update_tok_per_s": tokens / max(update_seconds, 1e-9),
            "rollout_seconds": rollout_seconds, "update_seconds": update_seconds, "seconds": seconds}
        trainer.log(record, f"rl w={args.window} step {step + 1}/{args.steps} | reward {reward / n:.3f} | len "
                            f"{n_tokens / n:.0f} | ent {record['entropy']:.2f} | norm {norm or 0:.3f} | lr {lr:.1e} | "
                            f"{seconds:.1f} s | {record['tok_per_s']:,.0f} tok/s" + " | all agree" * (not n_useful))
        if RANK == 0:
            with open(folder / "episodes.txt", "a", encoding="utf-8") as f:
                for e in (episodes[0], episodes[-1]):
                    f.write(f"--- step {step + 1} | reward {e.reward:g} | {e.verdict} | {len(e.tokens)} tokens\n"
                            f"{tokenizer.decode(e.prompt)}\n>>> {e.text}\n")
        last, stop = trainer.step >= args.steps or trainer.agreed(out_of_time()), trainer.agreed(trainer.stopping)
        if last or stop or trainer.step % args.save_every == 0:
            trainer.save(final=last)
        if stop and not last:
            raise KeyboardInterrupt
        if last:
            break
    return folder


# ----------------------------------------------------------------------------------------------------
# validation, and the whole recipe


def resample(scores, n=2000, seed=0, stream=0):
    """scores (P problems, R repeats) -> n bootstrap means: problems drawn by seed, repeats by (seed, stream).

    Two models with one seed and different streams thus draw the same problems: a paired bootstrap.
    """
    scores = np.asarray(scores, float)
    P, R = scores.shape
    problem = np.random.default_rng([seed, 0]).integers(P, size=(n, P))
    repeats = np.random.default_rng([seed, 1, stream])
    return sum(scores[problem, repeats.integers(R, size=(n, P))].mean(1) for _ in range(R)) / R


def interval(draws, level=0.95):
    return [float(x) for x in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])]


def bootstrap_ci(scores, level=0.95, seed=0):
    """scores (problems, repeats) -> (mean, low, high): percentile bootstrap over problems and, within each,
    repeats (the paper's intervals are over 8 to 32 repeats of a benchmark)."""
    return float(np.mean(scores)), *interval(resample(scores, seed=seed), level)


def validation_problems(args):
    """Held-out problems: the same before and after RL and for every arm."""
    if args.data == "tiny":
        return tiny_problems(args.validate, [args.seed, 10], test=True)
    problems = [p for p in load_problems(args.data) if held_out(p["problem"], HELD_OUT)][:args.validate]
    if not problems:
        raise UsageError(f"--data {args.data} is too small to hold out problems for validation: give more problems")
    return problems


def validate(folder, args):
    """Held-out accuracy of a stage's model, greedy and at T=1, kept in its folder -> {"greedy", "T=1"}:
    scores (n, 1), mean length in tokens, truncated share, restatements (opened brackets) a response."""
    path, of = folder / "validation.json", [args.data, args.validate, args.max_new_tokens, args.seed]
    if path.exists() and path.stat().st_mtime > (folder / "model.safetensors").stat().st_mtime:
        found = read_json(path)
        if found["of"] == of:
            return found
    model = Transformer.from_pretrained(folder, device=pick_device(args.device))
    tokenizer, found = Tokenizer(model.tokenizer_files), {"of": of}
    questions = [(as_prompt(tokenizer, p["problem"], args.instruction), p["answer"]) for p in validation_problems(args)]
    for name, temperature in (("greedy", 0.0), ("T=1", 1.0)):
        episodes = roll_out(model, tokenizer, questions, 10**6 + args.seed, args, temperature, f"validate {name}:")
        found[name] = {"scores": [[int(e.reward)] for e in episodes],
                       "length": float(np.mean([len(e.tokens) for e in episodes])),
                       "truncated": float(np.mean([not e.finished for e in episodes])),
                       "restatements": float(np.mean([e.text.count("[") for e in episodes]))}
    write_file(path, lambda f: f.write_text(json.dumps(found)))
    return found


def run_arm(args):
    """Stage 1 if its checkpoint is missing, then stage 2; both validated -> {"sft": ..., "rl": ...}."""
    sft = stage_folder(args, "sft")
    if not (sft / "config.json").exists():
        data = args.data if Path(args.data).is_file() and not args.sft_data_given else args.sft_data
        convert(other_stage(args, convert_sft.SETTINGS, window=args.window, instruction=args.instruction,
                            micro_tokens=args.micro_tokens, steps=args.sft_steps, data=data))
    before = validate(sft, args) if RANK == 0 else None
    rl = train_rl(args, sft)
    return {"sft": before, "rl": validate(rl, args) if RANK == 0 else None}


def tiny_recipe(args):
    """Both arms, SA (window full) and SWA, side by side in a process each; then the table and the picture."""
    began = time.time()
    if WORLD > 1:
        raise UsageError("--model tiny compares two arms in a process each: start it without torchrun, or with --window full")
    convert_sft.pretrain_tiny(args)
    sa = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--window", "full"], stdin=subprocess.PIPE,
                          env={**os.environ, "NANOSWARR_ARM": "SA"})
    try:
        swa = run_arm(args)
    finally:
        code = sa.wait()
    if code:
        raise UsageError("the full-attention arm stopped early (see above): the same command continues")
    full = argparse.Namespace(**{**vars(args), "window": "full"})
    arms = {"SA": {stage: validate(stage_folder(full, stage), full) for stage in ("sft", "rl")}, "SWA": swa}
    cells, summary = {}, {}
    for arm, stages in arms.items():
        for stage, found in stages.items():
            cells[arm, stage] = {t: bootstrap_ci(found[t]["scores"]) for t in ("greedy", "T=1")}
            summary[f"{arm.lower()}_{stage}"] = cells[arm, stage]["T=1"][0]
    print(f"\nheld-out accuracy, n = {args.validate}, 95 % bootstrap intervals, window {args.window}, seed {args.seed}\n\n"
          "| model | greedy | T=1 | length | restatements |\n|---|---|---|---|---|")
    for (arm, stage), row in cells.items():
        text = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[t]) for t in row)
        t1 = arms[arm][stage]["T=1"]
        print(f"| {arm}-{stage.upper()} | {text} | {t1['length']:.1f} | {t1['restatements']:.2f} |")
    picture = Path(args.out) / "tiny" / f"recipe-w{args.window}.png"
    draw_recipe(picture, cells, {"SA": stage_folder(full, "rl"), "SWA": stage_folder(args, "rl")}, args)
    print(f"\npicture: {picture}")
    seconds = round(time.time() - began, 1)
    print(json.dumps({**summary, "seconds": seconds, "seed": args.seed, "window": args.window, "n": args.validate}))


def draw_recipe(path, cells, runs, args):
    """Left: accuracy at T=1 after SFT and after RL with intervals; right: reward over RL steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(8, 3.2))
    for i, (arm, color) in enumerate({"SA": "#E69F00", "SWA": "#0072B2"}.items()):
        label = "SA (full attention)" if arm == "SA" else f"SWA (window {args.window})"
        mean, low, high = zip(*(cells[arm, stage]["T=1"] for stage in ("sft", "rl")))
        x = np.arange(2) + 0.4 * i - 0.2
        bars.bar(x, mean, 0.38, color=color, label=label, yerr=np.abs(np.array([low, high]) - mean), capsize=3)
        for at, value, top in zip(x, mean, high):
            bars.text(at, top + 0.02, f"{value:.2f}", ha="center", fontsize=8)
        log = [json.loads(line) for line in (runs[arm] / "log.jsonl").read_text().splitlines()]
        curves.plot(*zip(*((r["step"], r["reward"]) for r in log if "reward" in r)), color=color, label=label)
    bars.set(xticks=[0, 1], xticklabels=["after SFT", "after RL"], ylim=(0, 1.15),
             ylabel=f"accuracy at T=1 (n={args.validate})")
    curves.set(xlabel="RL step", ylabel="mean reward on training prompts", ylim=(0, 1.05))
    curves.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"tiny task, seed {args.seed}, 95 % bootstrap intervals", fontsize=9)
    figure.tight_layout()
    write_file(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    plt.close(figure)


def parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_settings(parser, SETTINGS)
    # alternatives to the defaults
    parser.add_argument("--adv-std", action="store_true", help="divide advantages by the group's standard deviation")
    parser.add_argument("--min-informative", type=int, default=0, help="sample up to 3 times more until so many groups disagree")
    parser.add_argument("--overlong-buffer", type=int, default=0, help="tokens before the limit in which a soft penalty grows")
    parser.add_argument("--tis-cap", type=float, default=0.0, help="truncated importance sampling, such as 2; 0: off")
    parser.add_argument("--slots", type=int, help="sequences that run at a time (default: what free memory holds)")
    return parser


def main():
    args = parser().parse_args()
    args.sft_data_given = args.sft_data is not None
    both = args.model == "tiny" and args.window != "full"
    args = settle(args, SETTINGS)
    if "NANOSWARR_ARM" in os.environ:  # started by tiny_recipe: ends with it, however that ends
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    if args.plan:
        length = args.max_new_tokens + 1024
        return print_plan(args, length, args.slots or args.prompts * args.group, length)
    if both:
        return tiny_recipe(args)
    results = run_arm(args)
    if RANK == 0:
        print(json.dumps({stage: bootstrap_ci(found["T=1"]["scores"]) for stage, found in results.items()}))


if __name__ == "__main__":
    cli(main)
