"""Crystal DiT: velocities (or scores) of a crystal's free coordinates and lattice numbers.

Shapes: B crystals, S sites, T tokens, A atoms, D width, E edge width, P properties.
"""

from itertools import product

import torch
from torch import Tensor, nn

from common.config import ModelConfig
from common.crystal.lattice import LATTICE_BASIS
from common.diffusion.flow import (
    DIFFERENCE_SCALES,
    MIN_REMAINING,
    PRECEDENT_SCALE,
    VELOCITY_SCALE,
)
from common.elements import NUM_ELEMENTS
from torch_impl.layers import (
    LAYER_NORM_EPS,
    MLP,
    RADIAL_CENTERS,
    CrystalAttention,
    EdgeEmbedding,
    EdgeFusion,
    fourier_features,
    image_distances,
    lattice_matrix,
    modulate,
    radial_features,
    sinusoidal_embedding,
)
from torch_impl.tensors import TensorBatch

NUM_SPACE_GROUPS = 231
NUM_LETTERS = 27
TIME_WIDTH = 128
#: Sines of the relative position that carry the output along edges.
HEAD_FREQUENCIES = 2
#: Frequencies in which a site sees how far it is from its precedent.
PRECEDENT_FREQUENCIES = 3


class PropertyEmbedding(nn.Module):
    """P_emb of eqs. 8 and 9: an MLP of the standardised property, or a learned null."""

    def __init__(self, properties: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(properties, width))
        self.mlp = nn.ModuleList(MLP(1, width, width) for _ in range(properties))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B,P] standardised, [B,P] -> [B,D], the sum over properties."""
        total = values.new_zeros(values.shape[0], self.null.shape[1])
        for index, mlp in enumerate(self.mlp):
            given = mask[:, index, None]
            total = total + torch.where(given, mlp(values[:, index, None]), self.null[index])
        return total


class TokenEmbedding(nn.Module):
    """Embedding module of Figure 3(b): element, Wyckoff position and its directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.element = nn.Embedding(NUM_ELEMENTS, width)
        self.letter = nn.Embedding(NUM_LETTERS, width)
        self.position = nn.Linear(14, width)

    def forward(self, batch: TensorBatch) -> Tensor:
        """[B,T,D]."""
        site = batch.token_site
        multiplicity = torch.gather(batch.multiplicity, 1, site).float()
        total = batch.num_atoms.float()[:, None]
        directions = torch.cat(
            [
                batch.token_rot.flatten(-2),
                batch.token_trans,
                torch.log1p(multiplicity)[..., None],
                (multiplicity / total)[..., None],
            ],
            dim=-1,
        )  # [B,T,14]
        element = self.element(torch.gather(batch.atomic_numbers, 1, site))
        letter = self.letter(torch.gather(batch.letter, 1, site))
        return element + letter + self.position(directions)


class PrecedentEmbedding(nn.Module):
    """How far sites and lattice are from the precedent's, and how alike its elements are."""

    def __init__(self, width: int, former_elements: bool) -> None:
        super().__init__()
        self.element = nn.Embedding(NUM_ELEMENTS, width) if former_elements else None
        self.site = nn.Linear(3 + 6 * PRECEDENT_FREQUENCIES + 2, width)
        self.cell = nn.Linear(14, width)

    def forward(
        self, batch: TensorBatch, free_params: Tensor, lattice: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Variables [B,S,3] and standardised lattice numbers [B,6] -> [B,T,D], [B,D]."""
        known = batch.precedent_mask.to(lattice.dtype)[:, None]  # [B,1]
        apart = (free_params - batch.precedent_params) * batch.free_mask
        apart = apart - apart.round()  # [B,S,3]
        difference = batch.precedent_difference[..., None]  # [B,S,1]
        waves = fourier_features(apart, PRECEDENT_FREQUENCIES)
        of_site = torch.cat([apart, waves, difference, torch.ones_like(difference)], dim=-1)
        embedded = self.site(of_site * known[..., None])  # [B,S,D]
        if self.element is not None:
            embedded = embedded + self.element(batch.precedent_numbers) * known[..., None]
        index = batch.token_site[..., None].expand(-1, -1, embedded.shape[-1])
        weighted = batch.precedent_difference * batch.multiplicity
        mean = weighted.sum(dim=1, keepdim=True) / batch.num_atoms[:, None]  # [B,1]
        rest = lattice * batch.k_mask - batch.precedent_lattice
        of_cell = torch.cat([rest, batch.precedent_lattice, mean, known], dim=-1) * known
        return torch.gather(embedded, 1, index), self.cell(of_cell)


class Block(nn.Module):
    """Edge fusion, crystal attention and a feed-forward part, each behind a norm.

    The norms and gates of the parts follow the condition (adaLN, arXiv:2212.09748), or the norms
    are plain and there are no gates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.parts = 1 + int(config.attention) + int(config.feed_forward > 0)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=not config.modulation)
            for _ in range(self.parts)
        )
        self.modulation = nn.Linear(width, 3 * self.parts * width) if config.modulation else None
        self.fusion = EdgeFusion(width, config.edge_width, config.heads, config.aggregation)
        self.attention = CrystalAttention(width, config.heads) if config.attention else None
        self.feed_forward = (
            MLP(width, config.feed_forward * width, width) if config.feed_forward else None
        )

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        condition: Tensor,
        prop: Tensor,
        batch: TensorBatch,
        sender_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """nodes [B,T,D], edges [B,T,A,E], condition [B,D], property [B,D] -> nodes, messages."""
        chunks: tuple[Tensor, ...] = ()
        if self.modulation is not None:
            # 3 x parts x [B,1,D]
            chunks = self.modulation(condition)[:, None].chunk(3 * self.parts, dim=-1)

        def normed(part: int) -> Tensor:
            x = self.norms[part](nodes)
            return modulate(x, chunks[3 * part], chunks[3 * part + 1]) if chunks else x

        def added(part: int, update: Tensor) -> Tensor:
            return nodes + (chunks[3 * part + 2] * update if chunks else update)

        update, messages = self.fusion(normed(0), edges, sender_index, batch.atom_mask)
        nodes = added(0, update)  # eq. 7
        if self.attention is not None:
            nodes = added(1, self.attention(normed(1), prop, batch.token_mask))  # eqs. 8, 9
        if self.feed_forward is not None:
            last = self.parts - 1
            nodes = added(last, self.feed_forward(normed(last)))
        return nodes, messages


class CrystalDiT(nn.Module):
    """The network: noisy free coordinates and lattice numbers in, their velocities out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("basis", torch.tensor(LATTICE_BASIS, dtype=torch.float32), False)
        shifts = torch.tensor(list(product((-1, 0, 1), repeat=3)), dtype=torch.float32)
        self.register_buffer("shifts", shifts, False)
        self.tokens = TokenEmbedding(width)
        self.time = MLP(TIME_WIDTH, width, width)
        self.space_group = nn.Embedding(NUM_SPACE_GROUPS, width)
        self.lattice_in = nn.Linear(12, width)
        self.property = PropertyEmbedding(len(config.properties), width)
        self.precedent = (
            PrecedentEmbedding(width, config.former_elements) if config.precedents else None
        )
        frames = 2 if config.frames else 1
        features = frames * 6 * config.frequencies
        features += 2 * RADIAL_CENTERS if config.distances else 0
        self.edges = EdgeEmbedding(features, config.edge_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.coordinate_head = MLP(width, width, 3)
        self.edge_head = nn.Linear(width, HEAD_FREQUENCIES)
        self.lattice_head = MLP(2 * width, width, 6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every residual branch and the outputs start at zero (adaLN-zero)."""
        for embedding in (self.tokens.element, self.tokens.letter, self.space_group):
            nn.init.normal_(embedding.weight, std=0.5)
        if self.precedent is not None and self.precedent.element is not None:
            nn.init.normal_(self.precedent.element.weight, std=0.5)
        for block in self.blocks:
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                nn.init.zeros_(block.modulation.bias)
        for layer in (self.coordinate_head.output, self.edge_head, self.lattice_head.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def fold(self) -> "CrystalDiT":
        """Itself, for sampling with these weights; see ``CrystalAttention.fold``."""
        for block in self.blocks:
            if block.attention is not None:
                block.attention.fold()
        return self

    def forward(
        self, batch: TensorBatch, free_params: Tensor, lattice: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocities of the free coordinates and of the lattice.

        Args:
            batch: the symmetry and the properties.
            free_params: [B,S,3], noisy, in [0,1).
            lattice: [B,6], noisy, standardised.
            t: [B] in [0,1].

        Returns:
            [B,S,3] in units of the coordinate noise, zero where not free, and [B,6] standardised.
        """
        k = batch.lattice_center + batch.lattice_scale * lattice  # [B,6]
        with torch.autocast(t.device.type, enabled=False):  # positions need every bit
            features, difference = self.geometry(batch, free_params, k)
        edges = self.edges(features, k - batch.lattice_center)  # [B,T,A,E]
        nodes = self.tokens(batch)  # [B,T,D]
        prop = self.property(batch.properties, batch.property_mask)  # [B,D]
        of_cell = torch.zeros_like(prop)
        if self.precedent is not None:
            of_token, of_cell = self.precedent(batch, free_params, lattice)
            nodes = nodes + of_token
        condition = torch.nn.functional.silu(
            self.time(sinusoidal_embedding(t, TIME_WIDTH))
            + self.space_group(batch.space_group)
            + self.lattice_in(torch.cat([lattice * batch.k_mask, k], dim=-1))
            + prop
            + of_cell
        )  # [B,D]
        if not self.config.modulation:
            nodes = nodes + condition[:, None]
        messages = nodes.new_zeros(())
        for block in self.blocks:
            nodes, messages = block(nodes, edges, condition, prop, batch, batch.atom_token)
        nodes = self.norm(nodes)
        weights = self.edge_head(messages).float()  # [B,T,A,F]
        with torch.autocast(t.device.type, enabled=False):
            coordinates = self.coordinates(batch, nodes.float(), weights, difference)
            velocity = self.lattice_velocity(batch, nodes.float(), condition.float())
        if self.precedent is None:
            return coordinates, velocity
        if self.config.target == "difference":
            return self.towards_precedent(batch, free_params, lattice, t, coordinates, velocity)
        known = batch.precedent_mask.float()[:, None]  # [B,1]
        unit = 1 - (1 - PRECEDENT_SCALE) * known
        return coordinates * unit[..., None], velocity * unit

    def towards_precedent(
        self,
        batch: TensorBatch,
        free_params: Tensor,
        lattice: Tensor,
        t: Tensor,
        coordinates: Tensor,
        velocity: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Velocities, where the outputs are differences from the precedents of those that have one.

        What is left of the way to where the crystal is expected, over the time that is left.

        Args:
            batch, free_params, lattice, t: as in ``forward``.
            coordinates, velocity: the outputs, [B,S,3] and [B,6].
        """
        known = batch.precedent_mask[:, None]  # [B,1]
        rest = (1 - t).clamp(min=MIN_REMAINING)[:, None]
        apart = batch.precedent_params - free_params
        apart = VELOCITY_SCALE * (apart - apart.round()) * batch.free_mask
        expected = apart + DIFFERENCE_SCALES[0] * coordinates
        other = (batch.precedent_lattice - lattice) * batch.k_mask
        expected_lattice = other + DIFFERENCE_SCALES[1] * velocity
        moved = expected / rest[..., None]
        return (
            torch.where(known[..., None], moved, coordinates),
            torch.where(known, expected_lattice / rest, velocity),
        )

    def geometry(self, batch: TensorBatch, free_params: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Edge features [B,T,A,.] and differences [B,T,A,3].

        The differences are fractional in the conventional cell, from token to atom.
        """
        at_token = torch.gather(free_params, 1, batch.token_site[..., None].expand(-1, -1, 3))
        at_atom = torch.gather(free_params, 1, batch.atom_site[..., None].expand(-1, -1, 3))
        token = (batch.token_rot @ at_token[..., None])[..., 0] + batch.token_trans  # [B,T,3]
        atom = (batch.orbit_rot @ at_atom[..., None])[..., 0] + batch.orbit_trans  # [B,A,3]
        difference = atom[:, None] - token[:, :, None]  # [B,T,A,3]
        to_primitive = batch.to_primitive.transpose(1, 2)[:, None]  # [B,1,3,3]
        primitive = difference @ to_primitive
        parts = [fourier_features(primitive, self.config.frequencies)]
        if self.config.frames:
            # The same edge as the atom's own representative sees it.
            turn = batch.to_primitive[:, None] @ batch.frame_inverse  # [B,A,3,3]
            seen = -torch.einsum("baij,btaj->btai", turn, difference)
            parts.append(fourier_features(seen, self.config.frequencies))
        if self.config.distances:
            lattice = torch.linalg.solve(
                batch.to_primitive.transpose(1, 2), lattice_matrix(k, self.basis)
            )  # [B,3,3], rows of the primitive lattice
            metric = lattice @ lattice.transpose(1, 2)
            distances = image_distances(primitive, metric, self.shifts)
            parts.append(radial_features(distances).flatten(-2))
        return torch.cat(parts, dim=-1), difference

    def coordinates(
        self, batch: TensorBatch, nodes: Tensor, weights: Tensor, difference: Tensor
    ) -> Tensor:
        """[B,S,3]: from the nodes, and along the edges as sines of the relative position."""
        weights = weights * batch.atom_mask[:, None, :, None]  # [B,T,A,F]
        along = torch.zeros_like(difference[:, :, 0])
        for n in range(HEAD_FREQUENCIES):
            wave = torch.sin(2 * torch.pi * (n + 1) * difference)
            along = along + (weights[..., n : n + 1] * wave).sum(dim=2)
        vector = self.coordinate_head(nodes) + along  # [B,T,3]
        shares = (batch.token_to_free @ vector[..., None])[..., 0] * batch.token_mask[..., None]
        if self.config.cell == "conventional":
            index = batch.token_site[..., None].expand(-1, -1, 3)
            shares = torch.zeros_like(shares).scatter_add(1, index, shares)
        return shares * batch.free_mask

    def lattice_velocity(self, batch: TensorBatch, nodes: Tensor, condition: Tensor) -> Tensor:
        """[B,6] from the atoms' mean and the condition."""
        site = batch.token_site
        weights = torch.gather(batch.multiplicity, 1, site).float() * batch.token_mask
        weights = weights / weights.sum(dim=1, keepdim=True)
        pooled = (weights[..., None] * nodes).sum(dim=1)
        return self.lattice_head(torch.cat([pooled, condition], dim=-1)) * batch.k_mask
