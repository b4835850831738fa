"""What people install: the source distribution, the wheel that is built from it, and what an import costs."""
import configparser
import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
config = configparser.ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def run(*words, cwd):
    """Run this Python; return what it prints."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def list_files():
    """Return what a clone holds: the files under version control, and new ones that are not ignored."""
    found = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True)
    if found.returncode:
        pytest.skip('not a clone')
    return [name for name in found.stdout.splitlines() if (root / name).is_file()]


# ---------------------------------------------------------------- import

def test_import_of_the_package_and_of_the_commands_loads_nothing_heavy(tmp_path):
    program = (f'import json, sys\nsys.path.insert(0, {str(root)!r})\nimport recon_nb, recon_nb.cli\n'
               'sys.stdout.write(json.dumps([recon_nb.__version__, [n for n in ("torch", "numpy", "pandas", "matplotlib", "scipy", "numba", "fastcore") if n in sys.modules]]))')
    assert json.loads(run('-c', program, cwd=tmp_path)) == [settings['version'], []]


# ---------------------------------------------------------------- wheel

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Return the source distribution of the tree as it is, and the wheel that is built from it alone."""
    pytest.importorskip('setuptools')
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for name in list_files():
        if not name.startswith(('nbs/', 'tests/', 'docs/', 'benchmarks/')):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / name).read_bytes())
    build = 'import sys; from setuptools import build_meta; sys.stdout.write("\\n" + getattr(build_meta, sys.argv[1])(sys.argv[2]))'
    sdist = out / run('-c', build, 'build_sdist', out, cwd=source).splitlines()[-1]
    shutil.unpack_archive(sdist, out / 'unpacked')
    wheel = out / run('-c', build, 'build_wheel', out, cwd=next((out / 'unpacked').iterdir())).splitlines()[-1]
    return sdist, wheel


def test_wheel_holds_every_module_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = [name for name in wheel.namelist() if '.dist-info/' not in name]
    assert sorted(names) == sorted(name for name in list_files() if name.startswith('recon_nb/'))


def test_wheel_says_what_settings_say(built):
    with zipfile.ZipFile(built[1]) as wheel:
        text = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if '.dist-info/' in name and not name.endswith('/')}
    facts = email.message_from_string(text['METADATA'])
    assert (facts['Name'].replace('-', '_'), facts['Version'], facts['Requires-Python']) == (settings['lib_name'], settings['version'], '>=' + settings['min_python'])
    split = lambda line: re.match(r'[\w.-]+', line)[0].lower()
    needed = [split(line) for line in facts.get_all('Requires-Dist') if 'extra ==' not in line]
    assert needed == [split(name) for name in settings['requirements'].split()]
    assert set(facts.get_all('Provides-Extra')) == {'dev', 'docs', 'app'}
    assert 'recon = recon_nb.cli:main' in re.sub(r' *= *', ' = ', text['entry_points.txt'])
    assert facts.get_payload().startswith('#')  # the README


@pytest.mark.slow
def test_wheel_alone_answers(built, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path)
    start = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); from recon_nb import cli; assert cli.__file__.startswith({str(tmp_path)!r}); sys.exit(cli.main(sys.argv[1:]))'
    assert run('-c', start, '--version', cwd=tmp_path) == f'recon_nb {settings["version"]}\n'
    assert 'usage: recon explore RUN' in run('-c', start, 'explore', '--help', cwd=tmp_path)  # options are read from the modules in the wheel
    assert run('-c', start, 'simulate', '-o', tmp_path / 'data', '--n-particles', 20, '--box', 16, cwd=tmp_path).startswith('20 images of 16 px')


# ---------------------------------------------------------------- requirements and workflows

def test_run_time_modules_import_run_time_requirements_only():
    names = {'scikit-learn': 'sklearn', 'scikit-image': 'skimage', 'umap-learn': 'umap'}
    needed = {names.get(n, n).replace('-', '_') for n in (re.match(r'[\w.-]+', r)[0] for r in settings['requirements'].split())}
    optional = {'voila', 'tornado', 'jupyter_core', 'ipython', 'IPython', 'anywidget', 'fastcore', 'nbdev'}  # asked for where they are used, with a message; tornado comes with voila
    found = set()
    for path in (root / 'recon_nb').glob('*.py'):
        for match in re.finditer(r'^\s*(?:from|import) ([A-Za-z_]\w*)', path.read_text(encoding='utf-8'), re.M):
            found.add(match[1])
    assert found - needed - optional - set(sys.stdlib_module_names) - {'recon_nb', 'mpl_toolkits', 'torchgen'} == set()


def test_workflows_call_what_is_there():
    targets = set(re.findall(r'^([a-z-]+):', (root / 'Makefile').read_text(), re.M))
    texts = {path.name: path.read_text() for path in (root / '.github/workflows').glob('*.yml')}
    assert set(texts) == {'tests.yml', 'docs.yml', 'release.yml'}
    for name, text in texts.items():
        called = re.findall(r'\bmake (?:PYTHON=\w+ )?([a-z-]+)', text)
        assert set(called) <= targets, name
        assert all((root / path).exists() for path in re.findall(r'\btests/\w+\.py', text)), name
    assert 'make PYTHON=python test' in texts['tests.yml'] and 'exec make test' in (root / '.ci/run').read_text()  # one command everywhere
    assert all('python -m build' in texts[name] for name in ('tests.yml', 'release.yml'))
