"""Top-1 and top-5 of one or more checkpoints on an ImageNet-style folder: stage 4 of 4 (caption -> embed -> train -> evaluate).

In:  CHECKPOINT ...   what train.py wrote (last.pt, best.pt)
     --data VAL_DIR   VAL_DIR/<class>/<image>; classes are matched by name, a subset of the checkpoint's is evaluated among all of them
Out: a Markdown table; the difference is to the first row

Launch:
    python evaluate.py --data imagenet/val runs/baseline/last.pt runs/aligned/last.pt
    torchrun --standalone --nproc_per_node=4 evaluate.py --data imagenet/val runs/aligned/last.pt

What is evaluated is the plain model, on torchvision's own preprocessing; every image counts exactly once on any number of processes.
"""
import argparse
import os
import time

import torch
import torch.distributed as dist
import torchvision
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    p.add_argument("--data", required=True, metavar="VAL_DIR")
    p.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    p.add_argument("-b", "--batch-size", type=int, default=64, help="default: 64")
    p.add_argument("-j", "--workers", type=int, default=min(8, os.cpu_count() or 1))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.batch_size < 1 or args.workers < 0:
        p.error("-b starts at 1, -j at 0")
    return args


class Images(Dataset):
    """Item i: image [3, S, S] float32 after `transform`, label (-1: unreadable), i."""

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


def load_checkpoint(file: str, ema: bool) -> tuple[nn.Module, dict]:
    """The plain model with its weights (strictly), and the checkpoint's other entries."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = state["ema"] if ema else state["model"]
    except Exception as error:
        raise SystemExit(f"{file}: not a checkpoint of train.py: {str(error).splitlines()[0]}")
    if weights is None:
        raise SystemExit(f"{file} has no averaged weights: leave out --ema, or train with --ema-decay")
    if "config" in state["rebuild"]:
        config = dict(state["rebuild"]["config"])
        model = transformers.AutoModelForImageClassification.from_config(transformers.AutoConfig.for_model(**config))
    else:
        model = torchvision.models.get_model(state["arch"], num_classes=len(state["classes"]), **state["rebuild"]["kwargs"])
    model.load_state_dict(weights, strict=True)
    return model, state


def match_classes(folder: str, samples: list[tuple[str, int]], names: list[str], classes: list[str], checkpoint: str) -> list[tuple[str, int]]:
    """The folder's samples with the checkpoint's class indices, matched by name."""
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise SystemExit(f"{folder} has {len(unknown)} class(es) that {checkpoint} does not know, the first is '{unknown[0]}'")
    return [(path, index[names[label]]) for path, label in samples]


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, device: str, quiet: bool) -> tuple[torch.Tensor, list[int]]:
    """Counts (top-1 hits, top-5 hits, images), float64 [3], summed over all processes; indices of unreadable images of this one."""
    counts, unreadable = torch.zeros(3, dtype=torch.float64, device=device), []
    model = model.to(device, memory_format=torch.channels_last).eval()
    for images, labels, indices in tqdm(loader, unit="batch", disable=quiet, leave=False):
        unreadable += indices[labels < 0].tolist()
        labels = labels.to(device, non_blocking=True)
        output = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        logits = getattr(output, "logits", output)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.cpu(), unreadable


def main() -> None:
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        folder = ImageFolder(args.data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SystemExit(f"--data {args.data}: {error}")
    table = []
    for file in args.checkpoints:
        model, state = load_checkpoint(file, args.ema)
        samples = match_classes(args.data, folder.samples, folder.classes, state["classes"], file)
        size = state["input_size"]
        transform = v2.Compose([v2.Resize(round(size / state["crop_ratio"]), InterpolationMode(state["interpolation"])), v2.CenterCrop(size), v2.PILToTensor(),
                                v2.ToDtype(torch.float32, scale=True), v2.Normalize(state["mean"], state["std"])])
        images = Images(samples, range(rank, len(samples), world), transform, size)
        loader = DataLoader(images, args.batch_size, num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
        start = time.perf_counter()
        (top1, top5, count), unreadable = evaluate(model, loader, args.device, quiet=rank > 0)
        seconds = time.perf_counter() - start
        for index in unreadable[:5]:
            print(f"unreadable, not counted: {samples[index][0]!r}")
        if count == 0:
            raise SystemExit(f"no image of {args.data} can be read")
        table.append((file, state, 100 * top1 / count, 100 * top5 / count, int(count), count / seconds))
    if rank == 0:
        print("| checkpoint | arch | epoch | selected | images | top-1 % | top-5 % | difference | images/s |\n|---|---|---|---|---|---|---|---|---|")
        for file, state, top1, top5, count, speed in table:
            difference = "" if file is table[0][0] else f"{top1 - table[0][2]:+.2f}"
            print(f"| {file} | {state['arch']} | {state['epoch']} | {state['selected']} | {count} | {top1:.2f} | {top5:.2f} | {difference} | {speed:.0f} |")
        if len(table[0][1]["classes"]) < 5:
            print("(top-5 with fewer than five classes is 100 %)")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
