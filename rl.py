"""Stage 2: on-policy RL under the window (GRPO), with a sympy answer checker as the reward.

SFT data are written for full attention and lean on what a window cannot see. RL trains the model on
its own trajectories instead, generated under the window it will be used with, so that it keeps the
ways of working that the window can carry. One step: G answers to each prompt, a reward of 1 for a
right answer, advantages within the group, one policy-gradient update.

Left out on purpose: a reference model and KL, a value model, reward models, asynchronous rollouts.

    python rl.py --model tiny           # the whole recipe in miniature, on a CPU, in minutes
    python rl.py --window 4096          # DeepSeek-R1-Distill-Qwen-1.5B on one GPU
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import mpmath  # comes with sympy
import numpy as np
import sympy
import torch

import convert_sft
from convert_sft import (
    COLORS,
    RANK,
    WORLD,
    FlagParser,
    Trainer,
    add_settings,
    all_sum,
    as_prompt,
    as_window,
    convert,
    draw,
    held_out,
    load_problems,
    make_row,
    other_stage,
    pick_device,
    print_plan,
    schedule,
    settle,
    stage_folder,
    tiny_problems,
)
from model import Rollout, Tokenizer, Transformer, UsageError, cli, generate, read_json, write_file

# --------------------------------------------------------------------------------------------------
# the answer checker
#
# response -> extract_answer -> _tokens -> Parser -> sympy expressions and Nodes -> _same
#
# Equal: mathematically equal in any form. Units, degree, percent and currency signs are optional
# on one side. Lists without brackets have no order. x = 5 equals 5, f(x) = 2x equals 2x, x > 2
# equals (2, \infty), \pm is two values, 3:4 is a fraction, 12:30 a time of day, log is natural.
# Not equal: rounded values, 0.5 for 50%, other brackets, another base subscript, another unit, a
# missing or an extra value. What the grammar does not know (words, sums, integrals, limits) is
# compared as a string.
#
# Model output is hostile: nothing is evaluated as code; rationals are exact and bounded in size;
# the rest is a tree that sympy never simplifies (its rewriting has no time limit) and mpmath
# evaluates within bounds at two points. No signals: they fail off the main thread.

MAX_ANSWER, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1200, 400, 40, 40
MAX_BITS = 2**15            # of an exact number, and of the exponent of an evaluated one
MP = mpmath.MPContext()     # our own: threads that share mpmath.mp change each other's precision
MP.dps = 100                # equal means 75 of these digits; the rest pays for cancellation

Node = namedtuple("Node", "kind items")     # "," list, "{}" set, "(]" interval, "<", "=", "∪", ...


class Refused(Exception):
    """Syntax outside the grammar, or a value too large to build."""


BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
PHRASE = re.compile(
    r"####|\banswers?\b\W{0,4}(?:[^.:=\n]{0,60}?\b(?:is|are)\b|[:=\n])[\s:*_]*", re.I)
FOUND = re.compile(     # a formula in dollar signs or brackets, or a number
    r"\$+([^$\n]{1,300})\$+|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]"
    r"|((?<![\w.])-?\\?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:[/:][0-9]+)?|-?\.[0-9]+)", re.S)
SENTENCE_END = re.compile(r"\.(?:\s|$)|,? (?:because|since|which|so) ")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def extract_answer(text: str) -> str | None:
    """The answer in a response, or None.

    The outermost of the last three \\boxed or \\fbox; one that is empty or never closes is no
    answer. Without a box: what follows the last "####" or "answer is"; else a response that is
    a bare expression; else the last formula in dollar signs or number.
    """
    if not isinstance(text, str):
        return None
    boxes, at = [], len(text)
    while len(boxes) < 3 and (at := max(text.rfind(b, 0, at) for b in ("\\boxed", "\\fbox"))) >= 0:
        boxes.append(_box(text, at))
    if boxes:
        answer = max(boxes)[1]          # of nested boxes, the outer one ends last
        sentence = len(BOX.findall(answer)) == 1 and WORD.search(BOX.sub("", answer))
        return (extract_answer(answer) if sentence else answer) or None
    tail = text[-4000:].strip(" \n\t*")
    if phrases := list(PHRASE.finditer(tail)):
        line = SENTENCE_END.split(tail[phrases[-1].end():].strip().split("\n")[0])[0].strip(" *")
        found = FOUND.findall(line)
        alone = len(found) == 1 and (not found[0][3] or len(WORD.findall(line)) > 2)
        return "".join(found[0]).strip() if alone else line or None
    words = WORD.findall(tail[:300])
    if len(tail) < 300 and (not words or words == [tail]):
        return tail or None
    found = ["".join(groups).strip(" ,") for groups in FOUND.findall(tail[-1000:])]
    return next((item for item in reversed(found) if re.search("[0-9]", item)), None)


def _box(text, start):
    """(end, content) of the box that starts here; (-1, "") if it is empty or does not close."""
    depth, opening = 0, BOX.match(text, start)
    brace = re.compile(r"\\.|[{}]", re.S)
    for sign in brace.finditer(text, opening.end() - 1, start + 2 * MAX_ANSWER) if opening else ():
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            content = text[opening.end():sign.start()].strip()
            return (sign.end(), content) if content else (-1, "")
    return -1, ""


# Tokens: one spelling for each sign; upright and spelled-out words go into double quotes
SPELLINGS = {spelling: token for token, spellings in {
    "": r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle"
        r" \quad \qquad \limits \mathbf \boldsymbol \mathit \mathcal \mathsf \bold \bf \rm \boxed"
        r" \fbox \underline \large \Large \small",
    "-": "− – — ‐", "*": r"\cdot \times \ast × · ⋅ ∗ ∙", "/": r"\div ÷ ∕ ⁄ per", "^": "**",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant \leqq <= ⩽ ≦", "≠": r"\ne \neq !=",
    "≥": r"\ge \geq \geqslant \geqq >= ⩾ ≧", "≈": r"\approx ≃ ≅", "=": "==", ":": r"to \colon",
    "±": r"\pm", "∓": r"\mp", "∈": r"\in", "∪": r"\cup \bigcup", "∩": r"\cap", ",": "; or",
    "∖": r"\setminus \backslash", "|": r"\lvert \rvert \vert \mid \|", "∧": r"and \land \wedge",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "⟨": r"\langle",
    "⟩": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", r"\infty": "∞ infinity inf",
    r"\frac": r"\dfrac \tfrac \cfrac \sfrac \over", r"\binom": r"\dbinom \tbinom \choose",
    r"\sqrt": "√ sqrt", r"\emptyset": r"\varnothing ∅", r"\pi": "π pi", r"\theta": "θ",
    r"\alpha": "α", r"\beta": "β", r"\lambda": "λ", r"\phi": r"φ \varphi",
    **{"\\" + name: name for name in (
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp").split()},
}.items() for spelling in spellings.split()}
UNITS = {alias: names.split()[0] for names in (
    "cm centimeter centimetre", "m meter metre", "mm millimeter millimetre", "in inch inche",
    "km kilometer kilometre", "ft foot feet", "yd yard", "mi mile", "s sec second", "min minute",
    "h hr hour", "day", "wk week", "month mo", "yr year", "g gram", "kg kilogram kilo", "am", "pm",
    "mg milligram", "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre", "unit",
    r"$ \$ dollar usd", "¢ cent", "€ euro eur", "£ gbp", "¥", "₹", r"% \% percent", "rad radian",
    ) for alias in names.split()}
SHORT_WORDS = {"yes", "no", "odd", "red", "sq", "cu"}       # others are words from four letters
CHARACTERS = str.maketrans({
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "∛": r"\sqrt[3]",
    **{sign: rf"\frac{value} " for sign, value in {
        "½": 12, "⅓": 13, "⅔": 23, "¼": 14, "¾": 34, "⅕": 15, "⅛": 18}.items()}})


BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(),
                 range(2, 13), strict=True))
COUNTED = re.compile(r"(?:[0-9})/]|\b(?:sq|square|cu|cubic|per))\s*$")     # 5 km, but am + bn


def _upright(match):
    """A word of \\text{...}: the sign that it spells, or in quotes."""
    word = match[0]
    return SPELLINGS.get(word.lower(), word if word in ("i", "e") else f'"{word}"')


def _run(match):
    """A run of letters outside \\text: a word, or a product like xy."""
    word, lower, before = match[0], match[0].lower(), match.string[:match.start()]
    unit = lower.rstrip("s") in UNITS and (len(word) > 2 or COUNTED.search(before[-9:]))
    known = unit or lower in SPELLINGS or lower in SHORT_WORDS
    name = len(word) == 3 and (word.istitle() or word.isupper())
    return _upright(match) if known or name or len(word) > 3 else word


def _mixed(match):
    """1\\frac{4}{5} and 1 4/5 are sums, 2\\frac{5}{3} is a product."""
    whole, top, bottom = (part.strip("}") for part in match.groups() if part)
    proper = len(top) <= len(bottom) < 10 and int(top) < int(bottom)
    return f"({whole}{'+' if proper else '*'}{top}/{bottom})"


REWRITES = [(re.compile(pattern), target) for pattern, target in (
    (r"\\(?:text)?color\s*\{\w*\}", ""),
    (r"\\\\\s*\[-?[0-9.]+[a-z]{2}\]", r"\\\\"),                              # \\[4pt] in a matrix
    (r"(?:\\[!,]\s*)*(?:\{:\}|(?<!\\):)(?:\s*\\[!,])*", ":"),                # 4{:}30
    (r"\bmph\b", "miles per hour"),
    (r"\b([aApP])\.\s?([mM])\b\.?", r"\1\2"),                               # a.m.
    (r"\b(sq|cu|ft|in|hrs?|lbs?|oz|yd|mi)\.", r"\1"),
    (r"\\(?:text\w*|mathrm|mbox|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
     lambda match: re.sub(r"(?<![\\A-Za-z])[A-Za-z]+", _upright, f" {match[1]} ")),
    (r'(?<![\\A-Za-z"])[A-Za-z]{2,}(?!["A-Za-z])', _run),
    (r'"(?:sq|square)"\s*("[a-z]+")', r"\1^2"), (r'"(?:cu|cubic)"\s*("[a-z]+")', r"\1^3"),
    (r'\s*"thousand"', "*10^3"), (r'\s*"million"', "*10^6"), (r'\s*"billion"', "*10^9"),
    (r"\{([^{}]*)(\\over|\\choose)\b([^{}]*)\}", r"\2{\1}{\3}"),
    (r'(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\s*"degrees?"|°)(?:\s*"?([CF])\b"?)?',
     lambda match: f' "{match[1]}"' if match[1] else "° "),
    (r'("(?:day|hour|hr|minute|min|feet|foot|ft)s?")\s*∧', r"\1"),             # 2 hours and 5 min
    (r"(?<=[0-9])(?:,\\!|\{,\}|\\[, ]|\s)\s*(?=[0-9]{3}(?![0-9/]))", ""),     # 10,\!080  1{,}000
    (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", "*"),                                 # 1.2 x 10^5
    (r"(?<![\w^.])([0-9]+)\s*\\[dt]?frac\s*\{?([0-9](?:[0-9]*\})?)\}?\s*\{?([0-9](?:[0-9]*\})?)\}?"
     r"|(?<![\w^.])([0-9]+)\s+([0-9]+)/([0-9]+)", _mixed),
    (r'(?<=_)\s*\{?\s*"?([a-z]+)"?\s*\}?', lambda match: f"{BASES.get(match[1], match[0])}"),
    (r"[({]([0-9A-F]+)[)}]_", r"\1_"),                                       # {52}_8
    (r"\\mathbb\s*\{?R\}?|\\R\b", "ℝ"),
    (r'\\begin\s*\{"(?:small|[pb])?(?:matrix|array)"\}(?:\{[clr|"]*\})?(.*?)(?:\\\\\s*)?'
     r'\\end\s*\{"\w+"\}',      # a matrix is a row of rows
     lambda match: f"⟦⟦{match[1]}⟧⟧".replace("\\\\", "⟧,⟦").replace("&", ",")),
    (r"\\not\s*=", "≠"),
    (r"\{\}|^[\s=:]+|[\s.,;:\\]+$|(?<=^[A-J])\)$", ""),
)]
SUB = r"(?:_(?:\w|\{[^{}]*\}))?'*"
TOKEN = re.compile(rf"""
    \s | [~$] | \\[\s,!;:>()\[\]]                                       # space
    | ( (?<![0-9:])[0-9]{{1,2}}:[0-5][0-9](?![0-9:])                    # 12:30
      | (?<![0-9],)[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?(?![0-9]|,[0-9])
      | [0-9][0-9A-F.]*_(?:\w|\{{[^{{}}]*\}})                           # 52_8 stays a name
      | [0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{{?[0-9]+\}}?           # 0.1\overline{{6}}
      | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?
      | (?<![\\A-Za-z])[A-Za-z]{SUB}(?:\^\{{-1\}})?\([\w,"]+\)(?=\s*=)  # f(x) =
      | (?<![\\A-Za-z])[A-Z]+(?=\s*=) | (?:"[^"]*"\s*)+(?=\s*=)         # AB =, Area =
      | m?\\(?:vec|hat|overline|mathbb|angle|triangle)
        (?:\s*\{{?\s*"?[A-Za-z](?:_\{{?\w\}}?)?"?\s*\}}?)+
      | "[^"]*" | \\\\ | \\log | \\[A-Za-z]+{SUB} | \\. | [A-Za-z]{SUB} | [<>!=]= | \*\* | . )
    """, re.X | re.S)
UNIT = re.compile(rf"""(?:/\s*|\\cdot\s*)?
    (?:[€£¢¥₹%]|\\[$%]|"(?:{'|'.join(filter(str.isalpha, UNITS))})s?")
    (?:\s*\^\s*\{{?\s*-?[0-9]\s*\}}?)?(?:\s*/\s*[hsm]\b)?""", re.X | re.I)
APPLES = re.compile(        # a number and any noun
    r'^(?=.*[0-9])((?:\\[A-Za-z]+|\\[^A-Za-z]|[^A-Za-z"\\])*)'
    r'((?:\s*"(?:[A-Z]|[A-Za-z]{2,})")+)\s*$', re.S)
SYMBOL = re.compile(r'"([A-Z]|[A-Za-z]{2}|[a-z]*[A-Z][A-Za-z]?)"')     # a unit: MW is not mW


def _tokens(text):
    """(tokens, the units taken out of them, the text in one spelling)."""
    if len(text) > MAX_ANSWER or '"' in text:
        raise Refused
    text = text.translate(CHARACTERS)
    for pattern, target in REWRITES:
        text = pattern.sub(target, text)
    plain = " ".join(filter(None, TOKEN.findall(text))).replace('"', "").casefold()
    units = [re.sub(r"[a-z]+|\\?[$%]", lambda m: UNITS.get(m[0], UNITS.get(m[0].rstrip("s"), m[0])),
                    re.sub(r'[\s{}"]', "", unit.lower())) for unit in UNIT.findall(text)]
    text, tokens, depth = UNIT.sub(" ", text), [], 0
    if apples := APPLES.match(text):
        text, nouns = apples.groups()
        units += SYMBOL.findall(nouns)
    for token in TOKEN.findall(text):
        token = SPELLINGS.get(token, token)
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if token[:1].isdigit() and "," in token:        # 1,234, but (1,234) is a pair
            tokens += re.split("(,)", token) if depth > 0 else [token.replace(",", "")]
        elif token:
            tokens.append(token)
    if len(tokens) > MAX_TOKENS:
        raise Refused
    return tokens, sorted(units), plain


# Values: exact rationals, or trees that are never simplified
FUNCTIONS = {"\\ln": sympy.log, "\\lg": sympy.log, **{
    "\\" + re.sub("^a", "arc", name): getattr(sympy, name)
    for name in "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log".split()}}
CONSTANTS = {"\\pi": sympy.pi, "e": sympy.E, "i": sympy.I, "\\infty": sympy.oo,
             "\\emptyset": Node("{}", ())}
NAME = re.compile(r"""[A-Za-zℝ](?![A-Za-z]).*|[A-Z]+|[0-9][\w.]*[_:].*|"[^"]*".*|m?\\(?:vec|hat
    |overline|mathbb|angle|triangle|ell|(?:var)?epsilon|[Tt]heta|[Ll]ambda|[Gg]amma|[Dd]elta
    |[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega|alpha|beta|zeta|eta|kappa|mu|nu|xi|rho|tau|chi)(?![a-z]).*""",
    re.X | re.S)
REALS, ONE, TWO = sympy.Symbol("ℝ"), sympy.Integer(1), sympy.Integer(2)


def _kind(value):
    return value.kind if isinstance(value, Node) else "scalar"


def _bits(number):
    return max(number.p.bit_length(), number.q.bit_length()) if number.is_Rational else 1


def _apply(function, a, b=None):
    """function(a, b): exact where that is a rational of bounded size, else a tree."""
    args = (a,) if b is None else (a, b)
    if not all(isinstance(arg, sympy.Expr) for arg in args):
        raise Refused
    exact = function in (sympy.Add, sympy.Mul) and a.is_Number and b.is_Number
    if function is sympy.Pow and a.is_Rational and b.is_Integer:
        exact = abs(b) * _bits(a) <= MAX_BITS
    if function is sympy.factorial:
        exact = a.is_Integer and 0 <= a <= 3000
    value = function(*args) if exact else function(*args, evaluate=False)
    if value in (sympy.nan, sympy.zoo) or _bits(value) > MAX_BITS:
        raise Refused
    return value


def _times(a, b):
    if isinstance(a, Node) and isinstance(b, Node):
        raise Refused
    for one, other in ((a, b), (b, a)):
        if _kind(one) == "⟦⟧":
            return Node("⟦⟧", tuple(_times(item, other) for item in one.items))
    return _apply(sympy.Mul, a, b)


def _plus(a, b, sign=ONE):
    return _apply(sympy.Add, a, b if sign == 1 else _times(b, sign))


def _divide(a, b):
    return _times(a, _apply(sympy.Pow, b, -ONE))


def _binomial(n, k):
    n_, k_, rest = (_apply(sympy.factorial, x) for x in (n, k, _plus(n, k, -ONE)))
    return _divide(n_, _times(k_, rest))


def _number(text):
    text, _, repeating = text.partition("\\")
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(text) > 400 or len(exponent) > 5:
        raise Refused
    value = sympy.Rational(int(whole + decimals or 0), 10 ** len(decimals))
    if repeating := re.sub("[^0-9]", "", repeating):
        value += sympy.Rational(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(decimals))
    return _times(value, _apply(sympy.Pow, sympy.Integer(10), sympy.Integer(exponent or 0)))


def _join(kind, a, b):
    """a ∪ b; a : b : c."""
    return Node(kind, (a.items if kind == _kind(a) == ":" else (a,)) + (b,))


RELATIONS = {"=": "=", "≈": "≈", "∈": "∈", "≠": "≠", "<": "<", "≤": "≤", ">": "<", "≥": "≤"}
OPERATORS = {   # binding power, meaning
    **{sign: (2, partial(_join, sign)) for sign in "∪∩∖"}, ":": (3, partial(_join, ":")),
    "+": (4, _plus), "-": (4, partial(_plus, sign=-ONE)), "*": (5, _times), "/": (5, _divide),
    "^": (7, partial(_apply, sympy.Pow))}
CLOSING = {"(": ")]", "[": "])", "\\{": ["\\}"], "{": "}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩", "|": "|",
           "⟦": "⟧"}
ROUND = {"|": sympy.Abs, "⌊": sympy.floor, "⌈": sympy.ceiling}


class Parser:
    """Operator-precedence parser over one answer's tokens."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, "", ""], 0, 0
        self.bars = self.angle = self.degrees = False   # in |...|; in sin(...); a ° elsewhere

    next = property(lambda self: self.tokens[self.at])

    def accept(self, wanted):
        token = self.next if self.next and self.next in wanted else ""
        self.at += bool(token)
        return token

    def listing(self):
        """item {"," item}; the conditions in "x > 2 and x < 5" hold together."""
        items, joints = [self.item()], set()
        while joint := self.accept(",∧"):
            joints.add(self.accept("∧") or joint)
            items.append(self.item())
        if len(items) > MAX_ITEMS:
            raise Refused
        both = joints == {"∧"} and all(_kind(item) in "<≤≠" for item in items)
        return items[0] if len(items) == 1 else Node("∩" if both else ",", tuple(items))

    def item(self):
        """a < b < c is two relations, a = b = c is a = c, and 10/3 ≈ 3.33 is 10/3."""
        sides, signs = [self.expression()], []
        while sign := self.accept(RELATIONS):
            signs.append(sign)
            sides.append(self.expression())
        if "≈" in signs:
            keep = signs.index("≈") or int(getattr(sides[0], "is_Symbol", False))
            signs, sides = ["="] * keep, sides[:keep + 1]
        if set(signs) == {"="}:
            return Node("=", (sides[0], sides[-1]))
        links = [Node(RELATIONS[sign], pair[::-1] if sign in ">≥" else pair)
                 for sign, pair in zip(signs, itertools.pairwise(sides), strict=True)]
        return [*links, sides[0]][0] if len(links) < 2 else Node("∩", tuple(links))

    def expression(self, floor=0):
        left = self.prefix()
        while True:
            token = self.next
            implicit = (5, _times) if self.starts_factor() else (0, None)
            power, build = OPERATORS.get(token, implicit)
            if self.accept("!") and self.next != "!":
                left = _apply(sympy.factorial, left)
            elif self.accept("°"):
                self.degrees |= not self.angle
                left = _times(left, sympy.pi / 180) if self.angle else left
            elif power <= floor:
                return left
            else:
                self.at += token in OPERATORS
                before, after = self.tokens[self.at - 1], self.tokens[self.at + 1]
                if token[0] in ".0123456789" and before not in (")", "!") and not (
                        before.isalpha() and after == "^"):
                    raise Refused       # 2 3 is not 6, but n2^n is n * 2^n
                left = build(left, self.expression(power - (token == "^")))

    def starts_factor(self):
        token = self.next
        return token[:1].isalnum() or token[:1] in (".", "\\") and token != "\\}" or (
            token in CLOSING and not (token == "|" and self.bars))

    def prefix(self):
        token = self.next
        self.at += 1
        if token in ("+", "-"):
            return _times(self.expression(6), -ONE if token == "-" else ONE)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in CLOSING:
            return self.group(token)
        if token in FUNCTIONS:
            return self.call(token)
        if token in ("\\frac", "\\binom"):
            build = _divide if token == "\\frac" else _binomial
            return build(self.argument(), self.argument())
        if token == "\\sqrt":
            index = self.group("[") if self.accept("[") else TWO
            return _apply(sympy.Pow, self.prefix(), _divide(ONE, index))
        if NAME.fullmatch(token) and (token[0] != '"' or self.next == "=" or len(token) == 3):
            return sympy.Symbol(re.sub(r'[{}"\s]|^0(?=[0-9]:)', "", token))
        if token[:1] in (".", *"0123456789"):
            return _number(token)
        raise Refused

    def argument(self):
        """What \\frac takes: a group or a token, of a number one digit: \\frac12."""
        token = self.next
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return _number(token[0])
        return self.prefix()

    def group(self, opening):
        outer, self.bars, self.depth = self.bars, opening == "|", self.depth + 1
        if opening == "\\{" and self.tokens[self.at + 1] in ("|", ":"):     # {x : x > 2}
            self.at += 2
        value = Node(",", ()) if opening + self.next == "\\{\\}" else self.listing()
        closing = self.accept(CLOSING[opening])
        if not closing or self.depth > MAX_DEPTH:
            raise Refused
        self.bars, self.depth = outer, self.depth - 1
        if opening in ROUND:
            return _apply(ROUND[opening], value)
        pair = (opening + closing).replace("\\", "")
        if _kind(value) == ",":
            return Node(pair, value.items)
        if opening in ("\\{", "⟦") and _kind(value) not in "<≤≠∩":
            return Node(pair, (value,))
        if pair not in ("()", "[]", "{}"):
            raise Refused
        return value

    def call(self, token):
        """\\sin^2 x, \\log_2 8, \\cos 2x: up to the next function, bracket or sign."""
        base = sympy.Integer(10) if token == "\\lg" else None
        base = self.argument() if self.accept("_") else base
        exponent = self.expression(6) if self.accept("^") else ONE
        if exponent == -1 and "\\arc" + token[1:] in FUNCTIONS:
            token, exponent = "\\arc" + token[1:], ONE
        outer, self.angle, bracket = self.angle, True, self.next in CLOSING
        x = self.prefix() if bracket else self.expression(6)
        while not bracket and self.starts_factor() and self.next not in (*FUNCTIONS, *CLOSING):
            x = _times(x, self.expression(6))
        if self.accept("°"):
            x = _times(x, sympy.pi / 180)
        self.angle = outer
        value = _apply(FUNCTIONS[token], x)
        value = value if base is None else _divide(value, _apply(sympy.log, base))
        return value if exponent == 1 else _apply(sympy.Pow, value, exponent)


def _readings(tokens):
    """The tokens with either sign for each \\pm; a \\mp runs against all of them."""
    count = 1 if "∓" in tokens else tokens.count("±")
    if count > 2:
        raise Refused
    for signs in itertools.product("+-", repeat=count):
        sign = itertools.cycle(signs)
        yield [next(sign) if token == "±" else "+-"[signs[0] == "+"] if token == "∓" else token
               for token in tokens]


@lru_cache(512)
def _parse(text):
    """(value or None, units, the string to compare where there is no value)."""
    plain, values = text, []
    try:
        tokens, units, plain = _tokens(text)
        for reading in _readings(tokens):
            parser = Parser(reading)
            values.append(parser.listing())
            units = units or ["°"] * parser.degrees
            if parser.next:
                raise Refused
    except Exception:   # Refused, or whatever sympy raises on what it was given
        return None, [], plain
    if len(values) == 1:
        return values[0], units, plain
    kind = "{}" if _kind(values[0]) == "{}" else ","
    items = [value.items if _kind(value) in ("{}", ",") else [value] for value in values]
    return Node(kind, tuple(dict.fromkeys(itertools.chain(*items)))), units, plain


# Comparison
NUMERIC = {     # what a tree may hold besides rationals and symbols, and how it is evaluated
    sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1), sympy.ceiling: MP.ceil,
    **{getattr(sympy, name): getattr(MP, name) for name in (
        "sin cos tan asin acos atan sinh cosh tanh exp log floor factorial").split()},
    sympy.cot: lambda x: 1 / MP.tan(x), sympy.sec: lambda x: 1 / MP.cos(x), sympy.Abs: abs,
    sympy.csc: lambda x: 1 / MP.sin(x), sympy.Pow: lambda x, y: x ** y,
    sympy.Add: lambda *x: sum(x), sympy.Mul: lambda *x: math.prod(x)}


def _evaluate(expr, point):
    """expr at a point, to 100 digits; Refused where the value or its exponent is too large."""
    if expr.is_Rational:
        return MP.mpf(expr.p) / expr.q
    if expr in point or expr in NUMERIC:
        return MP.mpf(point[expr]) if expr in point else NUMERIC[expr]
    x, *y = values = [_evaluate(arg, point) for arg in expr.args]
    if expr.is_Pow:
        if x and abs(y[0]) * (abs(MP.mag(x)) + 1) > MAX_BITS:
            raise Refused
        odd = expr.exp.is_Rational and expr.exp.q % 2       # cube roots are real
        if odd and isinstance(x, MP.mpf) and x < 0:
            return (-1) ** (expr.exp.p % 2) * (-x) ** y[0]
    elif not (expr.is_Add or expr.is_Mul) and abs(x) > 10**5:
        raise Refused
    value = NUMERIC[expr.func](*values)
    if not MP.isfinite(value) or value and MP.mag(value) > MAX_BITS:
        raise Refused
    return value


def _points(*exprs):
    """Two scattered points, each symbol with either sign; integers where a floor asks for them."""
    symbols = sorted(set().union(*(expr.free_symbols for expr in exprs)), key=str)
    if any(expr.has(sympy.floor, sympy.ceiling) for expr in exprs):
        return [{symbol: n + 3 * k for k, symbol in enumerate(symbols)} for n in range(2, 40)]
    # powers modulo a prime: in a regular pattern, x - 1 = f(x) and n + 1 = k were proportional
    return [{symbol: sign * (-1) ** k * (1 + MP.mpf(pow(11, 9 * k + sign + 7, 1009)) / 1009)
             for k, symbol in enumerate(symbols)} for sign in ([1, -1] if symbols else [1])]


def _close(a, b):
    return abs(a - b) <= max(abs(a), abs(b), 1 if a == 0 or b == 0 else 0) * MP.mpf(10) ** -75


def _equal(a, b):
    """Scalars: exactly where both are rational, else to 75 digits."""
    if a == b or a.is_Number and b.is_Number or {a, b} & {sympy.oo, -sympy.oo}:
        return a == b       # inf <= inf * tolerance is true: infinities never get to the digits
    return all(_close(_evaluate(a, point), _evaluate(b, point)) for point in _points(a, b))


def _proportional(a, b):
    """Relations: left minus right side in a constant proportion, for < and ≤ a positive one."""
    a_, b_ = (_plus(*node.items, sign=-ONE) for node in (a, b))
    values = [(_evaluate(a_, point), _evaluate(b_, point)) for point in _points(a_, b_)]
    x, y = max(values, key=lambda pair: abs(pair[1]))
    if not x or not y or a.kind in "<≤" and not (MP.im(x / y) == 0 and MP.re(x / y) > 0):
        return False
    return all(_close(one * y, other * x) for one, other in values)


def _end(value):
    """A break point of a region, rounded so that equal ones are identical."""
    if isinstance(value, MP.mpc):
        raise Refused
    return MP.nint(value * 10**50) / 10**50


INFINITE = {sympy.oo: MP.inf, -sympy.oo: -MP.inf}
COMBINE = {"∪": any, ",": any, "∩": all, "∖": lambda inside: inside[0] and not inside[1]}


def _region(node):
    """(symbols, break points, membership test) of an interval, union, linear inequality ..."""
    kind, items = node if isinstance(node, Node) else (node, ())
    if kind == REALS:
        return set(), set(), lambda x: True
    if kind in ("()", "(]", "[)", "[]", "{}"):
        ends = [INFINITE[x] if x in INFINITE else _end(_evaluate(x, {})) for x in items]
        if kind == "{}":
            return set(), set(ends), lambda x: x in ends
        closed = [ends[k] for k in (0, -1) if kind[k] in "[]"]
        if len(ends) == 2 and ends[0] < ends[1] and not any(map(MP.isinf, closed)):
            return set(), set(ends), lambda x: ends[0] < x < ends[1] or x in closed
    elif kind == "∈":
        return {items[0]}, *_region(items[1])[1:]
    elif kind in COMBINE and (kind != "," or all(_kind(item) in "<≤≠∩" for item in items)):
        symbols, points, tests = zip(*map(_region, items), strict=True)
        return set().union(*symbols), set().union(*points), (
            lambda x: COMBINE[kind]([test(x) for test in tests]))
    elif kind in ("<", "≤") and any(isinstance(item, sympy.Abs) for item in items):
        if isinstance(items[0], sympy.Abs):     # |x| < c: -c < x and x < c
            joint, (x,), c = "∩", items[0].args, items[1]
            ends = (_times(c, -ONE), x), (x, c)
        else:                                   # c < |x|: x < -c or c < x
            joint, (x,), c = "∪", items[1].args, items[0]
            ends = (x, _times(c, -ONE)), (c, x)
        return _region(Node(joint, tuple(Node(kind, pair) for pair in ends)))
    elif kind in ("<", "≤", "≠"):
        difference = _plus(*items, sign=-ONE)
        symbols = difference.free_symbols
        at = [_evaluate(difference, dict.fromkeys(symbols, n)) for n in range(4)]
        slope = at[1] - at[0]
        if len(symbols) == 1 and slope and all(
                _close(b - a, slope) for a, b in itertools.pairwise(at)):
            root = _end(-at[0] / slope)
            return symbols, {root}, lambda x: (
                x != root if kind == "≠" else slope * (x - root) < 0 or kind == "≤" and x == root)
    raise Refused


def _same_region(a, b):
    """Membership agrees at each break point, between them and beyond them."""
    (x, points, inside), (y, more, within) = _region(a), _region(b)
    ends = sorted(point for point in points | more | {MP.zero} if not MP.isinf(point))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    tests = [ends[0] - 1, *ends, *middles, ends[-1] + 1]
    return len(x | y) < 2 and all(inside(test) == within(test) for test in tests)


def _bare(node):
    """A value without its label: x = 5 is 5, x \\in \\{1, 2\\} the set, 3:4 a fraction."""
    pair = isinstance(node, Node) and len(node.items) == 2
    kind, (left, right) = node if pair else ("", (0, 0))
    if kind == "=":
        names = left.items if _kind(left) == "()" else (left,)
        if all(getattr(name, "is_Symbol", False) for name in names) or not left.free_symbols:
            return right
        return left if getattr(right, "is_Symbol", False) else node
    if kind == "∈" and _kind(right) == "{}":
        return right
    return _divide(left, right) if kind == ":" else node


def _matched(items, others, repeats):
    """Each item equals one of the others; where repeats count, each a different one."""
    others = list(others)
    for item in items:
        index = next((k for k, other in enumerate(others) if _same(item, other)), None)
        if index is None:
            return False
        if repeats:
            del others[index]
    return not (repeats and others)


def _same(a, b):
    """Whether two parsed values are equal; the policy is at the top of this section."""
    if _kind(a) != _kind(b):
        a, b = _bare(a), _bare(b)
    kind, kinds = _kind(a), {_kind(a), _kind(b)}
    if kinds == {"scalar"}:
        return _equal(a, b)
    if kinds & {",", "{}"} and not kinds & set("∪∩∖∈<≤≠"):
        items, others = (v.items if _kind(v) in (",", "{}") else (v,) for v in (a, b))
        if "{}" in kinds:
            return _matched(items, others, False) and _matched(others, items, False)
        return _matched(items, others, True)
    if kinds == {":"}:
        a, b = (Node("()", tuple(_divide(x, v.items[0]) for x in v.items)) for v in (a, b))
    if len(kinds) == 1 and kind not in "∪∩∖∈<≤≠":
        if kind == "=" and not any(isinstance(side, Node) for side in a.items + b.items):
            return _proportional(a, b)
        return len(a.items) == len(b.items) and all(map(_same, a.items, b.items))
    try:
        return _same_region(a, b)
    except Refused:
        if len(kinds) > 1 or kind in "∪∖∈":
            return False
        return _matched(a.items, b.items, True) if kind == "∩" else _proportional(a, b)


CHOICE = re.compile(        # (C) 42
    r"(?:\\text\w*\s*\{\s*)?\(([A-J])\)\s*\}?(?:\\[ ,;]|[\s:.])*(?=[^\s}])"
    r"(?!.*\([A-J]\))(.+)", re.S)


def grade(response, gold) -> str:
    """"correct", "wrong", "unparsed" (differs, but only strings could be compared) or "missing".

    Total: any input, in bounded time, and nothing of it is evaluated as code.
    """
    answer = extract_answer(response)
    if not answer or not isinstance(gold, str) or not gold.strip():
        return "missing"
    if "\\boxed" in gold or "####" in gold:
        gold = extract_answer(gold) or gold
    if len(answer) <= MAX_ANSWER and answer.strip() == gold.strip():
        return "correct"
    if choice := CHOICE.match(answer):
        letter = re.fullmatch(r"\W*(?:text\w*)?\W*[A-J]\W*", gold)
        answer = choice[1 if letter else 2].strip(" }")
    (value, units, plain), (target, other, wanted) = _parse(answer), _parse(gold)
    if value is None or target is None:
        equal = sorted(plain.split(" , ")) == sorted(wanted.split(" , "))
        return "correct" if equal else "unparsed"
    try:
        compatible = not (units and other) or units == other
        return "correct" if compatible and _same(value, target) else "wrong"
    except Exception:   # a pole, or a number too large to evaluate
        return "unparsed"


def is_correct(response, gold) -> bool:
    """The reward: whether the response's final answer equals the gold one. Never raises."""
    return grade(response, gold) == "correct"


_POOL, _POOL_LOCK = [], threading.Lock()


def grade_batch(responses, golds, processes=4, patience=20.0, grader=grade) -> list[str]:
    """Verdicts of a batch; a large one in worker processes, from any thread.

    A last line behind the checker's own bounds: a pair whose worker is silent for `patience`
    seconds, hanging or dead, counts as "timeout", hence wrong, and the workers are replaced.
    """
    pairs = list(zip(responses, golds, strict=True))
    if len(pairs) < 1024 and grader is grade:     # at 0.2 ms each, workers would start too late
        return list(itertools.starmap(grade, pairs))
    verdicts = [None] * len(pairs)
    with _POOL_LOCK:
        while None in verdicts:
            if not _POOL:
                spawn = multiprocessing.get_context("spawn")    # a fork would copy CUDA and threads
                _POOL.append(spawn.Pool(processes, initializer=grader, initargs=("", "")))
                atexit.register(_POOL[0].terminate)
                _POOL[0].apply(len, ("",))      # waits for the imports: they are not a hang
            results = {k: _POOL[0].apply_async(grader, pairs[k])
                       for k, verdict in enumerate(verdicts) if verdict is None}
            for k, result in results.items():   # first in, first out: the one awaited has started
                try:
                    verdicts[k] = result.get(patience)
                except multiprocessing.TimeoutError:
                    verdicts[k] = "timeout"
                    _POOL.pop().terminate()
                    break
    return verdicts


# --------------------------------------------------------------------------------------------------
# GRPO


def group_advantages(rewards, std=False):
    """rewards (prompts, G) -> advantages (prompts, G): reward minus the group's mean (Dr. GRPO,
    arXiv 2503.20783); std=True also divides by the group's standard deviation (GRPO, arXiv
    2402.03300)."""
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    return advantages


def grpo_loss(logprobs, old_logprobs, advantages, mask, n_tokens, clip=(0.2, 0.28),
              rollout_logprobs=None, tis_cap=2.0):
    """The clipped surrogate (PPO), summed over tokens and divided by n_tokens (DAPO, arXiv
    2503.14476).

    All tensors have one shape, e.g. (1, T) packed; mask is 1 on response tokens. n_tokens counts
    the response tokens of the whole batch, over micro-batches and ranks. On the first update of a
    batch old_logprobs == logprobs, so the ratio is 1 and only its gradient is left.
    rollout_logprobs: what the sampler said; tokens are then weighted by
    min(p_old / p_rollout, tis_cap), truncated importance sampling against the mismatch of the bf16
    rollout copy.
    """
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages,
                              ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if rollout_logprobs is not None:
        surrogate = surrogate * (old_logprobs - rollout_logprobs).exp().clamp(max=tis_cap)
    return -(surrogate * mask).sum() / n_tokens


def overlong_penalty(length, limit, buffer):
    """DAPO's soft penalty: 0 up to limit - buffer tokens, then linear to -1 at the limit."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0


# --------------------------------------------------------------------------------------------------
# rollouts


@dataclass
class Episode(Rollout):
    """A rollout, its text, the checker's verdict on it and the reward."""

    text: str
    verdict: str
    reward: float


def roll_out(model, tokenizer, questions, seeds, args, temperature, label):
    """questions [(prompt ids, gold)] -> one Episode each; a truncated response earns 0."""
    rollouts = generate(model, [prompt for prompt, _ in questions], args.max_new_tokens,
                        temperature, tokenizer.stop_ids, args.slots, seeds, n_ids=tokenizer.n_ids,
                        progress=label)
    texts = [tokenizer.decode(r.tokens) for r in rollouts]
    verdicts = grade_batch(texts, [gold for _, gold in questions])
    return [Episode(**vars(r), text=text, verdict=verdict,
                    reward=float(verdict == "correct" and r.finished))
            for r, text, verdict in zip(rollouts, texts, verdicts)]


def rollout_copy(trainer):
    """The model that generates: on one CPU the trained one itself, else a full copy (bf16 on a
    GPU)."""
    if trainer.device.type == "cpu" and WORLD == 1:
        return trainer.model
    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    with trainer.device:
        return Transformer(trainer.model.config).to(dtype)


@torch.no_grad()
def refresh(copy, model):
    """The trained weights into the rollout copy; under FSDP every rank gathers, tensor by
    tensor."""
    if copy is not model:
        for target, source in zip(copy.parameters(), model.parameters()):
            target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


# --------------------------------------------------------------------------------------------------
# the RL run

SETTINGS = {  # flag: (tiny, a real model on a CPU: a rehearsal, a real model on a GPU; what it is)
    "window": convert_sft.SETTINGS["window"],
    "steps": (40, 2, 500, "RL steps, one rollout batch each"),
    "hours": (0.0, 0.0, 0.0,
              "stop after these hours of the run, 0: no limit (for equal-time comparisons)"),
    "prompts": (16, 2, 32, "prompts a step"),
    "group": (8, 4, 8, "answers sampled for each prompt, G"),
    "max_new_tokens": (140, 128, 8192, "tokens of a response; a truncated one earns 0"),
    "lr": (7e-4, 1e-6, 1e-6, "learning rate, constant after warm-up"),
    "warmup": (3, 1, 5, "steps of linear warm-up"),
    "temperature": (1.0, 1.0, 1.0,
                    "of sampling and of the policy that is trained; no top-k or top-p"),
    "updates": (1, 1, 1, "optimizer updates a rollout batch; the clip wakes above 1"),
    "validate": (512, 4, 128, "held-out problems for the accuracy before and after RL"),
    "save_every": (1, 1, 1, "steps between checkpoints; kill -9 loses at most these"),
    "data": ("tiny", "openai/gsm8k:main", "BytedTsinghua-SIA/DAPO-Math-17k",
             "JSONL file or hub id[:config[:split]]"),
    "sft_data": convert_sft.SETTINGS["data"][:3] + (
        "data of stage 1; with a JSONL file in --data, that file",),
    "sft_steps": convert_sft.SETTINGS["steps"][:3] + (
        "steps of stage 1, which runs if its checkpoint is missing",),
    "instruction": convert_sft.SETTINGS["instruction"],
    "micro_tokens": convert_sft.SETTINGS["micro_tokens"],
}
HELD_OUT = 5  # percent of the problems, by a hash: never trained on, used for validation


def questions_of_step(args, tokenizer, problems, step, attempt=0):
    """This rank's ([(prompt, gold)], seeds) of a step, each prompt G times: a function of the seed
    and the step alone, whatever the number of ranks."""
    if problems is None:
        chosen = tiny_problems(args.prompts, [args.seed, 7, step, attempt])
    else:
        chosen = draw(problems, (step + attempt * args.steps) * args.prompts, args.prompts,
                      [args.seed, 8])
    rng = np.random.default_rng([args.seed, 9, step, attempt])
    seeds = rng.integers(2**62, size=(args.prompts, args.group))
    questions = [(as_prompt(tokenizer, p["problem"], args.instruction), p["answer"])
                 for p in chosen]
    repeated = [q for q in questions[RANK::WORLD] for _ in range(args.group)]
    return repeated, seeds[RANK::WORLD].flatten().tolist()


def informative(rewards):
    """Which groups of rewards (prompts, G) disagree: only these carry a gradient."""
    return (rewards != rewards[:, :1]).any(-1)


def train_rl(args, start):
    """GRPO from the model in folder `start`; returns the run's folder, done already or now."""
    folder, device, G = stage_folder(args, "rl"), pick_device(args.device), args.group
    model = Transformer.from_pretrained(start, device=device, dtype=torch.float32)
    if model.config.window != as_window(args.window):
        raise UsageError(f"{start} has window {model.config.window}, not {args.window}: "
                         "give its window, or another --out")
    tokenizer = Tokenizer(model.tokenizer_files)
    problems = None if args.data == "tiny" else \
        [p for p in load_problems(args.data) if not held_out(p["problem"], HELD_OUT)]
    same = ("window", "prompts", "group", "max_new_tokens", "lr", "warmup", "temperature",
            "updates", "data", "instruction", "seed", "adv_std", "min_informative",
            "overlong_buffer", "tis_cap")
    settings = {"stage": "rl", **{name: getattr(args, name) for name in same}}
    trainer = Trainer(model, folder, settings, device, micro_tokens=args.micro_tokens,
                      wandb=args.wandb)
    sampler = rollout_copy(trainer)

    def out_of_time():
        return args.hours and trainer.elapsed() > args.hours * 3600

    def sample_step(step, attempt):
        """Episodes and their rewards (prompts, G)."""
        label = f"step {step + 1}: roll out" if RANK == 0 else None
        questions, seeds = questions_of_step(args, tokenizer, problems, step, attempt)
        episodes = roll_out(sampler, tokenizer, questions, seeds, args, args.temperature, label)
        penalties = [overlong_penalty(len(e.tokens), args.max_new_tokens, args.overlong_buffer)
                     for e in episodes]
        rewards = [e.reward + p for e, p in zip(episodes, penalties)]
        return episodes, torch.tensor(rewards).view(-1, G)

    if trainer.done(args.steps) or (out_of_time() and trainer.done(1)):
        return folder
    trainer.begin()
    while trainer.step < args.steps:
        # roll out
        step, began = trainer.step, time.time()
        refresh(sampler, trainer.model)
        episodes, rewards = sample_step(step, 0)
        # dynamic sampling (DAPO): more prompts until enough groups disagree
        for attempt in range(1, 4):
            if all_sum([informative(rewards).sum().item()], device)[0] >= args.min_informative:
                break
            more = sample_step(step, attempt)
            episodes, rewards = episodes + more[0], torch.cat((rewards, more[1]))
        rollout_seconds = time.time() - began

        # learn: groups that agree have advantage 0 throughout, so they are left out but stay in
        # n_tokens
        useful, advantages = informative(rewards), group_advantages(rewards, args.adv_std)
        rows = [make_row(e.prompt, e.tokens, advantage=[a] * len(e.tokens),
                         mask=[1.0] * len(e.tokens), rollout_logprobs=e.logprobs)
                for e, a, u in zip(episodes, advantages.flatten().tolist(),
                                   useful.repeat_interleave(G)) if u]
        n_tokens, n_useful = all_sum(
            [sum(len(e.tokens) for e in episodes), useful.sum().item()], device)
        sums = {"logp_gap": 0.0, "tokens": 0.0}

        def loss_fn(logprobs, m):
            old = m.get("old_logprobs", logprobs.detach())
            sums["logp_gap"] += (
                (logprobs.detach() - m["rollout_logprobs"]).abs() * m["mask"]).sum().item()
            sums["tokens"] += m["mask"].sum().item()
            return grpo_loss(logprobs, old, m["advantage"], m["mask"], n_tokens,
                             rollout_logprobs=m["rollout_logprobs"] if args.tis_cap else None,
                             tis_cap=args.tis_cap)

        lr, norm, update_began = schedule(step, args.steps, args.lr, args.warmup), 0.0, time.time()
        if n_useful and args.updates > 1:
            trainer.add_logprobs(rows, "old_logprobs", args.temperature)
        for _ in range(args.updates if n_useful else 0):
            norm = trainer.update(rows, loss_fn, lr, args.temperature)
        seconds, update_seconds = time.time() - began, time.time() - update_began

        # log
        kinds = ("correct", "unparsed", "missing", "timeout")
        n, groups, reward, truncated, solved, surprise, gap, tokens, *counts = all_sum(
            [len(episodes), len(rewards), rewards.sum().item(),
             sum(not e.finished for e in episodes), (rewards > 0).any(-1).sum().item(),
             -sum(sum(e.logprobs) for e in episodes), *sums.values(),
             *(sum(e.verdict == k for e in episodes) for k in kinds)], device)
        record = {
            "reward": reward / n, f"pass@{G}": solved / groups, "length": n_tokens / n,
            "truncated": truncated / n, "entropy": surprise / n_tokens,
            "logp_gap": gap / max(tokens, 1), "grad_norm": norm, "lr": lr,
            "groups": groups, "informative": n_useful, **dict(zip(kinds, counts)),
            "tok_per_s": n_tokens / rollout_seconds,
            "update_tok_per_s": tokens / max(update_seconds, 1e-9),
            "rollout_seconds": rollout_seconds, "update_seconds": update_seconds,
            "seconds": seconds}
        trainer.log(record, f"rl w={args.window} step {step + 1}/{args.steps} | "
                            f"reward {reward / n:.3f} | len {n_tokens / n:.0f} | "
                            f"ent {record['entropy']:.2f} | norm {norm or 0:.3f} | lr {lr:.1e} | "
                            f"{seconds:.1f} s | {record['tok_per_s']:,.0f} tok/s"
                            + " | all agree" * (not n_useful))
        if RANK == 0:
            with open(folder / "episodes.txt", "a", encoding="utf-8") as f:
                for e in (episodes[0], episodes[-1]):
                    f.write(f"--- step {step + 1} | reward {e.reward:g} | {e.verdict} | "
                            f"{len(e.tokens)} tokens\n"
                            f"{tokenizer.decode(e.prompt)}\n>>> {e.text}\n")
        last = trainer.step >= args.steps or trainer.agreed(out_of_time())
        stop = trainer.agreed(trainer.stopping)
        if last or stop or trainer.step % args.save_every == 0:
            trainer.save(final=last)
        if stop and not last:
            raise KeyboardInterrupt
        if last:
            break
    return folder


# --------------------------------------------------------------------------------------------------
# validation, and the whole recipe


def resample(scores, n=2000, seed=0, stream=0):
    """scores (P problems, R repeats) -> n bootstrap means: problems drawn by seed, repeats by
    (seed, stream).

    Two models with one seed and different streams thus draw the same problems: a paired bootstrap.
    """
    scores = np.asarray(scores, float)
    P, R = scores.shape
    problem = np.random.default_rng([seed, 0]).integers(P, size=(n, P))
    repeats = np.random.default_rng([seed, 1, stream])
    return sum(scores[problem, repeats.integers(R, size=(n, P))].mean(1) for _ in range(R)) / R


def interval(draws, level=0.95):
    return [float(x) for x in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])]


def bootstrap_ci(scores, level=0.95, seed=0):
    """scores (problems, repeats) -> (mean, low, high): percentile bootstrap over problems and,
    within each, repeats (the paper's intervals are over 8 to 32 repeats of a benchmark)."""
    return float(np.mean(scores)), *interval(resample(scores, seed=seed), level)


def validation_problems(args):
    """Held-out problems: the same before and after RL and for every arm."""
    if args.data == "tiny":
        return tiny_problems(args.validate, [args.seed, 10], test=True)
    problems = [p for p in load_problems(args.data)
                if held_out(p["problem"], HELD_OUT)][:args.validate]
    if not problems:
        raise UsageError(f"--data {args.data} is too small to hold out problems for validation: "
                         "give more problems")
    return problems


def validate(folder, args):
    """Held-out accuracy of a stage's model, greedy and at T=1, kept in its folder ->
    {"greedy", "T=1"}: scores (n, 1), mean length in tokens, truncated share, restatements (opened
    brackets) a response."""
    path = folder / "validation.json"
    of = [args.data, args.validate, args.max_new_tokens, args.seed]
    if path.exists() and path.stat().st_mtime > (folder / "model.safetensors").stat().st_mtime:
        found = read_json(path)
        if found["of"] == of:
            return found
    model = Transformer.from_pretrained(folder, device=pick_device(args.device))
    tokenizer, found = Tokenizer(model.tokenizer_files), {"of": of}
    questions = [(as_prompt(tokenizer, p["problem"], args.instruction), p["answer"])
                 for p in validation_problems(args)]
    for name, temperature in (("greedy", 0.0), ("T=1", 1.0)):
        episodes = roll_out(model, tokenizer, questions, 10**6 + args.seed, args, temperature,
                            f"validate {name}:")
        found[name] = {"scores": [[int(e.reward)] for e in episodes],
                       "length": float(np.mean([len(e.tokens) for e in episodes])),
                       "truncated": float(np.mean([not e.finished for e in episodes])),
                       "restatements": float(np.mean([e.text.count("[") for e in episodes]))}
    write_file(path, lambda f: f.write_text(json.dumps(found)))
    return found


def run_arm(args):
    """Stage 1 if its checkpoint is missing, then stage 2; both validated ->
    {"sft": ..., "rl": ...}."""
    sft = stage_folder(args, "sft")
    if not (sft / "config.json").exists():
        convert(other_stage(args, convert_sft.SETTINGS, window=args.window,
                            instruction=args.instruction, micro_tokens=args.micro_tokens,
                            steps=args.sft_steps, data=args.sft_data))
    before = validate(sft, args) if RANK == 0 else None
    rl = train_rl(args, sft)
    return {"sft": before, "rl": validate(rl, args) if RANK == 0 else None}


def tiny_recipe(args):
    """Both arms, SA (window full) and SWA, side by side in a process each; then the table and the
    picture."""
    began = time.time()
    if WORLD > 1:
        raise UsageError("--model tiny compares two arms in a process each: "
                         "start it without torchrun, or with --window full")
    convert_sft.pretrain_tiny(args)
    sa = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--window", "full"],
                          stdin=subprocess.PIPE, env={**os.environ, "NANOSWARR_ARM": "SA"})
    try:
        swa = run_arm(args)
    finally:
        code = sa.wait()
    if code:
        raise UsageError("the full-attention arm stopped early (see above): "
                         "the same command continues")
    full = argparse.Namespace(**{**vars(args), "window": "full"})
    arms = {"SA": {stage: validate(stage_folder(full, stage), full) for stage in ("sft", "rl")},
            "SWA": swa}
    cells, summary = {}, {}
    for arm, stages in arms.items():
        for stage, found in stages.items():
            cells[arm, stage] = {t: bootstrap_ci(found[t]["scores"]) for t in ("greedy", "T=1")}
            summary[f"{arm.lower()}_{stage}"] = cells[arm, stage]["T=1"][0]
    print(f"\nheld-out accuracy, n = {args.validate}, 95 % bootstrap intervals, "
          f"window {args.window}, seed {args.seed}\n\n"
          "| model | greedy | T=1 | length | restatements |\n|---|---|---|---|---|")
    for (arm, stage), row in cells.items():
        text = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[t]) for t in row)
        t1 = arms[arm][stage]["T=1"]
        print(f"| {arm}-{stage.upper()} | {text} | {t1['length']:.1f} | {t1['restatements']:.2f} |")
    picture = Path(args.out) / "tiny" / f"recipe-w{args.window}.png"
    runs = {"SA": stage_folder(full, "rl"), "SWA": stage_folder(args, "rl")}
    draw_recipe(picture, cells, runs, args)
    print(f"\npicture: {picture}")
    seconds = round(time.time() - began, 1)
    print(json.dumps({**summary, "seconds": seconds, "seed": args.seed, "window": args.window,
                      "n": args.validate}))


def draw_recipe(path, cells, runs, args):
    """Left: accuracy at T=1 after SFT and after RL with intervals; right: reward over RL steps."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(8, 3.2), layout="tight")
    bars, curves = figure.subplots(1, 2)
    for i, arm in enumerate(("SA", "SWA")):
        color = COLORS[arm]
        label = "SA (full attention)" if arm == "SA" else f"SWA (window {args.window})"
        mean, low, high = zip(*(cells[arm, stage]["T=1"] for stage in ("sft", "rl")))
        x = np.arange(2) + 0.4 * i - 0.2
        bars.bar(x, mean, 0.38, color=color, label=label,
                 yerr=np.abs(np.array([low, high]) - mean), capsize=3)
        for at, value, top in zip(x, mean, high):
            bars.text(at, top + 0.02, f"{value:.2f}", ha="center", fontsize=8)
        log = [json.loads(line) for line in (runs[arm] / "log.jsonl").read_text().splitlines()]
        points = [(r["step"], r["reward"]) for r in log if "reward" in r]
        curves.plot(*zip(*points), color=color, label=label)
    bars.set(xticks=[0, 1], xticklabels=["after SFT", "after RL"], ylim=(0, 1.15),
             ylabel=f"accuracy at T=1 (n={args.validate})")
    curves.set(xlabel="RL step", ylabel="mean reward on training prompts", ylim=(0, 1.05))
    curves.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"tiny task, seed {args.seed}, 95 % bootstrap intervals", fontsize=9)
    write_file(path, lambda f: figure.savefig(f, dpi=110, format="png"))


def parser():
    parser = FlagParser(description=__doc__.split("\n\n")[0])
    add_settings(parser, SETTINGS)
    # alternatives to the defaults
    parser.add_argument("--adv-std", action="store_true",
                        help="divide advantages by the group's standard deviation")
    parser.add_argument("--min-informative", type=int, default=0,
                        help="sample up to 3 times more until so many groups disagree")
    parser.add_argument("--overlong-buffer", type=int, default=0,
                        help="tokens before the limit in which a soft penalty grows")
    parser.add_argument("--tis-cap", type=float, default=0.0,
                        help="truncated importance sampling, such as 2; 0: off")
    parser.add_argument("--slots", type=int,
                        help="sequences that run at a time (default: what free memory holds)")
    return parser


def arguments(argv=None, **given):
    """A command line's settled arguments; a JSONL file in --data serves stage 1 too."""
    args = parser().parse_args(argv)
    if args.sft_data is None and args.data and Path(args.data).is_file():
        args.sft_data = args.data
    return settle(args, SETTINGS, **given)


def main():
    args = arguments()
    both = args.model == "tiny" and args.window != "full"
    if "NANOSWARR_ARM" in os.environ:  # started by tiny_recipe: ends with it, however that ends
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    elif RANK == 0 and not args.plan:
        print("settings:", json.dumps(vars(args)), flush=True)
    if args.plan:
        length = args.max_new_tokens + 1024
        return print_plan(args, length, args.slots or args.prompts * args.group, length)
    if both:
        return tiny_recipe(args)
    results = run_arm(args)
    if RANK == 0:
        print(json.dumps({stage: bootstrap_ci(found["T=1"]["scores"])
                          for stage, found in results.items()}))


if __name__ == "__main__":
    cli(main)
