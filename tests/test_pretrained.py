"""plumbing/pretrained.py against transformers: what it writes transformers loads, what transformers
writes it loads, of any version; and what it refuses, with which sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from conftest import ARCHITECTURES, LLAMA_31, distance, load_model, logits, same_weights
from lab.pretrain import countdown_tokenizer
from model import load
from plumbing.pretrained import save


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def config_of(reference):
    """All but where it was loaded from."""
    return reference.config.to_dict() | {"_name_or_path": ""}


def saved_and_loaded_by_transformers(model, tokenizer, folder):
    save(model, tokenizer, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_transformers_loads_what_was_saved(qwen2, tmp_path, changes):
    folder, reference = qwen2(**changes)
    model, tokenizer = load(str(folder))
    again = saved_and_loaded_by_transformers(model, tokenizer, tmp_path / "saved")

    tokens = torch.randint(0, 112, (3, 70))
    want = again(tokens).logits
    got = logits(model, tokens)
    assert distance(want, got) <= 1e-4
    assert again.generation_config.eos_token_id == 0
    assert config_of(again) == config_of(reference)


@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_a_round_trip_changes_no_weight(qwen2, tmp_path, changes):
    folder, _ = qwen2(**changes)
    model, tokenizer = load(str(folder))
    save(model, tokenizer, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert same_weights(model, again)


LLAMA_31_SCALING = {key: LLAMA_31[key] for key in set(LLAMA_31) - {"rope_theta"}}


@torch.no_grad()
@pytest.mark.parametrize(
    "old, changes",
    [
        ({"rope_theta": 777.0, "torch_dtype": "float32"}, {"rope_theta": 777.0}),
        ({"rope_theta": 1e4}, {"family": Qwen3Config}),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA_31_SCALING},
            {"family": LlamaConfig, "rope_parameters": LLAMA_31},
        ),
    ],
)
def test_the_config_of_earlier_transformers_versions(qwen2, old, changes):
    """transformers 4 wrote rope_theta and rope_scaling at the top of config.json; Qwen3's head_dim
    may be absent."""
    folder, reference = qwen2(**changes)
    config = read_config(folder)
    config.pop("rope_parameters", None)
    config.pop("head_dim", None)
    write_config(folder, config | old)

    model = load_model(folder)
    tokens = torch.randint(0, 112, (2, 140))
    want = reference(tokens).logits
    got = logits(model, tokens)
    assert distance(want, got) <= 1e-4


def test_sharded_checkpoints_load_alike(qwen2, tmp_path):
    folder, reference = qwen2(tie_word_embeddings=False)
    one, tokenizer = load(str(folder))
    sharded = tmp_path / "sharded"
    reference.save_pretrained(sharded, max_shard_size="20KB")
    tokenizer.save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    many = load_model(sharded)
    assert same_weights(one, many)


@pytest.mark.parametrize("sharded", [False, True])
def test_stray_weight_files_are_not_the_model(qwen2, tmp_path, sharded):
    """An adapter, the same weights in another layout or half a copy: transformers passes by them."""
    folder, reference = qwen2()
    expected, tokenizer = load(str(folder))
    if sharded:
        folder = tmp_path / "sharded"
        reference.save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        assert not (folder / "model.safetensors").exists()

    wrong = {name: tensor + 1 for name, tensor in reference.state_dict().items()}
    del wrong["lm_head.weight"]
    for name in ("consolidated", "model-00001-of-00001", "zzz"):
        save_file(wrong, folder / f"{name}.safetensors")
    lora = {"base_model.model.layers.0.lora_A.weight": torch.ones(2, 2)}
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "model-00009-of-00009.safetensors").write_text("half")

    model = load_model(folder)
    assert same_weights(model, expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.get_input_embeddings().weight, model.embed_tokens.weight)


def test_model_safetensors_goes_before_the_index(qwen2):
    """As in transformers."""
    folder, _ = qwen2()
    expected = load_model(folder)
    index = {"weight_map": {"model.norm.weight": "nowhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(load_model(folder), expected)
    AutoModelForCausalLM.from_pretrained(folder)

    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks nowhere.safetensors, which .*index.json names"):
        load_model(folder)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names '../elsewhere.*which is not in its folder"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(folder)


def test_tensors_that_some_checkpoints_hold_besides_are_left_out(qwen2):
    """Tied checkpoints may store the head too, old ones the frequencies of RoPE."""
    folder, reference = qwen2()
    weights = load_file(folder / "model.safetensors")
    besides = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    assert not set(besides) & set(weights)
    save_file(weights | besides, folder / "model.safetensors")

    model = load_model(folder)
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[f"model.{name}"])


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_stored_head_that_is_not_the_embedding_is_never_dropped(qwen2, shard_size):
    """A checkpoint whose config.json ties what its weights do not. transformers does not tie it."""
    folder, reference = qwen2(tie_word_embeddings=False)
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size=shard_size)
    write_config(folder, read_config(folder) | {"tie_word_embeddings": True})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, reference.lm_head.weight)
    with pytest.raises(ValueError, match="has a head that is not the embedding"):
        load_model(folder)


@pytest.mark.parametrize(
    "generation, config, tokenizer, expected",
    [
        ([5, 7], 3, 0, (5, 7, 0)),  # a chat model whose turns end with the tokenizer's token
        (5, 3, 5, (5,)),
        ([7, 0], 3, 0, (7, 0)),
        (None, 3, 0, (0,)),
        (4, 3, None, (4,)),
        (None, [3, 6], None, (3, 6)),
        (None, 0, None, (0,)),
    ],
)
def test_all_end_tokens_count(qwen2, generation, config, tokenizer, expected):
    """generation_config.json's and the tokenizer's; config.json's if neither names one."""
    folder, _ = qwen2()
    write_config(folder, read_config(folder) | {"eos_token_id": config})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    file = folder / "tokenizer_config.json"
    names = json.loads(file.read_text())
    assert names.pop("eos_token") == "<eos>"  # whose id is 0
    other = {0: "<eos>", 5: countdown_tokenizer().convert_ids_to_tokens(5)}
    if tokenizer is not None:
        names["eos_token"] = other[tokenizer]
    file.write_text(json.dumps(names))
    assert load_model(folder).eos_ids == expected


def test_a_model_without_an_end_token_is_refused(qwen2):
    folder, _ = qwen2()
    write_config(folder, read_config(folder) | {"eos_token_id": None})
    (folder / "generation_config.json").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        load_model(folder)


def test_several_end_tokens_survive_a_round_trip(qwen2, tmp_path):
    folder, _ = qwen2(eos=[5, 0])
    model, tokenizer = load(str(folder))
    assert model.eos_ids == (5, 0)
    save(model, tokenizer, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.eos_ids == (5, 0)


def test_a_bf16_checkpoint_is_saved_in_the_type_it_was_trained_in(qwen2, tmp_path):
    folder, _ = qwen2()
    in_bf16 = {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    write_config(folder, read_config(folder) | in_bf16)
    model, tokenizer = load(str(folder))
    save(model, tokenizer, tmp_path / "saved")
    again = saved_and_loaded_by_transformers(model, tokenizer, tmp_path / "saved")  # over the first
    assert list(tmp_path.glob("saved*")) == [tmp_path / "saved"]
    assert again.dtype == torch.float32
    assert "torch_dtype" not in read_config(tmp_path / "saved")


def test_a_failed_save_leaves_the_earlier_one(qwen2, tmp_path, monkeypatch):
    folder, _ = qwen2()
    model, tokenizer = load(str(folder))
    saved = tmp_path / "saved"
    save(model, tokenizer, saved)
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(OSError):
        save(model, tokenizer, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    load_model(saved)


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match="there is no model folder ./nowhere"):
        load("./nowhere")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: qwen2, qwen3, llama"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"head_dim": 12}, r"k_proj.bias in .* is \(16,\), config.json wants \(24,\)"),
        ({"model_type": "llama", "attention_bias": True}, "uses biases"),
        ({"intermediate_size": 64}, r"is \(.*\), config.json wants"),
        ({"num_hidden_layers": 3}, "lacks 12 tensors"),
        ({"num_hidden_layers": 1}, "config.json does not call for"),
    ],
)
def test_a_config_that_the_code_or_the_weights_do_not_fit_is_refused(qwen2, change, sentence):
    folder, _ = qwen2()
    write_config(folder, read_config(folder) | change)
    with pytest.raises(ValueError, match=sentence):
        load_model(folder)


def test_a_config_that_lacks_a_size_is_refused(qwen2):
    folder, _ = qwen2()
    config = read_config(folder)
    del config["hidden_size"]
    write_config(folder, config)
    with pytest.raises(ValueError, match="lacks hidden_size"):
        load_model(folder)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"alpha": 0.4}', "names no model type"),
        ("[]", "does not hold a JSON object"),
        ("{", "does not hold a JSON object"),
    ],
)
def test_a_config_of_something_else_is_refused(qwen2, content, sentence):
    folder, _ = qwen2()
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_model(folder)


def test_whole_numbers_are_no_weights(qwen2):
    folder, _ = qwen2()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight in .* holds torch.int8; quantised weights"):
        load_model(folder)


def test_weights_that_cannot_be_read_are_refused(qwen2):
    folder, _ = qwen2()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(folder)
    # A file of another kind is not looked at.
    weights.rename(folder / "pytorch_model.bin")
    sentence = (
        "lacks 26 tensors, embed.* among them; only safetensors are read, model.safetensors or"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(folder)


def test_a_folder_without_a_tokenizer_is_refused(qwen2):
    folder, _ = qwen2()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_model(folder)


def test_a_hub_that_cannot_be_reached_gets_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hub did not give a model"):
        load("nobody/no-such-model")
