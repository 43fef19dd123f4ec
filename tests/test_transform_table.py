"""docs/transforms.md says what is so. Oracle: the laws of check_op, run on every op of the page."""

import pytest
import torch

from tools.transform_table import COLUMNS, PAGE, between, found, rows

CPU = torch.device("cpu")


def cells_of(device):
    """row -> cells, as the page has them."""
    first, last = between(device)
    lines = PAGE.read_text().split(first)[1].split(last)[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert table[0] == ["op", *COLUMNS]
    return {name: cells for name, *cells in table[1:]}


@pytest.mark.parametrize("name", rows(CPU))
def test_cells_of_a_cpu(name):
    cells, notes = found(CPU, [name])
    assert not [why for why in notes if why.startswith("WRONG")], notes
    assert cells[name] == cells_of(CPU)[name]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_has_all_rows_and_nothing_wrong(device):
    cells = cells_of(torch.device(device))
    assert [*cells] == [*rows(CPU)]
    assert {cell for row in cells.values() for cell in row} <= {"yes", "refused"}
