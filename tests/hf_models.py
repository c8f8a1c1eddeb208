"""Tiny models of transformers, made from their configurations, their data, and a Trainer that trains them."""

import lzma
from importlib.resources import files

import torch
import transformers as hf

TEXT = lzma.decompress((files("stabrun.data.text") / "kjv.txt.xz").read_bytes())[:40_000]
TIME, BATCH, SEQUENCES = 32, 4, 400

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Without the cache of generation, which trainings do not need. With it, a compiled T5 is split into several graphs in
# the steps that measure gradients of inputs, and rounded otherwise.
ENCODER_DECODER = {
    "use_cache": False,
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
GPT2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}
SPARSE = {"num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}

MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, eos_token_id=0)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=16)),
    "nemotron": lambda: hf.NemotronForCausalLM(hf.NemotronConfig(**SMALL)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_local_experts=4)),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(**ENCODER_DECODER, **SPARSE)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**ENCODER_DECODER)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
}


class Examples(torch.utils.data.Dataset):
    """Text as bytes, or random images, as the arguments of a model's forward pass."""

    def __init__(self, name, seed=0):
        self.name, self.seed = name, seed

    def __len__(self):
        return SEQUENCES

    def __getitem__(self, index):
        if self.name == "vit":
            generator = torch.Generator().manual_seed(index + self.seed)
            return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 4}
        start = (index + self.seed) * TIME
        tokens = torch.tensor(list(TEXT[start : start + TIME]))
        if self.name in ("t5", "switch"):
            return {"input_ids": tokens[:16], "labels": tokens[16:]}
        return {"input_ids": tokens, "labels": tokens}


def model(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]()


def trainer(name, directory, callbacks=(), steps=50, cls=hf.Trainer, of=None, **options):
    """A Trainer on one device that logs each step."""
    options = {"learning_rate": 3e-3, "save_strategy": "no", "lr_scheduler_type": "cosine", **options}
    args = hf.TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    made = cls(
        of or model(name), args, train_dataset=Examples(name), eval_dataset=Examples(name, 7), callbacks=[*callbacks]
    )
    made.remove_callback(hf.PrinterCallback)
    return made


def logged(made, key):
    """The values that a Trainer logged, one for each step."""
    return [entry[key] for entry in made.state.log_history if key in entry]
