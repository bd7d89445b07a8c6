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
from PIL import ExifTags, Image, PngImagePlugin
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification

FIELDS = ("checkpoint", "arch", "epoch", "selected", "images")  # of a result, shown as they are
PUBLISHED = torchvision.models.list_models(torchvision.models)


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


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=raw)
    add = p.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="file, or torchvision model")
    add("--data", required=True, action="append", metavar="DIR", help="once or more often")
    add("--ema", action="store_true", help="the averaged weights (the projection head has none)")
    add("--out", metavar="FILE.jsonl", help="append the results, a line per checkpoint and folder")
    add("--predictions", metavar="FILE.jsonl", help="write label and prediction of every image")
    add("--captions", help="captions.jsonl of the (one) folder: image-text recall@1/5/10")
    add("--embeddings", help="embeddings.npy of these captions")
    add("--class-captions", help="caption.py --model template on the folder: zero-shot top-1")
    add("--class-embeddings", help="embeddings.npy of these captions")
    add("-b", "--batch-size", type=int, default=64, help="per process (default: %(default)s)")
    add("-j", "--workers", type=int, default=workers, help="loading (default: %(default)s)")
    add("--device", help="cuda, cuda:N, mps or cpu (default: what torch finds)")
    args = p.parse_intermixed_args()
    args.rank, args.world = process_rank()
    args.device = choose_device(args.device, args.world)
    if min(args.batch_size, args.workers + 1) < 1:
        p.error("-b starts at 1, -j at 0")
    if args.ema and set(args.checkpoints) <= set(PUBLISHED):
        p.error("--ema does nothing for published weights")
    for pair in (args.captions, args.embeddings), (args.class_captions, args.class_embeddings):
        if any(pair) and not (all(pair) and len(args.data) == 1 and not args.ema):
            p.error("captions need their embeddings, one --data, and no --ema (the head has none)")
    if args.rank > 0:  # rank 0 writes the files
        args.out = args.predictions = None
    return args


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


class Images(torchvision.datasets.ImageFolder):
    """Item i: image [3, S, S] float32 after `transform`, label (-1: none, -2: unreadable), i."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes, self.found = list_images(str(directory), allow_empty=True)
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(self, *_, **__) -> list[tuple[str, int]]:
        return self.found

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        try:
            return *super().__getitem__(index), index
        except Exception:  # one bad image costs that image, and is counted
            return self.transform(Image.new("RGB", (1, 1))), -2, index

    def key(self, index: int) -> str:
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()


def read_folders(directories: list[str]) -> dict[str, Images]:
    folders = {}
    for directory in directories:
        if os.path.isdir(directory):
            folders[directory] = Images(directory, loader=load_image, allow_empty=True)
        if directory not in folders or not folders[directory].samples:
            raise SystemExit(f"--data {directory}: no folder, or no image in it")
    return folders


def read_texts(captions: str, embeddings: str, index: dict[str, int], every: bool) -> tuple:
    """Rows [M, D] on what is in `index` (of images or classes), its index [M], and the encoder."""
    try:
        encoder = json.loads(Path(embeddings.removesuffix(".npy") + ".json").read_text("utf-8"))
        content, rows = Path(captions).read_bytes(), np.load(embeddings, mmap_mode="r")
        keys = [json.loads(line)["image"] for line in content.splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"captions and embeddings: {error!r}") from error
    same = hashlib.sha256(content).hexdigest() == encoder.get("captions_sha256")
    if not same or rows.shape != (len(keys), encoder.get("width")):
        raise SystemExit(f"{captions} is not what {embeddings} was made from: run embed.py again")
    owner = np.array([index.get(key, index.get(key.split("/")[0], -1)) for key in keys])
    described = set(owner)
    none = [name for name, i in index.items() if i not in described]
    if len(none) == len(index) or (none and every):
        raise SystemExit(f"{captions} lacks {len(none)} images or classes, first '{none[0]}'")
    return rows[owner >= 0], owner[owner >= 0], encoder | {"file": embeddings}


def load_model(file: str, ema: bool, folders: dict[str, Images]) -> tuple[nn.Module, dict]:
    """The plain model with its weights, and the other entries; "transform" is the preprocessing."""
    if file in PUBLISHED:
        weights = torchvision.models.get_model_weights(file).DEFAULT
        classes = [str(i) for i in range(1000)]
        for folder in folders.values():
            if len(folder.classes) == 1000 and folder.classes[0].startswith("n"):  # synsets
                classes = folder.classes
        state = {"arch": file, "epoch": "", "selected": str(weights), "classes": classes}
        state |= {"transform": weights.transforms(), "settings": {"published": file}}
        return torchvision.models.get_model(file, weights=weights), state
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    weights, rebuild = state["ema" if ema else "model"], state["rebuild"]
    if weights is None:
        raise SystemExit(f"{file} has no averaged weights: train with --ema-decay, or no --ema")
    if "config" in rebuild:
        config = AutoConfig.for_model(**rebuild["config"])
        model = AutoModelForImageClassification.from_config(config)
    else:
        outputs = len(state["classes"]) or state["settings"]["text"]["width"]
        rebuild = rebuild["kwargs"] | {"num_classes": outputs}
        model = torchvision.models.get_model(state["arch"], **rebuild)
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

    def __init__(self, file: str, ema: bool, folders: dict[str, Images], texts: dict):
        super().__init__()
        if file not in PUBLISHED and not os.path.exists(file):
            raise SystemExit(f"{file}: no such checkpoint, and no torchvision model")
        try:
            self.model, self.state = load_model(file, ema, folders)
        except Exception as error:
            reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
            raise SystemExit(f"{file}: not a checkpoint that can be read: {reason}") from error
        self.file, self.head = file, None
        for folder in folders.values():
            if not self.match_classes(folder) and not texts:
                raise SystemExit(f"{file} or {folder.root} has no classes: pass --captions")
        for _, _, encoder in texts.values():
            self.load_head(encoder)

    def match_classes(self, folder: Images) -> list[int]:
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

    def load_head(self, encoder: dict) -> None:
        """train.py's head h, from its weights alone; without labels there is none."""
        trained_on = self.state["settings"].get("text") or {"model": "no captions"}
        for name in "width", "pooling", "prefix", "weights_sha256":
            if encoder.get(name) != trained_on.get(name):
                what = f"has another {name} than {trained_on['model']}, of {self.file}'s training"
                raise SystemExit(f"{encoder['file']} {what}")
        self.head, width = nn.Identity(), encoder["width"]
        if weights := self.state["projection"]:
            if "weight" in weights:
                self.head = nn.Linear(*weights["weight"].T.shape, bias=False)
            else:
                hidden, features = weights["0.weight"].shape
                norm = [nn.BatchNorm1d(hidden)] if "1.running_mean" in weights else []
                first = nn.Linear(features, hidden, bias="0.bias" in weights)
                self.head = nn.Sequential(first, *norm, nn.ReLU(), nn.Linear(hidden, width))
            self.head.load_state_dict(weights, strict=True)
            layers = [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            last = [m for m in layers if len(m.weight) == len(self.state["classes"])][-1]
            last.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.model(images)
        logits = features = getattr(output, "logits", output).float()
        if self.head is None:
            return logits, None
        if self.state["classes"]:
            features = torch.atleast_3d(self.features).flatten(2).mean(2)  # SqueezeNet's are maps
        return logits, F.normalize(self.head(features), dim=1)

    @torch.inference_mode()
    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Text features [M, D] of length 1, through train.py's text adapter, if there is one."""
        x, w = torch.from_numpy(rows.astype(np.float32)), self.state.get("adapter")
        for i in range(4) if w else ():
            y = F.layer_norm(x, x.shape[1:], w[f"{i}.0.weight"], w[f"{i}.0.bias"])
            y = F.gelu(F.linear(y, w[f"{i}.1.weight"], w[f"{i}.1.bias"]))
            x = x + F.linear(y, w[f"{i}.3.weight"], w[f"{i}.3.bias"])
        if w:
            x = F.layer_norm(x, x.shape[1:], w["4.weight"], w["4.bias"])
            x = F.linear(x, w["5.weight"], w["5.bias"])
        return F.normalize(x, dim=1).numpy()


def measure(logits, features, labels, present) -> dict[str, torch.Tensor]:
    """Of a batch: logits [n, K], features [n, D] or None, labels [n]; the folder's classes."""
    prediction, top5 = logits.argmax(1), logits.topk(min(5, logits.shape[1])).indices
    batch = {"label": labels, "prediction": prediction, "probability": logits.softmax(1).amax(1)}
    batch |= {"top1": prediction == labels, "top5": (top5 == labels[:, None]).any(1)}
    if len(present):
        batch["top1_among_these"] = present[logits[:, present].argmax(1)] == labels
    return batch if features is None else batch | {"feature": features}


@torch.inference_mode()
def predict(net: Checkpoint, folder: Images, present: list[int], args) -> dict[str, np.ndarray]:
    """measure() of all images, on every process, each of which looks at its share of them."""
    share = range(args.rank, len(folder), args.world)
    options = {"num_workers": args.workers, "pin_memory": args.device.startswith("cuda")}
    loader = DataLoader(folder, args.batch_size, sampler=share, **options)
    present = torch.tensor(present, device=args.device)
    net.to(args.device, memory_format=torch.channels_last).eval()
    found = []
    for images, labels, index in tqdm(loader, unit="batch", disable=args.rank > 0, leave=False):
        images = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
        batch = measure(*net(images), labels.to(args.device), present) | {"index": index}
        found.append({name: values.cpu().numpy() for name, values in batch.items()})
    if args.world > 1:
        parts = [None] * args.world
        dist.all_gather_object(parts, found)
        found = [batch for part in parts for batch in part]
    found = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    order = np.argsort(found.pop("index"))
    assert len(order) == len(folder)  # every image once
    return {name: values[order] for name, values in found.items()}


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of b - a in points, half its 95 % interval (normal); a, b: bool [N], hits by image."""
    difference = 100 * (b.astype(float) - a.astype(float))
    deviation = difference.std(ddof=1) if len(difference) > 1 else float("nan")
    return difference.mean(), 1.96 * deviation / len(difference) ** 0.5


def retrieval(features, texts, owner, ks=(1, 5, 10), device="cpu") -> dict[str, float]:
    """Recall@k in percent: an image is a hit if one of its own texts is among its k nearest, a text
    if its image is, of the described ones. features [N, D], texts [M, D], owner [M] of each."""
    features, texts, owner = (torch.as_tensor(x, device=device) for x in (features, texts, owner))
    described, hits = torch.unique(owner), {}
    images = features[described]
    for name, queries, keys, asking, answering in (
        ("image->text", images, texts, described, owner),
        ("text->image", texts, images, owner, described),
    ):
        most = min(max(ks), len(keys))
        nearest = torch.cat([(part @ keys.T).topk(most).indices for part in queries.split(1024)])
        own = answering[nearest] == asking[:, None]
        hits |= {f"{name} R@{k}": 100 * own[:, :k].any(1).float().mean().item() for k in ks}
    return hits


def text_measures(features, readable, texts, folder: Images, device: str) -> dict[str, float]:
    """Recall, and top-1 of features [N, D] among the mean texts of classes, of readable images."""
    measures = {}
    if "images" in texts:
        rows, owner = texts["images"]
        seen = readable[owner]
        measures |= retrieval(features, rows[seen], owner[seen], device=device)
    if "classes" in texts:
        rows, owner = texts["classes"]
        prototypes = np.stack([rows[owner == k].mean(0) for k in range(len(folder.classes))])
        prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
        hit = (features @ prototypes.T).argmax(1) == folder.targets
        measures["zero-shot top-1"] = 100 * float(hit[readable].mean())
    return measures


def evaluate_folder(net: Checkpoint, name: str, folder: Images, texts, firsts, args) -> tuple:
    """A result, in percent of the readable images, and what predict() found."""
    index, state = net.match_classes(folder), net.state
    folder.transform = state["transform"]
    folder.target_transform = index.__getitem__ if index else None
    present = sorted({index[target] for target in folder.targets}) if index else []
    start = time.perf_counter()
    found = predict(net, folder, present, args)
    speed = len(folder) / (time.perf_counter() - start)
    readable = found["label"] > -2
    if not readable.any():
        raise SystemExit(f"no image of {folder.root} can be read")
    bad = [repr(folder.samples[i][0]) for i in np.flatnonzero(~readable)]
    if bad and args.rank == 0:
        print(f"{name}: {len(bad)} unreadable images, not counted: {', '.join(bad[:5])}")
    result = {"checkpoint": net.file, "data": name}
    result |= {field: state[field] for field in ("arch", "epoch", "selected")}
    result |= {"images": int(readable.sum()), "unreadable": int((~readable).sum())}
    if index:
        reference, first = firsts.setdefault(name, (net.file, found))
        both = readable & (first["label"] > -2)
        difference, interval = paired_difference(first["top1"][both], found["top1"][both])
        fields = "top1", "top5", "top1_among_these"
        result |= {field: 100 * found[field][readable].mean() for field in fields}
        result |= {"classes": len(present), "of_classes": len(state["classes"])}
        result |= {"reference": reference, "difference": difference, "interval": interval}
    result["parameters"] = sum(p.numel() for p in net.model.parameters())
    result |= {"images_per_s": speed, "text": {}, "settings": state["settings"]}
    if texts and args.rank == 0:
        rows = {kind: (net.embed(rows), owner) for kind, (rows, owner, _) in texts.items()}
        result["text"] = text_measures(found.pop("feature"), readable, rows, folder, args.device)
    return result, found


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
    """A row per group of results that differ in nothing but the seed; a seed counts once."""
    groups, names, rows = {}, {}, []
    for result in results:
        settings, seed = result["settings"], result["settings"].get("seed")
        same = settings | {"seed": None, "init_seed": None, "selected": result["selected"]}
        same["epoch"] = "best" in result["selected"] or result["epoch"]  # not with unfinished runs
        key = json.dumps(same, sort_keys=True)
        names.setdefault(key, result["checkpoint"])
        seeds = seed, settings.get("init_seed") or seed
        groups.setdefault(key, {})[seeds] = measures_of(result)
    base = next(iter(groups.values()))
    for key, group in groups.items():
        row = {"seeds": len(group), "first checkpoint of the group": names[key]}
        for name in next(iter(group.values())):
            row[name] = mean_and_deviation([measures[name] for measures in group.values()])
            shared = [seed for seed in group if name in base.get(seed, {})]
            if shared and group is not base:
                differences = [group[seed][name] - base[seed][name] for seed in shared]
                row[name] += f" ({mean_and_deviation(differences, '+')})"
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
            row = {field: result[field] for field in FIELDS} | measures_of(result)
            if result.get("reference", result["checkpoint"]) != result["checkpoint"]:
                row["difference"] = f"{result['difference']:+.2f} +- {result['interval']:.2f}"
            row["M parameters"] = result["parameters"] / 1e6
            rows.append(row | {"images/s": round(result["images_per_s"])})
        print_table(rows)
        seeds = seed_rows(here)
        if any(row["seeds"] > 1 for row in seeds):
            print("\nover seeds: mean +- deviation (and differences to the first group, by seed)\n")
            print_table(seeds)


def evaluate(args, folders: dict[str, Images], texts: dict) -> list[dict]:
    """The results of every checkpoint on every folder, written as they come."""
    results, firsts = [], {}
    unfinished = f"{args.predictions}.tmp" if args.predictions else os.devnull
    with open(args.out or os.devnull, "a") as out, open(unfinished, "w") as predictions:
        for file in args.checkpoints:
            net = Checkpoint(file, args.ema, folders, texts)
            for name, folder in folders.items():
                result, found = evaluate_folder(net, name, folder, texts, firsts, args)
                results.append(result)
                print(json.dumps(result), file=out, flush=True)
                for i in np.flatnonzero(found["label"] >= 0) if "top1" in result else []:
                    line = {"checkpoint": file, "data": name, "image": folder.key(i)}
                    for field in "label", "prediction":
                        line[field] = net.state["classes"][found[field][i]]
                    line["probability"] = round(float(found["probability"][i]), 6)
                    print(json.dumps(line), file=predictions)  # devnull without --predictions
    if args.predictions:
        os.replace(unfinished, args.predictions)
    return results


def main() -> None:
    args = parse_args()
    if args.world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    folders, texts = read_folders(args.data), {}
    folder = next(iter(folders.values()))
    if args.captions:
        index = {folder.key(i): i for i in range(len(folder))}
        texts["images"] = read_texts(args.captions, args.embeddings, index, every=False)
    if args.class_captions:
        if not folder.classes:
            raise SystemExit(f"--class-captions: {folder.root} has no class folders")
        files = args.class_captions, args.class_embeddings
        texts["classes"] = read_texts(*files, folder.class_to_idx, every=True)
    for file in args.checkpoints:  # a fault of the last is told before the first is evaluated
        Checkpoint(file, args.ema, folders, texts)
    results = evaluate(args, folders, texts)
    if args.rank == 0:
        report(results, list(folders))
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'evaluate.py'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
