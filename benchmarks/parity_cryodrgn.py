"""Quality beside cryoDRGN 4.3.1: same files, network, latent size, batch, learning rate and number of epochs.

    python benchmarks/make_data.py --set s1 --box 32 --n 10000 --snr 0.1 --seed 0 -o bench/s1_32
    python benchmarks/make_data.py --set s2_uniform --box 32 --n 10000 --snr 0.1 --seed 0 -o bench/s2_32
    python benchmarks/parity_cryodrgn.py peer  bench/s1_32 --peer-bin PEER/bin -o bench/parity/s1/peer
    python benchmarks/parity_cryodrgn.py ours  bench/s1_32 --seed 0 -o bench/parity/s1/ours_0        (and seeds 1, 2)
    python benchmarks/parity_cryodrgn.py score bench/s1_32 bench/parity/s1 --peer-bin PEER/bin       (table and parity.csv)
    python benchmarks/parity_cryodrgn.py plot  bench/parity/s1 bench/parity/s2 -o parity.png

Both train a VAE of 256x3 networks, Z = 8, batch 8, Adam at 1e-4, 20 epochs, on true poses. Scores: per-image FSC AUC and dAUC over 100 particles
(`recon_nb.heterogeneity`), for labels the accuracy of a 20-nearest-neighbour vote held out in five folds, for a coordinate kNN correlation
(`recon_nb.latent`); and the training loss, a mean
squared error of the same windowed images in both programs, in units of the noise power that each program's window leaves (its edge is linear, ours a cosine). One training run takes 5 to 30 CPU minutes.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recon_nb.core import make_generator
from recon_nb.files import read_volume
from recon_nb.heterogeneity import VolumePairs, score_ensemble
from recon_nb.latent import compute_knn_correlation
from recon_nb.runs import make_config, open_run, read_log
from recon_nb.training import load_model, train_run

EPOCHS = (1, 2, 3, 5, 7, 10, 13, 16, 20)
N_SCORED = 100


def train_ours(data: Path, out: Path, seed: int) -> None:
    """Train recon_nb with the settings of the peer."""
    changes = {"model.zdim": 8, "model.encoder_dim": 256, "model.decoder_dim": 256, "train.batch_size": 8, "train.learning_rate": 1e-4,
               "train.epochs": EPOCHS[-1], "train.seed": seed}
    train_run(out, make_config(particles=str(data / "particles.star"), preset="cryodrgn", changes=changes))


def train_peer(data: Path, out: Path, peer_bin: Path) -> None:
    """Train cryoDRGN on the same files through its own commands."""
    out.mkdir(parents=True)
    star, box = data / "particles.star", read_volume(next((data / "volumes").glob("*.mrc"))).box
    commands = [
        f"parse_pose_star {star} -o {out}/poses.pkl -D {box}",
        f"parse_ctf_star {star} -o {out}/ctf.pkl -D {box}",
        f"train_vae {star} --datadir {data} --poses {out}/poses.pkl --ctf {out}/ctf.pkl --zdim 8 -n {EPOCHS[-1]} -b 8 --lr 1e-4 --enc-dim 256 "
        f"--dec-dim 256 --enc-layers 3 --dec-layers 3 --uninvert-data --no-amp --no-analysis --seed 0 --num-workers 0 -o {out}",
    ]
    with open(out / "log", "w") as log:
        for command in commands:
            subprocess.run([peer_bin / "cryodrgn", *command.split()], check=True, stdout=log, stderr=subprocess.STDOUT)


def read_truth(data: Path) -> tuple[np.ndarray, list[torch.Tensor], bool]:
    """Return the state of every particle, the states' volumes, and whether states are classes (few) or a coordinate (many)."""
    label = pd.read_csv(data / "truth.csv")["label"].to_numpy(copy=True)
    volumes = [read_volume(path).data for path in sorted((data / "volumes").glob("*.mrc"))]
    return label, volumes, len(volumes) < 10


def measure_noise(data: Path) -> dict[str, float]:
    """Return the noise in a Fourier pixel after a window with linear (cryoDRGN) and cosine (recon_nb) edge, both from .85 to .99 of half the box."""
    facts = json.loads((data / "simulation.json").read_text())
    axis = torch.arange(facts["box"]) / (facts["box"] / 2) - 1
    ramp = ((axis[:, None].square() + axis.square()).sqrt() - 0.85).div(0.14).clamp(0, 1)
    windows = {"linear": 1 - ramp, "cosine": 0.5 + 0.5 * torch.cos(torch.pi * ramp)}
    return {name: float(facts["noise_sigma"] * window.square().sum().sqrt()) for name, window in windows.items()}


def vote_labels(z: np.ndarray, label: np.ndarray, k: int = 20, n_folds: int = 5) -> float:
    """Return the share of particles whose class the majority of their k nearest held-out neighbours has."""
    from scipy.spatial import cKDTree

    fold, right = np.random.default_rng(0).permutation(len(z)) % n_folds, 0
    for held_out in range(n_folds):
        known, asked = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        near = label[known][cKDTree(z[known]).query(z[asked], k=k)[1]]
        votes = np.stack([(near == c).sum(axis=1) for c in range(label.max() + 1)], axis=1)
        right += int((votes.argmax(axis=1) == label[asked]).sum())
    return right / len(z)


def score_epoch(z: np.ndarray, decode, rows: np.ndarray, truth: tuple[np.ndarray, list[torch.Tensor], bool]) -> dict[str, float]:
    """Return the scores of one epoch; `decode(i)` makes the volume of the i-th scored particle."""
    label, volumes, is_classes = truth
    estimates = [decode(i) for i in range(len(rows))]
    pairs = VolumePairs(lambda i: estimates[i], lambda i: volumes[label[rows[i]]], len(rows))
    scores = score_ensemble(pairs).summarize()
    quality = vote_labels(z, label) if is_classes else compute_knn_correlation(z, label)
    return {"auc": scores["auc"], "dauc": scores["dauc"], "knn_accuracy" if is_classes else "knn": quality}


def score_ours(run_path: Path, rows: np.ndarray, truth: tuple, *, noise: dict[str, float]) -> pd.DataFrame:
    """Return the scores of one of our runs by epoch."""
    run, table = open_run(run_path), []
    log = read_log(run)
    for epoch in EPOCHS:
        z = run.load_latents(epoch).mu
        model = load_model(run, epoch, device="cpu")
        table.append({"epoch": epoch, "recon": log["recon"][epoch - 1] * (run.inputs["data"]["scale"] / noise["cosine"]) ** 2, "kl": log["kl"][epoch - 1],
                      **score_epoch(z.numpy(), lambda i: model.decode_volume(z[rows[i]]), rows, truth)})
    return pd.DataFrame(table)


def score_peer(run: Path, rows: np.ndarray, truth: tuple, *, noise: dict[str, float], peer_bin: Path) -> pd.DataFrame:
    """Return the scores of the peer's run by epoch."""
    text = (run / "log").read_text()
    losses = re.findall(r"Epoch: (\d+) Average gen loss = ([\d.]+), KLD = ([\d.]+)", text)
    table = []
    np.savetxt(run / "rows.txt", rows, fmt="%d")
    for epoch in EPOCHS:
        out = run / f"volumes.{epoch}.npz"
        if not (run / f"weights.{epoch}.pkl").exists():
            break
        script = Path(__file__).with_name("peer_cryodrgn.py")
        subprocess.run([peer_bin / "python", script, "volumes", run, "--epoch", str(epoch), "--particles", run / "rows.txt", "-o", out], check=True)
        content = np.load(out)
        volumes = -torch.from_numpy(content["volumes"])  # its CTF has the opposite sign, so bright particles give a dark map
        table.append({"epoch": epoch, "recon": float(losses[epoch - 1][1]) * (content["norm"][1] / noise["linear"]) ** 2, "kl": float(losses[epoch - 1][2]),
                      **score_epoch(content["z"], lambda i: volumes[i], rows, truth)})
    return pd.DataFrame(table)


def score(data: Path, folder: Path, peer_bin: Path) -> None:
    """Score every run below a folder; print the last epochs and write parity.csv."""
    truth = read_truth(data)
    rows = torch.randperm(len(truth[0]), generator=make_generator(0, "parity"))[:N_SCORED].numpy()
    noise, tables = measure_noise(data), []
    for run in sorted(p for p in folder.iterdir() if p.is_dir()):
        known = folder / f"{run.name}.csv"  # scored before
        if not known.exists():
            one = score_peer(run, rows, truth, noise=noise, peer_bin=peer_bin) if run.name == "peer" else score_ours(run, rows, truth, noise=noise)
            one.to_csv(known, index=False)
        tables.append(pd.read_csv(known).assign(run=run.name))
    table = pd.concat(tables)
    table.to_csv(folder / "parity.csv", index=False)
    print(f"{folder.name}, scores by epoch")
    print(table[table.epoch.isin([5, 10, 20])].to_string(index=False, float_format="%.4f"))


def plot(folders: list[Path], out: Path) -> None:
    """Draw all scores of several data sets, ours with the spread over seeds."""
    import matplotlib.pyplot as plt

    names = ["recon", "auc", "dauc", "quality"]
    fig, axes = plt.subplots(len(folders), 4, figsize=(12, 2.6 * len(folders)), squeeze=False, constrained_layout=True)
    for row, folder in zip(axes, folders, strict=True):
        table = pd.read_csv(folder / "parity.csv")
        column = "knn" if "knn" in table else "knn_accuracy"
        for ax, name in zip(row, names, strict=True):
            source = column if name == "quality" else name
            for i, (run, one) in enumerate(table.groupby("run")):
                peer = run == "peer"
                ax.plot(one.epoch, one[source], color="#D55E00" if peer else "#0072B2", lw=1.5 if peer else 1, ls="--" if peer else "-",
                        label="cryoDRGN 4.3.1" if peer else ("recon_nb, 3 seeds" if i == 0 else None))
            ax.set(xlabel="epoch", ylabel={"recon": "training loss", "auc": "AUC", "dauc": "dAUC"}.get(name, source.replace("_", " ")), title=folder.name)
        row[0].legend(fontsize=8)
    fig.savefig(out, dpi=110)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("ours", "peer", "score", "plot"):
        verb = verbs.add_parser(name)
        verb.add_argument("inputs", nargs="+", type=Path)
        if name != "score":
            verb.add_argument("-o", "--output", type=Path, required=True)
        if name in ("peer", "score"):
            verb.add_argument("--peer-bin", type=Path, required=True, help="bin folder of an environment with cryodrgn 4.3.1")
        if name == "ours":
            verb.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.verb == "ours":
        train_ours(args.inputs[0], args.output, args.seed)
    elif args.verb == "peer":
        train_peer(args.inputs[0], args.output, args.peer_bin)
    elif args.verb == "score":
        score(*args.inputs, args.peer_bin)
    else:
        plot(args.inputs, args.output)


if __name__ == "__main__":
    main()
