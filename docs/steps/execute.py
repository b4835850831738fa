"""Run the notebooks and keep what their cells print and draw.

Only outputs are kept, cell by cell, under a hash of what decides them: the code of the notebook and of every module that it imports,
directly or not. A word changed in the prose runs nothing; a line changed in `fourier` runs every page that stands on it.
"""
import ast
import copy
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

root = Path(__file__).resolve().parents[2]
notebooks = root / 'nbs'
store = root / 'docs' / '_cache' / 'outputs'
skipped_directives = ('notest', 'gpu', 'eval: false')
seconds_a_notebook = 1500
# cells put before and after a notebook's own while it runs for the site
sharp = "%config InlineBackend.figure_formats = ['retina']"
clock = 'import os as _os\nsum(_os.times()[:4])'
# a figure sends later changes as messages; here each says once more what it shows now
settle = '''import sys as _sys
from copy import deepcopy as _deepcopy
for _widget in list(_sys.modules['ipywidgets'].widgets.widget._instances.values()) if 'plotly.basewidget' in _sys.modules else ():
    if isinstance(_widget, _sys.modules['plotly.basewidget'].BaseFigureWidget):
        _widget._widget_data, _widget._widget_layout = _deepcopy(_widget._data), _deepcopy(_widget._layout_obj._props)
'''


def list_notebooks(only=()):
    """Return the paths of all notebooks, or of those whose name is in `only`."""
    paths = [path for path in sorted(notebooks.rglob('*.ipynb')) if not any(part.startswith(('.', '_')) for part in path.relative_to(notebooks).parts)]
    unknown = set(only) - {path.stem for path in paths}
    if unknown:
        raise SystemExit(f'no notebook is called {", ".join(sorted(unknown))}; the names are those of nbs/*.ipynb and nbs/tutorials/*.ipynb without .ipynb')
    return [path for path in paths if not only or path.stem in only]


@cache
def list_imported_modules(source):
    """Return the modules of recon_nb that Python source imports, as `recon_nb.name` or, as nbdev writes it, `.name`, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or '').split('.')[0] == 'recon_nb'):
            parts = ['recon_nb', node.module] if node.level == 1 and node.module else (node.module or 'recon_nb').split('.')
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('recon_nb.')}
    return found


@cache
def trace_module(name):
    """Return {module: source} of a module of recon_nb and of everything below it."""
    traced, waiting = {}, [name]
    while waiting:
        module = waiting.pop()
        path = root / 'recon_nb' / f'{module}.py'
        if module in traced or not path.exists():
            continue
        traced[module] = path.read_text(encoding='utf-8')
        waiting += list_imported_modules(traced[module])
    return traced


def list_code(notebook):
    """Return the source of every code cell."""
    return [cell.source for cell in notebook.cells if cell.cell_type == 'code']


def is_skipped(source):
    """Say whether a cell bears a directive that keeps it from running."""
    head = [line.replace('#|', '').strip().lower() for line in source.splitlines() if line.lstrip().startswith('#|')]
    return any(line.split(':')[0].strip() == 'eval' and line.endswith('false') or line in skipped_directives for line in head)


def hash_notebook(notebook):
    """Return a hash of what decides the outputs of a notebook."""
    code = list_code(notebook)
    plain = '\n'.join('\n'.join(line for line in cell.splitlines() if not line.lstrip().startswith(('%', '!'))) for cell in code)
    modules = {}
    for name in sorted(list_imported_modules(plain)):
        modules |= trace_module(name)
    parts = [sharp, settle + clock, *code, *(modules[name] for name in sorted(modules)), 'with data' if os.environ.get('RECON_NB_DATA') else 'without data']
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:20]


def hide_paths(text):
    """Replace the folders of this machine, and temporary ones, by words."""
    for folder, word in ((os.environ.get('RECON_NB_DATA'), '$RECON_NB_DATA'), (str(root), '.'), (str(Path.home()), '~')):
        text = text.replace(folder, word) if folder and folder != '/' else text
    return re.sub(rf'{re.escape(tempfile.gettempdir())}/tmp[a-z0-9_]{{8}}', 'scratch', text)


def clean_output(output):
    """Return an output as JSON data without machine paths, terminal colours in tracebacks or numbers of executions."""
    output = json.loads(hide_paths(json.dumps(output)))
    return output | ({'execution_count': None} if 'execution_count' in output else {})


def run_notebook(path):
    """Run a copy of a notebook in its own folder and return {seconds, outputs, error}; what ran before an error is kept.

    The seconds are those of the processor, its kernel's children included, so that they say the same on a busy machine; 0 after an error.
    """
    run = nbformat.read(path, 4)
    run.cells = [nbformat.v4.new_code_cell(sharp), *run.cells, nbformat.v4.new_code_cell(settle + clock)]
    for cell in run.cells:
        if cell.cell_type == 'code':
            cell.outputs = []
            if is_skipped(cell.source):
                cell.metadata.tags = ['skip-execution']
    client = NotebookClient(run, timeout=seconds_a_notebook, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}, store_widget_state=True)
    error = ''
    try:
        client.execute()
    except CellExecutionError as problem:
        error = f'{problem.ename}: {problem.evalue}'
    except (CellTimeoutError, DeadKernelError) as problem:
        error = str(problem).splitlines()[0]
    outputs = [[clean_output(output) for output in cell.outputs] for cell in run.cells[1:-1] if cell.cell_type == 'code']
    widgets = json.loads(hide_paths(json.dumps(run.metadata.get('widgets', {}))))
    seconds = 0.0 if error else float(run.cells[-1].outputs[0]['data']['text/plain'])
    return {'seconds': seconds, 'outputs': outputs, 'widgets': widgets, 'error': hide_paths(error)}


def find_record(path):
    """Return the file that keeps the outputs of a notebook."""
    return store / path.relative_to(notebooks).with_suffix('.json')


def read_record(path):
    """Return what is kept of a notebook, with `fresh` saying whether it still holds; None where nothing is kept or the cells have changed in number."""
    file, notebook = find_record(path), nbformat.read(path, 4)
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding='utf-8'))
    record['fresh'] = record['key'] == hash_notebook(notebook)
    return record if len(record['outputs']) == len(list_code(notebook)) else None


def execute_notebook(path):
    """Run a notebook unless what is kept of it still holds, and return the record."""
    record = read_record(path)
    if record and record['fresh'] and not record['error']:
        return record
    key = hash_notebook(nbformat.read(path, 4))
    record = {'key': key, 'fresh': True, **run_notebook(path)}
    file = find_record(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix('.partial')
    partial.write_text(json.dumps(record), encoding='utf-8')
    partial.rename(file)
    print(f'   {path.stem}: {record["seconds"]:.0f} s{", stopped at " + record["error"][:200] if record["error"] else ""}', flush=True)
    return record


def execute_notebooks(paths, jobs=1):
    """Run what has changed, `jobs` at a time, and return {path: record}."""
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.pop('MPLBACKEND', None)  # the notebook's own inline pictures
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(paths, pool.map(execute_notebook, paths)))
