"""What bf16 does to quality: the same run from the same seed, with bf16 products and without.

    python benchmarks/bf16_quality.py bench/s1_32 bench/s2u_32 -o bench/bf16 [--epochs 9] [--seeds 0] [--set model.encoder=subspace train.teach_steps=2000] [--csv benchmarks/results/bf16_quality.csv]

The data sets are those of make_data.py. Both runs train a VAE of 256x3 networks, Z = 8, batch 8, one cycle of the learning rate up to 5e-4, so that they end settled rather than
anywhere on a noisy walk: rounding changes every step a little, so two runs of one seed part like two seeds do, and only settled scores compare.
Scores are those of parity_cryodrgn.py (100 particles), with the CPU time of each run beside them. The goal: AUC and dAUC within .003.
A run that exists is scored, not made again; one that was stopped is gone on with.
"""

import argparse
import ast
import time
from pathlib import Path

import pandas as pd
import torch
from parity_cryodrgn import N_SCORED, read_truth, score_epoch

from recon_nb.core import make_generator, supports_bf16
from recon_nb.runs import is_run, make_config, open_run, read_log
from recon_nb.training import load_model, train_run

SETTINGS = {"model.zdim": 8, "model.encoder_dim": 256, "model.decoder_dim": 256, "train.batch_size": 8, "train.learning_rate": 5e-4, "train.schedule": "one-cycle",
            "train.encode_every": 0, "train.keep_last": 1}


def train(data: Path, out: Path, changes: dict) -> None:
    """Train, or go on; note the CPU seconds of this process beside the run."""
    config = None if is_run(out) else make_config(str(data / "particles.star"), changes={**SETTINGS, **changes})
    if config is None and open_run(out).epochs[-1:] == [open_run(out).config.train.epochs]:
        return
    start = time.process_time()
    train_run(out, config, device="cpu")
    note = out / "cpu_seconds.txt"
    before = float(note.read_text()) if note.exists() else 0.0
    note.write_text(f"{before + time.process_time() - start:.1f}\n")


def score(data: Path, out: Path) -> dict:
    """Return the scores of a finished run."""
    truth, run = read_truth(data), open_run(out)
    rows = torch.randperm(len(truth[0]), generator=make_generator(0, "parity"))[:N_SCORED].numpy()
    z, model = run.load_latents().mu, load_model(run, device="cpu")
    scores = score_epoch(z.numpy(), lambda i: model.decode_volume(z[rows[i]]), rows, truth)
    scores["knn"] = scores.pop("knn_accuracy", scores.get("knn"))  # for classes: accuracy of the vote
    return {**scores, "recon": read_log(run)["recon"][-1], "cpu_s": float((out / "cpu_seconds.txt").read_text())}


def compare(data: Path, args: argparse.Namespace) -> list[dict]:
    """Return a row for every seed and precision of a data set."""
    rows = []
    for seed in args.seeds:
        for bf16 in (True, False):
            name = f"{data.name}_{'bf16' if bf16 else 'fp32'}_{seed}"
            changes = {"train.epochs": args.epochs, "train.seed": seed, "train.bf16": bf16, **dict(args.set)}
            train(data, args.output / name, changes)
            rows.append({"set": data.name, "seed": seed, "precision": "bf16" if bf16 else "fp32", "epochs": args.epochs, **score(data, args.output / name)})
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.4f"), flush=True)
    return rows


def parse_setting(text: str) -> tuple[str, object]:
    """Return name and value of NAME=VALUE."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main() -> None:
    """Print the table and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders made by make_data.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", type=parse_setting, nargs="+", default=[], metavar="NAME=VALUE", help="further settings, e.g. model.encoder=subspace train.teach_steps=2000")
    parser.add_argument("--csv", type=Path, help="table to write")
    args = parser.parse_args()
    print(f"bf16 units: {supports_bf16('cpu')}")
    args.output.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([row for data in args.data for row in compare(data, args)])
    difference = table.set_index(["set", "seed", "precision"])[["auc", "dauc", "knn"]].unstack("precision")
    for column in ("auc", "dauc", "knn"):
        table[f"{column} - fp32"] = [row[column] - difference.loc[(row["set"], row["seed"]), (column, "fp32")] for _, row in table.iterrows()]
    print(table.to_string(index=False, float_format="%.4f"))
    if args.csv:
        table.to_csv(args.csv, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
