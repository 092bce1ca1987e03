"""Memory and time of a language model's LoRA on paper, from what small networks need.

    python scripts/plan_language.py CONFIG [--devices 8] [--peak 313] [--share 0.3]
        [--tokenizer FOLDER]

Measured, with torch on the CPU, for three blocks: bytes that a block keeps for its gradient, and
floating-point operations, per token. Counted: the tokens of an epoch's batches, padded as
MindFormers' graphs have them. Computed from these: everything else. A fourth block tells how far
the law is off.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from common.commands.train import parse_run
from common.config import read_settings
from common.data.locations import dataset
from common.data.store import Record
from common.errors import UserError
from common.language.analogues import AnalogueIndex
from common.language.config import GlmConfig, LanguageRunConfig, LoraConfig
from common.language.examples import Examples, fixed_shape, rows_asked
from common.language.parameters import lora_parameters, parameters
from common.language.tokenizer import SymmetryTokenizer, compact_tokenizer, load_tokenizer
from common.training import start_folder
from torch_impl.glm4 import add_adapter, build

#: Width, feed-forward width, and that of keys: three for the law, one to check it.
SHAPES = ((64, 192, 32), (128, 320, 32), (192, 640, 32), (256, 704, 64))
TOKENS = 64
#: Logits of GLM-4-9B.
VOCABULARY = 151552
#: Of MindFormers' loss in float32, all of [tokens, vocabulary]: logits in bfloat16 (half), the same
#: in float32, their logarithmic softmax, the targets as one-hot, the gradient.
LOGIT_COPIES = 4.5

console = Console()


@dataclass(frozen=True)
class Need:
    """Of one block and one token: bytes that are kept, operations forward and backward."""

    kept: float
    operations: float


def network(width: int, feed_forward: int, keys: int, layers: int) -> dict[str, Any]:
    """A small GLM-4's config.json; heads are 16 wide."""
    config = GlmConfig(
        layers=layers,
        width=width,
        heads=width // 16,
        groups=keys // 16,
        feed_forward=feed_forward,
    )
    return config.to_huggingface(compact_tokenizer())


def measured(shape: tuple[int, int, int], layers: int, lora: LoraConfig) -> NDArray[np.float64]:
    """Bytes kept and operations of a network of so many blocks, frozen but for its additions."""
    model = build(network(*shape, layers), "bfloat16")
    add_adapter(model, lora.to_peft(None, None))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.zeros((1, TOKENS), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        hidden.float().sum().backward()
    own = sum(size for place, size in kept.items() if place not in weights)
    return np.array([own, counter.get_total_flops()]) / TOKENS


def block(shape: tuple[int, int, int], lora: LoraConfig) -> Need:
    """One block: the difference of two and one. The first one's input needs no gradient."""
    three, two = (measured(shape, layers, lora) for layers in (3, 2))
    return Need(*(three - two))


def law(needs: Mapping[tuple[int, int, int], Need]) -> NDArray[np.float64]:
    """Bytes kept per token: so many times each width, from the first three blocks."""
    shapes = np.array(list(needs), float)
    found = np.array([need.kept for need in needs.values()])
    return np.linalg.solve(shapes[:3], found[:3])


def frozen_operations(config: Mapping[str, Any]) -> float:
    """Of a block's products with weights, forward and backward, per token: no weight's gradient."""
    sizes = [p.shape for p in parameters(config) if p.torch.startswith("model.layers.0.")]
    return 4.0 * sum(prod(shape) for shape in sizes if len(shape) == 2)


@dataclass(frozen=True)
class Padding:
    """What the batches of an epoch are padded to, on one of the devices.

    Attributes:
        shapes: rows and length of MindFormers' graphs, and how many batches each computes.
        widest: tokens of a device's share with torch, at most.
    """

    shapes: Counter[tuple[int, int]]
    widest: int

    @property
    def most(self) -> int:
        """Tokens of the largest graph."""
        return max(rows * length for rows, length in self.shapes)

    @property
    def mean(self) -> float:
        """Tokens of a step."""
        total = sum(rows * length * count for (rows, length), count in self.shapes.items())
        return total / self.shapes.total()


def padding(
    run: LanguageRunConfig, tokenizer: SymmetryTokenizer, records: Sequence[Record], devices: int
) -> Padding:
    """Counts the batches of a run's first epoch.

    Args:
        run: the run.
        tokenizer: of its base.
        records: its training rows.
        devices: that share every batch.
    """
    train = run.train
    examples = Examples(
        rows_asked(records, train.questions),
        tokenizer,
        train.questions,
        train.token_budget,
        AnalogueIndex.shipped(train.analogues) if train.analogues else None,
        train.rehearsals,
        run.model.positions,
    )
    shapes: Counter[tuple[int, int]] = Counter()
    widest = 0
    for rows, forms in examples.epoch(train.seed, 0):
        length = examples.length(rows, forms)
        shapes[fixed_shape(length, train.token_budget, run.model.positions, devices)] += 1
        widest = max(widest, -(-len(rows) // devices) * length)
    return Padding(shapes, widest)


@dataclass(frozen=True)
class Plan:
    """Of one device, in bytes, and of a step of all of them, in operations."""

    weights: float
    additions: float
    inputs: float
    block: float
    logits: float
    operations: float
    steps: int

    @property
    def bytes(self) -> float:
        """Of everything, with all of the base."""
        return self.weights + self.additions + self.inputs + self.block + self.logits


def plan(
    run: LanguageRunConfig, coefficients: NDArray[np.float64], padded: Padding, devices: int
) -> Plan:
    """What a run with lora needs with MindFormers: its largest graph's memory, a step's operations.

    Operations are those of a mean step.
    """
    assert run.lora is not None
    config = run.model.to_huggingface(compact_tokenizer()) | {"vocab_size": VOCABULARY}
    count = sum(prod(p.shape) for p in parameters(config))
    added = sum(prod(p.shape) for p in lora_parameters(config, run.lora.rank, run.lora.targets))
    tokens = padded.most
    width, layers = run.model.width, run.model.layers
    keys = width // run.model.heads * run.model.groups
    per_token = layers * frozen_operations(config) + 4 * VOCABULARY * width
    return Plan(
        weights=2.0 * count,
        additions=20.0 * added,  # weight, gradient, two moments, average
        inputs=2.0 * layers * width * tokens,
        block=float(coefficients @ np.array([width, run.model.feed_forward, keys])) * tokens,
        logits=4.0 * LOGIT_COPIES * VOCABULARY * tokens,
        # Checkpointing computes every block's forward half again.
        operations=1.5 * per_token * padded.mean * devices,
        steps=run.train.steps,
    )


def main(
    config: Annotated[Path, typer.Argument(help="The run.")],
    devices: Annotated[int, typer.Option(min=1, help="NPUs or GPUs.")] = 8,
    peak: Annotated[float, typer.Option(help="TFLOP/s of one in bfloat16, the vendor's.")] = 313.0,
    share: Annotated[float, typer.Option(help="Of the peak that is reached: assumed.")] = 0.3,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the base's tokenizer; the base's own.")
    ] = None,
) -> None:
    """Measures small networks and prints a plan."""
    run = parse_run(read_settings(config), str(config))
    if not isinstance(run, LanguageRunConfig) or run.lora is None:
        raise UserError(f"{config}: a plan is for language models' runs with lora")
    folder = tokenizer or start_folder(run)
    assert folder is not None  # lora without a base is no run
    padded = padding(run, load_tokenizer(folder), dataset(run.train.data), devices)
    torch.manual_seed(0)
    needs = {shape: block(shape, run.lora) for shape in SHAPES}
    coefficients = law(needs)
    for shape, need in needs.items():
        wanted = float(coefficients @ np.array(shape))
        operations = frozen_operations(network(*shape, 1))
        console.print(
            f"measured, block of widths {'/'.join(map(str, shape))}: {need.kept:.0f} bytes, "
            f"law {wanted:.0f}; {need.operations:.3g} operations, {operations:.3g} without "
            "LoRA and attention"
        )
    batches = padded.shapes.total()
    for (rows, length), count in sorted(padded.shapes.items(), key=lambda item: item[0][1]):
        console.print(
            f"graph of {rows} rows of {length} tokens on each device, {rows * length} in all: "
            f"{count / batches:.0%} of {batches} batches"
        )
    console.print(f"mean of a step {padded.mean:.0f}; torch at most {padded.widest}")
    own = plan(run, coefficients, padded, devices)
    table = Table(f"{run.name}, {devices} devices", "GB of each")
    for name in ("weights", "additions", "inputs", "block", "logits", "bytes"):
        table.add_row(name, f"{getattr(own, name) / 1e9:.2f}")
    console.print(table)
    seconds = own.operations / (devices * peak * 1e12 * share)
    console.print(
        f"{own.operations:.3g} operations a step: {seconds:.2f} s at {share:.0%} of "
        f"{peak:g} TFLOP/s; {own.steps} steps: {own.steps * seconds / 3600:.2f} h"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
