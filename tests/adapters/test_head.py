"""The head that comes for free."""

import torch

from mcdi_hf.adapters.head import class_means, head_logits, imprint_head


def test_imprinted_head_classifies_by_the_nearest_mean() -> None:
    torch.manual_seed(0)
    features, queries = torch.randn(2, 7, 5), torch.randn(2, 9, 5)
    labels = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [1, 0, 0, 1, 1, -1, -1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    means = class_means(features, labels, 3)
    torch.testing.assert_close(means[1, 1], features[1, [0, 3, 4]].mean(dim=0))
    weight, bias = imprint_head(means, 4.0, mask)
    logits = head_logits(queries, weight, bias)
    expected = -4.0 / 2 * torch.cdist(queries, means).square()
    for task, ways in ((0, 3), (1, 2)):
        difference = (logits - expected)[task, :, :ways]
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-4)
    assert (weight[1, 2] == 0).all() and bias[1, 2] == 0
    torch.testing.assert_close(weight.sum(dim=1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    padded = head_logits(queries, weight, bias, mask)
    assert (padded[1, :, 2] == float("-inf")).all() and padded[mask.unsqueeze(1).expand_as(padded)].isfinite().all()
