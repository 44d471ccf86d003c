"""Pixels of 16 bits and of floats keep their numbers: from the file over views, device, export and features."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch

from common.errors import ConfigError, Damaged, DataError, UserError
from data_pipeline.build.build_shards import build
from data_pipeline.formats.decode import decode_image, inspect
from data_pipeline.formats.pixels import PIXEL_DTYPES, converted, displayed, picture, rounded
from data_pipeline.parts.image import Image
from data_pipeline.parts.video_clip import Clip
from data_pipeline.shards.samples import Samples
from data_pipeline.views import colors, device_color
from data_pipeline.views.augmentations import Augment, center, crops, generators, resize
from data_pipeline.views.rand_augment import erased
from eval import report
from eval.features import open_encoder
from eval.pictures import data_url
from eval.run import evaluate
from launch.preview import preview
from pretrain.build import build_objective, build_stream, open_samples, placed, stored_pixels
from pretrain.recipes import recipe
from pretrain.recipes.sections import Data
from pretrain.train import train
from tests.parity.test_decode import npy, tiff

BANDS = 5
SMALL = [
    "model=vit_tiny",
    "model.image_size=16",
    "model.patch_size=8",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "data.batch=4",
    "data.workers=0",
    "threads=1",
    "device=cpu",
    "steps=2",
    "log=1",
]


def scene(dtype: str, seed: int = 0, side: int = 40, bands: int = BANDS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.startswith("u"):
        return rng.integers(0, np.iinfo(dtype).max, (side, side, bands), dtype, endpoint=True)
    return (rng.standard_normal((side, side, bands)) * 1000).astype(dtype)


# ---------------------------------------------------------------- files
def test_conversions_are_those_of_the_table():
    eight, sixteen = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
    assert np.array_equal(converted(eight, 16, "uint16"), eight.astype(np.uint16) * 257)
    assert np.array_equal(converted(sixteen, 16, "uint16"), sixteen)
    for bits in (9, 12, 14, 15):
        top = (1 << bits) - 1
        few = np.arange(top + 1, dtype=np.uint16)
        for dtype, highest in (("uint8", 255), ("uint16", 65535)):
            assert np.array_equal(converted(few, bits, dtype), np.rint(few.astype(float) * highest / top)), bits
        assert len({*converted(few, bits, "uint16").tolist()}) == top + 1  # no two values become one
        assert np.array_equal(converted(few, bits, "float32"), few.astype(np.float32) / np.float32(top))
        with pytest.raises(Damaged, match=f"numbers up to {top + 1}, but the {bits} bits of this set end at {top}"):
            converted(np.array([top + 1], np.uint16), bits, "uint16")
    for stored in ("int16", "float16", "float32"):
        values = scene(stored)
        assert np.array_equal(converted(values, 16, "float32"), values)
        for dtype in ("uint8", "uint16"):
            with pytest.raises(
                Damaged, match=f"holds {stored} pixels, whose range of values is not known, but {dtype}"
            ):
                converted(values, 16, dtype)
    for bad in (np.nan, np.inf, 1e39):
        with pytest.raises(Damaged, match="holds NaN, infinity or numbers beyond float32"):
            converted(np.array([bad]), 16, "float32")


@pytest.mark.parametrize("stored", ["uint8", "uint16", ">u2", "int16", "float16", "float32", "float64"])
def test_arrays_and_tiffs_keep_their_numbers(stored: str):
    values = scene(np.dtype(stored).newbyteorder("=").name).astype(stored)
    dtype = {"uint8": "uint8", "uint16": "uint16", ">u2": "uint16"}.get(stored, "float32")
    files = [(npy(values), "npy"), (npy(np.asfortranarray(values)), "npy")]
    files += [(tifffile_of(values, planarconfig=way), "tif") for way in ("contig", "separate")]
    for data, extension in files:
        out = decode_image(data, extension, BANDS, dtype=dtype)
        assert out.dtype == dtype and np.array_equal(out, values.astype(dtype)) and out.flags.c_contiguous
        facts = inspect(data, extension)
        assert facts.kind.endswith(f"{np.dtype(stored).itemsize * 8} bits, 5 channels" if "u" in stored else
                                   f"{stored}, 5 channels")  # fmt: skip
        assert (facts.low, facts.high) == (values.astype(dtype).min(), values.astype(dtype).max())
    gray = decode_image(npy(values[..., :1]), "npy", 3, dtype=dtype)
    assert np.array_equal(gray, values[..., :1].astype(dtype).repeat(3, 2))
    luma = values[..., :3].astype(np.float64) @ (0.299, 0.587, 0.114)
    one = decode_image(npy(values[..., :3]), "npy", 1, dtype=dtype)[..., 0]
    assert np.abs(one - luma).max() <= (1 if "u" in stored else 1e-3)
    with pytest.raises(Damaged, match="holds 5 channels, but 4 are requested"):
        decode_image(files[-1][0], "tif", 4, dtype=dtype)


def tifffile_of(values: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    stored = values.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else values
    tifffile.imwrite(out, np.ascontiguousarray(stored), photometric="minisblack", **options)
    return out.getvalue()


def test_png_of_sixteen_bit_colours():
    rgb, alpha = scene("uint16", bands=3), scene("uint16", 1, bands=1)
    _, plain = cv2.imencode(".png", rgb[..., ::-1])
    _, clear = cv2.imencode(".png", np.dstack([rgb[..., ::-1], alpha]))
    assert np.array_equal(decode_image(plain.tobytes(), "png", dtype="uint16"), rgb)
    assert np.array_equal(decode_image(clear.tobytes(), "png", 4, dtype="uint16"), np.dstack([rgb, alpha]))
    share = alpha / 65535
    on_white = np.rint(rgb * share + 65535 * (1 - share))
    assert np.array_equal(decode_image(clear.tobytes(), "png", dtype="uint16"), on_white)
    assert np.abs(decode_image(clear.tobytes(), "png").astype(int) - on_white / 257).max() < 2  # Pillow's, at 8 bits
    assert inspect(plain.tobytes(), "png")[:3] == ("PNG, 16 bits, 3 channels", rgb.min(), rgb.max())
    few = (rgb >> 4).astype(np.uint16)
    _, twelve = cv2.imencode(".png", few[..., ::-1])
    assert np.array_equal(decode_image(twelve.tobytes(), "png", bits=12, dtype="uint16"), converted(few, 12, "uint16"))
    with pytest.raises(Damaged, match=r"`bits` = 12 cannot be applied; write data.pixel_dtype=uint16"):
        decode_image(twelve.tobytes(), "png", bits=12)
    with pytest.raises(Damaged, match="chunk at byte"):
        decode_image(plain.tobytes()[:-30], "png", dtype="uint16")


def test_other_tiffs():
    gray = scene("uint16", bands=1)
    assert np.array_equal(decode_image(tiff(gray), "tif", 1, dtype="uint16"), gray)
    assert np.array_equal(decode_image(tiff(gray, photometric=0), "tif", 1, dtype="uint16"), 65535 - gray)
    rgb = scene("uint16", bands=3)
    for options in ({"compression": "lzw"}, {"compression": "zlib", "predictor": True}, {"bigtiff": True}):
        out = io.BytesIO()
        tifffile.imwrite(out, rgb, photometric="rgb", **options)
        assert np.array_equal(decode_image(out.getvalue(), "tif", dtype="uint16"), rgb), options
    out = io.BytesIO()
    tifffile.imwrite(out, rgb, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(decode_image(out.getvalue(), "tif", dtype="uint16"), np.rot90(rgb, -1))
    assert np.array_equal(decode_image(out.getvalue(), "tif", dtype="uint16", as_stored=True), rgb)
    out = io.BytesIO()
    tifffile.imwrite(out, rgb.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    assert np.array_equal(decode_image(out.getvalue(), "tif", dtype="uint16"), rgb)
    out = io.BytesIO()
    tifffile.imwrite(out, rgb.transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(Damaged, match="several pages; write each page to a file of its own"):
        decode_image(out.getvalue(), "tif", dtype="uint16")
    whole = tifffile_of(scene("float32"))
    for end in (len(whole) - 1, len(whole) // 2, 100, 8):
        with pytest.raises(Damaged, match=r"\w"):
            decode_image(whole[:end], "tif", BANDS, dtype="float32")


# ---------------------------------------------------------------- views
def params(jitter: tuple = (), gray: bool = False, sigma: float = 0.0, solarize: bool = False) -> colors.ColorParams:
    augment = Augment(16, (0.3, 1.0))
    return augment.draw((40, 40), np.random.default_rng(3))._replace(
        jitter=jitter, gray=gray, sigma=sigma, solarize=solarize
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, BANDS])
def test_views_are_those_of_the_numbers(dtype: str, bands: int):
    pixels = scene(dtype, bands=bands)
    whole = Augment(40, (1.0, 1.0), flip=0.0)
    same = whole.apply(pixels, params()._replace(box=(0, 0, 40, 40), flip=False))
    assert same.dtype == dtype and np.array_equal(same, pixels.transpose(2, 0, 1))  # not a bit is lost
    assert np.array_equal(center(pixels, 40), same)
    exact = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(exact, size=(17, 23), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    got = resize(pixels, (17, 23)).astype(np.float64)
    assert (
        np.abs(got - expected.numpy().clip(*((0, 65535) if dtype == "uint16" else (-np.inf, np.inf)))).max() < 0.55
    )  # 0.5 of rounding, and float32


def test_colours_of_sixteen_bits_equal_those_of_eight():
    """The same operations on the same image with 8 and with 16 bits differ by the rounding of 8 bits only."""
    smooth = cv2.resize(scene("uint8", bands=3), (16, 16), interpolation=cv2.INTER_AREA)
    deep = converted(smooth, 8, "uint16")
    cases = [
        params((("brightness", 0.7), ("contrast", 0.8), ("saturation", 0.6), ("hue", 0.05))),
        params(gray=True),
        params(sigma=1.3),
        params((("contrast", 0.9),), solarize=True),
    ]
    for case in cases:
        eight, sixteen = colors.fused(smooth, case), colors.fused(deep, case)
        assert sixteen.dtype == np.uint16
        assert np.abs(eight.astype(float) - sixteen / 257).max() <= (1.6 if case.sigma or case.solarize else 1.01)
        assert len(np.unique(sixteen)) >= len(np.unique(eight))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("bands", [3, BANDS])
def test_device_colours_equal_those_of_the_workers(dtype: str, bands: int):
    pixels = scene(dtype, bands=bands)
    case = params((("brightness", 1.2), ("contrast", 0.8), ("saturation", 0.6), ("hue", 0.05)), False, 1.1, True)
    host = colors.fused(pixels, case)
    constants = device_color.constants([0.0] * bands, [1.0] * bands, torch.device("cpu"), getattr(torch, dtype))
    rows = torch.from_numpy(colors.color_row(case, bands))[None]
    device = device_color.apply(torch.from_numpy(pixels.transpose(2, 0, 1))[None], rows, constants)[0]
    assert device.dtype == getattr(torch, dtype)
    difference = np.abs(device.numpy().astype(np.float64) - host.transpose(2, 0, 1).astype(np.float64)).max()
    assert difference <= (3 if dtype == "uint16" else 0.01)  # of 65,535; of numbers of about 1,000


def test_crops_and_erasing_keep_the_dtype():
    for dtype in PIXEL_DTYPES:
        image = scene(dtype, bands=3)
        views = crops(
            {"image": image}, {"a": [Augment(16, (0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0.1))] * 2}, generators((1, 2))
        )
        assert views["a"].dtype == dtype and views["a"].shape == (2, 3, 16, 16)
        view = views["a"][0]
        for seed in range(5):
            out = erased(view, 1.0, (0.5,) * 3, (0.0,) * 3, np.random.default_rng(seed))
            changed = out[out != view]
            middle = {"uint8": 128, "uint16": 32768, "float32": 0.5}[dtype]
            assert out.dtype == dtype and len(changed) and np.abs(changed - middle).max() <= 1
    assert rounded(np.array([-3.0, 1.4, 7e4], np.float32), np.dtype("uint16")).tolist() == [0, 1, 65535]


def test_placed_pixels_are_normalised_by_their_dtype():
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1])
    for dtype, top in zip(PIXEL_DTYPES, (255, 65535, 1), strict=True):
        part, values = Image(mean=mean.tolist(), std=std.tolist()), scene(dtype, bands=3).transpose(2, 0, 1)
        expected = (values.astype(np.float64) / top - mean[:, None, None]) / std[:, None, None]
        before = values.copy()
        got = part.place(torch.from_numpy(values), torch.device("cpu"))
        assert got.dtype == torch.float32 and np.allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(values, before)  # float32 is not normalised in place


def test_pictures_of_any_dtype():
    for dtype in PIXEL_DTYPES:
        image = scene(dtype, bands=3)
        assert displayed(image).dtype == np.uint8 and displayed(image).std() > 50
        assert data_url(image).startswith("data:image/png")
    assert np.array_equal(displayed(converted(scene("uint8"), 8, "uint16")), scene("uint8"))
    for bands, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (7, [0, 1, 2])):
        image = scene("uint8", bands=bands)
        assert np.array_equal(picture(image), image[..., shown])


# ---------------------------------------------------------------- from shards to scores
@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of {uint16, float32} images of two classes that differ by 40 levels of 65,536, or by 0.3 of 1,000: at 8 bits
    they are equal."""
    out = {}
    for dtype, step in (("uint16", 40), ("float32", 0.3)):
        folder = tmp_path_factory.mktemp(dtype)
        rng = np.random.default_rng(0)
        for number in range(24):
            label = number % 2
            level = rng.uniform(0, 1, BANDS) * (3 if dtype == "uint16" else 0.02) + label * step * np.arange(BANDS)
            image = np.rint(30000 + level) if dtype == "uint16" else 1000 + level
            image = np.broadcast_to(image, (24, 24, BANDS)) + rng.integers(0, 2, (24, 24, 1)) * (dtype == "uint16")
            path = folder / "images" / f"class{label}"
            path.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{number}.npy", image.astype(dtype))
        build(folder / "images", folder / "shards")
        out[dtype] = folder / "shards"
    return out


def options(shards: Path, mean: float = 0.4578, std: float = 0.001) -> list[str]:
    return [
        f"data.train={shards}",
        f"model.in_channels={BANDS}",
        f"data.mean={[mean] * BANDS}",
        f"data.std={[std] * BANDS}",
    ]


def test_a_run_keeps_sixteen_bits_until_the_device(
    hidden: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, shards = tmp_path / "run", hidden["uint16"]
    cfg = recipe.load("mae_cpu", [*SMALL, *options(shards), f"run={run}", "export.every=2"])
    train(cfg)
    with pytest.raises(UserError, match=r"signed or float pixels, whose range of values is not known, but .* uint16"):
        evaluate(run / "export" / "2", ["knn"], [str(hidden["float32"])], [str(shards)], device="cpu")
    assert "data.pixel_dtype = uint16 (auto: the dtype that keeps all bits of the images)" in capsys.readouterr().out
    stored = recipe.load(str(run / "recipe.yaml"))
    assert stored.data.pixel_dtype == "uint16"
    objective = build_objective(stored)
    batch = next(build_stream(stored, objective, open_samples(stored)))
    assert batch["image"].dtype == torch.uint16
    assert 29990 < int(batch["image"].to(torch.int32).min()) < int(batch["image"].to(torch.int32).max()) < 30180
    pixels = placed(objective, batch, torch.device("cpu"))["image"]
    assert torch.allclose(pixels, (batch["image"].float() / 65535 - 0.4578) / 0.001, atol=1e-2)
    export = run / "export" / "2"
    encoder, facts = open_encoder(str(export), device="cpu")
    assert encoder.dtype == facts["pixel_dtype"] == "uint16"
    assert '"rescale_factor": 1.5259' in (export / "preprocessor_config.json").read_text()
    assert (
        "Pixels (uint16)" in (export / "README.md").read_text()
        and "division by 65,535" in (export / "README.md").read_text()
    )
    samples = encoder.check([str(shards)])
    assert np.array_equal(encoder.read(samples, 3), center(samples.image(3, BANDS, dtype="uint16"), 16))
    knn = {"knn": {"k": 3}}
    page = report.write(run).read_text()
    assert "What the patches learned" in page and "The first three of the 5 channels of the images are shown." in page
    scores = evaluate(export, ["knn"], [str(shards)], [str(shards)], options=knn, device="cpu")
    assert preview(stored, tmp_path / "views.png").is_file()
    assert scores


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_what_eight_bits_do_not_see_is_scored(hidden: dict[str, Path], dtype: str):
    """k-NN of raw pixels finds the classes that differ in low bits only."""
    specs = [str(hidden[dtype])]
    encoder, _ = open_encoder("pixels", device="cpu")
    samples = encoder.check(specs)
    assert encoder.dtype == dtype == samples.stored_dtype()
    found = encoder.labelled(specs).stored()
    x = torch.cat([torch.as_tensor(found[n : n + 1]) for n in range(len(samples))]).double()
    labels = torch.tensor([int(samples.label(n)[-1]) for n in range(len(samples))])
    distance = torch.cdist(x, x) + 1e9 * torch.eye(len(x))
    assert (labels[distance.argmin(1)] == labels).all()
    if dtype == "uint16":
        eight = np.stack([samples.image(n, BANDS).mean((0, 1)) for n in range(len(samples))])
        assert np.ptp(eight, 0).max() <= 1  # what a run with data.pixel_dtype=uint8 sees


def test_a_run_of_an_earlier_version_keeps_eight_bits(hidden: dict[str, Path], tmp_path: Path):
    run = tmp_path / "run"
    overrides = [*SMALL, *options(hidden["uint16"]), f"run={run}", "optim.lr.kind=constant"]
    train(recipe.load("mae_cpu", [*overrides, "data.pixel_dtype=uint8"]))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text("".join(line for line in text.splitlines(True) if "pixel_dtype" not in line))
    train(recipe.load("mae_cpu", [*overrides, "steps=3"]))
    assert recipe.load(str(run / "recipe.yaml")).data.pixel_dtype == "uint8"
    with pytest.raises(UserError, match=r"data.pixel_dtype"):
        train(recipe.load("mae_cpu", [*overrides, "steps=4", "data.pixel_dtype=uint16"]))


def test_float_images_train_in_their_own_unit(hidden: dict[str, Path], tmp_path: Path):
    run = tmp_path / "run"
    overrides = [*SMALL, *options(hidden["float32"], 1000.0, 0.5), "export.every=2"]
    train(recipe.load("simclr_vits16", [*overrides, f"run={run}"]))
    encoder, facts = open_encoder(str(run / "export" / "2"), device="cpu")
    assert facts["pixel_dtype"] == "float32" and encoder.mean == [1000.0] * BANDS
    assert '"do_rescale": false' in (run / "export" / "2" / "preprocessor_config.json").read_text()
    with pytest.raises(
        DataError, match=r"float32 pixels, whose range of values is not known.*; write data.pixel_dtype=float32"
    ):
        train(
            recipe.load("mae_cpu", [*overrides, "data.pixel_dtype=uint8", f"run={tmp_path / 'eight'}"]),
        )


def test_auto_is_the_widest_of_all_datasets(hidden: dict[str, Path], tmp_path: Path):
    (tmp_path / "plain").mkdir()
    for n in range(3):
        np.save(tmp_path / "plain" / f"{n}.npy", scene("uint8", n))
    build(tmp_path / "plain", tmp_path / "shards")
    kinds = {"uint8": tmp_path / "shards", **hidden}
    for mixed in itertools.permutations(kinds, 2):
        mix = [f"{{shards: {kinds[kind]}, weight: 1}}" for kind in mixed]
        cfg = recipe.load("mae_cpu", [*SMALL, *options(kinds["uint8"])[1:], f"data.mix=[{', '.join(mix)}]"])
        assert stored_pixels(cfg, open_samples(cfg)) == max(mixed, key=PIXEL_DTYPES.index)
    assert Samples([str(kinds["uint8"])]).stored_dtype() == "uint8"


def test_where_other_dtypes_are_refused(hidden: dict[str, Path], tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"data.pixel_dtype = uint16: frames of videos are decoded to uint8; remove it"
    ):
        Clip().configured(Data(pixel_dtype="uint16"), type("Model", (), {"in_channels": 3}))
    with pytest.raises(ConfigError, match=r"data.pixel_dtype.*uint32"):
        recipe.load("mae_cpu", ["data.pixel_dtype=uint32"])
