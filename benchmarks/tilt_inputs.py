"""Table: is real tilt-series input read right, and does a map come out of it?

    RECON_NB_DATA=... python benchmarks/tilt_inputs.py [--parts warp warptools hand relion5] [--quick] [-o benchmarks/results/tilt_inputs.csv]

warp: 219 images of six ribosomes, 24 to 39 tilts each. Doses against rlnCtfBfactor / -4, and against the guess that ranks tilts by their
cosine (which a peer makes); even/odd FSC, whose split goes through particles and which is a check of the input; 30 epochs of
`recon train --preset tomodrgn` with small networks.

warptools: 40 ribosomes in four tomograms, 34 to 37 of 37 frames visible, float16, CTF-premultiplied. Doses against the tomogram file; the
same images after shuffling, filtering and halving; by how much their noise falls with dose, which tells whether they were dose-weighted; the
map backprojected from them against the RELION map that lies beside it, low-passed to 40 Å within a soft mask, in all 48 ways to
exchange and mirror axes. The picture shows both.

hand: which of the two maps has the hand of the atomic model, by a search over rotations.

relion5: 9,053 particles of a complete project; one pose multiplied out from elementary rotations; written and read back.

The last column says what is required, or what it is compared with. --quick trains for one epoch at 16 px and searches fewer rotations.
tests/test_tiltseries.py and tests/test_benchmarks.py assert the same at toy size.
"""

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from recon_nb.cli import main as run_recon
from recon_nb.consensus import backproject_stack
from recon_nb.core import Volume, make_generator
from recon_nb.ctf import compute_ctf
from recon_nb.datasets import ParticleStack, load_stack
from recon_nb.dose import compute_critical_dose
from recon_nb.files import read_volume, write_particles
from recon_nb.fourier import Lattice
from recon_nb.runs import open_run, read_log
from recon_nb.so3 import rotvec_to_matrix, sample_rotations
from recon_nb.volumes import correlate_volumes, flip_hand, low_pass, make_mask, plot_sections

warp_star = "tomo/warp_particleseries/sta_testing_bin8.star"
warptools = "tomo/warptools_70s/warptools_test_4-tomos_10-ptcls_box-32_angpix-12"
warptools_map = "tomo/warptools_70s/warptools_test_box-32_angpix-12_reconstruct.mrc"
relion5 = "tomo/relion5_project"
required_fsc = (0.95, 0.91, 0.89, 0.81, 0.68, 0.53)  # shells 1 to 6, at 15 Å/px


def make_row(
    part: str,
    quantity: str,
    value: float | str,
    compared: float | str = "",  # what is required, or what it is compared with
) -> dict:
    """Return a row of the table."""
    return {"input": part, "quantity": quantity, "value": f"{value:.4g}" if isinstance(value, float) else value, "required": compared}


def guess_doses(
    rows: pd.DataFrame,  # images of a table
    cosine: np.ndarray,  # (N,) of the tilts, as in the file
    kind: str,  # of sorting, see `numpy.argsort`: tilts of both signs tie
) -> np.ndarray:  # (N,) e/Å²
    """Return the doses that the rank of the cosine implies, sorted upwards and read backwards as a peer does."""
    guess, exposure = np.empty(len(rows)), np.median(np.diff(np.sort(rows["dose"].unique())))
    for _, one in rows.groupby("particle"):
        latest = np.argsort(cosine[one.index], kind=kind)
        guess[one.index[latest[::-1]]] = exposure * np.arange(1, len(one) + 1)
    return guess


def check_warp(data: Path, quick: bool) -> list[dict]:
    """Return the rows of the Warp series."""
    stack = load_stack(data / warp_star, pixel_size=15.0, box=16 if quick else None)
    rows, counts = stack.table.rows, stack.table.rows.groupby("particle").size()
    bfactor, cosine = (np.array(stack.table.source.table.read_columns([label])[label], float) for label in ("rlnCtfBfactor", "rlnCtfScalefactor"))
    off = {kind: np.abs(guess_doses(rows, cosine, kind) - rows["dose"].to_numpy()) for kind in ("quicksort", "stable")}
    found = [
        make_row("warp", "images", stack.n_images, 219), make_row("warp", "particles", stack.n_particles, 6),
        make_row("warp", "tilts per particle", f"{counts.min()} to {counts.max()}", "24 to 39"),
        make_row("warp", "images whose dose is not rlnCtfBfactor / -4", int((rows["dose"].to_numpy() != bfactor / -4).sum()), 0),
        make_row("warp", "pairs of a particle's images with one dose", int(rows.duplicated(["particle", "dose"]).sum()), 0),
        make_row("warp", "convention of the doses", stack.table.dose_convention),
        *(make_row("warp", f"wrong doses if guessed from cos(tilt), sorted by {kind}", int((error > 0.01).sum()), "for comparison") for kind, error in off.items()),
    ]
    for dose in ("off", "model"):
        fsc = backproject_stack(stack, split="image", dose=dose, regularization="constant").fsc.fsc
        found += [make_row("warp", f"even/odd FSC, shell {s}, dose {dose}", float(fsc[s]), required_fsc[s - 1] if dose == "off" else "") for s in range(1, 7)]
    return found + train_small(data, quick)


def train_small(data: Path, quick: bool) -> list[dict]:
    """Train on the Warp series with tomoDRGN's settings and small networks."""
    epochs = 1 if quick else 30
    small = ["--zdim", "4", "--encoder-dim", "64", "--decoder-dim", "64", *(["--box", "16"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        status = run_recon(["train", str(data / warp_star), "-o", f"{folder}/run", "--pixel-size", "15", "--preset", "tomodrgn", "--epochs", str(epochs), *small, "--no-analysis"])
        log = read_log(open_run(f"{folder}/run"))
    first, last = float(log["recon"][0]), float(log["recon"][-1])
    return [
        make_row("warp", "exit status of recon train --preset tomodrgn", status, 0), make_row("warp", "epochs", len(log["recon"]), epochs),
        make_row("warp", "reconstruction error, first epoch", first), make_row("warp", "reconstruction error, last epoch", last, "" if quick else f"below {first:.4g}"),
    ]


def describe(stack: ParticleStack) -> dict:
    """Return {pixels: particle, pose, dose, CTF} of every image."""
    pixels, names = stack.read_images(torch.arange(stack.n_images)).numpy(), stack.table.particles["particle_name"]
    numbers = torch.cat([stack.poses.rot.flatten(1), stack.poses.shift, stack.tilt.dose[:, None], stack.ctf.defocus_u[:, None], stack.ctf.defocus_angle[:, None]], 1).numpy()
    return {image.tobytes(): (names[int(p)], row) for image, p, row in zip(pixels, stack.particle, numbers)}


def count_changed(data: Path) -> int:
    """Shuffle, filter and halve the rows in every order, write and read; count images with other numbers than before."""
    whole, n_changed = describe(load_stack(data / f"{warptools}_optimisation_set.star")), 0
    options = {"tomograms": data / f"{warptools}_tomograms.star", "datadir": data / "tomo/warptools_70s"}
    cut = {
        "shuffle": lambda names, generator: [generator.permutation(names)], "filter": lambda names, generator: [names[: 2 * len(names) // 3]],
        "halve": lambda names, generator: [names[::2], names[1::2]],
    }
    for order in itertools.permutations(cut):
        with tempfile.TemporaryDirectory() as folder:
            files, generator = [data / f"{warptools}.star"], np.random.default_rng(0)
            for number, what in enumerate(order):
                after = []
                for file in files:
                    table = load_stack(file, **options).table
                    for part in cut[what](np.arange(table.n_particles), generator):
                        rows = np.concatenate([np.flatnonzero(table.rows["particle"] == p) for p in part])
                        after.append(Path(folder) / f"{number}_{len(after)}.star")
                        write_particles(after[-1], table, rows)
                files = after
            for file in files:
                found = describe(load_stack(file, **options))
                n_changed += sum(name != whole[pixels][0] or not np.allclose(row, whole[pixels][1], atol=1e-4) for pixels, (name, row) in found.items())
    return n_changed


def measure_dose_slopes(stack: ParticleStack) -> list[tuple[float, float, float]]:  # frequency, slope, expected slope where dose-weighted
    """Return by how much the log power of premultiplied images, CTF taken off, falls with dose, by frequency."""
    lattice, dose = Lattice(stack.box, stack.pixel_size), stack.tilt.dose.double()
    images, ctf = lattice.gather(stack.read_images(torch.arange(stack.n_images))), compute_ctf(stack.ctf, lattice.coords / stack.pixel_size)
    known, found = torch.stack([torch.ones_like(dose), dose, torch.cos(torch.deg2rad(stack.tilt.tilt_angle.double())).log()], 1), []
    for low in (5, 8, 11, 14):
        shell = (lattice.radius >= low) & (lattice.radius < low + 2)
        power = images[:, shell].abs().square().sum(1) / ctf[:, shell].square().sum(1)
        slope = torch.linalg.lstsq(known, power.double().log()[:, None]).solution[1, 0]
        freq = lattice.radius[shell].mean() / (stack.box * stack.pixel_size)
        found.append((float(freq), float(slope), -1 / float(compute_critical_dose(freq[None])[0])))
    return found


def scan_frames(
    volume: Volume,
    reference: Volume,
    mask: Volume,
) -> list[tuple[float, str]]:  # correlation and frame, best first
    """Correlate a map with a reference in all 48 frames, at shifts of up to one voxel."""
    found = []
    for axes, mirrored in itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)):
        data = volume.data.permute(axes)
        for axis in np.flatnonzero(mirrored):
            data = data.flip(int(axis)).roll(1, int(axis))
        moved = (data.roll(shift, (0, 1, 2)) for shift in itertools.product((-1, 0, 1), repeat=3))
        best = max(correlate_volumes(Volume(one, volume.pixel_size), reference, mask=mask) for one in moved)
        order, flipped = "".join("zyx"[a] for a in axes), "".join(name for name, m in zip("zyx", mirrored) if m)
        found.append((best, f"axes {order}, {f'{flipped} mirrored' if flipped else 'none mirrored'}"))
    return sorted(found, reverse=True)


def read_maps(data: Path) -> tuple[Volume, Volume, float, ParticleStack]:
    """Return our map and the reference, both low-passed to 40 Å, the half-maps' FSC in shell 3, and the images."""
    stack = load_stack(data / f"{warptools}_optimisation_set.star")
    result = backproject_stack(stack)
    reference = read_volume(data / warptools_map, stack.pixel_size)  # its header says 12.0024 Å
    return low_pass(result.map, 40.0), low_pass(Volume(reference.data, stack.pixel_size), 40.0), float(result.fsc.fsc[3]), stack


def check_warptools(data: Path, picture: Path) -> list[dict]:
    """Return the rows of the WarpTools set; draw both maps."""
    ours, reference, shell3, stack = read_maps(data)
    counts = stack.table.rows.groupby("particle").size()
    mask = make_mask(reference, dilation=24.0, edge=24.0)
    frames = scan_frames(ours, reference, mask)
    mirrored = flip_hand(ours)
    found = [
        make_row("warptools", "visible images", stack.n_images, 1430), make_row("warptools", "tilts per particle", f"{counts.min()} to {counts.max()}", "34 to 37"),
        make_row("warptools", "type of the stacks", str(stack.images.headers[0].dtype), "float16"), make_row("warptools", "premultiplied", str(stack.premultiplied), "True"),
        make_row("warptools", "pairs of a particle's images with one dose", int(stack.table.rows.duplicated(["particle", "dose"]).sum()), 0),
        make_row("warptools", "images changed by shuffle, filter, halve in all orders", count_changed(data), 0),
        make_row("warptools", "FSC of half-maps (by particle), shell 3", shell3),
        make_row("warptools", "correlation with RELION's map, as it is", correlate_volumes(ours, reference, mask=mask)),
        make_row("warptools", "correlation with RELION's map, mirrored along z", correlate_volumes(mirrored, reference, mask=mask), "at least 0.8"),
        *(make_row("warptools", f"frame of rank {i + 1}: {name}", value) for i, (value, name) in enumerate(frames[:3])),
        *(make_row("warptools", f"slope of log power with dose at 1/{1 / freq:.0f} Å", slope, f"{weighted:.4f} if dose-weighted, else 0") for freq, slope, weighted in measure_dose_slopes(stack)),
    ]
    figure, axes = plt.subplots(3, 3, figsize=(8, 8), layout="constrained")
    for row, (name, volume) in zip(axes, {"RELION": reference, "ours, mirrored along z": mirrored, "ours": ours}.items()):
        plot_sections(volume, axes=row)
        row[0].set_ylabel(f"{name}\n{row[0].get_ylabel()}")
    figure.savefig(picture, dpi=80)
    return found


def sample_volume(
    volume: Volume,
    points: Tensor,  # (n, 3) Å, x y z, from the centre
) -> Tensor:  # (n,)
    """Interpolate a map."""
    index = (points / volume.pixel_size + volume.box // 2 + 0.5) * 2 / volume.box - 1
    return F.grid_sample(volume.data[None, None], index[None, None, None], align_corners=False)[0, 0, 0, 0]


def find_center(volume: Volume) -> Tensor:  # (3,) Å, x y z
    """Return the centre of mass of the density above 30 % of its maximum."""
    weight = (volume.data - 0.3 * volume.data.max()).clamp(min=0)
    axis = (torch.arange(volume.box) - volume.box // 2) * volume.pixel_size
    return torch.stack([(weight.sum(dims) * axis).sum() for dims in ((0, 1), (0, 2), (1, 2))]) / weight.sum()


def fit_model(
    volume: Volume,
    model: Volume,
    n_rotations: int,
) -> float:
    """Return the best correlation of a map with a model over rotations, the best of them refined."""
    axis = (torch.arange(32) - 16) * 12.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(-1, 3)
    points = points[points.norm(dim=1) < 180]
    target, generator = sample_volume(volume, points + find_center(volume)), make_generator(0)
    target = (target - target.mean()) / (target - target.mean()).norm()

    def score(rot: Tensor, offset: Tensor) -> float:
        values = sample_volume(model, points @ rot + find_center(model) + offset)
        return float(((values - values.mean()) * target).sum() / (values - values.mean()).norm())

    still, rotations = torch.zeros(3), sample_rotations(n_rotations, generator).float()
    starts, best = sorted(rotations, key=lambda rot: -score(rot, still))[:6], 0.0
    for rot in starts:
        offset, value = still, score(rot, still)
        for degrees in np.repeat([12.0, 6, 3, 1.5], 50):
            trial = rot @ rotvec_to_matrix(torch.randn(3, generator=generator) * np.deg2rad(degrees)).float(), offset + torch.randn(3, generator=generator) * degrees
            if (other := score(*trial)) > value:
                (rot, offset), value = trial, other
        best = max(best, value)
    return best


def check_hand(data: Path, quick: bool) -> list[dict]:
    """Return the correlations of both maps with the atomic model in both hands."""
    model = low_pass(read_volume(data / "simulated/compositional_64/70S.mrc"), 40.0)
    ours, reference, _, _ = read_maps(data)
    n = 100 if quick else 6000
    maps = {"RELION's map": reference, "our map": ours}
    return [make_row("hand", f"correlation of {name} with the model, {how}", fit_model(volume, model, n)) for name, one in maps.items() for how, volume in (("as it is", one), ("mirrored", flip_hand(one)))]


def turn(axis: int, degrees: float) -> np.ndarray:  # (3, 3)
    """Return an elementary rotation, active and right-handed, from its definition."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return matrix


def orient(rot: float, tilt: float, psi: float) -> np.ndarray:  # (3, 3)
    """Return the matrix of RELION's angles."""
    return (turn(2, rot) @ turn(1, tilt) @ turn(2, psi)).T


def multiply_out(data: Path, table, image: int) -> np.ndarray:  # (3, 3)
    """Return the pose of an image from the numbers in the files."""
    row, tomogram = int(table.rows["particle"].iloc[image]), table.rows["tomogram"].iloc[image]
    labels = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    texts = table.source.source.table.select([row]).read_columns(labels)
    values = [float(texts[label][0]) for label in labels]
    lines = [line.split() for line in (data / relion5 / f"CtfRefine/job067/tilt_series/{tomogram}.star").read_text().splitlines() if line.strip()]
    columns = [line[0] for line in lines if line[0].startswith("_rln")]
    tilt = [line for line in lines if len(line) == len(columns)][int(table.rows["frame"].iloc[image])]
    x, y, z = (float(tilt[columns.index(f"_rlnTomo{name}")]) for name in ("XTilt", "YTilt", "ZRot"))
    return turn(2, z) @ turn(1, y) @ turn(0, x) @ orient(*values[:3]) @ orient(*values[3:])


def check_relion5(data: Path) -> list[dict]:
    """Return the rows of the RELION 5 project."""
    job = data / relion5 / "Refine3D/job074"
    options = {"tomograms": data / relion5 / "CtfRefine/job067/tomograms.star", "require_images": False}
    stack = load_stack(job / "run_optimisation_set.star", **options)
    table = stack.table
    rot, images = table.get_poses(torch.float64).rot.numpy(), np.linspace(0, table.n_images - 1, 200).astype(int)
    error = max(np.abs(rot[i] - multiply_out(data, table, i)).max() for i in images)
    with tempfile.TemporaryDirectory() as folder:
        write_particles(f"{folder}/out.star", table)
        same = Path(f"{folder}/out.star").read_bytes() == (job / "run_data.star").read_bytes()
        again = load_stack(f"{folder}/out.star", **options).table
    return [
        make_row("relion5", "particles", stack.n_particles, 9053), make_row("relion5", "tomograms", int(table.rows["tomogram"].nunique()), 5),
        make_row("relion5", "images", stack.n_images), make_row("relion5", "largest error of 200 poses multiplied out by hand", float(error), "below 1e-9"),
        make_row("relion5", "particle file written back identical", str(same), "True"), make_row("relion5", "and read back identical", str(again.rows.equals(table.rows)), "True"),
    ]


def main() -> None:
    """Check the parts asked for; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["warp", "warptools", "hand", "relion5"], default=["warp", "warptools", "hand", "relion5"])
    parser.add_argument("--quick", action="store_true", help="one epoch at 16 px, few rotations")
    parser.add_argument("-o", "--out", default="benchmarks/results/tilt_inputs.csv", help="table to write; the picture gets the same name")
    options = parser.parse_args()
    if "RECON_NB_DATA" not in os.environ:
        sys.exit("RECON_NB_DATA is not set: it names the folder of real data")
    data, out, rows = Path(os.environ["RECON_NB_DATA"]), Path(options.out), []
    checks = {"warp": lambda: check_warp(data, options.quick), "warptools": lambda: check_warptools(data, out.with_suffix(".png")),
              "hand": lambda: check_hand(data, options.quick), "relion5": lambda: check_relion5(data)}
    for part in options.parts:
        rows += checks[part]()
        pd.DataFrame(rows).to_csv(out, index=False)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
