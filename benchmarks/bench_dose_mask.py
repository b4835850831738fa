"""What the dose mask saves: decoder evaluations and time of a training step on a tilt series, with and without it.

    python benchmarks/bench_dose_mask.py [--box 128] [--pixel-size 3.28] [--widths 128 256] [--repetitions 3] [-o benchmarks/results/dose_mask.csv]
    python benchmarks/bench_dose_mask.py --quick

The example of the tomoDRGN paper (Powell & Davis 2024): box 128 px of 3.28 Å, 41 tilts of 3 e/Å² to 60 degrees, dose-symmetric, 300 kV. Its count is of
the whole disc inside Nyquist, 526,932 coordinates a particle without and 194,064 with the mask; this decoder is asked for the half-plane, half as many.
The mask depends on when within a tilt its dose is taken: tables carry the dose before the tilt (`before`); the paper's number is that of its middle.

Images are noise, poses random: neither the count nor the time depends on them. A step is `--preset tomodrgn` (one particle, tilt encoder with mean pooling,
dose and tilt in the weights, AdamW) with networks of the widths given: prepare, encode, decode, loss, backward, optimiser. CPU seconds of one thread,
the least of several alternating repetitions. The saving costs nothing: with the same weights and latents, the masked loss is that of the whole
decoder summed over the kept coefficients (`difference`, relative, in float32); the script stops where it is not.

tomoDRGN 1.0.1 itself is not in the table: it is not in the package index.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import pandas as pd
import torch

from recon_nb.core import CTFParams, Poses, keep_freed_memory, make_generator
from recon_nb.datasets import ParticleDataset, ParticleStack
from recon_nb.dose import make_dose_mask
from recon_nb.models import ReconstructionModel
from recon_nb.runs import RunConfig, make_config
from recon_nb.so3 import sample_rotations
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric
from recon_nb.training import Learner, build_run_model

PAPER = {False: 526_932, True: 194_064}  # coordinates of the whole disc, without and with the mask
MOMENTS = {"before": 0.0, "middle": 1.5}  # e/Å², of the 3 of a tilt


def make_series(box: int, pixel_size: float) -> ParticleDataset:
    """Return one particle: 41 images of noise with the paper's doses and angles."""
    generator, tilt = make_generator(0, "dose mask"), TiltScheme(list_dose_symmetric(60, 3), 3.0).tilt
    n = len(tilt)
    stack = ParticleStack(
        images=torch.randn(n, box, box, generator=generator), poses=Poses(sample_rotations(n, generator), torch.zeros(n, 2)), ctf=CTFParams.from_values(n, defocus_u=20000.0),
        tilt=tilt, particle=torch.zeros(n, dtype=torch.int64), source_row=torch.arange(n), pixel_size=pixel_size, box=box,
    )  # fmt: skip
    return ParticleDataset(stack, in_memory=True)


def count_evaluations(dataset: ParticleDataset, masked: bool, later: float) -> tuple[int, int]:
    """Return how many coordinates of the half-plane, and of the whole disc, are evaluated for the particle."""
    lattice, tilt = dataset.lattice, dataset.stack.tilt
    kept = make_dose_mask(lattice.radius / (lattice.box * lattice.pixel_size), tilt.dose + later) | (not masked)
    return int(kept.sum()), int((kept * lattice.multiplicity).sum())


def make_config_of(width: int, masked: bool, bf16: bool | str = "auto") -> RunConfig:
    """Return the preset with networks of a width."""
    return make_config(preset="tomodrgn", changes={"model.encoder_dim": width, "model.decoder_dim": width, "model.dose_mask": masked, "train.bf16": bf16})


def compare_losses(dataset: ParticleDataset, width: int) -> float:
    """Return by how much the masked loss differs from the whole one summed over the kept coefficients, relative."""
    batch, z = dataset.get_batch(dataset.particles), torch.randn(1, 8, generator=make_generator(1, "dose mask"))
    losses = {}
    for masked in (True, False):
        model = build_run_model(make_config_of(width, masked, bf16=False), dataset.lattice)
        with torch.no_grad():
            prepared = model.prepare(batch.flatten())
            if masked:
                worth = prepared.worth
            else:
                prepared = dataclasses.replace(prepared, weights=prepared.weights * worth)
            losses[masked] = float(model.compare(model.decode(prepared, z), prepared))
    return abs(losses[True] / losses[False] - 1)


def take_step(model: ReconstructionModel, learner: Learner, dataset: ParticleDataset) -> float:
    """Return the CPU seconds of a step."""
    batch, noise = dataset.get_batch(dataset.particles), torch.zeros(1, 8)
    start = time.process_time()
    model(learner.place(batch, torch.device("cpu")), beta=1.0, noise=noise).total.backward()
    learner.step(0.0, 1)
    return time.process_time() - start


def measure_steps(dataset: ParticleDataset, width: int, repetitions: int) -> dict[bool, float]:
    """Return the least CPU seconds of a step with and without the mask, taken in turn."""
    learners = {}
    for masked in (True, False):
        config = make_config_of(width, masked)
        model = build_run_model(config, dataset.lattice)
        learners[masked] = model, Learner(model, dataset, config.train)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repetitions + 1):
        for masked, (model, learner) in learners.items():
            times[masked].append(take_step(model, learner, dataset))
    return {masked: min(t[1:]) for masked, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=128, help="px")
    parser.add_argument("--pixel-size", type=float, default=3.28, help="Å")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256], help="of encoder and decoder")
    parser.add_argument("--repetitions", type=int, default=3, help="steps of each kind")
    parser.add_argument("--quick", action="store_true", help="a box of 32 px and a network of 16: a few seconds")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/dose_mask.csv"))
    options = parser.parse_args()
    if options.quick:
        options.box, options.widths, options.repetitions = 32, [16], 1
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset, rows = make_series(options.box, options.pixel_size), []
    for width in options.widths:
        difference, seconds = compare_losses(dataset, width), measure_steps(dataset, width, options.repetitions)
        if not difference < 1e-4:
            raise SystemExit(f"The masked loss is not the loss over the kept coefficients: it differs by {difference:.2g}.")
        for masked in (False, True):
            n_half, n_disc = count_evaluations(dataset, masked, MOMENTS["before"])
            rows.append({
                "box": options.box, "pixel_size": options.pixel_size, "n_tilts": dataset.n_images, "width": width, "masked": masked, "evaluations": n_half, "of_whole_disc": n_disc,
                "of_whole_disc_middle": count_evaluations(dataset, masked, MOMENTS["middle"])[1], "paper": PAPER[masked] if (options.box, options.pixel_size) == (128, 3.28) else None,
                "step_s": round(seconds[masked], 4), "difference": float(f"{difference:.1e}"),
            })  # fmt: skip
    table = pd.DataFrame(rows)
    whole = table[~table.masked].set_index("width")
    table["fewer"] = [round(whole.evaluations[r.width] / r.evaluations, 3) for r in table.itertuples()]
    table["faster"] = [round(whole.step_s[r.width] / r.step_s, 3) for r in table.itertuples()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
