"""A search that begins at a network's poses: does it end where a search from nothing ends, whatever the network came to?

    python benchmarks/abinit_combined.py [--maps 50S] [--seeds 0 1 2] [--epochs 1 12] [-o benchmarks/results/abinit_combined.csv]

RECON_NB_DATA names the folder of test data. Images as in abinit_search.py, case snr1: 5,000 images at D=32, SNR 1. The network of amortised.py learns for so many epochs (after one of them its poses are next to random), then `solve_poses(initial=...)` goes on.
Wanted: median <= 1.2 degrees, >= 95 % within 10, shift <= .08 px, FSC=.5 at .45 /px. `start` and `start_within_20` are what the network gave. Seconds are CPU seconds of one thread: of the network, and of the rest. Lines are appended as they come; what the file has already is not
measured again.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from abinit_search import CASES, append_row, list_done, score_poses, simulate_case

from recon_nb.amortised import AmortisedConfig, solve_amortised
from recon_nb.core import keep_freed_memory
from recon_nb.so3 import align_poses
from recon_nb.solver import solve_poses

KEYS = ("map", "seed", "epochs")


def measure(molecule: str, seed: int, epochs: float) -> dict:
    "Simulate a set, learn it, go on with a search and score both."
    data = Path(os.environ["RECON_NB_DATA"])
    simulated = simulate_case({**CASES["snr1"], "map": molecule, "seed": seed}, data, data / "simulated" / "small_64" / "streptavidin_1mk5x1stp_tetramer.mrc")
    clock = [time.process_time()]
    learnt = solve_amortised(simulated.stack, AmortisedConfig(epochs=epochs), seed=seed)
    clock.append(time.process_time())
    solution = solve_poses(simulated.stack, seed=seed, initial=learnt.poses)
    clock.append(time.process_time())
    start = align_poses(learnt.poses.rot, simulated.poses.rot)
    return {
        "start": start.median, "start_within_20": float((start.errors < 20).float().mean()), "network_s": clock[1] - clock[0], "rest_s": clock[2] - clock[1],
        **score_poses(simulated, solution, molecule == "streptavidin"), "verdict": solution.diagnosis.verdict, "n_starts": solution.diagnosis.n_starts,
    }


def main() -> None:
    "Measure what the file does not have yet."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", nargs="+", default=["50S"], help="50S, 70S or streptavidin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0, 12.0], help="for which the network learns")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "abinit_combined.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    done = list_done(options.output, KEYS)
    for seed in options.seeds:
        for epochs in options.epochs:
            for molecule in options.maps:
                key = (molecule, str(seed), str(epochs))
                if key in done:
                    continue
                append_row(options.output, dict(zip(KEYS, key, strict=True)), measure(molecule, seed, epochs))


if __name__ == "__main__":
    main()
