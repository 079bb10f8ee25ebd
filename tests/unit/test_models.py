"""Tokenizers and models from settings: what is there, what falls in, and what is said when it is not there."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from hydratune import adapters
from hydratune.cli import app
from hydratune.errors import UserError
from hydratune.models import ModelRecipe, byte_tokenizer, chatml, load_tokenizer, weights_dtype


def test_the_byte_tokenizer_round_trips_any_text():
    tokenizer = byte_tokenizer()
    text = "héllo\n\t  数学 🙂 <|im_end|>"
    assert len(tokenizer) == 259
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("数学")["input_ids"]) == len("数学".encode())


def test_the_byte_tokenizer_survives_saving(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    plain = byte_tokenizer().apply_chat_template(messages, tokenize=False)
    assert loaded.apply_chat_template(messages, tokenize=False) == plain
    assert plain == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"


def test_a_tokenizer_without_pad_or_template_gets_both(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizer" / "mistral-7b-v0.3"), chat_template_path=None)
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.chat_template = None
    from hydratune.models import settle_tokenizer

    assert settle_tokenizer(tokenizer).chat_template == chatml("</s>")


def test_a_template_from_a_file_and_from_a_tokenizer(shared_data, tmp_path):
    folder = shared_data / "tokenizer" / "qwen2.5"
    marked = load_tokenizer("byte", chat_template_path=str(folder / "chatml_generation.jinja"))
    assert "generation" in marked.chat_template
    assert "im_start" in load_tokenizer("byte", chat_template_path=str(folder)).chat_template
    with pytest.raises(UserError, match=r"nowhere\.jinja"):
        load_tokenizer("byte", chat_template_path=str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_a_token_that_does_not_exist_is_named(key):
    with pytest.raises(UserError, match=f"algo.{key}.*<nope>"):
        load_tokenizer("byte", **{key: "<nope>"})


def test_a_directory_without_a_model_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for action in (lambda: load_tokenizer(str(tmp_path)), ModelRecipe(name_or_path=str(tmp_path)).config):
        with pytest.raises(UserError, match=r"notes\.txt"):
            action()


@pytest.mark.parametrize(
    "dtype,frozen,bf16,expected",
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", True, False, torch.float32),
        ("auto", False, True, torch.float32),
        ("bfloat16", False, False, torch.bfloat16),
    ],
)
def test_dtype_of_the_weights(dtype, frozen, bf16, expected):
    assert weights_dtype(dtype, frozen_base=frozen, bf16=bf16) == expected


def test_adapter_fields_and_their_errors():
    config = adapters.peft_config({"type": "lora", "r": 4, "use_dora": True})
    assert (config.r, config.use_dora, config.task_type) == (4, True, "CAUSAL_LM")
    assert adapters.peft_config(None) is None and adapters.peft_config({"type": None}) is None
    with pytest.raises(UserError, match="lora"):
        adapters.peft_config({"type": "lorra"})
    with pytest.raises(UserError, match="LoraConfig"):
        adapters.peft_config({"type": "lora", "rank": 4})


def test_quantisation_is_nf4_with_double_quantisation():
    config = adapters.quantization("4bit", torch.bfloat16)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert adapters.quantization("8bit", torch.bfloat16).load_in_8bit
    assert adapters.quantization(None, torch.float32) is None


def test_target_modules_that_match_nothing_list_what_exists():
    recipe = ModelRecipe(
        architecture={"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32},
        peft_config=adapters.peft_config({"type": "lora", "target_modules": ["query"]}),
    )  # fmt: skip
    with pytest.raises(UserError, match="q_proj"):
        recipe.build()


def test_merge_says_when_there_is_no_adapter(tmp_path):
    result = CliRunner().invoke(app, ["merge", str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "adapter_config.json" in result.output
    assert CliRunner().invoke(app, ["merge", "--dtype", "int3", str(tmp_path), "x"]).exit_code == 2
