"""Sliding-window attention: training forward and backward, and decoding from a ring cache.

One window definition everywhere: query i sees key j iff 0 <= i - j < W, so W counts the query's own
key (Hugging Face and FLA count so; FlashAttention calls it window_size = (W - 1, 0)). Full causal
attention is the same code with W >= T, written None.

In the order of the file: the naive twin that defines the result; the PyTorch path (CPU, macOS,
head dimensions that the kernels lack), linear in T; the Triton kernels; the two public functions,
swa_attention and swa_decode, which choose between the paths.

Left out on purpose: dropout, ALiBi, soft-capping, attention sinks, paged caches, FP8, warp
specialisation, autotuning (TILES is a fixed table) and second derivatives.

    python -m pytest tests/test_kernel.py           # both paths; the kernels in Triton's interpreter
    python bench.py                                 # speed and memory on this machine
"""
from __future__ import annotations

import functools
import os
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                                   # macOS and Windows: the PyTorch path serves
    triton = tl = None

# Triton reads the variable when a kernel is decorated, so it has to be set before this import.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


# ------------------------------------------------------------------------------ the naive twin

def _visible(rows, cols, first, window, device):
    """(rows, cols) bool: query r has index first + r, key c index c."""
    i = torch.arange(first, first + rows, device=device)[:, None]
    distance = i - torch.arange(cols, device=device)
    return (distance >= 0) & (distance < window)


def swa_attention_reference(q, k, v, window=None, cu_seqlens=None):
    """The definition itself, in any floating dtype and quadratic memory: the oracle of the tests.

    Arguments as in swa_attention. A NaN anywhere in k or v reaches every query of its head.
    """
    T, H, D, S, Hkv = *q.shape[1:], *k.shape[1:3]
    visible = _visible(T, S, S - T, S if window is None else window, q.device)
    if cu_seqlens is not None:
        row = torch.searchsorted(cu_seqlens[1:], torch.arange(T, device=q.device), right=True)
        visible &= row[:, None] == row
    k, v = (x.repeat_interleave(H // Hkv, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D ** -0.5
    p = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", p, v)


# ---------------------------------------------------------------------------- the PyTorch path

def _sdpa(q, k, v, **mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)


def _attention_torch(q, k, v, window, C=128):
    """Blocks of C queries against the chunks of C keys that they can see: linear in T at fixed W."""
    T, S = q.shape[1], k.shape[1]
    window = S if window is None else min(window, S)
    if window == S == T:
        return _sdpa(q, k, v, is_causal=True)
    past = min(S - T, window - 1)                     # keys before the first query that it can see
    k, v = k[:, S - T - past:], v[:, S - T - past:]
    # split, not slices: its backward is one concatenation, whereas each slice's backward would fill
    # a gradient of the whole length, which is quadratic in T.
    sizes = [past % C] * (past % C > 0) + [C] * (past // C + T // C) + [T % C] * (T % C > 0)
    ks, vs = k.split(sizes, dim=1), v.split(sizes, dim=1)
    back, first = -(-(window - 1) // C), -(-past // C)                # whole chunks
    mask, out = _visible(C, (back + 1) * C, back * C, window, q.device), []
    for n, b_q in enumerate(q.split(C, dim=1), start=first):
        b_k, b_v = (torch.cat(x[max(0, n - back):n + 1], dim=1) for x in (ks, vs))
        end = back * C + b_q.shape[1]                 # the mask's columns, aligned on the right
        b_mask = mask[:b_q.shape[1], end - b_k.shape[1]:end]
        out.append(_sdpa(b_q, b_k, b_v, attn_mask=b_mask))
    return torch.cat(out, dim=1)


def _packed_torch(q, k, v, window, cu_seqlens):
    """Rows of like length (same power of two) run as one batch, padded on the right.

    Causality hides the padding, so it needs no mask, and it costs at most a factor of two.
    """
    starts, lengths, groups = cu_seqlens.tolist(), cu_seqlens.diff().tolist(), {}
    for n, length in enumerate(lengths):
        if length:
            groups.setdefault(length.bit_length(), []).append(n)
    outs, order = [], []
    for rows in groups.values():
        start, length = (torch.tensor([x[n] for n in rows])[:, None] for x in (starts, lengths))
        t = torch.arange(int(length.max()))
        token = start + torch.minimum(t, length - 1)  # padding repeats the row's own last token
        real = (t < length).flatten().nonzero()[:, 0].to(q.device)
        index = token.flatten().to(q.device)
        batch = (x[0].index_select(0, index).unflatten(0, token.shape) for x in (q, k, v))
        outs.append(_attention_torch(*batch, window).flatten(0, 1).index_select(0, real))
        order.append(index[real])
    return torch.cat(outs).index_select(0, torch.cat(order).argsort())[None]


def _decode_torch(q, k, v, position):
    S, Hkv, D = k.shape[1:]
    stale = None
    if q.is_cuda or int(position.min()) < S - 1:      # on a GPU no look at the values: a host sync
        if not q.is_cuda:                             # the used part of a cache longer than the text
            S = min(S, int(position.max()) + 1)
            k, v = k[:, :S], v[:, :S]
        stale = torch.arange(S, device=q.device) > position[:, None]                    # (B, S)
    # (B, Hkv, G, D) @ (B, Hkv, D, S) -> (B, Hkv, G, S)
    scores = (q * D ** -0.5).unflatten(1, (Hkv, -1)) @ k.permute(0, 2, 3, 1)
    if stale is not None:
        scores = scores.masked_fill(stale[:, None, None], float("-inf"))
        v = v.masked_fill(stale[..., None, None], 0)              # 0 * NaN of a stale slot is NaN
    return (scores.softmax(dim=-1) @ v.transpose(1, 2)).flatten(1, 2)


# ------------------------------------------------------------------------------------- kernels
# Names: i_ program index, p_ pointer, o_ offsets, m_ mask, b_ block held in registers. Accumulation
# and softmax are in fp32 and base 2: exp2(s * scale * log2(e)), and so is the stored LSE. fp32
# inputs are multiplied as such ("ieee"), not as tf32.

def _jit(fn):
    """No variants by the divisibility of sizes: prompts of any length share one compiled kernel."""
    return triton.jit(fn, do_not_specialize=("T", "S", "W", "N", "n_splits")) if triton else fn


LOG2E = tl.constexpr(1.4426950408889634) if triton else None


@_jit
def _load(p, start, end, stride, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          CHECK: tl.constexpr):
    """Rows start .. start + R of a matrix; zero past `end` (with CHECK) and past column D.

    Zeros, since a masked probability times whatever lies there would be NaN if that is NaN.
    """
    o_r, o_d = tl.arange(0, R)[:, None], tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride            # 64 bits: T * H * D can pass 2^31
    p_tile = p + o_r * stride + o_d
    if CHECK:
        b_x = tl.load(p_tile, mask=(start + o_r < end) & (o_d < D), other=0.0)
    elif D < BD:
        b_x = tl.load(p_tile, mask=o_d < D, other=0.0)
    else:
        b_x = tl.load(p_tile)
    return b_x


@_jit
def _store(p, start, end, stride, b_x, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    o_r, o_d = tl.arange(0, R)[:, None], tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride
    tl.store(p + o_r * stride + o_d, b_x.to(p.dtype.element_ty), mask=(start + o_r < end) & (o_d < D))


@_jit
def _row(cu_seqlens, N, T, S, i, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Block i's place: first token and lengths (queries, keys) of its row, its start inside the row.

    Packed row n owns the blocks from cu[n] // BLOCK + n on, which are as many as it needs or one more:
    a grid of T // BLOCK + N serves any lengths, found by bisection, without a look from the host.
    """
    if PACKED:
        n, end = 0, N
        while end - n > 1:
            mid = (n + end) // 2
            before = tl.load(cu_seqlens + mid) // BLOCK + mid <= i
            n, end = tl.where(before, mid, n), tl.where(before, end, mid)
        first = tl.load(cu_seqlens + n)
        T = tl.load(cu_seqlens + n + 1) - first
        S, i = T, i - first // BLOCK - n
    else:
        first = 0
    return tl.cast(first, tl.int64), T, S, i * BLOCK


@_jit
def _key_blocks(i0, S, W, BM: tl.constexpr, BN: tl.constexpr):
    """Keys [lo, hi) for the queries i0 .. i0 + BM; all of them see all keys of [full_lo, full_hi)."""
    lo = tl.maximum(i0 - W + 1, 0) // BN * BN
    full_hi = (i0 + 1) // BN * BN
    full_lo = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(i0 + BM - W, 0), BN) * BN, full_hi), lo)
    return lo, full_lo, full_hi, tl.minimum(i0 + BM, S)


@_jit
def _query_blocks(j0, T, S, W, BM: tl.constexpr, BN: tl.constexpr):
    """The same for the keys j0 .. j0 + BN, in query rows: row t has index S - T + t."""
    t0 = j0 - (S - T)
    lo = tl.maximum(t0, 0) // BM * BM
    hi = tl.maximum(tl.minimum(t0 + BN - 1 + W, T), lo)
    full_hi = tl.maximum(tl.minimum(tl.maximum(t0 + W, 0), T) // BM * BM, lo)
    full_lo = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(t0 + BN - 1, 0), BM) * BM, full_hi), lo)
    return lo, full_lo, full_hi, hi


@_jit
def _edge(e, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """The e-th block that needs a mask: first those before full_lo, then those from full_hi."""
    left = (full_lo - lo) // BLOCK
    return tl.where(e < left, lo + e * BLOCK, full_hi + (e - left) * BLOCK)


@_jit
def _fwd_step(b_q, b_o, b_m, b_l, k, v, s_k, s_v, i0, n, S, W, scale, BM: tl.constexpr,
              BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr):
    b_k = _load(k, n, S, s_k, BN, D, BD, EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")         # (BM, BD) @ (BD, BN)
    if EDGE:
        distance = (i0 + tl.arange(0, BM))[:, None] - (n + tl.arange(0, BN))[None, :]
        b_s = tl.where((distance >= 0) & (distance < W), b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    # A query that sees nothing in this block yet has maximum -inf, and -inf - -inf is NaN.
    b_ref = tl.where(b_m_new == float("-inf"), 0.0, b_m_new) if EDGE else b_m_new
    b_p = tl.exp2(b_s * scale - b_ref[:, None])
    b_shrink = tl.exp2(b_m - b_ref)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_v = _load(v, n, S, s_v, BN, D, BD, EDGE)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    return b_o, b_m_new, b_l                                         # (BM, BN) @ (BN, BD)


@_jit
def _fwd_kernel(q, k, v, o, lse, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh,
                s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, PACKED: tl.constexpr):
    """One program: BM queries of one head. Grid (blocks, H, B), the longest rows of keys first."""
    i_h, i_b, H, total = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1), T
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    first, T, S, m0 = _row(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    i0, scale = m0 + S - T, scale * LOG2E
    q += i_b * s_qb + first * s_qt + i_h * s_qh
    k += i_b * s_kb + first * s_kt + i_h // G * s_kh
    v += i_b * s_vb + first * s_vt + i_h // G * s_vh
    b_q = _load(q, m0, T, s_qt, BM, D, BD, True)
    b_o = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    lo, full_lo, full_hi, hi = _key_blocks(i0, S, W, BM, BN)
    for e in range(0, (full_lo - lo) // BN + tl.cdiv(hi - full_hi, BN)):
        n = _edge(e, lo, full_lo, full_hi, BN)
        b_o, b_m, b_l = _fwd_step(b_q, b_o, b_m, b_l, k, v, s_kt, s_vt, i0, n, S, W, scale,
                                  BM, BN, D, BD, True)
    for n in range(full_lo, full_hi, BN):
        b_o, b_m, b_l = _fwd_step(b_q, b_o, b_m, b_l, k, v, s_kt, s_vt, i0, n, S, W, scale,
                                  BM, BN, D, BD, False)
    o += ((i_b * total + first) * H + i_h) * D
    _store(o, m0, T, H * D, b_o / b_l[:, None], BM, D, BD)
    o_m = m0 + tl.arange(0, BM)
    tl.store(lse + (i_b * H + i_h) * total + first + o_m, b_m + tl.log2(b_l), mask=o_m < T)


@_jit
def _dq_step(b_q, b_do, b_lse, b_delta, b_dq, k, v, s_k, s_v, i0, n, S, W, scale, BM: tl.constexpr,
             BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr):
    b_k = _load(k, n, S, s_k, BN, D, BD, EDGE)
    b_v = _load(v, n, S, s_v, BN, D, BD, EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")         # (BM, BD) @ (BD, BN)
    b_p = tl.exp2(b_s * scale - b_lse[:, None])
    if EDGE:                                          # after exp2, which may be inf where masked
        distance = (i0 + tl.arange(0, BM))[:, None] - (n + tl.arange(0, BN))[None, :]
        b_p = tl.where((distance >= 0) & (distance < W), b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")       # (BM, BD) @ (BD, BN)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
    return tl.dot(b_ds, b_k, b_dq, input_precision="ieee")           # (BM, BN) @ (BN, BD)


@_jit
def _dq_kernel(q, k, v, o, do, lse, delta, dq, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh,
               s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """As the forward, and it stores delta = sum(o * do), which _dkv_kernel reads afterwards."""
    i_h, i_b, H, total = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1), T
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    first, T, S, m0 = _row(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    i0, scale2, o_m = m0 + S - T, scale * LOG2E, m0 + tl.arange(0, BM)
    q += i_b * s_qb + first * s_qt + i_h * s_qh
    k += i_b * s_kb + first * s_kt + i_h // G * s_kh
    v += i_b * s_vb + first * s_vt + i_h // G * s_vh
    at = ((i_b * total + first) * H + i_h) * D        # o, do and dq are contiguous
    at_row = (i_b * H + i_h) * total + first + o_m    # lse and delta are (B, H, T)
    b_q = _load(q, m0, T, s_qt, BM, D, BD, True)
    b_o = _load(o + at, m0, T, H * D, BM, D, BD, True)
    b_do = _load(do + at, m0, T, H * D, BM, D, BD, True)
    b_lse = tl.load(lse + at_row, mask=o_m < T, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + at_row, b_delta, mask=o_m < T)
    b_dq = tl.zeros([BM, BD], tl.float32)
    lo, full_lo, full_hi, hi = _key_blocks(i0, S, W, BM, BN)
    for e in range(0, (full_lo - lo) // BN + tl.cdiv(hi - full_hi, BN)):
        n = _edge(e, lo, full_lo, full_hi, BN)
        b_dq = _dq_step(b_q, b_do, b_lse, b_delta, b_dq, k, v, s_kt, s_vt, i0, n, S, W, scale2,
                        BM, BN, D, BD, True)
    for n in range(full_lo, full_hi, BN):
        b_dq = _dq_step(b_q, b_do, b_lse, b_delta, b_dq, k, v, s_kt, s_vt, i0, n, S, W, scale2,
                        BM, BN, D, BD, False)
    _store(dq + at, m0, T, H * D, b_dq * scale, BM, D, BD)


@_jit
def _dkv_step(b_k, b_v, b_dk, b_dv, q, do, lse, delta, s_q, s_do, j0, m, T, S, W, scale,
              BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
              EDGE: tl.constexpr):
    """Transposed, so that both products for dK and dV take it as the left operand."""
    o_m = m + tl.arange(0, BM)
    b_q = _load(q, m, T, s_q, BM, D, BD, EDGE)
    b_do = _load(do, m, T, s_do, BM, D, BD, EDGE)
    b_lse = tl.load(lse + o_m, mask=o_m < T, other=0.0)
    b_delta = tl.load(delta + o_m, mask=o_m < T, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")         # (BN, BD) @ (BD, BM)
    b_p = tl.exp2(b_s * scale - b_lse[None, :])
    if EDGE:                                          # rows past T: q, do, delta are 0, so add 0
        distance = (S - T + o_m)[None, :] - (j0 + tl.arange(0, BN))[:, None]
        b_p = tl.where((distance >= 0) & (distance < W), b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")    # (BN, BM) @ (BM, BD)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")               # (BN, BD) @ (BD, BM)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")                   # (BN, BM) @ (BM, BD)
    return b_dk, b_dv


@_jit
def _dkv_kernel(q, k, v, do, lse, delta, dk, dv, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh,
                s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """One program: BN keys of one head, over all G query heads that share it, so dK and dV need no
    atomics and come out the same, bit for bit, each time. Grid (blocks, Hkv, B)."""
    i_hk, i_b, Hkv = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    T_all, S_all, H = T, S, Hkv * G
    first, T, S, j0 = _row(cu_seqlens, N, T, S, tl.program_id(0), BN, PACKED)
    if j0 >= S:
        return
    scale2 = scale * LOG2E
    k += i_b * s_kb + first * s_kt + i_hk * s_kh
    v += i_b * s_vb + first * s_vt + i_hk * s_vh
    b_k = _load(k, j0, S, s_kt, BN, D, BD, True)
    b_v = _load(v, j0, S, s_vt, BN, D, BD, True)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    lo, full_lo, full_hi, hi = _query_blocks(j0, T, S, W, BM, BN)
    for g in range(0, G):
        i_h = i_hk * G + g
        p_q = q + i_b * s_qb + first * s_qt + i_h * s_qh
        p_do = do + ((i_b * T_all + first) * H + i_h) * D
        at_row = (i_b * H + i_h) * T_all + first
        for e in range(0, (full_lo - lo) // BM + tl.cdiv(hi - full_hi, BM)):
            m = _edge(e, lo, full_lo, full_hi, BM)
            b_dk, b_dv = _dkv_step(b_k, b_v, b_dk, b_dv, p_q, p_do, lse + at_row, delta + at_row,
                                   s_qt, H * D, j0, m, T, S, W, scale2, BM, BN, D, BD, True)
        for m in range(full_lo, full_hi, BM):
            b_dk, b_dv = _dkv_step(b_k, b_v, b_dk, b_dv, p_q, p_do, lse + at_row, delta + at_row,
                                   s_qt, H * D, j0, m, T, S, W, scale2, BM, BN, D, BD, False)
    at = ((i_b * S_all + first) * Hkv + i_hk) * D
    _store(dk + at, j0, S, Hkv * D, b_dk * scale, BN, D, BD)
    _store(dv + at, j0, S, Hkv * D, b_dv, BN, D, BD)


@_jit
def _decode_kernel(q, k, v, position, part, part_lse, S, scale, s_qb, s_qh, s_kb, s_ks, s_kh, s_vb,
                   s_vs, s_vh, G, n_blocks, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
                   BN: tl.constexpr):
    """One program: the G query heads of one key head (rows of one tile, at least the 16 that tl.dot
    needs) against n_blocks blocks of the ring. Grid (splits, Hkv, B), fixed by shapes alone."""
    i_s, i_hk, i_b, Hkv = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    scale *= LOG2E
    written = tl.minimum(tl.load(position + i_b).to(tl.int32) + 1, S)
    lo = i_s * n_blocks * BN
    b_q = _load(q + i_b * s_qb + i_hk * G * s_qh, 0, G, s_qh, BG, D, BD, True)
    k += i_b * s_kb + i_hk * s_kh
    v += i_b * s_vb + i_hk * s_vh
    b_o = tl.zeros([BG, BD], tl.float32)
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    for n in range(lo, tl.minimum(lo + n_blocks * BN, written), BN):
        # Slot order is not time order, and need not be: in the ring every written slot is visible.
        b_k = _load(k, n, written, s_ks, BN, D, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale     # (BG, BD) @ (BD, BN)
        b_s = tl.where((n + tl.arange(0, BN) < written)[None, :], b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p, b_shrink = tl.exp2(b_s - b_m_new[:, None]), tl.exp2(b_m - b_m_new)
        b_l = b_l * b_shrink + tl.sum(b_p, 1)
        b_v = _load(v, n, written, s_vs, BN, D, BD, True)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
        b_m = b_m_new                                                        # (BG, BN) @ (BN, BD)
    # A split without a written slot has b_m = -inf and b_l = 0; it must weigh nothing, not be NaN.
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    row = (i_b * Hkv + i_hk) * G                      # part is (B, H, splits, D), part_lse (B, H, splits)
    n_splits, o_g = tl.num_programs(0), tl.arange(0, BG)
    _store(part + (row * n_splits + i_s) * D, 0, G, n_splits * D, b_o / b_l[:, None], BG, D, BD)
    tl.store(part_lse + (row + o_g) * n_splits + i_s, b_m + tl.log2(b_l), mask=o_g < G)


@_jit
def _combine_kernel(part, part_lse, o, n_splits, D: tl.constexpr, BD: tl.constexpr,
                    BS: tl.constexpr):
    """o = sum over splits of softmax(part_lse) * part. One program a head: grid (B * H)."""
    i, o_s = tl.program_id(0).to(tl.int64), tl.arange(0, BS)
    b_lse = tl.load(part_lse + i * n_splits + o_s, mask=o_s < n_splits, other=float("-inf"))
    b_w = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_part = _load(part + i * n_splits * D, 0, n_splits, D, BS, D, BD, True)
    b_o = tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_w, 0)
    o_d = tl.arange(0, BD)
    tl.store(o + i * D + o_d, b_o.to(o.dtype.element_ty), mask=o_d < D)


# ------------------------------------------------------------------------------------ launches

# (BM, BN, warps, stages) of forward, dQ and dK/dV, by shared memory and padded head dimension.
TILES = {
    ("sm_90", 32): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)),
    ("sm_90", 64): ((128, 128, 4, 3), (128, 64, 4, 3), (64, 128, 8, 2)),
    ("sm_90", 128): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 1)),
    ("sm_80", 32): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)),
    ("sm_80", 64): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 2)),
    ("sm_80", 128): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 1)),
    ("small", 32): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)),
    ("small", 64): ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("small", 128): ((64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 1)),
    ("fp32", 32): ((64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
    ("fp32", 64): ((64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
    ("fp32", 128): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}


def _tiles(kernel, q):
    BD = max(32, triton.next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32:
        arch = "fp32"
    else:
        major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 9)
        arch = "sm_90" if major in (9, 10) else "sm_80" if (major, minor) == (8, 0) else "small"
    BM, BN, warps, stages = TILES[arch, BD][("fwd", "dq", "dkv").index(kernel)]
    return dict(D=q.shape[-1], BD=BD, BM=BM, BN=BN, num_warps=warps, num_stages=stages)


def _launch(kernel, name, q, k, v, pointers, window, cu_seqlens):
    (B, T, H, D), S, Hkv = q.shape, k.shape[1], k.shape[2]
    tiles, packed = _tiles(name, q), cu_seqlens is not None
    length, BLOCK, heads = (S, tiles["BN"], Hkv) if name == "dkv" else (T, tiles["BM"], H)
    N = len(cu_seqlens) - 1 if packed else 1
    blocks = length // BLOCK + N if packed else triton.cdiv(length, BLOCK)
    with torch.cuda.device_of(q):
        kernel[(blocks, heads, B)](*pointers, cu_seqlens, N, T, S, window, D ** -0.5,
                                   *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H // Hkv,
                                   PACKED=packed, **tiles)


# Registered operators: torch.compile and activation checkpointing see one opaque node each.
@torch.library.custom_op("nanoswarr::attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, int window, Tensor? cu_seqlens) -> (Tensor, Tensor)"))
def _attention_op(q, k, v, window, cu_seqlens):
    B, T, H, D = q.shape
    o, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    _launch(_fwd_kernel, "fwd", q, k, v, (q, k, v, o, lse), window, cu_seqlens)
    return o, lse


@torch.library.custom_op("nanoswarr::attention_backward", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, int window, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)"))
def _attention_backward_op(q, k, v, o, lse, do, window, cu_seqlens):
    do, delta = do.contiguous(), torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _launch(_dq_kernel, "dq", q, k, v, (q, k, v, o, do, lse, delta, dq), window, cu_seqlens)
    _launch(_dkv_kernel, "dkv", q, k, v, (q, k, v, do, lse, delta, dk, dv), window, cu_seqlens)
    return dq, dk, dv


@torch.library.custom_op("nanoswarr::decode", mutates_args=(), schema=(
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, int splits) -> Tensor"))
def _decode_op(q, k_cache, v_cache, position, splits):
    (B, H, D), (S, Hkv) = q.shape, k_cache.shape[1:3]
    G, BD, BN = H // Hkv, max(32, triton.next_power_of_2(D)), 64
    part = q.new_empty(B, H, splits, D, dtype=torch.float32)
    part_lse, o = part.new_empty(B, H, splits), q.new_empty(B, H, D)
    with torch.cuda.device_of(q):
        _decode_kernel[(splits, Hkv, B)](
            q, k_cache, v_cache, position, part, part_lse, S, D ** -0.5, *q.stride()[:2],
            *k_cache.stride()[:3], *v_cache.stride()[:3], G, triton.cdiv(triton.cdiv(S, BN), splits),
            D=D, BD=BD, BG=max(16, triton.next_power_of_2(G)), BN=BN, num_warps=4, num_stages=3)
        _combine_kernel[(B * H,)](part, part_lse, o, splits, D=D, BD=BD,
                                  BS=triton.next_power_of_2(splits), num_warps=4)
    return o


@_attention_op.register_fake
def _(q, k, v, window, cu_seqlens):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@_attention_backward_op.register_fake
def _(q, k, v, o, lse, do, window, cu_seqlens):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@_decode_op.register_fake
def _(q, k_cache, v_cache, position, splits):
    return q.new_empty(q.shape)


def _save(ctx, inputs, output):
    q, k, v, ctx.window, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, do, _):
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    return *_attention_backward_op(q, k, v, o, lse, do, ctx.window, cu_seqlens), None, None


_attention_op.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------------------------- public

@functools.cache
def _warn(reason):
    warnings.warn(f"swa_kernel: {reason}; the slower PyTorch path is used", stacklevel=3)


def _use_triton(q):
    """Whether the kernels run: on CUDA from sm_80 on, or in Triton's interpreter."""
    if not (q.is_cuda or INTERPRET):
        return False
    if triton is None:
        return _warn("Triton is not installed")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not 16 <= q.shape[-1] <= 128:
        return _warn(f"no kernel for {q.dtype} with head dimension {q.shape[-1]}")
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return _warn("the GPU is older than sm_80")
    return True


def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q, k, v, window, cu_seqlens):
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be an int >= 1 or None, got {window!r}")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError("expected q (B, T, H, D) and k, v (B, S, Hkv, D), got "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (B, D) or Hkv < 1 or H % Hkv or S < T:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: same B and D, "
                         "H a multiple of Hkv, S >= T")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point() or not q.device == k.device == v.device:
        raise ValueError("q, k and v need one floating dtype and one device, got "
                         + ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v)))
    if cu_seqlens is None:
        return
    if B != 1 or S != T or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError("cu_seqlens, int32 (N + 1,), packs rows into B = 1 with S = T")
    if not cu_seqlens.is_cuda:                        # on a GPU a look at the values is a host sync
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != T or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {ends}")


def swa_attention(q, k, v, window=None, cu_seqlens=None):
    """Causal attention of each query to the last `window` keys, its own counted; None: to all.

    q (B, T, H, D); k, v (B, S, Hkv, D) with H a multiple of Hkv and S >= T (the queries are then the
    last T of S positions: a chunk of a prompt); returns (B, T, H, D), differentiable. cu_seqlens,
    int32 (N + 1,) from 0 to T, packs N rows, empty ones allowed, into B = 1. Scores are scaled by
    D**-0.5. ValueError for a window < 1 or shapes that don't fit. Source: Mistral 7B, section 2.
    """
    _check(q, k, v, window, cu_seqlens)
    if q.numel() == 0:
        return q.clone()
    if _use_triton(q):
        window = k.shape[1] if window is None else min(window, k.shape[1])
        return _attention_op(*map(_dense, (q, k, v)), window, cu_seqlens)[0]
    if cu_seqlens is not None:
        return _packed_torch(q, k, v, window, cu_seqlens)
    return _attention_torch(q, k, v, window)


def swa_decode(q, k_cache, v_cache, position):
    """Attention of one new query a row to its ring cache, in which its own key is already written.

    q (B, H, D); caches (B, S, Hkv, D), position p in slot p % S, so that the window is S keys;
    position (B,) int >= 0 tensor, each query's own index; returns (B, H, D). Slots s > position are
    unwritten and may hold anything, NaN too. Not differentiable. ValueError for shapes that don't
    fit. On a GPU it can be captured in a CUDA graph: the grid depends on shapes alone.
    """
    _check(q[:, None], k_cache, v_cache, None, None)
    if position.shape != q.shape[:1] or position.is_floating_point():
        raise ValueError(f"position must be int ({q.shape[0]},), got {position.dtype} "
                         f"{tuple(position.shape)}")
    if q.numel() == 0:
        return q.clone()
    if not _use_triton(q):
        return _decode_torch(q, k_cache, v_cache, position)
    B, S, Hkv = k_cache.shape[:3]
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = max(1, min(2 * cores // (B * Hkv), triton.cdiv(S, 64), 128))
    return _decode_op(_dense(q), _dense(k_cache), _dense(v_cache), position, splits)
