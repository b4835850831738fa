"""Table: do real tilt images, taken one by one, agree with each other?

    RECON_NB_DATA=... python benchmarks/warp_fsc.py

219 images of 6 ribosomes exported by Warp, 24 to 39 tilts each, back-projected with the poses of the star file; FSC between
the maps of even and odd images. The split goes through particles, so this checks that the tilts of each particle fit together
and is no resolution of anything; an error that all tilts of a particle share, such as a transposed rotation, shows little (last
row), and relion_conventions.py is the place that pins it. The star gives 1.96 Å, the pixel before binning; 15 Å is about right for
the images. tests/test_conventions.py asserts the first row.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recon_nb.backprojection import backproject
from recon_nb.core import Batch, Poses
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.fourier import Lattice

star = Path("tomo/warp_particleseries/sta_testing_bin8.star")
required = (0.95, 0.91, 0.89, 0.81, 0.68, 0.53)  # shells 1 to 6, at 15 Å/px


def read_images(
    data: Path,  # folder of real data
    pixel_size: float,  # Å
) -> tuple[Batch, Lattice]:  # (N, 1) images, each a particle of its own
    """Read the tilt images as single particles."""
    stack = load_stack(data / star, pixel_size=pixel_size)
    stack = replace(stack, particle=torch.arange(stack.n_images), tilt=None)
    dataset = ParticleDataset(stack)
    return dataset.get_batch(dataset.particles), dataset.lattice


def measure_fsc(
    data: Path,  # folder of real data
    pixel_size: float = 15.0,  # Å
    *,
    transpose: bool = False,  # take the inverse rotations instead
    with_ctf: bool = True,
    **options,  # for backproject
) -> Tensor:  # (n_shells,)
    """Return the FSC between even and odd images."""
    batch, lattice = read_images(data, pixel_size)
    if transpose:
        batch = replace(batch, poses=Poses(batch.poses.rot.mT, batch.poses.shift))
    return backproject([batch if with_ctf else replace(batch, ctf=None)], lattice, **options).fsc.fsc


def main() -> None:
    """Print FSC by shell for several settings."""
    data = Path(os.environ["RECON_NB_DATA"])
    rows = {
        "15 Å/px": measure_fsc(data),
        "1.96 Å/px, as the star says": measure_fsc(data, 1.96),
        "15 Å/px, no padding": measure_fsc(data, pad=1),
        "15 Å/px, spectral SNR": measure_fsc(data, regularization="spectral_snr"),
        "15 Å/px, no CTF": measure_fsc(data, with_ctf=False),
        "15 Å/px, transposed rotation": measure_fsc(data, transpose=True),
    }
    print(f"{'even/odd FSC at shell':32}" + "".join(f"{s:7d}" for s in range(1, 9)))
    print(f"{'required':32}" + "".join(f"{v:7.2f}" for v in required))
    for label, fsc in rows.items():
        print(f"{label:32}" + "".join(f"{float(v):7.3f}" for v in fsc[1:9]))


if __name__ == "__main__":
    main()
