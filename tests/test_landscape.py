"""Landscapes, walks and agreement at their edges: memory, empty regions, other grids, other files.

The laws stand in the notebooks; here is what needs many volumes, a run folder, or real files.
"""
import gc
import json
import tracemalloc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from test_latent import make_latents, make_run

from recon_nb import agreement, landscape
from recon_nb.agreement import compare_labels, compare_runs, list_image_names, name_particles, read_labels
from recon_nb.analysis import analyze_run, export_traversal, export_volumes, write_path, write_volume_set
from recon_nb.core import InputError, Volume
from recon_nb.files import read_volume, write_volume
from recon_nb.fourier import Lattice
from recon_nb.landscape import compute_landscape, map_landscape, run_volume_pca, store_voxels, write_landscape
from recon_nb.latent import build_neighbor_graph, count_support, find_support_floor, generate_volumes, traverse_graph, traverse_pc
from recon_nb.runs import create_run, make_config


# ---------------------------------------------------------------- a walk over an empty region

def make_bridged_ring(zdim=2, n=1500, seed=0):
    """Return a ring of radius 2 (n, zdim), a row of single particles straight across it, just near enough to each other, and the rows of two opposite ends."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, n)
    ring = 0.05 * rng.normal(size=(n, zdim))
    ring[:, :2] += 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    planks = np.zeros((int(4.1 / build_neighbor_graph(ring, mean_neighbors=12, max_neighbors=24).threshold) + 1, zdim))
    planks[:, 0] = np.linspace(-1.95, 1.95, len(planks))
    support = count_support(ring, ring)
    ends = [int(np.where(np.linalg.norm(ring[:, :2] - [x, 0], axis=1) < 0.3, support, -1).argmax()) for x in (-2, 2)]
    return np.concatenate([ring, planks]), ends


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('zdim, n', [(2, 1500), (4, 1500), (8, 3000)])
def test_walk_is_on_data_and_says_where_it_hangs_in_the_air(zdim, n, seed):
    """Proof 7: every node is a particle; over the empty middle support is lower, and called poor."""
    points, ends = make_bridged_ring(zdim, n, seed=seed)
    path = traverse_graph(points, ends, labels=['closed', 'open'], mean_neighbors=12, max_neighbors=24)
    assert (path.row >= 0).all() and (path.z == points[path.row]).all()
    inside = np.linalg.norm(path.z[:, :2], axis=1) < 1.6
    assert inside.sum() > 10, 'the way across is shorter than the way round'
    assert path.support[inside].max() < np.median(count_support(points, points[:n]))
    assert path.support[inside].max() < min(path.support[0], path.support[-1])
    assert path.poor_support[inside].mean() > 0.8
    round_trip = traverse_graph(points[:n], ends, mean_neighbors=12, max_neighbors=24)  # without the planks it walks round
    assert np.linalg.norm(round_trip.z[:, :2], axis=1).min() > 1.6
    assert round_trip.poor_support.mean() < 0.5 and np.median(round_trip.support) > path.support[inside].max()
    straight = traverse_pc(points[:n], 0)
    assert straight.poor_support[np.linalg.norm(straight.z[:, :2], axis=1) < 1.5].all()


def test_few_particles_of_a_cloud_are_poorly_supported():
    """The bound is the particles' own: about one in ten lies below it where counts are large."""
    cloud = np.random.default_rng(0).normal(size=(4000, 2))
    path = traverse_pc(cloud, 0, on_data=True, radius=0.5)
    floor = find_support_floor(cloud, 0.5)
    assert path.floor == floor > 5
    assert find_support_floor(cloud, 0.5, n_asked=500) == pytest.approx(floor, rel=0.3)


def test_walk_of_a_run_carries_names_and_support(tmp_path):
    points, ends = make_bridged_ring()
    latents = make_latents(points, first=100)
    run = make_run(tmp_path / 'run', zdim=2, latents=latents)
    pd.DataFrame({'state': ['left', 'right'], 'particle': [100 + e for e in ends]}).to_csv(tmp_path / 'states.csv', index=False)
    out = export_traversal(run, tmp_path / 'walk', ['left', 'right'], names=tmp_path / 'states.csv', mean_neighbors=12, max_neighbors=24, device='cpu', box=8)
    table = pd.read_csv(out / 'volumes.csv')
    assert table.anchor.dropna().tolist() == ['left', 'right']
    known = {int(p): z for p, z in zip(latents.particle, latents.mu.numpy())}
    np.testing.assert_allclose(table[['z0', 'z1']], np.stack([known[p] for p in table.particle]), atol=1e-6)
    assert table.poor_support.any() and not table.poor_support.all() and len(list(out.glob('vol_*.mrc'))) == len(table)


def test_a_jump_is_explained_where_it_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(60, 2)) * 0.3 + at for at in ([0, 0], [9, 0])])
    for bridge, ends in ((True, [0, 100]), (False, [0, 30])):
        path = traverse_graph(points, ends, mean_neighbors=20, max_neighbors=30, bridge=bridge)
        page = write_path(tmp_path / 'walk', path, lambda z: generate_volumes(Blobs(8), z), latents=make_latents(points))
        assert ('a dashed line is a jump' in page) == bridge


def test_every_set_of_volumes_says_its_support(tmp_path):
    """Clusters, components, chosen points, walks, landscapes: no volume is without its number."""
    rng = np.random.default_rng(0)
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(rng.normal(size=(60, 2))))
    report = analyze_run(run, kmeans=4, n_points=3, umap=False, device='cpu')
    map_landscape(run, k=12, n_clusters=3, device='cpu', mask=write_ball(tmp_path / 'mask.mrc', 16, 4.0))
    export_volumes(run, tmp_path / 'free', z=[[0.0, 0.0], [9.0, 9.0]], device='cpu')
    export_volumes(run, tmp_path / 'chosen', particles=[3], device='cpu')
    export_traversal(run, tmp_path / 'walk', [0, 1], mean_neighbors=8, device='cpu')
    sets = [*report.parent.glob('*/volumes.csv'), *report.parent.glob('landscape/volumes/volumes.csv'), *report.parent.glob('landscape/classes/volumes.csv'), *tmp_path.glob('*/volumes.csv')]
    assert len(sets) >= 8
    for path in sets:
        table = pd.read_csv(path)
        assert {'volume', 'particle', 'support', 'poor_support'} <= set(table.columns), path
        assert (table.support[table.particle >= 0] >= 1).all()
    assert pd.read_csv(tmp_path / 'free' / 'volumes.csv').poor_support.tolist()[1]


# ---------------------------------------------------------------- memory

def write_ball(path, box, pixel_size):
    """Write a mask, a ball of a third of the box, and return its path."""
    axis = torch.arange(box) - box // 2
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    write_volume(path, Volume((radius < box / 3).float(), pixel_size))
    return str(path)


class Blobs(torch.nn.Module):
    """A decoder whose volumes are a core and two blobs, present as z says; counts what it makes and in what blocks."""

    def __init__(self, box):
        super().__init__()
        self.lattice, self.blocks = Lattice(box, 4.0), []
        axis = torch.arange(box) - box / 2
        ball = lambda x, size: torch.exp(-((axis - x)[None, None] ** 2 + axis[:, None, None] ** 2 + axis[None, :, None] ** 2) / (2 * (size * box) ** 2))  # noqa: E731
        self.parts = torch.stack([ball(0, 0.12), ball(0.3 * box, 0.06), ball(-0.3 * box, 0.06)])

    def decode_volumes(self, z, box, *, bf16=False):
        self.blocks.append(len(z))
        return self.parts[0] + torch.einsum('nb,bzyx->nzyx', z[:, :2], self.parts[1:])


def test_volumes_of_a_landscape_are_never_all_in_memory(tmp_path, monkeypatch):
    """At most one block of decoded volumes and a few read ones live at a time, however many there are."""
    alive, most = weakref.WeakSet(), []

    def watch(volume):
        alive.add(volume)
        gc.collect(0)
        most.append(len(alive))
        return volume

    class Watched(Volume):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    renew = lambda v: watch(Watched(v.data, v.pixel_size, v.origin))  # noqa: E731
    monkeypatch.setattr(landscape, 'read_volume', lambda path: renew(read_volume(path)))
    model, rng = Blobs(12), np.random.default_rng(0)
    latents = make_latents(np.concatenate([rng.normal(size=(400, 2)) * 0.05 + at for at in ([0, 0], [1, 0], [1, 1])]))
    decode = lambda points: (renew(v) for v in generate_volumes(model, points))  # noqa: E731
    found, _ = compute_landscape(tmp_path, latents, decode, k=150)
    assert len(list((tmp_path / 'volumes').glob('vol_*.mrc'))) == 150
    assert max(model.blocks) <= 8 and sum(model.blocks) == 150
    assert max(most) <= 4 and len(most) >= 450  # decoded, masked, stored
    assert found.classes.n_classes == 3
    assert not list(tmp_path.glob('.voxels*'))


def test_components_are_computed_within_a_budget(tmp_path):
    """Voxels of 200 volumes take 50 MB; the components of them 3 MB, with the same result."""
    n_volumes, box = 200, 40
    axis = torch.arange(box) - box // 2
    mask = Volume((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 400).float(), 1.0)
    make = lambda: (Volume(torch.randn(box, box, box, generator=torch.Generator().manual_seed(i)) + i % 3, 1.0) for i in range(n_volumes))  # noqa: E731
    voxels = store_voxels(tmp_path / 'voxels.npy', make(), mask, n_volumes=n_volumes)
    full = run_volume_pca(voxels, 4)
    tracemalloc.start()
    lean = run_volume_pca(voxels, 4, budget=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert voxels.nbytes > 25e6 and peak < 6e6
    np.testing.assert_allclose(lean.coordinates, full.coordinates, atol=1e-9)


def test_five_hundred_volumes_are_streamed(tmp_path):
    """The folder of a large set has one row and one file a volume; pictures show thirty of them."""
    rng, model = np.random.default_rng(0), Blobs(8)
    z = rng.normal(size=(500, 2))
    pictures = write_volume_set(tmp_path / 'many', generate_volumes(model, z), pd.DataFrame({'particle': np.arange(500), 'support': 1, 'z0': z[:, 0], 'z1': z[:, 1]}))
    assert len(list((tmp_path / 'many').glob('vol_*.mrc'))) == 500 and len(pictures) == 6
    assert max(model.blocks) <= 8
    last = read_volume(tmp_path / 'many' / 'vol_499.mrc')
    torch.testing.assert_close(last.data, next(generate_volumes(model, z[499:])).data)


# ---------------------------------------------------------------- a landscape of a run

def test_landscape_again_is_the_same_and_leaves_nothing_behind(tmp_path):
    rng = np.random.default_rng(0)
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(rng.normal(size=(80, 2)), first=5))
    mask = write_ball(tmp_path / 'mask.mrc', 16, 4.0)
    folder = map_landscape(run, k=20, n_clusters=4, mask=mask, device='cpu').parent / 'landscape'
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.suffix in ('.csv', '.mrc', '.json')}
    map_landscape(run, k=20, n_clusters=4, mask=mask, device='cpu')
    assert before == {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.suffix in ('.csv', '.mrc', '.json')}
    labels, classes = pd.read_csv(folder / 'labels.csv'), pd.read_csv(folder / 'classes.csv')
    assert labels.particle.tolist() == list(range(5, 85)) and labels.label.value_counts().sort_index().tolist() == classes.n_particles.tolist()
    page = map_landscape(run, k=6, n_clusters=2, mask=mask, device='cpu').read_text()
    assert len(list((folder / 'volumes').glob('*.mrc'))) == 6 and len(list((folder / 'classes').glob('*.mrc'))) == 2
    assert page.count('id="landscape"') == 1 and 'Too few volumes' in page
    small = map_landscape(run, k=6, n_clusters=2, mask=write_ball(tmp_path / 'small.mrc', 8, 8.0), device='cpu', box=8).parent / 'landscape'
    assert read_volume(small / 'volumes' / 'vol_000.mrc').box == 8
    walk = export_traversal(run, tmp_path / 'walk', [0, 1], names=folder / 'classes.csv', mean_neighbors=8, device='cpu')
    assert pd.read_csv(walk / 'volumes.csv').anchor.dropna().astype(int).tolist() == [0, 1]


def test_landscapes_that_cannot_be_made_are_refused(tmp_path):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(np.random.default_rng(0).normal(size=(30, 2))))
    with pytest.raises(InputError, match='three volumes'):
        map_landscape(run, k=2)
    with pytest.raises(InputError, match='boxes of'):
        map_landscape(run, k=5, mask=write_ball(tmp_path / 'mask.mrc', 12, 4.0), device='cpu')
    write_volume(tmp_path / 'low.mrc', Volume(torch.full((16, 16, 16), 0.1), 4.0))
    with pytest.raises(InputError, match='reaches 0.5'):
        map_landscape(run, k=5, mask=str(tmp_path / 'low.mrc'), device='cpu')
    with pytest.raises(InputError, match='no more classes than volumes'):
        map_landscape(run, k=5, n_clusters=6, mask=write_ball(tmp_path / 'ball.mrc', 16, 4.0), device='cpu')
    with pytest.raises(InputError, match='homogeneous'):
        map_landscape(make_run(tmp_path / 'one', zdim=0))


def test_a_dark_volume_costs_neither_the_landscape_nor_the_mask(tmp_path):
    """One junk particle in a hundred has a dark volume: the mask does without it, and the report names it."""
    rng, model = np.random.default_rng(0), Blobs(12)
    latents = make_latents(np.concatenate([rng.normal(size=(60, 2)) * 0.05, [[20.0, 20.0]]]))
    junk = lambda points: (Volume(-v.data, v.pixel_size) if z[0] > 5 else v for z, v in zip(points, generate_volumes(model, points)))  # noqa: E731
    found, pictures = compute_landscape(tmp_path, latents, junk, k=12)
    [number] = found.dark
    assert found.points.z0[number] > 5
    section = write_landscape(tmp_path, found, pictures)
    assert f'for want of a bright particle, as junk is: 1 of 12 volumes (vol_{number:03d}.mrc)' in section.html
    with pytest.raises(InputError, match='12 of 12 volumes show no bright particle'):
        compute_landscape(tmp_path / 'dark', latents, lambda points: generate_volumes(model, points, invert=True), k=12)


def test_a_landscape_appears_whole_or_not_at_all(tmp_path):
    """Options that cannot be met are refused before anything is decoded or written; r2 that is not known is null."""
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(np.random.default_rng(0).normal(size=(30, 2))))
    mask = write_ball(tmp_path / 'mask.mrc', 16, 4.0)
    folder = map_landscape(run, k=5, mask=mask, device='cpu').parent / 'landscape'
    assert json.loads((folder / 'settings.json').read_text(), parse_constant=pytest.fail)['r2'] is None
    list_files = lambda: {p: p.read_bytes() for p in folder.parent.rglob('*') if p.is_file()}  # noqa: E731
    before = list_files()
    for wrong in ({'k': 10, 'n_clusters': 50}, {'n_clusters': 0}, {'mask': write_ball(tmp_path / 'small.mrc', 12, 4.0)}, {'mask': write_ball(tmp_path / 'wide.mrc', 16, 5.0)}):
        with pytest.raises(InputError):
            map_landscape(run, **{'k': 6, 'mask': mask, 'device': 'cpu', **wrong})
        assert list_files() == before
    assert sorted(p.name for p in folder.parent.iterdir() if p.name.startswith('.')) == []


# ---------------------------------------------------------------- agreement

def test_runs_on_different_files_are_not_compared(tmp_path):
    rng = np.random.default_rng(0)
    runs = [make_run(tmp_path / name, zdim=2, latents=make_latents(rng.normal(size=(50, 2)), first=first)) for name, first in (('a', 0), ('b', 45))]
    with pytest.raises(InputError, match='5 particles in common'):
        compare_runs(*runs)
    for number, run in enumerate(runs):
        inputs = run.inputs
        inputs['files'] = {'particles': {'path': 'x.star', 'sha256': str(number)}}
        (run.path / 'inputs.json').write_text(json.dumps(inputs))
    with pytest.raises(InputError, match='different particle files'):
        compare_runs(*runs)
    with pytest.raises(InputError, match='homogeneous'):
        compare_runs(runs[0], make_run(tmp_path / 'c', zdim=0))


def test_unrelated_runs_agree_as_chance_does(tmp_path):
    rng = np.random.default_rng(0)
    runs = [make_run(tmp_path / name, zdim=2, latents=make_latents(rng.normal(size=(600, 2)))) for name in 'ab']
    report = compare_runs(*runs, k=5, method='gmm')
    folder = report.parent / 'agreement' / 'b'
    facts, neighbors = json.loads((folder / 'agreement.json').read_text()), pd.read_csv(folder / 'neighbors.csv')
    assert abs(facts['adjusted Rand index']) < 5 * facts['of shuffled labels, standard deviation']
    np.testing.assert_allclose(neighbors.agreement, neighbors.chance, atol=0.03)
    assert facts['variance of the first explained by neighbours in the second'] < 0.05


def test_labels_of_tables_without_a_run(tmp_path):
    labels = pd.DataFrame({'particle': np.arange(100), 'label': np.arange(100) // 25})
    labels.to_csv(tmp_path / 'a.csv', index=False)
    labels.assign(label=labels.label.map({0: 'x', 1: 'y', 2: 'z', 3: 'z'})).iloc[10:].to_csv(tmp_path / 'b.csv', index=False)
    out = compare_labels(tmp_path / 'a.csv', tmp_path / 'b.csv', out=tmp_path / 'out')
    facts = json.loads((out / 'agreement.json').read_text())
    assert (facts['particles'], facts['without a label there'], facts['in the matched class']) == (90, 10, pytest.approx(65 / 90))
    assert (out / 'confusion.png').exists() and pd.read_csv(out / 'confusion.csv').set_index('cluster').to_numpy().sum() == 90
    pd.DataFrame({'particle': [1, 1], 'label': [0, 1]}).to_csv(tmp_path / 'twice.csv', index=False)
    with pytest.raises(InputError, match='particle 1 twice'):
        compare_labels(tmp_path / 'a.csv', tmp_path / 'twice.csv', out=tmp_path / 'out')
    (labels.assign(particle=labels.particle + 500)).to_csv(tmp_path / 'far.csv', index=False)
    with pytest.raises(InputError, match='0 particles in common'):
        compare_labels(tmp_path / 'a.csv', tmp_path / 'far.csv', out=tmp_path / 'out')


def test_labels_of_real_tilt_series_are_found_by_image(data_dir, tmp_path):
    """Every image of a particle carries the particle's label."""
    star = data_dir / 'tomo' / 'warp_particleseries' / 'sta_testing_bin8.star'
    run = create_run(tmp_path / 'run', make_config(str(star), changes={'model.zdim': 2}))
    labels = read_labels(star, 'rlnGroupName', run=run)
    assert sorted(labels.index) == list(range(6)) and labels.nunique() == 6
    assert set(name_particles(run)) == set(range(6))
    with pytest.raises(InputError, match='different labels'):
        read_labels(star, 'rlnDefocusU', run=run)


def test_own_classes_are_the_column_that_is_meant(tmp_path):
    """A table whose first column is no label is read by its class, and both sides are named; which of several columns is never guessed."""
    pd.DataFrame({'volume': [f'v{i}' for i in range(40)], 'class': np.arange(40) // 20, 'particle': np.arange(40)}).to_csv(tmp_path / 'own.csv', index=False)
    pd.DataFrame({'particle': np.arange(40), 'state': np.arange(40) // 20, 'score': np.arange(40)}).to_csv(tmp_path / 'other.csv', index=False)
    out = compare_labels(tmp_path / 'own.csv', tmp_path / 'other.csv', column='state', out=tmp_path / 'out')
    facts = json.loads((out / 'agreement.json').read_text())
    assert facts['adjusted Rand index'] == 1 and facts['classes'] == f'column class of {tmp_path / "own.csv"}'
    with pytest.raises(InputError, match='Found state, score'):
        compare_labels(tmp_path / 'own.csv', tmp_path / 'other.csv', out=tmp_path / 'out')
    swapped = compare_labels(tmp_path / 'other.csv', tmp_path / 'own.csv', own_column='state', out=tmp_path / 'swapped')
    assert json.loads((swapped / 'agreement.json').read_text())['adjusted Rand index'] == 1


def test_labels_of_one_tomogram_of_several_are_found(tmp_path, monkeypatch):
    """Stacks of two folders share a base name: a star file of one folder alone names its images as the whole does."""
    names = list_image_names(['T1/p.mrcs'] * 3 + ['T2/p.mrcs'] * 3, [0, 1, 2] * 2)
    monkeypatch.setattr(agreement, 'name_particles', lambda run: pd.Series(np.arange(6), index=names))
    run = make_run(tmp_path / 'run', zdim=0)
    for folder in ('T2', 'moved/T2'):
        (tmp_path / 'part.star').write_text('data_\nloop_\n_rlnImageName #1\n_rlnClassNumber #2\n' + ''.join(f'{i + 1:06d}@{folder}/p.mrcs {7 + i}\n' for i in range(3)))
        assert read_labels(tmp_path / 'part.star', run=run).astype(int).to_dict() == {3: 7, 4: 8, 5: 9}


def test_labels_of_a_real_star_file(data_dir, tmp_path):
    star = data_dir / 'metadata' / 'relion31.star'
    run = create_run(tmp_path / 'run', make_config(str(star), changes={'model.zdim': 2}))
    labels = read_labels(star, 'rlnCoordinateX', run=run)
    assert sorted(labels.index) == list(range(len(labels)))
    with pytest.raises(InputError, match='no image in common'):
        read_labels(data_dir / 'metadata' / 'relion_3.0.star', 'rlnCoordinateX', run=run)
