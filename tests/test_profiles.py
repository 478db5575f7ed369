"""The profiles: the script on tiny shapes, the counted bytes against what the kernels touch, and no kernel left out."""

import math
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from balora import dispatch

from .test_imports import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("matplotlib")
pytest.importorskip("triton")
import kernel_counts

pytestmark = pytest.mark.no_cover
PAGE = ROOT / "docs" / "profiles.md"
TINY = dict(
    objective=((40, 16, 512),),
    logits=(8, 512),
    matrix=(40, 80, 4),
    weights=(2, 64, 48, 4),
    model=(24, 32, 1, 300),
    batch=(2, 16),
    rounds=1,
)


@pytest.mark.parametrize("operation", ["linear_objective", "training_step"])
def test_the_parts_of_an_operation_add_up(tmp_path, operation):
    pytest.importorskip("peft")
    import profiles

    found = [profiles.measured(case, 1) for case in profiles.cases(profiles.Sizes(**TINY), operation)]
    assert len(found) == 1
    row = found[0]
    assert row["floor"] > 0
    assert row["profiled"] == pytest.approx(sum(row["parts"].values()))
    if torch.cuda.is_available():
        return
    expected = {
        "linear_objective": {"three products", "KL passes", "softmax", "scatter", "top K", "eigenvalues"},
        "training_step": {"student's forward", "teacher's forward", "loss", "backward", "optimizer"},
    }
    assert expected[operation] <= set(row["parts"])
    assert min(row["parts"].values()) > 0
    assert row["parts"].get(profiles.OTHER, 0) < 0.8 * row["profiled"]
    profiles.profile_plots.parts(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_the_script_writes_a_table_and_a_picture(tmp_path, capsys):
    import profiles

    arguments = ["--out", str(tmp_path), "--results", str(tmp_path), "--only", "randomized_svd"]
    profiles.main(arguments, profiles.Sizes(**TINY))
    text = capsys.readouterr().out
    assert "| randomized_svd" in text
    assert "CholeskyQR" in text
    assert isinstance(dispatch.extension(), str) or "rank 4, C++" in text or torch.cuda.is_available()
    assert [file.name[:14] for file in tmp_path.iterdir()] == ["randomized-svd"]


def test_on_a_device_ranges_around_kernels_are_no_kernels():
    import profiles

    def event(name, ms, names=False):
        return SimpleNamespace(
            device_type=profiles.DeviceType.CUDA, name=name, self_device_time_total=1e3 * ms, is_user_annotation=names
        )

    events = [event("void merge(int)", 2), event("ampere_gemm", 3), event("Optimizer.step#AdamW.step", 9, names=True)]
    assert profiles.by_kernel(events) == {"merge": 2, "products": 3}


@pytest.mark.parametrize("timed", [False, True])
def test_the_counts_do_not_say_that_nothing_ran_where_it_did(timed, monkeypatch, tmp_path):
    """Nor later, counted anew without a device."""
    import profiles

    titles = []
    if timed:
        (tmp_path / "profiles-gpu.md").touch()
    monkeypatch.setattr(kernel_counts, "instructions", dict)
    monkeypatch.setattr(profiles.profile_plots, "kernels", lambda *_: None)
    monkeypatch.setattr(
        profiles.profile_plots, "save", lambda figure, path: titles.append(figure.axes[0].get_title(loc="left"))
    )
    profiles.kernels(SimpleNamespace(out=tmp_path, results=tmp_path))
    text = (tmp_path / "profiles-kernels.md").read_text(encoding="utf-8")
    assert ("none has run on a device" in text) == (not timed)
    assert ("yet" in titles[0]) == (not timed)


def test_alternatives_give_what_is_taken():
    import alternatives

    z = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    values, where = alternatives.by_blocks(z, 21, 32)
    torch.testing.assert_close(values, z.topk(21).values, rtol=0, atol=0)
    torch.testing.assert_close(z.gather(1, where), values, rtol=0, atol=0)
    for ways in alternatives.steps(512).values():
        for way in ways.values():
            way()


class Touched:
    """Bytes of different addresses that kernels of the interpreter load and store, by kernel."""

    def __init__(self, monkeypatch, *modules):
        from triton.runtime import interpreter

        self.read, self.written, self.blocks, self.kernel = {}, {}, {}, None
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def loading(this, ptrs, mask, *rest):
            self.note(self.read, ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def storing(this, ptrs, value, mask, *rest):
            self.note(self.written, ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", loading)
        monkeypatch.setattr(builder, "create_masked_store", storing)
        for module in modules:
            for name in kernel_counts.kernels_of_the_sources():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, Named(self, name, getattr(module, name)))

    def note(self, places, ptrs, mask):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        chosen = ptrs.data[mask.data.astype(bool)].tolist()
        places.setdefault(self.kernel, set()).update((at, size) for at in chosen)

    def bytes(self, kernel):
        return tuple(sum(size for _, size in places[kernel]) for places in (self.read, self.written))


class Named:
    def __init__(self, touched, name, kernel):
        self.touched, self.name, self.kernel = touched, name, kernel

    def __getitem__(self, grid):
        def launch(*args, **settings):
            self.touched.kernel = self.name + ", in place" * (args[0] is args[1])
            self.touched.blocks[self.touched.kernel] = math.prod(grid)
            return self.kernel[grid](*args, **settings)

        return launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the kernels' interpreter")
def test_counted_bytes_are_those_that_the_kernels_touch(monkeypatch):
    from balora_kernels import eigh, row_kernels, rows

    touched = Touched(monkeypatch, row_kernels, eigh)
    n, vocab, top_k, small = 3, 8192, 5, 6
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, vocab, generator=g)
    t = (0.1 * torch.randn(n, vocab, generator=g)).bfloat16()
    labels = z.view(n, -1, 64).amax(-1).argmin(-1) * 64  # in a block that none of the top K is in
    student, teacher = rows.Logits(z), rows.Teacher(rows.Logits(t), True)
    common = dict(labels=labels, temperature=2.0)
    found = rows.forward(student, teacher, **common, top_k=top_k)
    rows.gradient(student, teacher, found, t, **common, strength=0.05, lambda_diversity=0.005)
    matrix = torch.eye(small) + 0.1
    eigh.eigh(matrix)
    eigh.inverse_factor(matrix)
    counts = kernel_counts.triton_counts(n, vocab, top_k, 2, small, {})
    assert {c.kernel for c in counts} == set(touched.read)
    for c in counts:
        assert (c.read, c.written) == touched.bytes(c.kernel), c.kernel
        assert c.blocks == touched.blocks[c.kernel], c.kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the kernels' interpreter")
@pytest.mark.parametrize("shape", [(18, 300, 3), (3, 5000, 1)])
def test_counted_bytes_of_a_tile_under_a_soft_cap(monkeypatch, shape):
    from balora_kernels import row_kernels, rows

    touched = Touched(monkeypatch, row_kernels)
    n, vocab, rank = shape
    z, half = torch.randn(n, vocab), torch.empty(n, vocab, dtype=torch.float16)
    rows.cap(z, 1 / 30, half, 2.0**14)
    rows.cap(z, 1 / 30, z)
    rows.capped_gradient(z, torch.ones(()), torch.randn(n, rank), torch.randn(rank, vocab), half)
    counts = kernel_counts.capped_counts(n, vocab, rank, 2, {})
    assert {c.kernel for c in counts} == set(touched.read)
    for c in counts:
        assert (c.read, c.written) == touched.bytes(c.kernel), c.kernel
        assert c.blocks == touched.blocks[c.kernel], c.kernel


def test_counted_bytes_of_the_cuda_kernels():
    """A tiny case by hand: A of 2 · 200 × 96 in bfloat16, 3 of 10 columns in panels of 16 rows."""
    counts = {c.kernel: c for c in kernel_counts.cuda_counts(kernel_counts.Sketch(2, 200, 96, 3, 10))}
    a, q, p = 2 * 200 * 96 * 2, 2 * 16 * 256 * 4, 2 * 16 * 128 * 4  # A; Q and P in float32, each row up to 64 · k
    grams = 2 * 4 * 16 * 16 * 8  # four blocks, of 64 of 256 entries each
    # Two tiles of 128 rows, one slice; one tile of 256 columns, one slice.
    expected = {
        "times, of Ω": (a, q + 2 * 2 * 8),
        "add_squares": (2 * 2 * 8, 2 * 8),
        "times": (a + p, q),  # two parts of two bytes are one of four
        "transposed_times": (a + q, p),
        "iterate": (a + q + 2 * 8, 2 * q),  # two slices: of 64 columns and of 32
        "gather_kernel": (q, q),
        "gram_kernel": (q, grams),
        "factor_kernel": (grams, 2 * 2 * 100 * 8),
        "apply_kernel": (q * 10 // 16 + 2 * 100 * 8, q + q),
        "jacobi_kernel": (2 * 2 * 100 * 8, 2 * (3 * 4 + 2 * 3 * 10 * 8)),
        "turn_kernel": (2 * (10 * 200 * 4 + 3 * 10 * 8), 2 * 200 * 3 * 4),
        "update": (a + 2 * 4 * (3 * 200 + 3 * 96 + 3 + 1), a),
    }
    assert {kernel: (c.read, c.written) for kernel, c in counts.items()} == expected
    tensor = 2 * 2 * 200 * 96 * 16
    products = {k: c.operations / tensor for k, c in counts.items() if c.unit == "bf16"}
    assert products == {"times, of Ω": 1, "times": 2, "transposed_times": 2, "iterate": 4}


def test_what_nsight_compute_measured_becomes_a_row_a_kernel():
    import ncu_table

    heads = ["ID", "Kernel Name", *ncu_table.METRICS]
    lines = [
        heads, ["", "", "usecond", "%", "%", "%"], ["0", "merge", "21.5", "10.0", "0.0", "37.2"],
        ["1", "ampere_gemm", "9", "9", "9", "9"], ["2", "merge", "99", "99", "99", "99"],
        ["3", "void balora::times<balora::Float16, 32, false>(int)", "7", "80", "12", "18"],
    ]  # fmt: skip
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    found = {row["kernel"]: row for row in ncu_table.table(text)}
    assert set(found) == {"merge", "times"}
    assert found["merge"]["time"] == "21.5 usecond"
    assert found["times"]["bandwidth, % of peak"] == "80"
    with pytest.raises(SystemExit, match="found: 'no csv'"):
        ncu_table.table("no csv")


def test_a_loop_counts_as_often_as_it_runs():
    with mock.patch.dict("os.environ"):  # it switches the kernels' interpreter off, for its own process
        import machine_code

    lines = ["/*0000*/ MOV R1, c[0x0] ;", ".L_x_0:", "/*0010*/ FADD R1, R1 ;", "/*0020*/ @P0 BRA `(.L_x_0) ;"]
    lines += ["/*0030*/ EXIT ;", ".L_x_1:", "/*0040*/ BRA `(.L_x_1);", "/*0050*/ NOP;"]
    assert machine_code.executed("\n".join("        " + line for line in lines), 10) == 1 + 2 * 10 + 1 + 1


def test_the_bound_is_the_longer_time():
    h100 = next(d for d in kernel_counts.DEVICES if d.name == "H100")
    count = kernel_counts.Count("k", "", "", 3_350_000, 0, "float64", 33.5e6, 1000)
    assert count.seconds(h100) == pytest.approx((1e-6, 1e-6))
    assert count._replace(operations=34e6).bound(h100) == "float64"
    assert count._replace(read=3_400_000).bound(h100) == "bandwidth"
    assert count._replace(blocks=33).seconds(h100)[1] == pytest.approx(4e-6)


def test_every_kernel_has_a_paragraph():
    kernels = kernel_counts.kernels_of_the_sources()
    assert {"tile_states", "cholesky_inverse", "times", "iterate", "update"} <= kernels
    counted = {c.kernel.split(",")[0] for c in kernel_counts.counts({})}
    assert counted == kernels
    listed = set(re.findall(r"^- \*\*`(\w+)`\*\*", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == kernels


def test_the_pictures_of_the_page_are_there():
    linked = re.findall(r"\]\((profiles/[\w-]+\.png)\)", PAGE.read_text(encoding="utf-8"))
    assert linked
    for picture in linked:
        assert (PAGE.parent / picture).is_file(), picture
