"""Make the simulated data sets that the benchmarks run on.

    python benchmarks/make_data.py --set s1 --box 32 --n 10000 --snr 0.1 --seed 0 -o data/s1_32
    python benchmarks/make_data.py --set s2_null --rot-error 2 --contrast 0.2 -o data/null
    python benchmarks/make_data.py --set s2_small --range 0.2 -o data/small_20
    python benchmarks/make_data.py --set occupancy --share 0.3 --mass-share 0.05 -o data/occupancy_05
    python benchmarks/make_data.py --set s2_uniform --n 200000 -o data/s2u_200k
    python benchmarks/make_data.py --set s3 -o data/s3

States come from real atomic models in the folder named by RECON_NB_DATA (simulated/), defoci from EMPIAR-10028's
(a 300 kV Polara, Cs 2.0 mm). Orientations are uniform, shifts uniform up to 5 % of the box, no B-factor.

| set | what varies |
|---|---|
| s1 | 30S, 50S, 70S in proportion 10 : 15 : 25 |
| s2_uniform, s2_cooperative, s2_noncontiguous | 50 states of an IgG (1IGY) one of whose Fabs turns by 1.47 rad: even, three broad or three narrow clusters |
| s2_small | the same motion over --range rad about its middle, 50 states, even; only the outer part with --mass-share of the mass turns, where that is given |
| occupancy | --share of the particles lack a piece with --mass-share of the mass; the IgG in the middle of its motion |
| s3 | four states of the assembly of the large ribosomal subunit, each as often, as tilt series |
| s1_50s, s2_null | nothing: the 50S; the IgG in the middle of its motion |

A share of mass is a share of the sum over atoms (without hydrogens and waters) of atomic number times occupancy. A piece is compact and grows with its
share: the atoms that are nearest to the tip of the moving Fab, as many as make up the share. simulation.json says the share that was reached.

Nuisances, all recorded in simulation.json: --rot-error reports wrong orientations to the star file, while the images are made with the true ones, which
truth.csv keeps. The error is a rotation in the frame of the image whose vector (axis times angle) has components N(0, DEG / sqrt(3)), so that the root
mean square of its angle is DEG. --contrast multiplies the signal of every image by N(1, SD), drawn again where it is below .2 (truth.csv: contrast).

s3 are 4 x 250 particles (--n counts particles there) x 41 tilts to 60 degrees in steps of 3, dose-symmetric, 3 e/Å² each, 32 px: the scheme of tomoDRGN's
benchmark (Powell & Davis 2024). Structural noise is one field per particle that all its tilts see (--structure image: a new one for every image, as published), with
--structural-snr 1.4, and shot noise has --snr .1, both after the CTF and before dose and tilt take their share. Offsets are 3-D and --rot-error is one error for all tilts of a
particle. The star file is Warp's: rlnGroupName, rlnCtfBfactor = -4 dose, rlnCtfScalefactor = cos(tilt).

Images pass through a temporary file beside the result, so memory does not grow with their number beyond the tables (disk: twice the stack while it works).
"""

import argparse
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from recon_nb.core import CTFParams, InputError, Volume, make_generator
from recon_nb.files import read_volume
from recon_nb.simulate import Atoms, SimulatedStack, draw_ctf, read_atoms, simulate_bandlimited_density, simulate_stack, write_simulation
from recon_nb.so3 import rotvec_to_matrix
from recon_nb.tiltsimulation import SimulatedTilts, TiltScheme, list_dose_symmetric, simulate_tilts, structures, write_tilts

HINGE_STEP = 0.03  # rad between neighbouring states of S2
N_STATES = 50  # of S2
MIDDLE = -HINGE_STEP * (N_STATES - 1) / 2  # rad
S1_SHARES = {"30S": 10, "50S": 15, "70S": 25}
S2_CENTERS, S2_SPREAD = (10, 25, 40), {"s2_cooperative": 0.09, "s2_noncontiguous": 0.03}  # states; rad
SETS = ("s1", "s1_50s", "s2_uniform", *S2_SPREAD, "s2_null", "s2_small", "occupancy", "s3")
OPTIONS = {"range": ("s2_small",), "share": ("occupancy",), "mass_share": ("s2_small", "occupancy"), "structure": ("s3",), "structural_snr": ("s3",)}  # which sets take which


@dataclass(frozen=True)
class States:
    "The states of a set and how often each is seen. Names sort in the order of the labels."

    volumes: list[Volume]
    names: list[str]
    weights: list[float] | None = None  # share of each; equal when None
    labels: torch.Tensor | None = None  # (n,) state of every image, instead of shares
    coordinate: np.ndarray | None = None  # (V,) rad, place of each state on the motion
    facts: dict[str, float] = field(default_factory=dict)  # for simulation.json


@dataclass(frozen=True)
class Hinge:
    "The IgG 1IGY, whose Fab of chain C and the first part of D turns about psi of residue 241 of D, in a field of 256 Å."

    atoms: Atoms
    moving: np.ndarray  # (N,) bool
    axis: np.ndarray  # (3,) unit vector
    alpha: np.ndarray  # (3,) Å, a point on the axis

    def turn(self, angle: float, part: np.ndarray | None = None) -> Atoms:
        "Return the model with its Fab, or a part (N,) of it, turned by an angle (rad)."
        part = self.moving if part is None else part
        turned = self.atoms[part].rotate(rotvec_to_matrix(torch.from_numpy(angle * self.axis)), self.alpha)
        xyz = self.atoms.xyz.copy()
        xyz[part] = turned.xyz
        return replace(self.atoms, xyz=xyz)

    def measure_mass(self, part: np.ndarray) -> float:
        "Return the share of the mass that a part (N,) bool has."
        return float(self.atoms.weight[part].sum() / self.atoms.weight.sum())

    def pick_piece(self, mass_share: float, *, among: np.ndarray) -> np.ndarray:
        "Return (N,) bool, the atoms nearest to the tip of the Fab that together have a share of the whole mass."
        if not 0 < mass_share <= self.measure_mass(among):
            raise InputError(f"--mass-share {mass_share} is not between 0 and {self.measure_mass(among):.3f}, the share that there is to take.")
        reach = np.where(self.moving, np.linalg.norm(self.atoms.xyz - self.alpha, axis=1), -1)
        distance = np.linalg.norm(self.atoms.xyz - self.atoms.xyz[reach.argmax()], axis=1)
        order = np.argsort(np.where(among, distance, np.inf), kind="stable")
        n = 1 + int(np.searchsorted(np.cumsum(self.atoms.weight[order]), mass_share * self.atoms.weight.sum() * (1 - 1e-9)))
        return np.isin(np.arange(len(self.atoms)), order[:n])

    def render(self, models: list[Atoms], box: int) -> list[Volume]:
        "Return densities, all centred as the middle of the motion is."
        middle = self.turn(MIDDLE).xyz
        center = (middle.min(axis=0) + middle.max(axis=0)) / 2
        return [simulate_bandlimited_density(model, box, 256.0 / box, center=center) for model in models]


def read_hinge(model: Path) -> Hinge:
    "Read 1IGY and find its hinge."
    import gemmi

    atoms = read_atoms(model)
    hinge = next(residue for residue in gemmi.read_structure(str(model))[0]["D"] if residue.seqid.num == 241)
    alpha, carbonyl = (np.array(hinge[name][0].pos.tolist()) for name in ("CA", "C"))
    moving = (atoms.chain == "C") | ((atoms.chain == "D") & (atoms.residue < 241))
    return Hinge(atoms, moving, (carbonyl - alpha) / np.linalg.norm(carbonyl - alpha), alpha)


def load_ribosome(folder: Path, names: list[str]) -> States:
    "Return 30S, 50S, 70S by name, 64 px in a field of 384 Å."
    volumes = [read_volume(folder / "compositional_64" / f"{name}.mrc") for name in names]
    return States(volumes, names, weights=[S1_SHARES[s] for s in names])


def load_motion(folder: Path, name: str, *, box: int, n: int, seed: int) -> States:
    "Return the 50 states of S2, from files where they are published (32 px)."
    hinge, steps = read_hinge(folder / "models" / "1igy.cif"), range(N_STATES)
    if box == 32:
        volumes = [read_volume(folder / "conformational_32" / f"igg_{state:02d}.mrc") for state in steps]
    else:
        volumes = hinge.render([hinge.turn(-HINGE_STEP * state) for state in steps], box)
    labels, coordinate = draw_hinge_labels(name, n, seed), HINGE_STEP * np.arange(N_STATES)
    facts = {"mass_share": hinge.measure_mass(hinge.moving), "range": float(coordinate[-1])}
    return States(volumes, [f"igg_{state:02d}" for state in steps], labels=labels, coordinate=coordinate, facts=facts)


def make_small_motion(folder: Path, *, box: int, span: float, mass_share: float | None) -> States:
    "Return 50 states of the Fab, or of its outer part, over a range (rad) about the middle of its motion."
    hinge = read_hinge(folder / "models" / "1igy.cif")
    coordinate = np.linspace(0, span, N_STATES)
    middle = replace(hinge, atoms=hinge.turn(MIDDLE))
    part = hinge.moving if mass_share is None else hinge.pick_piece(mass_share, among=hinge.moving)
    volumes = hinge.render([middle.turn(span / 2 - angle, part) for angle in coordinate], box)
    facts = {"mass_share": hinge.measure_mass(part), "range": span}
    return States(volumes, [f"igg_{state:02d}" for state in range(N_STATES)], coordinate=coordinate, facts=facts)


def make_occupancy(folder: Path, *, box: int, share: float, mass_share: float) -> States:
    "Return the IgG in the middle of its motion, whole and without a piece that a share of the particles lack."
    if not 0 <= share <= 1:
        raise InputError(f"--share {share} is not between 0 and 1.")
    hinge = read_hinge(folder / "models" / "1igy.cif")
    middle = hinge.turn(MIDDLE)
    piece = hinge.pick_piece(mass_share, among=np.full(len(middle), True))
    volumes = hinge.render([middle, middle[~piece]], box)
    return States(volumes, ["whole", "without"], weights=[1 - share, share], facts={"mass_share": hinge.measure_mass(piece), "share": share})


def make_null(folder: Path, *, box: int) -> States:
    "Return the IgG in the middle of its motion."
    hinge = read_hinge(folder / "models" / "1igy.cif")
    return States(hinge.render([hinge.turn(MIDDLE)], box), ["igg_middle"])


def load_assembly(folder: Path) -> States:
    "Return four states of the large subunit as it assembles, means of real maps, 64 px in a field of 419.2 Å."
    paths = sorted((folder / "lsu_real_64").glob("*.mrc"))
    return States([read_volume(path) for path in paths], [path.stem for path in paths])


def draw_hinge_labels(name: str, n: int, seed: int) -> torch.Tensor | None:
    "Return state labels (n,) of a mixture of three Gaussians, or None for the uniform set (exact counts)."
    if name not in S2_SPREAD:
        return None
    generator = make_generator(seed, "benchmark", name)
    center = torch.tensor(S2_CENTERS, dtype=torch.float64)[torch.randint(len(S2_CENTERS), (n,), generator=generator)]
    state = center + S2_SPREAD[name] / HINGE_STEP * torch.randn(n, generator=generator, dtype=torch.float64)
    return state.round().long().clamp(0, N_STATES - 1)


def draw_contrast(n: int, sigma: float, seed: int) -> torch.Tensor | None:
    "Return factors (n,) from N(1, sigma) cut off below .2, or None for sigma 0."
    if not sigma:
        return None
    lowest = torch.special.ndtr(torch.tensor((0.2 - 1) / sigma, dtype=torch.float64))
    uniform = torch.rand(n, generator=make_generator(seed, "benchmark", "contrast"), dtype=torch.float64)
    return (1 + sigma * torch.special.ndtri(lowest + (1 - lowest) * uniform)).float()


def choose_states(args: argparse.Namespace, folder: Path) -> States:
    "Return the states of one benchmark set."
    if args.set == "s3":
        return load_assembly(folder)
    if args.set.startswith("s1"):
        return load_ribosome(folder, ["50S"] if args.set == "s1_50s" else list(S1_SHARES))
    if args.set == "s2_null":
        return make_null(folder, box=args.box)
    if args.set == "s2_small":
        return make_small_motion(folder, box=args.box, span=0.3 if args.range is None else args.range, mass_share=args.mass_share)
    if args.set == "occupancy":
        defaults = {"share": 0.5, "mass_share": 0.1}
        return make_occupancy(folder, box=args.box, **{name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()})
    return load_motion(folder, args.set, box=args.box, n=args.n, seed=args.seed)


def simulate_series(args: argparse.Namespace, states: States, ctf: CTFParams) -> SimulatedTilts:
    "Return tilt series of some states."
    noise = {"snr": args.snr, "structural_snr": args.structural_snr or 1.4, "structure": args.structure or "field"}
    return simulate_tilts(
        states.volumes, args.n, names=states.names, scheme=TiltScheme(list_dose_symmetric(60, 3), 3.0), box=args.box, ctf=ctf, seed=args.seed, rot_error=args.rot_error,
        scratch=args.out, **noise,
    )


def simulate_set(args: argparse.Namespace, data: Path) -> tuple[SimulatedStack, dict]:
    "Return the SimulatedStack of one benchmark set, its images in a temporary file, and what is to be said of it."
    folder = data / "simulated"
    states = choose_states(args, folder)
    pool = np.load(folder / "empiar10028_defocus.npz")
    pool = np.stack([pool[key] for key in ("defocus_u", "defocus_v", "defocus_angle")], axis=1)
    generator = make_generator(args.seed, "benchmark", "ctf")
    ctf = draw_ctf(args.n, defocus_pool=pool, voltage=300.0, cs=2.0, amplitude_contrast=0.1, generator=generator)
    if args.set == "s3":
        return simulate_series(args, states, ctf), {"set": args.set, "rot_error": args.rot_error}
    simulated = simulate_stack(
        states.volumes, args.n, names=states.names, weights=states.weights, labels=states.labels, box=args.box, snr=args.snr, seed=args.seed, ctf=ctf,
        contrast=draw_contrast(args.n, args.contrast, args.seed), rot_error=args.rot_error, scratch=args.out,
    )
    if states.coordinate is not None:
        simulated.truth["coordinate"] = states.coordinate[simulated.truth.label]  # rad
    return simulated, {"set": args.set, "rot_error": args.rot_error, "contrast_sd": args.contrast, **states.facts}


def parse_arguments() -> argparse.Namespace:
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--box", type=int, help="px, 64 unless given; s3: 32")
    parser.add_argument("--n", type=int, help="images, 10000 unless given; s3: particles, 1000")
    parser.add_argument("--snr", type=float, default=0.1, help="after the CTF, over the whole frame")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rot-error", type=float, default=0.0, metavar="DEG", help="degrees, root mean square error of the reported orientations")
    parser.add_argument("--contrast", type=float, default=0.0, metavar="SD", help="spread of the signal's scale from image to image")
    parser.add_argument("--range", type=float, metavar="RAD", help="s2_small: range of the motion, .3 unless given")
    parser.add_argument("--share", type=float, help="occupancy: share of the particles that lack the piece, .5 unless given")
    parser.add_argument("--mass-share", type=float, help="occupancy: share of the mass that they lack, .1 unless given; s2_small: that moves, the whole Fab unless given")
    parser.add_argument("--structural-snr", type=float, help="s3: of structural noise after the CTF, 1.4 unless given")
    parser.add_argument("--structure", choices=sorted(structures), help="s3: one field per particle, as it is unless given, or one per image")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    for name, sets in OPTIONS.items():
        if getattr(args, name) is not None and args.set not in sets:
            parser.error(f"--{name.replace('_', '-')} is for --set {' or '.join(sets)}")
    box, n = (32, 1000) if args.set == "s3" else (64, 10_000)
    args.box, args.n = args.box or box, args.n or n
    if args.set == "s3" and args.contrast:
        parser.error("--contrast is for sets of single images")
    if args.rot_error < 0 or args.contrast < 0:
        parser.error("--rot-error and --contrast are 0 or more")
    if not os.environ.get("RECON_NB_DATA"):
        sys.exit("Set RECON_NB_DATA to the folder of test data (it holds simulated/).")
    if (args.out / "particles.star").exists():
        sys.exit(f"{args.out} holds a simulation already; choose another folder or remove it.")
    return args


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        simulated, facts = simulate_set(args, Path(os.environ["RECON_NB_DATA"]))
        star = (write_tilts if args.set == "s3" else write_simulation)(args.out, simulated, facts)
    except InputError as error:
        sys.exit(str(error))
    print(f"{star}: {len(simulated.truth)} images, {args.box} px, {simulated.stack.pixel_size:.3f} Å, noise {simulated.noise_sigma:.4g}")


if __name__ == "__main__":
    main()
