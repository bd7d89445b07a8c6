"""Train a classifier with cross-entropy plus alignment to caption embeddings: stage 3 of 4.

In:  --data ROOT               ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; or only
                               ROOT/train/<image>: no labels, and alignment alone
     --captions, --embeddings  what caption.py and embed.py wrote for ROOT/train; without them: the
                               cross-entropy baseline, same code
Out: RUN/last.pt               plain model weights, and what is needed to evaluate and to resume
     RUN/best.pt               the same at the best epoch *on the validation folder* (chosen on it,
                               so no unbiased result; results are reported from last.pt)
     RUN/log.jsonl             first the configuration, then one object per epoch

Launch:
    python train.py --data imagenet --out runs/baseline --recipe resnet
    torchrun --standalone --nproc_per_node=4 train.py --data imagenet --out runs/aligned \\
        --recipe resnet --captions captions.jsonl --embeddings embeddings.npy
    the same line with --resume after a kill

    L = CE(g(f(x)), y) + lambda * L_align(h(f(x)), t)               GPT4Image, arXiv 2306.00693

f(x) is the input of the classifier's last layer g, t the frozen embedding of a caption of x, h a
small head that is used in training only. --align-weight is lambda. Without labels L is L_align, of
the model's own output, which is as wide as t: LLM2CLIP's setting.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from PIL import ExifTags, Image, PngImagePlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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
PREPROCESSING = ["input_size", "crop_ratio", "interpolation", "mean", "std"]

# What a recipe puts before the user's own options: resnet (the defaults) and deit are the paper's,
# finetune is ours. In the official code lambda is 0.3, but acts as 0.3 / W on its W = 4 (ResNet) or
# 8 (DeiT) processes, since its gather keeps the local gradient only; here W does not matter.
RECIPES = {
    "resnet": "",
    "deit": "--arch vit_b_16 --epochs 300 --batch-size 128 --optimizer adamw --weight-decay 0.05 "
    "--no-decay-norms --warmup-epochs 5 --label-smoothing 0.1 --mixup 0.8 --cutmix 1.0 "
    "--randaugment 27 --color-jitter 0.3 --random-erasing 0.25 --repeated-aug 3 --drop-path 0.1 "
    "--ema-decay 0.99996 --interpolation bicubic --crop-ratio 1.0 --align-weight 0.0375 "
    "--temperature 0.05",
    "finetune": "--pretrained --epochs 30 --batch-size 64 --warmup-epochs 1 --min-lr 0.0",
}
LEARNING_RATES = {"resnet": (0.1, 256), "deit": (5e-4, 512), "finetune": (0.01, 64)}  # per images
NOT_FINITE = "Try a smaller --lr, --clip-grad 1 or --amp bfloat16"
NEED_TEXT = ["--align-weight", "--align-loss", "--temperature", "--projection", "--text-adapter"]
NEED_TEXT += ["--shuffle-captions", "--learn-temperature", "--mix-text", "--no-mix-text"]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    p.epilog = "".join(f"\n--recipe {name}: {options}" for name, options in RECIPES.items())
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    workers = min(8, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--data", required=True, help="folder with train/ and val/")
    add("--out", required=True, metavar="RUN", help="folder for checkpoints and the log")
    add("--captions", help="captions.jsonl of train/")
    add("--embeddings", help="embeddings.npy of these captions")
    add("--recipe", default="resnet", choices=RECIPES, help="other defaults: see below")
    add("--arch", default="resnet50", help="torchvision classifier, or transformers' id or folder")
    add("--pretrained", action=flag, default=False, help="start from published weights")
    add("--init", metavar="FILE", help="start from another run's weights, where shapes fit")
    add("--epochs", type=int, default=120, help="passes over the training images")
    add("-b", "--batch-size", type=int, default=256, help="images per process")
    add("--lr", type=float, help="peak learning rate (the recipe's, scaled with the global batch)")
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="sgd: with momentum 0.9")
    add("--weight-decay", type=float, default=1e-4, help="decoupled for adamw")
    add("--decay-norms", action=flag, default=True, help="weight decay on norms and biases, too")
    add("--warmup-epochs", type=int, default=0, help="linear warm-up before the cosine")
    add("--warmup-lr", type=float, default=1e-6, help="learning rate at the start of it")
    add("--min-lr", type=float, default=1e-5, help="where the cosine ends")
    add("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")
    add("--mixup", type=float, default=0.0, help="Beta parameter, 0 = off")
    add("--cutmix", type=float, default=0.0, help="the same; with both each batch draws one")
    add("--randaugment", type=int, default=0, help="magnitude 0..30 (timm's m9 is 27)")
    add("--color-jitter", type=float, default=0.0, help="of brightness, contrast, saturation")
    add("--random-erasing", type=float, default=0.0, help="probability")
    add("--repeated-aug", type=int, default=1, help="N: 1/N of the images, N times each")
    add("--drop-path", type=float, default=0.0, help="stochastic depth: rate in the last block")
    add("--ema-decay", type=float, default=0.0, help="averaged weights, 0 = off")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient, 0 = off")
    add("--input-size", type=int, help="pixels (what the architecture was published with)")
    add("--interpolation", default="bilinear", choices=["bilinear", "bicubic"], help="of resizing")
    add("--crop-ratio", type=float, default=0.875, help="validation: resize to input size / this")
    add("--align-loss", default="clip", choices=["clip", "infonce", "cosine"], help="L_align")
    add("--align-weight", type=float, default=0.075, help="lambda (no labels: 1)")
    add("--temperature", type=float, default=0.2, help="tau of the contrastive losses")
    add("--learn-temperature", action="store_true", help="train tau, as CLIP does")
    add("--projection", default="mlp", choices=["mlp", "linear"], help="the head h")
    add("--text-adapter", default="none", choices=["none", "mlp"], help="mlp: train one behind t")
    add("--shuffle-captions", action="store_true", help="the control: captions of other images")
    add("--mix-text", action=flag, default=True, help="align a mixed image with both captions")
    add("--amp", default="auto", choices=["auto", "bfloat16", "float16", "off"], help="on a GPU")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--val-every", type=int, default=1, help="validate each so many epochs, and at the end")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("-j", "--workers", type=int, default=workers, help="data loading processes")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    add("--resume", nargs="?", const=True, metavar="FILE", help="go on from RUN/last.pt, else FILE")
    p.set_defaults(init_settings=None, init_seed=None)  # what --init was trained with
    recipe = RECIPES[p.parse_args().recipe].split()
    args = p.parse_args([*recipe, *sys.argv[1:]])
    check(p, args, {word.split("=")[0] for word in sys.argv[1:]})
    if os.path.exists(os.path.join(args.out, "last.pt")) and not args.resume:
        p.error(f"{args.out}/last.pt exists: go on with --resume, or choose another --out")
    args.rank, args.world_size = process_rank()
    args.device = choose_device(args.device, args.world_size)
    if args.lr is None:
        rate, images = LEARNING_RATES[args.recipe]
        args.lr = rate * args.batch_size * args.world_size / images
    return args


def process_rank() -> tuple[int, int]:
    """Rank and number of processes as torchrun sets them; (0, 1) where it is not used."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is world is None:
        return 0, 1
    if not re.fullmatch(r"\d+/\d+", f"{rank}/{world}") or int(rank) >= int(world):
        both = f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit"
        raise SystemExit(f"{both}: start with torchrun, which sets both, or unset them")
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
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {str(error).splitlines()[0]}") from error
    return str(device)


def check(p: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Refuse what cannot be, or would do nothing; `given`: the options that the user typed."""
    idle = sorted(given & set(NEED_TEXT))
    if idle and not args.embeddings:
        p.error(f"{idle[0]} does nothing without --captions and --embeddings")
    if bool(args.captions) != bool(args.embeddings):
        p.error("--captions and --embeddings go together")
    if args.init and args.pretrained:
        p.error("--init and --pretrained exclude each other: --no-pretrained, for this recipe")
    if args.learn_temperature and args.align_loss == "cosine":
        p.error("--learn-temperature: the cosine loss has no temperature")
    if min(args.epochs, args.batch_size, args.repeated_aug, args.val_every, args.workers + 1) < 1:
        p.error("--epochs, -b, --repeated-aug and --val-every start at 1, -j at 0")
    positive = args.temperature, 1 - args.ema_decay, 1 if args.lr is None else args.lr
    if min(positive) <= 0 or args.align_weight < 0:
        p.error("--temperature and --lr start above 0, --align-weight at 0, --ema-decay is below 1")


def hidden(name: str) -> bool:
    """Of editors, of macOS' archives, or our own parts: no class and no image."""
    return name.startswith(".") or name == "__MACOSX" or name.endswith(".parts")


def list_images(folder: str, allow_empty: bool = False) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (path, class) of FOLDER/<class>/<image> in torchvision's ImageFolder order;
    of FOLDER/<image> no names, and -1. SystemExit if there are both; OSError if there is none."""
    with os.scandir(folder) as entries:
        entries = sorted((e for e in entries if not hidden(e.name)), key=lambda e: e.name)
    classes = [entry.name for entry in entries if entry.is_dir()]
    loose = [e.name for e in entries if e.is_file() and e.name.lower().endswith(IMG_EXTENSIONS)]
    if classes and loose:
        both = f"images ({loose[0]}) beside class folders ({classes[0]}/)"
        raise SystemExit(f"{folder} holds {both}: move one of the two away")

    def is_image(path: str) -> bool:
        inner = path[len(folder) :].split(os.sep)
        return path.lower().endswith(IMG_EXTENSIONS) and not any(map(hidden, inner))

    index = {name: i for i, name in enumerate(classes)} or {"": -1}
    return classes, make_dataset(folder, index, None, is_image, allow_empty)


def list_data(args: argparse.Namespace) -> tuple[list, list[tuple[str, int]], list]:
    """Class names, and (path, label) of train/ and of val/. A train/ without class folders holds
    images without labels (-1): no names, nothing to validate on, alignment alone."""
    train, val = os.path.join(args.data, "train"), os.path.join(args.data, "val")
    try:
        classes, samples = list_images(train)
        if not classes:
            if not args.embeddings:
                raise SystemExit(f"{train} has no class folders: pass --captions and --embeddings")
            args.align_weight = 1.0
            return [], samples, []
        val_classes, val_samples = list_images(val, allow_empty=True)
    except FileNotFoundError as error:
        raise SystemExit(f"--data {args.data}: no images in train/ or val/: {error}") from error
    strangers = [name for name in val_classes if name not in classes]
    if strangers or not val_samples or not val_classes:
        found = f"classes that train/ has not: {strangers[:5]}" if strangers else "no image"
        raise SystemExit(f"{val} has {found}")
    label = {i: classes.index(name) for i, name in enumerate(val_classes)}
    return classes, samples, [(path, label[i]) for path, i in val_samples]


def key_of(path: str, data: str) -> str:
    """The image's name in captions.jsonl."""
    return os.path.relpath(path, os.path.join(data, "train")).replace(os.sep, "/")


class Captions:
    """Which rows of embeddings.npy are image i's: rows[starts[i]:starts[i + 1]], in the order of
    `keys`; the array itself stays on the disk."""

    def __init__(self, captions: str, embeddings: str, keys: Iterable[str], shuffle: int | None):
        self.file, self.table, rows_of, foreign = embeddings, None, {key: [] for key in keys}, []
        try:
            with open(captions, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
                for row, line in enumerate(stream):
                    rows_of.get(json.loads(line)["image"], foreign).append(row)
            with open(embeddings.removesuffix(".npy") + ".json", encoding="utf-8") as stream:
                self.identity = json.load(stream)
            table = np.load(embeddings, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            advice = f"run caption.py, then embed.py --captions {captions}"
            raise SystemExit(f"{first_line(error)}: {advice}") from error
        if digest != self.identity.get("captions_sha256"):
            raise SystemExit(f"{captions} is not what {embeddings} holds: run embed.py again")
        self.rows = np.array([row for rows in rows_of.values() for row in rows], np.int64)
        self.starts = np.cumsum([0, *map(len, rows_of.values())])
        self.foreign, shape = len(foreign), (len(self.rows) + len(foreign), table.shape[-1])
        if table.shape != shape or table.dtype not in (np.float16, np.float32):
            wanted = f"expected float16 or float32 [{shape[0]}, width]"
            raise SystemExit(f"{embeddings} is {table.dtype} {list(table.shape)}, {wanted}")
        if not len(self.rows):
            raise SystemExit("no caption belongs to train/: was that caption.py's --data?")
        self.width = table.shape[1]
        if shuffle is not None:
            self.rows = np.random.default_rng(shuffle).permutation(self.rows)

    def draw(self, image: int) -> torch.Tensor:
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
TURNS = [T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270]
TURNS = dict(enumerate([*TURNS, T.TRANSVERSE, T.ROTATE_90], 2))


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


def read_image(path: str) -> torch.Tensor:
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
    """Item (index, seed): uint8 image [S, S, 3], label, text [D] (zeros: none), failed (-1: not; if
    it cannot be read, its index, and label -1). The random state is the item's own: augmentation
    does not depend on workers or processes. `transform`: what `read` gives -> uint8 [3, S, S]."""

    def __init__(self, samples, size: int, read: Callable, transform: Callable, captions=None):
        self.samples, self.size, self.captions = samples, size, captions
        self.read, self.transform = read, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, torch.Tensor, int]:
        index, seed = item
        path, label = self.samples[index]
        text, failed = torch.zeros(self.captions.width if self.captions else 0), -1
        in_worker = torch.utils.data.get_worker_info() is not None  # a random state to itself
        with contextlib.nullcontext() if in_worker else torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image = self.read(path)
            except Exception:  # one bad image costs that image
                image, label, failed = torch.zeros(3, self.size, self.size).byte(), -1, index
            if failed < 0:  # not in the `try`: a fault of ours is no unreadable image
                image = self.transform(image)
                text = self.captions.draw(index) if self.captions else text
        # channels-last, as the model wants it: batches need no transposition
        return image.permute(1, 2, 0).contiguous(), label, text, failed


class EpochSampler(Sampler):
    """(index, seed) of this process's positions in an epoch's random order; none before the first.
    At the same global batch, batch k is the same set of images at every number of processes."""

    def __init__(self, length: int, positions: range, seed: int, copies: int = 1):
        self.length, self.positions, self.seed, self.copies = length, positions, seed, copies
        self.epoch = None

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterable[tuple[int, int]]:
        if self.epoch is None:
            return
        stream = self.seed * 10_007 + self.epoch
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(stream))
        order = order.repeat_interleave(self.copies)
        for position in self.positions:
            yield int(order[position]), (stream * 1_000_000_007 + position) % 2**63


class FlippedCrop(v2.RandomResizedCrop):
    """And a horizontal flip, of a uint8 image [3, H, W]; channels-last, where both are faster."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.make_params([image]).values()
        crop = image[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, self.size, mode=self.interpolation.value, antialias=True)
        return (crop.flip(3) if torch.rand(()) < 0.5 else crop)[0]


def transforms(args: argparse.Namespace) -> tuple[v2.Compose, v2.Compose]:
    """Training's, on uint8 tensors; for evaluation torchvision's own, on Pillow's images."""
    size, interpolation = args.input_size, InterpolationMode(args.interpolation)
    steps = [FlippedCrop(size, interpolation=interpolation)]
    if args.randaugment:  # tensors cannot be rotated bicubically
        bilinear = InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(magnitude=args.randaugment, interpolation=bilinear))
    if args.color_jitter:
        steps.append(v2.ColorJitter(*[args.color_jitter] * 3))
    if args.random_erasing:
        steps.append(v2.RandomErasing(args.random_erasing, value=[round(255 * m) for m in MEAN]))
    resize = v2.Resize(round(size / args.crop_ratio), interpolation)
    return v2.Compose(steps), v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def make_loaders(args, samples, val_samples, captions) -> list[DataLoader]:
    """Of this process's share of train/ and val/. Workers start now, and once: a fork beside the
    threads of a process group may stand still."""
    size, rank, world, loaders = args.input_size, args.rank, args.world_size, []
    if len(samples) < args.batch_size * world:
        batch = f"one batch of {args.batch_size} x {world} processes: use a smaller -b"
        raise SystemExit(f"{len(samples)} training images do not fill {batch}")
    transform, val_transform = transforms(args)
    images = Images(samples, size, read_image, transform, captions)
    val_images = Images(val_samples, size, load_image, val_transform)
    share = range(rank, len(samples) - len(samples) % world, world)
    order = EpochSampler(len(samples), share, args.seed, args.repeated_aug)
    val_order = EpochSampler(len(val_samples), range(rank, len(val_samples), world), args.seed)
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    options |= {"batch_size": args.batch_size, "pin_memory": args.device.startswith("cuda")}
    for dataset, sampler in (images, order), (val_images, val_order):
        # a generator of its own: drawing from the default one would disturb dropout after a resume
        own = {"generator": torch.Generator(), "drop_last": dataset is images}
        loaders.append(DataLoader(dataset, sampler=sampler, **own, **options))
        if args.workers:
            iter(loaders[-1])
        sampler.epoch = 0
    return loaders


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict]:
    """The plain model, and what rebuilds it. Sets args.input_size, mean and std as published."""
    args.mean, args.std = MEAN, STD
    torch.manual_seed(args.seed)
    names = torchvision.models.list_models(module=torchvision.models)
    if args.arch in names:
        model, rebuild = build_torchvision(args, num_classes)
    elif "/" in args.arch or os.path.isdir(args.arch):
        model, rebuild = build_transformers(args, num_classes)
    else:
        raise SystemExit(f"--arch {args.arch}: torchvision has no such classifier")
    if args.init:
        load_init(model, args)
    if args.drop_path:
        add_drop_path(model, args.arch, args.drop_path)
    freeze_unused(model, args)
    return model, rebuild


def build_transformers(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict]:
    auto = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(args.arch, num_labels=num_classes)
        size = getattr(getattr(config, "vision_config", config), "image_size", 224)
        args.input_size = args.input_size or (size if isinstance(size, int) else size[0])
        if not args.pretrained:
            return auto.from_config(config), {"config": config.to_dict()}
        model = auto.from_pretrained(args.arch, config=config, ignore_mismatched_sizes=True)
        images = transformers.AutoImageProcessor.from_pretrained(args.arch)
        args.mean, args.std = list(images.image_mean), list(images.image_std)
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--arch {args.arch}: no classifier: {first_line(error)}") from error
    return model, {"config": model.config.to_dict()}


def build_torchvision(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict]:
    weights = torchvision.models.get_model_weights(args.arch).DEFAULT
    preset, kwargs = weights.transforms(), {}
    args.input_size = args.input_size or preset.crop_size[0]
    if args.arch.startswith("vit_"):  # vit_h_14 was published with another size than its default
        kwargs["image_size"] = args.input_size
    elif args.arch in ("googlenet", "inception_v3"):  # no auxiliary heads
        kwargs = {"aux_logits": False, "init_weights": not args.pretrained}
        kwargs["transform_input"] = args.pretrained
    try:
        model = torchvision.models.get_model(args.arch, num_classes=num_classes, **kwargs)
        if args.pretrained:
            args.mean, args.std = preset.mean, preset.std
            state = torchvision.models.get_model(args.arch, weights=weights).state_dict()
            if "image_size" in kwargs:
                resize = torchvision.models.vision_transformer.interpolate_embeddings
                state = resize(args.input_size, model.patch_size, state)
            load_fitting(model, state)
    except (ValueError, AssertionError, OSError) as error:
        what = f"--arch {args.arch} with --input-size {args.input_size} cannot be had"
        raise SystemExit(f"{what}: {first_line(error)}") from error
    return model, {"kwargs": kwargs}


def load_fitting(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Load all tensors whose name and shape fit; names of the others. ValueError if none fits."""
    own = model.state_dict()
    fitting = {name: x for name, x in state.items() if name in own and x.shape == own[name].shape}
    if not any(x.ndim for x in fitting.values()):
        raise ValueError("none of its weights fits")
    own.update(fitting)  # in place: MNASNet wants the metadata, too
    model.load_state_dict(own)
    return [name for name in own if name not in fitting]


def load_init(model: nn.Module, args: argparse.Namespace) -> None:
    """Start from another run's weights, and with its normalisation of images."""
    try:
        state = torch.load(args.init, map_location="cpu", weights_only=True)
        args.mean, args.std, args.init_seed = state["mean"], state["std"], state["settings"]["seed"]
        args.init_settings = state["settings"] | {"epoch": state["epoch"], "seed": None}
        fresh = load_fitting(model, state["model"])
    except Exception as error:  # a pickle of code may raise anything
        raise SystemExit(f"--init {args.init}: {first_line(error)}") from error
    print(f"--init {args.init}: all weights but {len(fresh)}: {', '.join(fresh)[:300]}")


def add_drop_path(model: nn.Module, arch: str, rate: float) -> None:
    """Stochastic depth, linear in the depth; torchvision's ViT gets it behind both branches."""
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if isinstance(model, torchvision.models.VisionTransformer):
        for block in model.encoder.layers:
            depths += [StochasticDepth(0.0, "row"), StochasticDepth(0.0, "row")]
            block.dropout = nn.Sequential(block.dropout, depths[-2])
            block.mlp.append(depths[-1])
    if not depths:
        raise SystemExit(f"--drop-path: {arch} has no stochastic depth: pass --drop-path 0")
    for i, depth in enumerate(depths):
        depth.p = rate * i / max(1, len(depths) - 1)


def freeze_unused(model: nn.Module, args: argparse.Namespace) -> None:
    """Freeze what classification does not use (a mask token, say), and DDP would wait for: a step
    on black images tells, and whether the architecture takes this input size."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        output = model.train()(torch.zeros(2, 3, args.input_size, args.input_size))
        getattr(output, "logits", output).sum().backward()
    except Exception as error:
        sentence = f"does not take images of {args.input_size} pixels"
        raise SystemExit(f"--arch {args.arch} {sentence}: {first_line(error)}") from error
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def last_layer(model: nn.Module, num_classes: int) -> nn.Module:
    """The classifier g: the last layer, linear or a 1x1 convolution, with an output per class."""
    for module in reversed(list(model.modules())):
        sizes = getattr(module, "out_features", None), getattr(module, "out_channels", None)
        if num_classes in sizes:
            return module
    raise SystemExit("no classification layer could be found: choose another --arch")


class Aligned(nn.Module):
    """The plain model with the head h on the input of its last layer (without classes: no h), and
    the text adapter, if any: images [n, 3, S, S], texts [n, D] -> logits [n, K], image and text
    features [n, D] (of length 1, float32; None without the embeddings' `width`), tau."""

    def __init__(self, model: nn.Module, num_classes: int, args, width: int | None):
        super().__init__()
        self.model, self.projection, self.adapter, self.width = model, None, None, width
        if width is None:
            return
        if num_classes:
            layer = last_layer(model, num_classes)
            channels = getattr(layer, "in_features", None) or layer.in_channels
            batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
            self.projection = projection_head(args.projection, channels, width, batch_norm)
            layer.register_forward_pre_hook(self.keep_features)
        self.adapter = text_adapter(width) if args.text_adapter == "mlp" else None
        log_temperature = torch.tensor(args.temperature).log()
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=args.learn_temperature)

    def keep_features(self, layer: nn.Module, inputs: tuple) -> None:
        if layer.training:  # not in validation
            self.features = inputs[0]

    def forward(self, images: torch.Tensor, texts: torch.Tensor):
        output = self.model(images)
        logits = getattr(output, "logits", output)
        if self.width is None:
            return logits, None, None, None
        features = logits
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
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def text_adapter(width: int) -> nn.Module:
    """LLM2CLIP's, behind the frozen text encoder: [n, width] -> [n, width]."""
    blocks = []
    for _ in range(4):
        layers = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        blocks.append(ResidualBlock(nn.LayerNorm(width), *layers))
    return nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, width))


class AllGather(torch.autograd.Function):
    """[n, ...] of every process -> [W*n, ...]; backward adds up what all of them want of a row."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may use it elsewhere
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x: torch.Tensor) -> torch.Tensor:
    return AllGather.apply(x) if dist.is_initialized() else x


def global_mean(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of losses [n] where counts [n] is true, over all processes: W times the local sum / the
    global count, since DDP averages the gradients of the W processes afterwards."""
    count, world = counts.float().sum(), 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    return world * (losses * counts).sum() / count.clamp(min=1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing=0.0) -> torch.Tensor:
    """Mean over labelled images, in float32. logits [n, K], labels [n] (-1: none)."""
    options = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
    return global_mean(F.cross_entropy(logits.float(), labels, **options), labels >= 0)


def info_nce(queries, keys, has_text, all_have, temperature) -> torch.Tensor:
    """-log softmax of each query's own key, over the keys of all processes that take part.
    queries [n, D] of this process, keys [W*n, D], has_text [n], all_have [W*n]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    logits = (queries @ keys.T / temperature).masked_fill(~all_have, -1e4)
    return global_mean(F.cross_entropy(logits, own, reduction="none"), has_text)


def alignment_loss(kind: str, images, texts, has_text, temperature=0.2) -> torch.Tensor:
    """L_align of unit vectors images [n, D] and texts [n, D]; pairs without a text (has_text [n],
    bool) take no part at all.

    cosine   mean_i (2 - 2 i_i . t_i)                                (`byol` in the official code)
    infonce  image -> text InfoNCE over the batch of all processes   (`ctr`)
    clip     (image -> text + text -> image) / 2                     (`clip`)
    """
    if kind == "cosine":
        return global_mean(2 - 2 * (images * texts).sum(1), has_text)
    all_have = gather(has_text.float()) > 0
    image_to_text = info_nce(images, gather(texts), has_text, all_have, temperature)
    if kind == "infonce":
        return image_to_text
    text_to_image = info_nce(texts, gather(images), has_text, all_have, temperature)
    return (image_to_text + text_to_image) / 2


def mix_images(images: torch.Tensor, args, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
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


def mixed(loss: Callable, lam: float, *targets: torch.Tensor) -> torch.Tensor:
    """lam * loss(an image's own targets) + (1 - lam) * loss(those of its partner)."""
    if lam == 1:
        return loss(*targets)
    return lam * loss(*targets) + (1 - lam) * loss(*(target.flip(0) for target in targets))


def prepare(args, model: nn.Module, num_classes: int, width: int | None) -> SimpleNamespace:
    """What is trained, and with what: the model with the head on it (`net`), DDP around it (`ddp`),
    its average (`ema`), ...; `parts` are what a checkpoint saves and a resume restores."""
    cuda = args.device.startswith("cuda")
    amp = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(args.amp)
    if args.amp == "auto" and cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        amp = torch.bfloat16 if native else torch.float16
    model.to(args.device, memory_format=torch.channels_last)
    ema = None
    if args.ema_decay:
        average = get_ema_multi_avg_fn(args.ema_decay)
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    torch.manual_seed(args.seed)
    net = ddp = Aligned(model, num_classes, args, width).to(args.device)
    if args.compile:
        model.compile()
    if args.world_size > 1:
        ddp = DistributedDataParallel(net)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=amp is torch.float16)
    optimizer = make_optimizer(net, args, amp)
    parts = {"net": net, "optimizer": optimizer, "scaler": scaler}
    parts |= {"ema_state": ema} if ema else {}
    mean, std = 255 * torch.tensor([args.mean, args.std], device=args.device).view(2, 3, 1, 1)
    return SimpleNamespace(**parts, ddp=ddp, ema=ema, amp=amp, mean=mean, std=std, parts=parts)


def make_optimizer(net: nn.Module, args, amp: torch.dtype | None) -> torch.optim.Optimizer:
    """Without --decay-norms, vectors, position embeddings and class tokens are not decayed."""
    tokens = "pos_embed", "position", "class_token", "cls_token"
    decayed, spared = [], []
    for name, parameter in net.named_parameters():
        small = parameter.ndim == 1 or any(token in name for token in tokens)
        spare = parameter.ndim == 0 or (small and not args.decay_norms)
        if parameter.requires_grad:
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    # torch 2.14: fused momentum starts from garbage if GradScaler skips the first step
    return torch.optim.SGD(groups, momentum=0.9, fused=amp is not torch.float16, **options)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Per epoch: linear from warmup_lr to lr, then a cosine to min_lr."""
    if epoch < args.warmup_epochs:
        start = min(args.lr, args.warmup_lr)
        return start + (args.lr - start) * epoch / args.warmup_epochs
    part = (epoch - args.warmup_epochs) / max(1, args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * part)) / 2


def normalise(images: torch.Tensor, run: SimpleNamespace) -> torch.Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S], channels-last; mean and std are of 0 to 255."""
    images = images.to(run.mean.device, non_blocking=True).permute(0, 3, 1, 2)
    return (images.float() - run.mean) / run.std


def train_step(args, run: SimpleNamespace, images, labels, texts, rng) -> torch.Tensor:
    """One step on images [n, 3, S, S], labels [n], texts [n, D]; [CE, L_align, hits, labelled]."""
    images, lam = mix_images(images, args, rng)
    with torch.autocast(images.device.type, run.amp, enabled=run.amp is not None):
        logits, features, targets, tau = run.ddp(images, texts)
    loss_ce = mixed(lambda y: cross_entropy(logits, y, args.label_smoothing), lam, labels)
    loss_align = torch.zeros_like(loss_ce)
    if features is not None:
        align = functools.partial(alignment_loss, args.align_loss, features, temperature=tau)
        loss_align = mixed(align, lam if args.mix_text else 1.0, targets, texts.any(1))
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss_ce + args.align_weight * loss_align).backward()
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        if args.learn_temperature:
            run.net.log_temperature.clamp_(min=math.log(0.01))  # as CLIP does
        if run.ema:
            run.ema.update_parameters(run.net.model)
            for name, buffer in run.ema.module.named_buffers():
                if not buffer.is_floating_point():  # the average of a counter means nothing
                    buffer.copy_(run.net.model.get_buffer(name))
        hits = (logits.argmax(1) == labels).sum()
        return torch.stack([loss_ce, loss_align, hits, (labels >= 0).sum()])


def train_epoch(args, run: SimpleNamespace, loader: DataLoader, epoch: int) -> dict:
    """One epoch, from 0 on; its log entry. Python waits for a GPU every 50 steps only."""
    run.net.train()
    loader.sampler.epoch = epoch
    stream, rate = args.seed * 10_007 + epoch, learning_rate(args, epoch)
    torch.manual_seed(stream * 10_007 + args.rank)  # dropout: a resumed epoch draws the same
    rng = np.random.default_rng(stream)  # mixing: all processes draw the same
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    device, unreadable, wait = torch.device(args.device), set(), 0.0
    finished = torch.cuda.Event() if device.type == "cuda" else None
    bar = tqdm(total=len(loader), unit="step", leave=False, mininterval=1, disable=args.rank > 0)
    sums, start = torch.zeros(4, device=device), time.perf_counter()
    tick = start
    for step, (images, labels, texts, failed) in enumerate(loader, 1):
        if finished is None or finished.query():  # while the GPU still works, nothing is lost
            wait += time.perf_counter() - tick
        unreadable.update(failed[failed >= 0].tolist())  # on the CPU: no synchronisation
        labels, texts = labels.to(device, non_blocking=True), texts.to(device, non_blocking=True)
        sums += train_step(args, run, normalise(images, run), labels, texts, rng)
        bar.update()
        if step % 50 == 0 or step == len(loader):
            ce, align = finite_losses(sums, step, epoch, args)
            bar.set_postfix_str(f"CE {ce:.3f} align {align:.3f}", refresh=False)
        if finished:
            finished.record()
        tick = time.perf_counter()
    bar.close()
    seconds, (_, _, hits, labelled) = time.perf_counter() - start, global_sum(sums).tolist()
    speed = len(loader) * args.batch_size * args.world_size / seconds
    entry = {"epoch": epoch + 1, "lr": rate}
    entry |= {"loss_ce": ce, "train_top1": 100 * hits / labelled} if labelled else {}
    entry |= {"loss_align": align} if args.embeddings else {}
    return entry | {"images_per_s": speed, "data_wait": wait / seconds, "unreadable": unreadable}


def global_sum(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def finite_losses(sums: torch.Tensor, step: int, epoch: int, args) -> tuple[float, float]:
    """Mean CE and L_align over all processes; if they are not finite, all stop."""
    ce, align = (global_sum(sums)[:2] / step / args.world_size).tolist()
    if not math.isfinite(ce + align):
        where = f"in the 50 steps up to step {step} of epoch {epoch + 1}"
        what = f"the loss is not finite {where} (CE {ce:.4g}, alignment {align:.4g})"
        raise SystemExit(f"{what}: {args.out}/last.pt stays. {NOT_FINITE}")
    return ce, align


@torch.inference_mode()
def validate(run: SimpleNamespace, loader: DataLoader) -> float:
    """Top-1 in percent over all readable images, each counted once."""
    model = run.net.model.eval()
    if dist.is_initialized():  # batch norm's statistics differ: process 0's are saved, and count
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    counts = torch.zeros(2, dtype=torch.float64, device=run.mean.device)
    for images, labels, *_ in loader:
        output = model(normalise(images, run))
        labels = labels.to(counts.device, non_blocking=True)
        hits = getattr(output, "logits", output).argmax(1) == labels
        counts += torch.stack([hits.sum(), (labels >= 0).sum()])
    hits, readable = global_sum(counts).tolist()
    return 100 * hits / max(1, readable)


def settings_of(args, samples: list[tuple[str, int]], captions: Captions | None, amp) -> dict:
    """All that decides about the weights; evaluate.py groups runs by it."""
    free = ["data", "out", "captions", "embeddings", "device", "workers", "rank", "resume"]
    free += ["compile", "val_every", "init"]  # but init_settings
    settings = {name: value for name, value in vars(args).items() if name not in free}
    images = "".join(f"{key_of(path, args.data)} {label}" for path, label in samples)
    checksum = zlib.crc32(os.fsencode(images))
    settings |= {"amp": str(amp), "text": captions.identity if captions else None}
    return settings | {"images": f"{len(samples)} ({checksum:08x})"}


def save(state: dict, file: str) -> None:
    try:
        torch.save(state, file + ".tmp")
    except RuntimeError as error:  # what torch makes of a full disk
        advice = "what was saved stays: start again with --resume"
        sentence = f"cannot be written, is the disk full? ({first_line(error)}); {advice}"
        raise SystemExit(f"{file}: {sentence}") from error
    os.replace(file + ".tmp", file)


def resume(args: argparse.Namespace, run: SimpleNamespace, settings: dict) -> dict:
    """Restore the run; {"epoch", "best_top1", "log"}, of a new one if there is no checkpoint."""
    os.makedirs(args.out, exist_ok=True)  # now, not after an epoch
    last = os.path.join(args.out, "last.pt")
    file = last if os.path.exists(last) or args.resume is True else args.resume
    if not args.resume or (args.resume is True and not os.path.exists(last)):
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers, np)}
        log = [{"config": vars(args) | settings, "versions": str(versions)}]
        return {"epoch": 0, "best_top1": -1.0, "log": log}
    try:
        state = torch.load(file, map_location=args.device, weights_only=True)
        found, _ = state["settings"], state["net"]  # which best.pt lacks
    except Exception as error:  # a pickle of code may raise anything
        raise SystemExit(f"--resume {file}: not a last.pt, {first_line(error)}") from error
    changed = [f"{k} {found.get(k)} -> {v}" for k, v in settings.items() if found.get(k) != v]
    if changed:
        raise SystemExit(f"--resume {file}: these settings differ: {'; '.join(changed)}")
    for name, part in run.parts.items():
        part.load_state_dict(state[name])
    print(f"resuming {file} after epoch {state['epoch']} of {args.epochs}")
    return {name: state[name] for name in ("epoch", "best_top1", "log")}


def save_epoch(args, run: SimpleNamespace, progress: dict, plain: dict) -> None:
    """Print the epoch; write best.pt if it is the best one, the log, and last.pt."""
    entry, model, folder = progress["log"][-1], run.net.model, args.out
    figures = [f"{name} {x:.4g}" for name, x in entry.items() if isinstance(x, float)]
    print(f"epoch {progress['epoch']}/{args.epochs}: {', '.join(figures)}")
    plain = plain | {"model": model.state_dict(), "val_top1": entry.get("val_top1")}
    plain |= {"ema": run.ema.module.state_dict() if run.ema else None, "epoch": progress["epoch"]}
    for name in "projection", "adapter":
        part = getattr(run.net, name)
        plain[name] = part.state_dict() if part else None
    if entry.get("val_top1", -1.0) > progress["best_top1"]:
        progress["best_top1"] = entry["val_top1"]
        save(plain | {"selected": "best epoch on the validation folder"}, f"{folder}/best.pt")
    with open(f"{folder}/log.jsonl.tmp", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in progress["log"])
    os.replace(f"{folder}/log.jsonl.tmp", f"{folder}/log.jsonl")
    parts = {name: part.state_dict() for name, part in run.parts.items()}
    save(plain | {"selected": "last epoch"} | parts | progress, f"{folder}/last.pt")


def start_process(args: argparse.Namespace) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: no rank outlives a torchrun that is killed, writing beside its successor
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if args.rank > 0:
        sys.stdout = io.StringIO()  # print() is for process 0
    if (
        args.device == "cpu" and args.world_size == 1 and "OMP_NUM_THREADS" not in os.environ
    ):  # one thread per core
        torch.set_num_threads(max(1, available_cpus() - args.workers))


def describe_run(args, model: nn.Module, classes, samples, val_samples, captions) -> None:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.arch}, {size:.2f} M parameters, {len(classes) or 'no'} classes, ", end="")
    described = np.count_nonzero(np.diff(captions.starts)) if captions else 0
    print(f"{len(samples)} training images ({described} with captions), {len(val_samples)} of val/")
    print(f"batch {args.batch_size} x {args.world_size}, lr {args.lr:g}")
    if captions and captions.foreign:
        print(f"{captions.foreign} captions belong to no image of train/")


def check_epoch(args, run: SimpleNamespace, unreadable: set[int], samples: list) -> int:
    """Name the images that could not be read, and stop before bad weights are saved. How many."""
    if dist.is_initialized():
        parts = [None] * args.world_size
        dist.all_gather_object(parts, unreadable)
        unreadable = set().union(*parts)
    if unreadable:
        names = [repr(key_of(samples[i][0], args.data)) for i in sorted(unreadable)[:5]]
        print(f"{len(unreadable)} unreadable images left out: {', '.join(names)}")
    batch = args.batch_size * args.world_size
    if len(unreadable) * args.repeated_aug >= len(samples) // batch * batch:
        raise SystemExit("no training image can be read")
    if not all(parameter.isfinite().all() for parameter in run.net.parameters()):
        raise SystemExit(f"this epoch left weights that are not finite: not saved. {NOT_FINITE}")
    return len(unreadable)


def main() -> None:
    args = parse_args()
    start_process(args)
    classes, samples, val_samples = list_data(args)
    captions, keys = None, (key_of(path, args.data) for path, _ in samples)
    if args.embeddings:
        shuffle = args.seed if args.shuffle_captions else None
        captions = Captions(args.captions, args.embeddings, keys, shuffle)
    model, rebuild = build_model(args, len(classes) or captions.width)
    describe_run(args, model, classes, samples, val_samples, captions)
    loader, val_loader = make_loaders(args, samples, val_samples, captions)
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    run = prepare(args, model, len(classes), captions.width if captions else None)
    settings = settings_of(args, samples, captions, run.amp)
    plain = {"arch": args.arch, "rebuild": rebuild, "classes": classes, "settings": settings}
    plain |= {name: getattr(args, name) for name in PREPROCESSING}
    progress = resume(args, run, settings)
    for epoch in range(progress["epoch"], args.epochs):
        entry = train_epoch(args, run, loader, epoch)
        entry["unreadable"] = check_epoch(args, run, entry["unreadable"], samples)
        if val_samples and ((epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs):
            entry["val_top1"] = validate(run, val_loader)
        progress["epoch"] = epoch + 1
        progress["log"].append(entry)
        if args.rank == 0:
            save_epoch(args, run, progress, plain)
    print(f"{args.out}/last.pt: {args.epochs} epochs")
    if args.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'train.py'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start again with --resume") from None
