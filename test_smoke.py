"""The tests, and the method in miniature: no network, no GPU, nothing but requirements.txt.

    python test_smoke.py               # the tests (also: pytest test_smoke.py)
    python test_smoke.py demo [DIR]    # the main job on an embedded toy: pre-trains a little MLLM,
                                       # captions, embeds, trains, evaluates, draws what came out
    python test_smoke.py gpu IMAGES    # how fast a GPU is, and what it waits for, on photographs in
                                       # IMAGES/<class>/, a class of ImageNet for instance

Four parts follow: the toy (its world, its MLLM, its text encoder), the demo, the table of a GPU's
speed, the tests (those of class OnGPU are skipped where there is no GPU).
"""

import base64
import contextlib
import csv
import email.utils
import errno
import functools
import gc
import http.server
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import urllib.error
from pathlib import Path
from unittest.mock import Mock, patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
import transformers as tf
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

import embed
import evaluate
import train
from caption import BLACK, Describer, Parts, Server, ask_model, data_url, load_image, load_model

tf.utils.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent

# ---- The toy -------------------------------------------------------------------------------------

# Its world: 64x64 images of a shape on a background. The class is colour and shape
# ("red_circle"); the caption also tells size, place and background. A stated share of the labels is
# wrong on purpose; the MLLM looks at the picture, not at the label.

SHAPES = ["circle", "square", "triangle", "cross", "star"]
COLORS = {"red": (200, 60, 50), "green": (70, 170, 70), "blue": (60, 90, 200)}
COLORS |= {"yellow": (220, 200, 70), "purple": (150, 70, 170)}
BACKGROUNDS = {"black": (30, 30, 30), "gray": (128, 128, 128)}
BACKGROUNDS |= {"brown": (120, 85, 60), "white": (225, 225, 225)}
SIZES = {"small": (10, 12), "large": (17, 20)}
PLACES = {"top": 22, "bottom": 42}
PROMPT = "describe the image"
CLASSES = [f"{color}_{shape}" for color in COLORS for shape in SHAPES]


def caption_of(color: str, shape: str, size: str, place: str, background: str) -> str:
    return f"a {size} {color} {shape} at the {place} on a {background} background"


def draw_look(rng: random.Random) -> tuple[str, str, str]:
    """Size, place, background."""
    return rng.choice(list(SIZES)), rng.choice(list(PLACES)), rng.choice(list(BACKGROUNDS))


def draw(rng: random.Random, name: str) -> tuple[Image.Image, str]:
    """A new 64x64 image of the class, and its true caption."""
    color, shape = name.split("_")
    size, place, background = draw_look(rng)

    def around(rgb: tuple, spread: int) -> tuple:
        return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in rgb)

    image = Image.new("RGB", (64, 64), around(BACKGROUNDS[background], 15))
    pen, ink, r = ImageDraw.Draw(image), around(COLORS[color], 25), rng.uniform(*SIZES[size])
    x, y = 32 + rng.uniform(-4, 4), PLACES[place] + rng.uniform(-2, 2)
    turn = math.pi / 4 + rng.uniform(-0.15, 0.15)
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = r * math.cos(angle), r * math.sin(angle)
            pen.line([x - dx, y - dy, x + dx, y + dy], fill=ink, width=int(r * 0.55))
    else:
        radii = {"square": [1] * 4, "triangle": [1.1] * 3, "star": [1.1, 0.45] * 5}[shape]
        corners = []
        for i, k in enumerate(radii):
            angle = turn + 2 * math.pi * i / len(radii)
            corners.append((x + r * k * math.cos(angle), y + r * k * math.sin(angle)))
        pen.polygon(corners, fill=ink)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 8, (64, 64, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image, caption_of(color, shape, size, place, background)


def draw_world(root: Path, per_class: int, val_per_class: int, wrong: float, classes=CLASSES):
    """root/{train,val}/<class>/*.png, a share of train/ mislabelled; {key: true caption} of it."""
    rng, captions = random.Random(0), {"train": {}, "val": {}}
    for split, count, share in ("train", per_class, wrong), ("val", val_per_class, 0):
        jobs = [name for name in classes for _ in range(count)]
        mislabelled = set(rng.sample(range(len(jobs)), round(share * len(jobs))))
        for i, name in enumerate(jobs):
            image, caption = draw(rng, name)
            others = [other for other in classes if other != name]
            key = f"{rng.choice(others) if i in mislabelled else name}/{i:05d}.png"
            (root / split / key).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / split / key)
            captions[split][key] = caption
    return captions["train"]


IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
CHAT = (
    "{% for m in messages %}{{ bos_token }} USER {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %} <image> {% else %} {{ c['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT {% endif %}"
)


def word_tokenizer(*words: str, frame: str = "$A", **special) -> tf.PreTrainedTokenizerFast:
    """A word, a token, of the world's and of these words; `frame` puts [BOS] and [EOS] around a
    text; `special`: image_token="<image>" and the like."""
    torch.manual_seed(0)
    most = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "<image>", "USER", "ASSISTANT", *PROMPT.split()]
    most += ["a", "at", "the", "on", "background", *SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *PLACES]
    vocabulary = dict.fromkeys([*most, *words, *special.values()])
    vocabulary = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[BOS]", 2), ("[EOS]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ends)
    options = NAMES | {"extra_special_tokens": special}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def tokens(frame: str = "$A", **special) -> tf.PreTrainedTokenizerFast:
    return word_tokenizer("thing", "cat", frame=frame, **special)


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
SQUARE = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def text(tokenizer, **more) -> dict:
    """The configuration of a tiny language model."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 512}
    return shape | IDS | {"vocab_size": len(tokenizer)} | more


def save(folder: Path, *parts) -> None:
    for part in parts:
        part.save_pretrained(folder)


def build_mllm(init: float = 0.02) -> tuple:
    """A random Llava (CLIP's tower at 32 px, 4x4 patches, and a Llama), and its processor."""
    tokenizer = word_tokenizer(image_token="<image>")
    images = tf.CLIPImageProcessor(**SQUARE, crop_size=SQUARE["size"])
    options = {"patch_size": 8, "num_additional_image_tokens": 1, "chat_template": CHAT}
    options["vision_feature_select_strategy"] = "default"
    processor = tf.LlavaProcessor(images, tokenizer, **options)
    shape = {"hidden_size": 96, "intermediate_size": 288, "initializer_range": init}
    towers = {"vision_config": tf.CLIPVisionConfig(**VISION | shape)}
    towers["text_config"] = tf.LlamaConfig(**text(tokenizer, **shape))
    options = {"image_token_index": tokenizer.image_token_id, "vision_feature_layer": -1}
    config = tf.LlavaConfig(**towers, **options, initializer_range=init)
    model = tf.LlavaForConditionalGeneration(config)
    model.generation_config.update(**IDS)
    return model, processor


def pretrain_mllm(model, processor, steps: int, batch: int = 64, lr: float = 3e-3) -> None:
    """Teach it the world on pairs drawn anew; print the share of exact captions on others."""
    rng, tokenizer, held_out = random.Random("pre-training"), processor.tokenizer, 1000
    image = {"type": "image", "image": Image.new("RGB", (64, 64))}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": PROMPT}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template([chat], add_generation_prompt=True, **options)
    pairs = [draw(rng, rng.choice(CLASSES)) for _ in range(12000)]
    images = [image for image, _ in pairs]
    parts = [images[i : i + 500] for i in range(0, len(images), 500)]
    parts = [processor.image_processor(part, return_tensors="pt") for part in parts]
    pixels = torch.cat([part["pixel_values"] for part in parts])
    captions = [f"{caption} [EOS]" for _, caption in pairs]
    words = tokenizer(captions, return_tensors="pt")["input_ids"]

    def logits_of(pick: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prompt["input_ids"].expand(len(pick), -1), words[pick]], 1)
        output = model(ids, pixel_values=pixels[pick], logits_to_keep=words.shape[1] + 1)
        return output.logits[:, :-1]

    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        pick = torch.randint(held_out, len(pairs), (batch,), generator=generator)
        loss = F.cross_entropy(logits_of(pick).flatten(0, 1), words[pick].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"\rtoy MLLM: step {step}/{steps}, loss {loss.item():.3f}", end="", flush=True)
    with torch.inference_mode():
        parts = torch.arange(held_out).split(100)
        exact = torch.cat([(logits_of(pick).argmax(-1) == words[pick]).all(1) for pick in parts])
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    share = f"{exact.float().mean():.1%} of captions of new images exact"
    print(f"\ntoy MLLM, {size:.2f} M parameters: {share}")


def save_mllm(folder: Path, steps: int = 0, init: float = 0.02) -> None:
    model, processor = build_mllm(init)
    if steps:
        pretrain_mllm(model, processor, steps)
    else:  # random weights say something
        mute = set(processor.tokenizer.all_special_ids) - {IDS["eos_token_id"]}
        model.generation_config.update(min_new_tokens=1, suppress_tokens=sorted(mute))
    save(folder, processor, model.eval())


def save_text_encoder(folder: Path, steps: int = 0, seed: int = 0) -> None:
    """A tiny BERT. Random, its vectors all but coincide (most words are the same in all captions);
    `steps` of SimCSE (two dropout passes over a caption are a positive pair, the other captions
    negatives) spread them. It sees random captions, no image and no label."""
    tokenizer, rng = word_tokenizer("photo", "of"), random.Random(seed)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    shape["max_position_embeddings"] = 64
    model = tf.BertModel(tf.BertConfig(**text(tokenizer, **shape)), add_pooling_layer=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        looks = [(*rng.choice(CLASSES).split("_"), *draw_look(rng)) for _ in range(64)]
        captions = {caption_of(*look) for look in looks}
        ids = tokenizer(sorted(captions), return_tensors="pt")["input_ids"]
        a, b = (F.normalize(model(ids).last_hidden_state.mean(1), dim=1) for _ in range(2))
        F.cross_entropy(a @ b.T / 0.05, torch.arange(len(ids))).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(folder, model.eval(), tokenizer)


# ---- The demo ------------------------------------------------------------------------------------


def run_demo(root: Path) -> None:
    began, at = time.time(), shlex.quote(str(root))

    def start(line: str, **options) -> subprocess.Popen:
        print(f"\n$ python {line.replace(' ', '.py ', 1)}", flush=True)
        return subprocess.Popen(command(line), **options)

    def run(line: str) -> None:
        if code := start(line).wait():
            raise SystemExit(code)

    draw_world(root / "data", 40, 40, wrong=0.6)
    if not (root / "mllm" / "model.safetensors").exists():
        save_mllm(root / "mllm", steps=1200)
    if not (root / "encoder" / "model.safetensors").exists():
        save_text_encoder(root / "encoder", steps=300)
    describe = f"caption --data {at}/data/train --model {at}/mllm --prompt '{PROMPT}'"
    run(f"{describe} --max-new-tokens 16 --batch-size 64 --out {at}/captions.jsonl")
    run(f"embed --captions {at}/captions.jsonl --out {at}/embeddings.npy --model {at}/encoder")
    train = f"train --data {at}/data --arch shufflenet_v2_x0_5 --input-size 64 --epochs 30 -b 50"
    train += " --lr 0.1 --val-every 3 --seed 1 -j 0 --resume"
    aligned = f"--captions {at}/captions.jsonl --embeddings {at}/embeddings.npy --align-weight 2"
    aligned += " --temperature 0.1"
    lines = {"baseline": "", "aligned": aligned, "shuffled": f"{aligned} --shuffle-captions"}
    print("\nThree trainings, side by side; their progress:", root / "*.txt")
    runs, together = [], os.environ | {"OMP_NUM_THREADS": "1"}
    for name, options in lines.items():
        with open(root / f"{name}.txt", "w") as log:
            line = f"{train} --out {at}/runs/{name} {options}"
            runs.append(start(line, stdout=log, stderr=log, env=together))
    for name, process in zip(lines, runs, strict=True):
        if process.wait():
            raise SystemExit((root / f"{name}.txt").read_text())
    checkpoints = " ".join(f"{at}/runs/{name}/last.pt" for name in lines)
    run(f"evaluate --data {at}/data/val {checkpoints}")
    draw_demo(root, list(lines)).save(root / "demo.png")
    print(f"\n{time.time() - began:.0f} s; captions and curves are drawn in {root}/demo.png")


def draw_demo(root: Path, names: list[str]) -> Image.Image:
    """Left eight images, what was said of them and their folders; right the runs' curves."""
    sheet = Image.new("RGB", (1400, 720), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    lines = read_lines(root / "captions.jsonl")
    for row, line in enumerate(random.Random(0).sample(lines, 8)):
        image = Image.open(root / "data/train" / line["image"]).resize((80, 80))
        sheet.paste(image, (10, 90 * row + 5))
        label = line["image"].split("/")[0].replace("_", " ")
        words = f"{line['caption']}\n(in the folder of a {label})"
        pen.multiline_text((105, 90 * row + 20), words, "black", font, spacing=8)
    pen.text((760, 20), "top-1 on validation images, %, over the epochs", "black", font)
    for percent in range(0, 31, 10):
        y = 660 - 20 * percent
        pen.line([(760, y), (1240, y)], "lightgray", 2)
        pen.text((720, y - 10), f"{percent}", "black", font)
    for name, colour in zip(names, ("darkorange", "royalblue", "gray"), strict=True):
        points = [e for e in read_lines(root / f"runs/{name}/log.jsonl") if "val_top1" in e]
        curve = [(760 + 16 * e["epoch"], 660 - 20 * e["val_top1"]) for e in points]
        pen.line(curve, colour, 4)
        pen.text((curve[-1][0] + 10, curve[-1][1] - 10), name, colour, font)
    return sheet


# ---- What a GPU does: a table for README ---------------------------------------------------------

VISION_OF_SMOLVLM = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
VISION_OF_SMOLVLM |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
TEXT_OF_SMOLVLM = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
TEXT_OF_SMOLVLM |= {"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280}
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
MINILM |= {"num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512}


def build_smolvlm(vision: dict, words: dict) -> tuple:
    """Random weights in the shape of a SmolVLM: captions without meaning, of full length."""
    tokenizer, size = tokens(image_token="<image>"), vision["image_size"]
    tiles = {"size": {"longest_edge": 4 * size}, "max_image_size": {"longest_edge": size}}
    tiles = tf.Idefics3ImageProcessor(**tiles)
    length = (size // vision["patch_size"] // 4) ** 2
    processor = tf.Idefics3Processor(tiles, tokenizer, image_seq_len=length, chat_template=CHAT)
    words = words | {"vocab_size": max(words["vocab_size"], len(tokenizer))}  # it has added some
    words = tf.LlamaConfig(**IDS | words | {"max_position_embeddings": 8192})
    config = {"vision_config": vision, "text_config": words, "scale_factor": 4}
    config = tf.Idefics3Config(**config, image_token_id=tokenizer.image_token_id)
    return tf.Idefics3ForConditionalGeneration(config), processor


def run_gpu(images: Path, root: Path, device: str = "cuda") -> None:
    """`images`: DIR/<class>/<image>. On the device "cpu" all is tiny: a test of this function."""
    gpu, cuda = device == "cuda", torch.cuda
    if gpu and not cuda.is_available():
        raise SystemExit("test_smoke.py gpu measures what a GPU does: torch finds none here")
    files = sorted(path.resolve() for path in images.rglob("*") if path.is_file())
    captions, rng = [], random.Random(0)
    for i in range(100 * len(files) if gpu else 8):  # a folder of many images
        file = files[i % len(files)]
        key = f"{file.parent.name}/{i:06d}{file.suffix}"
        for split in ("train", "val")[: 1 + (i < len(files))]:
            link = root / "data" / split / key
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        words = " ".join(rng.choices([*COLORS, *SHAPES, *BACKGROUNDS], k=30))
        captions.append({"image": key, "caption": words})
    write_lines(root / "captions.jsonl", captions)
    tiny = text(tokens(), vocab_size=49280)  # far more than there are words
    save(root / "encoder", tf.BertModel(tf.BertConfig(**MINILM if gpu else tiny)), tokens())
    vision, words = (VISION_OF_SMOLVLM, TEXT_OF_SMOLVLM) if gpu else (VISION, tiny)
    model, processor = build_smolvlm(vision, words)
    # no end, and words alone: what a caption holds of other tokens cannot be written
    mute = [*processor.tokenizer.all_special_ids, *range(len(tokens()), words["vocab_size"])]
    options = {"eos_token_id": None, "pad_token_id": 0, "suppress_tokens": mute}
    model.generation_config.update(**options)
    save(root / "smolvlm", model.bfloat16(), processor)
    print(cuda.get_device_name() if gpu else "no GPU", torch.__version__)
    print("| what | speed | waiting for data | peak memory |\n|---|---|---|---|", flush=True)

    def measure(what: str, line: str, pattern: str, unit: str, times: int = 1) -> None:
        if gpu:
            cuda.reset_peak_memory_stats()
        printed = call(f"{line} --device {device}")
        speed = times * float(re.findall(pattern, printed)[-1])
        waits = [f"{float(wait):.0%}" for wait in re.findall(r"data_wait ([\d.e-]+)", printed)]
        memory = f"{cuda.max_memory_allocated() / 2**30:.1f} GiB" if gpu else ""
        print(f"| {what} | {speed:.0f} {unit} | {(waits or [''])[-1]} | {memory} |", flush=True)

    embeddings = f"--captions {root}/captions.jsonl --{{}} {root}/embeddings.npy"
    line = f"embed {embeddings.format('out')} --model {root}/encoder"
    measure("embed.py, MiniLM's shape", line, r"(\S+) captions/s", "captions/s")
    for arch, batch in (("resnet50", 256), ("vit_b_16", 128)) if gpu else [("squeezenet1_1", 4)]:
        line = f"train --data {root}/data --arch {arch} -b {batch} --epochs 2 --lr 0.001"
        line += f" --val-every 2 --out {root}/{arch}"
        for what, more in ("", ""), (", aligned", f"-aligned {embeddings.format('embeddings')}"):
            measure(f"train.py, {arch}{what}", line + more, r"images_per_s (\S+),", "images/s")
    line = f"caption --data {root}/data/train --model {root}/smolvlm --out {root}/described.jsonl"
    line += f" --max-new-tokens 64 --limit {128 if gpu else 4}"  # none of which is the end
    measure("caption.py, SmolVLM-500M's", line, r"(\S+) captions/s", "tokens/s", times=64)


# ---- The tests: what they share, then a class per script -----------------------------------------

TMP = Path(tempfile.gettempdir()) / f"gpt4image-{os.getpid()}"
WORLD, MLLM, ENCODER = TMP / "world", TMP / "mllm", TMP / "encoder"
CAPTIONS, EMBEDDINGS, FLAT = TMP / "captions.jsonl", TMP / "captions.npy", TMP / "flat"
PRESET = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=37)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
TURNED = Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees


# The tests are of the CPU, whatever else there is, as is what they start; but those of OnGPU.
# A function: a Mock would remember each of its calls, which are several per image.
NO_GPU = patch("torch.accelerator.current_accelerator", lambda **_: None)


def one_core() -> dict[str, str]:
    """The environment of what a test starts."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def setUpModule() -> None:
    """A world, a random MLLM and encoder, captions, embeddings; FLAT: without class folders."""
    NO_GPU.start()
    torch.set_num_threads(2)
    (FLAT / "train").mkdir(parents=True)
    captions = sorted(draw_world(WORLD, 6, 5, wrong=0, classes=CLASSES[:2] + CLASSES[-2:]).items())
    save_mllm(MLLM, init=0.2)
    save_text_encoder(ENCODER)
    embedded("captions", [{"image": key, "caption": caption} for key, caption in captions])
    flat = [(key.replace("/", "-"), caption) for key, caption in captions]
    embedded("flat", [{"image": key, "caption": caption} for key, caption in flat])
    for (key, _), (name, _) in zip(captions, flat, strict=True):
        shutil.copy(WORLD / "train" / key, FLAT / "train" / name)


def tearDownModule() -> None:
    NO_GPU.stop()
    shutil.rmtree(TMP)


def save_kind(kind: str, folder: Path) -> None:
    """A tiny random model of a kind that caption.py takes; captions depend on the image."""
    closed, opened, reader = tokens("[BOS] $A [EOS]"), tokens("[BOS] $A"), tokens("[BOS] $A [EOS]")
    # the Q-Former counts characters: its lengths differ from the LLM's
    reader.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pads = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    padded, square = tokens(**pads), tf.BlipImageProcessor(**SQUARE)
    patches = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, "patch_size": 8}
    patches = tf.Qwen2VLImageProcessor(**patches), padded, tf.Qwen2VLVideoProcessor(patch_size=8)
    asked = {"num_query_tokens": 4}
    queries = asked | {"qformer_config": text(opened, encoder_hidden_size=32)}
    queries["image_token_index"] = opened.convert_tokens_to_ids("<image>")
    opt = text(opened, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128)
    llama, opt = tf.LlamaConfig(**text(opened)), tf.OPTConfig(**opt)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    rope = text(padded, num_key_value_heads=4, rope_parameters=rope)
    towers = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    towers = {"vision_config": towers | {"patch_size": 8}}
    towers |= {f"{name}_id": getattr(padded, f"{name}_id") for name in pads}
    chat = CHAT.replace("<image>", "<|image_pad|>")
    kinds = {  # the processor, the language model, what else the configuration tells
        "blip": (tf.BlipProcessor(square, closed), text(closed, sep_token_id=3), {}),
        "blip-2": (tf.Blip2Processor(square, opened, **asked), opt, queries),
        "instructblip": (tf.InstructBlipProcessor(square, opened, reader, **asked), llama, queries),
        "qwen2_vl": (tf.Qwen2VLProcessor(*patches, chat), rope, towers),
    }
    if kind == "idefics3":
        model, processor = build_smolvlm(VISION, text(opened))
    else:
        processor, words, more = kinds[kind]
        config = {"text_config": words, "vision_config": VISION} | more
        model = tf.AutoModelForImageTextToText.from_config(tf.AutoConfig.for_model(kind, **config))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.update(**IDS)
    save(folder, model, processor)


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def call(line: str) -> str:
    """What a script's main() prints, run in this process. SystemExit tells its sentence."""
    words, printed, errors = shlex.split(line), io.StringIO(), io.StringIO()
    module = importlib.import_module(words[0])
    try:
        with patch.multiple(sys, argv=words, stdout=printed, stderr=errors):
            module.main()
    except SystemExit as end:  # 2: argparse has printed its sentence
        sentence = errors.getvalue().splitlines()[-1] if end.code == 2 else end.code
        raise SystemExit(sentence) from end
    return printed.getvalue()


def arguments(line: str):
    """What a script makes of its command line."""
    words = shlex.split(line)
    with patch.object(sys, "argv", words):
        return importlib.import_module(words[0]).parse_args()


def texts(name: str) -> str:
    return f"--captions {TMP}/{name}.jsonl --embeddings {TMP}/{name}.npy"


def embedded(name: str, lines: list[dict]) -> str:
    """The options that name these captions, which are written and embedded."""
    write_lines(TMP / f"{name}.jsonl", lines)
    call(f"embed --captions {TMP}/{name}.jsonl --out {TMP}/{name}.npy --model {ENCODER}")
    return texts(name)


def command(line: str, processes: int = 1) -> list[str]:
    script, *words = shlex.split(line)
    launcher = [sys.executable]
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node"
        launcher += [*torchrun.split(), str(processes)]
    return [*launcher, str(HERE / f"{script}.py"), *words]


def completed(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env=one_core())


def shell(line: str, processes: int = 1) -> str:
    """Run a script as a user does; what it printed on stdout."""
    result = completed(command(line, processes))
    if result.returncode:
        raise AssertionError(f"{line} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def run_behind(code: str, line: str, processes: int = 1) -> subprocess.CompletedProcess:
    """A script in processes that run the code first."""
    words, script = command(line, processes), f"{HERE}/{line.split()[0]}.py"
    words[words.index(script)] = f"{TMP}/behind.py"
    first = f"import os, runpy, sys, torch\nsys.path.insert(0, {str(HERE)!r})\n{code}"
    last = f"runpy.run_path({script!r}, run_name='__main__')"
    (TMP / "behind.py").write_text(f"{first}\n{last}")
    return completed(words)


def kill_when(ready, line: str, processes: int = 1) -> None:
    """Start a script and SIGKILL it and its children as soon as `ready()`."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command(line, processes), env=one_core(), **options)
    try:
        deadline = time.time() + 120
        while not ready():
            if process.poll() is not None or time.time() > deadline:
                said = process.stderr.read().decode()[-2000:]
                raise AssertionError(f"{line} was not to be caught in the middle: {said}")
            time.sleep(0.005)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


def draw_zoo(folder: Path) -> list[str]:
    """Images of all kinds that can be read; their names (one of them no valid UTF-8)."""
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
    rgb.save(folder / "turned.jpg", exif=TURNED)
    return os.listdir(folder)


def write_json(file: Path, content: dict | list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Base(unittest.TestCase):
    def shortDescription(self) -> None:
        """Tests are listed by their names alone."""

    def refused(self, pattern: str, line: str) -> None:
        """One clear sentence, no traceback, exit code not 0."""
        with self.assertRaisesRegex(SystemExit, pattern) as caught:
            call(line)
        self.assertIsInstance(caught.exception.code, str)
        self.assertNotIn("\n", caught.exception.code)


class EveryScript(Base):
    """All in a row; and what several do alike: their copies of a function are equal."""

    def test_four_stages_as_a_user_runs_them(self):
        run = TMP / "e2e"
        describe = f"caption --data {WORLD}/train --out {run}.jsonl --model {MLLM}"
        shell(f"{describe} --prompt '{PROMPT}' --max-new-tokens 6 --batch-size 5 -j 2")
        self.assertEqual(column("e2e", "image"), column("captions", "image"))
        self.assertGreater(len(set(column("e2e"))), 1, "the captions do not depend on the image")
        shell(f"embed --captions {run}.jsonl --out {run}.npy --model {ENCODER}")
        rows = np.load(f"{run}.npy", mmap_mode="r")
        self.assertEqual((rows.shape, rows.dtype), ((24, 64), np.float16))
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=2e-3)
        line = f"train --data {WORLD} --arch resnet18 --input-size 32 --epochs 2 -b 8 -j 1"
        shell(f"{line} --out {run} {texts('e2e')}")
        shell(f"{line} --out {run}-baseline")
        config, *epochs = read_lines(run / "log.jsonl")
        self.assertEqual([entry["epoch"] for entry in epochs], [1, 2])
        self.assertEqual(config["config"]["text"]["model"], str(ENCODER))
        self.assertGreater(epochs[0]["loss_align"], 0)
        folder = ImageFolder(WORLD / "val", PRESET)
        hits = outputs_of(plain_model("e2e"), folder).argmax(1) == torch.tensor(folder.targets)
        top1 = 100 * hits.float().mean().item()
        self.assertAlmostEqual(epochs[-1]["val_top1"], top1, places=4)
        line = f"evaluate --data {WORLD}/val {run}-baseline/last.pt {run}/last.pt"
        table = shell(f"{line} -b 7 -j 1")
        self.assertIn(f"| 20 | {top1:.2f} |", table.splitlines()[3])
        rows = r"^(\|.*\|) \d+ \|([^|]*\|)$"  # all columns but the speed
        both = shell(f"{line} -j 0", processes=2)  # old versions of gloo print other lines
        self.assertEqual(len(re.findall(rows, table, re.M)), 2)
        self.assertEqual(re.findall(rows, both, re.M), re.findall(rows, table, re.M))

    def copies(self, name: str, *scripts: str):
        """The function or constant, of the first script; a pasted copy that differs fails."""
        found = [getattr(importlib.import_module(script), name) for script in scripts]
        texts = {inspect.getsource(x) if inspect.isfunction(x) else repr(x) for x in found}
        self.assertEqual(len(texts), 1, name)
        return found[0]

    def test_full_disk(self):
        """With files limited to so many bytes once all is imported, which may write some itself."""
        whole, saved = TMP / "full.jsonl", TMP / "full/last.pt"
        caption, epoch = caption_line("full"), train_line("full", "--epochs 1")
        rows = f"embed --captions {CAPTIONS} --out {TMP}/full.npy --model {ENCODER}"
        for size, line, sentence in (
            (2000, caption, "File too large; what is complete .* stays: start the same command"),
            (200, rows, "^OSError: .*File too large$"),  # there is nothing yet to go on with
            (1_000_000, epoch, "full/last.pt: is the disk full.* saved stays: --resume goes on"),
        ):
            code = f"import resource, {line.split()[0]}\nlimit = {size}, {size}\n"
            result = run_behind(f"{code}resource.setrlimit(resource.RLIMIT_FSIZE, limit)", line)
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr.splitlines()[-1], sentence)
            self.assertNotIn("Traceback", result.stderr)
        self.assertFalse(whole.exists() or saved.exists())
        call(caption)
        call(caption_line("unlimited"))
        self.assertEqual(whole.read_bytes(), (TMP / "unlimited.jsonl").read_bytes())
        call(f"{epoch} --resume")

    def test_ranks(self):
        process_rank = self.copies("process_rank", "caption", "embed", "train", "evaluate")
        for rank, world, want in (None, None, (0, 1)), ("0", "1", (0, 1)), ("2", "4", (2, 4)):
            with patch.dict(os.environ, {"RANK": rank, "WORLD_SIZE": world} if rank else {}):
                self.assertEqual(process_rank(), want)
        describe, judge = (f"{script} --data {WORLD}" for script in ("caption", "evaluate"))
        for given in {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}:
            for line in f"{describe} --out x", "embed", train_line("x"), f"{judge} x.pt":
                with patch.dict(os.environ, given):
                    self.refused("start with torchrun, or unset both", line)

    def test_lines(self):
        """What is wrong with a line is told in a sentence, by embed.py and train.py."""
        read = self.copies("read_captions", "embed", "train")
        file, good = TMP / "lines.jsonl", b'{"image": "a", "caption": " b "}\n'
        file.write_bytes(good)
        self.assertEqual(list(read(str(file))), [("a", "b")])
        for line, sentence in (
            (b'{"image": "a", "caption": ["b", "c"]}', 'its "caption" is .*, not a string'),
            (b'{"image": "a", "caption": null}', 'its "caption" is null'),
            (b'{"image": 7, "caption": "b"}', 'its "image" is 7'),
            (b'{"image": "a"}', 'its "caption" is missing'),
            (b"\xef\xbb\xbf" + good, "not JSON in UTF-8: .*BOM"),
            (b'["a", "b"]', "is no JSON object"),
            (b"a: b", "is not JSON"),
            (b'{"image": "\xff", "caption": "b"}', "is not JSON in UTF-8"),
        ):
            file.write_bytes(good + line + b"\n")
            wrong = f"line 2.*{sentence}"
            self.assertRaisesRegex(SystemExit, wrong, lambda: list(read(str(file))))
            self.refused(wrong, f"embed --captions {file} --out {TMP}/x.npy --model {ENCODER}")
        files = f"--captions {file} --embeddings {EMBEDDINGS}"
        self.refused("line 2", train_line("x", files, text=False))

    def test_devices(self):
        """What torch finds is the default; a process takes the GPU of its own, or the named one."""
        choose = self.copies("choose_device", "caption", "embed", "train", "evaluate")
        find = "torch.accelerator.current_accelerator"
        for here, name, world, want in (
            (None, None, 1, "cpu"),
            ("mps", None, 1, "mps"),
            ("mps", "cpu", 1, "cpu"),
            ("cuda", None, 4, "cuda:3"),
            ("cuda", "cuda", 4, "cuda:3"),
            ("cuda", "cuda:0", 1, "cuda:0"),
            ("cuda", "cuda:1", 1, "cuda:1"),
            (None, "cuda", 1, "--device cuda: torch finds no GPU"),
            (None, "mps", 1, "--device mps: torch finds no GPU"),
            ("cuda", "mps", 1, "--device mps: torch finds cuda"),
            ("cuda", "cuda:0", 4, "--device cuda:0: several processes would share it"),
            ("cuda", "gpu", 1, "--device gpu: "),
        ):
            with (
                self.subTest(here=here, name=name),
                patch(find, return_value=here and torch.device(here)),
                patch("torch.cuda.set_device") as current,
                patch.dict(os.environ, {"LOCAL_RANK": "3"}),
            ):
                if want.startswith("--device"):
                    self.assertRaisesRegex(SystemExit, want, choose, name, world)
                    continue
                self.assertEqual(choose(name, world), want)
                if here == "cuda":
                    current.assert_called_once_with(torch.device(want))

    def test_table_of_a_gpu(self):
        """Its function, on the CPU: a row of each stage, and two of training."""
        printed = io.StringIO()
        (TMP / "table").mkdir()
        with contextlib.redirect_stdout(printed):
            run_gpu(WORLD / "val", TMP / "table", "cpu")
        rows = re.findall(r"^\| (\w+)\.py.* \| \d+ \w+/s \|", printed.getvalue(), re.M)
        self.assertEqual(rows, ["embed", "train", "train", "caption"])

    def test_cores(self):
        """Those of the process's affinity; on a CPU, train.py's model takes three of four."""
        with patch("os.sched_getaffinity", lambda _: {0, 5, 7}, create=True):
            self.assertEqual(arguments("evaluate --data . resnet18").workers, 3)
        line, threads = train_line("x").replace("-j 0", ""), torch.get_num_threads()
        environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
        stop = patch("train.list_data", side_effect=SystemExit)
        with patch("train.CPUS", 8), stop, patch.dict(os.environ, environment, clear=True):
            self.assertEqual(arguments(line).workers, 2)
            self.assertRaises(SystemExit, call, line)
        found = torch.get_num_threads()
        torch.set_num_threads(threads)
        self.assertEqual(found, 6)

    def test_folders(self):
        """What editors leave is no class and no image; two layouts at once are refused."""
        self.copies("HIDDEN", "caption", "train", "evaluate")
        list_images = self.copies("list_images", "caption", "train", "evaluate")
        flat, classes = TMP / "folders/flat", TMP / "folders/classes"
        seen = {flat: ["1.jpg", "2.PNG"], classes: ["cat/1.jpg", "cat/deeper/2.jpg", "dog/3.jpg"]}
        hidden = {classes: "cat/._1.jpg .ipynb_checkpoints/cat/1.jpg cat/.thumbnails/1.jpg a.txt"}
        hidden[flat] = "._1.jpg .git/x.png __MACOSX/flat/._1.jpg captions.jsonl.parts/x.png"
        for folder in flat, classes:
            for name in *seen[folder], *hidden[folder].split():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        self.assertEqual(list_images(f"{flat}"), ([], [(f"{flat}/{n}", -1) for n in seen[flat]]))
        want = [(f"{classes}/{n}", k) for n, k in zip(seen[classes], (0, 0, 1), strict=True)]
        self.assertEqual(list_images(f"{classes}"), (["cat", "dog"], want))
        (classes / "loose.jpg").touch()
        sentence = r"images \(loose.jpg\) beside class folders \(cat/\)"
        self.assertRaisesRegex(SystemExit, sentence, list_images, str(classes))

    def test_pixels(self):
        """Damaged metadata costs no image; an orientation counts wherever it is written, in Pillow
        and in torchvision's decoder; numbers of 16 bits are scaled, others refused."""
        for name in "TURNS", "orientation":
            self.copies(name, "caption", "train", "evaluate")
        load = self.copies("load_image", "caption", "train", "evaluate")
        folder = TMP / "pixels"
        folder.mkdir()
        tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)
        xmp = b'http://ns.adobe.com/xap/1.0/\0<a tiff:Orientation="6"/>'
        ratio = tiff[:14] + b"\x02" + tiff[15:28] + b"\x1a\x01\x0a\0\x01\0\0\0\x26\0\0\0"
        ratio += bytes(4) + b"\xff\xff\xff\xff" + bytes(4)  # a resolution of -1/0
        stream, noise = (
            io.BytesIO(),
            np.random.default_rng(0).integers(0, 255, (8, 10, 3), np.uint8),
        )
        Image.fromarray(noise).resize((100, 80)).save(stream, "JPEG", quality=95)
        plain, jpeg, file = Image.open(stream), stream.getvalue(), folder / "a.jpg"
        turned = plain.transpose(Image.Transpose.ROTATE_270)
        for number, content, want in (
            *((1, content, turned) for content in (tiff, xmp, ratio)),
            *((1, content, plain) for content in (b"Exif\0\0garbage", b"Exif\0\0")),
            (2, b"ICC_PROFILE\0\x05\x02cut", plain),
        ):
            segment = struct.pack(">BBH", 0xFF, 0xE0 + number, len(content) + 2) + content
            file.write_bytes(jpeg[:2] + segment + jpeg[2:])
            for found in np.asarray(load(file)), train.read_image(str(file)).permute(1, 2, 0):
                np.testing.assert_array_equal(found, np.asarray(want), f"{content}")
        for name in "a.png", "a.webp", "a.tif":
            plain.save(folder / name, exif=TURNED)
            self.assertEqual(load(folder / name).size, (80, 100), name)
        text = PngImagePlugin.PngInfo()
        text.add_itxt("parameters", "a" * 9_000_000, zip=True)
        plain.save(folder / "long.png", pnginfo=text)
        self.assertEqual(load(folder / "long.png").size, (100, 80))
        numbers = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        deep = Image.fromarray(numbers)
        big = Image.frombytes("I;16B", (256, 256), numbers.astype(">u2").tobytes())
        for image, kind in (deep, "PNG"), (deep, "PPM"), (deep, "TIFF"), (big, "TIFF"):
            image.save(file, kind)
            np.testing.assert_array_equal(np.asarray(load(file))[..., 1], numbers // 256)
        for kind in np.float32, np.int32:
            Image.fromarray(numbers.astype(kind) - kind(2)).save(file, "TIFF")
            self.assertRaisesRegex(ValueError, "which number", load, file)


def caption_line(out: str, more: str = "", data: Path = WORLD / "train") -> str:
    """caption.py's command line: two images a batch, six tokens a caption."""
    line = f"caption --data {data} --out {TMP}/{out}.jsonl --model {MLLM} --prompt '{PROMPT}'"
    return f"{line} --max-new-tokens 6 --batch-size 2 -j 0 --device cpu {more}"


def column(out: str, name: str = "caption") -> list[str]:
    return [line[name] for line in read_lines(TMP / f"{out}.jsonl")]


def failed(out: str) -> dict[str, str]:
    """The reason why, of each image that failed."""
    return {line["image"]: line["error"] for line in read_lines(TMP / f"{out}.jsonl.failed")}


class Captioning(Base):
    def setUp(self):
        if not (TMP / "whole.jsonl").exists():
            call(caption_line("whole"))
        self.whole = (TMP / "whole.jsonl").read_bytes()
        self.captions, self.keys = column("whole"), column("whole", "image")

    def test_killed_and_restarted(self):
        out, part = TMP / "killed.jsonl", TMP / "killed.jsonl.parts/0-of-1.jsonl"
        kill_when(lambda: lines_in(part) >= 4, caption_line(out.stem))
        self.assertFalse(out.exists())
        found = [json.loads(line) for line in part.read_bytes().split(b"\n") if line.endswith(b"}")]
        self.assertLess(len(found), 12)
        captions = [record["caption"] for batch in found for record in batch["records"]]
        self.assertEqual(captions, self.captions[: len(captions)], "in the folder's order")
        content = part.read_bytes()
        part.write_bytes(content[: content.rstrip().rindex(b"\n") + 30])  # cut while it was written
        call(caption_line(out.stem))
        self.assertEqual(out.read_bytes(), self.whole)
        self.assertEqual(list(TMP.glob("killed.jsonl?*")), [part.parent])
        with patch("caption.Describer", side_effect=AssertionError("not needed")):
            call(caption_line(out.stem))
        self.assertEqual(out.read_bytes(), self.whole)
        shutil.rmtree(part.parent)
        self.refused("its parts are not", caption_line(out.stem))

    def test_shards_and_torchrun_give_the_same_file(self):
        for shard in "1/3", "0/3":
            self.assertIn("batches are done", call(caption_line("shards", f"--shard {shard}")))
            self.assertFalse((TMP / "shards.jsonl").exists())
        call(caption_line("shards", "--shard 2/3"))
        self.assertEqual((TMP / "shards.jsonl").read_bytes(), self.whole)
        out = TMP / "torchrun.jsonl"
        parts = [TMP / f"{out.name}.parts/{rank}-of-2.jsonl" for rank in range(2)]
        kill_when(lambda: sum(map(lines_in, parts)) >= 4, caption_line(out.stem), processes=2)
        self.assertFalse(out.exists())
        shell(caption_line(out.stem), processes=2)
        self.assertEqual(out.read_bytes(), self.whole)
        self.assertEqual(list(TMP.glob("torchrun.jsonl?*")), [parts[0].parent])

    def test_from_several_processes_to_one(self):
        """What two shards of three did is not done again, and --out is never partial."""
        out, parts = TMP / "to-one.jsonl", TMP / "to-one.jsonl.parts"
        call(caption_line(out.stem, "--shard 1/3"))
        part = parts / "1-of-3.jsonl"
        part.write_text(part.read_text().replace(self.captions[2], "a mark"))
        kill_when(lambda: lines_in(parts / "0-of-1.jsonl") > 1, caption_line(out.stem))
        self.assertFalse(out.exists())
        call(caption_line(out.stem))
        found = column(out.stem)
        self.assertEqual(found[2], "a mark")
        self.assertEqual(found[:2] + found[6:8], self.captions[:2] + self.captions[6:8])

    def test_the_copy_of_a_batch_with_fewest_errors_wins(self):
        out, part = TMP / "copies.jsonl", TMP / "copies.jsonl.parts/0-of-2.jsonl"
        call(caption_line(out.stem, "--limit 2"))
        good = (TMP / "copies.jsonl.parts/0-of-1.jsonl").read_bytes()
        bad = json.loads(good)
        bad["records"][0] = {"image": self.keys[0], "error": "was not to be read"}
        for copies in (good, json.dumps(bad).encode() + b"\n"), (json.dumps(bad).encode(), good):
            part.write_bytes(b"".join(copies))
            call(caption_line(out.stem, "--limit 4"))
            self.assertEqual(out.read_bytes(), b"".join(self.whole.splitlines(True)[:4]))
            self.assertFalse((TMP / "copies.jsonl.failed").exists())

    def test_no_mixed_files(self):
        """But of --limit there may be more."""
        fields = {(*line,) for line in read_lines(TMP / "whole.jsonl")}
        self.assertEqual(fields, {("image", "caption", "model", "prompt")})
        self.refused(
            "begun with max_new_tokens 6, not", caption_line("whole", "--max-new-tokens 7")
        )
        self.refused("begun with revision 'main', not", caption_line("whole", "--revision x"))
        call(caption_line("begun", "--limit 5"))
        self.assertEqual(lines_in(TMP / "begun.jsonl"), 5)
        self.refused("was begun with prompt .*describe", caption_line("begun", "--prompt a"))
        call(caption_line("begun"))
        self.assertEqual((TMP / "begun.jsonl").read_bytes(), self.whole)
        (TMP / "begun.jsonl.parts/settings.json").unlink()
        self.refused("is not of this version", caption_line("begun"))

    def test_two_processes_begin_at_once(self):
        """With different settings: the later one is refused."""
        one, other = (Parts(TMP / "once.jsonl", f"{n}-of-2", {"seed": n}) for n in range(2))
        makedirs = os.makedirs

        def overtaken(folder, **options):
            if "0-of-2" in str(folder):
                other.begin()
            makedirs(folder, **options)

        with patch("os.makedirs", overtaken):
            self.assertRaisesRegex(SystemExit, "begun with seed 1, not 0", one.begin)
        self.assertEqual(list(TMP.glob("once.jsonl*")), [TMP / "once.jsonl.parts"])

    def test_a_branch_that_moves_does_not_mix_models(self):
        from_pretrained, commit = tf.AutoConfig.from_pretrained, None

        def resolved(*args, **options):
            config = from_pretrained(*args, **options)
            if not options.get("return_unused_kwargs"):
                config._commit_hash = commit
            return config

        with patch("transformers.AutoConfig.from_pretrained", resolved):
            call(caption_line("moved", "--limit 4"))
            commit = "0123abcd"
            self.refused("begun with revision 'main', not '0123abcd'", caption_line("moved"))

    def test_batch_size_does_not_change_captions(self):
        """Those that go on, if they may, are cut short."""
        printed = call(caption_line("b7", "--batch-size 7"))
        self.assertEqual(column("b7"), self.captions)
        call(caption_line("longer", "--max-new-tokens 12"))
        pairs = zip(self.captions, column("longer"), strict=True)
        cut = sum(short != long for short, long in pairs)
        self.assertIn(f"({cut} cut short)", printed)
        self.assertIn(cut, range(1, 24))

    def test_kinds_of_models(self):
        """Captions depend on the image, not on the batch; the prompt is not in them."""
        rng = np.random.default_rng(0)
        for i in range(7):
            file = TMP / "sizes" / ("cat" if i < 4 else "large_red_circle") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (*rng.integers(24, 90, 2), 3)
            Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(file)
        for kind in "blip", "blip-2", "instructblip", "idefics3", "qwen2_vl":
            with self.subTest(kind):
                save_kind(kind, TMP / kind)
                more = f"--prompt 'describe the {{class}}' --max-new-tokens 8 --model {TMP / kind}"
                for size in 1, 4:
                    out, batch = f"{kind}-{size}", f"{more} --batch-size {size}"
                    call(caption_line(out, batch, TMP / "sizes"))
                found = column(f"{kind}-1")  # of two prompts
                self.assertEqual(found, column(f"{kind}-4"))
                self.assertEqual((len(found), "describe the" in " ".join(found)), (14, False))
                self.assertGreater(len(set(found)), 2)
        processor = "transformers.AutoProcessor.from_pretrained"
        with patch(processor, return_value=tf.ViTImageProcessor()):
            self.refused("takes no prompt", caption_line("x"))

    def test_out_of_memory_is_halved(self):
        """Down to one image; one that does not fit even alone costs itself only, and --retry-failed
        brings it back."""
        generate, seen = Describer.generate, []

        def small_memory(describer, inputs, **changes):
            if changes:  # the probe
                return generate(describer, inputs, **changes)
            seen.append(inputs["pixel_values"])
            if len(seen[-1]) > 2 or any(torch.equal(row, seen[0][3]) for row in seen[-1]):
                raise torch.OutOfMemoryError("no room")
            return generate(describer, inputs)

        line = caption_line("oom", "--batch-size 7")
        with patch.object(Describer, "generate", small_memory):
            printed = call(line)
        self.assertEqual(column("oom"), self.captions[:3] + self.captions[4:])
        sizes = [len(rows) for rows in seen]
        self.assertEqual(sizes[-6:], [1, 2, 2, 2, 1, 2], "what fits is remembered")
        self.assertIn("23 captions", printed)
        self.assertIn("1 images failed, listed in", printed)
        self.assertIn("OutOfMemoryError", failed("oom")[self.keys[3]])
        call(f"{line} --retry-failed")
        self.assertEqual(column("oom"), self.captions)
        self.assertFalse((TMP / "oom.jsonl.failed").exists())

    def test_what_waits(self):
        """For the model takes 4 GB at most."""
        describer = Describer(*load_model(str(MLLM)), batch_size=2)
        for describer.image_bytes, want in (1e6, (4, 2)), (0.4e9, (4, 1)), (0.9e9, (2, 1)):
            with patch("caption.DataLoader", return_value=[]) as loader:
                list(ask_model(describer, [], 4, 0))
            found = [loader.call_args.kwargs[name] for name in ("num_workers", "prefetch_factor")]
            self.assertEqual(tuple(found), want)

    def test_empty_captions_and_thoughts(self):
        decode = tf.PreTrainedTokenizerBase.batch_decode

        def write(tokenizer, tokens, **options):
            texts = [" ".join(text.split()) for text in decode(tokenizer, tokens, **options)]
            said = {self.captions[0]: " \n", self.captions[-1]: "<think>Hm."}
            return [said.get(text, f"<think>Hm.</think>\n{text}") for text in texts]

        pairs = list(zip(self.keys, self.captions, strict=True))
        bad = [key for key, text in pairs if text in (self.captions[0], self.captions[-1])]
        with patch("transformers.PreTrainedTokenizerBase.batch_decode", write):
            call(caption_line("empty"))
        self.assertEqual(list(failed("empty")), bad)
        kept = [text for key, text in pairs if key not in bad]
        self.assertEqual(column("empty"), kept)
        call(caption_line("empty", "--retry-failed"))
        self.assertEqual((TMP / "empty.jsonl").read_bytes(), self.whole)

    def test_sampling_from_scores_that_are_not_finite(self):
        """The image fails, for any number of captions; the others of its batch do not."""
        model, processor = build_mllm(init=0.2)
        patches = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        torch.nn.init.uniform_(patches.weight, 1e38, 3e38)  # overflows even in float32
        processor.image_processor.image_mean = [128 / 255] * 3  # grey is 0
        save(TMP / "overflows", model, processor)
        (TMP / "greys").mkdir()
        for value in 0, 128, 255:
            Image.new("RGB", (32, 32), (value,) * 3).save(TMP / f"greys/{value}.png")
        sample = f"--model {TMP}/overflows --temperature 1 --num-captions 2 --batch-size 3"
        call(caption_line("greys", sample, data=TMP / "greys"))
        self.assertEqual(column("greys", "image"), ["128.png", "128.png"])
        self.assertEqual(list(failed("greys")), ["0.png", "255.png"])
        self.assertIn("not finite", failed("greys")["0.png"])

    def test_models_that_are_not_whole(self):
        """What lacks would be random: a sentence, not captions."""
        weights = safetensors.torch.load_file(MLLM / "model.safetensors")
        name = next(name for name in weights if "projector" in name and "weight" in name)
        misshapen, cut = weights | {name: torch.ones(3)}, safetensors.torch.save(weights)[:5000]
        missing = {other: weight for other, weight in weights.items() if other != name}
        config = json.loads((MLLM / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        for file, content, sentence in (
            ("model.safetensors", cut, "cannot load it"),
            ("model.safetensors", safetensors.torch.save(misshapen), "not whole: 1 .*projector"),
            ("model.safetensors", safetensors.torch.save(missing), "not whole: 1 .*projector"),
            ("tokenizer.json", POINTER.encode(), "cannot load it"),
            ("config.json", json.dumps(config).encode(), "cannot load it: ImportError"),
        ):
            shutil.copytree(MLLM, TMP / "lacks", dirs_exist_ok=True)
            (TMP / "lacks" / file).write_bytes(content)
            self.refused(f"--model .*{sentence}", caption_line("x", f"--model {TMP}/lacks"))

    def test_options_of_the_model(self):
        """A generate call per batch; images are shrunk; the chat template gets --extra-body's."""
        encode, generate, lengths, sizes = Describer.encode, Describer.generate, [], set()
        shutil.copytree(MLLM, TMP / "thinker")
        thinks = "{% if think %} circle {% endif %}{% if add_gen"
        (TMP / "thinker/chat_template.jinja").write_text(CHAT.replace("{% if add_gen", thinks))

        def look(describer, images, texts):
            sizes.update(image.size for image in images)
            return encode(describer, images, texts)

        def count(describer, inputs, **changes):
            lengths.append(inputs["input_ids"].shape[1])
            return generate(describer, inputs, **changes)

        line = caption_line("x", f"--model {TMP}/thinker --prompt 'the {{class}}'")
        extra = '{"chat_template_kwargs": {"think": 1}}'
        with patch.multiple(Describer, encode=look, generate=count):
            for size in 1, 24:
                more = f"--batch-size {size} --max-side 40 --extra-body '{extra}'"
                call(f"{line} {more} --out {TMP}/calls-{size}.jsonl")
            self.assertEqual(*(read_lines(TMP / f"calls-{size}.jsonl") for size in (1, 24)))
            self.assertEqual(len(lengths), (2 + 2 * 24) + (2 + 2), "2 probes, and for each prompt")
            self.assertEqual(sizes, {(300, 200), (1024, 768), (40, 40)}, "the probes', --max-side")
            longest = max(lengths)
            lengths.clear()
            call(f"{line} --batch-size 24 --max-side 0 --out {TMP}/calls.jsonl")
        self.assertEqual((max(lengths), (64, 64) in sizes), (longest - 1, True))
        self.refused("only chat_template_kwargs", f"{line} --extra-body '{{\"n\": 2}}'")

    def test_odd_images(self):
        """One image that the processor refuses, or over which generate fails in any way, costs
        itself; when each batch holds one, they can be done again. Only a lost GPU ends the run."""
        odd = {load_image(str(WORLD / "train" / key)).tobytes() for key in self.keys[1::4]}
        encode, generate = Describer.encode, Describer.generate

        def mark(describer, images, texts):
            bad = any(image.tobytes() in odd for image in images)
            if bad and isinstance(error, ValueError):
                raise error
            return encode(describer, images, texts) | {"bad": torch.tensor(bad)}

        def fails(describer, inputs, **changes):
            if inputs.pop("bad"):
                raise error
            return generate(describer, inputs, **changes)

        both = patch.multiple(Describer, encode=mark, generate=fails)
        for error in ValueError("odd"), KeyError("odd"), RuntimeError("CUDA error: assert"):
            out = type(error).__name__
            line = caption_line(out, "--batch-size 4")
            with both:
                if "CUDA" in str(error):
                    self.refused("CUDA error: assert: .* lost", line)
                    continue
                call(line)
            reasons = dict.fromkeys(self.keys[1::4], train.first_line(error))
            self.assertEqual(failed(out), reasons)
            self.assertEqual(column(out, "image"), [k for k in self.keys if k not in reasons])
            call(f"{line} --retry-failed")
            self.assertEqual(column(out), self.captions)

    def test_renamed_and_added_images(self):
        grown = shutil.copytree(WORLD / "train", TMP / "grown")
        call(caption_line("grown", "--limit 4", data=grown))
        (grown / self.keys[0]).rename(grown / f"{self.keys[0]}.png")
        self.refused("begun with images '24 ", caption_line("grown", data=grown))
        (grown / "a_first_class").mkdir()
        shutil.copy(grown / self.keys[1], grown / "a_first_class" / "new.png")
        self.refused("images '24 .*, not '25 ", caption_line("grown", data=grown))

    def test_several_prompts_and_samples(self):
        more = "--prompt 'describe the {class}' --num-captions 2 --temperature 1.0 --limit 3"
        for name in "many", "many2":
            call(caption_line(f"{name}", more))
        prompts = [PROMPT, PROMPT, *["describe the {class}"] * 2] * 3
        self.assertEqual(column("many", "prompt"), prompts)
        self.assertEqual((TMP / "many.jsonl").read_bytes(), (TMP / "many2.jsonl").read_bytes())
        self.refused("needs --temperature above 0", caption_line("x", "--num-captions 2"))

    def test_images_of_all_kinds(self):
        folder = TMP / "zoo" / "thing"
        good = draw_zoo(folder)
        (folder / "directory.jpg").mkdir()
        (folder / "cut.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:500])
        (folder / "noise.jpeg").write_bytes(b"no image at all")
        (folder / "zero.png").write_bytes(b"")
        Image.new("1", (20000, 20000)).save(folder / "bomb.png")
        bad = {f"thing/{name}" for name in ("cut.jpg", "noise.jpeg", "zero.png", "bomb.png")}
        for workers in 0, 2:
            out = f"zoo{workers}"
            line = caption_line(out, f"--batch-size 3 -j {workers}", data=TMP / "zoo")
            self.assertIn("4 images failed", call(line))
            self.assertEqual((len(column(out)), set(failed(out))), (len(good), bad))
        before = (TMP / "zoo2.jsonl").read_bytes()
        call(line)
        self.assertEqual((TMP / "zoo2.jsonl").read_bytes(), before)
        shutil.copy(folder / "grey.png", folder / "zero.png")
        call(f"{line} --retry-failed")
        self.assertEqual((len(column(out)), len(failed(out))), (len(good) + 1, 3))

    def test_template_and_class_names(self):
        template = f"caption --data {WORLD}/train --model template"
        template += " --prompt 'a photo of a {class}'"
        call(f"{template} --out {TMP}/template.jsonl")
        self.assertEqual(column("template")[0], "a photo of a purple cross")
        self.refused("begun with prompt", f"{template} --out {TMP}/template.jsonl --prompt b")
        words = {name: f"fancy {i}, other name" for i, name in enumerate(CLASSES)}
        tabs = "".join(f"{name}\t{word}\r\n\n" for name, word in words.items())
        files = {"tabs.txt": tabs, "spaces.txt": "\ufeff" + tabs.replace("\t", "  ")}
        files["words.json"] = "\ufeff" + json.dumps(words)
        files["several.JSON"] = json.dumps({name: [word, "x"] for name, word in words.items()})
        bad = {"few.txt": ("red_circle\tx\nyellow_star\n", "no name for 3 class folders")}
        bad["list.json"] = '["red circle"]', "AttributeError"
        bad["numbers.json"] = json.dumps(dict.fromkeys(CLASSES, 1)), "AttributeError"
        for file, content in files.items():
            (TMP / file).write_text(content, encoding="utf-8", newline="")
            call(f"{template} --out {TMP}/{file}.jsonl --class-names {TMP / file}")
            first = f"a photo of a fancy {CLASSES.index('purple_cross')}"
            self.assertEqual(column(f"{file}")[0], first, file)
        for file, (content, what) in bad.items():
            (TMP / file).write_text(content)
            line = f"{template} --out {TMP}/x.jsonl --class-names {TMP / file}"
            self.refused(f"--class-names .*{file}: .*{what}", line)

    def test_synset_folders_have_names_only_when_all_are_there(self):
        for i, name in enumerate(CLASSES[:2]):
            shutil.copytree(WORLD / "train" / name, TMP / "synset" / f"n0000000{i}")
        template = f"caption --data {TMP}/synset --model template --prompt 'a {{class}}'"
        self.refused("pass --class-names", f"{template} --out {TMP}/x.jsonl")

    def test_refusals(self):
        hollow = shutil.copytree(WORLD / "train", TMP / "hollow")
        (hollow / "empty").mkdir()
        self.refused("no valid file for the classes empty", caption_line("x", data=hollow))
        self.refused("--data", caption_line("x", data=TMP / "nowhere"))
        self.refused("did you mean .*train", caption_line("x", data=WORLD))
        for option, sentence in (
            ("--prompt 'a {clas}'", "{clas}.* is not known"),
            ("--limit 0", "start at 1"),
            ("--batch-size -1", "start at 1"),
            ("--patience -1", "others at 0"),
            ("--top-p 0.5", "needs --temperature above 0"),
            ("--server localhost:8000", "begins with http"),
            ("--shard 2/2", "expected I/N"),
            ("--shard 1", "expected I/N"),
        ):
            self.refused(sentence, caption_line("x", option))
        line = f"caption --data {WORLD}/train --model template --out {TMP}/x.jsonl"
        self.refused("needs a --prompt", line)
        self.refused("cannot load", caption_line("x", f"--model {TMP}/nowhere"))
        self.refused("--model .*cannot load", caption_line("x", f"--model {TMP}"))
        failure = Mock(side_effect=ValueError("broken"))  # shows at start, not in image by image
        with patch("transformers.LlavaForConditionalGeneration.generate", failure):
            self.refused("cannot take 'describe the image': .*broken", caption_line("broken"))
        self.assertEqual(list(TMP.glob("broken.jsonl*")), [])

    def test_preview(self):
        """Of the first images only, if --limit says so; a failed one is named; any script."""
        data = shutil.copytree(WORLD / "train", TMP / "previewed")
        (data / self.keys[1]).write_bytes(b"nothing")
        for limit, images, model in (24, 11, MLLM), (3, 2, "template"):  # one cannot be read
            options = f"--limit {limit} --preview {TMP}/sheet.html --model {model}"
            printed = call(caption_line("x", f"{options} --prompt '<b> кот'", data=data))
            page = (TMP / "sheet.html").read_text(encoding="utf-8")
            self.assertEqual(page.count("data:image/png;base64,"), 2 * images, "two prompts")
            self.assertIn(f"failed: '{self.keys[1]}': UnidentifiedImageError", printed)
        self.assertIn("&lt;b&gt; кот", page)
        self.assertEqual(list(TMP.glob("x.jsonl*")), [])
        (TMP / "none").mkdir()
        (TMP / "none/bad.png").write_bytes(b"nothing")
        options = f"--preview {TMP}/no.html --model template"
        self.refused("none of the images", caption_line("x", options, data=TMP / "none"))
        for file in "sheet.png", "nowhere/sheet.html":
            self.refused("name it FILE.html", caption_line("x", f"--preview {TMP}/{file}"))


class Stub(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that fails on purpose: the prompt says how."""

    protocol_version, log_message = "HTTP/1.1", lambda *_: None

    def do_POST(self):
        stub, key = self.server, self.headers["Authorization"]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = body["messages"][0]["content"][1]["text"]
        with stub.lock:
            stub.asked.append((what, time.time(), self.path, key, body))
            times = [one[0] for one in stub.asked].count(what)
            stub.flying += 1
            stub.most = max(stub.most, stub.flying)
        fault = what if times <= stub.faults.get(what, 0) else "none"
        time.sleep({"slow": 2, "hangs": 30}.get(fault, 0.02))
        with stub.lock:
            stub.flying -= 1
        self.close_connection = fault in ("closed", "slow", "hangs")
        if self.close_connection:
            return
        message = {"role": "assistant", "content": ODD.get(what, f"a  {what} caption")}
        reason = {"long": "length", "filtered": "content_filter"}.get(what, "stop")
        answer = {"choices": [{"index": 0, "finish_reason": reason, "message": message}]}
        answer = (json.dumps(BARE.get(what, answer)) if fault == "none" else f"no: {key}").encode()
        self.send_response(int(fault) if fault.isdecimal() else 200)
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        self.send_header("Retry-After", {"429": "1", "503": date}.get(fault, "soon"))
        self.send_header("Location", stub.target)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_CONNECT(self):
        self.server.asked.append((self.path, self.headers["Proxy-Authorization"]))
        self.send_error(403)


ODD = {"empty": " \n", "null": None, "thinks": "<think>Hm", "parts": [{}], "filtered": "half a"}
BARE = {"none": {"choices": None}, "few": {"choices": []}, "list": [], "detail": {"detail": "dead"}}


class Serving(Base):
    """caption.py --server, in this process: the key is searched for in all that it writes."""

    def start(self, target: str = "", **faults: int):
        stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
        stub.faults, stub.lock, stub.asked, stub.target = faults, threading.Lock(), [], target
        stub.flying, stub.most, stub.url = 0, 0, f"http://127.0.0.1:{stub.server_port}/v1"
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        self.addCleanup(stub.shutdown)
        return stub

    def line(self, out: str, kinds: str, url: str, more: str = "", prompt: str = "{class}") -> str:
        """To describe one image of each kind, of which the prompt tells the stub."""
        for kind in kinds.split():
            (TMP / out / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(next((FLAT / "train").iterdir()), TMP / out / kind / "0.png")
        line = f"caption --data {TMP / out} --out {TMP / out}.jsonl --prompt '{prompt}'"
        return f"{line} --model m --server {url} --batch-size 2 {more}"

    def serve(self, out: str, kinds: str, *more: str, **faults: int) -> tuple:
        """What was printed, and the server."""
        out, stub = f"served-{out}", self.start(**faults)
        quick = patch.multiple("caption", WAIT=0.01, TIMEOUT=1.5)
        key = patch.dict(os.environ, {"OPENAI_API_KEY": "sk-secret"})
        try:
            with quick, key:
                printed = call(self.line(out, kinds, stub.url, *more))
        except SystemExit as end:
            printed = str(end.code)
        files = [*TMP.glob(f"{out}.jsonl*"), *TMP.glob(f"{out}.jsonl.parts/*")]
        written = b"".join(file.read_bytes() for file in files if file.is_file())
        self.assertNotIn(b"secret", written + printed.encode())
        return printed, stub

    def test_faults(self):
        """Each costs time, or that image, never the run."""
        passing = {"429": 1, "503": 1, "408": 2, "closed": 1, "slow": 1}
        lasting = dict.fromkeys(["400", "403", "418", "424", "451", "500", "json"], 99)
        kinds = [*passing, *lasting, *ODD, *BARE, "long", "fine"]
        printed, stub = self.serve("faults", " ".join(kinds), **passing, **lasting)
        found = dict(zip(column("served-faults", "image"), column("served-faults"), strict=True))
        want = {f"{kind}/0.png": f"a {kind} caption" for kind in (*passing, "long", "fine")}
        self.assertEqual(found, want)
        found = {image.split("/")[0]: error for image, error in failed("served-faults").items()}
        self.assertEqual(set(found), {*lasting, *ODD, *BARE})
        self.assertEqual([found["400"], found["500"]], [f"{n}00 no: Bearer ***" for n in (4, 5)])
        self.assertIn('{"detail": "dead"}', found["detail"])
        self.assertIn("(1 cut short)", printed)
        times = {kind: [one[1] for one in stub.asked if one[0] == kind] for kind in kinds}
        more = {"429": 2, "503": 2, "408": 3, "slow": 2, "closed": 2, "500": 8}
        self.assertEqual({kind: len(times[kind]) for kind in kinds}, dict.fromkeys(kinds, 1) | more)
        for kind in "429", "503":
            self.assertGreater(times[kind][1] - times[kind][0], 1, "Retry-After")

    def test_fatal_answers_and_restart(self):
        for kind in "401", "402", "404":
            kinds = f"0 1 2 3 {kind}"  # in this order, two a batch: the last one is alone
            printed, stub = self.serve(kind, kinds, "--concurrency 1", **{kind: 99})
            self.assertRegex(printed, rf"--server http.*: {kind} no: Bearer \*\*\*$")
            self.assertFalse((TMP / f"served-{kind}.jsonl").exists())
            printed, stub = self.serve(kind, kinds, "--concurrency 1")
            self.assertEqual(len(column(f"served-{kind}")), 5)
            self.assertEqual([one[0] for one in stub.asked if one[0]], [kind])
        for kind in "403", "418", "null", "parts":  # the answer to the first question
            printed, stub = self.serve("first", "0 1", "", kind, **{"403": 99, "418": 99})
            self.assertRegex(printed, "^--server http.*: [^ ]")
            self.assertEqual((len(stub.asked), list(TMP.glob("served-first.jsonl*"))), (1, []))

    def test_a_server_that_is_away(self):
        """Is waited for, as long as --patience says."""
        late = self.start()
        late.shutdown()
        late.server_close()
        line = self.line("away", "0 1", late.url)
        self.refused("--server http.*ConnectionRefusedError", f"{line} --patience 0")

        def listen() -> None:
            late.__init__(late.server_address, Stub)
            late.serve_forever()

        timer = threading.Timer(3, listen)
        timer.daemon = True
        timer.start()
        self.assertIn("this run: 2 captions", call(line))

    def test_broken_off_and_unreachable(self):
        """A host that cannot be reached is waited for, an answer that breaks off is asked again."""
        server, tries = Server("http://a/v1", {}, patience=0, tell=lambda _: None), []

        def fails(*_, **__):
            tries.append(1)
            raise error

        with patch.object(server.opener, "open", fails), patch("caption.WAIT", 0):
            for number in errno.EHOSTUNREACH, errno.ENETUNREACH:
                error = urllib.error.URLError(OSError(number, "far away"))
                self.assertRaisesRegex(
                    ConnectionError, "no connection", server.describe, BLACK, "a"
                )
            self.assertEqual(len(tries), 2)
            error = urllib.error.URLError(ConnectionResetError("gone"))
            self.assertRegex(server.describe(BLACK, "a"), "503 no answer, ConnectionResetError")
        self.assertEqual(len(tries), 2 + 8)

    def test_interrupted(self):
        """Ctrl-C ends a run at once, while requests are under way and while it waits."""
        for kind in "hangs", "503":
            stub = self.start(**{kind: 99})
            line = self.line(f"interrupted-{kind}", f"0 {kind}", stub.url)
            heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even behind &
            options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
            process = subprocess.Popen(command(line), **options)
            while not any(one[0] == kind for one in stub.asked):
                time.sleep(0.05)
            time.sleep(0.5)
            start = time.time()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
            self.assertLess(time.time() - start, 2)
            self.assertRegex(said.splitlines()[-1], "^interrupted; start the same command again")

    def test_ways_to_the_server(self):
        """Proxies, and a path before /v1; a redirection is told, and the key does not follow it."""
        end = self.start()
        proxy, key = end.url.removesuffix("/v1"), "Bearer sk-secret"
        far, near = "http://a.invalid/v1/chat/completions", "/v1/chat/completions"
        for url, settings, want in (
            (f"{proxy}/a/v1/", {}, f"/a{near}"),
            (f"{end.url}/chat/completions", {}, near),
            ("http://a.invalid/v1", {"http_proxy": proxy}, far),
            (end.url, {"HTTP_PROXY": "x", "NO_PROXY": "127.0.0.1"}, near),
        ):
            settings |= {"OPENAI_API_KEY": "sk-secret"}
            with self.subTest(url), patch.dict(os.environ, settings):
                call(self.line("way", "0", url, f"--patience 0 --preview {TMP}/way.html"))
                self.assertEqual(end.asked[-1][2:4], (want, key))
        with patch("caption.WAIT", 0.01):
            with patch.dict(os.environ, https_proxy=proxy.replace("//", "//a:b@")):
                line = self.line("way", "0", "https://a.invalid/v1", "--patience 0")
                self.refused("--server https.*Tunnel connection failed: 403", line)
            self.assertEqual(end.asked[-1], ("a.invalid:443", "Basic YTpi"))
            moved = self.start(f"{end.url}/new", **{"308": 99})
            self.refused("--server http.*: 308 ", self.line("way", "0", moved.url, "", "308"))
        self.assertEqual(end.asked[-1], ("a.invalid:443", "Basic YTpi"))

    def test_what_is_asked(self):
        extra = {"max_completion_tokens": 9, "temperature": None, "chat_template_kwargs": {"a": 1}}
        _, stub = self.serve("body", "0", f"--extra-body '{json.dumps(extra)}' --seed 3")
        body = stub.asked[-1][4]
        self.assertEqual(body.pop("messages")[0]["content"][1], {"type": "text", "text": "0"})
        del extra["temperature"]
        self.assertEqual(body, {"model": "m", "n": 1, "top_p": 1.0, "seed": 3} | extra)
        self.refused("expected a JSON object", self.line("x", "0", stub.url, "--extra-body 3"))

    def test_concurrency(self):
        printed, stub = self.serve("many", " ".join(map(str, range(40))), "--concurrency 5")
        self.assertIn("this run: 40 captions", printed)
        self.assertIn(stub.most, range(2, 6))

    def test_images_are_sent_as_they_are_or_as_they_are_described(self):
        folder, same = TMP / "sent", set()
        for name in draw_zoo(folder):
            for side in 1024, 20:
                content = base64.b64decode(data_url(os.path.join(folder, name), side).split(",")[1])
                sent, want = Image.open(io.BytesIO(content)), load_image(folder / name)
                if content == (folder / name).read_bytes():
                    same.add((os.fsencode(name)[:4], side))
                want.thumbnail((side, side))
                self.assertEqual(sent.size, want.size)
                pixels = [np.asarray(image.convert("L")).astype(int) for image in (sent, want)]
                self.assertLess(np.abs(pixels[0] - pixels[1]).mean(), 12, "JPEG")
        self.assertEqual(same, {(b"grey", 1024), (b"two ", 1024), (b"\xff quo"[:4], 1024)})


class Readme(Base):
    """What README prints to be pasted runs where it is pasted."""

    def section(self, heading: str) -> str:
        parts = (HERE / "README.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")
        self.assertEqual(len(parts), 2, f"README.md has no section '## {heading}'")
        return parts[1].split("\n## ")[0]

    def test_captions_from_elsewhere(self):
        blocks = re.findall(r"```python\n(.*?)```", self.section("Captions from elsewhere"), re.S)
        self.assertEqual(len(blocks), 3, "the authors' .pth, COCO's json, a csv")
        self.assertLessEqual(max(block.count("\n") for block in blocks), 8)
        root, keys = TMP / "elsewhere", column("captions", "image")
        shutil.copytree(WORLD / "train", root / "imagenet/train")
        shutil.copytree(FLAT / "train", root / "coco/train")
        texts = [f'text {i},\u2028 "quoted"' for i in range(len(keys))]
        files = [key.replace("/", "-") for key in keys]
        said = [(file, {"raw": text}) for file, text in zip(files, texts, strict=True)]
        said.append(("gone.png", {"raw": "lost"}))
        images = [{"id": i, "file_name": file} for i, (file, _) in enumerate(said)]
        spoken = [{"image_id": i, "caption": one["raw"]} for i, (_, one) in enumerate(said)]
        karpathy = [{"filename": file, "sentences": [one, one]} for file, one in said]
        pth = root / "minigpt4_caption_imagenet_train_0_1281166.pth"
        torch.save(texts, pth)
        (root / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
        with open(root / "captions.csv", "w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([("caption", "image"), *zip(texts, keys, strict=True)])
        for n in 0, 1, 2, 1:
            with contextlib.chdir(root):
                exec(blocks[n], {})
            (out,) = root.glob("*.jsonl")
            found = [(line["image"], line["caption"]) for line in read_lines(out)]
            self.assertEqual(found, list(zip(files if n == 1 else keys, texts, strict=True)))
            out.unlink()
            coco = json.dumps({"images": images, "annotations": spoken})
            (root / "dataset_coco.json").write_text(coco)
        torch.save(texts[1:], pth)
        with contextlib.chdir(root), self.assertRaises(ValueError):
            exec(blocks[0], {})
        self.assertEqual(list(root.glob("*.jsonl")), [], "one caption less than images")

    def pasted(self, stage: str, script: str, use: str) -> dict:
        """What README names of a stage ("`A` to `B`", or "`A`"), the imports that it needs, and
        `use`, run in an otherwise empty file."""
        section = self.section("Copy a stage into another code base")
        named = section.split(f"{stage}: ")[1].split(f"`{script}.py`")[0]
        source = (HERE / f"{script}.py").read_text()
        code = ""
        for first, last in re.findall(r"`(\w+)`(?:\s+to\s+`(\w+)`)?", named):
            start = re.search(rf"^(@.*\n)?((def|class) )?{first}\b", source, re.M).start()
            end = rf"^((def|class) )?{last or first}\b.*\n(( .*)?\n)*"
            code += source[start : re.search(end, source, re.M).end()]
        words = set(re.findall(r"\w+", code + use))
        imports = re.findall(r"^(?:from .*)?import .*", source, re.M)
        imports = [line for line in imports if words & set(re.findall(r"\w+", line))]
        (TMP / "pasted.py").write_text("\n".join([*imports, "", code, use]))
        return runpy.run_path(str(TMP / "pasted.py"))

    def test_stages_copied(self):
        """They give what the scripts give."""
        stub, image = Serving.start(self), str(next((FLAT / "train").iterdir()))
        use = f"""
model, processor = load_model({str(MLLM)!r})
describer = Describer(model, processor, generation={{"max_new_tokens": 6, "num_beams": 1}})
found = describer.describe([({image!r}, {PROMPT!r})])
said = Server({stub.url!r}, {{"model": "m"}}).describe({image!r}, "cat")
"""
        found = self.pasted("captioning", "caption", use)
        self.assertEqual(found["said"], ["a cat caption"])
        call(caption_line("unpasted", data=FLAT / "train"))
        said = dict(zip(column("unpasted", "image"), column("unpasted"), strict=True))
        self.assertEqual(list(found["found"].values()), [[said[os.path.basename(image)]]])
        use = f"""
encoder = TextEncoder({str(ENCODER)!r})
rows = encoder(encoder.tokenize([{read_lines(CAPTIONS)[0]["caption"]!r}])[0])
"""
        rows = self.pasted("embedding", "embed", use)["rows"].float().numpy()
        np.testing.assert_allclose(rows[0], np.load(EMBEDDINGS)[0], atol=2e-3)
        use = """
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
net = Aligned(model, num_classes=3, text_width=5)
logits, images, texts, tau = net(torch.rand(4, 3, 2, 2), torch.rand(4, 5))
loss = alignment_loss("clip", images, texts, torch.ones(4, dtype=bool), tau)
loss.backward()
"""
        found = self.pasted("losses", "train", use)
        images, texts, tau = (found[name].detach() for name in ("images", "texts", "tau"))
        want = loop_loss("clip", images, texts, [True] * 4, tau.item())
        self.assertAlmostEqual(found["loss"].item(), want, places=5)
        self.assertTrue(found["model"][1].weight.grad.any())


class Embedding(Base):
    def line(self, out: str, more: str = "") -> str:
        return f"embed --captions {CAPTIONS} --out {TMP}/{out}.npy --model {ENCODER} {more}"

    def written(self, captions: list[str]) -> str:
        """The option that names these captions, of an image each."""
        lines = [{"image": f"{i}", "caption": caption} for i, caption in enumerate(captions)]
        write_lines(TMP / "written.jsonl", lines)
        return f"--captions {TMP}/written.jsonl"

    def refuses(self, pattern: str, more: str) -> None:
        self.refused(pattern, self.line("x", more))

    def check(self, captions: list[str], reference, more: str) -> str:
        """A model's rows against `reference(caption)`, one at a time; what was printed."""
        more += f" {self.written(captions)} --out-dtype float32"
        printed = call(self.line("check", more))
        for caption, row in zip(captions, np.load(TMP / "check.npy"), strict=True):
            with torch.inference_mode():
                want = F.normalize(reference(caption), dim=0).numpy()
            np.testing.assert_allclose(row, want, atol=2e-5)
        return printed

    def test_kinds_of_encoders(self):
        """CLIP's and SigLIP's projected text features, a decoder's last token, T5's encoder, and
        positions that begin behind the padding index (so that 12 of them are for 10 tokens)."""
        tokenizer = tokens("[BOS] $A [EOS]")
        text_config = text(tokenizer, max_position_embeddings=10)
        towers = {"text_config": text_config, "vision_config": VISION}
        clip = tf.CLIPModel(tf.CLIPConfig(**towers, projection_dim=16))
        siglip = tf.SiglipModel(tf.SiglipConfig(**towers))
        llama = tf.LlamaModel(tf.LlamaConfig(**text(tokenizer)))
        mpnet = tf.MPNetModel(tf.MPNetConfig(**text(tokenizer, max_position_embeddings=12)))
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        special = {"pad_token_id": 0, "decoder_start_token_id": 0}
        t5 = tf.T5Model(tf.T5Config(vocab_size=len(tokenizer), **sizes, **special))

        def ids(text: str, most: int = 10, **options) -> torch.Tensor:
            row = tokenizer(text, truncation=True, max_length=most, **options)["input_ids"]
            return torch.tensor([row])

        def siglips(text: str) -> torch.Tensor:
            return siglip.get_text_features(ids(text.lower(), padding="max_length"))[1][0]

        captions = ["a red circle", "a", "a large red circle at the top on a black background"]
        last = "--prefix 'the ' --pooling last"
        for name, model, reference, more in (
            ("clip", clip, lambda text: clip.get_text_features(ids(text))[1][0], ""),
            ("siglip", siglip, siglips, ""),
            ("mpnet", mpnet, lambda text: mpnet(ids(text))[0][0].mean(0), ""),
            ("llama", llama, lambda text: llama(ids("the " + text, 99))[0][0, -1], last),
            ("t5", t5, lambda text: t5.get_encoder()(ids(text, 99))[0][0].mean(0), ""),
        ):
            with self.subTest(name):
                save(TMP / f"encoder-{name}", model.eval(), tokenizer)
                more += f" --model {TMP}/encoder-{name}"
                self.check([*captions, "blue STAR"], reference, more)
        for has, want in (True, torch.bfloat16), (False, torch.float16):
            with patch("torch.cuda.is_bf16_supported", return_value=has):
                self.assertEqual(embed.half_type(training=False), want)

    def test_sentence_transformers_folder(self):
        """Prompt, lower case, limit, cls pooling and a Dense module, read from the files; a prompt
        that is not pooled, and older weights, from which no code is run."""
        folder, line = shutil.copytree(ENCODER, TMP / "sentence"), f"--model {TMP}/sentence"
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
        modules = [{"path": path, "type": f"models.{kind}"} for path, kind in kinds.items()]
        dense = torch.nn.Linear(64, 8)
        config = {"in_features": 64, "out_features": 8, "bias": True}
        config["activation_function"] = "torch.nn.modules.activation.Tanh"
        pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        prompts = {"prompts": {"a": "a photo of "}, "default_prompt_name": "a"}
        pools, bert = folder / "1_Pooling/config.json", folder / "sentence_bert_config.json"
        write_json(folder / "modules.json", modules)
        write_json(bert, {"max_seq_length": 6, "do_lower_case": True})
        write_json(folder / "config_sentence_transformers.json", prompts)
        write_json(pools, pooling)
        write_json(folder / "2_Dense/config.json", config)
        weights = {f"linear.{name}": value for name, value in dense.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "2_Dense/model.safetensors")
        captions = ["A RED circle", "star", "a large red circle at the top", ""]
        model = tf.BertModel.from_pretrained(ENCODER, add_pooling_layer=False).eval()
        tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(ENCODER)

        def reference(caption: str, first: int = 0) -> torch.Tensor:
            ids = tokenizer("a photo of " + caption.lower())["input_ids"][:6]
            state = model(torch.tensor([ids])).last_hidden_state[0, min(first, len(ids) - 1)]
            return torch.tanh(dense(state))

        self.check(captions, reference, line)
        (folder / "2_Dense/model.safetensors").unlink()
        torch.save(weights | {"code": Base}, folder / "2_Dense/pytorch_model.bin")
        self.refuses("UnpicklingError: Weights only", line)
        torch.save(weights, folder / "2_Dense/pytorch_model.bin")
        write_json(pools, {"pooling_mode": "cls", "include_prompt": False})
        self.check(captions, functools.partial(reference, first=3), line)
        for file, content, pattern in (
            (pools, {"pooling_mode_max_tokens": True}, "pooling max_tokens is not"),
            (pools, pooling | {"pooling_mode_mean_tokens": True}, "cls and mean is not"),
            (bert, {"modality_config": {"message": {}}}, "wants chat messages"),
            (folder / "modules.json", [{"path": "", "type": "models.CNN"}], "module CNN is not"),
        ):
            write_json(file, content)
            self.refuses(pattern, line)

    def test_the_commit_of_a_hub_model(self):
        """A branch that moves is another model; the commit is what is loaded and recorded."""
        hub = TMP / "hub" / "models--toy--encoder"
        for seed, commit in enumerate(("a" * 40, "b" * 40)):
            save_text_encoder(hub / "snapshots" / commit, seed=seed)
        (hub / "refs").mkdir()
        offline = {"HF_HUB_CACHE": str(TMP / "hub"), "HF_HUB_OFFLINE": "1"}
        for commit in ("a" * 40, "b" * 40):
            (hub / "refs" / "main").write_text(commit)
            with patch.dict(os.environ, offline):
                printed = shell(self.line("hub", "--model toy/encoder"))
            self.assertNotIn("nothing to do", printed)
            self.assertEqual(json.loads((TMP / "hub.json").read_text())["revision"], commit)
            call(self.line("direct", f"--model {hub}/snapshots/{commit}"))
            rows, direct = (np.load(TMP / f"{name}.npy") for name in ("hub", "direct"))
            self.assertTrue(np.array_equal(rows, direct))

    def save_llama(self, name: str) -> tuple[tf.LlamaModel, tf.PreTrainedTokenizerFast]:
        """A random LLM, its vectors far apart, and a tokenizer that puts BOS in front."""
        tokenizer = tokens("[BOS] $A")
        llama = tf.LlamaModel(tf.LlamaConfig(**text(tokenizer, initializer_range=0.2))).eval()
        save(TMP / name, llama, tokenizer)
        return llama, tokenizer

    def test_llm2clip(self):
        """Its published LLM's texts against plain transformers, a caption at a time: all tokens see
        each other, the mean leaves out BOS and header, a long caption keeps its end-of-turn."""
        llama, tokenizer = self.save_llama("llm")
        captions = ["a red circle", "star", "", "large star at the top " * 10, " blue cross\n"]
        want = []
        for caption in captions:
            ids = tokenizer(f"USER ASSISTANT {caption}")["input_ids"][:19] + [3]  # [EOS]
            mask = torch.zeros(1, 1, len(ids), len(ids))  # is added to the attention's logits
            with torch.inference_mode():
                states = llama(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
            want.append(F.normalize(states[3:].mean(0), dim=0).numpy())

        def cosines(more: str) -> np.ndarray:
            frame = "--prefix 'USER ASSISTANT ' --suffix ' [EOS]' --no-pool-prefix --max-length 20"
            frame += f" {self.written(captions)} --model {TMP}/llm --out-dtype float32"
            call(self.line("llm", f"{frame} {more}"))
            return (np.load(TMP / "llm.npy") * np.stack(want)).sum(1)

        for size in "--batch-tokens 1", "--batch-tokens 1000":  # unpadded and padded
            self.assertGreater(cosines(f"--bidirectional {size}").min(), 0.99999)
            self.assertLess(cosines(size).max(), 0.999)
        llama.config.is_causal = False
        llama.save_pretrained(TMP / "llm")
        self.assertGreater(cosines("").min(), 0.99999)
        identity = {"bidirectional": True, "unpooled": 3, "suffix": " [EOS]"}
        self.assertLessEqual(identity.items(), json.loads((TMP / "llm.json").read_text()).items())
        self.refuses("no effect", "--bidirectional")
        self.refuses("there is no prefix", "--no-pool-prefix")
        self.refuses("4 tokens leave none", "--max-length 4 --prefix 'a a a a'")

    def test_caption_contrastive_tuning(self):
        """Recall rises, and the tuned folder says all that is to be known of it."""
        pairs, rng, lines = f"--captions {TMP}/pairs.jsonl", random.Random(0), []
        for i in range(300):
            look = (*rng.choice(CLASSES).split("_"), *draw_look(rng))
            captions = caption_of(*look), " ".join(look)
            lines += [{"image": f"{i}", "caption": caption} for caption in captions]
        write_lines(TMP / "pairs.jsonl", lines)
        save_text_encoder(TMP / "bert", seed=1)
        self.save_llama("llama")
        frame = "--prefix 'USER ' --suffix ' [EOS]' --no-pool-prefix --bidirectional"
        saved = {"prefix": "USER ", "suffix": " [EOS]", "unpooled": 2, "bidirectional": True}
        for model, rank, more in ("bert", 0, ""), ("bert", 4, ""), ("llama", 4, frame):
            with self.subTest(model, rank=rank):
                more += f" --tune-epochs 6 --tune-batch 32 --tune-lr 0.003 --lora-rank {rank}"
                more += f" --pooling mean --model {TMP}/{model} --tuned-out {TMP}/tuned-{rank}"
                printed = call(self.line(f"tuned-{rank}", f"{pairs} {more}"))
                found = re.search(r"([\d.]+) % before, ([\d.]+) % after", printed)
                before, after = map(float, found.groups())
                self.assertGreater(after, before + 10)
                call(self.line("again", f"{pairs} --model {TMP}/tuned-{rank}"))
                again, first = (TMP / f"{name}.npy" for name in ("again", f"tuned-{rank}"))
                self.assertEqual(again.read_bytes(), first.read_bytes())
        self.assertLessEqual(saved.items(), json.loads((TMP / "again.json").read_text()).items())
        self.refuses("0 of 100 images have them", f"{self.written(['a'] * 100)} --tune-epochs 1")

    def test_lora_and_contrastive_loss(self):
        vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        vectors, texts = F.normalize(vectors, dim=1), ["a", "b", "c", "d", "a", "b"]
        want, v = 0.0, vectors.double().numpy()
        for i in range(6):
            partner = (i + 3) % 6
            own = texts[i], texts[partner]
            others = [partner, *(j for j in range(6) if texts[j] not in own)]
            want += math.log(sum(math.exp(v[i] @ v[j] / 0.05) for j in others))
            want -= v[i] @ v[partner] / 0.05
        loss = embed.caption_contrastive_loss(vectors, texts)
        self.assertAlmostEqual(loss.item(), want / 6, places=4)
        linear, x = torch.nn.Linear(5, 3).requires_grad_(False), torch.randn(2, 5)
        layer, before, w = embed.LoRA(linear, 2), linear(x), linear.weight.clone().requires_grad_()
        torch.testing.assert_close(layer(x), before)  # B starts at zero
        layer(x).square().sum().backward()
        full = torch.autograd.grad((x @ w.T + linear.bias).square().sum(), w)[0]
        torch.testing.assert_close(layer.b.weight.grad, 2 * full @ layer.a.weight.T)  # W + 2 B A
        self.assertIsNone(linear.weight.grad)
        layer.requires_grad_(False).b.weight.normal_()
        after = layer(x)
        torch.testing.assert_close(layer.merged()(x), after)
        self.assertFalse(torch.equal(before, after))

    def test_rows_against_plain_transformers(self):
        model = tf.BertModel.from_pretrained(ENCODER, add_pooling_layer=False).eval()
        tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(ENCODER)

        def reference(caption: str) -> torch.Tensor:  # at least a token
            ids = torch.tensor([tokenizer(caption)["input_ids"][:64] or [tokenizer.pad_token_id]])
            return model(ids).last_hidden_state[0].mean(0)

        captions = ["a red circle", "", "a", "star " * 200, "ünknown 漢字"]
        captions += ["a large red circle at the top on a black background", " a red circle\n"]
        printed = self.check(captions, reference, "--batch-tokens 30")
        self.assertIn("1 captions were cut at 64 tokens", printed)
        (lines_of,) = embed.lines_of_captions(TMP / "written.jsonl")
        self.assertEqual(list(lines_of.values()), [[0, 6], [1], [2], [3], [4], [5]])

    def test_killed_and_restarted(self):
        rng, words = random.Random(0), [*COLORS, *SHAPES]
        captions = [" ".join(rng.choices(words, k=rng.randint(1, 50))) for _ in range(20000)]
        more = f"{self.written(captions)} --batch-tokens 500"
        call(self.line("whole", more))
        done, out, line = TMP / "killed.npy.tmp.done", TMP / "killed.npy", self.line("killed", more)
        kill_when(lambda: done.exists() and any(done.read_bytes()), line)
        self.assertFalse(out.exists())
        self.assertFalse(all(done.read_bytes()))
        rows = np.lib.format.open_memmap(TMP / "killed.npy.tmp", "r+")
        finished = int(np.flatnonzero(rows.any(1))[0])
        rows[finished] *= -1  # a mark: what was done is not done again
        del rows
        shell(line, processes=2)
        found, want = np.load(out), np.load(TMP / "whole.npy")
        self.assertTrue(np.array_equal(found[finished], -want[finished]))
        found[finished] *= -1
        self.assertTrue(np.array_equal(found, want))
        self.assertIn("nothing to do", call(line))
        self.assertEqual(list(TMP.glob("killed.npy.tmp*")), [])

    def test_killed_while_the_rows_get_their_name(self):
        """Or their description. What is done stays done, if with smaller batches."""
        replace, ten = os.replace, self.written([f"a {word}" for word in [*COLORS, *SHAPES]])
        for last in TMP / "between.npy", TMP / "before.json":
            out, line = last.with_suffix(".npy"), self.line(last.stem, ten)

            def killed(source: str, destination: str, last=str(last)) -> None:
                if destination == last:
                    raise KeyboardInterrupt
                replace(source, destination)

            with patch("os.replace", killed), self.assertRaises(KeyboardInterrupt):
                call(line)
            rows = np.lib.format.open_memmap(f"{out}.tmp", "r+")
            done = np.memmap(f"{out}.tmp.done", np.uint8, "r+")
            rows[::2] *= -1  # a mark
            want, rows[1::2], done[1::2] = rows.copy(), 0, 0
            del rows, done
            call(f"{line} --batch-tokens 6")
            np.testing.assert_allclose(np.load(out).astype(float), want.astype(float), atol=1e-3)

    def test_models_that_are_not_whole(self):
        wider = json.loads((ENCODER / "config.json").read_text()) | {"intermediate_size": 256}
        for name, content, pattern in (
            ("tokenizer.json", POINTER, "cannot load it: JSONDecodeError"),
            ("model.safetensors", POINTER, "cannot load it: SafetensorError"),
            ("config.json", json.dumps(wider), "3 weights are missing or misshapen"),
        ):
            shutil.copytree(ENCODER, TMP / "parts", dirs_exist_ok=True)
            (TMP / "parts" / name).write_text(content)
            self.refuses(pattern, f"--model {TMP}/parts")
        shutil.copytree(ENCODER, TMP / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
        self.refuses("its tokenizer knows no words", f"--model {TMP}/mute")

    def test_refusals(self):
        with patch.dict(os.environ, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}):
            self.refuses("on one machine", "")
        self.refuses("No such file", f"--captions {TMP}/nowhere.jsonl")
        self.refuses("no such folder", f"--model {TMP}/nowhere")
        self.refuses("cannot load", f"--model {TMP}")
        self.refuses("is empty", self.written([]))
        with patch("embed.AutoTokenizer.from_pretrained", side_effect=OSError):
            self.refuses("cannot load it: OSError", "")  # an error without a text


def loop_loss(kind: str, images, texts, has: list[bool], temperature: float) -> float:
    """The alignment losses once more, in loops over float64, from their formulas."""
    i, t = images.double().numpy(), texts.double().numpy()
    described = [n for n in range(len(i)) if has[n]]
    if kind == "cosine":
        return float(np.mean([2 - 2 * i[n] @ t[n] for n in described]))

    def info_nce(queries, keys) -> float:
        terms = []
        for n in described:
            scores = {m: queries[n] @ keys[m] / temperature for m in described}
            terms.append(math.log(sum(map(math.exp, scores.values()))) - scores[n])
        return float(np.mean(terms))

    return info_nce(i, t) if kind == "infonce" else (info_nce(i, t) + info_nce(t, i)) / 2


def loss_cases(n: int):
    """(name, arguments, lam) of all losses, with and without mixing and missing texts."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for _ in range(2))
    some = torch.rand(n, generator=generator) < 0.8
    some[:3] = torch.tensor([True, False, True])
    for kind in "cosine", "infonce", "clip":
        for has in torch.ones(n, dtype=torch.bool), some:
            for lam in 1.0, 0.7:
                name = f"{kind}, {int(has.sum())} texts, lam {lam}"
                yield name, {"kind": kind, "images": images, "texts": texts, "has_text": has}, lam


def gradients_of_rank(rank: int, world: int, folder: str, device: str) -> None:
    """What DDP leaves behind on one of `world` processes: gradients of a linear map of the images,
    averaged. Images are mixed within a process: the single process takes the same blocks."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:
        backend, store = "nccl" if device == "cuda" else "gloo", f"file://{folder}/store"
        torch.distributed.init_process_group(backend, store, rank=rank, world_size=world)
    found, n, block = {}, 16, 4
    rows = slice(rank * n // world, (rank + 1) * n // world)
    labels = torch.randint(-1, 5, (n,), generator=torch.Generator().manual_seed(1)).to(device)

    def partners(loss, lam: float, *targets):
        flipped = [torch.cat([x.flip(0) for x in target.split(block)]) for target in targets]
        return lam * loss(*targets) + (1 - lam) * loss(*flipped)

    for name, case, lam in loss_cases(n):
        case = {key: x.to(device) if torch.is_tensor(x) else x for key, x in case.items()}
        weight = torch.eye(5, device=device, requires_grad=True)
        features = F.normalize(case["images"][rows] @ weight, dim=1)
        align = functools.partial(train.alignment_loss, case["kind"], features, temperature=0.3)
        loss = partners(align, lam, case["texts"][rows], case["has_text"][rows])
        logits = case["images"][rows] @ weight
        loss += partners(lambda y, x=logits: train.cross_entropy(x, y, 0.1), lam, labels[rows])
        loss.backward()
        if world > 1:
            torch.distributed.all_reduce(weight.grad)
        found[name] = weight.grad.cpu() / world
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def gradients(world: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(dir=TMP) as folder:
        torch.multiprocessing.spawn(gradients_of_rank, (world, folder, device), nprocs=world)
        return torch.load(f"{folder}/gradients.pt", weights_only=True)


class Losses(Base):
    def test_alignment_against_loops(self):
        """Images without a text are left out."""
        for name, case, lam in loss_cases(6):
            kind, images, texts, has = case.values()
            align = functools.partial(train.alignment_loss, kind, images, temperature=0.3)
            found = train.mixed(align, lam, texts, has).item()
            own = loop_loss(kind, images, texts, has.tolist(), 0.3)
            partner = loop_loss(kind, images, texts.flip(0), has.flip(0).tolist(), 0.3)
            self.assertAlmostEqual(found, lam * own + (1 - lam) * partner, 5, name)

    def test_cross_entropy_against_torch(self):
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, 3, -1, 2, 1, -1])
        for smoothing in 0.0, 0.1:
            found = train.cross_entropy(logits, labels, smoothing)
            want = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing)
            self.assertAlmostEqual(found.item(), want.item(), places=5)
        labels = labels.clamp(min=0)
        found = train.mixed(lambda y: train.cross_entropy(logits, y), 0.7, labels)
        soft = 0.7 * F.one_hot(labels, 4) + 0.3 * F.one_hot(labels.flip(0), 4)
        self.assertAlmostEqual(found.item(), F.cross_entropy(logits, soft).item(), places=5)

    def test_mixed_images(self):
        """Mixup adds the partner with 1 - lam, CutMix pastes a box of it of that share."""
        images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 20).contiguous()
        shares = []
        for mixup, cutmix in (0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0):
            args = types.SimpleNamespace(mixup=mixup, cutmix=cutmix)
            for seed in range(20):
                mixed, lam = train.mix_images(images, args, np.random.default_rng(seed))
                want = lam * images.mean((1, 2, 3)) + (1 - lam) * images.flip(0).mean((1, 2, 3))
                torch.testing.assert_close(mixed.mean((1, 2, 3)), want)
                if not cutmix:
                    self.assertEqual(mixed[0].unique().numel(), 1)
                elif not mixup:
                    self.assertTrue(set(mixed[0].unique().tolist()) <= {0.0, 3.0})
                shares.append(lam)
        self.assertEqual(shares[-20:], [1.0] * 20)
        self.assertGreater(len(set(shares[:60])), 30)

    def test_gradients_do_not_depend_on_the_number_of_processes(self):
        single = gradients(1)
        self.assertGreater(min(gradient.abs().max() for gradient in single.values()), 1e-3)
        for world in 2, 4:
            torch.testing.assert_close(gradients(world), single, rtol=1e-4, atol=1e-6)


def train_line(out: str, more: str = "", text: bool = True, data: Path = WORLD) -> str:
    """train.py's command line: two epochs of a SqueezeNet at 32 pixels."""
    line = f"train --data {data} --out {TMP / out} --arch squeezenet1_1 --input-size 32"
    line += " --epochs 2 -b 8 --lr 0.01 -j 0 --device cpu"
    aligned = f"{texts('captions')} --align-weight 1" if text else ""
    return f"{line} {aligned} {more}"


def flat_line(out: str, more: str = "") -> str:
    """The same without labels."""
    more = f"{texts('flat')} --learn-temperature --text-adapter mlp {more}"
    return train_line(out, more, text=False, data=FLAT)


def saved(run: str) -> dict:
    """The checkpoint."""
    return torch.load(TMP / run / "last.pt", map_location="cpu", weights_only=True)


def weights_of(run: str) -> dict[str, torch.Tensor]:
    return saved(run)["model"]


def plain_model(run: str) -> torch.nn.Module:
    """What torchvision builds, with the run's weights."""
    state = saved(run)
    outputs = len(state["classes"]) or 64
    kwargs = state["rebuild"]["kwargs"]
    model = torchvision.models.get_model(state["arch"], num_classes=outputs, **kwargs)
    model.load_state_dict(state["model"], strict=True)
    return model.eval()


@torch.inference_mode()
def outputs_of(model: torch.nn.Module, samples) -> torch.Tensor:
    """Of the images in (image, label) pairs, one at a time."""
    return torch.cat([model(image[None]) for image, _ in samples])


HIERA = {"embed_dim": 8, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1], "image_size": [64, 64]}
HIERA |= {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 1}
HIERA |= {"patch_stride": [2, 2], "num_query_pool": 2}  # 16 parts of 16 x 16 pixels


def same_weights(a: str, b: str, rtol: float = 0, atol: float = 0) -> None:
    torch.testing.assert_close(weights_of(a), weights_of(b), rtol=rtol, atol=atol)


def judge(run: str) -> str:
    """evaluate.py's table of a run, on the 20 images of val/."""
    return call(f"evaluate --data {WORLD}/val {TMP}/{run}/last.pt -j 0 --device cpu")


class Training(Base):
    def test_augmentation_gives_the_pixels_of_torchvision(self):
        image, flips = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8), []
        for seed in range(40):
            mode = InterpolationMode(("bilinear", "bicubic")[seed % 2])
            torch.manual_seed(seed)
            ours = train.FlippedCrop(32, interpolation=mode)(image)
            torch.manual_seed(seed)
            want = v2.RandomResizedCrop(32, interpolation=mode, antialias=True)(image)
            flips.append(bool(torch.rand(()) < 0.5))
            self.assertTrue(torch.equal(ours, want.flip(2) if flips[-1] else want))
        self.assertIn(sum(flips), range(10, 31))

    def test_images_of_all_kinds_are_trained_on_as_they_were_described(self):
        """With torchvision's decoder, without it and where it fails: load_image()'s pixels."""
        folder = TMP / "read" / "thing"
        names = [*draw_zoo(folder), "a PNG.jpg", "plain.jpeg", "grey.JPG"]
        shutil.copy(folder / "grey.png", folder / "a PNG.jpg")
        rgb = Image.open(folder / "turned.jpg")
        rgb.save(folder / "plain.jpeg")
        rgb.convert("L").save(folder / "grey.JPG")
        for decoder in train.decode_jpeg, None, Mock(side_effect=KeyError("nvjpeg")):
            with patch.object(train, "decode_jpeg", decoder):
                for name in names:
                    want = np.asarray(train.load_image(os.path.join(folder, name)))
                    found = train.read_image(os.path.join(folder, name)).permute(1, 2, 0)
                    np.testing.assert_array_equal(found.numpy(), want, name)

    def test_recipes(self):
        for recipe in "resnet", "deit", "finetune", "hiera":
            with self.subTest(recipe):
                options = "--no-pretrained --drop-path 0 --warmup-epochs 1 --layer-decay 1"
                call(train_line(f"recipe-{recipe}", f"--recipe {recipe} {options}"))
                first, *epochs = read_lines(TMP / f"recipe-{recipe}" / "log.jsonl")
                mixup = 0.8 if recipe in ("deit", "hiera") else 0.0
                self.assertEqual(first["config"]["mixup"], mixup)
                self.assertEqual(first["config"]["align_weight"], 1)  # the user's options win
                for entry in epochs:
                    self.assertEqual(entry["unreadable"], 0)
                    self.assertTrue(math.isfinite(entry["loss_align"]))

    def test_schedule(self):
        """That of torch's own schedulers."""
        args = types.SimpleNamespace(lr=0.5, min_lr=0.01, warmup_epochs=3, epochs=10)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], args.lr)
        kinds = torch.optim.lr_scheduler
        warmup = kinds.LinearLR(optimizer, 1e-6 / args.lr, total_iters=3)
        cosine = kinds.CosineAnnealingLR(optimizer, 7, eta_min=args.min_lr)
        schedule = kinds.SequentialLR(optimizer, [warmup, cosine], [3])
        for epoch in range(args.epochs):
            want = optimizer.param_groups[0]["lr"]
            self.assertAlmostEqual(train.learning_rate(args, epoch), want, places=9)
            optimizer.step()
            schedule.step()

    def test_resume_gives_the_uninterrupted_weights(self):
        more = "--epochs 4 --mixup 0.5 --ema-decay 0.9 --warmup-epochs 1 --randaugment 9 -j 1"
        log = TMP / "resumed" / "log.jsonl"
        kill_when(lambda: lines_in(log) >= 3, train_line("resumed", more))
        again = train_line("resumed", f"{more} -j 0")
        with patch("train.build_model", side_effect=AssertionError):
            self.refused("last.pt exists: go on with --resume", again)
        shell(train_line("resumed", f"{more} --resume"))
        shell(train_line("straight", f"{more} --resume"))  # nothing to resume: starts
        same_weights("resumed", "straight")
        resumed, straight = read_lines(log), read_lines(TMP / "straight" / "log.jsonl")
        self.assertEqual([entry.get("epoch") for entry in resumed], [None, 1, 2, 3, 4])
        self.assertEqual(*[[one.get("loss_ce") for one in log] for log in (resumed, straight)])
        self.refused("settings differ.*lr", f"{again} --resume --lr 0.02")
        fewer = shutil.copytree(WORLD, TMP / "fewer")
        next((fewer / "train").rglob("*.png")).unlink()
        self.refused("settings differ.*images 24 .* -> 23 ", f"{again} --resume --data {fewer}")
        (TMP / "resumed/last.pt").write_bytes(b"PK")
        self.refused("last.pt is damaged: ", f"{again} --resume")

    def test_two_processes_give_the_weights_of_one(self):
        """squeezenet has no batch norm; its dropout is the one thing that differs: switched off.
        Mixing is of the same pairs only if a batch is of one process."""
        code = "torch.nn.functional.dropout = lambda x, *args, **options: x"
        for name, line_of in ("world", train_line), ("flat", flat_line):
            for processes, batch in (1, 8), (2, 4):
                line = line_of(f"{name}{processes}", f"--seed 3 -b {batch} -j 1")
                run_behind(code, line, processes).check_returncode()
            same_weights(f"{name}1", f"{name}2", rtol=1e-3, atol=1e-5)
        random = torchvision.models.squeezenet1_1(num_classes=4).state_dict()["classifier.1.weight"]
        self.assertFalse(torch.equal(weights_of("world1")["classifier.1.weight"], random))

    def test_autocast(self):
        for amp in "bfloat16", "float16":
            call(train_line(amp, f"--amp {amp} --epochs 1"))
            for value in weights_of(amp).values():
                self.assertTrue(value.dtype == torch.float32 and value.isfinite().all())
        self.assertIn("scale", saved("float16")["scaler"])
        forward, seen = train.Aligned.forward, set()

        def look(net, *inputs):
            seen.add((net.training, torch.is_autocast_enabled("cpu")))
            return forward(net, *inputs)

        with patch.object(train.Aligned, "forward", look):
            call(train_line("looked-at", "--amp bfloat16 --epochs 1"))
        self.assertEqual(seen, {(True, True), (False, True)})

    def test_architectures(self):
        """A folder of the same name hides none."""
        archs = "mnasnet0_5 mobilenet_v3_small vit_b_16 shufflenet_v2_x0_5 googlenet"
        for arch in archs.split():
            with self.subTest(arch), contextlib.chdir(TMP):
                (TMP / arch).mkdir()
                size = 64 if arch == "googlenet" else 32
                options = f"--arch {arch} --input-size {size} --epochs 1 --ema-decay 0.5"
                call(train_line(f"arch-{arch}", options))
                plain_model(f"arch-{arch}")
                self.assertIn("| 20 |", judge(f"arch-{arch}"))

    def test_transformers_architectures(self):
        """At the size that the configuration states; and with weights as the hub has them, with a
        text model or a decoder beside the visual encoder."""
        convnext = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64}
        swin = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        vision, mean = VISION | {"image_size": 48}, [0.4, 0.5, 0.6]
        towers = {"text_config": text(tokens()), "vision_config": vision}
        for kind, config, size in (
            (tf.HieraForImageClassification, HIERA, 64),
            (tf.ConvNextV2ForImageClassification, convnext, 64),
            (tf.Swinv2ForImageClassification, swin | {"image_size": 64}, 64),
            (tf.CLIPModel, towers, 48),
            (tf.SiglipModel, towers, 48),
            (tf.Dinov2Model, vision | {"mlp_ratio": 2}, 48),
            (tf.HieraForPreTraining, HIERA, 64),
        ):
            name = kind.__name__
            with self.subTest(name):
                model = kind(kind.config_class(**config))
                save(TMP / name, model, tf.ViTImageProcessor(image_mean=mean))
                whole = "Classification" not in name
                more = f"--arch {TMP}/{name} --epochs 1 --lr 1e-9 {'--pretrained' * whole}"
                call(train_line(f"arch-{name}", more).replace("--input-size 32", ""))
                state, theirs = saved(f"arch-{name}"), model.state_dict()
                self.assertEqual((state["input_size"], state["mean"] == mean), (size, whole))
                self.assertIn("| 20 |", judge(f"arch-{name}"))
                if whole:
                    first = next(key for key in theirs if re.search("patch_embedding.*weight", key))
                    own = next(key for key in state["model"] if key.endswith(first))
                    torch.testing.assert_close(state["model"][own], theirs[first])

    def test_without_labels(self):
        """No cross-entropy and no top-1; resumed, it gives the uninterrupted run's weights."""
        printed = call(flat_line("free", "--epochs 3"))
        self.assertIn("no classes, 24 training images, 0 of val/", printed)
        first = read_lines(TMP / "free/log.jsonl")[1]
        self.assertEqual(set(first) & {"loss_ce", "loss_align", "train_top1"}, {"loss_align"})
        plain_model("free")
        stop = patch("train.report_unreadable", side_effect=[0, 0, KeyboardInterrupt])
        with stop, self.assertRaises(KeyboardInterrupt):
            call(flat_line("stopped", "--epochs 3"))
        call(flat_line("stopped", "--epochs 3 --resume"))
        same_weights("free", "stopped")
        self.refused("has no classes: pass", train_line("x", text=False, data=FLAT))
        for option in "--align-weight 0.5", "--label-smoothing 0.1", "--projection linear":
            self.refused("does nothing without labels", flat_line("x", option))

    def test_init(self):
        """From a run without labels to one with them: all weights but the last layer's."""
        call(flat_line("first", "--epochs 1"))
        file, state = TMP / "first/last.pt", saved("first")
        torch.save(state | {"mean": [0.1, 0.2, 0.3]}, file)
        printed = call(train_line("second", f"--init {file} --epochs 1 --lr 1e-9"))
        self.assertIn("all weights but 2: classifier.1.weight, classifier.1.bias\n", printed)
        found = saved("second")
        self.assertEqual(found["mean"], [0.1, 0.2, 0.3])
        self.assertEqual(len(found["model"]["classifier.1.weight"]), 4)
        name = "features.0.weight"
        torch.testing.assert_close(found["model"][name], state["model"][name])
        self.assertEqual(found["settings"]["init"], state["settings"] | {"epoch": 1})
        self.refused("none of its weights fits", train_line("x", f"--init {file} --arch resnet18"))
        torch.save(Base, TMP / "code.pt")
        self.refused("--init .*no such file", train_line("x", f"--init {TMP}/nowhere.pt"))
        self.refused("--init .*UnpicklingError", train_line("x", f"--init {TMP}/code.pt"))

    def test_nothing_of_a_batch_stays(self):
        """The hook on the last layer rests in validation; the averaged copy has none."""
        model = torchvision.models.squeezenet1_1(num_classes=4)
        net = train.Aligned(model, num_classes=4, text_width=8)
        net(torch.zeros(2, 3, 32, 32), torch.zeros(2, 8))
        self.assertIsNone(net.features)
        model.eval()(torch.zeros(2, 3, 32, 32))
        self.assertIsNone(net.features)

    def test_stale_embeddings_are_refused(self):
        first, *rest = read_lines(CAPTIONS)
        edited = [first | {"caption": "other"}, *rest]
        for changed in edited, [first, *rest][::-1], [first, *rest, first]:
            write_lines(TMP / "changed.jsonl", changed)
            self.refused("run embed.py again", train_line("x", f"--captions {TMP}/changed.jsonl"))

    def test_missing_captions_and_bad_images(self):
        world, lines = shutil.copytree(WORLD, TMP / "holes"), read_lines(CAPTIONS)
        second, foreign = lines[7] | {"caption": "a second one"}, lines[7] | {"image": "gone/1.png"}
        line = train_line("few1", embedded("few", [*lines[5:], second, foreign]), data=world)
        images = sorted((world / "train").rglob("*.png"))
        damaged = next((world / "val").rglob("*.png"))
        for file in images[3], damaged:
            file.write_bytes(b"nothing")
        printed, bare = call(line), lines[0]["image"]
        self.assertIn(f"5 of 24 training images have no caption: '{bare}', say", printed)
        self.assertIn("1 captions belong to no image of train/: 'gone/1.png', say", printed)
        for file in images[3], damaged:
            reason = f"'{file}' (UnidentifiedImageError: cannot identify image file"
            self.assertIn(f"1 unreadable images left out: {reason}", printed)
        for file in images[4:20]:
            file.write_bytes(b"nothing")
        printed = call(f"{line} --out {TMP}/few2")  # the seven that are left will do
        self.assertIn("17 unreadable images left out", printed)
        for file in images:
            file.write_bytes(b"nothing")
        self.refused("no training image can be read", f"{line} --out {TMP}/none")

    def test_captions_are_matched_by_key(self):
        """Whatever their order in the file, of several one is drawn; none is a vector of zeros."""
        lines = read_lines(CAPTIONS)
        keys = sorted(line["image"] for line in lines)
        random.Random(0).shuffle(lines)
        lines = [*lines[1:], *lines[1:5]]
        embedded("order", lines)
        captions = train.Captions(str(TMP / "order.jsonl"), str(TMP / "order.npy"), keys, None)
        rows = F.normalize(torch.from_numpy(np.load(TMP / "order.npy").astype(np.float32)), dim=1)
        samples = [(str(WORLD / "train" / key), 0) for key in keys]
        images = train.Images(samples, 8, train.read_image, v2.Resize((8, 8)), captions)
        for i, key in enumerate(keys):
            drawn = images[i, 0][2]
            own = [row for row, line in zip(rows, lines, strict=True) if line["image"] == key]
            close = [torch.allclose(drawn, row) for row in own or [torch.zeros(64)]]
            self.assertTrue(any(close), key)

    def test_shuffled_captions(self):
        files = CAPTIONS, str(EMBEDDINGS), column("captions", "image")
        seeds = None, 1, 1, 2
        straight, one, same, two = (train.Captions(*files, seed).rows.tolist() for seed in seeds)
        self.assertEqual(straight, list(range(24)))
        self.assertEqual((one, sorted(one)), (same, straight))
        self.assertTrue(one != straight and one != two)

    def test_rates_that_are_low_or_lacking(self):
        """A cosine falls, warm-up takes half the epochs at most, a lacking rate is asked for."""

        def rates(more: str) -> list[float]:
            args = arguments(f"train --data d --out {TMP}/none --device cpu {more}")
            return [train.learning_rate(args, epoch) for epoch in range(args.epochs)]

        for lr in 1e-5, 3e-6, 0.1:
            found = rates(f"--lr {lr} --epochs 4")
            self.assertEqual(found[0], lr)
            self.assertEqual(found, sorted(found, reverse=True))
            self.assertLess(found[-1], 0.3 * lr)
        self.assertEqual(rates("--recipe finetune --epochs 1"), [0.01])
        self.assertEqual(rates("--recipe deit --epochs 2 -b 512")[1], 5e-4)
        self.assertEqual(rates("--recipe llm2clip -b 8 --captions c --embeddings e")[0], 1e-5)
        self.assertEqual(rates("--lr 1 --min-lr 0.5 --epochs 3")[0], 1)
        line = train_line("x", "--optimizer adamw").replace("--lr 0.01", "")
        self.refused("no rate for --optimizer adamw: pass --lr", line)
        self.refused("--min-lr is between", train_line("x", "--min-lr 1"))

    def test_half_precision_weights_train_in_float32(self):
        vit = tf.ViTForImageClassification(tf.ViTConfig(**VISION)).half()
        save(TMP / "half", vit, tf.ViTImageProcessor())
        for more in "", "--pretrained":
            run = f"half{more}"
            call(train_line(run, f"--arch {TMP}/half {more} --epochs 1 --lr 1e-4"))
            state = saved(run)
            self.assertEqual({x.dtype for x in state["model"].values()}, {torch.float32})
            self.assertEqual(state["rebuild"]["config"]["dtype"], "float32")
            self.assertIn("| 20 |", judge(run))

    def test_a_node_without_the_checkpoint(self):
        """Only the first node's process writes last.pt: the other would go on elsewhere."""
        code = 'sys.argv[sys.argv.index("--out") + 1] += os.environ["RANK"]'
        line = train_line("node-", "--epochs 1 -b 4 --resume")
        run_behind(code, line, 2).check_returncode()
        self.assertTrue((TMP / "node-0/last.pt").exists())
        result = run_behind(code, line, 2)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("other nodes have another: copy the latest one to all", result.stderr)

    def test_memory_of_workers(self):
        """What a loading process copies of 200,000 names, after it has seen all of them."""
        if not Path("/proc/self/smaps_rollup").exists():
            self.skipTest("this system does not tell what memory a process has to itself")
        samples = [(f"{TMP}/a/{i:030d}.jpeg", 0) for i in range(200_000)]
        black = torch.zeros(3, 1, 1, dtype=torch.uint8)
        images = train.Images(samples, 1, lambda path: black, torch.nn.Identity())

        def private_memory() -> int:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))

        reader, writer = os.pipe()
        gc.collect()
        gc.freeze()
        if not (child := os.fork()):
            before = private_memory()
            for i in range(len(samples)):
                images[i, 0]
            gc.collect()
            os.write(writer, str(private_memory() - before).encode())
            os._exit(0)
        os.waitpid(child, 0)
        gc.unfreeze()
        self.assertLess(int(os.read(reader, 20)), 4_000_000)

    def test_layer_decay(self):
        """Against lists written by hand: a power, and of which parameters."""
        hiera = tf.HieraForImageClassification(tf.HieraConfig(**HIERA, num_labels=4))
        vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 16, num_classes=4)
        clip = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION))
        swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=4)
        lists = {
            hiera: "6 hiera.embeddings, 5 hiera.encoder.stages.0, 4 hiera.encoder.stages.1, "
            "3 hiera.encoder.stages.2.layers.0, 2 hiera.encoder.stages.2.layers.1, "
            "1 hiera.encoder.stages.3, 0 hiera.pooler, 0 classifier",
            vit: "3 class_token, 3 conv_proj, 3 encoder.pos_embedding, 0 encoder.ln, 0 heads, "
            "2 encoder.layers.encoder_layer_0, 1 encoder.layers.encoder_layer_1",
            clip: "3 vision_model.embeddings, 3 vision_model.pre_layrnorm, "
            "2 vision_model.encoder.layers.0, 1 vision_model.encoder.layers.1, "
            "0 vision_model.post_layernorm, 0 visual_projection",
            swin: "3 features.0, 2 features.1, 2 features.2, 1 features.3, 0 norm, 0 head",
        }
        for model, parts in lists.items():
            parts = [part.split() for part in parts.split(", ")]
            scales = train.layer_scales(model, 0.5)
            want = {}
            for name, _ in model.named_parameters():
                (want[name],) = [0.5 ** int(n) for n, part in parts if name.startswith(part)]
            self.assertEqual(scales, want)
        args = {"lr": 0.1, "weight_decay": 0.05, "layer_decay": 0.5, "optimizer": "adamw"}
        args = types.SimpleNamespace(**args, beta2=0.95, device="cpu")
        net, scales = train.Aligned(clip, text_width=64), train.layer_scales(clip, 0.5)
        optimizer = train.make_optimizer(net, args, None)
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in clip.named_parameters():
            decay = 0 if re.search("norm|bias|position|class_embedding", name) else 0.05
            found = {key: group_of[parameter][key] for key in ("scale", "weight_decay")}
            self.assertEqual(found, {"scale": scales[name], "weight_decay": decay}, name)
        self.assertEqual(group_of[net.log_temperature]["scale"], 1)
        self.assertEqual(optimizer.defaults["betas"], (0.9, 0.95))
        tf.ViTConfig(**VISION).save_pretrained(TMP / "decayed")
        call(train_line("decayed", f"--arch {TMP}/decayed --layer-decay 0.5 --epochs 1 --lr 0.1"))
        rates = {group["lr"] for group in saved("decayed")["optimizer"]["param_groups"]}
        self.assertEqual(rates, {0.1 * 0.5**n for n in range(4)})
        self.refused("no transformer blocks", train_line("x", "--layer-decay 0.5"))

    def test_tower_of_clip(self):
        """Without labels a CLIP is its class token's projection, from the first step on, and what
        evaluation measures is what transformers' own class gives."""
        towers = {"text_config": text(tokens()), "vision_config": VISION | {"projection_dim": 64}}
        whole = tf.CLIPModel(tf.CLIPConfig(**towers, projection_dim=64))
        save(TMP / "clip", whole.half(), tf.CLIPImageProcessor(**SQUARE))
        line = flat_line("tower", f"--recipe llm2clip --arch {TMP}/clip --epochs 1 -b 8 --lr 1e-12")
        self.assertIn("--pretrained: all weights but 0", call(line))
        state, kind = saved("tower"), tf.CLIPVisionModelWithProjection
        self.assertAlmostEqual(state["log"][1]["tau"], 0.07, places=6)
        self.assertEqual(state["rebuild"]["class"], kind.__name__)
        tower = kind(tf.CLIPVisionConfig(**state["rebuild"]["config"])).eval()
        tower.load_state_dict(state["model"], strict=True)
        theirs = kind.from_pretrained(TMP / "clip").float().eval()
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(tower(images).image_embeds, theirs(images).image_embeds)
        line = f"evaluate --data {FLAT}/train {TMP}/tower/last.pt -j 0 --device cpu"
        self.assertIn("image->text R@1", call(f"{line} {texts('flat')}"))
        tf.CLIPVisionConfig(**VISION, projection_dim=16).save_pretrained(TMP / "narrow")
        call(flat_line("narrow", f"--arch {TMP}/narrow --epochs 1"))
        self.assertEqual(saved("narrow")["rebuild"]["config"]["projection_dim"], 64)
        call(train_line("labelled", f"--arch {TMP}/clip --epochs 1"))
        self.assertEqual(saved("labelled")["rebuild"]["class"], "CLIPForImageClassification")

    def test_machines_and_files_that_fail(self):
        line = train_line("x", "--arch shufflenet_v2_x0_5")
        self.refused("-b 1: the head's batch norm needs two images", f"{line} -b 1")
        fail = "import unittest.mock\ntorch.utils.data.DataLoader.__iter__ = unittest.mock.Mock"
        for error, sentence in (
            ("RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus.')", "/dev/shm"),
            ("RuntimeError('unable to write to file </torch_7_1>: No space')", "/dev/shm"),
            ("torch.OutOfMemoryError('CUDA out of memory')", "out of memory: try a smaller -b"),
            ("FileNotFoundError(2, 'No such file', 'ROOT')", "ROOT: No such file"),
        ):
            result = run_behind(f"{fail}(side_effect={error})", line)
            self.assertEqual(result.returncode, 1)
            self.assertIn(sentence, result.stderr.splitlines()[-1])
        tf.ViTForImageClassification(tf.ViTConfig(**VISION)).save_pretrained(TMP / "pointer")
        (TMP / "pointer/model.safetensors").write_text(POINTER)
        self.refused("no classifier .*: ", train_line("x", f"--arch {TMP}/pointer --pretrained"))
        wrapped = {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 4}
        write_json(TMP / "timm/config.json", wrapped)
        self.refused("no classifier .*: .*timm", train_line("x", f"--arch {TMP}/timm"))

    def test_what_is_not_validated_is_not_saved(self):
        saved = []
        save = patch("torch.save", lambda state, _: saved.append(state["epoch"]))
        with save, patch("os.replace"):
            call(train_line("sparse", "--epochs 5 --val-every 2"))
        self.assertEqual(saved, [2, 4, 5])

    def test_averages(self):
        """Parameters and running statistics, against a loop; counters are the last ones."""
        call(train_line("mean-1", "--epochs 1 --arch shufflenet_v2_x0_5 -b 24 --ema-decay 0.75"))
        state, want = saved("mean-1"), {}
        torch.manual_seed(0)
        start = torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict()
        for name, first in start.items():
            last = state["model"][name]
            want[name] = 0.75 * first + 0.25 * last if first.is_floating_point() else last
        torch.testing.assert_close(dict(state["ema"]), want)

    def test_stochastic_depth_of_transformers(self):
        tf.Dinov2Config(**VISION).save_pretrained(TMP / "depth")
        call(train_line("depth-run", f"--arch {TMP}/depth --drop-path 0.3 --epochs 1"))
        self.assertEqual(saved("depth-run")["rebuild"]["config"]["drop_path_rate"], 0.3)
        tf.ViTConfig(**VISION).save_pretrained(TMP / "no-depth")
        line = train_line("x", f"--arch {TMP}/no-depth --drop-path 0.3")
        self.refused("no stochastic depth: pass --drop-path 0", line)
        least = []
        for scale in 0.08, 0.9:
            crop = train.FlippedCrop(8, (scale, 1.0))
            sizes = [crop.make_params([torch.zeros(3, 100, 100)]) for _ in range(50)]
            least.append(min(size["height"] * size["width"] for size in sizes) / 1e4)
        self.assertLess(least[0], 0.5)
        self.assertGreater(least[1], 0.85)

    def test_learned_temperature(self):
        """It moves, but not below 0.01."""
        call(train_line("tau", "--learn-temperature --temperature 0.005 --lr 1e-6"))
        self.assertAlmostEqual(saved("tau")["log"][-1]["tau"], 0.01, places=4)
        call(train_line("tau2", "--learn-temperature --temperature 0.5 --text-adapter mlp"))
        self.assertNotAlmostEqual(saved("tau2")["log"][-1]["tau"], 0.5, places=4)

    def test_refusals(self):
        line = functools.partial(train_line, "x")
        self.refused("--align-weight does nothing without", line("--align-weight 1", text=False))
        sentence = "no classifier of this name and input size: "
        self.refused(f"{sentence}.*torchvision has none", line("--arch resnet5O"))
        self.refused(sentence, line("--arch inception_v3 --input-size 32"))
        self.refused("has no stochastic depth", line("--drop-path 0.1"))
        with patch("train.build_model", side_effect=AssertionError("before it is told")):
            self.refused("do not fill one batch", line("-b 100"))
        self.assertRaises(FileNotFoundError, call, line(data=TMP / "nowhere"))
        self.refused("No such file.*run embed.py", line(f"--embeddings {TMP}/nowhere.npy"))
        void = shutil.copytree(WORLD, TMP / "void")
        (void / "train/empty").mkdir()
        sentence = "no valid file for the classes empty"
        self.assertRaisesRegex(FileNotFoundError, sentence, call, line(data=void))
        np.save(TMP / "vector.npy", np.zeros(7, np.float32))
        shutil.copy(EMBEDDINGS.with_suffix(".json"), TMP / "vector.json")
        self.refused("run embed.py again", line(f"--embeddings {TMP}/vector.npy"))
        sentence = "not finite in the 50 steps up to step 3 of epoch 1: loss (nan|inf)"
        self.refused(sentence, line("--lr 1e30 --epochs 2"))
        training = patch("train.train_epoch", side_effect=AssertionError)
        with training, self.assertRaises(FileExistsError):
            call(train_line(CAPTIONS.name))
        self.refused("does nothing without a contr", line("--align-loss cosine --temperature 1"))
        shutil.copytree(WORLD / "train", TMP / "no-val/train")
        (TMP / "no-val/val/red_circle").mkdir(parents=True)
        self.refused("no image", train_line("x", data=TMP / "no-val"))
        self.assertEqual(train.first_line(ValueError()), "ValueError: ")
        self.refused("--seed at 0", line("--seed -1"))
        self.refused("--mixup, --cutmix start at 0", line("--mixup -0.1"))
        self.refused("invalid choice", line("--randaugment 31"))
        self.refused("shares: above 0, at most 1", line("--layer-decay 1.1"))
        self.refused("--crop-ratio are above 0", line("--crop-ratio 0"))
        self.assertRaises(ValueError, train.alignment_loss, "ctr", None, None, None)


def mae_line(out: str, more: str = "") -> str:
    """Two epochs of that Hiera as a masked auto-encoder on images without labels."""
    line = f"train --data {FLAT} --out {TMP / out} --recipe mae --arch {TMP}/hiera-mae"
    return f"{line} --drop-path 0 --lr 0.01 --epochs 2 -b 8 -j 0 --device cpu {more}"


class Pretraining(Base):
    """Masked auto-encoders, and what is fine-tuned from them."""

    def setUp(self):
        if not (TMP / "hiera-mae").exists():
            tf.HieraConfig(**HIERA).save_pretrained(TMP / "hiera-mae")
            call(mae_line("mae", "--epochs 8"))

    def test_it_learns_and_shows_what_it_learned(self):
        _, *epochs = read_lines(TMP / "mae/log.jsonl")
        self.assertLess(epochs[-1]["loss_mae"], epochs[0]["loss_mae"] - 0.02)
        self.assertEqual(set(epochs[0]) & {"loss_ce", "loss_align", "train_top1"}, set())
        width, height = Image.open(TMP / "mae/reconstruction.png").size
        self.assertTrue(width > 3 * 64 and height > 8 * 64)
        sample, transform = [("", 0)], lambda image: image
        images = train.Images(sample, 64, lambda _: torch.zeros(3, 64, 64), transform, noise=4)
        first, again, other = (images[0, seed][2].tolist() for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertEqual(len({*first, *other}), 8, "each draw hides other parts")

    def test_reconstruction(self):
        """Left the image; in the middle hidden patches are grey, the others as they are; right the
        hidden ones are the network's, those it saw are as they are: of Hiera and of ViTMAE, whose
        output has another order. Of a perfect prediction the right is the left."""
        vit = tf.ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1)
        vit.update({"decoder_num_attention_heads": 2, "image_size": 64})
        hiera = tf.HieraConfig(**HIERA)
        images, side = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 8
        for kind, config in (tf.HieraForPreTraining, hiera), (tf.ViTMAEForPreTraining, vit):
            for normalised in True, False:
                config.normalize_pixel_loss = config.norm_pix_loss = normalised
                model = kind(config)
                left, middle, right = train.reconstruct(model, images).split(64, dim=3)
                torch.testing.assert_close(left, images)
                seen = middle.unfold(2, side, side).unfold(3, side, side).abs().amax((1, 4, 5)) > 0
                self.assertLess(abs(seen.float().mean() - (1 - config.mask_ratio)), 0.05)
                seen = seen.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
                torch.testing.assert_close(middle, images * seen)
                torch.testing.assert_close(right * seen, images * seen)
                self.assertGreater(((right - images) * ~seen).abs().mean(), 0.01)
                perfect = self.perfect(model, normalised)
                with patch.object(model, "forward", perfect):
                    left, _, right = train.reconstruct(model, images).split(64, dim=3)
                torch.testing.assert_close(right, left, atol=1e-3, rtol=0)

    def perfect(self, model, normalised: bool):
        """A forward() that predicts just what the model's own loss wants."""
        forward = model.forward

        def predict(pixels):
            output = forward(pixels)
            if hasattr(model, "get_pixel_label_2d"):
                everything = torch.ones_like(output.bool_masked_pos)
                target = model.get_pixel_label_2d(pixels, everything).view(output.logits.shape)
            else:
                target = model.patchify(pixels)
                if normalised:
                    mean, deviation = target.mean(-1, True), target.var(-1, keepdim=True)
                    target = (target - mean) / (deviation + 1e-6) ** 0.5
            output.logits = target
            return output

        return predict

    def test_resumed_and_in_two_processes(self):
        stop = patch("train.report_unreadable", side_effect=[0, KeyboardInterrupt])
        with stop, self.assertRaises(KeyboardInterrupt):
            call(mae_line("mae-stopped"))
        call(mae_line("mae-stopped", "--resume"))
        call(mae_line("mae-straight"))
        shell(mae_line("mae-two", "-b 4"), processes=2)
        same_weights("mae-straight", "mae-stopped")
        same_weights("mae-straight", "mae-two", rtol=1e-3, atol=1e-5)

    def test_images_that_cannot_be_read_are_no_part_of_the_loss(self):
        """Nor do they move the weights: in another folder without them the batch is as large."""
        damaged = shutil.copytree(FLAT, TMP / "mae-damaged") / "train"
        for i in range(8):
            (damaged / f"{i}.png").write_bytes(b"nothing")
        more = "--epochs 1 --lr 1e-12"
        printed = call(mae_line("mae-hurt", f"--data {damaged.parent} {more} -b 32"))
        self.assertIn("8 unreadable images left out: ", printed)
        call(mae_line("mae-well", f"{more} -b 24"))
        # the same weights, other random crops and masks: near, where 8 black images would be far
        logs = [read_lines(TMP / run / "log.jsonl")[1] for run in ("mae-hurt", "mae-well")]
        self.assertAlmostEqual(logs[0]["loss_mae"], logs[1]["loss_mae"], delta=0.02)
        for file in damaged.iterdir():
            file.write_bytes(b"nothing")
        self.refused("no training image can be read", mae_line("x", f"--data {damaged.parent}"))

    def test_fine_tuning(self):
        """From its weights, with three poolings of the query; evaluation wants the fine-tuned."""
        line = train_line("tuned", f"--recipe hiera --arch {TMP}/hiera-mae --epochs 1", text=False)
        line = line.replace("--input-size 32", "--input-size 64 --drop-path 0.1")
        printed = call(f"{line} --init {TMP}/mae/last.pt --lr 1e-9")
        self.assertIn("num_query_pool is 3", printed)
        self.assertRegex(printed, r"all weights but 4: hiera.pooler.*, classifier")
        state = saved("tuned")
        self.assertEqual(state["rebuild"]["class"], "HieraForImageClassification")
        self.assertEqual(state["rebuild"]["config"]["num_query_pool"], 3)
        self.assertEqual(state["rebuild"]["config"]["drop_path_rate"], 0.1)
        name = "hiera.encoder.stages.0.layers.0.attn.qkv.weight"
        torch.testing.assert_close(state["model"][name], weights_of("mae")[name])
        self.assertIn("| 20 |", judge("tuned"))
        sentence = "is an auto-encoder: fine-tune it first, train.py --init"
        self.assertRaisesRegex(SystemExit, sentence, judge, "mae")

    def test_refusals(self):
        line = mae_line("x")
        self.refused("no masked auto-encoder .* input size: ", f"{line} --input-size 32")
        self.refused("no masked auto-encoder of this name", f"{line} --arch resnet50")
        tf.ViTConfig(**VISION).save_pretrained(TMP / "no-mae")
        self.refused("hides no part of an image", f"{line} --arch {TMP}/no-mae")
        tf.HieraConfig(**HIERA | {"decoder_depth": None}).save_pretrained(TMP / "no-decoder")
        self.refused("lacks decoder_depth", f"{line} --arch {TMP}/no-decoder")
        for option in "--mixup 0.8", "--label-smoothing 0.1":
            self.refused("learns from images alone", f"{line} {option}")
        vit = f"{line} --arch {TMP}/vit-mae"
        tf.ViTMAEConfig(**VISION, decoder_hidden_size=16).save_pretrained(TMP / "vit-mae")
        self.refused("no stochastic depth: pass --drop-path 0", f"{vit} --drop-path 0.1")
        self.refused("pass --captions and --embeddings, or --mae", train_line("x", "", False, FLAT))


def recall(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recall@k of scores [image, text], in loops; owner: the image of each text."""
    found = {"image->text": {}, "text->image": {}}
    for k in 1, 5, 10:
        best = [set(owner[np.argsort(-row)[:k]]) for row in scores]
        found["image->text"][k] = np.mean([i in owners for i, owners in enumerate(best)])
        hits = [owner[t] in np.argsort(-column)[:k] for t, column in enumerate(scores.T)]
        found["text->image"][k] = np.mean(hits)
    return {f"{way} R@{k}": 100 * x for way, each in found.items() for k, x in each.items()}


class Evaluation(Base):
    line = "evaluate -j 0 --device cpu"
    val = f"{line} --data {WORLD}/val"
    judged = f"{val} {TMP}/judged/last.pt"
    preset = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()

    def same_measures(self, found: dict, want: dict) -> None:
        self.assertEqual(list(found), list(want))
        for name, percent in want.items():
            self.assertAlmostEqual(found[name], percent, places=4, msg=name)

    def setUp(self):
        if not (TMP / "judged" / "last.pt").exists():
            call(train_line("judged", "--ema-decay 0.5"))

    def results(self, line: str) -> list[dict]:
        (TMP / "results.jsonl").unlink(missing_ok=True)
        call(f"{line} --out {TMP}/results.jsonl")
        return read_lines(TMP / "results.jsonl")

    def test_subset_by_name_and_unknown_class(self):
        for name in "purple_star", "red_circle":
            shutil.copytree(WORLD / "val" / name, TMP / "subset" / name)
        line = f"{self.line} --data {TMP}/subset {TMP}/judged/last.pt"
        self.assertIn("top-1 % among these 2 classes", call(line))
        result, folder = self.results(line)[0], ImageFolder(TMP / "subset", PRESET)
        logits, classes = outputs_of(plain_model("judged"), folder), saved("judged")["classes"]
        two = torch.tensor([classes.index(name) for name in folder.classes])
        guesses = {"top1": logits.argmax(1), "top1_among_these": two[logits[:, two].argmax(1)]}
        for name, guess in guesses.items():
            top1 = 100 * (guess == two[folder.targets]).float().mean().item()
            self.assertAlmostEqual(result[name], top1, places=4)
        (TMP / "subset/purple_star").rename(TMP / "subset/pink_star")
        self.refused("does not know, the first is 'pink_star'", line)

    def test_averaged_weights(self):
        state = saved("judged")
        last, averaged = (state[kind]["classifier.1.weight"] for kind in ("model", "ema"))
        self.assertFalse(torch.equal(averaged, last))
        self.assertIn("| 20 |", call(f"{self.judged} --ema"))

    def test_interval_and_groups(self):
        a = np.array([1, 1, 0, 0, 1, 0, 0, 1], bool)
        b = np.array([1, 1, 1, 0, 0, 1, 1, 1], bool)  # differences 0 0 1 0 -1 1 1 0: mean 2/8
        mean, half = evaluate.paired_difference(a, b)
        self.assertAlmostEqual(mean, 25.0)
        deviation = math.sqrt((4 - 8 * 0.25**2) / 7)
        self.assertAlmostEqual(half, 100 * 1.96 * deviation / math.sqrt(8), places=6)
        for seed in 1, 2:
            call(train_line(f"judged-{seed}", f"--ema-decay 0.5 --seed {seed}"))
        line = f"{self.judged} {TMP}/judged-1/last.pt {TMP}/judged-2/last.pt"
        top1 = [result["top1"] for result in self.results(line)]
        means = f"{np.mean(top1):.2f} +- {np.std(top1, ddof=1):.2f}"
        self.assertIn(f"| 3 | {TMP}/judged/last.pt | {means} |", call(line))

    def test_groups_of_seeds(self):
        same = {"data": "val", "arch": "a", "epoch": 1, "selected": "last epoch", "images": 9}
        same |= dict.fromkeys(("top5", "top1_among_these", "difference", "interval"), 0)
        same |= {"classes": 4, "of_classes": 4, "text": {}, "parameters": 1, "images_per_s": 1}
        same["reference"] = "plain-1"
        rows = []
        for name, found, init in (
            ("plain", {1: 10.0, 2: 14.0}, None),
            ("aligned", {1: 16.0, 2: 18.0, 3: 50.0}, None),
            ("from", {1: 20.0, 2: 22.0}, {"epoch": 1}),  # of a run with the same seed
        ):
            for seed, top1 in found.items():
                settings = {"name": name, "seed": seed, "init": init and init | {"seed": seed}}
                one = {"checkpoint": f"{name}-{seed}", "top1": top1, "settings": settings}
                rows.append(same | one)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            unfinished = rows[1] | {"epoch": 0, "top1": 90.0, "checkpoint": "half"}
            # a run that is named twice counts once, one that is not finished is not like the others
            evaluate.report([*rows, rows[0], unfinished], ["val"])
        self.assertIn("| 2 | plain-1 | 12.00 +- 2.83 |", printed.getvalue())
        self.assertIn("| 3 | aligned-1 | 28.00 +- 19.08 (+5.00 +- 1.41) |", printed.getvalue())
        self.assertIn("| 2 | from-1 | 21.00 +- 1.41 (+9.00 +- 1.41) |", printed.getvalue())

    def test_retrieval(self):
        rng = np.random.default_rng(0)
        features = rng.normal(size=(30, 8)).astype(np.float32)
        texts = rng.normal(size=(50, 8)).astype(np.float32)
        owner = rng.permutation(np.arange(50) % 25)
        found = evaluate.retrieval(features, texts, owner)
        self.same_measures(found, recall(features[:25] @ texts.T, owner))

    def text(self, name: str = "val") -> str:
        """The options that name a caption and its embedding of each image of val/."""
        if not (TMP / f"{name}.npy").exists():
            template = f"--model template --prompt 'a {{class}}' --out {TMP}/{name}.jsonl"
            call(f"caption --data {WORLD}/val {template}")
            embedded(name, read_lines(TMP / f"{name}.jsonl"))
        return texts(name)

    def test_texts(self):
        printed = call(f"{self.judged} {self.text()}")
        self.assertRegex(printed, r"image->text R@1 .* text->image R@10")
        call(train_line("plain", "--epochs 1", text=False))
        line = f"{self.val} {TMP}/plain/last.pt {self.text()}"
        self.refused("than no captions, of .*plain", line)
        for wrong in "[]", "3", "null", "{}", "{":
            (TMP / "wrong.jsonl").write_text(f"{wrong}\n")
            options = f"--captions {TMP}/wrong.jsonl --embeddings {TMP}/val.npy"
            self.refused("captions and embeddings: ", f"{self.judged} {options}")
        strangers = embedded("strangers", [{"image": "x.png", "caption": "a"}])
        self.refused("none of its images is in", f"{self.judged} {strangers}")
        save_text_encoder(TMP / "another", seed=7)
        call(f"embed --captions {TMP}/val.jsonl --out {TMP}/val2.npy --model {TMP}/another")
        another = f"--captions {TMP}/val.jsonl --embeddings {TMP}/val2.npy"
        self.refused("embeddings has another weights_sha256", f"{self.judged} {another}")

    def test_text_measures_against_loops(self):
        """With a head that has a BatchNorm, and unequal texts of equal captions."""
        text = self.text("random")
        rows = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(TMP / "random.npy", rows)
        call(train_line("normed", "--arch shufflenet_v2_x0_5"))
        model, folder = plain_model("normed"), ImageFolder(WORLD / "val", PRESET)
        first, last = torch.nn.Linear(1024, 128, bias=False), torch.nn.Linear(128, 64)
        model.fc = torch.nn.Sequential(first, torch.nn.BatchNorm1d(128), torch.nn.ReLU(), last)
        model.fc.load_state_dict(saved("normed")["projection"])
        features = F.normalize(outputs_of(model.eval(), folder), dim=1)
        paths = [Path(path).relative_to(WORLD / "val").as_posix() for path, _ in folder.samples]
        self.assertEqual(column("random", "image"), paths)
        found = self.results(f"{self.val} {TMP}/normed/last.pt {text} -b 7")[0]["text"]
        self.same_measures(found, recall(features.numpy() @ rows.T, np.arange(20)))

    def test_models_and_folders_without_labels(self):
        """Odd images in no class folder through all stages; with a text adapter and without."""
        images, text = TMP / "unlabelled" / "train", TMP / "unlabelled.jsonl"
        draw_zoo(images)
        (images / "rgba.png").unlink()  # it has another one's pixels, and so its rank
        (images / "cut.jpg").write_bytes((images / "turned.jpg").read_bytes()[:500])
        describe = f"caption --data {images} --out {text} -j 0"
        self.refused("not in class folders", f"{describe} --model template --prompt 'a {{class}}'")
        call(f"{describe} --model {MLLM} --prompt '{PROMPT}' --max-new-tokens 6")
        keys = column("unlabelled", "image")
        self.assertEqual(keys, sorted(set(os.listdir(images)) - {"cut.jpg"}))
        files = embedded("unlabelled", read_lines(text))
        rows = torch.randn(len(keys), 64, generator=torch.Generator().manual_seed(0))
        rows = F.normalize(rows, dim=1)
        np.save(TMP / "unlabelled.npy", rows.numpy())  # random captions may be equal
        samples = [(PRESET(train.load_image(images / key)), -1) for key in keys]
        for adapter in "none", "mlp":
            run = TMP / f"unlabelled-{adapter}"
            more = f"{files} -b 4 --text-adapter {adapter}"
            call(train_line(run.name, more, text=False, data=images.parent))
            adapt = torch.nn.Identity()
            if adapter == "mlp":
                adapt = train.text_adapter(64)
                adapt.load_state_dict(saved(run.name)["adapter"])
            features = F.normalize(outputs_of(plain_model(run.name), samples))
            scores = features @ F.normalize(adapt(rows)).detach().T
            found = self.results(f"{self.line} --data {images} {run}/last.pt {files}")[0]
            self.assertNotIn("top1", found)
            self.same_measures(found["text"], recall(scores.numpy(), np.arange(len(keys))))
            self.refused("has no classes: pass --captions", f"{self.val} {run}/last.pt")
        printed = call(f"{self.judged} {TMP}/unlabelled-mlp/last.pt {self.text()}")
        self.assertRegex(printed.splitlines()[-1], r"unlabelled-mlp.* \| 20 \|  \|  \| ")

    def test_several_folders_numeric_names_and_published_weights(self):
        numeric = TMP / "numeric"
        for i, name in enumerate(sorted(CLASSES[:2] + CLASSES[-2:])):
            shutil.copytree(WORLD / "val" / name, numeric / str(i))
        printed = call(f"{self.judged} --data {numeric}")
        rows = [line.split("|")[5:8] for line in printed.splitlines() if "last.pt" in line]
        self.assertEqual(rows[0], rows[1])
        self.assertIn(f"**{numeric}**", printed)
        model = torchvision.models.squeezenet1_1()
        # the published weights are not to be had offline
        with patch("torchvision.models.get_model", lambda *_, **__: model):
            printed = call(f"{self.line} --data {numeric} squeezenet1_1")
            self.assertIn("SqueezeNet1_1_Weights.IMAGENET1K_V1 | 20 |", printed)
            # ImageNet's folders, of which all but one are empty here, name those of a subset beside
            for i in range(1000):
                (TMP / "synsets" / f"n{i:08d}").mkdir(parents=True, exist_ok=True)
            image = self.preset(Image.open(next((WORLD / "val/red_circle").iterdir())))
            fifth = outputs_of(model.eval(), [(image, 0)]).topk(5).indices[0, 4].item()
            for root, i in ("synsets", 0), ("some-synsets", fifth), ("some-synsets", 3):
                folder = TMP / root / f"n{i:08d}"
                shutil.copytree(WORLD / "val/red_circle", folder, dirs_exist_ok=True)
            some = f"--data {TMP}/some-synsets squeezenet1_1"
            result = self.results(f"{self.line} --data {TMP}/synsets {some}")[1]
            images = ImageFolder(TMP / "some-synsets", self.preset)
            labels = torch.tensor([int(images.classes[i][1:]) for i in images.targets])
            nearest = outputs_of(model, images).topk(5).indices == labels[:, None]
            for k, name in (1, "top1"), (5, "top5"):
                top = 100 * nearest[:, :k].any(1).float().mean().item()
                self.assertAlmostEqual(result[name], top, places=4)
            known = "class.* that squeezenet1_1 does not know, the first is"
            self.refused(f"has 2 {known}", f"{self.line} {some}")
            self.refused(f"has 4 {known}", f"{self.val} squeezenet1_1")

    def test_odd_images_reach_the_model_upright_and_scaled(self):
        """As torchvision's preprocessing gives them, of what load_image() reads."""
        folder = TMP / "odd/7"
        names = sorted(draw_zoo(folder))
        model, seen = torchvision.models.squeezenet1_1(), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with patch("torchvision.models.get_model", lambda *_, **__: model):
            call(f"{self.line} --data {TMP}/odd squeezenet1_1")
        images = [train.load_image(os.path.join(folder, name)) for name in names]
        self.assertTrue(torch.equal(torch.cat(seen), torch.stack([self.preset(x) for x in images])))

    def test_one_bad_image(self):
        folder = shutil.copytree(WORLD / "val", TMP / "damaged")
        broken = next(folder.rglob("*.png"))
        broken.write_bytes(b"nothing")
        printed = call(f"{self.line} --data {folder} {TMP}/judged/last.pt")
        reason = f"'{broken}' (UnidentifiedImageError: cannot identify image file"
        self.assertIn(f"1 unreadable images, not counted: {reason}", printed)
        self.assertIn("| 19 |", printed)

    def test_refusals(self):
        torch.save({"model": Base}, TMP / "code.pt")
        torch.save({"model": weights_of("judged")}, TMP / "foreign.pt")
        for name in "code", "foreign":  # all are looked at before the first is evaluated
            line = f"{self.judged} {TMP}/{name}.pt --out {TMP}/early.jsonl"
            self.refused("no torchvision model, and no checkpoint", line)
        self.assertFalse((TMP / "early.jsonl").exists())
        self.refused("no checkpoint: FileNotFound", f"{self.val} resnet5O")
        self.assertRaises(FileNotFoundError, call, f"{self.line} --data {TMP}/nowhere resnet18")
        self.refused("--ema does nothing", f"{self.val} resnet18 --ema")


class OnGPU(Base):
    """What the CPU gives, a GPU gives. With GPU_TESTS_ON=cpu in the environment these tests run on
    the CPU, so that they can be tested themselves."""

    device = os.environ.get("GPU_TESTS_ON", "cuda")

    @classmethod
    def setUpClass(cls):
        if cls.device == "cuda" and not torch.cuda.is_available():
            raise unittest.SkipTest("torch finds no GPU here")
        NO_GPU.stop()
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is float32, to compare with the CPU's

    @classmethod
    def tearDownClass(cls):
        del os.environ["NVIDIA_TF32_OVERRIDE"]
        NO_GPU.start()

    def train(self, out: str, device: str, more: str = "") -> dict:
        """The checkpoint of one epoch of a ViT, which has no dropout and no batch norm."""
        tf.ViTConfig(**VISION).save_pretrained(TMP / "gpu-vit")
        call(train_line(out, f"--arch {TMP}/gpu-vit --epochs 1 --device {device} {more}"))
        return saved(out)

    def caption(self, out: str, device: str, dtype: str) -> list[str]:
        more = f"--batch-size 16 --device {device} --dtype {dtype}"
        call(caption_line(out, more))
        return column(out)

    def embed(self, out: str, device: str, dtype: str) -> np.ndarray:
        line = f"embed --captions {CAPTIONS} --out {TMP}/{out}.npy --model {ENCODER}"
        call(f"{line} --device {device} --dtype {dtype} --out-dtype float32")
        return np.load(TMP / f"{out}.npy")

    def test_four_stages_in_half_precision(self):
        for dtype in "bfloat16", "float16":
            with self.subTest(dtype):
                captions = self.caption(f"gpu-{dtype}", self.device, dtype)
                self.assertEqual((len(captions), "" in captions), (24, False))
                rows = self.embed(f"gpu-rows-{dtype}", self.device, dtype)
                np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-2)
                more = f"--arch resnet18 --amp {dtype}"
                state = self.train(f"gpu-train-{dtype}", self.device, more)
                self.assertEqual("scale" in state["scaler"], dtype == "float16")
                for weight in state["model"].values():
                    self.assertNotEqual(weight.dtype, getattr(torch, dtype))
                    self.assertTrue(weight.isfinite().all())
                run = TMP / f"gpu-train-{dtype}/last.pt"
                line = f"evaluate --data {WORLD}/val {run} -j 0 --device {self.device}"
                self.assertIn("| 20 |", call(line))

    def test_captions_and_embeddings(self):
        captions = [self.caption(f"gpu-{d}", d, "float32") for d in ("cpu", self.device)]
        self.assertEqual(*captions)
        cpu, gpu = (self.embed(f"gpu-rows-{d}", d, "float32") for d in ("cpu", self.device))
        self.assertGreater((cpu * gpu).sum(1).min(), 0.9999)
        half = self.embed("gpu-rows-auto", self.device, "auto")  # float32 weights, under autocast
        self.assertGreater((cpu * half).sum(1).min(), 0.99)

    def test_losses_and_gradients(self):
        torch.testing.assert_close(gradients(1, self.device), gradients(1), rtol=1e-3, atol=1e-5)

    def test_training_and_averages(self):
        cpu = self.train("gpu-cpu", "cpu", "--ema-decay 0.5")
        gpu = self.train("gpu-gpu", self.device, "--ema-decay 0.5 --amp off")
        for part in "model", "ema", "projection":
            torch.testing.assert_close(cpu[part], gpu[part], rtol=1e-3, atol=1e-4)
        line = f"evaluate --data {WORLD}/val {TMP}/gpu-gpu/last.pt -j 0 --out {TMP}/gpu-eval.jsonl"
        for device in "cpu", self.device:
            call(f"{line} --device {device}")
        results = [result["top1"] for result in read_lines(TMP / "gpu-eval.jsonl")[-2:]]
        self.assertAlmostEqual(*results)
        self.assertAlmostEqual(gpu["val_top1"], results[0])

    def test_resume(self):
        more = "--amp off --epochs 2"
        self.train("gpu-straight", self.device, more)
        stop = patch("train.report_unreadable", side_effect=[0, 0, KeyboardInterrupt])
        with stop, self.assertRaises(KeyboardInterrupt):
            self.train("gpu-stopped", self.device, more)
        self.train("gpu-stopped", self.device, f"{more} --resume")
        same_weights("gpu-straight", "gpu-stopped", rtol=1e-3, atol=1e-4)

    def test_compile(self):
        self.train("gpu-plain", self.device, "--amp off")
        self.train("gpu-compiled", self.device, "--amp off --compile")
        same_weights("gpu-plain", "gpu-compiled", rtol=1e-3, atol=1e-4)

    def test_out_of_memory_is_halved(self):
        generate, sizes = Describer.generate, []

        def greedy(describer, inputs, **changes):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 3:
                torch.empty(10**15, device=self.device)
            return generate(describer, inputs, **changes)

        with patch.object(Describer, "generate", greedy):
            captions = self.caption("gpu-memory", self.device, "float32")
        self.assertEqual(len(captions), 24)
        self.assertGreater(max(sizes), 3)

    def test_two_gpus(self):
        """NCCL's gradients are the single process's."""
        if self.device == "cuda" and torch.cuda.device_count() < 2:
            self.skipTest("torch finds one GPU here, not two")
        torch.testing.assert_close(gradients(2, self.device), gradients(1), rtol=1e-3, atol=1e-5)


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main() -> None:
    runner = unittest.TextTestRunner(verbosity=2, resultclass=Result)
    result = unittest.main(exit=False, testRunner=runner).result
    wrong = [getattr(test, "test_case", test) for test, _ in result.failures + result.errors]
    failed = len({test.id() for test in wrong})  # a test once, whatever its subtests
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        run_demo(Path((sys.argv[2:] or ["demo"])[0]))
    elif sys.argv[1:2] == ["gpu"]:
        with tempfile.TemporaryDirectory() as folder:
            run_gpu(Path((sys.argv[2:] or ["imagenet/val"])[0]), Path(folder))
    else:
        main()
