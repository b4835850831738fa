"""The loop with models that misbehave, with random layers, with settings at their edges."""
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from recon_nb.cli import main
from recon_nb.core import Batch, ConfigError, InputError, NumericalError, Poses, RunError
from recon_nb.datasets import ParticleDataset, ParticleStack
from recon_nb.losses import LossTerms
from recon_nb.runs import Checkpoint, Stage, collect_log, create_run, make_config, open_run, read_log
from recon_nb.training import encode_all, fit, load_dataset, load_model, train_run

SETTINGS = {'model.zdim': 2, 'train.batch_size': 8, 'train.epochs': 3, 'train.bf16': False, 'train.learning_rate': 1e-2}


class Stub(nn.Module):
    """The smallest model that keeps the contract: a linear encoder and decoder with dropout from the global generator."""

    def __init__(self, n_coefficients, zdim=2, dropout=0.2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.zdim = zdim
        self.encoder, self.decoder = nn.Linear(2 * n_coefficients, 2 * zdim), nn.Linear(zdim, 2 * n_coefficients)
        self.dropout = nn.Dropout(dropout)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1, generator=generator)

    def encode(self, batch):
        return self.encoder(torch.view_as_real(batch.images[:, 0]).flatten(1)).chunk(2, dim=1)

    def forward(self, batch, *, beta, noise):
        mu, logvar = self.encode(batch)
        predicted = self.decoder(self.dropout(mu + (logvar / 2).exp() * noise))
        recon = (predicted - torch.view_as_real(batch.images[:, 0]).flatten(1)).square().mean()
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        return LossTerms(total=recon + beta * kl, recon=recon, kl=kl)

    def parameter_groups(self):
        return {'encoder': list(self.encoder.parameters()), 'decoder': list(self.decoder.parameters())}


def make_dataset(n=45, box=8):
    """Noise images."""
    images = torch.randn(n, box, box, generator=torch.Generator().manual_seed(1))
    stack = ParticleStack(images=images, poses=Poses.identity(n), ctf=None, tilt=None, particle=torch.arange(n), source_row=torch.arange(n), pixel_size=1.0, box=box)
    return ParticleDataset(stack, subtract_background=False)


def start(path, **changes):
    """Make a run and its data set and model."""
    dataset = make_dataset()
    run = create_run(path, make_config(changes={**SETTINGS, **{k.replace('__', '.'): v for k, v in changes.items()}}))
    return Stub(dataset.lattice.n_coefficients), dataset, run


def test_model_that_draws_resumes_to_the_bit(tmp_path):
    """Dropout uses the global generator, whose state is in the checkpoint."""
    model, dataset, run = start(tmp_path / 'straight')
    assert [s.epoch for s in fit(model, dataset, run, device='cpu')] == [1, 2, 3]
    broken, _, other = start(tmp_path / 'broken')
    steps = fit(broken, dataset, other, device='cpu')
    next(steps)
    steps.close()
    torch.manual_seed(99)
    fresh = Stub(dataset.lattice.n_coefficients)
    assert [s.epoch for s in fit(fresh, dataset, other, device='cpu')] == [2, 3]
    a, b = run.load_checkpoint(), other.load_checkpoint()
    assert all(torch.equal(b.model[n], t) for n, t in a.model.items())
    assert read_log(run)['total'].tolist() == read_log(other)['total'].tolist()


def test_finished_run_is_left_alone(tmp_path):
    model, dataset, run = start(tmp_path / 'a')
    list(fit(model, dataset, run, device='cpu'))
    before = (run.path / 'log.csv').read_bytes()
    assert list(fit(model, dataset, run, device='cpu')) == []
    assert (run.path / 'log.csv').read_bytes() == before


def test_losses_of_an_epoch_are_means_over_particles(tmp_path):
    """45 particles in batches of 8: the short last batch counts with its 5."""
    model, dataset, run = start(tmp_path / 'a', train__epochs=1)
    seen = []
    stats = next(fit(model, dataset, run, device='cpu', on_step=lambda e, s, losses: seen.append(losses['recon'])))
    weights = [8] * 5 + [5]
    assert stats.losses['recon'] == pytest.approx(sum(w * v for w, v in zip(weights, seen)) / 45, rel=1e-12)
    assert set(stats.to_row()) == {'epoch', 'total', 'recon', 'kl', 'learning_rate', 'beta', 'seconds', 'images_per_second'}


def test_nan_names_epoch_batch_and_particles(tmp_path):
    model, dataset, run = start(tmp_path / 'a', train__epochs=2)
    next(fit(model, dataset, run, device='cpu'))
    dataset.source.values[17, 3] = torch.nan
    with pytest.raises(NumericalError, match=r'epoch 2, batch \d+ .*particles .*\b17\b') as error:
        list(fit(model, dataset, run, device='cpu'))
    assert 'recon inspect' in str(error.value)
    assert run.epochs == [1]  # nothing of the bad epoch was kept


def test_other_images_are_refused_on_resume(tmp_path):
    model, dataset, run = start(tmp_path / 'a', train__epochs=2)
    steps = fit(model, dataset, run, device='cpu')
    next(steps)
    steps.close()
    with pytest.raises(RunError, match='not those that .* began with: the number of images was 45 and is 44'):
        list(fit(model, make_dataset(44), run, device='cpu'))


def test_checkpoint_of_another_network_is_refused(tmp_path):
    model, dataset, run = start(tmp_path / 'a', train__epochs=2)
    steps = fit(model, dataset, run, device='cpu')
    next(steps)
    steps.close()
    with pytest.raises(RunError, match='Checkpoint 0001 does not fit'):
        list(fit(Stub(dataset.lattice.n_coefficients, zdim=3), dataset, run, device='cpu'))


def test_checkpoint_interval_keeps_the_last(tmp_path):
    model, dataset, run = start(tmp_path / 'a', train__epochs=5, train__checkpoint_every=2, train__keep_last=2)
    list(fit(model, dataset, run, device='cpu'))
    assert run.epochs == [4, 5]
    assert read_log(run)['epoch'].tolist() == [1, 2, 3, 4, 5]


def test_encode_all_is_ordered_and_draws_nothing(tmp_path):
    model, dataset, _ = start(tmp_path / 'a')
    model.train()
    state = torch.get_rng_state()
    latents = encode_all(model, dataset, batch_size=7)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert torch.equal(latents.particle, dataset.particles)
    torch.testing.assert_close(latents.mu, model.encode(dataset.get_batch(dataset.particles))[0].detach())


def test_missing_latents_are_made_up_on_resume(tmp_path):
    """A process killed between checkpoint and latents leaves none; the next writes them first."""
    stack = make_dataset().stack
    small = {**SETTINGS, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.epochs': 2}
    run = train_run(tmp_path / 'a', make_config(changes=small), stack=stack, device='cpu')
    whole = run.load_latents(2)
    (run.path / 'latents' / '0002.npz').unlink()
    train_run(tmp_path / 'a', stack=stack, device='cpu')
    assert torch.equal(run.load_latents(2).mu, whole.mu)
    assert (run.path / 'particles.csv').read_text().splitlines()[:2] == ['source_row,particle', '0,0']


def test_trained_model_reads_back(tmp_path):
    dataset = make_dataset()
    small = {**SETTINGS, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.epochs': 1}
    run = train_run(tmp_path / 'a', make_config(changes=small), stack=dataset.stack, device='cpu')
    model = load_model(open_run(run.path), device='cpu')
    assert not model.training
    torch.testing.assert_close(encode_all(model, dataset).mu, run.load_latents().mu)


def test_wrong_input_leaves_no_run(tmp_path):
    with pytest.raises(ConfigError, match='data.particles is empty'):
        train_run(tmp_path / 'a', make_config())
    with pytest.raises(ConfigError, match='Did you mean "positional"'):
        train_run(tmp_path / 'a', make_config(changes={'model.decoder': 'positonal'}), stack=make_dataset().stack, device='cpu')
    assert not (tmp_path / 'a').exists()


def test_beta_follows_its_schedule(tmp_path):
    model, dataset, run = start(tmp_path / 'a', train__epochs=4, model__beta=2.0, model__beta_schedule='linear')
    betas = [stats.beta for stats in fit(model, dataset, run, device='cpu')]
    assert betas[0] < betas[1] < betas[2] == betas[3] == 2.0


def test_what_was_inferred_is_in_the_log(tmp_path, data_dir):
    """Lines said while the input was read, before the folder existed, are in log.txt."""
    small = {**SETTINGS, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.epochs': 1, 'data.box': 32}
    run = train_run(tmp_path / 'a', make_config(str(data_dir / 'images' / 'relion_proj_batch.star'), changes=small), device='cpu')
    text = (run.path / 'log.txt').read_text()
    assert 'dark particles: no (assumed; the file does not say)' in text and 'epoch 1 of 1: total loss' in text
    assert run.inputs['data']['box'] == 32 and run.inputs['files']['particles']['bytes'] > 0


def test_images_of_another_box_are_refused_by_a_trained_run(tmp_path):
    small = {**SETTINGS, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.epochs': 1}
    run = train_run(tmp_path / 'a', make_config(changes=small), stack=make_dataset().stack, device='cpu')
    with pytest.raises(InputError, match='box of 10 px, the run was trained at 8 px; give --box 8'):
        load_dataset(run.config, stack=make_dataset(box=10).stack, facts=run.inputs['data'])


def test_batch_and_checkpoint_types_are_plain():
    """The records that travel stay dataclasses with these fields; other programs read them."""
    assert [f.name for f in dataclasses.fields(Checkpoint)] == ['epoch', 'step', 'model', 'optim', 'state']
    assert [f.name for f in dataclasses.fields(Batch)] == ['images', 'poses', 'ctf', 'tilt', 'valid', 'particle']


@pytest.mark.slow
@pytest.mark.parametrize('has_compiler', [False, True])
def test_compiled_training_and_its_fallback(tmp_path, has_compiler):
    """Without a C++ compiler a run that asks for compilation trains as it is and says so in one line; with one it takes the same steps."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    if not has_compiler:
        environment['CXX'] = str(tmp_path / 'no-such-compiler')
    for name, changes in (('plain', '{}'), ('compiled', '{"train.compile": true}')):
        arguments = [str(root / 'tests' / 'train_worker.py'), str(tmp_path / name), 'single', changes, str(tmp_path / f'{name}.json')]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / 'compiled' / 'log.txt').read_text()
    assert text.count('not compiled, running as it is') == (0 if has_compiler else 1)
    plain, compiled = (read_log(open_run(tmp_path / name))['total'] for name in ('plain', 'compiled'))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_batch_size_is_settled_once(tmp_path, monkeypatch):
    """What `auto` found is in config.json; with other memory a resumed run keeps it."""
    small = {**SETTINGS, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'train.epochs': 1, 'train.batch_size': 'auto'}
    stack = make_dataset().stack
    monkeypatch.setattr('recon_nb.training.find_free_memory', lambda: 1e5)
    run = train_run(tmp_path / 'a', make_config(changes=small), stack=stack, device='cpu')
    settled = run.config.train.batch_size
    assert settled in (1, 2, 4)
    monkeypatch.setattr('recon_nb.training.find_free_memory', lambda: 1e12)
    train_run(tmp_path / 'a', stack=stack, device='cpu', changes={'train.epochs': 2})
    assert open_run(run.path).config.train.batch_size == settled
    assert 'auto; about' in (run.path / 'log.txt').read_text()


# ---------------------------------------------------------------- what a training says

class Eager(Stage):
    """A stage that speaks after a hundredth of the time."""

    def __init__(self, doing, *, delay=10.0, closing=True):
        super().__init__(doing, delay=delay / 1000, closing=closing)


@pytest.mark.parametrize('has_bars', [False, True])
def test_a_long_epoch_says_how_far_it_is(tmp_path, monkeypatch, has_bars):
    """Without a terminal the screen gets lines with the time left; with one it has a bar, and the lines are kept in log.txt only."""
    monkeypatch.setattr('recon_nb.training.Stage', Eager)
    monkeypatch.setattr('sys.stderr.isatty', lambda: has_bars, raising=False)
    model, dataset, run = start(tmp_path / 'run', train__epochs=1)
    with collect_log() as records:
        list(fit(model, dataset, run, device='cpu', on_step=lambda *step: time.sleep(0.05)))
    said = [(record.name, record.getMessage()) for record in records if 'done, about' in record.getMessage()]
    assert said and all(re.fullmatch(r'epoch 1 of 1(, for \d+ s now)?; \d+% done, about \d+ s left of it', words) for _, words in said), said
    assert {name for name, _ in said} == {'recon_nb.stages' if has_bars else 'recon_nb'}


def test_a_step_without_a_bar_speaks_in_a_terminal_too(monkeypatch):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    with collect_log() as records, Stage('solving', delay=0.01):
        time.sleep(0.05)
    assert records and {record.name for record in records} == {'recon_nb'}


def test_training_speaks_where_there_is_no_terminal(tmp_path, capsys):
    """A batch queue's log holds a line at the start and one for every epoch, with the time left but for the last."""
    assert main(['simulate', '-o', str(tmp_path / 'data'), '--n-particles', '40', '--box', '16']) == 0
    small = '--start none --encoder-dim 16 --decoder-dim 16 --epochs 3 --n-workers 0 --no-analysis --device cpu'.split()
    capsys.readouterr()
    assert main(['train', str(tmp_path / 'data/particles.star'), '-o', str(tmp_path / 'run'), *small]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if 'epoch' in line]
    assert lines[0] == 'recon train: training on 40 particles: epoch 1 of 3 begins', lines
    assert [re.match(r'recon train: epoch (\d) of 3: total loss [\d.]+, squared error per pixel', line)[1] for line in lines[1:]] == ['1', '2', '3']
    assert [line.endswith(' left') for line in lines[1:]] == [True, True, False]
