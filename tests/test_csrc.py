"""The CUDA kernels of csrc/ on a CPU: the same source through g++, every block's threads run (cuda_on_threads.h)."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from balora import functional as F

from .test_randomized_svd import CASES, assert_orthonormal, decay, matrix

TESTS, ROOT = Path(__file__).parent, Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLAGS = ["-std=c++20", "-O1", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DBALORA_ON_THREADS"]
FLAGS += [f"-I{TESTS}", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_all(sources, folder, *flags):
    """An object file of each."""
    objects = [folder / f"{source.name}.o" for source in sources]

    def one(source, target):
        command = ["g++", *FLAGS, *flags, "-c", "-x", "c++", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, sources, objects))
    return objects


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    # A GPU refuses 16 bytes that do not begin on 16 bytes; a CPU is asked to refuse them too.
    checked = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    objects = compile_all([*SOURCES, TESTS / "csrc_for_ctypes.cpp"], folder, "-fPIC", *checked)
    subprocess.run(["g++", "-shared", *checked, *map(str, objects), "-o", str(folder / "csrc.so")], check=True)
    library = ctypes.CDLL(str(folder / "csrc.so"))
    for name in ("workspace_bytes", "sketch", "multiply", "iterate"):
        getattr(library, f"balora_{name}").restype = ctypes.c_int64
    return library


def call(library, name, *arguments):
    """Tensors as pointers, whole numbers as 64 bits; but for a type, a flag, a width, which are ints in the interface
    and are passed the same way."""
    values = [
        ctypes.c_void_p(None if x is None else x.data_ptr())
        if x is None or isinstance(x, torch.Tensor)
        else ctypes.c_int64(x)
        for x in arguments
    ]
    return getattr(library, f"balora_{name}")(*values)


def as_batch(a):
    """What the interface takes of a [batch, m, n] with neighbouring columns."""
    return a, TYPES[a.dtype], *a.shape, a.stride(0), a.stride(1)


def aligned(count, dtype):
    """Uninitialized memory, which is NaN here, on a boundary of 256 bytes."""
    size = torch.empty((), dtype=dtype).itemsize
    whole = torch.full((count * size + 256,), 0xFF, dtype=torch.uint8)
    start = -whole.data_ptr() % 256
    return whole[start : start + count * size].view(dtype)


def svd(library, a, rank, oversample=10, n_iter=2, seed=0, room=None):
    """(u, s, vh, squares) of a [batch, m, n]; room: bytes of the workspace, all that it wants if None."""
    batch, m, n = a.shape
    k = min(rank, m, n)
    width = min(k + oversample, m, n)
    u, s, vh = (
        aligned(batch * m * k, torch.float32),
        aligned(batch * k, torch.float32),
        aligned(batch * k * n, torch.float32),
    )
    squares = aligned(batch, torch.float64)
    if room is None:
        room = call(library, "workspace_bytes", TYPES[a.dtype], batch, m, n, width, 0)
    memory = aligned(room, torch.uint8)
    error = call(library, "randomized_svd", *as_batch(a), k, width, n_iter, seed, u, s, vh, squares, memory, room)
    assert error == 0
    return u.view(batch, m, k), s.view(batch, k), vh.view(batch, k, n), squares


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_philox_gives_the_published_numbers(library):
    """Known answers of Random123 for philox4x32-10."""
    out = torch.zeros(4, dtype=torch.int32)
    known = [
        ((0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((-1, -1, -1, -1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ]
    for (place, row, stream, seed), answer in known:
        call(library, "philox", place, row, stream, seed, out)
        assert " ".join(f"{x & 0xFFFFFFFF:08x}" for x in out.tolist()) == answer


def omega(library, n, rows, seed):
    """Ω [n, rows] from the bytes of the generator."""
    out, words = torch.zeros(n, rows, dtype=torch.float64), torch.zeros(4, dtype=torch.int32)
    for row in range(rows):
        for c in range(0, n, 8):
            call(library, "philox", c >> 3, row & ~8, 0, seed, words)
            for i in range(c, min(c + 8, n)):
                word = words[2 * (row >> 3 & 1) + (i >> 2 & 1)].item()
                out[i, row] = (2 * (word >> 8 * (i & 3) & 0xFF) - 255) / 256
    return out


# Whole tiles, parts of tiles, several tiles and slices, rows that do not begin on 16 bytes.
SHAPES = [(1, 32, 32), (2, 1, 1), (1, 9, 70), (1, 130, 600), (2, 33, 1025), (1, 520, 31), (3, 5, 257)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sketch(library, shape, dtype):
    a = draw(*shape, dtype=dtype)
    for rows in (16, 48):
        cut = call(library, "sketch", *as_batch(a), rows, 5, None, None, None)
        tiles, slices = cut >> 32, cut & 0xFFFFFFFF
        stride = -(-shape[1] // 64) * 64
        found = aligned(shape[0] * slices * rows * stride, torch.float32)
        sums, squares = (aligned(shape[0] * count, torch.float64) for count in (tiles * slices, 1))
        assert call(library, "sketch", *as_batch(a), rows, 5, found, sums, squares) == 0
        found = found.view(shape[0], slices, rows, stride).double().sum(1)
        exact = (a.double() @ omega(library, shape[2], rows, 5)).mT
        torch.testing.assert_close(found[..., : shape[1]], exact, rtol=0, atol=2e-6 * shape[2] ** 0.5)
        assert not found[..., shape[1] :].any()
        torch.testing.assert_close(squares, a.double().square().sum((1, 2)))


def parts_of(x, dtype, stride):
    """[parts, L, stride] as the tensor cores take rows of x [L, length], and what they are the parts of."""
    wide = torch.zeros(*x.shape[:-1], stride)
    wide[..., : x.shape[-1]] = x
    if dtype == torch.float32:
        return wide[:, None].contiguous(), x.double()
    scale = 4096 if dtype == torch.float16 else 1
    high = (wide * scale).to(dtype)
    low = (wide * scale - high.float()).to(dtype)
    return torch.stack([high, low], 1), (high.double() + low.double())[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_products(library, shape, transposed, dtype):
    whole = draw(shape[0], shape[1], shape[2] + 3, dtype=dtype)
    plain = whole[..., : shape[2]].contiguous()
    # Rows, matrices, or all of them that do not begin on 16 bytes.
    flat = draw(shape[0] * (shape[1] * 64 * 32 + 1) + 1, dtype=dtype)
    apart = flat.as_strided(shape, (shape[1] * 64 * 32 + 1, 64 * 32, 1))
    shifted = flat[1:].as_strided(shape, (shape[1] * 64 * 32, 64 * 32, 1))
    for a in (plain, whole[..., 2 : shape[2] + 2], apart, shifted):
        summed, kept = (a.shape[1], a.shape[2]) if transposed else (a.shape[2], a.shape[1])
        for rows in (32, 64):
            operand, exact_operand = parts_of(draw(shape[0], rows, summed, seed=1), dtype, -(-summed // 64) * 64)
            slices = call(library, "multiply", *as_batch(a), transposed, rows, None, None)
            stride = -(-kept // 64) * 64
            found = aligned(shape[0] * slices * rows * stride, torch.float32)
            assert call(library, "multiply", *as_batch(a), transposed, rows, operand, found) == 0
            found = found.view(shape[0], slices, rows, stride).double().sum(1)
            exact = exact_operand @ (a.double() if transposed else a.double().mT)
            size = 4096 if dtype == torch.float16 else 1
            torch.testing.assert_close(found[..., :kept], exact, rtol=0, atol=4e-6 * size * summed**0.5)
            assert not found[..., kept:].any()


@pytest.mark.parametrize("shape", [(1, 130, 64), (2, 200, 333), (1, 512, 70), (1, 449, 1300), (1, 300, 1)], ids=str)
def test_a_power_iteration_with_one_reading(library, shape):
    batch, m, n = shape
    whole = draw(batch, m, -(-n // 8) * 8 + 8, dtype=torch.bfloat16)
    whole[..., n:] = torch.nan  # not to be read
    a = whole[..., :n]
    stride = -(-m // 64) * 64
    for rows in (16, 32):
        operand, exact_operand = parts_of(draw(batch, rows, m, seed=1) / m**0.5, torch.bfloat16, stride)
        slices = call(library, "iterate", *as_batch(a), rows, None, None, None)
        assert slices >= 1
        found = aligned(batch * slices * rows * stride, torch.float32)
        squares = a.double().square().sum((1, 2))
        assert call(library, "iterate", *as_batch(a), rows, operand, squares, found) == 0
        found = found.view(batch, slices, rows, stride).double().sum(1)
        scale = 2 ** -(squares.log2() / 2).round()
        exact = scale[:, None, None] * (exact_operand @ a.double() @ a.double().mT)
        assert (found[..., :m] - exact).abs().max() < 2e-5 * exact.abs().max()
        assert not found[..., m:].any()


def test_where_one_reading_does_not_do(library):
    a = draw(1, 200, 80, dtype=torch.bfloat16)
    assert call(library, "iterate", *as_batch(a), 32, None, None, None) > 0
    for other in (a.half(), a.float(), a[..., 1:], a[:, :128], draw(1, 513, 80, dtype=torch.bfloat16)):
        assert call(library, "iterate", *as_batch(other), 32, None, None, None) == 0
    assert call(library, "iterate", *as_batch(a), 48, None, None, None) == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64])
def test_two_passes_make_any_panel_orthonormal(library, width, dtype):
    length, rows = 150, -(-width // 16) * 16
    panels = draw(4, width, length)
    panels[1] *= torch.logspace(0, -12, width)[:, None]  # of very different lengths
    panels[2, width // 2 :] = panels[2, :1] + 1e-7 * panels[2, width // 2 :]  # dependent, up to rounding
    panels[3] = 0
    panel = torch.zeros(4, rows, 192)
    panel[:, :width, :length] = panels
    grams = aligned(4 * 2 * rows * rows, torch.float64)
    lower, inverse = aligned(4 * width**2, torch.float64), aligned(4 * width**2, torch.float64)
    operand = aligned(4 * 2 * rows * 192, dtype)
    error = call(
        library, "orthonormalize", panel, 4, rows, width, length, 2, grams, lower, inverse, TYPES[dtype], operand
    )
    assert error == 0
    factor, first = lower.view(4, width, width).clone(), panel[:, :width, :length].clone()
    call(library, "orthonormalize", panel, 4, rows, width, length, 2, grams, lower, inverse, TYPES[dtype], operand)
    q = panel[:, :width, :length].double()
    assert (q @ q.mT - torch.eye(width)).abs().max() < 1e-6
    assert not panel[:, width:].any()
    assert not panel[..., length:].any()
    # The factors multiply to what was there before.
    again = factor @ first.double()
    size = panels.double().norm(dim=(1, 2), keepdim=True)
    assert ((again - panels).abs() <= 2e-6 * size).all()
    if dtype != torch.float32:
        parts = operand.view(4, 2, rows, 192).double().sum(1) / (4096 if dtype == torch.float16 else 1)
        assert (parts - panel).abs().max() < 2.0**-17


@pytest.mark.parametrize("width", [1, 2, 5, 32, 63, 64])
def test_jacobi(library, width):
    g = torch.Generator().manual_seed(0)
    first = torch.randn(4, width, width, generator=g, dtype=torch.float64).tril()
    second = torch.randn(4, width, width, generator=g, dtype=torch.float64).tril() * 0.1
    second.diagonal(dim1=1, dim2=2)[:] = 1
    first[1] *= torch.logspace(0, -20, width, dtype=torch.float64)  # columns of very different lengths
    first[2, :, width // 2 :] = 0
    first[3] = 0
    s = aligned(4 * width, torch.float32)
    left, right = aligned(4 * width**2, torch.float64), aligned(4 * width**2, torch.float64)
    assert call(library, "jacobi", first, second, 4, width, width, s, left, right) == 0
    s, left, right = s.view(4, width), left.view(4, width, width), right.view(4, width, width)
    c = first @ second
    exact = torch.linalg.svdvals(c)
    assert ((s - exact).abs() <= 1e-7 * exact[:, :1]).all()
    assert not s[3].any()
    assert (s[:, :-1] >= s[:, 1:]).all()
    for rows in (left, right):
        assert (rows @ rows.mT - torch.eye(width)).abs().max() < 200 * torch.finfo(torch.float64).eps
    assert (left.mT @ (s.double()[..., None] * right) - c).abs().max() < 1e-6 * exact.max()


def small_svd(library, c):
    """(s, rows of left vectors, rows of right vectors) of c [batch, width, width]."""
    batch, width, _ = c.shape
    s, left, right, memory = (
        aligned(batch * count, torch.float64) for count in (width, width**2, width**2, 2 * width * (width | 1))
    )
    assert call(library, "small_svd", c, batch, width, s, left, right, memory) == 0
    return s.view(batch, width), left.view(batch, width, width), right.view(batch, width, width)


def assert_small_svd(c, s, left, right):
    width = c.shape[1]
    exact = torch.linalg.svdvals(c)
    assert ((s - exact).abs() <= 1e-14 * width * exact[:, :1]).all()
    for rows in (left, right):
        assert (rows @ rows.mT - torch.eye(width)).abs().max() < 200 * torch.finfo(torch.float64).eps
    assert ((left.mT @ (s[..., None] * right) - c).abs() <= 1e-14 * width * exact[:, :1, None]).all()


@pytest.mark.parametrize("width", [1, 65, 138, 256])
def test_small_svd(library, width):
    c = torch.randn(5, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c[1] = c[1, :, :3] @ c[1, :3] if width > 3 else c[1]  # of rank 3, up to rounding
    c[2, :, width // 2 :] = 0
    c[3] = 0
    c[4] *= torch.logspace(0, -40, width, dtype=torch.float64)
    s, left, right = small_svd(library, c)
    assert_small_svd(c, s, left, right)
    assert width == 1 or not s[3].any()
    for size in (1e200, 1e-200) if width < 256 else ():  # which takes minutes for the largest
        s, left, right = small_svd(library, size * c)
        assert_small_svd(c, s / size, left, right)
    assert call(library, "small_svd", c, 5, 257, None, None, None, None) != 0


def test_small_matrices_of_whole_numbers(library):
    """Rotations cancel their columns to exact zeros."""
    g = torch.Generator().manual_seed(0)
    for width in (2, 3, 5, 8):
        rank = torch.randint(1, width, (), generator=g).item()
        left = torch.randint(-2, 3, (100, width, rank), generator=g).double()
        c = left @ torch.randint(-2, 3, (100, rank, width), generator=g).double()
        assert_small_svd(c, *small_svd(library, c))
    known = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [2.0, 4.0]]], dtype=torch.float64)
    assert_small_svd(known, *small_svd(library, known))


# float32 holds neither of these two
FLOAT_CASES = [name for name in CASES if name not in ("huge", "tiny")]


@pytest.mark.parametrize("case", FLOAT_CASES)
def test_singular_values_vectors_and_orthonormality(library, case):
    a, rank, _ = CASES[case]
    a = a.float()[None]
    u, s, vh, squares = svd(library, a, rank)
    exact = torch.linalg.svdvals(a.double())[:, : s.shape[1]]
    size = exact.max()
    assert (s - exact).abs().max() <= 1e-6 * size
    assert (s[:, :-1] >= s[:, 1:]).all()
    assert_orthonormal(u[0], vh[0])
    assert (a @ vh.mT - u * s[:, None]).abs().max() <= 1e-5 * size
    torch.testing.assert_close(squares, a.double().square().sum((1, 2)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rank", "oversample"), [(5, 11), (10, 10), (10, 30)])  # panels of 16, 32 and 48 columns
def test_every_type(library, rank, oversample, dtype):
    for m, n in ((150, 90), (70, 333)):  # of bf16 the first one is iterated with one reading, up to 32 columns
        a = matrix(m, n, decay(70, 1.0)).to(dtype)[None]
        u, s, vh, squares = svd(library, a, rank, oversample, n_iter=4)
        exact = torch.linalg.svdvals(a.double())[:, :rank]
        assert (s - exact).abs().max() < 1e-6 * exact.max()
        assert_orthonormal(u[0], vh[0])
        torch.testing.assert_close(squares, a.double().square().sum((1, 2)))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 40, 63, 64])
def test_every_width(library, width):
    a = matrix(80, 70, decay(70, 1.0)).float()[None]
    for k in {1, width}:
        u, s, vh, _ = svd(library, a, k, oversample=width - k, n_iter=3)
        peer = F.randomized_svd(a, k, oversample=width - k, n_iter=3, impl="torch")[1]
        assert s.norm() > 0.95 * peer.norm()
        assert_orthonormal(u[0], vh[0])
        torch.testing.assert_close(u.mT @ a @ vh.mT, torch.diag_embed(s), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [120, 200])  # of bf16 the second one is iterated with one reading
def test_entries_at_the_ends_of_float32(library, m, dtype):
    a = matrix(m, 80, decay(80, 2.0)).to(dtype)[None]
    a = a / a.abs().max()
    s = svd(library, a, 5)[1]
    for power in (122, 60, -60, -116):
        u, scaled, vh, _ = svd(library, (a.float() * 2.0**power).to(dtype), 5)
        torch.testing.assert_close(scaled * 2.0**-power, s, rtol=1e-6, atol=0)
        assert_orthonormal(u[0], vh[0])


def test_a_batch_is_its_matrices_in_any_memory(library):
    a = torch.stack([matrix(70, 40, decay(40, p), seed=i).float() for i, p in enumerate((0.2, 1.0, 3.0, 1.0, 2.0))])
    a[3] = 0
    whole = svd(library, a, 4)
    again = svd(library, a, 4)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    least = call(library, "workspace_bytes", 0, 5, 70, 40, 14, 1)
    assert least < call(library, "workspace_bytes", 0, 5, 70, 40, 14, 0)
    for room in (least, 5 * least // 2):
        for found, exact in zip(svd(library, a, 4, room=room), whole, strict=True):
            torch.testing.assert_close(found[:3], exact[:3], rtol=1e-5, atol=1e-6)
        u, _, vh, _ = svd(library, a, 4, room=room)
        assert_orthonormal(u[3], vh[3])
    for i in range(5):
        torch.testing.assert_close(svd(library, a[i : i + 1], 4)[1][0], whole[1][i])
    for seed in (8, 2**40):
        assert not torch.equal(svd(library, a, 4, seed=seed)[1], whole[1])
    strided = torch.zeros(5, 71, 45)
    strided[:, :70, :40] = a
    torch.testing.assert_close(svd(library, strided[:, :70, :40], 4)[1], whole[1])


def test_two_thousand_matrices(library):
    a = draw(2_000, 3, 2)
    _, s, _, squares = svd(library, a, 2, n_iter=0)
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(a.double()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares, a.double().square().sum((1, 2)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_stays_in_its_matrix(library, dtype):
    a = matrix(40, 70, decay(40, 1.0)).to(dtype).repeat(4, 1, 1)
    a[0, 2, 3], a[2, 39, 69], a[3, 0, 0] = torch.nan, torch.inf, -torch.inf
    for t in svd(library, a, 3)[:3]:
        assert t[[0, 2, 3]].isnan().all()
        assert t[1].isfinite().all()


SPECTRA = {
    "decaying": lambda: matrix(100, 160, decay(100, 1.0)).float(),
    "flat": lambda: draw(100, 160),
    "clustered": lambda: matrix(90, 70, torch.tensor([5.0] * 6 + [1.0] * 6 + [0.1] * 50).double()).float(),
    "rank-deficient": lambda: matrix(90, 70, decay(5, 1.0)).float(),
}


@pytest.mark.parametrize("spectrum", [*SPECTRA, "real"])
def test_as_accurate_as_svd_lowrank_at_the_same_cost(library, spectrum, request):
    """σ and the angle between the subspaces, against a full decomposition in float64; means over seeds."""
    if spectrum == "real":
        from safetensors.torch import load_file

        file = request.getfixturevalue("stories15m") / "model.safetensors"
        a = load_file(file)["model.layers.0.self_attn.q_proj.weight"]
    else:
        a = SPECTRA[spectrum]()
    exact_u, exact, exact_vh = torch.linalg.svd(a.double(), full_matrices=False)
    k = {"clustered": 6, "rank-deficient": 5}.get(spectrum, 8)  # among equal values every direction is as good
    errors = torch.zeros(2, 2, dtype=torch.float64)  # [ours or torch's, of σ or of the subspace]
    for seed in range(3):
        u, s, vh, _ = svd(library, a[None], 8, n_iter=2, seed=seed)
        assert_orthonormal(u[0], vh[0])
        torch.manual_seed(seed)
        peer_u, peer, peer_v = torch.svd_lowrank(a.float(), q=18, niter=2)
        for who, (values, *bases) in enumerate(((s[0], u[0], vh[0].mT), (peer, peer_u, peer_v))):
            sines = []
            for basis, exact_basis in zip(bases, (exact_u[:, :k], exact_vh[:k].mT), strict=True):
                found = basis[:, :k].double()
                sines.append(torch.linalg.matrix_norm(found - exact_basis @ (exact_basis.mT @ found), 2))
            errors[who] += torch.stack([(values[:8] - exact[:8]).abs().max() / exact[0], max(sines)]) / 3
    (ours, our_sine), (peers, peer_sine) = errors.tolist()
    print(f"{spectrum}: sigma {ours:.1e} (svd_lowrank {peers:.1e}), sine {our_sine:.1e} ({peer_sine:.1e})")
    assert ours <= 1.5 * peers + 1e-6
    assert our_sine <= 1.5 * peer_sine + 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (70, 300, 10), (33, 129, 3)])
def test_low_rank_update(library, m, n, k, dtype):
    z = draw(2, m, n + 1, dtype=dtype)[..., 1:]
    u, weights, vh = draw(2, m, k, seed=1), draw(2, k, seed=2), draw(2, k, n, seed=3)
    multiple = torch.tensor([0.5, -2.0])
    out = aligned(2 * m * n, dtype)
    assert call(library, "low_rank_update", *as_batch(z), k, u, weights, vh, multiple, out) == 0
    exact = (u.double() * weights.double()[:, None]) @ vh.double()
    exact += multiple.double()[:, None, None] * z.double()
    eps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert ((out.view(2, m, n).double() - exact).abs() <= eps * exact.abs().max()).all()


def test_what_does_not_fit_is_refused(library):
    a = draw(1, 80, 90)
    for k, width, n_iter, room in (
        (0, 5, 1, 10**8),
        (6, 5, 1, 10**8),
        (5, 65, 1, 10**8),
        (5, 9, -1, 10**8),
        (5, 9, 1, 99),
    ):
        memory, out = aligned(16, torch.uint8), aligned(80, torch.float32)
        assert (
            call(library, "randomized_svd", *as_batch(a), k, width, n_iter, 0, out, out, out, None, memory, room) != 0
        )
