"""Learn poses of a small simulated stack in a process of its own: `python tests/abinit_worker.py KIND CHANGES OUT`.

KIND is first (the loop of 42f) or second (the corrections of 42g); CHANGES are settings as JSON; OUT receives the losses of every step, the optimiser's momentum and the poses, as JSON.
"""
import json
import sys
from pathlib import Path

import torch
from recon_nb.amortised import PoseLearner, learn_poses, make_amortised_config, place_all
from recon_nb.core import Poses, is_main, make_generator
from recon_nb.datasets import ParticleDataset
from recon_nb.search import WhitenedImages
from recon_nb.simulate import make_phantom, simulate_stack
from recon_nb.so3 import rotvec_to_matrix
from recon_nb.stages import CorrectionLearner, StageConfig, correct_poses, learn_corrections
from recon_nb.training import join_team

FIRST = {'epochs': 2.0, 'batch_size': 25, 'width': 32, 'n_blocks': 1, 'turns': 'four', 'memory': 100, 'bf16': False, 'learning_rate': 1e-6, 'map_learning_rate': 1e-6}
SECOND = {'epochs': 4.0, 'fade_in': 1.0, 'batch_size': 25, 'width': 32, 'memory': 100, 'bf16': False, 'learning_rate': 1e-6}


def list_momentum(optimizer):
    """Return what Adam remembers of the gradients, which is linear in them."""
    return torch.cat([optimizer.state[p]['exp_avg'].flatten() for group in optimizer.param_groups for p in group['params']])


def learn_first(stack, changes):
    """Return losses, momentum and poses of the loop that learns poses."""
    learner = PoseLearner(WhitenedImages(ParticleDataset(stack)), make_amortised_config(None, {**FIRST, **changes}), seed=3)
    losses = [[step.loss, step.share] for step in learn_poses(learner)]
    return losses, list_momentum(learner.optimizer), place_all(learner)[0]


def learn_second(stack, changes, true):
    """Return losses, momentum and poses of the corrections."""
    wrong = rotvec_to_matrix(0.1 * torch.randn(len(true.rot), 3, generator=make_generator(0, 'wrong'))) @ true.rot
    config, width = StageConfig(**{**SECOND, **changes}), stack.box * stack.pixel_size
    learner = CorrectionLearner(WhitenedImages(ParticleDataset(stack)), Poses(wrong, true.shift / width), config, seed=3)
    losses = [[step.loss, step.turn] for step in learn_corrections(learner)]
    return losses, list_momentum(learner.optimizer), correct_poses(stack, Poses(wrong, true.shift), StageConfig(**{**SECOND, 'epochs': 0.5}), seed=3).poses


def main(kind, changes, out):
    """Learn, and write what one process saw."""
    simulated = simulate_stack([make_phantom('ribosome', 16)[2]], 103, snr=3.0, seed=0)
    with join_team('cpu'):
        losses, momentum, poses = learn_first(simulated.stack, changes) if kind == 'first' else learn_second(simulated.stack, changes, simulated.poses)
        if is_main():
            Path(out).write_text(json.dumps({'losses': losses, 'momentum': momentum.tolist(), 'rot': poses.rot.tolist(), 'shift': poses.shift.tolist()}))


if __name__ == '__main__':
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
