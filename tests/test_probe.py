"""The probe: its figures against the equations, and that it leaves no trace."""

import random

import numpy as np
import pytest
import torch

import balora
from balora import BALoraConfig, probe, reference
from balora.attachment import attachment
from balora.probe import Probe

from .architectures import block_layers, tiny
from .conftest import tiny_llama, train_a_little

CONFIG = BALoraConfig(entropy_top_k=7)


def rows(n=6, length=14, seed=3):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(1, 97, (length,), generator=g).tolist() for _ in range(n)]
    return [dict(input_ids=ids, labels=[-100] * (2 + i) + ids[2 + i :]) for i, ids in enumerate(drawn)]


def trained(config=CONFIG, dtype=torch.float32, **options):
    model = balora.get_pissa_model(tiny_llama(dtype=dtype), r=4, **options)
    balora.attach(model, config)
    train_a_little(model)
    return model


def expected(model, examples, top_k):
    """CE, KL, entropy and σ/‖Z‖ by the plain equations on the model's own logits, in float64."""
    z, z_teacher, labels = [], [], []
    modes = model.training
    model.eval()
    for row in examples:
        ids, label = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        kept = label != -100
        with torch.no_grad():
            z.append(model(input_ids=ids).logits[0, :-1][kept].double())
            with balora.teacher(model):
                z_teacher.append(model(input_ids=ids).logits[0, :-1][kept].double())
        labels.append(label[kept])
    model.train(modes)
    z, z_teacher, labels = torch.cat(z), torch.cat(z_teacher), torch.cat(labels)
    n = len(z)
    entropy = -reference.entropy(z) if top_k is None else -reference.diversity(z, top_k)
    sigma = torch.linalg.svdvals(z)
    return (
        (reference.cross_entropy(z, labels) / n).item(),
        (reference.consistency(z, z_teacher, 1.0) / n).item(),
        (entropy / n).item(),
        (sigma / sigma.square().sum().sqrt())[:64],
    )


@pytest.mark.parametrize("way", ["hidden states", "logits"])
@pytest.mark.parametrize("diversity", ["topk", "full"])
def test_the_probe_measures_what_the_equations_say(way, diversity):
    model = trained(BALoraConfig(entropy_top_k=7, diversity=diversity, temperature=3.0))
    if way == "logits":
        attachment(model)[1].heads = None
    found = Probe(model, rows()).measure()
    ce, kl, entropy, sigma = expected(model, rows(), 7 if diversity == "topk" else None)
    assert found.ce == pytest.approx(ce, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.kl > 1e-3
    assert found.entropy == pytest.approx(entropy, rel=1e-5)
    torch.testing.assert_close(torch.tensor(found.spectrum, dtype=torch.float64), sigma, rtol=1e-4, atol=1e-6)


def test_the_pre_trained_model_is_measured_with_the_adapters_off():
    model = trained()
    measuring = Probe(model, rows())
    before = measuring.measure(pre_trained=True)
    after = measuring.measure()
    assert before.kl == 0
    assert abs(before.ce - after.ce) > 1e-3
    fresh = balora.get_pissa_model(tiny_llama(), r=4)
    balora.attach(fresh, CONFIG)
    assert Probe(fresh, rows()).measure() == before
    attachment(model)[1].heads = None
    assert Probe(model, rows()).measure(pre_trained=True).ce == pytest.approx(before.ce, rel=1e-6)


@pytest.mark.parametrize("name", ["gemma", "qwen3"])
def test_other_architectures(name):
    model = balora.get_pissa_model(tiny(name), r=4, target_modules=list(block_layers(name)))
    balora.attach(model, CONFIG)
    train_a_little(model)
    found = Probe(model, rows()).measure()
    assert found[:3] == pytest.approx(expected(model, rows(), 7)[:3], rel=1e-5)


def test_a_soft_capped_head_with_bias_and_adapter():
    model = trained()
    head = attachment(model)[1].heads.student
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    rich = balora.LinearHead(head.weight, draw(97), 2.0, 0.7, (draw(3, 32), draw(97, 3), 0.5))
    hidden = draw(20, 32)
    z = reference.logits(hidden, head.weight, rich.bias, 2.0, 0.7, rich.lora).double()
    sigma = torch.linalg.svdvals(z)
    found = torch.tensor(probe._spectrum(probe._tiles(hidden, rich)), dtype=torch.float64)
    torch.testing.assert_close(found, sigma / sigma.square().sum().sqrt(), rtol=1e-4, atol=1e-6)


def test_the_logits_come_in_tiles(monkeypatch):
    model = trained()
    whole = Probe(model, rows()).measure()
    monkeypatch.setattr(probe, "_TILE", 10)
    assert Probe(model, rows()).measure().spectrum == pytest.approx(whole.spectrum, rel=1e-6, abs=1e-7)


def test_it_leaves_no_trace():
    model = trained(lora_dropout=0.3)
    model.train()
    model.get_base_model().get_decoder().layers[0].eval()  # a mode of its own
    model.zero_grad()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    values = {n: t.clone() for n, t in model.state_dict().items()}
    last = model.get_base_model().balora_last
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measuring = Probe(model, rows())
    first = measuring.measure(), measuring.measure(pre_trained=True)
    assert (measuring.measure(), measuring.measure(pre_trained=True)) == first
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert model.get_base_model().balora_last is last
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.random.get_state()[1].tolist() == randomness[2]  # noqa: NPY002


def test_the_modes_are_restored_after_an_error(monkeypatch):
    model = trained()
    model.train()
    measuring = Probe(model, rows())
    decoder = model.get_base_model().get_decoder()
    monkeypatch.setattr(decoder, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measuring.measure()
    assert all(m.training for m in model.modules())


def test_it_takes_256_tokens_and_32_rows_at_most():
    model = trained()
    one = [dict(input_ids=[1, 2, 3], labels=[-100, -100, 3])]
    many = Probe(model, one * 100)
    assert (many.tokens, len(many.rows)) == (32, 32)
    ids = list(range(1, 62))
    long = Probe(model, [dict(input_ids=ids, labels=ids)] * 20)
    assert (long.tokens, len(long.rows)) == (256, 5)
    assert [len(scored) for _, _, scored in long.rows] == [60] * 4 + [16]
    assert len(long.rows[-1][0]) == 16  # cut: nothing is forwarded that is not scored
    assert Probe(model, [dict(input_ids=[1, 2], labels=[-100, -100]), *one]).tokens == 1


def test_rows_without_labels_are_scored_whole_but_for_the_padding():
    model = trained()
    ids = [r["input_ids"] for r in rows()]
    bare = Probe(model, [dict(input_ids=row) for row in ids])
    assert bare.tokens == 6 * 13
    assert bare.measure() == Probe(model, [dict(input_ids=row, labels=row) for row in ids]).measure()
    padded = [dict(input_ids=[*row, 0, 0], attention_mask=[1] * 14 + [0, 0]) for row in ids]
    assert Probe(model, padded).measure() == bare.measure()


def test_what_cannot_be_measured():
    model = trained()
    for bad in ([], [dict(input_ids=[1, 2], labels=[2, -100])]):
        with pytest.raises(ValueError, match="rows: expected input_ids and labels with a token that is scored"):
            Probe(model, bad)
    for bad, found in [({"text": "a", "id": 3}, "text, id"), ({}, "an empty one"), ([1, 2], "list")]:
        with pytest.raises(ValueError, match=f"rows: expected examples with input_ids and labels, found {found}$"):
            Probe(model, [bad])
    balora.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        Probe(model, rows())


def test_a_diverged_model_gives_nan_and_no_spectrum():
    model = trained()
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1].fill_(torch.nan)
    found = Probe(model, rows()).measure()
    assert found.ce != found.ce
    assert found.kl != found.kl
    assert found.spectrum == []


def test_bfloat16_measures_a_small_kl():
    """The hidden states are subtracted, not the rounded logits: a step of 1e-3 shows."""
    model = trained(dtype=torch.bfloat16)
    found, exact = Probe(model, rows()).measure(), expected(model, rows(), 7)
    assert found.ce == pytest.approx(exact[0], rel=2e-2)
    fresh = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4)
    balora.attach(fresh, CONFIG)
    assert Probe(fresh, rows()).measure().kl == 0
    autocast = Probe(fresh, rows(), torch.bfloat16)
    assert autocast.measure().kl == 0
