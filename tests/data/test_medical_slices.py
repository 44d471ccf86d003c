"""DICOM and NIfTI files: every number, in the unit of the file, is that which pydicom, or a formula here, finds. The files are
those that pydicom ships, of scanners of several vendors and of all common compressions."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from common.errors import Damaged, DataError
from data_pipeline.formats import medical_images
from data_pipeline.formats.medical_images import open_slices
from data_pipeline.shards.samples import Samples
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.data.building import make, reasons, samples_of

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
LIMIT = 1 << 30


def slices(data: bytes | Path, path: str = "a.dcm", window: Any = None, max_pixels: int = LIMIT) -> list[np.ndarray]:
    data = data.read_bytes() if isinstance(data, Path) else data
    found = open_slices(io.BytesIO(data), path, len(data), max_pixels, window)
    out = list(found.read(0, found.count))
    assert all(each.shape == found.shape for each in out) and len(out) == found.count
    return out


def saved(header: Dataset) -> bytes:
    out = io.BytesIO()
    header.save_as(out)
    return out.getvalue()


def test_numbers_of_a_ct_are_hounsfield_units_without_loss(tmp_path: Path):
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "CT_small.dcm", tmp_path / "in" / "a.dcm")
    make(tmp_path / "in", tmp_path / "out")
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    units = header.pixel_array.astype(np.float32) * float(header.RescaleSlope) + float(header.RescaleIntercept)
    (sample,) = samples_of(tmp_path / "out")
    stored = np.load(io.BytesIO(sample["npy"]))
    assert stored.dtype == np.int16 and np.array_equal(stored[..., 0], units) and units.min() == -896
    assert np.array_equal(Samples([str(tmp_path / "out")]).image(0, 1, dtype="float32")[..., 0], units)
    assert json.loads(sample["json"]) == {"path": "a.dcm"}  # by default, nothing that may name a patient


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *[
            (f"MR_small_{kind}.dcm", "MR_small.dcm")
            for kind in ("RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian")
        ],
        ("MR_small_implicit.dcm", "MR_small.dcm"),
        ("rtdose_rle.dcm", "rtdose.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),  # lossless JPEG, the most common one of scanners
    ],
)
def test_compression_and_byte_order_change_nothing(name: str, plain: str):
    found, expected = slices(FILES / name), slices(FILES / plain)
    assert len(found) == len(expected) and found[0].dtype == expected[0].dtype and found[0].dtype.isnative
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("SC_rgb_jpeg_gdcm.dcm", {"PlanarConfiguration": 1}), ("JPEGLSNearLossless_08.dcm", {"BitsAllocated": 16})],
)
def test_what_a_jpeg_holds_counts_and_not_how_the_header_would_store_it(name: str, changes: dict[str, int]):
    header = pydicom.dcmread(FILES / name)
    for key, value in changes.items():
        setattr(header, key, value)
    assert np.array_equal(slices(saved(header))[0], slices(FILES / name)[0])


def test_jpeg_of_12_bits():
    """Two libraries decode it to levels up to 264. JPEG 2000 has the same picture, with other losses."""
    (twelve,), (other,) = slices(FILES / "JPGExtended.dcm"), slices(FILES / "JPEG2000.dcm")
    assert twelve.dtype == np.uint16 and twelve.max() == round(264 * 65535 / 4095)
    means = [pixels.reshape(128, 8, 32, 8).mean((1, 3)).ravel() for pixels in (twelve, other)]
    assert np.corrcoef(*means)[0, 1] > 0.96


def test_grey_levels_use_the_whole_scale_and_zero_is_black():
    header = pydicom.dcmread(FILES / "examples_overlay.dcm")  # 12 bits, without a transform
    levels = header.pixel_array.astype(np.int64)
    (found,) = slices(FILES / "examples_overlay.dcm")
    assert found.dtype == np.uint16 and np.array_equal(found[..., 0], (levels * 65535 * 2 + 4095) // (2 * 4095))
    header.PhotometricInterpretation = "MONOCHROME1"
    (inverted,) = slices(saved(header))
    assert np.array_equal(inverted, 65535 - found)
    (window,) = slices(saved(header), window=(0.0, 1000.0))
    assert window.dtype == np.uint16 and np.array_equal(window[..., 0], 65535 - (levels.clip(0, 1000) * 65.535).round())
    (mask,) = slices(FILES / "liver_1frame.dcm")  # of one bit
    assert mask.dtype == np.uint8 and {*np.unique(mask)} == {0, 255}


def test_colors_become_rgb():
    header = pydicom.dcmread(FILES / "examples_palette.dcm")
    tables = [
        np.frombuffer(header[f"{name}PaletteColorLookupTableData"].value, np.uint16).astype(np.int64)
        for name in ("Red", "Green", "Blue")
    ]
    (found,) = slices(FILES / "examples_palette.dcm")
    assert np.array_equal(found, np.stack([(t[header.pixel_array] + 128) // 257 for t in tables], -1))
    yellow_blue = slices(FILES / "SC_ybr_full_422_uncompressed.dcm")[0]
    assert yellow_blue.shape == (100, 100, 3)
    assert np.abs(yellow_blue.astype(int) - slices(FILES / "SC_rgb_rle.dcm")[0]).mean() < 8  # of the same picture


def test_each_frame_has_its_own_transform():
    """Enhanced CT and PET: slope and intercept stand in the groups of the frames, or in those that all frames share."""
    header = pydicom.dcmread(FILES / "rtdose.dcm")
    stored = header.pixel_array.astype(np.float64)

    def group(slope: float, intercept: float) -> Dataset:
        values, out = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, intercept
        out.PixelValueTransformationSequence = Sequence([values])
        return out

    header.SharedFunctionalGroupsSequence = Sequence([group(0.5, 3)])
    shared = slices(saved(header))
    assert np.array_equal(shared[7][..., 0], (stored[7] * 0.5 + 3).astype(np.float32))
    header.PerFrameFunctionalGroupsSequence = Sequence([group(0.001, -n) for n in range(15)])
    own = slices(saved(header))
    for n in range(15):
        assert np.array_equal(own[n][..., 0], (stored[n] * 0.001 - n).astype(np.float32))
    found = open_slices(io.BytesIO(saved(header)), "a.dcm", 1 << 20, LIMIT)
    assert np.array_equal(next(found.read(9, 1)), own[9])


def test_a_window_makes_levels_of_numbers(tmp_path: Path):
    (units,) = slices(FILES / "CT_small.dcm")
    (found,) = slices(FILES / "CT_small.dcm", window=(-200.0, 300.0))
    expected = ((units.astype(np.float64).clip(-200, 300) + 200) / 500 * 65535).round()
    assert found.dtype == np.uint16 and np.array_equal(found, expected)
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "CT_small.dcm", tmp_path / "in")
    make(tmp_path / "in", tmp_path / "out", window="-200,300")
    assert np.array_equal(Samples([str(tmp_path / "out")]).image(0, 1, dtype="uint16"), found)


def test_frames_state_their_place_and_only_the_fields_that_are_asked_for(tmp_path: Path):
    (tmp_path / "in" / "heart").mkdir(parents=True)
    (tmp_path / "in" / "head").mkdir()
    shutil.copy(FILES / "examples_ybr_color.dcm", tmp_path / "in" / "heart" / "1.2.840.113")  # as archives name files
    shutil.copy(FILES / "CT_small.dcm", tmp_path / "in" / "head" / "IM1")
    (tmp_path / "in" / "DICOMDIR").write_bytes(b"an index of these files")
    with pytest.raises(DataError, match="holds no source of shards"):
        make(tmp_path / "in", tmp_path / "out")
    fields = "PatientID,Modality,PixelSpacing,AcquisitionNumber,PatientName,StudyDate"
    summary = make(tmp_path / "in", tmp_path / "out", kind="slices", shard_mb=1.0, dicom_fields=fields)
    assert (summary["samples"], summary["bad"]) == (31, [])
    found = samples_of(tmp_path / "out")
    about = [json.loads(sample["json"]) for sample in found]
    assert [(a["path"], a.get("slice"), s["cls"]) for a, s in zip(about, found, strict=True)] == [
        ("head/IM1", None, b"0"),
        *[("heart/1.2.840.113", n, b"1") for n in range(30)],
    ]
    assert about[0] | {"path": ""} == {
        "path": "",
        "PatientID": "1CT1",
        "Modality": "CT",
        "PixelSpacing": [0.661468, 0.661468],
        "AcquisitionNumber": 2,
        "PatientName": "CompressedSamples^CT1",
        "StudyDate": "20040119",
    }
    frames = slices(FILES / "examples_ybr_color.dcm")
    samples = Samples([str(tmp_path / "out")])
    for n in (0, 29):
        assert np.array_equal(samples.image(1 + n, 3), frames[n])


def test_a_list_states_labels_and_fields_of_scans(tmp_path: Path):
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "rtdose.dcm", tmp_path / "in")
    (tmp_path / "labels.csv").write_text("path,label,patient\nrtdose.dcm,dose,p7\n")
    make(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "labels.csv"))
    found = samples_of(tmp_path / "out")
    assert [(json.loads(s["json"]), s["cls"]) for s in found] == [
        ({"path": "rtdose.dcm", "slice": n, "patient": "p7"}, b"0") for n in range(15)
    ]


def test_what_is_no_image_is_left_out_with_a_reason(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in (
        "MR_truncated.dcm",
        "test-SR.dcm",
        "rtplan.dcm",
        "GDCMJ2K_TextGBR.dcm",
        "MR_small.dcm",
        "SC_rgb_rle_32bit.dcm",
    ):
        shutil.copy(FILES / name, tmp_path / "in")
    (tmp_path / "in" / "text.dcm").write_bytes(b"text" * 100)
    (tmp_path / "in" / "text.nii").write_bytes(b"text" * 100)
    (tmp_path / "in" / "text.nii.gz").write_bytes(b"\x1f\x8btext" * 100)
    (tmp_path / "in" / "empty.dcm").write_bytes(b"")
    summary = make(tmp_path / "in", tmp_path / "out")
    found = reasons(summary)
    assert summary["samples"] == 1 and len(found) == 9
    assert "is a DICOM file without an image" in found["test-SR.dcm"]
    assert "is no DICOM file" in found["text.dcm"] and "is no DICOM file" in found["empty.dcm"]
    assert (
        "8130" in found["MR_truncated.dcm"]
        and "broken data" in found["GDCMJ2K_TextGBR.dcm"]
        and "uint32" in found["SC_rgb_rle_32bit.dcm"]
    )


def test_frames_before_damage_are_used(tmp_path: Path):
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "MR_small.dcm", tmp_path / "in" / "b.dcm")
    data = bytearray((FILES / "rtdose_rle.dcm").read_bytes())
    at = 0
    for _ in range(10):  # items of sequences, of the offset table and of frames
        at = data.index(b"\xfe\xff\x00\xe0", at + 1)
    data[at + 8 : at + 12] = b"\xff" * 4  # the number of segments of a frame
    (tmp_path / "in" / "a.dcm").write_bytes(data)
    summary = make(tmp_path / "in", tmp_path / "out")
    places = [json.loads(sample["json"]) for sample in samples_of(tmp_path / "out")]
    count = len(places) - 1
    assert places == [*({"path": "a.dcm", "slice": n} for n in range(count)), {"path": "b.dcm"}] and 0 < count < 14
    assert f"{15 - count} of 15 slices are left out: " in reasons(summary)["a.dcm"]


def test_headers_that_state_too_much_are_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch):
    header = pydicom.dcmread(FILES / "MR_small.dcm")
    header.NumberOfFrames = 10**9
    with pytest.raises(Damaged, match="holds 8192 bytes, but states 1000000000 frames of 64×64"):
        slices(saved(header))
    header = pydicom.dcmread(FILES / "MR_small_RLE.dcm")
    header.Rows = header.Columns = 65535
    with pytest.raises(Damaged, match="65535×65535 pixels, more than the 100000000 that are allowed"):
        slices(saved(header), max_pixels=100_000_000)
    jpeg = bytearray((FILES / "SC_rgb_jpeg_gdcm.dcm").read_bytes())
    frame = jpeg.index(b"\xff\xc3")  # the frame header of a lossless JPEG
    jpeg[frame + 5 : frame + 9] = b"\xff" * 4
    with pytest.raises(Damaged, match="states 100×100 pixels, but holds a JPEG of 65535×65535"):
        slices(bytes(jpeg))
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    data = bytearray(image.to_bytes())
    data[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    with pytest.raises(Damaged, match="bytes, but states 54000000000000 bytes of numbers"):
        slices(bytes(data), "a.nii")
    monkeypatch.setattr(medical_images, "MAX_VOLUME_BYTES", 100_000)
    with pytest.raises(Damaged, match="more than 100000 bytes when it is decompressed"):
        slices(gzip.compress(bytes(10_000_000)), "a.nii.gz")
    whole = (FILES / "image_dfl.dcm").read_bytes()
    assert len(whole) < 262_144  # its pixels have as many bytes
    monkeypatch.setattr(medical_images, "MAX_VOLUME_BYTES", 262_144)
    with pytest.raises(Damaged, match="more than 262144 bytes when it is inflated"):
        slices(whole)
    monkeypatch.setattr(medical_images, "MAX_VOLUME_BYTES", 100_000)
    with pytest.raises(Damaged, match="has 100001 bytes, but at most 100000 are read"):
        slices(bytes(100_001), "a.nii")


def test_a_file_that_is_damaged_anywhere_is_damage():
    """And never another exception, nor the end of the process, which some decoders cause."""
    names = ["CT_small", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "SC_rgb_jpeg_gdcm"]
    names += ["SC_rgb_small_odd_jpeg", "rtdose", "examples_palette", "liver_1frame", "JPEGLSNearLossless_16"]
    files = [((FILES / f"{name}.dcm").read_bytes(), "a.dcm") for name in names]
    volume = nibabel.Nifti1Image(np.arange(600, dtype=np.int16).reshape(10, 10, 6), np.eye(4)).to_bytes()
    files += [(volume, "a.nii"), (gzip.compress(volume), "a.nii.gz")]
    rng, good = random.Random(0), 0
    for number in range(600):
        whole, path = files[number % len(files)]
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.choice((1, 3, 30)) if data else 0):
            data[rng.randrange(min(len(data), rng.choice((500, 3000, 1 << 20))))] = rng.choice(
                (0, 255, rng.randrange(256))
            )
        try:
            good += bool(slices(bytes(data), path, max_pixels=1 << 22))
        except Damaged:
            continue
    assert 0 < good < 600


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64", "int32", "uint8", "uint16"])
def test_slices_of_nifti_are_axial_and_oriented_as_those_of_a_ct(dtype: str):
    """However the volume is stored, the first row is anterior, and the first column the patient's right."""
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 200, (4, 5, 3)).astype(dtype)  # to the right, to the front, to the head
    stored_as_it_is = nibabel.Nifti1Image(volume, np.diag([2.0, 3, 4, 1]))
    turned = nibabel.Nifti1Image(volume.transpose(2, 0, 1)[:, ::-1], _affine())
    assert nibabel.aff2axcodes(turned.affine) == ("S", "L", "A")
    for image in (stored_as_it_is, turned):
        for data, name in ((image.to_bytes(), "a.nii"), (gzip.compress(image.to_bytes()), "a.nii.gz")):
            found = slices(data, name)
            assert len(found) == 3 and found[0].shape == (5, 4, 1)
            for height, pixels in enumerate(found):
                assert pixels.dtype == {"uint8": np.uint8, "uint16": np.uint16}.get(dtype, np.int16)
                for row in range(5):
                    for column in range(4):
                        assert pixels[row, column, 0] == volume[3 - column, 4 - row, height]


def _affine() -> np.ndarray:
    out = np.zeros((4, 4))
    out[2, 0], out[0, 1], out[1, 2], out[3, 3] = 4, -2, 3, 1  # axes to the head, to the left, to the front
    return out


def test_scaled_and_four_dimensional_volumes():
    numbers = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    image = nibabel.Nifti2Image(numbers, np.eye(4))
    image.header.set_slope_inter(0.25, -7)
    data = image.to_bytes()
    found, loaded = slices(data, "A.NII"), nibabel.Nifti2Image.from_bytes(data)
    expected = loaded.get_fdata()
    assert (loaded.dataobj.slope, loaded.dataobj.inter) == (0.25, -7)
    assert len(found) == 20
    for time in range(5):
        for height in range(4):
            ours = found[4 * time + height][..., 0]
            assert np.array_equal(ours, expected[::-1, ::-1, height, time].T.astype(np.float32))
    for least, dtype in ((-32768, np.int16), (-32769, np.float32)):
        volume = nibabel.Nifti1Image(np.full((2, 2, 1), least, np.int32), np.eye(4)).to_bytes()
        (units,) = slices(volume, "a.nii")
        assert units.dtype == dtype and (units == least).all()
    with pytest.raises(Damaged, match="holds NaN"):
        slices(nibabel.Nifti1Image(np.full((2, 2, 2), np.nan, np.float32), np.eye(4)).to_bytes(), "a.nii")
    colors = np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(Damaged, match=r"but volumes .* are read"):
        slices(nibabel.Nifti1Image(colors, np.eye(4)).to_bytes(), "a.nii")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "400"}, "--window 400: write the lowest and the highest number"),
        ({"window": "400,-1000"}, "--window 400,-1000: write"),
        ({"window": "0,inf"}, "--window 0,inf: write"),
        ({"dicom_fields": "PatientID,Patientname"}, "--dicom-fields Patientname: no keyword"),
        ({"dicom_fields": "PixelData"}, "--dicom-fields PixelData: no keyword"),
        ({"bits": 12}, "--bits has no effect on a folder of DICOM or NIfTI files"),
    ],
)
def test_options_that_are_wrong(tmp_path: Path, options: dict[str, Any], message: str):
    (tmp_path / "in").mkdir()
    shutil.copy(FILES / "CT_small.dcm", tmp_path / "in")
    with pytest.raises(DataError, match=message):
        make(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_of_slices_have_no_effect_on_photographs(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"--window has no effect on .* only on sources of the kinds slices"):
        make(photos, tmp_path / "out", window="0,1")


@pytest.mark.slow
def test_a_folder_of_scans_trains_a_model(tmp_path: Path):
    """Without further options: a CT and MRs of 16 bits, some of them damaged, keep their units."""
    (tmp_path / "in").mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm", "MR_truncated.dcm", "693_J2KI.dcm"):
        shutil.copy(FILES / name, tmp_path / "in")
    volume = np.random.default_rng(0).normal(0, 500, (64, 64, 20)).astype(np.int16)
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "in" / "volume.nii.gz")
    summary = make(tmp_path / "in", tmp_path / "out")
    assert summary["samples"] == 23 and len(summary["bad"]) == 1
    numbers = ["model.in_channels=1", "data.mean=[0]", "data.std=[500]", "steps=2", "data.batch=8"]
    train(tiny_recipe("mae", tmp_path / "out", tmp_path / "run", *numbers))
    assert "data.pixel_dtype = float32" in (tmp_path / "run" / "log.txt").read_text()
