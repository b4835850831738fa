"""The report of a run is one file that says all, embeds its pictures, and asks no other host for anything."""
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from test_latent import make_latents, make_run

from recon_nb.analysis import add_to_report, analyze_run
from recon_nb.report import Section, format_value, render_text
from recon_nb.runs import write_json


class Page(HTMLParser):
    """Headings, links, pictures, code and what is opened but never closed."""

    void = {'meta', 'img', 'br', 'hr', 'link', 'input'}

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.anchors, self.links, self.pictures, self.code, self.sources = [], [], set(), [], [], [], []
        self.feed(text)
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.void:
            self.open.append(tag)
        self.anchors |= {attrs['id']} if 'id' in attrs else set()
        self.links += [attrs['href']] if tag == 'a' else []
        self.pictures += [attrs] if tag == 'img' else []
        self.sources += [attrs[name] for name in ('src', 'href', 'action', 'data', 'poster', 'srcset') if name in attrs]
        assert tag not in ('script', 'iframe', 'object', 'embed', 'link') and not any(name.startswith('on') for name in attrs)
        if tag in ('h2', 'code'):
            (self.headings if tag == 'h2' else self.code).append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag, texts in (('h2', self.headings), ('code', self.code)):
            if tag in self.open:
                texts[-1] += data


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """Analyse a run in a folder with a space and an apostrophe; another command adds a section."""
    folder = tmp_path_factory.mktemp("a colleague's runs")
    generator = np.random.default_rng(0)
    run = make_run(folder / 'my run', zdim=2, latents=make_latents(np.concatenate([generator.normal(c, 0.3, (30, 2)) for c in (-2, 2)])))
    command = ['/usr/bin/recon', 'train', "a colleague's/particles.star", '-o', 'my run', '--zdim', '2']
    write_json(run.path / 'inputs.json', {**run.inputs, 'command': shlex.join(command), 'folder': str(folder)})
    analyze_run(run, kmeans=3, umap=False)
    return run, add_to_report(run, Section('Landscape', render_text('Three classes.'), order=550)), command


def test_all_sections_are_there(report):
    run, path, _ = report
    page = Page(path.read_text(encoding='utf-8'))
    assert page.headings == ['Data', 'Settings', 'Training', 'Latents', 'Cluster volumes', 'Principal components', 'Populations', 'Landscape', 'Files', 'Versions']
    assert page.links == [f'#{slug}' for slug in (re.sub(r'\W+', '-', heading.lower()) for heading in page.headings)]
    assert {link[1:] for link in page.links} <= page.anchors


def test_opens_offline(report):
    _, path, _ = report
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert '://' not in text and 'url(' not in text and '@import' not in text
    assert all(source.startswith(('data:image/png;base64,', '#')) for source in page.sources)
    assert "default-src 'none'" in text
    assert len(page.pictures) >= 8 and all(picture['alt'] for picture in page.pictures)


def test_commands_can_be_pasted(report):
    """The lines of the page, as a shell would split them, are the words that were typed."""
    run, path, command = report
    lines = Page(path.read_text(encoding='utf-8')).code[0].splitlines()
    words = [shlex.split(line) for line in lines]
    assert words[0] == ['cd', str(run.path.parent)]
    assert words[1] == ['recon', *command[1:]]
    assert words[2][:3] == ['recon', 'analyze', str(run.path)]


def test_numbers_are_for_readers():
    assert [format_value(x) for x in (35040.0, 7883.2, 0.00012345, 1.5e8, float('nan'), True)] == ['35040', '7883', '0.0001234', '1.5e+08', '–', 'yes']
    assert render_text('a <b> & `--k 30`') == '<p>a &lt;b&gt; &amp; <code>--k 30</code></p>\n'
