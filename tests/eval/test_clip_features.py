"""Features and scores of clips: the encoder reads the frames in the middle of a video, at the rate of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import Absent, UserError
from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import Rng, center, generators
from eval.embed import embed
from eval.features import ClipEncoder, open_encoder
from eval.run import evaluate
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from tests.conftest import clips
from tests.tars import write_tar

SIZES = {"image_size": 32, "patch_size": 8, "frames": 4, "dim": 32, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder of clips of 4 frames, four in a second."""
    cfg = families.VideoViT(**SIZES, positions="sequence", key_bias=False)
    cfg.name = "video_vit"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clips") / "export"
    about = {"step": 3, "objective": "videomae", "pool": "mean", "fps": 4.0}
    export.write(folder, build_model(cfg), about, [0.5] * 3, [0.25] * 3)
    return folder


def test_the_clip_is_in_the_middle(model: Path, shards: Path):
    samples, (encoder, facts) = Samples([str(clips(shards.parent))]), open_encoder(str(model))
    assert type(encoder) is ClipEncoder and facts["step"] == 3 and encoder.stand_in().shape == (4, 3, 32, 32)
    read = encoder.read(samples, 5)
    film = EncodedVideo(samples.read(5)["mp4"])
    (frames,) = film.frames_at(lambda seconds: [[0.5 + n / 4 for n in range(4)]])  # 1 of 2 seconds
    np.testing.assert_array_equal(read, np.stack([center(frame, 32) for frame in frames]))
    assert not (read[0] == read[1]).all()
    with torch.no_grad():
        tokens = encoder.backbone(torch.from_numpy(read[None]).float().div(255).sub(0.5).div(0.25)).tokens
    torch.testing.assert_close(encoder.pooled([read]), tokens.mean(1))


def test_protocols_score_clips(model: Path, shards: Path, tmp_path: Path):
    found = {}
    for name in (str(model), "clip_pixels"):
        data = [str(clips(shards.parent))]
        rows = evaluate(name, ["knn", "linear"], data, data, cache=tmp_path, options={"linear": {"steps": 20}})
        found |= {(row["model"], row["protocol"]): row["value"] for row in rows if row["metric"] == "accuracy"}
        assert {row["unit"] for row in rows} == {"clips"} and {row["count"] for row in rows} == {48}
    assert len(found) == 4  # the colours of the two pictures differ; 20 steps are too few for the untrained encoder
    assert min(value for key, value in found.items() if key != ("pretrained", "linear")) > 0.75
    with pytest.raises(UserError, match="robustness corrupts images"):
        evaluate(str(model), ["robustness"], data, data, cache=tmp_path)


def test_the_attentive_probe_trains_on_clips_at_random_times(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And the probe asks for crops that are flipped as often as `flip` says."""
    data, (encoder, _) = [str(clips(shards.parent))], open_encoder(str(model))
    options = {"epochs": 2, "batch": 16, "rates": [5e-3], "decays": [0.01], "heads": 2, "flip": 0.25}
    plain, flips = ClipEncoder.augmented, set[float]()

    def recorded(self: ClipEncoder, samples: Samples, number: int, rng: Rng, flip: float = 0.5) -> np.ndarray:
        flips.add(flip)
        return plain(self, samples, number, rng, flip)

    monkeypatch.setattr(ClipEncoder, "augmented", recorded)
    rows = evaluate(str(model), ["attentive"], data, data, cache=tmp_path, options={"attentive": options})
    assert {row["metric"]: row["count"] for row in rows}["accuracy"] == 48 and flips == {0.25}
    samples = Samples(data)
    made = [encoder.augmented(samples, 5, generators((1, n))) for n in (0, 0, 1)]
    assert made[0].shape == (4, 3, 32, 32) and (made[0] == made[1]).all() and (made[0] != made[2]).any()
    unflipped, flipped = (encoder.augmented(samples, 5, generators((1, 0)), flip) for flip in (0.0, 1.0))
    assert (unflipped[..., ::-1] == flipped).all() and (unflipped != flipped).any()


def test_embed_writes_features_of_clips(model: Path, shards: Path, tmp_path: Path):
    data = [str(clips(shards.parent))]
    assert embed(str(model), data, tmp_path / "patches", output="patches") == (48, 0)
    features = np.load(tmp_path / "patches" / "part-00000.npy")
    assert features.shape == (48, 2 * 4 * 4, 32)
    encoder, _ = open_encoder(str(model))
    samples = Samples(data)
    torch.testing.assert_close(
        torch.from_numpy(features[7].mean(0)), encoder.pooled([encoder.read(samples, 7)])[0], rtol=1e-4, atol=1e-5
    )
    assert json.loads((tmp_path / "patches" / "part-00000.jsonl").read_text().splitlines()[7])["key"]


def test_what_does_not_fit(model: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"its positions are for frames of 32 pixels, not of 48; .*eval.image_size=null"
    ):
        open_encoder(str(model), 48)
    write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("0.txt", b"no video")])
    encoder, _ = open_encoder(str(model))
    with pytest.raises(Absent, match="holds no clip member"):
        encoder.read(Samples([str(tmp_path)]), 0)
