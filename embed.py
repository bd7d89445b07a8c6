"""Embed captions with a frozen text encoder: stage 2 of 4 (caption -> embed -> train -> evaluate).

In:  --captions FILE.jsonl  one JSON object with an "image" and a "caption" per line
Out: --out FILE.npy         float16 (or float32) [lines, width]; row i embeds line i, length 1
     FILE.json              of which captions (SHA-256) and encoder: train.py refuses any others

Launch (all-MiniLM-L6-v2; LLM2CLIP's LLM; another LLM, tuned in LLM2CLIP's way):
    python embed.py --captions captions.jsonl
    torchrun --nproc_per_node=8 embed.py --bidirectional --no-pool-prefix --max-length 512 \\
        --model microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned --suffix '<|eot_id|>' \\
        --prefix $'<|start_header_id|>user<|end_header_id|>\\n\\n'
    python embed.py --captions captions.jsonl --model meta-llama/Llama-3.2-1B --bidirectional \\
        --tune-epochs 1 --lora-rank 16 --tuned-out tuned

Killed at any moment, the same line goes on with the captions that are missing (but tunes anew).
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import os
import random
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, logging
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, extract_commit_hash

POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False  # 0 is a default, too
        return action.help if without else super()._get_help_string(action)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    p.usage, add = "%(prog)s [options; --help lists them]", p.add_argument
    add("--captions", default="captions.jsonl", help="what caption.py wrote")
    add("--out", default="embeddings.npy", help="the rows; a .json beside them says of what")
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    add("--revision", default="main", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run the model's own code: read it first")
    add("--pooling", choices=POOLINGS.values(), help="of tokens; else as the model says, or mean")
    add("--prefix", help='put before each caption ("query: "); else the default prompt of --model')
    add("--suffix", help="put behind each caption; else what a tuned --model was tuned with")
    add("--no-pool-prefix", action="store_true", help="leave prefix and BOS out of the mean")
    add("--bidirectional", action="store_true", help="an LLM's tokens attend to later ones, too")
    add("--max-length", type=int, help="tokens kept of a caption; else what --model can")
    add("--batch-tokens", type=int, help="most tokens in a batch; else 1024, on a GPU 32768")
    add("--device", help="cuda, cuda:N, mps or cpu (what torch finds)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: as saved; on a GPU none is float32")
    add("--out-dtype", default="float16", choices=["float16", "float32"], help="as numbers")
    add("--tune-epochs", type=int, default=0, help="LLM2CLIP's tuning, on images with two captions")
    add("--tuned-out", default="tuned", metavar="DIR", help="the tuned encoder's model folder")
    add("--tune-batch", type=int, default=64, help="images, of two captions each, per step")
    add("--tune-lr", type=float, help="peak; else 2e-4 with --lora-rank (LLM2CLIP's), 5e-5 without")
    add("--lora-rank", type=int, default=0, help="tune a LoRA of this rank (LLM2CLIP: 16); 0: all")
    add("--seed", type=int, default=0, help="of what the tuning draws")
    args = p.parse_args()
    args.metadata = args.out.removesuffix(".npy") + ".json"
    args.rank, args.world = process_rank()
    args.device = choose_device(args.device, args.world)
    args.batch_tokens = args.batch_tokens or (1024 if args.device == "cpu" else 32768)
    if min(args.batch_tokens, args.tune_batch) < 1:
        p.error("--batch-tokens and --tune-batch start at 1")
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
    if int(os.environ.get("LOCAL_WORLD_SIZE", args.world)) < args.world:
        p.error("all processes write to the same memory-mapped file: start them on one machine")
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


def read_captions(file: str) -> Iterator[tuple[str, str]]:
    """(image, stripped caption) of each line; SystemExit says what is wrong with one, and where."""
    if not os.path.isfile(file) or not os.path.getsize(file):
        raise SystemExit(f"{file}: No such file, or it is empty: run caption.py first")
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            wrong = f"{file}, line {number}"
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{wrong} is not JSON in UTF-8: {error}") from error
            if not isinstance(entry, dict):
                raise SystemExit(f"{wrong} is no JSON object with an image and a caption")
            for name in "image", "caption":
                if not isinstance(entry.get(name), str):
                    value = json.dumps(entry[name])[:50] if name in entry else "missing"
                    raise SystemExit(f'{wrong}: its "{name}" is {value}, not a string')
            caption = entry["caption"].encode("utf-8", "replace")  # lone surrogates stop tokenizers
            yield entry["image"], caption.decode().strip()


def model_file(model: str, revision: str, folder: str, *names: str) -> str | None:
    """Path of the first of these files that the model (a folder or a hub id) has."""
    source = {"subfolder": folder, "revision": revision}
    source["_raise_exceptions_for_missing_entries"] = False
    return next(filter(None, (cached_file(model, name, **source) for name in names)), None)


def read_json(file: str | None) -> dict | list:
    """Its content, {} if there is no such file."""
    return json.loads(Path(file).read_bytes()) if file and os.path.exists(file) else {}


def pooling_of(config: dict) -> str:
    """Our name of a Pooling module's pooling; older files have a flag for each instead."""
    flags = [flag for flag in config if flag.startswith("pooling_mode_") and config[flag] is True]
    modes = config.get("pooling_mode") or [flag.removeprefix("pooling_mode_") for flag in flags]
    modes = [modes] if isinstance(modes, str) else modes
    return " and ".join(POOLINGS.get(mode, mode) for mode in modes) or "mean"


def load_dense(model: str, revision: str, folder: str, config: dict) -> nn.Sequential:
    """A Dense module: a linear layer and its activation."""
    package, _, activation = config["activation_function"].rpartition(".")
    plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if not plain or config.get("use_residual") or not package.startswith("torch.nn"):
        raise ValueError(f"its Dense module is not supported here: {config}")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    file = model_file(model, revision, folder, "model.safetensors", "pytorch_model.bin")
    state = load_state_dict(file, weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): state[name] for name in state})
    return nn.Sequential(linear, getattr(nn, activation)())


def refuse_random_weights(model: nn.Module, missing: set[str], misshapen: set[tuple]) -> None:
    """Only weights that are not used here may be missing in the model's files: they become 0."""
    used = [name for name in missing if "pooler" not in name and not name.startswith("decoder.")]
    used += [name for name, *_ in misshapen]
    if used:
        raise ValueError(f"{len(used)} weights are missing or misshapen in its files: {min(used)}")
    for name, parameter in model.named_parameters():
        if name in missing:  # random, it would make the same model another one at each start
            nn.init.zeros_(parameter)


def most_tokens(model: nn.Module, *limits: int | None) -> int:
    """The least of these limits and the model's number of positions."""
    limits = [*limits, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, table in model.named_modules():
        padding = getattr(table, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(len(table.weight) - padding - 1)  # RoBERTa's begin behind the padding
    return min(limit for limit in limits if limit not in (None, -1))


def half_type(training: bool) -> torch.dtype:
    """bfloat16 if the GPU has it, since some models (EmbeddingGemma) overflow float16; and where it
    is slow, too, for training: float16 would need a scaled loss."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast or training else torch.float16


class TextEncoder(nn.Module):
    """A frozen text encoder: captions -> `tokenize` -> `forward` -> unit vectors [B, D]. Those of a
    sentence-transformers model's `encode(normalize_embeddings=True)`, a CLIP's projected features,
    or the states of a T5's encoder or the last layer of all others, pooled.

    `pooling` (a value of POOLINGS), `prefix`, `suffix` and `max_length` (in tokens) are what its
    files say where None. `pool_prefix=False`: the mean leaves out the prefix and BOS before it.
    `bidirectional`: an LLM's tokens attend to later ones, too. ValueError if that cannot be."""

    def __init__(
        self,
        model: str,
        *,
        revision: str = "main",
        trust_remote_code: bool = False,
        dtype: str = "auto",
        pooling: str | None = None,
        prefix: str | None = None,
        suffix: str | None = None,
        pool_prefix: bool = True,
        bidirectional: bool = False,
        max_length: int | None = None,
    ):
        super().__init__()
        self.name, self.revision, self.dtype = model, revision, dtype
        self.prefix, self.suffix, self.pooling, self.pool_prefix = "", "", "", True
        self.lower, self.dense = False, nn.Sequential()
        folder, limit = self.read_modules()
        source = {"subfolder": folder, "revision": revision, "trust_remote_code": trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(model, **source)
        source |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        self.model, loaded = AutoModel.from_pretrained(model, dtype=dtype, **source)
        refuse_random_weights(self.model, loaded["missing_keys"], loaded["mismatched_keys"])
        self.config = self.model.config
        projection = "projection" if hasattr(self.model, "get_text_features") else ""
        self.pooling = pooling or self.pooling or projection or "mean"
        if self.pooling not in ([projection] if projection else POOLINGS.values()):
            raise ValueError(f"its pooling {self.pooling} is not supported here")
        if self.config.is_encoder_decoder:
            self.model = self.model.get_encoder()
        self.model.config.use_cache = False  # one forward pass needs no cache of keys and values
        # SigLIP was trained on lower case and on padding up to the full length, unmasked
        siglip = "siglip" in self.config.model_type
        self.lower, self.fill = self.lower or siglip, siglip and self.pooling == "projection"
        limit = limit or self.tokenizer.model_max_length
        self.max_length = most_tokens(self.model, limit, max_length)
        self.set_frame(prefix, suffix, pool_prefix)
        config = self.model.config.get_text_config()
        if bidirectional and getattr(config, "is_causal", True):
            before = self([[0, 1, 2, 3]])
            config.is_causal = False
            if torch.equal(self([[0, 1, 2, 3]]), before):
                raise ValueError("bidirectional attention has no effect on it")
        self.bidirectional = not getattr(config, "is_causal", True)
        self.eval().requires_grad_(False)

    def read_modules(self) -> tuple[str, int | None]:
        """Settings in sentence-transformers' files; the transformer's folder and most tokens."""
        source = self.name, self.revision
        own = read_json(model_file(*source, "", "config_sentence_transformers.json"))
        self.prefix = (own.get("prompts") or {}).get(own.get("default_prompt_name")) or ""
        self.suffix = own.get("suffix", "")  # save_encoder's
        transformer, limit = "", None
        for module in read_json(model_file(*source, "", "modules.json")):
            kind, folder = module["type"].split(".")[-1], module["path"]
            name = "sentence_bert_config.json" if kind == "Transformer" else "config.json"
            config = read_json(model_file(*source, folder, name))
            if kind == "Transformer":
                if "message" in config.get("modality_config", {}):
                    raise ValueError("it wants chat messages, not texts: not supported here")
                transformer, limit = folder, config.get("max_seq_length")
                self.lower = config.get("do_lower_case", False)
            elif kind == "Pooling":
                self.pooling = pooling_of(config)
                self.pool_prefix = config.get("include_prompt", True)
            elif kind == "Dense":
                self.dense.append(load_dense(*source, folder, config))
            elif kind != "Normalize":
                raise ValueError(f"its sentence-transformers module {kind} is not supported here")
        return transformer, limit

    def set_frame(self, prefix: str | None, suffix: str | None, pool_prefix: bool) -> None:
        """What is put around a caption; how many tokens of it are not cut, and not pooled."""
        self.prefix = self.prefix if prefix is None else prefix
        self.suffix = self.suffix if suffix is None else suffix
        self.pool_prefix = self.pool_prefix and pool_prefix
        if not pool_prefix and (not self.prefix or self.pooling not in ("cls", "mean")):
            raise ValueError("there is no prefix, or no mean that could leave it out")
        if len(self.tokenizer) < len(self.tokenizer.all_special_ids) + 3:
            raise ValueError("its tokenizer knows no words: its files are missing")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        special = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        closing = special[::-1].index(0)  # [SEP] and the like
        opening = len(self.tokenizer(self.prefix)["input_ids"]) - closing
        ids = self.tokenizer(self.suffix, add_special_tokens=False)["input_ids"]
        self.tail = len(ids) + closing
        self.unpooled = 0 if self.pool_prefix or not self.prefix else opening
        if opening + self.tail >= self.max_length:
            raise ValueError(f"its {self.max_length} tokens leave none for a caption")

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], int]:
        """Token ids, `max_length` of a caption at most, and how many captions were cut."""
        texts = [self.prefix + caption + self.suffix for caption in captions]
        texts = [text.lower() for text in texts] if self.lower else texts
        fill = {"padding": "max_length", "max_length": self.max_length} if self.fill else {}
        ids = self.tokenizer(texts, verbose=False, **fill)["input_ids"]
        cut = [row for row in ids if len(row) > self.max_length]
        for row in cut:  # behind the caption's last token that fits, before the suffix
            del row[self.max_length - self.tail : len(row) - self.tail]
        return [row or [self.tokenizer.pad_token_id or 0] for row in ids], len(cut)

    def forward(self, token_ids: list) -> Tensor:
        """Unit vectors [B, D], float32, of B lists (or arrays) of token ids."""
        lengths, device = torch.tensor([len(row) for row in token_ids]), self.model.device
        longest, full = int(lengths.max()), bool((lengths == lengths[0]).all())
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in token_ids], batch_first=True)
        gpu = device.type == "cuda"  # which works on the batch before, and is not waited for
        ids, lengths = (x.to(device, non_blocking=gpu) for x in (ids, lengths))
        position = torch.arange(longest, device=device)
        kept = position < lengths[:, None]  # [B, T]
        mask = None if full else kept.long()
        half = gpu and self.dtype == "auto" and self.model.dtype == torch.float32
        with torch.autocast(device.type, half_type(self.training) if half else None, enabled=half):
            if self.pooling == "projection":
                features = self.model.get_text_features(input_ids=ids, attention_mask=mask)
                return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        last = lengths[:, None] - 1  # [B, 1]
        first = last.clamp(max=self.unpooled)  # an empty caption's last token stands for it
        one = {"cls": position == first, "last": position == last}
        pooled = one.get(self.pooling, kept & (position >= first)).float()[..., None]  # [B, T, 1]
        vectors = (states * pooled).sum(1) / pooled.sum(1)
        return F.normalize(self.dense(vectors), dim=-1)


def load_encoder(model: str, *, revision: str = "main", device: str, **options) -> TextEncoder:
    """The encoder, of the hub's present commit, on its device."""
    logging.set_verbosity_error()  # refuse_random_weights says what matters
    try:
        if not os.path.isdir(model):  # a branch may move before the next start
            file = model_file(model, revision, "", "modules.json", "config.json")
            revision = extract_commit_hash(file, None) or revision
        return TextEncoder(model, revision=revision, **options).to(device)
    except Exception as error:  # of any kind: damaged files, missing packages, remote code
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 250)
        raise SystemExit(f"--model {model}: cannot load it: {reason}") from error


class LoRA(nn.Module):
    """A frozen linear layer and a branch that learns, y = W x + (alpha / r) B A x, with alpha = 2 r
    and B zero at first (arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear, device = linear, linear.weight.device
        self.a = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.b = nn.Linear(rank, linear.out_features, bias=False, device=device)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + 2 * self.b(self.a(x.to(self.a.weight.dtype))).to(y.dtype)

    def merged(self) -> nn.Linear:
        self.linear.weight += (2 * self.b.weight @ self.a.weight).to(self.linear.weight.dtype)
        return self.linear


def caption_contrastive_loss(vectors: Tensor, texts: list, temperature: float = 0.05) -> Tensor:
    """Symmetric InfoNCE of vectors [2B, D], rows i and B + i from two captions of one image.
    Negatives are all other rows, unless they read the same as one of the two."""
    n, device = len(texts) // 2, vectors.device
    texts = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(device)
    partner = torch.arange(2 * n, device=device).roll(n)
    excluded = (texts[:, None] == texts) | (texts[partner][:, None] == texts)
    excluded[torch.arange(2 * n), partner] = False
    return F.cross_entropy((vectors @ vectors.T / temperature).masked_fill(excluded, -1e4), partner)


@torch.no_grad()
def caption_recall(encoder: TextEncoder, images: list[list[str]]) -> float:
    """Recall@1 in percent: each image's first caption retrieves its second one, and vice versa."""
    ids, _ = encoder.tokenize([captions[k] for k in (0, 1) for captions in images])
    vectors = torch.cat([encoder(ids[i : i + 32]) for i in range(0, len(ids), 32)]).cpu()
    similarity = vectors[: len(images)] @ vectors[len(images) :].T
    hits = [similarity.argmax(dim) == torch.arange(len(images)) for dim in (0, 1)]
    return 100 * torch.cat(hits).float().mean().item()


def tuning_data(captions: str, epochs: int, batch: int, seed: int) -> tuple[list, list]:
    """Batches of 2B captions, one of each of B images, then another one of each; and the different
    captions of the images that are held out, a tenth of those with two."""
    captions_of = {}
    for image, caption in read_captions(captions):
        captions_of.setdefault(image, {})[caption] = None  # keeps the order, drops repetitions
    images = [list(captions) for captions in captions_of.values() if len(captions) > 1]
    random.Random(seed).shuffle(images)
    count = min(1000, len(images) // 10)
    if len(images) - count < batch or not count:
        have = f"{len(images)} of {len(captions_of)} images have them, over {batch} must"
        raise SystemExit(f"--tune-epochs needs two captions of an image (--num-captions 2): {have}")
    held_out, images, batches, rng = images[:count], images[count:], [], random.Random(seed)
    for _ in range(epochs):
        rng.shuffle(images)
        for i in range(0, len(images) - batch + 1, batch):
            pairs = [rng.sample(captions, 2) for captions in images[i : i + batch]]
            batches.append([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    return batches, held_out


def tune(encoder: TextEncoder, batches: list[list[str]], lr: float | None, lora_rank: int) -> None:
    """Caption-contrastive tuning (LLM2CLIP, arXiv 2411.04997), which is supervised SimCSE."""
    if encoder.pooling == "projection" or len(encoder.dense) or encoder.config.is_encoder_decoder:
        raise SystemExit("--tune-epochs: no CLIP projection, Dense module or encoder-decoder")
    if encoder.model.device.type == "cuda" and encoder.model.supports_gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora_rank:
        for name, layer in list(encoder.named_modules()):
            if type(layer) is nn.Linear:
                encoder.set_submodule(name, LoRA(layer, lora_rank))
    else:
        encoder.float().requires_grad_(True)  # steps of 5e-5 vanish in bfloat16 weights
    optimizer = torch.optim.AdamW(encoder.parameters(), lr or (2e-4 if lora_rank else 5e-5))
    steps, warmup = len(batches), max(1, len(batches) // 10)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    encoder.train()
    for texts in tqdm(batches, unit="step", desc="tune"):
        loss = caption_contrastive_loss(encoder(encoder.tokenize(texts)[0]), texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.eval().requires_grad_(False)
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, LoRA):
            encoder.set_submodule(name, layer.merged())


def save_encoder(encoder: TextEncoder, folder: str) -> None:
    """A model folder that sentence-transformers reads, too (but it knows no suffix)."""
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    os.makedirs(f"{folder}/1_Pooling", exist_ok=True)
    kinds, package = {"": "Transformer", "1_Pooling": "Pooling"}, "sentence_transformers.models"
    modules = [{"name": k, "path": p, "type": f"{package}.{k}"} for p, k in kinds.items()]
    pooling = {f"pooling_mode_{flag}": name == encoder.pooling for flag, name in POOLINGS.items()}
    pooling["word_embedding_dimension"] = encoder.model.config.hidden_size
    pooling["include_prompt"] = encoder.pool_prefix
    transformer = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.lower}
    frame = {"prompts": {"caption": encoder.prefix}, "default_prompt_name": "caption"}
    write_json(f"{folder}/modules.json", modules)
    write_json(f"{folder}/1_Pooling/config.json", pooling)
    write_json(f"{folder}/sentence_bert_config.json", transformer)
    write_json(f"{folder}/config_sentence_transformers.json", frame | {"suffix": encoder.suffix})


def write_json(file: str, content: dict | list) -> None:
    Path(file + ".new").write_text(json.dumps(content, indent=1))
    os.replace(file + ".new", file)


def describe(encoder: TextEncoder, captions: str, out_dtype: str) -> dict:
    """All that the rows depend on; of each of the weights a sample, for they may be tuned again."""
    weights = hashlib.sha256()
    for value in encoder.parameters():
        sample = value.detach().flatten()[:: max(1, value.numel() // 256)]
        weights.update(sample.float().cpu().numpy().tobytes())
    with open(captions, "rb") as stream:
        content = hashlib.file_digest(stream, "sha256")
    return {
        "captions_sha256": content.hexdigest(),
        "model": encoder.name,
        "revision": encoder.revision,
        "weights_sha256": weights.hexdigest(),
        "pooling": encoder.pooling,
        "prefix": encoder.prefix,
        "suffix": encoder.suffix,
        "unpooled": encoder.unpooled,
        "bidirectional": encoder.bidirectional,
        "max_length": encoder.max_length,
        "dtype": encoder.dtype,
        "out_dtype": out_dtype,
    }


def lines_of_captions(file: str) -> Iterator[dict[str, list[int]]]:
    """{caption: numbers of its lines} of 16384 lines at a time; equal ones are encoded once."""
    lines = enumerate(caption for _, caption in read_captions(file))
    while chunk := list(itertools.islice(lines, 16384)):
        lines_of = {}
        for line, caption in chunk:
            lines_of.setdefault(caption, []).append(line)
        yield lines_of


def plan_batches(token_ids: list, batch_tokens: int) -> list[list[int]]:
    """Numbers of captions, the longest first (out of memory shows at once), batch by batch."""
    batches, order = [], sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    while order:
        fit = max(1, batch_tokens // len(token_ids[order[0]]))
        batches.append(order[:fit])
        order = order[fit:]
    return batches


def prepare_rows(out: str, plan: dict) -> None:
    """How a kill is survived: OUT.tmp holds the rows, OUT.tmp.done a byte per line, which becomes 1
    when its row is written, and OUT.tmp.plan the description of both. A killed run's are gone on
    with if it had the same plan; else they are made, none of them done."""
    rows = out + ".tmp"
    if os.path.exists(rows) and read_json(rows + ".plan") == plan:
        return
    Path(rows + ".plan").unlink(missing_ok=True)  # first: it never stands beside rows of another
    np.lib.format.open_memmap(rows, "w+", plan["out_dtype"], (plan["rows"], plan["width"])).flush()
    if hasattr(os, "posix_fallocate"):  # a full disk says so now; later it would kill the process
        with open(rows, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.path.getsize(rows))
    np.zeros(plan["rows"], np.uint8).tofile(rows + ".done")
    write_json(rows + ".plan", plan)


def encode_captions(encoder: TextEncoder, captions: str, out: str, batch_tokens: int) -> tuple:
    """Write the rows of this rank's batches, and tick them off; lines/s, number of cut captions."""
    rows = np.lib.format.open_memmap(out + ".tmp", "r+")
    done = np.memmap(out + ".tmp.done", np.uint8, "r+")
    (rank, world), cores, cut = process_rank(), torch.get_num_threads(), 0
    left, started = int((done == 0).sum()), time.perf_counter()
    bar = tqdm(total=left, unit="caption", desc="embed", smoothing=0.02, disable=rank > 0)
    # A batch per core is 1.17 times as fast as one on all; a GPU's are launched without waiting.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(cores if encoder.model.device.type == "cpu" else 1)
    with pool, bar:
        for lines_of in lines_of_captions(captions):
            token_ids, number = encoder.tokenize(list(lines_of))
            cut, lines_of = cut + number, list(lines_of.values())
            missing = {i for i, lines in enumerate(lines_of) if not done[lines].all()}
            batches = plan_batches(token_ids, batch_tokens)[rank::world]
            batches = list(filter(None, ([i for i in batch if i in missing] for batch in batches)))
            encoded = pool.map(encoder, ([token_ids[i] for i in batch] for batch in batches))
            with contextlib.closing(encoded):  # after an error, the batches that wait are dropped
                for batch, vectors in zip(batches, encoded, strict=True):
                    if not vectors.isfinite().all():
                        raise SystemExit("vectors are not finite: use --dtype bfloat16 or float32")
                    for i, vector in zip(batch, vectors.cpu().numpy(), strict=True):
                        rows[lines_of[i]] = vector
                    written = [line for i in batch for line in lines_of[i]]
                    done[written] = 1  # after the rows: a kill in between repeats the batch
                    bar.update(len(written) * world)
    torch.set_num_threads(cores)
    return left / (time.perf_counter() - started), cut


def finish(out: str, metadata: str, plan: dict) -> None:
    """Give the rows their name, which is the last step that counts, and remove the rest."""
    if not np.fromfile(out + ".tmp.done", np.uint8).all():
        raise SystemExit(f"{out}.tmp.done lacks captions: does another embed.py write it?")
    Path(out).unlink(missing_ok=True)  # first: a description never stands beside rows of another
    write_json(metadata, plan)
    os.replace(out + ".tmp", out)
    for suffix in ".done", ".plan":
        os.remove(out + ".tmp" + suffix)


def main() -> None:
    args = parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # no rank outlives a killed torchrun, beside its successor
        if os.getppid() == 1 and not re.search("torch|launch", Path("/proc/1/cmdline").read_text()):
            raise SystemExit("torchrun was killed before this process had started")
    if args.world > 1:  # only for waiting: a rank may be hours ahead of another
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    wait = dist.barrier if args.world > 1 else lambda: None
    count = sum(1 for _ in read_captions(args.captions))  # all are read before a model is loaded
    load = functools.partial(
        load_encoder, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    encoder = load(
        args.model,
        revision=args.revision,
        pooling=args.pooling,
        prefix=args.prefix,
        suffix=args.suffix,
        pool_prefix=not args.no_pool_prefix,
        bidirectional=args.bidirectional,
        max_length=args.max_length,
    )
    if args.tune_epochs:
        batches, held_out = tuning_data(args.captions, args.tune_epochs, args.tune_batch, args.seed)
        before = caption_recall(encoder, held_out)
        torch.manual_seed(args.seed)
        tune(encoder, batches, args.tune_lr, args.lora_rank)
        recall = f"{before:.1f} % before, {caption_recall(encoder, held_out):.1f} % after"
        print(f"{args.tuned_out}: recall@1 of {len(held_out)} held-out images' captions {recall}")
        save_encoder(encoder, args.tuned_out)
        del encoder  # its folder says how it is used
        encoder = load(args.tuned_out)
    width = encoder(encoder.tokenize(["a"])[0]).shape[1]
    plan = describe(encoder, args.captions, args.out_dtype) | {"rows": count, "width": width}
    if os.path.exists(args.out) and read_json(args.metadata) == plan:
        if args.rank == 0:
            print(f"{args.out}: nothing to do, it holds these captions' embeddings already")
        return
    if args.rank == 0:
        prepare_rows(args.out, plan)
    wait()
    speed, cut = encode_captions(encoder, args.captions, args.out, args.batch_tokens)
    wait()
    if args.rank == 0:
        finish(args.out, args.metadata, plan)
        size = f"{count} x {width} {args.out_dtype}, {speed:.0f} captions/s"
        print(f"{args.out}: {size}; {cut} captions were cut at {encoder.max_length} tokens")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except torch.OutOfMemoryError as error:
        less = "start again with a smaller --batch-tokens (--tune-batch); what is done stays done"
        raise SystemExit(f"out of memory: {less}") from error
    except IndexError as error:
        raise SystemExit(f"a token is beyond the model's table of them: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on") from None
