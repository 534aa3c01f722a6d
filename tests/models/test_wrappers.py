"""Language models inside models that see: their blocks are quantized on text, everything around them is carried over
byte for byte, and plain transformers reads the result, with images and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.commands.defaults import settle
from quantlab.errors import DataError
from quantlab.models.blockwise import layers_of
from quantlab.models.refusals import refuse_other_kinds, refuse_wrapper
from quantlab.models.safetensors.files import open_files
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.progress import Silent
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.report.model_card import write_model_card
from tests.conftest import WORDS, byte_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
EYES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
IMAGE, PATCHES = 300, 4  # the token that stands for a piece of an image, and how many pieces an image has
WRAPPERS = ("gemma3", "qwen2_5_vl", "mistral3", "llava")


def configuration(name: str) -> Any:
    import transformers as t

    if name == "gemma3":
        text = t.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=32)
        eyes = dict(EYES, model_type="siglip_vision_model")
        more = {
            "image_token_index": IMAGE,
            "boi_token_index": 301,
            "eoi_token_index": 302,
            "mm_tokens_per_image": PATCHES,
        }
        return t.Gemma3Config(text_config=text, vision_config=eyes, **more)
    if name == "llava":
        eyes = t.CLIPVisionConfig(**EYES, projection_dim=32)
        return t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=eyes, image_token_index=IMAGE)
    if name == "mistral3":
        text, eyes = t.MistralConfig(**TEXT, head_dim=16), t.PixtralVisionConfig(**EYES, head_dim=16)
        return t.Mistral3Config(
            text_config=text, vision_config=eyes, image_token_index=IMAGE, spatial_merge_size=1
        )
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    eyes = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 1,
    }  # fmt: skip
    marks = {"image_token_id": IMAGE, "vision_start_token_id": 301, "vision_end_token_id": 302}
    return t.Qwen2_5_VLConfig(text_config=TEXT | rope, vision_config=eyes, **marks)


def prompt(name: str, rows: int = 2) -> dict[str, Any]:
    """Texts with an image in the middle, as a processor would make them."""
    seeded = torch.Generator().manual_seed(3)
    before, after = torch.randint(1, 257, (2, rows, 12), generator=seeded)
    ids = torch.cat([before, torch.full((rows, PATCHES), IMAGE), after], dim=1)
    images = torch.randn(rows, 3, 28, 28, generator=seeded)
    given: dict[str, Any] = {"input_ids": ids}
    if name == "qwen2_5_vl":
        patches = torch.randn(rows * PATCHES, 3 * 2 * 14 * 14, generator=seeded)
        grid = torch.tensor([[1, 2, 2]] * rows)
        return given | {
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    given["pixel_values"] = images
    if name == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        given["image_sizes"] = torch.tensor([[28, 28]] * rows)
    return given


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("wrappers")

    def find(name: str) -> Path:
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(configuration(name), dtype=torch.float32)
            model.save_pretrained(folder / name, max_shard_size="200KB")
            byte_tokenizer().save_pretrained(folder / name)
            for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
                (folder / name / file).write_text(json.dumps({"of": name}))
        return folder / name

    return find


def opened(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_language_model_is_quantized_and_the_rest_carried_over(
    saved: Any, tmp_path: Path, name: str
) -> None:
    files = open_files(saved(name))
    layers = layers_of(files)
    assert len(layers.shapes) == 14 and not layers.kept and layers.carried
    text = tmp_path / "words.txt"
    text.write_text(" ".join(WORDS.split() * 40), encoding="utf-8")
    calibration = {"calibration": {"source": str(text), "rows": 4, "seq_len": 48}}
    asked: list[dict[str, Any]] = [{"method": "rtn", "bits": 8}, {"method": "gptq", "bits": 4} | calibration,
                                   {"method": "rtn", "bits": 8, "format": "compressed-tensors"},
                                   {"method": "awq", "bits": 4} | calibration]  # fmt: skip
    recipes = [settle(QuantizeRecipe.model_validate(one), files) for one in asked]
    jobs = [Job(f"{r.method}-{r.bits}-{r.format}", r, tmp_path / f"{i}") for i, r in enumerate(recipes)]
    quantize(jobs, files, device="cpu", progress=Silent(), verify=True)
    given = prompt(name)
    original = opened(saved(name))
    with torch.no_grad():
        plain = original(input_ids=given["input_ids"][:, :12]).logits
        seen = original(**given).logits
        answer = original.generate(**given, max_new_tokens=6, do_sample=False)
    for job in jobs:
        record = json.loads((job.out / "quantlab.json").read_text(encoding="utf-8"))
        assert record["verification"]["how"] == "transformers" and record["verification"]["passed"], job.name
        made = open_files(job.out)
        for tensor in layers.carried:  # vision tower, projector
            assert made.tensors[tensor].dtype == files.tensors[tensor].dtype
            assert torch.equal(read_tensor(made.tensors[tensor]), read_tensor(files.tensors[tensor])), tensor
        assert made.size_bytes == checkpoint_bytes(job.recipe, files)
        for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
            assert (job.out / file).read_bytes() == (saved(name) / file).read_bytes()
        if job.recipe.bits != 8:
            continue
        model = opened(job.out)
        with torch.no_grad():
            assert (model(input_ids=given["input_ids"][:, :12]).logits - plain).norm() < 0.03 * plain.norm()
            assert (model(**given).logits - seen).norm() < 0.03 * seen.norm()
            assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), answer)
    card = write_model_card(jobs[0].out, None)
    assert card is not None and "AutoModelForImageTextToText" in card.read_text(encoding="utf-8")


def test_bitsandbytes_quantizes_one_too(saved: Any, tmp_path: Path) -> None:
    quantize([Job("q", QuantizeRecipe(method="bnb-nf4"), tmp_path / "q")], str(saved("llava")), device="cpu",
             progress=Silent())  # fmt: skip
    assert any(name.endswith(".absmax") for name in open_files(tmp_path / "q").tensors)


def test_what_hears_or_is_trained_is_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="quantized and evaluated on text, not trained"):
        refuse_wrapper(open_files(saved("llava")))
    config = json.loads((saved("llava") / "config.json").read_text())
    for change in ({"audio_config": {"a": 1}}, {"vision_config": None}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match="multimodal wrapper around a language model"):
            refuse_other_kinds(open_files(folder))
