"""Names of the tensors in a checkpoint, the same for every framework."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.diffusion.scaler import Standardizer
from common.errors import UserError

#: Averaged weights and statistics, in ``model.safetensors``.
MODEL_PREFIX = "model."
STANDARDIZER_PREFIX = "standardizer."
#: Current weights and AdamW's moments, in ``optimizer.safetensors``.
WEIGHT_PREFIX = "weight."
MOMENTS = ("exp_avg", "exp_avg_sq")

Arrays = dict[str, NDArray[Any]]


def model_weights(
    arrays: Arrays, shapes: dict[str, tuple[int, ...]], where: str
) -> dict[str, NDArray[np.float32]]:
    """A checkpoint's weights by the network's own names.

    Args:
        arrays: the checkpoint's.
        shapes: of every parameter of the network.
        where: the checkpoint, for messages.

    Raises:
        UserError: if one is missing, unknown or of another shape.
    """
    given = {k.removeprefix(MODEL_PREFIX) for k in arrays if k.startswith(MODEL_PREFIX)}
    if given != set(shapes):
        names = sorted(given ^ set(shapes))
        raise UserError(f"{where}: weights do not belong to this network: {', '.join(names[:5])}")
    weights = {name: arrays[MODEL_PREFIX + name] for name in shapes}
    for name, array in weights.items():
        if array.shape != shapes[name]:
            raise UserError(f"{where}: weight {name} has shape {array.shape}, not {shapes[name]}")
    return weights


def statistics(arrays: Arrays, folder: Path) -> Standardizer:
    """A checkpoint's statistics.

    Raises:
        UserError: if one is missing.
    """
    names = Standardizer.__dataclass_fields__
    missing = [name for name in names if STANDARDIZER_PREFIX + name not in arrays]
    if missing:
        raise UserError(f"{folder}: statistics are missing: {', '.join(missing)}")
    return Standardizer(**{n: arrays[STANDARDIZER_PREFIX + n].astype(float) for n in names})
