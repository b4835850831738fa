"""Time of the subspace kernels: an image's products with a basis, its share of the moments, a voxel's solution.

    python benchmarks/bench_kernels.py [--boxes 32 64 128] [--components 3 5 9 17] [--images 512] [-o OUT.csv]

Random images at random poses, all coefficients, one thread. CPU milliseconds, the best of several alternating repetitions, since
machines are shared: for each image (project, accumulate) or for 1,000 voxels (solve). The torch version runs on fewer images.
Every line says by how much the two versions differ, as a share of the largest value: no speed without the right answer.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from recon_nb.core import make_generator
from recon_nb.fourier import Lattice
from recon_nb.kernels import Moments, order_rows, project_basis, solve_basis
from recon_nb.so3 import sample_rotations


def make_images(box: int, n: int) -> tuple[torch.Tensor, ...]:
    """Return k, rotations, transfer and images of pure noise."""
    lattice, generator = Lattice(box), make_generator(0, "kernels")
    k = lattice.k[order_rows(lattice.k)].float()
    images = torch.randn(n, len(k), dtype=torch.complex64, generator=generator)
    return k, sample_rotations(n, generator).float(), torch.randn(n, len(k), generator=generator), images


def measure(functions: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Return the least CPU seconds of each function, called in turn."""
    best = {}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if repetition:  # the first call compiles
                best[name] = min(time.process_time() - start, best.get(name, float("inf")))
    return best


def compare(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def bench(box: int, n_components: int, n_images: int, repetitions: int) -> list[dict]:
    """Return the lines of one box and number of components."""
    n_few = max(4, n_images // 32)
    k, *images = make_images(box, n_images)
    few = [tensor[:n_few] for tensor in images]
    generator = make_generator(1, "kernels")
    first = torch.randn(n_images, n_components, generator=generator)
    second = first[:, :, None] * first[:, None] + torch.eye(n_components)
    moments = Moments.zeros(box, n_components)
    basis = torch.randn(len(moments.table), 2 * n_components, generator=generator)

    def project(part: list, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return project_basis(basis, k, part[0], part[1], images=part[2], box=box, compiled=compiled)

    def accumulate(into: Moments, part: list, compiled: bool) -> torch.Tensor:
        return into.add(k, *part, first=first[: len(part[0])], second=second[: len(part[0])], compiled=compiled).table

    scratch = Moments.zeros(box, n_components)
    times = measure({
        "project": lambda: project(images, True), "project torch": lambda: project(few, False),
        "accumulate": lambda: accumulate(moments, images, True), "accumulate torch": lambda: accumulate(scratch, few, False),
    }, repetitions)  # fmt: skip
    ridge = torch.ones(1, n_components)
    times |= measure({name: lambda compiled=name == "solve": solve_basis(moments, ridge, box / 2, compiled=compiled)
                      for name in ("solve", "solve torch")}, 2)  # fmt: skip
    new = [accumulate(Moments.zeros(box, n_components), few, compiled) for compiled in (True, False)]
    solved = [solve_basis(moments, ridge, box / 2, compiled=compiled) for compiled in (True, False)]
    differences = {"project": compare(project(few, True)[0], project(few, False)[0]), "accumulate": compare(*new), "solve": compare(*solved)}
    counts = {"project": n_images, "accumulate": n_images, "solve": int((solved[0][:, 0] != 0).sum()) / 1000}
    few_counts = {**counts, "project": n_few, "accumulate": n_few}
    return [{"step": step, "box": box, "n_components": n_components, "n_coefficients": len(k), "unit": "ms/1000 voxels" if step == "solve" else "ms/image",
             "compiled": round(times[step] / counts[step] * 1e3, 4), "torch": round(times[f"{step} torch"] / few_counts[step] * 1e3, 4),
             "difference": f"{differences[step]:.1e}", "moments_mb": round(moments.table.nbytes / 2**20, 1)} for step in counts]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--components", type=int, nargs="+", default=[3, 5, 9, 17])
    parser.add_argument("--images", type=int, default=512, help="images a call")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results/kernels.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for box in args.boxes:
        for n_components in args.components:
            if Moments.zeros(1, n_components).table.shape[1] * box**3 * 2 > 300 * 2**20:
                continue  # two tables of more than 300 MB and torch's copies would fill a small machine
            rows += bench(box, n_components, args.images if box < 128 else args.images // 2, args.repetitions)
            print(pd.DataFrame(rows[-3:]).to_string(index=False, header=len(rows) == 3), flush=True)
    pd.DataFrame(rows).to_csv(args.output, index=False)


if __name__ == "__main__":
    main()
