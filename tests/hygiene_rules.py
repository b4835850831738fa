"""The rules of layering and style, each a function from source text to a list of problems (empty: the rule is kept).

`test_hygiene.py` applies them to the package and shows that each one catches what it is there for.
"""
import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field

# ---------------------------------------------------------------- layers

# Imports go down only: a row imports from rows above it and, within a row, from groups to the left of it.
LAYERS = [
    [['core']],
    [['fourier', 'so3']],
    [['ctf', 'dose'], ['imaging'], ['volumes']],
    [['files'], ['datasets'], ['simulate']],
    [['networks'], ['encoders', 'decoders', 'losses'], ['models']],
    [['ppca']],
    [['runs'], ['training'], ['search'], ['refinement'], ['diagnosis'], ['solver'], ['candidates'], ['amortised'], ['stages'], ['subspace'], ['readings']],
    [['latent'], ['convergence', 'selection', 'occupancy', 'tomogram', 'abinit'], ['confirm', 'agreement', 'clouds', 'surfaces'], ['explore'], ['doctor']],
    [['cli']],
]

# Allowed by the rows, forbidden by design: models open no file, and runs know no model.
FORBIDDEN = {
    **{module: {'files', 'datasets', 'simulate'} for module in ('networks', 'encoders', 'decoders', 'losses', 'models')},
    'runs': {'networks', 'encoders', 'decoders', 'losses', 'models'},
}

NOTEBOOK_NAME = re.compile(r'(\d\d)([a-z]?)_([a-z][a-z0-9]*)$')


def rank_modules(notebooks):
    """Return {module: (row, group, letter)} for the notebook names `NN_name` or `NNx_name`.

    A page split off with a letter (20a from 20) stands just after the page whose number it carries.
    """
    known = {name: (row, group) for row, groups in enumerate(LAYERS) for group, names in enumerate(groups) for name in names}
    parsed = [match.groups() for match in map(NOTEBOOK_NAME.match, notebooks) if match]
    number_rank = {number: known[name] for number, letter, name in parsed if not letter and name in known}
    ranks = {}
    for number, letter, name in parsed:
        if name in known or (letter and number in number_rank):
            ranks[name] = (*known.get(name, number_rank.get(number)), letter)
    return ranks


def list_package_imports(source):
    """Return [(line, sister module)] of a module of recon_nb, imports inside functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ''
            if node.level or name.split('.')[0] == 'recon_nb':
                head = (name if node.level else name.partition('.')[2]).split('.')[0]
                found += [(node.lineno, head)] if head else [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split('.') for alias in node.names]
            found += [(node.lineno, part[1]) for part in parts if part[0] == 'recon_nb' and len(part) > 1]
    return found


def check_layers(source, module, ranks):
    """Report imports that do not go down."""
    if module not in ranks:
        return [f'{module} is in no row of the layer table (tests/hygiene_rules.py)']
    problems = []
    for line, target in list_package_imports(source):
        if target.startswith('_'):
            continue
        if target not in ranks:
            problems.append(f'{module}:{line} imports {target}, which is in no row of the layer table')
        elif ranks[target] >= ranks[module]:
            problems.append(f'{module}:{line} imports {target}, which does not lie below it')
        elif target in FORBIDDEN.get(module, ()):
            problems.append(f'{module}:{line} imports {target}; by design {module} knows nothing of it')
    return problems


# ---------------------------------------------------------------- what exported code says of itself

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)
IMPORT = (ast.Import, ast.ImportFrom)


def list_public(source):
    """Return [(qualified name, node, owner class or None)] of public functions, classes and their public methods."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, DEFINITION) and not node.name.startswith('_'):
            found.append((node.name, node, None))
            if isinstance(node, ast.ClassDef):
                methods = [child for child in node.body if isinstance(child, FUNCTION)]
                found += [(f'{node.name}.{m.name}', m, node) for m in methods if not m.name.startswith('_') or m.name == '__init__']
    return found


def check_docstrings(source):
    """Report public names without a docstring (an `__init__` may leave it to its class)."""
    return [f'line {node.lineno}: {name} has no docstring' for name, node, _ in list_public(source)
            if not name.endswith('.__init__') and not ast.get_docstring(node)]


NUMERIC = re.compile(r'\b(Tensor|ndarray|ArrayLike|NDArray|float|complex|int)\b')
ARRAY = re.compile(r'\b(Tensor|ndarray|ArrayLike|NDArray)\b')
SHAPE = re.compile(r'\(.*\)|\bscalar\b|\bany shape\b|\bsame shape\b|\b0-d\b|\bnot used\b')
PLAIN_COUNT = re.compile(r'(n_\w+|seed|epoch|rank|world_size)$')  # integers that their names explain


def find_comments(source):
    """Return {line: comment}, with 'whole line' comments under the line that follows them."""
    comments, waiting = {}, []
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip('#').strip()
            if lines[token.start[0] - 1].lstrip().startswith('#'):
                waiting.append(text)
            else:
                comments[token.start[0]] = ' '.join([*waiting, text])
                waiting = []
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT) and waiting:
            comments[token.start[0]] = ' '.join(waiting)
            waiting = []
    return comments


def judge_comment(name, annotation, comment):
    """Return what is missing in the comment on an argument or field, or ''."""
    if annotation is None:
        return '' if name in ('ax', 'axes') else 'has no type'  # axes: matplotlib is not imported where they are named
    text = ast.unparse(annotation)
    if 'Callable' in text or not NUMERIC.search(text):
        return ''  # flags, paths, records and callables explain themselves
    if text.removesuffix(' | None') == 'int' and PLAIN_COUNT.match(name):
        return ''
    has_shape = bool(ARRAY.search(text)) and not re.search(r'\b(float|dict|Mapping)\b', text)  # not a number, nor a table of tensors
    if not comment:
        return f'({text}) has no comment with its unit' + (' and shape' if has_shape else '')
    if has_shape and not SHAPE.search(comment):
        return f'({text}) has a comment without a shape: "{comment}"'
    return ''


def check_arguments(source):
    """Report arguments of public functions, and fields of public dataclasses, without type, shape or unit."""
    comments, problems = find_comments(source), []
    for name, node, _ in list_public(source):
        if isinstance(node, ast.ClassDef):
            if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
                fields = [child for child in node.body if isinstance(child, ast.AnnAssign) and not child.target.id.startswith('_')]
                items = [(child.target.id, child.annotation, child.end_lineno) for child in fields]
            else:
                items = []
        else:
            items = list_arguments(node)
        lines = [line for _, _, line in items]
        for argument, annotation, line in items:
            alone = lines.count(line) == 1
            verdict = judge_comment(argument, annotation, comments.get(line, '') if alone else '')
            problems += [f'line {line}: {argument} of {name} {verdict}'] if verdict else []
    return problems


def list_arguments(node):
    """Return [(name, annotation, line on which it ends)] of a function, without self, cls, *args and **kwargs."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    pairs = [*zip(positional, defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    return [(arg.arg, arg.annotation, max(arg.end_lineno, default.end_lineno if default else 0))
            for arg, default in pairs if arg.arg not in ('self', 'cls')]


def check_keyword_only(source, limit=4):
    """Report public functions that take more than `limit` arguments by position.

    The style asks for three; a fourth passes where its order is natural (images, CTF, tilt, lattice). `forward` is
    left out, since torch calls it by position.
    """
    problems = []
    for name, node, _ in list_public(source):
        if isinstance(node, FUNCTION) and node.name != 'forward':
            positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ('self', 'cls')]
            if len(positional) > limit:
                problems.append(f'line {node.lineno}: {name} takes {len(positional)} arguments by position; put a * before the rest')
    return problems


# ---------------------------------------------------------------- what exported code must not do

PICKLES = {'pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle', 'shelve', 'marshal'}
UNPICKLING = {'torch.load', 'torch.save', 'pd.read_pickle', 'pandas.read_pickle', 'numpy.save_pickle'}
SAFE_IMPORT_OF_PICKLES = {'files'}  # may subclass pickle.Unpickler to admit numpy arrays only: the one-way import of cryoDRGN files
SAFE_NAMES = {'Unpickler', 'UnpicklingError'}


def check_pickles(source, module):
    """Report pickle in any form: modules, allow_pickle=True, torch.load."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, 'lineno', 0)
        if isinstance(node, ast.Import):
            bad = [a.name for a in node.names if a.name.split('.')[0] in PICKLES and not (a.name == 'pickle' and module in SAFE_IMPORT_OF_PICKLES)]
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in PICKLES:
            bad = [a.name for a in node.names if module not in SAFE_IMPORT_OF_PICKLES or a.name not in SAFE_NAMES]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            bad = [text] if text in UNPICKLING or node.attr == 'to_pickle' else []
            bad += [text] if text.startswith('pickle.') and text.split('.')[1] not in SAFE_NAMES else []
        elif isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
            line = node.value.lineno
            bad = [] if isinstance(node.value, ast.Constant) and node.value.value is False else ['allow_pickle']
        else:
            continue
        problems += [f'{module}:{line} uses {name}; write json, csv, npz (allow_pickle=False) or safetensors' for name in bad]
    return problems


def check_prints(source):
    """Report calls of print."""
    return [f'line {node.lineno}: print; log it, return it or leave it to the command line' for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'print']


def check_asserts(source):
    """Report assert statements: exported code raises a ReconError."""
    return [f'line {node.lineno}: assert; raise an error that says what to do' for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assert)]


def check_star_imports(source):
    """Report `from x import *`."""
    return [f'line {node.lineno}: from {node.module} import *; name what is used' for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and any(alias.name == '*' for alias in node.names)]


# ---------------------------------------------------------------- notebooks

@dataclass(frozen=True)
class Cell:
    """One cell of a notebook: its kind, its source without directives and magics, and its directives."""
    kind: str
    source: str
    directives: set = field(default_factory=set)

    @property
    def exported(self):
        """Whether the module contains this cell."""
        return self.kind == 'code' and bool(self.directives & {'export', 'exporti', 'exports'})

    @property
    def tree(self):
        """The statements of a code cell."""
        return ast.parse(self.source).body if self.kind == 'code' else []

    @property
    def definitions(self):
        """The functions and classes that the cell defines at its top."""
        return [node for node in self.tree if isinstance(node, DEFINITION)]

    @property
    def title(self):
        """The first line, for messages."""
        return next((line for line in self.source.splitlines() if line.strip()), '(empty)').strip()[:70]


def parse_cells(text):
    """Return the cells of the text of an .ipynb file."""
    cells = []
    for cell in json.loads(text)['cells']:
        lines = ''.join(cell['source']).splitlines()
        directives = {line[2:].split()[0] for line in lines if re.match(r'#\|\s*\w', line)}
        kept = [line for line in lines if not re.match(r'(#\||\s*[%!])', line)] if cell['cell_type'] == 'code' else lines
        cells.append(Cell(cell['cell_type'], '\n'.join(kept), directives))
    return cells


def count_lines(node, lines):
    """Return the number of lines of a definition, decorators included, blank lines and docstrings left out."""
    counted = set(range(min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno + 1))
    counted -= {number for number in counted if not lines[number - 1].strip()}
    for inner in ast.walk(node):
        if isinstance(inner, DEFINITION) and ast.get_docstring(inner):
            counted -= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    return len(counted)


def check_cell_size(cells, function_lines=40, class_lines=80):
    """Report exported cells with more than one definition, and functions and classes that are too long."""
    problems = []
    for cell in cells:
        if not cell.exported:
            continue
        if len(cell.definitions) > 1:
            problems.append(f'the cell of {cell.definitions[0].name} defines {len(cell.definitions)} things; give each a cell')
        for node in (inner for top in cell.definitions for inner in ast.walk(top) if isinstance(inner, DEFINITION)):
            length = count_lines(node, cell.source.splitlines())
            limit = class_lines if isinstance(node, ast.ClassDef) else function_lines
            if length > limit:
                problems.append(f'{node.name} has {length} lines, more than {limit}; split it')
    return problems


def check_prose(cells, together=3, tiny=4):
    """Report exported definitions that no prose introduces.

    One markdown cell may introduce `together` definitions that follow each other, such as a function and its inverse, or
    one and its helpers; definitions of at most `tiny` lines do not count. After a test or a picture, prose comes first again.
    """
    problems, left = [], -1  # definitions that the last prose may still introduce; negative: none, not even a tiny one
    for cell in cells[1:]:  # the first cell is the title
        if cell.kind == 'markdown' and cell.source.strip():
            left = together
        elif cell.exported and cell.definitions:
            node = cell.definitions[0]
            heavy = count_lines(node, cell.source.splitlines()) > tiny
            if left < heavy or left < 0:
                problems.append(f'{node.name} has no prose before it')
            left -= heavy
        elif cell.kind == 'code' and not cell.exported and 'hide' not in cell.directives and not all(isinstance(n, IMPORT) for n in cell.tree):
            left = -1  # a test or a picture
    return problems


def check_used(cells, elsewhere=''):
    """Report public definitions that nothing uses: no test, no picture, no other definition, no text in `elsewhere`."""
    problems = []
    for cell in cells:
        for node in cell.definitions if cell.exported else []:
            others = '\n'.join(other.source for other in cells if other.kind == 'code' and other is not cell)
            if not node.name.startswith('_') and not re.search(rf'\b{node.name}\b', others + '\n' + elsewhere):
                problems.append(f'{node.name} is used by no test, picture or other code')
    return problems


def check_title(cells):
    """Report a first cell that is not a title and a one-line subtitle and nothing else."""
    if cells and cells[0].kind == 'markdown' and re.fullmatch(r'# [^\n]+\n+> [^\n]+\n*', cells[0].source):
        return []
    return ['the first cell must be "# Title", an empty line, "> one-line subtitle", and nothing else']


def is_for_types_only(node):
    """Whether a statement is `if TYPE_CHECKING:` over imports."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING' and all(isinstance(n, IMPORT) for n in node.body)


def check_import_cells(cells):
    """Report cells that mix imports with other code: the documentation runs such a cell out of context."""
    problems = []
    for cell in cells:
        nodes = cell.tree if cell.exported else [n for top in cell.tree for n in ast.walk(top)]
        imports = [n for n in nodes if isinstance(n, IMPORT)]
        if imports and not all(isinstance(node, IMPORT) or is_for_types_only(node) for node in cell.tree):
            problems.append(f'a cell mixes imports with other code: {cell.title}')
    return problems


FIGURE = re.compile(r'\bplt\.(?!switch_backend|rc|close)\w+|\bplot_\w+\(|\.imshow\(|\.plot\(|\.hist\(|\bpx\.\w+\(|\bgo\.Figure\(')


def check_figure(cells):
    """Report a notebook that draws nothing."""
    drawn = any(FIGURE.search(cell.source) for cell in cells if cell.kind == 'code' and not cell.exported)
    return [] if drawn else ['no cell draws a figure']


def check_module_name(stem, text):
    """Report a notebook whose name and `default_exp` disagree."""
    match = NOTEBOOK_NAME.match(stem)
    if not match:
        return [f'{stem}: the name must be NN_name or NNx_name']
    targets = re.findall(r'#\|\s*default_exp\s+(\S+)', '\n'.join(''.join(c['source']) for c in json.loads(text)['cells']))
    return [] if targets == [match[3]] else [f'{stem}: must have one "#| default_exp {match[3]}", has {targets}']


def check_exports_nothing(cells):
    """Report exports in a page that only explains."""
    return [f'exports {cell.title}' for cell in cells if cell.exported or 'default_exp' in cell.directives]


# ---------------------------------------------------------------- texts

LEFTOVER = re.compile(r'\b(' + 'TO' + r'DO|FIX' + r'ME|XX' + r'X)\b')
MACHINE_PATH = re.compile(r'(?<![\w.~/)}>-])/(' + '|'.join(['work', 'tmp', 'home', 'root']) + r')/\w')


def read_prose(name, text):
    """Return the text that people wrote or will read: of a notebook, its sources and printed outputs, without images."""
    if not name.endswith('.ipynb'):
        return text
    parts = []
    for cell in json.loads(text)['cells']:
        parts += cell['source']
        for output in cell.get('outputs', []):
            parts += output.get('text', []) + output.get('traceback', []) + list(output.get('data', {}).get('text/plain', []))
        parts.append('\n')
    return ''.join(parts)


def check_leftovers(text):
    """Report notes to self."""
    return [f'line {n}: {line.strip()[:80]}' for n, line in enumerate(text.splitlines(), 1) if LEFTOVER.search(line)]


def check_machine_paths(text):
    """Report absolute paths of somebody's machine."""
    return [f'line {n}: {line.strip()[:80]}' for n, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
