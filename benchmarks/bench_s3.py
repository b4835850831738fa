"""Four states of a ribosome in tilt series, by both published settings, from the subspace and from nothing; and what one tilt would give.

    python benchmarks/bench_s3.py [--data bench/s3] [--keep FOLDER] [--quick]

S3 is made, where it is missing, from the models in the folder named by RECON_NB_DATA, by

    python benchmarks/make_data.py --set s3 --seed 0 -o bench/s3

It holds 4 x 250 particles x 41 tilts of 32 px (13.1 Å) to 60 degrees, dose-symmetric, 3 e/Å² each; structural SNR 1.4 (one field per particle, seen by all its tilts), shot SNR .1, both after
the CTF. The settings are the presets: `tomodrgn` (dose and tilt weigh the error, random tilts, lattice mask, AdamW) and `et` (dose and tilt in the model, the ten lowest-dose tilts,
concatenated). For one thread the networks are 128x3, a step has eight particles of ten tilts and looks at a quarter of their coefficients, whose radius grows from half to all of Nyquist while
training, the tilt encoder sees five Fourier pixels of 16, and the learning rate makes one cycle up to 2e-3 (CHANGES).

| start | what |
|---|---|
| closed form | `recon subspace` on all tilts, its sums over the tilts of a particle; dose and tilt in the model for et, not used for tomodrgn (here the presets differ in nothing else) |
| subspace | `recon train --start subspace`: the encoder is the closed-form subspace, fitted to all tilts of every particle, and does not change; the network learns the volumes alone |
| nothing | `recon train`: the two-stage tilt encoder and the volumes, both from random weights |
| nothing, beta 0.3 | the same for tomodrgn, whose prior weighs about three times as much as et's at full radius, with a weight like that |

As the paper's control, `closed form` and `nothing` are repeated on a set that keeps one tilt of every particle, drawn at random. Rows of s3.csv: accuracy and adjusted Rand index of k-means (4) of the latents against the
truth; the frequency (cycles/px) at which the FSC of the volume decoded at the mean latent of a class with its true map falls below .5, of the worst class and the mean of four, inside a soft mask of
the true map and without one (.5 is Nyquist: it never does), and the area (at most 1) below the FSC of the differences between the classes, maps minus their mean against true maps minus theirs, which says more; CPU seconds from the images to the finished run (preparing, encoding and writing included, imports and compiled kernels not) and those until the first
step. `told` backprojects the true classes; `one map for all` is the mean of the true maps beside each of them: what these scores give to who saw no difference.
One thread. s3_epochs.csv has accuracy and loss by epoch, s3_fsc.csv the curves; s3.png shows latents, curves and projections of the maps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recon_nb.consensus import backproject_stack
from recon_nb.core import Volume, make_generator, okabe_ito
from recon_nb.datasets import ParticleStack, load_stack
from recon_nb.files import read_volume
from recon_nb.fsc import FSCCurve, compute_fsc, find_crossing
from recon_nb.heterogeneity import compute_difference_fsc, integrate_fsc
from recon_nb.latent import cluster_kmeans, compute_label_accuracy, run_pca
from recon_nb.runs import RunConfig, RunFolder, make_config
from recon_nb.subspace import run_subspace
from recon_nb.tiltsampling import choose_tilts
from recon_nb.training import load_model, train_run
from recon_nb.volumes import make_mask

CHANGES = {"model.encoder_dim": 128, "model.decoder_dim": 128, "model.encoder_radius": 5.0, "train.n_tilts": 10, "train.batch_size": 8, "train.pixel_fraction": 0.25, "train.start_radius": 0.5,
           "train.learning_rate": 2e-3, "train.schedule": "one-cycle"}
STARTS = {"closed form": {"model.encoder": "subspace", "model.encoder_radius": None, "model.manifold": "network", "model.zdim": 2, "model.rank": 4, "subspace.test": False},
          "subspace": {"model.encoder": "subspace", "model.encoder_radius": None, "model.manifold": "network", "model.zdim": 2, "model.rank": 4, "train.epochs": 4, "train.radius_epochs": 2.0, "train.encode_every": 0,
                       "train.teach_steps": 600},
          "nothing": {"train.epochs": 30, "train.radius_epochs": 30.0, "train.encode_every": 5}}
STARTS["nothing, beta 0.3"] = {**STARTS["nothing"], "model.beta": 0.3}
QUICK = {"train.epochs": 1, "train.teach_steps": 10, "model.rank": 3, "model.manifold": "linear", "model.zdim": 3}
SETTINGS = ("tomodrgn", "et")
SKIPPED = {("et", "nothing, beta 0.3", "41"), *((setting, start, "1") for setting in SETTINGS for start in ("subspace", "nothing, beta 0.3"))}


def read_truth(data: Path) -> tuple[np.ndarray, list[Volume]]:
    """Return the state (P,) of every particle and the true maps."""
    label = pd.read_csv(data / "truth.csv").groupby("particle")["label"].first().to_numpy()
    return label, [read_volume(path) for path in sorted((data / "volumes").glob("*.mrc"))]


def keep_random_tilt(stack: ParticleStack, seed: int) -> ParticleStack:
    """Return the stack with one image of every particle."""
    return stack.take(choose_tilts(stack, 1, "random", seed=seed))


def pick_particles(stack: ParticleStack, n: int | None, seed: int = 0) -> ParticleStack:
    """Return the stack of n particles drawn at random, or all."""
    return stack if n is None else stack.select(stack.particles[torch.randperm(stack.n_particles, generator=make_generator(seed, "s3", "pick"))[:n]])


def score_clusters(z: torch.Tensor, label: np.ndarray, n_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """Return the agreement of k-means with the truth, and the class (P,) that every particle was put into."""
    clusters = cluster_kmeans(z, n_classes)
    found = compute_label_accuracy(clusters.labels, label)
    named = np.array([found.naming.get(c, c) for c in range(n_classes)])
    return {"accuracy": found.accuracy, "ari": found.ari}, named[clusters.labels]


def summarize_curves(curves: list[list[float]], box: int) -> dict[str, float]:
    """Return where the curves of the classes fall below .5 (cycles/px) and the area below them, of the worst class and the mean."""
    fsc = torch.tensor(curves, dtype=torch.float64)
    half, area = find_crossing(fsc, 0.5)[0] / box, integrate_fsc(fsc, box)
    return {"half_worst": float(half.min()), "half_mean": float(half.mean()), "area_worst": float(area.min()), "area_mean": float(area.mean())}


def make_soft_mask(volume: Volume) -> Volume:
    """Return a mask two pixels around the particle with an edge of three."""
    return make_mask(volume, dilation=2 * volume.pixel_size, edge=3 * volume.pixel_size)


def compare_maps(maps: dict[int, Volume], truth: list[Volume], masks: list[Volume] | None = None) -> list[FSCCurve]:
    """Return the FSC of the maps of classes with the true ones; 0 for a class that nobody found."""
    empty = Volume(torch.zeros_like(truth[0].data), truth[0].pixel_size)
    place = lambda found, like: Volume(found.data, like.pixel_size, like.origin)  # pixel sizes of star and map differ in the sixth digit
    return [compute_fsc(place(maps.get(c, empty), v), v, mask=None if masks is None else masks[c]) for c, v in enumerate(truth)]


def compare_differences(maps: dict[int, Volume], truth: list[Volume]) -> list[FSCCurve]:
    """Return the FSC of the differences of the maps from their mean with those of the true maps."""
    found = torch.stack([maps[c].data if c in maps else torch.zeros_like(v.data) for c, v in enumerate(truth)])
    curves = compute_difference_fsc(list(zip(found, [v.data for v in truth], strict=True)), mask=torch.stack([make_soft_mask(v).data for v in truth]).amax(0))
    return [FSCCurve(curve, truth[0].box, truth[0].pixel_size) for curve in curves]


def backproject_classes(stack: ParticleStack, assigned: np.ndarray, n_classes: int) -> dict[int, Volume]:
    """Return a map of the particles of every class that has at least two."""
    members = {c: stack.particles[torch.from_numpy(assigned == c)] for c in range(n_classes)}
    return {c: backproject_stack(stack.select(rows), dose="model").map for c, rows in members.items() if len(rows) > 1}


def summarize_maps(curves: dict[str, list[list[float]]], box: int) -> dict[str, float]:
    """Return the columns of a row: crossings of the maps' curves, areas of those of their differences."""
    columns = {"decoded": ("half_worst", "half_mean"), "unmasked": ("half_worst", "half_mean"), "differences": ("area_worst", "area_mean")}
    return {f"{kind}_{what}": summarize_curves(found, box)[what] for kind, found in curves.items() for what in columns[kind]}


def score_told(stack: ParticleStack, label: np.ndarray, truth: list[Volume]) -> list[dict]:
    """Score the backprojection of the true classes, and the mean of the true maps."""
    masks = [make_soft_mask(v) for v in truth]
    maps = backproject_classes(stack, label, len(truth))
    told = {"decoded": compare_maps(maps, truth, masks), "unmasked": compare_maps(maps, truth), "differences": compare_differences(maps, truth)}
    mean = Volume(torch.stack([v.data for v in truth]).mean(0), truth[0].pixel_size)
    same = {c: mean for c in range(len(truth))}
    consensus = {"decoded": compare_maps(same, truth, masks), "unmasked": compare_maps(same, truth)}
    return [{"setting": "told", "start": "", "tilts": "41", "accuracy": 1.0, "ari": 1.0, "curves": {name: [c.fsc.tolist() for c in found] for name, found in told.items()}},
            {"setting": "one map for all", "start": "", "tilts": "", "curves": {name: [c.fsc.tolist() for c in found] for name, found in consensus.items()}}]


def fit_run(config: RunConfig, stack: ParticleStack, folder: Path, *, is_closed: bool) -> tuple[RunFolder, dict]:
    """Make a run; return it and the CPU seconds that it took, and those until the first step."""
    begin, clock = time.process_time(), []
    if is_closed:
        run = run_subspace(folder / "run", config, stack=stack, device="cpu")
    else:
        run = train_run(folder / "run", config, stack=stack, device="cpu", on_step=lambda *_: clock or clock.append(time.process_time() - begin))
    seconds = time.process_time() - begin
    return run, {"cpu_s": seconds, "start_s": clock[0] if clock else seconds}


def score_run(run: RunFolder, label: np.ndarray, truth: list[Volume]) -> dict:
    """Score the latents of a run, and the volumes decoded at the mean latents of the classes that k-means finds."""
    log = pd.read_csv(run.path / "log.csv").set_index("epoch").get("recon", pd.Series(dtype=float))
    epochs = [{"epoch": e, **score_clusters(run.load_latents(e).mu, label, len(truth))[0], "recon": float(log[e])} for e in log.index.tolist() if (run.path / "latents" / f"{e:04d}.npz").exists()]
    z, model = run.load_latents().mu, load_model(run, device="cpu")
    scores, assigned = score_clusters(z, label, len(truth))
    classes, masks = np.unique(assigned), [make_soft_mask(v) for v in truth]
    centers = torch.stack([z[torch.from_numpy(assigned == c)].mean(0) for c in classes])
    maps = {int(c): Volume(v, truth[0].pixel_size) for c, v in zip(classes, model.decode_volumes(centers), strict=True)}
    curves = {"decoded": compare_maps(maps, truth, masks), "unmasked": compare_maps(maps, truth), "differences": compare_differences(maps, truth)}
    sections = [maps[c].data.sum(0).tolist() if c in maps else None for c in range(len(truth))]
    return {**scores, "n_epochs": len(log), "epochs": epochs, "sections": sections,
            "curves": {name: [c.fsc.tolist() for c in found] for name, found in curves.items()}, "points": run_pca(z).coordinates[:, :2].tolist(), "label": label.tolist()}


def run_job(job: dict, stack: ParticleStack) -> list[dict]:
    """Do one fit."""
    label, truth = read_truth(Path(job["data"]))
    label = label[stack.particles.numpy()]
    if job["setting"] == "told":
        return score_told(stack, label, truth)
    shown = keep_random_tilt(stack, job["changes"]["train.seed"]) if job["tilts"] == "1" else stack
    with tempfile.TemporaryDirectory() as folder:
        run, times = fit_run(make_config(preset=job["setting"], changes=job["changes"]), shown, Path(folder), is_closed=job["start"] == "closed form")
        found = score_run(run, label, truth)
    return [{name: job[name] for name in ("setting", "start", "tilts")} | found | times]


def list_jobs(options: argparse.Namespace) -> list[dict]:
    """Return the fits, those on all tilts first."""
    settings, jobs = {"train.seed": options.seed, **json.loads(options.changes), **(QUICK if options.quick else {})}, []
    for tilts in ("41", "1"):
        for start in options.starts:
            jobs += [{"setting": setting, "start": start, "tilts": tilts, "changes": CHANGES | STARTS[start] | ({"train.n_tilts": 1} if tilts == "1" else {}) | settings} for setting in options.settings if (setting, start, tilts) not in SKIPPED]
    jobs = [{"setting": "told", "start": "", "tilts": "41", "changes": {}}, *jobs]
    return [job | {"data": str(options.data)} for job in jobs]


def start_job(job: dict, kept: Path, stack: ParticleStack, do: Callable[[dict, ParticleStack], list[dict]] = run_job) -> list[dict]:
    """Do one fit, unless its result is there already."""
    out = kept / f"{'_'.join(job[name] for name in ('setting', 'start', 'tilts')).replace(' ', '_')}.json"
    if not out.exists():
        out.write_text(json.dumps(do(job, stack)))
    return json.loads(out.read_text())


def list_columns(fits: list[dict]) -> list[tuple[str, str]]:
    """Return setting and start of the columns of the picture."""
    return sorted({(r["setting"], r["start"]) for r in fits}, key=lambda pair: (SETTINGS.index(pair[0]), list(STARTS).index(pair[1])))


def draw_points(fits: list[dict], axes: np.ndarray, n_classes: int) -> None:
    """Draw latents by class: a row for all tilts and one for a single one."""
    columns = list_columns(fits)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for r in fits:
        ax, points, label = axes[int(r["tilts"] == "1"), columns.index((r["setting"], r["start"]))], np.array(r["points"]), np.array(r["label"])
        for c in range(n_classes):
            ax.plot(*points[label == c].T, ".", ms=1.5, color=okabe_ito[c])
        ax.set_frame_on(True)
        ax.set_title(f"{r['setting']}, {r['start']}\naccuracy {r['accuracy']:.3f}", fontsize=8)
    for ax, text in zip(axes[:, 0], ("all tilts", "one random tilt"), strict=True):
        ax.set(ylabel=text)


def draw_curves(results: list[dict], axes: np.ndarray, box: int) -> None:
    """Draw accuracy against CPU time, and the curves of the worst class."""
    for r in results:
        if r["tilts"] == "1":
            continue
        name = r["setting"] + (f", {r['start']}" if r["start"] else "")
        style = dict(color=okabe_ito[list(STARTS).index(r["start"])] if r["start"] else "0.4", ls={"tomodrgn": "--", "et": "-", "told": ":"}.get(r["setting"], "-."), lw=1.2)
        if r.get("epochs") or r["start"] == "closed form":
            seconds = [r["start_s"] + (r["cpu_s"] - r["start_s"]) * e["epoch"] / r["n_epochs"] for e in r["epochs"]] or [r["cpu_s"]]
            axes[0].plot(seconds, [e["accuracy"] for e in r["epochs"]] or [r["accuracy"]], label=name, marker=".", **style)
        for ax, kind in zip(axes[1:], ("decoded", "differences"), strict=True):
            if kind in r["curves"]:
                ax.plot(np.arange(1, box // 2 + 1) / box, np.mean(r["curves"][kind], 0)[1:], label=name, **style)
    axes[0].set(xlabel="CPU seconds, one thread (epochs spread evenly)", ylabel="accuracy of k-means", ylim=(0, 1.03), xlim=(0, None))
    for ax, text in zip(axes[1:], ("FSC of class maps with the truth", "FSC of differences between classes"), strict=True):
        ax.set(xlabel="frequency (cycles/px)", ylabel=f"{text},\nmean of four", ylim=(-0.05, 1.03))
        ax.axhline(0.5, color="0.6", lw=0.5)
    axes[1].legend(fontsize=7, loc="lower left")


def draw_results(results: list[dict], truth: list[Volume], out: Path) -> None:
    """Draw latents, curves, and the projections of true and decoded maps."""
    from matplotlib.figure import Figure

    fits = [r for r in results if "points" in r]
    fig = Figure(figsize=(12, 9.5), layout="constrained")
    upper, middle, lower = fig.subfigures(3, 1, height_ratios=[2, 1.5, 1])
    draw_points(fits, upper.subplots(2, len(list_columns(fits)), squeeze=False), len(truth))
    draw_curves(results, middle.subplots(1, 3), truth[0].box)
    rows = [("truth", [v.data.sum(0).numpy() for v in truth])] + [(f"{r['setting']}, {r['start']}", r["sections"]) for r in fits if r["tilts"] != "1"]
    for ax, (name, images) in zip(lower.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        scaled = [np.zeros((truth[0].box,) * 2) if i is None else (np.array(i) - np.mean(i)) / np.std(i) for i in images]
        ax.imshow(np.block([[scaled[0], scaled[1]], [scaled[2], scaled[3]]]), cmap="gray")
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=8)
    fig.savefig(out, dpi=80)


def brief_result(result: dict, box: int) -> dict:
    """Return the row of a fit."""
    return {name: v for name, v in result.items() if name not in ("curves", "points", "label", "sections", "epochs")} | summarize_maps(result["curves"], box)


def write_tables(results: list[dict], truth: list[Volume], out: Path) -> pd.DataFrame:
    """Write rows, epochs, curves and picture."""
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([brief_result(r, truth[0].box) for r in results])
    table.round(4).to_csv(out / "s3.csv", index=False)
    keys = ("setting", "start", "tilts")
    pd.DataFrame([{**{k: r[k] for k in keys}, **e} for r in results for e in r.get("epochs", ())]).round(5).to_csv(out / "s3_epochs.csv", index=False)
    shells = [{**{k: r[k] for k in keys}, "map": kind, "class": c, "cycles_per_px": s / truth[0].box, "fsc": v}
              for r in results for kind, curves in r["curves"].items() for c, curve in enumerate(curves) for s, v in enumerate(curve)]
    pd.DataFrame(shells).round(4).to_csv(out / "s3_fsc.csv", index=False)
    draw_results(results, truth, out / "s3.png")
    return table


def prepare_set(data: Path) -> bool:
    """Make S3 where it is missing; return whether it is there."""
    if (data / "particles.star").exists():
        return True
    if "RECON_NB_DATA" not in os.environ:
        print(f"{data} is missing and RECON_NB_DATA, the folder of the models to make it from, is not set; nothing measured.")
        return False
    subprocess.run([sys.executable, Path(__file__).with_name("make_data.py"), "--set", "s3", "--seed", "0", "-o", data], check=True)
    return True


def main() -> None:
    """Parse the command line, fit what is asked for, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench/s3"), help="folder of S3")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the tilt that the control keeps")
    parser.add_argument("--changes", default="{}", help="settings that differ from CHANGES, as JSON")
    parser.add_argument("--keep", type=Path, help="folder of results that are done")
    parser.add_argument("--quick", action="store_true", help="40 particles, one epoch: does it run?")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not prepare_set(options.data):
        return
    torch.set_num_threads(1)
    stack = pick_particles(load_stack(options.data / "particles.star"), 40 if options.quick else None)
    with tempfile.TemporaryDirectory() as temporary:
        kept, results = options.keep or Path(temporary), []
        kept.mkdir(parents=True, exist_ok=True)
        for job in list_jobs(options):
            results += start_job(job, kept, stack)
            print({name: round(v, 4) if isinstance(v, float) else v for name, v in brief_result(results[-1], stack.box).items()}, flush=True)
        table = write_tables(results, read_truth(options.data)[1], options.output)
    print(table.to_string(index=False, float_format="%.4f", na_rep=""))


if __name__ == "__main__":
    main()
