"""Weights that a run starts from where no checkpoint gives them, the same in every framework."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from common.language.parameters import Parameter
from common.weights import Arrays

#: Deviation of random weights, as in transformers' GlmForCausalLM.
DEVIATION = 0.02


def initial_weights(table: Iterable[Parameter], seed: int) -> Arrays:
    """Random float32 weights under torch's names; each depends on its name and the seed alone.

    Norms are one and biases zero. LoRA's A is uniform as in peft (He et al. with a = sqrt 5), its B
    is zero, so that the adapted network begins as its base.

    Args:
        table: what the network has.
        seed: of the run.
    """
    return {parameter.torch: _values(parameter, seed) for parameter in table}


def _values(parameter: Parameter, seed: int) -> NDArray[np.float32]:
    name, shape = parameter.torch, parameter.shape
    if name.endswith((".bias", ".lora_B.weight")):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if name.endswith(".lora_A.weight"):
        bound = 1 / math.sqrt(shape[1])
        return random.uniform(-bound, bound, shape).astype(np.float32)
    return DEVIATION * random.standard_normal(shape, dtype=np.float32)
