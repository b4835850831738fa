"""Two processes learn poses by the steps of one with the joint batch."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation

ROOT = Path(__file__).parents[1]


def learn(folder, kind, changes, n_processes):
    """Learn in processes of their own; return the losses of every step, the momentum and the poses."""
    out = folder / f'{n_processes}.json'
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n_processes)] if n_processes > 1 else []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    arguments = [str(ROOT / 'tests' / 'abinit_worker.py'), kind, json.dumps(changes), str(out)]
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(out.read_text())
    return torch.tensor(told['losses'], dtype=torch.float64), *(torch.tensor(told[name]) for name in ('momentum', 'rot', 'shift'))


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'changes'), [
    ('first', {}),
    ('first', {'keep': 0.6, 'rank_by': 'gain', 'turns': 'random', 'disturbance': 10.0, 'mask_radius': 0.4, 'n_heads': 2}),
    ('first', {'keep': 0.05, 'keep_from': 0.0, 'keep_to': 1.0}),
    ('first', {'decoder': 'fouriernet', 'trunk': 'resnet', 'activation': 'siren'}),
    ('first', {'decoder': 'voxels'}),
    ('second', {}),
], ids=['closed', 'junk, disturbance, mask and heads', 'two images kept', 'as published', 'voxels', 'second stage'])
def test_two_processes_learn_as_one(tmp_path, kind, changes):
    """Joint batches of 25: one process has 13 images, the other 12; of two that are kept one process may have none.

    Learning amplifies rounding: of two runs of one process whose weights differ by 1e-7 the losses differ by 1e-5 after three steps and by 1e-3 after five.
    So steps are small here, while the map, which has no rate, changes as fast as ever; that gradients agree is seen in Adam's momentum.
    """
    (two, momentum_two, rot_two, shift_two), (one, momentum_one, rot_one, shift_one) = (learn(tmp_path, kind, changes, n) for n in (2, 1))
    assert two.shape == one.shape and len(one) >= 8
    assert torch.allclose(two[:, 0], one[:, 0], rtol=1e-5, atol=0), float(((two - one) / one)[:, 0].abs().max())
    assert float((momentum_two - momentum_one).norm()) < 5e-3 * float(momentum_one.norm())
    close = ((rot_two - rot_one).flatten(1).abs().amax(1) < 1e-3) & ((shift_two - shift_one).abs().amax(1) < 0.01)
    assert close.float().mean() > 0.97  # a tie between two turns may fall either way


@pytest.mark.slow
def test_command_shares_learning_and_writes_once(tmp_path):
    """Two processes learn, correct and judge; one folder is made, the report and the log are those of one, and who comes to a taken name stops on all."""
    write_simulation(tmp_path / 'data', simulate_stack([make_phantom('ribosome', 16)[2]], 103, snr=3.0, seed=0))
    (tmp_path / 'quick.json').write_text(json.dumps({'epochs': 1.0, 'batch_size': 25, 'width': 32, 'turns': 'four', 'memory': 100}))
    words = ['abinit', str(tmp_path / 'data' / 'particles.star'), '-o', str(tmp_path / 'run'), '--method', 'amortised', '--preset', str(tmp_path / 'quick.json'), '--local-refinement', '--device', 'cpu']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'recon_nb.cli', *words]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    verdict = json.loads((tmp_path / 'run' / 'diagnosis.json').read_text())['verdict']
    assert (told.returncode == 0) == (verdict != 'failed'), told.stderr[-3000:]
    assert told.stdout.count('images are suspects of junk') == 1 and told.stderr.count('shares the learning of networks among 2 processes') == 1
    assert {p.name for p in tmp_path.iterdir()} == {'data', 'run', 'quick.json'}
    assert 'correction 2' in (tmp_path / 'run' / 'log.txt').read_text()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode != 0 and 'is not an empty folder' in again.stderr
