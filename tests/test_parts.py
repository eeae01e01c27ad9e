import torch

from umiad.nn.parts import in_parts


def test_parts_cover_the_batch_in_order_and_keep_the_bound():
    batch = torch.arange(10).reshape(5, 2)
    parts = in_parts(batch, 2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), batch)


def test_a_traced_graph_takes_the_batch_whole(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert [len(part) for part in in_parts(torch.zeros(5, 2), 2)] == [5]
