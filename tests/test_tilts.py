"""Training on tilt series: the numbers of dose and tilt, one decoder call a step, ragged particles under every pooling, and how sure a latent is."""
import dataclasses
import math
import os
import signal

import pandas as pd
import pytest
import torch
from torch import Tensor

from recon_nb import imaging
from recon_nb.cli import main
from recon_nb.core import ConfigError, InputError
from recon_nb.datasets import ParticleDataset, iterate_batches
from recon_nb.fourier import Lattice
from recon_nb.models import build_model
from recon_nb.runs import create_run, make_config, presets, read_log
from recon_nb.simulate import make_phantom
from recon_nb.tiltencoder import poolings
from recon_nb.tiltsampling import limit_tilts
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts
from recon_nb.training import build_run_model, choose_encoded, encode_all, fit, measure_spread, train_run

SMALL = {'model.zdim': 2, 'model.encoder': 'tilt', 'model.encoder_dim': 16, 'model.tilt_features': 12, 'model.decoder_dim': 16, 'model.decoder_layers': 1,
         'model.encoder_layers': 1, 'train.batch_size': 4, 'train.epochs': 2, 'train.learning_rate': 1e-3, 'train.bf16': False, 'train.n_workers': 0}


def make_series(n=14, missing=0.4, box=16):
    """Simulate series of 9 tilts, 15 degrees and 12 e/Å² apart, some images missing."""
    scheme = TiltScheme(list_dose_symmetric(60, 15), 12.0)
    return simulate_tilts(make_phantom('ribosome', box, seed=0), n, scheme=scheme, snr=1.0, missing=missing, seed=0).stack


@pytest.fixture(scope='module')
def series():
    """Return 14 particles of one to nine tilts."""
    stack = make_series()
    counts = torch.unique(stack.particle, return_counts=True)[1]
    assert counts.min() < counts.max()
    return stack


@pytest.fixture(scope='module')
def fine(series):
    """Return the same with pixels so fine that the dose matters."""
    return dataclasses.replace(series, pixel_size=3.28, table=None)


# ---------------------------------------------------------------- dose and tilt in numbers

critical = {40.0: 116.73, 20.0: 38.734, 10.0: 14.138, 5.0: 6.3823}  # Å to e/Å²: 0.245 k^-1.665 + 2.81 by hand, at 300 kV


def find_shell(lattice, resolution):
    """Return a coefficient whose frequency is a named one."""
    index = int((lattice.radius - lattice.box * lattice.pixel_size / resolution).abs().argmin())
    assert float(lattice.radius[index]) == pytest.approx(lattice.box * lattice.pixel_size / resolution, rel=1e-6)
    return index


def prepare(stack, dose, dose_mask=True):
    """Return lattice and prepared images of all particles, as a training step makes them."""
    dataset = ParticleDataset(stack)
    model = build_model(dataset.lattice, zdim=2, encoder='tilt', encoder_dim=4, decoder_dim=4, dose=dose, dose_mask=dose_mask)
    return dataset.lattice, model.prepare(dataset.get_batch(dataset.particles).flatten())


def make_named(voltage=300.0):
    """Return two series of three images on a lattice with shells at 40, 20, 10 and 5 Å: the first, one at 60 degrees, the last of 41 tilts at -60."""
    stack = make_series(2, missing=0.0, box=40).take(torch.tensor([0, 1, 2, 9, 10, 11]))
    tilt = dataclasses.replace(stack.tilt, dose=torch.tensor([0.0, 0.0, 120.0]).repeat(2), tilt_angle=torch.tensor([0.0, 60.0, -60.0]).repeat(2))
    ctf = dataclasses.replace(stack.ctf, voltage=torch.full_like(stack.ctf.voltage, voltage))
    return dataclasses.replace(stack, tilt=tilt, ctf=ctf, pixel_size=2.0, table=None)


@pytest.mark.parametrize(('voltage', 'factor'), [(300.0, 1.0), (200.0, 0.8)])
def test_weights_of_a_60_degree_tilt_and_of_the_last_tilt(voltage, factor):
    lattice, prepared = prepare(make_named(voltage), 'weight')
    weights, worth = prepared.weights.unflatten(0, (2, 3)), prepared.worth.unflatten(0, (2, 3))
    assert torch.equal(weights[:, 0], torch.ones_like(weights[:, 0])) and worth[:, :2].all()
    assert float((weights[:, 1] - 0.5).abs().max()) < 1e-7  # the cosine of 60 degrees at every frequency; of 60 radians it would be -.95, of 1.047 degrees .9998
    for resolution, dose in critical.items():
        index = find_shell(lattice, resolution)
        assert float(weights[0, 2, index]) == pytest.approx(0.5 * math.exp(-120 / (2 * factor * dose)), rel=1e-3)
        assert bool(worth[0, 2, index]) == (120 <= 2.51284 * factor * dose)
    assert bool(worth[0, 2, find_shell(lattice, 40.0)]) and not worth[0, 2, find_shell(lattice, 20.0)]
    assert float(weights[0, 2, 0]) == pytest.approx(0.5, abs=1e-7)  # zero frequency has no critical dose


def test_nothing_is_learnt_beyond_the_optimal_dose():
    """The gradient of the squared error is zero there, not small."""
    stack = make_named()
    lattice, prepared = prepare(stack, 'weight')
    dataset = ParticleDataset(stack)
    model = build_model(lattice, zdim=2, encoder='tilt', encoder_dim=4, decoder_dim=4, dose='weight', dose_mask=True, bf16=False)
    batch = dataset.get_batch(dataset.particles)
    losses = []
    for beyond in (0.0, 1e6):
        spoilt = batch.images + beyond * ~prepared.worth.unflatten(0, (2, 3))
        changed = dataclasses.replace(batch, images=spoilt)
        seen = model.prepare(changed.flatten())
        losses.append(model.compare(model.decode(seen, torch.zeros(2, 2)), seen))
    assert losses[0] == losses[1]


@pytest.mark.parametrize('dose', imaging.dose_places)
def test_damage_enters_once(series, dose, monkeypatch):
    """Where the damage is doubled by hand, the step sees it doubled once: in the prediction or in the weights, never in both."""
    calls = []

    def compute(*arguments):
        calls.append(arguments)
        return 0.25 * torch.ones(len(arguments[1]), len(arguments[0]))

    plain = prepare(series, 'off', dose_mask=False)[1]
    monkeypatch.setattr(imaging, 'compute_damage', compute)
    lattice, prepared = prepare(series, dose, dose_mask=False)
    assert len(calls) == (0 if dose == 'off' else 1)
    torch.testing.assert_close(prepared.transfer, plain.transfer * (0.25 if dose in ('auto', 'model') else 1.0))
    assert prepared.weights is None if dose != 'weight' else bool((prepared.weights == 0.25).all())


@pytest.mark.parametrize('options', [{'model.dose': 'weight'}, {'model.dose': 'model'}, {'model.dose_mask': True}], ids=['weight', 'model', 'mask'])
def test_other_voltages_are_refused_by_name_before_there_is_a_run(series, tmp_path, options):
    ctf = dataclasses.replace(series.ctf, voltage=torch.where(torch.arange(series.n_images) == 17, 120.0, 300.0).double())
    with pytest.raises(InputError, match='found 120 kV'):
        train_run(tmp_path / 'a', make_config(changes={**SMALL, **options}), stack=dataclasses.replace(series, ctf=ctf), device='cpu')
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- starts that fail

def take_particles(stack, n):
    """Return the stack of the first particles."""
    return stack.select(torch.arange(n))


@pytest.mark.parametrize(('changes', 'spoil', 'message'), [
    ({'model.encoder': 'subspace', 'model.manifold': 'linear', 'model.rank': 2}, lambda s: take_particles(s, 11), 'rank 2 needs at least 12 particles; found 11'),
    ({'model.encoder': 'subspace', 'model.manifold': 'linear', 'model.rank': 2}, lambda s: dataclasses.replace(s, images=s.images * float('nan')), 'NaN|finite'),
    ({'model.dose': 'model'}, lambda s: dataclasses.replace(s, tilt=None), 'dose=model needs the dose'),
    ({'model.dose_mask': True}, lambda s: dataclasses.replace(s, ctf=None), '--no-dose-mask'),
    ({'train.n_tilts': 2}, lambda s: dataclasses.replace(s, tilt=None), '--tilt-sampling random'),
    ({'model.pooling': 'concatenate'}, lambda s: s, '--n-tilts'),
    ({'model.beta_schedule': 'cosinus'}, lambda s: s, 'cosinus'),
], ids=['few particles', 'blank images', 'no dose', 'no voltage', 'no dose to sort by', 'concatenate how many', 'beta'])
def test_a_start_that_fails_leaves_no_run(series, tmp_path, changes, spoil, message):
    with pytest.raises((ConfigError, InputError), match=message):
        train_run(tmp_path / 'a', make_config(changes={**SMALL, **changes}), stack=spoil(series), device='cpu')
    assert not list(tmp_path.iterdir())


def test_what_exists_is_found_before_the_subspace_is_fitted(series, tmp_path, monkeypatch):
    run = create_run(tmp_path / 'a', make_config(changes=SMALL))
    monkeypatch.setattr('recon_nb.training.load_dataset', lambda *_, **__: pytest.fail('read the images first'))
    with pytest.raises(Exception, match='is a run already'):
        train_run(run.path, make_config(changes=SMALL), stack=series, device='cpu')


def test_a_series_started_from_the_subspace(tmp_path):
    """Sums over tilts; the start is epoch 0 and goes on to the bit after a stop."""
    stack = make_series(40)
    changes = {**SMALL, 'model.encoder': 'subspace', 'model.manifold': 'linear', 'model.rank': 2, 'model.dose': 'model', 'subspace.low_passes': 2, 'subspace.full_passes': 1, 'subspace.rounds': 0}
    whole = train_run(tmp_path / 'a', make_config(changes=changes), stack=stack, device='cpu')
    train_run(tmp_path / 'b', make_config(changes={**changes, 'train.epochs': 1}), stack=stack, device='cpu')
    again = train_run(tmp_path / 'b', stack=stack, device='cpu', changes={'train.epochs': 2})
    assert whole.epochs == again.epochs == [0, 1, 2] and 'subspace, round 0' in (whole.path / 'log.txt').read_text()
    assert all(torch.equal(t, again.load_checkpoint().model[n]) for n, t in whole.load_checkpoint().model.items())


# ---------------------------------------------------------------- one call a step

@pytest.mark.parametrize('dose_mask', [False, True])
def test_a_ragged_batch_is_one_decoder_call_and_one_backward(fine, tmp_path, monkeypatch, dose_mask):
    config = make_config(changes={**SMALL, 'model.dose': 'weight', 'model.dose_mask': dose_mask, 'train.epochs': 1, 'train.batch_size': 7})
    dataset = ParticleDataset(fine)
    run, model = create_run(tmp_path / 'a', config), build_run_model(config, dataset.lattice)
    sizes, backwards, losses = [], [], []
    evaluate, backward = model.decoder.evaluate, Tensor.backward
    monkeypatch.setattr(model.decoder, 'evaluate', lambda coords, *rest: sizes.append(coords.shape[0] * coords.shape[1]) or evaluate(coords, *rest))
    monkeypatch.setattr(Tensor, 'backward', lambda *a, **k: backwards.append(1) or backward(*a, **k))
    list(fit(model, dataset, run, device='cpu', on_step=lambda *step: losses.append(step)))
    assert len(losses) == len(backwards) == len(sizes) == 2
    worth = prepare(fine, 'weight', dose_mask)[1].worth
    assert sum(sizes) == (int(worth.sum()) if dose_mask else dataset.n_images * dataset.lattice.n_coefficients)


def test_the_mask_changes_no_kept_coefficient(fine):
    """Same network, same batch: the masked loss is the sum over the kept coefficients of what the whole loss sums."""
    dataset = ParticleDataset(fine)
    batch = dataset.get_batch(dataset.particles)
    models = [build_model(dataset.lattice, zdim=2, encoder='tilt', encoder_dim=16, decoder_dim=16, dose='weight', dose_mask=mask, bf16=False) for mask in (False, True)]
    whole, masked = (model.prepare(batch.flatten()) for model in models)
    assert 0.1 < float(masked.worth.float().mean()) < 0.95
    z = torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models[1].decode(masked, z), models[0].decode(whole, z)[masked.worth])
    silenced = dataclasses.replace(whole, weights=whole.weights * masked.worth)
    torch.testing.assert_close(models[1].compare(models[1].decode(masked, z), masked), models[0].compare(models[0].decode(whole, z), silenced))


# ---------------------------------------------------------------- ragged particles

@pytest.mark.parametrize('batch_size', [1, 5, 14])
@pytest.mark.parametrize('pooling', poolings)
def test_latents_do_not_depend_on_the_company(series, pooling, batch_size):
    dataset = ParticleDataset(series)
    model = build_model(dataset.lattice, zdim=2, encoder='tilt', encoder_dim=16, decoder_dim=16, pooling=pooling, n_tilts=9, bf16=False).eval()
    alone = torch.cat([model.encode(dataset.get_batch(p[None]))[0] for p in dataset.particles])
    together = torch.cat([model.encode(batch)[0] for batch in iterate_batches(dataset, batch_size, shuffle=False)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert float(alone.detach().std(0).min()) > 0


@pytest.mark.parametrize('pooling', poolings)
@pytest.mark.parametrize('sampling', ['dose', 'random'])
def test_training_goes_on_to_the_bit(series, tmp_path, pooling, sampling):
    changes = {**SMALL, 'model.pooling': pooling, 'model.dose': 'weight', 'model.dose_mask': True, 'train.n_tilts': 3, 'train.tilt_sampling': sampling}
    whole = train_run(tmp_path / 'a', make_config(changes=changes), stack=series, device='cpu')
    train_run(tmp_path / 'b', make_config(changes={**changes, 'train.epochs': 1}), stack=series, device='cpu')
    again = train_run(tmp_path / 'b', stack=series, device='cpu', changes={'train.epochs': 2})
    assert all(torch.equal(t, again.load_checkpoint().model[n]) for n, t in whole.load_checkpoint().model.items())
    assert torch.equal(whole.load_latents().mu, again.load_latents().mu)
    dataset, model = ParticleDataset(series), build_run_model(whole.config, ParticleDataset(series).lattice)
    shown = choose_encoded(dataset, whole.config).counts
    everything = sampling == 'random' and pooling != 'concatenate'
    assert torch.equal(shown, dataset.counts if everything else dataset.counts.clamp(max=3))
    model.load_state_dict(whole.load_checkpoint().model)
    for _ in range(2):  # nothing is drawn
        torch.testing.assert_close(encode_all(model, choose_encoded(dataset, whole.config)).mu, whole.load_latents().mu, rtol=1e-4, atol=1e-5)


def test_an_epoch_of_random_tilts_is_gone_on_with(series, tmp_path):
    """Stopped within the second epoch: what is left of it shows the tilts that it would have shown."""
    changes = {**SMALL, 'model.dose': 'model', 'train.n_tilts': 2, 'train.tilt_sampling': 'random', 'train.epochs': 3}

    def interrupt(epoch, step, _):
        if (epoch, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train_run(tmp_path / 'a', make_config(changes=changes), stack=series, device='cpu')
    stopped = train_run(tmp_path / 'b', make_config(changes=changes), stack=series, device='cpu', on_step=interrupt)
    assert stopped.checkpoints == [(1, 0), (1, 3)]
    train_run(stopped.path, stack=series, device='cpu')
    assert all(torch.equal(t, stopped.load_checkpoint().model[n]) for n, t in whole.load_checkpoint().model.items())
    assert (read_log(whole)['recon'] == read_log(stopped)['recon']).all()


@pytest.mark.parametrize('preset', ['tomodrgn', 'et'])
def test_presets_train_on_ragged_series(series, tmp_path, preset):
    small = {name: SMALL[name] for name in ('model.zdim', 'model.encoder_dim', 'model.decoder_dim', 'model.tilt_features', 'train.bf16', 'train.n_workers')}
    run = train_run(tmp_path / 'a', make_config(preset=preset, changes={**small, 'train.epochs': 1}), stack=series, device='cpu')
    assert run.config.train.batch_size == presets[preset]['train']['batch_size'] and run.load_latents().mu.shape == (14, 2)


def test_too_many_tilts_for_a_concatenating_encoder_are_refused(series):
    dataset = ParticleDataset(series)
    model = build_model(dataset.lattice, zdim=2, encoder='tilt', encoder_dim=16, decoder_dim=16, pooling='concatenate', n_tilts=3)
    with pytest.raises(ConfigError, match='--n-tilts 3'):
        model.encode(dataset.get_batch(dataset.particles))
    assert model.encode(limit_tilts(dataset, 3).get_batch(dataset.particles))[0].shape == (14, 2)


# ---------------------------------------------------------------- how sure

def test_spread_is_reproducible_and_zero_without_a_choice(series):
    dataset = ParticleDataset(series)
    model = build_model(dataset.lattice, zdim=2, encoder='tilt', encoder_dim=16, decoder_dim=16, bf16=False)
    spread = measure_spread(model, dataset, 2, n_draws=4, seed=3)
    assert spread.shape == (14, 2) and torch.equal(spread, measure_spread(model, dataset, 2, n_draws=4, seed=3))
    assert not torch.equal(spread, measure_spread(model, dataset, 2, n_draws=4, seed=4))
    torch.testing.assert_close(spread[dataset.counts <= 2], torch.zeros(int((dataset.counts <= 2).sum()), 2), atol=1e-6, rtol=0)
    assert bool((spread[dataset.counts > 4] > 0).all())


def test_encode_writes_the_spread_when_asked(tmp_path, capsys):
    scheme = TiltScheme(list_dose_symmetric(60, 15), 12.0)
    star = write_tilts(tmp_path / 'series', simulate_tilts(make_phantom('ribosome', 16, seed=0), 14, scheme=scheme, snr=1.0, missing=0.4, seed=0))
    run = train_run(tmp_path / 'run', make_config(str(star), changes={**SMALL, 'train.n_tilts': 2, 'train.epochs': 1}), device='cpu')
    assert not main(['encode', str(run.path), '--device', 'cpu', '--spread', '4'])
    assert '0001_spread.csv' in capsys.readouterr().out
    table = pd.read_csv(run.path / 'latents/0001_spread.csv')
    assert list(table.columns) == ['particle', 'n_images', 'spread0', 'spread1'] and len(table) == 14
    assert table.spread0.isna().equals(table.n_images <= 2) and (table.spread0.dropna() > 0).all()
    for words in (['--n-tilts', '3'], [str(star), '--spread', '4'], ['--spread', '4', '--n-tilts', '9'], ['--spread', '1']):
        assert main(['encode', str(run.path), '--device', 'cpu', *words]) == 2
        assert capsys.readouterr().err.count('\n') == 1
