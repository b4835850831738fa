"""The package keeps the rules of its design; and each rule catches what it is there for.

The rules are functions in `hygiene_rules.py`. The first part applies them to the package, the second to small samples.
"""
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hygiene_rules as rules
import pytest

root = Path(__file__).resolve().parent.parent
modules = {path.stem: path.read_text(encoding='utf-8') for path in sorted((root / 'recon_nb').glob('*.py')) if not path.stem.startswith('_')}
pages = {path.stem: path.read_text(encoding='utf-8') for path in sorted((root / 'nbs').glob('[0-9]*.ipynb'))}
explanations = {path.stem: path.read_text(encoding='utf-8')
                for path in [root / 'nbs/index.ipynb', *sorted((root / 'nbs/tutorials').glob('*.ipynb'))]}
cells = {name: rules.parse_cells(text) for name, text in {**pages, **explanations}.items()}
ranks = rules.rank_modules(pages)

# Pages without a picture, and why.
WITHOUT_FIGURE = {
    'index': 'opens the documentation',
    '90_cli': 'a list of commands; what they draw is shown where it is computed',
}
# Only these modules print.
MAY_PRINT = {'cli'}
# What `import recon_nb.training` and everything below it must not load, since a training node may lack it and a start must be quick.
HEAVY = ['umap', 'numba', 'plotly', 'ipywidgets', 'pandas', 'sklearn', 'skimage', 'matplotlib.pyplot', 'starfile', 'gemmi', 'IPython', 'nbdev']


def report(problems):
    """Fail with one problem a line."""
    if problems:
        pytest.fail(f'{len(problems)} problems\n  ' + '\n  '.join(problems), pytrace=False)


def apply(check, sources):
    """Return the problems of a rule over {name: source}, each with the name in front."""
    return [f'{name}: {problem}' for name, source in sources.items() for problem in check(source)]


# ---------------------------------------------------------------- the package

def test_imports_go_down():
    report([problem for name, source in modules.items() for problem in rules.check_layers(source, name, ranks)])


def list_loaded(statements, names):
    """Run import statements in a new interpreter; return [(statement, loaded name)] in order of first loading."""
    program = ('import json, sys\nfound = []\n'
               f'for statement in {statements!r}:\n    exec(statement)\n'
               f'    found += [(statement, name) for name in {names!r} if name in sys.modules and name not in [n for _, n in found]]\n'
               'sys.stdout.write(json.dumps(found))')
    done = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_training_and_below_import_light():
    light = sorted((name for name in modules if name in ranks and ranks[name] <= (5, 1, 'z')), key=ranks.get)
    loaded = list_loaded([f'import recon_nb.{name}' for name in light], HEAVY)
    report([f'"{statement}" loads {name}; import it inside the functions that use it' for statement, name in loaded])


def test_package_and_command_line_do_not_load_torch():
    names = ['recon_nb'] + ['recon_nb.cli'] * ('cli' in modules)
    report([f'"{statement}" loads {name}' for statement, name in list_loaded([f'import {n}' for n in names], ['torch', *HEAVY])])


def test_one_definition_a_cell_and_short():
    report(apply(rules.check_cell_size, {name: cells[name] for name in pages}))


def test_prose_before_each_definition():
    report(apply(rules.check_prose, {name: cells[name] for name in pages}))


def test_every_public_name_is_used():
    tests = [path.read_text(encoding='utf-8') for folder in ('tests', 'benchmarks') for path in (root / folder).glob('*.py')]
    code = {name: '\n'.join(cell.source for cell in page if cell.kind == 'code') for name, page in cells.items()}
    problems = []
    for name in pages:
        elsewhere = '\n'.join([*tests, *(text for other, text in code.items() if other != name)])
        problems += apply(lambda page: rules.check_used(page, elsewhere), {name: cells[name]})
    report(problems)


def test_every_argument_states_shape_and_unit():
    report(apply(rules.check_arguments, modules))


def test_many_arguments_are_keywords():
    report(apply(rules.check_keyword_only, modules))


def test_every_public_name_has_a_docstring():
    report(apply(rules.check_docstrings, modules))


def test_no_pickle():
    report([problem for name, source in modules.items() for problem in rules.check_pickles(source, name)])


def test_only_the_command_line_prints():
    report(apply(rules.check_prints, {name: source for name, source in modules.items() if name not in MAY_PRINT}))


def test_no_assert_in_the_package():
    report(apply(rules.check_asserts, modules))


def test_no_star_imports():
    report(apply(rules.check_star_imports, modules))
    code = {name: '\n'.join(cell.source for cell in page if cell.kind == 'code') for name, page in cells.items()}
    report(apply(rules.check_star_imports, code))


def test_import_cells_hold_imports_only():
    report(apply(rules.check_import_cells, cells))


def test_every_page_draws():
    report(apply(rules.check_figure, {name: page for name, page in cells.items() if name not in WITHOUT_FIGURE}))


def test_first_cell_is_title_and_subtitle():
    report(apply(rules.check_title, cells))


def test_one_page_one_module():
    report([problem for stem, text in pages.items() for problem in rules.check_module_name(stem, text)])
    report(apply(rules.check_exports_nothing, {name: cells[name] for name in explanations}))
    defined = sorted(re.sub(r'^\d\d[a-z]?_', '', stem) for stem in pages)
    assert defined == sorted(modules), f'pages without module: {set(defined) - set(modules)}; modules without page: {set(modules) - set(defined)}'


def list_texts():
    """Return {name: text} of the files that git tracks or would track, binary files left out."""
    if not (root / '.git').exists():
        pytest.skip('not a git checkout: the list of files comes from git')
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split('\0')
    texts = {}
    for name in filter(None, names):
        data = (root / name).read_bytes() if (root / name).is_file() else b'\0'
        if b'\0' not in data:
            texts[name] = rules.read_prose(name, data.decode('utf-8'))
    return texts


def test_nothing_left_to_do():
    report(apply(rules.check_leftovers, list_texts()))


def test_no_path_of_a_machine():
    samples = {'tests/test_hygiene.py'}  # holds one, below
    report(apply(rules.check_machine_paths, {name: text for name, text in list_texts().items() if name not in samples}))


def read_settings():
    """Return settings.ini as a dict."""
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])


def test_constraints_pin_every_requirement():
    pinned = dict(line.split('==') for line in (root / 'constraints.txt').read_text().splitlines() if line and not line.startswith('#'))
    pinned = {name.lower().replace('_', '-'): version for name, version in pinned.items()}
    wanted = ' '.join(value for key, value in read_settings().items() if key.endswith('requirements')).split()
    names = [re.split(r'[<>=!~]', item)[0].lower().replace('_', '-') for item in wanted]
    report([f'{name} is in settings.ini and not in constraints.txt' for name in names if name not in pinned])
    report([f'{name}=={version}: a local build cannot be had from an index' for name, version in pinned.items() if '+' in version])


def test_setup_supplies_every_dynamic_field(monkeypatch):
    import setuptools
    given = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **fields: given.update(fields))
    exec(compile((root / 'setup.py').read_text(), str(root / 'setup.py'), 'exec'), {'__file__': str(root / 'setup.py'), '__name__': 'setup'})
    project = (root / 'pyproject.toml').read_text()
    dynamic = re.findall(r'"([\w-]+)"', re.search(r'^dynamic = (\[.*?\])', project, re.M | re.S)[1])
    supplied_by = {'dependencies': 'install_requires', 'optional-dependencies': 'extras_require', 'readme': 'long_description',
                   'authors': 'author', 'entry-points': 'entry_points', 'scripts': 'entry_points', 'urls': 'url'}
    report([f'pyproject.toml calls {name} dynamic and setup.py does not give it' for name in dynamic if not given.get(supplied_by.get(name, name))])
    assert given['version'] == read_settings()['version']


# ---------------------------------------------------------------- the rules themselves

def make_notebook(*sources):
    """Return the text of a notebook; sources that start with '#' and a space, or '>' are markdown, the others code."""
    kinds = ['markdown' if source.startswith(('# ', '> ', 'Prose')) else 'code' for source in sources]
    return json.dumps({'cells': [{'cell_type': kind, 'source': source.splitlines(True)} for kind, source in zip(kinds, sources)]})


def on_cells(check):
    """Turn a rule on cells into a rule on the text of a notebook."""
    return lambda text: check(rules.parse_cells(text))


title = '# Title\n\n> subtitle'
sample_ranks = rules.rank_modules(['00_core', '01_fourier', '02_so3', '12_imaging', '20_files', '20a_tomofiles', '21_datasets', '33_models', '40_runs'])
in_layers = lambda module: lambda source: rules.check_layers(source, module, sample_ranks)  # noqa: E731
long_function = '#| export\ndef f():\n' + '    x = 1\n' * 40
medium = '#| export\ndef f():\n' + '    x = 1\n' * 9
long_class = '#| export\nclass A:\n' + '    x = 1\n' * 80

# (rule, a sample that keeps it, a sample that breaks it)
samples = {
    'upwards': (in_layers('fourier'), 'from .core import Batch', 'from .imaging import corrupt'),
    'sideways': (in_layers('so3'), 'import torch', 'from recon_nb.fourier import Lattice'),
    'inside a function': (in_layers('fourier'), 'def f():\n    from .core import x', 'def f():\n    from .imaging import x'),
    'whole package': (in_layers('imaging'), 'from . import core', 'from . import models'),
    'plain import': (in_layers('imaging'), 'import recon_nb.core', 'import recon_nb.models as m'),
    'lettered page, from below': (in_layers('tomofiles'), 'from .files import x', 'from .datasets import x'),
    'lettered page, from above': (in_layers('datasets'), 'from .tomofiles import x', 'from .models import x'),
    'parent of a lettered page': (in_layers('files'), 'from .core import x', 'from .tomofiles import x'),
    'models open no file': (in_layers('models'), 'from .imaging import x', 'from .files import x'),
    'runs know no model': (in_layers('runs'), 'from .files import x', 'from .models import x'),
    'unknown module': (in_layers('models'), 'from .core import x', 'from .plots import x'),
    'docstring of a function': (rules.check_docstrings, 'def f():\n    "Do."', 'def f():\n    pass'),
    'docstring of a method': (rules.check_docstrings, 'class A:\n    "A."\n    def _f(self): pass', 'class A:\n    "A."\n    def f(self): pass'),
    'argument without a comment': (rules.check_arguments, 'def f(\n    x: Tensor,  # (N, 2) px\n): pass', 'def f(x: Tensor): pass'),
    'comment without a shape': (rules.check_arguments, 'def f(\n    x: Tensor,  # (...) px\n): pass', 'def f(\n    x: Tensor,  # the images\n): pass'),
    'number without a unit': (rules.check_arguments, 'def f(\n    voltage: float = 300.0,  # kV\n): pass', 'def f(voltage: float = 300.0): pass'),
    'two arguments on a line': (rules.check_arguments, 'def f(path: Path, flag: bool): pass', 'def f(\n    a: float, b: float,  # px\n): pass'),
    'table of tensors': (rules.check_arguments, 'def f(\n    x: dict[str, Tensor],  # by name\n): pass', 'def f(x: dict[str, Tensor]): pass'),
    'argument without a type': (rules.check_arguments, 'def f(*args, **kwargs): pass', 'def f(\n    a,  # px\n): pass'),
    'field of a dataclass': (rules.check_arguments, '@dataclass\nclass A:\n    a: float  # px', '@dataclass(frozen=True)\nclass A:\n    a: float'),
    'argument of a method': (rules.check_arguments, 'class A:\n    def f(self, n_images: int): pass', 'class A:\n    def f(self, box: int): pass'),
    'comment above': (rules.check_arguments, 'def f(\n    # kV\n    voltage: float,\n): pass', 'def f(\n    voltage: float,\n    # kV\n): pass'),
    'five positional': (rules.check_keyword_only, 'def f(a, b, c, d, *, e): pass', 'def f(a, b, c, d, e): pass'),
    'pickle': (lambda s: rules.check_pickles(s, 'runs'), 'import json', 'import pickle'),
    'pickle from': (lambda s: rules.check_pickles(s, 'files'), 'from pickle import Unpickler', 'from pickle import loads'),
    'pickle.load': (lambda s: rules.check_pickles(s, 'files'), 'pickle.Unpickler(f)', 'pickle.load(f)'),
    'allow_pickle': (lambda s: rules.check_pickles(s, 'runs'), 'np.load(f, allow_pickle=False)', 'np.load(f, allow_pickle=True)'),
    'torch.load': (lambda s: rules.check_pickles(s, 'runs'), 'safetensors.torch.load_file(f)', 'torch.load(f)'),
    'print': (rules.check_prints, 'log.info(1)', 'def f():\n    print(1)'),
    'assert': (rules.check_asserts, 'def f():\n    raise ValueError', 'def f():\n    assert 1'),
    'star import': (rules.check_star_imports, 'from a import b', 'from a import *'),
    'two definitions': (on_cells(rules.check_cell_size), make_notebook('#| export\ndef f(): pass'), make_notebook('#| export\ndef f(): pass\ndef g(): pass')),
    'long function': (on_cells(rules.check_cell_size), make_notebook(long_function[:-10] + '\n\n'), make_notebook(long_function)),
    'long class': (on_cells(rules.check_cell_size), make_notebook(long_class[:-10]), make_notebook(long_class)),
    'long method': (on_cells(rules.check_cell_size), make_notebook('#| export\nclass A:\n    def f(self):\n' + '        x = 1\n' * 39),
                    make_notebook('#| export\nclass A:\n    def f(self):\n' + '        x = 1\n' * 40)),
    'no prose': (on_cells(rules.check_prose), make_notebook(title, 'Prose.', '#| export\ndef f(): pass'), make_notebook(title, '#| export\ndef f(): pass')),
    'four at once': (on_cells(rules.check_prose), make_notebook(title, 'Prose.', *[medium] * 3), make_notebook(title, 'Prose.', *[medium] * 4)),
    'constants between': (on_cells(rules.check_prose), make_notebook(title, 'Prose.', '#| export\nx = 1', 'import a', medium),
                          make_notebook(title, '#| export\nx = 1', 'import a', medium)),
    'no prose after a test': (on_cells(rules.check_prose), make_notebook(title, 'Prose.', medium, 'f()', 'Prose.', medium),
                              make_notebook(title, 'Prose.', medium, 'f()', '#| export\ndef g(): pass')),
    'unused': (on_cells(rules.check_used), make_notebook('#| export\ndef f(): pass', 'f()'), make_notebook('#| export\ndef f(): f()', 'g()')),
    'title': (on_cells(rules.check_title), make_notebook(title), make_notebook(title + '\n\nMore.')),
    'no subtitle': (on_cells(rules.check_title), make_notebook(title + '\n'), make_notebook('# Title')),
    'import cell': (on_cells(rules.check_import_cells), make_notebook('%matplotlib inline\nimport a\nfrom b import c'), make_notebook('import a\nx = 1')),
    'imports for types': (on_cells(rules.check_import_cells), make_notebook('#| export\nfrom a import b\nif TYPE_CHECKING:\n    import c'),
                          make_notebook('#| export\nfrom a import b\nif other:\n    import c')),
    'import in a test': (on_cells(rules.check_import_cells), make_notebook('#| export\ndef f():\n    import umap'), make_notebook('def f():\n    import umap')),
    'no figure': (on_cells(rules.check_figure), make_notebook('plot_fsc(curve)'), make_notebook('#| export\ndef plot_fsc(c): pass')),
    'name of the page': (lambda text: rules.check_module_name('20a_tomofiles', text), make_notebook('#| default_exp tomofiles'), make_notebook('#| default_exp files')),
    'number of the page': (lambda stem: rules.check_module_name(stem, make_notebook('#| default_exp files')), '20_files', 'files'),
    'tutorial that exports': (on_cells(rules.check_exports_nothing), make_notebook('x = 1'), make_notebook('#| export\nx = 1')),
    'note to self': (rules.check_leftovers, 'to do it', '# TO' + 'DO: do it'),
    'machine path': (rules.check_machine_paths, 'see ../work/x and https://a.org/home/b', 'open("/home/me/x")'),
    'machine path in an output': (lambda text: rules.check_machine_paths(rules.read_prose('a.ipynb', text)), make_notebook('Prose tmp/x'),
                                  json.dumps({'cells': [{'cell_type': 'code', 'source': [], 'outputs': [{'text': ['wrote /tmp/x\n']}]}]})),
}


@pytest.mark.parametrize('name', samples)
def test_rule_catches(name):
    check, good, bad = samples[name]
    assert check(good) == [], 'the sample that keeps the rule is refused'
    assert check(bad) != [], 'the sample that breaks the rule passes'


def test_heavy_imports_are_seen():
    assert list_loaded(['import json', 'import json.tool'], ['json', 'json.tool']) == [['import json', 'json'], ['import json.tool', 'json.tool']]


def test_sync_check_catches(tmp_path):
    """A hand-edited module, an orphan module and an unclean notebook are each found, in a copy."""
    import check_sync
    if not pages:
        pytest.skip('no notebook yet')
    check_sync.copy_tree(tmp_path)
    shutil.rmtree(tmp_path / 'nbs/tutorials', ignore_errors=True)
    page = min(pages, key=lambda stem: len(pages[stem]))
    module = tmp_path / f"recon_nb/{re.sub(r'^[0-9]+[a-z]?_', '', page)}.py"
    module.write_text(module.read_text() + '\nx = 1\n')
    (tmp_path / 'recon_nb/orphan.py').write_text('x = 1\n')
    notebook = tmp_path / f'nbs/{page}.ipynb'
    content = json.loads(notebook.read_text())
    content['metadata']['language_info'] = {'name': 'python'}
    notebook.write_text(json.dumps(content, indent=1))
    found = '\n'.join(check_sync.check_clean_and_export(tmp_path))
    assert f'recon_nb/{module.name}: differs' in found
    assert 'recon_nb/orphan.py: no notebook exports it' in found
    assert f'nbs/{page}.ipynb: differs; run nbdev_clean' in found
