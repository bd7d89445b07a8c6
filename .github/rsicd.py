"""README's results on RSICD: lays out rsicd/, links to RSICD_images/ by dataset_rsicd.json (its
authors' files), as 0, 20, 40, 60 (% of wrong training labels), few (ten training images per class)
and flat (no classes), each with its captions beside it, and prints the lines of train.py.
Usage: python .github/rsicd.py > jobs"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path


def put(name: str, folder: str) -> None:
    os.makedirs(f"rsicd/{folder}", exist_ok=True)
    if not os.path.lexists(link := f"rsicd/{folder}/{name}"):
        os.symlink(os.path.realpath(f"RSICD_images/{name}", strict=True), link)


def write_captions(folder: str, said: dict[str, list[str]]) -> None:
    """rsicd/FOLDER.jsonl: the different sentences of each image, in the folder's order."""
    with open(f"rsicd/{folder}.jsonl", "w", encoding="utf-8") as file:
        for path in sorted(Path(f"rsicd/{folder}").rglob("*.jpg")):
            key = path.relative_to(f"rsicd/{folder}").as_posix()
            for text in said[path.name]:
                line = {"image": key, "caption": " ".join(text.split())}
                line |= {"model": "import:dataset_rsicd.json", "prompt": ""}
                file.write(json.dumps(line) + "\n")


def lay_out() -> None:
    with open("dataset_rsicd.json", encoding="utf-8") as file:
        images = json.load(file)["images"]
    said = {}
    for one in images:  # people repeat themselves
        said[one["filename"]] = list(
            dict.fromkeys(text["raw"].strip() for text in one["sentences"])
        )
    split = {one["filename"]: one["split"] for one in images if not one["filename"][0].isdigit()}
    label = {name: name.rsplit("_", 1)[0] for name in split}  # the others' names state none
    classes = sorted(set(label.values()))
    train = [name for name in split if split[name] == "train"]
    for share in 0, 20, 40, 60:
        rng = random.Random(0)
        wrong = set(rng.sample(train, len(train) * share // 100))
        for name, right in label.items():
            chosen = rng.choice([c for c in classes if c != right]) if name in wrong else right
            put(name, f"{share}/{split[name]}/{chosen}")
    rng = random.Random(0)
    few = set()
    for one in classes:
        few.update(rng.sample(sorted(name for name in train if label[name] == one), 10))
    for name in split:
        put(name, f"flat/{split[name]}")
        if name in few or split[name] != "train":
            put(name, f"few/{split[name]}/{label[name]}")
    for folder in "0/train", "20/train", "40/train", "60/train", "flat/train", "flat/test":
        write_captions(folder, said)


def texts(folder: str, file: str) -> str:
    return f"--captions rsicd/{folder}/{file}.jsonl --embeddings rsicd/{folder}/{file}.npy"


def wrong_labels(run: str, seed: int) -> Iterator[str]:
    for share in "0", "20", "40", "60":
        clip = f"--temperature 0.1 --align-weight 3 {texts(share, 'train')}"
        rows = {"ce": "", "clip": clip, "shuffled": f"{clip} --shuffle-captions"}
        rows["names"] = f"--temperature 0.1 --align-weight 3 {texts(share, 'names')}"
        if share == "40":
            for loss in "infonce", "cosine":
                rows[loss] = f"{clip} --align-weight 10 --align-loss {loss}"
            rows |= {"fast": "--lr 0.1", "smooth": "--label-smoothing 0.1"}
            rows |= {"long": "--epochs 30", "cliplong": f"{clip} --epochs 30"}
        for row, options in rows.items():  # of options given twice the later wins
            common = f"{run} --data rsicd/{share} -b 50 --epochs 15 --val-every 15 --lr 0.03"
            yield f"{common} {options} --out runs/{share}-{row}-{seed}"


def without_labels(run: str, seed: int) -> Iterator[str]:
    run = f"{run} --data rsicd/flat -b 100 --epochs 15 --lr 0.1 --temperature 0.07"
    run = f"{run} --captions rsicd/flat/train.jsonl --embeddings rsicd/flat"
    for teacher in "train", "tuned":
        for adapter in "none", "mlp":
            out = f"runs/{teacher}-{adapter}-{seed}"
            yield f"{run}/{teacher}.npy --text-adapter {adapter} --out {out}"
    yield f"{run}/train.npy --shuffle-captions --out runs/shuffled-{seed}"


def few_labels(run: str, seed: int) -> Iterator[str]:
    run = f"{run} --data rsicd/few -b 50 --val-every 1000"
    yield f"{run} --epochs 120 --lr 0.1 --out runs/alone-{seed}"
    yield f"{run} --epochs 300 --lr 0.1 --out runs/longer-{seed}"
    for start in "train-none", "shuffled":
        init = f"--init runs/{start}-{seed}/last.pt --lr 0.01"
        yield f"{run} --epochs 120 {init} --out runs/from-{start}-{seed}"


if __name__ == "__main__":
    lay_out()
    for seed in 1, 2, 3:
        run = f"train.py --arch shufflenet_v2_x0_5 --input-size 64 -j 0 --resume --seed {seed}"
        for table in wrong_labels, without_labels, few_labels:  # the last starts from the second
            print(*table(run, seed), sep="\n")
