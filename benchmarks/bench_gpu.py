"""On one GPU: training throughput, share of the card's own peak, and whole runs, beside cryoDRGN 4.3.1.

    python benchmarks/bench_gpu.py [--peer PATH/TO/PYTHON] [--boxes 128 256] [--batches 8 32 64] [--train] [--subspace] [-o OUT.csv]
    python benchmarks/bench_gpu.py --toy        the same code on the CPU, on nothing but crumbs; for tests

1. Throughput: a whole training step of 1024x3 networks (Z = 8) on random images at D = 128 and 256, in bf16, as it is and as `--compile` makes it, in
   images per second, and as a share of the rate that one large bf16 matrix product reaches on this card. The peer runs its own step, in its mixed
   precision, at the same batches; the column "ratio" compares the best with the best.
2. Training: 20 epochs of 100,000 images at the first box. Without --train the time is the throughput's, extrapolated; with it, the images are simulated and the run is made, its latents and its
   report included, and the score of its latents (accuracy of a 20-nearest-neighbour vote for the three states, chance .5) is printed beside its time.
3. --subspace: `recon subspace` on 100,000 images, end to end after the cache, with the same score.

`make bench-gpu` runs all of it. Without a GPU, and without --toy, it says so and measures nothing.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from bench_throughput import count_operations, measure_ours, measure_peak, measure_peer
from parity_cryodrgn import vote_labels

from recon_nb.analysis import analyze_run
from recon_nb.core import keep_freed_memory
from recon_nb.runs import RunFolder, make_config, open_run
from recon_nb.simulate import SimulatedStack, make_phantom, simulate_stack, write_simulation
from recon_nb.training import train_run

DIM, Z = 1024, 8
TOY = {"boxes": [16], "batches": [4], "dim": 32, "steps": 2, "n_images": 96, "epochs": 1}


def measure_box(box: int, args: argparse.Namespace, peak: float) -> list[dict]:
    """Return the rows of one box: ours eager and compiled, and the peer's, at every batch."""
    rows, operations = [], count_operations(box, args.dim)
    for batch in args.batches:
        cases = {"recon_nb": None, "recon_nb, compiled": "reduce-overhead" if args.device == "cuda" else "default"}
        speeds = {name: measure_ours(box, args.dim, batch, steps=args.steps, bf16=True, device=args.device, compiled=mode)[0] for name, mode in cases.items()}
        if args.peer:
            speeds["cryodrgn 4.3.1"] = measure_peer(args.peer, box, args.dim, steps=args.steps, threads=torch.get_num_threads(), device=args.device, batch_size=batch)[0]
        rows += [{"D": box, "network": f"{args.dim}x3", "program": name, "batch": batch, "images/s": speed,
                  "peak": speed * operations / peak if name.startswith("recon_nb") else float("nan")} for name, speed in speeds.items()]
    best = max((row["images/s"] for row in rows if row["program"].startswith("cryodrgn")), default=float("nan"))
    return [{**row, "ratio": row["images/s"] / best} for row in rows]


def score_run(run: RunFolder, simulated: SimulatedStack) -> float:
    """Return how well the latents of a run tell the states apart."""
    latents = run.load_latents()
    return vote_labels(latents.mu.numpy(), simulated.truth["label"].to_numpy()[latents.particle.numpy()])


def measure_training(simulated: SimulatedStack, folder: Path, args: argparse.Namespace) -> dict:
    """Train and analyse a run; return its time and its score."""
    changes = {"model.zdim": Z, "model.encoder_dim": args.dim, "model.decoder_dim": args.dim, "train.epochs": args.epochs, "train.batch_size": "auto",
               "train.encode_every": 0, "train.checkpoint_every": args.epochs}
    start = time.perf_counter()
    run = train_run(folder / "mlp", make_config(changes=changes), stack=simulated.stack, device=args.device)
    analyze_run(run, device=args.device)
    seconds = time.perf_counter() - start
    return {"what": f"{args.dim}x3, {args.epochs} epochs, batch {run.config.train.batch_size}, report included", "s": seconds, "kNN accuracy": score_run(run, simulated)}


def measure_subspace(star: Path, simulated: SimulatedStack, folder: Path, args: argparse.Namespace) -> dict:
    """Run `recon subspace` in a process of its own; return its time and its score."""
    if importlib.util.find_spec("recon_nb.subspace") is None:
        return {"what": "recon subspace (this version has none)", "s": float("nan"), "kNN accuracy": float("nan")}
    seconds = {}
    for name in ("first", "again"):  # the first writes the cache
        command = ["subspace", star, "-o", folder / f"subspace_{name}", "--cache", folder / "cache", "--device", args.device]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "recon_nb.cli", *map(str, command)], check=True)
        seconds[name] = time.perf_counter() - start
    what = f"recon subspace after the cache ({seconds['first']:.0f} s with it)"
    return {"what": what, "s": seconds["again"], "kNN accuracy": score_run(open_run(folder / "subspace_again"), simulated)}


def measure_runs(args: argparse.Namespace, images_per_second: float) -> pd.DataFrame:
    """Return the rows of the whole runs."""
    rows = []
    if not args.train:
        rows.append({"what": f"{args.dim}x3, {args.epochs} epochs (extrapolated from the throughput: neither reading nor report)",
                     "s": args.epochs * args.n_images / images_per_second, "kNN accuracy": float("nan")})
    if args.train or args.subspace:
        simulated = simulate_stack(make_phantom("ribosome", args.boxes[0]), args.n_images, snr=0.1, seed=0)
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            if args.train:
                rows.append(measure_training(simulated, Path(folder), args))
            if args.subspace:
                rows.append(measure_subspace(write_simulation(Path(folder) / "data", simulated), simulated, Path(folder), args))
    return pd.DataFrame(rows).assign(D=args.boxes[0], images=args.n_images)


def parse_arguments() -> argparse.Namespace:
    """Return the command line, at toy size if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with cryodrgn 4.3.1 (and, for a GPU, its CUDA)")
    parser.add_argument("--boxes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n-images", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train", action="store_true", help="make the training run instead of extrapolating")
    parser.add_argument("--subspace", action="store_true", help="run recon subspace")
    parser.add_argument("--scratch", help="folder for simulated images and runs; the system's temporary folder where absent")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("-o", "--output", help="csv to write the tables to; the second gets .runs.csv")
    args = parser.parse_args()
    if args.toy:
        vars(args).update(TOY)
    args.device = "cpu" if args.toy else "cuda"
    return args


def main() -> None:
    """Print the tables."""
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: nothing measured. `python benchmarks/bench_gpu.py --toy` runs the same code on the CPU at toy size.")
        return
    keep_freed_memory()
    peak = measure_peak(torch.bfloat16, 256 if args.toy else 8192, args.device)
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU, toy size'}; torch {torch.__version__}; bf16 peak {peak / 1e12:.3g} TFLOP/s")
    throughput = pd.DataFrame([row for box in args.boxes for row in measure_box(box, args, peak)])
    print(throughput.to_string(index=False, float_format="%.3g"))
    ours = throughput[(throughput.D == args.boxes[0]) & throughput.program.str.startswith("recon_nb")]
    runs = measure_runs(args, ours["images/s"].max())
    print(runs.to_string(index=False, float_format="%.3g"))
    if args.output:
        throughput.to_csv(args.output, index=False, float_format="%.4g")
        runs.to_csv(Path(args.output).with_suffix(".runs.csv"), index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
