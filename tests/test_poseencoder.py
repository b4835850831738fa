"""The pose encoder and the decoders that learn beside it: boxes and sizes, gradients against finite differences, gradients through compiled kernels against torch."""
import pytest
import torch
from recon_nb.core import ConfigError, autocast_bf16, make_generator, seed_all
from recon_nb.fourier import Lattice
from recon_nb.poseencoder import PoseEncoder, activations, pose_trunks, prepare_images


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
