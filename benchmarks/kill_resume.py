"""Kill a training run with SIGKILL at random moments, go on, and compare every bit with a run that was left alone.

    python benchmarks/kill_resume.py --trials 20

A trial is killed once or twice, each time a random moment after a random step; checkpoints are written several times an
epoch, so that kills fall into the writing too. Prints one row per trial: when the process was killed, which checkpoint it went
on from, and whether weights, optimiser moments, random states, latents and losses ended as those of the undisturbed run.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    'model.zdim': 2, 'model.encoder_dim': 64, 'model.decoder_dim': 32, 'model.decoder_layers': 2, 'train.batch_size': 8,
    'train.epochs': 4, 'train.checkpoint_minutes': 0.003, 'train.bf16': False,
}


def train(path, n_particles):
    """Train on a phantom, or go on where a killed process stopped; this runs in the process that is killed."""
    from recon_nb.runs import is_run, make_config
    from recon_nb.simulate import make_phantom, simulate_stack
    from recon_nb.training import train_run

    stack = simulate_stack(make_phantom('ribosome', 16, seed=0), n_particles, snr=1.0, seed=0).stack
    print('ready', flush=True)
    train_run(path, None if is_run(path) else make_config(changes=SETTINGS), stack=stack, device='cpu',
              on_step=lambda epoch, step, losses: print(epoch, step, flush=True))


def start(path, n_particles):
    """Start `train` in a process of its own and wait until it begins; return the process."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root}
    process = subprocess.Popen([sys.executable, __file__, '--train', str(path), '--n-particles', str(n_particles)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if process.stdout.readline() != 'ready\n':
        raise RuntimeError(process.stderr.read())
    return process


def finish(process):
    """Wait for a process; raise with its messages when it failed."""
    _, messages = process.communicate()
    if process.returncode:
        raise RuntimeError(messages)


def kill_after(process, n_steps, delay):
    """Kill a process some time after a number of steps, or when it ends before; return what was killed where, in words."""
    last = 'the start'
    for _ in range(n_steps):
        line = process.stdout.readline()
        if not line:
            break
        last = '{}.{}'.format(*line.split())
    time.sleep(delay)
    process.kill()
    process.communicate()
    return last


def compare(path, reference):
    """Return the names of what differs between two finished runs."""
    import torch

    from recon_nb.runs import open_run, read_log

    a, b = open_run(path), open_run(reference)
    x, y = a.load_checkpoint(), b.load_checkpoint()
    differing = [n for group in ('model', 'optim') for n, t in getattr(y, group).items() if not torch.equal(getattr(x, group)[n], t)]
    differing += [f'latents {e}' for e in b.epochs if not torch.equal(a.load_latents(e).mu, b.load_latents(e).mu)]
    differing += [f'log {n}' for n in ('total', 'recon', 'kl') if read_log(a)[n].tolist() != read_log(b)[n].tolist()]
    differing += ['leftovers'] * bool([p for p in a.path.rglob('.*')]) + ['checkpoints'] * (a.checkpoints != b.checkpoints)
    return differing


def run_trials(folder, n_trials, n_particles=300, seed=0, report=print):
    """Run the reference and `n_trials` killed runs; return the number that ended with other bits."""
    from recon_nb.runs import is_run, open_run

    finish(start(folder / 'reference', n_particles))
    rng, n_wrong = random.Random(seed), 0
    n_steps = SETTINGS['train.epochs'] * -(-n_particles // SETTINGS['train.batch_size'])
    report(f'{"trial":>5}  {"killed after epoch.step":<24} {"went on from":<32} differs')
    for trial in range(n_trials):
        path, moments, origins = folder / f'trial{trial}', [], []
        for _ in range(rng.choice([1, 1, 2])):
            moments.append(kill_after(start(path, n_particles), rng.randrange(n_steps), rng.uniform(0, 0.03)))
            found = open_run(path).checkpoints if is_run(path) else []
            origins.append(f'epoch {found[-1][0]} batch {found[-1][1]}' if found else 'the beginning')
        finish(start(path, n_particles))
        differing = compare(path, folder / 'reference')
        n_wrong += bool(differing)
        report(f'{trial:>5}  {", ".join(moments):<24} {", ".join(origins):<32} {", ".join(differing) or "nothing"}')
    return n_wrong


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=20)
    parser.add_argument('--n-particles', type=int, default=300)
    parser.add_argument('--train', type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.n_particles)
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        with tempfile.TemporaryDirectory() as folder:
            wrong = run_trials(Path(folder), arguments.trials, arguments.n_particles)
        print(f'{arguments.trials - wrong} of {arguments.trials} runs ended with the same bits')
        sys.exit(bool(wrong))
