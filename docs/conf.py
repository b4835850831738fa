"""Sphinx settings of the site. `python docs/build.py` prepares the pages that they apply to."""
import os
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes

here = Path(__file__).resolve().parent
work = Path(os.environ.get('RECON_NB_SITE_WORK', here))
sys.path.insert(0, str(here))

from steps.symbols import link_listing, list_symbols, name_module_page  # noqa: E402

settings = ConfigParser(delimiters=['='])
settings.read(here.parent / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
language = 'en'
smartquotes = False  # options of commands begin with two hyphens, also where prose names them
extensions = ['myst_nb', 'sphinx.ext.mathjax']
source_suffix = {'.md': 'myst-nb', '.ipynb': 'myst-nb'}
exclude_patterns = []

nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
nb_number_source_lines = False
scripts = work / '_static'
nb_ipywidgets_js = {}  # widgets are shown without a kernel: docs/steps/widgets.py
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_inline', 'attrs_block', 'html_image']
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'config.cache']
highlight_language = 'text'
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'

mathjax_path = 'mathjax/tex-chtml.js'
mathjax3_config = {'options': {'enableMenu': False}, 'chtml': {'matchFontHeight': False, 'scale': 1.05}}
if not (scripts / mathjax_path).exists():
    extensions.remove('sphinx.ext.mathjax')
    mathjax_path = ''

templates_path = [str(here / 'templates')]
html_theme = 'pydata_sphinx_theme'
html_static_path = [str(work / '_static')]
html_extra_path = [str(work / '_extra')]
html_css_files = ['site.css']
html_js_files = ['site.js']
html_title = settings['title']
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_favicon = str(here / 'static' / 'icon.svg')
html_theme_options = {
    'logo': {'text': settings['title'], 'image_light': '_static/icon.svg', 'image_dark': '_static/icon.svg', 'alt_text': ''},
    'github_url': settings['git_url'],
    'navbar_align': 'left',
    'header_links_before_dropdown': 7,
    'navigation_with_keys': False,
    'show_prev_next': True,
    'show_toc_level': 2,
    'secondary_sidebar_items': ['page-toc'],
    'pygments_light_style': 'default',
    'pygments_dark_style': 'github-dark',
    'footer_start': ['copyright'],
    'footer_end': [],
    'back_to_top_button': True,
}
html_sidebars = {'index': [], 'start': [], 'search': [], 'glossary': [], 'troubleshooting': [], 'changelog': []}
html_context = {'default_mode': 'auto'}


def resolve_type(app, env, node, contnode):
    """Link a class of the package in a signature to its page, whatever module it was imported into."""
    symbol = list_symbols().get(node.get('reftarget', ''))
    if node.get('refdomain') != 'py' or symbol is None or name_module_page(symbol.module) not in env.found_docs:
        return None
    address = f'{app.builder.get_relative_uri(node["refdoc"], name_module_page(symbol.module))}#{symbol.anchor}'
    reference = nodes.reference('', '', internal=True, refuri=address)
    reference.append(contnode)
    return reference


def link_code(app, page, template, context, doctree):
    """Link the package's names in the code of a page."""
    if doctree is not None and 'body' in context:
        context['body'] = link_listing(context['body'], page, app.env.found_docs)


def setup(app):
    """Connect the links."""
    app.connect('missing-reference', resolve_type)
    app.connect('html-page-context', link_code)
