"""Train a vision model: stage 3 of 4, behind caption.py and embed.py.

In:  --data ROOT               ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; or only
                               ROOT/train/<image>: images without labels
     --captions, --embeddings  what caption.py and embed.py wrote for ROOT/train
Out: RUN/last.pt               plain model weights, and what is needed to evaluate and to resume
     RUN/log.jsonl             first the configuration, then one object per epoch
     RUN/reconstruction.png    of --mae: eight images, what was seen of them, what was predicted

What is given decides what is minimised. f(x) is the input of the classifier's last layer g, t the
frozen embedding of a caption of x, h a small head that is used in training only:

    labels             CE(g(f(x)), y)                                     the baseline
    labels and texts   CE(g(f(x)), y) + lambda * L_align(h(f(x)), t)      GPT4Image, 2306.00693
    texts              L_align(f(x), t), f(x): the model's output         LLM2CLIP, 2411.04997
    --mae              the squared error of the hidden patches' pixels    Hiera, 2306.00989

Launch:
    python train.py --data imagenet --out runs/baseline --recipe resnet
    torchrun --standalone --nproc_per_node=4 train.py --data imagenet --out runs/aligned \\
        --recipe resnet --captions captions.jsonl --embeddings embeddings.npy
    python train.py --data imagenet --out runs/mae --recipe mae
    python train.py --data imagenet --out runs/hiera --recipe hiera --init runs/mae/last.pt
    the same line with --resume after a kill
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

try:  # twice as fast as Pillow; deprecated since torchvision 0.29, one day it will be gone
    from torchvision.io import decode_jpeg, read_file
except ImportError:
    decode_jpeg = None

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# What a recipe puts before the user's own options: resnet (the defaults) and deit are the paper's,
# mae and hiera those of Hiera-B, llm2clip is LLM2CLIP's, finetune ours. In the official code lambda
# is 0.3, but acts as 0.3 / W on its W = 4 (ResNet) or 8 (DeiT) processes, since its gather keeps
# the local gradient only; here W does not matter. Of timm's DeiT, RandAugment's spread is missing.
ADAMW = "--optimizer adamw --weight-decay 0.05 "
MIXED = "--label-smoothing 0.1 --mixup 0.8 --cutmix 1.0 --randaugment 27 --random-erasing 0.25 "
MIXED += "--interpolation bicubic --drop-path 0.1 --align-weight 0.0375 --temperature 0.05 "
RECIPES = {
    "resnet": "",
    "deit": f"--arch vit_b_16 --epochs 300 --batch-size 128 --warmup-epochs 5 {ADAMW}{MIXED}"
    "--color-jitter 0.3 --repeated-aug 3 --ema-decay 0.99996 --crop-ratio 1.0",
    "finetune": "--pretrained --epochs 30 --batch-size 64 --warmup-epochs 1 --min-lr 0.0",
    "mae": f"--mae --arch facebook/hiera-base-224-mae-hf --epochs 400 --batch-size 64 {ADAMW}"
    "--beta2 0.95 --warmup-epochs 40 --min-lr 0 --crop-scale 0.2 --drop-path 0.2 "
    "--interpolation bicubic",
    "hiera": f"--arch facebook/hiera-base-224-mae-hf --epochs 100 --batch-size 64 {ADAMW}{MIXED}"
    "--layer-decay 0.7 --warmup-epochs 5 --min-lr 0",
    "llm2clip": f"--arch openai/clip-vit-large-patch14-336 --pretrained --epochs 4 {ADAMW}"
    "--batch-size 512 --lr 1e-5 --layer-decay 0.85 --clip-grad 5 --min-lr 0 --text-adapter mlp "
    "--learn-temperature --temperature 0.07",
}
RATES = {"resnet": 0.1 / 256, "deit": 5e-4 / 512, "finetune": 0.01 / 64}  # --lr per image
RATES |= {"mae": 8e-4 / 4096, "hiera": 2e-3 / 1024}  # of a step, with the recipe's optimizer
NEED_TEXT = ["--align-weight", "--align-loss", "--temperature", "--projection", "--text-adapter"]
NEED_TEXT += ["--shuffle-captions", "--learn-temperature", "--mix-text", "--no-mix-text"]
NEED_LABELS = ["--align-weight", "--projection", "--label-smoothing"]
FREE = ["data", "out", "captions", "embeddings", "device", "workers", "rank", "resume"]
FREE += ["compile", "val_every"]  # all other options decide about the weights
EPOCHS_APART, IMAGES_APART = 10_007, 1_000_000_007  # primes: random streams that do not meet
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- The command line ----------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    p.usage = "%(prog)s --data ROOT --out RUN [options; --help lists them]"
    p.epilog = "".join(f"\n--recipe {name}: {options}" for name, options in RECIPES.items())
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    add("--data", required=True, help="folder with train/ and val/")
    add("--out", required=True, metavar="RUN", help="folder for checkpoints and the log")
    add("--captions", help="captions.jsonl of train/")
    add("--embeddings", help="embeddings.npy of these captions")
    add("--recipe", default="resnet", choices=RECIPES, help="sets the defaults listed below")
    add("--arch", default="resnet50", help="torchvision classifier, or transformers' id or folder")
    add("--pretrained", action=flag, default=False, help="start from published weights")
    add("--init", metavar="FILE", help="start from another run's weights, where shapes fit")
    add("--mae", action="store_true", help="train a masked auto-encoder on train/, without labels")
    add("--epochs", type=int, default=120, help="passes over the training images")
    add("-b", "--batch-size", type=int, default=256, help="images per process")
    add("--lr", type=float, help="peak learning rate (the recipe's, scaled with the global batch)")
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="sgd: with momentum 0.9")
    add("--beta2", type=float, default=0.999, help="how slowly adamw forgets squared gradients")
    add("--weight-decay", type=float, default=1e-4, help="adamw spares norms and biases")
    add("--layer-decay", type=float, default=1.0, help="a block's rate is this share of the next's")
    add("--warmup-epochs", type=int, default=0, help="linear, from 1e-6; at most half of all")
    add("--min-lr", type=float, help="where the cosine ends (1e-5, or a tenth of --lr if lower)")
    add("--label-smoothing", type=float, default=0.0, help="share that all classes get of a label")
    add("--mixup", type=float, default=0.0, help="blends two images: parameter of Beta, 0 = off")
    add("--cutmix", type=float, default=0.0, help="pastes instead; with both, a batch draws one")
    add("--crop-scale", type=float, default=0.08, help="smallest area of a random crop")
    number = {"type": int, "choices": range(31), "metavar": "0..30"}
    add("--randaugment", default=0, help="its magnitude (timm's m9 is 27)", **number)
    add("--color-jitter", type=float, default=0.0, help="changes brightness, contrast, saturation")
    add("--random-erasing", type=float, default=0.0, help="probability that a part is erased")
    add("--repeated-aug", type=int, default=1, help="N: takes 1/N of the images, N times each")
    add("--drop-path", type=float, default=0.0, help="rate at which the last block is skipped")
    add("--ema-decay", type=float, default=0.0, help="average the weights, too; 0 = off")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient, 0 = off")
    add("--input-size", type=int, help="pixels (what the architecture was published with)")
    add("--interpolation", default="bilinear", choices=["bilinear", "bicubic"], help="of resizing")
    add("--crop-ratio", type=float, default=0.875, help="validation: resize to input size / this")
    add("--align-loss", default="clip", choices=["clip", "infonce", "cosine"], help="L_align")
    add("--align-weight", type=float, default=0.075, help="lambda, weighs L_align (beside labels)")
    add("--temperature", type=float, default=0.2, help="tau of the contrastive losses")
    add("--learn-temperature", action="store_true", help="train tau, as CLIP does")
    add("--projection", default="mlp", choices=["mlp", "linear"], help="the head h")
    add("--text-adapter", default="none", choices=["none", "mlp"], help="mlp: train one behind t")
    add("--shuffle-captions", action="store_true", help="the control: take other images' captions")
    add("--mix-text", action=flag, default=True, help="align a mixed image with both captions")
    add("--amp", default="auto", choices=["auto", "bfloat16", "float16", "off"], help="on a GPU")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--val-every", type=int, default=1, help="validate and save each so many epochs, and last")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("-j", "--workers", type=int, help="data loading processes (up to 8; on a CPU a quarter)")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    add("--resume", action="store_true", help="go on from RUN/last.pt, if it is there")
    recipe = RECIPES[p.parse_args().recipe]
    args = p.parse_args([*recipe.split(), *sys.argv[1:]])
    args.rank, args.world_size = process_rank()
    args.device = choose_device(args.device, args.world_size)
    if args.workers is None:  # on a CPU, the model needs the cores
        cpus = CPUS // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = max(1, cpus // 4) if args.device == "cpu" else min(8, cpus)
    if args.lr is None:
        if ("adamw" in recipe) != (args.optimizer == "adamw"):
            p.error(f"{args.recipe} has no rate for --optimizer {args.optimizer}: pass --lr")
        args.lr = RATES[args.recipe] * args.batch_size * args.world_size
    args.min_lr = min(1e-5, args.lr / 10) if args.min_lr is None else args.min_lr
    args.warmup_epochs = min(args.warmup_epochs, args.epochs // 2)
    check(p, args)
    return args


def process_rank() -> tuple[int, int]:
    """Rank and number of processes as torchrun sets them; (0, 1) where it is not used."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is world is None:
        return 0, 1
    if not re.fullmatch(r"\d+/\d+", f"{rank}/{world}") or int(rank) >= int(world):
        raise SystemExit(f"RANK={rank}, WORLD_SIZE={world}: start with torchrun, or unset both")
    return int(rank), int(world)


def choose_device(name: str | None, world: int) -> str:
    """The device of that name, else the accelerator that torch finds, else cpu; of several GPUs
    this process's own becomes the current one. SystemExit where there is no such device."""
    here = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name or here or "cpu")
        if device.type not in ("cpu", here and here.type):
            raise RuntimeError(f"torch finds {here or 'no GPU'} on this machine")
        if device.index is not None and world > 1:
            raise RuntimeError("several processes would share it: name it without a number")
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {str(error).splitlines()[0]}") from error
    return str(device)


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be, or would do nothing."""
    if os.path.exists(os.path.join(args.out, "last.pt")) and not args.resume:
        p.error(f"{args.out}/last.pt exists: go on with --resume, or choose another --out")
    if args.init and not os.path.isfile(args.init):
        p.error(f"--init {args.init}: there is no such file")
    if bool(args.captions) != bool(args.embeddings):
        p.error("--captions and --embeddings go together")
    if args.mae and (args.embeddings or args.mixup or args.cutmix or args.label_smoothing):
        p.error("--mae learns from images alone: no captions, mixup, cutmix, label smoothing")
    if not args.embeddings:
        if args.recipe == "llm2clip":
            p.error("--recipe llm2clip aligns with texts: pass --captions and --embeddings")
        refuse_idle(NEED_TEXT, "--captions and --embeddings")
    if args.align_loss == "cosine":
        refuse_idle(["--temperature", "--learn-temperature"], "a contrastive loss")
    counts = args.epochs, args.batch_size, args.repeated_aug, args.val_every
    if min(*counts, args.workers + 1, args.seed + 1) < 1:
        p.error("--epochs, -b, --repeated-aug and --val-every start at 1, -j and --seed at 0")
    if min(args.temperature, args.lr, args.crop_ratio, 1 - args.ema_decay) <= 0:
        p.error("--temperature, --lr and --crop-ratio are above 0, --ema-decay is below 1")
    if not (0 < args.layer_decay <= 1 and 0 < args.crop_scale <= 1):
        p.error("--layer-decay and --crop-scale are shares: above 0, at most 1")
    if min(args.align_weight, args.mixup, args.cutmix) < 0 or not 0 <= args.min_lr <= args.lr:
        p.error("--align-weight, --mixup, --cutmix start at 0, --min-lr is between 0 and --lr")


def refuse_idle(options: list[str], lacking: str) -> None:
    """SystemExit if the user typed an option that does nothing without what is `lacking`."""
    typed = {word.split("=")[0] for word in sys.argv[1:]}
    for option in options:
        if option in typed:
            raise SystemExit(f"{option} does nothing without {lacking}")


# ---- Images and texts ----------------------------------------------------------------------------


# Names of editors, of macOS' archives, of our own parts: no class and no image.
HIDDEN = re.compile(r"\..*|__MACOSX|.*\.parts", re.DOTALL)


def list_images(folder: str, allow_empty: bool = False) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (path, class) of FOLDER/<class>/<image> in torchvision's ImageFolder order;
    of FOLDER/<image> no names, and -1. SystemExit if there are both; OSError if there is none."""

    def is_image(path: str) -> bool:
        inner = path[len(folder) :].split(os.sep)
        return path.lower().endswith(IMG_EXTENSIONS) and not any(map(HIDDEN.fullmatch, inner))

    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [e.name for e in entries if e.is_dir() and not HIDDEN.fullmatch(e.name)]
    loose = [e.name for e in entries if e.is_file() and is_image(e.path)]
    if classes and loose:
        both = f"images ({loose[0]}) beside class folders ({classes[0]}/)"
        raise SystemExit(f"{folder} holds {both}: move one of the two away")
    index = {name: i for i, name in enumerate(classes)} or {"": -1}
    return classes, make_dataset(folder, index, None, is_image, allow_empty)


def list_data(args: argparse.Namespace) -> tuple[list, list[tuple[str, int]], list]:
    """Class names, and (path, label) of train/ and of val/. Without class folders there are no
    names, no labels (-1) and no val/. With --mae all labels are 0, until an image is unreadable."""
    train, val = os.path.join(args.data, "train"), os.path.join(args.data, "val")
    classes, samples = list_images(train)
    if args.mae:
        return [], [(path, 0) for path, _ in samples], []
    if not classes and not args.embeddings:
        raise SystemExit(f"{train} has no classes: pass --captions and --embeddings, or --mae")
    if not classes:
        refuse_idle(NEED_LABELS, f"labels, and {train} has no class folders")
        return [], samples, []
    val_classes, val_samples = list_images(val, allow_empty=True)
    strangers = sorted(set(val_classes) - set(classes))
    if strangers:
        raise SystemExit(f"{val} has classes that train/ has not: {strangers[:5]}")
    if not val_classes or not val_samples:
        raise SystemExit(f"{val} has no images in class folders")
    return classes, samples, [(path, classes.index(val_classes[i])) for path, i in val_samples]


def read_captions(file: str) -> Iterator[tuple[str, str]]:
    """(image, stripped caption) of each line; SystemExit says what is wrong with one, and where."""
    if not os.path.isfile(file) or not os.path.getsize(file):
        raise SystemExit(f"{file}: No such file, or it is empty: run caption.py first")
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            wrong = f"{file}, line {number}"
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{wrong} is not JSON in UTF-8: {error}") from error
            if not isinstance(entry, dict):
                raise SystemExit(f"{wrong} is no JSON object with an image and a caption")
            for name in "image", "caption":
                if not isinstance(entry.get(name), str):
                    value = json.dumps(entry[name])[:50] if name in entry else "missing"
                    raise SystemExit(f'{wrong}: its "{name}" is {value}, not a string')
            caption = entry["caption"].encode("utf-8", "replace")  # lone surrogates stop tokenizers
            yield entry["image"], caption.decode().strip()


class Captions:
    """Which rows of embeddings.npy are image i's: rows[starts[i]:starts[i + 1]], in the order of
    `keys`; the array itself stays on the disk. `shuffle`: the seed of the control, or None."""

    def __init__(self, captions: str, embeddings: str, keys: list[str], shuffle: int | None):
        index = {key: i for i, key in enumerate(keys)}
        images = [image for image, _ in read_captions(captions)]
        owner = np.array([index.get(image, -1) for image in images])  # of each row
        try:
            self.identity = json.loads(Path(embeddings).with_suffix(".json").read_text("utf-8"))
            shape = np.load(embeddings, mmap_mode="r").shape
        except (OSError, ValueError) as error:
            raise SystemExit(f"{embeddings}: {first_line(error)}: run embed.py") from error
        with open(captions, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self.file, self.table, self.width = embeddings, None, self.identity.get("width")
        if digest != self.identity.get("captions_sha256") or shape != (len(owner), self.width):
            raise SystemExit(f"{captions} is not what {embeddings} holds: run embed.py again")
        counts = np.bincount(owner[owner >= 0], minlength=len(keys))
        bare, strangers = np.flatnonzero(counts == 0), np.flatnonzero(owner < 0)
        if len(bare):
            key = keys[bare[0]]
            print(f"{len(bare)} of {len(keys)} training images have no caption: {key!r}, say")
        if len(strangers):
            key = images[strangers[0]]
            print(f"{len(strangers)} captions belong to no image of train/: {key!r}, say")
        if len(strangers) == len(owner):
            raise SystemExit("no caption belongs to train/: was that caption.py's --data?")
        self.rows = np.argsort(owner, kind="stable")[len(strangers) :]
        self.starts = np.cumsum([0, *counts])
        if shuffle is not None:
            self.rows = np.random.default_rng(shuffle).permutation(self.rows)

    def draw(self, image: int) -> Tensor:
        """float32 [width]: one of the image's captions at random, of length 1; else zeros."""
        start, end = self.starts[image : image + 2]
        if start == end:
            return torch.zeros(self.width)
        if self.table is None:  # opened by each worker for itself
            self.table = np.load(self.file, mmap_mode="r")
        row = self.rows[end - 1 - int(torch.randint(end - start, ()))]
        return F.normalize(torch.from_numpy(self.table[row].astype(np.float32)), dim=0)


PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # a comment costs no image
T = Image.Transpose  # what undoes the orientations 2 to 8 of EXIF
TURNS = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
TURNS |= {6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}


def orientation(image: Image.Image) -> int:
    """As EXIF, TIFF or XMP state it; 1, upright, where what they state is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many kinds; it costs no image
        return 1


def load_image(path: str) -> Image.Image:
    """8-bit RGB, upright, first frame, transparency on white. Raises what Pillow raises, and
    ValueError for pixels that are neither of 8 nor of 16 bits."""
    with Image.open(path) as image:
        image.load()  # the orientation may stand behind the pixels
        turn = TURNS.get(orientation(image))
        image = image if turn is None else image.transpose(turn)
        if image.mode == "F" or image.mode.startswith("I"):  # convert() clips them to 255
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"mode {image.mode}: which number is white? Save it as 8 bits")
            image = Image.fromarray((values // 256).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_image(path: str) -> Tensor:
    """uint8 [3, H, W]: load_image()'s pixels, of JPEG files in half the time."""
    if decode_jpeg and path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(Exception):  # a PNG by another name, say
            data = read_file(path)
            content = data.numpy().tobytes()
            turned = b"Exif" in content or b"Orientation" in content  # perhaps
            if not turned or orientation(Image.open(io.BytesIO(content))) not in TURNS:
                image = decode_jpeg(data)
                if len(image) in (1, 3):  # not CMYK
                    return image.expand(3, -1, -1)
    return v2.functional.pil_to_tensor(load_image(path))


class Images(Dataset):
    """Item (index, seed): uint8 image [S, S, 3], label, text [D], and why it cannot be read ("": it
    can; else its label is -1). The random state is the item's own: augmentation does not depend on
    workers or processes. `transform`: what `read` gives -> uint8 [3, S, S]. The text is a caption's
    embedding (zeros: none) or, for an auto-encoder, `noise` numbers that say what it will see."""

    def __init__(self, samples, size, read: Callable, transform: Callable, captions=None, noise=0):
        # arrays: workers share them, but would copy a list of a million names object by object
        self.paths = np.array([os.fsencode(path) for path, _ in samples], bytes)
        self.labels = np.array([label for _, label in samples], int)
        self.size, self.read, self.transform = size, read, transform
        self.captions, self.noise = captions, noise

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, Tensor, str]:
        index, seed = item
        path, label, reason = os.fsdecode(self.paths[index]), int(self.labels[index]), ""
        text = torch.zeros(self.captions.width if self.captions else self.noise)
        in_worker = torch.utils.data.get_worker_info() is not None  # a random state to itself
        with contextlib.nullcontext() if in_worker else torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image = self.read(path)
            except Exception as error:  # one bad image costs that image
                image, label = torch.zeros(3, self.size, self.size).byte(), -1
                reason = f"{path!r} ({first_line(error)})"
            else:  # a fault of ours is no unreadable image
                image = self.transform(image)
                text = self.captions.draw(index) if self.captions else torch.rand(self.noise)
        # channels-last, as the model wants it: batches need no transposition
        return image.permute(1, 2, 0).contiguous(), label, text, reason


def report_unreadable(reasons: set[str]) -> int:
    """Print those of all processes; how many they are."""
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, reasons)
        reasons = set().union(*parts)
    if reasons:
        print(f"{len(reasons)} unreadable images left out: {', '.join(sorted(reasons)[:5])}")
    return len(reasons)


class EpochSampler(Sampler):
    """(index, seed) of this process's positions in an epoch's random order. At the same global
    batch, batch k is the same set of images at every number of processes. Without an epoch it
    yields nothing, so that iter(loader) can start the workers."""

    def __init__(self, length: int, positions: range, seed: int, copies: int = 1):
        self.length, self.positions, self.seed, self.copies = length, positions, seed, copies
        self.epoch = None

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.epoch is None:
            return
        stream = self.seed * EPOCHS_APART + self.epoch
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(stream))
        order = order.repeat_interleave(self.copies)
        for position in self.positions:
            yield int(order[position]), (stream * IMAGES_APART + position) % 2**63


class FlippedCrop(v2.RandomResizedCrop):
    """And a horizontal flip, of a uint8 image [3, H, W]; channels-last, where both are faster."""

    def forward(self, image: Tensor) -> Tensor:
        top, left, height, width = self.make_params([image]).values()
        crop = image[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, self.size, mode=self.interpolation.value, antialias=True)
        return (crop.flip(3) if torch.rand(()) < 0.5 else crop)[0]


def transforms(args: argparse.Namespace, size: int) -> tuple[v2.Compose, v2.Compose]:
    """Training's, on uint8 tensors; for evaluation torchvision's own, on Pillow's images."""
    interpolation, scale = InterpolationMode(args.interpolation), (args.crop_scale, 1.0)
    steps = [FlippedCrop(size, scale, interpolation=interpolation)]
    if args.randaugment:  # tensors cannot be rotated bicubically
        bilinear = InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(magnitude=args.randaugment, interpolation=bilinear))
    if args.color_jitter:
        steps.append(v2.ColorJitter(*[args.color_jitter] * 3))
    if args.random_erasing:
        steps.append(v2.RandomErasing(args.random_erasing, value=[round(255 * m) for m in MEAN]))
    resize = v2.Resize(round(size / args.crop_ratio), interpolation)
    return v2.Compose(steps), v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def make_loaders(args, samples, val_samples, captions, found: dict) -> list[DataLoader]:
    """Of this process's share of train/ and val/; their loading processes have started."""
    rank, world, size, loaders = args.rank, args.world_size, found["input_size"], []
    transform, val_transform = transforms(args, size)
    images = Images(samples, size, read_image, transform, captions, found["parts"])
    val_images = Images(val_samples, size, load_image, val_transform)
    share = range(rank, len(samples) - len(samples) % world, world)
    order = EpochSampler(len(samples), share, args.seed, args.repeated_aug)
    val_order = EpochSampler(len(val_samples), range(rank, len(val_samples), world), args.seed)
    gc.freeze()  # else a worker's first full collection copies what it shares with us
    for dataset, sampler in (images, order), (val_images, val_order):
        loader = DataLoader(
            dataset,
            args.batch_size,
            sampler=sampler,
            drop_last=dataset is images,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=args.device.startswith("cuda"),
            generator=torch.Generator(),  # drawing from the default one would disturb a resume
        )
        iter(loader)  # forks now: beside the threads of a process group a fork may stand still
        loaders.append(loader)
    return loaders


# ---- The model -----------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, outputs: int, labels: bool) -> tuple[nn.Module, dict]:
    """The plain model, and what it was found to need: "rebuild", its images' "input_size", "mean"
    and "std", "init": of --init; "parts" of an image that --mae may hide."""
    torch.manual_seed(args.seed)
    found = {"mean": MEAN, "std": STD, "init": None, "parts": 0}
    try:
        if args.arch in torchvision.models.list_models(torchvision.models) and not args.mae:
            model, more = build_torchvision(args.arch, outputs, args.pretrained, args.input_size)
            if args.drop_path:
                add_drop_path(model, args.drop_path)
        elif "/" in args.arch or os.path.isdir(args.arch):
            model, more = build_transformers(args, outputs, labels)
        else:
            raise ValueError("torchvision has none, and it is no id or folder of transformers")
        found |= more
        size = found["input_size"]
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # a package, a download, a damaged file, a configuration, a size
        kind = "masked auto-encoder" if args.mae else "classifier"
        kind += " with --pretrained weights" if args.pretrained else ""
        what = f"--arch {args.arch}: no {kind} of this name and input size"
        raise SystemExit(f"{what}: {first_line(error)}") from error
    if args.mae:
        found["parts"] = output.ids_restore.shape[1]
    if args.init:
        found |= load_init(model, args.init)
    return model, found


def build_torchvision(arch: str, num_classes: int, pretrained: bool, size: int | None) -> tuple:
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    preset, kwargs = weights.transforms(), {}
    size = size or preset.crop_size[0]
    if arch.startswith("vit_"):  # vit_h_14 was published with another size than its default
        kwargs["image_size"] = size
    elif arch in ("googlenet", "inception_v3"):  # no auxiliary heads
        kwargs = {"aux_logits": False, "init_weights": not pretrained}
        kwargs["transform_input"] = pretrained
    found = {"rebuild": {"kwargs": kwargs}, "input_size": size}
    model = torchvision.models.get_model(arch, num_classes=num_classes, **kwargs)
    if pretrained:
        state = torchvision.models.get_model(arch, weights=weights).state_dict()
        if "image_size" in kwargs:
            resize = torchvision.models.vision_transformer.interpolate_embeddings
            state = resize(size, model.patch_size, state)
        load_fitting(model, state, "--pretrained")
        found |= {"mean": preset.mean, "std": preset.std}
    return model, found


def build_transformers(args: argparse.Namespace, outputs: int, labels: bool) -> tuple:
    """A classifier; of --mae an auto-encoder; of a CLIP without labels its tower with the class
    token's projection, as wide as the texts. ValueError where the arguments ask too much of it."""
    auto, found = transformers.AutoModelForImageClassification, {}
    config = transformers.AutoConfig.from_pretrained(args.arch, num_labels=outputs)
    if args.mae:
        auto = transformers.AutoModelForPreTraining
        if not hasattr(config, "mask_ratio"):
            raise ValueError(f"{config.model_type} hides no part of an image; Hiera and ViTMAE do")
        for name, value in config.to_dict().items():
            if name.startswith("decoder_") and value is None:
                raise ValueError(f"its configuration lacks {name}")
    elif config.model_type == "hiera" and config.num_query_pool == 2:
        config.num_query_pool = 3
        print("num_query_pool is 3, as classification wants it, not 2, as an auto-encoder does")
    elif config.model_type in ("clip", "clip_vision_model") and not labels:
        auto = transformers.CLIPVisionModelWithProjection
        config = getattr(config, "vision_config", config)
        config.projection_dim = outputs
    if args.drop_path:
        if not hasattr(config, "drop_path_rate"):
            raise ValueError("it has no stochastic depth: pass --drop-path 0")
        config.drop_path_rate = args.drop_path
    config.dtype = torch.float32  # whatever the weights were saved in
    if args.pretrained:
        model, loaded = auto.from_pretrained(
            args.arch, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        fresh = sorted([*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])])
        print(f"--pretrained: all weights but {len(fresh)}: {', '.join(fresh)[:300]}")
        images = transformers.AutoImageProcessor.from_pretrained(args.arch)
        found = {"mean": list(images.image_mean), "std": list(images.image_std)}
    else:
        build = getattr(auto, "from_config", None) or auto._from_config
        model = build(config)
    model.float()  # what a part of the configuration left in half precision
    size = getattr(getattr(config, "vision_config", config), "image_size", 224)
    found["input_size"] = args.input_size or (size if isinstance(size, int) else size[0])
    found["rebuild"] = {"class": type(model).__name__, "config": model.config.to_dict()}
    return model, found


def load_fitting(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load all tensors whose name and shape fit; print the others. ValueError if none fits."""
    own = model.state_dict()
    fitting = {name: x for name, x in state.items() if name in own and x.shape == own[name].shape}
    if not any(x.ndim for x in fitting.values()):
        raise ValueError("none of its weights fits")
    own.update(fitting)  # in place: MNASNet wants the metadata, too
    model.load_state_dict(own)
    fresh = [name for name in own if name not in fitting]
    print(f"{source}: all weights but {len(fresh)}: {', '.join(fresh)[:300]}")


def load_init(model: nn.Module, file: str) -> dict:
    """Start from another run's weights, with its normalisation of images; its settings."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        load_fitting(model, state["model"], f"--init {file}")
        init = state["settings"] | {"epoch": state["epoch"]}
        return {"mean": state["mean"], "std": state["std"], "init": init}
    except Exception as error:  # a pickle of code may raise anything
        raise SystemExit(f"--init {file}: {first_line(error)}") from error


def add_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth, linear in the depth; torchvision's ViT gets it behind both branches."""
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if isinstance(model, torchvision.models.VisionTransformer):
        for block in model.encoder.layers:
            depths += [StochasticDepth(0.0, "row"), StochasticDepth(0.0, "row")]
            block.dropout = nn.Sequential(block.dropout, depths[-2])
            block.mlp.append(depths[-1])
    if not depths:
        raise ValueError("it has no stochastic depth: pass --drop-path 0")
    for i, depth in enumerate(depths):
        depth.p = rate * i / max(1, len(depths) - 1)


def last_layer(model: nn.Module, num_classes: int) -> nn.Module:
    """The classifier g: the last layer, linear or a 1x1 convolution, with an output per class."""
    for module in reversed(list(model.modules())):
        sizes = getattr(module, "out_features", None), getattr(module, "out_channels", None)
        if num_classes in sizes:
            return module
    raise SystemExit("no classification layer could be found: choose another --arch")


class Aligned(nn.Module):
    """The plain model and, where there are texts of width D, tau, the head h on the input of its
    last layer (without classes: no h) and perhaps a text adapter. `heads`: the arguments of
    projection_head() and text_adapter(), of which evaluate.py builds the two again."""

    def __init__(
        self, model, num_classes=0, text_width=0, projection="mlp", adapter="none", temperature=0.2
    ):
        super().__init__()
        self.model, self.projection, self.adapter, self.log_temperature = model, None, None, None
        self.heads = {"projection": None, "adapter": None}
        if text_width and num_classes:
            layer = last_layer(model, num_classes)
            layer.register_forward_pre_hook(self.keep_features)
            self.heads["projection"] = {
                "kind": projection,
                "width": getattr(layer, "in_features", None) or layer.in_channels,
                "text_width": text_width,
                "batch_norm": any(isinstance(module, nn.BatchNorm2d) for module in model.modules()),
            }
            self.projection = projection_head(**self.heads["projection"])
        if text_width and adapter == "mlp":
            self.heads["adapter"] = {"width": text_width}
            self.adapter = text_adapter(text_width)
        if text_width:
            self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def keep_features(self, layer: nn.Module, inputs: tuple) -> None:
        if layer.training:  # not in validation
            self.features = inputs[0]

    def forward(self, images: Tensor, texts: Tensor | None = None, mae: bool = False) -> tuple:
        """Images [n, 3, S, S], texts [n, D] -> logits [n, K] and, with texts of images, the image
        and text features [n, D] (of length 1, float32) and tau. Of a masked auto-encoder: its
        error, in the logits' place, where the texts are the noise that says what to hide."""
        output = self.model(images, noise=texts) if mae else self.model(images)
        logits = features = output if isinstance(output, Tensor) else output[0]
        if texts is None or self.log_temperature is None:
            return logits, None, None, None
        if self.projection:
            features, self.features = self.features, None
            features = features.flatten(2).mean(2) if features.ndim == 4 else features  # [n, C]
            features = self.projection(features)
        texts = self.adapter(texts) if self.adapter else texts
        features, texts = F.normalize(features.float(), dim=1), F.normalize(texts.float(), dim=1)
        return logits, features, texts, self.log_temperature.exp()


def projection_head(kind: str, width: int, text_width: int, batch_norm: bool) -> nn.Module:
    """The head h: with batch norm as the authors' ResNet has it, without as their DeiT."""
    if kind == "linear":
        return nn.Linear(width, text_width, bias=False)
    first = nn.Linear(width, 2 * text_width, bias=not batch_norm)
    norm = [nn.BatchNorm1d(2 * text_width)] if batch_norm else []
    last = nn.Linear(2 * text_width, text_width)
    for layer in first, last:
        nn.init.trunc_normal_(layer.weight, std=1024**-0.5 if batch_norm else 0.02)
    return nn.Sequential(first, *norm, nn.ReLU(inplace=True), last)


class ResidualBlock(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def text_adapter(width: int) -> nn.Module:
    """LLM2CLIP's, behind the frozen text encoder: [n, width] -> [n, width]."""
    blocks = []
    for _ in range(4):
        layers = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        blocks.append(ResidualBlock(nn.LayerNorm(width), *layers))
    return nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, width))


@torch.no_grad()
def reconstruct(model: nn.Module, images: Tensor) -> Tensor:
    """Images [n, 3, S, S] -> [n, 3, S, 3 S]: as they are, as the auto-encoder sees them, and with
    the hidden patches that it predicts (if it was taught normalised ones: at the true contrast)."""
    torch.manual_seed(0)
    output = model.eval()(images)
    hidden = output.mask.bool() if "mask" in output else ~output.bool_masked_pos  # [n, L]
    size = images.shape[-1]
    side = size // round(hidden.shape[1] ** 0.5)
    patches = F.unfold(images, side, stride=side).mT  # [n, L, 3 * side * side]
    guess = output.logits.float()
    if hasattr(model, "unpatchify"):  # ViTMAE has the channels last
        guess = guess.unflatten(2, (-1, 3)).mT
    guess = guess.reshape(patches.shape)
    if getattr(model.config, "normalize_pixel_loss", getattr(model.config, "norm_pix_loss", False)):
        deviation, mean = torch.std_mean(patches, 2, keepdim=True)
        guess = guess * deviation + mean
    hidden = hidden[..., None]
    shown = [patches, patches.masked_fill(hidden, 0), torch.where(hidden, guess, patches)]
    return torch.cat([F.fold(x.mT, size, side, stride=side) for x in shown], 3)


# ---- The losses ----------------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """[n, ...] of every process -> [W*n, ...]; backward adds up what all of them want of a row."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may use it elsewhere
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x: Tensor) -> Tensor:
    return AllGather.apply(x) if dist.is_initialized() else x


def global_sum(x: Tensor) -> Tensor:
    """Of all processes; without a gradient."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def global_mean(losses: Tensor, counts: Tensor) -> Tensor:
    """Mean of losses [n] where counts [n] is true, over all processes: W times the local sum / the
    global count, since DDP averages the gradients of the W processes afterwards."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return world * (losses * counts).sum() / global_sum(counts.float().sum()).clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing=0.0) -> Tensor:
    """Mean over labelled images, in float32. logits [n, K], labels [n] (-1: none)."""
    options = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
    return global_mean(F.cross_entropy(logits.float(), labels, **options), labels >= 0)


def info_nce(queries, keys, has_text, all_have, temperature) -> Tensor:
    """-log softmax of each query's own key, over the keys of all processes that take part.
    queries [n, D] of this process, keys [W*n, D], has_text [n], all_have [W*n]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    logits = (queries @ keys.T / temperature).masked_fill(~all_have, -1e4)
    return global_mean(F.cross_entropy(logits, own, reduction="none"), has_text)


def alignment_loss(kind: str, images, texts, has_text, temperature=0.2) -> Tensor:
    """L_align of unit vectors images [n, D] and texts [n, D]; pairs without a text (has_text [n],
    bool) take no part at all. In one process, with a text for each image, it is

        cosine   (2 - 2 * (images * texts).sum(1)).mean()          (`byol` in the official code)
        infonce  cross_entropy(images @ texts.T / temperature, arange(n))                (`ctr`)
        clip     (infonce + cross_entropy(texts @ images.T / temperature, arange(n))) / 2

    and in several processes the same of the global batch, with the gradients of one.
    """
    if kind not in ("cosine", "infonce", "clip"):
        raise ValueError(f"there is no alignment loss {kind!r}")
    if kind == "cosine":
        return global_mean(2 - 2 * (images * texts).sum(1), has_text)
    all_have = gather(has_text.float()) > 0
    image_to_text = info_nce(images, gather(texts), has_text, all_have, temperature)
    if kind == "infonce":
        return image_to_text
    text_to_image = info_nce(texts, gather(images), has_text, all_have, temperature)
    return (image_to_text + text_to_image) / 2


def mix_images(images: Tensor, args, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Mixup or CutMix of images [n, 3, S, S] with the reversed batch, and lam, their own share."""
    if not (args.mixup or args.cutmix):
        return images, 1.0
    cutmix = args.cutmix > 0 and (args.mixup == 0 or rng.random() < 0.5)
    alpha = args.cutmix if cutmix else args.mixup
    lam = float(rng.beta(alpha, alpha))
    if not cutmix:
        return lam * images + (1 - lam) * images.flip(0), lam
    size = images.shape[-1]
    centre, half = rng.integers(size, size=2), size * (1 - lam) ** 0.5 / 2
    top, left = (centre - half).clip(0, size).astype(int)
    bottom, right = (centre + half).clip(0, size).astype(int)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / size**2


def mixed(loss: Callable, lam: float, *targets: Tensor) -> Tensor:
    """lam * loss(an image's own targets) + (1 - lam) * loss(those of its partner)."""
    if lam == 1:
        return loss(*targets)
    return lam * loss(*targets) + (1 - lam) * loss(*(target.flip(0) for target in targets))


# ---- The optimisation ----------------------------------------------------------------------------


class Run:
    """The model with its heads and averages, optimizer, scaler and precision, on one device."""

    def __init__(self, args, model: nn.Module, num_classes: int, width: int | None, found: dict):
        self.device, self.ema = torch.device(args.device), None
        self.amp = getattr(torch, args.amp, None)  # of "auto" and "off": none
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32
            if args.amp == "auto":
                native = torch.cuda.is_bf16_supported(including_emulation=False)
                self.amp = torch.bfloat16 if native else torch.float16
        model.to(self.device, memory_format=torch.channels_last)
        if args.ema_decay:  # the plain model, with averaged weights
            self.ema = copy.deepcopy(model).requires_grad_(False)
        torch.manual_seed(args.seed)
        heads = args.projection, args.text_adapter, args.temperature
        self.net = self.ddp = Aligned(model, num_classes, width, *heads).to(self.device)
        if width:
            self.net.log_temperature.requires_grad_(args.learn_temperature)
        norms = [module for module in self.net.modules() if isinstance(module, nn.BatchNorm1d)]
        if args.batch_size == 1 and norms:
            raise SystemExit("-b 1: the head's batch norm needs two images, or --projection linear")
        if args.compile:
            model.compile()
        # what the losses are does not depend on the number of processes; but the statistics of
        # batch norm, an image's partner in mixing, and dropout are each process's own
        if args.world_size > 1:  # static: what no loss depends on, a mask token say, is found once
            self.ddp = DistributedDataParallel(self.net, static_graph=True)
        self.optimizer = make_optimizer(self.net, args, self.amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.autocast = torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)
        pixels = torch.tensor([found["mean"], found["std"]], device=self.device)
        self.mean, self.std = 255 * pixels.view(2, 3, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] -> float32 [n, 3, S, S], channels-last, on the device."""
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return (images.float() - self.mean) / self.std


def make_optimizer(net: nn.Module, args, amp: torch.dtype | None) -> torch.optim.Optimizer:
    """A group for each weight decay and, with --layer-decay, depth: its "scale" is of the rate.
    AdamW decays no vectors, position embeddings and class tokens; nothing decays a scalar, tau."""
    tokens, groups = ("pos_embed", "position", "class_token", "cls_token"), {}
    scales = layer_scales(net.model, args.layer_decay) if args.layer_decay < 1 else {}
    for name, parameter in net.named_parameters():
        small = parameter.ndim == 1 or any(token in name for token in tokens)
        spared = parameter.ndim == 0 or (small and args.optimizer == "adamw")
        decay = 0.0 if spared else args.weight_decay
        scale = scales.get(name.removeprefix("model."), 1.0)
        group = {"params": [], "scale": scale, "weight_decay": decay}
        if parameter.requires_grad:
            groups.setdefault((scale, decay), group)["params"].append(parameter)
    groups = list(groups.values())
    fused = True if args.device.startswith(("cpu", "cuda")) else None
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, betas=(0.9, args.beta2), fused=fused)
    # torch 2.14: fused momentum starts from garbage if GradScaler skips the first step
    fused = None if amp is torch.float16 else fused
    return torch.optim.SGD(groups, args.lr, momentum=0.9, fused=fused)


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """{parameter: decay^(n + 1 - k)}: k is 0 before the n transformer blocks, i in the i-th and up
    to the next, n + 1 behind the last. Blocks: the innermost members of lists of modules that hold
    an attention."""
    modules, blocks, depth, scales = dict(model.named_modules()), [], 0, {}
    for name, module in modules.items():
        listed = isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
        if listed and any("Attention" in type(part).__name__ for part in module.modules()):
            blocks = [block for block in blocks if not name.startswith(f"{block}.")] + [name]
    if not blocks:
        raise SystemExit("--layer-decay: this architecture has no transformer blocks")
    for name, _ in model.named_parameters():
        inside = [k for k, block in enumerate(blocks, 1) if name.startswith(f"{block}.")]
        depth = inside[0] if inside else depth
        behind = depth == len(blocks) and not inside
        scales[name] = decay ** (len(blocks) + 1 - depth - behind)
    return scales


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Per epoch: linear from 1e-6 to lr, then a cosine to min_lr."""
    if epoch < args.warmup_epochs:
        start = min(args.lr, 1e-6)
        return start + (args.lr - start) * epoch / args.warmup_epochs
    part = (epoch - args.warmup_epochs) / max(1, args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * part)) / 2


def train_step(args, run: Run, images: Tensor, labels: Tensor, texts: Tensor, rng) -> Tensor:
    """One step on images [n, 3, S, S], labels [n], texts [n, D]; [CE (or an auto-encoder's error),
    L_align, hits, labelled]. Nothing in it waits for a GPU."""
    images, lam = mix_images(images, args, rng)
    with run.autocast:
        logits, features, targets, tau = run.ddp(images, texts, args.mae)
    if args.mae:
        loss = global_mean(logits.float().expand(len(labels)), labels >= 0)
        hits = torch.zeros_like(loss)
    else:
        loss = mixed(lambda y: cross_entropy(logits, y, args.label_smoothing), lam, labels)
        hits = (logits.argmax(1) == labels).sum()
    loss_align, weight = torch.zeros_like(loss), args.align_weight if run.net.projection else 1.0
    if features is not None:
        align = functools.partial(alignment_loss, args.align_loss, features, temperature=tau)
        loss_align = mixed(align, lam if args.mix_text else 1.0, targets, texts.any(1))
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss + weight * loss_align).backward()
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        if args.learn_temperature:
            run.net.log_temperature.clamp_(min=math.log(0.01))  # as CLIP does
        if run.ema:
            average = get_ema_multi_avg_fn(args.ema_decay)
            average(floats(run.ema), floats(run.net.model), None)
        return torch.stack([loss, loss_align, hits, (labels >= 0).sum()])


def floats(model: nn.Module) -> list[Tensor]:
    """Parameters and running statistics, without counters, whose average means nothing."""
    return [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


def train_epoch(args, run: Run, loader: DataLoader, epoch: int) -> dict:
    """One epoch, from 0 on; its log entry. Python waits for a GPU every 50 steps only."""
    run.net.train()
    loader.sampler.epoch = epoch
    stream, rate = args.seed * EPOCHS_APART + epoch, learning_rate(args, epoch)
    torch.manual_seed(stream * EPOCHS_APART + args.rank)  # dropout: a resumed epoch draws the same
    rng = np.random.default_rng(stream)  # mixing: all processes draw the same
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    unreadable, wait, sums = set(), 0.0, torch.zeros(4, device=run.device)
    finished = torch.cuda.Event() if run.device.type == "cuda" else None
    bar = tqdm(loader, unit="step", leave=False, mininterval=1, disable=args.rank > 0)
    start = tick = time.perf_counter()
    for step, (images, labels, texts, reasons) in enumerate(bar, 1):
        if finished is None or finished.query():  # while the GPU still works, nothing is lost
            wait += time.perf_counter() - tick
        unreadable.update(filter(None, reasons))
        if args.mae and labels.min() < 0:  # its error is of a whole batch: leave these out
            kept = labels >= 0 if labels.max() >= 0 else torch.arange(len(labels)) < 1
            images, labels, texts = images[kept], labels[kept], texts[kept]
        labels, texts = (x.to(run.device, non_blocking=True) for x in (labels, texts))
        sums += train_step(args, run, run.normalise(images), labels, texts, rng)
        if step % 50 == 0 or step == len(loader):
            loss, align, hits, labelled = (global_sum(sums) / step / args.world_size).tolist()
            numbers = f"loss {loss:.4g}, alignment {align:.4g}"
            bar.set_postfix_str(numbers, refresh=False)
            weights = nn.utils.get_total_norm(run.net.parameters()).item()
            if not math.isfinite(loss + align + weights):  # on all processes alike
                where = f"in the 50 steps up to step {step} of epoch {epoch + 1}"
                advice = "try a smaller --lr, --clip-grad 1 or --amp bfloat16"
                raise SystemExit(f"not finite {where}: {numbers}, weights {weights:.4g}; {advice}")
        if finished:
            finished.record()
        tick = time.perf_counter()
    seconds, seen = time.perf_counter() - start, len(loader) * args.batch_size * args.world_size
    lost = report_unreadable(unreadable)
    if lost * args.repeated_aug >= seen:
        raise SystemExit("no training image can be read")
    entry = {"epoch": epoch + 1, "lr": rate}
    if args.mae:
        entry["loss_mae"] = loss
    elif labelled:
        entry |= {"loss_ce": loss, "train_top1": 100 * hits / labelled}
    if args.embeddings:
        entry |= {"loss_align": align, "tau": run.net.log_temperature.exp().item()}
    entry |= {"images_per_s": seen / seconds, "data_wait": wait / seconds}
    return entry | {"unreadable": lost}


@torch.inference_mode()
def validate(run: Run, loader: DataLoader) -> float:
    """Top-1 in percent over all readable images, each counted once."""
    run.net.eval()
    loader.sampler.epoch = 0
    if dist.is_initialized():  # batch norm's statistics differ: process 0's are saved, and count
        for buffer in run.net.model.buffers():
            dist.broadcast(buffer, 0)
    counts, unreadable = torch.zeros(2, dtype=torch.int64, device=run.device), set()
    for images, labels, _, reasons in loader:
        unreadable.update(filter(None, reasons))
        with run.autocast:
            logits = run.net(run.normalise(images))[0]
        labels = labels.to(run.device, non_blocking=True)
        counts += torch.stack([(logits.argmax(1) == labels).sum(), (labels >= 0).sum()])
    report_unreadable(unreadable)
    hits, readable = global_sum(counts).tolist()
    return 100 * hits / max(1, readable)


# ---- The run -------------------------------------------------------------------------------------


def resume(args: argparse.Namespace, run: Run, settings: dict) -> list[dict]:
    """Restore the run; its log, or a new one's if there is no checkpoint."""
    os.makedirs(args.out, exist_ok=True)  # now, not after an epoch
    file = os.path.join(args.out, "last.pt")
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers, np)}
    log = [{"config": vars(args) | settings, "versions": str(versions)}]
    if os.path.exists(file):  # check() has seen to --resume
        try:
            state = torch.load(file, map_location=args.device, weights_only=True)
            found = state["settings"]
        except Exception as error:  # a pickle of code may raise anything
            raise SystemExit(f"--resume: {file} is damaged: {first_line(error)}") from error
        changed = [f"{k} {found.get(k)} -> {v}" for k, v in settings.items() if found.get(k) != v]
        if changed:
            raise SystemExit(f"--resume {file}: these settings differ: {'; '.join(changed)}")
        for name in "net", "ema", "optimizer", "scaler":
            if state[name] is not None:
                getattr(run, name).load_state_dict(state[name])
        log = state["log"]
        print(f"resuming {file} after epoch {state['epoch']} of {args.epochs}")
    lines = torch.tensor(len(log), device=run.device)
    if global_sum(lines) != lines * args.world_size:
        raise SystemExit(f"--resume {file}: other nodes have another: copy the latest one to all")
    return log


def save_epoch(args, run: Run, log: list[dict], about: dict) -> None:
    """Write the log, and last.pt; `about`: what the run is of, from its start on."""
    file, lines = os.path.join(args.out, "log.jsonl"), [json.dumps(entry) + "\n" for entry in log]
    Path(f"{file}.tmp").write_text("".join(lines), "utf-8")
    os.replace(f"{file}.tmp", file)
    head, adapter, model = run.net.projection, run.net.adapter, run.net.model.state_dict()
    counters = {name: value for name, value in model.items() if not value.is_floating_point()}
    state = {
        **about,
        "epoch": len(log) - 1,
        "log": log,
        "selected": "last epoch",
        "val_top1": log[-1].get("val_top1"),
        "model": model,
        "ema": run.ema.state_dict() | counters if run.ema else None,
        "projection": head.state_dict() if head else None,
        "adapter": adapter.state_dict() if adapter else None,
        "net": run.net.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    file = os.path.join(args.out, "last.pt")
    try:
        torch.save(state, f"{file}.tmp")
    except RuntimeError as error:  # what torch makes of a full disk
        full = f"is the disk full? {first_line(error)}"
        raise SystemExit(f"{file}: {full}; what was saved stays: --resume goes on") from error
    os.replace(f"{file}.tmp", file)


def save_reconstruction(run: Run, images: Images, file: str) -> None:
    """Of eight images, in rows: cropped as in training, masked, and reconstructed."""
    items = [images[i, 0] for i in range(0, len(images.paths), max(1, len(images.paths) // 8))]
    readable = [image for image, label, *_ in items if label >= 0][:8]
    if not readable:
        return
    batch = torch.stack(readable)
    rows = reconstruct(run.net.model, run.normalise(batch)) * run.std + run.mean
    torchvision.utils.save_image(rows / 255, file, nrow=1)
    print(f"{file}: images, what the auto-encoder sees of them, and what it makes of it")


def main() -> None:
    args = parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # no rank outlives a killed torchrun, beside its successor
        if os.getppid() == 1 and not re.search("torch|launch", Path("/proc/1/cmdline").read_text()):
            raise SystemExit("torchrun was killed before this process had started")
    if args.rank > 0:
        sys.stdout = io.StringIO()  # print() is for process 0
    if args.device == "cpu" and args.world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, CPUS - args.workers))
    classes, samples, val_samples = list_data(args)
    if len(samples) < args.batch_size * args.world_size:
        raise SystemExit(f"{len(samples)} training images do not fill one batch: use a smaller -b")
    folder, captions = os.path.join(args.data, "train", ""), None
    keys = [path.removeprefix(folder).replace(os.sep, "/") for path, _ in samples]
    if args.embeddings:
        shuffle = args.seed if args.shuffle_captions else None
        captions = Captions(args.captions, args.embeddings, keys, shuffle)
    width, text = (captions.width, captions.identity) if captions else (None, None)
    model, found = build_model(args, len(classes) or width or 1, bool(classes))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.arch}, {count:.2f} M parameters, {len(classes) or 'no'} classes, ", end="")
    print(f"{len(samples)} training images, {len(val_samples)} of val/")
    print(f"batch {args.batch_size} x {args.world_size}, lr {args.lr:g}")
    loader, val_loader = make_loaders(args, samples, val_samples, captions, found)
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    run = Run(args, model, len(classes), width, found)
    checksum = zlib.crc32(os.fsencode(f"{keys} {[label for _, label in samples]}"))
    images = f"{len(keys)} ({checksum:08x})"
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {name: found[name] for name in ("input_size", "mean", "std", "init")}
    settings |= {"amp": str(run.amp), "text": text, "images": images}
    about = found | {"classes": classes, "settings": settings, "heads": run.net.heads}
    about |= {name: getattr(args, name) for name in ("arch", "crop_ratio", "interpolation")}
    log = resume(args, run, settings)
    for epoch in range(len(log) - 1, args.epochs):
        log.append(train_epoch(args, run, loader, epoch))
        kept = (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs
        if kept and classes:
            log[-1]["val_top1"] = validate(run, val_loader)
        figures = [f"{name} {x:.4g}" for name, x in log[-1].items() if isinstance(x, float)]
        print(f"epoch {epoch + 1}/{args.epochs}: {', '.join(figures)}")
        if kept and args.rank == 0:
            save_epoch(args, run, log, about)
    if args.mae and args.rank == 0:
        save_reconstruction(run, loader.dataset, f"{args.out}/reconstruction.png")
    print(f"{args.out}/last.pt: {args.epochs} epochs")
    if args.world_size > 1:
        time.sleep(1)  # torch 2.9's gloo lets go of tensors in a thread that needs this one's lock
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start again with --resume") from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"out of memory: try a smaller -b; {first_line(error)}") from error
    except OSError as error:
        raise SystemExit(f"{error.filename or 'train.py'}: {error.strerror or error}") from error
    except RuntimeError as error:  # what torch makes of a loading process that dies
        if not re.search("killed by signal|/torch_", str(error)):
            raise
        advice = "is /dev/shm too small? docker run --shm-size=8g, or a smaller -j"
        raise SystemExit(f"{first_line(error)}: {advice}") from error
