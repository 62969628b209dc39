"""This project's answer checker beside math-verify, on the same pairs.

The pairs are the tables of test_checker.py and, where the benchmarks are there, each of their golds
against itself and against a near miss. CPU time of one grading, extraction included. Prints a
table and one JSON line; --errors lists what each gets wrong.

    python tests/compare_checkers.py --data FOLDER
"""

import argparse
import json
import logging
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import math_verify  # noqa: E402
from test_checker import BENCHMARKS, ROWS, boxed, twin  # noqa: E402

from rl import is_correct  # noqa: E402


def by_math_verify(response, gold):
    """As its documentation says: the gold in dollar signs, the gold first."""
    gold = gold if "$" in gold else f"${gold}$"
    return bool(math_verify.verify(math_verify.parse(gold), math_verify.parse(response)))


def pairs(folder):
    """(set, response, gold, expected)"""
    for row in ROWS:
        yield row["set"], row["response"], row["gold"], row["expected"]
    for path in (folder / f"{name}.jsonl" for name in BENCHMARKS):
        answers = path.read_text("utf-8").splitlines() if path.exists() else []
        for gold in sorted({json.loads(line)["answer"] for line in answers}):
            yield "golds", boxed(gold), gold, True
            yield "golds", boxed(twin(gold)), gold, False


def measure(checker, rows):
    times, errors = [], []
    checker("\\boxed{\\sqrt{2}}", "1")  # what a first call loads is not its cost
    for _, response, gold, expected in rows:
        start = time.process_time()
        verdict = checker(response, gold)
        times.append(1000 * (time.process_time() - start))
        if verdict != expected:
            errors.append((expected, response, gold))
    return {
        "pairs": len(rows),
        "accuracy": round(100 * (1 - len(errors) / len(rows)), 2),
        "false_positives": sum(not expected for expected, *_ in errors),
        "false_negatives": sum(expected for expected, *_ in errors),
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(statistics.quantiles(times, n=100)[98], 2),
    }, errors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent.parent / "shared" / "data",
        help="folder of the benchmarks' JSONL files",
    )
    parser.add_argument("--errors", action="store_true", help="list what each gets wrong")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # math-verify logs each timeout
    checkers = {"nanoSWARR": is_correct, f"math-verify {version('math-verify')}": by_math_verify}
    everything, result = list(pairs(arguments.data)), {}
    print(
        f"{'set':6} {'checker':18} {'pairs':>6} {'accuracy':>9} {'false +':>8} {'false -':>8} "
        f"{'median ms':>10} {'p99 ms':>8}"
    )
    for name in ("rows", "unseen", "golds"):
        rows = [row for row in everything if row[0] == name]
        for checker, function in checkers.items() if rows else ():
            figures, errors = measure(function, rows)
            result[f"{name}/{checker}"] = figures
            print(
                f"{name:6} {checker:18} {figures['pairs']:6} {figures['accuracy']:7.2f} % "
                f"{figures['false_positives']:8} {figures['false_negatives']:8} "
                f"{figures['median_ms']:10.3f} {figures['p99_ms']:8.2f}"
            )
            for expected, response, gold in errors if arguments.errors else ():
                print(f"    {'refused' if expected else 'accepted'}: {response!r} for {gold!r}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
