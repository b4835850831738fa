"""The subspace in processes: several as one, tilt series, refusals, stops, the same bits again; and what goes on from it."""
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.cli import main
from recon_nb.core import RunError, Selection, TiltInfo, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.dose import attenuate_by_dose, weight_by_tilt
from recon_nb.files import open_stack, read_particles, read_volume
from recon_nb.latent import compute_knn_correlation
from recon_nb.ppca import collect_statistics, fit_ppca
from recon_nb.runs import Stage, make_config, open_run, read_log
from recon_nb.simulate import draw_poses, make_phantom, simulate_stack
from recon_nb.starts import fit_subspace
from recon_nb.subspace import describe_subspace, run_subspace
from recon_nb.training import load_model, train_run

root = Path(__file__).resolve().parent.parent
quick = ['--rank', 2, '--low-passes', 3, '--full-passes', 1, '--device', 'cpu']
few = {'model.rank': 2, 'subspace.low_passes': 3, 'subspace.full_passes': 1, 'subspace.test': False}
small = '--encoder-dim 16 --decoder-dim 16 --decoder-layers 2 --epochs 1 --batch-size 20 --learning-rate 1e-3 --n-workers 0 --no-analysis'.split()


def call(capsys, *words):
    """Run a command line in this process; return status, standard output and standard error."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def start(*words, n_processes=1):
    """Start a command in a process of its own, or in several by torchrun."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root)}
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n_processes)] if n_processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, '-m', 'recon_nb.cli', *map(str, words)], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for a process that must succeed; return its standard output."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Return a folder with 301 simulated particles of 16 px: an odd number, so that two processes differ in theirs."""
    folder = tmp_path_factory.mktemp('subspace') / 'data'
    assert main(['simulate', '-o', str(folder), '--n-particles', '301', '--box', '16', '--snr', '1', '--weights', '1', '1', '2']) == 0
    return folder


@pytest.fixture(scope='module')
def star(data):
    """Return the particle file of the simulation."""
    return data / 'particles.star'


@pytest.fixture(scope='module')
def fitted(star, tmp_path_factory):
    """Return the run of a curve."""
    run = tmp_path_factory.mktemp('runs') / 'run'
    assert main(['subspace', str(star), '-o', str(run), '--zdim', '1', '--no-analysis', *map(str, quick)]) == 0
    return run


# ---------------------------------------------------------------- the run

def test_a_whole_run(fitted):
    run = open_run(fitted)
    assert sorted(p.name for p in fitted.iterdir()) == ['checkpoints', 'config.json', 'inputs.json', 'latents', 'log.csv', 'log.txt', 'particles.csv', 'subspace.csv', 'subspace.json']
    assert run.epochs == [1] and (run.config.model.encoder, run.config.model.decoder, run.config.model.manifold, run.config.model.zdim) == ('subspace', 'lowrank', 'curve', 1)
    latents = run.load_latents()
    assert torch.equal(latents.particle, torch.arange(301)) and latents.mu.shape == (301, 1) and bool(torch.isfinite(latents.logvar).all())
    facts = json.loads((fitted / 'subspace.json').read_text())
    assert facts['heterogeneity']['is_heterogeneous'] and len(facts['evidence']) == 2
    assert 'heterogeneous' in (fitted / 'log.txt').read_text()
    table = pd.read_csv(fitted / 'subspace.csv')
    assert len(table) == 9 and table['consensus'].iloc[1] > 0.9 and (table['noise'] > 0).all()


def hash_files(folder):
    """Return the digest of every file of a run but those that tell the time and the folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file() and p.name not in ('log.txt', 'inputs.json')}


def test_one_seed_gives_the_same_files(star, fitted, tmp_path, capsys):
    assert call(capsys, 'subspace', star, '-o', tmp_path / 'again', '--zdim', 1, '--no-analysis', *quick)[0] == 0
    assert hash_files(tmp_path / 'again') == hash_files(fitted)
    assert call(capsys, 'subspace', star, '-o', tmp_path / 'other', '--zdim', 1, '--no-analysis', *quick, '--seed', 1)[0] == 0
    assert hash_files(tmp_path / 'other') != hash_files(fitted)


@pytest.mark.slow
def test_one_seed_gives_the_same_network(tmp_path):
    stack = simulate_stack(make_phantom('ribosome', 16, seed=0), 60, snr=1.0, seed=0).stack
    config = make_config(changes={**few, 'model.manifold': 'network', 'model.zdim': 2, 'subspace.rounds': 0})
    runs = [run_subspace(tmp_path / name, config, stack=stack, device='cpu') for name in ('a', 'b')]
    assert hash_files(runs[0].path) == hash_files(runs[1].path)


def fit_twice(star, folder, *options):
    """Fit in one process and in two; return both runs."""
    words = ['subspace', star, '--no-analysis', *options, *quick]
    assert finish(start(*words, '-o', folder / 'two', n_processes=2)).count('nats per particle over noise') == 1  # one process speaks
    finish(start(*words, '-o', folder / 'one'))
    one, two = open_run(folder / 'one'), open_run(folder / 'two')
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())
    assert torch.equal(one.load_latents().particle, torch.arange(301)) and torch.equal(two.load_latents().particle, torch.arange(301))
    return one, two


@pytest.mark.slow
def test_two_processes_solve_the_subspace_of_one(star, tmp_path):
    """The moments of both are summed; sums in another order differ in the last bits only."""
    one, two = fit_twice(star, tmp_path, '--linear', '--rounds', 0)
    a, b = one.load_checkpoint().model, two.load_checkpoint().model
    assert set(a) == set(b)
    for name in ('encoder.half_bases', 'decoder.basis', 'encoder.whitening'):
        assert float((a[name] - b[name]).norm() / a[name].norm()) < 1e-5, name
    x, y = one.load_latents(), two.load_latents()
    torch.testing.assert_close(y.mu, x.mu, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y.logvar, x.logvar, rtol=1e-3, atol=1e-3)
    found = [json.loads((run.path / 'subspace.json').read_text()) for run in (one, two)]
    assert found[1]['evidence'] == pytest.approx(found[0]['evidence'], rel=1e-4)
    assert found[1]['heterogeneity']['n_particles'] == found[0]['heterogeneity']['n_particles'] == 301
    assert found[1]['heterogeneity']['gain'] == pytest.approx(found[0]['heterogeneity']['gain'], rel=1e-3)


@pytest.mark.slow
def test_two_processes_refine_the_volumes_of_one(star, tmp_path):
    """A round leaves coefficients of unit covariance, whose axes any rounding turns: the volumes are the same, the columns of the basis need not be."""
    one, two = fit_twice(star, tmp_path, '--zdim', 1, '--no-test')
    models = [load_model(run, device='cpu') for run in (one, two)]
    x, y = one.load_latents().mu, two.load_latents().mu
    torch.testing.assert_close(y, x, rtol=0, atol=0.05)
    ours, theirs = (model.decode_volumes(z[::30]) for model, z in zip(models, (x, y), strict=True))
    assert float((ours - theirs).norm() / (ours - ours.mean(0)).norm()) < 0.02  # of what differs between particles


# ---------------------------------------------------------------- what it says

def test_a_fit_says_what_it_does_and_what_it_found(star, tmp_path, capsys, monkeypatch):
    """In plain words: first what goes on, where no terminal shows a bar; at the end the verdict, how sure it is, and what to do next."""
    monkeypatch.setattr('recon_nb.subspace.Stage', lambda doing: Stage(doing, delay=1e-3))
    status, out, err = call(capsys, 'subspace', star, '-o', tmp_path / 'run', '--zdim', 1, '--no-analysis', *quick)
    lines = [line.removeprefix('recon subspace: ') for line in err.splitlines()]
    for doing in ('asking whether the particles differ at all (301 particles)', 'finding in what they differ (301 particles, 2 directions)'):
        assert doing in lines and any(line.startswith(f'{doing}: done in ') for line in lines), err
    assert status == 0 and re.match(r'The particles differ \(heterogeneous; \d+ standard errors, where 5 would do\)', out), out
    assert 'times as likely' in out and 'no epochs' in out and 'Next: look at the volumes' in out


def test_a_rigid_molecule_is_said_to_be_one(tmp_path):
    """The warning is in the log, and so at the top of the report."""
    stack = simulate_stack(make_phantom('ribosome', 16, seed=0)[-1:], 300, snr=1.0, seed=0).stack
    config = make_config(changes={**few, 'model.manifold': 'curve', 'model.zdim': 1, 'subspace.rounds': 0, 'subspace.test': True})
    run = run_subspace(tmp_path / 'run', config, stack=stack, device='cpu')
    words = describe_subspace(run)
    assert words.startswith('No difference between the particles was found') and 'do not read states into them' in words and 'recon doctor' in words, words
    assert 'WARNING No difference between the particles was found' in (run.path / 'log.txt').read_text()


# ---------------------------------------------------------------- tilt series

def make_series(n_particles, n_tilts, *, snr, seed=0):
    """Simulate tilt series whose amplitudes fade with dose and tilt as the model says; return stack and states of the particles."""
    state = torch.randint(0, 3, (n_particles,), generator=make_generator(seed, 'states'))
    owner, order = torch.arange(n_particles).repeat_interleave(n_tilts), torch.arange(n_tilts).repeat(n_particles)
    poses = draw_poses(len(owner), max_shift=10.0, generator=make_generator(seed, 'poses'))
    simulated = simulate_stack(make_phantom('ribosome', 16, seed=0), labels=state[owner], poses=poses, snr=snr, seed=seed)
    tilt = TiltInfo(dose=60.0 * order.float(), tilt_angle=15.0 * ((order + 1) // 2) * (1 - 2 * (order % 2)).float(), order=order)
    clean = torch.as_tensor(simulated.render_clean(np.arange(len(owner))))
    box, pixel_size = simulated.stack.box, simulated.stack.pixel_size
    freq = torch.hypot(torch.fft.fftfreq(box)[:, None], torch.fft.fftfreq(box)[None]) / pixel_size
    weight = attenuate_by_dose(freq.flatten(), tilt.dose).unflatten(-1, (box, box)) * weight_by_tilt(tilt.tilt_angle)[:, None, None]
    noise = torch.as_tensor(simulated.stack.images) - clean
    images = torch.fft.ifft2(torch.fft.fft2(clean) * weight).real.float() + noise
    return dataclasses.replace(simulated.stack, images=images, particle=owner, tilt=tilt, table=None), state


@pytest.mark.parametrize('dose', ['off', 'model'])
def test_statistics_of_a_tilt_series_are_sums_over_its_images(dose):
    series, _ = make_series(30, 4, snr=1.0)
    alone = dataclasses.replace(series, particle=torch.arange(series.n_images))
    grouped, single = (ParticleDataset(stack) for stack in (series, alone))
    single.scale = grouped.scale
    found = fit_ppca(grouped, 2, low_passes=2, full_passes=1, dose=dose)
    found = dataclasses.replace(found, half_bases=found.basis.expand(2, -1, -1))  # an image on its own may belong to the other half
    whole, parts = (collect_statistics(dataset, found, dose=dose) for dataset in (grouped, single))
    torch.testing.assert_close(whole.gram, parts.gram.unflatten(0, (30, 4)).sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(whole.cross, parts.cross.unflatten(0, (30, 4)).sum(1), rtol=1e-4, atol=1e-3)
    assert float(parts.gram[:, 0, 0].min()) > 0
    ratio = parts.gram[3::4, 0, 0].mean() / parts.gram[::4, 0, 0].mean()
    assert ratio < 0.8 if dose == 'model' else 0.8 < ratio < 1.2  # the last image is dim, and known to be


def test_a_fit_on_tilt_series_finds_the_states():
    series, state = make_series(150, 5, snr=0.3)
    dataset, found = ParticleDataset(series), {}
    for dose in ('off', 'model'):
        found[dose] = fit_subspace(dataset, rank=2, latent='linear', low_passes=4, full_passes=1, dose=dose)
        assert found[dose].mu.shape == (150, 2)
        means = torch.stack([found[dose].mu[state == s].mean(0) for s in range(3)])
        nearest = torch.cdist(found[dose].mu, means).argmin(1)
        assert float((nearest == state).float().mean()) > 0.95, dose
    assert found['model'].evidence[-1] > found['off'].evidence[-1] + 1  # nats per particle: the images did fade


def test_a_run_on_tilt_series(tmp_path):
    series, state = make_series(100, 3, snr=0.5)
    run = run_subspace(tmp_path / 'run', make_config(changes={**few, 'model.manifold': 'curve', 'model.zdim': 1, 'model.dose': 'model'}), stack=series, device='cpu')
    assert torch.equal(run.load_latents().particle, torch.arange(100))
    assert len(pd.read_csv(run.path / 'particles.csv')) == 300
    assert compute_knn_correlation(run.load_latents().mu.numpy(), (state == 0).numpy().astype(float)) > 0.8


# ---------------------------------------------------------------- refusals and stops

def spoil(star, folder, *, rows=range(100), nan=None):
    """Write a copy of a particle file with some rows and, where asked, an image that is NaN; return the star file."""
    folder.mkdir()
    shutil.copy(star.with_suffix('.mrcs'), folder)
    lines = star.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '000001@' in line or line.split()[:1] == ['1@particles.mrcs'])
    last = first + 301
    (folder / star.name).write_text('\n'.join(lines[:first] + [lines[first + r] for r in rows] + lines[last:]) + '\n')
    if nan is not None:
        content = np.memmap(folder / 'particles.mrcs', np.float32, 'r+', offset=1024, shape=(301, 16, 16))
        content[nan, 3, 4] = np.nan
        content.flush()
    return folder / star.name


refusals = {
    'zdim 0': (['--zdim', 0], {}, ['--zdim', '0']),
    'zdim beside linear': (['--linear', '--zdim', 2], {}, ['--linear', '--zdim']),
    'rank 0': (['--rank', 0], {}, ['rank', '0']),
    'too few particles': (['--rank', 8, '--no-test'], {'rows': range(30)}, ['rank 8', '36', '30', '--rank']),
    'an image that is NaN': ([], {'nan': 40}, ['NaN', '41', 'particles.mrcs']),
    'select without particles': (['--select', '{folder}/none.json'], {}, ['none.json']),
    'unknown device': (['--device', 'tpu'], {}, ['tpu']),
    'negative contrast': (['--contrast-sd', -1], {}, ['contrast_sd', '-1']),
}


@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_line_and_leave_nothing(star, tmp_path, capsys, name):
    words, faults, parts = refusals[name]
    particles = spoil(star, tmp_path / 'input', **faults)
    status, out, err = call(capsys, 'subspace', particles, '-o', tmp_path / 'run', *quick, *[str(w).format(folder=tmp_path) for w in words])
    assert status == 2 and not out and err.count('\n') == 1 and err.startswith('recon subspace: error: '), (status, out, err)
    assert not [part for part in parts if part not in err], err
    assert [p.name for p in tmp_path.iterdir()] == ['input']


def test_too_few_particles_to_test_are_fitted_all_the_same(star, tmp_path, capsys):
    particles = spoil(star, tmp_path / 'input', rows=range(20))
    status, out, err = call(capsys, 'subspace', particles, '-o', tmp_path / 'run', *quick, '--no-analysis')
    assert status == 0 and '20 particles are too few' in err and '28 at least' in err, (status, out, err)
    assert 'heterogeneity' not in json.loads((tmp_path / 'run/subspace.json').read_text())


def test_missing_poses_and_existing_folders_are_refused(star, data, fitted, tmp_path, capsys):
    before = hash_files(fitted)
    for particles, out, parts in ((star.with_suffix('.mrcs'), tmp_path / 'run', ['poses', '--poses']), (star, fitted, ['-o']), (star, data, ['data', '-o'])):
        status, said, err = call(capsys, 'subspace', particles, '-o', out, *quick)
        assert status == 2 and not said and err.count('\n') == 1, err
        assert not [part for part in parts if part not in err], err
    assert not list(tmp_path.iterdir()) and hash_files(fitted) == before


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    """A full disk, say, after the folder has been begun; and who comes second does not overwrite."""
    stack = simulate_stack(make_phantom('ribosome', 16, seed=0), 60, snr=1.0, seed=0).stack
    config = make_config(changes={**few, 'model.manifold': 'curve', 'model.zdim': 1, 'subspace.rounds': 0})

    def fail(*args, **kwargs):
        raise OSError('no space left on device')
    with monkeypatch.context() as patch:
        patch.setattr('recon_nb.runs.RunFolder.save_checkpoint', fail)
        with pytest.raises(OSError, match='no space'):
            run_subspace(tmp_path / 'run', config, stack=stack, device='cpu')
    assert not list(tmp_path.iterdir())
    (tmp_path / '.run.999999.partial').mkdir()  # of a process that was killed while it wrote
    run_subspace(tmp_path / 'run', config, stack=stack, device='cpu')
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    with pytest.raises(RunError, match='choose another name'):
        run_subspace(tmp_path / 'run', config, stack=stack, device='cpu')


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_fit_leaves_nothing(star, tmp_path, number):
    process = start('subspace', star, '-o', tmp_path / 'run', '--debug', '--low-passes', 1000, *quick[:2])
    for line in process.stderr:
        if 'heterogeneous' in line:  # the test is done, the fit has begun
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and not out
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what goes on from there

def test_the_verbs_go_on_from_a_subspace(fitted, star, tmp_path, capsys):
    own = open_run(fitted).load_latents()
    Selection((4, 7, 300), 301, 'three').save(tmp_path / 'three.json')
    assert call(capsys, 'encode', fitted, star, '--select', tmp_path / 'three.json', '--name', 'three', '--device', 'cpu')[0] == 0
    other = pd.read_csv(fitted / 'latents/three/0001.csv')
    np.testing.assert_allclose(other['z0'], own.mu[[4, 7, 300], 0], atol=0.02)  # the same half's basis, the same posterior
    mixed = spoil(star, tmp_path / 'mixed', rows=range(300, -1, -1))
    assert call(capsys, 'encode', fitted, mixed, '--name', 'mixed', '--device', 'cpu')[0] == 0
    for name, rows in (('odd', range(299, -1, -2)), ('even', range(300, -1, -2))):
        assert call(capsys, 'encode', fitted, spoil(star, tmp_path / name, rows=rows), '--name', name, '--device', 'cpu')[0] == 0
    every, odd, even = (pd.read_csv(fitted / f'latents/{name}/0001.csv')['z0'].to_numpy() for name in ('mixed', 'odd', 'even'))
    np.testing.assert_allclose(every[1::2], odd, atol=1e-4)  # in another file the number of a particle means nothing
    np.testing.assert_allclose(every[0::2], even, atol=1e-4)
    assert call(capsys, 'volumes', fitted, '-o', tmp_path / 'v', '--particles', 4, 7, 4)[0] == 0
    first, again = (read_volume(tmp_path / f'v/vol_{i:03d}.mrc') for i in (0, 2))
    assert first.box == 16 and bool((first.data == again.data).all())
    near = own.mu[:, 0].argsort()[[100, 160]].tolist()
    assert call(capsys, 'traverse', fitted, '--anchors', *near, '-o', tmp_path / 'path', '--mean-neighbors', 9)[0] == 0
    path = pd.read_csv(tmp_path / 'path/volumes.csv')
    assert path['particle'].iloc[[0, -1]].tolist() == near
    status, out, _ = call(capsys, 'analyze', fitted, '--kmeans', 3, '--n-points', 3, '--no-umap')
    assert status == 0 and 'report.html' in out
    page = (fitted / 'analysis/0001/report.html').read_text()
    assert 'nats per particle' in page and len(list((fitted / 'analysis/0001/kmeans').glob('*.mrc'))) == 3
    shutil.rmtree(fitted / 'analysis')
    for name in ('three', 'mixed', 'odd', 'even'):
        shutil.rmtree(fitted / 'latents' / name)


@pytest.mark.slow
@pytest.mark.parametrize(('options', 'kind'), [(['--zdim', 1], 'curve'), (['--zdim', 2], 'network'), (['--zdim', 8, '--rank', 4], 'network'), (['--zdim', 2, '--manifold', 'linear'], 'linear')])
def test_training_starts_from_the_subspace(star, tmp_path, capsys, options, kind):
    status, out, err = call(capsys, 'train', star, '-o', tmp_path / 'run', *quick, '--rounds', 0, *small, *options)
    assert status == 0, err
    run = open_run(tmp_path / 'run')
    assert run.epochs == [0, 1] and run.config.model.encoder == 'subspace'
    first, last = run.load_latents(0), run.load_latents(1)
    assert first.mu.shape == (301, run.config.model.zdim) and torch.equal(first.mu, last.mu)  # the encoder is the solution; the decoder learns
    before, after = (run.load_checkpoint(epoch).model for epoch in (0, 1))
    assert bool(before['encoder.half_bases'].any()) and all(torch.equal(after[n], before[n]) for n in before if n.startswith('encoder.'))
    assert any(not torch.equal(after[n], before[n]) for n in before if n.startswith('decoder.'))


taught = {**few, 'subspace.rounds': 0, 'model.encoder': 'subspace', 'model.zdim': 1, 'model.decoder_dim': 32, 'model.decoder_layers': 2, 'train.bf16': False, 'train.n_workers': 0,
          'train.batch_size': 20, 'train.learning_rate': 1e-3}


def test_teaching_is_done_once_and_leaves_the_same_bits(tmp_path):
    stack = simulate_stack(make_phantom('hinge', 16, n_states=5), 200, snr=1.0, seed=0).stack
    whole = train_run(tmp_path / 'whole', make_config(changes={**taught, 'train.teach_steps': 150, 'train.epochs': 2}), stack=stack, device='cpu')
    part = train_run(tmp_path / 'part', make_config(changes={**taught, 'train.teach_steps': 150, 'train.epochs': 1}), stack=stack, device='cpu')
    train_run(part.path, stack=stack, device='cpu', changes={'train.epochs': 2})
    assert (part.path / 'log.txt').read_text().count('was taught') == 1
    for epoch in (0, 1, 2):
        ours, theirs = (run.load_checkpoint(epoch).model for run in (whole, part))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), epoch
    plain = train_run(tmp_path / 'plain', make_config(changes={**taught, 'train.epochs': 2}), stack=stack, device='cpu')
    assert bool((plain.load_checkpoint(0).model['decoder.envelope'] == 1).all()) and 'was taught' not in (plain.path / 'log.txt').read_text()
    losses = [read_log(run)['recon'] for run in (whole, plain)]
    assert losses[0][0] < losses[1][0]  # who was taught begins ahead


@pytest.mark.slow
def test_two_processes_are_taught_as_one(star, tmp_path):
    words = ['train', star, *quick, '--rounds', 0, *small, '--zdim', 1, '--teach-steps', 60, '--bf16', 'off']
    finish(start(*words, '-o', tmp_path / 'two', n_processes=2))
    finish(start(*words, '-o', tmp_path / 'one'))
    one, two = (load_model(open_run(tmp_path / name), 0, device='cpu') for name in ('one', 'two'))
    z = open_run(tmp_path / 'one').load_latents(0).mu[::50]
    ours, theirs = one.decode_volumes(z), two.decode_volumes(z)
    finish(start(*words, '--seed', 1, '-o', tmp_path / 'other'))
    other = load_model(open_run(tmp_path / 'other'), 0, device='cpu').decode_volumes(z)
    apart, by_seed = (float((ours - volumes).norm() / ours.norm()) for volumes in (theirs, other))
    assert apart < 0.7 * by_seed, (apart, by_seed)  # sums in another order differ in their last bits, which sixty steps of Adam may let grow


def test_starts_that_cannot_be(star, tmp_path, capsys):
    for words, parts in ((['--zdim', 3, '--manifold', 'curve'], ['curve', 'zdim 1', '3']), (['--zdim', 3, '--manifold', 'linear', '--rank', 2], ['rank 2', '3'])):
        status, _, err = call(capsys, 'train', star, '-o', tmp_path / 'run', *small, *words)
        assert status == 2 and not [p for p in parts if p not in err], err
        assert not list(tmp_path.iterdir())
