"""The tests, and the method in miniature. Nothing but requirements.txt is needed, no network, no GPU.

    python test_smoke.py               # the tests (also: pytest test_smoke.py)
    python test_smoke.py worlds [DIR]  # the data, toy MLLM and toy encoder of the README's tables
    python test_smoke.py demo [DIR]    # the main job on an embedded toy: pre-trains a little MLLM, captions, embeds, trains, evaluates

The toy world: 64x64 images of a shape on a background. The class is colour and shape ("red_circle"); the caption also tells size,
place and background. Labels are few and a stated share of them is wrong on purpose; the MLLM looks at the picture, not at the label.
"""

import contextlib
import csv
import functools
import importlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
tf.utils.logging.disable_progress_bar()

# ------------------------------------------------------------------------------------------------------- the toy world

SHAPES = ["circle", "square", "triangle", "cross", "star"]
COLORS = {
    "red": (200, 60, 50),
    "green": (70, 170, 70),
    "blue": (60, 90, 200),
    "yellow": (220, 200, 70),
    "purple": (150, 70, 170),
}
BACKGROUNDS = {
    "black": (30, 30, 30),
    "gray": (128, 128, 128),
    "brown": (120, 85, 60),
    "white": (225, 225, 225),
}
SIZES = {"small": (10, 12), "large": (17, 20)}
PLACES = {"top": 22, "bottom": 42}
PROMPT = "describe the image"
CLASSES = [f"{color}_{shape}" for color in COLORS for shape in SHAPES]


def caption_of(color: str, shape: str, size: str, place: str, background: str) -> str:
    return f"a {size} {color} {shape} at the {place} on a {background} background"


def draw(rng: random.Random, name: str) -> tuple[Image.Image, str]:
    """A new 64x64 image of the class, and its true caption."""
    color, shape = name.split("_")
    size, place, background = (
        rng.choice(list(SIZES)),
        rng.choice(list(PLACES)),
        rng.choice(list(BACKGROUNDS)),
    )

    def around(rgb, spread):
        return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in rgb)

    image = Image.new("RGB", (64, 64), around(BACKGROUNDS[background], 15))
    pen, ink, r = ImageDraw.Draw(image), around(COLORS[color], 25), rng.uniform(*SIZES[size])
    x, y, turn = (
        32 + rng.uniform(-4, 4),
        PLACES[place] + rng.uniform(-2, 2),
        math.pi / 4 + rng.uniform(-0.15, 0.15),
    )
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = r * math.cos(angle), r * math.sin(angle)
            pen.line([x - dx, y - dy, x + dx, y + dy], fill=ink, width=int(r * 0.55))
    else:
        radii = {"square": [1] * 4, "triangle": [1.1] * 3, "star": [1.1, 0.45] * 5}[shape]
        angles = [turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
        pen.polygon(
            [(x + r * k * math.cos(a), y + r * k * math.sin(a)) for k, a in zip(radii, angles)],
            fill=ink,
        )
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 8, (64, 64, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image, caption_of(color, shape, size, place, background)


def draw_world(
    root: Path,
    per_class: int,
    val_per_class: int,
    wrong: float,
    unlabeled: int = 0,
    classes: list[str] = CLASSES,
) -> dict[str, str]:
    """root/{train,val}/<class>/*.png; a share `wrong` of the training images lies in another class's folder, `unlabeled` more per class
    in train/_unlabeled. {key: true caption} of train/."""
    rng, captions = random.Random(0), {}
    for split, count in (("train", per_class), ("val", val_per_class), ("_unlabeled", unlabeled)):
        jobs = [name for name in classes for _ in range(count)]
        mislabelled = (
            set(rng.sample(range(len(jobs)), round(wrong * len(jobs)))) if split == "train" else ()
        )
        for i, name in enumerate(jobs):
            image, caption = draw(rng, name)
            label = (
                rng.choice([other for other in classes if other != name])
                if i in mislabelled
                else name
            )
            key = f"{label if split != '_unlabeled' else split}/{i:05d}.png"
            file = root / ("val" if split == "val" else "train") / key
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            if split != "val":
                captions[key] = caption
    return captions


def prepare(root: Path, **worlds: tuple) -> None:
    """root/<name>/{train,val} for each name = (images per class, share of wrong labels, unlabelled images per class); root/mllm, root/encoder."""
    for name, (per_class, wrong, unlabeled) in worlds.items():
        draw_world(root / name, per_class, 40, wrong, unlabeled)
        print(
            f"{root / name}: {len(CLASSES)} classes, {per_class} training images each, {wrong:.0%} of them with a wrong label, and {unlabeled} unlabelled ones; 40 validation images each, all right"
        )
    if not (root / "mllm" / "model.safetensors").exists():
        save_mllm(root / "mllm", steps=2000)
    if not (root / "encoder" / "model.safetensors").exists():
        save_text_encoder(root / "encoder", steps=300)


# ------------------------------------------------------------------------------------------- the toy's MLLM and encoder


def word_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    words = [
        "[PAD]",
        "[UNK]",
        "[BOS]",
        "[EOS]",
        "<image>",
        "USER",
        "ASSISTANT",
        *PROMPT.split(),
        "a",
        "at",
        "the",
        "on",
        "background",
        *SHAPES,
        *COLORS,
        *BACKGROUNDS,
        *SIZES,
        *PLACES,
        *extra,
    ]
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        additional_special_tokens=["<image>"],
        model_max_length=64,
    )


CHAT = (
    "{% for m in messages %}{{ bos_token }} USER {% for c in m['content'] %}{% if c['type'] == 'image' %} <image> {% else %} {{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT {% endif %}"
)


def build_mllm(
    seed: int = 0, init: float = 0.02
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A real Llava of 0.5 M random parameters: CLIP vision tower (32 px, 4x4 patches) + Llama + chat template."""
    torch.manual_seed(seed)
    tokenizer, width = word_tokenizer(), 96
    images = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=init,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=init,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            initializer_range=init,
        )
    )
    model.generation_config.update(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return model, processor


def pretrain_mllm(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
) -> float:
    """Teach it the world on freshly drawn pairs (none of them is in the demo's data); share of exact captions on new ones."""
    rng, tokenizer = random.Random("pre-training"), processor.tokenizer
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (64, 64))},
                {"type": "text", "text": PROMPT},
            ],
        }
    ]
    prompt = processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    pairs = [draw(rng, rng.choice(CLASSES)) for _ in range(12000)]
    pixels = torch.cat(
        [
            processor.image_processor(
                [image for image, _ in pairs[i : i + 500]], return_tensors="pt"
            )["pixel_values"]
            for i in range(0, len(pairs), 500)
        ]
    )
    words = tokenizer([caption + " [EOS]" for _, caption in pairs], return_tensors="pt")[
        "input_ids"
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator, held_out, start = torch.Generator().manual_seed(0), 1000, time.time()

    def logits_of(pick):
        ids = torch.cat([prompt.expand(len(pick), -1), words[pick]], 1)
        return model(
            input_ids=ids,
            pixel_values=pixels[pick],
            attention_mask=torch.ones_like(ids),
            logits_to_keep=words.shape[1] + 1,
        ).logits[:, :-1]

    for step in range(1, steps + 1):
        pick = torch.randint(held_out, len(pairs), (batch,), generator=generator)
        loss = F.cross_entropy(logits_of(pick).flatten(0, 1), words[pick].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"\rtoy MLLM: step {step}/{steps}, loss {loss.item():.3f}, {time.time() - start:.0f} s",
                end="",
                flush=True,
            )
    with torch.inference_mode():
        exact = [
            (logits_of(pick).argmax(-1) == words[pick]).all(1)
            for pick in torch.arange(held_out).split(100)
        ]
    return torch.cat(exact).float().mean().item()


def save_mllm(folder: Path, steps: int = 0, **kwargs) -> None:
    model, processor = build_mllm(**kwargs)
    if steps:
        exact = pretrain_mllm(model, processor, steps)
        print(
            f"\ntoy MLLM: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {exact:.1%} of the captions of new images are exact, word for word"
        )
    processor.save_pretrained(folder)
    model.eval().save_pretrained(folder)


def save_text_encoder(folder: Path, width: int = 64, steps: int = 0, seed: int = 0) -> None:
    """A tiny BERT. Random, its vectors all but coincide (most words are the same in all captions); `steps` of SimCSE (two dropout passes
    over a caption are a positive pair, the other captions negatives) spread them. It sees random captions, no image and no label."""
    torch.manual_seed(seed)
    tokenizer, rng = word_tokenizer("photo", "of"), random.Random(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=0.1,
        ),
        add_pooling_layer=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        captions = [
            caption_of(
                *rng.choice(CLASSES).split("_"),
                *map(rng.choice, (list(SIZES), list(PLACES), list(BACKGROUNDS))),
            )
            for _ in range(64)
        ]
        ids = tokenizer(sorted(set(captions)), return_tensors="pt")["input_ids"]
        a, b = (F.normalize(model(ids).last_hidden_state.mean(1), dim=1) for _ in range(2))
        F.cross_entropy(a @ b.T / 0.05, torch.arange(len(ids))).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- the demo


def draw_curves(file: Path, runs: dict[str, Path]) -> None:
    """A PNG of validation top-1 over the epochs, a line per run."""
    image = Image.new("RGB", (640, 400), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    curves = {
        name: [
            (e["epoch"], e["val_top1"])
            for e in read_lines(run / "log.jsonl")[1:]
            if "val_top1" in e
        ]
        for name, run in runs.items()
    }
    top, last = (
        max(y for curve in curves.values() for _, y in curve) * 1.1,
        max(x for curve in curves.values() for x, _ in curve),
    )
    for tick in range(0, math.ceil(top), 5):
        y = 360 - 320 * tick / top
        pen.line([50, y, 620, y], "lightgray")
        pen.text((10, y - 8), f"{tick} %", "black", font)
    for (name, curve), color in zip(curves.items(), ("gray", "green", "red")):
        points = [(50 + 570 * x / last, 360 - 320 * y / top) for x, y in curve]
        pen.line(points, color, 3)
        pen.text((60 + 120 * list(curves).index(name), 10), name, color, font)
    pen.text((240, 375), f"validation top-1 over {last} epochs", "black", font)
    image.save(file)


def run_demo(root: Path) -> None:
    began = time.time()

    def run(line: str) -> None:
        print(f"\n$ python {line}", flush=True)
        script, *options = shlex.split(line)
        subprocess.run([sys.executable, str(HERE / script), *options], check=True)

    def shown(path: Path) -> str:
        return shlex.quote(str(path))

    prepare(root, data=(40, 0.6, 0))
    describe = f"caption.py --data {shown(root / 'data/train')} --model {shown(root / 'mllm')} --prompt '{PROMPT}' --max-new-tokens 16 --batch-size 64"
    run(f"{describe} --preview {shown(root / 'captions.png')}")
    run(f"{describe} --out {shown(root / 'captions.jsonl')}")
    run(
        f"embed.py --captions {shown(root / 'captions.jsonl')} --out {shown(root / 'embeddings.npy')} --model {shown(root / 'encoder')}"
    )
    common = f"--data {shown(root / 'data')} --arch shufflenet_v2_x0_5 --input-size 64 --epochs 30 -b 50 --lr 0.1 --val-every 5 --seed 1 -j 1 --resume"
    aligned = f"--captions {shown(root / 'captions.jsonl')} --embeddings {shown(root / 'embeddings.npy')} --align-weight 2 --temperature 0.1"
    run(f"train.py {common} --out {shown(root / 'runs/baseline')}")
    run(f"train.py {common} --out {shown(root / 'runs/aligned')} {aligned}")
    run(f"train.py {common} --out {shown(root / 'runs/shuffled')} {aligned} --shuffle-captions")
    run(
        f"evaluate.py --data {shown(root / 'data/val')} "
        + " ".join(
            shown(root / "runs" / name / "last.pt") for name in ("baseline", "aligned", "shuffled")
        )
    )
    draw_curves(
        root / "curves.png",
        {name: root / "runs" / name for name in ("baseline", "aligned", "shuffled")},
    )
    print(
        f"\nWritten under {root}: data/, mllm/, encoder/, captions.jsonl, captions.png, embeddings.npy, runs/*/log.jsonl, curves.png. {time.time() - began:.0f} s in all."
    )


# ------------------------------------------------------------------- tiny random models of the kinds that caption.py takes

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
SQUARE = dict(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def tokens(frame: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """word_tokenizer() that puts [BOS] and [EOS] around a text as `frame` says; `special`: image_token="<image>" and the like."""
    torch.manual_seed(0)  # every builder begins here
    backend = word_tokenizer("thing", "cat", *special.values()).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        extra_special_tokens=special,
    )


def text(tokenizer, **more) -> dict:
    return (
        dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            **IDS,
        )
        | more
    )


def save_kind(folder: Path, model, *parts) -> None:
    """Random weights that are large enough for captions to depend on the image."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.update(**IDS)
    for part in (model, *parts):
        part.save_pretrained(folder)


def build_blip(folder):
    tokenizer = tokens("[BOS] $A [EOS]")
    config = tf.BlipConfig(text_config=text(tokenizer, sep_token_id=3), vision_config=VISION)
    save_kind(
        folder,
        tf.BlipForConditionalGeneration(config),
        tf.BlipProcessor(tf.BlipImageProcessor(**SQUARE), tokenizer),
    )


def build_git(folder):
    tokenizer = tokens("[BOS] $A [EOS]")
    processor = tf.GitProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
    )
    save_kind(
        folder, tf.GitForCausalLM(tf.GitConfig(**text(tokenizer), vision_config=VISION)), processor
    )


def build_blip2(folder):
    tokenizer = tokens("[BOS] $A")
    opt = tf.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        ffn_dim=64,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **IDS,
    )
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config=dict(text(tokenizer), encoder_hidden_size=32),
        text_config=opt,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_kind(
        folder,
        tf.Blip2ForConditionalGeneration(config),
        tf.Blip2Processor(tf.BlipImageProcessor(**SQUARE), tokenizer, num_query_tokens=4),
    )


def build_instructblip(folder):
    tokenizer, reader = tokens("[BOS] $A"), tokens("[BOS] $A [EOS]")
    reader.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(
        "", "isolated"
    )  # the Q-Former counts characters: its lengths differ from the LLM's
    config = tf.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=dict(text(reader), encoder_hidden_size=32),
        text_config=LlamaConfig(**text(tokenizer)),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = tf.InstructBlipProcessor(
        tf.BlipImageProcessor(**SQUARE), tokenizer, reader, num_query_tokens=4
    )
    save_kind(folder, tf.InstructBlipForConditionalGeneration(config), processor)


def build_vit_gpt2(folder):
    tokenizer = tokens()
    gpt2 = tf.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
        **IDS,
    )
    config = tf.VisionEncoderDecoderConfig(
        encoder=tf.ViTConfig(**VISION).to_dict(),
        decoder=gpt2.to_dict(),
        decoder_start_token_id=2,
        **IDS,
    )
    save_kind(
        folder, tf.VisionEncoderDecoderModel(config), tf.ViTImageProcessor(**SQUARE), tokenizer
    )


def build_idefics3(folder):
    tokenizer = tokens(image_token="<image>")
    images = tf.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    processor = tf.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=CHAT
    )  # adds tokens
    config = tf.Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**text(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    save_kind(folder, tf.Idefics3ForConditionalGeneration(config), processor)


def build_qwen2_vl(folder):
    tokenizer = tokens(image_token="<|image_pad|>", video_token="<|video_pad|>")
    images = tf.Qwen2VLImageProcessor(
        patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    processor = tf.Qwen2VLProcessor(
        images,
        tokenizer,
        tf.Qwen2VLVideoProcessor(patch_size=8),
        CHAT.replace("<image>", "<|image_pad|>"),
    )
    language = text(
        tokenizer,
        num_key_value_heads=4,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4),
    )
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=8)
    config = tf.Qwen2VLConfig(
        text_config=language,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    save_kind(folder, tf.Qwen2VLForConditionalGeneration(config), processor)


# ------------------------------------------------------------------------------------------------------------ the tests


def setUpModule() -> None:
    """One folder for all tests: a world of 4 classes x 6 images, a random MLLM, a random encoder, captions and embeddings."""
    global TMP, WORLD, MLLM, ENCODER, CAPTIONS, EMBEDDINGS
    torch.set_num_threads(2)
    TMP = Path(tempfile.mkdtemp(prefix="gpt4image-"))
    WORLD, MLLM, ENCODER, CAPTIONS, EMBEDDINGS = (
        TMP / "world",
        TMP / "mllm",
        TMP / "encoder",
        TMP / "captions.jsonl",
        TMP / "embeddings.npy",
    )
    true = draw_world(WORLD, 6, 5, wrong=0, classes=CLASSES[:2] + CLASSES[-2:])
    save_mllm(MLLM, init=0.2)
    save_text_encoder(ENCODER)
    write_lines(
        CAPTIONS, [{"image": key, "caption": caption} for key, caption in sorted(true.items())]
    )
    call("embed", "--captions", CAPTIONS, "--out", EMBEDDINGS, "--model", ENCODER)


def tearDownModule() -> None:
    shutil.rmtree(TMP)


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def call(script: str, *options) -> str:
    """Run a script's main() in this process (saves the seconds of importing torch); what it printed. SystemExit passes through, with its sentence."""
    module, printed, errors = importlib.import_module(script), io.StringIO(), io.StringIO()
    try:
        with (
            unittest.mock.patch.object(sys, "argv", [script, *map(str, options)]),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
        ):
            module.main()
    except SystemExit as end:
        raise SystemExit(
            errors.getvalue().splitlines()[-1] if end.code == 2 else end.code
        )  # 2: argparse has printed its sentence
    return printed.getvalue()


def command(script: str, *options, processes: int = 1) -> list[str]:
    launcher = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    return [*launcher, str(HERE / f"{script}.py"), *map(str, options)]


def shell(script: str, *options, processes: int = 1) -> str:
    """Run a script as a user does; what it printed on stdout."""
    result = subprocess.run(
        command(script, *options, processes=processes),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if result.returncode:
        raise AssertionError(f"{script} {options} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def kill_when(ready, script: str, *options, processes: int = 1) -> None:
    """Start a script and SIGKILL it and its children as soon as `ready()`."""
    process = subprocess.Popen(
        command(script, *options, processes=processes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.time() + 120
        while not ready():
            if process.poll() is not None or time.time() > deadline:
                raise AssertionError(
                    f"{script} was not to be caught in the middle: {process.stderr.read().decode()[-2000:]}"
                )
            time.sleep(0.005)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def train_options(out: str, *more, text: bool = True) -> list:
    return [
        "--data",
        WORLD,
        "--out",
        TMP / out,
        "--arch",
        "squeezenet1_1",
        "--input-size",
        32,
        "--epochs",
        2,
        "-b",
        8,
        "--lr",
        0.01,
        "-j",
        0,
        "--device",
        "cpu",
        *(
            ["--captions", CAPTIONS, "--embeddings", EMBEDDINGS, "--align-weight", 1]
            if text
            else []
        ),
        *more,
    ]


def weights_of(run: str) -> dict[str, torch.Tensor]:
    return torch.load(TMP / run / "last.pt", weights_only=True)["model"]


class Base(unittest.TestCase):
    def shortDescription(self) -> None:
        """Tests are listed by their names alone."""

    def refused(self, pattern: str, script: str, *options) -> None:
        """One clear sentence, no traceback, exit code not 0."""
        with self.assertRaises(SystemExit) as caught:
            call(script, *options)
        self.assertNotIn(caught.exception.code, (0, None))
        self.assertRegex(str(caught.exception.code), pattern)
        self.assertNotIn("\n", str(caught.exception.code))

    def fills_the_disk(self, size: int, pattern: str, script: str, *options) -> None:
        """With files limited to `size` bytes: the sentence, no traceback, exit code 1."""
        import resource  # not on Windows

        result = subprocess.run(
            command(script, *options),
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr.splitlines()[-1], pattern)
        self.assertNotIn("Traceback", result.stderr)

    def same_weights(self, a: str, b: str, **tolerance) -> None:
        for (name, x), y in zip(weights_of(a).items(), weights_of(b).values(), strict=True):
            if tolerance:
                torch.testing.assert_close(x, y, **tolerance, msg=lambda m: f"{name}: {m}")
            else:
                self.assertTrue(torch.equal(x, y), name)


class EndToEnd(Base):
    def test_four_stages_as_a_user_runs_them(self):
        captions, embeddings, run = TMP / "e2e.jsonl", TMP / "e2e.npy", TMP / "e2e"
        shell(
            "caption",
            "--data",
            WORLD / "train",
            "--out",
            captions,
            "--model",
            MLLM,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            6,
            "--batch-size",
            5,
            "-j",
            2,
        )
        keys = sorted(str(p.relative_to(WORLD / "train")) for p in (WORLD / "train").rglob("*.png"))
        self.assertEqual([line["image"] for line in read_lines(captions)], keys)
        self.assertGreater(
            len({line["caption"] for line in read_lines(captions)}),
            1,
            "the captions do not depend on the image",
        )
        shell("embed", "--captions", captions, "--out", embeddings, "--model", ENCODER)
        rows = np.load(embeddings, mmap_mode="r")
        self.assertEqual((rows.shape, rows.dtype), ((24, 64), np.float16))
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=2e-3)
        options = [
            "--data",
            WORLD,
            "--arch",
            "resnet18",
            "--input-size",
            32,
            "--epochs",
            2,
            "-b",
            8,
            "-j",
            1,
        ]
        shell("train", *options, "--out", run, "--captions", captions, "--embeddings", embeddings)
        shell("train", *options, "--out", TMP / "e2e-baseline")
        config, *epochs = read_lines(run / "log.jsonl")
        self.assertEqual([entry["epoch"] for entry in epochs], [1, 2])
        self.assertEqual(config["config"]["text"]["model"], str(ENCODER))
        self.assertGreater(epochs[0]["loss_align"], 0)
        # the checkpoint is the plain torchvision model, and evaluate.py counts what an independent loop counts
        state = torch.load(run / "last.pt", weights_only=True)
        model = torchvision.models.get_model(state["arch"], num_classes=len(state["classes"]))
        model.load_state_dict(state["model"], strict=True)
        preset = torchvision.transforms._presets.ImageClassification(
            crop_size=32, resize_size=round(32 / 0.875)
        )
        folder = torchvision.datasets.ImageFolder(WORLD / "val", preset)
        with torch.inference_mode():
            top1 = 100 * np.mean(
                [model.eval()(image[None]).argmax().item() == label for image, label in folder]
            )
        table = shell(
            "evaluate",
            "--data",
            WORLD / "val",
            TMP / "e2e-baseline/last.pt",
            run / "last.pt",
            "-b",
            7,
            "-j",
            1,
        )
        self.assertIn(f"| 20 | {top1:.2f} |", table.splitlines()[3])
        self.assertAlmostEqual(epochs[-1]["val_top1"], top1, places=4)
        both = shell(
            "evaluate",
            "--data",
            WORLD / "val",
            TMP / "e2e-baseline/last.pt",
            run / "last.pt",
            "-j",
            0,
            processes=2,
        )
        speed = re.compile(r"\d+ \|$", re.M)  # all columns but the speed
        self.assertEqual(speed.sub("", both), speed.sub("", table))


class Captioning(Base):
    def options(self, out: str, *more) -> list:
        return [
            "--data",
            WORLD / "train",
            "--out",
            TMP / out,
            "--model",
            MLLM,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            6,
            "--batch-size",
            2,
            "-j",
            0,
            "--device",
            "cpu",
            *more,
        ]

    @functools.cached_property
    def whole(self) -> bytes:
        if not (TMP / "whole.jsonl").exists():
            call("caption", *self.options("whole.jsonl"))
        return (TMP / "whole.jsonl").read_bytes()

    def test_killed_and_restarted(self):
        out = TMP / "killed.jsonl"
        kill_when(lambda: lines_in(out) >= 4, "caption", *self.options(out.name))
        self.assertTrue(
            self.whole.startswith(out.read_bytes()), "append-only, in the folder's order"
        )
        self.assertLess(lines_in(out), 24)
        with out.open("ab") as stream:
            stream.write(self.whole[out.stat().st_size :][:30])  # a line that was being written
        call("caption", *self.options(out.name))
        self.assertEqual(out.read_bytes(), self.whole)
        call("caption", *self.options(out.name))  # nothing to do
        self.assertEqual(out.read_bytes(), self.whole)

    def test_shards_and_torchrun_give_the_same_file(self):
        for shard in "1/3", "0/3":
            self.assertIn(
                "batches are done", call("caption", *self.options("shards.jsonl", "--shard", shard))
            )
            self.assertFalse((TMP / "shards.jsonl").exists())
        call("caption", *self.options("shards.jsonl", "--shard", "2/3"))
        self.assertEqual((TMP / "shards.jsonl").read_bytes(), self.whole)
        out = TMP / "torchrun.jsonl"
        parts = [TMP / f"{out.name}.part-{rank}-of-2" for rank in range(2)]
        kill_when(
            lambda: sum(map(lines_in, parts)) >= 4, "caption", *self.options(out.name), processes=2
        )
        shell("caption", *self.options(out.name), processes=2)
        self.assertEqual(out.read_bytes(), self.whole)
        self.assertEqual(list(TMP.glob("*.part-*")), [])

    def test_the_fullest_copy_of_a_batch_wins(self):
        first, second = (json.loads(line) for line in self.whole.splitlines()[:2])
        write_lines(TMP / "copies.jsonl.part-0-of-2", [first, second])
        write_lines(
            TMP / "copies.jsonl", [{"image": first["image"], "error": "was not to be read"}, second]
        )
        call("caption", *self.options("copies.jsonl"))
        self.assertEqual((TMP / "copies.jsonl").read_bytes(), self.whole)
        self.assertFalse((TMP / "copies.jsonl.failed").exists())

    def test_limit_then_all(self):
        call("caption", *self.options("limit.jsonl", "--limit", 5))
        self.assertEqual(lines_in(TMP / "limit.jsonl"), 5)
        call("caption", *self.options("limit.jsonl"))
        self.assertEqual((TMP / "limit.jsonl").read_bytes(), self.whole)

    def test_no_mixed_files(self):
        self.whole
        self.refused(
            "was begun with settings", "caption", *self.options("whole.jsonl", "--prompt", "a")
        )
        write_lines(
            TMP / "other.jsonl",
            [json.loads(line) | {"prompt": "other"} for line in self.whole.splitlines()],
        )
        self.refused(
            "was begun with prompt 'other', this run has 'describe the image'",
            "caption",
            *self.options("other.jsonl"),
        )
        self.refused(
            "was begun with settings",
            "caption",
            *self.options("whole.jsonl", "--max-new-tokens", 7),
        )

    def test_batch_size_does_not_change_captions(self):
        call("caption", *self.options("b7.jsonl", "--batch-size", 7))
        self.assertEqual(
            [line["caption"] for line in read_lines(TMP / "b7.jsonl")],
            [json.loads(line)["caption"] for line in self.whole.splitlines()],
        )

    def test_kinds_of_models(self):
        """Batch 1 and batch 4 give the same captions for images of different sizes; they depend on the image; the prompt is not in them."""
        rng = np.random.default_rng(0)
        for i in range(7):
            folder = TMP / "sizes" / ("cat" if i < 4 else "large_red_circle")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                rng.integers(0, 255, tuple(rng.integers(24, 90, 2)) + (3,), np.uint8)
            ).save(folder / f"{i}.png")
        for kind in "blip", "git", "blip2", "instructblip", "vit_gpt2", "idefics3", "qwen2_vl":
            with self.subTest(kind):
                globals()[f"build_{kind}"](TMP / kind)
                found = []
                for size in 1, 4:
                    out = TMP / f"{kind}-{size}.jsonl"
                    prompt = "" if kind in ("git", "vit_gpt2") else "describe the {class}"
                    call(
                        "caption",
                        "--data",
                        TMP / "sizes",
                        "--out",
                        out,
                        "--model",
                        TMP / kind,
                        "--prompt",
                        prompt,
                        "--max-new-tokens",
                        8,
                        "--batch-size",
                        size,
                        "-j",
                        0,
                        "--device",
                        "cpu",
                    )
                    found.append([line["caption"] for line in read_lines(out)])
                self.assertEqual(found[0], found[1])
                self.assertEqual(len(found[0]), 7)
                self.assertGreater(len(set(found[0])), 2)
                self.assertFalse([caption for caption in found[0] if "describe the" in caption])

    def test_out_of_memory_is_halved(self):
        """Down to one image; one that does not fit even alone costs itself only, and --retry-failed brings it back."""
        from caption import Describer

        generate, seen = Describer.generate, []

        def small_memory(describer, inputs):
            seen.append(inputs["pixel_values"])
            if len(seen[-1]) > 2 or any(torch.equal(row, seen[0][3]) for row in seen[-1]):
                raise torch.OutOfMemoryError("no room")
            return generate(describer, inputs)

        with unittest.mock.patch.object(Describer, "generate", small_memory):
            printed = call("caption", *self.options("oom.jsonl", "--batch-size", 7))
        want = [json.loads(line)["caption"] for line in self.whole.splitlines()]
        self.assertEqual(
            [line["caption"] for line in read_lines(TMP / "oom.jsonl")], want[:3] + want[4:]
        )
        self.assertIn("23 captions", printed)
        self.assertIn("1 images failed, listed in", printed)
        self.assertRegex(read_lines(TMP / "oom.jsonl.failed")[0]["error"], "OutOfMemoryError")
        call("caption", *self.options("oom.jsonl", "--batch-size", 7, "--retry-failed"))
        self.assertEqual([line["caption"] for line in read_lines(TMP / "oom.jsonl")], want)
        self.assertFalse((TMP / "oom.jsonl.failed").exists())

    def test_odd_image_and_added_images(self):
        from caption import Describer, load_image

        keys = [json.loads(line)["image"] for line in self.whole.splitlines()]
        odd, encode = load_image(str(WORLD / "train" / keys[5])).tobytes(), Describer.encode

        def picky(describer, images, prompts):
            if any(image.tobytes() == odd for image in images):
                raise ValueError("too odd")
            return encode(describer, images, prompts)

        with unittest.mock.patch.object(Describer, "encode", picky):
            call("caption", *self.options("picky.jsonl", "--batch-size", 4))
        self.assertEqual(
            [line["image"] for line in read_lines(TMP / "picky.jsonl")], keys[:5] + keys[6:]
        )
        self.assertEqual(
            read_lines(TMP / "picky.jsonl.failed"),
            [{"image": keys[5], "error": "ValueError: too odd"}],
        )
        shutil.copytree(WORLD / "train", TMP / "grown")
        (TMP / "grown" / "a_first_class").mkdir()
        shutil.copy(WORLD / "train" / keys[0], TMP / "grown" / "a_first_class" / "new.png")
        write_lines(
            TMP / "grown.jsonl", [json.loads(line) for line in self.whole.splitlines()][::2]
        )
        self.refused(
            "batches lack captions: were images added",
            "caption",
            *self.options("grown.jsonl", "--data", TMP / "grown"),
        )

    def test_full_disk(self):
        self.fills_the_disk(
            2000,
            "File too large; what is complete on the disk stays: start the same command again",
            "caption",
            *self.options("full.jsonl"),
        )
        self.assertLess(lines_in(TMP / "full.jsonl"), 24)
        call("caption", *self.options("full.jsonl"))
        self.assertEqual((TMP / "full.jsonl").read_bytes(), self.whole)

    def test_several_prompts_and_samples(self):
        call(
            "caption",
            *self.options(
                "many.jsonl",
                "--prompt",
                "describe the {class}",
                "--num-captions",
                2,
                "--temperature",
                1.0,
                "--limit",
                3,
            ),
        )
        call(
            "caption",
            *self.options(
                "many2.jsonl",
                "--prompt",
                "describe the {class}",
                "--num-captions",
                2,
                "--temperature",
                1.0,
                "--limit",
                3,
            ),
        )
        lines = read_lines(TMP / "many.jsonl")
        self.assertEqual(
            [line["prompt"] for line in lines],
            [PROMPT, PROMPT, "describe the {class}", "describe the {class}"] * 3,
        )
        self.assertEqual((TMP / "many.jsonl").read_bytes(), (TMP / "many2.jsonl").read_bytes())
        self.refused(
            "needs --temperature above 0",
            "caption",
            *self.options("many3.jsonl", "--num-captions", 2),
        )

    def test_images_of_all_kinds(self):
        folder = TMP / "zoo" / "thing"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        rgb = Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8))
        rgb.convert("L").save(folder / "grey.png")
        rgb.quantize(8).save(folder / "palette.png", transparency=3)
        rgb.convert("RGBA").save(folder / "rgba.png")
        rgb.convert("CMYK").save(folder / "cmyk.jpg")
        Image.fromarray(rng.integers(0, 65535, (40, 50), np.uint16)).save(folder / "sixteen.png")
        rgb.save(folder / "two frames.webp", save_all=True, append_images=[rgb.rotate(90)])
        rgb.save(os.fsencode(folder) + b"/\xff quote' \n line.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(folder / "turned.jpg", exif=exif)
        (folder / "directory.jpg").mkdir()
        rgb.save(folder / "cut.jpg")
        (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:500])
        (folder / "noise.jpeg").write_bytes(b"no image at all")
        (folder / "zero.png").write_bytes(b"")
        Image.new("1", (20000, 20000)).save(folder / "bomb.png")
        for workers in 0, 2:
            out = TMP / f"zoo{workers}.jsonl"
            printed = call(
                "caption",
                *self.options(out.name, "--data", TMP / "zoo", "--batch-size", 3, "-j", workers),
            )
            self.assertEqual(len(read_lines(out)), 8)
            failed = {line["image"] for line in read_lines(Path(f"{out}.failed"))}
            self.assertEqual(
                failed,
                {f"thing/{name}" for name in ("cut.jpg", "noise.jpeg", "zero.png", "bomb.png")},
            )
            self.assertIn("4 images failed", printed)
        before = out.read_bytes()
        call("caption", *self.options(out.name, "--data", TMP / "zoo", "--batch-size", 3))
        self.assertEqual(out.read_bytes(), before)
        rgb.save(folder / "zero.png")
        call(
            "caption",
            *self.options(out.name, "--data", TMP / "zoo", "--batch-size", 3, "--retry-failed"),
        )
        self.assertEqual((len(read_lines(out)), len(read_lines(Path(f"{out}.failed")))), (9, 3))
        from caption import load_image

        self.assertEqual(load_image(str(folder / "turned.jpg")).size, (40, 50))
        wide = np.asarray(load_image(str(folder / "sixteen.png")).convert("L")).astype(int)
        self.assertLess(abs(wide.mean() - 127), 10, "16 bit is scaled, not clipped")

    def test_template_and_class_names(self):
        template = [
            "--data",
            WORLD / "train",
            "--model",
            "template",
            "--prompt",
            "a photo of a {class}",
        ]
        call("caption", *template, "--out", TMP / "template.jsonl")
        self.assertEqual(
            read_lines(TMP / "template.jsonl")[0]["caption"], "a photo of a purple cross"
        )
        shutil.copytree(WORLD / "train", TMP / "part")
        (TMP / "part" / "red_circle").rename(TMP / "part" / "_unlabeled")
        self.assertIn(
            "18 captions",
            call("caption", *template, "--data", TMP / "part", "--out", TMP / "part.jsonl"),
        )  # the nameless have none
        self.refused(
            "have no class to be named",
            "caption",
            *self.options("x.jsonl", "--data", TMP / "part", "--prompt", "a {class}"),
        )
        names = TMP / "words.txt"
        names.write_text(
            "".join(f"{name}\tfancy {i}, other name\n" for i, name in enumerate(CLASSES))
        )
        call("caption", *template, "--out", TMP / "named.jsonl", "--class-names", names)
        self.assertEqual(
            read_lines(TMP / "named.jsonl")[0]["caption"],
            f"a photo of a fancy {CLASSES.index('purple_cross')}",
        )
        names.write_text("red_circle\tx\n")
        self.refused(
            "no name for 3 class folder",
            "caption",
            *template,
            "--out",
            TMP / "x.jsonl",
            "--class-names",
            names,
        )
        self.refused(
            "holds other captions",
            "caption",
            *template[:-1],
            "another {class}",
            "--out",
            TMP / "template.jsonl",
        )

    def test_import(self):
        keys = [line["image"] for line in read_lines(CAPTIONS)]
        texts = [f'text number {i},\u2028 "quoted"' for i in range(len(keys))]
        want = [(key, " ".join(text.split())) for key, text in zip(keys, texts)]
        torch.save(texts, TMP / "published.pth")
        (TMP / "published.txt").write_text("\n".join(texts) + "\n")
        with (TMP / "published.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(
                [
                    ["file_name", "caption"],
                    *[(key.split("/")[1], text) for key, text in zip(keys, texts)],
                    ["nowhere.png", "lost"],
                ]
            )
        for ending in "pth", "txt", "csv":
            out = TMP / f"imported-{ending}.jsonl"
            printed = call(
                "caption",
                "--data",
                WORLD / "train",
                "--out",
                out,
                "--import",
                TMP / f"published.{ending}",
            )
            self.assertEqual(
                [(line["image"], line["caption"]) for line in read_lines(out)], want, ending
            )
        self.assertIn("1 of 25 rows", printed)
        with (TMP / "other.csv").open(
            "w"
        ) as stream:  # the same file names in other classes are other images
            stream.write(
                f"path,text\n{keys[0]},right\n"
                + "".join(f"horse/{key.split('/')[1]},wrong\n" for key in keys)
            )
        call(
            "caption",
            "--data",
            WORLD / "train",
            "--out",
            TMP / "other-classes.jsonl",
            "--import",
            TMP / "other.csv",
        )
        self.assertEqual(
            [(line["image"], line["caption"]) for line in read_lines(TMP / "other-classes.jsonl")],
            [(keys[0], "right")],
        )
        with (
            (TMP / "other.csv").open("w") as stream
        ):  # another root: matched by class folder and file name, not by the file name alone
            stream.write(
                f"path,text\n/elsewhere/{keys[0]},right\nhorse/{keys[1].split('/')[1]},wrong\n"
            )
        call(
            "caption",
            "--data",
            WORLD / "train",
            "--out",
            TMP / "other-root.jsonl",
            "--import",
            TMP / "other.csv",
        )
        self.assertEqual(
            [(line["image"], line["caption"]) for line in read_lines(TMP / "other-root.jsonl")],
            [(keys[0], "right")],
        )
        torch.save(texts[1:], TMP / "short.pth")
        self.refused(
            "23 captions, but --data has 24 images",
            "caption",
            "--data",
            WORLD / "train",
            "--out",
            TMP / "x.jsonl",
            "--import",
            TMP / "short.pth",
        )
        torch.save(Base, TMP / "code.pth")
        self.refused(
            "--import",
            "caption",
            "--data",
            WORLD / "train",
            "--out",
            TMP / "x.jsonl",
            "--import",
            TMP / "code.pth",
        )

    def test_refusals(self):
        (TMP / "hollow" / "full").mkdir(parents=True)
        (TMP / "hollow" / "empty").mkdir()
        Image.new("RGB", (8, 8)).save(TMP / "hollow" / "full" / "a.png")
        self.refused(
            "no valid file for the classes empty",
            "caption",
            *self.options("x.jsonl", "--data", TMP / "hollow"),
        )
        self.refused("--data", "caption", *self.options("x.jsonl", "--data", TMP / "nowhere"))
        self.refused("did you mean .*train", "caption", *self.options("x.jsonl", "--data", WORLD))
        self.refused(
            "{clas}.* is not known", "caption", *self.options("x.jsonl", "--prompt", "a {clas}")
        )
        self.refused(
            "no such folder", "caption", *self.options("x.jsonl", "--model", TMP / "nowhere")
        )
        self.refused("--model .*cannot load", "caption", *self.options("x.jsonl", "--model", TMP))

    def test_preview(self):
        call("caption", *self.options("x.jsonl", "--preview", TMP / "sheet.png"))
        self.assertFalse((TMP / "x.jsonl").exists())
        self.assertGreater(Image.open(TMP / "sheet.png").height, 3 * 256)


def write_two_captions(file: Path, images: int) -> None:
    """Images with a long and a short caption each, of the toy world."""
    rng, lines = random.Random(0), []
    for i in range(images):
        color, shape = rng.choice(CLASSES).split("_")
        size, place, background = (
            rng.choice(list(SIZES)),
            rng.choice(list(PLACES)),
            rng.choice(list(BACKGROUNDS)),
        )
        lines += [
            {"image": f"{i}", "caption": caption_of(color, shape, size, place, background)},
            {"image": f"{i}", "caption": f"{size} {color} {shape} {place} {background}"},
        ]
    write_lines(file, lines)


class Embedding(Base):
    def test_kinds_of_encoders(self):
        """CLIP's projected text features, a decoder's last token, T5's encoder: against transformers, one caption at a time."""
        torch.manual_seed(0)
        tokenizer = tokens("[BOS] $A [EOS]")
        clip = tf.CLIPModel(
            tf.CLIPConfig(
                text_config=text(tokenizer, max_position_embeddings=10),
                vision_config=VISION,
                projection_dim=16,
            )
        )
        llama = tf.LlamaModel(LlamaConfig(**text(tokenizer)))
        t5 = tf.T5Model(
            tf.T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        )
        captions = [
            "a red circle",
            "a",
            "a large red circle at the top on a black background",
            "blue star",
        ]
        write_lines(
            TMP / "kinds.jsonl", [{"image": "x", "caption": caption} for caption in captions]
        )
        for name, model, options, reference in (
            ("clip", clip, [], lambda ids: model.get_text_features(input_ids=ids).pooler_output[0]),
            (
                "llama",
                llama,
                ["--pooling", "last", "--prefix", "describe "],
                lambda ids: model(ids).last_hidden_state[0, -1],
            ),
            ("t5", t5, [], lambda ids: model.get_encoder()(ids).last_hidden_state[0].mean(0)),
        ):
            with self.subTest(name), torch.inference_mode():
                for part in model.eval(), tokenizer:
                    part.save_pretrained(TMP / f"encoder-{name}")
                call(
                    "embed",
                    "--captions",
                    TMP / "kinds.jsonl",
                    "--out",
                    TMP / f"kinds-{name}.npy",
                    "--model",
                    TMP / f"encoder-{name}",
                    "--out-dtype",
                    "float32",
                    *options,
                )
                for caption, row in zip(captions, np.load(TMP / f"kinds-{name}.npy"), strict=True):
                    ids = tokenizer(
                        "describe " * (name == "llama") + caption,
                        truncation=name == "clip",
                        max_length=10,
                    )["input_ids"]
                    np.testing.assert_allclose(
                        row, F.normalize(reference(torch.tensor([ids])), dim=0).numpy(), atol=2e-5
                    )

    def test_caption_contrastive_tuning(self):
        write_two_captions(TMP / "pairs.jsonl", 300)
        for rank in 0, 4:
            with self.subTest(rank=rank):
                save_text_encoder(TMP / "untuned", seed=1)
                tuned = TMP / f"tuned-{rank}"
                printed = call(
                    "embed",
                    "--captions",
                    TMP / "pairs.jsonl",
                    "--out",
                    TMP / f"tuned-{rank}.npy",
                    "--model",
                    TMP / "untuned",
                    "--tune-epochs",
                    6,
                    "--tune-batch",
                    32,
                    "--tune-lr",
                    0.003,
                    "--lora-rank",
                    rank,
                    "--tuned-out",
                    tuned,
                    "--pooling",
                    "mean",
                )
                before, after = map(
                    float, re.search(r"([\d.]+) % before, ([\d.]+) % after", printed).groups()
                )
                self.assertGreater(after, before + 10)
                call(
                    "embed",
                    "--captions",
                    TMP / "pairs.jsonl",
                    "--out",
                    TMP / f"again-{rank}.npy",
                    "--model",
                    tuned,
                )
                self.assertEqual(
                    (TMP / f"again-{rank}.npy").read_bytes(),
                    (TMP / f"tuned-{rank}.npy").read_bytes(),
                )
        write_lines(TMP / "single.jsonl", [{"image": f"{i}", "caption": "a"} for i in range(100)])
        self.refused(
            "0 of 100 images have them",
            "embed",
            "--captions",
            TMP / "single.jsonl",
            "--out",
            TMP / "x.npy",
            "--model",
            ENCODER,
            "--tune-epochs",
            1,
        )

    def test_lora_and_contrastive_loss(self):
        import embed

        vectors, texts = (
            F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1),
            ["a", "b", "c", "d", "a", "b"],
        )
        want, v = 0.0, vectors.double().numpy()
        for i in range(6):
            partner = (i + 3) % 6
            others = [
                j for j in range(6) if j == partner or texts[j] not in (texts[i], texts[partner])
            ]
            want += (
                math.log(sum(math.exp(v[i] @ v[j] / 0.05) for j in others))
                - v[i] @ v[partner] / 0.05
            )
        self.assertAlmostEqual(
            embed.caption_contrastive_loss(vectors, texts).item(), want / 6, places=4
        )
        layer = torch.nn.Sequential(torch.nn.Linear(5, 3))
        x, weight = torch.randn(2, 5), layer[0].weight.detach().clone()
        before = layer(x)
        lora = embed.add_lora(layer, 2)[0].parametrizations.weight[0]
        torch.testing.assert_close(layer(x), before)  # B starts at zero
        layer(x).square().sum().backward()
        full = torch.autograd.grad(
            (x @ (w := weight.clone().requires_grad_()).T + layer[0].bias).square().sum(), w
        )[0]
        torch.testing.assert_close(lora.b.grad, 2 * full @ lora.a.T)  # d/dB of f(W + 2 B A)
        self.assertEqual(
            [name for name, p in layer.named_parameters() if p.requires_grad],
            ["0.parametrizations.weight.0.a", "0.parametrizations.weight.0.b"],
        )
        with torch.no_grad():
            lora.b.normal_()
        after = layer(x)
        torch.nn.utils.parametrize.remove_parametrizations(layer[0], "weight")
        torch.testing.assert_close(layer(x), after)

    def test_rows_against_plain_transformers(self):
        file = TMP / "odd.jsonl"
        texts = [
            "a red circle",
            "",
            "a",
            "star " * 200,
            "a large red circle at the top on a black background",
            "a red circle",
            "ünknown 漢字",
        ]
        write_lines(file, [{"image": "x", "caption": text} for text in texts])
        printed = call(
            "embed",
            "--captions",
            file,
            "--out",
            TMP / "odd.npy",
            "--model",
            ENCODER,
            "--out-dtype",
            "float32",
            "--batch-tokens",
            30,
        )
        self.assertIn("6 different captions", printed)
        self.assertIn("1 captions were cut at 64 tokens, by 136 at the median", printed)
        model, tokenizer = (
            BertModel.from_pretrained(ENCODER, add_pooling_layer=False).eval(),
            PreTrainedTokenizerFast.from_pretrained(ENCODER),
        )
        for text, row in zip(texts, np.load(TMP / "odd.npy")):
            ids = torch.tensor([tokenizer(text)["input_ids"][:64]], dtype=torch.long)
            if ids.numel():
                with torch.inference_mode():
                    want = F.normalize(model(ids).last_hidden_state[0].mean(0), dim=0).numpy()
                np.testing.assert_allclose(row, want, atol=1e-5)

    def test_killed_and_restarted(self):
        file, rng = TMP / "long.jsonl", random.Random(0)
        write_lines(
            file,
            [
                {
                    "image": "x",
                    "caption": " ".join(rng.choices(list(COLORS) + SHAPES, k=rng.randint(1, 50))),
                }
                for _ in range(20000)
            ],
        )
        call(
            "embed",
            "--captions",
            file,
            "--out",
            TMP / "whole.npy",
            "--model",
            ENCODER,
            "--batch-tokens",
            500,
        )
        done = TMP / "killed.npy.tmp.done"
        options = [
            "--captions",
            file,
            "--out",
            TMP / "killed.npy",
            "--model",
            ENCODER,
            "--batch-tokens",
            500,
        ]
        kill_when(lambda: done.exists() and any(done.read_bytes()), "embed", *options)
        self.assertFalse((TMP / "killed.npy").exists())
        self.assertFalse(all(done.read_bytes()))
        rows = np.lib.format.open_memmap(TMP / "killed.npy.tmp", "r+")
        finished = int(np.flatnonzero(rows.any(1))[0])
        rows[finished] *= -1  # a mark: what was done is not done again
        del rows
        shell("embed", *options, processes=2)
        found, want = np.load(TMP / "killed.npy"), np.load(TMP / "whole.npy")
        self.assertTrue(np.array_equal(found[finished], -want[finished]))
        found[finished] *= -1
        self.assertTrue(np.array_equal(found, want))
        self.assertIn("nothing to do", call("embed", *options))
        self.assertEqual(list(TMP.glob("killed.npy.tmp*")), [])

    def test_refusals(self):
        bad = TMP / "bad.jsonl"
        bad.write_text('{"image": "a", "caption": "b"}\n{"image": "a"}\n')
        self.refused(
            "line 2", "embed", "--captions", bad, "--out", TMP / "x.npy", "--model", ENCODER
        )
        self.refused(
            "No such file",
            "embed",
            "--captions",
            TMP / "nowhere.jsonl",
            "--out",
            TMP / "x.npy",
            "--model",
            ENCODER,
        )
        self.refused(
            "no such folder",
            "embed",
            "--captions",
            CAPTIONS,
            "--out",
            TMP / "x.npy",
            "--model",
            TMP / "nowhere",
        )
        self.refused(
            "cannot load", "embed", "--captions", CAPTIONS, "--out", TMP / "x.npy", "--model", TMP
        )
        bad.write_text("")
        self.refused(
            "is empty", "embed", "--captions", bad, "--out", TMP / "x.npy", "--model", ENCODER
        )


def loop_loss(kind, images, texts, has, temperature, mixing=None, labels=None) -> float:
    """The alignment losses once more, in loops over float64, from their formulas."""
    i, t, n = images.double().numpy(), texts.double().numpy(), len(images)
    mixing = np.eye(n) if mixing is None else mixing.double().numpy()
    if kind == "cosine":
        terms = [(mixing[a, b], 2 - 2 * i[a] @ t[b]) for a in range(n) for b in range(n) if has[b]]
        return sum(m * x for m, x in terms) / sum(m for m, _ in terms)
    suits = [
        [
            has[a]
            and has[b]
            and (a == b or (labels is not None and labels[a] >= 0 and labels[a] == labels[b]))
            for b in range(n)
        ]
        for a in range(n)
    ]
    total = mass = 0.0
    for a in range(n):  # image -> text
        denominator = math.log(sum(math.exp(i[a] @ t[b] / temperature) for b in range(n) if has[b]))
        for own in range(n):
            for b in range(n):
                if suits[own][b]:
                    share = mixing[a, own] / sum(suits[own])
                    total, mass = (
                        total + share * (denominator - i[a] @ t[b] / temperature),
                        mass + share,
                    )
    forward = total / mass
    if kind == "infonce":
        return forward
    total = mass = 0.0
    shows = [sum(mixing[a, b] for b in range(n) if has[b]) > 0 for a in range(n)]
    for b in range(n):  # text -> image
        if has[b]:
            share = np.array(
                [sum(mixing[a, own] for own in range(n) if suits[own][b]) for a in range(n)]
            )
            denominator = math.log(
                sum(math.exp(i[a] @ t[b] / temperature) for a in range(n) if shows[a])
            )
            total += sum(
                share[a] / share.sum() * (denominator - i[a] @ t[b] / temperature)
                for a in range(n)
                if share[a]
            )
            mass += 1
    return (forward + total / mass) / 2


def loss_cases(n: int, seed: int = 0):
    """(name, kwargs) for all losses, with and without mixing, missing texts and class targets. `n` images of one process."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for _ in range(2))
    has = torch.rand(n, generator=generator) < 0.8
    has[0] = True
    labels = torch.randint(-1, 3, (n,), generator=generator)
    mixing = 0.7 * torch.eye(n) + 0.3 * torch.eye(n).roll(1, 0)
    for kind in "cosine", "infonce", "clip":
        for missing in False, True:
            for mixed in False, True:
                for by_class in (False, True) if kind != "cosine" else (False,):
                    yield (
                        f"{kind} missing={missing} mixed={mixed} class={by_class}",
                        dict(
                            kind=kind,
                            images=images,
                            texts=texts,
                            has_text=has if missing else torch.ones(n, dtype=torch.bool),
                            temperature=0.3,
                            mixing=mixing if mixed else None,
                            labels=labels if by_class else None,
                        ),
                    )


def gradients_of_rank(rank: int, world: int, n: int, folder: str) -> None:
    """What DDP leaves behind on one of `world` processes: gradients of a linear map of the images, averaged."""
    import train

    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
        )
    rows, found = slice(rank * n // world, (rank + 1) * n // world), {}
    for name, case in loss_cases(n):
        if (
            case["mixing"] is not None
        ):  # mixing stays within a process: the same blocks for the single process
            block = n // 4
            small = 0.7 * torch.eye(block) + 0.3 * torch.eye(block).roll(1, 0)
            case["mixing"] = torch.block_diag(*[small] * 4)[rows, rows]
        weight = torch.eye(5, requires_grad=True)
        labels = case["labels"]
        loss = train.alignment_loss(
            case["kind"],
            F.normalize(case["images"][rows] @ weight, dim=1),
            case["texts"][rows],
            case["has_text"][rows],
            0.3,
            case["mixing"],
            labels[rows] if labels is not None else None,
        )
        logits = case["images"][rows] @ weight
        loss = loss + train.cross_entropy(
            logits,
            (labels if labels is not None else torch.arange(n) % 5)[rows],
            case["mixing"],
            0.1,
        )
        loss.backward()
        if world > 1:
            torch.distributed.all_reduce(weight.grad)
        found[name] = weight.grad / world
    if rank == 0:
        torch.save(found, f"{folder}/gradients-{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


class Losses(Base):
    def test_alignment_against_loops(self):
        from train import alignment_loss

        for name, case in loss_cases(6):
            with self.subTest(name):
                want = loop_loss(
                    case["kind"],
                    case["images"],
                    case["texts"],
                    case["has_text"].tolist(),
                    case["temperature"],
                    case["mixing"],
                    case["labels"].tolist() if case["labels"] is not None else None,
                )
                self.assertAlmostEqual(alignment_loss(**case).item(), want, places=5)

    def test_missing_texts_equal_the_smaller_batch(self):
        from train import alignment_loss

        for name, case in loss_cases(6):
            if case["mixing"] is None and case["labels"] is None and not case["has_text"].all():
                kept = case["has_text"]
                smaller = case | dict(
                    images=case["images"][kept], texts=case["texts"][kept], has_text=kept[kept]
                )
                self.assertAlmostEqual(
                    alignment_loss(**case).item(),
                    alignment_loss(**smaller).item(),
                    places=5,
                    msg=name,
                )

    def test_cross_entropy_against_torch(self):
        from train import cross_entropy

        logits, labels = (
            torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0, 3, -1, 2, 1, -1]),
        )
        for smoothing in 0.0, 0.1:
            self.assertAlmostEqual(
                cross_entropy(logits, labels, None, smoothing).item(),
                F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing).item(),
                places=5,
            )
        mixing, whole = 0.7 * torch.eye(6) + 0.3 * torch.eye(6).roll(1, 0), labels.clamp(min=0)
        want = 0.7 * F.cross_entropy(logits, whole, reduction="none") + 0.3 * F.cross_entropy(
            logits, whole.roll(1), reduction="none"
        )
        self.assertAlmostEqual(
            cross_entropy(logits, whole, mixing).item(), want.mean().item(), places=5
        )

    def test_gradients_do_not_depend_on_the_number_of_processes(self):
        for world in 1, 2, 4:
            if world == 1:
                gradients_of_rank(0, 1, 16, str(TMP))
            else:
                torch.multiprocessing.spawn(gradients_of_rank, (world, 16, str(TMP)), nprocs=world)
        single = torch.load(TMP / "gradients-1.pt", weights_only=True)
        for world in 2, 4:
            for name, gradient in torch.load(
                TMP / f"gradients-{world}.pt", weights_only=True
            ).items():
                torch.testing.assert_close(
                    gradient,
                    single[name],
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m: f"{world} processes, {name}: {m}",
                )
                self.assertGreater(single[name].abs().max(), 1e-3)


class Training(Base):
    def test_augmentation_gives_the_pixels_of_torchvision(self):
        import train

        image, flipped = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8), 0
        for seed in range(20):
            for interpolation in (
                torchvision.transforms.InterpolationMode.BILINEAR,
                torchvision.transforms.InterpolationMode.BICUBIC,
            ):
                torch.manual_seed(seed)
                ours = train.FlippedCrop(32, interpolation=interpolation)(image)
                torch.manual_seed(seed)
                want = torchvision.transforms.v2.RandomResizedCrop(
                    32, interpolation=interpolation, antialias=True
                )(image)
                flip = bool(torch.rand(()) < 0.5)
                flipped += flip
                self.assertTrue(torch.equal(ours, want.flip(2) if flip else want))
        self.assertIn(flipped, range(10, 31))

    def test_recipes(self):
        for recipe in "resnet", "deit", "finetune":
            with self.subTest(recipe):
                call(
                    "train",
                    *train_options(
                        f"recipe-{recipe}",
                        "--recipe",
                        recipe,
                        "--no-pretrained",
                        "--drop-path",
                        0,
                        "--warmup-epochs",
                        1,
                    ),
                )
                for entry in read_lines(TMP / f"recipe-{recipe}" / "log.jsonl")[1:]:
                    self.assertEqual(
                        (entry["unreadable"], math.isfinite(entry["loss_align"])), (0, True)
                    )

    def test_resume_gives_the_uninterrupted_weights(self):
        more = [
            "--epochs",
            4,
            "--mixup",
            0.5,
            "--ema-decay",
            0.9,
            "--warmup-epochs",
            1,
            "--randaugment",
            9,
            "-j",
            1,
        ]
        log = TMP / "resumed" / "log.jsonl"
        kill_when(lambda: lines_in(log) >= 3, "train", *train_options("resumed", *more))
        self.refused("--resume", "train", *train_options("resumed", *more))
        shell("train", *train_options("resumed", *more, "--resume"))
        shell("train", *train_options("straight", *more, "--resume"))  # nothing to resume: starts
        self.same_weights("resumed", "straight")
        self.assertEqual([entry.get("epoch") for entry in read_lines(log)], [None, 1, 2, 3, 4])
        self.assertEqual(
            [entry.get("loss_ce") for entry in read_lines(log)],
            [entry.get("loss_ce") for entry in read_lines(TMP / "straight" / "log.jsonl")],
        )
        self.refused(
            "settings differ.*lr",
            "train",
            *train_options("resumed", *more, "--resume", "--lr", 0.02),
        )
        shutil.copytree(WORLD, TMP / "fewer")
        next((TMP / "fewer" / "train").rglob("*.png")).unlink()
        self.refused(
            "settings differ.*images 24 .* -> 23 ",
            "train",
            *train_options("resumed", *more, "--resume", "--data", TMP / "fewer"),
        )
        call("train", *train_options("elsewhere", *more, "--resume", TMP / "resumed" / "last.pt"))

    def test_full_disk(self):
        self.fills_the_disk(
            1_000_000,
            "full/best.pt: cannot be written, is the disk full.*what was saved stays: start again with --resume",
            "train",
            *train_options("full", "--epochs", 1),
        )
        self.assertFalse((TMP / "full" / "last.pt").exists())
        call("train", *train_options("full", "--epochs", 1, "--resume"))

    def test_two_processes_give_the_weights_of_one(self):
        """squeezenet has no batch norm; its dropout is the one thing that differs: switched off."""
        more = ["--epochs", 2, "--seed", 3]
        code = f"import torch, runpy, sys; torch.nn.functional.dropout = lambda x, *a, **k: x; sys.argv[0] = {str(HERE / 'train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
        (TMP / "no_dropout.py").write_text(code)
        for processes, batch in (1, 8), (2, 4):
            line = command(
                "train",
                *train_options(f"world{processes}", *more, "-b", batch),
                processes=processes,
            )
            line[line.index(str(HERE / "train.py"))] = str(TMP / "no_dropout.py")
            subprocess.run(
                line, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.same_weights("world1", "world2", rtol=1e-3, atol=1e-5)
        self.assertFalse(
            torch.equal(
                weights_of("world1")["classifier.1.weight"],
                torchvision.models.squeezenet1_1(num_classes=4).state_dict()["classifier.1.weight"],
            )
        )

    def test_autocast(self):
        for amp in "bfloat16", "float16":
            call("train", *train_options(amp, "--amp", amp, "--epochs", 1))
            self.assertTrue(
                all(
                    value.dtype == torch.float32 and value.isfinite().all()
                    for value in weights_of(amp).values()
                )
            )
        self.assertIn("scale", torch.load(TMP / "float16" / "last.pt", weights_only=True)["scaler"])

    def test_architectures(self):
        for arch, size in (
            ("mobilenet_v3_small", 32),
            ("googlenet", 64),
            ("vit_b_16", 32),
            ("shufflenet_v2_x0_5", 32),
        ):
            with self.subTest(arch):
                call(
                    "train",
                    *train_options(
                        f"arch-{arch}",
                        "--arch",
                        arch,
                        "--input-size",
                        size,
                        "--epochs",
                        1,
                        "--ema-decay",
                        0.5,
                    ),
                )
                state = torch.load(TMP / f"arch-{arch}" / "last.pt", weights_only=True)
                counters = [
                    name for name, value in state["model"].items() if not value.is_floating_point()
                ]
                self.assertEqual(
                    [state["ema"][name] for name in counters],
                    [state["model"][name] for name in counters],
                    "integers are not averaged",
                )
                torchvision.models.get_model(
                    arch, num_classes=4, **state["rebuild"]["kwargs"]
                ).load_state_dict(state["model"], strict=True)
                self.assertIn(
                    "| 20 |",
                    call(
                        "evaluate",
                        "--data",
                        WORLD / "val",
                        TMP / f"arch-{arch}" / "last.pt",
                        "-j",
                        0,
                        "--device",
                        "cpu",
                    ),
                )

    def test_transformers_architectures(self):
        hiera = tf.HieraForImageClassification(
            tf.HieraConfig(
                embed_dim=16, image_size=[64, 64], depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]
            )
        )
        convnext = tf.ConvNextV2ForImageClassification(
            tf.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
        )
        swin = tf.Swinv2ForImageClassification(
            tf.Swinv2Config(
                image_size=64, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4
            )
        )
        for name, model in ("hiera", hiera), ("convnext", convnext), ("swin", swin):
            with self.subTest(name):
                model.save_pretrained(TMP / name)
                call(
                    "train",
                    *train_options(
                        f"arch-{name}", "--arch", TMP / name, "--input-size", 64, "--epochs", 1
                    ),
                )
                self.assertIn(
                    "| 20 |",
                    call(
                        "evaluate",
                        "--data",
                        WORLD / "val",
                        TMP / f"arch-{name}" / "last.pt",
                        "-j",
                        0,
                        "--device",
                        "cpu",
                    ),
                )

    def test_stale_embeddings_are_refused(self):
        lines = read_lines(CAPTIONS)
        for name, changed in (
            ("edited", [lines[0] | {"caption": "other"}, *lines[1:]]),
            ("reordered", lines[::-1]),
            ("extended", [*lines, lines[0]]),
        ):
            file = TMP / f"{name}.jsonl"
            write_lines(file, changed)
            self.refused("run embed.py again", "train", *train_options("x", "--captions", file))

    def test_missing_captions_and_bad_images(self):
        world = TMP / "holes"
        shutil.copytree(WORLD, world)
        broken = sorted((world / "train").rglob("*.png"))[3]
        broken.write_bytes(b"nothing")
        write_lines(
            TMP / "few.jsonl",
            [
                *read_lines(CAPTIONS)[5:],
                read_lines(CAPTIONS)[7] | {"caption": "a second one"},
                {"image": "gone/1.png", "caption": "of no image"},
            ],
        )
        call("embed", "--captions", TMP / "few.jsonl", "--out", TMP / "few.npy", "--model", ENCODER)
        printed = call(
            "train",
            *train_options(
                "few",
                "--data",
                world,
                "--captions",
                TMP / "few.jsonl",
                "--embeddings",
                TMP / "few.npy",
            ),
        )
        self.assertIn("24 training images (19 with captions", printed)
        self.assertIn("1 captions belong to no image", printed)
        self.assertIn(
            f"1 unreadable images left out: '{broken.relative_to(world / 'train')}'", printed
        )

    def test_shuffled_captions(self):
        import train

        keys = [line["image"] for line in read_lines(CAPTIONS)]
        straight, one, same, two = (
            train.Captions(CAPTIONS, str(EMBEDDINGS), keys, seed).rows.tolist()
            for seed in (None, 1, 1, 2)
        )
        self.assertEqual(straight, list(range(24)))
        self.assertEqual((one, sorted(one)), (same, straight))
        self.assertTrue(one != straight and one != two)

    def test_unlabelled_images(self):
        world = TMP / "unlabelled"
        shutil.copytree(WORLD, world)
        (world / "train/red_circle").rename(world / "train/_unlabeled")
        (world / "val/red_circle").rename(TMP / "aside")
        lines = [
            line | {"image": line["image"].replace("red_circle/", "_unlabeled/")}
            for line in read_lines(CAPTIONS)
        ]
        write_lines(TMP / "unlabelled.jsonl", lines)
        call(
            "embed",
            "--captions",
            TMP / "unlabelled.jsonl",
            "--out",
            TMP / "unlabelled.npy",
            "--model",
            ENCODER,
        )
        printed = call(
            "train",
            *train_options(
                "u",
                "--data",
                world,
                "--captions",
                TMP / "unlabelled.jsonl",
                "--embeddings",
                TMP / "unlabelled.npy",
            ),
        )
        self.assertIn(
            "3 classes, 24 training images (24 with captions, 6 without a label)", printed
        )
        self.refused(
            "only alignment can use", "train", *train_options("u2", "--data", world, text=False)
        )

    def test_refusals(self):
        self.refused(
            "--align-weight does nothing without",
            "train",
            *train_options("x", "--align-weight", 1, text=False),
        )
        self.refused(
            "no such classifier; did you mean resnet50",
            "train",
            *train_options("x", "--arch", "resnet5O"),
        )
        self.refused(
            "does not take images",
            "train",
            *train_options("x", "--arch", "inception_v3", "--input-size", 32),
        )
        self.refused("has no stochastic depth", "train", *train_options("x", "--drop-path", 0.1))
        self.refused("do not fill one batch", "train", *train_options("x", "-b", 100))
        self.refused("--data", "train", *train_options("x", "--data", TMP / "nowhere"))
        self.refused(
            "run embed.py", "train", *train_options("x", "--embeddings", TMP / "nowhere.npy")
        )
        self.refused(
            "no valid file for the classes empty",
            "train",
            *train_options("x", "--data", self.world_with_an_empty_class()),
        )
        np.save(TMP / "flat.npy", np.zeros(7, np.float32))
        shutil.copy(TMP / "embeddings.json", TMP / "flat.json")
        self.refused(
            "expected float16 or float32 \\[24, width\\]",
            "train",
            *train_options("x", "--embeddings", TMP / "flat.npy"),
        )
        self.refused(
            "not finite at step 1 of epoch 1",
            "train",
            *train_options("x", "--lr", 1e30, "--epochs", 2),
        )

    def world_with_an_empty_class(self) -> Path:
        shutil.copytree(WORLD, TMP / "void")
        (TMP / "void/train/empty").mkdir()
        return TMP / "void"


class Evaluation(Base):
    def setUp(self):
        if not (TMP / "judged" / "last.pt").exists():
            call("train", *train_options("judged", "--ema-decay", 0.5))

    def evaluate(self, *options) -> str:
        return call("evaluate", "-j", 0, "--device", "cpu", *options)

    def test_subset_by_name_and_unknown_class(self):
        shutil.copytree(WORLD / "val/purple_star", TMP / "subset/purple_star", dirs_exist_ok=True)
        shutil.copytree(WORLD / "val/red_circle", TMP / "subset/red_circle", dirs_exist_ok=True)
        printed = self.evaluate(
            "--data", TMP / "subset", TMP / "judged/last.pt", "--out", TMP / "subset.jsonl"
        )
        state = torch.load(TMP / "judged/last.pt", weights_only=True)
        model = torchvision.models.squeezenet1_1(num_classes=4).eval()
        model.load_state_dict(state["model"])
        preset = torchvision.transforms._presets.ImageClassification(
            crop_size=32, resize_size=round(32 / 0.875)
        )
        folder = torchvision.datasets.ImageFolder(TMP / "subset", preset)
        with torch.inference_mode():
            logits = torch.cat([model(image[None]) for image, _ in folder])
        two = torch.tensor([state["classes"].index(name) for name in folder.classes])
        labels, result = two[torch.tensor(folder.targets)], read_lines(TMP / "subset.jsonl")[0]
        self.assertAlmostEqual(
            result["top1"], 100 * (logits.argmax(1) == labels).float().mean().item(), places=4
        )
        self.assertAlmostEqual(
            result["top1_among_these"],
            100 * (two[logits[:, two].argmax(1)] == labels).float().mean().item(),
            places=4,
        )
        self.assertIn("top-1 % among these 2 classes", printed)
        shutil.copytree(WORLD / "val/purple_star", TMP / "strange/pink_star", dirs_exist_ok=True)
        self.refused(
            "does not know, the first is 'pink_star'",
            "evaluate",
            "-j",
            0,
            "--data",
            TMP / "strange",
            TMP / "judged/last.pt",
        )

    def test_averaged_weights(self):
        state = torch.load(TMP / "judged/last.pt", weights_only=True)
        self.assertFalse(
            torch.equal(state["ema"]["classifier.1.weight"], state["model"]["classifier.1.weight"])
        )
        self.assertIn(
            "| 20 |", self.evaluate("--data", WORLD / "val", TMP / "judged/last.pt", "--ema")
        )

    def test_interval_and_groups(self):
        import evaluate

        a, b = (
            np.array([1, 1, 0, 0, 1, 0, 0, 1], bool),
            np.array([1, 1, 1, 0, 0, 1, 1, 1], bool),
        )  # differences 0 0 1 0 -1 1 1 0: mean 2/8
        mean, half = evaluate.paired_difference(a, b)
        self.assertAlmostEqual(mean, 25.0)
        self.assertAlmostEqual(
            half, 100 * 1.96 * math.sqrt((4 - 8 * 0.25**2) / 7) / math.sqrt(8), places=6
        )
        for seed in 1, 2:
            call("train", *train_options(f"judged-{seed}", "--ema-decay", 0.5, "--seed", seed))
        runs = [TMP / name / "last.pt" for name in ("judged", "judged-1", "judged-2")]
        printed = self.evaluate(
            "--data",
            WORLD / "val",
            *runs,
            "--out",
            TMP / "results.jsonl",
            "--predictions",
            TMP / "predictions.jsonl",
        )
        top1 = [result["top1"] for result in read_lines(TMP / "results.jsonl")]
        self.assertIn(
            f"| 3 | {runs[0]} | {np.mean(top1):.2f} +- {np.std(top1, ddof=1):.2f} |", printed
        )
        lines = [
            line
            for line in read_lines(TMP / "predictions.jsonl")
            if line["checkpoint"] == str(runs[1])
        ]
        self.assertAlmostEqual(
            100 * np.mean([line["label"] == line["prediction"] for line in lines]), top1[1]
        )
        self.assertEqual(
            {(line["image"], line["label"]) for line in lines},
            {
                (f"{path.parent.name}/{path.name}", path.parent.name)
                for path in (WORLD / "val").rglob("*.png")
            },
        )

    def test_groups_of_seeds(self):
        import evaluate

        rows = [
            dict(
                checkpoint=f"{name}-{seed}",
                data="val",
                arch="a",
                epoch=1,
                selected="last epoch",
                images=9,
                top1=top1,
                top5=0,
                difference=0,
                interval=0,
                classes=4,
                of_classes=4,
                top1_among_these=0,
                text={},
                parameters=1,
                images_per_s=1,
                settings={"name": name, "seed": seed},
            )
            for name, found in (
                ("plain", {1: 10.0, 2: 14.0}),
                ("aligned", {1: 16.0, 2: 18.0, 3: 50.0}),
            )
            for seed, top1 in found.items()
        ]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluate.report([*rows, rows[0]], ["val"])  # a run that is named twice counts once
        self.assertIn("| 2 | plain-1 | 12.00 +- 2.83 |  |", printed.getvalue())
        self.assertIn("| 3 | aligned-1 | 28.00 +- 19.08 | +5.00 +- 1.41 |", printed.getvalue())

    def test_retrieval_and_zero_shot(self):
        import evaluate

        rng = np.random.default_rng(0)
        features, texts, owner = (
            rng.normal(size=(30, 8)).astype(np.float32),
            rng.normal(size=(50, 8)).astype(np.float32),
            rng.permutation(np.arange(50) % 25),
        )
        found, scores = evaluate.retrieval(features, texts, owner), features @ texts.T
        for k in 1, 5, 10:
            image_hits = [
                bool(set(np.argsort(-scores[i])[:k]) & set(np.flatnonzero(owner == i)))
                for i in range(25)
            ]
            text_hits = [owner[t] in np.argsort(-scores[:25, t])[:k] for t in range(50)]
            self.assertAlmostEqual(found[f"image->text R@{k}"], 100 * np.mean(image_hits), places=4)
            self.assertAlmostEqual(found[f"text->image R@{k}"], 100 * np.mean(text_hits), places=4)
        options = [
            "--data",
            WORLD / "val",
            "--model",
            "template",
            "--out",
            TMP / "val.jsonl",
            "--prompt",
            "a {class}",
        ]
        call("caption", *options)
        call("embed", "--captions", TMP / "val.jsonl", "--out", TMP / "val.npy", "--model", ENCODER)
        text = [
            "--captions",
            TMP / "val.jsonl",
            "--embeddings",
            TMP / "val.npy",
            "--class-captions",
            TMP / "val.jsonl",
            "--class-embeddings",
            TMP / "val.npy",
        ]
        printed = self.evaluate("--data", WORLD / "val", TMP / "judged/last.pt", *text)
        self.assertRegex(printed, r"image->text R@1 .* text->image R@10 . zero-shot top-1")
        call("train", *train_options("plain", "--epochs", 1, text=False))
        self.refused(
            "no projection head",
            "evaluate",
            "-j",
            0,
            "--data",
            WORLD / "val",
            TMP / "plain/last.pt",
            *text,
        )
        write_lines(
            TMP / "some.jsonl",
            [line for line in read_lines(TMP / "val.jsonl") if "red" not in line["caption"]],
        )
        save_text_encoder(TMP / "another", seed=7)
        for name, encoder in ("some", ENCODER), ("val", TMP / "another"):
            call(
                "embed",
                "--captions",
                TMP / f"{name}.jsonl",
                "--out",
                TMP / f"{name}2.npy",
                "--model",
                encoder,
            )
        options = [
            "evaluate",
            "-j",
            0,
            "--device",
            "cpu",
            "--data",
            WORLD / "val",
            TMP / "judged/last.pt",
        ]
        self.refused(
            "2 class.* have none, the first is 'red_circle'",
            *options,
            "--class-captions",
            TMP / "some.jsonl",
            "--class-embeddings",
            TMP / "some2.npy",
        )
        self.refused(
            "val2.npy has weights_sha256",
            *options,
            "--captions",
            TMP / "val.jsonl",
            "--embeddings",
            TMP / "val2.npy",
        )

    def test_several_folders_numeric_names_and_published_weights(self):
        classes = sorted(CLASSES[:2] + CLASSES[-2:])
        for i, name in enumerate(classes):
            shutil.copytree(WORLD / "val" / name, TMP / "numeric" / str(i), dirs_exist_ok=True)
        printed = self.evaluate(
            "--data", WORLD / "val", "--data", f"v2={TMP / 'numeric'}", TMP / "judged/last.pt"
        )
        rows = [line.split("|")[5:8] for line in printed.splitlines() if "last.pt" in line]
        self.assertEqual(rows[0], rows[1])
        self.assertIn("**v2**", printed)
        self.refused(
            "two folders of this name",
            "evaluate",
            "--data",
            f"v={WORLD / 'val'}",
            "--data",
            f"v={TMP / 'numeric'}",
            TMP / "judged/last.pt",
        )
        model = torchvision.models.squeezenet1_1()
        with unittest.mock.patch(
            "torchvision.models.get_model", lambda *args, **kwargs: model
        ):  # the published weights are not to be had offline
            printed = self.evaluate("--data", TMP / "numeric", "squeezenet1_1")
            self.assertIn("SqueezeNet1_1_Weights.IMAGENET1K_V1 | 20 |", printed)
            for i in range(
                1000
            ):  # ImageNet's folders, of which all but one are empty here, name those of a subset beside it
                (TMP / "synsets" / f"n{i:08d}").mkdir(parents=True, exist_ok=True)
            for root, i in ("synsets", 0), ("some-synsets", 998), ("some-synsets", 3):
                shutil.copytree(
                    WORLD / "val/red_circle", TMP / root / f"n{i:08d}", dirs_exist_ok=True
                )
            self.evaluate(
                "--data",
                TMP / "synsets",
                "--data",
                f"r={TMP / 'some-synsets'}",
                "squeezenet1_1",
                "--predictions",
                TMP / "synsets.jsonl",
            )
            lines = [line for line in read_lines(TMP / "synsets.jsonl") if line["data"] == "r"]
            self.assertEqual(
                [line["label"] for line in lines], ["n00000003"] * 5 + ["n00000998"] * 5
            )
            with torch.inference_mode():
                logits = model.eval()(
                    torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()(
                        Image.open(TMP / "some-synsets" / lines[0]["image"])
                    )[None]
                )
            self.assertEqual(lines[0]["prediction"], f"n{logits.argmax().item():08d}")
            self.refused(
                "has 2 class.* published weights know class folders by number",
                "evaluate",
                "-j",
                0,
                "--device",
                "cpu",
                "--data",
                TMP / "some-synsets",
                "squeezenet1_1",
            )
            self.refused(
                "has 4 class.* published weights know class folders by number",
                "evaluate",
                "-j",
                0,
                "--device",
                "cpu",
                "--data",
                WORLD / "val",
                "squeezenet1_1",
            )

    def test_one_bad_image(self):
        shutil.copytree(WORLD / "val", TMP / "damaged")
        broken = next((TMP / "damaged").rglob("*.png"))
        broken.write_bytes(b"nothing")
        printed = self.evaluate(
            "--data",
            TMP / "damaged",
            TMP / "judged/last.pt",
            "--predictions",
            TMP / "damaged.jsonl",
        )
        self.assertIn(f"1 unreadable images, not counted: '{broken}'", printed)
        self.assertIn("| 19 |", printed)
        self.assertEqual(lines_in(TMP / "damaged.jsonl"), 19)

    def test_refusals(self):
        torch.save({"model": Base}, TMP / "code.pt")
        torch.save({"model": weights_of("judged")}, TMP / "foreign.pt")
        for name in (
            "code",
            "foreign",
        ):  # all checkpoints are looked at before the first is evaluated
            self.refused(
                "not a checkpoint",
                "evaluate",
                "-j",
                0,
                "--data",
                WORLD / "val",
                TMP / "judged/last.pt",
                TMP / f"{name}.pt",
                "--out",
                TMP / "early.jsonl",
            )
        self.assertFalse((TMP / "early.jsonl").exists())
        self.refused(
            "no such checkpoint.*did you mean resnet50",
            "evaluate",
            "-j",
            0,
            "--data",
            WORLD / "val",
            "resnet5O",
        )
        self.refused(
            "--data", "evaluate", "-j", 0, "--data", TMP / "nowhere", TMP / "judged/last.pt"
        )
        self.refused("--ema does nothing", "evaluate", "--data", WORLD / "val", "resnet18", "--ema")


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main() -> None:
    result = unittest.main(
        exit=False, testRunner=unittest.TextTestRunner(verbosity=2, resultclass=Result)
    ).result
    failed = len({str(test).split(" (")[0] for test, _ in result.failures + result.errors})
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        run_demo(Path(sys.argv[2] if len(sys.argv) > 2 else "demo"))
    elif sys.argv[1:2] == ["worlds"]:
        prepare(
            Path(sys.argv[2] if len(sys.argv) > 2 else "toy"),
            clean=(20, 0.0, 0),
            noisy=(40, 0.6, 0),
            few=(10, 0.0, 50),
        )
    else:
        main()
