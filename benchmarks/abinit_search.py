"""Poses from nothing by search: the table of accuracy, time and verdicts on simulated sets with known truth.

    python benchmarks/abinit_search.py [--cases snr1 snr03 d64 faint fewer fainter noise] [--seeds 0 1 2 3 4] [--streptavidin FILE.mrc] [-o benchmarks/results/abinit_search.csv]

RECON_NB_DATA names the folder of test data. Images: uniform poses, Gaussian shifts of 1 px at D=32 and 2 px at D=64, defocus 1 to 3 µm, white noise, signal-to-noise ratio after
the CTF over the whole frame; a seed fixes poses, noise and start. `solver.solve_poses` runs without settings.

| case | maps | D | SNR | N | wanted |
|---|---|---|---|---|---|
| snr1 | 50S, 70S, streptavidin | 32 | 1 | 5,000 | median <= 1.2 degrees, >= 95 % within 10, shift <= .08 px, FSC=.5 at .45 /px, 60 s |
| snr03 | the same | 32 | .3 | 5,000 | <= 1.8 degrees, >= 92 % |
| d64 | 50S | 64 | .1 | 5,000 | <= 1.2 degrees, >= 95 %, FSC=.5 at .47 /px, 150 s; verdict |
| faint | 50S, 70S | 32 | .1 | 10,000 | >= 82 % within 10, median <= 3 degrees, 300 s |
| fewer | 50S, 70S | 32 | .1 | 5,000 | as far as it goes |
| fainter | 50S, 70S | 32 | .05 | 10,000 | as far as it goes |
| noise | none | 32 | - | 5,000 | failed |

Errors are what is left after the best rotation, hand and displacement; streptavidin is scored modulo its D2 operators. Seconds are CPU seconds of one thread. Lines are appended as they come, and what the file has already is not measured again.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import torch

from recon_nb.assemblies import make_50s_assembly, simulate_assembly_volumes
from recon_nb.core import CTFParams, Poses, Volume, keep_freed_memory, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.files import read_volume
from recon_nb.fourier import fourier_crop
from recon_nb.fsc import compute_fsc, find_resolution
from recon_nb.refinement import build_map, find_displacement
from recon_nb.search import WhitenedImages
from recon_nb.simulate import SimulatedStack, simulate_stack
from recon_nb.so3 import align_poses, rotation_distance
from recon_nb.solver import solve_poses

MAPS = ("50S", "70S", "streptavidin")
CASES = {
    "snr1": {"maps": MAPS, "box": 32, "snr": 1.0, "n": 5000},
    "snr03": {"maps": MAPS, "box": 32, "snr": 0.3, "n": 5000},
    "d64": {"maps": ("50S",), "box": 64, "snr": 0.1, "n": 5000},
    "faint": {"maps": ("50S", "70S"), "box": 32, "snr": 0.1, "n": 10_000},
    "fewer": {"maps": ("50S", "70S"), "box": 32, "snr": 0.1, "n": 5000},
    "fainter": {"maps": ("50S", "70S"), "box": 32, "snr": 0.05, "n": 10_000},
    "noise": {"maps": ("noise",), "box": 32, "snr": 1e-6, "n": 5000},
}
KEYS = ("case", "map", "box", "snr", "n", "seed")


def make_volume(name: str, box: int, data: Path, streptavidin: Path) -> Volume:
    "Return the map of a molecule."
    if name in ("50S", "noise"):
        assembly = make_50s_assembly(data / "occupancy")
        return simulate_assembly_volumes(assembly, box)[list(assembly.states.index).index("mature")]
    volume = read_volume(data / "simulated" / "compositional_64" / "70S.mrc" if name == "70S" else streptavidin)
    return Volume(fourier_crop(volume.data, box, 3), volume.pixel_size * volume.box / box)


def find_operators(volume: Volume) -> torch.Tensor:
    "Return the rotations by 180 degrees about three axes of D2 (and none) that leave a map as it is."
    weight = (volume.data - volume.data.mean()).clamp(min=0).double()
    axis = torch.arange(volume.box, dtype=torch.float64) - volume.box // 2
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1)
    inertia = torch.einsum("zyx,zyxi,zyxj->ij", weight, place, place)
    axes = torch.linalg.eigh(inertia)[1].T
    return torch.stack([torch.eye(3, dtype=torch.float64)] + [2 * torch.outer(a, a) - torch.eye(3, dtype=torch.float64) for a in axes]).float()


def score_poses(simulated, solution, symmetric: bool) -> dict:
    "Compare with the truth, modulo the frame, and modulo D2 where asked."
    truth, volume = simulated.poses, simulated.volumes[0]
    operators = find_operators(volume) if symmetric else torch.eye(3)[None]
    reference = truth.rot
    for _ in range(1 if not symmetric else 4):  # each image at the equivalent pose that is nearest to what was found
        aligned = align_poses(solution.poses.rot, reference)
        rot = aligned.transform(solution.poses.rot)
        options = truth.rot[:, None] @ operators
        reference = options[torch.arange(len(rot)), rotation_distance(options, rot[:, None]).argmin(1)]
    errors = rotation_distance(rot, reference)
    near = errors <= max(10.0, float(errors.median()))
    difference = solution.poses.shift - truth.shift
    displacement = find_displacement(rot[near], difference[near])
    shift = solution.poses.shift - rot[:, :2] @ displacement
    width = volume.box * volume.pixel_size
    images = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5))
    made = build_map(images, torch.arange(len(rot)), Poses(rot, shift / width), volume.box / 2 - 1e-3).make_volume()
    return {
        "median": float(errors.median()), "within_10": float((errors < 10).float().mean()),
        "shift_px": float((shift - truth.shift).norm(dim=1).median()) / volume.pixel_size, "fsc_05": find_resolution(compute_fsc(made, volume), 0.5).cycles_per_px,
    }


def simulate_case(case: dict, data: Path, streptavidin: Path) -> SimulatedStack:
    "Return the images of a case, with the truth."
    volume = make_volume(case["map"], case["box"], data, streptavidin)
    defocus = 1e4 + 2e4 * torch.rand(case["n"], generator=make_generator(case["seed"], "defocus"), dtype=torch.float64)
    ctf = CTFParams.from_values(case["n"], defocus_u=defocus)
    return simulate_stack([volume], case["n"], snr=case["snr"], shift_sigma=case["box"] / 32 * volume.pixel_size, ctf=ctf, seed=case["seed"])


def measure(case: dict, data: Path, streptavidin: Path) -> dict:
    "Simulate a set, solve it and score it."
    simulated = simulate_case(case, data, streptavidin)
    began = time.process_time()
    solution = solve_poses(simulated.stack, seed=case["seed"])
    seconds = time.process_time() - began
    d = solution.diagnosis
    told = {
        "cpu_s": seconds, "verdict": d.verdict, "correlation": d.agreement.correlation, "same": d.agreement.same, "other": d.agreement.other, "gain": d.gain.mean,
        "gain_error": d.gain.error, "orienting": d.orienting, "n_starts": d.n_starts, "batch_size": solution.plan.batch_size,
    }
    return {**score_poses(simulated, solution, case["map"] == "streptavidin"), **told}


def list_done(path: Path, keys: tuple[str, ...]) -> set[tuple[str, ...]]:
    "Return the rows that a table has, by their keys."
    if not path.exists():
        return set()
    with path.open() as file:
        return {tuple(row[key] for key in keys) for row in csv.DictReader(file)}


def append_row(path: Path, case: dict, found: dict) -> None:
    "Add a row to a table, to four digits, and print it."
    found = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*case, *found))
        if is_new:
            writer.writeheader()
        writer.writerow({**case, **found})
    print(case, found, flush=True)


def main() -> None:
    "Measure what the file does not have yet."
    data = Path(os.environ.get("RECON_NB_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--maps", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="which seeds")
    parser.add_argument("--streptavidin", type=Path, default=data / "simulated" / "small_64" / "streptavidin_1mk5x1stp_tetramer.mrc", help="its map")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "abinit_search.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    done = list_done(options.output, KEYS)
    for seed in options.seeds:
        for name in options.cases:
            spec = CASES[name]
            for molecule in spec["maps"]:
                case = {"case": name, "map": molecule, "box": spec["box"], "snr": spec["snr"], "n": spec["n"], "seed": seed}
                if tuple(str(case[key]) for key in KEYS) in done or (options.maps and molecule not in options.maps):
                    continue
                append_row(options.output, case, measure(case, data, options.streptavidin))


if __name__ == "__main__":
    main()
