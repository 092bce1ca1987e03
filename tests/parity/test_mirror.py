"""The two packages say the same: files, classes, functions, arguments, fields, parameters."""

import ast
from pathlib import Path

import pytest

from common.config import ModelConfig
from tests.networks import small

REPOSITORY = Path(__file__).resolve().parents[2]
#: Files that only one package has so far, and that the other still needs.
PENDING: set[str] = set()
#: Files that need no twin, and why.
ALONE = {
    "adamw.py": "MindSpore keeps weights, averages and moments as one vector, in train_dit.py",
    "device.py": "MindSpore's device and mode are the process's; torch's are arguments",
    "devices.py": "torch's; which MindSpore's process uses is chosen in device.py",
    "mindformers_parts.py": "what MindFormers' Trainer is given from outside",
    "mindformers_cpu.py": "transformers computes on every device as it is",
    "leaving.py": "torch's processes end as usual",
    "optimizer.py": "torch has it",
    "threads.py": "MindSpore runs a graph once at a time",
    "pipeline.py": "mindspore.dataset feeds training; torch takes its batches as they come",
}

#: Names of one thing in the two frameworks.
SAME = {"forward": "construct", "TorchGenerator": "MindSporeGenerator"}

#: What is on one side only, and why: file, class or function, and argument.
ALLOWED = {
    "layers.py Linear": "torch has it; this one's parameters are named alike",
    "layers.py LayerNorm": "torch has it; this one's parameters are named alike",
    "layers.py Embedding": "torch has it; this one's parameters are named alike",
    "layers.py linear": "torch has it",
    "layers.py inverse": "torch solves a linear system where graph mode on CPU cannot",
    "layers.py apply": "small products of matrices are slow in MindSpore on CPU",
    "layers.py spread": "broadcasting and its gradient are slow in MindSpore on CPU",
    "layers.py select_ends": "gathering and its gradient are slow in MindSpore on CPU",
    "tensors.py Tensors": "what a compiled network takes for variables",
    "tensors.py TensorBatch.from_batch device": "MindSpore has one device per process",
    "diffusion.py NoisyTensors.from_arrays device": "MindSpore has one device per process",
    **{
        f"{file} Trainer.{name}": "inherited from adamw.py"
        for file in ("train_dit.py", "train_glm4.py")
        for name in ("averaged", "average_arrays", "optimizer_arrays", "restore", "summed")
    },
    "language_model.py SMALL": "torch's number of threads is set while it lasts",
    "glm4.py build length": "MindFormers makes masks and rotary angles beforehand",
    "glm4.py build precision": "among MindFormers' settings",
    "glm4.py build device": "MindSpore has one device per process",
    "glm4.py build settings": "MindFormers' network knows precision and processes",
    "glm4.py Angles": "transformers makes them for every batch",
    "glm4.py answer_loss": "torch's head works on the positions that count alone",
    "glm4.py add_dropout": "among MindFormers' settings",
    "glm4.py adapter_name": "peft's prefix; MindFormers' names are in common.language.parameters",
    "glm4.py torch_arrays": "torch's names are its own",
    "glm4.py prepare_mindformers": "transformers writes no logs",
    "train_glm4.py Average": "torch's is in adamw.py",
    "train_glm4.py Trainer.run": "MindFormers' Trainer makes the steps",
    "train_glm4.py Trainer.fixed": "MindSpore compiles a graph for every shape",
    "train_dit.py Trainer.batches": "MindSpore's data pipeline prepares them ahead",
    "distributed.py CANN": "the versions that this MindSpore accepts",
    "distributed.py LAST_RELEASE": "gloo's threads alone need it; MindSpore's are left at once",
    "distributed.py TIMEOUT": "MindSpore's is the communication library's",
    "distributed.py share_out": "MindSpore's processes hold all of the base",
    "distributed.py sum_gradients": "torch wraps the network; here the step sums its one vector",
    "diffusion.py Loss.values": "MindSpore's are read one by one",
    "train_dit.py Trainer.loss_with_gradient": "MindSpore takes both from one graph",
    "train_dit.py Trainer threads": "MindSpore runs a graph once at a time",
    "generator.py CUDA_EDGES_PER_CALL": "MindSpore's calls are as large on every device",
    **{
        f"generator.py {name}": "MindSpore compiles a graph for every size: calls are full"
        for name in ("ROW_STEP", "MULTIPLES", "rows_are_alike")
    },
    "generator.py devices": "torch's are in devices.py",
    "crystal_dit.py CrystalDiT.fold": "saves little in MindSpore's calls, which are larger",
    "layers.py CrystalAttention.fold": "saves little in MindSpore's calls, which are larger",
    "bench.py gemm_peak device": "MindSpore has one device per process",
    "generator.py Generator.sample": "torch's number of threads is set while it lasts",
}


def names_of_arguments(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    starred = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [name for name in plain + starred if name not in ("self", "cls")]


def public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def described(source: str) -> dict[str, list[str]]:
    """Arguments of every public function and method, fields of every class, by their names.

    Constants in capitals are there too, without arguments.
    """
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and public(node.name):
            found[node.name] = names_of_arguments(node)
        elif isinstance(node, ast.ClassDef) and public(node.name):
            members = [m for m in node.body if isinstance(m, ast.AnnAssign)]
            found[node.name] = [ast.unparse(m.target) for m in members]
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and public(member.name):
                    found[f"{node.name}.{member.name}"] = names_of_arguments(member)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name: [] for name in map(ast.unparse, targets) if public(name)}
    return found


def renamed(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """torch's names as MindSpore has them."""
    return {".".join(SAME.get(p, p) for p in name.split(".")): a for name, a in found.items()}


def differences(file: str, torch_source: str, ms_source: str) -> list[str]:
    """What one of the two files has and the other has not, as in ``ALLOWED``."""
    torch_side, ms_side = renamed(described(torch_source)), described(ms_source)
    different = [
        f"{file} {name}"
        for name in torch_side.keys() ^ ms_side.keys()
        if not {f"{file} {name}", f"{file} {name.split('.')[0]}"} & ALLOWED.keys()
    ]
    for name in torch_side.keys() & ms_side.keys():
        ours, theirs = torch_side[name], ms_side[name]
        only = [f"{file} {name} {argument}" for argument in set(ours) ^ set(theirs)]
        different += [item for item in only if item not in ALLOWED]
        kept = [[a for a in side if a in ours and a in theirs] for side in (ours, theirs)]
        if kept[0] != kept[1]:
            different.append(f"{file} {name}: order of arguments")
    return sorted(different)


def files(package: str) -> set[str]:
    return {path.name for path in (REPOSITORY / package).glob("*.py")}


def source(package: str, file: str) -> str:
    return (REPOSITORY / package / file).read_text()


def test_every_file_has_a_twin() -> None:
    assert files("torch_impl") ^ files("ms_impl") <= PENDING | ALONE.keys()


@pytest.mark.parametrize("file", sorted(files("torch_impl") & files("ms_impl")))
def test_twins_say_the_same(file: str) -> None:
    assert differences(file, source("torch_impl", file), source("ms_impl", file)) == []


def test_every_allowed_difference_is_one() -> None:
    """Nothing stays allowed that has gone."""
    for entry in ALLOWED:
        file, name, *argument = entry.split()
        torch_side = renamed(described(source("torch_impl", file)))
        ms_side = described(source("ms_impl", file))
        if argument:
            assert (argument[0] in torch_side[name]) != (argument[0] in ms_side[name]), entry
        else:
            assert (name in torch_side) != (name in ms_side), entry


TWIN = """
LIMIT = 3
class Layer:
    width: int
    def __init__(self, width): ...
    def forward(self, x, mask): ...
    def _helper(self): ...
def sample(model, steps=3, *, config): ...
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT", "BOUND"),
        ("class Layer", "class Cell"),
        ("width: int", "size: int"),
        ("forward(self, x, mask)", "forward(self, x)"),
        ("forward(self, x, mask)", "forward(self, mask, x)"),
        ("def forward", "def call"),
        ("sample", "draw"),
        ("config", "settings"),
    ],
)
def test_a_difference_is_noticed(old: str, new: str) -> None:
    same = TWIN.replace("forward", "construct").replace("_helper", "_other")
    assert differences("x.py", TWIN, same) == []
    assert differences("x.py", TWIN, TWIN.replace(old, new).replace("forward", "construct"))


# Parameters


CONFIGS = {
    "default": ModelConfig(),
    "no property": small(properties=()),
    "two properties": small(),
    "bare": small(attention=False, aggregation="mean", feed_forward=0, modulation=False),
    "conventional": small(cell="conventional", distances=False),
}


def shapes(config: ModelConfig) -> tuple[dict[str, tuple], dict[str, tuple]]:
    from ms_impl.crystal_dit import CrystalDiT as MindSporeDiT
    from torch_impl.crystal_dit import CrystalDiT as TorchDiT

    torch_side = {n: tuple(p.shape) for n, p in TorchDiT(config).named_parameters()}
    model = MindSporeDiT(config)
    ms_side = {name: tuple(p.shape) for name, p in model.parameters_and_names()}
    assert all(p.name == name for name, p in model.parameters_and_names())
    return torch_side, ms_side


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_same(name: str) -> None:
    """Names and shapes, and their order, which optimisers go by."""
    torch_side, ms_side = shapes(CONFIGS[name])
    assert list(torch_side.items()) == list(ms_side.items())


def test_a_parameter_on_one_side_is_noticed() -> None:
    torch_side = shapes(small())[0]
    assert list(torch_side.items()) != list(shapes(small(attention=False))[1].items())
    assert list(torch_side.items()) != list(shapes(small(edge_width=8))[1].items())
