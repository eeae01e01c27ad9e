import pytest
import torch

from umiad.nn.products import bmm_by_eights


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_the_product_is_the_product(count):
    rng = torch.Generator().manual_seed(count)
    rows, matrices = (torch.randn(*shape, generator=rng) for shape in ((5, count, 12), (5, 12, 3)))
    exact = torch.bmm(rows.double(), matrices.double())
    found = bmm_by_eights(rows, matrices)
    assert found.shape == (5, count, 3)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)  # float32 sums of 12 terms


def test_a_row_is_the_same_alone_and_among_many():
    rng = torch.Generator().manual_seed(0)
    rows, matrices = torch.randn(16, 32, 448, generator=rng), torch.randn(16, 448, 64, generator=rng)
    together = bmm_by_eights(rows, matrices)
    for count in (1, 3, 8):
        alone = torch.cat([bmm_by_eights(part, matrices) for part in rows.split(count, dim=1)], dim=1)
        apart = (alone - together).abs().max() / together.abs().max()
        assert float(apart) <= 1e-6  # 0 on the processors tried; no library promises it


def test_a_graph_with_a_free_number_of_rows_has_the_plain_product():
    class Product(torch.nn.Module):
        def forward(self, rows, matrices):
            return bmm_by_eights(rows, matrices)

    given = torch.ones(5, 3, 12), torch.ones(5, 12, 4)
    program = torch.export.export(Product(), given, dynamic_shapes=({1: torch.export.Dim("rows")}, None))
    for count in (2, 9):
        found = program.module()(torch.ones(5, count, 12), given[1])
        assert found.shape == (5, count, 4)
        assert (found == 12).all()
