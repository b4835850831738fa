"""The GPU benchmark at toy size on the CPU, and the quality comparison of bf16: their code runs and their tables hold what they say."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

root = Path(__file__).resolve().parent.parent


def run_benchmark(name, *arguments):
    """Run a script of benchmarks/; return what it printed."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root), 'MPLBACKEND': 'agg'}
    done = subprocess.run([sys.executable, str(root / 'benchmarks' / name), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_toy_size_gives_both_tables(tmp_path):
    text = run_benchmark('bench_gpu.py', '--toy', '--train', '-o', tmp_path / 'gpu.csv')
    assert 'toy size' in text
    table = pd.read_csv(tmp_path / 'gpu.csv')
    assert set(table.program) == {'recon_nb', 'recon_nb, compiled'} and (table['images/s'] > 0).all() and table.peak.between(0, 1).all()
    runs = pd.read_csv(tmp_path / 'gpu.runs.csv')
    assert (runs.s > 0).all() and runs['kNN accuracy'].between(0, 1).all() and runs.images.eq(96).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so(tmp_path):
    assert 'No GPU here' in run_benchmark('bench_gpu.py', '-o', tmp_path / 'gpu.csv')
    assert not (tmp_path / 'gpu.csv').exists()


@pytest.mark.slow
def test_precisions_are_compared_from_one_seed(tmp_path, data_dir):
    run_benchmark('make_data.py', '--set', 's1', '--box', 16, '--n', 120, '-o', tmp_path / 'data')
    options = [tmp_path / 'data', '-o', tmp_path / 'runs', '--epochs', 1, '--csv', tmp_path / 'table.csv', '--set', 'model.decoder_dim=32', 'model.encoder_dim=32']
    run_benchmark('bf16_quality.py', *options)
    table = pd.read_csv(tmp_path / 'table.csv')
    assert table.precision.tolist() == ['bf16', 'fp32'] and table['auc - fp32'][1] == 0
    assert table.recon.nunique() == 2 and abs(table.recon[0] / table.recon[1] - 1) < 0.05  # other products, the same run
    before = (tmp_path / 'table.csv').read_text()
    run_benchmark('bf16_quality.py', *options)  # nothing is trained again
    assert (tmp_path / 'table.csv').read_text() == before
