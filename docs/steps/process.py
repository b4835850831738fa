"""Turn a notebook and its outputs into a page: nbdev's processor, definitions in place of exported code, links, plotly figures."""
import ast
import copy
import html
import re
from dataclasses import dataclass

import nbformat
from execnb.nbio import mk_cell, read_nb
from nbdev.processors import Processor, clean_magics, hide_, hide_line, strip_ansi
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

from steps.definitions import describe_cell
from steps.execute import list_imported_modules, notebooks
from steps.symbols import link_prose, list_modules, name_module_page, relative
from steps.widgets import freeze_widget, show_plotly

plotly_type, widget_type = 'application/vnd.plotly.v1+json', 'application/vnd.jupyter.widget-view+json'
notebook_link = re.compile(r'\[([^\]]*)\]\((?!https?:)([^)\s#]+)\.ipynb(#[^)\s]*)?\)')


@dataclass
class Page:
    """A notebook as a page of the site."""

    name: str  # the address without .html: modules/ctf, tutorials/T00_tour
    title: str
    subtitle: str
    module: str  # '' where the notebook exports nothing
    source: str  # the notebook's path below nbs/
    notebook: nbformat.NotebookNode
    seconds: float = 0.0
    error: str = ''


def name_page(path):
    """Return the address of a notebook's page: that of a module loses its number, `modules/ctf`; others stay where they are, `tutorials/T00_tour`."""
    place = path.relative_to(notebooks).with_suffix('')
    module = re.fullmatch(r'\d+[a-z]?_(\w+)', str(place))
    return name_module_page(module[1]) if module else str(place)


class Definitions(Processor):
    """Put the entry of each exported definition in the place of its code, and take exported imports away; other exported code stays."""

    def __init__(self, module, page, pages):
        self.module, self.page, self.pages, self.nb = module, page, pages, None

    def process(self, notebook):
        """Change the cells of a notebook."""
        cells = []
        for cell in notebook.cells:
            if cell.cell_type != 'code' or 'export' not in cell.directives_:
                cells.append(cell)
                continue
            entry = describe_cell(cell.source, self.module, self.page, self.pages)
            if entry:
                new = mk_cell(entry, 'markdown')
                new.directives_, new.is_entry = {}, True
                cells.append(new)
            elif not is_import(cell.source):
                cells.append(cell)
        notebook.cells = cells


def is_import(source):
    """Say whether code is imports alone."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    guarded = [node.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING' else [node] for node in body]
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for group in guarded for node in group)


def find_module(notebook):
    """Return the module that a notebook exports, '' if none."""
    for cell in notebook.cells:
        if cell.cell_type == 'code' and 'default_exp' in cell.directives_:
            return cell.directives_['default_exp'][0]
    return ''


def link_notebooks(markdown, source, page, pages):
    """Turn links to notebooks into links to their pages; a page that is not in the site leaves its words."""
    def link(match):
        path = (notebooks / source).parent / (match[2] + '.ipynb')
        target = name_page(path.resolve()) if path.exists() else None
        return f'<a href="{relative(page, target)}{match[3] or ""}">{match[1]}</a>' if target in pages else match[1]

    return notebook_link.sub(link, markdown)


def is_progress(output):
    """Say whether an output is a progress bar, which means nothing once the cell is done."""
    data = output.get('data', {})
    return widget_type in data and re.search(r'\d+ ?%\|', ''.join(data.get('text/plain', ''))) is not None


def translate_output(output, widgets):
    """Return an output that a page without a kernel can show."""
    output, data = dict(output), output.get('data', {})
    if output['output_type'] == 'execute_result':
        output['execution_count'] = None
    if plotly_type in data:
        return {**output, 'data': {'text/html': show_plotly(data[plotly_type])}}
    if widget_type in data:
        frozen = freeze_widget(data[widget_type], widgets)
        plain = {kind: value for kind, value in data.items() if kind != widget_type}
        return {**output, 'data': {'text/html': frozen} if frozen else plain}
    return output


def write_header(page, module, source, seconds, pages):
    """Return the line below a title: what to import, what the module stands on, the notebook to download."""
    parts = []
    if module:
        below = [name for name in sorted(list_imported_modules(list_modules().get(module, ''))) if name_module_page(name) in pages]
        parts.append(f'module <code>recon_nb.{module}</code>')
        if below:
            parts.append('builds on ' + ', '.join(f'<a href="{relative(page, name_module_page(name))}">{name}</a>' for name in below))
    parts.append(f'<a href="{"../" * page.count("/")}notebooks/{source}" download>notebook</a>')
    if seconds:
        parts.append(f'takes {max(seconds, 1):.0f} s of one processor')
    return f'<p class="page-line">{" · ".join(parts)}</p>'


def list_pictures(notebook):
    """Return the PNG pictures of a page, base64, in their order."""
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    return [output['data']['image/png'] for output in outputs if 'image/png' in output.get('data', {})]


def make_cells(notebook, record, page, source, pages, folded=False):
    """Return the cells of a processed notebook in nbformat, with outputs, links and tags; `folded` hides code behind a fold."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == 'markdown':
            text = cell.source if getattr(cell, 'is_entry', False) else link_prose(link_notebooks(cell.source, source, page, pages), page, pages)
            cells.append(nbformat.v4.new_markdown_cell(text))
        elif cell.cell_type == 'code' and cell.source.strip():
            outputs = [nbformat.from_dict(translate_output(output, record['widgets'])) for output in getattr(cell, 'kept', []) if not is_progress(output)]
            new = nbformat.v4.new_code_cell(cell.source.strip(), outputs=outputs)
            fold = 'imports' if is_import(cell.source) else 'code' if folded else ''
            new.metadata.tags = ['hide-input'] if fold else []
            new.metadata.mystnb = {'code_prompt_show': f'Show the {fold}', 'code_prompt_hide': f'Hide the {fold}'} if fold else {}
            cells.append(new)
    return cells


def process_notebook(path, record, pages):
    """Return the Page of a notebook; `record` holds its outputs (None: it has not been run), `pages` the addresses of all pages."""
    page, source = name_page(path), str(path.relative_to(notebooks))
    notebook = read_nb(path)
    record = record or {'outputs': None, 'widgets': {}, 'seconds': 0.0, 'error': 'it was not run for this site'}
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    for cell, outputs in zip(code, record['outputs'] or [[]] * len(code)):
        cell.kept = copy.deepcopy(outputs)
    processor = NBProcessor(nb=notebook, procs=[FrontmatterProc, strip_ansi, hide_line, hide_, clean_magics])
    module = find_module(notebook)
    Definitions(module, page, pages).process(notebook)
    notebook.cells = [cell for cell in notebook.cells if 'default_exp' not in cell.directives_]
    for index, cell in enumerate(notebook.cells):
        cell.idx_ = index
    processor.process()
    matter = notebook.frontmatter_
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type != 'raw']
    title = matter['title']
    head = f'# {title}\n\n<p class="subtitle">{html.escape(matter.get("description", ""))}</p>\n\n'
    head += write_header(page, module, source, record['seconds'], pages)
    if record['error']:
        head += f'\n\n```{{note}}\nOutputs are missing below, because {html.escape(record["error"].splitlines()[0][:300])}.\n```'
    cells = [nbformat.v4.new_markdown_cell(head), *make_cells(notebook, record, page, source, pages, folded=not module and '/' not in page)]
    metadata = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}, 'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}}
    result = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    return Page(page, title, matter.get('description', ''), module, source, result, record['seconds'], record['error'])
