"""Table: are densities, masks and occupancies what ChimeraX, RELION and the published scripts made of the same files?

    RECON_NB_DATA=... python benchmarks/occupancy_expected.py [--out results/occupancy_expected.txt]

26 proteins of the 50S, 20 maps of a trained network: densities against ChimeraX's molmap, masks against RELION's, ratios
against the published table; then all 136 subunits in the 20 maps, timed in CPU seconds, with what the joint fit and its
calibration say of the core and of the parts that come late. tests/test_occupancy.py asserts these numbers.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recon_nb.calibration import Calibration, calibrate_occupancies
from recon_nb.core import Volume
from recon_nb.files import read_volume
from recon_nb.occupancy import fit_occupancies, make_subunit_masks, measure_ratios, normalize_ratios, read_subunits, simulate_subunits


def load_maps(
    folder: Path,  # data/occupancy
) -> dict[str, Volume]:  # number in the file's name to map
    """Read the 20 maps."""
    return {path.stem.removeprefix("vol_").lstrip("0"): read_volume(path) for path in sorted((folder / "example_data/00_aligned").glob("vol_*.mrc"))}


def compare_densities(
    folder: Path,  # data/occupancy
) -> tuple[pd.DataFrame, Tensor, Tensor]:  # a row a chain; densities (26, D, D, D); masks (26, D, D, D)
    """Compare the density and mask of every protein of prots1 with the files that ChimeraX and RELION wrote."""
    example = folder / "example_data"
    like = next(iter(load_maps(folder).values()))
    subunits = dict(sorted(read_subunits(folder / "prots1.pdb", keep_all=True).items()))  # the order of the published table
    densities = simulate_subunits(subunits, like, resolution=10.0)
    masks, rows = make_subunit_masks(densities), []
    for chain, density, mask in zip(subunits, densities, masks):
        theirs = read_volume(example / f"01_PDB_mrc/00_expected/prots1_chain{chain.lower()}.mrc").data
        their_mask = read_volume(example / f"02_masks/00_expected/Mask_prots1_chain{chain.lower()}.mrc").data
        correlation = np.corrcoef(density.double().flatten(), theirs.double().flatten())[0, 1]
        rows.append((chain, correlation, float((density - theirs).abs().max()), int((mask != their_mask).sum()), int(mask.sum())))
    return pd.DataFrame(rows, columns=["chain", "correlation", "largest_difference", "voxels_of_mask_different", "voxels_of_mask"]), densities, masks


def compare_ratios(
    folder: Path,  # data/occupancy
    densities: Tensor,  # (26, D, D, D)
    masks: Tensor,  # (26, D, D, D)
) -> float:  # largest relative difference
    """Compare the ratios of 26 proteins in 20 maps with the published table."""
    expected = pd.read_csv(folder / "example_data/03_occupancies/occupancies_expected.csv", header=[0, 1], index_col=0)
    maps = load_maps(folder)
    found = measure_ratios([maps[str(number)] for number in expected.index], densities, masks)
    return float(np.abs(found / expected.to_numpy() - 1).max())


def measure_all(
    folder: Path,  # data/occupancy
) -> tuple[dict[str, float], list[str], np.ndarray, Calibration]:  # CPU s by step; subunits; normalised ratios (V, S); calibration
    """Measure 136 subunits in 20 maps, files included, with the CPU time of every step."""
    seconds, clock = {}, time.process_time()

    def stop(step: str) -> None:
        nonlocal clock
        seconds[step], clock = time.process_time() - clock, time.process_time()

    names = pd.read_csv(folder / "subunits.csv")
    parts = read_subunits(sorted(folder.glob("*.pdb")))
    subunits = {row.name: parts[f"{row.pdb}_{row.chain}"] for row in names[["name", "pdb", "chain"]].itertuples(index=False)}
    maps = list(load_maps(folder).values())
    stop("read models and maps")
    densities = simulate_subunits(subunits, maps[0])
    stop("densities")
    ratios = normalize_ratios(measure_ratios(maps, densities, make_subunit_masks(densities)))
    stop("masks and published ratios")
    fit = fit_occupancies(maps, densities, names=list(subunits))
    stop("joint fit")
    calibration = calibrate_occupancies(fit)
    stop("calibration")
    return seconds, list(subunits), ratios, calibration


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="text file to write as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["RECON_NB_DATA"]) / "occupancy"
    table, densities, masks = compare_densities(folder)
    lines = ["26 proteins: density against molmap, mask against RELION's", table.to_string(index=False, float_format="%.7f"), ""]
    lines.append(f"least correlation {table['correlation'].min():.7f}; masks identical: {int((table['voxels_of_mask_different'] == 0).sum())} of {len(table)}")
    lines.append(f"largest relative difference from the published occupancies (26 proteins, 20 maps): {compare_ratios(folder, densities, masks):.1e}")
    seconds, names, ratios, calibration = measure_all(folder)
    lines += ["", f"{len(names)} subunits in {len(ratios)} maps, CPU s on one thread"]
    lines += [f"{step:28} {value:6.2f}" for step, value in {**seconds, "all": sum(seconds.values())}.items()]
    order = np.argsort(-calibration.probability.mean(0), kind="stable")
    shown = pd.DataFrame({
        "subunit": names, "published": ratios.mean(0), "occupancy": calibration.occupancy.mean(0), "absent": calibration.levels.absent,
        "present": calibration.levels.present, "probability": calibration.probability.mean(0), "maps": (calibration.probability > 0.5).sum(0),
    }).iloc[order]
    lines += ["", "Mean over the maps, and in how many of them the subunit is more likely present than not", shown.to_string(index=False, float_format="%.2f")]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
