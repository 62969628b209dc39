"""Evaluation: benchmarks with intervals, the locality of trajectories, and the paper's analyses.

Answers are sampled under the model's own window and graded by the checker that was the reward; accuracies
come with bootstrap intervals over problems and repeats, and with what qualifies them: the truncated share and
the length. Locality asks how much a trajectory leans on what lies beyond a window. The analyses set SA
against SWA: each is a table of runs, made by the stages of convert_sft.py and rl.py and reused where they are
done, and ends in a Markdown table, a JSON file and a picture.

Left out on purpose: few-shot prompts, multiple-choice benchmarks, judges that are models, other engines.

    python eval.py --model out/tiny/rl-w24 out/tiny/sft-w24 --benchmarks tiny --samples 8
    python eval.py --analysis locality --model tiny
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import convert_sft
import rl
from convert_sft import (INSTRUCTION, as_problem, as_prompt, convert, describe_machine, held_out, load_problems, make_row,
                         pick_device, pretrain_tiny, schedule, settle, stage_folder, tiny_base, tiny_problems, window_arg)
from model import (LOGITS_PER_CHUNK, Tokenizer, Transformer, UsageError, cli, generate, log_softmax, read_json,
                   write_file)
from rl import bootstrap_ci, extract_answer, grade_batch, is_correct, run_arm, validate
from swa_kernel import swa_attention

# ----------------------------------------------------------------------------------------------------
# benchmarks

BENCHMARKS = {  # name: hub id, configuration, split, field of the problem, field of the answer
    "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"),
}


def load_benchmark(name, seed=0):
    """A name of BENCHMARKS, `tiny` (rl.py's validation problems of that seed) or a JSONL file -> problems."""
    if name == "tiny":
        return tiny_problems(512, [seed, 10], test=True)
    if name not in BENCHMARKS:
        if not Path(name).is_file():
            raise UsageError(f"--benchmarks {name}: no such file; give a JSONL file or names out of tiny, "
                             f"{', '.join(BENCHMARKS)}")
        return load_problems(name)
    import datasets  # imported here since it takes more than a second

    hub_id, config, split, problem, answer = BENCHMARKS[name]
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # network, moved, gated: many types, one cure
        raise UsageError(f"--benchmarks {name}: {hub_id} could not be fetched from the hub: check the connection, or give "
                         f"the problems as a JSONL file ({type(error).__name__})") from None
    rows = [(row[problem], row[answer]) for row in rows]
    return [as_problem({"problem": p, "answer": ",".join(a) if isinstance(a, list) else a}) for p, a in rows]


# ----------------------------------------------------------------------------------------------------
# sampling and grading


def sample_answers(model, tokenizer, problems, k, args, first=0, label=None):
    """k answers to each problem, in order; answer j to problem first + i depends on (seed, first + i, j) only."""
    prompts = [as_prompt(tokenizer, p["problem"], args.instruction) for p in problems]
    seeds = [np.random.default_rng([args.seed, 11, first + i]).integers(2**62, size=k).tolist()
             for i in range(len(problems))]
    return generate(model, [p for p in prompts for _ in range(k)], args.max_new_tokens, args.temperature,
                    tokenizer.stop_ids, args.slots, seed=[s for row in seeds for s in row],
                    top_p=getattr(args, "top_p", 1.0), n_ids=tokenizer.n_ids, progress=label)


def grade(records):
    """Sets each record's verdicts; an answer that was cut off is wrong whatever it says, as in training."""
    graded = iter(grade_batch([text for r in records for text in r["responses"]],
                              [r["answer"] for r in records for _ in r["responses"]]))
    for r in records:
        verdicts = [next(graded) for _ in r["responses"]]
        r["verdicts"] = [v if finished else "truncated" for v, finished in zip(verdicts, r["finished"])]


def read_generations(file):
    """-> (settings, a record for each problem); a last line that an interruption cut off is left out."""
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as generations of eval.py ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UsageError(f"{file} line {number} is not JSON: remove the file to generate again") from None
    known = {"problem", "answer", "responses", "lengths", "finished"}
    if not rows or "settings" not in rows[0] or any(not known <= row.keys() for row in rows[1:]):
        raise UsageError(f"{file} does not hold generations of eval.py: the first line has the settings, the others "
                         "one problem each")
    return rows[0]["settings"], rows[1:]


def fingerprint(model):
    """A short hash of the weights: generations of another training run are not continued."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def answer_benchmark(model, tokenizer, problems, file, settings, args):
    """Generates and grades what `file` does not hold yet, chunk by chunk; -> a record for each problem.

    A chunk is appended when its problems are done. An interrupted one is done again as a whole: the same
    sequences then run side by side, so that not even rounding tells the result from an undisturbed run.
    """
    records = []
    if file.exists():
        old, records = read_generations(file)
        differ = [key for key in settings if old.get(key) != settings[key]]
        if differ or any(r["problem"] != p["problem"] for r, p in zip(records, problems)):
            raise UsageError(f"{file} holds generations with other settings ({', '.join(differ) or 'other problems'}): give "
                             "the same flags, another --out, or remove it")
    if len(records) < len(problems):
        records = records[:len(records) // args.chunk * args.chunk]
        lines = [json.dumps(row) + "\n" for row in ({"settings": settings}, *records)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lambda f: f.write_text("".join(lines)))
    for first in range(len(records), len(problems), args.chunk):
        chunk, k = problems[first:first + args.chunk], args.samples
        rollouts = sample_answers(model, tokenizer, chunk, k, args, first, f"problems {first}-{first + len(chunk) - 1}:")
        new = []
        for i, p in enumerate(chunk):
            mine = rollouts[i * k:(i + 1) * k]
            new.append({"problem": p["problem"], "answer": p["answer"],
                        "responses": [tokenizer.decode(r.tokens) for r in mine],
                        "lengths": [len(r.tokens) for r in mine], "finished": [r.finished for r in mine]})
        grade(new)
        with open(file, "a") as f:
            f.write("".join(json.dumps(r) + "\n" for r in new))
        records += new
    return records[:len(problems)]


def stream_answer(model, tokenizer, prompt, args):
    """Prints one answer as it comes; bytes of an unfinished character wait for the rest of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(i, tokens):
        data = b"".join(tokenizer.pieces.get(t, b"") for t in tokens if t not in tokenizer.special_ids)
        print(decoder.decode(data), end="", flush=True)

    ids = as_prompt(tokenizer, prompt, args.instruction)
    limit = args.max_new_tokens or min(32768, model.config.max_position_embeddings - len(ids))
    began = time.time()
    rollout, = generate(model, [ids], limit, args.temperature, tokenizer.stop_ids, 1, seed=args.seed, top_p=args.top_p,
                        n_ids=tokenizer.n_ids, stream=show)
    print(decoder.decode(b"", final=True))
    print(f"[{len(rollout.tokens)} tokens, {len(rollout.tokens) / (time.time() - began):.0f} tok/s"
          f"{'' if rollout.finished else ', cut off at --max-new-tokens'}]", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------
# statistics


def resample(scores, n=2000, seed=0, stream=0):
    """scores (P problems, R repeats) -> n bootstrap means: problems drawn by seed, repeats by (seed, stream).

    Two models with one seed and different streams thus draw the same problems: a paired bootstrap.
    """
    scores = np.asarray(scores, float)
    P, R = scores.shape
    problem = np.random.default_rng([seed, 0]).integers(P, size=(n, P))
    repeats = np.random.default_rng([seed, 1, stream])
    return sum(scores[problem, repeats.integers(R, size=(n, P)) if R > 1 else 0].mean(1) for _ in range(R)) / R


def interval(draws, level=0.95):
    return [float(q) for q in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])]


def paired_bootstrap(a, b, seed=0):
    """Scores (P, R) of two models on the same problems -> (mean(b) - mean(a), low, high, p).

    p is two-sided, under the null that the true difference is 0: the share of draws at least as far from the
    observed difference as that is from 0 (the bootstrap distribution shifted; Efron and Tibshirani, ch. 16).
    """
    if len(a) != len(b):
        raise ValueError(f"paired_bootstrap needs the same problems for both: {len(a)} and {len(b)}")
    observed = float(np.mean(b) - np.mean(a))
    draws = resample(b, seed=seed, stream=1) - resample(a, seed=seed, stream=0)
    far = np.abs(draws - observed) >= abs(observed) - 1e-12
    return observed, *interval(draws), float((1 + far.sum()) / (1 + len(draws)))


def over_seeds(groups, seed=0):
    """One array (P, R) for each training seed -> a cell: mean, interval, n (problems), the seeds' means.

    Seeds are resampled, then problems, then repeats. A single seed's interval says nothing about training.
    """
    draws = np.stack([resample(scores, seed=[seed, i]) for i, scores in enumerate(groups)])
    rng = np.random.default_rng([seed, 2])
    pick = rng.integers(len(groups), size=(draws.shape[1], len(groups)))
    means = draws[pick, rng.integers(draws.shape[1], size=pick.shape)].mean(1)
    seeds = [float(np.mean(scores)) for scores in groups]
    low, high = interval(means)
    return {"mean": float(np.mean(seeds)), "low": low, "high": high, "n": sum(map(len, groups)), "seeds": seeds}


def pass_at_k(correct, n, k):
    """The chance that k of n answers, drawn without repetition, hold a right one (arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(responses, verdicts):
    """Whether the most frequent answer is right; ties share, and an answer cut off or missing has no vote."""
    votes = []  # [answer, count, right]
    for text, verdict in zip(responses, verdicts):
        answer = extract_answer(text) if verdict != "truncated" else None
        for vote in votes if answer is not None else ():
            if vote[0] == answer or is_correct(f"\\boxed{{{answer}}}", vote[0]):
                vote[1] += 1
                break
        else:
            if answer is not None:
                votes.append([answer, 1, verdict == "correct"])
    return float(np.mean([right for _, count, right in votes if count == max(v[1] for v in votes)])) if votes else 0.0


def scores_of(records):
    return np.array([[v == "correct" for v in r["verdicts"]] for r in records], float)  # (P, R)


def measure(records):
    """What one model did on one benchmark, as cells and numbers."""
    scores = scores_of(records)
    n, k = scores.shape
    passed = {j: [[pass_at_k(int(s.sum()), k, j)] for s in scores] for j in sorted({*(2**e for e in range(9)), k}) if j <= k}
    kinds = [v for r in records for v in r["verdicts"]]
    return {f"avg@{k}": over_seeds([scores]), f"pass@{k}": over_seeds([passed[k]]),
            f"maj@{k}": over_seeds([[[majority(r["responses"], r["verdicts"])] for r in records]]),
            "truncated": kinds.count("truncated") / len(kinds), "length": float(np.mean([r["lengths"] for r in records])),
            "n": n, "pass@": {j: float(np.mean(p)) for j, p in passed.items()},
            "verdicts": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


# ----------------------------------------------------------------------------------------------------
# locality: what a trajectory owes to the tokens beyond a window


def states(model, tokens):
    """tokens (N, T) -> the last layer's states (N, T, C), from position 0 on."""

    def attend(layer, q, k, v):
        return swa_attention(q, k, v, model.config.windows[layer])

    return model.hidden(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], attend)


@torch.no_grad()
def token_gaps(reference, rollouts, window, positions=None, micro_tokens=16384):
    """-> for each rollout a tensor (2, response tokens), nats: the sampled log-ratio and its expectation.

    log p(x_t | all before) - log p(x_t | the last `window` tokens), and KL(p(. | all before) || p(. | the last
    `window`)), both under `reference`; our stand-in for Eq. 4, after LongPPL's long-short difference (arXiv
    2410.23771). Exact: the last W tokens are run on their own, since a windowed forward pass lets layers hop
    past W; RoPE is relative, so they may begin at position 0. positions: at most so many tokens of each
    rollout, evenly spaced, the others NaN (a long response under a large model).
    """
    results, jobs, full = [], [], []
    for r in rollouts:
        ids = torch.tensor(list(r.prompt) + list(r.tokens), device=reference.device)
        gap = torch.zeros(2, len(r.tokens), dtype=torch.promote_types(reference.dtype, torch.float32))
        at = np.arange(max(len(r.prompt), window + 1), len(ids))  # before, the window holds everything: 0
        if positions and len(at) > positions:
            gap[:, at - len(r.prompt)] = float("nan")
            at = at[np.linspace(0, len(at) - 1, positions).round().astype(int)]
        jobs += [(gap, ids, t, t - len(r.prompt)) for t in at.tolist()]
        full.append(states(reference, ids[None])[0, at - 1])  # (tokens asked, C)
        results.append(gap)
    full = torch.cat(full) if full else None
    size = max(1, min(micro_tokens // window, LOGITS_PER_CHUNK // reference.config.vocab_size))
    for i in range(0, len(jobs), size):
        some = jobs[i:i + size]
        short = states(reference, torch.stack([ids[t - window:t] for _, ids, t, _ in some]))[:, -1]  # (n, C)
        p, q = (log_softmax(reference.lm_head(x)) for x in (full[i:i + size], short))  # (n, V)
        sampled = torch.stack([ids[t] for _, ids, t, _ in some])[:, None]
        both = torch.stack([(p - q).gather(1, sampled)[:, 0], (p.exp() * (p - q)).sum(-1)]).cpu()
        for n, (gap, _, _, at) in enumerate(some):
            gap[:, at] = both[:, n]
    return results


def information_gap(reference, rollouts, window, expected=False, positions=None):
    """-> for each rollout a tensor (response tokens,) of gaps in nats: the sampled log-ratio, or its
    expectation over the reference's next token, which an improbable (say, wrong) sample cannot turn negative."""
    return [gap[int(expected)] for gap in token_gaps(reference, rollouts, window, positions)]


# ----------------------------------------------------------------------------------------------------
# the analyses: tables of runs


def seed_out(args, seed):
    """Seed 0 shares --out with rl.py's plain command; another has out/seedN (rl.py --seed N --out out/seedN)."""
    return Path(args.out) / f"seed{seed}" if seed else Path(args.out)


def recipe(args, seed, variant=None, **changes):
    """The arguments of `rl.py --model ...` for a seed, with changes; a variant has its runs in a folder of its own.

    The flags that eval.py does not know go to rl.py's parser: an analysis of a real model takes them all.
    """
    stage = rl_parser().parse_args(["--model", args.model[0], *args.rest])
    given = {"seed": seed, "device": args.device, "slots": args.slots, "window": args.window, "out": seed_out(args, seed),
             "max_new_tokens": args.max_new_tokens}
    for name, value in {**given, **changes}.items():
        if value is not None:
            setattr(stage, name, value)
    settle(stage, rl.SETTINGS)
    if variant:
        home = stage_folder(stage, "sft").parent
        stage.out = home / "analysis" / "runs" / variant
        for name in ("base-wfull",) * (args.model[0] == "tiny"):
            copy_run(home / name, stage_folder(stage, "sft").parent / name)
    stage.out = str(stage.out)
    return stage


def rl_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    convert_sft.add_settings(parser, rl.SETTINGS)
    convert_sft.add_conversion(parser)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--adv-std", action="store_true")
    parser.add_argument("--min-informative", type=int, default=0)
    parser.add_argument("--overlong-buffer", type=int, default=0)
    parser.add_argument("--tis-cap", type=float, default=0.0)
    return parser


def copy_run(source, target):
    """A finished stage without its checkpoints, so that a variant goes on from it."""
    if not (target / "config.json").exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*", "log.jsonl"), dirs_exist_ok=True)


def run_all(job, tasks, workers):
    """[job(*task) for task in tasks], in so many processes."""
    if workers < 2 or len(tasks) < 2:
        return [job(*task) for task in tasks]
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*tasks)))


def bases(args):
    if args.model[0] == "tiny":
        run_all(pretrain_tiny, [(recipe(args, seed),) for seed in args.seeds], args.workers)


def arms(args, variants):
    """{label: changes to the recipe} -> {label: [results of run_arm for each seed]}; what is done is reused."""
    bases(args)
    tasks = [(recipe(args, seed, **changes),) for changes in variants.values() for seed in args.seeds]
    results = iter(run_all(run_arm, tasks, args.workers))
    return {label: [next(results) for _ in args.seeds] for label in variants}


def cell(results, stage, name="T=1"):
    return over_seeds([r[stage][name]["scores"] for r in results])


def mean_of(results, stage, what, name="T=1"):
    return float(np.mean([r[stage][name][what] for r in results]))


def accuracy_rows(found, stages=("sft", "rl")):
    """A table row for each label and stage of arms()."""
    return [{"run": label, "stage": stage.upper(), "greedy": cell(results, stage, "greedy"), "T=1": cell(results, stage),
             "length": mean_of(results, stage, "length"), "truncated": mean_of(results, stage, "truncated"),
             "restatements": mean_of(results, stage, "restatements")} for label, results in found.items() for stage in stages]


def windows(args):
    """SA and SWA after SFT and after RL, by window."""
    sizes = args.windows or [16, 20, 24, 32, "full"]
    found = arms(args, {f"w={w}": {"window": w} for w in sizes})
    series = {f"{kind}-{stage.upper()}": [cell(found[f"w={w}"], stage) if (w == "full") == (kind == "SA") else None
                                          for w in sizes] for kind in ("SA", "SWA") for stage in ("sft", "rl")}
    lengths = {label: [mean_of(found[f"w={w}"], label[-3:].strip("-").lower(), "length") if c else None
                       for w, c in zip(sizes, cells)] for label, cells in series.items()}
    x = [str(w) for w in sizes]
    return accuracy_rows(found), [
        {"kind": "line", "title": "accuracy, T=1", "x": x, "xlabel": "window, keys", "ylabel": "accuracy", "series": series},
        {"kind": "line", "title": "length", "x": x, "xlabel": "window, keys", "ylabel": "tokens a response",
         "series": lengths}]


def held_out_problems(stage, n):
    if stage.data == "tiny":
        return tiny_problems(n, [stage.seed, 12], test=True)
    return [p for p in load_problems(stage.data) if held_out(p["problem"], 5)][:n]


def policies(args, seed):
    """label -> folder of SA and SWA after both stages (run before by arms)."""
    full, swa = recipe(args, seed, window="full"), recipe(args, seed)
    return {"SA-SFT": stage_folder(full, "sft"), "SWA-SFT": stage_folder(swa, "sft"),
            "SA-RL": stage_folder(full, "rl"), "SWA-RL": stage_folder(swa, "rl")}


def sampled(folder, problems, stage):
    """One answer to each problem at T=1 -> (rollouts, texts, whether right)."""
    model = Transformer.from_pretrained(folder, device=pick_device(stage.device))
    tokenizer = Tokenizer(model.tokenizer_files)
    rollouts = sample_answers(model, tokenizer, problems, 1, stage, label=f"{folder}:")
    texts = [tokenizer.decode(r.tokens) for r in rollouts]
    verdicts = grade_batch(texts, [p["answer"] for p in problems])
    return rollouts, texts, [v == "correct" and r.finished for v, r in zip(verdicts, rollouts)]


def trajectory_gaps(folder, reference, stage, sizes, n, positions):
    """Locality of one policy: for each window the per-trajectory means, and for the main one where they sit."""
    rollouts, texts, right = sampled(folder, held_out_problems(stage, n), stage)
    reference = Transformer.from_pretrained(reference, device=pick_device(stage.device), dtype=torch.float32)
    tokenizer, found = Tokenizer(reference.tokenizer_files), {"right": right, "lengths": [len(r.tokens) for r in rollouts]}
    for w in sizes:
        gaps = token_gaps(reference, rollouts, w, positions)
        found[w] = {"ratio": [g[0].nanmean().item() for g in gaps], "kl": [g[1].nanmean().item() for g in gaps]}
        if w == stage.window:  # by tenths of the response, and token by token in one of middling length
            tenths = [[t.nanmean().item() for t in g[1].tensor_split(10)] for g in gaps]
            found["tenths"] = np.nanmean(tenths, 0).tolist()
            one = sorted(range(n), key=lambda i: (len(rollouts[i].prompt), i))[n // 4]
            found["strip"] = [(tokenizer.decode([t], skip_special=False), k) for t, k in
                              list(zip(rollouts[one].tokens, gaps[one][1].tolist()))[:80]]
    return found


def locality(args):
    """How far back trajectories lean: the gap under the SA-SFT reference, by policy and window."""
    main = recipe(args, args.seeds[0]).window
    sizes = sorted({*(w for w in args.windows or [8, 12, 16, 24, 32, 48] if w != "full"), main})
    arms(args, {"SA": {"window": "full"}, "SWA": {}})
    tasks = [(folder, policies(args, seed)["SA-SFT"], recipe(args, seed), sizes, args.limit or 256, args.positions)
             for seed in args.seeds for folder in policies(args, seed).values()]
    found = run_all(trajectory_gaps, tasks, args.workers)
    found = {label: found[i::4] for i, label in enumerate(policies(args, 0))}

    def gap(label, w, form, only_right=False, scale=False):
        return over_seeds([[[v * (length if scale else 1)] for v, right, length in
                            zip(f[w][form], f["right"], f["lengths"]) if right or not only_right] for f in found[label]])

    rows = [{"policy": label, "trajectories": "correct" if only else "all", "KL, nats/token": gap(label, main, "kl", only),
             "log-ratio, nats/token": gap(label, main, "ratio", only),
             "KL, nats/trajectory": gap(label, main, "kl", only, scale=True),
             "length": float(np.mean([n for f in found[label] for n, r in zip(f["lengths"], f["right"]) if r or not only]))}
            for label in found for only in (False, True)]
    curve = {label: [gap(label, w, "kl", True) for w in sizes] for label in found}
    where = {label: np.mean([f["tenths"] for f in found[label]], 0).tolist() for label in found}
    strips = [{"kind": "strip", "title": f"one answer of {label}, token by token (W={main})", "ylabel": "KL, nats",
               "x": [token for token, _ in found[label][0]["strip"]], "xlabel": "",
               "series": {label: [k for _, k in found[label][0]["strip"]]}} for label in ("SA-RL", "SWA-RL")]
    return rows, [
        {"kind": "bar", "title": f"W={main}", "x": list(found), "xlabel": "", "ylabel": "KL, nats a token", "series": {
            "all": [gap(label, main, "kl") for label in found], "correct only": [gap(label, main, "kl", True) for label in found]}},
        {"kind": "line", "title": "correct only, by window", "x": sizes, "xlabel": "window, tokens",
         "ylabel": "KL, nats a token", "series": curve},
        {"kind": "line", "title": f"along the response (W={main})", "x": list(range(5, 100, 10)),
         "xlabel": "% of the response", "ylabel": "KL, nats a token", "series": where}], strips


def length_matched(a, b, bins=10):
    """Indices into the lengths a and b with as many of each bin of length on both sides."""
    edges = np.linspace(min(*a, *b), max(*a, *b) + 1, bins + 1)[1:-1]
    sides = [np.digitize(side, edges) for side in (a, b)]
    chosen = [[], []]
    for bin in range(bins):
        here = [np.flatnonzero(side == bin) for side in sides]
        for mine, indices in zip(chosen, here):
            mine += indices[:min(map(len, here))].tolist()
    return chosen


def student(args, seed, kind, window, rows):
    """A fresh student from the base: SFT on rows, then rl.py's validation."""
    variant = f"cross-sft/{kind}"
    stage = recipe(args, seed, variant, window=window)
    file = Path(stage.out) / "data.jsonl"
    if not file.exists():
        write_file(file, lambda f: f.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    sft = argparse.Namespace(**vars(stage))
    for name in convert_sft.SETTINGS:
        setattr(sft, name, getattr(stage, name) if name in ("window", "instruction", "micro_tokens") else None)
    sft.steps, sft.data = args.sft_steps, str(file)
    folder = convert(settle(sft, convert_sft.SETTINGS))
    model = Transformer.from_pretrained(folder, device=pick_device(stage.device))
    problems = tiny_problems(stage.validate, [seed, 10], test=True) if stage.data == "tiny" else \
        held_out_problems(stage, stage.validate)
    return {"sft": validate(model, Tokenizer(model.tokenizer_files), problems, stage)}


def trajectories(args, seed):
    """Correct T=1 answers of SA-RL and SWA-RL to the same training problems -> kind of data -> JSONL rows."""
    stage, sides = recipe(args, seed), {}
    problems = tiny_problems(args.limit or 1200, [seed, 13]) if stage.data == "tiny" else \
        [p for p in load_problems(stage.data) if not held_out(p["problem"], 5)][:args.limit or 1200]
    for kind in ("SA", "SWA"):
        rollouts, texts, right = sampled(policies(args, seed)[f"{kind}-RL"], problems, stage)
        sides[kind] = [{**p, "solution": text, "tokens": len(r.tokens)} if ok else None
                       for p, text, r, ok in zip(problems, texts, rollouts, right)]
    both = [i for i in range(len(problems)) if sides["SA"][i] and sides["SWA"][i]]
    data = {("paired", kind): [sides[kind][i] for i in both] for kind in sides}
    correct = {kind: [row for row in rows if row] for kind, rows in sides.items()}
    chosen = length_matched(*([row["tokens"] for row in rows] for rows in correct.values()))
    return data | {("matched", kind): [correct[kind][i] for i in indices] for kind, indices in zip(correct, chosen)}


def cross_sft(args):
    """Paper's Table 4: students of both architectures on trajectories of both policies, correct ones only."""
    arms(args, {"SA": {"window": "full"}, "SWA": {}})
    data = run_all(trajectories, [(args, seed) for seed in args.seeds], args.workers)
    kinds = [(*key, kind, window) for key in data[0] for kind, window in (("SA", "full"), ("SWA", None))]
    tasks = [(args, seed, f"{pairing}-{teacher}", window, mine[pairing, teacher])
             for pairing, teacher, _, window in kinds for seed, mine in zip(args.seeds, data)]
    results = run_all(student, tasks, args.workers)
    rows = []
    for i, (pairing, teacher, kind, _) in enumerate(kinds):
        mine = results[i * len(args.seeds):(i + 1) * len(args.seeds)]
        used = [row["tokens"] for d in data for row in d[pairing, teacher]]
        rows.append({"problems": pairing, "trajectories of": f"{teacher}-RL", "student": kind, "greedy": cell(mine, "sft", "greedy"),
                     "T=1": cell(mine, "sft"), "examples": len(used) // len(args.seeds), "their length": float(np.mean(used))})
    return rows, [{"kind": "bar", "title": f"{pairing} problems" if pairing == "paired" else "length-matched",
                   "x": ["SA-RL's", "SWA-RL's"], "xlabel": "trajectories of", "ylabel": "accuracy, T=1",
                   "series": {f"{kind} student": [r["T=1"] for r in rows if (r["problems"], r["student"]) == (pairing, kind)]
                              for kind in ("SA", "SWA")}} for pairing in ("paired", "matched")]


def prepare_strategy(args, seed, label):
    """What must lie in a strategy's folder before its run."""
    stage = recipe(args, seed, f"strategies/{label}")
    target = stage_folder(stage, "sft")
    if label == "none" and not (target / "config.json").exists():  # SA-SFT with the window set, and nothing else
        model = Transformer.from_pretrained(policies(args, seed)["SA-SFT"], window=stage.window)
        model.save_pretrained(target)
    if label == "restate-only":
        rows = tiny_problems(4000, [seed, 4], restate=lambda rng: 1.0)
        write_file(Path(stage.out) / "data.jsonl", lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        return {"sft_data": str(Path(stage.out) / "data.jsonl")}
    return {}


def strategies(args):
    """Ways from SA to SWA (ours: Table 5's are unknown), each before and after RL."""
    layers = args.full_layers or [1]
    table = {"none": {}, "direct": None, "shrinking": {"window_from": args.window_from or 96},
             "hybrid": {"full_layers": layers}, "restate-only": {}}
    if args.model[0] != "tiny":
        del table["restate-only"]
    found = arms(args, {"SA": {"window": "full"}, "direct": {}})
    tasks, labels = [], [label for label, changes in table.items() if changes is not None]
    for label in labels:
        for seed in args.seeds:
            extra = prepare_strategy(args, seed, label)
            tasks.append((recipe(args, seed, f"strategies/{label}", **table[label], **extra),))
    results = run_all(run_arm, tasks, args.workers)
    n = len(args.seeds)
    found |= {label: results[i * n:(i + 1) * n] for i, label in enumerate(labels)}
    found = {label: found[label] for label in [*table, "SA"]}
    return accuracy_rows(found), [{"kind": "bar", "title": "conversion strategies, before and after RL", "x": list(found),
                                   "xlabel": "", "ylabel": "accuracy, T=1", "series": {
                                       f"after {s.upper()}": [cell(r, s) for r in found.values()] for s in ("sft", "rl")}}]


def budgets(args):
    """RL of SA and SWA at equal steps, and SWA again in the time that SA took; runs alone, for the clock's sake."""
    args.workers = 1
    arms(args, {"SA": {"window": "full", "steps": 0}, "SWA": {"steps": 0}} if False else {})
