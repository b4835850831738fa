"""The explorer in a real browser: drawing marks particles, clicking makes volumes, what is saved is what was marked.

What the page does with plain data is tested in the notebooks on clouds, surfaces and explore; here it is driven with the mouse. Screenshots go to docs/_artefacts.
"""
import numpy as np
import pandas as pd
import pytest
from explorer_page import ExplorerPage, list_missing, make_large_run, open_browser, serve_explorer
from test_latent import make_run

from recon_nb.clouds import select_inside
from recon_nb.core import ConfigError, InputError, RunError, Selection
from recon_nb.explore import explore_run, find_centers, load_exploration, make_volumes
from recon_nb.files import read_particles
from recon_nb.latent import find_support_radius
from recon_nb.runs import make_config
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation
from recon_nb.subspace import run_subspace
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts

needs_browser = pytest.mark.skipif(bool(list_missing('voila')), reason=list_missing('voila'))
SETTINGS = {'model.rank': 4, 'model.zdim': 2, 'model.manifold': 'linear', 'subspace.test': False, 'subspace.rounds': 0}
SCHEME = TiltScheme(list_dose_symmetric(30, 10), 6.0)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Return a run of 2,000 particles of three states."""
    folder = tmp_path_factory.mktemp('explore')
    simulated = simulate_stack(make_phantom('ribosome', 32), 2000, names=['small', 'large', 'both'], weights=[1, 2, 2], snr=0.5, seed=0)
    return run_subspace(folder / 'run', make_config(str(write_simulation(folder / 'images', simulated)), changes=SETTINGS))


@pytest.fixture(scope='module')
def tilt_run(tmp_path_factory):
    """Return a run of 60 particles of a tilt series."""
    folder = tmp_path_factory.mktemp('tilts')
    star = write_tilts(folder / 'images', simulate_tilts(make_phantom('ribosome', 24), 60, scheme=SCHEME, snr=0.5, seed=0))
    return run_subspace(folder / 'run', make_config(str(star), changes=SETTINGS))


@pytest.fixture(scope='module')
def large_run(tmp_path_factory):
    return make_large_run(tmp_path_factory.mktemp('large') / 'run')


@pytest.fixture(scope='module')
def browser():
    with open_browser() as opened:
        yield opened


def surround(centre, radius, n=40):
    """Return the corners of an ellipse."""
    angle = np.linspace(0, 2 * np.pi, n)
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


# ---------------------------------------------------------------- without a browser

def test_a_run_of_tilt_series_is_explored(tilt_run):
    """Every particle has one row, whatever the number of its images; images, volumes and selections follow."""
    found = load_exploration(tilt_run)
    assert len(found.table) == 60 and not found.missing
    assert {'defocus', 'n_images', 'dose', 'tomogram'} <= set(found.colors)
    assert (found.table.n_images == len(SCHEME.angles)).all()


def test_support_of_a_large_cloud(large_run):
    """The radius from a sample is that of all; the centre of a group is well supported, the space between groups is not, and a small group is a place of its own."""
    found = load_exploration(large_run)
    assert found.support.radius == pytest.approx(find_support_radius(found.z, max_points=80_000), rel=0.05)
    assert 300 < found.support.typical < 500  # one in a thousand
    in_large, between = found.support.count(np.array([[0, 0, 0, 0], [-3, 4, 0, 0]]))
    assert in_large > found.support.typical > found.support.floor > between
    [volume] = make_volumes(found, [399_800])
    assert volume.support > 100


def test_what_cannot_be_explored_is_refused_before_a_page_opens(large_run, tmp_path, monkeypatch):
    """A mistake about the run is named first; then, for a run that can be explored, what is not installed."""
    flat = make_run(tmp_path / 'flat', zdim=0)
    monkeypatch.setattr('recon_nb.explore.find_spec', lambda name: None)
    with pytest.raises(RunError, match='not a run'):
        explore_run(str(tmp_path))
    with pytest.raises(InputError, match='homogeneous'):
        explore_run(str(flat.path))
    with pytest.raises(InputError, match='homogeneous'):
        load_exploration(flat)
    with pytest.raises(ConfigError, match=r'recon_nb\[app\]'):
        explore_run(str(large_run.path))


# ---------------------------------------------------------------- in the browser

@needs_browser
def test_drawing_and_clicking(run, browser, tmp_path):
    """A lasso marks what it surrounds, images follow, a click makes a volume, sections follow, the saved selection is what was marked."""
    found = load_exploration(run)
    plane = found.table[['pc1', 'pc2']].to_numpy()
    groups, spread = plane[find_centers(found.z, 3)], plane.std(axis=0)
    with serve_explorer(run.path, tmp_path) as address:
        page = ExplorerPage(browser, address)
        assert page.get_report().startswith('2,000 particles') and page.get_images() == []

        lasso = surround(groups[0], spread * 0.3)
        page.draw(lasso)
        page.wait_for(lambda: page.count_marked() > 0, 'the lasso marks')
        n, expected = page.count_marked(), select_inside(plane, [lasso])
        assert abs(n - expected.sum()) <= 0.02 * len(plane) and n > 50, 'what the mouse drew, to a pixel'
        page.wait_for(lambda: len(page.get_images()) == 1, 'images of the marked particles')
        [first] = page.get_images()
        assert page.measure(first) > 20
        page.press('other images')
        page.wait_for(lambda: page.get_images() and page.get_images()[0] != first, 'other images')
        page.press('save selection')
        page.wait_for(lambda: 'particles written' in page.get_note('good'), 'the selection is saved')
        saved = Selection.load(run.path / 'selections' / 'picked.json')
        marked = np.isin(found.table.particle, saved.particles)
        assert len(saved) == n and np.mean(marked != expected) < 0.02
        assert read_particles(run.path / 'selections' / 'picked.star').n_particles == n
        page.press('save selection')
        page.wait_for(lambda: 'exists' in page.get_note('poor'), 'the name is taken, which is said')

        page.click(groups[1])
        page.wait_for(lambda: 'near this volume' in page.get_support(), 'a click makes a volume, with its support')
        page.wait_for(lambda: len(page.get_images()) == 2, 'sections')
        sections = page.get_images()
        page.click(groups[2])
        page.wait_for(lambda: len(set(page.get_images()) - set(sections)) == 1, 'another click changes the sections')
        page.wait_for(lambda: page.count_triangles()[0] > 100, 'the surface')
        page.choose('minus', label_of(page, 'minus', 1))
        page.wait_for(lambda: len(page.get_support().strip().splitlines()) == 2 and page.count_triangles()[1] > 0, 'a difference has two supports, and a surface of what is lost')
        page.choose('minus', 'nothing')

        page.take('line')
        page.draw(groups[[0, 1, 2]])
        page.wait_for(lambda: 'on the line' in page.get_support(), 'volumes along a line that begins inside the lasso')
        assert page.count_marked() == n, 'a line marks nothing'
        page.press('volumes at centres of')
        page.wait_for(lambda: 'cluster 1' in page.get_support(), 'volumes at the centres of clusters')
        page.press('save volumes')
        page.wait_for(lambda: 'ChimeraX' in page.get_note('good'), 'a session is written')
        written = pd.read_csv(run.analysis_dir(found.epoch) / 'explore' / 'session' / 'volumes.csv')
        assert len(written) == 2 + 6 + 6 and (written.support > 0).all()
        page.keep('explore')
        assert (page.elsewhere, page.errors) == ([], [])
        page.page.close()


def label_of(page, description, number):
    """Return the text of an option of a list, counted from 0."""
    return page.page.locator('.widget-dropdown', has=page.page.get_by_text(description, exact=True)).locator('option').nth(number).inner_text()


@needs_browser
def test_outlines_combine(run, browser, tmp_path):
    """A box adds to a polygon, both count once; cs is written; nothing is wider than a narrow window; a dark page is dark."""
    found = load_exploration(run)
    plane = found.table[['pc1', 'pc2']].to_numpy()
    groups, spread = plane[find_centers(found.z, 3)], plane.std(axis=0)
    with serve_explorer(run.path, tmp_path, '--dark') as address:
        page = ExplorerPage(browser, address, width=1000, height=900)
        page.take('polygon')
        triangle = groups[0] + spread * np.array([[-0.5, -0.5], [0.5, -0.5], [0, 0.6]])
        for corner in triangle:
            page.click(corner)
            page.page.wait_for_timeout(800)
        page.press('close polygon')
        page.wait_for(lambda: page.count_marked() > 0, 'the polygon marks')
        first, inside = page.count_marked(), select_inside(plane, [triangle])
        assert abs(first - inside.sum()) <= 0.02 * len(plane)
        page.choose('an outline makes a selection:', 'add')
        page.take('box')
        low, high = groups[0] - spread * 0.2, groups[0] + spread * 0.6
        page.draw([low, high])
        page.wait_for(lambda: page.count_marked() != first, 'the box adds')
        both = inside | ((plane > low) & (plane < high)).all(axis=1)
        assert abs(page.count_marked() - both.sum()) <= 0.02 * len(plane)
        page.page.locator('.widget-text input').first.fill('both')
        page.page.locator('select', has_text='json').select_option('cs')
        page.press('save selection')
        page.wait_for(lambda: 'both.cs' in page.get_note('good'), 'saved for cryoSPARC')
        assert read_particles(run.path / 'selections' / 'both.cs').n_particles == len(Selection.load(run.path / 'selections' / 'both.json')) == page.count_marked()
        page.choose('colour', 'defocus')
        page.wait_for(lambda: 'defocus (Å)' in page.page.locator('.js-plotly-plot').first.inner_text(), 'the colour bar has its unit')
        assert page.page.evaluate('document.documentElement.scrollWidth <= document.documentElement.clientWidth')
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 60)"), 'dark'
        page.keep('explore_narrow_dark')
        assert (page.elsewhere, page.errors) == ([], [])
        page.page.close()


@needs_browser
def test_tilt_series_whose_images_have_moved(tilt_run, browser, tmp_path):
    """The page says in a line that there are no images and what to do; cloud, volumes and selections work."""
    images = sorted(tilt_run.path.parent.rglob('*.mrcs'))
    for path in images:
        path.rename(path.with_suffix('.away'))
    try:
        with serve_explorer(tilt_run.path, tmp_path) as address:
            page = ExplorerPage(browser, address)
            assert 'datadir' in page.get_note('note') and '.mrcs' in page.get_note('note')
            page.choose('colour', 'norm')
            page.choose('an outline makes a selection:', 'add')
            table = load_exploration(tilt_run).table
            plane = table[['pc1', 'pc2']].to_numpy()
            page.draw(surround(np.median(plane, axis=0), plane.std(axis=0)))
            page.wait_for(lambda: page.count_marked() > 5, 'particles are marked')
            page.click(plane[3])
            page.wait_for(lambda: 'near this volume' in page.get_support(), 'a volume')
            page.wait_for(lambda: len(page.get_images()) == 1, 'sections alone')
            page.press('save selection')
            page.wait_for(lambda: 'picked.star' in page.get_note('good'), 'saved')
            page.keep('explore_moved')
            assert (page.elsewhere, page.errors) == ([], [])
            page.page.close()
    finally:
        for path in images:
            path.with_suffix('.away').rename(path)


@needs_browser
def test_a_lasso_on_400_000_particles(large_run, browser, tmp_path):
    """All particles are asked, not those drawn as dots; benchmarks/explore_scale.py measures the time."""
    plane = load_exploration(large_run).table[['pc1', 'pc2']].to_numpy()
    with serve_explorer(large_run.path, tmp_path) as address:
        page = ExplorerPage(browser, address)
        assert page.get_report().startswith('400,000 particles')
        for centre, radius in ((plane[-400:].mean(axis=0), 0.6), (np.median(plane, axis=0), 2.0)):
            lasso, before = surround(centre, radius, 60), page.count_marked()
            page.draw(lasso)
            page.wait_for(lambda before=before: page.count_marked() not in (0, before), 'the lasso marks')
            expected = int(select_inside(plane, [lasso]).sum())
            assert abs(page.count_marked() - expected) <= 0.02 * expected + 4
        page.click(plane[-1])
        page.wait_for(lambda: 'near this volume' in page.get_support(), 'a volume')
        page.keep('explore_large')
        assert (page.elsewhere, page.errors) == ([], [])
        page.page.close()
