r"""README's results on RSICD. Put the authors' dataset_rsicd.json into the clone, and the images of
RSICD_images.zip as RSICD_images/*.jpg. This lays out rsicd/, links to them, as 0, 20, 40, 60 (% of
wrong training labels), few (ten training images per class) and flat (no classes), each with its
captions beside it, and prints the lines of train.py. All else is below: 106 runs of some 5 to 40
minutes on a core, which go on after a kill.

python .github/rsicd.py > jobs
for w in 0 20 40 60; do
    python caption.py --data rsicd/$w/train --model template --prompt "a photo of a {class}" \
        --out rsicd/$w/names.jsonl; done
for w in {0,20,40,60}/{train,names} flat/{train,test}; do
    python embed.py --captions rsicd/$w.jsonl --out rsicd/$w.npy; done
python embed.py --captions rsicd/flat/train.jsonl --out rsicd/flat/tuned.npy \
    --tune-epochs 3 --tuned-out tuned
python embed.py --captions rsicd/flat/test.jsonl --out rsicd/flat/test-tuned.npy --model tuned
export OMP_NUM_THREADS=1; xargs -L 1 python < jobs
for w in 0 20 40 60; do  # wrong labels
    python evaluate.py --data rsicd/0/test --out results.jsonl runs/$w-*-[1-3]/last.pt; done
python evaluate.py --data rsicd/0/test runs/40-{long,cliplong}-{1..3}/last.pt
python .github/figure.py results.jsonl noise.png
python evaluate.py --data rsicd/0/test \
    runs/{alone,longer,from-train-none,from-shuffled}-{1..3}/last.pt  # few labels
python evaluate.py --data rsicd/0/test runs/hiera-{alone,from-mae,from-text}-{1..3}/last.pt
python evaluate.py --data rsicd/flat/test --captions rsicd/flat/test.jsonl \
    --embeddings rsicd/flat/test.npy runs/{train-none,train-mlp,shuffled}-{1..3}/last.pt  # recall
python evaluate.py --data rsicd/flat/test --captions rsicd/flat/test.jsonl \
    --embeddings rsicd/flat/test-tuned.npy runs/{tuned-none,tuned-mlp}-{1..3}/last.pt
"""

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


def write_hiera() -> None:
    """rsicd/hiera: 1.1 million parameters, for images of 128 pixels."""
    config = {"model_type": "hiera", "image_size": [128, 128], "num_query_pool": 2}
    config |= {"embed_dim": 24, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 4, 8]}
    config |= {"decoder_hidden_size": 64, "decoder_depth": 2, "decoder_num_heads": 4}
    os.makedirs("rsicd/hiera", exist_ok=True)
    Path("rsicd/hiera/config.json").write_text(json.dumps(config))


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


def hiera(seed: int) -> Iterator[str]:
    run = f"train.py --arch ./rsicd/hiera -j 0 --resume --seed {seed} --optimizer adamw"
    run += " --weight-decay 0.05 --data rsicd"
    if seed < 3:  # the third run starts from the first's weights: pre-training takes long
        yield (
            f"{run}/flat --recipe mae --epochs 30 -b 64 --lr 1e-3 --warmup-epochs 3 --drop-path 0"
            f" --val-every 5 --out runs/hiera-mae-{seed}"
        )
        yield (
            f"{run}/flat --epochs 15 -b 100 --lr 1e-3 --warmup-epochs 1 --temperature 0.07"
            f" --val-every 5 {texts('flat', 'train')} --out runs/hiera-text-{seed}"
        )
    run += "/few --epochs 120 -b 50 --warmup-epochs 5 --val-every 1000"
    yield f"{run} --lr 3e-4 --out runs/hiera-alone-{seed}"
    for start, rate in ("mae", "1e-3"), ("text", "3e-4"):
        init = f"--lr {rate} --init runs/hiera-{start}-{1 if seed == 3 else seed}/last.pt"
        yield f"{run} {init} --out runs/hiera-from-{start}-{seed}"


if __name__ == "__main__":
    lay_out()
    write_hiera()
    for seed in 1, 2, 3:
        run = f"train.py --arch shufflenet_v2_x0_5 --input-size 64 -j 0 --resume --seed {seed}"
        for table in wrong_labels, without_labels, few_labels:  # the last starts from the second
            print(*table(run, seed), sep="\n")
        print(*hiera(seed), sep="\n")
