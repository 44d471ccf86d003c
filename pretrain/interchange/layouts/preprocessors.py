"""What `transformers` does with images and frames before an exported model, in the words of its configuration files: the
short side is resized and the centre is cropped, as `data_pipeline.views.augmentations.center` does for evaluation.

`size` is the side of the crop in pixels; `mean` and `std` are those of the pixels, one number for each channel.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.formats.pixels import top_level


def images(size: int, mean: list[float] | None, std: list[float] | None, dtype: str = "uint8") -> dict[str, Any]:
    """The content of preprocessor_config.json. `dtype`: of the pixels, see `data_pipeline/formats/pixels.py`."""
    top = top_level(dtype)
    scale = {"do_rescale": False} if top == 1 else {"rescale_factor": 1 / top}
    # without this, the processor makes three channels of one, and fails for two and four
    channels = {} if mean is None or len(mean) == 3 else {"do_convert_rgb": False}
    return {"image_processor_type": "BitImageProcessor", **_center_crop(size, mean, std), **scale, **channels}


def videos(kind: str, size: int, mean: list[float] | None, std: list[float] | None) -> dict[str, Any]:
    """The content of video_preprocessor_config.json, for frames that are already chosen. `kind`: the model type.

    The processor named after V-JEPA 2 always resizes to 256 / 224 of the crop, so that another one of the same output
    is named.
    """
    name = "VideoMAEVideoProcessor" if kind == "videomae" else "LlavaOnevisionVideoProcessor"
    return {"video_processor_type": name, "do_sample_frames": False, **_center_crop(size, mean, std)}


def _center_crop(size: int, mean: list[float] | None, std: list[float] | None) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
