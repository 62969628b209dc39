"""swa_kernel against fp64 SDPA with a boolean mask: one set of tests for every path.

Here they run on the PyTorch path, and on a GPU where there is one. test_interpreter runs this file
again in a child process with TRITON_INTERPRET=1, which has to be set before Triton is imported: the
same tests, with the kernels executed on the CPU. There in fp32 and fp16 only, since the interpreter
takes the bits of bf16 for integers. tests/aot_compile.py compiles what runs on a GPU.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import swa_kernel as swa
from swa_kernel import swa_attention, swa_attention_reference, swa_decode

INTERPRET = swa.INTERPRET
CUDA = torch.cuda.is_available() and not INTERPRET
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
BLOCK = swa.FP32_TILE[1]

kernels_only = pytest.mark.skipif(not INTERPRET, reason="runs in test_interpreter")
parent_only = pytest.mark.skipif(INTERPRET, reason="runs once, outside Triton's interpreter")
needs_triton = pytest.mark.skipif(swa.triton is None, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def gpu_only(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")(test))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poison():
    """Everything that torch.empty returns is NaN, so an output that is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------- helpers


def exact_dtype(device):
    """fp64 where PyTorch computes, fp32 for the kernels."""
    return torch.float32 if INTERPRET or device == "cuda" else torch.float64


def tensors(device, T, H, Hkv, D, B=1, S=None, dtype=None, grad=True):
    shapes = [(B, T, H, D)] + [(B, S or T, Hkv, D)] * 2
    make = {"device": device, "dtype": dtype or exact_dtype(device), "requires_grad": grad}
    return [torch.randn(shape, **make) for shape in shapes]


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def visible(T, S, window, lengths=None, sinks=0):
    """(T, S) bool by the definition, entry by entry, and apart from the module's own code."""
    places = [(n, p) for n, length in enumerate(lengths or [S]) for p in range(length)]
    mask = [[n == m and 0 <= i - j and (i - j < (window or S) or j < sinks) for m, j in places]
            for n, i in places[S - T:]]
    return torch.tensor(mask, dtype=torch.bool).view(T, S)


def oracle(q, k, v, window=None, lengths=None, sinks=0):
    """Output, log-sum-exp (B, H, T) and inputs, in fp64 on the CPU."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    mask = visible(q.shape[1], k.shape[1], window, lengths, sinks)
    wide = [x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*wide, attn_mask=mask).transpose(1, 2)
    scores = wide[0] @ wide[1].mT * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    return o, lse, (q, k, v)


def close(actual, expected, tolerance=None, what=""):
    tolerance = tolerance or {torch.float64: 1e-11, torch.float32: 1e-5}.get(actual.dtype, 3e-3)
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, what
    error, scale = (actual - expected).abs().max(), expected.abs().max().clamp_min(1)
    assert error <= tolerance * scale, f"{what}: error {error:.1e} at scale {scale:.1e}"


def compare(q, k, v, window=None, lengths=None, tolerance=None, sinks=0):
    """Output and all three gradients against the oracle."""
    cu_seqlens = cumulative(lengths, q.device) if lengths else None
    o = swa_attention(q, k, v, window, cu_seqlens, sinks)
    o_ref, _, inputs = oracle(q, k, v, window, lengths, sinks)
    close(o, o_ref, tolerance, "o")
    do = torch.randn_like(o)
    grads = torch.autograd.grad(o, (q, k, v), do)
    grads_ref = torch.autograd.grad(o_ref, inputs, do.cpu().double())
    for name, grad, ref in zip(("dq", "dk", "dv"), grads, grads_ref, strict=True):
        close(grad, ref, tolerance, name)


# --------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("sinks", [0, 1, BLOCK, 2 * BLOCK + 1, 200])
@pytest.mark.parametrize("window", [
    1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK + 1, 99, 100, 107, None])
def test_one_hot_values_show_the_mask(device, window, sinks):
    T = 100
    q, k, _ = tensors(device, T, 2, 1, 128, grad=False)
    v = torch.eye(T, 128, device=device, dtype=q.dtype)[None, :, None]
    o = swa_attention(q * 0, k, v, window, sinks=sinks)[0, :, :, :T].cpu()
    mask = visible(T, T, window, sinks=sinks)
    assert torch.equal(o > 0, mask[:, None].expand(T, 2, T))
    close(o[:, 0], mask.double() / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("sinks", [0, 20])
@pytest.mark.parametrize(("T", "window", "H", "Hkv", "D"), [
    (1, None, 1, 1, 64), (15, 4, 2, 1, 64), (16, 16, 2, 2, 128), (17, 1, 4, 1, 32),
    (63, 20, 6, 1, 64), (64, 64, 7, 1, 32), (65, 33, 8, 1, 64), (127, 31, 2, 1, 96),
    (130, 32, 2, 1, 64), (130, None, 2, 1, 128), (130, 129, 1, 1, 32), (130, 500, 1, 1, 32),
    (130, 65, 2, 1, 80), (130, 2, 1, 1, 64), (130, 2 * BLOCK - 1, 1, 1, 32)])
def test_attention_and_gradients(device, T, window, H, Hkv, D, sinks):
    compare(*tensors(device, T, H, Hkv, D, B=2 if T < 64 else 1), window, sinks=sinks)


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize(("S", "window", "lengths"), [
    (70, 24, None), (100, 100, None), (70, 33, [30, 1, 0, 39])])
@kernels_only
def test_log_sum_exp_is_in_base_2(S, window, lengths, sinks):
    q, k, v = tensors("cpu", 70, 2, 1, 32, S=S)
    cu_seqlens = cumulative(lengths) if lengths else None
    lse = swa._attention(q, k, v, cu_seqlens, window, sinks)[1]
    close(lse * math.log(2), oracle(q, k, v, window, lengths, sinks)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "window", "D", "sinks"), [
    (130, 40, 64, 0), (200, 150, 32, 0), (150, None, 128, 0), (200, 40, 64, 70)])
def test_half_precision(device, dtype, T, window, D, sinks):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    tolerance = 3e-3 if dtype == torch.float16 else 2e-2
    compare(*tensors(device, T, 2, 1, D, dtype=dtype), window, None, tolerance, sinks)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("lengths", "window"), [
    ([1], None), ([1, 1, 1], 2), ([40, 40, 40], None), ([40, 40, 40], 24), ([32, 32], 32),
    ([0, 7, 0, 0, 64, 33, 0], None), ([0, 7, 0, 0, 64, 33, 0], 24), ([0, 70, 33], 1),
    ([5, 1, 9, 2, 3, 8, 4, 6], None), ([5, 1, 9, 2, 3, 8, 4, 6], 5), ([100], 40)])
def test_packed(device, lengths, window, sinks):
    compare(*tensors(device, sum(lengths), 2, 1, 32), window, lengths, sinks=sinks)


@pytest.mark.parametrize("sinks", [0, 4])
def test_packed_is_separate_and_nan_stays_in_its_row(device, sinks):
    lengths, window = [33, 20, 1, 50], 24
    q, k, v = tensors(device, sum(lengths), 2, 1, 64)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, 33:53] = math.nan
    o = swa_attention(q, k, v, window, cumulative(lengths, device), sinks)
    o.sum().backward()
    for lo, hi in ((0, 33), (53, 54), (54, 104)):
        row = [x.detach()[:, lo:hi].requires_grad_() for x in (q, k, v)]
        alone = swa_attention(*row, window, sinks=sinks)
        alone.sum().backward()
        close(o[:, lo:hi], alone)
        for x, y in zip((q, k, v), row, strict=True):
            close(x.grad[:, lo:hi], y.grad)


@pytest.mark.parametrize("sinks", [0, 3, 36])
@pytest.mark.parametrize(("T", "S", "window"), [
    (1, 40, 7), (30, 31, 5), (40, 100, 33), (64, 130, None), (33, 130, 70), (70, 130, 1),
    (5, 130, 16), (70, 69 + BLOCK, None), (70, 68 + BLOCK, 2 * BLOCK)])
def test_chunk_of_a_prompt(device, T, S, window, sinks):
    compare(*tensors(device, T, 2, 1, 32, S=S), window, sinks=sinks)


@pytest.mark.parametrize("sinks", [0, 3, 21])
@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_chunks_are_one_shot(device, chunk, sinks):
    """Each chunk against the keys that a ring still holds: the sinks and the last ones."""
    T, window = (74, 20) if chunk > 1 else (12, 5)
    q, k, v = tensors(device, T, 2, 1, 32, grad=False)
    o = []
    for t in range(0, T, chunk):
        old = [p for p in range(t) if p < sinks or p > t - window]
        held = [*old, *range(t, min(t + chunk, T))]
        o.append(swa_attention(q[:, t:t + chunk], k[:, held], v[:, held], window, sinks=sinks))
    close(torch.cat(o, 1), swa_attention(q, k, v, window, sinks=sinks))


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (20, 0), (20, 5)])
def test_large_scores(device, window, sinks):
    q, k, v = tensors(device, 70, 2, 1, 64)
    with torch.no_grad():
        q *= 100
        k *= 100 * 8                                  # scores of about 1e4 * sqrt(64)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 8
    assert scores.abs().max() > 1e4
    o = swa_attention(q, k, v, window, sinks=sinks)
    close(o, oracle(q, k, v, window, sinks=sinks)[0], 1e-4)
    for grad in torch.autograd.grad(o.sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_strided_inputs_are_not_copied(device):
    fused = torch.randn(2, 40, 2 + 1 + 1, 32, device=device, dtype=exact_dtype(device))
    views = fused.split((2, 1, 1), dim=2)
    assert all(a is b for a, b in zip(swa._dense(*views), views, strict=True))
    q, k, v = (x.requires_grad_() for x in views)
    compare(q, k, v, 24)
    heads_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    compare(*(x.requires_grad_() for x in heads_first), v, 24)          # all strides differ
    columns = [x.detach().mT.contiguous().mT for x in (q, k, v)]        # D is not the dense one
    close(swa_attention(*columns, 24), swa_attention(q, k, v, 24))


@pytest.mark.parametrize("lengths", [None, [30, 0, 70]])
def test_gradients_are_the_same_bits_each_time(device, lengths):
    q, k, v = tensors(device, 100, 3, 1, 32)
    cu_seqlens = cumulative(lengths, device) if lengths else None
    do = torch.randn_like(q)
    first, second = (torch.autograd.grad(swa_attention(q, k, v, 50, cu_seqlens, 3), (q, k, v), do)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sinks", [0, 2])
def test_reach_is_layers_times_window_minus_one_and_the_sinks(device, sinks):
    T, window, layers = 70, 9, 3
    x = torch.randn(1, T, 2, 32, device=device, dtype=exact_dtype(device), requires_grad=True)
    h = x
    for _ in range(layers):
        h = h + swa_attention(h, h, h, window, sinks=sinks)
    h[0, -1].sum().backward()
    seen = x.grad[0].abs().sum((1, 2)) > 0
    assert seen.tolist() == [t < sinks or t >= T - 1 - layers * (window - 1) for t in range(T)]


def test_reference_is_the_definition(device):
    for window, lengths, S, sinks in ((7, None, 40, 0), (None, None, 50, 3), (7, None, 50, 3),
                                      (9, [0, 11, 29], 40, 0), (9, [0, 11, 29], 40, 4)):
        q, k, v = tensors(device, 40, 4, 2, 16, S=S, dtype=torch.float64)
        cu_seqlens = cumulative(lengths, device) if lengths else None
        o = swa_attention_reference(q, k, v, window, cu_seqlens, sinks)
        close(o, oracle(q, k, v, window, lengths, sinks)[0])


@settings(max_examples=15 if INTERPRET else 100, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    draw = data.draw
    Hkv, G = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]))
    D, window = draw(st.sampled_from([16, 32, 48])), draw(st.none() | st.integers(1, 90))
    sinks = draw(st.sampled_from([0, 1, 4]) | st.integers(0, 100))
    lengths = draw(st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=4))
    T = sum(lengths) if lengths is not None else draw(st.integers(1, 80))
    S = T if lengths is not None else T + draw(st.integers(0, 50))
    if T:
        compare(*tensors(device, T, G * Hkv, Hkv, D, S=S), window, lengths, sinks=sinks)


def test_empty(device):
    q, k, v = tensors(device, 0, 2, 1, 32)
    assert swa_attention(q, k, v, 4).shape == q.shape
    assert swa_attention(q, k, v, 4, cumulative([0, 0], device)).shape == q.shape


# ------------------------------------------------------------------------------------ decode


def ring(x, positions, S, sinks=0):
    """Caches (B, S, Hkv, D) after keys 0 .. position were written in turn; NaN elsewhere."""
    cache = torch.full((len(positions), S, *x.shape[2:]), math.nan, dtype=x.dtype, device=x.device)
    for b, position in enumerate(positions):
        for p in range(position + 1):
            cache[b, p if p < sinks else sinks + (p - sinks) % (S - sinks)] = x[b, p]
    return cache


def decode_positions(W):
    return [0, 1, W - 2, W - 1, W, W + 1, 3 * W + 5]


@pytest.mark.parametrize(("W", "H", "Hkv", "D", "sinks"), [
    (24, 2, 1, 32, 0), (33, 6, 2, 64, 0), (70, 7, 1, 128, 0), (64, 3, 3, 96, 0), (40, 20, 1, 32, 0),
    (24, 2, 1, 32, 4), (33, 6, 2, 64, 70), (1, 2, 1, 32, 1)])
def test_decode_is_the_last_row_of_prefill(device, W, H, Hkv, D, sinks):
    """Rows at different positions in one call, unwritten slots full of NaN."""
    S = sinks + W
    positions = [p for p in decode_positions(W) + decode_positions(S) if p >= 0]
    q, k, v = tensors(device, max(positions) + 1, H, Hkv, D, B=len(positions), grad=False)
    queries = torch.stack([q[b, p] for b, p in enumerate(positions)])
    at = torch.tensor(positions, device=device)
    for position in (at, at.int()):
        caches = (ring(x, positions, S, sinks) for x in (k, v))
        o = swa_decode(queries, *caches, position, sinks)
        for b, p in enumerate(positions):
            row = (x[b:b + 1, :p + 1] for x in (q, k, v))
            close(o[b], oracle(*row, W, sinks=sinks)[0][0, -1])


def test_decode_in_half_precision_from_strided_caches(device):
    positions = [3, 50, 99]
    q, k, v = tensors(device, 100, 4, 2, 64, B=3, dtype=torch.float16, grad=False)
    caches = torch.stack([ring(x, positions, 48) for x in (k, v)], dim=3)      # (B, S, Hkv, 2, D)
    queries = torch.stack([q[b, p] for b, p in enumerate(positions)])
    o = swa_decode(queries, caches[..., 0, :], caches[..., 1, :],
                   torch.tensor(positions, device=device))
    for b, p in enumerate(positions):
        close(o[b], oracle(*(x[b:b + 1, :p + 1] for x in (q, k, v)), 48)[0][0, -1])


def test_recycled_slot_shows_nothing_of_its_last_owner(device):
    q, k, v = tensors(device, 90, 2, 1, 32, grad=False)
    caches = [ring(x * 50, [89], 40) for x in (k, v)]
    for p in range(6):                                # a short sequence after a long one
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, p] = x[:, p]
    o = swa_decode(q[:, 5], *caches, torch.tensor([5], device=device))
    close(o, oracle(q[:, :6], k[:, :6], v[:, :6])[0][:, -1])


def test_prompts_around_the_window_then_decoding(device):
    """Prompts of W - 1, W, W + 1, 2W + 3 side by side, then 2W steps: each a row of one prefill."""
    W = 8
    prompts = [W - 1, W, W + 1, 2 * W + 3]
    q, k, v = tensors(device, 4 * W + 3, 2, 1, 32, B=4, grad=False)
    expected = swa_attention(q, k, v, W)
    rows = torch.arange(4, device=device)
    caches = [ring(x, [n - 1 for n in prompts], W) for x in (k, v)]
    for step in range(2 * W):
        position = torch.tensor(prompts, device=device) + step
        for cache, x in zip(caches, (k, v), strict=True):
            cache[rows, position % W] = x[rows, position]
        close(swa_decode(q[rows, position], *caches, position), expected[rows, position])


@kernels_only
def test_more_splits_than_blocks():
    q, k, v = tensors("cpu", 100, 4, 2, 32, B=3, grad=False)
    position = torch.tensor([0, 65, 140])
    k, v = ring(k, [0, 65, 99], 100), ring(v, [0, 65, 99], 100)
    expected = swa._decode_torch(q[:, 0], k, v, position)
    for splits in (1, 2, 3, 7, 16):
        close(swa._decode_splits(q[:, 0], k, v, position, splits), expected)


# ----------------------------------------------------------------------- arguments and paths


@pytest.mark.parametrize("window", [0, -1, 2.0, True, "4"])
def test_bad_window_and_sinks(device, window):
    with pytest.raises(ValueError, match="window"):
        swa_attention(*tensors(device, 4, 2, 1, 32), window)
    with pytest.raises(ValueError, match="sinks"):
        swa_attention(*tensors(device, 4, 2, 1, 32), 2, sinks=window or -2)


@pytest.mark.parametrize(("change", "message"), [
    (lambda q, k, v: (q[0], k, v), "expected q"),
    (lambda q, k, v: (q, k, v[:, :3]), "expected q"),
    (lambda q, k, v: (q[:, :, :3], k, v), "multiple"),
    (lambda q, k, v: (q, k[..., :16], v[..., :16]), "agree"),
    (lambda q, k, v: (q, k[:, :3], v[:, :3]), "S >= T"),
    (lambda q, k, v: (q, k.half(), v), "dtype"),
    (lambda q, k, v: (q.long(), k.long(), v.long()), "floating"),
    (lambda q, k, v: (q, k, v, 4, torch.tensor([0, 4])), "int32"),
    (lambda q, k, v: (q, k, v, 4, cumulative([3])), "rise"),
    (lambda q, k, v: (q, k, v, 4, torch.tensor([0, 3, 2, 4]).int()), "rise"),
    (lambda q, k, v: (q, k, v, 4, torch.tensor([], dtype=torch.int32)), "rise"),
    (lambda q, k, v: (q[:, :3], k, v, 4, cumulative([3])), "packs"),
    (lambda q, k, v: (*(x.expand(2, -1, -1, -1) for x in (q, k, v)), 4, cumulative([4])), "packs")])
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        swa_attention(*change(*tensors("cpu", 4, 4, 2, 32)))


def test_bad_decode_arguments():
    q, k, v = tensors("cpu", 4, 4, 2, 32, grad=False)
    for position in (torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor(1)):
        with pytest.raises(ValueError, match="position"):
            swa_decode(q[:, 0], k, v, position)
    with pytest.raises(ValueError, match="multiple"):
        swa_decode(q[:, 0, :3], k, v, torch.tensor([1]))


def test_compile_and_checkpoint(device):
    inputs = tensors(device, 70, 4, 2, 32)

    def run(q, k, v):
        return swa_attention(q, k, v, 20, sinks=3) * 2

    expected = run(*inputs)
    grads = torch.autograd.grad(expected.sum(), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for o in (compiled(*inputs), checkpoint(run, *inputs, use_reentrant=False)):
        close(o, expected)
        for a, b in zip(torch.autograd.grad(o.sum(), inputs), grads, strict=True):
            close(a, b)


@kernels_only
def test_operators_are_registered_correctly():
    q, k, v = tensors("cpu", 40, 2, 1, 32, dtype=torch.float16)
    torch.library.opcheck(swa._attention, (q, k, v, None, 20, 0))
    torch.library.opcheck(swa._attention, (q, k, v, cumulative([30, 10]), 20, 3))
    torch.library.opcheck(swa._decode_splits, (q[:, 0].detach(), k.detach(), v.detach(),
                                               torch.tensor([3]), 2))


@kernels_only
def test_falls_back_with_one_warning(monkeypatch):
    swa._warn.cache_clear()
    inputs = tensors("cpu", 20, 2, 1, 8)
    with pytest.warns(UserWarning, match="head dimension 8; using the slower PyTorch path") as seen:
        compare(*inputs, 5)
        compare(*inputs, 5)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="no kernel for torch.float64"):
        compare(*tensors("cpu", 20, 2, 1, 32, dtype=torch.float64), 5)
    monkeypatch.setattr(swa, "triton", None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        compare(*tensors("cpu", 20, 2, 1, 32), 5)


@parent_only
def test_imports_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, swa_kernel\n"
            "x = torch.randn(1, 9, 2, 32)\n"
            "assert swa_kernel.swa_attention(x, x, x, 4).shape == x.shape")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(swa.__file__).parent)


@parent_only
def test_cpu_path_is_linear():
    """8 times the length takes about 8 times as long, and far less than SDPA under a full mask."""
    torch.use_deterministic_algorithms(False)

    def seconds(attend, T, repeats=3):
        inputs, times = tensors("cpu", T, 1, 1, 64, dtype=torch.float32), []
        for _ in range(repeats):
            start = time.process_time()
            attend(*inputs).sum().backward()
            times.append(time.process_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)                          # threads that wait count as time, too
    short, long = (seconds(lambda *qkv: swa_attention(*qkv, 8), T) for T in (4096, 32768))
    j = torch.arange(8192)
    mask = swa._in_window(j[:, None], j, 256)
    full = seconds(lambda *qkv: swa._sdpa(*qkv, attn_mask=mask), 8192, repeats=1)
    fast = seconds(lambda *qkv: swa_attention(*qkv, 256), 8192)
    torch.set_num_threads(threads)
    assert long < 14 * short, f"{long:.2f} s against {short:.2f} s"
    assert full > 5 * fast, f"{full:.2f} s against {fast:.2f} s"


@kernels_only
@pytest.mark.parametrize("old", [False, True])
def test_either_triton(monkeypatch, old):
    """How the LSE is loaded depends on Triton's version."""
    monkeypatch.setattr(swa, "OLD", swa.tl.constexpr(old))
    compare(*tensors("cpu", 130, 2, 1, 64), 65)
    compare(*tensors("cpu", 90, 2, 1, 32), 20, [33, 1, 56])


@parent_only
@needs_triton
def test_interpreter():
    """This file again, with the kernels in Triton's interpreter."""
    if swa.OLD.value and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs NumPy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}       # bytes that a block may have


@parent_only
@needs_triton
@pytest.mark.parametrize("arguments", [
    "--sm 90 --dims 64 128", "--sm 90 --dims 128 --packed", "--sm 90 --dims 64 128 --sinks 70",
    "--sm 80 --dims 64 128", "--sm 100 --dims 128",
    "--sm 89 --dims 96 --packed", "--sm 89 --dims 128 --dtypes fp32"])
def test_ahead_of_time(arguments):
    """Without a GPU: it compiles, fits, spills in no loop (with sinks 4 times in one, with Triton
    3.6 up to 12 times), and uses Hopper's matrix products."""
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run([sys.executable, str(script), *arguments.split()], text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) >= 5
    for r in records:
        assert r["shared"] <= SHARED[r["sm"]], r
        if r["dtype"] != "fp32":                      # products without tensor cores: speed is lost
            allowed = 12 if swa.OLD.value else 4 * ("--sinks" in arguments)
            assert r["loop_spills"] <= allowed, r
            assert r["small_copies"] <= 2, r          # of lse and delta: one each
        if r["sm"] == 90 and r["kernel"] in ("_forward", "_backward_q", "_backward_kv"):
            assert r["wgmma"] and r["issue"] < 1, r


# -------------------------------------------------------------------------------------- GPU


@gpu_only
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("T", "window"), [(1000, 256), (2048, None), (4096, 1024)])
def test_bf16_error_on_gpu(T, window, D):
    """At most 1e-2 of the norm, and at most twice the error of the PyTorch path in bf16."""
    q, k, v = tensors("cuda", T, 6, 1, D, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = swa._attention_torch(*wide, window)
    do = torch.randn_like(q)
    expected = [expected, *torch.autograd.grad(expected, wide, do.double())]

    def errors(attend):
        o = attend(q, k, v, window)
        got = [o, *torch.autograd.grad(o, (q, k, v), do)]
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, expected, strict=True)])

    ours, torchs = errors(swa_attention), errors(swa._attention_torch)
    assert (ours <= 1e-2).all()
    assert (ours <= 2 * torchs + 1e-5).all()


@gpu_only
def test_graph_replay_is_eager():
    W, B = 1000, 5
    k, v = (torch.randn(B, W, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(B, 12, 128, device="cuda", dtype=torch.bfloat16)
    position = torch.zeros(B, dtype=torch.long, device="cuda")
    swa_decode(q, k, v, position)                     # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = swa_decode(q, k, v, position)
    for p in ([0, 1, 2, 3, 4], [998, 999, 1000, 1001, 5000], [64, 63, 65, 500, 12]):
        position.copy_(torch.tensor(p))
        q.normal_()
        graph.replay()
        assert torch.equal(o, swa_decode(q, k, v, position))


@gpu_only
def test_packed_does_not_wait_for_the_host():
    q, k, v = tensors("cuda", 1000, 4, 2, 64, dtype=torch.bfloat16)
    cu_seqlens = cumulative([300, 0, 1, 699], "cuda")
    swa_attention(q, k, v, 128, cu_seqlens).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        swa_attention(q, k, v, 128, cu_seqlens).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
