"""Simulated tilt series: their physics, their files, and the maps that they give back."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.backprojection import choose_lowest_dose
from recon_nb.cli import main
from recon_nb.consensus import backproject_stack, take_lowest_dose
from recon_nb.core import InputError, make_generator
from recon_nb.datasets import load_stack
from recon_nb.dose import attenuate_by_dose
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.tiltsimulation import (
    TiltScheme, add_structure, draw_neighbors, list_dose_symmetric, measure_signal, simulate_tilts, slice_field, write_tilts,
)
from recon_nb.volumes import correlate_volumes

root = Path(__file__).resolve().parent.parent
brief = TiltScheme(list_dose_symmetric(60, 15), 12.0)
silent = {'snr': float('inf'), 'structural_snr': float('inf')}


@pytest.fixture(scope='module')
def states():
    """Return three states of 24 px."""
    return make_phantom('ribosome', 24)


# ---------------------------------------------------------------- physics

@pytest.mark.parametrize('box', [24, 25])
@pytest.mark.parametrize('seed', [0, 1])
def test_one_untilted_image_is_a_single_particle(states, box, seed):
    options = {'snr': 0.1, 'rot_error': 3.0, 'shift_error': 2.0, 'contrast_sigma': 0.3, 'weights': [1, 2, 1], 'box': box, 'seed': seed}
    series = simulate_tilts(states, 20, scheme=TiltScheme((0.0,)), structural_snr=float('inf'), **options)
    single = simulate_stack(states, 20, **options)
    assert torch.equal(series.stack.images, single.stack.images)
    assert torch.equal(series.stack.poses.rot, single.stack.poses.rot) and torch.equal(series.stack.poses.shift, single.stack.poses.shift)
    common = list(single.truth.columns)
    pd.testing.assert_frame_equal(series.truth[common], single.truth)


@pytest.mark.parametrize('voltage', [300.0, 200.0])
@pytest.mark.parametrize('dose', [3.0, 25.0])
def test_dose_takes_what_the_formula_says(states, dose, voltage):
    optics = {'ctf': None}
    series = [simulate_tilts(states, 6, scheme=TiltScheme((0.0, 0.0), d), seed=2, **silent, **optics) for d in (0.0, dose)]
    if voltage != 300.0:
        ctf = replace(series[0].stack.ctf[::2], voltage=torch.full((6,), voltage, dtype=torch.float64))
        series = [simulate_tilts(states, 6, scheme=TiltScheme((0.0, 0.0), d), seed=2, ctf=ctf, **silent) for d in (0.0, dose)]
    lattice = series[0].lattice
    before, after = (lattice.gather(s.stack.images[1::2]) for s in series)
    formula = attenuate_by_dose(lattice.radius / (lattice.box * lattice.pixel_size), torch.tensor(dose), voltage)
    assert float((after - formula * before).abs().max() / before.abs().max()) < 1e-5
    top = lattice.radius > 10
    kept = float((after[:, top].norm() / before[:, top].norm()))
    assert kept < 0.95 if dose > 10 else kept < 1


def test_other_voltages_are_refused(states):
    ctf = simulate_tilts(states, 2, scheme=TiltScheme((0.0,)), **silent).stack.ctf
    with pytest.raises(InputError, match='120 kV'):
        simulate_tilts(states, 2, scheme=brief, ctf=replace(ctf, voltage=torch.full((2,), 120.0, dtype=torch.float64)))


@pytest.mark.parametrize('structural_snr, snr', [(1.4, 0.1), (0.5, 1.0)])
def test_snr_of_both_noises_is_after_the_ctf(states, structural_snr, snr):
    for asked, options in ((structural_snr, {'structural_snr': structural_snr, 'snr': float('inf')}), (snr, {'structural_snr': float('inf'), 'snr': snr})):
        series = simulate_tilts(states, 300, scheme=TiltScheme((0.0, 45.0), 0.0), seed=3, contrast_sigma=0.2, **options)
        flat = series.stack.tilt.tilt_angle == 0
        noise = (series.stack.images - series.render_clean())[flat]
        found = measure_signal(series.volumes, series.seen) / float(noise.var(dim=(1, 2), correction=0).mean())
        assert found == pytest.approx(asked, rel=0.04)


def test_structural_noise_suffers_what_the_signal_suffers(states):
    """Its transform after a dose is that before, times the attenuation; shot noise stays."""
    noises = []
    for dose in (0.0, 30.0):
        series = simulate_tilts(states, 5, scheme=TiltScheme((0.0, 0.0), dose), snr=float('inf'), seed=1)
        noises.append(series.lattice.gather((series.stack.images - series.render_clean())[1::2]))
    formula = attenuate_by_dose(series.lattice.radius / (series.lattice.box * series.lattice.pixel_size), torch.tensor(30.0))
    assert float((noises[1] - formula * noises[0]).abs().max() / noises[0].abs().max()) < 1e-4


@pytest.mark.parametrize('structure, low, high', [('field', 0.9, 1.01), ('image', -0.1, 0.1)])
def test_tilts_share_a_field_only_if_it_is_one(states, structure, low, high):
    series = simulate_tilts(states, 40, scheme=TiltScheme((0.0, 1.0), 0.0), snr=float('inf'), structure=structure, seed=0)
    noise = series.stack.images - series.render_clean()
    agreement = np.corrcoef(noise[0::2].flatten(), noise[1::2].flatten())[0, 1]
    assert low < agreement < high


def test_particles_have_fields_of_their_own():
    from recon_nb.fourier import Lattice

    angles, lattice = torch.tensor([0.0, 30.0]), Lattice(16, 4.0)
    a, b = (slice_field(angles, lattice, make_generator(seed)) for seed in (0, 1))
    assert float((a.conj() * b).sum().abs() / (a.norm() * b.norm())) < 0.2


def test_ragged_series_are_parts_of_the_whole(states):
    """Which tilts are missing changes neither the others nor what is known of them (noise aside: it fills the images in their order)."""
    whole, part = (simulate_tilts(states, 8, scheme=brief, missing=missing, seed=7, snr=float('inf'), structural_snr=float('inf')) for missing in (0.0, 0.4))
    index = torch.tensor([9 * p + o for p, o in zip(part.seen.particle.tolist(), part.seen.tilt.order.tolist())])
    assert 8 <= len(index) < 72 and part.stack.n_particles == 8
    assert float((whole.stack.images[index] - part.stack.images).abs().max()) < 1e-4 * float(whole.stack.images.abs().max())
    assert torch.equal(whole.stack.tilt.dose[index], part.stack.tilt.dose)
    assert torch.equal(whole.stack.poses.rot[index], part.stack.poses.rot)


def test_neighbours_are_noise_to_the_truth(states):
    lonely, crowded = (simulate_tilts(states, 6, scheme=brief, n_neighbors=n, seed=1, **silent) for n in (0, 2))
    torch.testing.assert_close(lonely.render_clean(), crowded.render_clean())
    assert lonely.noise_sigma == crowded.noise_sigma
    assert float((crowded.stack.images - lonely.stack.images).abs().max()) > 0.1 * float(lonely.stack.images.abs().max())
    with pytest.raises(InputError, match='at most the box'):
        simulate_tilts(states, 6, scheme=brief, n_neighbors=1, neighbor_distance=1e4)
    assert draw_neighbors(4, 2, 10.0, make_generator(0)).shape == (2, 4, 3)


def test_seed_fixes_every_bit_and_scratch_changes_none(states, tmp_path):
    options = {'scheme': brief, 'n_neighbors': 1, 'missing': 0.2, 'defocus_spread': 300.0, 'rot_error': 1.0, 'seed': 11}
    a, b, c = (simulate_tilts(states, 10, **{**options, **more}) for more in ({}, {'scratch': tmp_path}, {'seed': 12}))
    assert torch.equal(a.stack.images, b.stack.images[:]) and a.truth.equals(b.truth) and a.stack.table.rows.equals(b.stack.table.rows)
    assert not torch.equal(a.stack.images[:9], c.stack.images[:9])


# ---------------------------------------------------------------- files

@pytest.fixture(scope='module')
def written(states, tmp_path_factory):
    """Return a ragged series and the star file that it was written to."""
    series = simulate_tilts(states, 30, scheme=brief, missing=0.2, snr=2.0, max_shift=20.0, defocus_spread=200.0, seed=4)
    return series, write_tilts(tmp_path_factory.mktemp('tilts') / 'series', series)


def test_star_reads_back_as_it_was(written):
    series, star = written
    stack = load_stack(star)
    assert (stack.n_images, stack.n_particles, stack.box, stack.pixel_size) == (series.stack.n_images, 30, 24, series.stack.pixel_size)
    for name in ('dose', 'tilt_angle', 'order'):
        assert torch.equal(getattr(stack.tilt, name), getattr(series.stack.tilt, name)), name
    assert torch.equal(stack.particle, series.stack.particle)
    torch.testing.assert_close(stack.poses.rot, series.stack.poses.rot, atol=1e-6, rtol=0)
    torch.testing.assert_close(stack.poses.shift, series.stack.poses.shift, atol=1e-5, rtol=0)
    for name, values in vars(series.stack.ctf).items():
        torch.testing.assert_close(getattr(stack.ctf, name), values.double(), atol=1e-9, rtol=1e-12)
    index = torch.arange(stack.n_images)
    assert torch.equal(stack.read_images(index), series.stack.read_images(index))


def test_truth_lies_beside(written):
    series, star = written
    truth, facts = pd.read_csv(star.parent / 'truth.csv'), json.loads((star.parent / 'simulation.json').read_text())
    assert list(truth.particle) == series.stack.particle.tolist()
    np.testing.assert_allclose(truth.dose, series.stack.tilt.dose)
    assert facts['angles'] == list(brief.angles) and facts['structural_snr'] == 1.4 and 'without dose' in facts['snr_definition']
    assert truth.groupby('particle').label.nunique().max() == 1


# ---------------------------------------------------------------- backprojection

def test_lowest_dose_is_chosen_particle_by_particle(written):
    series, _ = written
    for n in (1, 3, 8, 50):
        chosen = take_lowest_dose(series.stack, n)
        for p in range(30):
            dose = series.stack.tilt.dose[series.stack.particle == p].sort().values
            assert torch.equal(chosen.tilt.dose[chosen.particle == p].sort().values, dose[:n])


@pytest.mark.parametrize('seed', range(5))
def test_lowest_dose_does_not_depend_on_the_order_of_rows(seed):
    generator = make_generator(seed)
    particle, dose = torch.randint(6, (40,), generator=generator), torch.randperm(40, generator=generator).float()
    shuffled = torch.randperm(40, generator=generator)
    chosen = choose_lowest_dose(particle, dose, 3)
    again = shuffled[choose_lowest_dose(particle[shuffled], dose[shuffled], 3)]
    assert sorted(again.tolist()) == chosen.tolist()


def test_structural_noise_agrees_between_images_but_not_between_particles(states):
    """Why half-maps are split by particle: nothing but ice, and a split by image finds it reproducible."""
    series = simulate_tilts(states, 60, scheme=TiltScheme(list_dose_symmetric(6, 1), 0.0), seed=5, max_shift=0.0, **silent)
    ice = torch.zeros_like(series.stack.images)
    add_structure(ice, series.seen, series.lattice, sigma=1.0, kind='field', seed=0)
    stack = replace(series.stack, images=ice)
    average = {split: float(backproject_stack(stack, split=split, regularization='constant').fsc.fsc[3:11].mean()) for split in ('particle', 'image')}
    assert abs(average['particle']) < 0.15 and average['image'] > 0.7, average


def test_modelled_dose_gives_the_undamaged_particle(states):
    series = simulate_tilts(states, 150, scheme=brief, weights=[0, 0, 1], snr=5.0, structural_snr=float('inf'), seed=6)
    maps = {dose: backproject_stack(series.stack, dose=dose).map for dose in ('auto', 'off', 'weight')}
    truth = states[2]
    slope = {dose: float((v.data * truth.data).sum() / truth.data.square().sum()) for dose, v in maps.items()}
    assert slope['off'] < slope['weight'] < slope['auto'] == pytest.approx(1, abs=0.1)
    assert correlate_volumes(maps['auto'], truth) > 0.97


def test_one_command_gives_the_curve(states, tmp_path, capsys):
    series = simulate_tilts(states, 60, scheme=brief, weights=[0, 0, 1], snr=1.0, seed=8)
    star = write_tilts(tmp_path / 'data', series)
    assert main(['backproject', str(star), '-o', str(tmp_path / 'map'), '--n-tilts', '9', '1', '3']) == 0
    assert '540 images' in capsys.readouterr().out
    table = pd.read_csv(tmp_path / 'map/n_tilts.csv')
    assert table.n_tilts.tolist() == [1, 3, 9] and table.n_images.tolist() == [60, 180, 540]
    assert table['resolution_0.5'].iloc[-1] <= table['resolution_0.5'].iloc[0]
    assert sorted(p.name for p in (tmp_path / 'map').iterdir()) == ['fsc.csv', 'fsc.png', 'half1.mrc', 'half2.mrc', 'map.mrc', 'n_tilts.csv', 'n_tilts.png', 'n_tilts_fsc.csv']
    assert main(['backproject', str(star), '-o', str(tmp_path / 'few'), '--n-tilts', '3', '--split', 'image', '--dose', 'weight']) == 0
    assert '180 images' in capsys.readouterr().out and not (tmp_path / 'few/n_tilts.csv').exists()
    assert main(['backproject', str(star), '-o', str(tmp_path / 'none'), '--n-tilts', '0']) == 2
    assert '1 or more' in capsys.readouterr().err


def test_curve_needs_doses(states, tmp_path, capsys):
    stack = simulate_stack(states, 10).stack
    with pytest.raises(InputError, match='--n-tilts'):
        backproject_stack(stack, n_tilts=2)


# ---------------------------------------------------------------- benchmark set

def test_s3_has_four_states_of_41_tilts(data_dir, tmp_path):
    environment = {**os.environ, 'RECON_NB_DATA': str(data_dir), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root)}
    make = lambda out, *options: subprocess.run(
        [sys.executable, 'benchmarks/make_data.py', '--set', 's3', '--n', '12', '-o', str(tmp_path / out), *options], cwd=root, env=environment, capture_output=True, text=True,
    )
    for out, options in (('a', ()), ('b', ()), ('c', ('--structure', 'image'))):
        done = make(out, *options)
        assert done.returncode == 0, done.stderr
    for file in ('particles.mrcs', 'particles.star', 'truth.csv'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    assert (tmp_path / 'a/particles.mrcs').read_bytes() != (tmp_path / 'c/particles.mrcs').read_bytes()
    truth, facts = pd.read_csv(tmp_path / 'a/truth.csv'), json.loads((tmp_path / 'a/simulation.json').read_text())
    assert len(truth) == 12 * 41 and facts['box'] == 32 and facts['states'] == ['B_mean5', 'C_mean5', 'D_mean5', 'E_mean5']
    assert truth.groupby('label').particle.nunique().tolist() == [3] * 4
    assert truth.dose.max() == 120 and truth.tilt_angle.abs().max() == 60
    assert (facts['snr'], facts['structural_snr'], facts['structure']) == (0.1, 1.4, 'field')
    refused = make('d', '--contrast', '0.2')
    assert refused.returncode != 0 and 'single images' in refused.stderr
