"""Describe every image of a folder with a multimodal LLM: stage 1 of 4, before embed.py.

In:  --data DIR         DIR/<class>/<image>, as ImageNet; or DIR/<image>: without labels
Out: --out FILE.jsonl   one JSON object per caption: "image" (path relative to DIR), "caption",
                        "model", "prompt", "settings"; it appears when all captions are there
     FILE.jsonl.failed  the images that could not be described, and why (only if there are any)

Launch:
    python caption.py --data imagenet/train                              # one process
    torchrun --nproc_per_node=8 caption.py --data imagenet/train         # the GPUs of one machine
    python caption.py --data imagenet/train --shard $TASK/64             # task 0..63 of a job array
    python caption.py --data imagenet/train --server http://localhost:8000/v1 --model Qwen/...
    python caption.py --data imagenet/train --import their_captions.pth  # somebody else's captions
    python caption.py --data imagenet/train --preview captions.png       # look at twelve first

Kill it at any moment and run the same line again: it goes on where it stopped. Each process appends
a line per finished batch (always the same images of the folder's order) to a file of its own in
FILE.jsonl.parts/; whoever finds all batches there merges them. So greedy `generate` gives the same
file on any number of processes of the same hardware. The parts stay, for --retry-failed and a
larger --limit. GPT4Image (arXiv 2306.00693), "describe".
"""

import argparse
import base64
import collections
import contextlib
import gc
import io
import json
import os
import random
import re
import textwrap
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import InferenceClient, constants
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"  # small, well known, runs on any GPU
PROMPT = "Describe this image in detail."
SETTINGS = ["model", "revision", "dtype", "prompt", "max_new_tokens", "batch_size"]
SETTINGS += ["num_captions", "temperature", "top_p", "seed", "max_side"]
BLACK = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAD0lEQVR42m"
BLACK += "NgGAWjgHwAAAJAAAHgTR1EAAAAAElFTkSuQmCC"  # 64 x 64 pixels
WAIT, TIMEOUT = 0.5, 300.0  # seconds: before a server is asked again (it doubles), for an answer


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    add = p.add_argument
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(4, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--data", required=True, help="folder of images: DIR/<class>/<image> or DIR/<image>")
    add("--out", default="captions.jsonl", help="where the captions go")
    add("--model", default=MODEL, help="hub id or folder; template: the prompt is the caption")
    add("--prompt", action="append", help=f"may hold {{class}}; repeatable (default: {PROMPT})")
    add("--class-names", help="readable names: JSON {folder: name} or lines 'folder<TAB>name'")
    add("--batch-size", type=int, help="images per generate call (16, on a GPU 64)")
    add("--max-new-tokens", type=int, default=128, help="length limit of a caption")
    add("--num-captions", type=int, default=1, help="sampled captions per image and prompt")
    add("--temperature", type=float, default=0.0, help="0 decodes greedily")
    add("--top-p", type=float, default=1.0, help="of the sampling: only the likeliest tokens")
    add("--seed", type=int, default=0, help="of the sampling and of --preview's choice of images")
    add("-j", "--workers", type=int, default=workers, help="processes that prepare images")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    add("--dtype", default="auto", choices=dtypes, help="of the weights; auto: as they were saved")
    add("--server", metavar="URL", help="ask --model there; its key: OPENAI_API_KEY")
    add("--concurrency", type=int, default=64, help="requests to --server at once, up to 100")
    add("--max-side", type=int, default=1024, help="larger images go to --server at this size")
    add("--revision", default="main", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    add("--limit", type=int, help="describe only the first N images of the folder's order")
    add("--retry-failed", action="store_true", help="do the batches again in which images failed")
    add("--shard", default="0/1", help="I/N: part I (from 0) of N; torchrun splits a part further")
    add("--import", dest="published", metavar="FILE", help="somebody's .pth, .txt, .json, .jsonl")
    add("--preview", metavar="PNG", help="draw twelve random images with captions, and stop")
    args = p.parse_args()
    args.prompt = args.prompt or [PROMPT]
    args.rank, args.world = process_rank()
    args.device = choose_device(args.device, args.world)
    args.batch_size = args.batch_size or (16 if args.device == "cpu" else 64)
    check(p, args)
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
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {str(error).splitlines()[0]}") from error
    return str(device)


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if unknown := set(re.findall(r"{\w*}", " ".join(args.prompt))) - {"{class}"}:
        p.error(f"--prompt: {unknown} is not known, only {{class}} is")
    counts = args.batch_size, args.max_new_tokens, args.num_captions, args.workers + 1
    counts += args.concurrency, args.max_side, 1 if args.limit is None else args.limit
    if min(counts) < 1 or args.concurrency > 100:
        p.error("numbers of images, tokens, requests (up to 100), pixels start at 1, -j at 0")
    if args.model == "template" and args.prompt == [PROMPT]:
        p.error('--model template needs a --prompt, "a photo of a {class}" for one')
    if args.num_captions > 1 and args.temperature == 0:
        p.error("--num-captions above 1 needs --temperature above 0: greedy ones are all the same")
    if not re.match("https?://", args.server or "http://"):
        p.error(f"--server {args.server}: an address begins with http:// or https://")
    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not part or int(part[1]) >= int(part[2]):
        p.error(f"--shard {args.shard}: expected I/N with 0 <= I < N")
    args.shard = int(part[1]) * args.world + args.rank
    args.shards = int(part[2]) * args.world


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


def list_keys(data: str) -> list[str]:
    """Keys (POSIX paths relative to `data`) of all images, in order."""
    try:
        classes, samples = list_images(data)
    except OSError as error:
        raise SystemExit(f"--data {data}: {error}") from error
    if {"train", "val"} <= set(classes):
        raise SystemExit(f"--data {data}: did you mean {os.path.join(data, 'train')}?")
    return [os.path.relpath(path, data).replace(os.sep, "/") for path, _ in samples]


def name_classes(args: argparse.Namespace, keys: list[str]) -> dict[str, str]:
    """{class folder: name} of --class-names (the first of synonyms), of ImageNet or the folder."""
    if not any("{class}" in prompt for prompt in args.prompt):
        return {}
    if "/" not in keys[0]:
        raise SystemExit("{class}: the images of --data are not in class folders")
    folders = sorted({key.split("/")[0] for key in keys})
    if args.class_names:
        try:
            text = Path(args.class_names).read_text(encoding="utf-8")
            lines = [line.split("\t", 1) for line in text.splitlines()]
            names = dict(json.loads(text) if args.class_names.endswith(".json") else lines)
            if missing := set(folders) - set(names):
                raise ValueError(f"no name for {len(missing)} class folders, as {min(missing)}")
            return {folder: names[folder].split(",")[0].strip() for folder in folders}
        except (OSError, ValueError, TypeError) as error:
            raise SystemExit(f"--class-names {args.class_names}: {first_line(error)}") from error
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return {folder: folder.replace("_", " ") for folder in folders}
    if len(folders) != 1000:
        raise SystemExit("{class}: only all 1000 ImageNet folders have names: pass --class-names")
    return dict(zip(folders, ResNet50_Weights.DEFAULT.meta["categories"], strict=True))


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


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def load(kind: type, args: argparse.Namespace, **options):
    options |= {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    try:
        return kind.from_pretrained(args.model, **options)
    except (ImportError, OSError, ValueError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"--model {args.model}: cannot load it: {first_line(error)}") from error


class Describer:
    """A model with a chat template (LLaVA, Qwen-VL, ...), or with a plain prompt (BLIP-2, ...)."""

    def __init__(self, args: argparse.Namespace, keys: list[str], names: dict[str, str]):
        self.args, self.keys, self.names = args, keys, names
        self.seconds = self.new_tokens = self.cut = self.image_bytes = 0
        self.options = {"max_new_tokens": args.max_new_tokens, "num_beams": 1}
        self.options |= {"num_return_sequences": args.num_captions, "do_sample": False}
        if args.temperature:
            sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
            self.options |= sampling | {"do_sample": True}
        self.model = load(transformers.AutoModelForImageTextToText, args, dtype=args.dtype).eval()
        self.dtype = self.model.to(args.device).dtype
        self.processor = load(transformers.AutoProcessor, args)
        self.tokenizer = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or self.model.config.model_type == "git":
            raise SystemExit(f"--model {args.model} takes no prompt")
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # no token types
        self.tokenizer.padding_side = "left"  # new tokens must follow the prompt directly
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.probe()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"model": None, "bar": None}  # spawned workers need no weights

    def probe(self) -> None:
        """Caption two grey images: what cannot be done shows now, not as a million failures."""
        images = [Image.new("RGB", size, "grey") for size in ((300, 200), (1024, 768))]
        image_token = getattr(self.model.config, "image_token_id", None)
        name = f"--model {self.args.model}"
        for prompt in self.args.prompt:
            try:
                inputs = self.encode(images, prompt)
                self.generate(inputs, max_new_tokens=2)
            except Exception as error:
                raise SystemExit(f"{name} cannot take {prompt!r}: {first_line(error)}") from error
            if image_token is not None and image_token not in inputs["input_ids"]:
                raise SystemExit(f"{name}: its processor puts no image into the prompt")
            self.image_bytes += sum(x.nbytes for x in inputs.values()) // len(images)

    def encode(self, images: list[Image.Image], prompt: str) -> dict:
        """The model's inputs, left-padded, in its dtype, for images that share a prompt."""
        if getattr(self.processor, "chat_template", None):
            text = {"type": "text", "text": prompt}
            contents = [[{"type": "image", "image": image}, text] for image in images]
            chats = [[{"role": "user", "content": content}] for content in contents]
            options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            options |= {"add_generation_prompt": True, "processor_kwargs": {"padding": True}}
            inputs = self.processor.apply_chat_template(chats, **options)
        else:
            text = [prompt] * len(images)
            inputs = self.processor(images=images, text=text, return_tensors="pt")
        return dict(transformers.BatchFeature(inputs).to(self.dtype))

    @torch.inference_mode()
    def generate(self, inputs: dict, **changes) -> list[str]:
        """`--num-captions` captions of each row of `inputs`, rows in order."""
        args, model, start = self.args, self.model, time.perf_counter()
        inputs = transformers.BatchFeature(inputs).to(args.device, non_blocking=True)
        prompt = inputs["input_ids"].repeat_interleave(args.num_captions, 0)  # BLIP changes it
        tokens = model.generate(**inputs, **(self.options | changes))
        for cut in (prompt.shape[1], prompt.shape[1] - 1):  # BLIP's output lacks its last token
            if cut > 1 and torch.equal(tokens[:, 1:cut], prompt[:, 1:cut]):
                tokens = tokens[:, cut:]
                break
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        special = torch.isin(tokens, tokens.new_tensor(self.tokenizer.all_special_ids))
        self.new_tokens += int((~special).sum())
        self.cut += int((~special[:, -1]).sum())  # without an end, and what fills up the row
        self.seconds += time.perf_counter() - start
        return [" ".join(text.split()) for text in texts]

    def answers(self, todo: list[range]) -> Iterator[dict[tuple[int, str], list[str] | str]]:
        """describe() of each batch. What waits for the model takes at most about 4 GB."""
        args, room = self.args, int(4e9 // (self.image_bytes * self.args.batch_size))
        workers = min(args.workers, max(1, room))
        options = {"num_workers": workers, "pin_memory": args.device.startswith("cuda")}
        options |= {"prefetch_factor": min(2, room // workers) or 1} if workers else {}
        options |= {"batch_sampler": todo, "collate_fn": self.read}
        gc.freeze()  # else each worker's first full collection copies what it shares with us
        self.seconds = self.new_tokens = self.cut = 0
        loader = DataLoader(range(len(self.keys)), **options)
        for batch, requests in zip(todo, loader, strict=True):
            # sampling is the same whoever does this batch
            torch.manual_seed(args.seed * 1_000_003 + batch.start // args.batch_size)
            yield self.describe(requests)

    def read(self, batch: Iterable[int], prompts: Iterable[str] = ()) -> list:
        """[(prompt, images, model inputs or why there are none)]; in a DataLoader's worker."""
        images, requests, prompts = {}, [], prompts or self.args.prompt
        for i in batch:
            try:
                images[i] = load_image(os.path.join(self.args.data, self.keys[i]))
            except Exception as error:  # whatever a decoder raises, it costs this image only
                requests += [(prompt, [i], first_line(error)) for prompt in prompts]
        for prompt in prompts:
            groups = collections.defaultdict(list)  # the model is given one text at a time
            for i in images:
                groups[in_words(prompt, self.keys[i], self.names)].append(i)
            for text, group in groups.items():
                try:
                    inputs = self.encode([images[i] for i in group], text)
                except Exception as error:  # one of them is too odd (1 x 4000 pixels, say)
                    inputs = first_line(error)
                requests.append((prompt, group, inputs))
        return requests

    def describe(self, requests: list) -> dict[tuple[int, str], list[str] | str]:
        """{(image, prompt): captions, or why there are none}. What does not fit into memory, or
        holds an image that the model cannot take, is halved until that image is alone."""
        found, each = {}, self.args.num_captions
        for prompt, group, inputs in requests:
            texts = inputs
            if not isinstance(inputs, str):
                try:
                    texts = self.generate(inputs)
                except (torch.OutOfMemoryError, ValueError, IndexError) as error:
                    texts = first_line(error)
            if not isinstance(texts, str):
                found |= {(i, prompt): texts[k * each :][:each] for k, i in enumerate(group)}
            elif len(group) == 1:
                found[group[0], prompt] = texts
            else:
                torch.cuda.empty_cache()
                for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                    found |= self.describe(self.read(half, [prompt]))
        return found


class Server:
    """Any model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, hosted ones), with
    Describer's answers(): `--concurrency` images are under way, of several batches."""

    def __init__(self, args: argparse.Namespace, keys: list[str], names: dict[str, str]):
        self.args, self.keys, self.names, self.bar = args, keys, names, tqdm(disable=True)
        self.pool, self.stopped = ThreadPoolExecutor(args.concurrency), threading.Event()
        self.lock, self.seconds, self.new_tokens, self.cut = threading.Lock(), 0, 0, 0
        self.options = {k: getattr(args, k) for k in ("model", "temperature", "top_p", "seed")}
        self.options |= {"max_tokens": args.max_new_tokens, "n": args.num_captions}
        constants.HF_HUB_OFFLINE = False  # it is not the hub that is asked
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"  # not the hub's
        self.client = InferenceClient(base_url=args.server, api_key=self.key, timeout=TIMEOUT)
        answer = self.ask(-1, args.prompt[0], attempts=3)
        if isinstance(answer, str) or len(answer) != args.num_captions:
            raise SystemExit(f"--server {args.server}, for {args.num_captions} captions: {answer}")

    def answers(self, todo: list[range]) -> Iterator[dict[tuple[int, str], list[str] | str]]:
        """{(image, prompt): captions, or why there are none} of each batch, in order."""
        self.seconds = self.new_tokens = self.cut = 0  # without the first question
        waiting, ahead = collections.deque(), 2 * self.args.concurrency // self.args.batch_size + 2
        try:
            for batch in todo:
                pairs = [(i, prompt) for i in batch for prompt in self.args.prompt]
                waiting.append({pair: self.pool.submit(self.ask, *pair) for pair in pairs})
                while len(waiting) > ahead or (waiting and batch == todo[-1]):
                    yield {pair: done.result() for pair, done in waiting.popleft().items()}
        finally:
            self.stopped.set()
            self.pool.shutdown(cancel_futures=True)

    def ask(self, i: int, prompt: str, attempts: int = 10**9) -> list[str] | str:
        """Captions of image i (-1: a black one), or why there are none. A server that is busy or
        away is asked again, ever later; one that answers 500 to this image, eight times."""
        key = self.keys[i] if i >= 0 else ""
        try:
            url = data_url(self.args.data, key, self.args.max_side) if key else BLACK
        except Exception as error:  # whatever a decoder raises, it costs this image only
            return first_line(error)
        text = {"type": "text", "text": in_words(prompt, key, self.names)}
        image = {"type": "image_url", "image_url": {"url": url}}
        chat = [{"role": "user", "content": [image, text]}]
        status, attempt, start = 0, 0, time.perf_counter()
        while status not in (400, 413, 415, 422) and attempt < (8 if status == 500 else attempts):
            try:
                answer = self.client.chat_completion(chat, **self.options)
                with self.lock:
                    self.seconds += (time.perf_counter() - start) / self.args.concurrency
                    self.new_tokens += getattr(answer.usage, "completion_tokens", 0) or 0
                    self.cut += sum(one.finish_reason == "length" for one in answer.choices)
                return [" ".join((one.message.content or "").split()) for one in answer.choices]
            except Exception as error:  # each HTTP library has its own
                status, words, after = refusal(error)
            words, attempt = " ".join(words.split()).replace(self.key, "***")[:300], attempt + 1
            if status in (401, 403, 404):
                raise SystemExit(f"--server {self.args.server}: {words}")
            pause = max(after, min(60, WAIT * 2 ** min(attempt, 7)) * random.uniform(0.5, 1))
            self.bar.set_postfix_str(f"asking again in {pause:.0f} s: {words}")
            if self.stopped.wait(pause):
                raise SystemExit("interrupted")
        return words


def refusal(error: Exception) -> tuple[int, str, int]:
    """Status (0: no answer), words, and the seconds that the server wants to be left alone."""
    responses = [getattr(e, "response", None) for e in (error, error.__context__)]
    response = responses[0] or responses[1]  # the second: where the client stumbled over it
    if response is None:
        return 0, f"no answer, {first_line(error)}", 0
    after = re.match(r"\d{0,4}", response.headers.get("retry-after", ""))[0]  # not a date
    return response.status_code, f"{response.status_code} {response.text}", int(after or 0)


def data_url(folder: str, key: str, side: int) -> str:
    """A file as it is, if upright, of a common kind and no larger than `side`; else a JPEG."""
    path = os.path.join(folder, key)
    with Image.open(path) as file:
        kind, upright = file.format, orientation(file) == 1
        common = kind in ("JPEG", "PNG", "WEBP") and file.mode in ("RGB", "L")
        common &= upright and max(file.size) <= side and "transparency" not in file.info
    stream = io.BytesIO(Path(path).read_bytes() if common else b"")
    if not common:
        image, kind = load_image(path), "JPEG"
        image.thumbnail((side, side))
        image.save(stream, kind, quality=95)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def in_words(prompt: str, key: str, names: dict[str, str]) -> str:
    return prompt.replace("{class}", names.get(key.split("/")[0], ""))


def records_of(source, batch: range, settings: str, found: dict) -> list[dict]:
    """What is to be written of a batch: for each image all its captions, or one error."""
    records = []
    for i in batch:
        image, results = source.keys[i], {p: found[i, p] for p in source.args.prompt}
        errors = [result for result in results.values() if isinstance(result, str)]
        if errors:
            records.append({"image": image, "error": errors[0]})
            continue
        for prompt, captions in results.items():
            more = {"model": source.args.model, "prompt": prompt, "settings": settings}
            records += [{"image": image, "caption": text} | more for text in captions]
    return records


def jsonl(records: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def scan(out: str, settings: str) -> dict[range, tuple[int, str, int]]:
    """{batch: (failed images, file, offset of its line)} of the copy with the fewest failures."""
    found = {}
    for file in sorted(Path(f"{out}.parts").glob("*.jsonl")):
        end = 0
        with open(file, "rb") as stream:
            for line in stream:
                start, end = end, end + len(line)
                with contextlib.suppress(ValueError):  # a line that a kill cut short is no JSON
                    part = json.loads(line)
                    if (begun := part["settings"]) != settings:
                        what = f"was begun with settings {begun}, not {settings}: move it away"
                        raise SystemExit(f"{file} {what}")
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
        if file.endswith(".jsonl"):  # our own
            lines = [json.loads(line) for line in text.split("\n") if line]
            return [(line["image"], line["caption"]) for line in lines]
        if file.endswith(".json"):  # of COCO, Flickr30k, RSICD: Karpathy's splits
            images = json.loads(text)["images"]
            pairs = [(image["filename"], image["sentences"]) for image in images]
            rows = [(name, one["raw"].strip()) for name, several in pairs for one in several]
            return list(dict.fromkeys(rows))  # people repeat themselves
    except Exception as error:  # a pickle may raise anything; weights_only runs no code of it
        raise SystemExit(f"--import {file}: cannot be read safely: {first_line(error)}") from error
    return [(None, line) for line in text.removesuffix("\n").split("\n")]


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


def preview(source, file: str) -> None:
    """Draw the source's images with their captions beside them, wrapped and never cut."""
    keys, found, shown = source.keys, next(source.answers([range(len(source.keys))])), []
    for i, prompt in sorted(found):
        if isinstance(found[i, prompt], str):
            print(f"failed: {keys[i]!r}: {found[i, prompt]}")
        else:
            shown += [(keys[i], f"{keys[i]}: {caption}") for caption in found[i, prompt]]
    texts = [textwrap.fill(text.encode("utf-8", "replace").decode(), 90) for _, text in shown]
    if not shown:
        raise SystemExit("--preview: none of the images could be described")
    side = max(256, *(18 * (text.count("\n") + 1) for text in texts))
    sheet, font = Image.new("RGB", (960, side * len(texts)), "white"), ImageFont.load_default(13)
    for row, text in enumerate(texts):
        image = load_image(os.path.join(source.args.data, shown[row][0]))
        sheet.paste(ImageOps.pad(image, (248, 248), color="white"), (4, side * row + 4))
        ImageDraw.Draw(sheet).multiline_text((260, side * row), text, fill="black", font=font)
    sheet.save(file, "PNG")
    print(f"{file}: {len(texts)} captions")


def write_without_model(args: argparse.Namespace, keys: list[str], names: dict[str, str]) -> None:
    """Captions that need no model: somebody's, or the prompt itself with the class's name in it."""
    if args.published:
        source = f"import:{os.path.basename(args.published)}", ""
        pairs = match(args.published, read_published(args.published), keys)
        kept = set(keys[: args.limit])
        rows = [(key, " ".join(caption.split()), *source) for key, caption in pairs if key in kept]
    else:
        pairs = [(key, prompt) for key in keys[: args.limit] for prompt in args.prompt]
        rows = [(key, in_words(prompt, key, names), "template", prompt) for key, prompt in pairs]
    fields, temporary = ("image", "caption", "model", "prompt"), f"{args.out}.tmp-{os.getpid()}"
    content = jsonl(dict(zip(fields, row, strict=True)) for row in rows)
    if os.path.exists(args.out) and Path(args.out).read_bytes() != content:
        raise SystemExit(f"{args.out} holds other captions: choose another --out, or move it away")
    Path(temporary).write_bytes(content)
    os.replace(temporary, args.out)
    print(summary(args.out))


def describe_batches(source, todo: list[range], settings: str, before: int) -> None:
    """Append a line for each batch of `todo`; this process has `before` images behind it."""
    args, captions, failed = source.args, 0, 0
    own = f"{args.out}.parts/{args.shard}-of-{args.shards}.jsonl"
    os.makedirs(os.path.dirname(own), exist_ok=True)
    total, quiet = before + sum(map(len, todo)), os.environ.get("RANK", "0") != "0"
    bar = tqdm(total=total, initial=before, unit="image", smoothing=0.05, disable=quiet)
    source.bar, start = bar, time.perf_counter()
    with bar, contextlib.closing(source.answers(todo)) as answers:
        for batch, found in zip(todo, answers, strict=True):
            records = records_of(source, batch, settings, found)
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
    rates = f"{captions / seconds:.2f} captions/s, {source.new_tokens / seconds:.0f} new tokens/s"
    rates += f", {source.seconds / seconds:.0%} of the time inside generate"
    print(f"this run: {captions} captions ({source.cut} cut short) in {seconds:.1f} s, {rates}")


def run(args: argparse.Namespace, keys: list[str], names: dict[str, str]) -> None:
    """Describe what is not on the disk; the process that finds all batches there merges them."""
    if not args.server:  # --revision becomes a commit, since branches move
        config = load(transformers.AutoConfig, args)
        args.revision = getattr(config, "_commit_hash", None) or args.revision
    settings = {name: getattr(args, name) for name in SETTINGS} | {"server": bool(args.server)}
    checksum = zlib.crc32(json.dumps([keys, names]).encode())
    settings = json.dumps(settings | {"images": f"{len(keys)} ({checksum:08x})"})
    if os.path.exists(args.out) and not os.path.isdir(f"{args.out}.parts"):
        raise SystemExit(f"{args.out} is there, its parts are not: choose another --out")
    starts = range(0, args.limit, args.batch_size)
    batches = [range(start, min(start + args.batch_size, args.limit)) for start in starts]
    mine, found = batches[args.shard :: args.shards], scan(args.out, settings)
    todo = [b for b in mine if b not in found or (args.retry_failed and found[b][0])]
    if todo:
        before = sum(map(len, mine)) - sum(map(len, todo))
        source = (Server if args.server else Describer)(args, keys, names)
        describe_batches(source, todo, settings, before)
    found = scan(args.out, settings)
    done = sum(batch in found for batch in batches)
    if done == len(batches):
        merge(args, batches, found)
    else:
        print(f"{done} of {len(batches)} batches are done; the last process writes {args.out}")


def main() -> None:
    args = parse_args()
    keys = list_keys(args.data)
    names = name_classes(args, keys)
    args.limit = min(args.limit or len(keys), len(keys))
    if args.preview:
        keys = random.Random(args.seed).sample(keys[: args.limit], min(12, args.limit))
        preview((Server if args.server else Describer)(args, sorted(keys), names), args.preview)
    elif args.published or args.model == "template":
        write_without_model(args, keys, names)
    else:
        run(args, keys, names)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{error.filename or 'caption.py'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on") from None
