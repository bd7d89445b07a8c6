"""Embed captions with a frozen text encoder: stage 2 of 4 (caption -> embed -> train -> evaluate).

In:  --captions FILE.jsonl  one JSON object with a "caption" per line
Out: --out FILE.npy         float16 (or float32) [lines, width]; row i embeds line i, length 1
     FILE.json              of which captions (SHA-256) and encoder: train.py refuses any others

Launch (all-MiniLM-L6-v2; the paper's kind of encoder; an LLM; an LLM, tuned as in LLM2CLIP):
    python embed.py --captions captions.jsonl
    python embed.py --captions captions.jsonl --model openai/clip-vit-base-patch32
    torchrun --nproc_per_node=8 embed.py --captions captions.jsonl \\
        --model microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned
    python embed.py --captions captions.jsonl --model meta-llama/Llama-3.2-1B \\
        --tune-epochs 1 --lora-rank 16 --tuned-out tuned

Killed at any moment, the same line goes on with the batches that are missing (but tunes anew).
Memory does not grow with the captions, but for some 50 bytes each (tuning holds them all).
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, logging
from transformers.utils import cached_file, extract_commit_hash

POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    add = p.add_argument
    add("--captions", default="captions.jsonl", help="what caption.py wrote")
    add("--out", default="embeddings.npy", help="the rows; a .json beside them says of what")
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    add("--revision", default="main", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run the model's own code: read it first")
    poolings = ["auto", *POOLINGS.values()]
    add("--pooling", default="auto", choices=poolings, help="auto: the model's own, else the mean")
    add("--prefix", help='put before each caption ("query: "); else the default prompt of --model')
    add("--max-length", type=int, help="tokens kept of a caption; else the limit of --model")
    add("--batch-size", type=int, default=1024, help="most captions in a batch")
    add("--batch-tokens", type=int, help="most tokens in a batch; else 1024, on a GPU 32768")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add(
        "--dtype", default="auto", choices=dtypes, help="auto: as saved (float32: float16 autocast)"
    )
    add("--out-dtype", default="float16", choices=["float16", "float32"], help="of the rows")
    add("--tune-epochs", type=int, default=0, help="LLM2CLIP's tuning, on images with two captions")
    add("--tuned-out", default="tuned", metavar="DIR", help="the tuned encoder's model folder")
    add("--tune-batch", type=int, default=64, help="images, of two captions each, per step")
    add("--tune-lr", type=float, help="peak; else 2e-4 with --lora-rank (LLM2CLIP's), 5e-5 without")
    add("--lora-rank", type=int, default=0, help="tune a LoRA of this rank (LLM2CLIP: 16); 0: all")
    add("--seed", type=int, default=0, help="of the tuning")
    args = p.parse_args()
    args.metadata, args.temporary = args.out.removesuffix(".npy") + ".json", args.out + ".tmp"
    args.rank, args.world = process_rank()
    args.device = choose_device(args.device, args.world)
    args.batch_tokens = args.batch_tokens or (1024 if args.device == "cpu" else 32768)
    check_args(p, args)
    return args


def process_rank() -> tuple[int, int]:
    """Rank and number of processes as torchrun sets them; (0, 1) where it is not used."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is world is None:
        return 0, 1
    if not re.fullmatch(r"\d+/\d+", f"{rank}/{world}") or int(rank) >= int(world):
        both = f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit"
        raise SystemExit(f"{both}: start with torchrun, which sets both, or unset them")
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
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {str(error).splitlines()[0]}") from error
    return str(device)


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    length = 3 if args.max_length is None else args.max_length
    if min(args.batch_size, args.batch_tokens, args.tune_batch, length - 2) < 1:
        p.error("--batch-size, --batch-tokens and --tune-batch start at 1, --max-length at 3")
    if not args.out.endswith(".npy") or not Path(args.out).parent.is_dir():
        p.error(f"--out {args.out}: a name that ends in .npy, in a folder that exists")
    if args.captions == args.metadata:
        p.error(f"--out {args.out}: its description would replace the captions; name it otherwise")
    if args.model.startswith((".", "/")) and not os.path.isdir(args.model):
        p.error(f"--model {args.model}: there is no such folder")
    if (args.lora_rank or args.tune_lr) and not args.tune_epochs:
        p.error("--lora-rank and --tune-lr do nothing without --tune-epochs")
    if args.tune_epochs and args.world > 1:
        p.error("--tune-epochs runs in one process: tune first, then torchrun with --model DIR")


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its text, if it has any."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def model_file(args: argparse.Namespace, name: str, folder: str = "") -> str | None:
    """Path of a file of the model (a folder or a hub id), None if it has no such file."""
    source = {"subfolder": folder, "revision": args.revision}
    return cached_file(args.model, name, _raise_exceptions_for_missing_entries=False, **source)


def read_json(file: str | None) -> dict | list:
    """Its content, {} if there is no such file."""
    return json.loads(Path(file).read_bytes()) if file and os.path.exists(file) else {}


def pooling_of(config: dict, prefix: str) -> str:
    """Our name of a Pooling module's pooling; older files have a flag for each instead."""
    if prefix and not config.get("include_prompt", True):
        raise ValueError('its pooling leaves out the prompt: not supported here; try --prefix ""')
    flags = [flag for flag in config if flag.startswith("pooling_mode_") and config[flag] is True]
    modes = config.get("pooling_mode") or [flag.removeprefix("pooling_mode_") for flag in flags]
    modes = [modes] if isinstance(modes, str) else modes
    return " and ".join(POOLINGS.get(mode, mode) for mode in modes) or "mean"


def load_dense(args: argparse.Namespace, folder: str, config: dict) -> nn.Sequential:
    """A Dense module: a linear layer and its activation."""
    package, _, activation = config["activation_function"].rpartition(".")
    plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if not plain or config.get("use_residual") or not package.startswith("torch.nn"):
        raise ValueError(f"its Dense module is not supported here: {config}")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    state = load_file(model_file(args, "model.safetensors", folder))
    linear.load_state_dict({name.removeprefix("linear."): state[name] for name in state})
    return nn.Sequential(linear, getattr(nn, activation)())


def refuse_random_weights(model: nn.Module, missing: set[str]) -> None:
    """Only weights that are not used here may be missing in the model's files: they become 0."""
    used = [name for name in missing if "pooler" not in name and not name.startswith("decoder.")]
    if used:
        raise ValueError(f"its files lack {len(used)} of its weights, {min(used)} for one")
    for name, parameter in model.named_parameters():
        if name in missing:  # random, it would make the same model another one at each start
            nn.init.zeros_(parameter)


class TextEncoder(nn.Module):
    """A frozen text encoder: captions -> `tokenize` -> `forward` -> unit vectors [B, D]. Those of a
    sentence-transformers model's `encode(normalize_embeddings=True)`, a CLIP's projected features,
    or the states of a T5's encoder or the last layer of all others, pooled by `--pooling`."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.prefix, self.lower, self.pooling, self.dense = "", False, "", nn.Sequential()
        folder, limit = self.read_modules(args)
        source = {"subfolder": folder, "revision": args.revision}
        source["trust_remote_code"] = args.trust_remote_code
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        source |= {"dtype": args.dtype, "output_loading_info": True}
        self.model, loaded = AutoModel.from_pretrained(args.model, **source)
        refuse_random_weights(self.model, loaded["missing_keys"])
        self.config = self.model.config
        projection = "projection" if hasattr(self.model, "get_text_features") else ""
        given = "" if args.pooling == "auto" else args.pooling
        self.pooling = given or self.pooling or projection or "mean"
        if self.pooling not in (projection, *POOLINGS.values()):
            raise ValueError(f"its pooling {self.pooling} is not supported here")
        if self.pooling != projection:
            self.model = getattr(self.model, "text_model", self.model)
        if self.config.is_encoder_decoder:
            self.model = self.model.get_encoder()
        self.model.config.use_cache = False  # one forward pass needs no cache of keys and values
        # SigLIP was trained on padding up to the full length, unmasked
        self.fill = self.pooling == "projection" and "siglip" in self.config.model_type
        limits = [limit or self.tokenizer.model_max_length, args.max_length]
        limits.append(getattr(self.config.get_text_config(), "max_position_embeddings", None))
        self.max_length = min(limit for limit in limits if limit and limit > 0)

    def read_modules(self, args: argparse.Namespace) -> tuple[str, int | None]:
        """Settings in sentence-transformers' files; the transformer's folder and most tokens."""
        prompts = read_json(model_file(args, "config_sentence_transformers.json"))
        prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or ""
        self.prefix = prompt if args.prefix is None else args.prefix
        transformer, limit = "", None
        for module in read_json(model_file(args, "modules.json")):
            kind, folder = module["type"].split(".")[-1], module["path"]
            name = "sentence_bert_config.json" if kind == "Transformer" else "config.json"
            config = read_json(model_file(args, name, folder))
            if kind == "Transformer":
                transformer, limit = folder, config.get("max_seq_length")
                self.lower = config.get("do_lower_case", False)
            elif kind == "Pooling":
                self.pooling = pooling_of(config, self.prefix)
            elif kind == "Dense":
                self.dense.append(load_dense(args, folder, config))
            elif kind != "Normalize":
                raise ValueError(f"its sentence-transformers module {kind} is not supported here")
        return transformer, limit

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids, cut at `max_length`, and the number of tokens that were cut off."""
        texts = [self.prefix + caption for caption in captions]
        texts = [text.lower() for text in texts] if self.lower else texts
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        cut = [max(0, len(row) - self.max_length) for row in ids]
        if self.fill or any(cut):
            limit = {"max_length": self.max_length, "padding": "max_length" if self.fill else False}
            ids = self.tokenizer(texts, truncation=True, **limit)["input_ids"]
        return [row or [self.tokenizer.pad_token_id or 0] for row in ids], cut  # at least a token

    def forward(self, token_ids: list) -> Tensor:
        """Unit vectors [B, D], float32, of B lists (or arrays) of token ids."""
        lengths = np.array([len(row) for row in token_ids])
        ids = np.full((len(lengths), lengths.max()), self.tokenizer.pad_token_id or 0, np.int64)
        for padded, row in zip(ids, token_ids, strict=True):
            padded[: len(row)] = row
        kept = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
        ids, full, device = torch.from_numpy(ids), bool(kept.all()), self.model.device
        if device.type == "cuda":  # pinned, so that copying does not wait for the GPU
            ids, kept = (x.pin_memory().to(device, non_blocking=True) for x in (ids, kept))
        mask = None if full else kept  # [B, T]
        if self.pooling == "projection":
            features = self.model.get_text_features(input_ids=ids, attention_mask=mask)
            return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            vectors = states[:, 0]
        elif self.pooling == "last":
            vectors = states[torch.arange(len(ids), device=ids.device), kept.sum(1) - 1]
        else:
            weights = kept.float()[..., None]  # [B, T, 1]
            vectors = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(self.dense(vectors), dim=-1)


def load_encoder(args: argparse.Namespace) -> TextEncoder:
    """The encoder on its device. Sets `args.revision` to the hub's commit, one for all ranks."""
    logging.set_verbosity_error()  # refuse_random_weights says what matters
    try:
        if not os.path.isdir(args.model):  # a branch may move before the next rank or start
            file = model_file(args, "modules.json") or model_file(args, "config.json")
            args.revision = from_rank_0(extract_commit_hash(file, None) or args.revision)
        return TextEncoder(args).to(args.device).eval()
    except Exception as error:  # of any kind: damaged files, missing packages, remote code
        raise SystemExit(f"--model {args.model}: cannot load it: {first_line(error)}") from error


class LoRA(nn.Module):
    """Parametrization of a frozen weight [out, in]: W + 2 B A, B [out, R] starting at zero."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        height, width = weight.shape
        self.a = nn.Parameter(torch.randn(rank, width, device=weight.device) / width**0.5)
        self.b = nn.Parameter(torch.zeros(height, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * (self.b @ self.a).to(weight.dtype)


def add_lora(model: nn.Module, rank: int) -> list[nn.Linear]:
    """Freeze the model and put a LoRA on each linear layer; these, for merging."""
    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        nn.utils.parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return layers


def caption_contrastive_loss(vectors: Tensor, texts: list, temperature: float = 0.05) -> Tensor:
    """Symmetric InfoNCE of vectors [2B, D], rows i and B + i from two captions of one image.
    Negatives are all other rows, unless they read the same as one of the two."""
    n, device = len(texts) // 2, vectors.device
    texts = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(device)
    partner = torch.arange(2 * n, device=device).roll(n)
    excluded = (texts[:, None] == texts) | (texts[partner][:, None] == texts)
    excluded[torch.arange(2 * n), partner] = False
    return F.cross_entropy((vectors @ vectors.T / temperature).masked_fill(excluded, -1e4), partner)


@torch.inference_mode()
def caption_recall(encoder: TextEncoder, images: list[list[str]]) -> float:
    """Recall@1 in percent: each image's first caption retrieves its second one, and vice versa."""
    sides = []
    for k in (0, 1):
        ids, _ = encoder.tokenize([captions[k] for captions in images])
        sides.append(torch.cat([encoder(ids[i : i + 32]) for i in range(0, len(ids), 32)]))
    similarity = (sides[0] @ sides[1].T).cpu()
    hits = [(similarity.argmax(dim) == torch.arange(len(images))).float().mean() for dim in (0, 1)]
    return 50 * float(sum(hits))


def read_pairs(args: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """The different captions of each image that has two: for tuning, and a held-out tenth."""
    captions_of = {}
    for image, caption in read_captions(args.captions):
        captions_of.setdefault(image, {})[caption] = None  # keeps the order, drops repetitions
    images = [list(captions) for captions in captions_of.values() if len(captions) > 1]
    random.Random(args.seed).shuffle(images)
    count = min(1000, len(images) // 10)
    if len(images) - count < args.tune_batch or not count:
        have = f"{len(images)} of {len(captions_of)} images have them, over {args.tune_batch} must"
        raise SystemExit(f"--tune-epochs needs two captions of an image (--num-captions 2): {have}")
    return images[count:], images[:count]


def tuning_batches(images: list[list[str]], args: argparse.Namespace) -> Iterator[list[str]]:
    """2B captions at a time: one of each of B images, then another one of each."""
    rng = random.Random(args.seed)
    for _ in range(args.tune_epochs):
        rng.shuffle(images)
        for i in range(0, len(images) - args.tune_batch + 1, args.tune_batch):
            pairs = [rng.sample(captions, 2) for captions in images[i : i + args.tune_batch]]
            yield [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def tune(args: argparse.Namespace) -> None:
    """Caption-contrastive tuning (LLM2CLIP, arXiv 2411.04997), which is supervised SimCSE."""
    images, held_out = read_pairs(args)
    encoder = load_encoder(args)
    if encoder.pooling == "projection" or len(encoder.dense) or encoder.config.is_encoder_decoder:
        raise SystemExit("--tune-epochs: no CLIP projection, Dense module or encoder-decoder")
    if not args.lora_rank:
        encoder.float()  # steps of 5e-5 vanish in bfloat16 weights
    before = caption_recall(encoder, held_out)
    gpu = encoder.model.device.type == "cuda"
    if gpu and encoder.model.supports_gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable()
        encoder.model.enable_input_require_grads()
    torch.manual_seed(args.seed)
    lora = add_lora(encoder.model, args.lora_rank) if args.lora_rank else []
    optimizer = torch.optim.AdamW(encoder.parameters(), args.tune_lr or (2e-4 if lora else 5e-5))
    steps = args.tune_epochs * (len(images) // args.tune_batch)
    warmup = max(1, steps // 10)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    encoder.train()
    bar = tqdm(tuning_batches(images, args), total=steps, unit="step", desc="tune")
    for texts in bar:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            vectors = encoder(encoder.tokenize(texts)[0])
        loss = caption_contrastive_loss(vectors, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    for layer in lora:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")  # merges
    after = caption_recall(encoder.eval(), held_out)
    save_encoder(encoder, args.tuned_out)
    tuned = f"{args.tuned_out}: tuned on {len(images)} images; caption-to-caption recall@1 on"
    print(f"{tuned} {len(held_out)} held-out images {before:.1f} % before, {after:.1f} % after")


def save_encoder(encoder: TextEncoder, folder: str) -> None:
    """A model folder that sentence-transformers reads too."""
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    os.makedirs(f"{folder}/1_Pooling", exist_ok=True)
    modules = [
        {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {f"pooling_mode_{flag}": name == encoder.pooling for flag, name in POOLINGS.items()}
    pooling["word_embedding_dimension"] = encoder.model.config.hidden_size
    transformer = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.lower}
    prompts = {"prompts": {"caption": encoder.prefix}, "default_prompt_name": "caption"}
    write_json(f"{folder}/modules.json", modules)
    write_json(f"{folder}/1_Pooling/config.json", pooling)
    write_json(f"{folder}/sentence_bert_config.json", transformer)
    write_json(f"{folder}/config_sentence_transformers.json", prompts)


def read_captions(file: str) -> Iterator[tuple[str, str]]:
    """(image, caption) of a jsonl file in order; a line without them is an error that names it."""
    if not os.path.isfile(file) or not os.path.getsize(file):
        raise SystemExit(f"{file}: No such file, or it is empty: run caption.py first")
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                entry = json.loads(line)
                image, caption = entry["image"], entry["caption"].encode("utf-8", "replace")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wrong = f'line {number}: no JSON object with an "image" and a "caption" ({error!r})'
                raise SystemExit(f"{file}, {wrong}: is caption.py done with it?") from error
            yield image, caption.decode()  # no lone surrogates: they would stop the tokenizer


def write_json(file: str, content: dict | list) -> None:
    Path(file + ".new").write_text(json.dumps(content, indent=1))
    os.replace(file + ".new", file)


def describe(args: argparse.Namespace, encoder: TextEncoder) -> dict:
    """All that the rows depend on; of each of the weights a sample, for they may be tuned again."""
    weights = hashlib.sha256()
    for value in encoder.parameters():
        sample = value.detach().flatten()[:: max(1, value.numel() // 256)]
        weights.update(sample.float().cpu().numpy().tobytes())
    with open(args.captions, "rb") as stream:
        captions = hashlib.file_digest(stream, "sha256")
    return {
        "captions": os.path.basename(args.captions),
        "captions_sha256": captions.hexdigest(),
        "model": args.model,
        "revision": args.revision,
        "pooling": encoder.pooling,
        "weights_sha256": weights.hexdigest(),
        "prefix": encoder.prefix,
        "max_length": encoder.max_length,
        "dtype": args.dtype,
        "out_dtype": args.out_dtype,
    }


def write_tokens(args: argparse.Namespace, encoder: TextEncoder) -> SimpleNamespace:
    """Tokenise all captions into a file: int32, one caption after the other. Its index."""
    lengths, cut, hashes = [], [], bytearray()
    lines = iter(tqdm(read_captions(args.captions), unit="caption", desc="tokenise"))
    with open(args.temporary + ".tokens", "wb") as stream:
        while chunk := [caption for _, caption in itertools.islice(lines, 4096)]:
            ids, cut_off = encoder.tokenize(chunk)
            for row in ids:
                tokens = np.array(row, np.int32).tobytes()
                hashes += hashlib.blake2b(tokens, digest_size=16).digest()
                stream.write(tokens)
            lengths.append(np.array([len(row) for row in ids], np.int32))
            cut += [number for number in cut_off if number]
    lengths, hashes = np.concatenate(lengths), np.frombuffer(hashes, "V16")
    # Equal captions are encoded once, the longest first, then in the file's order.
    _, first, caption = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.lexsort((first, -lengths[first]))
    first, caption = first[order], np.argsort(order)[caption]
    ends = np.cumsum(lengths, dtype=np.int64)
    return SimpleNamespace(
        spans=np.stack([ends - lengths, ends], axis=1)[first],  # [U, 2] tokens of each caption
        lines=np.argsort(caption, kind="stable"),  # [N]; caption u is on those from starts[u] ...
        starts=np.concatenate([[0], np.cumsum(np.bincount(caption))]),  # [U + 1] to starts[u + 1]
        cut=cut,  # numbers of tokens cut off
        batches=plan_batches(lengths[first], args.batch_size, args.batch_tokens),
    )


def plan_batches(lengths: np.ndarray, batch_size: int, batch_tokens: int) -> list[slice]:
    """Slices of captions sorted by length, longest first (out of memory shows at once)."""
    batches, start = [], 0
    while start < len(lengths):
        fit = batch_tokens // max(1, int(lengths[start]))
        batches.append(slice(start, start + max(1, min(batch_size, fit))))
        start = batches[-1].stop
    return batches


def prepare_rows(args: argparse.Namespace, plan: dict, index: SimpleNamespace, width: int) -> None:
    """Rows, a tick per batch (.done), what both belong to (.plan); or a killed run's, same plan."""
    file = args.temporary
    if read_json(file + ".plan") == plan:
        if not os.path.exists(file) and not os.path.exists(args.metadata):
            os.replace(args.out, file)  # a kill in finish(), between the rows and the description
        if os.path.exists(file):
            return
    Path(file + ".plan").unlink(missing_ok=True)  # first: it never stands beside rows of another
    np.lib.format.open_memmap(file, "w+", args.out_dtype, (len(index.lines), width)).flush()
    if hasattr(os, "posix_fallocate"):  # a full disk says so now; later it would kill the process
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))
    np.zeros(len(index.batches), np.uint8).tofile(file + ".done")
    write_json(file + ".plan", plan)


def encode_batches(args: argparse.Namespace, encoder: TextEncoder, index: SimpleNamespace) -> float:
    """Fill in the rows of this rank's batches and tick these off; captions per second."""
    file, device, cores = args.temporary, encoder.model.device, torch.get_num_threads()
    gpu, started = device.type == "cuda", time.perf_counter()
    half = gpu and args.dtype == "auto" and encoder.model.dtype == torch.float32
    tokens = np.memmap(file + ".tokens", np.int32, "r")
    rows, done = np.lib.format.open_memmap(file, "r+"), np.memmap(file + ".done", np.uint8, "r+")
    launching = threading.Semaphore(1 if gpu else cores)

    @torch.inference_mode()
    def encode(batch: int) -> int:
        captions = index.batches[batch]
        token_ids = [tokens[start:end] for start, end in index.spans[captions]]
        if gpu:
            torch.cuda.set_device(device)  # the current GPU is each thread's own
        with launching, torch.autocast(device.type, torch.float16, enabled=half):
            vectors = encoder(token_ids).to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if gpu else None
        if copied:
            copied.synchronize()
        if not vectors.isfinite().all():
            raise SystemExit("the encoder's output is not finite: use --dtype bfloat16 or float32")
        for u, vector in enumerate(vectors.numpy(), captions.start):
            rows[index.lines[index.starts[u] : index.starts[u + 1]]] = vector
        done[batch] = 1  # after its rows: a kill in between repeats the batch
        return len(vectors)

    todo = [batch for batch in range(args.rank, len(index.batches), args.world) if not done[batch]]
    total = sum(len(index.spans[index.batches[batch]]) for batch in todo)
    bar = tqdm(total=total, unit="caption", desc="embed", smoothing=0.02, disable=args.rank > 0)
    # A batch per core is 1.17 times as fast as one on all; on a GPU, one is computed, one written.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2 if gpu else cores) as pool, bar:
        for i in range(0, len(todo), 1000):  # not all at once: a batch that waits takes 2 KB
            for count in pool.map(encode, todo[i : i + 1000]):
                bar.update(count)
    torch.set_num_threads(cores)
    rows.flush()
    return total / (time.perf_counter() - started)


def finish(args: argparse.Namespace, identity: dict, index: SimpleNamespace, speed: float) -> None:
    """Give rows and description their names, remove what only a resume needs, and say so."""
    if not np.fromfile(args.temporary + ".done", np.uint8).all():
        raise SystemExit(f"{args.temporary}.done misses batches: does another embed.py write it?")
    count, width = np.load(args.temporary, mmap_mode="r").shape
    Path(args.metadata).unlink(missing_ok=True)  # first: it never stands beside rows of another
    os.replace(args.temporary, args.out)
    write_json(args.metadata, identity | {"rows": count, "width": width})
    for suffix in (".done", ".plan", ".tokens"):
        os.remove(args.temporary + suffix)
    median = f", by {int(np.median(index.cut))} at the median" if len(index.cut) else ""
    cut = f"{len(index.cut)} captions were cut at {identity['max_length']} tokens{median}"
    size = f"{count} x {width} {args.out_dtype}, {len(index.spans)} different captions"
    print(f"{args.out}: {size}, {speed:.0f} captions/s; {cut}")


def end_with_torchrun() -> None:
    """Let no rank outlive a killed torchrun: it would write beside its successor (Linux only)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def from_rank_0(value: object) -> object:
    """Rank 0's value on all ranks, which wait for it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def main() -> None:
    args = parse_args()
    end_with_torchrun()
    if args.world > 1:  # only for waiting: a rank may be hours ahead of another
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    for _ in read_captions(args.captions):
        pass  # a wrong line is found before a model is loaded
    if args.tune_epochs:
        tune(args)
        args.model, args.revision, args.prefix = args.tuned_out, "main", None
    encoder = load_encoder(args)
    identity = describe(args, encoder)
    if os.path.exists(args.out) and identity.items() <= read_json(args.metadata).items():
        if args.rank == 0:
            print(f"{args.out}: nothing to do, it holds these captions' embeddings already")
        return
    index = None
    if args.rank == 0:
        index = write_tokens(args, encoder)
        plan = identity | {"batch_size": args.batch_size, "batch_tokens": args.batch_tokens}
        prepare_rows(args, plan, index, width=encoder(encoder.tokenize(["a"])[0]).shape[1])
    index = from_rank_0(index)
    try:
        speed = encode_batches(args, encoder, index)
        if args.world > 1:
            dist.barrier()
        if args.rank == 0:
            finish(args, identity, index, speed * args.world)
    except torch.OutOfMemoryError as error:
        raise SystemExit("out of memory: start again with a smaller --batch-tokens") from error
    except OSError as error:
        raise SystemExit(f"{first_line(error)}; start the same command again to go on") from error


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(first_line(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on") from None
