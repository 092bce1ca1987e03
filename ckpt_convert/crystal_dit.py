"""The Crystal DiT's tensors in both frameworks: names and shapes, one by one.

torch's side is ``model.safetensors`` and ``optimizer.safetensors`` of a checkpoint folder (or a
``.pt`` of the same names); MindSpore's side is ``model.ckpt``, whose names are those of the
network's parameters as ``mindspore.load_param_into_net`` wants them, and ``optimizer.ckpt``. Both
networks name a parameter alike; only torch's side says ``model.`` before it.
"""

from collections.abc import Iterator

from ckpt_convert.mapping import Row
from common.config import ModelConfig
from common.data.batch import PROPERTY_NAMES

Shape = tuple[int, ...]

NUM_ELEMENTS = 119
NUM_SPACE_GROUPS = 231
NUM_LETTERS = 27
TIME_WIDTH = 128
RADIAL_CENTERS = 16
HEAD_FREQUENCIES = 2
PRECEDENT_FREQUENCIES = 3
NUM_CRYSTAL_SYSTEMS = 6

#: Statistics of the data set, which the network's inputs and outputs are scaled by.
STANDARDIZER: dict[str, Shape] = {
    "standardizer.element_volume": (NUM_ELEMENTS,),
    "standardizer.lattice_mean": (NUM_CRYSTAL_SYSTEMS, 6),
    "standardizer.lattice_std": (NUM_CRYSTAL_SYSTEMS, 6),
    "standardizer.property_mean": (len(PROPERTY_NAMES),),
    "standardizer.property_std": (len(PROPERTY_NAMES),),
}
#: Current weights, which differ from the averaged ones of the model, and AdamW's moments.
OPTIMIZER_PARTS = ("weight", "exp_avg", "exp_avg_sq")


def model_rows(config: ModelConfig) -> tuple[Row, ...]:
    """Of the file with the network's (averaged) weights."""
    network = [Row("network", f"model.{name}", name, shape) for name, shape in parameters(config)]
    statistics = [Row("standardizer", name, name, shape) for name, shape in STANDARDIZER.items()]
    return (*network, *statistics)


def optimizer_rows(config: ModelConfig) -> tuple[Row, ...]:
    """Of the file that resuming needs."""
    return tuple(
        Row(part, f"{part}.{name}", f"{part}.{name}", shape)
        for part in OPTIMIZER_PARTS
        for name, shape in parameters(config)
    )


def parameters(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name in both networks and shape of every parameter, in the networks' order."""
    d, e = config.width, config.edge_width
    frames = 2 if config.frames else 1
    features = frames * 6 * config.frequencies + (2 * RADIAL_CENTERS if config.distances else 0)
    yield "tokens.element.weight", (NUM_ELEMENTS, d)
    yield "tokens.letter.weight", (NUM_LETTERS, d)
    yield "tokens.position.weight", (d, 14)
    yield "tokens.position.bias", (d,)
    yield "time.hidden.weight", (d, TIME_WIDTH)
    yield "time.hidden.bias", (d,)
    yield "time.output.weight", (d, d)
    yield "time.output.bias", (d,)
    yield "space_group.weight", (NUM_SPACE_GROUPS, d)
    yield "lattice_in.weight", (d, 12)
    yield "lattice_in.bias", (d,)
    yield "property.null", (len(config.properties), d)
    for i in range(len(config.properties)):
        yield f"property.mlp.{i}.hidden.weight", (d, 1)
        yield f"property.mlp.{i}.hidden.bias", (d,)
        yield f"property.mlp.{i}.output.weight", (d, d)
        yield f"property.mlp.{i}.output.bias", (d,)
    if config.precedents:
        if config.former_elements:
            yield "precedent.element.weight", (NUM_ELEMENTS, d)
        yield "precedent.site.weight", (d, 5 + 6 * PRECEDENT_FREQUENCIES)
        yield "precedent.site.bias", (d,)
        yield "precedent.cell.weight", (d, 14)
        yield "precedent.cell.bias", (d,)
    yield "edges.geometry.weight", (e, features)
    yield "edges.geometry.bias", (e,)
    yield "edges.lattice.weight", (e, 6)
    yield "edges.output.weight", (e, e)
    yield "edges.output.bias", (e,)
    for i in range(config.layers):
        yield from _block(config, i)
    yield "norm.weight", (d,)
    yield "norm.bias", (d,)
    yield "coordinate_head.hidden.weight", (d, d)
    yield "coordinate_head.hidden.bias", (d,)
    yield "coordinate_head.output.weight", (3, d)
    yield "coordinate_head.output.bias", (3,)
    yield "edge_head.weight", (HEAD_FREQUENCIES, d)
    yield "edge_head.bias", (HEAD_FREQUENCIES,)
    yield "lattice_head.hidden.weight", (d, 2 * d)
    yield "lattice_head.hidden.bias", (d,)
    yield "lattice_head.output.weight", (6, d)
    yield "lattice_head.output.bias", (6,)


def _block(config: ModelConfig, i: int) -> Iterator[tuple[str, Shape]]:
    d, e = config.width, config.edge_width
    hidden = config.feed_forward * d
    parts = 1 + int(config.attention) + int(config.feed_forward > 0)
    if config.modulation:
        yield f"blocks.{i}.modulation.weight", (3 * parts * d, d)
        yield f"blocks.{i}.modulation.bias", (3 * parts * d,)
    else:
        for part in range(parts):
            yield f"blocks.{i}.norms.{part}.weight", (d,)
            yield f"blocks.{i}.norms.{part}.bias", (d,)
    yield f"blocks.{i}.fusion.receiver.weight", (d, d)
    yield f"blocks.{i}.fusion.receiver.bias", (d,)
    yield f"blocks.{i}.fusion.sender.weight", (d, d)
    yield f"blocks.{i}.fusion.edge.weight", (d, e)
    if config.aggregation == "softmax":
        yield f"blocks.{i}.fusion.weight.weight", (config.heads, d)
        yield f"blocks.{i}.fusion.weight.bias", (config.heads,)
    yield f"blocks.{i}.fusion.message.weight", (d, d)
    yield f"blocks.{i}.fusion.message.bias", (d,)
    yield f"blocks.{i}.fusion.node.hidden.weight", (d, 2 * d)
    yield f"blocks.{i}.fusion.node.hidden.bias", (d,)
    yield f"blocks.{i}.fusion.node.output.weight", (d, d)
    yield f"blocks.{i}.fusion.node.output.bias", (d,)
    if config.attention:
        yield f"blocks.{i}.attention.query.weight", (d, d)
        yield f"blocks.{i}.attention.query.bias", (d,)
        yield f"blocks.{i}.attention.key.weight", (d, d)
        yield f"blocks.{i}.attention.key.bias", (d,)
        yield f"blocks.{i}.attention.value.weight", (d, d)
        yield f"blocks.{i}.attention.value.bias", (d,)
        yield f"blocks.{i}.attention.property.weight", (d, d)
        yield f"blocks.{i}.attention.property.bias", (d,)
        yield f"blocks.{i}.attention.fuse_key.weight", (d, 2 * d)
        yield f"blocks.{i}.attention.fuse_key.bias", (d,)
        yield f"blocks.{i}.attention.fuse_value.weight", (d, 2 * d)
        yield f"blocks.{i}.attention.fuse_value.bias", (d,)
        yield f"blocks.{i}.attention.output.weight", (d, d)
        yield f"blocks.{i}.attention.output.bias", (d,)
    if config.feed_forward:
        yield f"blocks.{i}.feed_forward.hidden.weight", (hidden, d)
        yield f"blocks.{i}.feed_forward.hidden.bias", (hidden,)
        yield f"blocks.{i}.feed_forward.output.weight", (d, hidden)
        yield f"blocks.{i}.feed_forward.output.bias", (d,)
