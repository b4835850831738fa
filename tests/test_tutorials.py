"""The tutorials are protocols with one skeleton, and run on a user's own file when one cell is changed."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from recon_nb.runs import make_config
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts

folder = Path(__file__).parents[1] / 'nbs/tutorials'
names = sorted(path.stem for path in folder.glob('T*.ipynb'))
begin_later = ('T09_in_the_cell',)  # tomograms and coordinates of one's own are named where they are used


def read_cells(name):
    "Return (kind, text) of the cells that hold something."
    return [(cell.cell_type, cell.source) for cell in nbformat.read(folder / f'{name}.ipynb', 4).cells if cell.source.strip()]


def split_steps(name):
    "Return the text of each step by number, prose and code, headings first."
    text = ''.join(f'\n{"" if kind == "markdown" else "<code>"}\n{source}\n' for kind, source in read_cells(name))
    parts = re.split(r'^## ', text, flags=re.MULTILINE)[1:]
    return [part for part in parts if part.startswith('Step ')]


def test_all_are_here():
    assert {name[:3] for name in names} == {f'T{i:02d}' for i in range(14)}


@pytest.mark.parametrize('name', names)
def test_begins_with_goal_inputs_and_cost(name):
    (_, title), (_, opening) = read_cells(name)[:2]
    number = name.partition('_')[0]
    assert re.fullmatch(rf'# {number} .+\n\n> \S.+', title), f'{name}: the first cell is "# {number} title" and "> what it shows", found {title[:80]!r}'
    places = [opening.find(f'**{word}.**') for word in ('Goal', 'Inputs', 'Time and memory')]
    assert min(places) >= 0 and places == sorted(places), f'{name}: the second cell says Goal, Inputs, Time and memory, in this order'
    cost = opening[places[2] :].split('\n\n')[0]
    for word in ('CPU core', 'GB', '`ci`', '`tutorial`', 'GPU', 'measured on one'):
        assert word in cost, f'{name}: time and memory must say something of "{word}"; found {cost!r}'


@pytest.mark.parametrize('name', names)
def test_one_cell_sets_scale_and_data(name):
    cells = read_cells(name)
    setting = [i for i, (kind, source) in enumerate(cells) if kind == 'code' and re.search(r'^scale = ', source, re.MULTILINE)]
    assert len(setting) == 1, f'{name}: one cell holds the scale, found {len(setting)}'
    heading, source = cells[setting[0] - 1][1], cells[setting[0]][1]
    assert heading.startswith('## Step 1. Choose the scale') and 'scale = "ci"  # or "tutorial"' in source
    if name not in begin_later:
        assert re.search(r'^own = None  # or ', source, re.MULTILINE), f'{name}: the cell of the scale also names the user\'s own data, "own = None  # or ..."'
        assert 'step 1' in cells[1][1], f'{name}: "Inputs" says that own data are named in step 1'


@pytest.mark.parametrize('name', names)
def test_steps_say_what_to_see_and_assert_it(name):
    steps = split_steps(name)
    numbers = [int(re.match(r'Step (\d+)\. \S', step)[1]) for step in steps]
    assert numbers == list(range(1, len(steps) + 1)), f'{name}: steps are numbered 1 to n, found {numbers}'
    promising = [step for step in steps if '**You should see**' in step]
    assert len(promising) >= 3, f'{name}: {len(promising)} steps say what you should see'
    for step in promising:
        title = step.splitlines()[0]
        assert '**If not**' in step or '**What to do.**' in step, f'{name}, {title}: what if it is not seen? ("**If not**")'
        assert re.search(r'^\s*assert ', step, re.MULTILINE), f'{name}, {title}: what should be seen is not asserted'
    closing = read_cells(name)[-1][1] + read_cells(name)[-2][1] + steps[-1]
    assert '**Next' in closing or 'Where to go from here' in closing, f'{name}: the end says where to go next'


@pytest.fixture(scope='session')
def own_data(tmp_path_factory):
    "Files of a user: single particles, a tilt series, a run."
    path = tmp_path_factory.mktemp('own data')
    states = make_phantom('ribosome', 24)
    single = write_simulation(path / 'single', simulate_stack(states, 600, snr=1.0, seed=3))
    angles = list_dose_symmetric(48, 16)
    tilts = write_tilts(path / 'tilts', simulate_tilts(make_phantom('ribosome', 16), 60, scheme=TiltScheme(angles, 100 / len(angles)), snr=1.0, seed=3))
    run = run_subspace(path / 'run', make_config(str(single), changes={'model.rank': 4, 'model.manifold': 'linear', 'subspace.test': False, 'subspace.rounds': 0}))
    return {'single': str(single), 'tilts': str(tilts), 'run': str(run.path)}


def make_script(name, **constants):
    "Return the code of a tutorial with constants of its first step replaced."
    code = '\n\n'.join(source for kind, source in read_cells(name) if kind == 'code').replace('%matplotlib', '#')
    for constant, value in constants.items():
        code, n = re.subn(rf'^{constant} = .*$', lambda _: f'{constant} = {value!r}', code, count=1, flags=re.MULTILINE)
        assert n == 1, f'{name} has no constant {constant}'
    return code


@pytest.mark.slow
@pytest.mark.parametrize('name, kind', [('T00_tour', 'single'), ('T01_inputs', 'single'), ('T02_checks', 'single'), ('T03_protocol', 'single'), ('T04_filtering', 'single'), ('T04_filtering', 'run'), ('T06a_explore', 'run'), ('T10_abinitio', 'single'), ('T11_large_data', 'single'), ('T13_extend', 'single'), ('T08_subtomograms', 'tilts')])
def test_runs_on_own_data(name, kind, own_data, tmp_path):
    "What a user does: one cell changed, run all."
    script = tmp_path / f'{name}.py'
    script.write_text(make_script(name, own=own_data[kind]))
    environment = {**os.environ, 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', 'TMPDIR': str(tmp_path)}
    environment.pop('RECON_NB_DATA', None)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
