"""What a long run meets: disks that fill, folders with strangers in them, changed commands, small
GPUs; and that nothing of it changes what is trained."""

# ruff: noqa: F811  (fixtures of another file)

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import (  # noqa: F401
    ENVIRONMENT,
    RL,
    SFT,
    TINY,
    after_sft,
    difference,
    finished,
    grpo_rows,
    handlers,
    logged,
    odd,
    reward,
    run,
    same_run,
    settled,
    started,
    trainer_of,
    two_ranks,
    untrained,
    worker,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import convert_sft
import model as nano
import rl
import swa_kernel
from bench import SHAPES
from convert_sft import (
    Run,
    SFTSettings,
    Trainer,
    memory_plan,
    pack,
    peak_bytes,
    preflight,
    shakedown,
)
from model import Cache, Decoder, Float32Product, Transformer, UsageError, choose_slots, generate
from rl import RLSettings

CPU = torch.device("cpu")


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------ saving

SELDOM = RL.replace("--save-minutes 0", "--save-minutes 60")


def test_saving_seldom_trains_the_same_and_loses_nothing_to_ctrl_c(finished, after_sft,
                                                                    monkeypatch):
    saved, asked = [], []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self: saved.append(self.step) or save(self))

    def interrupt(*arguments):
        asked.append(1)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return odd(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "grade_batch", interrupt)
        run("rl", after_sft, SELDOM.format(4))
    assert len(saved) == 1 and saved[0] in (1, 2)
    folder = run("rl", after_sft, SELDOM.format(4))
    assert saved[1:] == [4]
    same_run(finished / "tiny" / "rl-w24", folder, "")
    assert [p.name for p in convert_sft.checkpoints(folder)] == ["step-000004"]


def test_a_checkpoint_is_written_while_the_run_goes_on(tmp_path, monkeypatch):
    """As on a GPU: the copy is taken at once, a thread writes it; its fault ends the run later."""
    run = started(tmp_path)
    run.trainer.device = SimpleNamespace(type="cuda")
    run.agreed = bool
    monkeypatch.setattr(convert_sft, "host_memory", lambda: 2**40)
    copies, write = [], Run.write_checkpoint
    run.trainer.weights = lambda copied=False: copies.append(copied) or Trainer.weights(run.trainer)

    def slowly(self, weights, state):
        time.sleep(0.3)
        if state["step"] == 3:
            raise UsageError("no space")
        write(self, weights, state)

    monkeypatch.setattr(Run, "write_checkpoint", slowly)
    steps = run.steps(5)
    next(steps), next(steps)
    assert copies == [True] and not (tmp_path / "step-000001").exists()
    next(steps)
    assert (tmp_path / "step-000001").exists()
    with pytest.raises(UsageError, match="no space"):
        next(steps), next(steps), next(steps)
    assert [p.name for p in convert_sft.checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_only_our_own_checkpoints_are_pruned_by_number(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    strangers = ["step-000004-best", "step-x", "step-", "step-\u0663"]
    for name in strangers:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
    (tmp_path / "step-000000").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("not to be truncated")
    run = started(tmp_path)
    run.step = 999_998
    run.first = run.step, time.time()
    for _ in run.steps(1_000_001):
        run.log({})
    run.lock.close()
    left = [p.name for p in convert_sft.checkpoints(tmp_path)]
    assert left == ["step-1000000", "step-1000001"]
    assert all((tmp_path / name / "mine").exists() for name in strangers)
    assert (tmp_path / "step-000000").is_symlink() and (tmp_path / "step-7").is_file()
    assert (tmp_path / "precious").read_text() == "not to be truncated"
    again = started(tmp_path)
    assert again.step == 1_000_001
    again.lock.close()


def test_a_run_reads_its_folder_only_when_it_is_its_own(tmp_path, monkeypatch):
    """Two runs started a moment apart; the second waits for the first, which is about to end."""
    first, order = started(tmp_path), []
    for _ in first.steps(2):
        first.log({})

    def sleep(seconds):
        order.append("waits")
        first.lock.close()

    resume = Run.resume
    monkeypatch.setattr(convert_sft.time, "sleep", sleep)
    monkeypatch.setattr(Run, "resume", lambda self: order.append("reads") or resume(self))
    second = started(tmp_path)
    assert order == ["waits", "reads"] and second.step == 2
    second.lock.close()


DAMAGE = {
    "a list": lambda f: torch.save([1], f / "trainer.pt"),
    "parts missing": lambda f: torch.save({"step": 2}, f / "trainer.pt"),
    "empty": lambda f: (f / "trainer.pt").write_bytes(b""),
    "weights of another model": lambda f: shutil.copy(f / "config.json", f / "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_means_the_one_before(tmp_path, damage, capsys):
    run = started(tmp_path)
    for _ in run.steps(2):
        run.log({})
    run.lock.close()
    DAMAGE[damage](tmp_path / "step-000002")
    again = started(tmp_path)
    assert again.step == 1 and "trying the one before" in capsys.readouterr().err
    again.lock.close()


LOGS = {"missing": None, "binary": b"\xff\xfe\x00", "broken": b'{"step": 1}\n{"st\n[1]\n"x"\n',
        "deep": b"[" * 200_000, "odd step": b'{"step": "one"}\n{"step": 1}\n'}


@pytest.mark.parametrize("kind", LOGS)
def test_a_damaged_log_stops_no_resume(tmp_path, kind):
    run = started(tmp_path)
    for _ in run.steps(2):
        run.log({})
    run.lock.close()
    log = tmp_path / "log.jsonl"
    log.unlink()
    if LOGS[kind] is not None:
        log.write_bytes(LOGS[kind])
    again = started(tmp_path)
    for _ in again.steps(3):
        again.log({})
    assert [r["step"] for r in logged(tmp_path)][-1] == 3
    again.lock.close()


LIMITS = {"model": 300_000, "trainer": 600_000, "log": 700}  # bytes of the largest file


@pytest.mark.parametrize("kind", LIMITS)
def test_a_full_disk_is_one_sentence_and_the_same_command_continues(finished, after_sft, kind):
    """By a limit on the size of files, in the process of a user's run."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[kind], LIMITS[kind]))

    command = worker("rl", after_sft, RL.format(4))
    done = subprocess.run(command, env=ENVIRONMENT, preexec_fn=limit, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and re.search("could not be written.*free some space", said[0])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    same_run(finished / "tiny" / "rl-w24", after_sft / "tiny" / "rl-w24", "")


def test_episodes_are_not_repeated_after_a_kill(finished, after_sft):
    command = worker("rl", after_sft, SELDOM.format(4))
    folder = after_sft / "tiny" / "rl-w24"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not (folder / "episodes.txt").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    text, whole = ((f / "episodes.txt").read_text() for f in (folder,
                                                               finished / "tiny" / "rl-w24"))
    assert text == whole and text.count("--- step 1 |") == 2


# ---------------------------------------------------------------------------------------- identity


def test_another_base_or_other_flags_of_stage_one_are_refused(after_sft, tmp_path):
    """What was not asked for is taken from the folder, what was asked for must be there."""
    run("rl", after_sft, RL.format(1).replace("--sft-steps 2", ""))
    shutil.rmtree(after_sft / "tiny" / "rl-w24")
    for flags, named in (("--sft-steps 3", "steps"), ("--seed 5", "seed"),
                         ("--window-from 60", "window_from"), ("--sft-data x", "data"),
                         ("--full-layers 1", None)):
        if named:
            with pytest.raises(UsageError, match=f"other settings.*{named}"):
                run("rl", after_sft, RL.format(1).replace("--sft-steps 2", "") + " " + flags)
    hybrid = settled("rl", after_sft, RL.format(1) + " --full-layers 1").folder("sft")
    assert not hybrid.exists()  # it has a folder of its own
    base = after_sft / "tiny" / "base-wfull"
    convert_sft.untrained(TINY, seed=1).save_pretrained(base)
    with pytest.raises(UsageError, match=r"made with other settings \(base\)"):
        run("rl", after_sft, RL.format(1))
    with pytest.raises(UsageError, match="other settings.*base"):
        run("sft", after_sft, SFT.replace("--steps 4", "--steps 2"))


def test_rl_belongs_to_its_start(after_sft):
    run("rl", after_sft, RL.format(1))
    sft = after_sft / "tiny" / "sft-w24"
    model = Transformer.from_pretrained(sft)
    model.model.norm.weight.data += 1
    model.save_pretrained(sft)
    with pytest.raises(UsageError, match=r"other settings \(start\)"):
        run("rl", after_sft, RL.format(1))


def test_stage_one_without_its_optimizer_is_not_continued(after_sft):
    """RL drops it, three quarters of the folder's size; more steps of stage 1 are then refused."""
    sft = after_sft / "tiny" / "sft-w24"
    run("rl", after_sft, RL.format(1))
    assert not convert_sft.checkpoints(sft) and (sft / "config.json").exists()
    made_with = json.loads((sft / "run.json").read_text())["identity"]
    settings = settled("rl", after_sft, RL.format(1)).stage1
    longer = Run(settings, identity=made_with)
    assert longer.finished(2) and not longer.finished(3)
    with pytest.raises(UsageError, match="optimizer's state was dropped"):
        longer.start(trainer_of())
    longer.lock.close()
    assert (sft / "config.json").exists()


ODD = {"invented": {"of": {}, "greedy": {"scores": [[1]]}, "T=1": {"scores": [[1]]}},
       "a list": [1], "wrong types": None, "deep": "["}


@pytest.mark.parametrize("kind", ODD)
def test_an_invented_validation_is_measured_again(after_sft, kind):
    settings = settled("rl", after_sft, RL.format(1))
    folder = settings.folder("sft")
    path, before = folder / "validation.json", rl.validate(folder, settings)
    content = ODD[kind]
    if kind == "wrong types":
        content = before | {"T=1": {"scores": "all", "length": 3}}
    path.write_text("[" * 200_000 if kind == "deep" else json.dumps(content))
    os.utime(path, (time.time() + 99,) * 2)
    assert rl.validate(folder, settings) == before
    assert json.loads(path.read_text()) == before


def test_a_validation_belongs_to_its_weights(after_sft):
    settings = settled("rl", after_sft, RL.format(1))
    folder = settings.folder("sft")
    rl.validate(folder, settings)
    model = Transformer.from_pretrained(folder)
    model.lm_head.weight.data *= -1
    model.save_pretrained(folder)
    (folder / "validation.json").touch()
    assert rl.validate(folder, settings)["of"]["weights"] == nano.fingerprint(folder)


# --------------------------------------------------------------------------- before the first step

FLAGS = {"--group 1": "give at least 2", "--temperature 0": "nothing is learned",
         "--min-informative 13": "at most 12", "--sinks 512": "below the model's 512 positions",
         "--full-layers 3": "layers are 0 to 2"}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_make_no_sense_end_at_once(tmp_path, flags):
    with pytest.raises(UsageError, match=FLAGS[flags]):
        settled("rl", tmp_path, f"{RL.format(1)} {flags}")


def test_preflight(tmp_path, monkeypatch, capsys):
    settings = RLSettings.of(model="tiny", out=str(tmp_path / "not" / "yet"))
    preflight(settings, CPU)
    assert re.search(r"40 steps, disk up to 0.0 of \d+ GB, memory up to 0\.[4-9] of [1-9]",
                     capsys.readouterr().out)
    assert not (tmp_path / "not").exists()
    gpu = SimpleNamespace(type="cuda")
    for total, fine in ((80e9, True), (1e6, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None, t=total: (t, t))
        if fine:
            preflight(settings, gpu)
            assert "of 80 GB" in capsys.readouterr().out
        else:
            with pytest.raises(UsageError, match="GPU memory.*--offload"):
                preflight(settings, gpu)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**5))
    with pytest.raises(UsageError, match="free some space"):
        preflight(settings, CPU)


def test_the_shakedown_leaves_the_run_as_it_was(finished, after_sft, monkeypatch, capsys):
    begin, seen = Run.start, []

    def start(self, trainer):
        begin(self, trainer)
        if self.identity["stage"] == "rl":
            shakedown(self, trainer, 300, lambda *told: seen.append(told) or "very long")

    monkeypatch.setattr(Run, "start", start)
    folder = run("rl", after_sft, RL.format(4))
    [(_, pace)] = seen
    assert 0 < pace < 0.01
    assert re.search("shakedown: 300 tokens.*by its times very long\n", capsys.readouterr().out)
    same_run(finished / "tiny" / "rl-w24", folder, "")


def test_filled_slots_are_those_of_a_rollout(monkeypatch):
    """The largest cache that a rollout can ask for, and what the positions leave of it."""
    sizes, init = [], Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda self, config, slots, length, *rest: (
        sizes.append((slots, length)), init(self, config, slots, length, *rest))[1])
    settings = RLSettings.of(model="tiny", prompts=2, group=3, slots=5, max_new_tokens=40)
    rl.fill_slots(convert_sft.untrained(TINY), settings, 3)
    monkeypatch.setattr(RLSettings, "longest", lambda self: self.max_new_tokens + 20)
    rl.fill_slots(convert_sft.untrained(TINY), settings, 3)
    assert sizes == [(5, 512), (5, 60)]


def test_one_piece_of_work_is_timed_without_what_comes_once(monkeypatch):
    clock, compiled = [0.0], []

    def work(n):
        clock[0] += 7 + 0.5 * n + (0 if compiled else 60)
        compiled.append(n)

    monkeypatch.setattr(convert_sft.time, "time", lambda: clock[0])
    assert convert_sft.seconds_each(work, 8, 72) == 0.5


class Rehearsed(str):
    """A CPU that says it is a GPU."""

    type = "cuda"

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_says_the_hours_of_both_stages_before_the_first_step(after_sft, monkeypatch, capsys):
    monkeypatch.setattr(convert_sft, "pick_device", lambda *_, **__: Rehearsed("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a rehearsal")
    monkeypatch.setattr(convert_sft, "seconds_each", lambda work, few, more: work(few) or 0.2)
    monkeypatch.setattr(rl, "seconds_each", lambda work, few, more: work(few) or 36.0)
    shutil.rmtree(after_sft / "tiny" / "sft-w24")
    rows = [{"tokens": [1] * 50, "targets": [-1] * 20 + [2] * 30}]
    monkeypatch.setattr(convert_sft, "sft_rows", lambda *_: rows * len(_[2]))
    run("rl", after_sft, RL.format(2) + " --sft-steps 3")
    said = re.findall("^(?:shakedown.*|(?:sft|rl) w=24 step 1/)", capsys.readouterr().out,
                      re.M)
    first, second = [line for line in said if line.startswith("shakedown")]
    assert said[0] == first and said[-2:] == [second, "rl w=24 step 1/"]
    # 0.2 s are 256 tokens of stage 1, which takes 3 x 32 x 50; 36 s a token of RL, 2 x 40 of them,
    # and 2 x 12 x 1064 to train; in its own shakedown, 0.2 s are 1064 tokens
    assert re.search(r"256 tokens, .*; by its times stage 1 takes about 4 s, RL at most about "
                     r"48:19 min \(were all answers of 40 tokens\)$", first)
    assert re.search("1,064 tokens, .*; by its times RL at most about 48:04 min", second)


# -------------------------------------------------------------------------------- validation, best


def test_validation_on_the_way(after_sft, monkeypatch):
    """The best model is kept beside the last; the clock of --hours stands still meanwhile."""
    right = iter([0, 3, 1, 2] + [0] * 99)
    slept = []

    def judged(texts, golds, grader):
        if len(texts) != 3:  # a rollout, not the three validation problems
            return odd(texts, golds, grader)
        time.sleep(0.4)
        slept.append(1)
        n = next(right)
        return ["correct"] * n + ["wrong"] * (3 - n)

    rl.validate(after_sft / "tiny" / "sft-w24", settled("rl", after_sft, RL.format(4)))
    monkeypatch.setattr(rl, "grade_batch", judged)
    ended = rl.generate
    monkeypatch.setattr(rl, "generate", lambda *a, **kw: [
        replace(r, finished=True) for r in ended(*a, **kw)])
    kept = {}
    best = Run.keep_best

    def keep(self, value):
        best(self, value)
        kept[self.step + 1] = {k: v.clone() for k, v in self.trainer.model.state_dict().items()}

    monkeypatch.setattr(Run, "keep_best", keep)
    folder = run("rl", after_sft, RL.format(4) + " --validate-every 1")
    records = logged(folder)
    assert [r["validation"] for r in records] == [0, 1, 1 / 3, 2 / 3]
    again = Transformer.from_pretrained(folder / "best")
    assert all(torch.equal(v, kept[2][k]) for k, v in again.state_dict().items())
    assert again.config.window == 24
    assert records[-1]["elapsed"] < 0.4 * 4 + sum(r["seconds"] for r in records)


# ------------------------------------------------------------------------------------ large models


def losses(model, rows):
    """Gradients of a sum of log-probabilities over three packings."""
    for part in (rows[:2], rows[2:3], rows[3:]):
        [micro] = pack(part, 10**6)
        model(micro["tokens"], micro["cu_seqlens"], micro["targets"]).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_recomputing_fewer_blocks_changes_no_gradient(recomputed):
    model, plain = (convert_sft.untrained(TINY) for _ in "ab")
    model.recomputed = recomputed
    for a, b in zip(losses(model, grpo_rows()), losses(plain, grpo_rows()), strict=True):
        assert torch.equal(a, b)


def test_compiled_blocks(monkeypatch):
    """Eager gradients, and every block and packing shares what the first one compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kind: compile(
        self, backend=backend, **kind))
    compiled = Trainer(convert_sft.untrained(TINY), CPU, compile=True).model
    compiled.recomputed, plain = 2, convert_sft.untrained(TINY)
    counts = []
    for n in range(20):
        rows = grpo_rows(2 + n % 5)
        for model in (plain, compiled):
            [micro] = pack(rows, 10**6)
            model(micro["tokens"], micro["cu_seqlens"], micro["targets"]).sum().backward()
        counts.append(len(graphs))
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        close(a.grad, b.grad, 1e-5 * a.grad.abs().max().item() + 1e-7)
    assert 0 < counts[0] == counts[-1] <= 8  # parts of a block, at most two versions of each


def test_offload_trains_the_same(finished, after_sft):
    """One rank whose weights and optimizer FSDP2 keeps in host memory."""
    subprocess.run(worker("rl", after_sft, RL.format(4) + " --offload"), check=True, timeout=300,
                   stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    folder = after_sft / "tiny" / "rl-w24"
    assert difference(finished / "tiny" / "rl-w24", folder) < 1e-5
    assert [r["step"] for r in logged(folder)] == [1, 2, 3, 4]


def test_logits_and_the_heads_gradient_are_in_float32():
    """bfloat16 factors, products that are not rounded: against float64 on the rounded factors."""
    torch.manual_seed(0)
    weight = torch.randn(41, 16, requires_grad=True)
    x = (4 * torch.randn(3, 50, 16)).bfloat16().requires_grad_()
    logits = Float32Product.apply(x, weight)
    rounded = weight.detach().bfloat16().double().requires_grad_()
    inputs = x.detach().double().requires_grad_()
    expected = inputs @ rounded.T
    assert logits.dtype == torch.float32 and logits.abs().max() > 16
    close(logits, expected.float(), 1e-4)
    ways = torch.randn(3, 50, 41).bfloat16().float()
    (logits * ways).sum().backward()
    (expected * ways).sum().backward()
    close(weight.grad, rounded.grad.float(), 1e-3)
    assert (x.grad.double() - inputs.grad).abs().max() < 0.01 * inputs.grad.abs().max()


def test_who_has_ended_reads_one_key():
    model = convert_sft.untrained(TINY)
    decoder = Decoder(model, 2, 50, 20, stop_ids=range(33))
    decoder.admit({0: [1] * 9, 1: [1] * 5}, {0: 0, 1: 1})
    decoder.step(2)
    assert not decoder.running.alive.any() and decoder.running.position.tolist() == [0, 0]
    decoder = Decoder(model, 2, 50, 20)
    decoder.admit({0: [1] * 9, 1: [1] * 5}, {0: 0, 1: 1})
    decoder.step(2)
    assert decoder.running.position.tolist() == [9, 5]


@pytest.mark.parametrize("cached", [0, 30e9, 60e9])
def test_slots_do_not_depend_on_what_ran_before(monkeypatch, cached):
    """A modelled GPU of 80 GB, of which PyTorch holds some that it has not handed out."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9 - cached, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20e9 + cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20e9)
    monkeypatch.setattr(Cache, "bytes_per_slot", lambda *_: 10**9)
    model = SimpleNamespace(device=torch.device("cuda"), config=None, dtype=None)
    assert choose_slots(model, 999, 10) == 51


def test_discarded_groups_do_not_dilute_the_gradient(monkeypatch):
    """--min-informative: only the groups that train count; without it, all do (DAPO)."""
    def group(*rewards):
        return [rl.Episode([1], [2] * 10, [-1.0] * 10, True, "", "correct", r) for r in rewards]

    groups = [group(1.0, 0.0), group(1.0, 1.0), group(0.0, 0.0)]
    settings = RLSettings.of(model="tiny", group=2)
    rewards = rl.rewards_of(groups, settings)
    total = rl.count_up(groups, rewards, rl.advantages_of(rewards, settings))
    assert (total["tokens"], total["useful_tokens"], total["informative"]) == (60, 20, 1)


@pytest.mark.parametrize("cap, weight", [(2.0, 2.0), (0.0, 1.0), (5.0, 3.0)])
def test_importance_is_truncated_by_default(cap, weight):
    """A sampler that thought a token three times less likely than the trained policy does."""
    given, seen = RLSettings.of(model="tiny", tis_cap=cap), []
    assert RLSettings.of(model="tiny").tis_cap == RLSettings.of().tis_cap == 2

    class Spy:
        def update(self, rows, loss_fn, lr, temperature):
            logprobs = torch.tensor([[-1.0]], requires_grad=True)
            three = torch.tensor([[3.0]]).log()
            one = torch.ones(1, 1)
            loss_fn(logprobs, {"rollout_logprobs": -1.0 - three, "advantage": one,
                               "mask": one}).backward()
            seen.append(-logprobs.grad.item())

    rl.update_policy(Spy(), [], 1, 0.1, given, {"logp_gap": 0.0, "tokens": 0.0})
    assert seen == [pytest.approx(weight)]


def test_a_rollout_ends_where_all_have_ended():
    """Slots of sequences that ended hold nothing that a later one could see."""
    model = convert_sft.untrained(TINY)
    model.config.window = 8
    prompts = [[1, 5, 9] * n for n in (1, 4, 2, 6)]
    alone = [generate(model, [p], 15, seed=i, stop_ids={7, 9, 11})[0].tokens
             for i, p in enumerate(prompts)]
    together = generate(model, prompts, 15, seed=0, slots=2, stop_ids={7, 9, 11})
    assert [r.tokens for r in together] == alone


def test_the_plan_is_what_pytorch_counts(monkeypatch):
    """An update of the real 1.5B shape on fake tensors, followed by PyTorch's memory tracker."""
    tokens, config = 16384, replace(SHAPES["qwen2.5-1.5b"], window=4096)

    def attention(q, k, v, window, cu_seqlens, sinks):
        return swa_kernel._attention(q, k, v, cu_seqlens, window, sinks)[0]

    monkeypatch.setattr(nano, "swa_attention", attention)  # its checks ask for values
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(config)
        model.recomputed = config.num_hidden_layers
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        real = torch.Tensor.nonzero
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda x, **kind: (
            torch.zeros(tokens, dtype=torch.long), torch.arange(tokens)))
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(2):  # the first one makes the moments
                with torch.autocast("cpu", torch.bfloat16):
                    loss = -model(ids, ends, ids).sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
        monkeypatch.setattr(torch.Tensor, "nonzero", real)
    counted = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    planned = peak_bytes(memory_plan(config, tokens))
    assert 25e9 < counted < 30e9 and abs(planned / counted - 1) < 0.2


def test_the_plan_of_a_cpu_is_what_pytorch_counts():
    tokens = 2048
    config = replace(SHAPES["smollm2-135m"], window=256, num_hidden_layers=2, vocab_size=8192)
    trainer, tracker = Trainer(Transformer(config), CPU), MemTracker()
    tracker.track_external(trainer.model, trainer.optimizer)
    row = convert_sft.make_row([0], [1] * tokens)
    with tracker:
        for _ in range(2):  # the first one makes the moments
            tracker.reset_mod_stats()
            trainer.update([row], lambda logprobs, micro: -logprobs.sum() / tokens, lr=1e-3)
    counted = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    always, *rest = convert_sft.cpu_plan(config, tokens)
    assert "Python" in always[1] and 1 < peak_bytes(rest) / counted < 1.2


MODELS = {  # as the hub describes them
    "HuggingFaceTB/SmolLM2-135M-Instruct": SHAPES["smollm2-135m"],
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (distilled := replace(
        SHAPES["qwen2.5-1.5b"], tie_word_embeddings=False)),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": replace(
        distilled, vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_attention_heads=28, num_key_value_heads=4),
}


def plan_printed(monkeypatch, capsys, *flags):
    monkeypatch.setattr(convert_sft, "config_of", MODELS.get)
    monkeypatch.setattr(sys, "argv", ["rl.py", "--plan", *flags])
    rl.main()
    return capsys.readouterr().out


def test_one_command_prints_the_readmes_memory_table(monkeypatch, capsys):
    readme = Path(rl.__file__).with_name("README.md").read_text()
    command = re.search(r"^python rl.py --plan (.*)$", readme, re.M)[1]
    printed = plan_printed(monkeypatch, capsys, *command.split())
    assert printed.count("\n") == 4 + 6 and printed in readme
    small = plan_printed(monkeypatch, capsys, *"--offload --slots 64 --memory 24".split())
    assert "| peak: always + the larger phase | 11.38 |" in small and "24 GB | yes |" in small
    assert "`--offload --slots 64` (11 GB)" in readme


def test_without_a_gpu_the_plan_is_the_cpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(convert_sft, "memory_of", lambda kind: {"cpu": 8e9}[kind])
    for flags, where, fits in (("", "CPU", "8 GB | no"), ("--device cpu", "CPU", "8 GB | no"),
                               ("--device cpu --memory 999", "CPU", "999 GB | yes"),
                               ("--memory 80", "GPU", "80 GB | yes"), ("--device cuda", "GPU", "")):
        said = plan_printed(monkeypatch, capsys, *flags.split())
        assert said.startswith(f"on a {where}, ") and ("bfloat16" in said) == (where == "GPU")
        assert f"| fits {fits} |" in said if fits else "fits" not in said


def test_offloading_and_keeping_blocks_show_in_the_plan():
    config = replace(SHAPES["qwen2.5-1.5b"], window=4096)
    whole, away, kept = (peak_bytes(memory_plan(config, 16384, 64, 9216, **more))
                         for more in ({}, {"offload": True}, {"keep_blocks": 4}))
    assert whole > 30e9 and away < 24e9 and kept > whole + 2e9
    assert peak_bytes(memory_plan(config, 16384, 64, 32768)) > whole - 1  # the ring is as large


# -------------------------------------------------------------------------------- rarely used flags


def episode(reward, tokens=4):
    return rl.Episode([1], [2] * tokens, [-1.0] * tokens, True, "", "correct", reward)


def test_two_ranks_continue_two_ranks(after_sft, finished):
    """Rank 0 alone reads the checkpoint, and the others get their shards of it."""
    for steps in (2, 4):
        done = two_ranks("rl", after_sft, RL.format(steps))
        assert done.returncode == 0, done.stderr[-3000:]
    folder = after_sft / "tiny" / "rl-w24"
    assert [r["step"] for r in logged(folder)] == [1, 2, 3, 4]
    assert difference(finished / "tiny" / "rl-w24", folder) < 1e-5


def test_tied_weights_are_resumed(tmp_path):
    task = SimpleNamespace(config=replace(TINY.config, tie_word_embeddings=True),
                           tokens=TINY.tokens)

    def begin(folder):
        run = Run(SFTSettings.of(model="tiny", save_minutes=0), folder, {"lr": 1})
        run.start(Trainer(convert_sft.untrained(task), CPU))
        return run

    def train(run, steps):
        for _ in run.steps(steps):
            run.trainer.update(grpo_rows(), lambda logp, m: -logp.sum() / 50, lr=1e-2)
            run.log({})
        run.lock.close()
        return run.trainer.model.state_dict()

    whole = train(begin(tmp_path / "a"), 4)
    train(begin(tmp_path / "b"), 2)
    again = begin(tmp_path / "b")
    assert again.step == 2
    model = again.trainer.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(v, whole[k]) for k, v in train(again, 4).items())


def test_a_save_before_the_first_update_changes_nothing(tmp_path):
    """PyTorch makes up the state of a fresh optimizer by taking a step, which counts from then on:
    Adam's first real step would be a quarter shorter."""
    def update(trainer):
        trainer.update(grpo_rows(), lambda logp, m: -logp.sum() / 50, lr=1e-2)
        return {k: v.clone() for k, v in trainer.model.state_dict().items()}

    plain, run = trainer_of(), started(tmp_path)
    for _ in run.steps(1):
        run.log({})  # a step in which all groups agree, and then a save
    run.lock.close()
    again = started(tmp_path)
    expected = update(plain)
    for trainer in (run.trainer, again.trainer):
        assert all(torch.equal(v, expected[k]) for k, v in update(trainer).items())


def test_adv_std_and_updates_reach_the_update(after_sft, monkeypatch):
    """The advantages of the rows, and the old policy's log-probabilities in each of two updates."""
    seen, update = [], Trainer.update

    def spy(self, rows, *rest):
        seen.append([(row["advantage"][-1], row.get("old_logprobs")) for row in rows])
        return update(self, rows, *rest)

    monkeypatch.setattr(Trainer, "update", spy)
    folder = run("rl", after_sft, RL.format(1) + " --adv-std --updates 2")
    first, second = seen
    assert first == second and all(old is not None for _, old in first)
    group = [a for a, _ in first[:4]]
    assert sum(group) == pytest.approx(0, abs=1e-5)
    assert torch.tensor(group).std().item() == pytest.approx(1, abs=1e-3)
    other = run("rl", Path(shutil.copytree(after_sft, after_sft.parent / "again",
                                           ignore=shutil.ignore_patterns("rl-*"))),
                RL.format(1) + " --adv-std")
    assert difference(folder, other) > 1e-6


def test_the_overlong_buffer_reaches_the_reward():
    settings = RLSettings.of(model="tiny", group=2, max_new_tokens=100, overlong_buffer=20)
    groups = [[episode(1.0, 80), episode(1.0, 90)], [episode(0.0, 100), episode(0.0, 5)]]
    assert rl.rewards_of(groups, settings).tolist() == [[1, 0.5], [-1, 0]]


def test_nothing_on_the_device_is_asked_for(monkeypatch):
    """A decode step and the training forward on a device without values, as a GPU would run them:
    whatever waits for the host raises there."""
    monkeypatch.setattr(swa_kernel, "_use_triton", lambda q: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=132, major=9))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    with torch.device("meta"):
        model = Transformer(replace(TINY.config, window=24))
    model.frequencies = model.frequencies.to("meta")
    decoder = Decoder(model, 4, 50, 20, stop_ids=[7])
    with torch.no_grad():
        decoder.step(4)
    tokens = torch.zeros(1, 30, dtype=torch.long, device="meta")
    ends = torch.zeros(3, dtype=torch.int32, device="meta")
    assert model(tokens, ends).shape == (1, 30, 33)
