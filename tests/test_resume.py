"""Signals end a run politely; a kill at any moment changes no bit of the result."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recon_nb.core import RunError
from recon_nb.runs import open_run

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('kill_resume', ROOT / 'benchmarks' / 'kill_resume.py')
kill_resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_resume)


def start_worker(folder, name, kind, changes=None, n_processes=1):
    """Start training in a process of its own."""
    arguments = [str(ROOT / 'tests' / 'train_worker.py'), str(folder / name), kind, json.dumps(changes or {}), str(folder / f'{name}.json')]
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n_processes)] if n_processes > 1 else []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, *launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process, line):
    """Read the worker's steps until one is reached."""
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(process.stderr.read())


def assert_same(a, b):
    """Assert that two runs ended with the same bits."""
    x, y = a.load_checkpoint(), b.load_checkpoint()
    assert (x.epoch, x.step) == (y.epoch, y.step)
    assert all(torch.equal(x.model[n], t) for n, t in y.model.items())
    assert all(torch.equal(x.optim[n], t) for n, t in y.optim.items())
    assert torch.equal(a.load_latents().mu, b.load_latents().mu)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_within_the_epoch_and_exits_0(tmp_path, number):
    process = start_worker(tmp_path, 'stopped', 'slow')
    wait_for_step(process, '1 3')
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    run = open_run(tmp_path / 'stopped')
    epoch, step = run.checkpoints[-1]
    assert epoch == 1 and step >= 4
    assert f'{signal.Signals(number).name} received' in (run.path / 'log.txt').read_text()
    for name in ('stopped', 'straight'):
        process = start_worker(tmp_path, name, 'single')
        assert process.wait(120) == 0, process.communicate()[1]
        process.communicate()
    assert_same(run, open_run(tmp_path / 'straight'))


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both(tmp_path):
    """The launcher passes SIGTERM to its workers at slightly different steps; they agree on one."""
    process = start_worker(tmp_path, 'stopped', 'slow', n_processes=2)
    wait_for_step(process, '0 2')
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    run = open_run(tmp_path / 'stopped')
    assert run.checkpoints[-1][0] == 0
    process = start_worker(tmp_path, 'stopped', 'single')  # one process would cut the epoch differently
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1 and 'stopped within an epoch with 8 particles a step' in messages
    for name in ('stopped', 'straight'):
        process = start_worker(tmp_path, name, 'single', n_processes=2)
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert_same(run, open_run(tmp_path / 'straight'))


@pytest.mark.slow
def test_a_run_from_the_subspace_goes_on_from_its_start(tmp_path):
    """Killed in the first epoch, it has its subspace still, and ends with the bits of a run that was not killed."""
    changes = {'model.encoder': 'subspace', 'model.zdim': 1, 'model.rank': 2, 'subspace.low_passes': 3, 'subspace.full_passes': 1, 'subspace.rounds': 0}
    process = start_worker(tmp_path, 'killed', 'slow', changes)
    wait_for_step(process, '0 3')
    process.kill()
    process.communicate()
    run = open_run(tmp_path / 'killed')
    assert run.checkpoints == [(0, 0)]
    before = (run.path / 'checkpoints/0000/model.safetensors').read_bytes()
    for name in ('killed', 'straight'):
        process = start_worker(tmp_path, name, 'single', changes)
        assert process.wait(180) == 0, process.communicate()[1]
        process.communicate()
    assert (run.path / 'log.txt').read_text().count('subspace, round 0') == 1  # the fit was not repeated
    assert (run.path / 'checkpoints/0000/model.safetensors').read_bytes() == before
    assert_same(run, open_run(tmp_path / 'straight'))
    assert torch.equal(run.load_latents(0).mu, open_run(tmp_path / 'straight').load_latents(0).mu)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path, capsys):
    assert kill_resume.run_trials(tmp_path, 2, n_particles=200, seed=1) == 0, capsys.readouterr().out
