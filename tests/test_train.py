"""The data, GRPO's mathematics, and runs: packing, resume, kill -9, two ranks."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import convert_sft
import rl
from convert_sft import (
    TASKS,
    Run,
    Settings,
    SFTSettings,
    Trainer,
    all_sum,
    load_problems,
    make_row,
    on_test_side,
    pack,
    schedule,
    solution_text,
)
from model import Tokenizer, Transformer, UsageError, cli, read_weights
from rl import RLSettings, group_advantages, grpo_loss, overlong_penalty

CPU, TINY = torch.device("cpu"), TASKS["tiny"]


@pytest.fixture(autouse=True)
def handlers():
    """A Run takes over the signals of its process."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- GRPO


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, -1]])
    centred = [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [0.25] * 3 + [-0.75]]
    close(group_advantages(rewards), torch.tensor(centred))
    scaled = group_advantages(rewards, std=True)  # std of 1, 0, 0, 1: (1 / 3)**0.5
    close(scaled[:2], torch.tensor(centred[:2]) * 3**0.5, 1e-5)


LOSSES = {  # ratio, advantage, options -> loss of one of 10 tokens, whether it has a gradient
    "on policy": (1.0, 2.0, {}, -0.2, True),
    "no advantage": (1.0, 0.0, {}, 0.0, False),
    "up, good: clipped": (1.5, 1.0, {}, -0.128, False),
    "up, bad: pushed back": (1.5, -1.0, {}, 0.15, True),
    "down, good: pushed back": (0.5, 1.0, {}, -0.05, True),
    "down, bad: clipped": (0.5, -1.0, {}, 0.08, False),
    "inside": (1.25, 1.0, {}, -0.125, True),
    "wider clip": (1.5, 1.0, {"clip": (0.2, 0.6)}, -0.15, True),
    "importance": (1.0, 1.0, {"rollout": 0.5}, -0.05, True),
    "importance capped": (1.0, 1.0, {"rollout": 5.0}, -0.2, True),
    "importance, other cap": (1.0, 1.0, {"rollout": 5.0, "tis_cap": 3.0}, -0.3, True),
    "masked": (1.0, 1.0, {"mask": 0.0}, 0.0, False),
}


@pytest.mark.parametrize("case", LOSSES)
def test_loss_by_hand(case):
    ratio, advantage, options, expected, alive = LOSSES[case]
    options = dict(options)
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    logprobs = (old + np.log(ratio)).requires_grad_()
    if "rollout" in options:
        options["rollout_logprobs"] = old - np.log(options.pop("rollout"))
    mask = torch.tensor([[options.pop("mask", 1.0)]])
    loss = grpo_loss(logprobs, old, torch.tensor([[advantage]]), mask, 10, **options)
    loss.backward()
    close(loss.item(), expected)
    # d(ratio * A)/d log p is the surrogate itself, whatever the ratio
    close(logprobs.grad.item(), expected if alive else 0.0)


def test_overlong_penalty():
    lengths = {50: 0, 80: 0, 90: -0.5, 100: -1}
    assert {n: overlong_penalty(n, 100, 20) for n in lengths} == lengths
    assert overlong_penalty(100, 100, 0) == 0


def grpo_rows(count=6):
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        prompt, answer = (rng.integers(33, size=m).tolist() for m in (2 + i, 3 + 5 * i))
        n = len(answer)
        rows.append(make_row(prompt, answer, advantage=[i - 2.0] * n, mask=[1.0] * n))
    return rows


def trainer_of(rows=(), micro_tokens=16384):
    """A tiny model in fp64, after an update on the rows with learning rate 0."""
    def loss_fn(logp, m):
        return grpo_loss(logp, logp.detach(), m["advantage"], m["mask"], n_tokens=100)

    trainer = Trainer(convert_sft.untrained(TINY), CPU, micro_tokens, 0.0, 1e9)
    trainer.model.double()
    if rows:
        trainer.update(rows, loss_fn, lr=0.0)
    return trainer


def test_gradient_does_not_depend_on_packing_or_order():
    """Seen in AdamW's first moment, a tenth of the gradient after one step."""
    rows, moments = grpo_rows(), []
    for given, micro_tokens in [(rows, 10**6), (rows, 1), (rows[::-1], 40)]:
        trainer = trainer_of(given, micro_tokens)
        moments.append([state["exp_avg"] for state in trainer.optimizer.state.values()])
    for together, apart, some in zip(*moments, strict=True):
        close(together, apart, 1e-13)
        close(together, some, 1e-13)
    assert sum(m.abs().sum() for m in moments[0]) > 0.01


def test_prompt_tokens_carry_no_gradient():
    """The prompt's own advantages, whatever they were, are not asked for."""
    row = make_row([5, 6, 7], [8, 9], advantage=[1.0, 2.0])
    assert row == {"tokens": [5, 6, 7, 8], "targets": [-1, -1, 8, 9], "advantage": [0, 0, 1, 2]}
    model, logits = convert_sft.untrained(TINY), []
    model.lm_head.register_forward_hook(lambda *_: logits.append(_[-1].shape[0]))
    [micro] = pack([row], 100)
    model(micro["tokens"], micro["cu_seqlens"], micro["targets"])
    assert logits == [2]  # logits are made for the two response tokens alone


def test_pack():
    rows = grpo_rows(9)
    for limit in (1, 30, 64, 10**6):
        packed = []
        for micro in pack(rows, limit):
            ends = micro.pop("cu_seqlens")
            assert ends.dtype == torch.int32 and ends[-1] == micro["tokens"].shape[1]
            assert ends[-1] <= limit or len(ends) == 2
            packed += [{name: column[0, a:b].tolist() for name, column in micro.items()}
                       for a, b in zip(ends[:-1], ends[1:], strict=True)]
        assert sorted(map(str, packed)) == sorted(map(str, rows))
    assert len(pack(rows, 10**6)) == 1 and len(pack(rows, 1)) == 9 and pack([], 5) == []


@pytest.mark.parametrize("step, kind, expected", [
    (0, "constant", 0.25), (2, "constant", 0.75), (3, "constant", 1), (99, "constant", 1),
    (50, "cosine", 0.55), (100, "cosine", 0.1), (60, "linear", 1),
    (80, "linear", 0.55), (100, "linear", 0.1), (500, "linear", 0.1)])
def test_schedule(step, kind, expected):
    rate = schedule(step, 100, 2.0, 3, kind, decay_from=0.6 * (kind == "linear"))
    assert rate == pytest.approx(2 * expected)


# --------------------------------------------------------------------------------------- settings

FREE = set("model micro_tokens keep_blocks compile offload save_minutes out device wandb plan "
           "memory".split())
STAGES = {  # stage -> its settings, its parser, what a run may be continued with
    "sft": (SFTSettings, convert_sft.parser(), FREE),
    "rl": (RLSettings, rl.parser(), FREE | set(
        "steps hours sft_steps sft_data validate validate_every slots".split()))}
OTHER = {str: "x", int: 7, float: 0.7, bool: True, tuple: (0, 2), type(None): 7}


def other(settings, name):
    """The settings with another value of one field."""
    return replace(settings, **{name: OTHER[type(getattr(settings, name))]})


@pytest.mark.parametrize("stage", STAGES)
def test_given_flags_beat_the_task_which_beats_the_real_model(stage):
    kind, parser, _ = STAGES[stage]
    own = TINY.defaults[stage]
    real, tiny = kind.of(), kind.of(model="tiny")
    for f in fields(kind):
        if f.name != "model":
            assert getattr(real, f.name) == f.default
            assert getattr(tiny, f.name) == own.get(f.name, f.default)
    assert (real.lr, real.window) == ({"sft": 1e-5, "rl": 1e-6}[stage], 4096)
    assert (tiny.lr, tiny.window) == ({"sft": 1e-3, "rl": 7e-4}[stage], 24)
    words = "--model tiny --lr 0.5 --window full --full-layers 2,0 --save-minutes 3".split()
    given = vars(parser.parse_args(words))
    assert given == {"model": "tiny", "lr": 0.5, "window": None, "full_layers": (0, 2),
                     "save_minutes": 3}
    assert kind.of(**given) == replace(tiny, **given)


@pytest.mark.parametrize("stage", STAGES)
def test_identity_is_all_that_is_not_free(stage):
    kind, _, free = STAGES[stage]
    settings = kind.of(model="tiny")
    names = {f.name for f in fields(kind)}
    identity = settings.identity()
    assert identity.keys() == names - free | {"stage"} and identity["stage"] == stage
    assert {n for n in names if other(settings, n).identity() == identity} == free


def test_stage_one_of_an_rl_run(tmp_path):
    settings = RLSettings.of(model="tiny", lr=0.5, steps=9)
    first = settings.stage1
    assert first == SFTSettings.of(model="tiny")  # its own steps, learning rate and data
    for f in fields(Settings):
        if f.name not in ("model", "window_from"):
            assert other(settings, f.name).stage1 == other(first, f.name)
    assert replace(settings, window_from=30).stage1 == replace(first, window_from=30)
    few = replace(settings, sft_steps=5, sft_data="x.jsonl").stage1
    assert few == replace(first, steps=5, data="x.jsonl")
    assert replace(settings, sft_steps=0).stage1.steps == 0
    (tmp_path / "x.jsonl").write_text("")
    mine, others = str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")
    assert RLSettings.of(data=mine).stage1.data == mine
    assert RLSettings.of(data=mine, sft_data=others).stage1.data == others
    assert RLSettings.of(data="some/hub").stage1.data == SFTSettings.of().data


FOLDERS = {  # flags -> the folder in <out>/<model>
    "--model tiny": "tiny/sft-w24", "--model tiny --window full --full-layers 1": "tiny/sft-wfull",
    "--model tiny --full-layers 2,1": "tiny/sft-w24-full1.2", "--model a/b": "b/sft-w4096",
    "--model tiny --window 9 --full-layers 1 --nope-full": "tiny/sft-w9-full1-nope",
    "--model tiny --nope-full": "tiny/sft-w24", "--model tiny --sinks 4": "tiny/sft-w24-sinks4",
    "--model tiny --window full --sinks 4": "tiny/sft-wfull",
    "--model tiny --window 9 --full-layers 1 --sinks 2": "tiny/sft-w9-sinks2-full1",
}


@pytest.mark.parametrize("text", FOLDERS)
def test_folders(text):
    settings = SFTSettings.of(**vars(convert_sft.parser().parse_args(text.split())))
    assert settings.folder() == Path("out") / FOLDERS[text]
    assert settings.folder("rl") == Path("out") / FOLDERS[text].replace("sft", "rl")


def test_sums_by_name(monkeypatch):
    values = {"b": 1, "a": torch.tensor(2), "n": 2**40 + 1, "no": False}
    assert all_sum(values, CPU) == {"b": 1, "a": 2, "n": 2**40 + 1, "no": 0}
    monkeypatch.setattr(convert_sft, "WORLD", 2)
    monkeypatch.setattr(convert_sft.dist, "all_reduce", lambda total: total.mul_(2))
    assert all_sum(values, CPU) == {"b": 2, "a": 4, "n": 2**41 + 2, "no": 0}


# ------------------------------------------------------------------------------------------- data

USER, SAID = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}
LAYOUTS = {
    "MATH": {"problem": "1+1?", "answer": "2", "solution": "It is 2."},
    "numbers": {"problem": "1+1?", "answer": 2, "solution": "It is 2.", "source": "x"},
    "GSM8K": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
    "OpenR1": {"problem": "1+1?", "answer": "2", "solution": "short", "messages": [USER, SAID],
               "generations": ["It is 3.", "It is 2."], "correctness_math_verify": [False, True]},
    "OpenR1 unverified": {"problem": "1+1?", "answer": "2", "generations": ["It is 2.", "3."],
                          "correctness_math_verify": [False, False]},
    "chat": {"messages": [{"role": "system", "content": "x"}, USER, SAID], "answer": "2"},
    "DAPO": {"prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(LAYOUTS[layout]) + "\n\n")
    [row] = load_problems(str(tmp_path / "x.jsonl"))
    assert (row["problem"], row["answer"]) == ("1+1?", "2")
    if layout in ("DAPO", "OpenR1 unverified"):
        assert row["solution"] == ""
    else:
        assert row["solution"].startswith("It is 2.")
        assert solution_text(row) == "It is 2.\nThe final answer is $\\boxed{2}$."


def test_solution_text_is_clean():
    row = {"answer": "9", "solution": "16-7=<<16-7=9>>9 eggs.\n#### 9"}
    assert solution_text(row) == "16-7=9 eggs.\nThe final answer is $\\boxed{9}$."
    assert solution_text({"answer": "9", "solution": "so \\boxed{9}."}) == "so \\boxed{9}."


GOOD = '{"problem": "p", "answer": "a"}\n'
BAD_DATA = {
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "cut": (GOOD + '{"problem": "p", "ans', "line 2"),
    "no JSON": (GOOD + GOOD + "\nhello\n", "line 4"),
    "no object": (GOOD + "[1]\n", "line 2"),
    "no answer": ('{"problem": "p"}\n', 'line 1.*no "answer"'),
    "no problem": ('{"answer": "p"}\n', 'line 1.*no "problem"'),
    "a number": ('{"problem": 3, "answer": "p"}\n', "line 1"),
    "nobody asks": ('{"prompt": [{"role": "system", "content": "x"}], "answer": "1"}', "line 1"),
    "binary": ("\xff\xfe\x00\x01", "line 1"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_sentence(tmp_path, case):
    content, message = BAD_DATA[case]
    (tmp_path / "x.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=f"x.jsonl.*{message}") as error:
        load_problems(str(tmp_path / "x.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "no/such/file", "name", ".", "a/b.jsonl"])
def test_no_such_data(source):
    with pytest.raises(UsageError, match="no such file"):
        load_problems(source)


def test_split_is_stable():
    """Known sides: a changed hash would let yesterday's held-out problems into today's training."""
    twenty, five = ([i for i in range(4000) if on_test_side(f"problem {i}", p)] for p in (20, 5))
    assert twenty[:8] == [0, 2, 5, 11, 13, 22, 23, 24] and set(five) < set(twenty)
    assert 0.17 < len(twenty) / 4000 < 0.23 and 0.03 < len(five) / 4000 < 0.07


# -------------------------------------------------------------------------------------- tiny task


def test_tiny_solutions_are_right():
    """Each is recomputed from its problem, and each restatement is what remains."""
    tokenizer = Tokenizer(convert_sft.untrained(TINY).tokenizer_files)
    for p in (0, 0.5, 1):
        for row in TINY.problems(100, 0, restate=lambda rng, p=p: p):
            letters, values = row["problem"][:-1:2], [int(v) for v in row["problem"][1:-1:2]]
            n, total = len(values), 0
            assert 4 <= n <= 8 and letters == "abcdefgh"[:n] and max(values) <= 4
            *steps, box = re.sub(r"\[\w+\]", "", row["solution"]).split(";")
            for letter, value, step in zip(letters, values, steps, strict=True):
                assert step == f"{letter}{value}+{total}={(total + value) % 10}"
                total = (total + value) % 10
            assert (box, row["answer"]) == (f"\\boxed{{{total}}}", str(total))
            restated = re.findall(r"\[(\w+)\](\w)", row["solution"])
            assert all(rest == row["problem"][row["problem"].index(at):-1] for rest, at in restated)
            assert p == 0.5 or len(restated) == p * (n - 2)
            ids = tokenizer.encode(row["solution"])  # a token a character, but \\boxed{ is one
            assert tokenizer.decode(ids) == row["solution"]
            assert len(ids) == 7 * n + 3 + sum(len(rest) + 2 for rest, _ in restated)


def test_tiny_sides_are_disjoint():
    train = {row["problem"] for row in TINY.problems(4000, 0)}
    test = {row["problem"] for row in TINY.problems(300, 1, test=True)}
    assert len(test) == 300 and not train & test
    assert TINY.problems(9, [0, 7, 1]) == TINY.problems(9, [0, 7, 1]) != TINY.problems(9, [0, 7, 2])


class Reader:
    """A model that knows the next token, or always says "0"."""

    def __init__(self, knows):
        self.config, self.device, self.knows = replace(TINY.config), CPU, knows

    def __call__(self, tokens):
        assert self.config.window == 24  # the prompt is out of sight
        said = tokens.roll(-1, 1) if self.knows else torch.full_like(tokens, 3)
        return torch.nn.functional.one_hot(said, TINY.config.vocab_size)


def test_gate_counts_what_is_read():
    tokenizer = Tokenizer(convert_sft.untrained(TINY).tokenizer_files)
    reader = Reader(knows=True)
    assert TINY.gate(reader, tokenizer, 0) == 1 and reader.config.window is None
    assert tokenizer.encode("0") == [3]
    assert 0.12 < TINY.gate(Reader(knows=False), tokenizer, 0) < 0.25


# ------------------------------------------------------------------------------------ checkpoints


def started(folder, **identity):
    """A run in this folder that has begun, or continues."""
    run = Run(SFTSettings.of(model="tiny", save_minutes=0), folder, identity or {"lr": 1})
    run.start(trainer_of())
    return run


def test_checkpoints_are_kept_and_the_damaged_one_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_sft.time, "sleep", lambda seconds: None)
    run = started(tmp_path)
    with pytest.raises(UsageError, match="in use by another run"):
        started(tmp_path)
    model = run.trainer.model
    model.config.window = 7
    for step in run.steps(3):
        model.model.norm.weight.data.fill_(step + 1)
        run.log({"reward": step + 1})
    run.lock.close()
    newest = tmp_path / "step-000003"
    assert sorted(tmp_path.glob("step*")) == [tmp_path / "step-000002", newest]

    def resumed():
        again = started(tmp_path)
        again.lock.close()
        window = Transformer.from_pretrained(tmp_path / f"step-{again.step:06d}").config.window
        return again.step, again.trainer.model.model.norm.weight[0].item(), window

    assert resumed() == (3, 3, 7)
    assert TINY.config.window is None  # a run's configuration is its own
    for name in ("model.safetensors", "trainer.pt"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:len(whole) // 2])
        assert resumed() == (2, 2, 7)
        assert re.search("step-000003 is damaged", capsys.readouterr().err)
        (newest / name).write_bytes(whole)
    with pytest.raises(UsageError, match=r"other settings \(lr\)"):
        started(tmp_path, lr=2)


def test_a_gradient_that_is_not_finite_is_skipped(capsys):
    trainer = trainer_of()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    def update(factor):
        return trainer.update(grpo_rows(), lambda logp, m: logp.sum() * factor, lr=1e-3)

    assert [update(float(x)) for x in ("nan", "inf", "-inf", "nan")] == [None] * 4
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert update(1.0) > 0  # a finite one starts the count anew
    assert [update(float("nan")) for _ in range(4)] == [None] * 4
    assert capsys.readouterr().out.count("not finite") == 8
    with pytest.raises(UsageError, match="five steps in a row"):
        update(float("nan"))
    assert all(v.isfinite().all() for v in trainer.model.state_dict().values())


# ------------------------------------------------------------------------------------------- runs

SFT = ("--window 24 --steps 4 --batch 5 --eval-every 2 --save-minutes 0 "
       "--micro-tokens 200 --eval-examples 9")
RL = ("--window 24 --steps {} --sft-steps 2 --prompts 3 --group 4 --max-new-tokens 40 --validate 3 "
      "--micro-tokens 200 --save-minutes 0")


def odd(texts, golds, grader):
    """A reward on which an untrained model's answers disagree."""
    return ["correct" if len(text) % 2 else "wrong" for text in texts]


def settled(stage, out, text):
    script, kind = {"sft": (convert_sft, SFTSettings), "rl": (rl, RLSettings)}[stage]
    return kind.of(**vars(script.parser().parse_args(flags(out, text))))


def run(stage, out, text):
    """One arm of the tiny task in this process, whereas rl.py runs both -> the stage's folder."""
    settings = settled(stage, out, text)
    (convert_sft.convert if stage == "sft" else rl.run_arm)(settings)
    return settings.folder()


def worker(*arguments, launcher=()):
    """The command that runs `run` in a process of its own: this file."""
    return [sys.executable, *launcher, __file__, *map(str, arguments)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rl.__file__).parent)}


@pytest.fixture(scope="module", autouse=True)
def reward():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "grade_batch", odd)
        yield


def untrained(out):
    """out, with an untrained model in the place of a pretrained tiny base."""
    base = Run(SFTSettings.of(model="tiny"), out / "tiny" / "base-wfull",
               {"stage": "base", "seed": 0})
    base.start(Trainer(convert_sft.untrained(TINY), CPU))
    for _ in base.steps(1):
        base.log({})
    base.finish()
    return out


def flags(out, text):
    return f"--model tiny --device cpu --out {out} {text}".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An out folder with both stages done: 4 RL steps."""
    out = untrained(tmp_path_factory.mktemp("finished"))
    run("rl", out, RL.format(4))
    return out


@pytest.fixture
def after_sft(finished, tmp_path):
    """A copy of that folder without the RL run."""
    return Path(shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("rl-*")))


def logged(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [r for r in records if "step" in r]


def difference(a, b):
    a, b = read_weights(a), read_weights(b)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


class Stopped(Exception):
    pass


@pytest.fixture
def stop_at_2(monkeypatch):
    """Runs stop after their second step's checkpoint; a call of this lets them go on."""
    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise Stopped

    save = Run.save
    monkeypatch.setattr(Run, "save", save_and_stop)
    return lambda: monkeypatch.setattr(Run, "save", save)


def same_run(a, b, asked):
    """Bitwise the same weights, and the same log but for the clock."""
    assert difference(a, b) == 0
    assert [r["step"] for r in logged(a)] == [r["step"] for r in logged(b)] == [1, 2, 3, 4]
    for r, s in zip(logged(a), logged(b), strict=True):
        assert r.keys() == s.keys() and r.keys() >= set(asked.split())
        assert all(re.search("elapsed|seconds|tok_per_s", k) for k in r if r[k] != s[k])


def test_a_resumed_sft_repeats_an_undisturbed_one(tmp_path, stop_at_2):
    with pytest.raises(Stopped):
        run("sft", untrained(tmp_path / "stopped"), SFT)
    unfinished = tmp_path / "stopped" / "tiny" / "sft-w24"
    assert not (unfinished / "config.json").exists()  # or rl.py would take it for stage 1's model
    stop_at_2()
    resumed = run("sft", tmp_path / "stopped", SFT)
    whole = run("sft", untrained(tmp_path / "whole"), SFT)
    same_run(whole, resumed, "step loss grad_norm lr window tok_per_s seconds")
    assert difference(whole, whole.parent / "base-wfull") > 1e-5
    with pytest.raises(UsageError, match="other settings.*lr"):
        run("sft", tmp_path / "whole", f"{SFT} --lr 0.5")


def test_the_gate_judges_a_resumed_base_where_it_would_have(tmp_path, stop_at_2, monkeypatch):
    """Rounds of a step each: a base that comes back in the second one is past the first gate."""
    judged, how = [], TINY.pretraining | {"steps": 1, "rounds": 3, "batch": 2}
    monkeypatch.setattr(TINY, "pretraining", how)
    monkeypatch.setattr(TINY, "gate", lambda *_: judged.append(0.0) or 0.0)

    def base(name):
        return convert_sft.pretrain(SFTSettings.of(model="tiny", out=str(tmp_path / name),
                                                   device="cpu", save_minutes=0))

    with pytest.raises(Stopped):
        base("stopped")
    stop_at_2()
    resumed = base("stopped")
    assert len(judged) == 3
    assert difference(resumed, base("whole")) == 0 and len(judged) == 6


def test_ctrl_c_in_rl_and_the_same_command_again(finished, after_sft, monkeypatch):
    """The first Ctrl-C finishes the step and saves."""
    def interrupt(texts, golds, grader):
        if (after_sft / "tiny" / "rl-w24" / "step-000001").exists():
            signal.raise_signal(signal.SIGINT)
        return odd(texts, golds, grader)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "grade_batch", interrupt)
        run("rl", after_sft, RL.format(4))
    assert [r["step"] for r in logged(after_sft / "tiny" / "rl-w24")] == [1, 2]
    whole, resumed = finished / "tiny" / "rl-w24", run("rl", after_sft, RL.format(4))
    same_run(whole, resumed, "step reward length truncated entropy grad_norm lr informative "
                             "logp_gap tok_per_s seconds")
    assert max(r["logp_gap"] for r in logged(whole)) < 1e-5
    assert difference(whole, whole.parent / "sft-w24") > 1e-5
    with pytest.raises(UsageError, match="other settings.*group"):
        run("rl", after_sft, RL.format(4).replace("--group 4", "--group 2"))


def test_kill_and_the_same_command_again(finished, after_sft):
    command = worker("rl", after_sft, RL.format(4))
    killed = after_sft / "tiny" / "rl-w24"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not (killed / "step-000001").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "config.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    same_run(finished / "tiny" / "rl-w24", killed, "")


def on_disk(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_longer_run_continues_a_finished_one(finished, after_sft, monkeypatch, capsys):
    """2 steps and then 4 are 4, also when the longer run breaks off before its first checkpoint."""
    def fail(*_):
        raise Stopped

    folder = run("rl", after_sft, RL.format(2))
    done = Run(settled("rl", after_sft, RL.format(2)))
    made = on_disk(after_sft)
    assert done.finished(2) and not done.finished(3)
    capsys.readouterr()
    convert_sft.say_finished.cache_clear()
    assert done.finished(1) and capsys.readouterr().out == f"{folder}: finished before, 2 steps\n"
    assert on_disk(after_sft) == made
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rl, "grade_batch", fail)
        run("rl", after_sft, RL.format(4))
    made = on_disk(after_sft)
    assert not (folder / "config.json").exists() and (folder / "step-000002").exists()
    assert not done.finished(2)
    assert not Run(settled("rl", after_sft / "nowhere", RL.format(2))).finished(0)
    assert on_disk(after_sft) == made
    run("rl", after_sft, RL.format(2))  # nothing is left to do but to put the model back
    assert done.finished(2) and difference(folder, folder / "step-000002") == 0
    same_run(finished / "tiny" / "rl-w24", run("rl", after_sft, RL.format(4)), "")


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("told", [{}, {"step": None, "seconds": 1, "identity": {}},
                                  {"step": 2, "seconds": 1, "identity": 3}])
def test_a_run_that_says_nothing_of_itself_is_one_sentence(finished, tmp_path, stage, told):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "tiny" / f"{stage}-w24" / "run.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="not what a run writes.*: remove it"):
        run("rl", out, RL.format(4))


def test_stage_2_says_how_long_stage_1_was(finished, capsys):
    capsys.readouterr()
    convert_sft.say_finished.cache_clear()
    run("rl", finished, RL.format(4))
    steps = logged(finished / "tiny" / "sft-w24")[-1]["step"]
    assert f"sft-w24: finished before, {steps} steps\n" in capsys.readouterr().out


@pytest.mark.parametrize("save_minutes", [0, 10])
def test_a_run_that_its_time_ended_is_finished(tmp_path, monkeypatch, save_minutes):
    """Also where its last step was saved before the time was up, or not at all."""
    clock, hours = itertools.count(), 5.5 / 3600
    monkeypatch.setattr(Run, "elapsed", lambda self: next(clock))  # a second at each look
    settings = SFTSettings.of(model="tiny", save_minutes=save_minutes)
    run = Run(settings, tmp_path, {"lr": 1})
    run.start(trainer_of())
    for _ in run.steps(10, hours):
        run.log({})
    run.finish()
    again = Run(settings, tmp_path, {"lr": 1})
    assert run.step in (2, 3) and again.finished(10, hours)
    assert not again.finished(10) and not again.finished(10, 2 * hours)


def test_the_time_left_is_at_most_that_of_hours(tmp_path, capsys):
    run = Run(SFTSettings.of(model="tiny"), tmp_path, {"lr": 1})
    run.start(trainer_of())
    for _ in itertools.islice(run.steps(10**9, 0.01), 2):
        time.sleep(0.01)
        run.log({}, "a step")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert all(re.fullmatch(r"a step \| 3[0-6] s left", line) for line in lines)


def test_groups_that_agree_do_not_train(after_sft, monkeypatch):
    monkeypatch.setattr(rl, "grade_batch", lambda texts, *_: ["wrong"] * len(texts))
    folder = run("rl", after_sft, RL.format(1))
    assert difference(folder, folder.parent / "sft-w24") == 0
    [record] = logged(folder)
    assert record["informative"] == 0
    uniform = float(np.log(TINY.config.vocab_size))  # an untrained policy nearly is
    close(record["entropy"], uniform, 0.1)


def test_a_full_disk_leaves_the_last_checkpoint_whole(after_sft, monkeypatch):
    def full_disk(path, write):
        if "step.tmp" in str(path) and (after_sft / "tiny" / "rl-w24" / "step-000001").exists():
            def write(path):
                raise OSError(28, "No space left on device")

        write_file(path, write)

    write_file = convert_sft.write_file
    monkeypatch.setattr(convert_sft, "write_file", full_disk)
    with pytest.raises(UsageError, match="No space left on device.*free some space"):
        run("rl", after_sft, RL.format(4))
    monkeypatch.setattr(convert_sft, "write_file", write_file)
    for number, handler in convert_sft.DEFAULT_HANDLERS.items():
        signal.signal(number, handler)
    gc.collect()  # the failed run with its lock, which a process that ends lets go of
    assert [r["step"] for r in logged(run("rl", after_sft, RL.format(3)))] == [1, 2, 3]


@pytest.mark.parametrize("more", ["", "--full-layers 1", "--full-layers 1 --nope-full",
                                  "--window-from 60", "--window full", "--sinks 4",
                                  "--window-from 60 --sinks 4 --full-layers 1",
                                  "--window full --full-layers 1 --nope-full --sinks 4"])
def test_a_folder_is_the_model_that_was_trained(tmp_path, more, stop_at_2):
    """The loss that was logged last is that of the saved model, also after a resume."""
    text = f"{SFT} --lr 0.01 {more}"
    with pytest.raises(Stopped):
        run("sft", untrained(tmp_path), text)
    stop_at_2()
    folder = run("sft", tmp_path, text)
    model = Transformer.from_pretrained(folder)
    assert model.config.window == (None if "--window full" in more else 24)
    assert model.config.full_layers == ((1,) if "layers" in more and model.config.window else ())
    assert model.config.nope_full == ("nope" in more)
    assert model.config.sinks == (4 if "sinks" in more and model.config.window else 0)
    settings = settled("sft", tmp_path, text)
    _, held = settings.task.sft(settings)
    held = convert_sft.sft_rows(settings, Tokenizer(model.tokenizer_files), held)
    [micro] = pack(held, 10**6)
    logp = model(micro["tokens"], micro["cu_seqlens"], micro["targets"])
    close(-logp.sum() / (micro["targets"] >= 0).sum(), logged(folder)[-1]["held_out"])


def two_ranks(*arguments):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    return subprocess.run(worker(*arguments, launcher=launcher), timeout=300, env=ENVIRONMENT,
                          capture_output=True, text=True)


def test_two_ranks_are_one(tmp_path):
    """The same global batch on two gloo ranks, with unequal shares; then on one rank again."""
    one, two = untrained(tmp_path / "one"), untrained(tmp_path / "two")
    run("rl", one, RL.format(1))
    done = two_ranks("rl", two, RL.format(1))
    assert done.returncode == 0, done.stderr[-3000:]
    same = "loss held_out gap_to_teacher grad_norm lr reward length entropy informative".split()
    for stage in ("tiny/sft-w24", "tiny/rl-w24"):
        assert difference(one / stage, two / stage) < 2e-6
        for r, s in zip(logged(one / stage), logged(two / stage), strict=True):
            assert r.keys() == s.keys()
            close([r[k] for k in same if k in r], [s[k] for k in same if k in r], 1e-5)
    assert r["informative"] > 0
    assert difference(run("rl", one, RL.format(2)), run("rl", two, RL.format(2))) < 1e-5
    assert [r["step"] for r in logged(two / stage)] == [1, 2]


@pytest.mark.parametrize("stage, text", [("sft", SFT), ("rl", RL.format(4))])
def test_ranks_stop_together(after_sft, stage, text):
    """SIGTERM reaches rank 1 alone, in the first step: both save that step and leave."""
    folder = after_sft / "tiny" / f"{stage}-w24"
    if stage == "sft":
        shutil.rmtree(folder)
    done = two_ranks(stage, after_sft, text, "interrupt rank 1")
    assert done.stdout.count("left the loop") == 2, done.stderr[-3000:]
    assert [r["step"] for r in logged(folder)] == [1]
    assert (folder / "step-000001" / "config.json").exists()
    assert not (folder / "config.json").exists()


def test_ranks_wait_for_rank_0(monkeypatch):
    """It validates alone, which takes longer than the half hour after which gloo gives up."""
    given = {}
    monkeypatch.setattr(convert_sft, "WORLD", 2)
    monkeypatch.setattr(convert_sft.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(convert_sft.dist, "init_process_group", lambda *a, **kw: given.update(kw))
    convert_sft.pick_device("cpu")
    assert given["timeout"].total_seconds() >= 6 * 3600


@pytest.mark.parametrize("error", [None, UsageError("a file is missing")])
def test_a_process_group_ends_with_a_good_run_alone(error):
    """A rank that fails must not wait for the others; one that is done must not abort."""
    def main():
        convert_sft.pick_device("cpu", group=True)
        if error:
            raise error

    try:
        with pytest.raises(SystemExit) if error else nullcontext():
            cli(main)
        assert convert_sft.dist.is_initialized() == bool(error)
    finally:
        if convert_sft.dist.is_initialized():
            convert_sft.dist.destroy_process_group()


def interrupted(self, *arguments, **options):
    """Trainer.update in a process that gets a SIGTERM meanwhile."""
    signal.raise_signal(signal.SIGTERM)
    return update(self, *arguments, **options)


if __name__ == "__main__":
    update = Trainer.update
    interrupts = len(sys.argv) > 4
    if interrupts and convert_sft.RANK == 1:
        Trainer.update = interrupted
    rl.grade_batch = odd
    try:
        cli(lambda: run(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
    except BaseException:
        if not interrupts:
            raise
        convert_sft.dist.barrier()  # a rank that went on alone would not be here
        print("left the loop", flush=True)
