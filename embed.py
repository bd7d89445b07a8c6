"""Embed captions with a frozen text encoder: stage 2 of 4 (caption -> embed -> train -> evaluate).

In:  --captions FILE.jsonl  one JSON object with a "caption" per line
Out: --out FILE.npy         float16 (or float32) array [lines, width]; row i is line i's embedding, of length 1
     FILE.json              which captions (SHA-256) and which encoder the rows belong to: train.py refuses any others

Launch:
    python embed.py --captions captions.jsonl                                         # all-MiniLM-L6-v2, 384-d
    python embed.py --captions captions.jsonl --model openai/clip-vit-base-patch32    # the paper's kind of encoder
    torchrun --nproc_per_node=8 embed.py --captions captions.jsonl --model microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned
    python embed.py --captions captions.jsonl --model meta-llama/Llama-3.2-1B --tune-epochs 1 --lora-rank 16 --tuned-out tuned    # LLM2CLIP

Kill it at any moment and run the same line again: it goes on with the batches that are missing (tuning starts over). Memory does not
grow with the captions (tuning holds them all): token ids wait in a file, rows go through a memory map; an index of some 50 bytes per
caption stays in memory.
"""

import argparse
import collections
import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

DEFAULT_MODEL = (
    "sentence-transformers/all-MiniLM-L6-v2"  # small, fast, the most used sentence encoder there is
)
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",  # sentence-transformers' older names,
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}  # in its order of concatenation


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--captions", default="captions.jsonl", help="default: captions.jsonl")
    p.add_argument("--out", default="embeddings.npy", help="default: embeddings.npy")
    p.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"hub id or folder of a text encoder; default: {DEFAULT_MODEL}",
    )
    p.add_argument(
        "--pooling",
        default="auto",
        choices=["auto", "mean", "cls", "last"],
        help="auto: what the model's sentence-transformers files say, the projected features of CLIP, else the mean; default: auto",
    )
    p.add_argument(
        "--prefix",
        help='put before each caption ("query: "); default: the default prompt of the model\'s sentence-transformers files',
    )
    p.add_argument(
        "--max-length", type=int, help="tokens kept of a caption; default: the model's own limit"
    )
    p.add_argument(
        "--batch-size", type=int, default=1024, help="most captions in a batch; default: 1024"
    )
    p.add_argument(
        "--batch-tokens",
        type=int,
        help="most tokens in a batch, padding included; default: 1024 on a CPU, 32768 on a GPU",
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
        help="of the weights; auto: as saved, float32 ones under float16 autocast on a GPU; default: auto",
    )
    p.add_argument(
        "--out-dtype",
        default="float16",
        choices=["float16", "float32"],
        help="of the rows on disk; default: float16",
    )
    p.add_argument(
        "--tune-epochs",
        type=int,
        default=0,
        metavar="N",
        help="caption-contrastive tuning (LLM2CLIP) before embedding; needs images with two captions; default: 0",
    )
    p.add_argument(
        "--tuned-out",
        default="tuned",
        metavar="DIR",
        help="where the tuned encoder is saved: a model folder like any other; default: tuned",
    )
    p.add_argument(
        "--tune-batch",
        type=int,
        default=64,
        help="images, of two captions each, per step; default: 64",
    )
    p.add_argument(
        "--tune-lr",
        type=float,
        help="peak learning rate; default: 2e-4 with --lora-rank (LLM2CLIP's), else 5e-5",
    )
    p.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        metavar="R",
        help="train low-rank updates of the linear layers only, so that an 8B model fits one GPU; LLM2CLIP: 16; default: 0, all weights",
    )
    p.add_argument("--seed", type=int, default=0, help="of the tuning")
    p.add_argument(
        "--revision", default="main", help="branch, tag or commit of a hub model; default: main"
    )
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model: only if you have read it",
    )
    args = p.parse_args()
    args.batch_tokens = args.batch_tokens or (32768 if args.device.startswith("cuda") else 1024)
    for wrong, sentence in (
        (
            min(args.batch_size, args.batch_tokens, (args.max_length or 3) - 2, args.tune_batch) < 1
            or args.max_length == 0,
            "--batch-size, --batch-tokens and --tune-batch start at 1, --max-length at 3",
        ),
        (
            args.device.startswith("cuda") and not torch.cuda.is_available(),
            "--device cuda: this machine has no GPU that torch can use",
        ),
        (
            not os.path.isdir(os.path.dirname(args.out) or ".") or not args.out.endswith(".npy"),
            f"--out {args.out}: a name that ends in .npy, in a folder that exists",
        ),
        (
            args.model.startswith((".", "/")) and not os.path.isdir(args.model),
            f"--model {args.model}: there is no such folder",
        ),
        (
            args.captions == args.out.removesuffix(".npy") + ".json",
            f"--out {args.out}: its description would replace the captions; choose another name",
        ),
        (
            (args.lora_rank or args.tune_lr) and not args.tune_epochs,
            "--lora-rank and --tune-lr do nothing without --tune-epochs",
        ),
        (
            args.tune_epochs and "WORLD_SIZE" in os.environ,
            "--tune-epochs runs in one process: tune first, then embed with torchrun and --model DIR",
        ),
    ):
        if wrong:
            p.error(sentence)
    return args


# ----------------------------------------------------------------------------------------------------------- the encoder


def read_json(args: argparse.Namespace, name: str) -> dict | list | None:
    """A JSON file of the model (a folder or a hub id), None if it has no such file."""
    try:
        file = cached_file(
            args.model, name, revision=args.revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        raise SystemExit(
            f"--model {args.model}: cannot load it: {str(error).strip().splitlines()[0]}"
        )
    return json.load(open(file, encoding="utf-8")) if file else None


class TextEncoder(nn.Module):
    """A frozen text encoder of any kind: token ids [B, T] and mask [B, T] (or None: no padding) in, unit vectors [B, D] out.

    sentence-transformers models are read from their own files (modules.json and what it names) and give the same vectors as
    `SentenceTransformer.encode(normalize_embeddings=True)`; CLIP-style models give their projected text features; T5-style
    ones their encoder's states, all others their last hidden states, pooled by `--pooling` (the mean by default).
    """

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        source = dict(revision=args.revision, trust_remote_code=args.trust_remote_code)
        self.poolings, self.include_prompt, self.prompt_tokens, self.dense = (
            ("mean",),
            True,
            0,
            nn.ModuleList(),
        )
        modules, self.lower, limit, where = read_json(args, "modules.json"), False, None, {}
        prompts = read_json(args, "config_sentence_transformers.json") or {}
        self.prefix = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or ""
        for module in modules or []:
            kind, path = module["type"].split(".")[-1], module["path"]
            config = read_json(args, f"{path}/config.json") if path else None
            if kind == "Transformer":
                where = {"subfolder": path} if path else {}
                settings = (
                    read_json(
                        args,
                        f"{path}/sentence_bert_config.json"
                        if path
                        else "sentence_bert_config.json",
                    )
                    or {}
                )
                self.lower, limit = (
                    settings.get("do_lower_case", False),
                    settings.get("max_seq_length"),
                )
            elif kind == "Pooling":
                modes = config.get("pooling_mode") or [
                    POOLINGS.get(key, key)
                    for key in (*POOLINGS, *config.keys() - POOLINGS)
                    if key.startswith("pooling_mode_") and config.get(key) is True
                ]
                self.poolings = tuple(
                    mode.replace("lasttoken", "last")
                    for mode in ([modes] if isinstance(modes, str) else modes)
                )
                self.include_prompt = config.get("include_prompt", True)
            elif (
                kind == "Dense"
                and config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
                and not config.get("use_residual")
            ):
                self.dense.append(self.load_dense(args, path, config))
            elif kind != "Normalize":
                raise SystemExit(
                    f"--model {args.model}: its sentence-transformers module {module['type']} is not supported here: use a model of Transformer, Pooling, Dense and Normalize modules"
                )
        transformers_logging.set_verbosity_error()  # its report of missing weights; the ones that matter are refused below
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(args.model, **where, **source)
            config = AutoConfig.from_pretrained(args.model, **where, **source)
            self.model, loaded = AutoModel.from_pretrained(
                args.model, dtype=args.dtype, output_loading_info=True, **where, **source
            )
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"--model {args.model}: cannot load it: {str(error).strip().splitlines()[0]}"
            )
        missing = [
            name
            for name in loaded["missing_keys"]
            if "pooler" not in name and not name.startswith("decoder.")
        ]  # parts that are not used here
        if missing:
            raise SystemExit(
                f"--model {args.model}: its files have no weights for {len(missing)} parts, {min(missing)} for one: embeddings would be random"
            )
        for name, parameter in self.model.named_parameters():
            if name in loaded["missing_keys"]:
                nn.init.zeros_(
                    parameter
                )  # unused; random, it would make the same model another one each time it is loaded
        self.clip = hasattr(self.model, "get_text_features") and modules is None
        self.fill = (
            self.clip and "siglip" in config.model_type
        )  # it was trained on padding up to the full length, unmasked
        if config.is_encoder_decoder:
            self.model = self.model.get_encoder()
        if args.pooling != "auto":
            self.poolings, self.clip, self.fill, self.model = (
                (args.pooling,),
                False,
                False,
                getattr(self.model, "text_model", self.model),
            )
        self.prefix = self.prefix if args.prefix is None else args.prefix
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if (
            self.prefix and not self.include_prompt
        ):  # the same count as sentence-transformers: without a closing special token
            ids = self.tokenizer(self.prefix)["input_ids"]
            self.prompt_tokens = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        limits = [
            limit or self.tokenizer.model_max_length,
            getattr(config.get_text_config(), "max_position_embeddings", None),
        ]
        self.max_length = min(value for value in (*limits, args.max_length) if value and value > 0)
        self.model.config.use_cache = False  # one forward pass needs no cache of keys and values

    @staticmethod
    def load_dense(args: argparse.Namespace, path: str, config: dict) -> nn.Module:
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
        file = cached_file(args.model, f"{path}/model.safetensors", revision=args.revision)
        linear.load_state_dict(
            {name.removeprefix("linear."): value for name, value in load_file(file).items()}
        )
        activation = getattr(nn, config["activation_function"].split(".")[-1], None)
        if activation is None or not config["activation_function"].startswith("torch.nn."):
            raise SystemExit(
                f"--model {args.model}: unknown activation {config['activation_function']} in {path}"
            )
        return nn.Sequential(linear, activation())

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids, cut at `max_length`, and the number of tokens of the uncut caption."""
        texts = [(self.prefix + c).lower() if self.lower else self.prefix + c for c in captions]
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        lengths = [len(i) for i in ids]
        long = [k for k, length in enumerate(lengths) if length > self.max_length]
        if long:  # cut by the tokenizer, which knows where the closing special tokens go
            for k, cut in zip(
                long,
                self.tokenizer(
                    [texts[k] for k in long], truncation=True, max_length=self.max_length
                )["input_ids"],
            ):
                ids[k] = cut
        if self.fill:
            ids = [
                row + [self.tokenizer.pad_token_id] * (self.max_length - len(row)) for row in ids
            ]
        return ids, lengths

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.clip:
            features = self.model.get_text_features(input_ids=ids, attention_mask=mask)
            return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
        states = self.model(
            input_ids=ids, attention_mask=mask
        ).last_hidden_state.float()  # [B, T, D]
        mask = torch.ones_like(ids) if mask is None else mask
        keep = (
            mask * (torch.arange(ids.shape[1], device=ids.device) >= self.prompt_tokens)
        ).float()[..., None]  # [B, T, 1]
        pooled = []
        for pooling in self.poolings:
            if pooling == "mean":
                pooled.append((states * keep).sum(1) / keep.sum(1).clamp(min=1e-9))
            elif pooling == "weightedmean":
                weights = keep * torch.arange(1, ids.shape[1] + 1, device=ids.device)[None, :, None]
                pooled.append((states * weights).sum(1) / weights.sum(1).clamp(min=1e-9))
            elif pooling == "max":
                pooled.append(states.masked_fill(keep == 0, float("-inf")).amax(1))
            elif pooling == "cls":
                pooled.append(states[:, min(self.prompt_tokens, ids.shape[1] - 1)])
            elif pooling == "last":
                pooled.append(states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])
            else:
                raise SystemExit(f"pooling '{pooling}' is not known here")
        vectors = torch.cat(pooled, dim=-1)
        for dense in self.dense:
            vectors = dense(vectors)
        return F.normalize(vectors, dim=-1)


# ------------------------------------------------------------- caption-contrastive tuning (LLM2CLIP, arXiv 2411.04997)


class LoRA(nn.Module):
    """Parametrization of a frozen weight [out, in]: W + 2 B A, B [out, R] starting at zero."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.a = nn.Parameter(
            torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5
        )
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 2 * (self.b @ self.a).to(weight.dtype)


def add_lora(model: nn.Module, rank: int) -> list[nn.Module]:
    """Freeze the model and put a LoRA on each linear layer; the layers, for `parametrize.remove_parametrizations` to merge."""
    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return layers


def caption_contrastive_loss(
    vectors: torch.Tensor, texts: list[str], temperature: float = 0.05
) -> torch.Tensor:
    """Symmetric InfoNCE of vectors [2B, D], rows i and B + i from two captions of one image; negatives are all others, unless they read
    the same as one of the two."""
    n = len(texts) // 2
    texts = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(vectors.device)
    partner = (torch.arange(2 * n, device=vectors.device) + n) % (2 * n)
    excluded = (texts[:, None] == texts) | (
        texts[partner][:, None] == texts
    )  # itself, and equal sentences under other images
    excluded[torch.arange(2 * n), partner] = False
    return F.cross_entropy((vectors @ vectors.T / temperature).masked_fill(excluded, -1e4), partner)


def encode_texts(encoder: TextEncoder, texts: list[str], device: torch.device) -> torch.Tensor:
    """[len(texts), D], in one padded batch."""
    ids, _ = encoder.tokenize(texts)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in ids],
        batch_first=True,
        padding_value=encoder.tokenizer.pad_token_id or 0,
    ).to(device)
    return encoder(padded, (torch.arange(padded.shape[1], device=device) < lengths[:, None]).long())


@torch.inference_mode()
def caption_recall(encoder: TextEncoder, pairs: list[list[str]], device: torch.device) -> float:
    """Recall@1 in percent: the first caption of each image retrieves its second among all second ones, and the other way round."""
    a, b = (
        torch.cat(
            [
                encode_texts(encoder, [pair[k] for pair in pairs[i : i + 32]], device)
                for i in range(0, len(pairs), 32)
            ]
        )
        for k in (0, 1)
    )
    own = torch.arange(len(pairs), device=device)
    return 50 * float(
        ((a @ b.T).argmax(1) == own).float().mean() + ((b @ a.T).argmax(1) == own).float().mean()
    )


def read_pairs(args: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """The different captions of each image that has two, for tuning and held out (a tenth, at most 1000)."""
    captions_of = {}
    for image, caption in read_captions(args.captions):
        captions_of.setdefault(image, {})[caption] = (
            None  # a dict keeps the order and drops repetitions
        )
    images = [list(captions) for captions in captions_of.values() if len(captions) > 1]
    random.Random(args.seed).shuffle(images)
    held_out, images = (
        images[: min(1000, len(images) // 10)],
        images[min(1000, len(images) // 10) :],
    )
    if len(images) < args.tune_batch or not held_out:
        raise SystemExit(
            f"--tune-epochs needs images with two different captions: {len(images) + len(held_out)} of {len(captions_of)} images have them, {args.tune_batch} and a tenth of them to be held out "
            "are needed. Give caption.py two --prompt options, or --num-captions 2 --temperature 0.7"
        )
    return images, held_out


def tune(
    encoder: TextEncoder,
    args: argparse.Namespace,
    device: torch.device,
    images: list[list[str]],
    held_out: list[list[str]],
) -> None:
    """Supervised SimCSE on captions: two different captions of an image attract each other. Saves the encoder to `--tuned-out`."""
    if (
        encoder.clip
        or encoder.dense
        or encoder.prompt_tokens
        or len(encoder.poolings) > 1
        or encoder.model.config.is_encoder_decoder
    ):
        raise SystemExit(
            "--tune-epochs takes encoders and decoders with one plain pooling, no projection and no Dense module"
        )
    if not args.lora_rank:
        encoder.float()  # steps of 5e-5 vanish in bfloat16 weights
    rng = random.Random(args.seed)
    before, steps = (
        caption_recall(encoder, held_out, device),
        args.tune_epochs * (len(images) // args.tune_batch),
    )
    if device.type == "cuda" and encoder.model.supports_gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable()
        encoder.model.enable_input_require_grads()
    torch.manual_seed(args.seed)
    lora = add_lora(encoder.model, args.lora_rank) if args.lora_rank else []
    peak = args.tune_lr or (2e-4 if lora else 5e-5)
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), 1 - step / steps)
    )  # warm up, then decay
    encoder.train()
    bar, autocast = (
        tqdm(total=steps, unit="step", desc="tune"),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    )
    for _ in range(args.tune_epochs):
        rng.shuffle(images)
        for i in range(0, len(images) - args.tune_batch + 1, args.tune_batch):
            texts = [
                text
                for pair in zip(
                    *(rng.sample(captions, 2) for captions in images[i : i + args.tune_batch])
                )
                for text in pair
            ]
            with autocast:
                vectors = encode_texts(encoder, texts, device)
            loss = caption_contrastive_loss(vectors, texts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    bar.close()
    for layer in lora:
        parametrize.remove_parametrizations(layer, "weight")  # merges
    encoder.eval()
    after = caption_recall(encoder, held_out, device)
    encoder.model.save_pretrained(args.tuned_out)
    encoder.tokenizer.save_pretrained(args.tuned_out)
    mode = {name: key for key, name in POOLINGS.items() if key.startswith("pooling_mode_")}[
        encoder.poolings[0]
    ]
    for name, content in (
        (
            "modules.json",
            [
                {
                    "idx": 0,
                    "name": "0",
                    "path": "",
                    "type": "sentence_transformers.models.Transformer",
                },
                {
                    "idx": 1,
                    "name": "1",
                    "path": "1_Pooling",
                    "type": "sentence_transformers.models.Pooling",
                },
            ],
        ),
        (
            "sentence_bert_config.json",
            {"max_seq_length": encoder.max_length, "do_lower_case": encoder.lower},
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"caption": encoder.prefix}, "default_prompt_name": "caption"},
        ),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": encoder.model.config.hidden_size, mode: True},
        ),
    ):
        file = os.path.join(args.tuned_out, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        write_json(file, content)
    print(
        f"{args.tuned_out}: tuned on {len(images)} images; caption-to-caption recall@1 on {len(held_out)} held-out images {before:.1f} % before, {after:.1f} % after"
    )


# -------------------------------------------------------------------------------------------------------------- the work


def read_captions(file: str):
    """Yield (image, caption) of a jsonl file in order; a line without them is an error that names it."""
    number = 0
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                line = json.loads(line)
                yield (
                    line["image"],
                    line["caption"].encode("utf-8", "replace").decode(),
                )  # lone surrogates would stop the tokenizer
    except OSError as error:
        raise SystemExit(f"--captions {file}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f'{file}, line {number}: no JSON object with an "image" and a "caption" ({error!r}): not a file of caption.py, or one that it has not finished'
        )
    if not number:
        raise SystemExit(f"{file} is empty: run caption.py first")


def sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a sample of every weight: a model that was tuned again under the same name is another one."""
    digest = hashlib.sha256()
    for value in model.parameters():
        digest.update(
            value.detach()
            .flatten()[:: max(1, value.numel() // 256)]
            .float()
            .cpu()
            .numpy()
            .tobytes()
        )
    return digest.hexdigest()


def write_tokens(
    encoder: TextEncoder, captions: str, file: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise all captions into `file` (int32, one after the other): lengths [N], uncut lengths [N], 128-bit hashes [N]."""
    lengths, uncut, hashes, chunk = [], [], [], []

    def flush() -> None:
        ids, full = encoder.tokenize(chunk)
        rows = [np.array(row, np.int32) for row in ids]
        lengths.append(np.array([len(row) for row in rows], np.int32))
        uncut.append(np.array(full, np.int32))
        hashes.append(
            np.frombuffer(
                b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows),
                "V16",
            )
        )
        stream.write(np.concatenate(rows).tobytes())
        chunk.clear()

    with open(file, "wb") as stream:
        for _, caption in tqdm(read_captions(captions), unit="caption", desc="tokenise"):
            chunk.append(caption)
            if len(chunk) == 4096:
                flush()
        if chunk:
            flush()
    return np.concatenate(lengths), np.concatenate(uncut), np.concatenate(hashes)


def plan_batches(lengths: np.ndarray, batch_size: int, batch_tokens: int) -> list[tuple[int, int]]:
    """Slices of captions sorted by length, longest first (out of memory shows at once), each within both limits."""
    slices, start = [], 0
    while start < len(lengths):
        end = start + max(1, min(batch_size, batch_tokens // max(1, int(lengths[start]))))
        slices.append((start, min(end, len(lengths))))
        start = end
    return slices


def write_json(file: str, content: dict | list) -> None:
    with open(file + ".new", "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
    os.replace(file + ".new", file)


def main() -> None:
    args = parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: no rank outlives a torchrun that is killed, writing beside its successor
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group(
            "gloo", timeout=timedelta(days=7)
        )  # only for waiting: a rank may be hours ahead of another
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    device = torch.device(args.device)
    for _ in read_captions(args.captions):
        pass  # a wrong line is found before the model is loaded
    images, held_out = read_pairs(args) if args.tune_epochs else ([], [])
    identity = {
        "captions": os.path.basename(args.captions),
        "captions_sha256": sha256(args.captions),
    }
    encoder = TextEncoder(args).to(device).eval()
    if args.tune_epochs:
        tune(encoder, args, device, images, held_out)
        args.model, args.revision, args.prefix = args.tuned_out, "main", None
        del encoder
        encoder = TextEncoder(args).to(device).eval()
    identity |= {
        "model": args.model,
        "revision": args.revision,
        "pooling": "projection" if encoder.clip else "+".join(encoder.poolings),
        "weights_sha256": fingerprint(encoder),
        "prefix": encoder.prefix,
        "max_length": encoder.max_length,
        "dtype": args.dtype,
        "out_dtype": args.out_dtype,
    }
    metadata, temporary = args.out.removesuffix(".npy") + ".json", args.out + ".tmp"
    if os.path.exists(args.out) and os.path.exists(metadata):
        known = json.load(open(metadata, encoding="utf-8"))
        if {key: known.get(key) for key in identity} == identity:
            return (
                print(f"{args.out}: nothing to do, it holds these captions' embeddings already")
                if rank == 0
                else None
            )

    index = [write_tokens(encoder, args.captions, temporary + ".tokens") if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(index)
    lengths, uncut, hashes = index.pop()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]])
    _, first, inverse = np.unique(
        hashes, return_index=True, return_inverse=True
    )  # equal captions are encoded once
    order = np.lexsort(
        (first, -lengths[first])
    )  # unique captions, longest first, then in the file's order
    lines = np.argsort(inverse, kind="stable")  # lines grouped by unique caption ...
    ends = np.concatenate(
        [[0], np.cumsum(np.bincount(inverse))]
    )  # ... those of caption u are lines[ends[u]:ends[u + 1]]
    del hashes
    batches = plan_batches(lengths[first[order]], args.batch_size, args.batch_tokens)
    width = encoder(torch.tensor([encoder.tokenize(["a"])[0][0]], device=device), None).shape[1]

    plan = identity | {"batch_size": args.batch_size, "batch_tokens": args.batch_tokens}
    if rank == 0:
        resumed = (
            os.path.exists(temporary)
            and os.path.exists(temporary + ".plan")
            and json.load(open(temporary + ".plan", encoding="utf-8")) == plan
        )
        if not resumed:
            if os.path.exists(temporary + ".plan"):
                os.remove(temporary + ".plan")  # first: a plan never stands beside rows of another
            np.lib.format.open_memmap(
                temporary, "w+", args.out_dtype, (len(lengths), width)
            ).flush()
            if hasattr(
                os, "posix_fallocate"
            ):  # a disk without room for all rows says so now: later, the memory map would kill the process
                with open(temporary, "r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
            np.zeros(len(batches), np.uint8).tofile(temporary + ".done")
            write_json(temporary + ".plan", plan)
    if world > 1:
        dist.barrier()
    rows = np.lib.format.open_memmap(temporary, "r+")
    done = np.memmap(temporary + ".done", np.uint8, "r+")
    todo = [b for b in range(len(batches)) if b % world == rank and not done[b]]
    if world > 1:
        dist.barrier()  # everybody has seen the same list before anybody ticks off a batch

    half = args.dtype == "auto" and device.type == "cuda" and encoder.model.dtype == torch.float32
    bar = tqdm(
        total=int(sum(batches[b][1] - batches[b][0] for b in todo)),
        unit="caption",
        desc="embed",
        smoothing=0.02,
        disable=rank > 0,
    )
    start, padding, tokens = (
        time.perf_counter(),
        encoder.tokenizer.pad_token_id or 0,
        np.memmap(temporary + ".tokens", np.int32, "r"),
    )

    def to_device(array: np.ndarray) -> torch.Tensor:
        return (
            torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
            if device.type == "cuda"
            else torch.from_numpy(array)
        )

    @torch.inference_mode()
    def encode(batch: int) -> tuple[int, torch.Tensor, "torch.cuda.Event | None"]:
        captions = first[order[slice(*batches[batch])]]
        ids = np.full((len(captions), lengths[captions[0]]), padding, np.int64)
        for row, c in zip(ids, captions):
            row[: lengths[c]] = tokens[offsets[c] : offsets[c] + lengths[c]]
        mask = (
            None
            if lengths[captions[-1]] == ids.shape[1]
            else to_device((np.arange(ids.shape[1]) < lengths[captions][:, None]).astype(np.int64))
        )
        with torch.autocast(device.type, torch.float16, enabled=half):
            vectors = encoder(to_device(ids), mask).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
        return batch, vectors, copied

    def store(batch: int, vectors: torch.Tensor, copied: "torch.cuda.Event | None") -> None:
        if copied:
            copied.synchronize()
        unique = order[slice(*batches[batch])]
        if not vectors.isfinite().all():
            raise SystemExit(
                f"the encoder's output is not finite in {args.dtype if args.dtype != 'auto' else 'float16 autocast'}: use --dtype bfloat16 or float32"
            )
        for u, vector in zip(unique, vectors.numpy()):
            rows[lines[ends[u] : ends[u + 1]]] = vector
        done[batch] = 1  # after its rows: a kill in between repeats the batch
        bar.update(len(unique))

    # On a GPU, a batch is computed while the one before is fetched and written. On a CPU, as many batches side by side as there are
    # threads, a thread each, are 1.17 times as fast as one batch on all threads.
    lanes, pending = torch.get_num_threads() if device.type == "cpu" else 1, collections.deque()
    if device.type == "cpu":
        torch.set_num_threads(1)
    on_gpu = (
        dict(initializer=torch.cuda.set_device, initargs=(device,)) if device.type == "cuda" else {}
    )  # the current GPU is each thread's own
    with ThreadPoolExecutor(lanes, **on_gpu) as pool:
        for batch in todo:
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * lanes:
                store(*pending.popleft().result())
        while pending:
            store(*pending.popleft().result())
    if device.type == "cpu":
        torch.set_num_threads(lanes)
    bar.close()
    rows.flush()
    if world > 1:
        dist.barrier()
    if rank == 0:
        seconds = time.perf_counter() - start
        if not done.all():
            raise SystemExit(
                f"{temporary}.done misses batches: is another embed.py writing to the same --out? Start one of them again"
            )
        write_json(temporary + ".json", identity | {"rows": len(lengths), "width": width})
        if os.path.exists(metadata):
            os.remove(
                metadata
            )  # in this order: at no moment does a metadata file describe another array
        os.replace(temporary, args.out)
        os.replace(temporary + ".json", metadata)
        for suffix in (".done", ".plan", ".tokens"):
            os.remove(temporary + suffix)
        cut = uncut[uncut > encoder.max_length]
        print(
            f"{args.out}: {len(lengths)} x {width} {args.out_dtype}, {len(first)} different captions, {bar.total / max(seconds, 1e-9) * world:.0f} captions/s; {len(cut)} captions were cut at "
            f"{encoder.max_length} tokens"
            + (f", by {int(np.median(cut - encoder.max_length))} at the median" if len(cut) else "")
        )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(
            f"{error.filename or 'disk'}: {error.strerror or error}; start the same command again to go on"
        )
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start the same command again to go on")
