"""Fixtures for all tests: a tiny random model of each family, a small world with known distances,
the local samples."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]
# no downloads, few threads, and no GPU: what is tested is exact on the CPU
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
                  CUDA_VISIBLE_DEVICES="")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import train_sft  # noqa: E402

torch.set_num_threads(1)
# what was started in the background may ignore Ctrl-C, and its children would, too
signal.signal(signal.SIGINT, signal.default_int_handler)
train_sft.SMALL_UNIT = 0  # each layer of a tiny model is sharded on its own, as those of a real one

# (width, height, focal) of the small world's images: sides off every patch grid, several cameras,
# landscape and upright
CAMERAS = [(120, 90, 100.0), (90, 120, 80.0), (150, 100, 125.0),
           (64, 64, 60.0), (112, 84, 100.0), (130, 70, 110.0)]


def run_script(*command, cwd=None, processes: int = 0,
               timeout: int = 300) -> subprocess.CompletedProcess:
    """One of the project's scripts in a process of its own (`processes` > 0: under torchrun)."""
    script, *rest = map(str, command)
    launch = []
    if processes:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if (ROOT / script).parent == ROOT:
            launch.append(str(ROOT / "tests" / "drive.py"))
    return subprocess.run([sys.executable, *launch, str(ROOT / script), *rest], cwd=cwd,
                          capture_output=True, text=True, timeout=timeout)


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def make_world(folder: Path, images: int = 6, points: int = 8, seed: int = 0,
               poses: bool = False) -> Path:
    """A jsonl with PNGs: walls at a slant, brightness tells the distance. poses: one camera that
    moves by 0.5 m from image to image. Returns the jsonl's path."""
    rng, records = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(images):
        w, h, f = CAMERAS[k % len(CAMERAS)]
        u, v = np.meshgrid(np.arange(w), np.arange(h))
        z = 1.0 + 0.6 * k + 2.0 * u / w + v / h
        depth = z * np.sqrt(1 + ((u - w / 2 + 0.5) / f) ** 2 + ((v - h / 2 + 0.5) / f) ** 2)
        grey = 255 / (1 + depth)
        texture = 12 * ((u // 7 + v // 7) % 2)
        pixels = np.stack([grey, grey + texture, 1.5 * grey], 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")
        x, y = rng.integers(w, size=points), rng.integers(h, size=points)
        camera = [f, f * (1 + 0.02 * (k % 3)), w / 2 - 0.5, h / 2 - 0.5, w, h]
        records.append({"image": f"{k:03d}.png", "intrinsics": camera,
                        "pixel_coords": [[int(a), int(b)] for a, b in zip(x, y)],
                        "depth": [round(float(depth[b, a]), 4) for a, b in zip(x, y)]})
        if poses:
            pose = [1, 0, 0, 0.3 * k, 0, 1, 0, 0, 0, 0, 1, 0.4 * k, 0, 0, 0, 1]
            records[-1].update(scene="walls", camera="a", pose=pose, time=0.5 * k)
    return write_jsonl(folder / "val.jsonl", records)


# --------------------------------------------------------------------------------------------------
# images, and transformers' own side of every comparison


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def view_of(image: Image.Image):
    import render
    return render.View(np.asarray(image), (100.0, 100.0, 1.0, 1.0, *image.size), (1.0, 1.0), (0, 0))


def views_for(checkpoint, sizes, seed: int = 0) -> list:
    """Noise of the given numbers of tokens (columns, rows)."""
    grid = checkpoint.grid
    return [view_of(noise(c * grid, r * grid, seed + k)) for k, (c, r) in enumerate(sizes)]


def image_processor(folder: Path, **options):
    """transformers' own processor of the folder's family, without torchvision."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    config = json.loads((folder / "preprocessor_config.json").read_text())
    pixtral = config.pop("image_processor_type").startswith("Pixtral")
    processor = PixtralImageProcessorPil if pixtral else Qwen2VLImageProcessorPil
    return processor(**config, do_resize=False, **options)


def stock(folder: Path, dtype: torch.dtype = torch.float32):
    """The plain transformers model with its own sdpa attention."""
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa",
                                                       dtype=dtype).eval()


def plain_inputs(folder: Path, checkpoint, sample: dict, views) -> dict:
    """A sample as transformers' own parts would give it to the model: processor's pixels, the
    model's own positions."""
    images = [Image.fromarray(v.pixels) for v in views]
    theirs = image_processor(folder)(images, return_tensors="pt")
    inputs = {"input_ids": torch.tensor(sample["input_ids"])[None],
              "pixel_values": theirs["pixel_values"]}
    if not checkpoint.family.mrope:
        return {**inputs, "image_sizes": torch.as_tensor(theirs["image_sizes"])}
    types = (inputs["input_ids"] == checkpoint.image_id).int()
    return {**inputs, "image_grid_thw": torch.as_tensor(theirs["image_grid_thw"]),
            "mm_token_type_ids": types}


# --------------------------------------------------------------------------------------------------
# fixtures


@pytest.fixture(scope="session")
def shared() -> Path:
    """Samples, goldens and configs that lie beside a developer's checkout; tests of them are
    skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the local samples beside the checkout")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The small world: <folder>/world/val.jsonl, 6 images of different sizes, 8 points each."""
    return make_world(tmp_path_factory.mktemp("data") / "world")


def save_folder(model, tokenizer, folder: Path, processor: dict) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Qwen2.5-VL: 2 ViT and 2 text layers, 64 wide, full attention."""
    import toy_model
    folder = tmp_path_factory.mktemp("models") / "tiny"
    toy_model.make_toy_model(folder, seed=1, hidden=64)
    return folder


@pytest.fixture(scope="session")
def tiny_windows(tiny, tmp_path_factory) -> Path:
    """The tiny Qwen2.5-VL with its first vision block in windows of 56 px (4 x 4 patches), as the
    real one has."""
    folder = tmp_path_factory.mktemp("models") / "tiny_windows"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].update(fullatt_block_indexes=[1], window_size=56)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3(tiny, tmp_path_factory) -> Path:
    """A random Qwen3-VL (patch 16, deepstack, interleaved mRoPE) with the tiny Qwen2.5-VL's
    tokenizer."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    names = {"image": "image_pad", "video": "video_pad",
             "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for key, name in names.items()}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "initializer_range": 0.08, "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        vision_config={
            "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128,
            "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1], "initializer_range": 0.08},
        tie_word_embeddings=True, **ids)
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "tiny_qwen3"
    return save_folder(Qwen3VLForConditionalGeneration(config), tokenizer, folder, {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})


@pytest.fixture(scope="session")
def tiny_pixtral(tmp_path_factory) -> Path:
    """A random Pixtral (LlavaForConditionalGeneration, patch 16) with a Mistral-like tokenizer and
    chat template."""
    import toy_model
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    import render
    family = render.FAMILIES["llava"]
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = toy_model.make_tokenizer(special, "</s>", family.chat_template)
    config = LlavaConfig(
        text_config=MistralConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=None,
            max_position_embeddings=4096, initializer_range=0.08),
        vision_config=PixtralVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=256, patch_size=16, initializer_range=0.08),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=1,
        tie_word_embeddings=False)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "tiny_pixtral"
    return save_folder(LlavaForConditionalGeneration(config), tokenizer, folder, {
        "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 16, "width": 16},
        "image_mean": list(family.mean), "image_std": list(family.std)})


@pytest.fixture(scope="session", params=["tiny", "tiny_windows", "tiny_qwen3", "tiny_pixtral"])
def family(request) -> Path:
    """Each model folder in turn."""
    return request.getfixturevalue(request.param)
