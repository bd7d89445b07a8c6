"""Accuracy and alignment of checkpoints: stage 4 of 4.

In:  CHECKPOINT ...     train.py's, or a torchvision model's name: its published (DEFAULT) weights
     --data DIR         DIR/<class>/<image>; classes are matched by name, numeric ones (ImageNet-V2)
                        are indices; published weights know names if one DIR has all of ImageNet's.
                        Or DIR/<image>: text measures only, as for models trained without labels
Out: a Markdown table per folder: top-1 among all of a checkpoint's classes (and among the folder's,
     if these are fewer, as ImageNet-A and -R are published), the difference to the first row with
     its 95 % interval over the images, image-text recall; then means over seeds

Launch:
    python evaluate.py --data imagenet/val runs/baseline/last.pt runs/aligned/last.pt
    torchrun --standalone --nproc_per_node=4 evaluate.py --data imagenet/val runs/aligned/last.pt
    python evaluate.py --data val --captions val.jsonl --embeddings val.npy last.pt    # recall@k
"""

import argparse
import hashlib
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

ENCODER = ("width", "pooling", "prefix", "suffix", "unpooled", "bidirectional", "weights_sha256")
PUBLISHED = torchvision.models.list_models(torchvision.models)


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


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=raw)
    p.usage = "%(prog)s CHECKPOINT ... --data DIR [options; --help lists them]"
    add = p.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="file, or torchvision model")
    add("--data", required=True, action="append", metavar="DIR", help="images; repeatable")
    add("--ema", action="store_true", help="the averaged weights (the projection head has none)")
    add("--out", metavar="FILE.jsonl", help="append the results, a line per checkpoint and folder")
    add("--captions", help="captions.jsonl of the (one) folder: image-text recall@1/5/10")
    add("--embeddings", help="embeddings.npy of these captions")
    add("-b", "--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    add("-j", "--workers", type=int, default=workers, help="loaders (default: %(default)s)")
    add("--device", help="cuda, cuda:N, mps or cpu (default: what torch finds)")
    args = p.parse_intermixed_args()
    if min(args.batch_size, args.workers + 1) < 1:
        p.error("-b starts at 1, -j at 0")
    if args.ema and set(args.checkpoints) <= set(PUBLISHED):
        p.error("--ema does nothing for published weights")
    pair = args.captions, args.embeddings
    if any(pair) and not (all(pair) and len(args.data) == 1 and not args.ema):
        p.error("captions need their embeddings, one --data, and no --ema (the head has none)")
    args.rank, args.world = process_rank()
    args.device = choose_device(args.device, args.world)
    return args


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


class Folder(Dataset):
    """Item i: image [3, S, S] float32 after `transform`, i, and why it cannot be read ("": it can).
    `labels` [N] are indices of `classes`, -1: none."""

    def __init__(self, root: str):
        self.root, self.transform, self.encoder = root, None, None
        self.classes, samples = list_images(root, allow_empty=True)
        if not samples:
            raise SystemExit(f"--data {root}: there is no image in it")
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        path, reason = os.fsdecode(self.paths[index]), ""
        try:
            image = load_image(path)
        except Exception as error:  # one bad image costs that image, and is named
            image, reason = Image.new("RGB", (1, 1)), f"{path!r} ({type(error).__name__}: {error})"
        return self.transform(image), index, reason

    def read_texts(self, captions: str, embeddings: str) -> None:
        """Of the folder's captions: embeddings `rows` [M, D], the `owner` [M] of each among the
        images, and what embed.py says of its `encoder`. SystemExit if the files do not match."""
        try:
            self.encoder = json.loads(Path(embeddings).with_suffix(".json").read_text("utf-8"))
            content, rows = Path(captions).read_bytes(), np.load(embeddings, mmap_mode="r")
            keys = [json.loads(line)["image"] for line in content.splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"captions and embeddings: {error!r}") from error
        same = hashlib.sha256(content).hexdigest() == self.encoder.get("captions_sha256")
        if not same or rows.shape != (len(keys), self.encoder.get("width")):
            raise SystemExit(f"{captions} is not what {embeddings} holds: run embed.py again")
        names = [os.path.relpath(os.fsdecode(path), self.root) for path in self.paths]
        index = {name.replace(os.sep, "/"): i for i, name in enumerate(names)}
        owner = np.array([index.get(key, -1) for key in keys])
        if owner.max() < 0:
            raise SystemExit(f"{captions}: none of its images is in {self.root}")
        self.rows, self.owner = rows[owner >= 0], owner[owner >= 0]


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


def last_layer(model: nn.Module, num_classes: int) -> nn.Module:
    """The classifier g: the last layer, linear or a 1x1 convolution, with an output per class."""
    for module in reversed(list(model.modules())):
        sizes = getattr(module, "out_features", None), getattr(module, "out_channels", None)
        if num_classes in sizes:
            return module
    raise SystemExit("no classification layer could be found: choose another --arch")


def load_published(name: str, folders: list[Folder]) -> tuple[nn.Module, dict]:
    """A torchvision model with its published weights, and what a checkpoint would say of it."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    classes = [str(i) for i in range(1000)]
    for folder in folders:
        if len(folder.classes) == 1000 and folder.classes[0].startswith("n"):  # synsets
            classes = folder.classes
    state = {"arch": name, "epoch": "", "selected": str(weights), "classes": classes}
    state |= {"transform": weights.transforms(), "settings": {"published": name}}
    return torchvision.models.get_model(name, weights=weights), state


def load_model(file: str, ema: bool = False) -> tuple[nn.Module, dict]:
    """The plain model with its weights, and the other entries; "transform" is the preprocessing."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    weights, rebuild = state["ema" if ema else "model"], state["rebuild"]
    if state["settings"]["mae"]:
        raise SystemExit(f"{file} is an auto-encoder: fine-tune it first, train.py --init {file}")
    if weights is None:
        raise SystemExit(f"{file} has no averaged weights: train with --ema-decay, or no --ema")
    if "config" in rebuild:
        config = transformers.AutoConfig.for_model(**rebuild["config"])
        model = getattr(transformers, rebuild["class"])(config)
    else:
        outputs = len(state["classes"]) or state["settings"]["text"]["width"]
        model = torchvision.models.get_model(
            state["arch"], num_classes=outputs, **rebuild["kwargs"]
        )
    model.load_state_dict(weights, strict=True)
    state["selected"] += ", averaged weights" if ema else ""
    size, interpolation = state["input_size"], InterpolationMode(state["interpolation"])
    steps = [v2.Resize(round(size / state["crop_ratio"]), interpolation), v2.CenterCrop(size)]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    state["transform"] = v2.Compose([*steps, v2.Normalize(state["mean"], state["std"])])
    return model, state


class Checkpoint(nn.Module):
    """The plain model, the file's other entries (state) and, for texts, its head h and its text
    adapter: images [n, 3, S, S] -> logits [n, K] and, for texts, features [n, D] of length 1."""

    def __init__(self, file: str, ema: bool, folders: list[Folder]):
        super().__init__()
        self.file, self.head, self.adapter = file, None, nn.Identity()
        try:
            if file in PUBLISHED:
                self.model, self.state = load_published(file, folders)
            else:
                self.model, self.state = load_model(file, ema)
        except Exception as error:
            reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
            raise SystemExit(
                f"{file}: no torchvision model, and no checkpoint: {reason}"
            ) from error
        for folder in folders:
            if folder.encoder:
                self.load_heads(folder.encoder)
            if not self.match_classes(folder) and not folder.encoder:
                raise SystemExit(f"{file} or {folder.root} has no classes: pass --captions")

    def match_classes(self, folder: Folder) -> list[int]:
        """Of each of the folder's classes, the index among the checkpoint's; [] if one has none."""
        if not self.state["classes"]:
            return []
        index = {name: i for i, name in enumerate(self.state["classes"])}
        unknown = [name for name in folder.classes if name not in index]
        numbered = [name for name in unknown if name.isdecimal() and int(name) < len(index)]
        if numbered == folder.classes:
            return [int(name) for name in numbered]
        if unknown:
            what = f"{len(unknown)} class(es) that {self.file} does not know, the first is"
            raise SystemExit(f"{folder.root} has {what} '{unknown[0]}'")
        return [index[name] for name in folder.classes]

    def load_heads(self, encoder: dict) -> None:
        """train.py's head h (without labels there is none) and text adapter, if there is one."""
        trained_on = self.state["settings"].get("text") or {"model": "no captions"}
        for name in ENCODER:  # what these texts and those of the training have in common
            if (encoder.get(name) or None) != (trained_on.get(name) or None):
                what = f"another {name} than {trained_on['model']}, of {self.file}'s training"
                raise SystemExit(f"the encoder of --embeddings has {what}")
        self.head, heads = nn.Identity(), self.state["heads"]
        if heads["projection"]:
            self.head = projection_head(**heads["projection"])
            self.head.load_state_dict(self.state["projection"], strict=True)
            layer = last_layer(self.model, len(self.state["classes"]))
            layer.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))
        if heads["adapter"]:
            self.adapter = text_adapter(**heads["adapter"])
            self.adapter.load_state_dict(self.state["adapter"], strict=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.model(images)
        logits = features = (output if isinstance(output, Tensor) else output[0]).float()
        if self.head is None:
            return logits, None
        if self.state["classes"]:
            features = torch.atleast_3d(self.features).flatten(2).mean(2)  # SqueezeNet's are maps
        return logits, F.normalize(self.head(features), dim=1)


@torch.inference_mode()
def predict(net: Checkpoint, folder: Folder, labels: Tensor, args) -> tuple[dict, list[str]]:
    """{measure: [N]} of all images, on every process, each of which looks at its share of them; and
    why some could not be read. labels [N]: the checkpoint's classes, -1: none."""
    share = range(args.rank, len(folder), args.world)
    options = {"num_workers": args.workers, "pin_memory": args.device.startswith("cuda")}
    loader = DataLoader(folder, args.batch_size, sampler=share, **options)
    present = labels[labels >= 0].unique().to(args.device)
    net.to(args.device, memory_format=torch.channels_last).eval()
    batches, reasons = [], []
    for images, index, why in tqdm(loader, unit="batch", disable=args.rank > 0, leave=False):
        images = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
        (logits, features), own = net(images), labels[index].to(args.device)
        top5 = logits.topk(min(5, logits.shape[1])).indices
        batch = {"index": index, "readable": torch.tensor([not reason for reason in why])}
        batch |= {"top1": logits.argmax(1) == own, "top5": (top5 == own[:, None]).any(1)}
        if len(present):
            batch["top1_among_these"] = present[logits[:, present].argmax(1)] == own
        if features is not None:
            batch["feature"] = features
        batches.append({name: values.cpu().numpy() for name, values in batch.items()})
        reasons += filter(None, why)
    if args.world > 1:
        parts = [None] * args.world
        dist.all_gather_object(parts, (batches, reasons))
        batches = [batch for part, _ in parts for batch in part]
        reasons = [reason for _, part in parts for reason in part]
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    order = np.argsort(found["index"])
    assert len(order) == len(folder)  # every image once
    return {name: values[order] for name, values in found.items()}, sorted(reasons)


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of b - a in points, half its 95 % interval (normal); a, b: bool [N], hits by image."""
    difference = 100 * (b.astype(float) - a.astype(float))
    deviation = difference.std(ddof=1) if len(difference) > 1 else float("nan")
    return difference.mean(), 1.96 * deviation / len(difference) ** 0.5


def retrieval(features, texts, owner, device="cpu") -> dict[str, float]:
    """Recall@k in percent: an image is a hit if one of its own texts is among its k nearest, a text
    if its image is, of the described ones. features [N, D], texts [M, D], owner [M] of each."""
    features, texts, owner = (torch.as_tensor(x, device=device) for x in (features, texts, owner))
    described, hits = torch.unique(owner), {}
    images = features[described]
    for name, queries, keys, asking, answering in (
        ("image->text", images, texts, described, owner),
        ("text->image", texts, images, owner, described),
    ):
        most = min(10, len(keys))
        nearest = torch.cat([(part @ keys.T).topk(most).indices for part in queries.split(1024)])
        own = answering[nearest] == asking[:, None]
        hits |= {f"{name} R@{k}": 100 * own[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return hits


@torch.inference_mode()
def evaluate_folder(net: Checkpoint, folder: Folder, firsts: dict, args) -> dict:
    """A result, in percent of the readable images."""
    index, state = net.match_classes(folder), net.state
    folder.transform = state["transform"]
    labels = np.array(index)[folder.labels] if index else np.full(len(folder), -1)
    start = time.perf_counter()
    found, reasons = predict(net, folder, torch.from_numpy(labels), args)
    speed, readable = len(folder) / (time.perf_counter() - start), found["readable"]
    if not readable.any():
        raise SystemExit(f"no image of {folder.root} can be read: {reasons[0]}")
    if reasons and args.rank == 0:
        said = f"{len(reasons)} unreadable images, not counted"
        print(f"{folder.root}: {said}: {', '.join(reasons[:5])}")
    result = {"checkpoint": net.file, "data": folder.root}
    result |= {field: state[field] for field in ("arch", "epoch", "selected")}
    result |= {"images": int(readable.sum()), "unreadable": len(reasons)}
    if index:
        reference, first = firsts.setdefault(folder.root, (net.file, found))
        both = readable & first["readable"]
        difference, interval = paired_difference(first["top1"][both], found["top1"][both])
        fields = "top1", "top5", "top1_among_these"
        result |= {field: 100 * found[field][readable].mean() for field in fields}
        result |= {"classes": len(set(labels)), "of_classes": len(state["classes"])}
        result |= {"reference": reference, "difference": difference, "interval": interval}
    result["parameters"] = sum(p.numel() for p in net.model.parameters())
    result |= {"images_per_s": speed, "text": {}, "settings": state["settings"]}
    if folder.encoder and args.rank == 0:
        rows, seen = torch.from_numpy(folder.rows.astype(np.float32)), readable[folder.owner]
        texts = F.normalize(net.adapter.cpu()(rows), dim=1)[seen]
        result["text"] = retrieval(found["feature"], texts, folder.owner[seen], args.device)
    return result


def print_table(rows: list[dict]) -> None:
    columns = dict.fromkeys(column for row in rows for column in row)
    body = [[row.get(column, "") for column in columns] for row in rows]
    for cells in (columns, ["---"] * len(columns), *body):
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells)} |")


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    deviation = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.2f}{deviation}"


def seed_rows(results: list[dict]) -> list[dict]:
    """A row per group of results that differ in nothing but the seeds (a run's own, and that of the
    run that it started from); the same seeds count once."""
    groups, rows, pattern = {}, [], r'"seed": (\d+)'
    for result in results:
        what = [result["settings"], result["selected"], result["epoch"]]
        text = json.dumps(what, sort_keys=True)
        seeds = tuple(dict.fromkeys(re.findall(pattern, text)))
        name = result["checkpoint"]
        _, group = groups.setdefault(re.sub(pattern, "", text), (name, {}))
        group[seeds] = measures_of(result)
    _, base = next(iter(groups.values()))
    for name, group in groups.values():
        row = {"seeds": len(group), "first checkpoint of the group": name}
        for measure in next(iter(group.values())):
            row[measure] = mean_and_deviation([measures[measure] for measures in group.values()])
            shared = [seeds for seeds in group if measure in base.get(seeds, {})]
            if shared and group is not base:
                differences = [group[seeds][measure] - base[seeds][measure] for seeds in shared]
                row[measure] += f" ({mean_and_deviation(differences, '+')})"
        rows.append(row)
    return rows


def measures_of(result: dict) -> dict[str, float]:
    measures = {}
    if "top1" in result:
        measures |= {"top-1 %": result["top1"], "top-5 %": result["top5"]}
        if result["classes"] < result["of_classes"]:
            among = f"top-1 % among these {result['classes']} classes"
            measures[among] = result["top1_among_these"]
    return measures | result["text"]


def report(results: list[dict], names: list[str]) -> None:
    """A table per folder, and a second one where checkpoints differ in nothing but the seed."""
    for name in names:
        here, rows = [result for result in results if result["data"] == name], []
        if len(names) > 1:
            print(f"\n**{name}**\n")
        for result in here:
            fields = "checkpoint", "arch", "epoch", "selected", "images"
            row = {field: result[field] for field in fields} | measures_of(result)
            if result.get("reference", result["checkpoint"]) != result["checkpoint"]:
                row["difference"] = f"{result['difference']:+.2f} +- {result['interval']:.2f}"
            row["M parameters"] = result["parameters"] / 1e6
            rows.append(row | {"images/s": round(result["images_per_s"])})
        print_table(rows)
        seeds = seed_rows(here)
        if any(row["seeds"] > 1 for row in seeds):
            print("\nover seeds: mean +- deviation (and differences to the first group, by seed)\n")
            print_table(seeds)


def main() -> None:
    args = parse_args()
    if args.world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    folders = [Folder(root) for root in dict.fromkeys(args.data)]
    if args.captions:
        folders[0].read_texts(args.captions, args.embeddings)
    for file in args.checkpoints:  # a fault of the last is told before the first is evaluated
        Checkpoint(file, args.ema, folders)
    results, firsts = [], {}
    out = args.out if args.out and args.rank == 0 else os.devnull
    with open(out, "a", encoding="utf-8") as stream:
        for file in args.checkpoints:
            net = Checkpoint(file, args.ema, folders)
            for folder in folders:
                results.append(evaluate_folder(net, folder, firsts, args))
                print(json.dumps(results[-1]), file=stream, flush=True)
    if args.rank == 0:
        report(results, [folder.root for folder in folders])
    if args.world > 1:
        time.sleep(1)  # torch 2.9's gloo lets go of tensors in a thread that needs this one's lock
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'evaluate.py'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except RuntimeError as error:  # of a loading process that dies
        if not re.search("killed by signal|/torch_", str(error)):
            raise
        advice = "is /dev/shm too small? docker run --shm-size=8g, or a smaller -j"
        raise SystemExit(f"{error!r:.200}: {advice}") from error
