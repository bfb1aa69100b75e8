"""Text and images -> what the model reads: token ids, pixel values, positions.

The tokenizer, its chat template and the image arithmetic are transformers'; where qwen-vl-utils
can be imported (it needs torchvision) its `fetch_image` does the resizing, with the same pixels
as result. The PIL image processor is used on every machine, so that a run's pixels do not depend
on whether torchvision is installed. Videos are not handled.
"""

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from models.config import read_config
from models.qwen_vl import mrope_position_ids


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model, on the CPU.

    input_ids: (P,) int64. position_ids: (3, P) int64. next_position: position of the first token
    of a completion. pixel_values: (patches, patch_dim) float32 of all images, image_grid_thw:
    (images, 3) int64, both with zero rows where there is no image. image_keys: one string per
    image, equal where the image is. image_features: (image tokens, hidden) on the model's device
    where the vision tower is frozen and has encoded them already.
    """

    input_ids: Tensor
    position_ids: Tensor
    next_position: int
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_keys: tuple[str, ...]
    image_features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Processor:
    """Tokenizer and image processor of one checkpoint folder.

    min_pixels, max_pixels: bounds on height x width of an image after resizing; None keeps the
    checkpoint's. Raises ValueError where the folder's files are missing or unreadable, where there
    is no chat template, or where the bounds are no bounds.
    """

    def __init__(self, folder: Path, min_pixels: int | None = None, max_pixels: int | None = None):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.tokenizer = self._read_tokenizer()
        self.image_processor = self._read_image_processor(min_pixels, max_pixels)
        self.generation = _read_json(self.folder / "generation_config.json", default={})
        assert self.stop_ids  # read now, so that what is wrong is said now

    def _read_tokenizer(self):
        from transformers import AutoTokenizer

        if not (self.folder / "tokenizer_config.json").is_file():
            raise ValueError(f"{self.folder}: no tokenizer_config.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder}: the tokenizer cannot be read: {error}") from error
        if tokenizer.chat_template is None:
            template = _read_json(self.folder / "chat_template.json", default={})
            tokenizer.chat_template = template.get("chat_template")
        if tokenizer.chat_template is None:
            raise ValueError(f"{self.folder}: no chat template (is this an Instruct checkpoint?)")
        return tokenizer

    def _read_image_processor(self, min_pixels: int | None, max_pixels: int | None):
        try:
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl
        except (ImportError, RuntimeError) as error:
            what = f"transformers' image processor cannot be imported: {error.__cause__ or error}."
            todo = "Install transformers 5.4 or later"
            if "torchvision" in f"{error} {error.__cause__}":
                todo = "Is torchvision built for this torch? If not: pip uninstall torchvision"
            raise ValueError(f"{what} {todo}") from error

        settings = _read_json(self.folder / "preprocessor_config.json", default=None)
        if settings is None:  # transformers 5 writes one file for all processors
            nested = _read_json(self.folder / "processor_config.json", default={})
            settings = nested.get("image_processor")
        if settings is None:
            raise ValueError(f"{self.folder}: no preprocessor_config.json")
        vision = self.config.vision
        wanted = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for name, value in wanted.items():
            if settings.get(name, value) != value:
                raise ValueError(
                    f"{self.folder}: {name} is {settings[name]} for the image processor but "
                    f"{value} in config.json"
                )
        size = dict(settings.get("size") or {})
        low = min_pixels or settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        high = max_pixels or settings.get("max_pixels") or size.get("longest_edge") or 1280 * 784
        if not 0 < low <= high:
            raise ValueError(f"--min_pixels {low} and --max_pixels {high} leave no image size")
        kept = ("image_mean", "image_std", "rescale_factor", "resample")
        options = {name: settings[name] for name in kept if settings.get(name) is not None}
        self.min_pixels, self.max_pixels = low, high
        self._smart_resize = qwen2_vl.smart_resize
        return qwen2_vl.Qwen2VLImageProcessorPil(
            size={"shortest_edge": low, "longest_edge": high}, **wanted, **options
        )

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a completion: all of the generation config's, else the tokenizer's."""
        stop = self.generation.get("eos_token_id") or self.tokenizer.eos_token_id
        stop = [stop] if isinstance(stop, int) else stop
        if not stop or not all(isinstance(token, int) for token in stop):
            raise ValueError(f"{self.folder}: eos_token_id is {stop!r}, not one or more token ids")
        return sorted(set(stop))

    @property
    def suppressed_ids(self) -> list[int]:
        """Token ids that are never sampled.

        Every special token that is no stop token (the vision tokens among them), and the rows that
        pad the vocabulary beyond the tokenizer.
        """
        config = self.config
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special |= {config.image_token_id, config.video_token_id}
        special |= {config.vision_start_token_id, config.vision_end_token_id}
        padding = set(range(len(self.tokenizer), config.vocab_size))
        return sorted((special | padding) - set(self.stop_ids))

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens that an image of this size (pixels) becomes."""
        edge = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        h, w = self._smart_resize(height, width, edge, self.min_pixels, self.max_pixels)
        return h * w // edge**2

    def chat_text(self, problem: str, images: int) -> str:
        """The chat template around `problem` with its images first, open for the answer."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": problem}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def count_tokens(self, problem: str, sizes: list[tuple[int, int]]) -> int:
        """Prompt tokens of `problem` with images of these (width, height), without reading them.

        Raises ValueError where the problem itself holds an image token.
        """
        ids = self._text_ids(problem, len(sizes))
        return len(ids) - len(sizes) + sum(self.image_tokens(*size) for size in sizes)

    def _text_ids(self, problem: str, images: int) -> list[int]:
        """Token ids of the chat text, one image token per image. Raises ValueError for more."""
        text = self.tokenizer(self.chat_text(problem, images), add_special_tokens=False)
        if text["input_ids"].count(self.config.image_token_id) != images:
            token = self.tokenizer.decode([self.config.image_token_id])
            raise ValueError(
                f"the problem contains {token}, which stands for an image: {problem[:80]!r}"
            )
        return text["input_ids"]

    def encode(self, problem: str, images: list[Image.Image], keys: tuple[str, ...]) -> Prompt:
        """One user message of RGB images and text as a Prompt; `keys` identify the images.

        Raises ValueError where the problem itself holds an image token.
        """
        ids = torch.tensor(self._text_ids(problem, len(images)))
        image_token = self.config.image_token_id
        pixels, grids = self.encode_images(images)
        if images:
            counts = torch.ones_like(ids)
            counts[ids == image_token] = grids.prod(1) // self.config.vision.spatial_merge_size**2
            ids = ids.repeat_interleave(counts)
        position_ids, next_position = mrope_position_ids(ids, grids, self.config)
        return Prompt(ids, position_ids, next_position, pixels, grids, tuple(keys))

    def encode_images(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """RGB images -> pixel_values (patches, patch_dim) float32, image_grid_thw (n, 3) int64."""
        if not images:
            shape = (0, self.config.vision.patch_dim)
            return torch.zeros(shape), torch.zeros((0, 3), dtype=torch.int64)
        if (fetch_image := qwen_fetch_image()) is not None:
            bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            images = [fetch_image({"image": image, **bounds}) for image in images]
        out = self.image_processor(images, return_tensors="pt")
        return out["pixel_values"].float(), out["image_grid_thw"]

    def decode(self, completion_ids: list[int]) -> str:
        """A completion's text, without the stop token that ends it."""
        if completion_ids and completion_ids[-1] in self.stop_ids:
            completion_ids = completion_ids[:-1]
        return self.tokenizer.decode(completion_ids, clean_up_tokenization_spaces=False)


@cache
def qwen_fetch_image():
    """qwen_vl_utils.fetch_image, or None where it cannot be imported.

    It imports torchvision, which is absent or (on a CPU build of torch) fails with RuntimeError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from qwen_vl_utils import fetch_image
    except (ImportError, RuntimeError):
        return None
    return fetch_image


def _read_json(path: Path, default):
    """The JSON object at `path`; `default` where there is no such file."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value
