"""Which implementation runs, and what an unknown or impossible one says."""

import pytest

from balora import dispatch


def test_auto_is_streaming_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("BALORA_IMPL", raising=False)
    assert dispatch.choose() == "streaming"
    monkeypatch.setenv("BALORA_IMPL", "")
    assert dispatch.choose() == "streaming"
    monkeypatch.setenv("BALORA_IMPL", "reference")
    assert dispatch.choose("auto") == "reference"
    assert dispatch.choose("streaming") == "streaming"


def test_a_name_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match=r"^impl: 'triton' cannot run here: .*no Triton kernel"):
        dispatch.choose("triton")
    monkeypatch.setenv("BALORA_IMPL", "triton")
    with pytest.raises(ValueError, match="^the environment variable BALORA_IMPL: 'triton' cannot run here"):
        dispatch.choose()


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    with pytest.raises(
        ValueError, match="^impl: expected 'auto' or 'reference' or 'streaming' or 'triton', found 'cuda'"
    ):
        dispatch.choose("cuda")
    monkeypatch.setenv("BALORA_IMPL", "nonsense")
    with pytest.raises(
        ValueError, match="BALORA_IMPL: expected 'reference' or 'streaming' or 'triton', found 'nonsense'"
    ):
        dispatch.choose()


def test_every_implementation_says_why_not():
    assert dispatch.why_not("reference") == dispatch.why_not("streaming") == []
    assert dispatch.why_not("triton")
