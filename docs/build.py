"""Build the documentation site: run the notebooks, turn them into pages, add the pages of prose, let Sphinx write HTML.

    python docs/build.py                        everything, into _docs/
    python docs/build.py --only 10_ctf T00_tour these notebooks and the pages of prose
    python docs/build.py --no-execute           with the outputs that are kept, stale or missing ones included

Nothing in the result asks another host for anything. RECON_NB_DATA, the folder of real data, is used where it is set.
"""
import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))

import nbformat  # noqa: E402
from sphinx.cmd.build import main as sphinx_build  # noqa: E402

from steps.assets import vendor_assets  # noqa: E402
from steps.commands import write_commands  # noqa: E402
from steps.execute import execute_notebooks, list_notebooks, notebooks, read_record  # noqa: E402
from steps.gallery import write_measured, write_modules, write_tutorials  # noqa: E402
from steps.quotes import fill_quotes  # noqa: E402
from steps.pictures import draw_pictures  # noqa: E402
from steps.process import link_notebooks, name_page, process_notebook  # noqa: E402
from steps.symbols import link_prose, list_verbs  # noqa: E402

output = here.parent / '_docs'


def read_options(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=[], metavar='NOTEBOOK', help='build these notebooks and the pages of prose alone')
    parser.add_argument('--no-execute', action='store_true', help='run nothing; take the outputs that are kept')
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='notebooks that run at a time (default: processors, at most 4)')
    parser.add_argument('--strict', action='store_true', help='fail if a notebook failed or Sphinx warned')
    parser.add_argument('--work', type=Path, default=here, help='where pages and scripts are put together (default docs)')
    parser.add_argument('-o', '--output', type=Path, default=output, help='where the HTML goes (default _docs)')
    return parser.parse_args(arguments)


def write_if_changed(path, text):
    """Write a file only if it differs, so that Sphinx reads again what changed and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')


def write_pages(pages):
    """Write the pages of the notebooks; return the files written."""
    files = {}
    for page in pages:
        for index, cell in enumerate(page.notebook.cells):
            cell.id = f'cell-{index}'
        files[f'{page.name}.ipynb'] = nbformat.writes(page.notebook)
    return files


def read_prose(names):
    """Return {file: text} of the pages written for the site, with the package's names linked."""
    files = {}
    for path in sorted((here / 'pages').rglob('*.md')):
        name = str(path.relative_to(here / 'pages'))
        page = name.removesuffix('.md')
        text = fill_quotes(path.read_text(encoding='utf-8'))
        files[name] = link_prose(link_notebooks(text, 'index.ipynb', page, names), page, names)
    changes = (here.parent / 'CHANGELOG.md').read_text(encoding='utf-8')
    files['changelog.md'] = link_prose(changes, 'changelog', names)
    return files


def copy_files(paths, work):
    """Put scripts, pictures and the notebooks themselves where Sphinx finds them."""
    shutil.copytree(here / 'static', work / '_static', dirs_exist_ok=True)
    copies = {here / 'demo.png': work / '_source' / 'demo.png'}
    copies |= {file: work / '_source' / file.relative_to(here / 'pages') for kind in ('png', 'svg') for file in (here / 'pages').rglob(f'*.{kind}')}
    copies |= {path: work / '_extra' / 'notebooks' / path.relative_to(notebooks) for path in paths}
    for file, place in copies.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)


def read_uses(paths, files):
    """Return {page: (title, text)} of the tutorials and the pages of prose, where verbs of the command line are shown."""
    texts = {name_page(path): '\n'.join(cell.source for cell in nbformat.read(path, 4).cells) for path in paths if path.parent.name == 'tutorials'}
    texts |= {name.removesuffix('.md'): text for name, text in files.items() if name.endswith('.md') and name not in ('index.md', 'changelog.md')}
    return {name: (re.search(r'^# (.*)', text, re.M)[1], text) for name, text in texts.items()}


def assemble(paths, records, work):
    """Fill the folder that Sphinx reads; return the pages of the notebooks."""
    names, source = {name_page(path) for path in paths} - {'index'}, work / '_source'
    names |= {f'commands/{verb}' for verb in list_verbs()}
    pages = [process_notebook(path, records.get(path), names) for path in paths if path.stem != 'index']
    prose = read_prose(names)
    files = write_pages(pages) | prose | write_commands(read_uses(paths, prose), names)
    files |= {'tutorials/index.md': write_tutorials(pages, work / '_extra' / '_images_cards'), 'modules/index.md': write_modules(pages), 'measured.md': write_measured(pages, work / '_extra' / '_images_cards')}
    for old in [*source.rglob('*.md'), *source.rglob('*.ipynb')]:
        if str(old.relative_to(source)) not in files:
            old.unlink()
    for name, text in files.items():
        write_if_changed(source / name, text)
    copy_files(paths, work)
    draw_pictures(source / 'pictures')
    return pages


def remove_old_pages(work, built):
    """Delete the HTML of pages that are no longer in the site; Sphinx leaves it."""
    made_by_sphinx = {'genindex', 'search', 'py-modindex'}
    for path in built.rglob('*.html'):
        name = path.relative_to(built)
        page = name.with_suffix('')
        source = [(work / '_source' / page).with_name(page.name + ending) for ending in ('.md', '.ipynb')]
        if '_static' not in name.parts and str(page) not in made_by_sphinx and not any(map(Path.exists, source)) and not (work / '_extra' / name).exists():
            path.unlink()


def run_sphinx(work, target, strict):
    """Write the HTML; return Sphinx's exit status. It is written beside the pages and copied, since myst-nb leaves a folder beside its output."""
    os.environ['RECON_NB_SITE_WORK'] = str(work.resolve())
    options, built = ['-W', '--keep-going'] if strict else [], work / '_site' / 'html'
    status = sphinx_build(['-q', '-b', 'html', '-c', str(here), '-d', str(work / '_doctrees'), *options, str(work / '_source'), str(built)])
    remove_old_pages(work, built)
    if (target / 'searchindex.js').exists():
        shutil.rmtree(target)
    shutil.copytree(built, target, dirs_exist_ok=True)
    return status


def main(arguments=None):
    """Build the site; return 0, or 1 where something failed."""
    options = read_options(arguments)
    start = time.perf_counter()
    paths = list_notebooks(options.only)
    print(f'notebooks: {len(paths)}', flush=True)
    records = {path: read_record(path) for path in paths} if options.no_execute else execute_notebooks(paths, options.jobs)
    print(f'ran, or found as they were, after {time.perf_counter() - start:.0f} s', flush=True)
    pages = assemble(paths, records, options.work)
    missing = vendor_assets(options.work / '_static')
    status = run_sphinx(options.work, options.output, options.strict)
    failed = [page for page in pages if page.error]
    for page in failed:
        print(f'   outputs missing on {page.name}: {page.error.splitlines()[0][:160]}')
    print(f'site: {options.output}/index.html, {len(pages)} notebooks, {time.perf_counter() - start:.0f} s' + (f'; without {", ".join(missing)}' if missing else ''))
    return 1 if status or (options.strict and failed) else 0


if __name__ == '__main__':
    sys.exit(main())
