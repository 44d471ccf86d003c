"""Objectives as a user would write them: the texts of three files, for three modalities. Nothing in the project
knows them."""

QUEUE = '''
"""Momentum contrast: a view finds the other one of its image among a queue of former ones (after arXiv 1911.05722)."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.config import option
from data_pipeline.views.augmentations import Augment, crops
from pretrain.objectives.base import Exported, Objective
from pretrain.objectives.options import Options
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.queue import Queue


@dataclass
class Config(Options):
    size: int = option(64, low=1)
    outputs: int = option(16, low=1)
    temperature: float = option(0.2, above=0)
    momentum: float = option(0.9, low=0, high=1)


class Momentum(Objective):
    kept_in_eval = ("teacher",)
    averaged = {"student": "teacher"}

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        body = backbone()
        self.student = nn.ModuleDict({"backbone": body, "head": nn.Linear(body.embed_dim, cfg.outputs)})
        self.teacher = make_teacher(self.student).eval()
        self.queue = Queue(cfg.size, cfg.outputs)

    @staticmethod
    def views(cfg, about):
        augment = Augment(about.image_size, scale=(0.3, 1.0), gray=0.2)
        return lambda sample, rng: crops(sample, {"image": [augment] * 2}, rng)

    def forward(self, batch, step):
        first, second = batch["image"].unbind(1)
        q = F.normalize(self.student["head"](self.student["backbone"](first).cls).float(), dim=1)
        with torch.no_grad():
            k = F.normalize(self.teacher["head"](self.teacher["backbone"](second).cls).float(), dim=1)
        self.queue.hold(k, step)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.rows.float().T.clone()], 1)
        return F.cross_entropy(logits / self.cfg.temperature, logits.new_zeros(len(q), dtype=torch.long)), {}

    def after_step(self, step):
        ema_update(self.teacher, self.student, self.cfg.momentum, self.skipped)
        self.queue.push(step, self.skipped)

    def exports(self):
        return {"model": Exported(self.teacher["backbone"])}
'''

TOWERS = '''
"""Two towers: an image and its caption find each other among the pairs of the batch (after arXiv 2103.00020)."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.config import Section, option
from data_pipeline.parts.caption import Caption
from data_pipeline.parts.image import Image
from data_pipeline.views.augmentations import Augment, crops
from pretrain.objectives.base import Exported, Objective
from pretrain.objectives.options import Options, network
from pretrain.ops.gather import gather, world


@dataclass
class Config(Options):
    text: Section = network("bert_micro", vocab_size=257, dim=32, context=32)
    outputs: int = option(16, low=1)


class Towers(Objective):
    parts = {"image": Image(), "text": Caption(length=32)}
    couples_batch = True

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.image, self.text = backbone(), backbone("text")
        for name, parameter in self.text.head.named_parameters():  # it would predict tokens; its weights are the embedding's
            parameter.requires_grad_(parameter is self.text.embed.weight)
        self.heads = nn.ModuleList(nn.Linear(tower.embed_dim, cfg.outputs) for tower in (self.image, self.text))

    def train(self, mode=True):
        super().train(mode)
        self.text.head.eval()
        return self

    @staticmethod
    def views(cfg, about):
        augment = Augment(about.image_size, scale=(0.5, 1.0))

        def view(sample, rng):
            letters = np.frombuffer(sample["text"].encode()[: about.length], np.uint8)
            row = np.full(about.length, 256, np.int64)
            row[: len(letters)] = letters
            return crops(sample, {"image": augment}, rng) | {"text": row}

        return view

    def forward(self, batch, step):
        documents = torch.where(batch["text"] == 256, -1, 0)
        words = self.text(batch["text"], documents=documents).tokens
        kept = (documents >= 0).unsqueeze(-1)
        mean = (words * kept).sum(1) / kept.sum(1).clamp_min(1)
        image = F.normalize(self.heads[0](self.image(batch["image"]).cls).float(), dim=1)
        text = F.normalize(self.heads[1](mean).float(), dim=1)
        targets = len(image) * world()[0] + torch.arange(len(image), device=image.device)
        pairs = (image @ gather(text).T, text @ gather(image).T)
        return sum(F.cross_entropy(logits / 0.1, targets) for logits in pairs) / 2, {}

    def exports(self):
        return {"model": Exported(self.image), "text": Exported(self.text, "mean")}
'''

LABELS = '''
"""Labels: a linear layer on the features tells the classes apart (softmax regression; Cox 1958, doi 10.1111/j.2517-6161.1958.tb00292.x)."""
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import nn

from common.config import option
from data_pipeline.parts.image import Image
from data_pipeline.parts.label import Label
from data_pipeline.views.augmentations import Augment, crops
from pretrain.objectives.base import Exported, Objective
from pretrain.objectives.options import Options


@dataclass
class Config(Options):
    classes: int = option(2, low=2)
    smoothing: float = option(0.1, low=0, high=1)


class Labels(Objective):
    parts = {"image": Image(), "label": Label()}

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.head = nn.Linear(self.backbone.embed_dim, cfg.classes)

    @staticmethod
    def views(cfg, about):
        if len(about.classes) > cfg.classes:
            raise ValueError(f"objective.classes = {cfg.classes}: the shards have {len(about.classes)}")
        augment = Augment(about.image_size, scale=(0.3, 1.0))
        return lambda sample, rng: crops(sample, {"image": augment}, rng) | {"label": np.int64(sample["label"])}

    def forward(self, batch, step):
        logits = self.head(self.backbone(batch["image"]).cls).float()
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return F.cross_entropy(logits, batch["label"], label_smoothing=self.cfg.smoothing), {"accuracy": right}

    def exports(self):
        return {"model": Exported(self.backbone)}
'''

OWN = {"queue": QUEUE, "towers": TOWERS, "labels": LABELS}
