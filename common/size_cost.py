"""What sampling one crystal costs against its size: time, memory, and the line through them."""

import ctypes
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.backend import SampleRequest
from common.data.batch import View, bucket, symmetry_only, view_sizes
from common.sampling import BaseGenerator

#: A group, a letter whose sites have three free variables, and the atoms of one such site: as many
#: sites as atoms, half as many, a quarter.
GENERAL_POSITIONS = ((1, "a", 1), (2, "i", 2), (10, "o", 4))
#: Atoms in the primitive cell.
ATOMS = (4, 8, 12, 16, 20, 28, 36, 44, 52)
#: Elements that take turns.
ELEMENTS = tuple(range(11, 21))
#: Of so many runs the fastest counts: other programs only ever slow one down.
RUNS = 3


@dataclass(frozen=True)
class SizeCost:
    """Cost of sampling crystals of one size.

    Attributes:
        space_group: number 1-230.
        tokens, atoms: of one crystal, unpadded.
        in_flight: crystals sampled at once, in as many calls as the generator makes at a time.
        padded_edges: of one call.
        seconds: per crystal, of the whole sampler.
        memory: bytes per crystal in flight by which the process grew; None where the system does
            not say.
    """

    space_group: int
    tokens: int
    atoms: int
    in_flight: int
    padded_edges: int
    seconds: float
    memory: float | None

    @property
    def size(self) -> int:
        """Edges of one crystal: sites x atoms in the asymmetric view."""
        return self.tokens * self.atoms

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"size": self.size}


@dataclass(frozen=True)
class Law:
    """How a cost grows with size.

    Attributes:
        constant, slope: of the line cost = constant + slope * size whose relative errors have the
            least squares.
        exponent: slope of the straight line through the logarithms.
    """

    constant: float
    slope: float
    exponent: float

    @classmethod
    def fit(cls, sizes: Sequence[float], costs: Sequence[float]) -> "Law":
        """The law of at least two different sizes, all numbers positive."""
        x, y = np.asarray(sizes, float), np.asarray(costs, float)
        columns = np.stack([1 / y, x / y], axis=1)
        (constant, slope), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
        exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
        return cls(float(constant), float(slope), float(exponent))

    def at(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs on the line."""
        return self.constant + self.slope * sizes


def requests_by_size(view: View) -> list[SampleRequest]:
    """One crystal per size, the smallest first, up to 52 atoms in the primitive cell."""
    made = [
        SampleRequest(
            group,
            tuple((ELEMENTS[i % len(ELEMENTS)], letter) for i in range(atoms // multiplicity)),
            key=f"{group} {atoms}",
        )
        for group, letter, multiplicity in GENERAL_POSITIONS
        for atoms in ATOMS
    ]
    return sorted(made, key=lambda request: np.prod(_sizes(request, view)))


def measure_sizes(generator: BaseGenerator, calls: int) -> list[SizeCost]:
    """Cost of sampling against size; weights may be untrained, which cost what others do.

    Args:
        generator: samples full calls, as in a long run.
        calls: network calls per sample.
    """
    view = generator.config.model.cell
    return [_cost(generator, request, calls) for request in requests_by_size(view)]


def _cost(generator: BaseGenerator, request: SampleRequest, calls: int) -> SizeCost:
    crystal = symmetry_only(request.space_group, request.sites)
    view = generator.config.model.cell
    tokens, atoms = view_sizes(crystal, view)
    shape = bucket(crystal, view, generator.sizes)
    rows = generator.rows_per_call(shape)
    full = [request] * (rows * generator.parallel_calls)
    generator.sample(full, 0, 1)  # compiles where that is done
    seconds = []
    with PeakMemory() as memory:
        for _ in range(RUNS):
            start = time.perf_counter()
            generator.sample(full, 0, calls)
            seconds.append(time.perf_counter() - start)
    return SizeCost(
        space_group=request.space_group,
        tokens=tokens,
        atoms=atoms,
        in_flight=len(full),
        padded_edges=rows * shape[0] * shape[1],
        seconds=min(seconds) / len(full),
        memory=None if memory.grown is None else memory.grown / len(full),
    )


def _sizes(request: SampleRequest, view: View) -> tuple[int, int]:
    return view_sizes(symmetry_only(request.space_group, request.sites), view)


class PeakMemory:
    """By how many bytes this process grew while a block ran, at most; Linux alone says it.

    Attributes:
        grown: bytes, once the block has ended; None if the system does not say.
    """

    grown: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._before: int | None = None
        try:
            # Free memory that the allocator keeps would be taken again unseen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
            self._before = _resident("VmRSS")
        except (OSError, AttributeError):  # another system, or another C library
            return self
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.grown = max(0, _resident("VmHWM") - self._before)


def _resident(name: str) -> int:
    """A figure of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def to_png(costs: Sequence[SizeCost], title: str) -> bytes:
    """Time and memory per crystal against size, measured and on the line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [("time per crystal (ms)", [1e3 * cost.seconds for cost in costs])]
    if memory := memories(costs):
        shown.append(("memory per crystal in flight (MiB)", [m / 2**20 for m in memory]))
    figure = Figure(figsize=(5.5 * len(shown), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    sizes = [cost.size for cost in costs]
    places = np.geomspace(min(sizes), max(sizes), 200)
    for axes, (label, values) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        law = Law.fit(sizes, values)
        for (group, _, multiplicity), marker in zip(GENERAL_POSITIONS, "osD", strict=True):
            of_group = [i for i, cost in enumerate(costs) if cost.space_group == group]
            axes.plot(
                [sizes[i] for i in of_group],
                [values[i] for i in of_group],
                marker,
                label=f"group {group}, {multiplicity} atom{'s' * (multiplicity > 1)} per site",
            )
        line = law.at(places)
        axes.plot(places[line > 0], line[line > 0], "k-", lw=1, label="line")
        axes.set(xscale="log", yscale="log", xlabel="sites x atoms", ylabel=label)
        axes.set_title(f"exponent {law.exponent:.2f}", fontsize="medium")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def memories(costs: Sequence[SizeCost]) -> list[float]:
    """Memory of every size; empty unless all were measured and are positive."""
    found = [cost.memory for cost in costs if cost.memory]
    return found if len(found) == len(costs) else []
