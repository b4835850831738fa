"""Caches that are true or rewritten, and epochs through a buffer for any numbers."""
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon_nb.caches import CacheSource, ShuffleBuffer, arrange_storage, describe_cache_inputs, find_fault, name_cache, open_cache, read_cache_header
from recon_nb.core import ConfigError, CTFParams, InputError, Poses
from recon_nb.datasets import ParticleDataset, ParticleStack, StackSource, count_batches, iterate_batches, load_stack, order_epoch
from recon_nb.files import ParticleTable, open_mrc_stack, write_particles, write_stack
from recon_nb.runs import make_config, open_run
from recon_nb.training import load_dataset, train_run

ROOT = Path(__file__).parents[1]


def write_images(folder, n=60, box=16, name='a.mrcs', seed=0):
    """Noise images in a file."""
    write_stack(folder / name, np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32), 2.0)


def make_stack(folder, n=60, box=16, **changes):
    """Single particles whose images are in a file."""
    if not (folder / 'a.mrcs').exists():
        write_images(folder, n, box)
    stack = ParticleStack(images=open_mrc_stack(folder / 'a.mrcs'), poses=Poses.identity(n), ctf=CTFParams.from_values(n, defocus_u=torch.linspace(1e4, 2e4, n)),
                          tilt=None, particle=torch.arange(n), source_row=torch.arange(n), pixel_size=2.0, box=box)
    return dataclasses.replace(stack, **changes)


def write_star(folder, n=60, box=16, turn=0.0, slices=None):
    """A particle file for a.mrcs."""
    generator = np.random.default_rng(0)
    rows = pandas.DataFrame({'stack': 'a.mrcs', 'slice': range(n) if slices is None else slices, 'euler_rot': generator.uniform(0, 90, n) + turn, 'euler_tilt': generator.uniform(0, 90, n),
                             'euler_psi': 0.0, 'shift_x': 0.0, 'shift_y': 0.0, 'defocus_u': 15000.0, 'defocus_v': 15000.0, 'defocus_angle': 0.0, 'phase_shift': 0.0,
                             'voltage': 300.0, 'cs': 2.7, 'amplitude_contrast': 0.1})
    (folder / 'p.star').unlink(missing_ok=True)
    write_particles(folder / 'p.star', ParticleTable(rows, 2.0, box))
    return folder / 'p.star'


# ---------------------------------------------------------------- the buffer

def make_ragged(counts, keep):
    """Particles with the given numbers of images, images interleaved, some particles left out; made in memory."""
    particle = torch.repeat_interleave(3 * torch.arange(len(counts)), torch.tensor(counts))
    particle = particle[torch.randperm(len(particle), generator=torch.Generator().manual_seed(0))]
    images = torch.randn(len(particle), 8, 8, generator=torch.Generator().manual_seed(1))
    stack = ParticleStack(images=images, poses=Poses.identity(len(particle)), ctf=None, tilt=None, particle=particle, source_row=torch.arange(len(particle)), pixel_size=1.0, box=8)
    chosen = [3 * i for i in range(len(counts)) if keep >> i & 1]
    return stack.select(chosen) if chosen else stack


def collect(dataset, rank, **options):
    """The batches of a process."""
    return list(iterate_batches(dataset, rank=rank, **options))


@settings(max_examples=80, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=40), keep=st.integers(0, 2**40 - 1), n_buffer=st.integers(1, 200), chunk=st.integers(1, 12),
       batch=st.integers(1, 9), world=st.integers(1, 4), start=st.integers(0, 3), workers=st.sampled_from([0, 2]), lockstep=st.booleans(), half=st.booleans())
def test_buffer_gives_every_image_once(counts, keep, n_buffer, chunk, batch, world, start, workers, lockstep, half):
    stack = make_ragged(counts, keep)
    dataset = ParticleDataset(stack, in_memory=False, scale=1.0, subtract_background=False)
    dataset.buffer = ShuffleBuffer(dataset, n_buffer, torch.float16 if half else torch.float32)
    dataset.buffer.chunk = min(chunk, n_buffer)
    dataset.buffer.capacity = max(dataset.buffer.chunk, n_buffer - 8 * dataset.buffer.chunk)
    order = order_epoch(dataset, epoch=2, seed=5)
    assert torch.equal(order.sort().values, torch.arange(dataset.n_particles))
    joints = order.split(batch * world)
    options = {'batch_size': batch, 'world_size': world, 'epoch': 2, 'seed': 5, 'start': start, 'n_workers': workers, 'lockstep': lockstep}
    by_rank = [collect(dataset, rank, **options) for rank in range(world)]
    stand_ins = 0
    for step, joint in enumerate(joints[start:]):
        for rank in range(world):
            own = joint[rank::world]
            if rank >= len(joint):
                own = joint[: int(lockstep)]
                stand_ins += int(dataset.counts[own].sum())
            if len(own):
                found = by_rank[rank][step]
                assert torch.equal(found.particle, dataset.particles[own])
                expected = dataset.get_batch(found.particle)
                dataset.source.n_bytes_read -= expected.n_images * dataset.source.image_bytes
                if half:
                    assert torch.equal(found.images, torch.view_as_complex(torch.view_as_real(expected.images).half().float()))
                else:
                    assert torch.equal(found.images, expected.images)
            else:
                assert len(by_rank[rank]) <= step
    left = sum(int(dataset.counts[joint].sum()) for joint in joints[start:])
    assert dataset.source.n_bytes_read == (left + stand_ins) * dataset.source.image_bytes


@pytest.mark.parametrize('world', [1, 3])
def test_memory_of_the_buffer_is_bounded(tmp_path, world, monkeypatch):
    """Places for waiting images, chunks under way and a joint batch: never more than was given."""
    import recon_nb.caches as caches

    dataset = ParticleDataset(make_stack(tmp_path, n=2000, box=8), in_memory=False, scale=1.0, subtract_background=False)
    dataset.buffer = ShuffleBuffer(dataset, 640)
    places, real = [], caches.BufferSource
    monkeypatch.setattr(caches, 'BufferSource', lambda n_slots, *a, **k: places.append(n_slots) or real(n_slots, *a, **k))
    for rank in range(world):
        collect(dataset, rank, batch_size=8, world_size=world, n_workers=2)
    spread = 8 * world if world == 1 else 60  # shares of a chunk are random: each process has its peak at another time
    assert 500 < sum(places) <= 640 - 8 * 10 + spread


def test_epochs_differ_and_chunks_are_whole_runs(tmp_path):
    dataset = ParticleDataset(make_stack(tmp_path, n=500, box=8), in_memory=False, scale=1.0, subtract_background=False)
    dataset.buffer = ShuffleBuffer(dataset, 128)
    plan = dataset.buffer.plan(epoch=0, seed=0)
    assert all((c.diff() == 1).all() for c in plan.chunks)
    other = dataset.buffer.plan(epoch=1, seed=0)
    assert not torch.equal(plan.order, other.order)
    assert torch.equal(plan.order, dataset.buffer.plan(epoch=0, seed=0).order)


# ---------------------------------------------------------------- the cache tells the truth

VARIANTS = {
    'plain': ({}, {}), 'crop': ({'box': 12}, {}), 'dark': ({'sign': -1}, {}), 'premultiplied': ({'premultiplied': True}, {}),
    'background': ({}, {'subtract_background': True}), 'window': ({}, {'window_radius': 0.6}),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_cache_equals_direct_to_half_precision(tmp_path, variant):
    changes, options = VARIANTS[variant]
    source = StackSource(make_stack(tmp_path, **changes), **options)
    cached = open_cache(source, tmp_path / 'caches')
    for index in (torch.arange(60), torch.tensor([5]), torch.tensor([59, 4, 5, 6, 0])):
        for m in (None, 3, source.lattice.n_coefficients):
            direct = source.read(index, m)
            assert ((cached.read(index, m) - direct).abs() <= 2.0**-11 * direct.abs() + 1e-6).all()


def test_every_variant_has_its_own_cache(tmp_path):
    paths = [open_cache(StackSource(make_stack(tmp_path, **changes), **{'scale': 2.0, 'subtract_background': False, **options}), tmp_path / 'caches').path for changes, options in VARIANTS.values()]
    assert len(set(paths)) == len(VARIANTS)


@pytest.mark.parametrize('what', ['size', 'mtime', 'rows', 'ctf', 'another stack'])
def test_stale_cache_is_written_again(tmp_path, what, caplog):
    write_images(tmp_path)
    star = write_star(tmp_path)
    premultiplied = what == 'ctf'
    read = lambda: StackSource(load_stack(star, premultiplied=premultiplied), scale=16.0, subtract_background=False)
    before = open_cache(read(), tmp_path / 'caches')
    if what == 'size':
        write_images(tmp_path, n=61, seed=1)
    elif what == 'mtime':
        write_images(tmp_path, seed=1)
    elif what == 'rows':
        write_star(tmp_path, slices=range(59, -1, -1))
    elif what == 'ctf':
        star.write_text(star.read_text().replace('15000', '16000'))
    else:
        write_images(tmp_path, name='b.mrcs', seed=1)
        star.write_text(star.read_text().replace('a.mrcs', 'b.mrcs'))
    source = read()
    with caplog.at_level(logging.INFO, 'recon_nb.caches'):
        after = open_cache(source, tmp_path / 'caches')
    assert after.path == before.path and 'changed since it was written' in caplog.text and caplog.text.count('writing cache') == 1
    index = torch.arange(60)
    assert (after.read(index) - source.read(index)).abs().max() < 0.1 < (before.read(index) - source.read(index)).abs().max()
    caplog.clear()
    open_cache(source, tmp_path / 'caches')
    assert 'writing' not in caplog.text


def test_new_poses_and_selections_share_a_cache(tmp_path, caplog):
    write_images(tmp_path)
    star = write_star(tmp_path)
    open_cache(StackSource(load_stack(star)), tmp_path / 'caches')
    write_star(tmp_path, turn=30.0)
    stack = load_stack(star).select(torch.arange(0, 60, 7))
    source = StackSource(stack, subtract_background=False)
    with caplog.at_level(logging.INFO, 'recon_nb.caches'):
        cached = open_cache(source, tmp_path / 'caches')
    assert 'writing' not in caplog.text
    direct = source.read(torch.arange(9))
    assert source.scale != read_cache_header(cached.path)['scale']
    assert ((cached.read(torch.arange(9)) - direct).abs() <= 2.0**-10.9 * direct.abs() + 1e-6).all()


def test_unreadable_row_is_told_when_it_is_wanted(tmp_path):
    images = np.random.default_rng(0).normal(size=(60, 16, 16)).astype(np.float32)
    images[20] *= 1e9
    write_stack(tmp_path / 'a.mrcs', images, 2.0)
    with open(tmp_path / 'a.mrcs', 'r+b') as file:
        file.seek(1024 + 7 * 4 * 16**2)
        file.write(np.float32(np.nan).tobytes())
    chosen = [p for p in range(60) if p not in (7, 20)]
    source = StackSource(make_stack(tmp_path).select(chosen))
    cached = open_cache(source, tmp_path / 'caches')
    direct = source.read(torch.arange(58))
    assert ((cached.read(torch.arange(58)) - direct).abs() <= 2.0**-11 * direct.abs() + 1e-6).all()
    whole = StackSource(make_stack(tmp_path), scale=source.scale, subtract_background=source.subtract_background)
    cached = open_cache(whole, tmp_path / 'caches')
    with pytest.raises(InputError, match='Row 7 of the particle file.*NaN'):
        cached.read(torch.tensor([6, 7]))
    with pytest.raises(InputError, match='Row 20 of the particle file.*brighter'):
        cached.read(torch.tensor([20]))


@pytest.mark.parametrize('damage', ['cut short', 'header'])
def test_damaged_cache_is_not_used(tmp_path, damage):
    source = StackSource(make_stack(tmp_path))
    path, inputs = open_cache(source, tmp_path / 'caches').path, describe_cache_inputs(source)
    assert find_fault(path, inputs) is None
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == 'cut short' else b'x' + data[1:])
    assert ('not copied completely' if damage == 'cut short' else 'is no cache') in find_fault(path, inputs)
    index = torch.arange(60)
    assert (open_cache(source, tmp_path / 'caches').read(index) - source.read(index)).abs().max() < 0.1


def test_images_in_memory_need_no_cache(tmp_path):
    with pytest.raises(ConfigError, match='in memory already'):
        open_cache(StackSource(make_stack(tmp_path, images=torch.randn(60, 16, 16))), tmp_path)


def test_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        open_cache(StackSource(make_stack(tmp_path)), tmp_path / 'file')


# ---------------------------------------------------------------- processes

WRITER = '''
import logging, sys, time, torch
sys.path[:0] = [{root!r}, {tests!r}]
import recon_nb.caches as caches
from test_caches import make_stack
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
logging.getLogger("recon_nb").setLevel(logging.INFO)
real = caches.write_fully
def slow(*arguments):
    print("piece", flush=True)
    time.sleep({delay})
    real(*arguments)
caches.write_fully = slow
source = caches.StackSource(make_stack(Path({folder!r})))
cached = caches.open_cache(source, Path({folder!r}) / "caches")
index = torch.arange(60)
print("error", float((cached.read(index) - source.read(index)).abs().max()), flush=True)
'''


def start_writer(folder, delay):
    """A process that opens a cache, slowly."""
    text = WRITER.format(root=str(ROOT), tests=str(ROOT / 'tests'), folder=str(folder), delay=delay)
    return subprocess.Popen([sys.executable, '-c', text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.slow
def test_killed_writer_leaves_nothing_that_is_used(tmp_path):
    source = StackSource(make_stack(tmp_path))
    process = start_writer(tmp_path, 30)
    assert any(line.strip() == 'piece' for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    folder = tmp_path / 'caches'
    left = [p for p in folder.iterdir() if 'partial' in p.name]
    assert len(left) == 1 and not name_cache(folder, source).exists()
    cached = open_cache(source, folder)
    assert not left[0].exists()
    index = torch.arange(60)
    assert (cached.read(index) - source.read(index)).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize('locks', [True, False])
def test_two_writers_at_once(tmp_path, locks, monkeypatch):
    """One of two processes writes and the other waits; without locks both write, and either result is whole."""
    make_stack(tmp_path)
    if locks:
        processes = [start_writer(tmp_path, 0.3) for _ in range(2)]
        texts = [p.communicate(timeout=120) for p in processes]
        assert all(p.returncode == 0 for p in processes), texts
        assert sum(out.count('writing cache') for out, _ in texts) == 1
        assert all(float(re.search(r'error (\S+)', out)[1]) < 0.1 for out, _ in texts)
        return
    import fcntl

    process = start_writer(tmp_path, 0.5)
    assert any(line.strip() == 'piece' for line in process.stdout)

    def refuse(*arguments):
        raise OSError('no locks here')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    source = StackSource(make_stack(tmp_path))
    cached = open_cache(source, tmp_path / 'caches')
    out, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    index = torch.arange(60)
    for one in (cached, CacheSource(cached.path, source)):
        assert (one.read(index) - source.read(index)).abs().max() < 0.1
    assert not [p for p in (tmp_path / 'caches').iterdir() if 'partial' in p.name]


# ---------------------------------------------------------------- training

SMALL = {'model.zdim': 2, 'model.encoder_dim': 16, 'model.decoder_dim': 16, 'model.decoder_layers': 1, 'train.batch_size': 8, 'train.learning_rate': 1e-3, 'train.bf16': False}


def train(folder, name, epochs, **changes):
    """Train on p.star, or go on."""
    new = {**SMALL, 'train.epochs': epochs, **{k.replace('__', '.'): v for k, v in changes.items()}}
    config = make_config(str(folder / 'p.star'), changes=new)
    known = (folder / name).exists()
    return train_run(folder / name, None if known else config, device='cpu', changes={'train.epochs': epochs} if known else {})


@pytest.mark.parametrize('cache', [False, True])
def test_two_epochs_and_two_are_four_through_a_buffer(tmp_path, cache):
    write_images(tmp_path, n=300)
    write_star(tmp_path, n=300)
    changes = {'data__buffer_gb': 70 * 8 * 97 / 1e9 * (0.5 if cache else 1.0), 'data__cache': str(tmp_path / 'caches') if cache else None}
    straight = train(tmp_path, 'straight', 4, **changes)
    assert 64 <= straight.inputs['data']['n_buffer'] < 80
    train(tmp_path, 'parts', 2, **changes)
    parts = train(tmp_path, 'parts', 4)
    a, b = straight.load_checkpoint(), parts.load_checkpoint()
    assert all(torch.equal(t, b.model[n]) for n, t in a.model.items()) and all(torch.equal(t, b.optim[n]) for n, t in a.optim.items())


class Stop(Exception):
    """Leaves the loop."""


def test_resume_within_an_epoch_whatever_memory_there_is(tmp_path):
    """The order is that of the run's beginning, even where all images fit into memory later."""
    write_images(tmp_path, n=300)
    write_star(tmp_path, n=300)
    changes = {'data__buffer_gb': 70 * 8 * 97 / 1e9, 'train__checkpoint_minutes': 1e-9}
    straight = train(tmp_path, 'straight', 2, **changes)

    def leave(epoch, step, losses):
        if (epoch, step) == (1, 20):
            raise Stop

    new = {**SMALL, 'train.epochs': 2, **{k.replace('__', '.'): v for k, v in changes.items()}}
    with pytest.raises(Stop):
        train_run(tmp_path / 'broken', make_config(str(tmp_path / 'p.star'), changes=new), device='cpu', on_step=leave)
    run = open_run(tmp_path / 'broken')
    assert run.checkpoints[-1] == (1, 20)
    train_run(tmp_path / 'broken', device='cpu', changes={'data.in_memory': True})
    a, b = straight.load_checkpoint(), run.load_checkpoint()
    assert a.epoch == b.epoch == 2 and all(torch.equal(t, b.model[n]) for n, t in a.model.items())


def test_run_of_before_keeps_its_order(tmp_path):
    """inputs.json of an older run says nothing of a buffer: there was none."""
    write_images(tmp_path)
    config = make_config(str(write_star(tmp_path)), changes={'data.buffer_gb': 1e-5, 'data.in_memory': False})
    with pytest.raises(ConfigError, match='give it 64 or more'):
        load_dataset(config)
    facts = {'n_images': 60, 'box': 16, 'pixel_size': 2.0, 'scale': 16.0, 'subtract_background': False}
    assert load_dataset(config, facts=facts).buffer is None


def test_half_precision_in_memory(tmp_path):
    stack = make_stack(tmp_path)
    whole = ParticleDataset(stack, in_memory=True)
    for storage, error in (('float16', 2.0**-11), ('bfloat16', 2.0**-8)):
        dataset = arrange_storage(ParticleDataset(stack, in_memory=False), storage=storage, in_memory=True)
        assert dataset.source.values.element_size() == 2
        for a, b in zip(iterate_batches(dataset, 13), iterate_batches(whole, 13), strict=True):
            assert ((a.images - b.images).abs() <= error * b.images.abs() + 1e-6).all()
    assert len(list(iterate_batches(whole, 13))) == count_batches(60, 13)


def test_checking_a_cache_reads_no_pixel(tmp_path):
    """A quarter of a million rows: what a cache depends on is told from headers, and one row more or less is seen."""
    n = 250_000
    stack = make_stack(tmp_path, n=2, box=8)
    take = lambda n: StackSource(dataclasses.replace(stack, images=stack.images.select(np.arange(n) % 2), poses=None, ctf=None, particle=torch.arange(n), source_row=torch.arange(n)),
                                 scale=1.0, subtract_background=False)
    source = take(n)
    inputs = json.loads(json.dumps(describe_cache_inputs(source)))
    assert source.n_bytes_read == 0 and inputs == describe_cache_inputs(take(n)) != describe_cache_inputs(take(n - 1))


@pytest.mark.slow
def test_benchmark_runs_and_reads_every_image_once(tmp_path):
    command = [sys.executable, str(ROOT / 'benchmarks' / 'bench_cache.py'), '--mb', '2', '--box', '16', '--repeats', '1', '--seeds', '1', '--train', '400', '--steps', '2', '-o', str(tmp_path / 'a.csv')]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(tmp_path / 'a.csv').set_index('way')
    assert table.loc[['cache + buffer', 'stack + buffer'], 'bytes read / bytes'].tolist() == [1.0, 1.0]
    assert table.loc['cache + buffer', 'loss'] == pytest.approx(table.loc['memory', 'loss'], rel=0.1)
