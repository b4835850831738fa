"""Do filters that see no truth remove images without a particle, and nothing else?

    python benchmarks/junk.py [--parts mixed noise edge few trained] [--seeds 2] [--box 64] [--n 4000] [--snr 0.1] [--molecule 50s] [-o benchmarks/results/junk.csv]

Each set holds --n particles of the assembly landscape of page 22b (--molecule 50s: the real subunits, RECON_NB_DATA names the folder of test data; phantom: its twin
without files) and, of all images,

| part | junk | model |
|---|---|---|
| mixed | 10 % pure noise, 10 % edges | recon subspace, defaults |
| noise | 20 % pure noise | the same |
| edge | 20 % edges | the same |
| few | 3 % edges | the same |
| trained | 10 % pure noise, 10 % edges, at half the box | recon train with the image encoder, 128 wide, 15 epochs |

One line per set and method: kmeans (20), gmm (10) and zscore of `recon filter` with its defaults, and norm: the published z-score of the latent norm with |z| > 2. Removed is
the share of the junk that is gone, kept the share of the particles that stay, kept_least the same of the state that suffers most; expected are .95 of both for kmeans and gmm on
mixed and for zscore on few. The Venn counts of kmeans, gmm and zscore go to a second file, *_overlaps.csv. What the file has already is not measured again.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recon_nb.assemblies import add_junk, make_50s_assembly, make_phantom_assembly, simulate_assembly_volumes
from recon_nb.core import Selection
from recon_nb.filtering import choose_particles, tabulate_particles
from recon_nb.runs import make_config
from recon_nb.selection import count_overlaps
from recon_nb.simulate import SimulatedStack, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.training import train_run

PARTS = {"mixed": {"noise": 0.1, "edge": 0.1}, "noise": {"noise": 0.2}, "edge": {"edge": 0.2}, "few": {"edge": 0.03}, "trained": {"noise": 0.1, "edge": 0.1}}  # shares of all images
METHODS = {"kmeans": {"method": "kmeans"}, "gmm": {"method": "gmm"}, "zscore": {"method": "zscore"}, "norm": {"method": "zscore", "columns": ["norm"], "threshold": 2.0}}
KEYS = ("molecule", "part", "seed", "box", "n", "snr")
TRAINED = {"model.zdim": 4, "model.encoder_dim": 128, "model.decoder_dim": 128, "train.epochs": 15, "train.batch_size": 16, "train.learning_rate": 5e-4, "train.schedule": "cosine", "train.encode_every": 0}


def make_set(case: dict) -> SimulatedStack:
    "Simulate particles of a landscape and add junk."
    assembly = make_50s_assembly() if case["molecule"] == "50s" else make_phantom_assembly()
    volumes, seed = simulate_assembly_volumes(assembly, case["box"]), case["seed"]
    simulated = simulate_stack(volumes, case["n"], weights=assembly.weights, names=list(assembly.states.index), snr=case["snr"], seed=seed)
    particles, junk = len(simulated.labels), PARTS[case["part"]]
    whole = particles / (1 - sum(junk.values()))
    for kind, share in junk.items():
        simulated = add_junk(simulated, share * whole / simulated.stack.n_images, kind=kind, seed=seed)
    return simulated


def measure(case: dict) -> tuple[list[dict], pd.DataFrame]:
    "Make a set, fit a model, apply every filter; return one line a method, and the counts of their overlaps."
    with tempfile.TemporaryDirectory() as folder:
        simulated = make_set(case)
        star = write_simulation(Path(folder) / "data", simulated)
        clock = [time.process_time()]
        if case["part"] == "trained":
            run = train_run(Path(folder) / "run", make_config(str(star), changes=TRAINED | {"train.seed": case["seed"]}), device="cpu")
        else:
            run = run_subspace(Path(folder) / "run", make_config(str(star), changes={"model.manifold": "auto", "train.seed": case["seed"]}), device="cpu")
        clock.append(time.process_time())
        table = tabulate_particles(run, device="cpu", seed=case["seed"])
        clock.append(time.process_time())
        chosen = {name: choose_particles(table, len(table), seed=case["seed"], **options)[0] for name, options in METHODS.items()}
        clock.append(time.process_time())
    label = simulated.labels.numpy()
    seconds = dict(zip(("run_s", "measure_s", "filter_s"), np.diff(clock).round(1)))
    rows = []
    for name, selection in chosen.items():
        kept = selection.mask
        by_state = [kept[label == state].mean() for state in np.unique(label[label >= 0])]
        found = {"removed": (~kept)[label < 0].mean(), "kept": kept[label >= 0].mean(), "kept_least": min(by_state)}
        rows.append(case | {"method": name} | {key: round(float(value), 4) for key, value in found.items()} | {"n_kept": int(kept.sum()), "n_images": len(kept), **seconds})
    three = {name: chosen[name] for name in ("kmeans", "gmm", "zscore")}
    truth = Selection(np.flatnonzero(label >= 0), len(label))
    return rows, count_overlaps({**three, "particles": truth}).assign(**case)


def read_done(path: Path) -> set[tuple]:
    "Return the cases that a table has already."
    return set(pd.read_csv(path)[list(KEYS)].itertuples(index=False, name=None)) if path.exists() else set()


def append(path: Path, table: pd.DataFrame) -> None:
    "Add lines to a csv."
    table.to_csv(path, mode="a", header=not path.exists(), index=False)


def main() -> None:
    "Measure what is asked for and not there yet."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--molecule", choices=("50s", "phantom"), default="50s" if "RECON_NB_DATA" in os.environ else "phantom")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "junk.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        for seed in range(1 if part == "trained" else options.seeds):
            case = {"molecule": options.molecule, "part": part, "seed": seed, "box": options.box // (2 if part == "trained" else 1), "n": options.n, "snr": options.snr}
            if tuple(case[key] for key in KEYS) in read_done(options.out):
                continue
            rows, overlaps = measure(case)
            append(options.out, pd.DataFrame(rows))
            append(options.out.with_name(f"{options.out.stem}_overlaps.csv"), overlaps)
            print(pd.DataFrame(rows)[["part", "seed", "method", "removed", "kept", "kept_least", "run_s", "measure_s", "filter_s"]].to_string(index=False), flush=True)
            print(overlaps.drop(columns=list(KEYS)).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
