"""MindSpore as it runs in use: whole graphs, where what cannot be compiled is an error."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def graph_mode() -> None:
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    from ms_impl.device import use_device

    use_device("cpu")
