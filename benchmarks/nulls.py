"""Does the test for heterogeneity say "nothing" where there is nothing, and what is the weakest heterogeneity that it calls?

    python benchmarks/nulls.py [--parts rigid rigid_50s motion weak] [--seeds 10] [--weak-seeds 3] [--box 32] [--n 10000] [--snr 0.1] [-o benchmarks/results/nulls.csv]

Sets come from make_data.py (RECON_NB_DATA names the folder of test data); each is made in a temporary folder, judged by nulls.judge_heterogeneity with
its defaults, and removed. All are tested twice: pure, and with --rot-error 2 --contrast 0.2 of make_data.

| part | sets | expected |
|---|---|---|
| rigid, rigid_50s | --seeds seeds of s2_null (an IgG) and of s1_50s (a ribosomal subunit): one rigid molecule | nothing |
| motion | s2_uniform; beside the test, kNN of starts.fit_subspace with its defaults | heterogeneous, kNN .96 with errors |
| weak | --weak-seeds seeds each: occupancy at share .5 and a growing share of the mass (--mass-share), s2_small over a growing --range | no answer expected: a curve |

One line per set: gain and its standard error in nats per particle over a rigid molecule with errors, naive gain over one without, the errors that the test
found, its verdict, and CPU seconds of making the data, of the test and of the fit (one thread). Lines are appended as they come, and what the
file has already is not measured again.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from make_data import simulate_set

from recon_nb.core import keep_freed_memory
from recon_nb.datasets import ParticleDataset
from recon_nb.latent import compute_knn_correlation
from recon_nb.nulls import judge_heterogeneity
from recon_nb.starts import fit_subspace

ERRORS = ({"rot_error": 0.0, "contrast": 0.0}, {"rot_error": 2.0, "contrast": 0.2})
MASS_SHARES, RANGES = (0.01, 0.02, 0.03, 0.05, 0.1), (0.05, 0.1, 0.2, 0.3, 0.6)  # of the mass; rad
PARTS = ("rigid", "rigid_50s", "motion", "weak")
KEYS = ("part", "set", "mass_share", "range", "rot_error", "contrast", "seed", "box", "n", "snr")
FOUND = ("gain", "gain_error", "naive_gain", "found_contrast", "found_rotation", "found_shift", "heterogeneous", "knn", "data_s", "test_s", "fit_s")


def list_cases(options: argparse.Namespace) -> Iterator[dict]:
    "Yield what to make, seed by seed."
    shared = {"box": options.box, "n": options.n, "snr": options.snr, "mass_share": None, "range": None}
    weak = [{"set": "occupancy", "mass_share": m} for m in MASS_SHARES] + [{"set": "s2_small", "range": r} for r in RANGES]
    parts = {"rigid": [{"set": "s2_null"}], "rigid_50s": [{"set": "s1_50s"}], "motion": [{"set": "s2_uniform"}], "weak": weak}
    seeds = {"rigid": options.seeds, "rigid_50s": options.seeds, "motion": 1, "weak": options.weak_seeds}
    for part in options.parts:
        for seed in range(seeds[part]):
            for case in parts[part]:
                for errors in ERRORS:
                    yield {**shared, "part": part, "seed": seed, **case, **errors}


def judge(case: dict) -> dict:
    "Make a set, test it, and fit it where it moves as a whole."
    clock = [time.process_time()]
    with tempfile.TemporaryDirectory() as folder:
        wanted = argparse.Namespace(**case, share=0.5 if case["set"] == "occupancy" else None, out=Path(folder))
        simulated, _ = simulate_set(wanted, Path(os.environ["RECON_NB_DATA"]))
        dataset = ParticleDataset(simulated.stack, in_memory=True)
    clock.append(time.process_time())
    found = judge_heterogeneity(dataset, seed=case["seed"])
    clock.append(time.process_time())
    knn = None
    if case["part"] == "motion":
        fit = fit_subspace(dataset, seed=case["seed"])
        knn = compute_knn_correlation(fit.mu.numpy(), simulated.truth["label"].to_numpy())
        clock.append(time.process_time())
    seconds = [b - a for a, b in zip(clock, clock[1:])] + [None]
    values = (found.gain, found.gain_error, found.naive_gain, found.contrast_sd, found.rotation_error, found.shift_error, found.is_heterogeneous, knn, *seconds[:3])
    return {**case, **{name: round(v, 4) if isinstance(v, float) else v for name, v in zip(FOUND, values, strict=True)}}


def read_keys(path: Path) -> set[tuple]:
    "Return what a table has already."
    if not path.exists():
        return set()
    table = pd.read_csv(path)
    return set(map(tuple, table[list(KEYS)].astype(object).where(table[list(KEYS)].notna(), None).to_numpy().tolist()))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    "Return one line per kind of set: how many are called, and the gain."
    groups = table.groupby(["part", "set", "mass_share", "range", "rot_error", "contrast"], sort=False, dropna=False)
    return groups.agg(
        seeds=("seed", "size"), called=("heterogeneous", "sum"), gain=("gain", "mean"), least=("gain", "min"), most=("gain", "max"), error=("gain_error", "mean"),
        naive=("naive_gain", "mean"), contrast_found=("found_contrast", "mean"), rotation_found=("found_rotation", "mean"), knn=("knn", "mean"), test_s=("test_s", "mean"),
    ).round(3).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=10, help="of each rigid molecule")
    parser.add_argument("--weak-seeds", type=int, default=3, help="of each weak set")
    parser.add_argument("--box", type=int, default=32, help="px")
    parser.add_argument("--n", type=int, default=10_000, help="images")
    parser.add_argument("--snr", type=float, default=0.1, help="after the CTF, over the whole frame")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/nulls.csv"))
    options = parser.parse_args()
    if not os.environ.get("RECON_NB_DATA"):
        sys.exit("Set RECON_NB_DATA to the folder of test data (it holds simulated/).")
    torch.set_num_threads(1)
    keep_freed_memory()
    done = read_keys(options.out)
    for case in list_cases(options):
        if tuple(case[name] for name in KEYS) in done:
            continue
        row, fresh = judge(case), not options.out.exists()
        with open(options.out, "a", newline="") as file:
            writer = csv.DictWriter(file, (*KEYS, *FOUND), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
    print(summarize(pd.read_csv(options.out)).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
