"""`balora bench`: every operation on tiny shapes, the gate, sweeps and their pictures, arguments that do not fit."""

import copy
import csv
import dataclasses
import sys

import pytest
import torch
from balora_bench import cli, harness, linear_objective, logit_losses, measure, operation, sweep
from balora_bench.operations import OPERATIONS

from balora import reference
from balora.cli import main

pytestmark = pytest.mark.no_cover

SHAPES = {
    "linear_objective": "40,16,300",
    "consistency_loss": "20,300",
    "diversity_loss": "20,300",
    "svd_loss": "30,200",
    "covariance_loss": "12,9",
    "randomized_svd": "3,40,30,4",
    "pissa_setup": "1,48,64,4",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("BALORA_IMPL", raising=False)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return {(row.get("terms", ""), row["implementation"]): row for row in csv.DictReader(file)}


def without_compilers(name):
    """torch.compile takes half a minute."""
    return [i.name for i in OPERATIONS[name].implementations if not i.name.endswith("compiled")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name, tmp_path, capsys):
    arguments = [
        "bench",
        name,
        "--shapes",
        SHAPES[name],
        "--dtypes",
        "float32",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--impl", *without_compilers(name)]) == 0
    out = capsys.readouterr().out
    assert f"{name}: " in out
    assert max(map(len, out.splitlines()[1:])) <= 120
    found = rows_of(tmp_path / f"{name}.csv")
    names = {implementation for _, implementation in found}
    assert {i.label for i in OPERATIONS[name].implementations if i.name in without_compilers(name)} <= names
    markdown = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    measured = 0
    for (_, implementation), row in found.items():
        assert f"| {implementation}" in markdown
        if row["status"] == measure.MEASURED:
            measured += 1
            assert float(row["ms"]) > 0
            assert float(row["ratio"]) > 0
            assert implementation.startswith("floor") or float(row["peak_MiB"]) >= 0
        else:
            assert row["note"]
            assert not row["ms"]
            assert not row["peak_MiB"]
    assert measured >= 3
    if not torch.cuda.is_available():
        assert not any(row["status"] == measure.FAILED for row in found.values())


def with_another(monkeypatch, name, planted):
    """The operation with one more implementation."""
    changed = dataclasses.replace(OPERATIONS[name], implementations=(*OPERATIONS[name].implementations, planted))
    monkeypatch.setitem(OPERATIONS, name, changed)


def slightly_wrong(p):
    return 1.001 * torch.nn.functional.cross_entropy(p.leaf @ p.weight.T, p.labels)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_outside_the_budget_gets_no_figures(own, monkeypatch, capsys, tmp_path):
    planted = operation.Implementation("planted", slightly_wrong, own=own, terms=("ce",))
    with_another(monkeypatch, "linear_objective", planted)
    arguments = ["linear_objective", "--shapes", "12,16,50", "--dtypes", "float32", "--terms", "ce", "--rounds", "1"]
    status = cli.main([*arguments, "--impl", "planted", "streaming", "--out", str(tmp_path)])
    assert status == (1 if own else 0)
    rows = rows_of(tmp_path / "linear_objective.csv")
    row = rows["ce", planted.label]
    assert row["status"] == measure.OUTSIDE
    assert not row["ms"]
    assert not row["peak_MiB"]
    assert "outside the error budget: loss 1.0e-3, allowed" in row["note"]
    assert float(rows["ce", "balora streaming"]["ms"]) > 0  # the other rows are there
    assert "outside the error budget: loss 1.0e-3, allowed" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "status"), [(1.5, measure.MEASURED), (2.5, measure.OUTSIDE)])
def test_a_peer_near_the_budget_keeps_its_figures_with_a_remark(factor, status, monkeypatch, capsys, tmp_path):
    eps = torch.finfo(torch.bfloat16).eps

    def off(p):
        """In the loss alone, of which the budget allows 2 eps and what plain torch is off."""
        loss = torch.nn.functional.cross_entropy(p.leaf.float() @ p.weight.float().T, p.labels)
        return loss + (2 * eps * factor * loss).detach()

    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    planted = operation.Implementation("planted", off, terms=("ce",), note="its note")
    with_another(monkeypatch, "linear_objective", planted)
    arguments = ["linear_objective", "--shapes", "12,16,50", "--dtypes", "bfloat16", "--terms", "ce", "--rounds", "1"]
    arguments += ["--impl", "planted", "--sweep", "none", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    row = rows_of(tmp_path / "linear_objective.csv")["ce", "planted"]
    assert row["status"] == status
    assert row["note"].startswith(f"outside the error budget: loss {measure.short(2 * eps * factor)}, allowed 1.6e-2")
    assert bool(row["ms"]) == (status == measure.MEASURED) == row["note"].endswith("; its note")


class Broken(linear_objective.Objective):
    """balora's streaming path with other settings than those that are asked for."""

    def __init__(self, **changed):
        super().__init__("streaming")
        object.__setattr__(self, "changed", changed)

    def output(self, p):
        p = copy.copy(p)
        p.config = dataclasses.replace(p.config, **self.changed)
        return super().output(p)


class BrokenGradient(linear_objective.Objective):
    """The KL's gradient 5 % too large, all values right."""

    def output(self, p):
        found = super().output(p)
        kl = reference.consistency(p.leaf @ p.weight.T, p.teacher @ p.weight.T, p.config.temperature) / len(p.leaf)
        return found._replace(loss=found.loss + 0.05 * p.config.lambda_consistency * (kl - kl.detach()))


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (Broken(temperature=1.9), "consistency of all rows"),
        (Broken(entropy_top_k=15), "diversity of all rows"),
        (Broken(svd_rank=9), "svd of all rows"),
        (Broken(lambda_svd=0.1), "sum of all rows"),
        (BrokenGradient("streaming"), "weighted_gradient of all rows"),
        (Broken(), None),
    ],
)
def test_a_wrong_term_is_outside_the_budget_however_small_its_weight(planted, words, monkeypatch, tmp_path):
    shape = (500, 64, 1000)
    case = OPERATIONS["linear_objective"].case(shape, torch.bfloat16, "all")
    loose = case.errors(planted) | case.errors_of_all(case.run(planted)())
    assert all(error.found <= error.allowed for error in loose.values())  # the loss and its gradient do not show it
    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", planted, own=True))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    arguments = ["linear_objective", "--shapes", ",".join(map(str, shape)), "--dtypes", "bfloat16", "--terms", "all"]
    arguments += ["--rounds", "1", "--impl", "planted", "--sweep", "none", "--out", str(tmp_path)]
    assert cli.main(arguments) == (0 if words is None else 1)
    row = rows_of(tmp_path / "linear_objective.csv")["all", "balora planted"]
    assert row["note"].startswith("" if words is None else f"outside the error budget: {words}")


class Crashes(linear_objective.Objective):
    """As a kernel may with weights that no run before had."""

    def output(self, p):
        if p.config.lambda_consistency == linear_objective.WEIGHTS["consistency"]:
            raise RuntimeError("misaligned address")
        return super().output(p)


def test_what_fails_in_the_check_of_its_terms_fails_alone(monkeypatch, tmp_path):
    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", Crashes("streaming"), own=True))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    arguments = ["linear_objective", "--shapes", "40,16,50", "--dtypes", "bfloat16", "--terms", "all", "--rounds", "1"]
    arguments += ["--impl", "planted", "naive", "--sweep", "none", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    rows = rows_of(tmp_path / "linear_objective.csv")
    assert rows["all", "balora planted"]["note"].endswith("misaligned address")
    assert not rows["all", "balora planted"]["ms"]
    assert rows["all", "naive"]["ms"]


def right_in_its_first_rows(wrong):
    """Cross-entropy of chunks of 128 rows, with something wrong from row 320 on."""

    def run(p):
        losses = [
            torch.nn.functional.cross_entropy(leaf @ p.weight.T, labels, reduction="sum")
            for leaf, labels in zip(p.leaf.split(128), p.labels.split(128), strict=True)
        ]
        return wrong(torch.stack(losses[:3]).sum(), torch.stack([torch.zeros(()), *losses[3:]]).sum()) / len(p.leaf)

    return run


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda first, rest: first, "outside the error budget: loss of all rows"),
        (lambda first, rest: first + rest.detach(), "outside the error budget: gradient of all rows"),
        (lambda first, rest: first + rest, None),
    ],
)
def test_the_timed_size_is_checked_too(wrong, words, monkeypatch, tmp_path):
    planted = operation.Implementation("planted", right_in_its_first_rows(wrong), own=True, terms=("ce",))
    with_another(monkeypatch, "linear_objective", planted)
    monkeypatch.setattr(linear_objective, "CHECKED", 320)
    monkeypatch.setattr(operation, "_CHUNK", 100 * 50)
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    arguments = ["linear_objective", "--shapes", "500,16,50", "--dtypes", "float32", "--terms", "ce", "--rounds", "1"]
    status = cli.main([*arguments, "--impl", "planted", "naive", "--out", str(tmp_path), "--sweep", "none"])
    rows = rows_of(tmp_path / "linear_objective.csv")
    row = rows["ce", "balora planted"]
    assert status == (0 if words is None else 1)
    assert row["note"].startswith(words or "")
    assert bool(row["ms"]) == (words is None)
    assert rows["ce", "naive"]["status"] == measure.MEASURED


@pytest.mark.parametrize("terms", ["all", "ce+kl", "ce", "kl"])
@pytest.mark.parametrize("shape", [(50, 16, 30), (40, 64, 300), (20, 64, 50)])
def test_the_oracle_of_all_rows_is_that_of_few(terms, shape, monkeypatch):
    monkeypatch.setattr(operation, "_CHUNK", 7 * shape[2])
    monkeypatch.setattr(linear_objective, "CHECKED", shape[0])
    case = OPERATIONS["linear_objective"].case(shape, torch.float32, terms)
    (_, few), (_, of_all) = case._yardstick, case._yardstick_of_all
    for name, tensor in of_all.items():
        torch.testing.assert_close(tensor, few[name], rtol=1e-10, atol=1e-13)


def test_large_gradients_are_compared_at_the_ends_and_the_borders_of_chunks():
    case = OPERATIONS["consistency_loss"].case((4, 9), torch.float32, "all")
    case.inputs.leaf = type("Large", (), {"numel": lambda _: 2**28, "__len__": lambda _: 640, "device": "cpu"})()
    rows = case._compared.tolist()
    assert rows[:66] == [*range(64), 127, 128]
    assert rows[-66:] == [511, 512, *range(576, 640)]
    assert {255, 256, 383, 384} <= set(rows)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda p: p.leaf.sum() * float("nan"), "outside the error budget: loss nan"),
        (lambda p: p.missing, "AttributeError"),
        (lambda p: (p.leaf @ p.weight[:, :-1].T).sum(), "RuntimeError"),
        (lambda p: torch.empty(2**52).sum() + p.leaf.sum(), "out of memory"),
    ],
)
def test_a_peer_that_breaks_is_shown_and_stops_nobody(wrong, words, monkeypatch, capsys):
    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", wrong, terms=("ce",)))
    arguments = ["linear_objective", "--shapes", "12,16,50", "--dtypes", "float32", "--terms", "ce", "--rounds", "1"]
    assert cli.main([*arguments, "--impl", "planted", "naive"]) == 0
    out = capsys.readouterr().out
    assert words in out
    assert "naive" in out


def test_what_breaks_while_it_is_timed_loses_its_own_figures_alone(monkeypatch, tmp_path):
    calls = []

    def once(p):
        calls.append(len(p.leaf))
        if calls.count(12) > 5:
            raise torch.OutOfMemoryError("no more")
        return torch.nn.functional.cross_entropy(p.leaf @ p.weight.T, p.labels)

    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", once, terms=("ce",)))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: 2**20)
    arguments = ["linear_objective", "--shapes", "12,16,50", "--dtypes", "float32", "--terms", "ce", "--rounds", "9"]
    arguments += ["--sweep", "none", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--impl", "planted", "streaming", "naive"]) == 0
    rows = rows_of(tmp_path / "linear_objective.csv")
    assert rows["ce", "planted"]["note"] == "out of memory"
    assert not any(rows["ce", "planted"][key] for key in ("ms", "ratio", "peak_MiB", "error_loss"))
    assert calls.count(12) == 6  # not tried again
    assert all(float(rows["ce", name]["ms"]) > 0 for name in ("balora streaming", "naive"))


def test_fixed_costs_of_a_small_run_are_not_scaled_into_too_slow(monkeypatch):
    """A small run is 64 rows, but takes a second, as all of them do."""
    monkeypatch.setattr(harness, "seconds_of", lambda run, times=1: float(len([run()])))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    case = OPERATIONS["consistency_loss"]
    chosen = [i for i in case.implementations if i.name == "naive"]
    for n, slow, status in ((1024, 1.0, measure.MEASURED), (1024, 0.9, measure.STOPPED), (4096, 1.0, measure.STOPPED)):
        rows = measure.measure(case, (n, 9), "float32", "all", chosen, rounds=1, slow=slow, bandwidth=1e10)
        assert rows[1]["status"] == status


def test_without_matplotlib_there_are_tables_but_no_sweep_to_a_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "balora_bench.plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    arguments = ["consistency_loss", "--shapes", "8,20", "--dtypes", "float32", "--rounds", "1", "--impl", "naive"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "consistency_loss.csv").exists()
    arguments[arguments.index("8,20")] = "4,20"
    arguments.insert(3, "8,20")
    assert cli.main([*arguments, "--sweep", "N", "--out", str(tmp_path)]) == 2
    assert "--out: the plots need matplotlib, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terms", "dtype", "logit"),
    [("ce", torch.float32, 4), ("ce+kl", torch.float32, 8), ("ce", torch.bfloat16, 6), ("ce+kl", torch.bfloat16, 6)],
)
def test_the_bytes_moved_are_of_the_chunks_that_run(terms, dtype, logit, monkeypatch):
    asked = []
    tiles = pytest.importorskip("balora_kernels.tiles")
    monkeypatch.setattr(tiles, "chunk_rows", lambda rows, row_bytes, budget: asked.append(row_bytes) or rows)
    linear_objective.bytes_moved(OPERATIONS["linear_objective"].case((12, 16, 50), dtype, terms))
    assert asked == [64 * logit]  # rows start at multiples of 64


def test_what_is_too_slow_is_not_timed(monkeypatch):
    case = OPERATIONS["covariance_loss"]
    chosen = [i for i in case.implementations if i.name == "reference"]
    rows = measure.measure(case, (12, 9), "float32", "all", chosen, rounds=1, slow=1e-9, bandwidth=1e10)
    assert rows[1]["status"] == measure.STOPPED
    assert rows[1]["note"].startswith("too slow")
    assert "ms" not in rows[1]


def test_memory_is_that_of_the_run_beyond_inputs_and_gradients():
    if not torch.cuda.is_available() and not measure.Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of the CPU needs Linux")
    case = OPERATIONS["consistency_loss"]
    chosen = [i for i in case.implementations if i.name == "naive"]
    rows = measure.measure(case, (500, 20000), "float32", "all", chosen, rounds=1, slow=60, bandwidth=1e10)
    tensor = 500 * 20000 * 4 / harness.MIB
    assert rows[0]["held_MiB"] == pytest.approx(3 * tensor)
    assert 1.9 * tensor < rows[1]["peak_MiB"] < 8 * tensor  # softmaxes of both, and what they are made from


@pytest.mark.parametrize("axis", ["N", "V"])
def test_a_sweep_writes_tables_and_a_picture(axis, tmp_path, capsys):
    sizes = {"N": ["16,300", "64,300"], "V": ["16,300", "16,1200"]}[axis]
    arguments = ["bench", "consistency_loss", "--sweep", axis, "--shapes", *sizes, "--dtypes", "float32"]
    assert main([*arguments, "--rounds", "1", "--impl", "reference", "liger-jsd", "--out", str(tmp_path)]) == 0
    name = f"consistency_loss-{axis}"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.png").stat().st_size > 20000
    markdown = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert f"({name}.png)" in markdown
    assert "liger-jsd: " in markdown  # why it has no line
    with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
        sizes = [int(row[axis]) for row in csv.DictReader(file) if row["implementation"] == "balora reference"]
    assert sizes == {"N": [16, 32, 64], "V": [300, 600, 1200]}[axis]
    assert "ms, forward and backward" in capsys.readouterr().out


def test_in_a_sweep_an_implementation_ends_where_it_ended(monkeypatch, capsys):
    def up_to_40_rows(p):
        if len(p.leaf) > 40:
            raise torch.OutOfMemoryError("no more")
        return torch.nn.functional.cross_entropy(p.leaf @ p.weight.T, p.labels)

    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", up_to_40_rows, terms=("ce",)))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    arguments = ["linear_objective", "--sweep", "N", "--shapes", "20,16,50", "160,16,50", "--dtypes", "float32"]
    assert cli.main([*arguments, "--terms", "ce", "--impl", "planted", "streaming", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "planted: from N 80 on: out of memory" in out
    assert out.count("planted: ") == 1  # not tried again
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()[:2] in ("20", "40", "80", "16")}
    assert {size: len(cells) - 1 for size, cells in lines.items()} == {"20": 3, "40": 3, "80": 2, "160": 2}


def test_an_interrupted_sweep_leaves_what_it_has(monkeypatch, capsys, tmp_path):
    def interrupted(p):
        if len(p.leaf) > 40:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(p.leaf @ p.weight.T, p.labels)

    with_another(monkeypatch, "linear_objective", operation.Implementation("planted", interrupted, terms=("ce",)))
    monkeypatch.setattr(measure, "_in_fresh_process", lambda *_: None)
    arguments = ["linear_objective", "--sweep", "N", "--shapes", "20,16,50", "80,16,50", "--dtypes", "float32"]
    arguments += ["--terms", "ce", "--impl", "planted", "--rounds", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    with (tmp_path / "linear_objective-N.csv").open(encoding="utf-8") as file:
        assert [row["N"] for row in csv.DictReader(file) if row["implementation"] == "planted"] == ["20", "40"]
    markdown = (tmp_path / "linear_objective-N.md").read_text(encoding="utf-8")
    assert markdown.count("## ") == 1
    assert (tmp_path / "linear_objective-N.png").exists()
    assert "ms, forward and backward" not in capsys.readouterr().out  # shown once, at its end


def test_sizes_of_a_sweep_double():
    assert sweep.shapes((64, 8, 100), (512, 8, 100)) == [(n, 8, 100) for n in (64, 128, 256, 512)]
    assert sweep.shapes((8, 100), (8, 300)) == [(8, 100), (8, 200), (8, 300)]
    for defaults in (d for o in OPERATIONS.values() for d in (o.cpu, o.gpu)):
        for first, last in defaults.sweeps.values():
            assert len(sweep.shapes(first, last)) <= 8


def test_the_list_names_everything_and_why_it_does_not_run(capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    for name, known in OPERATIONS.items():
        assert name in out
        for i in known.implementations:
            assert i.name in out
    (peer,) = (line for line in out.splitlines() if "cut-cross-entropy" in line)
    assert any(words in peer for words in ("cut_cross_entropy is not installed", "needs a CUDA device", "runs"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear_objectives"], "operation: expected one of linear_objective, "),
        (["linear_objectives"], "found 'linear_objectives'; did you mean linear_objective?"),
        (["--impl", "tritn"], "--impl: expected one of triton, streaming, "),
        (["svd_loss", "--impl", "triton"], "--impl: expected one of cuda, streaming, "),
        (["--terms", "everything"], "--terms: expected one of all, ce+kl, ce, kl, found 'everything'"),
        (["--dtypes", "int8"], "--dtypes: expected one of bfloat16, "),
        (["linear_objective", "--shapes", "12,16"], "--shapes: expected N,d,V for linear_objective, as "),
        (["linear_objective", "--shapes", "12,0,16"], "found '12,0,16'"),
        (["--rounds", "0"], "--rounds: expected at least 1, found 0"),
        (["--sweep", "d"], "--sweep: expected one of N, V, none, found 'd'"),
        (
            ["pissa_setup", "--sweep", "N"],
            "--sweep: expected one of linear_objective, consistency_loss, diversity_loss",
        ),
        (
            ["linear_objective", "--sweep", "N", "--shapes", "8,4,9"],
            "--shapes: expected with --sweep N the first and the",
        ),
        (["linear_objective", "--sweep", "N", "--shapes", "8,4,9", "8,4,18"], "--shapes: expected with --sweep N the "),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("balora bench: error: ")
    assert message in error


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main(["bench", "covariance_loss", "--out", str(tmp_path / "file")]) == 2
    assert "--out: expected a folder, found the file " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_the_choice_of_the_environment_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("BALORA_IMPL", "reference")
    assert main(["bench", "covariance_loss"]) == 2
    assert "BALORA_IMPL: expected not to be set" in capsys.readouterr().err


class Device:
    """A device whose runs take some time on its clock, and whose host takes longer to launch the first after a rest."""

    def __init__(self, monkeypatch):
        self.now, self.rested, self.alive, self.most_alive = 0.0, True, 0, 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                device.rested = True

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(harness, "ON_GPU", True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def run(self, seconds, launch=1e-4):
        class Result:
            def __init__(this):
                self.alive += 1
                self.most_alive = max(self.most_alive, self.alive)

            def __del__(this):
                self.alive -= 1

        def run():
            self.now += seconds + launch * self.rested
            self.rested = False
            return Result()

        return run


def test_on_a_device_a_short_run_is_timed_over_many_calls(monkeypatch):
    device = Device(monkeypatch)
    short, long = device.run(1e-5), device.run(7e-3)
    assert 5e-3 / 1e-5 * 0.95 < harness.calls(short) <= 1000
    assert harness.calls(long) == 1
    found = harness.interleaved({"short": short, "long": long}, rounds=3)
    assert found["short"] == pytest.approx([1e-5] * 3, rel=0.05)  # the launch is a twentieth of what it was
    assert found["long"] == pytest.approx([7e-3 + 1e-4] * 3)
    assert device.most_alive == 1
    assert harness.calls(device.run(0.0, launch=0.0)) == 1000  # one that has failed and is not run again


def test_on_a_cpu_every_run_is_timed_once():
    if torch.cuda.is_available():
        pytest.skip("needs a CPU alone")
    called = []
    harness.interleaved({"a": lambda: called.append(1)}, rounds=3)
    assert len(called) == 1 + 3


def test_the_machine_has_the_versions_that_a_figure_depends_on(monkeypatch):
    class Package:
        def __init__(self, name):
            self.name, self.version = name, "1.2"

    packages = [Package(name) for name in ("transformers", "peft", "accelerate", "liger_kernel", None)]
    monkeypatch.setattr(harness.metadata, "distributions", lambda: packages)
    found = harness.machine()
    assert [found[name] for name in ("transformers", "peft", "accelerate", "liger-kernel")] == ["1.2"] * 4


@pytest.mark.parametrize(
    ("answer", "status", "found"),
    [("700.00 W, 1980 MHz\n", 0, "700.00 W, 1980 MHz"), ("a\nb\n", 0, ""), ("no\n", 9, "")],
)
def test_the_power_limit_is_told_where_the_driver_tells_it(answer, status, found, monkeypatch):
    asked = []

    def answered(command, **_):
        asked.append(command)
        return harness.subprocess.CompletedProcess(command, status, answer, "")

    properties = type("Properties", (), {"uuid": "12-34"})()
    monkeypatch.setattr(harness, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(harness.shutil, "which", lambda name: name)
    monkeypatch.setattr(harness.subprocess, "run", answered)
    assert harness._limits() == found
    assert asked[0][-1] == "--id=GPU-12-34"


@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_the_oracle_of_the_svd_loss_is_the_decomposition(shape):
    case = OPERATIONS["svd_loss"].case(shape, torch.bfloat16, "all")
    wide = case.inputs.part(slice(None), torch.float64)
    found, exact = (operation._named(f, wide) for f in (logit_losses.svd_oracle, logit_losses.svd("reference")))
    assert max(harness.error(found[name], exact[name]) for name in exact) < 1e-11


def test_the_floor_moves_the_bytes_it_says():
    tensor = torch.arange(10.0)
    moved = []
    copy = torch.Tensor.copy_

    class Counting(torch.Tensor):
        def copy_(self, other):
            moved.append(other.numel())
            return copy(self, other)

    run = harness.copies(tensor.as_subclass(Counting), 5)
    run()
    assert 2 * sum(moved) == 5 * 10
