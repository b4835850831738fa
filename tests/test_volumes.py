"""Masks, FSC, backprojection and metrics of heterogeneity beyond what their notebooks show."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon_nb.backprojection import FourierSums, add_batch, assign_halves, backproject, solve_sums
from recon_nb.core import Batch, CTFParams, InputError, Poses, Volume, make_generator
from recon_nb.fourier import Lattice, make_soft_mask
from recon_nb.fsc import FSCCurve, compute_fsc, correct_fsc, find_crossing, find_resolution, randomize_phases
from recon_nb.heterogeneity import compute_image_fsc, score_ensemble
from recon_nb.imaging import project_volume
from recon_nb.so3 import sample_rotations
from recon_nb.volumes import flip_hand, low_pass, make_mask


def make_noise(box: int, seed: int, pixel_size: float = 2.0) -> Volume:
    return Volume(torch.randn(box, box, box, generator=make_generator(seed, "volume")), pixel_size)


def make_tilt_batch(volume: Volume, n: int, n_tilts: int, seed: int = 0) -> Batch:
    """Noise-free images with a random number of valid tilts for each particle."""
    generator = make_generator(seed, "tilts")
    total = n * n_tilts
    poses = Poses(sample_rotations(total, generator).float(), 3 * torch.randn(total, 2, generator=generator))
    ctf = CTFParams.from_values(total, defocus_u=8000 + 9000 * torch.rand(total, generator=generator), defocus_angle=30.0, defocus_v=9000.0)
    images = project_volume(volume, poses, ctf)
    fold = lambda t: t.unflatten(0, (n, n_tilts))
    valid = torch.arange(n_tilts) < torch.randint(1, n_tilts + 1, (n, 1), generator=generator)
    return Batch(fold(images), poses.map(fold), ctf.map(fold), None, valid, torch.arange(n))


# FSC


def compute_fsc_by_hand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The definition, on the full complex transform."""
    box = a.shape[0]
    k = np.fft.fftfreq(box, 1 / box)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int)
    fa, fb = np.fft.fftn(a.astype(float)), np.fft.fftn(b.astype(float))
    curve = []
    for s in range(box // 2 + 1):
        x, y = fa[shell == s], fb[shell == s]
        curve.append((x * y.conj()).sum().real / np.sqrt((abs(x) ** 2).sum() * (abs(y) ** 2).sum()))
    return np.array(curve)


@settings(max_examples=20, deadline=None)
@given(box=st.integers(4, 21), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_fsc_equals_its_definition(box, seed, scale):
    a = make_noise(box, seed)
    b = Volume(scale * (a.data + make_noise(box, seed + 1).data), 2.0)
    np.testing.assert_allclose(compute_fsc(a, b).fsc, compute_fsc_by_hand(a.data.numpy(), b.data.numpy()), atol=2e-5)


def test_fsc_refuses_unlike_grids():
    with pytest.raises(InputError, match="boxes"):
        compute_fsc(make_noise(8, 0), make_noise(9, 0))
    with pytest.raises(InputError, match="pixel sizes"):
        compute_fsc(make_noise(8, 0, 2.0), make_noise(8, 0, 2.1))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1, 1), min_size=3, max_size=40), threshold=st.floats(0.05, 0.95))
def test_crossing_lies_on_the_interpolated_curve(values, threshold):
    fsc = torch.tensor([1.0, *values], dtype=torch.float64)
    shell, crossed = find_crossing(fsc, threshold)
    position = float(shell)
    if not crossed:
        assert (fsc >= threshold).all() and position == len(fsc) - 1
        return
    low = min(int(position), len(fsc) - 2)
    assert abs(float(torch.lerp(fsc[low], fsc[low + 1], position - low)) - threshold) < 1e-6
    assert (fsc[: low + 1] >= threshold - 1e-9).all()  # nothing below before it


def test_resolution_scales_with_the_pixel():
    curve = torch.linspace(1, -0.2, 33).double()
    a, b = (find_resolution(FSCCurve(curve, 64, px)) for px in (1.0, 3.0))
    assert b.angstrom == pytest.approx(3 * a.angstrom) and a.cycles_per_px == b.cycles_per_px


def test_phase_randomisation_repeats_and_stays_real():
    volume = make_noise(16, 1)
    a, b = (randomize_phases(volume, 4, make_generator(3)) for _ in range(2))
    assert torch.equal(a.data, b.data)
    assert torch.allclose(a.data.mean(), volume.data.mean(), atol=1e-5)


def test_correction_removes_what_a_mask_adds():
    """Independent noise on a common strong plateau, in a sharp ball: masked FSC is inflated, corrected FSC is near zero."""
    box = 40
    plateau = low_pass(Volume(20 * make_soft_mask(box, 9, 0, 3), 3.0), 30.0)
    halves = [Volume(plateau.data + make_noise(box, i).data, 3.0) for i in (1, 2)]
    result = correct_fsc(*halves, Volume(make_soft_mask(box, 7, 0, 3), 3.0))
    beyond = slice(result.from_shell + 4, 20)
    assert result.masked.fsc[beyond].mean() > 0.5
    assert result.corrected.fsc[beyond].mean() < 0.6 * result.masked.fsc[beyond].mean()
    assert result.unmasked.fsc[beyond].abs().mean() < 0.1


# masks and hands


def test_mask_does_not_depend_on_scale_or_sampling():
    volume = low_pass(make_noise(40, 5, 4.0), 40.0)
    assert torch.equal(make_mask(volume).data, make_mask(Volume(5 * volume.data, 4.0)).data)
    assert make_mask(volume, edge=0.0).data.unique().tolist() in ([0.0, 1.0], [1.0])


def test_flipped_map_is_the_backprojection_of_mirrored_views():
    """The mirror image along z of the map explains the same images under the views diag(1, 1, -1) R diag(1, 1, -1)."""
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for box in (16, 17):
        lattice = Lattice(box, 2.0)
        volume = Volume(make_noise(box, 2).data * make_soft_mask(box, 4, 2, 3), 2.0)
        poses = Poses(sample_rotations(3, make_generator(1)).float(), torch.zeros(3, 2))
        mirrored = Poses(mirror @ poses.rot @ mirror, poses.shift)
        a, b = project_volume(volume, poses), project_volume(flip_hand(volume), mirrored)
        inner = lattice.count_within(box / 2 - 1.5)
        assert torch.allclose(a[:, :inner], b[:, :inner], atol=2e-3 * float(a.abs().max()))


# backprojection


@pytest.fixture(scope="module")
def tilts() -> Batch:
    volume = make_noise(16, 7)
    return make_tilt_batch(Volume(volume.data * make_soft_mask(16, 4, 2, 3), 2.0), 12, 5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_sums_ignore_order_and_grouping(tilts, seed):
    lattice, generator = Lattice(16, 2.0), make_generator(seed)
    whole, pieces = FourierSums.zeros(lattice), FourierSums.zeros(lattice)
    add_batch(whole, tilts, lattice)
    order = torch.randperm(12, generator=generator)
    cut = int(torch.randint(1, 12, (1,), generator=generator))
    for rows in (order[:cut], order[cut:]):
        add_batch(pieces, tilts[rows], lattice)
    assert torch.equal(whole.n_images, pieces.n_images)
    assert int(whole.n_images.sum()) == int(tilts.valid.sum())
    assert torch.allclose(whole.den, pieces.den, atol=1e-4)
    assert torch.allclose(whole.num, pieces.num, atol=1e-4 * float(whole.num.abs().max()))


def test_every_image_counts_as_often_as_it_comes(tilts):
    """A peer loses duplicate voxels: the same image twice must double both sums."""
    lattice = Lattice(16, 2.0)
    once, twice = FourierSums.zeros(lattice), FourierSums.zeros(lattice)
    add_batch(once, tilts[:1], lattice)
    add_batch(twice, tilts[torch.tensor([0, 0])], lattice)
    assert torch.allclose(twice.num, 2 * once.num, atol=1e-4 * float(once.num.abs().max()))
    assert torch.allclose(twice.den, 2 * once.den, rtol=1e-5)
    share = lattice.multiplicity / 2
    from recon_nb.imaging import compute_transfer

    flat = tilts[:1].flatten()
    expected = (compute_transfer(flat.ctf, None, lattice).square() * share).sum()
    assert float(once.den.sum()) == pytest.approx(float(expected), rel=1e-5)  # trilinear weights add up to one


def test_tilts_of_a_particle_never_straddle_the_halves(tilts):
    particle, slot = torch.nonzero(tilts.valid).T
    half = assign_halves(particle, slot)
    assert all(len(half[particle == p].unique()) == 1 for p in range(12))
    straddling = assign_halves(particle, slot, split="image")
    assert any(len(straddling[particle == p].unique()) == 2 for p in range(12))


def test_halves_must_cover_the_particles(tilts):
    with pytest.raises(InputError, match="halves"):
        backproject([tilts], Lattice(16, 2.0), halves=torch.tensor([1, 2, 1]))


def test_half_column_is_obeyed(tilts):
    lattice = Lattice(16, 2.0)
    halves = torch.tensor([1] * 3 + [2] * 9)
    result = backproject([tilts], lattice, halves=halves)
    assert result.n_images == (int(tilts.valid[:3].sum()), int(tilts.valid[3:].sum()))


@pytest.mark.parametrize("regularization", ["constant", "spectral_snr"])
@pytest.mark.parametrize("pad", [1, 2])
def test_missing_views_leave_finite_maps(tilts, regularization, pad):
    """Two nearly equal views leave most of Fourier space empty."""
    result = backproject([tilts[:2]], Lattice(16, 2.0), regularization=regularization, pad=pad)
    for volume in (result.map, result.half1, result.half2):
        assert torch.isfinite(volume.data).all()
    assert torch.isfinite(result.fsc.fsc).all()


def test_prefix_of_coefficients_gives_a_low_passed_map(tilts):
    lattice = Lattice(16, 2.0)
    m = lattice.count_within(5)
    short = dataclasses.replace(tilts, images=tilts.images[..., :m])
    spectrum = torch.fft.rfftn(backproject([short], lattice).map.data).abs().square()
    k = torch.fft.fftfreq(16, 1 / 16)
    radius = (k[:, None, None] ** 2 + k[:, None] ** 2 + k[:9] ** 2).sqrt()
    assert spectrum[radius > 7].sum() < 1e-2 * spectrum.sum()


def test_sums_of_two_ranks_give_the_map_of_one(tilts):
    lattice = Lattice(16, 2.0)
    ranks = []
    for rows in (slice(0, 12, 2), slice(1, 12, 2)):
        sums = FourierSums.zeros(lattice)
        add_batch(sums, tilts[rows], lattice)
        ranks.append(sums)
    joint = solve_sums(ranks[0] + ranks[1], lattice).map.data
    assert torch.allclose(joint, backproject([tilts], lattice).map.data, atol=1e-4 * float(joint.abs().max()))


@pytest.mark.gpu
def test_gpu_gives_the_map_of_the_cpu(tilts):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = backproject([tilts], Lattice(16, 2.0, device="cuda")).map.data.cpu()
    here = backproject([tilts], Lattice(16, 2.0)).map.data
    assert torch.allclose(there, here, atol=1e-3 * float(here.abs().max()))


# metrics of heterogeneity


def test_consensus_scores_nothing_but_auc(data_dir):
    """On a real hinge (S2) the mean map has a high AUC and a dAUC of exactly zero."""
    from recon_nb.files import read_volume

    paths = sorted((data_dir / "simulated" / "conformational_32").glob("igg_*.mrc"))
    truths = torch.stack([read_volume(p, pixel_size=8.0).data for p in paths])
    consensus = truths.mean(0)
    score = score_ensemble([(consensus, t) for t in truths]).summarize()
    assert len(paths) == 50 and score["auc"] > 0.8 and score["dauc"] == 0.0
    perfect = score_ensemble(list(zip(truths, truths))).summarize()
    assert perfect["dauc"] == pytest.approx(1.0, abs=1e-3)


def test_image_fsc_equals_compute_fsc():
    a, b = make_noise(12, 0), make_noise(12, 1)
    mixed = Volume(a.data + b.data, 2.0)
    mask = make_soft_mask(12, 3, 2, 3)
    for m in (None, mask):
        expected = compute_fsc(a, mixed, mask=None if m is None else Volume(m, 2.0)).fsc
        assert torch.equal(compute_image_fsc([(a.data, mixed.data)], mask=m)[0], expected)
