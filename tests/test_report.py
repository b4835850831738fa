"""The report of a run is one file that says all, embeds its pictures, and asks no other host for anything."""
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from test_latent import make_latents, make_run

from recon_nb.analysis import add_to_report, analyze_run
from recon_nb.report import Section, format_value, render_text
from recon_nb.runs import append_log, write_json


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
    assert page.headings == ['In short', 'Data', 'Settings', 'Training', 'Convergence', 'Latents', 'Cluster volumes', 'Principal components', 'Populations', 'Landscape', 'Files', 'Versions']
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
    lines = next(code for code in Page(path.read_text(encoding='utf-8')).code if code.startswith('cd ')).splitlines()
    words = [shlex.split(line) for line in lines]
    assert words[0] == ['cd', str(run.path.parent)]
    assert words[1] == ['recon', *command[1:]]
    assert words[2][:3] == ['recon', 'analyze', str(run.path)]


def test_what_was_not_asked_is_said(report):
    """No verdict on convergence, none on heterogeneity; and which commands give them."""
    run, path, _ = report
    text = path.read_text(encoding='utf-8')
    part = lambda title: text.partition(f'<h2>{title}</h2>')[2].partition('</section>')[0]
    assert 'Not judged' in part('Convergence') and 'recon converge' in part('Convergence')
    assert 'was not asked in this run' in part('In short') and 'recon subspace' in part('In short')
    assert f'<h1>{run.path.name}, epoch 3 of 20</h1>' in text


def test_the_answer_of_converge_takes_the_place_of_the_note(report):
    run, _, _ = report
    page = add_to_report(run, Section('Convergence', render_text('Use epoch 3.'), order=250)).read_text(encoding='utf-8')
    assert 'Use epoch 3.' in page and 'Not judged' not in page
    folder = run.analysis_dir(3) / 'convergence'
    folder.mkdir()
    (folder / 'verdict.json').write_text('{}')
    page = analyze_run(run, kmeans=3, umap=False).read_text(encoding='utf-8')  # once more: it stays
    assert 'Use epoch 3.' in page and 'Not judged' not in page


def test_tables_speak_in_words_and_units(report):
    _, path, _ = report
    heads = re.findall('<th>(.*?)</th>', path.read_text(encoding='utf-8').partition('<h2>Populations</h2>')[2])
    assert not [head for head in heads if '_' in head and head != 'recon_nb'], heads
    sizes = re.findall(r'<td>([\d.]+ (?:bytes|kB|MB))</td>', path.read_text(encoding='utf-8'))
    assert len(sizes) > 10 and not [size for size in sizes if float(size.split()[0]) == 0]


@pytest.mark.parametrize(('kl', 'is_doubted'), [(0.4, True), (4.0, False)])
def test_a_run_that_learnt_nothing_says_so(tmp_path, caplog, kl, is_doubted):
    """On the screen and first in the report: latents with less than a nat sort nothing."""
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(np.random.default_rng(0).normal(size=(60, 2))))
    append_log(run, {'epoch': 3, 'total': 1.0, 'recon': 0.9, 'kl': kl})
    with caplog.at_level('WARNING', logger='recon_nb'):
        text = analyze_run(run, kmeans=3, umap=False).read_text(encoding='utf-8')
    said = text.partition('<h2>In short</h2>')[2].partition('</section>')[0]
    for words in (said, caplog.text):
        assert ('learnt next to nothing' in words and '0.4 nats a particle' in words and '--resume' in words) == is_doubted, words


def test_numbers_are_for_readers():
    assert [format_value(x) for x in (35040.0, 7883.2, 0.00012345, 1.5e8, float('nan'), True)] == ['35040', '7883', '0.0001234', '1.5e+08', '–', 'yes']
    assert render_text('a <b> & `--k 30`') == '<p>a &lt;b&gt; &amp; <code>--k 30</code></p>\n'
