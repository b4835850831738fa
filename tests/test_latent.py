"""Latents, reports and analyses at their edges: duplicates, few points, one dimension, hostile text, stale files.

The laws stand in the notebooks; here are the cases that a reader does not learn from.
"""
import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from recon_nb.analysis import analyze_run, export_traversal, export_volumes, find_latent_rows, read_z
from recon_nb.core import InputError, Latents, NumericalError, RunError, Volume
from recon_nb.files import read_volume, write_stack
from recon_nb.fourier import Lattice
from recon_nb.latent import (
    build_neighbor_graph,
    cluster_gmm,
    cluster_kmeans,
    compute_knn_correlation,
    compute_label_accuracy,
    count_support,
    generate_volumes,
    run_pca,
    run_umap,
    traverse_graph,
    traverse_pc,
)
from recon_nb.models import build_model
from recon_nb.report import Section, assemble_report, render_table, render_text, save_section
from recon_nb.runs import Checkpoint, append_log, create_run, make_config, write_json
from recon_nb.simulate import make_phantom, simulate_stack, write_simulation


def make_cloud(n=200, zdim=3, seed=0):
    """Return Gaussian points (n, zdim)."""
    return np.random.default_rng(seed).normal(size=(n, zdim))


def make_run(path, *, zdim, latents=None, box=16, epoch=3, pixel_size=4.0):
    """Return a run folder with untrained weights and given latents."""
    changes = {'model.zdim': zdim, 'model.encoder_dim': 16, 'model.decoder_dim': 16}
    run = create_run(path, make_config('particles.star', changes=changes))
    model = build_model(Lattice(box, pixel_size), zdim=zdim, encoder_dim=16, decoder_dim=16)
    run.save_checkpoint(Checkpoint(epoch, 0, dict(model.state_dict()), {'none': torch.zeros(1)}, {}))
    data = {'box': box, 'pixel_size': pixel_size, 'scale': 2.0}
    write_json(run.path / 'inputs.json', {'files': {'particles': {'path': '/data/<b>.star'}}, 'command': 'recon train <b>.star', 'data': data})
    for number in range(epoch):
        append_log(run, {'epoch': number + 1, 'total': 1 / (number + 1), 'recon': 0.9 / (number + 1), 'kl': 3.0 * number})
    (run.path / 'log.txt').write_text('2026-01-01 00:00:00 WARNING the sign looks <wrong>\n2026-01-01 00:00:00 INFO fine\n')
    if zdim:
        run.save_latents(epoch, latents)
    return run


def make_latents(mu, first=0):
    """Return latents of particles first, first + 1, ..."""
    mu = torch.as_tensor(mu, dtype=torch.float32)
    return Latents(mu, torch.zeros_like(mu), torch.arange(len(mu)) + first)


# ---------------------------------------------------------------- neighbours and paths

def test_graph_path_is_the_shortest_by_exhaustion():
    """On a small cloud no sequence of edges is shorter than the path found."""
    points = make_cloud(8, 2)
    graph = build_neighbor_graph(points, mean_neighbors=3, max_neighbors=4)
    dense = graph.matrix.toarray()
    dense = np.where(np.maximum(dense, dense.T) > 0, np.maximum(dense, dense.T), np.inf)
    connected = [(a, b) for a, b in itertools.combinations(range(8), 2) if graph.component[a] == graph.component[b]]
    assert connected
    for start, end in connected:
        others = [p for p in range(8) if p not in (start, end)]
        routes = [[start, *middle, end] for n in range(4) for middle in itertools.permutations(others, n)]
        best = min(sum(dense[a, b] for a, b in zip(route, route[1:])) for route in routes)
        row = traverse_graph(points, [start, end], mean_neighbors=3, max_neighbors=4).row
        assert sum(dense[a, b] for a, b in zip(row, row[1:])) <= best + 1e-9


@pytest.mark.parametrize('n', [2, 3, 5, 11, 12])
def test_graph_of_few_points(n):
    graph = build_neighbor_graph(make_cloud(n))
    lengths = np.diff(graph.matrix.indptr)
    assert lengths.max() <= min(10, n - 1)
    assert lengths.sum() - min(5 * n, n * (n - 1)) in (0, 1)  # a mutual pair enters together
    assert (graph.matrix.diagonal() == 0).all()


def test_graph_with_more_duplicates_than_neighbours():
    """Zero-length edges are edges: duplicates are connected, and no particle lists itself."""
    points = np.repeat(make_cloud(3, 2), 40, axis=0)
    graph = build_neighbor_graph(points)
    rows = np.repeat(np.arange(120), np.diff(graph.matrix.indptr))
    assert (rows != graph.matrix.indices).all()
    assert graph.threshold == 0
    assert len(traverse_graph(points[:40], [0, 1])) == 2


def test_anchors_are_visited_in_order_and_flagged():
    points = np.arange(30.0)[:, None]
    path = traverse_graph(points, [3, 10, 10, 5])
    assert path.row[0] == 3 and path.row[-1] == 5
    assert path.row[path.is_anchor].tolist() == [3, 10, 5]
    assert set(np.diff(path.row)) <= {1, 2, 3, -1, -2, -3}


def test_bridge_over_an_empty_region_has_less_support():
    """Two dense blobs joined by a thin line of particles: the path crosses it, and says how thin it is."""
    rng = np.random.default_rng(0)
    blobs = [rng.normal(size=(300, 2)) * 0.5 + [x, 0] for x in (0, 10)]
    bridge = np.stack([np.linspace(0, 10, 60), np.zeros(60)], axis=1)
    points = np.concatenate([*blobs, bridge])
    ends = [int(((points[:600] - [x, 0]) ** 2).sum(1).argmin()) for x in (0, 10)]
    path = traverse_graph(points, ends, mean_neighbors=9)
    middle = np.abs(path.z[:, 0] - 5) < 2
    assert middle.any() and path.support[middle].max() < np.median(path.support[~middle])


def test_gap_message_names_what_connects():
    """The advice in the message is right."""
    points = np.concatenate([make_cloud(60, 2), make_cloud(60, 2, seed=1) + [6, 0]])
    with pytest.raises(InputError) as error:
        traverse_graph(points, [0, 119], mean_neighbors=1)
    advised = re.search(r'average of (\d+) neighbours they connect', str(error.value))
    if advised:
        assert len(traverse_graph(points, [0, 119], mean_neighbors=int(advised[1]))) > 1
    else:
        assert 'Not even 10' in str(error.value)


def test_support_of_lone_particles():
    assert count_support(np.zeros((1, 2)), np.zeros((1, 2))).tolist() == [1]
    assert count_support(make_cloud(50), np.full((1, 3), 99.0)).tolist() == [0]


# ---------------------------------------------------------------- components, clusters, metrics

def test_pc_traversal_ends_at_the_percentiles():
    points = make_cloud(1000) * [5, 1, 0.1]
    path = traverse_pc(points, 0)
    along = run_pca(points).coordinates[:, 0]
    ends = run_pca(points).project(path.z)[[0, -1], 0]
    assert len(path) == 10
    np.testing.assert_allclose(ends, np.percentile(along, [5, 95]))


@pytest.mark.parametrize('cluster', [cluster_kmeans, cluster_gmm])
@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
def test_clusters_do_not_depend_on_the_unit(cluster, scale):
    points = np.concatenate([make_cloud(80) * 0.1 + 3 * shift for shift in np.eye(3)])
    labels = cluster(points * scale, 3).labels
    assert compute_label_accuracy(labels, np.repeat([0, 1, 2], 80)).accuracy == 1.0


def test_too_many_clusters_are_refused():
    with pytest.raises(InputError, match='between 1 and 2'):
        cluster_kmeans(np.repeat(make_cloud(2), 10, axis=0), 3)


def test_ari_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 60), rng.integers(0, 3, 60)
        assert compute_label_accuracy(a, b).ari == pytest.approx(adjusted_rand_score(b, a))
    assert compute_label_accuracy([1, 1], [0, 0]).ari == 1.0


def test_knn_correlation_is_blind_to_the_sign_and_scale_of_truth():
    points = make_cloud(400)
    found = compute_knn_correlation(points, points[:, 0])
    assert found > 0.9
    assert compute_knn_correlation(points, np.exp(points[:, 0])) > 0.85
    assert compute_knn_correlation(points, -points[:, 0]) == pytest.approx(found)
    assert compute_knn_correlation(points, np.ones(400)) == 0.0


def test_nan_latents_are_named():
    points = make_cloud(5)
    points[3, 1] = np.nan
    for function in (run_pca, run_umap, build_neighbor_graph, lambda z: cluster_kmeans(z, 2)):
        with pytest.raises(NumericalError, match='row 3'):
            function(points)


@pytest.mark.slow
@pytest.mark.parametrize('n', [5, 10, 11, 16, 40])
def test_umap_of_few_points(n):
    assert np.isfinite(run_umap(make_cloud(n))).all()


def test_volumes_are_made_one_at_a_time():
    """The second volume is not decoded before it is asked for; NaN is an error that names the volume."""
    class Counting(torch.nn.Module):
        lattice = Lattice(8, 2.0)
        n_calls = 0

        def decode_volume(self, z, box):
            self.n_calls += 1
            return torch.full((box, box, box), float('nan') if self.n_calls == 3 else 1.0)

    model = Counting()
    stream = generate_volumes(model, make_cloud(500), box=4)
    assert isinstance(next(stream), Volume) and model.n_calls == 1
    with pytest.raises(NumericalError, match='volume 2'):
        list(stream)


# ---------------------------------------------------------------- report

def test_nothing_in_a_report_is_obeyed(tmp_path):
    """Titles, texts, tables and captions are escaped; no address outside the page is left."""
    evil = '<script>alert(1)</script><img src=http://x.org/a.png>'
    save_section(tmp_path, Section('Evil ' + evil, render_text(evil) + render_table(pd.DataFrame({evil: [evil]}))))
    page = assemble_report(tmp_path, evil).read_text()
    assert '<script' not in page and '<img' not in page
    assert "default-src 'none'" in page


def test_a_section_replaces_its_namesake_only(tmp_path):
    for title, order in (('Data', 100), ('Data quality', 100), ('Data', 300)):
        save_section(tmp_path, Section(title, render_text(f'{title} at {order}'), order))
    names = sorted(p.name for p in (tmp_path / 'sections').glob('*.html'))
    assert names == ['100-data-quality.html', '300-data.html']
    with pytest.raises(InputError, match='letters or digits'):
        save_section(tmp_path, Section('!?', ''))


# ---------------------------------------------------------------- analysis of a run

@pytest.mark.parametrize('zdim, n', [(1, 60), (2, 1), (2, 3), (3, 80)])
def test_analysis_of_any_shape(tmp_path, zdim, n):
    latents = make_latents(make_cloud(n, zdim), first=7)
    report = analyze_run(make_run(tmp_path / 'run', zdim=zdim, latents=latents), kmeans=5, n_points=3, umap=False, device='cpu')
    folder = report.parent
    labels, centers = (pd.read_csv(folder / 'kmeans' / name) for name in ('labels.csv', 'centers.csv'))
    assert labels.particle.tolist() == list(range(7, 7 + n))
    assert len(centers) == len(list((folder / 'kmeans').glob('vol_*.mrc'))) == min(5, n)
    assert (folder / 'pca.png').exists() == (zdim > 1)
    assert (folder / 'pc1').exists() == (n > 1)
    page = report.read_text()
    assert 'could not be inspected again' in page and 'the sign looks &lt;wrong&gt;' in page and 'recon train &lt;b&gt;.star' in page and '<b>' not in page


def test_analysis_of_a_homogeneous_run(tmp_path):
    run = make_run(tmp_path / 'run', zdim=0)
    report = analyze_run(run, device='cpu')
    volume = read_volume(report.parent / 'map.mrc')
    assert (volume.box, volume.pixel_size) == (16, 4.0)
    assert 'id="map"' in report.read_text() and 'id="latents"' not in report.read_text()
    with pytest.raises(InputError, match='homogeneous'):
        export_volumes(run, tmp_path / 'out', kmeans=2)
    with pytest.raises(InputError, match='homogeneous'):
        export_traversal(run, tmp_path / 'out', [0, 1])


def test_volume_options_reach_the_file(tmp_path):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(10, 2)))
    make = lambda name, **options: read_volume(export_volumes(run, tmp_path / name, particles=[4], device='cpu', **options) / 'vol_000.mrc')
    plain, negative, flipped = make('plain'), make('negative', invert=True), make('flipped', flip_hand=True)
    torch.testing.assert_close(negative.data, -plain.data)
    torch.testing.assert_close(flipped.data, plain.data.flip(0).roll(1, 0))
    small = make('small', box=8)
    assert (small.box, small.pixel_size) == (8, 8.0)
    assert make('smooth', low_pass=20.0).data.var() < plain.data.var()


def test_an_interrupted_set_of_volumes_leaves_the_earlier_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(30, 2)))
    folder = analyze_run(run, kmeans=3, umap=False, device='cpu').parent / 'kmeans'
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr('recon_nb.analysis.write_volume', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        analyze_run(run, kmeans=2, umap=False, device='cpu')
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith('.')] == []


def test_epochs_without_latents_are_refused(tmp_path):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(30, 2)))
    with pytest.raises(RunError, match='epochs with weights and latents: 3'):
        analyze_run(run, 2)
    (run.path / 'latents' / '0003.npz').unlink()
    with pytest.raises(RunError, match='recon encode'):
        analyze_run(run)


def test_exactly_one_way_to_choose_points(tmp_path):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(30, 2)))
    for chosen in ({}, {'particles': [1], 'kmeans': 2}):
        with pytest.raises(InputError, match='exactly one'):
            export_volumes(run, tmp_path / 'out', **chosen)
    with pytest.raises(InputError, match='3 dimensions'):
        export_volumes(run, tmp_path / 'out', z=make_cloud(2, 3))
    assert not (tmp_path / 'out').exists()


def test_particles_of_a_selection_keep_their_numbers():
    latents = Latents(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([40, 2, 11]))
    assert find_latent_rows(latents, [2, 40]).tolist() == [1, 0]
    for absent in (-1, 3, 41):
        with pytest.raises(InputError, match=f'Particle {absent} '):
            find_latent_rows(latents, [2, absent])


@pytest.mark.parametrize('text', ['', 'a,b\n', 'z0\n1.0\n', 'z0,z1\n1.0,\n', '1.0,2.0,3.0\n', '1.0\n'])
def test_bad_tables_of_points_are_refused(tmp_path, text):
    path = tmp_path / 'z.csv'
    path.write_text(text)
    with pytest.raises(InputError, match='z.csv'):
        read_z(path, 2)


def test_inputs_of_another_program_are_refused(tmp_path):
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(30, 2)))
    inputs = json.loads((run.path / 'inputs.json').read_text())
    write_json(run.path / 'inputs.json', {**inputs, 'data': {'box': 16, 'pixel_size': 4.0}})
    with pytest.raises(RunError, match='divided by'):
        analyze_run(run, device='cpu')


def test_report_says_what_is_wrong_with_the_images(tmp_path):
    """Dark particles are not mentioned in the star file; the report finds them in the pixels."""
    simulated = simulate_stack(make_phantom('ribosome', 16), 300, snr=5.0, seed=0)
    star = write_simulation(tmp_path / 'images', simulated)
    run = make_run(tmp_path / 'run', zdim=2, latents=make_latents(make_cloud(30, 2)))
    config = json.loads((run.path / 'config.json').read_text())
    config['data']['particles'] = str(star)
    write_json(run.path / 'config.json', config)
    options = {'kmeans': 2, 'n_points': 2, 'umap': False, 'device': 'cpu'}
    healthy = analyze_run(run, **options).read_text()
    assert re.search(r'<th>defocus</th><td>[\d.]+ to [\d.]+ µm</td>', healthy) and 'could not be inspected' not in healthy
    write_stack(tmp_path / 'images' / 'particles.mrcs', -simulated.stack.images, 24.0)
    sick = analyze_run(run, **options).read_text()
    assert sick.count('<li>') == healthy.count('<li>') + 1


@pytest.mark.parametrize('native, asked', [(32, 24), (33, 24), (33, 33), (32, 23)])
def test_centre_of_a_volume_stays_in_place_on_fewer_voxels(native, asked):
    """Viewers put maps where their headers say; the centre of an odd box lies half a voxel elsewhere."""
    class Constant(torch.nn.Module):
        lattice = Lattice(native, 3.0)

        def decode_volume(self, z, box):
            return torch.ones(box, box, box)

    volume = next(generate_volumes(Constant(), torch.zeros(1, 2), box=asked))
    assert volume.pixel_size * asked == pytest.approx(3.0 * native)
    assert volume.origin[0] + volume.pixel_size * (asked // 2) == pytest.approx(3.0 * (native // 2))
