"""Training throughput beside cryoDRGN 4.3.1: same networks, same machine, alternating in one run.

    python benchmarks/bench_throughput.py --peer PATH/TO/PYTHON [--box 64] [--dims 256 1024] [--batches 8 32] [--threads 1] [-o OUT.csv]

Each line is the best of several alternating repetitions, in images per second of wall time and, because machines are shared, per
CPU second. Both programs do one whole step on random images: centring, CTF, encoder, decoder, loss, backward, Adam.
The peer runs at batch 8 in fp32, as its command line does without a GPU. Without --peer only our side is measured.

"peak" is the share of the rate that one large matrix product of that precision reaches on the same threads (CPU seconds); it counts the products of the
step (three per layer: forward, gradient of the weights, gradient of the input) and nothing else. What bf16 does to quality is in bf16_quality.py, parity with cryoDRGN in parity_cryodrgn.py.
"""

import argparse
import subprocess
import time
from pathlib import Path

import pandas as pd
import torch

from recon_nb.core import Batch, CTFParams, Poses, keep_freed_memory, make_generator, supports_bf16
from recon_nb.fourier import Lattice
from recon_nb.models import build_model
from recon_nb.so3 import sample_rotations


def make_random_batch(lattice: Lattice, n: int) -> Batch:
    """Return n images of pure noise with poses, shifts and CTF."""
    generator = make_generator(0, "throughput")
    images = torch.randn(n, 1, lattice.n_coefficients, dtype=torch.complex64, generator=generator)
    poses = Poses(sample_rotations(n, generator), torch.randn(n, 2, generator=generator))
    ctf = CTFParams.from_values(n, defocus_u=15000.0)
    return Batch(images, poses[:, None], ctf[:, None], None, torch.ones(n, 1, dtype=torch.bool), torch.arange(n))


def count_operations(box: int, dim: int, n_layers: int = 3) -> float:
    """Return the floating-point operations that the matrix products of a step take per image, additions and multiplications counted each."""
    m = Lattice(box, 1.0).n_coefficients
    decoder = 3 * n_layers * dim**2 + 2 * 3 * box * dim + 3 * 2 * dim  # the encoding needs no gradient
    encoder = 3 * n_layers * dim**2 + 2 * 2 * m * dim + 3 * 16 * dim
    return 2.0 * (m * decoder + encoder)


def measure_peak(dtype: torch.dtype, size: int = 2048, device: str = "cpu", repeats: int = 5) -> float:
    """Return the operations per second (per CPU second on a CPU) of one large matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    on_gpu, best = torch.device(device).type == "cuda", 0.0
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(repeats + 1):
        start = clock()
        for _ in range(20 if on_gpu else 1):
            a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2.0 * size**3 * (20 if on_gpu else 1) / (clock() - start))
    return best


def measure_ours(box: int, dim: int, batch_size: int, *, steps: int, bf16: bool | str, device: str = "cpu", compiled: str | None = None) -> tuple[float, float]:
    """Return images per second of wall time and per CPU second; `compiled` is a mode of torch.compile for the decoder."""
    lattice = Lattice(box, 3.0)
    model = build_model(lattice, zdim=8, encoder_dim=dim, decoder_dim=dim, bf16=bf16).to(device)
    if compiled:
        model.decoder.compile_network(compiled)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    batch = make_random_batch(lattice, batch_size).to(device)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def step() -> None:
        terms = model(batch, beta=0.125, noise=torch.randn(batch_size, 8, device=device))
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(4 if compiled else 1):  # compiling, and recording CUDA graphs, takes the first steps
        step()
    wait()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    wait()
    n = batch_size * steps
    return n / (time.perf_counter() - start), n / (time.process_time() - cpu)


def measure_peer(python: str, box: int, dim: int, *, steps: int, threads: int, device: str = "cpu", batch_size: int = 8) -> tuple[float, float]:
    """Return the same of cryoDRGN."""
    script = Path(__file__).with_name("peer_cryodrgn.py")
    command = [python, script, "throughput", "--box", box, "--dim", dim, "--batch", batch_size, "--steps", steps, "--threads", threads, "--device", device]
    wall, cpu = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(wall), float(cpu)


def compare(dim: int, args: argparse.Namespace) -> list[dict]:
    """Return the rows of one width, the peer's first."""
    n_images = max(24, 40_000 // dim)
    cases = [("recon_nb", b, p) for b in args.batches for p in ("auto", False)]
    best: dict[tuple, tuple[float, float]] = {}
    for _ in range(args.repeats):
        if args.peer:
            measured = measure_peer(args.peer, args.box, dim, steps=max(2, n_images // 8), threads=args.threads)
            best["cryodrgn 4.3.1", 8, False] = tuple(map(max, zip(measured, best.get(("cryodrgn 4.3.1", 8, False), (0, 0)))))
        for case in cases:
            measured = measure_ours(args.box, dim, case[1], steps=max(2, n_images // case[1]), bf16=case[2])
            best[case] = tuple(map(max, zip(measured, best.get(case, (0, 0)))))
    wall, cpu = best.get(("cryodrgn 4.3.1", 8, False), (float("nan"),) * 2)
    peak = {True: measure_peak(torch.bfloat16), False: measure_peak(torch.float32)}
    rows = []
    for (program, batch, precision), value in best.items():
        low = bool(precision) and supports_bf16("cpu")
        rows.append({"network": f"{dim}x3", "program": program, "batch": batch, "precision": "bf16" if low else "fp32", "ms/image (CPU)": 1e3 / value[1],
                     "images/s": value[0], "images/CPU s": value[1], "ratio (wall)": value[0] / wall, "ratio (CPU)": value[1] / cpu,
                     "peak": count_operations(args.box, dim) * value[1] / peak[low] if program == "recon_nb" else float("nan")})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with cryodrgn 4.3.1")
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", action="store_true", help="others compute on this machine: leave out wall times, which then mean nothing")
    parser.add_argument("-o", "--output", help="csv to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training does
    print(f"D={args.box}, {args.threads} threads, bf16 matrix units: {supports_bf16('cpu')}")
    rows = []
    for dim in args.dims:
        rows += compare(dim, args)
    table = pd.DataFrame(rows).drop(columns=["images/s", "ratio (wall)"] if args.shared else [])
    print(table.to_string(index=False, float_format="%.2f"))
    if args.output:
        table.round(2).to_csv(args.output, index=False)


if __name__ == "__main__":
    main()
