"""Flax models of Hugging Face transformers, with random weights and tiny configurations."""

import jax.numpy as jnp
import transformers as hf

from tests.outside.registry import Problem, cross_entropy, floats, integers, model, normal

BATCH, LENGTH, WORDS, CLASSES = 4, 6, 13, 5
# What most text configurations call their sizes.
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
TWO_SIDES = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": CLASSES}


def problem(network, inputs, labels, **fixed) -> Problem:
    """No dropout: what is drawn for it depends on a key, not on the model."""

    def loss_fn(params, inputs, labels):
        return cross_entropy(network(inputs, params=params, train=False, **fixed).logits, labels)

    return Problem(loss_fn, floats(network.params), (inputs, labels))


def dtype():
    return jnp.result_type(float)


def text(model_class, config, **fixed) -> Problem:
    """A label for each word."""
    network = model_class(config, input_shape=(1, LENGTH), seed=0, dtype=dtype())
    words = integers(WORDS, BATCH, LENGTH)
    return problem(network, words, integers(WORDS, BATCH, LENGTH, seed=1), **fixed)


def image(model_class, config, size: int = 8, **options) -> Problem:
    network = model_class(config, seed=0, dtype=dtype(), **options)
    return problem(network, normal(BATCH, 3, size, size), integers(CLASSES, BATCH))


@model("transformers: BERT")
def bert():
    return text(hf.FlaxBertForMaskedLM, hf.BertConfig(**TEXT))


@model("transformers: ALBERT")
def albert():
    return text(hf.FlaxAlbertForMaskedLM, hf.AlbertConfig(**TEXT, embedding_size=4))


@model("transformers: RoFormer")
def roformer():
    return text(hf.FlaxRoFormerForMaskedLM, hf.RoFormerConfig(**TEXT, embedding_size=8))


@model("transformers: GPT-2")
def gpt2():
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    return text(hf.FlaxGPT2LMHeadModel, hf.GPT2Config(vocab_size=WORDS, **sizes))


@model("transformers: Llama")
def llama():
    return text(hf.FlaxLlamaForCausalLM, hf.LlamaConfig(**TEXT, num_key_value_heads=1))


@model("transformers: Gemma")
def gemma():
    config = hf.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=4)
    return text(hf.FlaxGemmaForCausalLM, config)


@model("transformers: Bloom")
def bloom():
    config = hf.BloomConfig(vocab_size=WORDS, hidden_size=8, n_layer=2, n_head=2)
    return text(hf.FlaxBloomForCausalLM, config)


@model("transformers: BART")
def bart():
    config = hf.BartConfig(
        vocab_size=WORDS,
        **TWO_SIDES,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=1,
        decoder_start_token_id=1,
    )
    return text(hf.FlaxBartForConditionalGeneration, config)


@model("transformers: ViT")
def vit():
    sizes = {name: TEXT[name] for name in list(TEXT)[1:5]}
    return image(hf.FlaxViTForImageClassification, hf.ViTConfig(**sizes, **IMAGE))


@model("transformers: BEiT")
def beit():
    sizes = {name: TEXT[name] for name in list(TEXT)[1:5]}
    options = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
    return image(hf.FlaxBeitForImageClassification, hf.BeitConfig(**sizes, **IMAGE, **options))


@model("transformers: ResNet")
def resnet():
    config = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    network = hf.FlaxResNetForImageClassification(
        config, input_shape=(1, 32, 32, 3), seed=0, dtype=dtype()
    )
    state = floats(network.params["batch_stats"])

    def loss_fn(params, pixels, labels):
        variables = {"params": params, "batch_stats": state}
        outputs, _ = network(pixels, params=variables, train=True)
        return cross_entropy(outputs.logits, labels)

    batch = normal(BATCH, 3, 32, 32), integers(CLASSES, BATCH)
    return Problem(loss_fn, floats(network.params["params"]), batch)


@model("transformers: wav2vec 2.0")
def wav2vec2():
    sizes = {name: TEXT[name] for name in list(TEXT)[:5]}
    config = hf.Wav2Vec2Config(
        **sizes,
        conv_dim=(4, 4),
        conv_kernel=(4, 4),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        mask_time_prob=0.0,
    )
    network = hf.FlaxWav2Vec2ForCTC(config, input_shape=(1, 64), seed=0, dtype=dtype())
    batch = normal(BATCH, 64), integers(WORDS, BATCH, 14)
    return problem(network, *batch, freeze_feature_encoder=False)


@model("transformers: Whisper")
def whisper():
    config = hf.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=3,
        **TWO_SIDES,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    network = hf.FlaxWhisperForConditionalGeneration(
        config, input_shape=(1, 3, 2 * LENGTH), seed=0, dtype=dtype()
    )

    def loss_fn(params, sound, words, labels):
        outputs = network(sound, decoder_input_ids=words, params=params)
        return cross_entropy(outputs.logits, labels)

    words = integers(WORDS, BATCH, LENGTH)
    batch = normal(BATCH, 3, 2 * LENGTH), words, integers(WORDS, BATCH, LENGTH, seed=1)
    return Problem(loss_fn, floats(network.params), batch)
