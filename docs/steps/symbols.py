"""Where every public name of the package is defined, and links to it from prose and code.

nbdev lists the names (`recon_nb/_modidx.py`); the page of a module is called after it, in a folder of its own (Sphinx has a page "search"), and Sphinx's Python domain gives each definition
the anchor `recon_nb.module.name`. Links are relative, so the site works from any folder and without a server.
"""
import ast
import html
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parents[2]
backticked = re.compile(r'(?<![`\[])`([A-Za-z_][\w.]*(?:\(\))?|recon [a-z]+(?: [^`\n]*)?)`(?![`\]])')


@dataclass(frozen=True)
class Symbol:
    """A public name and where it is defined."""

    name: str  # Class.method, Class or function
    module: str  # without recon_nb

    @property
    def anchor(self):
        """Return the anchor of its definition."""
        return f'recon_nb.{self.module}.{self.name}'

    def address(self, page):
        """Return the link from a page (`modules/ctf`, `tutorials/T00_tour`) to the definition."""
        return f'{relative(page, name_module_page(self.module))}#{self.anchor}'


def name_module_page(module):
    """Return the page of a module."""
    return f'modules/{module}'


def relative(page, target):
    """Return the relative address of page `target` as seen from `page`."""
    return '../' * page.count('/') + target + '.html'


def is_public(name):
    """Say whether a name is shown."""
    return not name.startswith('_')


def is_method_shown(node):
    """Say whether a statement of a class is a method with an entry of its own."""
    return isinstance(node, ast.FunctionDef) and is_public(node.name) and ast.get_docstring(node) is not None


@cache
def list_modules():
    """Return {module: source} of the package."""
    paths = sorted((root / 'recon_nb').glob('[a-z]*.py'))
    return {path.stem: path.read_text(encoding='utf-8') for path in paths}


@cache
def list_symbols():
    """Return {name or module.name: Symbol} of all public definitions; a name that two modules define stands under its long name only."""
    found, seen_twice = {}, set()
    for module, source in list_modules().items():
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not is_public(node.name):
                continue
            methods = [f'{node.name}.{item.name}' for item in node.body if is_method_shown(item)] if isinstance(node, ast.ClassDef) else []
            for name in (node.name, *methods):
                symbol = Symbol(name, module)
                seen_twice |= {name} if name in found else set()
                found[name] = found[f'{module}.{name}'] = found[f'recon_nb.{module}.{name}'] = symbol
    for name in seen_twice:
        del found[name]
    return found


@cache
def list_verbs():
    """Return {verb: function} of the command line."""
    from recon_nb.cli import verbs

    return dict(verbs)


def find_address(name, page, pages):
    """Return the link from `page` to what `name` names: a definition, a module, or a verb (`recon filter`, whatever follows); None where it names nothing of the site's `pages`."""
    if name.startswith('recon '):
        verb = f'commands/{name.split()[1]}'
        return relative(page, verb) if verb in pages and page != verb else None
    symbol = list_symbols().get(name)
    if symbol is not None and name_module_page(symbol.module) in pages:
        return symbol.address(page)
    module = name_module_page(name.removeprefix('recon_nb.'))
    if name.startswith('recon_nb.') and module in pages:
        return relative(page, module)
    return None


@cache
def list_imported_names(module):
    """Return {name: defining module} of what a module of the package imports from its sisters."""
    nodes = [node for node in ast.walk(ast.parse(list_modules().get(module, ''))) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module.split('.')[-1] for node in nodes if node.module and (node.level == 1 or node.module.startswith('recon_nb.')) for alias in node.names}


def qualify(name, module):
    """Return a name as a module of the package means it, with the module that defines it, where several modules define the same name."""
    if name in list_symbols() or '.' in name:
        return name
    home = module if f'{module}.{name}' in list_symbols() else list_imported_names(module).get(name)
    return f'{home}.{name}' if f'{home}.{name}' in list_symbols() else name


def qualify_type(annotation, module):
    """Return an annotation in which a name that several modules define is written with the one that is meant."""
    def long(match):
        name = qualify(match[0], module)
        return match[0] if name == match[0] else f'recon_nb.{name}'

    return re.sub(r'(?<![\w.])[A-Za-z_]\w*(?!\.)', long, annotation)


def link_code(text, page, pages):
    """Return backticked `text` as HTML code, linked where it names something."""
    address = find_address(text.removesuffix('()'), page, pages)
    code = f'<code class="docutils literal">{html.escape(text)}</code>'
    return f'<a class="symbol" href="{address}">{code}</a>' if address else code


def link_type(annotation, page, pages):
    """Return a type annotation as HTML code in which every class of the package is a link."""
    def link(match):
        address = find_address(qualify(match[0], page.removeprefix('modules/')), page, pages)
        return f'<a class="symbol" href="{address}">{match[0]}</a>' if address else match[0]

    return f'<code class="docutils literal">{re.sub(r"[A-Za-z_][A-Za-z_0-9.]*", link, html.escape(annotation, quote=False))}</code>'


def link_prose(markdown, page, pages):
    """Link every backticked name in Markdown, outside of code blocks and headings."""
    fenced, lines = False, []
    for line in markdown.split('\n'):
        fenced ^= line.lstrip().startswith(('```', '~~~'))
        if not fenced and not line.startswith('#'):
            line = backticked.sub(lambda match: link_code(match[1], page, pages) if find_address(match[1].removesuffix('()'), page, pages) else match[0], line)
        lines.append(line)
    return '\n'.join(lines)


def link_comment(comment, page, pages):
    """Return a comment as HTML with its backticked names linked."""
    parts = re.split(r'(`[^`]+`)', comment)
    return ''.join(link_code(part[1:-1], page, pages) if part.startswith('`') else html.escape(part) for part in parts)


def link_listing(body, page, pages):
    """Link the package's names in the highlighted code of an HTML page, where they are used, not where they are defined."""
    def link_name(match):
        address = find_address(match[2], page, pages)
        return f'{match[1]}<a class="symbol" href="{address}"><span class="n">{match[2]}</span></a>' if address else match[0]

    def link_verb(match):
        address = find_address(match[2], page, pages)
        return f'{match[1]}<a class="symbol" href="{address}">{match[2]}</a>' if address else match[0]

    def link_block(match):
        match = [re.sub(r'((?:^|<span></span>|\n)(?:\$ )?)(recon [a-z]+)\b', link_verb, match[0])]
        return re.sub(r'((?:^|.)(?<!\.</span>))<span class="n(?:c|f)?">([A-Za-z]\w*)</span>(?!<span class="o">=</span>)', link_name, match[0], flags=re.S)

    return re.sub(r'<div class="highlight">.*?</pre></div>', link_block, body, flags=re.S)
