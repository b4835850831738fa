"""What the subspace method costs: CPU seconds and peak memory against images, box and rank.

    python benchmarks/scaling.py --folder bench [--parts images box rank] [--n 10000 50000 200000] [-o benchmarks/results/scaling.csv]

The folder holds S2 Uniform as s2u_32, s2u_64 and s2u_128 (make_data.py --set s2_uniform --box 64 --n 200000 -o bench/s2u_64); a box that is not there
is left out. A smaller set is the first particles of a larger one, with a particle file and a cache of its own.

| part | images | box | rank |
|---|---|---|---|
| images | 10,000, 50,000, 200,000 | 64 | 8 |
| box | 3,000 | 32, 64, 128 | 8 |
| rank | 5,000 | 64 | 4, 8, 16 |

Two fresh processes each, one thread: the first reads the particle file and writes the cache of coefficients; the second reads images from this cache as it goes, none
kept in memory, and runs starts.fit_subspace (eight EM passes, a network latent of dimension 2, one more M-step; compiled kernels warm). For both: CPU seconds
(without imports), and the peak of the process's memory; the second also says what the process takes after imports, what the tables of the particle file add, and what the fit adds to
both. kNN is measured on 10,000 particles, so that larger sets do not gain by neighbours alone. Lines are appended as they come, and what the file has
already is not measured again.
"""

import argparse
import csv
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from bench_cache import get_peak

from recon_nb.caches import arrange_storage, open_cache
from recon_nb.core import keep_freed_memory
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.latent import compute_knn_correlation
from recon_nb.starts import fit_subspace

KEYS = ("part", "images", "box", "rank")
FOUND = ("write_s", "write_wall_s", "write_mb", "cache_mb", "table_s", "fit_s", "fit_wall_s", "import_mb", "table_mb", "fit_mb", "knn", "evidence")


def take_first(folder: Path, n: int, out: Path) -> Path:
    "Write the particle file of the first images of a set; images stay where they are."
    lines = (folder / "particles.star").read_text().splitlines(keepends=True)
    is_row = ["@" in line for line in lines]
    if sum(is_row) < n:
        raise SystemExit(f"{folder} holds {sum(is_row)} images; {n} are asked for.")
    kept = itertools.accumulate(is_row)
    star = out / "particles.star"
    star.write_text("".join(line for line, row, count in zip(lines, is_row, kept, strict=True) if not row or count <= n))
    return star


def open_set(options: argparse.Namespace) -> ParticleDataset:
    "Return the data set, its images on the disk."
    return ParticleDataset(load_stack(options.star, datadir=options.images), in_memory=False)


def write(options: argparse.Namespace) -> dict[str, float]:
    "Measure the writing of the cache, in this process."
    start, wall = time.process_time(), time.perf_counter()
    source = open_cache(open_set(options).source, options.star.parent / "caches")
    return {"write_s": time.process_time() - start, "write_wall_s": time.perf_counter() - wall, "write_mb": get_peak(), "cache_mb": source.path.stat().st_size / 2**20}


def fit(options: argparse.Namespace) -> dict[str, float]:
    "Measure the fit from the cache, in this process."
    import_mb, start, wall = get_peak(), time.process_time(), time.perf_counter()
    dataset = arrange_storage(open_set(options), cache=options.star.parent / "caches", in_memory=False, buffer_gb=0)
    table_mb, opened = get_peak(), time.process_time()
    found = fit_subspace(dataset, rank=options.rank, latent=2)
    seconds = {"table_s": opened - start, "fit_s": time.process_time() - opened, "fit_wall_s": time.perf_counter() - wall}
    memory = {"import_mb": import_mb, "table_mb": table_mb, "fit_mb": get_peak()}
    truth = pd.read_csv(options.images / "truth.csv")["label"].to_numpy()[: dataset.n_particles]
    every = max(1, dataset.n_particles // 10_000)
    return {**seconds, **memory, "knn": compute_knn_correlation(found.mu[::every].numpy(), truth[::every]), "evidence": found.evidence[-1]}


def measure(folder: Path, case: dict) -> dict[str, float]:
    "Measure both in processes of their own."
    with tempfile.TemporaryDirectory(dir=folder) as made:
        star, found = take_first(folder, case["images"], Path(made)), {}
        for step in ("write", "fit"):
            command = [sys.executable, __file__, "--step", step, "--star", str(star), "--images", str(folder), "--rank", str(case["rank"])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found |= json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 4) for name, value in found.items()}


def list_cases(options: argparse.Namespace) -> list[dict]:
    "Return what to measure."
    cases = {
        "images": [{"images": n, "box": 64, "rank": 8} for n in options.n],
        "box": [{"images": 3000, "box": box, "rank": 8} for box in (32, 64, 128) if (options.folder / f"s2u_{box}").exists()],
        "rank": [{"images": 5000, "box": 64, "rank": rank} for rank in (4, 8, 16)],
    }
    return [{"part": part, **case} for part in options.parts for case in cases[part]]


def parse_arguments() -> argparse.Namespace:
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the sets s2u_32, s2u_64, s2u_128")
    parser.add_argument("--parts", nargs="+", choices=("images", "box", "rank"), default=("images", "box", "rank"))
    parser.add_argument("--n", type=int, nargs="+", default=(10_000, 50_000, 200_000), help="of part images")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/scaling.csv"))
    for name, kind in (("--step", str), ("--star", Path), ("--images", Path), ("--rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    logging.getLogger("recon_nb").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.step:
        print(json.dumps({"write": write, "fit": fit}[options.step](options)))
        return
    done = set(pd.read_csv(options.out)[list(KEYS)].itertuples(index=False, name=None)) if options.out.exists() else set()
    for case in list_cases(options):
        if tuple(case[name] for name in KEYS) in done:
            continue
        row, fresh = {**case, **measure(options.folder / f"s2u_{case['box']}", case)}, not options.out.exists()
        with open(options.out, "a", newline="") as file:
            writer = csv.DictWriter(file, (*KEYS, *FOUND), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
    print(pd.read_csv(options.out).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
