"""The documentation site in a real browser: landing, search, symbol links, dark mode, a phone; no other host, no error.

The site is built from four notebooks into a temporary folder with the outputs that are at hand; nothing is executed. `RECON_NB_SITE`
names a finished site to test instead (docs.yml gives the whole one). Screenshots go to docs/_artefacts.
"""
import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from explorer_page import list_missing, open_browser

root = Path(__file__).resolve().parents[1]
artefacts = root / 'docs' / '_artefacts'

sys.path.insert(0, str(root / 'docs'))


def require_browser():
    """Skip, saying why, where the site cannot be built or opened."""
    missing = list_missing('sphinx', 'myst_nb', 'pydata_sphinx_theme')
    if missing:
        pytest.skip(missing)


class Links(HTMLParser):
    """Collect the addresses and the anchors of a page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.anchors, self.loaded = [], set(), []

    def handle_starttag(self, tag, attributes):
        """Note links, what the page loads, and ids."""
        values = dict(attributes)
        self.anchors |= {values[name] for name in ('id', 'name') if values.get(name)}
        if tag == 'a' and values.get('href'):
            self.addresses.append(values['href'])
        if values.get('src') or (tag == 'link' and values.get('href') and values.get('rel') in ('stylesheet', 'preload', 'icon')):
            self.loaded.append(values.get('src') or values['href'])


def read_links(path):
    """Return the links of an HTML file."""
    links = Links()
    links.feed(path.read_text(encoding='utf-8'))
    return links


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Return the folder of a site: the one that RECON_NB_SITE names, or a small one built here."""
    require_browser()
    if os.environ.get('RECON_NB_SITE'):
        return Path(os.environ['RECON_NB_SITE']).resolve()
    folder = tmp_path_factory.mktemp('site') / 'html'
    names = ['00_core', '10_ctf', '30a_tiltencoder', '52a_pickers', 'T00_tour']
    done = subprocess.run([sys.executable, 'docs/build.py', '--no-execute', '--work', str(folder.parent / 'work'), '-o', str(folder), '--only', *names], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope='module')
def address(site):
    """Serve the site on a free port and return its address."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    """Start chromium."""
    require_browser()
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    """Open a page that records what goes wrong; at the end nothing may have."""
    problems = []
    tab = browser.new_page(viewport={'width': 1280, 'height': 900})
    tab.on('console', lambda message: problems.append(f'console: {message.text}') if message.type == 'error' else None)
    tab.on('pageerror', lambda error: problems.append(f'error: {error}'))
    tab.set_default_timeout(120_000)
    # a request that the next page cut short did not fail
    tab.on('requestfailed', lambda request: problems.append(f'failed: {request.url}') if request.failure != 'net::ERR_ABORTED' else None)
    tab.on('response', lambda response: problems.append(f'{response.status}: {response.url}') if response.status >= 400 else None)
    tab.on('request', lambda request: problems.append(f'other host: {request.url}') if not request.url.startswith((address, 'data:', 'blob:')) else None)
    yield tab
    tab.close()
    assert not problems, problems


slow = pytest.mark.slow


def shoot(page, name):
    """Keep a screenshot."""
    artefacts.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=artefacts / f'{name}.png')


@slow
def test_code_of_the_decoder_page_runs():
    """What the page tells a user to type works, laws included; the tutorial T13, whose code it is, trains it."""
    from steps.quotes import fill_quotes

    text = fill_quotes((root / 'docs/pages/add_decoder.md').read_text(encoding='utf-8'))
    exec(compile('\n'.join(re.findall(r'```python\n(.*?)```', text, flags=re.S)), 'add_decoder.md', 'exec'), {'__name__': 'page'})


def test_prose_quotes_results_that_exist():
    """Every placeholder of a measured number or of code is filled; one that has no row, or no cell, stops the build."""
    from steps.quotes import fill_quotes

    for path in (root / 'docs/pages').rglob('*.md'):
        assert '{{' not in fill_quotes(path.read_text(encoding='utf-8')), path
    with pytest.raises(SystemExit, match='no knn where set=nothing'):
        fill_quotes('{{subspace.csv: knn where set=nothing | .2f}}')
    with pytest.raises(SystemExit, match='0 code cells'):
        fill_quotes('{{cell tutorials/T00_tour: class Nothing}}')
    assert fill_quotes('{{abinit_amortised.csv: steps where case=bar, variant="bar, poses disturbed", seed=0 | .0f}}').isdigit()


def test_a_definition_says_shapes_defaults_and_links():
    """An exported cell becomes an entry with its argument comments, its return, and links to what it names."""
    from steps.definitions import describe_cell
    from steps.symbols import link_prose

    cell = """def turn(
    poses: Poses,  # (N,)
    *,
    angle: float = 3.0,  # degrees, see `Lattice`
) -> Poses:  # (N,), turned
    "Turn `Poses`."
    return poses
"""
    entry = describe_cell(cell, 'so3', 'modules/so3', {'modules/core', 'modules/fourier', 'modules/so3'})
    assert '{py:function} turn(poses, *, angle) -> Poses' in entry
    assert '<dd>(N,), turned</dd>' in entry and '= 3.0' in entry
    assert 'href="../modules/fourier.html#recon_nb.fourier.Lattice"' in entry and 'href="../modules/core.html#recon_nb.core.Poses"' in entry
    assert '../modules/core.html#recon_nb.core.Poses' in link_prose('see `Poses`', 'tutorials/T00_tour', {'modules/core'})
    assert link_prose('```\n`Poses`\n```', 'x', {'modules/core'}) == '```\n`Poses`\n```'
    assert link_prose('see `Poses`', 'x', set()) == 'see `Poses`'


def test_old_pages_leave_the_site(tmp_path):
    """A page whose source is gone is deleted; what Sphinx makes by itself, and what is copied, stays."""
    pytest.importorskip('sphinx')
    from build import remove_old_pages

    for name in ('_source/a.md', '_source/modules/b.ipynb', '_extra/c.html', 'html/a.html', 'html/modules/b.html', 'html/c.html', 'html/search.html', 'html/old.html', 'html/_static/d.html'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_old_pages(tmp_path, tmp_path / 'html')
    assert sorted(str(path.relative_to(tmp_path / 'html')) for path in (tmp_path / 'html').rglob('*.html')) == ['_static/d.html', 'a.html', 'c.html', 'modules/b.html', 'search.html']


def test_outputs_are_kept_under_what_decides_them():
    """A page stands on everything below it: a change of `fourier` must run the page of training again, whichever way a module imports another."""
    from steps.execute import list_imported_modules, trace_module

    assert list_imported_modules('from .core import Poses\nfrom recon_nb.so3 import (\n    euler_to_matrix,\n)\nimport recon_nb.ctf') == {'core', 'so3', 'ctf'}
    assert {'core', 'fourier', 'imaging', 'models', 'runs'} <= set(trace_module('training'))


def test_a_name_of_two_modules_is_the_one_that_is_meant():
    """Where several modules define a name, an annotation means the one that its own module defines or imports."""
    from steps.symbols import list_modules, list_symbols, qualify, qualify_type

    classes = [(name, module) for module, source in list_modules().items() for name in re.findall(r'^class ([A-Z]\w*)', source, flags=re.M)]
    twice = [(name, module) for name, module in classes if name not in list_symbols()]
    assert all(qualify(name, module) == f'{module}.{name}' for name, module in twice)
    assert all(qualify_type(f'list[{name}] | None', module) == f'list[recon_nb.{module}.{name}] | None' for name, module in twice)
    assert qualify_type('Poses | None', 'so3') == 'Poses | None'


def test_widgets_need_no_kernel():
    """A figure stays alive with its arrays, controls become words, what is hidden stays hidden; a view that was not kept whole leaves its plain text."""
    from steps.process import is_progress, translate_output, widget_type
    from steps.widgets import state_type

    def model(name, buffers=(), **state):
        return {'state': {'_model_name': name, **state}, 'buffers': list(buffers)}

    array = {'encoding': 'base64', 'path': ['_widget_data', 0, 'x', 'buffer'], 'data': 'AACAPw=='}
    lost = {'encoding': 'base64', 'path': ['_py2js_update', 'style_data', 'x', 0, 'buffer'], 'data': 'AACAPw=='}
    models = {'box': model('VBoxModel', children=['IPY_MODEL_axis', 'IPY_MODEL_figure', 'IPY_MODEL_secret']),
              'axis': model('DropdownModel', description='x', index=1, _options_labels=['pc1', 'pc2']),
              'figure': model('AnyModel', [array, lost], _widget_data=[{'x': {'dtype': 'float32', 'shape': [1]}}], _widget_layout={'height': 300}, _py2js_update=None),
              'secret': model('LabelModel', value='secret', layout='IPY_MODEL_none'), 'none': model('LayoutModel', display='none')}
    view = {'output_type': 'display_data', 'metadata': {}, 'data': {widget_type: {'model_id': 'box'}, 'text/plain': 'VBox()'}}
    shown = translate_output(view, {state_type: {'state': models}})['data']['text/html']
    assert 'x pc2' in shown and '"bdata": "AACAPw=="' in shown and 'secret' not in shown
    del models['axis']
    assert translate_output(view, {state_type: {'state': models}})['data'] == {'text/plain': 'VBox()'}
    assert is_progress({'data': {widget_type: {}, 'text/plain': 'one:   0 %|          | 00:00 < ?'}})


def list_commands(text):
    """Return the lines that begin with `recon` in the fenced code of Markdown, continued lines joined, without comments."""
    blocks = re.findall(r'^```[a-z]*\n(.*?)^```', text, flags=re.S | re.M)
    return [line.strip() for block in blocks for line in block.replace('\\\n', ' ').splitlines() if re.match(r'\s*recon [a-z]', line)]


def list_quoted_commands():
    """Return [(place, command)] of every command line that README, site and tutorials tell a reader to type."""
    import nbformat

    texts = {path.name: path.read_text(encoding='utf-8') for path in [root / 'README.md', *(root / 'docs/pages').rglob('*.md')]}
    for path in sorted((root / 'nbs/tutorials').glob('*.ipynb')):
        texts[path.stem] = '\n\n'.join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == 'markdown')
    return [(name, line) for name, text in texts.items() for line in list_commands(text)]


def test_commands_that_readers_type_are_understood():
    """Every command line quoted in README, site and tutorials goes through the parser of its verb."""
    import shlex

    from recon_nb.cli import build_parser, verbs

    quoted, wrong = list_quoted_commands(), []
    for name, line in quoted:
        _, verb, *words = shlex.split(line, comments=True)
        try:
            build_parser(verb, verbs[verb]).parse([word for word in words if word != '...'])
        except Exception as error:
            wrong.append(f'{name}: {line}: {type(error).__name__}: {error}')
    assert len(quoted) > 40
    assert not wrong, '\n'.join(wrong)


def test_every_verb_has_its_place():
    """The pages of the command line list every verb, under a heading, with every option of its parser."""
    from recon_nb.cli import verbs

    from steps.commands import group_verbs, write_commands

    assert sorted(verb for members in group_verbs().values() for verb in members) == sorted(verbs)
    assert 'Others' not in group_verbs(), 'name the heading of a new verb in docs/steps/commands.py'
    files = write_commands({'tutorials/T04_filtering': ('T04', 'recon filter RUN')}, {'modules/filtering', 'modules/cli', 'commands/filter'})
    text = files['commands/filter.md']
    assert set(files) == {'commands/index.md', *(f'commands/{verb}.md' for verb in verbs)}
    assert '<code>--threshold</code>' in text and '../modules/filtering.html#recon_nb.filtering.filter_run' in text and '../tutorials/T04_filtering.html' in text


def test_commands_in_prose_are_links():
    """`recon filter RUN` leads to the page of its verb, but not from that page itself."""
    from steps.symbols import link_listing, link_prose

    assert 'href="../commands/filter.html"' in link_prose('see `recon filter RUN -o good`.', 'tutorials/x', {'commands/filter'})
    assert link_prose('`recon filter RUN`', 'commands/filter', {'commands/filter'}) == '`recon filter RUN`'
    assert link_prose('`recon nothing`', 'x', {'commands/filter'}) == '`recon nothing`'
    listing = link_listing('<div class="highlight"><pre><span></span>recon filter RUN\nmy recon filter\n</pre></div>', 'x', {'commands/filter'})
    assert listing.count('commands/filter.html') == 1


def list_pages(site):
    """Return the HTML pages of a site that are written for readers."""
    return [path for path in sorted(site.rglob('*.html')) if '_static' not in path.parts]


@slow
def test_landing_page(page, address):
    page.goto(address, wait_until='networkidle')
    assert 'recon_nb' in page.title()
    assert page.locator('.hero img').evaluate('image => image.naturalWidth') > 300
    shoot(page, 'landing')
    page.locator('a.card-link', has_text='Tutorials').first.click()
    page.wait_for_selector('h1:has-text("Tutorials")')
    shoot(page, 'tutorials')


@slow
def test_search_for_tilt_finds_the_tilt_pages(page, address, site):
    page.goto(f'{address}/search.html?q=tilt', wait_until='networkidle')
    page.wait_for_selector('ul.search li a')
    found = page.locator('ul.search li a').evaluate_all('links => links.map(link => link.getAttribute("href"))')
    assert any('tiltencoder' in link for link in found), found
    if (site / 'tutorials/T08_subtomograms.html').exists():
        assert any('T08_subtomograms' in link for link in found), found
    shoot(page, 'search')


@slow
def test_symbol_link_lands_on_its_definition(page, address):
    page.goto(f'{address}/modules/ctf.html', wait_until='networkidle')
    link = page.locator('a.symbol[href="../modules/core.html#recon_nb.core.CTFParams"]').first
    link.scroll_into_view_if_needed()
    link.click()
    page.wait_for_url('**/core.html#recon_nb.core.CTFParams')
    definition = page.locator('dt[id="recon_nb.core.CTFParams"]')
    assert definition.is_visible()
    assert 0 <= definition.bounding_box()['y'] < 900
    shoot(page, 'definition')


@slow
def test_names_in_code_are_links(page, address):
    page.goto(f'{address}/tutorials/T00_tour.html', wait_until='networkidle')
    assert page.locator('div.highlight a.symbol').count() + page.locator('div.highlight a.symbol[href^="../"]').count() > 0


@slow
def test_formulas_are_set(page, address):
    page.goto(f'{address}/modules/ctf.html', wait_until='networkidle')
    if page.locator('script[src*="mathjax"]').count() == 0:
        pytest.skip('MathJax is not in this site: npm was not there when it was built')
    page.wait_for_selector('mjx-container')
    assert page.locator('mjx-merror').count() == 0


@slow
def test_dark_mode(page, address):
    page.emulate_media(color_scheme='light')
    page.goto(f'{address}/modules/ctf.html', wait_until='networkidle')
    page.evaluate('localStorage.setItem("mode", "dark"); localStorage.setItem("theme", "dark")')
    page.reload(wait_until='networkidle')
    assert page.evaluate('document.documentElement.dataset.theme') == 'dark'
    background = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert max(map(int, re.findall(r'\d+', background)[:3])) < 80, background
    shoot(page, 'dark')


@slow
def test_the_chooser_leaves_the_routes_that_fit(page, address):
    page.goto(address, wait_until='networkidle')
    routes = page.locator('.route')
    everything = routes.count()
    page.locator('.chooser button', has_text='tilt series').click()
    page.locator('.chooser button', has_text='not known').click()
    shown = page.locator('.route:visible').all_inner_texts()
    assert len(shown) == 1 and 'Not here' in shown[0]
    page.locator('.chooser button', has_text='not known').click()
    assert 1 < page.locator('.route:visible').count() < everything
    page.locator('.chooser button', has_text='tilt series').click()
    assert page.locator('.route:visible').count() == everything


@slow
def test_a_command_leads_to_its_options(page, address):
    page.goto(f'{address}/start.html', wait_until='networkidle')
    page.locator('div.highlight a.symbol', has_text='recon converge').first.click()
    page.wait_for_url('**/commands/converge.html')
    assert page.locator('dl.arguments code', has_text='--epoch').count() == 1 or page.locator('dl.arguments code').count() > 3
    page.locator('nav.bd-links a', has_text='recon train').click()
    assert page.locator('dl.arguments dt:has-text("--epochs") + dd').inner_text().startswith('passes over the data')


kinds = ['index', 'start', 'tutorials/index', 'tutorials/T00_tour', 'methods/index', 'methods/tomodrgn', 'commands/index', 'commands/train', 'modules/index', 'modules/core', 'modules/ctf', 'modules/search', 'modules/explore', 'modules/doctor', 'modules/tomogram',
         'measured', 'benchmarks', 'reference', 'conventions', 'glossary', 'troubleshooting', 'add_decoder', 'contributing', 'changelog', 'genindex', 'search']


@slow
@pytest.mark.parametrize('name', kinds)
@pytest.mark.parametrize(('look', 'width'), [('light', 1280), ('dark', 1280), ('phone', 390)])
def test_every_kind_of_page_opens(page, address, site, name, look, width):
    """No failed request, no error, no other host (the fixture sees to it), and nothing wider than the screen."""
    if not (site / f'{name}.html').exists():
        pytest.skip(f'{name} is not in this site')
    page.set_viewport_size({'width': width, 'height': 844 if look == 'phone' else 900})
    page.emulate_media(color_scheme='dark' if look == 'dark' else 'light')
    page.goto(f'{address}/{name}.html', wait_until='networkidle')
    shoot(page, f'{look}_{name.replace("/", "_")}')
    assert page.evaluate('document.documentElement.dataset.theme') == ('dark' if look == 'dark' else 'light')
    assert page.evaluate('document.documentElement.scrollWidth') <= width


@slow
def test_all_of_a_whole_site_fits_a_phone(page, address, site):
    """Every page of the finished site, not one of each kind."""
    if not os.environ.get('RECON_NB_SITE'):
        pytest.skip('RECON_NB_SITE names no finished site')
    page.set_viewport_size({'width': 390, 'height': 844})
    wide = []
    for path in list_pages(site):
        page.goto(f'{address}/{path.relative_to(site)}', wait_until='load')
        if page.evaluate('document.documentElement.scrollWidth') > 390:
            wide.append(str(path.relative_to(site)))
    assert not wide


@slow
def test_every_link_leads_somewhere(site):
    """No dead link within the site, no anchor that is not there, nothing loaded from elsewhere."""
    pages = {path: read_links(path) for path in list_pages(site)}
    dead = []
    for path, links in pages.items():
        dead += [f'{path.relative_to(site)} loads {item}' for item in links.loaded if urlsplit(item).netloc]
        for item in links.addresses:
            parts = urlsplit(item)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / 'index.html' if target.is_dir() else target
            if not target.exists():
                dead.append(f'{path.relative_to(site)}: {item}')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {'', 'top'}:
                dead.append(f'{path.relative_to(site)}: {item} (no such anchor)')
    assert not dead, '\n'.join(dead[:40])
