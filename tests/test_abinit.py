"""`recon abinit`: what it writes for every kind of input, what it refuses, and how a training takes its poses."""
import io
import json
import shlex
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from recon_nb import abinit
from recon_nb.abinit import AbInitConfig, Progress, choose_radii, describe_run, find_suspects, read_source, solve_by_search, solve_stack
from recon_nb.amortised import PRESETS
from recon_nb.assemblies import add_junk
from recon_nb.cli import main
from recon_nb.core import InputError, Selection
from recon_nb.datasets import ParticleDataset, load_stack
from recon_nb.diagnosis import Gain
from recon_nb.files import open_stack, read_particles, read_volume, write_particles, write_stack
from recon_nb.fourier import Lattice
from recon_nb.fsc import compute_fsc
from recon_nb.refinement import build_map
from recon_nb.runs import RunFolder
from recon_nb.search import WhitenedImages
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation
from recon_nb.so3 import align_poses
from recon_nb.solver import solve_poses
from recon_nb.volumes import flip_hand

QUICK = {'batch_size': 100, 'n_batches': 20, 'n_hold': 4, 'radius': 6.0, 'step': 25.0, 'final_step': 20.0, 'n_candidates': 2}


@pytest.fixture(scope='module')
def simulated():
    """Return 300 bright images of 20 px with shifts."""
    return simulate_stack([make_phantom('ribosome', 20)[2]], 300, snr=3.0, shift_sigma=15.0, seed=2)


@pytest.fixture(scope='module')
def data(simulated, tmp_path_factory):
    """Return their folder, with a column that is nobody's but the user's."""
    folder = tmp_path_factory.mktemp('abinit') / 'data'
    write_simulation(folder, simulated)
    star = folder / 'particles.star'
    table = read_particles(star)
    block = table.source.table
    source = table.source.replace_block(table.source.particles, block.replace_columns({'rlnMicrographName': [f'mic{i % 7}.mrc' for i in range(len(block))]}))
    write_particles(star, abinit.replace(table, source=source))
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Make the search one short march, whose result is good enough to be written."""
    def search(dataset, config, *, device, report=None):
        return solve_poses(dataset, seed=config.seed, n_starts=1, max_starts=1, report=report, device=device, **{**QUICK, **choose_radii(config, dataset.lattice)})
    monkeypatch.setitem(abinit.methods, 'search', search)


@pytest.fixture
def recon(capsys):
    """Return a function that runs a command line in this process and returns status, output and messages."""
    def run(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.fixture(scope='module')
def solved(data, tmp_path_factory):
    """Return the folder of a run on a selection of the images, particles 100 to 299, with the data inverted by option."""
    run = tmp_path_factory.mktemp('runs') / 'run'
    Selection(range(100, 300), 300, 'all but a hundred').save(run.parent / 'some.json')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(abinit.methods, 'search', lambda dataset, config, **options: solve_poses(dataset, seed=config.seed, n_starts=1, max_starts=1, **QUICK))
        assert main(['abinit', str(data / 'particles.star'), '-o', str(run), '--select', str(run.parent / 'some.json'), '--device', 'cpu', '--cs']) == 0
    return run


# ---------------------------------------------------------------- what a run holds

def test_star_file_keeps_every_column_and_only_poses_change(solved, data):
    before, after = read_particles(data / 'particles.star').source.table, read_particles(solved / 'particles.star').source.table
    assert after.columns == before.columns and len(after) == 200
    poses = [c for c in before.columns if c.startswith(('rlnAngle', 'rlnOrigin'))]
    rest = [c for c in before.columns if c not in poses]
    assert 'rlnMicrographName' in rest and len(poses) == 5
    assert after.read_columns(rest) == before.select(np.arange(100, 300)).read_columns(rest)
    assert after.read_columns(poses) != before.select(np.arange(100, 300)).read_columns(poses)


def test_all_files_tell_of_the_same_images(solved):
    arrays, table = np.load(solved / 'poses.npz'), pd.read_csv(solved / 'particles.csv')
    assert arrays['source_row'].tolist() == list(range(100, 300)) == table['source_row'].tolist() == table['particle'].tolist()
    star, cs = read_particles(solved / 'particles.star').get_poses(), read_particles(solved / 'particles.cs').get_poses()
    for one in (star, cs):
        assert np.allclose(one.rot, arrays['rot'], atol=1e-4) and np.allclose(one.shift, arrays['shift'], atol=1e-3)
    keep, suspects = (Selection.load(solved / 'selections' / f'{name}.json') for name in ('keep', 'suspects'))
    assert len(keep) + len(suspects) == 200 and not set(keep.particles) & set(suspects.particles) and keep.n_total == 300
    assert sorted(suspects.particles) == table['particle'][table['suspect'] == 1].tolist()
    found = json.loads((solved / 'diagnosis.json').read_text())
    assert found['verdict'] in found['words'] and found['n_images'] == 200
    assert found['verdict'] in (solved / 'report.html').read_text()
    assert read_volume(solved / 'map.mrc').pixel_size == pytest.approx(read_volume(solved / 'half1.mrc').pixel_size)


def test_written_map_and_poses_belong_together(solved, simulated):
    stack = load_stack(read_source(solved)['data.particles'], **{name.partition('.')[2]: value for name, value in read_source(solved).items() if name != 'data.particles'})
    from recon_nb.consensus import backproject_stack
    again = backproject_stack(stack).map
    assert float(compute_fsc(again, read_volume(solved / 'map.mrc')).fsc[1:6].min()) > 0.9
    assert stack.n_images == 200


def test_half_maps_on_disk_are_of_even_and_of_odd_rows(solved, data):
    """Noise tells them apart: in the fine shells the map of the even images is like half1.mrc, and that of the odd ones like half2.mrc."""
    stack = load_stack(data / 'particles.star', poses=solved, select=solved.parent / 'some.json')
    images = WhitenedImages(ParticleDataset(stack, window_radius=1.5))
    poses = abinit.Poses(stack.poses.rot, stack.poses.shift / (20 * stack.pixel_size))
    made = [build_map(images, rows, poses[rows], 9.9).make_volume() for rows in (torch.arange(0, 200, 2), torch.arange(1, 200, 2))]
    likeness = [[float(compute_fsc(one, read_volume(solved / f'half{i}.mrc')).fsc[6:10].mean()) for i in (1, 2)] for one in made]
    assert likeness[0][0] > likeness[0][1] + 0.05 and likeness[1][1] > likeness[1][0] + 0.05, likeness


# ---------------------------------------------------------------- training on it

def test_training_takes_the_run_for_its_particles(recon, solved, tmp_path):
    words = '--zdim 1 --start none --encoder-dim 8 --decoder-dim 8 --encoder-layers 1 --decoder-layers 1 --epochs 1 --n-workers 0 --device cpu --no-analysis'.split()
    status, _, messages = recon('train', solved, '-o', tmp_path / 'train', *words)
    assert status == 0, messages
    data = json.loads((tmp_path / 'train' / 'config.json').read_text())['data']
    assert data['poses'] == str(solved / 'poses.npz') and data['select'].endswith('some.json') and data['particles'].endswith('particles.star')
    assert 'poses' in json.loads((tmp_path / 'train' / 'inputs.json').read_text())['files']


def test_training_on_a_run_that_is_not_solved_is_warned(caplog, solved, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(solved, run)
    found = json.loads((run / 'diagnosis.json').read_text())
    (run / 'diagnosis.json').write_text(json.dumps({**found, 'verdict': 'ambiguous', 'words': 'ambiguous: nobody agrees'}))
    assert read_source(solved)['data.poses'] == str(solved / 'poses.npz') and 'is not solved' not in caplog.text
    read_source(run)
    assert f'{run} is not solved: ambiguous: nobody agrees' in caplog.text


@pytest.mark.parametrize('words', [
    ['analyze', 'RUN'], ['volumes', 'RUN', '--kmeans', '2', '-o', 'OUT'], ['landscape', 'RUN'], ['filter', 'RUN', '-o', 'OUT'], ['converge', 'RUN'], ['encode', 'RUN'],
], ids=lambda words: words[0])
def test_verbs_that_need_latents_say_what_the_run_is_for(recon, solved, tmp_path, words):
    status, _, message = recon(*[{'RUN': solved, 'OUT': tmp_path / 'out'}.get(word, word) for word in words])
    assert status == 2 and 'is an ab initio run' in message.splitlines()[-1] and f'recon train {solved} -o NAME' in message, message


def test_star_file_of_a_run_is_read_from_anywhere(recon, solved, data, tmp_path, monkeypatch):
    """The names of its images are the user's own, which lead to the stacks from the folder of his file, not from the run's."""
    monkeypatch.chdir(tmp_path)
    told = describe_run(solved)
    assert json.loads((solved / 'abinit.json').read_text())['datadir'] == str(data) and f'started in {data}' in told
    words = shlex.split(next(line for line in told.splitlines() if 'backproject' in line).partition('recon ')[2].replace('NAME', 'map'))
    assert words[:4] == ['backproject', str(solved / 'particles.star'), '--datadir', str(data)] and words[-2:] == ['-o', 'map']
    status, _, message = recon(*words)
    assert status == 0, message
    assert float(compute_fsc(read_volume(tmp_path / 'map' / 'map.mrc'), read_volume(solved / 'map.mrc')).fsc[1:6].min()) > 0.9
    status, _, message = recon('backproject', solved / 'particles.star', '-o', 'other')
    assert status == 2 and '--datadir' in message.splitlines()[-1]


def test_poses_of_a_part_are_refused_for_the_whole(recon, data, solved):
    status, _, message = recon('backproject', data / 'particles.star', '--poses', solved, '-o', data / 'no')
    assert status == 2 and message.count('\n') == 1 and '100 of 300 images have no pose' in message and '--select' in message


def test_poses_of_a_folder_with_a_selection(recon, data, solved, tmp_path):
    status, _, message = recon('backproject', data / 'particles.star', '--poses', solved, '--select', solved.parent / 'some.json', '-o', tmp_path / 'map')
    assert status == 0, message
    assert float(compute_fsc(read_volume(tmp_path / 'map' / 'map.mrc'), read_volume(solved / 'map.mrc')).fsc[1:6].min()) > 0.9


# ---------------------------------------------------------------- inputs

def test_cs_file_in_both_formats_out(recon, quick, solved, data, tmp_path):
    status, _, message = recon('abinit', solved / 'particles.cs', '-o', tmp_path / 'run', '--datadir', data, '--device', 'cpu')
    assert status == 0, message
    before, after = read_particles(solved / 'particles.cs').source.records, read_particles(tmp_path / 'run' / 'particles.cs').source.records
    assert before.dtype == after.dtype and (before['uid'] == after['uid']).all() and (before['ctf/df1_A'] == after['ctf/df1_A']).all()
    poses = [read_particles(tmp_path / 'run' / f'particles.{kind}').get_poses() for kind in ('star', 'cs')]
    assert torch.allclose(poses[0].rot, poses[1].rot, atol=1e-4) and len(poses[0].rot) == 200
    assert 'are not used' in message


def test_bare_stack_with_a_ctf(recon, quick, data, tmp_path):
    status, _, message = recon('abinit', data / 'particles.mrcs', '--ctf', data / 'particles.star', '-o', tmp_path / 'run', '--device', 'cpu')
    assert status == 0, message
    written = read_particles(tmp_path / 'run' / 'particles.star')
    assert written.has_poses and written.has_ctf and written.n_images == 300


def test_dark_particles_are_said_and_inverted(recon, quick, data, tmp_path):
    table = read_particles(data / 'particles.star')
    write_stack(tmp_path / 'dark.mrcs', [-open_stack(table)[:]], table.pixel_size)
    write_particles(tmp_path / 'dark.star', table, stack='dark.mrcs')
    status, _, message = recon('abinit', tmp_path / 'dark.star', '-o', tmp_path / 'dark', '--device', 'cpu')
    assert 'Particles look dark' in message and '--invert-contrast' in message
    assert 'Particles look dark' in (tmp_path / 'dark' / 'report.html').read_text()
    status, _, message = recon('abinit', tmp_path / 'dark.star', '-o', tmp_path / 'bright', '--invert-contrast', '--device', 'cpu')
    assert 'look dark' not in message
    maps = [read_volume(tmp_path / name / 'map.mrc').data for name in ('dark', 'bright')]
    assert float(maps[0].sum()) < 0 < float(maps[1].sum())
    assert read_source(tmp_path / 'bright')['data.invert_contrast'] is True


def test_images_without_a_ctf(recon, quick, data, tmp_path):
    status, _, message = recon('abinit', data / 'particles.mrcs', '-o', tmp_path / 'run', '--device', 'cpu')
    assert (tmp_path / 'run' / 'map.mrc').is_file() and 'There is no CTF' in message


def test_tilt_series_is_refused(recon, data_dir, tmp_path):
    status, _, message = recon('abinit', data_dir / 'tomo/warp_particleseries/sta_testing_bin8.star', '-o', tmp_path / 'run', '--datadir', data_dir / 'tomo/warp_particleseries')
    assert status == 2 and 'a tilt series' in message.splitlines()[-1] and not (tmp_path / 'run').exists()


def test_nan_is_refused(recon, data, tmp_path):
    table = read_particles(data / 'particles.star')
    content = bytearray((data / 'particles.mrcs').read_bytes())
    place = 1024 + 4 * (7 * 400 + 63)
    content[place : place + 4] = np.float32(np.nan).tobytes()
    (tmp_path / 'bad.mrcs').write_bytes(content)
    write_particles(tmp_path / 'bad.star', table, stack='bad.mrcs')
    status, _, message = recon('abinit', tmp_path / 'bad.star', '-o', tmp_path / 'run', '--device', 'cpu')
    assert status == 2 and 'bad.mrcs' in message.splitlines()[-1] and '7' in message.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('words', 'says'), [
    (['--end-resolution', '1'], 'a search goes from shell 2'),
    (['--start-resolution', '60', '--end-resolution', '90'], 'coarse (large) to fine (small)'),
    (['--starts', '0'], 'abinit.starts is 0'),
    (['--max-box', '4'], 'abinit.max_box is 4'),
    (['--method', 'guess'], 'invalid choice'),
    (['--preset', 'quick'], '--method search has none'),
    (['--method', 'amortised', '--preset', 'quik'], 'quick'),
    (['--method', 'combined', '--local-refinement'], 'refines its poses anyway'),
    (['--method', 'amortised', '--end-resolution', '1'], 'to 1 Å; it goes from coarse (large) to fine (small), and images of 20 px of'),
    (['--poses', 'x.star'], '--poses'),
    (['--box', '400'], 'cannot be made of images of 20 px'),
])
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(recon, data, tmp_path, words, says):
    status, _, message = recon('abinit', data / 'particles.star', '-o', tmp_path / 'run', *words, '--device', 'cpu')
    assert status == 2 and says in message.splitlines()[-1] and not (tmp_path / 'run').exists()


def test_too_few_images(recon, data, tmp_path):
    Selection(range(8), 300, 'a few').save(tmp_path / 'few.json')
    status, _, message = recon('abinit', data / 'particles.star', '-o', tmp_path / 'run', '--select', tmp_path / 'few.json', '--device', 'cpu')
    assert status == 2 and '8 images' in message.splitlines()[-1] and not (tmp_path / 'run').exists()


def test_a_run_is_never_overwritten(recon, data, solved):
    before = (solved / 'poses.npz').read_bytes()
    status, _, message = recon('abinit', data / 'particles.star', '-o', solved)
    assert status == 2 and 'is not an empty folder' in message and (solved / 'poses.npz').read_bytes() == before


# ---------------------------------------------------------------- results

def test_failure_is_written_marked_and_an_error(recon, quick, data, tmp_path, monkeypatch):
    search = abinit.methods['search']

    def fail(dataset, config, **options):
        found = search(dataset, config, **options)
        return abinit.replace(found, diagnosis=abinit.replace(found.diagnosis, gain=Gain(0.1, 0.2)))
    monkeypatch.setitem(abinit.methods, 'search', fail)
    status, out, message = recon('abinit', data / 'particles.star', '-o', tmp_path / 'run', '--device', 'cpu')
    assert status == 2 and out.startswith('failed') and 'can be trusted' in message.splitlines()[-1] and 'recon train' not in out
    assert json.loads((tmp_path / 'run' / 'diagnosis.json').read_text())['verdict'] == 'failed'
    assert 'Ab initio: failed' in (tmp_path / 'run' / 'report.html').read_text() and (tmp_path / 'run' / 'map.mrc').is_file()


def test_the_other_hand_is_the_mirror_image_with_its_poses(quick, simulated):
    config = AbInitConfig(seed=1)
    one, other = (solve_stack(simulated.stack, config, flip_hand=flip) for flip in (False, True))
    assert torch.equal(flip_hand(one.map).data, other.map.data) and torch.equal(one.poses.shift, other.poses.shift)
    between = align_poses(other.poses.rot, one.poses.rot)
    assert between.mirrored and float(between.errors.max()) < 0.1


def test_cropped_images_give_poses_of_the_originals(quick):
    large = simulate_stack([make_phantom('ribosome', 32)[2]], 300, snr=3.0, shift_sigma=15.0, seed=2)
    config = AbInitConfig(max_box=20, seed=0)
    small, full = (solve_stack(large.stack, abinit.replace(config, full_box=flag)) for flag in (False, True))
    assert small.map.box == 20 and full.map.box == 32
    assert small.map.box * small.map.pixel_size == pytest.approx(full.map.box * full.map.pixel_size)
    errors = [align_poses(found.poses.rot, large.poses.rot).median for found in (small, full)]
    assert errors[0] < 8 and errors[1] <= errors[0] + 0.2


def test_search_without_settings_solves_and_says_so(simulated):
    found = solve_stack(simulated.stack, AbInitConfig())
    assert abinit.methods['search'] is solve_by_search
    assert found.diagnosis.verdict == 'solved', found.diagnosis.describe()
    assert align_poses(found.poses.rot, simulated.poses.rot).median < 5


@pytest.mark.parametrize(('method', 'verdicts'), [('amortised', {'failed', 'ambiguous'}), ('combined', {'solved'})])
def test_methods_with_a_network_leave_the_same_folder(recon, data, simulated, solved, tmp_path, method, verdicts):
    (tmp_path / 'tiny.json').write_text(json.dumps({'epochs': 2.0, 'width': 16, 'n_blocks': 1}))
    recon('abinit', data / 'particles.star', '-o', tmp_path / 'run', '--method', method, '--preset', tmp_path / 'tiny.json', '--cs', '--device', 'cpu')
    found = json.loads((tmp_path / 'run' / 'diagnosis.json').read_text())
    assert found['verdict'] in verdicts and found['n_starts'] >= 2, found['words']  # two short lessons agree on nothing; a search does not need them
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {path.name for path in solved.iterdir()}
    if method == 'combined':
        assert align_poses(load_stack(data / 'particles.star', poses=tmp_path / 'run').poses.rot, simulated.poses.rot).median < 5


def test_help_names_the_presets_of_the_network(recon):
    text = ''.join(recon('abinit', '--help')[1].split())  # argparse breaks lines at hyphens too
    assert all(name in text for name in PRESETS)


def test_one_start_is_one_and_the_verdict_says_so(simulated):
    """Its halves agree where it found the molecule; of noise they do not. Nothing else is known of one start, and the words say that."""
    found = solve_stack(simulated.stack, AbInitConfig(starts=1))
    assert (found.diagnosis.verdict, found.diagnosis.n_starts) == ('solved', 1), found.diagnosis.describe()
    assert 'only one start was made' in found.diagnosis.describe() and 'best two' not in found.diagnosis.describe()
    noise = abinit.replace(simulated.stack, images=torch.randn(300, 20, 20, generator=torch.Generator().manual_seed(0)))
    nothing = solve_stack(noise, AbInitConfig(starts=1)).diagnosis
    assert (nothing.verdict, nothing.n_starts) == ('failed', 1) and not nothing.agreement.holds, nothing.describe()


@pytest.mark.parametrize('method', ['search', 'amortised', 'combined'])
def test_every_bar_moves_forward_to_its_end(simulated, tmp_path, method):
    (tmp_path / 'tiny.json').write_text(json.dumps({'epochs': 1.0, 'width': 16, 'n_blocks': 1}))
    told = {}
    config = AbInitConfig(method=method, preset=None if method == 'search' else str(tmp_path / 'tiny.json'), starts=1)
    solve_stack(simulated.stack, config, report=lambda stage, share: told.setdefault(stage, []).append(share))
    network, search = ['network 1, start 1', 'network 1, reading poses'], ['start 1', 'placing', 'judging', 'refining']
    assert list(told) == {'search': search, 'amortised': [*network, 'judging'], 'combined': [*network, *search]}[method]
    for stage, shares in told.items():
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1) and shares[0] > 0, (stage, shares)
    assert len(told.get('refining', [0] * 9)) >= 9  # every round of the halves tells too


def test_bars_show_the_time_left_and_keep_the_time_spent(monkeypatch):
    screen, real = io.StringIO(), abinit.tqdm
    monkeypatch.setattr(abinit, 'tqdm', lambda **options: real(**{**options, 'file': screen, 'disable': False, 'mininterval': 0, 'ncols': 80}))
    progress = Progress()
    for stage, share in (('placing', 0.5), ('placing', 1.0), ('refining', 1.0)):
        time.sleep(0.01)
        progress(stage, share)
    progress.close()
    drawn = screen.getvalue().split('\r')
    assert any(line.startswith('placing:  50 %') and '00:00 < 00:00' in line for line in drawn) and any(line.startswith('refining: 100 %') for line in drawn)
    assert list(progress.seconds) == ['placing', 'refining'] and progress.seconds['placing'] >= 0.01


def test_resolutions_become_radii_of_the_searched_box(simulated):
    lattice = Lattice(20, simulated.stack.pixel_size)
    width = 20 * simulated.stack.pixel_size
    assert choose_radii(AbInitConfig(start_resolution=width / 3, end_resolution=width / 7), lattice) == pytest.approx({'start_radius': 3, 'radius': 7})


def test_suspects_do_not_depend_on_how_much_junk_there_is():
    random = np.random.default_rng(1)
    for n_junk in (0, 100, 400):
        marked = find_suspects(np.concatenate([random.normal(100, 10, 1000), random.normal(20, 8, n_junk)]))
        assert marked[:1000].mean() < 0.03 and (n_junk == 0 or marked[1000:].mean() > 0.97)


def test_images_of_nothing_are_suspects(quick, simulated):
    mixed = add_junk(simulated, 0.25, seed=1)
    found = solve_stack(mixed.stack, AbInitConfig())
    marked, junk = find_suspects(found.score.numpy()), mixed.labels.numpy() < 0
    assert marked[junk].mean() > 0.95 and marked[~junk].mean() < 0.02


def test_poses_that_a_training_refined_are_a_source(data, simulated, tmp_path):
    (tmp_path / 'poses').mkdir()
    for epoch, shift in ((3, simulated.poses.shift), (10, simulated.poses.shift + 1)):
        RunFolder(tmp_path).save_poses(epoch, abinit.Poses(simulated.poses.rot, shift), simulated.stack.source_row)
    stack = load_stack(data / 'particles.star', poses=tmp_path)
    assert torch.allclose(stack.poses.shift, simulated.poses.shift + 1, atol=1e-4) and torch.allclose(stack.poses.rot, simulated.poses.rot, atol=1e-5)


def test_a_folder_without_poses_is_no_source(data):
    with pytest.raises(InputError, match='holds no poses.npz'):
        load_stack(data / 'particles.star', poses=data)
