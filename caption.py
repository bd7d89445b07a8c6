"""Describe every image of a folder with a multimodal LLM: stage 1 of 4 (caption -> embed -> train -> evaluate).

In:  --data DIR         an ImageNet-style folder, DIR/<class>/<image>
Out: --out FILE.jsonl   one JSON object per caption: "image" (path relative to DIR), "caption", "model", "prompt", "settings"
     FILE.jsonl.failed  the images that could not be described, and why (only if there are any)

Launch:
    python caption.py --data imagenet/train                              # one process
    torchrun --nproc_per_node=8 caption.py --data imagenet/train         # the GPUs of one machine
    python caption.py --data imagenet/train --shard $TASK/64             # task 0..63 of a cluster's job array
    python caption.py --data imagenet/train --model template --prompt "a photo of a {class}"     # control: no MLLM
    python caption.py --data imagenet/train --import their_captions.pth  # captions that somebody published
    python caption.py --data imagenet/train --preview captions.png       # look at twelve captions before paying for all

Kill it at any moment and run the same line again: it goes on where it stopped. The unit of work is a batch, always the
same images of the folder's order; whoever generates it (any number of processes on the same hardware, restarted any number
of times), greedy decoding gives the same file. While several processes run, each appends to FILE.jsonl.part-I-of-N; an image that fails
is a line with "error" until all is done. From GPT4Image (arXiv 2306.00693), section "describe"; the file's contract is in the README.
"""

import argparse
import collections
import contextlib
import ctypes
import csv
import filecmp
import glob
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import textwrap
import time
import zlib

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
)

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"  # small, well known, runs on any GPU (and, slowly, on a laptop)
DEFAULT_PROMPT = "Describe this image in detail."
UNLABELED = "_unlabeled"  # train.py's folder of images without a class


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", required=True, help="ImageNet-style folder: DIR/<class>/<image>")
    p.add_argument("--out", default="captions.jsonl", help="default: captions.jsonl")
    p.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"hub id or folder of an image-text-to-text model, or 'template' (the prompt is the caption); default: {DEFAULT_MODEL}",
    )
    p.add_argument(
        "--prompt",
        action="append",
        help=f"'{{class}}' becomes the class's name; '' for captioners that take no text; repeat it for several captions per image; default: {DEFAULT_PROMPT}",
    )
    p.add_argument(
        "--class-names", help="readable class names: JSON {folder: name} or lines 'folder<TAB>name'"
    )
    p.add_argument(
        "--batch-size", type=int, default=16, help="images per generate call; default: 16"
    )
    p.add_argument(
        "--max-new-tokens", type=int, default=128, help="length limit of a caption; default: 128"
    )
    p.add_argument(
        "--num-captions",
        type=int,
        default=1,
        help="sampled captions per image and prompt; default: 1",
    )
    p.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily; default: 0")
    p.add_argument(
        "--top-p", type=float, default=1.0, help="nucleus sampling, with --temperature; default: 1"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the sampling and of --preview's choice of images; default: 0",
    )
    p.add_argument(
        "-j",
        "--workers",
        type=int,
        default=max(1, min(4, (os.cpu_count() or 1) - 1)),
        help="processes, for each GPU, that prepare images ahead of the model; default: CPU cores - 1, at most 4",
    )
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:N or cpu; default: cuda if there is one",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: as they were saved; default: auto",
    )
    p.add_argument(
        "--revision", default="main", help="branch, tag or commit of a hub model; default: main"
    )
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model: only if you have read it",
    )
    p.add_argument(
        "--limit", type=int, help="describe only the first N images of the folder's order"
    )
    p.add_argument(
        "--retry-failed",
        action="store_true",
        help="do the batches again in which images failed (after you repaired them)",
    )
    p.add_argument(
        "--shard",
        default="0/1",
        help="I/N: caption part I (from 0) of N; the part that finishes last writes --out; torchrun splits a part further",
    )
    p.add_argument(
        "--import",
        dest="import_file",
        metavar="FILE",
        help="captions that exist: .pth or .txt in the folder's order, or .csv with a path and a caption column",
    )
    p.add_argument(
        "--preview",
        metavar="PNG",
        help="caption twelve random images, draw them on one sheet, and stop",
    )
    args = p.parse_args()
    args.prompt = args.prompt or [DEFAULT_PROMPT]
    shard, _, shards = args.shard.partition("/")
    unknown = [
        name for prompt in args.prompt for name in re.findall(r"{\w*}", prompt) if name != "{class}"
    ]
    for wrong, sentence in (
        (
            args.preview and not args.preview.endswith((".png", ".jpg")),
            "--preview takes a .png or .jpg file",
        ),
        (
            args.preview and not os.path.isdir(os.path.dirname(args.preview) or "."),
            f"--preview {args.preview}: its folder does not exist",
        ),
        (
            args.import_file and (args.limit or args.shard != "0/1"),
            "--import takes the whole folder at once: leave out --limit and --shard",
        ),
        (
            args.import_file and not args.import_file.endswith((".pth", ".pt", ".txt", ".csv")),
            "--import takes a .pth, .txt or .csv file",
        ),
        (
            args.temperature < 0 or not 0 < args.top_p <= 1,
            "--temperature starts at 0, --top-p lies between 0 and 1",
        ),
        (
            args.device.startswith("cuda") and not torch.cuda.is_available(),
            "--device cuda: this machine has no GPU that torch can use",
        ),
        (
            args.model.startswith((".", "/")) and not os.path.isdir(args.model),
            f"--model {args.model}: there is no such folder",
        ),
        (
            not os.path.isdir(os.path.dirname(args.out) or "."),
            f"--out {args.out}: its folder does not exist",
        ),
        (unknown, f"--prompt: {unknown[:1]} is not known, only {{class}} is"),
        (
            args.num_captions > 1 and args.temperature <= 0,
            "--num-captions above 1 needs --temperature above 0: greedy decoding gives the same caption every time",
        ),
        (
            min(
                args.batch_size,
                args.max_new_tokens,
                args.num_captions,
                args.limit or 1,
                args.workers + 1,
            )
            < 1
            or args.limit == 0,
            "--batch-size, --max-new-tokens, --num-captions and --limit start at 1, -j at 0",
        ),
        (
            not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)),
            f"--shard {args.shard}: expected I/N with 0 <= I < N",
        ),
    ):
        if wrong:
            p.error(sentence)
    rank, world = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
    )  # of torchrun, if each task of an array uses it
    args.shard, args.shards, args.lead = int(shard) * world + rank, int(shards) * world, rank == 0
    if args.shards > 1 and (args.retry_failed or args.preview):
        p.error("--retry-failed and --preview run in one process")
    if args.preview and (args.import_file or args.model == "template"):
        p.error("--preview shows what a model says: leave out --import and --model template")
    return args


# ------------------------------------------------------------------------------------------ images and class names


def list_images(data: str) -> list[str]:
    """Keys (POSIX paths relative to `data`) of all images, in torchvision's ImageFolder order."""
    try:
        folder = ImageFolder(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SystemExit(f"--data {data}: {error}")
    if {"train", "val"} <= set(folder.classes):
        raise SystemExit(
            f"--data {data} holds train/ and val/, not class folders: did you mean {os.path.join(data, 'train')}?"
        )
    return [os.path.relpath(path, data).replace(os.sep, "/") for path, _ in folder.samples]


def read_class_names(file: str | None, folders: list[str]) -> dict[str, str]:
    """{class folder: readable name}, from --class-names, else ImageNet's own names, else the folders' names."""
    if file is None:
        imagenet = len(folders) == 1000 and all(
            re.fullmatch(r"n\d{8}", folder) for folder in folders
        )
        return dict(
            zip(
                folders,
                ResNet50_Weights.DEFAULT.meta["categories"]
                if imagenet
                else [folder.replace("_", " ") for folder in folders],
            )
        )
    try:
        text = open(file, encoding="utf-8").read()
        names = (
            json.loads(text)
            if file.endswith(".json")
            else dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"--class-names {file}: {error}")
    if missing := [folder for folder in folders if folder not in names]:
        raise SystemExit(
            f"--class-names {file} has no name for {len(missing)} class folder(s), the first is '{missing[0]}'"
        )
    return {
        folder: str(names[folder]).split(",")[0].strip() for folder in folders
    }  # "goldfish, Carassius auratus" -> "goldfish"


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
        self.args, source = (
            args,
            dict(revision=args.revision, trust_remote_code=args.trust_remote_code),
        )
        try:
            self.processor = AutoProcessor.from_pretrained(args.model, **source)
            self.takes_text = hasattr(self.processor, "tokenizer")
            self.tokenizer = (
                self.processor.tokenizer
                if self.takes_text
                else AutoTokenizer.from_pretrained(args.model, **source)
            )
            if not self.takes_text:
                self.processor = AutoImageProcessor.from_pretrained(args.model, **source)
            self.model = (
                AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype, **source)
                .to(args.device)
                .eval()
            )
        except (
            ImportError,
            OSError,
            ValueError,
            torch.OutOfMemoryError,
        ) as error:  # some kinds need one more package, and say so
            raise SystemExit(f"--model {args.model}: cannot load it: {first_line(error)}")
        self.chat = bool(getattr(self.processor, "chat_template", None))
        self.tokenizer.padding_side = "left"  # new tokens must follow the prompt directly
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        if not self.takes_text and any(args.prompt):
            raise SystemExit(f"--model {args.model} takes no text: pass --prompt ''")
        try:  # a prompt that this model does not understand shows here, not after a million failed images
            for prompt in args.prompt:
                self.encode(
                    [Image.new("RGB", (224, 224)), Image.new("RGB", (300, 200))],
                    [prompt.replace("{class}", "thing"), prompt],
                )
        except Exception as error:
            raise SystemExit(
                f"--model {args.model} cannot take --prompt {prompt!r}: {first_line(error)}"
            )

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "model": None
        }  # workers that are spawned, not forked, need no weights

    def encode(self, images: list[Image.Image], prompts: list[str]) -> list[tuple[list[int], dict]]:
        """[(positions, model inputs)]: the whole batch, left-padded; or, without a chat template, one group per prompt (some of
        the older models count positions through the padding, so they never see any; InstructBLIP has two tokenizers, so two lengths)."""
        if self.chat:
            chats = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": image},
                            {"type": "text", "text": prompt},
                        ],
                    }
                ]
                for image, prompt in zip(images, prompts)
            ]
            inputs = self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            return [(list(range(len(images))), dict(inputs))]
        encoded = []
        for prompt in dict.fromkeys(prompts):
            positions = [i for i, own in enumerate(prompts) if own == prompt]
            # a processor with an image token (BLIP-2, Florence-2) puts the image into the text: there must be one, if an empty one
            text = (
                {"text": [prompt] * len(positions)}
                if prompt or hasattr(self.processor, "image_token")
                else {}
            )
            encoded.append(
                (
                    positions,
                    dict(
                        self.processor(
                            images=[images[i] for i in positions], return_tensors="pt", **text
                        )
                    ),
                )
            )
        return encoded

    @torch.inference_mode()
    def generate(self, inputs: dict) -> tuple[list[str], int]:
        """Captions, `--num-captions` for each row of `inputs`, rows in order; and the number of new tokens."""
        args, model = self.args, self.model
        inputs = {
            name: value.to(
                args.device, model.dtype if value.is_floating_point() else None, non_blocking=True
            )
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        if "token_type_ids" not in inspect.signature(model.forward).parameters:
            inputs.pop("token_type_ids", None)
        prompt = (
            inputs["input_ids"].clone() if "input_ids" in inputs else None
        )  # BLIP writes into its input_ids
        if prompt is not None:
            image_token = getattr(model.config, "image_token_id", None)
            if image_token is not None and not (prompt == image_token).any(1).all():
                raise SystemExit(
                    f"--model {args.model}: its processor puts no image into the prompt, the captions would be made up"
                )
            ends = torch.tensor(
                [
                    i
                    for i in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
                    if i is not None
                ],
                device=prompt.device,
            )
            # GIT's tokenizer closes the prompt, and nothing would follow; models with a generate of their own take care of that themselves
            if (
                type(model).generate is GenerationMixin.generate
                and not model.config.is_encoder_decoder
                and torch.isin(prompt[:, -1], ends).all()
            ):
                inputs = {
                    name: value[:, :-1] if value.shape == prompt.shape else value
                    for name, value in inputs.items()
                }
                prompt = prompt[:, :-1]
        how = (
            dict(do_sample=False)
            if args.temperature <= 0
            else dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0)
        )
        tokens = model.generate(
            **inputs,
            **how,
            num_beams=1,
            max_new_tokens=args.max_new_tokens,
            num_return_sequences=args.num_captions,
        )
        if (
            prompt is not None
        ):  # decoders return the prompt too, encoder-decoders do not, BLIP returns it without its last token
            prompt = prompt.repeat_interleave(args.num_captions, 0)
            for cut in (prompt.shape[1], prompt.shape[1] - 1):
                if cut > 1 and torch.equal(tokens[:, 1:cut], prompt[:, 1:cut]):
                    tokens = tokens[:, cut:]
                    break
        special = torch.tensor(self.tokenizer.all_special_ids, device=tokens.device)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts], int((~torch.isin(tokens, special)).sum())


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def images_of(batch: int, batch_size: int, limit: int) -> range:
    """Indices, in the folder's order, of a batch's images."""
    return range(batch * batch_size, min((batch + 1) * batch_size, limit))


class Batches(Dataset):
    """Item i is batch `todo[i]`, read and preprocessed in a DataLoader worker: (batch, {image index: error}, requests)."""

    def __init__(
        self,
        args: argparse.Namespace,
        keys: list[str],
        todo: list[int],
        describer: Describer,
        names: dict[str, str],
    ):
        self.args, self.keys, self.todo, self.describer, self.names = (
            args,
            keys,
            todo,
            describer,
            names,
        )

    def __len__(self) -> int:
        return len(self.todo)

    def encode(self, images: dict[int, Image.Image]) -> list[tuple[int, list[int], dict]]:
        """[(prompt's number, image indices, model inputs)] for all prompts."""
        indices, requests = list(images), []
        for number, prompt in enumerate(self.args.prompt if images else []):
            prompts = [
                prompt.replace("{class}", self.names.get(self.keys[i].split("/")[0], ""))
                for i in indices
            ]
            requests += [
                (number, [indices[p] for p in positions], inputs)
                for positions, inputs in self.describer.encode(list(images.values()), prompts)
            ]
        return requests

    def read(self, indices: list[int]) -> tuple[dict[int, str], list]:
        images, errors = {}, {}
        for i in indices:
            try:
                images[i] = load_image(os.path.join(self.args.data, self.keys[i]))
            except Exception as error:  # whatever a decoder raises, it costs this image only
                errors[i] = first_line(error)
        try:
            return errors, self.encode(images)
        except Exception as error:  # one of them is too odd for the processor (1 x 4000 pixels, say): describe() finds out which
            return errors, [
                (number, list(images), first_line(error)) for number in range(len(self.args.prompt))
            ]

    def __getitem__(self, item: int):
        return self.todo[item], *self.read(
            list(images_of(self.todo[item], self.args.batch_size, len(self.keys)))
        )

    def describe(
        self,
        requests: list,
        captions: dict[tuple[int, int], list[str]],
        errors: dict[int, str],
        timer: collections.Counter,
    ) -> None:
        """Fill captions[image index, prompt's number]; a batch that does not fit into memory, or holds an image that the model cannot
        take (`inputs` is the sentence that says so), is halved and tried again, until that image is alone in `errors`."""
        for number, indices, inputs in requests:
            start, problem = time.perf_counter(), inputs if isinstance(inputs, str) else None
            try:
                texts, new_tokens = ([], 0) if problem else self.describer.generate(inputs)
            except (torch.OutOfMemoryError, ValueError, IndexError) as error:
                problem = first_line(error)
            timer["generate"] += time.perf_counter() - start
            if not problem:
                timer["tokens"] += new_tokens
                captions |= {
                    (i, number): texts[row * self.args.num_captions :][: self.args.num_captions]
                    for row, i in enumerate(indices)
                }
            elif len(indices) == 1:
                errors[indices[0]] = problem
            else:
                torch.cuda.empty_cache()
                for half in (indices[: len(indices) // 2], indices[len(indices) // 2 :]):
                    failed, smaller = self.read(half)
                    errors |= failed
                    self.describe(
                        [request for request in smaller if request[0] == number],
                        captions,
                        errors,
                        timer,
                    )


# -------------------------------------------------------------------------------------------------- files on the disk


def read_lines(file: str):
    """Yield (first byte, end byte, object) per line; a last line that a kill cut short is left out, a missing file has none."""
    end = 0
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.endswith(b"\n"):
                return
            start, end = end, end + len(raw)
            try:
                line = json.loads(raw)
                line["image"]
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f'{file}, line {number}: no JSON object with an "image" ({error!r}): repair or remove that line'
                )
            yield start, end, line


def scan(
    args: argparse.Namespace, keys: list[str], settings: str, retry: bool = False
) -> tuple[dict, dict[int, str], set[int]]:
    """What is on the disk: {batch: (file, first byte, end byte)}, {image index: error}, and which batches are done.

    A batch is whole when each of its images has all its captions or an error (`retry`: errors do not count). Of several copies the one
    with most captions counts. Parts are read before --out: another process that merges them just now writes --out first.
    """
    index, per_image, places, most, partial = (
        {key: i for i, key in enumerate(keys)},
        len(args.prompt) * args.num_captions,
        {},
        {},
        collections.Counter(),
    )
    files, errors = [*find_parts(args.out), args.out], {}
    if not retry and any(map(os.path.exists, files)):
        errors = {
            index[line["image"]]: line["error"]
            for _, _, line in read_lines(args.out + ".failed")
            if line["image"] in index
        }
    for file in files:
        for batch, group in itertools.groupby(
            read_lines(file), lambda entry: index.get(entry[2]["image"], -1) // args.batch_size
        ):
            group = list(group)
            for _, _, line in group:
                if line["image"] not in index:
                    raise SystemExit(
                        f"{file} describes '{line['image']}', which is not in --data {args.data}: choose another --out"
                    )
                for name, known in (
                    ("model", [args.model]),
                    ("prompt", args.prompt),
                    ("settings", [settings]),
                ):
                    if line.get(name) not in known and "error" not in line:
                        raise SystemExit(
                            f"{file} was begun with {name} {line.get(name)!r}, this run has {known[-1]!r}: choose another --out, or move that file away"
                        )
            failed = {
                index[line["image"]]: line["error"]
                for _, _, line in group
                if "error" in line and not retry
            }
            count = collections.Counter(
                index[line["image"]] for _, _, line in group if "caption" in line
            )
            wanted = images_of(batch, args.batch_size, args.limit) or images_of(
                batch, args.batch_size, len(keys)
            )
            if not all(count[i] == per_image or i in failed or i in errors for i in wanted):
                partial[file] += 1
                continue
            partial[file] = 0
            if count.total() > most.get(batch, -1):
                most[batch], places[batch] = count.total(), (file, group[0][0], group[-1][1])
                errors = {i: error for i, error in errors.items() if count[i] < per_image} | failed
        if partial[file] > 2:  # a kill leaves one at the end
            raise SystemExit(
                f"{file}: its last {partial[file]} batches lack captions: were images added to --data, or was it edited? Choose another --out, or move that file away"
            )
    done = {
        b
        for b in range(math.ceil(args.limit / args.batch_size))
        if b in places or all(i in errors for i in images_of(b, args.batch_size, args.limit))
    }
    return places, errors, done


def find_parts(out: str) -> list[str]:
    return sorted(glob.glob(glob.escape(out) + ".part-*-of-*[0-9]"))


def merge(args: argparse.Namespace, keys: list[str], places: dict, errors: dict[int, str]) -> None:
    """Put all captions into --out in the folder's order, all errors into .failed; the parts are removed when these are complete."""
    parts, temporary = find_parts(args.out), f"{args.out}.tmp-{args.shard}-of-{args.shards}"
    with contextlib.ExitStack() as stack:
        sources = {
            file: stack.enter_context(open(file, "rb"))
            for file in {file for file, _, _ in places.values()}
        }
        merged = stack.enter_context(open(temporary, "wb"))
        for _, (file, start, end) in sorted(places.items()):
            sources[file].seek(start)
            merged.writelines(
                line
                for line in sources[file].read(end - start).splitlines(True)
                if "caption" in json.loads(line)
            )
    write_lines(
        temporary + ".failed",
        [{"image": keys[i], "error": error} for i, error in sorted(errors.items())],
    )
    os.replace(temporary + ".failed", args.out + ".failed")
    os.replace(temporary, args.out)
    for file in [*parts, *[args.out + ".failed"] * (not errors)]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(file)


def write_lines(file: str, lines: list[dict], mode: str = "wb") -> None:
    with open(file, mode) as stream:
        stream.write(
            b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        )  # ASCII: any file name survives


def write_whole(out: str, lines: list[dict]) -> None:
    """Write `out` in one go (temporary name, then rename); refuse to replace a file with other content."""
    temporary = f"{out}.tmp-{os.getpid()}"
    write_lines(temporary, lines)
    if os.path.exists(out) and not filecmp.cmp(temporary, out, shallow=False):
        os.remove(temporary)
        raise SystemExit(
            f"{out} exists and holds other captions: choose another --out, or move it away"
        )
    os.replace(temporary, out)
    print(summary(out))


def summary(file: str) -> str:
    count, words, empty, seen = 0, 0, 0, set()
    for _, _, line in read_lines(file):
        count, words, empty = (
            count + 1,
            words + len(line["caption"].split()),
            empty + (not line["caption"]),
        )
        seen.add(hash(line["caption"]))
    return f"{file}: {count} captions, {words / max(count, 1):.1f} words on average, {empty} empty, {count - len(seen)} duplicates"


# ----------------------------------------------------------------------------------- published captions, and the sheet


def read_published(file: str, keys: list[str]) -> list[tuple[str, str]]:
    """[(image key, caption)] from somebody's captions: a .pth list or .txt lines in ImageFolder's order, or a .csv with file names."""
    found = collections.defaultdict(list)
    try:
        if file.endswith((".pth", ".pt")):
            rows = torch.load(file, weights_only=True)
        else:
            with open(
                file,
                encoding="utf-8-sig",
                errors="replace",
                newline="" if file.endswith(".csv") else None,
            ) as stream:
                rows = (
                    list(csv.DictReader(stream))
                    if file.endswith(".csv")
                    else stream.read().removesuffix("\n").split("\n")
                )
    except pickle.UnpicklingError:
        raise SystemExit(
            f"--import {file}: not a plain list of strings; it holds objects whose loading could run code, so it is not loaded"
        )
    except (OSError, EOFError, RuntimeError, csv.Error) as error:
        raise SystemExit(f"--import {file}: {first_line(error)}")
    if not file.endswith(".csv"):
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise SystemExit(f"--import {file}: expected a list of strings")
        if len(rows) != len(keys):
            raise SystemExit(
                f"--import {file}: {len(rows)} captions, but --data has {len(keys)} images: by position they cannot be matched"
            )
        return list(zip(keys, rows))
    columns = list(rows[0]) if rows else []
    path, text = (
        next((column for column in columns if (column or "").strip().lower() in names), None)
        for names in (
            (
                "image",
                "path",
                "image_path",
                "filepath",
                "file_path",
                "file",
                "file_name",
                "filename",
            ),
            ("caption", "captions", "text", "description"),
        )
    )
    if path is None or text is None:
        raise SystemExit(
            f"--import {file}: needs a column image, path or file_name and a column caption or text; it has {', '.join(map(str, columns)) or 'no rows'}"
        )
    for parts in (
        0,
        2,
        1,
    ):  # its rows name images by their keys, else by class folder and file name, else by file name, where only one image has it
        known, unknown = {}, 0
        for key in keys:
            name = "/".join(key.split("/")[-parts:])
            known[name] = None if name in known else key
        for row in rows:
            key = known.get("/".join((row[path] or "").replace("\\", "/").split("/")[-parts:]))
            if key is None or row[text] is None:
                unknown += 1
            else:
                found[key].append(row[text])
        if found:
            break
    else:
        raise SystemExit(f"--import {file}: none of its {len(rows)} rows names an image of --data")
    print(
        f"{unknown} of {len(rows)} rows name no image of --data (or more than one); {len(keys) - len(found)} of {len(keys)} images got no caption"
    )
    return [(key, caption) for key in keys for caption in found.get(key, [])]


def contact_sheet(
    file: str, data: str, captions: list[tuple[str, str]], columns: int = 4, side: int = 256
) -> None:
    """A picture of images with their captions below, wrapped and never cut."""
    if not captions:
        raise SystemExit("--preview: none of the twelve images could be described")
    font = ImageFont.load_default(size=13)
    texts = [
        textwrap.fill(f"{key.split('/')[0]}: {caption}".encode("utf-8", "replace").decode(), 38)
        for key, caption in captions
    ]
    height = side + 24 + 18 * max(text.count("\n") + 1 for text in texts)
    sheet = Image.new(
        "RGB", (columns * (side + 16), height * math.ceil(len(texts) / columns)), "white"
    )
    for number, ((key, _), text) in enumerate(zip(captions, texts)):
        x, y = 8 + number % columns * (side + 16), 8 + number // columns * height
        sheet.paste(
            ImageOps.pad(load_image(os.path.join(data, key)), (side, side), color="white"), (x, y)
        )
        ImageDraw.Draw(sheet).multiline_text((x, y + side + 4), text, fill="black", font=font)
    sheet.save(file)
    print(f"{file}: {len(texts)} captions")


# ------------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    args = parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: no rank outlives a torchrun that is killed, writing beside its successor
    keys = list_images(args.data)
    folders = sorted({key.split("/")[0] for key in keys} - {UNLABELED})
    names = read_class_names(args.class_names, folders)
    sampling = (
        "greedy"
        if args.temperature <= 0
        else f"temperature={args.temperature} top_p={args.top_p} seed={args.seed} num_captions={args.num_captions}"
    )
    settings = f"max_new_tokens={args.max_new_tokens} batch_size={args.batch_size} prompts={len(args.prompt)} dtype={args.dtype} revision={args.revision} {sampling}"
    if any("{class}" in prompt for prompt in args.prompt):
        settings += f" class_names={zlib.crc32(repr(sorted(names.items())).encode()):08x}"
    args.limit = min(args.limit or len(keys), len(keys))
    if args.import_file:
        model = f"import:{os.path.basename(args.import_file)}"
        return write_whole(
            args.out,
            [
                {"image": key, "caption": " ".join(caption.split()), "model": model, "prompt": ""}
                for key, caption in read_published(args.import_file, keys)
            ],
        )
    if args.model == "template":  # images without a class get no caption that would name it
        return write_whole(
            args.out,
            [
                {
                    "image": key,
                    "caption": prompt.replace("{class}", names.get(key.split("/")[0], "")),
                    "model": "template",
                    "prompt": prompt,
                }
                for key in keys[: args.limit]
                for prompt in args.prompt
                if "{class}" not in prompt or not key.startswith(UNLABELED + "/")
            ],
        )
    if any("{class}" in prompt for prompt in args.prompt) and any(
        key.startswith(UNLABELED + "/") for key in keys
    ):
        raise SystemExit(
            f"--prompt with {{class}}: the images of {UNLABELED}/ have no class to be named"
        )
    if args.preview:
        keys = sorted(random.Random(args.seed).sample(keys, min(12, len(keys))))
        dataset, captions = Batches(args, keys, [], Describer(args), names), {}
        torch.manual_seed(args.seed)
        errors, requests = dataset.read(list(range(len(keys))))
        dataset.describe(requests, captions, errors, collections.Counter())
        return contact_sheet(
            args.preview,
            args.data,
            [(keys[i], text) for (i, _), texts in sorted(captions.items()) for text in texts],
        )

    own = args.out if args.shards == 1 else f"{args.out}.part-{args.shard}-of-{args.shards}"
    batches = range(math.ceil(args.limit / args.batch_size))
    places, errors, done = scan(args, keys, settings, args.retry_failed)
    mine = [b for b in batches if b % args.shards == args.shard]
    todo = [b for b in mine if b not in done]
    if todo:
        if "LOCAL_RANK" in os.environ and args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dataset = Batches(args, keys[: args.limit], todo, Describer(args), names)
        timer, start = collections.Counter(), time.perf_counter()
        if os.path.exists(own):  # what a kill left behind the last whole batch
            os.truncate(
                own, max((end for file, _, end in places.values() if file == own), default=0)
            )
        total, left = (
            sum(len(images_of(b, args.batch_size, args.limit)) for b in part)
            for part in (mine, todo)
        )
        bar = tqdm(
            total=total, initial=total - left, unit="image", smoothing=0.05, disable=not args.lead
        )
        for batch, failed, requests in DataLoader(
            dataset,
            batch_size=None,
            num_workers=args.workers,
            pin_memory=args.device.startswith("cuda"),
        ):
            captions = {}
            torch.manual_seed(
                args.seed * 1_000_003 + batch
            )  # sampling is the same whoever does this batch
            dataset.describe(requests, captions, failed, timer)
            lines, images = [], images_of(batch, args.batch_size, args.limit)
            for i in images:
                lines += (
                    [{"image": keys[i], "error": failed[i]}]
                    if i in failed
                    else [
                        {
                            "image": keys[i],
                            "caption": caption,
                            "model": args.model,
                            "prompt": prompt,
                            "settings": settings,
                        }
                        for number, prompt in enumerate(args.prompt)
                        for caption in captions[i, number]
                    ]
                )
            write_lines(own, lines, "ab")
            timer.update(captions=len(lines) - len(failed), failed=len(failed))
            bar.update(len(images))
            seconds = time.perf_counter() - start
            rates = f"{timer['captions'] / seconds:.2f} captions/s, {timer['tokens'] / seconds:.0f} new tokens/s, {timer['failed']} images failed"
            bar.set_postfix_str(rates, refresh=False)
        bar.close()
        print(
            f"this run: {timer['captions']} captions in {seconds:.1f} s, {rates}, {timer['generate'] / seconds:.0%} of the time inside generate"
        )
    try:  # processes do not talk to each other: the one that finds all batches on the disk finishes the job
        places, errors, done = scan(args, keys, settings)
        if len(done) < len(batches):
            return print(
                f"{len(done)} of {len(batches)} batches are done; the process that does the last one writes {args.out}"
            )
        merge(args, keys, places, errors)
    except (
        FileNotFoundError,
        json.JSONDecodeError,
    ):  # another process has merged them in this moment
        return print(f"{args.out}: written by another process")
    for i, error in sorted(errors.items())[:10]:
        print(f"failed: {keys[i]!r}: {error}")
    if sum(i < args.limit for i in errors) == args.limit:
        raise SystemExit(
            f"none of the {args.limit} images could be described: see {args.out}.failed"
        )
    print(
        f"{summary(args.out)}; {len(errors)} images failed"
        + (f", listed in {args.out}.failed" if errors else "")
    )


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that cannot be written
        raise SystemExit(
            f"{error.filename or 'disk'}: {error.strerror or error}; what is complete on the disk stays: start the same command again"
        )
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on")
