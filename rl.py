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
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import convert_sft
from convert_sft import (INSTRUCTION, RANK, WORLD, Trainer, add_conversion, add_settings, all_sum, as_prompt, convert,
                         held_out, load_problems, make_row, pick_device, settle, stage_folder, tiny_problems)
from model import Tokenizer, Transformer, UsageError, cli, generate, read_json, write_file

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
# rollouts and validation


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


def validate(model, tokenizer, problems, args, repeats=1):
    """Accuracy on held-out problems -> {"greedy": ..., "T=1": ...}, each with scores (n, repeats), mean
    length in tokens, truncated share, and how often a response restates (opens a bracket)."""
    prompts = [as_prompt(tokenizer, p["problem"], args.instruction) for p in problems]
    results = {}
    for name, temperature, k in (("greedy", 0.0, 1), ("T=1", 1.0, repeats)):
        rollouts = generate(model, [p for p in prompts for _ in range(k)], args.max_new_tokens, temperature,
                            tokenizer.stop_ids, args.slots, seed=10**6 + args.seed, n_ids=tokenizer.n_ids,
                            progress=f"validate {name}")
        texts = [tokenizer.decode(r.tokens) for r in rollouts]
        verdicts = grade_batch(texts, [p["answer"] for p in problems for _ in range(k)])
        right = [v == "correct" and r.finished for v, r in zip(verdicts, rollouts)]
        results[name] = {"scores": np.reshape(right, (-1, k)).astype(int).tolist(),
                         "length": float(np.mean([len(r.tokens) for r in rollouts])),
                         "truncated": float(np.mean([not r.finished for r in rollouts])),
                         "restatements": float(np.mean([t.count("[") for t in texts]))}
    return results


def bootstrap_ci(scores, level=0.95, seed=0, n=2000):
    """scores (problems, repeats) -> (mean, low, high): percentile bootstrap that resamples problems and,
    within each, repeats (the paper's intervals are over 8 to 32 repeats)."""
    scores = np.asarray(scores, float)
    P, R = scores.shape
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        problem = rng.integers(P, size=(P, 1))
        repeat = rng.integers(R, size=(P, R))
        means.append(scores[problem, repeat].mean())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(scores.mean()), float(low), float(high)


# ----------------------------------------------------------------------------------------------------
# the RL run

SETTINGS = {  # flag: (tiny, a real model on a CPU: a rehearsal, a real model on a GPU; what it is)
    "window": convert_sft.SETTINGS["window"],
    "steps": (40, 2, 500, "RL steps, one rollout batch each"),
    "hours": (0.0, 0.0, 0.0, "stop after these hours of training instead, 0: no limit (equal-time comparisons)"),
    "prompts": (16, 2, 32, "prompts a step"),
    "group": (8, 4, 8, "answers sampled for each prompt, G"),
    "max_new_tokens": (140, 128, 8192, "tokens of a response; a truncated one earns 0"),
    "lr": (7e-4, 1e-6, 1e-6, "learning rate, constant after warm-up"),
    "warmup": (3, 1, 5, "steps of linear warm-up"),
    "temperature": (1.0, 1.0, 1.0, "of sampling and of the policy that is trained; no top-k or top-p"),
    "updates": (1, 1, 1, "optimizer updates a rollout batch; the clip wakes above 1"),
    "validate": (512, 4, 128, "held-out problems for accuracy before and after RL"),
    "save_every": (1, 1, 1, "steps between checkpoints; kill -9 loses at most these"),
    "data": ("tiny", "openai/gsm8k:main", "BytedTsinghua-SIA/DAPO-Math-17k", "JSONL file or hub id[:config[:split]]"),
    "sft_data": ("tiny", convert_sft.SETTINGS["data"][1], convert_sft.SETTINGS["data"][2],
                 "data of stage 1, should its checkpoint be missing; with a JSONL --data, the same file"),
    "sft_steps": (*(convert_sft.SETTINGS["steps"][:3]), "steps of stage 1, should its checkpoint be missing"),
    "instruction": ("", INSTRUCTION, INSTRUCTION, "appended to each problem"),
    "micro_tokens": convert_sft.SETTINGS["micro_tokens"],
}


def train_rl(args, start):
    """GRPO from the model in folder `start`; returns the run's folder."""
    folder, device = stage_folder(args, "rl"), pick_device(args.device)
    window = None if args.window == "full" else args.window
    model = Transformer.from_pretrained(start, device=device, dtype=torch.float32)
    if model.config.window != window:
        raise UsageError(f"{start} has window {model.config.window}, not {args.window}: give its --window, or remove it")
    tokenizer = Tokenizer(model.tokenizer_files)
    names = [*SETTINGS, "seed", "adv_std", "min_informative", "overlong_buffer", "tis_cap"]
    left_out = ("steps", "hours", "save_every", "validate", "micro_tokens", "sft_steps", "sft_data")
    settings = {k: getattr(args, k) for k in names if k not in left_out} | {"stage": "rl"}
    trainer = Trainer(model, folder, settings, device, micro_tokens=args.micro_tokens)
    sampler = rollout_copy(trainer)
    problems = None if args.data == "tiny" else [p for p in load_problems(args.data) if not held_out(p["problem"], 5)]
    G, limit = args.group, args.hours * 3600 or float("inf")

    def batch_of(step, attempt):
        """This rank's (prompt, gold, seeds) of a step: a function of the seed, the step and nothing else."""
        if problems is None:
            chosen = tiny_problems(args.prompts, [args.seed, 7, step, attempt])
        else:
            first = (step + attempt * 10**6) * args.prompts
            order = np.concatenate([np.random.default_rng([args.seed, 8, e]).permutation(len(problems)) for e in
                                    range(first // len(problems), (first + args.prompts - 1) // len(problems) + 1)])
            chosen = [problems[i] for i in order[first % len(problems):][:args.prompts]]
        seeds = np.random.default_rng([args.seed, 9, step, attempt]).integers(2**62, size=(args.prompts, G))
        return [(as_prompt(tokenizer, p["problem"], args.instruction), p["answer"], seeds[i].tolist())
                for i, p in enumerate(chosen)][RANK::WORLD]

    def roll_out(step, attempt):
        """(rollouts, texts, verdicts, rewards (prompts, G)) of this rank."""
        batch = batch_of(step, attempt)
        rollouts = generate(sampler, [p for p, _, _ in batch for _ in range(G)], args.max_new_tokens, args.temperature,
                            tokenizer.stop_ids, args.slots, seed=[s for _, _, seeds in batch for s in seeds],
                            n_ids=tokenizer.n_ids, progress=f"step {step + 1}: roll out")
        texts = [tokenizer.decode(r.tokens) for r in rollouts]
        verdicts = grade_batch(texts, [gold for _, gold, _ in batch for _ in range(G)])
        rewards = [float(v == "correct" and r.finished)
                   + overlong_penalty(len(r.tokens), args.max_new_tokens, args.overlong_buffer)
                   for v, r in zip(verdicts, rollouts)]
        return rollouts, texts, verdicts, torch.tensor(rewards).view(-1, G)

    while trainer.step < args.steps and trainer.seconds + time.time() - trainer.began < limit and not trainer.stopping:
        step, began = trainer.step, time.time()
        refresh(sampler, trainer.model)
        rollouts, texts, verdicts, rewards = roll_out(step, 0)
        attempt = 0  # dynamic sampling (DAPO): more prompts until enough groups disagree
        while all_sum([informative(rewards).sum().item()], device)[0] < args.min_informative and attempt < 4:
            attempt += 1
            more = roll_out(step, attempt)
            rollouts, texts, verdicts = rollouts + more[0], texts + more[1], verdicts + more[2]
            rewards = torch.cat((rewards, more[3]))
        rollout_seconds = time.time() - began
        advantages = group_advantages(rewards, args.adv_std)
        useful = informative(rewards)
        rows = [make_row(r.prompt, r.tokens, advantage=[a] * len(r.tokens), rollout_logprobs=r.logprobs, mask=[1.0] * len(
            r.tokens)) for r, a, u in zip(rollouts, advantages.flatten().tolist(), useful.repeat_interleave(G)) if u]
        n_tokens, n_useful = all_sum([sum(len(r.tokens) for r in rollouts), useful.sum().item()], device)
        sums = {"entropy": 0.0, "logp_gap": 0.0, "tokens": 0.0}

        def loss_fn(logprobs, entropy, m):
            old = m.get("old_logprobs", logprobs.detach())
            sums["entropy"] += (entropy * m["mask"]).sum().item()
            sums["logp_gap"] += ((logprobs.detach() - m["rollout_logprobs"]).abs() * m["mask"]).sum().item()
            sums["tokens"] += m["mask"].sum().item()
            return grpo_loss(logprobs, old, m["advantage"], m["mask"], n_tokens,
                             rollout_logprobs=m["rollout_logprobs"] if args.tis_cap else None, tis_cap=args.tis_cap)

        lr = convert_sft.schedule(step, args.steps, args.lr, args.warmup)
        norm, update_began = 0.0, time.time()
        if n_useful:  # else every group agrees: nothing to learn from, and no update
            if args.updates > 1:
                trainer.add_logprobs(rows, "old_logprobs", args.temperature)
            for _ in range(args.updates):
                norm = trainer.update(rows, loss_fn, lr, args.temperature)
        seconds, update_seconds = time.time() - began, time.time() - update_began
        entropy, gap, tokens = all_sum(list(sums.values()), device)
        n, correct, length, truncated, solved, groups, *kinds = all_sum(
            [len(rollouts), sum(v == "correct" for v in verdicts), sum(len(r.tokens) for r in rollouts),
             sum(not r.finished for r in rollouts), (rewards > 0).any(-1).sum().item(), len(rewards),
             *(sum(v == k for v in verdicts) for k in ("unparsed", "missing", "timeout"))], device)
        reward = all_sum([rewards.sum().item()], device)[0] / n
        record = {"reward": reward, "accuracy": correct / n, f"pass@{G}": solved / groups, "length": length / n,
                  "truncated": truncated / n, "entropy": entropy / max(tokens, 1), "logp_gap": gap / max(tokens, 1),
                  "grad_norm": norm, "lr": lr, "informative": n_useful, "groups": groups,
                  **dict(zip(("unparsed", "missing", "timeout"), kinds)),
                  "tok_per_s": n_tokens / rollout_seconds, "update_tok_per_s": tokens / max(update_seconds, 1e-9),
                  "rollout_seconds": rollout_seconds, "update_seconds": update_seconds, "seconds": seconds}
        trainer.log(record, f"rl w={args.window} step {step + 1}/{args.steps} | reward {reward:.3f} | len {length / n:.0f} | "
                            f"ent {record['entropy']:.2f} | norm {norm or float('nan'):.2f} | lr {lr:.1e} | {seconds:.1f} s "
                            f"| {record['tok_per_s']:,.0f} tok/s" + ("" if n_useful else " | all groups agree: no update"))
        if RANK == 0:
            with open(folder / "episodes.txt", "a") as f:
                for r, text, reward in list(zip(rollouts, texts, rewards.flatten().tolist()))[::max(1, len(texts) // 2)]:
                    f.write(f"--- step {step + 1}, reward {reward:g}, {len(r.tokens)} tokens\n"
                            f"{tokenizer.decode(r.prompt)}\n>>> {text}\n")
        if trainer.step % args.save_every == 0 or trainer.step == args.steps or trainer.stopping:
            trainer.save()
    if trainer.stopping:
        raise KeyboardInterrupt
    if not (folder / "config.json").exists() or read_json(folder / "config.json").get("rl_step") != trainer.step:
        trainer.model.config.extra["rl_step"] = trainer.step
        trainer.save(final=True)
    return folder


def informative(rewards):
    """Which groups (prompts, G) disagree: only these carry a gradient."""
    return (rewards != rewards[:, :1]).any(-1)


# ----------------------------------------------------------------------------------------------------
# the whole recipe


def run_arm(args):
    """Stage 1 if its checkpoint is missing, stage 2, and validation of both -> the two results."""
    sft = stage_folder(args, "sft")
    stage1 = argparse.Namespace(**vars(args))
    for name in convert_sft.SETTINGS:
        setattr(stage1, name, getattr(args, name) if name in ("window", "instruction", "micro_tokens") else None)
    stage1.steps, stage1.data = args.sft_steps, args.sft_data
    settle(stage1, convert_sft.SETTINGS)
    if not (sft / "config.json").exists():
        convert(stage1)
    results = {}
    if args.data == "tiny":
        problems = tiny_problems(args.validate, [args.seed, 10], test=True)
    else:
        problems = [p for p in load_problems(args.data) if held_out(p["problem"], 5)][:args.validate]
    for stage in ("sft", "rl"):
        folder = sft if stage == "sft" else train_rl(args, sft)
        model = Transformer.from_pretrained(folder, device=pick_device(args.device))
        if not (folder / "validation.json").exists() or stage == "rl":
            found = validate(model, Tokenizer(model.tokenizer_files), problems, args)
            write_file(folder / "validation.json", lambda f: f.write_text(json.dumps(found)))
        results[stage] = read_json(folder / "validation.json")
    return results


def tiny_recipe(args):
    """Both arms side by side, SA (window full) and SWA, one process each; then the table and the picture."""
    began = time.time()
    convert_sft.pretrain_tiny(args)
    other = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--window", "full", "--one-arm"])
    swa = run_arm(args)
    if other.wait():
        raise UsageError("the full-attention arm stopped; the same command continues")
    args_full = argparse.Namespace(**{**vars(args), "window": "full"})
    arms = {"SA": {s: read_json(stage_folder(args_full, s) / "validation.json") for s in ("sft", "rl")}, "SWA": swa}
    print(f"\n| model | greedy | T=1 | length | restatements | n |\n|---|---|---|---|---|---|")
    summary = {}
    for arm, stages in arms.items():
        for stage, found in stages.items():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap_ci(found[t]["scores"])) for t in ("greedy", "T=1")]
            t1 = found["T=1"]
            summary[f"{arm.lower()}_{stage}"] = float(np.mean(t1["scores"]))
            print(f"| {arm}-{stage.upper()} | {' | '.join(cells)} | {t1['length']:.1f} | {t1['restatements']:.2f} | "
                  f"{len(t1['scores'])} |")
    print(json.dumps({**summary, "seconds": round(time.time() - began, 1), "seed": args.seed, "window": args.window}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_settings(parser, SETTINGS)
    add_conversion(parser)
    parser.add_argument("--slots", type=int, help="sequences that run at a time (default: by free memory)")
    parser.add_argument("--adv-std", action="store_true", help="divide advantages by the group's standard deviation")
    parser.add_argument("--min-informative", type=int, default=0, help="sample more prompts until so many groups disagree")
    parser.add_argument("--overlong-buffer", type=int, default=0, help="tokens before the limit where a soft penalty grows")
    parser.add_argument("--tis-cap", type=float, default=0.0, help="truncated importance sampling, 0: off")
    parser.add_argument("--one-arm", action="store_true", help="with tiny: this window only")
    args = settle(parser.parse_args(), SETTINGS)
    if args.model == "tiny" and args.window != "full" and not args.one_arm:
        return tiny_recipe(args)
    results = run_arm(args)
    print(json.dumps({s: float(np.mean(r["T=1"]["scores"])) for s, r in results.items()}))


if __name__ == "__main__":
    cli(main)
