"""Training throughput beside cryoDRGN 4.3.1: same networks, same machine, alternating in one run.

    python benchmarks/bench_throughput.py --peer PATH/TO/PYTHON [--box 64] [--dims 256 1024] [--batches 8 32 128] [-o OUT.csv]

Each line is the best of several alternating repetitions, in images per second of wall time and, because machines are shared, per
CPU second. Both programs do one whole step on random images: centring, CTF, encoder, decoder, loss, backward, Adam.
The peer runs at batch 8 in fp32, as its command line does without a GPU. Without --peer only our side is measured.
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


def measure_ours(box: int, dim: int, batch_size: int, *, steps: int, bf16: bool | str) -> tuple[float, float]:
    """Return images per second of wall time and per CPU second."""
    lattice = Lattice(box, 3.0)
    model = build_model(lattice, zdim=8, encoder_dim=dim, decoder_dim=dim, bf16=bf16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    batch = make_random_batch(lattice, batch_size)

    def step() -> None:
        terms = model(batch, beta=0.125, noise=torch.randn(batch_size, 8))
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    n = batch_size * steps
    return n / (time.perf_counter() - start), n / (time.process_time() - cpu)


def measure_peer(python: str, box: int, dim: int, *, steps: int, threads: int) -> tuple[float, float]:
    """Return the same of cryoDRGN at batch 8."""
    script = Path(__file__).with_name("peer_cryodrgn.py")
    command = [python, script, "throughput", "--box", box, "--dim", dim, "--batch", 8, "--steps", steps, "--threads", threads]
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
    return [{"network": f"{dim}x3", "program": program, "batch": batch, "precision": "bf16" if precision else "fp32", "images/s": value[0],
             "images/CPU s": value[1], "ratio (wall)": value[0] / wall, "ratio (CPU)": value[1] / cpu} for (program, batch, precision), value in best.items()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with cryodrgn 4.3.1")
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", help="csv to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training does
    print(f"D={args.box}, {args.threads} threads, bf16 matrix units: {supports_bf16('cpu')}")
    rows = []
    for dim in args.dims:
        rows += compare(dim, args)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))
    if args.output:
        pd.DataFrame(rows).round(2).to_csv(args.output, index=False)


if __name__ == "__main__":
    main()
