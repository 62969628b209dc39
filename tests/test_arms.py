"""The second tiny task, the control arms and the windows of sampling, update and evaluation."""

# ruff: noqa: F811  (fixtures of another file)

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import (  # noqa: F401
    CPU,
    RL,
    after_sft,
    finished,
    handlers,
    logged,
    settled,
    started,
)

import convert_sft
import eval as evaluation
import rl
from convert_sft import TASKS, SFTSettings, sft_rows, untrained
from model import Tokenizer, Transformer, generate
from rl import RLSettings, advantages_of, bootstrap_ci, token_advantages, under

ROLL_CALL = TASKS["roll-call"]

# ------------------------------------------------------------------------------------- roll call


@pytest.mark.parametrize("response, verdict", [
    ("dcba", "correct"), ("badc", "correct"), ("abc", "wrong"), ("abcc", "wrong"),
    ("abcde", "wrong"), ("abcdd", "wrong"), ("", "wrong"), ("4dcba", "wrong"), ("ABCD", "wrong")])
def test_each_letter_once(response, verdict):
    assert ROLL_CALL.grade(response, "abcd") == verdict


def test_roll_call_by_hand():
    assert ROLL_CALL.order("abcd") == pytest.approx(1)
    assert ROLL_CALL.order("dcba") == pytest.approx(-1)
    assert ROLL_CALL.order("bdac") == pytest.approx(0)  # 1 3 0 2 over 0 1 2 3
    assert ROLL_CALL.order("") == ROLL_CALL.order("aa") == 0
    assert ROLL_CALL.size("12") == 12
    held_out = ROLL_CALL.validation(30, 0)
    assert [p["problem"] for p in held_out] == 2 * [str(n) for n in range(16, 1, -1)]
    assert held_out[1]["answer"] == "abcdefghijklmno"


def test_roll_calls_solutions_prefer_no_order():
    """Every permutation of 3 letters comes equally often, and a solution is all that is trained."""
    train, held_out = ROLL_CALL.sft(SFTSettings.of(model="tiny", data="roll-call"))
    orders = [p["solution"] for p in train if p["problem"] == "3"]
    counts = [orders.count(o) for o in ("abc", "acb", "bac", "bca", "cab", "cba")]
    assert sum(counts) == len(orders) > 1000 and max(abs(c * 6 / sum(counts) - 1)
                                                     for c in counts) < 0.2
    assert all(ROLL_CALL.grade(p["solution"], p["answer"]) == "correct"
               for p in train + held_out)
    assert {p["problem"] for p in train} == {str(n) for n in range(2, 17)}
    assert {p["solution"] for p in held_out} != {p["solution"] for p in train[:len(held_out)]}


def test_roll_call_is_trained_on_letters_alone(tmp_path):
    settings = SFTSettings.of(model="tiny", data="roll-call", out=str(tmp_path))
    untrained(ROLL_CALL).save_pretrained(tmp_path / "m")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "m")
    [row] = sft_rows(settings, tokenizer, [{"problem": "12", "answer": "", "solution": "bca"}])
    names = [tokenizer.decode([t], skip_special=False) for t in row["tokens"]]
    assert names == ["<bos>", "12", "b", "c", "a"]
    asked = [tokenizer.decode([t], skip_special=False) for t in row["targets"] if t >= 0]
    assert asked == ["b", "c", "a", "<eos>"] and row["targets"][0] == -1


def test_the_gate_is_the_chance_of_a_right_answer():
    """Of a model that says every token with the same chance."""
    model = untrained(ROLL_CALL)
    model.lm_head.weight.data.zero_()
    tokenizer = Tokenizer(model.tokenizer_files)
    some, V = ROLL_CALL.problems(40, [3, 3]), ROLL_CALL.config.vocab_size
    chance = [math.factorial(int(p["problem"])) / V ** (int(p["problem"]) + 1) for p in some]
    assert ROLL_CALL.gate(model, tokenizer, 3, n=40) == pytest.approx(np.mean(chance), rel=1e-4)


def test_a_task_names_its_model(tmp_path):
    settings = RLSettings.of(model="tiny", data="roll-call", out=str(tmp_path))
    assert settings.folder() == tmp_path / "roll-call" / "rl-w4"
    assert settings.folder("sft") == tmp_path / "roll-call" / "sft-w4"
    first = settings.stage1
    assert settings.task is settings.tiny is first.tiny is first.task is ROLL_CALL
    assert (settings.group, settings.stage1.steps, settings.prompts) == (16, 600, 16)


def test_a_base_that_never_saw_a_restatement():
    assert not any("[" in text for text in TASKS["tiny-unrestated"].documents(0)[:2000])
    assert any("[" in text for text in TASKS["tiny"].documents(0)[:10])
    for p in (0, 0.1, 1):
        rows = TASKS["tiny"].restating(p, 0)
        steps = sum(max(0, len(row["problem"]) // 2 - 2) for row in rows)
        assert sum(row["solution"].count("[") for row in rows) / steps == pytest.approx(p, abs=0.01)


# -------------------------------------------------------------------------------------- the arms


def test_what_an_answer_is_worth():
    """Right, wrong, and right but for the penalty on length; then all right, all wrong."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0.5, 0, -0.5]])

    def by(choice):
        return advantages_of(rewards, RLSettings.of(model="tiny", advantage=choice)).tolist()

    assert by("grpo") == [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0] * 4, [0.75, 0.25, -0.25, -0.75]]
    assert by("filtered") == [[1, 0, 0, 0], [1] * 4, [0] * 4, [1, 1, 0, 0]]
    assert by("distill") == [[1] * 4] * 4


def test_a_teachers_advantage_by_hand():
    student = torch.tensor([[-1.0, -2.0, -0.1, -9.0]])
    micro = {"advantage": torch.tensor([[0.0, 1, 1, 1]]),
             "teacher": torch.tensor([[-5.0, -1.5, -8.0, -0.5]])}
    expected = torch.tensor([[0.0, 0.5, -5.0, 5.0]])
    torch.testing.assert_close(token_advantages(micro, student), expected)
    del micro["teacher"]
    assert token_advantages(micro, student) is micro["advantage"]


def gradient(trainer, rows, settings, n_tokens, teacher=None):
    """Of one update; the trainer's optimizer takes no step."""
    grads = {}

    def remember(*a, **k):
        grads.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer.step = remember
    rl.update_policy(trainer, rows, n_tokens, 0.1, settings, {"logp_gap": 0.0, "tokens": 0.0},
                     teacher)
    return grads


def rows_of(model, settings, rewards):
    """The model's own answers to two prompts, as rows."""
    tokenizer = Tokenizer(model.tokenizer_files)
    problems = ROLL_CALL.problems(len(rewards), [1])
    groups = rl.roll_out(model, tokenizer, problems, len(rewards[0]), 3, 1.0, settings)
    rewards = torch.tensor(rewards)
    return groups, rl.training_rows(groups, advantages_of(rewards, settings))


def test_distillation_stands_still_where_teacher_and_student_agree():
    settings = RLSettings.of(model="roll-call", advantage="distill", group=2)
    model, other = untrained(ROLL_CALL, 0), untrained(ROLL_CALL, 1)
    groups, rows = rows_of(model, settings, [[0.0, 1.0], [0.0, 0.0]])
    assert len(rows) == 4  # a teacher looks at every answer, right or wrong
    n = sum(len(e.tokens) for group in groups for e in group)
    trainer = convert_sft.Trainer(model, CPU, grad_clip=math.inf)
    still = gradient(trainer, rows, settings, n, model)
    assert max(g.abs().max().item() for g in still.values()) < 1e-6
    moved = gradient(trainer, rows, settings, n, other)
    assert max(g.abs().max().item() for g in moved.values()) > 1e-4


def test_filtered_is_the_likelihood_of_right_answers():
    """The same gradient as SFT's on them, whatever the wrong ones are."""
    settings = RLSettings.of(model="roll-call", advantage="filtered", group=2)
    model = untrained(ROLL_CALL, 0)
    groups, rows = rows_of(model, settings, [[0.0, 1.0], [1.0, 0.0]])
    right = [groups[0][1], groups[1][0]]
    assert len(rows) == 2
    n = sum(len(e.tokens) for e in right)
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert rl.count_up(groups, rewards, advantages_of(rewards, settings))["useful_tokens"] == n
    trainer = convert_sft.Trainer(model, CPU, grad_clip=math.inf)
    ours = gradient(trainer, rows, settings, n)
    model.zero_grad()
    for e in right:
        ids = torch.tensor([e.prompt + e.tokens])
        logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        (-logp[len(e.prompt) - 1:].sum() / n).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("choice", ["filtered", "distill"])
def test_an_arm_runs_beside_rl(after_sft, choice):
    """From the same SWA-SFT, into a folder of its name."""
    settings = settled("rl", after_sft, RL.format(2)).but(advantage=choice, sft_steps=2)
    rl.run_arm(settings)
    folder = after_sft / "tiny" / f"{choice}-w24"
    assert [r["step"] for r in logged(folder)] == [1, 2]
    told = json.loads((folder / "run.json").read_text())["identity"]
    assert told["advantage"] == choice and ("teacher" in told) == (choice == "distill")
    assert Transformer.from_pretrained(folder).config.window == 24


def test_anothers_answers(after_sft, monkeypatch):
    """--rollouts-by: the rollouts come from that model, and carry no importance weight."""
    start = after_sft / "tiny" / "sft-w24"
    model = Transformer.from_pretrained(start)
    model.lm_head.weight.data.zero_()
    Path(after_sft / "other").mkdir()
    model.save_pretrained(after_sft / "other")
    weights, plain = [], rl.grpo_loss

    def spy(*a, **k):
        weights.append(k["rollout_logprobs"])
        return plain(*a, **k)

    monkeypatch.setattr(rl, "grpo_loss", spy)
    monkeypatch.setattr(rl, "grade_batch", lambda texts, *_: ["correct"] * len(texts))
    ended = rl.generate
    monkeypatch.setattr(rl, "generate", lambda *a, **kw: [
        rl.Rollout(r.prompt, r.tokens, r.logprobs, True) for r in ended(*a, **kw)])
    settings = settled("rl", after_sft, RL.format(1)).but(
        advantage="filtered", rollouts_by=str(after_sft / "other"))
    [record] = logged(rl.train_rl(settings, start))
    assert record["entropy"] == pytest.approx(math.log(TASKS["tiny"].config.vocab_size), abs=1e-3)
    assert weights and all(w is None for w in weights)


# ------------------------------------------------------------------------------------ the windows


def test_another_window_for_a_while():
    """Under it the model generates as one that has it does; afterwards, however that ended, it has
    its own again: a checkpoint would declare another."""
    model, narrow = untrained(ROLL_CALL), untrained(ROLL_CALL)
    narrow.config.window = 2
    prompts = [[1, 20, 3, 4, 5, 6, 7, 8]]
    with under(2, model):
        ours = generate(model, prompts, 8, seed=0)
        with under("own", model):
            assert model.config.window == 2
    assert model.config.window is None
    with pytest.raises(InterruptedError), under(2, model):
        raise InterruptedError
    assert model.config.window is None
    assert ours[0].logprobs == generate(narrow, prompts, 8, seed=0)[0].logprobs
    assert ours[0].logprobs != generate(model, prompts, 8, seed=0)[0].logprobs


def test_sampling_under_another_window_updates_under_the_runs_own(after_sft, monkeypatch):
    seen = []
    plain_generate, plain_update = rl.generate, convert_sft.Trainer.update

    def sampled(model, *a, **k):
        seen.append(("sample", model.config.window))
        return plain_generate(model, *a, **k)

    def updated(self, *a, **k):
        seen.append(("update", self.model.config.window))
        return plain_update(self, *a, **k)

    monkeypatch.setattr(rl, "generate", sampled)
    monkeypatch.setattr(convert_sft.Trainer, "update", updated)
    monkeypatch.setattr(rl, "grade_batch", lambda texts, *_: ["correct", "wrong"] * 2)
    settings = settled("rl", after_sft, RL.format(1)).but(
        rollout_window=None, prompts=2, group=2, validate=4, validate_every=1)
    rl.train_rl(settings, after_sft / "tiny" / "sft-w24")
    assert seen[0] == ("sample", None) and seen[-1] == ("sample", 24)  # the validation
    assert {w for what, w in seen if what == "update"} <= {24}


def test_a_window_of_the_evaluation_is_applied_and_kept_apart(after_sft, monkeypatch):
    seen, plain = [], rl.generate

    def spy(model, *a, **k):
        seen.append(model.config.window)
        return plain(model, *a, **k)

    monkeypatch.setattr(rl, "generate", spy)
    folder, settings = after_sft / "tiny" / "sft-w24", settled("rl", after_sft, RL.format(1))
    for window in (1, None, 3):
        rl.validate(folder, settings, window)
        rl.validate(folder, settings, window)  # known by now
    assert seen == [1, 1, None, None, 3, 3]
    names = {path.name for path in folder.glob("validation-*")}
    assert names == {f"validation-w{w}.json" for w in (1, "full", 3)}


def test_equal_prompts_are_asked_once_when_greedy(tmp_path):
    settings = RLSettings.of(model="roll-call", validate=30, out=str(tmp_path), device="cpu")
    untrained(ROLL_CALL).save_pretrained(tmp_path / "m")
    found = rl.validate(tmp_path / "m", settings)
    assert [len(found[s]["scores"]) for s in ("greedy", "T=1")] == [15, 30]
    assert found["T=1"]["example"][0] == "16"
    uniform = found["T=1"]["entropy"] / found["T=1"]["length"]
    assert 2.5 < uniform < math.log(ROLL_CALL.config.vocab_size)  # nats a token, hardly trained


# ------------------------------------------------------------------------------------- statistics


def test_where_all_are_right_the_interval_is_an_exact_one():
    """Clopper and Pearson's bound: the rate at which n of n has a chance of 5 %."""
    mean, low, high = bootstrap_ci(np.ones((512, 1)))
    assert (mean, high) == (1, 1) and low ** 512 == pytest.approx(0.05) and low > 0.994
    assert bootstrap_ci(np.zeros((20, 2)))[:2] == (0, 0)
    assert bootstrap_ci(np.zeros((20, 2)))[2] == pytest.approx(1 - 0.05 ** 0.05)
    found = evaluation.over_seeds([np.ones((10, 1)), np.ones((20, 1))])
    assert (found.mean, found.high) == (1, 1) and found.low == pytest.approx(0.05 ** (1 / 30))
    flat = evaluation.over_seeds([np.ones((10, 1))], rate=False)
    assert (flat.low, flat.high) == (1, 1)


def test_log_odds_by_hand():
    """3 of 9 against 7 of 9, half a success and half a failure more: 3.5 : 6.5 and 7.5 : 2.5."""
    before, after = ([np.array([[1.0]] * k + [[0.0]] * (9 - k))] for k in (3, 7))
    found = evaluation.log_odds(before, after)
    assert found.mean == pytest.approx(math.log(7.5 / 2.5) - math.log(3.5 / 6.5))
    assert found.low < found.mean < found.high and found.n == 9
    same = evaluation.log_odds(before, before)
    assert same.mean == same.low == same.high == 0  # the same problems are drawn for both
    saturated = evaluation.log_odds(before, [np.ones((9, 1))])
    assert saturated.mean == pytest.approx(math.log(9.5 / 0.5) - math.log(3.5 / 6.5))
