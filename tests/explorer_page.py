"""The explorer as a user meets it: a server, a chromium, and a page with a mouse. For tests/test_explore.py, tests/test_jupyter.py and
benchmarks/explore_scale.py; tests/test_site.py opens the same chromium."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from recon_nb.core import Latents
from recon_nb.fourier import Lattice
from recon_nb.models import build_model
from recon_nb.runs import Checkpoint, create_run, make_config, write_json

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--enable-unsafe-swiftshader']
ARTEFACTS = Path(__file__).resolve().parent.parent / 'docs' / '_artefacts'
# anywidget gives a figure two seconds to start; JupyterLab on a machine that is busy with other tests takes longer
PATIENCE = '{ const wait = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = ms => wait(Math.max(ms, 300000)); }'


def list_missing(*packages):
    """Return what the browser tests need and do not find, in words; empty where all is there."""
    missing = [f'the package {name}' for name in ('playwright', *packages) if find_spec(name) is None] + ([] if CHROMIUM else ['chromium'])
    return f"needs {', '.join(missing)} (make test-browser installs the packages; Debian: apt install chromium)" if missing else ''


def make_large_run(path):
    """Return a run of 400,000 synthetic latents: two large groups, and one of 400 particles; its weights are untrained."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(239_600, 4)), rng.normal(size=(160_000, 4)) * 0.5 + [4, 4, 0, 0], rng.normal(size=(400, 4)) * 0.05 + [-5, 6, 0, 0]])
    run = create_run(path, make_config('particles.star', changes={'model.zdim': 4, 'model.encoder_dim': 16, 'model.decoder_dim': 16}))
    model = build_model(Lattice(16, 4.0), zdim=4, encoder_dim=16, decoder_dim=16)
    run.save_checkpoint(Checkpoint(1, 0, dict(model.state_dict()), {'none': torch.zeros(1)}, {}))
    write_json(run.path / 'inputs.json', {'data': {'box': 16, 'pixel_size': 4.0, 'scale': 2.0}})
    mu = torch.as_tensor(z, dtype=torch.float32)
    run.save_latents(1, Latents(mu, torch.zeros_like(mu), torch.arange(len(mu))))
    return run


def find_free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(('localhost', 0))
        return opened.getsockname()[1]


@contextmanager
def start_server(command, log, folder, **environment):
    """Run a command that serves pages until the end of the block; give the address that it prints, secret included."""
    with log.open('w') as written:
        server = subprocess.Popen([sys.executable, *command], stdout=written, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1', **environment})
    try:
        address, deadline = None, time.time() + 300
        while address is None:
            assert server.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.2)
            address = re.search(r'http://(localhost|127\.0\.0\.1)\S+', log.read_text())
        yield address[0]
    finally:
        server.terminate()
        server.wait(60)


def serve_explorer(run, folder, *flags):
    """Serve the explorer of a run by the command line."""
    command = ['-m', 'recon_nb.cli', 'explore', str(run), '--no-browser', '--port', str(find_free_port()), '--device', 'cpu', *flags]
    return start_server(command, Path(folder) / f'{Path(run).name}.log', folder)


@contextmanager
def open_browser():
    """Give a chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Watched:
    """A page that keeps note of requests to other hosts and of errors."""

    def __init__(self, browser, width=1440, height=1000):
        self.elsewhere, self.errors = [], []
        self.page = browser.new_page(viewport={'width': width, 'height': height})
        self.page.on('request', lambda request: None if re.match(r'(http|ws)://(localhost|127\.0\.0\.1)|data:|blob:', request.url) else self.elsewhere.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))

    def wait_for(self, ask, what, seconds=120):
        """Wait until a question is answered with yes; return the seconds it took."""
        start = time.perf_counter()
        while not ask():
            assert time.perf_counter() - start < seconds, f'{what}; {self.page.locator(".widget-html").all_inner_texts()[1:]}; {self.errors}'
            self.page.wait_for_timeout(30)
        return time.perf_counter() - start

    def locate(self, xy):
        """Return where on the screen points of the plane are."""
        return self.page.evaluate('''xy => { const plot = document.querySelector('.js-plotly-plot'), full = plot._fullLayout, box = plot.querySelector('.nsewdrag').getBoundingClientRect();
            return xy.map(([x, y]) => [box.left + full.xaxis.c2p(x), box.top + full.yaxis.c2p(y)]) }''', np.asarray(xy, dtype=float).tolist())

    def draw(self, xy):
        """Draw a line with the mouse."""
        places = self.locate(xy)
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=5)
        self.page.mouse.up()

    def click(self, xy):
        """Click on a point of the plane."""
        [place] = self.locate([xy])
        self.page.mouse.move(place[0] - 3, place[1])
        self.page.mouse.move(*place)
        self.page.wait_for_timeout(300)
        self.page.mouse.click(*place)

    def press(self, text):
        """Press a button."""
        self.page.get_by_role('button', name=text, exact=True).click()

    def take(self, tool):
        """Take another tool, and wait until the mouse has it."""
        self.press(tool)
        modes = {'lasso': 'lasso', 'box': 'select', 'polygon': False, 'line': 'drawopenpath'}
        self.wait_for(lambda: self.page.evaluate("document.querySelector('.js-plotly-plot')._fullLayout.dragmode") == modes[tool], tool)

    def choose(self, label, option):
        """Choose from a list."""
        self.page.locator('.widget-dropdown', has=self.page.get_by_text(label, exact=True)).locator('select').select_option(option)

    def keep(self, name):
        """Keep a picture of the page."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f'{name}.png', full_page=True)


class ExplorerPage(Watched):
    """A page of the explorer."""

    def __init__(self, browser, address, **size):
        super().__init__(browser, **size)
        self.page.goto(address, wait_until='commit', timeout=300_000)
        self.page.wait_for_selector('.js-plotly-plot .nsewdrag', state='attached', timeout=300_000)
        self.page.wait_for_timeout(2000)

    def get_report(self):
        """Return what is said of the marks."""
        return self.page.locator('.recon-report').inner_text()

    def get_support(self):
        """Return what is said of the volume."""
        return self.page.locator('.recon-support').inner_text()

    def get_note(self, kind):
        """Return the messages of a kind: note, good, poor."""
        return ' '.join(self.page.locator(f'.recon-{kind}').all_inner_texts())

    def count_marked(self):
        """Return how many particles the page says are marked."""
        found = re.match(r'([\d,]+) of .* marked', self.get_report())
        return int(found[1].replace(',', '')) if found else 0

    def get_images(self):
        """Return the addresses of the pictures on the page."""
        return self.page.locator('img.widget-image').evaluate_all('images => images.filter(i => i.checkVisibility({visibilityProperty: true})).map(i => i.src)')

    def measure(self, image):
        """Return the standard deviation of a picture, 0 to 255."""
        return self.page.evaluate('''async src => { const i = new Image(); i.src = src; await i.decode(); const c = document.createElement('canvas'); c.width = i.width; c.height = i.height;
            const g = c.getContext('2d'); g.drawImage(i, 0, 0); const d = g.getImageData(0, 0, i.width, i.height).data; let s = 0, q = 0, n = d.length / 4;
            for (let k = 0; k < d.length; k += 4) { s += d[k]; q += d[k] * d[k] } return Math.sqrt(q / n - (s / n) ** 2) }''', image)

    def count_triangles(self):
        """Return how many triangles each surface has."""
        return self.page.evaluate("document.querySelectorAll('.js-plotly-plot')[1]._fullData.map(mesh => (mesh.i || []).length)")
