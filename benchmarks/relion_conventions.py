"""Table: do images that RELION projected fix the signs of our rotations and shifts?

    RECON_NB_DATA=... python benchmarks/relion_conventions.py

Reprojection: a volume is projected at the angles and origins of a star file and compared with RELION's own images.
Backprojection: images are put back into a volume under the right and under wrong conventions; only the right one makes
the halves agree. tests/test_conventions.py asserts these numbers.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recon_nb.backprojection import backproject
from recon_nb.core import Poses, Volume
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.files import read_volume
from recon_nb.fourier import Lattice, fourier_crop
from recon_nb.imaging import project_volume, shift_images

# Where RELION's origin lies relative to ours (voxel D // 2), in px, x y (z): of the map that was projected, and of the
# images. In an odd box RELION centres images one pixel further on; the 64 px map was resampled about its corner.
offsets = {
    "rln_proj_64": ((-0.5, -0.5, -0.5), (0.0, 0.0)),
    "rln_proj_64_shifted": ((0.0, 0.0, 0.0), (0.0, 0.0)),
    "rln_proj_65": ((0.0, 0.0, 0.0), (1.0, 1.0)),
}

conventions = {
    "as read": lambda p: p,
    "transposed rotation": lambda p: Poses(p.rot.mT, p.shift),
    "opposite shift": lambda p: Poses(p.rot, -p.shift),
    "no shift": lambda p: Poses(p.rot, 0 * p.shift),
    "x and y of the shift swapped": lambda p: Poses(p.rot, p.shift.flip(-1)),
}


def correlate_images(
    a: Tensor,  # (n, M) complex
    b: Tensor,  # (n, M) complex
) -> Tensor:  # (n,)
    """Return the correlation of images whatever their mean."""
    a, b = a[:, 1:], b[:, 1:]
    return (a.conj() * b).real.sum(-1) / (a.abs().square().sum(-1) * b.abs().square().sum(-1)).sqrt()


def compare_reprojections(
    folder: Path,  # data/images
    name: str,  # of star and stack
) -> dict[str, Tensor]:  # convention to (n,) correlations with RELION's images
    """Project the 70S map at the poses of a star file under several conventions."""
    stack = load_stack(folder / f"{name}.star", pixel_size=1.0)
    lattice = Lattice(stack.box)
    data = read_volume(folder / "clean70SRibosome_vol_65p.mrc", pixel_size=1.0).data
    volume = Volume(fourier_crop(data, stack.box, n_dims=3), 1.0)
    images = lattice.gather(stack.read_images(torch.arange(stack.n_images)))
    of_map, of_image = (torch.tensor(t) for t in offsets[name])
    result = {}
    for label, change in conventions.items():
        poses = change(stack.poses)
        projections = project_volume(volume, poses)
        offset = (poses.rot @ of_map)[:, :2] + of_image
        result[label] = correlate_images(shift_images(projections, offset, lattice), images)
    return result


def compare_backprojections(
    path: Path,  # star, or mrcs with poses beside it
    **options,  # for load_stack
) -> dict[str, Tensor]:  # convention to (n_shells,) even/odd FSC
    """Backproject a stack under several conventions."""
    dataset = ParticleDataset(load_stack(path, **options))
    batch = dataset.get_batch(dataset.particles)
    return {
        label: backproject([replace(batch, poses=change(batch.poses))], dataset.lattice).fsc.fsc
        for label, change in conventions.items()
    }


def main() -> None:
    """Print both tables."""
    folder = Path(os.environ["RECON_NB_DATA"]) / "images"
    print("Correlation of our projections with RELION's, lowest and highest of the stack")
    print(f"{'':32}" + "".join(f"{name:>24}" for name in offsets))
    tables = {name: compare_reprojections(folder, name) for name in offsets}
    for label in conventions:
        ranges = (tables[name][label] for name in offsets)
        print(f"{label:32}" + "".join(f"{float(r.min()):16.4f} {float(r.max()):7.4f}" for r in ranges))
    print("\nEven/odd FSC of backprojections, mean of shells 1 to 12")
    sets = {
        "RELION, 24 images": compare_backprojections(folder / "relion_proj_batch.star"),
        "RELION, other padding": compare_backprojections(folder / "relion_proj_batch_pfac3.mrcs", pixel_size=3.54, poses=folder / "relion_proj_batch.star", ctf=folder / "relion_proj_batch.star"),
        "cryoDRGN pickles": compare_backprojections(folder / "hand.mrcs", pixel_size=1.0, poses=folder / "hand_rot_trans.pkl"),
    }
    print(f"{'':32}" + "".join(f"{name:>24}" for name in sets))
    for label in conventions:
        print(f"{label:32}" + "".join(f"{float(fsc[label][1:13].mean()):24.3f}" for fsc in sets.values()))


if __name__ == "__main__":
    main()
