"""The pose encoder and the decoders that learn beside it: boxes and sizes, gradients against finite differences, gradients through compiled kernels against torch."""
import pytest
import torch
from recon_nb.core import ConfigError, autocast_bf16, make_generator, seed_all
from recon_nb.fourier import Lattice
from recon_nb.fouriernet import FourierNet, FourierVoxels, trace_slices
from recon_nb.imaging import compute_slice_coords, extract_slices, volume_to_grid
from recon_nb.poseencoder import PoseEncoder, activations, pose_trunks, prepare_images
from recon_nb.so3 import rotvec_to_matrix, sample_rotations


@pytest.mark.parametrize('box', [16, 21, 32, 48])
@pytest.mark.parametrize('trunk', sorted(pose_trunks))
def test_any_box_gives_poses(box, trunk):
    encoder = PoseEncoder(box, trunk=trunk, width=32, n_blocks=2)
    rot, shift = encoder(torch.randn(3, 2, box, box))
    assert torch.allclose(rot @ rot.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5) and shift.shape == (3, 2)


@pytest.mark.parametrize('activation', sorted(activations))
@pytest.mark.parametrize('trunk', sorted(pose_trunks))
def test_every_parameter_learns_and_no_image_knows_another(trunk, activation):
    seed_all(0)
    encoder, images = PoseEncoder(20, trunk=trunk, activation=activation, width=32, n_heads=2), torch.randn(5, 2, 20, 20, requires_grad=True)
    for parameter in encoder.parameters():  # away from the zeros of the start
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    rot, shift = encoder(images)
    (rot[2].square() * torch.randn(2, 3, 3)).sum().add(shift[2].sum()).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in encoder.parameters())
    seen = images.grad.abs().sum((1, 2, 3))
    assert float(seen[2]) > 0 and not bool(seen[[0, 1, 3, 4]].any())


def test_bf16_leaves_rotations_orthonormal():
    encoder, images = PoseEncoder(32, width=64), torch.randn(4, 2, 32, 32)
    with autocast_bf16('cpu', True):
        rot, shift = encoder(images)
    assert rot.dtype == shift.dtype == torch.float32
    assert torch.allclose(rot @ rot.mT, torch.eye(3).expand(4, 3, 3), atol=1e-5)


def test_prefix_and_box_change_the_picture_only_by_its_sampling():
    generator, m = make_generator(0, 'prepare'), Lattice(32).count_within(6)
    images = torch.randn(3, m, dtype=torch.complex64, generator=generator)
    large, small = (prepare_images(images, None, box=box, low_pass=3, window=10.0) for box in (32, 16))  # a window wider than the image
    assert torch.allclose(large[:, :, ::2, ::2], small, atol=1e-4)
    with pytest.raises(ConfigError, match='do not fit a box of 12'):
        prepare_images(images, None, box=12, low_pass=3)


@pytest.mark.parametrize(('box', 'pad'), [(16, 2), (17, 1)])
def test_gradients_of_slices_are_those_of_torch(box, pad):
    generator, lattice = make_generator(box, 'trace'), Lattice(box)
    k, n = lattice.k[: lattice.count_within(box / 2 - 2)].float(), 12
    given, rot = volume_to_grid(torch.randn(box, box, box, generator=generator), pad), sample_rotations(n, generator)
    pull, answers = torch.randn(n, len(k), dtype=torch.complex64, generator=generator), []
    for how in (lambda g, r: trace_slices(g, k, r, pad), lambda g, r: extract_slices(g, compute_slice_coords(k / box, r), box, pad)):
        grid, turn = given.clone().requires_grad_(), torch.zeros(n, 3, requires_grad=True)
        value = how(grid, rotvec_to_matrix(turn) @ rot)
        (value * pull.conj()).real.sum().backward()
        answers.append((value.detach(), grid.grad, turn.grad))
    for one, other in zip(*answers, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * float(other.abs().max())


@pytest.mark.parametrize('kind', [FourierNet, FourierVoxels])
def test_map_decoders_are_hermitian_and_learn_by_pose_and_by_map(kind):
    seed_all(0)
    decoder, lattice = kind(16), Lattice(16)
    decoder.set_envelope(torch.linspace(3, 1, 9))
    if kind is FourierVoxels:
        decoder.grid.data.normal_()
    coords = 0.9 * (torch.rand(200, 3) - 0.5)
    coords[::2, 0] = 0  # the plane between the halves
    with torch.no_grad():
        assert torch.allclose(decoder(-coords), decoder(coords).conj(), atol=1e-5)
    k, turn = lattice.k[: lattice.count_within(5)].float(), torch.zeros(6, 3, requires_grad=True)
    decoder.read_slices(k, rotvec_to_matrix(turn) @ sample_rotations(6, make_generator(0, 'rot'))).abs().square().sum().backward()
    assert bool(turn.grad.any(1).all()) and all(bool(p.grad.any()) for p in decoder.parameters())
    volume = decoder.make_volume(2.0, scale=3.0)
    assert volume.data.shape == (16, 16, 16) and volume.pixel_size == 2.0 and torch.allclose(volume.data, 3 * decoder.volume())
