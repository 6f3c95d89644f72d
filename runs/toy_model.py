"""
The toy world's model: a Qwen2.5-VL of toy size, random, with a tokenizer in which each digit is a
token, as an ordinary Hugging Face folder.

    python runs/toy_model.py out/tiny                                # 0.8 M parameters, for a CPU
    python runs/toy_model.py out/larger --hidden 384 --heads 6 --vision-layers 4 --text-layers 4 \
        --init-std 0.04

train_sft.py --model out/tiny then starts from it as from any other.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import render  # noqa: E402
from render import COUNT, NATURAL, POSITIVE  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}")


def make_tokenizer(special: list[str] = SPECIAL, end: str = "<|im_end|>",
                   chat_template: str = CHAT_TEMPLATE):
    """A byte-level BPE made from the wordings of all tasks; each digit is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    distance = render.TASKS["distance"].wordings
    sentences = ["user\nassistant\n0123456789.", distance["text"][0], distance["camera prompt"][0],
                 distance["camera ray"][1], "left right above below"]
    for task in render.TASKS.values():
        (question, sentence), (long_question, thought) = (
            task.wordings["paper"], task.wordings["release"])
        sentences += [question, long_question, sentence, thought, sentence]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=special[0],
                                   chat_template=chat_template)


def make_toy_model(folder: Path, seed: int = 0, hidden: int = 96, heads: int = 4,
                   vision_layers: int = 2, text_layers: int = 2, init_std: float = 0.08) -> None:
    """Write the model folder."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    tokenizer = make_tokenizer()

    def token_id(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    head, wide = hidden // heads, hidden * 8 // 3
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": hidden,
            "intermediate_size": wide, "num_hidden_layers": text_layers,
            "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 32768, "initializer_range": init_std,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": token_id("im_end"),
            "pad_token_id": token_id("endoftext"),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6]}},
        vision_config={
            "depth": vision_layers, "hidden_size": hidden, "num_heads": heads,
            "intermediate_size": wide, "out_hidden_size": hidden, "patch_size": 14,
            "fullatt_block_indexes": list(range(vision_layers)), "initializer_range": init_std},
        tie_word_embeddings=True, image_token_id=token_id("image_pad"),
        video_token_id=token_id("video_pad"), vision_start_token_id=token_id("vision_start"),
        vision_end_token_id=token_id("vision_end"))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        smooth_patch_filters(model.model.visual.patch_embed.proj.weight, init_std)
    model.generation_config.eos_token_id = token_id("im_end")
    model.generation_config.pad_token_id = token_id("endoftext")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    family = render.FAMILIES["qwen2_5_vl"]
    render.write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": list(family.mean), "image_std": list(family.std),
        "min_pixels": 784, "max_pixels": 12845056})


@torch.no_grad()
def smooth_patch_filters(weight: torch.Tensor, std: float, frequencies: int = 3) -> None:
    """Start the patch filters (out, 3, 2, P, P) as random mixtures of low spatial frequencies,
    which is what trained vision towers have: a colour then looks alike wherever in a patch it
    stands. With white noise a tiny model needs several times as many samples to find the marker."""
    n = weight.shape[-1]
    k, x = torch.arange(frequencies)[:, None], torch.arange(n) + 0.5
    waves = torch.cos(torch.pi * k * x / n)  # (K, P)
    mix = torch.randn(*weight.shape[:2], 1, frequencies, frequencies)
    smooth = torch.einsum("octkl,ky,lx->octyx", mix, waves, waves).expand_as(weight)
    weight.copy_(smooth * (std / smooth.std()))


@render.command
def main(argv=None) -> None:
    parser = render.make_parser(__doc__)
    flag = parser.add_argument
    flag("folder", type=render.file_path, help="where the model is written")
    flag("--seed", type=NATURAL, default=0, help="of the random weights")
    flag("--hidden", type=COUNT, default=96, help="width of both towers")
    flag("--heads", type=COUNT, default=4, help="attention heads of both towers")
    flag("--vision-layers", type=COUNT, default=2, help="blocks of the vision tower")
    flag("--text-layers", type=COUNT, default=2, help="decoder layers")
    flag("--init-std", type=POSITIVE, default=0.08, help="of the random weights")
    args = vars(parser.parse_args(argv))
    folder = Path(args.pop("folder"))
    if not (folder / "model.safetensors").is_file():  # given again, a recipe keeps what it has
        make_toy_model(folder, **args)
    print(f"{folder}: a tiny Qwen2.5-VL")


if __name__ == "__main__":
    main()
