"""Two processes take the steps of one with the joint batch."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recon_nb.runs import open_run

ROOT = Path(__file__).parents[1]


def train(folder, name, kind, changes, n_processes):
    """Train in processes of their own; return the run and the losses of every step."""
    steps = folder / f'{name}.json'
    arguments = [str(ROOT / 'tests' / 'train_worker.py'), str(folder / name), kind, json.dumps(changes), str(steps)]
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n_processes)] if n_processes > 1 else []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return open_run(folder / name), json.loads(steps.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'changes'), [
    ('single', {}),
    ('ragged', {'model.zdim': 0}),
    ('single', {'train.optimize_poses': True, 'train.pose_start_epoch': 0}),
    ('ragged', {'model.zdim': 0, 'train.start_radius': 0.5, 'train.pixel_fraction': 0.5, 'train.scale_learning_rate': 'sqrt'}),
    ('ragged', {'model.encoder': 'subspace', 'model.manifold': 'linear', 'model.rank': 2, 'subspace.low_passes': 3, 'subspace.full_passes': 1, 'subspace.rounds': 0}),
    ('tilts', {'model.encoder': 'tilt', 'model.pooling': 'attention', 'model.dose': 'weight', 'model.dose_mask': True, 'model.beta_per': 'series', 'train.n_tilts': 3, 'train.tilt_sampling': 'random'}),
    ('tilts', {'model.encoder': 'tilt', 'model.pooling': 'concatenate', 'model.dose': 'model', 'train.n_tilts': 3}),
], ids=['latents', 'ragged', 'poses', 'curriculum and subsampling', 'from the subspace', 'tilts as tomoDRGN', 'tilts as cryoDRGN-ET'])
def test_two_processes_equal_one(tmp_path, kind, changes):
    """49 particles in joint batches of 8: the last has one row, so one process works with weight zero."""
    two, two_steps = train(tmp_path, 'two', kind, {**changes, 'train.batch_size': 4}, 2)
    one, one_steps = train(tmp_path, 'one', kind, {**changes, 'train.batch_size': 8}, 1)
    assert [(s['epoch'], s['step']) for s in two_steps] == [(s['epoch'], s['step']) for s in one_steps]
    for a, b in zip(two_steps, one_steps):
        assert a['total'] == pytest.approx(b['total'], rel=1e-5)
        assert a['kl'] == pytest.approx(b['kl'], rel=1e-4, abs=1e-7)
    a, b = two.load_checkpoint(), one.load_checkpoint()
    for name in b.model:
        torch.testing.assert_close(a.model[name], b.model[name], rtol=1e-3, atol=1e-4)
    if 'model.zdim' not in changes:
        x, y = two.load_latents(), one.load_latents()
        assert torch.equal(x.particle, y.particle)
        torch.testing.assert_close(x.mu, y.mu, rtol=1e-2, atol=1e-3)
    if 'pose_table' in b.optim:
        assert b.optim['pose_table'].abs().max() > 0
        torch.testing.assert_close(a.optim['pose_table'], b.optim['pose_table'], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path):
    """Two epochs and two more on two processes are four."""
    train(tmp_path, 'broken', 'single', {'train.epochs': 1}, 2)
    broken, _ = train(tmp_path, 'broken', 'single', {'train.epochs': 2}, 2)
    straight, _ = train(tmp_path, 'straight', 'single', {'train.epochs': 2}, 2)
    a, b = broken.load_checkpoint(), straight.load_checkpoint()
    assert all(torch.equal(a.model[n], t) for n, t in b.model.items())
    assert all(torch.equal(a.optim[n], t) for n, t in b.optim.items())


def find_workers(launcher):
    """Return the ids of the processes that a launcher has started."""
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(launcher.pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in children]


def is_alive(pid):
    """Tell whether a process is there and not only waits to be counted."""
    status = Path(f'/proc/{pid}/stat')
    return status.exists() and status.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1], ids=['the one that writes', 'another'])
def test_a_lost_process_ends_the_run_and_leaves_it_resumable(tmp_path, victim):
    """A worker is killed in the second epoch: the launcher fails soon, nobody stays behind, and the run goes on from the first."""
    arguments = [str(ROOT / 'tests' / 'train_worker.py'), str(tmp_path / 'broken'), 'slow', json.dumps({'train.epochs': 2}), str(tmp_path / 'steps.json')]
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    workers = {}
    for line in process.stdout:
        if line.strip() == '1 2':
            for pid in find_workers(process):
                variables = dict(v.split('=', 1) for v in Path(f'/proc/{pid}/environ').read_text().split('\0') if '=' in v)
                workers[int(variables['RANK'])] = pid
            os.kill(workers[victim], signal.SIGKILL)
            break
    started = time.monotonic()
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1 and 'SIGKILL' in messages, messages[-2000:]
    assert time.monotonic() - started < 90 and not any(map(is_alive, workers.values()))
    run = open_run(tmp_path / 'broken')
    assert run.checkpoints == [(1, 0)]  # the epoch that was whole
    train(tmp_path, 'broken', 'single', {'train.epochs': 2}, 2)
    straight, _ = train(tmp_path, 'straight', 'single', {'train.epochs': 2}, 2)
    a, b = run.load_checkpoint(), straight.load_checkpoint()
    assert (a.epoch, a.step) == (2, 0) and all(torch.equal(a.model[n], t) for n, t in b.model.items())
    assert all(torch.equal(a.optim[n], t) for n, t in b.optim.items())
