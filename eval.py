"""Evaluation: benchmarks with intervals, the locality of trajectories, and the paper's analyses.

Answers are sampled under the model's own window and graded by the checker that was the reward.
Accuracies come with bootstrap intervals over problems and repeats, and beside them what qualifies
them: the truncated share and the length. Locality asks how much a trajectory leans on what lies
beyond a window. The analyses set SA against SWA: each is a table of runs, made by the stages in
convert_sft.py and rl.py and reused where they are done, and ends in Markdown, JSON and a picture.

In the order of the file: benchmarks; statistics; locality; the analyses; reports and pictures; the
audit of a folder's window; the page for a browser; the command.

Left out on purpose: few-shot prompts, multiple choice, judges that are models, other engines.

    python eval.py --model out/tiny/rl-w24 out/tiny/sft-w24 --benchmarks tiny --samples 8
    python eval.py --analysis locality --model tiny
    python eval.py --audit out/tiny/rl-w24
    python eval.py --page out/tiny/sft-wfull out/tiny/sft-w24 out/tiny/rl-w24
"""

import argparse
import base64
import codecs
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import rl
from convert_sft import (
    COLORS,
    INSTRUCTION,
    TASKS,
    FlagParser,
    Problems,
    Run,
    Trainer,
    as_problem,
    as_prompt,
    config_of,
    convert,
    describe_machine,
    load_hub,
    load_problems,
    make_row,
    markdown,
    new_figure,
    pick_device,
    pretrain,
    read_finished,
    read_log,
    save_figure,
    schedule,
    untrained,
    window_arg,
)
from model import (
    LOGITS_PER_CHUNK,
    MODEL_FILES,
    Cache,
    Tokenizer,
    Transformer,
    UsageError,
    append_file,
    cli,
    fingerprint,
    generate,
    log_softmax,
    read_config,
    resolve,
    write_file,
)
from rl import (  # noqa: F401
    SAMPLINGS,
    RLSettings,
    bootstrap_ci,
    extract_answer,
    grade_batch,
    interval,
    is_correct,
    leave_out_long,
    open_model,
    own_or_window,
    resample,
    roll_out,
    run_arm,
    validate,
)

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
    """A name of BENCHMARKS, a tiny task (rl.py's validation problems of that seed), or a JSONL
    file -> problems."""
    if name in TASKS:
        return TASKS[name].validation(512, seed)
    if name not in BENCHMARKS:
        if not Path(name).is_file():
            raise UsageError(f"--benchmarks {name}: no such file; give a JSONL file or names out "
                             f"of {', '.join([*TASKS, *BENCHMARKS])}")
        return load_problems(name)
    hub_id, config, split, problem, answer = BENCHMARKS[name]
    try:
        rows = [(row[problem], row[answer]) for row in load_hub(hub_id, config, split)]
    except Exception as error:  # network, moved, gated: many types, one cure
        raise UsageError(f"--benchmarks {name}: {hub_id} could not be fetched from the hub "
                         f"({type(error).__name__}): check the connection, or give the problems as "
                         "a JSONL file") from None
    return [as_problem({"problem": p, "answer": ",".join(a) if isinstance(a, list) else a})
            for p, a in rows]


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
    for first in range(len(records), len(problems), args.chunk):
        chunk = problems[first:first + args.chunk]
        new = answer_chunk(model, tokenizer, chunk, first, args)
        append_file(file, as_jsonl(new))
        records += new
    return records[:len(problems)]


def answer_chunk(model, tokenizer, problems, first, args):
    """args.samples answers to each problem; the j-th to problem first + i has its own seed."""
    seeds = [np.random.default_rng([args.seed, 11, first + i]).integers(2**62, size=args.samples)
             for i in range(len(problems))]
    groups = roll_out(model, tokenizer, problems, args.samples, np.stack(seeds), args.temperature,
                      args, f"problems {first} to {first + len(problems) - 1}:", top_p=args.top_p)
    return [{"problem": p["problem"], "answer": p["answer"],
             "responses": [e.text for e in group], "lengths": [len(e.tokens) for e in group],
             "finished": [e.finished for e in group],
             "verdicts": [verdict_of(e.verdict, e.finished) for e in group]}
            for p, group in zip(problems, groups)]


def verdict_of(verdict, finished):
    """An answer that was cut off is wrong, as in training."""
    return verdict if finished else "truncated"


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
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UsageError(f"{file} line {number} is not JSON: remove the file") from None
    first = rows[0] if rows else None
    whole = isinstance(first, dict) and isinstance(first.get("settings"), dict)
    if not whole or not all(map(is_record, rows[1:])):
        raise UsageError(f"{file} does not hold generations of eval.py: its first line has the "
                         "settings, each other one a problem with its answers")
    return first["settings"], rows[1:]


def is_record(row):
    """Whether this is what answer_chunk writes; its verdicts may be missing."""
    if not isinstance(row, dict) or {type(row.get(key)) for key in ("problem", "answer")} != {str}:
        return False
    kinds = {"responses": str, "lengths": int, "finished": bool}
    lists = {key: row.get(key) for key in kinds} | {"verdicts": row.get("verdicts", [])}
    if not all(isinstance(values, list) for values in lists.values()):
        return False
    n = len(lists["responses"])
    return len(lists["verdicts"]) in (0, n) and all(
        len(lists[key]) == n and all(type(value) is kind for value in lists[key])
        for key, kind in kinds.items())


def write_generations(file, settings, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda f: f.write_text(as_jsonl([{"settings": settings}, *records])))


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def regrade(file):
    """Grades generations again, in place, and says what changed."""
    settings, records = read_generations(file)
    grader = getattr(TASKS.get(settings.get("benchmark")), "grade", None) or rl.grade
    before, after = [], []
    for r in records:
        n = len(r["responses"])
        before += r.get("verdicts") or [None] * n
        verdicts = grade_batch(r["responses"], [r["answer"]] * n, grader)
        r["verdicts"] = [verdict_of(*pair) for pair in zip(verdicts, r["finished"])]
        after += r["verdicts"]
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
    print(f"[at most {limit} tokens, --max-new-tokens]", file=sys.stderr)
    rollout, = generate(model, [ids], limit, args.temperature, tokenizer.stop_ids, 1, args.seed,
                        top_p=args.top_p, n_ids=tokenizer.n_ids, stream=show)
    print(decoder.decode(b"", final=True))
    cut = "" if rollout.finished else ", cut off at --max-new-tokens"
    tok_per_s = len(rollout.tokens) / (time.time() - began)
    print(f"[{len(rollout.tokens)} tokens, {tok_per_s:.0f} tok/s{cut}]", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# statistics


@dataclass
class Estimate:
    """A mean with its interval, of n problems; seeds: the mean of each training seed."""

    mean: float
    low: float
    high: float
    n: int
    seeds: list = field(default_factory=list)


def over_seeds(groups, seed=0, rate=True):
    """One array of scores (P, R) for each training seed -> Estimate; rate: they lie in [0, 1].

    Resamples seeds, then problems, then repeats. One seed's interval says nothing about training;
    with three seeds it is nearly their range.
    Seeds without any problem (no correct trajectory, say) are left out; nan where all are.
    """
    groups = [scores for scores in groups if len(scores)]
    if not groups:
        return Estimate(math.nan, math.nan, math.nan, 0)
    means = np.stack([resample(scores, seed=seed + i) for i, scores in enumerate(groups)])
    S, n = means.shape
    rng = np.random.default_rng([seed, 2])
    some_seeds, some_means = rng.integers(S, size=(n, S)), rng.integers(n, size=(n, S))
    low, high = interval(means[some_seeds, some_means].mean(1),
                         scores=np.concatenate(groups) if rate else ())
    seeds = [float(np.mean(scores)) for scores in groups]
    return Estimate(float(np.mean(seeds)), low, high, sum(map(len, groups)), seeds)


def paired_bootstrap(a, b, seed=0):
    """Scores (P, R) of two models on the same problems -> (mean(b) - mean(a), low, high, p).

    p is two-sided, for the null of no difference: the share of resamplings that lie at least as far
    from the observed difference as that lies from 0 (the bootstrap distribution, shifted to the
    null). Lists of score arrays, one for each benchmark, compare the averages over the benchmarks.
    """
    if not isinstance(a, list):
        a, b = [a], [b]
    if [len(x) for x in a] != [len(x) for x in b]:
        raise ValueError("paired_bootstrap needs scores of both models on the same problems")
    observed = float(np.mean([np.mean(y) - np.mean(x) for x, y in zip(a, b)]))
    differences = [resample(y, seed=seed + i, stream=1) - resample(x, seed=seed + i)
                   for i, (x, y) in enumerate(zip(a, b))]
    mean = np.mean(differences, 0)
    far = np.abs(mean - observed) >= abs(observed) - 1e-12
    return observed, *interval(mean), float((1 + far.sum()) / (1 + len(mean)))


def pass_at_k(correct, n, k):
    """The chance that k of n answers, drawn without repetition, hold a right one (2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass
class Vote:
    answer: str
    count: int
    right: bool


def majority(responses, verdicts):
    """maj@k of one problem: whether the most frequent answer is right, ties shared; answers that
    were cut off or are missing have no vote."""
    votes = []
    for text, verdict in zip(responses, verdicts):
        answer = extract_answer(text)
        if answer is None or verdict == "truncated":
            continue
        for vote in votes:
            if vote.answer == answer or is_correct(f"\\boxed{{{answer}}}", vote.answer):
                vote.count += 1
                break
        else:
            votes.append(Vote(answer, 1, verdict == "correct"))
    most = max((vote.count for vote in votes), default=0)
    return float(np.mean([vote.right for vote in votes if vote.count == most])) if votes else 0.0


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


@dataclass
class Question:
    """A response token whose two predictions are compared."""

    gap: torch.Tensor  # (2, response tokens) of its rollout, to be filled in
    ids: torch.Tensor  # prompt and response
    at: int  # index in ids
    column: int  # index in gap


@torch.no_grad()
def token_gaps(reference, rollouts, window, positions=None, micro_tokens=16384):
    """-> for each rollout (2, response tokens) in nats: the sampled log-ratio, and its expectation.

    log p(x_t | all before) - log p(x_t | the last W tokens), and KL(p(. | all) || p(. | last W)),
    under `reference`: our stand-in for the paper's Eq. 4, after LongPPL (arXiv 2410.23771). Exact:
    the W tokens are run on their own, as a windowed forward would let layers hop past W; RoPE is
    relative, so they may begin at position 0. positions: look at so many tokens of a rollout only,
    evenly spaced (NaN elsewhere): long responses under a large model.
    """
    gaps, questions, full = [], [], []
    for r in rollouts:
        P, ids = len(r.prompt), torch.tensor(list(r.prompt) + list(r.tokens))
        gap = torch.zeros(2, len(r.tokens), dtype=torch.promote_types(reference.dtype, torch.float))
        at = torch.arange(len(ids))[max(P, window + 1):]  # before, the window holds everything
        if positions and len(at) > positions:
            gap[:, at - P] = math.nan
            at = at[torch.linspace(0, len(at) - 1, positions).round().long()]
        ids = ids.to(reference.device)
        full.append(reference.states(ids[None])[0, at - 1])  # (tokens asked, C)
        questions += [Question(gap, ids, t, t - P) for t in at.tolist()]
        gaps.append(gap)
    full = torch.cat(full) if full else None
    size = max(1, min(micro_tokens // window, LOGITS_PER_CHUNK // reference.config.vocab_size))
    for i in range(0, len(questions), size):
        some = questions[i:i + size]
        last = torch.stack([q.ids[q.at - window:q.at] for q in some])  # (n, W)
        short = reference.states(last)[:, -1]
        everything = log_softmax(reference.logits(full[i:i + size]))  # (n, V)
        windowed = log_softmax(reference.logits(short))
        token = torch.stack([q.ids[q.at] for q in some])[:, None]
        log_ratio = (everything - windowed).gather(1, token)[:, 0]
        kl = (everything.exp() * (everything - windowed)).sum(1)
        both = torch.stack((log_ratio, kl)).cpu()
        for n, q in enumerate(some):
            q.gap[:, q.column] = both[:, n]
    return gaps


def information_gap(reference, rollouts, window, expected=False, positions=None):
    """-> for each rollout the gap (response tokens,) in nats: the sampled log-ratio or the expected
    one, a KL, which an improbable (say, wrong) sample cannot turn negative. See token_gaps."""
    return [gap[int(expected)] for gap in token_gaps(reference, rollouts, window, positions)]


@dataclass
class Trajectory:
    """An answer and its gaps, in nats."""

    correct: bool
    length: int  # tokens
    log_ratio: dict  # window: mean over its tokens
    kl: dict
    tenths: list  # mean KL in each tenth of the response, under the run's own window
    tokens: list  # (text, KL) of the first 80 tokens, likewise


def trajectories_of(folder, reference, settings, windows, args):
    """One policy's answers to validation problems, measured -> list[Trajectory]."""
    leave_out_long(folder, settings)
    problems = settings.task.validation(args.limit or 256, settings.seed)
    episodes = answers(folder, problems, settings)
    device = settings.start_device()
    reference = Transformer.from_pretrained(reference, device=device, dtype=torch.float32)
    tokenizer = Tokenizer(reference.tokenizer_files)
    found = [Trajectory(e.reward > 0, len(e.tokens), {}, {}, [], []) for e in episodes]
    for window in windows:
        gaps = token_gaps(reference, episodes, window, args.positions)
        for trajectory, episode, gap in zip(found, episodes, gaps):
            log_ratio, kl = gap.nanmean(1).tolist()
            trajectory.log_ratio[window], trajectory.kl[window] = log_ratio, kl
            if window == settings.window:
                trajectory.tenths = [part.nanmean().item() for part in gap[1].tensor_split(10)]
                texts = [tokenizer.decode([t], skip_special=False) for t in episode.tokens[:80]]
                trajectory.tokens = list(zip(texts, gap[1].tolist()))
    return found


def answers(folder, problems, settings):
    """One Episode at T=1 to each problem, by the model in a folder."""
    model, tokenizer = open_model(folder, settings)
    groups = roll_out(model, tokenizer, problems, 1, 2 * 10**6 + settings.seed, 1.0, settings,
                      f"{folder}:")
    return [episode for episode, in groups]


# --------------------------------------------------------------------------------------------------
# the analyses: tables of runs


@dataclass
class Planned:
    """A run of an analysis: rl.py's settings, and what stands in for its stage 1."""

    settings: RLSettings
    base: Path | None = None  # the tiny base that it begins with, to be copied
    start: Path | None = None  # a model in place of stage 1: the window is set and nothing else
    rows: list | None = None  # problems with solutions for stage 1


def plan(args, seed, variant=None, start=None, rows=None, **changes):
    """The run of `rl.py --model ...` for a seed, with changes to its settings; touches no disk.

    Seed 0 lives in --out, as with rl.py's plain command, seed N in out/seedN; a variant in a folder
    of its own. Flags that eval.py does not know are rl.py's.
    """
    given = {"seed": seed, "out": str(Path(args.out) / (f"seed{seed}" if seed else ""))}
    for name in ("window", "max_new_tokens", "slots", "device"):
        if name in args and getattr(args, name) not in (None, "own"):
            given[name] = getattr(args, name)
    if args.window is None:
        given["window"] = None
    flags = vars(rl.parser().parse_args(["--model", args.model[0], *args.rest]))
    settings = RLSettings.of(**flags | given | changes)
    if not variant:
        return Planned(settings)
    home = settings.folder().parent
    settings = settings.but(out=str(home / "analysis" / "runs" / variant))
    if rows:  # the name tells other rows, so that a run on other data is not taken for this one
        name = f"sft-{hashlib.sha256(as_jsonl(rows).encode()).hexdigest()[:8]}.jsonl"
        settings = settings.but(sft_data=str(settings.folder().parent / name))
    return Planned(settings, home / "base-wfull" if settings.tiny else None, start, rows)


def prepare(planned):
    """What a planned run needs on the disk before it can start -> its settings."""
    settings = planned.settings
    folder = settings.folder("sft")
    home = folder.parent
    if planned.base and not (home / "base-wfull").exists():
        shutil.copytree(planned.base, home / "base-wfull")
    if planned.start and not (folder / "config.json").exists():
        model = Transformer.from_pretrained(planned.start)
        model.config = settings.attention_of(model.config)
        model.save_pretrained(folder)
    if planned.rows:
        home.mkdir(parents=True, exist_ok=True)
        write_file(Path(settings.sft_data), lambda f: f.write_text(as_jsonl(planned.rows)))
    return settings


def run_grid(args, table, job=run_arm, workers=None):
    """{label: f(seed) -> Planned} -> {label: [each seed's results]}; runs that are done are reused.
    """
    tasks = [(prepare(planned(seed)),) for planned in table.values() for seed in args.seeds]
    results = iter(run_all(job, tasks, workers or args.workers))
    return {label: [next(results) for _ in args.seeds] for label in table}


def run_all(job, tasks, workers):
    """[job(*task) for task in tasks], in so many processes."""
    if workers < 2 or len(tasks) < 2:
        return [job(*task) for task in tasks]
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*tasks)))


def run_sft(settings):
    """Stage 1 alone, validated."""
    leave_out_long(settings.base(), settings)
    return {"sft": validate(convert(settings.stage1), settings)}


BOTH = {"SA": {"window": None}, "SWA": {}}


def both_arms(args):
    return {arm: partial(plan, args, **changes) for arm, changes in BOTH.items()}


def policy(args, seed, label):
    """The folder of SA-SFT, SWA-SFT, SA-RL or SWA-RL."""
    arm, stage = label.split("-")
    return plan(args, seed, **BOTH[arm]).settings.folder(stage.lower())


POLICIES = "SA-SFT", "SWA-SFT", "SA-RL", "SWA-RL"


def cells(results, stage):
    """One run's results over the seeds -> the cells of a table's row."""
    found = [result[stage] for result in results]
    row = {name: over_seeds([f[name]["scores"] for f in found]) for name in SAMPLINGS}
    others = [key for key in found[0]["T=1"] if key not in ("scores", "example")]
    return row | {key: mean_of([f["T=1"] for f in found], key) for key in others}


def by_size(args, results):
    """One validation a seed, as rl.validate returns it -> {size of a problem: Estimate at T=1}."""
    settings = [plan(args, seed).settings for seed in args.seeds]
    sizes = [[s.task.size(p["problem"]) for p in s.task.validation(s.validate, s.seed)]
             for s in settings]
    return {size: over_seeds([np.array(result["T=1"]["scores"])[np.array(mine) == size]
                              for mine, result in zip(sizes, results)])
            for size in sorted({size for mine in sizes for size in mine})}


def size_panel(args, found, title):
    """{label: one validation a seed} -> accuracy by the size of the problem."""
    lines = {label: by_size(args, results) for label, results in found.items()}
    sizes, series = list(next(iter(lines.values()))), {k: [*v.values()] for k, v in lines.items()}
    return Panel("line", title, sizes, series, "size of the problem", "accuracy, T=1")


def validated(args, which):
    """{label: f(seed) -> (folder, window)} -> {label: one validation a seed}."""
    tasks = [(folder, plan(args, seed).settings, window) for f in which.values()
             for seed in args.seeds for folder, window in [f(seed)]]
    results = iter(run_all(rl.validate, tasks, args.workers))
    return {label: [next(results) for _ in args.seeds] for label in which}


def recipe(args):
    """The recipe, from the SA base on: as it is, under the window, after SFT, after RL"""
    run_grid(args, both_arms(args))
    W = plan(args, 0).settings.window
    which = {}
    for label, window in (("SA base", "own"), (f"SA base, window {W}", W)):
        which[label] = lambda seed, w=window: (plan(args, seed).settings.base(), w)
    which |= {label: lambda seed, label=label: (policy(args, seed, label), "own")
              for label in POLICIES}
    found = validated(args, which)
    rows = [{"model": label, **cells([{"of": r} for r in results], "of")}
            for label, results in found.items()]
    curves = {}
    for arm, change in BOTH.items():
        logs = [read_log(plan(args, seed, **change).settings.folder()) for seed in args.seeds]
        curves[arm] = np.mean([[r["reward"] for r in log] for log in logs], 0).tolist()
    steps = list(range(1, len(curves["SA"]) + 1))
    shown = {label: found[label] for label in POLICIES}
    return rows, {"recipe": [
        size_panel(args, shown, f"window {W}"),
        Panel("line", "", steps, curves, "step of RL", "mean reward")]}


def arms(args):
    """From one SWA-SFT: whose trajectories are trained on, and what selects them"""
    run_grid(args, both_arms(args))

    def of_sa_rl(seed):
        return plan(args, seed, "arms/sa-rl", policy(args, seed, "SWA-SFT"), advantage="filtered",
                    rollouts_by=str(policy(args, seed, "SA-RL")))

    def more_sft(seed):
        """As long as GRPO took."""
        now = plan(args, seed).settings
        seconds = sum(r["seconds"] for r in read_log(now.folder()))
        step = np.median([r["seconds"] for r in read_log(policy(args, seed, "SWA-SFT"))])
        return plan(args, seed, "arms/more-sft", sft_steps=now.stage1.steps + int(seconds / step))

    table = {("SWA-RL: GRPO", "its own", "outcome"): partial(plan, args),
             ("filtered on-policy SFT", "its own", "outcome"):
                 partial(plan, args, advantage="filtered"),
             ("SFT on SA-RL's right answers", "another's", "outcome"): of_sa_rl,
             ("on-policy distillation from SA-SFT", "its own", "SA teacher"):
                 partial(plan, args, advantage="distill")}
    found = run_grid(args, table)
    steps = {label: [read_log(table[label](seed).settings.folder())[-1]["step"]
                     for seed in args.seeds] for label in table}
    longer = ("more SFT, for GRPO's time", "another's", "SA teacher")
    found |= run_grid(args, {longer: more_sft}, run_sft)
    steps[longer] = [more_sft(seed).settings.sft_steps for seed in args.seeds]
    start = [{"sft": result["sft"]} for result in found["SWA-RL: GRPO", "its own", "outcome"]]
    rows = [{"arm": "SWA-SFT, the start", "trajectories": "", "selected by": "", "steps": "",
             **cells(start, "sft")}]
    rows += [{"arm": name, "trajectories": whose, "selected by": by,
              "steps": float(np.mean(steps[name, whose, by])),
              **cells(results, "sft" if name == longer[0] else "rl")}
             for (name, whose, by), results in found.items()]
    cell = {(row["trajectories"], row["arm"].split()[0]): row["T=1"] for row in rows[1:]}
    series = {"by outcome: GRPO": [cell["its own", "SWA-RL:"], None],
              "by outcome: likelihood of the right ones": [cell["its own", "filtered"],
                                                           cell["another's", "SFT"]],
              "towards the SA teacher": [cell["its own", "on-policy"], cell["another's", "more"]]}
    return rows, {"arms": [Panel(
        "bar", "dotted: the start, SWA-SFT", ["its own trajectories", "another policy's"], series,
        "", "accuracy, T=1", level=rows[0]["T=1"].mean)]}


def dose(args):
    """The share of steps that restate in SFT's data, and a base that never saw a restatement"""
    task, table = TASKS["tiny"], {}
    for p in (0, 0.01, 0.02, 0.05, 0.1):
        table[f"{p:g}"] = lambda seed, p=p: plan(args, seed, f"dose/{p:g}",
                                                 rows=task.restating(p, seed))
    table["0.26, as shipped"] = partial(plan, args)
    table["0.26, base without"] = partial(plan, args, model="tiny-unrestated")
    found = run_grid(args, table)
    rows = [{"restating": label, "stage": f"after {stage.upper()}", **cells(found[label], stage)}
            for label in found for stage in ("sft", "rl")]
    panel = grouped("", rows, "restating", "stage",
                    xlabel="probability of restating, a step of SFT's solutions")
    return rows, {"dose": [panel]}


def grid(args):
    """The window of sampling x of the update x of the evaluation"""
    rows, panels = [], []
    sizes = args.windows or [plan(args, 0).settings.window]
    for W in sizes:
        names = {None: "full", W: str(W)}
        runs = {}
        for update in names:
            for sampled in names:
                def planned(seed, sampled=sampled, update=update):
                    if sampled == update:
                        return plan(args, seed, window=update)
                    start = plan(args, seed, window=update).settings.folder("sft")
                    return plan(args, seed, f"grid/sampled-{names[sampled]}-w{W}", start,
                                window=update, rollout_window=sampled)

                runs[sampled, update] = planned
        run_grid(args, {key: runs[key] for key in runs if key[0] == key[1]})
        run_grid(args, runs)
        which = {(sampled, update, at): lambda seed, f=f, at=at: (f(seed).settings.folder(), at)
                 for (sampled, update), f in runs.items() for at in names}
        which |= {("SFT", update, at): lambda seed, u=update, at=at: (
                      plan(args, seed, window=u).settings.folder("sft"), at)
                  for update in names for at in names}
        found = validated(args, which)
        for (sampled, update, at), results in sorted(found.items(), key=lambda x: str(x[0])):
            row = {"window": W, "sampled under": names.get(sampled, "(SFT only)"),
                   "updated under": names[update], "evaluated under": names[at]}
            mine, before = ([r["T=1"]["scores"] for r in of]
                            for of in (results, found["SFT", update, at]))
            row["T=1"] = over_seeds(mine)
            if sampled != "SFT":
                row["log-odds over its SFT"] = log_odds(before, mine)
            rows.append(row | {"length": mean_of([r["T=1"] for r in results], "length")})
        brief = {None: "full", W: "W"}
        shown = {f"sampled {brief[s]}, updated {brief[u]}": found[s, u, W] for s, u in runs}
        shown = {"SWA-SFT": found["SFT", W, W]} | shown
        panels.append(size_panel(args, shown, f"evaluated under window {W}"))
    return rows, {"grid": panels}


def log_odds(before, after, seed=0):
    """Two models' scores (P, R) for each training seed, on the same problems -> Estimate of the
    difference in log-odds: other than a difference of rates, it does not shrink near the ceiling.
    Rates are those with half a success and half a failure more, so that 0 and 1 stay finite."""
    def odds(means, n):
        p = (np.asarray(means) * n + 0.5) / (n + 1)
        return np.log(p / (1 - p))

    differences, observed = [], []
    for i, (a, b) in enumerate(zip(before, after)):
        n = np.size(a)
        differences.append(odds(resample(b, seed=seed + i, stream=1), n)
                           - odds(resample(a, seed=seed + i), n))
        observed.append(float(odds(np.mean(b), n) - odds(np.mean(a), n)))
    S, n = np.shape(differences)
    rng = np.random.default_rng([seed, 2])
    drawn = np.array(differences)[rng.integers(S, size=(n, S)), rng.integers(n, size=(n, S))]
    return Estimate(float(np.mean(observed)), *interval(drawn.mean(1)), sum(map(len, before)),
                    observed)


def windows(args):
    """SA and SWA after SFT and after RL, by window"""
    sizes = args.windows or [16, 20, 24, 32, None]
    found = run_grid(args, {size: partial(plan, args, window=size) for size in sizes})
    rows = [{"model": f"{'SWA' if size else 'SA'}-{stage.upper()}", "window": str(size or "full"),
             **cells(found[size], stage)} for size in sizes for stage in ("sft", "rl")]
    lines = {"kind": "line", "xlabel": "window, keys"}
    return rows, {"windows": [
        grouped("accuracy", rows, "window", "model", **lines),
        grouped("length", rows, "window", "model", "length", ylabel="tokens a response", **lines)]}


def strategies(args):
    """Ways from SA to SWA, before and after RL (ours: the paper's are unknown)"""
    plain = plan(args, args.seeds[0]).settings

    def way(label, **changes):
        def planned(seed):
            given = {name: f(seed) if callable(f) else f for name, f in changes.items()}
            return plan(args, seed, f"strategies/{label}", **{"full_layers": ()} | given)

        return {label: planned}

    table = way("none", start=lambda seed: policy(args, seed, "SA-SFT"))
    table |= {"direct": partial(plan, args, full_layers=())}
    table |= way("shrinking", window_from=4 * plain.window)
    sinks = max(1, plain.window // 6) if plain.tiny else 4
    table |= way(f"{sinks} sink{'s' * (sinks > 1)}", sinks=sinks)
    if plain.tiny:
        table |= way("kept prompt", sinks=plain.task.longest_prompt)
        table |= way("1 full layer", full_layers=(1,))
    hybrid = "2 full layers" if plain.tiny else "hybrid"
    table |= way(hybrid, full_layers=plain.full_layers or (1, 2))
    for kind in plain.task.other_solutions(0):
        table |= way(kind, rows=lambda seed, kind=kind: plain.task.other_solutions(seed)[kind])
    table |= {"SA": partial(plan, args, window=None, full_layers=())}
    found = run_grid(args, table)
    rows = []
    for label in found:
        for stage in ("sft", "rl"):
            row = {"strategy": label, "stage": f"after {stage.upper()}"}
            if plain.task.size:  # shorter problems' answers lie among the first tokens, too
                largest = by_size(args, [result[stage] for result in found[label]]).popitem()
                row[f"T=1, size {largest[0]}"] = largest[1]
            rows.append(row | cells(found[label], stage))
    return rows, {"strategies": [grouped("conversion strategies", rows, "strategy", "stage")]}


def budgets(args):
    """RL of SA and SWA for equal steps, and SWA's for the time that SA took, one run at a time"""
    run_grid(args, both_arms(args), run_sft)
    found, logs, hours = {}, {}, {}
    for label in ("SA, equal steps", "SWA, equal steps", "SWA, SA's time"):
        arm, budget = label.split(", ")

        def planned(seed, arm=arm, budget=budget):
            more = {"hours": hours[seed], "steps": 10**6} if budget == "SA's time" else {}
            start = policy(args, seed, f"{arm}-SFT")
            return plan(args, seed, f"budgets/{'time' if more else 'steps'}", start,
                        **BOTH[arm] | more)

        found |= run_grid(args, {label: planned}, workers=1)
        logs[label] = [read_log(planned(seed).settings.folder()) for seed in args.seeds]
        for seed, log in zip(args.seeds, logs[label]):
            hours.setdefault(seed, log[-1]["elapsed"] / 3600)
    last = {label: [log[-1] for log in logs[label]] for label in logs}
    rows = [{"run": label, "steps": mean_of(last[label], "step"),
             "seconds": mean_of(last[label], "elapsed"), **cells(found[label], "rl")}
            for label in found]
    panels = []
    for key, unit in (("step", "RL steps"), ("elapsed", "seconds of RL")):
        x = np.linspace(0, max(r[key] for label in logs for r in last[label]), 17)[1:]
        series = {}
        for label in list(logs)[:2]:
            each = [np.interp(x, [r[key] for r in log], [r["reward"] for r in log], right=np.nan)
                    for log in logs[label]]  # (seeds, 16)
            series[label.split(",")[0]] = [over_seeds([[[v]] for v in at if v == v], rate=False)
                                           for at in zip(*each)]
        panels.append(Panel("line", f"by {unit}", x.tolist(), series, unit,
                            "mean reward of a step"))
    return rows, {"budgets": panels}


def length_matched(a, b, bins=10):
    """Lengths of two sides -> indices into each, equally many of each bin of length."""
    edges = np.linspace(min(*a, *b), max(*a, *b) + 1, bins + 1)[1:-1]
    chosen = [], []
    for bin in range(bins):
        here = [np.flatnonzero(np.digitize(side, edges) == bin).tolist() for side in (a, b)]
        for mine, indices in zip(chosen, here):
            mine += indices[:min(map(len, here))]
    return chosen


def solved_by_both(args, seed):
    """Correct answers of SA-RL and SWA-RL to training problems -> {(pairing, teacher): rows}."""
    settings, by_teacher = plan(args, seed).settings, {}
    leave_out_long(policy(args, seed, "SA-RL"), settings)
    problems = settings.task.some(args.limit or 1200, seed)
    for teacher in BOTH:
        episodes = answers(policy(args, seed, f"{teacher}-RL"), problems, settings)
        by_teacher[teacher] = {
            i: {**p, "solution": e.text, "tokens": len(e.tokens)}
            for i, (p, e) in enumerate(zip(problems, episodes)) if e.reward}
    both = sorted(by_teacher["SA"].keys() & by_teacher["SWA"].keys())
    if not both:
        raise UsageError("no problem was solved by SA-RL and by SWA-RL: give more RL --steps")
    data = {("paired", t): [solved[i] for i in both] for t, solved in by_teacher.items()}
    rows = {t: list(solved.values()) for t, solved in by_teacher.items()}
    matched = length_matched(*([row["tokens"] for row in mine] for mine in rows.values()))
    for teacher, chosen in zip(rows, matched):
        data["length-matched", teacher] = [rows[teacher][i] for i in chosen]
    return data


def cross_sft(args):
    """Students of both architectures on correct trajectories of both policies (paper's Table 4)"""
    run_grid(args, both_arms(args))
    data = run_all(solved_by_both, [(args, seed) for seed in args.seeds], args.workers)
    data = dict(zip(args.seeds, data))
    few = plan(args, args.seeds[0]).settings.tiny and "--sft-steps" not in args.rest
    steps = {"sft_steps": 150} if few else {}  # few examples

    def student_of(pairing, teacher, student):
        def planned(seed):
            return plan(args, seed, f"cross-sft/{pairing}-{teacher}", rows=data[seed][pairing,
                        teacher], **steps | BOTH[student])

        return planned

    labels = [(pairing, teacher, student) for pairing, teacher in data[args.seeds[0]]
              for student in BOTH]
    found, rows = run_grid(args, {label: student_of(*label) for label in labels}, run_sft), []
    for pairing, teacher, student in labels:
        used = [row for mine in data.values() for row in mine[pairing, teacher]]
        rows.append({"problems": pairing, "trajectories": f"{teacher}-RL's", "student": student,
                     **cells(found[pairing, teacher, student], "sft"),
                     "examples": len(used) / len(data), "their length": mean_of(used, "tokens")})
    panels = []
    for pairing in ("paired", "length-matched"):
        mine = [row for row in rows if row["problems"] == pairing]
        panels.append(grouped(f"{pairing}, {mine[0]['examples']:.0f} examples", mine,
                              "trajectories", "student", xlabel="trained on"))
    return rows, {"cross-sft": panels}


def locality(args):
    """How much trajectories lean on what is beyond a window (our stand-in for Eq. 4)"""
    W = plan(args, args.seeds[0]).settings.window
    sizes = sorted({W, *(args.windows or [8, 12, 16, 20, 24, 32, 48])} - {None})
    run_grid(args, both_arms(args))
    tasks = [(policy(args, seed, label), reference_model(args, seed, reference),
              plan(args, seed).settings, sizes, args)
             for reference in args.references for label in POLICIES for seed in args.seeds]
    results = iter(run_all(trajectories_of, tasks, args.workers))
    found = {(reference, label): [next(results) for _ in args.seeds]
             for reference in args.references for label in POLICIES}
    first = args.references[0]

    def estimate(label, which, value, reference=first):
        groups = [[[value(t)] for t in trajectories if t.correct or which == "all"]
                  for trajectories in found[reference, label]]
        # A short answer has no token in some tenths
        return over_seeds([[[v] for v, in group if v == v] for group in groups],
                          rate=False)

    rows = [{"reference": reference, "policy": label, "trajectories": which,
             "KL a token": estimate(label, which, lambda t: t.kl[W], reference),
             "log-ratio a token": estimate(label, which, lambda t: t.log_ratio[W], reference),
             "KL a trajectory": estimate(label, which, lambda t: t.kl[W] * t.length, reference)}
            for reference in args.references for label in POLICIES for which in ("all", "correct")]
    by_window = {label: [estimate(label, "correct", lambda t, w=w: t.kl[w]) for w in sizes]
                 for label in POLICIES}
    along = {label: [estimate(label, "all", lambda t, i=i: t.tenths[i]) for i in range(10)]
             for label in POLICIES}
    kl, of_first = "KL, nats a token", [row for row in rows if row["reference"] == first]
    panels = [
        grouped(f"window {W}, reference {first}", of_first, "policy", "trajectories", "KL a token",
                ylabel=kl),
        Panel("line", "correct ones, by window", sizes, by_window, "window, tokens", kl),
        Panel("line", "along the response", list(range(5, 100, 10)), along, "% of the response",
              kl)]
    strips = {label: found[first, label] for label in POLICIES}
    return rows, {"locality": panels, "locality-tokens": example_strips(strips, W)}


def reference_model(args, seed, name):
    """The folder of a locality's reference: the base, or one of POLICIES."""
    return plan(args, seed).settings.base() if name == "base" else policy(args, seed, name)


def example_strips(found, W):
    """One problem that SA-RL and SWA-RL both solve, token by token; the shortest if it can be."""
    labels, kept = ("SA-RL", "SWA-RL"), []
    for pair in list(zip(*(found[label][0] for label in labels)))[:32]:
        if all(t.correct for t in pair):
            kept.append(pair)
    if not kept:
        return [Panel("strip", f"no problem was solved by {' and '.join(labels)}", [], {})]
    pair = min(kept, key=lambda pair: max(len(t.tokens) for t in pair) == 80)  # a whole one
    return [Panel("strip", f"one answer of {label}, window {W}", [text for text, _ in t.tokens],
                  {label: [kl for _, kl in t.tokens]}, "", "KL, nats")
            for label, t in zip(labels, pair)]


@dataclass
class Evidence:
    """How reach trains, and on how many examples a distance it is tested."""

    steps: int = 300  # of SFT
    rl_steps: int = 40
    batch: int = 32
    lr: float = 3e-3
    n: int = 500


FAMILIES = {"retrieval": 1, "multi-evidence": 3}  # how many facts the answer needs


def reach_example(rng, tokenizer, length, distance, facts=1, queries=0.0):
    """Letters with digits among them and `?` at the end, `distance` tokens after the first digit ->
    (tokens, targets).

    One fact: the answer is that digit. Several, each 0 or 1, at random places from the first on:
    the answer is how many are 1. It is asked for under the last `?`, and, with queries > 0, also
    under some after the last fact, which makes training fast.
    """
    letters, digits, (query,) = (  # one by one: a real tokenizer would merge them
        [tokenizer.encode(c)[0] for c in text] for text in ("abcdefghijkl", "0123456789", "?"))
    tokens, first = rng.choice(letters, length), length - 1 - distance
    others = rng.choice(np.arange(first + 1, length - 1), min(facts, distance) - 1, replace=False)
    at = np.array([first, *others])
    values = rng.integers(2 if facts > 1 else 10, size=len(at))
    asked = (np.arange(length) > at.max()) & (rng.random(length) < queries)
    asked[-1] = True
    tokens[asked], tokens[at] = query, np.array(digits)[values]
    return tokens.tolist(), np.where(asked, digits[values.sum()], -1).tolist()


def reach_run(folder, settings, config, distances, length, how, facts):
    """Trains on a family by SFT, then by GRPO on its outcome -> {"sft", "rl"}: scores (n, 1) at
    each distance. The tiny model starts from scratch, a real one from its checkpoint."""
    if settings.tiny:
        model = untrained(settings.tiny, settings.seed)
    else:
        model = Transformer.from_pretrained(settings.model, dtype=torch.float32)
    model.config = replace(model.config, window=settings.window, **config)
    tokenizer, device = Tokenizer(model.tokenizer_files), settings.start_device()
    trainer, found = Trainer(model, device, settings.micro_tokens), {}
    for stage, steps, step_of in (("sft", how.steps, evidence_sft), ("rl", how.rl_steps,
                                                                     evidence_rl)):
        run = Run(settings, folder / stage, {"stage": f"reach {stage}", "seed": settings.seed,
                                             "steps": steps})
        if run.finished(steps):
            weights = Transformer.from_pretrained(run.folder, device=device).state_dict()
            trainer.model.load_state_dict(weights)
        else:
            trainer.reset_optimizer()
            run.start(trainer)
            for step in run.steps(steps):
                rng = np.random.default_rng([settings.seed, 14, step])
                step_of(trainer, tokenizer, rng, step, length, settings, how, facts)
                run.log({}, f"{folder.name} {stage} step {step + 1}/{steps}", every=10)
            run.finish()
        found[stage] = [reach_scores(model, tokenizer, settings, d, length, how.n, facts)
                        for d in distances]
    return found


def evidence_sft(trainer, tokenizer, rng, step, length, settings, how, facts):
    rows = []
    for _ in range(how.batch):
        tokens, targets = reach_example(rng, tokenizer, length, rng.integers(1, length), facts, 0.3)
        rows.append({"tokens": tokens, "targets": targets})
    asked = sum(t >= 0 for row in rows for t in row["targets"])
    lr = schedule(step, how.steps, how.lr, how.steps // 10, "linear", decay_from=0.6)
    trainer.update(rows, lambda logprobs, _: -logprobs.sum() / asked, lr)


def evidence_rl(trainer, tokenizer, rng, step, length, settings, how, facts, group=8):
    """A step of GRPO whose answers are one token, sampled at T=1."""
    examples = [reach_example(rng, tokenizer, length, rng.integers(1, length), facts)
                for _ in range(how.batch // 2)]
    tokens, targets = torch.tensor(examples, device=trainer.device).unbind(1)  # (P, T)
    with torch.no_grad():
        logprobs = log_softmax(trainer.model.logits(trainer.model.states(tokens)[:, -1]))
    generator = torch.Generator(trainer.device).manual_seed(int(rng.integers(2**62)))
    answers = torch.multinomial(logprobs.exp(), group, True, generator=generator)  # (P, G)
    rewards = (answers == targets[:, -1:]).float()
    advantages = rl.advantages_of(rewards, settings)
    rows = [make_row(prompt, [answer], advantage=[a], mask=[1.0],
                     rollout_logprobs=[logprobs[i, answer].item()])
            for i, prompt in enumerate(tokens.tolist())
            for answer, a in zip(answers[i].tolist(), advantages[i].tolist()) if a]
    if rows:
        rl.update_policy(trainer, rows, rewards.numel(), how.lr / 10, settings,
                         {"logp_gap": 0.0, "tokens": 0.0})


@torch.no_grad()
def reach_scores(model, tokenizer, settings, distance, length, n, facts):
    """Whether the most probable answer is right: (n, 1)."""
    rng, scores = np.random.default_rng([settings.seed, 15, distance]), []
    examples = [reach_example(rng, tokenizer, length, distance, facts) for _ in range(n)]
    for part in torch.tensor(examples, device=model.device).split(100):
        tokens, targets = part.unbind(1)  # (n, T) each
        guess = model.logits(model.states(tokens)[:, -1]).argmax(-1)
        scores += (guess == targets[:, -1]).int()[:, None].tolist()
    return scores


def reach(args):
    """Facts at a chosen distance, by SFT and then by GRPO: beyond layers x (window - 1), pure SWA
    must fail"""
    config, W = config_of(args.model[0]), 16 if args.window == "own" else args.window
    layers, limit = config.num_hidden_layers, config.max_position_embeddings
    if W is None or W < 3 or layers * (W - 1) + 35 > limit:
        raise UsageError(f"--analysis reach asks for facts beyond {layers} layers x (window - 1): "
                         f"give a --window from 3 to {(limit - 35) // layers + 1}")
    far, middle = layers * (W - 1), layers // 2
    length, sinks = far + 35, 4
    distances = sorted({W // 2, W - 1, W, 2 * (W - 1), far - 2, far, far + 1, far + 10, far + 30,
                        far + 32})  # the last among the first tokens, which sinks keep
    one = {"full_layers": (middle,)}
    kinds = {"SA": {}, "SWA": {}, f"{sinks} sinks": {"sinks": sinks},
             f"hybrid, layer {middle} full": one,
             f"layer {middle} full, NoPE": one | {"nope_full": True}}
    runs, tasks = plan(args, 0).settings.folder().parent / "analysis" / "runs" / "reach", []
    how = Evidence()
    for family, facts in FAMILIES.items():
        for label, changes in kinds.items():
            for seed in args.seeds:
                settings = plan(args, seed, window=None if label == "SA" else W).settings
                if not settings.tiny:  # stage 1's own settings
                    sft = settings.stage1
                    how = Evidence(sft.steps, settings.steps, sft.batch, sft.lr, sft.eval_examples)
                folder = runs / f"{family}-{label.replace(', ', '-').replace(' ', '-')}-w{W}-{seed}"
                tasks.append((folder, settings, changes, distances, length, how, facts))
    done, rows, panels = iter(run_all(reach_run, tasks, args.workers)), [], []
    where = {d: "window" if d < W else "reach" if d <= far else
             "sinks" if d >= length - sinks else "beyond" for d in distances}
    for family in FAMILIES:
        found = {label: [next(done) for _ in args.seeds] for label in kinds}
        series = {}
        for stage in ("sft", "rl"):
            lines = {label: [over_seeds(scores) for scores in zip(*(r[stage] for r in results))]
                     for label, results in found.items()}
            series |= {label: line for label, line in lines.items() if stage == "rl"}
            rows += [{"family": family, "stage": f"after {stage.upper()}", "distance": d,
                      "where": where[d],
                      **{label: lines[label][i] for label in lines}}
                     for i, d in enumerate(distances)]
        panels.append(Panel("line", f"{family}, after RL", distances, series,
                            "distance of the first fact, tokens", "accuracy",
                            {W - 1: "window - 1", far: f"{layers} x (window - 1)"}))
    return rows, {"reach": panels}


ANALYSES = {"recipe": recipe, "arms": arms, "dose": dose, "grid": grid, "locality": locality,
            "cross-sft": cross_sft, "windows": windows, "strategies": strategies,
            "budgets": budgets, "reach": reach}


def analyse(args):
    """Runs an analysis and writes <out>/<model>/analysis/<name>: .md, .json, .png."""
    planned = [plan(args, seed).settings for seed in args.seeds]
    if args.analysis == "dose" and planned[0].model != "tiny":
        raise UsageError("--analysis dose is about the restatements of --model tiny: give that")
    if args.analysis != "reach" and planned[0].window is None:
        raise UsageError(f"--analysis {args.analysis} sets SWA against SA: give --window a number "
                         "of keys")
    if planned[0].tiny and args.analysis != "reach":
        run_all(pretrain, [(settings,) for settings in planned], args.workers)
    rows, pictures = ANALYSES[args.analysis](args)
    seeds = f"seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}"
    title = f"{' '.join(ANALYSES[args.analysis].__doc__.split())}; {seeds}."
    home = plan(args, 0).settings.folder().parent
    write_report(home / "analysis", args.analysis, title, rows, pictures, args,
                 f"{home.name}, {seeds}")


# --------------------------------------------------------------------------------------------------
# reports and pictures


@dataclass
class Panel:
    """A picture's part; a series has a number or an Estimate for each x."""

    kind: str  # bar, line, or strip: tokens with a bar each
    title: str
    x: list
    series: dict  # label: values
    xlabel: str = ""
    ylabel: str = ""
    marks: dict = field(default_factory=dict)  # {x: text} of vertical lines
    level: float | None = None  # of a horizontal line


def grouped(title, rows, group, by, what="T=1", kind="bar", xlabel="", ylabel=None):
    """A panel out of table rows: a place for each row[group], a series for each row[by]."""
    value = {(row[group], row[by]): row[what] for row in rows}
    x, labels = (list(dict.fromkeys(key[i] for key in value)) for i in (0, 1))
    series = {label: [value.get((at, label)) for at in x] for label in labels}
    return Panel(kind, title, x, series, xlabel, ylabel or f"accuracy, {what}")


def write_report(folder, name, title, rows, pictures, args, seeds=""):
    """Rows (dicts) and pictures {file: panels} -> Markdown, JSON and PNG; prints the table.
    seeds: what a picture's caption says of them."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    caption = (f"{title} {count(value for row in rows for value in row.values())}: bootstrap over "
               f"seeds, problems and repeats. `{command}`").lstrip()
    table = "\n".join([*markdown(rows, shown), "", caption, ""])
    record = {"title": title, "command": command, "rows": rows,
              **describe_machine(pick_device(args.device))}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.md", lambda f: f.write_text(table))
    text = json.dumps(record, indent=1, default=asdict)
    write_file(folder / f"{name}.json", lambda f: f.write_text(text))
    for file, panels in pictures.items():
        draw(folder / f"{file}.png", panels, seeds)
    print(f"\n{table}\n{folder / name}.md, .json and {', '.join(f'{p}.png' for p in pictures)}")


def shown(value):
    """A table's cell as text."""
    if isinstance(value, Estimate):
        digits = 3 if abs(value.mean) < 10 else 1
        return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def count(values):
    """The n of estimates: `n = 512`."""
    n = sorted({value.n for value in values if isinstance(value, Estimate) and value.n})
    if not n:
        return ""
    return f"n = {n[0]}{f' to {n[-1]}' if len(n) > 1 else ''}, 95 % intervals"


OTHERS = ["#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#000000"]


def draw(path, panels, seeds=""):
    """Bars or lines side by side, or strips of tokens one above another; 800 points wide."""
    strips = panels[0].kind == "strip"
    if strips:
        figure = new_figure(8, 1.7 * len(panels), layout="constrained")
        axes = [*figure.subplots(len(panels), 1, squeeze=False, sharey=True).flat]
    else:
        figure = new_figure(8, 3.6, layout="constrained")
        axes = [*figure.subplots(1, len(panels), squeeze=False).flat]
    for axis, panel in zip(axes, panels):
        {"bar": draw_bars, "line": draw_lines, "strip": draw_strip}[panel.kind](axis, panel)
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=(0, None))
        if panel.level is not None:
            axis.axhline(panel.level, color="black", lw=1, ls=":")
        axis.set_title(panel.title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if not strips:
        draw_legend(figure, axes, panels)
    values = [value for panel in panels for line in panel.series.values() for value in line]
    caption = ", ".join(filter(None, [seeds, count(values)]))
    figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color="gray")
    save_figure(figure, path, dpi=200)


def draw_legend(figure, axes, panels):
    """One for all panels where they show the same series, else one each."""
    labels = [list(panel.series) for panel in panels]
    if len(labels[0]) > 1 and all(mine == labels[0] for mine in labels):
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)),
                      frameon=False, fontsize=9)
    else:
        for axis in axes:
            axis.legend(fontsize=8, frameon=False)


def color_of(label, i):
    own = [color for name, color in COLORS.items() if label.startswith(name)]
    return own[0] if own else OTHERS[i]


def means_and_errors(values):
    """Numbers, Estimates or None -> means (n,) and the lengths of the error bars (2, n)."""
    values = [math.nan if value is None else value for value in values]
    spans = [(v.mean, v.low, v.high) if isinstance(v, Estimate) else (v, v, v) for v in values]
    mean, low, high = np.array(spans, float).T
    return mean, np.abs(np.stack((mean - low, high - mean)))


def dot_seeds(axis, at, values):
    """Each training seed a dot."""
    for x, value in zip(at, values):
        if isinstance(value, Estimate) and len(value.seeds) > 1:
            axis.plot([x] * len(value.seeds), value.seeds, "k.", ms=3, alpha=0.5)


def draw_bars(axis, panel):
    at, width = np.arange(len(panel.x)), 0.8 / len(panel.series)
    for i, (label, values) in enumerate(panel.series.items()):
        mean, error = means_and_errors(values)
        shifted = at + (i + 0.5) * width - 0.4
        axis.bar(shifted, mean, 0.94 * width, yerr=error, capsize=2, color=color_of(label, i),
                 label=label)
        dot_seeds(axis, shifted, values)
    axis.set_xticks(at, [str(x).replace(", ", ",\n") for x in panel.x])
    axis.tick_params(labelsize=8)


def draw_lines(axis, panel):
    names, few = isinstance(panel.x[-1], str), len(panel.x) < 20
    at = np.arange(len(panel.x)) if names else np.array(panel.x, float)
    for i, (label, values) in enumerate(panel.series.items()):
        mean, error = means_and_errors(values)
        look = {"lw": 1.5, "ms": 5}
        if label == "SA" and few:
            look = {"lw": 4, "ms": 8}  # beneath the others
        if "SFT" in label:
            look |= {"ls": "--", "mfc": "white", "ms": 8}
        axis.errorbar(at, mean, error if few else None, marker="o" if few else None, capsize=2,
                      color=color_of(label, i), label=label, **look)
        dot_seeds(axis, at, values)
    if names:
        axis.set_xticks(at, panel.x)
    axis.xaxis.get_major_locator().set_params(**{} if names else {"integer": True})
    for x, text in panel.marks.items():
        axis.axvline(x + 0.5, color="gray", lw=0.8, ls=":")
        axis.text(x + 0.3, 0.05, text, rotation=90, ha="right", color="gray", fontsize=8)
    axis.tick_params(labelsize=8)


def draw_strip(axis, panel):
    at = np.arange(len(panel.x))
    for i, (label, values) in enumerate(panel.series.items()):
        axis.bar(at, values, 0.75, color=color_of(label, i), label=label)
    names = {"<eos>": "eos", "\\boxed{": "box"}
    axis.set_xticks(at, [names.get(x, x) for x in panel.x], fontsize=6)
    axis.margins(x=0.01)


# --------------------------------------------------------------------------------------------------
# the audit: whether each layer honours the window that its folder declares

BEYOND = 4  # tokens beyond the last one's window
DECODED = 8  # tokens, so that the window fills up on the way


def audit(args):
    """Prints what the last token sees in each layer, in prefill and in decode, here and in
    transformers; exit code 1 where that is not what the folder declares.

    A whole model's outputs show no more than its total reach, layers x (window - 1). So every layer
    is given states of its own: random ones, then the same with some tokens changed.
    """
    folder = resolve(args.audit, MODEL_FILES)
    config = read_config(folder)
    x, changed = audit_states(config, pick_device(args.device), args.seed)
    sinks = f" + {config.sinks} sinks" if config.sinks else ""
    rows = [{"window": f"{w}{sinks}" if w else "full"} for w in config.windows]
    T = x.shape[1]
    for name, run in (("nanoSWARR", run_here), ("transformers", run_transformers)):
        layers, forward = run(folder, x)
        for phase, prompt in (("prefill", T), ("decode", max(1, T - DECODED))) if layers else ():
            print(f"{name}, {phase}: {len(layers)} layers, {len(x)} x {T:,} tokens", flush=True)
            found = told_apart(layers, forward, x, [0, *range(prompt, T + 1)])
            for row, window, seen in zip(rows, config.windows, found, strict=True):
                due = [window is None] + [True] * (len(changed) - 1)
                row[f"{name} {phase}"] = ", ".join(
                    f"{'sees' if saw else 'misses'} {what}"
                    for what, saw, must in zip(changed, seen, due) if saw != must) or "ok"
    table = []
    for row, alike in groupby(range(len(rows)), rows.__getitem__):
        first, *others = alike
        table.append({"layer": f"{first}-{others[-1]}" if others else str(first)} | row)
    print("\n" + "\n".join(markdown(table)))
    lost = [f"layer {row['layer']} in {where}: {found}" for row in table
            for where, found in row.items() if found.startswith(("sees", "misses"))]
    if lost:
        sys.exit("not as declared: " + "; ".join(lost))


def audit_states(config, device, seed):
    """-> x (rows, T, C), equal but for what is changed in all rows after the first; and {what: at}.

    Changed are all tokens beyond the last one's window, the oldest inside, and the last sink. A
    full layer, too, is asked at these places: it must see them all.
    """
    W, sinks = config.window or 512, config.sinks
    changed = {f"{W}+ back": slice(sinks, sinks + BEYOND), f"{W - 1} back": sinks + BEYOND}
    if sinks:
        changed[f"sink {sinks - 1}"] = sinks - 1
    # A faint token shows in float64; the kernels, which have none, run on a GPU
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    torch.manual_seed(seed)
    x = torch.randn(sinks + W + BEYOND, config.hidden_size, device=device, dtype=dtype)
    x = x.repeat(1 + len(changed), 1, 1)
    for row, at in zip(x[1:], changed.values()):
        row[at] = torch.randn_like(row[at])
    return x, changed


@torch.no_grad()
def told_apart(layers, forward, x, cuts):
    """forward(start, end) from cut to cut for each row, each layer fed with x (rows, T, C) in place
    of what the layer before it says -> [layer][row after the first]: whether its attention answers
    the last token otherwise than in the first row."""
    def feed(layer, args):
        return row[None, start:end], *args[1:]

    def keep(attention, args, output):
        output = output[0] if isinstance(output, tuple) else output
        answers.append(output[0, -1].clone())  # a view would keep all of it

    hooks = [hook for layer in layers for hook in (
        layer.register_forward_pre_hook(feed), layer.self_attn.register_forward_hook(keep))]
    rows = []
    # One by one: in a batch equal rows may be rounded differently
    for row in x:  # noqa: B007  (feed reads it)
        for start, end in zip(cuts, cuts[1:]):
            answers = []
            forward(start, end)
        rows.append(answers)
    for hook in hooks:
        hook.remove()
    return [[not other.equal(first) for other in others] for first, *others in zip(*rows)]


def attention_only(model, x):
    """Its layers, ready for x; what lies behind the attention is not asked, and takes most of the
    time and the memory."""
    for layer in model.layers:
        layer.mlp = torch.nn.Identity()
    return model.to(x.device, x.dtype).layers


def run_here(folder, x):
    """-> the layers, and forward(start, end): one sequence's tokens, as generation runs them."""
    model = Transformer.from_pretrained(folder)
    layers, cache = attention_only(model.model, x), None

    def forward(start, end):
        nonlocal cache
        if start == 0:
            cache = Cache(model.config, 1, x.shape[1], x.device, x.dtype)
            attend, position = cache.prefill([0], [end])
        else:
            position = torch.tensor([[start]], device=x.device)
            attend = cache.decode(position[0])
        model.hidden(torch.zeros_like(position), position, attend)

    return layers, forward


def run_transformers(folder, x):
    """The same with transformers' own masks and cache; no layers where it does not open it."""
    try:
        from transformers import AutoModelForCausalLM  # not among the requirements

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model
    except (ImportError, OSError, ValueError) as error:
        print(f"transformers is left out: {str(error).splitlines()[0]}", flush=True)
        return [], None
    layers, past = attention_only(model, x), None

    def forward(start, end):
        nonlocal past
        tokens = torch.zeros(1, end - start, dtype=torch.long, device=x.device)
        said = model(tokens, past_key_values=past if start else None, use_cache=True)
        past = said.past_key_values

    return layers, forward


# --------------------------------------------------------------------------------------------------
# the page: assets/explain.html runs miniatures in a browser

PAGE = Path(__file__).parent / "assets" / "explain.html"
DATA_BLOCK = re.compile(r'(?<=<script type="application/json" id="data">\n).*?(?=\n</script>)',
                        re.S)
EPISODE = re.compile(r"--- step (\d+) \| reward (\S+) .*\n(.*)\n>>> (.*)\n")  # rl.py's as_text


def write_page(folders, page=PAGE):
    """Runs of tiny tasks, in their order -> the page's block of data; all else in it stays."""
    html, tasks, seeds = page.read_text("utf-8"), {}, set()
    if not DATA_BLOCK.search(html):
        raise UsageError(f"{page} has lost its block of data: fetch the file again")
    for folder in map(Path, folders):
        run = read_finished(folder)[2] if (folder / "run.json").exists() else {}
        if run.get("data") not in TASKS:
            raise UsageError(f"{folder} is no SFT or RL run of a tiny task: give folders such as "
                             "out/tiny/sft-w24 and out/tiny/rl-w24")
        settings = RLSettings.of(model="tiny", **{k: run[k] for k in ("data", "window", "seed")})
        model = Transformer.from_pretrained(folder)
        if model.config.sinks or model.config.nope_full:
            raise UsageError(f"{folder}: the page's model has no sinks and no layers without RoPE, "
                             "give another run")
        tokenizer = Tokenizer(model.tokenizer_files)
        task = tasks.setdefault(run["data"], {
            "name": run["data"], "start": as_prompt(tokenizer, "", ""),
            "examples": [*dict.fromkeys(
                p["problem"] for p in settings.task.validation(60, run["seed"]))],
            "vocabulary": [tokenizer.decode([i], False) for i in range(tokenizer.n_ids)],
            "stop": sorted(tokenizer.stop_ids), "most": settings.max_new_tokens, "models": []})
        task["models"].append(as_data(folder, model, settings, run["stage"]))
        seeds.add(run["seed"])
    data = {"command": shlex.join(["python", "eval.py", "--page", *map(str, folders)]),
            "seeds": sorted(seeds), "tasks": list(tasks.values())}
    data = json.dumps(data, ensure_ascii=False).replace("</", r"<\/")  # no end of the script
    write_file(page, lambda f: f.write_text(DATA_BLOCK.sub(lambda _: data, html), "utf-8"))
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")


def as_data(folder, model, settings, stage):
    """A run as the page needs it: weights of 8 bits, accuracy before and after, the log of RL."""
    accuracy = {"before": validate(folder, settings)}
    shapes, scales, entries = [], b"", b""
    for name, weight in model.state_dict().items():
        rows = weight.view(len(weight), -1)  # a norm's weights are rows of one
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        entry = (rows / scale).round()
        weight.copy_((entry * scale).view_as(weight))
        shapes.append([name, *rows.shape])
        scales += scale.numpy().tobytes()
        entries += entry.to(torch.int8).numpy().tobytes()
    with tempfile.TemporaryDirectory() as rounded:
        model.save_pretrained(rounded)
        accuracy["after"] = validate(Path(rounded), settings)
    episodes = folder / "episodes.txt"
    episodes = EPISODE.findall(episodes.read_text("utf-8")) if episodes.exists() else []
    return {"label": f"{'SWA' if settings.window else 'SA'}-{stage.upper()}", "stage": stage,
            "window": settings.window, "accuracy": {
                how: {"n": np.size(accuracy["after"][how]["scores"])} | {
                    when: np.mean(found[how]["scores"]) for when, found in accuracy.items()}
                for how in SAMPLINGS},
            "steps": [{key: round(record[key], 4) for key in ("step", "reward", "length")}
                      for record in read_log(folder) if "reward" in record],
            "episodes": [{"step": int(step), "reward": float(reward), "problem": problem,
                          "answer": answer} for step, reward, problem, answer in episodes],
            "config": asdict(model.config), "shapes": shapes,
            "scales": base64.b64encode(scales).decode(),
            "entries": base64.b64encode(entries).decode()}


# --------------------------------------------------------------------------------------------------
# the command


def load(name, args):
    """-> (model, tokenizer), with --window in place of the model's own."""
    window = "config" if args.window == "own" else args.window
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    model = Transformer.from_pretrained(name, window=window, device=device, dtype=dtype)
    if model.config.hidden_size <= 64:
        torch.set_num_threads(1)  # tiny matrices gain nothing from more
    return model, Tokenizer(model.tokenizer_files)


def benchmark(args):
    """Every model on every benchmark -> the table, with differences to the first model."""
    names, found = [name for name in args.benchmarks.split(",") if name], {}
    problems = {name: load_benchmark(name, args.seed)[:args.limit] for name in names}
    for path in args.model:
        model, tokenizer = load(path, args)
        parts = (Path(path).resolve() if Path(path).exists() else Path(path)).parts[-2:]
        label = "/".join(parts)
        if args.window != "own":
            label += f"@w{args.window or 'full'}"
        for name in names:
            own = sampling_of(args, name, problems[name], model, tokenizer)
            keys = ("samples", "temperature", "top_p", "max_new_tokens", "instruction", "seed",
                    "chunk")
            settings = {"model": path, "weights": fingerprint(resolve(path, MODEL_FILES)),
                        "window": model.config.window, "benchmark": name,
                        **{key: getattr(own, key) for key in keys}}
            file = Path(args.out) / "eval" / label / f"{Path(name).stem}.jsonl"
            found[label, name] = answer_benchmark(
                model, tokenizer, problems[name], file, settings, own)
    rows = compare(found, names, f"avg@{args.samples}")
    first = rows[0]["model"]
    several = any(row["model"] != first for row in rows)
    title = f"Difference and p: paired bootstrap against {first}." if several else ""
    panel = grouped("", rows, "benchmark", "model", f"avg@{args.samples}", ylabel="accuracy")
    # Named after what was compared: no earlier table is overwritten
    compared = [*dict.fromkeys(label.replace("/", ".") for label, _ in found)]
    how = [args.model, names, args.samples, args.temperature, args.top_p, args.max_new_tokens,
           args.instruction, args.window, args.limit, args.seed]
    name = "-".join([*(Path(name).stem for name in names), *compared])[:80]
    name += f"-{hashlib.sha256(repr(how).encode()).hexdigest()[:6]}"
    write_report(Path(args.out) / "eval", name, title, rows, {name: [panel]}, args)


def sampling_of(args, name, problems, model, tokenizer):
    """The flags, with what they leave open: the instruction, the length and the task."""
    own = argparse.Namespace(**vars(args))
    own.task = TASKS.get(name) or Problems(name)
    if args.instruction is None:
        own.instruction = "" if name in TASKS else INSTRUCTION
    longest = max(len(as_prompt(tokenizer, p["problem"], own.instruction)) for p in problems)
    free = min(32768, model.config.max_position_embeddings - longest)
    own.max_new_tokens = args.max_new_tokens or free
    return own


def compare(found, names, average):
    """{(model, benchmark): records} -> rows: each benchmark, then the average of all."""
    scores = {key: scores_of(records) for key, records in found.items()}
    labels, rows = list(dict.fromkeys(label for label, _ in found)), []
    for chosen in [[name] for name in names] + ([names] if len(names) > 1 else []):
        for label in labels:
            first, mine = ([scores[key, name] for name in chosen] for key in (labels[0], label))
            n = sum(map(len, mine))
            if len(chosen) == 1:
                row = {"benchmark": Path(chosen[0]).stem, "model": label,
                       **measure(found[label, chosen[0]])}
            else:
                *mean, _ = paired_bootstrap([0 * x for x in mine], mine)
                row = {"benchmark": "average", "model": label, average: Estimate(*mean, n)}
            if label != labels[0]:
                *mean, p = paired_bootstrap(first, mine)
                row |= {"difference": Estimate(*mean, n), "p": p}
            rows.append(row)
    return rows


def references(text):
    names = text.split(",")
    for name in names:
        if name not in ("base", *POLICIES):
            raise argparse.ArgumentTypeError(f"{name!r} is not one of base, {', '.join(POLICIES)}")
    return names


def parser():
    p = FlagParser(description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog=(
        "With --analysis, rl.py's flags (--steps, --data, ...) are understood too."))

    def add(flag, text, default=None, kind=None, **more):
        text += f" (default: {default})" if default is not None else ""
        p.add_argument(flag, type=kind or type(default if default is not None else ""),
                       default=default, help=text, **more)

    # what to do
    p.add_argument("--model", nargs="+", default=[], help="folders or hub ids of models; with "
                   "--analysis tiny, or a base model")
    names = ", ".join([*TASKS, *BENCHMARKS])
    add("--benchmarks", f"names with commas out of {names}, or JSONL files")
    add("--prompt", "stream one answer to this")
    add("--regrade", "grade this file of generations again, without a model")
    add("--analysis", "run one of the paper's analyses", choices=ANALYSES)
    add("--audit", "whether each layer of this folder honours its window, here and in transformers")
    p.add_argument("--page", nargs="+", metavar="FOLDER", help="put these runs of tiny tasks into "
                   "assets/explain.html, to be seen in a browser")
    # sampling
    add("--samples", "answers to each problem", 1)
    add("--temperature", "0: greedy; DeepSeek-R1's distillations ask for 0.6", 1.0)
    add("--top-p", "1: no truncation; DeepSeek-R1's distillations ask for 0.95", 1.0)
    add("--max-new-tokens", "tokens of an answer (default: what the positions leave, up to 32768)",
        kind=int)
    add("--instruction", "appended to each problem (default: to box the answer; none for tiny and "
        "--prompt)")
    p.add_argument("--window", default="own",
                   type=own_or_window,
                   help="in place of the model's own: keys, or full")
    add("--limit", "use the first so many problems", kind=int)
    add("--chunk", "problems between two writes: an interruption loses at most these", 64)
    # analyses
    add("--seeds", "training seeds, such as 0,1,2", [0], lambda s: [int(x) for x in s.split(",")])
    add("--windows", "the windows of a curve, such as 16,24,full",
        kind=lambda s: [window_arg(x) for x in s.split(",")])
    add("--references", "locality: under which models, out of base and "
        f"{', '.join(POLICIES)}", ["SA-SFT"], references)
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
    tasks = [task for task in ("benchmarks", "prompt", "regrade", "analysis", "audit", "page")
             if getattr(args, task) is not None]
    if len(tasks) != 1:
        raise UsageError("give one of --benchmarks, --prompt, --regrade, --analysis, --audit, "
                         "--page (see --help)")
    if rest and not args.analysis:
        raise UsageError(f"unknown arguments {' '.join(rest)} (see --help)")
    if args.audit is not None:
        return audit(args)
    if args.page:
        return write_page(args.page)
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
    if args.analysis:
        analyse(args)
    else:
        benchmark(args)


if __name__ == "__main__":
    cli(main)
