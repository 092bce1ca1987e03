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
from rich.progress import track

from common.backend import SampleRequest
from common.data.batch import View, bucket, symmetry_only, view_sizes
from common.sampling import BaseGenerator

#: A group, a letter whose sites have three free variables, and the atoms of one such site: as many
#: sites as atoms, half as many, a quarter.
GENERAL_POSITIONS = ((1, "a", 1), (2, "i", 2), (10, "o", 4))
#: Atoms in the primitive cell.
ATOMS = (4, 8, 12, 16, 20, 28, 36, 44, 52)
#: Atoms of crystals that no line is fitted to, larger than any in training.
MANY_ATOMS = 200
#: Elements that take turns.
ELEMENTS = tuple(range(11, 21))
#: Of so many runs the fastest counts: other programs only ever slow one down. Crystals of
#: ``MANY_ATOMS`` are run once.
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

    @property
    def is_large(self) -> bool:
        """Whether it is beyond the sizes that lines are fitted to."""
        return self.atoms > max(ATOMS)

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

    def at(self, sizes: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Costs on the line."""
        return self.constant + self.slope * np.asarray(sizes, float)


def requests_by_size(view: View, numbers: Sequence[int] = ATOMS) -> list[SampleRequest]:
    """One crystal per size, the smallest first.

    Args:
        view: in which size is meant.
        numbers: of atoms in the primitive cell, which every group can have.
    """
    made = [
        SampleRequest(
            group,
            tuple((ELEMENTS[i % len(ELEMENTS)], letter) for i in range(atoms // multiplicity)),
            key=f"{group} {atoms}",
        )
        for group, letter, multiplicity in GENERAL_POSITIONS
        for atoms in numbers
    ]
    return sorted(made, key=lambda request: np.prod(_sizes(request, view)))


def measure_sizes(generator: BaseGenerator, calls: int) -> list[SizeCost]:
    """Cost of sampling against size; weights may be untrained, which cost what others do.

    The last are crystals of ``MANY_ATOMS``.

    Args:
        generator: samples full calls, as in a long run.
        calls: network calls per sample.
    """
    view = generator.config.model.cell
    runs = [(request, RUNS) for request in requests_by_size(view, ATOMS)]
    runs += [(request, 1) for request in requests_by_size(view, (MANY_ATOMS,))]
    return [
        _cost(generator, request, calls, count)
        for request, count in track(runs, f"Crystals of up to {MANY_ATOMS} atoms")
    ]


def _cost(generator: BaseGenerator, request: SampleRequest, calls: int, runs: int) -> SizeCost:
    crystal = symmetry_only(request.space_group, request.sites)
    view = generator.config.model.cell
    tokens, atoms = view_sizes(crystal, view)
    shape = bucket(crystal, view, generator.sizes)
    rows = generator.rows_per_call(shape)
    full = [request] * (rows * generator.parallel_calls)
    generator.sample(full, 0, 1)  # compiles where that is done
    seconds = []
    with PeakMemory() as memory:
        for _ in range(runs):
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

    laws = laws_of(costs)
    shown = [("seconds", "time per crystal (s)", 1.0)]
    if "bytes" in laws:
        shown.append(("bytes", "memory per crystal in flight (MiB)", 2.0**-20))
    figure = Figure(figsize=(5.5 * len(shown), 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, label, unit) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        values = [unit * value for value in _values(costs, name)]
        _draw(axes, costs, values, laws[name], unit)
        axes.set_ylabel(label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(
    axes: Any, costs: Sequence[SizeCost], values: Sequence[float], law: Law, unit: float
) -> None:
    """One panel: values by group, large crystals hollow, and the line in the same unit."""
    sizes = [cost.size for cost in costs]
    for (group, _, multiplicity), marker, color in zip(
        GENERAL_POSITIONS, "osD", ("C0", "C1", "C2"), strict=True
    ):
        for large in (False, True):
            chosen = [
                i
                for i, cost in enumerate(costs)
                if cost.space_group == group and cost.is_large == large
            ]
            axes.plot(
                [sizes[i] for i in chosen],
                [values[i] for i in chosen],
                marker,
                color=color,
                ms=5,
                mfc="white" if large else color,
                label=None
                if large
                else f"group {group}: {multiplicity} atom{'s' * (multiplicity > 1)} per site",
            )
    places = np.geomspace(min(sizes), max(sizes), 200)
    line = unit * law.at(places)
    fitted = f"a + b x sites x atoms, up to {max(ATOMS)} atoms"
    axes.plot(places[line > 0], line[line > 0], "k-", lw=1, zorder=1, label=fitted)
    axes.set(xscale="log", yscale="log", xlabel="sites x atoms of the primitive cell")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    if any(cost.is_large for cost in costs):
        axes.plot([], [], "o", color="gray", ms=5, mfc="white", label=f"{MANY_ATOMS} atoms")
    axes.set_title(f"exponent {law.exponent:.2f}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")


def laws_of(costs: Sequence[SizeCost]) -> dict[str, Law]:
    """How ``seconds``, and ``bytes`` where they are known, grow up to the largest of ``ATOMS``."""
    fitted = [cost for cost in costs if not cost.is_large]
    sizes = [cost.size for cost in fitted]
    laws = {"seconds": Law.fit(sizes, _values(fitted, "seconds"))}
    if memories(costs):
        laws["bytes"] = Law.fit(sizes, _values(fitted, "bytes"))
    return laws


def _values(costs: Sequence[SizeCost], name: str) -> list[float]:
    return memories(costs) if name == "bytes" else [cost.seconds for cost in costs]


def memories(costs: Sequence[SizeCost]) -> list[float]:
    """Memory of every size, bytes; empty unless all were measured and are positive."""
    found = [cost.memory for cost in costs if cost.memory]
    return found if len(found) == len(costs) else []


def in_flight(costs: Sequence[SizeCost]) -> float | None:
    """The most memory of all crystals sampled at once, bytes; None if it is not known."""
    known = zip(memories(costs), costs, strict=False)
    return max((memory * cost.in_flight for memory, cost in known), default=None)
