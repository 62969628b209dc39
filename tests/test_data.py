"""The data of both stages: layouts, the split, what is left out, what faults are told."""

import json
import re
import signal
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import convert_sft
import eval as evaluation
import rl
from convert_sft import TASKS, SFTSettings, load_problems, on_test_side, sft_rows
from model import Tokenizer, UsageError
from rl import RLSettings

TINY = TASKS["tiny"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(rows): the hub then holds these, loaded through `datasets` from a local file."""
    import datasets
    import huggingface_hub

    real = datasets.load_dataset

    def fill(rows):
        file = write(tmp_path / "hub.jsonl", rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: real(
            "json", data_files=file, split="train", cache_dir=str(tmp_path / "cache")))

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return fill


class unreachable:
    def head(*_, **__):
        raise ConnectionError("no route")


# ----------------------------------------------------------------------------- prompt and response

SOLUTION = "<think>\nOne and one.\n</think>\nSo \\boxed{2}."
ENDS = {  # what a chat template puts before the response -> what is left of SOLUTION
    "<think>\n": "One and one.\n</think>\nSo \\boxed{2}.",
    "<think>": "\nOne and one.\n</think>\nSo \\boxed{2}.",
    "Answer: <thi": "nk>\nOne and one.\n</think>\nSo \\boxed{2}.",
    "assistant\n": SOLUTION,
    "<think>\n\n</think>\n\n": SOLUTION,
    "": SOLUTION,
}


def row_of(tokenizer, problem, solution):
    """(prompt, response) of an example, as texts."""
    problem = {"problem": problem, "answer": "2", "solution": solution}
    [row] = sft_rows(SFTSettings.of(instruction=""), tokenizer, [problem])
    n = sum(target >= 0 for target in row["targets"])
    ids = [*row["tokens"], row["targets"][-1]]
    return [tokenizer.decode(part, skip_special=False) for part in (ids[:-n], ids[-n:])]


@pytest.mark.parametrize("end", ENDS)
def test_what_the_template_has_said_is_not_said_again(tokenizer_folder, end):
    files = Tokenizer.from_pretrained(tokenizer_folder("deepseek-r1-distill")).files
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = f"{{{{ messages[-1]['content'] }}}}{{{{ {json.dumps(end)} }}}}"
    tokenizer = Tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    eos = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    assert row_of(tokenizer, "1+1?", SOLUTION) == ["1+1?" + end, ENDS[end] + eos]
    # what the problem ends in is its own: the response may begin with it
    assert row_of(tokenizer, "1+1? <think>", SOLUTION)[1] == ENDS[end] + eos


SPACES = {  # a template's end, a solution -> what is left to say
    ("<think>\n", "<think>Okay"): "Okay",
    ("<think>\n", "\n <think>\n\nOkay"): "Okay",
    ("<think>", "<think> Okay"): " Okay",
    ("<think>\n\n", "<think>"): "",
    ("assistant\n", "to be"): "to be",  # no overlap begins within a word
    ("assistant\n", "\nOkay"): "Okay",
    ("", " Okay"): " Okay",
}


@pytest.mark.parametrize("case", SPACES)
def test_white_space_hides_no_second_think(case):
    assert convert_sft.without_opening(*reversed(case)) == SPACES[case]


def test_deepseek_thinks_once(tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder("deepseek-r1-distill"))
    prompt, response = row_of(tokenizer, "1+1?", SOLUTION)
    assert prompt.endswith("1+1?<｜Assistant｜><think>\n")
    assert response == SOLUTION.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"


# ----------------------------------------------------------------------------------------- layouts

OPENR1 = {  # math-verify, the judge, complete -> the generation that is taken
    "verified": ([False, True], None, None, 1),
    "the first": ([True, True], None, [True, True], 0),
    "judged": (None, [False, True], [True, True], 1),
    "judged where math-verify found nothing": ([False, False], [False, True], [True, True], 1),
    "silent on one": ([None, False], [True, False], None, 0),
    "cut off": ([True, True], None, [False, True], 1),
    "all cut off": ([True, True], None, [False, False], None),
    "all wrong": ([False, False], None, [True, True], None),
    "nobody looked": (None, None, [True, True], None),
}


@pytest.mark.parametrize("case", OPENR1)
def test_openr1_takes_a_verified_generation(tmp_path, case):
    verify, judge, complete, taken = OPENR1[case]
    row = {"problem": "p", "answer": "2", "solution": "people's",
           "generations": ["a", "b"], "correctness_math_verify": verify, "correctness_llama": judge,
           "is_reasoning_complete": complete, "messages": [{"role": "assistant", "content": "a"}]}
    [problem] = load_problems(write(tmp_path / "x.jsonl", [row]))
    assert problem["solution"] == ("" if taken is None else "ab"[taken])


def test_rows_without_a_solution_are_counted(tmp_path, capsys):
    rows = [{"problem": f"p {i}", "answer": "2", "generations": ["a"],
             "correctness_math_verify": [i % 3 == 0]} for i in range(90)]
    settings = SFTSettings.of(data=write(tmp_path / "x.jsonl", rows))
    train, held_out = settings.task.sft(settings)
    assert len(train) + len(held_out) == 30
    [line] = capsys.readouterr().out.splitlines()
    assert re.match(r"60 of 90 problems are left out: .*\(verified\) solution", line)


def dapo(problem, answer, wrapped=True):
    if wrapped:
        problem = ("Solve the following math problem step by step. The last line of your response "
                   "should be of the form Answer: $Answer (without quotes) where $Answer is the "
                   f"answer to the problem.\n\n{problem}\n\n"
                   'Remember to put your answer on its own line after "Answer:".')
    return {"data_source": "math_dapo", "prompt": [{"content": problem, "role": "user"}],
            "ability": "MATH", "reward_model": {"ground_truth": answer, "style": "rule-lighteval/"},
            "extra_info": {"index": "9a9b6eb4"}}


def test_dapo_is_unwrapped_and_each_problem_comes_once(hub, capsys):
    texts = [f"Find $x_{{{i}}}$.\n\nIt is real." for i in range(250)]
    hub([dapo(t, str(i)) for i, t in enumerate(texts)] * 9 + [dapo(texts[3].upper(), "no", False)])
    task = RLSettings.of(data="a/b").task
    assert task.all == [{"problem": t, "answer": str(i), "solution": ""}
                        for i, t in enumerate(texts)]
    assert "2,001 of 2,251 problems are left out: repeats" in capsys.readouterr().out
    assert len(load_problems("a/b")) == 2251  # what stage 1 reads: several solutions are several


def test_rows_of_the_hub_come_in_batches_of_known_columns(hub, monkeypatch):
    import datasets

    hub([dapo(str(i), "1") for i in range(2500)])
    asked, batches = [], datasets.Dataset.iter
    monkeypatch.setattr(datasets.Dataset, "iter", lambda rows, size: asked.append(
        (set(rows.column_names), size)) or batches(rows, size))
    assert len(load_problems("a/b")) == 2500
    assert asked == [({"prompt", "reward_model"}, 1000)]
    hub([{"other": 1}])
    with pytest.raises(UsageError, match="--data a/b line 1"):
        load_problems("a/b")


# ------------------------------------------------------------------------------------------- split


def test_one_problem_has_one_side():
    texts = [f"Wie groß ist Ä_{i}, wenn es   fünf sind?" for i in range(400)]
    sides = [on_test_side(text, 20) for text in texts]
    assert 0 < sum(sides) < 400
    for same in (str.upper, str.casefold, lambda t: t.replace(" ", "\n "), lambda t: f"\t{t} ",
                 lambda t: t.replace("Ä", "A\u0308").replace("ü", "u\u0308")):
        assert [on_test_side(same(text), 20) for text in texts] == sides
    assert [on_test_side(text.replace("es", "er"), 20) for text in texts] != sides  # the limit


def test_the_tiny_task_keeps_its_sides():
    """As they were before the text was normalised: its results stay comparable."""
    of = {test: [p["problem"] for p in TINY.problems(4, 0, test)] for test in (False, True)}
    assert of == SIDES


SIDES = {False: ["a3b2c1d1e0f0g0h0?", "a3b4c2d3e4f3g3h2?", "a4b1c4d3e0f1?", "a2b0c3d3e4f0g0h4?"],
         True: ["a3b1c3d3e1f2?", "a1b1c4d1e1f3g3?", "a2b0c4d2e4?", "a3b4c4d0e0f4g0h4?"]}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(rows, **flags): an untrained tiny model through both stages on one JSONL file."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(rl, "grade_batch", lambda texts, golds, grader: [
        "correct" if len(text) % 2 else "wrong" for text in texts])
    model = convert_sft.untrained(TINY)
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(convert_sft, "pretrain", lambda settings: tmp_path / "base")
    monkeypatch.setattr(rl, "pretrain", lambda settings: tmp_path / "base", raising=False)

    def run(rows, **flags):
        small = {"model": "tiny", "out": str(tmp_path), "device": "cpu", "sft_steps": 2, "steps": 2,
                 "prompts": 4, "group": 4, "max_new_tokens": 8, "validate": 4}
        settings = RLSettings.of(**small | {"data": write(tmp_path / "x.jsonl", rows)} | flags)
        rl.run_arm(settings)

    yield run
    for name, handler in before.items():
        signal.signal(name, handler)


def trained_on(monkeypatch):
    """What Trainer.update is given, from now on: a Counter of problems."""
    seen, tokenizer = Counter(), Tokenizer(convert_sft.untrained(TINY).tokenizer_files)
    update = convert_sft.Trainer.update

    def spy(self, rows, *arguments):
        seen.update(tokenizer.decode(row["tokens"]).partition("?")[0] + "?" for row in rows)
        return update(self, rows, *arguments)

    monkeypatch.setattr(convert_sft.Trainer, "update", spy)
    return seen


def examples(n):
    """n different problems of the tiny task, of both sides, with solutions."""
    rng, rows = np.random.default_rng(5), {}
    while len(rows) < n:
        problem = TINY.problem(rng)
        solution = TINY.solution(problem, rng, restate=0)
        rows[problem] = {"problem": problem, "answer": "0", "solution": solution}
    return list(rows.values())


def test_no_stage_trains_on_what_is_validated(start, monkeypatch):
    rows, validated = examples(300), []
    seen, roll_out = trained_on(monkeypatch), rl.roll_out

    def spy(model, tokenizer, problems, *arguments, **more):
        if arguments[0] == 1:  # one sample: validation
            validated.extend(p["problem"] for p in problems)
        return roll_out(model, tokenizer, problems, *arguments, **more)

    monkeypatch.setattr(rl, "roll_out", spy)
    start(rows, sft_steps=10, steps=8, prompts=40, validate=100)  # an epoch each
    validated = set(validated)
    assert len(validated) > 5 and set(seen) & validated == set()
    assert set(seen) | validated == {row["problem"] for row in rows}


# ------------------------------------------------------------------------------------ what is long


def test_long_prompts_are_left_out_at_the_start(start, capsys, monkeypatch):
    """The tiny model has 512 positions."""
    rows = examples(100)
    for row in rows[::3]:
        row["problem"] = row["problem"][:-1] * 60 + "?"
    seen = trained_on(monkeypatch)
    start(rows, steps=8, prompts=20, max_new_tokens=300, sft_data="tiny", sft_steps=0)
    line = "34 of 100 problems are left out: longer than 212 tokens (lower --max-new-tokens)"
    assert capsys.readouterr().out.count(line) == 1
    assert len(seen) > 40 and max(map(len, seen)) < 30
    with pytest.raises(UsageError, match="none of 100 .* 12 tokens: lower --max-new-tokens"):
        start([row | {"problem": row["problem"] * 9} for row in rows], max_new_tokens=500)


def test_the_analyses_leave_out_long_prompts_as_well(start, tmp_path, monkeypatch):
    """After stage 1 alone, of a policy's trajectories and of what both policies solve."""
    rows, asked = examples(100), []
    for row in rows[::3]:
        row["problem"] = row["problem"][:-1] * 60 + "?"
    data = write(tmp_path / "x.jsonl", rows)

    def settings():
        return RLSettings.of(model="tiny", out=str(tmp_path), device="cpu", data=data,
                             sft_data="tiny", sft_steps=0, max_new_tokens=300, validate=100)

    def ask(model, tokenizer, problems, *_):
        asked.append([p["problem"] for p in problems])
        raise InterruptedError

    for module in (rl, evaluation):
        monkeypatch.setattr(module, "roll_out", ask)
    folder = settings().folder("sft")
    monkeypatch.setattr(evaluation, "plan", lambda *_: evaluation.Planned(settings()))
    monkeypatch.setattr(evaluation, "policy", lambda *_: folder)
    args = SimpleNamespace(limit=None)
    for analysis in (lambda: evaluation.run_sft(settings()),
                     lambda: evaluation.trajectories_of(folder, folder, settings(), [24], args),
                     lambda: evaluation.solved_by_both(args, 0)):
        with pytest.raises(InterruptedError):
            analysis()
    assert len(asked) == 3 and all(0 < max(map(len, problems)) < 30 for problems in asked)


def test_long_examples_are_left_out_at_the_start(tmp_path, start, capsys, monkeypatch):
    rows = examples(100)
    for row in rows[::3]:
        row["solution"] = row["solution"] * 9
    seen = trained_on(monkeypatch)
    start(rows, steps=0, sft_steps=10)
    assert re.search(r"\d+ of \d+ problems are left out: longer than 256 tokens \(raise --max-len",
                     capsys.readouterr().out)
    assert set(seen) <= {row["problem"] for i, row in enumerate(rows) if i % 3} and len(seen) > 50
    with pytest.raises(UsageError, match="none of .* has at most 9 tokens: raise --max-length"):
        convert_sft.convert(SFTSettings.of(model="tiny", out=str(tmp_path / "other"), max_length=9,
                                           device="cpu"))


@pytest.mark.parametrize("limit", [1, 20, 40, 80, 200])
def test_few_are_counted_and_none_wrongly(any_tokenizer, limit):
    tokenizer = Tokenizer.from_pretrained(any_tokenizer)
    texts = ["x" * n for n in range(1, 99, 7)] + ["ÄÖ ∑ 中文 🙂" * n for n in range(1, 6)]
    problems = [{"problem": t, "answer": "2", "solution": t} for t in texts]
    counted = []

    def count(problem):
        counted.append(problem["problem"])
        return len(tokenizer.encode(problem["problem"] + convert_sft.solution_text(problem)))

    fitting = [p for p in problems if count(p) <= limit]
    counted.clear()
    if fitting:
        assert convert_sft.that_fit(problems, count, limit, "") == fitting
    else:
        with pytest.raises(UsageError, match=f"none of {len(texts)}"):
            convert_sft.that_fit(problems, count, limit, "")
    assert limit < 200 or "x" not in counted


# ------------------------------------------------------------------------------------------ faults

GOOD = b'{"problem": "p", "answer": "a"}\n'
BAD = {
    "a list as solution": b'{"problem": "p", "answer": "a", "solution": ["x"]}',
    "a number as solution": b'{"problem": "p", "answer": "a", "solution": 5}',
    "nothing that was verified": b'{"problem": "p", "answer": "a", "generations": [null],'
                                 b' "correctness_math_verify": [true]}',
    "generations are a number": b'{"problem": "p", "answer": "a", "generations": 5}',
    "verdicts are a number": b'{"problem": "p", "answer": "a", "generations": ["a"],'
                             b' "correctness_llama": 5}',
    "a list as answer": b'{"problem": "p", "answer": ["a"]}',
    "an object as answer": b'{"problem": "p", "answer": {"a": 1}}',
    "an object as problem": b'{"problem": {"a": 1}, "answer": "a"}',
    "no reward model": b'{"prompt": "p", "reward_model": null}',
    "messages of lists": b'{"answer": "a", "messages": [{"role": "user", "content": ["p"]}]}',
    "nested": b'{"problem": ' + b"[" * 100_000,
    "nested answer": b'{"problem": "p", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"problem": "p", "answer": ' + b"9" * 9999 + b"}",
    "Latin-1": '{"problem": "größer", "answer": "a"}'.encode("latin-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_sentence_with_its_line(tmp_path, case):
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"\n" + BAD[case] + b"\n" + GOOD)
    with pytest.raises(UsageError, match="x.jsonl line 3: not a problem") as error:
        load_problems(str(tmp_path / "x.jsonl"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_encodings(tmp_path):
    path, text = tmp_path / "x.jsonl", '{"problem": "größer", "answer": 1}\n' * 2
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert [p["problem"] for p in load_problems(str(path))] == ["größer"] * 2
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UsageError, match=r"x.jsonl line 1: not a problem in JSON \('utf"):
            load_problems(str(path))


def test_a_generation_that_is_nothing_is_no_solution(tmp_path):
    row = {"problem": "p", "answer": "a", "generations": [None], "correctness_llama": [False]}
    [problem] = load_problems(write(tmp_path / "x.jsonl", [row]))
    assert problem["solution"] == ""


def test_a_hub_out_of_reach_is_told_in_seconds(tmp_path, hub, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    settings, began = RLSettings.of(data="no-such/data", out=str(tmp_path)), time.time()
    settings.sft_data = settings.data
    for flag, task in {"--data": settings.task, "--sft-data": settings.stage1.task}.items():
        with pytest.raises(UsageError, match=f"^{flag} no-such/data could not be fetched"):
            _ = task.all
    assert time.time() - began < 30


def test_faults_of_rls_data_are_told_before_stage_1(tmp_path, start):
    for rows, message in (([{"problem": "p"}], "line 1"), (examples(1), "too small")):
        with pytest.raises(UsageError, match=f"--data .*{message}"):
            start(rows, sft_data="tiny")
        assert not (tmp_path / "tiny").exists()
