"""Top-1, top-5 and how well the alignment worked, of one or more checkpoints: stage 4 of 4 (caption -> embed -> train -> evaluate).

In:  CHECKPOINT ...     what train.py wrote (last.pt, best.pt), or the name of a torchvision model: its published weights
     --data [NAME=]DIR  ImageNet-style folder(s), DIR/<class>/<image>; classes are matched by name, numeric folder names (ImageNet-V2)
                        are class indices
Out: a Markdown table per folder; the difference is to the first row, with its 95 % interval over the images, which both rows saw.
     Predictions are among all of a checkpoint's classes; for a folder with some of them only, a column more is among these
     (which is how ImageNet-A and ImageNet-R are published)

Launch:
    python evaluate.py --data imagenet/val runs/baseline/last.pt runs/aligned/last.pt
    python evaluate.py --data imagenet/val --data v2=imagenetv2 --data sketch=sketch resnet50 runs/aligned/last.pt
    torchrun --standalone --nproc_per_node=4 evaluate.py --data imagenet/val runs/aligned/last.pt
    python evaluate.py --data imagenet/val runs/aligned/last.pt --captions val_captions.jsonl --embeddings val_embeddings.npy   # recall@k

What is evaluated is the plain model, on torchvision's own preprocessing; every image counts exactly once on any number of processes.
"""
import argparse
import difflib
import hashlib
import json
import os
import re
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

NUMBERED = [str(i) for i in range(1000)]


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    p.add_argument("--data", required=True, action="append", metavar="[NAME=]DIR", help="may be given several times")
    p.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    p.add_argument("--out", metavar="FILE.jsonl", help="append the results, one object per checkpoint and folder")
    p.add_argument("--predictions", metavar="FILE.jsonl", help="write image, label, prediction and its probability, per checkpoint and folder")
    p.add_argument("--captions", help="captions.jsonl of the (one) folder: image-text recall@1/5/10 through the projection head")
    p.add_argument("--embeddings", help="embeddings.npy of these captions")
    p.add_argument("--class-captions", help="captions that stand for classes (caption.py --model template on the folder): zero-shot top-1 against them")
    p.add_argument("--class-embeddings", help="embeddings.npy of these captions")
    p.add_argument("-b", "--batch-size", type=int, default=64, help="default: 64")
    p.add_argument("-j", "--workers", type=int, default=min(8, os.cpu_count() or 1))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.batch_size < 1 or args.workers < 0:
        p.error("-b starts at 1, -j at 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no GPU that torch can use")
    if bool(args.captions) != bool(args.embeddings) or bool(args.class_captions) != bool(args.class_embeddings):
        p.error("--captions and --embeddings go together, and so do --class-captions and --class-embeddings")
    names = torchvision.models.list_models(module=torchvision.models)
    for file in args.checkpoints:  # all of them, before the first is evaluated
        if file not in names and not os.path.exists(file):
            close = difflib.get_close_matches(file, names)
            p.error(f"{file}: no such checkpoint, and no torchvision model of that name" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    for file in filter(None, (args.out, args.predictions)):
        if not os.path.isdir(os.path.dirname(file) or "."):
            p.error(f"{file}: its folder does not exist")
    if (args.captions or args.class_captions) and len(args.data) > 1:
        p.error("captions belong to one folder: give one --data")
    return args


class Images(Dataset):
    """Item i: image [3, S, S] float32 after `transform`, label (-1: unreadable), index in the folder."""

    def __init__(self, samples: list[tuple[str, int]], indices: range, transform, size: int):
        self.samples, self.indices, self.transform, self.size = samples, indices, transform, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int):
        index = self.indices[item]
        path, label = self.samples[index]
        try:
            return self.transform(pil_loader(path)), label, index
        except Exception:  # one bad image costs that image; it is named at the end
            return torch.zeros(3, self.size, self.size), -1, index


# ----------------------------------------------------------------------------------------------------------- checkpoints

def load_checkpoint(file: str, ema: bool) -> tuple[nn.Module, dict]:
    """The plain model with its weights (strictly), and the checkpoint's other entries; "transform" is the preprocessing."""
    if file in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(file).DEFAULT
        transform = weights.transforms()
        try:
            model = torchvision.models.get_model(file, weights=weights)
        except OSError as error:
            raise SystemExit(f"{file}: its published weights cannot be downloaded: {error}")
        return model, {
            "arch": file, "epoch": "", "selected": str(weights), "classes": None, "transform": transform, "input_size": transform.crop_size[0], "settings": {"published": file}}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = state["ema"] if ema else state["model"]
    except Exception as error:
        raise SystemExit(f"{file}: not a checkpoint of train.py that can be read safely ({type(error).__name__})")
    if weights is None:
        raise SystemExit(f"{file} has no averaged weights: leave out --ema, or train with --ema-decay")
    if "config" in state["rebuild"]:
        model = transformers.AutoModelForImageClassification.from_config(transformers.AutoConfig.for_model(**state["rebuild"]["config"]))
    else:
        model = torchvision.models.get_model(state["arch"], num_classes=len(state["classes"]), **state["rebuild"]["kwargs"])
    model.load_state_dict(weights, strict=True)
    size = state["input_size"]
    state["transform"] = v2.Compose([
        v2.Resize(round(size / state["crop_ratio"]), InterpolationMode(state["interpolation"])), v2.CenterCrop(size), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(state["mean"], state["std"])])
    return model, state


def head_from_weights(weights: dict[str, torch.Tensor]) -> nn.Module:
    """train.py's projection head h, rebuilt from its weights alone."""
    if "weight" in weights:
        head = nn.Linear(*weights["weight"].shape[::-1], bias=False)
    else:
        hidden, width = weights["0.weight"].shape
        norm = [nn.BatchNorm1d(hidden)] if "1.running_mean" in weights else []
        head = nn.Sequential(nn.Linear(width, hidden, bias="0.bias" in weights), *norm, nn.ReLU(), nn.Linear(hidden, len(list(weights.values())[-1])))
    head.load_state_dict(weights, strict=True)
    return head.eval()


def match_classes(folder: ImageFolder, classes: list[str], checkpoint: str) -> list[tuple[str, int]]:
    """The folder's samples with the checkpoint's class indices."""
    index = {name: i for i, name in enumerate(classes)}
    if all(name.isdigit() and name not in index and int(name) < len(classes) for name in folder.classes):
        index = {name: int(name) for name in folder.classes}
    unknown = [name for name in folder.classes if name not in index]
    if unknown:
        raise SystemExit(f"{folder.root} has {len(unknown)} class(es) that {checkpoint} does not know, the first is '{unknown[0]}'"
                         + "; published weights know class folders by number, or by name if one of the --data folders has all 1000 of ImageNet" * (classes == NUMBERED))
    return [(path, index[folder.classes[label]]) for path, label in folder.samples]


# ------------------------------------------------------------------------------------------------------------ measuring

@torch.inference_mode()
def predict(model: nn.Module, classes: list[int], head: nn.Module | None, loader: DataLoader, device: str, total: int, quiet: bool) -> dict[str, np.ndarray]:
    """Arrays over the folder's images: "label" (-1: unreadable), "prediction", "probability", "top5" (bool), "among" (the prediction
    among `classes`, the folder's indices), with a head "feature" [N, D]."""
    model, found, features = model.to(device, memory_format=torch.channels_last).eval(), [], []
    if head is not None:
        last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        head.to(device)
    for images, labels, indices in tqdm(loader, unit="batch", disable=quiet, leave=False):
        output = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        logits, some = getattr(output, "logits", output).float(), torch.tensor(classes, device=device)
        labels = labels.to(device, non_blocking=True)
        batch = {"index": indices, "label": labels, "prediction": logits.argmax(1), "probability": logits.softmax(1).amax(1),
                 "top5": (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1), "among": some[logits[:, some].argmax(1)]}
        if head is not None:
            feature = features.pop()
            batch["feature"] = F.normalize(head(feature.flatten(2).mean(2) if feature.ndim == 4 else feature), dim=1)
        found.append({name: value.cpu().numpy() for name, value in batch.items()})
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        found = [batch for part in parts for batch in part]
    merged = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    order = np.argsort(merged.pop("index"))
    assert len(order) == total  # every image once
    return {name: value[order] for name, value in merged.items()}


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of b - a in points, and the half width of its 95 % interval (normal approximation); a, b: bool [N], hits on the same images."""
    difference = 100 * (b.astype(float) - a.astype(float))
    return difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")


def read_text(captions: str, embeddings: str) -> tuple[list[str], np.ndarray]:
    """Image key per row, and the rows; refused if the captions changed after embedding."""
    try:
        identity = json.load(open(embeddings.removesuffix(".npy") + ".json", encoding="utf-8"))
        content, rows = open(captions, "rb").read(), np.load(embeddings, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise SystemExit(f"captions and embeddings: {error}")
    if hashlib.sha256(content).hexdigest() != identity["captions_sha256"]:
        raise SystemExit(f"{captions} is not the file that {embeddings} was made from: run embed.py again")
    return [json.loads(line)["image"] for line in content.splitlines()], rows


def retrieval(features: np.ndarray, texts: np.ndarray, owner: np.ndarray, ks: tuple = (1, 5, 10)) -> dict[str, float]:
    """Recall@k in percent. features [N, D] and texts [M, D] of length 1; owner [M]: the image of each text. An image is a hit if one of
    its own texts is among its k nearest, a text if its image is."""
    features, texts, owner = torch.from_numpy(features), torch.from_numpy(np.asarray(texts, dtype=np.float32)), torch.from_numpy(owner)
    described = torch.unique(owner)
    hits = {}
    for name, queries, keys, is_own in (
            ("image->text", described, texts, lambda rows, top: (owner[top] == described[rows, None])),
            ("text->image", torch.arange(len(texts)), features[described], lambda rows, top: (described[top] == owner[rows, None]))):
        source = features if name == "image->text" else texts
        own = torch.cat([is_own(rows, (source[queries[rows]] @ keys.T).topk(min(max(ks), len(keys)), dim=1).indices) for rows in torch.arange(len(queries)).split(1024)])
        hits |= {f"{name} R@{k}": 100 * own[:, :k].any(1).float().mean().item() for k in ks}
    return hits


def text_measures(args: argparse.Namespace, features: np.ndarray, folder: ImageFolder, readable: np.ndarray) -> dict[str, float]:
    """Retrieval and zero-shot top-1 of the readable images' features [N, D]."""
    index = {os.path.relpath(path, folder.root).replace(os.sep, "/"): i for i, (path, _) in enumerate(folder.samples) if readable[i]}
    measures = {}
    if args.captions:
        keys, rows = read_text(args.captions, args.embeddings)
        kept = [row for row, key in enumerate(keys) if key in index]
        if not kept:
            raise SystemExit(f"--captions: none of them belongs to an image of {folder.root}")
        measures |= retrieval(features, rows[kept], np.array([index[keys[row]] for row in kept]))
    if args.class_captions:
        keys, rows = read_text(args.class_captions, args.class_embeddings)
        prototypes = np.zeros((len(folder.classes), rows.shape[1]), np.float32)
        for key, row in zip(keys, rows):
            if key.split("/")[0] in folder.class_to_idx:
                prototypes[folder.class_to_idx[key.split("/")[0]]] += row
        nearest = (features @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True).clip(1e-9)).T).argmax(1)
        measures["zero-shot top-1"] = 100 * float((nearest == np.array(folder.targets))[readable].mean())
    return measures


# ----------------------------------------------------------------------------------------------------------------- main

def print_table(head: list[str], rows: list[list]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    folders = {}
    for option in args.data:
        name, _, directory = option.rpartition("=") if not os.path.isdir(option) else (option, "", option)
        try:
            folders[name or directory] = ImageFolder(directory)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SystemExit(f"--data {option}: {error}")
    imagenet = next((f.classes for f in folders.values() if len(f.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in f.classes)), NUMBERED)
    results, predictions = [], []
    for file in args.checkpoints:
        model, state = load_checkpoint(file, args.ema)
        head = None
        if args.captions or args.class_captions:
            if not state.get("projection") or state["settings"].get("text_adapter", "none") != "none":
                raise SystemExit(f"{file} has no projection head into the plain embeddings: retrieval needs a run with --embeddings and without --text-adapter")
            head = head_from_weights(state["projection"])
            width = list(state["projection"].values())[-1].shape[0]
            for captions, embeddings in ((args.captions, args.embeddings), (args.class_captions, args.class_embeddings)):
                if captions and (found := read_text(captions, embeddings)[1].shape[1]) != width:
                    raise SystemExit(f"{embeddings} has width {found}, the head of {file} {width}: embed with the encoder of the training")
        for name, folder in folders.items():
            classes = state["classes"] or imagenet
            samples = match_classes(folder, classes, file)
            present = sorted({label for _, label in samples})
            images = Images(samples, range(rank, len(samples), world), state["transform"], state["input_size"])
            loader = DataLoader(images, args.batch_size, num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
            start = time.perf_counter()
            found = predict(model, present, head, loader, args.device, len(samples), quiet=rank > 0)
            speed = len(samples) / (time.perf_counter() - start)
            readable = found["label"] >= 0
            if not readable.any():
                raise SystemExit(f"no image of {folder.root} can be read")
            hit, among = (found[guess] == found["label"] for guess in ("prediction", "among"))
            if rank == 0:
                for index in np.flatnonzero(~readable)[:5]:
                    print(f"unreadable, not counted: {samples[index][0]!r}")
                results.append({
                    "checkpoint": file, "data": name, "arch": state["arch"], "epoch": state["epoch"], "selected": state["selected"], "images": int(readable.sum()),
                    "unreadable": int((~readable).sum()), "top1": 100 * hit[readable].mean(), "top5": 100 * found["top5"][readable].mean(),
                    "classes": len(present), "of_classes": len(classes), "top1_among_these": 100 * among[readable].mean(),
                    "parameters": sum(p.numel() for p in model.parameters()), "images_per_s": speed, "settings": state["settings"], "ema": args.ema,
                    "text": text_measures(args, found["feature"], folder, readable) if head else {}, "hit": hit, "readable": readable})
                if args.predictions:
                    predictions += [{"checkpoint": file, "data": name, "image": os.path.relpath(path, folder.root).replace(os.sep, "/"), "label": int(label), "prediction": int(guess),
                                     "probability": round(float(p), 6)} for (path, label), guess, p in zip(samples, found["prediction"], found["probability"])]
    if rank == 0:
        report(args, results, list(folders))
        if args.predictions:
            with open(args.predictions + ".tmp", "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in predictions)
            os.replace(args.predictions + ".tmp", args.predictions)
            print(f"{args.predictions}: {len(predictions)} predictions")
    if world > 1:
        dist.destroy_process_group()


def report(args: argparse.Namespace, results: list[dict], names: list[str]) -> None:
    """A table per folder; below it, where several checkpoints differ in nothing but the seed, mean and standard deviation."""
    for name in names:
        rows = [result for result in results if result["data"] == name]
        if len(names) > 1:
            print(f"\n**{name}**\n")
        lines, groups, subset = [], {}, any(row["classes"] < row["of_classes"] for row in rows)
        for row in rows:
            both = rows[0]["readable"] & row["readable"]
            row["difference"], row["interval"] = paired_difference(rows[0]["hit"][both], row["hit"][both]) if row is not rows[0] else (0.0, 0.0)
            difference = "" if row is rows[0] else f"{row['difference']:+.2f} +- {row['interval']:.2f}"
            lines.append([row["checkpoint"], row["arch"], row["epoch"], row["selected"], row["images"], f"{row['top1']:.2f}", f"{row['top5']:.2f}", difference,
                          *[f"{row['top1_among_these']:.2f}"] * subset, *(f"{value:.2f}" for value in row["text"].values()), f"{row['parameters'] / 1e6:.2f}", f"{row['images_per_s']:.0f}"])
            same = {key: value for key, value in row["settings"].items() if key != "seed"} | {"selected": row["selected"], "epoch": row["epoch"]}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append(row)
        print_table(["checkpoint", "arch", "epoch", "selected", "images", "top-1 %", "top-5 %", "difference", *[f"top-1 % among these {rows[0]['classes']} classes"] * subset,
                     *rows[0]["text"], "M parameters", "images/s"], lines)
        if any(len({row["settings"].get("seed") for row in group}) > 1 for group in groups.values()):
            print()
            first = statistics.mean(row["top1"] for row in next(iter(groups.values())))
            means = [(group, statistics.mean(row["top1"] for row in group), statistics.stdev([row["top1"] for row in group]) if len(group) > 1 else float("nan")) for group in groups.values()]
            print_table(["seeds", "first checkpoint of the group", "top-1 %, mean +- standard deviation", "difference of the means"],
                        [[len(group), group[0]["checkpoint"], f"{mean:.2f} +- {deviation:.2f}", f"{mean - first:+.2f}" if i else ""] for i, (group, mean, deviation) in enumerate(means)])
    if args.out:
        with open(args.out, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({key: value for key, value in result.items() if key not in ("hit", "readable")}) + "\n" for result in results)
        print(f"{args.out}: {len(results)} results appended")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'disk'}: {error.strerror or error}")
