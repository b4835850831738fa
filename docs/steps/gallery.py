"""Lists of pages: the tutorials as cards with a picture and a time, the modules in the order of dependence."""
import base64
import html
import io
import re

from PIL import Image

from steps.process import list_pictures
from steps.symbols import relative

groups = [  # first number of a page, heading
    (0, 'Nouns, Fourier transforms, rotations'),
    (10, 'Physics: CTF, dose, the imaging model, volumes'),
    (20, 'Files, data sets, simulation'),
    (29, 'Networks and models'),
    (34, 'The linear subspace'),
    (40, 'Runs and training'),
    (42, 'Poses from nothing'),
    (43, 'The subspace run'),
    (44, 'Is the input right?'),
    (50, 'After the run: latents, volumes, verdicts'),
    (60, 'In the cell'),
    (61, 'In the browser'),
    (62, 'Is the installation right, and the data?'),
    (90, 'The command line'),
]


def make_thumbnail(page, folder, width=480):
    """Write a small picture of a page, its last figure, and return its name; '' where the page has none."""
    pictures = list_pictures(page.notebook)
    if not pictures:
        return ''
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[-1]))).convert('RGB')
    picture.thumbnail((width, width))
    name = page.name.replace('/', '_') + '.png'
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / name, optimize=True)
    return name


def find_times(page):
    """Return what a tutorial says about its time, in a few words."""
    for cell in page.notebook.cells[:4]:
        match = re.search(r'\*\*Time and memory\.\*\*(.*)', cell.source)
        if match:
            scales = re.search(r'(?:core[,:] )?(.{3,40}?) at the scale `ci`[,;] (.{3,50}?) at `tutorial`', match[1])
            return f'{scales[1].split("core")[-1].strip(" ,:")}; in full {scales[2]}' if scales else match[1].split('.')[0].strip()
    return ''


def write_card(page, thumbnail, small, here):
    """Return a card as HTML."""
    picture = f'<div class="picture"><img src="{relative(here, "_images_cards/" + thumbnail).removesuffix(".html")}" alt="" loading="lazy"></div>' if thumbnail else ''
    words = f'<b>{html.escape(page.title)}</b><span>{html.escape(page.subtitle)}</span><small>{html.escape(small)}</small>'
    return f'<a class="card-link" href="{relative(here, page.name)}">{picture}<div class="words">{words}</div></a>'


def write_toctree(names, caption=''):
    """Return a hidden toctree of absolute page names, or of {name: title}."""
    entries = [f'{title} </{name}>' for name, title in names.items()] if isinstance(names, dict) else [f'/{name}' for name in names]
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *entries, '```'])


def write_tutorials(pages, folder):
    """Return the page of the tutorials."""
    tutorials = sorted((page for page in pages if page.name.startswith('tutorials/')), key=lambda page: page.name)
    cards = [write_card(page, make_thumbnail(page, folder), find_times(page), 'tutorials/index') for page in tutorials]
    text = ('# Tutorials\n\nProtocols: a goal, what goes in, numbered steps, the number that you should see at each, and what to do when it differs. '
            'One constant at the top sets the scale; `ci` is what this site ran, `tutorial` is for learning, and with data of your own you change the cell that names the particles. '
            'Open one in JupyterLab (`jupyter lab nbs/tutorials`), or download it from the line under its title.\n\n'
            f'<div class="cards">\n{"".join(cards)}\n</div>\n\n')
    return text + write_toctree([page.name for page in tutorials])


def group_modules(pages):
    """Return [(heading, pages)] of the pages that define a module, in the order of dependence."""
    modules = sorted((page for page in pages if page.module), key=lambda page: page.source)
    starts = [start for start, _ in groups]
    place = {page.name: max(start for start in starts if start <= int(page.source[:2])) for page in modules}
    return [(heading, [page for page in modules if place[page.name] == start]) for start, heading in groups]


def write_modules(pages):
    """Return the page that lists the modules."""
    parts = ['# Modules\n\nEvery page is a notebook that derives its formulas, shows them in pictures and tests them; the package is what the notebooks export. '
             'The order is that of dependence: a module imports only from above. Signatures state the shape and the unit of each argument.']
    for heading, members in group_modules(pages):
        if members:
            rows = [f'| <a href="{page.module}.html"><code>{page.module}</code></a> | {page.title} | {page.subtitle} |' for page in members]
            parts.append('\n'.join([f'## {heading}', '', '| module | | what it does |', '|---|---|---|', *rows]))
            parts.append(write_toctree({page.name: f'{page.module} · {page.title}' for page in members}, caption=heading))
    return '\n\n'.join(parts)


def write_measured(pages, folder):
    """Return the page that lists what was measured."""
    pages = sorted((page for page in pages if not page.module and '/' not in page.name), key=lambda page: (page.name != 'benchmarks', page.name))
    cards = [write_card(page, make_thumbnail(page, folder), '', 'measured') for page in pages]
    return '\n'.join(['# Measured', '', 'Quality and time side by side, each table with the machine and the command that printed it. Numbers elsewhere on this site are read from the same tables.', '',
                      f'<div class="cards">\n{"".join(cards)}\n</div>', '', write_toctree({page.name: page.title for page in pages})])
