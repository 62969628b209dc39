"""Statistics, benchmarks, locality, analyses: against enumeration, simulation, double loops."""

import itertools
import json
import math
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_model
import test_train
import torch

import eval as evaluation
import model as nano
import rl
from convert_sft import INSTRUCTION, TASKS, RunningSums, Trainer, untrained
from eval import (
    Evidence,
    answer_benchmark,
    bootstrap_ci,
    information_gap,
    length_matched,
    load_benchmark,
    majority,
    measure,
    over_seeds,
    paired_bootstrap,
    pass_at_k,
    reach_example,
    read_generations,
    token_gaps,
)
from model import ModelConfig, Rollout, Tokenizer, Transformer, UsageError
from rl import Episode

TINY = TASKS["tiny"]

# ------------------------------------------------------------------------------------- statistics


def beta_scores(rng, problems, repeats, a=1.0, b=1.0):
    """Right or wrong answers to problems of random difficulty."""
    return (rng.random((problems, repeats)) < rng.beta(a, b, (problems, 1))).astype(float)


def test_bootstrap_known_case():
    assert bootstrap_ci(np.ones((5, 3))) == (1, pytest.approx(0.05 ** (1 / 5)), 1)  # 0.55
    half = np.arange(400).reshape(-1, 1) % 2  # the mean of 400 coins: +- 1.96 * 0.5 / 20
    mean, low, high = bootstrap_ci(half)
    assert mean == 0.5 and abs(low - 0.451) < 0.006 and abs(high - 0.549) < 0.006
    mean, low, high = bootstrap_ci(half, level=0.5)  # 0.6745 standard deviations
    assert abs(low - 0.4831) < 0.004 and abs(high - 0.5169) < 0.004
    _, low, high = bootstrap_ci(np.tile([0, 1], (10, 200)))  # one difficulty: only repeats vary
    assert 0.47 < low < 0.5 < high < 0.53
    assert bootstrap_ci(half, seed=1) == bootstrap_ci(half, seed=1) != bootstrap_ci(half, seed=2)


@pytest.mark.parametrize("problems, repeats", [(30, 8), (100, 1), (60, 4)])
def test_bootstrap_coverage(problems, repeats):
    """About 95 % of intervals hold the truth; resampling repeats too errs on the wide side."""
    rng = np.random.default_rng(problems)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap_ci(beta_scores(rng, problems, repeats, 2, 1))
        hits += low <= 2 / 3 <= high
    assert 0.91 <= hits / 200 <= 0.99


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.3, 0.3, (200, 1))
    a = (rng.random((200, 4)) < difficulty).astype(float)
    b = (rng.random((200, 4)) < np.clip(difficulty + 0.05, 0, 1)).astype(float)
    d, low, high, p = paired_bootstrap(a, b)
    assert d == pytest.approx(b.mean() - a.mean()) and low < d < high and p < 0.05
    minus = paired_bootstrap(b, a)
    assert minus[0] == -d and minus[3] < 0.05
    one, other = bootstrap_ci(a), bootstrap_ci(b)
    apart = math.hypot(one[2] - one[1], other[2] - other[1])  # were the problems not the same
    assert high - low < 0.6 * apart
    assert paired_bootstrap(a, a)[0] == 0 and paired_bootstrap(a, a)[3] == 1
    assert paired_bootstrap(np.zeros((50, 1)), np.ones((50, 1)))[3] < 0.001
    two = paired_bootstrap([a, np.zeros((7, 2))], [b, np.ones((7, 3))])
    assert two[0] == pytest.approx((d + 1) / 2)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap(a, b[:-1])


def test_paired_p_values_under_the_null():
    rng, p = np.random.default_rng(1), []
    for _ in range(150):
        difficulty = rng.random((60, 1))
        a, b = ((rng.random((60, 4)) < difficulty).astype(float) for _ in "ab")
        p.append(paired_bootstrap(a, b)[3])
    assert np.mean(np.array(p) < 0.05) < 0.08 and 0.4 < np.mean(p) < 0.65


def test_over_seeds():
    scores = beta_scores(np.random.default_rng(2), 100, 2)
    one = over_seeds([scores])
    assert one.mean == scores.mean() and one.n == 100 and one.seeds == [scores.mean()]
    _, low, high = bootstrap_ci(scores)
    assert abs(one.low - low) < 0.02 and abs(one.high - high) < 0.02
    apart = over_seeds([np.full((50, 1), x) for x in (0.2, 0.5, 0.8)])  # only the seeds differ
    assert apart.mean == pytest.approx(0.5) and apart.low < 0.35 and apart.high > 0.65


def test_a_caption_counts_what_was_measured():
    three, none, nine = (over_seeds([np.ones((n, 1))]) for n in (3, 0, 9))
    values = three, none, "a name", nine
    assert evaluation.count(values) == "n = 3 to 9, 95 % intervals"
    assert evaluation.count(values[1:3]) == ""


def test_pass_at_k_is_the_average_over_subsets():
    for n in range(1, 7):
        for right in itertools.product([0, 1], repeat=n):
            for k in range(1, n + 1):
                subsets = [max(s) for s in itertools.combinations(right, k)]
                assert pass_at_k(sum(right), n, k) == pytest.approx(np.mean(subsets))


def test_measure(tmp_path):
    records = [
        {
            "problem": "",
            "answer": "1",
            "responses": [f"\\boxed{{{x}}}" for x in row],
            "finished": [True] * 4,
            "lengths": [3, 5, 7, 9],
        }
        for row in ("1111", "1122", "2221")
    ]
    records[2]["finished"][3] = False
    evaluation.write_generations(tmp_path / "x.jsonl", {}, records)
    evaluation.regrade(tmp_path / "x.jsonl")
    _, records = read_generations(tmp_path / "x.jsonl")
    assert records[2]["verdicts"][3] == "truncated"
    row = measure(records)
    assert [round(row[key].mean, 4) for key in ("avg@4", "pass@2", "pass@4", "maj@4")] == [
        0.5,
        0.6111,
        0.6667,
        0.5,
    ]
    assert (row["truncated"], row["length"], row["n"]) == (pytest.approx(1 / 12), 6, 3)
    single = measure(
        [{**r, "responses": r["responses"][:1], "verdicts": r["verdicts"][:1]} for r in records]
    )
    assert "avg@1" in single and not any(key.startswith(("pass", "maj")) for key in single)


VOTES = {  # answers, with a ~ where cut off -> maj@k for the gold 0.5
    "0.5 0.5 3": 1,
    "3 3 0.5": 0,
    "0.5 3": 0.5,
    "3 0.5 4 4": 0,
    "0.50 0.5 3 4": 1,
    "0.5 3 4": 1 / 3,
    "~0.5 ~0.5 3": 0,
    "~3 ~3 0.5": 1,
    "": 0,
    "? ? 0.5": 1,
    "?": 0,
}


@pytest.mark.parametrize("answers, expected", VOTES.items())
def test_majority(answers, expected):
    responses = [
        "no answer" if a == "?" else f"so \\boxed{{{a.strip('~')}}}" for a in answers.split()
    ]
    verdicts = [
        "truncated" if "~" in a else "correct" if a in ("0.5", "0.50") else "wrong"
        for a in answers.split()
    ]
    assert majority(responses, verdicts) == pytest.approx(expected)


# ------------------------------------------------------------------------------------- benchmarks

HUB_ROWS = {  # a row in the hub's shape: the problem and the answer to make of it
    "gsm8k": ({"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}, "2+2?", "1,004"),
    "math500": (
        {
            "problem": "P",
            "solution": "so \\boxed{x}",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "test/1.json",
        },
        "P",
        "\\frac{1}{2}",
    ),
    "aime24": (
        {"id": 60, "problem": "P", "solution": "S", "answer": "204", "url": "u", "year": "2024"},
        "P",
        "204",
    ),
    "aime25": ({"problem": "P", "answer": "70", "id": "0"}, "P", "70"),
    "amc23": ({"id": 0, "question": "P", "answer": "27.0", "url": "u"}, "P", "27.0"),
    "minerva": ({"question": "P", "answer": "1.6e-19"}, "P", "1.6e-19"),
    "olympiadbench": (
        {
            "id": 1606,
            "question": "P",
            "solution": ["S"],
            "final_answer": ["$69$", "84"],
            "context": None,
            "is_multiple_answer": True,
            "unit": None,
        },
        "P",
        "$69$,84",
    ),
}


@pytest.mark.parametrize("name", evaluation.BENCHMARKS)
def test_hub_fields(name, tmp_path, monkeypatch):
    """Through `datasets`, from a local file with the columns that the hub's file has."""
    import datasets

    row, problem, answer = HUB_ROWS[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    real, asked = datasets.load_dataset, []

    def load(hub_id, config, split):
        asked.append((hub_id, config, split))
        return real("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = load_benchmark(name)
    assert (found["problem"], found["answer"]) == (problem, answer)
    hub_id, config, split = evaluation.BENCHMARKS[name][:3]
    assert asked == [(hub_id, config, split)] and hub_id.count("/") == 1

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=f"{name}.*ConnectionError"):
        load_benchmark(name)


def test_other_benchmarks(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "1+1", "answer": 2}\n')
    assert load_benchmark(str(file)) == [{"problem": "1+1", "answer": "2", "solution": ""}]
    assert load_benchmark("tiny", 3) == TINY.problems(512, [3, 10], test=True)
    with pytest.raises(UsageError, match="no such file.*math500"):
        load_benchmark("gsm9k")


@pytest.fixture
def folder(tmp_path):
    """An untrained tiny model that answers something."""
    model = untrained(TINY)
    model.config.window = 24
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def test_resume_is_undisturbed_and_regrade_is_grade(folder, tmp_path, monkeypatch, capsys):
    command = [
        "--model",
        folder,
        "--benchmarks",
        "tiny",
        "--samples",
        2,
        "--limit",
        10,
        "--chunk",
        4,
        "--max-new-tokens",
        12,
        "--device",
        "cpu",
        "--out",
    ]
    run(monkeypatch, *command, tmp_path / "a")
    file = next((tmp_path / "a").rglob("tiny.jsonl"))
    whole = file.read_text()
    settings, records = read_generations(file)
    assert settings["samples"] == 2 and settings["window"] == 24 and len(records) == 10
    assert all(len(r["responses"]) == len(r["verdicts"]) == 2 for r in records)
    reports = sorted(p.name for p in (tmp_path / "a" / "eval").iterdir() if p.is_file())
    assert [Path(name).suffix for name in reports] == [".json", ".md", ".png"]
    assert len({Path(name).stem for name in reports}) == 1 and reports[0].startswith("tiny-")
    run(monkeypatch, *command, tmp_path / "a", "--seed", 3, "--samples", 1, "--limit", 1,
        "--chunk", 9, "--out", tmp_path / "c")
    assert file.read_text() == whole  # other folder

    lines = whole.splitlines(keepends=True)
    other = tmp_path / "b" / file.relative_to(tmp_path / "a")
    other.parent.mkdir(parents=True)
    for cut in (
        "".join(lines[:1]),
        "".join(lines[:5]),
        "".join(lines[:8]) + lines[8][:20],
        whole[:-5],
    ):
        other.write_text(cut)  # after the settings, a chunk, in the middle of a line, near the end
        run(monkeypatch, *command, tmp_path / "b")
        assert other.read_text() == whole

    wrong = [json.loads(line) for line in lines]
    wrong[1]["verdicts"], wrong[2]["verdicts"] = ["correct", "correct"], ["no", "no"]
    other.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    run(monkeypatch, "--regrade", other)
    assert other.read_text() == whole and "4 of 20 verdicts changed" in capsys.readouterr().out

    file.write_text(whole)
    run(monkeypatch, *command[:7], 12, *command[8:], tmp_path / "a")  # more problems: continued
    assert (
        file.read_text().splitlines()[:9] == whole.splitlines()[:9]
        and len(read_generations(file)[1]) == 12
    )
    for change in (
        ["--samples", 3],
        ["--temperature", 0.5],
        ["--seed", 1],
        ["--max-new-tokens", 13],
    ):
        with pytest.raises(UsageError, match="other settings"):
            run(monkeypatch, *command, tmp_path / "a", *change)
    untrained(TINY, 1).save_pretrained(folder)
    with pytest.raises(UsageError, match="weights"):
        run(monkeypatch, *command, tmp_path / "a")


def test_a_full_disk_costs_a_chunk_at_most(folder, tmp_path):
    """In a process whose files may have 1,500 bytes; the same command then continues."""
    command = [sys.executable, Path(evaluation.__file__), "--model", folder, "--benchmarks", "tiny",
               "--limit", 12, "--chunk", 3, "--max-new-tokens", 40, "--device", "cpu", "--out",
               tmp_path]
    command = list(map(str, command))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "free some space" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert len(read_generations(next(tmp_path.rglob("tiny.jsonl")))[1]) == 12


def test_finished_and_truncated_answers(folder, tmp_path, monkeypatch):
    """The box decides, but only of an answer that ended; each problem has its own seeds."""
    tokenizer = Tokenizer.from_pretrained(folder)
    problems = load_benchmark("tiny")[:3]
    asked = []

    def fake(model, prompts, limit, temperature, stop_ids, slots, seeds, **options):
        asked.append((seeds, options["top_p"]))
        gold = {tokenizer.decode(tokenizer.encode(p["problem"])): p["answer"] for p in problems}
        texts = [f"\\boxed{{{gold[tokenizer.decode(p)]}}}" for p in prompts]
        return [
            Rollout(p, tokenizer.encode(t), [], i % 2 == 0)
            for i, (p, t) in enumerate(zip(prompts, texts))
        ]

    monkeypatch.setattr(rl, "generate", fake)
    args = SimpleNamespace(
        samples=2,
        chunk=2,
        seed=0,
        temperature=1.0,
        top_p=0.9,
        max_new_tokens=8,
        slots=None,
        instruction="",
        task=TINY,
    )
    records = answer_benchmark(None, tokenizer, problems, tmp_path / "x.jsonl", {}, args)
    assert [r["verdicts"] for r in records] == [["correct", "truncated"]] * 3
    seeds = [s for chunk, _ in asked for s in chunk]
    assert len(set(seeds)) == 6 and asked[0][1] == 0.9
    args.chunk = 3
    answer_benchmark(None, tokenizer, problems, tmp_path / "y.jsonl", {}, args)
    assert asked[-1][0] == seeds


def test_several_models_and_instructions(folder, tmp_path, monkeypatch, capsys):
    problems = tmp_path / "few.jsonl"
    problems.write_text("".join(json.dumps(p) + "\n" for p in TINY.problems(3, 5)))
    second = tmp_path / "second"
    untrained(TINY, 1).save_pretrained(second)
    run(
        monkeypatch,
        "--model",
        folder,
        second,
        "--benchmarks",
        f"tiny,{problems}",
        "--limit",
        3,
        "--samples",
        2,
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    )
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and sum("average" in line for line in table) == 2
    result = json.loads(next((tmp_path / "eval").glob("*.json")).read_text())
    assert len(result["rows"]) == 6 and "p" in result["rows"][1] and "p" not in result["rows"][0]
    assert {"torch", "device", "git"} <= result.keys()
    asked = {
        s["benchmark"]: s["instruction"]
        for s, _ in map(read_generations, tmp_path.rglob("eval/*/second/*.jsonl"))
    }
    assert asked == {"tiny": "", str(problems): INSTRUCTION}


BAD = {
    "nothing": ([], "give one of"),
    "two tasks": (["--model", "m", "--benchmarks", "tiny", "--prompt", "x"], "give one of"),
    "no model": (["--benchmarks", "tiny"], "needs a --model"),
    "two models": (["--model", "a", "b", "--prompt", "x"], "needs a --model|one --model"),
    "unknown flag": (
        ["--model", "m", "--benchmarks", "tiny", "--sample", "3"],
        "unknown arguments --sample 3",
    ),
    "unknown rl flag": (["--model", "tiny", "--analysis", "windows", "--stepz", "3"], "--stepz"),
    "no samples": (["--model", "m", "--benchmarks", "tiny", "--samples", "0"], "--samples"),
    "temperature": (
        ["--model", "m", "--benchmarks", "tiny", "--temperature", "-1"],
        "--temperature",
    ),
    "nan": (["--model", "m", "--benchmarks", "tiny", "--temperature", "nan"], "--temperature"),
    "top-p": (["--model", "m", "--benchmarks", "tiny", "--top-p", "0"], "--top-p"),
    "window": (["--model", "m", "--benchmarks", "tiny", "--window", "0"], "whole number of keys"),
    "seeds": (["--model", "tiny", "--analysis", "reach", "--seeds", "a"], "--seeds"),
    "analysis": (["--model", "tiny", "--analysis", "depth"], "depth"),
    "benchmark": (["--model", "m", "--benchmarks", "tiny,nope"], "nope"),
    "model": (["--model", "./nowhere", "--benchmarks", "tiny"], "nowhere"),
    "regrade": (["--regrade", "./nowhere.jsonl"], "nowhere.jsonl"),
    "reach": (["--model", "./nowhere", "--analysis", "reach"], "nowhere"),
    "reach window": (["--model", "tiny", "--analysis", "reach", "--window", "200"], "--window"),
    "audit": (["--audit", "./nowhere"], "nowhere"),
    "audit and prompt": (["--audit", "m", "--model", "m", "--prompt", "x"], "give one of"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        run(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)


GENERATION = {"problem": "p", "answer": "1", "responses": ["\\boxed{1}"], "lengths": [3],
              "finished": [True], "verdicts": ["correct"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]\n",
        '{"problem": 1}\n',
        "x\n{}\n",
        '{"settings": {}}\nx\n{"settings": {}}\n',
        '{"settings": {}}\n{"problem": "a"}\n',
        "\xff",
        '{"settings": 3}\n',
        *('{"settings": {}}\n' + json.dumps(GENERATION | wrong) + "\n" for wrong in (
            {"problem": 3}, {"answer": None}, {"responses": "text"}, {"responses": [None]},
            {"responses": ["a", "b"]}, {"lengths": ["1"]}, {"finished": [1]}, {"finished": None},
            {"verdicts": 7}, {"verdicts": ["correct"] * 3})),
        '{"settings": {}}\n' + "[" * 200_000 + "\n{}\n",
    ],
)
def test_files_that_hold_no_generations(text, tmp_path):
    (tmp_path / "f.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="f.jsonl"):
        read_generations(tmp_path / "f.jsonl")


def test_only_the_last_line_may_be_cut_off(tmp_path):
    row = {"problem": "", "answer": "", "responses": [], "lengths": [], "finished": []}
    lines = [json.dumps({"settings": {}}), json.dumps(row), json.dumps(row)[:9]]
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(lines))
    assert read_generations(file) == ({}, [row])
    file.write_text("\n".join([lines[0], lines[2], lines[1]]))
    with pytest.raises(UsageError, match="line 2"):
        read_generations(file)


# ------------------------------------------------------------------------------------- --prompt


def test_prompt_streams(folder, monkeypatch, capsys):
    run(
        monkeypatch,
        "--model",
        folder,
        "--prompt",
        "a1b2?",
        "--max-new-tokens",
        20,
        "--temperature",
        0,
    )
    out, err = capsys.readouterr()
    model = Transformer.from_pretrained(folder)
    tokenizer = Tokenizer(model.tokenizer_files)
    ids = tokenizer.encode("<bos>a1b2?")
    for _ in range(20):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1, : tokenizer.n_ids].argmax().item())
        if ids[-1] in tokenizer.stop_ids:
            break
    assert out == tokenizer.decode(ids[6:]) + "\n" and "tok/s" in err


def test_streaming_holds_back_unfinished_characters(folder, monkeypatch, capsys):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.pieces = {5: b"a\xe2\x82", 6: b"\xac", 7: b"\xf0", 8: b"!", 9: b"<eos>"}
    tokenizer.special_ids, seen = {9}, []

    def fake(*_, stream, **__):
        for tokens in ([5], [6], [], [7], [8], [9]):
            stream(0, tokens)
            seen.append(capsys.readouterr().out)
        return [Rollout([], [5, 6, 7, 8, 9], [], True)]

    monkeypatch.setattr(evaluation, "generate", fake)
    args = SimpleNamespace(
        prompt="a1?", instruction=None, max_new_tokens=9, temperature=1.0, seed=0, top_p=1.0
    )
    evaluation.stream_answer(None, tokenizer, args)
    assert seen == ["a", "\u20ac", "", "", "\ufffd!", ""]


# ------------------------------------------------------------------------------------- locality


def random_model(layers=2, window=None, dtype=torch.float64):
    torch.manual_seed(layers)
    config = ModelConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        window=window,
    )
    model = Transformer(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def random_rollouts(*sizes):
    rng = np.random.default_rng(0)
    return [
        Rollout(rng.integers(13, size=p).tolist(), rng.integers(13, size=t).tolist(), [], True)
        for p, t in sizes
    ]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 4, 9, 40])
def test_information_gap_against_a_double_loop(window):
    model, rollouts = random_model(), random_rollouts((3, 11), (14, 6), (1, 1), (9, 20))
    ratios, kls = (information_gap(model, rollouts, window, expected=e) for e in (False, True))
    for rollout, ratio, kl in zip(rollouts, ratios, kls):
        ids = rollout.prompt + rollout.tokens
        assert len(ratio) == len(kl) == len(rollout.tokens)
        for j, token in enumerate(rollout.tokens):
            before = ids[: len(rollout.prompt) + j]
            p, q = (
                model(torch.tensor([x]))[0, -1].log_softmax(-1) for x in (before, before[-window:])
            )
            assert abs(ratio[j] - (p[token] - q[token])) < 1e-10
            assert (
                abs(kl[j] - torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
                < 1e-10
            )
    assert (window == 40) == all((r == 0).all() for r in ratios)


def test_gap_batches_and_positions():
    """Neither the token budget nor looking at few positions changes a value."""
    model, rollouts = random_model(dtype=torch.float32), random_rollouts((3, 30), (20, 17), (2, 4))
    every = token_gaps(model, rollouts, 5)
    for gap, same in zip(every, token_gaps(model, rollouts, 5, micro_tokens=11)):
        torch.testing.assert_close(gap, same, rtol=0, atol=2e-5)
    for gap, few, asked in zip(every, token_gaps(model, rollouts, 5, positions=6), (27, 17, 0)):
        looked = ~few.isnan()
        assert few.isnan().sum() == 2 * max(0, asked - 6)
        torch.testing.assert_close(few[looked], gap[looked], rtol=0, atol=2e-5)


def test_a_window_reaches_as_far_as_its_layers():
    """One layer sees W tokens, so with W tokens nothing is missing; two layers see 2W - 1."""
    rollouts = random_rollouts((5, 25))
    for layers in (1, 2):
        model = random_model(layers, window=6)
        gap = {
            w: information_gap(model, rollouts, w, expected=True)[0].abs().max().item()
            for w in (5, 6, 10, 11)
        }
        assert gap[5] > 1e-3 and gap[11] < 1e-12
        assert (gap[6] < 1e-12) == (layers == 1) == (gap[10] < 1e-12)


# ------------------------------------------------------------------------------------- analyses


@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
def test_retrieval_is_at_the_stated_distance(kind, request):
    tokenizer, rng = Tokenizer(untrained(TINY).tokenizer_files), np.random.default_rng(0)
    if kind != "tiny":
        tokenizer = Tokenizer.from_pretrained(request.getfixturevalue(kind))
    for distance in (1, 7, 45, 79):
        for queries in (0, 0.3):
            tokens, targets = reach_example(rng, tokenizer, 80, distance, 1, queries)
            digits = [i for i, t in enumerate(tokens) if tokenizer.decode([t]).isdigit()]
            assert digits == [79 - distance] and len(tokens) == len(targets) == 80
            assert all(len(tokenizer.decode([t])) == 1 for t in tokens)  # never merged
            assert [t == tokenizer.encode("?")[0] for t in tokens] == [t >= 0 for t in targets]
            assert {t for t in targets if t >= 0} == {tokens[digits[0]]} == {targets[-1]}
            assert queries or targets.count(-1) == len(targets) - 1


def test_evidence_is_counted_from_the_stated_distance_on():
    tokenizer, rng = Tokenizer(untrained(TINY).tokenizer_files), np.random.default_rng(0)
    for distance in (1, 2, 9, 79):
        for _ in range(20):
            tokens, targets = reach_example(rng, tokenizer, 80, distance, 3, 0.3)
            text = [tokenizer.decode([t]) for t in tokens]
            at = [i for i, c in enumerate(text) if c.isdigit()]
            assert at[0] == 79 - distance and len(at) == min(3, distance)
            answers = {tokenizer.decode([t]) for t in targets if t >= 0}
            assert answers == {str(sum(int(text[i]) for i in at))} and targets[-1] >= 0
            assert all(i > at[-1] for i, t in enumerate(targets) if t >= 0)


def test_outcomes_alone_teach_a_fact_within_reach():
    """GRPO on one-token answers: from an even chance to near certainty."""
    model, how = untrained(TINY), evaluation.Evidence(batch=32, lr=3e-3)
    tokenizer, trainer = Tokenizer(model.tokenizer_files), Trainer(model, torch.device("cpu"))
    settings = evaluation.RLSettings.of(model="tiny")
    for step in range(15):  # what SFT leaves: digits are answers
        rng = np.random.default_rng([0, step])
        evaluation.evidence_sft(trainer, tokenizer, rng, 99, 4, settings, how, 1)

    def score():
        rng, total = np.random.default_rng(5), 0.0
        for _ in range(50):
            tokens, targets = reach_example(rng, tokenizer, 4, 2)
            p = model(torch.tensor([tokens]))[0, -1].softmax(-1)
            total += p[targets[-1]].item() / 50
        return total

    before = score()
    for step in range(60):
        rng = np.random.default_rng([1, step])
        evaluation.evidence_rl(trainer, tokenizer, rng, step, 4, settings, how, 1)
    assert score() > before + 0.1


@torch.no_grad()
@pytest.mark.parametrize("full_layers", [(), (1,)])
def test_beyond_the_reach_a_fact_changes_nothing(full_layers):
    model, rng, W = untrained(TINY).double(), np.random.default_rng(1), 16
    tokenizer = Tokenizer(model.tokenizer_files)
    model.config.window, model.config.full_layers = W, full_layers
    digits = tokenizer.encode("0123456789")
    for distance, seen in ((3 * (W - 1), True), (3 * (W - 1) + 1, bool(full_layers))):
        tokens = torch.tensor([reach_example(rng, tokenizer, 80, distance)[0]] * 10)
        tokens[:, -1 - distance] = torch.tensor(digits)
        last = model.states(tokens)[:, -1]
        assert ((last - last[0]).abs().max() > 1e-12) == seen


def test_length_matched():
    rng = np.random.default_rng(0)
    a, b = rng.integers(30, 60, 200), rng.integers(40, 120, 150)
    i, j = length_matched(a, b)
    edges = np.linspace(min(a.min(), b.min()), max(a.max(), b.max()) + 1, 11)
    assert len(i) == len(set(i)) == len(j) == len(set(j)) > 20
    assert (np.histogram(a[i], edges)[0] == np.histogram(b[j], edges)[0]).all()
    assert length_matched([5, 5], [5]) == ([0], [0]) and length_matched([1], [100]) == ([], [])


ANALYSES = {  # what is added to the command -> rows of the table
    "locality": (["--limit", "4", "--windows", "8,16"], 8),
    "cross-sft": (["--limit", "6"], 8),
    "windows": (["--windows", "16,full"], 4),
    "strategies": ([], 18),
    "budgets": ([], 3),
    "reach": (["--window", "8"], 40),
    "recipe": ([], 6),
    "arms": ([], 6),
    "dose": ([], 14),
    "grid": (["--windows", "8"], 12),
    "locality --references": (["--limit", "4", "--windows", "8", "--references", "base,SA-RL"], 16),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run whose base counts as trained."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield test_train.untrained(tmp_path_factory.mktemp("out"))
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", ANALYSES)
def test_analysis(name, started, monkeypatch, capsys):
    """A few steps of each: table, JSON, pictures, and a second start that trains nothing."""
    (more, rows), name = ANALYSES[name], name.split()[0]

    def solved(folder, problems, settings):  # untrained policies solve nothing
        tokenizer, rng = Tokenizer.from_pretrained(folder), np.random.default_rng(0)
        texts = [TINY.solution(p["problem"], rng, restate="w24" in str(folder)) for p in problems]
        return [
            Episode(
                tokenizer.encode("<bos>" + p["problem"]),
                tokenizer.encode(t + "<eos>"),
                [],
                True,
                t,
                "correct",
                1.0,
            )
            for p, t in zip(problems, texts)
        ]

    def few(self, n, *rest, **more):
        return problems_of(self, min(n, 64), *rest, **more)

    problems_of = RunningSums.problems
    monkeypatch.setattr(evaluation, "answers", solved)
    monkeypatch.setattr(RunningSums, "problems", few)
    monkeypatch.setattr(evaluation, "Evidence", partial(Evidence, 2, 2, 4, 3e-3, 5))
    flags = "--steps 2 --sft-steps 2 --prompts 2 --group 2 --max-new-tokens 12 --validate 4"
    flags += " --workers 1 --device cpu"
    command = ["--model", "tiny", "--analysis", name, *flags.split(), "--out", started, *more]
    run(monkeypatch, *command)
    folder = started / "tiny" / "analysis"
    result = json.loads((folder / f"{name}.json").read_text())
    assert len(result["rows"]) == rows and "--analysis" in result["command"]
    table = [
        line for line in (folder / f"{name}.md").read_text().splitlines() if line.startswith("|")
    ]
    assert len(table) == rows + 2 and len({line.count("|") for line in table}) == 1
    assert (folder / f"{name}.png").stat().st_size > 5000
    made = {p: p.stat().st_mtime_ns for p in started.rglob("*.safetensors")}
    run(monkeypatch, *command)
    assert {p: p.stat().st_mtime_ns for p in started.rglob("*.safetensors")} == made
    again = json.loads((folder / f"{name}.json").read_text())["rows"]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in result["rows"]
    ]


# ------------------------------------------------------------------------------------------ audit

W = 5
HONEST = {"qwen2": {"model_type": "qwen2"}, "qwen3 mixed": {"full_layers": (1,)},
          "mistral": {"model_type": "llama"},
          "ministral": {"model_type": "llama", "full_layers": (0, 2)}, "full": {"window": None},
          "wide": {"window": 700, "full_layers": (1,)}, "sinks": {"sinks": 3},
          "sinks, mixed": {"sinks": 1, "window": 1, "full_layers": (2,)},
          "sinks beyond the window": {"sinks": 12, "model_type": "qwen2"},
          "no RoPE": {"full_layers": (1,), "nope_full": True}}


def audit(monkeypatch, folder, **kind):
    test_model.tiny(**{"max_position_embeddings": 2048} | kind).float().save_pretrained(folder)
    run(monkeypatch, "--audit", folder)


@pytest.mark.parametrize("kind", HONEST)
def test_audit_of_what_is_honoured(kind, tmp_path, monkeypatch, capsys):
    own = HONEST[kind].keys() & {"sinks", "nope_full"}
    if not own:
        pytest.importorskip("transformers")
    audit(monkeypatch, tmp_path, **HONEST[kind])
    said = capsys.readouterr().out
    _, *rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]
    assert all(cell.strip(" |") == "ok" for row in rows for cell in row[2:])
    assert {len(row) for row in rows} == {4 if own else 6}
    assert ("transformers is left out" in said) == bool(own)
    full, mixed = HONEST[kind].get("window", W) is None, HONEST[kind].get("full_layers")
    assert sum(" full " in " ".join(row) for row in rows) == (1 if full else len(mixed or ()))


def test_audit_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    audit(monkeypatch, tmp_path)
    assert "transformers is left out" in capsys.readouterr().out


def ring_as_long_as_the_sequence(monkeypatch):
    empty = nano.SlidingWindow.empty_cache
    monkeypatch.setattr(nano.SlidingWindow, "empty_cache", lambda self, *sizes, **kind: empty(
        nano.SlidingWindow(self.config, None), *sizes, **kind))


def other_attention(change):
    """Each layer's window and sinks changed: change(layer, window, sinks)."""
    def patch(monkeypatch):
        def layers(config):
            found = []
            for i, window in enumerate(config.windows):
                window, sinks = change(i, window, config.sinks)
                found.append(nano.SlidingWindow(nano.replace(config, sinks=sinks), window))
            return found

        monkeypatch.setattr(nano, "attention_layers", layers)
    return patch


def shorter_prefill(monkeypatch):
    attention = nano.swa_attention
    monkeypatch.setattr(nano, "swa_attention", lambda q, k, v, window, *more: attention(
        q, k, v, window - 1, *more))


def their(change):
    """transformers' model changed after it was opened."""
    def patch(monkeypatch):
        auto = pytest.importorskip("transformers").AutoModelForCausalLM
        opened = auto.from_pretrained

        def open_changed(*args, **kwargs):
            model = opened(*args, **kwargs)
            change(model.config)
            return model

        monkeypatch.setattr(auto, "from_pretrained", open_changed)
    return patch


def one_more(config):
    config.sliding_window += 1


def layer_1_full(config):
    config.layer_types[1] = "full_attention"


def their_decode_forgets(monkeypatch):
    """What happened in libraries: a cache without windows, and a mask for prefill alone."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3 import modeling_qwen3 as theirs

    cache, masked, mask = (
        theirs.DynamicCache, theirs.create_sliding_window_causal_mask, theirs.create_causal_mask)
    monkeypatch.setattr(theirs, "DynamicCache", lambda config: cache())
    monkeypatch.setattr(theirs, "create_sliding_window_causal_mask", lambda **given: (
        masked if given["inputs_embeds"].shape[1] > 1 else mask)(**given))


LOST = {  # how a window is lost -> (the folder, what the audit says)
    "decode": (ring_as_long_as_the_sequence, {}, "layer 0-2 in nanoSWARR decode: sees 5+ back"),
    "prefill, off by one": (shorter_prefill, {}, "layer 0-2 in nanoSWARR prefill: misses 4 back"),
    "one layer": (other_attention(lambda i, w, n: (None if i == 1 else w, n)), {},
                  "layer 1 in nanoSWARR prefill: sees 5+ back; "
                  "layer 1 in nanoSWARR decode: sees 5+ back"),
    "off by one": (other_attention(lambda i, w, n: (w + 1, n)), {},
                   "layer 0-2 in nanoSWARR prefill: sees 5+ back; "
                   "layer 0-2 in nanoSWARR decode: sees 5+ back"),
    "a full layer": (other_attention(lambda i, w, n: (W, n)), {"full_layers": (2,)},
                     "layer 2 in nanoSWARR prefill: misses 5+ back; "
                     "layer 2 in nanoSWARR decode: misses 5+ back"),
    "a sink": (other_attention(lambda i, w, n: (w, n - 1)), {"sinks": 3},
               "layer 0-2 in nanoSWARR prefill: misses sink 2; "
               "layer 0-2 in nanoSWARR decode: misses sink 2"),
    "a sink too many": (other_attention(lambda i, w, n: (w, n + 1)), {"sinks": 3},
                        "layer 0-2 in nanoSWARR prefill: sees 5+ back; "
                        "layer 0-2 in nanoSWARR decode: sees 5+ back"),
    "theirs, off by one": (their(one_more), {"model_type": "llama"},
                           "layer 0-2 in transformers prefill: sees 5+ back; "
                           "layer 0-2 in transformers decode: sees 5+ back"),
    "theirs, one layer": (their(layer_1_full), {"model_type": "qwen2"},
                          "layer 1 in transformers prefill: sees 5+ back; "
                          "layer 1 in transformers decode: sees 5+ back"),
    "theirs, decode": (their_decode_forgets, {}, "layer 0-2 in transformers decode: sees 5+ back"),
}


@pytest.mark.parametrize("bug", LOST)
def test_audit_finds_a_lost_window(bug, tmp_path, monkeypatch, capsys):
    """A message as the exit code: the interpreter prints it and ends with 1."""
    patch, kind, expected = LOST[bug]
    patch(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        audit(monkeypatch, tmp_path, **kind)
    assert exit.value.code == f"not as declared: {expected}"
