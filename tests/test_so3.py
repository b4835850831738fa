"""Rotations against images that RELION projected and poses that cryoSPARC refined."""
import mrcfile
import numpy as np
import pytest
import starfile
import torch
from recon_nb.so3 import (align_poses, convert_cryosparc_pose, euler_to_matrix, make_rotation_grid, matrix_to_euler, matrix_to_rotvec,
                          mirror_rotations, rotation_distance, rotvec_to_matrix, sample_rotations)
from scipy.ndimage import map_coordinates, shift


def read_map(path):
    """Return the voxels of an MRC file."""
    with mrcfile.open(path, permissive=True) as mrc:
        return mrc.data.astype(np.float32)


def project_map(volume, rot):
    """Sum the map along the beam: voxel centres of the image frame are carried to the map by the transpose of rot."""
    box = len(volume)
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing='ij')
    points = np.stack([x, y, z], axis=-1) @ rot.numpy()  # row vectors: R^T x
    return map_coordinates(volume, np.moveaxis(points[..., ::-1], -1, 0) + box // 2, order=1).sum(axis=0)


def correlate(a, b):
    """Return the correlation of two images."""
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.fixture(scope='module')
def relion(data_dir):
    """Return map, images and poses of an odd box that RELION projected; its centre of an odd box lies one pixel further."""
    folder = data_dir / 'images'
    table = starfile.read(folder / 'rln_proj_65.star')
    table = table['particles'] if isinstance(table, dict) else table
    angles = [torch.tensor(table[f'rlnAngle{name}'].to_numpy()) for name in ('Rot', 'Tilt', 'Psi')]
    return read_map(folder / 'clean70SRibosome_vol_65p.mrc'), read_map(folder / 'rln_proj_65.mrcs'), euler_to_matrix(*angles).float()


def test_euler_convention_is_that_of_relion(relion):
    volume, images, rot = relion
    for image, pose in zip(images, rot):
        assert correlate(shift(project_map(volume, pose), (1, 1), order=1), image) > 0.99
        assert correlate(shift(project_map(volume, pose.T), (1, 1), order=1), image) < 0.6


def test_mirrored_map_at_mirrored_pose_is_the_same_image(relion):
    volume, _, rot = relion
    for pose in rot[:2]:
        image = project_map(volume, pose)
        assert correlate(project_map(volume[::-1], mirror_rotations(pose)), image) > 0.9999
        assert correlate(project_map(volume[::-1], pose), image) < 0.95


def test_cryosparc_poses_survive_every_representation(data_dir):
    rotvec = torch.tensor(np.load(data_dir / 'metadata/cryosparc_P12_J24_001_particles.cs')['alignments3D/pose'].astype(np.float64))
    rot = convert_cryosparc_pose(rotvec)
    assert torch.allclose(rot @ rot.mT, torch.eye(3).double().expand_as(rot), atol=1e-12)
    assert rotation_distance(euler_to_matrix(*matrix_to_euler(rot)), rot).max() < 1e-5
    assert rotation_distance(rotvec_to_matrix(matrix_to_rotvec(rot)), rot).max() < 1e-5
    back = matrix_to_rotvec(rot.mT)
    short = rotvec.norm(dim=-1) < np.pi - 1e-3
    assert torch.allclose(back[short], rotvec[short], atol=1e-9)


def test_euler_round_trip_near_the_poles_in_single_precision():
    generator = torch.Generator().manual_seed(0)
    small = 10 ** (-8 * torch.rand(5000, generator=generator))
    for tilt in (small, 180 - small):
        rot = euler_to_matrix(360 * torch.rand(5000, generator=generator), tilt, 360 * torch.rand(5000, generator=generator))
        assert (euler_to_matrix(*matrix_to_euler(rot)) - rot).abs().max() < 1e-6


@pytest.mark.parametrize('step', [40.0, 20.0, 12.0])
def test_grid_covers_within_its_step(step):
    grid = make_rotation_grid(step)
    probes = sample_rotations(3000, torch.Generator().manual_seed(1))
    cosine = (torch.einsum('aij,bij->ab', probes, grid).max(dim=1).values - 1) / 2
    assert torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).max() <= step


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('mirrored', [False, True])
def test_alignment_withstands_forty_percent_of_random_poses(seed, mirrored):
    generator = torch.Generator().manual_seed(seed)
    a, frame = sample_rotations(200, generator), sample_rotations(1, generator)[0]
    b = (mirror_rotations(a) if mirrored else a) @ frame.T
    b = b @ rotvec_to_matrix(torch.deg2rad(torch.tensor(2.0)) * torch.randn(200, 3, generator=generator))
    b[torch.randperm(200, generator=generator)[:80]] = sample_rotations(80, generator)
    found = align_poses(a, b)
    assert found.mirrored == mirrored
    assert rotation_distance(found.rotation, frame) < 1.0
    assert found.median < 8.0


@pytest.mark.parametrize('n', [1, 2, 3])
def test_alignment_of_very_few_poses(n):
    a, frame = sample_rotations(n, torch.Generator().manual_seed(3)), sample_rotations(1, torch.Generator().manual_seed(4))[0]
    found = align_poses(a, a @ frame.T)
    assert not found.mirrored
    assert found.errors.max() < 1e-2
