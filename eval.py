"""Evaluation: benchmarks with intervals, the locality of trajectories, and the paper's analyses.

Answers are sampled under the model's own window and graded by the checker that was the reward.
Accuracies come with bootstrap intervals over problems and repeats, and beside them what qualifies
them: the truncated share and the length. Locality asks how much a trajectory leans on what lies
beyond a window. The analyses set SA against SWA: each is a table of runs, made by the stages in
convert_sft.py and rl.py and reused where they are done, and ends in Markdown, JSON and a picture.

Left out on purpose: few-shot prompts, multiple choice, judges that are models, other engines.

    python eval.py --model out/tiny/rl-w24 out/tiny/sft-w24 --benchmarks tiny --samples 8
    python eval.py --analysis locality --model tiny
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import shlex
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
from convert_sft import (
    COLORS,
    INSTRUCTION,
    Trainer,
    as_problem,
    as_prompt,
    as_window,
    convert,
    describe_machine,
    held_out,
    load_problems,
    other_stage,
    pick_device,
    pretrain_tiny,
    schedule,
    stage_folder,
    tiny_base,
    tiny_problems,
    window_arg,
)
from model import (
    LOGITS_PER_CHUNK,
    Tokenizer,
    Transformer,
    UsageError,
    cli,
    generate,
    log_softmax,
    write_file,
)
from rl import (  # noqa: F401
    bootstrap_ci,
    extract_answer,
    grade_batch,
    interval,
    is_correct,
    resample,
    roll_out,
    run_arm,
    validate,
    validation_problems,
)
from swa_kernel import swa_attention

# --------------------------------------------------------------------------------------------------
# benchmarks

BENCHMARKS = {  # name: hub id, configuration, split, field of the problem, field of the answer
    "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question",
                      "final_answer"),
}


def load_benchmark(name, seed=0):
    """A name of BENCHMARKS, `tiny` (rl.py's validation problems of that seed), or a JSONL file."""
    if name == "tiny":
        return tiny_problems(512, [seed, 10], test=True)
    if name not in BENCHMARKS:
        if not Path(name).is_file():
            raise UsageError(f"--benchmarks {name}: no such file; give a JSONL file or names out "
                             f"of tiny, {', '.join(BENCHMARKS)}")
        return load_problems(name)
    import datasets  # imported here since it takes more than a second

    hub_id, config, split, problem, answer = BENCHMARKS[name]
    try:
        rows = [(row[problem], row[answer])
                for row in datasets.load_dataset(hub_id, config, split=split)]
    except Exception as error:  # network, moved, gated: many types, one cure
        raise UsageError(f"--benchmarks {name}: {hub_id} could not be fetched from the hub "
                         f"({type(error).__name__}): check the connection, or give the problems as "
                         "a JSONL file") from None
    return [as_problem({"problem": p, "answer": ",".join(a) if isinstance(a, list) else a})
            for p, a in rows]


# --------------------------------------------------------------------------------------------------
# sampling and grading


def sample_answers(model, tokenizer, problems, first, args):
    """args.samples answers to each problem; the j-th to problem first + i has its own seed."""
    prompts = [as_prompt(tokenizer, p["problem"], args.instruction) for p in problems]
    k = args.samples
    seeds = [np.random.default_rng([args.seed, 11, first + i]).integers(2**62, size=k)
             for i in range(len(problems))]
    return generate(
        model, [p for p in prompts for _ in range(k)], args.max_new_tokens, args.temperature,
        tokenizer.stop_ids, args.slots, np.concatenate(seeds).tolist(), top_p=args.top_p,
        n_ids=tokenizer.n_ids, progress=f"problems {first} to {first + len(problems) - 1}:")


def grade(records):
    """Sets each record's verdicts; an answer that was cut off is wrong, as in training."""
    graded = iter(grade_batch([text for r in records for text in r["responses"]],
                              [r["answer"] for r in records for _ in r["responses"]]))
    for r in records:
        verdicts = [next(graded) for _ in r["responses"]]
        r["verdicts"] = [v if f else "truncated" for v, f in zip(verdicts, r["finished"])]


def read_generations(file):
    """-> (settings, a record for each problem), less a last line that an interruption cut off."""
    rows = []
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as generations of eval.py ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UsageError(f"{file} line {number} is not JSON: remove the file") from None
    known = {"problem", "answer", "responses", "lengths", "finished"}
    whole = rows and all(isinstance(row, dict) for row in rows) and "settings" in rows[0]
    if not whole or any(not known <= row.keys() for row in rows[1:]):
        raise UsageError(f"{file} does not hold generations of eval.py: its first line has the "
                         "settings, each other one a problem with its answers")
    return rows[0]["settings"], rows[1:]


def write_generations(file, settings, records):
    lines = [json.dumps(row) + "\n" for row in ({"settings": settings}, *records)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda f: f.write_text("".join(lines)))


def fingerprint(model):
    """A short hash of the weights: generations of another state of training are not continued."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def answer_benchmark(model, tokenizer, problems, file, settings, args):
    """Generates and grades what `file` does not hold yet -> a record for each problem.

    A chunk of problems is appended when it is done. An interrupted one is done again as a whole:
    the same sequences then run side by side, so that not even rounding differs from a run that
    was left alone.
    """
    records = []
    if file.exists():
        old, records = read_generations(file)
        differ = [key for key in settings if old.get(key) != settings[key]]
        if differ or any(r["problem"] != p["problem"] for r, p in zip(records, problems)):
            raise UsageError(f"{file} holds generations with other settings ("
                             f"{', '.join(differ) or 'other problems'}): give the same flags, "
                             "another --out, or remove it")
    if len(records) < len(problems):
        records = records[:len(records) // args.chunk * args.chunk]
        write_generations(file, settings, records)
    k = args.samples
    for first in range(len(records), len(problems), args.chunk):
        chunk = problems[first:first + args.chunk]
        rollouts = sample_answers(model, tokenizer, chunk, first, args)
        groups = [rollouts[i:i + k] for i in range(0, len(rollouts), k)]
        new = [{"problem": p["problem"], "answer": p["answer"],
                "responses": [tokenizer.decode(r.tokens) for r in group],
                "lengths": [len(r.tokens) for r in group],
                "finished": [r.finished for r in group]} for p, group in zip(chunk, groups)]
        grade(new)
        with open(file, "a") as f:
            f.write("".join(json.dumps(r) + "\n" for r in new))
        records += new
    return records[:len(problems)]


def regrade(file):
    """Grades generations again, in place, and says what changed."""
    settings, records = read_generations(file)
    before = [v for r in records for v in r.get("verdicts", [None] * len(r["responses"]))]
    grade(records)
    after = [v for r in records for v in r["verdicts"]]
    write_generations(Path(file), settings, records)
    counts = {kind: after.count(kind) for kind in sorted(set(after))}
    changed = sum(a != b for a, b in zip(before, after))
    print(f"{file}: {changed} of {len(after)} verdicts changed; {counts}, accuracy "
          f"{shown(over_seeds([scores_of(records)]))}")


def stream_answer(model, tokenizer, args):
    """Prints an answer as it comes; bytes of an unfinished character wait for the rest of it."""
    decoder, began = codecs.getincrementaldecoder("utf-8")("replace"), time.time()

    def show(i, tokens):
        pieces = [tokenizer.pieces.get(t, b"") for t in tokens if t not in tokenizer.special_ids]
        print(decoder.decode(b"".join(pieces)), end="", flush=True)

    ids = as_prompt(tokenizer, args.prompt, args.instruction or "")
    limit = args.max_new_tokens or min(32768, model.config.max_position_embeddings - len(ids))
    rollout, = generate(model, [ids], limit, args.temperature, tokenizer.stop_ids, 1, args.seed,
                        top_p=args.top_p, n_ids=tokenizer.n_ids, stream=show)
    print(decoder.decode(b"", final=True))
    print(f"[{len(rollout.tokens)} tokens, {len(rollout.tokens) / (time.time() - began):.0f} tok/s"
          f"{'' if rollout.finished else ', cut off at --max-new-tokens'}]", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# statistics


def paired_bootstrap(a, b, seed=0):
    """Scores (P, R) of two models on the same problems -> (mean(b) - mean(a), low, high, p).

    p is two-sided, for the null of no difference: the share of draws that lie at least as far from
    the observed difference as that lies from 0 (the bootstrap distribution, shifted to the null).
    Lists of score arrays, one for each benchmark, compare the averages over the benchmarks.
    """
    if not isinstance(a, list):
        a, b = [a], [b]
    if [len(x) for x in a] != [len(x) for x in b]:
        raise ValueError("paired_bootstrap needs scores of both models on the same problems")
    observed = float(np.mean([np.mean(y) - np.mean(x) for x, y in zip(a, b)]))
    draws = np.mean([resample(y, seed=seed + i, stream=1) - resample(x, seed=seed + i)
                     for i, (x, y) in enumerate(zip(a, b))], 0)
    far = np.abs(draws - observed) >= abs(observed) - 1e-12
    return observed, *interval(draws), float((1 + far.sum()) / (1 + len(draws)))


def over_seeds(groups, seed=0):
    """One array (P, R) for each training seed -> a cell: mean, interval, n problems, seeds' means.

    Resamples seeds, then problems, then repeats. One seed's interval says nothing about training.
    Seeds without any problem (no correct trajectory, say) are left out; nan where all are.
    """
    groups = [scores for scores in groups if len(scores)]
    if not groups:
        return dict.fromkeys(("mean", "low", "high"), math.nan) | {"n": 0, "seeds": []}
    draws = np.stack([resample(scores, seed=seed + i) for i, scores in enumerate(groups)])
    S, n = draws.shape
    rng = np.random.default_rng([seed, 2])
    low, high = interval(draws[rng.integers(S, size=(n, S)), rng.integers(n, size=(n, S))].mean(1))
    seeds = [float(np.mean(scores)) for scores in groups]
    return {"mean": float(np.mean(seeds)), "low": low, "high": high, "n": sum(map(len, groups)),
            "seeds": seeds}


def pass_at_k(correct, n, k):
    """The chance that k of n answers, drawn without repetition, hold a right one (2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(responses, verdicts):
    """maj@k of one problem: whether the most frequent answer is right, ties shared; answers that
    were cut off or are missing have no vote."""
    votes = []  # [answer, count, right]
    for text, verdict in zip(responses, verdicts):
        answer = extract_answer(text)
        if answer is None or verdict == "truncated":
            continue
        same = [v for v in votes if v[0] == answer or is_correct(f"\\boxed{{{answer}}}", v[0])]
        if same:
            same[0][1] += 1
        else:
            votes.append([answer, 1, verdict == "correct"])
    most = max((count for _, count, _ in votes), default=0)
    return float(np.mean([right for _, count, right in votes if count == most])) if votes else 0.0


def scores_of(records):
    return np.array([[v == "correct" for v in r["verdicts"]] for r in records], float)  # (P, R)


def measure(records):
    """One model on one benchmark, as a table's row."""
    scores = scores_of(records)
    k = scores.shape[1]
    row = {f"avg@{k}": over_seeds([scores])}
    for j in sorted({2, 4, 8, 16, 32, 64, k}):
        if 1 < j <= k:
            row[f"pass@{j}"] = over_seeds([[[pass_at_k(int(s.sum()), k, j)] for s in scores]])
    if k > 1:
        votes = [[majority(r["responses"], r["verdicts"])] for r in records]
        row[f"maj@{k}"] = over_seeds([votes])
    cut = [v == "truncated" for r in records for v in r["verdicts"]]
    return row | {"truncated": float(np.mean(cut)), "length": mean_of(records, "lengths"),
                  "n": len(scores)}


def mean_of(records, key):
    return float(np.mean([r[key] for r in records]))


# --------------------------------------------------------------------------------------------------
# locality: what a trajectory owes to the tokens beyond a window


def states(model, tokens):
    """tokens (N, T) -> the last layer's states (N, T, C); positions begin at 0."""
    windows, positions = model.config.windows, torch.arange(tokens.shape[1], device=tokens.device)
    return model.hidden(tokens, positions[None],
                        lambda layer, q, k, v: swa_attention(q, k, v, windows[layer]))


@torch.no_grad()
def token_gaps(reference, rollouts, window, positions=None, micro_tokens=16384):
    """-> for each rollout (2, response tokens) in nats: the sampled log-ratio, and its expectation.

    log p(x_t | all before) - log p(x_t | the last W tokens), and KL(p(. | all) || p(. | last W)),
    under `reference`: our stand-in for the paper's Eq. 4, after LongPPL (arXiv 2410.23771). Exact:
    the W tokens are run on their own, as a windowed forward would let layers hop past W; RoPE is
    relative, so they may begin at position 0. positions: look at so many tokens of a rollout only,
    evenly spaced (NaN elsewhere): long responses under a large model.
    """
    gaps, asked, full = [], [], []
    for r in rollouts:
        P, ids = len(r.prompt), torch.tensor(list(r.prompt) + list(r.tokens))
        gap = torch.zeros(2, len(r.tokens), dtype=torch.promote_types(reference.dtype, torch.float))
        at = torch.arange(len(ids))[max(P, window + 1):]  # before, the window holds everything
        if positions and len(at) > positions:
            gap[:, at - P] = float("nan")
            at = at[torch.linspace(0, len(at) - 1, positions).round().long()]
        ids = ids.to(reference.device)
        full.append(states(reference, ids[None])[0, at - 1])  # (tokens asked, C)
        asked += [(gap, ids, t, t - P) for t in at.tolist()]
        gaps.append(gap)
    full = torch.cat(full) if full else None
    size = max(1, min(micro_tokens // window, LOGITS_PER_CHUNK // reference.config.vocab_size))
    for i in range(0, len(asked), size):
        some = asked[i:i + size]
        short = states(reference, torch.stack([ids[t - window:t] for _, ids, t, _ in some]))
        p, q = (log_softmax(reference.lm_head(x))  # (n, V)
                for x in (full[i:i + size], short[:, -1]))
        token = torch.stack([ids[t] for _, ids, t, _ in some])[:, None]
        both = torch.stack(((p - q).gather(1, token)[:, 0], (p.exp() * (p - q)).sum(1))).cpu()
        for n, (gap, _, _, at) in enumerate(some):
            gap[:, at] = both[:, n]
    return gaps


def information_gap(reference, rollouts, window, expected=False, positions=None):
    """-> for each rollout the gap (response tokens,) in nats: the sampled log-ratio or the expected
    one, a KL, which an improbable (say, wrong) sample cannot turn negative. See token_gaps."""
    return [gap[int(expected)] for gap in token_gaps(reference, rollouts, window, positions)]


# --------------------------------------------------------------------------------------------------
# the analyses: tables of runs


def recipe(args, seed, variant=None, start=None, rows=None, **changes):
    """The arguments of `rl.py --model ...` for a seed, with changes to them.

    Seed 0 lives in --out, as with rl.py's plain command, seed N in out/seedN. A variant has a
    folder of its own, with a copy of the tiny base. start: a model in place of stage 1, with the
    window set and nothing else. rows: problems with solutions for stage 1. Flags that eval.py does
    not know are rl.py's.
    """
    given = {"seed": seed, "out": str(Path(args.out) / (f"seed{seed}" if seed else ""))}
    given |= {name: getattr(args, name) for name in ("window", "max_new_tokens", "slots", "device")
              if getattr(args, name)}
    stage = rl.arguments(["--model", args.model[0], *args.rest], **given | changes)
    if variant:
        home = stage_folder(stage, "sft").parent
        stage.out = str(home / "analysis" / "runs" / variant)
        folder = stage_folder(stage, "sft")
        if stage.model == "tiny" and not (folder.parent / "base-wfull").exists():
            shutil.copytree(home / "base-wfull", folder.parent / "base-wfull")
        if start and not (folder / "config.json").exists():
            model = Transformer.from_pretrained(start, window=as_window(stage.window))
            model.save_pretrained(folder)
        if rows:  # the name tells other rows, so that a run on other data is not taken for this one
            text = "".join(json.dumps(row) + "\n" for row in rows)
            file = folder.parent / f"sft-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, lambda f: f.write_text(text))
            stage.sft_data = str(file)
    return stage


def run_all(job, tasks, workers):
    """[job(*task) for task in tasks], in so many processes."""
    if workers < 2 or len(tasks) < 2:
        return [job(*task) for task in tasks]
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*tasks)))


def arms(args, table, job=run_arm, workers=None):
    """{label: changes to the recipe, or a function of the seed} -> {label: [each seed's results]}.

    Runs that are done are reused.
    """
    tasks = [(recipe(args, seed, **(changes(seed) if callable(changes) else changes)),)
             for changes in table.values() for seed in args.seeds]
    results = iter(run_all(job, tasks, workers or args.workers))
    return {label: [next(results) for _ in args.seeds] for label in table}


def run_sft(stage):
    """Stage 1 alone, validated."""
    folder = convert(other_stage(
        stage, convert_sft.SETTINGS, window=stage.window, instruction=stage.instruction,
        micro_tokens=stage.micro_tokens, steps=stage.sft_steps, data=stage.sft_data))
    return {"sft": validate(folder, stage)}


def policies(args, seed):
    """label -> folder of SA and SWA after both stages."""
    return {f"{kind}-{stage.upper()}": stage_folder(recipe(args, seed, **changes), stage)
            for stage in ("sft", "rl") for kind, changes in BOTH.items()}


BOTH = {"SA": {"window": "full"}, "SWA": {}}


def cells(results, stage):
    """One run's results over the seeds -> the cells of a table's row."""
    found = [r[stage] for r in results]
    return {name: over_seeds([f[name]["scores"] for f in found]) for name in ("greedy", "T=1")} | {
        key: mean_of([f["T=1"] for f in found], key)
        for key in ("length", "truncated", "restatements")}


def bars(title, rows, group, by, what="T=1", **more):
    """A panel out of table rows: a group of bars for each row[group], a colour for each row[by]."""
    value = {(row[group], row[by]): row[what] for row in rows}
    x, labels = (list(dict.fromkeys(key[i] for key in value)) for i in (0, 1))
    series = {label: [value.get((at, label)) for at in x] for label in labels}
    return {"kind": "bar", "title": title, "x": x, "xlabel": "", "ylabel": f"accuracy, {what}",
            "series": series, **more}


def windows(args):
    """SA and SWA after SFT and after RL, by window"""
    sizes = args.windows or [16, 20, 24, 32, "full"]
    found = arms(args, {w: {"window": w} for w in sizes})
    rows = [{"model": f"{'SA' if w == 'full' else 'SWA'}-{stage.upper()}", "window": str(w),
             **cells(found[w], stage)} for w in sizes for stage in ("sft", "rl")]
    lines = {"kind": "line", "xlabel": "window, keys"}
    return rows, {"windows": [
        bars("accuracy", rows, "window", "model", **lines),
        bars("length", rows, "window", "model", "length", ylabel="tokens a response", **lines)]}


def strategies(args):
    """Ways from SA to SWA, before and after RL (ours: the paper's are unknown)"""
    plain = recipe(args, args.seeds[0])
    sa = arms(args, {"SA": {"window": "full", "full_layers": None}})
    ways = {
        "none": lambda seed: {"start": policies(args, seed)["SA-SFT"]},
        "direct": lambda seed: {"variant": None},
        "shrinking": lambda seed: {"window_from": 4 * plain.window},
        "1 full layer": lambda seed: {"full_layers": [1]},
        "2 full layers": lambda seed: {"full_layers": plain.full_layers or [1, 2]},
        "restate-only": lambda seed: {"rows": tiny_problems(4000, [seed, 4], restate=lambda _: 1)},
    }
    if plain.model != "tiny":
        del ways["restate-only"], ways["1 full layer"]
        ways["hybrid"] = ways.pop("2 full layers")
    found = arms(args, {label: lambda seed, label=label, way=way: {
        "variant": f"strategies/{label}", "full_layers": None, **way(seed)}
        for label, way in ways.items()}) | sa
    rows = [{"strategy": label, "stage": f"after {stage.upper()}", **cells(found[label], stage)}
            for label in found for stage in ("sft", "rl")]
    return rows, {"strategies": [bars("conversion strategies", rows, "strategy", "stage")]}


def budgets(args):
    """RL of SA and SWA for equal steps, and SWA's for the time that SA took, one run at a time"""
    arms(args, BOTH, run_sft)
    found, logs, hours = {}, {}, {}
    for label in ("SA, equal steps", "SWA, equal steps", "SWA, SA's time"):
        kind, budget = label.split(", ")

        def changes(seed, kind=kind, budget=budget):
            timed = {"hours": hours[seed], "steps": 10**6} if budget == "SA's time" else {}
            return {"variant": f"budgets/{'time' if timed else 'steps'}", **BOTH[kind],
                    "start": policies(args, seed)[f"{kind}-SFT"], **timed}

        found |= arms(args, {label: changes}, workers=1)
        for seed in args.seeds:
            folder = stage_folder(recipe(args, seed, **changes(seed)), "rl")
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            logs.setdefault(label, []).append([r for r in log if "step" in r])
            hours.setdefault(seed, logs[label][-1][-1]["elapsed"] / 3600)
    last = {label: [log[-1] for log in logs[label]] for label in logs}
    rows = [{"run": label, "steps": mean_of(last[label], "step"),
             "seconds": mean_of(last[label], "elapsed"), **cells(found[label], "rl")}
            for label in found]
    panels = []
    for key, unit in (("step", "RL steps"), ("elapsed", "seconds of RL")):
        x = np.linspace(0, max(r[key] for label in logs for r in last[label]), 41)[1:]
        series = {label.split(",")[0]: np.mean([
            np.interp(x, [r[key] for r in log], [r["reward"] for r in log], right=np.nan)
            for log in logs[label]], 0).tolist() for label in list(logs)[:2]}
        panels.append({"kind": "line", "title": f"by {unit}", "x": x.tolist(), "xlabel": unit,
                       "ylabel": "mean reward of a step", "series": series})
    return rows, {"budgets": panels}


def episodes_of(folder, problems, stage):
    """One answer at T=1 to each problem."""
    model = Transformer.from_pretrained(folder, device=pick_device(stage.device))
    tokenizer = Tokenizer(model.tokenizer_files)
    questions = [(as_prompt(tokenizer, p["problem"], stage.instruction), p["answer"])
                 for p in problems]
    return roll_out(model, tokenizer, questions, 2 * 10**6 + stage.seed, stage, 1.0, f"{folder}:")


def length_matched(a, b, bins=10):
    """Lengths of two sides -> indices into each, equally many of each bin of length."""
    edges = np.linspace(min(*a, *b), max(*a, *b) + 1, bins + 1)[1:-1]
    chosen = [], []
    for bin in range(bins):
        here = [np.flatnonzero(np.digitize(side, edges) == bin).tolist() for side in (a, b)]
        for mine, indices in zip(chosen, here):
            mine += indices[:min(map(len, here))]
    return chosen


def trajectories(args, seed):
    """Correct answers of SA-RL and SWA-RL to training problems -> {(pairing, teacher): rows}."""
    stage, n, sides = recipe(args, seed), args.limit or 1200, {}
    problems = tiny_problems(n, [seed, 13]) if stage.data == "tiny" else [
        p for p in load_problems(stage.data) if not held_out(p["problem"], rl.HELD_OUT)][:n]
    for teacher in BOTH:
        episodes = episodes_of(policies(args, seed)[f"{teacher}-RL"], problems, stage)
        sides[teacher] = {i: {**p, "solution": e.text, "tokens": len(e.tokens)}
                          for i, (p, e) in enumerate(zip(problems, episodes)) if e.reward}
    both = sides["SA"].keys() & sides["SWA"].keys()
    if not both:
        raise UsageError("no problem was solved by SA-RL and by SWA-RL: give more RL --steps")
    data = {("paired", t): [side[i] for i in sorted(both)] for t, side in sides.items()}
    rows = {t: list(side.values()) for t, side in sides.items()}
    matched = length_matched(*([row["tokens"] for row in side] for side in rows.values()))
    return data | {("length-matched", t): [rows[t][i] for i in chosen]
                   for t, chosen in zip(rows, matched)}


def cross_sft(args):
    """Students of both architectures on correct trajectories of both policies (paper's Table 4)"""
    arms(args, BOTH)
    data = run_all(trajectories, [(args, seed) for seed in args.seeds], args.workers)
    data, table, rows = dict(zip(args.seeds, data)), {}, []
    short = args.model[0] == "tiny" and "--sft-steps" not in args.rest  # few examples
    for key in data[args.seeds[0]]:
        for student, changes in BOTH.items():
            table[(*key, student)] = lambda seed, key=key, changes=changes: {
                "variant": f"cross-sft/{'-'.join(key)}", "rows": data[seed][key],
                **({"sft_steps": 150} if short else {}), **changes}
    for (pairing, teacher, student), results in arms(args, table, run_sft).items():
        used = [row for mine in data.values() for row in mine[pairing, teacher]]
        rows.append({"problems": pairing, "trajectories": f"{teacher}-RL's", "student": student,
                     **cells(results, "sft"), "examples": len(used) / len(data),
                     "their length": mean_of(used, "tokens")})
    panels = []
    for pairing in ("paired", "length-matched"):
        mine = [row for row in rows if row["problems"] == pairing]
        panels.append(bars(f"{pairing}, {mine[0]['examples']:.0f} examples", mine, "trajectories",
                           "student", xlabel="trained on"))
    return rows, {"cross-sft": panels}


def trajectory_gaps(folder, reference, stage, sizes, args):
    """One policy's locality: each trajectory's mean gaps by window, and where the gap sits."""
    stage.validate = args.limit or 256
    episodes = episodes_of(folder, validation_problems(stage), stage)
    reference = Transformer.from_pretrained(
        reference, device=pick_device(stage.device), dtype=torch.float32)
    tokenizer = Tokenizer(reference.tokenizer_files)
    found = {"right": [e.reward > 0 for e in episodes], "length": [len(e.tokens) for e in episodes]}
    for w in sizes:
        gaps = token_gaps(reference, episodes, w, args.positions)
        found[w] = [gap.nanmean(1).tolist() for gap in gaps]  # (log-ratio, KL) of each
        if w == stage.window:
            tenths = [[part.nanmean().item() for part in gap[1].tensor_split(10)] for gap in gaps]
            found["tenths"] = np.nanmean(tenths, 0).tolist()
            found["tokens"] = [
                [(tokenizer.decode([t], skip_special=False), kl)
                 for t, kl in zip(e.tokens[:80], gap[1].tolist())] if e.reward else None
                for e, gap in list(zip(episodes, gaps))[:32]]
    return found


def locality(args):
    """How much trajectories lean on what is beyond a window (our stand-in for Eq. 4)"""
    main = recipe(args, args.seeds[0]).window
    sizes = sorted({main, *(args.windows or [8, 12, 16, 20, 24, 32, 48])} - {"full"})
    if main == "full":
        raise UsageError("--analysis locality: give --window a number of keys")
    arms(args, BOTH)
    labels = list(policies(args, args.seeds[0]))
    tasks = [(policies(args, seed)[label], policies(args, seed)["SA-SFT"], recipe(args, seed),
              sizes, args) for label in labels for seed in args.seeds]
    results = iter(run_all(trajectory_gaps, tasks, args.workers))
    found = {label: [next(results) for _ in args.seeds] for label in labels}

    def gap(label, w, form, of="all", whole=False):
        return over_seeds([[[pair[form] * (length if whole else 1)] for pair, length, right in
                            zip(f[w], f["length"], f["right"]) if right or of == "all"]
                           for f in found[label]])

    rows = [{"policy": label, "trajectories": of, "KL a token": gap(label, main, 1, of),
             "log-ratio a token": gap(label, main, 0, of),
             "KL a trajectory": gap(label, main, 1, of, whole=True)}
            for label in labels for of in ("all", "correct")]
    kl = {"kind": "line", "ylabel": "KL, nats a token"}
    both = [pair for pair in zip(*(found[label][0]["tokens"] for label in labels[2:])) if all(pair)]
    example = min(both, key=lambda pair: max(map(len, pair)) == 80, default=([], []))  # a whole one
    return rows, {"locality": [
        bars(f"window {main}", rows, "policy", "trajectories", "KL a token", ylabel=kl["ylabel"]),
        {"title": "correct ones, by window", "x": sizes, "xlabel": "window, tokens", **kl,
         "series": {label: [gap(label, w, 1, "correct") for w in sizes] for label in labels}},
        {"title": "along the response", "x": list(range(5, 100, 10)), **kl,
         "xlabel": "% of the response", "series": {
             label: np.mean([f["tenths"] for f in found[label]], 0).tolist() for label in labels}},
    ], "locality-tokens": [
        {"kind": "strip", "title": f"one answer of {label}, window {main}", "xlabel": "",
         "ylabel": "KL, nats", "x": [token for token, _ in strip],
         "series": {label: [kl for _, kl in strip]}} for label, strip in zip(labels[2:], example)]}


def reach_example(rng, tokenizer, length, distance, queries=0.0):
    """Letters with one digit among them and `?` at the end, `distance` tokens after the digit ->
    (tokens, targets): the digit is asked for under that `?`, and, with queries > 0, also under
    some on the way, which makes training fast."""
    letters, digits, (query,) = (  # one by one: a real tokenizer would merge them
        [tokenizer.encode(c)[0] for c in text] for text in ("abcdefghijkl", "0123456789", "?"))
    tokens, fact = rng.choice(letters, length), length - 1 - distance
    digit = rng.choice(digits)
    asked = (np.arange(length) > fact) & (rng.random(length) < queries)
    asked[-1] = True
    tokens[asked], tokens[fact] = query, digit
    return tokens.tolist(), np.where(asked, digit, -1).tolist()


def reach_run(folder, stage, full_layers, distances, length, steps=300, batch=32, lr=3e-3, n=500):
    """Trains on retrieval -> scores (n, 1) at each distance: the tiny model from scratch, a real
    one from its checkpoint, with stage 1's settings."""
    if stage.model == "tiny":
        torch.set_num_threads(1)
        model = tiny_base(stage.seed)
    else:
        sft = other_stage(stage, convert_sft.SETTINGS, steps=stage.sft_steps)
        steps, batch, lr, n = sft.steps, sft.batch, sft.lr, sft.held_out
        model = Transformer.from_pretrained(stage.model, dtype=torch.float32)
    model.config.window, model.config.full_layers = as_window(stage.window), full_layers
    tokenizer = Tokenizer(model.tokenizer_files)
    settings = {"stage": "reach", "seed": stage.seed, "steps": steps}
    trainer = Trainer(model, folder, settings, pick_device(stage.device),
                      micro_tokens=stage.micro_tokens)
    if not trainer.done(steps):
        trainer.begin()
    while not trainer.done(steps):
        rng = np.random.default_rng([stage.seed, 14, trainer.step])
        rows = [dict(zip(("tokens", "targets"), reach_example(
            rng, tokenizer, length, rng.integers(1, length), queries=0.3))) for _ in range(batch)]
        asked = sum(t >= 0 for row in rows for t in row["targets"])
        trainer.update(rows, lambda logprobs, *_, asked=asked: -logprobs.sum() / asked,
                       schedule(trainer.step, steps, lr, steps // 10, "linear", decay_from=0.6))
        trainer.log({}, f"reach w={stage.window} step {trainer.step + 1}/{steps}", every=10)
        if trainer.step == steps or trainer.stopping:
            trainer.save(final=not trainer.stopping)
        if trainer.stopping:
            raise KeyboardInterrupt
    found, rng = [], np.random.default_rng([stage.seed, 15])
    for distance in distances:
        examples = [reach_example(rng, tokenizer, length, distance) for _ in range(n)]
        scores = []
        for part in torch.tensor(examples, device=trainer.device).split(100):
            tokens, targets = part.unbind(1)  # (n, T) each
            with torch.no_grad():
                right = states(model, tokens)[:, -1:] @ model.lm_head.weight.T
            scores += (right.argmax(-1) == targets[:, -1:]).int().tolist()
        found.append(scores)
    return found


def reach(args):
    """Retrieval at a chosen distance: beyond layers x (window - 1), pure SWA must fail"""
    config, W = convert_sft.config_of(args.model[0]), args.window or 16
    layers, limit = config.num_hidden_layers, config.max_position_embeddings
    if W == "full" or W < 3 or layers * (W - 1) + 35 > limit:
        raise UsageError(f"--analysis reach asks for facts beyond {layers} layers x (window - 1): "
                         f"give a --window from 3 to {(limit - 35) // layers + 1}")
    far, middle = layers * (W - 1), layers // 2
    distances = sorted({W // 2, W - 1, W, 2 * (W - 1), far - 2, far, far + 1, far + 10, far + 30})
    kinds = {"SA": ("full", ()), f"hybrid, layer {middle} full": (W, (middle,)), "SWA": (W, ())}
    runs = stage_folder(recipe(args, 0), "sft").parent / "analysis" / "runs" / "reach"
    tasks = [(runs / f"{label.split(',')[0]}-w{W}-seed{seed}", recipe(args, seed, window=window),
              full_layers, distances, far + 35)
             for label, (window, full_layers) in kinds.items() for seed in args.seeds]
    results = iter(run_all(reach_run, tasks, args.workers))
    series = {}
    for label in kinds:
        seeds = [next(results) for _ in args.seeds]
        series[label] = [over_seeds(scores) for scores in zip(*seeds)]
    rows = [{"distance": d, "where": "window" if d < W else "reach" if d <= far else "beyond",
             **{label: series[label][i] for label in series}} for i, d in enumerate(distances)]
    return rows, {"reach": [{
        "kind": "line", "title": f"{layers} layers, window {W}", "x": distances, "series": series,
        "xlabel": "distance of the fact, tokens", "ylabel": "accuracy (chance: 0.1)",
        "marks": {W - 1: "window - 1", far: f"{layers} x (window - 1)"}}]}


ANALYSES = {"locality": locality, "cross-sft": cross_sft, "windows": windows,
            "strategies": strategies, "budgets": budgets, "reach": reach}


def analyse(args):
    """Runs an analysis and writes <out>/<model>/analysis/<name>: .md, .json, .png."""
    if args.model[0] == "tiny" and args.analysis != "reach":
        run_all(pretrain_tiny, [(recipe(args, seed),) for seed in args.seeds], args.workers)
    rows, pictures = ANALYSES[args.analysis](args)
    folder = stage_folder(recipe(args, 0), "sft").parent / "analysis"
    title = f"{ANALYSES[args.analysis].__doc__}. Seeds {', '.join(map(str, args.seeds))}."
    write_report(folder, args.analysis, title, rows, pictures, args)


# --------------------------------------------------------------------------------------------------
# reports and pictures


def shown(value):
    """A table's cell as text."""
    if isinstance(value, dict):
        numbers = [value[key] for key in ("mean", "low", "high")]
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*numbers, d=3 if abs(numbers[0]) < 10 else 1)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def count(values):
    """The n of cells: `n = 512`."""
    n = sorted({v["n"] for v in values if isinstance(v, dict)})
    return f"n = {n[0]}{f' to {n[-1]}' if len(n) > 1 else ''}, 95 % intervals" if n else ""


def write_report(folder, name, title, rows, pictures, args):
    """Rows (dicts) and pictures {file: panels} -> Markdown, JSON and PNG; prints the table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([shown(row.get(k, "")) for k in keys] for row in rows)]
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    table = "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "",
                       f"{title} {count(v for row in rows for v in row.values())}: bootstrap over "
                       f"seeds, problems and repeats. `{command}`".lstrip(), ""])
    record = {"title": title, "command": command, "rows": rows,
              **describe_machine(pick_device(args.device))}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.md", lambda f: f.write_text(table))
    write_file(folder / f"{name}.json", lambda f: f.write_text(json.dumps(record, indent=1)))
    for file, panels in pictures.items():
        draw(folder / f"{file}.png", panels)
    print(f"\n{table}\n{folder / name}.md, .json and {', '.join(f'{p}.png' for p in pictures)}")


OTHERS = ["#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#000000"]


def draw(path, panels):
    """Panels of bars or lines side by side, or strips of tokens one above another; 800 px wide."""
    from matplotlib.figure import Figure  # takes a second

    strips = any(panel["kind"] == "strip" for panel in panels)
    grid, height = ((len(panels), 1), 1.7 * len(panels)) if strips else ((1, len(panels)), 3.6)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(*grid, squeeze=False, sharey=strips)
    for axis, panel in zip(axes.flat, panels):
        draw_panel(axis, panel)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [list(panel["series"]) for panel in panels]
    handles = dict(zip(*axes.flat[0].get_legend_handles_labels()[::-1]))
    if len(labels[0]) > 1 and all(mine == labels[0] for mine in labels):
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles),
                      frameon=False, fontsize=9)
    elif not strips:
        for axis in axes.flat:
            axis.legend(fontsize=8, frameon=False)
    figure.supxlabel(count(v for p in panels for s in p["series"].values() for v in s), x=0.99,
                     ha="right", fontsize=7, color="gray")
    write_file(path, lambda f: figure.savefig(f, dpi=200, format="png"))


def draw_panel(axis, panel):
    kind, names = panel["kind"], any(isinstance(x, str) for x in panel["x"])
    at = np.arange(len(panel["x"])) if names or kind == "bar" else np.array(panel["x"], float)
    for i, (label, values) in enumerate(panel["series"].items()):
        named = [color for name, color in COLORS.items() if label.startswith(name)]
        look = {"color": (named or OTHERS[i:])[0], "label": label, "capsize": 2}
        cells = [v if isinstance(v, dict) else {"mean": np.nan if v is None else v} for v in values]
        mean = np.array([c["mean"] for c in cells])
        error = [[abs(c["mean"] - c.get(end, c["mean"])) for c in cells] for end in ("low", "high")]
        width, shift = 0.8 / len(panel["series"]), 0
        if kind == "line":
            few = len(at) < 20
            look |= {"lw": 4, "ms": 8} if label == "SA" and few else {"lw": 1.5, "ms": 5}  # beneath
            look |= {"ls": "--", "mfc": "white", "ms": 8} if "SFT" in label else {}
            axis.errorbar(at, mean, error if few else None, marker="o" if few else None, **look)
        else:
            shift = (i + 0.5) * width - 0.4
            axis.bar(at + shift, mean, 0.94 * width, yerr=error if kind == "bar" else None, **look)
        for x, c in zip(at, cells):  # each training seed a dot
            if len(c.get("seeds", [])) > 1:
                axis.plot([x + shift] * len(c["seeds"]), c["seeds"], "k.", ms=3, alpha=0.5)
    if names:
        ticks = [{"<eos>": "eos", "\\boxed{": "box"}.get(x, x) for x in panel["x"]]
        axis.set_xticks(at, ticks, **({"fontsize": 6} if kind == "strip" else {}))
    for x, text in panel.get("marks", {}).items():
        axis.axvline(x + 0.5, color="gray", lw=0.8, ls=":")
        axis.text(x + 0.3, 0.05, text, rotation=90, ha="right", color="gray", fontsize=8)
    axis.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"], ylim=(0, None))
    axis.set_title(panel["title"], fontsize=10)
    axis.tick_params(labelsize=8) if kind != "strip" else axis.margins(x=0.01)


# --------------------------------------------------------------------------------------------------
# the command


def load(name, args):
    """-> (model, tokenizer), with --window in place of the model's own."""
    window = as_window(args.window) if args.window else "config"
    model = Transformer.from_pretrained(name, window=window, device=pick_device(args.device))
    if model.config.hidden_size == convert_sft.TINY.hidden_size:
        torch.set_num_threads(1)  # tiny matrices gain nothing from more
    return model, Tokenizer(model.tokenizer_files)


def benchmark(args):
    """Every model on every benchmark -> the table, with differences to the first model."""
    names, found = [name for name in args.benchmarks.split(",") if name], {}
    problems = {name: load_benchmark(name, args.seed)[:args.limit] for name in names}
    for path in args.model:
        model, tokenizer = load(path, args)
        parts = (Path(path).resolve() if Path(path).exists() else Path(path)).parts[-2:]
        label = "/".join(parts) + (f"@w{args.window}" if args.window else "")
        for name in names:
            own = argparse.Namespace(**vars(args))
            if args.instruction is None:
                own.instruction = "" if name == "tiny" else INSTRUCTION
            longest = max(len(as_prompt(tokenizer, p["problem"], own.instruction))
                          for p in problems[name])
            free = min(32768, model.config.max_position_embeddings - longest)
            own.max_new_tokens = args.max_new_tokens or free
            keys = ("samples", "temperature", "top_p", "max_new_tokens", "instruction", "seed",
                    "chunk")
            settings = {"model": path, "weights": fingerprint(model), "window": model.config.window,
                        "benchmark": name, **{key: getattr(own, key) for key in keys}}
            file = Path(args.out) / "eval" / label / f"{Path(name).stem}.jsonl"
            found[label, name] = answer_benchmark(
                model, tokenizer, problems[name], file, settings, own)
    rows, scores = [], {key: scores_of(records) for key, records in found.items()}
    labels = list(dict.fromkeys(label for label, _ in found))
    for chosen in [[name] for name in names] + [names] * (len(names) > 1):
        for label in labels:
            row = {"benchmark": Path(chosen[0]).stem, "model": label}
            first, mine = ([scores[key, name] for name in chosen] for key in (labels[0], label))
            if len(chosen) == 1:
                row |= measure(found[label, chosen[0]])
            else:
                mean, low, high, _ = paired_bootstrap([0 * x for x in mine], mine)
                row |= {"benchmark": "average", f"avg@{args.samples}": {
                    "mean": mean, "low": low, "high": high, "n": sum(map(len, mine))}}
            if label != labels[0]:
                mean, low, high, p = paired_bootstrap(first, mine)
                row |= {"difference": {"mean": mean, "low": low, "high": high, "n": 0}, "p": p}
                row["difference"]["n"] = sum(map(len, mine))
            rows.append(row)
    title = f"Difference and p: paired bootstrap against {labels[0]}." * (len(labels) > 1)
    write_report(Path(args.out) / "eval", "results", title, rows, {"results": [
        bars("", rows, "benchmark", "model", f"avg@{args.samples}", ylabel="accuracy")]}, args)


def parser():
    p = convert_sft.FlagParser(description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog=(
        "With --analysis, rl.py's flags (--steps, --data, ...) are understood too."))

    def add(flag, text, default=None, kind=None, **more):
        text += f" (default: {default})" if default is not None else ""
        p.add_argument(flag, type=kind or type(default if default is not None else ""),
                       default=default, help=text, **more)

    # what to do
    p.add_argument("--model", nargs="+", default=[], help="folders or hub ids of models; with "
                   "--analysis tiny, or a base model")
    add("--benchmarks", f"names with commas out of tiny, {', '.join(BENCHMARKS)}, or JSONL files")
    add("--prompt", "stream one answer to this")
    add("--regrade", "grade this file of generations again, without a model")
    add("--analysis", "run one of the paper's analyses", choices=ANALYSES)
    # sampling
    add("--samples", "answers to each problem", 1)
    add("--temperature", "0: greedy; DeepSeek-R1's distillations ask for 0.6", 1.0)
    add("--top-p", "1: no truncation; DeepSeek-R1's distillations ask for 0.95", 1.0)
    add("--max-new-tokens", "tokens of an answer (default: what the positions leave, up to 32768)",
        kind=int)
    add("--instruction", "appended to each problem (default: to box the answer; none for tiny and "
        "--prompt)")
    add("--window", "in place of the model's own: keys, or full", kind=window_arg)
    add("--limit", "use the first so many problems", kind=int)
    add("--chunk", "problems between two writes: an interruption loses at most these", 64)
    # analyses
    add("--seeds", "training seeds, such as 0,1,2", [0], lambda s: [int(x) for x in s.split(",")])
    add("--windows", "the windows of a curve, such as 16,24,full",
        kind=lambda s: [window_arg(x) for x in s.split(",")])
    add("--positions", "locality: look at so many tokens of each response (default: all)", kind=int)
    add("--workers", "runs side by side", min(2, os.cpu_count()))
    # the machine
    add("--out", "where results go", "out")
    add("--seed", "of the sampling", 0)
    add("--slots", "sequences at a time (default: by free memory)", kind=int)
    add("--device", "auto, cpu or cuda", "auto", choices=["auto", "cpu", "cuda"])
    return p


def main():
    args, rest = parser().parse_known_args()
    tasks = [task for task in ("benchmarks", "prompt", "regrade", "analysis")
             if getattr(args, task) is not None]
    if len(tasks) != 1:
        raise UsageError("give one of --benchmarks, --prompt, --regrade, --analysis (see --help)")
    if rest and not args.analysis:
        raise UsageError(f"unknown arguments {' '.join(rest)} (see --help)")
    if not args.regrade and not (args.benchmarks and args.model) and len(args.model) != 1:
        raise UsageError(f"--{tasks[0]} needs a --model, such as out/tiny/rl-w24")
    for name in ("samples", "chunk", "limit", "workers", "slots", "max_new_tokens", "positions"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a whole number above 0")
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise UsageError("--temperature is 0 or more; --top-p is above 0 and at most 1")
    args.rest = rest
    if args.prompt is not None:
        return stream_answer(*load(args.model[0], args), args)
    if args.regrade:
        return regrade(args.regrade)
    print("settings:", json.dumps(vars(args)), flush=True)
    analyse(args) if args.analysis else benchmark(args)


if __name__ == "__main__":
    cli(main)
