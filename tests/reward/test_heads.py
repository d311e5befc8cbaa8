import copy

import torch

from reward.heads import PaperHeatmapHead


def test_the_papers_heatmap_head_keeps_its_digits_behind_large_biases():
    """Against itself in float64: its norms take means away, however large, and float32 is enough for what is left."""
    torch.manual_seed(0)
    head = PaperHeatmapHead(24, (32, 32), 0.0625)
    for layer in head.body:
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.bias.data += 100
    seen = torch.randn(2, 24, 4, 4)
    with torch.no_grad():
        exact = copy.deepcopy(head).double()(seen.double()).float()
        torch.testing.assert_close(head(seen), exact, atol=1e-4, rtol=0)
