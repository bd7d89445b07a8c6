"""Train an image classifier with cross-entropy plus alignment to caption embeddings: stage 3 of 4 (caption -> embed -> train -> evaluate).

In:  --data ROOT                 ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; ROOT/train/_unlabeled/ has images without a label
     --captions, --embeddings    what caption.py and embed.py wrote for ROOT/train; without them: the cross-entropy baseline, same code
Out: RUN/last.pt                 plain model weights and what is needed to evaluate and to resume; results are reported from it
     RUN/best.pt                 the same at the best epoch *on the validation folder* (chosen on it, so no unbiased result)
     RUN/log.jsonl               first the configuration, then one object per epoch

Launch:
    python train.py --data imagenet --out runs/baseline --recipe resnet
    torchrun --standalone --nproc_per_node=4 train.py --data imagenet --out runs/aligned --recipe resnet \\
        --captions captions.jsonl --embeddings embeddings.npy
    the same line with --resume after a kill

    L = CE(g(f(x)), y) + lambda * L_align(h(f(x)), t)                                             GPT4Image, arXiv 2306.00693

f(x) is the input of the classifier's last layer g, t the frozen embedding of a caption of x, h a small head used in training only.
"""

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset, pil_loader
from torchvision.io import ImageReadMode, decode_image
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
UNLABELED = "_unlabeled"

# Defaults by recipe. resnet and deit are the paper's (official code), finetune is ours. The paper's alignment weight is 0.3, but clip's
# all-gather keeps only the local slice's gradient and DDP averages over W processes: what acts is 0.3 / W, with W = 4 for the ResNet and
# 8 for the DeiT. A weight means the same at every W here, so these are the effective values.
RECIPES = ("resnet", "deit", "finetune")
LEARNING_RATES = {
    "resnet": (0.1, 256),
    "deit": (5e-4, 512),
    "finetune": (0.01, 64),
}  # per so many images of the global batch
OPTIONS = {
    "arch": (
        "resnet50",
        "vit_b_16",
        "resnet50",
        "torchvision classifier, or hub id or folder of a transformers image classifier",
    ),
    "pretrained": (False, False, True, "start from published weights"),
    "epochs": (120, 300, 30, ""),
    "batch_size": (256, 128, 64, "images per process"),
    "optimizer": ("sgd", "adamw", "sgd", "sgd (momentum 0.9) or adamw"),
    "weight_decay": (1e-4, 0.05, 1e-4, ""),
    "decay_norms": (True, False, True, "weight decay on norms, biases and position embeddings too"),
    "warmup_epochs": (0, 5, 1, "linear warm-up before the cosine"),
    "warmup_lr": (1e-6, 1e-6, 1e-6, "where the warm-up begins"),
    "min_lr": (1e-5, 1e-5, 0.0, "where the cosine ends"),
    "label_smoothing": (0.0, 0.1, 0.0, ""),
    "mixup": (0.0, 0.8, 0.0, "Beta parameter, 0 = off; with --cutmix each batch draws one of them"),
    "cutmix": (0.0, 1.0, 0.0, "Beta parameter, 0 = off"),
    "randaugment": (0, 27, 0, "magnitude 0..30, 0 = off (timm's m9 is 27 of torchvision's 30)"),
    "color_jitter": (0.0, 0.3, 0.0, ""),
    "random_erasing": (0.0, 0.25, 0.0, "probability"),
    "repeated_aug": (
        1,
        3,
        1,
        "differently augmented copies of an image in an epoch of unchanged length",
    ),
    "drop_path": (0.0, 0.1, 0.0, "stochastic depth; refused where an architecture has none"),
    "ema_decay": (0.0, 0.99996, 0.0, "averaged weights, 0 = off"),
    "clip_grad": (0.0, 0.0, 0.0, "largest norm of the gradient, 0 = off"),
    "interpolation": ("bilinear", "bicubic", "bilinear", "bilinear or bicubic"),
    "crop_ratio": (0.875, 1.0, 0.875, "evaluation: centre crop's share of the resized side"),
    "align_weight": (0.075, 0.0375, 0.075, "lambda; the same at every number of processes"),
    "temperature": (0.2, 0.05, 0.2, "tau of the contrastive losses"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", required=True, help="folder with train/ and val/")
    p.add_argument("--out", required=True, metavar="RUN", help="folder for checkpoints and the log")
    p.add_argument("--captions", help="captions.jsonl of train/")
    p.add_argument("--embeddings", help="embeddings.npy of these captions")
    p.add_argument(
        "--recipe",
        default="resnet",
        choices=RECIPES,
        help="sets the defaults marked *; default: resnet",
    )
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False
    )  # the recipe is needed before its defaults are
    first.add_argument("--recipe", default="resnet")
    recipe = first.parse_known_args(argv)[0].recipe
    column = RECIPES.index(recipe) if recipe in RECIPES else 0
    for name, option in OPTIONS.items():
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(option[column], bool)
            else {"type": type(option[column])}
        )
        choices = (
            {"choices": ("sgd", "adamw")}
            if name == "optimizer"
            else {"choices": ("bilinear", "bicubic")}
            if name == "interpolation"
            else {}
        )
        flags = ["-b"] * (name == "batch_size") + ["--" + name.replace("_", "-")]
        p.add_argument(
            *flags,
            default=option[column],
            help=f"* {option[-1]} ({', '.join(f'{r} {v}' for r, v in zip(RECIPES, option))})",
            **kind,
            **choices,
        )
    p.add_argument(
        "--lr",
        type=float,
        help="peak learning rate; default: the recipe's, scaled with the global batch",
    )
    p.add_argument(
        "--input-size", type=int, help="pixels; default: what the architecture was published with"
    )
    p.add_argument(
        "--align-loss",
        default="clip",
        choices=["clip", "infonce", "cosine"],
        help="default: clip, the paper's",
    )
    p.add_argument(
        "--align-targets",
        default="one-hot",
        choices=["one-hot", "class"],
        help="class: all captions of an image's class are positives; default: one-hot, the paper's",
    )
    p.add_argument(
        "--projection", default="mlp", choices=["mlp", "linear"], help="the head h; default: mlp"
    )
    p.add_argument(
        "--shuffle-captions",
        action="store_true",
        help="the control: captions are permuted over the images, drawn with --seed",
    )
    p.add_argument(
        "--text-adapter",
        default="none",
        choices=["none", "mlp"],
        help="mlp: LLM2CLIP's trained adapter on the frozen text side",
    )
    p.add_argument("--learn-temperature", action="store_true", help="train tau, as CLIP does")
    p.add_argument(
        "--mix-text",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a mixed image is aligned with both captions; off: with its own only, as in the official code",
    )
    p.add_argument(
        "--amp",
        default="auto",
        choices=["auto", "bfloat16", "float16", "off"],
        help="auto: bfloat16 or else float16 on a GPU, off on a CPU",
    )
    p.add_argument(
        "--sync-bn", action="store_true", help="batch norm over all processes (CUDA only)"
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument(
        "--val-every",
        type=int,
        default=1,
        metavar="N",
        help="validate after every Nth epoch, and after the last; default: 1",
    )
    p.add_argument("--seed", type=int, default=0, help="of everything that is drawn; default: 0")
    p.add_argument(
        "-j",
        "--workers",
        type=int,
        default=min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="data loading processes",
    )
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:N or cpu; default: cuda if there is one",
    )
    p.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="continue from RUN/last.pt (from the start if there is none), or from the checkpoint that is named",
    )
    args = p.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no GPU that torch can use")
    given = {option.split("=")[0] for option in (sys.argv[1:] if argv is None else argv)}
    idle = given & {
        "--align-weight",
        "--align-loss",
        "--align-targets",
        "--temperature",
        "--projection",
        "--shuffle-captions",
        "--text-adapter",
        "--learn-temperature",
        "--mix-text",
        "--no-mix-text",
    }
    if idle and not args.embeddings:
        p.error(f"{min(idle)} does nothing without --captions and --embeddings")
    if bool(args.captions) != bool(args.embeddings):
        p.error("--captions and --embeddings go together")
    if (
        min(args.epochs, args.batch_size, args.repeated_aug, args.val_every) < 1
        or args.workers < 0
        or args.temperature <= 0
        or args.align_weight < 0
    ):
        p.error(
            "--epochs, -b, --repeated-aug and --val-every start at 1, --temperature above 0, --align-weight and -j at 0"
        )
    if args.align_targets == "class" and args.align_loss == "cosine":
        p.error("--align-targets class has no meaning for the cosine loss, which has no negatives")
    if args.learn_temperature and args.align_loss == "cosine":
        p.error("--learn-temperature: the cosine loss has no temperature")
    if (
        args.warmup_epochs < 0
        or args.warmup_lr <= 0
        or (args.lr is not None and args.lr <= 0)
        or not 0 <= args.ema_decay < 1
    ):
        p.error(
            "--lr and --warmup-lr start above 0, --warmup-epochs at 0, --ema-decay lies between 0 and 1"
        )
    if args.sync_bn and not args.device.startswith("cuda"):
        p.error("--sync-bn needs CUDA")
    return args


# ------------------------------------------------------------------------------------------------------------ data


class Captions:
    """Which rows of embeddings.npy belong to which image, by the image's key; the array itself stays on the disk."""

    def __init__(
        self, captions: str, embeddings: str, keys: Iterable[str], shuffle: int | None = None
    ):
        metadata = embeddings.removesuffix(".npy") + ".json"
        if not os.path.exists(captions):
            raise SystemExit(f"--captions {captions}: no such file: run caption.py first")
        try:
            self.identity = json.load(open(metadata, encoding="utf-8"))
            table = np.load(embeddings, mmap_mode="r")
            with open(captions, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"captions and embeddings: {error}: run embed.py --captions {captions} --out {embeddings}"
            )
        if digest != self.identity.get("captions_sha256"):
            raise SystemExit(
                f"{captions} is not the file that {embeddings} was made from (it was changed, reordered or extended): run embed.py again"
            )
        own = np.fromiter(
            map(hash, keys), np.int64
        )  # 64-bit hashes: a dictionary of a million keys would take 200 MB in every process
        with open(captions, "rb") as stream:
            lines = np.fromiter((hash(json.loads(line)["image"]) for line in stream), np.int64)
        order = np.argsort(own)
        owner = order[np.searchsorted(own, lines, sorter=order).clip(max=len(own) - 1)]
        owner[own[owner] != lines] = -1
        if (
            table.ndim != 2
            or len(table) != len(owner)
            or table.dtype not in (np.float16, np.float32)
        ):
            raise SystemExit(
                f"{embeddings} is {table.dtype} {list(table.shape)}, expected float16 or float32 [{len(owner)}, width]: run embed.py again"
            )
        self.foreign = int((owner < 0).sum())
        if self.foreign == len(owner):
            raise SystemExit(
                f"none of the {len(owner)} captions belongs to an image of train/: was caption.py run with --data ROOT/train?"
            )
        self.rows = np.argsort(owner, kind="stable")[self.foreign :]  # rows grouped by image ...
        self.ends = np.cumsum(
            np.bincount(owner[owner >= 0], minlength=len(own))
        )  # ... those of image i end here
        self.file, self.width, self.table = embeddings, table.shape[1], None
        if shuffle is not None:
            self.rows = np.random.default_rng(shuffle).permutation(self.rows)

    def count(self, image: int) -> int:
        return int(self.ends[image] - (self.ends[image - 1] if image else 0))

    def draw(self, image: int) -> torch.Tensor | None:
        """float32 [width]: the embedding of one of the image's captions, at random; None if it has none."""
        if not (count := self.count(image)):
            return None
        if self.table is None:  # opened by each worker for itself
            self.table = np.load(self.file, mmap_mode="r")
        row = self.rows[self.ends[image] - 1 - int(torch.randint(count, ()))]
        return F.normalize(torch.from_numpy(self.table[row].astype(np.float32)), dim=0)


class TrainImages(Dataset):
    """Item (index, seed): uint8 image [S, S, 3] (collated without a transposition, channels-last on the device), label (-1: none), text [D], has_text, index of an unreadable image (else -1).

    The random state is the item's own, so augmentation depends neither on the number of workers nor on that of processes.
    """

    def __init__(
        self, samples: list[tuple[str, int]], transform, captions: Captions | None, size: int
    ):
        self.samples, self.transform, self.captions, self.size = samples, transform, captions, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]):
        (index, seed), failed = item, -1
        path, label = self.samples[index]
        in_worker = (
            torch.utils.data.get_worker_info() is not None
        )  # which has a random state to itself
        with contextlib.nullcontext() if in_worker else torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image = read_image(path)
            except Exception:  # one bad image costs that image: no label, no text, counted and named by the main loop
                image, label, failed = (
                    torch.zeros(3, self.size, self.size, dtype=torch.uint8),
                    -1,
                    index,
                )
            image = (
                self.transform(image) if failed < 0 else image
            )  # not in the `try`: a fault of ours is no unreadable image
            image = image.permute(1, 2, 0).contiguous()
            text = self.captions.draw(index) if self.captions and failed < 0 else None
        has_text = text is not None
        return (
            image,
            label,
            text if has_text else torch.zeros(self.captions.width if self.captions else 0),
            has_text,
            failed,
        )


def read_image(path: str) -> torch.Tensor:
    """uint8 [3, H, W]. torchvision's decoder is about twice as fast as Pillow, which reads what it cannot (CMYK, BMP, TIFF ...)."""
    with contextlib.suppress(RuntimeError):
        image = decode_image(path, ImageReadMode.RGB)
        if image.ndim == 3 and image.dtype == torch.uint8:  # not an animation, not 16 bit
            return image
    return v2.functional.pil_to_tensor(pil_loader(path))


class EvalImages(Dataset):
    """float32 image [3, S, S], label (-1: unreadable), through torchvision's own evaluation preprocessing (Pillow)."""

    def __init__(self, samples: list[tuple[str, int]], args: argparse.Namespace):
        self.samples, self.size = samples, args.input_size
        self.transform = v2.Compose(
            [
                v2.Resize(
                    round(self.size / args.crop_ratio), InterpolationMode(args.interpolation)
                ),
                v2.CenterCrop(self.size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(args.mean, args.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        try:
            return self.transform(pil_loader(path)), label
        except Exception:
            return torch.zeros(3, self.size, self.size), -1


class EpochSampler(Sampler):
    """(index, seed) of this process's part of an epoch. At the same global batch, batch k is the same set at every world size."""

    def __init__(self, length: int, copies: int, seed: int, rank: int, world: int):
        self.length, self.copies, self.seed, self.rank, self.world, self.epoch = (
            length,
            copies,
            seed,
            rank,
            world,
            0,
        )

    def __len__(self) -> int:
        return self.length // self.world

    def __iter__(self):
        stream = self.seed * 10_007 + self.epoch
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(stream)
        ).repeat_interleave(self.copies)
        for position in range(self.rank, len(self) * self.world, self.world):
            yield int(order[position]), (stream * 1_000_000_007 + position) % 2**63


class FlippedCrop(v2.RandomResizedCrop):
    """RandomResizedCrop and horizontal flip of one uint8 image [3, H, W], the same pixels as torchvision's: resizing and flipping are
    faster on channels-last memory that is dense, and a plain tensor needs no search for what to transform."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.make_params([image]).values()
        crop = image[None, :, top : top + height, left : left + width].contiguous(
            memory_format=torch.channels_last
        )
        crop = F.interpolate(crop, self.size, mode=self.interpolation.value, antialias=True)
        return (crop.flip(3) if torch.rand(()) < 0.5 else crop)[0]


def train_transform(args: argparse.Namespace) -> v2.Compose:
    """On uint8 tensors throughout; normalisation follows on the device."""
    interpolation = InterpolationMode(args.interpolation)
    steps = [FlippedCrop(args.input_size, interpolation=interpolation)]
    if args.randaugment:
        steps.append(
            v2.RandAugment(magnitude=args.randaugment, interpolation=InterpolationMode.BILINEAR)
        )  # tensors cannot be rotated bicubically
    if args.color_jitter:
        steps.append(v2.ColorJitter(*[args.color_jitter] * 3))
    if args.random_erasing:
        steps.append(v2.RandomErasing(args.random_erasing, value=[round(255 * m) for m in MEAN]))
    return v2.Compose(steps)


def list_samples(folder: str, classes: list[str], optional: bool = False) -> list[tuple[str, int]]:
    try:
        return make_dataset(
            folder,
            {name: i for i, name in enumerate(classes)},
            IMG_EXTENSIONS,
            allow_empty=optional,
        )
    except FileNotFoundError as error:
        raise SystemExit(f"{folder}: {error}")


def key_of(path: str, folder: str) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


# ----------------------------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict]:
    """The plain model, and the keyword arguments (torchvision) or configuration (transformers) that build it again. Sets
    args.input_size, mean and std to what the architecture or its weights were published with."""
    args.mean, args.std = MEAN, STD
    if "/" in args.arch or os.path.isdir(args.arch):
        try:
            config = transformers.AutoConfig.from_pretrained(args.arch, num_labels=num_classes)
            published_size = getattr(config, "image_size", 224)
            args.input_size = args.input_size or (
                published_size if isinstance(published_size, int) else published_size[0]
            )
            auto = transformers.AutoModelForImageClassification
            model = (
                auto.from_pretrained(args.arch, config=config, ignore_mismatched_sizes=True)
                if args.pretrained
                else auto.from_config(config)
            )
            if args.pretrained:
                images = transformers.AutoImageProcessor.from_pretrained(args.arch)
                args.mean, args.std = list(images.image_mean), list(images.image_std)
        except (OSError, ValueError, AttributeError) as error:
            raise SystemExit(
                f"--arch {args.arch}: not an image classifier of transformers: {str(error).strip().splitlines()[0]}"
            )
        if args.drop_path:
            raise SystemExit(
                "--drop-path: for a transformers model set it in its own config.json (drop_path_rate)"
            )
        return model, {"config": model.config.to_dict()}
    names = torchvision.models.list_models(module=torchvision.models)
    if args.arch not in names:
        close = difflib.get_close_matches(args.arch, names)
        raise SystemExit(
            f"--arch {args.arch}: torchvision has no such classifier"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    weights = torchvision.models.get_model_weights(args.arch).DEFAULT
    published_size = weights.transforms().crop_size[0]
    args.input_size = args.input_size or published_size
    kwargs = {}
    if args.arch.startswith(
        "vit_"
    ):  # vit_h_14 was published with another size than it is built with
        kwargs["image_size"] = args.input_size
    elif args.input_size != published_size and args.arch.startswith("maxvit"):
        kwargs["input_size"] = (args.input_size, args.input_size)
    if args.arch in ("googlenet", "inception_v3"):
        kwargs |= {
            "init_weights": not args.pretrained,
            "transform_input": args.pretrained,
        }  # what they do anyway, the first without a warning
    try:
        if args.pretrained:
            args.mean, args.std = weights.transforms().mean, weights.transforms().std
            pretrained = torchvision.models.get_model(args.arch, weights=weights).state_dict()
        model = torchvision.models.get_model(args.arch, num_classes=num_classes, **kwargs)
    except (ValueError, AssertionError, OSError) as error:
        raise SystemExit(
            f"--arch {args.arch} cannot be built for --input-size {args.input_size}, or its weights cannot be had: {str(error).splitlines()[0]}"
        )
    if args.pretrained:  # all but the layers whose shape depends on the number of classes, and heads that were not published
        own = model.state_dict()
        if "image_size" in kwargs:
            pretrained = torchvision.models.vision_transformer.interpolate_embeddings(
                args.input_size, model.patch_size, pretrained
            )
        model.load_state_dict(
            own
            | {
                name: value
                for name, value in pretrained.items()
                if name in own and value.shape == own[name].shape
            }
        )
    if args.drop_path:
        add_drop_path(model, args.arch, args.drop_path)
    return model, {"kwargs": kwargs}


def add_drop_path(model: nn.Module, arch: str, rate: float) -> None:
    """Stochastic depth, linear in the depth; in torchvision's ViT, which has none, behind both branches of a block (no parameters)."""
    depths = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    if isinstance(model, torchvision.models.VisionTransformer):
        blocks = list(model.encoder.layers)
        depths = [StochasticDepth(0.0, "row") for _ in range(2 * len(blocks))]
        for i, block in enumerate(blocks):
            block.dropout = nn.Sequential(block.dropout, depths[2 * i])
            block.mlp.append(depths[2 * i + 1])
    if not depths:
        raise SystemExit(f"--drop-path: {arch} has no stochastic depth: leave the option out")
    for i, depth in enumerate(depths):
        depth.p = rate * i / max(1, len(depths) - 1)


def last_layer(model: nn.Module, num_classes: int) -> nn.Module:
    """The classifier g: the last linear layer (a 1x1 convolution in SqueezeNet) with one output per class."""
    layers = [
        m
        for m in model.modules()
        if num_classes in (getattr(m, "out_features", None), getattr(m, "out_channels", None))
    ]
    if not layers:
        raise SystemExit("this architecture has no classification layer that could be found")
    return layers[-1]


class Aligned(nn.Module):
    """The plain model with the head h on the input of its last layer, and the optional text adapter.

    images [n, 3, S, S], texts [n, D] -> list of logits [n, K] (auxiliary heads behind the main one), image features [n, D] and text
    features [n, D], both of length 1 and float32 (None without `width`), and the temperature.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, args: argparse.Namespace, width: int | None
    ):
        super().__init__()
        self.model, self.projection, self.adapter = model, None, None
        layer = last_layer(model, num_classes)
        if width is not None:
            self.projection = projection_head(
                args.projection,
                getattr(layer, "in_features", None) or layer.in_channels,
                width,
                batch_norm=any(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
            )
            self.adapter = text_adapter(width) if args.text_adapter == "mlp" else None
            self.log_temperature = nn.Parameter(
                torch.tensor(args.temperature).log(), requires_grad=args.learn_temperature
            )
            layer.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))

    def forward(self, images: torch.Tensor, texts: torch.Tensor):
        output = self.model(images)
        logits = list(output) if isinstance(output, tuple) else [getattr(output, "logits", output)]
        if self.projection is None:
            return [x for x in logits if x is not None], None, None, None
        features, self.features = self.features, None
        features = (
            features.flatten(2).mean(2) if features.ndim == 4 else features
        )  # [n, C, h, w] -> [n, C]
        texts = self.adapter(texts) if self.adapter else texts
        log_temperature = self.log_temperature
        if (
            log_temperature.requires_grad
        ):  # not below 0.01 (CLIP); the gradient passes, or it would stay there for ever
            log_temperature = (
                log_temperature
                + (log_temperature.clamp(min=math.log(0.01)) - log_temperature).detach()
            )
        return (
            logits,
            F.normalize(self.projection(features).float(), dim=1),
            F.normalize(texts.float(), dim=1),
            log_temperature.exp(),
        )


def projection_head(kind: str, width: int, text_width: int, batch_norm: bool) -> nn.Module:
    """The head h (official code): features [n, width] -> [n, text_width]; with batch norm its ResNet's, without its DeiT's."""
    if kind == "linear":
        return nn.Linear(width, text_width, bias=False)
    norm = [nn.BatchNorm1d(2 * text_width)] if batch_norm else []
    head = nn.Sequential(
        nn.Linear(width, 2 * text_width, bias=not batch_norm),
        *norm,
        nn.ReLU(inplace=True),
        nn.Linear(2 * text_width, text_width),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=1024**-0.5 if batch_norm else 0.02)
    return head


class ResidualBlock(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def text_adapter(width: int) -> nn.Module:
    """LLM2CLIP's adapter behind the frozen LLM: 4 x (LayerNorm -> Linear -> GELU -> Linear, residual), LayerNorm -> Linear."""
    blocks = [
        ResidualBlock(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        for _ in range(4)
    ]
    return nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, width))


# ---------------------------------------------------------------------------------------------------------- losses


class AllGather(torch.autograd.Function):
    """[n, ...] of every process -> [W*n, ...]. Backward adds up what all processes want changed in this one's rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(
            memory_format=torch.contiguous_format
        )  # autograd may use the original elsewhere
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x: torch.Tensor) -> torch.Tensor:
    return AllGather.apply(x) if dist.is_initialized() else x


def global_mean(losses: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """sum(losses) over all processes / sum(mass) over all processes, once DDP has averaged the gradients over W processes."""
    total, world = mass.sum(), 1
    if dist.is_initialized():
        dist.all_reduce(total)
        world = dist.get_world_size()
    return world * losses.sum() / total.clamp(min=1e-6)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mixing: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy in float32 over labelled images. logits [n, K]; labels [n], -1 = none; mixing [n, n]: image i is made of
    mixing[i, j] of image j, and so is its label."""
    targets = F.one_hot(labels.clamp(min=0), logits.shape[1]).float() * (labels >= 0)[:, None]
    targets = targets if mixing is None else mixing @ targets
    mass = targets.sum(1)
    return global_mean(
        mass
        * F.cross_entropy(
            logits.float(),
            targets / mass.clamp(min=1e-6)[:, None],
            label_smoothing=smoothing,
            reduction="none",
        ),
        mass,
    )


def soft_info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    targets: torch.Tensor,
    key_mask: torch.Tensor,
    temperature,
) -> torch.Tensor:
    """InfoNCE, queries -> keys: -sum_j targets_ij log softmax_j(q_i . k_j / temperature), averaged over the targets' mass.
    queries [n, D] of this process, keys [W*n, D] of all; key_mask [W*n]: which keys take part."""
    logits = (queries @ keys.T / temperature).masked_fill(~key_mask, -1e4)
    return global_mean(-(targets * F.log_softmax(logits, dim=1)).sum(1), targets.sum(1))


def alignment_loss(
    kind: str,
    images: torch.Tensor,
    texts: torch.Tensor,
    has_text: torch.Tensor,
    temperature=0.2,
    mixing: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_align of unit vectors images [n, D] and texts [n, D] (has_text [n]); pairs without a text take no part at all.

    cosine   mean_i (2 - 2 i_i . t_i)                                          (`byol` in the official code)
    infonce  image -> text InfoNCE over the batch of all processes             (`ctr`)
    clip     (image -> text + text -> image) / 2                               (`clip`)

    mixing [n, n]: the targets of image i are sum_j mixing[i, j] * (the targets of image j), as for its label; with mixup
    L = lam L(i, t_i) + (1 - lam) L(i, t_partner). labels [n]: captions of images of the same class share the target mass (-1: none).
    """
    n, has = len(images), has_text.float()
    mixing = torch.eye(n, device=images.device) if mixing is None else mixing
    if kind == "cosine":
        mass = mixing * has
        return global_mean(mass * (2 - 2 * images @ texts.T), mass)
    all_texts, all_has, start = (
        gather(texts),
        gather(has),
        (dist.get_rank() * n if dist.is_initialized() else 0),
    )
    positive = F.pad(
        torch.eye(n, device=images.device), (start, len(all_has) - start - n)
    )  # [n, W*n]: caption k suits image j
    if labels is not None:
        positive = positive.maximum(
            (labels[:, None] == gather(labels)).float() * (labels >= 0)[:, None]
        )
    positive = positive * has[:, None] * all_has
    targets = mixing @ (positive / positive.sum(1, keepdim=True).clamp(min=1))  # [n, W*n]
    image_to_text = soft_info_nce(images, all_texts, targets, all_has > 0, temperature)
    if kind == "infonce":
        return image_to_text
    all_mixing = gather(mixing)  # [W*n, n]: row (r, i) says what image i of process r is made of
    made_of = torch.einsum(
        "wik,jwk->jwi", all_mixing.view(-1, n, n), positive.view(n, -1, n)
    ).flatten(1)  # [n, W*n]
    targets = made_of / made_of.sum(1, keepdim=True).clamp(min=1e-6) * has[:, None]
    in_play = (
        torch.einsum("wik,wk->wi", all_mixing.view(-1, n, n), all_has.view(-1, n)).flatten() > 0
    )
    text_to_image = soft_info_nce(texts, gather(images), targets, in_play, temperature)
    return (image_to_text + text_to_image) / 2


# -------------------------------------------------------------------------------------------------------- training


def train_epoch(
    args, net, model, loader, optimizer, scaler, ema, mix, amp, epoch: int, quiet: bool
) -> dict:
    """One epoch; {"loss_ce", "loss_align" (with embeddings), "train_top1", "images_per_s", "data_wait" (a share of the time), "unreadable"}. Synchronises with the device every 50 steps only."""
    net.train()
    device = torch.device(args.device)
    mean, std = (
        255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (args.mean, args.std)
    )
    sums = torch.zeros(4, device=device)  # CE, alignment, hits, labelled images
    bad_step, bad_values, failed, wait = (
        torch.full((), -1, device=device),
        torch.zeros(2, device=device),
        set(),
        0.0,
    )
    bar = tqdm(
        total=len(loader),
        unit="step",
        desc=f"epoch {epoch}",
        disable=quiet,
        leave=False,
        mininterval=1,
    )
    finished = torch.cuda.Event() if device.type == "cuda" else None
    start = tick = time.perf_counter()
    for step, (images, labels, texts, has_text, broken) in enumerate(loader):
        if (
            finished is None or finished.query()
        ):  # while the GPU still works on the step before, nothing is lost
            wait += time.perf_counter() - tick
        failed.update(broken[broken >= 0].tolist())  # on the CPU: no synchronisation
        images, labels, texts, has_text = (
            x.to(device, non_blocking=True) for x in (images, labels, texts, has_text)
        )
        images = (images.permute(0, 3, 1, 2).float() - mean) / std
        if (
            mix and args.repeated_aug > 1
        ):  # its partner is the neighbour: let that not be a copy of the same image
            shuffle = torch.randperm(len(images), device=device)
            images, labels, texts, has_text = (
                images[shuffle],
                labels[shuffle],
                texts[shuffle],
                has_text[shuffle],
            )
        images, mixing = (
            mix(images, torch.arange(len(images), device=device)) if mix else (images, None)
        )  # the mixed "labels" say who is in whom
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits, features, targets, temperature = net(images, texts)
        loss_ce = cross_entropy(logits[0], labels, mixing, args.label_smoothing)
        loss = loss_ce + sum(
            weight * cross_entropy(x, labels, mixing, args.label_smoothing)
            for x, weight in zip(logits[1:], model.aux_weights)
        )
        loss_align = torch.zeros((), device=device)
        if features is not None:
            loss_align = alignment_loss(
                args.align_loss,
                features,
                targets,
                has_text,
                temperature,
                mixing if args.mix_text else None,
                labels if args.align_targets == "class" else None,
            )
            loss = loss + args.align_weight * loss_align
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update_parameters(model)
            for name, buffer in ema.module.named_buffers():
                if (
                    not buffer.is_floating_point()
                ):  # indices and counters: their average means nothing
                    buffer.copy_(model.get_buffer(name))
        with torch.no_grad():
            hits = ((logits[0].argmax(1) == labels) & (labels >= 0)).sum()
            values = torch.stack([loss_ce, loss_align])
            sums += torch.cat([values, torch.stack([hits, (labels >= 0).sum()]).float()])
            first_bad = (bad_step < 0) & ~values.isfinite().all()
            bad_step, bad_values = (
                torch.where(first_bad, step, bad_step),
                torch.where(first_bad, values, bad_values),
            )
        bar.update()
        if step % 50 == 49 or step == len(loader) - 1:
            if dist.is_initialized():
                dist.all_reduce(bad_step, dist.ReduceOp.MAX)  # all processes stop, or none
            if bad_step >= 0:
                bar.close()
                good = os.path.join(args.out, "last.pt")
                raise SystemExit(
                    f"the loss is not finite at step {int(bad_step)} of epoch {epoch}: CE {bad_values[0]:.4g}, alignment {bad_values[1]:.4g}; "
                    + (
                        f"{good} is the last good checkpoint"
                        if os.path.exists(good)
                        else "there is no checkpoint yet"
                    )
                    + ". Try a smaller --lr, --clip-grad 1 or --amp bfloat16"
                )
            bar.set_postfix_str(
                f"CE {sums[0] / (step + 1):.3f} align {sums[1] / (step + 1):.3f}", refresh=False
            )
        if finished:
            finished.record()
        tick = time.perf_counter()
    bar.close()
    world = 1
    if dist.is_initialized():
        dist.all_reduce(sums)
        world = dist.get_world_size()
    seconds, (ce, align, hits, labelled) = time.perf_counter() - start, sums.tolist()
    entry = {
        "loss_ce": ce / len(loader) / world,
        "loss_align": align / len(loader) / world,
        "train_top1": 100 * hits / max(1, labelled),
        "images_per_s": len(loader) * args.batch_size * world / seconds,
        "data_wait": wait / seconds,
        "unreadable": failed,
    }
    return (
        entry
        if args.embeddings
        else {name: value for name, value in entry.items() if name != "loss_align"}
    )


@torch.inference_mode()
def validate(
    model: nn.Module, samples: list, args: argparse.Namespace, rank: int, world: int
) -> float:
    """Top-1 in percent over all readable images, each counted once."""
    model.eval()
    if dist.is_initialized():  # batch norm's statistics of the last step are each process's own: what is saved, process 0's, is what is measured
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    loader = DataLoader(
        EvalImages(samples[rank::world], args),
        args.batch_size,
        num_workers=args.workers,
        pin_memory=args.device.startswith("cuda"),
    )
    counts = torch.zeros(2, dtype=torch.float64, device=args.device)
    for images, labels in loader:
        labels = labels.to(args.device, non_blocking=True)
        output = model(images.to(args.device, non_blocking=True, memory_format=torch.channels_last))
        counts += torch.stack(
            [(getattr(output, "logits", output).argmax(1) == labels).sum(), (labels >= 0).sum()]
        )
    if dist.is_initialized():
        dist.all_reduce(counts)
    return float(100 * counts[0] / counts[1])


def make_optimizer(
    net: nn.Module, args: argparse.Namespace, amp: torch.dtype | None
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 or AdamW; without `decay_norms`, vectors, position embeddings and class tokens are not decayed; tau never is."""
    spare = ("pos_embed", "position", "class_token", "cls_token")
    kept = [
        p
        for name, p in net.named_parameters()
        if p.requires_grad
        and (
            p.ndim == 0
            or not args.decay_norms
            and (p.ndim == 1 or any(part in name for part in spare))
        )
    ]
    spared = {id(p) for p in kept}
    groups = [
        {"params": [p for p in net.parameters() if p.requires_grad and id(p) not in spared]},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(
        groups,
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
        fused=amp is not torch.float16,
    )  # torch 2.14: fused momentum starts from garbage if GradScaler skips the first step


def make_schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """Per epoch: linear from warmup_lr, then a cosine to min_lr."""
    cosine = CosineAnnealingLR(
        optimizer, max(1, args.epochs - args.warmup_epochs), eta_min=args.min_lr
    )
    if not args.warmup_epochs:
        return cosine
    warmup = LinearLR(optimizer, min(1.0, args.warmup_lr / args.lr), total_iters=args.warmup_epochs)
    return SequentialLR(optimizer, [warmup, cosine], [args.warmup_epochs])


def save(state: dict, file: str) -> None:
    try:
        torch.save(state, file + ".tmp")
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(
            None, f"cannot be written, is the disk full? ({str(error).splitlines()[0]})", file
        )
    os.replace(file + ".tmp", file)


def main() -> None:
    args = parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: no rank outlives a torchrun that is killed, writing beside its successor
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    if args.device == "cpu" and world == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) - args.workers)
        )  # more threads than cores cost more than they bring
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    lead = rank == 0
    say = print if lead else (lambda *_: None)
    last, log_file = os.path.join(args.out, "last.pt"), os.path.join(args.out, "log.jsonl")
    if os.path.exists(last) and not args.resume:
        raise SystemExit(f"{last} exists: continue that run with --resume, or choose another --out")
    if isinstance(args.resume, str) and not os.path.exists(args.resume):
        raise SystemExit(f"--resume {args.resume}: no such file")

    # everything that can be wrong with the input is found before the first step
    train_folder, val_folder = os.path.join(args.data, "train"), os.path.join(args.data, "val")
    try:
        classes = [name for name in find_classes(train_folder)[0] if name != UNLABELED]
        strangers = set(find_classes(val_folder)[0]) - set(classes)
    except FileNotFoundError as error:
        raise SystemExit(
            f"--data {args.data} must hold train/ and val/ with class folders: {error}"
        )
    if strangers:
        raise SystemExit(
            f"{val_folder} has {len(strangers)} class folder(s) that train/ has not, the first is '{min(strangers)}'"
        )
    samples = list_samples(train_folder, classes)
    unlabelled = [(path, -1) for path, _ in list_samples(train_folder, [UNLABELED], optional=True)]
    val_samples = list_samples(val_folder, classes, optional=True)
    if unlabelled and not args.embeddings:
        raise SystemExit(
            f"train/{UNLABELED} holds {len(unlabelled)} images, which only alignment can use: pass --captions and --embeddings, or move it away"
        )
    samples += unlabelled
    captions = (
        Captions(
            args.captions,
            args.embeddings,
            (key_of(path, train_folder) for path, _ in samples),
            args.seed if args.shuffle_captions else None,
        )
        if args.embeddings
        else None
    )
    if len(samples) < args.batch_size * world:
        raise SystemExit(
            f"{len(samples)} training images do not fill one batch of {args.batch_size} x {world} processes: use a smaller -b"
        )

    # the model, the head on it, the optimiser
    torch.manual_seed(args.seed)
    model, rebuild = build_model(args, len(classes))
    model.aux_weights = {"googlenet": (0.3, 0.3), "inception_v3": (0.4,)}.get(args.arch, ())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:  # as in training, where auxiliary heads may need larger images than evaluation does
        output = model.train()(torch.zeros(2, 3, args.input_size, args.input_size))
        sum(
            x.sum()
            for x in (output if isinstance(output, tuple) else [getattr(output, "logits", output)])
            if x is not None
        ).backward()
    except Exception as error:
        raise SystemExit(
            f"--arch {args.arch} does not take images of {args.input_size} pixels: {str(error).splitlines()[0]}"
        )
    model.load_state_dict(buffers, strict=False)
    for (
        parameter
    ) in model.parameters():  # what classification does not use (a mask token, say) would stop DDP
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    torch.manual_seed(args.seed)
    net = Aligned(model, len(classes), args, captions.width if captions else None).to(
        args.device, memory_format=torch.channels_last
    )
    if args.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if args.lr is None:
        rate, images = LEARNING_RATES[args.recipe]
        args.lr = rate * args.batch_size * world / images
    amp = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(args.amp)
    if args.amp == "auto" and args.device.startswith("cuda"):
        amp = (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    optimizer = make_optimizer(net, args, amp)
    schedule = make_schedule(optimizer, args)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=amp is torch.float16)
    ema = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
        if args.ema_decay
        else None
    )

    # what the run is, and what of it is done already
    os.makedirs(args.out, exist_ok=True)
    settings = {
        k: v
        for k, v in vars(args).items()
        if k
        not in ("data", "out", "captions", "embeddings", "workers", "device", "resume", "compile")
    }
    listing = 0  # which images, with which labels: a run neither goes on with others nor is grouped with runs on others
    for path, label in samples:
        listing = zlib.crc32(os.fsencode(f"{path[len(train_folder) :]} {label}"), listing)
    settings |= {
        "amp": str(amp),
        "world_size": world,
        "text": captions.identity if captions else None,
        "images": f"{len(samples)} ({listing:08x})",
    }
    log = [
        {
            "config": vars(args) | settings,
            "git": git_commit(),
            "versions": {
                m.__name__: str(m.__version__) for m in (torch, torchvision, transformers, np)
            },
            "python": sys.version.split()[0],
        }
    ]
    first_epoch, best = 0, -1.0
    checkpoint = last if args.resume is True else args.resume
    if checkpoint and os.path.exists(checkpoint):
        try:
            state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        except Exception as error:
            raise SystemExit(
                f"--resume {checkpoint}: not a checkpoint of train.py that can be read safely ({type(error).__name__})"
            )
        if "net" not in state:
            raise SystemExit(f"--resume {checkpoint}: only last.pt holds what is needed to go on")
        if state["classes"] != classes:
            raise SystemExit(
                f"--resume {checkpoint}: it was trained on other classes ({len(state['classes'])}, here {len(classes)})"
            )
        changed = [
            f"{k} {state['settings'].get(k)} -> {v}"
            for k, v in settings.items()
            if state["settings"].get(k) != v
        ]
        if changed:
            raise SystemExit(
                f"--resume {checkpoint}: these settings differ from the run's: {'; '.join(changed)}"
            )
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema_state"])
        first_epoch, best, log = state["epoch"], state["best_top1"], state["log"]
        del state
        say(f"resuming {checkpoint} after epoch {first_epoch} of {args.epochs}")
    if lead:
        with open(log_file + ".tmp", "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry) + "\n" for entry in log)
        os.replace(log_file + ".tmp", log_file)

    # train
    if args.compile:
        model.compile()
    ddp = (
        DistributedDataParallel(
            net, device_ids=[args.device] if args.device.startswith("cuda") else None
        )
        if world > 1
        else net
    )
    mixers = [
        kind(alpha=alpha, num_classes=args.batch_size)
        for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
        if alpha
    ]
    mix = v2.RandomChoice(mixers) if mixers else None
    sampler = EpochSampler(len(samples), args.repeated_aug, args.seed, rank, world)
    loader = DataLoader(
        TrainImages(samples, train_transform(args), captions, args.input_size),
        args.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=args.device.startswith("cuda"),
        persistent_workers=args.workers > 0,
        generator=torch.Generator(),
    )  # its own: it would disturb dropout after a resume
    with_text = sum(captions.count(i) > 0 for i in range(len(samples))) if captions else 0
    say(
        f"{args.arch}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(classes)} classes, {len(samples)} training images ({with_text} with captions, {len(unlabelled)} without a label), "
        f"{len(val_samples)} validation images, batch {args.batch_size} x {world}, lr {args.lr:g}"
        + (
            f"; {captions.foreign} captions belong to no image of train/"
            if captions and captions.foreign
            else ""
        )
    )

    began = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        sampler.epoch = epoch
        torch.manual_seed(
            (args.seed * 10_007 + epoch) * 10_007 + rank
        )  # dropout, mixup: a resumed epoch draws the same
        lr = optimizer.param_groups[0]["lr"]
        entry = {"epoch": epoch + 1, "lr": lr} | train_epoch(
            args, ddp, model, loader, optimizer, scaler, ema, mix, amp, epoch + 1, not lead
        )
        schedule.step()
        failed = entry.pop("unreadable")
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, failed)
            failed = set().union(*parts)
        if failed:
            say(
                f"epoch {epoch + 1}: {len(failed)} unreadable images left out: {', '.join(repr(key_of(samples[i][0], train_folder)) for i in sorted(failed)[:5])}"
            )
        if len(failed) * args.repeated_aug >= len(loader) * args.batch_size * world:
            raise SystemExit("no training image can be read")
        if not torch.stack([p.detach().isfinite().all() for p in net.parameters()]).all():
            raise SystemExit(
                f"epoch {epoch + 1} left weights that are not finite; {last} was not overwritten. Try a smaller --lr, --clip-grad 1 or --amp bfloat16"
            )
        entry |= {
            "unreadable": len(failed),
            "unlabelled": len(unlabelled),
            "without_text": len(samples) - with_text if captions else None,
        }
        if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
            entry["val_top1"] = validate(model, val_samples, args, rank, world)
            if ema:
                entry["val_top1_ema"] = validate(ema.module, val_samples, args, rank, world)
        log.append(entry)
        if not lead:
            continue
        say(
            f"epoch {epoch + 1}/{args.epochs}: "
            + ", ".join(
                f"{k} {v:.3g}" if k in ("lr", "data_wait") else f"{k} {v:.2f}"
                for k, v in entry.items()
                if isinstance(v, float)
            )
        )
        with open(log_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        plain = {
            "model": model.state_dict(),
            "ema": ema.module.state_dict() if ema else None,
            "arch": args.arch,
            "rebuild": rebuild,
            "classes": classes,
            "input_size": args.input_size,
            "crop_ratio": args.crop_ratio,
            "interpolation": args.interpolation,
            "mean": args.mean,
            "std": args.std,
            "epoch": epoch + 1,
            "val_top1": entry.get("val_top1"),
            "settings": settings,
            "projection": net.projection.state_dict() if captions else None,
        }
        if entry.get("val_top1", -1.0) > best:
            best = entry["val_top1"]
            save(
                plain | {"selected": "best epoch on the validation folder"},
                os.path.join(args.out, "best.pt"),
            )
        save(
            plain
            | {
                "selected": "last epoch",
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
                "ema_state": ema.state_dict() if ema else None,
                "best_top1": best,
                "log": log,
            },
            last,
        )
    say(
        f"{last}: {args.epochs} epochs, val top-1 {log[-1].get('val_top1', float('nan')):.2f} % (best epoch, chosen on the validation folder: {best:.2f} %), "
        f"{time.perf_counter() - began:.0f} s, {log[-1].get('images_per_s', 0):.0f} images/s, {log[-1].get('data_wait', 0):.0%} of the time waiting for data"
    )
    if world > 1:
        dist.destroy_process_group()


def git_commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(
            f"{error.filename or 'disk'}: {error.strerror or error}; what was saved stays: start again with --resume"
        )
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start again with --resume")
