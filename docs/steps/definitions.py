"""A definition as an entry of the reference: signature, docstring, every argument with its comment, methods, source."""
import ast
import html
import inspect
import io
import tokenize

from steps.symbols import is_method_shown, is_public, link_comment, link_prose, link_type, qualify_type


def read_comments(source):
    """Return {line: comment} of Python source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip('# ').strip() for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith('#|')}


def unparse(node):
    """Return an annotation or default as text, without the quotes of a forward reference."""
    if node is None:
        return ''
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier() else ast.unparse(node)


def list_arguments(function):
    """Return [(name, annotation, default or None, last line)] of a function's arguments, without self."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    stars = [(arguments.vararg, None, '*'), (arguments.kwarg, None, '**')]
    rows = [(argument, default, '') for argument, default in [*zip(plain, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]]
    rows += [row for row in stars if row[0] is not None]
    return [(star + argument.arg, unparse(argument.annotation), default, (default or argument).end_lineno) for argument, default, star in rows if argument.arg not in ('self', 'cls')]


def list_fields(node):
    """Return [(name, annotation, default or None, last line)] of the public annotated fields of a class."""
    return [(item.target.id, unparse(item.annotation), item.value, item.end_lineno) for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_public(item.target.id)]


def write_signature(function, module):
    """Return the argument names of a function of a module in one line; types, defaults and meanings stand in the list below it."""
    names, arguments = [], function.args
    plain = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args] if argument.arg not in ('self', 'cls')]
    names += plain
    if arguments.kwonlyargs and not arguments.vararg:
        names.append('*')
    names += [f'*{arguments.vararg.arg}'] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f'**{arguments.kwarg.arg}'] if arguments.kwarg else []
    returns = f' -> {qualify_type(unparse(function.returns), module)}' if function.returns is not None else ''
    return f'({", ".join(names)}){returns}'


def tabulate_arguments(rows, comments, returns, page, pages):
    """Return arguments as an HTML list: name, type, default, and what the comment beside it says."""
    items = []
    for name, annotation, default, line in rows:
        type_ = f' <span class="type">{link_type(annotation, page, pages)}</span>' if annotation else ''
        value = f' <span class="default">= {html.escape(ast.unparse(default))}</span>' if default is not None else ''
        items.append(f'<dt><code>{html.escape(name)}</code>{type_}{value}</dt><dd>{link_comment(comments.get(line, ""), page, pages)}</dd>')
    if returns:
        items.append(f'<dt><span class="returns">returns</span></dt><dd>{link_comment(returns, page, pages)}</dd>')
    return f'<dl class="arguments">{"".join(items)}</dl>' if items else ''


def find_return_comment(function, comments):
    """Return the comment on the line that ends a function's head."""
    if function.returns is None:
        return ''
    comment = comments.get(function.returns.end_lineno, '')
    taken = {line for *_, line in list_arguments(function)}
    return '' if function.returns.end_lineno in taken else comment


def write_text(node, page, pages):
    """Return the docstring of a definition as linked Markdown."""
    return link_prose(inspect.cleandoc(ast.get_docstring(node) or ''), page, pages)


def write_source(source):
    """Return source code behind a fold."""
    return f'<details class="source"><summary>Source</summary>\n\n~~~~~~~python\n{source.rstrip()}\n~~~~~~~\n\n</details>'


def wrap(directive, title, options, content, fence):
    """Return a MyST directive."""
    return '\n'.join([f'{fence}{{{directive}}} {title}', *options, '', content, '', fence])


def describe_function(node, module, comments, page, pages, source=''):
    """Return the entry of a function as MyST Markdown."""
    table = tabulate_arguments(list_arguments(node), comments, find_return_comment(node, comments), page, pages)
    content = '\n\n'.join(part for part in (write_text(node, page, pages), table, write_source(source) if source else '') if part)
    return wrap('py:function', node.name + write_signature(node, module), [f':module: recon_nb.{module}'], content, '`' * 6)


def describe_method(node, owner, module, comments, page, pages):
    """Return the entry of a method or property as MyST Markdown."""
    names = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
    options = [f':module: recon_nb.{module}'] + [f':{name}:' for name in ('classmethod', 'staticmethod') if name in names]
    property_ = names & {'property', 'cached_property'} or any('cached_property' in ast.unparse(decorator) for decorator in node.decorator_list)
    if property_:
        options += [f':type: {qualify_type(unparse(node.returns), module)}'] if node.returns is not None else []
        comment = find_return_comment(node, comments)
        content = write_text(node, page, pages) + (f'\n\n<p class="shape">{link_comment(comment, page, pages)}</p>' if comment else '')
        return wrap('py:property', f'{owner}.{node.name}', options, content, '`' * 5)
    table = tabulate_arguments(list_arguments(node), comments, find_return_comment(node, comments), page, pages)
    return wrap('py:method', f'{owner}.{node.name}{write_signature(node, module)}', options, f'{write_text(node, page, pages)}\n\n{table}', '`' * 5)


def describe_class(node, module, comments, page, pages, source=''):
    """Return the entry of a class as MyST Markdown: fields or arguments, methods, source."""
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == '__init__']
    rows = list_arguments(makers[0]) if makers else list_fields(node)
    signature = write_signature(makers[0], module).split(' -> ')[0] if makers else ''
    bases = [ast.unparse(base) for base in node.bases]
    lead = f'<p class="bases">A kind of {", ".join(link_comment(f"`{base}`", page, pages) for base in bases)}</p>' if bases else ''
    methods = [describe_method(item, node.name, module, comments, page, pages) for item in node.body if is_method_shown(item)]
    parts = [write_text(node, page, pages), lead, tabulate_arguments(rows, comments, '', page, pages), *methods, write_source(source) if source else '']
    return wrap('py:class', node.name + signature, [f':module: recon_nb.{module}'], '\n\n'.join(part for part in parts if part), '`' * 8)


def describe_cell(source, module, page, pages):
    """Return the entries of all public definitions in an exported cell, '' where there are none."""
    tree, comments = ast.parse(source), read_comments(source)
    entries = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_public(node.name):
            describe = describe_class if isinstance(node, ast.ClassDef) else describe_function
            entries.append(describe(node, module, comments, page, pages, source))
    return '\n\n'.join(entries)
