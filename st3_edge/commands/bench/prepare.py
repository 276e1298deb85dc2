"""From the command line to what both sides are to do: files, libraries, and whether memory holds them."""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import NamedTuple

from ... import demo
from ...config import Override, ST3Config
from ...errors import ConfigError, LibraryError, ModelError, PromptError
from ...files import choose, gguf
from ...files.output import cache_folder
from ...files.pair import check_pair
from ...native import libraries, machine
from ...prompts import images
from .. import options, which
from ..console import Console
from .cache import Tell, random_text, random_vision
from .options import QUESTION, TEXT
from .shapes import CLIP_L_336, SHAPES, TYPES
from .worker import Job

_GRAPHS = 2**29  # bytes that graphs and outputs of a context take, about


def find_stock(against: str | None, given: str | None) -> tuple[Path | None, str | None]:
    """The folder of the stock llama.cpp that is compared with, None: our own libraries with pruning off; and a remark
    where nobody asked for that. Raises LibraryError where there is none and `against` or `given` asks for it."""
    if against == "off":
        return None, None
    asked = given or os.environ.get("ST3_STOCK_LIB_DIR")
    checkout = Path(__file__).resolve().parents[3] / "build" / "stock" / "lib"
    folder = Path(asked or checkout).resolve()
    missing = [name for name in ("llama", "mtmd") if not libraries.stock_path(folder, name).is_file()]
    if not missing:
        return folder, None
    library = libraries.stock_path(folder, missing[0])
    how = "build it in a checkout (cmake -S . -B build/stock -G Ninja -DST3_STOCK=ON && cmake --build build/stock)"
    if asked or against:
        raise LibraryError(
            f"no stock llama.cpp: {library} is missing; {how} and name its folder with --stock, or compare with "
            "pruning off: --against off"
        )
    return None, f"no stock llama.cpp here, so ST3 is compared with pruning off. For stock, {how}"


class Chosen(NamedTuple):
    """What a command line asks for. stock, remark: of `find_stock`."""

    config: ST3Config
    stock: Path | None
    remark: str | None


def check(arguments: argparse.Namespace) -> Chosen:
    """What is asked for, with all that can be wrong before a download. Sets `arguments.against` to what is compared
    with. Raises St3Error's kinds."""
    config = options.config(arguments)
    libraries.check_present()
    stock, remark = find_stock(arguments.against, arguments.stock)
    arguments.against = "stock" if stock else "off"
    if arguments.shape:
        if any((arguments.hf, arguments.model, arguments.mmproj, arguments.image)) or arguments.question is not None:
            raise ConfigError("--shape is in place of --hf, --model, --mmproj, --image and --question")
        shape = SHAPES[arguments.shape]
        if (arguments.type or TYPES[0]) not in shape.types:
            raise ConfigError(
                f"--type {arguments.type} does not divide the rows of {arguments.shape}: take "
                + " or ".join(shape.types)
            )
    else:
        for name in ("visual", "text", "type", "cache_dir"):
            if getattr(arguments, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for random weights (--shape): of a model, file and picture decide"
                )
        if arguments.question is not None and not arguments.question.strip():
            raise PromptError("the question is empty")
        for picture in arguments.image or ():
            images.load(picture)
    return Chosen(config, stock, remark)


def make_jobs(
    console: Console, arguments: argparse.Namespace, chosen: Chosen, found: which.Model | None, tell: Tell
) -> tuple[Job, Job]:
    """Stock's and ST³'s; without a model (`found`) random weights are written where they are missing. Says what is
    compared with where that was not asked for. Raises St3Error's kinds."""
    stock = chosen.stock
    if found is None:
        shape = SHAPES[arguments.shape]
        visual, text, question = arguments.visual or shape.n_visual, arguments.text or TEXT, None
        folder = arguments.cache_dir or cache_folder()
        model, mmproj, pictures = str(random_text(arguments.shape, arguments.type or TYPES[0], folder, tell)), None, []
        columns = shape.grid_of(visual)[0]
        if visual % CLIP_L_336.n_visual == 0 and shape.arch == "llama":  # others are of no vision encoder that we write
            mmproj = str(random_vision(shape.n_embd, folder, tell))
            shipped = itertools.cycle(str(scene.picture) for scene in demo.scenes())
            pictures = list(itertools.islice(shipped, visual // CLIP_L_336.n_visual))
    else:
        model, mmproj = found.model, found.mmproj
        pictures = arguments.image or [str(demo.scenes()[0].picture)]
        visual, columns, text, question = 0, 0, 0, arguments.question or QUESTION
        check_pair(model, mmproj)
        for part in choose.files(model)[1:]:
            gguf.read_header(part)
        found.say(console)
    if chosen.remark:
        console.note(chosen.remark)
    keys = chosen.config.overrides(gguf.read_header(model).schedule)
    # Our own libraries would take the schedule that the file carries; stock's know of none.
    no_keys: dict[str, Override] = {} if stock else {"st3.preset": "off"}

    def job(st3: bool) -> Job:
        return Job(
            st3=st3,
            stock=None if st3 or stock is None else str(stock),
            keys=keys if st3 else no_keys,
            model=model,
            mmproj=mmproj,
            pictures=pictures,
            question=question,
            visual=visual,
            text=text,
            generate=arguments.generate,
            n_ctx=arguments.n_ctx,
            n_ubatch=arguments.n_ubatch,
            n_threads=arguments.threads,
            n_gpu_layers=arguments.n_gpu_layers,
            kv_type=arguments.ctk,
            repack=arguments.repack,
            columns=columns,
        )

    return job(False), job(True)


def fit_together(job: Job) -> bool:
    """Whether memory holds both sides at once; raises ModelError where it does not hold even one.

    An estimate. Of repacked weights each side has its own copy; others are the file's pages, which both share.
    """
    available = machine.available_memory()
    if available is None or job.n_gpu_layers:
        return True
    weights = sum(Path(part).stat().st_size for part in choose.files(job.model))
    n_ctx = job.n_ctx or job.visual + job.text + CLIP_L_336.n_visual * len(job.pictures) + job.generate
    side = _GRAPHS + _kv_bytes(gguf.read_header(job.model), n_ctx) + (weights if job.repack else 0)
    side += Path(job.mmproj).stat().st_size if job.mmproj else 0
    shared = 0 if job.repack else weights
    if shared + side > available:
        raise ModelError(
            f"about {(shared + side) / 1e9:.1f} GB of memory are needed and {available / 1e9:.1f} GB are free: "
            "take a smaller model, or end other programs"
        )
    return shared + 2 * side <= available


def bytes_per_token(model: str) -> int:
    """Bytes of weights that a decoded token reads: all but the table of embeddings, unless it is the output as well."""
    tensors = {name: n for part in choose.files(model) for name, n in gguf.read_header(part).tensors.items()}
    table = tensors.get("token_embd.weight", 0) if "output.weight" in tensors else 0
    return sum(tensors.values()) - table


def _kv_bytes(header: gguf.Header, n_ctx: int) -> int:
    """Bytes of an F16 KV cache; 0 where the file does not tell."""

    def size(key: str) -> int:
        return int(header.metadata.get(f"{header.architecture}.{key}", 0))

    heads = size("attention.head_count")
    width = size("embedding_length") * size("attention.head_count_kv") // heads if heads else 0
    return 4 * n_ctx * size("block_count") * width
