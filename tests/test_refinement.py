"""Refining poses: radii that reach the edge of every box, supports that cut nothing off, and errors that say what to do."""
import sys
from pathlib import Path

import pytest
import torch
from recon_nb.core import InputError, Poses, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.refinement import (bring_to_frame, build_map, build_reference, find_support, finish_solution, measure_residual, plan_refinement, refine_groups,
                                 refine_halves, refine_poses, refine_together)
from recon_nb.search import WhitenedImages
from recon_nb.simulate import make_phantom, perturb_poses, simulate_stack
from recon_nb.so3 import align_poses, mirror_rotations, rotation_distance, sample_rotations


@pytest.fixture(scope='module')
def noisy():
    simulated = simulate_stack([make_phantom('ribosome', 20)[2]], 400, snr=1.0, shift_sigma=15.0, seed=2)
    width = 20 * simulated.stack.pixel_size
    off = perturb_poses(simulated.poses, rot_error=6.0, shift_error=5.0, generator=make_generator(0, 'off'))
    images = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5))
    return simulated, images, Poses(off.rot, off.shift / width)


@pytest.mark.parametrize('box', [16, 24, 32, 64, 128, 300])
def test_radii_grow_to_the_edge(box):
    radii = plan_refinement(min(10.0, box / 2 - 2), box)
    assert radii == sorted(radii) and box / 2 - 0.2 < radii[-1] == radii[-2] < box / 2 and len(radii) >= 4
    assert all(b <= 1.95 * a for a, b in zip(radii, radii[1:], strict=False))


def test_support_follows_the_particle_wherever_it_is():
    box = 40
    z, y, x = torch.meshgrid(*[torch.arange(box) - box // 2] * 3, indexing='ij')
    ball = lambda centre: ((x - centre) ** 2 + y**2 + z**2 < 25).float()
    for centre in (-9, 0, 9):
        support = find_support(ball(centre))
        assert float((support * ball(centre)).sum()) > 0.999 * float(ball(centre).sum()) and float(support.mean()) < 0.2
        assert float(support[:, :, (box // 2 - centre) - 3].max()) == 0 or centre == 0


def test_reference_is_zero_where_there_is_no_particle(noisy):
    simulated, images, start = noisy
    rows = torch.arange(400)
    plain, reference = (make(images, rows, start, 8.0) for make in (build_map, build_reference))
    assert torch.equal(plain.sums, reference.sums) and bool((reference.mask <= plain.mask).all())
    assert float(reference.mask.mean()) < 0.7 * float(plain.mask.mean()) and bool((reference.solve()[reference.mask == 0] == 0).all())


def test_a_part_at_a_time_is_the_same(noisy):
    _, images, start = noisy
    rows, grid = torch.arange(60), build_reference(images, torch.arange(400), start, 8.0).make_grid()
    whole, loss = refine_poses(images, rows, start[rows], grid=grid, radius=8.0)
    parts, loss_of_parts = refine_poses(images, rows, start[rows], grid=grid, radius=8.0, n_part=17)
    assert float(rotation_distance(whole.rot, parts.rot).max()) < 0.05 and torch.allclose(loss, loss_of_parts, rtol=1e-5)


def test_loss_never_rises(noisy):
    _, images, start = noisy
    rows, grid = torch.arange(100), build_reference(images, torch.arange(400), start, 8.0).make_grid()
    losses = torch.stack([refine_poses(images, rows, start[rows], grid=grid, radius=8.0, n_steps=n)[1] for n in (0, 1, 2, 4, 8)])
    assert bool((losses.diff(dim=0) <= 1e-6 * losses[0]).all())


def test_perturbed_poses_come_back(noisy):
    simulated, images, start = noisy
    found, _ = refine_together(images, torch.arange(400), start, radii=plan_refinement(6.0, 20))
    assert align_poses(found.rot, simulated.poses.rot).median < 0.6 * align_poses(start.rot, simulated.poses.rot).median
    with pytest.raises(InputError, match='one radius'):
        refine_together(images, torch.arange(400), start, radii=[])


def test_shifts_come_back_too_and_in_their_own_direction(noisy):
    """In the map of true poses, which fixes frame and origin, shifts and rotations return to the truth itself."""
    simulated, images, start = noisy
    truth = Poses(simulated.poses.rot, simulated.poses.shift / (20 * simulated.stack.pixel_size))
    rows, grid = torch.arange(400), build_map(images, torch.arange(400), truth, 9.0).make_grid()
    found, _ = refine_poses(images, rows, start, grid=grid, radius=9.0, n_steps=6)
    off = lambda poses: (float((poses.shift - truth.shift).norm(dim=1).median()), float(rotation_distance(poses.rot, truth.rot).median()))
    assert off(found)[0] < 0.35 * off(start)[0] and off(found)[1] < 0.6 * off(start)[1], (off(start), off(found))


def test_a_frame_is_a_rotation_a_hand_and_a_displacement(noisy):
    """A map displaced by d moves the image at pose R by the first two numbers of R d; all of it is found and undone."""
    simulated, _, _ = noisy
    truth = Poses(simulated.poses.rot, simulated.poses.shift / (20 * simulated.stack.pixel_size))
    turn, displacement = sample_rotations(1, make_generator(0, 'frame'))[0], torch.tensor([0.02, -0.03, 0.05])
    moved = Poses(mirror_rotations(truth.rot @ turn), truth.shift + truth.rot[:, :2] @ displacement)
    back, found = bring_to_frame(moved, truth)
    assert found.mirrored and float(rotation_distance(back.rot, truth.rot).max()) < 0.05 and torch.allclose(back.shift, truth.shift, atol=1e-4)


def test_halves_are_of_even_and_of_odd_images(noisy):
    """What happens to odd images changes the second half-map alone."""
    simulated, images, start = noisy
    rot = start.rot.clone()
    rot[1::2] = sample_rotations(200, make_generator(1, 'odd'))
    options = {'radii': [6.0], 'shift_sigma': 0.04}
    one, other = (refine_halves(images, poses, start, **options) for poses in (start, Poses(rot, start.shift)))
    assert torch.equal(one[0].data, other[0].data) and not torch.allclose(one[1].data, other[1].data, rtol=0.1)


def test_scores_are_gains_over_an_empty_image(noisy):
    """Images of something score above zero, images of noise alone hardly."""
    simulated, images, start = noisy
    score = finish_solution(images, start, radius=6.0)[1]
    assert float(score.median()) > 10 and float((score > 0).float().mean()) > 0.99


def test_noise_is_measured_in_the_units_of_the_images(noisy):
    simulated, images, _ = noisy
    truth = Poses(simulated.poses.rot, simulated.poses.shift / (20 * simulated.stack.pixel_size))
    spectrum = measure_residual(images, torch.arange(400), truth, radius=9.0)
    expected = (simulated.noise_sigma * 20 / images.dataset.scale) ** 2  # of a coefficient of white noise in 20 x 20 pixels
    assert spectrum.noise.shape == images.spectrum.noise.shape and torch.allclose(spectrum.noise[2:9], torch.tensor(expected), rtol=0.15)
    assert bool((spectrum.signal > 0).all()) and bool(torch.isfinite(spectrum.information).all())
    again = measure_residual(WhitenedImages(images.dataset, spectrum), torch.arange(400), truth, radius=9.0)  # whitened otherwise, measured alike
    assert torch.allclose(again.noise, spectrum.noise, rtol=0.05)


def test_groups_keep_the_rotations_within(noisy):
    _, images, start = noisy
    group = torch.arange(400) % 50
    grid = build_reference(images, torch.arange(400), start, 8.0).make_grid()
    found = refine_groups(images, torch.arange(400), start, group, grid=grid, radius=8.0)
    for g in (0, 7, 49):  # the change of the map's frame is the same for all images of a group
        change = start.rot[group == g].mT @ found.rot[group == g]
        assert float(rotation_distance(change, change[:1].expand_as(change)).max()) < 0.1
    assert float(rotation_distance(start.rot, found.rot).median()) > 0.5


def test_finishing_tells_how_far_it_is(noisy):
    _, images, start = noisy
    told = []
    poses, score, full, halves = finish_solution(images, start, radius=6.0, report=lambda stage, share: told.append((stage, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1) and len(shares) >= 9 and {stage for stage, _ in told} == {'refining'}
    assert score.shape == (400,) and full.box == halves[0].box == 20 and bool(torch.isfinite(poses.rot).all())


def test_tilt_images_come_back_from_five_degrees(data_dir):
    sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
    from pose_recovery import Recovery

    recovery = Recovery(data_dir)
    off = recovery.perturb(5.0, 0)
    straight = recovery.straighten(off)
    back = recovery.refine(straight)
    errors, fsc = zip(*((score[:2], score[2]) for score in map(recovery.score, (off, straight, back, recovery.star))), strict=True)
    print('median error, as it stands and in the best frame: perturbed {}, straightened {}, refined {}'.format(*errors[:3]))
    assert min(errors[0]) > 4 and max(errors[1]) < 2.5 and max(errors[2]) < 3
    assert float(fsc[2][6:11].mean()) > float(fsc[0][6:11].mean()) + 0.05 and float((fsc[2] - fsc[3])[1:11].abs().max()) < 0.06
