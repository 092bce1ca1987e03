"""The network as a whole: what its output must not depend on, and what it must depend on.

Exact invariances, tested here: padding; the order of crystals and of sites; whole cells added to a
site's variables; anything at all where nothing is free; an origin moved along a polar axis.
Centring vectors added to a site's variables leave the tokens' features and so the lattice's output
alone, but not the coordinates' along the edges: the sines there are taken in the conventional cell.

Another atom of an orbit as its representative is another picture of the same crystal: the token
then stands in another frame, and sees a turned neighbourhood. Distances stay; the Fourier features
turn with the frame; the output does not follow exactly. Training can show the network all pictures
(``train.descriptions``), see ``common.diffusion.flow.Descriptions``.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import ModelConfig, load_config
from common.crystal.structure import Crystal, Site
from common.crystal.symmetry import space_group
from common.data.batch import Batch, BatchItem, View, collate
from common.diffusion.scaler import Standardizer
from tests.networks import SYSTEMS, fill_value, fitted, noise_of, random_items, small
from torch_impl.crystal_dit import CrystalDiT
from torch_impl.layers import RADIAL_CENTERS
from torch_impl.tensors import TensorBatch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
views = pytest.mark.parametrize("view", ["asymmetric", "conventional"])
Outputs = tuple[np.ndarray, np.ndarray]

#: A constant added to every logit of a softmax cancels: these cannot have a gradient.
CANCELLED = ("fusion.weight.bias", "attention.key.bias", "attention.fuse_key.bias")


def network(config: ModelConfig) -> CrystalDiT:
    """A network with no zero among its parameters."""
    model = CrystalDiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(fill_value(name, parameter.shape)))
    return model


def tensors(model: CrystalDiT, batch: Batch, standardizer: Standardizer) -> TensorBatch:
    return TensorBatch.from_batch(batch, standardizer, model.config.properties)


class Case:
    """A network, crystals of several systems, and noise to show to it."""

    def __init__(self, view: View, items: list[BatchItem] | None = None, **settings: object):
        self.model = network(small(cell=view, **settings))
        self.view: View = view
        self.items = items or random_items()
        self.standardizer = fitted(self.items)
        self.batch = collate(self.items, view)
        self.free, self.lattice, self.t = noise_of(self.batch)

    def outputs(self, batch: Batch | None = None, *noise: np.ndarray) -> Outputs:
        """Of the case's batch and noise, or of others."""
        chosen = tensors(self.model, batch or self.batch, self.standardizer)
        given = noise or (self.free, self.lattice, self.t)
        with torch.no_grad():
            free, lattice = self.model(chosen, *(torch.from_numpy(x) for x in given))
        assert torch.isfinite(free).all()
        assert torch.isfinite(lattice).all()
        return free.numpy(), lattice.numpy()


@pytest.fixture(scope="module", params=["asymmetric", "conventional"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_same(found: Outputs, expected: Outputs, tolerance: float = 2e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * max(1.0, np.abs(other).max()))


def assert_differ(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


# What must not matter


def test_outputs_are_not_trivial(case: Case) -> None:
    """Else every invariance below would hold."""
    free, lattice = case.outputs()
    batch = case.batch
    for row in range(batch.size):
        assert (np.abs(free[row][batch.free_mask[row]]) > 1e-4).all()
        assert (np.abs(lattice[row][batch.k_mask[row]]) > 1e-4).all()
    moved = case.outputs(None, (case.free + 0.01) % 1, case.lattice, case.t)
    later = case.outputs(None, case.free, case.lattice, case.t + 0.01)
    wider = case.outputs(None, case.free, case.lattice + 0.1, case.t)
    for other in (moved, later, wider):
        assert_differ(other[0], free)
        assert_differ(other[1], lattice)


def test_folded_network_is_the_same() -> None:
    """All of its attention is folded: zeros in the weights behind that no longer matter."""
    case = Case("asymmetric")
    expected = case.outputs()
    assert case.model.fold() is case.model
    assert_same(case.outputs(), expected, tolerance=0)
    with torch.no_grad():
        for block in case.model.blocks:
            block.attention.query.weight.zero_()
            block.attention.fuse_value.weight.zero_()
    assert_same(case.outputs(), expected, tolerance=0)


def test_padding(case: Case) -> None:
    tokens, atoms = case.batch.shape
    wide = collate(case.items, case.view, (tokens + 3, atoms + 5))
    free, lattice, t = noise_of(wide)
    found = case.outputs(wide, free, lattice, t)
    expected = case.outputs()
    sites = case.batch.site_mask.shape[1]
    assert not found[0][:, sites:].any()
    assert_same((found[0][:, :sites], found[1]), expected)


def test_neighbours_in_the_batch(case: Case) -> None:
    expected = case.outputs()
    order = np.random.default_rng(0).permutation(case.batch.size)
    noise = (case.free[order], case.lattice[order], case.t[order])
    found = case.outputs(case.batch.take(order), *noise)
    assert_same(found, (expected[0][order], expected[1][order]))
    for row in range(case.batch.size):
        one = slice(row, row + 1)
        alone = case.outputs(case.batch.take(one), case.free[one], case.lattice[one], case.t[one])
        assert_same(alone, (expected[0][one], expected[1][one]))


def test_order_of_the_sites(case: Case) -> None:
    expected = case.outputs()
    items, free = [], case.free.copy()
    for row, item in enumerate(case.items):
        sites = item.crystal.sites
        count = len(sites)
        items.append(replace(item, crystal=replace(item.crystal, sites=sites[::-1])))
        free[row, :count] = case.free[row, :count][::-1]
    found = case.outputs(collate(items, case.view, case.batch.shape), free, case.lattice, case.t)
    for row, item in enumerate(case.items):
        count = len(item.crystal.sites)
        one = found[0][row, :count][::-1], found[1][row]
        assert_same(one, (expected[0][row, :count], expected[1][row]))


def test_whole_cells_added_to_the_variables(case: Case) -> None:
    cells = np.random.default_rng(1).integers(-2, 3, size=case.free.shape)
    moved = (case.free + cells).astype(np.float32)
    assert_same(case.outputs(None, moved, case.lattice, case.t), case.outputs(), 1e-4)


def test_what_is_not_free_is_not_read(case: Case) -> None:
    free = np.where(case.batch.free_mask, case.free, 0.37).astype(np.float32)
    lattice = np.where(case.batch.k_mask, case.lattice, 5.0).astype(np.float32)
    assert_same(case.outputs(None, free, lattice, case.t), case.outputs())


def test_geometry_of_the_batch_is_not_read(case: Case) -> None:
    """A sampler knows only the symmetry: the answer must not stand in the batch."""
    blank = case.batch.replace(
        free_params=np.zeros_like(case.batch.free_params),
        lattice_k=np.zeros_like(case.batch.lattice_k),
    )
    noise = (case.free, case.lattice, case.t)
    found, expected = case.outputs(blank, *noise), case.outputs()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@views
@pytest.mark.parametrize(
    ("group", "letters", "axes"), [(1, "aaa", "xyz"), (160, "ab", "z"), (186, "bc", "z")]
)
def test_origin_along_a_polar_axis(group: int, letters: str, axes: str, view: View) -> None:
    case = Case(view, random_items([(group, letters)]))
    shift = np.zeros(3, np.float32)
    free = np.zeros_like(case.free)
    for site, position in enumerate(case.items[0].crystal.positions):
        for axis in axes:
            shift["xyz".index(axis)] = 0.3
        free[0, site] = np.linalg.pinv(position.rotations[0]) @ shift
    assert_same(case.outputs(None, case.free + free, case.lattice, case.t), case.outputs(), 1e-4)


def test_centring_vector_added_to_a_site() -> None:
    """The same atoms up to primitive lattice vectors; see the module for the coordinates."""
    case = Case("asymmetric", random_items([(12, "aij")]))
    with torch.no_grad():
        case.model.edge_head.weight.zero_()
        case.model.edge_head.bias.zero_()
    free = case.free.copy()
    free[0, 2] += np.array([0.5, 0.5, 0.0], np.float32)
    assert_same(case.outputs(None, free, case.lattice, case.t), case.outputs(), 1e-4)


# Representatives


def edge_features(case: Case, free: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Plain and turned Fourier features, and distances' features, of every edge."""
    batch = tensors(case.model, case.batch, case.standardizer)
    k = batch.lattice_center + batch.lattice_scale * torch.from_numpy(case.lattice)
    features, _ = case.model.geometry(batch, torch.from_numpy(free), k)
    width = 6 * case.model.config.frequencies
    plain, turned, radial = features.split([width, width, 2 * RADIAL_CENTERS], dim=-1)
    return plain, turned, radial


@pytest.mark.parametrize(("group", "letters"), [*SYSTEMS, (14, "ee"), (205, "ac"), (152, "ac")])
def test_distances_do_not_depend_on_the_representative(group: int, letters: str) -> None:
    case = Case("asymmetric", random_items([(group, letters)]))
    atom_site = case.batch.atom_site[0]
    mask = case.batch.atom_mask[0]

    def per_site(free: np.ndarray) -> np.ndarray:
        radial = edge_features(case, free)[2][0].numpy()
        return np.stack(
            [radial[:, mask & (atom_site == s)].sum(axis=1) for s in range(len(letters))], axis=1
        )[: len(letters)]

    expected, plain = per_site(case.free), edge_features(case, case.free)[0].numpy()
    turned = 0
    for site, letter in enumerate(letters):
        linears, offsets = space_group(group).wyckoff[letter].equivalents
        for linear, offset in zip(linears[1:], offsets[1:], strict=True):
            free = case.free.copy()
            free[0, site] = np.mod(linear @ free[0, site] + offset, 1)
            np.testing.assert_allclose(per_site(free), expected, atol=2e-3)
            turned += not np.allclose(edge_features(case, free)[0].numpy(), plain, atol=1e-3)
    assert turned > 0 or group == 160  # where x,-x,z has no other first atom of that form


@pytest.mark.parametrize(("group", "letters"), [*SYSTEMS, (14, "ee"), (205, "ac"), (152, "ac")])
def test_edges_are_seen_from_the_other_end(group: int, letters: str) -> None:
    """From the frame of atom a's own token, token i is one of the atoms of i's orbit."""
    case = Case("asymmetric", random_items([(group, letters)]))
    plain, turned, _ = (x[0].numpy() for x in edge_features(case, case.free))
    atom_site, mask = case.batch.atom_site[0], case.batch.atom_mask[0]
    for site, atom in product(range(len(letters)), np.flatnonzero(mask)):
        candidates = plain[atom_site[atom], mask & (atom_site == site)]
        nearest = np.abs(candidates - turned[site, atom]).max(axis=1).min()
        assert nearest < 1e-4


# What must be zero, and what must matter


@views
def test_fixed_and_padded_numbers_do_not_move(view: View) -> None:
    case = Case(view)
    free, lattice = case.outputs()
    assert not free[~case.batch.free_mask].any()
    assert not lattice[~case.batch.k_mask].any()


@views
@pytest.mark.parametrize("attention", [True, False])
def test_absent_property_is_the_null_property(view: View, attention: bool) -> None:
    case = Case(view, attention=attention)
    noise = (case.free, case.lattice, case.t)
    given = case.outputs()
    dropped = case.batch.replace(property_mask=np.zeros_like(case.batch.property_mask))
    none = case.outputs(dropped, *noise)
    assert_differ(none[0], given[0])
    assert_differ(none[1], given[1])
    absent = collate([BatchItem(item.crystal, {}) for item in case.items], view)
    np.testing.assert_array_equal(case.outputs(absent, *noise)[0], none[0])
    # Neither the numbers under the mask nor the values' own layers are read.
    loud = dropped.replace(properties=np.full_like(case.batch.properties, 1e3))
    with torch.no_grad():
        for parameter in case.model.property.mlp.parameters():
            parameter.mul_(3)
    np.testing.assert_array_equal(case.outputs(loud, *noise)[0], none[0])
    with torch.no_grad():
        case.model.property.null.mul_(2)
    assert_differ(case.outputs(dropped, *noise)[0], none[0])


@views
def test_properties_are_told_apart(view: View) -> None:
    case = Case(view)
    noise = (case.free, case.lattice, case.t)
    mask = case.batch.property_mask
    results = [case.outputs()[0]]
    for keep in ([True, False], [False, True], [False, False]):
        results.append(case.outputs(case.batch.replace(property_mask=mask & keep), *noise)[0])
    swapped = case.batch.replace(properties=case.batch.properties[:, ::-1].copy())
    results.append(case.outputs(swapped, *noise)[0])
    for first, second in product(range(5), repeat=2):
        if first != second:
            assert_differ(results[first], results[second])


# Every switch

SWITCHES = [
    {"cell": view, "frames": frames, "distances": distances, "attention": attention}
    | {"aggregation": aggregation, "properties": properties}
    for (view, frames), distances, attention, (aggregation, properties) in product(
        (("asymmetric", True), ("asymmetric", False), ("conventional", False)),
        (True, False),
        (True, False),
        (("softmax", ("band_gap",)), ("mean", ()), ("softmax", ("formation_energy", "band_gap"))),
    )
]
SWITCHES += [{"feed_forward": 0}, {"modulation": False}, {"feed_forward": 0, "modulation": False}]


@pytest.fixture(scope="module")
def few_items() -> list[BatchItem]:
    items = random_items([(1, "aa"), (12, "aij"), (186, "bc")])
    return [*items, BatchItem(items[1].crystal, {})]


@pytest.mark.parametrize(
    "settings", SWITCHES, ids=lambda s: "-".join(str(v)[:6] for v in s.values())
)
def test_every_parameter_has_a_gradient(
    settings: dict[str, object], few_items: list[BatchItem]
) -> None:
    model = network(small(**settings))
    batch = collate(few_items, model.config.cell)
    noise = [torch.from_numpy(x) for x in noise_of(batch)]
    outputs = model(tensors(model, batch, fitted(few_items)), *noise)
    random = np.random.default_rng(0)
    total = sum(
        (x * torch.tensor(random.normal(size=x.shape), dtype=torch.float32)).sum() for x in outputs
    )
    assert isinstance(total, Tensor)
    total.backward()
    # Without a property its embedding is zero, which leaves only a bias behind it.
    silent = CANCELLED if model.config.properties else (*CANCELLED, "attention.property.weight")
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:  # the null of no property
            continue
        assert parameter.grad is not None, name
        size = parameter.grad.abs().max()
        assert torch.isfinite(size), name
        assert (size > 1e-4) != name.endswith(silent), (name, size)


@pytest.mark.parametrize("modulation", [True, False])
def test_newborn_network_says_zero(modulation: bool) -> None:
    """Outputs are zero before the first step."""
    case = Case("asymmetric", modulation=modulation)
    case.model = CrystalDiT(case.model.config)
    assert not any(output.any() for output in case.outputs())


def test_plain_norms_leave_the_condition_to_the_input() -> None:
    """Without modulation the time reaches every token once, before the first block."""
    case = Case("asymmetric", modulation=False)
    before = case.outputs()
    later = case.outputs(case.batch, case.free, case.lattice, case.t / 2)
    assert_differ(before[0], later[0])
    assert not any("modulation" in name for name, _ in case.model.named_parameters())


@views
def test_bfloat16_is_near(view: View) -> None:
    case = Case(view)
    expected = case.outputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.outputs()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        assert 0 < np.abs(one - other).max() < 0.1 * np.abs(other).max()


# DiffCSP++


def parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in CrystalDiT(config).parameters())


def test_diffcsp_pp_in_small() -> None:
    config = load_config(CONFIGS / "diffcsp_pp.yaml").model
    reduced = config.model_copy(update={"width": 32, "edge_width": 32, "layers": 2})
    case = Case("conventional")
    case.model = network(reduced)
    free, lattice = case.outputs()
    assert (np.abs(free[case.batch.free_mask]) > 0).all()
    # It takes no property, whatever the batch says.
    other = case.batch.replace(properties=case.batch.properties + 1)
    found = case.outputs(other, case.free, case.lattice, case.t)
    np.testing.assert_array_equal(found[0], free)
    np.testing.assert_array_equal(found[1], lattice)


def test_number_of_parameters() -> None:
    count = parameters(load_config(CONFIGS / "diffcsp_pp.yaml").model)
    print(f"diffcsp_pp: {count / 1e6:.2f} M parameters, published 12.28 M")
    assert 1.0 < count / 12.28e6 < 1.1
    small_count = parameters(load_config(CONFIGS / "crystal_dit_small_fm.yaml").model)
    assert 2.0e6 < small_count < 2.2e6


def test_crystal_without_free_numbers() -> None:
    """Only k5 is free: one number to learn, and no NaN."""
    item = BatchItem(Crystal(221, (Site(55, "a"), Site(17, "b")), 4.1 * np.eye(3)), {})
    case = Case("asymmetric", [item])
    free, lattice = case.outputs()
    assert not free.any()
    assert np.count_nonzero(lattice) == 1
