"""The tokenizer against Hugging Face's `tokenizers` (ids, text) and transformers (chat)."""

import json
import random
import time
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from convert_sft import TASKS, tokenizer_files
from model import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

HARD = [
    "",
    " ",
    "Let $f(x)=\\frac{x^2-1}{\\sqrt{2}}$; then $\\boxed{\\text{(A)}\\ 12{,}345.60}$",
    "def f(x):\n\treturn [x**2 for _ in range(10)]  # ok\r\n\r\n    pass\n",
    "I'm, we'RE, they'll'd it'S 'tis ''s don’t 'ſ",
    "1 22 333 4444 55555  7 \n 8\t9 x 10  .5 ٣٤ ²³ Ⅷ ¼ 1e-06",
    "  two  three   four    \n\n\n \n  five \t\t six   ",
    "\n",
    "\r\n\r\n x\u00a0 y\u3000\u2003z\u2028\u0085.",
    "Cafe\u0301 caf\u00e9 A\u030a \u212b \ufb01 \u1e9b\u0323 \uac00\u1100\u1161 =\u0338",
    "<think>\u0338 e<think>\u0301</think>",  # NFC must not reach across an added token
    "<think>\nHm.\n</think>\n<tool_call>{}</tool_call><|im_start|>user\n2+2?<|im_end|>\n",
    "<|endoftext|><|begin_of_text|>x<|eot_id|><｜User｜>y<｜Assistant｜><｜end▁of▁sentence｜>",
    "<|im_start <|im_end|>|> <<think>> <thinking> <|<|im_end|>",
    "数学を解く：二十七。答えは９です！한국어 문장입니다. 中文测试",
    "مرحبا بالعالم ٤٢ हिन्दी में गणित עברית ไทย",
    "😀👍🏽🇺🇸👩‍👩‍👧 \u200d\ufeff\ufffd\U000e0041 \U000f0000 \U00040000b\U0010ffff",
    "a\x04b \x06\x13\x14the\x16 \x1d! \x00\x01\x7f\x80\xad",  # SmolLM2 lacks these bytes
    "!\x04! \x04 \x04t\x04h\x04e 1\x042",
    "".join(map(chr, range(0x180))),
]
LONG = [" " * 100_000, " " * 10**6 + "x", " " * 600_000, " " * 600_000 + "7", "\n " * 300_000 + "x"]
LONG += ["\u3000" * 150_000 + "!", "a" * 200_000, "<|" * 100_000, "\0" * 200_000]


def oracle(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def pair(any_tokenizer):
    """A real tokenizer and its oracle."""
    return Tokenizer.from_pretrained(any_tokenizer), oracle(any_tokenizer)


def assert_agrees(mine, theirs, texts):
    """The same ids, and the same text of these ids with and without special tokens."""
    expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    for text, ids in zip(texts, expected, strict=True):
        assert mine.encode(text) == ids, repr(text[:300])
    for skip in True, False:
        decoded = theirs.decode_batch(expected, skip_special_tokens=skip)
        assert [mine.decode(ids, skip_special=skip) for ids in expected] == decoded


# ---------------------------------------------------------------------------- real tokenizers


def test_hard_strings(pair):
    assert_agrees(*pair, HARD)


def test_long_runs_neither_crash_nor_differ(pair):
    assert_agrees(*pair, LONG)


def test_runs_just_short_of_long_ones_take_no_longer():
    """Five of 99,999 spaces: 500 kB took seven seconds, all of them to look for a longer run."""
    tokenizer, text = Tokenizer(TOTAL), (" " * 99_999 + "x") * 5
    began = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - began < 2


def test_problem_texts(pair, data):
    texts = []
    for path in sorted(data.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:400]]
        texts += [row[field] for row in rows for field in ("problem", "solution")]
    assert_agrees(*pair, texts)


def test_every_fourth_token_alone_and_before_another(pair):
    mine = pair[0]
    words = [mine.decode([i], skip_special=False) for i in range(0, mine.n_ids, 4)]
    assert_agrees(*pair, words)
    assert_agrees(*pair, list(map("".join, pairwise(words))))


def test_random_strings(pair):
    draw = random.Random(0)
    pieces = [*"".join(HARD), *"  \n\t'", "'ll", "<think>", "<|im_end|>", "123", " the", "return "]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(3000)]
    assert_agrees(*pair, texts)


def test_random_ids(pair):
    """Any ids decode as in `tokenizers`: broken UTF-8, special tokens, ids that do not exist."""
    mine, theirs = pair
    draw = random.Random(0)
    ids = [draw.choices(range(mine.n_ids + 9), k=12) for _ in range(3000)]
    ids += [[i] for i in range(0, mine.n_ids + 9, 5)] + [[i] for i in mine.special_ids]
    for skip in True, False:
        decoded = theirs.decode_batch(ids, skip_special_tokens=skip)
        assert [mine.decode(row, skip_special=skip) for row in ids] == decoded
    assert mine.n_ids == theirs.get_vocab_size()


CHAT = [
    {"role": "system", "content": "Put the answer in \\boxed{}. {{ x }} {% y %}"},
    {"role": "user", "content": "  What is 12 + 30?\n\n"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nIt is \\boxed{42}."},
    {"role": "user", "content": "And 1 é <b>&</b> '七'?"},
]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek-r1-distill", "smollm2"])
def test_chat_is_that_of_transformers(tokenizer_folder, name):
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_folder(name)
    mine = Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in CHAT, CHAT[:2], CHAT[1:2], CHAT[1:]:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert mine.chat(messages) == expected


def test_declared_ids(tokenizer_folder):
    ids = {"qwen2.5": 151645, "qwen3": 151645, "deepseek-r1-distill": 151643, "smollm2": 2}
    for name, eos in ids.items():
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder(name))
        assert tokenizer.stop_ids == {eos} and tokenizer.eos_id == eos
    llama = Tokenizer.from_pretrained(tokenizer_folder("llama3"))  # declares none
    assert llama.stop_ids == set() and llama.eos_id is llama.bos_id is None


# ----------------------------------------------------------------------- tokenizers made here


def tiny(config=None, others=None, **changes):
    """The tiny task's tokenizer with entries of tokenizer.json or of its files exchanged."""
    files = tokenizer_files(TASKS["tiny"].tokens)
    spec = json.loads(files["tokenizer.json"]) | changes
    config = json.loads(files["tokenizer_config.json"]) | (config or {})
    files = {"tokenizer.json": spec, "tokenizer_config.json": config} | (others or {})
    return {name: json.dumps(content).encode() for name, content in files.items()}


def test_tiny():
    tokenizer = Tokenizer(tiny())
    text = "<bos>a3b0c4d1e2?a0+0=0;[d1e2]l7=\\boxed{9}<eos>"
    ids = tokenizer.encode(text)
    assert (len(ids), tokenizer.n_ids) == (len(text) - 4 - 4 - 6, 33)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == text[5:-5]
    assert tokenizer.chat([{"role": "user", "content": "a3?"}]) == [1, 13, 6, 30]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    assert tokenizer.encode("09al+}\\boxed{") == [3, 12, 13, 24, 25, 32, 31]
    draw = random.Random(0)
    pieces = [*"0123abcl+=;[]?{}<>\\ \n\x04éĠ七", "\\boxed{", "\\boxed", "<eos>", "<bos>", "<pad>"]
    texts = ["".join(draw.choices(pieces, k=draw.randint(0, 30))) for _ in range(3000)]
    theirs = tokenizers.Tokenizer.from_str(tiny()["tokenizer.json"].decode())
    assert_agrees(tokenizer, theirs, texts)


@pytest.mark.parametrize("all_bytes", [True, False])
@pytest.mark.parametrize("digits", [True, False])
@pytest.mark.parametrize("nfc", [True, False])
def test_trained_here(all_bytes, digits, nfc):
    """All pre-tokenizers, with merges across the bytes that a vocabulary lacks."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    theirs = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(steps)
    theirs.decoder = decoders.ByteLevel()
    if nfc:
        theirs.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([text for text in HARD[:8]], trainer)
    theirs.add_tokens([AddedToken("<a>", normalized=False), AddedToken("<a>b", normalized=False)])
    theirs.add_special_tokens(["<s>"])
    mine = Tokenizer({"tokenizer.json": theirs.to_str().encode()})
    assert bool(mine.absent) is not all_bytes
    draw = random.Random(0)
    pieces = [*"".join(HARD[2:-1]), *" \n\t'", "<a>", "<a>b", "<s>", "12", " if"]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(1000)]
    assert_agrees(mine, theirs, HARD + texts)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters()))  # lone surrogates too
def test_encode_is_total(text):
    """No text raises; what comes back is the text, normalized, but for what UTF-8 cannot say."""
    tokenizer = Tokenizer(TOTAL)
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", clean)


TOTAL = tiny(
    added_tokens=[],
    normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    model={
        "type": "BPE",
        "vocab": {char: i for i, char in enumerate(model.BYTE_TO_CHAR.values())} | {"aa": 256},
        "merges": [["a", "a"]],
    },
)


# --------------------------------------------------------------------- declarations and chat


@pytest.mark.parametrize(
    "config, generation, model_config, expected",
    [
        ({}, None, None, {2}),
        ({"eos_token": {"content": "<bos>"}}, None, None, {1}),
        ({}, {"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {2, 5, 6, 7}),
        ({"eos_token": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 8]}, {5, 8}),
        ({"eos_token": "<|im_end|>"}, {}, {"eos_token_id": None}, set()),  # no such token
    ],
)
def test_stop_ids_are_all_that_is_declared(config, generation, model_config, expected):
    others = {"generation_config.json": generation, "config.json": model_config}
    others = {name: content for name, content in others.items() if content is not None}
    assert Tokenizer(tiny(config, others)).stop_ids == expected


def render(template, content="a"):
    config = {"eos_token": "<eos>", "chat_template": template}
    tokenizer = Tokenizer(TOTAL | {"tokenizer_config.json": json.dumps(config).encode()})
    return tokenizer.decode(tokenizer.chat([{"role": "user", "content": content}]))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% break %}\n{% endfor %}\n  a{{ eos_token }}\n",
        "{% generation %}\n{% set b = 1 %}b{% endgeneration %}\n{{ b }}{{ bos_token }}",
        "{{ messages[0].content | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ strftime_now('%Y-%m-%d') }} {{ tools is none }} {{ documents is defined }}",
        "{%- if add_generation_prompt -%} x {%- endif %}",
        "{% for m in messages + messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ m.role ~ loop.index0 ~ none ~ undefined }}{% else %}none{% endfor %}",
        "{% for key, value in messages[0].items() if key != 'role' recursive %}{{ key }}"
        "{{ value.replace('<', 'a' * 3).split('&')[-1] + '-' * 2 ** 3 }}{% endfor %}",
        "{% for i in range(2) %}{% for j in 'ab' %}{{ loop.cycle('x', 'y') ~ (i * 2 + 1) }}"
        "{% endfor %}{% endfor %}{{ messages | map(attribute='role') | join(', ') }}",
    ],
)
def test_chat_templates_render_as_in_transformers(template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages, given = [{"role": "user", "content": "<é&'7"}], {"eos_token": "<eos>"}
    expected = utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **given
    )
    assert render(template, "<é&'7") == expected[0][0]


def test_chat_template_places():
    named = {"tool_use": "c", "default": "d"}
    assert render([{"name": name, "template": text} for name, text in named.items()]) == "d"
    file = tiny({"chat_template": "a"}) | {"chat_template.jinja": b"b"}
    assert Tokenizer(file).chat([]) == [14]  # the file comes first


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[7].content.x }}",
        "{% if %}",
        [{"name": "tool_use", "template": "c"}],
        7,
        0,
        {"default": "c"},
        ["c"],
        "{% for i in range(1000000000000) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_chat_template_errors(template):
    with pytest.raises(model.UsageError, match="the chat template cannot render") as error:
        render(template)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ 10**10**10 }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ 'x'|center(10000000000) }}",
        "{{ 5|center(10000000000) }}",
        "{{ ''.zfill(10000000000) }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}",
        "{% set n = namespace(s='x') %}"
        "{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}"
        "{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}"
        "{% endfor %}{% endmacro %}{{ f() }}",
        "{{ 'nan'|float + 1 }}{{ 'x' * 10**10 }}",
    ],
)
def test_chat_templates_are_bounded(template):
    """What would fill the memory or not end is refused beforehand, within a second."""
    with pytest.raises(model.UsageError, match="cannot render .*loops or builds without bound"):
        render(template)


def test_chat_without_a_template(tokenizer_folder):
    folder = tokenizer_folder("smollm2")
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    tokenizer = Tokenizer(files)
    text = tokenizer.decode(tokenizer.chat(CHAT[1:2]))
    assert text == "User:   What is 12 + 30?\n\n\n\nAssistant:"
    with_bos = Tokenizer(files | {"tokenizer_config.json": b'{"bos_token": "<|im_start|>"}'})
    assert with_bos.chat(CHAT) == [1, *tokenizer.chat(CHAT)]


# -------------------------------------------------------------------------------------- errors


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(pattern, behavior="Isolated"):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL]}}


def bpe(**changes):
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []} | changes}


def added(i, content="<a>"):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **flags}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"model": {}}, "malformed"),
        ({"model": None}, "malformed"),
        (bpe(byte_fallback=True), "byte_fallback"),
        (bpe(dropout=0.1), "dropout"),
        (bpe(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (bpe(unk_token="a"), "unk_token"),
        (bpe(merges=["a b"]), "malformed"),
        (bpe(vocab={"a": 0, "b": 1, "xyz": 99}, ignore_merges=True), "ignore_merges"),
        ({"decoder": None}, "decoder"),
        ({"decoder": {"type": "Metaspace"}}, "decoder"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"pre_tokenizer": None}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({"pre_tokenizer": BYTE_LEVEL}, "ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel"),
        (split(r"\p{N}|\P{N}+", "Removed"), "Split"),
        (split(r"\p{L}+| "), "leaves out"),
        (split(r"(a"), "cannot read"),
        ({"added_tokens": [{"content": "<a>"}]}, "malformed"),
        ({"added_tokens": 7}, "malformed"),
        ({"added_tokens": [added(10**18)]}, "ids that are"),
        ({"added_tokens": [added(-1)]}, "ids that are"),
        ({"added_tokens": [added("40")]}, "ids that are"),
        ({"added_tokens": [added(40.0)]}, "ids that are"),
        ({"added_tokens": [added(True)]}, "ids that are"),
        ({"added_tokens": [added([40])]}, "malformed"),
        ({"added_tokens": [added(40), added(40, "<b>")]}, "used twice"),
        ({"added_tokens": [added(3)]}, "used twice"),
        ({"added_tokens": [added(40, "")]}, "empty tokens"),
        ({"added_tokens": [added(40, 7)]}, "malformed"),
        (bpe(vocab={"a": 0, "b": 0}), "used twice"),
        (bpe(vocab={"a": 0, "b": -1}), "ids that are"),
        (bpe(vocab={"a": 0, "b": 10**30}), "ids that are"),
        (bpe(vocab=[1]), "malformed"),
        (bpe(merges=[["a"] * 3, 7]), "malformed"),
        ({"normalizer": "NFC"}, "malformed"),
        ({"pre_tokenizer": [1]}, "malformed"),
        ({"decoder": [1]}, "malformed"),
        (split(r"a*|\P{N}|\p{N}"), "matches nothing"),
        (split(r""), "matches nothing"),
        (split(r"(?=a)|[\s\S]"), "matches nothing"),
        (split(7), "malformed"),
    ],
)
def test_unsupported_tokenizers_are_named(changes, message):
    with pytest.raises(model.UsageError, match=message):
        Tokenizer(tiny(**changes))


def test_stripping_tokens_are_refused():
    tokens = json.loads(tiny()["tokenizer.json"])["added_tokens"]
    with pytest.raises(model.UsageError, match="lstrip"):
        Tokenizer(tiny(added_tokens=[*tokens, tokens[0] | {"content": "<m>", "lstrip": True}]))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"7", b"\xff\xfe{", b"[" * 200_000, b"9" * 5000, b'[["a", 1]]']
)
def test_malformed_files_are_named(name, content):
    with pytest.raises(model.UsageError, match=name):
        Tokenizer(tiny() | {name: content})


@pytest.mark.parametrize("ids", ["2", -1, 10**18, 2.0, True, [[2]], [2, "3"], {"a": 2}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_ids_that_are_none(name, ids):
    with pytest.raises(model.UsageError, match=f"{name} says eos_token_id"):
        Tokenizer(tiny(others={name: {"eos_token_id": ids}}))


def test_a_pattern_that_fails_on_one_text_only():
    """Nothing shows it when the tokenizer is built; tiktoken then panics at the empty match."""
    tokenizer = Tokenizer(tiny(**split(r"(?=000)|[\s\S]")))
    assert tokenizer.encode("00") == 2 * tokenizer.encode("0")
    with pytest.raises(model.UsageError, match="tokenizer.json's pattern"):
        tokenizer.encode("000")


def test_missing_files(tmp_path, monkeypatch):
    with pytest.raises(model.UsageError, match="tokenizer.json is missing"):
        Tokenizer.from_pretrained(tmp_path)

    def snapshot_download(name, allow_patterns, local_files_only):
        assert "tokenizer.json" in allow_patterns and "model.safetensors" not in allow_patterns
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(model.UsageError, match="nobody/nothing is neither a folder.*OSError"):
        Tokenizer.from_pretrained("nobody/nothing")
