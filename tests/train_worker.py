"""Train on a small simulated stack in a process of its own: `python tests/train_worker.py RUN KIND CHANGES STEPS`.

KIND is single, ragged (1 to 3 images a particle), tilts (1 to 5, with dose and angle) or slow; CHANGES are settings as JSON; STEPS receives the losses of every step.
"""
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from recon_nb.core import is_main
from recon_nb.runs import is_run, make_config
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts
from recon_nb.training import train_run

SETTINGS = {
    'model.zdim': 2, 'model.encoder_dim': 32, 'model.decoder_dim': 32, 'model.decoder_layers': 2, 'train.batch_size': 4, 'train.epochs': 2,
    'train.learning_rate': 1e-3, 'train.bf16': False, 'train.n_workers': 0,
}


def make_stack(kind, n=49):
    """Simulate; a ragged stack gives images to particles in turn, and tilts are so fine that the dose matters."""
    if kind == 'tilts':
        stack = simulate_tilts(make_phantom('ribosome', 16, seed=0), n, scheme=TiltScheme(list_dose_symmetric(60, 30), 24.0), snr=1.0, missing=0.3, seed=0).stack
        return dataclasses.replace(stack, pixel_size=3.28, table=None)
    stack = simulate_stack(make_phantom('ribosome', 16, seed=0), n, snr=1.0, seed=0).stack
    if kind != 'ragged':
        return stack
    return dataclasses.replace(stack, particle=torch.repeat_interleave(torch.arange(25), 1 + torch.arange(25) % 3)[:n], table=None)


def main(path, kind, changes, steps):
    """Train, or go on with what is there."""
    losses = []

    def note(epoch, step, values):
        losses.append({'epoch': epoch, 'step': step, **values})
        if kind == 'slow':
            if is_main():  # lines of two processes on one pipe can be torn
                print(epoch, step, flush=True)
            time.sleep(0.05)

    known = is_run(path)
    train_run(path, None if known else make_config(changes={**SETTINGS, **changes}), stack=make_stack(kind), device='cpu', on_step=note,
              changes={k: v for k, v in changes.items() if known})
    if is_main():
        Path(steps).write_text(json.dumps(losses))


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
