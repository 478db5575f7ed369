"""Which implementation runs, what an unknown or impossible one says, and what info prints."""

import functools
import io
import re

import pytest
import torch

import balora
from balora import dispatch

LOSSES = ["linear_objective", "consistency_loss", "diversity_loss", "svd_loss", "covariance_loss"]


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("BALORA_IMPL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.extension.cache_clear()
    yield
    dispatch.extension.cache_clear()


@pytest.mark.parametrize("operation", LOSSES)
def test_auto_is_streaming_unless_the_environment_says_otherwise(monkeypatch, operation):
    assert dispatch.choose(operation) == "streaming"
    monkeypatch.setenv("BALORA_IMPL", "")
    assert dispatch.choose(operation) == "streaming"
    monkeypatch.setenv("BALORA_IMPL", "reference")
    assert dispatch.choose(operation, "auto") == "reference"
    assert dispatch.choose(operation, "streaming") == "streaming"


def test_a_variable_for_the_losses_leaves_the_svd_alone(monkeypatch):
    assert dispatch.choose("randomized_svd") == "torch"
    monkeypatch.setenv("BALORA_IMPL", "streaming")
    assert dispatch.choose("randomized_svd") == "torch"
    monkeypatch.setenv("BALORA_IMPL", "reference")
    assert dispatch.choose("randomized_svd") == "reference"


def test_a_name_never_falls_back_and_gives_every_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ValueError,
        match=r"^impl: 'triton' cannot run here: triton is not ins.*; balora_kernels is not.*; torch .* with.*; K",
    ):
        dispatch.choose("linear_objective", "triton", limits={"triton": "K is too large"})
    with pytest.raises(ValueError, match=r"^impl: 'cuda' cannot run here: .*_C is not built.*; torch .* without CUDA"):
        dispatch.choose("randomized_svd", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert dispatch.why_not("cuda")[-1] == "torch sees no CUDA device"
    monkeypatch.setenv("BALORA_IMPL", "triton")
    with pytest.raises(ValueError, match="^the environment variable BALORA_IMPL: 'triton' cannot run here"):
        dispatch.choose("diversity_loss")
    assert dispatch.choose("svd_loss") == "streaming"  # has no implementation of that name


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    with pytest.raises(
        ValueError, match="^impl: expected 'auto' or 'streaming' or 'cuda' or 'reference' for svd_loss, found 'triton'"
    ):
        dispatch.choose("svd_loss", "triton")
    monkeypatch.setenv("BALORA_IMPL", "nonsense")
    with pytest.raises(ValueError, match="BALORA_IMPL: expected 'cuda' or .* or 'triton', found 'nonsense'"):
        dispatch.choose("linear_objective")


def test_info_prints_what_it_returns(capsys, monkeypatch):
    found = balora.info()
    text = capsys.readouterr().out
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["torch"] in text
    assert found["implementations"].keys() == dispatch.OPERATIONS.keys()
    for operation, entry in found["implementations"].items():
        assert entry["runs"] == dispatch.choose(operation)
        assert operation in text
        for name, reasons in entry["why_not"].items():
            assert reasons == dispatch.why_not(name)
            assert all(reason in text for reason in reasons)
    assert found["devices"][0].startswith("cpu")
    monkeypatch.setenv("BALORA_IMPL", "triton")
    found = balora.info(file=(file := io.StringIO()))
    assert "runs" not in found["implementations"]["linear_objective"]
    assert "cannot run here" in found["implementations"]["linear_objective"]["error"]
    assert "BALORA_IMPL is 'triton'" in file.getvalue()


@pytest.fixture
def a_gpu(monkeypatch):
    """What torch says where there is one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("operation", ["linear_objective", "consistency_loss", "diversity_loss"])
def test_auto_takes_the_kernels_where_they_can_run(monkeypatch, a_gpu, operation):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert dispatch.choose(operation) == "triton"
    assert dispatch.choose(operation, device=gpu) == "triton"
    assert dispatch.choose(operation, device=cpu) == "streaming"
    assert dispatch.choose(operation, device=gpu, limits={"triton": "float64"}) == "streaming"
    assert dispatch.choose(operation, device=gpu, limits={"triton": None}) == "triton"
    with pytest.raises(ValueError, match="^impl: 'triton' cannot run here: the tensors are on cpu, not on a CUDA"):
        dispatch.choose(operation, "triton", cpu)
    with pytest.raises(ValueError, match="^impl: 'triton' cannot run here: float64$"):
        dispatch.choose(operation, "triton", gpu, {"triton": "float64"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert dispatch.choose(operation, device=gpu) == "streaming"
    with pytest.raises(ValueError, match=r"compute capability 7.5, 8.0 or higher is needed"):
        dispatch.choose(operation, "triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "_version", lambda package: "3.5.1")
    with pytest.raises(ValueError, match=r"triton 3.5.1 is installed, 3.6 or newer is needed"):
        dispatch.choose(operation, "triton", gpu)
    for fine in ("3.6.0", "3.10.0+git1234", "4.0", None):
        monkeypatch.setattr(dispatch, "_version", lambda package, fine=fine: fine)
        assert dispatch.choose(operation, device=gpu) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch.choose(operation, device=gpu) == "streaming"
    with pytest.raises(ValueError, match="torch is built for ROCm"):
        dispatch.choose(operation, "triton", gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # by name, on any device; never by itself
    assert dispatch.choose(operation, "triton", cpu) == "triton"
    assert dispatch.choose(operation, device=gpu) == "streaming"


@pytest.mark.parametrize(
    ("architectures", "runs", "not_on"),
    [
        ("8.0;9.0;10.0+PTX", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.1"], []),
        ("9.0", ["9.0"], ["8.0", "8.9", "10.0", "12.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("8.0+PTX", ["8.0", "8.6", "9.0", "12.0"], []),
        ("8.6;9.0+PTX", ["8.9", "10.0"], ["8.0"]),
        ("9.0a;10.0a+PTX", ["9.0", "10.0"], ["8.0", "10.3", "12.0"]),
    ],
)
def test_the_extension_runs_on_what_it_was_built_for(monkeypatch, a_gpu, architectures, runs, not_on):
    built = dict(torch="2.13.0", cuda="13.0", architectures=architectures, without_cuda=None)
    monkeypatch.setattr(dispatch, "extension", functools.cache(lambda: built))
    gpu = torch.device("cuda", 0)
    for name in (*runs, *not_on):
        capability = tuple(map(int, name.split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert dispatch.choose("randomized_svd", device=gpu) == ("cuda" if name in runs else "torch")
        assert dispatch.choose("diversity_loss", device=gpu) == "triton"
        if name in not_on:
            reason = f"the device has compute capability {name}, balora._C is built for {architectures} (TORCH_CUDA"
            with pytest.raises(ValueError, match=f"^impl: 'cuda' cannot run here: {re.escape(reason)}"):
                dispatch.choose("randomized_svd", "cuda", gpu)
