"""T04 (filtering) driven in JupyterLab: run all, draw around particles with the mouse, save; what is saved is what was drawn around. Screenshots go to docs/_artefacts."""
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from explorer_page import PATIENCE, Watched, find_free_port, list_missing, open_browser, start_server

from recon_nb.clouds import select_inside
from recon_nb.core import Selection
from recon_nb.filtering import tabulate_particles
from recon_nb.runs import open_run

needs_lab = pytest.mark.skipif(bool(list_missing('jupyterlab', 'anywidget')), reason=list_missing('jupyterlab', 'anywidget'))
TUTORIALS = Path(__file__).resolve().parent.parent / 'nbs' / 'tutorials'


def run_all(page):
    """Run all cells from the menu; try again until a cell is at work, since the kernel may not be ready yet."""
    for _ in range(20):
        page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
        page.locator('.lm-Menu-itemLabel', has_text=re.compile(r'^Run All Cells$')).click()
        page.wait_for_timeout(3000)
        if page.get_by_text(re.compile(r'^\[(\*|\d+)\]:$')).count():
            return
    raise AssertionError('no cell runs')


def locate_picker(page):
    """Scroll to the picker; JupyterLab makes the cells below only when they come into view."""
    for _ in range(1200):
        plot = page.locator('.js-plotly-plot .nsewdrag')
        if plot.count():
            plot.first.scroll_into_view_if_needed()
            page.wait_for_timeout(1500)
            return
        page.evaluate("document.querySelector('.jp-WindowedPanel-outer, .jp-Notebook').scrollBy(0, 500)")
        page.wait_for_timeout(500)
    raise AssertionError('there is no picker')


@needs_lab
def test_filtering_by_lasso(tmp_path):
    home, work = tmp_path / 'notebooks', tmp_path / 'work'
    home.mkdir()
    work.mkdir()
    shutil.copy(TUTORIALS / 'T04_filtering.ipynb', home)  # JupyterLab saves what it opens
    command = ['-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={find_free_port()}', f'--notebook-dir={home}', '--LabApp.news_url=None']
    separate = {name: str(tmp_path / name.lower()) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR')}
    with start_server(command, tmp_path / 'lab.log', tmp_path, TMPDIR=str(work), **separate) as address, open_browser() as browser:
        watched = Watched(browser)
        page = watched.page
        page.add_init_script(PATIENCE)
        page.goto(re.sub(r'/lab.*?\?', '/lab/tree/T04_filtering.ipynb?', address), wait_until='commit', timeout=300_000)
        page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=300_000)
        run_all(page)
        watched.wait_for(lambda: list(work.glob('*/pilot/selections/good.star')), 'the tutorial runs; its code marks particles too, so the mouse waits for its end', 900)
        locate_picker(page)

        [found] = work.glob('*/pilot')
        table = tabulate_particles(open_run(found), device='cpu')
        plane = table[['contrast', 'residual']].to_numpy()
        angle = np.linspace(0, 2 * np.pi, 40)
        lasso = np.array([1.0, 1.0]) + np.array([0.3, 0.5]) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        report = page.get_by_text('particles are marked')
        before = report.inner_text()
        watched.draw(lasso)
        watched.wait_for(lambda: report.inner_text() != before, 'the lasso marks')
        said = report.inner_text()
        page.wait_for_timeout(2000)
        watched.keep('jupyterlab')
        watched.press('save selection')
        watched.wait_for(lambda: page.get_by_text('particles written').count(), 'the selection is saved')

        saved = Selection.load(found / 'selections' / 'by_lasso.json')
        marked, expected = np.isin(table.particle, saved.particles), select_inside(plane, [lasso])
        assert len(saved) == int(said.split()[0].replace(',', '')) > 100
        assert np.mean(marked != expected) < 0.02, 'what the mouse drew, to a pixel'
        assert saved.n_total == len(table)
