"""docs/transforms.md says what is so on a GPU too. Oracle: the laws of check_op in float32."""

import pytest
import torch

from tests.test_transform_table import cells_of
from tools.transform_table import found, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]


@pytest.mark.parametrize("name", rows(torch.device("cpu")))
def test_cells_of_a_gpu(name):
    gpu = torch.device("cuda")
    cells, notes = found(gpu, [name])
    assert not [why for why in notes if why.startswith("WRONG")], notes
    assert cells[name] == cells_of(gpu)[name]
