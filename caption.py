"""Describe every image of a folder with a multimodal LLM: stage 1 of 4, before embed.py.

In:  --data DIR         DIR/<class>/<image>, as ImageNet; or DIR/<image>: without labels
Out: --out FILE.jsonl   one JSON object per caption: "image" (path relative to DIR), "caption",
                        "model", "prompt"; it appears when all captions are there
     FILE.jsonl.failed  the images that could not be described, and why (only if there are any)

Launch:
    python caption.py --data imagenet/train                              # one process
    torchrun --nproc_per_node=8 caption.py --data imagenet/train         # the GPUs of one machine
    python caption.py --data imagenet/train --shard $TASK/64             # task 0..63 of a job array
    python caption.py --data imagenet/train --server http://localhost:8000/v1 --model Qwen/...
    python caption.py --data imagenet/train --preview captions.html      # look at twelve first

Kill it at any moment and run the same line again: it goes on where it stopped. Each process appends
its batches (always the same images of the folder's order) to a file of its own in FILE.jsonl.parts/
and whoever finds all batches there merges them. So greedy `generate` gives the same file on any
number of processes of the same hardware. The parts stay, for --retry-failed and a larger --limit.
GPT4Image (arXiv 2306.00693), "describe".
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import errno
import gc
import html
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import ExifTags, Image, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"  # small, well known, runs on any GPU
PROMPT = "Describe this image in detail."
SETTINGS = ["model", "revision", "dtype", "prompt", "max_new_tokens", "batch_size"]
SETTINGS += ["num_captions", "temperature", "top_p", "seed", "max_side", "extra_body"]
BLACK = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAD0lEQVR42m"
BLACK += "NgGAWjgHwAAAJAAAHgTR1EAAAAAElFTkSuQmCC"  # 64 x 64 pixels


def parse_args() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    p.usage, add = "%(prog)s --data DIR [options; --help lists them]", p.add_argument
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(4, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    body = 'JSON for --server\'s requests; {"chat_template_kwargs": {...}} holds without it, too'
    add("--data", required=True, help="folder of images: DIR/<class>/<image> or DIR/<image>")
    add("--out", default="captions.jsonl", help="where the captions go (%(default)s)")
    add("--model", default=MODEL, help=f"hub id or folder ({MODEL}); template: the prompt itself")
    add("--prompt", action="append", help=f"may hold {{class}}; repeatable ({PROMPT})")
    add("--class-names", help="readable names: JSON {folder: name} or lines 'folder<TAB>name'")
    add("--batch-size", type=int, help="images per generate call (16, on a GPU 64)")
    add("--max-new-tokens", type=int, default=128, help="length limit of a caption (%(default)s)")
    add("--num-captions", type=int, default=1, help="sampled captions per image and prompt (1)")
    add("--temperature", type=float, default=0.0, help="of the sampling; 0 (default): greedy")
    add("--top-p", type=float, default=1.0, help="of the sampling: only the likeliest tokens (1)")
    add("--seed", type=int, default=0, help="of the sampling and of --preview's images (0)")
    add("--max-side", type=int, default=1024, help="larger images are shrunk to it (1024; 0: not)")
    add("-j", "--workers", type=int, default=workers, help="processes that read (%(default)s)")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    add("--dtype", default="auto", choices=dtypes, help="of the weights (auto: as they were saved)")
    add("--server", metavar="URL", help="ask --model there; its key: OPENAI_API_KEY")
    add("--concurrency", type=int, default=64, help="requests to --server at once (%(default)s)")
    add("--patience", type=float, default=3600, help="seconds to wait for an absent server (3600)")
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help=body)
    add("--revision", default="main", help="branch, tag or commit of a hub model (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    add("--limit", type=int, default=sys.maxsize, help="only the folder's first N images")
    add("--retry-failed", action="store_true", help="do the batches again in which images failed")
    add("--shard", default="0/1", help="I/N: part I (from 0) of N; torchrun splits a part further")
    add("--preview", metavar="FILE.html", help="show twelve random images with captions, and stop")
    args = p.parse_args()
    args.prompt = args.prompt or [PROMPT]
    if unknown := set(re.findall(r"{\w*}", " ".join(args.prompt))) - {"{class}"}:
        p.error(f"--prompt: {unknown} is not known, only {{class}} is")
    counts = args.max_new_tokens, args.num_captions, args.concurrency, args.limit
    others = args.workers, args.max_side, args.patience, args.temperature
    if min(*counts, args.batch_size or 1) < 1 or min(others) < 0:
        p.error("numbers of images, tokens, captions and requests start at 1, others at 0")
    if args.model == "template" and args.prompt == [PROMPT]:
        p.error('--model template needs a --prompt, "a photo of a {class}" for one')
    if (args.num_captions > 1 or args.top_p != 1) and args.temperature == 0:
        p.error("--num-captions above 1, or --top-p, needs --temperature above 0: nothing is drawn")
    if not re.match("https?://.", args.server or "http://a"):
        p.error(f"--server {args.server}: an address begins with http:// or https://")
    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not part or int(part[1]) >= int(part[2]):
        p.error(f"--shard {args.shard}: expected I/N with 0 <= I < N")
    if not isinstance(args.extra_body, dict):
        p.error('--extra-body: expected a JSON object, {"max_completion_tokens": 128} for one')
    if not args.server and args.extra_body.keys() - {"chat_template_kwargs"}:
        p.error("--extra-body: without --server only chat_template_kwargs has an effect")
    page = Path(args.preview or "page.html")
    if page.suffix != ".html" or not page.parent.is_dir():
        p.error("--preview writes a page: name it FILE.html, in a folder that exists")
    return args


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


def read_names(file: str) -> dict[str, str]:
    """{class folder: name}, of synonyms the first: of JSON {folder: name or names}, or of lines
    with a tab, else white space, behind the folder."""
    text = Path(file).read_text(encoding="utf-8-sig")
    if file.lower().endswith(".json"):
        pairs = json.loads(text).items()
    else:
        lines = [line.strip() for line in text.splitlines()]
        pairs = [line.partition("\t" if "\t" in line else " ")[::2] for line in lines]
    names = {folder: name[0] if isinstance(name, list) else name for folder, name in pairs}
    return {folder.strip(): name.split(",")[0].strip() for folder, name in names.items()}


def name_classes(folders: list[str], prompts: list[str], file: str | None) -> dict[str, str]:
    """{class folder: name}, if a prompt asks for it: of the file, of ImageNet or of the folder."""
    if not any("{class}" in prompt for prompt in prompts):
        return {}
    if not folders:
        raise SystemExit("{class}: the images of --data are not in class folders")
    wanted = "{class}: pass --class-names FILE, of lines 'folder<TAB>name'"
    with in_a_sentence(f"--class-names {file}" if file else wanted):
        names = {}
        if file:
            names = read_names(file)
        elif not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
            names = {folder: folder.replace("_", " ") for folder in folders}
        elif len(folders) == 1000:  # those of ImageNet
            names = dict(zip(folders, ResNet50_Weights.DEFAULT.meta["categories"], strict=True))
        if missing := [folder for folder in folders if not names.get(folder)]:
            raise ValueError(f"no name for {len(missing)} class folders, as {missing[0]}")
    return {folder: names[folder] for folder in folders}


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


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextlib.contextmanager
def in_a_sentence(what: str) -> Iterator[None]:
    """Whatever goes wrong inside ends the run, and is told."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{what}: {first_line(error)}") from error


def clean(texts: list[str]) -> list[str] | str:
    """What a model wrote of an image, its white space made single, without its thoughts; or why
    these are no captions."""
    captions = [" ".join(text.split("</think>")[-1].split()) for text in texts]
    if not all(captions) or any("<think>" in caption for caption in captions):
        return "an empty caption, or thoughts without an end"
    return captions


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto", **options) -> tuple:
    """Model and processor. SystemExit where weights are missing, as they would be random."""
    with in_a_sentence(f"--model {name}: cannot load it"):
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        processor = transformers.AutoProcessor.from_pretrained(name, **options)
        model.eval().to(device)
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        what = f"{len(lacking)} weights are missing or of another shape, as {lacking[0]}"
        raise SystemExit(f"--model {name} is not whole: {what}")
    if getattr(processor, "tokenizer", None) is None or model.config.model_type == "git":
        raise SystemExit(f"--model {name} takes no prompt")
    return model, processor


class Watch(transformers.LogitsProcessor):
    """Notes which rows have had finite scores so far, and replaces those that sampling refuses."""

    finite, failed = True, "the model's scores are not finite: another --dtype may help"

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.finite &= scores.amax(-1).isfinite()  # of the largest, which is NaN if one is
        return scores.masked_fill(~self.finite[:, None], 0.0)


@dataclasses.dataclass
class Describer:
    """A multimodal LLM with a chat template (LLaVA, Qwen-VL, ...) or a plain prompt (BLIP-2, ...):

    Describer(*load_model("Qwen/...")).describe([("cat.jpg", "Describe it.")])
    """

    model: transformers.PreTrainedModel
    processor: transformers.ProcessorMixin
    template: dict = dataclasses.field(default_factory=dict)  # what the chat template takes
    generation: dict = dataclasses.field(default_factory=lambda: {"max_new_tokens": 128})
    batch_size: int = 16
    max_side: int = 1024  # pixels

    def __post_init__(self):
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # no token types
        self.tokenizer.padding_side = "left"  # new tokens must follow the prompt directly
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.special = torch.tensor(self.tokenizer.all_special_ids)
        self.each = self.generation.get("num_return_sequences", 1)
        self.cut = self.image_bytes = 0
        self.dtype, self.chat = self.model.dtype, bool(self.processor.chat_template)
        self.room = torch.tensor(self.batch_size).share_memory_()  # workers see it shrink

    def __getstate__(self) -> dict:
        return self.__dict__ | {"model": None}  # spawned workers need no weights

    def probe(self, prompts: list[str]) -> None:
        """Caption two grey images: what cannot be done shows now, not as a million failures."""
        images = [Image.new("RGB", size, "grey") for size in ((300, 200), (1024, 768))]
        image_token = getattr(self.model.config, "image_token_id", None)
        for prompt in prompts:
            with in_a_sentence(f"--model cannot take {prompt!r}"):
                inputs = self.encode(images, [prompt] * 2)
                if self.generate(inputs, max_new_tokens=2) == [Watch.failed] * 2:
                    raise ValueError(Watch.failed)
                if image_token is not None and image_token not in inputs["input_ids"]:
                    raise ValueError("its processor puts no image into the prompt")
            self.image_bytes += sum(x.nbytes for x in inputs.values()) // len(images)
        self.cut = 0

    def encode(self, images: list[Image.Image], texts: list[str]) -> dict:
        """generate()'s inputs, left-padded; without a chat template for one text."""
        if self.chat:
            texts = [{"type": "text", "text": text} for text in texts]
            images = [{"type": "image", "image": image} for image in images]
            inputs = self.processor.apply_chat_template(
                [[{"role": "user", "content": list(c)}] for c in zip(images, texts, strict=True)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
                **self.template,
            )
        else:
            inputs = self.processor(images=images, text=texts, return_tensors="pt")
        return dict(transformers.BatchFeature(inputs).to(self.dtype))

    @torch.inference_mode()
    def generate(self, inputs: dict, **changes) -> list[list[str] | str]:
        """For each row of encode()'s inputs its captions, or why there are none."""
        watch = Watch()
        inputs = transformers.BatchFeature(inputs).to(self.model.device, non_blocking=True)
        prompt = inputs["input_ids"].repeat_interleave(self.each, 0)  # BLIP changes it
        options = self.generation | changes
        tokens = self.model.generate(**inputs, **options, logits_processor=[watch])
        for cut in (prompt.shape[1], prompt.shape[1] - 1):  # BLIP's output lacks its last token
            if cut > 1 and torch.equal(tokens[:, 1:cut], prompt[:, 1:cut]):
                tokens = tokens[:, cut:]
                break
        ends = torch.isin(tokens[:, -1].cpu(), self.special)  # an end, or what fills the row
        self.cut += len(ends) - int(ends.sum())
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found = [clean(texts[i : i + self.each]) for i in range(0, len(texts), self.each)]
        finite = watch.finite.view(-1, self.each).all(1).tolist()
        return [one if ok else Watch.failed for one, ok in zip(found, finite, strict=True)]

    def read(self, pairs: list[tuple[str, str]]) -> list[tuple[list, dict | str]]:
        """[(some of the (image file, text) pairs, generate()'s inputs or, for one, why there are
        none)]; in a worker. Pairs of which one fails are halved until that one is alone."""
        same = [pair for pair in pairs if self.chat or pair[1] == pairs[0][1]]
        if len(same) < len(pairs):  # a model without a chat template takes one text at a time
            return self.read(same) + self.read([pair for pair in pairs if pair not in same])
        if len(pairs) <= self.room:
            try:
                images = {path: load_image(path) for path in dict(pairs)}
                for image in images.values():
                    image.thumbnail((self.max_side, self.max_side))
                texts = [text for _, text in pairs]
                return [(pairs, self.encode([images[path] for path, _ in pairs], texts))]
            except Exception as error:  # of any kind: no file, a decoder's, too odd for the model
                if len(pairs) == 1:
                    return [(pairs, first_line(error))]
        half = (len(pairs) + 1) // 2
        return self.read(pairs[:half]) + self.read(pairs[half:])

    def describe(self, pairs: list[tuple[str, str]], requests=None) -> dict[tuple, list[str] | str]:
        """{(image file, text): captions, or why there are none}; `requests` is what read() made of
        the pairs. What does not fit into memory, or holds an image that the model cannot take, is
        halved until that image is alone."""
        found, requests = {}, requests or self.read(pairs)
        while requests:
            some, inputs = requests.pop()
            some = [tuple(pair) for pair in some]  # of which torch 2.9's pin_memory makes lists
            error = ""
            try:
                results = [inputs] if isinstance(inputs, str) else self.generate(inputs)
            except Exception as failure:
                error = first_line(failure)
            full = re.search("OutOfMemory|out of memory|allocate memory|ALLOC_FAILED", error)
            if re.search("(CUDA|HIP) error", error) and not full:
                raise SystemExit(f"{error}: the GPU is lost to this process; start it again")
            half = (len(some) + 1) // 2
            if error and len(some) > 1:
                torch.accelerator.empty_cache()
                if full:  # for the rest of the run
                    self.room.clamp_(max=half)
                requests += self.read(some[:half]) + self.read(some[half:])
                continue
            if full:  # it would fit nowhere, which says nothing of the others
                self.room.fill_(self.batch_size)
            found |= dict(zip(some, [error] if error else results, strict=True))
        return found


def ask_model(describer: Describer, questions: list, workers: int, seed: int) -> Iterator[list]:
    """describe() of each batch of questions. What waits for the model takes at most about 4 GB."""
    room = int(4e9 // (describer.image_bytes * describer.batch_size))
    workers = min(workers, max(1, room))
    loader = DataLoader(
        questions,
        batch_size=None,
        collate_fn=describer.read,
        num_workers=workers,
        prefetch_factor=min(2, room // workers) or 1 if workers else None,
        pin_memory=describer.model.device.type == "cuda",
    )
    gc.freeze()  # else each worker's first full collection copies what it shares with us
    with in_a_sentence(f"-j {workers}"):  # of whom one may be killed for its memory
        for pairs, requests in zip(questions, loader, strict=True):
            first = os.path.basename(pairs[0][0])  # sampling is the same whoever does this batch
            torch.manual_seed(zlib.crc32(f"{seed} {first}".encode(errors="replace")))
            found = describer.describe(pairs, requests)
            yield [found[pair] for pair in pairs]


def data_url(path: str, side: int) -> str:
    """A file as it is, if upright, of a common kind and no larger than `side`; else a JPEG."""
    with Image.open(path) as file:
        kind, large = file.format, max(file.size) > side
        common = kind in ("JPEG", "PNG", "WEBP") and file.mode in ("RGB", "L")
        common &= orientation(file) == 1 and "transparency" not in file.info and not large
    stream = io.BytesIO(Path(path).read_bytes() if common else b"")
    if not common:
        image, kind = load_image(path), "JPEG"
        image.thumbnail((side, side))
        image.save(stream, kind, quality=95)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


WAIT, TIMEOUT = 0.25, 300.0  # seconds: before a server is asked again (it doubles), for an answer
AWAY = ConnectionRefusedError, socket.gaierror, TimeoutError
UNREACHABLE = errno.EHOSTUNREACH, errno.ENETUNREACH


@dataclasses.dataclass
class Server:
    """A model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, hosted ones), reached
    through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name, if any:

    Server("http://localhost:8000/v1", {"model": "Qwen/..."}).describe("cat.jpg", "Describe it.")
    """

    url: str
    fields: dict  # of a request: "model", "max_tokens", "temperature", ...
    key: str = "EMPTY"
    max_side: int = 1024  # pixels
    patience: float = 3600.0  # seconds
    tell: Callable[[str], None] = print

    def __post_init__(self):
        self.url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        self.opener = urllib.request.OpenerDirector()  # no error raises, no redirection is followed
        for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), https):
            self.opener.add_handler(handler)
        self.lock, self.cut = threading.Lock(), 0

    def describe(self, image: str, text: str) -> list[str] | str:
        """Captions of an image, a file or a data URL, or why there are none. A server that is busy
        or breaks off is asked 8 times, an absent one until patience ends. Raises ConnectionError
        where other images would fare no better: for its key, its model, its address, its bill."""
        try:
            image = image if image.startswith("data:") else data_url(image, self.max_side)
        except Exception as error:  # whatever a decoder raises, it costs this image only
            return first_line(error)
        content = [{"type": "image_url", "image_url": {"url": image}}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        body = json.dumps(self.fields | {"messages": messages}).encode()
        times, heard = 0, time.monotonic()
        while True:
            status, said, pause = self.post(body)
            result = self.captions(said) if status == 200 else f"{status or ''} {said}"
            if isinstance(result, list):
                return result
            result = " ".join(result.split()).replace(self.key, "***")[:300]
            if status in (401, 402, 404) or (
                not status and time.monotonic() - heard > self.patience
            ):
                raise ConnectionError(result)
            if status:
                times, heard = times + 1, time.monotonic()
                if times == 8 or not (status in (408, 429) or status >= 500):
                    return result
                pause = max(pause, WAIT * 2**times * random.uniform(0.75, 1))
            self.tell(f"asking again in {pause:.0f} s: {result}")
            time.sleep(pause)

    def post(self, body: bytes) -> tuple[int, str, float]:
        """Status, content and Retry-After (seconds) of the answer; status 0 if the server is away,
        503 if it breaks off."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url, body, headers | {"User-Agent": "caption.py"})
        try:
            with self.opener.open(request, timeout=TIMEOUT) as answer:
                said = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # a URLError has one: no answer has begun
            away = isinstance(reason, AWAY) or getattr(reason, "errno", None) in UNREACHABLE
            if away and reason is not error:
                return 0, f"no connection, {first_line(reason)}", 2
            return 503, f"no answer, {first_line(reason)}", 0
        retry, after = answer.headers["Retry-After"] or "0", 0
        with contextlib.suppress(ValueError):
            date = 0 if retry.isdecimal() else parsedate_to_datetime(retry).timestamp()
            after = min(date - time.time() if date else int(retry), 3600)
        return answer.status, said, after

    def captions(self, said: str) -> list[str] | str:
        """Those in an answer with status 200, or why there are none."""
        try:
            answer = json.loads(said)["choices"]
            choices = [answer[i] for i in range(self.fields.get("n", 1))]
            found = clean([choice["message"]["content"] or "" for choice in choices])
            ends = [choice.get("finish_reason") for choice in choices]
        except Exception as error:  # of many kinds, as what may stand there
            found, ends = first_line(error), []
        if isinstance(found, str) or "content_filter" in ends:
            return f"no caption, {found}: {said}"
        with self.lock:
            self.cut += ends.count("length")
        return found


def ask_server(server: Server, questions: list, concurrency: int, prompt: str) -> Iterator[list]:
    """server.describe() of each batch of questions; `concurrency` of them are under way."""
    waiting, ahead = collections.deque(), 2 * concurrency // len(questions[0]) + 2
    with in_a_sentence(f"--server {server.url}"), ThreadPool(concurrency) as pool:
        first = pool.apply(server.describe, (BLACK, prompt.replace("{class}", "")))
        if isinstance(first, str):
            raise ConnectionError(first)
        server.cut = 0
        for pairs in questions:
            waiting.append([pool.apply_async(server.describe, pair) for pair in pairs])
            if len(waiting) > ahead:
                yield [one.get() for one in waiting.popleft()]
        for batch in waiting:
            yield [one.get() for one in batch]


def records_of(keys: list[str], prompts: list[str], model: str, answers: list) -> list[dict]:
    """What is written of a batch: of each image all its captions, or one reason why not."""
    records, answers = [], iter(answers)
    for key in keys:
        found = [(prompt, next(answers)) for prompt in prompts]
        if errors := [said for _, said in found if isinstance(said, str)]:
            records.append({"image": key, "error": errors[0]})
            continue
        for prompt, captions in found:
            more = {"model": model, "prompt": prompt}
            records += [{"image": key, "caption": caption} | more for caption in captions]
    return records


def jsonl(records: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


class Parts:
    """The folder FILE.jsonl.parts/: the settings, and a file of each process for its batches."""

    def __init__(self, out: str, name: str, settings: dict):
        self.out, self.name, self.settings = out, name, settings
        self.folder = Path(f"{out}.parts")
        if self.folder.exists():
            self.begin()
        elif os.path.exists(out):
            raise SystemExit(f"{out} is there, its parts are not: choose another --out")

    def begin(self) -> None:
        """Make the folder, unless it is there, at one stroke with the settings in it, as several
        processes may start together. SystemExit if it was begun with other settings."""
        if not self.folder.exists():
            new = Path(f"{self.out}.{self.name}.parts")
            os.makedirs(new, exist_ok=True)
            (new / "settings.json").write_text(json.dumps(self.settings))
            try:
                new.rename(self.folder)
            except OSError:  # another process was faster
                shutil.rmtree(new)
        with in_a_sentence(f"{self.folder} is not of this version, move it away"):
            begun = json.loads((self.folder / "settings.json").read_bytes())
        for key, value in self.settings.items():
            if begun.get(key) != value:
                what = f"{self.folder} was begun with {key} {begun.get(key)!r}, not {value!r}"
                raise SystemExit(f"{what}: move it away, or choose another --out")

    def write(self, batch: range, records: list[dict]) -> None:
        self.begin()  # not before: nothing is begun with a --model that does not work
        part = {"batch": [batch.start, batch.stop], "records": records}
        with open(self.folder / f"{self.name}.jsonl", "ab") as stream:
            stream.write(b"\n" + jsonl([part]))  # the first byte ends what a kill cut short

    def scan(self) -> dict[range, tuple[int, Path, int]]:
        """{batch: (failed images, file, offset of its line)} of the copy with fewest failures."""
        found = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            end = 0
            with open(file, "rb") as stream:
                for line in stream:
                    start, end = end, end + len(line)
                    with contextlib.suppress(ValueError):  # a line that a kill cut short
                        part = json.loads(line)
                        failed = sum("error" in record for record in part["records"])
                        batch, copy = range(*part["batch"]), (failed, file, start)
                        found[batch] = min(copy, found.get(batch, copy))
        return found

    def merge(self, batches: list[range], found: dict) -> None:
        """Write FILE.jsonl and .failed, in the folder's order; each appears whole."""
        failed, count, temporary = [], 0, self.folder / f"{self.name}.merged"
        with open(temporary, "wb") as captions:
            for batch in batches:
                _, file, offset = found[batch]
                with open(file, "rb") as part:
                    part.seek(offset)
                    records = json.loads(part.readline())["records"]
                good = [record for record in records if "caption" in record]
                captions.write(jsonl(good))
                count += len(good)
                failed += [record for record in records if "error" in record]
        os.replace(temporary, self.out)
        Path(f"{self.out}.failed").unlink(missing_ok=True)
        if failed:
            temporary.write_bytes(jsonl(failed))
            os.replace(temporary, f"{self.out}.failed")
            print(f"{len(failed)} images failed, listed in {self.out}.failed")
        if not count:
            raise SystemExit(f"none of the images could be described: see {self.out}.failed")
        print(f"{self.out}: {count} captions")


def preview(file: str, data: str, records: list[dict]) -> None:
    """A page that shows the captions beside the images, which are in it."""
    page = ["<!doctype html><meta charset=utf-8><title>Captions</title><table>"]
    for record in records:
        key = record["image"]
        try:
            url, caption = data_url(os.path.join(data, key), 512), record["caption"]
        except Exception as unreadable:  # as a template's image may be; or there is no caption
            print(f"failed: {key!r}: {record.get('error', first_line(unreadable))}")
            continue
        words = f"{html.escape(key)}<p dir=auto>{html.escape(caption)}"
        page.append(f'<tr><td><img src="{url}" width=256><td>{words}')
    if len(page) == 1:
        raise SystemExit("--preview: none of the images could be described")
    Path(file).write_text("\n".join(page), encoding="utf-8", errors="replace")
    print(f"{file}: {len(page) - 1} captions")


def run(parts: Parts, batches: list, mine: list, retry: bool, ask: Callable, quiet: bool) -> None:
    """Describe what is not there of this process's batches; who finds all of them merges them."""
    found = parts.scan()
    todo = [b for b in mine if b not in found or (retry and found[b][0])]
    if todo:
        count, total = collections.Counter(), sum(map(len, mine))
        before = total - sum(map(len, todo))
        with tqdm(total=total, initial=before, unit="image", smoothing=0.05, disable=quiet) as bar:
            source, answers = ask(todo, bar.set_postfix_str)
            start = time.perf_counter()  # the model is loaded
            for batch, records in zip(todo, answers, strict=True):
                parts.write(batch, records)
                count.update("error" if "error" in record else "caption" for record in records)
                bar.set_postfix(failed=count["error"], refresh=False)
                bar.update(len(batch))
        seconds, cut = time.perf_counter() - start, getattr(source, "cut", 0)
        rate = f"in {seconds:.1f} s, {count['caption'] / seconds:.2f} captions/s"
        print(f"this run: {count['caption']} captions ({cut} cut short) {rate}")
        found = parts.scan()
    done = sum(batch in found for batch in batches)
    if done == len(batches):
        parts.merge(batches, found)
    else:
        print(f"{done} of {len(batches)} batches are done; the last process writes {parts.out}")


def main() -> None:
    args = parse_args()
    rank, world = process_rank()
    device = choose_device(args.device, world)
    size = args.batch_size = args.batch_size or (16 if device == "cpu" else 64)
    side = args.max_side or sys.maxsize
    with in_a_sentence(f"--data {args.data}"):
        classes, samples = list_images(args.data)
    if {"train", "val"} <= set(classes):
        raise SystemExit(f"--data {args.data}: did you mean {os.path.join(args.data, 'train')}?")
    keys = [os.path.relpath(path, args.data).replace(os.sep, "/") for path, _ in samples]
    names = name_classes(classes, args.prompt, args.class_names)
    limit = min(args.limit, len(keys))
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    sampling = {"temperature": args.temperature, "top_p": args.top_p}

    def question(key: str, prompt: str) -> tuple[str, str]:
        name = names.get(key.split("/")[0], "")
        return os.path.join(args.data, key), prompt.replace("{class}", name)

    def ask(batches: list[range], tell: Callable, keys: list[str] = keys) -> tuple:
        """Who is asked, and the records of each batch."""
        images, source = [keys[batch.start : batch.stop] for batch in batches], None
        questions = [[question(key, p) for key in some for p in args.prompt] for some in images]
        if args.model == "template":
            answers = ([[text] for _, text in pairs] for pairs in questions)
        elif args.server:
            fields = {"model": args.model, "n": args.num_captions, "seed": args.seed}
            fields |= {"max_tokens": args.max_new_tokens} | sampling | args.extra_body
            if "max_completion_tokens" in fields:  # the newer name: some servers refuse both
                del fields["max_tokens"]
            fields = {name: value for name, value in fields.items() if value is not None}
            key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
            source = Server(args.server, fields, key, side, args.patience, tell)
            answers = ask_server(source, questions, args.concurrency, args.prompt[0])
        else:
            options = {"max_new_tokens": args.max_new_tokens, "num_beams": 1}
            options |= {"num_return_sequences": args.num_captions, "do_sample": False}
            options |= sampling | {"do_sample": True, "top_k": 0} if args.temperature else {}
            loaded = load_model(args.model, device=device, dtype=args.dtype, **hub)
            template = args.extra_body.get("chat_template_kwargs", {})
            source = Describer(*loaded, template, options, size, side)
            source.probe(args.prompt)
            answers = ask_model(source, questions, args.workers, args.seed)
        both = zip(images, answers, strict=True)
        return source, (records_of(some, args.prompt, args.model, found) for some, found in both)

    if args.preview:
        chosen = sorted(random.Random(args.seed).sample(keys[:limit], min(12, limit)))
        _, answers = ask([range(len(chosen))], print, chosen)
        preview(args.preview, args.data, next(answers))
        return
    if not args.server and args.model != "template":  # branches move
        with in_a_sentence(f"--model {args.model}: cannot load it"):
            config = transformers.AutoConfig.from_pretrained(args.model, **hub)
        args.revision = hub["revision"] = getattr(config, "_commit_hash", None) or args.revision
    settings = {name: getattr(args, name) for name in SETTINGS} | {"server": bool(args.server)}
    checksum = zlib.crc32(json.dumps([keys, names]).encode())
    settings["images"] = f"{len(keys)} ({checksum:08x})"
    shard, shards = (int(number) * world for number in args.shard.split("/"))
    parts = Parts(args.out, f"{shard + rank}-of-{shards}", settings)
    batches = [range(start, min(start + size, limit)) for start in range(0, limit, size)]
    run(parts, batches, batches[shard + rank :: shards], args.retry_failed, ask, rank > 0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        stays = "what is complete on the disk stays: start the same command again"
        what = f"{error.filename or 'caption.py'}: {error.strerror or error}; {stays}"
        raise SystemExit(what) from error
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr, flush=True)
        os._exit(1)  # tidying up would take seconds
