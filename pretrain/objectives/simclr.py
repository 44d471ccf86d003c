"""SimCLR: two augmented views of an image find each other among all others of the batch (arXiv 2002.05709).

    z_a, z_b = g(f(t_a(x))), g(f(t_b(x)));   loss = -log softmax(cos(z_i, z_j) / temperature) at the partner, mean over both views

Shapes: B images, two views each.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.views import Augment, crops
from pretrain.config import Section
from pretrain.objectives.base import Objective
from pretrain.ops.contrastive import nt_xent
from pretrain.ops.heads import ProjectionHead


@dataclass
class Config(Section):
    temperature: float = 0.1
    head_hidden: int = 2048
    head_outputs: int = 128
    crop_scale: float = 0.08  # smallest share of the image's area in a random crop
    color: float = 1.0  # strength s of the colour jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s)
    blur: float = 0.5  # probability of a Gaussian blur


class SimCLR(Objective):
    couples_batch = True

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.head = ProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)

    @staticmethod
    def views(cfg, image_size, patch_size):
        s = cfg.color
        jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
        augment = Augment(image_size, scale=(cfg.crop_scale, 1.0), jitter=jitter, gray=0.2, blur=cfg.blur)

        def view(sample, rng):
            return crops(sample, {"image": [augment] * 2}, rng)  # [2, 3, H, W]

        return view

    def forward(self, batch, step):
        features = self.backbone(batch["image"].flatten(0, 1)).cls  # [2·B, D]: one forward for both views
        z = self.head(features).unflatten(0, (-1, 2))  # [B, 2, outputs]
        return nt_xent(z[:, 0], z[:, 1], self.cfg.temperature), {}

    def encoder(self):
        return self.backbone
