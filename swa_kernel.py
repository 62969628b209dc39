"""Sliding-window attention: training forward and backward, and decoding from a ring cache.

One window definition everywhere: query i sees key j iff 0 <= i - j < W, so W counts the query's own
key (Hugging Face and FLA count so; FlashAttention calls it window_size = (W - 1, 0)). Full causal
attention is the same code with W >= T, written None.

In the order of the file: the naive twin that defines the result; the PyTorch path (CPU, macOS,
head dimensions that the kernels lack), linear in T; the Triton kernels; the two public functions,
swa_attention and swa_decode, which choose between the paths.

Left out on purpose: dropout, ALiBi, soft-capping, attention sinks, paged caches, FP8, warp
specialisation, autotuning (TILES is a fixed table) and second derivatives.

    python -m pytest tests/test_kernel.py     # both paths; the kernels in Triton's interpreter
    python bench.py                           # speed and memory on this machine
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


def _attention_torch(q, k, v, window):
    """Blocks of C queries against the chunks of C keys that they see: linear in T at fixed W."""
    T, S = q.shape[1], k.shape[1]
    window = S if window is None else min(window, S)
    if window == S == T:
        return _sdpa(q, k, v, is_causal=True)
    C = min(max(window, 32), 128)                     # measured: small windows want small blocks
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
    S = k.shape[1]
    if not q.is_cuda:                                 # on a GPU a look at the values is a host sync
        S = min(S, int(position.max()) + 1)           # the used part of a long cache
        k, v = k[:, :S], v[:, :S]
    stale = torch.arange(S, device=q.device) > position[:, None]                    # (B, S)
    q = q.unflatten(1, (k.shape[2], -1))              # (B, Hkv, G, D): a group's heads as queries

    def attend(k, v):
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2),
                                              attn_mask=~stale[:, None, None])

    o = attend(k, v)
    if q.is_cuda or o.isnan().any():                  # a stale slot's NaN; cleaning copies k and v
        o = attend(*(x.masked_fill(stale[:, :, None, None], 0) for x in (k, v)))
    return o.flatten(1, 2)


# ------------------------------------------------------------------------------------- kernels
# Names: i_ program index, p_ pointer, o_ offsets, m_ mask, b_ block held in registers, s_ stride.
# Softmax is in base 2, exp2(s * scale * log2(e)), and so is the stored LSE. Everything is summed in
# fp32; fp32 inputs are multiplied as such ("ieee"), never as tf32.

def _jit(fn):
    """No variants by the divisibility of sizes: prompts of any length share one compiled kernel."""
    return triton.jit(fn, do_not_specialize=("T", "S", "W", "N", "n_splits")) if triton else fn


LOG2E = tl.constexpr(1.4426950408889634) if triton else None


@_jit
def _load(p, start, end, stride, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          FULL: tl.constexpr):
    """(R, BD): rows start .. start + R of a matrix, zero from row `end` and from column D on.

    Zero because a probability of 0 times what lies there, another sequence or a stale slot, would
    be NaN if that is NaN. FULL promises that all rows exist.
    """
    o_r, o_d = tl.arange(0, R)[:, None], tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride            # 64 bits: T * H * D can pass 2^31
    if FULL and D == BD:
        b_x = tl.load(p + o_r * stride + o_d)
    else:
        b_x = tl.load(p + o_r * stride + o_d, mask=(start + o_r < end) & (o_d < D), other=0.0)
    return b_x


@_jit
def _store(p, start, end, stride, b_x, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    o_r, o_d = tl.arange(0, R)[:, None], tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride
    m_x = (start + o_r < end) & (o_d < D)
    tl.store(p + o_r * stride + o_d, b_x.to(p.dtype.element_ty), mask=m_x)


@_jit
def _row(cu_seqlens, N, T, S, i, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Where block i lies: first token, queries and keys of its row, and its start inside the row.

    Packed row n owns the blocks from cu[n] // BLOCK + n on, as many as it needs or one more. So a
    grid of T // BLOCK + N serves any lengths, found here by bisection, not by asking the host.
    """
    first = 0
    if PACKED:
        n, end = 0, N
        while end - n > 1:
            mid = (n + end) // 2
            m_left = tl.load(cu_seqlens + mid) // BLOCK + mid > i
            n, end = tl.where(m_left, n, mid), tl.where(m_left, mid, end)
        first = tl.load(cu_seqlens + n)
        T = tl.load(cu_seqlens + n + 1) - first
        S, i = T, i - first // BLOCK - n
    return tl.cast(first, tl.int64), T, S, i * BLOCK


@_jit
def _key_range(i0, S, W, BM: tl.constexpr, BN: tl.constexpr):
    """Queries i0 .. i0 + BM see keys in [lo, hi), and each of them all in [full_lo, full_hi)."""
    lo = tl.maximum(i0 - W + 1, 0) // BN * BN
    full_hi = (i0 + 1) // BN * BN
    full_lo = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(i0 + BM - W, 0), BN) * BN, full_hi), lo)
    return lo, full_lo, full_hi, tl.minimum(i0 + BM, S)


@_jit
def _query_range(j0, T, S, W, BM: tl.constexpr, BN: tl.constexpr):
    """The same, seen from the keys j0 .. j0 + BN, in rows of q: row t has the index S - T + t."""
    t0 = j0 - (S - T)
    lo = tl.maximum(t0, 0) // BM * BM
    full_hi = tl.maximum(tl.minimum(tl.maximum(t0 + W, 0), T) // BM * BM, lo)
    full_lo = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(t0 + BN - 1, 0), BM) * BM, full_hi), lo)
    return lo, full_lo, full_hi, tl.maximum(tl.minimum(t0 + BN - 1 + W, T), lo)


@_jit
def _count(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr, FULL: tl.constexpr):
    return (full_hi - full_lo) // BLOCK if FULL else \
        (full_lo - lo) // BLOCK + tl.cdiv(hi - full_hi, BLOCK)


@_jit
def _start(e, lo, full_lo, full_hi, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Start of the e-th block: among the full ones, or among those of both edges."""
    left = full_lo if FULL else lo + tl.where(lo + e * BLOCK < full_lo, 0, full_hi - full_lo)
    return left + e * BLOCK


@_jit
def _forward(q, k, v, o, lse, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh,
             s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, PACKED: tl.constexpr):
    """BM queries of one head. Grid (blocks, H, B); last blocks first, they may have most keys."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, total = tl.num_programs(1), T
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    first, T, S, m0 = _row(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    q += i_b * s_qb + first * s_qt + i_h * s_qh
    k += i_b * s_kb + first * s_kt + i_h // G * s_kh
    v += i_b * s_vb + first * s_vt + i_h // G * s_vh
    i0, scale = m0 + S - T, scale * LOG2E
    b_q = _load(q, m0, T, s_qt, BM, D, BD, False)
    b_o = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    lo, full_lo, full_hi, hi = _key_range(i0, S, W, BM, BN)
    for FULL in tl.static_range(2):                   # blocks with a mask first, then those without
        for e in range(_count(lo, full_lo, full_hi, hi, BN, FULL)):
            n = _start(e, lo, full_lo, full_hi, BN, FULL)
            b_k = _load(k, n, S, s_kt, BN, D, BD, FULL)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BM, BD) @ (BD, BN)
            if not FULL:
                b_d = (i0 + tl.arange(0, BM))[:, None] - (n + tl.arange(0, BN))[None, :]
                b_s = tl.where((b_d >= 0) & (b_d < W), b_s, float("-inf"))
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale)
            # A query that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
            b_ref = b_max if FULL else tl.where(b_max == float("-inf"), 0.0, b_max)
            b_p = tl.exp2(b_s * scale - b_ref[:, None])
            b_shrink = tl.exp2(b_m - b_ref)
            b_m, b_l = b_max, b_l * b_shrink + tl.sum(b_p, 1)
            b_v = _load(v, n, S, s_vt, BN, D, BD, FULL)               # (BM, BN) @ (BN, BD)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    o += ((i_b * total + first) * H + i_h) * D
    _store(o, m0, T, H * D, b_o / b_l[:, None], BM, D, BD)
    o_m = m0 + tl.arange(0, BM)
    tl.store(lse + (i_b * H + i_h) * total + first + o_m, b_m + tl.log2(b_l), mask=o_m < T)


@_jit
def _backward_q(q, k, v, o, do, lse, delta, dq, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh,
                s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """dQ, as the forward; and delta = sum(o * do), which _backward_kv reads after it."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, total = tl.num_programs(1), T
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    first, T, S, m0 = _row(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    q += i_b * s_qb + first * s_qt + i_h * s_qh
    k += i_b * s_kb + first * s_kt + i_h // G * s_kh
    v += i_b * s_vb + first * s_vt + i_h // G * s_vh
    row, col = (i_b * H + i_h) * total + first, ((i_b * total + first) * H + i_h) * D
    i0, o_m = m0 + S - T, m0 + tl.arange(0, BM)
    b_q = _load(q, m0, T, s_qt, BM, D, BD, False)
    b_o = _load(o + col, m0, T, H * D, BM, D, BD, False)
    b_do = _load(do + col, m0, T, H * D, BM, D, BD, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + row + o_m, b_delta, mask=o_m < T)
    b_lse = tl.load(lse + row + o_m, mask=o_m < T, other=0.0)
    b_dq = tl.zeros([BM, BD], tl.float32)
    lo, full_lo, full_hi, hi = _key_range(i0, S, W, BM, BN)
    for FULL in tl.static_range(2):
        for e in range(_count(lo, full_lo, full_hi, hi, BN, FULL)):
            n = _start(e, lo, full_lo, full_hi, BN, FULL)
            b_k = _load(k, n, S, s_kt, BN, D, BD, FULL)
            b_v = _load(v, n, S, s_vt, BN, D, BD, FULL)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BM, BD) @ (BD, BN)
            b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
            if not FULL:                              # after exp2, which can be inf where masked
                b_d = (i0 + tl.arange(0, BM))[:, None] - (n + tl.arange(0, BN))[None, :]
                b_p = tl.where((b_d >= 0) & (b_d < W), b_p, 0.0)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[:, None])                    # (BM, BN) @ (BN, BD)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    _store(dq + col, m0, T, H * D, b_dq * scale, BM, D, BD)


@_jit
def _backward_kv(q, k, v, do, lse, delta, dk, dv, cu_seqlens, N, T, S, W, scale, s_qb, s_qt, s_qh,
                 s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G, D: tl.constexpr, BD: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """dK and dV of BN keys of one head, summed over its G query heads here: no atomics, so the same
    bits each time. Scores stand transposed, (BN, BM). Grid (blocks, Hkv, B)."""
    i_k, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    Hkv, T_all, S_all = tl.num_programs(1), T, S
    first, T, S, j0 = _row(cu_seqlens, N, T, S, tl.program_id(0), BN, PACKED)
    if j0 >= S:
        return
    H = Hkv * G
    k += i_b * s_kb + first * s_kt + i_k * s_kh
    v += i_b * s_vb + first * s_vt + i_k * s_vh
    b_k = _load(k, j0, S, s_kt, BN, D, BD, False)
    b_v = _load(v, j0, S, s_vt, BN, D, BD, False)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    lo, full_lo, full_hi, hi = _query_range(j0, T, S, W, BM, BN)
    for i_h in range(i_k * G, i_k * G + G):
        p_q = q + i_b * s_qb + first * s_qt + i_h * s_qh
        p_do = do + ((i_b * T_all + first) * H + i_h) * D
        row = (i_b * H + i_h) * T_all + first
        for FULL in tl.static_range(2):
            for e in range(_count(lo, full_lo, full_hi, hi, BM, FULL)):
                m = _start(e, lo, full_lo, full_hi, BM, FULL)
                o_m = m + tl.arange(0, BM)            # rows from T on load as 0 and so add 0
                b_q = _load(p_q, m, T, s_qt, BM, D, BD, FULL)
                b_do = _load(p_do, m, T, H * D, BM, D, BD, FULL)
                b_lse = tl.load(lse + row + o_m, mask=o_m < T, other=0.0)
                b_delta = tl.load(delta + row + o_m, mask=o_m < T, other=0.0)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")     # (BN, BD) @ (BD, BM)
                b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
                if not FULL:
                    b_d = (S - T + o_m)[None, :] - (j0 + tl.arange(0, BN))[:, None]
                    b_p = tl.where((b_d >= 0) & (b_d < W), b_p, 0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")   # (BN, BD) @ (BD, BM)
                b_ds = b_p * (b_dp - b_delta[None, :])                       # (BN, BM) @ (BM, BD)
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    col = ((i_b * S_all + first) * Hkv + i_k) * D
    _store(dk + col, j0, S, Hkv * D, b_dk * scale, BN, D, BD)
    _store(dv + col, j0, S, Hkv * D, b_dv, BN, D, BD)


@_jit
def _decode(q, k, v, position, part, part_lse, S, scale, s_qb, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs,
            s_vh, G, n_blocks, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
            BN: tl.constexpr):
    """n_blocks blocks of the ring against the G query heads of one key head, which are the rows of
    one tile (padded to 16, the least that tl.dot takes). Grid (splits, Hkv, B)."""
    i_s, n_splits, Hkv = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    i_k, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += i_b * s_kb + i_k * s_kh
    v += i_b * s_vb + i_k * s_vh
    # Slots need no order: RoPE is in the keys, and whatever is written lies inside the window.
    written = tl.minimum(tl.load(position + i_b), S - 1).to(tl.int32) + 1
    b_q = _load(q + i_b * s_qb + i_k * G * s_qh, 0, G, s_qh, BG, D, BD, False)
    b_o = tl.zeros([BG, BD], tl.float32)
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    lo = i_s * n_blocks * BN
    for n in range(lo, tl.minimum(lo + n_blocks * BN, written), BN):
        b_k = _load(k, n, written, s_ks, BN, D, BD, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")      # (BG, BD) @ (BD, BN)
        m_n = (n + tl.arange(0, BN) < written)[None, :]
        b_s = tl.where(m_n, b_s * (scale * LOG2E), float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        b_p, b_shrink = tl.exp2(b_s - b_max[:, None]), tl.exp2(b_m - b_max)
        b_m, b_l = b_max, b_l * b_shrink + tl.sum(b_p, 1)
        b_v = _load(v, n, written, s_vs, BN, D, BD, False)            # (BG, BN) @ (BN, BD)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    # A split beyond the written slots has b_l = 0: its weight must be 0 (LSE -inf), not NaN.
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    row, o_g = (i_b * Hkv + i_k) * G, tl.arange(0, BG)
    _store(part + (row * n_splits + i_s) * D, 0, G, n_splits * D, b_o / b_l[:, None], BG, D, BD)
    tl.store(part_lse + (row + o_g) * n_splits + i_s, b_m + tl.log2(b_l), mask=o_g < G)


@_jit
def _combine(part, part_lse, o, n_splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """The splits' outputs (B, H, splits, D), weighted by softmax(LSE), into one. Grid (B * H)."""
    i, o_s, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, BD)
    b_lse = tl.load(part_lse + i * n_splits + o_s, mask=o_s < n_splits, other=float("-inf"))
    b_w = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_o = _load(part + i * n_splits * D, 0, n_splits, D, BS, D, BD, False) * b_w[:, None]
    b_o = tl.sum(b_o, 0) / tl.sum(b_w, 0)
    tl.store(o + i * D + o_d, b_o.to(o.dtype.element_ty), mask=o_d < D)


# ------------------------------------------------------------------------------------ launches

# (BM, BN, warps, stages) by padded head dimension; more shared memory only on sm_90 and sm_100.
# Chosen so that hardly anything spills inside a loop (tests/aot_compile.py), not yet by a clock. To
# tune on a GPU, the grid: BM and BN in (64, 128), 4 or 8 warps, 1 to 3 stages.
TILES = {  # forward, dQ, dK and dV
    (32, "sm_80"): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (64, "sm_80"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (128, "sm_80"): ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    (32, "sm_90"): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (64, "sm_90"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (128, "sm_90"): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 3)),
}
FP32_TILE = (32, 32, 8, 1)                            # without tensor cores registers set the limit


def _pad(D):
    return max(32, triton.next_power_of_2(D))


def _launch(kernel, tensors, q, k, v, cu_seqlens, window):
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    big = q.is_cuda and torch.cuda.get_device_properties(q.device).major in (9, 10)
    which = (_forward, _backward_q, _backward_kv).index(kernel)
    BM, BN, warps, stages = TILES[_pad(D), "sm_90" if big else "sm_80"][which]
    if q.dtype == torch.float32:
        BM, BN, warps, stages = FP32_TILE
    length, BLOCK, heads = (S, BN, Hkv) if kernel is _backward_kv else (T, BM, H)
    N = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    grid = (length // BLOCK + N if N else triton.cdiv(length, BLOCK), heads, B)
    with torch.cuda.device_of(q):
        kernel[grid](*tensors, cu_seqlens, N, T, S, window, D ** -0.5, *q.stride()[:3],
                     *k.stride()[:3], *v.stride()[:3], H // Hkv, D=D, BD=_pad(D), BM=BM, BN=BN,
                     PACKED=N > 0, num_warps=warps, num_stages=stages)


def _operator(schema):
    """A registered operator is one opaque node to torch.compile and to activation checkpointing."""
    name = "nanoswarr::" + schema[:schema.index("(")]
    return torch.library.custom_op(name, mutates_args=(), schema=schema[schema.index("("):])


@_operator("attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int window) "
           "-> (Tensor, Tensor)")
def _attention(q, k, v, cu_seqlens, window):
    B, T, H, D = q.shape
    o, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    _launch(_forward, (q, k, v, o, lse), q, k, v, cu_seqlens, window)
    return o, lse


@_operator("attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, "
           "Tensor? cu_seqlens, int window) -> (Tensor, Tensor, Tensor)")
def _attention_backward(q, k, v, o, lse, do, cu_seqlens, window):
    do, delta = do.contiguous(), torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _launch(_backward_q, (q, k, v, o, do, lse, delta, dq), q, k, v, cu_seqlens, window)
    _launch(_backward_kv, (q, k, v, do, lse, delta, dk, dv), q, k, v, cu_seqlens, window)
    return dq, dk, dv


@_operator("decode(Tensor q, Tensor k, Tensor v, Tensor position, int splits) -> Tensor")
def _decode_splits(q, k, v, position, splits):
    (B, H, D), (S, Hkv), BN = q.shape, k.shape[1:3], 32 if q.dtype == torch.float32 else 64
    part = q.new_empty(B, H, splits, D, dtype=torch.float32)
    part_lse, o = part.new_empty(B, H, splits), q.new_empty(B, H, D)
    with torch.cuda.device_of(q):
        _decode[splits, Hkv, B](
            q, k, v, position, part, part_lse, S, D ** -0.5, *q.stride()[:2], *k.stride()[:3],
            *v.stride()[:3], H // Hkv, triton.cdiv(triton.cdiv(S, BN), splits), D=D, BD=_pad(D),
            BG=max(16, triton.next_power_of_2(H // Hkv)), BN=BN, num_warps=4, num_stages=3)
        _combine[B * H,](part, part_lse, o, splits, D=D, BD=_pad(D),
                         BS=triton.next_power_of_2(splits))
    return o


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, do, _):
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    return *_attention_backward(q, k, v, o, lse, do, cu_seqlens, ctx.window), None, None


_attention.register_autograd(_backward, setup_context=_save)
_attention.register_fake(lambda q, k, v, *_: (
    q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)))
_attention_backward.register_fake(lambda *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))
_decode_splits.register_fake(lambda q, *_: q.new_empty(q.shape))


# -------------------------------------------------------------------------------------- public

@functools.cache
def _warn(reason):
    warnings.warn(f"swa_kernel: {reason}; using the slower PyTorch path", stacklevel=4)


def _use_triton(q):
    """Whether the kernels run: on CUDA from sm_80 on, or in Triton's interpreter."""
    D = q.shape[-1]
    if not (q.is_cuda or INTERPRET):
        return False
    if triton is None:
        _warn("Triton is not installed")
    elif q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not 16 <= D <= 128:
        _warn(f"no kernel for {q.dtype} with head dimension {D}")
    elif q.is_cuda and torch.cuda.get_device_properties(q.device).major < 8:
        _warn("no kernel for a GPU older than sm_80")
    else:
        return True
    return False


def _dense(*tensors):
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _check(q, k, v, window, cu_seqlens):
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be an int >= 1 or None, got {window!r}")
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"expected q (B, T, H, D) and k, v (B, S, Hkv, D), got {shapes}")
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (B, D) or Hkv < 1 or H % Hkv or S < T:
        raise ValueError(f"q, k, v must agree in B and D, H be a multiple of Hkv, S >= T: {shapes}")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1 or not q.is_floating_point():
        raise ValueError("q, k, v need one floating dtype and one device, got "
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

    q (B, T, H, D); k, v (B, S, Hkv, D), H a multiple of Hkv, S >= T: the queries are the last T of
    S positions (S > T for a chunk of a prompt). Returns (B, T, H, D), differentiable. cu_seqlens,
    int32 (N + 1,) from 0 to T, packs N rows, empty ones too, into B = 1. Scores are scaled by
    D**-0.5. ValueError for window < 1 or shapes that don't fit. Source: Mistral 7B, section 2.
    """
    _check(q, k, v, window, cu_seqlens)
    if q.numel() == 0:
        return q.clone()
    if _use_triton(q):
        window = k.shape[1] if window is None else min(window, k.shape[1])
        return _attention(*_dense(q, k, v), cu_seqlens, window)[0]
    if cu_seqlens is not None:
        return _packed_torch(q, k, v, window, cu_seqlens)
    return _attention_torch(q, k, v, window)


def swa_decode(q, k_cache, v_cache, position):
    """Attention of one new query a row to its ring cache, in which its own key is already written.

    q (B, H, D); caches (B, S, Hkv, D), position p in slot p % S, so S is the window; position (B,)
    int >= 0, each query's own index. Returns (B, H, D), not differentiable. Slots that position has
    not reached may hold anything, NaN too. On a GPU the grid follows from shapes and nothing waits
    for the host, so a CUDA graph can capture it. ValueError for shapes that don't fit.
    """
    _check(q[:, None], k_cache, v_cache, None, None)
    if position.shape != q.shape[:1] or position.is_floating_point():
        raise ValueError(f"position must be int ({len(q)},), got {position.dtype} "
                         f"{tuple(position.shape)}")
    if q.numel() == 0:
        return q.clone()
    if not _use_triton(q):
        return _decode_torch(q, k_cache, v_cache, position)
    B, S, Hkv = k_cache.shape[:3]
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = max(1, min(2 * cores // (B * Hkv), triton.cdiv(S, 64), 128))
    return _decode_splits(*_dense(q, k_cache, v_cache), position, splits)
