"""Fixtures and markers that every test may use."""
import os
from pathlib import Path

import pytest


def pytest_configure(config):
    """Name the markers."""
    config.addinivalue_line('markers', 'slow: takes more than 5 s; left out by make test-fast')
    config.addinivalue_line('markers', 'gpu: needs CUDA')


@pytest.fixture(scope='session')
def data_dir():
    """Return the folder of real data, or skip, saying why."""
    folder = os.environ.get('RECON_NB_DATA')
    if not folder:
        pytest.skip('RECON_NB_DATA is not set: it names the folder of real data')
    return Path(folder)
