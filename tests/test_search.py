"""The search for poses: compiled kernels against torch, scores against their definition, the same answer twice, and noise that stays noise."""
import pytest
import torch
from recon_nb import solver
from recon_nb.core import ConfigError, CTFParams, InputError, Poses, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.diagnosis import Agreement, Diagnosis, Gain, compare_poses
from recon_nb.fourier import Lattice, compute_phase_ramp
from recon_nb.imaging import volume_to_grid
from recon_nb.posekernels import add_images, collect_normal, read_slices
from recon_nb.refinement import bring_to_frame, build_map
from recon_nb.search import RunningMap, WhitenedImages, draw_batches, find_poses, is_rising, list_shifts, measure_signal, pick_best, plan_search
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.so3 import align_poses, mirror_rotations, rotvec_to_matrix, sample_rotations
from recon_nb.solver import Start, find_agreeing, solve_poses

QUICK = {'batch_size': 100, 'n_batches': 20, 'n_hold': 4, 'radius': 6.0, 'step': 25.0, 'final_step': 20.0, 'n_candidates': 2}


@pytest.fixture(scope='module')
def simulated():
    return simulate_stack([make_phantom('ribosome', 20)[2]], 400, snr=3.0, shift_sigma=15.0, seed=2)


@pytest.mark.parametrize(('box', 'pad'), [(14, 2), (16, 2), (17, 1)])
def test_compiled_kernels_do_as_torch_does(box, pad):
    generator, lattice = make_generator(box, 'kernels'), Lattice(box)
    n, k = 20, lattice.k.float()
    grid = volume_to_grid(torch.randn(box, box, box, generator=generator), pad)
    rot, shift = sample_rotations(n, generator), 0.1 * torch.randn(n, 2, generator=generator)
    given = {'transfer': torch.randn(n, len(k), generator=generator), 'images': torch.randn(n, len(k), dtype=torch.complex64, generator=generator)}
    answers = []
    for compiled in (True, False):
        sums = torch.zeros(*grid.shape, 3)
        add_images(sums, k, rot, shift, **given, pad=pad, compiled=compiled)
        answers.append((read_slices(grid, k, rot, pad=pad, compiled=compiled), *collect_normal(grid, k, rot, shift, **given, pad=pad, compiled=compiled), sums))
    for one, other in zip(*answers, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


def test_frequencies_beyond_the_grid_are_refused():
    grid = volume_to_grid(torch.randn(12, 12, 12))
    with pytest.raises(InputError, match='reaches to 6'):
        read_slices(grid, torch.tensor([[7.0, 0.0]]), torch.eye(3)[None])


def test_scores_are_log_likelihoods(simulated):
    images, rows = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5)), torch.arange(8)
    running = RunningMap(images, 7.0)
    running.add(torch.arange(400), Poses(simulated.poses.rot, simulated.poses.shift / (20 * simulated.stack.pixel_size)), 7.0)
    grid, rotations, shifts = running.make_grid(), sample_rotations(50, make_generator(0, 'grid')), list_shifts(1 / 32)
    _, score = find_poses(images, rows, grid, rotations, radius=6.0, shifts=shifts, shift_sigma=0.04)
    k, given = images.read(rows, 6.0)
    moved = given['images'][:, None] * compute_phase_ramp(k, shifts)
    model = given['transfer'][:, None] * read_slices(grid, k, rotations)
    error = (moved[:, :, None] - model[:, None]).abs().square().sum(-1) / 2
    exact = given['images'].abs().square().sum(1)[:, None, None] / 2 - error - (shifts.square().sum(1) / (2 * 0.04**2))[:, None]
    best = exact.flatten(1).amax(1)
    assert torch.allclose(score[:, 0], best, rtol=0.02, atol=0.02 * float(best.abs().max()))  # bf16


def test_the_true_pose_wins(simulated):
    """Among the true pose, its transpose, its mirror image and many others, and the true shift, its opposite and others, the truth scores best."""
    images, width = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5)), 20 * simulated.stack.pixel_size
    truth = Poses(simulated.poses.rot, simulated.poses.shift / width)
    grid, generator = build_map(images, torch.arange(400), truth, 8.0).make_grid(), make_generator(0, 'others')
    right = 0
    for i in range(20):
        rotations = torch.cat([truth.rot[i][None], truth.rot[i].mT[None], mirror_rotations(truth.rot[i])[None], sample_rotations(200, generator)])
        shifts = torch.cat([truth.shift[i][None], -truth.shift[i][None], truth.shift[i].flip(0)[None], 0.1 * torch.randn(10, 2, generator=generator)])
        found, _ = find_poses(images, torch.tensor([i]), grid, rotations, radius=8.0, shifts=shifts, shift_sigma=1.0)
        right += torch.equal(found.rot[0, 0], truth.rot[i]) and torch.equal(found.shift[0, 0], truth.shift[i])
    assert right >= 19


def test_the_start_that_explains_most_is_kept_of_those_that_agree(simulated):
    """One of three starts explains most and stands alone; of the two that agree the better is kept."""
    images, width = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5)), 20 * simulated.stack.pixel_size
    true, chance = Poses(simulated.poses.rot, simulated.poses.shift / width), Poses(sample_rotations(400, make_generator(0, 'chance')), simulated.poses.shift / width)
    starts = [Start(None, [share], poses) for share, poses in ((0.5, true), (0.9, chance), (0.6, true))]
    best, agreement = find_agreeing(images, torch.arange(400), starts, 7.0)
    assert best == 2 and agreement.holds and agreement.same > 0.99
    assert find_agreeing(images, torch.arange(400), starts[:2], 7.0)[0] == 1


def test_best_of_scores_by_hand():
    scores = torch.randn(5, 3, 40, generator=make_generator(0, 'scores'))
    one, many = pick_best(scores, 1), pick_best(scores, 4)
    assert torch.equal(one[0][:, 0], scores.flatten(1).amax(1)) and torch.equal(many[0][:, 0], one[0][:, 0])
    for value, shift, rotation in (one, many):
        assert torch.equal(scores[torch.arange(5)[:, None], shift, rotation], value)


def test_less_signal_means_larger_batches(simulated):
    spectrum = measure_signal(ParticleDataset(simulated.stack, window_radius=1.5))
    weaken = lambda f: type(spectrum)(f * spectrum.noise, spectrum.signal, spectrum.transfer, spectrum.count)
    sizes = [plan_search(weaken(f), 10**5, 64).batch_size for f in (1, 3, 10, 30) if not weaken(f).is_barren]
    assert sizes == sorted(sizes) and 250 <= sizes[0] < sizes[-1] <= 2500
    assert len(sizes) >= 3 and plan_search(weaken(1e3), 10**5, 64).n_batches <= 10  # nothing to orient by: told quickly
    with pytest.raises(ConfigError, match='no setting radios'):
        plan_search(spectrum, 400, 20, radios=3)
    with pytest.raises(InputError, match='19 images'):
        plan_search(spectrum, 19, 20)


def test_batches_hold_every_image_once_a_round():
    batches = draw_batches(10, 4, make_generator(0, 'batches'))
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert torch.equal(drawn[:10].sort().values, torch.arange(10)) and torch.equal(drawn[10:].sort().values, torch.arange(10))


def test_rising_needs_more_than_chance():
    assert is_rising([0.1, 0.2], 2) and is_rising([0.5, 0.5, 0.6, 0.6], 2) and not is_rising([0.6, 0.6, 0.6, 0.6], 2) and not is_rising([0.6, 0.5, 0.5, 0.4], 2)


def test_verdicts():
    judge = lambda correlation, mean: Diagnosis(Agreement(correlation, 0.9, 0.1, False), Gain(mean, 0.5), 50.0, 1.0, 2).verdict
    assert [judge(0.95, 20.0), judge(0.3, 20.0), judge(0.3, 0.4), judge(0.95, 0.4)] == ['solved', 'ambiguous', 'failed', 'failed']


def test_poses_are_found_again_and_the_same_twice(simulated):
    one, two = (solve_poses(simulated.stack, seed=1, **QUICK) for _ in range(2))
    assert torch.equal(one.poses.rot, two.poses.rot) and torch.equal(one.map.data, two.map.data)
    assert one.map.box == 20 and one.score.shape == (400,)
    assert one.diagnosis.verdict == 'solved', one.diagnosis.describe()
    moved, aligned = bring_to_frame(one.poses, simulated.poses)  # shifts in Å, of 15 Å along x and y
    assert aligned.median < 8 and float((moved.shift - simulated.poses.shift).norm(dim=1).median()) < 4


@pytest.mark.parametrize('mirrored', [(0.0, 0.0, True), (0.2, 0.2, False), (0.4, 0.4, False), (0.0, 0.4, False)])
def test_both_hands_at_once_are_not_one_answer(simulated, mirrored):
    first, second, agrees = mirrored
    images, generator = WhitenedImages(ParticleDataset(simulated.stack, window_radius=1.5)), make_generator(4, 'hands')
    shift = simulated.poses.shift / (20 * simulated.stack.pixel_size)
    starts = [Poses(torch.where((torch.rand(400, generator=generator) < share)[:, None, None], mirror_rotations(simulated.poses.rot), simulated.poses.rot), shift) for share in (first, second)]
    assert compare_poses(images, torch.arange(400), *starts, radius=7.0).holds == agrees


def test_a_start_may_be_given(simulated):
    told = []
    turn = rotvec_to_matrix(0.3 * torch.randn(400, 3, generator=make_generator(0, 'turn')))
    begin = Poses(turn @ simulated.poses.rot, simulated.poses.shift)
    start = solve_poses(simulated.stack, initial=begin, report=lambda *line: told.append(line), **QUICK)
    assert align_poses(start.poses.rot, simulated.poses.rot).median < 8
    names = list(dict.fromkeys(name for name, _ in told))
    assert names[:2] == ['start 1', 'start 2'] and names[-3:] == ['placing', 'judging', 'refining']
    for name in names:
        shares = [share for told_of, share in told if told_of == name]
        assert shares == sorted(shares) and shares[-1] == 1
    with pytest.raises(InputError, match='399 initial poses for 400 images'):
        solve_poses(simulated.stack, initial=begin[:399])


def test_a_given_start_is_taken_in_fractions_of_the_box(simulated, monkeypatch):
    taken = []
    monkeypatch.setattr(solver, 'make_starts', lambda *words, initial, **options: taken.append(initial) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        solve_poses(simulated.stack, initial=simulated.poses)
    assert torch.allclose(taken[0].shift * 20 * simulated.stack.pixel_size, simulated.poses.shift, atol=1e-4) and torch.equal(taken[0].rot, simulated.poses.rot)


def test_noise_fails_quickly(simulated):
    noise = torch.randn(1000, 32, 32, generator=make_generator(0, 'noise'))
    ctf = CTFParams.from_values(1000, defocus_u=1e4 + 2e4 * torch.rand(1000, generator=make_generator(0, 'defocus'), dtype=torch.float64))
    stack = type(simulated.stack)(noise, None, ctf, None, torch.arange(1000), torch.arange(1000), 6.0, 32)
    solution = solve_poses(stack, step=25.0, final_step=25.0)
    assert solution.diagnosis.verdict == 'failed' and solution.diagnosis.n_starts == 2 and solution.plan.n_batches <= 10
    assert abs(solution.diagnosis.gain.mean) < 5 * solution.diagnosis.gain.error


def test_noise_is_not_solved(simulated):
    noise = torch.randn(400, 20, 20, generator=make_generator(0, 'noise'))
    stack = type(simulated.stack)(noise, None, simulated.stack.ctf, None, simulated.stack.particle, simulated.stack.source_row, simulated.stack.pixel_size, 20)
    solution = solve_poses(stack, max_starts=2, **QUICK)
    assert solution.diagnosis.verdict != 'solved'
