"""A network that several processes learn together, then a search: one row of accuracy and time.

    torchrun --nproc_per_node 2 benchmarks/abinit_ddp.py [--map 50S] [--seed 0] [--epochs 12]

RECON_NB_DATA names the folder of test data. Images as in abinit_search.py, case snr1: 5,000 images at D=32, SNR 1. What `recon abinit --method combined` does: all processes learn one network by the steps of one, and each makes the same search from its poses.
Wanted: median <= 1.2 degrees, >= 95 % within 10, shift <= .08 px, FSC=.5 at .45 /px. Seconds are CPU seconds of the first process, of the network and of the rest; `start` is the median error of the network's poses.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from abinit_search import CASES, score_poses, simulate_case

from recon_nb.amortised import AmortisedConfig, solve_amortised
from recon_nb.core import get_world_size, is_main
from recon_nb.so3 import align_poses
from recon_nb.solver import solve_poses
from recon_nb.training import join_team


def main() -> None:
    "Measure once and print the row."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", default="50S", help="50S, 70S or streptavidin")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything")
    parser.add_argument("--epochs", type=float, default=12.0, help="for which the network learns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["RECON_NB_DATA"])
    with join_team("cpu"):
        simulated = simulate_case({**CASES["snr1"], "map": options.map, "seed": options.seed}, data, data / "simulated" / "small_64" / "streptavidin_1mk5x1stp_tetramer.mrc")
        clock = [time.process_time()]
        learnt = solve_amortised(simulated.stack, AmortisedConfig(epochs=options.epochs), seed=options.seed)
        clock.append(time.process_time())
        solution = solve_poses(simulated.stack, seed=options.seed, initial=learnt.poses)
        clock.append(time.process_time())
        if is_main():
            found = {
                "processes": get_world_size(), "map": options.map, "seed": options.seed, "start": align_poses(learnt.poses.rot, simulated.poses.rot).median, "network_s": clock[1] - clock[0], "rest_s": clock[2] - clock[1],
                **score_poses(simulated, solution, options.map == "streptavidin"), "verdict": solution.diagnosis.verdict, "n_starts": solution.diagnosis.n_starts,
            }
            print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
