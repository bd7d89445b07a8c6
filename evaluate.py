"""Top-1, top-5 and how well the alignment worked, of one or more checkpoints: stage 4 of 4 (caption -> embed -> train -> evaluate).

In:  CHECKPOINT ...     what train.py wrote (last.pt, best.pt), or the name of a torchvision model: its published (DEFAULT) weights
     --data [NAME=]DIR  ImageNet-style folder(s), DIR/<class>/<image>; classes are matched by name, numeric folder names (ImageNet-V2)
                        are class indices; published weights know other names from a --data folder that has all 1000 of ImageNet
Out: a Markdown table per folder; the difference to the first row comes with its 95 % interval over the images, which both rows saw (not
     over training seeds: these are in the second table). Predictions are among all of a checkpoint's classes; if a folder has only some
     of them, one more column is among these, which is how ImageNet-A and ImageNet-R are published

Launch:
    python evaluate.py --data imagenet/val runs/baseline/last.pt runs/aligned/last.pt
    python evaluate.py --data imagenet/val --data v2=imagenetv2 --data sketch=sketch resnet50 runs/aligned/last.pt
    torchrun --standalone --nproc_per_node=4 evaluate.py --data imagenet/val runs/aligned/last.pt
    python evaluate.py --data imagenet/val runs/aligned/last.pt --captions val_captions.jsonl --embeddings val_embeddings.npy   # recall@k

What is evaluated is the plain model, on torchvision's own preprocessing; every readable image counts once on any number of processes.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import re
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
    p = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    p.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="[NAME=]DIR",
        help="may be given several times",
    )
    p.add_argument(
        "--ema",
        action="store_true",
        help="the averaged weights instead of the last ones (the projection head has none)",
    )
    p.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="append the results, one object per checkpoint and folder",
    )
    p.add_argument(
        "--predictions",
        metavar="FILE.jsonl",
        help="write image, label, prediction and its probability, per checkpoint and folder",
    )
    p.add_argument(
        "--captions",
        help="captions.jsonl of the (one) folder: image-text recall@1/5/10 through the projection head",
    )
    p.add_argument("--embeddings", help="embeddings.npy of these captions")
    p.add_argument(
        "--class-captions",
        help="captions that stand for classes (caption.py --model template on the folder): zero-shot top-1 against them",
    )
    p.add_argument("--class-embeddings", help="embeddings.npy of these captions")
    p.add_argument("-b", "--batch-size", type=int, default=64, help="default: 64")
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
    args = p.parse_intermixed_args()
    names, text = (
        torchvision.models.list_models(module=torchvision.models),
        args.captions or args.class_captions,
    )
    for wrong, sentence in (
        (args.batch_size < 1 or args.workers < 0, "-b starts at 1, -j at 0"),
        (
            args.device.startswith("cuda") and not torch.cuda.is_available(),
            "--device cuda: this machine has no GPU that torch can use",
        ),
        (
            bool(args.captions) != bool(args.embeddings)
            or bool(args.class_captions) != bool(args.class_embeddings),
            "--captions and --embeddings go together, and so do --class-captions and --class-embeddings",
        ),
        (text and len(args.data) > 1, "captions belong to one folder: give one --data"),
        (
            args.ema and set(args.checkpoints) <= set(names),
            "--ema does nothing for published weights",
        ),
        (
            text and args.ema,
            "--ema: the projection head has no averaged weights: leave out the captions",
        ),
        *(
            (
                os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or "."),
                f"{file}: a file in a folder that exists",
            )
            for file in filter(None, (args.out, args.predictions))
        ),
        *(
            (
                file not in names and not os.path.exists(file),
                f"{file}: no such checkpoint, and no torchvision model of that name"
                + "".join(
                    f"; did you mean {close}?"
                    for close in difflib.get_close_matches(file, names, 1)
                ),
            )
            for file in args.checkpoints
        ),
    ):
        if wrong:
            p.error(sentence)
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
        except Exception:  # one bad image costs that image, and is counted
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
            "arch": file,
            "epoch": "",
            "selected": str(weights),
            "classes": None,
            "transform": transform,
            "input_size": transform.crop_size[0],
            "settings": {"published": file},
        }
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights = state["ema"] if ema else state["model"]
        if weights is None:
            raise SystemExit(
                f"{file} has no averaged weights: leave out --ema, or train with --ema-decay"
            )
        if "config" in state["rebuild"]:
            model = transformers.AutoModelForImageClassification.from_config(
                transformers.AutoConfig.for_model(**state["rebuild"]["config"])
            )
        else:
            model = torchvision.models.get_model(
                state["arch"], num_classes=len(state["classes"]), **state["rebuild"]["kwargs"]
            )
        model.load_state_dict(weights, strict=True)
    except Exception as error:
        raise SystemExit(
            f"{file}: not a checkpoint of train.py that can be read safely ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        )
    state["selected"] += ", averaged weights" if ema else ""
    size = state["input_size"]
    state["transform"] = v2.Compose(
        [
            v2.Resize(round(size / state["crop_ratio"]), InterpolationMode(state["interpolation"])),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(state["mean"], state["std"]),
        ]
    )
    return model, state


def load_head(file: str, state: dict, texts: list[tuple]) -> nn.Module:
    """train.py's projection head h, rebuilt from its weights alone; refused if `texts` are another encoder's."""
    weights, trained_on = state.get("projection"), state["settings"].get("text") or {}
    if not weights or state["settings"]["text_adapter"] != "none":
        raise SystemExit(
            f"{file} has no projection head into the plain embeddings: retrieval needs a run with --embeddings and without --text-adapter"
        )
    for _, _, identity, embeddings in texts:
        for name in "width", "pooling", "prefix", "weights_sha256":
            if identity.get(name) != trained_on.get(name):
                raise SystemExit(
                    f"{embeddings} has {name} {identity.get(name)}, the embeddings that {file} was trained with {trained_on.get(name)}: use the same encoder ({trained_on.get('model')})"
                )
    if "weight" in weights:
        head = nn.Linear(*weights["weight"].shape[::-1], bias=False)
    else:
        hidden, width = weights["0.weight"].shape
        norm = [nn.BatchNorm1d(hidden)] if "1.running_mean" in weights else []
        head = nn.Sequential(
            nn.Linear(width, hidden, bias="0.bias" in weights),
            *norm,
            nn.ReLU(),
            nn.Linear(hidden, trained_on["width"]),
        )
    head.load_state_dict(weights, strict=True)
    return head.eval()


def match_classes(
    folder: ImageFolder, classes: list[str], checkpoint: str
) -> list[tuple[str, int]]:
    """The folder's samples with the checkpoint's class indices."""
    index = {name: i for i, name in enumerate(classes)}
    if all(
        name.isdigit() and name not in index and int(name) < len(classes) for name in folder.classes
    ):
        index = {name: int(name) for name in folder.classes}
    unknown = [name for name in folder.classes if name not in index]
    if unknown:
        raise SystemExit(
            f"{folder.root} has {len(unknown)} class(es) that {checkpoint} does not know, the first is '{unknown[0]}'"
            + "; published weights know class folders by number, or by name if one of the --data folders has all 1000 of ImageNet"
            * (classes == NUMBERED)
        )
    return [(path, index[folder.classes[label]]) for path, label in folder.samples]


# ------------------------------------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def predict(
    model: nn.Module,
    classes: list[int],
    head: nn.Module | None,
    loader: DataLoader,
    device: str,
    total: int,
    quiet: bool,
) -> dict[str, np.ndarray]:
    """Arrays over the folder's images: "label" (-1: unreadable), "prediction", "probability", "top5" (bool), "among" (the prediction
    among `classes`, the folder's indices), with a head "feature" [N, D]."""
    model, found, features = model.to(device, memory_format=torch.channels_last).eval(), [], []
    if head is not None:
        last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        head.to(device)
    some = torch.tensor(classes, device=device)
    for images, labels, indices in tqdm(loader, unit="batch", disable=quiet, leave=False):
        output = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        logits, labels = (
            getattr(output, "logits", output).float(),
            labels.to(device, non_blocking=True),
        )
        batch = {
            "index": indices,
            "label": labels,
            "prediction": logits.argmax(1),
            "probability": logits.softmax(1).amax(1),
            "top5": (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1),
            "among": some[logits[:, some].argmax(1)],
        }
        if head is not None:
            feature = features.pop()
            batch["feature"] = F.normalize(
                head(feature.flatten(2).mean(2) if feature.ndim == 4 else feature), dim=1
            )
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
    return difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5 if len(
        difference
    ) > 1 else float("nan")


def read_text(captions: str, embeddings: str) -> tuple[list[str], np.ndarray, dict, str]:
    """Image key per row, the rows, what embed.py says of them, and the file's name; refused if the captions changed after embedding."""
    try:
        identity = json.load(open(embeddings.removesuffix(".npy") + ".json", encoding="utf-8"))
        content, rows = open(captions, "rb").read(), np.load(embeddings, mmap_mode="r")
        keys = [json.loads(line)["image"] for line in content.splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"captions and embeddings: {error}")
    if hashlib.sha256(content).hexdigest() != identity.get("captions_sha256") or rows.shape != (
        len(keys),
        identity.get("width"),
    ):
        raise SystemExit(
            f"{captions} is not the file that {embeddings} was made from: run embed.py again"
        )
    return keys, rows, identity, embeddings


def retrieval(
    features: np.ndarray,
    texts: np.ndarray,
    owner: np.ndarray,
    ks: tuple = (1, 5, 10),
    device: str = "cpu",
) -> dict[str, float]:
    """Recall@k in percent. features [N, D] and texts [M, D] of length 1; owner [M]: the image of each text. An image is a hit if one of
    its own texts is among its k nearest, a text if its image is among its k nearest of the images that have a text."""
    features, texts, owner = (
        torch.from_numpy(np.asarray(x, kind)).to(device)
        for x, kind in ((features, np.float32), (texts, np.float32), (owner, np.int64))
    )
    described, hits = torch.unique(owner), {}
    images = features[described]
    for name, queries, keys, query_image, key_image in (
        ("image->text", images, texts, described, owner),
        ("text->image", texts, images, owner, described),
    ):
        nearest = torch.cat(
            [(part @ keys.T).topk(min(max(ks), len(keys))).indices for part in queries.split(1024)]
        )
        own = key_image[nearest] == query_image[:, None]
        hits |= {f"{name} R@{k}": 100 * own[:, :k].any(1).float().mean().item() for k in ks}
    return hits


def text_measures(
    captions: tuple | None,
    class_captions: tuple | None,
    features: np.ndarray,
    folder: ImageFolder,
    readable: np.ndarray,
    device: str,
) -> dict[str, float]:
    """Retrieval and zero-shot top-1 of the readable images' features [N, D]; both texts as read_text() gives them."""
    index = {
        os.path.relpath(path, folder.root).replace(os.sep, "/"): i
        for i, (path, _) in enumerate(folder.samples)
        if readable[i]
    }
    measures = {}
    if captions:
        kept = [row for row, key in enumerate(captions[0]) if key in index]
        if not kept:
            raise SystemExit(f"--captions: none of them belongs to an image of {folder.root}")
        measures |= retrieval(
            features,
            captions[1][kept],
            np.array([index[captions[0][row]] for row in kept]),
            device=device,
        )
    if class_captions:
        prototypes = np.zeros((len(folder.classes), class_captions[1].shape[1]), np.float32)
        for key, row in zip(*class_captions[:2]):
            if key.split("/")[0] in folder.class_to_idx:
                prototypes[folder.class_to_idx[key.split("/")[0]]] += row
        if not (norms := np.linalg.norm(prototypes, axis=1, keepdims=True)).all():
            raise SystemExit(
                f"--class-captions: {(norms == 0).sum()} class(es) of {folder.root} have none, the first is '{folder.classes[int(norms.argmin())]}'"
            )
        nearest = (features @ (prototypes / norms).T).argmax(1)
        measures["zero-shot top-1"] = 100 * float(
            (nearest == np.array(folder.targets))[readable].mean()
        )
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
        name, _, directory = (
            ("", "", option)
            if "=" not in option or os.path.isdir(option)
            else option.partition("=")
        )
        if (name := name or directory) in folders:
            raise SystemExit(
                f"--data {option}: there are two folders of this name: give them names, NAME=DIR"
            )
        try:
            folders[name] = ImageFolder(directory, allow_empty=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SystemExit(f"--data {option}: {error}")
        if not folders[name].samples:
            raise SystemExit(f"--data {option}: its class folders hold no image")
    imagenet = next(
        (
            f.classes
            for f in folders.values()
            if len(f.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in f.classes)
        ),
        NUMBERED,
    )
    captions = read_text(args.captions, args.embeddings) if args.captions else None
    class_captions = (
        read_text(args.class_captions, args.class_embeddings) if args.class_captions else None
    )
    texts = [text for text in (captions, class_captions) if text]

    def prepare(file: str) -> tuple[nn.Module, dict, nn.Module | None, list[str], dict[str, list]]:
        model, state = load_checkpoint(file, args.ema)
        classes = state["classes"] or imagenet
        return (
            model,
            state,
            load_head(file, state, texts) if texts else None,
            classes,
            {name: match_classes(folder, classes, file) for name, folder in folders.items()},
        )

    if len(args.checkpoints) > 1:
        for file in args.checkpoints:
            prepare(
                file
            )  # whatever is wrong with the last one is said before the first one is evaluated
    results, first, predicted = [], {}, 0
    with contextlib.ExitStack() as files:
        out = (
            files.enter_context(open(args.out, "a", encoding="utf-8"))
            if args.out and rank == 0
            else None
        )
        predictions = (
            files.enter_context(open(args.predictions + ".tmp", "w", encoding="utf-8"))
            if args.predictions and rank == 0
            else None
        )
        for file in args.checkpoints:
            model, state, head, classes, matched = prepare(file)
            for name, samples in matched.items():
                present = sorted({label for _, label in samples})
                images = Images(
                    samples,
                    range(rank, len(samples), world),
                    state["transform"],
                    state["input_size"],
                )
                loader = DataLoader(
                    images,
                    args.batch_size,
                    num_workers=args.workers,
                    pin_memory=args.device.startswith("cuda"),
                )
                start = time.perf_counter()
                found = predict(
                    model, present, head, loader, args.device, len(samples), quiet=rank > 0
                )
                speed = len(samples) / (time.perf_counter() - start)
                readable = found["label"] >= 0
                if not readable.any():
                    raise SystemExit(f"no image of {folders[name].root} can be read")
                if rank > 0:
                    continue
                if not readable.all():
                    print(
                        f"{name}: {(~readable).sum()} unreadable images, not counted: {', '.join(repr(samples[i][0]) for i in np.flatnonzero(~readable)[:5])}"
                    )
                hit, among = (found[guess] == found["label"] for guess in ("prediction", "among"))
                first.setdefault(name, (file, hit, readable))
                both = first[name][2] & readable
                difference, interval = paired_difference(first[name][1][both], hit[both])
                results.append(
                    {
                        "checkpoint": file,
                        "data": name,
                        "arch": state["arch"],
                        "epoch": state["epoch"],
                        "selected": state["selected"],
                        "images": int(readable.sum()),
                        "unreadable": int((~readable).sum()),
                        "top1": 100 * hit[readable].mean(),
                        "top5": 100 * found["top5"][readable].mean(),
                        "classes": len(present),
                        "of_classes": len(classes),
                        "top1_among_these": 100 * among[readable].mean(),
                        "reference": first[name][0],
                        "difference": difference,
                        "interval": interval,
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "images_per_s": speed,
                        "text": text_measures(
                            captions,
                            class_captions,
                            found["feature"],
                            folders[name],
                            readable,
                            args.device,
                        )
                        if head
                        else {},
                        "settings": state["settings"],
                    }
                )
                if out:
                    out.write(json.dumps(results[-1]) + "\n")
                    out.flush()
                for i in np.flatnonzero(readable) if predictions else ():
                    path, label = samples[i]
                    predictions.write(
                        json.dumps(
                            {
                                "checkpoint": file,
                                "data": name,
                                "image": os.path.relpath(path, folders[name].root).replace(
                                    os.sep, "/"
                                ),
                                "label": classes[label],
                                "prediction": classes[found["prediction"][i]],
                                "probability": round(float(found["probability"][i]), 6),
                            }
                        )
                        + "\n"
                    )
                    predicted += 1
    if rank == 0:
        report(results, list(folders))
        if args.out:
            print(f"{args.out}: {len(results)} results appended")
        if args.predictions:
            os.replace(args.predictions + ".tmp", args.predictions)
            print(f"{args.predictions}: {predicted} predictions")
    if world > 1:
        dist.destroy_process_group()


def report(results: list[dict], names: list[str]) -> None:
    """A table per folder; below it, where several checkpoints differ in nothing but the seed, mean and standard deviation."""
    for name in names:
        rows = [result for result in results if result["data"] == name]
        if len(names) > 1:
            print(f"\n**{name}**\n")
        lines, groups, subset = [], {}, any(row["classes"] < row["of_classes"] for row in rows)
        for row in rows:
            difference = (
                "" if row is rows[0] else f"{row['difference']:+.2f} +- {row['interval']:.2f}"
            )
            lines.append(
                [
                    row["checkpoint"],
                    row["arch"],
                    row["epoch"],
                    row["selected"],
                    row["images"],
                    f"{row['top1']:.2f}",
                    f"{row['top5']:.2f}",
                    difference,
                    *[f"{row['top1_among_these']:.2f}"] * subset,
                    *(f"{value:.2f}" for value in row["text"].values()),
                    f"{row['parameters'] / 1e6:.2f}",
                    f"{row['images_per_s']:.0f}",
                ]
            )
            same = {key: value for key, value in row["settings"].items() if key != "seed"} | {
                "selected": row["selected"]
            }
            groups.setdefault(json.dumps(same, sort_keys=True), {})[row["settings"].get("seed")] = (
                row  # a seed counts once
            )
        print_table(
            [
                "checkpoint",
                "arch",
                "epoch",
                "selected",
                "images",
                "top-1 %",
                "top-5 %",
                "difference",
                *[f"top-1 % among these {rows[0]['classes']} classes"] * subset,
                *rows[0]["text"],
                "M parameters",
                "images/s",
            ],
            lines,
        )
        if len(rows) > 1:
            print(
                "\ndifference: points of top-1 to the first row, with the 95 % interval over the images (not over training seeds)"
            )
        if any(len(group) > 1 for group in groups.values()):
            lines, base = [], next(iter(groups.values()))
            for group in groups.values():
                top1 = [row["top1"] for row in group.values()]
                differences = [
                    row["top1"] - base[seed]["top1"]
                    for seed, row in group.items()
                    if seed in base and group is not base
                ]
                lines.append(
                    [
                        len(group),
                        next(iter(group.values()))["checkpoint"],
                        mean_and_deviation(top1),
                        mean_and_deviation(differences, "+"),
                    ]
                )
            print()
            print_table(
                [
                    "seeds",
                    "first checkpoint of the group",
                    "top-1 %, mean +- standard deviation",
                    "difference to the first group, seed by seed",
                ],
                lines,
            )


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    return (f"{np.mean(values):{sign}.2f}" if values else "") + (
        f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    )


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'evaluate.py'}: {error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
