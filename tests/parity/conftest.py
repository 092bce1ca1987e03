"""MindSpore as it runs in use: whole graphs, where what cannot be compiled is an error."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    ms = pytest.importorskip("mindspore", reason="MindSpore is not installed")
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
