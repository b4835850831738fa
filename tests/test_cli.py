"""The commands as other programs call them: what they write and print, how they refuse, how they stop."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recon_nb.cli import build_parser, main, verbs
from recon_nb.core import Selection
from recon_nb.files import open_stack, read_particles, read_volume, write_particles, write_stack
from recon_nb.runs import open_run, presets
from recon_nb.volumes import flip_hand

root = Path(__file__).resolve().parent.parent
tiny = '--zdim 2 --start none --encoder-dim 16 --decoder-dim 16 --encoder-layers 2 --decoder-layers 2 --epochs 2 --batch-size 20 --learning-rate 1e-3 --n-workers 0 --device cpu'.split()


class Outcome:
    """What a command left: exit status, standard output, standard error."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def recon(capsys):
    """Return a function that runs a command line in this process."""
    def run(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)
    return run


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Return a folder with 100 simulated particles of 16 px."""
    folder = tmp_path_factory.mktemp('cli') / 'data'
    assert main(['simulate', '-o', str(folder), '--n-particles', '100', '--box', '16', '--snr', '2', '--weights', '1', '1', '2']) == 0
    return folder


@pytest.fixture(scope='module')
def star(data):
    """Return the particle file of the simulation."""
    return data / 'particles.star'


@pytest.fixture(scope='module')
def trained(star, tmp_path_factory):
    """Return the folder of a run of two epochs."""
    run = tmp_path_factory.mktemp('runs') / 'run'
    assert main(['train', str(star), '-o', str(run), '--no-analysis', *tiny]) == 0
    return run


def start(*words):
    """Start a command in a process of its own."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root)}
    return subprocess.Popen([sys.executable, '-m', 'recon_nb.cli', *map(str, words)], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------- help

def test_help_of_every_verb_loads_no_torch():
    program = ('import contextlib, io, json, sys\nfrom recon_nb.cli import main, verbs\n'
               'for words in [["--help"], *[[verb, "--help"] for verb in verbs]]:\n    with contextlib.redirect_stdout(io.StringIO()):\n        assert main(words) == 0, words\n'
               'heavy = [n for n in ("torch", "numpy", "pandas", "matplotlib", "scipy", "fastcore") if n in sys.modules]\n'
               'sys.stdout.write(json.dumps(heavy))')
    done = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_verbs_of_the_contract():
    assert list(verbs) == ['doctor', 'inspect', 'downsample', 'simulate', 'backproject', 'fsc', 'mask', 'abinit', 'subspace', 'train', 'encode', 'volumes', 'analyze', 'traverse', 'explore', 'context', 'place', 'converge', 'filter', 'export', 'landscape', 'occupancy', 'confirm', 'agree', 'replicate', 'demo']


@pytest.mark.parametrize('verb', ['doctor', 'inspect', 'downsample', 'backproject', 'subspace', 'train', 'encode'])
def test_verbs_that_take_particles_say_how_to_read_them(verb):
    text = build_parser(verb, verbs[verb]).format_help()
    for option in ('--datadir', '--pixel-size', '--box', '--invert-contrast', '--select', '--poses', '--ctf', '--passthrough'):
        assert option in text


@pytest.mark.parametrize('verb', ['simulate', 'backproject', 'mask', 'abinit', 'subspace', 'train', 'volumes', 'analyze', 'traverse', 'converge', 'landscape', 'occupancy'])
def test_verbs_that_write_volumes_flip_the_hand(verb):
    assert '--flip-hand' in build_parser(verb, verbs[verb]).format_help()


def test_help_of_train_names_every_setting_and_preset(recon):
    text = recon('train', '--help').out
    for section in ('data', 'model', 'train'):
        for name in vars(getattr(open_config(), section)):
            assert name == 'particles' or f'--{name.replace("_", "-")}' in text
    assert all(preset in text for preset in presets)


def open_config():
    """Return the default settings."""
    from recon_nb.runs import RunConfig
    return RunConfig()


# ---------------------------------------------------------------- particles

def test_inspect_prints_one_strict_json_object(recon, star):
    done = recon('inspect', star, '--json')
    refuse = lambda text: pytest.fail(f'{text} is not strict JSON')
    facts = json.loads(done.out, parse_constant=refuse)
    assert (done.status, done.err) == (0, '')
    assert (facts['n_images'], facts['n_particles'], facts['box'], facts['pixel_size']) == (100, 100, 16, 24.0)
    assert (facts['voltage'], facts['cs'], facts['has_poses'], facts['has_ctf'], facts['has_tilts']) == (300.0, 2.7, True, True, False)
    assert 5000 < facts['defocus_min'] < facts['defocus_max'] < 50000
    assert isinstance(facts['warnings'], list)


def test_inspect_has_the_same_keys_without_poses_and_ctf(recon, star):
    facts = json.loads(recon('inspect', star, '--json').out)
    bare = json.loads(recon('inspect', star.with_suffix('.mrcs'), '--json').out)
    assert set(facts) == set(bare)
    assert (bare['has_poses'], bare['has_ctf'], bare['voltage'], bare['defocus_min']) == (False, False, None, None)
    assert any('no poses' in warning for warning in bare['warnings'])


def test_inspect_in_words(recon, star):
    done = recon('inspect', star)
    assert done.status == 0 and re.search(r'^particles +100$', done.out, re.M) and re.search(r'^defocus +[\d.]+ to [\d.]+ µm$', done.out, re.M)
    assert re.search(r'^pixel size +24 Å$', done.out, re.M) and re.search(r'^poses given +yes$', done.out, re.M)
    assert done.out.splitlines()[-1].startswith(f'Nothing looks wrong. Next: recon doctor {star}')
    bare = recon('inspect', star.with_suffix('.mrcs')).out
    assert 'has_poses' not in bare and re.search(r'^poses given +no$', bare, re.M) and 'Next: the particles have no poses' in bare.splitlines()[-1]


def test_recon_alone_says_where_to_begin(recon):
    done = recon()
    assert (done.status, done.err) == (0, '') and 'where to begin:' in done.out and recon('--help').out == done.out
    assert all(len(re.findall(rf'^  {verb} ', done.out, re.M)) == 1 for verb in verbs)


def test_options_of_reading_reach_the_stack(recon, star, tmp_path):
    Selection((3, 5, 7), 100, 'test').save(tmp_path / 'some.json')
    done = recon('inspect', star, '--json', '--box', 12, '--pixel-size', 12.0, '--invert-contrast', '--select', tmp_path / 'some.json')
    facts = json.loads(done.out)
    assert (facts['n_images'], facts['box'], facts['pixel_size'], facts['inverted']) == (3, 12, 16.0, True)


def test_warnings_are_part_of_inspect_and_go_to_standard_error_elsewhere(recon, star, tmp_path):
    done = recon('inspect', star, '--pixel-size', 12, '--json')
    assert done.err == '' and any('pixel size' in warning for warning in json.loads(done.out)['warnings'])
    done = recon('backproject', star, '-o', tmp_path / 'map', '--pixel-size', 12)
    assert done.status == 0 and re.search(r'^recon backproject: pixel size 12 Å was given', done.err, re.M) and 'pixel size' not in done.out


def test_suspicions_about_the_images_reach_screen_and_log(recon, star, tmp_path):
    done = recon('train', star, '-o', tmp_path / 'run', '--invert-contrast', '--no-analysis', *tiny, '--epochs', 1)
    assert done.status == 0 and 'look dark' in done.err
    assert 'look dark' in (tmp_path / 'run/log.txt').read_text()


def test_stacks_are_found_in_datadir(recon, data, tmp_path):
    moved = tmp_path / 'moved.star'
    moved.write_text((data / 'particles.star').read_text())
    blind = json.loads(recon('inspect', moved, '--json').out)  # what the file says can be read without its images
    assert blind['n_images'] == len(pd.read_csv(data / 'truth.csv')) and blind['background_sd'] is None
    assert any('particles.mrcs' in warning and '--datadir' in warning for warning in blind['warnings'])
    assert recon('backproject', moved, '-o', tmp_path / 'map').status == 2
    seen = json.loads(recon('inspect', moved, '--datadir', data, '--json').out)
    assert seen['background_sd'] > 0 and not any('--datadir' in warning for warning in seen['warnings'])


def test_a_list_of_stacks_with_poses_and_ctf_beside_it(recon, data, star, tmp_path):
    (tmp_path / 'stacks.txt').write_text(f'{data / "particles.mrcs"}\n')
    done = recon('inspect', tmp_path / 'stacks.txt', '--poses', star, '--ctf', star, '--json')
    facts = json.loads(done.out)
    assert (facts['has_poses'], facts['has_ctf'], facts['n_images']) == (True, True, 100)


def test_downsample_writes_stack_and_star(recon, star, tmp_path):
    Selection(tuple(range(10, 20)), 100, 'ten').save(tmp_path / 'ten.json')
    done = recon('downsample', star, '-o', tmp_path / 'small.mrcs', '--box', 12, '--select', tmp_path / 'ten.json')
    table = read_particles(tmp_path / 'small.star')
    stack = open_stack(table)
    assert (done.status, stack.box, len(stack)) == (0, 12, 10)
    assert table.pixel_size == pytest.approx(32.0)
    before = read_particles(star)
    np.testing.assert_allclose(table.rows['shift_x'], before.rows['shift_x'][10:20], atol=1e-4)  # Å survive
    np.testing.assert_allclose(stack[:].mean((1, 2)), open_stack(before)[10:20].mean((1, 2)), atol=1e-4)  # the images are those of the selection


def test_simulate_from_maps(recon, data, tmp_path):
    maps = sorted((data / 'volumes').glob('*.mrc'))[:2]
    done = recon('simulate', '-o', tmp_path / 'new', '--volumes', *maps, '--weights', 1, 3, '--n-particles', 20, '--no-ctf', '--snr', 'inf', '--defocus-from', data / 'particles.star')
    assert done.status == 0
    truth = pd.read_csv(tmp_path / 'new/truth.csv')
    assert truth.name.value_counts().to_dict() == {maps[0].stem: 5, maps[1].stem: 15}
    assert not read_particles(tmp_path / 'new/particles.star').has_ctf


def test_simulate_draws_defoci_of_a_file(recon, data, tmp_path):
    assert recon('simulate', '-o', tmp_path / 'new', '--n-particles', 20, '--box', 16, '--defocus-from', data / 'particles.star').status == 0
    pool = read_particles(data / 'particles.star').rows['defocus_u'].to_numpy()
    drawn = read_particles(tmp_path / 'new/particles.star').rows['defocus_u'].to_numpy()
    assert np.abs(drawn[:, None] - pool).min(1).max() < 0.1


# ---------------------------------------------------------------- maps

def test_backproject_writes_the_five_files(recon, star, tmp_path):
    done = recon('backproject', star, '-o', tmp_path / 'map', '--first', 60)
    assert done.status == 0 and 'FSC = 0.143' in done.out and 'FSC = 0.5' in done.out and '60 images' in done.out
    assert sorted(p.name for p in (tmp_path / 'map').iterdir()) == ['fsc.csv', 'fsc.png', 'half1.mrc', 'half2.mrc', 'map.mrc']
    assert list(pd.read_csv(tmp_path / 'map/fsc.csv').columns) == ['shell', 'frequency', 'resolution', 'fsc']
    volume = read_volume(tmp_path / 'map/map.mrc')
    assert (volume.box, volume.pixel_size) == (16, 24.0)

    assert recon('backproject', star, '-o', tmp_path / 'mirror', '--first', 60, '--flip-hand').status == 0
    mirror = read_volume(tmp_path / 'mirror/map.mrc')
    np.testing.assert_allclose(mirror.data, flip_hand(volume).data, atol=1e-5 * float(volume.data.abs().max()))


def test_fsc_prints_and_writes(recon, data, tmp_path):
    a, b = sorted((data / 'volumes').glob('*.mrc'))[:2]
    assert recon('mask', a, '-o', tmp_path / 'mask.mrc', '--dilation', 30, '--edge', 40).status == 0
    mask = read_volume(tmp_path / 'mask.mrc').data
    assert float(mask.min()) == 0 and float(mask.max()) == 1
    done = recon('fsc', a, b, '--mask', tmp_path / 'mask.mrc', '-o', tmp_path)
    assert done.status == 0 and re.search(r'^[\d.]+ Å at FSC = 0.5', done.out, re.M) and re.search(r'^[\d.]+ Å at FSC = 0.143', done.out, re.M)
    name = f'{a.stem}_{b.stem}_fsc'
    assert list(pd.read_csv(tmp_path / f'{name}.csv').columns)[3:] == ['unmasked', 'masked', 'randomized', 'corrected']
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert recon('fsc', a, b).status == 0 and (a.parent / f'{name}.csv').exists()  # beside the first map by default


# ---------------------------------------------------------------- runs

def test_train_leaves_a_run(trained):
    run = open_run(trained)
    assert run.epochs == [1, 2] and run.load_latents().mu.shape == (100, 2)
    assert run.config.train.learning_rate == 1e-3 and run.config.model.zdim == 2


def test_train_stores_absolute_paths(recon, data, tmp_path, monkeypatch):
    Selection(tuple(range(40)), 100, 'forty').save(tmp_path / 'forty.json')
    monkeypatch.chdir(tmp_path)
    relative = Path(os.path.relpath(data / 'particles.star', tmp_path))
    assert recon('train', relative, '-o', 'run', '--select', 'forty.json', '--no-analysis', *tiny, '--epochs', 1).status == 0
    monkeypatch.chdir(root)
    assert recon('train', '--resume', '-o', tmp_path / 'run', '--epochs', 2, '--no-analysis').status == 0  # from another folder, without PARTICLES
    assert open_run(tmp_path / 'run').epochs == [1, 2] and len(open_run(tmp_path / 'run').load_latents()) == 40


def test_train_analyses_and_homogeneous_gives_a_map(recon, star, tmp_path):
    options = tiny[4:]  # without --zdim and --start
    done = recon('train', star, '-o', tmp_path / 'run', '--homogeneous', *options, '--epochs', 1)
    assert done.status == 0 and 'report.html' in done.out
    assert (tmp_path / 'run/analysis/0001/map.mrc').exists() and (tmp_path / 'run/analysis/0001/report.html').exists()
    assert open_run(tmp_path / 'run').config.model.zdim == 0


def test_preset_gives_way_to_options(recon, star, tmp_path):
    assert recon('train', star, '-o', tmp_path / 'run', '--preset', 'cryodrgn', '--no-analysis', *tiny, '--epochs', 1).status == 0
    config = open_run(tmp_path / 'run').config
    assert (config.preset, config.model.encoder_dim, config.train.learning_rate) == ('cryodrgn', 16, 1e-3)


def test_analyze_writes_tables_volumes_and_report(recon, trained):
    done = recon('analyze', trained, '--kmeans', 4, '--n-points', 3, '--no-umap', '--flip-hand')
    folder = trained / 'analysis/0002'
    assert done.status == 0 and str(folder / 'report.html') in done.out
    assert {'pca.csv', 'report.html', 'kmeans', 'pc1', 'pc2'} <= {p.name for p in folder.iterdir()}
    assert len(list((folder / 'kmeans').glob('vol_*.mrc'))) == 4
    assert recon('analyze', trained, '--epoch', 1, '--kmeans', 2, '--n-points', 2, '--no-umap').status == 0


def test_volumes_at_particles_points_and_centres(recon, trained, tmp_path):
    done = recon('volumes', trained, '-o', tmp_path / 'p', '--particles', 3, 50, 3)
    assert done.status == 0
    mu = open_run(trained).load_latents().mu.numpy()
    z = pd.read_csv(tmp_path / 'p/z.csv')
    np.testing.assert_allclose(z.to_numpy(), mu[[3, 50, 3]], rtol=1e-6)
    first, third = (read_volume(tmp_path / f'p/vol_{i:03d}.mrc') for i in (0, 2))
    assert first.box == 16 and bool((first.data == third.data).all())

    assert recon('volumes', trained, '-o', tmp_path / 'z', '--z-file', tmp_path / 'p/z.csv', '--flip-hand').status == 0
    again = read_volume(tmp_path / 'z/vol_000.mrc')
    np.testing.assert_allclose(again.data, flip_hand(first).data, atol=1e-4 * float(first.data.abs().max()))

    assert recon('volumes', trained, '-o', tmp_path / 'k', '--kmeans', 5, '--box', 12).status == 0
    assert len(list((tmp_path / 'k').glob('vol_*.mrc'))) == 5 and read_volume(tmp_path / 'k/vol_004.mrc').box == 12


def test_traverse_joins_anchors(recon, trained, tmp_path):
    mu = open_run(trained).load_latents().mu.numpy()
    near = np.argsort(((mu - mu[0]) ** 2).sum(1))[:2]
    done = recon('traverse', trained, '--anchors', *near, '-o', tmp_path / 'path', '--mean-neighbors', 9)
    assert done.status == 0
    table = pd.read_csv(tmp_path / 'path/volumes.csv')
    assert table.particle.iloc[0] == near[0] and table.particle.iloc[-1] == near[1] and len(table) == len(list((tmp_path / 'path').glob('*.mrc')))


def test_protocol_in_one_run_folder(recon, trained, star, data, tmp_path):
    filtered = recon('filter', trained, '--method', 'column', '--columns', 'pc1', '--low', 0, '-o', 'upper', '--device', 'cpu')
    assert filtered.status == 0, filtered.err
    upper = Selection.load(trained / 'selections/upper.json')
    assert 0 < len(upper) < 100 and f'{len(upper)} of 100' in filtered.out
    exported = recon('export', trained / 'selections/upper.json', '-o', tmp_path / 'own.star')
    assert exported.status == 0 and read_particles(tmp_path / 'own.star').n_images == len(upper)
    assert recon('export', trained / 'selections/upper.json', '--to', 'cs', '-o', tmp_path / 'own.cs').status == 0

    landscape = recon('landscape', trained, '--k', 6, '--n-clusters', 2, '--device', 'cpu')
    assert landscape.status == 0, landscape.err
    truth = pd.read_csv(data / 'truth.csv')[['particle', 'label']].rename(columns={'label': 'state'})
    truth.to_csv(tmp_path / 'truth.csv', index=False)
    assert recon('agree', trained, tmp_path / 'truth.csv').status == 0
    assert recon('replicate', trained, trained, '--k', 3).status == 0

    confirmed = recon('confirm', trained, '--selection', 'upper', '--device', 'cpu')
    assert confirmed.status == 0 and re.match(r'confirmed|not confirmed|too few particles', confirmed.out), confirmed.err
    page = (trained / 'analysis/0002/report.html').read_text()
    for title in ('upper', 'andscape', 'greement'):
        assert title in page, title


def test_filter_that_removes_nothing_or_everything_says_so(recon, trained, data):
    words = ['filter', trained, '--method', 'column', '--columns', 'pc1', '--device', 'cpu']
    kept = recon(*words, '--low', -1e9, '-o', 'everything')
    assert kept.status == 0 and '100 of 100 particles are kept, 0 removed' in kept.out and 'Nothing is removed' in kept.out, kept.err
    assert f'start RELION in {data}, from where they count' in kept.err and f'--datadir {data}' in kept.err
    outside = recon(*words, '--low', 1e9, '-o', 'none')
    assert outside.status == 2 and 'pc1 at least 1e+09, but pc1 runs from' in outside.err and not (trained / 'selections/none.json').exists()
    none = recon(*words, '--low', -1e9, '--invert', '-o', 'none')
    assert none.status == 0 and '0 of 100 particles are kept' in none.out and 'no star file is written' in none.out and '--clusters' in none.out, none.err
    assert not (trained / 'selections/none.star').exists() and len(Selection.load(trained / 'selections/none.json')) == 0


def test_encode_own_and_other_particles(recon, trained, data, tmp_path):
    before = (trained / 'latents/0002.npz').read_bytes()
    done = recon('encode', trained)
    assert done.status == 0 and (trained / 'latents/0002.npz').read_bytes() == before
    own = pd.read_csv(trained / 'latents/0002.csv')
    assert list(own.columns) == ['particle', 'z0', 'z1', 'logvar0', 'logvar1'] and len(own) == 100

    Selection((5, 8), 100, 'two').save(tmp_path / 'two.json')
    done = recon('encode', trained, data / 'particles.star', '--select', tmp_path / 'two.json', '--name', 'two')
    assert done.status == 0
    other = pd.read_csv(trained / 'latents/two/0002.csv')
    np.testing.assert_allclose(other.to_numpy(), own.iloc[[5, 8]].to_numpy(), atol=1e-4)
    assert (trained / 'latents/two/0002.npz').exists() and (trained / 'latents/0002.npz').read_bytes() == before
    assert recon('encode', trained, data / 'particles.star', '--name', 'two').status == 2  # never over anything


# ---------------------------------------------------------------- refusals: status 2, one line, what and where and what to do

def write_faulty(folder, data):
    """Write particle files, each with one fault; return the folder."""
    folder.mkdir()
    table = read_particles(data / 'particles.star')
    write_stack(folder / 'particles.mrcs', np.asarray(open_stack(table)[:]), 24.0)
    text = (data / 'particles.star').read_text()
    (folder / 'no_voltage.star').write_text(text.replace('_rlnVoltage', '_rlnSomething'))
    (folder / 'no_stack.star').write_text(text.replace('particles.mrcs', 'elsewhere.mrcs'))
    (folder / 'short.star').write_text(text.replace('000100@particles.mrcs', '000101@particles.mrcs').replace(' 100@particles.mrcs', ' 101@particles.mrcs'))
    (folder / 'no_poses.star').write_text(text.replace('_rlnAngleRot', '_rlnSomethingElse'))
    broken = table.rows.copy()
    broken.loc[7, 'euler_tilt'] = np.nan
    write_particles(folder / 'nan.star', type(table)(broken, table.pixel_size, table.box))
    (folder / 'empty.star').write_text('')
    Selection((1, 2), 50, 'of another file').save(folder / 'other.json')
    (folder / 'not.json').write_text('[1, 2]')
    (folder / 'z3.csv').write_text('z0,z1,z2\n0,0,0\n')
    (folder / 'words.csv').write_text('z0,z1\n0,zero\n')
    return folder


@pytest.fixture(scope='module')
def faulty(data, tmp_path_factory):
    """Return a folder of files with faults."""
    return write_faulty(tmp_path_factory.mktemp('faults') / 'faulty', data)


# the command line, with {star}, {run}, {faulty}, {new} to fill in; and words that the message must hold
slips = {
    'unknown verb': ('trian {star}', ['trian', 'train']),
    'verb unlike any': ('xyzzy', ['xyzzy', 'inspect']),
    'unknown option': ('train {star} -o {new} --epoch 3', ['--epoch', '--epochs']),
    'abbreviated option': ('train {star} -o {new} --learning 3', ['--learning']),
    'not a number': ('train {star} -o {new} --epochs five', ['--epochs', 'five']),
    'option where the verb stands': ('--verison', ['verb', '--version']),
    'words for a number': ('train {star} -o {new} --zdim two', ['--zdim', 'two', 'whole number']),
    'option of another program': ('train {star} -o {new} --lr 1e-3', ['--lr', '--learning-rate']),
    'folder for a file': ('train {data} -o {new}', ['data', 'folder', 'particles.star']),
    'pixel of no size': ('inspect {star} --pixel-size 0', ['--pixel-size 0']),
    'pixel of negative size': ('inspect {star} --pixel-size -2', ['--pixel-size -2']),
    'grid of no size': ('backproject {star} -o {new} --pad 0', ['--pad 0', '1 or more']),
    'doctor without a file': ('doctor --mask {faulty}/none.mrc', ['PARTICLES']),
    'no output': ('train {star}', ['-o']),
    'no particles': ('train -o {new}', ['PARTICLES', '--resume']),
    'missing file': ('inspect {faulty}/none.star', ['none.star']),
    'missing file of stacks': ('inspect {faulty}/none.mrcs', ['none.mrcs']),
    'unknown type': ('inspect {faulty}/not.json', ['not.json', '.json']),
    'empty file': ('inspect {faulty}/empty.star', ['empty.star']),
    'no voltage': ('inspect {faulty}/no_voltage.star', ['no_voltage.star', 'rlnVoltage']),
    'no stack': ('backproject {faulty}/no_stack.star -o {new}', ['elsewhere.mrcs', '--datadir']),
    'datadir does not exist': ('inspect {faulty}/no_stack.star --datadir {faulty}/nowhere', ['no such folder', 'nowhere', '--datadir']),
    'row beyond the stack': ('backproject {faulty}/short.star -o {new}', ['short.star', 'row 99', '101']),
    'no poses to backproject': ('backproject {faulty}/particles.mrcs -o {new}', ['particles.mrcs', '--poses']),
    'pose columns missing': ('backproject {faulty}/no_poses.star -o {new}', ['no_poses.star', 'rlnAngleRot']),
    'NaN in a pose': ('backproject {faulty}/nan.star -o {new}', ['nan.star', '7']),
    'no poses to train': ('train {faulty}/particles.mrcs -o {new}', ['particles.mrcs', '--poses']),
    'poses of another file': ('inspect {faulty}/particles.mrcs --poses {faulty}/none.star', ['none.star']),
    'passthrough of a star file': ('inspect {star} --passthrough {faulty}/nan.star', ['--passthrough', '.cs']),
    'selection of another file': ('train {star} -o {new} --select {faulty}/other.json', ['50', '100', 'select']),
    'not a selection': ('inspect {star} --select {faulty}/not.json', ['not.json']),
    'no selection': ('inspect {star} --select {faulty}/none.json', ['none.json']),
    'unknown preset': ('train {star} -o {new} --preset cryodragn', ['cryodragn', 'cryodrgn']),
    'preset with resume': ('train -o {run} --resume --preset cryodrgn', ['--preset']),
    'wrong zdim': ('train {star} -o {new} --zdim -1', ['zdim', '-1']),
    'zdim with homogeneous': ('train {star} -o {new} --homogeneous --zdim 4', ['--zdim', '--homogeneous']),
    'no epochs': ('train {star} -o {new} --epochs 0', ['epochs', '0']),
    'unknown encoding': ('train {star} -o {new} --encoding gausian', ['gausian', 'gaussian']),
    'box larger than the images': ('train {star} -o {new} --box 64', ['64', '16']),
    'unknown device': ('train {star} -o {new} --device tpu', ['tpu']),
    'run exists': ('train {star} -o {run}', ['--resume', '-o']),
    'folder exists': ('train {star} -o {faulty}', ['faulty', '-o']),
    'nothing to resume': ('train -o {new} --resume', ['not a run']),
    'setting that cannot change': ('train -o {run} --resume --zdim 5', ['zdim', '5']),
    'backproject into a folder with files': ('backproject {star} -o {faulty}', ['faulty', '-o']),
    'backproject one particle': ('backproject {star} -o {new} --first 1', ['half']),
    'backproject no particle': ('backproject {star} -o {new} --first 0', ['--first 0', 'no particle']),
    'unknown regularization': ('backproject {star} -o {new} --regularization none', ['none', 'constant']),
    'downsample to more': ('downsample {star} -o {new}.mrcs --box 32', ['32', '16']),
    'downsample to another type': ('downsample {star} -o {new}.tif --box 8', ['.tif', '.mrcs']),
    'downsample over the input': ('downsample {star} -o {data}/particles.mrcs --box 8', ['particles.mrcs', 'input']),
    'simulate over a simulation': ('simulate -o {data}', ['-o']),
    'weights that do not fit': ('simulate -o {new} --weights 1 2', ['2 weights', '3 volumes']),
    'unknown phantom': ('simulate -o {new} --phantom ribosom', ['ribosom', 'ribosome']),
    'models without a grid': ('simulate -o {new} --atoms x.pdb', ['--box', '--pixel-size']),
    'no signal': ('simulate -o {new} --snr 0', ['signal-to-noise']),
    'missing map': ('fsc {faulty}/none.mrc {volume}', ['none.mrc']),
    'a stack for a map': ('fsc {volume} {faulty}/particles.mrcs', ['particles.mrcs']),
    'star for a map': ('mask {star} -o {new}.mrc', ['particles.star']),
    'threshold above the map': ('mask {volume} -o {new}.mrc --threshold 1e9', ['threshold']),
    'not a run': ('analyze {faulty}', ['faulty', 'not a run']),
    'epoch that was not kept': ('analyze {run} --epoch 9', ['9', '1, 2']),
    'volumes of nothing': ('volumes {run} -o {new}', ['--particles', '--z-file', '--kmeans']),
    'volumes of two things': ('volumes {run} -o {new} --kmeans 3 --particles 1', ['--particles', '--z-file', '--kmeans']),
    'too many clusters': ('volumes {run} -o {new} --kmeans 1000', ['1000', '100']),
    'unknown particle': ('volumes {run} -o {new} --particles 100', ['100']),
    'z of another run': ('volumes {run} -o {new} --z-file {faulty}/z3.csv', ['z3.csv', 'z2', '2 latent']),
    'z in words': ('volumes {run} -o {new} --z-file {faulty}/words.csv', ['words.csv']),
    'no z file': ('volumes {run} -o {new} --z-file {faulty}/none.csv', ['none.csv']),
    'volumes into a folder with files': ('volumes {run} -o {faulty} --kmeans 2', ['faulty', '-o']),
    'one anchor': ('traverse {run} --anchors 1 -o {new}', ['two or more anchors']),
    'unknown anchor': ('traverse {run} --anchors 1 500 -o {new}', ['500']),
    'epoch to encode that was not kept': ('encode {run} --epoch 7', ['7', '1, 2']),
    'other particles of another box': ('encode {run} {star} --pixel-size 3.0', ['3', '24', '--pixel-size']),
    'other particles without poses': ('encode {run} {faulty}/particles.mrcs', ['without poses', '--poses']),
    'name that is a path': ('encode {run} {star} --name ../x', ['--name']),
    'filter by a column that is not there': ('filter {run} --method column --columns pc9 --low 0 -o {new}.json', ['pc9', 'pc1']),
    'filter without a range': ('filter {run} --method column --columns pc1 -o {new}.json', ['--low', '--high']),
    'confirm a file that is not there': ('confirm {run} --selection none.json', ['none.json', 'This folder', 'recon filter']),
    'export of what is no selection': ('export {star}', ['particles.star', '.json of a selection', 'recon filter']),
    'selection that is not in the run': ('filter {run} --method column --columns pc1 --low 0 -o {new}.json --within nothing', ['nothing.json', 'recon filter makes one']),
    'threshold below nothing': ('filter {run} --method zscore --threshold -1 -o {new}.json', ['--threshold -1', 'above 0']),
    'outline that is not there': ('filter {run} --method outline --outline {faulty}/none.csv -o {new}.json', ['none.csv: no such file']),
    'clusters beyond the particles': ('filter {run} --k 1000 -o {new}.json', ['1000 clusters', '100']),
    'no anchors': ('traverse {run} -o {new} --anchors', ['--anchors']),
    'anchor of an unknown name': ('traverse {run} -o {new} --anchors foo bar', ['"foo"', 'NAME=PARTICLE']),
    'run that is not there': ('analyze {new}', ['is not a run', 'recon train']),
    'place particles of no tomogram': ('place {run} -o {new}', ['particles.star', '--coordinates']),
    'show particles of no tomogram': ('context {star} --tomogram {faulty}/none.mrc -o {new}', ['particles.star', '--coordinates']),
    'a star file for a model': ('occupancy {run} --model {faulty}/words.csv', ['words.csv', 'PDB or mmCIF']),
    'signal in words': ('simulate -o {new} --snr abc', ['"abc"', 'number']),
    'images of three pixels': ('simulate -o {new} --box 3', ['--box 3', '8 px']),
    'simulated pixels of no size': ('simulate -o {new} --pixel-size 0', ['--pixel-size 0', 'above 0']),
    'voxels of no size': ('fsc {volume} {volume} --pixel-size 0', ['--pixel-size 0', 'above 0']),
    'mask that is cut away': ('mask {volume} -o {new}.mrc --dilation -5', ['-5', 'negative']),
    'export where nothing can be written': ('downsample {star} -o /proc/none.mrcs --box 8', ['/proc/none.mrcs', 'cannot be written']),
    'demo of one particle': ('demo -o {new} --n-particles 1', ['--n-particles 1', '30']),
    'demo without epochs': ('demo -o {new} --epochs 0', ['--epochs 0', '1 epoch']),
    'export of nothing': ('export {faulty}/none.json', ['none.json']),
    'export to another type': ('export {faulty}/other.json --to cs -o {new}.star', ['.cs', '--to']),
    'landscape of two volumes': ('landscape {run} --k 2', ['three', '2']),
    'model that is not there': ('occupancy {run} --model {faulty}/none.pdb', ['none.pdb']),
    'confirm what was not selected': ('confirm {run} --selection nothing', ['nothing', 'selections']),
    'agree with a table without particles': ('agree {data}/truth.csv {faulty}/z3.csv -o {new}', ['z3.csv', 'particle']),
    'agree without a landscape or clusters of a table': ('agree {data}/truth.csv {data}/truth.csv', ['-o']),
    'replicate that is no run': ('replicate {run} {faulty}', ['faulty', 'not a run']),
    'converge over two epochs': ('converge {run}', ['2 epochs', 'three', '--keep-last']),
    'converge at an epoch that was not kept': ('converge {run} --epochs 1 2 9', ['9', '1, 2']),
    'explore what is no run': ('explore {faulty} --no-browser', ['not a run']),
    'explore an epoch that was not kept': ('explore {run} --no-browser --epoch 9', ['9', '1, 2']),
    'demo into a folder with files': ('demo -o {faulty}', ['faulty', '-o']),
}


@pytest.mark.parametrize('name', slips)
def test_slip_is_refused_in_one_line(recon, name, star, data, trained, faulty, tmp_path):
    command, words = slips[name]
    names = {'star': star, 'data': data, 'run': trained, 'faulty': faulty, 'new': tmp_path / 'new', 'volume': sorted((data / 'volumes').glob('*.mrc'))[0]}
    done = recon(*command.format(**names).split())
    assert done.status == 2, (done.out, done.err)
    assert done.err.count('\n') == 1 and done.err.startswith('recon') and ': error: ' in done.err, done.err
    assert 'Traceback' not in done.err and not done.out
    missing = [word for word in words if word not in done.err]
    assert not missing, f'{done.err!r} does not say {missing}'
    assert not (tmp_path / 'new').exists(), 'something was left behind'


def test_debug_shows_the_traceback(star):
    with pytest.raises(Exception, match='no such file|not found|none.star'):
        main(['inspect', str(star.with_name('none.star')), '--debug'])


def test_a_fault_of_the_package_is_told_from_bad_input(recon, monkeypatch):
    def fail(*, out: str):
        raise KeyError('secret')
    monkeypatch.setitem(verbs, 'inspect', fail)
    monkeypatch.setattr('recon_nb.cli.build_parser', lambda verb, function: type('P', (), {'parse': lambda self, words: {'out': '', 'debug': False}})())
    done = recon('inspect')
    assert done.status == 1 and done.err.count('\n') == 1 and 'KeyError' in done.err and '--debug' in done.err


def test_interrupt_outside_training(recon, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr('recon_nb.cli.run_verb', interrupt)
    done = recon('inspect', 'x')
    assert (done.status, done.err) == (130, 'recon inspect: interrupted\n')


@pytest.mark.parametrize('label', ['rlnDefocusU', 'rlnDefocusV', 'rlnDefocusAngle'])
def test_a_ctf_with_a_column_missing_is_not_dropped(star, tmp_path, capsys, label):
    """A run without the CTF would look like any other; the column is named instead."""
    poor = tmp_path / 'poor.star'
    poor.write_text(star.read_text().replace(f'_{label} ', '_mine '))
    assert main(['subspace', str(poor), '--datadir', str(star.parent), '-o', str(tmp_path / 'run')]) == 2
    assert label in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_folder_names_its_particle_files(data, tmp_path, capsys):
    """The file of that name comes first, whatever else is there."""
    (tmp_path / 'particles.star').write_text((data / 'particles.star').read_text())
    (tmp_path / 'old.star').write_text('')
    assert main(['inspect', str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert 0 < told.index('particles.star') < told.index('old.star')


# ---------------------------------------------------------------- processes

@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_training_with_status_0_and_resume_goes_on(star, tmp_path, number):
    run = tmp_path / 'run'
    process = start('train', star, '-o', run, '--no-analysis', *tiny, '--epochs', 100000, '--encode-every', 0, '--keep-last', 1)
    deadline = time.monotonic() + 120
    while not (run / 'log.csv').exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert '--resume' in out and 'Traceback' not in err
    done = open_run(run).checkpoints[-1]
    again = start('train', '--resume', '-o', run, '--no-analysis', '--epochs', done[0] + 1)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert open_run(run).epochs[-1] == done[0] + 1


def test_torchrun_leaves_our_options_alone():
    """torchrun reads the words after our module's name for abbreviations of its own options; an ambiguous one ends it."""
    from torch.distributed.run import get_args_parser

    words = {flag for verb in ('train', 'subspace', 'encode') for action in build_parser(verb, verbs[verb])._actions for flag in action.option_strings}
    refused = set()
    for word in words:
        try:
            get_args_parser().parse_args(['-m', 'recon_nb.cli', 'train', 'x.star', word])
        except SystemExit:
            refused.add(word)
    assert refused == {'--start'} and '--start-from' in words


@pytest.mark.slow
def test_one_process_of_torchrun_analyses(star, tmp_path):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root)}
    words = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'recon_nb.cli']
    safe = ['--start-from' if word == '--start' else word for word in tiny]
    command = ['train', star, '-o', tmp_path / 'run', *safe, '--epochs', 1, '--kmeans', 2]
    done = subprocess.run([sys.executable, *words, *map(str, command)], cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('report.html') == 1
    folder = tmp_path / 'run/analysis/0001'
    assert {'report.html', 'umap.csv', 'pca.csv', 'kmeans'} <= {p.name for p in folder.iterdir()}


@pytest.mark.slow
def test_demo_goes_on_where_it_was(recon, tmp_path):
    options = ['--n-particles', 120, '--epochs', 1, '--device', 'cpu']
    done = recon('demo', '-o', tmp_path / 'demo', *options)
    assert done.status == 0 and re.search(r'^accuracy: [01]\.\d{3}', done.out, re.M)
    report = Path(re.search(r'^report: +(.*)$', done.out, re.M)[1])
    assert report.exists() and (tmp_path / 'demo/overview.png').exists()
    assert recon('demo', '-o', tmp_path / 'demo', *options).out.splitlines()[-1] == done.out.splitlines()[-1]
    assert 'The states were NOT found' in done.out and '--n-particles 4000 --epochs 18' in done.out  # one epoch over 120 images learns nothing


@pytest.mark.parametrize('words, part', [
    (['backproject', '{star}', '-o', '{out}', '--first', '-2'], '--first -2'),
    (['simulate', '-o', '{out}', '--n-particles', '0'], '0 particles'),
    (['simulate', '-o', '{out}', '--n-particles', '-5'], '-5 particles'),
    (['volumes', '{run}', '-o', '{out}', '--kmeans', '2', '--box', '0'], 'A volume of 0 px'),
])
def test_numbers_that_make_no_sense(recon, star, trained, tmp_path, words, part):
    names = {'star': star, 'run': trained, 'out': tmp_path / 'out'}
    done = recon(*[word.format(**names) for word in words])
    assert done.status == 2 and part in done.err, done.err


def test_dark_particles_that_were_inverted_are_not_to_be_inverted(recon, star):
    warned = recon('inspect', star, '--invert-contrast').out
    assert 'look dark' in warned and 'try --no-invert-contrast' in warned
    assert 'look dark' not in recon('inspect', star).out
