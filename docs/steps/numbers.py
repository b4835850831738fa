"""Measured numbers in the prose, read from benchmarks/results when the site is built.

`{{subspace.csv: knn where set=s2u, method=subspace | .3f}}` is the value of a column in the rows that fit: one number where they agree to the
digits shown, "a to b" where they do not. No row, no number, no site: a sentence cannot outlive its measurement.
"""
import csv
import re
from functools import cache
from pathlib import Path

results = Path(__file__).resolve().parents[2] / 'benchmarks' / 'results'
pattern = re.compile(r'\{\{(\w+\.csv): *([^|}]+?)(?: where ([^|}]+?))? *\| *([^}]+?)\}\}')


@cache
def read_rows(name):
    """Return the rows of a table of results."""
    with open(results / name, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def fill_number(match):
    """Return the text that stands for one placeholder."""
    name, column, conditions, style = match[1], match[2], match[3] or '', match[4]
    wanted = dict(re.split(r'=', part.strip(), maxsplit=1) for part in conditions.split(',') if part.strip())
    found = [row for row in read_rows(name) if all(row.get(key) == value for key, value in wanted.items())]
    values = [float(row[column]) for row in found if row.get(column)]
    if not values:
        raise SystemExit(f'benchmarks/results/{name} has no {column} where {conditions or "anything"}; a page of the site quotes it as {match[0]}')
    least, most = (format(value, style) for value in (min(values), max(values)))
    least, most = (text.replace('0.', '.', 1) if text.startswith('0.') else text for text in (least, most))
    return least if least == most else f'{least} to {most}'


def fill_numbers(markdown):
    """Put measured numbers in the place of their placeholders."""
    return pattern.sub(fill_number, markdown)
