"""A BLIP with a head, written down once more under the names of Salesforce's BLIP: what `ImageReward.pt` holds.

The picture encoder is timm's ViT in a few lines, the text encoder transformers' BERT, whose names BLIP's has kept.
"""

import torch
from torch import nn
from transformers import BertConfig, BertModel

WIDTH, TEXT = 64, 128  # one head and two


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x):
        query, key, value = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn.proj((query @ key.transpose(1, 2) / WIDTH**0.5).softmax(dim=-1) @ value)
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Eye(nn.Module):
    def __init__(self, side=32, patch=8):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, WIDTH))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, patch, patch)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, shown):
        patches = self.patch_embed.proj(shown).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(shown), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageRewardByHand(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary + 2, hidden_size=TEXT, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=96, max_position_embeddings=40, is_decoder=True, add_cross_attention=True,
            attn_implementation="eager",
        )  # fmt: skip
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder = Eye()
        self.blip.text_encoder = BertModel(config, add_pooling_layer=False)
        for layer in self.blip.text_encoder.encoder.layer:  # looks at pictures of another width than its own
            layer.crossattention.self.key = nn.Linear(WIDTH, TEXT)
            layer.crossattention.self.value = nn.Linear(WIDTH, TEXT)
        self.blip.text_encoder.embeddings.token_type_embeddings.weight.requires_grad_(False)
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(WIDTH, 4), nn.Linear(TEXT, 4)
        self.mlp.layers = nn.Sequential(
            nn.Linear(TEXT, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, shown, ids):
        """Of one picture and one text without padding: (1, 3, H, W), (1, L) -> a number."""
        everywhere = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # a decoder by name, it reads in both directions
        read = self.blip.text_encoder(
            ids, attention_mask=everywhere, encoder_hidden_states=self.blip.visual_encoder(shown), use_cache=False
        ).last_hidden_state
        return (self.mlp.layers(read[0, 0]).item() - 0.16717362830052426) / 1.0333394966054072

    def weights(self):
        """As its authors' file names them: BLIP has no types of tokens, and keeps the positions' numbers."""
        found = {name: value for name, value in self.state_dict().items() if "token_type" not in name}
        return found | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
