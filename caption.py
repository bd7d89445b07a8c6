"""Describe every image of a folder with a multimodal LLM: stage 1 of 4, before embed.py.

In:  --data DIR         an ImageNet-style folder, DIR/<class>/<image>, or DIR/<image>: no labels
Out: --out FILE.jsonl   one JSON object per caption: "image" (path relative to DIR), "caption",
                        "model", "prompt", "settings"; it appears when all captions are there
     FILE.jsonl.failed  the images that could not be described, and why (only if there are any)

Launch:
    python caption.py --data imagenet/train                              # one process
    torchrun --nproc_per_node=8 caption.py --data imagenet/train         # the GPUs of one machine
    python caption.py --data imagenet/train --shard $TASK/64             # task 0..63 of a job array
    python caption.py --data imagenet/train --model template --prompt "a photo of a {class}"
    python caption.py --data imagenet/train --import their_captions.pth  # somebody else's captions
    python caption.py --data imagenet/train --preview captions.png       # look at twelve first

Kill it at any moment and run the same line again: it goes on where it stopped. The unit of work is
a batch, always the same images of the folder's order. Each process appends one line per finished
batch to a file of its own in FILE.jsonl.parts/; whoever finds all batches there merges them. So
greedy decoding gives the same file on any number of processes on the same hardware, however often
they are restarted. The parts stay, for --retry-failed and a larger --limit: remove them at the end.
From GPT4Image (arXiv 2306.00693), section "describe".
"""

import argparse
import collections
import contextlib
import csv
import gc
import inspect
import io
import json
import os
import random
import re
import textwrap
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"  # small, well known, runs on any GPU
PROMPT = "Describe this image in detail."
PATHS = ("image", "path", "image_path", "filepath", "file_path", "file", "file_name", "filename")
TEXTS = ("caption", "captions", "text", "description")
SETTINGS = ["model", "revision", "dtype", "prompt", "max_new_tokens", "batch_size"]
SETTINGS += ["num_captions", "temperature", "top_p", "seed"]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    add, cuda = p.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    workers = max(1, min(4, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--data", required=True, help="folder of images: DIR/<class>/<image> or DIR/<image>")
    add("--out", default="captions.jsonl", help="where the captions go")
    add("--model", default=MODEL, help="hub id or folder; template: the prompt is the caption")
    add("--prompt", action="append", help=f"may hold {{class}}; repeatable (default: {PROMPT})")
    add("--class-names", help="readable names: JSON {folder: name} or lines 'folder<TAB>name'")
    add("--batch-size", type=int, default=16, help="images per generate call")
    add("--max-new-tokens", type=int, default=128, help="length limit of a caption")
    add("--num-captions", type=int, default=1, help="sampled captions per image and prompt")
    add("--temperature", type=float, default=0.0, help="0 decodes greedily")
    add("--top-p", type=float, default=1.0, help="of the sampling: only the likeliest tokens")
    add("--seed", type=int, default=0, help="of the sampling and of --preview's choice of images")
    add("-j", "--workers", type=int, default=workers, help="processes that prepare images")
    add("--device", default=cuda, help="cuda, cuda:N or cpu")
    add("--dtype", default="auto", choices=dtypes, help="of the weights; auto: as they were saved")
    add("--revision", default="main", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    add("--limit", type=int, help="describe only the first N images of the folder's order")
    add("--retry-failed", action="store_true", help="do the batches again in which images failed")
    add("--shard", default="0/1", help="I/N: part I (from 0) of N; torchrun splits a part further")
    add("--import", dest="published", metavar="FILE", help="somebody's .pth, .txt, .csv, .json(l)")
    add("--preview", metavar="PNG", help="draw twelve random images with captions, and stop")
    args = p.parse_args()
    args.prompt = args.prompt or [PROMPT]
    check(p, args)
    return args


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    placeholders = set(re.findall(r"{\w*}", " ".join(args.prompt)))
    if placeholders - {"{class}"}:
        p.error(f"--prompt: {placeholders} is not known, only {{class}} is")
    counts = args.batch_size, args.max_new_tokens, args.num_captions, args.workers + 1
    if min(*counts, 1 if args.limit is None else args.limit) < 1:
        p.error("--batch-size, --max-new-tokens, --num-captions and --limit start at 1, -j at 0")
    if args.model == "template" and args.prompt == [PROMPT]:
        p.error('--model template needs a --prompt, "a photo of a {class}" for one')
    if args.num_captions > 1 and args.temperature == 0:
        p.error("--num-captions above 1 needs --temperature above 0: greedy ones are all the same")
    if args.model.startswith((".", "/")) and not os.path.isdir(args.model):
        p.error(f"--model {args.model}: there is no such folder")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no GPU that torch can use")
    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not part or int(part[1]) >= int(part[2]):
        p.error(f"--shard {args.shard}: expected I/N with 0 <= I < N")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.shard, args.shards = int(part[1]) * world + rank, int(part[2]) * world


def list_images(data: str) -> list[str]:
    """Keys (POSIX paths relative to `data`) of all images, in torchvision's ImageFolder order."""
    try:
        folders = {entry.name for entry in os.scandir(data) if entry.is_dir()}
        if folders >= {"train", "val"}:
            raise SystemExit(f"--data {data}: did you mean {os.path.join(data, 'train')}?")
        if folders:
            samples = ImageFolder(data).samples
        else:  # images without labels
            samples = make_dataset(data, {"": 0}, IMG_EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SystemExit(f"--data {data}: {error}") from error
    return [os.path.relpath(path, data).replace(os.sep, "/") for path, _ in samples]


def name_classes(args: argparse.Namespace, keys: list[str]) -> dict[str, str]:
    """{class folder: name} of --class-names, of ImageNet or the folder; {} if no prompt asks."""
    if not any("{class}" in prompt for prompt in args.prompt):
        return {}
    if "/" not in keys[0]:
        raise SystemExit("{class}: the images of --data are not in class folders")
    folders = sorted({key.split("/")[0] for key in keys})
    if args.class_names:
        names = read_class_names(args.class_names)
        if missing := set(folders) - set(names):
            what = f"no name for {len(missing)} class folder(s), as {min(missing)}"
            raise SystemExit(f"--class-names {args.class_names}: {what}")
        return {folder: names[folder] for folder in folders}
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return {folder: folder.replace("_", " ") for folder in folders}
    if len(folders) != 1000:
        raise SystemExit("{class}: only all 1000 ImageNet folders have names: pass --class-names")
    return dict(zip(folders, ResNet50_Weights.DEFAULT.meta["categories"], strict=True))


def read_class_names(file: str) -> dict[str, str]:
    """{folder: name}, of synonyms ("goldfish, Carassius auratus") the first."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        lines = [line.split("\t", 1) for line in text.splitlines() if "\t" in line]
        names = dict(json.loads(text) if file.endswith(".json") else lines)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"--class-names {file}: {first_line(error)}") from error
    return {folder: str(name).split(",")[0].strip() for folder, name in names.items()}


def load_image(path: str) -> Image.Image:
    """8-bit RGB, upright, first frame, transparency on white. Raises what Pillow raises."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bit: convert() would clip to 255, not scale
            image = image.point(lambda value: value / 256).convert("L")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def load(kind: type, args: argparse.Namespace, **options):
    options |= {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    try:
        return kind.from_pretrained(args.model, **options)
    except (ImportError, OSError, ValueError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"--model {args.model}: cannot load it: {first_line(error)}") from error


class Describer:
    """An image-text-to-text model: one with a chat template (LLaVA, Qwen-VL, ...), one that
    gets the plain prompt (BLIP, BLIP-2, InstructBLIP, Florence-2), or one without (ViT-GPT2, and
    GIT, whose tokenizer would close it)."""

    def __init__(self, args: argparse.Namespace):
        if args.device.startswith("cuda"):
            local = int(os.environ.get("LOCAL_RANK", 0))
            torch.cuda.set_device(local if args.device == "cuda" else args.device)
        self.args, self.seconds, self.new_tokens = args, 0.0, 0
        self.options = {"max_new_tokens": args.max_new_tokens, "num_beams": 1, "do_sample": False}
        self.options["num_return_sequences"] = args.num_captions
        if args.temperature:
            sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
            self.options |= sampling | {"do_sample": True}
        self.model = load(transformers.AutoModelForImageTextToText, args, dtype=args.dtype).eval()
        self.model.to(args.device)
        self.processor = load(transformers.AutoProcessor, args)
        if hasattr(self.processor, "tokenizer"):
            self.tokenizer = self.processor.tokenizer
        else:
            self.tokenizer = load(transformers.AutoTokenizer, args)
            self.processor = load(transformers.AutoImageProcessor, args)
        self.tokenizer.padding_side = "left"  # new tokens must follow the prompt directly
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.probe()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"model": None}  # workers that are spawned need no weights

    def probe(self) -> None:
        """Caption two grey images: what cannot be done shows now, not as a million failures."""
        images = [Image.new("RGB", size, "grey") for size in ((224, 224), (300, 200))]
        image_token = getattr(self.model.config, "image_token_id", None)
        takes_text = hasattr(self.processor, "tokenizer") and self.model.config.model_type != "git"
        name = f"--model {self.args.model}"
        for prompt in self.args.prompt:
            if prompt and not takes_text:
                raise SystemExit(f"{name} takes no text: pass --prompt ''")
            try:
                inputs = self.encode(images, prompt)
                self.generate(inputs, max_new_tokens=2)
            except Exception as error:
                raise SystemExit(f"{name} cannot take {prompt!r}: {first_line(error)}") from error
            if image_token is not None and image_token not in inputs["input_ids"]:
                raise SystemExit(f"{name}: its processor puts no image into the prompt")

    def encode(self, images: list[Image.Image], prompt: str) -> dict:
        """The model's inputs, left-padded, for images that share a prompt."""
        if getattr(self.processor, "chat_template", None):
            text = {"type": "text", "text": prompt}
            contents = [[{"type": "image", "image": image}, text] for image in images]
            chats = [[{"role": "user", "content": content}] for content in contents]
            options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            options |= {"add_generation_prompt": True, "processor_kwargs": {"padding": True}}
            return dict(self.processor.apply_chat_template(chats, **options))
        # a processor with an image token (BLIP-2) puts the image into the text: there must be one
        with_text = prompt or hasattr(self.processor, "image_token")
        text = {"text": [prompt] * len(images)} if with_text else {}
        return dict(self.processor(images=images, return_tensors="pt", **text))

    @torch.inference_mode()
    def generate(self, inputs: dict, **changes) -> list[str]:
        """`--num-captions` captions of each row of `inputs`, rows in order."""
        args, model, start = self.args, self.model, time.perf_counter()
        inputs = transformers.BatchFeature(inputs).to(args.device, model.dtype, non_blocking=True)
        if "token_type_ids" not in inspect.signature(model.forward).parameters:
            inputs.pop("token_type_ids", None)
        prompt = inputs["input_ids"].clone() if "input_ids" in inputs else None  # BLIP changes it
        tokens = model.generate(**inputs, **(self.options | changes))
        if prompt is not None:
            tokens = without_prompt(tokens, prompt.repeat_interleave(args.num_captions, 0))
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        special = torch.tensor(self.tokenizer.all_special_ids, device=tokens.device)
        self.new_tokens += int((~torch.isin(tokens, special)).sum())
        self.seconds += time.perf_counter() - start
        return [" ".join(text.split()) for text in texts]


def without_prompt(tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """tokens [n, T] after prompt [n, P], if it is there (BLIP's without its last token)."""
    for cut in (prompt.shape[1], prompt.shape[1] - 1):
        if cut > 1 and torch.equal(tokens[:, 1:cut], prompt[:, 1:cut]):
            return tokens[:, cut:]
    return tokens


@dataclass
class Batches:
    """Images, by their indices in the folder, on their way to captions. A request is (prompt as it
    was given, images, model inputs or a string that says why there are none)."""

    args: argparse.Namespace
    keys: list[str]
    names: dict[str, str]
    describer: Describer

    def read(self, batch: Iterable[int], prompts: Iterable[str] = ()) -> list:
        """Requests for a batch, by default with all prompts; in a DataLoader's worker."""
        images, requests, prompts = {}, [], prompts or self.args.prompt
        for i in batch:
            try:
                images[i] = load_image(os.path.join(self.args.data, self.keys[i]))
            except Exception as error:  # whatever a decoder raises, it costs this image only
                requests += [(prompt, [i], first_line(error)) for prompt in prompts]
        for prompt in prompts:
            groups = collections.defaultdict(list)  # the model is given one text at a time
            for i in images:
                name = self.names.get(self.keys[i].split("/")[0], "")
                groups[prompt.replace("{class}", name)].append(i)
            for text, group in groups.items():
                try:
                    inputs = self.describer.encode([images[i] for i in group], text)
                except Exception as error:  # one of them is too odd (1 x 4000 pixels, say)
                    inputs = first_line(error)
                requests.append((prompt, group, inputs))
        return requests

    def describe(self, requests: list) -> dict[tuple[int, str], list[str] | str]:
        """{(image, prompt): captions, or why there are none}. What does not fit into memory, or
        holds an image that the model cannot take, is halved until that image is alone."""
        found, each = {}, self.args.num_captions
        for prompt, group, inputs in requests:
            problem = inputs if isinstance(inputs, str) else None
            if problem is None:
                try:
                    texts = self.describer.generate(inputs)
                except (torch.OutOfMemoryError, ValueError, IndexError) as error:
                    problem = first_line(error)
            if problem is None:
                found |= {(i, prompt): texts[k * each :][:each] for k, i in enumerate(group)}
            elif len(group) == 1:
                found[group[0], prompt] = problem
            else:
                torch.cuda.empty_cache()
                for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                    found |= self.describe(self.read(half, [prompt]))
        return found

    def records(self, batch: range, settings: str, found: dict) -> list[dict]:
        """What is to be written of a batch: for each image all its captions, or one error."""
        records = []
        for i in batch:
            results = {prompt: found[i, prompt] for prompt in self.args.prompt}
            errors = [result for result in results.values() if isinstance(result, str)]
            if errors:
                records.append({"image": self.keys[i], "error": errors[0]})
                continue
            for prompt, captions in results.items():
                source = {"model": self.args.model, "prompt": prompt, "settings": settings}
                records += [{"image": self.keys[i], "caption": text} | source for text in captions]
        return records


def jsonl(records: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def refuse_others(file: str, found: str, settings: str) -> None:
    if found != settings:
        raise SystemExit(f"{file} was begun with settings {found}, not {settings}: move it away")


def scan(out: str, settings: str) -> dict[range, tuple[int, str, int]]:
    """{batch: (failed images, file, offset of its line)}, the copy with the fewest failures. A line
    that a kill cut short is no JSON, so its batch is done again."""
    found = {}
    for file in sorted(Path(f"{out}.parts").glob("*.jsonl")):
        end = 0
        with open(file, "rb") as stream:
            for line in stream:
                start, end = end, end + len(line)
                with contextlib.suppress(ValueError):
                    part = json.loads(line)
                    refuse_others(file, part["settings"], settings)
                    failed = sum("error" in record for record in part["records"])
                    batch, copy = range(*part["batch"]), (failed, file, start)
                    found[batch] = min(copy, found.get(batch, copy))
    return found


def merge(args: argparse.Namespace, batches: list[range], found: dict) -> None:
    """Write --out and .failed from the parts, in the folder's order; each appears whole."""
    failed, temporary = [], f"{args.out}.parts/{args.shard}-of-{args.shards}.merged"
    with contextlib.ExitStack() as stack:
        files = {file for _, file, _ in found.values()}
        parts = {file: stack.enter_context(open(file, "rb")) for file in files}
        captions = stack.enter_context(open(temporary, "wb"))
        for batch in batches:
            _, file, offset = found[batch]
            parts[file].seek(offset)
            records = json.loads(parts[file].readline())["records"]
            captions.write(jsonl(record for record in records if "caption" in record))
            failed += [record for record in records if "error" in record]
    os.replace(temporary, args.out)
    Path(f"{temporary}.failed").write_bytes(jsonl(failed))
    os.replace(f"{temporary}.failed", f"{args.out}.failed")
    if len(failed) == args.limit:
        raise SystemExit(f"none of the images could be described: see {args.out}.failed")
    if failed:
        print(f"{len(failed)} images failed, listed in {args.out}.failed")
    else:
        Path(f"{args.out}.failed").unlink(missing_ok=True)
    print(summary(args.out))


def write_whole(out: str, records: Iterable[dict]) -> None:
    """Write --out in one go; other captions are never replaced."""
    content = jsonl(records)
    if os.path.exists(out) and Path(out).read_bytes() != content:
        raise SystemExit(f"{out} holds other captions: choose another --out, or move it away")
    temporary = f"{out}.tmp-{os.getpid()}"
    Path(temporary).write_bytes(content)
    os.replace(temporary, out)
    print(summary(out))


def summary(file: str) -> str:
    count, words, empty, different = 0, 0, 0, set()
    with open(file, "rb") as stream:
        for line in stream:
            caption = json.loads(line)["caption"]
            count, words, empty = count + 1, words + len(caption.split()), empty + (not caption)
            different.add(hash(caption))
    mean, repeated = words / max(count, 1), count - len(different)
    return f"{file}: {count} captions of {mean:.1f} words, {empty} empty, {repeated} duplicates"


def read_published(file: str) -> list[tuple[str | None, str]]:
    """[(path, caption)]; .pth and .txt are lists in the folder's order: their path is None."""
    try:
        if file.endswith((".pth", ".pt")):
            captions = torch.load(file, weights_only=True)
            return [(None, captions[i].strip()) for i in range(len(captions))]  # a list of str
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")
        if file.endswith(".csv"):
            return read_csv(text)
        if file.endswith(".json"):  # of COCO, Flickr30k, RSICD: Karpathy's splits
            images = json.loads(text)["images"]
            pairs = [(image["filename"], image["sentences"]) for image in images]
            rows = [(name, one["raw"].strip()) for name, several in pairs for one in several]
            return list(dict.fromkeys(rows))  # people repeat themselves
    except Exception as error:  # a pickle may raise anything; weights_only runs no code of it
        raise SystemExit(f"--import {file}: cannot be read safely: {first_line(error)}") from error
    lines = text.removesuffix("\n").split("\n")
    if file.endswith(".jsonl"):  # our own
        return [(line["image"], line["caption"]) for line in map(json.loads, lines)]
    return [(None, line) for line in lines]


def read_csv(text: str) -> list[tuple[str, str]]:
    """[(path, caption)] of a table with a header, whose columns go by several names."""
    first, *rows = csv.reader(io.StringIO(text))
    columns = [name.strip().lower() for name in first]
    for names in PATHS, TEXTS:
        if not set(names) & set(columns):
            raise ValueError(f"needs one of {names}, has {columns}")
    path = next(columns.index(name) for name in PATHS if name in columns)
    caption = next(columns.index(name) for name in TEXTS if name in columns)
    return [(row[path], row[caption]) for row in rows if len(row) > max(path, caption)]


def match(file: str, rows: list[tuple[str | None, str]], keys: list[str]) -> list[tuple[str, str]]:
    """[(image key, caption)] in the folder's order. Rows name images by their keys, else by class
    folder and file name, else by a file name that is only once there; or follow that order."""
    if not rows or rows[0][0] is None:
        if len(rows) != len(keys):
            raise SystemExit(f"--import: {len(rows)} captions, but --data has {len(keys)} images")
        return [(key, caption) for key, (_, caption) in zip(keys, rows, strict=True)]
    for parts in (0, 2, 1):  # [-0:] is the whole path
        known, found = {}, collections.defaultdict(list)
        for key in keys:
            name = "/".join(key.split("/")[-parts:])
            known[name] = None if name in known else key
        for path, caption in rows:
            key = known.get("/".join(path.replace("\\", "/").split("/")[-parts:]))
            found[key].append(caption)
        unknown = len(found.pop(None, []))
        if found:
            nameless = len(keys) - len(found)
            print(f"{unknown} of {len(rows)} rows name no image; {nameless} images got no caption")
            return [(key, caption) for key in keys for caption in found.get(key, [])]
    raise SystemExit(f"--import {file}: none of its {len(rows)} rows names an image of --data")


def contact_sheet(file: str, data: str, captions: list[tuple[str, str]]) -> None:
    """A picture of images with their captions below, four in a row, wrapped and never cut."""
    columns, side, font = 4, 256, ImageFont.load_default(size=13)
    texts = [f"{key.split('/')[0]}: {caption}" for key, caption in captions]
    texts = [textwrap.fill(text.encode("utf-8", "replace").decode(), 38) for text in texts]
    height = side + 24 + 18 * max(text.count("\n") + 1 for text in texts)
    rows = (len(texts) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (side + 16), height * rows), "white")
    for place, ((key, _), text) in enumerate(zip(captions, texts, strict=True)):
        x, y = 8 + place % columns * (side + 16), 8 + place // columns * height
        image = ImageOps.pad(load_image(os.path.join(data, key)), (side, side), color="white")
        sheet.paste(image, (x, y))
        ImageDraw.Draw(sheet).multiline_text((x, y + side + 4), text, fill="black", font=font)
    sheet.save(file, "PNG")
    print(f"{file}: {len(texts)} captions")


def preview(args: argparse.Namespace, keys: list[str], names: dict[str, str]) -> None:
    keys = sorted(random.Random(args.seed).sample(keys, min(12, len(keys))))
    batches, shown = Batches(args, keys, names, Describer(args)), []
    torch.manual_seed(args.seed)
    found = batches.describe(batches.read(range(len(keys))))
    for i, prompt in sorted(found):
        if isinstance(found[i, prompt], str):
            print(f"failed: {keys[i]!r}: {found[i, prompt]}")
        else:
            shown += [(keys[i], text) for text in found[i, prompt]]
    if not shown:
        raise SystemExit("--preview: none of the images could be described")
    contact_sheet(args.preview, args.data, shown)


def without_model(
    args: argparse.Namespace, keys: list[str], names: dict[str, str]
) -> Iterable[dict]:
    """Captions that need no model: somebody's, or the prompt itself with the class's name in it."""
    if args.published:
        source = {"model": f"import:{os.path.basename(args.published)}", "prompt": ""}
        for key, caption in match(args.published, read_published(args.published), keys):
            yield {"image": key, "caption": " ".join(caption.split())} | source
        return
    for key in keys[: args.limit]:
        for prompt in args.prompt:
            caption = prompt.replace("{class}", names.get(key.split("/")[0], ""))
            yield {"image": key, "caption": caption, "model": "template", "prompt": prompt}


def settings_of(args: argparse.Namespace, keys: list[str], names: dict[str, str]) -> str:
    """All that decides about the captions; --revision becomes a commit, since branches move."""
    config = load(transformers.AutoConfig, args)
    args.revision = getattr(config, "_commit_hash", None) or args.revision
    settings = {name: getattr(args, name) for name in SETTINGS}
    checksum = zlib.crc32(json.dumps([keys, names]).encode())
    return json.dumps(settings | {"images": f"{len(keys)} ({checksum:08x})"})


def describe_batches(batches: Batches, todo: list[range], settings: str, before: int) -> None:
    """Append a line for each batch of `todo`; this process has `before` images behind it."""
    args, model = batches.args, batches.describer
    own = f"{args.out}.parts/{args.shard}-of-{args.shards}.jsonl"
    os.makedirs(os.path.dirname(own), exist_ok=True)
    options = {"num_workers": args.workers, "pin_memory": args.device.startswith("cuda")}
    options |= {"batch_sampler": todo, "collate_fn": batches.read}
    loader = DataLoader(range(len(batches.keys)), **options)
    gc.freeze()  # else each worker's first full collection copies what it shares with this process
    total, quiet = before + sum(map(len, todo)), os.environ.get("RANK", "0") != "0"
    model.seconds = model.new_tokens = captions = failed = 0
    start = time.perf_counter()
    with tqdm(total=total, initial=before, unit="image", smoothing=0.05, disable=quiet) as bar:
        for batch, requests in zip(todo, loader, strict=True):
            # sampling is the same whoever does this batch
            torch.manual_seed(args.seed * 1_000_003 + batch.start // args.batch_size)
            records = batches.records(batch, settings, batches.describe(requests))
            part = {"batch": [batch.start, batch.stop], "settings": settings, "records": records}
            try:
                with open(own, "ab") as stream:  # the first byte ends a line that a kill cut short
                    stream.write(b"\n" + jsonl([part]))
            except OSError as error:
                advice = "what is complete on the disk stays: start the same command again"
                raise SystemExit(f"{own}: {error.strerror}; {advice}") from error
            failed += sum("error" in record for record in records)
            captions += sum("caption" in record for record in records)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(len(batch))
            seconds = time.perf_counter() - start  # without the end of the workers
    rates = f"{captions / seconds:.2f} captions/s, {model.new_tokens / seconds:.0f} new tokens/s"
    share = f"{model.seconds / seconds:.0%} of the time inside generate"
    print(f"this run: {captions} captions in {seconds:.1f} s, {rates}, {share}")


def run(args: argparse.Namespace, keys: list[str], names: dict[str, str]) -> None:
    """Describe what is not on the disk; the process that finds all batches there merges them."""
    settings = settings_of(args, keys, names)
    if os.path.exists(args.out) and not os.path.isdir(f"{args.out}.parts"):
        raise SystemExit(f"{args.out} is there, its parts are not: choose another --out")
    starts = range(0, args.limit, args.batch_size)
    batches = [range(start, min(start + args.batch_size, args.limit)) for start in starts]
    mine, found = batches[args.shard :: args.shards], scan(args.out, settings)
    todo = [b for b in mine if b not in found or (args.retry_failed and found[b][0])]
    if todo:
        before = sum(map(len, mine)) - sum(map(len, todo))
        describe_batches(Batches(args, keys, names, Describer(args)), todo, settings, before)
    found = scan(args.out, settings)
    done = sum(batch in found for batch in batches)
    if done == len(batches):
        merge(args, batches, found)
    else:
        print(f"{done} of {len(batches)} batches are done; the last process writes {args.out}")


def main() -> None:
    args = parse_args()
    keys = list_images(args.data)
    names = name_classes(args, keys)
    args.limit = min(args.limit or len(keys), len(keys))
    if args.preview:
        preview(args, keys[: args.limit], names)
    elif args.published or args.model == "template":
        write_whole(args.out, without_model(args, keys, names))
    else:
        run(args, keys, names)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'caption.py'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on") from None
