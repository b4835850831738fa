"""Epochs for any numbers, reading from disk, and real stacks."""
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon_nb.core import InputError, Poses, Selection
from recon_nb.datasets import ParticleDataset, ParticleStack, StackSource, count_batches, count_rows, inspect_stack, iterate_batches, load_stack, plan_epoch
from recon_nb.files import ParticleTable, open_mrc_stack, write_particles, write_stack


def make_stack(counts, images=None, box=8):
    """Particles with the given numbers of images, images interleaved, particle ids with gaps."""
    particle = torch.repeat_interleave(3 * torch.arange(len(counts)), torch.tensor(counts))
    particle = particle[torch.randperm(len(particle), generator=torch.Generator().manual_seed(0))]
    n = len(particle)
    images = torch.randn(n, box, box, generator=torch.Generator().manual_seed(1)) if images is None else images
    return ParticleStack(images=images, poses=Poses.identity(n), ctf=None, tilt=None, particle=particle, source_row=torch.arange(n), pixel_size=1.0, box=box)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 20), world=st.integers(1, 5), start=st.integers(0, 4), shuffle=st.booleans())
def test_every_particle_once(n, batch, world, start, shuffle):
    dataset = ParticleDataset(make_stack([1] * n), scale=1.0, in_memory=True, subtract_background=False)
    order = dataset.particles[plan_epoch(n, epoch=2, seed=5, shuffle=shuffle)]
    joints = order.split(batch * world)
    assert len(joints) == count_batches(n, batch, world)
    seen = []
    for rank in range(world):
        walk = lambda lockstep: list(iterate_batches(dataset, batch, epoch=2, seed=5, shuffle=shuffle, rank=rank, world_size=world, start=start, lockstep=lockstep))
        seen += [p for b in walk(False) for p in b.particle.tolist()]
        steps = walk(True)
        assert len(steps) == max(0, len(joints) - start)
        for joint, step in zip(joints[start:], steps):
            own = count_rows(len(joint), rank, world)
            assert len(step) == max(own, 1)
            if own:
                assert torch.equal(step.particle, joint[rank::world])
    assert sorted(seen) == sorted(order[start * batch * world :].tolist())


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=12), batch=st.integers(1, 5))
def test_ragged_particles_bring_their_own_images(counts, batch):
    stack = make_stack(counts)
    dataset = ParticleDataset(stack, scale=1.0, in_memory=True, subtract_background=False)
    whole = dataset.source.read(torch.arange(stack.n_images))
    for b in iterate_batches(dataset, batch):
        for row, particle in enumerate(b.particle):
            own = torch.nonzero(stack.particle == particle)[:, 0]
            assert int(b.valid[row].sum()) == len(own)
            assert torch.equal(b.images[row, b.valid[row]], whole[own])
        assert (b.images[~b.valid] == 0).all()
        assert b.poses.rot.isfinite().all()


def test_from_disk_equals_memory_with_any_number_of_threads(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 12, 12)).astype(np.float32)
    write_stack(tmp_path / 'a.mrcs', images, 2.0)
    stack = make_stack([1] * 40, images=open_mrc_stack(tmp_path / 'a.mrcs'), box=12)
    kept, lazy = ParticleDataset(stack, in_memory=True), ParticleDataset(stack, in_memory=False)
    assert kept.scale == lazy.scale and isinstance(lazy.source, StackSource)
    for workers in (0, 1, 3):
        for a, b in zip(iterate_batches(kept, 7), iterate_batches(lazy, 7, n_workers=workers), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.particle, b.particle)


def test_reader_threads_end_with_the_loop(tmp_path):
    import threading

    dataset = ParticleDataset(make_stack([1] * 50), in_memory=False)
    before = threading.active_count()
    walk = iterate_batches(dataset, 2, n_workers=2)
    next(walk)
    walk.close()
    for thread in threading.enumerate():
        if thread.name.startswith('ThreadPoolExecutor'):
            thread.join(5)
    assert threading.active_count() <= before


def test_selection_of_another_input_is_refused(data_dir):
    stack = load_stack(data_dir / 'images' / 'relion_proj_batch.star')
    assert stack.select(Selection((3, 5), stack.n_particles)).particle.tolist() == [3, 5]
    with pytest.raises(InputError, match='made out of 7 particles, but this input has 24'):
        stack.select(Selection((3, 5), 7))


def test_real_stacks_load_crop_and_report(data_dir):
    stack = load_stack(data_dir / 'metadata' / 'relion31.star', datadir=data_dir / 'images', box=64)
    assert (stack.box, round(stack.pixel_size, 3)) == (64, round(2.806 * 4, 3))
    info = inspect_stack(stack)
    assert info['has_ctf'] and info['has_poses'] and info['n_images'] == 5
    assert any('header' in w for w in info['warnings'])
    batch = ParticleDataset(stack).get_batch(stack.particles[:2])
    assert batch.images.shape[:2] == (2, 1) and batch.images.isfinite().all()


def test_real_contrast_is_seen(data_dir):
    """EMPIAR-10076 holds dark particles; inverted they are bright."""
    path = data_dir / 'metadata' / 'empiar_10076_7.star'
    dark = inspect_stack(load_stack(path, datadir=data_dir / 'images', box=80))
    bright = inspect_stack(load_stack(path, datadir=data_dir / 'images', box=80, invert_contrast=True))
    assert dark['contrast_standard_errors'] < -3 and bright['contrast_standard_errors'] > 3


def test_box_larger_than_stored_is_refused(data_dir):
    with pytest.raises(InputError, match='box 128 px cannot be made of images of 64 px'):
        load_stack(data_dir / 'images' / 'rln_proj_64.star', pixel_size=1.0, box=128)


def test_blank_and_repeated_images_are_told(tmp_path):
    images = np.random.default_rng(0).normal(size=(6, 16, 16)).astype(np.float32)
    images[2] = 3.0
    write_stack(tmp_path / 'a.mrcs', images, 2.0)
    rows = pandas.DataFrame({'stack': 'a.mrcs', 'slice': [0, 1, 2, 3, 1, 5], 'particle': range(6)})
    write_particles(tmp_path / 'a.star', ParticleTable(rows, 2.0, 16))
    stack = load_stack(tmp_path / 'a.star')
    warnings = ' '.join(inspect_stack(stack)['warnings'])
    assert '1 of 6 images looked at are blank' in warnings and '1 of 6 rows name an image that an earlier row names' in warnings
    warnings = ' '.join(inspect_stack(stack.select([0, 3, 4]))['warnings'])
    assert 'blank' not in warnings and 'earlier row' not in warnings
