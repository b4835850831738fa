"""Poses learnt by a network: turns and poses turned back, the loss that ranks, schedules, both kinds of map, and what a seed fixes."""

import dataclasses

import pytest
import torch

from recon_nb.amortised import (PRESETS, AmortisedConfig, PoseLearner, choose_kept, disturb_poses, learn_poses, make_amortised_config, map_kinds,
                                plan_keep, plan_radius, rank_images, read_poses, solve_amortised)
from recon_nb.candidates import ask_winner, compute_errors, list_candidates, make_turns, turn_back, turn_images, turn_kinds
from recon_nb.core import ConfigError, Poses, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.fourier import Lattice, compute_phase_ramp
from recon_nb.imaging import volume_to_grid
from recon_nb.posekernels import read_slices
from recon_nb.search import WhitenedImages
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.so3 import rotation_distance, sample_rotations

QUICK = {'epochs': 1.0, 'batch_size': 50, 'width': 32, 'n_blocks': 1, 'turns': 'four', 'memory': 200}


@pytest.fixture(scope='module')
def images():
    phantom = make_phantom('ribosome', 20)[2]
    return WhitenedImages(ParticleDataset(simulate_stack([phantom], 200, snr=3.0, shift_sigma=5.0, seed=1).stack, window_radius=1.5))


@pytest.mark.parametrize('kind', turn_kinds)
@pytest.mark.parametrize('mirror', [False, True])
def test_turned_poses_turn_back(kind, mirror):
    turns = make_turns(kind, mirror=mirror, generator=make_generator(0, 'turns'))
    assert len(turns) == turn_kinds[kind][0] * (1 + mirror) and torch.allclose(torch.linalg.det(turns), torch.ones(len(turns)), atol=1e-5)
    truth = Poses(sample_rotations(30, make_generator(0, 'truth')), torch.randn(30, 2, generator=make_generator(0, 'shift')))
    seen = Poses(turns[:, None] @ truth.rot, (turns[:, None, :2, :2] @ truth.shift[..., None])[..., 0])
    back = turn_back(seen, turns[:, None])
    assert torch.allclose(back.rot, truth.rot.expand_as(back.rot), atol=1e-5) and torch.allclose(back.shift, truth.shift.expand_as(back.shift), atol=1e-5)


@pytest.mark.parametrize('box', [19, 20])
def test_right_angles_and_mirrors_are_exact(box):
    inner = torch.nn.functional.pad(torch.randn(2, 3, box - 4, box - 4, generator=make_generator(0, 'pixels')), (2, 2, 2, 2))
    turns = make_turns('four')
    once = turn_images(inner, turns[1:2])
    assert torch.allclose(turn_images(once, turns[3:4]), inner, atol=1e-4)  # 90 and 270
    assert torch.allclose(turn_images(turn_images(inner, turns[4:5]), turns[4:5]), inner, atol=1e-4)  # the mirror twice
    mirrored = turn_images(inner, turns[4:5])
    expected = torch.flip(inner, (3,)) if box % 2 else torch.roll(torch.flip(inner, (3,)), 1, 3)
    assert torch.allclose(mirrored, expected, atol=1e-4)


@pytest.mark.parametrize('box', [20, 28])
def test_a_turned_image_is_the_view_at_the_turned_pose(box):
    """Turned by right angles and mirrored, the image at pose R and shift t is that at Q R and Q t: an image mirrored in x is the view diag(-1, 1, -1) R, and t_x changes its sign."""
    phantom, lattice, turns = make_phantom('ribosome', box)[2], Lattice(box), make_turns('four')
    grid = volume_to_grid(phantom.data, 2)
    draw = lambda rot, shift: lattice.scatter(read_slices(grid, lattice.k, rot) * compute_phase_ramp(lattice.k.float(), -shift))
    rot, shift = sample_rotations(1, make_generator(0, 'pose')), torch.tensor([[0.06, -0.1]])
    turned = turn_images(draw(rot, shift)[None].expand(8, -1, -1, -1), turns)[:, 0]
    likeness = lambda shifts: torch.nn.functional.cosine_similarity(turned.flatten(1), draw(turns @ rot, shifts).flatten(1))
    assert float(likeness((turns[:, :2, :2] @ shift[0, :, None])[..., 0]).min()) > 0.995 and float(likeness(shift.expand(8, 2))[1:].max()) < 0.99
    assert torch.equal(turns[4], torch.diag(torch.tensor([-1.0, 1.0, -1.0])))


def test_what_is_explained_ranks_before_what_is_not():
    """By gain a bright image that is explained comes before a faint one, and both before images of which nothing is explained, which are all alike."""
    transfer, images = torch.ones(4, 30), torch.randn(1, 30, dtype=torch.complex64, generator=make_generator(0, 'bright')) * torch.tensor([3.0, 1.0, 1.0, 3.0])[:, None]
    power = images.abs().square().sum(1) / 30
    left = power * torch.tensor([0.2, 0.2, 1.0, 1.0])  # the last two are not explained at all
    rank = rank_images(left, transfer=transfer, images=images, rule='gain')
    assert rank.argsort()[:2].tolist() == [0, 1] and torch.allclose(rank[2:], torch.zeros(2), atol=1e-5)
    assert torch.equal(rank_images(left, transfer=transfer, images=images, rule='error'), left)


@pytest.mark.parametrize('share', [0.3, 0.7, 1.0])
def test_those_of_least_error_teach(share):
    rank = torch.randn(40, generator=make_generator(0, 'rank'))
    kept, weight = choose_kept(rank, share)
    taught = kept[weight > 0]
    assert len(taught) == round(40 * share) and (share == 1 or float(rank[taught].max()) < float(rank[[i for i in range(40) if i not in taught]].min()))


def test_errors_by_hand(images):
    k, given = images.read(torch.arange(4), 5.0)
    slices = torch.randn(4, 3, len(k), dtype=torch.complex64, generator=make_generator(0, 'slices'))
    shift = 0.05 * torch.randn(4, 3, 2, generator=make_generator(0, 'shift'))
    errors = compute_errors(slices, shift, k=k, **given)
    moved = given['images'][2] * compute_phase_ramp(k, shift[2, 1])
    by_hand = (given['transfer'][2] * slices[2, 1] - moved).abs().square().sum() / given['transfer'][2].square().sum()
    assert float(errors[2, 1]) == pytest.approx(float(by_hand), rel=1e-5)
    nothing = compute_errors(slices, shift, k=k, mask=torch.zeros(20, 20), **given)
    assert float(nothing.abs().max()) == 0


def test_heads_are_told_apart():
    poses = sample_rotations(6, make_generator(0, 'heads'))

    def two_heads(shown):
        n = len(shown)
        return poses[:2].expand(n, 2, 3, 3), torch.tensor([[0.1, 0.0], [0.0, 0.2]]).expand(n, 2, 2)

    shown, turns = torch.zeros(5, 2, 8, 8), make_turns('four')
    found = list_candidates(two_heads, shown, turns)
    assert found.shift.shape == (5, 8, 2, 2)
    winner = torch.tensor([0, 1, 6, 9, 15])
    asked = ask_winner(two_heads, shown, turns, winner=winner, n_heads=2)
    flat = Poses(found.rot.flatten(1, 2), found.shift.flatten(1, 2))
    each = torch.arange(5)
    assert torch.allclose(asked.rot, flat.rot[each, winner], atol=1e-6) and torch.allclose(asked.shift, flat.shift[each, winner], atol=1e-6)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match='decoder'):
        AmortisedConfig(decoder='clay')
    with pytest.raises(ConfigError, match='Unknown preset'):
        make_amortised_config('nothing')
    with pytest.raises(ConfigError, match='it goes from coarse'):
        plan_radius(AmortisedConfig(end_resolution=1.0), 0.0, box=32, pixel_size=4.0)
    assert all(isinstance(make_amortised_config(name), AmortisedConfig) for name in PRESETS)
    steps = dataclasses.replace(AmortisedConfig(), n_radii=3)
    assert sorted({plan_radius(steps, p / 100, box=64, pixel_size=4.0) for p in range(101)}) == pytest.approx([3.0, 5.5, 8.0])
    assert {plan_keep(AmortisedConfig(keep=0.7), p / 10) for p in range(11)} == {1.0, 0.7}


@pytest.mark.parametrize('decoder', map_kinds)
@pytest.mark.parametrize('options', [{}, {'mask_radius': 0.4, 'keep': 0.5, 'keep_from': 0.0, 'keep_to': 1.0, 'disturbance': 5.0, 'n_heads': 2, 'activation': 'siren'}])
def test_a_step_moves_encoder_and_map(images, decoder, options):
    learner = PoseLearner(images, AmortisedConfig(**{**QUICK, 'decoder': decoder, **options}), seed=0)
    before = [p.detach().clone() for p in learner.encoder.parameters()]
    old = learner.map.make_volume().data.clone()
    steps = list(learn_poses(learner))
    assert len(steps) == 4 and all(torch.isfinite(torch.tensor([s.loss, s.share])).all() for s in steps)
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.encoder.parameters(), strict=True))
    assert not torch.equal(old, learner.map.make_volume().data)
    poses, errors, direct = read_poses(learner, torch.arange(20))
    assert torch.allclose(torch.linalg.det(poses.rot), torch.ones(20), atol=1e-4) and errors.shape == (20,) and direct.shift.shape == (20, 2)


def test_a_seed_fixes_everything_and_starts_differ(images):
    one, two, other = (solve_amortised(images.dataset, AmortisedConfig(**QUICK), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.poses.rot, two.poses.rot) and torch.equal(one.map.data, two.map.data) and one.history == two.history
    assert not torch.equal(one.poses.rot, other.poses.rot)
    both = solve_amortised(images.dataset, AmortisedConfig(**QUICK, n_starts=2), seed=3)
    assert len(both.shares) == 2 and both.shares[0] == one.shares[0]


def test_disturbance_keeps_the_gradient():
    rot = sample_rotations(3, make_generator(0, 'rot')).requires_grad_()
    disturb_poses(Poses(rot, torch.zeros(3, 2)), 4.0, torch.randn(3, 3, generator=make_generator(0, 'noise'))).rot.sum().backward()
    assert rot.grad is not None
    assert float(rotation_distance(disturb_poses(Poses(rot.detach(), torch.zeros(3, 2)), 4.0, torch.randn(3, 3, generator=make_generator(0, 'noise'))).rot, rot.detach()).max()) < 25


@pytest.mark.parametrize('text, says', [('[1, 2]', 'holds a list'), ('{', 'no file of settings'), (None, 'no file of settings'), ('{"epoch": 3}', 'Did you mean "epochs"')])
def test_a_file_of_settings_that_is_none_is_refused_in_words(tmp_path, text, says):
    if text is not None:
        (tmp_path / 'own.json').write_text(text)
    with pytest.raises(ConfigError, match=says):
        make_amortised_config(tmp_path / 'own.json')
