"""Hugging Face model folders: found, checked, read and written.

A folder holds config.json, safetensors files, a tokenizer and perhaps generation_config.json.
Tensor names are those of transformers without the leading "model.", so nothing is translated.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from plumbing.checkpoint import atomic_write, read_json, write_tensors
from plumbing.distributed import own_slice, slice_for
from plumbing.lora import adapted_layers, merged_weights, save_adapter

EMBEDDED = "base"  # the model that ships with the code
WEIGHTS = "model.safetensors"
ADAPTER = "adapter"  # the folder of PEFT's files in that of a model trained with LoRA
INDEX = "model.safetensors.index.json"  # of weights in several files: tensor -> file
SUPPORTED = ("qwen2", "qwen3", "llama")
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)


def check_supported(config: dict) -> None:
    """ValueError for a config.json that asks for what model.py does not implement."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(f"model type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise ValueError(f"the model's config.json lacks {', '.join(missing)}")

    def refuse(feature: str) -> None:
        raise ValueError(
            f"this {kind} checkpoint uses {feature}, which model.py does not implement"
        )

    unusual_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if config.get("use_sliding_window") or unusual_layers:
        refuse("sliding-window attention")
    if kind != "qwen2" and (config.get("attention_bias") or config.get("mlp_bias")):
        refuse("biases")
    rope_type = rope_parameters(config)["rope_type"]
    if rope_type not in ("default", "llama3"):
        refuse(f"RoPE scaling {rope_type!r}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        refuse(f"activation {activation!r}")


def head_size(config: dict) -> int:
    """Numbers in an attention head. Qwen3's default is 128, whatever the width."""
    if config.get("head_dim"):
        return config["head_dim"]
    if config["model_type"] == "qwen3":
        return 128
    return config["hidden_size"] // config["num_attention_heads"]


def rope_parameters(config: dict) -> dict:
    """transformers 5 has it all in rope_parameters, earlier versions in rope_scaling and
    rope_theta."""
    # Before it was called rope_type, the key was called type.
    stated = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    usual = {
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_type": stated.get("type", "default"),
    }
    return usual | stated


def find_folder(path_or_hub_id: str) -> Path:
    """The folder that holds the model: of a run, its model/; a hub id is downloaded. `base` is the
    embedded model, from any working directory. FileNotFoundError if there is none."""
    folder = Path(path_or_hub_id)
    if path_or_hub_id == EMBEDDED:
        folder = Path(__file__).parents[1] / EMBEDDED
    for candidate in (folder / "model", folder):  # a run's own config.json holds its settings
        if (candidate / "config.json").exists():
            return candidate
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")

    meant_as_path = path_or_hub_id.startswith(("/", ".", "~")) or folder.parent.exists()
    if meant_as_path or path_or_hub_id.count("/") != 1:
        raise FileNotFoundError(f"there is no model folder {path_or_hub_id}")
    return download(path_or_hub_id)


def download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # offline, unknown, gated: each its own type
        raise FileNotFoundError(
            f"there is no folder {hub_id}, and the Hugging Face hub did not give a model of that "
            f"name ({type(error).__name__})"
        ) from None


@dataclass(frozen=True)
class Pretrained:
    """A model without its weights."""

    folder: Path
    config: dict  # config.json
    tokenizer: object


def open_pretrained(path_or_hub_id: str) -> Pretrained:
    """FileNotFoundError or ValueError say in one sentence what is wrong."""
    from transformers import PreTrainedTokenizerFast

    folder = find_folder(path_or_hub_id)
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ValueError(
            f"{folder}/config.json names no model type; a run's folder holds a model once a step "
            "saved one"
        )
    check_supported(config)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    # Not AutoTokenizer: for qwen2 it installs byte-level rules whatever tokenizer.json says.
    return Pretrained(folder, config, PreTrainedTokenizerFast.from_pretrained(folder))


def read_weights(folder: Path, places: dict[str, Tensor]) -> None:
    """Copies every weight of the folder to its place, by name; no second copy of the model is made.
    ValueError if a file or a tensor is not as config.json promises."""
    waiting = dict(places)
    for file in weight_files(folder):
        try:
            with safetensors.safe_open(file, "pt") as saved:
                for name in saved.keys():
                    copy_weight(file, name, saved.get_tensor(name), waiting)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error})") from None
    if waiting:
        raise ValueError(
            f"{folder} lacks {len(waiting)} tensors, {min(waiting)} among them; "
            f"only safetensors are read, {WEIGHTS} or what {INDEX} names"
        )
    if "lm_head.weight" not in places:
        check_tied(folder, places["embed_tokens.weight"])


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or without it what the index names: transformers' rule. Whatever else is
    there, such as an adapter or a second copy in another layout, is not the model. ValueError."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        return []
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    names = {str(name) for name in file_of.values()}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is not in its folder")
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} lacks {file.name}, which {INDEX} names")
    return files


def copy_weight(file: Path, name: str, new: Tensor, waiting: dict[str, Tensor]) -> None:
    place = waiting.pop(name.removeprefix("model."), None)
    # Some tied checkpoints store the head too (check_tied), old ones RoPE's frequencies.
    superfluous = name.endswith(("lm_head.weight", "rotary_emb.inv_freq"))
    if place is None and superfluous:
        return
    if place is None:
        raise ValueError(f"{file} has a tensor {name} that config.json does not call for")
    if not new.is_floating_point():
        raise ValueError(f"{name} in {file} holds {new.dtype}; quantised weights are not read")
    if place.shape != new.shape:
        raise ValueError(
            f"{name} in {file} is {tuple(new.shape)}, config.json wants {tuple(place.shape)}"
        )
    own_slice(place).copy_(slice_for(place, new))


def check_tied(folder: Path, embedding: Tensor) -> None:
    """ValueError if config.json says that the head is the embedding, and the folder has another
    head. embedding [V, width], as it was read."""
    for file in weight_files(folder):
        with safetensors.safe_open(file, "pt") as saved:
            if "lm_head.weight" not in saved.keys():
                continue
            head = slice_for(embedding, saved.get_tensor("lm_head.weight"))
        mine = own_slice(embedding)
        if not torch.equal(head.to(mine), mine):  # on its device, in its type
            raise ValueError(
                f"{file} has a head that is not the embedding, as config.json says by "
                '"tie_word_embeddings": true; is it false?'
            )


def end_tokens(pretrained: Pretrained) -> tuple[int, ...]:
    """Ids that end a response: all that generation_config.json names, and the tokenizer's. (In some
    chat models the one lacks what ends a turn, in some the other.) config.json is asked if neither
    names one. ValueError if none does."""
    generation = pretrained.folder / "generation_config.json"
    stated = read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = [*as_list(stated), *as_list(pretrained.tokenizer.eos_token_id)]
    if not ids:
        ids = as_list(pretrained.config.get("eos_token_id"))
    if not ids:
        raise ValueError(f"{pretrained.folder} names no end-of-sequence token")
    return tuple(dict.fromkeys(ids))  # each once, in their order


def as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def save(model, tokenizer, directory: str | Path, base: str = "") -> None:
    """Writes a model.Transformer as what transformers' from_pretrained loads, wholly or not at all.
    With LoRA, merged, and beside it the adapters of the model `base`. OSError if it cannot."""
    # transformers used to call it torch_dtype.
    config = {key: value for key, value in model.config.items() if key != "torch_dtype"}
    config["dtype"] = str(model.head.dtype).removeprefix("torch.")
    eos = list(model.eos_ids)
    generation = {"eos_token_id": eos[0] if len(eos) == 1 else eos}

    with atomic_write(Path(directory)) as fresh:
        fresh.mkdir()
        write_tensors(named_as_in_transformers(model), fresh / WEIGHTS, {"format": "pt"})
        write_json(fresh / "config.json", config)
        write_json(fresh / "generation_config.json", generation)
        tokenizer.save_pretrained(fresh)
        if adapted_layers(model):
            save_adapter(model, fresh / ADAPTER, name_for_others(base))


def name_for_others(path_or_hub_id: str) -> str:
    """What transformers can load from any working directory: a full path, or the hub id."""
    is_here = path_or_hub_id == EMBEDDED or Path(path_or_hub_id).exists()
    return str(find_folder(path_or_hub_id).resolve()) if is_here else path_or_hub_id


def named_as_in_transformers(model) -> dict[str, Tensor]:
    """The weights of a model.Transformer, by the names that the families' files have. With LoRA they
    are made for this, so on the host: a GPU may lack the room."""
    with_lora = len(adapted_layers(model)) > 0
    weights = {}
    for name, tensor in merged_weights(model):
        full_name = name if name.startswith("lm_head") else "model." + name
        weights[full_name] = tensor.cpu() if with_lora else tensor
    return weights


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
