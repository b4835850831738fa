"""A real training asked three times: far too early, at the right time, and after it has learnt noise; and runs that cannot be asked."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from recon_nb.convergence import ask_images, choose_epochs, converge_run, find_maxima, judge_prediction
from recon_nb.core import InputError, RunError, Selection, Volume
from recon_nb.files import write_volume
from recon_nb.fsc import compute_fsc
from recon_nb.latent import generate_volumes, to_points
from recon_nb.runs import make_config, open_run
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts
from recon_nb.training import load_model, train_run

torch.set_num_threads(1)
TINY = {'model.zdim': 2, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.batch_size': 20, 'train.learning_rate': 1e-3, 'train.bf16': False}
STEPS = {'train further': 4, 'settled': 32, 'trained into noise': 84}  # epochs after which a run of `mixture` is asked


def read_answer(report):
    """Return verdict.json beside a report."""
    return json.loads((report.parent / 'convergence' / 'verdict.json').read_text())


def score_truth(run, epoch, simulated, names):
    """Return the mean FSC of the volumes at the median of every true state with that state."""
    latents, model = run.load_latents(epoch), load_model(run, epoch, device='cpu')
    points, labels = to_points(latents), simulated.truth.label.to_numpy()[latents.particle.numpy()]
    medians = np.stack([np.median(points[labels == state], axis=0) for state in range(names)])
    volumes = generate_volumes(model, medians, scale=run.inputs['data']['scale'])
    return np.mean([float(compute_fsc(v, t).fsc[1:].mean()) for v, t in zip(volumes, simulated.volumes)])


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    """Train on 120 of 180 particles, go on, go on; ask after each. A wide network on few images can learn their noise."""
    folder = tmp_path_factory.mktemp('noise')
    simulated = simulate_stack(make_phantom('ribosome', 20), 180, names=['small', 'large', 'both'], weights=[2, 3, 5], snr=0.6, seed=0)
    star = write_simulation(folder / 'images', simulated)
    Selection(range(120), 180).save(folder / 'training.json')
    Selection(range(120, 180), 180).save(folder / 'unseen.json')
    changes = {'model.zdim': 4, 'model.encoder_dim': 256, 'model.decoder_dim': 256, 'model.encoder_layers': 2, 'model.decoder_layers': 2,
               'train.batch_size': 10, 'train.learning_rate': 4e-3, 'train.bf16': False, 'data.select': str(folder / 'training.json')}
    run, reports = None, {}
    for verdict, epochs in STEPS.items():
        if run is None:
            run = train_run(folder / 'run', make_config(str(star), changes={**changes, 'train.epochs': epochs}), device='cpu')
        else:
            run = train_run(folder / 'run', changes={'train.epochs': epochs}, device='cpu')
        reports[verdict] = converge_run(run, umap=False, n_epochs=8, n_images=120, device='cpu')
    return run, simulated, reports, folder


@pytest.mark.slow
def test_verdict_differs_between_too_early_right_and_noise(asked):
    """Proof 5 of the protocol."""
    run, simulated, reports, _ = asked
    answers = {verdict: read_answer(report) for verdict, report in reports.items()}
    assert {verdict: answer['verdict'] for verdict, answer in answers.items()} == {verdict: verdict for verdict in STEPS}
    assert [answers[v]['epoch'] for v in ('train further', 'settled')] == [4, 32]
    assert 10 <= answers['trained into noise']['epoch'] <= 64


@pytest.mark.slow
def test_verdict_is_right_about_the_truth(asked):
    """What was called early does get better, what was called noise was better at the epoch that is suggested."""
    run, simulated, reports, _ = asked
    early, right, noisy = (score_truth(run, epoch, simulated, 3) for epoch in STEPS.values())
    suggested = score_truth(run, read_answer(reports['trained into noise'])['epoch'], simulated, 3)
    assert right > early + 0.15 and right > noisy + 0.015 and suggested > noisy + 0.015


@pytest.mark.slow
def test_noise_is_seen_in_the_solvent_too(asked):
    """Where the images are gone, the share of noise in the volumes still tells."""
    run, _, reports, folder = asked
    shares = {}
    for verdict, report in reports.items():
        mean = pd.read_csv(report.parent / 'convergence' / 'volumes.csv').groupby('epoch')[['signal', 'noise']].mean()
        shares[verdict] = (mean.noise / mean.signal).iloc[-1]
    assert shares['trained into noise'] > 2 * shares['train further']
    states = {v['name']: v['state'] for v in read_answer(reports['trained into noise'])['heuristics']}
    assert states['volumes'] == 'worsening' and states['movement'] == 'settled'


@pytest.mark.slow
def test_unseen_images_agree(asked):
    """Particles that were kept out are predicted worse and worse, and those of the training are refused."""
    run, _, reports, folder = asked
    report = converge_run(run, epochs=[2, 6, 16, 28, 40, 70, 84], umap=False, n_images=60, n_maxima=4, unseen=str(folder / 'unseen.json'), device='cpu')
    answer = read_answer(report)
    assert answer['verdict'] == 'trained into noise' and answer['epoch'] in (16, 28, 40) and 'images not seen' in answer['words']
    errors = pd.read_csv(report.parent / 'convergence' / 'unseen.csv').set_index('epoch').unseen
    assert errors[84] > 1.05 * errors.min() and errors[2] > errors.min()
    Selection(range(110, 130), 180).save(folder / 'mixed.json')
    with pytest.raises(InputError, match='10 of its 20 particles were in the training, 110 first'):
        converge_run(run, epochs=[2, 5, 12], umap=False, n_images=10, unseen=str(folder / 'mixed.json'), device='cpu')


@pytest.mark.slow
def test_files_and_report(asked):
    """Every heuristic leaves a table and a figure, the report a section of order 250; a second time gives the same."""
    run, _, reports, _ = asked
    folder = reports['train further'].parent / 'convergence'
    names = {'loss', 'umap', 'moves', 'volumes', 'images'}
    assert {p.stem for p in folder.glob('*.csv')} == names | {'maxima', 'verdicts'} and {p.stem for p in folder.glob('*.png')} == names
    assert (folder.parent / 'sections' / '250-convergence.html').exists()
    maxima, volumes = pd.read_csv(folder / 'maxima.csv'), pd.read_csv(folder / 'maxima' / 'volumes.csv')
    assert maxima.particle.tolist() == volumes.particle.tolist() and volumes.support.min() >= 1 and (folder / 'maxima' / 'vol_000.mrc').exists()
    before = {p.name: p.read_bytes() for p in folder.glob('*.csv')} | {'answer': (folder / 'verdict.json').read_bytes()}
    converge_run(run, epochs=[1, 2, 3, 4], umap=False, n_images=120, device='cpu')
    after = {p.name: p.read_bytes() for p in folder.glob('*.csv')} | {'answer': (folder / 'verdict.json').read_bytes()}
    assert before == after


@pytest.mark.slow
def test_run_without_images(asked):
    """Images that have moved are no error, unless unseen ones were asked for; loss and volumes decide."""
    run, _, _, folder = asked
    copy = folder / 'copy'
    shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns('analysis'))
    (folder / 'images' / 'particles.mrcs').rename(folder / 'gone.mrcs')
    try:
        answer = read_answer(converge_run(copy, epochs=[1, 2, 3, 4], umap=False, device='cpu'))
        with pytest.raises((InputError, RunError)):
            converge_run(copy, epochs=[1, 2, 3], umap=False, unseen=str(folder / 'unseen.json'), device='cpu')
    finally:
        (folder / 'gone.mrcs').rename(folder / 'images' / 'particles.mrcs')
    assert answer['verdict'] == 'train further'
    unknown = [v for v in answer['heuristics'] if v['name'] == 'images'][0]
    assert unknown['state'] == 'unknown' and 'could not be read' in unknown['words']


def test_one_bumpy_epoch_is_no_noise():
    """A single step in which everything got worse is not what learning noise looks like."""
    rng = np.random.default_rng(0)
    base, fall = 0.6 + 0.05 * rng.normal(size=100), [0.02, 0.04, 0.06, 0.07, 0.075, 0.06]
    table = pd.concat([pd.DataFrame({'particle': range(100), 'own': base - f, 'neighbor': base - f + 0.002, 'nothing': 0.7, 'epoch': e}) for e, f in enumerate(fall, 1)])
    assert judge_prediction(table).state != 'worsening'


@pytest.mark.parametrize('n', [3, 12, 400])
def test_maxima_of_any_cloud(n):
    """Few particles, one point, a line: there is always a place to look at."""
    rng = np.random.default_rng(1)
    for cloud in (rng.normal(size=(n, 2)), np.zeros((n, 2)), np.pad(rng.normal(size=(n, 1)), ((0, 0), (0, 1)))):
        found = find_maxima(cloud, cloud)
        assert 1 <= len(found.row) <= 10 and len(set(found.row)) == len(found.row) and found.row.max() < n


def test_tilt_series(tmp_path):
    """A particle of many images is one particle; some have fewer."""
    simulated = simulate_tilts(make_phantom('ribosome', 16, seed=0), 40, scheme=TiltScheme(list_dose_symmetric(20.0, 10.0)), snr=1.0, missing=0.3, seed=0)
    star = write_tilts(tmp_path / 'series', simulated)
    run = train_run(tmp_path / 'run', make_config(str(star), changes={**TINY, 'model.encoder': 'tilt', 'train.epochs': 3}), device='cpu')
    report = converge_run(run, umap=False, n_images=20, device='cpu')
    images = pd.read_csv(report.parent / 'convergence' / 'images.csv')
    assert len(images) == 3 and np.isfinite(images.to_numpy()).all() and images.own.is_monotonic_decreasing
    latents = {e: run.load_latents(e) for e in (1, 2, 3)}
    table = ask_images(run, latents, find_maxima(to_points(latents[3]), latents[3]), n_images=20, device='cpu')[0]
    assert table.groupby('epoch').particle.nunique().tolist() == [20, 20, 20]


def test_runs_that_cannot_be_asked(tmp_path):
    """One line each: closed form, homogeneous, too few epochs kept."""
    stack = simulate_stack(make_phantom('ribosome', 16), 100, snr=1.0, seed=0).stack
    config = make_config(changes={'model.rank': 2, 'subspace.low_passes': 3, 'subspace.full_passes': 1, 'subspace.test': False})
    with pytest.raises(RunError, match='closed form'):
        converge_run(run_subspace(tmp_path / 'closed', config, stack=stack, device='cpu'))
    single = train_run(tmp_path / 'single', make_config(changes={**TINY, 'model.zdim': 0, 'train.epochs': 1}), stack=stack, device='cpu')
    with pytest.raises(RunError, match='homogeneous'):
        converge_run(single)
    few = train_run(tmp_path / 'few', make_config(changes={**TINY, 'train.epochs': 4, 'train.keep_last': 2}), stack=stack, device='cpu')
    with pytest.raises(RunError, match=r'2 epochs \(3, 4\).*--checkpoint-every 1 --encode-every 1 --keep-last 0'):
        converge_run(str(few.path))
    many = open_run(few.path)
    for epoch in (3, 4):
        assert epoch in many.epochs
    with pytest.raises(RunError, match='did not keep epoch 1'):
        choose_epochs(many, [1, 3, 4])


def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path):
    """A low-pass, a mask of another box, images that are not there; a selection of the run goes by its name."""
    star = write_simulation(tmp_path / 'images', simulate_stack(make_phantom('ribosome', 16), 60, snr=1.0, seed=0))
    Selection(range(40), 60).save(tmp_path / 'training.json')
    run = train_run(tmp_path / 'run', make_config(str(star), changes={**TINY, 'train.epochs': 3, 'data.select': str(tmp_path / 'training.json')}), device='cpu')
    write_volume(tmp_path / 'mask.mrc', Volume(torch.ones(8, 8, 8), 2.0))
    for options, match in (({'low_pass': 60.0}, 'leave it out'), ({'mask': str(tmp_path / 'mask.mrc')}, 'boxes'), ({'unseen': 'rest'}, 'There is no')):
        with pytest.raises(InputError, match=match):
            converge_run(run, umap=False, n_images=10, device='cpu', **options)
    assert not (run.analysis_dir(3) / 'convergence').exists()
    Selection(range(40, 60), 60).save(run.path / 'selections' / 'rest.json')
    report = converge_run(run, umap=False, n_images=10, unseen='rest', device='cpu')
    assert len(pd.read_csv(report.parent / 'convergence' / 'unseen.csv')) == 3
