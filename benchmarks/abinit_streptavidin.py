"""Poses from nothing for a small protein in a large box: simulated streptavidin, 128 px of 1.072 Å, no symmetry imposed.

    python benchmarks/abinit_streptavidin.py --map streptavidin_128.mrc [--images 1000 5000] [--seeds 0 1 2] [--snr 0.1] [--scratch FOLDER] [-o benchmarks/results/abinit_streptavidin.csv]

The map comes from the folder of test data, by an environment of its own that has gemmi, scipy, mrcfile and mmtf-python:

    cd $RECON_NB_DATA/simulated && python -c "import make_gt; make_gt.small(128, 'FOLDER', box=137.2)"

which writes FOLDER/streptavidin_1mk5x1stp_tetramer.mrc. Images: uniform poses, Gaussian shifts of a 32nd of the box (4 px), defocus 1.2 to 3 µm, white noise, signal-to-noise ratio after the CTF over the whole frame;
a seed fixes poses, noise and start. `solver.solve_poses` runs without settings. Wanted at SNR 0.1: from 1,000 images FSC at 2.9 Å of .7 in 180 CPU seconds, from 5,000 FSC = .5 finer than 2.4 Å in 300.

Errors are what is left after the best rotation, hand and displacement, modulo the four operators of D2; the FSC is that of the map made of all images at the poses found, in the support that it shows by itself,
against the map that they were simulated from; fsc_29_sphere is the same in the sphere of .42 of the box, most of which is empty.
Seconds are CPU seconds of the solver on one thread; memory is the peak of the process, images included, so each line is measured in a process of its own. With --scratch, images lie in a file and are mapped into memory.
"""

import argparse
import multiprocessing
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from abinit_search import append_row, find_operators, list_done

from recon_nb.core import CTFParams, Poses, keep_freed_memory, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.files import read_volume
from recon_nb.fsc import compute_fsc, find_resolution
from recon_nb.refinement import build_map, build_reference, find_displacement
from recon_nb.search import WhitenedImages
from recon_nb.simulate import simulate_stack
from recon_nb.so3 import align_poses, rotation_distance
from recon_nb.solver import solve_poses

KEYS = ("images", "snr", "seed")


def bring_to_truth(found: Poses, truth: Poses, operators: torch.Tensor) -> tuple[Poses, torch.Tensor]:
    "Return poses in the frame of the truth and their errors in degrees, each modulo the operators of the symmetry."
    reference = truth.rot
    for _ in range(4):  # each image at the equivalent pose that is nearest to what was found
        rot = align_poses(found.rot, reference).transform(found.rot)
        options = truth.rot[:, None] @ operators
        reference = options[torch.arange(len(rot)), rotation_distance(options, rot[:, None]).argmin(1)]
    errors = rotation_distance(rot, reference)
    near = errors <= max(10.0, float(errors.median()))
    displacement = find_displacement(rot[near], (found.shift - truth.shift)[near])
    return Poses(rot, found.shift - rot[:, :2] @ displacement), errors


def measure(case: dict, map_file: Path, scratch: Path | None, device: str) -> dict:
    "Simulate a set, solve it and score it."
    torch.set_num_threads(1)
    keep_freed_memory()
    volume, n = read_volume(map_file), case["images"]
    defocus = 1.2e4 + 1.8e4 * torch.rand(n, generator=make_generator(case["seed"], "defocus"), dtype=torch.float64)
    width = volume.box * volume.pixel_size
    simulated = simulate_stack([volume], n, snr=case["snr"], shift_sigma=width / 32, ctf=CTFParams.from_values(n, defocus_u=defocus), seed=case["seed"], scratch=scratch)
    began = time.process_time(), time.time()
    dataset = ParticleDataset(replace(simulated.stack, poses=None), window_radius=1.5)
    solution = solve_poses(dataset, seed=case["seed"], device=device)
    seconds, wall = time.process_time() - began[0], time.time() - began[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    poses, errors = bring_to_truth(solution.poses, simulated.poses, find_operators(volume))
    given = (WhitenedImages(dataset), torch.arange(n), Poses(poses.rot, poses.shift / width), volume.box / 2 - 1e-3)
    fsc, sphere = (compute_fsc(make(*given).make_volume(), volume) for make in (build_reference, build_map))
    d = solution.diagnosis
    return {
        "median": float(errors.median()), "within_10": float((errors < 10).float().mean()), "shift_px": float((poses.shift - simulated.poses.shift).norm(dim=1).median()) / volume.pixel_size,
        "fsc_29": float(fsc.fsc[round(width / 2.9)]), "fsc_29_sphere": float(sphere.fsc[round(width / 2.9)]), "fsc_05": find_resolution(fsc, 0.5).angstrom, "half_fsc_0143": find_resolution(solution.fsc, 0.143).angstrom,
        "cpu_s": seconds, "wall_s": wall, "peak_gb": peak, "verdict": d.verdict, "correlation": d.agreement.correlation, "n_starts": d.n_starts, "batch_size": solution.plan.batch_size, "device": device,
    }


def main() -> None:
    "Measure what the file does not have yet."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", type=Path, required=True, help="streptavidin at 128 px")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000], help="how many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which")
    parser.add_argument("--snr", type=float, default=0.1, help="after the CTF")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--scratch", type=Path, help="folder for a file of images")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "abinit_streptavidin.csv")
    options = parser.parse_args()
    done = list_done(options.output, (*KEYS, "device"))
    for n in options.images:
        for seed in options.seeds:
            case = {"images": n, "snr": options.snr, "seed": seed}
            if (*map(str, case.values()), options.device) in done:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (case, options.map, options.scratch, options.device))
            append_row(options.output, case, found)


if __name__ == "__main__":
    main()
