"""Crystal DiT: velocities (or scores) of a crystal's free coordinates and lattice numbers.

Shapes: B crystals, S sites, T tokens, A atoms, D width, E edge width, P properties.
"""

import math
from itertools import product

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, Zero, initializer

from common.config import ModelConfig
from common.crystal.lattice import LATTICE_BASIS
from common.diffusion.flow import (
    DIFFERENCE_SCALES,
    MIN_REMAINING,
    PRECEDENT_SCALE,
    VELOCITY_SCALE,
)
from common.elements import NUM_ELEMENTS
from ms_impl.layers import (
    LAYER_NORM_EPS,
    MLP,
    RADIAL_CENTERS,
    CrystalAttention,
    EdgeEmbedding,
    EdgeFusion,
    Embedding,
    LayerNorm,
    Linear,
    apply,
    fourier_features,
    image_distances,
    inverse,
    lattice_matrix,
    modulate,
    radial_features,
    sinusoidal_embedding,
    spread,
)
from ms_impl.tensors import TensorBatch

NUM_SPACE_GROUPS = 231
NUM_LETTERS = 27
TIME_WIDTH = 128
#: Sines of the relative position that carry the output along edges.
HEAD_FREQUENCIES = 2
#: Frequencies in which a site sees how far it is from its precedent.
PRECEDENT_FREQUENCIES = 3


class PropertyEmbedding(nn.Cell):
    """P_emb of eqs. 8 and 9: an MLP of the standardised property, or a learned null."""

    def __init__(self, properties: int, width: int) -> None:
        super().__init__()
        self.null = Parameter(Tensor(np.zeros((properties, width)), ms.float32), name="null")
        self.mlp = nn.CellList([MLP(1, width, width) for _ in range(properties)])

    def construct(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B,P] standardised, [B,P] -> [B,D], the sum over properties."""
        total = ops.zeros((values.shape[0], self.null.shape[1]), values.dtype)
        for index, mlp in enumerate(self.mlp):
            column = slice(index, index + 1)
            embedded = mlp(values[:, column])
            total = total + ops.where(mask[:, column], embedded, self.null[index])
        return total


class TokenEmbedding(nn.Cell):
    """Embedding module of Figure 3(b): element, Wyckoff position and its directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.element = Embedding(NUM_ELEMENTS, width)
        self.letter = Embedding(NUM_LETTERS, width)
        self.position = Linear(14, width)

    def construct(self, batch: TensorBatch) -> Tensor:
        """[B,T,D]."""
        site = batch["token_site"]
        size, tokens = site.shape
        multiplicity = ops.gather_d(batch["multiplicity"], 1, site).astype(ms.float32)
        total = batch["num_atoms"].astype(ms.float32).reshape(-1, 1)
        directions = ops.concat(
            (
                batch["token_rot"].reshape(size, tokens, 9),
                batch["token_trans"],
                ops.expand_dims(ops.log1p(multiplicity), -1),
                ops.expand_dims(multiplicity / total, -1),
            ),
            -1,
        )  # [B,T,14]
        element = self.element(ops.gather_d(batch["atomic_numbers"], 1, site))
        letter = self.letter(ops.gather_d(batch["letter"], 1, site))
        return element + letter + self.position(directions)


class PrecedentEmbedding(nn.Cell):
    """How far sites and lattice are from the precedent's, and how alike its elements are."""

    def __init__(self, width: int, former_elements: bool) -> None:
        super().__init__()
        self.element = Embedding(NUM_ELEMENTS, width) if former_elements else None
        self.site = Linear(3 + 6 * PRECEDENT_FREQUENCIES + 2, width)
        self.cell = Linear(14, width)

    def construct(
        self, batch: TensorBatch, free_params: Tensor, lattice: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Variables [B,S,3] and standardised lattice numbers [B,6] -> [B,T,D], [B,D]."""
        known = ops.expand_dims(batch["precedent_mask"].astype(ms.float32), 1)  # [B,1]
        apart = (free_params - batch["precedent_params"]) * batch["free_mask"]
        apart = apart - ops.round(apart)  # [B,S,3]
        difference = ops.expand_dims(batch["precedent_difference"], -1)  # [B,S,1]
        waves = fourier_features(apart, PRECEDENT_FREQUENCIES)
        of_site = ops.concat((apart, waves, difference, ops.ones_like(difference)), -1)
        embedded = self.site(of_site * ops.expand_dims(known, -1))  # [B,S,D]
        if self.element is not None:
            former = self.element(batch["precedent_numbers"])
            embedded = embedded + former * ops.expand_dims(known, -1)
        weighted = batch["precedent_difference"] * batch["multiplicity"].astype(ms.float32)
        total = batch["num_atoms"].astype(ms.float32).reshape(-1, 1)
        mean = weighted.sum(1, keepdims=True) / total  # [B,1]
        rest = lattice * batch["k_mask"] - batch["precedent_lattice"]
        of_cell = ops.concat((rest, batch["precedent_lattice"], mean, known), -1) * known
        return ops.gather(embedded, batch["token_site"], 1, 1), self.cell(of_cell)


class Block(nn.Cell):
    """Edge fusion, crystal attention and a feed-forward part, each behind a norm.

    The norms and gates of the parts follow the condition (adaLN, arXiv:2212.09748), or the norms
    are plain and there are no gates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.parts = 1 + int(config.attention) + int(config.feed_forward > 0)
        self.norms = nn.CellList(
            [
                LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=not config.modulation)
                for _ in range(self.parts)
            ]
        )
        self.modulation = Linear(width, 3 * self.parts * width) if config.modulation else None
        self.fusion = EdgeFusion(width, config.edge_width, config.heads, config.aggregation)
        self.attention = CrystalAttention(width, config.heads) if config.attention else None
        self.feed_forward = (
            MLP(width, config.feed_forward * width, width) if config.feed_forward else None
        )

    def construct(
        self,
        nodes: Tensor,
        edges: Tensor,
        condition: Tensor,
        prop: Tensor,
        batch: TensorBatch,
        sender_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """nodes [B,T,D], edges [B,T,A,E], condition [B,D], property [B,D] -> nodes, messages."""
        chunks = ()
        if self.modulation is not None:
            # 3 x parts x [B,T,D]; spread together, since every crystal's small product costs a call
            spread_out = spread(self.modulation(condition), nodes.shape[1])
            chunks = ops.chunk(spread_out, 3 * self.parts, -1)
        x = self._normed(0, nodes, chunks)
        update, messages = self.fusion(x, edges, sender_index, batch["atom_mask"])
        nodes = self._added(0, nodes, update, chunks)  # eq. 7
        if self.attention is not None:
            x = self._normed(1, nodes, chunks)
            update = self.attention(x, prop, batch["token_mask"])  # eqs. 8, 9
            nodes = self._added(1, nodes, update, chunks)
        if self.feed_forward is not None:
            last = self.parts - 1
            update = self.feed_forward(self._normed(last, nodes, chunks))
            nodes = self._added(last, nodes, update, chunks)
        return nodes, messages

    def _normed(self, part: int, nodes: Tensor, chunks: tuple[Tensor, ...]) -> Tensor:
        x = self.norms[part](nodes)
        return modulate(x, chunks[3 * part], chunks[3 * part + 1]) if chunks else x

    def _added(
        self, part: int, nodes: Tensor, update: Tensor, chunks: tuple[Tensor, ...]
    ) -> Tensor:
        if chunks:
            update = chunks[3 * part + 2] * update
        return nodes + update


class CrystalDiT(nn.Cell):
    """The network: noisy free coordinates and lattice numbers in, their velocities out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.basis = Tensor(LATTICE_BASIS, ms.float32)
        self.shifts = Tensor(np.array(list(product((-1, 0, 1), repeat=3))), ms.float32)
        self.tokens = TokenEmbedding(width)
        self.time = MLP(TIME_WIDTH, width, width)
        self.space_group = Embedding(NUM_SPACE_GROUPS, width)
        self.lattice_in = Linear(12, width)
        self.property = PropertyEmbedding(len(config.properties), width)
        self.precedent = (
            PrecedentEmbedding(width, config.former_elements) if config.precedents else None
        )
        frames = 2 if config.frames else 1
        features = frames * 6 * config.frequencies
        features += 2 * RADIAL_CENTERS if config.distances else 0
        self.edges = EdgeEmbedding(features, config.edge_width)
        self.blocks = nn.CellList([Block(config) for _ in range(config.layers)])
        self.norm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.coordinate_head = MLP(width, width, 3)
        self.edge_head = Linear(width, HEAD_FREQUENCIES)
        self.lattice_head = MLP(2 * width, width, 6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every residual branch and the outputs start at zero (adaLN-zero)."""
        for embedding in (self.tokens.element, self.tokens.letter, self.space_group):
            _fill(embedding.weight, Normal(0.5))
        if self.precedent is not None and self.precedent.element is not None:
            _fill(self.precedent.element.weight, Normal(0.5))
        for block in self.blocks:
            if block.modulation is not None:
                _fill(block.modulation.weight, Zero())
                _fill(block.modulation.bias, Zero())
        for layer in (self.coordinate_head.output, self.edge_head, self.lattice_head.output):
            _fill(layer.weight, Zero())
            _fill(layer.bias, Zero())

    def construct(
        self, batch: TensorBatch, free_params: Tensor, lattice: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocities of the free coordinates and of the lattice.

        Gradients reach the parameters, and none of the arguments.

        Args:
            batch: the symmetry and the properties.
            free_params: [B,S,3], noisy, in [0,1).
            lattice: [B,6], noisy, standardised.
            t: [B] in [0,1].

        Returns:
            [B,S,3] in units of the coordinate noise, zero where not free, and [B,6] standardised.
        """
        k = batch["lattice_center"] + batch["lattice_scale"] * lattice  # [B,6]
        features, difference = self.geometry(batch, free_params, k)
        features, difference = ops.stop_gradient(features), ops.stop_gradient(difference)
        edges = self.edges(features, k - batch["lattice_center"])  # [B,T,A,E]
        nodes = self.tokens(batch)  # [B,T,D]
        prop = self.property(batch["properties"], batch["property_mask"])  # [B,D]
        of_cell = ops.zeros_like(prop)
        if self.precedent is not None:
            of_token, of_cell = self.precedent(batch, free_params, lattice)
            nodes = nodes + of_token
        condition = ops.silu(
            self.time(sinusoidal_embedding(t, TIME_WIDTH))
            + self.space_group(batch["space_group"])
            + self.lattice_in(ops.concat((lattice * batch["k_mask"], k), -1))
            + prop
            + of_cell
        )  # [B,D]
        if not self.config.modulation:
            nodes = nodes + spread(condition, nodes.shape[1])
        messages = edges
        for block in self.blocks:
            nodes, messages = block(nodes, edges, condition, prop, batch, batch["atom_token"])
        nodes = self.norm(nodes)
        weights = self.edge_head(messages).astype(ms.float32)  # [B,T,A,F]
        coordinates = self.coordinates(batch, nodes, weights, difference)
        velocity = self.lattice_velocity(batch, nodes, condition.astype(ms.float32))
        if self.precedent is None:
            return coordinates, velocity
        if self.config.target == "difference":
            return self.towards_precedent(batch, free_params, lattice, t, coordinates, velocity)
        known = ops.expand_dims(batch["precedent_mask"].astype(ms.float32), 1)
        unit = 1 - (1 - PRECEDENT_SCALE) * known  # [B,1]
        return coordinates * ops.expand_dims(unit, -1), velocity * unit

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
            batch, free_params, lattice, t: as in ``construct``.
            coordinates, velocity: the outputs, [B,S,3] and [B,6].
        """
        known = ops.expand_dims(batch["precedent_mask"], 1)  # [B,1]
        rest = ops.expand_dims(ops.maximum(1 - t, MIN_REMAINING), 1)
        apart = batch["precedent_params"] - free_params
        apart = VELOCITY_SCALE * (apart - ops.round(apart)) * batch["free_mask"]
        expected = apart + DIFFERENCE_SCALES[0] * coordinates
        other = (batch["precedent_lattice"] - lattice) * batch["k_mask"]
        expected_lattice = other + DIFFERENCE_SCALES[1] * velocity
        moved = expected / ops.expand_dims(rest, -1)
        return (
            ops.where(ops.expand_dims(known, -1), moved, coordinates),
            ops.where(known, expected_lattice / rest, velocity),
        )

    def geometry(self, batch: TensorBatch, free_params: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Edge features [B,T,A,.] and differences [B,T,A,3].

        The differences are fractional in the conventional cell, from token to atom.
        """
        at_token = ops.gather(free_params, batch["token_site"], 1, 1)  # [B,T,3]
        at_atom = ops.gather(free_params, batch["atom_site"], 1, 1)  # [B,A,3]
        token = apply(batch["token_rot"], at_token) + batch["token_trans"]  # [B,T,3]
        atom = apply(batch["orbit_rot"], at_atom) + batch["orbit_trans"]  # [B,A,3]
        difference = ops.expand_dims(atom, 1) - ops.expand_dims(token, 2)  # [B,T,A,3]
        size, tokens, atoms, _ = difference.shape
        to_primitive = batch["to_primitive"].swapaxes(1, 2)
        primitive = ops.bmm(difference.reshape(size, tokens * atoms, 3), to_primitive)
        primitive = primitive.reshape(size, tokens, atoms, 3)
        parts = (fourier_features(primitive, self.config.frequencies),)
        if self.config.frames:
            # The same edge as the atom's own representative sees it.
            turn = ops.matmul(ops.expand_dims(batch["to_primitive"], 1), batch["frame_inverse"])
            seen = apply(ops.expand_dims(turn * -1.0, 1), difference)
            parts = (*parts, fourier_features(seen, self.config.frequencies))
        if self.config.distances:
            # [B,3,3], rows of the primitive lattice
            lattice = ops.bmm(inverse(to_primitive), lattice_matrix(k, self.basis))
            metric = ops.bmm(lattice, lattice.swapaxes(1, 2))
            distances = image_distances(primitive, metric, self.shifts)
            radial = radial_features(distances).reshape(size, tokens, atoms, -1)
            parts = (*parts, radial)
        return ops.concat(parts, -1), difference

    def coordinates(
        self, batch: TensorBatch, nodes: Tensor, weights: Tensor, difference: Tensor
    ) -> Tensor:
        """[B,S,3]: from the nodes, and along the edges as sines of the relative position."""
        size, tokens, atoms, _ = difference.shape
        weights = weights * batch["atom_mask"].reshape(size, 1, atoms, 1)  # [B,T,A,F]
        n = ops.arange(1, HEAD_FREQUENCIES + 1).astype(ms.float32).reshape(-1, 1)
        waves = ops.sin(2 * math.pi * ops.expand_dims(difference, 3) * n)  # [B,T,A,F,3]
        along = ops.bmm(
            weights.reshape(size * tokens, 1, atoms * HEAD_FREQUENCIES),
            waves.reshape(size * tokens, atoms * HEAD_FREQUENCIES, 3),
        ).reshape(size, tokens, 3)
        vector = self.coordinate_head(nodes).astype(ms.float32) + along  # [B,T,3]
        shares = apply(batch["token_to_free"], vector)
        shares = shares * ops.expand_dims(batch["token_mask"], -1)
        if self.config.cell == "conventional":
            sites = ops.arange(batch["free_mask"].shape[1]).astype(ms.int32).reshape(-1, 1)
            members = sites == ops.expand_dims(batch["token_site"], 1)  # [B,S,T]
            shares = ops.bmm(members.astype(ms.float32), shares)
        return shares * batch["free_mask"]

    def lattice_velocity(self, batch: TensorBatch, nodes: Tensor, condition: Tensor) -> Tensor:
        """[B,6] from the atoms' mean and the condition."""
        site = batch["token_site"]
        weights = ops.gather_d(batch["multiplicity"], 1, site).astype(ms.float32)
        weights = weights * batch["token_mask"]
        weights = weights / weights.sum(1, keepdims=True)
        pooled = ops.bmm(ops.expand_dims(weights, 1), nodes).reshape(nodes.shape[0], -1)
        velocity = self.lattice_head(ops.concat((pooled, condition), -1))
        return velocity.astype(ms.float32) * batch["k_mask"]


def _fill(parameter: Parameter, values: object) -> None:
    parameter.set_data(initializer(values, parameter.shape, parameter.dtype))
