"""Make the simulated data sets that the benchmarks run on.

    python benchmarks/make_data.py --set s1 --box 32 --n 10000 --snr 0.1 --seed 0 -o data/s1_32

States come from real atomic models in the folder named by RECON_NB_DATA (simulated/), defoci from EMPIAR-10028's
(a 300 kV Polara, Cs 2.0 mm). Orientations are uniform, shifts uniform up to 5 % of the box, no B-factor.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

from recon_nb.core import InputError, Volume, make_generator
from recon_nb.files import read_volume
from recon_nb.simulate import draw_ctf, read_atoms, simulate_bandlimited_density, simulate_stack, write_simulation
from recon_nb.so3 import rotvec_to_matrix

HINGE_STEP = 0.03  # rad between neighbouring states of S2
N_STATES = 50  # of S2
S1_SHARES = {"30S": 10, "50S": 15, "70S": 25}
S2_CENTERS, S2_SPREAD = (10, 25, 40), {"s2_cooperative": 0.09, "s2_noncontiguous": 0.03}  # states; rad
SETS = ("s1", "s1_50s", "s2_uniform", *S2_SPREAD)


def load_ribosome(folder: Path, names: list[str]) -> list[Volume]:
    "Return 30S, 50S, 70S by name, 64 px in a field of 384 Å."
    return [read_volume(folder / "compositional_64" / f"{name}.mrc") for name in names]


def make_hinge_states(model: Path, box: int) -> list[Volume]:
    "Return 50 states of an IgG (1IGY) whose second Fab turns about psi of residue 241 of chain D, in a field of 256 Å."
    import gemmi

    atoms = read_atoms(model)
    hinge = next(residue for residue in gemmi.read_structure(str(model))[0]["D"] if residue.seqid.num == 241)
    alpha, carbonyl = (np.array(hinge[name][0].pos.tolist()) for name in ("CA", "C"))
    axis = (carbonyl - alpha) / np.linalg.norm(carbonyl - alpha)
    moving = (atoms.chain == "C") | ((atoms.chain == "D") & (atoms.residue < 241))

    def turn(angle: float):
        turned = atoms[moving].rotate(rotvec_to_matrix(torch.from_numpy(angle * axis)), alpha)
        xyz = atoms.xyz.copy()
        xyz[moving] = turned.xyz
        return type(atoms)(xyz, atoms.element, atoms.occupancy, atoms.chain, atoms.residue)

    middle = turn(-HINGE_STEP * (N_STATES - 1) / 2).xyz
    center = (middle.min(axis=0) + middle.max(axis=0)) / 2
    return [simulate_bandlimited_density(turn(-HINGE_STEP * state), box, 256.0 / box, center=center) for state in range(N_STATES)]


def draw_hinge_labels(name: str, n: int, seed: int) -> torch.Tensor | None:
    "Return state labels (n,) of a mixture of three Gaussians, or None for the uniform set (exact counts)."
    if name not in S2_SPREAD:
        return None
    generator = make_generator(seed, "benchmark", name)
    center = torch.tensor(S2_CENTERS, dtype=torch.float64)[torch.randint(len(S2_CENTERS), (n,), generator=generator)]
    state = center + S2_SPREAD[name] / HINGE_STEP * torch.randn(n, generator=generator, dtype=torch.float64)
    return state.round().long().clamp(0, N_STATES - 1)


def simulate_set(name: str, data: Path, *, box: int, n: int, snr: float, seed: int):
    "Return the SimulatedStack of one benchmark set."
    folder = data / "simulated"
    pool = np.load(folder / "empiar10028_defocus.npz")
    pool = np.stack([pool[key] for key in ("defocus_u", "defocus_v", "defocus_angle")], axis=1)
    ctf = draw_ctf(n, defocus_pool=pool, voltage=300.0, cs=2.0, amplitude_contrast=0.1, generator=make_generator(seed, "benchmark", "ctf"))
    common = dict(n_particles=n, snr=snr, seed=seed, box=box, ctf=ctf)
    if name.startswith("s1"):
        names = ["50S"] if name == "s1_50s" else list(S1_SHARES)
        return simulate_stack(load_ribosome(folder, names), names=names, weights=[S1_SHARES[s] for s in names], **common)
    if box == 32:
        volumes = [read_volume(folder / "conformational_32" / f"igg_{state:02d}.mrc") for state in range(N_STATES)]
    else:
        volumes = make_hinge_states(folder / "models" / "1igy.cif", box)
    names = [f"igg_{state:02d}" for state in range(N_STATES)]
    simulated = simulate_stack(volumes, names=names, labels=draw_hinge_labels(name, n, seed), **common)
    simulated.truth["coordinate"] = HINGE_STEP * simulated.truth.label  # rad
    return simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--box", type=int, default=64, help="px")
    parser.add_argument("--n", type=int, default=10_000, help="images")
    parser.add_argument("--snr", type=float, default=0.1, help="after the CTF, over the whole frame")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if not os.environ.get("RECON_NB_DATA"):
        sys.exit("Set RECON_NB_DATA to the folder of test data (it holds simulated/).")
    try:
        simulated = simulate_set(args.set, Path(os.environ["RECON_NB_DATA"]), box=args.box, n=args.n, snr=args.snr, seed=args.seed)
        star = write_simulation(args.out, simulated)
    except InputError as error:
        sys.exit(str(error))
    print(f"{star}: {len(simulated.truth)} images, {args.box} px, {simulated.stack.pixel_size:.3f} Å, noise {simulated.noise_sigma:.4g}")


if __name__ == "__main__":
    main()
