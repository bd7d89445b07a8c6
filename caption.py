"""Describe every image of a folder with a multimodal LLM: stage 1 of 4 (caption -> embed -> train -> evaluate).

In:  --data DIR         an ImageNet-style folder, DIR/<class>/<image>
Out: --out FILE.jsonl   one JSON object per caption: "image" (path relative to DIR), "caption", "model", "prompt", "settings"
     FILE.jsonl.failed  the images that could not be read, and why (written only if there are any)

Launch:
    python caption.py --data imagenet/train                              # one process
    torchrun --nproc_per_node=8 caption.py --data imagenet/train         # the GPUs of one machine
    python caption.py --data imagenet/train --shard $TASK/64             # task 0..63 of a cluster's job array
    python caption.py --data imagenet/train --model template --prompt "a photo of a {class}"     # control: no MLLM
    python caption.py --data imagenet/train --import their_captions.pth  # captions that somebody published
    python caption.py --data imagenet/train --preview captions.png       # look at twelve captions before paying for all

Kill it at any moment and run the same line again: it goes on where it stopped. The unit of work is a batch, always the
same images of the folder's order; whoever generates it (any number of processes, restarted any number of times), greedy
decoding gives the same file. From GPT4Image (arXiv 2306.00693), section "describe"; the file's contract is in the README.
"""
import argparse
import collections
import contextlib
import csv
import filecmp
import glob
import inspect
import json
import math
import os
import pickle
import random
import re
import textwrap
import time

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationMixin

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"  # small, well known, runs on any GPU (and, slowly, on a laptop)
DEFAULT_PROMPT = "Describe this image in detail."


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="ImageNet-style folder: DIR/<class>/<image>")
    p.add_argument("--out", default="captions.jsonl", help="default: captions.jsonl")
    p.add_argument("--model", default=DEFAULT_MODEL, help=f"hub id or folder of an image-text-to-text model, or 'template' (the prompt itself is the caption); default: {DEFAULT_MODEL}")
    p.add_argument("--prompt", action="append", help=f"'{{class}}' becomes the class's readable name; '' for captioners that take no text; repeat it for several captions per image; default: {DEFAULT_PROMPT}")
    p.add_argument("--class-names", help="readable class names: JSON {folder: name} or lines 'folder<TAB>name'")
    p.add_argument("--batch-size", type=int, default=16, help="images per generate call; default: 16")
    p.add_argument("--max-new-tokens", type=int, default=128, help="length limit of a caption; default: 128")
    p.add_argument("--num-captions", type=int, default=1, help="sampled captions per image and prompt; more than 1 needs --temperature; default: 1")
    p.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily; default: 0")
    p.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling, with --temperature; default: 1")
    p.add_argument("--seed", type=int, default=0, help="of the sampling and of --preview's choice of images; default: 0")
    p.add_argument("-j", "--workers", type=int, default=4, help="processes that decode and preprocess images ahead of the model; default: 4")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights; auto: as they were saved; default: auto")
    p.add_argument("--revision", default="main", help="branch, tag or commit of a hub model; default: main")
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model: only if you have read it")
    p.add_argument("--limit", type=int, help="only the first N images of the folder's order")
    p.add_argument("--retry-failed", action="store_true", help="describe the images of the .failed list again (after you repaired them)")
    p.add_argument("--shard", help="I/N: caption part I (from 0) of N; the part that finishes last writes --out")
    p.add_argument("--import", dest="import_file", metavar="FILE", help="captions that exist already: .pth or .txt in the folder's order, or .csv with a path column and a caption column")
    p.add_argument("--preview", metavar="PNG", help="write a sheet of twelve random images with captions (taken from --out, or generated), and stop")
    args = p.parse_args()
    args.prompt = args.prompt or [DEFAULT_PROMPT]
    if args.preview and not args.preview.endswith((".png", ".jpg")):
        p.error("--preview takes a .png or .jpg file")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no GPU that torch can use")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        p.error(f"--out {args.out}: its folder does not exist")
    unknown = [name for prompt in args.prompt for name in re.findall(r"{\w*}", prompt) if name != "{class}"]
    if unknown:
        p.error(f"--prompt: {unknown[0]} is not known, only {{class}} is")
    if args.num_captions > 1 and args.temperature <= 0:
        p.error("--num-captions above 1 needs --temperature above 0: greedy decoding gives the same caption every time")
    if min(args.batch_size, args.max_new_tokens, args.num_captions) < 1 or args.workers < 0 or (args.limit is not None and args.limit < 1):
        p.error("--batch-size, --max-new-tokens, --num-captions and --limit start at 1, --workers at 0")
    shard, _, shards = (args.shard or "0/1").partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        p.error(f"--shard {args.shard}: expected I/N with 0 <= I < N")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun, if each task of an array uses it
    args.shard, args.shards, args.quiet = int(shard) * world + rank, int(shards) * world, rank > 0
    if args.retry_failed and args.shards > 1:
        p.error("--retry-failed rewrites --out first: run it in one process, without --shard")
    return args


# ------------------------------------------------------------------------------------------ images and class names

def list_images(data: str) -> list[str]:
    """Keys (POSIX paths relative to `data`) of all images, in torchvision's ImageFolder order."""
    try:
        folder = ImageFolder(data)
        if {"train", "val"} <= set(folder.classes):
            raise SystemExit(f"--data {data} holds train/ and val/, not class folders: did you mean {os.path.join(data, 'train')}?")
        samples = folder.samples
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SystemExit(f"--data {data}: {error}")
    return [os.path.relpath(path, data).replace(os.sep, "/") for path, _ in samples]


def read_class_names(file: str | None, folders: list[str]) -> dict[str, str]:
    """{class folder: readable name}, from --class-names, else ImageNet's own names, else the folders' names."""
    if file is None:
        if len(folders) == 1000 and all(len(f) == 9 and f[0] == "n" and f[1:].isdigit() for f in folders):
            return dict(zip(sorted(folders), ResNet50_Weights.DEFAULT.meta["categories"]))
        return {folder: folder.replace("_", " ") for folder in folders}
    try:
        text = open(file, encoding="utf-8").read()
    except OSError as error:
        raise SystemExit(f"--class-names: {error}")
    if file.endswith(".json"):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise SystemExit(f"--class-names {file}: {error}")
    else:
        names = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise SystemExit(f"--class-names {file} has no name for {len(missing)} class folder(s), the first is '{missing[0]}'")
    return {folder: names[folder].split(",")[0].strip() for folder in folders}  # "goldfish, Carassius auratus" -> "goldfish"


def load_image(path: str) -> Image.Image:
    """8-bit RGB PIL image, upright, first frame; transparency on white. Raises what Pillow raises if the file is damaged."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bit: convert() would clip to 255, not scale
            image = image.point(lambda value: value / 256).convert("L")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------- the model

class Describer:
    """An image-text-to-text model of any kind behind one call: images and prompts in, captions out.

    What kind it is comes from its processor: a chat template (LLaVA, Qwen-VL, SmolVLM, ...); a processor without one (BLIP,
    BLIP-2, InstructBLIP, Florence-2, GIT), which gets the plain prompt; or no joint processor at all (ViT-GPT2), which takes no prompt.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        source = dict(revision=args.revision, trust_remote_code=args.trust_remote_code)
        try:
            self.processor = AutoProcessor.from_pretrained(args.model, **source)
            if hasattr(self.processor, "tokenizer"):
                self.tokenizer = self.processor.tokenizer
            else:
                self.processor = AutoImageProcessor.from_pretrained(args.model, **source)
                self.tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
        except (ImportError, OSError, ValueError) as error:  # some kinds need one more package, and say so
            raise SystemExit(f"--model {args.model}: cannot load its processor: {str(error).strip().splitlines()[0]}")
        self.chat = bool(getattr(self.processor, "chat_template", None))
        self.takes_text = hasattr(self.processor, "tokenizer")
        self.tokenizer.padding_side = "left"  # new tokens must follow the prompt directly
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not self.takes_text and any(args.prompt):
            raise SystemExit(f"--model {args.model} takes no text: pass --prompt ''")
        blank = Image.new("RGB", (224, 224))
        try:  # a prompt that this model does not understand shows here, not after a million failed images
            for prompt in args.prompt:
                self.encode([blank, blank], [prompt.replace("{class}", "thing"), prompt])
        except Exception as error:
            raise SystemExit(f"--model {args.model} cannot take --prompt {prompt!r}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")

    def load_weights(self) -> None:
        source = dict(revision=self.args.revision, trust_remote_code=self.args.trust_remote_code)
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(self.args.model, dtype=self.args.dtype, **source)
        except (ImportError, OSError, ValueError) as error:  # some kinds need one more package, and say so
            raise SystemExit(f"--model {self.args.model}: cannot load it: {str(error).strip().splitlines()[0]}")
        self.model = self.model.to(self.args.device).eval()
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    def encode(self, images: list[Image.Image], prompts: list[str]) -> list[tuple[list[int], dict]]:
        """[(positions, model inputs)]: the whole batch, left-padded; or, without a chat template, one group per prompt (some of
        the older models count positions through the padding, so they never see any; InstructBLIP has two tokenizers, so two lengths)."""
        if self.chat:
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                     for image, prompt in zip(images, prompts)]
            inputs = self.processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True})
            return [(list(range(len(images))), dict(inputs))]
        groups = {}
        for position, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(position)
        encoded = []
        for prompt, positions in groups.items():  # where the image has its tokens in the text, there must be a text, if an empty one
            text = {"text": [prompt] * len(positions)} if prompt or hasattr(self.processor, "image_token") else {}
            encoded.append((positions, dict(self.processor(images=[images[i] for i in positions], return_tensors="pt", **text))))
        return encoded

    @torch.inference_mode()
    def generate(self, inputs: dict) -> tuple[list[str], int]:
        """Captions, `--num-captions` for each row of `inputs`, rows in order; and the number of new tokens."""
        args, dtype = self.args, self.model.dtype
        inputs = {name: value.to(args.device, dtype if value.is_floating_point() else None, non_blocking=True)
                  for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)
        prompt = inputs["input_ids"].clone() if "input_ids" in inputs else None  # BLIP writes into its input_ids
        if prompt is not None:
            image_token = getattr(self.model.config, "image_token_id", None)
            if image_token is not None and not (prompt == image_token).any(1).all():
                raise SystemExit(f"--model {args.model}: its processor puts no image into the prompt, the captions would be made up")
            ends = [self.tokenizer.eos_token_id, self.tokenizer.sep_token_id]
            if type(self.model).generate is GenerationMixin.generate and not self.model.config.is_encoder_decoder and all(t in ends for t in prompt[:, -1].tolist()):
                inputs = {name: value[:, :-1] if value.shape == prompt.shape else value for name, value in inputs.items()}  # GIT: a prompt that is to go on
                prompt = prompt[:, :-1]
        how = dict(do_sample=False) if args.temperature <= 0 else dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0)
        tokens = self.model.generate(**inputs, **how, num_beams=1, max_new_tokens=args.max_new_tokens, num_return_sequences=args.num_captions)
        if prompt is not None:  # decoders return the prompt too, encoder-decoders do not, BLIP returns it without its last token
            prompt = prompt.repeat_interleave(args.num_captions, 0)
            for cut in (prompt.shape[1], prompt.shape[1] - 1):
                if cut > 1 and torch.equal(tokens[:, 1:cut], prompt[:, 1:cut]):
                    tokens = tokens[:, cut:]
                    break
        special = torch.tensor(self.tokenizer.all_special_ids, device=tokens.device)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts], int((~torch.isin(tokens, special)).sum())


class Batches(Dataset):
    """Item i is batch `todo[i]`, read and preprocessed in a DataLoader worker: (batch, {image index: error}, requests)."""

    def __init__(self, args, keys: list[str], todo: list[int], describer: Describer, names: dict[str, str]):
        self.args, self.keys, self.todo, self.describer, self.names = args, keys, todo, describer, names

    def __len__(self) -> int:
        return len(self.todo)

    def encode(self, indices: list[int], images: list[Image.Image]) -> list[tuple[int, list[int], dict]]:
        """[(prompt's number, image indices, model inputs)] for all prompts."""
        requests = []
        for number, prompt in enumerate(self.args.prompt):
            prompts = [prompt.replace("{class}", self.names[self.keys[i].split("/")[0]]) for i in indices]
            requests += [(number, [indices[p] for p in positions], inputs) for positions, inputs in self.describer.encode(images, prompts)]
        return requests

    def read(self, indices: list[int]) -> tuple[dict[int, str], list]:
        images, errors = {}, {}
        for i in indices:
            try:
                images[i] = load_image(os.path.join(self.args.data, self.keys[i]))
            except Exception as error:  # whatever a decoder raises, it costs this image only
                errors[i] = f"{type(error).__name__}: {error}"
        if not images:
            return errors, []
        try:
            return errors, self.encode(list(images), list(images.values()))
        except Exception:  # one of them is too odd for the processor (1 x 4000 pixels, say): find out which
            for i in list(images):
                try:
                    self.encode([i], [images[i]])
                except Exception as error:
                    errors[i] = f"{type(error).__name__}: {error}"
                    del images[i]
            return errors, self.encode(list(images), list(images.values())) if images else []

    def __getitem__(self, item: int):
        batch, size = self.todo[item], self.args.batch_size
        errors, requests = self.read(list(range(batch * size, min((batch + 1) * size, len(self.keys)))))
        return batch, errors, requests


def describe(dataset: Batches, requests: list, captions: dict[tuple[int, int], list[str]], timer: dict) -> None:
    """Fill captions[image index, prompt's number]; a batch that does not fit into memory is halved and tried again."""
    for number, indices, inputs in requests:
        start = time.perf_counter()
        try:
            texts, new_tokens = dataset.describer.generate(inputs)
        except torch.OutOfMemoryError:
            texts = None
        timer["generate"] += time.perf_counter() - start
        if texts is not None:
            timer["tokens"] += new_tokens
            k = dataset.args.num_captions
            captions.update({(i, number): texts[row * k:(row + 1) * k] for row, i in enumerate(indices)})
            continue
        if len(indices) == 1:
            raise SystemExit(f"out of memory on a single image, {dataset.keys[indices[0]]}: use a smaller model, --dtype bfloat16 or fewer --max-new-tokens")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for half in (indices[:len(indices) // 2], indices[len(indices) // 2:]):
            describe(dataset, [r for r in dataset.read(half)[1] if r[0] == number], captions, timer)


# -------------------------------------------------------------------------------------------------- files on the disk

def read_lines(file: str, size: float = math.inf):
    """Yield (first byte, end byte, object) per line of the first `size` bytes; a last line that a kill cut short is left out, a missing
    file has none."""
    end = 0
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.endswith(b"\n") or end >= size:
                return
            start, end = end, end + len(raw)
            try:
                yield start, end, json.loads(raw)
            except ValueError as error:
                raise SystemExit(f"{file}, line {number}: not a JSON object ({error}): repair or remove that line")


class Ledger:
    """Which batches are on the disk already, and where: `places` = {batch: (file, first byte, end byte)}.

    A batch is there when each of its images has all its lines, in order, or stands in the `.failed` list. What a killed
    process left behind its last whole batch is cut off before it appends more.
    """

    def __init__(self, args: argparse.Namespace, keys: list[str], settings: str):
        self.args, self.keys, self.settings = args, keys, settings
        self.limit = min(args.limit or len(keys), len(keys))
        self.index = {key: i for i, key in enumerate(keys)}
        self.places, self.failures = {}, {}  # failures: {image index: error}
        self.parts = sorted(glob.glob(glob.escape(args.out) + ".part-*-of-*[0-9]"))
        self.own = args.out if args.shards == 1 else f"{args.out}.part-{args.shard}-of-{args.shards}"
        self.own_end = 0
        files = (args.out, *self.parts)
        sizes = [os.path.getsize(file) if os.path.exists(file) else 0 for file in files]  # others may be writing: what is here now ...
        for file in files:  # ... has its failures, which are written first, in these
            self.failures |= {self.index[line["image"]]: line["error"] for _, _, line in read_lines(file + ".failed") if line["image"] in self.index}
        for file, size in zip(files, sizes):
            self.scan(file, size)
        for batch in range(math.ceil(self.limit / args.batch_size)):
            if not self.owed(batch, self.limit, ()):
                self.places.setdefault(batch, (None, 0, 0))  # all of its images failed

    def owed(self, batch: int, limit: int, present) -> list[int]:
        """The image index of each line that a batch must have if the folder ends at image `limit`."""
        size, per_image = self.args.batch_size, len(self.args.prompt) * self.args.num_captions
        images = range(batch * size, min((batch + 1) * size, limit))
        return [i for i in images if i in present or i not in self.failures for _ in range(per_image)]

    def scan(self, file: str, size: int) -> None:
        run, first, tail = [], 0, 0  # image indices of the current batch's lines; where they begin; where they end

        def close() -> bool:
            batch, present = run[0] // self.args.batch_size, set(run)
            if run not in (self.owed(batch, len(self.keys), present), self.owed(batch, self.limit, present)):
                return False
            self.places.setdefault(batch, (file, first, tail))
            for i in present:
                self.failures.pop(i, None)
            return True

        for start, end, line in read_lines(file, size):
            if line["image"] not in self.index:
                raise SystemExit(f"{file} describes '{line['image']}', which is not in --data {self.args.data}: choose another --out")
            for name, known in (("model", [self.args.model]), ("prompt", self.args.prompt), ("settings", [self.settings])):
                if line.get(name) not in known:
                    raise SystemExit(f"{file} was begun with {name} {line.get(name)!r}, this run has {known[-1]!r}: choose another --out, or move that file away")
            i = self.index[line["image"]]
            if run and i // self.args.batch_size != run[0] // self.args.batch_size:
                if not close():
                    raise SystemExit(f"{file} lacks lines near '{self.keys[run[0]]}': was it edited, or were images added to or removed from --data? Choose another --out")
                run, first = [], start
            run.append(i)
            tail = end
        whole = bool(run) and close()
        if file == self.own:
            self.own_end = tail if whole or not run else first

    def append(self, lines: list[dict], failures: list[dict]) -> None:
        """The lines of one batch; a kill between two writes leaves nothing that the next start takes for a whole batch."""
        for file, objects in ((self.own + ".failed", failures), (self.own, lines)):
            if objects:
                with open(file, "ab") as stream:
                    stream.write(b"".join(json.dumps(o).encode() + b"\n" for o in objects))  # ASCII: any file name survives

    def retry_failed(self) -> None:
        """Forget the batches with failed images, so that they are done again."""
        for batch in {i // self.args.batch_size for i in self.failures}:
            self.places.pop(batch, None)
        self.failures = {}
        self.write()

    def finish(self) -> bool:
        """If every batch is there, put `--out` into the folder's order and remove the parts. False if batches are missing."""
        if len(self.places) < math.ceil(self.limit / self.args.batch_size):
            return False
        end = 0
        for file, start, stop in (place for _, place in sorted(self.places.items()) if place[0]):
            end = stop if (file, start) == (self.args.out, end) else -1
        if self.parts or end != os.path.getsize(self.args.out):
            self.write()
        return True

    def write(self) -> None:
        """One file of all whole batches, in order, and one of all failures; the parts are removed when these are complete."""
        places = [place for _, place in sorted(self.places.items()) if place[0]]
        failed = [{"image": self.keys[i], "error": error} for i, error in sorted(self.failures.items())]
        with contextlib.ExitStack() as stack:
            sources = {file: stack.enter_context(open(file, "rb")) for file in {place[0] for place in places}}
            merged = stack.enter_context(open(f"{self.args.out}.tmp-{os.getpid()}", "wb"))
            for file, start, end in places:
                sources[file].seek(start)
                merged.write(sources[file].read(end - start))
        with open(f"{self.args.out}.failed.tmp-{os.getpid()}", "wb") as stream:
            stream.writelines(json.dumps(line).encode() + b"\n" for line in failed)
        os.replace(stream.name, self.args.out + ".failed")
        os.replace(merged.name, self.args.out)
        for file in [self.args.out + ".failed"] * (not failed) + [part + suffix for part in self.parts for suffix in ("", ".failed")]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(file)


def summary(file: str) -> str:
    count, words, empty, seen = 0, 0, 0, set()
    for _, _, line in read_lines(file):
        count, words, empty = count + 1, words + len(line["caption"].split()), empty + (not line["caption"])
        seen.add(hash(line["caption"]))
    return f"{count} captions, {words / max(count, 1):.1f} words on average, {empty} empty, {count - len(seen)} duplicates"


# ------------------------------------------------------------------------------- captions without a model, and the sheet

def read_published(file: str, keys: list[str]) -> list[tuple[str, str]]:
    """[(image key, caption)] from somebody's captions: a .pth list or .txt lines in ImageFolder's order, or a .csv with file names."""
    try:
        if file.endswith(".csv"):
            with open(file, encoding="utf-8", errors="replace", newline="") as stream:
                rows = [{(name or "").strip().lower(): value or "" for name, value in row.items()} for row in csv.DictReader(stream)]
        elif file.endswith((".pth", ".pt")):
            rows = torch.load(file, weights_only=True)
        else:
            rows = open(file, encoding="utf-8", errors="replace").read().removesuffix("\n").split("\n")
    except (OSError, pickle.UnpicklingError, RuntimeError, csv.Error) as error:
        raise SystemExit(f"--import {file}: {str(error).splitlines()[0]}")
    if not file.endswith(".csv"):
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise SystemExit(f"--import {file}: expected a list of strings")
        if len(rows) != len(keys):
            raise SystemExit(f"--import {file}: {len(rows)} captions, but --data has {len(keys)} images: by position they cannot be matched")
        return list(zip(keys, rows))
    columns = list(rows[0]) if rows else []
    path = next((c for c in ("image", "path", "image_path", "filepath", "file_path", "file", "file_name", "filename") if c in columns), None)
    text = next((c for c in ("caption", "captions", "text", "description") if c in columns), None)
    if path is None or text is None:
        raise SystemExit(f"--import {file}: needs a column image, path or file_name and a column caption or text; it has {', '.join(columns) or 'nothing'}")
    full, short = {key: key for key in keys}, collections.defaultdict(list)
    for key in keys:
        short[key.split("/")[-1]].append(key)
    found, unknown = collections.defaultdict(list), 0
    for row in rows:
        name = row[path].replace("\\", "/")
        by_name = short.get(name.split("/")[-1], [])  # a bare file name counts if only one image has it
        key = full.get(name) or full.get("/".join(name.split("/")[-2:])) or (by_name[0] if len(by_name) == 1 else None)
        unknown += key is None
        if key is not None:
            found[key].append(row[text])
    if not found:
        raise SystemExit(f"--import {file}: none of its {len(rows)} rows names an image of --data, the first is {rows[0][path]!r}")
    print(f"{unknown} of {len(rows)} rows name no image of --data (or more than one); {len(keys) - len(found)} of {len(keys)} images got no caption")
    return [(key, caption) for key in keys for caption in found.get(key, [])]


def write_whole(out: str, lines: list[dict]) -> None:
    """Write `out` in one go (temporary name, then rename); refuse to replace a file with other content."""
    temporary = f"{out}.tmp-{os.getpid()}"
    with open(temporary, "wb") as stream:
        stream.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    if os.path.exists(out) and not filecmp.cmp(temporary, out, shallow=False):
        os.remove(temporary)
        raise SystemExit(f"{out} exists and holds other captions: choose another --out, or move it away")
    os.replace(temporary, out)
    print(f"{out}: {summary(out)}")


def contact_sheet(file: str, data: str, captions: list[tuple[str, str]], columns: int = 4, side: int = 256) -> None:
    """A PNG of images with their captions below, wrapped and never cut."""
    if not captions:
        raise SystemExit(f"--preview {file}: there are no captions to show yet")
    font = ImageFont.load_default(size=13)
    texts = [textwrap.fill(f"{key.split('/')[0]}: {caption}".encode("utf-8", "replace").decode(), 38) for key, caption in captions]
    height = side + 24 + 18 * max(text.count("\n") + 1 for text in texts)
    sheet = Image.new("RGB", (columns * (side + 16), height * math.ceil(len(texts) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((key, _), text) in enumerate(zip(captions, texts)):
        x, y = 8 + number % columns * (side + 16), 8 + number // columns * height
        sheet.paste(ImageOps.pad(load_image(os.path.join(data, key)), (side, side), color="white"), (x, y))
        pen.multiline_text((x, y + side + 4), text, fill="black", font=font)
    sheet.save(file)
    print(f"{file}: {len(texts)} captions")


# ------------------------------------------------------------------------------------------------------------------ main

def main() -> None:
    args = parse_args()
    keys = list_images(args.data)
    names = read_class_names(args.class_names, sorted({key.split("/")[0] for key in keys}))
    sampling = "greedy" if args.temperature <= 0 else f"temperature={args.temperature} top_p={args.top_p} seed={args.seed} num_captions={args.num_captions}"
    settings = f"max_new_tokens={args.max_new_tokens} batch_size={args.batch_size} prompts={len(args.prompt)} dtype={args.dtype} revision={args.revision} {sampling}"
    if args.import_file:
        found = read_published(args.import_file, keys)
        return write_whole(args.out, [{"image": k, "caption": " ".join(c.split()), "model": f"import:{os.path.basename(args.import_file)}", "prompt": ""} for k, c in found])
    if args.model == "template":
        return write_whole(args.out, [{"image": k, "caption": p.replace("{class}", names[k.split("/")[0]]), "model": "template", "prompt": p}
                                      for k in keys[:args.limit] for p in args.prompt])
    if args.preview and os.path.exists(args.out):
        lines = [line for _, _, line in read_lines(args.out)]
        lines = random.Random(args.seed).sample(lines, min(12, len(lines)))
        return contact_sheet(args.preview, args.data, [(line["image"], line["caption"]) for line in lines])

    ledger = Ledger(args, keys, settings)
    if args.retry_failed and ledger.failures:
        ledger.retry_failed()
        ledger = Ledger(args, keys, settings)
    batches = range(math.ceil(ledger.limit / args.batch_size))
    todo = [b for b in batches if b % args.shards == args.shard and b not in ledger.places]
    timer = {"generate": 0.0, "tokens": 0}
    captioned, failed, start = 0, 0, time.perf_counter()
    if todo or args.preview:
        if "LOCAL_RANK" in os.environ and args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        describer = Describer(args)
        describer.load_weights()
        dataset = Batches(args, keys[:ledger.limit], todo, describer, names)
    if args.preview:
        indices = sorted(random.Random(args.seed).sample(range(len(keys)), min(12, len(keys))))
        dataset, captions = Batches(args, keys, [], describer, names), {}
        describe(dataset, dataset.read(indices)[1], captions, timer)
        return contact_sheet(args.preview, args.data, [(keys[i], caption) for (i, _), found in sorted(captions.items()) for caption in found])
    if todo:
        if os.path.exists(ledger.own):
            os.truncate(ledger.own, ledger.own_end)
        total = sum(len(ledger.owed(b, ledger.limit, range(len(keys)))) for b in batches if b % args.shards == args.shard)
        bar = tqdm(total=total, unit="caption", smoothing=0.05, disable=args.quiet)
        bar.update(total - sum(len(ledger.owed(b, ledger.limit, range(len(keys)))) for b in todo))
        bar.initial, start = bar.n, time.perf_counter()  # the rate is this run's
        loader = DataLoader(dataset, batch_size=None, num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
        for batch, errors, requests in loader:
            captions = {}
            torch.manual_seed(args.seed * 1_000_003 + batch)  # sampling is the same whoever does this batch
            describe(dataset, requests, captions, timer)
            indices = sorted({i for i, _ in captions})
            lines = [{"image": keys[i], "caption": caption, "model": args.model, "prompt": prompt, "settings": settings}
                     for i in indices for number, prompt in enumerate(args.prompt) for caption in captions[i, number]]
            ledger.append(lines, [{"image": keys[i], "error": error} for i, error in sorted(errors.items())])
            captioned, failed = captioned + len(lines), failed + len(errors)
            bar.update(len(lines))
            bar.set_postfix_str(f"{timer['tokens'] / (time.perf_counter() - start):.0f} new tokens/s, {failed} images failed", refresh=False)
        bar.close()
    seconds = max(time.perf_counter() - start, 1e-9)
    if todo:
        print(f"this run: {captioned} captions in {seconds:.1f} s, {captioned / seconds:.2f} captions/s, {timer['tokens'] / seconds:.0f} new tokens/s, "
              f"{timer['generate'] / seconds:.0%} of the time inside generate, {failed} images failed")
    try:  # processes do not talk to each other: the one that finds all batches on the disk finishes the job
        ledger = Ledger(args, keys, settings)
        complete = ledger.finish()
    except FileNotFoundError:  # another process is just doing that
        return
    if not complete:
        return print(f"{len(ledger.places)} of {len(batches)} batches are done; the process that does the last one writes {args.out}")
    for i, error in list(sorted(ledger.failures.items()))[:10]:
        print(f"failed: {keys[i]!r}: {error}")
    if len(ledger.failures) == ledger.limit:
        raise SystemExit(f"none of the {ledger.limit} images could be described: see {args.out}.failed")
    print(f"{args.out}: {summary(args.out)}; {len(ledger.failures)} images failed" + (f", listed in {args.out}.failed" if ledger.failures else ""))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that cannot be written
        raise SystemExit(f"{error.filename or 'disk'}: {error.strerror or error}; what is complete on the disk stays: start the same command again")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on")
