"""The run folder under kills, damage and concurrent readers."""
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon_nb.core import ConfigError, RunError
from recon_nb.runs import (
    Checkpoint,
    RunConfig,
    append_log,
    config_from_dict,
    config_to_dict,
    create_run,
    join_tree,
    lock_run,
    make_config,
    open_run,
    presets,
    read_log,
    resume_run,
    split_tree,
    update_config,
)

WRITER = """
import sys, torch
from recon_nb.runs import Checkpoint, create_run, make_config, append_log
run = create_run(sys.argv[1], make_config())
print("ready", flush=True)
for epoch in range(1, 100000):
    append_log(run, {"epoch": epoch, "total": 1 / epoch})
    tensors = {"w": torch.full((200_000,), float(epoch))}
    run.save_checkpoint(Checkpoint(epoch, 0, tensors, {"m": tensors["w"]}, {"epoch_again": epoch}), keep_last=3)
"""


@pytest.mark.slow
def test_kill_while_writing_leaves_only_whole_checkpoints(tmp_path):
    rng = random.Random(0)
    for trial in range(4):
        path = tmp_path / str(trial)
        writer = subprocess.Popen([sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.25))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        run = resume_run(path)
        for epoch in run.epochs:
            checkpoint = run.load_checkpoint(epoch)
            assert (checkpoint.model['w'] == epoch).all() and (checkpoint.optim['m'] == epoch).all()
            assert checkpoint.state == {'epoch_again': epoch}
        if run.epochs:
            assert len(read_log(run)['total']) >= run.epochs[-1]
        assert not [p for p in path.rglob('.*')]


def test_readers_never_see_half_a_log(tmp_path):
    run = create_run(tmp_path / 'a', RunConfig())
    for epoch in range(1, 30):
        append_log(run, {'epoch': epoch, 'total': 1 / 3, **({'extra': 1.0} if epoch > 10 else {})})
    log = read_log(run)
    assert log['epoch'].tolist() == list(range(1, 30))
    assert (log['total'] == 1 / 3).all()
    assert torch.tensor(log['extra']).isnan().sum() == 10


def test_damaged_files_are_named(tmp_path):
    run = create_run(tmp_path / 'a', RunConfig())
    folder = run.save_checkpoint(Checkpoint(1, 0, {'w': torch.ones(3)}, {}, {}))
    (folder / 'state.json').write_text('{"epoch": 1')
    with pytest.raises(RunError, match='0001.*Remove it'):
        run.load_checkpoint()
    (run.path / 'config.json').write_text('{}}')
    with pytest.raises(RunError, match='config.json cannot be read'):
        _ = run.config


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(RunError, match='not an empty folder'):
        create_run(tmp_path, RunConfig())
    with pytest.raises(RunError, match='not a run'):
        open_run(tmp_path)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_checkpoints_within_an_epoch_give_way(tmp_path):
    run = create_run(tmp_path / 'a', RunConfig())
    save = lambda epoch, step: run.save_checkpoint(Checkpoint(epoch, step, {}, {}, {}))
    for epoch, step in [(0, 5), (0, 9), (1, 0), (1, 4)]:
        save(epoch, step)
    assert run.checkpoints == [(1, 0), (1, 4)]
    assert run.load_checkpoint().step == 4
    save(2, 0)
    assert run.checkpoints == [(1, 0), (2, 0)]
    assert save(2, 0).name == '0002'  # writing it again changes nothing


def test_presets_are_complete_and_valid():
    """A preset names every field that shapes the result, so that later defaults do not leak into it."""
    free = {'encode_every', 'checkpoint_every', 'checkpoint_minutes', 'keep_last', 'n_workers', 'seed', 'bf16', 'compile', 'optimize_poses'}
    for name, preset in presets.items():
        content = config_to_dict(make_config(preset=name))
        assert set(content['model']) == set(preset['model']), name
        assert set(content['train']) - free == set(preset['train']), name


def test_readers_of_a_config_are_strict_and_helpful():
    with pytest.raises(ConfigError, match='Did you mean "decoder_dim"'):
        update_config(RunConfig(), {'model.decoder_dims': 3})
    with pytest.raises(ConfigError, match='data.box is 4; expected between 8 and 4096'):
        update_config(RunConfig(), {'data.box': 4})
    with pytest.raises(ConfigError, match=r"train.learning_rate is nan"):
        update_config(RunConfig(), {'train.learning_rate': float('nan')})


@settings(max_examples=50, deadline=None)
@given(zdim=st.integers(0, 4096), rate=st.floats(0, 1), box=st.none() | st.integers(8, 4096), in_memory=st.sampled_from(['auto', True, False]))
def test_config_round_trip(zdim, rate, box, in_memory):
    config = update_config(RunConfig(), {'model.zdim': zdim, 'train.learning_rate': rate, 'data.box': box, 'data.in_memory': in_memory})
    assert config_from_dict(config_to_dict(config)) == config


trees = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text('ab', max_size=3) | st.just(torch.arange(3.0)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['x', 'y', 3, 7]), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_trees_round_trip(tree):
    plain, tensors = split_tree(tree, 'root')
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else (
        type(a) is type(b) and (a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict)
        else len(a) == len(b) and all(itertools.starmap(same, zip(a, b))) if isinstance(a, list) else a == b))
    assert same(join_tree(plain, tensors), tree)


def test_no_pickle_on_disk(tmp_path):
    run = create_run(tmp_path / 'a', RunConfig())
    run.save_checkpoint(Checkpoint(1, 0, {'w': torch.ones(3)}, {'m': torch.ones(3)}, {}))
    assert {p.suffix for p in run.path.rglob('*') if p.is_file()} <= {'.json', '.safetensors', '.csv', '.txt', '.npz'}
    assert all(not p.read_bytes().startswith((b'\x80', b'PK')) for p in run.path.rglob('*') if p.is_file())


def test_run_survives_sigkill_during_creation(tmp_path):
    """A folder appears under its name only when it is a run; leftovers of a killed creation go with the next."""
    leftover = tmp_path / f'.a.{os.getpid() + 1}.partial'
    leftover.mkdir()
    (leftover / 'inputs.json').write_text('{}')
    create_run(tmp_path / 'a', RunConfig())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a']
    assert signal.SIGKILL  # the platform has it


def test_run_is_not_gone_on_with_after_its_particle_file_changed(tmp_path):
    """As many rows in another order: every particle would take the latents of another."""
    star = tmp_path / 'a.star'
    star.write_text('1\n2\n')
    config = make_config(str(star))
    create_run(tmp_path / 'run', config)
    resume_run(tmp_path / 'run')
    star.write_text('2\n1\n')
    with pytest.raises(RunError, match='a.star has changed'):
        resume_run(tmp_path / 'run')
    star.write_text('1\n2\n')  # a copy with a new date is the same file
    resume_run(tmp_path / 'run')


def test_one_process_trains_in_a_run(tmp_path):
    run = create_run(tmp_path / 'a', RunConfig())
    program = f'from recon_nb.runs import *\nwith lock_run(open_run({str(run.path)!r})):\n    print("held", flush=True)\n    import time; time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(RunError, match='Another process'), lock_run(run):
            pass
        holder.kill()
    with lock_run(run):
        pass
