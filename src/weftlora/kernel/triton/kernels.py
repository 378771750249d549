"""The products of the node as Triton kernels. Nothing but `weftlora.kernel.triton.launches` imports this, and only to launch one.

Letters: t token, i in, o out, r rank slot (or row that reads x), n head. Every kernel takes strides, so nothing has to be
contiguous, and numbers of any dtype, which it casts to DOT as it loads them; sums are in fp32. Whoever launches them knows the
shapes; blocks are padded with zeros at the ends.

Which tokens a program has: of one adapter a run of them, the program's number times `chunk`. Of several, TABLE, a run of `order`,
which has the tokens of adapter 0 first, then those of adapter 1, and so on: `tiles` [count, 3] has the adapter and the ends of every
program's run. Then the factors have an axis of adapters, whose stride is the one that ends in _e.

Dropout: `weftlora.kernel.philox` has the definition that `_kept` follows. Sums are never taken by atomic additions, so that results
are the same every time: what several programs add to is written side by side and added afterwards.

Written for Triton 3.6 and later, without what is special to one architecture.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARIES = ("tokens", "chunk", "key0", "key1", "limit")
"""Arguments that are new in every step: no kernel is compiled anew for what their values have in common."""


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    a, b = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    return tl.umulhi(b, c2) ^ c1 ^ k0, b * c2, tl.umulhi(a, c0) ^ c3 ^ k1, a * c0


@triton.jit
def _kept(t, first, key0, key1, limit, WIDTH: tl.constexpr, ROUNDS: tl.constexpr):
    """Which elements of the tokens t [T] are kept, [T, WIDTH] of those from `first` on, a multiple of 4."""
    q = first // 4 + tl.arange(0, WIDTH // 4)
    c0 = (t[:, None] + 0 * q[None, :]).to(tl.uint32)
    c1 = (0 * t[:, None] + q[None, :]).to(tl.uint32)
    zero = c0 ^ c0
    c2, c3 = zero, zero
    k0, k1 = zero + key0.to(tl.uint32), zero + key1.to(tl.uint32)
    a, b = tl.full(c0.shape, 0x9E3779B9, tl.uint32), tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + a, k1 + b
    bound = zero + limit.to(tl.uint32)
    d0, d1 = (c0 >= bound).to(tl.int8), (c1 >= bound).to(tl.int8)
    d2, d3 = (c2 >= bound).to(tl.int8), (c3 >= bound).to(tl.int8)
    # the four words of a counter become four elements beside one another, in a thread that has four elements beside one another
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), [t.shape[0], WIDTH]) != 0


@triton.jit
def _run(tiles, program, tokens, chunk, TABLE: tl.constexpr):
    """The adapter of a program, and where its run of tokens begins and ends."""
    if TABLE:
        adapter = tl.load(tiles + 3 * program)
        first = tl.load(tiles + 3 * program + 1)
        last = tl.load(tiles + 3 * program + 2)
    else:
        adapter = program * 0
        first = program * chunk
        last = tl.minimum(first + chunk, tokens)
    return adapter.to(tl.int64), first, last


@triton.jit
def _tokens(order, at, last, TABLE: tl.constexpr):
    """The tokens of the places `at` of a run that ends at `last`, and which of them there are."""
    live = at < last
    t = tl.load(order + at, mask=live, other=0) if TABLE else at
    return t, live


@triton.jit(do_not_specialize=VARIES)
def masked_kernel(
    x, out, tokens, width, x_t, x_i, key0, key1, limit, ROUNDS: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr
):
    """x with its dropped elements 0; out [t, i] is contiguous."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BI
    i = first + tl.arange(0, BI)
    there = (t < tokens)[:, None] & (i < width)[None, :]
    at = t[:, None].to(tl.int64)
    value = tl.load(x + at * x_t + i[None, :].to(tl.int64) * x_i, mask=there, other=0.0)
    value = tl.where(_kept(t, first, key0, key1, limit, BI, ROUNDS), value, 0.0)
    tl.store(out + at * width + i[None, :], value.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARIES)
def read_kernel(
    x, rows, out, tiles, order, tokens, width, slots,
    x_t, x_i, rows_e, rows_r, rows_i, out_k,
    chunk, share, key0, key1, limit,
    TABLE: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out[k, t, r] = Σ x̂[t, i] rows[r, i] over the k-th `share` of in, a multiple of BI; x̂ is x through dropout."""
    e, first, last = _run(tiles, tl.program_id(0), tokens, chunk, TABLE)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    t, live = _tokens(order, first + tl.arange(0, BT), last, TABLE)
    at = t[:, None].to(tl.int64)
    acc = tl.zeros([BT, BR], dtype=tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, width), BI):
        i = start + tl.arange(0, BI)
        x_b = tl.load(
            x + at * x_t + i[None, :].to(tl.int64) * x_i, mask=live[:, None] & (i < width)[None, :], other=0.0
        )
        if DROPOUT:
            x_b = tl.where(_kept(t, start, key0, key1, limit, BI, ROUNDS), x_b, 0.0)
        where = rows + e * rows_e + r[None, :].to(tl.int64) * rows_r + i[:, None] * rows_i
        rows_b = tl.load(where, mask=(r < slots)[None, :] & (i < width)[:, None], other=0.0)
        acc = tl.dot(x_b.to(DOT), rows_b.to(DOT), acc, input_precision=PRECISION)
    there = live[:, None] & (r < slots)[None, :]
    tl.store(out + part.to(tl.int64) * out_k + at * slots + r[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARIES)
def write_kernel(
    base, h, up, out, tiles, order, tokens, width, slots, scale,
    base_t, base_o, h_t, h_r, up_e, up_o, up_r, out_t,
    chunk, key0, key1, limit,
    TABLE: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[t, o] = base[t, o] + scale · Σ h[t, r] up[o, r], the sum 0 where dropout has dropped o; `out` may be `base`."""
    e, first, last = _run(tiles, tl.program_id(0), tokens, chunk, TABLE)
    begin = tl.program_id(1) * BO
    o = begin + tl.arange(0, BO)
    t, live = _tokens(order, first + tl.arange(0, BT), last, TABLE)
    at = t[:, None].to(tl.int64)
    acc = tl.zeros([BT, BO], dtype=tl.float32)
    for start in range(0, slots, BR):
        r = start + tl.arange(0, BR)
        h_b = tl.load(h + at * h_t + r[None, :] * h_r, mask=live[:, None] & (r < slots)[None, :], other=0.0)
        where = up + e * up_e + o[None, :].to(tl.int64) * up_o + r[:, None] * up_r
        up_b = tl.load(where, mask=(r < slots)[:, None] & (o < width)[None, :], other=0.0)
        acc = tl.dot(h_b.to(DOT), up_b.to(DOT), acc, input_precision=PRECISION)
    acc = acc * scale
    if DROPOUT:
        acc = tl.where(_kept(t, begin, key0, key1, limit, BO, ROUNDS), acc, 0.0)
    there = live[:, None] & (o < width)[None, :]
    acc += tl.load(base + at * base_t + o[None, :].to(tl.int64) * base_o, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at * out_t + o[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARIES)
def linear_kernel(
    x, weight, bias, h, up, out, tokens, width, inner, slots, scale,
    x_t, x_i, w_o, w_i, bias_o, h_t, h_r, up_o, up_r,
    BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[t, o] = scale · Σ h[t, r] up[o, r] + bias[o] + Σ x[t, i] weight[o, i], in one accumulator; out is contiguous."""
    high, wide = tl.cdiv(tokens, BT), tl.cdiv(width, BO)
    program = tl.program_id(
        0
    )  # GROUP blocks of tokens are taken together, so that what they read of W is still in the cache
    block = program // (GROUP * wide)
    size = tl.minimum(high - block * GROUP, GROUP)
    t = (block * GROUP + (program % (GROUP * wide)) % size) * BT + tl.arange(0, BT)
    o = (program % (GROUP * wide)) // size * BO + tl.arange(0, BO)
    live, within = (t < tokens)[:, None], (o < width)[None, :]
    at, to = t[:, None].to(tl.int64), o[None, :].to(tl.int64)
    acc = tl.zeros([BT, BO], dtype=tl.float32)
    for start in range(0, slots, BR):
        r = start + tl.arange(0, BR)
        h_b = tl.load(h + at * h_t + r[None, :] * h_r, mask=live & (r < slots)[None, :], other=0.0)
        up_b = tl.load(up + to * up_o + r[:, None] * up_r, mask=(r < slots)[:, None] & within, other=0.0)
        acc = tl.dot(h_b.to(DOT), up_b.to(DOT), acc, input_precision=PRECISION)
    acc = acc * scale
    if BIAS:
        acc += tl.load(bias + o * bias_o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    for start in range(0, inner, BI):
        i = start + tl.arange(0, BI)
        x_b = tl.load(x + at * x_t + i[None, :].to(tl.int64) * x_i, mask=live & (i < inner)[None, :], other=0.0)
        w_b = tl.load(weight + to * w_o + i[:, None].to(tl.int64) * w_i, mask=(i < inner)[:, None] & within, other=0.0)
        acc = tl.dot(x_b.to(DOT), w_b.to(DOT), acc, input_precision=PRECISION)
    tl.store(out + at * width + to, acc.to(out.dtype.element_ty), mask=live & within)


@triton.jit(do_not_specialize=VARIES)
def mix_kernel(
    u, omega, h, tokens, rank, heads, extra, top,
    u_t, u_r, omega_t, omega_n, h_t,
    TOP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h[t, n·rank + r] = ω⁺[t, n] u[t, r] in the n-th row of programs; the one after the last head copies the extra slots."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    own = tl.program_id(1)
    n = tl.arange(0, BN)
    live, at = (t < tokens)[:, None], t[:, None].to(tl.int64)
    mixed = tl.load(omega + at * omega_t + n[None, :] * omega_n, mask=live & (n < heads)[None, :], other=0.0)
    if TOP:
        mixed = _largest(mixed, n, heads, top)
    weight = tl.sum(tl.where((n == own)[None, :], mixed, 0.0), 1)[:, None]
    routed = own < heads
    weight = tl.where(routed, weight, 1.0)
    size = tl.where(routed, rank, extra)
    source = tl.where(routed, 0, rank)
    for start in range(0, size, BR):
        r = start + tl.arange(0, BR)
        there = live & (r < size)[None, :]
        value = tl.load(u + at * u_t + (source + r)[None, :] * u_r, mask=there, other=0.0).to(tl.float32)
        tl.store(h + at * h_t + (own * rank + r)[None, :], (weight * value).to(h.dtype.element_ty), mask=there)


@triton.jit
def _largest(omega, n, heads, top):
    """ω⁺ [t, n] of ω: the `top` largest over their sum, 0 for the others; of equal ones those of the lowest index."""
    rank = tl.zeros(omega.shape, dtype=tl.int32)
    for m in range(heads):
        other = tl.sum(tl.where((n == m)[None, :], omega, 0.0), 1)[:, None]
        rank += ((other > omega) | ((other == omega) & (m < n)[None, :])).to(tl.int32)
    chosen = tl.where((rank < top) & (n < heads)[None, :], omega, 0.0)
    total = tl.sum(chosen, 1)[:, None]
    return chosen / tl.where(total > 0.0, total, 1.0)  # 0 only of tokens that are not there


@triton.jit(do_not_specialize=VARIES)
def mix_backward_kernel(
    gh, gomega, u, omega, gu, glogits, tokens, rank, heads, extra, top,
    gh_t, gh_r, gomega_t, gomega_n, u_t, u_r, omega_t, omega_n, gu_t,
    TOP: tl.constexpr, TOLD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of u and of the router's logits, through the mixture and the softmax; gomega is what came to ω from elsewhere."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.arange(0, BN)
    live, at = (t < tokens)[:, None], t[:, None].to(tl.int64)
    within = live & (n < heads)[None, :]
    weight = tl.load(omega + at * omega_t + n[None, :] * omega_n, mask=within, other=0.0)
    mixed = _largest(weight, n, heads, top) if TOP else weight
    g = tl.zeros([BT, BN], dtype=tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        there = live & (r < rank)[None, :]
        u_b = tl.load(u + at * u_t + r[None, :] * u_r, mask=there, other=0.0).to(tl.float32)
        acc = tl.zeros([BT, BR], dtype=tl.float32)
        for m in range(heads):
            gh_b = tl.load(gh + at * gh_t + (m * rank + r)[None, :] * gh_r, mask=there, other=0.0).to(tl.float32)
            of_m = (n == m)[None, :]
            acc += tl.sum(tl.where(of_m, mixed, 0.0), 1)[:, None] * gh_b
            g += tl.where(of_m, tl.sum(gh_b * u_b, 1)[:, None], 0.0)
        tl.store(gu + at * gu_t + r[None, :], acc.to(gu.dtype.element_ty), mask=there)
    for start in range(0, extra, BR):
        r = start + tl.arange(0, BR)
        there = live & (r < extra)[None, :]
        gh_b = tl.load(gh + at * gh_t + (heads * rank + r)[None, :] * gh_r, mask=there, other=0.0)
        tl.store(gu + at * gu_t + (rank + r)[None, :], gh_b.to(gu.dtype.element_ty), mask=there)
    through = mixed * (g - tl.sum(g * mixed, 1)[:, None])
    if TOLD:
        told = tl.load(gomega + at * gomega_t + n[None, :] * gomega_n, mask=within, other=0.0).to(tl.float32)
        through += weight * (told - tl.sum(told * weight, 1)[:, None])
    tl.store(glogits + at * heads + n[None, :], through.to(glogits.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=VARIES)
def write_backward_kernel(
    g, h, up, gh, gup, tiles, order, tokens, width, slots, scale,
    g_t, g_o, h_t, h_r, up_e, up_o, up_r, gh_k, gup_k,
    chunk,
    TABLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of one block of out and one run of tokens, reading g [t, o] once:
    gh[block, t, r] = scale · Σ g[t, o] up[o, r] and gup[run, o, r] = scale · Σ g[t, o] h[t, r]."""
    run = tl.program_id(1)
    e, first, last = _run(tiles, run, tokens, chunk, TABLE)
    block = tl.program_id(0)
    o = block * BO + tl.arange(0, BO)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    within, of_rank = (o < width), (r < slots)
    where = up + e * up_e + o[:, None].to(tl.int64) * up_o + r[None, :] * up_r
    up_b = tl.load(where, mask=within[:, None] & of_rank[None, :], other=0.0).to(DOT)
    acc = tl.zeros([BO, BR], dtype=tl.float32)
    for start in range(first, last, BT):
        t, live = _tokens(order, start + tl.arange(0, BT), last, TABLE)
        at = t[:, None].to(tl.int64)
        g_b = tl.load(g + at * g_t + o[None, :].to(tl.int64) * g_o, mask=live[:, None] & within[None, :], other=0.0)
        g_b = g_b.to(DOT)
        there = live[:, None] & of_rank[None, :]
        gh_b = tl.dot(g_b, up_b, input_precision=PRECISION) * scale
        tl.store(gh + block.to(tl.int64) * gh_k + at * slots + r[None, :], gh_b.to(gh.dtype.element_ty), mask=there)
        h_b = tl.load(h + at * h_t + r[None, :] * h_r, mask=there, other=0.0).to(DOT)
        acc = tl.dot(tl.trans(g_b), h_b, acc, input_precision=PRECISION)
    where = gup + run.to(tl.int64) * gup_k + o[:, None].to(tl.int64) * slots + r[None, :]
    tl.store(where, (acc * scale).to(gup.dtype.element_ty), mask=within[:, None] & of_rank[None, :])


@triton.jit(do_not_specialize=VARIES)
def rows_backward_kernel(
    gu, x, grows, tiles, order, tokens, width, slots,
    gu_t, gu_r, x_t, x_i, grows_k,
    chunk, key0, key1, limit,
    TABLE: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """grows[run, r, i] = Σ gu[t, r] x̂[t, i] over the tokens of a run; x̂ is x through the same dropout as in `read_kernel`."""
    begin = tl.program_id(0) * BI
    run = tl.program_id(1)
    _, first, last = _run(tiles, run, tokens, chunk, TABLE)
    i = begin + tl.arange(0, BI)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros([BR, BI], dtype=tl.float32)
    for start in range(first, last, BT):
        t, live = _tokens(order, start + tl.arange(0, BT), last, TABLE)
        at = t[:, None].to(tl.int64)
        x_b = tl.load(
            x + at * x_t + i[None, :].to(tl.int64) * x_i, mask=live[:, None] & (i < width)[None, :], other=0.0
        )
        if DROPOUT:
            x_b = tl.where(_kept(t, begin, key0, key1, limit, BI, ROUNDS), x_b, 0.0)
        where = gu + t[None, :].to(tl.int64) * gu_t + r[:, None] * gu_r
        gu_b = tl.load(where, mask=(r < slots)[:, None] & live[None, :], other=0.0)
        acc = tl.dot(gu_b.to(DOT), x_b.to(DOT), acc, input_precision=PRECISION)
    where = grows + run.to(tl.int64) * grows_k + r[:, None].to(tl.int64) * width + i[None, :]
    tl.store(where, acc.to(grows.dtype.element_ty), mask=(r < slots)[:, None] & (i < width)[None, :])
