"""Sliding-window attention: training forward and backward, and decoding from a ring cache.

One window definition everywhere: query i sees key j iff 0 <= i - j < W, so W counts the query's own
key (Hugging Face and FLA count so; FlashAttention calls it window_size = (W - 1, 0)). Full causal
attention is the same code with W >= T, written None. Beside the window each query sees the sinks,
the first so many keys of its row (StreamingLLM, arXiv 2309.17453): j < sinks.

In the order of the file: the naive twin that defines the result; the PyTorch path (CPU, macOS,
head dimensions that the kernels lack), linear in T; the Triton kernels; the two public functions,
swa_attention and swa_decode, which choose between the paths.

To change what a query sees: _in_window is the rule itself, for every path; _keys_seen and
_queries_seen say which blocks the kernels visit; swa_decode says which slots of the ring count.

Left out on purpose: dropout, ALiBi, soft-capping, paged caches, FP8, warp specialisation,
autotuning (TILES is a fixed table) and second derivatives.

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

def _in_window(i, j, window, sinks=0):
    """Whether query i sees key j, both counted in their own row: the rule, stated only here.

    Takes anything that broadcasts, PyTorch's tensors as well as Triton's (see _in_window_jit).
    """
    distance = i - j
    causal = distance >= 0
    near = distance < window
    if sinks > 0:                                     # none: not an instruction of the kernels
        near = near | (j < sinks)
    return causal & near


def swa_attention_reference(q, k, v, window=None, cu_seqlens=None, sinks=0):
    """The definition itself, in any floating dtype and quadratic memory: the oracle of the tests.

    Arguments as in swa_attention. A NaN anywhere in k or v reaches every query of its head.
    """
    T, H, D = q.shape[1:]
    S, Hkv = k.shape[1:3]
    j = torch.arange(S, device=q.device)
    row = torch.zeros_like(j)                         # token j lies in packed row[j]
    if cu_seqlens is not None:
        row = torch.searchsorted(cu_seqlens[1:], j, right=True)
        j = j - cu_seqlens[row]                       # counted in its row
    i, i_row = j[S - T:, None], row[S - T:, None]     # the queries are the last T of S positions
    visible = _in_window(i, j, S if window is None else window, sinks) & (i_row == row)  # (T, S)

    k, v = (x.repeat_interleave(H // Hkv, dim=2) for x in (k, v))                 # (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D ** -0.5
    p = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", p, v)


# ---------------------------------------------------------------------------- the PyTorch path

def _sdpa(q, k, v, **mask):
    """PyTorch's attention, which wants (B, H, T, D), in this file's layout (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)


def _attention_torch(q, k, v, window, sinks=0):
    """Blocks of C queries, each against the few chunks of C keys that it sees: linear in T.

    Keys are cut where queries are cut. With C = 4, window = 7, 7 queries and 6 keys before them:

        keys       0 1 | 2 3 4 5 | 6 7 8 9 | 10 11 12
        queries                    6 7 8 9 | 10 11 12

    Here reach = 2: the second block of queries sees its own chunk, the last, and two before it.

    Sinks stand apart: their own queries see all before them, later ones all sinks, and beside them
    a window over the other keys.
    """
    T, S = q.shape[1], k.shape[1]
    if window is None or max(window, sinks) >= S:     # everything is seen
        window, sinks = S, 0
    if window == S == T:
        return _sdpa(q, k, v, is_causal=True)
    outs, k_sinks, v_sinks = [], [], []
    if sinks:
        (*k_sinks, k), (*v_sinks, v) = (x.split((sinks, S - sinks), dim=1) for x in (k, v))
        S -= sinks
        if T > S:                                     # the first queries are the sinks' own
            outs.append(_attention_torch(q[:, :T - S], *k_sinks, *v_sinks, None))
            q, T = q[:, T - S:], S

    C = min(max(window, 32), 128)                     # measured: small windows want small blocks
    old = min(S - T, window - 1)                      # keys before the first query that it can see
    k, v = (x[:, S - T - old:] for x in (k, v))                         # (B, old + T, Hkv, D)

    # split, not slices: its backward is one concatenation, whereas each slice's backward would fill
    # a gradient of the whole length, which is quadratic in T.
    lengths = [old % C] + [C] * (old // C + T // C) + [T % C]
    lengths = [length for length in lengths if length > 0]
    k_chunks = k.split(lengths, dim=1)
    v_chunks = v.split(lengths, dim=1)
    old_chunks = -(-old // C)                         # rounded up
    reach = -(-(window - 1) // C)                     # chunks before its own that a block sees

    # One mask for all blocks: C queries, their own chunk of keys and the `reach` chunks before it.
    j = torch.arange((reach + 1) * C, device=q.device)
    mask = _in_window(j[reach * C:, None], j, window)                   # (C, (reach + 1) * C)
    for own, b_q in enumerate(q.split(C, dim=1), start=old_chunks):
        seen = slice(max(0, own - reach), own + 1)
        b_k = torch.cat((*k_sinks, *k_chunks[seen]), dim=1)
        b_v = torch.cat((*v_sinks, *v_chunks[seen]), dim=1)
        # The first blocks have fewer keys before them, the last fewer queries and keys of its own.
        rows, columns = b_q.shape[1], b_k.shape[1] - sinks
        end = reach * C + rows
        b_mask = mask[:rows, end - columns:end]
        if sinks:
            b_mask = F.pad(b_mask, (sinks, 0), value=True)
        outs.append(_sdpa(b_q, b_k, b_v, attn_mask=b_mask))
    return torch.cat(outs, dim=1)


def _packed_torch(q, k, v, window, cu_seqlens, sinks):
    """Rows of like length (same power of two) run as one batch, padded on the right.

    Causality hides the padding, so it needs no mask, and it costs at most a factor of two.
    """
    starts, lengths = cu_seqlens.tolist(), cu_seqlens.diff().tolist()
    rows_by_size = {}
    for row, length in enumerate(lengths):
        if length > 0:
            rows_by_size.setdefault(length.bit_length(), []).append(row)

    outs, places = [], []
    for rows in rows_by_size.values():
        start = torch.tensor([starts[row] for row in rows])[:, None]    # (R, 1)
        length = torch.tensor([lengths[row] for row in rows])[:, None]
        t = torch.arange(int(length.max()))                             # (L,)
        # Padding repeats the row's own last token, so that no other row's NaN comes in.
        token = start + torch.minimum(t, length - 1)                    # (R, L)
        token = token.flatten().to(q.device)
        real = (t < length).flatten().nonzero()[:, 0].to(q.device)      # which of R * L
        batch = (x[0].index_select(0, token).unflatten(0, (len(rows), -1)) for x in (q, k, v))
        o = _attention_torch(*batch, window, sinks).flatten(0, 1)       # (R * L, H, D)
        outs.append(o.index_select(0, real))
        places.append(token[real])
    order = torch.cat(places).argsort()               # back into the order of the tokens
    return torch.cat(outs).index_select(0, order)[None]


def _decode_torch(q, k, v, position):
    """q (B, H, D) against the ring's slots 0 .. position; later ones of k and v are not written."""
    q = q.unflatten(1, (k.shape[2], -1))              # (B, Hkv, G, D): a group's heads as queries

    def attend(k, v, mask=None):
        k, v = k.transpose(1, 2), v.transpose(1, 2)                     # (B, Hkv, S, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)

    S = k.shape[1]
    if not q.is_cuda:                                 # on a GPU a look at the values is a host sync
        first, last = (int(p) for p in position.aminmax())
        S = min(S, last + 1)                          # the used part of a long cache
        k, v = k[:, :S], v[:, :S]
        if first + 1 >= S:                            # every row has written all of it
            return attend(k, v)
    written = torch.arange(S, device=q.device) <= position[:, None]     # (B, S)
    mask = written[:, None, None]
    o = attend(k, v, mask)
    if q.is_cuda or o.isnan().any():                  # a stale slot's NaN; cleaning copies k and v
        o = attend(*(x.masked_fill(~written[:, :, None, None], 0) for x in (k, v)), mask)
    return o                                          # (B, H, D)


# ------------------------------------------------------------------------------------- kernels
# Names: i_ program index, p_ pointer, o_ offsets, m_ mask, b_ block held in registers, s_ stride.
#
# Arguments that all kernels share, in this order:
#   tensors       q (B, T, H, D), k and v (B, S, Hkv, D) with any strides but a dense D; what the
#                 kernels write is dense. lse and delta (B, H, T) are fp32.
#   cu_seqlens, N, T, S, W        packing, its rows (0: none), queries, keys, window
#   scale         D**-0.5
#   s_qb s_qt s_qh, s_kb ...      elements from one batch row, token, head to the next
#   G             query heads to a key head
#   D, BD, BM, BN head dimension, the same padded to a power of two, queries and keys of a block
#   SINKS         compiled in, as PACKED is, so that a model without sinks runs code without them
#
# Softmax is in base 2, as the hardware computes: exp(x) = exp2(x * log2(e)), so the scores' factor
# is scale * LOG2E. The stored LSE is in base 2 as well.

def _jit(fn):
    """No variants by the divisibility of sizes: prompts of any length share one compiled kernel."""
    return triton.jit(fn, do_not_specialize=("T", "S", "W", "N", "n_splits")) if triton else fn


LOG2E = tl.constexpr(1.4426950408889634) if triton else None
# Triton 3.6 or older
OLD = tl.constexpr([*map(int, triton.__version__.split(".")[:2])] < [3, 7]) if triton else None
_in_window_jit = _jit(_in_window)                     # the same source, compiled


@_jit
def _dot(a, b, acc=None):
    """acc + a @ b, summed in fp32; fp32 inputs are multiplied as such, not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@_jit
def _at(p, i_b, i_t, i_h, s_b, s_t, s_h):
    """Pointer to x[i_b, i_t, i_h, 0]. The indices are 64 bits wide: T * H * D can pass 2^31."""
    return p + (i_b * s_b + i_t * s_t + i_h * s_h)


@_jit
def _load(p, start, end, stride, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          FULL: tl.constexpr):
    """(R, BD): rows start .. start + R of a matrix, zero from row `end` and from column D on.

    Zero because a probability of 0 times what lies there, another sequence or a stale slot, would
    be NaN if that is NaN. FULL promises that all rows exist.
    """
    o_r = tl.arange(0, R)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride            # 64 bits: see _at
    if FULL and D == BD:
        b_x = tl.load(p + o_r * stride + o_d)
    else:
        m_x = (start + o_r < end) & (o_d < D)
        b_x = tl.load(p + o_r * stride + o_d, mask=m_x, other=0.0)
    return b_x


@_jit
def _load_numbers(p, start, end, R: tl.constexpr):
    """(R,): numbers start .. start + R of a vector, zero from `end` on.

    OLD Triton gives each thread its copies of what it will use, 32 a block of dK/dV, each of 4
    bytes. A sum over a column of width 1 is in the way of that.
    """
    if OLD:
        b_x = tl.sum(_load(p, start, end, 1, R, 1, 1, False), 1)
    else:
        o_r = start + tl.arange(0, R)
        b_x = tl.load(p + o_r, mask=o_r < end, other=0.0)
    return b_x


@_jit
def _store(p, start, end, stride, b_x, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of _load: writes nothing from row `end` and from column D on."""
    o_r = tl.arange(0, R)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    p += tl.cast(start, tl.int64) * stride
    m_x = (start + o_r < end) & (o_d < D)
    tl.store(p + o_r * stride + o_d, b_x.to(p.dtype.element_ty), mask=m_x)


@_jit
def _locate(cu_seqlens, N, T, S, i, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Where block i lies: first token, queries and keys of its row, and its start inside the row.

    Packed row n owns the blocks from cu[n] // BLOCK + n on, as many as it needs or one more. So a
    grid of T // BLOCK + N serves any lengths, found here by bisection, not by asking the host.
    """
    first = 0
    if PACKED:
        n, end = 0, N                                 # the row lies in n .. end - 1
        while end - n > 1:
            middle = (n + end) // 2
            m_before = tl.load(cu_seqlens + middle) // BLOCK + middle > i
            n = tl.where(m_before, n, middle)
            end = tl.where(m_before, middle, end)
        first = tl.load(cu_seqlens + n)
        T = tl.load(cu_seqlens + n + 1) - first
        S = T
        i -= first // BLOCK + n
    return tl.cast(first, tl.int64), T, S, i * BLOCK


# Which blocks a program visits. Queries 12 .. 15 (a block of BM = 4) against the keys in blocks of
# BN = 4 with W = 12; x marks a pair that is seen:
#
#                 0       4       8       12      16
#     query 12    . x x x|x x x x|x x x x|x . . .|        lo      = 0    start of the first block
#           13    . . x x|x x x x|x x x x|x x . .|        full_lo = 4    start and
#           14    . . . x|x x x x|x x x x|x x x .|        full_hi = 12   end of the full blocks
#           15    . . . .|x x x x|x x x x|x x x x|        hi      = 16   end of the last key
#     FULL, e      0, 0    1, 0    1, 1    0, 1
#
# Only the edges, at the window's left end and at the diagonal, need a mask. Full blocks run without
# its code, in a pass of their own: `for FULL in tl.static_range(2)` compiles the loop's body twice,
# first for the edges, then for the full blocks. Both edges share one loop (two would be one more
# copy of the body), which hops over the full blocks. So a pass counts its blocks, e = 0, 1, ...:
# _block_count says how many there are, _block_start where the e-th begins.
#
# Query 15 sees nothing in the first block that it meets: such rows need care in the softmax.
#
# dK and dV turn the picture: keys 4 .. 7 against the queries. The diagonal is now on the left:
#
#                 4       8       12      16      20
#     key 4       x x x x|x x x x|x x x x|. . . .|        lo      = 4
#         5       . x x x|x x x x|x x x x|x . . .|        full_lo = 8
#         6       . . x x|x x x x|x x x x|x x . .|        full_hi = 16
#         7       . . . x|x x x x|x x x x|x x x .|        hi      = 19
#
# Sinks: the blocks that hold them, as far as they lie before lo, are the first of the edges. Seen
# from the keys there is nothing to hop over: a sink has all later queries.

@_jit
def _keys_seen(i0, S, W, BM: tl.constexpr, BN: tl.constexpr):
    """(lo, full_lo, full_hi, hi) for the queries i0 .. i0 + BM, counted as keys are."""
    lo = tl.maximum(i0 - W + 1, 0) // BN * BN                 # the first query's oldest key
    full_hi = (i0 + 1) // BN * BN                             # to the first query's own key
    full_lo = tl.cdiv(tl.maximum(i0 + BM - W, 0), BN) * BN    # from the last query's oldest key
    full_lo = tl.maximum(tl.minimum(full_lo, full_hi), lo)    # where no block is full: empty
    hi = tl.minimum(i0 + BM, S)                               # to the last query's own key
    return lo, full_lo, full_hi, hi


@_jit
def _queries_seen(j0, T, S, W, BM: tl.constexpr, BN: tl.constexpr, SINKS: tl.constexpr):
    """The same for the keys j0 .. j0 + BN, in rows of q: row t has the index S - T + t."""
    t0 = j0 - (S - T)                                         # the first key's own query
    lo = tl.maximum(t0, 0) // BM * BM
    least, most = W, W                                        # windows of the block's keys
    if SINKS > 0:
        least = tl.where(j0 + BN <= SINKS, S, W)
        most = tl.where(j0 < SINKS, S, W)
    full_hi = tl.minimum(tl.maximum(t0 + least, 0), T)        # to the first key's last query
    full_hi = tl.maximum(full_hi // BM * BM, lo)
    full_lo = tl.cdiv(tl.maximum(t0 + BN - 1, 0), BM) * BM    # from the last key's first query
    full_lo = tl.maximum(tl.minimum(full_lo, full_hi), lo)
    hi = tl.minimum(t0 + BN - 1 + most, T)                    # to the last key's last query
    hi = tl.maximum(hi, lo)                                   # keys too old for all: empty
    return lo, full_lo, full_hi, hi


@_jit
def _sink_blocks(lo, BLOCK: tl.constexpr, SINKS: tl.constexpr):
    """Blocks before lo that hold sinks."""
    return tl.minimum(tl.cdiv(SINKS, BLOCK), lo // BLOCK)


@_jit
def _block_count(seen, BLOCK: tl.constexpr, FULL: tl.constexpr, SINKS: tl.constexpr = 0):
    """Blocks of a pass: the full ones, or those of both edges and of SINKS keys."""
    lo, full_lo, full_hi, hi = seen
    if FULL:
        count = (full_hi - full_lo) // BLOCK
    else:
        count = (full_lo - lo) // BLOCK + tl.cdiv(hi - full_hi, BLOCK)
        if SINKS > 0:
            count += _sink_blocks(lo, BLOCK, SINKS)
    return count


@_jit
def _block_start(seen, e, BLOCK: tl.constexpr, FULL: tl.constexpr, SINKS: tl.constexpr = 0):
    """Start of a pass's e-th block."""
    lo, full_lo, full_hi, hi = seen
    if FULL:
        start = full_lo + e * BLOCK
    else:
        first = e * BLOCK                             # where it begins if it holds sinks
        if SINKS > 0:
            e -= _sink_blocks(lo, BLOCK, SINKS)
        hop = tl.where(lo + e * BLOCK < full_lo, 0, full_hi - full_lo)
        start = lo + hop + e * BLOCK
        if SINKS > 0:
            start = tl.where(e < 0, first, start)
    return start


@_jit
def _forward(q, k, v, o, lse,
             cu_seqlens, N, T, S, W, scale,
             s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G,
             D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             PACKED: tl.constexpr, SINKS: tl.constexpr):
    """BM queries of one head. Grid (blocks, H, B); last blocks first, they may have most keys.

    Online softmax (FlashAttention-2, algorithm 1): b_m is the largest score so far, b_l the sum of
    exp2(score - b_m), b_o that of exp2(score - b_m) * v; a new maximum shrinks what is summed.
    """
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    H, T_all = tl.num_programs(1), T                  # T and S become those of the packed row
    first, T, S, m0 = _locate(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    q = _at(q, i_b, first, i_h, s_qb, s_qt, s_qh)
    k = _at(k, i_b, first, i_h // G, s_kb, s_kt, s_kh)
    v = _at(v, i_b, first, i_h // G, s_vb, s_vt, s_vh)
    i0 = m0 + S - T                                   # the first query's index among the keys
    scale2 = scale * LOG2E

    b_q = _load(q, m0, T, s_qt, BM, D, BD, False)
    b_o = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    seen = _keys_seen(i0, S, W, BM, BN)
    for FULL in tl.static_range(2):                   # the edges, then the full blocks
        for e in range(_block_count(seen, BN, FULL, SINKS)):
            j0 = _block_start(seen, e, BN, FULL, SINKS)
            b_k = _load(k, j0, S, s_kt, BN, D, BD, FULL)
            b_s = _dot(b_q, tl.trans(b_k))                                  # (BM, BD) @ (BD, BN)
            if not FULL:
                o_i = (i0 + tl.arange(0, BM))[:, None]
                o_j = (j0 + tl.arange(0, BN))[None, :]
                b_s = tl.where(_in_window_jit(o_i, o_j, W, SINKS), b_s, float("-inf"))
            b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale2)
            # A query that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
            b_ref = b_max if FULL else tl.where(b_max == float("-inf"), 0.0, b_max)
            b_p = tl.exp2(b_s * scale2 - b_ref[:, None])
            b_shrink = tl.exp2(b_m - b_ref)
            b_m = b_max
            b_l = b_l * b_shrink + tl.sum(b_p, 1)
            b_v = _load(v, j0, S, s_vt, BN, D, BD, FULL)
            b_o = _dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None])     # (BM, BN) @ (BN, BD)

    o_out = ((i_b * T_all + first) * H + i_h) * D               # in (B, T, H, D)
    # Rows from T on may be 0 / 0 here; they are not stored.
    _store(o + o_out, m0, T, H * D, b_o / b_l[:, None], BM, D, BD)
    o_lse = (i_b * H + i_h) * T_all + first                     # in (B, H, T)
    o_m = m0 + tl.arange(0, BM)
    tl.store(lse + o_lse + o_m, b_m + tl.log2(b_l), mask=o_m < T)


# Backward, with S2 the scores in base 2 (FlashAttention-2, algorithm 2):
#
#     P = exp2(S2 - LSE)      dP = dO V^T      dS = P * (dP - delta)      delta = rowsum(P * dP)
#     dV = P^T dO             dQ = scale * dS K                           dK = scale * dS^T Q
#
# P is computed again, not stored; delta is rowsum(O * dO) as well, which needs no loop. There are
# two kernels, of which one sums over keys and the other over queries: a single one would need
# atomics for one of the sums, and their order, so the result's last bits, changes from run to run.

@_jit
def _backward_q(q, k, v, o, do, lse, delta, dq,
                cu_seqlens, N, T, S, W, scale,
                s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G,
                D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                PACKED: tl.constexpr, SINKS: tl.constexpr):
    """dQ of BM queries, on the forward's grid; and their delta, which _backward_kv reads after."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    H, T_all = tl.num_programs(1), T
    first, T, S, m0 = _locate(cu_seqlens, N, T, S, i_m, BM, PACKED)
    if m0 >= T:
        return
    q = _at(q, i_b, first, i_h, s_qb, s_qt, s_qh)
    k = _at(k, i_b, first, i_h // G, s_kb, s_kt, s_kh)
    v = _at(v, i_b, first, i_h // G, s_vb, s_vt, s_vh)
    o_lse = (i_b * H + i_h) * T_all + first                     # in (B, H, T)
    o_out = ((i_b * T_all + first) * H + i_h) * D               # in (B, T, H, D)
    i0 = m0 + S - T
    o_m = m0 + tl.arange(0, BM)

    b_q = _load(q, m0, T, s_qt, BM, D, BD, False)
    b_o = _load(o + o_out, m0, T, H * D, BM, D, BD, False)
    b_do = _load(do + o_out, m0, T, H * D, BM, D, BD, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + o_lse + o_m, b_delta, mask=o_m < T)
    b_lse = _load_numbers(lse + o_lse, m0, T, BM)
    b_dq = tl.zeros([BM, BD], tl.float32)
    seen = _keys_seen(i0, S, W, BM, BN)
    for FULL in tl.static_range(2):
        for e in range(_block_count(seen, BN, FULL, SINKS)):
            j0 = _block_start(seen, e, BN, FULL, SINKS)
            b_k = _load(k, j0, S, s_kt, BN, D, BD, FULL)
            b_v = _load(v, j0, S, s_vt, BN, D, BD, FULL)
            b_s = _dot(b_q, tl.trans(b_k))                                  # (BM, BD) @ (BD, BN)
            b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
            if not FULL:                              # after exp2, which can be inf where masked
                o_i = (i0 + tl.arange(0, BM))[:, None]
                o_j = (j0 + tl.arange(0, BN))[None, :]
                b_p = tl.where(_in_window_jit(o_i, o_j, W, SINKS), b_p, 0.0)
            b_dp = _dot(b_do, tl.trans(b_v))                                # (BM, BD) @ (BD, BN)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = _dot(b_ds.to(b_k.dtype), b_k, b_dq)                      # (BM, BN) @ (BN, BD)
    _store(dq + o_out, m0, T, H * D, b_dq * scale, BM, D, BD)


@_jit
def _backward_kv(q, k, v, do, lse, delta, dk, dv,
                 cu_seqlens, N, T, S, W, scale,
                 s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, G,
                 D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PACKED: tl.constexpr, SINKS: tl.constexpr):
    """dK and dV of BN keys of one head, summed over its G query heads here, in a fixed order.

    Scores stand transposed, (BN, BM), as in the second picture. Grid (blocks, Hkv, B).
    """
    i_k = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    Hkv, T_all, S_all = tl.num_programs(1), T, S
    first, T, S, j0 = _locate(cu_seqlens, N, T, S, tl.program_id(0), BN, PACKED)
    if j0 >= S:
        return
    H = Hkv * G
    k = _at(k, i_b, first, i_k, s_kb, s_kt, s_kh)
    v = _at(v, i_b, first, i_k, s_vb, s_vt, s_vh)

    b_k = _load(k, j0, S, s_kt, BN, D, BD, False)
    b_v = _load(v, j0, S, s_vt, BN, D, BD, False)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    seen = _queries_seen(j0, T, S, W, BM, BN, SINKS)
    for i_h in range(i_k * G, i_k * G + G):
        p_q = _at(q, i_b, first, i_h, s_qb, s_qt, s_qh)
        p_do = do + ((i_b * T_all + first) * H + i_h) * D       # in (B, T, H, D)
        o_lse = (i_b * H + i_h) * T_all + first                 # in (B, H, T)
        for FULL in tl.static_range(2):
            for e in range(_block_count(seen, BM, FULL)):
                m0 = _block_start(seen, e, BM, FULL)   # rows from T on load as 0 and so add 0
                b_q = _load(p_q, m0, T, s_qt, BM, D, BD, FULL)
                b_do = _load(p_do, m0, T, H * D, BM, D, BD, FULL)
                b_s = _dot(b_k, tl.trans(b_q))                              # (BN, BD) @ (BD, BM)
                b_dp = _dot(b_v, tl.trans(b_do))                            # (BN, BD) @ (BD, BM)
                # Both products before exp2, which then runs beside the second; lse and delta each
                # where it is used: registers are short here, and this order spills none.
                b_lse = _load_numbers(lse + o_lse, m0, T, BM)
                b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
                if not FULL:
                    # Counted from the block's first key, which takes fewer registers; where there
                    # are sinks, from the row's
                    origin = 0 if SINKS > 0 else j0
                    o_i = (S - T + m0 - origin) + tl.arange(0, BM)[None, :]
                    o_j = (j0 - origin) + tl.arange(0, BN)[:, None]
                    b_p = tl.where(_in_window_jit(o_i, o_j, W, SINKS), b_p, 0.0)
                b_dv = _dot(b_p.to(b_do.dtype), b_do, b_dv)                 # (BN, BM) @ (BM, BD)
                b_delta = _load_numbers(delta + o_lse, m0, T, BM)
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)                  # (BN, BM) @ (BM, BD)
    o_out = ((i_b * S_all + first) * Hkv + i_k) * D             # in (B, S, Hkv, D)
    _store(dk + o_out, j0, S, Hkv * D, b_dk * scale, BN, D, BD)
    _store(dv + o_out, j0, S, Hkv * D, b_dv, BN, D, BD)


# Decoding has one query a row, too little work for a GPU when the batch is small. So the ring's
# slots are split between programs, each of which writes the output over its own slots, part
# (B, H, splits, D), and their LSE, part_lse (B, H, splits), both fp32; _combine joins them.

@_jit
def _decode(q, k, v, position, part, part_lse,
            S, scale,
            s_qb, s_qh, s_kb, s_ks, s_kh, s_vb, s_vs, s_vh, G,
            n_blocks, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr):
    """n_blocks blocks of the ring against the G query heads of one key head, which are the rows of
    one tile (padded to 16, the least that tl.dot takes). Grid (splits, Hkv, B)."""
    i_s, n_splits = tl.program_id(0), tl.num_programs(0)
    i_k, Hkv = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    k += i_b * s_kb + i_k * s_kh
    v += i_b * s_vb + i_k * s_vh
    # Slots fill in order, 0 to S - 1, and then stay full. Among themselves they need no order: RoPE
    # is in the keys, and whatever is written lies inside the window.
    written = tl.minimum(tl.load(position + i_b), S - 1).to(tl.int32) + 1

    q += i_b * s_qb + i_k * G * s_qh
    b_q = _load(q, 0, G, s_qh, BG, D, BD, False)
    b_o = tl.zeros([BG, BD], tl.float32)
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    lo = i_s * n_blocks * BN
    hi = tl.minimum(lo + n_blocks * BN, written)
    for n in range(lo, hi, BN):
        b_k = _load(k, n, written, s_ks, BN, D, BD, False)
        b_s = _dot(b_q, tl.trans(b_k))                                      # (BG, BD) @ (BD, BN)
        m_n = n + tl.arange(0, BN) < written
        b_s = tl.where(m_n[None, :], b_s * (scale * LOG2E), float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))       # finite: slot n is written
        b_p = tl.exp2(b_s - b_max[:, None])
        b_shrink = tl.exp2(b_m - b_max)
        b_m = b_max
        b_l = b_l * b_shrink + tl.sum(b_p, 1)
        b_v = _load(v, n, written, s_vs, BN, D, BD, False)
        b_o = _dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None])         # (BG, BN) @ (BN, BD)

    # A split beyond the written slots has b_l = 0: its weight must be 0 (LSE -inf), not NaN.
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    row = (i_b * Hkv + i_k) * G                       # in (B * H, splits): the first of G heads
    o_g = tl.arange(0, BG)
    part += (row * n_splits + i_s) * D
    _store(part, 0, G, n_splits * D, b_o / b_l[:, None], BG, D, BD)
    tl.store(part_lse + (row + o_g) * n_splits + i_s, b_m + tl.log2(b_l), mask=o_g < G)


@_jit
def _combine(part, part_lse, o, n_splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """The splits' outputs (B, H, splits, D), weighted by softmax(LSE), into one. Grid (B * H)."""
    i = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    b_lse = tl.load(part_lse + i * n_splits + o_s, mask=o_s < n_splits, other=float("-inf"))
    b_w = tl.exp2(b_lse - tl.max(b_lse, 0))           # (BS,)
    b_o = _load(part + i * n_splits * D, 0, n_splits, D, BS, D, BD, False) * b_w[:, None]
    b_o = tl.sum(b_o, 0) / tl.sum(b_w, 0)             # (BD,)
    tl.store(o + i * D + o_d, b_o.to(o.dtype.element_ty), mask=o_d < D)


# ------------------------------------------------------------------------------------ launches

# (BM, BN, warps, stages) of the forward, dQ, and dK with dV, by padded head dimension. sm_90 stands
# for sm_100 too, since both have more shared memory; sm_80 for all others. Chosen so that nothing
# spills inside a loop and instructions are issued faster than the tensor cores work them off
# (tests/aot_compile.py, whose --sweep shows other tiles), not yet by a clock.
TILES = {
    (32, "sm_80"): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (64, "sm_80"): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
    (128, "sm_80"): ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    (32, "sm_90"): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (64, "sm_90"): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    (128, "sm_90"): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
}
FP32_TILE = (32, 32, 8, 1)                            # without tensor cores registers set the limit


def _pad(D):
    """Triton's blocks have powers of two as sides; 32 is the least that TILES has."""
    return max(32, triton.next_power_of_2(D))


def _launch(kernel, tensors, q, k, v, cu_seqlens, window, sinks):
    """One of the three training kernels on its own `tensors` and the arguments that all share."""
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    big = q.is_cuda and torch.cuda.get_device_properties(q.device).major in (9, 10)
    which = (_forward, _backward_q, _backward_kv).index(kernel)
    BM, BN, warps, stages = TILES[_pad(D), "sm_90" if big else "sm_80"][which]
    if q.dtype == torch.float32:
        BM, BN, warps, stages = FP32_TILE

    length, BLOCK, heads = (S, BN, Hkv) if kernel is _backward_kv else (T, BM, H)
    N = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    blocks = length // BLOCK + N if N else triton.cdiv(length, BLOCK)   # packed: see _locate
    with torch.cuda.device_of(q):
        kernel[blocks, heads, B](
            *tensors, cu_seqlens, N, T, S, window, D ** -0.5,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H // Hkv,
            D=D, BD=_pad(D), BM=BM, BN=BN, PACKED=N > 0, SINKS=sinks,
            num_warps=warps, num_stages=stages)


def _operator(schema):
    """A registered operator is one opaque node to torch.compile and to activation checkpointing."""
    name = "nanoswarr::" + schema[:schema.index("(")]
    return torch.library.custom_op(name, mutates_args=(), schema=schema[schema.index("("):])


def _empty_outputs(q):
    """Output (B, T, H, D), dense whatever the strides of q, and LSE (B, H, T)."""
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@_operator("attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int window, int sinks) "
           "-> (Tensor, Tensor)")
def _attention(q, k, v, cu_seqlens, window, sinks):
    o, lse = _empty_outputs(q)
    _launch(_forward, (q, k, v, o, lse), q, k, v, cu_seqlens, window, sinks)
    return o, lse


@_operator("attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, "
           "Tensor? cu_seqlens, int window, int sinks) -> (Tensor, Tensor, Tensor)")
def _attention_backward(q, k, v, o, lse, do, *visible):
    do = do.contiguous()
    delta = torch.empty_like(lse)                     # written by the first kernel, for the second
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _launch(_backward_q, (q, k, v, o, do, lse, delta, dq), q, k, v, *visible)
    _launch(_backward_kv, (q, k, v, do, lse, delta, dk, dv), q, k, v, *visible)
    return dq, dk, dv


@_operator("decode(Tensor q, Tensor k, Tensor v, Tensor position, int splits) -> Tensor")
def _decode_splits(q, k, v, position, splits):
    B, H, D = q.shape
    S, Hkv = k.shape[1:3]
    G, BD = H // Hkv, _pad(D)
    BG = max(16, triton.next_power_of_2(G))
    BN = 32 if q.dtype == torch.float32 else 64
    n_blocks = triton.cdiv(triton.cdiv(S, BN), splits)                  # of each split
    part = q.new_empty(B, H, splits, D, dtype=torch.float32)
    part_lse = part.new_empty(B, H, splits)
    o = q.new_empty(B, H, D)
    with torch.cuda.device_of(q):
        _decode[splits, Hkv, B](
            q, k, v, position, part, part_lse, S, D ** -0.5,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], G, n_blocks,
            D=D, BD=BD, BG=BG, BN=BN, num_warps=4, num_stages=3)
        BS = triton.next_power_of_2(splits)
        _combine[B * H,](part, part_lse, o, splits, D=D, BD=BD, BS=BS)
    return o


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.visible = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, do, _):
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    return *_attention_backward(q, k, v, o, lse, do, cu_seqlens, *ctx.visible), None, None, None


# What torch.compile has to know of an operator that it doesn't look into: gradient and shapes.
_attention.register_autograd(_backward, setup_context=_save)
_attention.register_fake(lambda q, *_: _empty_outputs(q))
_attention_backward.register_fake(lambda *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))
_decode_splits.register_fake(lambda q, *_: q.new_empty(q.shape))


# -------------------------------------------------------------------------------------- public

@functools.cache
def _warn(reason):
    """Once for each reason, not at each call: that is the cache's work."""
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
    """The kernels want the elements of a head side by side; any other stride they take as it is."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _check(q, k, v, window, cu_seqlens, sinks):
    """Everything that a kernel would answer with wrong numbers; ValueError."""
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be an int >= 1 or None, got {window!r}")
    if type(sinks) is not int or sinks < 0:
        raise ValueError(f"sinks must be an int >= 0, got {sinks!r}")
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"expected q (B, T, H, D) and k, v (B, S, Hkv, D), got {shapes}")
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (B, D) or Hkv < 1 or H % Hkv or S < T:
        raise ValueError(f"q, k, v must agree in B and D, H be a multiple of Hkv, S >= T: {shapes}")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1 or not q.is_floating_point():
        types = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v need one floating dtype and one device, got {types}")
    if cu_seqlens is None:
        return
    if B != 1 or S != T or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError("cu_seqlens, int32 (N + 1,), packs rows into B = 1 with S = T")
    if cu_seqlens.device.type == "cpu":               # on a GPU a look at values is a host sync
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != T or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {ends}")


def swa_attention(q, k, v, window=None, cu_seqlens=None, sinks=0):
    """Causal attention of each query to the last `window` keys, its own counted; None: to all. And
    to the first `sinks` keys of its row.

    q (B, T, H, D); k, v (B, S, Hkv, D), H a multiple of Hkv, S >= T: the queries are the last T of
    S positions (S > T for a chunk of a prompt). Returns (B, T, H, D), differentiable. cu_seqlens,
    int32 (N + 1,) from 0 to T, packs N rows, empty ones too, into B = 1. Scores are scaled by
    D**-0.5. ValueError for window < 1, sinks < 0 or shapes that don't fit. Source: Mistral 7B,
    section 2.
    """
    _check(q, k, v, window, cu_seqlens, sinks)
    if q.numel() == 0:
        return q.clone()
    if _use_triton(q):
        S = k.shape[1]
        if window is None or max(window, sinks) >= S:           # everything is seen
            window, sinks = S, 0
        return _attention(*_dense(q, k, v), cu_seqlens, window, sinks)[0]
    if cu_seqlens is not None:
        return _packed_torch(q, k, v, window, cu_seqlens, sinks)
    return _attention_torch(q, k, v, window, sinks)


def swa_decode(q, k_cache, v_cache, position, sinks=0):
    """Attention of one new query a row to its ring cache, in which its own key is already written.

    q (B, H, D); caches (B, S, Hkv, D), position p in slot p % S, so S is the window; position (B,)
    int >= 0, each query's own index. With sinks the first so many slots keep the first keys, and
    the others are the ring: as slots fill in order all the same, that is the writer's affair, and
    nothing changes here. Returns (B, H, D), not differentiable. Slots that position has not reached
    may hold anything, NaN too. On a GPU the grid follows from shapes and nothing waits for the
    host, so a CUDA graph can capture it. ValueError for shapes that don't fit.
    """
    _check(q[:, None], k_cache, v_cache, None, None, sinks)
    if position.shape != q.shape[:1] or position.is_floating_point():
        raise ValueError(f"position must be int ({len(q)},), got {position.dtype} "
                         f"{tuple(position.shape)}")
    if q.numel() == 0:
        return q.clone()
    if not _use_triton(q):
        return _decode_torch(q, k_cache, v_cache, position)
    B, S, Hkv = k_cache.shape[:3]
    # Programs for twice the GPU's processors, but no more splits than blocks of slots, nor than
    # _combine can hold at once.
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = max(1, min(2 * cores // (B * Hkv), triton.cdiv(S, 64), 128))
    return _decode_splits(*_dense(q, k_cache, v_cache), position, splits)
