"""Real metadata and image files are read correctly or refused in one line; what is read goes back as it was."""
import os
import pickle
import re
import struct
import threading
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pandas
import pytest
import starfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.recfunctions import repack_fields

from recon_nb.core import InputError, Poses, Volume
from recon_nb.downsample import downsample_particles
from recon_nb.files import (
    MRC_HEADER, ParticleTable, load_array_pickle, make_mrc_header, open_mrc_stack, open_stack, read_cryosparc, read_particles,
    read_star_blocks, read_volume, write_particles, write_stack, write_star_blocks, write_volume,
)
from recon_nb.so3 import rotation_distance, rotvec_to_matrix

# file: (pixel size given, images, pixel size, box, poses, CTF)
READABLE = {
    'metadata/FinalRefinement-OriginalParticles-PfCRT.star': (None, 5, 1.035, None, True, False),
    'metadata/empiar_10076_7.star': (None, 7, 1.31, None, False, True),
    'metadata/empiar_10076_7.cs': (None, 7, 1.31, 320, False, True),
    'metadata/relion31.star': (None, 5, 2.806, 256, True, True),
    'metadata/relion31.v2.star': (None, 5, 2.806, 256, True, True),
    'metadata/relion5.star': (None, 17, 0.89, 448, True, True),
    'metadata/sample_particles_relion30.star': (None, 17, 1.338, None, True, True),
    'metadata/sample_particles_relion31.star': (None, 17, 1.4, None, True, True),
    'metadata/cryosparc_P12_J24_001_particles.cs': (None, 2019, 2.95, 180, True, True),
    'metadata/cryosparc_J2_particles_exported.cs': (None, 22, 1.345, 300, False, True),
    'images/relion_proj_batch.star': (None, 24, 3.54, 64, True, True),
    'images/rln_proj_64.star': (3.0, 5, 3.0, None, True, False),
    'images/rln_proj_64_shifted.star': (None, 4, 1.0, 64, True, False),
    'images/rln_proj_65.star': (3.0, 5, 3.0, None, True, False),
    'images/toy_projections.star': (2.0, 1000, 2.0, None, False, True),
    'tomo/warp_particleseries/sta_testing.star': (None, 219, 1.96, None, True, True),
    'tomo/warp_particleseries/sta_testing_bin8.star': (15.0, 219, 15.0, None, True, True),
}
# file: what the one line must name
REFUSED = {
    'metadata/sample_incomplete_ctf_params.star': ['rlnVoltage', '--ctf'],
    'metadata/relion_3.0.star': ['row 0 (line 20)', 'subtomogram', 'rlnImageName', 'export'],
    'metadata/relion_3.1_optics.star': ['row 0', 'subtomogram', 'export'],
    'images/rln_proj_64.star': ['rlnImagePixelSize', '--pixel-size'],
    'images/rln_proj_65.star': ['--pixel-size'],
    'images/toy_projections.star': ['--pixel-size'],
    'tomo/warptools_70s/warptools_test_4-tomos_10-ptcls_box-32_angpix-12.star': ['tilt-series', 'Export'],
    'tomo/relion5_project/Refine3D/job074/run_data.star': ['tilt-series'],
    'tomo/relion5_project/Refine3D/job074/run_optimisation_set.star': ['rlnImageName'],
}
STARS = [name for name in {**READABLE, **REFUSED} if name.endswith('.star')]


def refuse(call, *parts):
    """Check that a call raises a one-line InputError that names every part."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert '\n' not in text
    for part in parts:
        assert part in text, text


# ---------------------------------------------------------------- real metadata

def test_every_file_is_covered(data_dir):
    found = {str(p.relative_to(data_dir)) for folder in ('metadata', 'images') for p in (data_dir / folder).glob('*') if p.suffix in ('.star', '.cs')}
    assert found <= {*READABLE, *REFUSED}


@pytest.mark.parametrize('name', READABLE)
def test_real_metadata_is_read(data_dir, name):
    given_size, n, pixel_size, box, poses, ctf = READABLE[name]
    table = read_particles(data_dir / name, pixel_size=given_size)
    assert (table.n_images, table.box, table.has_poses, table.has_ctf) == (n, box, poses, ctf)
    assert table.pixel_size == pytest.approx(pixel_size, abs=5e-4)
    if poses:
        rot = table.get_poses(torch.float64).validate().rot
        assert (rot @ rot.mT - torch.eye(3)).abs().max() < 1e-12
    if ctf:
        table.get_ctf().validate()


@pytest.mark.parametrize('name', REFUSED)
def test_real_metadata_is_refused_in_one_line(data_dir, name):
    refuse(lambda: read_particles(data_dir / name), Path(name).name, *REFUSED[name])


def test_incomplete_ctf_is_refused_by_name(data_dir):
    table = read_particles(data_dir / 'metadata/FinalRefinement-OriginalParticles-PfCRT.star')
    assert table.has_defocus
    refuse(table.get_ctf, 'rlnAmplitudeContrast')


def test_two_dimensional_classes_have_no_poses(data_dir):
    table = read_particles(data_dir / 'metadata/cryosparc_J2_particles_exported.cs')
    refuse(table.get_poses, '2-D classification only', '--poses')


def test_star_and_cs_of_the_same_particles_agree(data_dir):
    star, cs = (read_particles(data_dir / f'metadata/empiar_10076_7{suffix}') for suffix in ('.star', '.cs'))
    for name in ('defocus_u', 'defocus_v', 'defocus_angle', 'voltage', 'cs', 'amplitude_contrast', 'slice'):
        np.testing.assert_allclose(star.rows[name], cs.rows[name], rtol=1e-6)
    assert list(star.rows['stack']) == list(cs.rows['stack'])
    assert cs.rows['slice'].dtype == np.int64 and cs.source.records['uid'].dtype == np.uint64


def test_sign_of_cryosparc_blobs_is_that_of_the_pixels(data_dir):
    table = read_particles(data_dir / 'metadata/empiar_10076_7.cs', datadir=data_dir / 'images')
    images = open_stack(table)[:] * table.contrast_sign
    y, x = np.mgrid[:320, :320] - 160
    radius = np.hypot(x, y)
    assert (images[:, radius < 64].mean(1) > images[:, radius > 134].mean(1)).all()


def test_cryosparc_refinement(data_dir):
    table = read_particles(data_dir / 'metadata/cryosparc_P12_J24_001_particles.cs')
    records = table.source.records
    poses = table.get_poses(torch.float64)
    rotvec = torch.from_numpy(records['alignments3D/pose'].astype(np.float64))
    assert rotation_distance(poses.rot, rotvec_to_matrix(rotvec).mT).max() < 1e-5
    np.testing.assert_allclose(poses.shift, records['alignments3D/shift'] * 2.95, rtol=1e-6)
    assert set(table.rows['half']) == {1, 2}
    assert table.contrast_sign == -1


def test_origins_in_pixels_and_angstrom_agree(data_dir):
    table = read_particles(data_dir / 'images/relion_proj_batch.star')  # has both
    assert table.warnings == ()
    shifted = read_particles(data_dir / 'images/rln_proj_64_shifted.star')  # pixels beside an optics block
    assert shifted.get_poses().shift[0].tolist() == [6.0, 10.0]


def test_optics_groups_may_differ_in_voltage(data_dir):
    table = read_particles(data_dir / 'metadata/sample_particles_relion31.star')
    text = (data_dir / 'metadata/sample_particles_relion31.star').read_text()
    groups = starfile.read(data_dir / 'metadata/sample_particles_relion31.star')['particles']['rlnOpticsGroup']
    np.testing.assert_array_equal(table.rows['voltage'], np.where(groups == 1, 300.0, 200.0))
    assert 'opticsGroup2' in text


def test_optics_groups_of_two_pixel_sizes_are_refused(data_dir, tmp_path):
    text = (data_dir / 'metadata/sample_particles_relion31.star').read_text()
    first, second, rest = text.partition('opticsGroup2')
    (tmp_path / 'a.star').write_text(first + second + rest.replace('1.400000', '2.800000', 1))
    refuse(lambda: read_particles(tmp_path / 'a.star'), 'a.star row', '2.8', '1.4', 'optics group')


def test_warnings_name_what_is_doubtful(data_dir):
    warp = read_particles(data_dir / 'tomo/warp_particleseries/sta_testing_bin8.star', pixel_size=15.0)
    assert any('1.96' in w for w in warp.warnings) and any('rlnCtfBfactor' in w for w in warp.warnings)
    assert 'bfactor' not in warp.rows and warp.rows['particle_name'].nunique() == 6
    five = read_particles(data_dir / 'metadata/relion5.star')
    assert any('rlnEvenZernike' in w and 'rlnBeamTiltX' in w for w in five.warnings)
    table = read_particles(data_dir / 'metadata/relion31.star', datadir=data_dir / 'images')
    assert any('1 Å' in w for w in open_stack(table).warnings)


# ---------------------------------------------------------------- text in, text out

@pytest.mark.parametrize('name', STARS)
def test_star_files_survive_byte_for_byte(data_dir, tmp_path, name):
    write_star_blocks(tmp_path / 'out.star', read_star_blocks(data_dir / name))
    assert (tmp_path / 'out.star').read_bytes() == (data_dir / name).read_bytes()


@pytest.mark.parametrize('name', STARS)
def test_blocks_hold_what_starfile_finds(data_dir, name):
    theirs = starfile.read(data_dir / name, always_dict=True)
    for block in read_star_blocks(data_dir / name):
        if not block.is_loop:
            continue
        frame = theirs[block.name]
        assert list(frame.columns) == list(block.columns) and len(frame) == len(block)
        texts = block.read_columns(block.columns)
        for column in frame.columns:
            if pandas.api.types.is_numeric_dtype(frame[column]):
                np.testing.assert_allclose(frame[column].to_numpy(float), np.array(texts[column], float))


@pytest.mark.parametrize('name', READABLE)
def test_dropping_rows_touches_nothing_else(data_dir, tmp_path, name):
    table = read_particles(data_dir / name, pixel_size=READABLE[name][0])
    rows = np.arange(table.n_images)[::-2]
    path = tmp_path / f'out{Path(name).suffix}'
    write_particles(path, table, rows)
    if path.suffix == '.cs':
        written, original = np.load(path), np.load(data_dir / name)
        assert written.dtype == original.dtype and (written == original[rows]).all()
        return
    for new, old in zip(read_star_blocks(path), read_star_blocks(data_dir / name), strict=True):
        is_table = 'rlnImageName' in old.columns
        assert new.columns == old.columns and new.head == old.head
        assert new.lines == ([old.lines[i] for i in rows] if is_table else old.lines)


@pytest.mark.parametrize('name', ['metadata/relion31.v2.star', 'metadata/sample_particles_relion30.star', 'metadata/cryosparc_P12_J24_001_particles.cs',
                                  'images/rln_proj_64_shifted.star', 'images/relion_proj_batch.star', 'metadata/cryosparc_J2_particles_exported.cs'])
def test_new_poses_and_pixel_size_read_back(data_dir, tmp_path, name):
    table = read_particles(data_dir / name)
    generator = torch.Generator().manual_seed(1)
    rot = rotvec_to_matrix(torch.randn(table.n_images, 3, generator=generator, dtype=torch.float64))
    poses = Poses(rot, 5 * torch.randn(table.n_images, 2, generator=generator, dtype=torch.float64))
    path = tmp_path / f'out{Path(name).suffix}'
    write_particles(path, table, poses=poses, pixel_size=2 * table.pixel_size, box=100, stack='all.mrcs')
    again = read_particles(path)
    tolerance = 1e-9 if path.suffix == '.star' else 1e-5
    assert rotation_distance(again.get_poses(torch.float64).rot, rot).max() < 50 * tolerance
    assert (again.get_poses(torch.float64).shift - poses.shift).abs().max() < tolerance
    assert again.pixel_size == pytest.approx(2 * table.pixel_size)
    assert again.box in (100, None) and list(again.rows['slice']) == list(range(table.n_images))
    assert set(again.rows['stack']) == {'all.mrcs'}
    for column in ('defocus_u', 'voltage', 'half'):
        assert column not in table.rows or (again.rows[column] == table.rows[column]).all()


HEADER = 'data_\n\nloop_\n_rlnImageName\n_rlnMicrographName\n_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n_rlnDetectorPixelSize\n_rlnMagnification\n'
words = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Z')), min_size=1, max_size=8).filter(lambda t: t[0] not in '\'"#_' and not t.startswith('data_'))
numbers = st.floats(-360, 360).map(repr)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, numbers, numbers, numbers), min_size=1, max_size=6), st.randoms())
def test_any_row_survives(tmp_path_factory, rows, random):
    path = tmp_path_factory.mktemp('star') / 'a.star'
    lines = [f'{i + 1:06d}@s.mrcs {word} {a} {b} {c} 5.0 25000' for i, (word, a, b, c) in enumerate(rows)]
    path.write_text(HEADER + '\n'.join(lines) + '\n', encoding='utf-8')
    table = read_particles(path)
    assert [list(r) for r in table.rows[['euler_rot', 'euler_tilt', 'euler_psi']].to_numpy()] == [[float(x) for x in r[1:]] for r in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    write_particles(path, table, order)
    assert path.read_text(encoding='utf-8') == HEADER + '\n'.join(lines[i] for i in order) + '\n'


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(['i1', 'i2', 'u2', 'f2', 'f4']), st.sampled_from('<>'), st.integers(0, 3))
def test_any_mrc_mode_and_byte_order(tmp_path_factory, n, seed, kind, order, extended):
    path = tmp_path_factory.mktemp('mrc') / 'a.mrcs'
    generator = np.random.default_rng(seed)
    pixels = (generator.standard_normal((n, 5, 5)) * 50 + 100 * (kind == 'u2')).clip(0 if kind == 'u2' else -128, 127).astype(kind)
    header = np.frombuffer(make_mrc_header(pixels.shape, 1.5, dtype=kind, is_stack=True), MRC_HEADER)[0].copy()
    header['extended'], header['machine'] = 128 * extended, (0x44, 0x44, 0, 0) if order == '<' else (0x11, 0x11, 0, 0)
    path.write_bytes(np.array(header).astype(MRC_HEADER.newbyteorder(order)).tobytes() + b'x' * 128 * extended + pixels.astype(order + kind).tobytes())
    stack = open_mrc_stack(path)
    assert stack.pixel_size == pytest.approx(1.5)
    rows = generator.integers(-n, n, 7)
    np.testing.assert_array_equal(stack[rows], pixels[rows].astype(np.float32))


# ---------------------------------------------------------------- bad files

def edit(tmp_path, data_dir, name, old, new, count=1):
    """Write an edited copy of a real file and return its path."""
    text = (data_dir / name).read_text()
    assert old in text
    (tmp_path / 'edited.star').write_text(text.replace(old, new, count))
    return tmp_path / 'edited.star'


@pytest.mark.parametrize('old, new, parts', [
    ('_rlnAngleRot #13', '_rlnAngleTilt #13', ['rlnAngleTilt', 'twice']),
    ('000003@relion31', '0@relion31', ['row', 'n counted from 1']),
    ('2.806000', 'abc', ["rlnImagePixelSize is 'abc'"]),
    ('2.806000', '0', ['pixel size of 0']),
    ('300.000000', 'nan', ["rlnVoltage is 'nan'"]),
    ('data_particles', 'data_particles\n_stray value extra', ['line', 'expected']),
    ('_rlnImageName #22', '_rlnOther #22', ['no block with a rlnImageName', 'data_optics']),
    (' 2826.000000', ' 2826.000000 1 ', ['row 2 (line', '27 values for the 26 columns']),
    ('           1 opticsGroup1', '           7 opticsGroup1', ['row 0', 'rlnOpticsGroup 1 is not in data_optics']),
    ('          256            2', '          256            3', ['rlnImageDimensionality', 'subtomograms']),
])
def test_bad_star_files_are_refused_by_place(data_dir, tmp_path, old, new, parts):
    path = edit(tmp_path, data_dir, 'metadata/relion31.star', old, new)
    refuse(lambda: read_particles(path), 'edited.star', *parts)


def test_not_a_particle_file(tmp_path):
    (tmp_path / 'a.star').write_text('hello\n')
    refuse(lambda: read_particles(tmp_path / 'a.star'), 'no data_ block')
    (tmp_path / 'a.cs').write_text('hello\n')
    refuse(lambda: read_particles(tmp_path / 'a.cs'), 'not a cs file')
    (tmp_path / 'object.cs').write_bytes(b'')
    with (tmp_path / 'object.cs').open('wb') as file:
        np.save(file, np.array([{1: 2}], object), allow_pickle=True)
    refuse(lambda: read_particles(tmp_path / 'object.cs'), 'cannot be read')
    with (tmp_path / 'plain.cs').open('wb') as file:
        np.save(file, np.zeros(3))
    refuse(lambda: read_particles(tmp_path / 'plain.cs'), 'named fields')
    refuse(lambda: read_particles(tmp_path / 'nothing.star'), 'no such file')
    refuse(lambda: read_particles(tmp_path / 'a.txtt'), '.txtt', '.txt')


def test_pickles_hold_arrays_only(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "ran"}',)
    for name, content in {'attack': Attack(), 'nested': (np.zeros(3), Attack()), 'lambda': threading.Thread}.items():
        (tmp_path / f'{name}.pkl').write_bytes(pickle.dumps(content))
        refuse(lambda path=tmp_path / f'{name}.pkl': load_array_pickle(path), f'{name}.pkl', 'only numpy arrays')
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'text.pkl').write_bytes(pickle.dumps({'a': 1}))
    refuse(lambda: load_array_pickle(tmp_path / 'text.pkl'), 'dict')
    (tmp_path / 'objects.pkl').write_bytes(pickle.dumps(np.array([None, 1], object)))
    refuse(lambda: load_array_pickle(tmp_path / 'objects.pkl'), 'object')
    (tmp_path / 'cut.pkl').write_bytes(pickle.dumps(np.zeros(9))[:50])
    refuse(lambda: load_array_pickle(tmp_path / 'cut.pkl'), 'not a pickle of numpy arrays')
    for protocol in range(6):
        (tmp_path / 'good.pkl').write_bytes(pickle.dumps((np.eye(3), np.arange(4, dtype='i4')), protocol=protocol))
        eye, four = load_array_pickle(tmp_path / 'good.pkl')
        assert (eye == np.eye(3)).all() and (four == np.arange(4)).all()


def test_bad_stacks(tmp_path):
    images = np.arange(3 * 16, dtype=np.float32).reshape(3, 4, 4)
    write_stack(tmp_path / 'a.mrcs', images, 1.0)
    good = (tmp_path / 'a.mrcs').read_bytes()
    for name, content, parts in [
        ('short', good[:-1], ['truncated', 'need 1216 bytes, found 1215']), ('tiny', good[:100], ['too few']),
        ('complex', good[:12] + struct.pack('<i', 4) + good[16:], ['mode 4 (complex)']), ('zip', b'\x1f\x8b' + good[2:], ['decompress']),
        ('odd', good[:12] + struct.pack('<i', 9) + good[16:], ['mode 9']), ('noise', b'\xff' * 2000, ['no plausible']),
    ]:
        (tmp_path / f'{name}.mrcs').write_bytes(content)
        refuse(lambda path=tmp_path / f'{name}.mrcs': open_mrc_stack(path), f'{name}.mrcs', *parts)
    write_stack(tmp_path / 'flat.mrcs', np.zeros((2, 4, 6), np.float32), 1.0)
    refuse(lambda: open_mrc_stack(tmp_path / 'flat.mrcs'), '6 x 4 px')
    refuse(lambda: write_stack(tmp_path / 'nan.mrcs', np.full((1, 2, 2), np.nan), 1.0), 'nan.mrcs', 'NaN')
    refuse(lambda: write_stack(tmp_path / 'big.mrcs', np.full((1, 2, 2), 1e5), 1.0, dtype=np.float16), 'float16')
    assert not (tmp_path / 'nan.mrcs').exists() and not (tmp_path / 'big.mrcs').exists()


def test_volume_header_is_what_others_read(tmp_path):
    data = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
    write_volume(tmp_path / 'a.mrc', Volume(data, 1.25, (1.0, 2.0, 3.0)))
    assert mrcfile.validate(tmp_path / 'a.mrc')
    with mrcfile.open(tmp_path / 'a.mrc') as file:
        assert (file.data == data.numpy()).all() and file.voxel_size.z == pytest.approx(1.25) and file.header.origin.y == 2.0
    write_stack(tmp_path / 'a.mrcs', data, 1.25)
    assert mrcfile.validate(tmp_path / 'a.mrcs')
    with mrcfile.open(tmp_path / 'a.mrcs') as file:
        assert file.is_image_stack() and (file.data == data.numpy()).all()
        axes = file.data
    with mrcfile.new(tmp_path / 'swapped.mrc') as file:
        file.set_data(np.ascontiguousarray(axes.transpose(2, 0, 1)))  # stored sections, rows, columns = x, z, y
        file.voxel_size = 2.0
        file.header.mapc, file.header.mapr, file.header.maps = 2, 3, 1
    assert torch.equal(read_volume(tmp_path / 'swapped.mrc').data, data)


def test_volume_without_pixel_size_is_refused(data_dir):
    path = data_dir / 'images/clean70SRibosome_vol_65p.mrc'
    refuse(lambda: read_volume(path), '--pixel-size')
    assert read_volume(path, pixel_size=3.0).box == 65
    refuse(lambda: read_volume(data_dir / 'images/hand.mrcs'), 'not a cube')


def test_real_stacks_equal_mrcfile(data_dir):
    for path in [*(data_dir / 'images').glob('*.mrcs'), data_dir / 'images/empiar_10076_7.mrc', *(data_dir / 'tomo').glob('*/*/Unt_050/*1.mrcs')]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # several lack the MAP word, which mrcfile says aloud
            file = mrcfile.open(path, permissive=True)
        with file:
            np.testing.assert_array_equal(open_mrc_stack(path)[:], file.data.astype(np.float32))


def test_opening_fifty_gigabytes_costs_no_memory(tmp_path):
    path, n, box = tmp_path / 'large.mrcs', 200_000, 256
    with path.open('wb') as file:  # sparse: takes no space on disk
        file.write(make_mrc_header((n, box, box), 1.0, is_stack=True))
        file.truncate(1024 + n * box * box * 4)
        file.seek(1024 + 150_000 * box * box * 4)
        file.write(np.full(box * box, 7, '<f4').tobytes())
    assert path.stat().st_size > 50e9
    tracemalloc.start()
    stack = open_mrc_stack(path)
    assert stack[150_000].mean() == 7 and stack[[150_000, 3]].mean() == 3.5
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


# ---------------------------------------------------------------- poses and CTF from elsewhere, downsampling

def test_bare_stack_with_cryodrgn_pickles(data_dir, tmp_path):
    images = data_dir / 'images'
    table = read_particles(images / 'hand.mrcs', pixel_size=2.0, poses=images / 'hand_rot_trans.pkl')
    rot, trans = load_array_pickle(images / 'hand_rot_trans.pkl')
    assert rotation_distance(table.get_poses(torch.float64).rot, torch.from_numpy(rot).double()).max() < 1e-3
    np.testing.assert_allclose(table.get_poses().shift, trans * 64 * 2.0, rtol=1e-5)
    table = read_particles(images / 'toy_projections.mrcs', poses=images / 'toy_rot_trans.pkl', ctf=images / 'test_ctf.pkl')
    assert table.get_ctf().phase_shift.unique().tolist() == [90.0] and any('header' in w for w in table.warnings)
    refuse(lambda: read_particles(images / 'hand.mrcs', poses=images / 'toy_rot_trans.pkl'), '1000 rows', '100 images')
    refuse(lambda: read_particles(images / 'toy_projections.mrcs', pixel_size=3.0, ctf=images / 'test_ctf.pkl'), 'test_ctf.pkl', '--pixel-size')
    refuse(lambda: read_particles(images / 'hand.mrcs', poses=images / 'test_ctf.pkl'), '(N, 3, 3)')
    (tmp_path / 'list.txt').write_text(f'{images}/rln_proj_64.mrcs\n\n{images}/hand.mrcs\n')
    listed = read_particles(tmp_path / 'list.txt', pixel_size=1.0)
    assert listed.n_images == 105 and len(open_stack(listed)[[0, 104]]) == 2
    write_particles(tmp_path / 'listed.star', listed)
    assert read_particles(tmp_path / 'listed.star').n_images == 105


def test_poses_beside_reach_the_written_file(data_dir, tmp_path):
    images = data_dir / 'images'
    table = read_particles(images / 'toy_projections.star', pixel_size=2.0, poses=images / 'toy_rot_trans.pkl')
    write_particles(tmp_path / 'out.star', table, pixel_size=2.0)
    again = read_particles(tmp_path / 'out.star')
    assert torch.equal(again.get_poses(torch.float64).shift, table.get_poses(torch.float64).shift)
    assert '_dummyVariable' in (tmp_path / 'out.star').read_text()


def test_missing_voltage_may_come_from_beside(data_dir, tmp_path):
    ctf = np.array([[200, 1.338, 21186.0, 21363.0, 7.5, 300, 2.7, 0.1, 0]], np.float32)
    (tmp_path / 'ctf.pkl').write_bytes(pickle.dumps(ctf))
    table = read_particles(data_dir / 'metadata/sample_incomplete_ctf_params.star', datadir=data_dir / 'images', ctf=tmp_path / 'ctf.pkl')
    write_particles(tmp_path / 'out.star', table)
    assert read_particles(tmp_path / 'out.star').get_ctf().voltage.tolist() == [300.0]


def test_passthrough_is_joined_by_uid(data_dir, tmp_path):
    records = np.load(data_dir / 'metadata/cryosparc_P12_J24_001_particles.cs')
    names = records.dtype.names
    blob = [n for n in names if not n.startswith('alignments3D')]
    pose = ['uid', *(n for n in names if n.startswith('alignments3D'))]
    shuffled = records[np.random.default_rng(0).permutation(len(records))]
    for name, array in (('main', records[blob]), ('poses', shuffled[pose]), ('less', shuffled[pose][:100])):
        with (tmp_path / f'{name}.cs').open('wb') as file:
            np.save(file, repack_fields(array))
    whole = read_cryosparc(data_dir / 'metadata/cryosparc_P12_J24_001_particles.cs').get_poses()
    for options in ({'passthrough': tmp_path / 'poses.cs'}, {'poses': tmp_path / 'poses.cs'}):
        found = read_particles(tmp_path / 'main.cs', **options).get_poses()
        assert rotation_distance(found.rot, whole.rot).max() < 0.01 and torch.allclose(found.shift, whole.shift, atol=1e-4)
    refuse(lambda: read_particles(tmp_path / 'main.cs', passthrough=tmp_path / 'less.cs'), 'uid', 'less.cs', 'main.cs row')
    refuse(lambda: read_particles(tmp_path / 'poses.cs'), 'blob/path', '--passthrough')
    assert read_particles(tmp_path / 'poses.cs', passthrough=tmp_path / 'main.cs').has_ctf
    refuse(lambda: read_particles(tmp_path / 'main.cs', poses=tmp_path / 'main.cs').get_poses(), 'no poses')


@pytest.mark.parametrize('name', ['metadata/relion31.star', 'metadata/sample_particles_relion30.star', 'images/relion_proj_batch.star', 'metadata/empiar_10076_7.cs'])
def test_downsampled_stack_and_star_agree(data_dir, tmp_path, name):
    table = read_particles(data_dir / name, datadir=data_dir / 'images')
    box = open_stack(table).box
    downsample_particles(table, tmp_path / 'small.mrcs', 32)
    small = read_particles(tmp_path / 'small.star')
    stack = open_stack(small)
    assert stack.box == 32 and stack.warnings == () and small.pixel_size * 32 == pytest.approx(table.pixel_size * box)
    if table.has_poses:
        torch.testing.assert_close(small.get_poses(torch.float64).shift, table.get_poses(torch.float64).shift)
    torch.testing.assert_close(small.get_ctf().defocus_u, table.get_ctf().defocus_u)
    original = open_stack(table)[:].mean((1, 2))
    np.testing.assert_allclose(stack[:].mean((1, 2)), original * (table.contrast_sign or 1), atol=1e-5)
    if name.endswith('.cs'):
        again = read_particles(tmp_path / 'small.cs')
        assert again.contrast_sign == 1 and again.box == 32 and (again.source.records['uid'] == table.source.records['uid']).all()
        np.testing.assert_array_equal(open_stack(again)[:], stack[:])


def test_stack_that_does_not_belong_is_refused(data_dir, tmp_path):
    table = read_particles(data_dir / 'images/rln_proj_64_shifted.star')
    write_stack(tmp_path / 'rln_proj_64_shifted.mrcs', np.zeros((4, 32, 32), np.float32), 1.0)
    write_particles(tmp_path / 'a.star', table)
    refuse(lambda: open_stack(read_particles(tmp_path / 'a.star')), '32 px', '64 px')
    write_stack(tmp_path / 'rln_proj_64_shifted.mrcs', np.zeros((3, 64, 64), np.float32), 1.0)
    refuse(lambda: open_stack(read_particles(tmp_path / 'a.star')), 'row 3', 'image 4', 'holds 3')


def test_simulated_table_becomes_relion31(tmp_path):
    rows = pandas.DataFrame({'stack': 'a b.mrcs', 'slice': [1, 0, 2], 'particle': [0, 1, 2], 'voltage': [300.0, 200.0, 300.0], 'cs': 2.7,
                             'amplitude_contrast': 0.1, 'defocus_u': [1e4 / 3, 2e4, 3e4], 'defocus_v': 1.5e4, 'defocus_angle': 10.0,
                             'euler_rot': 1 / 3, 'euler_tilt': 20.0, 'euler_psi': 30.0, 'shift_x': 0.1, 'shift_y': [-1e-9, 2.0, 3.0]})
    write_particles(tmp_path / 'a.star', ParticleTable(rows, 1.7, 64))
    again = read_particles(tmp_path / 'a.star')
    for column in rows:
        assert list(again.rows[column]) == list(rows[column]), column  # doubles come back bit for bit
    blocks = starfile.read(tmp_path / 'a.star')
    assert list(blocks) == ['optics', 'particles'] and len(blocks['optics']) == 2
    assert re.search(r'^# version 30001$', (tmp_path / 'a.star').read_text(), re.M)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_image_that_is_not_finite_is_named(tmp_path, value):
    images = np.zeros((6, 8, 8), np.float32)
    images[4, 2, 3] = value
    with mrcfile.new(tmp_path / 'a.mrcs') as file:
        file.set_data(images)
    stack = open_mrc_stack(tmp_path / 'a.mrcs').select(np.array([5, 4, 0]))
    assert not stack[[0, 2]].any()
    refuse(lambda: stack[:], 'row 1', 'image 5', 'a.mrcs', 'NaN')
    with mrcfile.new(tmp_path / 'map.mrc') as file:
        file.set_data(np.full((4, 4, 4), value, np.float32))
        file.voxel_size = 2.0
    refuse(lambda: read_volume(tmp_path / 'map.mrc'), 'map.mrc', '64 of 64')


@pytest.mark.parametrize('stored', [1, -1])
@pytest.mark.parametrize('asked', [None, True, False])
def test_downsampled_cs_is_bright_whoever_said_so(tmp_path, stored, asked):
    """Were the new cs file to keep a sign of -1, the next reader would negate the images once more."""
    images = np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32)
    write_stack(tmp_path / 'a.mrcs', images, 2.0)
    records = np.zeros(3, [('uid', 'u8'), ('blob/path', 'S10'), ('blob/idx', 'u4'), ('blob/shape', 'u4', 2), ('blob/psize_A', 'f4'), ('blob/sign', 'f4')])
    records['blob/path'], records['blob/idx'], records['blob/shape'], records['blob/psize_A'], records['blob/sign'] = b'a.mrcs', range(3), 16, 2.0, stored
    with (tmp_path / 'a.cs').open('wb') as file:
        np.save(file, records)
    downsample_particles(read_particles(tmp_path / 'a.cs'), tmp_path / 'b.mrcs', 16, invert_contrast=asked)
    sign = stored if asked is None else -1 if asked else 1
    again = read_particles(tmp_path / 'b.cs')
    assert again.contrast_sign == 1
    for table in (again, read_particles(tmp_path / 'b.star')):
        np.testing.assert_allclose(open_stack(table)[:], sign * images, atol=1e-6)


def test_poses_of_the_same_images_in_another_order_are_refused(tmp_path):
    """They match row for row in number, and every image would take the pose of another."""
    rows = pandas.DataFrame({'stack': 'a/s.mrcs', 'slice': range(4), 'particle': range(4), 'shift_x': 0.0, 'shift_y': 0.0})
    rows = rows.assign(euler_rot=[10.0, 20.0, 30.0, 40.0], euler_tilt=5.0, euler_psi=0.0)
    order = np.array([0, 2, 1, 3])
    write_particles(tmp_path / 'images.star', ParticleTable(rows, 2.0, 8))
    write_particles(tmp_path / 'sorted.star', ParticleTable(rows.assign(stack='b/s.mrcs'), 2.0, 8))
    write_particles(tmp_path / 'mixed.star', ParticleTable(rows.iloc[order].reset_index(drop=True), 2.0, 8))
    write_particles(tmp_path / 'renamed.star', ParticleTable(rows.assign(stack='t.mrcs').iloc[order].reset_index(drop=True), 2.0, 8))
    refuse(lambda: read_particles(tmp_path / 'images.star', poses=tmp_path / 'mixed.star'), 'mixed.star row 1', 'images.star', 'order')
    for name, angles in (('sorted', [10, 20, 30, 40]), ('renamed', [10, 30, 20, 40])):  # of other names: row for row, as the user says
        assert read_particles(tmp_path / 'images.star', poses=tmp_path / f'{name}.star').rows['euler_rot'].tolist() == angles
