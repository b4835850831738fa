"""The explorer on tilt series, on a large cloud, and where it refuses; its laws stand in the notebooks on clouds, surfaces and explore."""
from importlib.util import find_spec

import numpy as np
import pytest
from test_latent import make_latents, make_run

from recon_nb.clouds import measure_support
from recon_nb.core import ConfigError, InputError, RunError
from recon_nb.explore import explore_run, load_exploration, make_volumes
from recon_nb.runs import make_config
from recon_nb.simulate import make_phantom
from recon_nb.subspace import run_subspace
from recon_nb.tiltsimulation import TiltScheme, list_dose_symmetric, simulate_tilts, write_tilts

SETTINGS = {'model.rank': 4, 'model.zdim': 2, 'model.manifold': 'linear', 'subspace.test': False, 'subspace.rounds': 0}


@pytest.fixture(scope='module')
def large_run(tmp_path_factory):
    """Return a run of 400,000 synthetic latents: two large groups, and one of 400 particles."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(239_600, 4)), rng.normal(size=(160_000, 4)) * 0.5 + [4, 4, 0, 0], rng.normal(size=(400, 4)) * 0.05 + [-5, 6, 0, 0]])
    return make_run(tmp_path_factory.mktemp('large') / 'run', zdim=4, latents=make_latents(z))


def test_a_run_of_tilt_series_is_explored(tmp_path):
    """Every particle has one row, whatever the number of its images; images, volumes and selections follow."""
    scheme = TiltScheme(list_dose_symmetric(30, 10), 6.0)
    star = write_tilts(tmp_path / 'images', simulate_tilts(make_phantom('ribosome', 24), 60, scheme=scheme, snr=0.5, seed=0))
    run = run_subspace(tmp_path / 'run', make_config(str(star), changes=SETTINGS))
    found = load_exploration(run)
    assert len(found.table) == 60 and not found.missing
    assert {'defocus', 'n_images', 'dose', 'tomogram'} <= set(found.colors)
    assert (found.table.n_images == len(scheme.angles)).all()


def test_support_of_a_large_cloud(large_run):
    """The radius from a sample is that of all; the small group is a place of its own."""
    found = load_exploration(large_run)
    sparse, dense = measure_support(found.z, n_asked=2000), measure_support(found.z, n_asked=20_000)
    assert sparse.radius == pytest.approx(dense.radius, rel=0.05)
    [volume] = make_volumes(found, [399_800])
    assert volume.support > sparse.floor


def test_what_cannot_be_explored_is_refused_before_a_page_opens(tmp_path):
    with pytest.raises(ConfigError if find_spec('voila') is None else RunError, match='oila' if find_spec('voila') is None else 'not a run'):
        explore_run(str(tmp_path))
    with pytest.raises(InputError, match='homogeneous'):
        load_exploration(make_run(tmp_path / 'flat', zdim=0))
