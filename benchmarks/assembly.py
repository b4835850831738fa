"""Proofs on a landscape of known occupancy: are subunits called present where they are, and is a state of one particle in a hundred found and confirmed?

    python benchmarks/assembly.py [OUT] [--conditions clean errors] [--seeds 0] [-o benchmarks/results/assembly.csv]
    python benchmarks/assembly.py --quick

Fourteen states of the 50S ribosomal subunit, assembled from its 136 chains in eleven blocks (22b_assemblies; the models lie in the folder that RECON_NB_DATA
names), 20,000 images of 64 px of 6.55 Å, SNR 0.1 after the CTF. `clean` gives the method the true poses; `errors` perturbs the orientations by 2 degrees and the
shifts by half a pixel (3.3 Å) and lets the contrast vary by 20 %.

1. `recon subspace` with its own settings; 100 volumes at on-data k-means centres. The truth of a volume is the state of the particle that it was decoded at.
2. Presence of all 136 subunits in the 100 volumes: published ratio (raw), ratio after the published normalisation (10th to 90th percentile), calibrated
   probability of the joint fit. AUROC over all subunit-volume pairs, Brier score, and the same over the fourteen states (volume at the on-data median of each).
3. The minor state, 200 of 20,000 particles: the mature particle without its central protuberance. Classes of volumes by the presence of blocks; the selection is
   the class in which the block is absent while the latest blocks (ptc, h68_h71) are present. Nothing of this sees the truth, which then gives recall and purity.
   `recon confirm` backprojects the selection beside the particles of the class that holds every block; mean density inside the mask of the block over that in the
   rest of the molecule, in the backprojected and in the true maps (the minor's is never 0 where its selection is not pure).

One line per condition and seed; the reliability of the three scores is drawn beside the table (assembly_CONDITION_SEED.png). --quick is a phantom on 2,400 images of 32 px.
"""

import argparse
import csv
import dataclasses
import json
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from recon_nb.analysis import bind_decoder
from recon_nb.assemblies import Assembly, make_50s_assembly, make_phantom_assembly, place_atoms, simulate_assembly_volumes, tabulate_presence
from recon_nb.calibration import calibrate_occupancies, plot_reliability, score_presence
from recon_nb.confirm import confirm_selection
from recon_nb.core import Selection, Volume, keep_freed_memory
from recon_nb.files import read_volume, write_volume
from recon_nb.latent import cluster_kmeans, find_nearest_rows
from recon_nb.occupancy import fit_occupancies, make_subunit_masks, measure_ratios, normalize_ratios, simulate_subunits
from recon_nb.runs import RunFolder, make_config, open_run
from recon_nb.simulate import simulate_stack, write_simulation
from recon_nb.subspace import run_subspace

ABSENT, PRESENT = {"50S": ("central_protuberance", ("ptc", "h68_h71")), "phantom": ("d", ("e", "f", "g"))}, 0.5


def simulate_landscape(folder: Path, assembly: Assembly, *, n_particles: int, box: int, condition: str, seed: int) -> Path:
    "Write the particles of a condition, once."
    if (folder / "particles.star").exists():
        return folder / "particles.star"
    volumes = simulate_assembly_volumes(assembly, box)
    errors = {"rot_error": 2.0, "shift_error": 0.5 * volumes[0].pixel_size, "contrast_sigma": 0.2} if condition == "errors" else {}
    simulated = simulate_stack(volumes, n_particles, weights=assembly.weights, names=list(assembly.states.index), snr=0.1, seed=seed, **errors)
    return write_simulation(folder, simulated)


def decode_centers(run: RunFolder, labels: np.ndarray, k: int) -> tuple[list[Volume], np.ndarray, np.ndarray]:
    "Return volumes at on-data centres, their states, and the cluster of every particle."
    decode, _ = bind_decoder(run, 1)
    latents = run.load_latents(1)
    clusters = cluster_kmeans(latents, k)
    return list(decode(latents.mu.numpy()[clusters.center_row])), labels[clusters.center_row], clusters.labels


def decode_medians(run: RunFolder, labels: np.ndarray) -> list[Volume]:
    "Return the volume at the on-data median of every true state."
    decode, _ = bind_decoder(run, 1)
    z = run.load_latents(1).mu.numpy()
    rows = [np.flatnonzero(labels == s)[find_nearest_rows(z[labels == s], np.median(z[labels == s], axis=0)[None])[0]] for s in range(labels.max() + 1)]
    return list(decode(z[rows]))


def measure_presence(volumes: list[Volume], densities: torch.Tensor, names: list[str]) -> dict[str, np.ndarray]:
    "Return the three estimates of presence, (V, S) each."
    raw = measure_ratios(volumes, densities, make_subunit_masks(densities))
    return {"raw ratio": raw, "published": normalize_ratios(raw), "calibrated": calibrate_occupancies(fit_occupancies(volumes, densities, names=names)).probability}


def choose_classes(assembly: Assembly, presence: np.ndarray, names: list[str], kind: str) -> tuple[np.ndarray, np.ndarray]:
    "Return which volumes lack the block that the minor state lacks and hold the latest ones, and which hold every block: (V,) bool each."
    absent, late = ABSENT[kind]
    holds = {block: presence[:, [names.index(n) for n in subunits]].mean(axis=1) > PRESENT for block, subunits in assembly.blocks.items()}
    return ~holds[absent] & np.all([holds[block] for block in late], axis=0), np.all(list(holds.values()), axis=0)


def compare_density(volume: Volume, mask: torch.Tensor, molecule: torch.Tensor) -> float:
    "Return mean density in a mask over that in the rest of the molecule, above the solvent."
    solvent = volume.data[molecule <= 0].mean()
    return float((volume.data[mask > 0].mean() - solvent) / (volume.data[(molecule > 0) & (mask <= 0)].mean() - solvent))


def run_condition(folder: Path, assembly: Assembly, kind: str, *, condition: str, seed: int, n_particles: int, box: int, k: int, pictures: Path | None) -> dict[str, object]:
    "Run all steps and return one line of the table."
    particles = simulate_landscape(folder / "data", assembly, n_particles=n_particles, box=box, condition=condition, seed=seed)
    labels = pd.read_csv(particles.parent / "truth.csv")["label"].to_numpy()
    started = time.process_time()
    if not (folder / "run" / "config.json").exists():
        run_subspace(folder / "run", make_config(str(particles), changes={"train.seed": seed, "subspace.test": False}))
    fitted, run, minor = time.process_time() - started, open_run(folder / "run"), list(assembly.states.index).index(assembly.minor)

    presence, names = tabulate_presence(assembly), list(assembly.subunits)
    truth, started = presence[names].to_numpy().astype(bool), time.process_time()
    volumes, states, clusters = decode_centers(run, labels, k)
    subunits = {name: place_atoms(atoms, assembly, box=box, pixel_size=volumes[0].pixel_size) for name, atoms in assembly.subunits.items()}
    densities = simulate_subunits(subunits, volumes[0], resolution=10.0 if kind == "50S" else 2 * volumes[0].pixel_size)
    line: dict[str, object] = {"molecule": kind, "condition": condition, "seed": seed, "images": len(labels), "fit_cpu_s": round(fitted, 1)}
    found = measure_presence(volumes, densities, names)
    of_states = measure_presence(decode_medians(run, labels), densities, names)
    for name in found:
        scores, medians = score_presence(found[name], truth[states]), score_presence(of_states[name], truth)
        short = name.split()[0]
        line |= {f"auroc_{short}": scores["auroc"], f"brier_{short}": scores["brier"], f"auroc_{short}_states": medians["auroc"], f"brier_{short}_states": medians["brier"]}
    line["occupancy_cpu_s"] = round(time.process_time() - started, 1)
    if pictures is not None:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
        for ax, values, right, title in ((axes[0], found, truth[states], f"{k} volumes"), (axes[1], of_states, truth, f"{len(truth)} states")):
            plot_reliability(values, right, ax=ax).set_title(f"{condition}: {title}")
        figure.savefig(pictures / f"assembly_{condition}_{seed}.png", dpi=110)

    chosen, whole = (np.isin(clusters, np.flatnonzero(volume)) for volume in choose_classes(assembly, found["calibrated"], names, kind))
    line |= {"minor_particles": int((labels == minor).sum()), "minor_selected": int(chosen.sum()), "minor_recall": chosen[labels == minor].mean(), "minor_purity": (labels[chosen] == minor).mean() if chosen.any() else 0.0}
    if chosen.any() and whole.any():
        line |= confirm_minor(run, assembly, {"minor": chosen, "neighbor": whole}, densities, names, kind=kind, folder=folder)
    return line


def confirm_minor(run: RunFolder, assembly: Assembly, chosen: dict[str, np.ndarray], densities: torch.Tensor, names: list[str], *, kind: str, folder: Path) -> dict[str, object]:
    "Backproject the selection and the state beside it; compare density ratios with the truth."
    particle = run.load_latents(1).particle.numpy()
    (run.path / "selections").mkdir(exist_ok=True)
    for name, rows in chosen.items():
        Selection(particle[rows], len(particle), "blocks by occupancy").save(run.path / "selections" / f"{name}.json")
    block = densities[[names.index(n) for n in assembly.blocks[ABSENT[kind][0]]]].sum(0)
    others = densities.sum(0) - block
    mask, molecule = ((block > 0.02) & (block > others)).float(), (densities.sum(0) > 0.02).float()
    states = simulate_assembly_volumes(assembly, mask.shape[0])
    write_volume(folder / "mask.mrc", Volume(mask, states[0].pixel_size))
    started = time.process_time()
    found = confirm_selection(run, selection="minor", against="neighbor", mask=str(folder / "mask.mrc"))
    verdict = json.loads((found / "confirmation.json").read_text())
    line: dict[str, object] = {"verdict": verdict["verdict"], "amplitude": verdict["amplitude"], "map_correlation": verdict["correlation"], "map_correlation_null": verdict["correlation_null"], "confirm_cpu_s": round(time.process_time() - started, 1)}
    order = list(assembly.states.index)
    for name, volume in (("minor", states[order.index(assembly.minor)]), ("neighbor", states[order.index(assembly.neighbor)])):
        line[f"true_ratio_{name}"] = compare_density(volume, mask, molecule)
    for name, group in (("minor", "selected"), ("neighbor", "neighbors")):
        line[f"ratio_{name}"] = compare_density(read_volume(found / group / "map.mrc"), mask, molecule)
    return line


def write_line(path: Path, line: dict[str, object]) -> None:
    "Append a line to a table, which keeps the columns of its first."
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(line) if new else pd.read_csv(path, nrows=0).columns, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="assembly_out", help="where particles and runs go; what is there is used again")
    parser.add_argument("--conditions", nargs="+", default=["clean", "errors"], choices=["clean", "errors"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="the phantom, small")
    parser.add_argument("-o", "--out", help="csv to append to; pictures go beside it")
    options = parser.parse_args()
    keep_freed_memory()
    kind = "phantom" if options.quick else "50S"
    if kind == "50S" and "RECON_NB_DATA" not in os.environ:
        raise SystemExit("The models of the 50S lie in the folder that RECON_NB_DATA names; set it, or give --quick.")
    assembly = make_phantom_assembly() if options.quick else make_50s_assembly()
    sizes = {"n_particles": 2400, "box": 32, "k": 30} if options.quick else {"n_particles": 20_000, "box": 64, "k": 100}
    for condition in options.conditions:
        for seed in options.seeds:
            pictures = Path(options.out).parent if options.out else None
            line = run_condition(Path(options.folder) / f"{kind}_{condition}_{seed}", assembly, kind, condition=condition, seed=seed, pictures=pictures, **sizes)
            print("\n".join(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}" for name, value in line.items()), "\n", flush=True)
            if options.out:
                write_line(Path(options.out), line)


if __name__ == "__main__":
    main()
