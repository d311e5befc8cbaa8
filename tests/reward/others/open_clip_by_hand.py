"""A CLIP written down once more, under open_clip's names: what a file of HPSv2 holds, and what it computes."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads, inner, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    def __init__(self, vocabulary, length, side=32, patch=8, shared=8):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 24, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(24))
        self.visual.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, 24))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        self.visual.transformer = Tower(24, 3, 32, 2)
        self.visual.proj = nn.Parameter(torch.randn(24, shared))
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.randn(length, 16))
        self.transformer, self.ln_final = Tower(16, 2, 32, 2), nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, shared))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def see(self, shown):
        patches = self.visual.conv1(shown).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.expand(len(shown), 1, -1)
        x = self.visual.ln_pre(torch.cat([first, patches], dim=1) + self.visual.positional_embedding)
        return self.visual.ln_post(self.visual.transformer(x)[:, 0]) @ self.visual.proj

    def read(self, ids):
        """`ids` (1, L), one text without padding."""
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        return self.ln_final(self.transformer(x, mask))[:, -1] @ self.text_projection
