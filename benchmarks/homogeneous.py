"""One volume by gradient descent: the decoder alone beside the backprojection of the same images.

    python benchmarks/make_data.py --set s1_50s --box 64 --n 10000 --snr 0.1 --seed 0 -o bench/s1_50s_64
    python benchmarks/homogeneous.py bench/s1_50s_64 -o bench/homogeneous [--dim 256] [--encoding geometric] [--epochs 10] [--batch-size 16]

Prints, after every epoch, the frequency (cycles/px, Nyquist .5) at which the FSC with the true volume falls below .5 inside a soft mask made from the
truth, and the same for the backprojected map; writes fsc.csv and fsc.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from recon_nb.consensus import backproject_stack
from recon_nb.core import Volume, okabe_ito
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.files import read_volume
from recon_nb.fsc import compute_fsc, find_crossing
from recon_nb.runs import create_run, make_config
from recon_nb.training import build_run_model, fit
from recon_nb.volumes import make_mask


def main() -> None:
    """Train, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--encoding", default="geometric")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="cosine")
    args = parser.parse_args()
    truth = read_volume(next((args.data / "volumes").glob("*.mrc")))
    mask = make_mask(truth)
    stack = load_stack(args.data / "particles.star")
    curves, start = {}, time.process_time()
    result = backproject_stack(stack)
    curves["backprojection"] = compute_fsc(result.map, truth, mask=mask).fsc
    crossing = lambda fsc: float(find_crossing(fsc[None], 0.5)[0]) / truth.box
    print(f"backprojection: FSC=.5 at {crossing(curves['backprojection']):.3f} cycles/px, {time.process_time() - start:.0f} CPU s", flush=True)
    changes = {"model.zdim": 0, "model.decoder_dim": args.dim, "model.encoding": args.encoding, "train.epochs": args.epochs,
               "train.batch_size": args.batch_size, "train.learning_rate": args.learning_rate, "train.schedule": args.schedule}
    config = make_config(particles=str(args.data / "particles.star"), preset="cryodrgn", changes=changes)
    dataset = ParticleDataset(stack)
    run, model = create_run(args.output / "run", config), build_run_model(config, dataset.lattice)
    start = time.process_time()
    for stats in fit(model, dataset, run):
        decoded = Volume(model.decode_volume(), truth.pixel_size)
        curves["decoder"] = compute_fsc(decoded, truth, mask=mask).fsc
        print(f"decoder, epoch {stats.epoch}: loss {stats.losses['total']:.5f}, FSC=.5 at {crossing(curves['decoder']):.3f} cycles/px, "
              f"{time.process_time() - start:.0f} CPU s", flush=True)
    frequency = torch.arange(len(curves["decoder"])) / truth.box
    pd.DataFrame({"cycles_per_px": frequency, **curves}).to_csv(args.output / "fsc.csv", index=False)
    fig, ax = plt.subplots(figsize=(5, 3), constrained_layout=True)
    for (name, fsc), color in zip(curves.items(), okabe_ito):
        ax.plot(frequency, fsc, color=color, label=name)
    ax.axhline(0.5, color="0.6", lw=0.5)
    ax.set(xlabel="frequency (cycles/px)", ylabel="FSC with the truth", ylim=(-0.05, 1.02), title=f"50S, D = {truth.box}, {stack.n_images} images")
    ax.legend()
    fig.savefig(args.output / "fsc.png", dpi=110)


if __name__ == "__main__":
    main()
