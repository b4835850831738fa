"""What the prose quotes, read when the site is built: measured numbers from benchmarks/results, code from the notebooks.

`{{subspace.csv: knn where set=s2u, method=subspace | .3f}}` is the value of a column in the rows that fit: one number where they agree to the
digits shown, "a to b" where they do not. A value with a comma stands in quotes. No row, no number, no site: a sentence cannot outlive its measurement.

`{{cell tutorials/T13_extend: class BallDecoder}}` is the one code cell of that notebook which begins so.
"""
import csv
import re
from functools import cache
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[2]
results = root / 'benchmarks' / 'results'
pattern = re.compile(r'\{\{(\w+\.csv): *([^|}]+?)(?: where ([^|}]+?))? *\| *([^}]+?)\}\}')

cell_pattern = re.compile(r'\{\{cell ([\w/]+): *([^}\n]+)\}\}')


@cache
def read_rows(name):
    """Return the rows of a table of results."""
    with open(results / name, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def fill_number(match):
    """Return the text that stands for one placeholder."""
    name, column, conditions, style = match[1], match[2], match[3] or '', match[4]
    wanted = {key.strip(): quoted or plain.strip() for key, quoted, plain in re.findall(r'([^=,]+)=(?:"([^"]*)"|([^,]*))', conditions)}
    found = [row for row in read_rows(name) if all(row.get(key) == value for key, value in wanted.items())]
    values = [float(row[column]) for row in found if row.get(column)]
    if not values:
        raise SystemExit(f'benchmarks/results/{name} has no {column} where {conditions or "anything"}; a page of the site quotes it as {match[0]}')
    least, most = (format(value, style) for value in (min(values), max(values)))
    least, most = (text.replace('0.', '.', 1) if text.startswith('0.') else text for text in (least, most))
    return least if least == most else f'{least} to {most}'


def fill_cell(match):
    """Return the code that stands for one placeholder."""
    notebook = nbformat.read(root / 'nbs' / f'{match[1]}.ipynb', 4)
    found = [cell.source for cell in notebook.cells if cell.cell_type == 'code' and cell.source.startswith(match[2])]
    if len(found) != 1:
        raise SystemExit(f'{len(found)} code cells of nbs/{match[1]}.ipynb begin with "{match[2]}", where a page of the site wants one')
    return found[0].strip()


def fill_quotes(markdown):
    """Put measured numbers and code in the place of their placeholders."""
    return cell_pattern.sub(fill_cell, pattern.sub(fill_number, markdown))
