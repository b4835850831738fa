"""`recon confirm`: real minor states are confirmed; random, invented, noise-made and too small selections are not."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb import confirm
from recon_nb.assemblies import add_junk, make_phantom_assembly, simulate_assembly_volumes
from recon_nb.confirm import confirm_selection, find_difference, read_verdict
from recon_nb.core import InputError, MissingStackError, RunError, Selection
from recon_nb.export import export_selection
from recon_nb.files import read_particles, read_volume, write_volume
from recon_nb.latent import cluster_kmeans
from recon_nb.runs import make_config, open_run
from recon_nb.simulate import simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts
from recon_nb.training import train_run

names = ['a', 'ad', 'mature', 'minor']
linear = {'model.rank': 4, 'model.zdim': 4, 'model.manifold': 'linear', 'subspace.test': False}


@pytest.fixture(scope='module')
def maps():
    """Return four states of the phantom assembly at 24 px, by name."""
    phantom = make_phantom_assembly()
    volumes = dict(zip(phantom.states.index, simulate_assembly_volumes(phantom, 24)))
    return {name: volumes[name] for name in names}


@pytest.fixture(scope='module')
def run(maps, tmp_path_factory):
    """Return a closed-form run on 1,800 particles, one in twenty of the minor state."""
    folder = tmp_path_factory.mktemp('confirm')
    simulated = simulate_stack(list(maps.values()), 1800, weights=[0.3, 0.3, 0.35, 0.05], names=names, snr=0.2, seed=0)
    return run_subspace(folder / 'run', make_config(str(write_simulation(folder / 'data', simulated)), changes=linear), device='cpu')


@pytest.fixture(scope='module')
def labels(run):
    """Return the state of every particle, as a number."""
    return pd.read_csv(run.path.parent / 'data' / 'truth.csv')['label'].to_numpy()


def select(run, name, particles, n_total=1800):
    """Save a selection in the run and return its name."""
    Selection(np.sort(particles), n_total, 'of a test').save(run.path / 'selections' / f'{name}.json')
    return name


def judge(run, selection, **options):
    """Confirm a selection; return folder and verdict."""
    folder = confirm_selection(run, selection=selection, device='cpu', **options)
    return folder, read_verdict(folder)


def find_like(run, rows, n):
    """Return the n particles nearest to the median of some, as a person picks a cloud of points."""
    points = run.load_latents().mu.double().numpy()
    return np.argsort(((points - np.median(points[rows], axis=0)) ** 2).sum(axis=1))[:n]


def test_minor_state_is_confirmed(run, labels, maps):
    """A selection made on latents is confirmed, with maps, FSC, density as in the truth, star file and report."""
    chosen = find_like(run, labels == 3, 80)
    assert (labels[chosen] == 3).mean() > 0.7
    change = maps['minor'].data - maps['mature'].data
    write_volume(run.path.parent / 'mask.mrc', find_difference(type(maps['minor'])(change, maps['minor'].pixel_size)))
    select(run, 'mature', np.flatnonzero(labels == 2))
    folder, verdict = judge(run, select(run, 'minor', chosen), against='mature', mask=str(run.path.parent / 'mask.mrc'))
    assert verdict.verdict == 'confirmed', verdict.reasons
    assert 0.6 < verdict.amplitude < 2.5 and verdict.amplitude > 5 * verdict.amplitude_spread and verdict.correlation > verdict.correlation_null + 0.2
    assert verdict.arrivals < 0.4 * verdict.n_selected and np.isfinite(verdict.resolution)
    density = pd.read_csv(folder / 'densities.csv', index_col='region').loc['mask']
    assert density['selected'] < 0.5 < density['neighbors'] and density['selected'] < 0.6 * density['neighbors']
    for name in ('selected/map.mrc', 'selected/half1.mrc', 'selected/half2.mrc', 'neighbors/map.mrc', 'decoder_selected.mrc', 'decoder_neighbors.mrc'):
        assert read_volume(folder / name).box == 24
    for name in ('maps.png', 'evidence.png', 'fsc.csv', 'particles.csv', 'random_parts.csv', 'confirmation.json'):
        assert (folder / name).stat().st_size
    page = (run.path / 'analysis' / '0001' / 'report.html').read_text()
    assert 'Confirmation of minor' in page and 'minor: confirmed.' in page
    ours, file = read_particles(folder / 'particles.star'), read_particles(run.path.parent / 'data' / 'particles.star')
    assert ours.rows['slice'].tolist() == file.rows['slice'].to_numpy()[np.sort(chosen)].tolist()
    exported = export_selection(run.path / 'selections' / 'minor.json', out=str(run.path.parent / 'minor.star'))
    assert (folder / 'particles.star').read_text() == exported.read_text()  # one way to write rows
    assert verdict.own > 0.8  # the maps of thirty particles correlate by 0.86
    again = judge(run, 'minor', against='mature', mask=str(run.path.parent / 'mask.mrc'))[1]
    assert again == verdict  # the same seed, the same numbers


def test_random_selections_are_not_confirmed(run, labels):
    """Neither random particles of all, nor random ones of one state."""
    random = np.random.default_rng(0)
    for i in range(2):
        verdict = judge(run, select(run, f'random_{i}', random.permutation(1800)[:90]))[1]
        assert verdict.verdict == 'not confirmed', verdict.reasons
    part = random.permutation(np.flatnonzero(labels == 2))[:90]
    verdict = judge(run, select(run, 'part', part), against=select(run, 'mature', np.flatnonzero(labels == 2)))[1]
    assert verdict.verdict != 'confirmed', verdict.reasons


def test_invented_state_is_not_confirmed(run, labels, tmp_path):
    """Ordinary particles that an encoder put where no particle belongs: the decoder draws another volume, the images do not."""
    copy = tmp_path / 'run'
    shutil.copytree(run.path, copy)
    other, latents = open_run(copy), run.load_latents()
    chosen = np.random.default_rng(1).permutation(np.flatnonzero(labels == 2))[:90]
    moved = latents.mu.clone()
    moved[chosen] = latents.mu[labels == 1].mean(dim=0) * 1.5 + 0.05 * torch.randn(90, moved.shape[1], generator=torch.Generator().manual_seed(0))
    other.save_latents(1, type(latents)(moved, latents.logvar, latents.particle))
    folder, verdict = judge(other, select(other, 'invented', chosen), against=select(other, 'mature', np.flatnonzero(labels == 2)))
    assert verdict.verdict == 'not confirmed' and abs(verdict.amplitude) < 0.5 and 'The images show' in ' '.join(verdict.reasons)
    assert 'invented: not confirmed.' in (copy / 'analysis' / '0001' / 'report.html').read_text()


def test_clusters_of_noise_are_not_confirmed(maps, tmp_path):
    """Of particles that are all alike, neither the clusters of their latents nor the ends of the cloud are states."""
    simulated = simulate_stack([maps['mature']], 1200, snr=0.1, seed=1)
    alike = run_subspace(tmp_path / 'run', make_config(str(write_simulation(tmp_path / 'data', simulated)), changes=linear), device='cpu')
    points = alike.load_latents().mu.double().numpy()
    clusters = cluster_kmeans(points, 12)
    tried = {f'cluster_{c}': np.flatnonzero(clusters.labels == c) for c in np.argsort(clusters.sizes)[:2]}
    tried['end'] = np.argsort(points[:, 0])[-60:]
    for name, rows in tried.items():
        verdict = judge(alike, select(alike, name, rows, 1200))[1]
        assert verdict.verdict != 'confirmed', (name, verdict)


def test_edges_are_not_confirmed(maps, tmp_path):
    """Images of no particle differ from their neighbours as much as the decoder says, yet their own map is empty."""
    names_all = ['a', 'mature', 'minor']
    simulated = add_junk(simulate_stack([maps[name] for name in names_all], 1000, weights=[0.4, 0.5, 0.1], names=names_all, snr=0.5, seed=0), 0.06, kind='edge')
    edges = run_subspace(tmp_path / 'run', make_config(str(write_simulation(tmp_path / 'data', simulated)), changes=linear), device='cpu')
    truth = pd.read_csv(tmp_path / 'data' / 'truth.csv')['name'].to_numpy()
    n_total = len(truth)
    verdict = judge(edges, select(edges, 'edges', np.flatnonzero(truth == 'edge'), n_total))[1]
    assert verdict.verdict == 'not confirmed' and verdict.own < 0.3 and 'no particle' in ' '.join(verdict.reasons), verdict
    (tmp_path / 'moved').mkdir()
    for stack in (tmp_path / 'data').glob('*.mrcs'):
        stack.rename(tmp_path / 'moved' / stack.name)
    select(edges, 'minor', np.flatnonzero(truth == 'minor'), n_total)
    with pytest.raises(MissingStackError):
        judge(edges, 'minor')
    verdict = judge(edges, 'minor', datadir=str(tmp_path / 'moved'))[1]
    assert verdict.verdict == 'confirmed' and verdict.own > 0.8, verdict


def test_what_could_not_be_measured_is_written(run, labels, monkeypatch):
    """Half-maps that agree nowhere and densities without a value are null in the file and NaN in the verdict."""
    measure = confirm.measure_resolution
    monkeypatch.setattr(confirm, 'measure_resolution', lambda *args: (measure(*args)[0], float('nan')))
    monkeypatch.setattr(confirm, 'measure_density', lambda *args: float('nan'))
    folder, verdict = judge(run, select(run, 'nowhere', np.flatnonzero(labels == 3)))
    assert verdict.verdict == 'too few particles' and 'agree nowhere' in verdict.reasons[0] and np.isnan(verdict.resolution)
    content = json.loads((folder / 'confirmation.json').read_text())
    assert content['resolution'] is None and content['densities'] and all(record['selected'] is None for record in content['densities'])


def test_too_few_particles_say_so(run, labels):
    """Ten particles are not judged, and their maps are written all the same."""
    folder, verdict = judge(run, select(run, 'few', np.flatnonzero(labels == 3)[:10]))
    assert verdict.verdict == 'too few particles' and '10 particles' in verdict.reasons[0]
    assert (folder / 'selected' / 'map.mrc').exists()


def test_tilt_series(maps, tmp_path):
    """Particles of a tilt series count as one each, and all of their images are in the star file."""
    scheme = TiltScheme(list_dose_symmetric(45, 15))
    states = [maps[name] for name in ('a', 'mature', 'minor')]
    simulated = simulate_tilts(states, 400, scheme=scheme, weights=[0.3, 0.5, 0.2], names=['a', 'mature', 'minor'], snr=0.3, seed=0)
    star = write_tilts(tmp_path / 'data', simulated)
    series = run_subspace(tmp_path / 'run', make_config(str(star), changes={**linear, 'model.dose': 'model'}), device='cpu')
    truth = simulated.labels[torch.as_tensor(np.unique(simulated.stack.particle.numpy(), return_index=True)[1])].numpy()
    minor = np.flatnonzero(truth == 2)
    folder, verdict = judge(series, select(series, 'minor', minor, 400))
    assert verdict.verdict == 'confirmed' and verdict.n_selected == len(minor), verdict
    assert len(read_particles(folder / 'particles.star').rows) == len(scheme) * len(minor)
    rest = np.random.default_rng(0).permutation(np.flatnonzero(truth == 1))[: len(minor)]
    assert judge(series, select(series, 'random', rest, 400))[1].verdict != 'confirmed'


def test_part_of_a_file_and_a_trained_run(run, labels, tmp_path):
    """A run on a selection keeps the numbers of the file; a trained network is judged like a closed form."""
    kept = np.setdiff1d(np.arange(1800), np.flatnonzero(labels == 0)[::5])
    Selection(kept, 1800, 'most').save(tmp_path / 'kept.json')
    star = str(run.path.parent / 'data' / 'particles.star')
    part = run_subspace(tmp_path / 'part', make_config(star, changes={**linear, 'data.select': str(tmp_path / 'kept.json')}), device='cpu')
    verdict = judge(part, select(part, 'minor', np.flatnonzero(labels == 3)))[1]
    assert verdict.verdict == 'confirmed' and verdict.n_selected == (labels == 3).sum() and verdict.n_neighbors <= len(kept) - verdict.n_selected
    small = {'model.encoder_dim': 16, 'model.decoder_dim': 16, 'model.zdim': 2, 'train.epochs': 1, 'train.batch_size': 64, 'train.n_workers': 0, 'data.select': str(tmp_path / 'kept.json')}
    trained = train_run(tmp_path / 'trained', make_config(star, changes=small), device='cpu')
    verdict = judge(trained, select(trained, 'minor', np.flatnonzero(labels == 3)))[1]
    assert verdict.verdict != 'confirmed'  # one epoch: the decoder draws nothing yet that the images could show
    assert json.loads((trained.path / 'analysis' / '0001' / 'confirmation' / 'minor' / 'confirmation.json').read_text())['epoch'] == 1


def test_what_cannot_be_asked_is_refused(run, tmp_path):
    """Unknown selections, those of other files, all particles, homogeneous runs, and folders that hold something."""
    select(run, 'known', np.arange(50))
    with pytest.raises(InputError, match='known'):
        judge(run, 'knwon')
    with pytest.raises(InputError, match='out of 99'):
        judge(run, select(run, 'foreign', np.arange(50), 99))
    with pytest.raises(InputError, match='no other particle'):
        judge(run, select(run, 'all', np.arange(1800)))
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thing.txt').write_text('x')
    with pytest.raises(InputError, match='full'):
        judge(run, 'known', out=str(tmp_path / 'full'))
    star = str(run.path.parent / 'data' / 'particles.star')
    small = {'model.decoder_dim': 16, 'model.zdim': 0, 'train.epochs': 1, 'train.batch_size': 512, 'train.n_workers': 0}
    one = train_run(tmp_path / 'one', make_config(star, changes=small), device='cpu')
    with pytest.raises(RunError, match='homogeneous'):
        judge(one, 'known')
