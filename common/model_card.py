"""The card of a finished run: what it learned from, for how long, and what its loss became."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.checkpoint import CONFIG
from common.config import RunConfig
from common.properties import TARGETS
from common.weights import STANDARDIZER_PREFIX

if TYPE_CHECKING:
    from common.training import TrainingRun

#: Of the losses on validation rows: the whole one, and of language models that of an answer.
_LOSSES = ("loss", "answer")


def model_card(run: "TrainingRun[Any]", validation: Mapping[str, float]) -> str:
    """Markdown for a run's ``final/README.md``.

    Args:
        run: after its last step.
        validation: losses on the validation rows then, by name; empty if they are not known.
    """
    settings = run.config.train
    *before, (data, rows) = run.account["data"]
    learned = f"{data}, {rows:,} rows, fingerprint `{run.fingerprint}`"
    if before:
        learned += "; before that from " + ", ".join(f"{name}, {n:,} rows" for name, n in before)
    processes = f" in {run.shard.count} processes" if run.shard.count > 1 else ""
    start = f"what `{settings.init_from}` has" if settings.init_from else "random weights"
    losses = [f"{name} {validation[name]:.4f}" for name in _LOSSES if name in validation]
    return "\n".join(
        [
            f"# {run.config.name}\n",
            f"{_network(run)}\n",
            f"- **Data:** learned from {learned}.",
            f"- **Budget:** {run.step:,} steps, {run.seconds:,.0f} s of training{processes}, "
            f"{settings.precision}; from {start}.",
            f"- **Loss** on the first {settings.validation_rows:,} rows of {settings.validation}, "
            f"as far as there are so many: {', '.join(losses) or 'not known'}.",
            f"- **Settings:** `{CONFIG}` beside this card (seed {settings.seed}).\n",
            "Nothing but the loss was measured; `uni-mdm evaluate` measures what it is worth.",
            "",
        ]
    )


def _network(run: "TrainingRun[Any]") -> str:
    """What it is and does, in one sentence."""
    sizes = {name: array.size for name, array in run.model_arrays().items()}
    own = sum(size for name, size in sizes.items() if not name.startswith(STANDARDIZER_PREFIX))
    size = f"{own:,} parameters"
    if not isinstance(run.config, RunConfig):
        return f"Symmetry language model, {size}: names space groups and Wyckoff sites."
    told = [f"{name} ({TARGETS[name][0]})" for name in run.config.model.properties]
    given = ", ".join(["space group", "Wyckoff sites", *told])
    return f"Crystal DiT, {size}: samples free coordinates and lattices; told {given}."
