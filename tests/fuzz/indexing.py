"""Gather, scatter, convolution and triangular solves in NumPy, for `interpret`."""

import itertools
import math

import numpy as np

# --- gather and scatter --------------------------------------------------------------------------


def _modes(mode):
    """What becomes of indices that are out of bounds: "clip", "fill" or "promise"."""
    text = str(mode).lower()
    return next(name for name in ("clip", "fill", "promise") if name in text)


def _places(shape, indices, starts_at, batching, batching_of_indices, sizes):
    """For each window the index of each of its entries, and whether it lies inside.

    Args:
      shape: of what is indexed.
      indices: (*windows, n), where windows begin along the axes `starts_at`.
      starts_at: those axes.
      batching: axes of what is indexed that go along with those of `indices`.
      batching_of_indices: these.
      sizes: of a window.
    """
    windows = indices.shape[:-1]
    starts = np.zeros((*windows, len(shape)), int)
    for i, axis in enumerate(starts_at):
        starts[..., axis] = indices[..., i]
    for axis, other in zip(batching, batching_of_indices, strict=True):
        own = [1] * len(windows)
        own[other] = windows[other]
        starts[..., axis] = np.arange(windows[other]).reshape(own)
    limits = np.array(shape, int) - np.array(sizes, int)
    inside = np.all((starts >= 0) & (starts <= limits), -1)
    starts = np.clip(starts, 0, np.maximum(limits, 0))
    index = []
    for axis, size in enumerate(sizes):
        own = [1] * len(sizes)
        own[axis] = size
        index.append(
            starts[..., axis].reshape(*windows, *[1] * len(sizes)) + np.arange(size).reshape(own)
        )
    return tuple(index), inside


def gather(x, indices, dimension_numbers, slice_sizes, mode, fill_value=None, **_):
    numbers = dimension_numbers
    batching = numbers.operand_batching_dims
    index, inside = _places(
        x.shape,
        indices,
        numbers.start_index_map,
        batching,
        numbers.start_indices_batching_dims,
        slice_sizes,
    )
    found = x[index]
    if _modes(mode) == "fill":
        if fill_value is None:
            if x.dtype.kind in "iu":
                fill_value = np.iinfo(x.dtype).min if x.dtype.kind == "i" else np.iinfo(x.dtype).max
            else:
                fill_value = True if x.dtype == bool else np.nan
        found = np.where(inside.reshape(*inside.shape, *[1] * x.ndim), found, fill_value)
    n = inside.ndim
    found = np.squeeze(found, tuple(n + i for i in (*numbers.collapsed_slice_dims, *batching)))
    rank = found.ndim
    windows = [i for i in range(rank) if i not in numbers.offset_dims]
    return np.moveaxis(found, range(rank), (*windows, *numbers.offset_dims))


def scatter(combine):
    """A scatter whose updates are added (or set) one after the other."""

    def run(x, indices, updates, dimension_numbers, mode, **_):
        numbers = dimension_numbers
        batching = numbers.operand_batching_dims
        inserted = {*numbers.inserted_window_dims, *batching}
        own = [updates.shape[i] for i in numbers.update_window_dims]
        sizes = [1 if i in inserted else own.pop(0) for i in range(x.ndim)]
        index, inside = _places(
            x.shape,
            indices,
            numbers.scatter_dims_to_operand_dims,
            batching,
            numbers.scatter_indices_batching_dims,
            sizes,
        )
        rank = updates.ndim
        windows = [i for i in range(rank) if i not in numbers.update_window_dims]
        updates = updates.transpose(*windows, *numbers.update_window_dims)
        updates = updates.reshape(*inside.shape, *sizes)
        if _modes(mode) != "clip":
            index = tuple(np.broadcast_to(i, updates.shape)[inside] for i in index)
            updates = updates[inside]
        x = np.array(x)
        combine(x, index, updates)
        return x

    return run


def assign(x, index, updates):
    x[index] = updates


# --- convolution ---------------------------------------------------------------------------------


def _spread(x, gaps):
    """Zeros between the entries of the last axes, those of positions."""
    space = x.shape[2:]
    sizes = [max(0, (n - 1) * gap + 1) for n, gap in zip(space, gaps, strict=True)]
    result = np.zeros((*x.shape[:2], *sizes), x.dtype)
    result[(..., *(slice(None, None, gap) for gap in gaps))] = x
    return result


def _padded(x, padding):
    for axis, (low, high) in enumerate(padding, 2):
        size = x.shape[axis]
        x = np.take(x, range(max(0, -low), size - max(0, -high)), axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (max(0, low), max(0, high))
        x = np.pad(x, pad)
    return x


def convolution(
    x,
    kernel,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    **_,
):
    numbers = dimension_numbers
    if x.dtype.itemsize == 2:  # which `einsum` does not take
        x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    x = x.transpose(numbers.lhs_spec)  # batch, channels, positions
    kernel = kernel.transpose(numbers.rhs_spec)  # outputs, inputs, window
    x = _padded(_spread(x, lhs_dilation), padding)
    kernel = _spread(kernel, rhs_dilation)
    groups = max(feature_group_count, batch_group_count)
    axis = 1 if feature_group_count > 1 else 0
    parts = [
        _one_group(a, b, window_strides)
        for a, b in zip(np.split(x, groups, axis), np.split(kernel, groups, 0), strict=True)
    ]
    result = np.concatenate(parts, 1)
    return np.moveaxis(result, range(result.ndim), numbers.out_spec)


def _one_group(x, kernel, strides):
    window = kernel.shape[2:]
    space = [max(0, (n - k) // s + 1) for n, k, s in zip(x.shape[2:], window, strides, strict=True)]
    result = np.zeros((len(x), len(kernel), *space), x.dtype)
    if not math.prod(space):
        return result
    for offset in itertools.product(*map(range, window)):
        part = x[
            (
                ...,
                *(
                    slice(o, o + (n - 1) * s + 1, s)
                    for o, n, s in zip(offset, space, strides, strict=True)
                ),
            )
        ]
        weights = kernel[(..., *offset)]
        result += np.einsum("bi...,oi->bo...", part, weights)
    return result


# --- linear algebra ------------------------------------------------------------------------------


def triangular_solve(a, b, left_side, lower, transpose_a, conjugate_a, unit_diagonal, **_):
    a = np.tril(a) if lower else np.triu(a)
    if unit_diagonal:
        a = a * (1 - np.eye(a.shape[-1], dtype=a.dtype)) + np.eye(a.shape[-1], dtype=a.dtype)
    a = np.conj(a) if conjugate_a else a
    a = np.swapaxes(a, -1, -2) if transpose_a else a
    try:
        if left_side:
            return np.linalg.solve(a, b)
        return np.swapaxes(np.linalg.solve(np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)), -1, -2)
    except np.linalg.LinAlgError:
        return np.full(b.shape, np.nan, b.dtype)


def cholesky(x, **_):
    flat = x.reshape(-1, *x.shape[-2:])
    found = np.full(flat.shape, np.nan, x.dtype)
    for i, matrix in enumerate(flat):
        try:
            found[i] = np.linalg.cholesky((matrix + matrix.T.conj()) / 2)
        except np.linalg.LinAlgError:
            continue
    return found.reshape(x.shape)
