"""The linear subspace beside the truth, a network that starts from it, and cryoDRGN 4.3.1: quality and CPU seconds together.

    python benchmarks/bench_subspace.py [--data bench] [--sets s2u s2c s2n s1] [--tables 1 2 3 4] [--seeds 3] [--box 64] [--quick]
    python benchmarks/bench_subspace.py --sets s2u --tables --peer PEER_RUN --peer-python PATH/TO/PYTHON --peer-seconds 391 --peer-epochs 1 9

Sets are folders SET_BOX below --data. Those that are missing are made, from the atomic models in the folder named by RECON_NB_DATA, by

    python benchmarks/make_data.py --set s2_uniform        --box 64 --n 10000 --snr 0.1 --seed 0 -o bench/s2u_64
    python benchmarks/make_data.py --set s2_cooperative    --box 64 --n 10000 --snr 0.1 --seed 0 -o bench/s2c_64
    python benchmarks/make_data.py --set s2_noncontiguous  --box 64 --n 10000 --snr 0.1 --seed 0 -o bench/s2n_64
    python benchmarks/make_data.py --set s1                --box 64 --n 10000 --snr 0.1 --seed 0 -o bench/s1_64

| table | what |
|---|---|
| 1 | `recon subspace` without its analysis, three seeds, the first of the first set with the test for heterogeneity; the same with a linear latent; the oracle: one M-step of the method given the true state (nine orthonormal polynomials of it, or indicators of the classes) |
| 2 | one-dimensional latent, five seeds: Spearman's correlation with the true state, also inside each cluster of Noncontiguous |
| 3 | `recon train --start subspace --teach-steps 2500`: a 256x3 network that is taught the grid's volumes (epoch 0), then sees images; by epoch, beside the grid by shell. "start_s": CPU seconds until the grid was there |
| 4 | fitted to a random half of the particles, the other half encoded; and the path along z |

Every fit runs in a fresh process with one thread; "cpu_s" is that process's CPU time from its start to the finished run folder: imports, reading and writing included, scoring
not. The kernels were compiled before (a first run on a new machine waits for numba once: `warm up` says how long). kNN, class accuracy: as in parity_cryodrgn.py. AUC and dAUC over
100 particles, each at its own z. With --peer a finished or running run of cryoDRGN on the same set is scored, its volumes at --peer-epochs; --peer-seconds are its CPU seconds for an epoch, as `ps -o time` said.

Results: FOLDER/*.json for each fit as it is done (given --keep, such fits are not repeated), then subspace.csv, subspace_fsc.csv (by shell), subspace_fsc.png (network and grid, where tables 1 and 3 are there), subspace_path.csv and subspace_path.png in -o.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from parity_cryodrgn import read_truth, vote_labels
from scipy.stats import spearmanr

from recon_nb.core import make_generator
from recon_nb.heterogeneity import EnsembleScore, VolumePairs, score_ensemble
from recon_nb.latent import compute_knn_correlation
from recon_nb.lowrank import basis_to_volumes
from recon_nb.ppca import compute_whitening, solve_subspace, sum_moments
from recon_nb.runs import RunConfig, RunFolder, make_config
from recon_nb.subspace import run_subspace
from recon_nb.training import encode_all, load_dataset, load_model, train_run

NAMES = {"s2u": "s2_uniform", "s2c": "s2_cooperative", "s2n": "s2_noncontiguous", "s1": "s1"}
CLUSTERS = ((0, 17), (18, 32), (33, 49))  # states of s2_noncontiguous
N_SCORED, N_FEATURES = 100, 9
NETWORK = {"model.encoder": "subspace", "model.manifold": "network", "model.zdim": 2, "model.decoder": "positional", "model.decoder_dim": 256, "model.decoder_layers": 3,
           "train.teach_steps": 2500, "train.batch_size": 32, "train.learning_rate": 2e-4, "train.schedule": "one-cycle", "train.epochs": 2, "train.pixel_fraction": 0.25,
           "train.encode_every": 0}
Truth = tuple[np.ndarray, list[torch.Tensor], bool]


def score_latents(z: np.ndarray, truth: Truth, *, name: str) -> dict[str, float]:
    """Return what the latents (P, Z) of all particles say about the truth."""
    label = truth[0]
    if truth[2]:
        return {"accuracy": vote_labels(z, label)}
    scores = {"knn": compute_knn_correlation(z, label)}
    if z.shape[1] == 1:
        scores["spearman"] = abs(spearmanr(z[:, 0], label)[0])
        if name == "s2n":
            inside = [(label >= low) & (label <= high) for low, high in CLUSTERS]
            scores |= {f"inside_{i}": abs(spearmanr(z[q, 0], label[q])[0]) for i, q in enumerate(inside)}
    return scores


def score_volumes(decode, rows: np.ndarray, truth: Truth) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return AUC and dAUC, and both curves by shell; `decode(rows)` makes the volumes of some particles."""
    volumes = decode(rows)
    found: EnsembleScore = score_ensemble(VolumePairs(lambda i: volumes[i], lambda i: truth[1][truth[0][rows[i]]], len(rows)))
    curves = {"fsc": found.average(found.fsc).tolist(), "difference_fsc": found.average(found.difference_fsc).tolist()}
    return {name: value for name, value in found.summarize().items() if name in ("auc", "dauc")}, curves


def pick_rows(n: int, n_scored: int = N_SCORED) -> np.ndarray:
    """Return the particles whose volumes are scored."""
    return torch.randperm(n, generator=make_generator(0, "parity"))[:n_scored].numpy()


def make_features(label: np.ndarray, n_states: int, is_classes: bool) -> torch.Tensor:
    """Return (S, K) features of the states that are orthonormal over the particles, the first of them constant."""
    x = np.linspace(-1, 1, n_states)
    raw = np.eye(n_states)[:, : n_states - 1] if is_classes else np.stack([np.polynomial.legendre.Legendre.basis(d)(x) for d in range(1, N_FEATURES)], 1)
    raw = np.concatenate([np.ones((n_states, 1)), raw], 1)
    share = np.bincount(label, minlength=n_states) / len(label)
    lower = np.linalg.cholesky((raw * share[:, None]).T @ raw + 1e-6 * np.eye(raw.shape[1]))
    return torch.from_numpy(np.linalg.solve(lower, raw.T).T).float()


def run_oracle(config: RunConfig, truth: Truth, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the basis that one M-step makes when it is told every particle's state, and the (S, K) coefficients of the states."""
    dataset = load_dataset(config)
    features = make_features(truth[0], len(truth[1]), truth[2])
    first = features[torch.from_numpy(truth[0])]
    radius, K = dataset.lattice.box / 2, features.shape[1]
    halves, second = sum_moments(dataset, lambda chunk: (first[chunk.row], first[chunk.row, :, None] * first[chunk.row, None]), K,
                            whitening=compute_whitening(dataset.lattice, noise), radius=radius)
    told = solve_subspace(halves, second.sum(0), noise, radius)
    return told.basis, features @ torch.linalg.inv(told.frame).T.float()


def describe_path(run: RunFolder, truth: Truth, rows: np.ndarray) -> dict:
    """Return the coefficients a(z) along the range of a one-dimensional latent, the mean true state of the particles around, and projections of six volumes."""
    model, mu = load_model(run, device="cpu"), run.load_latents().mu
    z = torch.quantile(mu[:, 0], torch.linspace(0.01, 0.99, 99))
    a = model.decoder.compute_coefficients(z[:, None])[:, 1:].detach()
    edges = torch.quantile(mu[:, 0], torch.linspace(0.005, 0.995, 100))
    place = torch.bucketize(mu[:, 0], edges) - 1
    state = [float(truth[0][rows][(place == i).numpy()].mean()) for i in range(99)]
    shown = model.decode_volumes(z[torch.linspace(0, 98, 6).long()][:, None])
    return {"z": z.tolist(), "a": a.tolist(), "state": state, "projections": shown.sum(2).tolist()}


def fit_closed_form(job: dict, config: RunConfig, truth: Truth, folder: Path) -> list[dict]:
    """Run the method as `recon subspace` does and score it."""
    stack = None if job["particles"] is None else load_dataset(config).stack.select(torch.arange(job["particles"]))
    run = run_subspace(folder / "run", config, stack=stack, device="cpu")
    seconds = time.process_time()
    facts, model, z = json.loads((run.path / "subspace.json").read_text()), load_model(run, device="cpu"), run.load_latents().mu
    label = truth[0][: len(z)]
    scores, curves = score_volumes(lambda rows: model.decode_volumes(z[rows]), pick_rows(len(z), job["scored"]), truth)
    result = {"kind": facts["manifold"], "zdim": z.shape[1], "evidence": facts["evidence"][-1], **score_latents(z.numpy(), (label, *truth[1:]), name=job["set"]),
              **scores, "cpu_s": seconds, "with_test": config.subspace.test, "curves": curves}
    if job["oracle"]:
        noise = torch.from_numpy(pd.read_csv(run.path / "subspace.csv")["noise"].to_numpy(copy=True)).float()
        basis, features = run_oracle(config, truth, noise)
        told, curves = score_volumes(lambda rows: basis_to_volumes(basis, features[truth[0][rows]], job["box"]), pick_rows(len(z), job["scored"]), truth)
        return [result, {"method": "oracle", **told, "curves": curves}]
    return [result]


def fit_half(job: dict, config: RunConfig, truth: Truth, folder: Path) -> list[dict]:
    """Fit half of the particles and encode the others by the encoder of the run."""
    stack = load_dataset(config).stack
    order = torch.randperm(job["particles"] or len(stack.particles), generator=make_generator(job["seed"], "halves"))
    chosen = [part.sort().values for part in order.chunk(2)]
    run = run_subspace(folder / "run", config, stack=stack.select(chosen[0]), device="cpu")
    seconds = time.process_time()
    others = load_dataset(run.config, stack=stack.select(chosen[1]), facts=run.inputs["data"])
    model = load_model(run, device="cpu")
    latents = [run.load_latents().mu, encode_all(model, others).mu]
    results = []
    for method, part, z in zip(("half, fitted", "half, encoded"), chosen, latents, strict=True):
        mine = (truth[0][part.numpy()], *truth[1:])
        scores, _ = score_volumes(lambda rows, z=z: model.decode_volumes(z[rows]), pick_rows(len(z), job["scored"]), mine)
        results.append({"method": method, "kind": "curve", "zdim": 1, **score_latents(z.numpy(), mine, name=job["set"]), **scores, "cpu_s": seconds})
    results[0]["path"] = describe_path(run, truth, chosen[0].numpy())
    return results


class StartClock(logging.Handler):
    """CPU seconds at the last message of the start."""

    seconds = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        """Note the time."""
        self.seconds = time.process_time()


def train_network(job: dict, config: RunConfig, truth: Truth, folder: Path) -> list[dict]:
    """Teach and train a network on the closed-form latents; return a row for each scored epoch, 0 for what was taught."""
    clock: dict[int, float] = {}
    started = StartClock()
    logging.getLogger("recon_nb.starts").addHandler(started)

    def note(epoch: int, step: int, losses: dict[str, float]) -> None:
        clock.setdefault(0, time.process_time())
        clock[epoch + 1] = time.process_time()

    stack = None if job["particles"] is None else load_dataset(config).stack.select(torch.arange(job["particles"]))
    run = train_run(folder / "run", config, stack=stack, device="cpu", on_step=note)
    last, z = config.train.epochs, run.load_latents().mu  # the encoder is fixed: one set of latents for all epochs
    results = []
    for epoch in sorted({*([0] if config.train.teach_steps else []), 1, (last + 1) // 2, last}):
        model = load_model(run, epoch, device="cpu")
        scores, curves = score_volumes(lambda rows, model=model: model.decode_volumes(z[rows], bf16="auto"), pick_rows(len(z), job["scored"]), truth)
        results.append({"kind": "network", "zdim": 2, "epoch": epoch, **scores, "cpu_s": clock[epoch], "start_s": started.seconds, "curves": curves})
    results[-1] |= score_latents(z.numpy(), (truth[0][: len(z)], *truth[1:]), name=job["set"])
    return results


def run_job(job: dict) -> list[dict]:
    """Do one fit in this process."""
    torch.set_num_threads(1)
    data = Path(job["data"])
    config, truth = make_config(str(data / "particles.star"), changes=job["changes"]), read_truth(data)
    with tempfile.TemporaryDirectory() as folder:
        task = {"half": fit_half, "network": train_network}.get(job["method"], fit_closed_form)
        common = {name: job[name] for name in ("set", "method", "seed", "box")}
        return [common | result for result in task(job, config, truth, Path(folder))]


def list_jobs(options: argparse.Namespace) -> list[dict]:
    """Return the fits that the tables ask for, the first seed of everything first."""
    jobs = []

    def add(rank: int, name: str, method: str, seed: int, changes: dict, *, oracle: bool = False) -> None:
        jobs.append({"rank": rank, "set": name, "method": method, "seed": seed, "box": options.box, "data": str(options.data / f"{name}_{options.box}"), "oracle": oracle,
                     "particles": options.particles, "scored": options.scored, "changes": {"train.seed": seed, **changes}})

    is_motion = [name for name in options.sets if name != "s1"]
    for name in options.sets if 1 in options.tables else []:
        for seed in range(options.seeds):
            add(min(seed, 1) * 3, name, "subspace", seed, {"model.manifold": "auto", "subspace.test": seed == 0 and name == options.sets[0]}, oracle=seed == 0 and options.particles is None)
        add(0 if name == "s1" else 5, name, "linear", 0, {"model.manifold": "linear", "subspace.test": False})
    for name in is_motion if 2 in options.tables else []:
        for seed in range(options.seeds + 2 * (options.seeds > 1)):
            add(1 if seed == 0 else 4, name, "curve", seed, {"model.manifold": "curve", "model.zdim": 1, "subspace.test": False})
    if 3 in options.tables and "s2u" in options.sets:
        add(2, "s2u", "network", 0, NETWORK | json.loads(options.network) | ({"train.epochs": 1, "train.teach_steps": 20} if options.quick else {}))
    for name in is_motion if 4 in options.tables else []:
        add(1 if name == "s2u" else 5, name, "half", 0, {"model.manifold": "curve", "model.zdim": 1, "subspace.test": False})
    return sorted(jobs, key=lambda job: job["rank"])


def name_result(job: dict, kept: Path) -> Path:
    """Return where the result of a fit is kept."""
    return kept / f"{job['set']}_{job['box']}_{job['method']}_{job['seed']}.json"


def start_job(job: dict, kept: Path) -> list[dict]:
    """Do one fit in a fresh process, unless its result is there already."""
    out = name_result(job, kept)
    if not out.exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=True, env=environment, stdout=subprocess.PIPE, text=True)
        out.write_text(done.stdout.splitlines()[-1])
    return json.loads(out.read_text())


def score_peer(options: argparse.Namespace) -> list[dict]:
    """Score the epochs of a run of cryoDRGN on the first of the sets: latents of all that are there, volumes of those that were asked for."""
    name, script = options.sets[0], Path(__file__).with_name("peer_cryodrgn.py")
    truth, results = read_truth(options.data / f"{name}_{options.box}"), []
    with tempfile.TemporaryDirectory() as folder:
        chosen, out = Path(folder) / "rows.txt", Path(folder) / "volumes.npz"
        for epoch in range(1, 1 + max(int(path.name.split(".")[1]) for path in options.peer.glob("z.*.pkl"))):
            is_asked = epoch in options.peer_epochs
            rows = pick_rows(len(truth[0]), options.scored if is_asked else 1)
            np.savetxt(chosen, rows, fmt="%d")
            command = [options.peer_python, script, "volumes", options.peer, "--epoch", str(epoch), "--particles", chosen, "-o", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            content = np.load(out)
            volumes = -torch.from_numpy(content["volumes"])  # its CTF has the opposite sign
            scores, curves = score_volumes(lambda _, volumes=volumes: volumes, rows, truth) if is_asked else ({}, None)
            results.append({"set": name, "method": "cryoDRGN 4.3.1", "seed": 0, "box": options.box, "kind": "network", "zdim": content["z"].shape[1], "epoch": epoch,
                            **score_latents(content["z"], truth, name=name), **scores, "cpu_s": options.peer_seconds * epoch, **({"curves": curves} if is_asked else {})})
    return results


def write_tables(results: list[dict], out: Path) -> pd.DataFrame:
    """Write the rows, the curves by shell of the first seed, and the path along z."""
    table = pd.DataFrame([{name: value for name, value in r.items() if name not in ("curves", "path")} for r in results])
    order = ["set", "method", "seed", "kind", "zdim", "epoch", "knn", "accuracy", "spearman", "inside_0", "inside_1", "inside_2", "auc", "dauc", "cpu_s", "with_test", "start_s",
             "evidence"]
    table = table.reindex(columns=order).dropna(axis=1, how="all").sort_values(["set", "method", "seed"], kind="stable")
    out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(out / "subspace.csv", index=False)
    shells = [{"set": r["set"], "method": r["method"], "epoch": r.get("epoch"), "cycles_per_px": s / r["box"], "fsc": a, "difference_fsc": b}
              for r in results if "curves" in r and r["seed"] == 0 for s, (a, b) in enumerate(zip(r["curves"]["fsc"], r["curves"]["difference_fsc"], strict=True))]
    pd.DataFrame(shells).round(5).to_csv(out / "subspace_fsc.csv", index=False)
    draw_shells([r for r in results if r["set"] == "s2u" and r["method"] in ("subspace", "network") and "curves" in r and r["seed"] == 0], out / "subspace_fsc.png")
    for r in results:
        if "path" in r and r["set"] == "s2u":
            path = r["path"]
            columns = {"z": path["z"], "state": path["state"], **{f"a_{i + 1}": a for i, a in enumerate(zip(*path["a"], strict=True))}}
            pd.DataFrame(columns).round(4).to_csv(out / "subspace_path.csv", index=False)
            draw_path(path, out / "subspace_path.png")
    return table


def draw_shells(results: list[dict], out: Path) -> None:
    """Draw what network and grid know of each shell, if both are there."""
    import matplotlib.pyplot as plt

    epochs = [r["epoch"] for r in results if r["method"] == "network"]
    if not epochs or len(epochs) == len(results):
        return
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, constrained_layout=True)
    for r in results:
        if r.get("epoch", 0) in (0, max(epochs)):
            label = "grid" if r["method"] == "subspace" else "network, taught" if r["epoch"] == 0 else f"network, epoch {r['epoch']}"
            for ax, name in zip(axes, ("fsc", "difference_fsc"), strict=True):
                curve = r["curves"][name]
                ax.plot(np.arange(1, len(curve)) / r["box"], curve[1:], label=label, lw=1.2, ls="-" if r["method"] == "network" else "--")
    for ax, name in zip(axes, ("volumes", "differences from the mean"), strict=True):
        ax.set(xlabel="cycles/px", title=name)
    axes[0].set(ylabel="FSC with the truth", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    fig.savefig(out, dpi=80)


def draw_path(path: dict, out: Path) -> None:
    """Draw the coefficients and six volumes along z."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 7, figsize=(11, 1.9), width_ratios=[2.2, *[1] * 6], constrained_layout=True)
    axes[0].plot(path["z"], path["a"], lw=1)
    axes[0].set(xlabel="z", ylabel="a(z)")
    for ax, i, image in zip(axes[1:], np.linspace(0, 98, 6).astype(int), path["projections"], strict=True):
        ax.imshow(np.array(image), cmap="gray")
        ax.set(title=f"z = {path['z'][i]:.2f}", xticks=[], yticks=[])
    fig.savefig(out, dpi=80)


def prepare_sets(options: argparse.Namespace) -> bool:
    """Make the sets that are missing; return whether all are there."""
    for name in options.sets:
        folder = options.data / f"{name}_{options.box}"
        if folder.exists():
            continue
        if "RECON_NB_DATA" not in os.environ:
            print(f"{folder} is missing and RECON_NB_DATA, the folder of the models to make it from, is not set; nothing measured.")
            return False
        command = f"--set {NAMES[name]} --box {options.box} --n 10000 --snr 0.1 --seed 0 -o {folder}"
        subprocess.run([sys.executable, Path(__file__).with_name("make_data.py"), *command.split()], check=True)
    return True


def main() -> None:
    """Parse the command line, fit what is asked for, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench"), help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tables", nargs="*", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, default=3, help="of the method; two more in table 2")
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--network", default="{}", help="settings of table 3 that differ from NETWORK, as JSON")
    parser.add_argument("--keep", type=Path, help="folder of results that are done")
    parser.add_argument("--collect", action="store_true", help="fit nothing; tables of what --keep holds")
    parser.add_argument("--quick", action="store_true", help="1,500 particles, one seed, 20 volumes scored, one epoch: does it run?")
    parser.add_argument("--peer", type=Path, help="folder of a run of cryoDRGN on the first set")
    parser.add_argument("--peer-python", help="of an environment with cryodrgn 4.3.1")
    parser.add_argument("--peer-seconds", type=float, default=float("nan"), help="CPU seconds that it took for an epoch")
    parser.add_argument("--peer-epochs", type=int, nargs="+", default=[1], help="whose volumes are scored")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(options.job)))
        return
    options.particles, options.scored = (1500, 20) if options.quick else (None, N_SCORED)
    options.seeds = 1 if options.quick else options.seeds
    if not prepare_sets(options):
        return
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.keep or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        jobs = [job for job in list_jobs(options) if not options.collect or name_result(job, kept).exists()]
        if jobs and not any(kept.glob("*.json")):
            start = time.perf_counter()
            start_job({**jobs[0], "method": "warm up", "oracle": False, "particles": 300, "scored": 4}, Path(temporary))
            print(f"warm up {time.perf_counter() - start:.0f} s", flush=True)
        results = []
        for job in jobs:
            results += start_job(job, kept)
            brief = {name: round(v, 4) if isinstance(v, float) else v for name, v in results[-1].items() if name not in ("curves", "path", "box")}
            print(brief, flush=True)
        if options.peer:
            results += score_peer(options)
            (kept / "peer.json").write_text(json.dumps([r for r in results if r["method"].startswith("cryoDRGN")]))
        elif (kept / "peer.json").exists():
            results += json.loads((kept / "peer.json").read_text())
        table = write_tables(results, options.output)
    print(table.to_string(index=False, float_format="%.4f", na_rep=""))


if __name__ == "__main__":
    main()
