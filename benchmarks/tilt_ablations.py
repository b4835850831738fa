"""What the papers took away from their methods, taken away here one at a time, on S3 (see bench_s3.py).

    python benchmarks/tilt_ablations.py --ablation poses|zdim|network|tilts|dose [...] [--data bench/s3] [--keep FOLDER] [--quick]

| ablation | what changes |
|---|---|
| poses | errors of 1, 2, 3, 5 and 10 degrees (root mean square of the angle) in the orientations that are given, one for all tilts of a particle |
| zdim | latent of 2, 4, 8, 16 dimensions |
| network | width and depth of encoder and decoder |
| tilts | 1, 3, 10 or all 41 tilts of every particle, those of lowest dose, or others at every visit; the mean pools them (all 41 only in the closed form, for their cost) |
| dose | dose and tilt in the forward model, in the weights of the error, or nowhere (at 13.1 Å/px the lattice mask has nothing to leave out; the closed form knows no weights) |

Everything else stays as in BASE: cryoDRGN-ET's preset (dose in the model, ten lowest-dose tilts, zdim 8) with what one thread can afford: networks of 128x3 for 1024x3, the encoder sees five Fourier
pixels of 16, a step has eight particles and looks at a quarter of their coefficients, inside a radius that grows from half to three quarters of Nyquist, learning rate in one cycle up to 2e-3, and eight epochs, after which the classes are
still being learnt: an ablation shows how fast a setting learns, not where it ends. `network` rows start from nothing. `subspace` rows are `recon subspace` (rank 4, linear) on
the same images; it looks at the same ones at every pass, so that for it random tilts are one draw.

Scores: accuracy of k-means (4) and of the vote of 20 held-out neighbours (parity_cryodrgn.py) against the true class; frequency (cycles/px) where the FSC of the volume decoded at the mean latent of a
class with its true map falls below .5, inside a soft mask, and area below the FSC of the differences between the classes (see bench_s3.py), means over classes; training loss; CPU seconds of the fit. One seed each, and two more of BASE for the spread.
Rows replace the former ones of their ablation and method in tilt_ablations.csv.
"""

import argparse
import dataclasses
import itertools
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench_s3 import compare_differences, compare_maps, make_soft_mask, pick_particles, prepare_set, read_truth, score_clusters, start_job, summarize_curves
from parity_cryodrgn import vote_labels

from recon_nb.core import Poses, Volume, make_generator
from recon_nb.datasets import ParticleStack, load_stack
from recon_nb.runs import RunFolder, make_config
from recon_nb.so3 import rotvec_to_matrix
from recon_nb.subspace import run_subspace
from recon_nb.tiltsampling import choose_tilts
from recon_nb.training import load_model, train_run

BASE = {"model.encoder_dim": 128, "model.decoder_dim": 128, "model.encoder_radius": 5.0, "train.n_tilts": 10, "train.batch_size": 8, "train.pixel_fraction": 0.25, "train.start_radius": 0.5,
        "train.radius_epochs": 16.0, "train.learning_rate": 2e-3, "train.schedule": "one-cycle", "train.epochs": 8, "train.encode_every": 0}
SUBSPACE = {"model.encoder_radius": None, "train.start_radius": 1.0, "model.manifold": "linear", "model.rank": 4, "subspace.test": False}
MEAN = {"model.pooling": "mean"}  # concatenation would need as many places as tilts
ABLATIONS = {  # value to what differs from BASE; "pose_error" is not a setting
    "poses": {f"{deg}": {"pose_error": deg} for deg in (0, 1, 2, 3, 5, 10)},
    "zdim": {f"{z}": {"model.zdim": z} for z in (2, 4, 8, 16)},
    "network": {f"{width}x{depth}": {"model.encoder_dim": width, "model.decoder_dim": width, "model.encoder_layers": depth, "model.decoder_layers": depth} for width, depth in ((32, 3), (64, 3), (128, 1), (128, 3), (256, 3))},
    "tilts": {f"{n} {sampling}": {"train.n_tilts": n, "train.tilt_sampling": sampling, **MEAN}
              for n, sampling in ((1, "dose"), (1, "random"), (3, "dose"), (3, "random"), (10, "dose"), (10, "random"), (41, "dose"))},
    "dose": {"model": {}, "weight": {"model.dose": "weight"}, "off": {"model.dose": "off"}},
}
WITH_SUBSPACE = ("poses", "tilts", "dose")
SKIPPED = (("network", "41 dose"), ("subspace", "weight"))


def turn_particles(stack: ParticleStack, degrees: float, seed: int) -> ParticleStack:
    """Return the stack with an error in the orientation of every particle, the same in all of its tilts."""
    rotvec = torch.randn(int(stack.particles[-1]) + 1, 3, generator=make_generator(seed, "ablation", "poses"), dtype=torch.float64) * (math.radians(degrees) / math.sqrt(3))
    error = rotvec_to_matrix(rotvec)[stack.particle].to(stack.poses.rot)
    return dataclasses.replace(stack, poses=Poses(stack.poses.rot @ error, stack.poses.shift))


def score_run(run: RunFolder, label: np.ndarray, truth: list[Volume]) -> dict[str, float]:
    """Score latents and the volumes of the classes that k-means finds."""
    z, model = run.load_latents().mu, load_model(run, device="cpu")
    scores, assigned = score_clusters(z, label, len(truth))
    classes = np.unique(assigned)
    volumes = model.decode_volumes(torch.stack([z[torch.from_numpy(assigned == c)].mean(0) for c in classes]))
    maps = {int(c): Volume(v, truth[0].pixel_size) for c, v in zip(classes, volumes, strict=True)}
    summarize = lambda curves: summarize_curves([c.fsc.tolist() for c in curves], truth[0].box)
    reached, differ = summarize(compare_maps(maps, truth, [make_soft_mask(v) for v in truth])), summarize(compare_differences(maps, truth))
    log = pd.read_csv(run.path / "log.csv")
    return {"accuracy": scores["accuracy"], "vote": vote_labels(z.numpy(), label), "fsc_half": reached["half_mean"], "difference_area": differ["area_mean"],
            "recon": float(log["recon"].iloc[-1]) if "recon" in log else None}


def run_job(job: dict, stack: ParticleStack) -> list[dict]:
    """Do one fit."""
    changes = dict(job["changes"])
    pose_error = changes.pop("pose_error", 0.0)
    config = make_config(preset="et", changes=changes)
    stack = turn_particles(stack, pose_error, job["seed"])
    label, truth = read_truth(Path(job["data"]))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        if job["method"] == "subspace":
            stack = stack.take(choose_tilts(stack, config.train.n_tilts, config.train.tilt_sampling, seed=job["seed"]))
            run = run_subspace(Path(folder) / "run", config, stack=stack, device="cpu")
        else:
            run = train_run(Path(folder) / "run", config, stack=stack, device="cpu")
        seconds = time.process_time() - begin
        scores = score_run(run, label[stack.particles.numpy()], truth)
    epochs = None if job["method"] == "subspace" else config.train.epochs
    return [{name: job[name] for name in ("ablation", "value", "method", "seed")} | scores | {"cpu_s": seconds, "particles": stack.n_particles, "epochs": epochs}]


def list_jobs(options: argparse.Namespace) -> list[dict]:
    """Return the fits, subspace first, which is quick; a fit that several ablations share is named once, by what it differs in."""
    jobs = []
    quick = {"train.epochs": 1, "model.rank": 3} if options.quick else {}
    for method, name in itertools.product(options.methods, options.ablation):
        if method == "network" or name in WITH_SUBSPACE:
            for value, changes in list(ABLATIONS[name].items())[: 2 if options.quick else None]:
                if (method, value) in SKIPPED:
                    continue
                settings = BASE | changes | (SUBSPACE if method == "subspace" else {}) | quick
                jobs.append({"ablation": name, "value": value, "method": method, "seed": 0, "changes": {"train.seed": 0, **settings}})
    if not options.quick:
        jobs += [{"ablation": "seed", "value": f"{seed}", "method": "network", "seed": seed, "changes": {"train.seed": seed, **BASE}} for seed in ((1, 2) if options.seeds else ())]
    return [job | {"data": str(options.data), "setting": job["method"], "start": name_fit(job), "tilts": f"seed{job['seed']}"} for job in jobs]


def name_fit(job: dict) -> str:
    """Return a name that is the same for the same fit: what differs from BASE."""
    base = BASE | (SUBSPACE if job["method"] == "subspace" else {})
    defaults = {"model.zdim": 8, "model.encoder_layers": 3, "model.decoder_layers": 3, "train.tilt_sampling": "dose", "pose_error": 0} | base
    return "-".join(f"{k.split('.')[-1]}={v}" for k, v in sorted(job["changes"].items()) if k != "train.seed" and defaults.get(k) != v) or "base"


def write_table(rows: list[dict], out: Path) -> pd.DataFrame:
    """Put rows in the place of the former ones of their ablations and methods."""
    table, path = pd.DataFrame(rows).round(5), out / "tilt_ablations.csv"
    if path.exists():
        former = pd.read_csv(path, dtype={"value": str})
        new = set(zip(table["ablation"], table["method"]))
        table = pd.concat([former[[pair not in new for pair in zip(former["ablation"], former["method"])]], table])
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def main() -> None:
    """Parse the command line, fit what is asked for, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--methods", nargs="+", choices=("subspace", "network"), default=["subspace", "network"])
    parser.add_argument("--data", type=Path, default=Path("bench/s3"), help="folder of S3, made where it is missing")
    parser.add_argument("--particles", type=int, help="so many drawn at random; all unless given")
    parser.add_argument("--seeds", action="store_true", help="two more seeds of BASE")
    parser.add_argument("--keep", type=Path, help="folder of results that are done; a fit that several ablations share is done once")
    parser.add_argument("--quick", action="store_true", help="40 particles, one epoch, two values: does it run?")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not prepare_set(options.data):
        return
    torch.set_num_threads(1)
    stack = pick_particles(load_stack(options.data / "particles.star"), 40 if options.quick else options.particles)
    with tempfile.TemporaryDirectory() as temporary:
        kept, rows = options.keep or Path(temporary), []
        kept.mkdir(parents=True, exist_ok=True)
        for job in list_jobs(options):
            rows += [row | {name: job[name] for name in ("ablation", "value")} for row in start_job(job, kept, stack, run_job)]
            print({name: round(v, 4) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
            table = write_table(rows, options.output)  # after every fit: a table that is cut short is still one
    print(table.to_string(index=False, float_format="%.4f", na_rep=""))


if __name__ == "__main__":
    main()
