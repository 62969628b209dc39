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

import convert_sft
import rl
from convert_sft import (INSTRUCTION, Trainer, as_problem, as_prompt, as_window, convert, describe_machine, held_out,
                         load_problems, other_stage, pick_device, pretrain_tiny, schedule, settle, stage_folder,
                         tiny_base, tiny_problems, window_arg)
from model import (LOGITS_PER_CHUNK, Tokenizer, Transformer, UsageError, cli, generate, log_softmax, write_file)
from rl import bootstrap_ci, extract_answer, grade_batch, is_correct, roll_out, run_arm, validate  # noqa: F401
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


def recipe(args, seed, variant=None, start=None, rows=None, **changes):
    """The arguments of `rl.py --model ...` for a seed, with changes to them.

    Seed 0 lives in --out, as with rl.py's plain command, seed N in out/seedN. A variant has a folder of its
    own, with a copy of the tiny base. start: a model that takes the place of stage 1, its window set and
    nothing else. rows: problems with solutions for stage 1. Flags that eval.py does not know are rl.py's.
    """
    stage = rl.parser().parse_args(["--model", args.model[0], *args.rest])
    stage.sft_data_given = bool(rows) or stage.sft_data is not None
    given = {name: getattr(args, name) for name in ("device", "slots", "window", "max_new_tokens") if getattr(args, name)}
    out = str(Path(args.out) / (f"seed{seed}" if seed else ""))
    stage = settle(stage, rl.SETTINGS, **{"seed": seed, "out": out} | given | changes)
    if variant:
        home = stage_folder(stage, "sft").parent
        stage.out = str(home / "analysis" / "runs" / variant)
        folder = stage_folder(stage, "sft")
        if args.model[0] == "tiny" and not (folder.parent / "base-wfull").exists():
            shutil.copytree(home / "base-wfull", folder.parent / "base-wfull")
        if start and not (folder / "config.json").exists():
            Transformer.from_pretrained(start, window=as_window(stage.window)).save_pretrained(folder)
        if rows:
            stage.sft_data = str(Path(stage.out) / "trajectories.jsonl")
            write_file(Path(stage.sft_data), lambda f: f.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    return stage


def run_all(job, tasks, workers):
    """[job(*task) for task in tasks], in so many processes."""
    if workers < 2 or len(tasks) < 2:
        return [job(*task) for task in tasks]
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*tasks)))


def arms(args, table, job=run_arm, workers=None):
    """{label: changes to the recipe, or a function of the seed} -> {label: [results of each seed's run]}.

    Runs that are done are reused.
    """
    tasks = [(recipe(args, seed, **(changes(seed) if callable(changes) else changes)),)
             for changes in table.values() for seed in args.seeds]
    results = iter(run_all(job, tasks, workers or args.workers))
    return {label: [next(results) for _ in args.seeds] for label in table}


def run_sft(stage):
    """Stage 1 alone, validated."""
    folder = stage_folder(stage, "sft")
    if not (folder / "config.json").exists():
        convert(other_stage(stage, convert_sft.SETTINGS, window=stage.window, instruction=stage.instruction,
                            micro_tokens=stage.micro_tokens, steps=stage.sft_steps, data=stage.sft_data))
    return {"sft": validate(folder, stage)}


def policies(args, seed):
    """label -> folder of SA and SWA after both stages."""
    return {f"{kind}-{stage.upper()}": stage_folder(recipe(args, seed, window=window), stage)
            for stage in ("sft", "rl") for kind, window in (("SA", "full"), ("SWA", None))}


def cells(results, stage):
    """Results of one run over the seeds -> a table row's cells."""
    found = [r[stage] for r in results]
    mean = {what: float(np.mean([f["T=1"][what] for f in found])) for what in ("length", "truncated", "restatements")}
    return {name: over_seeds([f[name]["scores"] for f in found]) for name in ("greedy", "T=1")} | mean


def bars(title, rows, group, by, what="T=1", **more):
    """A panel of bars out of table rows: a group for each row[group], a colour for each row[by]."""
    x, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, by))
    series = {label: [next((r[what] for r in rows if (r[group], r[by]) == (at, label)), None) for at in x] for label in labels}
    return {"kind": "bar", "title": title, "x": x, "xlabel": "", "ylabel": f"accuracy, {what}", "series": series, **more}


def windows(args):
    """SA and SWA after SFT and after RL, by window"""
    sizes = args.windows or [16, 20, 24, 32, "full"]
    found = arms(args, {w: {"window": w} for w in sizes})
    rows = [{"model": f"{'SA' if w == 'full' else 'SWA'}-{stage.upper()}", "window": str(w), **cells(found[w], stage)}
            for w in sizes for stage in ("sft", "rl")]
    lines = {"kind": "line", "xlabel": "window, keys"}
    return rows, {"windows": [bars("accuracy by window", rows, "window", "model") | lines,
                              bars("length by window", rows, "window", "model", "length", ylabel="tokens a response") | lines]}


def strategies(args):
    """Ways from SA to SWA, before and after RL (ours: Table 5's are unknown)"""
    plain = recipe(args, 0)
    start = lambda seed: policies(args, seed)["SA-SFT"]
    restate = lambda seed: tiny_problems(4000, [seed, 4], restate=lambda rng: 1.0)
    ways = {"none": {"start": start}, "direct": {}, "shrinking": {"window_from": 4 * plain.window},
            "hybrid": {"full_layers": plain.full_layers or [1]}, "restate-only": {"rows": restate}}
    table = {label: lambda seed, label=label, way=way: {"variant": f"strategies/{label}", "full_layers": None} | {
        key: value(seed) if callable(value) else value for key, value in way.items()}
        for label, way in ways.items() if args.model[0] == "tiny" or label != "restate-only"}
    sa = arms(args, {"SA": {"window": "full", "full_layers": None}})
    found = arms(args, table) | sa
    rows = [{"strategy": label, "stage": f"after {stage.upper()}", **cells(found[label], stage)}
            for label in found for stage in ("sft", "rl")]
    return rows, {"strategies": [bars("conversion strategies", rows, "strategy", "stage")]}


def budgets(args):
    """RL of SA and SWA for equal steps, and SWA's for the time that SA took (one run at a time, for the clock)"""
    arms(args, {"SA": {"window": "full"}, "SWA": {}}, run_sft)
    hours, logs, found = {}, {}, {}
    for label, window, more in (("SA, equal steps", "full", lambda seed: {}), ("SWA, equal steps", recipe(args, 0).window, lambda seed: {}),
                                ("SWA, SA's time", recipe(args, 0).window, lambda seed: {"hours": hours[seed], "steps": 10**6})):
        def changes(seed):
            return {"variant": f"budgets/{label.split(', ')[1].replace(' ', '-')}", "window": window,
                    "start": policies(args, seed)["SA-SFT" if window == "full" else "SWA-SFT"], **more(seed)}

        found |= arms(args, {label: changes}, workers=1)
        folders = [stage_folder(recipe(args, seed, **changes(seed)), "rl") for seed in args.seeds]
        logs[label] = [[r for r in map(json.loads, (f / "log.jsonl").read_text().splitlines()) if "step" in r] for f in folders]
        hours = hours or {seed: log[-1]["elapsed"] / 3600 for seed, log in zip(args.seeds, logs[label])}
    rows = [{"run": label, "steps": float(np.mean([log[-1]["step"] for log in logs[label]])),
             "seconds": float(np.mean([log[-1]["elapsed"] for log in logs[label]])), **cells(found[label], "rl")} for label in found]
    panels = []
    for unit, key in (("RL step", "step"), ("seconds of RL", "elapsed")):
        x = np.linspace(0, max(log[-1][key] for label in list(logs)[:2] for log in logs[label]), 41)[1:]
        series = {label.split(",")[0]: np.mean([np.interp(x, [r[key] for r in log], [r["reward"] for r in log], right=np.nan)
                                                for log in logs[label]], 0).tolist() for label in list(logs)[:2]}
        panels.append({"kind": "line", "title": f"by {unit}", "x": x.tolist(), "xlabel": unit, "ylabel": "reward", "series": series})
    return rows, {"budgets": panels}


def episodes_of(folder, problems, stage):
    """One answer at T=1 to each problem."""
    model = Transformer.from_pretrained(folder, device=pick_device(stage.device))
    tokenizer = Tokenizer(model.tokenizer_files)
    questions = [(as_prompt(tokenizer, p["problem"], stage.instruction), p["answer"]) for p in problems]
    return roll_out(model, tokenizer, questions, 2 * 10**6 + stage.seed, stage, 1.0, f"{folder}:")


def length_matched(a, b, bins=10):
    """Lengths of two sides -> indices into each, with equally many of each bin of length on both."""
    edges = np.linspace(min(*a, *b), max(*a, *b) + 1, bins + 1)[1:-1]
    chosen = [], []
    for bin in range(bins):
        here = [np.flatnonzero(np.digitize(side, edges) == bin) for side in (a, b)]
        for mine, indices in zip(chosen, here):
            mine += indices[:min(map(len, here))].tolist()
    return chosen


def trajectories(args, seed):
    """Correct answers of SA-RL and SWA-RL to the same training problems -> {(pairing, teacher): rows}."""
    stage = recipe(args, seed)
    problems = tiny_problems(args.limit or 1200, [seed, 13]) if stage.data == "tiny" else \
        [p for p in load_problems(stage.data) if not held_out(p["problem"], rl.HELD_OUT)][:args.limit or 1200]
    sides = {}
    for teacher in ("SA", "SWA"):
        episodes = episodes_of(policies(args, seed)[f"{teacher}-RL"], problems, stage)
        sides[teacher] = {i: {**p, "solution": e.text, "tokens": len(e.tokens)}
                          for i, (p, e) in enumerate(zip(problems, episodes)) if e.reward}
    data = {("paired", teacher): [side[i] for i in side if all(i in s for s in sides.values())] for teacher, side in sides.items()}
    rows = {teacher: list(side.values()) for teacher, side in sides.items()}
    matched = length_matched(*([row["tokens"] for row in side] for side in rows.values()))
    return data | {("length-matched", t): [rows[t][i] for i in chosen] for t, chosen in zip(rows, matched)}


def cross_sft(args):
    """Students of both architectures, from the base, on correct trajectories of both policies (paper's Table 4)"""
    arms(args, {"SA": {"window": "full"}, "SWA": {}})
    data = dict(zip(args.seeds, run_all(trajectories, [(args, seed) for seed in args.seeds], args.workers)))
    table = {}
    for pairing, teacher in data[args.seeds[0]]:
        for student, window in (("SA", "full"), ("SWA", None)):
            table[pairing, teacher, student] = lambda seed, key=(pairing, teacher), window=window: {
                "variant": f"cross-sft/{'-'.join(key)}", "window": window, "rows": data[seed][key],
                "sft_steps": 150 if args.model[0] == "tiny" else None}
    rows = []
    for (pairing, teacher, student), results in arms(args, table, run_sft).items():
        used = [row["tokens"] for d in data.values() for row in d[pairing, teacher]]
        rows.append({"problems": pairing, "trajectories": f"{teacher}-RL's", "student": student, **cells(results, "sft"),
                     "examples": len(used) / len(data), "their length": float(np.mean(used))})
    return rows, {"cross-sft": [bars(f"{pairing} (examples: {np.mean([r['examples'] for r in rows if r['problems'] == pairing]):.0f})",
                                     [r for r in rows if r["problems"] == pairing], "trajectories", "student", xlabel="trained on")
                                for pairing in ("paired", "length-matched")]}


def trajectory_gaps(folder, reference, stage, sizes, n, positions):
    """One policy's locality: for each window the mean gap of each trajectory, and where the gap sits."""
    problems = tiny_problems(n, [stage.seed, 10], test=True) if stage.data == "tiny" else \
        [p for p in load_problems(stage.data) if held_out(p["problem"], rl.HELD_OUT)][:n]
    rollouts = episodes_of(folder, problems, stage)
    reference = Transformer.from_pretrained(reference, device=pick_device(stage.device), dtype=torch.float32)
    tokenizer, found = Tokenizer(reference.tokenizer_files), {"right": [r.reward > 0 for r in rollouts], "length": [len(r.tokens) for r in rollouts]}
    for w in sizes:
        gaps = token_gaps(reference, rollouts, w, positions)
        found[w] = [g.nanmean(1).tolist() for g in gaps]  # (log-ratio, KL) of each trajectory
        if w == stage.window:  # by tenths of the response; token by token in one answer to a short problem
            found["tenths"] = np.nanmean([[part.nanmean().item() for part in g[1].tensor_split(10)] for g in gaps], 0).tolist()
            one = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt))[len(rollouts) // 4]
            found["strip"] = [(tokenizer.decode([token], skip_special=False), kl) for token, kl in
                              zip(rollouts[one].tokens[:80], gaps[one][1].tolist())]
    return found


def locality(args):
    """How much trajectories lean on what is beyond a window, under the SA-SFT reference (our stand-in for Eq. 4)"""
    main = recipe(args, args.seeds[0]).window
    sizes = sorted({main, *(w for w in args.windows or [8, 12, 16, 20, 24, 32, 48] if w != "full")})
    arms(args, {"SA": {"window": "full"}, "SWA": {}})
    labels = list(policies(args, args.seeds[0]))
    tasks = [(policies(args, seed)[label], policies(args, seed)["SA-SFT"], recipe(args, seed), sizes, args.limit or 256,
              args.positions) for label in labels for seed in args.seeds]
    results = iter(run_all(trajectory_gaps, tasks, args.workers))
    found = {label: [next(results) for _ in args.seeds] for label in labels}

    def gap(label, w, which, only="all", whole=False):
        return over_seeds([[[pair[which] * (length if whole else 1)] for pair, length, right in
                            zip(f[w], f["length"], f["right"]) if right or only == "all"] for f in found[label]])

    rows = [{"policy": label, "trajectories": only, "KL a token": gap(label, main, 1, only), "log-ratio a token": gap(label, main, 0, only),
             "KL a trajectory": gap(label, main, 1, only, whole=True)} for label in found for only in ("all", "correct")]
    curve = {label: [gap(label, w, 1, "correct") for w in sizes] for label in found}
    where = {label: np.mean([f["tenths"] for f in found[label]], 0).tolist() for label in found}
    strips = [{"kind": "strip", "title": f"one answer of {label} (window {main})", "x": [t for t, _ in found[label][0]["strip"]],
               "xlabel": "", "ylabel": "KL, nats", "series": {label: [kl for _, kl in found[label][0]["strip"]]}}
              for label in ("SA-RL", "SWA-RL")]
    unit = {"kind": "line", "ylabel": "KL, nats a token"}
    return rows, {"locality": [
        bars(f"window {main}", rows, "policy", "trajectories", "KL a token", ylabel="KL, nats a token"),
        {"title": "correct, by window", "x": sizes, "xlabel": "window, tokens", "series": curve, **unit},
        {"title": f"along the response (window {main})", "x": list(range(5, 100, 10)), "xlabel": "% of the response", "series": where,
         **unit}], "locality-tokens": strips}


REACH_LENGTH = 80  # tokens of a retrieval example


def reach_example(rng, tokenizer, distance, queries=0.0):
    """Letters, one digit, more letters, and `?` at the end, `distance` tokens behind the digit -> (tokens,
    targets): the digit is asked for under the `?`, with queries > 0 also under some more of them on the way."""
    tokens = rng.choice(tokenizer.encode("abcdefghijkl"), REACH_LENGTH)
    digit, fact = rng.choice(tokenizer.encode("0123456789")), REACH_LENGTH - 1 - distance
    asked = (np.arange(REACH_LENGTH) > fact) & (rng.random(REACH_LENGTH) < queries)
    asked[-1] = True
    tokens[asked], tokens[fact] = tokenizer.encode("?")[0], digit
    return tokens.tolist(), np.where(asked, digit, -1).tolist()


def reach_run(folder, seed, window, full_layers, distances, device, steps=300, n=200):
    """Trains the untrained tiny architecture on retrieval at all distances -> scores (n, 1) at each distance."""
    torch.set_num_threads(1)
    model = tiny_base(seed)
    model.config.window, model.config.full_layers = as_window(window), full_layers
    tokenizer = Tokenizer(model.tokenizer_files)
    trainer = Trainer(model, folder, {"stage": "reach", "seed": seed, "steps": steps}, pick_device(device))
    while trainer.step < steps and not trainer.stopping:
        rng = np.random.default_rng([seed, 14, trainer.step])
        rows = [dict(zip(("tokens", "targets"), reach_example(rng, tokenizer, rng.integers(1, REACH_LENGTH), 0.3)))
                for _ in range(32)]
        asked = sum(t >= 0 for row in rows for t in row["targets"])
        trainer.update(rows, lambda logprobs, entropy, m: -logprobs.sum() / asked,
                       schedule(trainer.step, steps, 3e-3, 30, "linear", decay_from=0.6))
        trainer.log({}, None)
    trainer.save()
    found, rng = [], np.random.default_rng([seed, 15])
    for distance in distances:
        tokens, targets = torch.tensor([reach_example(rng, tokenizer, distance) for _ in range(n)], device=trainer.device).unbind(1)
        with torch.no_grad():
            found.append((model(tokens)[:, -1].argmax(-1) == targets[:, -1]).int()[:, None].tolist())
    return found


def reach(args):
    """Retrieval at a chosen distance: a fact beyond layers x (window - 1) is out of reach for pure SWA, not for a hybrid"""
    if args.model[0] != "tiny":
        raise UsageError(f"--analysis reach trains its own small models: give --model tiny, not {args.model[0]}")
    layers, W = convert_sft.TINY.num_hidden_layers, args.window or 16
    far = layers * (W - 1)
    distances = sorted({4, W - 1, W, 2 * (W - 1), far - 5, far, far + 1, far + 8, far + 15, far + 30})
    if W == "full" or distances[-1] >= REACH_LENGTH:
        raise UsageError(f"--window {W}: give one of 3 to 16, so that examples of {REACH_LENGTH} tokens hold facts beyond its reach")
    kinds = {"SA": ("full", ()), "hybrid, layer 1 full": (W, (1,)), "SWA": (W, ())}
    tasks = [(Path(recipe(args, seed, "reach").out) / f"{label[:3].strip()}-w{W}", seed, *kind, distances, args.device)
             for label, kind in kinds.items() for seed in args.seeds]
    results = iter(run_all(reach_run, tasks, args.workers))
    found = {label: [next(results) for _ in args.seeds] for label in kinds}
    where = [f"{d} ({'in the window' if d < W else 'within reach' if d <= far else 'beyond'})" for d in distances]
    series = {label: [over_seeds(scores) for scores in zip(*seeds)] for label, seeds in found.items()}
    rows = [{"distance": at, **{label: series[label][i] for label in series}} for i, at in enumerate(where)]
    return rows, {"reach": [{"kind": "line", "title": f"{layers} layers, window {W}", "x": distances, "xlabel": "distance of the fact, tokens",
                             "ylabel": "accuracy (chance 0.1)", "series": series,
                             "marks": {W - 1: "window", far: f"{layers} x (window - 1)"}}]}


ANALYSES = {"locality": locality, "cross-sft": cross_sft, "windows": windows, "strategies": strategies,
            "budgets": budgets, "reach": reach}


def analyse(args):
    """Runs an analysis and writes <out>/<model>/analysis/<name>.md, .json and the pictures."""
    began, name = time.time(), args.analysis
    if args.model[0] == "tiny" and name != "reach":
        run_all(pretrain_tiny, [(recipe(args, seed),) for seed in args.seeds], args.workers)
    rows, pictures = ANALYSES[name](args)
    folder = stage_folder(recipe(args, 0), "sft").parent / "analysis"
    note = f"Seeds {', '.join(map(str, args.seeds))}; mean [95 % bootstrap interval over seeds, problems and repeats] n = problems."
    write_report(folder, name, f"{ANALYSES[name].__doc__.split(chr(10))[0]}. {note}", rows, pictures, args,
                 {"minutes": round((time.time() - began) / 60, 1)})


# ----------------------------------------------------------------------------------------------------
# reports and pictures


def shown(value):
    """A table's cell as text."""
    if isinstance(value, dict):
        digits = 3 if abs(value["mean"]) < 10 else 1
        return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_report(folder, name, title, rows, pictures, args, more):
    """Rows (dicts with the same keys) and pictures {file: panels} -> Markdown, JSON, PNG; prints the table."""
    n = sorted({c["n"] for row in rows for c in row.values() if isinstance(c, dict)})
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(shown(row[key]) for key in keys) + " |" for row in rows]
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    table = "\n".join([*lines, "", f"{title} n = {n[0]}{f' to {n[-1]}' if len(n) > 1 else ''}.", "", f"`{command}`", ""])
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.md", lambda f: f.write_text(table))
    record = {"title": title, "command": command, "rows": rows, **describe_machine(pick_device(args.device)), **more}
    write_file(folder / f"{name}.json", lambda f: f.write_text(json.dumps(record, indent=1)))
    for file, panels in pictures.items():
        draw(folder / f"{file}.png", panels)
    print(f"\n{table}\n{folder / name}.md, .json and {', '.join(f'{file}.png' for file in pictures)}")


COLOURS = {"SWA": "#D55E00", "SA": "#0072B2", "hybrid": "#009E73"}  # Okabe and Ito: told apart by all eyes
OTHERS = ["#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#000000"]


def draw(path, panels):
    """Panels of lines, bars or a strip of tokens, side by side (strips one above another), 800 px wide or twice that."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    strips = panels[0]["kind"] == "strip"
    shape = (len(panels), 1) if strips else (1, len(panels))
    figure, axes = plt.subplots(*shape, figsize=(8, 1.7 * len(panels) if strips else 3.4), squeeze=False, layout="constrained")
    top = max((v for p in panels for s in p["series"].values() for v in s if strips), default=None)
    for axis, panel in zip(axes.flat, panels):
        names = any(isinstance(x, str) for x in panel["x"])
        at = np.arange(len(panel["x"])) if names or panel["kind"] == "bar" else np.array(panel["x"], float)
        for i, (label, values) in enumerate(panel["series"].items()):
            colour = next((c for key, c in COLOURS.items() if label.startswith(key)), OTHERS[i % len(OTHERS)])
            values = [v if isinstance(v, dict) else {"mean": np.nan if v is None else v} for v in values]
            mean = np.array([v["mean"] for v in values])
            error = np.abs([[v["mean"] - v.get(end, v["mean"]) for v in values] for end in ("low", "high")])
            if panel["kind"] == "line":
                look = {"ls": "--", "mfc": "white"} if "SFT" in label else {"ls": "-"}
                axis.errorbar(at, mean, error, color=colour, marker="o" if len(at) < 20 else None, ms=4, lw=1.5, capsize=2, label=label, **look)
                shift = 0
            else:
                width = 0.8 / len(panel["series"])
                shift = (i + 0.5) * width - 0.4
                axis.bar(at + shift, mean, width * 0.92, yerr=None if strips else error, color=colour, capsize=2, label=label,
                         error_kw={"lw": 1})
            for x, v in zip(at, values):  # each seed a dot
                seeds = v.get("seeds", [])
                axis.plot([x + shift] * len(seeds), seeds, ".", color="black", ms=3, alpha=0.5) if len(seeds) > 1 else None
        if names:
            axis.set_xticks(at, ["eos" if x == "<eos>" else x.replace("\\boxed{", "box") for x in panel["x"]],
                            fontsize=6 if strips else None)
        for x, text in panel.get("marks", {}).items():
            axis.axvline(x + 0.5, color="gray", lw=0.8, ls=":")
            axis.text(x + 0.5, 0.5, text, rotation=90, ha="right", va="center", color="gray", transform=axis.get_xaxis_transform())
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"], ylim=(0, top * 1.05 if top else None))
        axis.margins(x=0.01 if strips else None)
        if len(panel["series"]) > 1:
            axis.legend(fontsize=8)
    n = sorted({v["n"] for p in panels for s in p["series"].values() for v in s if isinstance(v, dict)})
    if n:
        figure.text(0.995, 0.005, f"n = {n[0]}{f' to {n[-1]}' if len(n) > 1 else ''}, 95 % intervals", ha="right", fontsize=7, color="gray")
    figure.savefig(path, dpi=200)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------
# the command


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                epilog="With --analysis, rl.py's flags (--steps, --data, ...) are understood too.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # what to do
    p.add_argument("--model", nargs="+", default=[], help="model folders or hub ids; with --analysis tiny, or a base model")
    p.add_argument("--benchmarks", help=f"comma-separated: tiny, {', '.join(BENCHMARKS)}, or JSONL files")
    p.add_argument("--prompt", help="stream one answer to this")
    p.add_argument("--regrade", metavar="JSONL", help="grade generations again, without a model")
    p.add_argument("--analysis", choices=ANALYSES, help="run one of the paper's analyses")
    # sampling
    p.add_argument("--samples", type=int, default=1, help="answers to each problem")
    p.add_argument("--temperature", type=float, default=1.0, help="0: greedy; DeepSeek-R1's distillations ask for 0.6")
    p.add_argument("--top-p", type=float, default=1.0, help="1: no truncation; the distillations ask for 0.95")
    p.add_argument("--max-new-tokens", type=int, help="tokens of an answer (default: what the positions leave, at most 32768)")
    p.add_argument("--instruction", help="appended to each problem (default: none for tiny and --prompt, else to box the answer)")
    p.add_argument("--window", type=window_arg, help="override the model's window: keys, or full")
    p.add_argument("--limit", type=int, help="use the first so many problems only")
    p.add_argument("--chunk", type=int, default=64, help="problems between two writes; an interruption loses at most these")
    # analyses
    p.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0], help="training seeds, such as 0,1,2")
    p.add_argument("--windows", type=lambda s: [window_arg(x) for x in s.split(",")], help="windows of a curve, such as 16,24,full")
    p.add_argument("--positions", type=int, help="locality: tokens of each response to look at (default: all)")
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count()), help="runs side by side")
    # the machine
    p.add_argument("--out", default="out", help="where results go")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--slots", type=int, help="sequences that run at a time (default: by free memory)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return p


def check(args):
    """UsageError for what cannot be run."""
    asked = [name for name in ("benchmarks", "prompt", "regrade", "analysis") if getattr(args, name) is not None]
    if len(asked) != 1:
        raise UsageError("give one of --benchmarks, --prompt, --regrade and --analysis (-h explains them)")
    if args.rest and not args.analysis:
        raise UsageError(f"unknown arguments: {' '.join(args.rest)}")
    if not args.model and not args.regrade:
        raise UsageError(f"--{asked[0]} needs --model, such as out/tiny/rl-w24")
    if len(args.model) > 1 and not args.benchmarks:
        raise UsageError(f"--{asked[0]} takes one --model")
    for name in ("samples", "chunk", "limit", "workers", "slots", "max_new_tokens", "positions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a whole number above 0")
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise UsageError("--temperature is 0 or more, --top-p above 0 and at most 1")


def load(name, args):
    """-> (model, tokenizer), with --window in place of the model's own."""
    device = pick_device(args.device)
    model = Transformer.from_pretrained(name, window=as_window(args.window) if args.window else "config", device=device)
    if model.config.hidden_size == convert_sft.TINY.hidden_size:
        torch.set_num_threads(1)  # tiny matrices gain nothing from more
    return model, Tokenizer(model.tokenizer_files)


def benchmark(args):
    """Every model on every benchmark; then the table, against the first model, and the picture."""
    names, found = [name for name in args.benchmarks.split(",") if name], {}
    problems = {name: load_benchmark(name, args.seed)[:args.limit] for name in names}
    for path in args.model:
        model, tokenizer = load(path, args)
        label = "/".join((Path(path).resolve() if Path(path).exists() else Path(path)).parts[-2:])
        label += f"@w{args.window}" if args.window else ""
        for name in names:
            own = argparse.Namespace(**vars(args))
            own.instruction = ("" if name == "tiny" else INSTRUCTION) if args.instruction is None else args.instruction
            longest = max(len(as_prompt(tokenizer, p["problem"], own.instruction)) for p in problems[name])
            own.max_new_tokens = args.max_new_tokens or min(32768, model.config.max_position_embeddings - longest)
            settings = {"model": path, "weights": fingerprint(model), "window": model.config.window, "benchmark": name,
                        **{key: getattr(own, key) for key in ("samples", "temperature", "top_p", "max_new_tokens",
                                                              "instruction", "seed", "chunk")}}
            file = Path(args.out) / "eval" / label / f"{Path(name).stem}.jsonl"
            found[label, name] = answer_benchmark(model, tokenizer, problems[name], file, settings, own)
    compare(args, found)


def compare(args, found):
    """{(model, benchmark): records} -> the table, the differences to the first model, and the picture."""
    models, names = (list(dict.fromkeys(key[i] for key in found)) for i in range(2))
    rows, k = [], args.samples
    for name in names:
        first = scores_of(found[models[0], name])
        for label in models:
            difference, low, high, p = paired_bootstrap(first, scores_of(found[label, name]))
            row = {"benchmark": Path(name).stem, "model": label, **measure(found[label, name])}
            if len(models) > 1:
                difference = {"mean": difference, "low": low, "high": high, "n": row["n"]}
                row |= {"difference": difference, "p": p} if label != models[0] else {"difference": "", "p": ""}
            rows.append(row)
    full = [dict(row) for row in rows]
    for row in rows:
        row.pop("pass@"), row.pop("verdicts")
    title = f"Difference and p: paired bootstrap against {models[0]}. " * (len(models) > 1)
    write_report(Path(args.out) / "eval", "results", f"{title}Mean [95 % bootstrap interval over problems and repeats].", rows, {
        "results": [bars("accuracy", rows, "benchmark", "model", f"avg@{k}", ylabel=f"avg@{k}")]}, args, {"full": full})


def regrade(file):
    """Grades a file of generations again, in place, and says what changed."""
    settings, records = read_generations(file)
    before = [r.get("verdicts", [None] * len(r["responses"])) for r in records]
    grade(records)
    changed = sum(a != b for old, r in zip(before, records) for a, b in zip(old, r["verdicts"]))
    write_file(Path(file), lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in ({"settings": settings}, *records))))
    found = measure(records)
    accuracy = next(f"{name} {shown(value)}" for name, value in found.items() if name.startswith("avg@"))
    print(f"{file}: {changed} of {sum(found['verdicts'].values())} verdicts changed; {accuracy}; {found['verdicts']}")


def main():
    args, rest = parser().parse_known_args()
    args.rest = rest
    check(args)
    if args.analysis or args.benchmarks:
        print("settings:", json.dumps(vars(args)), flush=True)
    if args.analysis:
        analyse(args)
    elif args.benchmarks:
        benchmark(args)
    elif args.prompt is not None:
        args.instruction = args.instruction or ""
        stream_answer(*load(args.model[0], args), args.prompt, args)
    else:
        regrade(args.regrade)


if __name__ == "__main__":
    cli(main)
