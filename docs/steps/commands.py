"""A page for every verb of `recon`, from the parser that the command itself uses: usage, options, the functions behind it, where it is shown."""
import argparse
import ast
import html
import inspect
import re
import textwrap

from steps.symbols import find_address, link_prose, list_verbs, relative

groups = {  # heading: verbs in the order of use
    'Look at what you have': ['doctor', 'inspect', 'backproject', 'fsc', 'mask', 'downsample'],
    'Find poses': ['abinit'],
    'Find latents and volumes': ['subspace', 'train', 'encode'],
    'Look at a run': ['analyze', 'explore', 'volumes', 'traverse', 'context', 'place'],
    'Decide': ['converge', 'filter', 'landscape', 'occupancy', 'confirm', 'agree', 'replicate'],
    'Hand over': ['export'],
    'Without data': ['demo', 'simulate'],
}


def group_verbs():
    """Return {heading: verbs}; a verb that no group names comes last, under a heading of its own."""
    known = list_verbs()
    grouped = {heading: [verb for verb in verbs if verb in known] for heading, verbs in groups.items()}
    rest = [verb for verb in known if not any(verb in verbs for verbs in groups.values())]
    return {heading: verbs for heading, verbs in {**grouped, 'Others': rest}.items() if verbs}


def describe_option(action):
    """Return an option as the term and the meaning of an HTML list."""
    if action.option_strings:
        kind = '' if action.nargs == 0 else action.metavar or (f'{{{",".join(map(str, action.choices))}}}' if action.choices else action.dest.upper())
        kind = f'{kind} ...' if action.nargs == '+' else kind
        names = ', '.join(f'<code>{html.escape(name)}</code>' for name in action.option_strings)
    else:
        names, kind = f'<code>{html.escape(action.metavar or action.dest.upper())}</code>', ''
    needed = ' <span class="default">needed</span>' if action.required and action.option_strings else ''
    words = html.escape((action.help or '').replace('%%', '%'))
    type_ = f' <span class="type">{html.escape(kind).replace(",", ",<wbr>")}</span>' if kind else ''
    return f'<dt>{names}{type_}{needed}</dt><dd>{words}</dd>'


def list_options(parser):
    """Return [(heading, options)] of a parser without its help."""
    sections = [(group.title, [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]) for group in parser._action_groups]
    return [(title, actions) for title, actions in sections if actions]


def list_functions(function, page, pages):
    """Return links to what a verb calls: the functions that it imports from the package, and itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = [f'{node.module.split(".")[-1]}.{alias.name}' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith('recon_nb.') for alias in node.names]
    links = {name: find_address(name, page, pages) for name in [*names, f'cli.{function.__name__}']}
    return [f'<a class="symbol" href="{address}"><code>{name}</code></a>' for name, address in links.items() if address]


def list_uses(verb, sources, page):
    """Return links to the pages whose text or code shows a verb; `sources` is {page: (title, text)}."""
    shown = re.compile(rf'\brecon {verb}\b')
    return [f'<a href="{relative(page, name)}">{html.escape(title)}</a>' for name, (title, text) in sources.items() if shown.search(text)]


def write_verb(verb, function, sources, pages):
    """Return the page of a verb as Markdown."""
    from recon_nb.cli import build_parser

    page, parser = f'commands/{verb}', build_parser(verb, function)
    parts = [f'# recon {verb}', f'<p class="subtitle">{html.escape(parser.description or "")}</p>', f'```\n{parser.usage}\n```']
    parts += [link_prose(parser.epilog, page, pages)] if parser.epilog else []
    for title, actions in list_options(parser):
        heading = {'arguments': 'What it takes', 'other': 'With every verb'}.get(title, title.capitalize())
        parts.append(f'## {heading}\n\n<dl class="arguments">{"".join(describe_option(action) for action in actions)}</dl>')
    functions, uses = list_functions(function, page, pages), list_uses(verb, sources, page)
    parts += [f'## From Python\n\n{", ".join(functions)}'] if functions else []
    parts += [f'## Where it is used\n\n{" · ".join(uses)}'] if uses else []
    return '\n\n'.join(parts) + '\n'


def write_index():
    """Return the page that lists the verbs."""
    verbs = list_verbs()
    parts = ['# Commands\n\n`recon VERB --help` prints what these pages hold; both are read from the same source. `recon VERB ... --debug` shows all messages, and where an error '
             'came from. The exit status is 0 where all went well, 2 where something you gave has to change, and 1 for a fault of the package.']
    for heading, members in group_verbs().items():
        rows = [f'| <a href="{verb}.html"><code>recon {verb}</code></a> | {verbs[verb].__doc__.strip().splitlines()[0]} |' for verb in members]
        parts.append('\n'.join([f'## {heading}', '', '| command | what it does |', '|---|---|', *rows]))
        parts.append('\n'.join(['```{toctree}', ':hidden:', f':caption: {heading}', '', *(f'recon {verb} </commands/{verb}>' for verb in members), '```']))
    return '\n\n'.join(parts) + '\n'


def write_commands(sources, pages):
    """Return {file: text} of the pages of the command line; `sources` is {page: (title, text)} of the pages that may show a verb."""
    files = {f'commands/{verb}.md': write_verb(verb, function, sources, pages) for verb, function in list_verbs().items()}
    return {'commands/index.md': write_index(), **files}
