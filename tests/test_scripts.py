"""The scripts as their users start them: runs, runs again, documented commands, bad input."""

import fcntl
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_train import flags, handlers, logged, untrained  # noqa: F401  (handlers is a fixture)

import convert_sft
import rl
from convert_sft import TASKS, Trainer
from model import Tokenizer, Transformer, cli, config_from_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["convert_sft", "rl", "eval", "bench"]


def start(script, *arguments, **options):
    """The script in a process of its own, where it must succeed -> what it printed."""
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, arguments)], text=True,
                          capture_output=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def pictures(folder):
    found = sorted(folder.rglob("*.png"))
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in found)
    return [p.name for p in found]


TINY_RL = "--steps 2 --sft-steps 2 --prompts 2 --group 2 --max-new-tokens 24 --validate 4"


def test_the_tiny_recipe(tmp_path):
    """Both arms side by side; the last line is the result, and a second start only reports it."""
    command = flags(untrained(tmp_path / "out"), TINY_RL)
    summary = json.loads(start("rl", *command).splitlines()[-1])
    scores = {"sa_sft", "swa_sft", "sa_rl", "swa_rl"}
    assert summary.keys() >= scores | {"seconds", "seed", "window"} and summary["window"] == 24
    assert all(0 <= summary[k] <= 1 for k in scores)
    arms = [tmp_path / "out" / "tiny" / f"{s}-w{w}" for s in ("sft", "rl") for w in ("24", "full")]
    assert [Transformer.from_pretrained(f).config.window for f in arms] == [24, None, 24, None]
    assert pictures(tmp_path).count("curves.png") == 4 and "recipe-w24.png" in pictures(tmp_path)

    made = {p: p.stat().st_mtime_ns for arm in arms for p in arm.rglob("*")}
    again = json.loads(start("rl", *command).splitlines()[-1])
    assert {p: p.stat().st_mtime_ns for arm in arms for p in arm.rglob("*")} == made
    assert {k: again[k] for k in scores} == {k: summary[k] for k in scores}
    assert [[r["step"] for r in logged(f)] for f in arms] == [[1, 2]] * 4

    command = "--benchmarks tiny --limit 3 --max-new-tokens 24 --device cpu --model".split()
    assert "tiny" in start("eval", "--out", tmp_path / "out", *command, *arms[1:3])


def wait_for(condition, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


def at_work(folder):
    """Whether a process holds the lock of a run's folder."""
    with open(folder / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture
def recipe(tmp_path):
    """-> (f, the folders of both arms). f() starts a long rl.py --model tiny, waits until each arm
    has done one more step of RL -> the process, alone in its group with what it starts."""
    command = [sys.executable, ROOT / "rl.py", *flags(untrained(tmp_path), TINY_RL),
               "--steps", "100000", "--save-minutes", "0"]
    arms, processes = [tmp_path / "tiny" / f"rl-w{w}" for w in ("24", "full")], []

    def start_it():
        done = [last_step(arm) for arm in arms]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        wait_for(lambda: process.poll() is not None
                 or all(last_step(arm) > n for arm, n in zip(arms, done)))
        assert process.poll() is None
        return process

    yield start_it, arms
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_step(folder):
    """That of the newest checkpoint."""
    return max((int(path.name[5:]) for path in folder.glob("step-0*")), default=0)


def test_an_arm_ends_with_the_recipe_that_started_it(recipe):
    start_it, arms = recipe
    process = start_it()
    assert all(map(at_work, arms))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(at_work, arms)))
    assert not any((arm / "config.json").exists() for arm in arms)


def test_both_arms_stop_and_the_same_command_continues(recipe):
    """SIGTERM reaches the recipe alone, Ctrl-C all of its processes: each arm saves its step."""
    start_it, arms = recipe
    for stop in (lambda p: p.terminate(), lambda p: os.killpg(p.pid, signal.SIGINT)):
        process = start_it()
        stop(process)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 130 and "Traceback" not in said
        assert said.count("stopped; the same command continues") == 2
        assert not any(map(at_work, arms))
        assert not any((arm / "config.json").exists() for arm in arms)
        for arm in arms:
            assert [r["step"] for r in logged(arm)] == list(range(1, last_step(arm) + 1))


def test_stage_one_alone(tmp_path, monkeypatch):
    command = flags(untrained(tmp_path), "--steps 2 --batch 2 --eval-examples 4 --window full")
    folder = tmp_path / "tiny" / "sft-wfull"
    assert start("convert_sft", *command).splitlines()[-1] == f"done: {folder}"
    assert pictures(folder) == ["curves.png"]
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["convert_sft.py", *command])
    importlib.import_module("convert_sft").main()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == made


def test_the_bench_ends_with_json(tmp_path):
    command = "generate --shape tiny --new 8 --long 64 --repeats 1 --device cpu --out".split()
    last = start("bench", *command, tmp_path).strip().splitlines()[-1]
    assert json.loads(last).keys() >= {"bench", "machine", "rows"}
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.fixture
def cut_smollm2(smollm2, tmp_path):
    """SmolLM2's first two layers: the real tokenizer, template and embedding, little to compute."""
    config = json.loads((smollm2 / "config.json").read_text()) | {"num_hidden_layers": 2}
    model, whole = Transformer(config_from_json(config)), Transformer.from_pretrained(smollm2)
    weights = whole.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.tokenizer_files = whole.tokenizer_files
    model.save_pretrained(tmp_path / "SmolLM2-cut")
    yield tmp_path / "SmolLM2-cut"
    shutil.rmtree(tmp_path)  # checkpoints of 35 million parameters


def test_a_real_model_on_gsm8k(cut_smollm2, data, tmp_path):
    problems = sorted((data / "gsm8k_test.jsonl").read_text().splitlines(), key=len)[:100]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(problems))
    command = f"--model {cut_smollm2} --data {tmp_path / 'gsm8k.jsonl'} --out {tmp_path}"
    start("rl", *command.split(), *"--steps 1 --sft-steps 1 --prompts 1 --group 2 --window 128 "
          "--max-new-tokens 8 --validate 1 --micro-tokens 2048 --device cpu".split())
    sft, rl = (tmp_path / "SmolLM2-cut" / f"{stage}-w128" for stage in ("sft", "rl"))
    assert Transformer.from_pretrained(rl).config.window == 128
    assert json.loads((rl / "config.json").read_text())["model_type"] == "mistral"
    assert [r["step"] for r in logged(rl)] == [1] and 0 < logged(sft)[0]["loss"] < 99


@pytest.fixture
def small(tmp_path):
    """A folder with an untrained model of 115,000 parameters, 512 positions, and problems.jsonl."""
    convert_sft.untrained(TASKS["tiny"]).save_pretrained(tmp_path / "small")
    problems = TASKS["tiny"].problems(100, 0, False, lambda rng: 0)
    problems += TASKS["tiny"].problems(100, 1, True, lambda rng: 0)
    for i, problem in enumerate(problems := list({p["problem"]: p for p in problems}.values())):
        if i % 10 == 0:
            problem["problem"] = problem["problem"][:-1] * 60 + "?"  # too long
        elif i % 10 == 1:
            problem["solution"] = ""
    with open(tmp_path / "problems.jsonl", "w") as file:
        file.writelines(json.dumps(p) + "\n" for p in problems + problems[2:7])
    return tmp_path, len(problems)


def test_a_folder_and_problems_as_their_user_meets_them(small, monkeypatch, capsys):
    """What is left out, told before the first step and reported at the end; then more steps, and
    what the same folder refuses."""
    home, n = small
    out, tenth = home / "out" / "small", -(-n // 10)
    plain = f"--data {home / 'problems.jsonl'} --out {home / 'out'} --device cpu --window 24"
    more = ("--prompts 2 --group 2 --max-new-tokens 24 --validate 4 --validate-every 1 "
            "--sft-steps 2 --micro-tokens 2048")
    command = f"--model {home / 'small'} {plain} {more}".split()
    began, *said = start("rl", *command, "--steps", 2).split("step 1/2")
    assert f"\n5 of {n + 5} problems are left out: repeats\n" in began
    for told in (rf"{tenth} of {n} problems are left out: longer than 488 tokens \(lower",
                 rf"\d+ of {n + 5} problems are left out: without a \(verified\) solution\n"):
        assert re.search(rf"\n{told}", began)
    for stage in ("rl", "sft"):
        assert re.search(rf"{stage}-w24: 2 steps, disk up to .* GB, memory up to .* GB\n", began)
    assert re.search(r"held-out loss before training: SA \d.*, window 24 \d", began)
    assert re.search(r"step 2/2 \| reward .* \| validation 0.* \| 0 s left\n", said[-1])
    rows = re.findall(r"^\| (\S+) \| 0\.\d+ \[.*\] \| 0\.\d+ \[", said[-1], re.M)
    assert "n = 4, 95 % intervals, window 24, seed 0" in said[-1]
    assert rows == ["SWA-SFT", "SWA-RL"]
    assert json.loads(said[-1].splitlines()[-1]).keys() >= {"swa_sft", "swa_rl", "n"}
    # stage 1 without its optimizer, RL's last and best
    sft, rl = out / "sft-w24", out / "rl-w24"
    assert [p.name for p in out.glob("*/step-*")] == ["step-000002"]
    assert Transformer.from_pretrained(rl / "best").config.window == 24
    assert all("validation" in record for record in logged(rl))

    made = {p: p.stat().st_mtime_ns for p in sft.iterdir()}
    again = start("rl", *command, "--steps", 3)
    assert "rl-w24: continuing after step 2" in again and "step 3/3" in again
    assert [r["step"] for r in logged(rl)] == [1, 2, 3]
    assert made == {p: p.stat().st_mtime_ns for p in sft.iterdir()}

    def refuses(script, text, why):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *text.split()])
        with pytest.raises(SystemExit) as stopped:
            cli(importlib.import_module(script).main)
        [line] = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and re.search(why, line)

    told = " ".join([*command, "--steps", "4"])
    refuses("rl", f"{told} --seed 5", r"sft-w24 was made with other settings \(seed\)")
    refuses("rl", f"{told} --group 4", r"rl-w24 holds a run with other settings \(group\)")
    refuses("rl", f"{told} --max-new-tokens 600", "none of .* problems .*: lower --max-new-tokens")
    refuses("rl", f"{told} --sft-data {home / 'none.jsonl'}", "other settings.*data")
    refuses("convert_sft", f"--model {home / 'small'} {plain} --steps 3", "other settings")
    convert_sft.untrained(TASKS["tiny"], 1).save_pretrained(home / "other" / "small")
    other = told.replace(str(home / "small"), str(home / "other" / "small"))
    refuses("rl", other, r"made with other settings \(base\)")


def test_what_a_script_trains_on(small, monkeypatch):
    """A template that ends in what solutions begin with, and one file for both stages: no row says
    it twice, and what was validated reached no gradient."""
    home, _ = small
    config = home / "small" / "tokenizer_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"chat_template": said["chat_template"] + "["}))
    problems = [json.loads(line) for line in (home / "problems.jsonl").read_text().splitlines()]
    problems = [p | {"solution": f"[{p['solution']}"} for p in problems if p["solution"]]
    (home / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    rows, validated, update, roll_out = [], [], Trainer.update, rl.roll_out

    def updating(self, batch, *arguments):
        rows.extend(batch)
        return update(self, batch, *arguments)

    def rolling_out(model, tokenizer, problems, samples, *arguments, **more):
        validated.extend(p["problem"] for p in problems if samples == 1)
        return roll_out(model, tokenizer, problems, samples, *arguments, **more)

    monkeypatch.setattr(Trainer, "update", updating)
    monkeypatch.setattr(rl, "roll_out", rolling_out)
    monkeypatch.setattr(rl, "grade_batch", lambda texts, *_: [
        "correct" if len(text) % 2 else "wrong" for text in texts])
    words = (f"rl.py --model {home / 'small'} --data {home / 'problems.jsonl'} --out {home} "
             "--seed 1 --device cpu --window 24 --prompts 20 --group 2 --max-new-tokens 8 "
             "--validate 40 --sft-steps 4 --steps 4 --micro-tokens 2048 --instruction")
    monkeypatch.setattr(sys, "argv", [*words.split(), ""])
    cli(rl.main)
    tokenizer = Tokenizer.from_pretrained(home / "small")
    texts = [tokenizer.decode(row["tokens"], skip_special=False) for row in rows]
    sft = [text for text in texts if "=" in text]
    assert len(sft) > 50 and all(re.fullmatch(r"<bos>[^\[]*\?\[[^\[].*", text) for text in sft)
    trained = {text.partition("[")[0].removeprefix("<bos>") for text in texts}
    assert len(set(validated)) > 5 and len(trained) > 50 and not trained & set(validated)


# --------------------------------------------------------------------------------------- commands


def documented():
    """(file, command) of the README's code blocks and of the scripts' own descriptions."""
    for path in [ROOT / "README.md", *sorted(ROOT.glob("*.py"))]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        blocks = text.split('"""')[1:2] if path.suffix == ".py" else text.split("```")[1::2]
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            if re.match(r"\s*(\$ )?(\w+=\S+ )*(python3?|torchrun) ", line):
                yield path.name, line.strip().removeprefix("$ ")


COMMANDS = sorted(set(documented()))


@pytest.mark.parametrize("file, command", COMMANDS)
def test_documented_commands_parse(file, command):
    words = shlex.split(command, comments=True)
    script = next((w for w in words if w.endswith(".py")), None)
    if script and "pytest" not in words:
        assert (ROOT / script).exists()
        parser = importlib.import_module(Path(script).stem).parser()
        parser.parse_args(words[words.index(script) + 1:])
    elif "pytest" in words:
        assert all((ROOT / w.split("::")[0]).exists() for w in words if w.startswith("tests"))


def test_commands_are_documented():
    """Each script names commands that run, and the search above finds them."""
    assert {f"{s}.py" for s in SCRIPTS} <= {Path(w).name for _, c in COMMANDS for w in c.split()}


# -------------------------------------------------------------------------------------- bad input

TINY = "--model tiny --steps 1"  # and were it accepted, it would soon be done
BAD = {  # script and flags -> what the sentence says; {tmp} is a folder with the files made below
    "rl --model no/such/folder": "not a model folder",
    "rl --model {tmp}/empty": "config.json does not exist",
    "convert_sft --model {tmp}/good.jsonl": "not a model folder",
    f"rl {TINY} --window 0": "--window.*0.*keys >= 1",
    f"rl {TINY} --window -3": "--window",
    f"convert_sft {TINY} --window abc": "'abc'.*keys >= 1",
    f"convert_sft {TINY} --unknown 3": "--unknown",
    f"rl {TINY} --device gpu": "--device",
    f"rl {TINY} --device cuda": "no CUDA GPU",
    f"convert_sft {TINY} --data {{tmp}}/empty.jsonl": "is empty",
    f"convert_sft {TINY} --data {{tmp}}/cut.jsonl": "cut.jsonl line 2",
    f"convert_sft {TINY} --data {{tmp}}/missing.jsonl": "no such file",
    f"convert_sft {TINY} --data {{tmp}}/good.jsonl": "no solution",
    f"convert_sft {TINY} --full-layers 3": "layers are 0 to 2",
    f"convert_sft {TINY} --full-layers a": "layer numbers",
    f"convert_sft {TINY} --window full --window-from 30": "window-from",
    f"convert_sft {TINY} --window-from 0": "window-from",
    f"rl {TINY} --sinks -1": "--sinks -1: give a number of at least 0",
    f"rl {TINY} --sinks 512": "below the model's 512 positions",
    f"convert_sft {TINY} --sinks few": "--sinks",
    "convert_sft --model tiny --steps -1": "--steps -1",
    f"convert_sft {TINY} --lr nan": "--lr nan",
    f"convert_sft {TINY} --seed -1": "--seed",
    f"rl {TINY} --group 0": "--group 0",
    f"rl {TINY} --group 1": "give at least 2",
    f"rl {TINY} --temperature 0": "nothing is learned",
    f"rl {TINY} --min-informative 65": "at most 64",
    f"rl {TINY} --slots -1": "--slots",
    f"rl {TINY} --max-new-tokens 0": "--max-new-tokens 0",
    f"convert_sft {TINY} --out {{tmp}}/good.jsonl": "cannot be written",
    "eval --model {tmp}/empty --benchmarks tiny": "config.json does not exist",
    "eval --model tiny --benchmarks tiny --unknown": "--unknown",
    "eval --model tiny --out {tmp} --analysis arms --window full": "--window a number of keys",
    "eval --model tiny --out {tmp} --data roll-call --analysis dose": "of --model tiny: give that",
    "bench --shape none": "--shape",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, case):
    if "--device cuda" in case and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    good = '{"problem": "p", "answer": "1"}\n'
    for name, content in {"good": good, "cut": good + '{"pro', "empty": ""}.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    script, *words = case.format(tmp=tmp_path).split()
    if "tiny" in words:
        words = [*flags(untrained(tmp_path / "out"), ""), "--device", "auto", *words]
    monkeypatch.setattr("eval.pretrain", lambda settings: pytest.fail("a base is trained"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli(importlib.import_module(script).main)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert re.search(BAD[case], said[-1])
    assert len(said) == 1 and said[0].startswith("error: ")
    left = {p.parent.name for p in tmp_path.rglob("config.json")} - {"base-wfull", "step-000001"}
    assert not left, "a checkpoint of a run that never began"


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """The same from outside: the exit code, and no traceback."""
    done = subprocess.run([sys.executable, ROOT / "rl.py", "--model", "no/such/folder"], text=True,
                          capture_output=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
