"""Features and scores of clips: the encoder reads the frames in the middle of a video, at the rate of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import Absent, UserError
from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.parts.video_clip import Clip, Clips, DecodedFilm
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import Rng, center, generators
from eval import video
from eval.attentive import AttentiveHead
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


@pytest.fixture
def films(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of two seconds, of noise that depends on the sample, with frames of 32 × 48 pixels."""

    def decode(part: Clip, members: dict[str, bytes], known: dict[str, Any]) -> Clips:
        rng = np.random.default_rng([*members["mp4"]])
        level = rng.integers(0, 200, (8, 1, 3, 1))  # of each frame and each third of its width
        pixels = (level.repeat(16, 2) + rng.integers(0, 56, (8, 32, 48, 3))).astype(np.uint8)
        return Clips(DecodedFilm(pixels, 4.0), part.frames, part.fps)

    monkeypatch.setattr(Clip, "decode", decode)


def test_clips_of_a_video_are_spread_in_time_and_over_the_frame(model: Path, shards: Path, films: None):
    samples, (encoder, _) = Samples([str(clips(shards.parent))]), open_encoder(str(model))
    found = encoder.spread(samples, 5, segments=2, views=3)
    assert found.shape == (6, 4, 3, 32, 32)
    film = encoder.part.decode(samples.read(5), {}).film
    both = film.frames_at(lambda seconds: [[place + n / 4 for n in range(4)] for place in (0.25, 0.75)])  # of 1 second
    for segment, frames in enumerate(both):
        for view, left in enumerate((0, 8, 16)):
            expected = np.stack([frame[:, left : left + 32].transpose(2, 0, 1) for frame in frames])
            np.testing.assert_array_equal(found[3 * segment + view], expected)
    np.testing.assert_array_equal(encoder.spread(samples, 5, 1, 1)[0], encoder.read(samples, 5))


def test_videos_are_classified_by_the_mean_of_the_probabilities_of_their_clips(
    model: Path, shards: Path, films: None, monkeypatch: pytest.MonkeyPatch
):
    samples, (encoder, _) = Samples([str(clips(shards.parent))]), open_encoder(str(model))
    head = AttentiveHead(32, 3, heads=2)
    head.initialise(torch.Generator().manual_seed(0))
    numbers, all_tokens = np.arange(0, 48, 2), []
    for number in numbers:
        each = torch.from_numpy(encoder.spread(samples, int(number), 3, 2)).float().div(255).sub(0.5).div(0.25)
        with torch.no_grad():
            all_tokens.append(torch.cat([encoder.backbone(one[None]).tokens for one in each]))
    with torch.no_grad():  # answers differ from clip to clip
        head.classify.weight.mul_(500)
        head.classify.bias.sub_(head(torch.cat(all_tokens)).mean(0))
        logits = [head(tokens) for tokens in all_tokens]
    sizes, tokens_of = set[int](), video.tokens_of
    monkeypatch.setattr(video, "tokens_of", lambda one, images: sizes.add(len(images)) or tokens_of(one, images))
    monkeypatch.setattr(type(encoder), "batch", 13)  # two videos of six clips at once
    found = video.predict(encoder, samples, numbers, head, video.Config(segments=3, views=2)).tolist()
    assert sizes == {12}
    assert found == [int(each.softmax(1).mean(0).argmax()) for each in logits]
    for others in ([each[0] for each in logits], [each[3] for each in logits], [each.mean(0) for each in logits]):
        assert found != [int(other.argmax()) for other in others]  # a single clip, and the mean of the logits


@pytest.mark.slow
def test_the_video_protocol(model: Path, shards: Path, tmp_path: Path):
    data = [str(clips(shards.parent))]
    options = {"epochs": 4, "batch": 16, "rates": [5e-3], "decays": [0.01], "heads": 2, "segments": 2, "views": 2}
    rows = evaluate(str(model), ["video"], data, data, cache=tmp_path, options={"video": options})
    found = {row["metric"]: row["value"] for row in rows}
    assert found["accuracy"] > 0.75 and (found["segments"], found["views"], found["rate"]) == (2, 2, 5e-3)
    assert {row["unit"] for row in rows} == {"clips"}
    with pytest.raises(UserError, match="pixels: video scores models that read clips; choose attentive"):
        evaluate("pixels", ["video"], [str(shards)], [str(shards)], cache=tmp_path)
