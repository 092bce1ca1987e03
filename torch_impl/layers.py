"""Layers of the Crystal DiT: features of positions and lattices, edge fusion, crystal attention.

Shapes: B crystals, T tokens, A atoms, D width, E edge width, H heads, F frequencies.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYER_NORM_EPS = 1e-6
MASKED_LOGIT = -3e4  # within the range of float16

#: Radial basis (A): centres from zero to the last, as wide as their spacing.
RADIAL_CENTERS = 16
RADIAL_END = 6.0
#: Below this an image is the atom itself (A^2).
SELF_DISTANCE_SQUARED = 1e-4


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 1000.0) -> Tensor:
    """Sines and cosines of a time in [0,1]: [B] -> [B,width]."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None] * 1000.0 * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def fourier_features(difference: Tensor, frequencies: int) -> Tensor:
    """psi_FT of eq. 6: sin and cos of 2 pi n d, n = 1..F, per axis: [...,3] -> [...,6F].

    The differences are taken modulo whole cells, so every feature is periodic.
    """
    n = torch.arange(1, frequencies + 1, dtype=difference.dtype, device=difference.device)
    angles = (2 * math.pi * difference)[..., None] * n
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def radial_features(distance: Tensor) -> Tensor:
    """Gaussians of a distance in A: [...] -> [...,RADIAL_CENTERS]."""
    step = RADIAL_END / (RADIAL_CENTERS - 1)
    centers = torch.arange(RADIAL_CENTERS, dtype=distance.dtype, device=distance.device) * step
    return torch.exp(-(((distance[..., None] - centers) / step) ** 2))


def lattice_matrix(k: Tensor, basis: Tensor) -> Tensor:
    """exp(sum_i k_i B_i), rows in A: [B,6] -> [B,3,3].

    Taylor series of degree 8 after halving four times; frameworks without a matrix exponential
    compute the same.
    """
    matrix = torch.einsum("bk,kij->bij", k, basis) / 16
    identity = torch.eye(3, dtype=k.dtype, device=k.device).expand_as(matrix)
    result = identity
    for order in range(8, 0, -1):
        result = identity + matrix @ result / order
    for _ in range(4):
        result = result @ result
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
    d = (difference - difference.round()).reshape(size, tokens * atoms, 3)
    steps = shifts @ metric  # [B,N,3]
    squared = (
        ((d @ metric) * d).sum(-1, keepdim=True)
        + 2 * d @ steps.transpose(1, 2)
        + (steps * shifts).sum(-1)[:, None]
    )  # [B,TA,N]
    squared = squared.masked_fill(squared < SELF_DISTANCE_SQUARED, 1e4)
    first, index = squared.min(dim=-1, keepdim=True)
    second = squared.scatter(-1, index, 1e4).min(dim=-1, keepdim=True).values
    return torch.cat([first, second], dim=-1).sqrt().reshape(size, tokens, atoms, 2)


def _silu(x: Tensor) -> Tensor:
    """SiLU of what nothing else reads: in its place, unless a gradient will need it."""
    return functional.silu(x, inplace=not torch.is_grad_enabled())


class MLP(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, width_in: int, width_hidden: int, width_out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width_in, width_hidden)
        self.output = nn.Linear(width_hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(_silu(self.hidden(x)))


class EdgeEmbedding(nn.Module):
    """phi_h of eq. 6: what an edge knows of the lattice and of the relative position."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.geometry = nn.Linear(features, width)
        self.lattice = nn.Linear(6, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, features: Tensor, k: Tensor) -> Tensor:
        """[B,T,A,features], [B,6] -> [B,T,A,E]."""
        hidden = self.geometry(features).add_(self.lattice(k)[:, None, None])
        return _silu(self.output(_silu(hidden)))


class EdgeFusion(nn.Module):
    """Edge messages and their fusion into the nodes, eqs. 6 and 7.

    phi_m is linear, SiLU, linear; its last layer is applied after the sum over edges, where it
    costs A times less and gives the same.
    """

    def __init__(self, width: int, edge_width: int, heads: int, aggregation: str) -> None:
        super().__init__()
        self.heads = heads
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.edge = nn.Linear(edge_width, width, bias=False)
        self.weight = nn.Linear(width, heads) if aggregation == "softmax" else None
        self.message = nn.Linear(width, width)
        self.node = MLP(2 * width, width, width)

    def forward(
        self, nodes: Tensor, edges: Tensor, sender_index: Tensor, atom_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update of the nodes, and the messages.

        Args:
            nodes: [B,T,D].
            edges: [B,T,A,E].
            sender_index: the token of every atom, [B,A].
            atom_mask: [B,A].

        Returns:
            phi_c of eq. 7, [B,T,D], and the hidden messages [B,T,A,D].
        """
        size, tokens, width = nodes.shape
        rows = sender_index + tokens * torch.arange(size, device=nodes.device)[:, None]
        sent = self.sender(nodes).view(-1, width).index_select(0, rows.flatten())
        sent = sent.view(size, -1, width)  # [B,A,D]
        hidden = self.edge(edges).add_(self.receiver(nodes)[:, :, None]).add_(sent[:, None])
        messages = _silu(hidden)  # [B,T,A,D]
        summed = self.message(self.aggregate(messages, atom_mask))
        return self.node(torch.cat([nodes, summed], dim=-1)), messages

    def aggregate(self, messages: Tensor, atom_mask: Tensor) -> Tensor:
        """Weighted mean over the atoms, weights by softmax per head or all alike: [B,T,D]."""
        size, tokens, atoms, width = messages.shape
        if self.weight is None:
            weights = atom_mask[:, None].to(messages.dtype).expand(size, tokens, atoms)
            weights = weights / weights.sum(-1, keepdim=True)
            return torch.einsum("bta,btad->btd", weights, messages)
        absent = ~atom_mask[:, None, :, None]
        logits = self.weight(messages).masked_fill(absent, MASKED_LOGIT)
        weights = logits.softmax(dim=2)  # [B,T,A,H]
        split = messages.view(size, tokens, atoms, self.heads, width // self.heads)
        return (weights[..., None] * split).sum(dim=2).flatten(-2)


class CrystalAttention(nn.Module):
    """Crystal multi-head attention, eqs. 8 and 9: the property enters every key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.property = nn.Linear(width, width)
        self.fuse_key = nn.Linear(2 * width, width)
        self.fuse_value = nn.Linear(2 * width, width)
        self.output = nn.Linear(width, width)
        self._maps: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies the weights that meet first once and for all.

        Neither they nor their device and type may change any more. Where few crystals are sampled
        at once, it is a good part of the work.
        """
        self._maps = self._multiplied()

    def forward(self, nodes: Tensor, prop: Tensor, mask: Tensor) -> Tensor:
        """[B,T,D], property embedding [B,D], token mask [B,T] -> [B,T,D]."""
        size, tokens, width = nodes.shape
        of_nodes, of_property, bias = self._maps or self._multiplied()
        constants = functional.linear(self.property(prop), of_property, bias)  # [B,2D]
        query, key_value = functional.linear(nodes, of_nodes).split((width, 2 * width), dim=-1)
        query = query + self.query.bias
        key, value = (key_value + constants[:, None]).chunk(2, dim=-1)
        query, key, value = (
            x.view(size, tokens, self.heads, width // self.heads).transpose(1, 2)
            for x in (query, key, value)
        )  # [B,H,T,D/H]
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None]
        )
        return self.output(mixed.transpose(1, 2).reshape(size, tokens, width))

    def _multiplied(self) -> tuple[Tensor, Tensor, Tensor]:
        """outer([inner(nodes), property]) of keys and values, with the linear maps multiplied.

        Returns:
            What takes the nodes to queries, keys and values, [3D,D], but for what is added to the
            last two: that takes the property's embedding, [2D,D], and has a bias, [2D].
        """
        of_nodes, of_property, bias = [self.query.weight], [], []
        for inner, outer in ((self.key, self.fuse_key), (self.value, self.fuse_value)):
            of_inner, of_other = outer.weight.chunk(2, dim=1)
            of_nodes.append(of_inner @ inner.weight)
            of_property.append(of_other)
            bias.append(outer.bias + of_inner @ inner.bias)
        return torch.cat(of_nodes), torch.cat(of_property), torch.cat(bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (DiT, arXiv:2212.09748): [B,T,D], twice [B,1 or T,D]."""
    return x * (1 + scale) + shift
