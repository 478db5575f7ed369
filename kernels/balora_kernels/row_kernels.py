"""Rows of logits in three passes: the states of tiles, their merge, the gradient.

A row of V logits is cut into tiles of a width that depends on V alone. ``tile_states`` reads each tile once and leaves
nine numbers of it, ``merge`` combines those of a row in the order of the tiles, ``gradient`` reads the logits again
and writes the gradient. So few rows still fill a device, the same logits give the same bits however they are chunked,
and nothing is summed by atomics. ``merge`` is also the seam for a vocabulary that is spread over devices: the states
and block maxima of all of it, gathered, are all that it needs, but for the logits of the label and of K blocks.

The KL. With x = z/T, δ = z_P/T − x, any constant c, a = δ − c and some base m, the sums over the vocabulary
    L = Σ e^(x−m),  S = Σ e^(x−m) (e^a − 1),  R = Σ e^(x−m) a e^a
give lse_P − lse_S = c + log(1 + S/L) and KL(P ‖ S) = R/(L + S) − log(1 + S/L). With c the mean of δ under the student
S is of second order, as the KL is, and so is R, but for the rounding of first-order terms that cancel: the relative
error of the KL is about eps/√KL however close the teacher is, and whatever offset a row has. c stays within ``_REACH``
of the difference of the two maxima, so no e^(x−m) e^a overflows however far the teacher is: there is no second form.

In the kernels x, δ, a, c and m are in units of log 2.
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E, log1p, maximum, power2, tanh, times_less, total, weighted_growth
from .top_k import comparable, largest_blocks, pack, unpack_index, unpack_value

# Of a tile: the base m, the teacher's, L, L at temperature 1, c, S, R, m at temperature 1, m + c.
STATES = 9
# Of a row, for the gradient: m, m at temperature 1, 1/L, 1/L at temperature 1, c, log(1 + S/L), m + c. 32 bytes.
STATS = tl.constexpr(8)
_REACH = tl.constexpr(12.0)
_WIDE = tl.constexpr(8.0)
_HIDDEN = tl.constexpr(-1e7)  # a tile whose logits are all below counts as masked, as with −∞ or the least float
_NOWHERE = tl.constexpr(-1e30)  # the c of a tile that the teacher masks as a whole
_LOG2E = tl.constexpr(LOG2E)

# What the teacher's tensor holds.
DIFFERENCE = tl.constexpr(1)  # Z_P − Z, before a soft-cap
LOGITS = tl.constexpr(2)  # Z_P


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride):
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _is_valid(row, labels_ptr, valid_ptr):
    keep = row >= 0
    if labels_ptr is not None:
        keep = keep & (tl.load(labels_ptr + row) >= 0)
    if valid_ptr is not None:
        keep = keep & (tl.load(valid_ptr + row) != 0)
    return keep


@triton.jit
def _reach(columns, mask, vocab, PADDED: tl.constexpr):
    """The columns that may be read and written: up to the vocabulary's end, or on to a multiple of 16, so that the
    compiler sees whole vectors. Without them V = 50,257 is read number by number."""
    if PADDED:
        return columns < (vocab + 15) // 16 * 16
    else:
        return mask


@triton.jit
def _logits(
    ptr, bias_ptr, columns, mask, reach, scale, cap, CAP: tl.constexpr, SCALED: tl.constexpr, PADDED: tl.constexpr
):
    """z = cap·tanh(v) with v = scale·(a + b)/cap, then tanh(v) and v; −∞ beyond the mask."""
    a = tl.load(ptr, mask=reach, other=float("-inf")).to(tl.float32)
    if PADDED:
        a = tl.where(mask, a, float("-inf"))
    if bias_ptr is not None:
        a += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    v = a
    if SCALED:
        v = tl.where(mask, a * scale, float("-inf"))  # of a scale below 0 too
    th = v
    z = v
    if CAP:
        v = v / cap
        th = tanh(v)
        z = tl.where(mask, cap * th, float("-inf"))
    return z, th, v


@triton.jit
def _teacher(
    ptr, bias_ptr, columns, mask, reach, scale, cap, factor_ptr, th, v, student_cap,
    TEACHER: tl.constexpr, CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, SCALED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """z_P where the teacher has logits of its own, else z_P − z.

    Of a cap tanh(v + w) − tanh(v) = tanh(w)(1 − tanh²(v))/(1 + tanh(v)·tanh(w)), which keeps the relative accuracy of a
    small difference; a large one is subtracted.
    """
    if TEACHER == LOGITS:
        z, _, _ = _logits(ptr, bias_ptr, columns, mask, reach, scale, cap, TEACHER_CAP, SCALED, PADDED)
        return z
    d = tl.load(ptr, mask=reach, other=0.0).to(tl.float32)
    if PADDED:
        d = tl.where(mask, d, 0.0)
    if SCALED:
        d *= scale
    if factor_ptr is not None:
        d *= tl.load(factor_ptr)
    if CAP:
        w = d / student_cap
        y = tanh(w)
        near = y * ((1.0 - th) * (1.0 + th)) / (1.0 + th * y)
        d = student_cap * tl.where(tl.abs(w) > 1.0, tanh(v + w) - th, near)
    return d


@triton.jit
def _on_grid(base):
    """A base on a grid of 2⁻¹⁰: up to 2¹⁴ the sums and differences of bases have no rounding, then. c is up to 2⁻¹⁰ off
    the mean by that, which costs the KL of a row an absolute error of about 2⁻¹⁰·eps, 1e-10."""
    return tl.floor(base * 1024.0) * (1.0 / 1024.0)


@triton.jit
def _within(a):
    """Between ±_REACH; a NaN at the lower end."""
    return tl.minimum(tl.where(a > -_REACH, a, -_REACH), _REACH)


@triton.jit
def _apart(z, t, y, t_y, k, c):
    """a = δ − c from both logits, or, where a large c would cost it digits, from what they are above their bases.

    Of an entry that one of the two masks it is infinite, of one that both mask NaN: neither counts where 2^t_y is 0.
    """
    return t_y - y if tl.abs(c) > _WIDE else times_less(t - z, k, c)


@triton.jit(do_not_specialize=["rows"])
def tile_states(
    z_ptr, t_ptr, bias_ptr, t_bias_ptr, labels_ptr, valid_ptr, factor_ptr, states_ptr, maxima_ptr,
    rows, vocab, tiles, blocks,
    z_inner, z_outer_stride, z_inner_stride, z_stride,
    t_inner, t_outer_stride, t_inner_stride, t_stride,
    scale, t_scale, cap, t_cap, k,
    TEACHER: tl.constexpr, CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr, T: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.program_id(1)
    if _is_valid(row, labels_ptr, valid_ptr):
        local = tl.arange(0, TILE // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        columns = tile * TILE + local  # [TILE / BLOCK, BLOCK]
        mask = columns < vocab
        reach = _reach(columns, mask, vocab, PADDED)
        z_at = z_ptr + _row_offset(row, z_inner, z_outer_stride, z_inner_stride) + columns.to(tl.int64) * z_stride
        z, th, v = _logits(z_at, bias_ptr, columns, mask, reach, scale, cap, CAP, SCALED, PADDED)
        best = maximum(z, 1)
        if TOP:
            block = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
            tl.store(maxima_ptr + row.to(tl.int64) * blocks + block, best, mask=block < blocks)
        if T != 0 or TEACHER != 0:
            state = states_ptr + row.to(tl.int64) * tiles + tile
            field = rows.to(tl.int64) * tiles
            top = maximum(best, 0)
            masked = top < _HIDDEN  # as a whole: L = 0
            base = tl.where(masked, 0.0, _on_grid(top * k))
            y = times_less(z, k, base)
            e = power2(y)
            part = total(e)
            tl.store(state, tl.where(masked, float("-inf"), base))
            tl.store(state + 2 * field, part)
            if T == 2:
                tl.store(state + 3 * field, total(e * e))
            if T == 3:
                base1 = tl.where(masked, 0.0, top * _LOG2E)
                tl.store(state + 7 * field, tl.where(masked, float("-inf"), base1))
                tl.store(state + 3 * field, total(power2(times_less(z, _LOG2E, base1))))
        if TEACHER != 0:
            t_at = t_ptr + _row_offset(row, t_inner, t_outer_stride, t_inner_stride) + columns.to(tl.int64) * t_stride
            t = _teacher(
                t_at, t_bias_ptr, columns, mask, reach, t_scale, t_cap, factor_ptr, th, v, cap,
                TEACHER, CAP, TEACHER_CAP, TEACHER_SCALED, PADDED,
            )  # fmt: skip
            if TEACHER == DIFFERENCE:
                t_base = tl.max(tl.reshape(z + t, [TILE]), 0) * k
                offset = tl.where(masked, 0.0, t_base - base)
                a = times_less(t, k, offset)
                mean = total(e * a) / part
                mean = tl.where((tl.abs(mean) > _REACH) | masked, 0.0, mean)  # a NaN stays
                c = offset + mean
                a -= mean
                grown = power2(y + a)
                rise = grown * a
            else:
                t_top = maximum(tl.reshape(t, [TILE]), 0)
                gone = t_top < _HIDDEN  # the teacher masks the tile as a whole
                t_base = tl.where(gone, 0.0, t_top * k)
                offset = t_base - base
                # an entry that the teacher alone masks must not move the mean far
                mean = total(e * _within(times_less(t - z, k, offset))) / part
                mean = tl.where(masked, 0.0, mean)
                t_total = _on_grid(base + (offset + mean))
                c = t_total - base
                t_y = times_less(t, k, t_total)
                a = _apart(z, t, y, t_y, k, c)
                grown = power2(t_y)
                rise = tl.where(grown == 0.0, 0.0, grown * a)
                t_base = tl.where(gone, float("-inf"), t_base)
                c = tl.where(gone, _NOWHERE, c)
                tl.store(state + 8 * field, tl.where(gone, float("-inf"), t_total))
            tl.store(state + field, t_base)
            tl.store(state + 4 * field, c)
            tl.store(state + 5 * field, total(weighted_growth(e, grown, a)))
            tl.store(state + 6 * field, total(rise))


@triton.jit(do_not_specialize=["rows"])
def merge(
    z_ptr, bias_ptr, labels_ptr, valid_ptr, states_ptr, maxima_ptr,
    terms_ptr, stats_ptr, top_gradient_ptr, top_index_ptr,
    rows, vocab, tiles, blocks, z_inner, z_outer_stride, z_inner_stride, z_stride, scale, cap, k, top_k,
    TEACHER: tl.constexpr, CAP: tl.constexpr, SCALED: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Of one row: its terms CE, KL, −H; what ``gradient`` needs; the gradient of −H and where it belongs."""
    row = tl.program_id(0)
    z_row = z_ptr + _row_offset(row, z_inner, z_outer_stride, z_inner_stride)
    term = terms_ptr + row
    valid = _is_valid(row, labels_ptr, valid_ptr)
    if KP != 0:
        rank = tl.arange(0, KP)
        place = row.to(tl.int64) * top_k + rank
        if not valid:
            tl.store(top_gradient_ptr + place, tl.zeros([KP], tl.float32), mask=rank < top_k)
            tl.store(top_index_ptr + place, rank.to(tl.int64), mask=rank < top_k)
    if valid:
        if T != 0 or TEACHER != 0:
            tile = tl.arange(0, TILES)
            here = tile < tiles
            state = states_ptr + row.to(tl.int64) * tiles + tile
            field = rows.to(tl.int64) * tiles
            bases = tl.load(state, mask=here, other=float("-inf"))
            base = tl.max(bases, 0)
            part = tl.load(state + 2 * field, mask=here, other=0.0)
            alpha = tl.exp2(bases - base)
            whole = tl.sum(alpha * part, 0)
            stat = stats_ptr + row.to(tl.int64) * STATS
            tl.store(stat, base)
            if T != 0:
                base1, whole1 = base, whole
                if T == 2:
                    base1 = 2.0 * base
                    whole1 = tl.sum(alpha * alpha * tl.load(state + 3 * field, mask=here, other=0.0), 0)
                if T == 3:
                    bases1 = tl.load(state + 7 * field, mask=here, other=float("-inf"))
                    base1 = tl.max(bases1, 0)
                    whole1 = tl.sum(tl.exp2(bases1 - base1) * tl.load(state + 3 * field, mask=here, other=0.0), 0)
                tl.store(stat + 1, base1)
                tl.store(stat + 3, 1.0 / whole1)
                if labels_ptr is not None:
                    label = tl.load(labels_ptr + row)
                    known = (label >= 0) & (label < vocab)
                    label = tl.where(known, label, 0)
                    at = z_row + label * z_stride
                    labelled, _, _ = _logits(at, bias_ptr, label, known, known, scale, cap, CAP, SCALED, False)
                    tl.store(term, (tl.log2(whole1) - times_less(labelled, _LOG2E, base1)) * LN2)
            if TEACHER != 0:
                offset = tl.max(tl.load(state + field, mask=here, other=float("-inf")), 0) - base
                centre = tl.load(state + 4 * field, mask=here, other=0.0)
                s = tl.load(state + 5 * field, mask=here, other=0.0)
                r = tl.load(state + 6 * field, mask=here, other=0.0)
                c = offset + tl.sum(alpha * part * _within(centre - offset), 0) / whole
                # a tile's sums with c in the place of its own: its a becomes a + h
                if TEACHER == DIFFERENCE:
                    h = centre - c
                    beta = tl.exp2((bases - base) + h)
                else:
                    t_total = _on_grid(base + c)
                    c = t_total - base
                    tl.store(stat + 6, t_total)
                    t_bases = tl.load(state + 8 * field, mask=here, other=float("-inf"))
                    hidden = (bases == float("-inf")) | (t_bases == float("-inf"))
                    h = tl.where(hidden, centre - c, (t_bases - t_total) - (bases - base))
                    beta = tl.exp2(t_bases - t_total)
                surplus = tl.sum(beta * s + weighted_growth(alpha, beta, h) * part, 0) / whole
                first = tl.sum(beta * (r + h * (part + s)), 0) / whole
                shift = log1p(surplus)
                # E_P[a] − shift: two numbers that grow with the distance
                mean = first.to(tl.float64) / (1.0 + surplus.to(tl.float64)) * LN2
                tl.store(term + rows, (mean - log1p(surplus.to(tl.float64))).to(tl.float32))
                tl.store(stat + 4, c)
                tl.store(stat + 5, shift * _LOG2E)
                tl.store(stat + 2, 1.0 / whole + (shift - shift))  # a NaN of the teacher reaches the gradient
        if KP != 0:
            maxima = maxima_ptr + row.to(tl.int64) * blocks
            block = largest_blocks(maxima, blocks, BLOCKS, KP)
            columns = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [KP, BLOCK]
            mask = columns < vocab
            z_at = z_row + columns.to(tl.int64) * z_stride
            z, _, _ = _logits(z_at, bias_ptr, columns, mask, mask, scale, cap, CAP, SCALED, False)
            keys = tl.topk(tl.reshape(pack(comparable(z), columns, mask), [KP * BLOCK]), KP)
            chosen = rank < top_k
            value = tl.where(chosen, unpack_value(keys), float("-inf"))
            w = value - tl.max(value, 0)
            e = tl.exp(w)
            total_k = tl.sum(e, 0)
            q = e / total_k
            # q log q, 0 for a masked entry; a NaN stays
            part_k = tl.where(q == 0.0, 0.0, q * (w - tl.log(total_k)))
            negative_entropy = tl.sum(part_k, 0)
            gradient = part_k - q * negative_entropy
            if CAP:
                th = value / cap
                gradient *= (1.0 - th) * (1.0 + th)
            tl.store(term + 2 * rows, negative_entropy)
            tl.store(top_gradient_ptr + place, gradient, mask=chosen)
            tl.store(top_index_ptr + place, unpack_index(keys).to(tl.int64), mask=chosen)


@triton.jit
def gradient(
    z_ptr, t_ptr, bias_ptr, t_bias_ptr, labels_ptr, valid_ptr, factor_ptr, stats_ptr, out_ptr, scale_ptr,
    vocab,
    z_inner, z_outer_stride, z_inner_stride, z_stride,
    t_inner, t_outer_stride, t_inner_stride, t_stride,
    out_inner, out_outer_stride, out_inner_stride, out_stride,
    scale, t_scale, cap, t_cap, k, strength, out_scale,
    TEACHER: tl.constexpr, CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = out_scale·(softmax(z) − onehot(label) + strength·(softmax(z/T) − softmax(z_P/T)))·dz/d(scale·(a + b))."""
    row = tl.program_id(0)
    start = tl.program_id(1) * TILE
    columns = start + tl.arange(0, TILE)
    mask = columns < vocab
    reach = _reach(columns, mask, vocab, PADDED)
    out_at = out_ptr + _row_offset(row, out_inner, out_outer_stride, out_inner_stride)
    out_at += columns.to(tl.int64) * out_stride
    g = tl.zeros([TILE], tl.float32)
    if _is_valid(row, labels_ptr, valid_ptr):
        z_at = z_ptr + _row_offset(row, z_inner, z_outer_stride, z_inner_stride) + columns.to(tl.int64) * z_stride
        z, th, v = _logits(z_at, bias_ptr, columns, mask, reach, scale, cap, CAP, SCALED, PADDED)
        stat = stats_ptr + row.to(tl.int64) * STATS
        y = times_less(z, k, tl.load(stat))
        e = power2(y)
        if TEACHER != 0:
            t_at = t_ptr + _row_offset(row, t_inner, t_outer_stride, t_inner_stride) + columns.to(tl.int64) * t_stride
            t = _teacher(
                t_at, t_bias_ptr, columns, mask, reach, t_scale, t_cap, factor_ptr, th, v, cap,
                TEACHER, CAP, TEACHER_CAP, TEACHER_SCALED, PADDED,
            )  # fmt: skip
            shift = tl.load(stat + 5)
            if TEACHER == DIFFERENCE:
                u = times_less(t, k, tl.load(stat + 4)) - shift
                grown = power2(y + u)
            else:
                t_y = times_less(t, k, tl.load(stat + 6))
                u = _apart(z, t, y, t_y, k, tl.load(stat + 4)) - shift
                grown = power2(t_y - shift)
            # p_S − p_P = −p_S (e^u − 1), never from two rounded probabilities
            g = weighted_growth(e, grown, u) * (-strength * tl.load(stat + 2))
        if T != 0:
            e1 = e
            if T == 2:
                e1 = e * e
            if T == 3:
                e1 = power2(times_less(z, _LOG2E, tl.load(stat + 1)))
            g += e1 * tl.load(stat + 3)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + row) - start
            if label >= 0 and label < TILE:  # of one tile of many
                g -= tl.where(tl.arange(0, TILE) == label.to(tl.int32), 1.0, 0.0)
        if CAP:
            g *= (1.0 - th) * (1.0 + th)
        g *= out_scale
        if scale_ptr is not None:
            g *= tl.load(scale_ptr)
    tl.store(out_at, g.to(out_ptr.dtype.element_ty), mask=reach)


@triton.jit
def add_top(
    gradient_ptr, index_ptr, out_ptr, factor, out_inner, out_outer_stride, out_inner_stride, out_stride, top_k,
    KP: tl.constexpr,
):  # fmt: skip
    """Adds factor times the gradient of −H to K entries of a row."""
    row = tl.program_id(0)
    rank = tl.arange(0, KP)
    mask = rank < top_k
    place = row.to(tl.int64) * top_k + rank
    index = tl.load(index_ptr + place, mask=mask, other=0)
    at = out_ptr + _row_offset(row, out_inner, out_outer_stride, out_inner_stride) + index * out_stride
    sum_ = tl.load(at, mask=mask).to(tl.float32) + factor * tl.load(gradient_ptr + place, mask=mask)
    tl.store(at, sum_.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cap(z_ptr, out_ptr, vocab, z_stride, out_stride, factor, out_scale, TILE: tl.constexpr):
    """out = out_scale·tanh(factor·z), a tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < vocab
    t = tanh(factor * tl.load(z_ptr + row * z_stride + columns, mask=mask, other=0.0))
    tl.store(out_ptr + row * out_stride + columns, (out_scale * t).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def capped_gradient(
    t_ptr, multiple_ptr, left_ptr, right_ptr, out_ptr, rows, vocab, rank, t_stride, right_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = (multiple·t + left·right)·(1 − t²), some columns of some rows."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < vocab)
    row = row.to(tl.int64)
    t = tl.load(t_ptr + row * t_stride + column, mask=mask, other=0.0)
    g = tl.load(multiple_ptr) * t
    left_at = left_ptr + row * rank  # [ROWS, 1]
    right_at = right_ptr + column  # [1, COLUMNS]
    for _ in range(rank):
        left = tl.load(left_at, mask=row < rows, other=0.0)
        g += left * tl.load(right_at, mask=column < vocab, other=0.0)
        left_at += 1
        right_at += right_stride
    g *= (1.0 - t) * (1.0 + t)
    tl.store(out_ptr + row * out_stride + column, g.to(out_ptr.dtype.element_ty), mask=mask)
