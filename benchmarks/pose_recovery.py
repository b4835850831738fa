"""Table: do real tilt images, their poses perturbed by 5 degrees, come back?

    RECON_NB_DATA=... python benchmarks/pose_recovery.py [--seeds 3] [--all]

219 images of 6 ribosomes exported by Warp, 24 to 39 tilts each, 64 px of about 15 Å, 3 e/Å² an image. The poses of the star file, themselves estimates, are perturbed by 5 degrees (root mean square angle), each image by itself;
then `straighten_series` brings them to the tilts of the file, noise is measured by shell, and `refine_groups` refines one rotation of each particle and the shifts of its images. Errors are medians over images in degrees, as they stand and
after the best rotation of the whole; FSC is between the maps of even and odd images, so of the same particles, and is no resolution.

What brings the poses back is that the images of a series share their geometry; with --all, the table shows that these images say little by themselves: refined one by one they follow their noise and go further away (even from the poses of
the star), and particles perturbed as a whole stay where they are. With six particles the maps of three and three correlate to shell 3 or 4 and no further. tests/test_refinement.py asserts the third row.
"""

import argparse
import os
from pathlib import Path

import torch

from recon_nb.core import Poses, make_generator
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.fsc import compute_fsc
from recon_nb.refinement import build_map, build_reference, measure_residual, refine_groups, refine_poses, straighten_series
from recon_nb.search import WhitenedImages
from recon_nb.simulate import perturb_poses
from recon_nb.so3 import align_poses, rotation_distance, rotvec_to_matrix

STAR = Path("tomo/warp_particleseries/sta_testing_bin8.star")


class Recovery:
    """The images, what the star says of them, and ways of refining."""

    def __init__(self, data: Path, pixel_size: float = 15.0) -> None:
        self.stack = load_stack(data / STAR, pixel_size=pixel_size)
        self.images = WhitenedImages(ParticleDataset(self.stack, window_radius=1.5))
        self.rows, self.width = torch.arange(self.stack.n_images), self.stack.box * pixel_size
        self.star = Poses(self.stack.poses.rot, self.stack.poses.shift / self.width)

    def perturb(self, degrees: float, seed: int, whole: bool = False) -> Poses:
        """Return poses that are off, image by image or particle by particle."""
        generator = make_generator(seed, "off")
        if not whole:
            return Poses(perturb_poses(self.stack.poses, rot_error=degrees, generator=generator).rot, self.star.shift)
        vectors = torch.randn(int(self.stack.particle.max()) + 1, 3, generator=generator) * torch.deg2rad(torch.tensor(degrees / 3**0.5))
        return Poses(self.star.rot @ rotvec_to_matrix(vectors)[self.stack.particle], self.star.shift)

    def straighten(self, poses: Poses) -> Poses:
        """Bring poses to the tilts of the file."""
        return Poses(straighten_series(poses.rot, self.stack.tilt.tilt_angle.float(), self.stack.particle), poses.shift)

    def refine(self, poses: Poses, together: bool = True) -> Poses:
        """Refine one rotation of each particle, or each image by itself."""
        images = WhitenedImages(self.images.dataset, measure_residual(self.images, self.rows, poses, radius=20.0, half=self.stack.particle % 2 == 0))
        for radius in (8.0, 10.0, 12.0, 14.0):
            grid = build_reference(images, self.rows, poses, radius).make_grid()
            if together:
                poses = refine_groups(images, self.rows, poses, self.stack.particle, grid=grid, radius=radius)
            else:
                poses = refine_poses(images, self.rows, poses, grid=grid, radius=radius)[0]
        return poses

    def score(self, poses: Poses) -> tuple[float, float, torch.Tensor]:
        """Return the median error, the same in the best frame, and the FSC of even and odd images by shell."""
        halves = [build_map(self.images, part, poses[part], 20.0).make_volume() for part in (self.rows[0::2], self.rows[1::2])]
        return float(rotation_distance(poses.rot, self.star.rot).median()), align_poses(poses.rot, self.star.rot, allow_mirror=False).median, compute_fsc(*halves).fsc


def main() -> None:
    """Print errors and FSC by shell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--all", action="store_true", help="also what does not work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recovery = Recovery(Path(os.environ["RECON_NB_DATA"]))
    print(f"{'':42}  error  in frame " + "".join(f"{s:6d}" for s in range(1, 15)))

    def tell(label: str, poses: Poses) -> None:
        error, aligned, fsc = recovery.score(poses)
        print(f"{label:42} {error:6.2f} {aligned:9.2f} " + "".join(f"{float(v):6.2f}" for v in fsc[1:15]), flush=True)

    tell("star", recovery.star)
    if options.all:
        tell("star, refined one by one", recovery.refine(recovery.star, together=False))
    for seed in range(options.seeds):
        off = recovery.perturb(5.0, seed)
        straight = recovery.straighten(off)
        tell(f"seed {seed}: perturbed", off)
        tell(f"seed {seed}: straightened", straight)
        tell(f"seed {seed}: and refined by particle", recovery.refine(straight))
        if options.all:
            whole = recovery.perturb(5.0, seed, whole=True)
            tell(f"seed {seed}: perturbed, refined one by one", recovery.refine(off, together=False))
            tell(f"seed {seed}: particles perturbed as a whole", whole)
            tell(f"seed {seed}: and refined by particle", recovery.refine(whole))


if __name__ == "__main__":
    main()
