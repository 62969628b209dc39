"""assets/explain.html in a real browser: its model against model.py, its parts as a reader uses
them; and the command that writes its data. Without Chromium, tests that need one are skipped."""

import base64
import importlib
import json
import operator
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from convert_sft import TASKS, as_prompt, tokenizer_files, untrained
from eval import DATA_BLOCK, write_page
from model import ModelConfig, Tokenizer, Transformer, UsageError, generate, sample
from rl import Episode, RLSettings, as_text, validate

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "assets" / "explain.html"


class Browser:
    """A headless Chromium, driven by DevTools' JSON through a pair of pipes."""

    def __init__(self, profile):
        command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                       "google-chrome"))), None)
        if command is None:
            pytest.skip("no Chromium is installed")
        (to_read, self.to), (self.of, of_write) = os.pipe(), os.pipe()
        # Chromium reads commands at descriptor 3 and writes at 4
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$0" "$@" 3</dev/fd/{to_read} 4>/dev/fd/{of_write}', command,
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-pipe", "--no-first-run", f"--user-data-dir={profile}"],
            pass_fds=(to_read, of_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(of_write)
        self.sent, self.rest, self.session, self.errors = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda message: message.get("id") == self.sent)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, wanted):
        """The next message for which wanted(message); exceptions of the page are kept."""
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.of, 2**16)
                assert part, "the browser has ended"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(line)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if wanted(message):
                return message

    def open(self, page, link="", width=1200, height=900, dark=False, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.errors.clear()
        for url in ("about:blank", f"{Path(page).resolve().as_uri()}#{link}"):
            self.call("Page.navigate", url=url)
            self.wait(lambda message: message.get("method") == "Page.loadEventFired")
        started = self.js("""new Promise(done => (function look(tries) {
            typeof page === "object" || !tries ? done(tries > 0)
                : setTimeout(look, 50, tries - 1); })(400))""")
        assert started, self.errors

    def js(self, expression):
        """The value of an expression, of its promise where it is one."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      text=text if kind == "keyDown" else "")

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
    """The browser, with the page as a reader finds it; no script may have failed in the end."""
    browser.open(PAGE)
    yield browser
    assert not browser.errors


def data_of(page=PAGE):
    return json.loads(DATA_BLOCK.search(page.read_text("utf-8")).group())


def unrounded(saved):
    """The page's model in Python, by a reading of its own of the 8-bit weights."""
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    model = Transformer(ModelConfig(**saved["config"]))
    scales = np.frombuffer(base64.b64decode(saved["scales"]), np.float32)
    entries = np.frombuffer(base64.b64decode(saved["entries"]), np.int8).astype(np.float32)
    weights, row, at = {}, 0, 0
    for name, rows, columns in saved["shapes"]:
        matrix = entries[at:at + rows * columns].reshape(rows, columns)
        matrix = torch.tensor(matrix * scales[row:row + rows, None])
        weights[name] = matrix.view_as(model.state_dict()[name])
        row, at = row + rows, at + rows * columns
    assert (row, at) == (len(scales), len(entries))
    model.load_state_dict(weights)
    return model.eval()


# ------------------------------------------------------------------------------------- the models


@torch.no_grad()
def test_agrees_with_python(page):
    """Logits to 1e-4 after every token, greedy answers exactly: each model on a dozen problems
    under its own window, and on three under others."""
    tasks = data_of()["tasks"]
    assert tasks
    for t, task in enumerate(tasks):
        tokenizer = Tokenizer(tokenizer_files(TASKS[task["name"]].tokens))
        for m, saved in enumerate(task["models"]):
            model = unrounded(saved)
            for window in dict.fromkeys((saved["window"], 9, None)):
                model.config.window = window
                n = 12 if window == saved["window"] else 3
                prompts = [as_prompt(tokenizer, text, "") for text in task["examples"][:n]]
                ours = generate(model, prompts, task["most"], 0, task["stop"])
                theirs = page.js(f"""(() => {{
                    const task = page.data.tasks[{t}], model = new Transformer(task.models[{m}]);
                    return task.examples.slice(0, {n}).map(text => {{
                        const prompt = [...task.start, ...encode(text, task.vocabulary)];
                        const {{tokens}} = generate(model, prompt,
                            {{window: {json.dumps(window)}, most: task.most, stop: task.stop}});
                        const sequence = new Sequence(model, {json.dumps(window)}, 500);
                        return {{prompt, tokens, logits: [...prompt, ...tokens].map(
                            token => [...sequence.push(token).logits])}};
                    }});
                }})()""")
                for prompt, rollout, found in zip(prompts, ours, theirs, strict=True):
                    assert found["prompt"] == prompt
                    assert found["tokens"] == rollout.tokens
                    logits = model(torch.tensor([prompt + rollout.tokens]))[0]
                    torch.testing.assert_close(torch.tensor(found["logits"]), logits,
                                               rtol=0, atol=1e-4)


def test_samples_as_python(page):
    logits = 3 * torch.randn(200, 33, generator=torch.Generator().manual_seed(0)).double()
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1)).double()
    for temperature in (0, 0.6, 1):
        found = page.js(f"""{logits.tolist()}.map((row, i) =>
            sample(Float64Array.from(row), {uniform.tolist()}[i], {temperature}))""")
        assert found == sample(logits, uniform, temperature)[0].tolist()


def test_states_the_accuracy_of_its_weights(tmp_path):
    """Measured again, of each task's least certain model."""
    data = data_of()
    for task in data["tasks"]:
        saved = min(task["models"], key=lambda saved: abs(saved["accuracy"]["T=1"]["after"] - 0.5))
        model = unrounded(saved)
        model.tokenizer_files = tokenizer_files(TASKS[task["name"]].tokens)
        model.save_pretrained(tmp_path / task["name"])
        settings = RLSettings.of(model="tiny", data=task["name"], window=saved["window"],
                                 seed=data["seeds"][0])
        found = validate(tmp_path / task["name"], settings)
        for name, accuracy in saved["accuracy"].items():  # another processor rounds otherwise
            assert accuracy["n"] == np.size(found[name]["scores"]) > 10
            assert abs(accuracy["after"] - np.mean(found[name]["scores"])) < 0.03
            assert abs(accuracy["after"] - accuracy["before"]) < 0.03


# --------------------------------------------------------------------------------------- its use

@pytest.mark.parametrize("task, problem, answer, right", [
    ("tiny", "a3b4c2d1?", r"a3+0=3;[b4c2d1]b4+3=7;c2+7=9;d1+9=0;\boxed{0}", True),
    ("tiny", "a3b4c2d1?", r"a3+0=3;b4+3=7;c1!+7=8;d1+8=9;\boxed{9!}", False),
    ("tiny", "a3b4c2d1?", r"a3+0=3;b4+2!=6;c2+6=9!;d1+9=0;\boxed{0}", True),
    ("tiny", "a3b4c2d1?", r"a3+0=3;[c!2d!1]b4+3=7;d!1+7=8;\boxed{8!}", False),
    ("tiny", "a3b4c2d1?", r"a3+0=3;[[b4c3!", False),
    ("roll-call", "4?", "cadb", True),
    ("roll-call", "4?", "cadc!", False),
    ("roll-call", "4?", "cabe!", False),
    ("roll-call", "4?", "cab", False),
])
def test_marks_right_and_wrong(page, task, problem, answer, right):
    """Wrong tokens are followed by `!` here."""
    tokens, wrong = zip(*re.findall(r"(\\boxed\{|.)(!?)", answer))
    found = page.js(f"TASKS['{task}'].judge('{problem}', {[*problem]}, {json.dumps(tokens)})")
    assert found["right"] == right
    assert [is_.get("right") is False for is_ in found["judged"]] == [bool(w) for w in wrong]


def visible(page, lane=0):
    return page.js(f"[...page.lanes[{lane}].cells.keys()].filter("
                   f"i => page.lanes[{lane}].cells[i].matches('.seen'))")


def move(page, slider, value):
    page.js(f"$('{slider}').value = {value}, $('{slider}').dispatchEvent(new Event('input'))")


def test_band_and_ring_hold_the_window(page):
    longest = page.js("page.prompt.length + page.task.most")
    for place, window in [(8, 8), (24, 24), (page.js("page.full"), longest)]:
        move(page, "window", place)
        for time in (0, 5, page.js("page.lanes[0].answer.length")):
            move(page, "time", time)
            query = page.js("page.prompt.length") + time - 1
            assert visible(page) == list(range(max(0, query - window + 1), query + 1))
            letters = page.js("page.lanes[0].slots.map(slot => slot.letter.textContent)")
            assert len(letters) == window
            words = page.js("[...page.lanes[0].prompt, ...page.lanes[0].answer]"
                            ".map(word => SHORT[word] ?? word)")
            if window <= 64:  # in more slots there is no room for letters
                held = {p % window: words[p] for p in range(query + 1)}
                assert letters == [held.get(slot, "") for slot in range(window)]


def test_attention_is_shown(page):
    """The bars are the weights of the chosen layer and head, and add up to 1."""
    for head in ("", "0.0", "2.1"):
        page.js(f"$('head').value = '{head}', $('head').onchange()")
        bars = page.js("page.lanes.map(lane => lane.cells.map("
                       "cell => +cell.style.getPropertyValue('--weight')))")
        assert all(abs(sum(lane) - 1) < 0.03 for lane in bars)
        shown = page.js("page.lanes[0].made.looks[page.time].attention")
        layers = [(range(3), range(2)), ((0,), (0,)), ((2,), (1,))][("", "0.0", "2.1").index(head)]
        query = page.js("page.prompt.length + page.time - 1")
        mean = np.mean([shown[i][j][str(query % 24)] for i in layers[0] for j in layers[1]])
        assert abs(bars[0][query] - mean) < 2e-3


def test_one_loses_what_the_other_restates(page):
    """What a reader meets first: the moment where SFT goes wrong, beside RL, which ends right."""
    assert "out of sight" in page.js("page.lanes[0].note.textContent")
    move(page, "time", 1000)
    assert page.js("page.lanes.map(lane => lane.note.textContent.slice(0, 7))") == [
        "✗ Wrong", "✓ Right"]


def test_problems_are_checked(page):
    before = page.js("page.problem")
    for text in ("a1", "a1b2c3", "a5b1c2d3", "a1b2d3c4", "", "<b>", "a1b2c3d4e1f1g1h1i1"):
        page.js(f"$('problem').value = '{text}', $('problem').oninput()")
        assert page.js("$('error').textContent").startswith("Please give 4 to 8 letters")
        assert page.js("$('problem').getAttribute('aria-invalid')") == "true"
        assert page.js("page.problem") == before
    page.js("$('problem').value = ' A1b2C3 d4 ', $('problem').oninput()")
    assert page.js("[page.problem, $('error').textContent]") == ["a1b2c3d4?", ""]
    assert page.js("page.lanes[0].prompt.slice(1).join('')") == "a1b2c3d4?"
    for _ in range(5):
        page.js("$('draw').click()")
        assert page.js("page.problem") in data_of()["tasks"][0]["examples"]


def test_keyboard(page):
    move(page, "time", 3)
    page.press("ArrowRight", 39)
    page.press("ArrowRight", 39)
    page.press("ArrowLeft", 37)
    assert page.js("page.time") == 4
    page.press(" ", 32, " ")
    assert page.js("$('play').textContent") == "Pause"
    page.js("new Promise(done => setTimeout(done, 600))")
    assert page.js("page.time") > 4
    page.press(" ", 32, " ")
    assert page.js("$('play').textContent") == "Play"
    reached = {page.press("Tab", 9) or page.js("document.activeElement.id") for _ in range(16)}
    assert {"problem", "draw", "temperature", "play", "time", "window", "head", "step"} <= reached


def test_sampling_follows_its_seed(page):
    page.js("$('temperature').value = '1', $('temperature').onchange()")
    answers = [page.js("$('again').click(), page.lanes[0].answer.join('')") for _ in range(8)]
    assert len(set(answers)) > 1
    assert page.js("page.run(), page.lanes[0].answer.join('')") == answers[-1]


def test_training_strip(page):
    saved = data_of()["tasks"][0]["models"][-1]
    assert len(saved["steps"]) == 40 and len(saved["episodes"]) == 80
    for i in (0, 20, 39):
        move(page, "step", i)
        step = saved["steps"][i]
        assert page.js("$('figures').textContent").startswith(
            f"Step {i + 1} of 40: {100 * step['reward']:.0f} % of")
        shown = page.js("[...$('episodes').querySelectorAll('.tokens')].map(x => x.ariaLabel)")
        mine = [e for e in saved["episodes"] if e["step"] == i + 1]
        assert len(shown) == len(mine) > 0
        assert all(e["answer"] in text for e, text in zip(mine, shown))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_widths_and_colours(browser, width, dark):
    """Nothing is wider than the screen, every control has a name, text stands out (WCAG AA)."""
    browser.open(PAGE, "time=1000", width, 900, dark, mobile=width < 500)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("""[...document.querySelectorAll("input, select, button")].filter(x =>
        x.checkVisibility() && !(x.labels?.length || x.ariaLabel
        || x.matches("button") && x.textContent.trim())).map(x => x.outerHTML)""") == []
    assert browser.js("[...document.querySelectorAll('svg')].every(x => x.ariaLabel)")
    colours = browser.js("""["--paper", "--ink", "--soft", "--sa", "--swa", "--right", "--wrong"]
        .map(name => getComputedStyle(document.documentElement).getPropertyValue(name))""")
    paper, *others = [luminance(colour) for colour in colours]
    assert (paper < 0.1) == dark
    for name, other in zip(["ink", "soft", "sa", "swa", "right", "wrong"], others):
        low, high = sorted((paper, other))
        assert (high + 0.05) / (low + 0.05) > (3.5 if name == "swa" else 4.5), name  # swa: large


def luminance(colour):
    """Of #rrggbb, relative, as WCAG defines it."""
    parts = [int(colour.strip()[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear))


def test_fast(browser):
    """First paint under a second, a token under 20 ms, also under full attention: the best of
    three, since the machine may be busy."""
    paints, paces = [], []
    for _ in range(3):
        browser.open(PAGE, "window=full")
        paces.append(browser.js("Math.max(...page.lanes.map(lane => lane.pace))"))
        paints.append(browser.js("""new Promise(done => new PerformanceObserver(list =>
            done(list.getEntries()[0].startTime)).observe({type: "paint", buffered: true}))"""))
    print(f"first paint after {min(paints):.0f} ms, a token in {min(paces):.2f} ms")
    assert min(paints) < 1000 and min(paces) < 20


# -------------------------------------------------------------------------------------- the file


def test_is_one_small_file():
    html = PAGE.read_text("utf-8")
    assert PAGE.stat().st_size <= 1_500_000
    assert not re.search(r"<link|\bsrc=|@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    program = DATA_BLOCK.sub("", html)
    assert max(map(len, program.splitlines())) <= 130


def test_names_functions_that_exist():
    named = re.findall(r'<code data-in="(\w+)\.py">([\w.]+)</code>', PAGE.read_text("utf-8"))
    assert len(named) >= 8
    for module, name in named:
        assert operator.attrgetter(name)(importlib.import_module(module)), name


# ----------------------------------------------------------------------------------- the command


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A forker's runs: another window, nothing trained, and a copy of the page."""
    for name in ("validate", "max_new_tokens"):
        monkeypatch.setitem(TASKS["tiny"].defaults["rl"], name, 8)
    for stage in ("sft", "rl"):
        folder = tmp_path / "out" / "tiny" / f"{stage}-w12"
        model = untrained(TASKS["tiny"], seed=5)
        model.config.window = 12
        model.save_pretrained(folder)
        identity = {"stage": stage, "data": "tiny", "window": 12, "seed": 5}
        (folder / "run.json").write_text(json.dumps(
            {"step": 1, "seconds": 1, "identity": identity}))
        (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "log.jsonl").write_text('{"settings": {}}\n' + "".join(
        json.dumps({"step": step, "reward": step / 2, "length": 50.0}) + "\n" for step in (1, 2)))
    tokenizer, episodes = Tokenizer(model.tokenizer_files), ""
    for step in (0, 1):
        e = Episode([1, 13, 3, 30], [13, 2], [], True, "a</script>", "wrong", 0.0)
        episodes += as_text(step, e, tokenizer)
    (folder / "episodes.txt").write_text(episodes)
    shutil.copy(PAGE, tmp_path / "page.html")
    return tmp_path


def test_command_rewrites_the_data_alone(browser, runs, capsys):
    page, folders = runs / "page.html", sorted((runs / "out" / "tiny").iterdir(), reverse=True)
    write_page(folders, page)
    template, rewritten = (DATA_BLOCK.sub("", p.read_text("utf-8")) for p in (PAGE, page))
    assert rewritten == template
    task, = data_of(page)["tasks"]
    sft, rl = task["models"]
    assert (sft["label"], rl["label"], rl["window"]) == ("SWA-SFT", "SWA-RL", 12)
    assert rl["accuracy"]["greedy"]["n"] == 8
    assert sft["steps"] == []
    assert rl["steps"] == [{"step": s, "reward": s / 2, "length": 50.0} for s in (1, 2)]
    assert [(e["step"], e["answer"]) for e in rl["episodes"]] == [
        (1, "a</script>"), (2, "a</script>")]
    weight = untrained(TASKS["tiny"], seed=5).lm_head.weight
    assert (unrounded(sft).lm_head.weight - weight).abs().max() <= weight.abs().max() / 250
    browser.open(page)
    assert browser.js("page.lanes.map(lane => lane.window)") == [12, 12] and not browser.errors
    before = page.read_bytes()
    write_page(folders, page)
    assert page.read_bytes() == before


@pytest.mark.parametrize("folder, said", [
    ("missing", "no SFT or RL run"), ("out", "no SFT or RL run"), ("base", "no SFT or RL run"),
    ("sunk", "no sinks")])
def test_command_refuses(runs, folder, said):
    (runs / "base").mkdir()
    (runs / "base" / "run.json").write_text(
        '{"step": 1, "seconds": 1, "identity": {"stage": "base", "seed": 0}}')
    sunk = Transformer.from_pretrained(runs / "out" / "tiny" / "rl-w12")
    sunk.config.sinks = 2
    sunk.save_pretrained(runs / "sunk")
    shutil.copy(runs / "out" / "tiny" / "rl-w12" / "run.json", runs / "sunk")
    with pytest.raises(UsageError, match=said):
        write_page([runs / folder], runs / "page.html")
    (runs / "bare.html").write_text("<html>")
    with pytest.raises(UsageError, match="block of data"):
        write_page([runs / "out"], runs / "bare.html")
