"""Are two classes of tilt series told apart when neither their doses nor their numbers of tilts give them away, and is noise left alone?

    python benchmarks/tilt_classes.py [--settings subspace tomodrgn et] [--seeds 0 1 2] [--inputs images noise] [-o benchmarks/results/tilt_classes.csv]
    python benchmarks/tilt_classes.py --quick

tomo/simulated_10076 of the test data (RECON_NB_DATA): 72 particles each of the classes D and E of a ribosomal subunit, 32 px of 13.1 Å. As shipped, D has 8 tilts
in steps of 2 e/Å² and E 10 in steps of 3, so that dose and count alone would tell them apart. Here every particle shows its first 8 tilts (at the same angles in
both), all with one array of doses, 3 e/Å² apart. `noise` replaces the pixels by white noise of the same variance and leaves poses, CTF and doses as they are.

| setting | what |
|---|---|
| subspace | `recon subspace`: rank 8, latent by held-out evidence, dose in the model; G and b summed over tilts; 3 rounds |
| tomodrgn | `--preset tomodrgn`: two-stage encoder, mean over tilts, AdamW, one particle a step, beta 1 / (Z + t D^2), dose in the weights and the mask |
| et | `--preset et`: concatenation of 8 tilts, Adam, beta .025, dose in the model |

What differs from a preset is in the column `changes`: networks of --width (256 and 1024 in the presets), --epochs, --learning-rate falling as a cosine, and for
`et` one particle a step instead of eight, since eight would make 18 steps an epoch of these 144 particles.

One line per setting, input and seed: adjusted Rand index (`ari`) and accuracy of k-means with two clusters on the latents of the last epoch against the truth, ari of a
Gaussian mixture, last squared error, KL in nats, and CPU seconds. Expected: ari .9 or more with images, .1 or less with noise. Lines are appended as
they come, and what the file has already is not measured again.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recon_nb.core import Latents, keep_freed_memory, make_generator
from recon_nb.datasets import ParticleDataset, ParticleStack, load_stack
from recon_nb.latent import cluster_gmm, cluster_kmeans, compute_label_accuracy
from recon_nb.runs import make_config, read_log
from recon_nb.starts import fit_subspace
from recon_nb.training import train_run

SETTINGS, INPUTS = ("subspace", "tomodrgn", "et"), ("images", "noise")
SUBSPACE = {"rank": 8, "rounds": 3, "dose": "model"}
FOUND = ("ari", "accuracy", "ari_gmm", "recon", "kl", "cpu_s")
KEYS = ("setting", "input", "seed", "changes")


def load_classes(data: Path, n_particles: int | None = None) -> tuple[ParticleStack, np.ndarray]:
    "Return the first 8 tilts of every particle with the same doses, and the classes."
    folder = data / "tomo/simulated_10076"
    stack = load_stack(folder / "10076_both_32_sim.star", datadir=folder)
    stack = stack.take(torch.nonzero(stack.tilt.order < 8)[:, 0])
    stack = dataclasses.replace(stack, tilt=dataclasses.replace(stack.tilt, dose=3.0 * stack.tilt.order.float()))
    if n_particles is not None:
        stack = stack.select(torch.cat([stack.particles[: n_particles // 2], stack.particles[-n_particles // 2 :]]))
    names = stack.table.rows.drop_duplicates("particle").set_index("particle").particle_name.loc[stack.particles.numpy()]
    classes = names.str.startswith("001").to_numpy().astype(int)
    own = [stack.tilt[torch.isin(stack.particle, stack.particles[classes == c])] for c in (0, 1)]
    if not all(torch.allclose(getattr(own[0], f).float(), getattr(own[1], f).float(), atol=0.01) for f in ("dose", "tilt_angle", "order")):
        raise SystemExit("Doses or angles of the two classes differ; they would give the classes away.")
    return stack, classes


def make_noise(stack: ParticleStack, seed: int) -> ParticleStack:
    "Return the stack with white noise for images."
    images = stack.read_images(torch.arange(stack.n_images))
    noise = images.std() * torch.randn(images.shape, generator=make_generator(seed, "noise images"))
    return dataclasses.replace(stack, images=noise, source_row=torch.arange(stack.n_images), table=None)


def list_changes(setting: str, options: argparse.Namespace) -> dict:
    "Return what differs from a preset."
    if setting == "subspace":
        return SUBSPACE
    changes = {"model.encoder_dim": options.width, "model.decoder_dim": options.width, "train.n_tilts": 8, "train.epochs": options.epochs}
    return changes | {"train.learning_rate": options.learning_rate, "train.schedule": options.schedule} | ({"train.batch_size": 1} if setting == "et" else {})


def find_latents(setting: str, changes: dict, stack: ParticleStack, seed: int) -> tuple[Latents, dict]:
    "Fit or train; return the latents and the last losses."
    if setting == "subspace":
        dataset = ParticleDataset(stack, in_memory=True)
        fit = fit_subspace(dataset, seed=seed, **changes)
        return Latents(fit.mu, fit.logvar, dataset.particles), {}
    with tempfile.TemporaryDirectory() as folder:
        rest = {"train.seed": seed, "train.keep_last": 1, "train.encode_every": 0, "train.n_workers": 0}
        run = train_run(Path(folder) / "run", make_config(preset=setting, changes={**changes, **rest}), stack=stack, device="cpu")
        log = read_log(run)
        return run.load_latents(), {name: float(log[name][-1]) for name in ("recon", "kl")}


def judge(setting: str, kind: str, seed: int, *, changes: dict, data: Path, n_particles: int | None) -> dict:
    "Return a line of the table."
    stack, classes = load_classes(data, n_particles)
    start = time.process_time()
    latents, losses = find_latents(setting, changes, stack if kind == "images" else make_noise(stack, seed), seed)
    seconds = time.process_time() - start
    found, mixture = (compute_label_accuracy(cluster(latents, 2, seed=seed).labels, classes) for cluster in (cluster_kmeans, cluster_gmm))
    values = {"ari": found.ari, "accuracy": found.accuracy, "ari_gmm": mixture.ari, "recon": None, "kl": None, "cpu_s": seconds, **losses}
    return {"setting": setting, "input": kind, "seed": seed, "changes": json.dumps(changes), **{name: None if v is None else round(v, 4) for name, v in values.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=INPUTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=128, help="of encoder and decoder")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--quick", action="store_true", help="48 particles, one epoch, one seed: half a minute")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/tilt_classes.csv"))
    options = parser.parse_args()
    if not os.environ.get("RECON_NB_DATA"):
        sys.exit("Set RECON_NB_DATA to the folder of test data (it holds tomo/simulated_10076).")
    if options.quick:
        options.width, options.epochs, options.seeds = 16, 1, options.seeds[:1]
    torch.set_num_threads(1)
    keep_freed_memory()
    done = {tuple(row) for row in pd.read_csv(options.out)[list(KEYS)].astype({"seed": int}).to_numpy().tolist()} if options.out.exists() else set()
    for seed in options.seeds:
        for setting in options.settings:
            changes = list_changes(setting, options)
            for kind in options.inputs:
                if (setting, kind, seed, json.dumps(changes)) in done:
                    continue
                row, fresh = judge(setting, kind, seed, changes=changes, data=Path(os.environ["RECON_NB_DATA"]), n_particles=48 if options.quick else None), not options.out.exists()
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with open(options.out, "a", newline="") as file:
                    writer = csv.DictWriter(file, (*KEYS, *FOUND), lineterminator="\n")
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
    table = pd.read_csv(options.out)
    print(table.to_string(index=False, na_rep=""))
    print(table.groupby(["setting", "input", "changes"], sort=False).ari.agg(["size", "min", "mean", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
