"""The compiled kernels against torch in every shape, at the edges of the grid, with gradients and in several processes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recon_nb.core import InputError, NumericalError, make_generator
from recon_nb.fourier import Lattice
from recon_nb.kernels import Moments, average_density, order_rows, project_basis, project_slices, solve_basis
from recon_nb.so3 import sample_rotations

root = Path(__file__).resolve().parent.parent


def make_problem(box, n_components, n_images, seed=0):
    """Return a random basis, (k, rot, transfer, images), and first and second moments."""
    generator, k = make_generator(seed, 'kernels'), Lattice(box).k
    k = k[order_rows(k)].float()
    r = -(-box // 2)
    basis = torch.randn((2 * r + 1) ** 2 * (r + 1), 2 * n_components, generator=generator)
    transfer = torch.randn(n_images, len(k), generator=generator)
    images = torch.randn(n_images, len(k), dtype=torch.complex64, generator=generator)
    first = torch.randn(n_images, n_components, generator=generator)
    problem = (k, sample_rotations(n_images, generator).float(), transfer, images)
    return basis, problem, first, first[:, :, None] * first[:, None] + 0.1 * torch.eye(n_components)


def project(basis, problem, box, **options):
    """Return G and b."""
    k, rot, transfer, images = problem
    return project_basis(basis, k, rot, transfer, images=images, box=box, **options)


def assert_close(one, other, tolerance=2e-5):
    """Compare by the largest value."""
    assert one.shape == other.shape and one.dtype == other.dtype
    assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize('box', [2, 3, 4, 5, 8, 17, 24])
@pytest.mark.parametrize('n_components', [1, 2, 4, 5, 9, 11])
def test_compiled_equals_torch(box, n_components):
    basis, problem, first, second = make_problem(box, n_components, 9, seed=box)
    for one, other in zip(project(basis, problem, box), project(basis, problem, box, compiled=False), strict=True):
        assert_close(one, other)
    one, other = (Moments.zeros(box, n_components).add(*problem, first=first, second=second, compiled=c) for c in (True, False))
    assert_close(one.table, other.table)
    ridge = torch.rand(box // 2 + 1, n_components) + 0.5
    assert_close(solve_basis(one, ridge, box / 2), solve_basis(one, ridge, box / 2, compiled=False))


@pytest.mark.parametrize('axis', range(3))
def test_poses_along_the_axes_stay_on_the_grid(axis):
    """Samples exactly on voxels, on kx = 0 and on the outermost shells."""
    box, quarter = 12, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).roll((axis, axis), (0, 1))
    basis, (k, _, transfer, images), first, second = make_problem(box, 3, 4)
    rot = torch.stack([torch.linalg.matrix_power(quarter, power) for power in range(4)])
    problem = (k, rot, transfer, images)
    for one, other in zip(project(basis, problem, box), project(basis, problem, box, compiled=False), strict=True):
        assert_close(one, other)
    one, other = (Moments.zeros(box, 3).add(*problem, first=first, second=second, compiled=c) for c in (True, False))
    assert_close(one.table, other.table)


def test_rounding_across_the_fold_does_not_matter():
    """A sample a hair on either side of kx = 0 gives the same completed moments."""
    box = 12
    _, (k, _, transfer, images), first, second = make_problem(box, 3, 1)
    angle = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    rot = torch.stack([torch.stack([angle.sin(), zero, angle.cos()], -1), torch.stack([zero, one, zero], -1),
                       torch.stack([-angle.cos(), zero, angle.sin()], -1)], 1).float()
    voxels = torch.arange(13 * 13 * 7)
    sides = [Moments.zeros(box, 3).add(k, r[None], transfer, images, first=first, second=second).read(voxels) for r in rot]
    for here, there in zip(*sides, strict=True):
        assert_close(here, there, 1e-4)


def test_no_images_and_one_image():
    basis, problem, first, second = make_problem(8, 3, 1)
    nothing = (problem[0], *(t[:0] for t in problem[1:]))
    gram, cross = project(basis, nothing, 8)
    assert gram.shape == (0, 3, 3) and cross.shape == (0, 3)
    assert not Moments.zeros(8, 3).add(*nothing, first=first[:0], second=second[:0]).table.any()
    assert Moments.zeros(8, 3).add(*problem, first=first, second=second).table.any()


@pytest.mark.parametrize('n_threads', [2, 3, 7])
def test_threads_do_not_change_a_bit(n_threads):
    basis, problem, first, second = make_problem(24, 5, 50)
    ridge, before, answers = torch.ones(1, 5), torch.get_num_threads(), []
    for n in (1, n_threads):
        torch.set_num_threads(n)
        moments = Moments.zeros(24, 5).add(*problem, first=first, second=second)
        answers.append((*project(basis, problem, 24), moments.table, solve_basis(moments, ridge, 12)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_batches_of_any_size_agree():
    """G and b of an image do not depend on its batch; moments only to rounding."""
    basis, problem, first, second = make_problem(16, 3, 20)
    gram, cross = project(basis, problem, 16)
    moments = Moments.zeros(16, 3)
    for part in torch.arange(20).split(7):
        few = (problem[0], *(t[part] for t in problem[1:]))
        alone = project(basis, few, 16)
        assert torch.equal(alone[0], gram[part]) and torch.equal(alone[1], cross[part])
        moments.add(*few, first=first[part], second=second[part])
    assert_close(moments.table, Moments.zeros(16, 3).add(*problem, first=first, second=second).table)


def test_gradients_reach_basis_and_rotations():
    basis, problem, _, _ = make_problem(8, 2, 3)
    basis.requires_grad_()
    project(basis, problem, 8)[1].sum().backward()
    assert basis.grad.abs().sum() > 0
    k, rot = problem[:2]
    rot = rot.double().requires_grad_()
    step = torch.randn(rot.shape, dtype=torch.float64, generator=make_generator(0, 'step')) * 1e-5
    energy = lambda r: project_slices(basis.detach().double(), k, r, box=8).abs().square().sum()  # noqa: E731
    (slope,) = torch.autograd.grad(energy(rot), rot)
    difference = (energy(rot + step) - energy(rot - step)).detach()
    assert float(difference) == pytest.approx(2 * float((slope * step).sum()), rel=1e-3)


def test_nan_is_not_hidden():
    basis, (k, rot, transfer, images), first, second = make_problem(8, 2, 3)
    images[1, 5] = torch.nan
    _, cross = project(basis, (k, rot, transfer, images), 8)
    assert torch.isfinite(cross).all(1).tolist() == [True, False, True]
    moments = Moments.zeros(8, 2).add(k, rot, transfer, images, first=first, second=second)
    assert not torch.isfinite(moments.table).all()
    transfer[0, 3] = torch.nan
    others = Moments.zeros(8, 2).add(k, rot, transfer, images.nan_to_num(), first=first, second=second)
    for compiled in (True, False):
        for bad in (moments, others, Moments(-others.table.nan_to_num().abs(), 8, 2)):
            with pytest.raises(NumericalError, match='not finite'):
                solve_basis(bad, torch.full((1, 2), 1e-6), 4, compiled=compiled)


def test_mistakes_are_named():
    basis, (k, rot, transfer, images), first, second = make_problem(8, 2, 3)
    with pytest.raises(InputError, match='Matrix 1 of rot'):
        project(basis, (k, rot * torch.tensor([1.0, 1.1, 1.0])[:, None, None], transfer, images), 8)
    with pytest.raises(InputError, match='transfer'):
        project(basis, (k[1:], rot, transfer, images), 8)
    with pytest.raises(InputError, match='basis'):
        project(basis[:-1], (k, rot, transfer, images), 8)
    with pytest.raises(InputError, match='second'):
        Moments.zeros(8, 2).add(k, rot, transfer, images, first=first, second=second[:, :1])
    with pytest.raises(InputError, match='ridge'):
        solve_basis(Moments.zeros(8, 2), torch.ones(4), 4)


def test_density_is_the_mean_of_the_diagonal():
    _, problem, first, second = make_problem(8, 2, 30)
    moments = Moments.zeros(8, 2).add(*problem, first=first, second=second)
    den, _ = moments.read(torch.tensor([(4 * 9 + 4) * 5]))  # the origin, the only voxel of shell 0
    torch.testing.assert_close(average_density(moments)[0], den[0].diagonal())


def test_moments_sum_over_processes(tmp_path):
    """Two processes with half of the images each end with the sums of all of them."""
    script = tmp_path / 'half.py'
    script.write_text(
        'import sys, torch\n'
        f'sys.path.insert(0, {str(root / "tests")!r})\n'
        'from test_kernels import make_problem\n'
        'from recon_nb.kernels import Moments\n'
        'rank = int(sys.argv[1])\n'
        'torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)\n'
        '_, (k, *images), first, second = make_problem(8, 2, 6)\n'
        'moments = Moments.zeros(8, 2).add(k, *(t[rank::2] for t in images), first=first[rank::2], second=second[rank::2])\n'
        'torch.distributed.barrier()\n'
        'table = moments.reduce().table\n'
        '_, problem, first, second = make_problem(8, 2, 6)\n'
        'torch.testing.assert_close(table, Moments.zeros(8, 2).add(*problem, first=first, second=second).table, atol=1e-4, rtol=1e-4)\n'
        'torch.distributed.destroy_process_group()\n', encoding='utf-8')
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    runs = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path / 'meeting')], env=environment,
                             stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
