"""bench.py by fakes: contestants that fail, recompile or take long; a GPU that writes down what it
is asked."""

import math
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import bench
import model
from swa_kernel import swa_attention

CPU = torch.device("cpu")
ARGS = SimpleNamespace(torch_device=CPU, repeats=2, full=False, out="unused")


def rows_of(T=64, **attends):
    contestants = {name: bench.Contestant(attend) for name, attend in attends.items()}
    return bench.attention_rows(contestants, 64, T, 16, 1e12, ARGS)


def test_who_fails_is_shown():
    def out_of_memory(q, k, v, window):
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    class NoBackward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, q: q.clone())

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("a compiler's")

    def no_backward(q, k, v, window):
        return NoBackward.apply(q)

    rows = rows_of(out_of_memory=out_of_memory, no_backward=no_backward, ours=swa_attention)
    failed = {row["what"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"out_of_memory": "OutOfMemoryError: CUDA out of memory",
                      "no_backward": "AssertionError: a compiler's"}
    assert [row["part"] for row in rows if row["what"] == "ours"] == ["forward", "backward"]
    table = "\n".join(bench.markdown(rows, bench.shown))
    assert "| OutOfMemoryError: CUDA out of memory |" in table


def test_who_recompiles_runs_compiled():
    """Ten sizes, past dynamo's usual limit of 8, each with backward passes on one graph."""
    uncompiled = []

    def attend(q, k, v, window):
        if not torch.compiler.is_compiling():
            uncompiled.append(q.shape)
        p = (q @ q.mT).softmax(-1)  # kept for a backward, which may donate its memory
        return p @ q * k.mean() + v.mean()

    attend, rows = bench.compiled(attend, backend="aot_eager"), []
    for T in range(2, 12):
        rows += rows_of(T, peer=attend)
    assert not [row for row in rows if "failed" in row] and not uncompiled
    assert len(rows) == 20


def test_who_is_slow_has_fewer_turns():
    turns = []
    contestants = {name: lambda name=name, s=s: (turns.append(name), time.sleep(s))
                   for name, s in (("slow", 0.06), ("fast", 0))}
    seconds = bench.side_by_side(contestants, 9, CPU, patience=0.1)
    assert turns.count("slow") == 3 and turns.count("fast") == 10  # a warm-up each
    assert seconds["slow"] >= 0.06


@pytest.mark.parametrize(("full", "minutes", "expected"), [
    (False, 0, {(D, T, W) for D in (64, 128) for T in (4096, 32768, 131072) for W in (4096, None)
                if T > 4096 or not W}),
    (False, 7, set()), (True, 7, 58)])
def test_sizes_on_a_gpu(monkeypatch, full, minutes, expected):
    """A few, and none once the time is over; --full measures all, however long."""
    measured, clock = [], iter([0])
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1)
    monkeypatch.setattr(bench, "decode_rows", lambda *_: [])
    monkeypatch.setattr(bench, "finish", lambda *_: None)
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock, minutes * 60))
    monkeypatch.setattr(bench, "attention_rows",
                        lambda _, D, T, W, *__: measured.append((D, T, W)) or [])
    gpu = SimpleNamespace(type="cuda")
    bench.bench_kernels(SimpleNamespace(torch_device=gpu, repeats=3, full=full))
    assert (len(measured) if full else set(measured)) == expected


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as a list of what was asked of it, in order."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("synchronize")

        def elapsed_time(self, end):
            return 5.0

    class Stream:
        def wait_stream(self, other):
            asked.append("wait")

    @contextmanager
    def stream(stream):
        asked.append(("stream", stream))
        yield

    @contextmanager
    def graph(graph, pool=None, stream=None, capture_error_mode="global"):
        asked.append(("record", pool, stream, capture_error_mode))
        yield

    fakes = {"Event": Event, "Stream": Stream, "stream": stream, "graph": graph,
             "CUDAGraph": lambda: SimpleNamespace(replay=lambda: asked.append("replay")),
             "graph_pool_handle": lambda: object(), "current_stream": lambda: None,
             "_sleep": lambda cycles: asked.append("spin")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(bench, "l2_flush", lambda device: SimpleNamespace(
        zero_=lambda: asked.append("flush")))
    model.graph_place.cache_clear()
    yield asked
    model.graph_place.cache_clear()


def test_a_gpu_is_timed_by_itself(gpu):
    seconds = bench.timed(lambda: gpu.append("run"), SimpleNamespace(type="cuda"))
    assert math.isclose(seconds, 5e-3)
    assert gpu == ["flush", "spin", "record", "run", "record", "synchronize"]


def test_graphs_share_a_stream_and_a_pool(gpu, monkeypatch):
    """The first step of a size runs on the recording's stream before it is recorded, and counts."""
    decoder = model.Decoder(bench.random_model("tiny", 24, CPU, torch.float32), 4, 40, 20)
    monkeypatch.setattr(model.Transformer, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(decoder, "step", lambda n: gpu.append(n))
    for n in (4, 4, 2, 4, 2):
        decoder.replay(n)
    stream, pool = model.graph_place()

    def made(n):
        return ["wait", ("stream", stream), n, ("record", pool, stream, "thread_local"), n]

    assert gpu == [*made(4), "replay", *made(2), "replay", "replay"]
