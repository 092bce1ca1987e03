"""Layers of the Crystal DiT: features of positions and lattices, edge fusion, crystal attention.

Shapes: B crystals, T tokens, A atoms, D width, E edge width, H heads, F frequencies.

Everything runs in graph mode on CPU and Ascend. What is spread over rows or summed over them goes
through a batched product of matrices: CPU kernels for broadcasting and for sums over inner axes are
several times slower, and their gradients too. New axes come from expand_dims, because an index of
None copies, and nothing large is negated, which is slower than a product of matrices.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, One, Uniform, Zero, initializer

LAYER_NORM_EPS = 1e-6
MASKED_LOGIT = -3e4  # within the range of float16

#: Radial basis (A): centres from zero to the last, as wide as their spacing.
RADIAL_CENTERS = 16
RADIAL_END = 6.0
#: Below this an image is the atom itself (A^2).
SELF_DISTANCE_SQUARED = 1e-4


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 1000.0) -> Tensor:
    """Sines and cosines of a time in [0,1]: [B] -> [B,width]."""
    angles = ops.expand_dims(t, 1) * 1000.0 * _time_frequencies(width // 2, max_period)
    return ops.concat((ops.sin(angles), ops.cos(angles)), -1)


@ops.constexpr
def _time_frequencies(half: int, max_period: float) -> Tensor:
    """Falling from 1 to 1/max_period: [half]. MindSpore's exp on CPU errs by 5e-6."""
    return Tensor(max_period ** (-np.arange(half) / half), ms.float32)


def fourier_features(difference: Tensor, frequencies: int) -> Tensor:
    """psi_FT of eq. 6: sin and cos of 2 pi n d, n = 1..F, per axis: [...,3] -> [...,6F].

    The differences are taken modulo whole cells, so every feature is periodic. Those of n = m+1..2m
    come from those of 1..m by the sum of angles, which costs less than sines and cosines do.
    """
    angles = ops.expand_dims(2 * math.pi * difference, -1)
    sines, cosines = ops.sin(angles), ops.cos(angles)  # [...,3,1], n = 1
    while sines.shape[-1] < frequencies:
        last_sine, last_cosine = sines[..., -1:], cosines[..., -1:]
        more_sines = sines * last_cosine + cosines * last_sine
        more_cosines = cosines * last_cosine - sines * last_sine
        sines = ops.concat((sines, more_sines), -1)
        cosines = ops.concat((cosines, more_cosines), -1)
    if sines.shape[-1] > frequencies:
        sines, cosines = sines[..., :frequencies], cosines[..., :frequencies]
    features = ops.concat((sines, cosines), -1)
    return features.reshape((*difference.shape[:-1], 6 * frequencies))


def radial_features(distance: Tensor) -> Tensor:
    """Gaussians of a distance in A: [...] -> [...,RADIAL_CENTERS]."""
    step = RADIAL_END / (RADIAL_CENTERS - 1)
    centers = ops.arange(RADIAL_CENTERS).astype(distance.dtype) * step
    return ops.exp(ops.square((ops.expand_dims(distance, -1) - centers) / step) * -1.0)


def lattice_matrix(k: Tensor, basis: Tensor) -> Tensor:
    """exp(sum_i k_i B_i), rows in A: [B,6] -> [B,3,3].

    Taylor series of degree 8 after halving four times; there is no matrix exponential on CPU.
    """
    matrix = ops.matmul(k, basis.reshape(6, 9)).reshape(-1, 3, 3) / 16
    identity = ops.eye(3, 3, k.dtype)
    result = identity + matrix / 8
    for order in range(7, 0, -1):
        result = identity + ops.bmm(matrix, result) / order
    for _ in range(4):
        result = ops.bmm(result, result)
    return result


def image_distances(difference: Tensor, metric: Tensor, shifts: Tensor) -> Tensor:
    """Distances to the two nearest periodic images that are not the atom itself.

    Args:
        difference: [B,T,A,3], fractional, primitive basis.
        metric: [B,3,3], of the primitive lattice, A^2.
        shifts: [N,3], the images to look at.

    Returns:
        [B,T,A,2] in A.
    """
    size, tokens, atoms, _ = difference.shape
    d = (difference - ops.round(difference)).reshape(size, tokens * atoms, 3)
    steps = ops.matmul(shifts, metric)  # [B,N,3]
    squared = (
        (ops.bmm(d, metric) * d).sum(-1, keepdims=True)
        + 2 * ops.bmm(d, steps.swapaxes(1, 2))
        + ops.expand_dims((steps * shifts).sum(-1), 1)
    )  # [B,TA,N]
    squared = ops.masked_fill(squared, squared < SELF_DISTANCE_SQUARED, 1e4)
    index, first = ops.ArgMinWithValue(axis=-1, keep_dims=True)(squared)
    rest = ops.masked_fill(squared, index == ops.arange(shifts.shape[0]), 1e4)
    second = rest.min(-1, keepdims=True)
    return ops.sqrt(ops.concat((first, second), -1)).reshape(size, tokens, atoms, 2)


def inverse(matrix: Tensor) -> Tensor:
    """Inverses of well-conditioned 3x3 matrices, by cofactors: [B,3,3] -> [B,3,3]."""
    following, last = Tensor([1, 2, 0], ms.int32), Tensor([2, 0, 1], ms.int32)
    a, b = ops.gather(matrix, following, 1), ops.gather(matrix, last, 1)
    cofactors = ops.gather(a, following, 2) * ops.gather(b, last, 2) - ops.gather(
        a, last, 2
    ) * ops.gather(b, following, 2)
    determinant = (matrix[:, 0] * cofactors[:, 0]).sum(-1)
    return cofactors.swapaxes(1, 2) / determinant.reshape(-1, 1, 1)


def apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices times vectors: [...,3,3], [...,3] -> [...,3]."""
    return (matrices * ops.expand_dims(vectors, -2)).sum(-1)


def spread(x: Tensor, rows: int) -> Tensor:
    """Every row repeated: [B,.] -> [B,rows,.]."""
    ones = ops.ones((x.shape[0], rows, 1), x.dtype)
    return ops.bmm(ones, ops.expand_dims(x, 1))


class Linear(nn.Cell):
    """torch's linear layer: y = x weight^T + bias, weight [out,in].

    ``precision`` is the type it computes and answers in.
    """

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        self.precision = ms.float32
        limit = HeUniform(math.sqrt(5))
        self.weight = Parameter(initializer(limit, (width_out, width_in)), name="weight")
        self.bias = None
        if bias:
            start = initializer(Uniform(1 / math.sqrt(width_in)), (width_out,))
            self.bias = Parameter(start, name="bias")

    def construct(self, x: Tensor) -> Tensor:
        """[...,in] -> [...,out]."""
        return linear(x, self.weight, self.bias, self.precision)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, precision: ms.Type) -> Tensor:
    """x weight^T + bias of rows: [...,in], [out,in], [out] -> [...,out]."""
    rows = x.reshape(-1, x.shape[-1]).astype(precision)
    result = ops.MatMul(transpose_b=True)(rows, weight.astype(precision))
    if bias is not None:
        result = result + bias.astype(precision)
    return result.reshape((*x.shape[:-1], weight.shape[0]))


class LayerNorm(nn.Cell):
    """torch's layer norm over the last axis, in float32.

    Written out: MindSpore's own takes three times as long on CPU, most of it for the gradient.
    """

    def __init__(self, width: int, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = None, None
        if elementwise_affine:
            self.weight = Parameter(initializer(One(), (width,)), name="weight")
            self.bias = Parameter(initializer(Zero(), (width,)), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        rows = x.reshape(-1, x.shape[-1]).astype(ms.float32)
        centred = rows + rows.mean(-1, keep_dims=True) * -1.0
        variance = ops.square(centred).mean(-1, keep_dims=True)
        normed = centred * ops.rsqrt(variance + self.eps)
        if self.weight is not None:
            normed = normed * self.weight + self.bias
        return normed.reshape(x.shape)


class Embedding(nn.Cell):
    """torch's embedding: rows of a table [count,D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter(initializer("normal", (count, width)), name="weight")

    def construct(self, index: Tensor) -> Tensor:
        """[...] -> [...,D]."""
        return ops.gather(self.weight, index, 0)


class MLP(nn.Cell):
    """Linear, SiLU, linear."""

    def __init__(self, width_in: int, width_hidden: int, width_out: int) -> None:
        super().__init__()
        self.hidden = Linear(width_in, width_hidden)
        self.output = Linear(width_hidden, width_out)

    def construct(self, x: Tensor) -> Tensor:
        return self.output(ops.silu(self.hidden(x)))


class EdgeEmbedding(nn.Cell):
    """phi_h of eq. 6: what an edge knows of the lattice and of the relative position."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.geometry = Linear(features, width)
        self.lattice = Linear(6, width, bias=False)
        self.output = Linear(width, width)

    def construct(self, features: Tensor, k: Tensor) -> Tensor:
        """[B,T,A,features], [B,6] -> [B,T,A,E]."""
        size, tokens, atoms, _ = features.shape
        of_lattice = spread(self.lattice(k), tokens * atoms).reshape(size, tokens, atoms, -1)
        hidden = self.geometry(features) + of_lattice
        return ops.silu(self.output(ops.silu(hidden)))


class EdgeFusion(nn.Cell):
    """Edge messages and their fusion into the nodes, eqs. 6 and 7.

    phi_m is linear, SiLU, linear; its last layer is applied after the sum over edges, where it
    costs A times less and gives the same.
    """

    def __init__(self, width: int, edge_width: int, heads: int, aggregation: str) -> None:
        super().__init__()
        self.heads = heads
        self.receiver = Linear(width, width)
        self.sender = Linear(width, width, bias=False)
        self.edge = Linear(edge_width, width, bias=False)
        self.weight = Linear(width, heads) if aggregation == "softmax" else None
        self.message = Linear(width, width)
        self.node = MLP(2 * width, width, width)

    def construct(
        self, nodes: Tensor, edges: Tensor, sender_index: Tensor, atom_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update of the nodes, and the messages.

        Args:
            nodes: [B,T,D].
            edges: [B,T,A,E].
            sender_index: [B,A], the token of every atom.
            atom_mask: [B,A].

        Returns:
            phi_c of eq. 7, [B,T,D], and the hidden messages [B,T,A,D].
        """
        size, tokens, width = nodes.shape
        atoms = sender_index.shape[1]
        # A token as receiver and as sender in one product, one row each.
        weight = ops.concat((self.receiver.weight, self.sender.weight), 0)
        bias = ops.concat((self.receiver.bias, ops.zeros_like(self.receiver.bias)), 0)
        ends = linear(nodes, weight, bias, self.receiver.precision)  # [B,T,2D]
        ends = ends.reshape(size, 2 * tokens, width)
        selection = select_ends(sender_index, tokens).astype(ends.dtype)
        of_ends = ops.bmm(selection, ends).reshape(size, tokens, atoms, width)
        messages = ops.silu(self.edge(edges) + of_ends)
        summed = self.message(self.aggregate(messages, atom_mask))
        return self.node(ops.concat((nodes.astype(summed.dtype), summed), -1)), messages

    def aggregate(self, messages: Tensor, atom_mask: Tensor) -> Tensor:
        """Weighted mean over the atoms, weights by softmax per head or all alike: [B,T,D]."""
        size, tokens, atoms, width = messages.shape
        mask = atom_mask.astype(ms.float32)
        rows = messages.reshape(size * tokens, atoms, width)
        if self.weight is None:
            weights = spread(mask / mask.sum(-1, keepdims=True), tokens)
            weights = weights.reshape(size * tokens, 1, atoms).astype(messages.dtype)
            return ops.bmm(weights, rows).reshape(size, tokens, width)
        logits = self.weight(messages).astype(ms.float32)
        logits = logits.reshape(size, tokens, atoms, self.heads).swapaxes(2, 3)  # [B,T,H,A]
        logits = logits + ((1 - mask) * MASKED_LOGIT).reshape(size, 1, 1, atoms)
        weights = ops.softmax(logits, -1).swapaxes(2, 3).reshape(-1, self.heads)
        # Every column times the weight of its head.
        weights = ops.matmul(weights, _head_columns(self.heads, width)).astype(messages.dtype)
        ones = ops.ones((size * tokens, 1, atoms), messages.dtype)
        weighted = weights.reshape(rows.shape) * rows
        return ops.bmm(ones, weighted).reshape(size, tokens, width)


@ops.constexpr
def _head_columns(heads: int, width: int) -> Tensor:
    """Which columns belong to a head: [H,D], 0 or 1."""
    return Tensor(np.kron(np.eye(heads), np.ones((1, width // heads))), ms.float32)


def select_ends(sender_index: Tensor, tokens: int) -> Tensor:
    """Rows that pick the ends of every edge: [B,A] -> [B,T*A,2T].

    True in column 2t where token t receives, and in column 2t+1 where it sends.
    """
    size, atoms = sender_index.shape
    shape = (size, tokens, atoms, tokens)
    numbers = ops.arange(tokens).astype(ms.int32)
    receivers = (numbers.reshape(-1, 1) == numbers).reshape(1, tokens, 1, tokens)
    senders = ops.expand_dims(ops.expand_dims(sender_index, -1) == numbers, 1)  # [B,1,A,T]
    ends = (ops.broadcast_to(receivers, shape), ops.broadcast_to(senders, shape))
    return ops.stack(ends, -1).reshape(size, tokens * atoms, 2 * tokens)


class CrystalAttention(nn.Cell):
    """Crystal multi-head attention, eqs. 8 and 9: the property enters every key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.property = Linear(width, width)
        self.fuse_key = Linear(2 * width, width)
        self.fuse_value = Linear(2 * width, width)
        self.output = Linear(width, width)

    def construct(self, nodes: Tensor, prop: Tensor, mask: Tensor) -> Tensor:
        """[B,T,D], property embedding [B,D], token mask [B,T] -> [B,T,D]."""
        size, tokens, width = nodes.shape
        depth = width // self.heads
        embedded = self.property(prop)  # [B,D]
        key, of_key = self._fused(self.key, self.fuse_key, embedded)
        value, of_value = self._fused(self.value, self.fuse_value, embedded)
        # Queries, keys and values in one product.
        weight = ops.concat((self.query.weight, key, value), 0)
        of_query = ops.broadcast_to(self.query.bias.astype(of_key.dtype), (size, width))
        constants = spread(ops.concat((of_query, of_key, of_value), -1), tokens)
        projected = linear(nodes, weight, None, self.query.precision) + constants  # [B,T,3D]
        projected = projected.reshape(size, tokens, 3, self.heads, depth).transpose(2, 0, 3, 1, 4)
        q, k, v = ops.split(projected.reshape(3 * size, self.heads, tokens, depth), size, 0)
        logits = ops.matmul(q, k.swapaxes(-1, -2)).astype(ms.float32)  # [B,H,T,T]
        logits = logits / math.sqrt(depth)
        absent = (1 - mask.astype(ms.float32)) * MASKED_LOGIT
        logits = logits + absent.reshape(size, 1, 1, tokens)
        weights = ops.softmax(logits, -1).astype(v.dtype)
        mixed = ops.matmul(weights, v).transpose(0, 2, 1, 3)
        return self.output(mixed.reshape(size, tokens, width))

    def _fused(self, inner: Linear, outer: Linear, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """outer([inner(nodes), embedded]) with the two linear maps multiplied first.

        Returns:
            What multiplies the nodes, [D,D], and what is added, [B,D].
        """
        of_nodes, of_property = ops.split(outer.weight, embedded.shape[1], 1)
        bias = outer.bias + ops.matmul(of_nodes, inner.bias)
        constant = linear(embedded, of_property, bias, outer.precision)
        return ops.matmul(of_nodes, inner.weight), constant


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (DiT, arXiv:2212.09748): [B,T,D], twice [B,1 or T,D]."""
    return x * (1 + scale) + shift
