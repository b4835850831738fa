"""How well poses can be known at all: images placed and refined in the true map, without noise, beside what `abinit_search.py` asks for.

    python benchmarks/pose_floor.py [--n 2000] [-o benchmarks/results/pose_floor.csv]

RECON_NB_DATA names the folder of test data. The images are those of the cases of `abinit_search.py` (seed 0, the first N of them). `local` starts at the true poses: its median error is what
the noise of one image leaves of five numbers. `global` searches a grid of 10 degrees, refines 40 candidates of each image and takes the best: its share within 10 degrees is what a search can
reach. Streptavidin is scored modulo its D2 operators.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
from abinit_search import CASES, find_operators, simulate_case

from recon_nb.core import Poses, keep_freed_memory
from recon_nb.datasets import ParticleDataset
from recon_nb.imaging import volume_to_grid
from recon_nb.refinement import refine_candidates, refine_poses
from recon_nb.search import WhitenedImages, find_poses, list_shifts
from recon_nb.so3 import make_rotation_grid, rotation_distance

FIELDS = ("case", "map", "box", "snr", "n", "local_median", "local_shift_px", "global_median", "global_within_10")


def find_errors(rot: torch.Tensor, truth: torch.Tensor, operators: torch.Tensor) -> torch.Tensor:
    "Return the distances in degrees to the nearest equivalent pose."
    return rotation_distance(truth[:, None] @ operators, rot[:, None]).amin(1)


def measure_floor(case: dict, n: int, data: Path, streptavidin: Path) -> dict:
    "Place and refine images in the map that they were made of."
    simulated = simulate_case(case, data, streptavidin)
    volume, dataset = simulated.volumes[0], ParticleDataset(simulated.stack, window_radius=1.5)
    images, rows, width = WhitenedImages(dataset), torch.arange(n), volume.box * volume.pixel_size
    grid, edge = volume_to_grid(volume.data / dataset.scale, 2), volume.box / 2 - 1
    truth = Poses(simulated.poses.rot[:n], simulated.poses.shift[:n] / width)
    operators = find_operators(volume) if case["map"] == "streptavidin" else torch.eye(3)[None]
    local, _ = refine_poses(images, rows, truth, grid=grid, radius=edge, n_steps=6)
    candidates, _ = find_poses(images, rows, grid, make_rotation_grid(10.0), radius=12.0, shifts=list_shifts(1 / 32), shift_sigma=0.04, n_best=40)
    placed, _ = refine_candidates(images, rows, candidates, grid=grid, radius=edge)
    near, far = find_errors(local.rot, truth.rot, operators), find_errors(placed.rot, truth.rot, operators)
    return {
        "local_median": float(near.median()), "local_shift_px": float((local.shift - truth.shift).norm(dim=1).median()) * volume.box,
        "global_median": float(far.median()), "global_within_10": float((far < 10).float().mean()),
    }


def main() -> None:
    "Measure every case once."
    data = Path(os.environ.get("RECON_NB_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=300, help="images placed")
    parser.add_argument("--streptavidin", type=Path, default=data / "simulated" / "small_64" / "streptavidin_1mk5x1stp_tetramer.mrc", help="its map")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "pose_floor.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for name in ("snr1", "snr03", "d64", "faint"):
            for molecule in CASES[name]["maps"]:
                case = {**CASES[name], "map": molecule, "seed": 0}
                found = measure_floor(case, options.n, data, options.streptavidin)
                row = {"case": name, "map": molecule, **{key: case[key] for key in ("box", "snr")}, "n": options.n, **{key: f"{value:.4g}" for key, value in found.items()}}
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
