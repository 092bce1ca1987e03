"""Layers of the Crystal DiT: features of positions and lattices, edge fusion, crystal attention.

Shapes: B crystals, T tokens, A atoms, D width, E edge width, H heads, F frequencies.

Everything runs in graph mode on CPU and Ascend. Tensors of edges are kept as rows, [B*T*A,.], and
what is spread over rows or summed over them goes through a batched product of matrices: CPU kernels
for broadcasting and for sums over inner axes are several times slower, and their gradients too.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, One, Uniform, Zero, initializer

LAYER_NORM_EPS = 1e-6
MASKED_LOGIT = -1e9

#: Radial basis (A): centres from zero to the last, as wide as their spacing.
RADIAL_CENTERS = 16
RADIAL_END = 6.0
#: Below this an image is the atom itself (A^2).
SELF_DISTANCE_SQUARED = 1e-4


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 1000.0) -> Tensor:
    """Sines and cosines of a time in [0,1]: [B] -> [B,width]."""
    angles = t[:, None] * 1000.0 * _time_frequencies(width // 2, max_period)
    return ops.concat((ops.sin(angles), ops.cos(angles)), -1)


@ops.constexpr
def _time_frequencies(half: int, max_period: float) -> Tensor:
    """Falling from 1 to 1/max_period: [half]. MindSpore's exp on CPU errs by 5e-6."""
    return Tensor(max_period ** (-np.arange(half) / half), ms.float32)


def fourier_features(difference: Tensor, frequencies: int) -> Tensor:
    """psi_FT of eq. 6: sin and cos of 2 pi n d, n = 1..F, per axis: [...,3] -> [...,6F].

    The differences are taken modulo whole cells, so every feature is periodic.
    """
    n = ops.arange(1, frequencies + 1).astype(difference.dtype)
    angles = (2 * math.pi * difference)[..., None] * n
    features = ops.concat((ops.sin(angles), ops.cos(angles)), -1)
    return features.reshape((*difference.shape[:-1], 6 * frequencies))


def radial_features(distance: Tensor) -> Tensor:
    """Gaussians of a distance in A: [...] -> [...,RADIAL_CENTERS]."""
    step = RADIAL_END / (RADIAL_CENTERS - 1)
    centers = ops.arange(RADIAL_CENTERS).astype(distance.dtype) * step
    return ops.exp(-ops.square((distance[..., None] - centers) / step))


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
        + (steps * shifts).sum(-1)[:, None]
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
    return cofactors.swapaxes(1, 2) / determinant[:, None, None]


def apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices times vectors: [...,3,3], [...,3] -> [...,3]."""
    return (matrices * vectors[..., None, :]).sum(-1)


def spread(x: Tensor, rows: int) -> Tensor:
    """Every row repeated: [B,.] -> [B,rows,.]."""
    ones = ops.ones((x.shape[0], rows, 1), x.dtype)
    return ops.bmm(ones, x[:, None])


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
    """torch's layer norm over the last axis, in float32."""

    def __init__(self, width: int, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        weight, bias = initializer(One(), (width,)), initializer(Zero(), (width,))
        if elementwise_affine:
            self.weight = Parameter(weight, name="weight")
            self.bias = Parameter(bias, name="bias")
        else:
            self.weight, self.bias = weight.init_data(), bias.init_data()

    def construct(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        return self.norm(x.astype(ms.float32), self.weight, self.bias)[0]


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
        ends = ops.concat((self.receiver(nodes), self.sender(nodes)), 1)  # [B,2T,D]
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
        logits = self.weight(messages).reshape(size * tokens, atoms, self.heads)
        logits = logits.swapaxes(1, 2).reshape(size, tokens * self.heads, atoms)
        logits = logits.astype(ms.float32) + ((1 - mask) * MASKED_LOGIT)[:, None]
        weights = ops.softmax(logits, -1).reshape(size * tokens, self.heads, atoms)
        # Every head's weights on all columns, of which each head keeps its own.
        summed = ops.bmm(weights.astype(messages.dtype), rows)  # [BT,H,D]
        own = _head_columns(self.heads, width).astype(messages.dtype)
        ones = ops.ones((size * tokens, 1, self.heads), messages.dtype)
        return ops.bmm(ones, summed * own).reshape(size, tokens, width)


@ops.constexpr
def _head_columns(heads: int, width: int) -> Tensor:
    """Which columns belong to a head: [H,D], 0 or 1."""
    return Tensor(np.kron(np.eye(heads), np.ones((1, width // heads))), ms.float32)


def select_ends(sender_index: Tensor, tokens: int) -> Tensor:
    """Rows that pick the receiver and the sender of every edge: [B,A] -> [B,T*A,2T], 0 or 1."""
    size, atoms = sender_index.shape
    numbers = ops.arange(tokens).astype(ms.int32)
    receivers = numbers[:, None] == numbers  # [T,T]
    receivers = ops.broadcast_to(receivers[None, :, None], (size, tokens, atoms, tokens))
    senders = sender_index[..., None] == numbers  # [B,A,T]
    senders = ops.broadcast_to(senders[:, None], (size, tokens, atoms, tokens))
    return ops.concat((receivers, senders), -1).reshape(size, tokens * atoms, 2 * tokens)


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
        embedded = self.property(prop)  # [B,D]
        key = self._fused(self.key, self.fuse_key, nodes, embedded)
        value = self._fused(self.value, self.fuse_value, nodes, embedded)
        q, k, v = self._split(self.query(nodes)), self._split(key), self._split(value)
        logits = ops.matmul(q, k.swapaxes(-1, -2)).astype(ms.float32)  # [B,H,T,T]
        logits = logits / math.sqrt(width // self.heads)
        logits = logits + ((1 - mask.astype(ms.float32)) * MASKED_LOGIT)[:, None, None]
        weights = ops.softmax(logits, -1).astype(v.dtype)
        mixed = ops.matmul(weights, v).transpose(0, 2, 1, 3)
        return self.output(mixed.reshape(size, tokens, width))

    def _split(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,H,T,D/H]."""
        size, tokens, width = x.shape
        return x.reshape(size, tokens, self.heads, width // self.heads).transpose(0, 2, 1, 3)

    def _fused(self, inner: Linear, outer: Linear, nodes: Tensor, embedded: Tensor) -> Tensor:
        """outer([inner(nodes), embedded]) with the two linear maps multiplied first: [B,T,D]."""
        tokens, width = nodes.shape[1:]
        of_nodes, of_property = outer.weight[:, :width], outer.weight[:, width:]
        bias = outer.bias + ops.matmul(of_nodes, inner.bias)
        constant = linear(embedded, of_property, bias, outer.precision)
        product = ops.matmul(of_nodes, inner.weight)
        return linear(nodes, product, None, outer.precision) + spread(constant, tokens)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (DiT, arXiv:2212.09748): [B,T,D], [B,D], [B,D]."""
    tokens = x.shape[1]
    return x * (1 + spread(scale, tokens)) + spread(shift, tokens)
