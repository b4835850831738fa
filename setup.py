"""Give setuptools, from settings.ini, every field that the generated pyproject.toml calls dynamic."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

stages = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable', '6': 'Mature', '7': 'Inactive'}
extras = {name: settings[f'{name}_requirements'].split() for name in ('dev', 'docs', 'app')}

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    keywords=settings['keywords'].split(),
    long_description=(root / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    license='Apache-2.0',
    url=settings['git_url'],
    project_urls={'Documentation': settings['doc_host'] + settings['doc_baseurl']},
    classifiers=[
        f"Development Status :: {settings['status']} - {stages[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        f"Programming Language :: Python :: {settings['min_python']}",
        'Topic :: Scientific/Engineering :: Bio-Informatics',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
    packages=find_packages(include=['recon_nb', 'recon_nb.*']),
    install_requires=settings['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
