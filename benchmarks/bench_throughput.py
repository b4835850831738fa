"""Training throughput beside cryoDRGN 4.3.1: same networks, same machine, alternating in one run.

    python benchmarks/bench_throughput.py --peer PATH/TO/PYTHON [--box 64] [--dims 256 1024] [--batches 8 32 128]

Each line is the best of several alternating repetitions, in images per second of wall time and, because machines are shared, per
CPU second. Both programs do one whole step on random images: centring, CTF, encoder, decoder, loss, backward, Adam.
The peer runs at batch 8 in fp32, as its command line does without a GPU. Without --peer only our side is measured.
"""

import argparse
import subprocess
import time
from pathlib import Path

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with cryodrgn 4.3.1")
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training does
    print(f"D={args.box}, {args.threads} threads, bf16 matrix units: {supports_bf16('cpu')}")
    print("network  program   batch  precision  images/s  per CPU s  ratio (wall)  ratio (CPU)")
    for dim in args.dims:
        n_images = max(24, 40_000 // dim)
        cases = [("recon_nb", b, p) for b in args.batches for p in ("auto", False)]
        best: dict[tuple, tuple[float, float]] = {}
        for _ in range(args.repeats):
            if args.peer:
                measured = measure_peer(args.peer, args.box, dim, steps=max(2, n_images // 8), threads=args.threads)
                key = ("cryodrgn", 8, False)
                best[key] = tuple(map(max, zip(measured, best.get(key, (0, 0)))))
            for key in cases:
                measured = measure_ours(args.box, dim, key[1], steps=max(2, n_images // key[1]), bf16=key[2])
                best[key] = tuple(map(max, zip(measured, best.get(key, (0, 0)))))
        reference = best.get(("cryodrgn", 8, False), (float("nan"),) * 2)
        for (program, batch, precision), (wall, cpu) in best.items():
            name = "fp32" if precision is False else "bf16"
            print(f"{dim:5d}x3  {program:9s} {batch:5d}  {name:9s} {wall:9.1f} {cpu:10.1f} {wall / reference[0]:13.2f} {cpu / reference[1]:12.2f}", flush=True)


if __name__ == "__main__":
    main()
